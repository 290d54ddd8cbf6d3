"""The mixture of LoRA experts against plain formulas (METHOD 1.1, 1.3, invariants 1, 2, 5, 9, 11)."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from lora_moe import GhostNoise, LoRA, LoRALinear, LoRAMoE, add_lora, initial, load_balance_loss, roles
from model import GPT, MLP, GPTConfig, store_in_bf16

CONFIG = GPTConfig(vocab_size=50, n_positions=16, n_layer=2, n_head=2, n_embd=16)


def user_model(n, k=2, n_generalists=1, routed=True, seed=0, zero_b=False, rank=4) -> GPT:
    """A user's model on a random base; B is random too unless zero_b, so that the experts differ."""
    torch.manual_seed(seed)
    model = add_lora(GPT(CONFIG), n, min(n, n_generalists), rank, top_k=k, routed=routed)
    for name, p in model.named_parameters():
        if name in roles(model):
            p.data.copy_(initial(name, p.shape, seed))
            if name.endswith('.B') and not zero_b:
                p.data.normal_(std=0.1)
            if 'router' in name:
                p.data.normal_(std=1.0)
    return model


def plain_mixture(moe: LoRAMoE, x: torch.Tensor) -> torch.Tensor:
    """Σ_j w_j MLP_j(x), each MLP_j a full MLP with its LoRA merged into both matrices, evaluated on every token."""
    experts = [*moe.generalists, *moe.specialists]
    if moe.router is None:
        w = torch.full((*x.shape[:2], len(experts)), 1 / len(experts))
    else:
        logits = x @ moe.router.weight.T
        kept = logits.topk(moe.top_k).indices
        mask = torch.zeros_like(logits).scatter(-1, kept, 1).bool()
        w = logits.masked_fill(~mask, -torch.inf).softmax(-1) if moe.top_k > 1 else logits.softmax(-1) * mask
    y = 0
    for j, expert in enumerate(experts):
        fc = moe.c_fc.weight + expert.c_fc.scaling * expert.c_fc.B @ expert.c_fc.A
        proj = moe.c_proj.weight + expert.c_proj.scaling * expert.c_proj.B @ expert.c_proj.A
        y = y + w[..., j, None] * F.linear(F.gelu(F.linear(x, fc, moe.c_fc.bias), approximate='tanh'), proj, moe.c_proj.bias)
    return y


@pytest.mark.parametrize('n', [1, 2, 4, 8])
@pytest.mark.parametrize('k', [1, 2])
@pytest.mark.parametrize('routed', [True, False])
def test_cheap_form_equals_a_loop_over_full_mlps(n, k, routed):
    """Output, and the gradient of every tensor and of the input, including experts that get no token."""
    moe = user_model(n, k, routed=routed).h[0].mlp
    for name in ('c_fc', 'c_proj'):
        getattr(moe, name).bias.data.normal_()
    if routed and n > 2:
        moe.router.weight.data[-1] = 0
        moe.router.weight.data[-1, 0] = -100  # with x[0] = 1 below: the last expert is never chosen
    x = torch.randn(2, 9, 16)
    x[..., 0] = 1
    grad_y = torch.randn(2, 9, 16)
    tensors = {name: p for name, p in moe.named_parameters() if p.requires_grad}
    results = []
    for function in (lambda x: moe(x)[0], lambda x: plain_mixture(moe, x)):
        x_in = x.clone().requires_grad_()
        y = function(x_in)
        grads = torch.autograd.grad(y, [*tensors.values(), x_in], grad_y, allow_unused=True)
        results.append([y, *(torch.zeros(1) if g is None else g for g in grads)])
    for name, a, b in zip(['output', *tensors, 'input'], *results):
        assert relative_error(a, b) <= 1e-5, name
    if routed and n > 2:
        assert not (moe(x)[1].chosen == n - 1).any()


