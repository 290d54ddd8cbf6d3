"""CoMiGS (arXiv 2409.13931), Algorithm 1: N users fine-tune one frozen GPT-2 together, simulated in one process.

    python data/prepare.py demo                                         # text that every machine has
    python train.py config/demo.py                                      # 4 users, a minute on a laptop
    python train.py config/slimpajama_1gxs.py --n_experts=4,2,2,2       # GPT-2 124M, experts per user
    python train.py config/agnews.py --method=fedavg --out_dir=out/x    # a baseline is another row of switches
    python train.py --list_methods                                      # all the rows
"""
import contextlib
import functools
import hashlib
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

import federate
from configurator import configure, die
from data.stream import get_batch, load_dataset, load_text
from eval import evaluate, fingerprint, perplexity, table
from lora_moe import add_lora, initial, load_balance_loss, roles
from model import GPT, load_gpt, save_gpt

# ---- switches: override with config/*.py or --name=value ----------------------------------------------------------
method = 'comigs_1g1s'          # a row of METHODS below; sets the switches of the next block
dataset = 'demo'                # folder under data/, made by data/prepare.py
target = 'own'                  # valid and test text: 'own' category, or a 'mixture' of all users' categories
init_from = 'gpt2'              # gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder or a .safetensors file
out_dir = 'out/run'             # everything this run writes
resume = False                  # continue the run in out_dir from its last finished round
overwrite = False               # replace the run in out_dir
# ---- the method
n_experts = 2                   # LoRA experts in every MLP block; one int, or one per user: 4,2,2,2
n_generalists = 1               # experts 0 .. n_generalists-1 are averaged over users, the rest never leave
share_attention = True          # whether the attention LoRAs are averaged too
router = 'learned'              # learned | mean (plain mean of all experts) | frozen (random, never trained)
router_data = 'valid'           # valid | train (own phase on either) | joint (with the experts, training loss)
aggregate = 'fedavg'            # none, or a rule: fedavg ffa fedsa trust median trimmed_mean hetlora flexlora flora consensus
lora_rank = 8                   # rank of the MLP LoRAs; one int, or one per user
lora_alpha = 16.0               # scaling is lora_alpha / sqrt(rank)
top_k = 2                       # experts run per token
load_balance = 'generalist'     # generalist (eq. 6) | uniform | none
lb_coef = 0.01                  # lambda, weight of load balancing in both levels' losses
routing_unit = 'token'          # what one routing decision covers: token | prefix (causal mean) | sequence (looks ahead)
one_routing = False             # the first layer's decision holds for all layers, instead of one decision per layer
ghost_noise = 0                 # sequences drawn for the noise after every LayerNorm, training only; 0: off
leak_gradients = False          # as the authors' code: an optimizer clears its own gradients only, so the levels mix
pooled = False                  # one model on everybody's training text, with batch_size windows for each of them
match = 'none'                  # one expert as large as n_experts of rank 8: full (8 n_experts) | active (8 min(2, n_experts))
# ---- what single rules need
trust = 'validation'            # trust: users judge each other by weights | validation | predictions (PCL strategies 1, 2, 3)
trust_temperature = 1.0         # trust: of the softmax over a user's scores
prune_gamma = 0.99              # hetlora: share of the rank that a pruning keeps; 1 never prunes
prune_coef = 5e-3               # hetlora: weight of the penalty on the tail that the next pruning would cut
trim = 0.25                     # trimmed_mean: share of the users cut from either end of every coordinate
fuse = False                    # fedavg: at the end every user mixes own and averaged MLP LoRAs by validation loss (FDLoRA)
consensus_coef = 0.5            # consensus: weight of the cross-entropy with the pseudo-labels
consensus_start = 2             # consensus: rounds before the first pseudo-labels
public_text = ''                # consensus, trust=predictions: a file that all may read; '': pieces of the validation texts
judge_windows = 64              # windows of that, or of a user's validation text, on which models are judged
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


