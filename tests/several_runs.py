"""train.main in processes of its own, as torchrun would start them, and what can happen to such a run.

They are forks of a process that has imported torch and done nothing else, so one starts within a moment and inherits nothing.

An accident is what happens to a run:
    {'signal': 9, 'after': 0.7}              all its processes (or 'rank': 2 alone) get it after so many seconds; with
                                             'from': FILE after that has 'lines': n lines (0: is there)
    {'signal': 9, 'at': 'fsync', 'call': 3}  the run kills itself before its third call of that function (of POINTS)
    {'count': True}                          it writes how often it calls each of POINTS to stderr
    {'limit': 30000}                         it can write no file longer than so many bytes, as if the disk were full
    {'audit': FILE}                          what it broadcasts to other processes is appended to the file, byte for byte
    {'mark': 1.5}                            specialists and routers start as this number everywhere
    {'samples': FILE}                        memory (bytes), open files and threads ten times a second, until the file is there
"""

import contextlib
import json
import multiprocessing
import os
import resource
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['train', 'torch._dynamo', 'pytest'])  # found where pytest is started, else each imports its own
POINTS = {'write': (Path, 'write_bytes'), 'fsync': (os, 'fsync'), 'replace': (os, 'replace'), 'unlink': (Path, 'unlink')}


def several_runs(jobs: list[list[str]], accidents: list[dict] | None = None, n: int = 1) -> list[SimpleNamespace]:
    """train.main of every list of arguments in turn, each in n processes. Of each: statuses, the exit status of every process
    (negative: the signal), and status, the one farthest from 0; seconds from the signal to the end; err, what they wrote to
    stderr; samples."""
    return [run(argv, accident, n) for argv, accident in zip(jobs, accidents or [{}] * len(jobs), strict=True)]


def run(argv: list[str], accident: dict, n: int) -> SimpleNamespace:
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    with tempfile.NamedTemporaryFile() as errors:
        env = {'WORLD_SIZE': str(n), 'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(port)}
        ranks = [{**env, 'RANK': str(rank), 'LOCAL_RANK': str(rank)} for rank in range(n)]
        children = [FORKS.Process(target=train, args=(argv, accident, rank, errors.name), daemon=True) for rank in ranks]
        for child in children:
            child.start()
        samples, told = [], None
        if 'after' in accident:
            while 'from' in accident and count(accident['from']) < accident.get('lines', 0):
                time.sleep(0.01)
            time.sleep(accident['after'])
            for child in [children[accident['rank']]] if 'rank' in accident else children:
                with contextlib.suppress(ProcessLookupError):  # it has ended
                    os.kill(child.pid, accident['signal'])
            told = time.time()
        while 'samples' in accident and not Path(accident['samples']).exists():
            samples.append(sample(children[0].pid))
            time.sleep(0.1)
        for child in children:
            child.join(300)
        seconds = time.time() - told if told else None
        err, statuses = Path(errors.name).read_text(errors='replace'), [child.exitcode for child in children]
    return SimpleNamespace(status=max(statuses, key=abs), statuses=statuses, seconds=seconds, err=err, samples=samples)


def count(file: str) -> int:
    return Path(file).read_bytes().count(b'\n') if Path(file).exists() else -1


def train(argv: list[str], accident: dict, env: dict, errors: str) -> None:
    """In the child."""
    file = os.open(errors, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 2)
    sys.stderr, sys.stdout = open(2, 'w', buffering=1, closefd=False), open(os.devnull, 'w')
    os.environ.update(env)
    sys.argv = ['train.py', *argv]
    import torch

    import train

    torch.set_num_threads(1)
    prepare(accident)
    train.main(argv)


def prepare(accident: dict) -> None:
    """In the child, before the run."""
    import torch.distributed as dist

    import user

    if 'limit' in accident:
        resource.setrlimit(resource.RLIMIT_FSIZE, (accident['limit'], accident['limit']))
    if 'audit' in accident:
        broadcast = dist.broadcast

        def audited(buffer, source):
            broadcast(buffer, source)
            with open(accident['audit'], 'ab') as f:
                f.write(buffer.numpy().tobytes())

        dist.broadcast = audited
    if 'mark' in accident:
        user.initial = marked(user.initial, accident['mark'])
    calls = dict.fromkeys(POINTS, 0)

    def counted(point, function):
        def call(*args, **kwargs):
            calls[point] += 1
            if 'count' in accident:
                print('calls', json.dumps(calls), file=sys.stderr)
            if accident.get('at') == point and accident['call'] == calls[point]:
                if point == 'write':
                    function(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), accident['signal'])
            return function(*args, **kwargs)

        return call

    if 'at' in accident or 'count' in accident:
        for point, (owner, name) in POINTS.items():
            setattr(owner, name, counted(point, getattr(owner, name)))


def marked(initial, mark: float):
    """lora_moe.initial, but what never leaves a user starts as this number everywhere."""
    import torch

    return lambda name, shape, *key: initial(name, shape, *key) if key[1:2] == ('server',) else torch.full(shape, mark)


def sample(pid: int) -> list[int]:
    status = dict(line.split(':', 1) for line in Path(f'/proc/{pid}/status').read_text().splitlines())
    return [int(status['VmRSS'].split()[0]) * 1024, len(os.listdir(f'/proc/{pid}/fd')), int(status['Threads'])]
