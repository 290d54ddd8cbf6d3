"""GPT-2 in one file: the frozen base that all users share.

Follows the released GPT-2 exactly: learned positions, pre-LayerNorm, tanh-GELU, head tied to the token embedding
(Radford et al. 2019; Hugging Face's GPT2LMHeadModel is the oracle in tests/test_model.py). No dropout: the base is
never trained by the method, and tools/pretrain.py does not need it. This file knows nothing of users or LoRA; lora_moe.py
replaces `nn.Linear` and `MLP` modules inside a finished model. The one trace of that here: an MLP is given what the layer
before decided and returns a pair (output, routing), so that routing is a value that flows and not a global.

Three things here are not the plain formula, for speed on a frozen base: CrossEntropy, Attention on a CPU, and weights
kept in bfloat16 (store_in_bf16). tests/test_model.py compares each with the plain one; tools/bench.py measures them.

Shapes: B sequences, T tokens per sequence, C = n_embd, V = vocab_size, H = n_head, N = B*T.
"""

import contextlib
import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# MKL chooses a kernel for each of these at its first call in a process. If several threads make that call together, one may
# get a less accurate kernel and be 1e-4 off, that once (github.com/pytorch/pytorch/issues/188792): so one thread makes it.
for first in (torch.exp, torch.log, torch.sin, torch.cos, torch.sqrt):
    first(torch.ones(1)), first(torch.ones(1, dtype=torch.float64))