# (experts, generalists, attention shared, router, trained on, combined by, rank), the paper's table, what it is, other switches
COLUMNS = ('n_experts', 'n_generalists', 'share_attention', 'router', 'router_data', 'aggregate', 'lora_rank')
METHODS = {
    'pretrained':     ((1, 0, False, 'mean',    'valid', 'none',      8), 'T1', 'the base, no training'),
    'centralized':    ((2, 0, False, 'mean',    'valid', 'none',      8), 'T1', 'one model on pooled text', dict(pooled=True)),
    'local':          ((2, 0, False, 'mean',    'valid', 'none',      8), 'T1', 'everybody alone'),
    'fedavg':         ((2, 2, True,  'mean',    'valid', 'fedavg',    8), 'T1', 'every LoRA averaged'),
    'ffa_lora':       ((1, 1, True,  'mean',    'valid', 'ffa',       16), 'T1', 'A frozen, B averaged (2403.12313)'),
    'pcl':            ((2, 2, True,  'mean',    'valid', 'trust',     8), 'T1', 'averages weighted by trust (2404.09753)'),
    'comigs_2s':      ((2, 0, False, 'learned', 'valid', 'none',      8), 'T1', 'two specialists, own router, nothing shared'),
    'comigs_2g':      ((2, 2, True,  'learned', 'valid', 'fedavg',    8), 'T1', 'two generalists, own router'),
    'comigs_1g1s':    ((2, 1, True,  'learned', 'valid', 'fedavg',    8), 'T1', 'generalist, specialist, own router'),
    'comigs_1gxs':    ((4, 1, True,  'learned', 'valid', 'fedavg',    8), 'T2', 'one generalist of n_experts'),
    'hetlora':        ((1, 1, True,  'mean',    'valid', 'hetlora',   16), 'T2', 'ranks differ: padded, pruned (2401.06432)'),
    'flexlora':       ((1, 1, True,  'mean',    'valid', 'flexlora',  16), 'T2', 'ranks differ: by SVD (2402.11505)'),
    'local_moe':      ((2, 0, False, 'learned', 'joint', 'none',      8), 'T4', '2S, router with the experts'),
    'fedavg_moe':     ((2, 2, True,  'learned', 'joint', 'fedavg',    8), 'T4', '2G, router with the experts'),
    'pfedmoe':        ((2, 1, True,  'learned', 'joint', 'fedavg',    8), 'T4', '1G1S, router with the experts (2402.01350)'),
    'local_moe_tr':   ((2, 0, False, 'learned', 'train', 'none',      8), 'T4', '2S, router on training text'),
    'fedavg_moe_tr':  ((2, 2, True,  'learned', 'train', 'fedavg',    8), 'T4', '2G, router on training text'),
    'comigs_1g1s_tr': ((2, 1, True,  'learned', 'train', 'fedavg',    8), 'T4', '1G1S, router on training text'),
    'fedsa_lora':     ((1, 1, True,  'mean',    'valid', 'fedsa',     16), '-', 'A averaged, B stays (2410.01463)'),
    'fdlora':         ((1, 1, True,  'mean',    'valid', 'fedavg',    16), '-', 'FedAvg and own (2406.07925)', dict(fuse=True)),
    'flora':          ((1, 1, True,  'mean',    'valid', 'flora',     16), '-', 'stacked, merged into the base (2409.05976)'),
    'consensus':      ((2, 0, False, 'mean',    'valid', 'consensus', 8), '-', 'only predictions leave (2305.18497)'),
}
RULES = ('none', 'fedavg', 'ffa', 'fedsa', 'trust', 'median', 'trimmed_mean', 'hetlora', 'flexlora', 'flora', 'consensus')
if '--list_methods' in sys.argv:
    print(table(['--method', 'paper', 'what it is', *COLUMNS, 'more'], [
        [name, where.replace('T', 'Table '), what, *row, ' '.join(f'{k}={v}' for switches in more for k, v in switches.items())]
        for name, (row, where, what, *more) in METHODS.items()], left=3))
    sys.exit()
rows = {name: dict(zip(COLUMNS, row)) | (more[0] if more else {}) for name, (row, _, _, *more) in METHODS.items()}
config = configure(globals(), sys.argv[1:], rows, per_user=('n_experts', 'lora_rank'))
if method == 'pretrained':
    rounds = config['rounds'] = 0   # the base as it is, whatever a config file says

# ---- refuse what cannot run, before anything is written ------------------------------------------------------------
for name, legal in {'target': ('own', 'mixture'), 'router': ('learned', 'mean', 'frozen'), 'aggregate': RULES,
                    'router_data': ('valid', 'train', 'joint'), 'load_balance': ('generalist', 'uniform', 'none'),
                    'routing_unit': ('token', 'prefix', 'sequence'), 'trust': ('weights', 'validation', 'predictions'),
                    'match': ('none', 'active', 'full'), 'dtype': ('auto', 'float32', 'bfloat16')}.items():
    if config[name] not in legal:
        die(f'--{name}={config[name]}: expected one of {", ".join(legal)}')
