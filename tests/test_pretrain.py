"""tools/pretrain.py: a base from scratch, on tiny data."""

import json

import pytest
import torch
from conftest import ROOT, refused

from data.stream import encoding
from model import evaluate, load_gpt
from tools import pretrain

SMALL = ('--n_layer=1', '--n_head=1', '--n_embd=16', '--n_positions=32', '--batch_size=4')


def test_a_base_learns_and_says_how_it_was_made(tiny, tmp_path, capsys):
    random, learned, again = (tmp_path / f'{name}.safetensors' for name in ('random', 'learned', 'again'))
    given = (f'--dataset={tiny.data}', *SMALL)
    pretrain.main([*given, '--steps=0', f'--out={random}'])
    for out in (learned, again):
        pretrain.main([*given, '--steps=60', '--warmup=5', f'--out={out}'])
    assert learned.read_bytes() == again.read_bytes() != random.read_bytes()
    tokens = torch.tensor(list(b'abc ab ca ' * 10)).numpy()
    losses = [evaluate(load_gpt(str(f)), tokens, 32)['loss'] for f in (random, learned)]
    assert losses[1] < losses[0] - 1
    note = json.loads(learned.with_suffix('.json').read_text())
    assert note['tokens_seen'] == 60 * 4 * 32 and '--steps=60' in note['command']
    assert note['config'] | {'steps': 60, 'bf16': True, 'lr': 2e-3, 'n_embd': 16, 'overwrite': False} == note['config']
    assert all('valid_bits_per_byte' in source for source in note['data']['sources'].values())
    assert 'exists' in refused(capsys, pretrain.main, [*given, '--steps=1', f'--out={learned}'])
    pretrain.main([*given, '--steps=1', f'--out={learned}', '--overwrite', '--bf16=False'])
    assert json.loads(learned.with_suffix('.json').read_text())['config']['bf16'] is False


@pytest.mark.parametrize(
    'args, message',
    [
        (['--dataset=nowhere'], 'nowhere'),
        (['--steps=many'], 'expected int, such as 20000'),
        (['--bf16=perhaps'], 'expected bool'),
        (['--device=meta'], 'cannot use the device meta'),
        (['--n_head=3'], 'n_embd 16 must be a multiple of n_head 3'),
        (['--n_head=0'], 'must be a multiple of n_head 0'),
        (['--step=3'], 'unrecognized arguments: --step=3'),
    ],
)
def test_bad_options_are_one_line(tiny, tmp_path, capsys, args, message):
    given = [f'--dataset={tiny.data}', *SMALL, f'--out={tmp_path}/x.safetensors', *args]
    assert message in refused(capsys, pretrain.main, given) and not (tmp_path / 'x.safetensors').exists()


def test_a_text_is_taken_as_it_is_typed(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    c = pretrain.read_options(['--out=2024_01', '--dataset=~/text', '--lr=1'])
    assert (c.out, c.dataset, c.lr) == ('2024_01', '/home/me/text', 1.0)


def test_the_optimizer_and_the_draws_are_those_of_the_shipped_base():
    """What its note says: the defaults make it again."""
    note = json.loads((ROOT / 'assets' / 'base-tiny.json').read_text())
    assert note['config'] == {name: default for name, (default, _) in pretrain.SWITCHES.items()} | {'overwrite': True}


def test_the_shipped_base():
    """At most 8 MB, bytes for tokens, and far better than chance on English: its note's figure is below 2.5 bits a byte."""
    file = ROOT / 'assets' / 'base-tiny.safetensors'
    assert file.stat().st_size < 8e6
    base = load_gpt(str(file))
    enc = encoding('bytes')
    assert base.config.vocab_size == enc.n_vocab == 257
    note = json.loads(file.with_suffix('.json').read_text())
    assert note['data']['sources']['wikipedia']['valid_bits_per_byte'] < 2.5
    text = 'The town lies on the river and was founded in the nineteenth century by settlers from the north. '
    assert enc.decode(enc.encode_ordinary(text)) == text
    tokens = torch.tensor(enc.encode_ordinary(text)).numpy()
    assert evaluate(base, tokens, 256)['loss'] / 0.6931 < 2.5  # bits per byte
    new = base.generate(torch.tensor([enc.encode_ordinary('In the year ')]), 40, temperature=0.7, top_k=20, seed=1)
    assert enc.decode(new[0].tolist()).startswith('In the year ')
