"""A federation on this machine: the server and a device for every user, as real processes on 127.0.0.1, with TLS and keys.

    python devices/loopback.py config/demo.py --n_users=4     # and any switches of train.py

In OUT_DIR-devices: keys/, server/ and a folder for every device, with nobody's text but its own. Then the simulator does the
same run, and the adapters are compared bit for bit. Nothing that is started here outlives this command."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import save
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import cell, configure, die, folder_of, parser, table
from data.stream import SPLITS, TOKENIZER, read_meta
from devices import keys, start
from run import checkpoint

ROOT = Path(__file__).resolve().parent.parent


def share(folder: Path, meta: dict, ids: list[int], into: Path) -> None:
    """A data set with the text of these users of another one, numbered from 0."""
    into.mkdir(parents=True)
    for new, i in enumerate(ids):
        for split in SPLITS:
            shutil.copy(folder / f'user{i}_{split}.bin', into / f'user{new}_{split}.bin')
    part = {key: [meta[key][i] for i in ids] for key in ('users', 'overlap') if key in meta}
    (into / 'meta.json').write_text(json.dumps({**meta, **part}))
    if (folder / TOKENIZER).exists():
        shutil.copy(folder / TOKENIZER, into)


class Federation:
    """Processes that end with this one, and what they say in folder/NAME.log. Threads: 1 each, so that bits are the same."""

    def __init__(self, folder: Path, argv: list[str], names: list[str], private: list[str] | None = None):
        self.folder, self.argv, self.names, self.private = folder, argv, names, private or []
        self.port, self.processes, self.env = start.free_port(), {}, {**os.environ, 'OMP_NUM_THREADS': '1'}

    def begin(self, name: str, *command: str, **more: str) -> subprocess.Popen:
        log, env = open(self.folder / f'{name}.log', 'ab'), {**self.env, **more}
        argv = [sys.executable, str(ROOT / 'devices/start.py'), *map(str, command), f'--keys={self.folder}/keys', '--tied']
        self.processes[name] = subprocess.Popen(argv, stdout=log, stderr=log, cwd=ROOT, env=env, start_new_session=True)
        return self.processes[name]

    def server(self) -> None:
        self.begin('server', 'server', self.folder / 'server', f'--port={self.port}')
        self.wait_for('server', f'{self.names[-1]} may come in')

    def wait_for(self, name: str, text: str) -> None:
        until = time.time() + 120
        while text not in self.said(name):
            if time.time() > until or self.processes[name].poll() is not None:
                raise RuntimeError(f'{name} did not say {text!r}: {self.folder}/{name}.log')
            time.sleep(0.1)

    def said(self, name: str) -> str:
        file = self.folder / f'{name}.log'
        return file.read_text(errors='replace') if file.exists() else ''

    def device(self, i: int, **more: str) -> None:
        name, local = self.names[i], [arg for arg in self.argv if re.match('--(init_from|public_text)=', arg)]
        where = [f'--dataset={self.folder / f"data{i}"}', '--device=cpu', '--poll=0.5', f'--server=127.0.0.1:{self.port}']
        self.begin(name, 'device', self.folder / name, f'--name={name}', *where, *local, *self.private, **more)

    def run(self, *how: str) -> None:
        self.begin('run', 'run', self.folder / 'server', f'--port={self.port}', *how)

    def lines(self) -> list[dict]:
        """metrics.jsonl of the server, as far as it is written."""
        file = self.folder / 'server/metrics.jsonl'
        return [json.loads(line) for line in file.read_text().splitlines(True) if line[-1] == '\n'] if file.exists() else []

    def stop(self, *names: str, how: int = signal.SIGTERM) -> None:
        """These processes, or all, with all that they started."""
        going, until = [self.processes.pop(name) for name in names or [*self.processes]], time.time() + 5
        for number in (how, signal.SIGKILL):
            for process in going:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            while any(process.poll() is None for process in going) and (number == signal.SIGKILL or time.time() < until):
                time.sleep(0.05)
        while not names and self.left():
            time.sleep(0.1)  # what has a session of its own watches its parent

    def left(self) -> list[int]:
        """Processes that work for this federation, where a system can say so."""
        found, home = [], f'FLWR_HOME={self.folder}/'.encode()
        for file in Path('/proc').glob('[0-9]*/environ'):
            with contextlib.suppress(OSError):  # it has just ended
                found += [int(file.parent.name)] if home in file.read_bytes() else []
        return found


def compare(folder: Path, names: list[str]) -> list[str]:
    """The users whose adapters are not those of the simulator, bit for bit."""
    other = []
    for i, name in enumerate(names):
        files = folder / name / 'adapters/user0.safetensors', folder / f'simulator/adapters/user{i}.safetensors'
        ours, theirs = (save(checkpoint.read(file)[0]) for file in files)
        other += [name] * (ours != theirs)
    return other


def watch(federation: Federation, rounds: int) -> None:
    """A bar until the run is over. Ends this process if the run has failed."""
    bar, done, run = tqdm(total=rounds, unit='round', disable=None), 0, federation.processes['run']
    while run.poll() is None:
        time.sleep(0.3)
        for line in [line for line in federation.lines() if line['kind'] == 'round' and line['round'] > done]:
            done = line['round']
            bar.update()
            bar.set_postfix({'test ppl': cell(line['test_ppl']), 'kB up': line['bytes_up'] // 1000})
            if bar.disable:
                print(f'round {done}/{rounds}  test perplexity {cell(line["test_ppl"])}', flush=True)
    bar.close()
    if run.returncode:
        sys.exit(f'the run has failed: {federation.folder}/run.log\n' + federation.said('run')[-1500:])


def main(argv: list[str]) -> None:
    p = parser(__doc__)
    p.add_argument('--n_users', type=int, default=4)
    p.add_argument('--deadline', type=float, default=600, help='seconds within which a device has to answer')
    p.add_argument('--replace', action='store_true', help='an earlier federation in that folder')
    p.add_argument('--clip', help='of every device (devices/start.py): then nothing is compared with the simulator')
    p.add_argument('--noise', default='0')
    a, argv = p.parse_known_args(argv)
    c = configure(argv)
    folder, data, N = Path(f'{c.out_dir}-devices').resolve(), folder_of(c.dataset), a.n_users
    try:
        meta = read_meta(data)
        if N > len(meta['users']):
            raise ValueError(f'--n_users={N}: {c.dataset} has {len(meta["users"])}')
        if folder.exists() and not (a.replace and (folder / 'keys/users.json').exists()):
            raise ValueError(f'{folder} exists: give --replace if it is an earlier federation, or another --out_dir')
        shutil.rmtree(folder, ignore_errors=True)
        for name, ids in ({f'data{i}': [i] for i in range(N)} | {'data': [*range(N)]}).items():
            share(data, meta, ids, folder / name)
    except (OSError, ValueError) as error:
        die(error)
    names = [re.sub(r'[^A-Za-z0-9]+', '-', user['name'])[:30] for user in meta['users'][:N]]
    names = names if len({*names, '', 'server', 'ca', 'run'}) == N + 4 else [f'user-{i}' for i in range(N)]
    base = str((ROOT / c.init_from).resolve()) if (ROOT / c.init_from).exists() else c.init_from
    argv = [str(Path(arg).resolve()) if arg.endswith('.py') else arg for arg in argv] + [f'--init_from={base}', '--device=cpu']
    keys.main([str(folder / 'keys'), *names])
    federation = Federation(folder, argv, names, [f'--clip={a.clip}', f'--noise={a.noise}'] if a.clip else [])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        federation.server()
        for i in range(N):
            federation.device(i)
        federation.run(f'--deadline={a.deadline}', f'--least={N}', *argv)
        watch(federation, c.rounds)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        federation.stop()
    told = json.loads((folder / 'server/summary.json').read_text())['test_ppl']
    print(table(['test perplexity', *told['mean']], [[name, *row.values()] for name, row in told.items()]))
    if a.clip:
        return
    print('the simulator does the same run ...', flush=True)
    command = [sys.executable, str(ROOT / 'train.py'), *argv, f'--dataset={folder}/data', f'--out_dir={folder}/simulator']
    subprocess.run([*command, '--quiet'], env=federation.env, stdout=subprocess.DEVNULL, check=True)
    if other := compare(folder, names):
        sys.exit(f'the adapters of {", ".join(other)} are not those of the simulator')
    print(f'the adapters of all {N} devices equal those of the simulator, bit for bit')


if __name__ == '__main__':
    main(sys.argv[1:])
