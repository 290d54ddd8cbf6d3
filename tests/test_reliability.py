"""What is promised of crashes, bad files and bad users (SECURITY.md), each line with the figure that was reached.

`make test` runs a short form of every line, `make test-all` a longer one; `make reliability` (RELIABILITY=long) all of it, and
prints the table."""

import ast
import errno
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LONG, ROOT, refused, same, user_streams, write_dataset
from safetensors import safe_open
from safetensors.torch import save
from several_runs import marked, several_runs
from test_processes import RUNS, given, slow

import federate
import user
from data.stream import Texts
from eval import read_run
from federate import is_generalist
from lora_moe import ATTENTION_RANK, scaling
from model import load_gpt
from run import checkpoint
from run.adapter import read_peft
from run.fleet import Fleet

pytestmark = pytest.mark.reliability

RULES = """fedavg ffa fedsa median trimmed_mean weights validation predictions hetlora flora flexlora""".split()  # of RUNS


def state(out: Path) -> dict:
    """All that a run leaves behind, but for clocks: what must be equal to the bit."""
    found = {'metrics': (out / 'metrics.jsonl').read_bytes()}
    for file in sorted([*(out / 'checkpoint').iterdir(), *(out / 'adapters').iterdir()]):
        checkpoint.read(file)  # its SHA-256 is right; the order of metadata in a file is not fixed, so the files differ
        with safe_open(file, 'pt') as f:
            metadata = {
                key: json.loads(text) if key == 'facts' else text for key, text in f.metadata().items() if key != 'sha256'
            }
            for clock in ('seconds', 'training', 'checkpoints'):
                metadata['facts'].get('clock', {}).pop(clock, None)
            found[file.name] = metadata, {name: f.get_tensor(name).numpy().tobytes() for name in f.keys()}
    return found


@pytest.fixture(scope='module')
def whole(tiny, tmp_path_factory) -> SimpleNamespace:
    """A run of five rounds that nothing happens to. args, but for the folder; what it leaves; its calls of each point; seconds
    from the end of its start to its own."""
    out = tmp_path_factory.mktemp('whole') / 'run'
    args = [*given(tiny, out, *RUNS['fedavg']), '--rounds=5']
    (end,) = several_runs([args], [{'count': True}])
    assert end.status == 0, end.err
    calls = json.loads(re.findall(r'calls (.*)', end.err)[-1])
    seconds = json.loads((out / 'summary.json').read_text())['seconds']
    args = [arg for arg in args if not arg.startswith('--out_dir')]
    return SimpleNamespace(args=args, leaves=state(out), calls=calls, seconds=seconds)


