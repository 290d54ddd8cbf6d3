"""configurator.py and config/default.py: what a command line may say, one line for what it may not, and the tables of both."""

import ast
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, refused
from tqdm import tqdm

from config.default import COLUMNS, FIT, GONE, LEGAL, METHODS, MUST, PATHS, PER_USER
from configurator import (
    SWITCHES,
    checked,
    configure,
    die,
    fit,
    folder_of,
    home,
    list_methods,
    parser,
    read_config,
    read_json,
    table,
    to_json,
)
from model import load_gpt


def settle(argv: list[str], N: int, n_positions: int):
    return fit(configure(argv), N, n_positions)


# ---- what is taken ---------------------------------------------------------------------------------------------------
TYPED = ['7', '2024_01', '1e3', '007', 'None', 'True', "'x'", '"x"', '[1,2]', '(1)', '{}', ' x ', '0x10', '-', '#1', "b'x'"]


@pytest.mark.parametrize(
    'argv, expected',
    [
        ([], dict(SWITCHES)),
        (['--method=fedavg'], dict(n_generalists=2, router='mean')),  # the method's row beats the default
        (['--method=fedavg', '--router=learned'], dict(n_generalists=2, router='learned')),  # a switch beats the row
        (['--router=learned', '--method=fedavg'], dict(router='learned')),  # whatever the order
        (['--method=centralized'], dict(pooled=True)),  # a row may set more than its columns
        (['--n_experts=4,2,2,2'], dict(n_experts=(4, 2, 2, 2))),
        (['--n_experts=(4,2)'], dict(n_experts=(4, 2))),
        (['--lora_rank=[4,2]'], dict(lora_rank=(4, 2))),
        (['--n_experts=3'], dict(n_experts=3)),
        (['--expert_lr=1'], dict(expert_lr=1.0)),  # an int stands for a float
        (['--expert_lr=1e-4'], dict(expert_lr=1e-4)),
        (['--out_dir=a=b'], dict(out_dir='a=b')),  # '=' inside a value
        *(([f'--{k}={text}'], {k: text}) for k in ('out_dir', 'dataset', 'init_from') for text in TYPED),
        (['--public_text='], dict(public_text='')),
        (['--resume=False'], dict(resume=False)),
        (['--resume'], dict(resume=True)),
    ],
)
def test_good(argv, expected):
    config = vars(configure(argv))
    assert list(config) == list(SWITCHES)  # every switch, in the order of config/default.py, and nothing else
    assert {k: config[k] for k in expected} == expected
    assert all(type(config[k]) is type(v) for k, v in expected.items())


def test_files_and_switches_in_a_row(tmp_path):
    """Later ones win; a file may compute, and its private names are its own business."""
    (tmp_path / 'a.py').write_text('_half = 3\nrounds = 2 * _half\nexpert_lr = 1\n')
    (tmp_path / 'b.py').write_text('rounds = 7\nn_experts = (4, 2)\nmethod = "comigs_1gxs"\n')
    a, b = str(tmp_path / 'a.py'), str(tmp_path / 'b.py')
    assert configure([a]).rounds == 6 and configure([a]).expert_lr == 1.0
    assert configure([a, b]).rounds == 7 and configure([b, a]).rounds == 6
    assert configure([a, b, '--rounds=8']).rounds == configure(['--rounds=8', a]).rounds + 2 == 8
    assert configure([b]).n_experts == (4, 2)  # not the row's


PYTHON = """from __future__ import annotations
import time, os.path
import tensorboard_of_nobody as wandb
from pathlib import Path
from math import sqrt as root, inf as _inf
def double(n): return 2 * n
class Mine: pass
half = lambda n: n // 2
_here = Path('.')
_sizes = [_i for _i in range(3)]
rounds = double(3) + half(2) + len(_sizes)
"""


