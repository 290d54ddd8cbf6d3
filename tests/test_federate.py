"""Every aggregation rule against its formula, recomputed plainly in numpy, and the privacy boundary."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import federate
from federate import (
    consensus,
    consensus_loss,
    fedavg,
    flexlora,
    flora,
    fuse,
    hetlora,
    median,
    n_bytes,
    of_rank,
    order_free_sum,
    prediction_scores,
    prediction_trust,
    shared_names,
    tail_norm,
    top_predictions,
    trimmed_mean,
    truncate,
    trust_average,
    trust_matrix,
    weight_scores,
    weighted_sum,
)
from lora_moe import add_lora, roles
from model import GPT, GPTConfig

RULES = {'fedavg': fedavg, 'median': median, 'trimmed_mean': lambda u: trimmed_mean(u, 0.25)}


def updates(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [{'a': torch.randn(3, 4, generator=g), 'b': torch.randn(5, generator=g)} for _ in range(n)]


def lora_updates(ranks, seed=0, n_in=10, n_out=12) -> list[dict]:
    """One generalist and one attention LoRA per user; the generalist's rank is the user's."""
    g = torch.Generator().manual_seed(seed)
    return [
        {
            'h.0.mlp.generalists.0.c_fc.A': torch.randn(r, n_in, generator=g),
            'h.0.mlp.generalists.0.c_fc.B': torch.randn(n_out, r, generator=g),
            'h.0.attn.c_attn.lora.A': torch.randn(8, n_in, generator=g),
            'h.0.attn.c_attn.lora.B': torch.randn(n_out, 8, generator=g),
        }
        for r in ranks
    ]


MLP, ATT = 'h.0.mlp.generalists.0.c_fc', 'h.0.attn.c_attn.lora'


def delta(update: dict, name=MLP) -> np.ndarray:
    """B A, without scaling, in float64."""
    return (update[name + '.B'].double() @ update[name + '.A'].double()).numpy()


def each(given, weights, scalings) -> list[dict]:
    """What every user has after FlexLoRA: its rank's part of the server's factors, LoRA by LoRA."""
    server, taken = flexlora(given, weights, scalings), [{} for _ in given]
    for user, update, gamma in zip(taken, given, scalings):
        for name in (MLP, ATT):
            user |= of_rank({name + f: server[name + f] for f in ('.A', '.B')}, len(update[name + '.A']), gamma)
    return taken


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- means of parameters ---------------------------------------------------------------------------------------------
def test_fedavg_is_the_mean_of_parameters():
    given = updates(4)
    mean = fedavg(given)
    for name in ('a', 'b'):
        assert np.allclose(mean[name], np.mean([u[name].numpy() for u in given], axis=0), atol=1e-7)
        assert mean[name].dtype == torch.float32


def test_weighted_sum():
    given, w = updates(3), [0.5, 2.0, 0.25]
    total = weighted_sum(given, w)
    assert np.allclose(total['a'], sum(x * u['a'].numpy() for x, u in zip(w, given)), atol=1e-6)


@pytest.mark.parametrize('rule', RULES)
def test_identical_users_and_a_single_user_are_fixed_points(rule):
    one = updates(1)
    for n in (1, 3, 7):
        assert same(RULES[rule](one * n), one[0])


@pytest.mark.parametrize('rule', [*RULES, 'weighted_sum'])
def test_the_order_of_users_changes_no_bit(rule):
    some, w = updates(9), np.random.default_rng(0).random(9)
    w[1:8:2] = w[0:8:2]  # pairs that cancel: a float64 sum in another order shows
    given = [{name: sign * 1e12 * t for name, t in some[k // 2].items()} for k, sign in enumerate((1, -1) * 4)] + some[8:]
    whole = weighted_sum(given, w.tolist()) if rule == 'weighted_sum' else RULES[rule](given)
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(9)
        mixed = [given[i] for i in order]
        assert same(whole, weighted_sum(mixed, w[order].tolist()) if rule == 'weighted_sum' else RULES[rule](mixed))


def test_mean_of_factors_is_the_mean_of_products_only_with_one_A():
    """FFA-LoRA: mean(B) A = mean(B A) when A is everybody's; else mean(B) mean(A) leaves something out."""
    given = lora_updates([4, 4, 4])
    product = np.mean([delta(u) for u in given], 0)
    assert np.linalg.norm(delta(fedavg(given)) - product) > 0.1 * np.linalg.norm(product)
    for u in given:
        u[MLP + '.A'] = given[0][MLP + '.A']
    assert np.allclose(delta(fedavg(given)), np.mean([delta(u) for u in given], 0), atol=1e-6)


@pytest.mark.parametrize('n', [1, 2, 4, 5, 9])
def test_median_and_trimmed_mean_by_numpy(n):
    given = updates(n)
    stack = np.stack([u['a'].numpy() for u in given])
    assert np.allclose(median(given)['a'], np.median(stack, 0), atol=1e-6)
    for trim in (0.0, 0.25, 0.4, 0.4999999999):
        cut = int(trim * n)
        assert np.allclose(trimmed_mean(given, trim)['a'], np.sort(stack, 0)[cut : n - cut].mean(0), atol=1e-6)
    assert same(trimmed_mean(given, 0.0), fedavg(given)) or n > 2


