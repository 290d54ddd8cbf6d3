"""CoMiGS (arXiv 2409.13931), Algorithm 1: N users fine-tune one frozen GPT-2 together, simulated in one process.

    python data/prepare.py demo                                         # text that every machine has
    python train.py config/demo.py                                      # 4 users, a minute on a laptop
    python train.py config/slimpajama_1gxs.py --n_experts=4,2,2,2       # GPT-2 124M, experts per user
    python train.py config/agnews.py --method=fedavg --out_dir=out/x    # a baseline is another row of switches
"""
import contextlib
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from configurator import configure, die
from data.stream import get_batch, load_dataset
from eval import evaluate, fingerprint, perplexity, table
from federate import fedavg, n_bytes, shared_names
from lora_moe import add_lora, initial, load_balance_loss, roles
from model import GPT, load_gpt

# ---- switches: override with config/*.py or --name=value ----------------------------------------------------------
method = 'comigs_1g1s'          # a row of METHODS below; sets the switches of the next block
dataset = 'demo'                # folder under data/, made by data/prepare.py
target = 'own'                  # valid and test text: 'own' category, or a 'mixture' of all users' categories
init_from = 'gpt2'              # gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder or a .safetensors file
out_dir = 'out/run'             # everything this run writes
resume = False                  # continue the run in out_dir from its last finished round
overwrite = False               # replace the run in out_dir
# ---- the method (METHOD 0.1)
n_experts = 2                   # LoRA experts in every MLP block; one int, or one per user: 4,2,2,2
n_generalists = 1               # experts 0 .. n_generalists-1 are averaged over users, the rest never leave
share_attention = True          # whether the attention LoRAs are averaged too
router = 'learned'              # learned | mean (plain mean of all experts) | frozen (random, never trained)
router_data = 'valid'           # valid | train (own phase on either) | joint (with the experts, training loss)
aggregate = 'fedavg'            # fedavg | none
load_balance = 'generalist'     # generalist (eq. 6) | uniform | none
lb_coef = 0.01                  # lambda, weight of load balancing in both levels' losses
top_k = 2                       # experts run per token
lora_rank = 8                   # rank of the MLP LoRAs; one int, or one per user
lora_alpha = 16.0               # scaling is lora_alpha / sqrt(rank)
# ---- the schedule
rounds = 20                     # communication rounds R
local_steps = 10                # expert steps per user and round H
router_every = 30               # tau: expert steps of a user between two router phases
router_steps = 10               # s: router steps in a phase
batch_size = 64                 # windows per step
micro_batch_size = 8            # windows per forward and backward; fewer need less memory
block_size = 128                # tokens per window
expert_lr = 2e-3                # cosine to a tenth over all expert steps of the run
router_lr = 2e-3                # constant
weight_decay = 0.01             # AdamW, on LoRA and router alike
eval_every = 5                  # rounds between evaluations on the test split; the last round always is one
# ---- the machine
seed = 42                       # the paper's seeds are 42, 45, 47
device = 'auto'                 # auto | cpu | cuda | cuda:N | mps
dtype = 'auto'                  # auto (bfloat16 autocast on CUDA, else float32) | float32 | bfloat16

METHODS = {  # one row of the paper's tables each
    'pretrained':  dict(n_experts=1, n_generalists=0, share_attention=False, aggregate='none'),
    'local':       dict(n_experts=2, n_generalists=0, share_attention=False, router='mean', aggregate='none'),
    'fedavg':      dict(n_experts=2, n_generalists=2, share_attention=True, router='mean', aggregate='fedavg'),
    'comigs_2s':   dict(n_experts=2, n_generalists=0, share_attention=False, router='learned', aggregate='none'),
    'comigs_2g':   dict(n_experts=2, n_generalists=2, share_attention=True, router='learned', aggregate='fedavg'),
    'comigs_1g1s': dict(n_experts=2, n_generalists=1, share_attention=True, router='learned', aggregate='fedavg'),
    'comigs_1gxs': dict(n_experts=4, n_generalists=1, share_attention=True, router='learned', aggregate='fedavg'),
}
config = configure(globals(), sys.argv[1:], METHODS, per_user=('n_experts', 'lora_rank'))
if method == 'pretrained':
    rounds = config['rounds'] = 0   # the base as it is, whatever a config file says

