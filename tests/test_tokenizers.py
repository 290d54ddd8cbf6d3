"""Tokens of other bases: a tokenizer.json through data/prepare.py, train.py's check, and the tools that show tokens."""

import hashlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, refused, trainer, write_dataset
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Theirs

from data import prepare
from data.stream import Texts, Tokenizer, byte_table, read_meta, tokenizer_of
from model import GPT, GPTConfig, save_gpt
from run.fleet import public_windows
from tools import routing, sample

WORDS = 'The rain in Spain stays mainly in the plain, and 1984 is a year. Été, naïve, 日本語 and 🙂. '
EMOJI = '👩‍👩‍👧 e\u0301 \u200d ▁ <0x41> <|endoftext|> </s>\n\n\t  end '


def byte_level(alphabet: bool = True, **how) -> Theirs:
    """As of SmolLM2: byte-level pieces, digits one by one, and what a Hub's file may hold beside: all that adds or cuts."""
    bpe = Theirs(models.BPE(**how))
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([digits, pieces]), decoders.ByteLevel()
    special = ['<|endoftext|>', '<|im_start|>']
    known = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    teacher = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=known, show_progress=False)
    bpe.train_from_iterator([WORDS + '\n<> 0123456789'] * 20, teacher)
    bpe.add_tokens([AddedToken('<tool é>', normalized=False)])
    bpe.post_processor = processors.TemplateProcessing(single='<|im_start|> $A', special_tokens=[('<|im_start|>', 1)])
    bpe.enable_truncation(5)
    bpe.enable_padding(length=7)
    return bpe


def sentence_piece(metaspace: bool) -> Theirs:
    """As of Llama 2 (spaces in the normalizer) or Mistral (Metaspace): ▁ is a space, <0xAB> a byte, and a space before all."""
    tokens = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256)), *'▁Theainr', 'Th', 'The', '▁i', '▁in', 'ai']
    merges = [('T', 'h'), ('Th', 'e'), ('▁', 'i'), ('▁i', 'n'), ('a', 'i')]
    bpe = models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token='<unk>', fuse_unk=True, byte_fallback=True)
    made = Theirs(bpe)
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    made.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(['<unk>', '<s>', '</s>'])
    made.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    return made


MADE = {'bytes': byte_level, 'llama': lambda: sentence_piece(False), 'mistral': lambda: sentence_piece(True)}


@pytest.fixture(params=MADE)
def enc(request, tmp_path) -> Tokenizer:
    return written(tmp_path / 'tokenizer.json', MADE[request.param]())


def written(file: Path, made: Theirs) -> Tokenizer:
    file.parent.mkdir(exist_ok=True)
    made.save(str(file))
    return Tokenizer(file)


# ---- tokens and bytes ------------------------------------------------------------------------------------------------
def test_tokens_are_the_bytes_of_the_text(enc):
    """Whatever the text, also one token for half a character: no token for what is not in it, none cut, none special."""
    draw = random.Random(0)
    ranges = ((0, 128), (128, 0x300), (0x300, 0x370), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0x10000, 0x10FFFF))
    noise = [''.join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(1, 40))) for _ in range(200)]
    piece = 'llama' if enc.eot_token == 2 else 'bytes'
    for text in (WORDS, EMOJI, 'x', ' x', '<tool é>', '', *noise):
        ids = enc.encode_ordinary(text)
        raw = [enc.decode_single_token_bytes(i) for i in ids]
        assert b''.join(raw) == enc.decode_bytes(ids) == (text if piece == 'bytes' else text.replace('▁', ' ')).encode()
        assert enc.decode(ids) == ''.join(routing.pieces(raw)) == ''.join(sample.codecs.iterdecode(raw, 'utf-8'))
        assert not {enc.eot_token, enc.start_token, enc.unk_token} & {*ids}
    assert enc.encode_ordinary('a\ud83d') == enc.encode_ordinary('a\ufffd')  # half a surrogate pair, as of a command line
    assert any(len(b) == 1 and b > b'\x7f' for b in (enc.bytes[i] for i in enc.encode_ordinary('é日')))