@pytest.mark.parametrize('factor', [1e3, 1e6, -1e6])
def test_one_hostile_user_of_four_moves_the_mean_but_not_the_robust_rules(factor):
    honest = updates(4)
    hostile = honest[:3] + [{name: factor * t for name, t in honest[3].items()}]
    low, high = (torch.stack([u['a'] for u in honest[:3]]).aminmax(dim=0)[i] for i in (0, 1))
    for rule in ('median', 'trimmed_mean'):
        bent = RULES[rule](hostile)['a']
        assert (bent >= low - 1e-6).all() and (bent <= high + 1e-6).all()
    assert not ((fedavg(hostile)['a'] >= low) & (fedavg(hostile)['a'] <= high)).all()


@pytest.mark.parametrize('scale', [1e-300, 1e-30, 1.0, 1e30])
def test_order_free_sum_is_the_sum(scale):
    """Against math.fsum, over terms of very different size, of which some cancel; zero stays zero."""
    g = torch.Generator().manual_seed(0)
    t = scale * torch.randn(50, 200, generator=g).double() * 10 ** torch.randint(-6, 6, (50, 200), generator=g).double()
    t[1::2, :20], t[:, 20] = -t[::2, :20], 0
    exact = torch.tensor([math.fsum(column) for column in t.T.tolist()], dtype=torch.float64)
    assert ((order_free_sum(t) - exact).abs() <= 50**2 * 2**-52 * t.abs().amax(0) + 50 * 2**-1023).all()
    assert not order_free_sum(t)[:21].any() and torch.equal(order_free_sum(t[:1]).float(), t[0].float())
    for seed in range(20):
        assert torch.equal(order_free_sum(t[torch.randperm(50, generator=g)]), order_free_sum(t)), seed


def test_no_rule_writes_to_what_it_is_given():
    w, gamma, W = [0.2, 0.5, 0.3], [1.0, 2.0, 3.0], torch.full((3, 3), 1 / 3)
    rules = [
        fedavg,
        median,
        weight_scores,
        lambda u: trimmed_mean(u, 0.4),
        lambda u: weighted_sum(u, w),
        lambda u: trust_average(u, W),
        lambda u: hetlora(u, gamma),
        lambda u: flora(u, w, gamma),
        lambda u: flexlora(u, w, gamma),
        lambda u: fuse(u[0], u[1], 0.3, 0.7),
    ]
    given, kept = lora_updates([4, 4, 4]), lora_updates([4, 4, 4])
    for rule in rules:
        rule(given)
        assert all(same(a, b) for a, b in zip(given, kept))


def test_a_mean_is_summed_in_float64():
    """1e8 + 1 - 1e8 = 1: float32 would lose the 1."""
    given = [{'a': torch.tensor([x])} for x in (1e8, 1.0, -1e8)]
    assert weighted_sum(given, [1.0, 1.0, 1.0])['a'].item() == 1.0 and fedavg(given)['a'].item() == pytest.approx(1 / 3)


def test_median_and_trimmed_mean_withstand_as_many_hostile_users_as_they_promise():
    """4 of 9 for the median, ⌊0.25 * 9⌋ = 2 for the trimmed mean, whatever they send and whoever they are."""
    honest = updates(9)
    for rule, hostile in (('median', [0, 3, 5, 8]), ('trimmed_mean', [2, 7])):
        sent = [
            {name: torch.full_like(t, (-1e6, 1e6)[i % 2]) if i in hostile else t for name, t in u.items()}
            for i, u in enumerate(honest)
        ]
        for name in ('a', 'b'):
            low, high = torch.stack([u[name] for i, u in enumerate(honest) if i not in hostile]).aminmax(dim=0)
            bent = RULES[rule](sent)[name]
            assert (bent >= low - 1e-6).all() and (bent <= high + 1e-6).all()


# ---- trust -----------------------------------------------------------------------------------------------------------
def test_trust_average_at_its_limits():
    """W = I leaves everybody alone, W = 1/N is FedAvg, both to the bit; else Σ_j W_ij θ_j."""
    given = updates(4)
    assert all(same(a, b) for a, b in zip(trust_average(given, torch.eye(4, dtype=torch.float64)), given))
    assert all(same(a, fedavg(given)) for a in trust_average(given, torch.full((4, 4), 0.25, dtype=torch.float64)))
    W = trust_matrix(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)), 1.0)
    for i, mine in enumerate(trust_average(given, W)):
        assert np.allclose(mine['b'], sum(W[i, j].item() * given[j]['b'].numpy() for j in range(4)), atol=1e-6)


def test_trust_matrix_is_a_softmax_over_rows():
    S = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double()
    W = trust_matrix(S, 1.0)
    assert torch.allclose(W.sum(1), torch.ones(5).double()) and (W > 0).all()
    assert torch.allclose(W, S.exp() / S.exp().sum(1, keepdim=True))
    assert torch.allclose(W, trust_matrix(S + torch.randn(5, 1), 1.0))  # a shift of a row changes nothing
    assert torch.allclose(trust_matrix(S, 1e9), torch.full((5, 5), 0.2).double())
    assert torch.equal(trust_matrix(S, 1e-3).argmax(1), S.argmax(1)) and trust_matrix(S, 1e-3).max(1).values.min() > 0.9


