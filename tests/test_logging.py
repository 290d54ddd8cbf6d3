"""What a run shows: curves for TensorBoard and W&B out of the lines of metrics.jsonl, lines for a log file, and silence."""

import itertools
import json
import os
import pty
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, refused
from tqdm import tqdm

import user
from tools import curves


# ---- tools/curves.py -------------------------------------------------------------------------------------------------
def points(lines: list[dict]) -> dict[str, list[tuple]]:
    """{curve: [(step of the user or its router, value)]} that these lines of metrics.jsonl mean, spelled out kind by kind."""
    curves = {}

    def point(name, line, value):
        curves.setdefault(f'{name}/user{line["user"]}', []).append(
            (line['router_step' if line['kind'] == 'router' else 'step'], value)
        )

    for line in lines:
        if line['kind'] in ('train', 'router'):
            for key in ('loss', 'ppl', 'lb', 'lr'):
                point(f'{line["kind"]}_{key}', line, line[key])
        elif line['kind'] == 'comm':
            point('comm_bytes_up', line, line['bytes_up'])
            point('comm_bytes_down', line, line['bytes_down'])
        elif line['kind'] == 'eval':
            what = f'{line["when"]}_{line["split"]}'
            point(f'{what}_loss', line, line['loss'])
            point(f'{what}_ppl', line, line['ppl'])
            for layer, (generalist, *_) in enumerate(line.get('scores', ())):
                name = f'{what}_generalist_share/user{line["user"]}_layer{layer}'
                curves.setdefault(name, []).append((line['step'], generalist))
    return curves


def assert_the_same(curves: dict, lines: list[dict], number=lambda value: value) -> None:
    expected = {name: [(step, number(v)) for step, v in found] for name, found in points(lines).items()}
    assert {'train_ppl/user0', 'router_loss/user1', 'local_test_ppl/user2', 'comm_bytes_up/user0'} <= set(expected)
    assert {'local_test_generalist_share/user0_layer1', 'aggregated_test_ppl/user0', 'final_valid_ppl/user0'} <= set(expected)
    assert curves == expected


def draw(run: Path, *args: str) -> None:
    curves.main([str(run), *args])


@pytest.fixture
def boards(monkeypatch) -> list:
    """Every SummaryWriter that is made, with .points {curve: [(step, value)]} and .closed, in place of TensorBoard's."""
    made = []

    class Writer:
        def __init__(self, folder, purge_step, flush_secs):
            assert purge_step == 0 and folder.name == 'tensorboard'
            self.points, self.closed = {}, False
            made.append(self)

        def add_scalar(self, name, value, step):
            self.points.setdefault(name, []).append((step, value))

        def close(self):
            self.closed = True

    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', SimpleNamespace(SummaryWriter=Writer))
    return made


@pytest.fixture
def wandb(monkeypatch):
    """A module wandb that remembers its runs as W&B's server would: by id, and a step is never taken twice."""
    runs, calls = {}, []

    def init(**given):
        calls.append(given)
        history = runs[given['id']] = {}

        def log(values, step):
            assert step not in history
            history[step] = values

        return SimpleNamespace(
            log=log, define_metric=lambda *a, **k: calls.append((a, k)), summary={}, finish=lambda: calls.append('finish')
        )

    fake = SimpleNamespace(init=init, Error=type('Error', (Exception,), {}), runs=runs, calls=calls)
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    return fake


def test_curves_are_what_the_metrics_file_says(train, boards):
    """Of a finished run, and of one that has done a part; drawing changes nothing of it."""
    run = train()
    before = {file: file.read_bytes() for file in run.out.rglob('*') if file.is_file()}
    draw(run.out)
    assert_the_same(boards[0].points, run.lines)
    (run.out / 'summary.json').unlink()
    draw(run.out, '--tensorboard')
    assert boards[1].points == boards[0].points and boards[1].closed
    assert all(file.read_bytes() == raw for file, raw in before.items() if file.exists())


def test_curves_follow_a_run(finished, boards, wandb, tmp_path, monkeypatch):
    """Line by line as they come, half a line not before its end; begun anew where a resumed run has cut off an unfinished
    round; until the run has finished."""
    run, path = shutil.copytree(finished.out, tmp_path / 'run'), tmp_path / 'run' / 'metrics.jsonl'
    summary, raw = (run / 'summary.json').read_bytes(), path.read_bytes().splitlines(keepends=True)
    (run / 'summary.json').unlink()
    path.write_bytes(b''.join(raw[:20]) + raw[20][:9])
    states = [raw[:21], raw[:30], raw[:24], raw[:40], raw]  # what the file holds at the next looks
    drawn = []

    def sleep(seconds):
        drawn.append((len(boards), boards[-1].points == points(seen)))
        now = states.pop(0)
        seen[:] = map(json.loads, now)
        path.write_bytes(b''.join(now))
        if not states:
            (run / 'summary.json').write_bytes(summary)

    seen = [*map(json.loads, raw[:20])]
    monkeypatch.setattr(curves.time, 'sleep', sleep)
    draw(run, '--follow', '--tensorboard', '--wandb')
    assert drawn == [(1, True), (1, True), (1, True), (2, True), (2, True)]
    assert boards[1].points == points(finished.lines) and all(board.closed for board in boards)
    assert len(wandb.runs) == 1 and wandb.calls.count('finish') == 2
    assert [*wandb.runs.values()][0].keys() == {i for i, line in enumerate(finished.lines) if 'step' in line}


