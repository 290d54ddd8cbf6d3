"""model.py is GPT-2: the oracle is transformers' GPT2LMHeadModel on a random small configuration."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
from lora_moe import add_lora, roles
from model import GPT, CrossEntropy, GPTConfig, choose, evaluate, fast_fp32, load_gpt, save_gpt, usable


@pytest.fixture(scope='module')
def hub_folder(tmp_path_factory):
    """A small random GPT-2 saved by transformers in the Hub's format, with values that are not near zero."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=101, n_positions=24, n_layer=2, n_head=2, n_embd=32)
    oracle = transformers.GPT2LMHeadModel(config).eval()
    for p in oracle.parameters():
        torch.nn.init.normal_(p, std=0.2)
    folder = tmp_path_factory.mktemp('hub')
    oracle.save_pretrained(folder)
    return folder, oracle


def test_logits_equal_transformers(hub_folder):
    folder, oracle = hub_folder
    idx = torch.randint(101, (3, 24), generator=torch.Generator().manual_seed(0))
    for source in (folder, folder / 'model.safetensors'):
        ours = load_gpt(str(source))
        with torch.no_grad():
            assert (ours(idx)[0] - oracle(idx).logits).abs().max() < 1e-5
            theirs = torch.nn.functional.cross_entropy(oracle(idx).logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
            assert abs(ours.loss(idx[:, :-1], idx[:, 1:])[0] - theirs) < 1e-5


def test_older_hub_layouts_load_too(hub_folder, tmp_path):
    """Released checkpoints have no 'transformer.' prefix, carry causal-mask buffers, or are a pickled file of tensors."""
    folder, oracle = hub_folder
    state = {name.removeprefix('transformer.'): t for name, t in oracle.state_dict().items()}
    state['h.0.attn.bias'] = torch.ones(1, 1, 24, 24)
    torch.save(state, tmp_path / 'pytorch_model.bin')
    (tmp_path / 'config.json').write_text((folder / 'config.json').read_text())
    idx = torch.arange(20)[None]
    with torch.no_grad():
        assert (load_gpt(str(tmp_path))(idx)[0] - oracle(idx).logits).abs().max() < 1e-5


def test_names_of_the_hub_are_downloaded(hub_folder, monkeypatch):
    """gpt2 ... gpt2-xl go through huggingface_hub; here its one function answers with local files."""
    import huggingface_hub

    folder, _ = hub_folder
    asked = []
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', lambda repo, file: asked.append((repo, file)) or str(folder / file))
    assert load_gpt('gpt2-medium').config.n_embd == 32
    assert asked == [('openai-community/gpt2-medium', 'model.safetensors'), ('openai-community/gpt2-medium', 'config.json')]

    def unreachable(repo, file):
        raise ConnectionError('no route')

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', unreachable)
    with pytest.raises(OSError, match='cannot get openai-community/gpt2 .*--init_from'):
        load_gpt('gpt2')


def test_own_format_round_trip(tmp_path):
    torch.manual_seed(0)
    a = GPT(GPTConfig(50, 16, 1, 2, 8))
    save_gpt(a, tmp_path / 'a.safetensors')
    b = load_gpt(str(tmp_path / 'a.safetensors'))
    assert b.config == a.config and all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_causality():
    """Logits at position t do not change when tokens after t do."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(50, 16, 2, 2, 8))
    idx = torch.randint(50, (1, 16))
    other = idx.clone()
    other[0, 9:] = (other[0, 9:] + 1) % 50
    with torch.no_grad():
        assert torch.equal(gpt(idx)[0][0, :9], gpt(other)[0][0, :9])
        assert not torch.equal(gpt(idx)[0][0, 9:], gpt(other)[0][0, 9:])


def test_generate():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(50, 16, 1, 2, 8))
    prompt = torch.tensor([[1, 2, 3]])
    a = gpt.generate(prompt, 20, seed=5)  # longer than the context of 16
    assert a.shape == (1, 23) and torch.equal(a[:, :3], prompt)
    assert torch.equal(a, gpt.generate(prompt, 20, seed=5)) and not torch.equal(a, gpt.generate(prompt, 20, seed=6))
    greedy = gpt.generate(prompt, 5, temperature=0)
    assert torch.equal(greedy, gpt.generate(prompt, 5, top_k=1, seed=1))  # the likeliest of one is the likeliest
    for bad in (dict(temperature=-1.0), dict(top_k=0)):
        with pytest.raises(ValueError):
            gpt.generate(prompt, 1, **bad)
    with pytest.raises(ValueError, match='a prompt of 0 tokens'):
        gpt.generate(prompt[:, :0], 1)


def test_choose():
    """softmax(logits / temperature) over the top_k likeliest: p = 1/2, 1/4, 1/8, 1/8 becomes p^(1/temperature), normalised."""
    p = [0.5, 0.25, 0.125, 0.125]
    logits, generator = torch.tensor(p).log().expand(40_000, 4), torch.Generator().manual_seed(0)
    for temperature, top_k, expected in (
        (1, None, p),
        (0.5, 2, [0.8, 0.2, 0, 0]),
        (2, 2, [2**0.5 / (2**0.5 + 1), 1 / (2**0.5 + 1), 0, 0]),
        (1, 3, p),  # the fourth ties with the third
        (1, 9, p),
        (0.7, 1, [1, 0, 0, 0]),
        (0, None, [1, 0, 0, 0]),
    ):
        shares = choose(logits, temperature, top_k, generator).flatten().bincount(minlength=4) / len(logits)
        assert shares.tolist() == pytest.approx(expected, abs=0.01), (temperature, top_k)
        assert [share > 0 for share in shares] == [e > 0 for e in expected]


# ---- the cache of keys and values against recomputing ------------------------------------------------------------------
def user_model(n, **kwargs):
    """A GPT-2, for n > 0 under a user's LoRA with n experts, all of whose own values are far from zero."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 16, 3, 2, 16))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    if n:
        model = add_lora(model, n_experts=n, n_generalists=1, rank=4, **kwargs)
        for name, p in model.named_parameters():
            if name in roles(model):
                torch.nn.init.normal_(p.data, std=2.0 if 'router' in name else 0.2)
    return model


MODELS = [(0, {}), (1, {}), (2, {}), (4, {}), (4, dict(top_k=1)), (4, dict(routed=False)), (4, dict(one_routing=True))]


@pytest.mark.parametrize('n, kwargs', MODELS)
@pytest.mark.parametrize('first', [1, 5])
@torch.no_grad()
def test_token_by_token_with_a_cache(n, kwargs, first):
    """A prompt of `first` tokens, then one at a time: the logits and the experts of the whole sequence at once."""
    model, idx = user_model(n, **kwargs), torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(1))
    whole, routing = model(idx)
    cache, x, chosen = [[] for _ in model.h], [], []
    for part in (idx[:, :first], *idx[:, first:].split(1, dim=1)):
        hidden, decided = model.hidden(part, cache)
        x.append(hidden)
        chosen += [torch.stack([r.chosen.unflatten(0, part.shape) for r in decided])] if decided[0] else []
    logits = model.head(torch.cat(x, 1))
    assert relative_error(logits, whole) < 1e-6 and (logits - whole).abs().max() < 1e-5 * whole.abs().max()
    if chosen:
        assert torch.equal(torch.cat(chosen, 2), torch.stack([r.chosen.unflatten(0, idx.shape) for r in routing]))
    assert bool(chosen) == (n > 1 and kwargs.get('routed', True))
    with pytest.raises(ValueError, match='17 tokens.*16 positions'):
        model.hidden(idx[:, :1], cache)


