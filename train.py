"""CoMiGS (arXiv 2409.13931), Algorithm 1: N users fine-tune one frozen GPT-2 together, simulated in one process.

python data/prepare.py demo                                         # text that every machine has
python train.py config/demo.py                                      # 4 users, a minute on a laptop
python train.py config/slimpajama_1gxs.py --n_experts=4,2,2,2       # GPT-2 124M, experts per user
python train.py config/agnews.py --method=fedavg --out_dir=out/x    # a baseline is another row of switches
python train.py --list_methods                                      # all the rows
python train.py config/many_users.py                                # 1,000 users, 20 of them a round
torchrun --nproc_per_node=4 train.py config/agnews.py               # users dealt out to processes, one a GPU
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import curves
import federate
from checkpoint import write_atomically
from configurator import configure, die
from data.stream import check_dataset, get_batch, load_dataset, load_text, load_user
from eval import cell, evaluate, fingerprint, mean, perplexity, table
from lora_moe import add_lora, initial, load_balance_loss, roles
from model import GPT, fast_fp32, load_gpt, store_in_bf16

# fmt: off
# ---- switches: override with config/*.py or --name=value ----------------------------------------------------------
method = 'comigs_1g1s'          # a row of METHODS below; sets the switches of the next block
dataset = 'demo'                # folder under data/, made by data/prepare.py
target = 'own'                  # valid and test text: 'own' category, or a 'mixture' of all users' categories
init_from = 'gpt2'              # gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder or a .safetensors file
init_adapter = ''               # folder of a PEFT LoRA adapter that generalists and attention LoRAs start from; '': fresh ones
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
participation = 1.0             # share of the users that take part in a round, drawn by (seed, round); the others wait on disk
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
test_users = 0                  # users that are evaluated, drawn by the seed; 0: all
# ---- what can go wrong, and what bounds it
clip_norm = 0.0                 # bounds how far an update may move, in units of the median user's move; 0: off
failures = 0.0                  # chance that a user fails halfway through a round and loses what it did in it
attack = 'none'                 # what the last users send in place of their updates: none | nan | scale:1e6 | noise:1e3
attackers = 1                   # how many users do that
# ---- what is shown
quiet = False                   # nothing but the final table, and errors
tensorboard = False             # curves in out_dir/tensorboard (pip install -r requirements-log.txt)
wandb = False                   # curves at Weights & Biases, project nanocomigs (the same)
# ---- the machine
seed = 42                       # the paper's seeds are 42, 45, 47
device = 'auto'                 # auto | cpu | cuda | cuda:N | mps
dtype = 'auto'                  # auto (bfloat16 autocast on CUDA, else float32) | float32 | bfloat16
compile = False                 # torch.compile of the training loss: 1 to 2 minutes at the start, then faster steps


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
# fmt: on
RULES = ('none', 'fedavg', 'ffa', 'fedsa', 'trust', 'median', 'trimmed_mean', 'hetlora', 'flexlora', 'flora', 'consensus')
if '--list_methods' in sys.argv:
    lines = []
    for name, (row, where, what, *more) in METHODS.items():
        others = ' '.join(f'{k}={v}' for switches in more for k, v in switches.items())
        lines.append([name, where.replace('T', 'Table '), what, *row, others])
    print(table(['--method', 'paper', 'what it is', *COLUMNS, 'more'], lines, left=3))
    sys.exit()
rows = {name: dict(zip(COLUMNS, row)) | (more[0] if more else {}) for name, (row, _, _, *more) in METHODS.items()}
config = configure(globals(), sys.argv[1:], rows, per_user=('n_experts', 'lora_rank'))
began_script = time.time()


def stop(number: int, _) -> None:
    """SIGINT, SIGTERM: the process ends at once. Every finished round is on disk, --resume does the interrupted one again."""
    tqdm.write(
        f'train.py: {signal.Signals(number).name}: the last finished round is kept in {out_dir}, continue with --resume',
        file=sys.stderr,
    )
    sys.exit(128 + number)


for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
if method == 'pretrained':
    rounds = config['rounds'] = 0  # the base as it is, whatever a config file says

# ---- refuse what cannot run, before anything is written ------------------------------------------------------------
for name, legal in {
    'target': ('own', 'mixture'),
    'router': ('learned', 'mean', 'frozen'),
    'aggregate': RULES,
    'router_data': ('valid', 'train', 'joint'),
    'load_balance': ('generalist', 'uniform', 'none'),
    'routing_unit': ('token', 'prefix', 'sequence'),
    'trust': ('weights', 'validation', 'predictions'),
    'match': ('none', 'active', 'full'),
    'dtype': ('auto', 'float32', 'bfloat16'),
}.items():
    if config[name] not in legal:
        die(f'--{name}={config[name]}: expected one of {", ".join(legal)}')
positive = 'local_steps router_every router_steps batch_size micro_batch_size block_size eval_every judge_windows top_k'
for name in f'{positive} lora_alpha expert_lr router_lr trust_temperature'.split():
    if not 0 < config[name] < (1e9 if type(config[name]) is int else math.inf):
        die(f'--{name}={config[name]}: must be greater than 0, and below a billion')
for name in 'rounds seed n_generalists ghost_noise prune_coef consensus_coef consensus_start test_users'.split():
    if not 0 <= config[name] < (1e9 if name != 'seed' else math.inf):
        die(f'--{name}={config[name]}: must not be negative, and below a billion')
if not 0 < participation <= 1:
    die(f'--participation={participation}: must be in (0, 1]')
if not 0 <= trim < 0.5 or not 0 < prune_gamma <= 1:
    die(f'--trim={trim} must be in [0, 0.5) and --prune_gamma={prune_gamma} in (0, 1]')
if not 0 <= failures <= 1 or clip_norm < 0 or attackers < 0:
    die(f'--failures={failures} must be in [0, 1], --clip_norm={clip_norm} and --attackers={attackers} not negative')
if clip_norm and aggregate not in ('fedavg', 'ffa', 'fedsa', 'median', 'trimmed_mean'):
    die(f'--clip_norm={clip_norm} needs a rule with one result for all: --aggregate=fedavg, ffa, fedsa, median or trimmed_mean')
if not re.fullmatch(r'none|nan|(scale|noise):\d+(\.\d+)?(e\d+)?', attack):
    die(f'--attack={attack}: expected none, nan, scale:NUMBER or noise:NUMBER, such as scale:1e6')
shares = aggregate not in ('none', 'consensus')  # whether any tensor leaves a user
if not shares and (n_generalists or share_attention):
    die(f'--aggregate={aggregate} shares no tensors: it needs --n_generalists=0 and --share_attention=False')
if shares and not (n_generalists or share_attention):
    die(f'--aggregate={aggregate} has nothing to combine: give --n_generalists=1 or more, or --aggregate=none')
if fuse and (aggregate != 'fedavg' or not n_generalists):
    die("--fuse mixes a user's own and the averaged generalists: it needs --aggregate=fedavg and --n_generalists=1 or more")
if fuse and (participation < 1 or test_users or failures):
    die('--fuse ends with a search by every user: it needs --participation=1, --failures=0 and --test_users=0')
if ghost_noise and min(batch_size, micro_batch_size) < 2:
    die(f'--ghost_noise={ghost_noise} draws other sequences of a micro-batch: --micro_batch_size must be 2 or more')
if init_adapter and (not n_generalists or aggregate == 'flora'):
    die(
        '--init_adapter is what the generalists start from: it needs --n_generalists=1 or more, and not --aggregate=flora, '
        'whose LoRAs start anew every round (merge the adapter into the base of --init_from instead)'
    )
asks_public = aggregate == 'consensus' or (aggregate, trust) == ('trust', 'predictions')
if public_text and not asks_public:
    die(f'--public_text={public_text} is read by --aggregate=consensus and --trust=predictions only')
out = Path(out_dir)
try:
    if out.exists() and not out.is_dir():
        die(f'--out_dir={out_dir} is a file: give a folder')
    if resume and not checkpoint.rounds(out / 'checkpoint'):
        die(f'--resume: {out_dir} has no checkpoint; start without --resume')
    if (out / 'config.json').exists() and not (resume or overwrite):
        state = 'a finished run' if (out / 'summary.json').exists() else 'an unfinished run'
        die(f'{out_dir} already holds {state}: give --resume to continue it, --overwrite to replace it, or another --out_dir')
except OSError as error:
    die(f'cannot look into --out_dir={out_dir}: {error.strerror}')
try:
    drawn = curves.begin(config)
except ValueError as error:
    die(error)
process, processes = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))  # set by torchrun
hidden = quiet or process > 0  # neither lines nor bars of this process are shown
if device == 'auto':
    device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
if device == 'cuda' and processes > 1:
    device = f'cuda:{int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()}'
try:
    device_type = torch.device(device).type
    torch.zeros(1, device=device)
    base = load_gpt(init_from).to(device)
    folder = Path('data', dataset)
    meta = check_dataset(folder, block_size, base.config.vocab_size)
    together = target == 'mixture' or pooled  # everybody's text at once, instead of a user's when it trains
    streams = load_dataset(folder, block_size, base.config.vocab_size, target)[1] if together else None
    public = load_text(public_text, meta['tokenizer']) if public_text else None
except (OSError, ValueError, RuntimeError, AssertionError) as error:
    die(error)
if block_size > base.config.n_positions:
    die(f'--block_size={block_size}: {init_from} has only {base.config.n_positions} positions')
names = [u['name'] for u in meta['users']]
n_train = [1] if pooled else [u['tokens']['train'] for u in meta['users']]  # tokens
N = len(n_train)
copied = {i: share for i, share in enumerate(meta['overlap']) if share > 0.05}
if copied and process == 0:
    print(
        f'train.py: warning: a part of the validation text, {max(copied.values()):.0%} of its windows of 64 tokens, is also '
        f"training text (user {max(copied, key=copied.get)}; over 5 % of {len(copied)} users'): the router will trust who has "
        'learned it by heart',
        file=sys.stderr,
    )
if test_users > N:
    die(f'--test_users={test_users}: {dataset} has {N} users')


def texts_of(i: int) -> tuple[dict, list]:
    """User i's streams, and whose test text its model is tested on: [(number of a user, tokens)]."""
    if pooled:  # one user with everybody's text
        return (
            {split: np.concatenate([data[split] for data in streams]) for split in ('train', 'valid')},
            [(j, data['test']) for j, data in enumerate(streams)],
        )
    data = streams[i] if streams else load_user(folder, meta, i)
    return data, [(i, data['test'])]


