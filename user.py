"""One user: what a device can do, on its own text with its own LoRA experts, router and optimizers.

Three methods return what leaves the device, and run/fleet.py's `ask` is their only caller: `upload`, `judge`, `predict`.
Nothing else does: no private text, no specialist, no router, no optimizer state (METHOD 0.5). A device alone, in five lines:

    c = fit(configure(['--method=comigs_1gxs', '--n_experts=3', '--dtype=float32']), N=1, n_positions=256)
    user = User(0, c, load_gpt('assets/base-tiny.safetensors'), {'train': tokens, 'valid': tokens, 'test': tokens})
    user.expert_step(0), user.router_step()
    checkpoint.save(file, *user.state())
    user.restore(*checkpoint.read(file))

Shapes: B sequences, T tokens each, W windows of T tokens of public text, L layers, E experts.
"""

import functools
import math
from types import SimpleNamespace

import numpy as np
import torch

import federate
from data.stream import get_batch
from federate import Tensors, is_generalist, n_bytes, truncate
from lora_moe import add_lora, initial, load_balance_loss, roles, scaling, shape_of
from model import GPT, autocast, evaluate, perplexity


def start_of(c: SimpleNamespace, base: GPT, roles_of: tuple = ()) -> Tensors:
    """What all users have in common at the start, of the largest rank: the tensors that leave, and those that only start alike
    (FFA's A, FedSA's B). A device can compute it alone. roles_of: instead, all tensors of these roles."""
    model = add_lora(base, **shape_of(c, c.lora_rank.index(max(c.lora_rank))))
    role, shape = roles(model), {name: p.shape for name, p in model.named_parameters()}
    names = [name for name in role if role[name] in roles_of] if roles_of else federate.shared_names(role, c, 'AB')
    return {name: initial(name, shape[name], c.seed, 'server') for name in names}


