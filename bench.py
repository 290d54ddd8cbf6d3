"""Speed and memory, measured against the code that most people would write: eleven goals, one table.

    python bench.py --quick                          # two experts, 3 rounds: about a minute, what it cannot tell is left open
    python bench.py                                  # everything: about 15 minutes on two cores
    python bench.py --only=fp32,memory               # some of the parts; the others keep what the JSON file has of them
    python bench.py --check                          # exit code 1 and the names of the goals missed; 2 if the machine was noisy

GPT-2 124M with random weights (nothing is downloaded), batches of 8 x 128 random tokens (64 x 128 on CUDA); no figure here is
about a model's quality. A step is forward, backward and AdamW. Every ratio is between two things timed in the same process in
turn, the order reversed every round, and of the two ratios, the median of the paired ones and that of the two fastest times,
the weaker counts. Baseline P is Plain* below. The float32 setting of train.py (fast_fp32) holds for both sides."""

import argparse
import contextlib
import copy
import gc
import hashlib
import importlib.util
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from eval import evaluate, table
from lora_moe import LoRA, LoRAMoE, Routing, add_lora, load_balance_loss, roles
from model import GPT, GPTConfig, fast_fp32, save_gpt, store_in_bf16

ROOT = Path(__file__).resolve().parent
PARTS = ('gradients', 'fp32', 'bf16', 'compiled', 'memory', 'start')
NOISE = 0.15  # of the products' rate between the start and the end of a part: no verdict above it


# ---- baseline P: full MLP per expert, tokens dispatched by torch.where, full logits, autograd throughout -------------------
class PlainLinear(nn.Module):
    """W x + b + γ B A x."""

    def __init__(self, frozen: nn.Linear, lora: LoRA):
        super().__init__()
        self.frozen, self.lora = frozen, copy.deepcopy(lora)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(x) + self.lora.scaling * F.linear(F.linear(x, self.lora.A), self.lora.B)


class PlainExpert(nn.Module):
    """A whole MLP with its own copy of the frozen weights."""

    def __init__(self, moe: LoRAMoE, expert: nn.Module):
        super().__init__()
        self.c_fc = PlainLinear(copy.deepcopy(moe.c_fc), expert.c_fc)
        self.c_proj = PlainLinear(copy.deepcopy(moe.c_proj), expert.c_proj)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))


class PlainMixture(nn.Module):
    def __init__(self, moe: LoRAMoE):
        super().__init__()
        self.top_k, self.router = moe.top_k, copy.deepcopy(moe.router)
        self.generalists = nn.ModuleList([PlainExpert(moe, e) for e in moe.generalists])
        self.specialists = nn.ModuleList([PlainExpert(moe, e) for e in moe.specialists])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing | None]:
        experts, shape = [*self.generalists, *self.specialists], x.shape
        x = x.flatten(0, 1)  # (N, C)
        if self.router is None:
            return experts[0](x).view(shape), None
        with torch.autocast(x.device.type, enabled=False):
            logits = self.router(x.float())  # (N, E)
        best, chosen = logits.topk(self.top_k)  # (N, K) each
        probs = logits.softmax(-1)
        weights = best.softmax(-1) if self.top_k > 1 else probs.gather(1, chosen)
        y = torch.zeros_like(x)
        for j, expert in enumerate(experts):
            token, slot = torch.where(chosen == j)  # (N_j,) each
            y[token] += (weights[token, slot, None] * expert(x[token])).to(y.dtype)
        return y.view(shape), Routing(probs, chosen, weights)


