"""Users dealt out to several processes, and users that take part in some rounds only: the numbers never depend on it."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, read_metrics, refused, same, user_streams, write_dataset
from safetensors.torch import load_file
from several_runs import several_runs

import federate
import user
from data.stream import get_batch
from run import checkpoint, processes

# every aggregation rule, per-user experts or ranks, what lives outside tensors, a sample of the users
RUNS = {
    'fedavg': ['--method=comigs_1gxs', '--n_experts=3,1,2'],
    'local': ['--method=local'],
    'centralized': ['--method=centralized'],
    'ffa': ['--method=ffa_lora'],
    'fedsa': ['--method=fedsa_lora'],
    'median': ['--aggregate=median'],
    'trimmed_mean': ['--aggregate=trimmed_mean', '--trim=0.4'],
    'weights': ['--method=pcl', '--trust=weights'],
    'validation': ['--method=pcl'],
    'predictions': ['--method=pcl', '--trust=predictions'],
    'hetlora': ['--method=hetlora', '--lora_rank=4,6,8', '--prune_coef=10'],
    'flora': ['--method=flora', '--lora_rank=4,6,8'],
    'flexlora': ['--method=flexlora', '--lora_rank=4,6,8'],
    'consensus': ['--method=consensus', '--n_experts=1,2,3'],
    'fdlora': ['--method=fdlora'],
    'some': ['--participation=0.6', '--test_users=2'],
    'attacked': ['--attack=nan', '--failures=0.3', '--seed=5'],
}
SHORT = ('--rounds=3', '--consensus_start=1', '--judge_windows=4', '--batch_size=2', '--micro_batch_size=2')


def slow(*values) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


def given(tiny, out, *args) -> list[str]:
    return [f'--init_from={tiny.base}', f'--dataset={tiny.data}', f'--out_dir={out}', '--device=cpu', *TINY, *SHORT, *args]


def runs(n: int, folder: Path, tiny, names: list[str]) -> None:
    for end in several_runs([given(tiny, folder / name, *RUNS[name]) for name in names], n=n):
        assert end.status == 0, end.err


def same_runs(a: Path, b: Path) -> None:
    """Metrics byte for byte, every tensor, the summary but for clocks and memory."""
    assert (a / 'metrics.jsonl').read_bytes() == (b / 'metrics.jsonl').read_bytes(), a
    for folder in ('adapters', 'checkpoint'):
        files = sorted(file.name for file in (a / folder).iterdir())
        assert files == sorted(file.name for file in (b / folder).iterdir())
        for file in files:
            assert same(load_file(a / folder / file), load_file(b / folder / file)), (a, file)
    one, two = (json.loads((out / 'summary.json').read_text()) for out in (a, b))
    assert not [key for key in one if one[key] != two[key] and 'second' not in key and key != 'peak_rss_bytes']


@pytest.mark.parametrize(
    'n, names',
    [
        (2, ['fedavg', 'validation', 'flexlora', 'attacked']),
        slow(2, ['local', 'centralized', 'ffa', 'fedsa', 'median', 'trimmed_mean', 'weights', 'fdlora']),
        slow(3, ['fedavg', 'flexlora', 'predictions']),
        slow(4, ['fedavg', 'hetlora', 'flora', 'validation', 'consensus', 'some']),
    ],
)
def test_any_number_of_processes_gives_the_same_bits(tiny, tmp_path, n, names):
    """One process, two, three, or more than there are users. Each run of RUNS with one of these numbers."""
    runs(1, tmp_path / 'alone', tiny, names)
    runs(n, tmp_path / 'several', tiny, names)
    for name in names:
        same_runs(tmp_path / 'alone' / name, tmp_path / 'several' / name)


def test_bad_input_is_one_line_for_all_processes(tiny, tmp_path):
    (end,) = several_runs([given(tiny, tmp_path / 'x', '--n_experts=5,5')], n=2)
    assert end.statuses == [2, 2] and end.err.count('\n') == 1 and 'expected one value from 1 to 4096' in end.err
    assert not (tmp_path / 'x').exists()


TORCHRUN = {'WORLD_SIZE': '2', 'RANK': '1', 'LOCAL_RANK': '1', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '29500'}


@pytest.mark.parametrize(
    'change, ok',
    [
        ({}, True),
        *(({name: gone}, False) for name in TORCHRUN if name != 'WORLD_SIZE' for gone in ('', None)),
        *(({name: text}, False) for name in TORCHRUN if name != 'MASTER_ADDR' for text in ('x', '-1', '1.5')),
        ({'MASTER_PORT': '70000'}, False),
        ({'RANK': '2'}, False),
        ({'LOCAL_RANK': '2'}, False),
        ({'WORLD_SIZE': '0'}, False),
        ({'WORLD_SIZE': None}, False),  # a rank of 1, and no world
        ({name: None for name in TORCHRUN}, True),
        ({name: '' for name in TORCHRUN}, True),
        ({'WORLD_SIZE': '1', 'RANK': '0', 'LOCAL_RANK': '0'}, True),
    ],
)
def test_the_variables_of_a_launcher(change, ok, monkeypatch, capsys):
    for name, text in {**TORCHRUN, **change}.items():
        monkeypatch.delenv(name, raising=False) if text is None else monkeypatch.setenv(name, text)
    if ok:
        processes.check()
        assert 0 <= processes.rank() < processes.world()
    else:
        assert 'start it with torchrun' in refused(capsys, processes.check)


def test_a_meeting_point_that_is_none(monkeypatch, capsys):
    for name, text in {**TORCHRUN, 'RANK': '0', 'LOCAL_RANK': '0', 'MASTER_ADDR': 'no.such.host.invalid'}.items():
        monkeypatch.setenv(name, text)

    def unreachable(*_, **__):
        raise RuntimeError('The server socket has failed to listen\non any address')

    monkeypatch.setattr(processes.dist, 'init_process_group', unreachable)
    assert 'process 0 of 2 cannot reach MASTER_ADDR' in refused(capsys, processes.start)


@pytest.mark.reliability
def test_a_dead_process_ends_the_run_and_another_number_of_them_resumes_it(tiny, tmp_path, figure):
    """One of three is killed while it trains: the others end within seconds, with one line each; two go on to the same bits."""
    args = [*given(tiny, tmp_path / 'run', *RUNS['fedavg']), '--rounds=20']
    kill = {'signal': 9, 'rank': 2, 'after': 0, 'from': str(tmp_path / 'run' / 'metrics.jsonl'), 'lines': 60}
    killed, whole = several_runs([args], [kill], n=3) + several_runs([[*args, f'--out_dir={tmp_path}/whole']])
    assert killed.statuses == [1, 1, -9] and killed.seconds < 30 and whole.status == 0, (killed, whole)
    lines = killed.err.splitlines()
    assert len(lines) == 2 and all('has lost another one' in line and 'continue with --resume' in line for line in lines)
    assert not (tmp_path / 'run' / 'summary.json').exists()
    (again,) = several_runs([[*args, '--resume']], n=2)
    assert again.status == 0, again.err
    same_runs(tmp_path / 'whole', tmp_path / 'run')
    figure('R19', f'one of three processes killed: all ended within {killed.seconds:.1f} s, two went on to the same bits', True)


@pytest.mark.slow
def test_torchrun_ends_a_run_that_has_lost_a_process_and_starts_it_again(tiny, tmp_path):
    """The same under torchrun, which may end the others before they notice."""
    args = [*given(tiny, tmp_path / 'run', *RUNS['fedavg']), '--rounds=60']
    running = torchrun(3, 'train.py', *args)
    until(lambda: (tmp_path / 'run' / 'metrics.jsonl').exists() and len(read_metrics(tmp_path / 'run')) > 60)
    workers = subprocess.run(['pgrep', '-P', str(running.pid)], capture_output=True, text=True).stdout.split()
    victim = next(pid for pid in map(int, workers) if b'RANK=2\0' in open(f'/proc/{pid}/environ', 'rb').read())
    os.kill(victim, signal.SIGKILL)
    began = time.time()
    _, err = running.communicate(timeout=60)
    assert time.time() - began < 30 and running.returncode != 0
    assert 'has lost another one' in err or 'SIGKILL' in err
    assert 'train.py", line' not in err and not (tmp_path / 'run' / 'summary.json').exists()
    again = torchrun(2, 'train.py', *args, '--resume')
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err[-2000:]
    several_runs([[*args, f'--out_dir={tmp_path}/whole']])
    same_runs(tmp_path / 'whole', tmp_path / 'run')


def torchrun(n: int, *command: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}', *map(str, command)],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def until(true, seconds: float = 60) -> None:
    end = time.time() + seconds
    while not true():
        assert time.time() < end
        time.sleep(0.05)


# ---- some of the users a round --------------------------------------------------------------------------------------
@pytest.fixture
def six(tmp_path):
    return write_dataset(tmp_path / 'six', [user_streams(i % 3, 300 + 40 * i) for i in range(6)])


def took_part(lines: list[dict]) -> dict[int, list[int]]:
    rounds = {}
    for line in lines:
        if line['kind'] == 'comm':
            rounds.setdefault(line['round'], []).append(line['user'])
    return rounds


def test_who_takes_part_depends_on_seed_and_round_alone(train, six):
    a = train(f'--dataset={six}', '--participation=0.5', '--rounds=6', out='a')
    b = train(f'--dataset={six}', '--participation=0.5', '--rounds=6', '--method=local', '--local_steps=1', out='b')
    c = train(f'--dataset={six}', '--participation=0.5', '--rounds=6', '--seed=43', out='c')
    rounds = took_part(a.lines)
    assert rounds == took_part(b.lines) != took_part(c.lines)
    assert all(len(present) == 3 and present == sorted(set(present)) for present in rounds.values())
    assert len({tuple(present) for present in rounds.values()}) > 2
    steps = [sum(line['kind'] == 'train' and line['user'] == i for line in a.lines) for i in range(6)]
    assert steps == [2 * sum(i in present for present in rounds.values()) for i in range(6)]


def test_the_mean_is_over_those_present_and_the_absent_stay_as_they_were(train, six):
    run = train(f'--dataset={six}', '--participation=0.5', '--rounds=6')
    last = took_part(run.lines)[6]
    states = {i: checkpoint.read(run.fleet.file(i)) for i in run.fleet.last_round}
    mean = federate.fedavg([{n: states[i][0][f'adapter/{n}'] for n in run.fleet.asked} for i in last])
    assert same(mean, run.server) and {i for i, r in run.fleet.last_round.items() if r == 6} == {*last}
    for i, (tensors, facts) in states.items():  # a user's file is that of the last round it took part in
        assert facts['expert_steps'] == 2 * sum(i in present for present in took_part(run.lines).values())
    two = train(f'--dataset={six}', '--participation=0.5', '--rounds=6', out='b')
    assert all(same(checkpoint.read(two.fleet.file(i))[0], states[i][0]) for i in states)


def test_only_those_present_are_in_memory_and_the_others_have_a_file_or_nothing(train, six, monkeypatch):
    made, at_once, init = weakref.WeakSet(), [], user.User.__init__

    def counted(self, *args):
        init(self, *args)
        made.add(self)
        at_once.append(len(made))

    monkeypatch.setattr(user.User, '__init__', counted)
    run = train(f'--dataset={six}', '--participation=0.2', '--rounds=3', '--test_users=2')
    assert len(run.users) == 2 == len(run.fleet.tested) and max(at_once) <= 3 and len(at_once) <= 3 + 2
    ever = {i for present in took_part(run.lines).values() for i in present}
    files = {file.name for file in run.journal.folder.iterdir()}  # two rounds, and of the last one's user also the file before
    assert {run.fleet.file(i).name for i in ever} <= files and len(files) <= len(ever) + 1 + 2
    assert {*run.fleet.last_round} == ever and len(ever) <= 3
    assert run.summary['user_ids'] == run.fleet.tested and len(run.summary['aggregated_test_ppl']) == 2


@pytest.mark.parametrize(
    'args',
    [
        ['--method=comigs_1gxs'],
        ['--method=flora'],
        slow(['--method=pcl']),
        slow(['--method=flexlora', '--lora_rank=4,6,8,4,6,8']),
        slow(['--method=hetlora', '--lora_rank=4,6,8,4,6,8']),
        slow(['--method=consensus']),
        slow(['--leak_gradients']),
        slow(['--method=fedsa_lora']),
        slow(['--method=comigs_2s']),
        slow(['--aggregate=median']),
    ],
    ids=lambda args: args[0],
)
def test_a_resumed_run_of_some_users_is_bit_identical(train, six, monkeypatch, args):
    """Killed in round 5, when some users have waited on disk for rounds and others are new."""
    args = [f'--dataset={six}', '--participation=0.5', '--rounds=7', '--consensus_start=1', '--judge_windows=4', *args]
    whole = train(*args, out='whole')

    def dies(*a):
        dies.calls += 1
        if dies.calls == 28:
            raise KeyboardInterrupt
        return get_batch(*a)

    dies.calls = 0
    monkeypatch.setattr(user, 'get_batch', dies)
    with pytest.raises(KeyboardInterrupt):
        train(*args, out='cut')
    monkeypatch.setattr(user, 'get_batch', get_batch)
    resumed = train(*args, '--resume', out='cut')
    assert 0 < resumed.journal.start < 7
    assert (whole.out / 'metrics.jsonl').read_bytes() == (resumed.out / 'metrics.jsonl').read_bytes()
    assert whole.fleet.last_round == resumed.fleet.last_round
    for i in whole.fleet.last_round:
        a, b = (checkpoint.read(run.fleet.file(i)) for run in (whole, resumed))
        assert same(a[0], b[0]) and a[1] == b[1]


def test_flora_counts_every_stack_that_an_absent_user_missed(train, six):
    run = train(f'--dataset={six}', '--participation=0.5', '--rounds=6', '--method=flora')
    up = {t: sum(line['bytes_up'] for line in run.lines if line['kind'] == 'comm' and line['round'] == t) for t in range(1, 7)}
    seen = dict.fromkeys(range(6), 0)
    for line in (line for line in run.lines if line['kind'] == 'comm'):
        assert line['bytes_down'] == sum(up[t] for t in range(seen[line['user']] + 1, line['round']))
        seen[line['user']] = line['round'] - 1


def test_files_of_an_unfinished_round_are_ignored_and_removed(tmp_path):
    for name in ('user3-1', 'user3-2', 'user4-3', 'user5-1', 'user6-0', 'round-0', 'round-1', 'round-2'):
        checkpoint.save(tmp_path / f'{name}.safetensors', {'x': torch.zeros(1)}, {'last_round': {3: 2, 5: 1}})
    (tmp_path / 'user5-2.safetensors.partial').write_bytes(b'half')
    assert checkpoint.rounds(tmp_path) == [0, 1, 2]
    assert checkpoint.check(tmp_path, 2)[1]['last_round'] == {3: 2, 5: 1}
    checkpoint.remove_others(tmp_path, (2, {3: 2, 5: 1}), (1, {3: 1, 5: 1}))
    kept = {file.name.removesuffix('.safetensors') for file in tmp_path.iterdir()}
    assert kept == {'round-2', 'round-1', 'user3-2', 'user3-1', 'user5-1'}
    checkpoint.user_file(tmp_path, 5, 1).unlink()
    with pytest.raises(ValueError, match='user5-1.safetensors cannot be read'):
        checkpoint.check(tmp_path, 2)


@pytest.mark.parametrize('method', ['comigs_1g1s', 'local', 'consensus'])
@pytest.mark.parametrize('args', [['--participation=0.34'], ['--failures=0.5', '--seed=3']])
def test_a_mean_is_over_all_tested_users_at_one_moment(train, six, capsys, method, args):
    """Where some miss rounds, the result is of all tested users after the last aggregation; a round's line, of those in it."""
    run = train(f'--dataset={six}', f'--method={method}', '--eval_every=1', '--judge_windows=4', *args)
    shown, s = capsys.readouterr().out, run.summary
    last = {line['user']: line for line in run.lines if line['kind'] == 'eval' and line['when'] == 'aggregated'}
    assert s['test_ppl'] == s['aggregated_test_ppl'] == [last[i]['ppl'] for i in range(6)] and s['test_when'] == 'aggregated'
    assert s['mean_test_ppl'] == pytest.approx(np.mean(s['test_ppl']))
    local = [line for line in run.lines if line['kind'] == 'eval' and line['when'] == 'local']
    for t in (1, 2, 3):
        of_round = {line['user']: line['ppl'] for line in local if line['round'] == t}
        each = '  '.join(f'user {i} {of_round[i]:.3f}' if i in of_round else f'user {i} -' for i in range(6))
        assert f'round   {t}/3  test perplexity {each}' in shown or not of_round
    assert shown.count('after aggregation') == 1 and f'pretrained  {method}' not in shown


