"""configurator.py: nanoGPT's idea, its gaps closed (what it takes, and one line for what it does not)."""

import re
import runpy
import sys

import pytest
from conftest import ROOT

from configurator import configure

ROWS = {'small': dict(width=1), 'large': dict(width=9, share=False)}


def script() -> dict:
    """What globals() of a script holds when it calls configure: switches, and things that are none."""
    return {
        '__name__': '__main__',
        'method': 'small',
        'width': 5,
        'rate': 2e-3,
        'share': True,
        'name': 'x',
        'n_experts': 2,
        'os': pytest,
        'ROWS': ROWS,
    }


def run(*argv: str) -> dict:
    scope = script()
    config = configure(scope, list(argv), ROWS, per_user=('n_experts',))
    assert config == {k: scope[k] for k in config}  # the script's variables are the configuration
    assert list(config) == ['method', 'width', 'rate', 'share', 'name', 'n_experts']
    return config


@pytest.mark.parametrize(
    'argv, expected',
    [
        ([], dict(width=1, rate=2e-3)),  # the method's row beats the default
        (['--method=large'], dict(width=9, share=False)),
        (['--method=large', '--width=3'], dict(width=3, share=False)),  # a switch beats the row
        (['--width=3', '--method=large'], dict(width=3)),  # whatever the order
        (['--n_experts=4,2,2,2'], dict(n_experts=(4, 2, 2, 2))),
        (['--n_experts=(4,2)'], dict(n_experts=(4, 2))),
        (['--n_experts=3'], dict(n_experts=3)),
        (['--rate=1'], dict(rate=1.0)),  # an int stands for a float
        (['--rate=1e-4'], dict(rate=1e-4)),
        (['--name=a=b'], dict(name='a=b')),  # '=' inside a value
        (['--name=7'], dict(name='7')),
        (['--name='], dict(name='')),
        (['--share=False'], dict(share=False)),
        (['--share'], dict(share=True)),
    ],
)
def test_good(argv, expected):
    config = run(*argv)
    assert {k: config[k] for k in expected} == expected
    assert all(type(config[k]) is type(v) for k, v in expected.items())


def test_files_and_switches_in_a_row(tmp_path):
    """Later ones win; a file may compute, and its private names are its own business."""
    (tmp_path / 'a.py').write_text('_half = 3\nwidth = 2 * _half\nrate = 1\n')
    (tmp_path / 'b.py').write_text('width = 7\nn_experts = (4, 2)\n')
    a, b = str(tmp_path / 'a.py'), str(tmp_path / 'b.py')
    assert run(a)['width'] == 6 and run(a)['rate'] == 1.0
    assert run(a, b)['width'] == 7 and run(b, a)['width'] == 6
    assert run(a, b, '--width=8')['width'] == run('--width=8', a)['width'] + 2 == 8
    assert run(b)['n_experts'] == (4, 2)


@pytest.mark.parametrize(
    'argv, message',
    [
        (['--widht=3'], 'unknown switch --widht; did you mean --width?'),
        (['--zzz=3'], 'unknown switch --zzz; known: method, width'),
        (['--os=1'], 'unknown switch --os'),
        (['--method=smal'], 'unknown method smal; did you mean small?'),
        (['--width=2.5'], '--width=2.5: expected int, such as 5'),
        (['--width=True'], '--width=True: expected int'),
        (['--width=wide'], "--width='wide': expected int"),
        (['--width=3,4'], '--width=(3, 4): expected int'),  # not a per-user switch
        (['--n_experts=4,x'], 'expected int, such as 2'),
        (['--rate=1e999'], 'expected a finite number'),
        (['--share=maybe'], 'expected bool, such as True'),
        (['--width'], '--width=True: expected int'),
        (['--name=[1,2]'], 'expected str'),
        (['width=3'], 'neither a config file (*.py) nor a switch'),
        (['missing.py'], 'cannot read the config file missing.py'),
    ],
)
def test_bad(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        run(*argv)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count('\n') == 1 and message in err


@pytest.mark.parametrize(
    'text, message',
    [
        ('widht = 3', 'did you mean width?'),
        ('width = "3"', "--width='3': expected int"),
        ('width = ', 'does not run: SyntaxError'),
        ('width = 1 / 0', 'does not run: ZeroDivisionError'),
        ('import math\nwidth = 3', 'unknown switch in'),
    ],
)
def test_bad_files(text, message, tmp_path, capsys):
    (tmp_path / 'c.py').write_text(text)
    with pytest.raises(SystemExit) as exit:
        run(str(tmp_path / 'c.py'))
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count('\n') == 1 and message in err


def test_every_shipped_config_names_known_switches():
    import ast

    source = (ROOT / 'train.py').read_text().partition('configure(globals()')[0]
    tree = ast.parse(source.rpartition('\nconfig = ')[0])
    known = {t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets}
    files = sorted((ROOT / 'config').glob('*.py'))
    assert len(files) >= 5
    for file in files:
        values = {}
        exec(file.read_text(), values)
        assert {k for k in values if not k.startswith('_')} <= known, file


@pytest.mark.parametrize('file', ['train.py', 'pretrain.py'])
def test_help_has_every_switch_and_nothing_else(file, monkeypatch, capsys):
    """The names that configure takes, in a refusal's own words, are those that --help prints, in their order."""

    def says(argument, code):
        monkeypatch.setattr(sys, 'argv', [file, argument])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / file), run_name='__main__')
        assert end.value.code == code
        return capsys.readouterr()

    known = says('--zzzzzz=1', 2).err.strip().partition('known: ')[2].split(', ')
    text = says('--help', 0).out
    assert re.findall(r'^(\w+) = ', text, re.M) == known and len(known) >= 16
    assert all(re.search(rf'^{name} = .* # ', text, re.M) for name in known), 'a switch without a comment beside it'
    assert says('-h', 0).out == says('--help=foo', 0).out == text


def test_help_tells_what_would_be_set(tmp_path, capsys):
    """Values over several lines, '#' in a string, no comment; the defaults, and what a method and a file make of them."""
    source = """# ---- sizes
method = 'small'  # a row
sizes = (
    1,  # not this one
    2,
)  # of both
# an aside
width = 5
# ---- the rest
name = 'a # b'   # whose
config = configure(globals(), [])
width = 7  # not this one
# ---- the code
"""
    (tmp_path / 'script.py').write_text(source)
    (tmp_path / 'mine.py').write_text('width = 6')
    rows = {'small': {}, 'large': {'name': 'x'}}
    scope = {'__doc__': 'Says what it does.', '__file__': str(tmp_path / 'script.py'), 'method': 'small', 'sizes': (1, 2)}
    scope |= {'width': 5, 'name': 'a # b'}

    def shown(*argv):
        with pytest.raises(SystemExit) as end:
            configure(scope, [*argv, '--help'], rows)
        assert end.value.code == 0
        return capsys.readouterr().out.splitlines()

    assert shown() == [
        'Says what it does.',
        '',
        '# ---- sizes',
        "method = 'small'  # a row",
        'sizes = (1, 2)    # of both',
        'width = 5',
        '# ---- the rest',
        "name = 'a # b'    # whose",
    ]
    assert shown('--method=large', str(tmp_path / 'mine.py'))[3:] == [
        "method = 'large'  # a row  (default: 'small')",
        'sizes = (1, 2)    # of both',
        'width = 6  (default: 5)',
        '# ---- the rest',
        "name = 'x'        # whose  (default: 'a # b')",
    ]
