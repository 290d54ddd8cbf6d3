"""tools/sample.py: whose text it is, that it comes as it is made, refusals."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiktoken
import torch
from conftest import ROOT, refused, trainer

from data.stream import encoding
from eval import open_run
from model import GPT, GPTConfig, save_gpt
from tools import sample

BYTES = encoding('bytes')


@pytest.fixture(scope='module')
def far(tiny, tmp_path_factory) -> SimpleNamespace:
    """A run whose models are far enough from each other to write different texts."""
    return trainer(tiny, tmp_path_factory.mktemp('far'))('--expert_lr=0.05')


@pytest.fixture
def text(capsys):
    """text(*args) is what the tool prints."""

    def run(*args):
        capsys.readouterr()
        sample.main([*map(str, args)])
        return capsys.readouterr().out

    return run


def expected(model, prompt, tokens=30, **how):
    """Prompt and continuation, through generate() and the tokenizer's own decoder, cut at an end-of-text token."""
    ids = BYTES.encode_ordinary(prompt)
    new = model.generate(torch.tensor([ids or [10]]), tokens, **how)[0, len(ids or [10]) :].tolist()
    new = new[: new.index(256)] if 256 in new else new
    return (prompt + BYTES.decode_bytes(new).decode(errors='replace')).translate(sample.CONTROL) + '\n'


def test_whose_text(far, text, tiny):
    """A user by number or name, the generalist, the base: each writes what its model generates, and they differ."""
    opened, seen = open_run(far.out), set()
    users = opened.models
    whom = {'0': users[0], '2': users[2], 'user 2': users[2], 'generalist': opened.generalist, 'base': tiny.model}
    for who, model in whom.items():
        out = text(far.out, f'--user={who}', '--prompt=abc', '--tokens=30', '--temperature=0')
        assert out == expected(model, 'abc', temperature=0)
        seen.add(out)
    assert len(seen) == 4
    how = ('--prompt=ab', '--tokens=30', '--temperature=1.5', '--top_k=9')
    first, third = (expected(users[0], 'ab', temperature=1.5, top_k=9, seed=seed) for seed in (4, 6))
    assert text(far.out, *how, '--seed=4') == first != third  # the first user is the default
    assert text(far.out, *how, '--seed=4', '--samples=3').split(f'{sample.RULE}\n')[::2] == [first, third]


def test_compare_is_everybodys_own_text(far, text, monkeypatch):
    """One below the other, the words of each alone."""
    how = ('--prompt=ab', '--prompt=c', '--tokens=20', '--seed=2', '--temperature=1.2')
    out = text(far.out, '--compare', *how)
    titles = ('base', 'generalist', '0 user 0', '1 user 1', '2 user 2')
    assert [line for line in out.splitlines() if line in titles] == 2 * [*titles]
    assert out.count("prompt 'ab', seed 2\n") == out.count("prompt 'c', seed 2\n") == 1
    for title in titles:
        alone = text(far.out, f'--user={title.split()[0]}', *how).split(f'{sample.RULE}\n')
        for prompt, own in zip(('ab', 'c'), alone):
            assert f'{title}\n{sample.RULE}\n{own.removeprefix(prompt)}' in out
    some = text(far.out, '--compare', '--user=user 2,0', *how)
    assert [line for line in some.splitlines() if line in titles] == 2 * ['base', 'generalist', '2 user 2', '0 user 0']
    monkeypatch.setattr(sample, 'MOST', 2)  # of many users the first, unless --user names others
    assert [line for line in text(far.out, '--compare', *how).splitlines() if line in titles] == 2 * [*titles[:4]]


def test_a_character_comes_when_it_is_complete():
    """Tokens that are parts of characters, as in GPT-2's vocabulary: 日 = e6 97 a5, of which here two bytes are one token."""
    ranks = {bytes([i]): i for i in range(256)} | {b'\xe6\x97': 256, b'\xa5 ': 257, b'\xa5 \xc3': 258}
    bpe = tiktoken.Encoding('parts', pat_str=r'(?s).+', mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 259})
    for enc, string in ((bpe, '日 é日'), (BYTES, 'naïve 日本語 🙂\n\tx')):
        ids = enc.encode_ordinary(string)
        pieces = list(sample.decode(ids, enc))
        assert len(pieces) == len(ids) + 1 and ''.join(pieces) == string == enc.decode(ids)
    assert list(sample.decode(bpe.encode_ordinary('日 é'), bpe)) == ['', '日 ', 'é', '']


def test_what_is_no_text_is_shown_as_such():
    """Bytes that are no UTF-8, a character cut off at the end, control characters, tokens that only the base's table has."""
    ids = [*b'a\xffb', *b'\xc3(', 300, *b'\x1b[2J\r\x00\t\n', 0xE6, 0x97]
    assert ''.join(sample.decode(ids, BYTES)) == 'a\ufffdb\ufffd(\ufffd\ufffd[2J\ufffd\ufffd\t\n\ufffd'


