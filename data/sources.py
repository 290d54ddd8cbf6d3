"""Where documents come from: rows of the Hugging Face Hub, of local files, and text installed with Python.

open_NAME(options), one for every data set of data/prepare.py, opens its source and returns
  categories  names of the kinds of text, one per user unless --alpha mixes them
  streams     [(label, documents, feeds)]: an iterator of (category, text), and the categories that it can yield, as numbers
              in the order of `categories`; the number after them is agnews' test rows
  where       the repositories or files, for meta.json
Rows are read as documents are taken, and no further. What cannot be read raises a ValueError or OSError that names it.
Tokens, sizes and splits are the business of data/prepare.py."""

import ast
import csv
import gzip
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from data.installed import base_documents, demo_documents, many_documents
from data.stream import SPLITS, is_text

BUFFER = 10_000  # rows that are shuffled at a time, but for agnews
MANY = 32  # users, beyond which a demo's files are several documents each and a report is a summary
ROWS = ('.jsonl', '.jsonl.gz', '.csv', '.parquet')  # a document per row, in the column 'text'
FORMATS = (*ROWS, '.txt')
INSTALLED = 'text installed with Python and its packages'
CATEGORIES = {  # of the paper's sets
    'agnews': ('World', 'Sports', 'Business', 'Sci/Tech'),
    'multilingual': ('de', 'nl', 'fr', 'it'),
    'slimpajama': ('StackExchange', 'Github', 'ArXiv', 'Book'),
}


# ---- rows: dictionaries, from the Hub or from files -----------------------------------------------------------------
def printable(text: object) -> str:
    """'?' for what could command a terminal or is not UTF-8, as files' names may hold."""
    return re.sub(r'[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]', '?', str(text))


def one_line(message: object) -> str:
    return printable(' '.join(str(message).split())[:500])


def hub_rows(repository: str, config: str | None, split: str, seed: int, buffer: int) -> Iterator[tuple[str, dict]]:
    """(repository, row) of a parquet data set on the Hub, streamed and shuffled. Raises OSError when they cannot be read."""
    import datasets
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it warns at every retry
    try:
        stream = datasets.load_dataset(repository, config, split=split, streaming=True)
        yield from ((repository, row) for row in stream.shuffle(seed=seed, buffer_size=buffer))
    except Exception as error:  # the Hub's client, its transport and parquet each have their own
        raise OSError(
            f'{repository} cannot be read from the Hugging Face Hub ({type(error).__name__}: {one_line(error)}): '
            'connect, or give local files with the same columns as --source=PATH'
        ) from None


def file_rows(file: Path, unit: str = 'paragraph') -> Iterator[tuple[str, dict]]:
    """(where it begins, row) of every row of a local file; text, all but ROWS: one per line, paragraph or file (`unit`).
    Raises ValueError naming the file and the line, or a parquet file's row."""
    place = str(file)
    try:
        if file.suffix == '.parquet':
            import pyarrow.parquet

            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024)
            for n, row in enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), 1):
                yield f'{file}, row {n}', row
            return
        opener = gzip.open if file.name.endswith('.jsonl.gz') else open
        with opener(file, 'rt', encoding='utf-8-sig', newline='' if file.suffix == '.csv' else None) as lines:
            if not file.name.endswith(ROWS):
                parts = ((False, lines),) if unit == 'file' else itertools.groupby(lines, str.isspace)
                for blank, part in parts:
                    texts = () if blank else part if unit == 'line' else (''.join(part),)
                    yield from ((place, {'text': text}) for text in texts)
            elif file.suffix == '.csv':
                csv.field_size_limit(2**31 - 1)
                reader, header = csv.reader(lines, strict=True), []
                for fields in itertools.chain([[]], reader):
                    if fields and header and len(fields) != len(header):
                        many = f'{len(fields)} fields, but the header has {len(header)}'
                        raise ValueError(f'{many}: a text with commas or quotes needs "..." around it, quotes in it doubled')
                    if fields and header:
                        yield place, dict(zip(header, fields))
                    elif fields:
                        header = fields
                        if twice := {name for name in header if name and header.count(name) > 1}:
                            raise ValueError(f'two columns of the name {", ".join(sorted(twice))}')
                    place = f'{file}, line {reader.line_num + 1}'
            else:
                for n, line in enumerate(lines, 1):
                    place = f'{file}, line {n}'
                    if line.strip():
                        row = json.loads(line)
                        if not isinstance(row, dict):
                            raise ValueError('it is not a JSON object')
                        yield place, row
    except Exception as error:  # of gzip, zlib, csv, json, pyarrow or the file system
        why = f'{error.msg} at character {error.colno}' if isinstance(error, json.JSONDecodeError) else one_line(error)
        why += ': a quote is not closed, or one inside quotes is not doubled' * isinstance(error, csv.Error)
        raise ValueError(f'{place} cannot be read ({type(error).__name__}: {why})') from None


def shuffled(rows: Iterable, buffer: int, rng: np.random.Generator) -> Iterator:
    """The rows in random order, with `buffer` of them in memory: what .shuffle() does to rows of the Hub."""
    held = []
    for row in rows:
        if len(held) < buffer:
            held.append(row)
        else:
            i = rng.integers(buffer)
            yield held[i]
            held[i] = row
    rng.shuffle(held)
    yield from held


