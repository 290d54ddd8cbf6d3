"""The folder of a run, what is written into it, and what is shown while it runs.

    config.json      every switch in effect, versions, git commit, names of the users
    metrics.jsonl    one object a line, written as it happens: {"kind": ..., "round": ..., ...}
                       train, router  a step of a user: loss and ppl in nats per token, without load balancing; lb; lr
                       eval           perplexity of a user on a split, and the mean router score of every expert in every layer
                       comm           bytes of a user, up and down, in a round
                       trust          who trusted whom; refused: whose messages were not used; fusion: FDLoRA's weights
                     no clock in it: the same run writes the same bytes
    checkpoint/      a file for each user and one for the round (run/checkpoint.py), of the last round and the one before it
    adapters/        user{i}.safetensors; server.safetensors where there is one model for all: tensors named by role
    summary.json     the result
    eval.json, routing.html, plot.png, trust.png    by eval.py, tools/routing.py and tools/plot.py, if asked for

A folder with anything in it is refused unless --resume or --overwrite is given, which deletes what a run wrote and no more; one
in which another run is at work (.lock) is refused in any case. In a terminal a bar shows the time left and perplexity; a log
file gets a line every round, and one a minute within it; with --quiet there is the final table only."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from configurator import cell, die, mean, read_config, read_json, to_json
from federate import Tensors, n_bytes, truncate
from model import GPT, autocast, evaluate
from run import checkpoint, processes
from user import User

FREE = ('out_dir', 'resume', 'overwrite', 'device', 'init_from', 'init_adapter', 'dataset', 'quiet')  # --resume may change them
WRITTEN = (  # by a run and by the tools, in a run's folder
    r'((config|summary|eval)\.json|metrics\.jsonl|routing\.html|(plot|trust)\.(png|svg)|checkpoint/NAME'
    r'|adapters/(user(0|[1-9][0-9]*)|server|base)\.safetensors)(\.partial)?|tensorboard/events\.out\.tfevents\.[0-9]+\..+'
).replace('NAME', checkpoint.NAME)


def measured(c: SimpleNamespace, user: User, tokens: np.ndarray, model: GPT | None = None, quiet: bool = True) -> dict:
    """Loss and perplexity of the user's model (or another) on these tokens, and the mean score of every expert in every layer
    (L, E) there, if it has routers."""
    with autocast(user.device, c.dtype):
        result = evaluate(model or user.model, tokens, c.block_size, quiet)
    return {key: result[key] for key in ('loss', 'ppl', 'scores') if result[key] is not None}


def stop_on_signals(out_dir: str) -> None:
    """SIGINT, SIGTERM: the process ends at once. Every finished round is on disk, --resume does the interrupted one again."""

    def stop(number: int, _) -> None:
        name = signal.Signals(number).name
        tqdm.write(f'train.py: {name}: the last finished round is kept in {out_dir}, continue with --resume', file=sys.stderr)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


class Journal:
    def __init__(self, c: SimpleNamespace):
        """Dies if the folder cannot be this run's, before anything is read or written."""
        self.c, self.out, self.folder, self.began_main = c, Path(c.out_dir), Path(c.out_dir, 'checkpoint'), time.time()
        self.hidden = c.quiet or processes.rank() > 0  # neither lines nor bars of this process are shown
        self.start, self.t, self.kept = 0, -1, 0  # first round to do; the current one; bytes of metrics.jsonl that are kept
        self.pending, self.losses, self.bar = [], [], None
        self.results = {}  # {when: {user: (round, perplexity)}}
        self.stepped = {}  # {user: the rate of its last step}
        self.clock = {'seconds': 0.0, 'training': 0.0, 'bytes_up': 0, 'bytes_down': 0, 'steps': 0, 'checkpoints': 0.0}
        self.lock = self.metrics = None
        if why := self.refusal():
            die(why)

    # ---- the folder --------------------------------------------------------------------------------------------------
    def written(self) -> list[Path]:
        """The files of a run, or of tools about it, that are in the folder."""
        folders = [self.out, self.folder, self.out / 'adapters', self.out / 'tensorboard']
        here = [file for folder in folders if folder == self.out or not folder.is_symlink() for file in folder.glob('*')]
        return [file for file in here if re.fullmatch(WRITTEN, file.relative_to(self.out).as_posix())]

    def refusal(self) -> str:
        """Why the folder cannot be this run's, '' if it can. Only looks."""
        c, out, other = self.c, self.out, 'or another --out_dir'
        try:
            here = next(place for place in (out, *out.parents) if os.path.lexists(place))
            if not here.is_dir():
                return f'--out_dir={c.out_dir}: {here} is a file: give a folder'
            if not os.access(here, os.W_OK | os.X_OK):
                return f'cannot write to --out_dir={c.out_dir}: {here} may not be changed'
            if c.resume and not checkpoint.rounds(self.folder):
                return f'--resume: {c.out_dir} has no checkpoint; start without --resume'
            if not c.resume and (links := [folder for folder in (self.folder, out / 'adapters') if folder.is_symlink()]):
                return f'{links[0]} is a link, and a run stays in its folder: give another --out_dir'
            if (out / 'config.json').exists():
                read_config(out)
                if c.resume or c.overwrite:
                    return ''
                state = 'a finished run' if (out / 'summary.json').exists() else 'an unfinished run'
                return f'{c.out_dir} already holds {state}: give --resume to continue it, --overwrite to replace it, {other}'
            if files := [file for file in self.written() if file.name != 'config.json.partial']:
                return f'{files[0]} is of no run that can be continued or replaced: take it away, {other}'
            begun = {out / '.lock', out / 'config.json.partial', self.folder, out / 'adapters'}  # by a run that died at once
            there = [place for folder in (out, self.folder, out / 'adapters') for place in folder.glob('*')]
            if not c.overwrite and not begun.issuperset(there):
                return f'{c.out_dir} is not empty and holds no run: give --overwrite to write beside what is there, {other}'
        except (OSError, ValueError) as error:
            return f'cannot use --out_dir={c.out_dir}: {error}: give another'
        return ''

    def claim(self) -> None:
        """Takes the folder before anything is read or written there. Dies if another run is at work in it, or has begun."""
        why = ''
        try:
            if processes.rank() == 0:
                self.out.mkdir(parents=True, exist_ok=True)
                self.lock = checkpoint.lock(self.out / '.lock')
                why = self.refusal() if self.lock else f'another run is at work in {self.out}: wait, or give another --out_dir'
        except OSError as error:
            why = f'cannot write to --out_dir={self.c.out_dir}: {error.strerror}'
        if why := processes.all_gather({}, why)[0][1]:
            die(why)

    def close(self) -> None:
        for file in filter(None, (self.metrics, self.lock)):
            file.close()

    def resume(self, identity: dict) -> tuple[Tensors, dict]:
        """(tensors, facts) of the last finished round, once all its files and all lines up to it have been read. Dies if the
        base, the data or a switch that shapes the numbers is another."""
        try:
            self.start = checkpoint.rounds(self.folder)[-1]
            try:
                tensors, facts = checkpoint.check(self.folder, self.start)
            except ValueError as error:
                file, before = checkpoint.round_file(self.folder, self.start), self.start - 1
                checkpoint.check(self.folder, before)
                die(f'--resume: {error}; round {before} is intact: delete {file}, and --resume continues after it')
            identity = json.loads(json.dumps(identity))  # as a file gives it back: tuples are lists
            changed = [key for key in identity if facts['identity'].get(key) != identity[key]]
            if changed:
                die(f'--resume: {self.out} was made with another {", ".join(changed)}; use the same, or another --out_dir')
            with open(self.out / 'metrics.jsonl', 'rb') as f:
                so_far = f.read(facts['metrics_bytes'])
            if len(so_far) < facts['metrics_bytes']:
                raise ValueError(f'{self.out}/metrics.jsonl has lost lines')
            for line in so_far.splitlines():
                self.note(read_json(self.out / 'metrics.jsonl', 'kind', text=line))
            self.clock, self.kept, self.t = facts['clock'], len(so_far), self.start - 1
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = '' if isinstance(error, (OSError, ValueError)) else f'{self.out}/metrics.jsonl has what no run wrote: '
            die(f'--resume: {what}{error}: start again with --overwrite')
        return tensors, facts

    def open(self, effective: dict, identity: dict, names: list[str], tested: list[int]) -> None:
        """Begins to write. effective: what config.json has to say; identity: what --resume compares; names: of the users;
        tested: whose text the perplexities are of."""
        self.identity, self.names, self.tested = identity, names, tested
        processes.all_gather()  # all have checked and read before anything is written
        try:
            if processes.rank() == 0 and self.c.resume:
                os.truncate(self.out / 'metrics.jsonl', self.kept)  # lines of a round that was not finished are run again
            elif processes.rank() == 0:
                self.clear()
                versions = {'python': sys.version.split()[0], 'torch': torch.__version__, 'numpy': np.__version__}
                effective |= {'versions': versions, 'git_commit': git_commit()}
                checkpoint.write_json(self.out / 'config.json', effective)
        except OSError as error:
            die(f'cannot write to --out_dir={self.c.out_dir}: {error.strerror}')
        processes.all_gather()
        self.metrics = open(self.out / 'metrics.jsonl', 'ab', buffering=0) if processes.rank() == 0 else None
        self.began_rounds = time.time()
        self.began = self.began_rounds - self.clock['seconds']

    def clear(self) -> None:
        """The folder without an earlier run: what makes one of it goes first."""
        self.folder.mkdir(exist_ok=True)
        (self.out / 'adapters').mkdir(exist_ok=True)
        for old in sorted(self.written(), key=lambda file: (file.name != 'summary.json', not file.name.startswith('round-'))):
            if old.name != 'config.json':  # which is replaced
                old.unlink()

    def facts(self) -> dict:
        """What the round's file keeps of the journal."""
        self.clock['seconds'] = time.time() - self.began
        return {'metrics_bytes': self.metrics.tell(), 'clock': self.clock, 'identity': self.identity}

    # ---- lines -------------------------------------------------------------------------------------------------------
    def log(self, kind: str, values: dict) -> None:
        """One line of metrics.jsonl, about one user or, from process 0, about the round. Alone, a process puts it on disk at
        once; together with others it waits for `publish`. Ends the process where training has diverged."""
        if kind in ('train', 'router', 'eval'):
            self.check(kind, values)
        if 'user' in values or processes.rank() == 0:
            self.pending.append({'kind': kind, 'round': self.t + 1, **values})
        if processes.world() == 1:
            self.publish()
        if kind in ('train', 'router'):
            self.clock['training'] += time.time() - self.trains_since
            self.trains_since = time.time()
        if kind == 'train':
            self.show_step(values['user'], values['loss'])

    def check(self, kind: str, values: dict) -> None:
        """Ends the process where a loss or perplexity is not finite. The cause is the user's last step, else the start."""
        i, loss = values['user'], values['loss']
        if not math.isfinite(loss) or not math.isfinite(values.get('ppl', 0)):
            what = 'training' if kind == 'train' else values.get('split', 'router')
            untrained = values.get('when') == 'pretrained' or not (self.stepped or self.start)
            fix = 'give another base, --init_from' if untrained else f'lower {self.stepped.get(i, "--expert_lr")}'
            where = f'user {i} ({self.name(i)}): the {what} loss is {loss:.4g} at step {values["step"]}'
            sys.exit(f'{where}: {fix}; the last finished round is kept in {self.folder}')
        if kind != 'eval':
            self.stepped[i] = '--router_lr' if kind == 'router' else '--expert_lr'

    def publish(self) -> None:
        """Every process's new lines, in order of users, into metrics.jsonl (process 0) and what they say into `results`
        (all)."""
        lines = [line for _, theirs in processes.all_gather({}, self.pending) for line in theirs]
        self.pending = []
        lines.sort(key=lambda line: line.get('user', -1))
        for line in lines:
            self.note(line)
        if processes.rank() == 0 and lines:
            try:
                self.metrics.write(''.join(to_json(line) + '\n' for line in lines).encode())
            except OSError as error:
                checkpoint.cannot_write(self.out / 'metrics.jsonl', error)

    def note(self, line: dict) -> None:
        """What a run must know of all its users later."""
        if line['kind'] == 'eval' and (line['split'] == 'test' or line['when'] == 'final'):
            self.results.setdefault(line['when'], {})[line['user']] = line['round'], line['ppl']
        elif line['kind'] == 'comm':
            for key in ('bytes_up', 'bytes_down'):
                self.clock[key] += line[key]
        elif line['kind'] in ('train', 'router'):
            self.clock['steps'] += 1
            self.losses += [line['loss']] if line['kind'] == 'train' else []

    def test(self, user: User, when: str, model: GPT | None = None, **at: int) -> None:
        """What is measured of the user's model (or another) on the whole test split of the user (of all, if pooled), which
        nothing else reads. With --eval_valid, after local steps, the same of its validation text."""
        texts = [(i, 'test', tokens) for i, tokens in user.tests.items()]
        if self.c.eval_valid and when == 'local':
            texts.append((user.id, 'valid', user.data['valid']))
        for i, split, tokens in texts:
            seen = measured(self.c, user, tokens, model, self.hidden)
            self.log('eval', {'step': user.expert_steps, 'user': i, 'split': split, 'when': when, **seen, **at})
        self.trains_since = time.time()

    def of_all(self, when: str, t: int | None = None) -> list[float | None]:
        """Perplexity of every tested user at its last evaluation of that kind; None if there was none, or none in round t."""
        known = {i: ppl for i, (last, ppl) in self.results.get(when, {}).items() if t in (None, last)}
        return [known.get(i) for i in self.tested]

    # ---- what is shown -----------------------------------------------------------------------------------------------
    def rounds(self, fleet) -> Iterator[int]:
        """t = 0, 1, ... of the rounds that are still to be done, with a bar, and what came out after each."""
        c, everybody = self.c, len(self.names) == fleet.N
        self.fleet, steps = fleet, fleet.n_present * c.local_steps
        self.say(
            f'{c.method} on {c.dataset} ({c.target}): {fleet.N} users'
            + f', {fleet.n_present} a round' * (fleet.n_present < fleet.N)
            + f', {sum(p.numel() for p in fleet.base.parameters()):,} frozen parameters, '
            f'{n_bytes(truncate(fleet.asked, c.lora_rank[0])):,} bytes of LoRA up per user and round (user 0), '
            f'{c.device} {c.dtype}' + f', {processes.world()} processes' * (processes.world() > 1)
        )
        self.bar = tqdm(
            total=c.rounds * steps, initial=self.start * steps, unit='step', smoothing=0.05, disable=self.hidden or None
        )
        self.told = time.time()
        for self.t in range(self.start, c.rounds):
            self.done, self.losses = 0, []  # expert steps of this process's users in this round
            yield self.t
            self.bar.update((self.t + 1) * steps - self.bar.n)  # steps of other processes, and of who failed
            self.show_round()
            ppl = self.of_all('local', self.t + 1)
            if mean(ppl) is not None and ((self.t + 1) % c.eval_every == 0 or self.t + 1 == c.rounds):
                each = '  '.join(f'{name} {cell(p)}' for name, p in zip(self.names, ppl))
                n = sum(p is not None for p in ppl)
                some = f'{cell(mean(ppl))} (mean of {n} users' + f', of {len(ppl)} tested' * (n < len(ppl)) + ')'
                few = everybody and len(ppl) == len(self.names) <= 8
                self.say(f'round {self.t + 1:3}/{c.rounds}  test perplexity {each if few else some}')
        self.bar.close()
        self.seconds_per_round = (time.time() - self.began_rounds) / max(1, c.rounds - self.start)

    def say(self, text: str) -> None:
        """A line, above the bar where there is one, and at once where stdout is a file."""
        if not self.hidden:
            tqdm.write(text)
            sys.stdout.flush()

    def show_step(self, i: int, loss: float) -> None:
        self.done += 1
        self.bar.update()
        if not self.bar.disable:
            last = max((t for t, _ in self.results.get('local', {}).values()), default=0)
            ppl = [p for p in self.of_all('local', last) if p is not None]
            said = f'{cell(mean(ppl))} (round {last}, mean of {len(ppl)})' if ppl else '-'
            self.bar.set_postfix({'round': self.t + 1, 'user': self.name(i), 'loss': f'{loss:.3f}', 'test ppl': said})
        elif time.time() - self.told > 60:
            self.show_round()

    def show_round(self) -> None:
        """Where no terminal shows the bar, such as in a log file, a line instead. The loss is the mean over the steps known."""
        self.told, c = time.time(), self.c
        if self.bar.disable and not self.hidden:
            users = len(self.fleet.here)
            part = min(1.0, self.done / (users * c.local_steps)) if users else 1.0  # nobody: the end of a round that all failed
            left = (self.told - self.began_rounds) / (self.t - self.start + part) * (c.rounds - self.t - part)  # seconds
            known = self.losses + [line['loss'] for line in self.pending if line['kind'] == 'train']
            self.say(
                f'round {self.t + 1:3}/{c.rounds}  {min(self.done // c.local_steps, users)}/{users} users'
                + ' of process 0' * (processes.world() > 1)
                + f'  train loss {cell(mean(known))}  {tqdm.format_interval(left)} left'
            )

    def name(self, i: int) -> str:
        return 'all' if self.c.pooled else self.names[i]


def git_commit() -> str:
    command = ['git', 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ''
