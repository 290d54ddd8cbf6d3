"""One round of CoMiGS in the real code with real tensors: prints what docs/walkthrough.md shows.

    python docs/walkthrough.py              # needs data/demo (python data/prepare.py demo); under a minute
    python docs/walkthrough.py --write      # and puts it into the code blocks of docs/walkthrough.md

It calls train.py's `main`. Six functions get a wrapper while it runs, which calls them and keeps what a user's tensors were
before and after. Other arguments go to train.py: --dataset=PATH, --local_steps=5."""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import federate  # noqa: E402
import train  # noqa: E402
from configurator import mean, steady_output  # noqa: E402
from model import evaluate  # noqa: E402
from run.journal import Journal  # noqa: E402
from user import User  # noqa: E402

PAGE = ROOT / 'docs' / 'walkthrough.md'
WATCHED = {'receive': User, 'expert_step': User, 'router_step': User, 'upload': User, 'combine': federate, 'test': Journal}
ROLES = ('attention', 'generalist', 'specialist', 'router')


# ---- the run ---------------------------------------------------------------------------------------------------------
def follow(args: list[str]) -> tuple[SimpleNamespace, list[SimpleNamespace]]:
    """(what train.main returns, the watched calls in their order). Every call: name, user, before and after (all the user's
    tensors, {name: copy}), args, result."""
    calls = []

    def watched(name: str, function: Callable) -> Callable:
        def call(*args, **named):
            user = next((arg for arg in args if isinstance(arg, User)), None)  # combine is the server's
            seen = SimpleNamespace(name=name, user=user and user.id, args=args, before=tensors_of(user))
            seen.result = function(*args, **named)
            seen.after = tensors_of(user)
            calls.append(seen)
            return seen.result

        return call

    with contextlib.ExitStack() as patches:
        for name, owner in WATCHED.items():
            patches.enter_context(mock.patch.object(owner, name, watched(name, getattr(owner, name))))
        return train.main(['config/demo.py', '--rounds=1', '--router_every=10', '--device=cpu', *args]), calls


def tensors_of(user: User | None) -> dict:
    return {name: p.detach().clone() for name, p in user.adapter.items()} if user else {}


# ---- what is printed: seven sections, each beginning with a line `--- title` -----------------------------------------
def tell(run: SimpleNamespace, calls: list[SimpleNamespace]) -> Iterator[str]:
    """The lines of the page, in its order."""
    # {function: [[calls of user 0], [calls of user 1], ...]}
    of = {name: [[c for c in calls if (c.name, c.user) == (name, user.id)] for user in run.users] for name in WATCHED}
    combined = next(call for call in calls if call.name == 'combine')
    yield from before_training(run, of['receive'])
    yield from expert_level(run, of['expert_step'])
    yield from router_level(run, of['router_step'][0])
    yield from at_the_server(run, [some[0].after for some in of['receive']], combined)
    yield from evaluation(run, of['test'][0][0], [some[-1] for some in of['receive']])


def before_training(run: SimpleNamespace, received: list[list]) -> Iterator[str]:
    base, user, firsts = run.fleet.base, run.users[0], [some[0] for some in received]
    yield '--- 0. who holds what'
    frozen = sum(p.numel() for p in base.parameters())
    yield f'the frozen base, once for all: {base.config.n_layer} blocks of width {base.config.n_embd}, {frozen:,} numbers'
    for u, name in zip(run.users, run.fleet.texts.names):
        yield f'user {u.id}, {name}: ' + ', '.join(f'{len(v):,} {split}' for split, v in u.data.items()) + ' tokens'
    yield 'what user 0 trains in its first block:'
    for name in (name for name in user.role if name.startswith('h.0.')):
        stays = 'leaves' if name in user.shared else 'stays'
        yield f'  {name:38} {str(tuple(user.adapter[name].shape)):>10}  {user.role[name]:10}  {stays}'
    numbers, leaving = (sum(user.adapter[name].numel() for name in names) for names in (user.role, user.shared))
    yield f'in all {base.config.n_layer} blocks: {len(user.role)} tensors, {numbers:,} numbers;'
    yield f'of these {len(user.shared)} tensors, {leaving:,} numbers, may leave'

    yield '--- 1. download'
    for c in firsts:
        down = federate.n_bytes({name: c.after[name] for name in user.shared})
        yield f'user {c.user} gets {len(user.shared)} tensors, {down:,} bytes; changed: {changed(user, c.before, c.after)}'
    yield equal_in_all(user, [c.after for c in firsts])
    start = firsts[0].after
    A, B = ([name for name in user.role if name.endswith(factor)] for factor in ('.A', '.B'))
    yield f'norm of user 0: all A {distance(dict.fromkeys(A, 0), start, A):.3f}, all B {start[B[0]].norm():.3f}'
    x = torch.from_numpy(user.data['valid'][: run.c.block_size].astype('int64'))[None]  # (1, T)
    user.load(start)
    with torch.no_grad():
        logits, plain = user.model(x)[0], base(x)[0]  # (1, T, V)
    yield f'so its logits {tuple(logits.shape)} are those of the base: largest difference {(logits - plain).abs().max():.5f}'