def test_what_is_known_of_it(tmp_path):
    enc = written(tmp_path / 'smol' / 'tokenizer.json', byte_level())
    assert (enc.name, enc.eot_token, enc.start_token, enc.unk_token) == ('smol/tokenizer.json', 0, 0, None)
    assert enc.n_vocab == byte_level().get_vocab_size() and enc.bytes[0] == b'<|endoftext|>'
    assert enc.bytes[-1] == '<tool é>'.encode() and sorted(byte_table().values()) == [*range(256)]
    enc = written(tmp_path / 'l' / 'tokenizer.json', sentence_piece(True))
    assert (enc.eot_token, enc.start_token, enc.unk_token, enc.bytes[3 + 0xAB]) == (2, 1, 0, b'\xab')
    made = json.loads(byte_level().to_str())
    made['added_tokens'].pop()
    made['model']['vocab']['Ġthe'] = 400  # holes are no text
    (tmp_path / 'holes').write_text(json.dumps(made))
    enc = Tokenizer(tmp_path / 'holes')
    assert enc.n_vocab == 401 and enc.encode_ordinary(' the') == [400] and enc.bytes[390] == b'\xff'
    assert ''.join(sample.decode([400, 390], enc)) == ' the\ufffd'


def test_the_tokens_are_theirs(tmp_path):
    """Where nothing is added or cut, the package's own ids."""
    theirs, enc = byte_level(), written(tmp_path / 'tokenizer.json', byte_level())
    theirs.no_truncation()
    theirs.no_padding()
    theirs.pre_tokenizer[1].add_prefix_space = False
    for text in (WORDS, ' x 123  y', '日 🙂<tool é>'):
        assert enc.encode_ordinary(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    'content', ['', '{', '[]', '{}', 'null', '{"model": {}}', '{"model": 3}', '\0' * 9, '{"model": ' * 9999, b'\xff\xfe']
)
def test_no_tokenizer(content, tmp_path):
    (tmp_path / 't.json').write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match='t.json cannot be read as a tokenizer.json') as error:
        Tokenizer(tmp_path / 't.json')
    assert '\n' not in str(error.value)


def test_words_as_tokens_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r'WordLevel, ids below 2\): expected byte-level BPE'):
        written(tmp_path / 't.json', Theirs(models.WordLevel({'a': 0, 'b': 1}, unk_token='a')))


# ---- a data set ------------------------------------------------------------------------------------------------------
def run(*argv) -> int:
    try:
        prepare.main([str(argument) for argument in argv])
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture
def local(tmp_path, monkeypatch):
    """local(made, *more) prepares out/mine of two users with a tokenizer, and returns its folder."""
    monkeypatch.setattr(sys, 'argv', ['data/prepare.py'])
    for user, text in enumerate((WORDS, 'in the rain, 12 plains. 🙂 ')):
        folder = tmp_path / 'in' / f'user {user}'
        folder.mkdir(parents=True)
        for i in range(12):
            (folder / f'{i}.txt').write_text(f'<{i}> ' + text * (4 + i), encoding='utf-8')

    def make(made: Theirs, *more: str, place: str = 'smol/tokenizer.json') -> Path:
        written(tmp_path / place, made)
        given = [f'--tokenizer={tmp_path / place}', f'--out_root={tmp_path}/out', '--name=mine', *more]
        assert run('local', f'--source={tmp_path}/in', *given) == 0
        return tmp_path / 'out' / 'mine'

    return make


@pytest.mark.parametrize('kind', MADE)
def test_from_text_to_text(kind, local, tmp_path):
    """All documents are there, word for word, in the tokens of the copy beside them; a folder says the same as its file."""
    folder = local(MADE[kind]())
    meta, file = read_meta(folder), tmp_path / 'smol' / 'tokenizer.json'
    assert (folder / 'tokenizer.json').read_bytes() == file.read_bytes()
    assert meta['tokenizer_sha256'] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert meta['tokenizer'] == meta['options']['tokenizer'] == 'smol/tokenizer.json' and str(tmp_path) not in json.dumps(meta)
    data, enc = Texts(folder, 8, meta['vocab_size']), tokenizer_of(folder, meta)
    assert enc.n_vocab == meta['vocab_size'] and enc.name == meta['tokenizer']
    for i in range(2):
        texts = {p.read_text(encoding='utf-8').strip() for p in (tmp_path / 'in' / f'user {i}').iterdir()}
        streams = [enc.decode(tokens.tolist()) for tokens in data.of(i).values()]
        assert {text for stream in streams for text in stream.split('\n\n')} == texts
        assert [len(text.encode()) for text in streams] == [*meta['users'][i]['bytes'].values()]
    before = [user['sha256'] for user in meta['users']]
    assert run('local', f'--source={tmp_path}/in', f'--tokenizer={tmp_path}/smol', f'--out_root={tmp_path}', '--name=b') == 0
    assert [user['sha256'] for user in read_meta(tmp_path / 'b')['users']] == before