@pytest.mark.parametrize('n, kwargs', [*MODELS, (4, dict(routing_unit='prefix')), (4, dict(routing_unit='sequence'))])
def test_the_cache_does_not_change_the_text(n, kwargs):
    """Beyond the 16 positions, too, where the window slides and no key stays valid; and where a decision needs the tokens
    before, so that nothing may be cached."""
    model = user_model(n, **kwargs)
    for prompt in (torch.tensor([[7], [8]]), torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(2))):
        for how in (dict(temperature=0), dict(temperature=0.8, top_k=20, seed=3)):
            a, b = (model.generate(prompt, 30, **how, cached=cached) for cached in (True, False))
            assert torch.equal(a, b) and torch.equal(a[:, : prompt.shape[1]], prompt)
    with torch.no_grad():  # the plain formula of the greedy text: the likeliest after the last 16 tokens
        greedy = model.generate(prompt, 30, temperature=0)
        for end in range(prompt.shape[1], greedy.shape[1]):
            assert torch.equal(model(greedy[:, end - 16 : end])[0][:, -1].argmax(-1), greedy[:, end])


def test_only_one_token_passes_once_the_prompt_is_known():
    model, seen = user_model(2), []
    model.h[0].register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[1]))
    tokens = list(model.stream(torch.tensor([[1, 2, 3]]), 16))
    assert len(tokens) == 16 and seen == [3] + [1] * 13 + [16, 16]  # 3 + 13 fill the 16 positions


def test_a_sequence_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match='17 tokens.*16 positions'):
        GPT(GPTConfig(50, 16, 1, 2, 8))(torch.zeros(1, 17, dtype=torch.long))


