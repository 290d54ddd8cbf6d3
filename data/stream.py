"""Token streams: the tokenizers, and reading what data/prepare.py wrote.

A data set is a folder data/NAME with user{i}_{train,valid,test}.bin (flat little-endian uint16 or uint32 tokens), meta.json
and, where the tokens are another base's, a copy of its tokenizer.json. A split is one stream of tokens; a batch is windows of
it (nanoGPT's layout)."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken
import torch

SPLITS = ('train', 'valid', 'test')
VOCABULARIES = {'bytes': 257, 'gpt2': 50257}  # tokens of each tokenizer
TOKENIZER = 'tokenizer.json'
# what ends and what begins a document, of the bases that people use
ENDS = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '<｜end▁of▁sentence｜>')
STARTS = ('<|begin_of_text|>', '<s>', '<bos>', '<｜begin▁of▁sentence｜>')


def encoding(name: str) -> tiktoken.Encoding:
    """'gpt2': GPT-2's byte-pair encoding, 50257 tokens. 'bytes': one token per byte and <|endoftext|>, 257 tokens.

    Raises ValueError for another name, OSError if GPT-2's files are neither cached nor reachable."""
    if name == 'bytes':
        ranks, special = {bytes([i]): i for i in range(256)}, {'<|endoftext|>': 256}
        return tiktoken.Encoding('bytes', pat_str=r'(?s).', mergeable_ranks=ranks, special_tokens=special)
    if name != 'gpt2':
        raise ValueError(f"unknown tokenizer {name!r}: expected 'gpt2' or 'bytes'")
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as error:
        why = f"GPT-2's vocabulary is neither cached nor reachable ({type(error).__name__})"
        fix = "connect once, or set TIKTOKEN_CACHE_DIR to its two files' folder, or give --tokenizer=bytes for a base of bytes"
        raise OSError(f'{why}: {fix}') from None