# ---- refuse what cannot run, before anything is written ------------------------------------------------------------
for name, legal in {'target': ('own', 'mixture'), 'router': ('learned', 'mean', 'frozen'), 'aggregate': ('fedavg', 'none'),
                    'router_data': ('valid', 'train', 'joint'), 'load_balance': ('generalist', 'uniform', 'none'),
                    'dtype': ('auto', 'float32', 'bfloat16')}.items():
    if config[name] not in legal:
        die(f'--{name}={config[name]}: expected one of {", ".join(legal)}')
for name in ('local_steps', 'router_every', 'router_steps', 'batch_size', 'micro_batch_size', 'block_size', 'eval_every',
             'top_k', 'lora_alpha', 'expert_lr', 'router_lr'):
    if config[name] <= 0:
        die(f'--{name}={config[name]}: must be greater than 0')
if rounds < 0 or seed < 0 or n_generalists < 0:
    die(f'--rounds={rounds}, --seed={seed} and --n_generalists={n_generalists} must not be negative')
if aggregate == 'none' and (n_generalists or share_attention):
    die('--aggregate=none shares nothing: it needs --n_generalists=0 and --share_attention=False')
out = Path(out_dir)
if out.exists() and not out.is_dir():
    die(f'--out_dir={out_dir} is a file: give a folder')
if resume and not (out / 'checkpoint.pt').exists():
    die(f'--resume: {out_dir} has no checkpoint.pt; start without --resume')
if (out / 'config.json').exists() and not (resume or overwrite):
    state = 'a finished run' if (out / 'summary.json').exists() else 'an unfinished run'
    die(f'{out_dir} already holds {state}: give --resume to continue it, --overwrite to replace it, or another --out_dir')
if device == 'auto':
    device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
try:
    device_type = torch.device(device).type
    torch.zeros(1, device=device)
    base = load_gpt(init_from).to(device)
    meta, streams = load_dataset(Path('data', dataset), block_size, base.config.vocab_size, target)
except (OSError, ValueError, RuntimeError, AssertionError) as error:
    die(error)
if block_size > base.config.n_positions:
    die(f'--block_size={block_size}: {init_from} has only {base.config.n_positions} positions')
N = len(streams)


def per_user(name: str) -> tuple:
    """The entries of a per-user switch, one per user."""
    value = config[name] if isinstance(config[name], tuple) else (config[name],) * N
    if len(value) != N or min(value) < 1:
        die(f'--{name}={",".join(map(str, value))}: expected one value of 1 or more, or {N} of them, one per user of {dataset}')
    return value


for i, n in enumerate(per_user('n_experts')):
    if n < n_generalists:
        die(f'user {i} has n_experts={n}, fewer than n_generalists={n_generalists}: every user holds all the generalists')
if aggregate != 'none' and len(set(per_user('lora_rank'))) > 1:
    die('--aggregate=fedavg averages tensors of one shape: --lora_rank must be the same for all users')
if dtype == 'auto':
    dtype = 'bfloat16' if device_type == 'cuda' and torch.cuda.is_bf16_supported() else 'float32'
autocast = torch.autocast(device_type, torch.bfloat16) if dtype == 'bfloat16' else contextlib.nullcontext()

# ---- users: own data, own LoRA and router, own optimizers, one frozen base for all ---------------------------------
users, theta_roles = [], ('attention', 'generalist', 'specialist')
for i in range(N):
    model = add_lora(base, per_user('n_experts')[i], n_generalists, per_user('lora_rank')[i], lora_alpha, top_k,
                     routed=router != 'mean')
    role = roles(model)
    adapter = {name: p for name, p in model.named_parameters() if name in role}     # all that is this user's
    with torch.no_grad():
        for name, p in adapter.items():
            p.copy_(initial(name, p.shape, seed, 'user', i))
    theta = [p for name, p in adapter.items() if role[name] in theta_roles]          # experts: the lower level
    phi = [p for name, p in adapter.items() if role[name] == 'router' and router == 'learned']  # the upper level
    adamw = dict(betas=(0.9, 0.95), weight_decay=weight_decay, fused=device_type != 'mps')
    user = SimpleNamespace(
        id=i, name=meta['users'][i]['name'], data=streams[i], model=model, role=role, adapter=adapter,
        expert_opt=torch.optim.AdamW(theta + phi if router_data == 'joint' else theta, lr=expert_lr, **adamw),
        router_opt=torch.optim.AdamW(phi, lr=router_lr, **adamw) if phi and router_data != 'joint' else None,
        expert_steps=0, router_steps=0)
    user.trainable = sum(p.numel() for opt in (user.expert_opt, user.router_opt) if opt for p in opt.param_groups[0]['params'])
    users.append(user)
