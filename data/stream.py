"""Token streams: the tokenizers, and reading what data/prepare.py wrote.

A data set is a folder data/NAME with user{i}_{train,valid,test}.bin (flat little-endian uint16 or uint32 tokens) and
meta.json. A split is one stream of tokens; a batch is windows of it (nanoGPT's layout)."""

import hashlib
import json
from pathlib import Path

import numpy as np
import tiktoken
import torch

SPLITS = ('train', 'valid', 'test')


def encoding(name: str) -> tiktoken.Encoding:
    """'gpt2': GPT-2's byte-pair encoding, 50257 tokens. 'bytes': one token per byte and <|endoftext|>, 257 tokens.

    Raises ValueError for another name, OSError if GPT-2's files are neither cached nor reachable."""
    if name == 'bytes':
        return tiktoken.Encoding(
            'bytes',
            pat_str=r'(?s).',
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={'<|endoftext|>': 256},
        )
    if name != 'gpt2':
        raise ValueError(f"unknown tokenizer {name!r}: expected 'gpt2' or 'bytes'")
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as error:
        raise OSError(
            f"GPT-2's vocabulary is neither cached nor reachable ({type(error).__name__}): connect once, or set "
            'TIKTOKEN_CACHE_DIR to a folder with its two cached files, or use --tokenizer=bytes'
        ) from None