class Tokenizer:
    """A tokenizer.json of the Hub, with what is used of a tiktoken.Encoding. Tokens say the text and nothing else: no special
    token is added (those written in a text are text), no space before the first word, nothing cut or padded.

    .name, .raw: the file's bytes, .sha256 of them, .n_vocab: the largest id + 1, .eot_token and .start_token: what ends a
    document and what begins one, or None, .unk_token: what
    stands for a character without a token; None: it is lost.
    Raises ValueError or OSError, in one line, for a file that is none, or of which a token is not known as bytes."""

    def __init__(self, file: Path, name: str | None = None):
        import tokenizers

        self.raw, self.name = file.read_bytes(), name or f'{Path(os.path.abspath(file)).parent.name}/{file.name}'
        self.sha256 = hashlib.sha256(self.raw).hexdigest()
        try:
            found = json.loads(self.raw)
            found |= dict.fromkeys(('truncation', 'padding', 'post_processor'))
            parts = [found['model'], *parts_of(found.get('normalizer')), *parts_of(found.get('pre_tokenizer'))]
            for part in parts:
                part |= {'dropout': None} if 'dropout' in part else {}
                part |= {'add_prefix_space': False} if part.get('type') in ('ByteLevel', 'Metaspace') else {}
                part |= {'prepend_scheme': 'never'} if part.get('type') == 'Metaspace' else {}
                part |= {'prepend': ''} if part.get('type') == 'Prepend' else {}
            self.rust = tokenizers.Tokenizer.from_str(json.dumps(found))
            self.rust.encode_special_tokens = True
            vocabulary, added = self.rust.get_vocab(), self.rust.get_added_tokens_decoder()
            self.n_vocab = max(vocabulary.values()) + 1
            kinds = {part.get('type') for part in parts + parts_of(found.get('decoder'))}
        except BaseException as error:  # Rust's panics are no Exceptions
            if isinstance(error, KeyboardInterrupt):
                raise
            why = f'{type(error).__name__}: {" ".join(str(error).split())[:150]}'
            raise ValueError(f'{file} cannot be read as a tokenizer.json ({why}): copy or download it again') from None
        if not kinds & {'ByteLevel', 'Metaspace', 'ByteFallback'} or self.n_vocab > 2**24:
            kind = f'{parts[0].get("type")}, ids below {self.n_vocab:,}'
            raise ValueError(f'{file} ({kind}): expected byte-level BPE, or SentencePiece with ▁ for a space')
        self.bytes = [b'\xff'] * self.n_vocab  # no UTF-8: of an id that is nobody's
        table = byte_table()
        for token, i in vocabulary.items():
            literal = i in added and (added[i].special or 'ByteLevel' in kinds)
            if literal or ('ByteLevel' in kinds and not table.keys() >= set(token)):
                self.bytes[i] = token.encode()
            elif 'ByteLevel' in kinds:
                self.bytes[i] = bytes(map(table.get, token))
            elif 'ByteFallback' in kinds and re.fullmatch('<0x[0-9A-F]{2}>', token):
                self.bytes[i] = bytes([int(token[3:5], 16)])
            else:
                self.bytes[i] = token.replace('▁', ' ').encode()
        self.unk_token = parts[0].get('unk_id', vocabulary.get(parts[0].get('unk_token')))
        first = [next((vocabulary[token] for token in some if token in vocabulary), None) for some in (ENDS, STARTS)]
        self.eot_token, self.start_token = first[0], first[0] if first[1] is None else first[1]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Over all cores. Memory: some 150 times the text. Raises ValueError for a text that cannot be said in tokens."""
        texts = [text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') for text in texts]
        try:
            return [found.ids for found in self.rust.encode_batch_fast(texts, add_special_tokens=False)]
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise ValueError(f'{self.name} cannot encode a text: {" ".join(str(error).split())[:150]}') from None

    def encode_ordinary(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def decode_single_token_bytes(self, token: int) -> bytes:
        return self.bytes[token]

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        return b''.join(self.bytes[token] for token in tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        return self.decode_bytes(tokens).decode(errors='replace')


Encoding = tiktoken.Encoding | Tokenizer


def parts_of(part: dict | None) -> list[dict]:
    """A normalizer, pre-tokenizer or decoder of a tokenizer.json, and those that it is a sequence of."""
    steps = [step for key in ('normalizers', 'pretokenizers', 'decoders') for step in (part or {}).get(key, ())]
    return [*[part] * (part is not None), *(each for step in steps for each in parts_of(step))]


def byte_table() -> dict[str, int]:
    """{character: byte} of byte-level tokens, as GPT-2 writes them: printable ones as themselves, others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def tokenizer_of(folder: Path, meta: dict) -> Encoding:
    """A data set's tokenizer. Raises as `encoding` and `Tokenizer`, and ValueError if its copy of a tokenizer.json is not the
    one that meta.json describes."""
    if meta.get('tokenizer_sha256') is None:
        return encoding(meta['tokenizer'])
    check_tokenizer(folder, meta)
    return Tokenizer(folder / TOKENIZER, meta['tokenizer'])


def tokenizer_for(vocab_size: int, file: Path | None) -> Encoding:
    """What a base of so many tokens reads: its own tokenizer.json, if it has one, else what has as many. Raises as `encoding`
    and `Tokenizer`, and ValueError if nothing has."""
    if file:
        return Tokenizer(file)
    for name, n in VOCABULARIES.items():
        if 0 <= vocab_size - n < 128:  # bases pad their vocabulary, e.g. 50257 -> 50304
            return encoding(name)
    raise ValueError(
        f'the base has a vocabulary of {vocab_size} tokens: expected 257 (bytes) or 50257 (gpt2), or up to 127 more'
    )


def check_tokenizer(folder: Path, meta: dict) -> None:
    """Raises ValueError unless a data set's tokenizer.json, if it has one, is there as it was prepared."""
    file, sha256 = folder / TOKENIZER, meta.get('tokenizer_sha256')
    if sha256 is not None and not (file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256):
        why = 'is not the file that meta.json describes (SHA-256 differs)' if file.is_file() else 'is missing'
        raise ValueError(f'{file} {why}: prepare the data set again')


def clean(text: str) -> str:
    """Text that enters, from wherever: without a byte order mark, and every line end is a line feed."""
    return text.removeprefix('\ufeff').replace('\r\n', '\n').replace('\r', '\n')


