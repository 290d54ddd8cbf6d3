"""Federations of real processes over Flower, on 127.0.0.1 with TLS and keys: what is promised of devices (docs/devices.md), in
the figures D1 to D8, which `pytest -m devices` prints. RELIABILITY=long makes them larger."""

import http.client
import importlib.util
import json
import math
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
import torch
from conftest import LONG, N_TRAIN, ROOT, TINY, lookups, same, trainer, user_streams, write_dataset

from devices import keys
from devices.loopback import Federation
from run import checkpoint
from run.fleet import Fleet
from tools import export

WHY = 'Flower is an extra: pip install -r requirements-devices.txt'
pytestmark = [pytest.mark.devices, pytest.mark.skipif(not importlib.util.find_spec('flwr'), reason=WHY)]
HOOKS = {'PYTHONPATH': os.pathsep.join([str(ROOT / 'tests/on_devices'), str(ROOT)])}
SPECIAL = 'a text that must not leave its device'


def federate(tiny, folder: Path, n: int = 4, begin: bool = True) -> Federation:
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
def four(tiny, tmp_path_factory):
    """A federation of four, which does one run after another."""
    federation = federate(tiny, tmp_path_factory.mktemp('devices'))
    try:
        for i in range(4):
            federation.device(i)
        for name in federation.names:
            federation.wait_for(name, 'SuperNode ID')
        yield federation
    finally:
        federation.stop()
    assert not federation.left()


RULES = {
    'comigs_1gxs': ['--n_experts=4,2,2,1'],
    'comigs_1g1s': [],
    'pcl': [],
    'consensus': ['--consensus_start=1', '--judge_windows=4', '--public_text=PUBLIC'],
    'fedavg': [],
    'ffa_lora': [],
    'hetlora': ['--lora_rank=4,6,8,6', '--prune_coef=10'],
    'flexlora': ['--lora_rank=4,6,8,6'],
    'median': ['--method=comigs_1g1s', '--aggregate=median'],
    'flora': ['--lora_rank=4,6,8,6'],
    'fdlora': [],
    'local': [],
}
EQUAL = {}


@pytest.mark.parametrize('rule', RULES if LONG else ['comigs_1gxs', pytest.param('pcl', marks=pytest.mark.alone)])
def test_d1_devices_come_to_the_bits_of_the_simulator(rule, four, tiny, figure):
    switches = [arg.replace('PUBLIC', f'{four.folder}/public.txt') for arg in (f'--method={rule}', *RULES[rule])]
    switches = switches[rule == 'median' :]
    begin(four, *switches)
    end(four)
    EQUAL[rule] = differences(four, simulated(tiny, four, *switches))
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
    plan = {'argv': argv, 'deadline': 60, 'least': 4, 'keys': str(tmp_path / 'keys')}
    (tmp_path / 'server/run.json').write_text(json.dumps(plan))
    server.Server(Grid(), tmp_path / 'server').run()
    assert not differences(federation, simulated(tiny, federation, *switches))
    if rule == 'fedavg':  # a device's folder is a run's
        export.main([f'{tmp_path}/u1', '--user=0', '--to=peft', f'{tmp_path}/peft'])
        assert (tmp_path / 'peft/generalist-0/adapter_model.safetensors').exists()


def test_clipping_and_noise_on_the_device(monkeypatch):
    """The update is at most as long as the clip, of all tensors together; a shorter one stays as it is; the noise has its
    deviation, and is another one in every process that is forked from the same one."""
    monkeypatch.syspath_prepend(ROOT / 'devices')
    import client

    began = {'h.0.A': torch.ones(4, 30), 'h.0.B': torch.zeros(50, 4)}
    sent = {'h.0.A': began['h.0.A'][:3] + 3, 'h.0.B': began['h.0.B'] + 4}  # pruned to a smaller rank
    length = math.sqrt(90 * 3**2 + 200 * 4**2)

    def change(of: dict) -> torch.Tensor:
        return torch.cat([(v - began[name][: len(v)]).flatten() for name, v in of.items()])

    clipped = client.private(sent, began, clip=2.0, noise=0.0)
    torch.testing.assert_close(change(clipped), change(sent) * 2 / length)
    assert same(client.private(sent, began, clip=length + 1, noise=0.0), sent)
    unchanged = {name: v[: len(sent[name])] for name, v in began.items()}
    assert same(client.private(unchanged, began, clip=2.0, noise=0.0), unchanged)
    noise = change(client.private(unchanged, began, clip=2.0, noise=0.5))
    assert abs(noise.std() - 1) < 0.2 and abs(noise.mean()) < 0.25
    np.random.seed(1)
    first = client.private(unchanged, began, 2.0, 0.5)
    np.random.seed(1)  # what a fork begins with
    assert not same(first, client.private(unchanged, began, 2.0, 0.5))


