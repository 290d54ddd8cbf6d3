"""nanoGPT's configuration idea with its gaps closed: config/default.py has every switch, and what it may be.

    python train.py config/demo.py config/mine.py --n_experts=4,2,2,2 --expert_lr=1e-3 --resume

Unknown names are refused, in files as on the command line; a value must have its default's type (an int may stand for a float,
and one number for a tuple with an entry per user). Below that, what every command prints with: a last line, a table."""

import argparse
import ast
import difflib
import functools
import io
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np

from config import default
from config.default import COLUMNS, FIT, GONE, LEGAL, METHODS, MUST, PATHS, PER_USER

home = os.path.expanduser  # the path with ~ spelt out, which a shell does not do after `=`; what is nobody's home stays
DATA = Path(__file__).resolve().parent / 'data'
SWITCHES = {k: v for k, v in vars(default).items() if k.islower() and not k.startswith('_')}


def die(message: object) -> NoReturn:
    """Bad input: one line on stderr (for each machine, where several processes find the same), exit code 2."""
    if (os.environ.get('LOCAL_RANK') or '0') == '0':
        print(' '.join(f'{Path(sys.argv[0]).name}: {message}'.split()), file=sys.stderr)
    raise SystemExit(2)


def steady_output() -> None:
    """What every command begins with: what a terminal or a log cannot encode is written as \\u5f20, and a pipe that nobody
    reads any more ends the command without a word. SIGPIPE would do that too, but for every socket as well."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # no notebook's
            stream.reconfigure(errors='backslashreplace')
            if isinstance(raw := getattr(stream.buffer, 'raw', stream.buffer), io.FileIO):
                raw.write = functools.partial(write_or_end, raw)


def write_or_end(raw: io.FileIO, data: bytes) -> int | None:
    try:
        return io.FileIO.write(raw, data)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), raw.fileno())  # takes what is still in buffers
        (os._exit if sys.is_finalizing() else sys.exit)(128 + 13)  # SIGPIPE's


def configure(argv: list[str], doc: str = '') -> SimpleNamespace:
    """Every switch as a name of one namespace, in the order of config/default.py. Dies on bad input.

    --help prints `doc` and what the other arguments would set, --list_methods the rows; either ends."""
    steady_output()
    asks = [arg for arg in argv if arg == '-h' or arg.partition('=')[0] in ('--help', '--list_methods')]
    given = {}
    for arg in argv:
        if arg in asks:
            continue
        if arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')  # only the first '=' separates
            given[known(key, SWITCHES, 'switch', '--')] = literal(text, SWITCHES.get(key)) if equals else True
        else:
            for key, value in read_file(arg).items():
                given[known(key, SWITCHES, f'switch in {arg}')] = value
    given = {key: checked(key, value, SWITCHES[key], key in PER_USER) for key, value in given.items()}
    row = METHODS[known(given.get('method', SWITCHES['method']), METHODS, 'method')]
    config = {**SWITCHES, **dict(zip(COLUMNS, row[0])), **(row[3] if row[3:] else {}), **given}
    if asks:
        print(list_methods() if '--list_methods' in asks else help_text(doc, config))
        raise SystemExit(0)
    for names, legal in LEGAL.items():
        for name in names.split():
            x = config[name]
            if isinstance(legal, tuple) and x not in legal:
                die(f'--{name}={x}: expected one of {", ".join(legal)}')
            if isinstance(legal, str) and not eval(legal, {'x': x}):
                die(f'--{name}={x}: expected {legal.replace("x", name)}')
    hold(MUST, config)
    return SimpleNamespace(**config)


def hold(rows: dict[str, str], values: dict) -> None:
    """Dies with the first condition that does not hold: the values that it speaks of, and why."""
    for condition, why in rows.items():
        if not eval(condition, {'fullmatch': re.fullmatch}, values):
            spoken = dict.fromkeys(name for name in re.findall(r'\w+', condition) if name in values)
            die(', '.join(f'{"--" * (k in SWITCHES)}{k}={in_short(values[k])}' for k in spoken) + f': {why}')


def in_short(value: object) -> str:
    """A value as it is typed; of many users' the first ones."""
    entries = [*map(str, value)] if isinstance(value, tuple) else [str(value)]
    return ','.join(entries[:8] + ['...'] * (len(entries) > 8))


def fit(c: SimpleNamespace, N: int, n_positions: int) -> SimpleNamespace:
    """c, once the number of users and the base's positions are known: n_experts and lora_rank get an entry per user. Dies
    unless every row of FIT holds."""
    for name in PER_USER:
        value = getattr(c, name)
        each = value if isinstance(value, tuple) else (value,) * N
        if len(each) != N or not 1 <= min(each) <= max(each) <= 4096:
            die(f'--{name}={in_short(each)}: expected one value from 1 to 4096, or {N}, one per user of {c.dataset}')
        setattr(c, name, each)
    hold(FIT, {**vars(c), 'N': N, 'n_positions': n_positions})
    return c


def known(name: str, names: dict, what: str, dashes: str = '') -> str:
    if name in GONE and names is SWITCHES:
        die(f'{dashes}{name} is no {what} any more: {GONE[name]}')
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
        hint = f'did you mean {dashes}{near[0]}?' if near else f'known: {", ".join(names)}'
        own = f' (a name that is no switch begins with _: _{name})' if ' in ' in what else ''
        die(f'unknown {what}: {dashes}{name}; {hint}{own}' if own else f'unknown {what} {dashes}{name}; {hint}')
    return name