def check_dataset(folder: str | Path, block_size: int, vocab_size: int) -> dict:
    """meta.json, after every file of every user has been read and checked: one user in memory at a time. With it 'overlap',
    of every user: see `overlap`.

    Raises ValueError, in one line, for anything missing, truncated, altered, too short or outside the vocabulary."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        if meta['dtype'] not in ('<u2', '<u4') or not meta['users'] or type(meta['vocab_size']) is not int:
            raise ValueError('dtype must be <u2 or <u4, vocab_size a number, and there must be users')
        for user in meta['users']:
            if {type(user['tokens'][split]) for split in SPLITS} != {int} or type(user['name']) is not str:
                raise ValueError('a user needs a name, and the number of its tokens of each split')
            meta['tokenizer'], [user['sha256'][split] for split in SPLITS]
    except FileNotFoundError:
        raise ValueError(f'no data set at {folder} (no meta.json): data/prepare.py makes it, see the README') from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{folder}/meta.json cannot be read ({type(error).__name__}: {error}): prepare the data set again'
        ) from None
    if not 0 <= vocab_size - meta['vocab_size'] < 128:  # bases pad their vocabulary, e.g. 50257 -> 50304
        raise ValueError(
            f'{folder} has a vocabulary of {meta["vocab_size"]} tokens ({meta["tokenizer"]}), but the base model '
            f'has {vocab_size}: prepare with the other --tokenizer, or choose the other base with --init_from'
        )
    meta['overlap'] = []
    for i in range(len(meta['users'])):
        user = load_user(folder, meta, i)
        check_lengths(user, i, block_size)
        meta['overlap'].append(overlap(user['train'], user['valid']))
    return meta


def overlap(train: np.ndarray, valid: np.ndarray, length: int = 64) -> float:
    """Share of the validation stream's windows of `length` tokens, side by side, that occur word for word anywhere in the
    training stream: there a router learns to trust who knows them by heart. By a polynomial hash of windows, mod 2^64."""
    if min(len(train), len(valid)) < length:
        return 0.0

    def hashes(tokens: np.ndarray) -> np.ndarray:  # (tokens - length + 1,), Σ_j t_j p^j over the window
        sums = np.cumsum((tokens.astype(np.uint64) + 1) * np.cumprod(np.full(len(tokens), p, np.uint64)))
        sums = np.concatenate((np.zeros(1, np.uint64), sums))
        return (sums[length:] - sums[:-length]) * np.cumprod(np.full(len(sums) - length, pow(p, -1, 2**64), np.uint64))

    p = 0x9E3779B97F4A7C15  # odd, so it has an inverse
    asked, known = hashes(valid)[::length], hashes(train)
    unique = np.unique(asked)
    found = known[unique.take(np.searchsorted(unique, known), mode='clip') == known]  # few are asked for, many known
    return float(np.isin(asked, found).mean())


def check_lengths(user: dict, i: int, block_size: int) -> None:
    """Raises ValueError unless every split of user i holds a window."""
    for split in SPLITS:
        if len(user[split]) < block_size + 1:
            raise ValueError(
                f'user {i} has {len(user[split])} {split} tokens, but a window of block_size {block_size} '
                f'needs {block_size + 1}: prepare more text or lower --block_size'
            )


def load_user(folder: str | Path, meta: dict, i: int) -> dict:
    """User i's {'train': tokens, 'valid': tokens, 'test': tokens}, read-only arrays, checked against meta.json as they are
    read. Raises ValueError naming the file."""
    user, dtype = meta['users'][i], np.dtype(meta['dtype'])
    return {
        split: load_stream(
            Path(folder, f'user{i}_{split}.bin'), dtype, user['tokens'][split], user['sha256'][split], meta['vocab_size']
        )
        for split in SPLITS
    }


def load_dataset(folder: str | Path, block_size: int, vocab_size: int, target: str = 'own') -> tuple[dict, list[dict]]:
    """(meta, every user's splits as of load_user), all of it in memory.

    target 'own' keeps each user's own valid and test streams; 'mixture' gives user i the i-th of N equal pieces of every
    user's valid (and test) stream, one after the other: tomorrow's topics, disjoint between users. Train never changes.
    Raises ValueError as check_dataset does."""
    meta = check_dataset(folder, block_size, vocab_size)
    streams = [load_user(folder, meta, i) for i in range(len(meta['users']))]
    if target == 'mixture':
        mixed = [mixture(streams, i) for i in range(len(streams))]
        streams = [{'train': own['train'], **mix} for own, mix in zip(streams, mixed)]
        for i, user in enumerate(streams):
            check_lengths(user, i, block_size)
    return meta, streams


def load_text(file: str | Path, tokenizer: str) -> np.ndarray:
    """A text file as one stream of tokens. Raises ValueError or OSError."""
    try:
        return np.array(encoding(tokenizer).encode_ordinary(Path(file).read_text(encoding='utf-8')))
    except UnicodeDecodeError:
        raise ValueError(f'{file} is not text in UTF-8') from None


def load_stream(file: Path, dtype: np.dtype, n_tokens: int, sha256: str, vocab_size: int) -> np.ndarray:
    """One split, checked against meta.json. Raises ValueError naming the file."""
    if not file.exists():
        raise ValueError(f'{file} is missing: prepare the data set again')
    raw = file.read_bytes()
    if len(raw) != n_tokens * dtype.itemsize:
        raise ValueError(
            f'{file} has {len(raw)} bytes, but meta.json says {n_tokens} tokens of {dtype.itemsize}: '
            'truncated or overwritten, prepare the data set again'
        )
    tokens = np.frombuffer(raw, dtype)
    if n_tokens and tokens.max() >= vocab_size:
        raise ValueError(f'{file} holds token {tokens.max()}, outside the vocabulary of {vocab_size}: prepare it again')
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise ValueError(f'{file} is not the file that meta.json describes (SHA-256 differs): prepare the data set again')
    return tokens


def mixture(streams: list[dict], i: int) -> dict:
    """User i's share of everybody's valid and test text: piece i of N of each stream, pieces of equal length."""
    mixed = {}
    for split in ('valid', 'test'):
        size = min(len(user[split]) for user in streams) // len(streams)
        mixed[split] = np.concatenate([user[split][i * size : (i + 1) * size] for user in streams])
    return mixed


def get_batch(tokens: np.ndarray, batch_size: int, block_size: int, key: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows at uniformly random starts, with replacement: x, y (batch_size, block_size) int64, y one token later.

    The starts depend on `key` alone, a tuple of ints such as (seed, user, stream, i): batch i of a user is the same
    whoever else takes part, and a resumed run needs no generator state (METHOD: batches)."""
    starts = np.random.default_rng(key).integers(0, len(tokens) - block_size, batch_size)  # (B,)
    windows = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)  # (B, T + 1)
    windows = torch.from_numpy(windows)
    return windows[:, :-1], windows[:, 1:]
