"""The state of a run on disk: one file for every user that ever took part, and one for the round.

    RUN/checkpoint/round.safetensors          the last finished round t: the server's tensors, and facts
    RUN/checkpoint/user{i}-{t}.safetensors    user i at the end of round t, the last that it took part in

A user that does not train exists as its file only, so a run needs memory for the users of one round, however many there are.
A round is finished once `round.safetensors` has been replaced. Users' files of that round are written before, and the files
that they supersede deleted after it, so whenever a process dies there is one complete round to continue from."""

import json
import os
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def write_atomically(file: Path, write) -> None:
    """The file appears complete or not at all, whenever the process or the machine dies. write(path) makes it."""
    partial = file.with_name(file.name + '.partial')
    write(partial)
    with open(partial, 'rb+') as f:
        os.fsync(f.fileno())
    os.replace(partial, file)


def save(file: Path, tensors: dict[str, torch.Tensor], facts: dict) -> None:
    """Tensors and facts (numbers and strings) as one .safetensors file."""
    tensors = {name: v.detach().cpu().contiguous() for name, v in tensors.items()}
    write_atomically(file, lambda path: save_file(tensors, path, {'facts': json.dumps(facts)}))


def read(file: Path, prefix: str = '') -> tuple[dict[str, torch.Tensor], dict]:
    """(the tensors whose names begin with the prefix, without it; facts). Raises ValueError naming the file."""
    try:
        with safe_open(file, framework='pt') as f:
            tensors = {name.removeprefix(prefix): f.get_tensor(name) for name in f.keys() if name.startswith(prefix)}
            return tensors, json.loads(f.metadata()['facts'])
    except Exception as error:
        raise ValueError(f'{file} cannot be read ({type(error).__name__})') from None


def part(tensors: dict, prefix: str) -> dict:
    """The tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}


KEPT = ('rank', 'stacks_seen', 'expert_steps', 'router_steps')  # of a user, beside its tensors


def save_user(file: Path, user) -> None:
    """All that a user is between two rounds: adapter, Adam's moments, what the server or other users gave it alone."""
    tensors = {f'adapter/{name}': p for name, p in user.adapter.items()}
    tensors |= {f'grad/{name}': p.grad for name, p in user.adapter.items() if p.grad is not None}  # of leak_gradients
    tensors |= {f'download/{name}': v for name, v in user.download.items()}
    tensors |= {f'pseudo_labels/{i}': v for i, v in enumerate(user.pseudo_labels or ())}
    for which in ('expert_opt', 'router_opt'):
        states = getattr(user, which).state_dict()['state'] if getattr(user, which) else {}
        tensors |= {f'{which}/{i}/{key}': v for i, state in states.items() for key, v in state.items()}
    save(file, tensors, {name: getattr(user, name) for name in KEPT})


def restore_user(file: Path, user) -> None:
    """The user as `save_user` wrote it. Raises ValueError if the file cannot be read."""
    tensors, facts = read(file)
    vars(user).update(facts, download=part(tensors, 'download/'))
    with torch.no_grad():
        for name, v in part(tensors, 'adapter/').items():
            user.adapter[name].copy_(v)
    for name, v in part(tensors, 'grad/').items():
        user.adapter[name].grad = v.to(user.adapter[name].device)
    labels, device = part(tensors, 'pseudo_labels/'), next(iter(user.adapter.values())).device
    user.pseudo_labels = [labels[i].to(device) for i in sorted(labels)] or None
    for which in ('expert_opt', 'router_opt'):
        states = {}
        for key, v in part(tensors, which + '/').items():
            i, name = key.split('/')
            states.setdefault(int(i), {})[name] = v
        if getattr(user, which):
            getattr(user, which).load_state_dict({**getattr(user, which).state_dict(), 'state': states})


def user_file(folder: Path, i: int, t: int) -> Path:
    return folder / f'user{i}-{t}.safetensors'


def rounds_of_users(folder: Path, t: int) -> dict[int, int]:
    """{user: the last round up to t that it took part in}, from the files there; users that never did are missing."""
    found = {}
    for file in folder.iterdir():
        if match := re.fullmatch(r'user(\d+)-(\d+)\.safetensors', file.name):
            i, r = map(int, match.groups())
            found[i] = max(found.get(i, 0), r) if r <= t else found.get(i, 0)
    return {i: r for i, r in sorted(found.items()) if r}


def remove_others(folder: Path, keep: dict[int, int]) -> None:
    """Deletes users' files that belong to no finished round or are superseded. keep: as `rounds_of_users` gives it."""
    wanted = {user_file(folder, i, r) for i, r in keep.items()}
    for file in folder.iterdir():
        if file.name.startswith('user') and file not in wanted:
            file.unlink()
