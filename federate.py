"""The server: what leaves a user, what is accepted of it, and how it is combined. No state; a rule is one pure function.

What may leave is decided by `shared_names` and nowhere else (METHOD 0.5): generalists, and the attention LoRAs if they are
shared. Specialists, routers, optimizer state and text never do. An update is what one user sends: {name: tensor}, every LoRA
a pair NAME.A (r, in) and NAME.B (out, r), ΔW = γ B A. A new rule is a function here, a `case` in `combine`, its name in LEGAL
(config/default.py) and, if its result is a model for everybody, in ONE_MODEL; a row of METHODS if it is to have a name.

Sums run in float64 and do not depend on the order of the users (`order_free_sum`), nor on when their updates arrive.

Shapes: N users, r_k the rank of user k, P positions of public text, K likeliest tokens at each, V vocabulary.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from lora_moe import ATTENTION_RANK, scaling
from model import GPT

Tensors = dict[str, torch.Tensor]
Predictions = tuple[torch.Tensor, torch.Tensor]  # token ids (P, K) int32, their logits or probabilities (P, K) float16

ONE_MODEL = ('fedavg', 'fdlora', 'ffa', 'median', 'trimmed_mean')  # their result is a model for everybody, newcomers included
LEAVES = {'ffa': 'B', 'fedsa': 'A'}  # of every LoRA; with all other rules both factors


def shared_names(role: dict[str, str], c: SimpleNamespace, factors: str = '') -> list[str]:
    """Names of the tensors that leave the user, in the model's order. role: {name: role} as of lora_moe.roles. factors 'AB':
    with those that all users start with in common but that stay (FFA's A, FedSA's B)."""
    if c.aggregate in ('none', 'consensus'):
        return []
    leaving = {'generalist', 'attention'} if c.share_attention else {'generalist'}
    factors = factors or LEAVES.get(c.aggregate, 'AB')
    return [name for name in role if role[name] in leaving and name[-1] in factors]


def is_generalist(name: str) -> bool:
    return '.generalists.' in name  # lora_moe.py, top: the name tells the role


def n_bytes(tensors: Tensors) -> int:
    """Payload of a message in bytes: elements times bytes an element, without any header."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


# ---- where updates enter: whatever a user sends, checked once for all rules --------------------------------------------
def admit(messages: list[tuple[int, int, Tensors]], t: int, expected: dict[int, Tensors], **how) -> tuple[dict, list]:
    """({user: update} fit for every rule, in order of users; [(user, why)] of what is refused, one line each). Tensors come in
    the order in which they are expected: sums over names have the same bits, whatever order a message had.

    messages: (user, round, update) in the order in which they come, late ones and duplicates among them; a user's first that
    is fit counts, and no other. t: the round that is being combined. expected: {user: tensors such as it has to send}."""
    admitted, refused = {}, []
    for user, of_round, update in messages:
        if user not in expected:
            why = 'it takes no part in this round'
        elif of_round != t:
            why = f'it is of round {of_round}, this is round {t}'
        elif user in admitted:
            why = 'it has sent one already'
        else:
            why = refusal(update, expected[user], **how)
        if why:
            refused.append((user, why))
        else:
            admitted[user] = {name: update[name] for name in expected[user]}
    return dict(sorted(admitted.items())), refused


def refusal(update: Tensors, expected: Tensors, lower_rank: bool = False, vocab_size: int = 0) -> str:
    """Why an update cannot be combined: other names, dtypes or shapes than expected (nothing is broadcast), NaN, infinity, or
    whole numbers that are no tokens of the vocabulary. '' if it can. lower_rank: generalists of one lower rank will do
    (HetLoRA prunes)."""
    for name in sorted(map(str, expected.keys() ^ update.keys())):
        return f'{name} is missing' if name in expected else f'{name[:80]} does not belong there'
    if not all(isinstance(v, torch.Tensor) for v in update.values()):
        return 'it holds something that is no tensor'
    ranks = {v.shape[:1] for name, v in update.items() if is_generalist(name) and name.endswith('.A')}
    if lower_rank and len(ranks) == 1:
        expected = truncate(expected, max((1, *ranks.pop())))
    for name, want in expected.items():
        v = update[name]
        if (v.shape, v.dtype) != (want.shape, want.dtype):
            return f'{name} is {v.dtype} of shape {tuple(v.shape)}, expected {want.dtype} of {tuple(want.shape)}'
        if not v.isfinite().all():
            return f'{name} holds NaN or infinity'
        if not v.is_floating_point() and v.numel() and not 0 <= v.min() <= v.max() < vocab_size:
            return f'{name} holds {v.min()} to {v.max()}, outside the vocabulary of {vocab_size}'
    return ''


