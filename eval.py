"""Perplexity and routing of a finished or running run (METHOD 0.3), from its files.

    python eval.py out/demo                                      # one run: test, valid, generalist alone, routing per layer
    python eval.py out/demo --target=mixture                     # the same users on other text
    python eval.py out/a out/b out/c --target=own,mixture        # several runs: one table of test perplexities

The report of one run is also written to RUN/eval.json. Nothing is drawn at random and nothing of the run is changed.
`python tools/routing.py RUN` shows which expert takes which token."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from configurator import die, folder_of, home, mean, parser, read_config, read_json, table, to_json
from data.stream import Texts
from federate import ONE_MODEL, Tensors
from llama import load_base
from lora_moe import add_lora, roles, shape_of
from model import GPT, autocast, evaluate, fast_fp32, fingerprint, store_in_bf16, usable
from run import checkpoint


# ---- a run's folder back into models: what tools/ begin with, too ----------------------------------------------------
def read_run(run: Path, ids: list[int] | None = None) -> tuple[SimpleNamespace, list[Tensors], Tensors]:
    """(configuration, tensors of these users (None: of every tested one), the server's tensors) of a run.

    A finished run has adapters/, a running one its checkpoint; {} for a user that has not taken part yet. The configuration
    has an entry per user of n_experts and lora_rank. Raises ValueError or OSError naming what is missing; never executes code
    from a file."""
    if not (run / 'config.json').exists():
        raise ValueError(f'{run} is no run: it has no config.json')
    c = SimpleNamespace(**read_config(run))
    for name in ('n_experts', 'lora_rank'):
        value = getattr(c, name)
        setattr(c, name, value if isinstance(value, list) else [value] * (1 if c.pooled else len(c.users)))
    c.tested = [0] if c.pooled else c.tested
    ids = c.tested if ids is None else ids
    if (run / 'summary.json').exists():
        users = [checkpoint.read(run / 'adapters' / f'user{i}.safetensors')[0] for i in ids]
        server_file = run / 'adapters' / 'server.safetensors'
        return c, users, checkpoint.read(server_file)[0] if server_file.exists() else {}
    folder = run / 'checkpoint'
    done = checkpoint.rounds(folder)
    if not done or done == [0]:
        raise ValueError(f'{run} has no finished round yet: wait for its first checkpoint, or continue it with --resume')
    tensors, facts = checkpoint.read_round(folder, done[-1])
    files = {i: checkpoint.user_file(folder, i, t) for i, t in facts['last_round'].items()}
    users = [checkpoint.read(files[i], 'adapter/')[0] if i in files else {} for i in ids]
    return c, users, checkpoint.part(tensors, 'server/') if c.aggregate in ONE_MODEL else {}


def who_is(who: str | None, users: dict, *words: str) -> str | int:
    """The word, or the number of the one of users {number: name}: by name, else by number; #1 is user 1. Else ValueError."""
    named = [i for i, name in users.items() if name == who]
    found = [who] if who in words else [i for i in users if f'#{i}' == who] or named or [i for i in users if str(i) == who]
    if len(found) != 1:
        known = [*words, *(f'{i} ({name})' for i, name in users.items())]
        raise ValueError(f'--user={who}: expected one of {", ".join(known[:12])}' + ', ...' * (len(known) > 12))
    return found[0]


def open_run(
    run: Path, init_from: str | None = None, device: str | None = None, beside: SimpleNamespace | None = None
) -> SimpleNamespace:
    """A run's models: path, c, base, ids and names of the users whose text it is tested on, a model for each of them, and the
    generalist alone, or None: the server's tensors and no more, what a newcomer without data, specialist or router gets.

    init_from, device: where the base is now, and where it shall run. beside: another opened run, whose base this one takes if
    it is the same. Raises ValueError or OSError, one line."""
    c, users, server = read_run(run)
    device = device or c.device
    same = beside and (beside.c.base_sha256, beside.c.dtype) == (c.base_sha256, c.dtype)
    base = beside.base if same else open_base(init_from or c.init_from, device, c.dtype, c.base_sha256)
    ours = base  # with what FLoRA merged into it before the last round
    if c.aggregate == 'flora':
        merged = run / 'adapters' / 'base.safetensors'
        if not merged.exists():
            raise ValueError(f'{run} merges into its base, saved when it has finished: wait, or continue it with --resume')
        checkpoint.read(merged)  # its SHA-256
        ours = load_base(str(merged)).to(device)
    alone = shape_of(c, 0) | dict(n_experts=c.n_generalists, routed=False)
    generalist = rebuild(ours, alone, server) if server and c.n_generalists else None
    if c.init_adapter and not generalist and not all(users):
        raise ValueError(f'{run} has users that still wait with its --init_adapter, which is not in its files: let it finish')
    # who has not taken part yet has the generalist, or nothing
    models = [rebuild(ours, shape_of(c, i), t) if t else generalist or ours for i, t in zip(c.tested, users)]
    ids = [*range(len(c.users))] if c.pooled else c.tested
    models, names = models * len(ids) if c.pooled else models, [c.users[i] for i in ids]
    return SimpleNamespace(path=run, c=c, base=base, ids=ids, names=names, models=models, generalist=generalist)


def open_base(source: str, device: str, dtype: str, sha256: str | None = None) -> GPT:
    """The frozen base on its device, as training has it. Raises ValueError or OSError, one line; also for another SHA-256."""
    base = load_base(source).requires_grad_(False).to(usable(device))
    if sha256 and fingerprint(base) != sha256:
        raise ValueError(f'{source} is not the base that the run was trained on (SHA-256 differs): give that one')
    fast_fp32(base.wte.weight.device.type)
    if dtype == 'bfloat16':
        store_in_bf16(base)
    return base


def rebuild(base: GPT, shape: dict, tensors: Tensors) -> GPT:
    """base with LoRA of that shape around it, filled with saved tensors; what is not there stays at zero, as B does."""
    model = add_lora(base, **shape)
    own = {name: p for name, p in model.named_parameters() if name in roles(model)}
    if tensors.keys() - own.keys():
        raise ValueError(f'the adapter has tensors its configuration does not name: {sorted(tensors.keys() - own.keys())[:3]}')
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(tensors[name]) if name in tensors else p.zero_()
    return model.requires_grad_(False)


def texts(opened: SimpleNamespace, target: str) -> list[dict]:
    """The streams of the users whose text the run is tested on."""
    c, base = opened.c, opened.base
    data = Texts(folder_of(c.dataset), c.block_size, base.config.vocab_size, target, tokenizer=base.tokenizer)
    return [data.of(i) for i in opened.ids]


def finished(run: Path, key: str, target: str) -> list[float] | None:
    """What a finished run measured on its own target: the same code on the same text, so there is no need to repeat it."""
    file = run / 'summary.json'
    summary = read_json(file, 'target', key) if file.exists() else {}
    if key == 'test_ppl' and summary.get('test_when') == 'aggregated':  # later than what is in adapters/
        return None
    return summary.get(key) if summary.get('target') == target and None not in (summary.get(key) or []) else None


# ---- the tables ------------------------------------------------------------------------------------------------------
def report_one(opened: SimpleNamespace, streams: list[dict], target: str) -> None:
    """Prints the tables of one run, then writes RUN/eval.json."""
    run, c, users, told = opened.path, opened.c, [], time.time()
    bar = tqdm([*zip(opened.names, opened.models, streams)], desc=str(run), disable=None, leave=False)
    for name, model, data in bar:
        result = evaluate(model, data['test'], c.block_size)
        alone = evaluate(opened.generalist, data['test'], c.block_size)['ppl'] if opened.generalist else None
        user = {'name': name, 'test_ppl': result['ppl'], 'valid_ppl': evaluate(model, data['valid'], c.block_size)['ppl']}
        user |= {'generalist_test_ppl': alone, 'test_tokens': result['tokens']}
        users.append(user | {'scores': result['scores'], 'top1': result['top1']})
        if bar.disable and time.time() - told > 60:  # no terminal: a line a minute instead
            told = time.time()
            print(f'{run}: {len(users)}/{len(streams)} users', file=sys.stderr, flush=True)
    columns = ('test_ppl', 'valid_ppl', 'generalist_test_ppl')
    means = {f'mean_{column}': mean([user[column] for user in users]) for column in columns}
    rows = [[user['name'], *(user[column] for column in columns)] for user in users] + [['mean', *means.values()]]
    print(f'{run}: {c.method} on {c.dataset} ({target}), perplexity')
    print(table(['user', 'test', 'valid', 'generalist alone, test'], rows))
    for key, title in (('scores', 'mean softmax score'), ('top1', 'share of tokens whose top-1 it is')):
        if any(user[key] for user in users):
            print(f'\n{title} per layer and expert, test (expert 0 first; generalists: {c.n_generalists})')
            rows = []
            for layer in range(opened.base.config.n_layer):
                shares = [user[key][layer] if user[key] else [] for user in users]
                rows.append([layer, *(' '.join(f'{share:.2f}' for share in one) or '-' for one in shares)])
            print(table(['layer', *opened.names], rows))
    result = {'method': c.method, 'dataset': c.dataset, 'target': target, **means, 'users': users}
    (run / 'eval.json').write_text(to_json(result, indent=1), encoding='utf-8')
    print(f'\nwrote {run}/eval.json')


def report_several(runs: list[SimpleNamespace], data: dict, targets: list[str]) -> None:
    """One table: test perplexity of the base and of every run, every user of every target a row."""

    def with_means(key: str, those: list[SimpleNamespace], models: list[GPT]) -> list[float]:
        """What one of those runs has measured already, else what the models give on the first one's text."""
        column = []
        for target in targets:
            ppl = next(filter(None, (finished(one.path, key, target) for one in those)), None)
            if ppl is None:
                streams, T = data[those[0].path, target], those[0].c.block_size
                ppl = [evaluate(model, own['test'], T)['ppl'] for model, own in zip(models, streams)]
            column += [*ppl, mean(ppl)]
        return column

    first = runs[0]
    columns = {'base model': with_means('pretrained_test_ppl', runs, [first.base] * len(first.ids))}
    for one in tqdm(runs, desc='test perplexity', disable=None, leave=False):
        columns[one.path.name] = with_means('test_ppl', [one], one.models)
    rows = [f'{target}: {name}' for target in targets for name in [*first.names, 'mean']]
    print(table(['test perplexity', *columns], [[name, *row] for name, row in zip(rows, zip(*columns.values()))]))


def main(argv: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='folder of a run (its --out_dir)')
    options.add_argument('--target', help="own, mixture, or both: own,mixture (default: the run's own)")
    options.add_argument('--init_from', type=home, help="the base model, if it is no longer where the run's configuration says")
    options.add_argument('--device', help='cpu, cuda, cuda:N, mps (default: as the run)')
    args = options.parse_args(argv)
    try:
        first = read_run(args.runs[0], [])[0]
        targets = (args.target or first.target).split(',')
        if not set(targets) <= {'own', 'mixture'} or (len(args.runs) == 1 and len(targets) > 1):
            die(f'--target={args.target}: expected own or mixture; both, with a comma, only for a table of several runs')
        runs = []
        for run in args.runs:
            runs.append(one := open_run(run, args.init_from, args.device, beside=runs[0] if runs else None))
            same = all(getattr(one.c, key) == getattr(first, key) for key in ('base_sha256', 'dataset', 'block_size'))
            if not same or one.names != runs[0].names:
                die(f'{one.path} has another base, other text or other windows than {args.runs[0]}: a table needs the same')
        data = {(one.path, target): texts(one, target) for one in runs for target in targets}
        with autocast(runs[0].base.wte.weight.device, first.dtype):
            if len(runs) == 1:
                report_one(runs[0], data[args.runs[0], targets[0]], targets[0])
            else:
                report_several(runs, data, targets)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        die(error)


if __name__ == '__main__':
    main(sys.argv[1:])