def per_user(name: str) -> tuple:
    """The entries of a per-user switch, one per user."""
    value = config[name] if isinstance(config[name], tuple) else (config[name],) * N
    if len(value) != N or not 1 <= min(value) <= max(value) <= 4096:
        die(f'--{name}={",".join(map(str, value))}: expected one value from 1 to 4096, or {N}, one per user of {dataset}')
    return value


if match != 'none':
    lora_rank = config['lora_rank'] = tuple(8 * (n if match == 'full' else min(2, n)) for n in per_user('n_experts'))
    n_experts = config['n_experts'] = 1
if aggregate in ('hetlora', 'flexlora', 'flora') and set(per_user('n_experts')) != {1}:
    die(
        f'--aggregate={aggregate} has one expert per user, whose rank may differ: give --n_experts=1 and --lora_rank=16,8,..., '
        'or let --match=active or --match=full derive the ranks from --n_experts'
    )
experts_of, rank_of = per_user('n_experts'), per_user('lora_rank')
for i, n in enumerate(experts_of):
    if n < n_generalists:
        die(f'user {i} has n_experts={n}, fewer than n_generalists={n_generalists}: every user holds all the generalists')
if shares and aggregate not in ('hetlora', 'flexlora', 'flora') and len(set(rank_of)) > 1:
    die(
        f'--aggregate={aggregate} averages tensors of one shape: --lora_rank must be the same for all users '
        '(hetlora, flexlora, flora and consensus take any)'
    )
if init_adapter and len(set(rank_of)) > 1:
    die(f'--init_adapter needs one --lora_rank for all users, not {",".join(map(str, rank_of))}: their scaling depends on it')
if dtype == 'auto':
    dtype = 'bfloat16' if device_type == 'cuda' and torch.cuda.is_bf16_supported() else 'float32'
