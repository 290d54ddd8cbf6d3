"""Perplexity and routing of a finished or running run (METHOD 0.3), from its files.

    python eval.py out/demo                                      # one run: test, valid, generalist alone, routing per layer
    python eval.py out/demo --target=mixture                     # the same users on other text
    python eval.py out/a out/b out/c --target=own,mixture        # several runs: one table of test perplexities
    python eval.py out/demo --routing_html                       # out/demo/routing.html: each token in the colour of its expert

The report of one run is also written to RUN/eval.json. Nothing is drawn at random and nothing of the run is changed."""

import argparse
import contextlib
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

import checkpoint
import federate
import routing as page
from configurator import die
from data.stream import encoding, load_dataset
from lora_moe import add_lora, roles
from model import GPT, fast_fp32, load_gpt, store_in_bf16


@torch.no_grad()
def evaluate(model: GPT, tokens: np.ndarray, block_size: int, quiet: bool = False) -> dict:
    """Mean cross-entropy of a whole stream and how its tokens were routed.

    Every token but the first is predicted once, in non-overlapping windows of block_size (the last may be shorter), so no
    sampling. Returns loss (nats per token, without load balancing), ppl = exp(loss), tokens, and for a model with routers
    scores (L, E): mean softmax score of every expert in every layer, top1 (L, E): share of tokens whose best it is. A
    terminal shows a bar if it takes long, unless quiet."""
    n, total, scores, top1 = len(tokens) - 1, 0.0, None, None
    batches = windows(tokens, block_size, model.wte.weight.device)
    for x, y in tqdm(batches, desc='evaluate', delay=2, leave=False, disable=quiet or None):
        loss, routing = model.loss(x, y)
        total += loss.item() * y.numel()
        if routing[0] is not None:
            E = routing[0].probs.shape[1]
            seen = torch.stack([r.probs.sum(0) for r in routing]).cpu().double()  # (L, E)
            best = torch.stack([r.chosen[:, 0].bincount(minlength=E) for r in routing]).cpu().double()  # (L, E)
            scores, top1 = (seen, best) if scores is None else (scores + seen, top1 + best)
    return {
        'loss': total / n,
        'ppl': perplexity(total / n),
        'tokens': n,
        'scores': None if scores is None else (scores / n).tolist(),
        'top1': None if top1 is None else (top1 / n).tolist(),
    }


