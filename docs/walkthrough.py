"""One round of CoMiGS in the real code with real tensors: prints what docs/walkthrough.md shows.

    python docs/walkthrough.py              # needs data/demo (python data/prepare.py demo); under a minute
    python docs/walkthrough.py --write      # and puts it into the code blocks of docs/walkthrough.md
    python docs/walkthrough.py --links      # runs nothing: points the line links of docs/*.md at their lines again

It runs train.py, not a copy of it: its text is executed in two parts, up to its line `# ---- Algorithm 1` and from there on.
Between the two, five of its functions get a wrapper that calls them and keeps what every user's tensors were before and after.
Other arguments go to train.py: --dataset=PATH, --local_steps=5."""

import contextlib
import os
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'docs' / 'walkthrough.md'
LOOP = '# ---- Algorithm 1 '
ROLES = ('attention', 'generalist', 'specialist', 'router')
LINK = re.compile(r'\[`([^`]+)`\]\(\.\./([\w./-]+)#L(\d+)\)')  # [`name`](../file.py#L12)


# ---- the run ---------------------------------------------------------------------------------------------------------
def follow(args: list[str]) -> tuple[SimpleNamespace, list[SimpleNamespace]]:
    """(train.py's variables at its end, the watched calls in their order). Every call: name, user, before and after (all the
    user's tensors, {name: copy}), args, result."""
    setup, marker, loop = (ROOT / 'train.py').read_text(encoding='utf-8').partition(LOOP)
    assert marker, f'train.py has no line {LOOP}'
    run, calls = {'__name__': '__main__', '__file__': str(ROOT / 'train.py'), '__doc__': ''}, []

    def watch(name):
        function = run[name]

        def watched(*args, **named):
            user = args[0] if hasattr(args[0], 'adapter') else None  # combine is the server's
            before = tensors_of(user)
            result, number = function(*args, **named), user and user.id
            calls.append(
                SimpleNamespace(name=name, user=number, args=args, result=result, before=before, after=tensors_of(user))
            )
            return result

        run[name] = watched

    sys.argv = ['train.py', 'config/demo.py', '--rounds=1', '--router_every=10', '--device=cpu', *args]
    exec(compile(setup, 'train.py', 'exec'), run)
    for name in ('receive', 'descend', 'upload', 'combine', 'test_perplexity'):
        watch(name)
    exec(compile('\n' * setup.count('\n') + marker + loop, 'train.py', 'exec'), run)
    return SimpleNamespace(**run), calls


def tensors_of(user: SimpleNamespace | None) -> dict:
    return {name: p.detach().clone() for name, p in user.adapter.items()} if user else {}


# ---- what is printed -------------------------------------------------------------------------------------------------
def distance(before: dict, after: dict, names: list[str]) -> float:
    """Euclidean norm of the change of these tensors, as one vector."""
    return sum(((after[name] - before[name]) ** 2).sum().item() for name in names) ** 0.5


def changed(role: dict, before: dict, after: dict) -> str:
    """How many tensors of every role are not bit-equal any more."""
    counts = []
    for r in ROLES:
        names = [name for name in role if role[name] == r]
        counts.append(f'{r} {sum(not torch.equal(before[n], after[n]) for n in names)} of {len(names)}')
    return ', '.join(counts)


def equal_in_all(role: dict, users: list[dict]) -> str:
    """Which roles' tensors all users have the same bits of."""
    same = [r for r in ROLES if all(torch.equal(u[n], users[0][n]) for u in users for n in role if role[n] == r)]
    return f'equal in all users: {", ".join(same)}; their own: {", ".join(r for r in ROLES if r not in same)}'