autocast = torch.autocast(device_type, torch.bfloat16) if dtype == 'bfloat16' else contextlib.nullcontext()
base_sha256 = fingerprint(base)  # of the file, whatever becomes of the base in memory
fast_fp32(device_type)
if dtype == 'bfloat16' and aggregate != 'flora':  # flora adds to the base, which float32 is needed for
    store_in_bf16(base)


# ---- users: own data, own LoRA and router, own optimizers, one frozen base for all ---------------------------------
def build(i: int) -> tuple[GPT, dict, dict]:
    """(model, {name: role}, {name: parameter} of all that is user i's)."""
    routing = (top_k, router != 'mean', routing_unit, one_routing)
    model = add_lora(base, experts_of[i], n_generalists, rank_of[i], lora_alpha, *routing, ghost_noise)
    role = roles(model)
    return model, role, {name: p for name, p in model.named_parameters() if name in role}


_, role, adapter = build(rank_of.index(max(rank_of)))  # a user of the largest rank
common = federate.shared_names(role, share_attention) if shares else []  # these start equal in all users
shared = [name for name in common if name[-1] in {'ffa': 'B', 'fedsa': 'A'}.get(aggregate, 'AB')]  # these leave every round
origin = {name: initial(name, adapter[name].shape, seed, 'server') for name in common}
adapter_sha256 = None
if init_adapter:  # private attention LoRAs start from it, too
    from export import read_peft

    fresh = [name for name in role if role[name] in ('generalist', 'attention')]
    fresh = {name: initial(name, adapter[name].shape, seed, 'server') for name in fresh}
    try:
        found, adapter_sha256 = read_peft(Path(init_adapter), fresh, lora_alpha)
    except (OSError, ValueError) as error:
        die(f'--init_adapter: {error}')
    origin |= found
server = {name: origin[name] for name in shared} if aggregate != 'flora' else {}  # what everybody's next round starts from
if aggregate == 'flexlora':  # its server's scale is 1 (`federate.of_rank`)
    server |= {n: v * lora_alpha / math.sqrt(rank_of[0]) for n, v in server.items() if n.endswith('.B') and 'generalists' in n}


def wake(i: int) -> SimpleNamespace:
    """User i in memory: as its file has it or, if it never took part, as everybody starts."""
    model, role, adapter = build(i)
    frozen = {name for name in common if aggregate == 'ffa' and name.endswith('.A')}
    theta = [p for name, p in adapter.items() if role[name] != 'router' and name not in frozen]  # experts: the lower level
    phi = [p for name, p in adapter.items() if role[name] == 'router' and router == 'learned']  # the upper level
    adamw = dict(betas=(0.9, 0.95), weight_decay=weight_decay, fused=device_type != 'mps')
    data, tests = texts_of(i)
    user = SimpleNamespace(
        id=i,
        name='all' if pooled else names[i],
        data=data,
        tests=tests,
        model=model,
        role=role,
        adapter=adapter,
        loss=torch.compile(model.loss) if compile else model.loss,
        expert_opt=torch.optim.AdamW(theta + phi if router_data == 'joint' else theta, lr=expert_lr, **adamw),
        router_opt=torch.optim.AdamW(phi, lr=router_lr, **adamw) if phi and router_data != 'joint' else None,
        batch_size=batch_size * len(tests),
        trained={id(p) for p in theta + phi},
        trainable=sum(p.numel() for p in theta + phi),
        rank=rank_of[i],  # of its generalists, MLP only: hetlora prunes it
        download={},
        pseudo_labels=None,  # what some rules give a user of its own
        bytes_up=0,
        bytes_down=0,
        stacks_seen=0,
        expert_steps=0,
        router_steps=0,
    )
    if i in last_round:
        checkpoint.restore_user(checkpoint.user_file(kept_in, i, last_round[i]), user)
    else:
        load(user, {name: initial(name, p.shape, seed, 'user', i) for name, p in adapter.items()})
        load(user, federate.truncate(origin, user.rank))
    return user


def awake(ids: list[int]) -> list[SimpleNamespace]:
    """These users in memory, in this order, and no others: what the others are is in their files."""
    users[:] = [user for user in users if user.id in ids]
    here = {user.id: user for user in users}
    users[:] = [here.get(i) or wake(i) for i in ids]
    return users


def load(user: SimpleNamespace, tensors: dict) -> None:
    """Copies tensors into the user's own of the same names; components beyond a smaller rank become 0."""
    with torch.no_grad():
        for name, t in tensors.items():
            user.adapter[name].zero_()[tuple(map(slice, t.shape))] = t.to(device)


def upload(user: SimpleNamespace) -> dict:
    """What leaves the user: copies of its shared tensors and nothing else."""
    sent = {name: user.adapter[name].detach().clone() for name in shared}
    return attacked(user, federate.truncate(sent, user.rank))


def asked_of(i: int) -> dict:
    """Tensors such as user i has to send: names, shapes and dtypes (the values are those of the start)."""
    asked = {name: origin[name] for name in shared}
    return federate.truncate(asked, rank_of[i])


def attacked(user: SimpleNamespace, sent: dict) -> dict:
    """What a user sends, or the rubbish that --attack puts in its place: to see what a rule makes of it."""
    if attack == 'none' or user.id < N - attackers:
        return sent
    kind, _, size = attack.partition(':')
    rng = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, user.id, 2, t)).generate_state(1)[0]))
    rubbish = {
        'nan': lambda v: torch.full(v.shape, math.nan),
        'scale': lambda v: v.cpu() * float(size),
        'noise': lambda v: torch.randn(v.shape, generator=rng) * float(size),
    }[kind]
    return {name: rubbish(v).to(v.dtype).to(v.device) if v.is_floating_point() else v for name, v in sent.items()}


def sample(n: int, *key: int) -> list[int]:
    """n of the N users, in order, drawn by the seed and the key alone."""
    return list(range(N)) if n >= N else sorted(np.random.default_rng((seed, 0, *key)).choice(N, n, replace=False).tolist())


users, last_round = [], {}  # in memory here; {user: the last round that it took part in}
warned = set()  # users about whose updates a warning has been printed
tested = sample(test_users or N, 0, 0, 1)