def test_full_participation_tells_what_it_told(train, six):
    s = train(f'--dataset={six}', '--rounds=1').summary
    assert s['test_when'] == 'local' and s['test_ppl'] != s['aggregated_test_ppl']
    assert s['mean_test_ppl'] == pytest.approx(np.mean(s['test_ppl']))


@pytest.mark.parametrize(
    'args, message',
    [
        (['--participation=0'], '--participation=0.0: expected 0 < participation <= 1'),
        (['--participation=1.5'], 'expected 0 < participation <= 1'),
        (['--test_users=9'], '--test_users=9, N=6: there are no more users'),
        (['--test_users=-1'], 'expected 0 <= test_users < 1e9'),
        (['--method=fdlora', '--participation=0.5'], 'give --participation=1'),
    ],
)
def test_bad_participation(train, six, capsys, args, message):
    assert message in refused(capsys, train, f'--dataset={six}', *args)


def test_a_sample_of_users_is_the_same_users_whoever_takes_part(train, six):
    a, b = (train(f'--dataset={six}', '--test_users=3', f'--participation={p}', out=str(p)) for p in (1.0, 0.4))
    assert a.fleet.tested == b.fleet.tested and len(a.fleet.tested) == 3
    assert a.summary['pretrained_test_ppl'] == b.summary['pretrained_test_ppl']
    assert all(np.isfinite(a.summary['test_ppl']))