for name in ('local_steps', 'router_every', 'router_steps', 'batch_size', 'micro_batch_size', 'block_size', 'eval_every',
             'top_k', 'lora_alpha', 'expert_lr', 'router_lr', 'trust_temperature', 'judge_windows'):
    if config[name] <= 0:
        die(f'--{name}={config[name]}: must be greater than 0')
for name in ('rounds', 'seed', 'n_generalists', 'ghost_noise', 'prune_coef', 'consensus_coef', 'consensus_start'):
    if config[name] < 0:
        die(f'--{name}={config[name]}: must not be negative')
if not 0 <= trim < 0.5 or not 0 < prune_gamma <= 1:
    die(f'--trim={trim} must be in [0, 0.5) and --prune_gamma={prune_gamma} in (0, 1]')
shares = aggregate not in ('none', 'consensus')              # whether any tensor leaves a user
if not shares and (n_generalists or share_attention):
    die(f'--aggregate={aggregate} shares no tensors: it needs --n_generalists=0 and --share_attention=False')
if shares and not (n_generalists or share_attention):
    die(f'--aggregate={aggregate} has nothing to combine: give --n_generalists=1 or more, or --aggregate=none')
if fuse and (aggregate != 'fedavg' or not n_generalists):
    die('--fuse mixes a user\'s own and the averaged generalists: it needs --aggregate=fedavg and --n_generalists=1 or more')
if ghost_noise and min(batch_size, micro_batch_size) < 2:
    die(f'--ghost_noise={ghost_noise} draws other sequences of a micro-batch: --micro_batch_size must be 2 or more')
asks_public = aggregate == 'consensus' or (aggregate, trust) == ('trust', 'predictions')
if public_text and not asks_public:
    die(f'--public_text={public_text} is read by --aggregate=consensus and --trust=predictions only')
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
    public = load_text(public_text, meta['tokenizer']) if public_text else None
except (OSError, ValueError, RuntimeError, AssertionError) as error:
    die(error)
if block_size > base.config.n_positions:
    die(f'--block_size={block_size}: {init_from} has only {base.config.n_positions} positions')
names = [u['name'] for u in meta['users']]
tests = [[(i, data['test'])] for i, data in enumerate(streams)]                  # whose test text a user's model is tested on
if pooled:                                                                       # one user with everybody's text
    tests = [sum(tests, [])]
    streams = [{split: np.concatenate([data[split] for data in streams]) for split in ('train', 'valid')}]
N = len(streams)


def per_user(name: str) -> tuple:
    """The entries of a per-user switch, one per user."""
    value = config[name] if isinstance(config[name], tuple) else (config[name],) * N
    if len(value) != N or min(value) < 1:
        die(f'--{name}={",".join(map(str, value))}: expected one value of 1 or more, or {N} of them, one per user of {dataset}')
    return value


if match != 'none':
    lora_rank = config['lora_rank'] = tuple(8 * (n if match == 'full' else min(2, n)) for n in per_user('n_experts'))
    n_experts = config['n_experts'] = 1
if aggregate in ('hetlora', 'flexlora', 'flora') and set(per_user('n_experts')) != {1}:
    die(f'--aggregate={aggregate} has one expert per user, whose rank may differ: give --n_experts=1 and --lora_rank=16,8,..., '
        'or let --match=active or --match=full derive the ranks from --n_experts')
for i, n in enumerate(per_user('n_experts')):
    if n < n_generalists:
        die(f'user {i} has n_experts={n}, fewer than n_generalists={n_generalists}: every user holds all the generalists')
if shares and aggregate not in ('hetlora', 'flexlora', 'flora') and len(set(per_user('lora_rank'))) > 1:
    die(f'--aggregate={aggregate} averages tensors of one shape: --lora_rank must be the same for all users '
        '(hetlora, flexlora, flora and consensus take any)')
if dtype == 'auto':
    dtype = 'bfloat16' if device_type == 'cuda' and torch.cuda.is_bf16_supported() else 'float32'
autocast = torch.autocast(device_type, torch.bfloat16) if dtype == 'bfloat16' else contextlib.nullcontext()

