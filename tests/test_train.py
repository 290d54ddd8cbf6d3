"""Algorithm 1: its two levels, what is shared, the data (METHOD 1.8), as calls of a user's methods; and the files of a run."""

import ast
import fcntl
import importlib.util
import json
import math
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import N_TRAIN, ROOT, devices, read_metrics, refused, same, snapshot, trained, user_streams, write_dataset
from safetensors import safe_open
from safetensors.torch import load_file

import train as train_file
import user as user_file
from data.stream import Texts, get_batch
from lora_moe import initial
from model import evaluate, load_gpt, save_gpt
from run import checkpoint
from train import local_round


def steps(user, rounds: int = 1) -> list[dict]:
    """A user's rounds without a server: what they would log."""
    lines = []
    for t in range(rounds):
        local_round(user, t, user.c.local_steps, lambda kind, values: lines.append({'kind': kind, **values}))
    return lines


def losses(lines: list[dict], kind: str = 'train') -> list[float]:
    return [line['loss'] for line in lines if line['kind'] == kind]


# ---- what one reads --------------------------------------------------------------------------------------------------
def test_the_method_is_what_one_sees():
    """Lines from `def` to the end; names: the distinct ast.Name identifiers within the loop of `algorithm_1`, whatever is
    written after a dot not counted."""
    source = (ROOT / 'train.py').read_text()
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    method = functions['local_round'], functions['algorithm_1']
    assert sum(node.end_lineno - node.lineno + 1 for node in method) <= 45
    (loop,) = (node for node in functions['algorithm_1'].body if isinstance(node, ast.For))
    assert len({node.id for node in ast.walk(loop) if isinstance(node, ast.Name)}) <= 30
    assert len(source.splitlines()) <= 170


def test_importing_it_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['train.py', '--nonsense'])  # who looked at it would end here
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    spec = importlib.util.spec_from_file_location('train_again', ROOT / 'train.py')
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not [*tmp_path.iterdir()] and capsys.readouterr() == ('', '')
    *_, last = body = ast.parse((ROOT / 'train.py').read_text()).body
    assert {type(node) for node in body} == {ast.Expr, ast.Import, ast.ImportFrom, ast.FunctionDef, ast.If}
    assert ast.unparse(last).startswith("if __name__ == '__main__'") and sum(isinstance(node, ast.Expr) for node in body) == 1


# ---- the two levels (invariants 3, 6, 9) -----------------------------------------------------------------------------
def test_the_two_levels_never_mix(tiny):
    """An expert step moves no router, a router step moves nothing else; the other level holds no gradient meanwhile."""
    user = devices(tiny.model, '--method=comigs_1gxs', '--n_experts=3')[0]
    theta = {name for name, role in user.role.items() if role != 'router'}
    levels = (user.expert_opt, theta, lambda: user.expert_step(0)), (user.router_opt, {*user.adapter} - theta, user.router_step)
    for optimizer, moved, descend in levels:
        seen, step = [], optimizer.step
        optimizer.step = lambda: (seen.append({n for n, p in user.adapter.items() if p.grad is not None}), step())
        for p in user.adapter.values():
            p.grad = torch.ones_like(p)  # what a careless phase before this one would have left behind
        before = snapshot(user)
        descend()
        assert seen == [moved]
        assert {name for name in before if not torch.equal(before[name], user.adapter[name])} == moved
        assert all(p.grad is None for p in user.adapter.values())


def test_a_step_uses_its_own_batch_only(tiny):
    """The first router step after expert steps has the gradient of its validation batch, as if nothing had been before
    (in the authors' code it holds 30 training gradients as well, METHOD 1.9 D1)."""
    user = devices(tiny.model, '--method=comigs_1gxs', '--n_experts=3')[0]
    router, grads = user.adapter['h.0.mlp.router.weight'], []
    user.router_opt.step = lambda: grads.append(router.grad.clone())
    user.expert_opt.step = lambda: None
    user.router_step()
    for step in range(3):
        user.expert_step(step)
    user.router_steps = 0
    user.router_step()
    assert torch.equal(grads[0], grads[1]) and grads[0].norm() > 0


