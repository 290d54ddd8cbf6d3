"""LoRA, the router and the mixture of LoRA experts: everything trainable in CoMiGS.

                      one MLP block of a user, token x = LN2(residual), E experts, the K best of them run

     x (N, C) ──┬─────────────► F, b_F  frozen ─────────────► h (N, 4C)      once per token, for all experts
                │                                             │
                ├─► router Φ (E, C) ─► logits ─► top K ─► softmax ─► w (N, K),  Σ w = 1
                │                                             │
                └─► expert j:  h_j = h + γ B¹_j A¹_j x        │  A¹ (r, C)   B¹ (4C, r)   expert 0: generalist, shared
                               a_j = w_j · gelu(h_j)     (N, 4C)             expert 1, 2, ...: specialists, never leave
                               d_j = γ B²_j A²_j a_j     (N, C)  A² (r, 4C)  B² (C, r)
                                                              │
     y (N, C) ◄──── P, b_P  frozen ◄──── Σ a_j ───── + ── Σ d_j              once per token, for all experts

This equals Σ_j w_j MLP_j(x), where expert j is the whole MLP with its own LoRA on both linears, because F x is common to
all experts and P is linear (METHOD 1.1; tests/test_lora_moe.py compares output and gradients with the plain sum, and
tools/bench.py times it against that sum). The MLP of a Llama has two linears that read x: with g_j and u_j made like h_j
above, of gate and of up, a_j = w_j · silu(g_j) * u_j, and P is down.

Shapes: N = B*T tokens, C = n_embd, I = 4C (of a Llama intermediate_size), E experts, K = min(top_k, E) active experts,
r LoRA rank, L layers.
The names of the tensors tell their roles, and with them what may leave a device:

    h.{l}.attn.{c_attn,c_proj}.lora.{A,B}             attention   leaves if share_attention
    h.{l}.mlp.generalists.{j}.{c_fc,c_proj}.{A,B}     generalist  leaves
    h.{l}.mlp.specialists.{j}.{c_fc,c_proj}.{A,B}     specialist  never leaves
    h.{l}.mlp.router.weight                           router      never leaves

of a Llama attn.{q_proj,k_proj,v_proj,o_proj} and {gate_proj,up_proj,down_proj}.
"""

import copy
import hashlib
import math
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, product_dtype

ATTENTION_RANK = 8  # whatever the rank of the MLP LoRAs (METHOD 1.1)


def scaling(alpha: float, rank: int) -> float:
    """γ = alpha / sqrt(r): the rank-stabilised scaling of Kalajdzievski 2023, paper eq. (5). Plain LoRA has alpha / r, whose
    updates shrink as the rank grows."""
    return alpha / math.sqrt(rank)


