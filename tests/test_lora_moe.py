"""The mixture of LoRA experts against plain formulas (METHOD 1.1, 1.3, invariants 1, 2, 5, 9, 11)."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

import llama
from llama import Llama, LlamaConfig
from lora_moe import GhostNoise, LoRA, LoRALinear, LoRAMoE, add_lora, initial, load_balance_loss, roles, scaling
from model import GPT, MLP, GPTConfig, store_in_bf16
from tests.plain import PlainGPT, PlainMixture, compare, randomised

CONFIG = {
    'gpt2': GPTConfig(vocab_size=50, n_positions=16, n_layer=2, n_head=2, n_embd=16),
    'llama': LlamaConfig(50, 16, 24, 2, 4, 2, 4, max_position_embeddings=16),  # 4 heads of 4, 2 of keys and values
}


@pytest.fixture(params=CONFIG)
def family(request, monkeypatch):
    """A test that asks for it runs on a base of either family; all others on GPT-2."""
    monkeypatch.setitem(CONFIG, 'base', CONFIG[request.param])
    return request.param


def base_model(config: GPTConfig | LlamaConfig | None = None) -> GPT:
    torch.manual_seed(0)
    config = config or CONFIG.get('base', CONFIG['gpt2'])
    return Llama(config) if isinstance(config, LlamaConfig) else GPT(config)


def user_model(n: int, k: int = 2, n_generalists: int = 1, base: GPT | None = None, **shape) -> GPT:
    """A user's model on a random base, its own tensors all random, so that the experts differ."""
    user = add_lora(base or base_model(), n_experts=n, n_generalists=min(n, n_generalists), rank=4, top_k=k, **shape)
    return randomised(user, std=0.1, router_std=1.0)


def never_chosen(moe: LoRAMoE) -> None:
    """Leaves the last expert without tokens wherever x[..., 0] = 1."""
    moe.router.weight.data[-1] = 0
    moe.router.weight.data[-1, 0] = -100


# ---- against the plain mixture -----------------------------------------------------------------------------------------
def gradients(mixture, x: torch.Tensor, grad_y: torch.Tensor, routing=None) -> dict:
    """The output 'y' of a mixture, {name: gradient} of all that it trains, and the input's as 'x'. For y, its graph is kept."""
    x = x.clone().requires_grad_()
    y = mixture(x, routing)[0]
    trained = {name.replace('.lora', ''): p for name, p in mixture.named_parameters() if p.requires_grad} | {'x': x}
    grads = torch.autograd.grad(y, [*trained.values()], grad_y, retain_graph=True, materialize_grads=True)
    return {'y': y, **dict(zip(trained, grads))}


def assert_close(ours: dict, plain: dict) -> None:
    assert ours.keys() == plain.keys()
    for name in ours:
        assert relative_error(ours[name], plain[name]) <= 1e-5, name


@pytest.mark.parametrize('n', [1, 2, 4, 8])
@pytest.mark.parametrize('k', [1, 2])
@pytest.mark.parametrize('routed', [True, False])
def test_cheap_form_equals_a_loop_over_full_mlps(n, k, routed, family):
    """Output, and the gradient of every tensor and of the input, including experts that get no token."""
    moe = user_model(n, k, routed=routed).h[0].mlp
    for name, bias in moe.named_parameters():
        if name.endswith('bias'):
            bias.data.normal_()
    x, grad_y = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    x[..., 0] = 1
    if routed and n > 2:
        never_chosen(moe)
        assert not (moe(x)[1].chosen == n - 1).any()
    assert_close(gradients(moe, x, grad_y), gradients(PlainMixture(moe), x, grad_y))