def early(whole: SimpleNamespace, rng: random.Random) -> int:
    """Lines of metrics.jsonl after which a run has most of its way before it, however fast the machine is by then."""
    return rng.randint(1, whole.leaves['metrics'].count(b'\n') * 3 // 5)


def go_on(args: list, out: Path) -> list[str]:
    """The command that a person gives after a crash: --resume, or the same again if it had not begun."""
    return [*args, f'--out_dir={out}', '--resume' if checkpoint.rounds(out / 'checkpoint') else '--overwrite']


def cut_and_resume(whole: SimpleNamespace, tmp_path: Path, accidents: list) -> tuple[list, int]:
    """(the ends of the runs that were cut, how many of them came to the same bits in a second run)."""
    outs = [tmp_path / str(i) for i in range(len(accidents))]
    ends = several_runs([[*whole.args, f'--out_dir={out}'] for out in outs], accidents)
    again = several_runs([go_on(whole.args, out) for out in outs])
    assert all(end.status == 0 for end in again), again
    found = [state(out) for out in outs]
    for accident, own in zip(accidents, found):  # shown if the test fails
        print(accident, [name for name in own.keys() | whole.leaves.keys() if own.get(name) != whole.leaves.get(name)])
    return ends, sum(own == whole.leaves for own in found)


# ---- R1 to R4: crashes and damaged files ------------------------------------------------------------------------------
@pytest.mark.parametrize('n', [3, slow(50 if LONG else 6)])
def test_R1_killed_at_any_moment(whole, tmp_path, figure, n):
    """kill -9 at random moments, one in three within a save, one in three at any second; --resume comes to the same bits."""
    rng, accidents = random.Random(1), []
    for i in range(n):
        point = rng.choice([*whole.calls])
        inside = {'signal': 9, 'at': point, 'call': rng.randint(1, whole.calls[point])}
        between = {'signal': 9, 'after': 0, 'from': str(tmp_path / str(i) / 'metrics.jsonl'), 'lines': early(whole, rng)}
        accidents.append((inside, between, {'signal': 9, 'after': rng.uniform(0, whole.seconds)})[i % 3])
    ends, good = cut_and_resume(whole, tmp_path, accidents)
    killed = sum(end.status == -9 for end in ends)
    figure('R1', f'{good}/{n} bit-identical after kill -9 ({killed} before their end)', good == n and killed >= n / 2)


@pytest.mark.parametrize('n', [2, slow(20 if LONG else 4)])
def test_R2_told_to_stop(whole, tmp_path, figure, n):
    """SIGINT and SIGTERM: one line, exit code 130 or 143, at once; --resume comes to the same bits."""
    rng = random.Random(2)
    accidents = [
        {'signal': (2, 15)[i % 2], 'after': 0, 'from': str(tmp_path / str(i) / 'metrics.jsonl'), 'lines': early(whole, rng)}
        for i in range(n)
    ]
    ends, good = cut_and_resume(whole, tmp_path, accidents)
    told = [end for end, accident in zip(ends, accidents) if end.status == 128 + accident['signal']]
    assert all('the last finished round is kept' in end.err and end.err.count('\n') == 1 for end in told)
    assert all(end.status in (0, 130, 143) for end in ends)
    slowest = max(end.seconds for end in told)
    reached = f'{len(told)} stopped with 130 or 143 within {slowest:.1f} s, {good}/{n} bit-identical after --resume'
    figure('R2', reached, good == n and slowest < 5 and len(told) >= n / 2)


@pytest.mark.parametrize('n', [4, slow(1000 if LONG else 8)])
def test_R3_a_crash_at_each_step_of_a_save(whole, tmp_path, figure, n):
    """Killed at each write, fsync, rename and deletion: a round that loads is always there once the first step is taken."""
    every = [(point, call) for point in whole.calls for call in range(1, whole.calls[point] + 1)]
    moments = random.Random(3).sample(every, min(n, len(every)))
    outs = [tmp_path / f'{point}-{call}' for point, call in moments]
    accidents = [{'signal': 9, 'at': point, 'call': call} for point, call in moments]
    loads = 0
    for out, end in zip(outs, several_runs([[*whole.args, f'--out_dir={out}'] for out in outs], accidents)):
        assert end.status == -9
        finished = checkpoint.rounds(out / 'checkpoint')
        trained = (out / 'metrics.jsonl').exists() and (out / 'metrics.jsonl').stat().st_size > 0
        loads += bool(checkpoint.check(out / 'checkpoint', finished[-1])) if finished else not trained
    reached = f'{loads}/{len(moments)} crashes at write, fsync, rename, prune leave a round that loads'
    figure('R3', reached, loads == len(moments))


def test_R4_damaged_files(train, tmp_path, figure):
    """Cut at 100 lengths, 1,000 bits flipped one at a time, in a round, a user's file and an adapter: refused, file named."""
    out, rng, caught = train().out, random.Random(4), 0
    files = [
        out / 'checkpoint' / 'round-3.safetensors',
        out / 'checkpoint' / 'user1-3.safetensors',
        out / 'adapters' / 'user0.safetensors',
    ]
    for i in range(1100):
        raw = bytearray(files[i % 3].read_bytes())
        if i < 100:
            raw = raw[: rng.randrange(len(raw))]
        else:
            at = rng.randrange(len(raw)) if i % 2 else rng.randrange(8 + int.from_bytes(raw[:8], 'little'))  # the header, too
            raw[at] ^= 1 << rng.randrange(8)
        bad = tmp_path / files[i % 3].name
        bad.write_bytes(raw)
        with pytest.raises(ValueError, match=f'{bad.name} is damaged'):
            checkpoint.read(bad)
        caught += 1
    figure('R4', f'{caught}/1,100 damaged files refused by SHA-256 and named', caught == 1100)


def test_R4_the_round_before_is_offered(train, capsys):
    """A user's file of the last round is damaged: the line says what to delete, and doing so comes to the same bits."""
    first = train()
    expected, last = state(first.out), first.out / 'checkpoint' / 'round-3.safetensors'
    damaged = first.out / 'checkpoint' / 'user2-3.safetensors'
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert 'user2-3.safetensors is damaged' in (err := refused(capsys, train, '--resume')) and f'delete {last}' in err
    last.unlink()
    train('--resume')
    assert state(first.out) == expected


# ---- R5: nothing that is loaded is executed ---------------------------------------------------------------------------
class Hostile:
    def __init__(self, marker: Path, how: str):
        self.marker, self.how = marker, how

    def __reduce__(self):
        call = f'open({str(self.marker)!r}, "w").close()'
        return {
            'eval': (eval, (call,)),
            'exec': (exec, (call,)),
            'system': (os.system, (f'touch {self.marker}',)),
            'popen': (subprocess.call, (['touch', str(self.marker)],)),
            'open': (open, (str(self.marker), 'w')),
        }[self.how]


def test_R5_pickles_are_never_run(train, tiny, tmp_path, capsys, figure):
    """Five pickles that would create a file, given to every path that loads one."""
    import pickle

    out, marker, tried = train().out, tmp_path / 'executed', 0
    for how in ('eval', 'exec', 'system', 'popen', 'open'):
        hostile = Hostile(marker, how)
        plain, inside = tmp_path / 'plain.bin', tmp_path / 'zip.bin'
        plain.write_bytes(pickle.dumps(hostile))
        torch.save({'x': hostile}, inside)
        objects = tmp_path / 'objects.npy'
        np.save(objects, np.array([hostile], dtype=object), allow_pickle=True)
        for bad in (plain, inside, objects):
            folder = tmp_path / 'hub'
            folder.mkdir(exist_ok=True)
            shutil.copy(bad, folder / 'pytorch_model.bin')
            (folder / 'config.json').write_text('{"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 8, "n_positions": 8}')
            weights = tmp_path / 'weights.safetensors'
            shutil.copy(bad, weights)
            run = tmp_path / 'run-copy'
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(out, run)
            shutil.copy(bad, run / 'adapters' / 'user0.safetensors')
            shutil.copy(bad, run / 'checkpoint' / 'round-3.safetensors')
            stream = write_dataset(tmp_path / f'data-{how}-{bad.stem}', [user_streams(0, 300)])
            shutil.copy(bad, stream / 'user0_train.bin')
            peft = tmp_path / 'peft'
            peft.mkdir(exist_ok=True)
            (peft / 'adapter_config.json').write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
            shutil.copy(bad, peft / 'adapter_model.safetensors')
            for load in (
                lambda: load_gpt(str(folder)),
                lambda: read_peft(peft, {}, 16),
                lambda: load_gpt(str(weights)),
                lambda: read_run(run),
                lambda: checkpoint.read(run / 'checkpoint' / 'round-3.safetensors'),
                lambda: Texts(stream, 16, 257),
                lambda: json.loads(bad.read_bytes()),
            ):
                with pytest.raises((ValueError, OSError)):
                    load()
                assert not marker.exists()
                tried += 1
    sources = [file.read_text() for folder in ('.', 'data', 'run', 'tools') for file in sorted((ROOT / folder).glob('*.py'))]
    banned = [word for text in sources for word in ('pickle.load', 'weights_only=False', 'allow_pickle=True') if word in text]
    loads = [call for text in sources for call in re.findall(r'torch\.load\([^\n]*', text)]
    ok = not marker.exists() and not banned and all('weights_only=True' in call for call in loads)
    figure('R5', f'0 executions in {tried} loads of hostile pickles; {len(banned)} banned calls in the source', ok)


# ---- R6, R7: what users send ------------------------------------------------------------------------------------------
@pytest.fixture
def of_rule(train, monkeypatch):
    """of_rule(rule, *args): train's parts of one round of it, or more, and of the last: .messages that came, .expected of whom,
    .updates that were combined, .combined for all and .own for single users."""
    asked, found, admit, combine = {}, {}, federate.admit, federate.combine

    def admits(messages, t, expected, **how):
        asked.update(messages=messages, expected=expected)
        return admit(messages, t, expected, **how)

    def combines(c, t, server, sent, *rest):
        found.update(asked, updates=sent)  # now, because a rule may ask once more
        found['combined'], found['own'] = combine(c, t, server, sent, *rest)
        return found['combined'], found['own']

    monkeypatch.setattr(federate, 'admit', admits)
    monkeypatch.setattr(federate, 'combine', combines)

    def run(rule, *args):
        parts = train(*RUNS[rule], '--rounds=1', '--judge_windows=4', '--overwrite', *args, out=rule)
        return SimpleNamespace(**vars(parts), **found)

    return run


def by_hand(run, updates: list[dict]) -> dict | list[dict]:
    """What the rule of a run makes of these updates, from the formulas in federate.py alone."""
    c, names, present = run.c, [*run.fleet.asked], [*run.updates]
    if c.aggregate in ('fedavg', 'ffa', 'fedsa'):
        return {n: sum(u[n].double() for u in updates).div(len(updates)).float() for n in names}
    if c.aggregate == 'median':
        return {n: torch.stack([u[n] for u in updates]).double().quantile(0.5, 0).float() for n in names}
    if c.aggregate == 'trimmed_mean':
        return federate.trimmed_mean(updates, c.trim)
    if c.aggregate == 'trust':
        W = next(line['matrix'] for line in reversed(run.lines) if line['kind'] == 'trust')
        return [{n: sum(w * u[n].double() for w, u in zip(row, updates)).float() for n in names} for row in W]
    experts = [{n: v for n, v in u.items() if is_generalist(n)} for u in updates]
    attention = [{n: v for n, v in u.items() if not is_generalist(n)} for u in updates]
    weights = [c.n_train[i] / sum(c.n_train[k] for k in present) for i in present]
    gammas = [scaling(c.lora_alpha, c.lora_rank[i]) for i in present]
    if c.aggregate == 'hetlora':
        return federate.hetlora(experts, gammas) | federate.fedavg(attention)
    if c.aggregate == 'flexlora':
        return federate.flexlora(experts, weights, gammas) | federate.fedavg(attention)
    gamma = [scaling(c.lora_alpha, ATTENTION_RANK)] * len(present)
    return federate.flora(experts, weights, gammas) | federate.flora(attention, weights, gamma)


def is_rule_of(run, admitted: list[int]) -> bool:
    """Whether the last round combined the updates of these users, and of no other."""
    if [*run.updates] != admitted:
        return False
    sent = {i: update for i, _, update in run.messages}
    expected = by_hand(run, [sent[i] for i in admitted])
    if isinstance(expected, list):
        return all(close(run.own[i], own) for i, own in zip(admitted, expected))
    return close(run.combined, expected) and all(v.isfinite().all() for v in run.combined.values())


def close(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=1e-5, atol=1e-7) for n in a)