def test_prompts(text, tiny, tmp_path, capsys):
    """An empty one starts a document, a file is taken whole, of a longer one than the base has positions the end."""
    how = ('--init_from', tiny.base, '--tokens=30', '--temperature=0')
    assert text(*how) == text(*how, '--prompt=') == expected(tiny.model, '', temperature=0)
    (tmp_path / 'p').write_text('0123456789\n' * 9)
    assert text(*how, f'--prompt=FILE:{tmp_path}/p') == expected(tiny.model, ('0123456789\n' * 9)[-32:], temperature=0)
    sample.read_prompt('x' * 99, BYTES, 32)
    assert capsys.readouterr().err == 'sample.py: a prompt of 99 tokens: the model sees the last 32\n'
    gpt2 = SimpleNamespace(name='gpt2', eot_token=50256, encode_ordinary=lambda prompt: [])
    assert sample.read_prompt('', gpt2, 32) == ('', [50256])


def test_a_text_ends_at_end_of_text(text, tmp_path):
    """A base whose likeliest next token is always 256."""
    gpt = GPT(GPTConfig(257, 16, 1, 1, 4))
    for p in gpt.parameters():
        p.data.zero_()
    gpt.ln_f.bias.data[0] = gpt.wte.weight.data[256, 0] = 1
    save_gpt(gpt, tmp_path / 'm.safetensors')
    assert text('--init_from', tmp_path / 'm.safetensors', '--prompt=ab', '--temperature=0') == 'ab\n'


def test_it_streams_and_ends_with_its_reader():
    """The first bytes come long before the last token is made, and a closed pipe is no error that anybody sees."""
    args = ('--init_from=assets/base-tiny.safetensors', '--prompt=naïve', '--tokens=1000000')
    command = [sys.executable, 'tools/sample.py', *args]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout.read(12).decode(errors='ignore').startswith('naïve') and process.poll() is None
        process.stdout.close()
        process.wait(60)
        assert process.stderr.read() == b''
    finally:
        process.kill()


def test_refusals(far, text, capsys, tiny, tmp_path):
    run, small, latin = far.out, tmp_path / 'small.safetensors', tmp_path / 'latin'
    latin.write_bytes(b'caf\xe9')
    save_gpt(GPT(GPTConfig(50, 16, 1, 1, 4)), small)
    twice = shutil.copytree(run, tmp_path / 'twice')
    config = json.loads((run / 'config.json').read_text())
    (twice / 'config.json').write_text(json.dumps({**config, 'users': ['a', 'a', 'b']}))
    known = 'expected one of base, generalist, 0 (user 0), 1 (user 1), 2 (user 2)'
    cases = [
        ('nothing to sample from',),
        ('no config.json', tmp_path),
        ('no base model', '--init_from=nowhere'),
        *((f'--user={who}: {known}', run, f'--user={who}') for who in ('3', '-1', 'user', 'Base', '0,1')),
        ('expected one of base', '--init_from', tiny.base, '--user=generalist'),
        ('--user=7: expected one of', run, '--compare', '--user=0,7'),
        *((f'--{bad}: expected', run, f'--{bad}') for bad in ('tokens=0', 'top_k=0', 'temperature=-0.1', 'temperature=nan')),
        *((f'--{bad}: expected', run, f'--{bad}') for bad in ('temperature=inf', 'samples=0', 'seed=-1')),
        ('invalid int value', run, '--tokens=many'),
        ('unrecognized arguments: --token=3', run, '--token=3'),
        ('cannot use the device quantum', run, '--device=quantum'),
        ('nowhere', run, '--prompt=FILE:nowhere'),
        ('latin is not text in UTF-8', run, f'--prompt=FILE:{latin}'),
        ('vocabulary of 50 tokens: expected 257', '--init_from', small),
        ('not the base', run, '--init_from', small),
        ('--user=a: expected one of base, generalist, 0 (a), 1 (a), 2 (b)', twice, '--user=a'),
    ]
    for message, *args in cases:
        assert message in refused(capsys, text, *args), args
        assert capsys.readouterr().out == ''


def test_names_that_are_numbers(far, text, tmp_path):
    """The title says the number and the name: a name comes first, #1 is user 1, and the first user is the first."""
    run = shutil.copytree(far.out, tmp_path / 'numbers')
    config = json.loads((run / 'config.json').read_text())
    (run / 'config.json').write_text(json.dumps({**config, 'users': ['2', 'a,b', '0']}))

    def titles(*who):
        return [line for line in text(run, '--compare', '--tokens=1', *who).splitlines() if line in ('0 2', '1 a,b', '2 0')]

    assert titles() == ['0 2', '1 a,b', '2 0']
    for who, expected in (
        ('0', ['2 0']),
        ('2', ['0 2']),
        ('#0,#2', ['0 2', '2 0']),
        ('1,0', ['1 a,b', '2 0']),
        ('a,b', ['1 a,b']),
    ):
        assert titles(f'--user={who}') == expected, who
    assert text(run, '--tokens=5') == text(run, '--tokens=5', '--user=#0') != text(run, '--tokens=5', '--user=0')


def test_without_a_model_for_all(train, text, capsys):
    """Nothing shared: no generalist. Pooled text: one model, everybody's."""
    local = train('--method=local', '--rounds=1', out='local')
    said = refused(capsys, text, local.out, '--user=generalist')
    assert '--user=generalist: expected one of base, 0 (user 0)' in said
    assert 'generalist' not in text(local.out, '--compare', '--tokens=2')
    pooled = train('--method=centralized', '--rounds=1', out='pooled')
    assert text(pooled.out, '--compare', '--tokens=2').count('0 everybody\n') == 1
