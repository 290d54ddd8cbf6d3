"""eval.py: a run's folder back into models, and the tables: perplexity, routing shares, the generalist alone, several runs."""

import errno
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused, same, trainer
from safetensors.torch import load_file

import configurator
import eval as eval_file
from model import GPT, evaluate, save_gpt
from tools import routing


@pytest.fixture(scope='module')
def mixed(tiny, tmp_path_factory):
    """A run whose target is everybody's text, in which one user of three takes part."""
    train = trainer(tiny, tmp_path_factory.mktemp('mixed'))
    return train('--method=fedavg', '--target=mixture', '--participation=0.3', '--rounds=1')


@pytest.fixture
def copy(finished, tmp_path):
    """The folder of the finished run, to be spoilt."""
    return shutil.copytree(finished.out, tmp_path / 'copy')


def report(run: Path, *args: str) -> dict:
    eval_file.main([str(run), *args])
    return json.loads((run / 'eval.json').read_text())


def change(run: Path, **switches: object) -> None:
    config = json.loads((run / 'config.json').read_text())
    (run / 'config.json').write_text(json.dumps(config | switches))


# ---- one run ---------------------------------------------------------------------------------------------------------
def test_report_of_a_finished_run(finished, capsys):
    before = {file: file.read_bytes() for file in finished.out.rglob('*') if file.is_file() and file.name != 'eval.json'}
    said = report(finished.out)
    assert [u['test_ppl'] for u in said['users']] == pytest.approx(finished.summary['test_ppl'], rel=1e-6)
    assert [u['valid_ppl'] for u in said['users']] == pytest.approx(finished.summary['valid_ppl'], rel=1e-6)
    assert said['mean_test_ppl'] == pytest.approx(finished.summary['mean_test_ppl'], rel=1e-6)
    assert said['users'][1]['scores'] is None and len(said['users'][0]['scores'][0]) == 3
    # the generalist alone is one model for all: the server's tensors, no specialist, no router
    one = finished.users[1]  # has a generalist only, and holds the server's tensors now
    assert said['users'][1]['generalist_test_ppl'] == pytest.approx(finished.summary['aggregated_test_ppl'][1], rel=1e-6)
    alone = evaluate(one.model, finished.users[0].data['test'], 16)['ppl']
    assert said['users'][0]['generalist_test_ppl'] == pytest.approx(alone, rel=1e-6)
    shown = capsys.readouterr().out
    assert 'generalist alone' in shown and 'mean softmax score' in shown and 'top-1' in shown
    assert all(file.read_bytes() == content for file, content in before.items())  # nothing of the run is changed


def test_report_of_a_running_run_and_of_another_target(finished, copy):
    """A run without summary.json is read from its checkpoint."""
    (copy / 'summary.json').unlink()
    said = report(copy)
    assert [u['test_ppl'] for u in said['users']] == pytest.approx(finished.summary['test_ppl'], rel=1e-6)
    said = report(copy, '--target=mixture')
    assert said['target'] == 'mixture' and said['mean_test_ppl'] != pytest.approx(finished.summary['mean_test_ppl'], rel=1e-6)


def test_a_run_is_read_as_it_was_written(finished, copy):
    """The configuration has an entry for each user; adapters/ and the checkpoint have the same tensors; ids choose."""
    c, users, server = eval_file.read_run(copy)
    assert (c.n_experts, c.lora_rank, c.tested) == ([3, 1, 2], [8, 8, 8], [0, 1, 2]) and c.method == 'comigs_1gxs'
    assert all(same(own, load_file(copy / f'adapters/user{i}.safetensors')) for i, own in enumerate(users))
    assert same(server, finished.server)
    (copy / 'summary.json').unlink()
    _, (last,), server = eval_file.read_run(copy, [2])
    assert same(last, users[2]) and same(server, finished.server)


