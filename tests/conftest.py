"""A tiny base and a tiny data set, written in the project's own formats, and train.py run inside this process; the table of
reliability figures; and no test may look up a name that is not this machine's."""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared'  # real text for offline checks; those tests skip where it is absent
sys.path.insert(0, str(ROOT))

import train as train_file  # noqa: E402
from data.stream import write_streams  # noqa: E402
from model import GPT, GPTConfig, save_gpt  # noqa: E402

LONG = os.environ.get('RELIABILITY') == 'long'  # the counts of `make reliability`, instead of a short form of every line
FIGURES = {}  # {'R1': (what was reached, whether that is the target)}
os.environ['LOOKUPS'] = tempfile.mkstemp(prefix='lookups')[1]
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT / 'tests/no_network'), os.environ.get('PYTHONPATH')]))
exec(compile((ROOT / 'tests/no_network/sitecustomize.py').read_text(), 'sitecustomize.py', 'exec'), {})

TINY = (
    '--rounds=3',
    '--local_steps=2',
    '--router_every=2',
    '--router_steps=2',
    '--batch_size=4',
    '--micro_batch_size=4',
    '--block_size=16',
    '--eval_every=2',
)


def write_dataset(folder: Path, streams: list[dict], vocab_size: int = 257, tokenizer: str = 'bytes') -> Path:
    """streams: one {'train': tokens, 'valid': ..., 'test': ...} per user, in the layout that data/prepare.py writes."""
    one_document = [{split: [tokens] for split, tokens in user.items()} for user in streams]
    names = [f'user {i}' for i in range(len(streams))]
    write_streams(folder, names, one_document, vocab_size, {'tokenizer': tokenizer, 'source': ['made up']})
    return folder


def user_streams(i: int, n_train: int) -> dict:
    """User i's text is its own: short random words out of the letters that start at 97 + 4 i."""
    rng = np.random.default_rng((7, i))

    def text(n):
        return np.where(rng.random(n) < 0.2, 32, 97 + 4 * i + rng.integers(0, 3, n))

    return {'train': text(n_train), 'valid': text(200), 'test': text(150)}


@pytest.fixture(scope='session')
def tiny(tmp_path_factory) -> SimpleNamespace:
    """.base: a random GPT-2 of 2 layers; .data: 3 users with unequal text."""
    folder = tmp_path_factory.mktemp('tiny')
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, n_positions=32, n_layer=2, n_head=2, n_embd=16))
    save_gpt(model, folder / 'base.safetensors')
    data = write_dataset(folder / 'data', [user_streams(i, n) for i, n in enumerate((300, 500, 900))])
    return SimpleNamespace(base=folder / 'base.safetensors', data=data, model=model, folder=folder)


@pytest.fixture
def train(tiny, tmp_path):
    """train(*args) is train.main on the tiny base and data: its parts, and .out, the folder, and .lines of metrics.jsonl."""

    def run(*args: str, out: str = 'run', short: bool = True) -> SimpleNamespace:
        given = [f'--init_from={tiny.base}', f'--dataset={tiny.data}', f'--out_dir={tmp_path / out}', '--device=cpu']
        handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
        try:
            parts = train_file.main([*given, *(TINY if short else ()), *args])
        finally:  # Ctrl-C is pytest's again
            for number, handler in handlers:
                signal.signal(number, handler)
        return SimpleNamespace(**vars(parts), out=tmp_path / out, lines=read_metrics(tmp_path / out))

    return run


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b| in the Euclidean norm; both zero is 0. NaN is an error, not a pass."""
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item() if b.norm() > 0 or a.norm() > 0 else 0.0


# ---- reliability: what was reached, in a table -----------------------------------------------------------------------
@pytest.fixture
def figure():
    """figure('R1', '50/50 bit-identical', ok): a line of the table; a test fails unless its target is reached."""

    def line(name: str, reached: str, ok: bool) -> None:
        FIGURES[name] = (reached, ok)
        assert ok, f'{name}: {reached}'

    return line


def lookups() -> list[str]:
    return Path(os.environ['LOOKUPS']).read_text().splitlines()


def pytest_sessionfinish(session, exitstatus):
    if lookups() and exitstatus == 0:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    found, write = lookups(), terminalreporter.write_line
    FIGURES['R20'] = (
        f'{len(found)} look-ups of other machines by {len(terminalreporter.stats.get("passed", ()))} tests',
        not found,
    )
    for name, (reached, ok) in sorted(FIGURES.items(), key=lambda item: int(item[0][1:])):
        if LONG or name == 'R20':
            write(f'{name:4} {"met   " if ok else "MISSED"} {reached}')
    for line in sorted(set(found)):
        write(f'     {line}')