def test_files_that_are_python(tmp_path, monkeypatch):
    """What is imported or defined is no switch; the encoding is what Python says it is."""
    monkeypatch.setitem(sys.modules, 'tensorboard_of_nobody', re)
    file = tmp_path / 'c.py'
    for source in (PYTHON, PYTHON.replace('\n', '\r\n'), '\ufeff' + PYTHON, 'rounds = 10  # \u5f20', ''):
        file.write_bytes(source.encode())
        assert vars(configure([str(file)])) == {**vars(configure([])), 'rounds': 10 if source else 20}
    file.write_bytes('# -*- coding: latin-1 -*-\ndataset = "\xe9"'.encode('latin-1'))
    assert configure([str(file)]).dataset == '\xe9'


def test_the_shipped_files_load():
    files = [file for file in sorted((ROOT / 'config').glob('*.py')) if file.name != 'default.py']
    assert len(files) >= 5
    for file in files:
        assert vars(configure([str(file)])) != SWITCHES


def test_what_a_fit_makes_of_it():
    c = settle(['--n_experts=3,1,2'], N=3, n_positions=128)
    assert c.n_experts == (3, 1, 2) and c.lora_rank == (8, 8, 8)


def test_home_is_spelt_out(monkeypatch, tmp_path):
    """In every switch that is a path, from the command line and from files, and in every path of a command in tools/."""
    monkeypatch.setenv('HOME', '/home/me')
    (tmp_path / 'c.py').write_text('dataset = "~/text"\nout_dir = "~"')
    c = configure([str(tmp_path / 'c.py'), '--init_from=~/base', '--aggregate=consensus', '--n_generalists=0',
                   '--share_attention=False', '--public_text=~/all.txt'])  # fmt: skip
    assert (c.dataset, c.out_dir, c.init_from, c.public_text) == (
        '/home/me/text',
        '/home/me',
        '/home/me/base',
        '/home/me/all.txt',
    )
    assert configure(['--init_adapter=~/peft']).init_adapter == '/home/me/peft'
    for text in ('~nobody-of-that-name/x', 'a~', './~', 'a/~/b'):
        assert configure([f'--out_dir={text}']).out_dir == text
    for key, value in SWITCHES.items():
        if type(value) is str and key not in PATHS:
            assert checked(key, '~', value, False) == '~'
    options = parser('')
    options.add_argument('run', type=Path)
    options.add_argument('--base', type=home)
    given = options.parse_args(['~/run', '--base=~/base'])
    assert (given.run, given.base) == (Path('/home/me/run'), '/home/me/base')
    for file in (ROOT / 'eval.py', *(ROOT / 'tools').glob('*.py')):
        for line in re.findall(r"add(?:_argument)?\('(?:--)?(?:run|runs|dir|given|out|base|init_from)'.*", file.read_text()):
            assert 'type=Path' in line or 'type=home' in line, (file.name, line)


# ---- the tables of config/default.py ---------------------------------------------------------------------------------
@pytest.mark.parametrize('method', METHODS)
def test_every_row_of_the_tables_holds_for_every_method(method):
    c = vars(settle([f'--method={method}'], N=4, n_positions=1024))
    for names, legal in LEGAL.items():
        for x in (c[name] for name in names.split()):
            assert x in legal if isinstance(legal, tuple) else eval(legal, {'x': x}), (names, x)
    for condition in [*MUST, *FIT]:
        assert eval(condition, {'fullmatch': re.fullmatch}, {**c, 'N': 4, 'n_positions': 1024}), condition
    row, where, what, *more = METHODS[method]
    assert len(row) == len(COLUMNS) and where in ('T1', 'T2', 'T4', '-') and len(what) < 50
    assert {k: c[k] for switches in more for k in switches} == dict(*more)


RULED = [(name, legal) for names, legal in LEGAL.items() for name in names.split()]


