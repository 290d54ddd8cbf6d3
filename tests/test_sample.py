"""sample.py: whose text it is, that it comes as it is made, columns, refusals."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiktoken
import torch
from conftest import ROOT

import sample
from data.stream import encoding
from eval import models_of
from model import GPT, GPTConfig, save_gpt

BYTES = encoding('bytes')


@pytest.fixture
def text(monkeypatch, capsys):
    """text(*args) runs sample.py here and returns what it printed."""

    def run(*args):
        capsys.readouterr()
        monkeypatch.setattr(sys, 'argv', ['sample.py', *map(str, args)])
        sample.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(text, capsys):
    """refused(message, *args): sample.py says one line with that message, and exits with 2."""

    def run(message, *args):
        with pytest.raises(SystemExit) as exit:
            text(*args)
        said = capsys.readouterr()
        assert exit.value.code == 2 and said.out == '' and said.err.count('\n') == 1 and message in said.err, said.err

    return run


def expected(model, prompt, tokens=30, **how):
    """Prompt and continuation, through generate() and the tokenizer's own decoder, cut at an end-of-text token."""
    ids = BYTES.encode_ordinary(prompt)
    new = model.generate(torch.tensor([ids or [10]]), tokens, **how)[0, len(ids or [10]) :].tolist()
    new = new[: new.index(256)] if 256 in new else new
    return (prompt + BYTES.decode_bytes(new).decode(errors='replace')).translate(sample.CONTROL) + '\n'


def test_whose_text(train, text, tiny):
    """A user by number or name, the generalist, the base: each writes what its model generates, and they differ."""
    run = train('--expert_lr=0.05')
    users, generalist = models_of(run.out, tiny.model)[1:]
    seen = set()
    for who, model in (
        ('0', users[0]),
        ('2', users[2]),
        ('user 2', users[2]),
        ('generalist', generalist),
        ('base', tiny.model),
    ):
        out = text(run.out, f'--user={who}', '--prompt=abc', '--tokens=30', '--temperature=0')
        assert out == expected(model, 'abc', temperature=0)
        seen.add(out)
    assert len(seen) == 4
    how = ('--prompt=ab', '--tokens=30', '--temperature=1.5', '--top_k=9')
    first, third = (expected(users[0], 'ab', temperature=1.5, top_k=9, seed=seed) for seed in (4, 6))
    assert text(run.out, *how, '--seed=4') == first != third  # the first user is the default
    assert text(run.out, *how, '--seed=4', '--samples=3').split('-' * sample.NARROWEST + '\n')[::2] == [first, third]


def test_compare_is_everybodys_own_text(train, text, monkeypatch):
    """Below each other in a pipe; in columns on a terminal of 80, the same words."""
    run = train('--expert_lr=0.05')
    how = ('--prompt=ab', '--prompt=c', '--tokens=20', '--seed=2', '--temperature=1.2')
    out = text(run.out, '--compare', *how)
    titles = ('base', 'generalist', '0 user 0', '1 user 1', '2 user 2')
    assert [line for line in out.splitlines() if line in titles] == 2 * [*titles]
    assert out.count("prompt 'ab', seed 2\n") == out.count("prompt 'c', seed 2\n") == 1
    for title in titles:
        alone = text(run.out, f'--user={title.split()[0]}', *how).split('-' * sample.NARROWEST + '\n')
        for prompt, own in zip(('ab', 'c'), alone):
            assert f'{title}\n{"-" * sample.NARROWEST}\n{own.removeprefix(prompt)}' in out
    some = text(run.out, '--compare', '--user=user 2,0', *how)
    assert [line for line in some.splitlines() if line in titles] == 2 * ['base', 'generalist', '2 user 2', '0 user 0']
    monkeypatch.setattr(type(sys.stdout), 'isatty', lambda self: True)
    monkeypatch.setenv('COLUMNS', '80')
    lines = text(run.out, '--compare', *how).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.split('   ')[0] for line in lines if line.startswith(('base ', '1 user 1 '))] == 2 * ['base', '1 user 1']


def test_columns():
    out = sample.side_by_side(['a', 'b', 'c'], ['x' * 30 + '\n  y', 'one two ' * 5, '\tz'], 50)
    assert out.splitlines() == [
        'a                         b',
        '-' * 24 + '  ' + '-' * 24,
        'x' * 24 + '  ' + 'one two one two one two',
        'x' * 6 + ' ' * 20 + 'one two one two',
        '  y',
        '',
        'c',
        '-' * 24,
        '    z',
    ]


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
    process = subprocess.Popen([sys.executable, 'sample.py', *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout.read(12).decode(errors='ignore').startswith('naïve') and process.poll() is None
        process.stdout.close()
        process.wait(60)
        assert process.stderr.read() == b''
    finally:
        process.kill()


def test_refusals(train, refused, tiny, tmp_path):
    run = train()
    refused('nothing to sample from')
    refused('no config.json', tmp_path)
    refused('no base model', '--init_from=nowhere')
    for who in ('3', '-1', 'user', 'Base', '0,1'):
        refused(f'--user={who}: expected one of base, generalist, 0 (user 0), 1 (user 1), 2 (user 2)', run.out, f'--user={who}')
    refused('expected one of base', '--init_from', tiny.base, '--user=generalist')
    refused('--user=7: expected one of', run.out, '--compare', '--user=0,7')
    for bad in ('tokens=0', 'top_k=0', 'temperature=-0.1', 'temperature=nan', 'temperature=inf', 'samples=0', 'seed=-1'):
        refused(f'--{bad.replace("=0", "=0:") if bad.endswith("=0") else bad}', run.out, f'--{bad}')
    refused('invalid int value', run.out, '--tokens=many')
    refused('cannot use the device quantum', run.out, '--device=quantum')
    refused('nowhere', run.out, '--prompt=FILE:nowhere')
    (tmp_path / 'latin').write_bytes(b'caf\xe9')
    refused('latin is not text in UTF-8', run.out, f'--prompt=FILE:{tmp_path}/latin')
    save_gpt(GPT(GPTConfig(50, 16, 1, 1, 4)), tmp_path / 'small.safetensors')
    refused('vocabulary of 50 tokens: expected 257', '--init_from', tmp_path / 'small.safetensors')
    refused('not the base', run.out, '--init_from', tmp_path / 'small.safetensors')
    config = json.loads((run.out / 'config.json').read_text())
    (run.out / 'config.json').write_text(json.dumps({**config, 'users': ['a', 'a', 'b']}))
    refused('--user=a: expected one of base, generalist, 0 (a), 1 (a), 2 (b)', run.out, '--user=a')


def test_without_a_model_for_all(train, text, refused):
    """Nothing shared: no generalist. Pooled text: one model, everybody's."""
    local = train('--method=local', out='local')
    refused('--user=generalist: expected one of base, 0 (user 0)', local.out, '--user=generalist')
    assert 'generalist' not in text(local.out, '--compare', '--tokens=2')
    pooled = train('--method=centralized', out='pooled')
    assert text(pooled.out, '--compare', '--tokens=2').count('0 everybody\n') == 1
