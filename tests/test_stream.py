"""data/stream.py: a data set is checked whole before any work, and read a user at a time."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import user_streams, write_dataset

from data.stream import SPLITS, VOCABULARIES, Texts, check_lengths, encoding, get_batch, load_text, overlap


def test_a_user_at_a_time_is_what_was_written(tmp_path):
    written = [user_streams(i, 300 + 100 * i) for i in range(3)]
    folder = write_dataset(tmp_path / 'data', written)
    texts = Texts(folder, 16, 257)
    assert texts.meta == json.loads((folder / 'meta.json').read_text())
    assert texts.n_train == [300, 400, 500] and texts.names == ['user 0', 'user 1', 'user 2'] and not any(texts.overlap)
    for i, user in enumerate(written):
        read = texts.of(i)
        assert list(read) == list(SPLITS)
        for split in SPLITS:
            assert read[split].dtype == np.dtype('<u2') and not read[split].flags.writeable
            np.testing.assert_array_equal(read[split], user[split])


def test_mixture_and_pooled(tmp_path):
    """mixture: user i's valid stream is piece i of N of everybody's: no token is in two users', and train stays its own.
    pooled: one user with everybody's text; the test streams also apart."""
    written = [
        {split: np.arange(100 * i, 100 * i + n) for split, n in (('train', 70), ('valid', 62), ('test', 90))} for i in range(3)
    ]
    folder = write_dataset(tmp_path / 'data', written, vocab_size=300)
    mixed, pooled = Texts(folder, 16, 300, 'mixture'), Texts(folder, 16, 300, pooled=True)
    assert mixed.of(1)['valid'].tolist() == [100 * j + 20 + k for j in range(3) for k in range(20)]  # 62 // 3 tokens of each
    assert mixed.of(1)['train'].tolist() == written[1]['train'].tolist()
    for split in ('valid', 'test'):
        held = np.concatenate([mixed.of(i)[split] for i in range(3)])
        assert len(set(held.tolist())) == len(held)
    for split in SPLITS:
        assert pooled.of(0)[split].tolist() == np.concatenate([user[split] for user in written]).tolist()
    assert {i: test.tolist() for i, test in pooled.of(0)['tests'].items()} == {i: written[i]['test'].tolist() for i in range(3)}
    assert pooled.n_train == [1] and len(pooled.names) == 3
    with pytest.raises(ValueError, match='user 0 has 60 valid tokens'):  # enough before they are mixed
        Texts(folder, 61, 300, 'mixture')


def test_public_text_and_prompts_are_clean(tmp_path):
    """load_text: no byte order mark, no CR; a zero byte or another encoding is no text."""
    file = tmp_path / 'a.txt'
    file.write_bytes('\ufeffä\r\nb\rc'.encode())
    assert bytes(load_text(file, encoding('bytes')).tolist()).decode() == 'ä\nb\nc'
    for raw in (b'a\0b', 'ä'.encode('latin-1'), 'ab'.encode('utf-16')):
        file.write_bytes(raw)
        with pytest.raises(ValueError, match='a.txt is not text in UTF-8'):
            load_text(file, encoding('bytes'))


def overwrite(file, tokens):
    file.write_bytes(np.asarray(tokens, '<u2').tobytes())


SPOILT = {  # what is wrong with the last user: (words of the message, how to do it to its folder)
    'missing': ('user4_test.bin is missing', lambda folder: (folder / 'user4_test.bin').unlink()),
    'truncated': ('user4_valid.bin has 398 bytes', lambda folder: overwrite(folder / 'user4_valid.bin', [98] * 199)),
    'altered': ('user4_train.bin is not the file', lambda folder: overwrite(folder / 'user4_train.bin', [98] * 300)),
    'outside': ('user4_test.bin holds token 257', lambda folder: overwrite(folder / 'user4_test.bin', [257] * 150)),
    'no meta': ('no meta.json', lambda folder: (folder / 'meta.json').unlink()),
    'odd meta': ('meta.json cannot be read', lambda folder: (folder / 'meta.json').write_text('{"users": []}')),
}


@pytest.mark.parametrize('case', SPOILT)
def test_whatever_is_wrong_is_found_before_any_work(case, tmp_path):
    words, spoil = SPOILT[case]
    folder = write_dataset(tmp_path / 'data', [user_streams(i, 300) for i in range(5)])
    texts = Texts(folder, 149, 257)
    spoil(folder)
    for how in ({}, {'target': 'mixture'}, {'pooled': True}):
        with pytest.raises(ValueError) as error:
            Texts(folder, 16, 257, **how)
        assert words in str(error.value) and '\n' not in str(error.value)
    if 'meta' not in case:  # and again when the user's turn comes, should a file change while training
        with pytest.raises(ValueError, match=words):
            texts.of(4)
        texts.of(3)