def whole_windows(tokens: np.ndarray, n: int) -> torch.Tensor:
    """The first n whole windows of a stream, or as many as it has: (n, T)."""
    n = min(n, len(tokens) // block_size)
    return torch.from_numpy(tokens[: n * block_size].astype(np.int64)).view(n, block_size)


if asks_public:
    public = (
        whole_windows(public, judge_windows)
        if public_text
        else torch.cat(
            [whole_windows(texts_of(i)[0]['valid'], math.ceil(judge_windows / N)) for i in range(min(N, judge_windows))]
        )
    )
    if not len(public):
        die(f'--public_text={public_text} is shorter than one window of {block_size} tokens')
    public = public.to(device)  # (W, T)


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
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))  # the one use of this generator
    user.model.train()
    sums = torch.zeros(2, device=device)
    x, y = (t.to(device) for t in get_batch(tokens, user.batch_size, block_size, key))  # (B, T) each
    distil = user.pseudo_labels if optimizer is user.expert_opt else None
    if distil:  # as many windows of public text beside the private ones
        pick = torch.from_numpy(np.random.default_rng((*key, 1)).integers(0, len(public), user.batch_size)).to(device)  # (B,)
        pick = pick.split(micro_batch_size)
    for i, (x, y) in enumerate(zip(x.split(micro_batch_size), y.split(micro_batch_size))):
        share = len(x) / user.batch_size
        with autocast:
            ce, routing = user.loss(x, y)
            lb = load_balance_loss(routing, load_balance)
            loss = ce + lb_coef * lb
            if aggregate == 'hetlora':
                loss = loss + prune_coef * federate.tail_norm(user.adapter, user.rank, prune_gamma)
            if distil:
                psi = [v[pick[i]].flatten(0, 1) for v in distil]
                loss = loss + consensus_coef * federate.consensus_loss(user.model(public[pick[i]])[0].flatten(0, 1), psi)
        (loss * share).backward()  # frees this micro-batch's graph: one is alive at a time
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


def test_perplexity(user: SimpleNamespace, model: GPT, when: str, **at: int) -> None:
    """Logs a model's perplexity on the whole test split of the user (of everybody, if pooled), which nothing else reads, and
    the mean score of every expert in every layer (L, E) there, if it has routers."""
    for i, tokens in user.tests:
        with autocast:
            result = evaluate(model, tokens, block_size, hidden)
        seen = {key: result[key] for key in ('loss', 'ppl', 'scores') if result[key] is not None}
        log('eval', **{'step': user.expert_steps, 'user': i, 'split': 'test', 'when': when, **seen, **at})


def of_all(when: str) -> list[float | None]:
    """Perplexity of every tested user at its last evaluation of that kind, None if there was none."""
    return [results.get(when, {}).get(i) for i in (range(len(names)) if pooled else tested)]


def judged(user: SimpleNamespace, tensors: dict) -> float:
    """Cross-entropy (nats per token) on the first judge_windows windows of the user's validation text, with these tensors in
    place of its own of those names."""
    own = {name: user.adapter[name].detach().clone() for name in tensors}
    load(user, tensors)
    with autocast:
        loss = evaluate(user.model, user.data['valid'][: judge_windows * block_size + 1], block_size, hidden)['loss']
    load(user, own)
    return loss


# ---- between two rounds: what the server makes of the updates, and what a user makes of that --------------------------
def gathered(mine: dict[int, dict]) -> dict[int, dict]:
    """{user: tensors} of all processes, in order of users. mine: those of the users in memory here."""
    if processes == 1:
        return mine
    flat, found = {f'{i} {name}': v for i, own in mine.items() for name, v in own.items()}, {}
    for tensors, ids in federate.all_gather(flat, [*mine]):
        found |= {i: {} for i in ids}
        for key, v in tensors.items():
            i, name = key.split(' ', 1)
            found[int(i)][name] = v
    return dict(sorted(found.items()))


def admitted(sent: dict[int, dict], expected: dict[int, dict], **how) -> dict[int, dict]:
    """{user: what it sent}, of those from whom it is fit to be combined; a line about each of the others."""
    updates, refused = federate.admit([(i, t, update) for i, update in sent.items()], t, expected, **how)
    if process > 0:
        return updates
    if refused:
        log('refused', users=[i for i, _ in refused], why=[why for _, why in refused])
    for i, why in refused:
        tqdm.write(f'round {t + 1}: what user {i} sent is refused ({why}): the others go on without it', file=sys.stderr)
    bounded = clip_norm or aggregate in ('median', 'trimmed_mean')
    for i in sorted({*federate.outliers(updates)} - warned) if not bounded else ():
        warned.add(i)
        tqdm.write(
            f"round {t + 1}: warning: what user {i} sent is over ten times as large as the median user's: "
            '--aggregate=median, trimmed_mean or --clip_norm=1 bound what one user can do',
            file=sys.stderr,
        )
    return updates


def trust_scores(updates: dict[int, dict]) -> tuple[list[int], torch.Tensor]:
    """(n users, S (n, n)): how good user i finds user j (PCL). What this costs beside the updates is added to users' bytes."""
    if trust == 'weights':
        return [*updates], federate.weight_scores([*updates.values()])
    if trust == 'validation':  # every user gets the others' updates and sends n numbers
        ppl = {}
        for user in users:
            if user.id in updates:
                user.bytes_up += 4 * len(updates)
                user.bytes_down += sum(federate.n_bytes(u) for i, u in updates.items() if i != user.id)
                ppl[user.id] = {'ppl': torch.tensor([perplexity(judged(user, u)) for u in updates.values()])}
        return [*updates], federate.validation_scores(torch.stack([row['ppl'] for row in gathered(ppl).values()]))
    predictions = all_predictions(updates, logits=True)
    return [*predictions], federate.prediction_scores([*predictions.values()], base.config.vocab_size)


def all_predictions(updates: dict[int, dict], logits: bool = False) -> dict[int, tuple]:
    """Those users' 100 likeliest tokens at every position of the public text: 600 bytes a position."""
    mine, k = {}, min(100, base.config.vocab_size)
    for user in users:
        if user.id in updates:
            with autocast:
                top = dict(zip(('ids', 'values'), federate.top_predictions(user.model, public, k, logits)))
            mine[user.id] = attacked(user, top)
            user.bytes_up += federate.n_bytes(top)
    like = {'ids': torch.empty(public.numel(), k, dtype=torch.int32), 'values': torch.empty(public.numel(), k).half()}
    sent = admitted(gathered(mine), dict.fromkeys(updates, like), vocab_size=base.config.vocab_size)
    return {i: (top['ids'], top['values']) for i, top in sent.items()}


