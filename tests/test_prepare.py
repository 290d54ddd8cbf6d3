"""data/sources.py, data/prepare.py: what is written is what was read, once. Offline; the Hub: a fake, the library's streams."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SHARED

from data import prepare, sources
from data.stream import SPLITS, Texts, encoding, overlap, write_streams

LANGUAGES, SOURCES = ('de', 'nl', 'fr', 'it'), ('StackExchange', 'Github', 'ArXiv', 'Book')
SMALL = ['--train_tokens=1500', '--valid_tokens=400', '--test_tokens=400', '--tokenizer=bytes']


# ---- small data sets with the Hub's columns -------------------------------------------------------------------------


def documents(label, n=120):
    """n different documents, every one beginning with '<' and holding a two-byte character and a line break."""
    return [f'<{label}.{i}> wörds\nof {label}{"!" * (i % 7)}' for i in range(n)]


ROWS = {
    'agnews': {'train': [{'text': text, 'label': i % 4} for i, text in enumerate(documents('news', 400))]},
    'multilingual': {user: [{'text': text} for text in documents(user)] for user in LANGUAGES},
    'slimpajama': {
        'train': [
            {'text': text, 'meta': {'redpajama_set_name': f'RedPajama{name}'}}
            for several in zip(*map(documents, (*SOURCES, 'C4')))
            for name, text in zip((*SOURCES, 'C4'), several)
        ]
    },
}
OWN = {
    'agnews': [documents('news', 400)[i::4] for i in range(4)],
    'multilingual': list(map(documents, LANGUAGES)),
    'slimpajama': list(map(documents, SOURCES)),
}  # what user i may hold


def save(file, rows):
    if file.suffix == '.parquet':
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == '.csv':
        with open(file, 'w', encoding='utf-8', newline='') as out:
            writer = csv.DictWriter(out, rows[0])
            writer.writeheader()
            for row in rows:
                writer.writerow({key: json.dumps(value) if isinstance(value, dict) else value for key, value in row.items()})
    else:
        with (gzip.open if file.suffix == '.gz' else open)(file, 'wt', encoding='utf-8') as out:
            out.writelines(json.dumps(row) + '\n' for row in rows)


def source_of(name, folder, suffix='.jsonl.gz'):
    folder.mkdir(exist_ok=True)
    for stem, rows in ROWS[name].items():
        save(folder / f'{stem}{suffix}', rows)
    return folder


def find_vocabulary(monkeypatch):
    cache = SHARED / 'tiktoken_cache'
    if not os.environ.get('TIKTOKEN_CACHE_DIR') and not cache.exists():
        pytest.skip("GPT-2's vocabulary is not at hand (TIKTOKEN_CACHE_DIR)")
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', os.environ.get('TIKTOKEN_CACHE_DIR') or str(cache))


def run(*argv):
    """data/prepare.py's exit status."""
    try:
        prepare.main([str(argument) for argument in argv])
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(autouse=True)
def name_of_command(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['data/prepare.py'])


def read(folder, tokenizer='bytes'):
    """meta.json and {(user, split): its documents}, through the reader that training uses."""
    enc = encoding(tokenizer)
    written, found = Texts(folder, 8, enc.n_vocab), {}
    for i in range(len(written.names)):
        streams = written.of(i)
        assert written.meta['overlap'][i] == overlap(streams['train'], streams['valid'])
        for split in SPLITS:
            text = enc.decode_bytes(streams[split].tolist()).decode('utf-8', 'ignore')
            assert text.startswith('<')
            found[i, split] = ('\0' + text).replace(written.meta['separator'] + '<', '\0<').split('\0')[1:]
    return written.meta, found


def hashes(folder):
    return [user['sha256'] for user in json.loads((folder / 'meta.json').read_text())['users']]


def assert_disjoint(found):
    """No document, told by its beginning, in two users or two splits or twice in one."""
    heads = [text[: text.index('>')] for texts in found.values() for text in texts if '>' in text]
    assert heads and len(heads) == len(set(heads))


# ---- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.gz', '.csv', '.parquet'])
@pytest.mark.parametrize('name', ROWS)
def test_round_trip(name, suffix, tmp_path):
    """Whole documents of the right user, each once, joined by one space; only the last dealt ones are cut to the size."""
    assert run(name, '--source', source_of(name, tmp_path / 'in', suffix), '--out_root', tmp_path, *SMALL) == 0
    meta, found = read(tmp_path / name)
    assert (meta['dtype'], meta['separator'], meta['tokenizer'], meta['vocab_size']) == ('<u2', ' ', 'bytes', 257)
    assert [user['name'] for user in meta['users']] == list(sources.CATEGORIES[name])
    assert_disjoint(found)
    for (i, split), texts in found.items():
        mixed = name == 'agnews' and split != 'train'  # tomorrow's news: every topic for everybody
        known = sum(OWN[name], []) if mixed else OWN[name][i]
        cut = [text for text in texts if text not in known]
        assert len(cut) <= (5 if mixed else 2) < len(texts)
        assert all(any(whole.startswith(text.rstrip()) for whole in known) for text in cut)
        assert not mixed or all(set(texts) & set(own) for own in OWN[name])
        user = meta['users'][i]
        assert user['documents'][split] - len(texts) in (0, 1)  # the last may be cut to its separator
        assert user['tokens'][split] == user['bytes'][split] == (1500 if split == 'train' else 400)


def test_meta_names_no_place(tmp_path):
    """meta.json can be published: options and sources are there, this machine's folders are not."""
    run('agnews', '--source', source_of('agnews', tmp_path / 'in'), '--out_root', tmp_path, '--name=news', '--seed=7', *SMALL)
    meta, _ = read(tmp_path / 'news')
    assert (meta['name'], meta['seed'], meta['source']) == ('news', 7, ['train.jsonl.gz'])
    assert meta['options']['train_tokens'] == '1500' and meta['options']['set'] == 'agnews'
    assert str(tmp_path.parent) not in json.dumps(meta)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['in', 'news']


@pytest.mark.parametrize('separator', [' ', '\n\n'])
def test_gpt2_stream_is_the_joined_text(separator, monkeypatch):
    """Documents are tokenised one by one, yet the stream is exactly encode_ordinary(separator.join(documents))."""
    find_vocabulary(monkeypatch)
    enc = encoding('gpt2')
    texts = ["'s odd", 'Rojo Tracks', 'two\n\nlines', '...', '2 numbers 3', 'naïve 日本語', '<|endoftext|>', "don't", 'é']
    asked, shares = {split: [1000] for split in SPLITS}, {split: np.ones((1, 1)) for split in SPLITS}
    spool, kept = io.BytesIO(), []
    pools, _ = prepare.fill([('x', zip(itertools.repeat(0), texts), (0,))], ['x'], asked, shares, enc, separator, None, spool)
    for part in prepare.deal(pools, asked, shares, 0).values():
        tokens = np.concatenate(list(prepare.documents_in(spool, part, 1000, enc, separator)))
        joined = enc.decode(tokens.tolist())
        assert tokens.tolist() == enc.encode_ordinary(joined) and not joined.startswith(separator)
        kept.append(joined)
    assert sorted(map(len, kept)) and sum(map(len, kept)) == len(separator.join(texts)) - 2 * len(separator)
    assert all(any(text in part for part in kept) for text in texts)


