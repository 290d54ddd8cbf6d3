"""tools/bench.py: its arithmetic on made-up times, and whole runs on a tiny model."""

import json

import pytest

from tools import bench

GPT2, SMOLLM2 = bench.BASES.values()
TINY = ['--size=1,2,16,300', '--device=cpu', '--rounds=1']


def test_both_ratios_are_told():
    assert bench.ratios([2.0, 6.0, 4.0], [1.0, 2.0, 2.0]) == (2.0, 2.0)  # paired 2, 3, 2: median 2; fastest 2 / 1
    assert bench.ratios([2.0, 9.0, 9.0], [1.0, 3.0, 3.0]) == (3.0, 2.0)  # paired 3, but the fastest say 2


def test_the_weaker_of_the_two_counts():
    times = {'P n=2': [2.0, 9.0, 9.0], 'ours n=2': [1.0, 3.0, 3.0], 'base': [1.0, 1.0, 1.0]}
    part = {'seconds': times, 'tokens': 1024, 'peaks': [1e12, 1e12], 'flops': {'step': 5e8}}
    found = {what: reached for _, what, _, reached, _ in bench.figures('gpt2 fp32', part)}
    speedups = [reached for what, reached in found.items() if 'P' in what and reached.endswith('x')]
    assert speedups == ['2.00 x']  # at least: the smaller one
    assert '3.00 x' in found.values()  # over the base, at most: the larger one
    assert '17 %' in found.values()  # 1024 x 5e8 / 3 s over 1e12


def test_orders_alternate():
    order = []
    times = bench.race({name: lambda name=name: order.append(name) for name in 'ab'}, 3, 'cpu')
    assert ''.join(order) == 'abab' + 'ab' + 'ba' + 'ab' and [len(t) for t in times.values()] == [3, 3]


def test_targets_stand_beside_what_was_reached():
    """At most 1.20 of the base for smollm2 and 1.12 for gpt2, at least 1.9 for evaluation; what has none gets no verdict."""
    part = {'seconds': {'ours n=2': [1.15], 'base': [1.0], 'evaluation': [0.6], 'P n=2': [2.0]}, 'tokens': 1024}
    part |= {'peaks': [1e12, 1e12], 'flops': {'step': 5e8}}

    def verdicts(name: str) -> list[list]:
        return [[aimed, reached, verdict] for _, _, aimed, reached, verdict in bench.figures(name, part)]

    over_base, evaluated = ['<= 1.20 x', '1.15 x', 'met'], ['>= 1.90 x', '1.92 x', 'met']
    assert verdicts('smollm2 fp32') == [['', '1.74 x', ''], over_base, evaluated, ['', '45 %', '']]
    over_base, rate = ['<= 1.12 x', '1.15 x', 'missed'], ['>= 55 %', '45 %', 'missed']
    assert verdicts('gpt2 fp32') == [['>= 1.50 x', '1.74 x', 'met'], over_base, evaluated, rate]
    part['peaks'] = [1e12, 0.8e12]
    assert {verdict for _, _, verdict in verdicts('gpt2 fp32')} == {'noisy'}
    bytes_of_steps = {'ours bfloat16': 1e9, 'P bfloat16': 3e9} | {
        f'ours {dtype}, 64 windows by 8': 2.1e9 for dtype in ('bfloat16', 'float32')
    }
    assert [row[2:] for row in bench.figures('smollm2 memory', bytes_of_steps)] == [
        ['', '0.33 x', ''],
        ['', '2.10 GB', ''],
        ['<= 2.20 GB', '2.10 GB', 'met'],
    ]


def test_the_faster_dtype_is_advised():
    def part(seconds: float, end: float = 1e12) -> dict:
        return {'seconds': {'ours n=2': [seconds]}, 'tokens': 1000, 'peaks': [1e12, end]}

    parts = {'gpt2 fp32': part(2.0), 'gpt2 bf16': part(1.0), 'smollm2 fp32': part(2.0)}
    assert bench.advice(parts) == 'to train here: gpt2 --dtype=bfloat16 (tokens/s: float32 500, bfloat16 1000)'
    assert 'smollm2 --dtype=float32' in bench.advice({**parts, 'smollm2 bf16': part(4.0)})
    assert not bench.advice({'gpt2 fp32': part(2.0), 'gpt2 bf16': part(1.0, end=2e12)})  # noisy


def test_flops_of_gpt2_124m():
    """By hand, in MFLOP a token: 4 (12 L C² + V C) - 6 C² of the first c_attn + 3 (4 T C L) + 3 (2 L 8 (6 C + 2 10 C)) for a
    step, and 4 L 8 C² more in the plain form."""
    L, C, V, T = 12, 768, 50257, 128
    step = 4 * (12 * L * C * C + V * C) - 6 * C * C + 12 * T * C * L + 6 * L * 8 * 26 * C
    assert bench.flops(GPT2) == {'step': step, 'plain': step + 4 * L * 8 * C * C}
    assert [round(n / 1e6, 1) for n in bench.flops(GPT2).values()] == [516.2, 742.7]


