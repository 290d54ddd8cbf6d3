"""Starts Flower's processes, always with TLS and keys (devices/keys.py), and without telemetry, update checks or installations.

    python devices/start.py server my/server --keys=my/keys --host=0.0.0.0             # the server; 127.0.0.1 by default
    python devices/start.py device my/ada --keys=my/keys --name=ada --server=192.168.1.10:8443 --init_from=BASE --dataset=MINE
    python devices/start.py run my/server --keys=my/keys config/demo.py --rounds=10     # beside the server; again: it goes on

They run until Ctrl-C, `run` to the end of the run. Off the server's machine only what devices need is answered: Flower's other
routes would let everybody start runs."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import configure, die, parser, read_json

HERE = Path(__file__).resolve().parent
CANNOT = {  # switches that only the simulator has, and why
    'pooled': (False, 'all text would be in one place'),
    'target': ('own', "the text would be everybody's"),
    'eval_valid': (False, 'the server sees perplexities of test text only'),
    'failures': (0.0, 'devices fail by themselves'),
    'attack': ('none', 'devices attack by themselves'),
    'init_adapter': ('', 'every device would need the adapter'),
}


def environment(a: SimpleNamespace, **more: str) -> dict:
    """Of every process: silent, with this checkout's server and client, and at home in the folder, where Flower's commands look
    up the server of this machine."""
    home, ca = (a.folder / 'flower').resolve(), (a.keys / 'ca.pem').resolve()
    home.mkdir(parents=True, exist_ok=True)
    connection = {'address': f'127.0.0.1:{a.port}', 'root-certificates': str(ca)}
    lines = ['[superlink.home]', *(f'{key} = {json.dumps(value)}' for key, value in connection.items())]
    (home / 'config.toml').write_text('\n'.join(lines))
    quiet = {'FLWR_TELEMETRY_ENABLED': '0', 'FLWR_DISABLE_UPDATE_CHECK': '1', 'FLWR_SUPEREXEC_TASK_POLL_INTERVAL': '0.5'}
    path = os.pathsep.join([str(HERE / 'bin'), str(Path(sys.executable).parent), os.environ.get('PATH', '')])
    return {**os.environ, **quiet, 'PATH': path, 'FLWR_HOME': str(home), **more}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


class DevicesOnly:
    """Off this machine no route is answered but those that a SuperNode signs its requests to."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        here = scope['type'] != 'http' or scope['client'][0] in ('127.0.0.1', '::1')
        if here or scope['path'].startswith('/v1/fleet/'):
            return await self.app(scope, receive, send)
        await send({'type': 'http.response.start', 'status': 403, 'headers': []})
        await send({'type': 'http.response.body', 'body': b''})


def admit_keys(keys: Path) -> None:
    """Tells the server every user's public key, also of those that come later."""
    from flwr.cli.flower_config import read_superlink_connection
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.cli.utils import init_http_client_from_connection
    from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest
    from httpx import ConnectError

    client, told = init_http_client_from_connection(read_superlink_connection('home')), set()
    while True:
        try:
            for name in [name for name in read_json(keys / 'users.json', 'users')['users'] if name not in told]:
                key = try_load_public_key(keys / f'{name}.pub')
                if key not in {node.public_key for node in client.ListNodes(ListNodesRequest()).nodes_info}:
                    client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
                print(f'{name} may come in', flush=True)
                told.add(name)
        except ConnectError:  # not yet up
            pass
        except Exception as error:  # such as a file that is being written: tried again
            print(f'keys: {error}', flush=True)
        time.sleep(1)


def server(a: SimpleNamespace) -> None:
    os.environ.update(environment(a, FEDERATION=str(a.folder.resolve())))
    from flwr.superlink import extensions
    from flwr.superlink.cli.flower_superlink import flower_superlink
    from starlette.middleware import Middleware

    extensions.get_middleware = lambda: (Middleware(DevicesOnly),)
    threading.Thread(target=admit_keys, args=[a.keys], daemon=True).start()
    sys.argv = ['flower-superlink', f'--host={a.host}', f'--port={a.port}', '--disable-runtime-dependency-installation']
    ca = (a.keys / 'ca.pem').resolve()
    sys.argv += [f'--ssl-certfile={ca}', f'--ssl-keyfile={a.keys / "server.key"}', f'--ssl-ca-certfile={ca}']
    sys.argv += ['--enable-supernode-auth', f'--database={(a.folder / "flower/state.db").resolve()}']
    flower_superlink()