class PlainGPT(nn.Module):
    """A user's model with the same values, in the form above. Its own tensors have the names of the user's own."""

    def __init__(self, user: GPT):
        super().__init__()
        self.n_head, self.wte, self.wpe, self.ln_f = user.config.n_head, user.wte, user.wpe, user.ln_f
        self.h = nn.ModuleList()
        for block in user.h:
            attn = nn.ModuleDict({name: PlainLinear(old.frozen, old.lora) for name, old in block.attn.named_children()})
            self.h.append(nn.ModuleDict({'ln_1': block.ln_1, 'attn': attn, 'ln_2': block.ln_2, 'mlp': PlainMixture(block.mlp)}))

    def loss(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, list]:
        x, routing = self.wte(idx) + self.wpe.weight[: idx.shape[1]], []
        for block in self.h:
            qkv = block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in qkv)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
            y, decided = block.mlp(block.ln_2(x))
            x = x + y
            routing.append(decided)
        logits = F.linear(self.ln_f(x), self.wte.weight)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), routing


# ---- what is compared ------------------------------------------------------------------------------------------------------
def new_base(args: argparse.Namespace) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(args.vocab_size, 1024, args.n_layer, args.n_head, args.n_embd)).to(args.device)


def new_user(base: GPT, n: int, top_k: int = 2, seed: int = 0) -> GPT:
    """A user of n experts, rank 8, whose LoRAs are not zero: all gradients are then at work."""
    model = add_lora(base, n, 1, 8, top_k=top_k)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in roles(model):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    return model.train()