def find_files(source: Path, stem: str = '*') -> list[Path]:
    """Data files at `source`, sorted: that file, or those of a folder named STEM.jsonl, STEM-00000-of-00002.parquet, ..."""
    begins = r'[^.]' if stem == '*' else rf'{stem}[.-]'
    files = [source]
    if not source.is_file():
        files = [file for file in sorted(source.iterdir()) if re.match(begins, file.name) and file.is_file()]
    return [file for file in files if file.name.endswith(FORMATS)]


def user_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(what is read, what is left out) of a user's folder and the folders in it, without hidden ones, each sorted by path.

    Read are ROWS and text. Links to folders are not followed: they may lead back. Raises OSError naming what cannot be read."""

    def fail(error):
        raise error

    found = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith('.')]
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found += [Path(parent, name) for name in names + links if not name.startswith('.')]
    found.sort(key=Path.as_posix)  # on every machine the same, unlike Path's own order
    read = [file for file in found if file.is_file() and (file.name.endswith(ROWS) or is_text(file))]
    return read, sorted(set(found) - set(read), key=Path.as_posix)


# ---- documents: (category, text) ------------------------------------------------------------------------------------
def documents_of(
    rows: Iterable[tuple[str, dict]], category: int | Callable[[dict], int | None], clean: Callable[[str], str] = str
) -> Iterator[tuple[int, str]]:
    """(category, clean(text)) of every (place, row). `category`: a number, or a function of the row, which may return None to
    leave it out. Raises ValueError naming the place."""
    for place, row in rows:
        try:
            number, text = category(row) if callable(category) else category, row['text']
            if not isinstance(text, str | None):
                raise ValueError(f"column 'text' holds {type(text).__name__}, not text")
        except KeyError as missing:
            there = one_line(', '.join(map(str, row))) or 'none'
            raise ValueError(f'{place}: no column {missing} (there are: {there})') from None
        except ValueError as error:
            raise ValueError(f'{place}: {error}') from None
        if number is not None:
            yield number, clean(text or '')


def agnews_category(row: dict) -> int:
    label = str(row['label'])
    if label not in ('0', '1', '2', '3'):
        raise ValueError(f'label {label!r} is not 0 (World), 1 (Sports), 2 (Business) or 3 (Sci/Tech)')
    return int(label)


def slimpajama_category(row: dict) -> int | None:
    meta, known = row['meta'], CATEGORIES['slimpajama']
    try:
        meta = json.loads(meta) if isinstance(meta, str) else meta
        category = meta['redpajama_set_name'].removeprefix('RedPajama')
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("column 'meta' has no 'redpajama_set_name'") from None
    return known.index(category) if category in known else None


def clean_wiki40b(text: str) -> str:
    """Without Wiki-40B's structure markers, which would make the Dutch user easy; rows may be printed bytes, b'...'."""
    if text[:2] in ("b'", 'b"'):
        try:
            text = ast.literal_eval(text).decode()
        except (ValueError, SyntaxError):
            pass  # a text that merely begins like one
    return re.sub(r'\s*_START_(ARTICLE|SECTION|PARAGRAPH)_\s*', '\n\n', text).replace('_NEWLINE_', '\n')


# ---- the data sets: (categories, streams, where) --------------------------------------------------------------------

# (set, what a file's name in --source begins with; '*': anything): the same rows on the Hub, their category, what cleans them.
# fmt: off
HUB = {
    ('agnews', 'train'):     ('fancyzhx/ag_news', None, 'train', agnews_category, str),
    ('agnews', 'test'):      ('fancyzhx/ag_news', None, 'test', 4, str),
    ('multilingual', 'de'):  ('wikimedia/wikipedia', '20231101.de', 'train', 0, str),
    ('multilingual', 'nl'):  ('google/wiki40b', 'nl', 'train', 1, clean_wiki40b),
    ('multilingual', 'fr'):  ('wikimedia/wikipedia', '20231101.fr', 'train', 2, str),
    ('multilingual', 'it'):  ('wikimedia/wikipedia', '20231101.it', 'train', 3, str),
    ('slimpajama', 'train'): ('DKYoon/SlimPajama-6B', None, 'train', slimpajama_category, str),
    ('base', '*'):           ('wikimedia/wikipedia', '20231101.en', 'train', 0, str),
}
# fmt: on


def open_rows(options: dict, stems: Iterable[str]) -> tuple:
    """(streams, where) of HUB's rows, or of those in the files of these stems in --source, shuffled. Raises ValueError."""
    buffer = 120_000 if options['set'] == 'agnews' else BUFFER  # all train rows: Table 3 takes half of each category's
    streams, where = [], []
    for stem in stems:
        repository, config, split, category, clean = HUB[options['set'], stem]
        if options['source'] is None:
            names = [' '.join(filter(None, (repository, config)))]
            rows = hub_rows(repository, config, split, options['seed'], buffer)
        else:
            files = find_files(Path(options['source']), stem)
            if not files:
                raise ValueError(f'--source={options["source"]} holds no {stem}.jsonl, .jsonl.gz, .csv or .parquet')
            names = [file.name for file in files]
            rows = itertools.chain.from_iterable(map(file_rows, files))
            rows = shuffled(rows, buffer, np.random.default_rng(options['seed']))
        feeds = (category,) if isinstance(category, int) else range(4)
        streams.append((stem, documents_of(rows, category, clean), feeds))
        where += [name for name in names if name not in where]
    return streams, where