def combine(sent: dict[int, dict]) -> tuple[dict, dict]:
    """(what everybody's next round starts from, {user: what its own starts from instead}): the rule that --aggregate names,
    applied to what those present sent. Nobody there: all stays as it is."""
    if not sent:
        return server, {}
    present, updates = [*sent], [*sent.values()]
    if clip_norm:
        updates = federate.clipped(updates, server, clip_norm)
    if aggregate in ('fedavg', 'ffa', 'fedsa'):  # the same mean, of A and B, of B alone, of A alone
        return federate.fedavg(updates), {}  # θ^G = 1/N Σ_i θ_i^G
    if aggregate == 'median':
        return federate.median(updates), {}
    if aggregate == 'trimmed_mean':
        return federate.trimmed_mean(updates, trim), {}
    if aggregate == 'trust':
        present, scores = trust_scores(sent)
        W = federate.trust_matrix(scores, trust_temperature)
        log('trust', users=present, matrix=W.tolist())
        return {}, dict(zip(present, federate.trust_average([sent[i] for i in present], W)))
    if aggregate == 'consensus' and t + 1 >= consensus_start and (predictions := all_predictions(sent)):
        present, told = [*predictions], [*predictions.values()]
        W = federate.prediction_trust(told, base.config.vocab_size)
        log('trust', users=present, matrix=W.tolist())
        for user in users:
            if user.id in predictions:
                psi = federate.consensus(told, W[present.index(user.id)].tolist(), base.config.vocab_size)
                user.pseudo_labels = [v.view(*public.shape, -1).to(device) for v in psi]  # (W, T, K) ids, probabilities
                user.bytes_down += federate.n_bytes(dict(enumerate(psi)))
    if not shares:
        return {}, {}
    # ranks that differ: generalists by the rule, attention LoRAs, of one rank for all, by the mean
    experts = [{name: v for name, v in update.items() if 'generalists' in name} for update in updates]
    attention = [{name: v for name, v in update.items() if 'generalists' not in name} for update in updates]
    total = sum(n_train[i] for i in present)
    weights, scalings = [n_train[i] / total for i in present], [lora_alpha / math.sqrt(rank_of[i]) for i in present]
    if aggregate == 'hetlora':  # a user takes the first components, up to its rank
        return federate.hetlora(experts, scalings) | federate.fedavg(attention), {}
    if aggregate == 'flexlora':
        return federate.flexlora(experts, weights, scalings) | federate.fedavg(attention), {}
    gamma = lora_alpha / math.sqrt(8)  # of the attention LoRAs, whose rank is 8
    return federate.flora(experts, weights, scalings) | federate.flora(attention, weights, [gamma] * len(updates)), {}


def receive(user: SimpleNamespace) -> None:
    """Download: the user's shared tensors become what the server has for it. Adam's moments of other factors are dropped."""
    if aggregate == 'flora':  # all stacks since it last asked; they are merged into `base`
        user.bytes_down, user.stacks_seen = user.bytes_down + clock['stacks'] - user.stacks_seen, clock['stacks']
        download = {name: initial(name, user.adapter[name].shape, seed, 'server', t) for name in shared}
    else:
        download = user.download or federate.truncate(server, user.rank)
        if aggregate == 'flexlora':
            experts = {name: v for name, v in server.items() if 'generalists' in name}
            download |= federate.of_rank(experts, user.rank, lora_alpha / math.sqrt(user.rank))
        user.bytes_down += federate.n_bytes(download)
    for name in download:
        if aggregate == 'flora' or (aggregate == 'flexlora' and t > 0 and 'generalists' in name):
            user.expert_opt.state.pop(user.adapter[name], None)
    load(user, download)


def merge(stack: dict) -> None:
    """FLoRA: the base gains Σ_k w_k γ_k B_k A_k. All users hold the same base, so one addition stands for theirs."""
    weight = dict(base.named_parameters())
    with torch.no_grad():
        for name in federate.pairs(stack):
            merged = weight[name.replace('generalists.0.', '').removesuffix('.lora') + '.weight']
            merged += (stack[name + '.B'] @ stack[name + '.A']).to(device)
    clock['stacks'] += federate.n_bytes(stack)
    stack.clear()


def prune(user: SimpleNamespace) -> None:
    """HetLoRA: the last components of every generalist become 0, with their moments, and stay so: no gradient reaches them."""
    user.rank = max(1, int(prune_gamma * user.rank))
    for name, p in user.adapter.items():
        if user.role[name] == 'generalist':
            for v in (p.detach(), *(m for m in user.expert_opt.state[p].values() if m.shape == p.shape)):
                (v[user.rank :] if name.endswith('.A') else v[:, user.rank :]).zero_()


def fusion(user: SimpleNamespace) -> tuple[float, float]:
    """FDLoRA's AdaFusion (2406.07925): (w1, w2) with which A = w1 A_own + w2 A_mean, B likewise, of the MLP LoRAs, have the
    least loss on validation windows + 0.05 mean |w|. A search without gradients: steps along the axes, halved twice."""
    own = {name: user.adapter[name].detach().clone() for name in server if user.role[name] == 'generalist'}

    def cost(w: tuple[float, float]) -> float:
        return judged(user, federate.fuse(own, server, *w)) + 0.05 * (abs(w[0]) + abs(w[1])) / 2

    cost = functools.cache(cost)
    best, step = min(((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)), key=cost), 0.25
    while step > 0.05:
        near = min(((best[0] + a, best[1] + b) for a, b in ((step, 0), (-step, 0), (0, step), (0, -step))), key=cost)
        best, step = (near, step) if cost(near) < cost(best) else (best, step / 2)
    load(user, federate.fuse(own, server, *best))
    return best


# ---- files of the run ----------------------------------------------------------------------------------------------
def log(kind: str, **values: object) -> None:
    """One line of metrics.jsonl, about one user or, from process 0, about the round. No clock in it: the same run writes
    the same bytes. Alone, a process puts it on disk at once; together with others it waits for `publish`."""
    if 'user' in values or process == 0:
        pending.append({'kind': kind, 'round': t + 1, **values})
    if processes == 1:
        publish()


