"""Prepare a data set: $ python data/prepare.py {demo,base,agnews,multilingual,slimpajama,local} [--source=PATH] [--help]

Documents are stripped, exact duplicates are dropped, and every document goes to one split of one user. Then each split is
written as one stream of tokens, its documents joined by the data set's separator without an end-of-text token:
OUT_ROOT/NAME/user{i}_{train,valid,test}.bin and meta.json, which data/stream.py reads. --tokenizer=PATH or OWNER/NAME gives
the tokens of another base, by its tokenizer.json, and puts a copy of that beside them.

agnews        one category per user; valid and test: a random partition of the test rows over users (tomorrow's news)
multilingual  Wikipedia in one language per user: de, nl, fr, it
slimpajama    one source per user: StackExchange, Github, ArXiv, Book
local         one user per sub-folder of --source, at any depth of which is read: text in UTF-8, whatever the file's name, and
              .jsonl, .jsonl.gz, .csv, .parquet with a column 'text'. Of ten or more text files each is one document, fewer are
              cut into paragraphs at blank lines, or lines where there are none. Without sub-folders: one user per file (.txt or
              one of those four)
demo          four users, or thousands with --alpha, out of text that is installed with Python and its packages: no download
base          what tools/pretrain.py trains on: English Wikipedia and the installed text that demo does not use"""

import hashlib
import heapq
import os
import re
import sys
import tempfile
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import die, parser, table
from data import sources
from data.sources import MANY, printable
from data.stream import SPLITS, TOKENIZER, VOCABULARIES, Encoding, Tokenizer, clean, encoding, own_files, write_streams

BASE_TOKENS = 80_000_000  # English Wikipedia to take from the Hub for base; everything when it comes from --source
BATCH_CHARS = 1_000_000  # text that is tokenised at once
LEAD = 2  # tokens of a separator, at most; a stream's first document loses its own
# open: where the documents come from. max_chars: what longer ones are cut to; 400 000 characters are about 100k tokens: a test
# stream holds two books or more. tokens: default size of (train, valid, test), for every user or each in turn; for the three
# paper sets those of Table 3; a fraction of the text otherwise.
# fmt: off
SETS = {
    'agnews': dict(open=sources.open_agnews, separator=' ', tokenizer='gpt2', max_chars=None, tokens=(
        (761_924, 48_809, 48_167), (756_719, 48_730, 47_721), (814_131, 50_398, 48_344), (771_460, 48_249, 49_377))),
    'multilingual': dict(open=sources.open_multilingual, separator=' ', tokenizer='gpt2', max_chars=None, tokens=(
        (557_662, 300_764, 229_720), (407_498, 216_318, 219_741), (556_796, 220_071, 210_570), (451_584, 165_984, 172_547))),
    'slimpajama': dict(open=sources.open_slimpajama, separator=' ', tokenizer='gpt2', max_chars=400_000, tokens=(
        (1_000_000, 200_000, 200_000),)),
    'local': dict(open=sources.open_local, separator='\n\n', tokenizer='gpt2', max_chars=None, tokens=((0.8, 0.1, 0.1),)),
    'demo': dict(open=sources.open_demo, separator='\n\n', tokenizer='bytes', max_chars=None, tokens=(
        (40_000, 24_000, 40_000), (60_000, 24_000, 40_000), (80_000, 24_000, 40_000), (60_000, 24_000, 40_000))),
    'base': dict(open=sources.open_base, separator='\n\n', tokenizer='bytes', max_chars=None, tokens=((0.98, 0.01, 0.01),)),
}
# fmt: on


