"""The page of `python eval.py RUN --routing_html`: which expert takes which token (paper Fig. 5, 13-18).

eval.py runs the models; here their scores (L, T, E) become numbers, and assets/routing.html with these numbers in it is the
page. L layers, T tokens, E experts of a user, of which the first k are generalists. Every number on the page but the colours is
of a text's first COUNTED tokens; what it shows is the beginning of that."""

import base64
import codecs
import json
from pathlib import Path

import numpy as np
import tiktoken

TEMPLATE = Path(__file__).parent / 'assets' / 'routing.html'
COUNTED = 100_000  # tokens of a test text at most


def passage(name: str, tokens: np.ndarray, enc: tiktoken.Encoding) -> dict:
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


def cell(ppl: float, scores: np.ndarray, k: int, n_shown: int) -> dict:
    """What the page says of one text under one model. scores (L, T, E) of all counted tokens."""
    return {
        'experts': scores.shape[-1],
        'ppl': round(ppl, 4) if np.isfinite(ppl) else None,
        'share': [round(s, 4) for s in generalist_share(scores, k)],
        'scores': quantised(scores[:, :n_shown]),
    }


def extremes(tokens: np.ndarray, scores: np.ndarray, k: int, enc: tiktoken.Encoding, at_most: int = 14) -> dict | None:
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


def html(page: dict) -> str:
    """The template with `page` as JSON in a script element, in ASCII and without <, > and &, so nothing in a text or a
    name can end the element or begin another; the page's script puts them on the page as text, never as HTML."""
    data = json.dumps(page, separators=(',', ':'), allow_nan=False)  # ASCII: U+2028 and all others are \\u....
    for c in '<>&':
        data = data.replace(c, f'\\u{ord(c):04x}')
    return TEMPLATE.read_text(encoding='utf-8').replace('{{data}}', data)
