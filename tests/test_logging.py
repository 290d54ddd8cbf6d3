"""What a run shows: curves for TensorBoard and W&B out of the lines of metrics.jsonl, lines for a log file, and silence."""

import os
import pty
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from tqdm import tqdm


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
            for layer, (generalist, _) in enumerate(line.get('scores', ())):
                name = f'{what}_generalist_share/user{line["user"]}_layer{layer}'
                curves.setdefault(name, []).append((line['step'], generalist))
    return curves


def assert_the_same(curves: dict, lines: list[dict], number=lambda value: value) -> None:
    expected = {name: [(step, number(v)) for step, v in found] for name, found in points(lines).items()}
    assert {'train_ppl/user0', 'router_loss/user1', 'local_test_ppl/user2', 'comm_bytes_up/user0'} <= set(expected)
    assert {'local_test_generalist_share/user0_layer1', 'aggregated_test_ppl/user0', 'final_valid_ppl/user0'} <= set(expected)
    assert curves == expected


def crash(monkeypatch, after: int) -> None:
    """The next run dies at its batch number `after`."""
    import data.stream

    batches, get_batch = [], data.stream.get_batch

    def dies(*args):
        batches.append(args)
        if len(batches) == after:
            raise KeyboardInterrupt
        return get_batch(*args)

    monkeypatch.setattr(data.stream, 'get_batch', dies)


def test_tensorboard_has_what_the_metrics_file_has(train, tmp_path, monkeypatch):
    """Read back with TensorBoard's own reader; float32 there. One that was open all the while sees no step twice after a
    crash in the middle of a round and --resume."""
    pytest.importorskip('tensorboard', reason='TensorBoard is an extra: pip install -r requirements-log.txt')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(reader):
        reader.Reload()
        return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()['scalars']}

    folder = tmp_path / 'run' / 'tensorboard'
    with monkeypatch.context() as during:
        crash(during, after=22)  # 12 batches a round: 2 expert and 2 router steps of 3 users
        with pytest.raises(KeyboardInterrupt):
            train('--tensorboard')
    was_open = EventAccumulator(str(folder), size_guidance={'scalars': 0})
    read(was_open)
    run = train('--tensorboard', '--resume')
    afresh = EventAccumulator(str(folder), size_guidance={'scalars': 0})
    assert_the_same(read(afresh), run.lines, np.float32)
    assert_the_same(read(was_open), run.lines, np.float32)
    train('--overwrite')
    assert not list(folder.iterdir())  # curves of a run that is gone would mislead


@pytest.fixture
def wandb(monkeypatch):
    """A module wandb that remembers its runs as W&B's server would: by id, and a step is never taken twice."""
    runs, calls = {}, []

    def init(**given):
        calls.append(given)
        history = runs.setdefault(given['id'], {}) if given['resume'] else runs.update({given['id']: {}}) or runs[given['id']]

        def log(values, step):
            assert step not in history
            history[step] = values

        return SimpleNamespace(
            step=max(history, default=-1) + 1, log=log, define_metric=lambda *a, **k: calls.append((a, k)), summary={},
            finish=lambda: calls.append('finish'),
        )  # fmt: skip

    fake = SimpleNamespace(init=init, Error=type('Error', (Exception,), {}), runs=runs, calls=calls)
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    return fake


def test_wandb_gets_what_the_metrics_file_has(train, wandb, tmp_path, monkeypatch):
    """One run for one folder, continued after a crash and sent no line twice; --overwrite begins it anew."""
    with monkeypatch.context() as during:
        crash(during, after=22)
        with pytest.raises(KeyboardInterrupt):
            train('--wandb')
    run = train('--wandb', '--resume')
    again = train('--wandb', '--overwrite')
    first, x_axis, second, _, end, third, *_ = wandb.calls
    assert (first['resume'], second['resume'], third['resume']) == (None, 'allow', None) and len(wandb.runs) == 1
    assert first['config'] == run.config | {'wandb': True, 'resume': False} and first['dir'] == tmp_path / 'run'
    assert x_axis == (('*',), {'step_metric': 'user_step'}) and end == 'finish'
    assert run.drawn.run.summary['mean_test_ppl'] == run.summary['mean_test_ppl']
    curves = {}
    for _, values in sorted(wandb.runs[first['id']].items()):
        step = values.pop('user_step')
        for name, value in values.items():
            curves.setdefault(name, []).append((step, value))
    assert_the_same(curves, again.lines)
    other = train('--wandb', out='other')
    assert len(wandb.runs) == 2 and other.lines == run.lines == again.lines


def test_what_is_shown_changes_no_number(train, wandb, tmp_path):
    """Nor whether a run may be continued: it is not part of what --resume compares."""
    plain = train(out='plain')
    shown = train('--wandb', '--quiet', out='shown')
    files = [(tmp_path / out / 'metrics.jsonl').read_bytes() for out in ('plain', 'shown')]
    assert files[0] == files[1] and plain.identity == shown.identity
    train('--quiet', '--resume', out='plain')


@pytest.mark.parametrize('package', ['tensorboard', 'wandb'])
def test_a_missing_package_is_said_first(train, package, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if package in name.split('.')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    with pytest.raises(SystemExit) as end:
        train(f'--{package}')
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count('\n') == 1 and package in err and 'pip install -r requirements-log.txt' in err
    assert not (tmp_path / 'run').exists()


def test_a_wandb_that_does_not_start(train, wandb, tmp_path, capsys):
    def init(**given):
        raise wandb.Error('no API key')

    wandb.init = init
    with pytest.raises(SystemExit) as end:
        train('--wandb')
    assert end.value.code == 2 and capsys.readouterr().err.startswith('train.py: --wandb: no API key; WANDB_MODE=offline')
    train()  # no run is there that would have to be overwritten


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
    """On a clock whose minutes take 20 ms: lines within the round, a minute or more apart."""
    began, real, said = time.time(), time.time, []
    monkeypatch.setattr(time, 'time', lambda: began + 3000 * (real() - began))
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
    assert 'must not be negative' in capsys.readouterr().err  # errors are not hidden


def test_a_terminal_has_a_bar(tiny, tmp_path):
    """stderr is a terminal here: a bar with the time left and perplexity, no lines that stand for it; none with --quiet."""
    args = ['--rounds=2', '--local_steps=2', '--batch_size=2', '--block_size=16', '--eval_every=1', '--device=cpu']
    args += [f'--init_from={tiny.base}', f'--dataset={tiny.data}', f'--out_dir={tmp_path}/run', '--overwrite']
    for quiet in (False, True):
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(ours, (40, 150))
        command = [sys.executable, 'train.py', *args, f'--quiet={quiet}']
        done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=theirs)
        os.close(theirs)
        shown = b''
        try:
            while more := os.read(ours, 1 << 16):
                shown += more
        except OSError:  # all is read
            pass
        os.close(ours)
        assert done.returncode == 0 and 'left' not in done.stdout
        assert ('step/s' in shown.decode() and 'test ppl=' in shown.decode()) if not quiet else not shown
