"""A tiny base and a tiny data set, written in the project's own formats, and train.py run inside this process; the table of
reliability figures; and no test may look up a name that is not this machine's."""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault('OMP_NUM_THREADS', '1')  # tiny tensors: a second thread only waits, and the tests run in two processes

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared'  # real text for offline checks; those tests skip where it is absent
sys.path.insert(0, str(ROOT))

import federate  # noqa: E402
import train as train_file  # noqa: E402
from configurator import configure, fit  # noqa: E402
from data.stream import write_streams  # noqa: E402
from model import GPT, GPTConfig, save_gpt  # noqa: E402
from user import User, start_of  # noqa: E402

LONG = os.environ.get('RELIABILITY') == 'long'  # the counts of `make reliability`, instead of a short form of every line
FIGURES = {}  # {'R1': (what was reached, whether that is the target)}
if 'LOOKUPS' not in os.environ:  # one list for all processes of the tests
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

N_TRAIN = (300, 500, 900)  # tokens of the tiny users


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
    data = write_dataset(folder / 'data', [user_streams(i, n) for i, n in enumerate(N_TRAIN)])
    return SimpleNamespace(base=folder / 'base.safetensors', data=data, model=model, folder=folder)


def trainer(tiny: SimpleNamespace, folder: Path) -> Callable:
    """train(*args) is train.main on the tiny base and data: its parts, and .out, the folder, and .lines of metrics.jsonl."""

    def run(*args: str, out: str = 'run', short: bool = True) -> SimpleNamespace:
        given = [f'--init_from={tiny.base}', f'--dataset={tiny.data}', f'--out_dir={folder / out}', '--device=cpu']
        handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
        try:
            parts = train_file.main([*given, *(TINY if short else ()), *args])
        finally:  # Ctrl-C is pytest's again
            for number, handler in handlers:
                signal.signal(number, handler)
        return SimpleNamespace(**vars(parts), out=folder / out, lines=read_metrics(folder / out))

    return run


@pytest.fixture
def train(tiny, tmp_path):
    return trainer(tiny, tmp_path)


@pytest.fixture(scope='session')
def finished(tiny, tmp_path_factory) -> SimpleNamespace:
    """A finished run of three users with 3, 1 and 2 experts, for all tests that look at one and leave it as it is."""
    return trainer(tiny, tmp_path_factory.mktemp('finished'))('--method=comigs_1gxs', '--n_experts=3,1,2')


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
    for name, (reached, ok) in sorted(FIGURES.items(), key=lambda item: (item[0][0], int(item[0][1:]))):
        if LONG or name == 'R20' or name[0] == 'D':
            write(f'{name:4} {"met   " if ok else "MISSED"} {reached}')
    for line in sorted(set(found)):
        write(f'     {line}')


# ---- the method without a run: users in memory, no folder ------------------------------------------------------------
def devices(base: GPT, *switches: str, N: int = 3, **more: object) -> list[User]:
    """N tiny users as they begin. more: data beside their splits, such as public text."""
    c = fit(configure([*TINY, *switches]), N, base.config.n_positions)
    c.n_train, c.vocab_size = N_TRAIN[:N], base.config.vocab_size
    return [User(i, c, base, user_streams(i, n) | more) for i, n in enumerate(c.n_train)]


def trained(base: GPT, *switches: str, N: int = 3, **more: object) -> SimpleNamespace:
    """train.algorithm_1 without files, fleet or journal: .users after the last round, .lines of metrics.jsonl, and of that
    round .sent, what they sent, .server, and .own, what the server made for single users. FLoRA adds to `base`."""
    users, lines = devices(base, *switches, N=N, **more), []
    c, stacks, sent, own = users[0].c, 0, {}, {}
    server = {name: v for name, v in start_of(c, base).items() if name in users[0].shared and c.aggregate != 'flora'}

    def ask(question: str, ids: list[int], **told: object) -> dict:
        return {user.id: getattr(user, question)(**told) for user in users if user.id in ids}

    for t in range(c.rounds):

        def log(kind: str, values: dict) -> None:
            lines.append({'kind': kind, 'round': t + 1, **values})

        if c.aggregate == 'flora':
            federate.merge(base, server)
            server, stacks = {}, stacks + federate.n_bytes(server)
        for user in users:
            user.receive(server, t, stacks)
            train_file.local_round(user, t, c.local_steps, log)
        sent = ask('upload', [*range(N)])
        server, own = federate.combine(c, t, server, sent, ask, log)
        for user in users:
            user.take(own.get(user.id))
            log('comm', user.traffic())
    return SimpleNamespace(c=c, users=users, lines=lines, sent=sent, server=server, own=own)


# ---- what many tests say ---------------------------------------------------------------------------------------------
def refused(capsys, run: Callable, *args: object) -> str:
    """The one line with which run(*args) ends; its exit code is 2."""
    with pytest.raises(SystemExit) as exit:
        run(*args)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count('\n') == 1, err
    return err


def snapshot(user: User) -> dict:
    return {name: p.detach().clone() for name, p in user.adapter.items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
