"""The Llama family in one file: Llama, Llama 3, Qwen2, Mistral and SmolLM2 as the frozen base that all users share.

What differs from GPT-2 in model.py: RMSNorm instead of LayerNorm; positions enter as rotations of queries and keys; several
queries share a key and a value (grouped-query attention); an MLP is down(silu(gate x) * up x). Attention itself, the
cross-entropy, generating and evaluating are GPT's. transformers is the oracle in tests/test_llama.py.

    base = load_base('bases/smollm2')           # or a short name, owner/name of the Hub, a folder, a file; GPT-2, too
    logits, _ = base(torch.tensor([[1, 2, 3]]))

Shapes: B sequences, T tokens per sequence, C = hidden_size, D = head_dim, H heads of queries, G of keys and values,
I = intermediate_size, S tokens before these.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import model
from model import GPT, Embedding, as_config, attend, filled, gpt_of, hold_to, read_base, without_copy

HUB = {
    **model.HUB,
    'smollm2-135m': 'HuggingFaceTB/SmolLM2-135M',
    'smollm2-360m': 'HuggingFaceTB/SmolLM2-360M',
    'qwen2.5-0.5b': 'Qwen/Qwen2.5-0.5B',
    'llama-3.2-1b': 'meta-llama/Llama-3.2-1B',
}
IN_HUB = {  # our names: those of the Hub, without what comes before the layers
    'wte': 'embed_tokens',
    'h': 'layers',
    'ln_1': 'input_layernorm',
    'attn': 'self_attn',
    'ln_2': 'post_attention_layernorm',
    'ln_f': 'norm',
}


@dataclass(frozen=True)
class LlamaConfig:
    """Names are those of the Hub's config.json; the defaults are SmolLM2-135M."""

    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    head_dim: int = 64
    max_position_embeddings: int = 8192  # longest sequence, tokens; of Mistral its window
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e5
    rope_scaling: tuple = ()  # of Llama 3: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
    qkv_bias: bool = False  # of Qwen2
    tie_word_embeddings: bool = True

    # what the rest of the project calls them
    n_positions = property(lambda self: self.max_position_embeddings)
    n_layer = property(lambda self: self.num_hidden_layers)
    n_head = property(lambda self: self.num_attention_heads)
    n_embd = property(lambda self: self.hidden_size)


