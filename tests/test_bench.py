"""tools/bench.py: its arithmetic on made-up times, and whole runs on a tiny model."""

import json

import pytest

from model import GPTConfig
from tools import bench

TINY = ['--size=1,2,16,300', '--device=cpu', '--rounds=1']


def test_both_ratios_are_told():
    assert bench.ratios([2.0, 6.0, 4.0], [1.0, 2.0, 2.0]) == (2.0, 2.0)  # paired 2, 3, 2: median 2; fastest 2 / 1
    assert bench.ratios([2.0, 9.0, 9.0], [1.0, 3.0, 3.0]) == (3.0, 2.0)  # paired 3, but the fastest say 2


def test_the_weaker_of_the_two_counts():
    times = {'P n=2': [2.0, 9.0, 9.0], 'ours n=2': [1.0, 3.0, 3.0], 'base': [1.0, 1.0, 1.0]}
    part = {'seconds': times, 'tokens': 1024, 'peaks': [1e12, 1e12], 'flops': {'step': 5e8}}
    found = {what: reached for _, what, reached in bench.figures('fp32', part)}
    speedups = [reached for what, reached in found.items() if 'P' in what and reached.endswith('x')]
    assert speedups == ['2.00 x']  # at least: the smaller one
    assert '3.00 x' in found.values()  # over the base, at most: the larger one
    assert '17 %' in found.values()  # 1024 x 5e8 / 3 s over 1e12


def test_orders_alternate():
    order = []
    times = bench.race({name: lambda name=name: order.append(name) for name in 'ab'}, 3, 'cpu')
    assert ''.join(order) == 'aabb' + 'ab' + 'ba' + 'ab' and [len(t) for t in times.values()] == [3, 3]


def test_flops_of_gpt2_124m():
    """By hand: 516.2 MFLOP a token for a step, 742.7 in the plain form."""
    found = bench.flops(GPTConfig())
    assert [round(found[name] / 1e6, 1) for name in ('step', 'plain')] == [516.2, 742.7]


def test_a_noisy_part_is_named():
    assert bench.noisy({'peaks': [1e12, 0.8e12]})
    assert not bench.noisy({'peaks': [1e12, 1e12]}) and not bench.noisy({'ours': 2.0})


def test_a_whole_run(tmp_path, capsys):
    """--quick on a tiny model: the table, and the JSON file."""
    out = tmp_path / 'bench.json'
    bench.main([*TINY, '--quick', f'--out={out}'])
    assert 'against P n=2' in capsys.readouterr().out
    parts = json.loads(out.read_text())['parts']
    assert parts.keys() == {'fp32', 'bf16'}
    assert all(len(times) == 1 and times[0] > 0 for part in parts.values() for times in part['seconds'].values())
    with pytest.raises(SystemExit) as end:
        bench.main([*TINY, '--only=nothing'])
    assert end.value.code == 2 and 'nothing' in capsys.readouterr().err


@pytest.mark.slow
def test_memory_and_short_runs(tmp_path):
    """The parts that start processes and runs of train.py."""
    out = tmp_path / 'bench.json'
    bench.main([*TINY, '--only=memory,train', '--users=2', f'--out={out}'])
    parts = json.loads(out.read_text())['parts']
    assert 1e7 < parts['memory']['ours bfloat16'] < 4e9
    assert 0 < parts['train']['tiny']['startup_seconds'] < 100 and parts['train']['large']['peak_rss_bytes'] > 1e7