class Texts:
    """A prepared data set. All of it is read and checked once, one user in memory at a time; then `of` reads a user's again.

    .meta as in meta.json, .names of the users, .n_train: tokens of train text of each user, .overlap: see `overlap`.

    target 'own' keeps each user's own valid and test streams; 'mixture' gives user i the i-th of N equal pieces of every
    user's valid (and test) stream, one after the other: tomorrow's topics, disjoint between users. Train never changes.
    pooled: one user with everybody's text. For these two all text stays in memory.

    Raises ValueError, in one line, for anything missing, truncated, altered, too short or outside the vocabulary."""

    def __init__(
        self,
        folder: str | Path,
        block_size: int,
        vocab_size: int | None,
        target: str = 'own',
        pooled: bool = False,
        tokenizer: Path | None = None,
    ):
        self.folder, self.meta, self.pooled = Path(folder), read_meta(Path(folder), vocab_size, tokenizer), pooled
        check_tokenizer(self.folder, self.meta)
        users, known, self.overlap, streams = self.meta['users'], self.meta.get('overlap'), [], []
        self.names = [user['name'] for user in users]
        self.n_train = [1] if pooled else [user['tokens']['train'] for user in users]
        for i in range(len(users)):
            data = load_user(self.folder, self.meta, i)
            check_lengths(data, i, block_size)
            self.overlap.append(known[i] if known else overlap(data['train'], data['valid']))
            streams += [data] if pooled or target == 'mixture' else []
        if target == 'mixture':
            streams = [{**streams[i], **mixture(streams, i)} for i in range(len(streams))]
            for i, data in enumerate(streams):
                check_lengths(data, i, block_size)
        self.streams = streams  # [] to read a user's files when they are asked for

    def of(self, i: int) -> dict:
        """User i's {'train': tokens, 'valid': tokens, 'test': tokens}; if pooled also 'tests', {user: its test tokens}."""
        if self.pooled:
            data = {split: np.concatenate([user[split] for user in self.streams]) for split in SPLITS}
            return {**data, 'tests': {j: user['test'] for j, user in enumerate(self.streams)}}
        return self.streams[i] if self.streams else load_user(self.folder, self.meta, i)


def read_meta(folder: Path, vocab_size: int | None = None, tokenizer: Path | None = None) -> dict:
    """meta.json of a data set. Raises ValueError if it is not one, or not for a base of vocab_size tokens that reads text by
    the file `tokenizer`, if given."""
    try:
        meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        if meta['dtype'] not in ('<u2', '<u4') or not meta['users'] or type(meta['vocab_size']) is not int:
            raise ValueError('dtype must be <u2 or <u4, vocab_size a number, and there must be users')
        for user in meta['users']:
            if {type(user['tokens'][split]) for split in SPLITS} != {int} or type(user['name']) is not str:
                raise ValueError('a user needs a name, and the number of its tokens of each split')
            meta['tokenizer'], [user['sha256'][split] for split in SPLITS]
        if type(meta.get('tokenizer_sha256', '')) is not str:
            raise ValueError('tokenizer_sha256 must be the one of tokenizer.json, or absent')
        if 'overlap' in meta and [type(share) for share in meta['overlap']] != [float] * len(meta['users']):
            raise ValueError('overlap needs a number for every user')
    except FileNotFoundError:
        raise ValueError(f'no data set at {folder} (no meta.json): data/prepare.py makes it, see the README') from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{folder}/meta.json cannot be read ({type(error).__name__}: {error}): prepare it again') from None
    if tokenizer is not None and not same_tokenizer(folder, meta, tokenizer):
        raise ValueError(
            f'{folder} has tokens of {meta["tokenizer"]}, but the base reads those of {tokenizer}, which are others: '
            f'prepare with --tokenizer={tokenizer}, or choose a base of {meta["tokenizer"]} tokens with --init_from'
        )
    padding = 128 if tokenizer is None else np.inf  # bases pad theirs, e.g. 50257 -> 50304
    if vocab_size is not None and not 0 <= vocab_size - meta['vocab_size'] < padding:
        fix = ''.join(f'prepare with --tokenizer={t}, or ' for t, n in VOCABULARIES.items() if 0 <= vocab_size - n < 128)
        raise ValueError(
            f'{folder} has a vocabulary of {meta["vocab_size"]} tokens ({meta["tokenizer"]}), but the base model has '
            f'{vocab_size}: {fix or "no tokenizer here fits it, "}choose a base of {meta["vocab_size"]} tokens with --init_from'
        )
    return meta