@pytest.mark.parametrize('name', ['bytes', 'gpt2'])
def test_tokens_of_many_texts_are_those_of_each(name, monkeypatch):
    """encode_all against tiktoken's plain encode_ordinary, in order, for more texts than tasks and for fewer."""
    if name == 'gpt2':
        find_vocabulary(monkeypatch)
    enc = encoding(name)
    texts = ['', 'é', '<|endoftext|>', ' a\r\n\tb', '日本', '\0', *documents('x', 37), 'long ' * 5000]
    for some in ([], texts[1:2], texts):
        tokens = prepare.encode_all(enc, some)
        assert [ids.tolist() for ids in tokens] == [enc.encode_ordinary(text) for text in some]
        assert all(ids.dtype == np.dtype('<u2') for ids in tokens)


def test_sizes_per_user(tmp_path, capsys):
    """N,N,N,N is one size per user, in order; the paper's Table 3 is printed beside them."""
    source = source_of('multilingual', tmp_path / 'in')
    sizes = ['--train_tokens=100,200,300,400', '--valid_tokens=50', '--test_tokens=60', '--tokenizer=bytes']
    run('multilingual', '--source', source, '--out_root', tmp_path, *sizes)
    meta, _ = read(tmp_path / 'multilingual')
    assert [list(user['tokens'].values()) for user in meta['users']] == [[n, 50, 60] for n in (100, 200, 300, 400)]
    out = capsys.readouterr().out
    assert '557,662 / 300,764 / 229,720' in out and '451,584 / 165,984 / 172,547' in out and 'fewer' not in out


def test_too_little_text_is_said(tmp_path, capsys):
    """With less text than asked every split shrinks alike, and every user's row says so."""
    asked = ['--train_tokens=8000', '--valid_tokens=1000', '--test_tokens=1000', '--tokenizer=bytes']
    assert run('multilingual', '--source', source_of('multilingual', tmp_path / 'in'), '--out_root', tmp_path, *asked) == 0
    meta, found = read(tmp_path / 'multilingual')
    out = capsys.readouterr().out
    assert '4 of 4 users have fewer tokens than asked; there is no more text (de: ' in out
    for i, user in enumerate(meta['users']):
        n = user['tokens']
        assert re.search(rf'^{i} +{user["name"]} .* {n["train"]:,} of 8,000 +{n["valid"]:,} of 1,000 ', out, re.M)
        assert 0.07 < n['valid'] / sum(n.values()) < 0.14 and 0.07 < n['test'] / sum(n.values()) < 0.14
        assert sum(len(found[i, split]) for split in SPLITS) == 120  # nothing is wasted
    assert_disjoint(found)


def test_duplicates_and_empty_documents(tmp_path):
    """Empty rows go; a text that occurs again, in whatever user's file, is kept once."""
    folder = source_of('multilingual', tmp_path / 'in', '.jsonl')
    for user in LANGUAGES:
        odd = ['', '   ', None, '  <shared.0> the same everywhere \n', f'<{user}.half> a pair \ud83d']
        save(folder / f'{user}.jsonl', [{'text': text} for text in (*odd, *documents(user, 20) * 2)])
    run('multilingual', '--source', folder, '--out_root', tmp_path, *SMALL)
    _, found = read(tmp_path / 'multilingual')
    assert_disjoint(found)
    assert sum(map(len, found.values())) == 4 * (20 + 1) + 1
    assert sum(' a pair ?' in text for texts in found.values() for text in texts) == 4  # half a character: replaced
    assert sum('<shared.0> the same everywhere' in texts for texts in found.values()) == 1


def test_seed(tmp_path):
    folder = source_of('slimpajama', tmp_path / 'in')
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        assert run('slimpajama', '--source', folder, '--out_root', tmp_path, '--name', name, '--seed', seed, *SMALL) == 0
    assert hashes(tmp_path / 'a') == hashes(tmp_path / 'b')
    assert all(a[split] != c[split] for a, c in zip(hashes(tmp_path / 'a'), hashes(tmp_path / 'c')) for split in SPLITS)