def test_R6_nan_and_infinity(train, of_rule, capsys, figure):
    """One of three users sends NaN, or infinity: its number is named, and the result is that of the two others."""
    good, tried = 0, 0
    for rule in RULES:
        for attack in ('nan', 'scale:1e400') if LONG else ('nan',):
            run = of_rule(rule, f'--attack={attack}')
            lines = [line for line in run.lines if line['kind'] == 'refused']
            named = 'what user 2 sent is refused' in capsys.readouterr().err
            good += named and [line['users'] for line in lines] == [[2]] and is_rule_of(run, [0, 1])
            tried += 1
    run = train('--method=consensus', '--consensus_start=1', '--judge_windows=4', '--rounds=1', '--attack=nan', out='consensus')
    good += [line['users'] for line in run.lines if line['kind'] == 'refused'] == [[2]] and [
        line['users'] for line in run.lines if line['kind'] == 'trust'
    ] == [[0, 1]]
    for method in ('local', 'comigs_2s'):  # nothing leaves, so there is nothing to refuse
        run = train(f'--method={method}', '--rounds=1', '--attack=nan', out=method)
        good += not [line for line in run.lines if line['kind'] == 'refused']
    figure('R6', f'{good}/{tried + 3} runs of every rule refuse NaN and infinity and combine the rest', good == tried + 3)


