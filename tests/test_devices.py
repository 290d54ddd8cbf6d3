"""Federations of real processes over Flower, on 127.0.0.1 with TLS and keys: what is promised of devices (docs/devices.md), in
the figures D1 to D8, which `pytest -m devices` prints. RELIABILITY=long makes them larger."""

import http.client
import importlib.util
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import LONG, N_TRAIN, ROOT, TINY, lookups, same, trainer, user_streams, write_dataset

from devices import keys
from devices.loopback import Federation
from run import checkpoint
from run.fleet import Fleet
from tools import export

pytestmark = [
    pytest.mark.devices,
    pytest.mark.skipif(
        not importlib.util.find_spec('flwr'), reason='Flower is an extra: pip install -r requirements-devices.txt'
    ),
]
HOOKS = {'PYTHONPATH': os.pathsep.join([str(ROOT / 'tests/on_devices'), str(ROOT)])}
SPECIAL = 'a text that must not leave its device'


def federate(tiny, folder: Path, n: int = 3, begin: bool = True) -> Federation:
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
    if begin:
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


@pytest.mark.parametrize('rule', RULES if LONG else ['comigs_1gxs', 'pcl'])
def test_d1_devices_come_to_the_bits_of_the_simulator(rule, three, tiny, figure):
    switches = [arg.replace('PUBLIC', f'{three.folder}/public.txt') for arg in (f'--method={rule}', *RULES[rule])]
    switches = switches[rule == 'median' :]
    begin(three, *switches)
    end(three)
    EQUAL[rule] = differences(three, simulated(tiny, three, *switches))
    equal = [rule for rule, found in EQUAL.items() if not found]
    figure('D1', f'{len(equal)}/{len(EQUAL)} rules bit-equal to the simulator: {", ".join(equal)}', not EQUAL[rule])


@pytest.mark.parametrize('rule', RULES)
def test_every_rule_without_processes(rule, tiny, tmp_path, monkeypatch):
    """The server and the devices' answers in this process, all that Flower is there for left out."""
    monkeypatch.syspath_prepend(ROOT / 'devices')
    import client
    import server
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    switches = [arg.replace('PUBLIC', f'{tmp_path}/public.txt') for arg in (f'--method={rule}', *RULES[rule])]
    switches = switches[rule == 'median' :]
    federation, letters = federate(tiny, tmp_path, begin=False), {}

    class Grid:
        def get_nodes(self) -> list:
            files = [tmp_path / f'keys/{name}.pub' for name in federation.names]
            keys = [public_key_to_bytes(load_ssh_public_key(file.read_bytes())) for file in files]
            return [SimpleNamespace(node_id=i, public_key=key) for i, key in enumerate(keys, 1)]

        def push_messages(self, messages: list) -> list[str]:
            for n, message in enumerate(messages, len(letters)):
                i, question = message.metadata.dst_node_id - 1, message.metadata.message_type.split('.')[-1]
                here = {'folder': f'{tmp_path}/u{i}', 'name': f'u{i}', 'dataset': f'{tmp_path}/data{i}', 'device': 'cpu'}
                here |= {'init_from': str(tiny.base), 'public_text': f'{tmp_path}/public.txt'}
                monkeypatch.setenv('DEVICE', json.dumps(here))
                message.metadata.__dict__['_message_id'] = str(n)
                letters[str(n)] = client.answer(question, message, None)
            return [*letters][-len(messages) :]

        def pull_messages(self, ids: set[str]) -> list:
            return [letters[i] for i in ids]

    (tmp_path / 'server').mkdir()
    argv = [f'--init_from={tiny.base}', *TINY, '--device=cpu', *switches]
    plan = {'argv': argv, 'deadline': 60, 'least': 3, 'keys': str(tmp_path / 'keys')}
    (tmp_path / 'server/run.json').write_text(json.dumps(plan))
    server.Server(Grid(), tmp_path / 'server').run()
    assert not differences(federation, simulated(tiny, federation, *switches))
    if rule == 'fedavg':  # a device's folder is a run's
        export.main([f'{tmp_path}/u1', '--user=0', '--to=peft', f'{tmp_path}/peft'])
        assert (tmp_path / 'peft/generalist-0/adapter_model.safetensors').exists()


def test_d2_who_dies_is_left_out_and_goes_on_from_its_disk(three, tiny, figure, monkeypatch):
    """A client app killed in round 2, its SuperNode too, and started again later: each round ends by its deadline, with the
    mean of who answered; who returns is what the simulator makes of a user with the same absences."""
    switches, deadline, took = ['--method=comigs_1g1s', '--rounds=8', '--local_steps=20', '--router_every=20'], 8, {}
    begin(three, *switches, deadline=deadline, least=1)
    until(lambda: rounds(three), 90)
    until(lambda: [os.kill(pid, signal.SIGKILL) for pid in workers(three, 'u1')])
    three.stop('u1', how=signal.SIGKILL)
    began = time.time()
    until(lambda: [1 for line in rounds(three) if 1 not in line['users']])
    took, gone = time.time() - began, len(rounds(three))
    three.device(1)
    end(three)
    present = [line['users'] for line in rounds(three)]
    assert present[0] == present[-1] == [0, 1, 2] and [0, 2] in present, present
    monkeypatch.setattr(Fleet, 'present', lambda self, t: present[t])
    found = [line for line in differences(three, simulated(tiny, three, *switches)) if 'lines' not in line]
    missed = sum(1 not in line for line in present)
    text = f'the round ended {took:.1f} s after the kill (deadline {deadline} s); back after {missed} rounds, bit-equal'
    figure('D2', text if not found else f'{text}: not {found}', not found and took < deadline + 5 and gone)