def test_perplexities_saturate_trust_and_losses_do_not():
    """60, 90, 80, 100: (1, 0, 0, 0) by perplexity; (.33, .22, .25, .20) if it were by loss."""
    ppl = torch.tensor([[60.0, 90.0, 80.0, 100.0]]).double()
    assert torch.allclose(trust_matrix(-ppl, 1.0), torch.tensor([[1.0, 0, 0, 0]]).double(), atol=1e-8)
    by_loss = torch.tensor([[0.33, 0.22, 0.25, 0.20]]).double()
    assert torch.allclose(trust_matrix(-ppl.log(), 1.0), by_loss, atol=0.006)


def test_trust_by_weights_is_the_mean_cosine_of_rows():
    given = lora_updates([4, 4, 4])
    S = weight_scores(given)
    for i in range(3):
        for j in range(3):
            rows = [pair for name in given[0] for pair in zip(given[i][name], given[j][name])]
            cosines = [F.cosine_similarity(a, b, dim=0).item() for a, b in rows]
            assert S[i, j].item() == pytest.approx(np.mean(cosines), abs=1e-6)
    assert torch.allclose(S.diagonal(), torch.ones(3).double())


def test_rows_of_zeros_count_as_unlike():
    """Before any training B = 0: its 12 + 12 rows add nothing to the 4 + 8 of the A, which start equal."""
    given = lora_updates([4]) * 2
    given = [{name: torch.zeros_like(t) if name.endswith('.B') else t for name, t in u.items()} for u in given]
    assert torch.allclose(weight_scores(given), torch.full((2, 2), 12 / 36).double())


def predictions_of(logits: torch.Tensor, k: int, as_logits=False) -> tuple:
    """(P, V) logits of a made-up user as what it would send."""
    top = (logits if as_logits else logits.softmax(-1)).topk(k)
    return top.indices.int(), top.values.half()


def made_up(n, P=40, V=30, k=10, seed=0, as_logits=False) -> list[tuple]:
    g = torch.Generator().manual_seed(seed)
    common = 2 * torch.randn(P, V, generator=g)
    return [predictions_of(common + torch.randn(P, V, generator=g), k, as_logits) for _ in range(n)]


def full(prediction: tuple, V=30) -> np.ndarray:
    ids, values = (t.numpy() for t in prediction)
    out = np.zeros((len(ids), V))
    np.put_along_axis(out, ids.astype(np.int64), values.astype(np.float64), 1)
    return out


@pytest.mark.parametrize('k', [5, 30])
def test_trust_by_predictions(k):
    """S_ij = -10 d_ij / Σ_k d_ik with d_ij = Σ |z_i - z_j|, logits outside the largest K as 0."""
    given = made_up(4, k=k, as_logits=True)
    z = [full(p) for p in given]
    d = np.array([[np.abs(a - b).sum() for b in z] for a in z])
    assert np.allclose(prediction_scores(given, 30), -10 * d / d.sum(1, keepdims=True), atol=1e-4)


def test_identical_users_trust_each_other_equally():
    weights, given = lora_updates([4]) * 3, made_up(1) * 3
    uniform = torch.full((3, 3), 1 / 3).double()
    logits = made_up(1, as_logits=True) * 3
    for scores in (weight_scores(weights), torch.full((3, 3), -7.0), prediction_scores(logits, 30)):
        assert torch.allclose(trust_matrix(scores, 1.0), uniform)
    assert torch.allclose(prediction_trust(given, 30), uniform)


def test_identical_users_are_a_fixed_point_of_any_trust():
    one, W = updates(1)[0], trust_matrix(5 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), 1.0)
    assert all(same(mine, one) for mine in trust_average([one] * 4, W))


def test_nobody_whose_predictions_count_leaves_everybody_as_it_is():
    """Updates have come, and then every answer to the question for predictions is refused: no average, and no line of trust."""
    for rule in ('trust', 'consensus'):
        c = SimpleNamespace(
            aggregate=rule, trust='predictions', clip_norm=0, consensus_start=1, n_train=[1, 1], lora_rank=[4, 4]
        )
        c.lora_alpha, c.vocab_size, c.trust_temperature = 16, 30, 1.0
        sent, lines = dict(enumerate(lora_updates([4, 4]))), []
        made = federate.combine(c, 3, {}, sent, lambda question, ids, **told: {}, lambda *line: lines.append(line))
        assert made == ({}, {}) and not lines


def test_predictions_of_nothing_are_no_nan():
    ids, values = made_up(1)[0]
    assert prediction_trust([(ids, values), (ids, values * 0)], 30).isfinite().all()


def test_a_single_user_trusts_itself():
    (logits,), (probs,), (weights,) = made_up(1, as_logits=True), made_up(1), updates(1)
    W = trust_matrix(prediction_scores([logits], 30), 1.0)
    assert W.tolist() == prediction_trust([probs], 30).tolist() == [[1.0]]
    assert same(trust_average([weights], W)[0], weights)
    assert np.array_equal(full(consensus([probs], [1.0], 30)), full(probs))