def outliers(updates: dict[int, Tensors]) -> list[int]:
    """Users whose update is over ten times as large (Euclidean, all tensors) as the median user's, of three or more."""
    size = {i: distance(u, {}) for i, u in updates.items()}
    return [i for i in size if len(size) > 2 and size[i] > 10 * statistics.median_low(size.values())]


def distance(update: Tensors, server: Tensors) -> float:
    """|θ_k - θ|, Euclidean over all tensors; of those that the server does not have, |θ_k|."""
    squares = 0.0
    for name, v in update.items():
        v = v.cpu().double()
        squares += (v - server[name].cpu() if name in server else v).square().sum().item()
    return math.sqrt(squares)


def clipped(updates: list[Tensors], server: Tensors, c: float) -> list[Tensors]:
    """Norm clipping (Sun et al. 2019, 1911.07963): θ + (θ_k - θ) min(1, c m / |θ_k - θ|), θ the server's tensors that all
    started from, m the median user's |θ_k - θ|. One user can move the mean by c m / N, whatever it sends."""
    far = [distance(update, server) for update in updates]
    most, bounded = c * statistics.median_low(far), []
    for update, d in zip(updates, far):
        if d > most:
            start = {name: server[name].to(v.device).double() for name, v in update.items()}
            update = like({name: start[name] + (v.double() - start[name]) * (most / d) for name, v in update.items()}, update)
        bounded.append(update)
    return bounded


# ---- one round at the server -----------------------------------------------------------------------------------------
def combine(
    c: SimpleNamespace, t: int, server: Tensors, sent: dict[int, Tensors], ask: Callable, log: Callable
) -> tuple[Tensors, dict[int, Tensors]]:
    """(what everybody's next round starts from, {user: what the server made for it alone}): the rule that c.aggregate names.

    t: the round; server: what this round started from; sent: {user: admitted update} of those present, nobody: all stays as it
    is. ask(question, users, **what is told) -> {user: answer}, where a rule needs the users once more. log(kind, values)."""
    if not sent:
        return server, {}
    present, updates = [*sent], [*sent.values()]
    if c.clip_norm:
        updates = clipped(updates, server, c.clip_norm)
    # where ranks differ: generalists by the rule, attention LoRAs, of one rank for all, by the mean
    experts = [{name: v for name, v in update.items() if is_generalist(name)} for update in updates]
    attention = [{name: v for name, v in update.items() if not is_generalist(name)} for update in updates]
    weights = [c.n_train[i] / sum(c.n_train[k] for k in present) for i in present]  # by text
    gammas = [scaling(c.lora_alpha, c.lora_rank[i]) for i in present]
    match c.aggregate:
        case 'fedavg' | 'ffa' | 'fedsa' | 'fdlora':  # the same mean, of A and B, of B alone, of A alone
            return fedavg(updates), {}  # θ^G = 1/N Σ_i θ_i^G
        case 'median':
            return median(updates), {}
        case 'trimmed_mean':
            return trimmed_mean(updates, c.trim), {}
        case 'hetlora':  # a user takes the first components, up to its rank
            return hetlora(experts, gammas) | fedavg(attention), {}
        case 'flexlora':
            return flexlora(experts, weights, gammas) | fedavg(attention), {}
        case 'flora':
            gamma = [scaling(c.lora_alpha, ATTENTION_RANK)] * len(updates)
            return flora(experts, weights, gammas) | flora(attention, weights, gamma), {}
        case 'trust':
            present, scores = trust_scores(c, sent, ask)
            if not present:  # all predictions are refused: everybody stays as it is
                return {}, {}
            W = trust_matrix(scores, c.trust_temperature)
            log('trust', {'users': present, 'matrix': W.tolist()})
            return {}, dict(zip(present, trust_average([sent[i] for i in present], W)))
        case 'consensus' if t + 1 >= c.consensus_start and (told := ask('predict', present, logits=False)):
            predictions = [(top['ids'], top['values']) for top in told.values()]
            W = prediction_trust(predictions, c.vocab_size)
            log('trust', {'users': [*told], 'matrix': W.tolist()})
            psi = [consensus(predictions, row, c.vocab_size) for row in W.tolist()]
            return {}, {i: {'ids': ids, 'values': values} for i, (ids, values) in zip(told, psi)}
    return {}, {}  # none; consensus before its first pseudo-labels