HUB = {name: f'openai-community/{name}' for name in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')}
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')  # Conv1D on the Hub


@dataclass
class GPTConfig:
    """Names and defaults are those of the Hub's config.json; the defaults are GPT-2 124M."""

    vocab_size: int = 50257
    n_positions: int = 1024  # longest sequence, tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    layer_norm_epsilon: float = 1e-5


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """What a product with x is computed in: autocast's dtype where that is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy (nats) of a frozen head, without ever holding all N x V logits: some rows at a time, and because
    d loss / d logits = (softmax - one-hot) / N needs nothing from later on, the gradient of x is made in the same pass."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """x (N, C), weight (V, C), targets (N,) int64 -> scalar, float32. Products and logits are in product_dtype(x). bfloat16
        rounds a logit near -100, as GPT-2 has them, to a half: in evaluation a row is first shifted by its target's logit."""
        dtype, (N, V) = product_dtype(x), (len(x), len(weight))
        with torch.autocast(x.device.type, enabled=False):
            rows, weight, dx = x.to(dtype), weight.to(dtype), torch.empty_like(x)
            chunks = math.ceil(N * V / 2 ** (24 if x.device.type == 'cpu' else 28))  # float32: 64 MiB, 1 GiB
            n = math.ceil(N / chunks)
            logits = rows.new_empty(n, V)  # one buffer for all chunks: fresh pages cost time
            work = logits if dtype == torch.float32 else rows.new_empty(n, V, dtype=torch.float32)
            total = work.new_zeros(())
            for i in range(0, N, n):
                target, z = targets[i : i + n, None], logits[: N - i]  # (n, 1), (n, V)
                e, row = work[: N - i], rows[i : i + n]  # (n, V), (n, C)
                if dtype == torch.float32 or ctx.needs_input_grad[0]:
                    e.copy_(torch.mm(row, weight.t(), out=z))
                    own = e.gather(1, target)  # (n, 1)
                else:
                    own = (row.float() * weight[target[:, 0]].float()).sum(1, keepdim=True)  # (n, 1)
                    shift = -own.to(dtype)
                    e.copy_(torch.addmm(shift, row, weight.t(), out=z))
                    own += shift
                top = e.amax(1, keepdim=True)
                total += (top - own).sum()
                Z = e.sub_(top).exp_().sum(1, keepdim=True)  # (n, 1)
                total += Z.log().sum()
                if ctx.needs_input_grad[0]:  # (softmax - one-hot) W = e W / Z - W[target]
                    dx[i : i + n] = (z.copy_(e) @ weight) / Z - weight[target[:, 0]]
        ctx.save_for_backward(dx)
        return total / N

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:
        (dx,) = ctx.saved_tensors
        return dx * (grad / len(dx)), None, None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of T new tokens to themselves and all S - T before, which are none, or T is 1. q (B, H, T, D), k and v
    (B, G, S, D) -> (B, T, H D). Queries of H / G heads side by side share keys and values; in GPT-2 every head has its own."""
    (B, H, T, D), G = q.shape, k.shape[1]
    if q.device.type == 'cpu' and T <= 128 and torch.is_grad_enabled():  # SDPA's backward is slow there
        future = torch.ones(T, T, dtype=torch.bool).triu(1).repeat(H // G, 1)  # (H/G T, T)
        scores = (q * D**-0.5).reshape(B, G, H // G * T, D) @ k.transpose(-2, -1)  # (B, G, H/G T, S)
        y = scores.masked_fill(future, -torch.inf).softmax(-1).to(v.dtype) @ v  # (B, G, H/G T, D)
        y = y.view(B, H, T, D)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=G < H)  # a lone token is the last and sees all
    return y.transpose(1, 2).reshape(B, T, H * D)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, past: list | None = None) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C). past: as an entry of the cache of GPT.hidden."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, C/H) each
        if past is not None:
            if past:
                k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)  # (B, H, S + T, C/H) each
            past[:] = k, v
        return self.c_proj(attend(q, k, v))  # (B, T, C)


class MLP(nn.Module):
    needs_earlier_tokens = False  # beyond the keys and values that a cache keeps of them

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, routing: None = None) -> tuple[torch.Tensor, None]:
        return self.c_proj(F.gelu(self.c_fc(x), approximate='tanh')), None  # (B, T, C); one MLP, nothing to route


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, routing: object = None, past: list | None = None) -> tuple:
        x = x + self.attn(self.ln_1(x), past)  # (B, T, C)
        y, routing = self.mlp(self.ln_2(x), routing)  # (B, T, C)
        return x + y, routing


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # where a weight is read next, and torch would import sympy to draw one: a second
            super().reset_parameters()


class GPT(nn.Module):
    described_by = 'gpt_config'  # in the metadata of save_gpt
    tokenizer = None  # tokenizer.json beside the base, where that tells which text it reads (llama.py)

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = Embedding(config.vocab_size, config.n_embd)  # also the output head, transposed
        self.wpe = Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.initialise(('attn.c_proj', 'mlp.c_proj'))

    def initialise(self, residual: tuple[str, ...]) -> None:
        """GPT-2's initialisation. residual: the projections into the residual stream, which are scaled by depth."""
        for name, p in self.named_parameters():
            if p.is_meta:
                break
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif 'ln_' not in name:
                small = name.endswith(tuple(f'{part}.weight' for part in residual))
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * len(self.h)) if small else 1))

    @property
    def head_weight(self) -> torch.Tensor:
        return self.wte.weight  # (V, C)

    def embed(self, idx: torch.Tensor, S: int) -> torch.Tensor:
        """Tokens idx (B, T) at positions S, S + 1, ... -> (B, T, C)."""
        return self.wte(idx) + self.wpe.weight[S : S + idx.shape[1]]

    def hidden(self, idx: torch.Tensor, cache: list[list] | None = None) -> tuple[torch.Tensor, list]:
        """Last hidden states and what each layer's MLP says of its routing (None for a plain MLP).

        idx (B, T) int64 -> (B, T, C), list of n_layer. cache, for generating: a list for every layer, empty at first and then
        [keys, values], (B, H, S, C/H) each, of S tokens before idx, which must then be a single one; idx's are added to it.
        Raises ValueError if S + T > n_positions."""
        S = cache[0][0].shape[2] if cache and cache[0] else 0
        end = S + idx.shape[1]
        if end > self.config.n_positions:
            raise ValueError(f'a sequence of {end} tokens, but this base has {self.config.n_positions} positions')
        x = self.embed(idx, S)  # (B, T, C)
        routing, decided = [], None
        for block, past in zip(self.h, cache or [None] * len(self.h)):
            x, decided = block(x, decided, past)
            routing.append(decided)
        return self.ln_f(x), routing

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., V). Logits are float32 under autocast, too: who reads them takes differences of large numbers."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.head_weight.float())

    def forward(self, idx: torch.Tensor) -> tuple[torch.Tensor, list]:
        """idx (B, T) -> logits (B, T, V), routing of every layer."""
        x, routing = self.hidden(idx)
        return self.head(x), routing

    def loss(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, list]:
        """Mean cross-entropy in nats per token, without any auxiliary term; routing of every layer.

        idx, targets (B, T); targets are idx one position later."""
        x, routing = self.hidden(idx)
        x, targets = x.flatten(0, 1), targets.flatten()  # (N, C), (N,)
        if self.head_weight.requires_grad and torch.is_grad_enabled():  # pretrain.py: the head is trained too
            return F.cross_entropy(self.head(x), targets), routing
        return CrossEntropy.apply(x, self.head_weight, targets), routing

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, n: int, temperature=1.0, top_k=None, seed=None, cached=True) -> Iterator[torch.Tensor]:
        """Yields n sampled tokens (B, 1) that continue idx (B, T), T >= 1, each as soon as it is known: see `choose`.

        The seed fixes the sample. The context is the last n_positions tokens. cached=False computes it anew for every token.
        Raises ValueError on an empty prompt or a senseless temperature or top_k."""
        if idx.shape[1] < 1 or not temperature >= 0 or (top_k is not None and top_k < 1):
            raise ValueError(
                f'a prompt of {idx.shape[1]} tokens, temperature {temperature}, top_k {top_k}: expected 1, 0, 1 at least'
            )
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        cached = cached and not any(block.mlp.needs_earlier_tokens for block in self.h)
        cache = [[] for _ in self.h] if cached else None
        for _ in range(n):
            if idx.shape[1] > self.config.n_positions:
                cache = None  # positions are absolute: where the window slides, every token gets a new one
            x, _ = self.hidden(idx[:, -1:] if cache and cache[0] else idx[:, -self.config.n_positions :], cache)
            new = choose(self.head(x[:, -1]), temperature, top_k, generator)  # (B, 1)
            idx = torch.cat((idx, new), dim=1)
            yield new

    def generate(self, idx: torch.Tensor, n: int, **how) -> torch.Tensor:
        """idx (B, T) and what `stream` adds to it -> (B, T + n)."""
        return torch.cat((idx, *self.stream(idx, n, **how)), dim=1)


