"""Prepare a data set: $ python data/prepare.py {demo,base,agnews,multilingual,slimpajama,local} [--source=PATH] [--help]

Documents are stripped, exact duplicates are dropped, and every document goes to one split of one user. Then each split is
written as one stream of tokens, its documents joined by the data set's separator without an end-of-text token:
OUT_ROOT/NAME/user{i}_{train,valid,test}.bin and meta.json, which data/stream.py reads.

agnews        one category per user; valid and test: a random partition of the test rows over users (tomorrow's news)
multilingual  Wikipedia in one language per user: de, nl, fr, it
slimpajama    one source per user: StackExchange, Github, ArXiv, Book
local         one user per sub-folder of --source, at any depth of which is read: text in UTF-8, whatever the file's name, and
              .jsonl, .jsonl.gz, .csv, .parquet with a column 'text'. Of ten or more text files each is one document, fewer are
              cut into paragraphs at blank lines. Without sub-folders: one user per file (.txt or one of those four)
demo          four users, or thousands with --alpha, out of text that is installed with Python and its packages: no download
base          what pretrain.py trains on: English Wikipedia and the installed text that demo does not use"""

import argparse
import hashlib
import heapq
import json
import os
import re
import shutil
import sys
import tempfile
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tiktoken import Encoding
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import sources
from data.sources import MANY, one_line
from data.stream import SPLITS, encoding

BASE_TOKENS = 80_000_000  # English Wikipedia to take from the Hub for base; everything when it comes from --source
BATCH_CHARS = 1_000_000  # text that is tokenised at once
LEAD = 2  # tokens of a separator, at most; a stream's first document loses its own
# open: where the documents come from. max_chars: what longer ones are cut to. tokens: default size of every user's splits, for
# the three paper sets those of Table 3; a fraction of the text otherwise.
SETS = {
    'agnews': dict(
        open=sources.open_agnews,
        separator=' ',
        tokenizer='gpt2',
        tokens={
            'train': (761_924, 756_719, 814_131, 771_460),
            'valid': (48_809, 48_730, 50_398, 48_249),
            'test': (48_167, 47_721, 48_344, 49_377),
        },
    ),
    'multilingual': dict(
        open=sources.open_multilingual,
        separator=' ',
        tokenizer='gpt2',
        tokens={
            'train': (557_662, 407_498, 556_796, 451_584),
            'valid': (300_764, 216_318, 220_071, 165_984),
            'test': (229_720, 219_741, 210_570, 172_547),
        },
    ),
    'slimpajama': dict(  # 400 000 characters are about 100k tokens: a test stream holds two books or more
        open=sources.open_slimpajama,
        separator=' ',
        tokenizer='gpt2',
        max_chars=400_000,
        tokens={'train': (1_000_000,), 'valid': (200_000,), 'test': (200_000,)},
    ),
    'local': dict(
        open=sources.open_local, separator='\n\n', tokenizer='gpt2', tokens={'train': (0.8,), 'valid': (0.1,), 'test': (0.1,)}
    ),
    'demo': dict(
        open=sources.open_demo,
        separator='\n\n',
        tokenizer='bytes',
        tokens={'train': (40_000, 60_000, 80_000, 60_000), 'valid': (24_000,), 'test': (40_000,)},
    ),
    'base': dict(
        open=sources.open_base,
        separator='\n\n',
        tokenizer='bytes',
        tokens={'train': (0.98,), 'valid': (0.01,), 'test': (0.01,)},
    ),
}


# ---- who gets how much of what --------------------------------------------------------------------------------------


