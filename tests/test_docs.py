"""The pages: links point where they say, what is quoted is what runs print, commands are known, diffs apply."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / 'docs'))

import ablations  # noqa: E402
import walkthrough  # noqa: E402

import eval as evaluate  # noqa: E402
from configurator import SWITCHES  # noqa: E402
from data import prepare  # noqa: E402

PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/*.md'), ROOT / 'assets/README.md'])
PAGES += [ROOT / f'results/{name}.md' for name in ('README', 'figures', 'real', 'small', 'small-figures')]
TEXT = {str(page.relative_to(ROOT)): page.read_text(encoding='utf-8') for page in PAGES}
DIFFS = ablations.diffs()
FENCED = re.compile(r'^```(\w*)\n(.*?)^```$', re.M | re.S)


def blocks(page: str, language: str = 'bash') -> list[str]:
    return [text for kind, text in FENCED.findall(TEXT[page]) if kind == language]


def commands() -> list[list[str]]:
    """[FILE, argument, ...] of every line `python FILE ...` of the pages' bash blocks, each once; s stands for a seed."""
    lines = [line for page in TEXT for block in blocks(page) for line in block.splitlines() if line.startswith('python ')]
    lines = [re.split(r'\s[#|]', line)[0].replace('-s ', '-42 ').replace('=s ', '=42 ') for line in lines]
    return [line.split()[1:] for line in dict.fromkeys(lines)]


# ---- every page ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('page', TEXT)
def test_links_point_at_what_they_name(page):
    """The file exists; code that a link into a Python file names is in it; a heading that a link names is on its page."""
    for text, target in re.findall(r'\[([^\]]*)\]\(([^)\s]+)\)', FENCED.sub('', TEXT[page])):
        if re.match(r'https?:|mailto:', target):
            continue
        name, _, heading = target.partition('#')
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), f'{page} links to {target}, which does not exist'
        if file.suffix == '.py' and text.startswith('`') and not file.as_posix().endswith(text.strip('`')):
            code, named = file.read_text(encoding='utf-8'), re.escape(text.strip('`'))
            assert re.search(rf'(def|class) {named}\b|^{named} =', code, re.M) or text.strip('`') in code, (
                f'{page}: {text}, {target}'
            )
        if heading:
            titles = re.findall(r'^#+ (.*)', file.read_text(encoding='utf-8'), re.M)
            assert heading in [re.sub(r'[^\w\- ]', '', title).lower().replace(' ', '-') for title in titles], (
                f'{page}: {target}'
            )


@pytest.mark.parametrize('page', TEXT)
def test_no_line_of_prose_is_long(page):
    """120 characters; tables, code, images and the targets of links may be longer."""
    for line in FENCED.sub('', TEXT[page]).splitlines():
        seen = re.sub(r'\]\([^)]*\)|https?://\S+', ']', line)
        assert len(seen) <= 120 or line.lstrip().startswith(('|', '!', '<')), f'{page}: {line}'


@pytest.mark.parametrize(
    'command', [' '.join(args) for args in commands() if args[0] == 'train.py' and '$' not in ' '.join(args)]
)
def test_every_training_command_is_accepted(command, train, tiny, tmp_path, monkeypatch, capsys):
    """Each stops only at the data that is not there: its config files, methods and switches are all known."""
    monkeypatch.chdir(ROOT)
    args, stop = command.replace(' --resume', '').split()[1:], ('--dataset=nowhere', '--device=cpu')  # later values win
    with pytest.raises(SystemExit) as end:
        train(*args, f'--init_from={tiny.base}', f'--out_dir={tmp_path}', *stop, short=False)
    said = capsys.readouterr()
    assert end.value.code == 2 and '/data/nowhere (no meta.json)' in said.err or '--list_methods' in args and said.out, said.err