def test_d3_the_server_dies_and_the_run_goes_on_after_its_last_round(three, tiny, figure):
    switches = ['--method=comigs_1g1s', '--rounds=4']
    begin(three, *switches)
    until(lambda: rounds(three), 90)
    until(lambda: [os.kill(pid, signal.SIGKILL) for pid in workers(three, 'server')])  # the server app
    again(three, *switches)
    until(lambda: len(rounds(three)) > 1, 90)
    three.stop('server', how=signal.SIGKILL)  # the SuperLink, with all that it started
    (three.folder / 'server.log').unlink()
    three.server()
    again(three, *switches)
    end(three)
    found = differences(three, simulated(tiny, three, *switches))
    figure('D3', f'server app and SuperLink killed, 4 rounds: {"bit-equal" if not found else found}', not found)


def test_d4_what_a_device_sends_is_what_it_may(tiny, tmp_path, figure):
    """All requests of one device's SuperNode, as they are before TLS; its specialists, routers, their optimizers' states and
    its text are filled with what can be found again."""
    federation = federate(tiny, tmp_path, n=1)
    try:
        federation.device(0, **HOOKS, RECORD=str(tmp_path / 'sent'), MARK='1')
        federation.wait_for('u0', 'SuperNode ID')
        begin(federation, '--method=comigs_1gxs', '--n_experts=3')
        end(federation)
    finally:
        federation.stop()
    sent, (config, state) = (
        (tmp_path / 'sent').read_bytes(),
        (
            json.loads((tmp_path / 'u0/config.json').read_text()),
            checkpoint.read(tmp_path / 'u0/checkpoint/user0-3.safetensors')[0],
        ),
    )
    marker, T = np.float32(12345.678).tobytes(), len(rounds(federation))
    assert (state['adapter/h.0.mlp.router.weight'] == 12345.678).any() and config['users'] == ['u0']
    forbidden = [marker * 2, SPECIAL.encode(), np.frombuffer(SPECIAL.encode(), np.uint8).astype('<u2').tobytes()]
    hits = sum(sent.count(what) for what in (*forbidden, b'specialist', b'router', b'expert_opt'))
    names = {*re.findall(rb'h\.\d+\.[\w.]+', sent)}
    may = {
        key.removeprefix('adapter/').encode() for key in state if '.generalists.' in key or '.attn.' in key and 'adapter' in key
    }
    may = {name for name in may if name.startswith(b'h.')}
    payload = sum(line['bytes_up'] for line in rounds(federation))
    own = sum(json.loads(line).get('bytes_up', 0) for line in (tmp_path / 'u0/metrics.jsonl').read_text().splitlines())
    text = f'{len(names)} names, exactly those that may leave; {hits} hits of what may not in {len(sent):,} bytes; payload '
    text += f'{payload // T:,} bytes a round, as counted on the device; Flower adds {(len(sent) - payload) // (T + 1):,}'
    figure('D4', text, names == may and not hits and payload == own)


def test_d5_rubbish_is_refused_with_its_name(tiny, tmp_path, figure):
    federation = federate(tiny, tmp_path)
    kinds = ['NaN', 'another shape', "another round's", "another user's name", 'no array']
    try:
        for i in range(3):
            federation.device(i, **(HOOKS | {'HOSTILE': '1'} if i == 2 else {}))
        for name in federation.names:
            federation.wait_for(name, 'SuperNode ID')
        begin(federation, '--method=fedavg', f'--rounds={len(kinds)}', least=2)
        end(federation)
    finally:
        federation.stop()
    lines = [line for line in federation.lines() if line['kind'] == 'refused']
    refused = [line for line in lines if line['users'] == [2] and line['why'][0]]
    run = simulated(tiny, federation, '--method=fedavg', f'--rounds={len(kinds)}', '--attack=nan', '--attackers=1')
    server = checkpoint.read(tmp_path / f'server/checkpoint/round-{len(kinds)}.safetensors', 'server/')[0]
    clean = same(server, run.server)
    text = f'{len(refused)}/{len(kinds)} refused ({", ".join(kinds)}); the mean is that of the others: {clean}'
    figure('D5', text, len(refused) == len(kinds) and clean)


