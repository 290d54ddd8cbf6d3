"""nanoGPT's configuration idea with its gaps closed: a script's lower-case module-level variables are its switches.

    python train.py config/demo.py config/mine.py --n_experts=4,2,2,2 --expert_lr=1e-3 --resume

Later values win: the script's defaults, then the row of switches that `method` names, then config files and flags in the
order given. Unknown names are refused, in files as on the command line; a value must have its default's type (an int
may stand for a float, and one number for a tuple with an entry per user)."""

import ast
import difflib
import io
import math
import os
import sys
import tokenize
from pathlib import Path
from typing import NoReturn

KINDS = (bool, int, float, str, tuple)


def die(message: object) -> NoReturn:
    """Bad input: one line on stderr (for each machine, where several processes find the same), exit code 2."""
    if os.environ.get('LOCAL_RANK', '0') == '0':
        print(' '.join(f'{Path(sys.argv[0]).name}: {message}'.split()), file=sys.stderr)
    raise SystemExit(2)


def configure(script: dict, argv: list[str], rows: dict | None = None, per_user: tuple = ()) -> dict:
    """Overrides the variables of `script` (its globals()) and returns the effective configuration, in source order.

    rows: {method: {switch: value}}; per_user: names that also take a tuple, one entry per user. Dies on bad input. --help
    among the arguments prints what the others would set, and ends."""
    defaults = {k: v for k, v in script.items() if k.islower() and not k.startswith('_') and type(v) in KINDS}
    asks = [arg for arg in argv if arg == '-h' or arg.partition('=')[0] == '--help']
    given = {}
    for arg in argv:
        if arg in asks:
            continue
        if arg.startswith('--'):
            key, equals, value = arg[2:].partition('=')  # only the first '=' separates
            given[known(key, defaults, 'switch', '--')] = parse(key, value) if equals else True
        else:
            for key, value in read_file(arg).items():
                given[known(key, defaults, f'switch in {arg}')] = value
    given = {key: checked(key, value, defaults[key], key in per_user) for key, value in given.items()}
    row = {}
    if rows is not None:
        method = given.get('method', defaults['method'])
        row = rows[known(method, rows, 'method')]
    config = {**defaults, **row, **given}
    if asks:
        print(help_text(script, config))
        raise SystemExit(0)
    script.update(config)
    return config


def known(name: str, names: dict, what: str, dashes: str = '') -> str:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
        hint = f'did you mean {dashes}{near[0]}?' if near else f'known: {", ".join(names)}'
        die(f'unknown {what} {dashes}{name!s}; {hint}')
    return name


def parse(key: str, text: str) -> object:
    """The text of --key=text as a Python value; what is no literal is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def checked(key: str, value: object, default: object, per_user: bool) -> object:
    """value in its default's type, or death."""
    want, number = type(default), type(value) in (int, float)
    if per_user and type(value) in (tuple, list):
        return tuple(checked(key, entry, default, False) for entry in value)
    if want is float and number:
        value = float(value)
    if want is str and type(value) in KINDS and type(value) is not tuple:
        value = str(value)
    if type(value) is not want:
        example = f'{default!r}' + (f' or one value per user, such as {default},{default}' if per_user else '')
        die(f'--{key}={value!r}: expected {want.__name__}, such as {example}')
    if want is float and not math.isfinite(value):
        die(f'--{key}={value!r}: expected a finite number')
    return value


def read_file(file: str) -> dict:
    """The public variables that a config file sets. A config file is Python: run only your own."""
    if not file.endswith('.py'):
        die(f'{file!r} is neither a config file (*.py) nor a switch (--name=value)')
    values = {}
    try:
        exec(compile(Path(file).read_text(), file, 'exec'), values)
    except OSError as error:
        die(f'cannot read the config file {file}: {error.strerror}')
    except Exception as error:
        die(f'the config file {file} does not run: {type(error).__name__}: {error}')
    return {k: v for k, v in values.items() if not k.startswith('_')}


def help_text(script: dict, config: dict) -> str:
    """The script's docstring, and every switch with its value in `config` and what its source says beside and above it, as a
    config file could have it; a value that is not the default tells the default, too."""
    source = Path(script['__file__']).read_text()
    comments = {
        token.start[0]: token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    ends = {}  # the line on which the first assignment to a name ends
    for node in ast.parse(source).body:
        for name in node.targets if isinstance(node, ast.Assign) else ():
            ends.setdefault(getattr(name, 'id', None), node.end_lineno)
    width = max(len(f'{name} = {value!r}') for name, value in config.items())
    lines, at = [(script['__doc__'] or '').strip(), ''], 0
    for name, value in config.items():
        line = ends.get(name, at)
        lines += [comments[i] for i in range(at + 1, line) if comments.get(i, '').startswith('# --')]
        given = f'  (default: {script[name]!r})' if value != script[name] else ''
        lines.append(f'{f"{name} = {value!r}":{width}}  {comments.get(line, "")}'.rstrip() + given)
        at = line
    return '\n'.join(lines)