@pytest.mark.parametrize('n, k', [(2, 2), (4, 2), (8, 1), (2, 1)])
@pytest.mark.parametrize('case', ['router alone', 'B alone', 'nothing'])
def test_gradients_of_what_is_trained_only(n, k, case):
    """The written-out derivative gives the tensors that ask for it the gradients they have when all ask, and no others any."""
    moe, x, grad_y = user_model(n, k).h[0].mlp, torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    tensors = {name: p for name, p in moe.named_parameters() if p.requires_grad}
    everything = dict(zip(tensors, torch.autograd.grad(moe(x)[0], tensors.values(), grad_y)))
    for name, p in tensors.items():
        p.requires_grad_({'router alone': 'router' in name, 'B alone': name.endswith('.B'), 'nothing': False}[case])
    x_in = x.clone().requires_grad_()
    moe(x_in)[0].backward(grad_y)
    assert x_in.grad.norm() > 0
    for name, p in tensors.items():
        assert torch.equal(p.grad, everything[name]) if p.requires_grad else p.grad is None, name


@pytest.mark.parametrize('unit', ['token', 'prefix', 'sequence'])
@pytest.mark.parametrize('k', [1, 2])
def test_a_routing_made_elsewhere(unit, k):
    """one_routing: a layer without router mixes by the first layer's weights, whose router gets this layer's gradient."""
    torch.manual_seed(1)
    model = user_model(4, k)
    first, second = (block.mlp for block in model.h)
    second.router = None
    first.routing_unit = unit
    x, grad_y = torch.randn(2, 9, 16), torch.randn(2, 9, 16)

    def plain(x):
        routing, flat, y = first.route(x), x.flatten(0, 1), 0
        for j, e in enumerate([*second.generalists, *second.specialists]):
            w = (routing.weights * (routing.chosen == j)).sum(1)  # (N,) 0 where not chosen
            h = second.c_fc(flat) + e.c_fc.scaling * flat @ e.c_fc.A.T @ e.c_fc.B.T
            a = F.gelu(h, approximate='tanh')
            y = y + w[:, None] * (second.c_proj(a) + e.c_proj.scaling * a @ e.c_proj.A.T @ e.c_proj.B.T)
        return y.view(x.shape)

    tensors = [first.router.weight, *(p for p in second.parameters() if p.requires_grad)]
    results = [[y, *torch.autograd.grad(y, tensors, grad_y)] for y in (second(x, first.route(x))[0], plain(x))]
    for a, b in zip(*results):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize('n', [1, 2, 4, 8])
@pytest.mark.parametrize('routed', [True, False])
def test_untrained_user_equals_the_base(n, routed):
    """Invariant 1: B = 0 and weights that sum to one leave GPT-2's logits as they are."""
    model = user_model(n, routed=routed, zero_b=True)
    torch.manual_seed(0)
    base = GPT(CONFIG)  # user_model's own base, drawn again
    idx = torch.randint(50, (3, 16))
    with torch.no_grad():
        assert (model(idx)[0] - base(idx)[0]).abs().max() < 1e-5


@pytest.mark.parametrize('n, k', [(2, 2), (4, 2), (8, 2), (4, 1)])
def test_routing_weights(n, k):
    """Invariant 2: K experts, weights that sum to one (a lone top-1 weight is its softmax probability, METHOD 1.1)."""
    moe = user_model(n, k).h[0].mlp
    x = torch.randn(40, 16)
    routing = moe.route(x[None])
    assert routing.probs.shape == (40, n) and routing.chosen.shape == routing.weights.shape == (40, k)
    assert all(len(set(row)) == k for row in routing.chosen.tolist())
    assert torch.allclose(routing.probs, (x @ moe.router.weight.T).softmax(-1))
    expected = torch.ones(40) if k > 1 else routing.probs.max(-1).values
    assert torch.allclose(routing.weights.sum(-1), expected)


def test_permuting_experts_with_their_router_rows_changes_nothing():
    moe = user_model(4, n_generalists=0).h[0].mlp
    x = torch.randn(2, 9, 16)
    before = moe(x)[0]
    order = [2, 0, 3, 1]
    moe.specialists = torch.nn.ModuleList([moe.specialists[j] for j in order])
    moe.router.weight.data = moe.router.weight.data[order]
    assert relative_error(moe(x)[0], before) < 1e-6