# ---- users: own data, own LoRA and router, own optimizers, one frozen base for all ---------------------------------
users = []
for i in range(N):
    model = add_lora(base, per_user('n_experts')[i], n_generalists, per_user('lora_rank')[i], lora_alpha, top_k,
                     router != 'mean', routing_unit, one_routing, ghost_noise)
    role = roles(model)
    adapter = {name: p for name, p in model.named_parameters() if name in role}     # all that is this user's
    with torch.no_grad():
        for name, p in adapter.items():
            p.copy_(initial(name, p.shape, seed, 'user', i))
    common = federate.shared_names(role, share_attention) if shares else []         # these start equal in all users
    theta = [p for name, p in adapter.items() if role[name] != 'router'             # experts: the lower level
             and not (aggregate == 'ffa' and name in common and name.endswith('.A'))]
    phi = [p for name, p in adapter.items() if role[name] == 'router' and router == 'learned']  # the upper level
    adamw = dict(betas=(0.9, 0.95), weight_decay=weight_decay, fused=device_type != 'mps')
    user = SimpleNamespace(
        id=i, name='all' if pooled else names[i], data=streams[i], tests=tests[i], model=model, role=role, adapter=adapter,
        expert_opt=torch.optim.AdamW(theta + phi if router_data == 'joint' else theta, lr=expert_lr, **adamw),
        router_opt=torch.optim.AdamW(phi, lr=router_lr, **adamw) if phi and router_data != 'joint' else None,
        batch_size=batch_size * len(tests[i]), trained={id(p) for p in theta + phi},
        rank=per_user('lora_rank')[i],                       # of its generalists, MLP only: hetlora prunes it
        scaling=lora_alpha / math.sqrt(per_user('lora_rank')[i]),
        download={}, pseudo_labels=None, bytes_up=0, bytes_down=0, expert_steps=0, router_steps=0)
    user.trainable = sum(p.numel() for p in theta + phi)
    users.append(user)
shared = [name for name in common if name[-1] in {'ffa': 'B', 'fedsa': 'A'}.get(aggregate, 'AB')]   # these leave every round
widest = max(users, key=lambda user: user.rank)
server = {name: initial(name, widest.adapter[name].shape, seed, 'server') for name in common}


def load(user: SimpleNamespace, tensors: dict) -> None:
    """Copies tensors into the user's own of the same names; components beyond a smaller rank become 0."""
    with torch.no_grad():
        for name, t in tensors.items():
            user.adapter[name].zero_()[tuple(map(slice, t.shape))] = t.to(device)


def upload(user: SimpleNamespace) -> dict:
    """What leaves the user: copies of its shared tensors and nothing else."""
    return federate.truncate({name: user.adapter[name].detach().clone() for name in shared}, user.rank)


for user in users:                                           # before round 1, from one seed
    load(user, federate.truncate(server, user.rank))
    user.download = upload(user) if aggregate != 'flora' else {}
if aggregate not in ('fedavg', 'ffa', 'median', 'trimmed_mean'):
    server = {}                                              # no one model for all