def test_flops_of_smollm2_135m():
    """By hand: queries and what returns are C x C, keys and values C x C/3, an MLP is three times C x wide."""
    L, C, wide, V, T = 30, 576, 1536, 49152, 128
    frozen = L * (2 * C * C + 2 * C * C // 3 + 3 * C * wide) + V * C
    loras = L * 8 * (2 * 2 * C + 2 * (C + C // 3) + 2 * 3 * (C + wide))
    step = 4 * frozen - 2 * (C * C + 2 * C * C // 3) + 12 * T * C * L + 6 * loras
    assert bench.flops(SMOLLM2) == {'step': step, 'plain': step + 4 * L * 3 * C * wide}
    assert [round(n / 1e6, 1) for n in bench.flops(SMOLLM2).values()] == [587.1, 905.6]


@pytest.mark.parametrize('base', ['gpt2', 'smollm2'])
def test_the_base_alone_has_one_gradient_at_its_first_linear(base):
    """Its parameters stay frozen, and the base that is shared gets neither a bias nor a gradient."""
    args = bench.argparse.Namespace(config=bench.size('2,2,16,300')[base], device='cpu')
    own = bench.new_base(args)
    names = [name for name, _ in own.named_parameters()]
    step = bench.base_step(own, bench.batch(args, 2, 8), 'float32')
    step()
    (only,) = [cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, bench.torch.nn.Parameter)]
    assert only.grad.any() and [name for name, _ in own.named_parameters()] == names


def test_a_noisy_part_is_named():
    assert bench.noisy({'peaks': [1e12, 0.8e12]})
    assert not bench.noisy({'peaks': [1e12, 1e12]}) and not bench.noisy({'ours': 2.0})


def test_a_whole_run(tmp_path, capsys):
    """--quick on tiny models of both families: the tables, and the JSON file; a part more; what it refuses."""
    out = tmp_path / 'bench.json'
    bench.main([*TINY, '--quick', f'--out={out}'])
    said = capsys.readouterr().out
    assert 'against P n=2' in said and 'reached  verdict' in said and '--dtype' not in said
    parts = json.loads(out.read_text())['parts']
    assert parts.keys() == {'gpt2 fp32', 'smollm2 fp32'}
    for part in parts.values():
        assert part['seconds'].keys() == {'P n=2', 'ours n=2', 'ours n=8', 'base', 'evaluation'} and part['tokens'] == 256
        assert all(len(times) == 1 and times[0] > 0 for times in part['seconds'].values())
    bench.main([*TINY, '--only=bf16', '--bases=smollm2', f'--out={out}'])
    more = json.loads(out.read_text())['parts']
    assert more.keys() == {*parts, 'smollm2 bf16'} and more['gpt2 fp32'] == parts['gpt2 fp32']
    assert more['smollm2 bf16']['seconds'].keys() >= {f'ours n={n}' for n in (1, 2, 4, 8)}
    for wrong in ('--only=nothing', '--bases=nothing'):
        with pytest.raises(SystemExit) as end:
            bench.main([*TINY, wrong])
        assert end.value.code == 2 and 'nothing' in capsys.readouterr().err


@pytest.mark.parametrize('base', ['gpt2', 'smollm2'])
def test_peft_has_a_lora_of_rank_16_on_the_same_linears(base, monkeypatch):
    pytest.importorskip('peft', reason='PEFT is not installed')
    pytest.importorskip('transformers', reason='transformers is not installed')
    args, trained = bench.argparse.Namespace(config=bench.size('2,2,16,300')[base], device='cpu'), []
    monkeypatch.setattr(bench, 'training_step', lambda loss, parameters, *rest: trained.extend(parameters))
    bench.peft_step(args, (), 'float32')
    attn, mlp = bench.linears(args.config)
    assert sum(p.numel() for p in trained if p.requires_grad) == 2 * 16 * sum(map(sum, attn + mlp))


@pytest.mark.slow
@pytest.mark.parametrize('base', ['gpt2', 'smollm2'])
def test_memory_and_short_runs(base, tmp_path):
    """The parts that start processes and runs of train.py."""
    out = tmp_path / 'bench.json'
    bench.main([*TINY, f'--bases={base}', '--only=memory,train', '--users=2', f'--out={out}'])
    parts = json.loads(out.read_text())['parts']
    assert 1e7 < parts[f'{base} memory']['ours bfloat16'] < 4e9
    train = parts[f'{base} train']
    assert 0 < train['large']['startup_seconds'] < 100 and train['large']['peak_rss_bytes'] > 1e7
    assert ('tiny' in train) == (base == 'gpt2')  # base-tiny is a GPT-2