def n_numbers(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def tell(run: SimpleNamespace, calls: list[SimpleNamespace]) -> str:
    """The seven sections of the page, each beginning with a line `--- title`."""
    lines, role, users = [], run.users[0].role, run.users
    say = lines.append
    A, B = ([name for name in role if name.endswith(f)] for f in ('.A', '.B'))
    routers = [name for name in role if role[name] == 'router']
    of = {name: [[c for c in calls if (c.name, c.user) == (name, u.id)] for u in users] for name in ('receive', 'upload')}
    steps = [[c for c in calls if c.name == 'descend' and c.user == u.id] for u in users]
    expert = [[c for c in some if c.args[1] is u.expert_opt] for some, u in zip(steps, users)]
    phase = [[c for c in some if c.args[1] is u.router_opt] for some, u in zip(steps, users)]
    n_layer = run.base.config.n_layer

    say('--- 0. who holds what')
    frozen = n_numbers([*run.base.parameters()])
    say(f'the frozen base, once for all: {n_layer} blocks of width {run.base.config.n_embd}, {frozen:,} numbers')
    for user in users:
        say(f'user {user.id}, {user.name}: ' + ', '.join(f'{len(v):,} {split}' for split, v in user.data.items()) + ' tokens')
    say('what user 0 trains in its first block:')
    start = [some[0].before for some in of['receive']]
    for name in (name for name in role if name.startswith('h.0.')):
        stays = 'leaves' if name in run.shared else 'stays'
        say(f'  {name:38} {str(tuple(start[0][name].shape)):>10}  {role[name]:10}  {stays}')
    leaving = n_numbers([start[0][name] for name in run.shared])
    say(f'in all {n_layer} blocks: {len(role)} tensors, {n_numbers(start[0].values()):,} numbers;')
    say(f'of these {len(run.shared)} tensors, {leaving:,} numbers, may leave')

    say('--- 1. download')
    for user, (first, *_) in zip(users, of['receive']):
        down = run.federate.n_bytes({name: first.after[name] for name in run.shared})
        say(
            f'user {user.id} gets {len(run.shared)} tensors, {down:,} bytes; changed: '
            + changed(role, first.before, first.after)
        )
    start = [some[0].after for some in of['receive']]
    say(equal_in_all(role, start))
    say(f'norm of user 0: all A {distance(dict.fromkeys(A, 0), start[0], A):.3f}, all B {start[0][B[0]].norm():.3f}')
    x = torch.from_numpy(users[0].data['valid'][: run.block_size].astype('int64'))[None]  # (1, T)
    tensors_now = tensors_of(users[0])
    run.load(users[0], start[0])
    with torch.no_grad():
        logits, plain = users[0].model(x)[0], run.base(x)[0]  # (1, T, V)
    say(f'so its logits {tuple(logits.shape)} are those of the base: largest difference {(logits - plain).abs().max():.5f}')

    say(f'--- 2. {len(expert[0])} expert steps')
    say(f'user 0, batches of {run.batch_size} x {run.block_size} training tokens')
    say('  step       lr  cross-entropy   change of A   change of B   of the router')
    for h in (0, 1, len(expert[0]) - 1):
        c = expert[0][h]
        moved = [distance(c.before, c.after, names) for names in (A, B, routers)]
        say(
            f'  {h + 1:4}  {run.cosine(h):.5f}  {c.result[0]:13.4f}  '
            + '  '.join(f'{m:12.4f}' for m in moved[:2])
            + f'  {moved[2]:14.4f}'
        )
    say('changed in user 0: ' + changed(role, expert[0][0].before, expert[0][-1].after))
    for user, some in zip(users, expert):
        first, *_, last = (c.result[0] for c in some)
        say(f'user {user.id}: cross-entropy of its batch, first {first:.3f}, last {last:.3f} nats per byte')

    say(f'--- 3. {len(phase[0])} router steps')
    say(f'user 0, batches of {run.batch_size} x {run.block_size} validation tokens')
    say('  step       lr  cross-entropy  load balancing  change of the router  of A and B')
    for h in (0, len(phase[0]) - 1):
        c = phase[0][h]
        say(
            f'  {h + 1:4}  {run.router_lr:.5f}  {c.result[0]:13.4f}  {c.result[1]:14.4f}  '
            f'{distance(c.before, c.after, routers):20.4f}  {distance(c.before, c.after, A + B):10.4f}'
        )
    say('changed in user 0: ' + changed(role, phase[0][0].before, phase[0][-1].after))
    windows = users[0].data['valid'][: 4 * run.block_size + 1]
    say(f'weights (generalist, specialist) on its first {len(windows) - 1:,} validation tokens, before and after the phase:')
    seen = []
    for tensors in (phase[0][0].before, phase[0][-1].after):
        run.load(users[0], tensors)
        seen.append(run.evaluate(users[0].model, windows, run.block_size))
    for layer in range(n_layer):
        weights = [' '.join(f'{w:.3f}' for w in result['scores'][layer]) for result in seen]
        say(f'  layer {layer}: Φ {tuple(phase[0][0].after[routers[layer]].shape)}, mean weights {weights[0]} -> {weights[1]}')
    with torch.no_grad():
        routing = users[0].model.loss(x[:, :-1], x[:, 1:])[1][0]  # of the first layer
    say(f'  layer 0 after the phase, probs {tuple(routing.probs.shape)}: its first three tokens have')
    say('    ' + ', '.join('(' + ' '.join(f'{w:.3f}' for w in row) + ')' for row in routing.probs[:3].tolist()))
    say(f'  cross-entropy there {seen[0]["loss"]:.4f} -> {seen[1]["loss"]:.4f}')
    run.load(users[0], tensors_now)

    say('--- 4. upload')
    combined = next(c for c in calls if c.name == 'combine')
    updates, server = [*combined.args[0].values()], combined.result[0]
    for user, (call,), update in zip(users, of['upload'], updates):
        count = ', '.join(f'{sum(role[n] == r for n in update)} {r}' for r in ROLES)
        gone = distance(start[user.id], update, run.shared)
        say(f'user {user.id} sends {count} tensors: {run.federate.n_bytes(update):,} bytes, {gone:.3f} away from the download')

    say('--- 5. average')
    name = 'h.0.mlp.generalists.0.c_fc.B'
    of_users = ' '.join(f'{u[name][0, 0]:.5f}' for u in updates)
    say(f'{name} {tuple(server[name].shape)}, its first number: users {of_users}, server {server[name][0, 0]:.5f}')
    plain = {n: torch.stack([u[n] for u in updates]).mean(0) for n in server}
    error = max((plain[n] - server[n]).abs().max() for n in server)
    say(f'largest difference from the plain mean of {len(updates)}: {error:.5f}')
    say(f'the mean is {distance(start[0], server, run.shared):.3f} away from the download')
    say(f'bytes up, all users: {run.clock["bytes_up"]:,}; down: {run.clock["bytes_down"]:,}')

    say('--- 6. evaluation')
    say(f'  {"test perplexity":24}  {"base":>16}     after H steps  after the mean')
    columns = [run.results[when] for when in ('pretrained', 'local', 'aggregated')]
    for user in users:
        n = len(user.tests[0][1])
        say(f'  {user.name:10} {n:,} tokens  {"  ".join(f"{column[user.id]:16.3f}" for column in columns)}')
    means = [run.mean([*column.values()]) for column in columns]
    say(f'  {"mean":24}  {"  ".join(f"{m:16.3f}" for m in means)}')
    tests = [c for c in calls if c.name == 'test_perplexity' and c.user == 0]
    say('changed in user 0 by evaluating it: ' + changed(role, tests[0].before, tests[0].after))
    last = [some[-1] for some in of['receive']]
    say('and by the download before the last column: ' + changed(role, last[0].before, last[0].after))
    say(equal_in_all(role, [c.after for c in last]))
    return '\n'.join(lines) + '\n'


# ---- the pages -------------------------------------------------------------------------------------------------------
def sections(text: str) -> dict[str, str]:
    """{title: section} of what `tell` prints, or of the ```text blocks of the page."""
    return {part.splitlines()[0]: part for part in re.findall(r'^--- .*?(?=^--- |^```|\Z)', text, re.M | re.S)}


def line_of(text: str, name: str) -> int:
    """The number of the one line that defines `name` or, if none does, contains it. Raises ValueError for none or several."""
    lines = text.splitlines()
    found = [i for i, line in enumerate(lines, 1) if re.match(rf'\s*(def|class) {re.escape(name)}\b', line)]
    found = found or [i for i, line in enumerate(lines, 1) if name in line]
    if len(found) != 1:
        raise ValueError(f'`{name}` is in {len(found)} lines: a link needs exactly one')
    return found[0]


def relink(text: str) -> str:
    """The page with every line link at its line. Raises ValueError, OSError."""

    def link(match):
        name, file, _ = match.groups()
        try:
            return f'[`{name}`](../{file}#L{line_of((ROOT / file).read_text(encoding="utf-8"), name)})'
        except ValueError as error:
            raise ValueError(f'{file}: {error}') from None

    return LINK.sub(link, text)


def main() -> None:
    args = sys.argv[1:]
    if '--help' in args or '-h' in args:
        print(__doc__)
        return
    if '--links' in args:
        for page in sorted((ROOT / 'docs').glob('*.md')):
            page.write_text(relink(page.read_text(encoding='utf-8')), encoding='utf-8')
        return
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(sys.stderr):  # train.py's own report
        text = tell(*follow([f'--out_dir={tmp}/run', *(a for a in args if a != '--write')]))
    print(text, end='')
    if '--write' in args:
        page = PAGE.read_text(encoding='utf-8')
        for title, section in sections(text).items():
            page = re.sub(rf'^{re.escape(title)}\n.*?(?=^```)', lambda _: section, page, flags=re.M | re.S)
        PAGE.write_text(page, encoding='utf-8')


if __name__ == '__main__':
    main()