def whole_windows(tokens: np.ndarray, n: int) -> torch.Tensor:
    """The first n whole windows of a stream, or as many as it has: (n, T)."""
    n = min(n, len(tokens) // block_size)
    return torch.from_numpy(tokens[:n * block_size].astype(np.int64)).view(n, block_size)


if asks_public:
    public = whole_windows(public, judge_windows) if public_text else torch.cat(
        [whole_windows(data['valid'], math.ceil(judge_windows / N)) for data in streams])
    if not len(public):
        die(f'--public_text={public_text} is shorter than one window of {block_size} tokens')
    public = public.to(device)                               # (W, T)


def descend(user: SimpleNamespace, optimizer: torch.optim.Optimizer, tokens: np.ndarray, key: tuple) -> tuple[float, float]:
    """One optimizer step on one batch; changes only the tensors that this optimizer holds. Returns cross-entropy (nats per
    token) and load balancing, means over the batch. No gradient survives the step, so nothing crosses the two levels
    (unless leak_gradients: then every loss reaches every trained tensor, and a step clears its own optimizer's only)."""
    held = {id(p) for group in optimizer.param_groups for p in group['params']}
    for p in user.adapter.values():
        p.requires_grad_(id(p) in (user.trained if leak_gradients else held))
        if not leak_gradients:
            p.grad = None
    if ghost_noise:
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))             # the one use of this generator
    user.model.train()
    sums = torch.zeros(2, device=device)
    x, y = (t.to(device) for t in get_batch(tokens, user.batch_size, block_size, key))        # (B, T) each
    distil = user.pseudo_labels if optimizer is user.expert_opt else None
    if distil:                                               # as many windows of public text beside the private ones
        pick = torch.from_numpy(np.random.default_rng((*key, 1)).integers(0, len(public), user.batch_size)).to(device)  # (B,)
        pick = pick.split(micro_batch_size)
    for i, (x, y) in enumerate(zip(x.split(micro_batch_size), y.split(micro_batch_size))):
        share = len(x) / user.batch_size
        with autocast:
            ce, routing = user.model.loss(x, y)
            lb = load_balance_loss(routing, load_balance)
            loss = ce + lb_coef * lb
            if aggregate == 'hetlora':
                loss = loss + prune_coef * federate.tail_norm(user.adapter, user.rank, prune_gamma)
            if distil:
                psi = [v[pick[i]].flatten(0, 1) for v in distil]
                loss = loss + consensus_coef * federate.consensus_loss(user.model(public[pick[i]])[0].flatten(0, 1), psi)
        (loss * share).backward()                            # frees this micro-batch's graph: one is alive at a time
        sums += torch.stack((ce.detach(), torch.as_tensor(lb, device=device).detach())) * share
    optimizer.step()
    for p in user.adapter.values():
        if id(p) in held or not leak_gradients:
            p.grad = None
    user.model.eval()
    return tuple(sums.tolist())


def cosine(step: int) -> float:
    """Learning rate of the experts' step number `step` = 0, 1, ...: expert_lr, falling to a tenth of it (METHOD 1.4)."""
    return expert_lr * (0.55 + 0.45 * math.cos(math.pi * step / (rounds * local_steps)))


def test_perplexity(user: SimpleNamespace, model: GPT, when: str) -> list[float]:
    """Perplexity of a model on the whole test split of the user (of everybody, if pooled), which nothing else ever reads."""
    found = []
    for i, tokens in user.tests:
        with autocast:
            result = evaluate(model, tokens, block_size)
        log('eval', step=user.expert_steps, user=i, split='test', when=when, loss=result['loss'], ppl=result['ppl'])
        found.append(result['ppl'])
    return found


def of_all(name: str) -> list[float]:
    """One figure for every test text: of the users, or of the pooled model's several."""
    return sum((getattr(user, name) for user in users), [])


def judged(user: SimpleNamespace, tensors: dict) -> float:
    """Cross-entropy (nats per token) on the first judge_windows windows of the user's validation text, with these tensors in
    place of its own of those names."""
    own = {name: user.adapter[name].detach().clone() for name in tensors}
    load(user, tensors)
    with autocast:
        loss = evaluate(user.model, user.data['valid'][:judge_windows * block_size + 1], block_size)['loss']
    load(user, own)
    return loss


# ---- between two rounds: what the server makes of the updates, and what a user makes of that --------------------------
def trust_scores(updates: list[dict]) -> torch.Tensor:
    """S (N, N): how good user i finds user j (PCL). What this costs beside the updates is added to the users' bytes."""
    if trust == 'weights':
        return federate.weight_scores(updates)
    if trust == 'validation':                                # every user gets the others' updates and sends N numbers
        for user in users:
            user.bytes_up += 4 * N
            user.bytes_down += sum(federate.n_bytes(update) for update in updates) - federate.n_bytes(updates[user.id])
        return federate.validation_scores(torch.tensor([[perplexity(judged(user, u)) for u in updates] for user in users]))
    return federate.prediction_scores(all_predictions(logits=True), base.config.vocab_size)


def all_predictions(logits: bool = False) -> list[tuple]:
    """Every user's 100 likeliest tokens at every position of the public text: 600 bytes a position."""
    with autocast:
        predictions = [federate.top_predictions(user.model, public, 100, logits) for user in users]
    for user, (ids, values) in zip(users, predictions):
        user.bytes_up += federate.n_bytes({'ids': ids, 'values': values})
    return predictions