def test_only_chosen_experts_count():
    """Whatever is in an expert that no token chooses, output and gradients are the same to the bit."""
    results = []
    for value in (0.0, 1e3):
        moe = user_model(4).h[0].mlp
        moe.router.weight.data[3] = 0
        moe.router.weight.data[3, 0] = -100
        for p in moe.specialists[2].parameters():
            p.data.fill_(value)
        x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        x.data[..., 0] = 1
        y = moe(x)[0]
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in moe.generalists.parameters())])
        assert all(not p.grad.any() for p in moe.specialists[2].parameters())
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_an_expert_without_tokens_gets_zero_gradients_and_still_decays():
    """Invariant 9: its gradient is zero, not None, so AdamW's weight decay moves it, as in the authors' code."""
    model = user_model(4)
    for block in model.h:
        block.mlp.router.weight.data[3] = -100 * block.mlp.router.weight.data[0].sign()
        block.mlp.router.weight.data[:3] *= 0
    idx = torch.randint(50, (2, 16))
    loss, routing = model.loss(idx, idx)
    idle = {j for j in range(4) if not (routing[0].chosen == j).any()}
    assert idle, 'the router above leaves at least one expert of the first layer without tokens'
    loss.backward()
    moe = model.h[0].mlp
    expert = [*moe.generalists, *moe.specialists][idle.pop()]
    optimizer = torch.optim.AdamW(expert.parameters(), lr=0.1, weight_decay=0.01)
    before = expert.c_fc.B.detach().clone()
    assert all(p.grad is not None and (p.grad == 0).all() for p in expert.parameters())
    optimizer.step()
    assert torch.allclose(expert.c_fc.B, before * (1 - 0.1 * 0.01))


@pytest.mark.parametrize('n', [1, 2, 4])
def test_causality_with_routing(n):
    """A token's logits, routing included, do not depend on later tokens."""
    model = user_model(n)
    idx = torch.randint(50, (1, 16))
    other = idx.clone()
    other[0, 9:] = (other[0, 9:] + 1) % 50
    with torch.no_grad():
        assert relative_error(model(idx)[0][0, :9], model(other)[0][0, :9]) < 1e-6


def test_roles_and_frozen_tensors():
    """Every trainable tensor has one role, which its name tells; all others are the base's, the same objects, frozen."""
    torch.manual_seed(0)
    base = GPT(CONFIG)
    a, b = add_lora(base, 3, 1, rank=4), add_lora(base, 2, 2, rank=4)
    for model, n_specialist in ((a, 2), (b, 0)):
        role = roles(model)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trainable == set(role)
        said = {'lora': 'attention', 'generalists': 'generalist', 'specialists': 'specialist', 'router': 'router'}
        for name, r in role.items():
            assert [said[part] for part in name.split('.') if part in said] == [r]
        assert sum(r == 'specialist' for r in role.values()) == 2 * n_specialist * 4  # layers x experts x (2 LoRA of A, B)
    frozen = {id(p) for p in base.parameters()}
    for model in (a, b):
        assert {id(p) for name, p in model.named_parameters() if name not in roles(model)} == frozen
    assert add_lora(base, 1, 1, rank=4).h[0].mlp.router is None  # invariant 10: one expert, no router


def test_a_user_adds_only_its_own_tensors():
    """GPT-2 124M, rank 8: the trainable sizes of METHOD 1.1 (its n=1 counts an idle router of 9,216, which we do not make),
    and with AdamW's two moments 12 bytes each: 23.2 MB for a user of two experts."""
    with torch.device('meta'):
        base = GPT(GPTConfig())
        for n, expected in ((1, 1_188_864 - 9_216), (2, 1_935_360), (4, 3_428_352), (8, 6_414_336)):
            model = add_lora(base, n, 1, rank=8)
            role = roles(model)
            assert sum(p.numel() for name, p in model.named_parameters() if name in role) == expected
            shared = sum(p.numel() for name, p in model.named_parameters() if role.get(name) in ('generalist', 'attention'))
            assert shared == 1_179_648
    assert 12 * 1_935_360 == 23_224_320


def test_attention_lora_equals_merged_weights():
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 9)
    wrapped = LoRALinear(linear, rank=2, alpha=16)
    wrapped.lora.A.data.normal_(), wrapped.lora.B.data.normal_()
    x = torch.randn(2, 5, 6)
    merged = F.linear(x, linear.weight + 16 / math.sqrt(2) * wrapped.lora.B @ wrapped.lora.A, linear.bias)
    assert torch.allclose(wrapped(x), merged, atol=1e-5)


