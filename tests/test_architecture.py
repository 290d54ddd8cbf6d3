"""Which room imports which: the table of docs/architecture.md, held against the code."""

import ast
import re

from conftest import ROOT


def rooms_of(name: str) -> str:
    """The row that a file of the project belongs to."""
    return name if name in TABLE else name.split('/')[0] + '/'


def files(pattern: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern) if '.venv' not in path.parts}


CODE = files('*.py') | files('data/*.py') | files('run/*.py') | files('tools/*.py') | files('devices/*.py')
ROWS = re.findall(r'^\| `([^|]*)` \|(.*)\|$', (ROOT / 'docs/architecture.md').read_text(), re.M)
TABLE = {room: set(re.findall(r'`([^`]+)`', allowed)) for room, allowed in ROWS}
TABLE['tools/'] |= TABLE['eval.py']
TABLE['devices/'] |= TABLE['train.py']


def imports(file: str) -> set[str]:
    """Files of the project that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    paths = {name.replace('.', '/') + '.py' for name in names}
    paths |= {f'{file.split("/")[0]}/{name}.py' for name in names if '/' in file and '.' not in name}  # beside itself
    return {path for path in paths if (ROOT / path).exists()}


def test_every_file_of_the_code_is_in_a_room_and_imports_what_it_may():
    assert {rooms_of(file) for file in CODE} == TABLE.keys()
    for file in sorted(CODE):
        for other in sorted(imports(file) - {file}):
            allowed = TABLE[rooms_of(file)]
            assert other in allowed or other.split('/')[0] + '/' in allowed, f'{file} imports {other}'


def test_a_device_needs_nothing_of_the_simulation():
    reached, waiting = set(), ['user.py']
    for file in waiting:
        reached.add(file)
        waiting += [other for other in imports(file) if other not in reached]
    assert reached == {'user.py', 'federate.py', 'lora_moe.py', 'model.py', 'data/stream.py'}


def test_what_leaves_is_asked_for_in_one_place():
    """`ask` calls upload, judge and predict by name; no other product code does (train.py and federate.py ask), but for
    devices/client.py, about its own user."""
    for file in CODE - {'user.py', 'devices/client.py'}:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            called = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ''
            assert called not in ('upload', 'judge', 'predict'), (file, node.lineno)


def test_flower_is_an_extra():
    for file in CODE:
        if not file.startswith('devices/'):
            assert not re.search(r'\bimport flwr|from flwr', (ROOT / file).read_text()), file