# ---- predictions instead of parameters ---------------------------------------------------------------------------------
@pytest.mark.parametrize('k', [10, 30])
def test_prediction_trust_is_cosine_over_entropy(k):
    given = made_up(4, k=k)
    p = [full(g) for g in given]
    s = np.zeros((4, 4))
    for i in range(4):
        rest = np.clip(1 - p[i].sum(1, keepdims=True), 0, None)
        q = np.concatenate((p[i], rest), 1)
        H = -(q * np.log(np.where(q > 0, q, 1))).sum(1)
        for j in range(4):
            cos = (p[i] * p[j]).sum(1) / np.linalg.norm(p[i], axis=1) / np.linalg.norm(p[j], axis=1)
            s[i, j] = (cos / (H + 1)).mean()
    W = prediction_trust(given, 30).numpy()
    assert np.allclose(W, s / s.sum(1, keepdims=True), atol=1e-5)
    assert np.allclose(W.sum(1), 1) and (W > 0).all() and (W.argmax(1) == np.arange(4)).all()  # s_ii >= s_ij


def test_words_that_nobody_predicts_change_nothing():
    """Neither trust nor ψ: also where the vocabulary is so large that the positions are taken in pieces (32 and 8)."""
    large, w = 2**17, [0.1, 0.2, 0.3, 0.4]
    probs, logits = made_up(4), made_up(4, as_logits=True)
    assert torch.allclose(prediction_trust(probs, large), prediction_trust(probs, 30), atol=1e-6)
    assert torch.allclose(prediction_scores(logits, large), prediction_scores(logits, 30), atol=1e-4)
    psi = consensus(probs, w, large)
    assert psi[0].shape == (40, 10) and np.allclose(full(psi), full(consensus(probs, w, 30)), atol=1e-6)


def test_trust_is_the_judges_own_confidence_by_hand():
    """User 0 is sure at position 0 and has two equal guesses at position 1, where H = ln 2; user 1 says token 0 twice.
    s_01 = (1 + cos 45° / (1 + ln 2)) / 2 and s_00 = (1 + 1 / (1 + ln 2)) / 2; user 1's H is 0, s_10 = (1 + cos 45°) / 2."""
    given = [(torch.tensor([[0, 1], [0, 1]]).int(), torch.tensor(p).half()) for p in ([[1, 0], [0.5, 0.5]], [[1.0, 0], [1, 0]])]
    h, cos = 1 + np.log(2), np.sqrt(0.5)
    s = np.array([[1 + 1 / h, 1 + cos / h], [1 + cos, 2]])
    assert np.allclose(prediction_trust(given, 2), s / s.sum(1, keepdims=True), atol=1e-6)


def test_a_user_with_permuted_predictions_is_trusted_least():
    for as_logits, trust in ((False, prediction_trust), (True, lambda p, V: trust_matrix(prediction_scores(p, V), 1.0))):
        given = made_up(5, as_logits=as_logits)
        ids, values = given[3]
        given[3] = torch.randperm(30, generator=torch.Generator().manual_seed(0))[ids.long()].int(), values
        assert trust(given, 30).mean(0).argmin() == 3


def test_consensus_of_identical_users_and_of_one_trusted_user():
    given = made_up(3)
    for psi in (consensus([given[0]] * 3, [0.2, 0.3, 0.5], 30), consensus(given, [1.0, 0.0, 0.0], 30)):
        assert np.allclose(full(psi), full(given[0]), atol=1e-3)


def test_consensus_is_the_weighted_mean_of_predictions_cut_to_its_largest():
    given, w = made_up(3), [0.2, 0.3, 0.5]
    mean = sum(x * full(p) for x, p in zip(w, given))
    mean[mean < np.sort(mean, 1)[:, -10][:, None]] = 0
    assert np.allclose(full(consensus(given, w, 30)), mean, atol=1e-3)


def test_iterated_trust_converges_to_the_perron_vector():
    """p <- W p with a fixed positive W: everybody ends at πᵀ p, π the left eigenvector of W with eigenvalue 1."""
    p = made_up(4, k=30)
    W = prediction_trust(p, 30)
    values, vectors = np.linalg.eig(W.numpy().T)
    pi = np.real(vectors[:, np.argmax(np.real(values))])
    limit = np.einsum('n,npv->pv', pi / pi.sum(), [full(q) for q in p])
    for _ in range(15):
        p = [consensus(p, row, 30) for row in W.tolist()]
    assert all(np.allclose(full(q), limit, atol=3e-3) for q in p)


def test_consensus_under_a_lopsided_trust_is_not_the_mean():
    """π = (2/3, 1/4, 1/12) of this W: the limit πᵀ p has rank one over the users and is far from the plain mean."""
    W, pi = np.array([[0.9, 0.075, 0.025], [0.2, 0.75, 0.05], [0.2, 0.15, 0.65]]), np.array([2 / 3, 1 / 4, 1 / 12])
    assert np.allclose(pi @ W, pi) and np.allclose(W.sum(1), 1)
    first = made_up(3, k=30, seed=3)
    p, limit, mean = first, sum(x * full(q) for x, q in zip(pi, first)), np.mean([full(q) for q in first], 0)
    for _ in range(40):
        p = [consensus(p, row, 30) for row in W.tolist()]
    assert all(np.allclose(full(q), limit, atol=5e-3) for q in p) and np.abs(mean - limit).max() > 0.05
    sigma = np.linalg.svd(np.stack([full(q).ravel() for q in p]), compute_uv=False)
    assert sigma[1] < 5e-3 * sigma[0]