@pytest.mark.parametrize(
    'block_size, vocab_size, words',
    [
        (150, 257, 'user 0 has 150 test tokens, but a window of block_size 150 needs 151'),
        (16, 256, 'vocabulary of 257'),
        (16, 257 + 128, 'vocabulary of 257'),
    ],
)
def test_what_the_base_needs(block_size, vocab_size, words, tmp_path):
    folder = write_dataset(tmp_path / 'data', [user_streams(0, 300)])
    Texts(folder, 149, 257 + 127)
    with pytest.raises(ValueError, match=words):
        Texts(folder, block_size, vocab_size)


def test_advice_about_vocabularies_is_given_where_it_helps(tmp_path):
    folder = write_dataset(tmp_path / 'data', [user_streams(0, 300)])
    for vocab_size, advice in (
        (50257, '50257: prepare with --tokenizer=gpt2, or choose a base of 257 tokens with --init_from'),
        (50304, '50304: prepare with --tokenizer=gpt2, or choose a base of 257 tokens'),
        (21128, '21128: no tokenizer here fits it, choose a base of 257 tokens with --init_from'),
        (256, '256: no tokenizer here fits it'),
        (50257 + 128, 'no tokenizer here fits it'),
    ):
        with pytest.raises(ValueError) as error:
            Texts(folder, 16, vocab_size)
        assert advice in str(error.value)
    meta = json.loads((folder / 'meta.json').read_text())
    (folder / 'meta.json').write_text(json.dumps({**meta, 'vocab_size': 300}))  # an odd one: its own tokenizer helps
    with pytest.raises(ValueError, match='--tokenizer=bytes, or choose a base of 300'):
        Texts(folder, 16, 257)
    assert [*VOCABULARIES] == ['bytes', 'gpt2'] and VOCABULARIES['bytes'] == encoding('bytes').n_vocab
    for n, advice in ((150, 'prepare more text or train with a lower --block_size'), (1, 'prepare more text')):
        with pytest.raises(ValueError, match=f'{advice}$'):
            check_lengths({split: np.zeros(n) for split in SPLITS}, 0, 150)


def test_memory_of_checking_does_not_grow_with_the_users(tmp_path):
    """Beyond meta.json: one user's 60 kB at a time, not 40 of them."""

    def peak(n_users):
        folder = write_dataset(tmp_path / str(n_users), [user_streams(i % 20, 30_000) for i in range(n_users)])
        tracemalloc.start()
        Texts(folder, 16, 257)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    few, many = peak(2), peak(40)
    assert 60_000 < few < many < few + 38 * 6_000  # meta.json: about 3 kB a user, and its text


def test_batches_are_windows_by_key():
    """Token i + 1 follows token i; the last window ends with the last token; a key names a batch."""
    tokens = np.arange(1000, dtype='<u2')
    x, y = get_batch(tokens, 64, 16, (42, 3, 0, 7))
    assert x.shape == y.shape == (64, 16) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], x[:, :-1] + 1) and torch.equal(y, x + 1)
    assert torch.equal(x, get_batch(tokens, 64, 16, (42, 3, 0, 7))[0])
    assert not torch.equal(x, get_batch(tokens, 64, 16, (42, 3, 0, 8))[0])
    starts = [get_batch(tokens[:18], 64, 16, (i,))[0][:, 0] for i in range(4)]
    assert set(torch.cat(starts).tolist()) == {0, 1}


def test_overlap_is_the_share_of_validation_windows_that_training_text_has(tmp_path):
    """Windows of 64 side by side in the validation text, anywhere in the training text; one token less is no overlap."""
    rng = np.random.default_rng(0)
    train, valid = rng.integers(0, 257, 1000), rng.integers(0, 257, 64 * 5 + 10)
    assert overlap(train, valid) == 0 and overlap(train, train[:640]) == 1 and overlap(train[:63], valid) == 0
    valid[64:128], valid[192:255] = train[13:77], train[-63:]
    assert overlap(train, valid) == 1 / 5
    valid[192:256] = train[-64:]
    assert overlap(train, valid) == 2 / 5
    folder = write_dataset(tmp_path / 'data', [{'train': train, 'valid': valid, 'test': valid}, user_streams(1, 300)])
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['overlap'] == [2 / 5, 0]
    for kept, found in (({'overlap': [0.5, 0.0]}, [0.5, 0]), ({}, [2 / 5, 0])):  # an older meta.json has none: it is counted
        (folder / 'meta.json').write_text(json.dumps({**{k: v for k, v in meta.items() if k != 'overlap'}, **kept}))
        assert Texts(folder, 16, 257).overlap == found