def bad_updates(good: dict) -> dict:
    """{what is wrong: the update}."""
    first, rng = next(iter(good)), torch.Generator().manual_seed(0)
    A = next((n for n in good if is_generalist(n) and n.endswith('.A')), first)
    return {
        'missing': {n: v for n, v in good.items() if n != first},
        'empty': {},
        'extra': {**good, 'h.0.mlp.router.weight': good[first]},
        'shape': {**good, first: good[first][:, :-1]},
        'transposed': {**good, first: good[first].T},
        'broadcastable': {**good, first: torch.zeros(1)},
        'scalar': {**good, first: torch.tensor(0.0)},
        'float64': {**good, first: good[first].double()},
        'float16': {**good, first: good[first].half()},
        'int64': {**good, first: good[first].long()},
        'no tensor': {**good, first: 'rubbish'},
        'none': {**good, first: None},
        'higher rank': {**good, A: torch.randn(good[A].shape[0] + 1, *good[A].shape[1:], generator=rng)},
        'lower rank': {**good, A: good[A][:-1]},
        'nan': {**good, first: good[first] * math.nan},
    }


def test_R7_every_other_kind_of_bad_update_and_R10_the_order_of_users(of_rule, figure):
    """R7: names, shapes (nothing is broadcast), dtypes, ranks: refused in one line that says what was expected. R10: updates
    that come in 20 other orders give the same bits, by every rule."""
    caught, tried, alike, rng = 0, 0, 0, random.Random(0)
    for rule in RULES:
        run, how = of_rule(rule), {'lower_rank': rule == 'hetlora'}
        messages, expected = [(i, 5, update) for i, _, update in run.messages], run.expected
        for bad in bad_updates(messages[1][2]).values():
            admitted, lines = federate.admit([messages[0], (1, 5, bad), messages[2]], 5, expected, **how)
            caught += [*admitted] == [0, 2] and [user for user, _ in lines] == [1] and '\n' not in lines[0][1]
            tried += 1
        admitted, lines = federate.admit(messages, 5, expected, **how)
        assert [*admitted] == [0, 1, 2] and not lines
        first = by_hand(run, [*admitted.values()])
        for _ in range(20):
            rng.shuffle(messages)
            again = by_hand(run, [*federate.admit(messages, 5, expected)[0].values()])
            alike += all(map(same, first, again)) if isinstance(first, list) else same(first, again)
    updates = [*of_rule('fedavg').updates.values()]
    for combine in (federate.fedavg, federate.median, lambda u: federate.trimmed_mean(u, 0.4)):  # these without sorting by user
        first = combine(updates)
        for _ in range(20):
            rng.shuffle(updates)
            alike += same(combine(updates), first)
    figure('R7', f'{caught}/{tried} bad updates refused, {len(RULES)} rules', caught == tried)
    tried = 20 * (len(RULES) + 3)
    figure('R10', f'{alike}/{tried} permutations of users give the same bits', alike == tried)


# ---- R8: users that send rubbish which is finite ----------------------------------------------------------------------
def test_R8_hostile_users(train, tmp_path, capsys, figure):
    """One of 4 (and 3 of 10) scaled or noisy: with a robust rule the honest users stay within 5 % of the run without attack."""
    worst, tried, warned = (0.0, ''), 0, 0
    sizes = {4: 1, 10: 3} if LONG else {4: 1}
    attacks = ('scale:1e3', 'scale:1e6', 'noise:1e3') if LONG else ('scale:1e6',)
    learn = (
        '--method=fedavg',
        '--rounds=8',
        '--local_steps=5',
        '--expert_lr=3e-3',
        '--eval_every=8',
        '--block_size=32',
        '--overwrite',
    )
    learn += (f'--init_from={ROOT}/assets/base-tiny.safetensors',)  # perplexity 100 before, 4.5 after
    for n, hostile in sizes.items():
        folder = write_dataset(tmp_path / f'users{n}', [user_streams(i % 3, 400) for i in range(n)])
        defences = ['--aggregate=median'], ['--clip_norm=1'], ['--aggregate=trimmed_mean', '--trim=0.3']
        for defence in defences if LONG else defences[:2]:
            of = lambda *attack: train(*learn, f'--dataset={folder}', *defence, *attack)  # noqa: B023, E731
            clean = of().summary
            assert clean['mean_test_ppl'] < 0.1 * np.mean(clean['pretrained_test_ppl'])  # it does learn
            for attack in attacks:
                ppl = of(f'--attack={attack}', f'--attackers={hostile}').summary['test_ppl']
                honest = slice(n - hostile)  # their mean: a single user also misses what the hostile one would have taught it
                rise = np.mean(ppl[honest]) / np.mean(clean['test_ppl'][honest]) - 1
                worst = max(worst, (rise, f'{n} users, {defence[0]}, {attack}'))
                tried += 1
        capsys.readouterr()
        try:
            train(*learn, f'--dataset={folder}', '--attack=scale:1e3', f'--attackers={hostile}', '--rounds=2')
        except SystemExit:
            pass  # what the mean makes of it is no model any more
        warned += f'what user {n - 1} sent is over ten times as large' in capsys.readouterr().err
    reached = f'honest users at most {worst[0]:+.1%} ({worst[1]}) in {tried} attacks on median, trimmed mean, norm clipping; '
    reached += f'fedavg warns {warned}/{len(sizes)}'
    figure('R8', reached, worst[0] < 0.05 and warned == len(sizes))