def sizes(options: dict, n_users: int) -> dict[str, list]:
    """Per split and user: tokens (int) or, by default in local and base, a fraction (float) of the user's text."""
    asked, base = {}, options['set'] == 'base'
    for split, default in SETS[options['set']]['tokens'].items():
        asked[split] = [default[i % len(default)] for i in range(n_users)]
        given = options[f'{split}_tokens']
        if given is None:
            continue
        try:
            numbers = [int(n) for n in str(given).split(',')]
        except ValueError:
            raise ValueError(f'--{split}_tokens={given}: expected a number of tokens, or one per user with commas') from None
        if len(numbers) not in (1, n_users) or min(numbers) < 2:
            raise ValueError(f'--{split}_tokens={given}: expected one size, or {n_users} with commas, of 2 tokens or more')
        if len(numbers) == 1:  # in base it is Wikipedia's: of the small installed texts everything is taken
            numbers = numbers + asked[split][1:] if base else numbers * n_users
        asked[split] = numbers
    if base and not options['source'] and not options['train_tokens']:
        asked['train'][0] = BASE_TOKENS
    for split in ('valid', 'test'):
        if base and isinstance(asked['train'][0], int) and options[f'{split}_tokens'] is None:
            asked[split][0] = max(2, asked['train'][0] // 98)
    return asked


def make_shares(options: dict, n_users: int, n_categories: int, n_pools: int) -> dict[str, np.ndarray]:
    """Per split (users, pools): the part of each category in each user's text, rows summing to 1."""
    own = np.eye(n_users, n_pools)
    if options['alpha'] is not None:
        rng = np.random.default_rng((options['seed'], 1))
        own[:, :n_categories] = rng.dirichlet([options['alpha']] * n_categories, n_users)
    shares = dict.fromkeys(SPLITS, own)
    if options['set'] == 'agnews' and options['alpha'] is None:  # the same mixture for everybody, out of test rows if any
        mixture = np.eye(n_pools)[4] if n_pools == 5 else np.full(4, 1 / 4)
        shares['valid'] = shares['test'] = np.tile(mixture, (n_users, 1))
    return shares


def wanted(asked: dict, shares: dict, category: int, total: float = np.inf) -> list[tuple]:
    """Who wants text of a category: (user, split, tokens to reach, tokens to cut to), the small splits first.

    A user's n tokens of a split are cut at n x the cumulated shares, rounded, so that its categories add up to n. A fraction
    is taken of the category's `total` tokens, and nothing is cut."""
    wants = []
    for split in ('test', 'valid', 'train'):
        ends = np.cumsum(shares[split], axis=1)
        for user, n in enumerate(asked[split]):
            share = shares[split][user, category]
            if isinstance(n, float) and share > 0:
                wants.append((user, split, n * total * share / shares[split][:, category].sum(), None))
            elif limit := round(n * ends[user, category]) - round(n * (ends[user, category] - share)):
                wants.append((user, split, limit + LEAD, limit + 4 * LEAD))  # so no piece is a separator only
    return wants


def without_crumbs(asked: dict, shares: dict, n_documents: list[int]) -> dict[str, np.ndarray]:
    """Shares of which every one can have a document. Where some category has fewer documents than are wanted of it (many
    users, small splits), the smallest parts of a user's text, under 2 % if that is enough or up to 40 %, go to its others."""
    for least in (0, 0.02, 0.05, 0.1, 0.2, 0.4):
        larger = {
            split: np.where(share < np.minimum(least, share.max(1, keepdims=True)), 0, share) for split, share in shares.items()
        }
        larger = {split: share / share.sum(1, keepdims=True) for split, share in larger.items()} if least else shares
        if all(n >= len(wanted(asked, larger, category)) for category, n in enumerate(n_documents)):
            break
    return larger


# ---- tokens ---------------------------------------------------------------------------------------------------------


def encode(enc: Encoding, text: str) -> np.ndarray:
    if enc.name == 'bytes':
        return np.frombuffer(text.encode(), np.uint8).astype('<u2')
    return enc.encode_to_numpy(text, disallowed_special=()).astype('<u4' if enc.n_vocab > 2**16 else '<u2')


def encode_all(enc: Encoding, texts: list[str]) -> list[np.ndarray]:
    """Over all cores: tiktoken works outside Python's lock. Every n-th text is one task: short ones are not worth their own."""
    n, tokens = min(8, os.cpu_count()), [None] * len(texts)
    with ThreadPoolExecutor(n) as threads:
        for i, some in enumerate(threads.map(lambda i: [encode(enc, text) for text in texts[i::n]], range(n))):
            tokens[i::n] = some
    return tokens


def fill(
    streams: list,
    names: list[str],
    asked: dict,
    shares: dict,
    enc: Encoding,
    separator: str,
    max_chars: int | None,
    spool: BinaryIO,
) -> list[np.ndarray]:
    """Write the distinct documents of `streams` (data/sources.py), each as tokens of separator + text, to the file `spool`,
    until all that is asked is there.

    Returns per category (documents, 2): a document's place in `spool`, in bytes, and its number of tokens. Memory, however
    long the streams are: a batch of text, the shuffle buffer, and about 150 bytes per document for its hash and its place.
    Raises ValueError for a category without documents."""
    wants = [wanted(asked, shares, category) for category in range(len(names))]
    need = [sum(want for _, _, want, _ in some) for some in wants]  # inf where somebody takes a fraction
    pools = [array('q') for _ in names]
    tokens, longest, seen, n_cut = [0] * len(need), [0] * len(need), set(), 0

    def enough(category):  # every split may waste the rest of a document
        return tokens[category] >= need[category] + len(wants[category]) * longest[category]

    def flush(batch):
        for (category, _), ids in zip(batch, encode_all(enc, [text for _, text in batch])):
            pools[category].extend((spool.tell(), len(ids)))
            spool.write(ids)
            tokens[category] += len(ids)
            longest[category] = max(longest[category], len(ids))
        batch.clear()

    for label, documents, feeds in streams:
        if all(map(enough, feeds)):
            continue
        batch, chars = [], 0
        for category, text in tqdm(documents, desc=label, unit=' documents', disable=None):
            if enough(category):
                continue
            text = text.strip().encode('utf-8', 'replace').decode()  # JSON may hold lone surrogates
            n_cut += max_chars is not None and len(text) > max_chars
            text = text[:max_chars].strip()
            key = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if not text or key in seen:
                continue
            seen.add(key)
            batch.append((category, separator + text))
            chars += len(text)
            if chars >= BATCH_CHARS:
                flush(batch)
                chars = 0
                if all(map(enough, feeds)):
                    break
        flush(batch)
    for name, pool, some in zip(names, pools, wants):
        if some and not pool:
            raise ValueError(f'there are no documents of {name}: nothing to prepare')
    if n_cut:
        print(f'{n_cut} documents longer than {max_chars:,} characters were cut there (--max_chars)')
    return [np.array(pool).reshape(-1, 2) for pool in pools]


def deal(pools: list, asked: dict, shares: dict, seed: int) -> dict[tuple[int, str], np.ndarray]:
    """Deal every category's documents, in random order, each to the one split that has least of what it wants.

    So if there is less text than asked, all splits shrink alike. Only the document that fills a split is cut, to its size.
    Returns per (user, split) its documents as in `pools`, (documents, 2)."""
    rng, shares = np.random.default_rng((seed, 2)), without_crumbs(asked, shares, list(map(len, pools)))
    parts = {(user, split): array('q') for split in SPLITS for user in range(len(asked[split]))}
    for category, pool in enumerate(pools):
        wants = wanted(asked, shares, category, pool[:, 1].sum())
        got = [0] * len(wants)
        waiting = [(0, k) for k in range(len(wants))]  # a heap of (tokens got / wanted, whose)
        for i in rng.permutation(len(pool)) if wants else ():
            _, k = heapq.heappop(waiting)
            user, split, want, limit = wants[k]
            place, n = pool[i].tolist()
            n = min(n, limit - got[k]) if limit else n
            parts[user, split].extend((place, n))
            got[k] += n
            if got[k] < want:
                heapq.heappush(waiting, (got[k] / want, k))
            if not waiting:
                break
    for key, part in parts.items():
        parts[key] = np.array(part).reshape(-1, 2)
        rng.shuffle(parts[key])  # mixes the categories
    return parts


def documents_in(spool: BinaryIO, part: np.ndarray, enc: Encoding, separator: str) -> Iterator[np.ndarray]:
    """Tokens of every document of a split, (documents, 2) as of deal; the first one without its separator."""
    dtype = encode(enc, '').dtype
    for i, (place, n) in enumerate(part):
        spool.seek(place)
        ids = np.frombuffer(spool.read(n * dtype.itemsize), dtype)
        if i == 0:  # 'ignore': a lone document may have been cut within a character
            ids = encode(enc, enc.decode_bytes(ids.tolist()).decode('utf-8', 'ignore')[len(separator) :])
        yield ids


# ---- the folder -----------------------------------------------------------------------------------------------------


def write(folder: Path, names: list[str], parts: dict, asked: dict, spool: BinaryIO, enc: Encoding, meta: dict) -> dict:
    """Write all streams and meta.json under a temporary name, then rename: what stands at `folder` is always complete."""
    partial, old = (folder.with_name(f'.{folder.name}.{state}') for state in ('partial', 'old'))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        n_bytes = np.array([len(enc.decode_single_token_bytes(i)) for i in range(enc.n_vocab)])
        users = [{'name': name, 'tokens': {}, 'documents': {}, 'bytes': {}, 'sha256': {}} for name in names]
        for (i, split), part in tqdm(parts.items(), desc='writing', unit=' streams', disable=None):
            size = asked[split][i] if isinstance(asked[split][i], int) else sys.maxsize
            tokens, documents, text, digest = 0, 0, 0, hashlib.sha256()
            with (partial / f'user{i}_{split}.bin').open('wb') as file:
                for ids in documents_in(spool, part, enc, meta['separator']):
                    ids = ids[: size - tokens]
                    file.write(ids)
                    digest.update(ids)
                    tokens, documents = tokens + len(ids), documents + 1
                    text += int(n_bytes[ids].sum())  # bytes of text, for bits per byte
                    if tokens == size:
                        break
            for key, value in (('tokens', tokens), ('documents', documents), ('bytes', text), ('sha256', digest.hexdigest())):
                users[i][key][split] = value
        meta = {**meta, 'dtype': ids.dtype.str, 'vocab_size': enc.n_vocab, 'users': users}
        (partial / 'meta.json').write_text(json.dumps(meta, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():  # --force, or an empty folder
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return meta


def report(meta: dict, asked: dict, paper: dict | None, supply: str) -> None:
    """Print who has what, beside the paper's Table 3, and who has less than asked; for more than MANY users a summary."""
    users = meta['users']
    first = users if len(users) <= MANY else users[:5]
    rows = [(i, user['name'], user['documents'], user['tokens']) for i, user in enumerate(first)]
    if len(users) > len(first):
        rows += [
            (
                '',
                f'{name} of {len(users):,} users',
                *(
                    {split: int(number([user[key][split] for user in users])) for split in SPLITS}
                    for key in ('documents', 'tokens')
                ),
            )
            for name, number in (('least', np.min), ('median', np.median), ('most', np.max))
        ]
    width = max(len(name) for _, name, _, _ in rows)
    print(
        f'user  {"":{width}}  {"documents":>23}  {"tokens: train":>13} {"valid":>9} {"test":>9}'
        + '   paper, Table 3 (GPT-2 tokens)' * bool(paper)
    )
    for i, name, documents, tokens in rows:
        table3 = ' / '.join(f'{paper[split][i % len(paper[split])]:,}' for split in SPLITS) if paper else ''
        print(
            f'{i:>4}  {name:{width}}  {" ".join(f"{documents[split]:>7,}" for split in SPLITS)}  '
            f'{tokens["train"]:>13,} {tokens["valid"]:>9,} {tokens["test"]:>9,}   {table3}'.rstrip()
        )
    short = {
        i: ', '.join(
            f'{split} {user["tokens"][split]:,} of {asked[split][i]:,}'
            for split in SPLITS
            if user['tokens'][split] < asked[split][i]
        )
        for i, user in enumerate(users)
    }
    short = {i: splits for i, splits in short.items() if splits}
    if len(users) > MANY and short:
        print(f'{len(short):,} of {len(users):,} users have fewer tokens than asked; there is no more text ({supply})')
    for i, splits in short.items() if len(users) <= MANY else ():
        print(f'user {i} ({users[i]["name"]}) has fewer tokens than asked: {splits}; there is no more text')


# ---- the command ----------------------------------------------------------------------------------------------------


def check(options: dict) -> Path:
    """The folder to write. Raises ValueError for options that cannot work, before anything is read or written."""
    source, name = options['source'], options['name']
    if options['set'] == 'local' and not source or options['set'] == 'demo' and source:
        raise ValueError('local needs --source=FOLDER' if not source else 'demo takes no --source: its text is installed')
    if source is not None and not Path(source).exists():
        raise ValueError(f'--source={source} does not exist')
    if options['set'] == 'local' and not Path(source).is_dir():
        raise ValueError(f'--source={source} is not a folder: local takes a folder with one sub-folder or file per user')
    if not re.fullmatch(r'\w[\w.-]*', name):
        raise ValueError(f'--name={name}: expected a plain folder name')
    for option, least in (('users', 1), ('max_chars', 1), ('seed', 0)):
        if options[option] is not None and options[option] < least:
            raise ValueError(f'--{option}={options[option]}: expected {least} or more')
    if options['alpha'] is not None and not 0 < options['alpha'] < np.inf:
        raise ValueError(f'--alpha={options["alpha"]}: expected a positive number')
    folder = Path(options['out_root']) / name
    if (folder / 'meta.json').exists() and not options['force']:
        raise ValueError(f'{folder} is already prepared: give --force to replace it, or another --name')
    if folder.exists() and not (folder / 'meta.json').exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f'{folder} exists and is not a prepared data set: move it away, or give another --name')
    return folder


def prepare(options: dict) -> dict:
    """Prepare one data set, print a report, return meta.json. Raises ValueError or OSError with a one-line message."""
    folder, chosen = check(options), SETS[options['set']]
    enc = encoding(options['tokenizer'])
    wishes = [sizes(options, options['users'] or 4)] if options['set'] == 'demo' else []  # installed text is cut to measure
    categories, streams, where = chosen['open'](options, *wishes)
    n_users = options['users'] or len(categories)
    if n_users > len(categories) and options['alpha'] is None:
        raise ValueError(
            f'--users={n_users}, but {options["set"]} has {len(categories)} categories: give --alpha, a Dirichlet '
            'concentration, to mix them'
        )
    asked = sizes(options, n_users)
    pools = categories + ['test'] * (options['set'] == 'agnews' and len(streams) == 2)
    shares = make_shares(options, n_users, len(categories), len(pools))
    names = categories[:n_users]
    if options['alpha'] is not None:
        names = [
            ' + '.join(f'{share:.0%} {name}' for name, share in zip(categories, row) if share >= 0.05) or 'mixture'
            for row in shares['train']
        ]
    meta = {key: options[key] for key in ('name', 'tokenizer', 'seed')} | {'source': where, 'separator': chosen['separator']}
    meta['options'] = options | {key: options[key] and Path(options[key]).name for key in ('source', 'out_root')}
    with tempfile.TemporaryFile(dir=next(parent for parent in folder.absolute().parents if parent.exists())) as spool:
        filled = fill(streams, pools, asked, shares, enc, chosen['separator'], options['max_chars'], spool)
        supply = ', '.join(
            f'{name}: {pool[:, 1].sum():,} tokens in {len(pool):,} documents' for name, pool in zip(pools, filled)
        )
        parts = deal(filled, asked, shares, options['seed'])
        for (user, split), part in parts.items():
            if part[:, 1].sum() < LEAD + 2:
                raise ValueError(
                    f'user {user} ({names[user]}) would have an empty {split} stream: there are too few documents ({supply})'
                )
        meta = write(folder, names, parts, asked, spool, enc, meta)
    paper = options['set'] in sources.CATEGORIES and options['alpha'] is None
    report(meta, asked, chosen['tokens'] if paper else None, supply)
    print(f'wrote {folder}')
    return meta


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('set', choices=SETS, metavar='NAME', help=' | '.join(SETS))
    add(
        '--source',
        metavar='PATH',
        help='local file or folder with the columns of the Hub, instead of the Hub: '
        'train.*, test.* (agnews), de.*, ... (multilingual), train.* (slimpajama); .jsonl, .jsonl.gz, .csv, .parquet',
    )
    add('--tokenizer', choices=('gpt2', 'bytes'), help='default gpt2; bytes in demo and base')
    add('--name', help='folder name, default NAME')
    add('--out_root', default=str(Path(__file__).resolve().parent), help='where the folder goes, default data/')
    add('--seed', type=int, default=42)
    add('--users', type=int, help='number of users, default: one per category')
    for split in SPLITS:
        add(f'--{split}_tokens', metavar='N', help='tokens per user, or one number per user: N,N,N,N')
    add('--alpha', type=float, help='mix categories: every user gets Dirichlet(alpha) shares of them, in all splits')
    add('--max_chars', type=int, help='cut longer documents, default 400000 in slimpajama, whose books are long')
    add('--force', action='store_true', help='replace the data set if it exists, once the new one is complete')

    def fail(message):
        raise ValueError(f'{message} (see --help)')

    parser.error = fail  # one line instead of argparse's usage
    try:
        options = vars(parser.parse_args(argv))
        for option, default in (
            ('tokenizer', SETS[options['set']]['tokenizer']),
            ('name', options['set']),
            ('max_chars', SETS[options['set']].get('max_chars')),
        ):
            options[option] = default if options[option] is None else options[option]
        prepare(options)
    except (ValueError, OSError) as error:
        print(f'prepare.py: {one_line(error)}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
