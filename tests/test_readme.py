"""The README's own commands: they run, and the run they describe beats its pretrained base."""

import json
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

COMMANDS = sorted(
    set(
        re.findall(
            r'^python ((?:train|eval|pretrain|reproduce|sample|export|plot|data/prepare)\.py [^#\n]*?)\s*(?:#.*)?$',
            (ROOT / 'README.md').read_text(),
            re.M,
        )
    )
)


def python(*args):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT)


def test_the_demo_by_hand_beats_its_base(tmp_path):
    """prepare, train and eval as the README has them, with a little less text, for 3 of the rounds, into a temporary folder."""
    for command in ('data/prepare.py demo', 'train.py config/demo.py', 'eval.py out/demo'):
        assert command in COMMANDS
    done = python('data/prepare.py', 'demo', f'--out_root={tmp_path}', '--valid_tokens=6000', '--test_tokens=6000')
    assert done.returncode == 0, done.stderr
    run = tmp_path / 'run'
    done = python('train.py', 'config/demo.py', f'--dataset={tmp_path}/demo', f'--out_dir={run}', '--rounds=3')
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / 'summary.json').read_text())
    assert all(ours < base for ours, base in zip(summary['test_ppl'], summary['pretrained_test_ppl']))
    done = python('eval.py', str(run))
    assert done.returncode == 0 and 'generalist alone' in done.stdout, done.stderr
    after = [c for c in COMMANDS if 'out/demo' in c and c.startswith(('sample.py', 'export.py')) or '--routing_html' in c]
    assert len(after) >= 5
    for command in after:  # what is made of the run, with little text
        args = [*shlex.split(command.replace('out/', f'{tmp_path}/out/').replace(f'{tmp_path}/out/demo', str(run)))]
        done = python(*args, *{'sample.py': ['--tokens=10'], 'eval.py': ['--passage_tokens=50']}.get(args[0], []))
        assert done.returncode == 0, (command, done.stderr)
    assert (run / 'routing.html').exists() and {f.name for f in (tmp_path / 'out').iterdir()} == {'peft', 'gpt2'}


@pytest.mark.parametrize('command', [c for c in COMMANDS if c.startswith('train.py')])
def test_every_training_command_is_accepted(command, tmp_path, monkeypatch, capsys):
    """Each stops only at the data that is not there: its config files, methods and switches are all known."""
    args = [a for a in shlex.split(command) if not a.startswith(('--init_from', '--dataset', '--out_dir', '--resume'))]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        sys, 'argv', [*args, '--init_from=assets/base-tiny.safetensors', '--dataset=nowhere', f'--out_dir={tmp_path}/x']
    )
    with pytest.raises(SystemExit) as end:  # in this process: importing torch anew takes seconds
        runpy.run_path('train.py', run_name='__main__')
    said = capsys.readouterr()
    if '--list_methods' in args:
        assert end.value.code is None and 'comigs_1g1s' in said.out
    else:
        assert end.value.code == 2 and 'no data set at data/nowhere' in said.err, said.err


@pytest.mark.parametrize('command', [c for c in COMMANDS if c.startswith('data/prepare.py')])
def test_every_prepare_command_is_accepted(command, tmp_path):
    """Options are checked before anything is read: with an impossible source each stops exactly there."""
    args = [a for a in shlex.split(command) if not a.startswith('--source')]
    if 'demo' in args:
        pytest.skip('run for real above')
    done = python(*args, f'--source={tmp_path}/nowhere', f'--out_root={tmp_path}')
    assert done.returncode == 2 and 'nowhere does not exist' in done.stderr, done.stderr


@pytest.mark.parametrize('command', [c for c in COMMANDS if c.startswith('reproduce.py')])
def test_every_table_command_is_accepted(command):
    """Known tables, switches and seeds: it lists the runs, or stops at the data that is not there."""
    args = shlex.split(command)
    done = python(*args, *(['--dry_run'] if '--dry_run' not in args else []))
    assert (
        done.returncode == 0
        and 'to do' in done.stdout
        or (done.returncode == 2 and 'meta.json; run python data/prepare.py' in done.stderr)
    ), done.stderr


def test_files_named_in_the_readme_exist():
    text = (ROOT / 'README.md').read_text()
    files = set(re.findall(r'`((?:config|data|assets|tests)/[\w./-]+\.(?:py|safetensors|json))`|^\| `(\w+\.py)`', text, re.M))
    files = {a or b for a, b in files}
    assert len(files) >= 10
    for file in files:
        assert (ROOT / file).exists(), file


def test_line_counts_of_the_readme():
    """Its table of files names every one, with a length that is right to within a tenth."""
    said = {}
    for row in re.findall(r'^\| `.*', (ROOT / 'README.md').read_text(), re.M):  # a row may have two files
        said |= dict(re.findall(r'`([\w/]+\.py)`(?:(?!\.py`).)*?\((\d+) lines\)', row))
    lines = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in [*ROOT.glob('*.py'), *ROOT.glob('data/*.py')]}
    assert said.keys() == lines.keys()
    wrong = [f'{file}: {said[file]}, has {n}' for file, n in lines.items() if abs(int(said[file]) - n) > n / 10]
    assert not wrong, f'README.md: {"; ".join(wrong)}'


def test_the_paper_is_cited_alike():
    """CITATION.cff says of the paper what the README's BibTeX entry says."""
    entry, cff = (ROOT / 'README.md').read_text().partition('@inproceedings')[2], (ROOT / 'CITATION.cff').read_text()
    values = dict(re.findall(r'(\w+)\s*= \{([^}]*)\}', entry))
    assert len(values) >= 8
    for key in ('title', 'booktitle', 'year', 'volume'):
        assert values[key] in cff, key
    for person in values['author'].split(' and '):
        family, given = person.split(', ')
        assert f'family-names: {family}\n      given-names: {given}\n' in cff
    begin, end = values['pages'].split('--')
    assert f'start: {begin}\n    end: {end}\n' in cff