def test_poisoned_validation_text_cannot_reach_the_experts_before_the_router(tiny):
    """With other validation text all is bit-equal up to the first router phase, and differs after it."""
    a, b = (devices(tiny.model, '--router_every=3')[0] for _ in 'ab')
    b.data['valid'] = b.data['valid'][::-1].copy()
    lines = [[user.expert_step(step) for step in range(3)] for user in (a, b)]
    assert lines[0] == lines[1] and same(a.adapter, b.adapter)
    assert a.router_step()['loss'] != b.router_step()['loss']
    assert {name for name in a.adapter if not torch.equal(a.adapter[name], b.adapter[name])} == {
        name for name, role in a.role.items() if role == 'router'
    }
    assert a.expert_step(3)['loss'] != b.expert_step(3)['loss']


def test_schedule(tiny):
    """Invariant 6: s ⌊R H / τ⌋ router steps, counted in expert steps and so inside a round if τ says so; learning rates."""
    user = devices(tiny.model, '--rounds=5', '--local_steps=3', '--router_every=4', '--router_steps=2')[0]
    lines = steps(user, 5)
    router = [line for line in lines if line['kind'] == 'router']
    assert len(router) == user.router_steps == 2 * (5 * 3 // 4) and [line['step'] for line in router] == [4, 4, 8, 8, 12, 12]
    assert {line['lr'] for line in router} == {2e-3} == {group['lr'] for group in user.router_opt.param_groups}
    lrs = [line['lr'] for line in lines if line['kind'] == 'train']
    assert len(lrs) == 15 and lrs[0] == 2e-3 and lrs == sorted(lrs, reverse=True)
    assert user.expert_step(15)['lr'] == pytest.approx(2e-4) == user.expert_opt.param_groups[0]['lr']


def test_joint_router_learns_with_the_experts(tiny):
    """router_data='joint': one optimizer, no router phase, the router on the cosine too."""
    user = devices(tiny.model, '--router_data=joint')[0]
    assert user.router_opt is None and losses(steps(user), 'router') == []
    name = 'h.0.mlp.router.weight'
    assert not torch.equal(user.adapter[name], initial(name, (2, 16), 42, 'user', 0))
    assert any(p is user.adapter[name] for group in user.expert_opt.param_groups for p in group['params'])


def test_validation_router_on_training_text_is_the_training_router(tiny):
    """With the valid stream := the train stream, router_data='valid' and 'train' are the same (METHOD 2, -tr)."""
    a, b = devices(tiny.model)[0], devices(tiny.model, '--router_data=train')[0]
    a.data['valid'] = a.data['train']
    assert steps(a, 3) == steps(b, 3) and same(a.adapter, b.adapter)


# ---- what is shared (invariants 4, 7, 8, 10) -------------------------------------------------------------------------
def test_after_synchronisation(finished):
    role, users = finished.users[0].role, finished.users
    for a, b in ((users[0], users[1]), (users[1], users[2]), (users[0], users[2])):
        for name in a.adapter.keys() & b.adapter.keys():
            equal = torch.equal(a.adapter[name], b.adapter[name]) if a.adapter[name].shape == b.adapter[name].shape else False
            assert equal == (role[name] in ('generalist', 'attention')), name
    saved = [load_file(finished.out / f'adapters/user{i}.safetensors') for i in range(3)]
    for name, v in finished.server.items():
        assert torch.allclose(v, torch.stack([own[name] for own in saved]).mean(0), atol=1e-7)


def test_experts_per_user(finished):
    assert [len(u.model.h[0].mlp.specialists) for u in finished.users] == [2, 0, 1]
    assert finished.users[1].router_opt is None  # invariant 10
    assert {line['user'] for line in finished.lines if line['kind'] == 'router'} == {0, 2}
    assert len(set(finished.summary['trainable_params'])) == 3


def test_generalists_only_one_each_is_fedavg_with_one_expert(tiny):
    """Invariant 7, first half."""
    a = trained(tiny.model, '--method=comigs_1gxs', '--n_experts=1')
    b = trained(tiny.model, '--method=fedavg', '--n_experts=1', '--n_generalists=1')
    assert all(same(u.adapter, v.adapter) for u, v in zip(a.users, b.users))


def test_two_generalists_under_a_zero_router_are_fedavg(tiny, monkeypatch):
    """Invariant 7, second half: Φ = 0, never trained, gives the plain mean of the two experts."""
    monkeypatch.setattr(user_file, 'initial', lambda name, *a: initial(name, *a) * ('router' not in name))
    a, b = trained(tiny.model, '--method=comigs_2g', '--router=frozen'), trained(tiny.model, '--method=fedavg')
    for u, v in zip(a.users, b.users):
        assert all(torch.allclose(u.adapter[name], v.adapter[name], atol=1e-4) for name in v.adapter)
        ppl = [evaluate(user.model, user.data['test'], 16)['ppl'] for user in (u, v)]
        assert ppl[0] == pytest.approx(ppl[1], rel=1e-4)


def test_a_single_user_has_nobody_to_share_with(tiny, monkeypatch):
    """Invariant 8: with N = 1, 1G1S is 2S (given the same start: here it depends on the expert's number, not its role)."""

    def by_number(name, shape, *key):
        one = name.replace('specialists.0', 'specialists.1').replace('generalists.0', 'specialists.0')  # as 2S names them
        return initial(name if by_number.two else one, shape, 'same for all')

    monkeypatch.setattr(user_file, 'initial', by_number)
    found = []
    for method, by_number.two in (('comigs_1g1s', False), ('comigs_2s', True)):
        one = trained(tiny.model, f'--method={method}', N=1)
        ppl = evaluate(one.users[0].model, one.users[0].data['test'], 16)['ppl']
        found.append((losses(one.lines), losses(one.lines, 'router'), ppl))
    assert found[0] == found[1] and len(found[0][0]) == 6 and len(found[0][1]) == 6


# ---- one base, determinism, data -------------------------------------------------------------------------------------
def test_the_base_never_changes_and_exists_once(finished, tiny):
    base = finished.fleet.base
    original = load_gpt(str(tiny.base)).state_dict()
    assert all(torch.equal(p, original[name]) and p.grad is None for name, p in base.named_parameters())
    storages = [{p.data_ptr() for name, p in u.model.named_parameters() if name not in u.role} for u in finished.users]
    assert storages[0] == storages[1] == storages[2] == {p.data_ptr() for p in base.parameters()}
    for user in finished.users:  # a user's memory: LoRA and routers, and two Adam moments for each
        state = [s for opt in (user.expert_opt, user.router_opt) if opt for s in opt.state.values()]
        moments = sum(s['exp_avg'].numel() + s['exp_avg_sq'].numel() for s in state)
        assert moments == 2 * sum(p.numel() for p in user.adapter.values())


def test_same_seed_same_bits(train, finished, tiny):
    again = train('--method=comigs_1gxs', '--n_experts=3,1,2')
    assert (again.out / 'metrics.jsonl').read_bytes() == (finished.out / 'metrics.jsonl').read_bytes()
    assert all(same(u.adapter, v.adapter) for u, v in zip(again.users, finished.users))
    assert devices(tiny.model, '--seed=43')[0].expert_step(0) != devices(tiny.model)[0].expert_step(0)


def test_batches_depend_on_seed_user_level_and_number_alone(tiny, monkeypatch):
    """User 1 draws the same batches, from the same start, with one more user beside it or without, whatever its method."""
    asked = []
    monkeypatch.setattr(user_file, 'get_batch', lambda *args: (asked.append(args[3]), get_batch(*args))[1])
    few, many = devices(tiny.model, N=2)[1], devices(tiny.model, N=3)[1]
    assert same(few.adapter, many.adapter) and steps(few, 2) == steps(many, 2)
    assert asked[:8] == asked[8:] == [(42, 1, level, i) for t in (0, 2) for level in (0, 1) for i in (t, t + 1)]
    steps(devices(tiny.model, '--method=local', '--seed=7')[2])
    assert asked[16:] == [(7, 2, 0, 0), (7, 2, 0, 1)]


def test_accumulation_over_micro_batches(tiny):
    """4 windows at once, or 1 at a time, or 3 and 1: the same gradients up to rounding (n = 2: load balancing is constant)."""
    told, grads = [], []
    for m in (4, 1, 3):
        user = devices(tiny.model, f'--micro_batch_size={m}')[0]
        user.expert_step(0)
        user.expert_opt.step = lambda: grads.append({name: p.grad for name, p in user.adapter.items() if p.grad is not None})
        told.append(user.expert_step(1))
    for line, grad in zip(told[1:], grads[1:]):
        assert line['loss'] == pytest.approx(told[0]['loss'], rel=1e-5)
        assert all(torch.allclose(grad[name], g, rtol=1e-3, atol=1e-3 * g.abs().max()) for name, g in grads[0].items())


def test_mixture_target(tiny):
    """Every user is tested on an equal share of everybody's text; what it trains on stays its own."""
    own, mixed = (Texts(tiny.data, 16, 257, target) for target in ('own', 'mixture'))
    for i in range(3):
        assert np.array_equal(mixed.of(i)['train'], own.of(i)['train'])
        pieces = [own.of(j)['test'][i * 50 : (i + 1) * 50] for j in range(3)]
        assert np.array_equal(mixed.of(i)['test'], np.concatenate(pieces))


def test_bfloat16(train, finished):
    """bf16 autocast changes the numbers a little and nothing else; adapters stay float32."""
    run = train('--method=comigs_1gxs', '--n_experts=3,1,2', '--dtype=bfloat16')
    assert run.summary['test_ppl'] != finished.summary['test_ppl']
    assert run.summary['test_ppl'] == pytest.approx(finished.summary['test_ppl'], rel=0.05)
    assert all(p.dtype == torch.float32 for user in run.users for p in user.adapter.values())


def test_validation_text_may_be_looked_at_over_training_and_changes_nothing(train, finished):
    run = train('--method=comigs_1gxs', '--n_experts=3,1,2', '--eval_valid=True')
    more = [line for line in run.lines if line not in finished.lines]
    assert [line for line in run.lines if line not in more] == finished.lines
    assert {(line['when'], line['split']) for line in more} == {('local', 'valid')}
    final = {line['user']: line['ppl'] for line in finished.lines if line.get('when') == 'final'}
    assert {line['user']: line['ppl'] for line in more if line['round'] == 3} == final
    assert run.summary['test_ppl'] == finished.summary['test_ppl'] and run.summary['valid_ppl'] == finished.summary['valid_ppl']


# ---- files of a run --------------------------------------------------------------------------------------------------
def test_metrics_and_adapters(finished):
    lines, summary, E = finished.lines, finished.summary, (3, 1, 2)
    assert {line['kind'] for line in lines} == {'train', 'router', 'eval', 'comm'}
    for line in lines:
        assert {'round', 'step', 'user'} <= line.keys()
        if 'loss' in line:
            assert line['ppl'] == pytest.approx(math.exp(line['loss']))
    comm = [line for line in lines if line['kind'] == 'comm']
    assert len(comm) == 3 * 3 and {line['bytes_up'] for line in comm} == {summary['shared_params'] * 4}
    final = [line['ppl'] for line in lines if line['kind'] == 'eval' and line['when'] == 'local' and line['round'] == 3]
    assert final == summary['test_ppl']
    local = [line for line in lines if line['kind'] == 'eval' and line['when'] == 'local' and line['split'] == 'test']
    assert {line['user'] for line in local if 'scores' in line} == {0, 2}
    for line in local:  # (L, E), a row sums to 1
        for layer in line.get('scores', []):
            assert len(layer) == E[line['user']] and sum(layer) == pytest.approx(1)
    with safe_open(finished.out / 'adapters/user2.safetensors', 'pt') as f:
        assert set(f.keys()) == set(finished.users[2].adapter)
        facts = f.metadata()
        assert (facts['n_experts'], facts['rank'], facts['n_generalists']) == ('2', '8', '1')
        assert float(facts['scaling']) == pytest.approx(16 / math.sqrt(8))
    config = json.loads((finished.out / 'config.json').read_text())
    assert config['n_experts'] == [3, 1, 2] and config['method'] == 'comigs_1gxs' and config['versions']['torch']
    with safe_open(finished.out / 'adapters/server.safetensors', 'pt') as f:
        assert set(f.keys()) == set(finished.users[0].shared)


def test_the_metrics_file_grows_as_it_happens(train, tmp_path, monkeypatch):
    """Lines are on disk before the run ends: a run that dies leaves what it did."""

    def dies(*args):
        if (tmp_path / 'run' / 'metrics.jsonl').read_text().count('"train"') == 3:
            raise KeyboardInterrupt
        return get_batch(*args)

    monkeypatch.setattr(user_file, 'get_batch', dies)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert len(losses(read_metrics(tmp_path / 'run'))) == 3


def test_a_run_that_diverges_stops_with_one_line(train, tmp_path):
    """No NaN is averaged into the others' generalists; what finished before stays."""
    with pytest.raises(SystemExit, match='training loss is .* lower --expert_lr'):
        train('--expert_lr=9e8', '--rounds=4')
    assert not (tmp_path / 'run' / 'summary.json').exists() and (tmp_path / 'run/checkpoint/round-0.safetensors').exists()


@pytest.mark.parametrize(
    'args, says',
    [
        (['--router_lr=9e8', '--rounds=6'], 'lower --router_lr'),
        (['--router_lr=9e8', '--rounds=6', '--router_every=1'], 'lower --router_lr'),
        (['--expert_lr=9e8', '--router_every=1'], 'lower --expert_lr'),  # a router step comes next
        (['--expert_lr=9e8', '--rounds=1', '--local_steps=1'], 'test loss is .* lower --expert_lr'),
    ],
)
def test_what_is_not_finite_ends_the_run_with_its_cause(train, tmp_path, args, says):
    """Whose, at which step, which switch to lower; nothing in a file that JSON does not know."""
    with pytest.raises(SystemExit, match=r'user \d \(user \d\): the .* at step \d+: .*') as end:
        train(*args)
    assert re.search(says, end.value.code) and '\n' not in end.value.code
    for file in [*(tmp_path / 'run').glob('*.json*')]:
        assert not {'NaN', 'Infinity'} & {*re.findall(r'\w+', file.read_text())}, file
    assert not (tmp_path / 'run/summary.json').exists()


def test_a_base_that_is_none_is_named(train, tiny, tmp_path):
    broken = load_gpt(str(tiny.base))
    broken.ln_f.weight.data.fill_(1e38)  # finite, but its logits are not
    save_gpt(broken, tmp_path / 'large.safetensors')
    for method in ('pretrained', 'local'):
        with pytest.raises(SystemExit, match='give another base, --init_from'):
            train(f'--init_from={tmp_path}/large.safetensors', '--rounds=1', f'--method={method}', '--overwrite')


# ---- bad input: one line, exit code 2, nothing written ---------------------------------------------------------------
@pytest.mark.parametrize(
    'args, message',
    [
        (['--n_expert=2'], 'unknown switch --n_expert; did you mean --n_experts'),
        (['--n_experts=4,2'], 'expected one value from 1 to 4096, or 3, one per user'),
        (['--n_experts=1,2,2', '--n_generalists=2'], '--n_experts=1,2,2: every user holds all the generalists'),
        (['--method=fedavg', '--n_experts=1'], '--n_generalists=2, --n_experts=1,1,1: every user holds all the generalists'),
        (['--method=centralized', '--n_experts=4,2,2'], '--n_experts=4,2,2: expected one value from 1 to 4096, or 1'),
        (['--method=hetlora', '--n_experts=4,2,2'], 'give --n_experts=1 and --lora_rank=16,8,...'),
        (['--method=flora', '--n_experts=2'], 'has one expert per user'),
        (['--lora_rank=4,8,8'], 'the same rank for all'),
        (['--block_size=64'], '--block_size=64, n_positions=32: the base has no more positions'),
        (['--block_size=1000'], 'needs 1001'),
        (['--test_users=4'], 'there are no more users'),
        (['--dataset=nowhere'], 'no data set at'),
        (['--init_from=nowhere'], 'no base model at'),
        (['--init_from=README.md'], 'cannot be read as model weights'),
        (['--device=tpu9'], 'device'),
        (['--method=consensus', '--public_text=nowhere.txt'], 'nowhere.txt'),
        (['--resume'], 'has no checkpoint'),
        (['config/nothing.py'], 'cannot read the config file'),
    ],
)
def test_bad_switches(train, tmp_path, capsys, monkeypatch, args, message):
    """What the data, the base and the machine decide; what switches say alone is in test_config.py."""
    monkeypatch.chdir(ROOT)
    assert message in refused(capsys, train, *args)
    assert not (tmp_path / 'run').exists()


def overwrite(file, change) -> None:
    file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize(
    'spoil, message',
    [
        (lambda f: overwrite(f / 'user1_train.bin', lambda raw: raw[:-3]), '997 bytes, but meta.json says 500 tokens'),
        (lambda f: (f / 'user2_valid.bin').unlink(), 'user2_valid.bin is missing'),
        (lambda f: overwrite(f / 'user0_test.bin', lambda raw: raw[2:] + raw[:2]), 'user0_test.bin is not the file'),
        (lambda f: overwrite(f / 'user0_test.bin', lambda raw: b'\x2c\x01' * 150), 'token 300, outside the vocabulary of 257'),
        (lambda f: overwrite(f / 'meta.json', lambda raw: raw.replace(b': 257', b': 50257')), 'vocabulary of 50257'),
        (lambda f: overwrite(f / 'meta.json', lambda raw: b'{'), 'meta.json cannot be read'),
    ],
    ids=['truncated', 'missing', 'altered', 'vocabulary', 'tokenizer', 'meta'],
)
def test_bad_data(train, tmp_path, capsys, spoil, message):
    spoil(folder := write_dataset(tmp_path / 'bad', [user_streams(i, n) for i, n in enumerate(N_TRAIN)]))
    assert message in refused(capsys, train, f'--dataset={folder}')
    assert not (tmp_path / 'run').exists()


def test_a_run_is_never_overwritten_by_accident(train, finished, tmp_path, capsys):
    out = shutil.copytree(finished.out, tmp_path / 'run')
    files, args = {f: f.read_bytes() for f in out.rglob('*') if f.is_file()}, ('--method=comigs_1gxs', '--n_experts=3,1,2')
    assert 'already holds a finished run' in refused(capsys, train, *args)
    (out / 'summary.json').unlink()
    assert 'already holds an unfinished run' in refused(capsys, train, *args)
    assert 'made with another rounds, seed;' in refused(capsys, train, *args, '--resume', '--seed=1', '--rounds=9')
    assert all(f.read_bytes() == content for f, content in files.items() if f.exists())
    (out / 'checkpoint' / 'round-3.safetensors').write_bytes(b'broken')
    err = refused(capsys, train, *args, '--resume')
    assert 'round-3.safetensors is damaged' in err and 'round 2 is intact: delete' in err
    (out / 'checkpoint' / 'round-2.safetensors').write_bytes(b'broken')
    assert 'round-2.safetensors is damaged' in refused(capsys, train, *args, '--resume')
    (tmp_path / 'file').write_text('')
    assert 'is a file' in refused(capsys, train, f'--out_dir={tmp_path}/file')
    train('--overwrite', '--rounds=1', '--method=local')
    left = {file.relative_to(out).as_posix().removesuffix('.safetensors') for file in out.rglob('*.safetensors')}
    users = {f'adapters/user{i}' for i in range(3)} | {f'checkpoint/user{i}-1' for i in range(3)}
    assert left == users | {'checkpoint/round-0', 'checkpoint/round-1'}


# ---- whose folder it is ----------------------------------------------------------------------------------------------
def tree(folder) -> dict:
    return {file: file.read_bytes() for file in folder.rglob('*') if file.is_file()}


@pytest.mark.parametrize(
    'files',
    [
        ['adapters/mine.safetensors', 'checkpoint/optimizer.pt'],
        ['notes.txt'],
        ['config.json', 'model.safetensors'],  # somebody's model
        ['sub/deep/file'],
        ['.hidden'],
    ],
)
def test_a_folder_that_holds_no_run_is_refused(train, tmp_path, capsys, files):
    out = tmp_path / 'run'
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text('{"model_type": "gpt2"}')
    before = tree(out)
    said = 'config.json cannot be read' if 'config.json' in files else 'is not empty and holds no run'
    assert said in refused(capsys, train)
    assert 'has no checkpoint' in refused(capsys, train, '--resume')
    assert tree(out) == before
    if 'config.json' in files:  # a name that a run writes, and not of one: nothing may be replaced
        assert said in refused(capsys, train, '--overwrite') and tree(out) == before
    else:
        train('--overwrite', '--rounds=0')
        assert before.items() <= tree(out).items()


NOT_OURS = """adapters/mine.safetensors adapters/user1x.safetensors adapters/user01.safetensors adapters/user1.safetensors.bak
    checkpoint/optimizer.pt checkpoint/round-1.pt checkpoint/round-x.safetensors checkpoint/user1-2-3.safetensors
    checkpoint/round-07.safetensors checkpoint/deep/round-7.safetensors plot.pdf
    summary.json.old user1.safetensors my-metrics.jsonl""".split()


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else(train, tmp_path):
    """By exact names, in checkpoint/ also round after round; a link goes, what it leads to stays."""
    out, elsewhere = train('--method=local').out, tmp_path / 'elsewhere'
    elsewhere.mkdir()
    mine = [out / name for name in NOT_OURS] + [elsewhere / 'events.out.tfevents.1.host', elsewhere / 'round-9.safetensors']
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text(file.name)
    (out / 'tensorboard').symlink_to(elsewhere)
    (out / 'checkpoint/round-8.safetensors').symlink_to(elsewhere / 'round-9.safetensors')
    for name in ('eval.json', 'routing.html', 'trust.svg', 'summary.json.partial'):
        (out / name).write_text('old')
    train('--overwrite', '--rounds=1')
    assert all(file.read_text() == file.name for file in mine)
    left = {file.relative_to(out).as_posix() for file in out.rglob('*') if file.is_file() and file not in mine}
    new = {f'{name}.safetensors' for i in range(3) for name in (f'checkpoint/user{i}-1', f'adapters/user{i}')}
    new |= {
        'config.json',
        'metrics.jsonl',
        'summary.json',
        '.lock',
        'checkpoint/round-0.safetensors',
        'adapters/server.safetensors',
    }
    assert left == new | {'checkpoint/round-1.safetensors'}


@pytest.mark.parametrize('name', ['checkpoint', 'adapters'])
def test_a_run_stays_in_its_folder(train, tmp_path, capsys, name):
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere' / 'round-3.safetensors').write_text('mine')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / name).symlink_to(tmp_path / 'elsewhere')
    for args in ([], ['--overwrite']):
        assert f'{name} is a link' in refused(capsys, train, *args)
    assert (tmp_path / 'elsewhere' / 'round-3.safetensors').read_text() == 'mine'


def test_a_folder_that_cannot_be_one(train, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'nowhere').symlink_to(tmp_path / 'gone')
    for out in ('', ' ', f'{tmp_path}/file', f'{tmp_path}/file/below', f'{tmp_path}/nowhere/below', f'{tmp_path}/{"x" * 300}'):
        for args in ([], ['--overwrite'], ['--resume']):
            assert '--out_dir=' in refused(capsys, train, f'--out_dir={out}', *args), out
    assert (tmp_path / 'file').read_text() == ''


def test_what_a_death_at_the_very_beginning_leaves_is_nothing(train, tmp_path):
    for name in ('checkpoint', 'adapters'):
        (tmp_path / 'run' / name).mkdir(parents=True)
    for name in ('.lock', 'config.json.partial'):
        (tmp_path / 'run' / name).write_text('')
    train('--rounds=0')


def test_two_runs_at_once_in_one_folder(train, tmp_path, capsys, monkeypatch):
    """The second one is refused, however it comes; once the first has ended, in whatever way, the folder is free."""
    train('--rounds=1')
    files = tree(tmp_path / 'run')
    with open(tmp_path / 'run/.lock') as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for args in (['--overwrite'], ['--resume'], ['--overwrite', '--rounds=0']):
            assert 'another run is at work in' in refused(capsys, train, '--rounds=1', *args)
        assert tree(tmp_path / 'run') == files
    train('--resume', '--rounds=1')
    with pytest.raises(SystemExit, match='lower --expert_lr'):
        train('--expert_lr=9e8', '--overwrite')
    train('--overwrite', '--rounds=0')  # the dead run holds nothing
    monkeypatch.setattr(checkpoint, 'fcntl', None)  # where a system has no locks
    train('--overwrite', '--rounds=0')


def test_a_run_that_begins_meanwhile_is_seen(train, tmp_path, capsys, monkeypatch):
    """Between the first look and the lock another run begins and ends there."""

    def first(*_):
        monkeypatch.undo()
        train('--rounds=1')

    monkeypatch.setattr(train_file, 'try_out', first)
    assert 'already holds a finished run' in refused(capsys, train)


# ---- what is dear comes last, and what may fail at its first use is tried first -------------------------------------------
def test_what_is_at_hand_is_checked_before_a_base_is_fetched(train, tiny, tmp_path, capsys, monkeypatch):
    def fetched(*_):
        raise AssertionError('a base was fetched')

    monkeypatch.setattr(train_file, 'load_base', fetched)
    (tmp_path / 'short').write_text('x')
    (tmp_path / 'latin').write_bytes(b'\xe9' * 99)
    (tmp_path / 'peft').mkdir()
    (tmp_path / 'peft/adapter_config.json').write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
    gpt2 = write_dataset(tmp_path / 'gpt2', [user_streams(i, n) for i, n in enumerate(N_TRAIN)], 50257)
    pcl = ('--method=pcl', '--trust=predictions')
    for args, message in (
        (['--dataset=nowhere'], 'no data set at'),
        ([], 'has a vocabulary of 257 tokens (bytes), but the base model has 50257'),
        ([f'--dataset={gpt2}', '--n_experts=4,2'], 'one per user'),
        ([f'--dataset={gpt2}', '--test_users=4'], 'there are no more users'),
        (['--dataset=nowhere', '--resume'], 'has no checkpoint'),
        ([*pcl, '--init_from=x', f'--public_text={tmp_path}/gone'], 'gone does not exist, or is no file'),
        ([*pcl, '--init_from=x', f'--public_text={tmp_path}'], 'does not exist, or is no file'),
        ([*pcl, '--init_from=x', f'--public_text={tmp_path}/latin'], 'is not text in UTF-8'),
        ([*pcl, '--init_from=x', f'--public_text={tmp_path}/short'], 'is shorter than one window'),
        (['--init_from=x', f'--init_adapter={tmp_path}/gone'], 'is no PEFT adapter'),
        (['--init_from=x', f'--init_adapter={tmp_path}/peft'], 'cannot be read'),
    ):
        assert message in refused(capsys, train, '--init_from=gpt2', *args), args
    assert not (tmp_path / 'run').exists()


def test_a_resume_that_cannot_be_is_refused_before_a_base_is_fetched(train, tmp_path, capsys, monkeypatch):
    out = train('--rounds=1').out
    monkeypatch.setattr(train_file, 'load_base', lambda source: 1 / 0)
    assert 'made with another seed;' in refused(capsys, train, '--rounds=1', '--resume', '--seed=1')
    (out / 'checkpoint/user1-1.safetensors').write_bytes(b'x')
    assert 'user1-1.safetensors is damaged' in refused(capsys, train, '--rounds=1', '--resume')


@pytest.mark.parametrize('args, place', [('--compile', 'compile'), ('--dtype=bfloat16', 'autocast'), ('--device=meta', '')])
def test_what_fails_at_its_first_use_fails_before_anything_is_written(train, tmp_path, capsys, monkeypatch, args, place):
    def none(*_, **__):
        raise RuntimeError('No working C++ compiler\nfound: stack, and more')

    monkeypatch.setattr(torch, 'compile', lambda function: none)
    if place == 'autocast':
        monkeypatch.setattr(train_file, 'autocast', none)
    said = refused(capsys, train, args)
    assert ('No working C++ compiler found' in said and args in said) if place else 'meta' in said
    assert not (tmp_path / 'run').exists()


def test_from_the_shell(tiny, tmp_path):
    """As a person meets it: one line on stderr, exit code 2, no traceback, and no heavy optional import on the way; --help."""
    code = """if True:
        import runpy, sys
        for args in (['--rounds=x'], sys.argv[1:], ['--help']):
            sys.argv = ['train.py', *args]
            try:
                runpy.run_path('train.py', run_name='__main__')
            except SystemExit as end:
                print(end.code)
        assert not {'datasets', 'matplotlib', 'transformers'} & set(sys.modules)
    """
    no_data = [f'--init_from={tiny.base}', f'--dataset={tiny.folder}', f'--out_dir={tmp_path}/x']
    done = subprocess.run([sys.executable, '-c', code, *no_data], capture_output=True, text=True, cwd=ROOT)
    first, second = done.stderr.splitlines()
    assert first.startswith("train.py: --rounds='x': expected int") and second.startswith('train.py: no data set at')
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and (lines[:2], lines[-1]) == (['2', '2'], '0') and not (tmp_path / 'x').exists()
    assert lines[2].startswith('CoMiGS (arXiv 2409.13931)') and any(line.startswith('router_every = 30 ') for line in lines)