def expert_level(run: SimpleNamespace, steps: list[list]) -> Iterator[str]:
    user = run.users[0]
    yield f'--- 2. {len(steps[0])} expert steps'
    yield f'user 0, batches of {run.c.batch_size} x {run.c.block_size} training tokens'
    yield '  step       lr  cross-entropy   change of A   change of B   of the router'
    kinds = [[name for name in user.role if name.endswith(end)] for end in ('.A', '.B', 'router.weight')]
    for c in (steps[0][0], steps[0][1], steps[0][-1]):
        A, B, router = (distance(c.before, c.after, names) for names in kinds)
        step, lr, loss = (c.result[key] for key in ('step', 'lr', 'loss'))
        yield f'  {step:4}  {lr:.5f}  {loss:13.4f}  {A:12.4f}  {B:12.4f}  {router:14.4f}'
    yield f'changed in user 0: {changed(user, steps[0][0].before, steps[0][-1].after)}'
    for i, some in enumerate(steps):
        first, last = some[0].result['loss'], some[-1].result['loss']
        yield f'user {i}: cross-entropy of its batch, first {first:.3f}, last {last:.3f} nats per byte'


def router_level(run: SimpleNamespace, phase: list) -> Iterator[str]:
    user = run.users[0]
    yield f'--- 3. {len(phase)} router steps'
    yield f'user 0, batches of {run.c.batch_size} x {run.c.block_size} validation tokens'
    yield '  step       lr  cross-entropy  load balancing  change of the router  of A and B'
    routers = [name for name in user.role if user.role[name] == 'router']
    for c in (phase[0], phase[-1]):
        router, rest = (distance(c.before, c.after, names) for names in (routers, user.role.keys() - routers))
        step, lr, loss, lb = (c.result[key] for key in ('router_step', 'lr', 'loss', 'lb'))
        yield f'  {step:4}  {lr:.5f}  {loss:13.4f}  {lb:14.4f}  {router:20.4f}  {rest:10.4f}'
    yield f'changed in user 0: {changed(user, phase[0].before, phase[-1].after)}'
    windows, seen = user.data['valid'][: 4 * run.c.block_size + 1], []
    yield f'weights (generalist, specialist) on its first {len(windows) - 1:,} validation tokens, before and after the phase:'
    for tensors in (phase[0].before, phase[-1].after):
        user.load(tensors)
        seen.append(evaluate(user.model, windows, run.c.block_size))
    for layer, name in enumerate(routers):
        before, after = (' '.join(f'{w:.3f}' for w in result['scores'][layer]) for result in seen)
        yield f'  layer {layer}: Φ {tuple(user.adapter[name].shape)}, mean weights {before} -> {after}'
    x = torch.from_numpy(windows[: run.c.block_size].astype('int64'))[None]  # (1, T)
    with torch.no_grad():
        routing = user.model.loss(x[:, :-1], x[:, 1:])[1][0]  # of the first layer
    yield f'  layer 0 after the phase, probs {tuple(routing.probs.shape)}: its first three tokens have'
    yield '    ' + ', '.join('(' + ' '.join(f'{w:.3f}' for w in row) + ')' for row in routing.probs[:3].tolist())
    yield f'  cross-entropy there {seen[0]["loss"]:.4f} -> {seen[1]["loss"]:.4f}'