# ---- who gets how much of what --------------------------------------------------------------------------------------
def sizes(options: dict, n_users: int) -> dict[str, list]:
    """Per split and user: tokens (int) or, by default in local and base, a fraction (float) of the user's text."""
    asked, base, defaults = {}, options['set'] == 'base', SETS[options['set']]['tokens']
    for k, split in enumerate(SPLITS):
        asked[split] = [defaults[i % len(defaults)][k] for i in range(n_users)]
        given = options[f'{split}_tokens']
        if given is None:
            continue
        try:
            numbers = [int(n) for n in given.split(',')]
        except ValueError:
            numbers = []
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
def open_tokenizer(given: str) -> Encoding:
    """gpt2, bytes, a tokenizer.json, a folder that holds one, or OWNER/NAME of the Hub. Raises ValueError or OSError."""
    path = Path(given)
    if given in VOCABULARIES:
        return encoding(given)
    if path.is_dir() and not (path / TOKENIZER).is_file():
        raise ValueError(f'--tokenizer={given} is a folder without a {TOKENIZER}')
    if path.exists():
        return Tokenizer(path / TOKENIZER if path.is_dir() else path)
    if not re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', given):
        expected = f'{", ".join(VOCABULARIES)}, a {TOKENIZER}, a folder that holds one, or OWNER/NAME of the Hugging Face Hub'
        raise ValueError(f'--tokenizer={given} does not exist: expected {expected}')
    return Tokenizer(download(given), given)


def download(repo: str) -> Path:
    """tokenizer.json of a Hub repository, from its cache if it cannot be reached. Raises OSError."""
    import huggingface_hub as hub
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    warnings.filterwarnings('ignore', module='huggingface_hub')
    cause = None
    for cached in (False, True):
        try:
            if not cached:
                hub.get_hf_file_metadata(hub.hf_hub_url(repo, TOKENIZER))  # asks once; a download tries for half a minute
            return Path(hub.hf_hub_download(repo, TOKENIZER, local_files_only=cached))
        except Exception as error:  # the client raises many kinds, all meaning: not there
            cause = cause or error
    why = getattr(getattr(cause, 'response', None), 'status_code', None) or type(cause).__name__
    fix = 'connect once without HF_HUB_OFFLINE, check the name and HF_TOKEN (`hf auth login`)'
    raise OSError(f'cannot get {TOKENIZER} of {repo} from the Hugging Face Hub ({why}): {fix}, or give its path as --tokenizer')


def encode(enc: Encoding, text: str) -> np.ndarray:
    if isinstance(enc, Tokenizer):
        return encode_all(enc, [text])[0]
    if enc.name == 'bytes':
        return np.frombuffer(text.encode(), np.uint8).astype('<u2')
    return enc.encode_to_numpy(text, disallowed_special=()).astype('<u4' if enc.n_vocab > 2**16 else '<u2')


def encode_all(enc: Encoding, texts: list[str]) -> list[np.ndarray]:
    """Over all cores: tiktoken works outside Python's lock. Every n-th text is one task: short ones are not worth their own."""
    if isinstance(enc, Tokenizer):
        return [np.array(ids, '<u4' if enc.n_vocab > 2**16 else '<u2') for ids in enc.encode_batch(texts)]
    n, tokens = min(8, os.cpu_count()), [None] * len(texts)
    with ThreadPoolExecutor(n) as threads:
        for i, some in enumerate(threads.map(lambda i: [encode(enc, text) for text in texts[i::n]], range(n))):
            tokens[i::n] = some
    return tokens


def batches(
    documents: Iterable[tuple[int, str]], shorten: Callable[[str], str], seen: dict, copies: Counter
) -> Iterator[list[tuple[int, str]]]:
    """The (category, text) of documents, clean, stripped and shortened, BATCH_CHARS characters at a time: without empty texts
    and those whose hash is in `seen`, {hash: category}, where it adds the others. Counts copies: (category, whose they are)."""
    batch, chars = [], 0
    for category, text in documents:
        text = shorten(clean(text).strip().encode('utf-8', 'replace').decode())  # JSON may hold lone surrogates
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if key in seen:
            copies[category, seen[key]] += 1
        if not text or key in seen:
            continue
        seen[key] = category
        batch.append((category, text))
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    yield batch