# ---- means of parameters -------------------------------------------------------------------------------------------
def stacked(updates: list[Tensors]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, (N, ...) float64 on the CPU), a tensor at a time: memory for one, whatever N."""
    for name in updates[0]:
        yield name, torch.stack([update[name].cpu().double() for update in updates])


def like(values: Tensors, update: Tensors) -> Tensors:
    return {name: v.to(update[name].dtype).to(update[name].device) for name, v in values.items()}


def weighted_sum(updates: list[Tensors], weights: list[float]) -> Tensors:
    """Σ_k w_k θ_k for every tensor, one weight per update."""
    total = {}
    for name, t in stacked(updates):
        w = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * (t.dim() - 1))  # (N, 1, ...)
        total[name] = order_free_sum(w * t)
    return like(total, updates[0])


def order_free_sum(t: torch.Tensor) -> torch.Tensor:
    """Σ_k t_k (N, ...) float64 -> (...), the same bits in whatever order the users come: terms are rounded to multiples of
    2^-52 of N times the largest, whose sums are exact. The error of a mean is below N 2^-52 of the largest term. (Adding
    sorted values is as order-free and takes three times as long.)"""
    most = torch.maximum(t.amax(0), -t.amin(0)) * len(t)  # (...)
    scale = torch.ldexp(torch.ones_like(most), (52 - torch.frexp(most).exponent).clamp_max(1023))  # powers of two, finite
    return (t * scale).round_().sum(0) / scale


def fedavg(updates: list[Tensors]) -> Tensors:
    """θ = 1/N Σ_i θ_i for every tensor: parameters, not gradients, uniform weights (paper Algorithm 1; McMahan 2017).

    On A and B apart: mean(B) mean(A) is not mean(B A) in general. It is with FFA-LoRA (2403.12313), where every A is frozen
    at a start common to all and only B leaves. FedSA-LoRA (2410.01463) keeps every B and averages A."""
    return weighted_sum(updates, [1 / len(updates)] * len(updates))


def trimmed_mean(updates: list[Tensors], trim: float) -> Tensors:
    """The mean of every coordinate without its ⌊trim N⌋ smallest and as many largest values (Yin et al. 2018, 1803.01498):
    bounded influence of up to trim N hostile users, 0 <= trim < 1/2."""
    cut = int(trim * len(updates) + 1e-9)  # 0.07 * 100 is 7.000000000000001, 0.29 * 100 is 28.999999999999996
    cut = min(cut, (len(updates) - 1) // 2)  # and half of them is the median
    return like({name: t.sort(0).values[cut : len(updates) - cut].mean(0) for name, t in stacked(updates)}, updates[0])


def median(updates: list[Tensors]) -> Tensors:
    """The median of every coordinate (Yin et al. 2018); of an even number, the mean of the middle two."""
    return trimmed_mean(updates, 0.5)


# ---- trust: every user gets an average of its own (PCL, 2404.09753) --------------------------------------------------
def trust_average(updates: list[Tensors], W: torch.Tensor) -> list[Tensors]:
    """θ_i = Σ_j W_ij θ_j, one dict per user. W (N, N); W = 1/N is FedAvg, W = I is Local."""
    return [weighted_sum(updates, row) for row in W.tolist()]


def trust_scores(c: SimpleNamespace, sent: dict[int, Tensors], ask: Callable) -> tuple[list[int], torch.Tensor]:
    """(n users, S (n, n)): how good user i finds user j (PCL), by the strategy that c.trust names."""
    if c.trust == 'weights':
        return [*sent], weight_scores([*sent.values()])
    if c.trust == 'validation':  # every user gets the others' updates and sends n numbers
        # S_ij = -perplexity (not loss) of model j on user i's validation text. Differences of a few units saturate the
        # softmax: that is why PCL's matrices are near the identity in domain (METHOD 2)
        return [*sent], -torch.stack([row['ppl'] for row in ask('judge', [*sent], updates=sent).values()])
    told = ask('predict', [*sent], logits=True)
    predictions = [(top['ids'], top['values']) for top in told.values()]
    return [*told], prediction_scores(predictions, c.vocab_size) if told else torch.zeros(0, 0)


def trust_matrix(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """W (N, N) = softmax of every row of scores / temperature: W_ij is how much user i trusts user j. Nobody is trusted whose
    score is NaN or -inf, as of a model that overflows; a user who could trust nobody trusts itself."""
    scores = (scores.double() / temperature).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    nobody = scores.isneginf().all(1, keepdim=True)
    return torch.where(nobody, torch.eye(len(scores), dtype=torch.float64), scores.softmax(1))


def weight_scores(updates: list[Tensors]) -> torch.Tensor:
    """PCL strategy 1: S_ij = mean over the rows of all tensors of cos(row of θ_i, row of θ_j). (N, N)"""
    scores, rows = 0, 0
    for _, t in stacked(updates):  # (N, rows, columns)
        unit = F.normalize(t, dim=2)
        scores, rows = scores + torch.einsum('irc,jrc->ij', unit, unit), rows + t.shape[1]
    return scores / rows


def prediction_scores(predictions: list[Predictions], vocab_size: int) -> torch.Tensor:
    """PCL strategy 3: S_ij = -10 d_ij / Σ_k d_ik, d_ij = Σ |z_i - z_j| over a public text, z the logits with all but each
    position's largest K set to 0. All equal: 0. (N, N)"""
    d = 0
    for z in dense(predictions, vocab_size):  # (N, p, V)
        d = d + torch.stack([(z - row).abs().sum((1, 2)) for row in z]).double()
    return -10 * d / d.sum(1, keepdim=True).clamp_min(1e-30)