def windows(tokens: np.ndarray, block_size: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A stream as batches of windows that do not overlap, and a last, shorter one: x, y (rows, T) each, y one token later."""
    n = len(tokens) - 1
    stream = torch.from_numpy(np.asarray(tokens).astype(np.int64)).to(device)
    whole = n // block_size * block_size
    x, y = stream[:whole].view(-1, block_size), stream[1 : whole + 1].view(-1, block_size)  # (windows, T) each
    rows = max(1, (1024 if device.type == 'cpu' else 2**14) // block_size)  # at a time: activations in a CPU's cache
    batches = [*zip(x.split(rows), y.split(rows))] if whole else []
    return batches + [(stream[None, whole:n], stream[None, whole + 1 :])] if whole < n else batches


@torch.no_grad()
def token_scores(model: GPT, tokens: np.ndarray, block_size: int) -> tuple[float, np.ndarray]:
    """(loss, scores): mean cross-entropy in nats per token, and (L, T, E) float32, the softmax scores of all E experts in
    each layer for each of the T = len(tokens) - 1 tokens that predict one, in evaluate's windows. A layer without a router
    (a user with one expert) scores 1."""
    total, scores = 0.0, []
    for x, y in windows(tokens, block_size, model.wte.weight.device):
        loss, routing = model.loss(x, y)
        total += loss.item() * y.numel()
        scores.append(torch.stack([x.new_ones(x.numel(), 1).float() if r is None else r.probs for r in routing]).cpu())
    return total / (len(tokens) - 1), torch.cat(scores, 1).numpy()


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; inf where a float cannot hold it."""
    return math.exp(loss) if loss < 709 else math.inf


def mean(values: list[float | None]) -> float | None:
    """Mean of those that are known, None if none is."""
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def fingerprint(model: GPT) -> str:
    """SHA-256 over all weights: which base an adapter belongs to."""
    digest = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        digest.update(name.encode() + p.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cell(value: object) -> str:
    return f'{value:.3f}' if isinstance(value, float) else '-' if value is None else str(value)


def table(header: list, rows: list[list], left: int = 1) -> str:
    """A text table; floats with three decimals, the first columns (`left` of them) to the left."""
    cells = [[*map(cell, row)] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        '  '.join(c.rjust(w) if i >= left else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in cells
    ]
    return '\n'.join([lines[0], '-' * max(map(len, lines)), *lines[1:]])


def read_run(run: Path, ids: list[int] | None = None) -> tuple[dict, list[dict], dict]:
    """(config, tensors of these users (None: of every tested one), the server's tensors) of a run. A finished run has
    adapters/, a running one its checkpoint; {} for a user that has not taken part yet. Raises ValueError or OSError naming
    what is missing; never executes code from a file."""
    try:
        config = json.loads((run / 'config.json').read_text())
    except FileNotFoundError:
        raise ValueError(f'{run} is no run: it has no config.json') from None
    ids = tested(config) if ids is None else ids
    if (run / 'summary.json').exists():
        users = [checkpoint.read(run / 'adapters' / f'user{i}.safetensors')[0] for i in ids]
        server_file = run / 'adapters' / 'server.safetensors'
        return config, users, checkpoint.read(server_file)[0] if server_file.exists() else {}
    folder = run / 'checkpoint'
    done = checkpoint.rounds(folder)
    if not done or done == [0]:
        raise ValueError(f'{run} has no finished round yet: wait for its first checkpoint')
    tensors, facts = checkpoint.read_round(folder, done[-1])
    server, last_round = checkpoint.part(tensors, 'server/'), facts['last_round']
    users = [
        checkpoint.read(checkpoint.user_file(folder, i, last_round[i]), 'adapter/')[0] if i in last_round else {} for i in ids
    ]
    return config, users, server if config['aggregate'] in federate.ONE_MODEL else {}


def tested(config: dict) -> list[int]:
    """The users whose models a run evaluates: all, a sample of many, or the one of pooled text."""
    return [0] if config['pooled'] else config['tested']


def rebuild(base: GPT, tensors: dict, n_experts: int, n_generalists: int, rank: int, config: dict, routed: bool) -> GPT:
    """base with LoRA around it, filled with saved tensors; names that are not there stay at zero, as B does."""
    model = add_lora(
        base,
        n_experts,
        n_generalists,
        rank,
        config['lora_alpha'],
        config['top_k'],
        routed,
        config['routing_unit'],
        config['one_routing'],
    )
    own = {name: p for name, p in model.named_parameters() if name in roles(model)}
    if tensors.keys() - own.keys():
        raise ValueError(f'the adapter has tensors its configuration does not name: {sorted(tensors.keys() - own.keys())[:3]}')
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(tensors[name]) if name in tensors else p.zero_()
    return model.requires_grad_(False)


def models_of(run: Path, base: GPT) -> tuple[dict, list[GPT], GPT | None]:
    """(config, every user's model, the generalist alone or None). The generalist alone is the server's tensors and no more:
    what a newcomer without data, specialist or router gets."""
    config, users, server = read_run(run)
    n, rank = (v if isinstance(v, list) else [v] * len(config['users']) for v in (config['n_experts'], config['lora_rank']))
    k = config['n_generalists']
    if config['aggregate'] == 'flora':  # the base that the last round began with
        merged = run / 'adapters' / 'base.safetensors'
        if not merged.exists():
            raise ValueError(f'{run} merges into its base, which it saves when it has finished: wait for that')
        checkpoint.read(merged)  # its SHA-256
        base = load_gpt(str(merged)).to(base.wte.weight.device)
    generalist = rebuild(base, server, k, k, rank[0], config, routed=False) if server and k else None
    if config.get('init_adapter') and not generalist and not all(users):
        raise ValueError(f'{run} has users that still wait with its --init_adapter, which is not in its files: let it finish')
    models = [
        rebuild(base, tensors, n[i], k, rank[i], config, config['router'] != 'mean') if tensors else generalist or base
        for i, tensors in zip(tested(config), users)
    ]
    return config, models * len(config['users']) if config['pooled'] else models, generalist


def names_of(config: dict) -> list[str]:
    """Of the users whose text a run is tested on."""
    return config['users'] if config['pooled'] else [config['users'][i] for i in config['tested']]


def texts(config: dict, base: GPT, target: str) -> list[dict]:
    """The streams of those users."""
    streams = load_dataset(Path('data', config['dataset']), config['block_size'], base.config.vocab_size, target)[1]
    return streams if config['pooled'] else [streams[i] for i in config['tested']]


def perplexities(models: list[GPT], streams: list[dict], block_size: int) -> list[float]:
    return [evaluate(model, data['test'], block_size)['ppl'] for model, data in zip(models, streams)]


def finished(run: Path, key: str, target: str) -> list[float] | None:
    """What a finished run measured on its own target: the same code on the same text, so there is no need to repeat it."""
    file = run / 'summary.json'
    summary = json.loads(file.read_text()) if file.exists() else {}
    return summary.get(key) if summary.get('target') == target and None not in (summary.get(key) or []) else None


def report_one(run: Path, config: dict, models: list, generalist: GPT | None, streams: list, target: str) -> None:
    """Prints the tables of one run and writes RUN/eval.json."""
    T, users, told = config['block_size'], [], time.time()
    bar = tqdm([*zip(names_of(config), models, streams)], desc=str(run), disable=None, leave=False)
    for name, model, data in bar:
        result = evaluate(model, data['test'], T)
        users.append(
            {
                'name': name,
                'test_ppl': result['ppl'],
                'valid_ppl': evaluate(model, data['valid'], T)['ppl'],
                'generalist_test_ppl': evaluate(generalist, data['test'], T)['ppl'] if generalist else None,
                'test_tokens': result['tokens'],
                'scores': result['scores'],
                'top1': result['top1'],
            }
        )
        if bar.disable and time.time() - told > 60:  # no terminal: a line a minute instead
            told = time.time()
            print(f'{run}: {len(users)}/{len(models)} users', file=sys.stderr, flush=True)
    columns = ('test_ppl', 'valid_ppl', 'generalist_test_ppl')
    means = {f'mean_{c}': mean([u[c] for u in users]) for c in columns}
    rows = [[u['name'], *(u[c] for c in columns)] for u in users] + [['mean', *means.values()]]
    print(f'{run}: {config["method"]} on {config["dataset"]} ({target}), perplexity')
    print(table(['user', 'test', 'valid', 'generalist alone, test'], rows))
    for key, title in (('scores', 'mean softmax score'), ('top1', 'share of tokens whose top-1 it is')):
        if any(u[key] for u in users):
            print(f'\n{title} per layer and expert, test (expert 0 first; generalists: {config["n_generalists"]})')
            print(
                table(
                    ['layer', *(u['name'] for u in users)],
                    [
                        [layer, *(' '.join(f'{s:.2f}' for s in u[key][layer]) if u[key] else '-' for u in users)]
                        for layer in range(models[0].config.n_layer)
                    ],
                )
            )
    (run / 'eval.json').write_text(
        json.dumps(
            {'method': config['method'], 'dataset': config['dataset'], 'target': target, **means, 'users': users}, indent=1
        )
    )
    print(f'\nwrote {run}/eval.json')


def experts_of(config: dict) -> list[int]:
    """Number of experts of each user whose text a run is tested on."""
    n = config['n_experts']
    ids = range(len(config['users'])) if config['pooled'] else config['tested']
    return [n[i] if isinstance(n, list) else n for i in ids]


def check_routers(run: Path, config: dict) -> None:
    """Raises ValueError unless some user of the run chooses between experts."""
    if config['router'] == 'mean' or max(experts_of(config)) == 1:
        why = 'its users have one expert each' if max(experts_of(config)) == 1 else 'all experts count alike (router=mean)'
        raise ValueError(
            f'--routing_html: {run} ({config["method"]}) has no routers, {why}; these methods have them: comigs_2s, comigs_2g, '
            'comigs_1g1s, comigs_1gxs, comigs_1g1s_tr, local_moe, fedavg_moe, local_moe_tr, fedavg_moe_tr, pfedmoe'
        )


def report_routing(run: Path, config: dict, models: list, streams: list, enc: tiktoken.Encoding, n_shown: int) -> None:
    """Every user's own test text under every user's model, token by token: writes RUN/routing.html, prints who routes where."""
    names, k, T = names_of(config), config['n_generalists'], config['block_size']
    # a user that has not taken part yet has no router where it should have one
    ready = [i for i, n in enumerate(experts_of(config)) if n == 1 or getattr(models[i].h[0].mlp, 'router', None) is not None]
    if not ready:
        die(f'--routing_html: no user of {run} has taken part in a round yet: wait for the next')
    shown = sorted({ready[round(j * (len(ready) - 1) / 7)] for j in range(8)})  # 8 of many
    readers = [('all', models[0])] if config['pooled'] else [(names[i], models[i]) for i in shown]
    texts = []
    with tqdm(total=len(shown) * len(readers), desc='routing', disable=None, leave=False) as bar:
        for row, i in enumerate(shown):
            tokens = streams[i]['test'][: page.COUNTED + 1]
            seen = tokens[:-1]  # the last one is only predicted
            text = page.passage(names[i], seen[:n_shown], enc) | {'counted': len(seen), 'cells': []}
            for column, (name, model) in enumerate(readers):
                loss, scores = token_scores(model, tokens, T)  # (L, T, E)
                if not np.isfinite(scores).all():
                    die(f'--routing_html: the model of {name} in {run} has scores that are no numbers: its training diverged')
                text['cells'].append(page.cell(perplexity(loss), scores, k, n_shown))
                if column == min(row, len(readers) - 1):
                    text |= {'own': column, 'extremes': page.extremes(seen, scores, k, enc)}
                bar.update()
            texts.append(text)
    facts = {'run': run.resolve().name} | {key: Path(config[key]).name for key in ('method', 'dataset', 'init_from')}
    facts |= {'tokenizer': enc.name, 'block_size': T, 'generalists': k, 'users': len(config['users'])}
    facts |= {'models': [name for name, _ in readers], 'texts': texts}
    (run / 'routing.html').write_text(page.html(facts), encoding='utf-8')
    print('share of tokens whose top-1 expert is a generalist, mean over layers, and perplexity: test text (row) under model')
    rows = [[t['name'], *(f'{mean(c["share"]):.3f} / {cell(c["ppl"])}' for c in t['cells'])] for t in texts]
    print(table(['text', *facts['models']], rows))
    print(f'\nwrote {run}/routing.html ({(run / "routing.html").stat().st_size / 1e6:.2f} MB)')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='folder of a run (its --out_dir)')
    parser.add_argument('--target', help="own, mixture, or both: own,mixture (default: the run's own)")
    parser.add_argument('--init_from', help="the base model, if it is no longer where the run's configuration says")
    parser.add_argument('--device', help='cpu, cuda, cuda:N, mps (default: as the run)')
    parser.add_argument('--routing_html', action='store_true', help='write RUN/routing.html: which expert takes which token')
    parser.add_argument('--passage_tokens', type=int, help='of each text on that page (default: 400 bytes, or 150 tokens)')
    args = parser.parse_args()
    try:
        first = read_run(args.runs[0])[0]
        if args.passage_tokens is not None and (args.passage_tokens < 1 or not args.routing_html):
            die(f'--passage_tokens={args.passage_tokens}: expected a number >= 1, together with --routing_html')
        if args.routing_html:
            if len(args.runs) > 1 or args.target not in (None, 'own'):
                die("--routing_html is a page of one run, and of every user's own test text: give one RUN, and no --target")
            args.target = 'own'
            check_routers(args.runs[0], first)
        targets = (args.target or first['target']).split(',')
        if not set(targets) <= {'own', 'mixture'} or (len(args.runs) == 1 and len(targets) > 1):
            die(f'--target={args.target}: expected own or mixture; both, with a comma, only for a table of several runs')
        source = args.init_from or first['init_from']
        device = args.device or first['device']
        base = load_gpt(source).to(device)
        if fingerprint(base) != first['base_sha256']:
            die(f'{source} is not the base that {args.runs[0]} was trained on (SHA-256 differs)')
        fast_fp32(base.wte.weight.device.type)
        if first['dtype'] == 'bfloat16':  # as in train.py
            store_in_bf16(base)
        loaded = {run: models_of(run, base) for run in args.runs}
        data = {(run, t): texts(config, base, t) for run, (config, *_) in loaded.items() for t in targets}
        for run, (config, *_) in loaded.items():
            same = all(config[k] == first[k] for k in ('base_sha256', 'dataset', 'block_size'))
            if not same or names_of(config) != names_of(first):
                die(f'{run} has another base, other text or other windows than {args.runs[0]}: a table needs the same')
        if args.routing_html:
            enc = encoding(json.loads(Path('data', first['dataset'], 'meta.json').read_text(encoding='utf-8'))['tokenizer'])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        die(error)
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16)
    with autocast if first['dtype'] == 'bfloat16' else contextlib.nullcontext():
        if args.routing_html:
            run, n_shown = args.runs[0], args.passage_tokens or (400 if enc.name == 'bytes' else 150)
            report_routing(run, *loaded[run][:2], data[run, 'own'], enc, n_shown)
            return
        if len(args.runs) == 1:
            report_one(args.runs[0], *loaded[args.runs[0]], data[args.runs[0], targets[0]], targets[0])
            return
        columns = {'base model': []}  # name: perplexity of every row, target after target
        for run, (config, models, _) in tqdm(loaded.items(), desc='test perplexity', disable=None, leave=False):
            columns[run.name] = []
            for t in targets:
                ppl = finished(run, 'test_ppl', t) or perplexities(models, data[run, t], config['block_size'])
                columns[run.name] += [*ppl, float(np.mean(ppl))]
        for t in targets:
            known = filter(None, (finished(run, 'pretrained_test_ppl', t) for run in args.runs))
            ppl = next(known, None) or perplexities([base] * len(models), data[args.runs[0], t], first['block_size'])
            columns['base model'] += [*ppl, float(np.mean(ppl))]
    names = [f'{t}: {name}' for t in targets for name in [*names_of(first), 'mean']]
    print(table(['test perplexity', *columns], [[name, *row] for name, row in zip(names, zip(*columns.values()))]))


if __name__ == '__main__':
    main()
