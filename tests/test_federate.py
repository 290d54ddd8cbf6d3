"""Every aggregation rule against its formula, recomputed plainly in numpy, and the privacy boundary."""
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
    prediction_scores,
    prediction_trust,
    shared_names,
    tail_norm,
    top_predictions,
    trimmed_mean,
    truncate,
    trust_average,
    trust_matrix,
    validation_scores,
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
    return [{'h.0.mlp.generalists.0.c_fc.A': torch.randn(r, n_in, generator=g),
             'h.0.mlp.generalists.0.c_fc.B': torch.randn(n_out, r, generator=g),
             'h.0.attn.c_attn.lora.A': torch.randn(8, n_in, generator=g),
             'h.0.attn.c_attn.lora.B': torch.randn(n_out, 8, generator=g)} for r in ranks]


MLP, ATT = 'h.0.mlp.generalists.0.c_fc', 'h.0.attn.c_attn.lora'


def delta(update: dict, name=MLP) -> np.ndarray:
    """B A, without scaling, in float64."""
    return (update[name + '.B'].double() @ update[name + '.A'].double()).numpy()


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
    given, w = updates(3), [0.5, -2.0, 0.25]
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
    w[1:8:2] = w[0:8:2]                                      # pairs that cancel: a float64 sum in another order shows
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
    for trim in (0.0, 0.25, 0.4):
        cut = int(trim * n)
        assert np.allclose(trimmed_mean(given, trim)['a'], np.sort(stack, 0)[cut:n - cut].mean(0), atol=1e-6)
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


def test_other_names_or_shapes_are_refused():
    good, other = updates(2)
    for rule in RULES.values():
        for bad in ({'a': other['a']}, {**other, 'c': torch.zeros(1)}, {**other, 'b': torch.zeros(1)}):
            with pytest.raises(ValueError, match='update 1'):
                rule([good, bad])


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
    assert torch.allclose(W, trust_matrix(S + torch.randn(5, 1), 1.0))                       # a shift of a row changes nothing
    assert torch.allclose(trust_matrix(S, 1e9), torch.full((5, 5), 0.2).double())
    assert torch.equal(trust_matrix(S, 1e-3).argmax(1), S.argmax(1)) and trust_matrix(S, 1e-3).max(1).values.min() > 0.9


def test_perplexities_saturate_trust_and_losses_do_not():
    """60, 90, 80, 100: (1, 0, 0, 0) by perplexity; (.33, .22, .25, .20) if it were by loss."""
    ppl = torch.tensor([[60.0, 90.0, 80.0, 100.0]]).double()
    assert torch.allclose(trust_matrix(validation_scores(ppl), 1.0), torch.tensor([[1.0, 0, 0, 0]]).double(), atol=1e-8)
    by_loss = torch.tensor([[.33, .22, .25, .20]]).double()
    assert torch.allclose(trust_matrix(validation_scores(ppl.log()), 1.0), by_loss, atol=0.006)


def test_trust_by_weights_is_the_mean_cosine_of_rows():
    given = lora_updates([4, 4, 4])
    S = weight_scores(given)
    for i in range(3):
        for j in range(3):
            rows = [pair for name in given[0] for pair in zip(given[i][name], given[j][name])]
            cosines = [F.cosine_similarity(a, b, dim=0).item() for a, b in rows]
            assert S[i, j].item() == pytest.approx(np.mean(cosines), abs=1e-6)
    assert torch.allclose(S.diagonal(), torch.ones(3).double())


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
    for scores in (weight_scores(weights), validation_scores(torch.full((3, 3), 7.0)),
                   prediction_scores(logits, 30)):
        assert torch.allclose(trust_matrix(scores, 1.0), uniform)
    assert torch.allclose(prediction_trust(given, 30), uniform)


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
    assert np.allclose(W.sum(1), 1) and (W > 0).all() and (W.argmax(1) == np.arange(4)).all()         # s_ii >= s_ij


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
    assert min(others) > consensus_loss(target, psi)                                                   # least where p = ψ