# ---- ranks that differ: HetLoRA, FlexLoRA, FLoRA ---------------------------------------------------------------------
def pairs(update: Tensors) -> list[str]:
    """Names of the LoRAs in an update: NAME of NAME.A and NAME.B."""
    return [name[:-2] for name in update if name.endswith('.A')]


def truncate(update: Tensors, rank: int) -> Tensors:
    """The first `rank` components of every generalist: A[:r, :], B[:, :r]. Attention LoRAs have one rank for all."""
    return {
        name: t if not is_generalist(name) else t[:rank] if name.endswith('.A') else t[:, :rank] for name, t in update.items()
    }


def hetlora(updates: list[Tensors], scalings: list[float]) -> Tensors:
    """Ā = Σ_k p_k pad(A_k), B̄ = Σ_k p_k pad(B_k), zero-padded to the largest rank; p_k = |γ_k B_k A_k|_F / Σ_j |γ_j B_j A_j|_F
    for each LoRA, uniform if all are 0 (HetLoRA, 2401.06432; METHOD 2). A component that only some users have is diluted:
    its weights sum to less than 1. scalings: γ_k. A user takes `truncate(server, r_k)`."""
    server = {}
    for name in pairs(updates[0]):
        r_max = max(u[name + '.A'].shape[0] for u in updates)
        A, B = ([u[name + f].cpu().double() for u in updates] for f in ('.A', '.B'))
        A = [F.pad(a, (0, 0, 0, r_max - len(a))) for a in A]  # (r_max, in)
        B = [F.pad(b, (0, r_max - b.shape[1])) for b in B]  # (out, r_max)
        # |B A|_F² = tr((A Aᵀ)(Bᵀ B)): r x r products instead of one that is out x in
        norm = torch.stack([g * ((a @ a.T) * (b.T @ b)).sum().clamp_min(0).sqrt() for g, a, b in zip(scalings, A, B)])
        p = norm / norm.sort().values.sum() if norm.sum() > 0 else torch.full_like(norm, 1 / len(updates))
        server |= weighted_sum([{name + '.A': a, name + '.B': b} for a, b in zip(A, B)], p.tolist())
    return like(server, updates[0])


