"""Federations of real processes over Flower, on 127.0.0.1 with TLS and keys: what is promised of devices (docs/devices.md), in
the figures D1 to D8, which `pytest -m devices` prints. RELIABILITY=long makes them larger."""

import importlib.util
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import N_TRAIN, ROOT, TINY, same, trainer, user_streams, write_dataset

from devices import keys
from devices.loopback import Federation
from run import checkpoint

pytestmark = [
    pytest.mark.devices,
    pytest.mark.skipif(
        not importlib.util.find_spec('flwr'), reason='Flower is an extra: pip install -r requirements-devices.txt'
    ),
]
HOOKS = {'PYTHONPATH': os.pathsep.join([str(ROOT / 'tests/on_devices'), str(ROOT)])}
SPECIAL = 'a text that must not leave its device'


def federate(tiny, folder: Path, n: int = 3) -> Federation:
    """A server and n devices, that wait for a run; user 0's text ends with SPECIAL."""
    names = [f'u{i}' for i in range(n)]
    (folder / 'public.txt').write_text('the text that all may read ' * 10)
    streams = [user_streams(i, N_TRAIN[i % 3]) for i in range(n)]
    streams[0]['train'][-len(SPECIAL) :] = np.frombuffer(SPECIAL.encode(), np.uint8)
    write_dataset(folder / 'data', streams)
    for i, stream in enumerate(streams):
        write_dataset(folder / f'data{i}', [stream])
    keys.main([str(folder / 'keys'), *names])
    made = Federation(folder, [f'--init_from={tiny.base}', f'--public_text={folder}/public.txt'], names)
    made.server()
    return made


def begin(federation: Federation, *switches: str, deadline: float = 60, least: int | None = None) -> None:
    """A new run, in folders without an older one."""
    for name in ('server', *federation.names):
        for file in (federation.folder / name).glob('**/*'):
            if file.is_file() and 'flower' not in file.parts and file.name != '.lock':
                file.unlink()
    again(federation, *switches, deadline=deadline, least=least)


def again(federation: Federation, *switches: str, deadline: float = 60, least: int | None = None) -> None:
    """The run, from the beginning or from where it is."""
    if 'run' in federation.processes:
        federation.stop('run')
    how = (f'--deadline={deadline}', f'--least={least or len(federation.names)}')
    federation.run(*how, federation.argv[0], *TINY, '--device=cpu', *switches)


def end(federation: Federation, seconds: float = 120) -> None:
    federation.processes['run'].wait(seconds)
    assert federation.processes['run'].returncode == 0, federation.said('run')[-3000:]


def rounds(federation: Federation) -> list[dict]:
    return [line for line in federation.lines() if line['kind'] == 'round']


def until(what, seconds: float = 60) -> object:
    """What `what` returns, once it is true."""
    end = time.time() + seconds
    while not (found := what()):
        assert time.time() < end, what
        time.sleep(0.05)
    return found


def workers(federation: Federation, name: str) -> list[int]:
    """Processes that do the server's, or a device's, task of the moment: forks of Flower's superexec."""
    found = {}
    for file in Path('/proc').glob('[0-9]*/stat'):
        try:
            home = f'FLWR_HOME={federation.folder}/{name}/flower\0'.encode() in (file.parent / 'environ').read_bytes()
            line = (file.parent / 'cmdline').read_bytes()
            if home and b'flower-superexec' in line:
                found[int(file.parent.name)] = int(file.read_text().rpartition(')')[2].split()[1])
        except OSError:
            pass
    return [pid for pid, parent in found.items() if parent in found]


def simulated(tiny, federation: Federation, *switches: str):
    """The same run in the simulator."""
    run = trainer(tiny, federation.folder)
    return run(f'--dataset={federation.folder}/data', *switches, '--overwrite', '--quiet', out='simulator')


def differences(federation: Federation, run) -> list[str]:
    """What of a finished federation differs from the simulator: losses and bytes of every step, adapters, all of a user's
    state, the server's tensors, who trusted whom."""
    found, T = [], run.c.rounds
    for i, name in enumerate(federation.names):
        folder = federation.folder / name
        own = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
        kinds, whens = ('train', 'router', 'comm', 'fusion'), ('local', 'fused', 'aggregated', 'pretrained')
        lines = [
            sorted(json.dumps(line) for line in some if line['kind'] in kinds or line.get('when') in whens)
            for some in ([json.loads(json.dumps(line)) for line in own], [line for line in run.lines if line.get('user') == i])
        ]
        found += [f'lines of {name}'] * (lines[0] != lines[1])
        adapters = folder / 'adapters/user0.safetensors', run.out / f'adapters/user{i}.safetensors'
        found += [f'adapter of {name}'] * (not same(*(checkpoint.read(file)[0] for file in adapters)))
        states = [checkpoint.read(file) for file in (max((folder / 'checkpoint').glob(f'user{i}-*')), run.fleet.file(i))]
        tensors = {key: v for key, v in states[0][0].items() if not key.startswith('base/')}
        found += [f'state of {name}'] * (not same(tensors, states[1][0]))
    server = checkpoint.read(federation.folder / f'server/checkpoint/round-{T}.safetensors', 'server/')[0]
    found += ['server'] * (run.c.aggregate != 'flora' and not same(server, run.server))
    trust = [[line['matrix'] for line in some if line['kind'] == 'trust'] for some in (federation.lines(), run.lines)]
    return found + ['trust'] * (trust[0] != trust[1])


@pytest.fixture(scope='module')
def three(tiny, tmp_path_factory):
    """A federation of three; what device 2 sends is written down, and what may not leave it is marked where MARKED exists."""
    federation = federate(tiny, tmp_path_factory.mktemp('devices'))
    try:
        for i in range(3):
            federation.device(i)
        for name in federation.names:
            federation.wait_for(name, 'SuperNode ID')
        yield federation
    finally:
        federation.stop()
    assert not federation.left()


RULES = {
    'comigs_1gxs': ['--n_experts=3,1,2'],
    'pcl': [],
    'consensus': ['--consensus_start=1', '--judge_windows=4', '--public_text=PUBLIC'],
    'fedavg': [],
    'ffa_lora': [],
    'hetlora': ['--lora_rank=4,6,8', '--prune_coef=10'],
    'flexlora': ['--lora_rank=4,6,8'],
    'median': ['--method=comigs_1g1s', '--aggregate=median'],
    'flora': ['--lora_rank=4,6,8'],
    'fdlora': [],
    'local': [],
}
EQUAL = {}


@pytest.mark.parametrize('rule', [r if r in ('comigs_1gxs', 'pcl') else pytest.param(r, marks=pytest.mark.slow) for r in RULES])
def test_d1_devices_come_to_the_bits_of_the_simulator(rule, three, tiny, figure):
    switches = [arg.replace('PUBLIC', f'{three.folder}/public.txt') for arg in (f'--method={rule}', *RULES[rule])]
    switches = switches[rule == 'median' :]
    begin(three, *switches)
    end(three)
    EQUAL[rule] = differences(three, simulated(tiny, three, *switches))
    equal = [rule for rule, found in EQUAL.items() if not found]
    figure('D1', f'{len(equal)}/{len(EQUAL)} rules bit-equal to the simulator: {", ".join(equal)}', not EQUAL[rule])