def test_the_copy_belongs_to_the_data_set(local, tmp_path, capsys):
    """Altered or missing it is refused; --force replaces it, or takes it away; whose it is not, it leaves."""
    folder = local(byte_level())
    file, raw = folder / 'tokenizer.json', (folder / 'tokenizer.json').read_bytes()
    for change, why in ((lambda: file.write_bytes(raw + b' '), 'SHA-256 differs'), (file.unlink, 'tokenizer.json is missing')):
        change()
        for read in (lambda: Texts(folder, 8, None), lambda: tokenizer_of(folder, read_meta(folder))):
            with pytest.raises(ValueError, match=f'{why}.*: prepare the data set again') as error:
                read()
            assert '\n' not in str(error.value)
    assert local(sentence_piece(True), '--force') == folder and file.read_bytes() != raw
    assert tokenizer_of(folder, read_meta(folder)).eot_token == 2
    again = ('local', f'--source={tmp_path}/in', f'--out_root={tmp_path}/out', '--name=mine')
    assert run(*again, '--tokenizer=bytes', '--force') == 0 and not file.exists()
    assert 'tokenizer_sha256' not in read_meta(folder) and tokenizer_of(folder, read_meta(folder)).name == 'bytes'
    file.write_text('mine')
    capsys.readouterr()
    assert run(*again, '--tokenizer=bytes', '--force') == 2
    assert 'tokenizer.json is not a file of the data set there' in capsys.readouterr().err and file.read_text() == 'mine'
    meta = json.loads((folder / 'meta.json').read_text())
    (folder / 'meta.json').write_text(json.dumps(meta | {'tokenizer_sha256': None}))
    with pytest.raises(ValueError, match='tokenizer_sha256 must be'):
        read_meta(folder)


@pytest.mark.parametrize('unk', ['<|endoftext|>', None])
def test_what_is_lost_is_told(unk, local, tmp_path, capsys):
    """Bytes without a token, 2 and 4 in two of the documents: lost, or said by another token, which is a loss, too."""
    (tmp_path / 'in' / 'user 0' / '0.txt').write_text('the rain \x04\x05 in the plain')
    (tmp_path / 'in' / 'user 1' / '0.txt').write_text('the rain \U000e0041 in the plain', encoding='utf-8')  # F3 A0 81 81
    local(byte_level(alphabet=False, unk_token=unk))
    assert (
        'smol/tokenizer.json cannot say 2 documents word for word: ' in (said := capsys.readouterr().out)
        and '(6 bytes fewer)' in said
    )
    for file in (tmp_path / 'in').glob('*/0.txt'):
        file.unlink()
    local(byte_level(alphabet=False, unk_token=unk), '--force')
    assert 'cannot say' not in capsys.readouterr().out


def test_a_normalizer_counts(local, capsys):
    made = byte_level()
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    folder = local(made)
    data, enc = Texts(folder, 8, None), tokenizer_of(folder, read_meta(folder))
    assert 'été, naïve' in enc.decode(data.of(0)['train'].tolist()) and 'cannot say 12 documents' in capsys.readouterr().out


# ---- whose tokens they are -------------------------------------------------------------------------------------------
def test_only_the_base_that_reads_them(local, tmp_path):
    """The base's own file or one that says the same otherwise; then the base may have any number of rows more."""
    folder = local(byte_level())
    n, ours = read_meta(folder)['vocab_size'], tmp_path / 'smol' / 'tokenizer.json'
    other = tmp_path / 'other.json'
    written(other, byte_level())
    pretty = json.loads(other.read_text()) | {'truncation': None, 'post_processor': None}
    pretty['model']['merges'] = [' '.join(pair) for pair in pretty['model']['merges']]
    other.write_text(json.dumps(pretty, indent=3))
    for file in (ours, other):
        read_meta(folder, n, file)
        Texts(folder, 8, n + 1000, tokenizer=file)
        with pytest.raises(ValueError, match=f'but the base model has {n - 1}'):
            read_meta(folder, n - 1, file)
    with pytest.raises(ValueError, match='no tokenizer here fits it'):
        read_meta(folder, n + 1000)
    for change in ('merges', 'added_tokens', 'normalizer'):
        changed = json.loads(ours.read_text())
        if change == 'merges':
            changed['model']['merges'].pop()
        elif change == 'added_tokens':
            changed['added_tokens'].pop()
        else:
            changed['normalizer'] = {'type': 'NFC'}
        other.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f'--tokenizer={other}, or choose a base of smol/tokenizer.json tokens') as error:
            read_meta(folder, n, other)
        assert '\n' not in str(error.value)
    plain = write_dataset(tmp_path / 'plain', [{split: np.arange(99) for split in ('train', 'valid', 'test')}])
    with pytest.raises(ValueError, match=f'has tokens of bytes, but the base reads those of {ours}'):
        Texts(plain, 8, 257, tokenizer=ours)