@pytest.mark.parametrize('name, legal', RULED, ids=[name for name, _ in RULED])
def test_every_row_of_LEGAL_is_enforced(name, legal, capsys):
    default = SWITCHES[name]
    if isinstance(legal, tuple):
        assert default in legal
        assert f'--{name}=nonsense: expected one of {", ".join(legal)}' in refused(capsys, configure, [f'--{name}=nonsense'])
        return
    some = [''] if type(default) is str else map(type(default), (-1, 0, 0.5, 2, 1e9))
    outside = [x for x in some if not eval(legal, {'x': x})]
    assert outside and eval(legal, {'x': default})
    for x in outside:
        assert f'--{name}={x}: expected {legal.replace("x", name)}' in refused(capsys, configure, [f'--{name}={x}'])


ELSEWHERE = {  # switches that are neither in LEGAL nor True or False: what looks at them
    'method': 'configure, in METHODS',
    **dict.fromkeys(PER_USER, 'fit, for every user'),
    'attack': 'a row of MUST',
    'init_adapter': "'' is none; run/adapter.py reads the folder",
    'public_text': "'' is none; data/stream.py reads the file",
    'device': 'model.usable, which asks the machine',
}


def test_every_switch_is_looked_at():
    ruled = [name for name, _ in RULED]
    assert len(ruled) == len(set(ruled)) and not {*ruled} & ELSEWHERE.keys()
    assert SWITCHES.keys() - {*ruled} - ELSEWHERE.keys() == {k for k, v in SWITCHES.items() if type(v) is bool}


EXTREME = [
    '',
    '-1',
    '-0.1',
    '0',
    '0.0',
    '1e-320',
    '1e299',
    '-1e299',
    '1e300',
    '1e999',
    'nan',
    '-inf',
    '9' * 400,
    '0x' + 'f' * 5000,
]
EXTREME += ['None', '()', '[]', '{}', '[nan]', '1j', 'x' * 300, '...', '-', '=', '/dev/null', '\u5f20', '0' * 5000]


@pytest.mark.parametrize('name', SWITCHES)
def test_extreme_values_are_taken_or_refused_in_one_line(name, capsys):
    for text in EXTREME:
        try:
            settle([f'--{name}={text}', '--block_size=16'] if name != 'block_size' else [f'--{name}={text}'], 3, 32)
        except SystemExit as end:
            err = capsys.readouterr().err
            assert end.code == 2 and err.count('\n') == 1 and name in err, (text, err)


def test_what_is_legal_runs(train, capsys):
    """The largest and the least legal values of all numbers at once: a result, or one line about a loss that is no number."""
    longer = (
        'rounds',
        'local_steps',
        'router_every',
        'router_steps',
        'block_size',
        'batch_size',
        'n_generalists',
        'test_users',
    )
    most, least = {}, {}
    for name, legal in RULED:
        if type(SWITCHES[name]) in (int, float) and name not in longer:
            values = [
                x for x in map(type(SWITCHES[name]), (0, 1, 1e-300, 0.4, 65536, 999999999, 1e298)) if eval(legal, {'x': x})
            ]
            most[name], least[name] = max(values), min(values)
    assert {most['weight_decay'], most['expert_lr']} == {999999999} and least['router_lr'] == 1e-300 and least['lb_coef'] == 0
    for values in (most, least, most | {'expert_lr': 1e-3, 'weight_decay': 0.0, 'lora_alpha': 16.0, 'lb_coef': 0.0}):
        values = {**values, 'failures': 0.0, 'participation': 1.0, 'rounds': 2, 'local_steps': 1, 'router_every': 1}
        try:
            train(*(f'--{name}={value}' for name, value in values.items()), '--batch_size=2', '--method=pcl', '--clip_norm=0',
                  '--router=learned', '--overwrite', '--quiet')  # fmt: skip
        except SystemExit as end:
            assert 'loss is' in end.code, end.code


