"""The README: its Algorithm 1 is that of train.py, its table that of --list_methods, and its commands run."""

import json
import re
import shlex
import sys

import pytest
from conftest import ROOT

import eval as eval_file
import train as train_file
from configurator import configure, list_methods
from data import prepare
from tools import reproduce, routing, sample

TEXT = (ROOT / 'README.md').read_text()
COMMANDS = re.findall(r'^(?:\.venv/bin/)?python (\S+\.py[^#\n]*?)\s*(?:#.*)?$', TEXT, re.M)
MAIN = {
    'train.py': train_file.main,
    'eval.py': eval_file.main,
    'data/prepare.py': prepare.main,
    'tools/sample.py': sample.main,
    'tools/routing.py': routing.main,
    'tools/reproduce.py': reproduce.main,
}


def run(command: str, *more: str) -> None:
    script, *args = shlex.split(command)
    MAIN[script]([*args, *more])


def test_it_shows_algorithm_1_and_the_methods_as_they_are():
    source = (ROOT / 'train.py').read_text()
    lines = source[source.index('def local_round') : source.index('# ---- before: everything')].rstrip()
    assert f'```python\n{lines}\n```' in TEXT
    assert f'```\n{list_methods()}\n```' in TEXT
    assert len(TEXT.encode()) <= 10_000


def test_the_first_commands_beat_the_base(tmp_path, monkeypatch, capsys):
    """prepare, train, eval, the page and a sample as the README has them, with less text, for 3 of the rounds."""
    monkeypatch.chdir(ROOT)
    out = tmp_path / 'out/demo'
    run('data/prepare.py demo', f'--out_root={tmp_path}', '--valid_tokens=6000', '--test_tokens=6000')
    run('train.py config/demo.py', f'--dataset={tmp_path}/demo', f'--out_dir={out}', '--rounds=3')
    summary = json.loads((out / 'summary.json').read_text())
    assert all(ours < base for ours, base in zip(summary['test_ppl'], summary['pretrained_test_ppl']))
    run(f'eval.py {out}')
    assert 'generalist alone' in capsys.readouterr().out
    run(f'tools/routing.py {out}', '--passage_tokens=50')
    run(f'tools/sample.py {out} --user=0 --prompt="The "', '--tokens=10')
    assert (out / 'routing.html').exists() and 'The ' in capsys.readouterr().out


@pytest.mark.parametrize('command', [c for c in COMMANDS if c.startswith('train.py')])
def test_every_training_command_is_understood(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    args = shlex.split(command)[1:]
    if '--list_methods' in args:
        with pytest.raises(SystemExit) as end:
            configure(args)
        assert end.value.code == 0 and 'comigs_1g1s' in capsys.readouterr().out
    else:
        assert configure(args).rounds > 0


@pytest.mark.parametrize(
    'command', [c for c in COMMANDS if c.startswith(('data/', 'tools/reproduce', 'eval', 'tools/s', 'tools/ro'))]
)
def test_every_other_command_is_understood(command, tmp_path, monkeypatch, capsys):
    """Each stops only at the source, the data or the run that is not there."""
    if command == 'data/prepare.py demo':
        pytest.skip('run for real above')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', [command.split()[0]])
    more = [f'--source={tmp_path}/nowhere'] if command.startswith('data/') else []
    with pytest.raises(SystemExit) as end:
        sys.exit(run(command, *more))
    said = capsys.readouterr()
    assert end.value.code == 2 and re.search('nowhere does not exist|is no run|prepare.py', said.err), said


def test_files_and_links_exist():
    files = set(re.findall(r'`((?:\w+/)*\w+\.py)`', TEXT)) | set(re.findall(r'\]\(([\w./-]+)\)', TEXT))
    files |= {f'tools/{name}.py' for name in 'sample export plot routing curves reproduce bench pretrain'.split()}
    assert len(files) >= 20
    for file in files:
        assert (ROOT / file).exists(), file


def test_the_paper_is_cited_alike():
    """CITATION.cff says of the paper what the README's BibTeX entry says."""
    entry, cff = TEXT.partition('@inproceedings')[2], (ROOT / 'CITATION.cff').read_text()
    values = dict(re.findall(r'(\w+)\s*= \{([^}]*)\}', entry))
    assert len(values) >= 8
    for key in ('title', 'booktitle', 'year', 'volume'):
        assert values[key] in cff, key
    for person in values['author'].split(' and '):
        family, given = person.split(', ')
        assert f'family-names: {family}\n      given-names: {given}\n' in cff
    begin, end = values['pages'].split('--')
    assert f'start: {begin}\n    end: {end}\n' in cff
