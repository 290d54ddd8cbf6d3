"""What leaves a user, and how the server combines it. Pure functions on dicts {name: tensor}; no state.

A user's tensors and their roles come from lora_moe.roles. What may leave is decided here and nowhere else (METHOD 0.5):
generalists, and the attention LoRAs if they are shared. Specialists, routers, optimizer state and text never do.
Another aggregation rule is another function like `fedavg`, chosen by one line of train.py."""
import torch

Tensors = dict[str, torch.Tensor]


def shared_names(roles: dict[str, str], share_attention: bool) -> list[str]:
    """Names of the tensors that leave the user, in the model's order. roles: {name: role}."""
    leaving = {'generalist', 'attention'} if share_attention else {'generalist'}
    return [name for name, role in roles.items() if role in leaving]


def n_bytes(tensors: Tensors) -> int:
    """Payload of a message in bytes: elements times bytes an element, without any header."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def fedavg(updates: list[Tensors]) -> Tensors:
    """θ = 1/N Σ_i θ_i for every tensor: parameters, not gradients, uniform weights (paper Algorithm 1; McMahan 2017).

    updates: one dict per user, all with the same names and shapes (else ValueError). Summed in user order in float64, so
    the result does not depend on when an update arrived; returned in the updates' dtype."""
    first = {name: t.shape for name, t in updates[0].items()}
    for i, update in enumerate(updates):
        if {name: t.shape for name, t in update.items()} != first:
            raise ValueError(f'update {i} has other tensors or shapes than update 0: all users share the same generalists')
    mean = {}
    for name, t in updates[0].items():
        total = torch.zeros(t.shape, dtype=torch.float64)
        for update in updates:
            total += update[name].cpu()
        mean[name] = (total / len(updates)).to(t.dtype).to(t.device)
    return mean