shared = shared_names(users[0].role, share_attention) if aggregate != 'none' else []
server = {name: initial(name, users[0].adapter[name].shape, seed, 'server') for name in shared}
message_bytes = n_bytes(server)                              # one message, up or down


def descend(user: SimpleNamespace, optimizer: torch.optim.Optimizer, tokens: np.ndarray, key: tuple) -> tuple[float, float]:
    """One optimizer step on one batch; changes only the tensors that this optimizer holds. Returns cross-entropy (nats per
    token) and load balancing, means over the batch. No gradient survives the step, so nothing crosses the two levels."""
    held = {id(p) for group in optimizer.param_groups for p in group['params']}
    for p in user.adapter.values():
        p.requires_grad_(id(p) in held)
        p.grad = None
    sums = torch.zeros(2, device=device)
    x, y = (t.to(device) for t in get_batch(tokens, batch_size, block_size, key))             # (B, T) each
    for x, y in zip(x.split(micro_batch_size), y.split(micro_batch_size)):
        share = len(x) / batch_size
        with autocast:
            ce, routing = user.model.loss(x, y)
            lb = load_balance_loss(routing, load_balance)
        ((ce + lb_coef * lb) * share).backward()             # frees this micro-batch's graph: one is alive at a time
        sums += torch.stack((ce.detach(), torch.as_tensor(lb, device=device).detach())) * share
    optimizer.step()
    for p in user.adapter.values():
        p.grad = None
    return tuple(sums.tolist())


def cosine(step: int) -> float:
    """Learning rate of the experts' step number `step` = 0, 1, ...: expert_lr, falling to a tenth of it (METHOD 1.4)."""
    return expert_lr * (0.55 + 0.45 * math.cos(math.pi * step / (rounds * local_steps)))


def load(user: SimpleNamespace, tensors: dict) -> None:
    """Copies tensors into the user's own of the same names."""
    with torch.no_grad():
        for name, t in tensors.items():
            user.adapter[name].copy_(t)


def upload(user: SimpleNamespace) -> dict:
    """What leaves the user: copies of its shared tensors and nothing else."""
    return {name: user.adapter[name].detach().clone() for name in shared}


def test_perplexity(user: SimpleNamespace, model: GPT, when: str) -> float:
    """Perplexity of a model on the user's whole test split, which nothing else ever reads."""
    with autocast:
        result = evaluate(model, user.data['test'], block_size)
    log('eval', step=user.expert_steps, user=user.id, split='test', when=when, loss=result['loss'], ppl=result['ppl'])
    return result['ppl']


# ---- files of the run ----------------------------------------------------------------------------------------------
def log(kind: str, **values: object) -> None:
    """One line of metrics.jsonl, on disk at once. No clock in it: the same run writes the same bytes."""
    metrics.write(json.dumps({'kind': kind, 'round': t + 1, **values}) + '\n')
    metrics.flush()


def write_atomically(file: Path, write) -> None:
    """The file appears complete or not at all, whenever the process or the machine dies."""
    partial = file.with_name(file.name + '.partial')
    write(partial)
    with open(partial, 'rb+') as f:
        os.fsync(f.fileno())
    os.replace(partial, file)


def save_checkpoint() -> None:
    state = {'round': t + 1, 'server': server, 'identity': identity, 'metrics_bytes': metrics.tell(), 'clock': clock,
             'users': [{'adapter': {n: p.detach() for n, p in u.adapter.items()}, 'test_ppl': u.test_ppl,
                        'pretrained_ppl': u.pretrained_ppl, 'expert_steps': u.expert_steps, 'router_steps': u.router_steps,
                        'expert_opt': u.expert_opt.state_dict(),
                        'router_opt': u.router_opt.state_dict() if u.router_opt else None} for u in users]}
    write_atomically(out / 'checkpoint.pt', lambda file: torch.save(state, file))