# ---- the fast paths against the plain formula ------------------------------------------------------------------------
@pytest.mark.parametrize('N, V', [(7, 11), (300, 65_536), (513, 40_000)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_cross_entropy_in_chunks(N, V, dtype):
    """Value and gradient, scaled by what comes in, of F.cross_entropy on the same logits; chunks of 256, or of 257 and the
    rest. The logits reach beyond exp's range."""
    torch.manual_seed(0)
    x, W, y = torch.randn(N, 4), 20 * torch.randn(V, 4), torch.randint(V, (N,))
    a, b = x.clone().requires_grad_(), x.to(dtype).float().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = CrossEntropy.apply(a, W, y)
        (3 * loss).backward()
        with torch.no_grad():
            assert torch.equal(loss, CrossEntropy.apply(x, W, y))
        plain = F.cross_entropy(F.linear(b, W).float(), y)
        (3 * plain).backward()
    assert loss.dtype == a.grad.dtype == torch.float32
    assert relative_error(loss.detach(), plain.detach()) < 1e-5
    assert relative_error(a.grad, b.grad) < (1e-5 if dtype == torch.float32 else 2e-2)


class Largest(TorchDispatchMode):
    """Remembers the largest floating tensor that any operation made, in numbers."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.numbers = max(self.numbers, t.numel())
        return out


def test_a_frozen_head_never_makes_all_logits():
    gpt = GPT(GPTConfig(60_000, 128, 1, 1, 4)).requires_grad_(False)
    gpt.h[0].mlp.c_fc.weight.requires_grad_()
    idx = torch.randint(60_000, (8, 128))
    with Largest() as seen:
        gpt.loss(idx, idx)[0].backward()
    assert seen.numbers <= 2**24 < idx.numel() * 60_000


def test_a_trained_head_gets_its_gradient():
    """pretrain.py: weights that are trained take the plain path."""
    gpt = GPT(GPTConfig(50, 16, 1, 2, 8))
    idx = torch.randint(50, (3, 16))
    (grad,) = torch.autograd.grad(gpt.loss(idx, idx)[0], gpt.wte.weight)
    (plain,) = torch.autograd.grad(F.cross_entropy(gpt(idx)[0].flatten(0, 1), idx.flatten()), gpt.wte.weight)
    assert relative_error(grad, plain) < 1e-6


def test_attention_on_a_cpu_equals_sdpa():
    """Explicit up to 128 tokens with gradients, SDPA above and without: the same output and gradients."""
    torch.manual_seed(0)
    attention, x = GPT(GPTConfig(50, 256, 1, 2, 8)).h[0].attn, torch.randn(2, 129, 8)
    for T in (1, 128):
        a, b = x[:, :T].clone().requires_grad_(), x.clone().requires_grad_()
        explicit, sdpa = attention(a), attention(b)[:, :T]  # causal: what follows does not matter
        assert torch.allclose(explicit, sdpa, atol=1e-6)
        explicit.square().sum().backward(), sdpa.square().sum().backward()
        assert torch.allclose(a.grad, b.grad[:, :T], atol=1e-6)


@pytest.fixture
def setting():
    """The float32 setting, as it was afterwards."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


def test_fast_fp32_stays_float32(setting):
    before = setting.fp32_precision
    assert not fast_fp32('cuda') and setting.fp32_precision == before
    if fast_fp32('cpu'):
        a, b = torch.randn(256, 768), torch.randn(768, 256)
        assert relative_error((a @ b).double(), a.double() @ b.double()) < 1e-6


def test_fast_fp32_is_taken_back_where_products_become_bf16(setting, monkeypatch):
    """As on a CPU that computes in bfloat16 as soon as it may."""
    before, real = setting.fp32_precision, torch.Tensor.__matmul__

    def product(a, b):
        allowed = a.dtype == torch.float32 and setting.fp32_precision == 'bf16'
        return real(a.bfloat16(), b.bfloat16()).float() if allowed else real(a, b)

    monkeypatch.setattr(torch.Tensor, '__matmul__', product)
    assert not fast_fp32('cpu') and setting.fp32_precision == before


def hub_like(folder, **changes):
    folder.mkdir()
    save_gpt(GPT(GPTConfig(50, 16, 1, 2, 8)), folder / 'm.safetensors')
    from safetensors.torch import load_file, save_file

    save_file(load_file(folder / 'm.safetensors'), folder / 'm.safetensors')  # drops our metadata
    config = {'model_type': 'gpt2', 'vocab_size': 50, 'n_positions': 16, 'n_layer': 1, 'n_head': 2, 'n_embd': 8, **changes}
    (folder / 'config.json').write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'model_type': 'llama'}, "'llama' model.*must be a gpt2"),
        ({'activation_function': 'relu'}, 'activation_function'),
        ({'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx'),
        ({'n_layer': 2}, ' tensors differ, first h.0'),
    ],
)
def test_another_model_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_gpt(hub_like(tmp_path / 'x', **changes))