def batch(args: argparse.Namespace, B: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    idx = torch.randint(args.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(1)).to(args.device)
    return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()


def autocast(args: argparse.Namespace, dtype: str) -> contextlib.AbstractContextManager:
    return torch.autocast(args.device, torch.bfloat16) if dtype == 'bf16' else contextlib.nullcontext()


def training_step(
    args: argparse.Namespace, loss: Callable, parameters: Iterable, data: tuple, dtype: str, micro: int | None = None
) -> Callable:
    """A function that makes one optimizer step on the batch, with a backward for every micro-batch."""
    parameters = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    x, y = data
    micro = micro or len(x)

    def step():
        for p in parameters:
            p.grad = None
        for xs, ys in zip(x.split(micro), y.split(micro)):
            with autocast(args, dtype):
                ce, routing = loss(xs, ys)
                total = ce + 0.01 * load_balance_loss(routing, 'generalist')
            (total * (len(xs) / len(x))).backward()
        optimizer.step()

    return step


def bound_step(args: argparse.Namespace, base: GPT, data: tuple, dtype: str) -> Callable:
    """The base's own forward and the gradients of its activations: what every method on this base has to pay. The bias of the
    first c_attn asks for a gradient, so that as in training none flows below it."""
    base = copy.deepcopy(base)
    only = base.requires_grad_(False).h[0].attn.c_attn.bias.requires_grad_()

    def step():
        only.grad = None
        with autocast(args, dtype):
            loss, _ = base.loss(*data)
        loss.backward()

    return step


def peft_step(args: argparse.Namespace, data: tuple, dtype: str) -> Callable:
    """transformers + PEFT, LoRA of rank 16 on the same four linears: as many active LoRA columns as two experts of rank 8."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=args.vocab_size,
        n_embd=args.n_embd,
        n_layer=args.n_layer,
        n_head=args.n_head,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    lora = LoraConfig(
        r=16, lora_alpha=16, target_modules=['c_attn', 'c_proj', 'c_fc'], fan_in_fan_out=True, init_lora_weights=False
    )
    model = get_peft_model(GPT2LMHeadModel(config), lora).to(args.device).train()
    return training_step(args, lambda x, y: (model(input_ids=x, labels=x).loss, [None]), model.parameters(), data, dtype)


def evaluation_step(args: argparse.Namespace, user: GPT, dtype: str, n: int) -> Callable:
    """eval.py's evaluate on a stream with n tokens to predict."""
    tokens = np.random.default_rng(0).integers(0, args.vocab_size, n + 1)

    def step():
        with autocast(args, dtype):
            evaluate(user, tokens, 128)

    return step


def flops(args: argparse.Namespace, T: int = 128, K: int = 2) -> dict:
    """FLOPs of a token: `step`, a training step with K active experts of rank 8; `plain`, the same in P's form; `forward`.

    Frozen weights have no gradient, and nothing flows below the first block's LoRA. Products only; a LoRA costs three times
    its forward, attention's two products count T x T (causality is not used by them)."""
    L, d, V = args.n_layer, args.n_embd, args.vocab_size
    weights, head, attention = 12 * L * d * d, V * d, 4 * T * d * L
    lora = 2 * L * (8 * 4 * d + 8 * 2 * d + K * 2 * 8 * 5 * d)  # c_attn, c_proj, K x (c_fc, c_proj), forward
    step = 4 * (weights + head) - 6 * d * d + 3 * attention + 3 * lora
    return {'step': step, 'plain': step + (K - 1) * 4 * L * 8 * d * d, 'forward': 2 * (weights + head) + attention + lora}


# ---- measuring -------------------------------------------------------------------------------------------------------------
def seconds(function: Callable, device: str) -> float:
    """Of one call; on CUDA between two events, so that the queue stays full and only its end is waited for."""
    if device == 'cuda':
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    tic = time.perf_counter()
    function()
    return time.perf_counter() - tic


def race(steps: dict, rounds: int, device: str) -> dict:
    """{name: function} -> {name: seconds of every round}; two warm-ups each, then all in turn, every second round backwards."""
    for step in steps.values():
        step(), step()
    times = {name: [] for name in steps}
    for i in range(rounds):
        for name in list(steps)[:: 1 if i % 2 == 0 else -1]:
            times[name].append(seconds(steps[name], device))
    return times


def ratios(a: list, b: list) -> tuple[float, float]:
    """Times a over times b: the median of the paired ratios, and the ratio of the two fastest."""
    return statistics.median(x / y for x, y in zip(a, b)), min(a) / min(b)


def speedup(slow: list, fast: list) -> float:
    """The weaker of the two ratios for a claim of 'at least so much faster'."""
    return min(ratios(slow, fast))


def cost(step: list, reference: list) -> float:
    """The weaker of the two ratios for a claim of 'at most so much slower'."""
    return max(ratios(step, reference))


def product_rate(args: argparse.Namespace, dtype: str) -> float:
    """FLOP/s of the model's five products x W^T at 1024 rows (8192 on CUDA): the best shape's median of 7."""
    d, V, best = args.n_embd, args.vocab_size, 0.0
    for n_in, n_out in ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d), (d, V)):
        x, W = (
            torch.randn(n, n_in, device=args.device, dtype=torch.bfloat16 if dtype == 'bf16' else torch.float32)
            for n in (8192 if args.device == 'cuda' else 1024, n_out)
        )
        out = x @ W.t()
        times = [seconds(lambda: torch.mm(x, W.t(), out=out), args.device) for _ in range(9)][2:]
        best = max(best, 2 * len(x) * n_in * n_out / statistics.median(times))
    return best


def compare(ours: GPT, plain: nn.Module, args: argparse.Namespace, data: tuple, dtypes: tuple = ('fp32', 'fp32')) -> dict:
    """Ours against P's: `worst` relative error of loss and gradients, least `cosine` of a gradient, and of all `together`. NaN
    is refused."""
    found = []
    for model, dtype in zip((ours, plain), dtypes):
        model.zero_grad()
        with autocast(args, dtype):
            loss, routing = model.loss(*data)
            (loss + 0.01 * load_balance_loss(routing, 'generalist')).backward()
        trained = {name.replace('.lora', ''): p for name, p in model.named_parameters() if p.requires_grad}
        found.append((loss.item(), {name: p.grad.double().flatten() for name, p in trained.items()}))
        model.zero_grad()
    (a, ours_grads), (b, plain_grads) = found
    if ours_grads.keys() != plain_grads.keys() or not ours_grads:
        sys.exit('the two models do not train the same tensors')
    errors, cosines = [abs(a - b) / abs(b)], []
    for name, g in plain_grads.items():
        mine = ours_grads[name]
        if not math.isfinite(mine.norm()) or not math.isfinite(g.norm()):
            sys.exit(f'the gradient of {name} is not finite: nothing is timed')
        if g.norm() > 0:
            errors.append(((mine - g).norm() / g.norm()).item())
            cosines.append(F.cosine_similarity(mine, g, dim=0).item())
        elif mine.norm() > 0:  # an expert that no token chose has a gradient of 0
            sys.exit(f'the gradient of {name} is 0 in P, and here it is not: nothing is timed')
    together = F.cosine_similarity(*(torch.cat([grads[name] for name in plain_grads]) for _, grads in found), dim=0).item()
    if not math.isfinite(errors[0]):
        sys.exit('the loss is not finite: nothing is timed')
    return {'worst': max(errors), 'cosine': min(cosines), 'tensors': len(cosines), 'of': len(plain_grads), 'together': together}