def literal(text: str, default: object) -> object:
    """The text of --key=text as a Python value; as it was typed if the default is a text, or if it is no literal."""
    try:
        return text if type(default) is str else ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def checked(key: str, value: object, default: object, per_user: bool) -> object:
    """value in its default's type, or death."""
    want, number = type(default), type(value) in (int, float)
    if number and not abs(value) < 1e300:  # infinite, NaN, or an int that is no float
        die(f'--{key}: expected a finite number, and one below 1e300')
    if per_user and type(value) in (tuple, list):
        return tuple(checked(key, entry, default, False) for entry in value)
    if number and want in (float, str):
        value = want(value)
    if type(value) is not want:
        example = f'{default!r}' + (f' or one value per user, such as {default},{default}' if per_user else '')
        die(f'--{key}={value!r}: expected {want.__name__}, such as {example}')
    return home(value) if key in PATHS else value


def read_file(file: str) -> dict:
    """The public variables that a config file sets, not what it imports or defines. It is Python: run only your own."""
    if not file.endswith('.py'):
        die(f'{file!r} is neither a config file (*.py) nor a switch (--name=value)')
    values = {}
    try:
        source = Path(file).read_bytes()  # Python finds out the encoding
    except OSError as error:
        die(f'cannot read the config file {file}: {error.strerror}')
    try:
        exec(compile(source, file, 'exec'), values)
    except BaseException as error:  # SystemExit, too
        die(f'the config file {file} does not run: {type(error).__name__}: {error}')
    own = {
        k for k, v in values.items() if k[0] == '_' or callable(v) or type(v).__module__ == '__future__' or type(v) is type(re)
    }
    return {k: v for k, v in values.items() if k in SWITCHES or k not in own}


def help_text(doc: str, config: dict) -> str:
    """`doc`, and every switch with its value in `config` and its comment in config/default.py, as a config file could have it;
    a value that is not the default tells the default, too."""
    lines, width = [doc.strip(), ''], max(len(f'{name} = {value!r}') for name, value in config.items())
    for line in Path(default.__file__).read_text(encoding='utf-8').splitlines():
        name, comment = line.partition(' = ')[0], line.partition('  # ')[2]
        if name == 'PER_USER':
            break
        if line.startswith('# ----'):
            lines.append(line)
        if name in config:
            given = f'  (default: {SWITCHES[name]!r})' if config[name] != SWITCHES[name] else ''
            lines.append(f'{f"{name} = {config[name]!r}":{width}}  # {comment}{given}')
    return '\n'.join(lines)


def list_methods() -> str:
    """METHODS as a table: the switches of every row in short."""
    lines = []
    for name, (row, where, what, *_) in METHODS.items():
        experts, generalists, attention, router, trained_on, aggregate, rank = row
        gate = f'{router}, {trained_on}' if router == 'learned' else router
        shared = f'{generalists}{" + attention" * attention}'
        lines.append([name, where.removeprefix('T'), experts, rank, gate, shared, aggregate, what])
    return table(['--method', 'Table', 'experts', 'rank', 'router', 'generalists', 'rule', 'what it is'], lines, left=8)


# ---- what other commands share -------------------------------------------------------------------------------------
def folder_of(dataset: str) -> Path:
    """A data set's folder: of a plain name the project's own data/NAME, wherever a command runs; a path is taken as typed."""
    return Path(dataset) if {'/', os.sep} & set(dataset) else DATA / dataset


def parser(doc: str) -> argparse.ArgumentParser:
    """Of a command in tools/ or data/: its docstring is its manual, bad input is one line, ~ in a Path is the home folder."""
    steady_output()
    made = argparse.ArgumentParser(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.error = die
    made.register('type', Path, lambda text: Path(home(text)))
    return made


def to_json(value: object, **how) -> str:
    """JSON that everybody reads: a number that is not finite is null."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), **how)


def read_json(file: Path, *keys: str, text: str | bytes | None = None) -> dict:
    """The object in a JSON file, or in a `text` out of it, which has these keys. Raises ValueError naming the file."""
    try:
        found = json.loads(Path(file).read_bytes() if text is None else text)
        missing = [key for key in keys if key not in found] if isinstance(found, dict) else []
        why = f'it has no {missing[0]}' if missing else '' if isinstance(found, dict) else 'it is no JSON object {...}'
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, 'strerror', None) or error
    if why:
        raise ValueError(f'{file} cannot be read: {why}')
    return found


def read_config(run: Path) -> dict:
    """config.json of a run; a switch that it does not know yet has its default. Raises ValueError naming the file."""
    file = run / 'config.json'
    config = {**SWITCHES, 'tested': [], **read_json(file, 'method', 'users', 'base_sha256')}
    for name, like in {'users': [], 'tested': [], **SWITCHES}.items():
        value = config[name]
        fits = type(value) is type(like) or (type(like), type(value)) == (float, int)
        if type(value) is list and name in ('users', 'tested', *PER_USER):
            N = 1 if config['pooled'] else len(config['users'])
            kind, least = {'users': (str, 1), 'tested': (int, 0)}.get(name, (int, N))
            fits = len(value) >= least and all(type(entry) is kind for entry in value)
        if not fits or (name == 'tested' and not all(i in range(len(config['users'])) for i in value)):
            raise ValueError(f'{file} is not that of a run: {name} is {value!r:.80}')
    return config


def mean(values: list[float | None]) -> float | None:
    """Mean of those that are known, None if none is."""
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def cell(value: object) -> str:
    return f'{value:.3f}' if isinstance(value, float) else '-' if value is None else str(value)


def table(header: list, rows: list[list], left: int = 1) -> str:
    """A text table; floats with three decimals, the first columns (`left` of them) to the left."""
    cells = [[*map(cell, row)] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        '  '.join(c.rjust(w) if i >= left else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in cells
    ]
    return '\n'.join([lines[0], '-' * max(map(len, lines)), *lines[1:]])