# ---- R9, R11, R13: who takes part ---------------------------------------------------------------------------------------
def test_R9_missing_users(of_rule, figure):
    """Users away, or failing halfway through a round: exactly those present are combined; nobody present changes no bit."""
    good, tried, rounds = 0, 0, 4 if LONG else 2
    for rule in RULES:
        for args in (['--participation=0.7'], ['--failures=0.5'], ['--failures=0.25'], ['--failures=0.75'])[: 4 if LONG else 2]:
            run = of_rule(rule, *args, f'--rounds={rounds}')
            present = [i for i in run.fleet.present(rounds - 1) if not run.fleet.fails(i, rounds - 1)]
            good += is_rule_of(run, present) if present else not run.updates
            tried += 1
        run = of_rule(rule, '--failures=1', '--rounds=2')
        start = run.fleet.asked if rule != 'flora' else {}
        good += same(run.server, start) and same(run.fleet.base.state_dict(), load_gpt(run.c.init_from).state_dict())
        tried += 1
    figure('R9', f'{good}/{tried} runs combine exactly those present; nobody present changes no bit', good == tried)


def test_R9_a_user_that_fails_goes_on_from_its_file(train):
    """What it did in that round is lost, and its next is the same as if it had not taken part."""
    run = train('--method=local', '--failures=0.5', '--rounds=6', '--seed=3')
    rounds = {i: [line['round'] for line in run.lines if line['kind'] == 'comm' and line['user'] == i] for i in range(3)}
    assert any(len(done) < 6 for done in rounds.values()) and {*rounds} == {*range(3)}
    assert all(user.expert_steps == 2 * len(rounds[user.id]) for user in run.users)  # of 2 local steps a round


def test_R11_the_same_again(whole, train, tmp_path, figure):
    """A new process; and with one user more, the others' batches and losses are what they were."""
    command = [sys.executable, 'train.py', *whole.args, f'--out_dir={tmp_path}/again']
    subprocess.run(command, cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, check=True)
    again = state(tmp_path / 'again') == whole.leaves
    four = write_dataset(tmp_path / 'data of four', [user_streams(i, n) for i, n in enumerate((300, 500, 900, 400))])
    three, more = train('--method=local', out='three'), train('--method=local', f'--dataset={four}', out='four')
    others = three.lines == [line for line in more.lines if line['user'] < 3]
    figure('R11', f'a new process: {again}; one more user: the others identical: {others}', again and others)


def test_R13_late_double_and_out_of_order(figure):
    """1,000 interleavings of what four users send in three rounds, some of it twice, some of it late."""
    counted, template = 0, {'x': torch.zeros(2)}
    for seed in range(1000):
        rng = random.Random(seed)
        messages = [(user, t, {'x': torch.tensor([user, t + 0.5])}) for user in range(4) for t in range(3)]
        messages += rng.choices(messages, k=8)
        rng.shuffle(messages)
        for t in range(3):
            admitted, refused_ = federate.admit(messages, t, dict.fromkeys(range(3), template))  # user 3 takes no part
            once = [*admitted] == [0, 1, 2] and all(update['x'].tolist() == [i, t + 0.5] for i, update in admitted.items())
            counted += once and len(refused_) == len(messages) - 3
            why = {user: line for user, line in refused_}
            assert all('takes no part' in line for user, line in refused_ if user == 3) and 3 in why
    figure('R13', f'{counted}/3,000 rounds of 1,000 interleavings count each user once and refuse the late', counted == 3000)


