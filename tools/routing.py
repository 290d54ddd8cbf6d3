"""Which expert takes which token (paper Fig. 5, 13-18): RUN/routing.html, and who routes where as a table.

    python tools/routing.py out/demo
    python tools/routing.py out/demo --passage_tokens=1000        # show more of every text

Every user's own test text (of many users: of eight) runs under every user's model. The page shows each token in the colour of
its expert, and the tokens that generalists and specialists take most. It is assets/routing.html with the numbers in it. Every
number on it but the colours is of a text's first COUNTED tokens; what it shows is the beginning of that.

L layers, T tokens, E experts of a user, of which the first k are generalists."""

import base64
import codecs
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config.default import COLUMNS, METHODS
from configurator import cell, die, folder_of, home, mean, parser, table
from data.stream import Encoding, Texts, tokenizer_of
from eval import open_run, read_run
from model import GPT, autocast, perplexity, windows

TEMPLATE = Path(__file__).resolve().parent.parent / 'assets' / 'routing.html'
COUNTED, SHOWN = 100_000, 8  # tokens of a test text, and users, at most


# ---- numbers of one text under one model -----------------------------------------------------------------------------
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


def quantised(scores: np.ndarray) -> str:
    """scores (L, T, E) in 255ths, a byte each, in base64. The best expert of a token stays the only best one: where another
    is rounded to the same number, it gets one more."""
    q = np.rint(scores * 255).astype(np.uint8)
    best = scores.argmax(-1)[..., None]  # (L, T, 1)
    top = np.take_along_axis(q, best, -1)
    np.put_along_axis(q, best, top + ((q == top).sum(-1, keepdims=True) > 1), -1)
    return base64.b64encode(q.tobytes()).decode()


def generalist_share(scores: np.ndarray, k: int) -> list[float]:
    """(L,) share of tokens whose best expert is a generalist."""
    return (scores.argmax(-1) < k).mean(1).tolist()


def measured(ppl: float, scores: np.ndarray, k: int, n_shown: int) -> dict:
    """What the page says of one text under one model. scores (L, T, E) of all counted tokens."""
    return {
        'experts': scores.shape[-1],
        'ppl': round(ppl, 4) if np.isfinite(ppl) else None,
        'share': [round(s, 4) for s in generalist_share(scores, k)],
        'scores': quantised(scores[:, :n_shown]),
    }


