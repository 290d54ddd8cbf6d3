"""several_runs.py N JOBS: runs train.py once for every list of arguments in a JSON list, each time in N processes as torchrun
would start them. They are forks of this one, so torch is imported once."""

import json
import os
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import matplotlib  # noqa: E402, F401  what train.py needs, and nothing that starts a thread
import torch._dynamo  # noqa: E402, F401  which an optimizer imports at its first step

import data.stream  # noqa: E402, F401

source = compile((ROOT / 'train.py').read_text(), str(ROOT / 'train.py'), 'exec')
n, jobs = int(sys.argv[1]), json.loads(sys.argv[2])
for argv in jobs:
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(n):
        if not (pid := os.fork()):
            sys.argv = ['train.py', *argv]
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='localhost', MASTER_PORT=str(port)
            )
            exec(source, {'__name__': '__main__', '__file__': str(ROOT / 'train.py'), '__doc__': ''})
            sys.exit()
        children.append(pid)
    if any(os.waitpid(pid, 0)[1] for pid in children):
        sys.exit(f'failed: {" ".join(argv)}')