def test_consensus_loss_is_a_cross_entropy_over_the_top_tokens_and_the_rest():
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(6, 30, generator=g), torch.randn(6, 30, generator=g)
    whole = predictions_of(target, 30)
    assert consensus_loss(logits, whole).item() == pytest.approx(F.cross_entropy(logits, target.softmax(-1)).item(), abs=2e-3)
    psi = predictions_of(target, 5)
    log_p, q, loss = logits.log_softmax(-1).double().numpy(), full(psi), 0
    for t in range(6):
        top = q[t] > 0
        loss -= (q[t][top] * log_p[t][top]).sum() + (1 - q[t].sum()) * np.log(np.exp(log_p[t][~top]).sum())
    assert consensus_loss(logits, psi).item() == pytest.approx(loss / 6, abs=1e-4)
    others = [consensus_loss(target + 0.3 * torch.randn(6, 30, generator=g), psi) for _ in range(20)]
    assert min(others) > consensus_loss(target, psi)  # least where p = ψ


@pytest.mark.parametrize('k', [5, 30])
def test_the_gradient_of_the_consensus_loss_is_p_minus_psi(k):
    """(p_v - ψ_v) / P for a token of ψ, (p_v - ψ_rest p_v / p_rest) / P for another: zero where the model predicts ψ."""
    g = torch.Generator().manual_seed(0)
    target, logits = torch.randn(6, 30, generator=g), torch.randn(6, 30, generator=g)
    psi = predictions_of(target, k)
    for z in (logits, target):
        z = z.clone().requires_grad_()
        consensus_loss(z, psi).backward()
        p, q = z.detach().double().softmax(1).numpy(), full(psi)
        others = p * (q == 0)
        q = q + (1 - q.sum(1, keepdims=True)) * others / np.maximum(others.sum(1, keepdims=True), 1e-30)
        assert np.allclose(z.grad, (p - q) / 6, atol=2e-4)
    assert z.grad.abs().max() < 2e-4


def test_top_predictions_are_those_of_the_model_in_six_bytes_each():
    torch.manual_seed(0)
    gpt, windows = GPT(GPTConfig(50, 16, 1, 2, 8)), torch.randint(50, (11, 16))
    ids, values = top_predictions(gpt, windows, 7)
    logits = gpt(windows)[0].flatten(0, 1)
    assert torch.equal(ids.long(), logits.softmax(-1).topk(7).indices)
    assert torch.allclose(values.float(), logits.softmax(-1).topk(7).values, atol=1e-3)
    assert torch.allclose(top_predictions(gpt, windows, 7, logits=True)[1].float(), logits.topk(7).values, atol=1e-3)
    assert n_bytes({'ids': ids, 'values': values}) == 11 * 16 * 7 * 6
    assert top_predictions(gpt, windows, 100)[0].shape == (11 * 16, 50)  # no more than there are


# ---- ranks that differ -------------------------------------------------------------------------------------------------
GAMMA = [16 / np.sqrt(r) for r in (2, 4, 6)]


def test_truncate_takes_the_first_components_of_generalists_only():
    (update,) = lora_updates([6])
    cut = truncate(update, 2)
    assert torch.equal(cut[MLP + '.A'], update[MLP + '.A'][:2]) and torch.equal(cut[MLP + '.B'], update[MLP + '.B'][:, :2])
    assert torch.equal(cut[ATT + '.A'], update[ATT + '.A']) and same(truncate(update, 8), update)


def test_hetlora_weights_by_the_norm_of_the_update_and_dilutes():
    """Component ρ is Σ over the users that have it of p_k times theirs; p_k of |γ_k B_k A_k|_F."""
    given = lora_updates([2, 4, 6])
    norms = np.array([g * np.linalg.norm(delta(u)) for g, u in zip(GAMMA, given)])
    p, server = norms / norms.sum(), hetlora(given, GAMMA)
    assert server[MLP + '.A'].shape == (6, 10) and server[MLP + '.B'].shape == (12, 6)
    A, B = server[MLP + '.A'], server[MLP + '.B']
    for rho in range(6):
        have = [k for k, r in enumerate((2, 4, 6)) if r > rho]
        assert np.allclose(A[rho], sum(p[k] * given[k][MLP + '.A'][rho].numpy() for k in have), atol=1e-5)
        assert np.allclose(B[:, rho], sum(p[k] * given[k][MLP + '.B'][:, rho].numpy() for k in have), atol=1e-5)
    assert sum(p[1:]) < 1


def test_hetlora_of_equal_ranks_weighs_every_lora_by_its_own_norm():
    """Σ p_k A_k and Σ p_k B_k; a user that moved its attention much and its MLP little counts much and little."""
    given, gamma = lora_updates([4, 4, 4]), [1.0, 2.0, 0.5]
    given[0][ATT + '.B'] *= 10
    for name in (MLP, ATT):
        norms = np.array([g * np.linalg.norm(delta(u, name)) for g, u in zip(gamma, given)])
        p, server = norms / norms.sum(), hetlora(given, gamma)
        for factor in ('.A', '.B'):
            expected = sum(x * u[name + factor].numpy() for x, u in zip(p, given))
            assert np.allclose(server[name + factor], expected, atol=1e-5)