BROKEN = [  # an example for every row of MUST, in their order
    ['--attack=scale'],
    ['--aggregate=consensus'],
    ['--method=local', '--aggregate=median'],
    ['--method=pcl', '--clip_norm=1'],
    ['--aggregate=fdlora', '--n_generalists=0'],
    ['--method=centralized', '--eval_valid=True'],
    ['--method=fdlora', '--failures=0.1'],
    ['--ghost_noise=8', '--micro_batch_size=1'],
    ['--method=local', '--init_adapter=folder'],
    ['--public_text=file.txt'],
]
UNFIT = [  # and of FIT, for 3 users and a base of 32 positions
    ['--block_size=33'],
    ['--test_users=4'],
    ['--method=fedavg', '--n_experts=2,1,2'],
    ['--method=hetlora', '--n_experts=4,2,2'],
    ['--method=ffa_lora', '--lora_rank=4,8,8'],
    ['--method=flexlora', '--lora_rank=4,8,8', '--init_adapter=folder'],
]
EXAMPLES = [(argv, row, False) for argv, row in zip(BROKEN, MUST.items(), strict=True)]
EXAMPLES += [(['--block_size=16', *argv], row, True) for argv, row in zip(UNFIT, FIT.items(), strict=True)]


@pytest.mark.parametrize('argv, row, fits', EXAMPLES, ids=[' '.join(argv) for argv, _, _ in EXAMPLES])
def test_every_row_between_switches_is_enforced(argv, row, fits, capsys):
    """The line names the switches that the row speaks of, with their values, and says why."""
    condition, why = row
    err = refused(capsys, settle, argv, 3, 32) if fits else refused(capsys, configure, argv)
    named, _, reason = err.partition(': ')[2].partition(': ')
    assert reason.split() == why.split()
    given = dict(arg[2:].split('=') for arg in argv if arg[2:].split('=')[0] in condition)
    assert given and all(f'--{name}={value}' in re.sub(r'\.0\b', '', named) for name, value in given.items()), named
    spoken = re.findall(r'(\w+)=', named)
    assert {*spoken} == {name for name in re.findall(r'\w+', condition) if name in {**SWITCHES, 'N': 0, 'n_positions': 0}}


@pytest.mark.parametrize('argv', [['--n_experts=4,2'], ['--n_experts=0'], ['--lora_rank=8,8,5000'], ['--lora_rank=1,2,3,4']])
def test_an_entry_for_each_user(argv, capsys):
    assert f'{argv[0].split("=")[0]}=' in (err := refused(capsys, settle, argv, 3, 1024))
    assert 'expected one value from 1 to 4096, or 3, one per user of demo' in err


def test_what_replaces_switches_of_before(capsys, tmp_path):
    (tmp_path / 'old.py').write_text('fuse = True')
    for name in ('match', 'fuse', 'tensorboard', 'wandb'):
        assert f'--{name} is no switch any more: {GONE[name]}' in refused(capsys, configure, [f'--{name}=full'])
        assert GONE[name] in refused(capsys, configure, [f'--{name}'])
    assert GONE['fuse'] in refused(capsys, configure, [str(tmp_path / 'old.py')])
    assert not GONE.keys() & SWITCHES.keys()
    for switches in re.findall(r'--\w+=[\w,]+', ' '.join(GONE.values())):  # what they recommend is taken
        configure(['--method=flexlora' if 'rank' in switches else '--method=fdlora', switches])


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'argv, message',
    [
        (['--ronuds=3'], 'unknown switch --ronuds; did you mean --rounds?'),
        (['--n_expert=2'], 'unknown switch --n_expert; did you mean --n_experts?'),
        (['--zzz=3'], 'unknown switch --zzz; known: method, dataset'),
        (['--ast=1'], 'unknown switch --ast'),
        (['--METHODS=1'], 'unknown switch --METHODS'),
        (['--method=comigs_1g1'], 'unknown method comigs_1g1; did you mean comigs_1g1s?'),
        (['--rounds=2.5'], '--rounds=2.5: expected int, such as 20'),
        (['--rounds=True'], '--rounds=True: expected int'),
        (['--rounds=wide'], "--rounds='wide': expected int"),
        (['--rounds=3,4'], '--rounds=(3, 4): expected int'),  # not a per-user switch
        (['--n_experts=4,x'], 'expected int, such as 2'),
        (['--expert_lr=1e999'], 'expected a finite number'),
        (['--resume=maybe'], 'expected bool, such as False'),
        (['--rounds'], '--rounds=True: expected int'),
        (['--method=[1]'], 'unknown method [1]; known: pretrained'),
        (['--out_dir'], "--out_dir=True: expected str, such as 'out/run'"),
        (['--public_text'], "--public_text=True: expected str, such as ''"),
        (['rounds=3'], 'neither a config file (*.py) nor a switch'),
        (['notes.txt'], 'neither a config file'),
        (['missing.py'], 'cannot read the config file missing.py'),
    ],
)
def test_bad(argv, message, capsys):
    assert message in refused(capsys, configure, argv)