class User:
    def __init__(self, i: int, c: SimpleNamespace, base: GPT, data: dict, start: Tensors | None = None):
        """User i as it begins. base: frozen, shared by all users here, its device is the user's.

        data: tokens of the splits {'train', 'valid', 'test'}; 'tests', if everybody's text is pooled: {user: its test tokens};
        'public' (W, T) int64, if the rule needs text that all may read. start: as of start_of, which it is by default."""
        start = start_of(c, base) if start is None else start
        self.id, self.c, self.data, self.device = i, c, data, base.wte.weight.device
        self.tests = data.get('tests', {i: data['test']})  # whose test text its model is tested on
        self.batch_size = c.batch_size * len(self.tests)
        self.model = add_lora(base, **shape_of(c, i))
        self.loss = torch.compile(self.model.loss) if c.compile else self.model.loss
        self.role = roles(self.model)
        self.adapter = {name: p for name, p in self.model.named_parameters() if name in self.role}  # all that is the user's
        self.shared = federate.shared_names(self.role, c)  # what leaves every round
        frozen = {name for name in federate.shared_names(self.role, c, 'AB') if c.aggregate == 'ffa' and name.endswith('.A')}
        # the experts learn on the lower level, the router on the upper one
        theta = [p for name, p in self.adapter.items() if self.role[name] != 'router' and name not in frozen]
        phi = [p for name, p in self.adapter.items() if self.role[name] == 'router' and c.router == 'learned']
        adamw = dict(betas=(0.9, 0.95), weight_decay=c.weight_decay, fused=self.device.type != 'mps')
        joint = c.router_data == 'joint'
        self.expert_opt = torch.optim.AdamW(theta + phi if joint else theta, lr=c.expert_lr, **adamw)
        self.router_opt = torch.optim.AdamW(phi, lr=c.router_lr, **adamw) if phi and not joint else None
        self.trained = {id(p) for p in theta + phi}
        self.trainable = sum(p.numel() for p in theta + phi)
        self.rank = c.lora_rank[i]  # of its generalists; HetLoRA prunes it
        self.expert_steps = self.router_steps = 0
        self.bytes_up = self.bytes_down = 0  # since the last line of `traffic`
        self.stacks_seen = 0  # FLoRA: bytes of stacks that it has downloaded
        self.own = {}  # tensors that the server made for this user alone
        self.pseudo_labels = None  # likewise, of the public text: ids and values, (W, T, K) each
        self.load({name: initial(name, p.shape, c.seed, 'user', i) for name, p in self.adapter.items()})
        self.load(truncate(start, self.rank))

    def load(self, tensors: Tensors) -> None:
        """Copies tensors into the user's own of the same names; components beyond a smaller rank become 0."""
        with torch.no_grad():
            for name, t in tensors.items():
                self.adapter[name].zero_()[tuple(map(slice, t.shape))] = t.to(self.device)

    # ---- the two levels ----------------------------------------------------------------------------------------------
    def expert_step(self, step: int) -> dict:
        """Eq. (2), lower level: θ_i descends on a batch of the training text, φ_i fixed. step = 0, 1, ... of all rounds gives
        the learning rate: a cosine from expert_lr to a tenth of it (METHOD 1.4). Returns what metrics.jsonl says of it."""
        lr = self.c.expert_lr * (0.55 + 0.45 * math.cos(math.pi * step / (self.c.rounds * self.c.local_steps)))
        for group in self.expert_opt.param_groups:
            group['lr'] = lr
        ce, lb = self.descend(self.expert_opt, self.data['train'], (self.c.seed, self.id, 0, self.expert_steps))
        self.expert_steps += 1
        return {'step': self.expert_steps, 'user': self.id, 'loss': ce, 'ppl': perplexity(ce), 'lb': lb, 'lr': lr}

    def router_step(self) -> dict:
        """Eq. (3), upper level: φ_i descends on a batch of the validation text (or what c.router_data names), θ_i fixed."""
        data = self.data[self.c.router_data]
        ce, lb = self.descend(self.router_opt, data, (self.c.seed, self.id, 1, self.router_steps))
        self.router_steps += 1
        at = {'step': self.expert_steps, 'router_step': self.router_steps, 'user': self.id}
        return {**at, 'loss': ce, 'ppl': perplexity(ce), 'lb': lb, 'lr': self.c.router_lr}

    def descend(self, optimizer: torch.optim.Optimizer, tokens: np.ndarray, key: tuple) -> tuple[float, float]:
        """One optimizer step on one batch; changes only the tensors that this optimizer holds. Returns cross-entropy (nats per
        token) and load balancing, means over the batch. No gradient survives the step, so nothing crosses the two levels
        (unless leak_gradients: then every loss reaches every trained tensor, and a step clears its own optimizer's only)."""
        c, held = self.c, {id(p) for group in optimizer.param_groups for p in group['params']}
        for p in self.adapter.values():
            p.requires_grad_(id(p) in (self.trained if c.leak_gradients else held))
            if not c.leak_gradients:
                p.grad = None
        if c.ghost_noise:
            torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))  # the one use of this generator
        self.model.train()
        sums = torch.zeros(2, device=self.device)
        x, y = (t.to(self.device) for t in get_batch(tokens, self.batch_size, c.block_size, key))  # (B, T) each
        distil = self.pseudo_labels if optimizer is self.expert_opt else None
        if distil:  # as many windows of public text beside the private ones
            public, rng = self.data['public'], np.random.default_rng((*key, 1))
            pick = torch.from_numpy(rng.integers(0, len(public), self.batch_size)).to(self.device)  # (B,)
            pick = pick.split(c.micro_batch_size)
        for i, (x, y) in enumerate(zip(x.split(c.micro_batch_size), y.split(c.micro_batch_size))):
            share = len(x) / self.batch_size
            with autocast(self.device, c.dtype):
                ce, routing = self.loss(x, y)
                lb = load_balance_loss(routing, c.load_balance)
                loss = ce + c.lb_coef * lb
                if c.aggregate == 'hetlora':
                    loss = loss + c.prune_coef * federate.tail_norm(self.adapter, self.rank, c.prune_gamma)
                if distil:
                    psi = [v[pick[i]].flatten(0, 1) for v in distil]
                    loss = loss + c.consensus_coef * federate.consensus_loss(self.model(public[pick[i]])[0].flatten(0, 1), psi)
            (loss * share).backward()  # frees this micro-batch's graph: one is alive at a time
            sums += torch.stack((ce.detach(), torch.as_tensor(lb, device=self.device).detach())) * share
        optimizer.step()
        for p in self.adapter.values():
            if id(p) in held or not c.leak_gradients:
                p.grad = None
        self.model.eval()
        return tuple(sums.tolist())

    # ---- what comes --------------------------------------------------------------------------------------------------
    def receive(self, server: Tensors, t: int, stacks: int = 0) -> None:
        """Download for round t: the shared tensors become what the server has for this user. Adam's moments of other factors
        are dropped. stacks: bytes of all that FLoRA has merged into the base so far."""
        c = self.c
        if c.aggregate == 'flora':  # all stacks since it last asked; fresh factors, the same for everybody
            self.bytes_down, self.stacks_seen = self.bytes_down + stacks - self.stacks_seen, stacks
            download = {name: initial(name, self.adapter[name].shape, c.seed, 'server', t) for name in self.shared}
        else:
            download = self.own or truncate(server, self.rank)
            if c.aggregate == 'flexlora':
                experts = {name: v for name, v in server.items() if is_generalist(name)}
                download |= federate.of_rank(experts, self.rank, scaling(c.lora_alpha, self.rank))
            self.bytes_down += n_bytes(download)
        for name in download:
            if c.aggregate == 'flora' or (c.aggregate == 'flexlora' and t > 0 and is_generalist(name)):
                self.expert_opt.state.pop(self.adapter[name], None)
        self.load(download)
        if c.aggregate == 'hetlora':
            self.tail = self.tail_norm()

    def take(self, own: Tensors | None) -> None:
        """What the server made for this user alone: its weighted average (trust), or pseudo-labels, which hold until new ones
        come (consensus)."""
        if self.c.aggregate != 'consensus':
            self.own = own or {}
        elif own:
            windows = self.data['public'].shape  # (W, T)
            self.pseudo_labels = [own[key].view(*windows, -1).to(self.device) for key in ('ids', 'values')]  # (W, T, K)
            self.bytes_down += n_bytes(own)

    # ---- what leaves -------------------------------------------------------------------------------------------------
    def upload(self) -> Tensors:
        """LEAVES: copies of the shared tensors, of the user's own rank."""
        sent = truncate({name: self.adapter[name].detach().clone() for name in self.shared}, self.rank)
        self.bytes_up += n_bytes(sent)
        return sent

    def judge(self, updates: dict[int, Tensors]) -> Tensors:
        """LEAVES: a perplexity for each of these users' updates, on the user's own validation text (PCL, strategy 2)."""
        self.bytes_up += 4 * len(updates)
        self.bytes_down += sum(n_bytes(update) for i, update in updates.items() if i != self.id)
        return {'ppl': torch.tensor([perplexity(self.judged(update)) for update in updates.values()])}  # (n,)

    def predict(self, logits: bool) -> Tensors:
        """LEAVES: the 100 likeliest tokens at every position of the public text, with their logits or probabilities: 600 bytes
        a position."""
        k = min(100, self.c.vocab_size)
        with autocast(self.device, self.c.dtype):
            ids, values = federate.top_predictions(self.model, self.data['public'], k, logits)
        self.bytes_up += n_bytes(top := {'ids': ids, 'values': values})
        return top

    def traffic(self) -> dict:
        """Bytes up and down since the last call."""
        line = {'step': self.expert_steps, 'user': self.id, 'bytes_up': self.bytes_up, 'bytes_down': self.bytes_down}
        self.bytes_up = self.bytes_down = 0
        return line

    # ---- what single rules do on the device --------------------------------------------------------------------------
    def judged(self, tensors: Tensors) -> float:
        """Cross-entropy (nats per token) on the first judge_windows windows of the user's validation text, with these tensors
        in place of its own of those names."""
        own, T = {name: self.adapter[name].detach().clone() for name in tensors}, self.c.block_size
        self.load(tensors)
        with autocast(self.device, self.c.dtype):
            loss = evaluate(self.model, self.data['valid'][: self.c.judge_windows * T + 1], T, quiet=True)['loss']
        self.load(own)
        return loss

    @torch.no_grad()
    def tail_norm(self) -> torch.Tensor | float:
        return federate.tail_norm(self.adapter, self.rank, self.c.prune_gamma)

    def prune(self) -> None:
        """HetLoRA, if the round made the tail smaller: the last components of every generalist become 0, with their moments,
        and stay so: no gradient reaches them."""
        if not self.tail_norm() < self.tail:
            return
        self.rank = max(1, int(self.c.prune_gamma * self.rank))
        for name, p in self.adapter.items():
            if self.role[name] == 'generalist':
                for v in (p.detach(), *(m for m in self.expert_opt.state[p].values() if m.shape == p.shape)):
                    (v[self.rank :] if name.endswith('.A') else v[:, self.rank :]).zero_()

    def fuse(self, mean: Tensors) -> tuple[float, float]:
        """FDLoRA's AdaFusion (2406.07925), at the end: (w1, w2) with which A = w1 A_own + w2 A_mean, B likewise, of the MLP
        LoRAs, have the least loss on validation windows + 0.05 mean |w|. A search without gradients: steps along the axes,
        halved twice."""
        own = {name: self.adapter[name].detach().clone() for name in mean if self.role[name] == 'generalist'}

        def cost(w: tuple[float, float]) -> float:
            return self.judged(federate.fuse(own, mean, *w)) + 0.05 * (abs(w[0]) + abs(w[1])) / 2

        cost = functools.cache(cost)
        best, step = min(((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)), key=cost), 0.25
        while step > 0.05:
            near = min(((best[0] + a, best[1] + b) for a, b in ((step, 0), (-step, 0), (0, step), (0, -step))), key=cost)
            best, step = (near, step) if cost(near) < cost(best) else (best, step / 2)
        self.load(federate.fuse(own, mean, *best))
        return best

    # ---- between two rounds, on the device's own disk ----------------------------------------------------------------
    KEPT = ('rank', 'stacks_seen', 'expert_steps', 'router_steps')

    def state(self) -> tuple[Tensors, dict]:
        """All that the user is between two rounds: adapter, Adam's moments, what the server made for it alone; and KEPT."""
        tensors = {f'adapter/{name}': p for name, p in self.adapter.items()}
        tensors |= {f'grad/{name}': p.grad for name, p in self.adapter.items() if p.grad is not None}  # of leak_gradients
        tensors |= {f'download/{name}': v for name, v in self.own.items()}
        tensors |= {f'pseudo_labels/{i}': v for i, v in enumerate(self.pseudo_labels or ())}
        for which in ('expert_opt', 'router_opt'):
            states = getattr(self, which).state_dict()['state'] if getattr(self, which) else {}
            tensors |= {f'{which}/{i}/{key}': v for i, state in states.items() for key, v in state.items()}
        return tensors, {name: getattr(self, name) for name in self.KEPT}

    def restore(self, tensors: Tensors, facts: dict) -> None:
        """The user as `state` returned it."""
        vars(self).update({name: facts[name] for name in self.KEPT})
        groups = {}  # {'adapter': {name: tensor}, ...}
        for key, v in tensors.items():
            group, _, name = key.partition('/')
            groups.setdefault(group, {})[name] = v
        self.load(groups['adapter'])
        for name, v in groups.get('grad', {}).items():
            self.adapter[name].grad = v.to(self.device)
        self.own = groups.get('download', {})
        self.pseudo_labels = [v.to(self.device) for _, v in sorted(groups.get('pseudo_labels', {}).items())] or None
        for which in ('expert_opt', 'router_opt'):
            states = {}
            for key, v in groups.get(which, {}).items():
                i, name = key.split('/')
                states.setdefault(int(i), {})[name] = v
            if getattr(self, which):
                getattr(self, which).load_state_dict({**getattr(self, which).state_dict(), 'state': states})