def test_who_has_not_taken_part_yet_has_the_generalist(mixed, tmp_path):
    """Or the base, if there is none; no tensors of its own."""
    run = shutil.copytree(mixed.out, tmp_path / 'running')
    (run / 'summary.json').unlink()
    (present,) = mixed.fleet.last_round
    users = eval_file.read_run(run)[1]
    assert [bool(own) for own in users] == [i == present for i in range(3)]
    opened = eval_file.open_run(run)
    assert [model is opened.generalist for model in opened.models] == [i != present for i in range(3)]
    change(run, aggregate='trust')  # a rule without a model for everybody
    opened = eval_file.open_run(run)
    assert [model is opened.base for model in opened.models] == [i != present for i in range(3)] and not opened.generalist
    change(run, init_adapter='folder')
    with pytest.raises(ValueError, match='still wait with its --init_adapter'):
        eval_file.open_run(run)


def test_an_opened_run(finished, copy):
    opened = eval_file.open_run(finished.out)
    assert opened.names == ['user 0', 'user 1', 'user 2'] and opened.ids == [0, 1, 2] and opened.path == finished.out
    assert not any(p.requires_grad for model in (*opened.models, opened.generalist) for p in model.parameters())
    assert opened.generalist.h[0].mlp.router is None and len(opened.generalist.h[0].mlp.specialists) == 0
    assert eval_file.open_run(copy, beside=opened).base is opened.base  # one base for a table of several
    assert opened.base.wte.weight.dtype == torch.float32
    change(copy, dtype='bfloat16')  # as training has it
    assert eval_file.open_run(copy, beside=opened).base.wte.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    'names, who, expected',
    [
        (['python', 'prose'], 'prose', 1),
        (['python', 'prose'], '1', 1),
        (['python', 'prose'], '#1', 1),
        (['1', '2', '3'], '1', 0),  # the name comes first
        (['1', '2', '3'], '#1', 1),
        (['1', '2', '3'], '3', 2),
        (['1', '2', '3'], '0', 0),  # nobody's name
        (['#1', '#0', '#x'], '#1', 1),  # a number, whatever the names are
        (['#1', '#0', '#x'], '#x', 2),
        (['base', 'a,b'], 'base', 'base'),  # a word, not a user
        (['base', 'a,b'], '#0', 0),
        (['base', 'a,b'], 'a,b', 1),
        (['a', 'a', '3'], 'a', None),  # two of them
        (['a', 'a', '3'], '#0', 0),
        (['1', '1', '3'], '1', None),
        *((['1', '', '3'], who, None) for who in (None, '4', '-1', '#', '#3', '#01', '01', ' 1', '1,3', '\u0661', 'None')),
        (['1', '', '3'], '', 1),
    ],
)
def test_whom_a_user_option_means(names, who, expected):
    users = dict(enumerate(names))
    if expected is None:
        with pytest.raises(ValueError) as error:
            eval_file.who_is(who, users, 'base')
        known = ', '.join(f'{i} ({name})' for i, name in users.items())
        assert str(error.value) == f'--user={who}: expected one of base, {known}'
    else:
        assert eval_file.who_is(who, users, 'base') == expected
        assert eval_file.who_is(who, {str(i): name for i, name in users.items()}, 'base') == str(expected)


# ---- several runs ----------------------------------------------------------------------------------------------------
def test_table_of_several_runs(train, mixed, capsys, tmp_path):
    """A row per target and user; what a run measured itself is taken from it, the rest is evaluated."""
    a, b = train('--method=local', '--rounds=1').out, shutil.copytree(mixed.out, tmp_path / 'b')
    said = report(a)  # nothing shared has no generalist, nor a router
    assert said['mean_generalist_test_ppl'] is None and said['users'][0]['scores'] is None

    def rows():
        capsys.readouterr()
        eval_file.main([str(a), str(b), '--target=own,mixture'])
        head, _, *lines = [line.split('  ') for line in capsys.readouterr().out.splitlines()]
        assert [name.strip() for name in head if name] == ['test perplexity', 'base model', a.name, b.name]
        return {line[0]: [float(cell) for cell in line[1:] if cell.strip()] for line in lines}

    cells, summary = rows(), [json.loads((run / 'summary.json').read_text()) for run in (a, b)]
    assert len(cells) == 2 * (3 + 1) and all(len(row) == 3 for row in cells.values())
    assert cells['own: mean'][:2] == [round(np.mean(summary[0][k]), 3) for k in ('pretrained_test_ppl', 'test_ppl')]
    assert cells['mixture: mean'][0] == round(np.mean(summary[1]['pretrained_test_ppl']), 3)
    (a / 'summary.json').unlink()  # without it all is evaluated
    again = rows()
    assert [row[1] for row in again.values()] == pytest.approx([row[1] for row in cells.values()], abs=2e-3)
    change(b, block_size=8)
    assert 'other windows' in refused(capsys, eval_file.main, [str(a), str(b)])