def same_tokenizer(folder: Path, meta: dict, tokenizer: Path) -> bool:
    """Whether that tokenizer.json makes the tokens of a data set: it is its own, or differs in nothing that decides them."""
    if meta.get('tokenizer_sha256') is None:
        return False
    if hashlib.sha256(tokenizer.read_bytes()).hexdigest() == meta['tokenizer_sha256']:
        return True
    ours, theirs = (json.loads(enc.rust.to_str()) for enc in (tokenizer_of(folder, meta), Tokenizer(tokenizer)))
    return all(ours[key] == theirs[key] for key in ('model', 'normalizer', 'pre_tokenizer', 'added_tokens'))


def overlap(train: np.ndarray, valid: np.ndarray, length: int = 64) -> float:
    """Share of the validation stream's windows of `length` tokens, side by side, that occur word for word anywhere in the
    training stream: there a router learns to trust who knows them by heart. By a polynomial hash of windows, mod 2^64."""
    if min(len(train), len(valid)) < length:
        return 0.0

    def hashes(tokens: np.ndarray) -> Iterator[np.ndarray]:  # of the windows at every place, Σ_j t_j p^j, a piece at a time
        for start in range(0, len(tokens) - length + 1, piece):
            some = tokens[start : start + piece + length - 1]
            sums = np.cumsum((some.astype(np.uint64) + 1) * powers[: len(some)])
            sums = np.concatenate((np.zeros(1, np.uint64), sums))
            yield (sums[length:] - sums[:-length]) * inverses[: len(some) - length + 1]

    p, piece = 0x9E3779B97F4A7C15, 2**10 * length  # p is odd, so it has an inverse; the streams may be larger than memory
    powers, inverses = (np.cumprod(np.full(piece + length, x, np.uint64)) for x in (p, pow(p, -1, 2**64)))
    asked = np.concatenate([some[::length].copy() for some in hashes(valid)])
    unique, places = np.unique(asked, return_inverse=True)
    found = np.zeros(len(unique), bool)
    for some in hashes(train):
        at = np.searchsorted(unique[:-1], some)  # without the last one, so that every place is one of unique
        found[at[unique[at] == some]] = True
    return float(found[places].mean())


def check_lengths(user: dict, i: int, block_size: int) -> None:
    """Raises ValueError unless every split of user i holds a window."""
    for split in SPLITS:
        if len(user[split]) < block_size + 1:
            raise ValueError(
                f'user {i} has {len(user[split])} {split} tokens, but a window of block_size {block_size} '
                f'needs {block_size + 1}: prepare more text' + ' or train with a lower --block_size' * (len(user[split]) > 1)
            )


