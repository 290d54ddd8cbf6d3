"""One process, or several under torchrun: who this one is, and how they tell each other tensors and facts.

The environment is read when it is asked for, so importing this decides nothing."""

import datetime
import json
import os
import sys

import torch
import torch.distributed as dist
from safetensors.torch import load, save

from configurator import die
from federate import Tensors


def rank() -> int:
    return int(os.environ.get('RANK') or 0)


def world() -> int:
    return int(os.environ.get('WORLD_SIZE') or 1)


def check() -> None:
    """Dies unless the launcher's variables say which process of how many this is, and where the others are."""
    said = {name: os.environ.get(name, '') for name in ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'MASTER_PORT', 'MASTER_ADDR')}
    n, i, local, port = (
        int(text or name == 'WORLD_SIZE') if text.isdecimal() or not text else -1 for name, text in [*said.items()][:4]
    )
    if not (0 <= i < n and 0 <= local < n and 0 <= port < 2**16 and (n == 1 or all(said.values()))):
        os.environ.pop('LOCAL_RANK', None)  # so that die speaks, whichever process this is
        found = ' '.join(f'{name}={text}' for name, text in said.items())
        die(f'{found}: expected numbers, ranks from 0 below WORLD_SIZE, and all five if it is above 1: start it with torchrun')


def start() -> None:
    if world() > 1:  # who dies closes its connections, and the others notice at once
        try:
            dist.init_process_group('gloo', timeout=datetime.timedelta(days=7))
        except (RuntimeError, ValueError) as error:
            die(f'process {rank()} of {world()} cannot reach MASTER_ADDR and MASTER_PORT ({str(error).splitlines()[0][:80]})')


def end() -> None:
    """The others' part of the run ends here, before process 0 reports."""
    if world() > 1:
        dist.destroy_process_group()
    if rank() > 0:
        sys.exit()


def all_gather(tensors: Tensors | None = None, facts: object = None) -> list[tuple[Tensors, object]]:
    """[(tensors, facts) of process 0, of process 1, ...], the same list in all of them; with one process its own.

    Sent as safetensors and JSON, so nothing that arrives is ever executed. Ends this process if another one is gone."""
    tensors = tensors or {}
    if world() == 1:
        return [(tensors, facts)]
    message = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    message['facts of this process'] = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    mine = torch.frombuffer(bytearray(save(message)), dtype=torch.uint8)
    found = []
    try:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
        dist.all_gather(sizes, torch.tensor([len(mine)]))
        for source, size in enumerate(sizes):  # in turn, because sizes differ
            buffer = mine if source == rank() else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(buffer, source)
            found.append(load(buffer.numpy().tobytes()))
    except RuntimeError as error:
        why = str(error).splitlines()[0][:80]
        sys.exit(f'process {rank()} has lost another one ({why}): the last finished round is kept, continue with --resume')
    return [(them, json.loads(them.pop('facts of this process').numpy().tobytes())) for them in found]


def gather(mine: dict[int, Tensors]) -> dict[int, Tensors]:
    """{user: tensors} of all processes, in order of users. mine: those of the users in memory here."""
    flat, found = {f'{i} {name}': v for i, own in mine.items() for name, v in own.items()}, {}
    for tensors, ids in all_gather(flat, [*mine]):
        found |= {i: {} for i in ids}
        for key, v in tensors.items():
            i, name = key.split(' ', 1)
            found[int(i)][name] = v
    return dict(sorted(found.items()))