@pytest.mark.alone
def test_d2_who_dies_is_left_out_and_goes_on_from_its_disk(four, tiny, figure, monkeypatch):
    """A client app killed in round 2, its SuperNode too, and started again later: each round ends by its deadline, with the
    mean of who answered; who returns is what the simulator makes of a user with the same absences."""
    switches, deadline, took = ['--method=comigs_1g1s', '--rounds=8', '--local_steps=20', '--router_every=20'], 8, {}
    begin(four, *switches, deadline=deadline, least=1)
    until(lambda: rounds(four), 90)
    until(lambda: [os.kill(pid, signal.SIGKILL) for pid in workers(four, 'u1')])
    four.stop('u1', how=signal.SIGKILL)
    began = time.time()
    until(lambda: [1 for line in rounds(four) if 1 not in line['users']])
    took, gone = time.time() - began, len(rounds(four))
    four.device(1)
    end(four)
    present = [line['users'] for line in rounds(four)]
    assert present[0] == present[-1] == [0, 1, 2, 3] and [0, 2, 3] in present, present
    monkeypatch.setattr(Fleet, 'present', lambda self, t: present[t])
    found = [line for line in differences(four, simulated(tiny, four, *switches)) if 'lines' not in line]
    missed = sum(1 not in line for line in present)
    text = f'the round ended {took:.1f} s after the kill (deadline {deadline} s); back after {missed} rounds, bit-equal'
    figure('D2', text if not found else f'{text}: not {found}', not found and took < deadline + 5 and gone)


@pytest.mark.alone
def test_d3_the_server_dies_and_the_run_goes_on_after_its_last_round(four, tiny, figure):
    switches = ['--method=comigs_1g1s', '--rounds=4']
    begin(four, *switches)
    until(lambda: rounds(four), 90)
    until(lambda: [os.kill(pid, signal.SIGKILL) for pid in workers(four, 'server')])  # the server app
    again(four, *switches)
    until(lambda: len(rounds(four)) > 1, 90)
    four.stop('server', how=signal.SIGKILL)  # the SuperLink, with all that it started
    (four.folder / 'server.log').unlink()
    four.server()
    again(four, *switches)
    end(four)
    found = differences(four, simulated(tiny, four, *switches))
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
    sent, config = (tmp_path / 'sent').read_bytes(), json.loads((tmp_path / 'u0/config.json').read_text())
    state = checkpoint.read(tmp_path / 'u0/checkpoint/user0-3.safetensors')[0]
    marker, T = np.float32(12345.678).tobytes(), len(rounds(federation))
    assert (state['adapter/h.0.mlp.router.weight'] == 12345.678).any() and config['users'] == ['u0']
    forbidden = [marker * 2, SPECIAL.encode(), np.frombuffer(SPECIAL.encode(), np.uint8).astype('<u2').tobytes()]
    hits = sum(sent.count(what) for what in (*forbidden, b'specialist', b'router', b'expert_opt'))
    names = {*re.findall(rb'h\.\d+\.[\w.]+', sent)}
    own = [key.removeprefix('adapter/') for key in state if key.startswith('adapter/')]
    may = {name.encode() for name in own if '.generalists.' in name or '.attn.' in name}
    payload = sum(line['bytes_up'] for line in rounds(federation))
    counted = sum(json.loads(line).get('bytes_up', 0) for line in (tmp_path / 'u0/metrics.jsonl').read_text().splitlines())
    text = f'{len(names)} names, exactly those that may leave; {hits} hits of what may not in {len(sent):,} bytes; payload '
    text += f'{payload // T:,} bytes a round, as counted on the device; Flower adds {(len(sent) - payload) // (T + 1):,}'
    figure('D4', text, names == may and not hits and payload == counted)