@pytest.mark.parametrize('unit', ['token', 'prefix', 'sequence'])
@pytest.mark.parametrize('k', [1, 2])
def test_a_routing_made_elsewhere(unit, k, family):
    """one_routing: a layer without router mixes by the first layer's weights, whose router gets this layer's gradient."""
    first, second = (block.mlp for block in user_model(4, k, routing_unit=unit, one_routing=True).h)
    x, grad_y, results = torch.randn(2, 9, 16), torch.randn(2, 9, 16), []
    for mixture in (second, PlainMixture(second)):
        found = gradients(mixture, x, grad_y, first.route(x))
        (found['router'],) = torch.autograd.grad(found['y'], first.router.weight, grad_y)
        results.append(found)
    assert_close(*results)
    assert results[0]['router'].norm() > 0


@pytest.mark.parametrize('n, k', [(1, 2), (2, 2), (2, 1), (4, 2), (4, 1), (8, 2), (8, 1)])
def test_a_whole_model_equals_the_plain_one(n, k, family):
    """Loss and all gradients: to rounding in float32; with weights and products in bfloat16 their direction (cosine)."""
    idx = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(1))
    plain, data = PlainGPT(user_model(n, k)), (idx[:, :-1], idx[:, 1:])
    assert compare(user_model(n, k), plain, data)['worst'] < 1e-5
    low = base_model()
    store_in_bf16(low)
    assert compare(user_model(n, k, base=low), plain, data, ('bfloat16', 'float32'))['together'] > 0.98


@pytest.mark.parametrize('n', [2, 4])
def test_compiled_gradients_are_the_same(n, family):
    """A tracer may drop a gradient in silence: that of torch 2.11 did, for an output that was made in place. The backend
    'aot_eager' traces as all do, and needs no compiler."""
    model, idx = user_model(n).train(), torch.randint(50, (2, 9))
    found = []
    for loss in (model.loss, torch.compile(model.loss, backend='aot_eager')):
        model.zero_grad()
        loss(idx[:, :-1], idx[:, 1:])[0].backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_close(*found)


@pytest.mark.slow
@pytest.mark.parametrize('size', [GPTConfig(), LlamaConfig()], ids=['gpt2', 'smollm2'])
def test_a_model_of_real_size_equals_the_plain_one(size):
    """At the sizes that tools/bench.py times: 3e-6 in float32 for a block (0.3 to 1.6e-5 seen for SmolLM2's 30, by processor);
    in bfloat16 every single gradient has a cosine of 0.995 (of GPT-2 0.9994 on a CPU without AMX, 0.9986 with it)."""
    base = base_model(size)
    low = copy.deepcopy(base)
    store_in_bf16(low)
    idx = torch.randint(size.vocab_size, (1, 33), generator=torch.Generator().manual_seed(1))
    ours, rounded = (
        randomised(add_lora(gpt, n_experts=2, n_generalists=1, rank=8), std=0.02, router_std=0.02) for gpt in (base, low)
    )
    plain, data = PlainGPT(ours), (idx[:, :-1], idx[:, 1:])
    assert compare(ours, plain, data)['worst'] < 3e-6 * len(base.h)
    assert compare(rounded, plain, data, ('bfloat16', 'float32'))['cosine'] > 0.995


@pytest.mark.parametrize('k', [1, 2])
def test_an_expert_that_no_token_chose_may_hold_anything(k, family):
    """0 * NaN is NaN: the masks alone would let it through to every token, and into every gradient."""
    moe = user_model(4, k).h[0].mlp
    never_chosen(moe)
    x, grad_y = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    x[..., 0] = 1
    sound = gradients(moe, x, grad_y)
    for p in moe.specialists[-1].parameters():
        p.data.fill_(torch.nan)
    assert all(torch.equal(new, sound[name]) for name, new in gradients(moe, x, grad_y).items())


def test_a_wrong_gradient_or_nan_does_not_pass_for_plain():
    idx, ours = torch.randint(50, (2, 16)), user_model(2)
    plain, B = PlainGPT(ours), ours.h[0].mlp.specialists[0].c_fc.B.data
    B[0, 0] += 1.0
    assert compare(ours, plain, (idx, idx))['worst'] > 1e-3
    B[0, 0] = torch.nan
    assert all(math.isnan(value) for value in compare(ours, plain, (idx, idx)).values())


