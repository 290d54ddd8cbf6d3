"""A device needs nothing but the base, its own text, its own disk and messages: every user of these federations is alone in a
process of its own, a new one in every round, and all comes out to the bits of the simulator."""

import ast
import json
import random
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from several_runs import FORKS

import federate
import user
from configurator import configure, fit
from data.stream import encoding, load_text, load_user, read_meta
from federate import LEAVES, Tensors, n_bytes, truncate
from model import GPT, evaluate, fast_fp32, load_gpt
from run import checkpoint
from train import local_round
from user import User, start_of

ROOT = Path(__file__).resolve().parent.parent
SHORT = ['--rounds=3', '--local_steps=2', '--router_every=2', '--router_steps=2', '--batch_size=2', '--micro_batch_size=2']
SHORT += ['--block_size=16', '--judge_windows=4', '--consensus_start=1', '--dtype=float32', '--device=cpu']


def settle(argv: list[str]) -> tuple[SimpleNamespace, GPT, dict]:
    """What the server and every device find out for themselves: the switches, the frozen base, who has how much text."""
    c = configure(argv)
    base = load_gpt(c.init_from)
    meta = read_meta(Path(c.dataset), base.config.vocab_size)
    c.n_train, c.vocab_size = [user['tokens']['train'] for user in meta['users']], base.config.vocab_size
    return fit(c, len(c.n_train), base.config.n_positions), base, meta


def public_windows(c: SimpleNamespace) -> torch.Tensor:
    """(W, T) of the text that all may read."""
    tokens = load_text(c.public_text, encoding('bytes'))[: c.judge_windows * c.block_size]
    return torch.from_numpy(tokens.astype(np.int64)).view(-1, c.block_size)


# ---- messages: bytes, from which nothing can be run ------------------------------------------------------------------
def packed(question: str, tensors: Tensors, facts: object = None) -> bytes:
    tensors = {name: v.detach().contiguous() for name, v in tensors.items()}
    return json.dumps([question, facts]).encode() + b'\n' + save(tensors)


def unpacked(raw: bytes) -> tuple[str, Tensors, object]:
    head, _, body = raw.partition(b'\n')
    return json.loads(head)[0], load(body), json.loads(head)[1]


# ---- a device --------------------------------------------------------------------------------------------------------
def device(i: int, t: int, argv: list[str], precision: str, disk: Path, wire) -> None:
    """User i in round t, in a process of its own: what it is comes from its disk, and goes back there."""
    torch.set_num_threads(1)
    torch.backends.mkldnn.matmul.fp32_precision = precision
    c, base, meta = settle(argv)
    data, lines = load_user(c.dataset, meta, i), []
    if c.public_text:
        data['public'] = public_windows(c)

    def log(kind: str, values: dict) -> None:
        lines.append({'kind': kind, 'round': t + 1, **values})

    one = User(i, c, base, data)
    if t > 0:
        one.restore(*checkpoint.read(disk / 'user.safetensors'))
        base.load_state_dict(checkpoint.read(disk / 'base.safetensors')[0])
    _, server, _ = unpacked(wire.recv_bytes())
    if c.aggregate == 'flora':
        federate.merge(base, server)
    one.receive(server, t, one.stacks_seen + n_bytes(server))
    local_round(one, t, c.local_steps, log)
    while True:
        question, tensors, facts = unpacked(wire.recv_bytes())
        if question == 'take':
            break
        if question == 'judge':
            updates = {int(k): checkpoint.part(tensors, f'{k} ') for k in sorted({name.split(' ')[0] for name in tensors})}
            facts = {'updates': updates}
        wire.send_bytes(packed(question, getattr(one, question)(**facts)))
    one.take(tensors)
    log('comm', one.traffic())
    disk.mkdir(exist_ok=True)
    checkpoint.save(disk / 'user.safetensors', *one.state())
    checkpoint.save(disk / 'base.safetensors', base.state_dict(), {})
    wire.send_bytes(packed('lines', {}, lines))


