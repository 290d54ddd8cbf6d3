"""Speed and memory, measured against the code that most people would write: tests/plain.py, here P.

    python tools/bench.py --quick                    # a first look, float32 alone: a minute and a half on two cores
    python tools/bench.py                            # everything: half an hour and more on two cores
    python tools/bench.py --bases=smollm2 --only=fp32,memory    # some of it; --out keeps what it has of the rest

Two bases, with random weights (nothing is downloaded): gpt2 is GPT-2 124M, smollm2 has the shape of SmolLM2-135M. Batches of
8 x 128 random tokens (64 x 128 on CUDA); no figure here is about a model's quality. A step is forward, backward and AdamW.
Every ratio is between two things timed in the same process in turn, the order reversed every round, and of the two ratios,
the median of the paired ones and that of the two fastest times, the weaker counts. The float32 setting of train.py
(fast_fp32) holds for both sides. Gradients are compared with P's before anything is timed. Parts, each for every base:

    memory      peak of a step, ours and P's, each in a process of its own
    train       short runs of train.py: seconds until the first round, and what a user adds to the peak
    fp32, bf16, compiled    seconds of a step of P, ours (1, 2, 4 and 8 experts), the frozen base alone, transformers + PEFT,
                            and of an evaluation

--quick is fp32 on 2 x 128 tokens, 2 rounds, two and eight experts, without PEFT. The targets are of docs/speed.md, for
8 x 128 tokens on a CPU. A part during which the machine changed its speed gets no verdict. The last line says which dtype
makes the faster steps here, once fp32 and bf16 are both known."""

import argparse
import copy
import gc
import importlib.util
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import die, parser, table
from data.stream import SPLITS, write_streams
from llama import Llama, LlamaConfig
from lora_moe import add_lora, load_balance_loss
from model import GPT, GPTConfig, autocast, evaluate, fast_fp32, save_gpt, store_in_bf16
from run.report import peak_memory
from tests.plain import PlainGPT, compare, randomised

ROOT = Path(__file__).resolve().parent.parent
# in this order: memory while this process is small, because on Linux a child's peak begins with its parent's
PARTS = {'memory': '', 'train': '', 'fp32': 'float32', 'bf16': 'bfloat16', 'compiled': 'bfloat16'}
NOISE = 0.15  # of the products' rate between the start and the end of a part: above it the times tell nothing
BASES = {'gpt2': GPTConfig(), 'smollm2': LlamaConfig()}
RATIOS = (  # what, seconds of this, over seconds of that, the weaker of the two ratios, targets of a part or of a base's parts
    ('tokens/s against P, n = 2', 'P n=2', 'ours n=2', min, {'gpt2': 1.5}),
    ('tokens/s against P, n = 2, compiled', 'P n=2', 'ours n=2 compiled', min, {'gpt2': 1.9}),
    ('tokens/s against P, n = 8', 'P n=8', 'ours n=8', min, {'gpt2 fp32': 1.4, 'gpt2 bf16': 2.2}),
    ('step time n = 8 over n = 2', 'ours n=8', 'ours n=2', max, {'gpt2': 1.12, 'smollm2': 1.12}),
    ("step time over the frozen base's own", 'ours n=2', 'base', max, {'gpt2 fp32': 1.12, 'gpt2 bf16': 1.25, 'smollm2': 1.2}),
    ('tokens/s against transformers + PEFT', 'PEFT', 'ours n=2', min, {'gpt2 fp32': 1.2, 'gpt2 bf16': 1.3, 'smollm2': 1.3}),
    ("evaluation's tokens/s over training's", 'ours n=2', 'evaluation', min, {'gpt2': 1.9, 'smollm2': 1.9}),
)


# ---- what is compared ------------------------------------------------------------------------------------------------
def new(config: GPTConfig | LlamaConfig) -> GPT:
    return Llama(config) if isinstance(config, LlamaConfig) else GPT(config)


def new_base(args: argparse.Namespace, dtype: str = 'float32') -> GPT:
    torch.manual_seed(0)
    base = new(args.config).to(args.device)
    if dtype == 'bfloat16':
        store_in_bf16(base)
    return base


def new_user(base: GPT, n: int) -> GPT:
    """A user of n experts, rank 8, whose LoRAs are not zero: all gradients are then at work."""
    return randomised(add_lora(base, n_experts=n, n_generalists=1, rank=8), 0.02, 0.02).train()


def windows(args: argparse.Namespace) -> int:
    return 64 if args.device == 'cuda' else 2 if args.quick else 8


