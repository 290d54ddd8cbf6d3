"""P: the mixture of LoRA experts as most people would write it. A whole MLP for every expert, tokens dispatched by torch.where,
all logits at once, autograd throughout. tests/test_lora_moe.py compares lora_moe.py with it, tools/bench.py times both.

Shapes as in lora_moe.py: B sequences, T tokens each, N = B*T, C width, H heads of D, E experts, K active ones, V vocabulary."""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from lora_moe import LoRA, LoRAMoE, Routing, load_balance_loss, roles
from model import GPT, autocast


class PlainLinear(nn.Module):
    """W x + b + γ B A x."""

    def __init__(self, frozen: nn.Linear, lora: LoRA):
        super().__init__()
        self.frozen, self.lora = frozen, copy.deepcopy(lora)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(x) + self.lora.scaling * F.linear(F.linear(x, self.lora.A), self.lora.B)


class PlainExpert(nn.Module):
    """A whole MLP with its own copy of the frozen weights: GPT-2's, or a Llama's."""

    def __init__(self, moe: LoRAMoE, expert: nn.Module):
        super().__init__()
        for name, lora in expert.named_children():
            setattr(self, name, PlainLinear(copy.deepcopy(getattr(moe, name)), lora))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, 'gate_proj'):
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))


class PlainMixture(nn.Module):
    """Σ_j w_j MLP_j(x) with copies of all that `moe` has."""

    def __init__(self, moe: LoRAMoE):
        super().__init__()
        self.top_k, self.router = moe.top_k, copy.deepcopy(moe.router)
        self.generalists = nn.ModuleList([PlainExpert(moe, e) for e in moe.generalists])
        self.specialists = nn.ModuleList([PlainExpert(moe, e) for e in moe.specialists])

    def forward(self, x: torch.Tensor, routing: Routing | None = None) -> tuple[torch.Tensor, Routing | None]:
        """x (B, T, C), and the routing of the layer before -> (B, T, C), the routing of this layer, as LoRAMoE.forward."""
        experts, shape = [*self.generalists, *self.specialists], x.shape
        x = x.flatten(0, 1)  # (N, C)
        if self.router is not None:
            routing = self.route(x)
        if routing is None:  # all count alike
            weights = x.new_full((len(x), len(experts)), 1 / len(experts))  # (N, E)
            chosen = torch.arange(len(experts), device=x.device).expand(len(x), -1)
        else:
            weights, chosen = routing.weights, routing.chosen  # (N, K) each
        y = torch.zeros_like(x)
        for j, expert in enumerate(experts):
            token, slot = torch.where(chosen == j)  # (N_j,) each
            y[token] += (weights[token, slot, None] * expert(x[token])).to(y.dtype)
        return y.view(shape), routing

    def route(self, x: torch.Tensor) -> Routing:
        """x (N, C) -> the K likeliest experts of every token, weighted by the softmax of their logits (METHOD 1.1)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = self.router(x.float())  # (N, E)
        best, chosen = logits.topk(self.top_k)  # (N, K) each
        probs = logits.softmax(-1)
        return Routing(probs, chosen, best.softmax(-1) if self.top_k > 1 else probs.gather(1, chosen))


class PlainGPT(nn.Module):
    """A user's model with the same values, in the form above. Its own tensors have the names of the user's own."""

    def __init__(self, user: GPT):
        super().__init__()
        self.user, self.config, self.ln_f = [user], user.config, plain_norm(user.ln_f)  # a list: its tensors are not P's
        self.h = nn.ModuleList()
        for block in user.h:
            attn = nn.ModuleDict({name: PlainLinear(old.frozen, old.lora) for name, old in block.attn.named_children()})
            norms = {name: plain_norm(getattr(block, name)) for name in ('ln_1', 'ln_2')}
            self.h.append(nn.ModuleDict({'attn': attn, 'mlp': PlainMixture(block.mlp), **norms}))

    def attention(self, attn: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)."""
        if 'c_attn' in attn:
            q, k, v = (t.unflatten(-1, (self.config.n_head, -1)).transpose(1, 2) for t in attn.c_attn(x).chunk(3, -1))
        else:
            q, k, v = (attn[f'{name}_proj'](x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for name in 'qkv')
            q, k = self.turned(q), self.turned(k)
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))  # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)  # (B, T, C)
        return (attn.c_proj if 'c_attn' in attn else attn.o_proj)(y)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, H, T, D), by RoPE, as transformers writes it."""
        T, D = x.shape[2:]
        speed = self.config.rope_theta ** (-torch.arange(0, D, 2, device=x.device) / D)  # (D/2,)
        angle = (torch.arange(T, device=x.device)[:, None] * speed).repeat(1, 2)  # (T, D)
        a, b = x.chunk(2, -1)
        return (x * angle.cos() + torch.cat((-b, a), -1) * angle.sin()).to(x.dtype)

    def loss(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, list]:
        """As GPT.loss: idx, targets (B, T) -> mean cross-entropy in nats per token, routing of every layer."""
        x, decided, routing = self.user[0].embed(idx, 0), None, []
        for block in self.h:
            x = x + self.attention(block.attn, block.ln_1(x))
            y, decided = block.mlp(block.ln_2(x), decided)
            x = x + y
            routing.append(decided)
        logits = F.linear(self.ln_f(x), self.user[0].head_weight)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), routing


def plain_norm(norm: nn.Module) -> nn.Module:
    """A LayerNorm is one; an RMSNorm becomes torch's, with autograd's derivative."""
    if isinstance(norm, nn.LayerNorm):
        return norm
    plain = nn.RMSNorm(norm.weight.shape, norm.eps).requires_grad_(False)
    plain.weight = norm.weight
    return plain


def randomised(user: GPT, std: float, router_std: float, seed: int = 0) -> GPT:
    """A user's model whose own tensors are all drawn anew, so that B is not 0 and all gradients are at work."""
    generator, role = torch.Generator().manual_seed(seed), roles(user)
    with torch.no_grad():
        for name, p in user.named_parameters():
            if name in role:
                p.copy_(torch.randn(p.shape, generator=generator) * (router_std if role[name] == 'router' else std))
    return user