def test_top_predictions_are_those_of_the_model_in_six_bytes_each():
    torch.manual_seed(0)
    gpt, windows = GPT(GPTConfig(50, 16, 1, 2, 8)), torch.randint(50, (11, 16))
    ids, values = top_predictions(gpt, windows, 7)
    logits = gpt(windows)[0].flatten(0, 1)
    assert torch.equal(ids.long(), logits.softmax(-1).topk(7).indices)
    assert torch.allclose(values.float(), logits.softmax(-1).topk(7).values, atol=1e-3)
    assert torch.allclose(top_predictions(gpt, windows, 7, logits=True)[1].float(), logits.topk(7).values, atol=1e-3)
    assert n_bytes({'ids': ids, 'values': values}) == 11 * 16 * 7 * 6
    assert top_predictions(gpt, windows, 100)[0].shape == (11 * 16, 50)                                # no more than there are


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


def test_hetlora_of_equal_norms_is_fedavg_and_of_one_user_the_identity():
    (one,) = lora_updates([4])
    turned = {name: t.flip(1) if name.endswith('.A') else t for name, t in one.items()}    # same norm
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
    for r, g, old, new in zip((2, 4, 6), GAMMA, given, flexlora(given, w, GAMMA)):
        assert {name: t.shape for name, t in new.items()} == {name: t.shape for name, t in old.items()}
        missed = np.linalg.norm(W - g * delta(new))
        assert missed == pytest.approx(np.sqrt((sigma[r:] ** 2).sum()), rel=1e-4) and missed > 0
        assert torch.allclose(new[MLP + '.A'] @ new[MLP + '.A'].T, torch.eye(r), atol=1e-5)


def test_flexlora_is_exact_where_the_rank_allows():
    for given, w, gamma in ((lora_updates([3]), [1.0], [2.0]), (lora_updates([3]) * 4, [0.25] * 4, [2.0] * 4),
                            (lora_updates([1, 2, 3])[:2] + lora_updates([6], 1), [0.1, 0.2, 0.7], [1.0, 2.0, 3.0])):
        W = sum(x * g * delta(u) for x, g, u in zip(w, gamma, given))
        r, new = np.linalg.matrix_rank(W, tol=1e-4), flexlora(given, w, gamma)
        wide = [(g, n) for g, n in zip(gamma, new) if len(n[MLP + '.A']) >= r]
        assert all(np.allclose(g * delta(n), W, atol=1e-4) for g, n in wide) and (wide or r > 6)


def test_flexlora_with_a_rank_above_the_matrix_leaves_zeros():
    given = lora_updates([16, 16])                                        # of a 12 x 10 matrix
    for new in flexlora(given, [0.5, 0.5], [4.0, 4.0]):
        assert not new[MLP + '.A'][10:].any() and not new[MLP + '.B'][:, 10:].any()
        assert np.allclose(4 * delta(new), 2 * delta(given[0]) + 2 * delta(given[1]), atol=1e-3)


@pytest.mark.parametrize('rule', ['hetlora', 'flora', 'flexlora'])
def test_permuting_users_changes_nothing_but_rounding(rule):
    given, w = lora_updates([2, 4, 6]), [0.2, 0.5, 0.3]
    order = [2, 0, 1]
    a, b = ({'hetlora': lambda u, w, g: [hetlora(u, g)], 'flora': lambda u, w, g: [flora(u, w, g)], 'flexlora': flexlora}[rule](
        [given[i] for i in o], [w[i] for i in o], [GAMMA[i] for i in o]) for o in ([0, 1, 2], order))
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
    model = add_lora(GPT(GPTConfig(50, 16, 2, 2, 16)), n, n_generalists, rank=4)
    role = roles(model)
    for share_attention in (True, False):
        names = shared_names(role, share_attention)
        assert not any('specialists' in name or 'router' in name for name in names)
        assert sum('generalists' in name for name in names) == 2 * n_generalists * 4
        assert sum('attn' in name for name in names) == (2 * 4 if share_attention else 0)
        for factor in 'AB':
            assert shared_names(role, share_attention, factor) == [name for name in names if name.endswith('.' + factor)]
        sent = {name: dict(model.named_parameters())[name] for name in names}
        assert n_bytes(sent) == 4 * sum(p.numel() for p in sent.values())


def test_every_rule_has_a_docstring_and_fits_a_screen():
    import inspect
    for name, f in inspect.getmembers(federate, inspect.isfunction):
        if f.__module__ == 'federate' and name not in ('like',):
            assert f.__doc__ and len(inspect.getsource(f).splitlines()) <= 40, name