# ---- bad input: one line, exit code 2 --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'spoil, args, message',
    [
        (lambda run: (run / 'config.json').unlink(), [], 'no config.json'),
        (lambda run: (run / 'adapters/user1.safetensors').write_bytes(b'x'), [], 'user1.safetensors is damaged'),
        (lambda run: shutil.rmtree(run / 'checkpoint') or (run / 'summary.json').unlink(), [], 'no finished round'),
        (lambda run: (run / 'config.json').write_text('[]'), [], 'config.json cannot be read: it is no JSON object'),
        (lambda run: (run / 'config.json').write_text('{'), [], 'config.json cannot be read'),
        (lambda run: change(run, users=3), [], 'config.json is not that of a run: users is 3'),
        (lambda run: None, ['--target=theirs'], 'expected own or mixture'),
        (lambda run: None, ['--target=own,mixture'], 'only for a table of several runs'),
        (lambda run: None, ['--init_from=nowhere'], 'no base model'),
        (lambda run: None, ['--device=tpu9'], 'cannot use the device tpu9'),
    ],
    ids=['no run', 'damaged', 'no round', 'a list', 'cut', 'users', 'target', 'two targets', 'base', 'device'],
)
def test_bad_input(copy, capsys, spoil, args, message):
    (copy / 'eval.json').unlink(missing_ok=True)
    spoil(copy)
    assert message in refused(capsys, eval_file.main, [str(copy), *args])
    assert not (copy / 'eval.json').exists()


def test_a_summary_that_is_none(finished, copy, capsys):
    for text in ('[]', '{', '{"target": "own"}'):
        (copy / 'summary.json').write_text(text)
        assert f'{copy}/summary.json cannot be read' in refused(capsys, eval_file.main, [str(finished.out), str(copy)])


def test_a_run_that_cannot_be_written_is_told_all_the_same(copy, capsys, monkeypatch):
    """The figures, then one line."""

    def read_only(file, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))

    (copy / 'eval.json').unlink(missing_ok=True)
    monkeypatch.setattr(Path, 'write_text', read_only)
    for main, what in ((eval_file.main, 'eval.json'), (routing.main, 'routing.html')):
        with pytest.raises(SystemExit) as end:
            main([str(copy)])
        out, err = capsys.readouterr()
        assert end.value.code == 2 and 'user 2' in out and 'wrote' not in out
        assert err.count('\n') == 1 and f"Read-only file system: '{copy}/{what}'" in err


def test_what_is_not_finite_is_null(finished, copy, monkeypatch, capsys):
    """A model that diverged on another text: printed as it is, and no word that JSON does not know."""
    result = {'loss': math.nan, 'ppl': math.inf, 'tokens': 3, 'scores': None, 'top1': None}
    monkeypatch.setattr(eval_file, 'evaluate', lambda *_: result)
    said = report(copy)
    assert said['users'][0]['test_ppl'] is said['mean_test_ppl'] is None and 'inf' in capsys.readouterr().out


def test_another_base_is_refused(finished, capsys, tiny, tmp_path):
    torch.manual_seed(9)
    save_gpt(GPT(tiny.model.config), other := tmp_path / 'other.safetensors')
    assert 'not the base' in refused(capsys, eval_file.main, [str(finished.out), f'--init_from={other}'])


def test_a_data_set_of_the_project_from_another_folder(train, tiny, tmp_path, monkeypatch, capsys):
    """Training and evaluation find NAME where data/prepare.py puts it, not below the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(configurator, 'DATA', tiny.data.parent)
    run = train(f'--dataset={tiny.data.name}', '--rounds=1')
    eval_file.main([str(run.out), '--target=mixture'])
    assert 'user 2' in capsys.readouterr().out