def batch(args: argparse.Namespace, B: int, T: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """B windows of random tokens and what follows each: (B, T) twice."""
    idx = torch.randint(args.config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(1)).to(args.device)
    return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()


def training_step(loss: Callable, parameters: Iterable, data: tuple, dtype: str, micro: int | None = None) -> Callable:
    """A function that makes one optimizer step on the batch, with a backward for every micro-batch."""
    parameters = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    x, y = data

    def step() -> None:
        for p in parameters:
            p.grad = None
        for xs, ys in zip(x.split(micro or len(x)), y.split(micro or len(x))):
            with autocast(x.device, dtype):
                ce, routing = loss(xs, ys)
                total = ce + 0.01 * load_balance_loss(routing, 'generalist')
            (total * (len(xs) / len(x))).backward()
        optimizer.step()

    return step


def base_step(base: GPT, data: tuple, dtype: str) -> Callable:
    """The base's own forward and the gradients of its activations: what every method on this base has to pay. The bias of the
    first linear (zeros, where it has none) asks for a gradient, so that as in training none flows below it."""
    base = copy.deepcopy(base).requires_grad_(False)
    first = next(base.h[0].attn.children())
    if first.bias is None:
        first.bias = torch.nn.Parameter(first.weight.new_zeros(first.out_features))
    only = first.bias.requires_grad_()

    def step() -> None:
        only.grad = None
        with autocast(data[0].device, dtype):
            loss, _ = base.loss(*data)
        loss.backward()

    return step


def peft_step(args: argparse.Namespace, data: tuple, dtype: str) -> Callable:
    """transformers + PEFT, LoRA of rank 16 on the same linears: as many active LoRA columns as two experts of rank 8."""
    import transformers
    from peft import LoraConfig, get_peft_model

    shape, llama = vars(args.config), isinstance(args.config, LlamaConfig)
    if llama:  # the angles of the rotations are worth no time: they stay transformers' own
        shape = {name: value for name, value in shape.items() if name not in ('rope_theta', 'rope_scaling', 'qkv_bias')}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    else:
        dropout = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **dropout, bos_token_id=0, eos_token_id=0))
    where = dict(target_modules='all-linear', fan_in_fan_out=not llama)  # without the head
    lora = LoraConfig(r=16, lora_alpha=16, **where, init_lora_weights=False)
    model = get_peft_model(model, lora).to(args.device).train()
    return training_step(lambda x, y: (model(input_ids=x, labels=x).loss, [None]), model.parameters(), data, dtype)


def evaluation_step(user: GPT, n: int, dtype: str) -> Callable:
    """model.evaluate on a stream with n tokens to predict, in windows of 128."""
    tokens = np.random.default_rng(0).integers(0, user.config.vocab_size, n + 1)

    def step() -> None:
        with autocast(user.wte.weight.device, dtype):
            evaluate(user, tokens, 128, quiet=True)

    return step


def linears(config: GPTConfig | LlamaConfig) -> tuple[list, list]:
    """(in, out) of every linear of a block's attention and of its MLP; the last of each returns to the residual stream."""
    with torch.device('meta'):
        block = new(config).h[0]
    return tuple([(m.in_features, m.out_features) for m in part.children()] for part in (block.attn, block.mlp))


def flops(config: GPTConfig | LlamaConfig, T: int = 128, K: int = 2) -> dict:
    """FLOPs of a token: `step`, a training step with K active experts of rank 8; `plain`, the same in P's form.

    Frozen weights have no gradient, and nothing flows below the first block's LoRA. Products only; a LoRA costs three times
    its forward, attention's two products count T x T (causality is not used by them)."""
    attn, mlp = linears(config)
    L, head = config.n_layer, config.vocab_size * config.n_embd
    in_attn, in_mlp, first = (sum(n_in * n_out for n_in, n_out in some) for some in (attn, mlp, attn[:-1]))
    lora = 2 * L * 8 * (sum(map(sum, attn)) + K * sum(map(sum, mlp)))  # forward
    attention = 4 * T * attn[-1][0] * L  # forward
    step = 4 * (L * (in_attn + in_mlp) + head) - 2 * first + 3 * attention + 3 * lora
    return {'step': step, 'plain': step + (K - 1) * 4 * L * in_mlp}


# ---- timing ----------------------------------------------------------------------------------------------------------
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


def race(steps: dict, rounds: int, device: str, warm: int = 2) -> dict:
    """{name: function} -> {name: seconds of every round}; warm-ups of each, then all in turn, every second round backwards."""
    for step in [*steps.values()] * warm:
        step()
    times = {name: [] for name in steps}
    for i in tqdm(range(rounds), desc='rounds', leave=False, disable=None):
        for name in list(steps)[:: 1 if i % 2 == 0 else -1]:
            times[name].append(seconds(steps[name], device))
    return times


