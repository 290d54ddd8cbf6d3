"""pretrain.py: a base from scratch, on tiny data."""

import json
import subprocess
import sys

import torch
from conftest import ROOT

from data.stream import encoding
from eval import evaluate
from model import load_gpt

SMALL = ('--n_layer=1', '--n_head=1', '--n_embd=16', '--n_positions=32', '--batch_size=4')


def pretrain(tiny, *args):
    command = [sys.executable, 'pretrain.py', f'--dataset={tiny.data}', *SMALL, *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_a_base_learns_and_says_how_it_was_made(tiny, tmp_path):
    random, learned = tmp_path / 'random.safetensors', tmp_path / 'learned.safetensors'
    assert pretrain(tiny, '--steps=0', f'--out={random}').returncode == 0
    done = pretrain(tiny, '--steps=60', '--warmup=5', f'--out={learned}')
    assert done.returncode == 0, done.stderr
    tokens = torch.tensor(list(b'abc ab ca ' * 10)).numpy()
    losses = [evaluate(load_gpt(str(f)), tokens, 32)['loss'] for f in (random, learned)]
    assert losses[1] < losses[0] - 1
    note = json.loads(learned.with_suffix('.json').read_text())
    assert note['tokens_seen'] == 60 * 4 * 32 and '--steps=60' in note['command']
    assert all('valid_bits_per_byte' in source for source in note['data']['sources'].values())
    again = pretrain(tiny, '--steps=1', f'--out={learned}')
    assert again.returncode == 2 and again.stderr.count('\n') == 1 and 'exists' in again.stderr


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
