"""Runs the ablations of docs/ablations.md: applies each diff in a temporary copy of the source and trains the demo there.

    python docs/ablations.py                                # all of them and the baseline, seed 42; prints the table
    python docs/ablations.py fedprox momentum --seeds=42,45
    python docs/ablations.py fedprox --diff | git apply     # to your own copy; back: ... | git apply -R
    python docs/ablations.py --refresh                      # after the source has changed: the diffs' line numbers

Runs go to out/ablations/NAME-SEED; one that is finished, of the same diff, is not repeated. data/demo must be there."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configurator import die, parser  # noqa: E402

PAGE = ROOT / 'docs' / 'ablations.md'
RUNS = ROOT / 'out' / 'ablations'
DATA = ROOT / 'data' / 'demo'


def diffs() -> dict[str, str]:
    """{name: diff} of the sections `## name: title` of the page, in their order."""
    found = re.findall(r'^## (\w+): .*?^```diff\n(.*?)^```$', PAGE.read_text(encoding='utf-8'), re.M | re.S)
    return dict(found)


def copy_of_the_source(folder: Path) -> Path:
    """The code, configs and the small base, without data, runs and environments."""
    ignored = shutil.ignore_patterns('.*', 'out', 'build', 'bases', '__pycache__', '*.bin')
    return Path(shutil.copytree(ROOT, folder / 'source', ignore=ignored))


def apply(name: str, diff: str, folder: Path) -> None:
    """Raises ValueError naming the ablation, with git's words, if the diff does not fit the source."""
    done = subprocess.run(['git', 'apply', '-'], input=diff, capture_output=True, encoding='utf-8', cwd=folder)
    if done.returncode:
        raise ValueError(f'{name} does not fit the source any more: {" ".join(done.stderr.split())}')


def run(name: str, diff: str, seed: int, more: tuple = ()) -> dict:
    """The summary of this diff's run: an earlier one, or a new one. more: switches of train.py."""
    out = RUNS / f'{name}-{seed}'
    of = out / 'ablation.diff'  # written last
    if of.exists() and of.read_text(encoding='utf-8') == diff and (out / 'summary.json').exists():
        return json.loads((out / 'summary.json').read_text(encoding='utf-8'))
    with tempfile.TemporaryDirectory() as tmp:
        source = copy_of_the_source(Path(tmp))
        if diff:
            apply(name, diff, source)
        args = ['config/demo.py', f'--dataset={DATA}', f'--out_dir={out}', f'--seed={seed}', '--eval_every=10', '--overwrite']
        subprocess.run([sys.executable, 'train.py', *args, *more], cwd=source, check=True, stdout=sys.stderr)
    of.write_text(diff, encoding='utf-8')
    return json.loads((out / 'summary.json').read_text(encoding='utf-8'))


def table(names: list[str], seeds: list[int]) -> str:
    """Test perplexity of every user and their mean, each averaged over seeds, as Markdown; runs what is missing."""
    pages, lines, base = {'baseline': '', **diffs()}, [], None
    for name in ['baseline', *names]:
        runs = [run(name, pages[name], seed) for seed in seeds]
        users = [sum(column) / len(runs) for column in zip(*(r['test_ppl'] for r in runs))]
        mean = sum(r['mean_test_ppl'] for r in runs) / len(runs)
        base, MB = base or mean, sum(r['bytes_up'] for r in runs) / len(runs) / 1e6
        cells = [name, *(f'{p:.3f}' for p in [*users, mean]), f'{100 * (mean / base - 1):+.2f} %', f'{MB:.2f}']
        lines.append('| ' + ' | '.join(cells) + ' |')
    head = ['', *runs[0]['users'], 'mean', 'against the baseline', 'MB up, whole run']
    return '\n'.join(['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head), *lines])


def refreshed(name: str, diff: str) -> str:
    """The same change as a diff of today's source, with one line of context."""
    files = re.findall(r'^\+\+\+ b/(\S+)', diff, re.M)
    with tempfile.TemporaryDirectory() as tmp:
        new = copy_of_the_source(Path(tmp))
        apply(name, diff, new)
        for side, source in (('a', ROOT), ('b', new)):
            for file in files:
                (Path(tmp) / side / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / file, Path(tmp) / side / file)
        command = ['git', 'diff', '--no-index', '--no-prefix', '--no-color', '-U1', 'a', 'b']
        done = subprocess.run(command, capture_output=True, encoding='utf-8', cwd=tmp)
    text = re.sub(r'^(diff|index) .*\n', '', done.stdout, flags=re.M)
    return re.sub(r'^(@@ .*? @@).*$', r'\1', text, flags=re.M)


def main(argv: list[str]) -> None:
    command, known = parser(__doc__), diffs()
    command.add_argument('names', nargs='*', metavar='NAME', help='ablations, default all')
    command.add_argument('--seeds', default='42', help='one, or several with commas')
    command.add_argument('--diff', action='store_true', help='print the diffs and do nothing else')
    command.add_argument('--refresh', action='store_true', help="rewrite the page's diffs against the source as it is")
    args = command.parse_args(argv)
    names = args.names or [*known]
    if unknown := [name for name in names if name not in known]:
        die(f'no ablation {unknown[0]}; there are: {", ".join(known)}')
    if args.diff:
        print(''.join(known[name] for name in names), end='')
        return
    try:
        if args.refresh:
            page = PAGE.read_text(encoding='utf-8')
            for name in names:
                page = page.replace(known[name], refreshed(name, known[name]))
            PAGE.write_text(page, encoding='utf-8')
            return
        if not (DATA / 'meta.json').exists():
            die('no data/demo: run python data/prepare.py demo')
        print(table(names, [int(seed) for seed in args.seeds.split(',')]))
    except (ValueError, subprocess.CalledProcessError) as error:
        die(error)


if __name__ == '__main__':
    main(sys.argv[1:])