def extremes(tokens: np.ndarray, scores: np.ndarray, k: int, enc: Encoding, at_most: int = 14) -> dict | None:
    """The tokens with the highest and those with the lowest generalist score, most extreme first: [label, score, occurrences].

    tokens (T,), scores (L, T, E); the score is the sum over generalists, its mean over layers and occurrences. Only tokens
    that occur `least` times: one in 2,000 and 5 at least. None if a token has no choice, or the text is too short."""
    if not 0 < k < scores.shape[-1]:
        return None
    count = np.bincount(tokens)  # (V,)
    total = np.bincount(tokens, scores[..., :k].sum(-1, dtype=np.float64).mean(0))  # (V,)
    least = max(5, len(tokens) // 2000)
    known = np.flatnonzero(count >= least)
    known = known[np.argsort(-total[known] / count[known], kind='stable')]
    rows = [[label(enc.decode_single_token_bytes(v)), round(total[v] / count[v], 3), int(count[v])] for v in known]
    n = min(at_most, len(rows) // 2)  # no token is in both lists
    return {'least': least, 'generalist': rows[:n], 'specialist': rows[::-1][:n]} if n else None


# ---- text and page ---------------------------------------------------------------------------------------------------
def passage(name: str, tokens: np.ndarray, enc: Encoding) -> dict:
    """The tokens of a text that are shown. raw: {position: label} of those that are not whole characters."""
    raw = [enc.decode_single_token_bytes(t) for t in tokens]
    text = pieces(raw)
    return {'name': name, 'pieces': text, 'raw': {i: label(b) for i, b in enumerate(raw) if b != text[i].encode()}}


def pieces(raw: list[bytes]) -> list[str]:
    """What each token, given as its bytes, adds to the text. Together they are the text: a character that is split over
    tokens belongs to the one that completes it and the others have '', and bytes that are no UTF-8 are U+FFFD."""
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    return [decoder.decode(b, final=i == len(raw) - 1) for i, b in enumerate(raw)]


def label(raw: bytes) -> str:
    """A token on its own: its text, or its bytes in hexadecimal if they are a part of a character."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return f'0x{raw.hex().upper()}'


def html(page: dict) -> str:
    """The template with `page` as JSON in a script element, in ASCII and without <, > and &, so nothing in a text or a
    name can end the element or begin another; the page's script puts them on the page as text, never as HTML."""
    data = json.dumps(page, separators=(',', ':'), allow_nan=False)  # ASCII: U+2028 and all others are \\u....
    for c in '<>&':
        data = data.replace(c, f'\\u{ord(c):04x}')
    return TEMPLATE.read_text(encoding='utf-8').replace('{{data}}', data)


# ---- of a run --------------------------------------------------------------------------------------------------------
def check_routers(run: Path, c: SimpleNamespace) -> None:
    """Raises ValueError unless some user of the run chooses between experts."""
    one = max(c.n_experts[i] for i in c.tested) == 1
    if one or c.router == 'mean':
        routed = [name for name, (row, *_) in METHODS.items() if dict(zip(COLUMNS, row))['router'] != 'mean']
        why = 'its users have one expert each' if one else 'all experts count alike (router=mean)'
        raise ValueError(f'{run} ({c.method}) has no routers, {why}; these methods have them: {", ".join(routed)}')


def look(run: SimpleNamespace, data: Texts, enc: Encoding, n_shown: int) -> dict:
    """The page of an opened run: its facts, and every text under every model. Dies if nobody of it has a router yet, or a
    model has diverged."""
    c, k, texts = run.c, run.c.n_generalists, []
    experts = c.n_experts * len(run.ids) if c.pooled else [c.n_experts[i] for i in run.ids]
    # a user that has not taken part yet has no router where it should have one
    routed = [n == 1 or getattr(model.h[0].mlp, 'router', None) is not None for n, model in zip(experts, run.models)]
    ready = [i for i in range(len(routed)) if routed[i]]
    if not ready:
        die(f'no user of {run.path} has taken part in a round yet: wait for the next')
    shown = sorted({ready[round(j * (len(ready) - 1) / (SHOWN - 1))] for j in range(SHOWN)})
    readers = [('all', run.models[0])] if c.pooled else [(run.names[i], run.models[i]) for i in shown]
    bar = tqdm(total=len(shown) * len(readers), desc='routing', disable=None, leave=False)
    for row, i in enumerate(shown):
        tokens = data.of(run.ids[i])['test'][: COUNTED + 1]
        seen = tokens[:-1]  # the last one is only predicted
        text = passage(run.names[i], seen[:n_shown], enc) | {'counted': len(seen), 'cells': []}
        for column, (name, model) in enumerate(readers):
            loss, scores = token_scores(model, tokens, c.block_size)  # (L, T, E)
            if not np.isfinite(scores).all():
                die(f'the model of {name} in {run.path} has scores that are no numbers: its training diverged')
            text['cells'].append(measured(perplexity(loss), scores, k, n_shown))
            if column == min(row, len(readers) - 1):
                text |= {'own': column, 'extremes': extremes(seen, scores, k, enc)}
            bar.update()
        texts.append(text)
    bar.close()
    facts = {'run': run.path.resolve().name} | {key: Path(getattr(c, key)).name for key in ('method', 'dataset', 'init_from')}
    facts |= {'tokenizer': enc.name, 'block_size': c.block_size, 'generalists': k, 'users': len(c.users)}
    return facts | {'models': [name for name, _ in readers], 'texts': texts}


def main(argv: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument('run', type=Path, metavar='RUN', help='folder of a run (its --out_dir)')
    options.add_argument('--passage_tokens', type=int, help='of each text on the page (default: 400 bytes, or 150 tokens)')
    options.add_argument('--init_from', type=home, help="the base model, if it is no longer where the run's configuration says")
    options.add_argument('--device', help='cpu, cuda, cuda:N, mps (default: as the run)')
    args = options.parse_args(argv)
    if args.passage_tokens is not None and args.passage_tokens < 1:
        die(f'--passage_tokens={args.passage_tokens}: expected a number >= 1')
    try:
        check_routers(args.run, read_run(args.run, [])[0])
        run = open_run(args.run, args.init_from, args.device)
        c, base = run.c, run.base
        data = Texts(folder_of(c.dataset), c.block_size, base.config.vocab_size, tokenizer=base.tokenizer)  # everybody's own
        enc = tokenizer_of(data.folder, data.meta)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        die(error)
    with autocast(run.base.wte.weight.device, run.c.dtype):
        page = look(run, data, enc, args.passage_tokens or (400 if enc.name == 'bytes' else 150))
    file = args.run / 'routing.html'
    print('share of tokens whose top-1 expert is a generalist, mean over layers, and perplexity: test text (row) under model')
    rows = [[t['name'], *(f'{mean(one["share"]):.3f} / {cell(one["ppl"])}' for one in t['cells'])] for t in page['texts']]
    print(table(['text', *page['models']], rows))
    try:
        file.write_text(html(page), encoding='utf-8')
    except OSError as error:
        die(error)
    print(f'\nwrote {file} ({file.stat().st_size / 1e6:.2f} MB)')


if __name__ == '__main__':
    main(sys.argv[1:])