def device(a: SimpleNamespace) -> None:
    here = {'folder': str(a.folder.resolve()), 'name': a.name, 'init_from': a.init_from, 'dataset': str(Path(a.dataset))}
    here |= {key: getattr(a, key) for key in ('public_text', 'device', 'clip', 'noise') if getattr(a, key)}
    os.environ.update(environment(a, DEVICE=json.dumps(here)))
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection, start_client_internal
    from flwr.supernode.cli import flower_supernode

    for module in (heartbeat, fleet_http_connection):
        module.HEARTBEAT_DEFAULT_INTERVAL = 10  # who is silent for twice as long is taken for gone
    start_client_internal.time = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, a.poll)))
    sys.argv = ['flower-supernode', f'--superlink={a.server}', f'--root-certificates={a.keys / "ca.pem"}']
    sys.argv += [f'--auth-supernode-private-key={a.keys / (a.name + ".key")}', f'--port={free_port()}']
    flower_supernode()


def end_runs(env: dict) -> None:
    """Ends what is still at work on this server, which has one folder for its run."""
    listed = subprocess.run(['flwr', 'list', 'home', '--format=json'], env=env, capture_output=True, encoding='utf-8').stdout
    for one in json.loads(listed or '{}').get('runs', ()):
        if not one['status'].startswith('finished'):
            subprocess.run(['flwr', 'stop', one['run-id'], 'home'], env=env, capture_output=True)


def run(a: SimpleNamespace, rest: list[str]) -> None:
    c = configure(rest)
    for name, (only, why) in CANNOT.items():
        if getattr(c, name) != only:
            die(f'--{name}={getattr(c, name)}: not on devices, {why}')
    env = environment(a)
    plan = {'argv': rest, 'deadline': a.deadline, 'least': a.least, 'keys': str(a.keys.resolve())}
    (a.folder / 'run.json').write_text(json.dumps(plan))
    (a.folder / 'summary.json').unlink(missing_ok=True)
    try:
        end_runs(env)
        command = ['flwr', 'run', str(HERE), 'home', '--stream']
        subprocess.run(command, env=env, start_new_session=True)  # 0 of a failed one, too
    except KeyboardInterrupt:
        end_runs(env)
        print('stopped: the same command goes on after the last finished round', file=sys.stderr)
        sys.exit(130)
    sys.exit(not (a.folder / 'summary.json').exists())


def end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)  # a server waits for connections to close
    os.kill(os.getpid(), signal.SIGKILL)


def main(argv: list[str]) -> None:
    p = parser(__doc__)
    p.add_argument('what', choices=('server', 'device', 'run'))
    p.add_argument('folder', type=Path)
    p.add_argument('--keys', type=Path, required=True)
    p.add_argument('--port', type=int, default=8443, help='of the server')
    p.add_argument('--tied', action='store_true', help='end when the process ends that started this one')
    reach = 'server: who can reach it, this machine alone or every other one'
    p.add_argument('--host', choices=('127.0.0.1', '0.0.0.0'), default='127.0.0.1', help=reach)
    if argv[:1] != ['run']:  # whose --init_from is the switch
        p.add_argument('--name', help='device: of the user whose key it has')
        p.add_argument('--server', default='127.0.0.1:8443', help='device: where the server is')
        p.add_argument('--init_from', help='device: where the base is')
        p.add_argument('--dataset', help='device: the folder that data/prepare.py made of its text')
        p.add_argument('--once', action='store_true', help='device: do not try again when it is not let in')
        p.add_argument('--poll', type=float, default=3, help='device: seconds until it looks for a message again, 3 at most')
        p.add_argument('--public_text', help='device: the file that all have, for rules that need one')
        p.add_argument('--device', help='device: cpu, cuda, mps')
        p.add_argument('--clip', type=float, help='device: what it sends of a round is at most so far from what it got')
        p.add_argument('--noise', type=float, default=0, help='device: deviation of noise on what it sends, in clips')
    p.add_argument('--deadline', type=float, default=3600, help='run: seconds within which a device has to answer')
    p.add_argument('--least', type=int, default=1, help='run: how many devices must answer for a round to count')
    a, rest = p.parse_known_args(argv)
    if not (a.keys / 'ca.pem').exists():
        die(f'{a.keys} has no ca.pem: python devices/keys.py {a.keys} NAME ...')
    if a.tied:
        threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
    if a.what == 'run':
        return run(a, rest)
    if rest:
        die(f'{rest[0]}: only `run` takes switches')
    if not (a.clip is None or 0 < a.clip < math.inf) or not 0 <= a.noise < math.inf or (a.noise and not a.clip):
        die(f'--clip={a.clip} --noise={a.noise}: expected a number above 0, and one that is not negative; noise needs a clip')
    if a.what == 'server':
        return server(a)
    if a.once:
        return device(a)
    # the server lets a key in once, and takes 20 seconds to see that the process that had it is gone: it is tried again
    try:
        while subprocess.call([sys.executable, __file__, *argv, '--once', '--tied']):
            time.sleep(5)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == '__main__':
    main(sys.argv[1:])