def test_ctrl_c_keeps_what_is_drawn(finished, boards, tmp_path, monkeypatch):
    run = shutil.copytree(finished.out, tmp_path / 'run')
    (run / 'summary.json').unlink()

    def sleep(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(curves.time, 'sleep', sleep)
    draw(run, '--follow')
    assert boards[0].closed and boards[0].points == points(finished.lines)


def test_tensorboard_sees_no_step_twice(train, tmp_path, monkeypatch):
    """Read back with TensorBoard's own reader; float32 there. One that was open all the while sees no step twice after a
    crash in the middle of a round and --resume."""
    pytest.importorskip('tensorboard', reason='TensorBoard is an extra: pip install -r requirements-log.txt')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(reader):
        reader.Reload()
        return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()['scalars']}

    batches, get_batch = [], user.get_batch

    def dies(*args):
        batches.append(args)
        if len(batches) == 22:  # 12 batches a round: 2 expert and 2 router steps of 3 users
            raise KeyboardInterrupt
        return get_batch(*args)

    folder = tmp_path / 'run' / 'tensorboard'
    with monkeypatch.context() as during:
        during.setattr(user, 'get_batch', dies)
        with pytest.raises(KeyboardInterrupt):
            train()
    draw(tmp_path / 'run')
    was_open = EventAccumulator(str(folder), size_guidance={'scalars': 0})
    read(was_open)
    run = train('--resume')
    draw(run.out)
    afresh = EventAccumulator(str(folder), size_guidance={'scalars': 0})
    assert_the_same(read(afresh), run.lines, np.float32)
    assert_the_same(read(was_open), run.lines, np.float32)
    train('--overwrite')
    assert not list(folder.iterdir())  # curves of a run that is gone would mislead


def test_wandb_gets_what_the_metrics_file_has(train, wandb, tmp_path):
    """One run for one folder, sent no line twice, and begun anew when it is drawn again."""
    run = train()
    draw(run.out, '--wandb')
    draw(run.out, '--wandb')
    first, x_axis, end, second, *_ = wandb.calls
    assert first == second and len(wandb.runs) == 1 and end == 'finish'
    assert first['config'] == json.loads((run.out / 'config.json').read_text())
    assert (first['dir'], first['name'], first['project']) == (run.out, str(run.out), 'nanocomigs') and 'resume' not in first
    assert x_axis == (('*',), {'step_metric': 'user_step'})
    found = {}
    for _, values in sorted(wandb.runs[first['id']].items()):
        step = values.pop('user_step')
        for name, value in values.items():
            found.setdefault(name, []).append((step, value))
    assert_the_same(found, run.lines)
    draw(shutil.copytree(run.out, tmp_path / 'other'), '--wandb')
    assert len(wandb.runs) == 2


def test_wandb_gets_the_result(finished, wandb, tmp_path, monkeypatch):
    made, init = [], wandb.init
    monkeypatch.setattr(wandb, 'init', lambda **given: made.append(init(**given)) or made[0])
    draw(shutil.copytree(finished.out, tmp_path / 'run'), '--wandb')
    assert made[0].summary['mean_test_ppl'] == finished.summary['mean_test_ppl'] and made[0].summary['method'] == 'comigs_1gxs'