def compare(ours: GPT, plain: PlainGPT, data: tuple, dtypes: tuple = ('float32', 'float32')) -> dict[str, float]:
    """A user's model against P, on the training loss of one batch (idx, targets), each in its dtype. worst: the largest
    relative error of the loss and of any gradient; cosine: the least of any gradient; together: of all in one. NaN stays."""
    losses, grads = [], []
    for model, dtype in zip((ours, plain), dtypes):
        model.zero_grad()
        with autocast(data[0].device, dtype):
            loss, routing = model.loss(*data)
            total = loss + 0.01 * load_balance_loss(routing, 'generalist')
        total.backward()
        trained = {name.replace('.lora', ''): p for name, p in model.named_parameters() if p.requires_grad}
        losses.append(loss.detach().double())
        grads.append({name: p.grad.double().flatten() for name, p in sorted(trained.items())})
        model.zero_grad()
    if grads[0].keys() != grads[1].keys():
        raise ValueError('the two models do not train the same tensors')
    pairs = [losses, *zip(grads[0].values(), grads[1].values())]  # ours, P's
    errors = [(a - b).norm() / b.norm().clamp_min(1e-30) for a, b in pairs]  # an expert without tokens has 0 in both
    cosines = [F.cosine_similarity(a, b, dim=0) for a, b in pairs[1:] if b.any()]
    together = F.cosine_similarity(*(torch.cat([*g.values()]) for g in grads), dim=0)
    return {'worst': torch.stack(errors).max().item(), 'cosine': torch.stack(cosines).min().item(), 'together': together.item()}