# ---- the parts: each returns what goes into the JSON file --------------------------------------------------------------------
def gradients(args: argparse.Namespace) -> dict:
    """Goal 8, before any timing."""
    base, result = new_base(args), {}
    data = batch(args, 2, 128)
    for n in (1, 2) if args.quick else (1, 2, 4, 8):
        for k in (1, 2) if n > 1 else (2,):
            ours = new_user(base, n, k)
            plain = PlainGPT(ours)
            result[f'n={n} top_k={k}'] = compare(ours, plain, args, data)
            if (n, k) == (2, 2):
                low = copy.deepcopy(base)
                store_in_bf16(low)
                result['bf16'] = compare(new_user(low, n, k), plain, args, data, ('bf16', 'fp32'))
            print(f'  gradients {list(result)[-1]}: {list(result.values())[-1]}', flush=True)
            if not result[f'n={n} top_k={k}']['worst'] < 1e-3:
                sys.exit(f'n={n}, top_k={k}: the gradients are not those of P: nothing is timed')
    return result


def speed(args: argparse.Namespace, dtype: str, compiled: bool = False) -> dict:
    """Goals 1 to 6 and 9."""
    B, T = (64, 128) if args.device == 'cuda' else (8, 128)
    base, data = new_base(args), batch(args, B, T)
    own = copy.deepcopy(base)
    if dtype == 'bf16':
        store_in_bf16(own)
    steps = {}
    for n in (2,) if args.quick or compiled else (2, 8):
        user = new_user(own, n)
        plain = PlainGPT(new_user(base, n))
        found = compare(user, plain, args, (data[0][:2], data[1][:2]), (dtype, 'fp32'))
        if not found['together'] > (0.9999 if dtype == 'fp32' else 0.9):  # bf16 flips near-tied choices of 8
            sys.exit(f'{dtype}, n={n}: the gradients are not those of P ({found}): nothing is timed')
        steps[f'P n={n}'] = training_step(args, plain.loss, plain.parameters(), data, dtype)
        steps[f'ours n={n}'] = training_step(args, user.loss, user.parameters(), data, dtype)
    user = new_user(own, 2)
    if compiled:
        tic = time.perf_counter()
        steps['ours n=2 compiled'] = training_step(args, torch.compile(user.loss), user.parameters(), data, dtype)
        steps['ours n=2 compiled']()
        print(f'  compiled in {time.perf_counter() - tic:.0f} s', flush=True)
    else:
        steps['base'] = bound_step(args, own, data, dtype)
        steps['evaluation'] = evaluation_step(args, user, dtype, 2 * B * T)
        if not args.quick and importlib.util.find_spec('peft') and importlib.util.find_spec('transformers'):
            steps['PEFT r=16'] = peft_step(args, data, dtype)
    first = product_rate(args, dtype)
    times = race(steps, args.rounds, args.device)
    peaks = [first, product_rate(args, dtype)]
    return {'seconds': times, 'tokens': B * T, 'peaks': peaks, 'flops': flops(args)}