@pytest.mark.parametrize('package', ['tensorboard', 'wandb'])
def test_a_missing_package_is_said_first(finished, package, capsys, monkeypatch):
    for name in [name for name in sys.modules if package in name.split('.')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    err = refused(capsys, draw, finished.out, f'--{package}')
    assert package in err and 'pip install -r requirements-log.txt' in err and not (finished.out / package).exists()


def test_what_cannot_be_drawn_is_one_line(finished, wandb, tmp_path, capsys):
    def init(**given):
        raise wandb.Error('no API key')

    wandb.init = init
    assert '--wandb: no API key; WANDB_MODE=offline' in refused(capsys, draw, finished.out, '--wandb')
    assert 'is no run: it has no config.json' in refused(capsys, draw, tmp_path, '--wandb')
    wandb.init = lambda **given: SimpleNamespace(define_metric=print, finish=print)
    good = (finished.out / 'config.json').read_text()
    for config, line, file in (
        ('{', '', 'config.json'),
        ('[]', '', 'config.json'),
        (good, '5', 'metrics.jsonl'),
        (good, '[]', 'metrics.jsonl'),
        (good, '{"kind": "ev', 'metrics.jsonl'),
        (good, '{"kind": "eval", "step": 1}', 'metrics.jsonl'),
        (good, '{"kind": "eval", "step": 1, "user": 0, "when": "local", "split": "test", "scores": [3]}', 'metrics.jsonl'),
    ):
        (tmp_path / 'config.json').write_text(config)
        (tmp_path / 'metrics.jsonl').write_text(f'{line}\n')
        assert f'{tmp_path}/{file}' in refused(capsys, draw, tmp_path, '--wandb')


# ---- train.py --------------------------------------------------------------------------------------------------------
def test_what_is_shown_changes_no_number(train, tmp_path):
    """Nor whether a run may be continued: it is not part of what --resume compares."""
    plain, quiet = train(out='plain'), train('--quiet', out='quiet')
    files = [(tmp_path / out / 'metrics.jsonl').read_bytes() for out in ('plain', 'quiet')]
    assert files[0] == files[1] and plain.journal.identity == quiet.journal.identity
    train('--quiet', '--resume', out='plain')


def test_a_log_file_has_a_line_for_every_round(train, capsys):
    """In place of a bar, with the mean training loss of the round; the evaluations as they come."""
    run = train()
    out, err = capsys.readouterr()
    for t in range(3):
        loss = np.mean([line['loss'] for line in run.lines if line['kind'] == 'train' and line['round'] == t + 1])
        assert out.count(f'round   {t + 1}/3  3/3 users  train loss {loss:.3f}  00:0') == 1
    assert out.count('  test perplexity user 0 ') == 2 and '\r' not in out + err and not err
    assert out.index('round   3/3') < out.index('pretrained  comigs_1g1s')


def test_a_log_file_can_be_followed(tiny, tmp_path):
    """A line is in the file when its round has ended: not kept back until there are 8 kB of them, and no bar between them."""
    args = ['--rounds=100000', '--local_steps=1', '--batch_size=2', '--block_size=16', '--device=cpu', f'--dataset={tiny.data}']
    args += [f'--init_from={tiny.base}', f'--out_dir={tmp_path}/run']
    file, deadline = tmp_path / 'log.txt', time.time() + 120
    with open(file, 'w') as log:
        env = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
        run = subprocess.Popen([sys.executable, 'train.py', *args], cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        while 'left' not in (said := file.read_text()) and run.poll() is None and time.time() < deadline:
            time.sleep(0.05)
    finally:
        run.terminate()
        run.wait()
    assert len(said) < 4096 and '/100000  3/3 users  train loss ' in said and '\r' not in said


def test_a_log_file_has_a_line_a_minute(train, monkeypatch):
    """On a clock that goes on by 7 s whenever one looks at it: lines within the round, a minute or more apart."""
    clock, said = itertools.count(0, 7), []
    monkeypatch.setattr(time, 'time', lambda: next(clock))
    monkeypatch.setattr(tqdm, 'write', lambda text: said.append((time.time(), text)))
    train('--rounds=1', '--local_steps=20')
    at, lines = zip(*[(at, text) for at, text in said if text.endswith(' left')])
    assert len(lines) > 2 and lines[0].startswith('round   1/1  0/3 users  train loss ') and '3/3 users' in lines[-1]
    assert min(np.diff(at[:-1])) > 60  # the last one comes when the round has ended


def test_quiet_leaves_the_table(train, capsys):
    train('--quiet')
    out, err = capsys.readouterr()
    assert not err and out.startswith('test perplexity  pretrained') and len(out.splitlines()) == 6  # 3 users, their mean
    with pytest.raises(SystemExit):
        train('--quiet', '--rounds=-1', out='other')
    assert '--rounds=-1' in capsys.readouterr().err  # errors are not hidden


@pytest.mark.parametrize('quiet', [False, True])
def test_a_terminal_has_a_bar(train, monkeypatch, capsys, quiet):
    """stderr is a terminal here: a bar with the time left and perplexity, no lines that stand for it; none with --quiet."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (40, 150))
    with open(theirs, 'w') as terminal, monkeypatch.context() as during:
        during.setattr(sys, 'stderr', terminal)
        train('--rounds=2', '--eval_every=1', f'--quiet={quiet}')
    shown = b''
    try:
        while more := os.read(ours, 1 << 16):
            shown += more
    except OSError:  # all is read
        pass
    os.close(ours)
    assert 'left' not in capsys.readouterr().out
    assert ('step/s' in shown.decode() and 'test ppl=' in shown.decode()) if not quiet else not shown