def test_every_script_and_option_of_the_pages_is_known(capsys):
    """Scripts exist, and print every option that they are given with --help; some hand train.py's switches on."""
    given = {}
    for file, *args in commands():
        assert (ROOT / file).exists(), file
        assert all((ROOT / arg).exists() for arg in args if arg.endswith('.py')), args
        given.setdefault(file, set()).update(re.findall(r'--(\w+)', ' '.join(args)))
    assert {'eval.py', 'data/prepare.py', 'tools/reproduce.py'} <= given.keys()
    for file in given.keys() - {'train.py', 'docs/walkthrough.py'}:
        with pytest.raises(SystemExit):
            importlib.import_module(file.removesuffix('.py').removeprefix('docs/').replace('/', '.')).main(['--help'])
        known = {*re.findall(r'--(\w+)', capsys.readouterr().out)} | (
            SWITCHES.keys() if file == 'tools/reproduce.py' else set()
        )
        assert given[file] <= known, f'{file}: {given[file] - known}'


# ---- walkthrough -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope='session')
def demo(tmp_path_factory) -> Path:
    """The demo's data: data/demo, or made here."""
    if not (ROOT / 'data/demo/meta.json').exists():
        folder = tmp_path_factory.mktemp('data')
        prepare.main(['demo', f'--out_root={folder}'])
        return folder / 'demo'
    return ROOT / 'data/demo'


@pytest.mark.slow
def test_the_walkthrough_quotes_what_it_prints(demo):
    """Words, shapes, names, counts and bytes exactly; decimals loosely, because text and rounding differ between machines."""
    command = [sys.executable, 'docs/walkthrough.py', f'--dataset={demo}']
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    printed, quoted = (walkthrough.sections(text) for text in (done.stdout, TEXT['docs/walkthrough.md']))
    assert list(quoted) == list(printed) and len(quoted) == 7
    decimal = re.compile(r'-?\d+\.\d+')
    for title, text in printed.items():
        exact = [decimal.sub('#', t).split() for t in (text, quoted[title])]
        assert exact[0] == exact[1], f'docs/walkthrough.md, {title}: python docs/walkthrough.py --write'
        numbers = [[float(n) for n in decimal.findall(t)] for t in (text, quoted[title])]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.3, abs=0.1), title