def ratios(a: list, b: list) -> tuple[float, float]:
    """Times a over times b: the median of the paired ratios, and the ratio of the two fastest."""
    return statistics.median(x / y for x, y in zip(a, b)), min(a) / min(b)


def product_rate(args: argparse.Namespace, dtype: str) -> float:
    """FLOP/s of the model's products x W^T at 1024 rows (8192 on CUDA): the best shape's median of 7."""
    attn, mlp = linears(args.config)
    rates, rows = [], 8192 if args.device == 'cuda' else 1024
    for n_in, n_out in {*attn, *mlp, (args.config.n_embd, args.config.vocab_size)}:
        x, W = (torch.randn(n, n_in, device=args.device, dtype=getattr(torch, dtype)) for n in (rows, n_out))
        out = x @ W.t()
        times = [seconds(lambda: torch.mm(x, W.t(), out=out), args.device) for _ in range(9)][2:]
        rates.append(2 * rows * n_in * n_out / statistics.median(times))
    return max(rates)


def speed(args: argparse.Namespace, part: str) -> dict:
    """fp32, bf16 or compiled: {'seconds': {variant: of every round}, 'tokens' of a step, 'peaks': FLOP/s of products before and
    after, 'flops' of a token}."""
    dtype, B = PARTS[part], windows(args)
    base, own, data, steps = new_base(args), new_base(args, dtype), batch(args, B), {}
    for n in (2,) if part == 'compiled' else (2, 8) if args.quick else (1, 2, 4, 8):
        user, plain = new_user(own, n), PlainGPT(new_user(base, n))
        found = compare(user, plain, tuple(t[:2, :64] for t in data), (dtype, 'float32'))
        if not found['together'] > (0.9999 if dtype == 'float32' else 0.9):  # bfloat16 flips near-tied choices of 8
            die(f"{args.base} {part}, n={n}: the gradients are not P's ({found}): nothing is timed")
        if n == 2 or n == 8 and not args.quick and (args.base == 'gpt2' or args.device == 'cuda'):  # they take long
            steps[f'P n={n}'] = training_step(plain.loss, plain.parameters(), data, dtype)
        steps[f'ours n={n}'] = training_step(user.loss, user.parameters(), data, dtype)
    user = new_user(own, 2)
    if part == 'compiled':
        print('  compiling, one to two minutes', flush=True)
        steps['ours n=2 compiled'] = training_step(torch.compile(user.loss), user.parameters(), data, dtype)
    else:
        steps['base'] = base_step(own, data, dtype)
        steps['evaluation'] = evaluation_step(user, B * 128, dtype)  # as many tokens as a step has
        if not args.quick and importlib.util.find_spec('peft') and importlib.util.find_spec('transformers'):
            steps['PEFT'] = peft_step(args, data, dtype)
    before = product_rate(args, dtype)
    times = race(steps, args.rounds, args.device, 1 if args.quick else 2)
    return {'seconds': times, 'tokens': B * 128, 'peaks': [before, product_rate(args, dtype)], 'flops': flops(args.config)}


# ---- memory and start ------------------------------------------------------------------------------------------------
def fresh(function: Callable, *args: object) -> object:
    """function(*args) in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(function, *args).result()


def peak_of_step(args: argparse.Namespace, who: str, dtype: str, n: int, micro: int) -> int:
    """Bytes that this process, or on CUDA the device, has held at most once two steps are made."""
    fast_fp32(args.device)
    user = new_user(new_base(args, dtype if who == 'ours' else 'float32'), 2)
    model = PlainGPT(user) if who == 'P' else user
    del user  # P has copies of its own
    step = training_step(model.loss, model.parameters(), batch(args, n), dtype, micro)
    step(), step()
    if args.device == 'cuda':
        return torch.cuda.max_memory_allocated()
    return peak_memory()


def memory(args: argparse.Namespace) -> dict:
    """{variant: bytes}: a step in micro-batches of 8 windows, and one on a whole batch, ours and P's."""
    B, result = windows(args), {}
    for dtype in ('bfloat16', 'float32'):
        for who, n, micro in (('ours', 64, 8), ('ours', B, B), ('P', B, B)):
            name = f'{who} {dtype}' + (', 64 windows by 8' if micro < n else '')
            result[name] = fresh(peak_of_step, args, who, dtype, n, micro)
            print(f'  {name}: {result[name] / 1e9:.3f} GB', flush=True)
    return result


def save_base(args: argparse.Namespace, file: Path) -> None:
    save_gpt(new_base(args).cpu(), file)