def test_rank_stabilised_scaling():
    """Invariant 11: with B of unit variance, Var(γ B A x) is flat in r for γ = α/√r; with α/r it would fall as 1/r."""
    torch.manual_seed(0)
    x = torch.randn(2000, 256)
    variance = {}
    for r in (4, 16, 64):
        lora = LoRA(256, 128, r, alpha=1)
        lora.A.data.copy_(initial('x.A', (r, 256), 0)), lora.B.data.normal_()
        variance[r] = lora.add_to(torch.zeros(2000, 128), x).var().item()
    assert max(variance.values()) / min(variance.values()) < 1.3
    assert variance[4] / 4 / (variance[64] / 64) > 10  # the same sums under α/r


def test_initial_values():
    A = initial('h.0.attn.c_attn.lora.A', (8, 768), 42, 'user', 0)
    assert A.abs().max() <= 1 / math.sqrt(768) and A.abs().max() > 0.99 / math.sqrt(768)
    assert (initial('h.0.attn.c_attn.lora.B', (9, 8), 42) == 0).all()
    assert abs(initial('h.0.mlp.router.weight', (4, 768), 42).std() - 0.02) < 0.002
    assert torch.equal(A, initial('h.0.attn.c_attn.lora.A', (8, 768), 42, 'user', 0))
    assert not torch.equal(A, initial('h.0.attn.c_attn.lora.A', (8, 768), 42, 'user', 1))


# ---- load balancing (METHOD 1.3, invariant 5) ----------------------------------------------------------------------
def routing_of(logits: torch.Tensor, k: int = 2) -> tuple:
    return logits.softmax(-1), logits.topk(k).indices, None


@pytest.mark.parametrize('kind, constant', [('generalist', 0.5), ('uniform', 1.0)])
def test_two_of_two_is_constant_with_zero_gradient(kind, constant):
    """n = k = 2: no router can change it, so all kinds of load balancing are the same algorithm; LB_u = 2 LB_g."""
    logits = torch.randn(100, 2, requires_grad=True)
    loss = load_balance_loss([routing_of(logits), routing_of(2 * logits)], kind)
    assert abs(loss.item() - constant) < 1e-6
    loss.backward()
    assert logits.grad.abs().max() < 1e-7


@pytest.mark.parametrize('n', [3, 4, 8])
def test_load_balance_by_hand(n):
    """Both formulas written out, and the authors' form at importance 1/2: ((n-1)² + 1) LB_g."""
    logits = torch.randn(100, n)
    p, chosen, _ = routing_of(logits)
    f = [(chosen == j).any(-1).float().mean().item() for j in range(n)]
    P = p.mean(0).tolist()
    generalist = load_balance_loss([(p, chosen, None)], 'generalist').item()
    uniform = load_balance_loss([(p, chosen, None)], 'uniform').item()
    c = (n - 1) ** 2 + 1
    assert math.isclose(generalist, f[0] * P[0] / c + (n - 1) / c * sum(f[j] * P[j] for j in range(1, n)), rel_tol=1e-5)
    assert math.isclose(uniform, n * sum(f[j] / 2 * P[j] for j in range(n)), rel_tol=1e-5)
    q = [1 / (0.5 * n)] + [(n - 1) / (0.5 * n)] * (n - 1)
    assert math.isclose(n * sum(f[j] / 2 * P[j] * q[j] for j in range(n)), c * generalist, rel_tol=1e-5)


def test_uniform_load_balance_at_its_corners():
    """1 at uniform f and P; n/2 when P is one-hot on an expert that every token chooses."""
    n = 4
    chosen = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]])
    assert load_balance_loss([(torch.full((4, n), 1 / n), chosen, None)], 'uniform').item() == pytest.approx(1)
    one_hot = torch.zeros(4, n)
    one_hot[:, 1] = 1
    assert load_balance_loss([(one_hot, torch.tensor([[1, 0]] * 4), None)], 'uniform').item() == pytest.approx(n / 2)


def test_load_balance_without_router_or_switched_off():
    assert load_balance_loss([None, None], 'uniform') == 0
    assert load_balance_loss([routing_of(torch.randn(5, 4))], 'none') == 0


def test_the_mixture_runs_under_bf16_autocast():
    """bf16 stays close to fp32 (cosine of all gradients), with the router in float32 (METHOD 1.1)."""
    model = user_model(4)
    idx = torch.randint(50, (4, 16))
    flat = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            loss, routing = model.loss(idx, idx)
        assert routing[0].probs.dtype == torch.float32
        loss.backward()
        flat.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert F.cosine_similarity(*flat, dim=0) > 0.98