def choose(logits: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> torch.Tensor:
    """One token of each row of logits (B, V) -> (B, 1): the likeliest if temperature is 0, else drawn from
    softmax(logits / temperature) over the top_k likeliest (None: all; ties with the last of them stay in)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


# ---- what a model is worth: perplexity of a whole stream (METHOD 0.3) ------------------------------------------------
@torch.no_grad()
def evaluate(model: GPT, tokens: np.ndarray, block_size: int, quiet: bool = False) -> dict:
    """Mean cross-entropy of a whole stream and how its tokens were routed.

    Every token but the first is predicted once, in non-overlapping windows of block_size (the last may be shorter), so no
    sampling. Returns loss (nats per token, without load balancing), ppl = exp(loss), tokens, and for a model with routers
    scores (L, E): mean softmax score of every expert in every layer, top1 (L, E): share of tokens whose best it is. A
    terminal shows a bar if it takes long, unless quiet."""
    n, total, sums = len(tokens) - 1, 0.0, {}
    batches = windows(tokens, block_size, model.wte.weight.device)
    for x, y in tqdm(batches, desc='evaluate', delay=2, leave=False, disable=quiet or None):
        loss, routing = model.loss(x, y)
        total += loss.item() * y.numel()
        if routing[0] is not None:
            E = routing[0].probs.shape[1]
            seen = torch.stack([r.probs.sum(0) for r in routing]).cpu().double()  # (L, E)
            best = torch.stack([r.chosen[:, 0].bincount(minlength=E) for r in routing]).cpu().double()  # (L, E)
            sums = {'scores': sums.get('scores', 0) + seen, 'top1': sums.get('top1', 0) + best}
    shares = {key: (sums[key] / n).tolist() if sums else None for key in ('scores', 'top1')}
    return {'loss': total / n, 'ppl': perplexity(total / n), 'tokens': n, **shares}


def windows(tokens: np.ndarray, block_size: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A stream as batches of windows that do not overlap, and a last, shorter one: x, y (rows, T) each, y one token later."""
    n = len(tokens) - 1
    stream = torch.from_numpy(np.asarray(tokens).astype(np.int64)).to(device)
    whole = n // block_size * block_size
    x, y = stream[:whole].view(-1, block_size), stream[1 : whole + 1].view(-1, block_size)  # (windows, T) each
    rows = max(1, (1024 if device.type == 'cpu' else 2**14) // block_size)  # at a time: activations in a CPU's cache
    batches = [*zip(x.split(rows), y.split(rows))] if whole else []
    return batches + [(stream[None, whole:n], stream[None, whole + 1 :])] if whole < n else batches


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; inf where a float cannot hold it."""
    return math.exp(loss) if loss < 709 else math.inf


def fingerprint(model: GPT) -> str:
    """SHA-256 over all weights: which base an adapter belongs to."""
    digest = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        digest.update(name.encode() + p.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- a base from the Hub or a file -----------------------------------------------------------------------------------
def load_gpt(source: str) -> GPT:
    """A GPT-2 in float32 on the CPU: see `read_base`. llama.load_base also takes the Llama family."""
    return gpt_of(*read_base(source), source)


def gpt_of(tensors: dict, config: dict, where: str, source: str) -> GPT:
    """A GPT-2 out of what `read_base` returned. Raises ValueError if it is none."""
    if where.startswith(f'{GPT.described_by} in '):
        return filled(GPT, as_config(GPTConfig, config, where), tensors, source)
    return filled(GPT, hub_config(config, where), from_hub(tensors), source)


def read_base(source: str, hub: dict[str, str] = HUB) -> tuple[dict, dict, str]:
    """({name: tensor}, config, where that stood) of a base, from one of

    - a name in `hub`, or owner/name: safetensors of the Hub, or of its cache (HF_HOME and HF_HUB_OFFLINE are honoured);
    - a folder in the Hub's format: config.json, and the weights that `weight_files` finds;
    - a .safetensors file written by save_gpt (our own format), or one of the Hub's with config.json beside it.

    Raises ValueError or OSError with one line that says what is wrong. Never executes code from a file."""
    own = Path(__file__).resolve().parent / source  # such as assets/base-tiny.safetensors, from every folder
    path = own if own.exists() and not Path(source).exists() else Path(source)
    files = download(hub.get(source, source)) if on_hub(source, hub) else weight_files(path, hub)
    tensors, given, where = {}, None, files[0].parent / 'config.json'
    for file in files:
        found, metadata = read_tensors(file)
        for name, t in found.items():
            if re.search(r'lora_|\.lora\.|\.generalists\.|\.specialists\.', name):
                raise ValueError(f'{file} is an adapter: expected its base (--init_adapter takes it in a folder of PEFT)')
            if tensors.setdefault(name.removeprefix('transformer.'), t) is not t:
                raise ValueError(f'{source} has {name} twice, in several files or as transformer.{name}: expected once')
        for kind in ('gpt_config', 'llama_config'):
            if kind in metadata:
                given, where = read_json(file, metadata[kind]), f'{kind} in {file}'
    return tensors, read_json(where) if given is None else given, str(where)


def on_hub(source: str, hub: dict[str, str] = HUB) -> bool:
    """Whether a base is to be had from the Hub: a short name, or an owner/name that is no path here."""
    named = re.fullmatch(r'[\w-][\w.-]*/[\w-][\w.-]*', source) and not source.endswith(('.safetensors', '.bin'))
    folders = (Path(source).parent, Path(__file__).resolve().parent / Path(source).parent)
    return source in hub or bool(named and not any(folder.exists() for folder in folders))


def filled(kind: type, config: object, tensors: dict, source: str) -> GPT:
    """A model of that class with these weights, in float32. Raises ValueError unless they are what its config describes."""
    with torch.device('meta'):
        model = kind(config)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    wrong = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
    if wrong:
        raise ValueError(
            f'{source} is not the {kind.__name__} that its config describes: {len(wrong)} tensors differ, first {wrong[0]}: '
            f'expected {expected.get(wrong[0], "nothing")}, found {given.get(wrong[0], "nothing")}'
        )
    for name, t in tensors.items():
        if not t.is_floating_point() or not torch.stack(t.float().aminmax()).isfinite().all():  # min and max of NaN are NaN
            raise ValueError(f'{source}: {name} ({t.dtype}) must be of floating point, and all finite in float32')
    # a copy: weights in a mapped file lie in small pages, and a step that reads them there is slower (docs/speed.md)
    model.load_state_dict({name: t.to(torch.float32, copy=True).contiguous() for name, t in tensors.items()}, assign=True)
    return model


def download(repo: str) -> list[Path]:
    """The weights of a Hub repository, beside them config.json and a Llama's tokenizer.json, if there is one; shows the
    client's bar and no line of it. Raises OSError, or ValueError for what is no base."""
    import huggingface_hub as hub
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError, logging

    logging.set_verbosity_error()
    warnings.filterwarnings('ignore', module='huggingface_hub')
    cause = None
    for cached in (False, True):

        def get(*names: str) -> list[Path]:
            return [Path(hub.hf_hub_download(repo, name, local_files_only=cached)) for name in names]

        try:
            if not cached:
                hub.get_hf_file_metadata(hub.hf_hub_url(repo, 'config.json'))  # asks once; a download tries for half a minute
            config = read_json(get('config.json')[0])
            try:
                weights = get('model.safetensors')
            except EntryNotFoundError:  # a large base is in parts, which an index lists
                index = get('model.safetensors.index.json')[0]
                names = listed_in(index)
                if odd := [name for name in names if not re.fullmatch(r'[\w.-]+\.safetensors', name)]:
                    raise ValueError(f'{index} lists {", ".join(odd)[:150]}: expected names of .safetensors files')
                weights = get(*names)
            if config.get('model_type') != 'gpt2':  # those of GPT-2 are all the same
                try:
                    get('tokenizer.json')
                except EntryNotFoundError as error:  # there is none; or the connection failed, and that is not known
                    unknown = hub.try_to_load_from_cache(repo, 'tokenizer.json') is None
                    if isinstance(error, LocalEntryNotFoundError) and unknown:
                        raise
            return weights
        except Exception as error:  # the client raises many kinds, all meaning: not there
            cause = cause or error
    if type(cause) is ValueError:  # no fault of the connection: our own line on what was fetched
        raise cause
    raise not_from_hub(repo, cause)


def not_from_hub(repo: str, cause: Exception) -> OSError:
    """What is said of a repository that the client could not get, with the advice that fits the cause."""
    from huggingface_hub.utils import EntryNotFoundError, OfflineModeIsEnabled

    status = getattr(getattr(cause, 'response', None), 'status_code', None)
    fix = 'unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE' if isinstance(cause, OfflineModeIsEnabled) else 'connect once'
    if isinstance(cause, EntryNotFoundError) and status:
        fix = 'choose one that has config.json and model.safetensors'
    elif isinstance(cause, ValueError):
        fix = 'write owner/name as the Hub does'
    elif status:
        fix = 'check HF_ENDPOINT and HF_TOKEN (`hf auth login`)' if status in (401, 403, 404) else 'try again later'
    elif getattr(cause, 'strerror', None):
        fix = f'{cause.strerror}: make room, or set HF_HOME to a folder that can be written'
    return OSError(
        f'cannot get {repo} from the Hugging Face Hub ({status or type(cause).__name__}): {fix}, or copy its config.json and '
        'weights into a folder and give that folder as the base (--init_from, of tools/export.py --base)'
    )


def weight_files(path: Path, hub: dict[str, str] = HUB) -> list[Path]:
    """The file of a base, or those of a folder: what an index lists, else the one with the Hub's name, else the only one;
    safetensors before pickles. Raises ValueError, one line, if that leaves none or several, or is a part of a base."""
    if not path.exists():
        raise ValueError(f'no base model at {str(path)!r}: give a file, a folder, or one of {", ".join(hub)}')
    folder, seen = path if path.is_dir() else path.parent, []
    for name, pattern in (('model.safetensors', '*.safetensors'), ('pytorch_model.bin', 'pytorch_model*.bin')):
        index, found = folder / f'{name}.index.json', [folder / name] * (folder / name).exists()
        if index.exists():
            names = listed_in(index)
            found = [folder / name for name in names]
            if lost := [name for name, file in zip(names, found) if file.parent != folder or not file.is_file()]:
                raise ValueError(f'{index} lists {", ".join(lost)[:150]}: expected files beside it: copy them or remove it')
            if path in found and found[1:]:
                raise ValueError(f'{path} is one of {len(found)} files of a base: give their folder, {folder}')
        found = found or sorted(f for f in folder.glob(pattern) if f.is_file() and f.name[0] != '.')
        if path == folder and (index.exists() or len(found) == 1):
            return found
        seen += [file.name for file in found]
    if path != folder:
        return [path]
    seen = ', '.join(seen[:4]) or 'neither *.safetensors nor pytorch_model.bin'
    raise ValueError(f'{path} holds {seen}: expected model.safetensors, or give one file')


def listed_in(index: Path) -> list[str]:
    """The files of a base in parts, as its index names them."""
    listed = read_json(index).get('weight_map')
    return sorted({*map(str, listed.values())}) if isinstance(listed, dict) and listed else ['nothing']


def read_tensors(file: Path) -> tuple[dict, dict]:
    """({name: tensor}, metadata) of a .safetensors or a pickled file of plain tensors. Raises ValueError if unreadable."""
    from safetensors import safe_open

    with contextlib.suppress(Exception):  # theirs speak to programmers, and of a pickle tell how to run its code
        if file.suffix != '.bin':
            with safe_open(file, framework='pt') as f:
                return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}
        tensors = torch.load(file, map_location='cpu', weights_only=True)
        if all(isinstance(n, str) and (t.layout, t.device.type) == (torch.strided, 'cpu') for n, t in tensors.items()):
            return tensors, {}
    raise ValueError(f'{file} cannot be read as model weights: {what_it_is(file)}')


def read_json(file: Path, text: str | None = None) -> dict:
    """The object in a JSON file, or in a text out of it. Raises ValueError if there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if isinstance(found := json.loads(file.read_bytes() if text is None else text), dict):
            return found
    raise ValueError(f'{file} cannot be read as a JSON object {{...}}: {what_it_is(file)}')


def what_it_is(file: Path) -> str:
    """Of a file that cannot be read: what it is, and what to do."""
    try:
        with open(file, 'rb') as f:
            head = f.read(20)
    except OSError as error:
        return f'{error.strerror}, expected a file that can be read'
    if head.startswith(b'version https://git'):
        return 'it is a Git LFS pointer, and `git lfs pull` gets the file itself'
    if re.fullmatch(rb'(\xef\xbb\xbf)?[\t\n\r -~]+', head[:8]):
        return f'it is text that begins with {head.decode(errors="replace")!r}, maybe of a failed download: get it again'
    if head and (head.startswith(b'PK') or file.suffix not in ('.safetensors', '.json')):
        return 'it is not tensors alone in a format that is read: write it with save_pretrained of transformers'
    return 'it is empty, cut short, damaged or of another format: copy or download it again'


MOST = {'layer_norm_epsilon': 1, 'rms_norm_eps': 1, 'n_layer': 1024, 'num_hidden_layers': 1024, 'rope_theta': 1e12}


def as_config(kind: type, given: dict, where: str) -> object:
    """A dataclass of that kind out of JSON. Raises ValueError unless every field is there, and no other, of its type and in its
    range."""
    types = {f.name: f.type for f in fields(kind)}
    if given.keys() != types.keys():
        raise ValueError(f'{where} is not {", ".join(types)}: write the file again with save_gpt')
    for name, wanted in types.items():
        value, most = given[name], MOST.get(name, 2**24)
        if wanted in (int, float) and (type(value) not in (int, wanted) or not 0 < value <= most):
            raise ValueError(f'{where}: {name}={value!r:.40}, expected {wanted.__name__} above 0 and up to {most}')
        if wanted is bool and type(value) is not bool:
            raise ValueError(f'{where}: {name}={value!r:.40}, expected true or false')
    config = kind(**given)
    if 'n_embd' in types and config.n_embd % config.n_head:  # a Llama says head_dim
        raise ValueError(f'{where}: n_embd={config.n_embd} is no multiple of n_head={config.n_head}')
    return config


def hub_config(given: dict, where: str) -> GPTConfig:
    """config.json of the Hub -> GPTConfig. Raises ValueError if it describes another model than GPT-2."""
    if given.get('model_type') != 'gpt2':
        raise ValueError(f'{where} describes a {given.get("model_type")!r:.40} model, but the base must be a gpt2')
    config = as_config(GPTConfig, {f.name: given.get(f.name, f.default) for f in fields(GPTConfig)}, where)
    fixed = {'activation_function': ('gelu_new',), 'n_inner': (None, 4 * config.n_embd), 'scale_attn_weights': (True,)}
    fixed |= {'tie_word_embeddings': (True,), 'scale_attn_by_inverse_layer_idx': (False,)}
    fixed |= {'num_attention_heads': (config.n_head,)}  # transformers would take it for n_head
    hold_to(fixed, given, where, 'GPT-2')
    return config


def hold_to(fixed: dict[str, tuple], given: dict, where: str, what: str) -> None:
    """Raises ValueError unless every field that is given has one of its values, of which the first is the rule."""
    for key, legal in fixed.items():
        if given.get(key, legal[0]) not in legal:
            raise ValueError(f'{where}: {key}={given[key]!r:.40} is not {what} as released ({legal[0]!r})')


def from_hub(tensors: dict) -> dict:
    """The Hub's layouts -> ours: no causal-mask buffers, Linear (out, in), no head, which must be a copy: else ValueError."""
    kept = {name: t for name, t in tensors.items() if not name.endswith(('.attn.bias', '.attn.masked_bias'))}
    return {name: t.transpose(0, -1) if name.endswith(TRANSPOSED) else t for name, t in without_copy(kept).items()}


def without_copy(tensors: dict) -> dict:
    """Without lm_head.weight, if that is the embedding once more. Raises ValueError if it is not."""
    tied, head = tensors.get('wte.weight'), tensors.get('lm_head.weight')
    if head is not None and (tied is None or head.shape != tied.shape or not head.float().equal(tied.float())):
        raise ValueError('lm_head.weight of the base is not its wte.weight: expected tied embeddings, as its config says')
    return {name: t for name, t in tensors.items() if name != 'lm_head.weight'}


# ---- how its numbers are held and multiplied -------------------------------------------------------------------------
def usable(device: str) -> str:
    """The device's name. Raises ValueError unless this machine has such a one."""
    n = torch.cuda.device_count()
    here = ['cpu', *['cuda'] * (n > 0), *(f'cuda:{i}' for i in range(n)), *['mps'] * torch.backends.mps.is_available()]
    if device not in here:
        raise ValueError(f'cannot use the device {device}: this machine has {", ".join(here)}; give --device=cpu')
    return device


def autocast(device: torch.device | str, dtype: str) -> contextlib.AbstractContextManager:
    """Products in bfloat16 if that is the dtype (the LoRAs, LayerNorms and the residual stream stay float32), else nothing."""
    return torch.autocast(torch.device(device).type, torch.bfloat16) if dtype == 'bfloat16' else contextlib.nullcontext()


def store_in_bf16(model: GPT) -> None:
    """Keeps the frozen weights of all products in bfloat16, which autocast would otherwise cast again at every call; runs
    under autocast give the same products. Positions and LayerNorms stay float32, and with them the residual stream."""
    for name, p in model.named_parameters():
        if 'ln_' not in name and name != 'wpe.weight':
            p.data = p.data.to(torch.bfloat16)


def fast_fp32(device_type: str) -> bool:
    """Lets float32 products on a CPU run in oneDNN, here 2.2x as fast as MKL on an AMD one, if they stay float32; says so.

    The setting only *allows* bfloat16, and a CPU with AMX may use it: so it is tried against float64 in every layout that
    training uses, and taken back when an error is above 1e-6 (float32: 4e-7; bfloat16: 3e-3). CUDA is left alone."""
    setting = torch.backends.mkldnn.matmul
    if device_type != 'cpu' or not torch.backends.mkldnn.is_available():
        return False
    before, setting.fp32_precision = setting.fp32_precision, 'bf16'
    generator = torch.Generator().manual_seed(0)
    for n, k, m in ((256, 768, 512), (1024, 128, 384), (512, 8, 768), (64, 1024, 8)):
        a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, k), (k, m)))
        exact = a @ b
        for layout in (lambda t: t, lambda t: t.t().contiguous().t()):
            error = (layout(a.float()) @ layout(b.float()) - exact).norm() / exact.norm()
            if not error < 1e-6:  # NaN is no pass either
                setting.fp32_precision = before
                return False
    return True


def save_gpt(model: GPT, file: str | Path, dtype: torch.dtype = torch.float32, **notes: str) -> None:
    """Writes our own format: one .safetensors with the configuration, and any notes, in its metadata."""
    from safetensors.torch import save_file

    save_file(
        {name: p.detach().to(dtype).contiguous() for name, p in model.state_dict().items()},
        file,
        metadata={model.described_by: json.dumps(asdict(model.config)), **notes},
    )