@pytest.mark.parametrize(
    'text, message',
    [
        ('ronuds = 3', 'did you mean rounds?'),
        ('rounds = "3"', "--rounds='3': expected int"),
        ('out_dir = [1, 2]', '--out_dir=[1, 2]: expected str'),
        ('dataset = None', '--dataset=None: expected str'),
        ('rounds = ', 'does not run: SyntaxError'),
        ('rounds = 1 / 0', 'does not run: ZeroDivisionError'),
        ('for i in range(3):\n    rounds = i', 'c.py: i; known: method'),
        ('from math import pi', 'c.py: pi; known: '),
        ('round = 3', 'did you mean rounds? (a name that is no switch begins with _: _round)'),
        ('rounds = max', '--rounds=<built-in function max>: expected int, such as 20'),
        ('import math as rounds', 'expected int, such as 20'),
        ('name = "é"'.encode('latin-1'), 'does not run: SyntaxError'),
        (b'rounds = 3\0', 'does not run: '),
        ('raise SystemExit', 'does not run: SystemExit'),
        ('import sys\nsys.exit(0)', 'does not run: SystemExit: 0'),
        ('raise KeyboardInterrupt', 'does not run: KeyboardInterrupt'),
        ('def f():\n    f()\nf()', 'does not run: RecursionError'),
        ('open("no such file")', 'does not run: FileNotFoundError'),
        ('(' * 500, 'does not run: '),
        ('x = ' + '-' * 100_000 + '1', 'does not run: '),
        (None, 'cannot read the config file'),  # a folder
    ],
)
def test_bad_files(text, message, tmp_path, capsys):
    file = tmp_path / 'c.py'
    if text is None:
        file.mkdir()
    else:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refused(capsys, configure, [str(file)])


def test_one_line_for_each_machine(capsys, monkeypatch):
    """However many processes find the same; line breaks within a message become spaces."""
    assert refused(capsys, die, 'a\n  b').endswith(': a b\n')
    monkeypatch.setenv('LOCAL_RANK', '1')
    with pytest.raises(SystemExit):
        die('a')
    assert not capsys.readouterr().err