class Normalise(torch.autograd.Function):
    """x / sqrt(mean(x²) + ε) * weight in float32, with its derivative written out: autograd would make twice the passes over x.

    With r = 1 / sqrt(mean(x²) + ε), n = r x and g = dy * weight:  dx = r (g - n mean(g n))."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        r = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (B, T, 1)
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple:
        x, weight, r = ctx.saved_tensors
        n, g = x * r, dy * weight
        dw = (dy * n).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return g.addcmul_(n, (g * n).mean(-1, keepdim=True), value=-1).mul_(r), dw, None


class RMSNorm(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.hidden_size)), config.rms_norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Normalise.apply(x.float(), self.weight.float(), self.eps)  # (B, T, C), float32 under autocast, too


def rotations(config: LlamaConfig, S: int, T: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (T, D/2) each, of the angles by which positions S, ..., S + T - 1 turn a head's pairs (RoPE, 2104.09864).

    Pair i turns by position * theta^(-2i/D). Llama 3 slows the pairs that turn less than low_freq_factor times in the original
    window by `factor`, leaves those alone that turn more than high_freq_factor times, and goes over smoothly between."""
    speed = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim)  # (D/2,)
    if config.rope_scaling:
        factor, low, high, window = config.rope_scaling
        kept = ((window * speed / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        speed = kept * speed + (1 - kept) * speed / factor
    angle = torch.arange(S, S + T, device=device).float()[:, None] * speed  # (T, D/2)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, H, T, D): the pairs (x_i, x_{i + D/2}) of every head, turned."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, C, D = config, config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)

    def forward(self, x: torch.Tensor, past: list | None = None) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C). past: as an entry of the cache of GPT.hidden; keys are kept as they were turned."""
        heads, S = (*x.shape[:2], -1, self.config.head_dim), past[0].shape[2] if past else 0
        q, k, v = (project(x).view(heads).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        turn = rotations(self.config, S, x.shape[1], x.device)
        q, k = rotate(q, *turn), rotate(k, *turn)  # (B, H, T, D), (B, G, T, D)
        if past is not None:
            if past:
                k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)  # (B, G, S + T, D) each
            past[:] = k, v
        return self.o_proj(attend(q, k, v))  # (B, T, C)


class MLP(nn.Module):
    needs_earlier_tokens = False  # beyond the keys and values that a cache keeps of them

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, routing: None = None) -> tuple[torch.Tensor, None]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), None  # (B, T, C)


class Block(model.Block):
    def __init__(self, config: LlamaConfig):
        nn.Module.__init__(self)
        self.ln_1 = RMSNorm(config)
        self.attn = Attention(config)
        self.ln_2 = RMSNorm(config)
        self.mlp = MLP(config)


class Llama(GPT):
    """hidden, head, loss, stream and generate are GPT's."""

    described_by = 'llama_config'

    def __init__(self, config: LlamaConfig):
        nn.Module.__init__(self)
        self.config = config
        self.wte = Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.ln_f = RMSNorm(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.initialise(('attn.o_proj', 'mlp.down_proj'))

    @property
    def head_weight(self) -> torch.Tensor:
        return self.wte.weight if self.config.tie_word_embeddings else self.lm_head.weight  # (V, C)

    def embed(self, idx: torch.Tensor, S: int) -> torch.Tensor:
        return self.wte(idx).float()  # (B, T, C), the residual stream; positions enter in attention


# ---- a base of either family -----------------------------------------------------------------------------------------
def load_base(source: str) -> GPT:
    """A GPT-2 or a Llama in float32 on the CPU, from what `read_base` reads; config.json's model_type decides.

    .tokenizer of a Llama is the tokenizer.json beside it, or None. Raises ValueError or OSError, one line."""
    tensors, config, where = read_base(source, HUB)
    kind, own = config.get('model_type'), f'{Llama.described_by} in '
    if where.startswith(own):
        base = filled(Llama, own_config(config, where), tensors, source)
    elif kind in [*FAMILIES]:
        base = filled(Llama, llama_config(config, where), from_llama(tensors, config), source)
    elif kind == 'gpt2' or where.startswith(f'{GPT.described_by} in '):
        return gpt_of(tensors, config, where, source)
    else:
        raise ValueError(f'{where}: model_type={kind!r:.40}, expected one of {", ".join(["gpt2", *FAMILIES])}')
    beside = Path(where.removeprefix(own)).with_name('tokenizer.json')
    base.tokenizer = beside if beside.is_file() else None
    return base


FAMILIES = {  # model_type: what a config.json that does not say it means
    'llama': dict(max_position_embeddings=2048, num_key_value_heads=None, sliding_window=None),
    'mistral': dict(max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096),
    'qwen2': dict(max_position_embeddings=32768, num_key_value_heads=32, sliding_window=None),
}


def llama_config(given: dict, where: str) -> LlamaConfig:
    """config.json of the Hub -> LlamaConfig. Raises ValueError naming the field that is missing or not as released."""
    family = given['model_type']
    given = {**FAMILIES[family], 'rms_norm_eps': 1e-6, 'tie_word_embeddings': False, **given}
    scaled = given.get('rope_parameters') or given.get('rope_scaling') or {}  # since transformers 5, and before
    windows = [given[key] for key in ('max_position_embeddings', 'sliding_window') if given[key] is not None]
    if not isinstance(scaled, dict) or not windows or any(type(n) is not int or n < 1 for n in windows):
        raise ValueError(f'{where}: expected max_position_embeddings and sliding_window above 0, an object for rope_scaling')
    rope = {'rope_theta': given.get('rope_theta', 1e4), **scaled}
    kind = rope.get('rope_type', rope.get('type', 'default'))
    hold_to({'rope_type': ('default', 'llama3')}, {'rope_type': kind}, where, f'a {family}')
    biases = {'attention_bias': (False,), 'mlp_bias': (False,)} if family != 'qwen2' else {}
    fixed = {'hidden_act': ('silu',), 'quantization_config': (None,), 'partial_rotary_factor': (1, None), **biases}
    hold_to(fixed, given | scaled, where, f'a {family}')
    heads, width = given.get('num_attention_heads'), given.get('hidden_size')
    if given['num_key_value_heads'] is None:
        given['num_key_value_heads'] = heads
    if given.get('head_dim') is None:
        known = type(heads) is type(width) is int and heads
        given['head_dim'] = width // heads if known else 1  # then as_config names which of the two is wrong
    if given.get('use_sliding_window', True):  # in sequences no longer than that every token sees all before it
        given['max_position_embeddings'] = min(windows)
    scaling = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
    given |= {'rope_theta': rope['rope_theta'], 'qkv_bias': family == 'qwen2'}
    given['rope_scaling'] = [rope.get(key) for key in scaling] if kind == 'llama3' else []
    missing = [f.name for f in fields(LlamaConfig) if given.get(f.name) is None]
    if missing:
        raise ValueError(f'{where} has no {missing[0]}: copy config.json of the base again')
    return own_config({f.name: given[f.name] for f in fields(LlamaConfig)}, where)


def own_config(given: dict, where: str) -> LlamaConfig:
    """A LlamaConfig out of JSON. Raises ValueError naming the field."""
    scaling = given.get('rope_scaling', ())
    if not isinstance(scaling, list | tuple) or len(scaling) not in (0, 4) or any(type(x) not in (int, float) for x in scaling):
        raise ValueError(f'{where}: rope_scaling={scaling!r:.80}, expected four numbers, or none')
    if scaling and not (all(0 < x < 1e9 for x in scaling) and scaling[1] < scaling[2]):
        raise ValueError(f'{where}: rope_scaling={scaling!r:.80}, expected positive numbers, low_freq_factor the smaller one')
    config = as_config(LlamaConfig, {**given, 'rope_scaling': tuple(scaling)}, where)
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise ValueError(
            f'{where}: num_attention_heads={config.num_attention_heads}, num_key_value_heads={config.num_key_value_heads}, '
            f'head_dim={config.head_dim}: expected a multiple of the second, and an even last one'
        )
    return config


def from_llama(tensors: dict, config: dict) -> dict:
    """The Hub's names -> ours. Raises ValueError if a tied head is no copy, or a tensor there twice."""
    ours = {theirs: name for name, theirs in IN_HUB.items()}
    kept = {name: t for name, t in tensors.items() if not name.endswith('.rotary_emb.inv_freq')}
    named = {'.'.join(ours.get(part, part) for part in name.removeprefix('model.').split('.')): t for name, t in kept.items()}
    if len(named) < len(kept):
        raise ValueError('the base has a tensor twice, with and without model. before its name: expected once')
    return without_copy(named) if config.get('tie_word_embeddings', False) else named


def to_hub(llama: Llama, tensors: dict | None = None) -> dict:
    """The weights, or other tensors by our names, in the Hub's names."""
    tensors = llama.state_dict() if tensors is None else tensors
    return {hub_name(name): t for name, t in tensors.items()}


def hub_name(name: str) -> str:
    """h.0.attn.q_proj.weight -> model.layers.0.self_attn.q_proj.weight; the head keeps its name."""
    path = '.'.join(IN_HUB.get(part, part) for part in name.split('.'))
    return path if path.startswith('lm_head') else f'model.{path}'