def tail_norm(tensors: Tensors, rank: int, gamma: float) -> torch.Tensor | float:
    """Σ over generalists of |A[q:r, :]|_F |B[:, q:r]|_F, q = ⌊gamma r⌋: HetLoRA's penalty, and the measure of its pruning."""
    q, total = max(1, int(gamma * rank)), 0.0
    for name in filter(is_generalist, pairs(tensors)):
        total = total + tensors[name + '.A'][q:rank].norm() * tensors[name + '.B'][:, q:rank].norm()
    return total


def flora(updates: list[Tensors], weights: list[float], scalings: list[float]) -> Tensors:
    """B̄ = [B_1 ... B_N], Ā = [w_1 γ_1 A_1; ...; w_N γ_N A_N], so that B̄ Ā = Σ_k w_k γ_k B_k A_k exactly, whatever the ranks
    (FLoRA, 2409.05976). Rank Σ r_k, outer scale 1."""
    server = {}
    for name in pairs(updates[0]):
        server[name + '.A'] = torch.cat([w * g * u[name + '.A'] for u, w, g in zip(updates, weights, scalings)])
        server[name + '.B'] = torch.cat([u[name + '.B'] for u in updates], 1)
    return server


def merge(base: GPT, stack: Tensors) -> None:
    """FLoRA: the base gains Σ_k w_k γ_k B_k A_k, the product of `flora`. All users hold the same base: one addition stands for
    theirs."""
    weight, device = dict(base.named_parameters()), base.wte.weight.device
    with torch.no_grad():
        for name in pairs(stack):
            merged = weight[name.replace('generalists.0.', '').removesuffix('.lora') + '.weight']
            merged += (stack[name + '.B'] @ stack[name + '.A']).to(device)


def flexlora(updates: list[Tensors], weights: list[float], scalings: list[float]) -> Tensors:
    """W = Σ_k w_k γ_k B_k A_k = U Σ Vᵀ as A = Vᵀ, B = U Σ, outer scale 1 (FlexLoRA, 2402.11505). A user takes `of_rank`.

    W has rank Σ r_k at most, so its SVD is that of a Σ r_k x Σ r_k matrix between two orthonormal bases, in float64."""
    server = flora(updates, weights, scalings)
    for name in pairs(server):
        Q_b, R_b = torch.linalg.qr(server[name + '.B'].cpu().double())  # (out, s), (s, Σr)
        Q_a, R_a = torch.linalg.qr(server[name + '.A'].cpu().double().T)  # (in, s'), (s', Σr)
        U, S, Vt = torch.linalg.svd(R_b @ R_a.T, full_matrices=False)  # m = min(s, s') singular values
        server[name + '.B'], server[name + '.A'] = Q_b @ U * S, Vt @ Q_a.T
    return like(server, updates[0])


def of_rank(server: Tensors, rank: int, scaling: float) -> Tensors:
    """What a user of that rank and scaling γ takes from `flexlora`: A = Vᵀ[:r], B = U[:, :r] Σ[:r] / γ, the best
    approximation of W with its rank (Eckart-Young), exact if rank W <= r. Where r is above the Σ r_k of those present, B = 0
    and the rows of A go on orthonormal, so that these components can be trained again; above A's width both are 0."""
    taken = {}
    for name, t in server.items():
        if name.endswith('.A'):
            A = F.pad(t[:rank], (0, 0, 0, max(0, rank - len(t))))  # (r, in)
            if rank > len(t):  # of a column of zeros QR makes one at right angles to those before it
                Q = torch.linalg.qr(A.T.cpu().double()).Q.T.to(t)  # (min(r, in), in)
                A[len(t) : len(Q)] = Q[len(t) :]
            taken[name] = A
        else:
            taken[name] = F.pad(t[:, :rank], (0, max(0, rank - t.shape[1]))) / scaling
    return taken