# ---- names, the Hub --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'given, why',
    [
        ('nowhere', 'does not exist: expected bytes, gpt2, a tokenizer.json'),
        ('a/b/c', 'does not exist'),
        ('{}/empty', 'is a folder without a tokenizer.json'),
        ('{}/empty/x.json', 'x.json cannot be read as a tokenizer.json'),
    ],
)
def test_refused_before_anything_is_written(given, why, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['data/prepare.py'])
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'x.json').write_text('{}')
    given = [f'--tokenizer={given.format(tmp_path)}', f'--out_root={tmp_path}/out']
    assert why in refused(capsys, prepare.main, ['demo', *given]) and not (tmp_path / 'out').exists()


def test_the_hub(tmp_path, monkeypatch):
    """Asked once, else from the cache; where there is neither, one line."""
    hub, asked = pytest.importorskip('huggingface_hub'), []
    written(tmp_path / 'tokenizer.json', byte_level())

    def answer(repo, name, local_files_only):
        asked.append((repo, name, local_files_only))
        return str(tmp_path / name)

    def fail(*args, **kwargs):
        raise ConnectionError('no\nnetwork')

    monkeypatch.setattr(hub, 'get_hf_file_metadata', lambda url: None)
    monkeypatch.setattr(hub, 'hf_hub_download', answer)
    assert prepare.open_tokenizer('Some/Smol-1.0').name == 'Some/Smol-1.0'
    monkeypatch.setattr(hub, 'get_hf_file_metadata', fail)
    assert prepare.open_tokenizer('Some/Smol-1.0').eot_token == 0
    assert asked == [('Some/Smol-1.0', 'tokenizer.json', False), ('Some/Smol-1.0', 'tokenizer.json', True)]
    monkeypatch.setattr(hub, 'hf_hub_download', fail)
    with pytest.raises(OSError, match=r'tokenizer.json of Some/Smol-1.0 .* \(ConnectionError\): connect once') as error:
        prepare.open_tokenizer('Some/Smol-1.0')
    assert '\n' not in str(error.value)


# ---- a run -----------------------------------------------------------------------------------------------------------
def test_a_run_on_them(local, tmp_path, capsys, tiny):
    """Training, a page of whole words, text: all in the tokens of the data set."""
    folder = local(byte_level())
    meta = read_meta(folder)
    torch.manual_seed(0)
    save_gpt(GPT(GPTConfig(meta['vocab_size'], 32, 2, 2, 16)), tmp_path / 'base.safetensors')
    train, switches = trainer(tiny, tmp_path), (f'--init_from={tmp_path}/base.safetensors', f'--dataset={folder}')
    public = (f'--public_text={ROOT}/LICENSE', '--method=pcl', '--trust=predictions', '--judge_windows=4', '--rounds=1')
    given = public_windows(train(*switches, *public, out='public').c, Texts(folder, 16, None)).flatten().tolist()
    assert (ROOT / 'LICENSE').read_text().startswith(tokenizer_of(folder, meta).decode(given))
    out = train(*switches, '--method=comigs_1gxs', '--n_experts=2').out
    capsys.readouterr()
    routing.main([str(out), '--passage_tokens=40'])
    page = json.loads((out / 'routing.html').read_text().split('id="data">')[1].split('</script>')[0])
    enc, seen = tokenizer_of(folder, meta), Texts(folder, 16, None).of(0)['test'][:40].tolist()
    raw = [enc.decode_single_token_bytes(i) for i in seen]
    assert page['tokenizer'] == 'smol/tokenizer.json' and ' the' in page['texts'][0]['pieces']
    assert ''.join(page['texts'][0]['pieces']) == b''.join(raw).decode(errors='replace')
    capsys.readouterr()
    sample.main([str(out), '--prompt=The rain, 🙂', '--tokens=5', '--temperature=0'])
    said = capsys.readouterr().out
    assert said.startswith('The rain, 🙂') and len(enc.encode_ordinary(said)) > 5
    assert sample.read_prompt('', enc, 32) == ('', [0])
    assert sample.vocabulary_of(GPT(GPTConfig(257, 8, 1, 1, 4)), None).name == 'bytes'
    base = GPT(GPTConfig(meta['vocab_size'], 8, 1, 1, 4))
    base.tokenizer = folder / 'tokenizer.json'
    assert sample.vocabulary_of(base, None).sha256 == meta['tokenizer_sha256']