# ---- R12: what leaves a device ----------------------------------------------------------------------------------------
def test_R12_wire_audit(train, tiny, tmp_path, monkeypatch, figure):
    """Every answer of a user holds the names of METHOD 0.5 and no other and has the bytes that are logged; specialists and
    routers are filled with a marker that occurs in none: in one process by answer, in two by all that is broadcast between
    them."""
    marker, answers, ask = 1.2345678e-3, [], Fleet.ask
    needle = np.full(4, marker, '<f4').tobytes()

    def audited(fleet, question, ids, **told):
        found = ask(fleet, question, ids, **told)
        answers.extend((question, i, fleet.journal.t, answer) for i, answer in found.items())
        return found

    monkeypatch.setattr(Fleet, 'ask', audited)
    monkeypatch.setattr(user, 'initial', marked(user.initial, marker))
    frozen, n, names, exact, hits = ('--expert_lr=1e-30', '--router_lr=1e-30'), 0, 0, 0, 0
    asking = ('--judge_windows=4', '--consensus_start=1')
    for args in (
        ['--method=comigs_1g1s'],
        ['--method=comigs_1gxs', '--n_experts=3', '--n_generalists=2'],
        ['--method=pfedmoe'],
        ['--share_attention=False'],
        ['--aggregate=median'],
        ['--method=comigs_2s'],
        ['--method=pcl', '--trust=weights'],
        ['--method=pcl', *asking],
        ['--method=pcl', '--trust=predictions', *asking],
        ['--method=consensus', *asking],
    ):
        answers.clear()
        run = train(*args, *frozen, out=f'audit{n}')
        own = [save({name: p.detach() for name, p in one.adapter.items()}) for one in run.users]
        assert run.c.method == 'pcl' or all(needle in raw for raw in own)  # so a search does find it
        assert not [line for line in run.lines if line['kind'] == 'refused']  # every answer is here
        paid, c = dict.fromkeys(((i, t) for _, i, t, _ in answers), 0), run.c
        for question, i, t, answer in answers:
            attention = [name for name in run.users[i].adapter if '.attn.' in name and c.share_attention]
            leaves = [name for name in run.users[i].adapter if '.generalists.' in name] + attention
            legal = {'upload': leaves, 'judge': ['ppl'], 'predict': ['ids', 'values']}[question]
            names += sorted(answer) == sorted(legal)
            raw = save(answer)
            header = 8 + int.from_bytes(raw[:8], 'little')  # safetensors: 8 bytes, then names and shapes in JSON
            paid[i, t] += len(raw) - header
            hits += needle in raw
        logged = {(line['user'], line['round'] - 1): line['bytes_up'] for line in run.lines if line['kind'] == 'comm'}
        exact += sum(paid[i, t] == logged[i, t] for _, i, t, _ in answers)
        n += len(answers)
    wire = tmp_path / 'wire'
    job = given(tiny, tmp_path / 'two', '--method=comigs_1gxs', '--n_experts=3', '--n_generalists=1', *frozen)
    assert several_runs([job], [{'audit': str(wire), 'mark': marker}], n=2)[0].status == 0
    hits += wire.read_bytes().count(needle)
    assert needle in (tmp_path / 'two' / 'adapters' / 'user0.safetensors').read_bytes()
    reached = f'{hits} hits of the marker in {n} answers and {wire.stat().st_size:,} bytes between two processes; '
    figure('R12', reached + f'names {names}/{n}, bytes exact {exact}/{n}', hits == 0 and names == exact == n)


# ---- R14 to R16: bad input --------------------------------------------------------------------------------------------
VALUES = ['', 'a b', "'x'", '\x00', 'é', '${HOME}', '/dev/null', '../..', '999999999999']
VALUES += '0 1 2 3 -1 0.5 -0.5 1e-3 1e99 nan inf None True False () (1,) 1,2 1,2,3 4,2,2 0,1,2 [1] {} = --'.split()
VALUES += 'own mixture median flora trust joint train learned mean full active none prefix scale:1e3 bfloat16'.split()


def fuzzed(rng: random.Random, defaults: dict[str, str], tmp_path: Path, i: int) -> list[str]:
    """A command line of random switches, with values that may be right or with any; every third has a config file of such, or
    of plain rubbish."""
    kinds = {'int': ('1', '2', '3'), 'float': ('0.1', '0.5', '1.0'), 'bool': ('True', 'False'), 'str': ()}
    methods, names, args = ('fedavg', 'pcl', 'hetlora', 'consensus', 'comigs_1gxs'), [*defaults], []
    careful = rng.random() < 0.6
    for name in rng.choices(
        [*names, 'method'] if careful else [*names, 'n_expertz', 'method', 'aggregate'], k=rng.randint(1, 4)
    ):
        default = defaults.get(name, '0')
        likely = methods if name == 'method' else (*kinds[type(ast.literal_eval(default)).__name__], default.strip("'"))
        value = rng.choice(likely if careful or name == 'method' else VALUES)
        args.append(f'--{name}={value}' if rng.random() < 0.95 else f'--{name}')
    if i % 3 == 0:
        file = tmp_path / f'fuzz{i}.py'
        if careful:
            lines = [f'{name} = {defaults[name]}' for name in rng.choices(names, k=2)]
        else:
            lines = [f'{rng.choice(names)} = {rng.choice(VALUES)}'] if rng.random() < 0.7 else ['import (', '\x07']
        file.write_text('\n'.join(lines))
        args.insert(0, str(file))
    return args


def test_R14_fuzzed_command_lines(train, tmp_path, capsys, monkeypatch, figure):
    """Random switches and config files: a run, or exit code 2 and one line. Nothing else."""
    defaults = dict(re.findall(r'^([a-z]\w*) += (.*?) +#', (ROOT / 'config/default.py').read_text(), re.M))
    for name in ('method', 'out_dir', 'device', 'compile', 'rounds', 'dataset', 'init_from', 'resume'):
        del defaults[name]
    n, ran, refused_, other = 1000 if LONG else 60, 0, 0, []
    monkeypatch.chdir(tmp_path)
    for i in range(n):
        args = fuzzed(random.Random(i), defaults, tmp_path, i)
        try:
            train(*args, '--rounds=1', '--local_steps=1', '--overwrite')
            ran += 1
        except SystemExit as end:
            err = [
                line
                for line in capsys.readouterr().err.splitlines()
                if ': warning: ' not in line and 'is refused (' not in line
            ]
            stopped = isinstance(end.code, str) and 'lower --' in end.code  # it ran, and diverged
            ran, refused_ = ran + stopped, refused_ + (end.code == 2 and len(err) == 1)
            if not stopped and not (end.code == 2 and len(err) == 1):
                other.append((args, end.code, err))
        except Exception as error:
            other.append((args, type(error).__name__, str(error)[:200]))
        capsys.readouterr()
    assert not other, other[:5]
    figure(
        'R14',
        f'{ran + refused_}/{n} fuzzed command lines run ({ran}) or are refused in one line ({refused_})',
        ran + refused_ == n,
    )