def test_the_wrappers_of_the_walkthrough_change_no_number(train, tiny, tmp_path, monkeypatch):
    """Watched or not, the same run writes the same metrics, byte for byte; the page's sections come out of any run."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr('train.stop_on_signals', lambda out_dir: None)
    files = [f'--init_from={tiny.base}', f'--dataset={tiny.data}', '--block_size=16']
    run, calls = walkthrough.follow([*files, f'--out_dir={tmp_path}/watched'])
    assert {call.name for call in calls} == walkthrough.WATCHED.keys()
    assert all(call.before.keys() == call.after.keys() == run.users[0].role.keys() for call in calls if call.user is not None)
    train('config/demo.py', *files, '--rounds=1', '--router_every=10', f'--out_dir={tmp_path}/plain', out='plain', short=False)
    plain, watched = ((tmp_path / out / 'metrics.jsonl').read_bytes() for out in ('plain', 'watched'))
    assert plain == watched
    told = walkthrough.sections(''.join(f'{line}\n' for line in walkthrough.tell(run, calls)))
    assert list(told) == list(walkthrough.sections(TEXT['docs/walkthrough.md']))


# ---- ablations -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', DIFFS)
def test_an_ablation_applies_and_is_short(name, tmp_path):
    """git takes it as it stands here, but not twice; ten lines more and ten less at most; the result is Python."""
    added, removed = (re.findall(rf'^{re.escape(sign)}(?!{re.escape(sign * 2)}).*$', DIFFS[name], re.M) for sign in '+-')
    assert 1 <= len(added) + len(removed) and len(added) <= 10 and len(removed) <= 10
    changed = re.findall(r'^\+\+\+ b/(\S+)$', DIFFS[name], re.M)
    for file in changed:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    ablations.apply(name, DIFFS[name], tmp_path)
    for file in changed:
        text = (tmp_path / file).read_text(encoding='utf-8')
        assert text != (ROOT / file).read_text(encoding='utf-8')
        compile(text, file, 'exec')
    with pytest.raises(ValueError, match=f'{name} does not fit .* patch does not apply'):
        ablations.apply(name, DIFFS[name], tmp_path)


def test_refreshed_line_numbers_leave_the_change_as_it_is():
    """Of a diff of two files, one in a folder, whose numbers are wrong."""
    stale = re.sub(
        r'^@@ .* @@$', lambda hunk: hunk[0].replace('-1', '-2').replace('+1', '+2'), DIFFS['half_upload'], flags=re.M
    )
    fresh = ablations.refreshed('half_upload', stale)
    assert fresh != stale and fresh == ablations.refreshed('half_upload', DIFFS['half_upload'])
    assert re.findall('^[-+].*', fresh, re.M) == re.findall('^[-+].*', stale, re.M)


@pytest.mark.parametrize('name', DIFFS)
def test_an_ablation_is_in_the_table_with_the_numbers_of_its_section(name):
    """The mean perplexity that a section quotes in bold is that of its row, and the command there names it."""
    assert len(DIFFS) == 10 == len(blocks('docs/ablations.md', 'diff'))
    section = TEXT['docs/ablations.md'].partition(f'## {name}: ')[2].partition('\n## ')[0]
    row = re.search(rf'^\| {name} \|(.*)$', TEXT['docs/ablations.md'], re.M)[1].split('|')
    mean = re.search(r'\*\*(\d\.\d{3})\*\*', section)[1]
    assert row[4].strip() == mean and f'python docs/ablations.py {name}' in section


@pytest.mark.parametrize('name', [name if name == 'mlp_only' else pytest.param(name, marks=pytest.mark.slow) for name in DIFFS])
def test_an_ablation_runs(name, tmp_path, tiny, monkeypatch):
    """`run` trains the changed source and not this one, and does not repeat what is finished."""
    shutil.copytree(tiny.data, tmp_path / 'demo')
    monkeypatch.setattr(ablations, 'RUNS', tmp_path)
    monkeypatch.setattr(ablations, 'DATA', tmp_path / 'demo')
    short = ('--rounds=1', f'--init_from={tiny.base}', '--block_size=16', '--local_steps=2', '--router_every=2')
    summary = ablations.run(name, DIFFS[name], 42, short)
    if name == 'mlp_only':
        assert summary['trainable_params'][0] == 2 * (
            2 * 2 * 8 * (16 + 64) + 2 * 16
        )  # 2 layers: 2 experts of 2 LoRAs, a router
    out = tmp_path / f'{name}-42'
    assert json.loads((out / 'config.json').read_text())['seed'] == 42
    before = (out / 'metrics.jsonl').stat().st_mtime_ns
    assert ablations.run(name, DIFFS[name], 42, short) == summary
    assert (out / 'metrics.jsonl').stat().st_mtime_ns == before


# ---- own data --------------------------------------------------------------------------------------------------------
def test_own_data_word_for_word(tmp_path, train, monkeypatch, capsys):
    """The page's four folders and its three commands, with less text and fewer steps, into a temporary folder."""
    make, three = (next(block for block in blocks('docs/data.md') if word in block) for word in ('take()', 'eval.py'))
    folders = make.replace('$(python', f'$({sys.executable}')
    done = subprocess.run(['bash', '-e', '-c', folders], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert sorted(path.name for path in (tmp_path / 'my/texts').iterdir()) == ['cpp', 'licences', 'python', 'readmes']
    (first, *prepared), (second, *trained), (third, *looked) = (
        line.partition('  #')[0].replace('my/', f'{tmp_path}/my/').replace('out/', f'{tmp_path}/out/').split()[1:]
        for line in three.splitlines()
    )
    assert [first, second, third] == ['data/prepare.py', 'train.py', 'eval.py']
    monkeypatch.chdir(ROOT)
    prepare.main([*prepared, f'--out_root={tmp_path}', '--test_tokens=2000', '--valid_tokens=2000'])
    small = ('--init_from=assets/base-tiny.safetensors', '--rounds=1', '--local_steps=1', '--block_size=64')
    train(*trained, f'--dataset={tmp_path}/mine', *small, out='out/mine', short=False)
    evaluate.main(looked)
    assert 'generalist alone' in capsys.readouterr().out
