"""The state of a run on disk, as sealed files: one for every user that ever took part, and one for the round.

    RUN/checkpoint/round-{t}.safetensors      a finished round t: the server's tensors, and facts
    RUN/checkpoint/user{i}-{t}.safetensors    user i at the end of round t, of the last that it took part in

A user that does not train exists as its file only, so a run needs memory for the users of one round, however many there are.
A round is finished once `round-{t}.safetensors` is there: users' files of that round are written before it. Files that neither
this round nor the one before needs are deleted after it. So whenever a process dies there is a complete round to continue
from, and should one of its files be damaged later, the round before it too.

Every file holds its own SHA-256, and what differs from it by a bit is refused: safetensors alone would take a flipped bit of
a tensor for a number."""

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import load
from safetensors.torch import save as to_bytes

from configurator import to_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = r'(round-(?P<round>NR)|userNR-NR)\.safetensors'.replace('NR', '(0|[1-9][0-9]*)')  # of the files here


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """The file appears complete or not at all, whenever the process or the machine dies. write(path) makes it. Ends the
    process with one line if it cannot be written: the disk is full, or the folder is not ours."""
    partial = file.with_name(file.name + '.partial')
    try:
        write(partial)
        with open(partial, 'rb+') as f:
            os.fsync(f.fileno())
        os.replace(partial, file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        cannot_write(file, error)
    with contextlib.suppress(OSError):  # the new name, too, survives a power cut, where a system can do that to a folder
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(file: Path, value: object) -> None:
    """As `write_atomically`, in lines that people can read."""
    write_atomically(file, lambda path: path.write_bytes(to_json(value, indent=1).encode()))


def lock(file: Path) -> BinaryIO | None:
    """The file, locked until it is closed or this process has died; None if another process has it. Where a system or a mount
    has no locks, nobody is kept out. Raises OSError if the file cannot be made."""
    opened = open(file, 'ab')
    try:
        fcntl and fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return opened.close()
    except OSError:
        pass
    return opened


def cannot_write(file: Path, error: OSError) -> None:
    sys.exit(f'cannot write {file} ({error.strerror}): the last finished round is kept; make room, then continue with --resume')


def save(file: Path, tensors: dict[str, torch.Tensor], facts: dict, **metadata: str) -> None:
    """Tensors and facts (numbers and strings) as one .safetensors file. In its metadata, beside what else is given: `facts` in
    JSON, and `sha256`, of the whole file with 64 zeros in this place."""
    tensors = {name: v.detach().cpu().contiguous() for name, v in tensors.items()}
    raw = sealed(to_bytes(tensors, {**metadata, 'facts': json.dumps(facts, allow_nan=False), 'sha256': '0' * 64}))
    write_atomically(file, lambda path: path.write_bytes(raw))


def sealed(raw: bytes) -> bytes:
    """The file with the right `sha256`. ValueError if it has no place for it; quotes within a name or a value are escaped."""
    at = raw.index(b'"sha256":"', 8, 8 + int.from_bytes(raw[:8], 'little')) + len(b'"sha256":"')
    before, after = memoryview(raw)[:at], memoryview(raw)[at + 64 :]
    digest = hashlib.sha256(before)
    digest.update(b'0' * 64)
    digest.update(after)
    return b''.join((before, digest.hexdigest().encode(), after))


def read(file: Path, prefix: str = '') -> tuple[dict[str, torch.Tensor], dict]:
    """(the tensors whose names begin with the prefix, without it, in order of names; facts). Raises ValueError naming the
    file."""
    try:
        raw = Path(file).read_bytes()
        if sealed(raw) != raw:
            raise ValueError
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], 'little')])
        return part(dict(sorted(load(raw).items())), prefix), json.loads(header['__metadata__']['facts'])
    except OSError as error:
        raise ValueError(f'{file} cannot be read ({error.strerror})') from None
    except Exception:
        raise ValueError(f'{file} is damaged: its SHA-256 is not that of its content') from None


def part(tensors: dict, prefix: str) -> dict:
    """The tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}


def under(prefix: str, tensors: dict) -> dict:
    """The tensors with the prefix before their names, as `part` finds them."""
    return {prefix + name: v for name, v in tensors.items()}


def user_file(folder: Path, i: int, t: int) -> Path:
    return folder / f'user{i}-{t}.safetensors'


def round_file(folder: Path, t: int) -> Path:
    return folder / f'round-{t}.safetensors'


def rounds(folder: Path) -> list[int]:
    """The finished rounds that the folder has, in order; none if there is no such folder."""
    names = [re.fullmatch(NAME, file.name) for file in (folder.iterdir() if folder.is_dir() else ())]
    return sorted(int(match['round']) for match in names if match and match['round'])


def read_round(folder: Path, t: int) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, facts) of round t, with facts['last_round'] {user: the last round up to t that it took part in}. Raises as
    `read`."""
    tensors, facts = read(round_file(folder, t))
    return tensors, {**facts, 'last_round': {int(i): r for i, r in facts['last_round'].items()}}


def check(folder: Path, t: int) -> tuple[dict[str, torch.Tensor], dict]:
    """As `read_round`, after every file that the round needs has been read."""
    tensors, facts = read_round(folder, t)
    for i, r in facts['last_round'].items():
        read(user_file(folder, i, r))
    return tensors, facts


def remove_others(folder: Path, *needed: tuple[int, dict[int, int]]) -> None:
    """Deletes the files of all rounds but these, each given as (t, last_round). What no run wrote stays."""
    wanted = {round_file(folder, t) for t, _ in needed}
    wanted |= {user_file(folder, i, r) for _, last_round in needed for i, r in last_round.items()}
    for file in folder.iterdir():
        if file not in wanted and re.fullmatch(NAME + r'(\.partial)?', file.name):
            file.unlink()