def publish() -> None:
    """Every process's new lines, in order of users, into metrics.jsonl (process 0) and what they say into `results` (all)."""
    lines = [line for _, theirs in federate.all_gather({}, pending) for line in theirs]
    pending.clear()
    lines.sort(key=lambda line: line.get('user', -1))
    for line in lines:
        note(line)
    if process == 0 and lines:
        try:
            metrics.write(''.join(json.dumps(line) + '\n' for line in lines).encode())
        except OSError as error:
            checkpoint.cannot_write(out / 'metrics.jsonl', error)
        for line in lines:
            curves.draw(drawn, line)


def note(line: dict) -> None:
    """What a run must know of all its users later."""
    if line['kind'] == 'eval':
        results.setdefault(line['when'], {})[line['user']] = line['ppl']
    elif line['kind'] == 'comm':
        clock['bytes_up'], clock['bytes_down'] = clock['bytes_up'] + line['bytes_up'], clock['bytes_down'] + line['bytes_down']
    elif line['kind'] in ('train', 'router'):
        clock['steps'] += 1
        losses.extend([line['loss']] if line['kind'] == 'train' else [])


def say(text: str) -> None:
    """A line, above the bar where there is one, and at once where stdout is a file."""
    if not hidden:
        tqdm.write(text)
        sys.stdout.flush()


def progress(done: int) -> float:
    """Where no terminal shows the bar, such as in a log file, a line instead. done: expert steps of this process's users in
    this round. The loss is the mean over the steps known here. Returns the time."""
    if bar.disable and not hidden:
        part = done / (len(users) * local_steps)
        left = (time.time() - began_round_1) / (t - start + part) * (rounds - t - part)  # seconds, at the pace so far
        known = losses + [line['loss'] for line in pending if line['kind'] == 'train']
        say(
            f'round {t + 1:3}/{rounds}  {done // local_steps}/{len(users)} users'
            + ' of process 0' * (processes > 1)
            + f'  train loss {cell(mean(known))}  {tqdm.format_interval(left)} left'
        )
    return time.time()


def save_round(present: list[int]) -> None:
    """The files of those present, then the round's: from now on the run continues after this round. The round before it is
    kept too, what only older ones need is deleted."""
    before = [checkpoint.user_file(kept_in, u.id, last_round[u.id]) for u in users if u.id in last_round]
    last_round.update(dict.fromkeys(present, t + 1))
    for u in users:
        checkpoint.save_user(checkpoint.user_file(kept_in, u.id, t + 1), u)
    federate.all_gather({})  # everybody's files are there
    if process == 0:
        tensors = {f'server/{name}': v for name, v in for_all().items()}
        if aggregate == 'flora' and t >= 0:
            tensors |= {f'base/{name}': v for name, v in base.state_dict().items()}
        facts = {'round': t + 1, 'last_round': last_round, 'metrics_bytes': metrics.tell(), 'clock': clock}
        checkpoint.save(checkpoint.round_file(kept_in, t + 1), tensors, {**facts, 'identity': identity})
    federate.all_gather({})
    for file in [*superseded, *([checkpoint.round_file(kept_in, t - 1)] if process == 0 else [])]:
        file.unlink(missing_ok=True)
    superseded[:] = before


def for_all() -> dict:
    """The server's tensors; complete with those that never travel (FFA's A) where they are a model for everybody."""
    return {**origin, **server} if aggregate in federate.ONE_MODEL else server


def save_adapters() -> None:
    """Each user's own tensors, and the server's, with what a reader needs to rebuild the model around them."""
    here = {user.id: user.adapter for user in users}
    for i in sorted({*last_round, *([0] if pooled else tested)})[process::processes]:
        facts = {
            'user': i,
            'name': 'all' if pooled else names[i],
            'base': init_from,
            'base_sha256': identity['base'],
            'method': method,
            'n_experts': experts_of[i],
            'n_generalists': n_generalists,
            'rank': rank_of[i],
            'attention_rank': 8,
            'alpha': lora_alpha,
            'scaling': lora_alpha / math.sqrt(rank_of[i]),
            'top_k': top_k,
            'router': router,
            'round': last_round.get(i, 0),
        }
        own = here[i] if i in here else checkpoint.read(checkpoint.user_file(kept_in, i, last_round[i]), 'adapter/')[0]
        facts = {key: str(value) for key, value in facts.items()}
        checkpoint.save(out / 'adapters' / f'user{i}.safetensors', own, {}, **facts)
    if aggregate in federate.ONE_MODEL and process == 0:
        checkpoint.save(out / 'adapters' / 'server.safetensors', for_all(), {}, base=init_from, round=str(rounds))
    if aggregate == 'flora' and process == 0:
        shape = json.dumps(dataclasses.asdict(base.config))
        checkpoint.save(out / 'adapters' / 'base.safetensors', base.state_dict(), {}, gpt_config=shape)