def train(args: argparse.Namespace) -> dict:
    """{run: its summary's startup_seconds, peak_rss_bytes and trainable_params of a user}, medians of three runs of train.py: a
    round of one step, two specialists, nothing shared, so that a user adds what is its own and no message."""
    V, N, result = args.config.vocab_size, args.users, {'n_users': args.users}
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        large, tiny = f'{folder}/base.safetensors', ROOT / 'assets/base-tiny.safetensors'
        fresh(save_base, args, large)
        runs = [('tiny', tiny, 257, 4)] if args.base == 'gpt2' else []
        for name, base, size, n in (*runs, ('large', large, V, N), ('large, 2n users', large, V, 2 * N)):
            text = [{split: [rng.integers(0, size, 2000)] for split in SPLITS} for _ in range(n)]
            write_streams(Path(folder, 'data'), [*map(str, range(n))], text, size, {'tokenizer': 'made up'})
            command = [sys.executable, str(ROOT / 'train.py'), '--method=comigs_2s', '--rounds=1', '--local_steps=1']
            command += ['--router_every=1', '--router_steps=1', '--batch_size=1', '--block_size=32', '--overwrite', '--quiet']
            command += [f'--init_from={base}', f'--dataset={folder}/data', f'--out_dir={folder}/out', f'--device={args.device}']
            found = []
            for _ in range(3):
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                found.append(json.loads(Path(folder, 'out/summary.json').read_text(encoding='utf-8')))
            result[name] = {k: statistics.median(run[k] for run in found) for k in ('startup_seconds', 'peak_rss_bytes')}
            result[name]['trainable_params'] = found[0]['trainable_params'][0]
            print(f'  {name}: {result[name]}', flush=True)
    return result


# ---- what is printed -------------------------------------------------------------------------------------------------
def noisy(part: dict) -> bool:
    """Whether the products' rate moved so much between the start and the end of a part that its times tell nothing."""
    return 'peaks' in part and max(part['peaks']) > (1 + NOISE) * min(part['peaks'])


def figures(name: str, part: dict) -> list[list]:
    """Rows of the last table, out of what a part measured: part, what, target, reached, verdict."""
    base, kind = name.split()
    if kind == 'memory':
        found = [("peak of a step over P's, bfloat16", part['ours bfloat16'] / part['P bfloat16'], 'x', max, {'gpt2': 0.5})]
        for dtype, goal in (('bfloat16', {'gpt2': 1.7}), ('float32', {'smollm2': 2.2})):
            peak = part[f'ours {dtype}, 64 windows by 8'] / 1e9
            found.append((f'peak of a step of 64 x 128 in micro-batches, {dtype}', peak, 'GB', max, goal))
    elif kind == 'train':
        few, many = part['large'], part['large, 2n users']
        added = (many['peak_rss_bytes'] - few['peak_rss_bytes']) / part['n_users'] / few['trainable_params']
        start = {run: part[run]['startup_seconds'] for run in ('tiny', 'large') if run in part}
        found = [(f'start to first round, {run} base', seconds, 's', max, {'gpt2': 3}) for run, seconds in start.items()]
        found += [('memory a user adds, over 12 bytes a number', added / 12, 'x', max, {'gpt2': 1.05})]
    else:
        s = part['seconds']
        found = [(what, weaker(ratios(s[a], s[b])), 'x', weaker, goal) for what, a, b, weaker, goal in RATIOS if {a, b} <= {*s}]
        for variant, goal in (('ours n=2', 55), ('ours n=2 compiled', 60)):
            if variant in s:
                share = part['tokens'] * part['flops']['step'] / statistics.median(s[variant]) / max(part['peaks'])
                found += [(f"useful FLOPs over the products' rate, {variant}", 100 * share, '%', min, {'gpt2': goal})]
    judged = []
    for what, value, unit, weaker, goal in found:
        digits, target = 0 if unit == '%' else 2, goal.get(name, goal.get(base))
        reached, aimed, verdict = f'{value:.{digits}f}', '', ''
        if target is not None:  # min: at least, max: at most, of the number that is printed
            aimed = f'{">=" if weaker is min else "<="} {target:.{digits}f} {unit}'
            verdict = 'noisy' if noisy(part) else 'met' if weaker(float(reached), target) == target else 'missed'
        judged.append([name, what, aimed, f'{reached} {unit}', verdict])
    return judged


