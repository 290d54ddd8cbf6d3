"""Aggregation and the privacy boundary (METHOD 0.5)."""
import numpy as np
import pytest
import torch

from federate import fedavg, n_bytes, shared_names
from lora_moe import add_lora, roles
from model import GPT, GPTConfig


def updates(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [{'a': torch.randn(3, 4, generator=g), 'b': torch.randn(5, generator=g)} for _ in range(n)]


def test_fedavg_is_the_mean_of_parameters():
    given = updates(4)
    mean = fedavg(given)
    for name in ('a', 'b'):
        assert np.allclose(mean[name], np.mean([u[name].numpy() for u in given], axis=0), atol=1e-7)
        assert mean[name].dtype == torch.float32


def test_identical_users_and_a_single_user_are_fixed_points():
    one = updates(1)
    for n in (1, 3, 7):
        mean = fedavg(one * n)
        assert all(torch.equal(mean[name], one[0][name]) for name in mean)


def test_mean_of_factors_is_not_the_factor_mean_of_products():
    """What averaging A and B separately leaves out: mean(B) mean(A) differs from mean(B A)."""
    g = torch.Generator().manual_seed(0)
    users = [{'A': torch.randn(2, 5, generator=g), 'B': torch.randn(6, 2, generator=g)} for _ in range(3)]
    mean = fedavg(users)
    product = sum(u['B'] @ u['A'] for u in users) / 3
    assert (mean['B'] @ mean['A'] - product).norm() > 0.1 * product.norm()


def test_other_names_or_shapes_are_refused():
    good, other = updates(2)
    for bad in ({'a': other['a']}, {**other, 'c': torch.zeros(1)}, {**other, 'b': torch.zeros(1)}):
        with pytest.raises(ValueError, match='update 1'):
            fedavg([good, bad])


@pytest.mark.parametrize('n, n_generalists', [(2, 1), (2, 2), (2, 0), (4, 1), (1, 1)])
def test_only_generalists_and_shared_attention_leave(n, n_generalists):
    model = add_lora(GPT(GPTConfig(50, 16, 2, 2, 16)), n, n_generalists, rank=4)
    role = roles(model)
    for share_attention in (True, False):
        names = shared_names(role, share_attention)
        assert not any('specialists' in name or 'router' in name for name in names)
        assert sum('generalists' in name for name in names) == 2 * n_generalists * 4
        assert sum('attn' in name for name in names) == (2 * 4 if share_attention else 0)
        sent = {name: dict(model.named_parameters())[name] for name in names}
        assert n_bytes(sent) == 4 * sum(p.numel() for p in sent.values())