def peak_memory(reset: bool = False) -> float:
    """Bytes this process has held at most so far, or on Linux and CUDA since the last reset; on CUDA, of the device."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats() if reset else None
        return torch.cuda.max_memory_allocated()
    if sys.platform == 'linux':
        if reset:
            Path('/proc/self/clear_refs').write_text('5')
        status = Path('/proc/self/status').read_text()
        return 1024 * int(status.split('VmHWM:')[1].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def worker(args: argparse.Namespace, what: str) -> float:
    """Peak memory in a process of its own: of a step ('ours bf16 64x8': 64 windows in micro-batches of 8), or of so many users
    who all have made a step ('users fp32 32')."""
    name, dtype, *shape = what.split()
    base = new_base(args)
    if dtype == 'bf16' and name != 'P':
        store_in_bf16(base)
    if name == 'users':  # as in train.py: all are made, then train in turn
        users = [new_user(base, 2, seed=i) for i in range(int(shape[0]))]
        frozen, role = {p.data_ptr() for p in base.parameters()}, roles(users[0])
        for user in users:
            if {p.data_ptr() for name, p in user.named_parameters() if name not in role} != frozen:
                sys.exit('a user has a base of its own')
        steps = [training_step(args, user.loss, user.parameters(), batch(args, 1, 32), dtype) for user in users]
        for user, step in zip(users, steps):
            step()
            user.zero_grad()
        return peak_memory()
    windows, micro = map(int, shape[0].split('x'))
    model = new_user(base, 2)
    model = PlainGPT(model) if name == 'P' else model
    step = training_step(args, model.loss, model.parameters(), batch(args, windows, 128), dtype, micro)
    del base
    gc.collect()
    peak_memory(reset=True)
    step(), step()
    return peak_memory()


def in_fresh_process(args: argparse.Namespace, what: str) -> float:
    size = [f'--{name}={getattr(args, name)}' for name in ('n_layer', 'n_head', 'n_embd', 'vocab_size', 'device')]
    done = subprocess.run([sys.executable, __file__, f'--worker={what}', *size], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f'--worker={what} failed: {done.stderr.strip()[-400:]}')
    return float(done.stdout.split()[-1])


def memory(args: argparse.Namespace) -> dict:
    """Goals 7 and 10."""
    B = 64 if args.device == 'cuda' else 8
    wanted = [f'{name} {dtype} {B}x{B}' for dtype in ('bf16', 'fp32') for name in ('ours', 'P')]
    result = {}
    few, many = args.users, 2 * args.users
    for what in ['ours bf16 64x8', 'ours fp32 64x8', *wanted, f'users fp32 {few}', f'users fp32 {many}']:
        result[what.replace(f' {B}x{B}', '')] = in_fresh_process(args, what)
        print(f'  memory {what}: {list(result.values())[-1] / 1e9:.3f} GB', flush=True)
    own = sum(p.numel() for p in new_user(new_base(args), 2).parameters() if p.requires_grad)
    result['a user'] = (result.pop(f'users fp32 {many}') - result.pop(f'users fp32 {few}')) / few / (12 * own)
    return result


def made_up_data(folder: Path, vocab_size: int, tokenizer: str) -> None:
    """Four users of random tokens, of the demo's size, in the layout that data/prepare.py writes."""
    folder.mkdir()
    users, rng = [], np.random.default_rng(0)
    for i in range(4):
        raw = {
            split: rng.integers(0, vocab_size, n).astype('<u2').tobytes()
            for split, n in (('train', 300_000), ('valid', 30_000), ('test', 30_000))
        }
        for split, data in raw.items():
            (folder / f'user{i}_{split}.bin').write_bytes(data)
        n = {split: len(data) // 2 for split, data in raw.items()}
        users.append(
            {
                'name': f'user {i}',
                'tokens': n,
                'bytes': n,
                'documents': dict.fromkeys(n, 1),
                'sha256': {split: hashlib.sha256(data).hexdigest() for split, data in raw.items()},
            }
        )
    (folder / 'meta.json').write_text(
        json.dumps({'dtype': '<u2', 'vocab_size': vocab_size, 'tokenizer': tokenizer, 'users': users, 'source': ['made up']})
    )


def first_line(command: list, file: Path, limit: float = 300) -> float:
    """Seconds from starting a process until the file has a line of kind 'train'. The process is then ended."""
    tic = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and time.perf_counter() - tic < limit:
            if file.exists() and '"kind": "train"' in file.read_text():
                return time.perf_counter() - tic
            time.sleep(0.005)
    finally:
        process.kill()
        error = process.communicate()[1]
    sys.exit(f'no training step within {limit:.0f} s: {error.strip()[-400:]}')


def start(args: argparse.Namespace) -> dict:
    """Goal 11: from starting train.py to its first step's line, beyond a bare `import torch`; medians of 3. The step itself is
    one window of 16 tokens."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tiny = ROOT / 'assets' / 'base-tiny.safetensors'
        large = folder / 'large.safetensors'
        save_gpt(new_base(args).cpu(), large)
        made_up_data(folder / 'gpt2', args.vocab_size, 'gpt2')
        made_up_data(folder / 'bytes', 257, 'bytes')
        bare = [seconds(lambda: subprocess.run([sys.executable, '-c', 'import torch'], check=True), 'cpu') for _ in range(4)]
        result['import torch'] = statistics.median(bare[1:])
        for name, base, data in (('tiny base', tiny, 'bytes'), ('GPT-2', large, 'gpt2')):
            command = [
                sys.executable,
                str(ROOT / 'train.py'),
                f'--init_from={base}',
                f'--dataset={folder / data}',
                f'--out_dir={folder / "out"}',
                '--overwrite',
                f'--device={args.device}',
                '--batch_size=1',
                '--block_size=16',
            ]
            times = []
            for _ in range(4):
                (folder / 'out' / 'metrics.jsonl').unlink(missing_ok=True)
                times.append(first_line(command, folder / 'out' / 'metrics.jsonl'))
            result[name] = statistics.median(times[1:]) - result['import torch']
            print(f'  start {name}: {result[name]:.2f} s beyond import torch', flush=True)
    return result


# ---- the goals ---------------------------------------------------------------------------------------------------------------
def rate(part: dict, name: str, flop: str = 'step') -> float:
    """Useful FLOP rate of a variant (median time) as a share of the products' rate in the same run (the higher of the two)."""
    return part['tokens'] * part['flops'][flop] / statistics.median(part['seconds'][name]) / max(part['peaks'])


def vs_plain(part: dict, n: int, ours: str = '') -> float:
    return speedup(part['seconds'][f'P n={n}'], part['seconds'][f'ours n={n}{ours}'])


def wide(part: dict) -> float:
    return cost(part['seconds']['ours n=8'], part['seconds']['ours n=2'])


def over_base(part: dict) -> float:
    return cost(part['seconds']['ours n=2'], part['seconds']['base'])


def vs_peft(part: dict) -> float:
    return speedup(part['seconds']['PEFT r=16'], part['seconds']['ours n=2'])


def evaluating(part: dict) -> float:
    """Tokens per second; the evaluation has twice a step's tokens."""
    return 2 * speedup(part['seconds']['ours n=2'], part['seconds']['evaluation'])


GOALS = (  # number, what, part, its value, at least or at most, target, unit
    (1, 'tokens/s against P, n = 2, float32', 'fp32', lambda r: vs_plain(r, 2), '>=', 1.5, 'x'),
    (1, 'tokens/s against P, n = 2, bfloat16', 'bf16', lambda r: vs_plain(r, 2), '>=', 1.5, 'x'),
    (1, 'tokens/s against P, n = 2, bfloat16, compiled', 'compiled', lambda r: vs_plain(r, 2, ' compiled'), '>=', 1.9, 'x'),
    (2, 'tokens/s against P, n = 8, float32', 'fp32', lambda r: vs_plain(r, 8), '>=', 1.4, 'x'),
    (2, 'tokens/s against P, n = 8, bfloat16', 'bf16', lambda r: vs_plain(r, 8), '>=', 2.2, 'x'),
    (3, 'step time n = 8 over n = 2, float32', 'fp32', wide, '<=', 1.12, 'x'),
    (3, 'step time n = 8 over n = 2, bfloat16', 'bf16', wide, '<=', 1.12, 'x'),
    (4, "step over the frozen base's own, float32", 'fp32', over_base, '<=', 1.12, 'x'),
    (4, "step over the frozen base's own, bfloat16", 'bf16', over_base, '<=', 1.25, 'x'),
    (5, "useful FLOPs over the products' peak, float32", 'fp32', lambda r: 100 * rate(r, 'ours n=2'), '>=', 55, '%'),
    (5, "useful FLOPs over the products' peak, bfloat16", 'bf16', lambda r: 100 * rate(r, 'ours n=2'), '>=', 55, '%'),
    (5, 'the same, compiled', 'compiled', lambda r: 100 * rate(r, 'ours n=2 compiled'), '>=', 60, '%'),
    (6, 'tokens/s against transformers + PEFT, float32', 'fp32', vs_peft, '>=', 1.2, 'x'),
    (6, 'tokens/s against transformers + PEFT, bfloat16', 'bf16', vs_peft, '>=', 1.3, 'x'),
    (7, 'peak memory, 64 x 128 in micro-batches, bfloat16', 'memory', lambda r: r['ours bf16 64x8'] / 1e9, '<=', 1.7, 'GB'),
    (7, "peak memory over P's, one micro-step, bfloat16", 'memory', lambda r: r['ours bf16'] / r['P bf16'], '<=', 0.5, 'x'),
    (
        8,
        'loss and gradients against P, worst, float32',
        'gradients',
        lambda r: max(v['worst'] for name, v in r.items() if name != 'bf16'),
        '<=',
        1e-5,
        '',
    ),
    (8, 'gradients against P, least cosine, bfloat16, n = 2', 'gradients', lambda r: r['bf16']['cosine'], '>=', 0.999, ''),
    (9, "evaluation's tokens/s over training's, float32", 'fp32', evaluating, '>=', 1.9, 'x'),
    (9, "evaluation's tokens/s over training's, bfloat16", 'bf16', evaluating, '>=', 1.9, 'x'),
    (10, 'memory a user adds, over 12 bytes a number', 'memory', lambda r: r['a user'], '<=', 1.05, 'x'),
    (11, 'start to first step beyond import torch, tiny base', 'start', lambda r: r['tiny base'], '<=', 3, 's'),
    (11, 'start to first step beyond import torch, GPT-2', 'start', lambda r: r['GPT-2'], '<=', 3, 's'),
)


def noisy(part: dict) -> bool:
    """Whether the products' rate moved so much between the start and the end of a part that its times tell nothing."""
    return 'peaks' in part and max(part['peaks']) > (1 + NOISE) * min(part['peaks'])


def verdicts(parts: dict) -> list[list]:
    """Rows of the table: number, what, measured, target, verdict. What a part did not measure is 'not measured'."""
    rows = []
    for number, what, part, value, side, target, unit in GOALS:
        try:
            measured = value(parts[part])
        except KeyError:
            rows.append([number, what, None, f'{side} {target} {unit}', 'not measured'])
            continue
        passed = measured >= target if side == '>=' else measured <= target  # NaN passes neither
        verdict = 'noisy' if noisy(parts[part]) else 'pass' if passed else 'MISSED'
        rows.append([number, what, f'{measured:.3g} {unit}', f'{side} {target} {unit}', verdict])
    return rows


def check(rows: list[list]) -> int:
    """Exit code of --check, and why: 1 for a goal missed, else 2 for a part too noisy to tell, else 0."""
    missed = [f'{row[0]} ({row[1]})' for row in rows if row[4] == 'MISSED']
    if missed:
        print('goals missed: ' + '; '.join(missed))
    elif any(row[4] == 'noisy' for row in rows):
        print('no verdict: the machine was noisy (its products changed their speed by more than 15 %); run it again')
    return 1 if missed else 2 if any(row[4] == 'noisy' for row in rows) else 0


def report(result: dict) -> list[list]:
    for name, part in result['parts'].items():
        if 'seconds' not in part:
            continue
        print(
            f'\n{name}: {part["tokens"]} tokens a step, products {part["peaks"][0] / 1e9:.0f} GFLOP/s before, '
            f'{part["peaks"][1] / 1e9:.0f} after' + (': noisy' if noisy(part) else '')
        )
        reference = part['seconds']['P n=2']
        print(
            table(
                ['variant', 's median', 's min', 'against P n=2, paired', 'min/min'],
                [
                    [variant, statistics.median(times), min(times), *ratios(reference, times)]
                    for variant, times in part['seconds'].items()
                ],
            )
        )
    rows = verdicts(result['parts'])
    print(f'\n{result["machine"]}')
    print(table(['', 'goal', 'measured', 'target', ''], rows, left=2))
    return rows


def machine(args: argparse.Namespace) -> str:
    name = platform.processor() or platform.machine()
    if sys.platform == 'linux':
        name = next((line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name')), name)
    if args.device == 'cuda':
        name = f'{torch.cuda.get_device_name()}, {name}'
    return (
        f'{name}, {torch.get_num_threads()} threads, {platform.system()}, Python {platform.python_version()}, '
        f'torch {torch.__version__}, fast float32 products: {args.fast_fp32}'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='two experts, 3 rounds, no memory, start or compiled part')
    parser.add_argument('--check', action='store_true', help='exit with 1 if a goal was missed, 2 if the machine was too noisy')
    parser.add_argument('--only', help=f'parts to run, with commas: {",".join(PARTS)}')
    parser.add_argument('--rounds', type=int, help='rounds of timing (default 9, 3 with --quick)')
    parser.add_argument('--json', type=Path, default=Path('out/bench.json'), help='what was measured; parts not run are kept')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--users', type=int, default=16, help='as many, and twice as many, to see what a user adds')
    for name, size in (('n_layer', 12), ('n_head', 12), ('n_embd', 768), ('vocab_size', 50257)):
        parser.add_argument(f'--{name}', type=int, default=size)
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rounds = args.rounds or (3 if args.quick else 9)
    args.fast_fp32 = fast_fp32(args.device)
    if args.worker:
        print(worker(args, args.worker))
        return
    chosen = args.only.split(',') if args.only else ['gradients', 'fp32', 'bf16'] if args.quick else PARTS
    if not set(chosen) <= set(PARTS) or args.rounds < 1:
        parser.error(f'--only={args.only}: expected some of {",".join(PARTS)}; --rounds at least 1')
    settings = {'machine': machine(args), 'size': [args.n_layer, args.n_head, args.n_embd, args.vocab_size]}
    result = {**settings, 'parts': {}}
    if args.only and args.json.exists():
        before = json.loads(args.json.read_text())
        if {key: before[key] for key in settings} != settings:
            parser.error(f'{args.json} is of another machine or size: give another --json')
        result = before
    run = {
        'gradients': gradients,
        'fp32': lambda a: speed(a, 'fp32'),
        'bf16': lambda a: speed(a, 'bf16'),
        'compiled': lambda a: speed(a, 'bf16', compiled=True),
        'memory': memory,
        'start': start,
    }
    for name in chosen:
        print(f'{name} ...', flush=True)
        result['parts'][name] = run[name](args)
        gc.collect()
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1))
    rows = report(result)
    print(f'wrote {args.json}')
    if args.check:
        sys.exit(check(rows))


if __name__ == '__main__':
    main()