@pytest.mark.parametrize('n, k', [(1, 2), (2, 2), (4, 1), (8, 2)])
def test_weights_kept_in_bf16_give_what_autocast_would(n, k):
    """Against autocast over float32 weights the products are the same to the bit; only the embedding is rounded, which here
    is not: its values are made to be bfloat16's. The user's own tensors, LayerNorms and positions stay float32."""
    torch.manual_seed(0)
    base = GPT(CONFIG)
    base.wte.weight.data = base.wte.weight.data.bfloat16().float()
    idx = torch.randint(50, (4, 16))
    results = []
    for stored in (False, True):
        if stored:
            store_in_bf16(base)
        model = add_lora(base, n, 1, rank=4, top_k=k)
        for name, p in model.named_parameters():
            if name in roles(model):
                p.data.copy_(initial(name, p.shape, 0) + 0.01)
            if name in roles(model) or 'ln_' in name or name == 'wpe.weight':
                assert p.dtype == torch.float32
            else:
                assert p.dtype == (torch.bfloat16 if stored else torch.float32)
        with torch.autocast('cpu', torch.bfloat16):
            loss, routing = model.loss(idx, idx)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_impossible_mixtures_are_refused():
    base = GPT(CONFIG)
    for n, g in ((0, 0), (1, 2), (2, -1)):
        with pytest.raises(ValueError, match='at least one expert'):
            add_lora(base, n, g, rank=4)


def test_the_mlp_of_the_base_is_untouched():
    base = GPT(CONFIG)
    add_lora(base, 2, 1, rank=4)
    assert isinstance(base.h[0].mlp, MLP) and not any(p.requires_grad for p in base.parameters())


# ---- what one routing decision covers (METHOD 3.1) -------------------------------------------------------------------
def unit_model(unit, one_routing=False, n=4) -> GPT:
    torch.manual_seed(1)
    model = add_lora(GPT(CONFIG), n, 1, 4, routing_unit=unit, one_routing=one_routing)
    for name, p in model.named_parameters():
        if name in roles(model):
            p.data.normal_(std=1.0 if 'router' in name else 0.1)
    return model


@pytest.mark.parametrize('unit', ['token', 'prefix', 'sequence'])
def test_routing_units_against_means_of_the_routers_inputs(unit):
    moe = unit_model(unit).h[0].mlp
    x = torch.randn(3, 10, 16)
    seen = {
        'token': x,
        'prefix': torch.stack([x[:, : t + 1].mean(1) for t in range(10)], 1),
        'sequence': x.mean(1, keepdim=True).expand_as(x),
    }[unit]
    probs = (seen @ moe.router.weight.T).softmax(-1).flatten(0, 1)
    routing = moe.route(x)
    assert torch.allclose(routing.probs, probs, atol=1e-5)
    assert torch.equal(routing.chosen, probs.topk(2).indices)


def test_prefix_routing_does_not_look_ahead_and_sequence_routing_does():
    """Changing the tokens after position t changes no logits up to t with 'token' and 'prefix'; with 'sequence' it does."""
    torch.manual_seed(0)
    a = torch.randint(50, (2, 12))
    b = torch.cat((a[:, :7], torch.randint(50, (2, 5))), 1)
    with torch.no_grad():
        moved = {
            unit: (unit_model(unit)(a)[0][:, :7] - unit_model(unit)(b)[0][:, :7]).abs().max()
            for unit in ('token', 'prefix', 'sequence')
        }
    assert moved['token'] < 1e-5 and moved['prefix'] < 1e-5 and moved['sequence'] > 1e-3


def test_all_tokens_of_a_sequence_share_their_experts():
    moe = unit_model('sequence').h[1].mlp
    chosen = moe.route(torch.randn(5, 10, 16)).chosen.view(5, 10, 2)
    assert (chosen == chosen[:, :1]).all() and len({tuple(row) for row in chosen[:, 0].tolist()}) > 1


def test_one_routing_decision_for_all_layers():
    """Only the first layer has a router; every other layer uses its very decision, and gradients of all layers reach it."""
    model = unit_model('token', one_routing=True)
    assert [name for name, role in roles(model).items() if role == 'router'] == ['h.0.mlp.router.weight']
    loss, routing = model.loss(torch.randint(50, (2, 12)), torch.randint(50, (2, 12)))
    assert routing[0] is routing[1]
    loss.backward()
    assert model.h[0].mlp.router.weight.grad.norm() > 0
    assert unit_model('token').loss(torch.randint(50, (2, 12)), torch.randint(50, (2, 12)))[1][1] is not routing[0]