class LoRA(nn.Module):
    """γ B A x with A (r, in), B (out, r)."""

    def __init__(self, n_in: int, n_out: int, rank: int, alpha: float):
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, n_in))
        self.B = nn.Parameter(torch.zeros(n_out, rank))
        self.scaling = scaling(alpha, rank)

    def add_to(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
        """y + weight γ B A x, in y's place, for x (N, in), y (N, out), weight (N, 1) or a number. The scalars go on the narrow
        r columns and the sum into the second product: no pass over (N, out) of its own."""
        low = F.linear(x, self.A) * (weight * self.scaling)  # (N, r)
        return y.addmm_(low.to(y.dtype), self.B.t().to(y.dtype))


class LoRALinear(nn.Module):
    """A frozen linear and its LoRA. Never merged: the frozen weight is shared by all users."""

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.frozen = frozen
        self.lora = LoRA(frozen.in_features, frozen.out_features, rank, alpha)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.frozen(x)  # (B, T, out)
        return self.lora.add_to(y.flatten(0, 1), x.flatten(0, 1)).view(y.shape)


class Expert(nn.Module):
    """The part of an expert that is its own: a LoRA on every linear of the MLP. The frozen MLP belongs to the mixture."""

    def __init__(self, mlp: nn.Module, rank: int, alpha: float):
        super().__init__()
        for name, linear in mlp.named_children():
            setattr(self, name, LoRA(linear.in_features, linear.out_features, rank, alpha))


class Routing(NamedTuple):
    """What one layer's router decided: the numbers behind load balancing (1.3) and the routing shares (Fig. 4)."""

    probs: torch.Tensor  # (N, E) softmax over all experts' logits, float32
    chosen: torch.Tensor  # (N, K) the experts that ran, best first
    weights: torch.Tensor  # (N, K) their weights


class GELU:
    """a = gelu(h), of GPT-2."""

    @staticmethod
    def forward(h: torch.Tensor) -> torch.Tensor:
        return F.gelu(h, approximate='tanh')

    @staticmethod
    def backward(da: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.ops.aten.gelu_backward(da, h, approximate='tanh'),)


class SwiGLU:
    """a = silu(g) * u, of the Llama family (2002.05202)."""

    @staticmethod
    def forward(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return F.silu(g).mul_(u)

    @staticmethod
    def backward(da: torch.Tensor, g: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.aten.silu_backward(da * u, g), F.silu(g).mul_(da)


class Mixture(torch.autograd.Function):
    """Σ_k w_k MLP_k(x) without b_P, in the notation of the picture above, with its derivative written out, because autograd
    would make more passes over (N, I): `da` serves the gradients of w_k and of what enters the activation, one product for all.

    The LoRAs of all E experts lie side by side, and `mine` blanks the columns that are not those of a token's k-th expert:
    E r columns instead of r, but no token is moved, and nothing waits for the device to say how many chose whom."""

    @staticmethod
    def forward(ctx, act, x, w, chosen, r, P, A1, A2, B2, *inward) -> torch.Tensor:
        """x (N, C), w (N, K), chosen (N, K) or None: slot k is expert k; r: LoRA rank; P (C, I), A2 (E r, I), B2 (C, E r).

        inward: F (I, C), b_F (I,) or None and B1 (I, E r) of every linear that reads x: one for GELU, two for SwiGLU, m in
        all; A1 (m E r, C) has their A. All of one dtype -> (N, C)."""
        Fs, bs, B1s = inward[::3], inward[1::3], inward[2::3]
        hs = [x @ F_.t() if b is None else torch.addmm(b, x, F_.t()) for F_, b in zip(Fs, bs)]  # (N, I) each
        low1 = x @ A1.t()  # (N, m E r)
        lows = low1.chunk(len(Fs), 1)  # (N, E r) each
        low2, mixed, kept = x.new_zeros(lows[0].shape), None, []
        for k, (columns, mine) in enumerate(slots(chosen, r, low2)):
            w_k = w[:, k, None]  # (N, 1)
            last = k == w.shape[1] - 1  # the last may have h's place
            h_k = []
            for h, low, B1 in zip(hs, lows, B1s):
                add = h.addmm_ if last else partial(torch.addmm, h)
                h_k.append(add(low[:, columns] * mine, B1[:, columns].t()))  # (N, I)
            a = act.forward(*h_k)
            low2[:, columns] += a @ A2[columns].t() * (mine * w_k)
            mixed = a * w_k if k == 0 else mixed.addcmul_(a, w_k)
            kept += [*h_k, a]
        ctx.act, ctx.r = act, r
        ctx.save_for_backward(x, w, chosen, low1, low2, P, A1, A2, B2, *Fs, *B1s, *kept)
        return torch.addmm(mixed @ P.t(), low2, B2.t())  # not in place: torch.compile of 2.11 would lose its gradient

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple:
        x, w, chosen, low1, low2, P, A1, A2, B2, *rest = ctx.saved_tensors
        need_x, need_A1, need_A2, need_B2, need_B1 = (ctx.needs_input_grad[i] for i in (1, 6, 7, 8, 11))
        m = len(A1) // len(A2)
        Fs, B1s, kept = rest[:m], rest[m : 2 * m], rest[2 * m :]
        lows, dlow1 = low1.chunk(m, 1), torch.zeros_like(low1)
        dlows = dlow1.chunk(m, 1)
        dmixed, dlow2 = dy @ P, dy @ B2  # (N, I), (N, E r)
        dhs, dw, dA2, dB1s = [None] * m, torch.empty_like(w), torch.zeros_like(A2), [torch.zeros_like(B1) for B1 in B1s]
        for k, (columns, mine) in enumerate(slots(chosen, ctx.r, low2)):
            w_k, d = w[:, k, None], dlow2[:, columns] * mine
            *h_k, a = kept[k * (m + 1) : (k + 1) * (m + 1)]
            add = dmixed.addmm_ if k == w.shape[1] - 1 else partial(torch.addmm, dmixed)
            da = add(d, A2[columns])  # (N, I) of w_k a, over w_k
            if need_A2:
                dA2[columns] += (d * w_k).t() @ a
            dw[:, k] = (a * da).sum(1)
            for i, g in enumerate(ctx.act.backward(da, *h_k)):  # (N, I) of h_k, over w_k
                if need_B1:
                    low = lows[i][:, columns] * mine * w_k  # (N, r); g^T low twice: some CPUs form the second much faster
                    dB1s[i][:, columns] += g.t() @ low if m == 1 else (low.t() @ g).t()  # of GPT-2 the bits stay
                dlows[i][:, columns] += g @ B1s[i][:, columns] * (mine * w_k)
                dhs[i] = g.mul_(w_k) if k == 0 else dhs[i].addcmul_(g, w_k)
        dx = torch.addmm(dlow1 @ A1, dhs[0], Fs[0]) if need_x else None
        for dh, F_ in zip(dhs[1:], Fs[1:]) if need_x else ():
            dx.addmm_(dh, F_)
        dA1, dB2 = dlow1.t() @ x if need_A1 else None, dy.t() @ low2 if need_B2 else None
        inward = [grad for dB1 in dB1s for grad in (None, None, dB1 if need_B1 else None)]
        return None, dx, dw, None, None, None, dA1, dA2 if need_A2 else None, dB2, *inward


def slots(chosen: torch.Tensor | None, r: int, low: torch.Tensor) -> list[tuple]:
    """For every slot k: (the columns of low (N, E r) that its expert has, what to multiply them with).

    Where slot k is expert k, its r columns; else all columns, and 1 on those of the expert that the token chose k-th."""
    if chosen is None:
        return [(slice(k, k + r), 1.0) for k in range(0, low.shape[1], r)]
    owner = torch.arange(low.shape[1], device=low.device) // r  # (E r,)
    return [(slice(None), (chosen[:, k, None] == owner).to(low.dtype)) for k in range(chosen.shape[1])]


class LoRAMoE(nn.Module):
    """An MLP block as a routed mixture of LoRA experts; generalists first, then specialists.

    routing_unit is what one decision covers (METHOD 3.1): 'token'; 'prefix', the mean of the router's inputs up to and
    including the token, causal; 'sequence', their mean over the window, which looks ahead."""

    def __init__(self, mlp: nn.Module, experts: list[Expert], n_generalists: int, top_k: int, routed: bool, routing_unit: str):
        """mlp: its linears are its children; all but the last read x, and the last returns to the residual stream."""
        super().__init__()
        self.linears = [name for name, _ in mlp.named_children()]
        for name, linear in mlp.named_children():
            setattr(self, name, linear)  # frozen, one copy for all experts of all users
        self.act = GELU if len(self.linears) == 2 else SwiGLU
        self.generalists, self.specialists = nn.ModuleList(experts[:n_generalists]), nn.ModuleList(experts[n_generalists:])
        self.top_k, self.routing_unit = min(top_k, len(experts)), routing_unit
        self.needs_earlier_tokens = routing_unit != 'token'
        # one expert needs no router; without one, the layer before decides, or if none does (router='mean') all count alike
        self.router = nn.Linear(linear.out_features, len(experts), bias=False) if routed and len(experts) > 1 else None

    def forward(self, x: torch.Tensor, routing: Routing | None = None) -> tuple[torch.Tensor, Routing | None]:
        """x (B, T, C), and the routing of the layer before -> (B, T, C), the routing of this layer."""
        experts = [*self.generalists, *self.specialists]
        routing = routing if self.router is None else self.route(x)
        dtype, shape, E = product_dtype(x), x.shape, len(experts)
        *inward, outward = ([getattr(expert, name) for expert in experts] for name in self.linears)  # LoRAs, by linear
        *Fs, P = (getattr(self, name) for name in self.linears)
        x = x.flatten(0, 1).to(dtype)  # (N, C)
        chosen = None  # every token meets every expert, expert j in slot j
        if routing is None:
            w = x.new_full((len(x), E), 1 / E)
        elif self.top_k == E:
            w = routing.probs  # (N, E)
        else:
            w, chosen = routing.weights, routing.chosen  # (N, K) each
        with torch.autocast(x.device.type, enabled=False):
            # all experts' LoRAs side by side: A (E r, in), with γ in it, and B (out, E r)
            A1, A2 = (torch.cat([lora.A * lora.scaling for lora in loras]).to(dtype) for loras in (sum(inward, []), outward))
            *B1s, B2 = (torch.cat([lora.B for lora in loras], 1).to(dtype) for loras in (*inward, outward))
            if chosen is not None:  # 0 * NaN is NaN: of an expert that no token chose not even that comes through the masks
                used = torch.zeros(E, dtype=torch.bool, device=x.device).scatter_(0, chosen.flatten(), True)
                used = used.repeat_interleave(A2.shape[0] // E, output_size=A2.shape[0])  # (E r,)
                A1, A2 = A1.where(used.repeat(len(Fs))[:, None], 0), A2.where(used[:, None], 0)
                *B1s, B2 = (B.where(used, 0) for B in (*B1s, B2))
            own = [
                part
                for F_, B1 in zip(Fs, B1s)
                for part in (F_.weight.to(dtype), F_.bias if F_.bias is None else F_.bias.to(dtype), B1)
            ]
            r = len(outward[0].A)
            y = Mixture.apply(self.act, x, w.to(dtype), chosen, r, P.weight.to(dtype), A1, A2, B2, *own)  # (N, C)
            if P.bias is not None:  # a lone top-1 weight is below 1: b_P is scaled too
                b_P = P.bias.to(dtype)
                y = y + (w.to(dtype) * b_P if chosen is not None and self.top_k == 1 else b_P)
        return y.view(shape), routing

    def route(self, x: torch.Tensor) -> Routing:
        """x (B, T, C) -> which K experts run for each token, and with what weight (METHOD 1.1)."""
        with torch.autocast(x.device.type, enabled=False):  # float32: bf16 rounding flips near-ties
            logits = F.linear(x.float(), self.router.weight)  # (B, T, E); linear: a mean of inputs is one of logits
        if self.routing_unit == 'prefix':
            logits = logits.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        elif self.routing_unit == 'sequence':
            logits = logits.mean(1, keepdim=True).expand_as(logits)
        logits = logits.flatten(0, 1)  # (N, E)
        probs = logits.softmax(-1)  # (N, E)
        best, chosen = logits.topk(self.top_k)  # (N, K), (N, K)
        weights = probs.gather(1, chosen) if self.top_k == 1 else best.softmax(-1)
        return Routing(probs, chosen, weights)


class GhostNoise(nn.Module):
    """Ghost noise injection (2305.17205), training only, after a LayerNorm: the noise of a small batch's statistics. For
    sequence b, n of the micro-batch's *other* sequences (b's own would let a token see the future) are drawn with replacement;
    with mean μ~, variance σ~² of each channel over their tokens, and μ, σ² over all the others, without gradient,

        x' = (x - (μ~ - μ)) / sqrt((σ~² + ε) / (σ² + ε)),  ε = 1e-3;      E[μ~ - μ] = 0, Var = Var(sequence mean) / n"""

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B = len(x)  # x (B, T, C)
        if not self.training or B == 1:
            return x
        with torch.no_grad():
            first, second = x.float().mean(1), x.float().square().mean(1)  # (B, C) E[x], E[x²] of each sequence
            others = torch.randint(B - 1, (B, self.n), device=x.device)
            others += others >= torch.arange(B, device=x.device)[:, None]  # (B, n), never b itself
            drawn, pool = first[others].mean(1), (first.sum(0) - first) / (B - 1)  # (B, C) μ~, μ
            drawn_var = second[others].mean(1) - drawn.square()
            pool_var = (second.sum(0) - second) / (B - 1) - pool.square()
            scale = ((pool_var.clamp_min(0) + 1e-3) / (drawn_var.clamp_min(0) + 1e-3)).sqrt()
            shift = drawn - pool
        return (x - shift[:, None].to(x.dtype)) * scale[:, None].to(x.dtype)


def load_balance_loss(routing: list[Routing | None], kind: str) -> torch.Tensor | float:
    """Load balancing, averaged over the layers (METHOD 1.3), unitless. From the very logits that routed the tokens.

    f_j: share of the tokens that chose expert j (Σ f = K), a constant; P_j: mean probability, which the gradient goes
    through. 'uniform':    E Σ_j f_j/K P_j                                       Switch Transformer eq. (4), top-K form
             'generalist': (f_0 P_0 + (E-1) Σ_{j>0} f_j P_j) / ((E-1)² + 1)      paper eq. (6), favours expert 0
             'none':       0
    With E = K = 2 both are constant, and so is their gradient: 0. Layers without a router contribute 0."""
    if kind == 'none' or routing[0] is None:
        return 0.0
    total = 0.0
    for probs, chosen, _ in routing:
        E, K = probs.shape[1], chosen.shape[1]
        f = F.one_hot(chosen, E).sum(1).float().mean(0)  # (E,)
        P = probs.mean(0)  # (E,)
        if kind == 'uniform':
            total = total + E * (f / K * P).sum()
        else:
            total = total + (f[0] * P[0] + (E - 1) * (f[1:] * P[1:]).sum()) / ((E - 1) ** 2 + 1)
    return total / len(routing)


def add_lora(
    base: GPT,
    *,
    n_experts: int,
    n_generalists: int,
    rank: int,
    alpha: float = 16,
    top_k: int = 2,
    routed: bool = True,
    routing_unit: str = 'token',
    one_routing: bool = False,
    ghost_noise: int = 0,
) -> GPT:
    """A user's model: `base`'s own frozen weights, shared and not copied, under this user's LoRA and routers.

    one_routing: only the first layer has a router, and its decision holds for all. ghost_noise: n of GhostNoise, 0 for none.

    The new A and router tensors are uninitialised: `initial` fills them. Raises ValueError if the experts are too few."""
    if not 0 <= n_generalists <= n_experts or n_experts < 1:
        raise ValueError(f'{n_generalists} generalists of {n_experts} experts: expected 0 to all of at least one expert')
    base.requires_grad_(False)
    leaves = [m for m in base.modules() if not any(m.children())]  # frozen, so all users can have the same ones
    model = copy.deepcopy(base, {id(shared): shared for shared in leaves})
    for layer, block in enumerate(model.h):
        for name, linear in [*block.attn.named_children()]:
            setattr(block.attn, name, LoRALinear(linear, ATTENTION_RANK, alpha))
        experts = [Expert(block.mlp, rank, alpha) for _ in range(n_experts)]
        here = routed and (layer == 0 or not one_routing)
        block.mlp = LoRAMoE(block.mlp, experts, n_generalists, top_k, here, routing_unit)
        if ghost_noise:
            block.ln_1, block.ln_2 = (nn.Sequential(ln, GhostNoise(ghost_noise)) for ln in (block.ln_1, block.ln_2))
    return model.to(base.wte.weight.device).eval()


def shape_of(c: SimpleNamespace, i: int) -> dict:
    """What `add_lora` is to build for user i, out of the configuration (after `fit`: an entry per user)."""
    same = {name: getattr(c, name) for name in ('n_generalists', 'top_k', 'routing_unit', 'one_routing', 'ghost_noise')}
    return dict(n_experts=c.n_experts[i], rank=c.lora_rank[i], alpha=c.lora_alpha, routed=c.router != 'mean', **same)


def roles(model: GPT) -> dict[str, str]:
    """{name: 'attention' | 'generalist' | 'specialist' | 'router'} of every tensor that is the user's, decided by the
    module that owns it, which is in its name. All other parameters are the frozen base's."""
    owners = {'lora': 'attention', 'generalists': 'generalist', 'specialists': 'specialist', 'router': 'router'}
    names = [name for name, _ in model.named_parameters()]
    return {name: role for name in names for owner, role in owners.items() if f'.{owner}.' in name}


def initial(name: str, shape: tuple, *key: object) -> torch.Tensor:
    """The first value of a user's tensor (METHOD 1.1): A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, router ~ N(0, 0.02²).

    Depends on (key, name) alone, so no user's start depends on who else takes part. key: e.g. (seed, 'user', 3)."""
    digest = hashlib.sha256(repr((*key, name)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], 'big'))
    if name.endswith('.B'):
        return torch.zeros(shape)
    if name.endswith('.A'):
        bound = 1 / math.sqrt(shape[1])  # kaiming_uniform with a = sqrt(5), as in LoRA's code
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return torch.empty(shape).normal_(0, 0.02, generator=generator)