def load_user(folder: str | Path, meta: dict, i: int) -> dict:
    """User i's {'train': tokens, 'valid': tokens, 'test': tokens}, read-only arrays, checked against meta.json as they are
    read. Raises ValueError naming the file."""
    user, dtype, found = meta['users'][i], np.dtype(meta['dtype']), {}
    for split in SPLITS:
        file, n = Path(folder, f'user{i}_{split}.bin'), user['tokens'][split]
        raw = file.read_bytes() if file.exists() else b''
        tokens = found[split] = np.frombuffer(raw, dtype, len(raw) // dtype.itemsize)
        if not file.exists():
            why = 'is missing'
        elif len(raw) != n * dtype.itemsize:
            why = f'has {len(raw)} bytes, but meta.json says {n} tokens of {dtype.itemsize}: truncated or overwritten'
        elif n and tokens.max() >= meta['vocab_size']:
            why = f'holds token {tokens.max()}, outside the vocabulary of {meta["vocab_size"]}'
        elif hashlib.sha256(raw).hexdigest() != user['sha256'][split]:
            why = 'is not the file that meta.json describes (SHA-256 differs)'
        else:
            continue
        raise ValueError(f'{file} {why}: prepare the data set again')
    return found


def is_text(file: Path) -> bool:
    """UTF-8 without a zero byte, which UTF-16 and binary files have. An empty file is text, of no document."""
    try:
        with file.open(encoding='utf-8') as text:
            return not any('\0' in part for part in iter(lambda: text.read(2**20), ''))
    except UnicodeDecodeError:
        return False


def load_text(file: str | Path, enc: Encoding) -> np.ndarray:
    """A text file as one stream of tokens. Raises ValueError or OSError."""
    if not Path(file).is_file():
        raise ValueError(f'{file} does not exist, or is no file')
    if not is_text(Path(file)):
        raise ValueError(f'{file} is not text in UTF-8')
    return np.array(enc.encode_ordinary(clean(Path(file).read_text(encoding='utf-8'))))


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


def own_files(folder: Path) -> set[str]:
    """Names of the files of the data set at `folder`, {} if nothing is there. Raises ValueError if something is there that is
    no data set, or that has the name of one of its files and is none: what only a new data set may replace."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not there and (folder.is_dir() or not folder.exists()):
        return there
    try:
        meta = read_meta(folder)
    except ValueError:
        raise ValueError(f'{folder} exists and is not a prepared data set: move it away, or give another --name') from None
    own = {'meta.json', *(f'user{i}_{split}.bin' for i in range(len(meta['users'])) for split in SPLITS)}
    own |= {TOKENIZER} if 'tokenizer_sha256' in meta else set()
    for name in sorted(there):
        if re.fullmatch(r'user\d+_\w+\.bin|tokenizer\.json', name) and not (name in own and (folder / name).is_file()):
            raise ValueError(f'{folder / name} is not a file of the data set there: move it away, or give another --name')
    return own & there


def write_streams(
    folder: Path,
    names: list[str],
    streams: Iterable[dict],
    vocab_size: int,
    meta: dict,
    n_bytes: np.ndarray | None = None,
    tokenizer: Tokenizer | None = None,
) -> dict:
    """Write a data set; return its meta.json: `meta`, and what is counted here. tokenizer: the one to copy beside it.

    streams: per name, in order, {'train': documents, 'valid': ..., 'test': ...}, each an iterable of arrays of token ids that
    is read once, so that none of it need be in memory. n_bytes (vocab_size,): bytes of text of each token, else 1.
    It is written under a temporary name, then renamed. Of a data set that is there the files are replaced where links lead
    to, meta.json first: what it does not describe is refused when it is read. Other files stay. Raises as own_files."""
    dtype, old = np.dtype('<u4' if vocab_size > 2**16 else '<u2'), own_files(folder)
    folder = Path(os.path.realpath(folder))
    partial = folder.with_name(f'.{folder.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        users, overlaps = [], []
        for i, (name, documents) in enumerate(zip(names, streams, strict=True)):
            files = {split: partial / f'user{i}_{split}.bin' for split in SPLITS}
            counts = {split: write_stream(file, documents[split], dtype, n_bytes) for split, file in files.items()}
            keys = ('tokens', 'documents', 'bytes', 'sha256')
            users.append({'name': name, **{key: {split: counts[split][key] for split in SPLITS} for key in keys}})
            texts = [np.memmap(files[split], dtype, 'r') for split in SPLITS[:2] if counts[split]['tokens']]  # none is empty
            overlaps.append(overlap(*texts) if len(texts) == 2 else 0.0)
        if tokenizer:
            meta = {**meta, 'tokenizer_sha256': tokenizer.sha256}
            (partial / TOKENIZER).write_bytes(tokenizer.raw)
        meta = {**meta, 'dtype': dtype.str, 'vocab_size': vocab_size, 'users': users, 'overlap': overlaps}
        (partial / 'meta.json').write_text(json.dumps(meta, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
        if not old and not os.path.ismount(folder):
            partial.rename(folder)  # over an empty one, too
            return meta
        new = sorted((path.name for path in partial.iterdir()), key='meta.json'.__ne__)
        for name in old.difference(new):
            (folder / name).unlink()
        for name in new:
            shutil.move(partial / name, os.path.realpath(folder / name))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return meta


def write_stream(file: Path, documents: Iterable, dtype: np.dtype, n_bytes: np.ndarray | None) -> dict:
    """Write one split, document after document. Returns its 'tokens', 'documents', 'bytes' of text and 'sha256'."""
    tokens, n_documents, text, digest = 0, 0, 0, hashlib.sha256()
    with file.open('wb') as out:
        for ids in documents:
            raw = np.asarray(ids, dtype).tobytes()
            out.write(raw)
            digest.update(raw)
            tokens, n_documents = tokens + len(ids), n_documents + 1
            text += len(ids) if n_bytes is None else int(n_bytes[ids].sum())
    return {'tokens': tokens, 'documents': n_documents, 'bytes': text, 'sha256': digest.hexdigest()}