# ---- ghost noise (METHOD 3.3) ----------------------------------------------------------------------------------------
def test_ghost_noise_is_the_identity_outside_training_and_for_a_lone_sequence():
    x = torch.randn(6, 10, 16)
    assert torch.equal(GhostNoise(8).eval()(x), x) and torch.equal(GhostNoise(8).train()(x[:1]), x[:1])
    assert not torch.equal(GhostNoise(8).train()(x), x)


def test_ghost_noise_by_hand(monkeypatch):
    """x' = (x - (μ~ - μ)) / sqrt((σ~² + ε) / (σ² + ε)), statistics of the drawn and of all other sequences."""
    x, drawn = torch.randn(3, 10, 4), torch.tensor([[0, 1], [1, 1], [0, 0]])  # of the two others of each sequence
    others = [[1, 2], [0, 2], [0, 1]]
    monkeypatch.setattr(torch, 'randint', lambda *a, **k: drawn.clone())
    y = GhostNoise(2).train()(x)
    for b in range(3):
        ghost = torch.cat([x[others[b][i]] for i in drawn[b]])  # (2 T, C)
        pool = torch.cat([x[i] for i in others[b]])
        shift = ghost.mean(0) - pool.mean(0)
        scale = ((ghost.var(0, correction=0) + 1e-3) / (pool.var(0, correction=0) + 1e-3)).sqrt()
        assert torch.allclose(y[b], (x[b] - shift) / scale, atol=1e-5)


def test_ghost_noise_has_the_stated_mean_and_variance():
    """Over many draws of n = 4: E[shift] = 0 and Var[shift_c] = Var(mean of channel c over the other sequences) / 4."""
    torch.manual_seed(0)
    x = torch.randn(8, 20, 3) + torch.randn(8, 1, 3)
    noise = GhostNoise(4).train()
    flat = x - x.mean(1, keepdim=True)  # with equal variances only the shift is left to see
    x = flat / flat.std(1, keepdim=True, correction=0) + torch.randn(8, 1, 3)
    means = x.mean(1)  # (8, 3)
    others = torch.stack([torch.cat((means[:b], means[b + 1 :])) for b in range(8)])  # (8, 7, 3)
    shifts, real = [], torch.Tensor.sqrt
    for _ in range(4000):
        state = torch.get_rng_state()
        i = torch.randint(7, (8, 4))
        torch.set_rng_state(state)
        i += i >= torch.arange(8)[:, None]
        drawn = means[i].mean(1)
        y = noise(x)
        var = 1 + means[i].square().mean(1) - drawn.square()  # E[x²] - E[x]² of the drawn sequences together
        pool = 1 + others.square().mean(1) - others.mean(1).square()
        shifts.append(x[:, 0] - y[:, 0] * real((var + 1e-3) / (pool + 1e-3)))
    shifts = torch.stack(shifts)
    assert (shifts.mean(0).abs() < 4 * shifts.std(0) / 4000**0.5).all()
    assert torch.allclose(shifts.var(0), others.var(1, correction=0) / 4, rtol=0.15)


def test_ghost_noise_vanishes_with_many_draws_and_sends_no_gradient_through_its_statistics():
    x = torch.randn(6, 10, 4, requires_grad=True)
    assert torch.allclose(GhostNoise(200_000).train()(x), x, atol=0.02)
    y = GhostNoise(2).train()(x)
    (grad,) = torch.autograd.grad(y[0].sum(), x)
    assert grad[0].abs().min() > 0 and not grad[1:].any()  # sequence 0 alone, though the others made its noise


def test_ghost_noise_does_not_let_a_sequence_see_itself():
    """What is drawn for sequence b does not depend on b's own values: no token sees its own future through the noise."""
    x = torch.randn(4, 10, 4)
    z = x.clone()
    z[2, 5:] += 3.0
    torch.manual_seed(3)
    a = GhostNoise(4).train()(x)
    torch.manual_seed(3)
    b = GhostNoise(4).train()(z)
    assert torch.allclose(a[2, :5], b[2, :5], atol=1e-5) and not torch.allclose(a[1], b[1], atol=1e-2)