# ---- what is shown ---------------------------------------------------------------------------------------------------
def shown(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        configure([*argv], 'Says what it does.')
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_has_every_switch_and_nothing_else(capsys):
    text = shown(capsys, '--help')
    assert text.startswith('Says what it does.\n\n')
    assert re.findall(r'^(\w+) = ', text, re.M) == list(SWITCHES)
    assert all(re.search(rf'^{name} = .* # ', text, re.M) for name in SWITCHES), 'a switch without a comment beside it'
    assert 'router_every = 30 ' in text and '\n# ---- the schedule\n' in text
    assert shown(capsys, '-h') == shown(capsys, '--help=foo') == text


def test_help_tells_what_would_be_set(capsys, tmp_path):
    """The values that a method, a file and switches make; beside a value that is not the default, the default."""
    (tmp_path / 'mine.py').write_text('rounds = 6')
    lines = shown(capsys, '--method=fedavg', '--n_experts=4,2', str(tmp_path / 'mine.py'), '--help').splitlines()
    line = {text.split(' = ')[0]: text for text in lines if ' = ' in text}
    assert re.fullmatch(r"method = 'fedavg' +# a row .*  \(default: 'comigs_1g1s'\)", line['method'])
    assert re.fullmatch(r'n_experts = \(4, 2\) +# .*  \(default: 2\)', line['n_experts'])
    assert re.fullmatch(r'rounds = 6 +# .*  \(default: 20\)', line['rounds'])
    assert line['n_generalists'].endswith('(default: 1)') and line['router'].startswith("router = 'mean'")
    assert 'default:' not in line['local_steps']


def test_every_method_is_listed(capsys):
    listed = shown(capsys, '--list_methods')
    assert listed == shown(capsys, '--rounds=3', '--list_methods') == list_methods() + '\n'
    assert [line.split()[0] for line in listed.splitlines()[2:]] == list(METHODS)
    assert 'consensus' in listed and '2305.18497' in listed and 'Table' in listed


def test_a_command_of_tools_is_as_strict(capsys):
    options = parser('What it is.\n\n    python tools/x.py RUN')
    options.add_argument('--device')
    assert 'What it is.\n\n    python tools/x.py RUN' in options.format_help()
    for argv in (['--dev=cpu'], ['--device'], ['more']):  # no abbreviations
        refused(capsys, options.parse_args, argv)


# ---- terminals, logs and pipes ---------------------------------------------------------------------------------------
SAYS = 'import sys; from configurator import parser, configure, die; {begin}; {says}'


@pytest.mark.parametrize(
    'says, out, err',
    [
        ("print('a')", True, False),  # is written when Python ends
        ("print('a', flush=True); 1 / 0", True, False),
        ("sys.exit(print('a'))", True, False),
        ("[print('a' * 99) for i in range(9999)]", True, False),
        ("exec('try: print(1, flush=True)\\nexcept OSError as error: die(error)')", True, False),
        ("die('a')", False, True),
        ("from tqdm import tqdm; [*tqdm(range(9))]; print('never seen')", False, True),
        ("print('a'); die('a')", True, True),
    ],
)
@pytest.mark.parametrize('unbuffered', [False, True])
def test_a_pipe_that_nobody_reads_ends_a_command_quietly(says, out, err, unbuffered):
    read, write = os.pipe()
    os.close(read)
    streams = {'stdout': write if out else subprocess.PIPE, 'stderr': write if err else subprocess.PIPE}
    for begin in ("parser('')", 'configure([])')[: 2 - unbuffered]:
        code = SAYS.format(begin=begin, says=says)
        done = subprocess.run([sys.executable, *['-u'] * unbuffered, '-c', code], cwd=ROOT, **streams)
        assert (done.returncode, done.stdout or b'', done.stderr or b'') == (141, b'', b'')
    os.close(write)


def test_what_a_terminal_cannot_encode_ends_nothing(monkeypatch):
    for encoding in ('cp1252', 'ascii', 'utf-8', 'utf-16'):
        for errors in ('strict', 'surrogateescape'):
            streams = [io.TextIOWrapper(io.BytesIO(), encoding, errors) for _ in range(2)]
            for name, stream in zip(('stdout', 'stderr'), streams):
                monkeypatch.setattr(sys, name, stream)
            (parser if errors == 'strict' else configure)([])
            print('\u5f20\u4e09', '\udcff')
            for _ in tqdm(range(2), desc='\u674e\u56db \ud800'):
                tqdm.write('\u2028 \u5f20')
            with pytest.raises(SystemExit):
                die('no \u5f20')
            for stream in streams:
                stream.flush()
                assert stream.buffer.getvalue()
    assert b'\\udcff' in streams[0].buffer.getvalue() or encoding != 'ascii'
    for stream in (io.StringIO(), None):  # a notebook's, and none
        monkeypatch.setattr(sys, 'stdout', stream)
        configure([])


CODE = [file for folder in ('', 'config', 'data', 'docs', 'run', 'tools') for file in sorted((ROOT / folder).glob('*.py'))]


def test_every_command_begins_so_and_every_file_is_opened_in_utf8():
    commands = 0
    for file in CODE:
        source = file.read_text(encoding='utf-8')
        if "__name__ == '__main__'" in source:
            commands += 1
            assert re.search(r'\b(parser|configure|steady_output|read_options)\(', source), file
        for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
            said = ast.unparse(call)
            if ast.unparse(call.func).split('.')[-1] in ('open', 'read_text', 'write_text'):
                binary = re.search(r"'[rwa]b\+?'", said) or said.startswith(('os.open', 'journal.open'))
                assert binary or 'encoding' in [keyword.arg for keyword in call.keywords], (file.name, said)
    assert commands >= 12


def test_json_that_everybody_reads(tmp_path):
    odd = {'a': math.nan, 'b': [1.5, -math.inf, (math.inf, 'x', None, True)], 'c': {'d': 7}}
    assert json.loads(to_json(odd)) == {'a': None, 'b': [1.5, None, [None, 'x', None, True]], 'c': {'d': 7}}
    for text in ('', '[]', '{', '3', 'null', '{"a": 1}', '[' * 100_000, None):
        if text is not None:
            (tmp_path / 'x.json').write_text(text)
        else:
            (tmp_path / 'x.json').write_bytes(b'\xff')
        with pytest.raises(ValueError, match='x.json cannot be read'):
            read_json(tmp_path / 'x.json', 'b')


RUN = {'method': 'local', 'users': ['a', 'b'], 'tested': [1], 'base_sha256': 'x', 'n_experts': [1, 2]}


@pytest.mark.parametrize(
    'change', [{}, {'n_experts': 2}, {'expert_lr': 1}, {'pooled': True, 'n_experts': [2]}, {'of later': []}]
)
def test_a_config_that_a_run_wrote(change, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(RUN | change))
    assert read_config(tmp_path).items() >= (RUN | change | {'top_k': 2}).items()


WRONG = [{'users': x} for x in ([], {}, 'ab', 3, None, [1], ['a', None])] + [
    {'tested': x} for x in (1, [2], ['a'], [-1], [[0]])
]
WRONG += [{'n_experts': x} for x in ('2', [1], ['1', 2], None, 2.0)] + [{'block_size': '16'}, {'pooled': 1}, {'router': None}]


@pytest.mark.parametrize('change', [*WRONG, {'expert_lr': 'x'}, {'seed': True}, {'dataset': ['a']}, {'lora_rank': {}}])
def test_a_config_that_no_run_wrote(change, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(RUN | change))
    with pytest.raises(ValueError, match='config.json is not that of a run: '):
        read_config(tmp_path)


def test_table_layout():
    text = table(['a', 'long name'], [['x', 1.23456], ['yy', None]])
    assert text.splitlines() == ['a   long name', '-------------', 'x       1.235', 'yy          -']


def test_a_data_set_is_found_from_every_folder(tmp_path, monkeypatch):
    """A plain name is the project's own data/NAME, with a slash it is a path; assets/ are the project's, too."""
    monkeypatch.chdir(tmp_path)
    for typed, folder in (
        ('mine', ROOT / 'data' / 'mine'),
        ('./mine', Path('mine')),
        ('a/b', Path('a/b')),
        ('/a/b', Path('/a/b')),
    ):
        assert folder_of(typed) == folder
    assert load_gpt('assets/base-tiny.safetensors').config.vocab_size == 257
    with pytest.raises(ValueError, match="no base model at 'nowhere'"):
        load_gpt('nowhere')
    (tmp_path / 'assets').mkdir()
    (tmp_path / 'assets' / 'base-tiny.safetensors').touch()
    with pytest.raises(ValueError, match='assets/base-tiny.safetensors cannot be read'):  # the one that is meant
        load_gpt('assets/base-tiny.safetensors')