def combine(updates: list[dict]) -> list[dict]:
    """What every user starts the next round from: the rule that --aggregate names, applied to what all users sent."""
    if aggregate in ('fedavg', 'ffa', 'fedsa'):              # the same mean, of A and B, of B alone, of A alone
        return [federate.fedavg(updates)] * N                # θ^G = 1/N Σ_i θ_i^G
    if aggregate == 'median':
        return [federate.median(updates)] * N
    if aggregate == 'trimmed_mean':
        return [federate.trimmed_mean(updates, trim)] * N
    if aggregate == 'trust':
        W = federate.trust_matrix(trust_scores(updates), trust_temperature)
        log('trust', matrix=W.tolist())
        return federate.trust_average(updates, W)
    if aggregate == 'consensus' and t + 1 >= consensus_start:
        predictions = all_predictions()
        W = federate.prediction_trust(predictions, base.config.vocab_size)
        log('trust', matrix=W.tolist())
        for user in users:
            psi = federate.consensus(predictions, W[user.id].tolist(), base.config.vocab_size)
            user.pseudo_labels = [v.view(*public.shape, -1).to(device) for v in psi]         # (W, T, K) ids, probabilities
            user.bytes_down += federate.n_bytes(dict(enumerate(psi)))
    if not shares:
        return [{}] * N
    # ranks that differ: generalists by the rule, attention LoRAs, of one rank for all, by the mean
    experts = [{name: v for name, v in update.items() if 'generalists' in name} for update in updates]
    attention = [{name: v for name, v in update.items() if 'generalists' not in name} for update in updates]
    total = sum(len(user.data['train']) for user in users)
    weights, scalings = [len(user.data['train']) / total for user in users], [user.scaling for user in users]
    if aggregate == 'hetlora':
        new = federate.hetlora(experts, scalings)
        return [federate.truncate(new, user.rank) | federate.fedavg(attention) for user in users]
    if aggregate == 'flexlora':
        return [own | federate.fedavg(attention) for own in federate.flexlora(experts, weights, scalings)]
    gamma = users[0].model.h[0].attn.c_attn.lora.scaling
    return [federate.flora(experts, weights, scalings) | federate.flora(attention, weights, [gamma] * N)] * N


def receive(user: SimpleNamespace) -> None:
    """Download: the user's shared tensors become what the server sent it."""
    user.bytes_down += federate.n_bytes(user.download)
    if aggregate in ('flexlora', 'flora') and t > 0:         # Adam's moments belong to the old factors
        for name in user.download:
            if aggregate == 'flora' or 'generalists' in name:
                user.expert_opt.state.pop(user.adapter[name], None)
    if aggregate != 'flora':
        return load(user, user.download)
    if user is users[0] and user.download:                   # all users hold the same base, so one addition stands for theirs
        weight = dict(base.named_parameters())
        with torch.no_grad():
            for name in federate.pairs(user.download):
                merged = weight[name.replace('generalists.0.', '').removesuffix('.lora') + '.weight']
                merged += user.download[name + '.B'] @ user.download[name + '.A']
    load(user, {name: initial(name, user.adapter[name].shape, seed, 'server', t) for name in shared})


def prune(user: SimpleNamespace) -> None:
    """HetLoRA: the last components of every generalist become 0, with their moments, and stay so: no gradient reaches them."""
    user.rank = max(1, int(prune_gamma * user.rank))
    for name, p in user.adapter.items():
        if user.role[name] == 'generalist':
            for v in (p.detach(), *(m for m in user.expert_opt.state[p].values() if m.shape == p.shape)):
                (v[user.rank:] if name.endswith('.A') else v[:, user.rank:]).zero_()


def fusion(user: SimpleNamespace) -> tuple[float, float]:
    """FDLoRA's AdaFusion (2406.07925): (w1, w2) with which A = w1 A_own + w2 A_mean, B likewise, of the MLP LoRAs, have the
    least loss on validation windows + 0.05 mean |w|. A search without gradients: steps along the axes, halved twice."""
    own = {name: user.adapter[name].detach().clone() for name in user.download if user.role[name] == 'generalist'}

    def cost(w):
        return judged(user, federate.fuse(own, user.download, *w)) + 0.05 * (abs(w[0]) + abs(w[1])) / 2
    cost = functools.cache(cost)
    best, step = min(((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)), key=cost), 0.25
    while step > 0.05:
        near = min(((best[0] + a, best[1] + b) for a, b in ((step, 0), (-step, 0), (0, step), (0, -step))), key=cost)
        best, step = (near, step) if cost(near) < cost(best) else (best, step / 2)
    load(user, federate.fuse(own, user.download, *best))
    return best


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