@pytest.mark.parametrize('n, k', [(2, 2), (4, 2), (8, 1), (2, 1)])
@pytest.mark.parametrize('case', ['router alone', 'B alone', 'nothing'])
def test_gradients_of_what_is_trained_only(n, k, case, family):
    """The written-out derivative gives the tensors that ask for it the gradients they have when all ask, and no others any."""
    moe, x, grad_y = user_model(n, k).h[0].mlp, torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    everything = gradients(moe, x, grad_y)
    tensors = {name: p for name, p in moe.named_parameters() if p.requires_grad}
    for name, p in tensors.items():
        p.requires_grad_({'router alone': 'router' in name, 'B alone': name.endswith('.B'), 'nothing': False}[case])
    x.requires_grad_()
    moe(x)[0].backward(grad_y)
    assert x.grad.norm() > 0
    for name, p in tensors.items():
        assert torch.equal(p.grad, everything[name]) if p.requires_grad else p.grad is None, name


# ---- the mixture ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('n', [1, 2, 4, 8])
@pytest.mark.parametrize('routed', [True, False])
def test_untrained_user_equals_the_base(n, routed, family):
    """Invariant 1: B = 0 and weights that sum to one leave the base's logits as they are."""
    model, base = user_model(n, routed=routed), base_model()
    for name, p in model.named_parameters():
        if name.endswith('.B'):
            p.data.zero_()
    idx = torch.randint(50, (3, 16))
    with torch.no_grad():
        assert (model(idx)[0] - base(idx)[0]).abs().max() < 1e-5


@pytest.mark.parametrize('n, k', [(2, 2), (4, 2), (8, 2), (4, 1)])
def test_routing_weights(n, k):
    """Invariant 2: K experts, weights that sum to one (a lone top-1 weight is its softmax probability, METHOD 1.1)."""
    moe, x = user_model(n, k).h[0].mlp, torch.randn(40, 16)
    routing = moe.route(x[None])
    assert routing.probs.shape == (40, n) and routing.chosen.shape == routing.weights.shape == (40, k)
    assert all(len(set(row)) == k for row in routing.chosen.tolist())
    assert torch.allclose(routing.probs, (x @ moe.router.weight.T).softmax(-1))
    expected = torch.ones(40) if k > 1 else routing.probs.max(-1).values
    assert torch.allclose(routing.weights.sum(-1), expected)


def test_permuting_experts_with_their_router_rows_changes_nothing(family):
    moe, x = user_model(4, n_generalists=0).h[0].mlp, torch.randn(2, 9, 16)
    before, order = moe(x)[0], [2, 0, 3, 1]
    moe.specialists = torch.nn.ModuleList([moe.specialists[j] for j in order])
    moe.router.weight.data = moe.router.weight.data[order]
    assert relative_error(moe(x)[0], before) < 1e-6


def test_only_chosen_experts_count(family):
    """Whatever is in an expert that no token chooses, output and gradients are the same to the bit. Its own gradient is zero,
    not None (invariant 9), so AdamW's weight decay moves it, as in the authors' code."""
    results = []
    for value in (0.0, 1e3):
        moe = user_model(4).h[0].mlp
        never_chosen(moe)
        idle = moe.specialists[2]
        for p in idle.parameters():
            p.data.fill_(value)
        x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
        x[..., 0] = 1
        x.requires_grad_()
        y = moe(x)[0]
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in moe.generalists.parameters())])
        assert all(p.grad is not None and not p.grad.any() for p in idle.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*results))
    torch.optim.AdamW(idle.parameters(), lr=0.1, weight_decay=0.01).step()
    assert all(torch.allclose(p, torch.full_like(p, value * (1 - 0.1 * 0.01))) for p in idle.parameters())