def test_d5_rubbish_is_refused_with_its_name(tiny, tmp_path, figure):
    """Device 3 sends another kind in every round, each twice."""
    federation = federate(tiny, tmp_path)
    kinds = ['NaN', 'another shape', "another round's", "another user's name", 'no array']
    try:
        for i in range(4):
            federation.device(i, **(HOOKS | {'HOSTILE': '1'} if i == 3 else {}))
        for name in federation.names:
            federation.wait_for(name, 'SuperNode ID')
        begin(federation, '--method=fedavg', f'--rounds={len(kinds)}', least=3)
        end(federation)
    finally:
        federation.stop()
    lines = [line for line in federation.lines() if line['kind'] == 'refused']
    refused = [line for line in lines if line['users'] == [3] and line['why'][0]]
    twice = federation.said('u3').count('sent again')
    run = simulated(tiny, federation, '--method=fedavg', f'--rounds={len(kinds)}', '--attack=nan', '--attackers=1')
    server = checkpoint.read(tmp_path / f'server/checkpoint/round-{len(kinds)}.safetensors', 'server/')[0]
    clean = same(server, run.server)
    text = f'{len(refused)}/{len(kinds)} refused ({", ".join(kinds)}), each once, though {twice} came twice; the mean is '
    figure('D5', f'{text}that of the others: {clean}', len(refused) == len(lines) == len(kinds) <= twice and clean)


def test_d6_who_has_no_key_learns_nothing(four, tmp_path, figure):
    """No key, a key that nobody knows, a server that another authority vouches for, plain text; and from elsewhere no route but
    those of devices."""
    keys.main([str(tmp_path / 'keys'), 'u0'])
    before = four.said('server').count('Activated node_id')
    start = [sys.executable, str(ROOT / 'devices/start.py'), 'device', str(tmp_path / 'x')]
    start += ['--name=u0', '--init_from=x', '--dataset=x']
    where, tried = f'--server=127.0.0.1:{four.port}', {}
    mixed = tmp_path / 'mixed'
    mixed.mkdir()
    (mixed / 'ca.pem').write_bytes((four.folder / 'keys/ca.pem').read_bytes())
    (mixed / 'u0.key').write_bytes((tmp_path / 'keys/u0.key').read_bytes())
    nobody = tmp_path / 'nobody'
    nobody.mkdir()
    (nobody / 'ca.pem').write_bytes((four.folder / 'keys/ca.pem').read_bytes())
    for what, folder in {'a wrong key': mixed, 'no key': nobody, "somebody else's certificate": tmp_path / 'keys'}.items():
        process = subprocess.Popen([*start, where, f'--keys={folder}'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            process.wait(8)
        except subprocess.TimeoutExpired:  # it goes on trying to find its server
            os.kill(process.pid, signal.SIGKILL)
        tried[what] = b'SuperNode ID' not in process.communicate()[0]
    plain = http.client.HTTPConnection('127.0.0.1', four.port, timeout=10)
    try:
        plain.request('POST', '/v1/fleet/activate-node')
        tried['plain text'] = not plain.getresponse().read()
    except (http.client.HTTPException, OSError):
        tried['plain text'] = True
    trust = ssl.create_default_context(cafile=four.folder / 'keys/ca.pem')
    for path, wanted in {'/v1/control/list-nodes': 403, '/v1/runtime/get-nodes': 403, '/v1/fleet/activate-node': 401}.items():
        away = http.client.HTTPSConnection('127.0.0.1', four.port, context=trust, timeout=10, source_address=('127.0.0.2', 0))
        away.request('POST', path, b'', {'content-type': 'application/x-protobuf'})
        answer = away.getresponse()
        tried[path] = answer.status in (wanted, 415, 422) and b'node' not in answer.read()
    assert four.said('server').count('Activated node_id') == before
    text = f'{sum(tried.values())}/{len(tried)} refused: {", ".join(key for key, ok in tried.items() if ok)}'
    figure('D6', text, all(tried.values()))


def memory(pids: list[int]) -> float:
    """Of these processes together, in MB: what each holds that no other one shares."""
    found = 0
    for pid in pids:
        text = Path(f'/proc/{pid}/smaps_rollup').read_text()
        found += int(re.search(r'^Pss:\s+(\d+)', text, re.M)[1]) / 1024
    return found


@pytest.mark.alone
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


def test_d8_no_other_machine_is_looked_up(four, figure):
    """By any process of all these federations; that they are watched is seen in their environment."""
    pids = [process.pid for name, process in four.processes.items() if process.poll() is None] + four.left()
    watched = [pid for pid in pids if b'LOOKUPS=' in Path(f'/proc/{pid}/environ').read_bytes()]
    text = f'{len(lookups())} look-ups of other machines; {len(watched)}/{len(pids)} processes watched'
    figure('D8', text, not lookups() and watched == pids)