def broken_data(folder: Path) -> dict:
    """{what is wrong: a function that makes it so}."""

    def meta(change):
        found = json.loads((folder / 'meta.json').read_text())
        change(found)
        (folder / 'meta.json').write_text(json.dumps(found))

    train_bin, valid_bin = folder / 'user1_train.bin', folder / 'user1_valid.bin'
    user = lambda **facts: lambda m: m['users'][1].update(facts)  # noqa: E731
    return {
        'empty': lambda: train_bin.write_bytes(b''),
        'short': lambda: train_bin.write_bytes(train_bin.read_bytes()[:20]),
        'odd': lambda: train_bin.write_bytes(train_bin.read_bytes() + b'x'),
        'missing split': valid_bin.unlink,
        'vocabulary': lambda: valid_bin.write_bytes(np.full(200, 300, '<u2').tobytes()),
        'hash': lambda: valid_bin.write_bytes(valid_bin.read_bytes()[::-1]),
        'no meta': (folder / 'meta.json').unlink,
        'meta is no JSON': lambda: (folder / 'meta.json').write_text('{"users": ['),
        'meta is a list': lambda: (folder / 'meta.json').write_text('[]'),
        'meta is binary': lambda: (folder / 'meta.json').write_bytes(b'\xff\xfe\x00'),
        'no users': lambda: meta(lambda m: m.update(users=[])),
        'users missing': lambda: meta(lambda m: m.pop('users')),
        'dtype': lambda: meta(lambda m: m.update(dtype='O')),
        'no dtype': lambda: meta(lambda m: m.pop('dtype')),
        'vocab_size': lambda: meta(lambda m: m.update(vocab_size='many')),
        'no tokenizer': lambda: meta(lambda m: m.pop('tokenizer')),
        'tokens': lambda: meta(user(tokens={'train': 500})),
        'token count': lambda: meta(user(tokens={'train': '500', 'valid': 200, 'test': 150})),
        'no hash': lambda: meta(user(sha256={})),
        'name': lambda: meta(user(name=7)),
        'user is null': lambda: meta(lambda m: m['users'].append(None)),
        'overlap': lambda: meta(lambda m: m.update(overlap=[0.0])),
        'overlap is no number': lambda: meta(lambda m: m.update(overlap=['much'] * 3)),
        'a folder': lambda: (train_bin.unlink(), train_bin.mkdir()),
    }


def test_R15_broken_data(train, tmp_path, capsys, figure):
    caught = 0
    for i, what in enumerate(kinds := [*broken_data(tmp_path)]):
        folder = write_dataset(tmp_path / f'bad{i}', [user_streams(j, n) for j, n in enumerate((300, 500, 900))])
        broken_data(folder)[what]()
        err = refused(capsys, train, f'--dataset={folder}')
        caught += str(folder) in err or 'user' in err
        assert not (tmp_path / 'run').exists(), what
    streams = [user_streams(j, n) for j, n in enumerate((300, 500, 900))]
    streams[1]['valid'] = np.concatenate([streams[1]['train'][100:228], streams[1]['valid']])[:256]  # two of four windows of 64
    folder = write_dataset(tmp_path / 'overlap', streams)
    train(f'--dataset={folder}', '--rounds=0')
    assert 'warning: a part of the validation text, 50% of its windows' in capsys.readouterr().err
    figure(
        'R15',
        f'{caught}/{len(kinds)} kinds of broken data refused in one line; overlap of train and valid is told',
        caught == len(kinds),
    )


def test_R16_resume_with_something_changed(train, tiny, tmp_path, capsys, figure):
    first = train()
    before = {file: file.read_bytes() for file in first.out.rglob('*') if file.is_file()}
    fewer = write_dataset(tmp_path / 'two users', [user_streams(i, n) for i, n in enumerate((300, 500))])
    torch.manual_seed(1)
    base = tmp_path / 'base.safetensors'
    shutil.copy(tiny.base, base)
    raw = bytearray(base.read_bytes())
    raw[-1] ^= 1
    base.write_bytes(raw)
    changes = {
        '--lora_rank=4': 'lora_rank',
        '--method=fedavg': 'method',
        '--n_experts=2,2,3': 'n_experts',
        '--seed=1': 'seed',
        f'--dataset={fewer}': 'data',
        f'--init_from={base}': 'base',
        '--aggregate=median': 'aggregate',
        '--target=mixture': 'target',
        '--expert_lr=1e-3': 'expert_lr',
        '--clip_norm=2': 'clip_norm',
    }
    caught = 0
    for change, key in changes.items():
        named = re.search('made with another (.*?);', refused(capsys, train, '--resume', change))[1].split(', ')
        caught += key in named
    assert before == {file: file.read_bytes() for file in first.out.rglob('*') if file.is_file()}
    figure('R16', f'{caught}/{len(changes)} changes refused on --resume, the keys named', caught == len(changes))