def fill(
    streams: list, names: list, asked: dict, shares: dict, enc: Encoding, separator: str, max_chars: int | None, spool: BinaryIO
) -> tuple[list[np.ndarray], str]:
    """Write the distinct documents of `streams` (data/sources.py), each as tokens of separator + text, to the file `spool`,
    until all that is asked is there.

    Returns per category (documents, 2): a document's place in `spool`, in bytes, and its number of tokens; and in words how
    much there is of each. Memory, however long the streams are: a batch of text, the shuffle buffer, and about 150 bytes per
    document for its hash and its place.
    Raises ValueError for a category without documents."""
    wants = [wanted(asked, shares, category) for category in range(len(names))]
    need = [sum(want for _, _, want, _ in some) for some in wants]  # inf where somebody takes a fraction
    pools = [array('q') for _ in names]
    tokens, longest, seen, copies, n_cut = [0] * len(need), [0] * len(need), {}, Counter(), 0
    n_other = n_lost = 0

    def enough(category: int) -> bool:  # every split may waste the rest of a document
        return tokens[category] >= need[category] + len(wants[category]) * longest[category]

    def shorten(text: str) -> str:
        nonlocal n_cut
        n_cut += max_chars is not None and len(text) > max_chars
        return text[:max_chars].strip()

    for label, documents, feeds in streams:
        if all(map(enough, feeds)):
            continue
        documents = tqdm(documents, desc=label, unit=' documents', disable=None)
        missing = ((category, text) for category, text in documents if not enough(category))
        for batch in batches(missing, shorten, seen, copies):
            for (category, text), ids in zip(batch, encode_all(enc, [separator + text for _, text in batch])):
                if isinstance(enc, Tokenizer):
                    said, again = (separator + text).encode(), enc.decode_bytes(ids[ids != enc.unk_token])
                    n_other, n_lost = n_other + (again != said), n_lost + max(0, len(said) - len(again))
                pools[category].extend((spool.tell(), len(ids)))
                spool.write(ids)
                tokens[category] += len(ids)
                longest[category] = max(longest[category], len(ids))
            if all(map(enough, feeds)):
                break
    pools = [np.array(pool).reshape(-1, 2) for pool in pools]
    supply = supply_of(names, pools, copies, [*map(bool, wants)])
    if n_cut:
        print(f'{n_cut} documents longer than {max_chars:,} characters were cut there (--max_chars)')
    if n_other:
        why = f'it has no token for some characters, or changes them ({n_lost:,} bytes fewer)'
        print(f'{enc.name} cannot say {n_other:,} documents word for word: {why}')
    return pools, supply


def supply_of(names: list[str], pools: list[np.ndarray], copies: Counter, needed: list[bool]) -> str:
    """In words how much there is of each category. Raises ValueError for one that is wanted and has no documents."""
    supply = []
    for i, name in enumerate(names):
        n = {names[owner]: n for (copy, owner), n in copies.items() if copy == i != owner}
        same = f'{sum(n.values()):,} copies of documents of {" and ".join([*n][:3])}' if n else ''
        if needed[i] and not len(pools[i]):
            raise ValueError(f'there are no documents of {name}: {f"there are only {same}" if n else "nothing to prepare"}')
        beside = f', beside {same}' if n else ''
        supply.append(f'{name}: {pools[i][:, 1].sum():,} tokens in {len(pools[i]):,} documents{beside}')
    return ', '.join(supply)


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