def git_commit() -> str:
    try:
        return subprocess.run(
            ['git', 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*'],
            capture_output=True,
            text=True,
            timeout=10,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ''


# what must be the same for a run to be continued: the base, the data and every switch that shapes the numbers
free = ('out_dir', 'resume', 'overwrite', 'device', 'init_from', 'init_adapter', 'dataset', 'quiet', 'tensorboard', 'wandb')
identity = {
    **{k: v for k, v in config.items() if k not in free},
    'base': base_sha256,
    'adapter': adapter_sha256,
    'data': hashlib.sha256(json.dumps([u['sha256'] for u in meta['users']]).encode()).hexdigest(),
    'public': None if public is None else hashlib.sha256(public.cpu().numpy().tobytes()).hexdigest(),
}
identity = json.loads(json.dumps(identity))  # as a file gives it back: tuples are lists
start, kept_in, pending, results, losses = 0, out / 'checkpoint', [], {}, []
clock = {'seconds': 0.0, 'training': 0.0, 'bytes_up': 0, 'bytes_down': 0, 'steps': 0, 'stacks': 0, 'checkpoints': 0.0}
if processes > 1:  # who dies closes its connections, and the others notice at once
    dist.init_process_group('gloo', timeout=datetime.timedelta(days=7))
if resume:
    try:
        start = checkpoint.rounds(kept_in)[-1]
        try:
            tensors, facts = checkpoint.check(kept_in, start)
        except ValueError as error:
            last_file = checkpoint.round_file(kept_in, start)
            checkpoint.check(kept_in, start - 1)
            die(f'--resume: {error}; round {start - 1} is intact: delete {last_file}, and --resume continues after it')
        changed = [k for k in identity if facts['identity'].get(k) != identity[k]]
        if changed:
            die(f'--resume: {out_dir} was made with another {", ".join(changed)}; use the same, or another --out_dir')
        server = {name: v.to(device) for name, v in checkpoint.part(tensors, 'server/').items() if name in shared}
        last_round = facts['last_round']
        with open(out / 'metrics.jsonl', 'rb') as f:
            so_far = f.read(facts['metrics_bytes'])
        if len(so_far) < facts['metrics_bytes']:
            raise ValueError(f'{out}/metrics.jsonl has lost lines')
        for line in so_far.splitlines():
            note(json.loads(line))
        clock = facts['clock']
    except (OSError, ValueError, KeyError) as error:
        die(f'--resume: {error}: start again with --overwrite')
    if aggregate == 'flora' and start:
        base.load_state_dict(checkpoint.part(tensors, 'base/'))
if process == 0:
    try:
        curves.start(drawn, config)
    except ValueError as error:
        die(error)
federate.all_gather({})  # all have checked and read before anything is written
superseded = []  # users' files that only the round before the last one needs
if resume:
    needed = [(start, last_round)]
    with contextlib.suppress(ValueError):  # there is no round before, or it is damaged
        needed.append((start - 1, checkpoint.read_round(kept_in, start - 1)[1]['last_round']))
        superseded = [checkpoint.user_file(kept_in, i, r) for i, r in needed[1][1].items() if last_round[i] != r]
if process == 0 and resume:
    os.truncate(out / 'metrics.jsonl', facts['metrics_bytes'])  # lines of a round that was not finished are run again
    checkpoint.remove_others(kept_in, *needed)
elif process == 0:
    try:
        kept_in.mkdir(parents=True, exist_ok=True)
        (out / 'adapters').mkdir(exist_ok=True)
        for old in (
            out / 'summary.json',
            *kept_in.glob('round-*'),
            out / 'metrics.jsonl',
            *(out / f'{picture}.{kind}' for picture in ('plot', 'trust') for kind in ('png', 'svg')),
            *kept_in.iterdir(),
            *out.glob('adapters/*.safetensors'),
            *out.glob('tensorboard/events.*'),
        ):
            old.unlink(missing_ok=True)
        versions = {'python': sys.version.split()[0], 'torch': torch.__version__, 'numpy': np.__version__}
        effective = {**config, 'device': device, 'dtype': dtype, 'versions': versions, 'git_commit': git_commit()}
        effective |= {'base_sha256': identity['base'], 'adapter_sha256': adapter_sha256, 'users': names, 'tested': tested}
        write_atomically(out / 'config.json', lambda file: file.write_text(json.dumps(effective, indent=1)))
    except OSError as error:
        die(f'cannot write to --out_dir={out_dir}: {error.strerror}')
federate.all_gather({})
metrics = open(out / 'metrics.jsonl', 'ab', buffering=0) if process == 0 else None
if process == 0:
    curves.catch_up(drawn, out)

# ---- Algorithm 1 ---------------------------------------------------------------------------------------------------
n_present = max(1, round(participation * N))
first = federate.truncate({name: origin[name] for name in shared}, rank_of[0])  # what user 0 sends a round
began_round_1 = time.time()
began, t = began_round_1 - clock['seconds'], start - 1
if process == 0:
    metrics.seek(0, os.SEEK_END)
if not resume:
    save_round([])  # round 0: from here on there is always something to continue from
if process == 0:
    say(
        f'{method} on {dataset} ({target}): {N} users'
        + f', {n_present} a round' * (n_present < N)
        + f', {sum(p.numel() for p in base.parameters()):,} frozen parameters, '
        f'{wake(0).trainable if rounds else 0:,} trainable (user 0), {federate.n_bytes(first):,} bytes of LoRA up '
        f'per user and round, {device} {dtype}' + f', {processes} processes' * (processes > 1)
    )
bar = tqdm(
    total=rounds * n_present * local_steps,
    initial=start * n_present * local_steps,
    unit='step',
    smoothing=0.05,
    disable=hidden or None,
)
told = began_round_1
for t in range(start, rounds):
    last = t + 1 == rounds
    present = sample(n_present, t, 0, 2)  # by (seed, round) alone
    losses.clear()
    done = 0
    if aggregate == 'flora':
        merge(server)
    failing = {i for i, chance in enumerate(np.random.default_rng((seed, 0, t, 0, 3)).random(N)) if chance < failures}
    for user in awake(present[process::processes]):  # in parallel in the paper, here in turn or in several processes
        receive(user)  # download: every user starts from the same generalists
        tail = federate.tail_norm(user.adapter, user.rank, prune_gamma) if aggregate == 'hetlora' else 0
        tic, tested_so_far = time.time(), cell(mean(of_all('local')))
        for h in range(local_steps // 2 if user.id in failing else local_steps):
            lr = cosine(t * local_steps + h)
            for group in user.expert_opt.param_groups:
                group['lr'] = lr
            # eq. (2), lower level: experts descend on the training set, router fixed
            ce, lb = descend(user, user.expert_opt, user.data['train'], (seed, user.id, 0, user.expert_steps))
            user.expert_steps += 1
            log('train', step=user.expert_steps, user=user.id, loss=ce, ppl=perplexity(ce), lb=lb, lr=lr)
            if not math.isfinite(ce):
                sys.exit(
                    f'user {user.id} ({user.name}): the training loss is {ce} at step {user.expert_steps}: '
                    f'lower --expert_lr; the last finished round is kept in {out_dir}/checkpoint'
                )
            if user.router_opt and user.expert_steps % router_every == 0:
                for _ in range(router_steps):
                    # eq. (3), upper level: the router descends on the validation set, experts fixed
                    ce_valid, lb = descend(user, user.router_opt, user.data[router_data], (seed, user.id, 1, user.router_steps))
                    user.router_steps += 1
                    at = {'step': user.expert_steps, 'router_step': user.router_steps, 'user': user.id}
                    log('router', **at, loss=ce_valid, ppl=perplexity(ce_valid), lb=lb, lr=router_lr)
            bar.update()
            done += 1
            bar.set_postfix({'round': t + 1, 'user': user.name, 'loss': f'{ce:.3f}', 'test ppl': tested_so_far})
            if time.time() - told > 60:
                told = progress(done)
        clock['training'] += time.time() - tic
        if user.id in failing:
            continue
        if aggregate == 'hetlora' and federate.tail_norm(user.adapter, user.rank, prune_gamma) < tail:
            prune(user)
        if (last or (t + 1) % eval_every == 0) and user.id in tested:  # after local steps, before aggregation
            test_perplexity(user, user.model, 'local')
    told = progress(len(users) * local_steps)
    present = [i for i in present if i not in failing]
    awake([user.id for user in users if user.id in present])  # who failed has lost what it did: its file says what it is
    bar.update((t + 1) * n_present * local_steps - bar.n)  # steps of other processes, and of who failed
    publish()
    sent = gathered({user.id: upload(user) for user in users})
    updates = admitted(sent, {i: asked_of(i) for i in present}, lower_rank=aggregate == 'hetlora')
    server, own = combine({i: {name: update[name] for name in shared} for i, update in updates.items()})
    for user in users:
        user.download = own.get(user.id, {})
        up = user.bytes_up + federate.n_bytes(sent[user.id])
        log('comm', step=user.expert_steps, user=user.id, bytes_up=up, bytes_down=user.bytes_down)
        user.bytes_up = user.bytes_down = 0
    publish()
    clock['seconds'], tic = time.time() - began, time.time()
    save_round(present)
    clock['checkpoints'] += time.time() - tic
    ppl = of_all('local')
    if process == 0 and mean(ppl) is not None and (last or (t + 1) % eval_every == 0):
        say(
            f'round {t + 1:3}/{rounds}  test perplexity '
            + (
                '  '.join(f'{name} {cell(p)}' for name, p in zip(names, ppl))
                if len(ppl) == len(names) <= 8
                else f'{cell(mean(ppl))} (mean of {sum(p is not None for p in ppl)} users)'
            )
        )
bar.close()
seconds_of_rounds = time.time() - began_round_1

# ---- the end: what came out ----------------------------------------------------------------------------------------
awake(([0] if pooled else tested)[process::processes])
for user in users if fuse and rounds else ():
    w1, w2 = fusion(user)
    log('fusion', step=user.expert_steps, user=user.id, own=w1, mean=w2)
    test_perplexity(user, user.model, 'fused')
publish()
for user in users:  # what choices between runs may look at
    with autocast:
        result = evaluate(user.model, user.data['valid'], block_size, hidden)
    log('eval', step=user.expert_steps, user=user.id, split='valid', when='final', loss=result['loss'], ppl=result['ppl'])
publish()
save_adapters()
original = base  # and the base as it was before training
if aggregate == 'flora':
    original = load_gpt(init_from).to(device)
    merge(server)
after = bool(shares and rounds)
for user in users if after else ():  # the same users once more, after the last aggregation
    receive(user)
    test_perplexity(user, user.model, 'aggregated')
publish()
for user in users:
    test_perplexity(user, original, 'pretrained', round=0, step=0)
publish()
trainable = gathered({user.id: {'n': torch.tensor(user.trainable)} for user in users})
if processes > 1:
    dist.destroy_process_group()
if process > 0:
    sys.exit()
metrics.close()
when = 'pretrained' if rounds == 0 else 'fused' if fuse else 'local'
ppl = of_all(when)
ids = list(range(len(names))) if pooled else tested
n_tokens = [1 if target == 'mixture' else meta['users'][i]['tokens']['test'] - 1 for i in ids]
summary = {
    'method': method,
    'dataset': dataset,
    'target': target,
    'seed': seed,
    'rounds': rounds,
    'users': [names[i] for i in ids],
    'user_ids': ids,
    'mean_test_ppl': mean(ppl),
    'test_ppl': ppl,
    'pretrained_test_ppl': of_all('pretrained'),
    'aggregated_test_ppl': of_all('aggregated') if after else None,
    'mean_aggregated_test_ppl': mean(of_all('aggregated')),
    # exp of the mean loss over all test tokens: what a model of pooled text is scored by elsewhere, below the mean of users
    'pooled_test_ppl': None if None in ppl else perplexity(np.average(np.log(ppl), weights=n_tokens)),
    'mean_valid_ppl': mean([*results['final'].values()]),
    'valid_ppl': [*results['final'].values()],
    'trainable_params': [own['n'].item() if rounds else 0 for own in trainable.values()],
    'shared_params': sum(v.numel() for v in first.values()) if rounds else 0,
    'bytes_up': clock['bytes_up'],
    'bytes_down': clock['bytes_down'],
    'seconds': time.time() - began,
    'startup_seconds': began_round_1 - began_script,  # from here, after the imports
    'seconds_per_round': seconds_of_rounds / max(1, rounds - start),
    'checkpoint_seconds': clock['checkpoints'] / max(1, rounds),  # of a round
    'tokens_per_second': clock['steps'] * batch_size * (len(names) if pooled else 1) * block_size / clock['training']
    if clock['steps']
    else None,
    'peak_rss_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024),
}
write_atomically(out / 'summary.json', lambda file: file.write_text(json.dumps(summary, indent=1)))
curves.end(drawn, summary)
if rounds:
    import plot

    plot.run(out)
columns = {'pretrained': of_all('pretrained'), method: ppl} | ({'after aggregation': of_all('aggregated')} if after else {})
columns = {name: column for name, column in columns.items() if mean(column) is not None}  # of a few tested, perhaps nobody
rows = [[name, *row] for name, row in zip(summary['users'], zip(*columns.values()))]
last_row = [f'mean of {len(rows)}' if len(rows) > 20 else 'mean', *map(mean, columns.values())]
print(table(['test perplexity', *columns], [*(rows if len(rows) <= 20 else ()), last_row]))
say(f'{summary["seconds"]:.0f} s; wrote {out}/summary.json, metrics.jsonl, config.json, checkpoint/, adapters/')