def test_shuffling_and_dealing_follow_the_seed():
    rows = [{'text': str(i)} for i in range(100)]
    orders = [[int(row['text']) for row in sources.shuffled(iter(rows), 10, np.random.default_rng(seed))] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == list(range(100)) != orders[0]
    assert all(row - place <= 10 for place, row in enumerate(orders[0]))  # no more than the buffer is read ahead
    asked, shares = {split: [10] for split in SPLITS}, {split: np.ones((1, 1)) for split in SPLITS}
    pools = [np.array([(10 * i, 5) for i in range(20)])]  # documents of 5 tokens
    dealt = [prepare.deal(pools, asked, shares, seed)[0, 'train'].tolist() for seed in (1, 1, 2)]
    assert dealt[0] == dealt[1] != dealt[2]


def test_agnews_test_rows(tmp_path):
    """With a test file, valid and test are parts of it, and train rows go to train only. Labels of csv are text."""
    folder = source_of('agnews', tmp_path / 'in', '.csv')
    save(folder / 'test.jsonl', [{'text': text, 'label': 0} for text in documents('later', 200)])
    run('agnews', '--source', folder, '--out_root', tmp_path, *SMALL)
    meta, found = read(tmp_path / 'agnews')
    assert meta['source'] == ['train.csv', 'test.jsonl']
    assert_disjoint(found)
    for (_, split), texts in found.items():
        assert all(text.startswith('<news.' if split == 'train' else '<later.') for text in texts if '>' in text)


def test_wiki40b_markers():
    text = '\n_START_ARTICLE_\nRembrandt\n_START_SECTION_\nLeven\n_START_PARAGRAPH_\nHij was één._NEWLINE_Hij.'
    clean = 'Rembrandt\n\nLeven\n\nHij was één.\nHij.'
    assert sources.clean_wiki40b(text).strip() == sources.clean_wiki40b(repr(text.encode())).strip() == clean
    assert sources.clean_wiki40b("b'aan is geen bytes") == "b'aan is geen bytes"


def test_long_documents_are_cut_before_splitting(tmp_path, capsys):
    """A book's rest is dropped, not dealt to another split; the run says how many were cut."""
    rows = [
        {'text': f'<{name}.{i}> ' + 'word ' * 200, 'meta': json.dumps({'redpajama_set_name': f'RedPajama{name}'})}
        for i in range(8)
        for name in SOURCES
    ]
    (tmp_path / 'in').mkdir()
    save(tmp_path / 'in' / 'train-00000-of-00001.parquet', rows)
    run('slimpajama', '--source', tmp_path / 'in', '--out_root', tmp_path, '--max_chars=120', *SMALL)
    _, found = read(tmp_path / 'slimpajama')
    assert '32 documents longer than 120 characters' in capsys.readouterr().out
    assert max(len(text) for texts in found.values() for text in texts) <= 120
    assert_disjoint(found)


def test_dirichlet(tmp_path):
    """More users than categories: shares of each category, other ones per seed, alike in a user's three splits."""
    folder = source_of('multilingual', tmp_path / 'in')
    size = ['--train_tokens=500', '--valid_tokens=200', '--test_tokens=200', '--tokenizer=bytes', '--users=6', '--alpha=0.5']
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        assert run('multilingual', '--source', folder, '--out_root', tmp_path, '--name', name, '--seed', seed, *size) == 0
    assert hashes(tmp_path / 'a') == hashes(tmp_path / 'b') != hashes(tmp_path / 'c')
    meta, found = read(tmp_path / 'a')
    assert len(meta['users']) == 6 and all(user['tokens']['train'] == 500 for user in meta['users'])
    assert_disjoint(found)
    shares = prepare.make_shares({'seed': 1, 'alpha': 0.5, 'set': 'multilingual'}, 6, 4, 4)['train']
    np.testing.assert_allclose(shares.sum(1), 1)
    for (i, split), texts in found.items():
        held = [sum(len(text.encode()) for text in texts if text.startswith(f'<{user}.')) for user in LANGUAGES]
        size = 500 if split == 'train' else 200
        np.testing.assert_allclose(np.array(held) / size, shares[i], atol=40 / size)  # within one cut document
        assert f'{shares[i].max():.0%} {LANGUAGES[shares[i].argmax()]}' in meta['users'][i]['name']


@pytest.mark.parametrize('alpha', [1e-6, 1e6])
def test_dirichlet_extremes_end(alpha, tmp_path):
    """One category each, or all alike, and too little text for many users: it ends, disjoint all the same."""
    folder = source_of('multilingual', tmp_path / 'in')
    assert run('multilingual', '--source', folder, '--out_root', tmp_path, '--users=12', f'--alpha={alpha}', *SMALL) == 0
    assert_disjoint(read(tmp_path / 'multilingual')[1])


def test_three_hundred_users(tmp_path, capsys):
    """Every user its own documents, its shares met, a name and the tokens asked; the report is a summary."""
    rows = [{'text': text, 'label': i % 4} for i, text in enumerate(documents('news', 12_000))]
    (tmp_path / 'in').mkdir()
    save(tmp_path / 'in' / 'train.jsonl', rows)
    size = ['--train_tokens=400', '--valid_tokens=100', '--test_tokens=100', '--tokenizer=bytes', '--users=300', '--alpha=0.3']
    assert run('agnews', '--source', tmp_path / 'in', '--out_root', tmp_path, *size) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 11 and 'fewer' not in out
    assert re.search(r'median of 300 users( +\d+){3} +400 +100 +100\n', out)
    meta, found = read(tmp_path / 'agnews')
    assert_disjoint(found)
    shares = prepare.make_shares({'seed': 42, 'alpha': 0.3, 'set': 'agnews'}, 300, 4, 4)['train']
    label = {f'<news.{i}>': i % 4 for i in range(len(rows))}
    errors = []  # tokens
    for (i, split), texts in found.items():
        size = 400 if split == 'train' else 100
        whole = [text for text in texts if '>' in text]
        labels, lengths = [label[text[: text.index('>') + 1]] for text in whole], [len(text.encode()) + 1 for text in whole]
        held = np.bincount(labels, lengths, 4)
        errors.append(np.abs(held / size - shares[i]).max() * size)
        assert meta['users'][i]['tokens'][split] == size
        assert f'{shares[i].max():.0%} {sources.CATEGORIES["agnews"][shares[i].argmax()]}' in meta['users'][i]['name']
    assert np.mean(errors) < 28 and max(errors) < 56  # a document has 28 tokens, and the last one is cut


def test_no_crumbs_where_documents_are_few():
    """As many documents as pieces: the shares stay. Fewer: the smallest parts go to a user's others, and no split is empty."""
    asked, own = {split: [100, 100] for split in SPLITS}, np.array([[0.5, 0.49, 0.01], [0.04, 0.06, 0.9]])
    shares = dict.fromkeys(SPLITS, own)
    assert prepare.without_crumbs(asked, shares, [6, 6, 6]) is shares
    first = [50 / 99, 49 / 99, 0]
    for n, expected in (
        ([6, 6, 5], [first, own[1]]),
        ([5, 6, 6], [first, [0, 6 / 96, 90 / 96]]),
        ([6, 3, 6], [first, [0, 0, 1]]),
        ([0, 0, 0], [first, [0, 0, 1]]),
    ):
        for split in SPLITS:
            np.testing.assert_allclose(prepare.without_crumbs(asked, shares, n)[split], expected)
    pools = [np.array([(i, 300)] * n) for i, n in enumerate((3, 3, 3))]  # 9 documents for 6 splits of 2 users
    parts = prepare.deal(pools, asked, shares, 0)
    assert {key: part[:, 1].sum() > 40 for key, part in parts.items()} == dict.fromkeys(parts, True)


def test_memory_does_not_grow_with_the_source(tmp_path):
    """Four times the text, cut nowhere: the tokens wait in a file, of which nothing is left; memory is a batch of text."""

    def peak(n):
        (tmp_path / str(n)).mkdir()
        with open(tmp_path / str(n) / 'a.txt', 'w', encoding='utf-8') as file:
            file.writelines(f'<{i}> {"some words " * 400}\n\n' for i in range(n))
        tracemalloc.start()
        assert run('local', '--source', tmp_path / str(n), '--out_root', tmp_path, f'--name=out{n}', '--tokenizer=bytes') == 0
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    small, large = peak(600), peak(2400)  # 2.6 and 10.6 MB, twice as much as tokens
    assert 2_000_000 < small and large < small + 1800 * 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ['2400', '600', 'out2400', 'out600']
    assert sum(sum(user['tokens'].values()) for user in read(tmp_path / 'out2400')[0]['users']) > 2400 * 4400


# ---- local, demo, base ----------------------------------------------------------------------------------------------


def test_local(tmp_path):
    """One user per file, sorted by name; 80/10/10 of each; paragraphs of a .txt are documents."""
    folder = tmp_path / 'in'
    folder.mkdir()
    (folder / 'notes.txt').write_text('\r\n \r\n'.join(documents('notes', 50)), encoding='utf-8', newline='')
    save(folder / 'chats.jsonl', [{'text': text, 'other': 1} for text in documents('chats', 50)])
    save(folder / 'v1.2.jsonl.gz', [{'text': text} for text in documents('v1.2', 50)])
    assert run('local', '--source', folder, '--out_root', tmp_path, '--tokenizer=bytes', '--name=mine') == 0
    meta, found = read(tmp_path / 'mine')
    assert [user['name'] for user in meta['users']] == ['chats', 'notes', 'v1.2'] and meta['separator'] == '\n\n'
    assert_disjoint(found)
    for i, user in enumerate(meta['users']):
        assert set(found[i, 'train'] + found[i, 'valid'] + found[i, 'test']) == set(documents(user['name'], 50))  # uncut
        assert 0.08 < user['tokens']['valid'] / sum(user['tokens'].values()) < 0.14
        assert user['documents'] == {split: len(found[i, split]) for split in SPLITS}


NAMES = [f'{folder}{i}{suffix}' for i in range(4) for folder in ('', 'a/', 'a/b c/') for suffix in ('.md', '.py', '', '.TXT')]


def test_local_reads_all_text_of_a_folder(tmp_path, capsys):
    """Of whatever suffix and depth; a file is a document, BOM or not, a .jsonl row is one; hidden and empty ones are none."""
    for user in ('ann', 'ben'):
        texts = [f'{text}\n\nsecond paragraph\n' for text in documents(user, len(NAMES))]
        place(tmp_path / 'in' / user, dict(zip(NAMES, texts)))
        save(tmp_path / 'in' / user / 'a' / 'rows.jsonl', [{'text': text} for text in documents(f'{user} row', 20)])
    odd = {'bom.html': '\ufeff<bom>', '.x': 'z', '.git/x': 'z', 'a/.git/y': 'z', 'empty.py': ''}
    place(tmp_path / 'in' / 'ann', odd)
    assert run('local', '--source', tmp_path / 'in', '--out_root', tmp_path, '--tokenizer=bytes', '--name=mine') == 0
    meta, found = read(tmp_path / 'mine')
    for i, user in enumerate(('ann', 'ben')):
        whole = {text + '\n\nsecond paragraph' for text in documents(user, len(NAMES))} | set(documents(f'{user} row', 20))
        whole |= {'<bom>'} if user == 'ann' else set()
        assert set(found[i, 'train'] + found[i, 'valid'] + found[i, 'test']) == whole
        assert sum(meta['users'][i]['documents'].values()) == len(whole)
    assert 'not read' not in capsys.readouterr().out


def test_local_is_the_same_whatever_the_order_on_disk(tmp_path, monkeypatch):
    """Files are taken by their path with slashes, compared character by character: a-b before a/ and Z before a."""
    names, walk, iterdir = [*NAMES, 'a-b', 'Z', 'a.md', 'é'], os.walk, Path.iterdir
    texts = dict(zip(names, documents('x', len(names))))
    place(tmp_path / '1' / 'ann', texts)
    place(tmp_path / '2' / 'ann', dict(reversed(texts.items())))
    assert run('local', '--source', tmp_path / '1', '--out_root', tmp_path, '--tokenizer=bytes', '--name=one') == 0

    def other(*args, **options):
        for parent, folders, files in walk(*args, **options):
            folders.sort(reverse=True)
            yield parent, folders, sorted(files, reverse=True)

    monkeypatch.setattr(os, 'walk', other)
    monkeypatch.setattr(Path, 'iterdir', lambda path: sorted(iterdir(path), reverse=True))
    assert run('local', '--source', tmp_path / '2', '--out_root', tmp_path, '--tokenizer=bytes', '--name=two') == 0
    assert hashes(tmp_path / 'one') == hashes(tmp_path / 'two')
    read = [file.relative_to(tmp_path / '2' / 'ann').as_posix() for file in sources.user_files(tmp_path / '2' / 'ann')[0]]
    assert sorted(read) == read and set(read) == set(names)
    with pytest.raises(OSError, match='nowhere'):  # not passed over, as os.walk does
        sources.user_files(tmp_path / 'nowhere')


def test_local_cuts_few_files_into_paragraphs(tmp_path):
    """Nine texts, of any kind: their paragraphs are documents; with a tenth, each file is."""
    for n in (9, 10):
        names = [f'{i}{".md" if i % 2 else ".txt"}' for i in range(n)]
        place(tmp_path / str(n) / 'ann', dict(zip(names, ['<1>\n\n<2>', *documents('x', n - 1)])))
        documents_of_ann = [text.strip() for _, text in sources.open_local({'source': tmp_path / str(n)})[1][0][1]]
        assert documents_of_ann[: 11 - n] == (['<1>', '<2>'] if n == 9 else ['<1>\n\n<2>'])
        assert len(documents_of_ann) == 10


def test_local_says_what_it_does_not_read(tmp_path, capsys):
    """What is no UTF-8 text is left out: one line a user. Links to folders are not followed, so a loop ends."""
    for user in ('ann', 'ben'):
        place(tmp_path / 'in' / user, dict(zip(NAMES, documents(user, len(NAMES)))))
    ann, late = tmp_path / 'in' / 'ann', b'<never> ' * 2**18 + b'\xff'  # not UTF-8, only after two million bytes of it
    odd = {'a/photo.jpg': b'\xff\xd8\xff\xe0 never read', 'latin.txt': '<never> read: wörds'.encode('latin1')}
    place(ann, odd | {'zero.bin': b'<never> read\0', 'late': late, '.hidden.jpg': b'\xff'})
    (ann / 'a' / 'loop').symlink_to(ann)
    (ann / 'self.md').symlink_to('self.md')
    (ann / 'link.md').symlink_to(ann / NAMES[0])
    os.mkfifo(ann / 'pipe')
    assert run('local', '--source', tmp_path / 'in', '--out_root', tmp_path, '--tokenizer=bytes', '--name=mine') == 0
    lines = capsys.readouterr().out.splitlines()
    n = len(NAMES) + 1
    assert lines[0].startswith(f'ann: 7 of {n + 7} files are not read (.bin, .jpg, .md, .txt, late, loop/, pipe): ')
    assert not any(line.startswith('ben:') for line in lines)
    _, found = read(tmp_path / 'mine')
    assert set(sum(found.values(), [])) == {*documents('ann', len(NAMES)), *documents('ben', len(NAMES))}


def test_local_sizes_users_and_mixing(tmp_path):
    """Fractions and sizes go together, --users takes the first, --alpha deals all of the text among more users."""
    for name in LANGUAGES:
        (tmp_path / 'in' / name).mkdir(parents=True)
        (tmp_path / 'in' / name / 'few.txt').write_text('\n\n'.join(documents(name)), encoding='utf-8')
    common = ['local', '--source', tmp_path / 'in', '--out_root', tmp_path, '--tokenizer=bytes']
    assert run(*common, '--users=2', '--name=two', '--train_tokens=200,300') == 0
    assert [user['tokens']['train'] for user in read(tmp_path / 'two')[0]['users']] == [200, 300]
    assert run(*common, '--users=5', '--alpha=10', '--name=five') == 0
    _, found = read(tmp_path / 'five')
    assert_disjoint(found)
    assert set(sum(found.values(), [])) == {text for name in LANGUAGES for text in documents(name)}


def test_demo_and_base(tmp_path, monkeypatch):
    """demo: the installed users, its sizes, more users. base: Wikipedia and the installed text that demo leaves."""
    users = {name: documents(name) for name in ('one', 'two')}
    monkeypatch.setattr(sources, 'demo_documents', lambda: users)
    monkeypatch.setattr(sources, 'many_documents', lambda *asked: {'three': documents(f'three-{asked}', 4000)})
    code = {'code': documents('code', 300)}
    monkeypatch.setattr(sources, 'base_documents', lambda exclude: code if exclude == sum(users.values(), []) else {})
    monkeypatch.setitem(prepare.SETS['demo'], 'tokens', ((500, 200, 300), (700, 200, 300)))
    assert run('demo', '--out_root', tmp_path) == 0
    meta, found = read(tmp_path / 'demo')
    assert [list(user['tokens'].values()) for user in meta['users']] == [[500, 200, 300], [700, 200, 300]]
    assert all(text[1:4] == ('one', 'two')[i] for (i, _), texts in found.items() for text in texts if len(text) > 4)
    assert run('demo', '--out_root', tmp_path, '--name=many', '--users=40', '--alpha=1') == 0
    meta, found = read(tmp_path / 'many')
    assert len(meta['users']) == 40 and found[39, 'test'][0].startswith(f'<three-{20 * 1200 + 20 * 1000, 200, True}.')
    save(tmp_path / 'wiki.jsonl.gz', [{'text': text} for text in documents('wiki', 500)])
    assert run('base', '--source', tmp_path / 'wiki.jsonl.gz', '--out_root', tmp_path) == 0
    meta, found = read(tmp_path / 'base')
    assert [user['name'] for user in meta['users']] == ['wikipedia', 'code'] and meta['tokenizer'] == 'bytes'
    assert [sum(user['documents'].values()) for user in meta['users']] == [500, 300]
    assert 0.975 < meta['users'][0]['tokens']['train'] / sum(meta['users'][0]['tokens'].values()) < 0.985
    assert run('base', '--source', tmp_path / 'wiki.jsonl.gz', '--out_root', tmp_path, '--name=b', '--train_tokens=4900') == 0
    users = read(tmp_path / 'b')[0]['users']
    assert users[0]['tokens'] == {'train': 4900, 'valid': 50, 'test': 50} and sum(users[1]['documents'].values()) == 300


# ---- the Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A fake datasets.load_dataset: set `hub.rows[repository, config, split]`; `hub.asked` lists what was asked."""
    import datasets

    def load_dataset(path, name=None, *, split=None, streaming=False):
        assert streaming
        fake.asked.append((path, name, split))
        return datasets.IterableDataset.from_generator(fake.rows[path, name, split])

    fake = ModuleType('hub')
    fake.rows, fake.asked = {}, []
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    monkeypatch.setattr(sources, 'BUFFER', 200)
    return fake


def endless(rows):
    """The rows, then other ones for ever: a stream of a size that no machine holds."""
    for i in itertools.count():
        yield from ({**row, 'text': f'{row["text"]} {"again " * 2000}{i}'} if i else row for row in rows)


def test_hub_agnews(hub, tmp_path):
    hub.rows = {
        ('fancyzhx/ag_news', None, 'train'): lambda: iter(ROWS['agnews']['train']),
        ('fancyzhx/ag_news', None, 'test'): lambda: ({'text': text, 'label': 1} for text in documents('later', 200)),
    }
    assert run('agnews', '--out_root', tmp_path, *SMALL) == 0
    meta, found = read(tmp_path / 'agnews')
    assert hub.asked == list(hub.rows) and meta['source'] == ['fancyzhx/ag_news']
    assert_disjoint(found)
    assert 'news' not in str([found[i, split] for i in range(4) for split in ('valid', 'test')])


def test_hub_multilingual(hub, tmp_path):
    """Three Wikipedias and Wiki-40B, each read no further than needed, the Dutch markers stripped."""
    dutch = [{'text': f'\n_START_ARTICLE_\n{text}\n_START_PARAGRAPH_\nzin_NEWLINE_einde'} for text in documents('nl')]
    for user in ('de', 'fr', 'it'):
        hub.rows['wikimedia/wikipedia', f'20231101.{user}', 'train'] = lambda user=user: endless(ROWS['multilingual'][user])
    hub.rows['google/wiki40b', 'nl', 'train'] = lambda: endless(dutch)
    assert run('multilingual', '--out_root', tmp_path, *SMALL) == 0
    meta, found = read(tmp_path / 'multilingual')
    assert meta['source'] == [
        'wikimedia/wikipedia 20231101.de',
        'google/wiki40b nl',
        'wikimedia/wikipedia 20231101.fr',
        'wikimedia/wikipedia 20231101.it',
    ]
    assert [user['name'] for user in meta['users']] == ['de', 'nl', 'fr', 'it']
    assert '_START' not in str(found) and '_NEWLINE_' not in str(found)
    assert any('\n\nzin\neinde' in text for text in found[1, 'train'])
    assert sorted(hub.asked) == sorted(hub.rows)


def test_hub_slimpajama_stops(hub, tmp_path):
    """The stream has no end; reading ends as soon as the rarest category is full."""
    hub.rows['DKYoon/SlimPajama-6B', None, 'train'] = lambda: endless(ROWS['slimpajama']['train'])
    assert run('slimpajama', '--out_root', tmp_path, *SMALL) == 0
    meta, found = read(tmp_path / 'slimpajama')
    assert meta['source'] == ['DKYoon/SlimPajama-6B'] and len(found) == 12


def test_hub_base(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'demo_documents', dict)
    monkeypatch.setattr(sources, 'base_documents', lambda exclude: {})
    hub.rows['wikimedia/wikipedia', '20231101.en', 'train'] = lambda: endless(ROWS['multilingual']['de'])
    assert run('base', '--out_root', tmp_path, '--train_tokens=9800') == 0
    assert read(tmp_path / 'base')[0]['users'][0]['tokens'] == {'train': 9800, 'valid': 100, 'test': 100}


@pytest.mark.parametrize('moment', ['open', 'read'])
def test_hub_unreachable(moment, hub, tmp_path, capsys):
    def rows():
        yield from ROWS['agnews']['train']
        raise RuntimeError('peer closed\nthe connection')

    if moment == 'read':
        hub.rows['fancyzhx/ag_news', None, 'train'] = rows
    assert run('agnews', '--out_root', tmp_path / 'out', *SMALL) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'fancyzhx/ag_news' in err and '--source=PATH' in err
    assert not (tmp_path / 'out').exists()


# ---- bad input, interruption ----------------------------------------------------------------------------------------


def place(folder, files):
    """Files of a source: rows, text or bytes; the rows of agnews if None, cut in the middle."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str | bytes):
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        else:
            save(file, ROWS['agnews']['train'] if content is None else content)
        if content is None:
            raw = file.read_bytes()
            file.write_bytes(raw[: len(raw) // 2 - 9])


TWELVE = '\n\n'.join(documents('same', 12))
COPIES = '\n\n'.join([*documents('same', 2), '<mine>'])

# what is wrong: (arguments, words of the message, files of the source: agnews' own if not given)
# fmt: off
BAD = {
    'unknown set': ('weather', 'invalid choice'),
    'unknown option': ('agnews --tokens=3', '--tokens=3'),
    'not a number': ('agnews --users=two', "'two'"),
    'no source': ('agnews --source=IN/nowhere', 'does not exist'),
    'empty source': ('slimpajama --source=IN', 'train.jsonl', {}),
    'other format': ('agnews --source=IN/a.doc', '.jsonl', {'a.doc': 'x'}),
    'language missing': ('multilingual --source=IN', 'de.jsonl', {'nl.csv': [{'text': 'x'}]}),
    'languages in a file': ('multilingual --source=IN/a.jsonl', 'folder', {'a.jsonl': [{}]}),
    'no text column': ('agnews --source=IN', "'text' (there are: body, label)", {'train.parquet': [{'body': 'x', 'label': 0}]}),
    'no label column': ('agnews --source=IN', "'label'", {'train.csv': [{'text': 'x'}]}),
    'unknown label': ('agnews --source=IN', "'7'", {'train.csv': [{'text': 'x', 'label': 7}]}),
    'text is no text': ('agnews --source=IN', 'list', {'train.jsonl': [{'text': [], 'label': 0}]}),
    'no meta column': ('slimpajama --source=IN', "'meta'", {'train.jsonl': [{'text': 'x'}]}),
    'odd meta': ('slimpajama --source=IN', 'redpajama_set_name', {'train.jsonl': [{'text': 'x', 'meta': 'Book'}]}),
    'category without rows': ('agnews --source=IN', 'no documents of Sports',
                              {'train.jsonl': [{'text': str(i), 'label': 0} for i in range(9)]}),
    'no rows': ('agnews --source=IN', 'no documents', {'train.jsonl': []}),
    'too few documents': ('agnews --source=IN', 'empty', {'train.jsonl': ROWS['agnews']['train'][:8]}),
    'truncated gzip': ('agnews --source=IN', 'train.jsonl.gz', {'train.jsonl.gz': None}),
    'truncated parquet': ('agnews --source=IN', 'train.parquet', {'train.parquet': None}),
    'truncated json': ('agnews --source=IN', 'train.jsonl', {'train.jsonl': None}),
    'not gzip': ('agnews --source=IN', 'train.jsonl.gz', {'train.jsonl.gz': 'text'}),
    'not UTF-8': ('local --source=IN', 'a.txt', {'a.txt': b'\xff\xfe\xfd'}),
    'not an object': ('agnews --source=IN', 'not a JSON object', {'train.jsonl': '[1]\n'}),
    'sizes of 3 users': ('agnews --source=IN --valid_tokens=9,9,9', '--valid_tokens=9,9,9'),
    'size is no number': ('agnews --source=IN --train_tokens=1e6', '--train_tokens=1e6'),
    'size of zero': ('agnews --source=IN --test_tokens=9,9,9,0', '--test_tokens'),
    'negative size': ('agnews --source=IN --test_tokens=-5', '--test_tokens'),
    'no alpha': ('agnews --source=IN --users=5', '--alpha'),
    'alpha of zero': ('agnews --source=IN --users=5 --alpha=0', '--alpha'),
    'alpha is nan': ('agnews --source=IN --alpha=nan', '--alpha'),
    'no users': ('agnews --source=IN --users=0', '--users'),
    'negative seed': ('agnews --source=IN --seed=-1', '--seed'),
    'name with a slash': ('agnews --source=IN --name=../x', '--name'),
    'local without source': ('local', '--source'),
    'local without users': ('local --source=IN', 'found: none', {}),
    'local twice the same': ('local --source=IN', 'a.csv, a.txt', {'a.txt': 'x', 'a.csv': 'x'}),
    'local beside folders': ('local --source=IN', 'in/notes.txt lies beside sub-folders', {'ann/a': 'x', 'notes.txt': 'x'}),
    'local of another format': ('local --source=IN', 'in/b.md is no .jsonl', {'a.txt': 'x', 'b.md': 'x'}),
    'local deep json': ('local --source=IN', 'in/ann/old/a.jsonl, line 1 cannot be read', {'ann/old/a.jsonl': '{\n'}),
    'local deep column': ('local --source=IN', "old/a.csv, line 2: no column 'text' (there are: x)", {'ann/old/a.csv': 'x\n1'}),
    'local without text': ('local --source=IN', 'no documents of ann', {'ann/empty.md': ''}),
    'copies of another user': ('local --source=IN', 'no documents of ben: there are only 6 copies of documents of ann',
                               {'ann/a.txt': TWELVE, 'ben/b.txt': '\n\n'.join(TWELVE.split('\n\n')[:6])}),
    'nearly all copies': ('local --source=IN', 'beside 2 copies of documents of ann',
                          {'ann/a.txt': TWELVE, 'ben/b.txt': COPIES}),
    'demo with source': ('demo --source=IN', '--source'),
}
# fmt: on


@pytest.mark.parametrize('case', BAD)
def test_bad_input(case, tmp_path, capsys):
    """One line on stderr that names the culprit, exit status 2, nothing written."""
    arguments, words, *files = BAD[case]
    (tmp_path / 'in').mkdir()
    place(tmp_path / 'in', files[0]) if files else source_of('agnews', tmp_path / 'in')
    arguments = [argument.replace('=IN', f'={tmp_path / "in"}') for argument in arguments.split()]
    assert run('--out_root', tmp_path / 'out', '--tokenizer=bytes', *arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith('prepare.py: ') and err.count('\n') == 1 and err.endswith('\n') and words in err and not out
    assert not (tmp_path / 'out').exists()


LINES = [json.dumps({'text': f'<{i}> text', 'label': 0}) for i in range(9)]
ROWS_OF_WHICH_ONE_IS_WRONG = {  # (file, content, words)
    'json cut': ('a.jsonl', '\n'.join(LINES)[:-9], 'a.jsonl, line 9 cannot be read'),
    'json after a blank line': ('a.jsonl', '{"text": "x"}\r\n\r\n{"text" 1}', 'a.jsonl, line 3 cannot be read'),
    'json without the key': ('a.jsonl', '{"text": "x"}\n{"body": "x"}', "a.jsonl, line 2: no column 'text' (there are: body)"),
    'json of a wrong type': ('a.jsonl', '{"text": "x"}\n{"text": 3}', "a.jsonl, line 2: column 'text' holds int"),
    'json list': ('a.jsonl', '{"text": "x"}\n[1]', 'a.jsonl, line 2 cannot be read (ValueError: it is not a JSON object'),
    'parquet of a wrong type': ('a.parquet', [{'text': 3}], "a.parquet, row 1: column 'text' holds int"),
    'comma': ('a.csv', 'label,text\n1,a\n\n2,"b,\nc"\n3,d, e\n', 'a.csv, line 6 cannot be read (ValueError: 3 fields, but the'),
    'comma, one column': ('a.csv', 'text\na\nb, c\n', 'a.csv, line 3 cannot be read (ValueError: 2 fields'),
    'too few': ('a.csv', '\ufefftext,label\r\na,1\r\nb\r\n', 'a.csv, line 3 cannot be read (ValueError: 1 fields'),
    'twice': ('a.csv', 'text,label,text\na,1,b\n', 'a.csv, line 1 cannot be read (ValueError: two columns of the name text'),
    'open quote': ('a.csv', 'label,text\n1,a\n2,"b\n3,c\n4,d\n', 'a.csv, line 3 cannot be read (Error: unexpected end of data'),
    'quote in quotes': ('a.csv', 'label,text\n1,"a" b\n2,"c"\n', 'a.csv, line 2 cannot be read (Error'),
}


@pytest.mark.parametrize('case', ROWS_OF_WHICH_ONE_IS_WRONG)
def test_a_wrong_row_is_told_by_its_line(case, tmp_path):
    """Where it begins, for every reader; nothing of it is lost in silence."""
    name, content, words = ROWS_OF_WHICH_ONE_IS_WRONG[case]
    place(tmp_path, {name: content})
    with pytest.raises(ValueError, match=re.escape(words)):
        list(sources.documents_of(sources.file_rows(tmp_path / name), 0))


def test_good_csv_is_read_whole(tmp_path):
    """Commas, quotes and line ends within quotes, blank lines, blank columns at the end."""
    place(tmp_path, {'a.csv': '\ufefflabel,text,,\r\n1,"a, ""b""\r\nc",,\r\n\r\n2,he said "hi",,\r\n'})
    rows = [row for _, row in sources.file_rows(tmp_path / 'a.csv')]
    assert [(row['label'], row['text']) for row in rows] == [('1', 'a, "b"\r\nc'), ('2', 'he said "hi"')]


def test_text_is_clean_whatever_it_came_in(tmp_path):
    """A byte order mark, CR LF and CR: gone from every format, so that the same text is a copy."""
    text, few = '<x> one\ntwo\nthree', documents('x', 9)
    odd = '\ufeff' + text.replace('\n', '\r\n', 1).replace('\nth', '\rth')
    rows = [{'text': odd}, *({'text': some} for some in few)]
    files = {'a.jsonl': rows, 'b.csv': rows, 'c.parquet': rows}
    place(tmp_path / 'in' / 'ann', files | {'d.txt': odd, 'e.md': '\r\r'.join(documents('cr', 3)).replace('\n', '\r')})
    assert run('local', '--source', tmp_path / 'in', '--out_root', tmp_path, '--tokenizer=bytes', '--name=mine') == 0
    assert sorted(sum(read(tmp_path / 'mine')[1].values(), [])) == sorted([text, *few, *documents('cr', 3)])


@pytest.mark.parametrize('end', ['\n', '\r', '\r\n'])
def test_lines_are_documents_where_nothing_else_is(end, tmp_path, capsys):
    """Without blank lines a text is a single paragraph, and there would be nothing to deal. It is said, and only then done."""
    lines = [f'<ann.{i}> says something' for i in range(40)]
    place(tmp_path / 'in', {'ann/chat.txt': end.join(lines), 'ben/a.md': f'{end}{end}'.join(documents('ben').copy())})
    assert run('local', '--source', tmp_path / 'in', '--out_root', tmp_path, '--tokenizer=bytes', '--name=mine') == 0
    out, (_, found) = capsys.readouterr().out, read(tmp_path / 'mine')
    assert out.startswith('ann: there are no blank lines between paragraphs: each line is a document\n') and 'ben: ' not in out
    assert sorted(sum((found[0, split] for split in SPLITS), [])) == sorted(lines)
    assert sum(len(found[1, split]) for split in SPLITS) == 120


def test_names_are_clean_and_distinct(tmp_path, capsys):
    """Bytes that are no UTF-8, line breaks, escapes: '?' in meta.json and on the terminal; still one user each."""
    for i, name in enumerate((b'w\xe9', b'w\xea', b'a\nb', b'\x1b[31mred', 'wörds a b'.encode(), b'w?')):
        place(tmp_path / 'in\udce9' / os.fsdecode(name), {'a.txt': '\n\n'.join(documents(str(i), 9)), 'b': b'\xff'})
    assert run('local', '--source', tmp_path / 'in\udce9', '--out_root', tmp_path / 'o\udce9', '--tokenizer=bytes') == 0
    out = capsys.readouterr().out
    (folder,) = (tmp_path / 'o\udce9').iterdir()
    meta, _ = read(folder)
    assert [user['name'] for user in meta['users']] == ['?[31mred', 'a?b', 'w?', 'wörds a b', 'w??', 'w???']
    assert meta['source'] == [user['name'] for user in meta['users']] and meta['options']['source'] == 'in?'
    assert not re.search('[\x1b\udc80-\udcff]', out) and 'w??: 1 of 2 files are not read' in out
    place(tmp_path / 'in\udce9' / 'ann\x1b', {'a.jsonl': '{'})
    assert run('local', '--source', tmp_path / 'in\udce9', '--out_root', tmp_path / 'p', '--tokenizer=bytes') == 2
    assert 'in?/ann?/a.jsonl, line 1 cannot be read' in capsys.readouterr().err


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    source_of('agnews', tmp_path / 'in')
    assert run('agnews', '--source=~/in', '--out_root=~/out', *SMALL) == 0
    assert hashes(tmp_path / 'out' / 'agnews')


def test_memory_of_a_long_document(tmp_path):
    """As docs/data.md has it: eight times the document, and what short ones take."""

    def peak(name, n):
        place(tmp_path / name, {'a.txt': '\n\n'.join(['<a> ' + 'word ' * n, '<b> b', '<c> c'])})
        tracemalloc.start()
        assert (
            run('local', '--source', tmp_path / name, '--out_root', tmp_path / 'out', f'--name={name}', '--tokenizer=bytes')
            == 0
        )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak('long', 1_000_000) - peak('short', 1) < 8 * 5_000_000


def test_vocabulary_not_at_hand(tmp_path, capsys, monkeypatch):
    def get_encoding(name):
        raise ConnectionError('no\nnetwork')

    monkeypatch.setattr('tiktoken.get_encoding', get_encoding)
    assert run('agnews', '--source', source_of('agnews', tmp_path / 'in'), '--out_root', tmp_path / 'out') == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'TIKTOKEN_CACHE_DIR' in err and not (tmp_path / 'out').exists()


def test_force(tmp_path, capsys, monkeypatch):
    """A finished set is refused before any work; --force replaces it, but only by a complete one."""
    common = ['agnews', '--source', source_of('agnews', tmp_path / 'in'), '--out_root', tmp_path, *SMALL]
    assert run(*common) == 0
    before = hashes(tmp_path / 'agnews')
    with monkeypatch.context() as patch:
        patch.setattr(sources, 'open_rows', None)  # would fail if it were called
        assert run(*common) == 2
    assert '--force' in capsys.readouterr().err
    assert run(*common[:2], tmp_path / 'nowhere', *common[3:], '--force') == 2
    assert hashes(tmp_path / 'agnews') == before
    assert run(*common, '--force', '--seed=3') == 0
    assert hashes(tmp_path / 'agnews') != before
    read(tmp_path / 'agnews')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['agnews', 'in']


def test_force_spares_other_folders(tmp_path, capsys):
    """A folder that prepare.py did not write is never replaced; an empty one is no obstacle."""
    source = source_of('agnews', tmp_path / 'in')
    assert run('agnews', '--source', source, '--out_root', tmp_path, '--name=in', '--force', *SMALL) == 2
    assert capsys.readouterr().err.count('\n') == 1 and (source / 'train.jsonl.gz').exists()
    (tmp_path / 'agnews').mkdir()
    assert run('agnews', '--source', source, '--out_root', tmp_path, *SMALL) == 0


def test_force_replaces_its_own_files_only(tmp_path, capsys, monkeypatch):
    """Whoever's meta.json is no data set; other files stay; links, of the folder and of a file, are followed. Stopped in the
    middle it is no data set until it is made again."""
    common = ['agnews', '--source', source_of('agnews', tmp_path / 'in'), '--out_root', tmp_path, *SMALL, '--name=mine']
    mine, far = tmp_path / 'mine', tmp_path / 'far'
    for content in ('{}', 'x', '{"users": ["me"], "dtype": "<u2", "vocab_size": 3}', '[1]'):
        place(mine, {'meta.json': content, 'thesis.txt': 'years'})
        for force in ([], ['--force']):
            assert run(*common, *force) == 2 and 'is not a prepared data set: move it away' in capsys.readouterr().err
        assert (mine / 'thesis.txt').read_text() == 'years' and (mine / 'meta.json').read_text() == content
    mine.rename(tmp_path / 'thesis')
    far.mkdir()
    mine.symlink_to(far)
    assert run(*common, '--seed=7') == 0 and mine.is_symlink()
    before = hashes(far)
    place(far, {'thesis.txt': 'years'})
    (far / 'user1_test.bin').rename(tmp_path / 'elsewhere.bin')
    (far / 'user1_test.bin').symlink_to(tmp_path / 'elsewhere.bin')
    moves, move = [], prepare.write_streams.__globals__['shutil'].move

    def failing(*names):
        moves.append(names)
        return move(*names) if len(moves) < 4 else (_ for _ in ()).throw(OSError('stopped'))

    with monkeypatch.context() as patch:
        patch.setattr('shutil.move', failing)
        assert run(*common, '--users=2', '--alpha=1', '--force') == 2
    with pytest.raises(ValueError, match='prepare the data set again'):
        Texts(mine, 8, 257)
    assert run(*common, '--users=2', '--alpha=1', '--force') == 0  # of two users: the other files are gone
    read_again = Texts(mine, 8, 257)
    assert len(read_again.names) == 2 and (far / 'thesis.txt').read_text() == 'years' and len([*far.iterdir()]) == 8
    assert (far / 'user1_test.bin').is_symlink() and (tmp_path / 'elsewhere.bin').stat().st_size == 800 and mine.is_symlink()
    for _ in range(2):
        assert run(*common, '--seed=7', '--force') == 0 and hashes(mine) == before
    place(far, {'user9_test.bin': 'mine'})
    assert run(*common, '--force') == 2 and 'user9_test.bin is not a file of the data set' in capsys.readouterr().err
    assert hashes(mine) == before and not list(tmp_path.glob('.*'))


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError])
@pytest.mark.parametrize('where', ['open', 'write_text'])
def test_interruption(where, error, tmp_path, monkeypatch):
    """Stopped in the middle of writing: nothing that looks finished, the old set intact, the next run succeeds."""
    common = ['agnews', '--source', source_of('agnews', tmp_path / 'in'), '--out_root', tmp_path, *SMALL]
    assert run(*common, '--name=old') == 0
    before, calls, original = hashes(tmp_path / 'old'), [], getattr(Path, where)

    def failing(self, *arguments, **options):
        calls.append(self)
        if len(calls) == (5 if where == 'open' else 1):
            raise error('stopped')
        return original(self, *arguments, **options)

    for arguments in ([*common, '--name=new'], [*common, '--name=old', '--force', '--seed=3']):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Path, where, failing)
            if error is KeyboardInterrupt:
                with pytest.raises(KeyboardInterrupt):
                    run(*arguments)
            else:
                assert run(*arguments) == 2
    assert not (tmp_path / 'new').exists() and hashes(tmp_path / 'old') == before
    (tmp_path / '.new.partial').mkdir()  # as after a power cut
    (tmp_path / '.new.partial' / 'meta.json').write_text('{}')
    assert run(*common, '--name=new') == 0
    assert hashes(tmp_path / 'new') == before and len(list((tmp_path / 'new').iterdir())) == 13
    assert not list(tmp_path.glob('.*'))


def test_command(tmp_path):
    """The command itself, from another folder: its output is all on stdout, and relative paths are that folder's."""
    source_of('agnews', tmp_path / 'in')
    command = [sys.executable, ROOT / 'data' / 'prepare.py', 'agnews', '--source=in', '--out_root=out', *SMALL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, '') and 'Sci/Tech' in done.stdout
    assert (tmp_path / 'out' / 'agnews' / 'meta.json').exists()


def test_help(capsys):
    assert run('--help') == 0 and '--alpha' in capsys.readouterr().out


def test_write_streams(tmp_path):
    """Documents out of memory or of an iterator, in the smallest of two types that holds the vocabulary, and all is counted."""
    train, folder = np.arange(300), tmp_path / 'new'
    user = {'train': [train], 'valid': iter([train[5:70], [7, 8]]), 'test': ()}
    meta = write_streams(folder, ['ann'], [user], 70_000, {'source': ['made up']}, n_bytes=np.full(70_000, 3))
    assert meta == json.loads((folder / 'meta.json').read_text())
    assert (meta['source'], meta['dtype'], meta['vocab_size'], meta['overlap']) == (['made up'], '<u4', 70_000, [1.0])
    counts = [tuple(meta['users'][0][key].values()) for key in ('tokens', 'documents', 'bytes')]
    assert meta['users'][0]['name'] == 'ann' and counts == [(300, 67, 0), (1, 2, 0), (900, 201, 0)]
    assert np.fromfile(folder / 'user0_valid.bin', '<u4').tolist() == [*range(5, 70), 7, 8]
    for split, sha256 in meta['users'][0]['sha256'].items():
        assert hashlib.sha256((folder / f'user0_{split}.bin').read_bytes()).hexdigest() == sha256


# ---- real text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ROWS)
def test_real_text(name, tmp_path):
    """A small run on real text: no window of 100 bytes, deep within documents, is in two users or two splits."""
    source = SHARED / 'data' / name
    if not source.exists():
        pytest.skip('the local stand-ins (shared/data) are not here')
    size = ['--train_tokens=30_000', '--valid_tokens=8_000', '--test_tokens=8_000', '--tokenizer=bytes', '--max_chars=9000']
    assert run(name, '--source', source, '--out_root', tmp_path, *size) == 0
    written = Texts(tmp_path / name, 128, 257)
    assert [user['tokens'] for user in written.meta['users']] == [{'train': 30_000, 'valid': 8_000, 'test': 8_000}] * 4
    owner, shared, total = {}, 0, 0
    for i in range(4):
        for split, tokens in written.of(i).items():
            raw = tokens.astype(np.uint8).tobytes()
            for start in range(len(raw) - 100):
                shared += owner.setdefault(raw[start : start + 100], (i, split)) != (i, split)
            total += len(raw) - 100
    print(f'{shared} of {total} windows shared')
    assert shared < total / (100 if name == 'slimpajama' else 1000)  # licence headers of code repeat; documents must not