def test_identical_users_keep_their_update_under_every_rule():
    (one,) = lora_updates([4])
    for n in (1, 3):
        for new, scale in (
            (hetlora([one] * n, [2.0] * n), 2),
            (flora([one] * n, [1 / n] * n, [2.0] * n), 1),
            *((user, 2) for user in each([one] * n, [1 / n] * n, [2.0] * n)),
        ):
            assert all(np.allclose(scale * delta(new, name), 2 * delta(one, name), atol=1e-4) for name in (MLP, ATT))


def test_hetlora_of_equal_norms_is_fedavg_and_of_one_user_the_identity():
    (one,) = lora_updates([4])
    turned = {name: t.flip(1) if name.endswith('.A') else t for name, t in one.items()}  # same norm
    given = [one, turned]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(hetlora(given, [1, 1]).values(), fedavg(given).values()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(hetlora([one], [3.0]).values(), one.values()))


def test_hetlora_without_any_update_is_the_plain_mean():
    given = lora_updates([4, 4])
    for u in given:
        u[MLP + '.B'] = torch.zeros(12, 4)
    assert torch.allclose(hetlora(given, [1, 2])[MLP + '.A'], fedavg(given)[MLP + '.A'], atol=1e-6)


@pytest.mark.parametrize('gamma, rank', [(0.99, 2), (0.99, 16), (0.99, 100), (0.5, 6), (1.0, 6), (0.99, 1)])
def test_the_tail_is_what_a_pruning_would_cut(gamma, rank):
    """|A[q:]|_F |B[:, q:]|_F with q = ⌊gamma r⌋, at least 1: with 0.99 one component for every rank from 2 to 100."""
    (update,) = lora_updates([rank])
    q = max(1, int(np.floor(gamma * rank)))
    assert q == rank - 1 or gamma != 0.99 or rank == 1
    A, B = update[MLP + '.A'].numpy(), update[MLP + '.B'].numpy()
    assert float(tail_norm(update, rank, gamma)) == pytest.approx(np.linalg.norm(A[q:]) * np.linalg.norm(B[:, q:]), rel=1e-5)


def test_a_pruning_with_099_cuts_one_component_of_any_rank_from_2_to_100():
    """⌊0.99 r⌋ = r - 1: the tail is the last component's |a| |b|."""
    (update,) = lora_updates([100])
    for rank in range(2, 101):
        a, b = update[MLP + '.A'][rank - 1].numpy(), update[MLP + '.B'][:, rank - 1].numpy()
        assert float(tail_norm(update, rank, 0.99)) == pytest.approx(np.linalg.norm(a) * np.linalg.norm(b), rel=1e-5)


def test_the_tail_is_summed_over_layers_and_stops_at_the_present_rank():
    """Components that an earlier pruning cut do not count, and attention never does."""
    layers = lora_updates([8], 0) + lora_updates([8], 1)
    update = {name.replace('h.0', f'h.{i}'): t for i, layer in enumerate(layers) for name, t in layer.items()}
    expected = sum(np.linalg.norm(u[MLP + '.A'][3:6].numpy()) * np.linalg.norm(u[MLP + '.B'][:, 3:6].numpy()) for u in layers)
    assert float(tail_norm(update, 6, 0.5)) == pytest.approx(expected, rel=1e-5)


def test_the_tail_has_a_finite_gradient_where_B_is_zero():
    (update,) = lora_updates([4])
    update[MLP + '.B'] = torch.zeros(12, 4)
    for t in update.values():
        t.requires_grad_()
    tail_norm(update, 4, 0.5).backward()
    assert torch.isfinite(update[MLP + '.A'].grad).all() and torch.isfinite(update[MLP + '.B'].grad).all()