def save_adapters() -> None:
    """Each user's own tensors, and the server's, with what a reader needs to rebuild the model around them."""
    (out / 'adapters').mkdir(exist_ok=True)
    for u in users:
        facts = {'user': u.id, 'name': u.name, 'base': init_from, 'base_sha256': identity['base'], 'method': method,
                 'n_experts': per_user('n_experts')[u.id], 'n_generalists': n_generalists, 'rank': per_user('lora_rank')[u.id],
                 'attention_rank': u.model.h[0].attn.c_attn.lora.A.shape[0], 'alpha': lora_alpha,
                 'scaling': lora_alpha / math.sqrt(per_user('lora_rank')[u.id]),
                 'top_k': top_k, 'router': router, 'round': rounds}
        tensors = {name: p.detach().cpu().contiguous() for name, p in u.adapter.items()}
        write_atomically(out / 'adapters' / f'user{u.id}.safetensors',
                         lambda file: save_file(tensors, file, {k: str(v) for k, v in facts.items()}))
    if server:
        write_atomically(out / 'adapters' / 'server.safetensors', lambda file: save_file(
            {name: v.cpu().contiguous() for name, v in server.items()}, file, {'base': init_from, 'round': str(rounds)}))


def git_commit() -> str:
    try:
        return subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*'], capture_output=True,
                              text=True, timeout=10, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ''


# what must be the same for a run to be continued: the base, the data and every switch that shapes the numbers
free = ('out_dir', 'resume', 'overwrite', 'device', 'init_from', 'dataset')
identity = {**{k: v for k, v in config.items() if k not in free}, 'base': fingerprint(base),
            'data': [u['sha256'] for u in meta['users']]}
identity = json.loads(json.dumps(identity))                  # as a file gives it back: tuples are lists
start, clock = 0, {'seconds': 0.0, 'training': 0.0}
if resume:
    try:
        state = torch.load(out / 'checkpoint.pt', map_location='cpu', weights_only=True)
    except Exception as error:
        die(f'{out_dir}/checkpoint.pt cannot be read ({type(error).__name__}): start again with --overwrite')
    changed = [k for k in identity if state['identity'].get(k) != identity[k]]
    if changed:
        die(f'--resume: {out_dir} was made with another {", ".join(changed)}; use the same, or another --out_dir')
    start, clock, server = state['round'], state['clock'], state['server']
    for user, saved in zip(users, state['users']):
        load(user, saved['adapter'])
        user.expert_opt.load_state_dict(saved['expert_opt'])
        if user.router_opt:
            user.router_opt.load_state_dict(saved['router_opt'])
        for count in ('expert_steps', 'router_steps', 'test_ppl', 'pretrained_ppl'):
            setattr(user, count, saved[count])
    with open(out / 'metrics.jsonl', 'rb+') as f:
        f.truncate(state['metrics_bytes'])                   # lines of a round that was not finished are run again
else:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for old in (out / 'summary.json', out / 'checkpoint.pt', out / 'metrics.jsonl', *out.glob('adapters/*.safetensors')):
            old.unlink(missing_ok=True)
        versions = {'python': sys.version.split()[0], 'torch': torch.__version__, 'numpy': np.__version__}
        write_atomically(out / 'config.json', lambda file: file.write_text(json.dumps(
            {**config, 'device': device, 'dtype': dtype, 'versions': versions, 'git_commit': git_commit(),
             'base_sha256': identity['base'], 'users': [u['name'] for u in meta['users']]}, indent=1)))
    except OSError as error:
        die(f'cannot write to --out_dir={out_dir}: {error.strerror}')
metrics = open(out / 'metrics.jsonl', 'a', encoding='utf-8')
metrics.seek(0, os.SEEK_END)

# ---- before round 1: the base as it is -----------------------------------------------------------------------------
print(f'{method} on {dataset} ({target}): {N} users, {sum(p.numel() for p in base.parameters()):,} frozen parameters, '
      f'{users[0].trainable if rounds else 0:,} trainable (user 0), {message_bytes:,} bytes up '
      f'per user and round, {device} {dtype}')
began, t = time.time() - clock['seconds'], start - 1
if start == 0:
    for user in users:
        user.test_ppl = user.pretrained_ppl = test_perplexity(user, base, 'pretrained')