def test_d6_who_has_no_key_learns_nothing(three, tmp_path, figure):
    """No key, a key that nobody knows, a server that another authority vouches for, plain text; and from elsewhere no route but
    those of devices."""
    keys.main([str(tmp_path / 'keys'), 'u0'])
    before = three.said('server').count('Activated node_id')
    start = [
        sys.executable,
        str(ROOT / 'devices/start.py'),
        'device',
        str(tmp_path / 'x'),
        '--name=u0',
        '--init_from=x',
        '--dataset=x',
    ]
    where, tried = f'--server=127.0.0.1:{three.port}', {}
    mixed = tmp_path / 'mixed'
    mixed.mkdir()
    (mixed / 'ca.pem').write_bytes((three.folder / 'keys/ca.pem').read_bytes())
    (mixed / 'u0.key').write_bytes((tmp_path / 'keys/u0.key').read_bytes())
    nobody = tmp_path / 'nobody'
    nobody.mkdir()
    (nobody / 'ca.pem').write_bytes((three.folder / 'keys/ca.pem').read_bytes())
    for what, folder in {'a wrong key': mixed, 'no key': nobody, "somebody else's certificate": tmp_path / 'keys'}.items():
        process = subprocess.Popen([*start, where, f'--keys={folder}'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            process.wait(8)
        except subprocess.TimeoutExpired:  # it goes on trying to find its server
            os.kill(process.pid, signal.SIGKILL)
        tried[what] = b'SuperNode ID' not in process.communicate()[0]
    plain = http.client.HTTPConnection('127.0.0.1', three.port, timeout=10)
    try:
        plain.request('POST', '/v1/fleet/activate-node')
        tried['plain text'] = not plain.getresponse().read()
    except (http.client.HTTPException, OSError):
        tried['plain text'] = True
    trust = ssl.create_default_context(cafile=three.folder / 'keys/ca.pem')
    for path, wanted in {'/v1/control/list-nodes': 403, '/v1/runtime/get-nodes': 403, '/v1/fleet/activate-node': 401}.items():
        away = http.client.HTTPSConnection('127.0.0.1', three.port, context=trust, timeout=10, source_address=('127.0.0.2', 0))
        away.request('POST', path, b'', {'content-type': 'application/x-protobuf'})
        answer = away.getresponse()
        tried[path] = answer.status in (wanted, 415, 422) and b'node' not in answer.read()
    assert three.said('server').count('Activated node_id') == before
    text = f'{sum(tried.values())}/{len(tried)} refused: {", ".join(key for key, ok in tried.items() if ok)}'
    figure('D6', text, all(tried.values()))


def memory(pids: list[int]) -> float:
    """Of these processes together, in MB: what each holds that no other one shares."""
    found = 0
    for pid in pids:
        text = Path(f'/proc/{pid}/smaps_rollup').read_text()
        found += int(re.search(r'^Pss:\s+(\d+)', text, re.M)[1]) / 1024
    return found


def test_d7_many_devices_and_many_rounds(tiny, tmp_path, figure):
    """In the long form 16 devices, and 50 rounds of the server app's memory."""
    n, T = (16, 50) if LONG else (4, 6)
    federation, sizes = federate(tiny, tmp_path, n=n), {}
    try:
        for i in range(n):
            federation.device(i)
        for name in federation.names:
            federation.wait_for(name, 'SuperNode ID')
        began = time.time()
        begin(federation, '--method=comigs_1g1s', f'--rounds={T}', f'--eval_every={T}')
        until(lambda: rounds(federation), 300)
        first = time.time()
        while federation.processes['run'].poll() is None:
            try:
                sizes[len(rounds(federation))] = memory(workers(federation, 'server'))
            except (OSError, TypeError):
                pass
            time.sleep(0.2)
        seconds = (time.time() - first) / T
        device = memory([federation.processes['u0'].pid, *(pid for pid in federation.left() if home(pid, federation, 'u0'))])
        end(federation)
    finally:
        federation.stop()
    growth = sizes[T - 1] / sizes[T // 2] - 1
    text = f'{n} devices: {first - began:.0f} s to the end of round 1, then {seconds:.1f} s a round; server app '
    text += f'{sizes[T - 1]:.0f} MB, {growth:+.1%} from round {T // 2} to {T - 1}; a device {device:.0f} MB'
    figure('D7', text, growth < 0.05)


def home(pid: int, federation: Federation, name: str) -> bool:
    return f'FLWR_HOME={federation.folder}/{name}/flower\0'.encode() in Path(f'/proc/{pid}/environ').read_bytes()


def test_d8_no_other_machine_is_looked_up(three, figure):
    """By any process of all these federations; that they are watched is seen in their environment."""
    pids = [process.pid for name, process in three.processes.items() if process.poll() is None] + three.left()
    watched = [pid for pid in pids if b'LOOKUPS=' in Path(f'/proc/{pid}/environ').read_bytes()]
    figure(
        'D8',
        f'{len(lookups())} look-ups of other machines; {len(watched)}/{len(pids)} processes watched',
        not lookups() and watched == pids,
    )