KEPT = ('download', 'rank', 'pseudo_labels', 'expert_steps', 'router_steps', 'test_ppl', 'pretrained_ppl')   # of a user


def save_checkpoint() -> None:
    state = {'round': t + 1, 'identity': identity, 'metrics_bytes': metrics.tell(), 'clock': clock, 'server': server,
             'base': base.state_dict() if aggregate == 'flora' else None,
             'users': [{'adapter': {n: p.detach() for n, p in u.adapter.items()}, 'expert_opt': u.expert_opt.state_dict(),
                        'router_opt': u.router_opt.state_dict() if u.router_opt else None,
                        'grad': {n: p.grad for n, p in u.adapter.items() if p.grad is not None},     # of leak_gradients
                        **{name: getattr(u, name) for name in KEPT}} for u in users]}
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
            {n: v.detach().cpu().contiguous() for n, v in server.items()}, file, {'base': init_from, 'round': str(rounds)}))
    if aggregate == 'flora':
        write_atomically(out / 'adapters' / 'base.safetensors', lambda file: save_gpt(base, file))


def git_commit() -> str:
    try:
        return subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*'], capture_output=True,
                              text=True, timeout=10, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ''


# what must be the same for a run to be continued: the base, the data and every switch that shapes the numbers
free = ('out_dir', 'resume', 'overwrite', 'device', 'init_from', 'dataset')
identity = {**{k: v for k, v in config.items() if k not in free}, 'base': fingerprint(base),
            'data': [u['sha256'] for u in meta['users']],
            'public': None if public is None else hashlib.sha256(public.cpu().numpy().tobytes()).hexdigest()}
identity = json.loads(json.dumps(identity))                  # as a file gives it back: tuples are lists
start, clock = 0, {'seconds': 0.0, 'training': 0.0, 'bytes_up': 0, 'bytes_down': 0}
if resume:
    try:
        state = torch.load(out / 'checkpoint.pt', map_location='cpu', weights_only=True)
    except Exception as error:
        die(f'{out_dir}/checkpoint.pt cannot be read ({type(error).__name__}): start again with --overwrite')
    changed = [k for k in identity if state['identity'].get(k) != identity[k]]
    if changed:
        die(f'--resume: {out_dir} was made with another {", ".join(changed)}; use the same, or another --out_dir')
    start, clock, server = state['round'], state['clock'], state['server']
    if state['base']:
        base.load_state_dict(state['base'])
    for user, saved in zip(users, state['users']):
        load(user, saved['adapter'])
        for name, g in saved['grad'].items():
            user.adapter[name].grad = g.to(device)
        user.expert_opt.load_state_dict(saved['expert_opt'])
        if user.router_opt:
            user.router_opt.load_state_dict(saved['router_opt'])
        for name in KEPT:
            setattr(user, name, saved[name])
    with open(out / 'metrics.jsonl', 'rb+') as f:
        f.truncate(state['metrics_bytes'])                   # lines of a round that was not finished are run again
else:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for old in (out / 'summary.json', out / 'checkpoint.pt', out / 'metrics.jsonl', out / 'trust.png',
                    *out.glob('adapters/*.safetensors')):
            old.unlink(missing_ok=True)
        versions = {'python': sys.version.split()[0], 'torch': torch.__version__, 'numpy': np.__version__}
        write_atomically(out / 'config.json', lambda file: file.write_text(json.dumps(
            {**config, 'device': device, 'dtype': dtype, 'versions': versions, 'git_commit': git_commit(),
             'base_sha256': identity['base'], 'users': names}, indent=1)))
    except OSError as error:
        die(f'cannot write to --out_dir={out_dir}: {error.strerror}')
metrics = open(out / 'metrics.jsonl', 'a', encoding='utf-8')
metrics.seek(0, os.SEEK_END)

