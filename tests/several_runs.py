"""several_runs.py N JOBS [ACCIDENTS]: runs train.py once for every list of arguments in a JSON list, each in N processes as
torchrun would start them. They are forks of this one, so torch is imported once.

ACCIDENTS: for every run what happens to it, or null:
    {"signal": 9, "after": 0.7}              the parent sends it after so many seconds; with "from": FILE, after that is there
    {"signal": 9, "at": "fsync", "call": 3}  the run kills itself before its third call of that function (of POINTS)
    {"count": true}                          it writes how often it calls each of POINTS to stderr
    {"limit": 30000}                         it can write no file longer than so many bytes, as if the disk were full
    {"audit": FILE}                          what it broadcasts to other processes is appended to the file, byte for byte
    {"mark": 1.5}                            specialists and routers start as this number everywhere
    {"samples": FILE}                        memory (bytes), open files and threads ten times a second, until the file is there
With ACCIDENTS the end of every run is printed as JSON: exit status (negative: the signal), seconds from the signal to the end,
stderr, samples."""

import json
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  which an optimizer imports at its first step
import torch.distributed as dist  # noqa: E402

import data.stream  # noqa: E402, F401
import lora_moe  # noqa: E402
import plot  # noqa: E402

plot.run = lambda out: None  # pictures take longer than these rounds
POINTS = {'write': (Path, 'write_bytes'), 'fsync': (os, 'fsync'), 'replace': (os, 'replace'), 'unlink': (Path, 'unlink')}


def prepare(accident: dict) -> None:
    """In the child, before the run."""
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
        initial = lora_moe.initial
        lora_moe.initial = lambda name, shape, *key: (
            initial(name, shape, *key) if key[1:2] == ('server',) else torch.full(shape, accident['mark'])
        )
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


def sample(pid: int) -> list[int]:
    status = dict(line.split(':', 1) for line in Path(f'/proc/{pid}/status').read_text().splitlines())
    return [int(status['VmRSS'].split()[0]) * 1024, len(os.listdir(f'/proc/{pid}/fd')), int(status['Threads'])]


def main() -> None:
    source = compile((ROOT / 'train.py').read_text(), str(ROOT / 'train.py'), 'exec')
    n, jobs = int(sys.argv[1]), json.loads(sys.argv[2])
    accidents = json.loads(sys.argv[3]) if len(sys.argv) > 3 else None
    for argv, accident in zip(jobs, accidents or [{}] * len(jobs)):
        accident = accident or {}
        with socket.socket() as s:
            s.bind(('localhost', 0))
            port = s.getsockname()[1]
        children, errors = [], tempfile.TemporaryFile()
        for rank in range(n):
            if not (pid := os.fork()):
                if accidents:
                    os.dup2(errors.fileno(), 2)
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                sys.argv = ['train.py', *argv]
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='localhost', MASTER_PORT=str(port)
                )
                prepare(accident)
                exec(source, {'__name__': '__main__', '__file__': str(ROOT / 'train.py'), '__doc__': ''})
                sys.exit()
            children.append(pid)
        samples, told = [], None
        if 'after' in accident:
            while 'from' in accident and not Path(accident['from']).exists():
                time.sleep(0.01)
            time.sleep(accident['after'])
            for pid in children:
                os.kill(pid, accident['signal'])
            told = time.time()
        while 'samples' in accident and not Path(accident['samples']).exists():
            samples.append(sample(children[0]))
            time.sleep(0.1)
        ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        if accidents:
            errors.seek(0)
            seconds = time.time() - told if told else None
            print(json.dumps([max(ends, key=abs), seconds, errors.read().decode(errors='replace'), samples]), flush=True)
        elif any(ends):
            sys.exit(f'failed: {" ".join(argv)}')


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