def fuse(own: Tensors, mean: Tensors, w1: float, w2: float) -> Tensors:
    """A = w1 A_own + w2 A_mean, B = w1 B_own + w2 B_mean, of the tensors in `own`: ΔW is quadratic in (w1, w2) (FDLoRA,
    2406.07925). (1, 0) is the user's own, (0, 1) the mean, (0, 0) the base."""
    return {name: w1 * t + w2 * mean[name] for name, t in own.items()}


# ---- predictions instead of parameters (consensus, 2305.18497) -------------------------------------------------------
@torch.no_grad()
def top_predictions(model: torch.nn.Module, windows: torch.Tensor, k: int, logits: bool = False) -> Predictions:
    """What a user sends about a public text: at every position the k likeliest next tokens and their probabilities (or
    logits), 6 bytes each. windows (W, T) int64; P = W T."""
    ids, values = [], []
    for x in windows.split(8):
        z = model(x)[0].flatten(0, 1).float()  # (p, V)
        top = (z if logits else z.softmax(-1)).topk(min(k, z.shape[1]))
        ids.append(top.indices.int())
        values.append(top.values.half())
    return torch.cat(ids).cpu(), torch.cat(values).cpu()


def top_like(n: int, vocab_size: int) -> Tensors:
    """Tensors such as a user sends of n positions: the 100 likeliest tokens of each, with their values."""
    k = min(100, vocab_size)
    return {'ids': torch.empty(n, k, dtype=torch.int32), 'values': torch.empty(n, k, dtype=torch.float16)}


def dense(predictions: list[Predictions], vocab_size: int) -> Iterator[torch.Tensor]:
    """Yields (N, p, V) float32 of a few positions p at a time, zero where a token is not among its user's K."""
    p = max(1, 2**24 // (vocab_size * len(predictions)))  # 64 MB at a time
    for at in range(0, len(predictions[0][0]), p):
        here = [(ids[at : at + p].long(), values[at : at + p].float()) for ids, values in predictions]  # (p, K) each
        yield torch.stack([torch.zeros(len(ids), vocab_size).scatter(1, ids, values) for ids, values in here])


def prediction_trust(predictions: list[Predictions], vocab_size: int) -> torch.Tensor:
    """W_ij = s_ij / Σ_k s_ik, s_ij = mean over positions of cos(p_j, p_i) / (H(p_i) + 1), H the entropy in nats: positions
    where i is sure count more (METHOD 3.2). From the K probabilities; H takes what is left as one more class. (N, N)"""
    s = 0
    for p in dense(predictions, vocab_size):  # (N, p, V)
        rest = (1 - p.sum(2, keepdim=True)).clamp_min(0)  # (N, p, 1)
        H = torch.special.entr(torch.cat((p, rest), 2)).sum(2)  # (N, p)
        unit = F.normalize(p, dim=2)
        cos = torch.stack([(unit * row).sum(2) for row in unit])  # (N, N, p)
        s = s + (cos / (H[:, None] + 1)).sum(2).double()
    return s / s.sum(1, keepdim=True).clamp_min(1e-30)  # of predictions that are all 0: no trust, not NaN


def consensus(predictions: list[Predictions], weights: list[float], vocab_size: int) -> Predictions:
    """ψ = Σ_j w_j p_j, one user's pseudo-labels: the K likeliest tokens of the weighted predictions."""
    k, ids, values = predictions[0][0].shape[1], [], []
    for p in dense(predictions, vocab_size):  # (N, p, V)
        top = torch.einsum('n,npv->pv', torch.tensor(weights), p).topk(k)
        ids.append(top.indices.int())
        values.append(top.values.half())
    return torch.cat(ids), torch.cat(values)


def consensus_loss(logits: torch.Tensor, psi: Predictions) -> torch.Tensor:
    """CE(ψ, p) in nats, mean over positions, over K + 1 classes: ψ's tokens and all others as one. logits (p, V)."""
    ids, target = psi[0].long(), psi[1].float()
    log_p = logits.float().log_softmax(-1)  # (p, V)
    loss = -(target * log_p.gather(1, ids)).sum(1)  # (p,)
    if ids.shape[1] < log_p.shape[1]:
        loss = loss - (1 - target.sum(1)).clamp_min(0) * log_p.scatter(1, ids, -torch.inf).logsumexp(1)
    return loss.mean()