# ---- before round 1: the base as it is -----------------------------------------------------------------------------
print(f'{method} on {dataset} ({target}): {N} users, {sum(p.numel() for p in base.parameters()):,} frozen parameters, '
      f'{users[0].trainable if rounds else 0:,} trainable (user 0), {federate.n_bytes(upload(users[0])):,} bytes of LoRA up '
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
        receive(user)                                        # download: every user starts from the same generalists
        tail = federate.tail_norm(user.adapter, user.rank, prune_gamma) if aggregate == 'hetlora' else 0
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
                             'test ppl': f'{np.mean(of_all("test_ppl")):.3f}'})
        if aggregate == 'hetlora' and federate.tail_norm(user.adapter, user.rank, prune_gamma) < tail:
            prune(user)
        clock['training'] += time.time() - tic
        if last or (t + 1) % eval_every == 0:                # after local steps, before aggregation
            user.test_ppl = test_perplexity(user, user.model, 'local')
    updates = [upload(user) for user in users]
    for user, download in zip(users, combine(updates)):      # θ^G = 1/N Σ_i θ_i^G, or another rule
        user.download = download
    for user, update in zip(users, updates):
        user.bytes_up += federate.n_bytes(update)
        log('comm', step=user.expert_steps, user=user.id, bytes_up=user.bytes_up, bytes_down=user.bytes_down)
        clock['bytes_up'], clock['bytes_down'] = clock['bytes_up'] + user.bytes_up, clock['bytes_down'] + user.bytes_down
        user.bytes_up = user.bytes_down = 0
    if server:
        server = {name: users[0].download.get(name, users[0].adapter[name].detach()) for name in common}
    clock['seconds'] = time.time() - began
    save_checkpoint()
    if last or (t + 1) % eval_every == 0:
        tqdm.write(f'round {t + 1:3}/{rounds}  test perplexity ' + '  '.join(
            f'{name} {ppl:.3f}' for name, ppl in zip(names, of_all('test_ppl'))))
bar.close()

# ---- the end: what came out ----------------------------------------------------------------------------------------
if fuse and rounds:
    for user in users:
        w1, w2 = fusion(user)
        log('fusion', step=user.expert_steps, user=user.id, own=w1, mean=w2)
        user.test_ppl = test_perplexity(user, user.model, 'fused')
for user in users:                                           # what choices between runs may look at
    with autocast:
        result = evaluate(user.model, user.data['valid'], block_size)
    user.valid_ppl = result['ppl']
    log('eval', step=user.expert_steps, user=user.id, split='valid', when='final', loss=result['loss'], ppl=result['ppl'])
save_adapters()
after = bool(shares and rounds)
for user in users if after else ():                          # the same users once more, after the last aggregation
    receive(user)
    user.aggregated_ppl = test_perplexity(user, user.model, 'aggregated')
metrics.close()
if any(json.loads(line)['kind'] == 'trust' for line in open(out / 'metrics.jsonl', encoding='utf-8')):
    import plot
    plot.trust(out)
windows = sum(user.batch_size * (user.expert_steps + user.router_steps) for user in users)
summary = {
    'method': method, 'dataset': dataset, 'target': target, 'seed': seed, 'rounds': rounds, 'users': names,
    'mean_test_ppl': float(np.mean(of_all('test_ppl'))), 'test_ppl': of_all('test_ppl'),
    'pretrained_test_ppl': of_all('pretrained_ppl'), 'aggregated_test_ppl': of_all('aggregated_ppl') if after else None,
    # exp of the mean loss over all test tokens: what a model of pooled text is scored by elsewhere, below the mean of users
    'pooled_test_ppl': perplexity(np.average(np.log(of_all('test_ppl')), weights=[len(x) - 1 for _, x in sum(tests, [])])),
    'mean_valid_ppl': float(np.mean([u.valid_ppl for u in users])), 'valid_ppl': [u.valid_ppl for u in users],
    'trainable_params': [u.trainable if rounds else 0 for u in users],
    'shared_params': sum(v.numel() for v in upload(users[0]).values()),
    'bytes_up': clock['bytes_up'], 'bytes_down': clock['bytes_down'],
    'seconds': time.time() - began,
    'tokens_per_second': windows * block_size / clock['training'] if rounds else None,
    'peak_rss_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)}
write_atomically(out / 'summary.json', lambda file: file.write_text(json.dumps(summary, indent=1)))
columns = {'pretrained': of_all('pretrained_ppl'), method: of_all('test_ppl')} | (
    {'after aggregation': of_all('aggregated_ppl')} if after else {})
print(table(['test perplexity', *columns], [[name, *ppl] for name, ppl in zip([*names, 'mean'], zip(
    *([*c, float(np.mean(c))] for c in columns.values())))]))
print(f'{summary["seconds"]:.0f} s; wrote {out}/summary.json, metrics.jsonl, config.json, checkpoint.pt, adapters/')