def test_a_run_whose_json_is_not_what_it_was_is_not_resumed(train, capsys):
    out = train('--rounds=1').out
    metrics = (out / 'metrics.jsonl').read_bytes()
    first = metrics.index(b'\n')
    for line in (b'[]', b'5', b'{"kind": "eval"}', b'{"ki', b'null'):
        (out / 'metrics.jsonl').write_bytes(line.ljust(first) + metrics[first:])
        assert f'{out}/metrics.jsonl' in refused(capsys, train, '--rounds=1', '--resume')
    (out / 'metrics.jsonl').write_bytes(metrics)
    (out / 'config.json').write_text('[]')
    assert f'{out}/config.json cannot be read' in refused(capsys, train, '--rounds=1', '--resume')


# ---- R17, R18: the machine --------------------------------------------------------------------------------------------
def test_R17_disk_full_and_read_only(whole, tmp_path, figure):
    """A file-size limit stands for a full disk: one line, and what was there loads; with room again, the same bits."""
    long = [*whole.args, '--rounds=2', '--local_steps=100']  # its metrics outgrow its other files
    assert several_runs([[*long, f'--out_dir={tmp_path}/long']])[0].status == 0
    size = {name: sum(map(len, found[1].values())) for name, found in whole.leaves.items() if name != 'metrics'}
    last = max(name for name in size if name.startswith('user'))
    biggest = max(file.stat().st_size for file in (tmp_path / 'long' / 'checkpoint').iterdir())
    assert (tmp_path / 'long' / 'metrics.jsonl').stat().st_size > biggest + 10_000
    limited = [(whole.args, size[last] - 1000, 'user'), (long, biggest + 1000, 'metrics.jsonl')]
    outs = [tmp_path / str(i) for i in range(2)]
    jobs = [[*args, f'--out_dir={out}'] for (args, *_), out in zip(limited, outs)]
    ends = several_runs(jobs, [{'limit': limit} for _, limit, _ in limited])
    print(ends)  # shown if the test fails
    told = sum(
        end.status == 1 and end.err.strip().count('\n') == 0 and 'cannot write' in end.err and file in end.err
        for end, (*_, file) in zip(ends, limited)
    )
    loads = sum(bool(checkpoint.check(out / 'checkpoint', checkpoint.rounds(out / 'checkpoint')[-1])) for out in outs)
    again = several_runs([go_on(args, out) for (args, *_), out in zip(limited, outs)])
    wanted = whole.leaves, state(tmp_path / 'long')
    good = sum(end.status == 0 and state(out) == leaves for end, out, leaves in zip(again, outs, wanted))
    locked = tmp_path / 'locked'
    locked.mkdir()
    locked.chmod(0o555)
    locked = locked if os.getuid() else Path('/sys')  # where even root can make no folder
    (end,) = several_runs([[*whole.args, f'--out_dir={locked}/run']])
    read_only = end.status == 2 and end.err.count('\n') == 1 and 'cannot write to --out_dir' in end.err
    reached = f'{told}/2 full disks end in one line, {loads}/2 still load, {good}/2 go on to the same bits; '
    reached += f'read-only refused: {read_only}'
    figure('R17', reached, told == loads == good == 2 and read_only)


@pytest.mark.parametrize('where, error', [('open', errno.EACCES), ('fsync', errno.EINVAL), ('fsync', errno.ENOTSUP)])
def test_a_system_that_syncs_no_folder(tmp_path, monkeypatch, where, error):
    """Windows opens none, some network mounts refuse: the file is there all the same."""
    real = {'open': os.open, 'fsync': os.fsync}[where]

    def refuses(what, *args):
        if Path(what) == tmp_path if where == 'open' else os.path.isdir(f'/proc/self/fd/{what}'):
            raise OSError(error, os.strerror(error))
        return real(what, *args)

    monkeypatch.setattr(os, where, refuses)
    checkpoint.write_atomically(tmp_path / 'x', lambda file: file.write_text('x'))
    assert [file.name for file in tmp_path.iterdir()] == ['x'] and (tmp_path / 'x').read_text() == 'x'


def test_a_system_without_resource_and_fcntl():
    """Everything imports, and --help answers."""
    code = """if True:
        import sys
        sys.modules |= {'resource': None, 'fcntl': None}
        import train, eval
        from run import report
        from tools import bench, reproduce
        assert report.peak_memory() is report.checkpoint.fcntl is None
        train.main(['--help'])
    """
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and 'router_every = 30' in done.stdout, done.stderr


@pytest.mark.parametrize('rounds', [40, slow(300 if LONG else 100)])
def test_R18_soak(tiny, tmp_path, figure, rounds):
    """Memory, open files and threads of many rounds: the last quarter against the one before it."""
    job = [*given(tiny, tmp_path / 'soak', *RUNS['fedavg']), f'--rounds={rounds}', '--eval_every=10']
    (end,) = several_runs([job], [{'samples': str(tmp_path / f'soak/checkpoint/round-{rounds}.safetensors')}])
    assert end.status == 0, end.err
    samples = end.samples
    usual = statistics.mode(files for _, files, _ in samples)  # with metrics.jsonl open: neither before the rounds nor after
    samples = [own for own in samples if own[1] >= usual]
    memory, files, threads = zip(*samples[len(samples) // 2 :])
    growth = max(memory[len(memory) // 2 :]) / max(memory[: len(memory) // 2]) - 1
    reached = f'{rounds} rounds: resident memory {growth:+.2%}, open files {sorted(set(files))}, threads {sorted(set(threads))}'
    figure('R18', reached, growth < 0.01 and len(set(threads)) == 1 and max(files) - min(files) <= 2)
