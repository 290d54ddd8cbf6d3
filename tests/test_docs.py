"""The pages under docs/: their links point where they say, what they quote is what runs print, their diffs apply."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = sorted((ROOT / 'docs').glob('*.md'))
WALKTHROUGH = runpy.run_path(str(ROOT / 'docs' / 'walkthrough.py'))
ABLATIONS = runpy.run_path(str(ROOT / 'docs' / 'ablations.py'))
DIFFS = ABLATIONS['diffs']()


# ---- links -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_point_at_what_they_name(page):
    """A link to a line: that line has the link's text. Any other link into this folder: the file exists.
    After the code has changed: python docs/walkthrough.py --links."""
    for text, target in re.findall(r'\[([^\]]+)\]\(([^)]+)\)', page.read_text(encoding='utf-8')):
        if re.match(r'https?:|#', target):
            continue
        file, _, line = target.partition('#L')
        assert (page.parent / file).exists(), f'{page.name} links to {target}, which does not exist'
        if line:
            lines = (page.parent / file).read_text(encoding='utf-8').splitlines()
            assert int(line) > 0 and text.strip('`') in lines[int(line) - 1], f'{page.name}: {target} is not the line of {text}'


def test_a_link_finds_its_line_again():
    """The definition if there is one, else the only line that contains the text; none or several are refused."""
    line_of = WALKTHROUGH['line_of']
    text = 'import load\n\n\ndef load(user):\n    use(user)\n    use(user)\n\n\nclass Loader:\n    a = load(1)\n'
    assert [line_of(text, name) for name in ('load', 'Loader', 'a = load')] == [4, 9, 10]
    for name in ('use(user)', 'nowhere'):
        with pytest.raises(ValueError, match='a link needs exactly one'):
            line_of(text, name)


def test_relinking_repairs_a_page():
    page = (ROOT / 'docs' / 'walkthrough.md').read_text(encoding='utf-8')
    stale = re.sub(r'#L\d+', '#L1', page)
    assert stale != page and WALKTHROUGH['relink'](stale) == WALKTHROUGH['relink'](page)


# ---- walkthrough -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope='session')
def demo(tmp_path_factory) -> Path:
    """The demo's data: data/demo, or made here."""
    if (ROOT / 'data' / 'demo' / 'meta.json').exists():
        return ROOT / 'data' / 'demo'
    folder = tmp_path_factory.mktemp('data')
    done = subprocess.run(
        [sys.executable, 'data/prepare.py', 'demo', f'--out_root={folder}'], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return folder / 'demo'


def test_the_walkthrough_quotes_what_it_prints(demo):
    """Words, shapes, names, counts and bytes exactly; decimals loosely, because text and rounding differ between machines."""
    done = subprocess.run(
        [sys.executable, 'docs/walkthrough.py', f'--dataset={demo}'], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    quoted = WALKTHROUGH['sections']((ROOT / 'docs' / 'walkthrough.md').read_text(encoding='utf-8'))
    printed = WALKTHROUGH['sections'](done.stdout)
    assert list(quoted) == list(printed) and len(quoted) == 7
    decimal = re.compile(r'-?\d+\.\d+')
    for title, text in printed.items():
        exact = [decimal.sub('#', t).split() for t in (text, quoted[title])]
        assert exact[0] == exact[1], f'docs/walkthrough.md, {title}: python docs/walkthrough.py --write'
        numbers = [[float(n) for n in decimal.findall(t)] for t in (text, quoted[title])]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.3, abs=0.1), title


def test_the_wrappers_of_the_walkthrough_change_no_number(train, tiny, tmp_path, monkeypatch):
    """Watched or not, the same run writes the same metrics, byte for byte."""
    args = ['--rounds=1', '--router_every=10', '--device=cpu', '--eval_every=1']
    files = [f'--init_from={tiny.base}', f'--dataset={tiny.data}', '--block_size=16', '--judge_windows=1']
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', [])
    run, calls = WALKTHROUGH['follow']([*files, f'--out_dir={tmp_path}/watched'])
    assert {call.name for call in calls} == {'receive', 'descend', 'upload', 'combine', 'test_perplexity'}
    assert all(call.before.keys() == call.after.keys() == run.users[0].role.keys() for call in calls if call.user is not None)
    train('config/demo.py', *files, *args, f'--out_dir={tmp_path}/plain', short=False, out='plain')
    plain, watched = ((tmp_path / out / 'metrics.jsonl').read_text() for out in ('plain', 'watched'))
    assert plain == watched


# ---- ablations -------------------------------------------------------------------------------------------------------
def test_there_are_ten_ablations():
    page = (ROOT / 'docs' / 'ablations.md').read_text(encoding='utf-8')
    assert len(DIFFS) == 10 and page.count('```diff') == 10


@pytest.mark.parametrize('name', DIFFS)
def test_an_ablation_applies_and_is_short(name, tmp_path):
    """git takes it as it stands here; ten lines more and ten less at most; the result is Python."""
    added, removed = (re.findall(rf'^{re.escape(sign)}(?!{re.escape(sign * 2)}).*$', DIFFS[name], re.M) for sign in '+-')
    assert 1 <= len(added) + len(removed) and len(added) <= 10 and len(removed) <= 10
    source = ABLATIONS['copy_of_the_source'](tmp_path)
    ABLATIONS['apply'](name, DIFFS[name], source)
    changed = re.findall(r'^\+\+\+ b/(\S+)$', DIFFS[name], re.M)
    assert changed
    for file in changed:
        text = (source / file).read_text(encoding='utf-8')
        assert text != (ROOT / file).read_text(encoding='utf-8')
        compile(text, file, 'exec')


@pytest.mark.parametrize('name', DIFFS)
def test_an_ablation_is_in_the_table_with_the_numbers_of_its_section(name):
    """The mean perplexity that a section quotes in bold is that of its row, and the command there names it."""
    page = (ROOT / 'docs' / 'ablations.md').read_text(encoding='utf-8')
    section = page.partition(f'## {name}: ')[2].partition('\n## ')[0]
    row = re.search(rf'^\| {name} \|(.*)$', page, re.M)[1].split('|')
    mean = re.search(r'\*\*(\d\.\d{3})\*\*', section)[1]
    assert row[4].strip() == mean and f'python docs/ablations.py {name}' in section


def test_a_diff_that_does_not_fit_is_refused(tmp_path):
    source = ABLATIONS['copy_of_the_source'](tmp_path)
    name, diff = next(iter(DIFFS.items()))
    ABLATIONS['apply'](name, diff, source)
    with pytest.raises(ValueError, match=f'{name} does not fit .* patch does not apply'):
        ABLATIONS['apply'](name, diff, source)  # a second time


def test_an_ablation_runs(tmp_path, tiny, monkeypatch):
    """`run` trains the changed source and not this one, and does not repeat what is finished."""
    shutil.copytree(tiny.data, tmp_path / 'data' / 'demo')
    scope = ABLATIONS['run'].__globals__
    monkeypatch.setitem(scope, 'RUNS', tmp_path)
    monkeypatch.setitem(scope, 'DATA', tmp_path / 'data' / 'demo')
    short = ('--rounds=1', f'--init_from={tiny.base}', '--block_size=16', '--local_steps=1', '--judge_windows=1')
    summary = ABLATIONS['run']('mlp_only', DIFFS['mlp_only'], 42, short)
    assert summary['trainable_params'][0] == 2 * (2 * 2 * 8 * (16 + 64) + 2 * 16)  # 2 layers: 2 experts of 2 LoRAs, a router
    before = (tmp_path / 'mlp_only-42' / 'metrics.jsonl').stat().st_mtime_ns
    assert ABLATIONS['run']('mlp_only', DIFFS['mlp_only'], 42, short) == summary
    assert (tmp_path / 'mlp_only-42' / 'metrics.jsonl').stat().st_mtime_ns == before
    assert json.loads((tmp_path / 'mlp_only-42' / 'config.json').read_text())['seed'] == 42


# ---- own data --------------------------------------------------------------------------------------------------------
def bash_blocks(page: str) -> list[str]:
    return re.findall(r'^```bash\n(.*?)^```', (ROOT / 'docs' / page).read_text(encoding='utf-8'), re.M | re.S)


def test_own_data_word_for_word(tmp_path):
    """The page's four folders and its three commands, with less text and fewer steps, into a temporary folder."""
    make, three = (next(block for block in bash_blocks('own_data.md') if word in block) for word in ('take()', 'eval.py'))
    folders = make.replace('$(python', f'$({sys.executable}')
    done = subprocess.run(['bash', '-e', '-c', folders], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert sorted(path.name for path in (tmp_path / 'my/texts').iterdir()) == ['cpp', 'licences', 'python', 'readmes']
    more = {
        'data/prepare.py': [f'--out_root={tmp_path}', '--test_tokens=2000', '--valid_tokens=2000'],
        'train.py': [f'--dataset={tmp_path}/mine', '--rounds=1', '--local_steps=1', '--block_size=64'],
        'eval.py': [],
    }
    lines = [line.partition('  #')[0].split()[1:] for line in three.splitlines()]
    assert [script for script, *_ in lines] == list(more)
    for script, *args in lines:
        args = [arg.replace('my/', f'{tmp_path}/my/').replace('out/', f'{tmp_path}/out/') for arg in args]
        done = subprocess.run([sys.executable, script, *args, *more[script]], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, f'{script} {" ".join(args)}: {done.stderr}'
    assert 'generalist alone' in done.stdout


TRAIN = [
    line for page in PAGES for block in bash_blocks(page.name) for line in re.findall(r'^python train\.py .*', block, re.M)
]


@pytest.mark.parametrize('command', [line.partition('  #')[0] for line in TRAIN if '$' not in line])
def test_every_training_command_is_accepted(command, tmp_path, monkeypatch, capsys):
    """Each stops only at the data that is not there: its config files, methods and switches are all known."""
    args = [arg for arg in command.split()[1:] if not arg.startswith(('--dataset', '--out_dir'))]
    monkeypatch.chdir(ROOT)
    more = ['--init_from=assets/base-tiny.safetensors', '--dataset=nowhere', f'--out_dir={tmp_path}/x']
    monkeypatch.setattr(sys, 'argv', [*args, *more])
    with pytest.raises(SystemExit) as end:
        runpy.run_path('train.py', run_name='__main__')
    said = capsys.readouterr().err
    assert end.value.code == 2 and 'no data set at data/nowhere' in said, said


def test_scripts_and_files_that_the_pages_name_exist():
    """Every `python FILE` of the pages' bash blocks, and every configuration that it is given."""
    for page in PAGES:
        for line in '\n'.join(bash_blocks(page.name)).splitlines():
            for file in re.findall(r'(?:^|\s)((?:\w+/)?\w+\.py)\b', line.partition('  #')[0]):
                assert (ROOT / file).exists(), f'{page.name}: {line}'
