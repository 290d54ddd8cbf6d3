"""Every switch with its default, the methods as rows of switches, and what may be combined.

Other config files set some of these names; --name=value on the command line sets one. Later values win: these defaults, then
the row that `method` names, then files and flags in the order given."""

# fmt: off
method = 'comigs_1g1s'          # a row of METHODS below; sets the switches of COLUMNS
dataset = 'demo'                # a name in the project's data/, made by data/prepare.py; or a path, with a slash
target = 'own'                  # valid and test text: 'own' category, or a 'mixture' of all users' categories
init_from = 'gpt2'              # gpt2 ... gpt2-xl, smollm2-135m, qwen2.5-0.5b, ...; owner/name on the Hub; a folder or a file
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
aggregate = 'fedavg'            # none | fedavg ffa fedsa fdlora trust median trimmed_mean hetlora flexlora flora consensus
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
# ---- what single rules need
trust = 'validation'            # trust: users judge each other by weights | validation | predictions (PCL strategies 1, 2, 3)
trust_temperature = 1.0         # trust: of the softmax over a user's scores
prune_gamma = 0.99              # hetlora: share of the rank that a pruning keeps; 1 never prunes
prune_coef = 5e-3               # hetlora: weight of the penalty on the tail that the next pruning would cut
trim = 0.25                     # trimmed_mean: share of the users cut from either end of every coordinate
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
eval_valid = False              # on the validation split, too: curves that show over-fitting (tools/plot.py fit)
test_users = 0                  # users that are evaluated, drawn by the seed; 0: all
# ---- what can go wrong, and what bounds it
clip_norm = 0.0                 # bounds how far an update may move, in units of the median user's move; 0: off
failures = 0.0                  # chance that a user fails halfway through a round and loses what it did in it
attack = 'none'                 # what the last users send in place of their updates: none | nan | scale:1e6 | noise:1e3
attackers = 1                   # how many users do that
# ---- the machine
quiet = False                   # nothing but the final table, and errors
seed = 42                       # the paper's seeds are 42, 45, 47
device = 'auto'                 # auto | cpu | cuda | cuda:N | mps
dtype = 'auto'                  # auto (bfloat16 autocast on CUDA, else float32) | float32 | bfloat16
compile = False                 # torch.compile of the training loss: 1 to 2 minutes at the start, then faster steps

PER_USER = ('n_experts', 'lora_rank')  # also take a tuple, an entry per user
PATHS = ('dataset', 'init_from', 'init_adapter', 'out_dir', 'public_text')  # ~ is the home folder

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
    'fdlora':         ((1, 1, True,  'mean',    'valid', 'fdlora',    16), '-', 'FedAvg, own mixed in at the end (2406.07925)'),
    'flora':          ((1, 1, True,  'mean',    'valid', 'flora',     16), '-', 'stacked, merged into the base (2409.05976)'),
    'consensus':      ((2, 0, False, 'mean',    'valid', 'consensus', 8), '-', 'only predictions leave (2305.18497)'),
}

# ---- what is legal: a name's values, or a condition on its value x
LEGAL = {
    'target': ('own', 'mixture'),
    'router': ('learned', 'mean', 'frozen'),
    'router_data': ('valid', 'train', 'joint'),
    'aggregate': ('none', 'fedavg', 'ffa', 'fedsa', 'fdlora', 'trust', 'median', 'trimmed_mean', 'hetlora', 'flexlora', 'flora',
                  'consensus'),
    'load_balance': ('generalist', 'uniform', 'none'),
    'routing_unit': ('token', 'prefix', 'sequence'),
    'trust': ('weights', 'validation', 'predictions'),
    'dtype': ('auto', 'float32', 'bfloat16'),
    'local_steps router_every router_steps micro_batch_size block_size eval_every judge_windows top_k lora_alpha expert_lr '
    'router_lr': '0 < x < 1e9',
    'trust_temperature': '0 < x < 1e30',
    'rounds n_generalists prune_coef consensus_coef consensus_start test_users lb_coef weight_decay': '0 <= x < 1e9',
    'batch_size': '0 < x <= 65536',
    'ghost_noise': '0 <= x <= 65536',
    'seed clip_norm attackers': 'x >= 0',
    'participation prune_gamma': '0 < x <= 1',
    'failures': '0 <= x <= 1',
    'trim': '0 <= x < 0.5',
    'dataset init_from out_dir': "x.strip() != ''",
}
# ---- between switches: a condition that must hold, and why
MUST = {
    r"fullmatch(r'none|nan|(scale|noise):\d+(\.\d+)?(e\d+)?', attack)":
        'expected none, nan, scale:NUMBER or noise:NUMBER, such as scale:1e6',
    "aggregate not in ('none', 'consensus') or not (n_generalists or share_attention)":
        'it shares no tensors: give --n_generalists=0 and --share_attention=False',
    "aggregate in ('none', 'consensus') or n_generalists or share_attention":
        'it has nothing to combine: give --n_generalists=1 or more, or --aggregate=none',
    "clip_norm == 0 or aggregate in ('fedavg', 'ffa', 'fedsa', 'fdlora', 'median', 'trimmed_mean')":
        'it bounds the moves of a rule with one result for all: fedavg, ffa, fedsa, fdlora, median or trimmed_mean',
    "aggregate != 'fdlora' or n_generalists":
        "it mixes a user's own and the averaged generalists: give --n_generalists=1 or more",
    'not (eval_valid and pooled)': 'validation text is of one user: give --eval_valid=False, or a method that pools no text',
    "aggregate != 'fdlora' or (participation == 1 and failures == 0 and test_users == 0)":
        'it ends with a search by every user: give --participation=1, --failures=0 and --test_users=0',
    'ghost_noise == 0 or min(batch_size, micro_batch_size) > 1':
        'it is drawn from the other sequences of a micro-batch: 2 or more',
    "not init_adapter or (n_generalists and aggregate != 'flora')":
        'it is what the generalists start from: give --n_generalists=1 or more, and not flora, whose LoRAs start anew every '
        'round (merge the adapter into the base of --init_from instead)',
    "not public_text or aggregate == 'consensus' or (aggregate == 'trust' and trust == 'predictions')":
        'it is read by --aggregate=consensus and by --aggregate=trust with --trust=predictions only',
}
# ---- the same, once the data set and the base are known: N users, n_positions; n_experts and lora_rank have an entry per user
FIT = {
    'block_size <= n_positions': 'the base has no more positions',
    'test_users <= N': 'there are no more users: N is how many the data set has',
    'n_generalists <= min(n_experts)': 'every user holds all the generalists',
    "aggregate not in ('hetlora', 'flexlora', 'flora') or max(n_experts) == 1":
        'it has one expert per user, whose rank may differ: give --n_experts=1 and --lora_rank=16,8,...',
    "aggregate in ('none', 'consensus', 'hetlora', 'flexlora', 'flora') or len(set(lora_rank)) == 1":
        'it averages tensors of one shape: the same rank for all (hetlora, flexlora, flora and consensus take any)',
    'not init_adapter or len(set(lora_rank)) == 1': 'its scaling depends on the rank: one for all users',
}
# ---- switches of before: what replaces them
GONE = {
    'match': 'give the ranks: active was --lora_rank=16, full was 8 for each expert, such as --lora_rank=32,16,16,16',
    'fuse': 'it is a value of another: --aggregate=fdlora',
    'tensorboard': 'python tools/curves.py RUN --tensorboard draws the curves of a running or finished run',
    'wandb': 'python tools/curves.py RUN --wandb draws the curves of a running or finished run',
}