# ---- the server ------------------------------------------------------------------------------------------------------
def federation(argv: list[str], folder: Path) -> tuple[list[dict], Tensors]:
    """(lines of metrics.jsonl, the server's tensors at the end). What users become is in folder/0/user.safetensors, ..."""
    (c, base, _), rng, lines = settle(argv), random.Random(0), []
    shared = {name: v for name, v in start_of(c, base).items() if name[-1] in LEAVES.get(c.aggregate, 'AB')}
    server, users = shared if c.aggregate != 'flora' else {}, [*range(len(c.n_train))]
    fast_fp32('cpu')  # once for all: it takes longer than a step
    precision = torch.backends.mkldnn.matmul.fp32_precision
    for t in range(c.rounds):
        wires, processes = {}, []
        for i in users:
            wires[i], other_end = FORKS.Pipe()
            args = i, t, argv, precision, folder / str(i), other_end
            processes.append(FORKS.Process(target=device, args=args, daemon=True))
            processes[-1].start()
            other_end.close()
            wires[i].send_bytes(packed('receive', server))

        def ask(question: str, ids: list[int], updates: dict | None = None, **facts: object) -> dict[int, Tensors]:
            tensors = {f'{i} {name}': v for i, update in (updates or {}).items() for name, v in update.items()}
            for i in ids:
                wires[i].send_bytes(packed(question, tensors, facts))
            messages = [(i, t, unpacked(wires[i].recv_bytes())[1]) for i in rng.sample(ids, len(ids))]  # in any order
            if question == 'judge':
                return {i: answer for i, _, answer in sorted(messages, key=lambda message: message[0])}
            top = messages[0][2]  # of predictions
            expected = {i: truncate(shared, c.lora_rank[i]) if question == 'upload' else top for i in ids}
            how = {'lower_rank': c.aggregate == 'hetlora', 'vocab_size': c.vocab_size}
            return federate.admit(messages, t, expected, **how)[0]

        trust = []
        sent = ask('upload', users)
        server, own = federate.combine(
            c, t, server, sent, ask, lambda kind, values: trust.append({'kind': kind, 'round': t + 1, **values})
        )
        for i in users:
            wires[i].send_bytes(packed('take', own.get(i, {})))
        told = [unpacked(wires[i].recv_bytes())[2] for i in users]
        lines += [line for theirs in told for line in theirs[:-1]] + trust + [theirs[-1] for theirs in told]
        for process in processes:
            process.join()
    return lines, server


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SLOW = ['ffa_lora', 'fedsa_lora', 'fdlora', 'comigs_1g1s_tr', 'comigs_2s', 'pfedmoe']
CASES = {
    'comigs_1gxs': ['--n_experts=3,1,2'],
    'fedavg': [],
    'pcl': [],
    'hetlora': ['--lora_rank=4,6,8', '--prune_coef=10'],
    'flexlora': ['--lora_rank=4,6,8'],
    'flora': ['--lora_rank=4,6,8'],
    'consensus': ['--n_experts=1,2,3', '--public_text=PUBLIC'],
} | {method: [] for method in SLOW}


@pytest.mark.parametrize('method', [pytest.param(m, marks=pytest.mark.slow) if m in SLOW else m for m in CASES])
def test_devices_that_share_nothing_come_to_the_bits_of_the_simulator(train, tiny, tmp_path, one_thread, method):
    """Every step's loss, every byte that is counted, the server's tensors, and all that a user is at the end: adapter, Adam's
    moments, what the server made for it."""
    (tmp_path / 'public.txt').write_text('the text that all may read ' * 10)
    args = [f'--method={method}', *SHORT, *(arg.replace('PUBLIC', str(tmp_path / 'public.txt')) for arg in CASES[method])]
    lines, server = federation([f'--init_from={tiny.base}', f'--dataset={tiny.data}', *args], tmp_path)
    run = train(*args)
    assert lines == [line for line in run.lines if line['kind'] in ('train', 'router', 'trust', 'comm')]
    assert same(server, run.server)
    for i in range(3):
        tensors, facts = checkpoint.read(tmp_path / f'{i}/user.safetensors')
        expected, kept = checkpoint.read(run.fleet.file(i))
        assert same(tensors, expected) and facts == kept


def test_a_device_in_five_lines(tmp_path, monkeypatch):
    """Those of user.py's docstring: made, trained, saved, restored. Who is restored elsewhere goes on to the same bits."""
    lines = textwrap.dedent(re.search(r'five lines:\n\n(.*?)\n\n', user.__doc__, re.S)[1])
    assert lines.count('\n') == 4
    monkeypatch.chdir(ROOT)
    tokens = np.random.default_rng(0).integers(0, 256, 600)
    scope = {**globals(), 'tokens': tokens, 'file': tmp_path / 'user.safetensors'}
    exec(lines.replace("'--dtype", "'--batch_size=8', '--block_size=32', '--dtype"), scope)
    first, c = scope['user'], scope['c']
    again = User(0, c, load_gpt('assets/base-tiny.safetensors'), first.data)
    before = evaluate(again.model, tokens, c.block_size)['loss']
    again.restore(*checkpoint.read(scope['file']))
    after = evaluate(again.model, tokens, c.block_size)['loss']
    assert after != before and after == evaluate(first.model, tokens, c.block_size)['loss']
    assert first.expert_step(1) == again.expert_step(1) and same(first.adapter, again.adapter)


def test_the_method_imports_nothing_of_the_simulation():
    for file, banned in {'user.py': {'run'}, 'federate.py': {'run', 'user'}, 'lora_moe.py': {'run', 'user'}}.items():
        nodes = [*ast.walk(ast.parse((ROOT / file).read_text()))]
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not {name.split('.')[0] for name in names} & banned, file
