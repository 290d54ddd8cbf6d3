"""bench.py: its arithmetic on made-up times, and one whole run on a tiny model."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import bench


def part(**seconds) -> dict:
    return {
        'seconds': {name.replace('_', ' '): times for name, times in seconds.items()},
        'tokens': 1024,
        'peaks': [1e12, 1e12],
        'flops': {'step': 5e8},
    }


def test_the_weaker_ratio_counts():
    slow, fast = [2.0, 6.0, 4.0], [1.0, 2.0, 2.0]  # paired 2, 3, 2: median 2; fastest 2 / 1
    assert bench.ratios(slow, fast) == (2.0, 2.0)
    assert bench.speedup([2.0, 9.0, 9.0], [1.0, 3.0, 3.0]) == 2.0  # paired 3, but the fastest say 2
    assert bench.speedup([3.0, 2.0, 2.0], [1.0, 2.0, 2.0]) == 1.0  # the other way round
    assert bench.cost([2.0, 9.0, 9.0], [1.0, 3.0, 3.0]) == 3.0  # for 'at most', the larger one


def test_orders_alternate():
    order = []
    times = bench.race({name: lambda name=name: order.append(name) for name in 'ab'}, 3, 'cpu')
    assert ''.join(order) == 'aabb' + 'ab' + 'ba' + 'ab' and [len(t) for t in times.values()] == [3, 3]


def test_flops_of_gpt2_124m():
    """By hand: 516.2 MFLOP a token for a step, 742.7 in the plain form, 255.6 forward."""
    found = bench.flops(SimpleNamespace(n_layer=12, n_embd=768, vocab_size=50257))
    assert [round(found[name] / 1e6, 1) for name in ('step', 'plain', 'forward')] == [516.2, 742.7, 255.6]


def test_goals_on_made_up_times():
    """2 x faster than P and as fast as all else: which goals pass, which are missed, which were not measured."""
    times = {'P_n=2': [2.0, 2.0], 'ours_n=2': [1.0, 1.0], 'base': [1.0, 1.0], 'evaluation': [1.0, 1.0]}
    rows = {row[1]: row for row in bench.verdicts({'fp32': part(**times)})}
    assert rows['tokens/s against P, n = 2, float32'][2:] == ['2 x', '>= 1.5 x', 'pass']
    assert rows["step over the frozen base's own, float32"][4] == 'pass'
    assert rows["evaluation's tokens/s over training's, float32"][2:] == ['2 x', '>= 1.9 x', 'pass']
    missed = rows["useful FLOPs over the products' peak, float32"]  # 1024 x 5e8 / 1e12
    assert missed[2:] == ['51.2 %', '>= 55 %', 'MISSED']
    assert rows['tokens/s against P, n = 8, float32'][2::2] == [None, 'not measured']
    assert rows['tokens/s against P, n = 2, bfloat16'][2::2] == [None, 'not measured']
    assert {row[0] for row in rows.values()} == set(range(1, 12))


def test_a_noisy_part_gives_no_verdict():
    quiet, noisy = part(), part()
    noisy['peaks'] = [1e12, 0.8e12]
    assert bench.noisy(noisy) and not bench.noisy(quiet) and not bench.noisy({'GPT-2': 2.0})
    noisy['seconds'] = {'ours n=2': [1.0], 'base': [1.0]}
    assert {row[4] for row in bench.verdicts({'fp32': noisy})} == {'noisy', 'not measured'}


def test_nan_is_no_pass():
    rows = bench.verdicts({'start': {'tiny base': math.nan, 'GPT-2': 1.0}})
    assert [row[4] for row in rows if row[0] == 11] == ['MISSED', 'pass']


@pytest.mark.parametrize(
    'verdicts, code, said',
    [(['pass', 'not measured'], 0, ''), (['pass', 'noisy'], 2, 'noisy'), (['MISSED', 'noisy'], 1, 'goals missed: 1 (a)')],
)
def test_exit_code(verdicts, code, said, capsys):
    assert bench.check([[1, name, 1.0, '', verdict] for name, verdict in zip('ab', verdicts)]) == code
    assert said in capsys.readouterr().out


@pytest.mark.parametrize('n, k', [(1, 2), (2, 2), (4, 1), (8, 2)])
def test_plain_baseline_is_the_same_function(n, k):
    args = SimpleNamespace(n_layer=2, n_head=2, n_embd=16, vocab_size=50, device='cpu')
    ours = bench.new_user(bench.new_base(args), n, k)
    found = bench.compare(ours, bench.PlainGPT(ours), args, bench.batch(args, 2, 16))
    assert found['worst'] < 1e-5 and found['tensors'] == 2 * (4 + 4 * n + (n > 1))


def test_wrong_or_nan_gradients_stop_the_bench():
    args = SimpleNamespace(n_layer=1, n_head=2, n_embd=16, vocab_size=50, device='cpu')
    ours = bench.new_user(bench.new_base(args), 2)
    plain = bench.PlainGPT(ours)
    ours.h[0].mlp.specialists[0].c_fc.B.data[0, 0] += 1.0
    assert bench.compare(ours, plain, args, bench.batch(args, 2, 16))['worst'] > 1e-3
    ours.h[0].mlp.specialists[0].c_fc.B.data[0, 0] = torch.nan
    with pytest.raises(SystemExit, match='not finite'):
        bench.compare(ours, plain, args, bench.batch(args, 2, 16))


def test_a_whole_run(tmp_path):
    """--quick on a tiny model, then a part on its own: the table, the JSON file, and the memory of a fresh process."""
    size = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--vocab_size=300', '--device=cpu', f'--json={tmp_path / "bench.json"}']

    def run(*args):
        return subprocess.run([sys.executable, 'bench.py', *size, *args], capture_output=True, text=True, cwd=ROOT)

    done = run('--quick', '--rounds=1')
    assert done.returncode == 0, done.stderr
    for row in bench.GOALS:
        assert row[1] in done.stdout
    assert 'not measured' in done.stdout
    parts = json.loads((tmp_path / 'bench.json').read_text())['parts']
    assert list(parts) == ['gradients', 'fp32', 'bf16']
    assert all(len(times) == 1 and times[0] > 0 for name in ('fp32', 'bf16') for times in parts[name]['seconds'].values())
    assert parts['gradients']['n=2 top_k=2']['worst'] < 1e-5 and parts['gradients']['bf16']['cosine'] > 0.99
    done = run('--only=nothing')
    assert done.returncode == 2 and 'expected some of gradients,fp32' in done.stderr
    done = run('--worker=ours fp32 2x1')
    assert done.returncode == 0 and 1e7 < float(done.stdout) < 2e9