def advice(parts: dict) -> str:
    """Which dtype to choose for each base here, or nothing where fp32 and bf16 are not both known or one was noisy."""
    found = []
    for base in BASES:
        both = [parts[name] for name in (f'{base} fp32', f'{base} bf16') if name in parts and not noisy(parts[name])]
        if len(both) == 2:
            fp32, bf16 = (part['tokens'] / statistics.median(part['seconds']['ours n=2']) for part in both)
            best = 'float32' if fp32 > bf16 else 'bfloat16'
            found.append(f'{base} --dtype={best} (tokens/s: float32 {fp32:.0f}, bfloat16 {bf16:.0f})')
    return f'to train here: {"; ".join(found)}' if found else ''


def report(result: dict) -> None:
    for name, part in result['parts'].items():
        if 'seconds' in part:
            before, after = (f'{peak / 1e9:.0f}' for peak in part['peaks'])
            print(f'\n{name}: {part["tokens"]} tokens a step, products {before} GFLOP/s before, {after} after')
            rows = [[v, statistics.median(t), min(t), *ratios(part['seconds']['P n=2'], t)] for v, t in part['seconds'].items()]
            print(table(['variant', 's median', 's min', 'against P n=2, paired', 'min/min'], rows))
    print(f'\n{result["machine"]}')
    rows = [row for part in result['parts'].items() for row in figures(*part)]
    print(table(['part', 'what', 'target', 'reached', 'verdict'], rows, left=2))
    if any(map(noisy, result['parts'].values())):
        print(f'noisy: the products changed their speed by more than {NOISE:.0%} during that part; run it again')


def machine(args: argparse.Namespace) -> str:
    name = platform.processor() or platform.machine()
    if sys.platform == 'linux':
        name = next((row.split(':')[1].strip() for row in open('/proc/cpuinfo', encoding='utf-8') if 'model name' in row), name)
    if args.device == 'cuda':
        name = f'{torch.cuda.get_device_name()}, {name}'
    return (
        f'{name}, {torch.get_num_threads()} threads, {platform.system()}, Python {platform.python_version()}, '
        f'torch {torch.__version__}, fast float32 products: {fast_fp32(args.device)}'
    )


def size(text: str) -> dict:
    L, H, C, V = map(int, text.split(','))
    return {'gpt2': GPTConfig(V, 1024, L, H, C), 'smollm2': LlamaConfig(V, C, 3 * C, L, H, 1, C // H)}


def main(argv: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument('--quick', action='store_true', help='fp32 alone, 2 x 128 tokens, 2 rounds, n = 2 and 8, no PEFT')
    options.add_argument('--bases', default=','.join(BASES), help=f'some of {",".join(BASES)}, with commas')
    options.add_argument('--only', help=f'parts to run, with commas: {",".join(PARTS)}')
    options.add_argument('--rounds', type=int, help='rounds of timing (default 9, 2 with --quick)')
    options.add_argument('--users', type=int, default=16, help='as many, and twice as many, to see what a user adds')
    options.add_argument('--size', type=size, default=BASES, metavar='L,H,C,V', help='other layers, heads, width, vocabulary')
    options.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='cpu or cuda')
    options.add_argument('--out', type=Path, default=Path('out/bench.json'), help='what was measured, as JSON')
    args = options.parse_args(argv)
    chosen, bases = (args.only or ('fp32' if args.quick else ','.join(PARTS))).split(','), args.bases.split(',')
    args.rounds = (2 if args.quick else 9) if args.rounds is None else args.rounds
    if not set(chosen) <= set(PARTS) or not set(bases) <= set(BASES) or args.rounds < 1:
        given = f'--bases={args.bases}, --only={args.only}, --rounds={args.rounds}'
        die(f'{given}: expected some of {",".join(BASES)}, some of {",".join(PARTS)}, and 1 round or more')
    result = {'machine': machine(args), 'bases': {name: str(config) for name, config in args.size.items()}, 'parts': {}}
    if (args.only or len(bases) < len(BASES)) and args.out.exists():
        before = json.loads(args.out.read_text(encoding='utf-8'))
        if any(before.get(key) != result[key] for key in ('machine', 'bases')):
            die(f'{args.out} is of another machine or size: give another --out')
        result = before
    for part in [part for part in PARTS if part in chosen]:
        for base in [base for base in BASES if base in bases]:
            print(f'{base} {part} ...', flush=True)
            here = argparse.Namespace(**vars(args), base=base, config=args.size[base])
            measure = {'memory': memory, 'train': train}.get(part)
            result['parts'][f'{base} {part}'] = measure(here) if measure else speed(here, part)
            gc.collect()
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1), encoding='utf-8')
    report(result)
    print('\n'.join(line for line in (f'wrote {args.out}', advice(result['parts'])) if line))


if __name__ == '__main__':
    main(sys.argv[1:])
