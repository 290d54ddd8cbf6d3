"""train.py: Algorithm 1, its invariants (METHOD 1.8) and the files of a run, on a tiny base and three users."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, read_metrics, user_streams, write_dataset
from safetensors import safe_open
from safetensors.torch import load_file

import lora_moe
from data.stream import get_batch
from model import load_gpt

METHODS = ('pretrained', 'local', 'fedavg', 'comigs_2s', 'comigs_2g', 'comigs_1g1s', 'comigs_1gxs')


def snapshot(user):
    return {name: p.detach().clone() for name, p in user.adapter.items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- every method, end to end --------------------------------------------------------------------------------------
@pytest.mark.parametrize('method', METHODS)
def test_every_method_runs_and_reports(train, method):
    run = train(f'--method={method}')
    s = run.summary
    assert json.loads((run.out / 'summary.json').read_text()) == json.loads(json.dumps(s))
    assert len(s['test_ppl']) == len(s['pretrained_test_ppl']) == 3
    assert s['mean_test_ppl'] == pytest.approx(np.mean(s['test_ppl']))
    assert all(math.isfinite(p) for p in s['test_ppl'])
    if method == 'pretrained':
        assert s['test_ppl'] == s['pretrained_test_ppl'] and s['rounds'] == 0 and s['bytes_up'] == 0
    else:
        assert all(a < b for a, b in zip(s['test_ppl'], s['pretrained_test_ppl']))  # six steps already help
    shares = method not in ('pretrained', 'local', 'comigs_2s')
    assert (s['shared_params'] > 0) == shares and s['bytes_up'] == 4 * s['shared_params'] * 3 * s['rounds']
    assert (s['aggregated_test_ppl'] is not None) == shares


def test_experts_per_user(train):
    run = train('--method=comigs_1gxs', '--n_experts=4,1,2')
    assert [len(u.model.h[0].mlp.specialists) for u in run.users] == [3, 0, 1]
    assert run.users[1].router_opt is None  # invariant 10
    assert {line['user'] for line in run.lines if line['kind'] == 'router'} == {0, 2}
    assert len(set(run.summary['trainable_params'])) == 3


# ---- the two levels (invariants 3, 6, 9) ---------------------------------------------------------------------------
def test_the_two_levels_never_mix(train):
    """An expert step moves no router, a router step moves nothing else; the other level holds no gradient meanwhile."""
    run = train('--method=comigs_1gxs', '--n_experts=3')
    user = run.users[0]
    theta = {name for name, role in user.role.items() if role != 'router'}
    for optimizer, moved, split in ((user.expert_opt, theta, 'train'), (user.router_opt, set(user.adapter) - theta, 'valid')):
        seen = []
        step = optimizer.step
        optimizer.step = lambda: (seen.append({n for n, p in user.adapter.items() if p.grad is not None}), step())
        for p in user.adapter.values():
            p.grad = torch.ones_like(p)  # what a careless phase before this one would have left behind
        before = snapshot(user)
        run.descend(user, optimizer, user.data[split], (1, 2, 3, 4))
        assert seen == [moved]
        assert {name for name in before if not torch.equal(before[name], user.adapter[name])} == moved
        assert all(p.grad is None for p in user.adapter.values())


def test_a_step_uses_its_own_batch_only(train):
    """The first router step after expert steps has the gradient of its validation batch, as if nothing had been before
    (in the authors' code it holds 30 training gradients as well, METHOD 1.9 D1)."""
    run = train('--method=comigs_1gxs', '--n_experts=3')
    user = run.users[0]
    name = 'h.0.mlp.router.weight'
    router = user.adapter[name]
    grads = []
    user.router_opt.step = lambda: grads.append(router.grad.clone())
    user.expert_opt.step = lambda: None
    run.descend(user, user.router_opt, user.data['valid'], (1, 1))
    for i in range(3):
        run.descend(user, user.expert_opt, user.data['train'], (2, i))
    run.descend(user, user.router_opt, user.data['valid'], (1, 1))
    assert torch.equal(grads[0], grads[1]) and grads[0].norm() > 0


def test_poisoned_validation_text_cannot_reach_the_experts_before_the_router(train, tiny, tmp_path):
    """With other validation text the run is bit-equal up to the first router phase, and differs after it."""
    streams = [user_streams(i, n) for i, n in enumerate((300, 500, 900))]
    for user in streams:
        user['valid'] = user['valid'][::-1].copy()
    other = write_dataset(tmp_path / 'poisoned', streams)
    args = ('--rounds=2', '--local_steps=2', '--router_every=3')
    a, b = train(*args, out='a').lines, train(*args, f'--dataset={other}', out='b').lines
    loss = [[line['loss'] for line in lines if line['kind'] == 'train' and line['user'] == 0] for lines in (a, b)]
    assert loss[0][:3] == loss[1][:3] and loss[0][3] != loss[1][3]


def test_schedule(train):
    """Invariant 6: s ⌊R H / τ⌋ router steps, counted in expert steps and so inside a round if τ says so; learning rates."""
    run = train('--rounds=5', '--local_steps=3', '--router_every=4', '--router_steps=2')
    for i in range(3):
        router = [line for line in run.lines if line['kind'] == 'router' and line['user'] == i]
        assert len(router) == 2 * (5 * 3 // 4) and {line['step'] for line in router} == {4, 8, 12}
        assert {line['lr'] for line in router} == {2e-3}
        lrs = [line['lr'] for line in run.lines if line['kind'] == 'train' and line['user'] == i]
        assert len(lrs) == 15 and lrs[0] == 2e-3 and lrs == sorted(lrs, reverse=True)
    assert run.cosine(15) == pytest.approx(2e-4)


def test_joint_router_learns_with_the_experts(train):
    """router_data='joint': one optimizer, no router phase, the router on the cosine too."""
    run = train('--router_data=joint')
    assert not any(line['kind'] == 'router' for line in run.lines)
    name = 'h.0.mlp.router.weight'
    assert not torch.equal(run.users[0].adapter[name], lora_moe.initial(name, (2, 16), 42, 'user', 0))


def test_validation_router_on_training_text_is_the_training_router(train, tmp_path):
    """With the valid stream := the train stream, router_data='valid' and 'train' are the same run (METHOD 2, -tr)."""
    streams = [user_streams(i, n) for i, n in enumerate((300, 500, 900))]
    for user in streams:
        user['valid'] = user['train']
    folder = write_dataset(tmp_path / 'same', streams)
    a = train(f'--dataset={folder}', out='a')
    b = train(f'--dataset={folder}', '--router_data=train', out='b')
    assert a.lines == b.lines and all(same(u.adapter, v.adapter) for u, v in zip(a.users, b.users))


# ---- what is shared (invariants 4, 7, 8) ---------------------------------------------------------------------------
def test_after_synchronisation(train):
    run = train('--method=comigs_1g1s')
    role = run.users[0].role
    for a in range(3):
        for b in range(a):
            for name, r in role.items():
                equal = torch.equal(run.users[a].adapter[name], run.users[b].adapter[name])
                assert equal == (r in ('generalist', 'attention')), name
    for name in run.shared:
        mean = torch.stack([load_file(run.out / f'adapters/user{i}.safetensors')[name] for i in range(3)]).mean(0)
        assert torch.allclose(run.server[name], mean, atol=1e-7)


def test_generalists_only_one_each_is_fedavg_with_one_expert(train):
    """Invariant 7, first half."""
    a = train('--method=comigs_1gxs', '--n_experts=1', out='a')
    b = train('--method=fedavg', '--n_experts=1', '--n_generalists=1', out='b')
    assert all(same(u.adapter, v.adapter) for u, v in zip(a.users, b.users))


def test_two_generalists_under_a_zero_router_are_fedavg(train, monkeypatch):
    """Invariant 7, second half: Φ = 0, never trained, gives the plain mean of the two experts."""
    real = lora_moe.initial
    monkeypatch.setattr(lora_moe, 'initial', lambda name, *a: real(name, *a) * ('router' not in name))
    a = train('--method=comigs_2g', '--router=frozen', out='a')
    b = train('--method=fedavg', out='b')
    for u, v in zip(a.users, b.users):
        for name in v.adapter:
            assert torch.allclose(u.adapter[name], v.adapter[name], atol=1e-4), name
    assert a.summary['test_ppl'] == pytest.approx(b.summary['test_ppl'], rel=1e-4)


def test_a_single_user_has_nobody_to_share_with(train, tmp_path, monkeypatch):
    """Invariant 8: with N = 1, 1G1S is 2S (given the same start: here it depends on the expert's number, not its role)."""
    real = lora_moe.initial

    def by_number(name, shape, *key):
        one = name.replace('specialists.0', 'specialists.1').replace('generalists.0', 'specialists.0')  # as 2S names them
        return real(name if by_number.two else one, shape, 'same for all')

    folder = write_dataset(tmp_path / 'one', [user_streams(0, 300)])
    monkeypatch.setattr(lora_moe, 'initial', by_number)
    runs = []
    for method, by_number.two in (('comigs_1g1s', False), ('comigs_2s', True)):
        runs.append(train(f'--method={method}', f'--dataset={folder}', out=method))
    assert runs[0].summary['test_ppl'] == runs[1].summary['test_ppl']
    losses = [[line['loss'] for line in run.lines if line['kind'] in ('train', 'router')] for run in runs]
    assert losses[0] == losses[1]


# ---- one base, determinism, data -----------------------------------------------------------------------------------
def test_the_base_never_changes_and_exists_once(train, tiny):
    run = train('--method=comigs_1gxs', '--n_experts=3')
    original = load_gpt(str(tiny.base)).state_dict()
    assert all(torch.equal(p, original[name]) and p.grad is None for name, p in run.base.named_parameters())
    storages = [{p.data_ptr() for name, p in u.model.named_parameters() if name not in u.role} for u in run.users]
    assert storages[0] == storages[1] == storages[2] == {p.data_ptr() for p in run.base.parameters()}
    for user in run.users:  # a user's memory: LoRA and routers, and two Adam moments for each
        state = [*user.expert_opt.state.values(), *user.router_opt.state.values()]
        moments = sum(s['exp_avg'].numel() + s['exp_avg_sq'].numel() for s in state)
        assert moments == 2 * sum(p.numel() for p in user.adapter.values())


def test_same_seed_same_bits(train):
    a, b, c = train(out='a'), train(out='b'), train('--seed=43', out='c')
    assert (a.out / 'metrics.jsonl').read_bytes() == (b.out / 'metrics.jsonl').read_bytes()
    assert all(same(u.adapter, v.adapter) for u, v in zip(a.users, b.users))
    assert a.lines != c.lines


def test_a_users_batches_do_not_depend_on_the_other_users(train, tmp_path):
    """User 1's first steps are the same with two more users beside it: same start, same batches."""
    few = write_dataset(tmp_path / 'few', [user_streams(i, n) for i, n in enumerate((300, 500))])
    a, b = train('--method=local', out='a'), train('--method=local', f'--dataset={few}', out='b')
    mine = [[line for line in run.lines if line['user'] == 1] for run in (a, b)]
    assert mine[0] == mine[1]
    tokens = np.arange(500)
    x, y = get_batch(tokens, 4, 16, (42, 1, 0, 7))
    assert torch.equal(x + 1, y) and torch.equal(x, get_batch(tokens, 4, 16, (42, 1, 0, 7))[0])
    assert not torch.equal(x, get_batch(tokens, 4, 16, (42, 2, 0, 7))[0])


def test_accumulation_over_micro_batches(train):
    """4 windows at once, or 1 at a time, or 3 and 1: the same gradients up to rounding (n = 2: load balancing is constant)."""
    losses = [
        [line['loss'] for line in train(f'--micro_batch_size={m}', out=f'm{m}').lines if line['kind'] == 'train']
        for m in (4, 1, 3)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] == pytest.approx(losses[2], rel=1e-3)


def test_mixture_target(train):
    """Every user is tested on an equal share of everybody's text; what it trains on stays its own."""
    own, mixed = train('--rounds=1', out='own'), train('--rounds=1', '--target=mixture', out='mixed')
    for i, user in enumerate(mixed.users):
        assert np.array_equal(user.data['train'], own.users[i].data['train'])
        pieces = [own.users[j].data['test'][i * 50 : (i + 1) * 50] for j in range(3)]
        assert np.array_equal(user.data['test'], np.concatenate(pieces))


# ---- files of a run ------------------------------------------------------------------------------------------------
def test_metrics_and_adapters(train):
    run = train('--method=comigs_1gxs', '--n_experts=2,4,2')
    kinds = {line['kind'] for line in run.lines}
    assert kinds == {'train', 'router', 'eval', 'comm'}
    for line in run.lines:
        assert {'round', 'step', 'user'} <= line.keys()
        if 'loss' in line:
            assert line['ppl'] == pytest.approx(math.exp(line['loss']))
    comm = [line for line in run.lines if line['kind'] == 'comm']
    assert len(comm) == 3 * 3 and {line['bytes_up'] for line in comm} == {run.summary['shared_params'] * 4}
    final = [line['ppl'] for line in run.lines if line['kind'] == 'eval' and line['when'] == 'local' and line['round'] == 3]
    assert final == run.summary['test_ppl']
    for line in run.lines:
        if line['kind'] == 'eval' and line['when'] == 'local' and line['split'] == 'test':  # (L, E), a row sums to 1
            E = (2, 4, 2)[line['user']]
            assert all(len(layer) == E and sum(layer) == pytest.approx(1) for layer in line['scores'])
    with safe_open(run.out / 'adapters/user1.safetensors', 'pt') as f:
        assert set(f.keys()) == set(run.users[1].adapter)
        facts = f.metadata()
        assert (facts['n_experts'], facts['rank'], facts['n_generalists']) == ('4', '8', '1')
        assert float(facts['scaling']) == pytest.approx(16 / math.sqrt(8))
    config = json.loads((run.out / 'config.json').read_text())
    assert config['n_experts'] == [2, 4, 2] and config['method'] == 'comigs_1gxs' and config['versions']['torch']
    with safe_open(run.out / 'adapters/server.safetensors', 'pt') as f:
        assert set(f.keys()) == set(run.shared)


@pytest.mark.parametrize('args', [('--method=comigs_1gxs', '--n_experts=3,1,2'), ('--method=comigs_2s',)])
def test_resume_is_bit_identical(train, monkeypatch, args):
    """Killed in the middle of round 3 of 4, continued: the same adapters and the same metrics file, byte for byte."""
    whole = train(*args, '--rounds=4', out='whole')

    def dies(tokens, batch_size, block_size, key):
        dies.calls += 1
        if dies.calls == 17:
            raise KeyboardInterrupt
        return get_batch(tokens, batch_size, block_size, key)

    dies.calls = 0
    import data.stream

    monkeypatch.setattr(data.stream, 'get_batch', dies)
    with pytest.raises(KeyboardInterrupt):
        train(*args, '--rounds=4', out='cut')
    monkeypatch.setattr(data.stream, 'get_batch', get_batch)
    resumed = train(*args, '--rounds=4', '--resume', out='cut')
    assert resumed.start > 0
    assert (whole.out / 'metrics.jsonl').read_bytes() == (resumed.out / 'metrics.jsonl').read_bytes()
    assert all(same(u.adapter, v.adapter) for u, v in zip(whole.users, resumed.users))
    for file in sorted((whole.out / 'adapters').iterdir()):
        assert same(load_file(file), load_file(resumed.out / 'adapters' / file.name))
    keys = ('test_ppl', 'aggregated_test_ppl', 'pretrained_test_ppl', 'bytes_up')
    assert all(whole.summary[k] == resumed.summary[k] for k in keys)


def test_bfloat16(train):
    """bf16 autocast changes the numbers a little and nothing else; adapters stay float32."""
    a, b = (train('--method=comigs_1gxs', '--n_experts=3', f'--dtype={dtype}', out=dtype) for dtype in ('float32', 'bfloat16'))
    assert a.summary['test_ppl'] != b.summary['test_ppl']
    assert a.summary['test_ppl'] == pytest.approx(b.summary['test_ppl'], rel=0.05)
    assert all(p.dtype == torch.float32 for p in b.users[0].adapter.values())


def test_a_run_that_diverges_stops_with_one_line(train, tmp_path):
    """No NaN is averaged into the others' generalists; what finished before stays."""
    with pytest.raises(SystemExit, match='training loss is .* lower --expert_lr'):
        train('--expert_lr=1e30', '--rounds=4')
    assert not (tmp_path / 'run' / 'summary.json').exists()


# ---- bad input: one line, exit code 2, nothing written --------------------------------------------------------------
def refused(capsys, run, *args) -> str:
    with pytest.raises(SystemExit) as exit:
        run(*args)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count('\n') == 1, err
    return err


@pytest.mark.parametrize(
    'args, message',
    [
        (['--method=comigs_1g1'], 'unknown method comigs_1g1; did you mean comigs_1g1s'),
        (['--n_expert=2'], 'unknown switch --n_expert; did you mean --n_experts'),
        (['--n_experts=4,2'], 'expected one value from 1 to 4096, or 3, one per user'),
        (['--n_experts=0'], 'expected one value from 1 to 4096'),
        (['--n_experts=1,2,2', '--n_generalists=2'], 'user 0 has n_experts=1, fewer than n_generalists=2'),
        (['--rounds=many'], 'expected int'),
        (['--router_data=test'], 'expected one of valid, train, joint'),
        (['--batch_size=0'], 'greater than 0'),
        (['--seed=-1'], 'must not be negative'),
        (['--block_size=64'], 'has only 32 positions'),
        (['--block_size=1000'], 'needs 1001'),
        (['--dataset=nowhere'], 'no data set at'),
        (['--init_from=nowhere'], 'no base model at'),
        (['--init_from=README.md'], 'cannot be read as model weights'),
        (['--device=tpu9'], 'device'),
        (['--aggregate=none'], 'shares no tensors'),
        (['--lora_rank=4,8,8'], '--lora_rank must be the same'),
        (['--resume'], 'has no checkpoint'),
        (['notes.txt'], 'neither a config file'),
        (['config/nothing.py'], 'cannot read the config file'),
    ],
)
def test_bad_switches(train, tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(ROOT)
    err = refused(capsys, train, *args)
    assert message in err
    assert not (tmp_path / 'run').exists()


def corrupt(folder, kind):
    meta = json.loads((folder / 'meta.json').read_text())
    if kind == 'truncated':
        (folder / 'user1_train.bin').write_bytes((folder / 'user1_train.bin').read_bytes()[:-3])
    elif kind == 'missing':
        (folder / 'user2_valid.bin').unlink()
    elif kind == 'altered':
        raw = bytearray((folder / 'user0_test.bin').read_bytes())
        raw[10] ^= 1
        (folder / 'user0_test.bin').write_bytes(raw)
    elif kind == 'vocabulary':
        (folder / 'user0_test.bin').write_bytes(np.full(150, 300, '<u2').tobytes())
    elif kind == 'tokenizer':
        (folder / 'meta.json').write_text(json.dumps({**meta, 'vocab_size': 50257, 'tokenizer': 'gpt2'}))
    elif kind == 'meta':
        (folder / 'meta.json').write_text('{')


@pytest.mark.parametrize(
    'kind, message',
    [
        ('truncated', 'user1_train.bin has 997 bytes, but meta.json says 500 tokens'),
        ('missing', 'user2_valid.bin is missing'),
        ('altered', 'user0_test.bin is not the file'),
        ('vocabulary', 'token 300, outside the vocabulary of 257'),
        ('tokenizer', 'vocabulary of 50257'),
        ('meta', 'meta.json cannot be read'),
    ],
)
def test_bad_data(train, tmp_path, capsys, kind, message):
    folder = write_dataset(tmp_path / 'bad', [user_streams(i, n) for i, n in enumerate((300, 500, 900))])
    corrupt(folder, kind)
    assert message in refused(capsys, train, f'--dataset={folder}')
    assert not (tmp_path / 'run').exists()


def test_a_run_is_never_overwritten_by_accident(train, tmp_path, capsys):
    first = train()
    files = {f: f.read_bytes() for f in first.out.rglob('*') if f.is_file()}
    assert 'already holds a finished run' in refused(capsys, train)
    assert 'made with another rounds, seed;' in refused(capsys, train, '--resume', '--seed=1', '--rounds=9')
    assert all(f.read_bytes() == content for f, content in files.items())
    train('--overwrite', '--seed=1')
    (first.out / 'checkpoint' / 'round-3.safetensors').write_bytes(b'broken')
    err = refused(capsys, train, '--resume', '--seed=1')
    assert 'round-3.safetensors is damaged' in err and 'round 2 is intact: delete' in err
    (first.out / 'checkpoint' / 'round-2.safetensors').write_bytes(b'broken')
    assert 'round-2.safetensors is damaged' in refused(capsys, train, '--resume', '--seed=1')
    (tmp_path / 'file').write_text('')
    assert 'is a file' in refused(capsys, train, f'--out_dir={tmp_path}/file')


def test_bad_input_from_the_shell(tiny, tmp_path):
    """As a person meets it: one line on stderr, exit code 2, no traceback, and no heavy optional import on the way."""
    code = (
        'import runpy, sys; sys.argv[0] = "train.py"\ntry: runpy.run_path("train.py", run_name="__main__")\n'
        'finally: assert not {"datasets", "matplotlib", "transformers"} & set(sys.modules)'
    )
    no_data = [f'--init_from={tiny.base}', f'--dataset={tiny.folder}']
    for args, message in ((['--rounds=x'], 'expected int'), (no_data, 'no data set')):
        command = [sys.executable, '-c', code, *args, f'--out_dir={tmp_path}/x']
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2 and done.stderr.count('\n') == 1 and message in done.stderr
    assert not (tmp_path / 'x').exists()


def test_help_lists_every_switch():
    done = subprocess.run([sys.executable, 'train.py', '--help'], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and 'router_every = 30' in done.stdout and 'comigs_1g1s' in done.stdout


def test_the_metrics_file_grows_as_it_happens(train, tmp_path, monkeypatch):
    """Lines are on disk before the run ends: a run that dies leaves what it did."""
    import data.stream

    def dies(*args):
        if (tmp_path / 'run' / 'metrics.jsonl').read_text().count('"train"') == 4:
            raise KeyboardInterrupt
        return get_batch(*args)

    monkeypatch.setattr(data.stream, 'get_batch', dies)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert sum(line['kind'] == 'train' for line in read_metrics(tmp_path / 'run')) == 4
    assert TINY