@pytest.mark.parametrize('n, unit', [(1, 'token'), (2, 'token'), (4, 'token'), (4, 'prefix'), (4, 'sequence')])
def test_causality_with_routing(n, unit, family):
    """A token's logits, routing included, do not depend on later tokens; unless the whole window decides."""
    model, idx = user_model(n, routing_unit=unit), torch.randint(50, (2, 16))
    other = idx.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 50
    with torch.no_grad():
        moved = relative_error(model(idx)[0][:, :9], model(other)[0][:, :9])
    assert moved > 1e-3 if unit == 'sequence' else moved < 1e-6


def test_roles_and_frozen_tensors(family):
    """Every trainable tensor has one role, which its name tells; all others are the base's, the same objects, frozen."""
    base = base_model()
    frozen = {id(p) for p in base.parameters()}
    said = {'lora': 'attention', 'generalists': 'generalist', 'specialists': 'specialist', 'router': 'router'}
    for n, n_generalists in ((3, 1), (2, 2), (1, 1)):
        model = add_lora(base, n_experts=n, n_generalists=n_generalists, rank=4)
        role = roles(model)
        assert set(role) == {name for name, p in model.named_parameters() if p.requires_grad}
        assert {id(p) for name, p in model.named_parameters() if name not in role} == frozen
        for name, r in role.items():
            assert [said[part] for part in name.split('.') if part in said] == [r]
        counts = [sum(r == kind for r in role.values()) for kind in said.values()]  # 2 layers, A and B of the LoRAs; routers
        attn, mlp = (4, 4) if family == 'gpt2' else (8, 6)  # c_attn c_proj; c_fc c_proj, or q k v o; gate up down
        assert counts == [2 * attn, 2 * mlp * n_generalists, 2 * mlp * (n - n_generalists), 2 * (n > 1)]  # invariant 10
    assert isinstance(base.h[0].mlp, MLP | llama.MLP) and not any(p.requires_grad for p in base.parameters())


def test_a_user_adds_only_its_own_tensors():
    """GPT-2 124M, rank 8: the trainable sizes of METHOD 1.1 (its n=1 counts an idle router of 9,216, which we do not make),
    and with AdamW's two moments 12 bytes each: 23.2 MB for a user of two experts."""
    with torch.device('meta'):
        base = GPT(GPTConfig())
        for n, expected in ((1, 1_188_864 - 9_216), (2, 1_935_360), (4, 3_428_352), (8, 6_414_336)):
            model = add_lora(base, n_experts=n, n_generalists=1, rank=8)
            role = roles(model)
            assert sum(p.numel() for name, p in model.named_parameters() if name in role) == expected
            shared = sum(p.numel() for name, p in model.named_parameters() if role.get(name) in ('generalist', 'attention'))
            assert shared == 1_179_648
    assert 12 * 1_935_360 == 23_224_320


def test_attention_lora_equals_merged_weights():
    linear = torch.nn.Linear(6, 9)
    wrapped = LoRALinear(linear, rank=2, alpha=16)
    wrapped.lora.A.data.normal_(), wrapped.lora.B.data.normal_()
    x = torch.randn(2, 5, 6)
    merged = F.linear(x, linear.weight + 16 / math.sqrt(2) * wrapped.lora.B @ wrapped.lora.A, linear.bias)
    assert torch.allclose(wrapped(x), merged, atol=1e-5)


def test_rank_stabilised_scaling():
    """Invariant 11: with B of unit variance, Var(γ B A x) is flat in r for γ = α/√r; with α/r it would fall as 1/r."""
    assert scaling(16, 4) == 8
    torch.manual_seed(0)
    x, variance = torch.randn(2000, 256), {}
    for r in (4, 16, 64):
        lora = LoRA(256, 128, r, alpha=1)
        lora.A.data.copy_(initial('x.A', (r, 256), 0)), lora.B.data.normal_()
        variance[r] = lora.add_to(torch.zeros(2000, 128), x).var().item()
    assert max(variance.values()) / min(variance.values()) < 1.3
    assert variance[4] / 4 / (variance[64] / 64) > 10  # the same sums under α/r