# ---- Algorithm 1 ---------------------------------------------------------------------------------------------------
bar = tqdm(total=rounds * N * local_steps, initial=start * N * local_steps, disable=None, unit='step', smoothing=0.05)
for t in range(start, rounds):
    last = t + 1 == rounds
    for user in users:                                       # in parallel in the paper, in turn here
        load(user, server)                                   # download: every user starts from the same generalists
        tic = time.time()
        for _ in range(local_steps):
            lr = cosine(user.expert_steps)
            for group in user.expert_opt.param_groups:
                group['lr'] = lr
            # eq. (2), lower level: experts descend on the training set, router fixed
            ce, lb = descend(user, user.expert_opt, user.data['train'], (seed, user.id, 0, user.expert_steps))
            user.expert_steps += 1
            log('train', step=user.expert_steps, user=user.id, loss=ce, ppl=perplexity(ce), lb=lb, lr=lr)
            if not math.isfinite(ce):
                sys.exit(f'user {user.id} ({user.name}): the training loss is {ce} at step {user.expert_steps}: '
                         f'lower --expert_lr; the last finished round is in {out_dir}/checkpoint.pt')
            if user.router_opt and user.expert_steps % router_every == 0:
                for _ in range(router_steps):
                    # eq. (3), upper level: the router descends on the validation set, experts fixed
                    ce_valid, lb = descend(user, user.router_opt, user.data[router_data], (seed, user.id, 1, user.router_steps))
                    user.router_steps += 1
                    log('router', step=user.expert_steps, router_step=user.router_steps, user=user.id, loss=ce_valid,
                        ppl=perplexity(ce_valid), lb=lb, lr=router_lr)
            bar.update()
            bar.set_postfix({'round': t + 1, 'user': user.name, 'loss': f'{ce:.3f}',
                             'test ppl': f'{np.mean([u.test_ppl for u in users]):.3f}'})
        clock['training'] += time.time() - tic
        if last or (t + 1) % eval_every == 0:                # after local steps, before aggregation
            user.test_ppl = test_perplexity(user, user.model, 'local')
        log('comm', step=user.expert_steps, user=user.id, bytes_up=message_bytes, bytes_down=message_bytes)
    if server:
        server = fedavg([upload(user) for user in users])    # θ^G = 1/N Σ_i θ_i^G
    clock['seconds'] = time.time() - began
    save_checkpoint()
    if last or (t + 1) % eval_every == 0:
        tqdm.write(f'round {t + 1:3}/{rounds}  test perplexity ' + '  '.join(f'{u.name} {u.test_ppl:.3f}' for u in users))
bar.close()

# ---- the end: what came out ----------------------------------------------------------------------------------------
save_adapters()
if server and rounds:                                        # the same users once more, with the averaged generalists
    for user in users:
        load(user, server)
        user.aggregated_ppl = test_perplexity(user, user.model, 'aggregated')
metrics.close()
trained = [user.expert_steps + user.router_steps for user in users]
summary = {
    'method': method, 'dataset': dataset, 'target': target, 'seed': seed, 'rounds': rounds,
    'mean_test_ppl': float(np.mean([u.test_ppl for u in users])), 'test_ppl': [u.test_ppl for u in users],
    'pretrained_test_ppl': [u.pretrained_ppl for u in users],
    'aggregated_test_ppl': [u.aggregated_ppl for u in users] if server and rounds else None,
    'trainable_params': [u.trainable if rounds else 0 for u in users],
    'shared_params': sum(v.numel() for v in server.values()),
    'bytes_up': message_bytes * rounds * N, 'bytes_down': message_bytes * rounds * N,
    'seconds': time.time() - began,
    'tokens_per_second': sum(trained) * batch_size * block_size / clock['training'] if rounds else None,
    'peak_rss_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)}
write_atomically(out / 'summary.json', lambda file: file.write_text(json.dumps(summary, indent=1)))
rows = [[u.name, u.pretrained_ppl, u.test_ppl] + ([u.aggregated_ppl] if server and rounds else []) for u in users]
rows.append(['mean', *(float(np.mean([row[c] for row in rows])) for c in range(1, len(rows[0])))])
print(table(['test perplexity', 'pretrained', method, 'after aggregation'][:len(rows[0])], rows))
print(f'{summary["seconds"]:.0f} s; wrote {out}/summary.json, metrics.jsonl, config.json, checkpoint.pt, adapters/')