def open_agnews(options: dict) -> tuple:
    """Categories 0-3: train rows. 4, unless --alpha makes valid and test follow each user's topics: test rows, if any."""
    source = options['source']
    test = options['alpha'] is None and (source is None or Path(source).is_dir() and find_files(Path(source), 'test'))
    return list(CATEGORIES['agnews']), *open_rows(options, ('train', 'test') if test else ('train',))


def open_multilingual(options: dict) -> tuple:
    if options['source'] and not Path(options['source']).is_dir():
        raise ValueError('multilingual needs a folder as --source, with files de.*, nl.*, fr.* and it.*')
    languages = list(CATEGORIES['multilingual'])
    return languages, *open_rows(options, languages[: options['users'] if options['alpha'] is None else None])


def open_slimpajama(options: dict) -> tuple:
    return list(CATEGORIES['slimpajama']), *open_rows(options, ('train',))


def user_documents(files: list[Path], category: int, unit: str) -> Iterator[tuple[int, str]]:
    """(category, text) of a user's files; of those that are text each line, paragraph or file is a document (`unit`)."""
    return documents_of(itertools.chain.from_iterable(file_rows(file, unit) for file in files), category)


def unit_of(files: list[Path]) -> str:
    """What a document is in a user's text: of ten or more files a file, else a paragraph. Where that makes fewer documents than
    there are splits, and so none for one of them, the first smaller unit that makes enough."""
    units = ('file', 'paragraph', 'line')[sum(not file.name.endswith(ROWS) for file in files) < 10 :]
    for unit in units:
        found = set()
        for _, text in user_documents(files, 0, unit):
            found |= {hash(text.strip())} - {hash('')}
            if len(found) == len(SPLITS):
                return unit
    return units[0]


def open_local(options: dict) -> tuple:
    """One category per sub-folder of --source, or per file where there are only files. Prints what of a folder is not read."""
    users = [path for path in Path(options['source']).iterdir() if not path.name.startswith('.')]
    users.sort(key=lambda path: path.name)
    folders, formats = any(map(Path.is_dir, users)), ', '.join(FORMATS)
    for path in users:
        if folders and not path.is_dir():
            raise ValueError(f'{path} lies beside sub-folders, one per user: put it into one of them, or into one of its own')
        if not folders and not path.name.endswith(FORMATS):
            raise ValueError(f'{path} is no {formats}, one per user: put it into a sub-folder, where all text is read')
    where = [path.name for path in users]
    names = where if folders else [re.sub(r'\.(jsonl(\.gz)?|csv|parquet|txt)$', '', name) for name in where]
    if not names or len(names) > len(set(names)):
        there = ', '.join(where) or 'none'
        raise ValueError(f'--source={options["source"]} needs a folder or file per user, of different names (found: {there})')
    streams = []
    for i, name in enumerate(map(printable, names)):
        names[i] = name + '?' * next(n for n in itertools.count() if name + '?' * n not in names[:i])
    for i, (name, path) in enumerate(zip(names, users)):
        read, left = user_files(path) if folders else ([path], [])
        if left:
            kinds = sorted({f'{file.name}/' if file.is_dir() else file.suffix or file.name for file in left})
            n, kinds = f'{len(left)} of {len(read) + len(left)}', one_line(', '.join(kinds))
            print(f'{name}: {n} files are not read ({kinds}): not text in UTF-8, or links to folders')
        unit = unit_of(read)
        if unit == 'line':
            print(f'{name}: there are no blank lines between paragraphs: each line is a document')
        streams.append((name, user_documents(read, i, unit), (i,)))
    return names, streams, where


def installed_streams(texts: dict[str, list[str]], first: int) -> list[tuple]:
    """Streams of {category: documents}, counted from `first`."""
    return [(name, zip(itertools.repeat(i), some), (i,)) for i, (name, some) in enumerate(texts.items(), first)]


def open_demo(options: dict, asked: dict) -> tuple:
    """asked: per split the tokens of every user, which decide how much text there must be."""
    chars = np.array([*asked.values()]) * (1 if options['tokenizer'] == 'bytes' else 4)  # (splits, users), about
    few = chars.shape[1] <= MANY and chars.sum() < 4_000_000
    texts = demo_documents() if few else many_documents(int(chars.sum()), int(chars.min()), options['alpha'] is not None)
    return list(texts), installed_streams(texts, 0), [INSTALLED]


def open_base(options: dict) -> tuple:
    wikipedia, where = open_rows(options, ('*',))
    texts = base_documents([text for texts in demo_documents().values() for text in texts])
    return ['wikipedia', *texts], wikipedia + installed_streams(texts, 1), [*where, INSTALLED]