@pytest.mark.parametrize('ranks', [(2, 4, 6), (1, 1, 1), (16, 2, 4)])
def test_flora_is_exact_for_any_ranks(ranks):
    """B̄ Ā = Σ w_k γ_k B_k A_k."""
    given, w, gamma = lora_updates(ranks), [0.2, 0.5, 0.3], [16 / np.sqrt(r) for r in ranks]
    server = flora(given, w, gamma)
    assert server[MLP + '.A'].shape == (sum(ranks), 10)
    assert np.allclose(delta(server), sum(x * g * delta(u) for x, g, u in zip(w, gamma, given)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('seed', [0, 1])
def test_flexlora_is_the_best_approximation_of_each_rank(seed):
    """Eckart-Young: what a user of rank r misses of W has norm sqrt(Σ_{i > r} σ_i²), and no rank r does better."""
    given, w = lora_updates([2, 4, 6], seed), [0.2, 0.5, 0.3]
    W = sum(x * g * delta(u) for x, g, u in zip(w, GAMMA, given))
    sigma = np.linalg.svd(W, compute_uv=False)
    for r, g, old, new in zip((2, 4, 6), GAMMA, given, each(given, w, GAMMA)):
        assert {name: t.shape for name, t in new.items()} == {name: t.shape for name, t in old.items()}
        missed = np.linalg.norm(W - g * delta(new))
        assert missed == pytest.approx(np.sqrt((sigma[r:] ** 2).sum()), rel=1e-4) and missed > 0
        assert torch.allclose(new[MLP + '.A'] @ new[MLP + '.A'].T, torch.eye(r), atol=1e-5)


def test_flexlora_is_exact_where_the_rank_allows():
    """One user; equal users; users of ranks 6, 8, 10 whose updates use 2 components each, so that rank W = 6 <= r_k."""
    thin = lora_updates([6, 8, 10])
    for u in thin:
        u[MLP + '.B'][:, 2:] = 0
    for given, w, gamma in (
        (lora_updates([3]), [1.0], [2.0]),
        (lora_updates([3]) * 4, [0.25] * 4, [2.0] * 4),
        (thin, [0.1, 0.2, 0.7], [1.0, 2.0, 3.0]),
    ):
        W = sum(x * g * delta(u) for x, g, u in zip(w, gamma, given))
        r, new = np.linalg.matrix_rank(W, tol=1e-4), each(given, w, gamma)
        assert r == (6 if given is thin else 3) and len(new) == len(given)
        assert all(np.allclose(g * delta(n), W, atol=1e-4) for g, n in zip(gamma, new))


def test_flexlora_before_any_update_leaves_none():
    """B = 0 everywhere: W = 0 has no singular vectors of its own, but A stays orthonormal and can be trained."""
    given = [{name: torch.zeros_like(t) if name.endswith('.B') else t for name, t in u.items()} for u in lora_updates([2, 4])]
    for r, new in zip((2, 4), each(given, [0.5, 0.5], [1.0, 2.0])):
        assert not new[MLP + '.B'].any()
        assert torch.allclose(new[MLP + '.A'] @ new[MLP + '.A'].T, torch.eye(r), atol=1e-5)


@pytest.mark.parametrize('present, rank', [([3], 8), ([2, 2], 5), ([2, 2], 10), ([16, 16], 16)])
def test_flexlora_with_a_rank_above_that_of_all_present(present, rank):
    """B is 0 there, but A goes on with orthonormal rows (of 10 columns), so that a gradient reaches both again."""
    given, m = lora_updates(present), min(sum(present), 10)
    server = flexlora(given, w := [1 / len(given)] * len(given), [4.0] * len(given))
    new = of_rank(server, rank, 2.0)
    A, B, n = new[MLP + '.A'], new[MLP + '.B'], min(rank, 10)
    assert A.shape == (rank, 10) and torch.equal(A[:m], server[MLP + '.A'][:m]) and not B[:, m:].any()
    assert torch.allclose(A[:n] @ A[:n].T, torch.eye(n), atol=1e-5) and not A[n:].any()
    assert np.allclose(2 * delta(new), sum(x * 4 * delta(u) for x, u in zip(w, given)), atol=1e-3)
    assert same(new, of_rank(server, rank, 2.0))


@pytest.mark.parametrize('order', [[2, 0, 1], [0, 2, 1]])
@pytest.mark.parametrize('rule', ['hetlora', 'flora', 'flexlora'])
def test_permuting_users_changes_nothing_but_rounding(rule, order):
    given, w = lora_updates([2, 4, 6]), [0.2, 0.5, 0.3]
    a, b = (
        {'hetlora': lambda u, w, g: [hetlora(u, g)], 'flora': lambda u, w, g: [flora(u, w, g)], 'flexlora': each}[rule](
            [given[i] for i in o], [w[i] for i in o], [GAMMA[i] for i in o]
        )
        for o in ([0, 1, 2], order)
    )
    if rule == 'flexlora':
        a = [a[i] for i in order]
    assert all(np.allclose(delta(x, name), delta(y, name), rtol=1e-3, atol=1e-3) for x, y in zip(a, b) for name in (MLP, ATT))


def test_fusion_at_its_corners():
    own, mean = lora_updates([4, 4])
    assert same(fuse(own, mean, 1.0, 0.0), own) and same(fuse(own, mean, 0.0, 1.0), mean)
    assert not any(t.any() for t in fuse(own, mean, 0.0, 0.0).values())
    B, A = ((own[MLP + f] + mean[MLP + f]).double() for f in ('.B', '.A'))
    assert np.allclose(delta(fuse(own, mean, 0.5, 0.5)), B @ A / 4, atol=1e-5)


# ---- what leaves -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('n, n_generalists', [(2, 1), (2, 2), (2, 0), (4, 1), (4, 2), (1, 1)])
def test_only_generalists_and_shared_attention_leave(n, n_generalists):
    model = add_lora(GPT(GPTConfig(50, 16, 2, 2, 16)), n_experts=n, n_generalists=n_generalists, rank=4)
    role = roles(model)
    for share_attention in (True, False):
        names = shared_names(role, c := SimpleNamespace(aggregate='fedavg', share_attention=share_attention))
        assert not any('specialists' in name or 'router' in name for name in names)
        assert sum('generalists' in name for name in names) == 2 * n_generalists * 4
        assert sum('attn' in name for name in names) == (2 * 4 if share_attention else 0)
        for c.aggregate, factor in (('fedsa', 'A'), ('ffa', 'B')):
            assert shared_names(role, c) == [name for name in names if name.endswith('.' + factor)]
            assert shared_names(role, c, 'AB') == names  # what starts alike in all users
        for c.aggregate in ('none', 'consensus'):
            assert shared_names(role, c) == shared_names(role, c, 'AB') == []
        sent = {name: dict(model.named_parameters())[name] for name in names}
        assert n_bytes(sent) == 4 * sum(p.numel() for p in sent.values())


def test_every_rule_has_a_docstring_and_fits_a_screen():
    import inspect

    for name, f in inspect.getmembers(federate, inspect.isfunction):
        if f.__module__ == 'federate' and name not in ('like', 'is_generalist'):
            assert f.__doc__ and len(inspect.getsource(f).splitlines()) <= 50, name


def test_consensus_loss_pulls_a_sure_and_wrong_model_back():
    """Nearly all of p on five tokens, a quarter of ψ on the others: the loss is exact there, and so is its gradient p - ψ."""
    z = torch.zeros(1, 30, requires_grad=True)
    with torch.no_grad():
        z[0, :5] = 40
    psi = torch.arange(5)[None].int(), torch.full((1, 5), 0.15).half()
    loss, kept = consensus_loss(z, psi), psi[1].double().sum().item()
    rest = np.log(25) - np.log(5 * np.exp(40) + 25)
    top = 40 - np.log(5 * np.exp(40) + 25)
    assert loss.item() == pytest.approx(-kept * top - (1 - kept) * rest, rel=1e-5)
    loss.backward()
    assert z.grad[0, 5:].sum().item() == pytest.approx(-(1 - kept), rel=1e-4)


# ---- one round at the server: the rule that c.aggregate names ----------------------------------------------------------
def combined(aggregate, sent, ask=None, server=None, t=1, **switches):
    """(server, own, lines of the log) of `combine` for three users of ranks 4, 4, 4 with 1, 2 and 5 tokens."""
    c = dict(clip_norm=0, n_train=[1, 2, 5], lora_alpha=16.0, lora_rank=(4, 4, 4), trim=0.4, vocab_size=6)
    c |= dict(trust='weights', trust_temperature=1.0, consensus_start=1, aggregate=aggregate) | switches
    lines = []
    found = federate.combine(
        SimpleNamespace(**c), t, server or {}, sent, ask, lambda kind, values: lines.append((kind, values))
    )
    return *found, lines


def test_combine_is_the_rule_that_is_named():
    given = lora_updates([4, 4, 4])
    sent = dict(enumerate(given))
    experts = [{n: v for n, v in update.items() if 'generalists' in n} for update in given]
    attention = [{n: v for n, v in update.items() if 'generalists' not in n} for update in given]
    w, g, g8 = [1 / 8, 2 / 8, 5 / 8], [8.0] * 3, [16 / 8**0.5] * 3
    for aggregate, expected in (
        ('fedavg', fedavg(given)),
        ('ffa', fedavg(given)),
        ('fedsa', fedavg(given)),
        ('fdlora', fedavg(given)),
        ('median', median(given)),
        ('trimmed_mean', trimmed_mean(given, 0.4)),
        ('hetlora', hetlora(experts, g) | fedavg(attention)),
        ('flexlora', flexlora(experts, w, g) | fedavg(attention)),
        ('flora', flora(experts, w, g) | flora(attention, w, g8)),
    ):
        server, own, lines = combined(aggregate, sent)
        assert same(server, expected) and not own and not lines, aggregate


def test_nobody_sent_anything_and_nothing_changes():
    server = lora_updates([4])[0]
    for aggregate in ('fedavg', 'trust', 'flora', 'consensus'):
        assert combined(aggregate, {}, server=server) == (server, {}, [])


def test_trust_asks_the_users_and_gives_everyone_its_own_mean():
    given = lora_updates([4, 4, 4])
    sent = dict(enumerate(given))

    def ask(question, ids, **told):
        assert (question, ids) == ('judge', [0, 1, 2]) and told['updates'] is sent
        return {i: {'ppl': torch.tensor([1.0 if j == 2 else torch.inf for j in ids])} for i in ids}

    server, own, lines = combined('trust', sent, ask, trust='validation')  # all trust user 2 alone
    assert not server and all(same(own[i], given[2]) for i in sent)
    assert lines == [('trust', {'users': [0, 1, 2], 'matrix': [[0.0, 0.0, 1.0]] * 3})]
    _, own, _ = combined('trust', sent, trust='weights')
    W = trust_matrix(weight_scores(given), 1.0)
    assert all(same(own[i], mean) for i, mean in enumerate(trust_average(given, W)))


def test_consensus_asks_for_predictions_from_its_first_round_on():
    """Two users who predict the same get exactly that as pseudo-labels; who has not answered gets nothing."""
    same_top = {'ids': torch.tensor([[1, 2]], dtype=torch.int32), 'values': torch.tensor([[0.75, 0.25]]).half()}

    def ask(question, ids, **told):
        assert (question, ids, told) == ('predict', [0, 1, 2], {'logits': False})
        return {0: same_top, 2: same_top}

    sent = {0: {}, 1: {}, 2: {}}
    server, own, lines = combined('consensus', sent, ask)
    assert not server and own.keys() == {0, 2} and all(same(labels, same_top) for labels in own.values())
    assert [kind for kind, _ in lines] == ['trust'] and lines[0][1]['users'] == [0, 2]
    assert combined('consensus', sent, None, t=0, consensus_start=2) == ({}, {}, [])  # too early to ask