def test_unreadable_files_are_refused_and_run_no_code(tmp_path):
    with pytest.raises(ValueError, match='no base model at'):
        load_gpt(str(tmp_path / 'nothing'))
    with pytest.raises(ValueError, match='neither'):
        load_gpt(str(tmp_path))
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}')
    (tmp_path / 'model.safetensors').write_bytes(b'not a model')
    with pytest.raises(ValueError, match='cannot be read as model weights'):
        load_gpt(str(tmp_path))

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / 'executed'), 'w'))

    (tmp_path / 'model.safetensors').unlink()
    torch.save({'wte.weight': Hostile()}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='cannot be read as model weights'):
        load_gpt(str(tmp_path))
    assert not (tmp_path / 'executed').exists()


def test_gpt2_124m_has_the_published_size():
    with torch.device('meta'):
        assert sum(p.numel() for p in GPT(GPTConfig()).parameters()) == 124_439_808
    assert set(model_file.HUB) == {'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'}


# ---- where it is ----------------------------------------------------------------------------------------------------------
NO_DEVICE = [
    '',
    'CPU',
    ' cpu',
    'cpu:0',
    'cpu:9',
    'auto',
    'cuda:',
    'cuda:x',
    'cuda:-1',
    'cuda:2',
    'cuda:99',
    'cuda:256',
    'cuda:01',
]
NO_DEVICE += [
    'cuda:\u0661',
    'cuda:99999999999999999999',
    'meta',
    'xla',
    'hip',
    'hpu',
    'xpu',
    'vulkan',
    'privateuseone',
    'mkldnn',
]


@pytest.mark.parametrize('gpus, mps', [(0, False), (2, False), (0, True)])
def test_a_device_is_one_of_this_machine(gpus, mps, monkeypatch, train, capsys):
    monkeypatch.setattr('torch.cuda.device_count', lambda: gpus)
    monkeypatch.setattr('torch.backends.mps.is_available', lambda: mps)
    here = ['cpu', *['cuda', 'cuda:0', 'cuda:1'] * (gpus > 0), *['mps'] * mps]
    assert [usable(device) for device in here] == here
    for device in {*NO_DEVICE, 'cuda', 'cuda:0', 'mps'} - {*here}:
        with pytest.raises(ValueError) as error:
            usable(device)
        assert str(error.value) == f'cannot use the device {device}: this machine has {", ".join(here)}; give --device=cpu'
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('LOCAL_RANK', '0')
    assert 'this machine has cpu' in refused(capsys, train, '--device=meta')
    if not gpus:
        assert 'cannot use the device cuda: this machine has cpu' in refused(capsys, train, '--device=cuda')


# ---- perplexity of a whole stream (METHOD 0.3) ---------------------------------------------------------------------------
@pytest.mark.parametrize('n', [2, 16, 17, 18, 40, 97])
def test_every_token_but_the_first_is_predicted_once(n, tiny):
    """Windows of 16 do not overlap, the last is shorter, and the mean is over tokens."""
    tokens = np.random.default_rng(0).integers(0, 257, n)
    result = evaluate(tiny.model, tokens, 16)
    total = 0.0
    with torch.no_grad():
        for start in range(0, n - 1, 16):
            window = torch.from_numpy(tokens[start : start + 17])
            logits = tiny.model(window[None, :-1])[0][0]
            total += F.cross_entropy(logits, window[1:], reduction='sum').item()
    assert result['tokens'] == n - 1 and result['loss'] == pytest.approx(total / (n - 1), rel=1e-5)
    assert result['ppl'] == pytest.approx(math.exp(result['loss']))


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    gpt = GPT(GPTConfig(50, 16, 1, 2, 8))
    for p in gpt.parameters():
        p.data.zero_()
    assert evaluate(gpt, np.arange(40), 16)['ppl'] == pytest.approx(50, rel=1e-5)


def test_evaluation_draws_nothing_and_changes_nothing(train):
    user = train().users[0]
    before = {name: p.clone() for name, p in user.model.named_parameters()}
    state = torch.get_rng_state()
    a, b = (evaluate(user.model, user.data['test'], 16) for _ in range(2))
    assert a == b and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in user.model.named_parameters())


def test_routing_shares(train):
    """Scores and top-1 shares sum to one in every layer, and are those of one forward over the same windows."""
    user = train('--method=comigs_1gxs', '--n_experts=3').users[0]
    tokens = user.data['test'][:33]
    result = evaluate(user.model, tokens, 16)
    assert np.allclose(np.sum(result['scores'], axis=1), 1) and np.allclose(np.sum(result['top1'], axis=1), 1)
    with torch.no_grad():
        routing = user.model(torch.from_numpy(tokens[:32].astype(np.int64)).view(2, 16))[1]
    assert np.allclose(result['scores'], torch.stack([r.probs.mean(0) for r in routing]), atol=1e-6)
    assert np.allclose(result['top1'][0], F.one_hot(routing[0].probs.argmax(-1), 3).float().mean(0))