def at_the_server(run: SimpleNamespace, start: list[dict], combined: SimpleNamespace) -> Iterator[str]:
    user, sent, server = run.users[0], combined.args[3], combined.result[0]  # of combine(c, t, server, sent, ...)
    yield '--- 4. upload'
    for i, update in sent.items():
        count = ', '.join(f'{sum(user.role[name] == role for name in update)} {role}' for role in ROLES)
        gone = distance(start[i], update, user.shared)
        yield f'user {i} sends {count} tensors: {federate.n_bytes(update):,} bytes, {gone:.3f} away from the download'

    yield '--- 5. average'
    name = 'h.0.mlp.generalists.0.c_fc.B'
    of_users = ' '.join(f'{update[name][0, 0]:.5f}' for update in sent.values())
    yield f'{name} {tuple(server[name].shape)}, its first number: users {of_users}, server {server[name][0, 0]:.5f}'
    plain = {n: torch.stack([update[n] for update in sent.values()]).mean(0) for n in server}
    error = max((plain[n] - server[n]).abs().max() for n in server)
    yield f'largest difference from the plain mean of {len(sent)}: {error:.5f}'
    yield f'the mean is {distance(start[0], server, user.shared):.3f} away from the download'
    yield f'bytes up, all users: {run.summary["bytes_up"]:,}; down: {run.summary["bytes_down"]:,}'


def evaluation(run: SimpleNamespace, test: SimpleNamespace, last: list) -> Iterator[str]:
    user, columns = run.users[0], [run.summary[f'{when}test_ppl'] for when in ('pretrained_', '', 'aggregated_')]
    yield '--- 6. evaluation'
    yield f'  {"test perplexity":24}  {"base":>16}     after H steps  after the mean'
    for u, name, *row in zip(run.users, run.fleet.texts.names, *columns):
        yield f'  {name:10} {len(u.data["test"]):,} tokens  {"  ".join(f"{ppl:16.3f}" for ppl in row)}'
    yield f'  {"mean":24}  {"  ".join(f"{mean(column):16.3f}" for column in columns)}'
    yield f'changed in user 0 by evaluating it: {changed(user, test.before, test.after)}'
    yield f'and by the download before the last column: {changed(user, last[0].before, last[0].after)}'
    yield equal_in_all(user, [c.after for c in last])


def distance(before: dict, after: dict, names: Iterable[str]) -> float:
    """Euclidean norm of the change of these tensors, as one vector."""
    return sum(((after[name] - before[name]) ** 2).sum().item() for name in names) ** 0.5


def changed(user: User, before: dict, after: dict) -> str:
    """How many tensors of every role are not bit-equal any more."""
    differ = [user.role[name] for name in user.role if not torch.equal(before[name], after[name])]
    return ', '.join(f'{role} {differ.count(role)} of {[*user.role.values()].count(role)}' for role in ROLES)


def equal_in_all(user: User, users: list[dict]) -> str:
    """Which roles' tensors all users have the same bits of."""
    own = {role for name, role in user.role.items() if not all(torch.equal(u[name], users[0][name]) for u in users)}
    both = [', '.join(role for role in ROLES if (role in own) is theirs) for theirs in (False, True)]
    return f'equal in all users: {both[0]}; their own: {both[1]}'


# ---- the page --------------------------------------------------------------------------------------------------------
def sections(text: str) -> dict[str, str]:
    """{title: section} of what `tell` prints, or of the ```text blocks of the page."""
    return {part.splitlines()[0]: part for part in re.findall(r'^--- .*?(?=^--- |^```|\Z)', text, re.M | re.S)}


def main(argv: list[str]) -> None:
    steady_output()
    if '--help' in argv or '-h' in argv:
        print(__doc__)
        return
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(sys.stderr):  # train.py's own report
        lines = tell(*follow([f'--out_dir={tmp}/run', *(arg for arg in argv if arg != '--write')]))
        text = ''.join(f'{line}\n' for line in lines)
    print(text, end='')
    if '--write' in argv:
        page = PAGE.read_text(encoding='utf-8')
        for title, section in sections(text).items():
            page = re.sub(rf'^{re.escape(title)}\n.*?(?=^```)', lambda _: section, page, flags=re.M | re.S)
        PAGE.write_text(page, encoding='utf-8')


if __name__ == '__main__':
    main(sys.argv[1:])