def test_initial_values():
    name = 'h.0.attn.c_attn.lora.A'
    A = initial(name, (8, 768), 42, 'user', 0)
    assert 0.99 / math.sqrt(768) < A.abs().max() <= 1 / math.sqrt(768)
    assert (initial('h.0.attn.c_attn.lora.B', (9, 8), 42) == 0).all()
    assert abs(initial('h.0.mlp.router.weight', (4, 768), 42).std() - 0.02) < 0.002
    assert torch.equal(A, initial(name, (8, 768), 42, 'user', 0))
    assert not torch.equal(A, initial(name, (8, 768), 42, 'user', 1))


def test_impossible_mixtures_are_refused():
    for n, g in ((0, 0), (1, 2), (2, -1)):
        with pytest.raises(ValueError, match='at least one expert'):
            add_lora(base_model(), n_experts=n, n_generalists=g, rank=4)


@pytest.mark.parametrize('n, k', [(1, 2), (2, 2), (4, 1), (8, 2)])
def test_weights_kept_in_bf16_give_what_autocast_would(n, k, family):
    """Against autocast over float32 weights the products are the same to the bit; only the embedding is rounded, which here
    is not: its values are made to be bfloat16's. The user's own tensors, LayerNorms, positions and the routing stay float32."""
    idx, results = torch.randint(50, (4, 16)), []
    for stored in (torch.float32, torch.bfloat16):
        base = base_model()
        base.wte.weight.data = base.wte.weight.data.bfloat16().float()
        if stored == torch.bfloat16:
            store_in_bf16(base)
        model = user_model(n, k, base=base)
        role = roles(model)
        for name, p in model.named_parameters():
            assert p.dtype == (torch.float32 if name in role or 'ln_' in name or name == 'wpe.weight' else stored)
        with torch.autocast('cpu', torch.bfloat16):
            loss, routing = model.loss(idx, idx)
        assert n == 1 or routing[0].probs.dtype == torch.float32
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


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


# ---- what one routing decision covers (METHOD 3.1) -------------------------------------------------------------------
@pytest.mark.parametrize('unit', ['token', 'prefix', 'sequence'])
def test_routing_units_against_means_of_the_routers_inputs(unit):
    moe = user_model(4, routing_unit=unit).h[0].mlp
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


def test_all_tokens_of_a_sequence_share_their_experts():
    moe = user_model(4, routing_unit='sequence').h[1].mlp
    chosen = moe.route(torch.randn(5, 10, 16)).chosen.view(5, 10, 2)
    assert (chosen == chosen[:, :1]).all() and len({tuple(row) for row in chosen[:, 0].tolist()}) > 1


def test_one_routing_decision_for_all_layers():
    """Only the first layer has a router; every other layer uses its very decision, and gradients of all layers reach it."""
    idx, model = torch.randint(50, (2, 12)), user_model(4, one_routing=True)
    assert [name for name, role in roles(model).items() if role == 'router'] == ['h.0.mlp.router.weight']
    loss, routing = model.loss(idx, idx)
    assert routing[0] is routing[1]
    loss.backward()
    assert model.h[0].mlp.router.weight.grad.norm() > 0
    routing = user_model(4).loss(idx, idx)[1]
    assert routing[0] is not routing[1]


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
    x, noise = torch.randn(8, 20, 3) + torch.randn(8, 1, 3), GhostNoise(4).train()
    x[:, 1] = x[:, 0] + 1  # x' = (x - shift) scale: these two tokens tell both, the scale is the difference of theirs
    means = x.mean(1)  # (8, 3)
    others = torch.stack([torch.cat((means[:b], means[b + 1 :])) for b in range(8)])  # (8, 7, 3)
    drawn = (noise(x) for _ in range(4000))
    shifts = torch.stack([x[:, 0] - y[:, 0] / (y[:, 1] - y[:, 0]) for y in drawn])
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