def documents_in(spool: BinaryIO, part: np.ndarray, size: float, enc: Encoding, separator: str) -> Iterator[np.ndarray]:
    """Tokens of every document of a split, (documents, 2) as of deal; the first one without its separator. If `size` is a
    number of tokens (int), no more than that."""
    dtype, left = encode(enc, '').dtype, size if isinstance(size, int) else sys.maxsize
    for i, (place, n) in enumerate(part):
        spool.seek(place)
        ids = np.frombuffer(spool.read(n * dtype.itemsize), dtype)
        if i == 0:  # 'ignore': a lone document may have been cut within a character
            raw = b''.join(enc.decode_bytes(some.tolist()) for some in np.array_split(ids, len(ids) // 2**16 + 1))
            ids = encode(enc, raw.decode('utf-8', 'ignore')[len(separator) :])
        yield ids[:left]
        left -= len(ids[:left])
        if left == 0:
            break


# ---- the command ----------------------------------------------------------------------------------------------------
def report(meta: dict, asked: dict, paper: tuple | None, supply: str) -> None:
    """Print who has what (of how much, if less than asked), beside the paper's Table 3; of more than MANY users a summary."""
    users, rows, short = meta['users'], [], 0
    for i, user in enumerate(users):
        pairs = [(user['tokens'][split], asked[split][i]) for split in SPLITS]
        tokens = [f'{n:,} of {want:,}' if n < want else f'{n:,}' for n, want in pairs]
        short += any(n < want for n, want in pairs)
        rows.append([i, user['name'], *map('{:,}'.format, user['documents'].values()), *tokens])
    if len(users) > MANY:
        rows = rows[:5]
        for name, number in (('least', np.min), ('median', np.median), ('most', np.max)):
            counts = [int(number([user[key][split] for user in users])) for key in ('documents', 'tokens') for split in SPLITS]
            rows.append(['', f'{name} of {len(users):,} users', *map('{:,}'.format, counts)])
    header = ['user', 'name', 'documents: train', 'valid', 'test', 'tokens: train', 'valid', 'test']
    if paper:
        header.append('paper, Table 3 (GPT-2 tokens)')
        rows = [[*row, ' / '.join(f'{n:,}' for n in paper[i % len(paper)])] for i, row in enumerate(rows)]
    print(table(header, rows, left=2))
    if short:
        print(f'{short:,} of {len(users):,} users have fewer tokens than asked; there is no more text ({supply})')


def check(options: dict) -> Path:
    """The folder to write. Raises ValueError for options that cannot work, before anything is read or written."""
    chosen, source, name, alpha = (options[key] for key in ('set', 'source', 'name', 'alpha'))
    folder = Path(options['out_root'], name)
    refused = {
        'local needs --source=FOLDER': chosen == 'local' and not source,
        'demo takes no --source: its text is installed': chosen == 'demo' and source,
        f'--source={source} does not exist': source is not None and not Path(source).exists(),
        f'--source={source}: local takes a folder with one sub-folder or file per user': chosen == 'local'
        and not Path(source or '').is_dir(),
        f'--name={name}: expected a plain folder name': not re.fullmatch(r'\w[\w.-]*', name),
        f'--alpha={alpha}: expected a positive number': alpha is not None and not 0 < alpha < np.inf,
    }
    for option, least in (('users', 1), ('max_chars', 1), ('seed', 0)):
        value = options[option]
        refused[f'--{option}={value}: expected {least} or more'] = value is not None and value < least
    for why, so in refused.items():
        if so:
            raise ValueError(why)
    if own_files(folder) and not options['force']:
        raise ValueError(f'{folder} is already prepared: give --force to replace it, or another --name')
    return folder


def prepare(options: dict) -> dict:
    """Prepare one data set, print a report, return meta.json. Raises ValueError or OSError with a one-line message."""
    folder, enc, alpha = check(options), open_tokenizer(options['tokenizer']), options['alpha']
    options = options | {'tokenizer': printable(enc.name)}
    chosen, separator = SETS[options['set']], SETS[options['set']]['separator']
    wishes = [sizes(options, options['users'] or 4)] if options['set'] == 'demo' else []  # installed text is cut to measure
    categories, streams, where = chosen['open'](options, *wishes)
    n_users = options['users'] or len(categories)
    if n_users > len(categories) and alpha is None:
        raise ValueError(f'--users={n_users}: there are {len(categories)} categories; --alpha, a concentration, mixes them')
    asked = sizes(options, n_users)
    pools = categories + ['test'] * (options['set'] == 'agnews' and len(streams) == 2)
    shares = make_shares(options, n_users, len(categories), len(pools))
    names = categories[:n_users]
    if alpha is not None:
        names = [
            ' + '.join(f'{share:.0%} {name}' for name, share in zip(categories, row) if share >= 0.05) or 'mixture'
            for row in shares['train']
        ]
    meta = {key: options[key] for key in ('name', 'tokenizer', 'seed')}
    meta |= {'source': [*map(printable, where)], 'separator': separator}
    meta['options'] = options | {key: options[key] and printable(Path(options[key]).name) for key in ('source', 'out_root')}
    with tempfile.TemporaryFile(dir=next(parent for parent in folder.absolute().parents if parent.exists())) as spool:
        filled, supply = fill(streams, pools, asked, shares, enc, separator, options['max_chars'], spool)
        parts = deal(filled, asked, shares, options['seed'])
        for (user, split), part in parts.items():
            if part[:, 1].sum() < LEAD + 2:
                raise ValueError(f'user {user} ({names[user]}): an empty {split} stream, too few documents ({supply})')
        users = tqdm(range(n_users), desc='writing', unit=' users', disable=None)
        streams = (
            {split: documents_in(spool, parts[i, split], asked[split][i], enc, separator) for split in SPLITS} for i in users
        )
        n_bytes = np.array([len(enc.decode_single_token_bytes(i)) for i in range(enc.n_vocab)], np.uint16)
        copied = enc if isinstance(enc, Tokenizer) else None
        meta = write_streams(folder, names, streams, enc.n_vocab, meta, n_bytes, copied)
    report(meta, asked, chosen['tokens'] if options['set'] in sources.CATEGORIES and alpha is None else None, supply)
    print(f'wrote {printable(folder)}')
    return meta


def main(argv: list[str]) -> None:
    command = parser(__doc__)
    add = command.add_argument
    add('set', choices=SETS, metavar='NAME', help=' | '.join(SETS))
    columns = 'train.*, test.* (agnews), de.*, ... (multilingual), train.* (slimpajama); .jsonl, .jsonl.gz, .csv, .parquet'
    path = {'type': os.path.expanduser}  # a shell leaves the ~ of --source=~/x as it is
    add('--source', metavar='PATH', **path, help=f"local file or folder with the Hub's columns, instead of the Hub: {columns}")
    kinds = 'default gpt2; bytes in demo and base; or of another base: tokenizer.json, its folder, or OWNER/NAME of the Hub'
    add('--tokenizer', metavar='NAME', help=kinds, **path)
    add('--name', help='folder name, default NAME')
    add('--out_root', default=str(Path(__file__).resolve().parent), help='where the folder goes, default data/', **path)
    add('--seed', type=int, default=42)
    add('--users', type=int, help='number of users, default: one per category')
    for split in SPLITS:
        add(f'--{split}_tokens', metavar='N', help='tokens per user, or one number per user: N,N,N,N')
    add('--alpha', type=float, help='mix categories: every user gets Dirichlet(alpha) shares of them, in all splits')
    add('--max_chars', type=int, help='cut longer documents, default 400000 in slimpajama, whose books are long')
    add('--force', action='store_true', help='replace the data set if it exists, once the new one is complete')
    options = vars(command.parse_args(argv))
    chosen = SETS[options['set']]
    for option, default in (('tokenizer', chosen['tokenizer']), ('name', options['set']), ('max_chars', chosen['max_chars'])):
        options[option] = default if options[option] is None else options[option]
    try:
        prepare(options)
    except (ValueError, OSError) as error:
        die(printable(' '.join(str(error).split())))


if __name__ == '__main__':
    main(sys.argv[1:])
