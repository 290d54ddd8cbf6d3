"""model.py is GPT-2: the oracle is transformers' GPT2LMHeadModel on a random small configuration."""

import json
import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused, relative_error
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
from lora_moe import add_lora, roles
from model import GPT, CrossEntropy, GPTConfig, choose, evaluate, fast_fp32, load_gpt, save_gpt, usable
from run.adapter import read_peft


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
    """gpt2 ... gpt2-xl go through huggingface_hub; here its functions answer with local files. What it cannot reach it is asked
    for once, then its cache."""
    import huggingface_hub

    folder, _ = hub_folder
    asked = []
    monkeypatch.setattr(huggingface_hub, 'get_hf_file_metadata', lambda url: asked.append(url))

    def answers(repo, file, local_files_only):
        asked.append((repo, file, local_files_only))
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', answers)
    repo, url = 'openai-community/gpt2-medium', 'https://huggingface.co/openai-community/gpt2-medium/resolve/main/config.json'
    assert load_gpt('gpt2-medium').config.n_embd == 32
    assert asked == [url, (repo, 'config.json', False), (repo, 'model.safetensors', False)]
    monkeypatch.setattr(huggingface_hub, 'get_hf_file_metadata', raiser(ConnectionError('no route')))
    assert load_gpt('gpt2-medium').config.n_embd == 32
    assert asked[3:] == [(repo, 'config.json', True), (repo, 'model.safetensors', True)]
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', raiser(FileNotFoundError('not cached')))
    with pytest.raises(OSError, match='cannot get openai-community/gpt2 .*connect once.*--init_from'):
        load_gpt('gpt2')


def raiser(error):
    def function(*args, **kwargs):
        raise error

    return function


def test_what_the_hub_refuses_is_one_line_with_advice_that_fits(monkeypatch, capfd, tmp_path):
    """The real client without retries, its lines and its warnings; a server on this machine, or none, answers for the Hub."""
    import huggingface_hub
    from huggingface_hub import constants

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(('127.0.0.1', 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here, nobody = f'http://127.0.0.1:{server.server_port}', 'http://127.0.0.1:9'
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    for status, endpoint, advice in (
        (401, here, '(401): check HF_ENDPOINT and HF_TOKEN (`hf auth login`)'),
        (403, here, '(403): check HF_ENDPOINT and HF_TOKEN'),
        (404, here, '(404): check HF_ENDPOINT'),
        (429, here, '(429): try again later'),
        (503, here, '(503): try again later'),
        (0, nobody, '(ConnectError): connect once'),
        ('offline', here, '(OfflineModeIsEnabled): unset HF_HUB_OFFLINE'),
    ):
        monkeypatch.setattr(constants, 'ENDPOINT', endpoint)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', endpoint + '/{repo_id}/resolve/{revision}/{filename}')
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', status == 'offline')
        start = time.monotonic()
        with pytest.raises(OSError) as error:
            load_gpt('gpt2')
        assert advice in str(error.value) and 'as the base' in str(error.value) and time.monotonic() - start < 4
        assert '\n' not in str(error.value) and capfd.readouterr() == ('', '')
    server.shutdown()
    full = OSError(28, 'No space left on device')
    monkeypatch.setattr(huggingface_hub, 'get_hf_file_metadata', lambda url: None)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', raiser(full))
    with pytest.raises(OSError, match='No space left on device: make room, or set HF_HOME'):
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
            assert relative_error(CrossEntropy.apply(x, W, y), loss.detach()) <= (0 if dtype == torch.float32 else 1e-3)
        plain = F.cross_entropy(F.linear(b, W).float(), y)
        (3 * plain).backward()
    assert loss.dtype == a.grad.dtype == torch.float32
    assert relative_error(loss.detach(), plain.detach()) < 1e-5
    assert relative_error(a.grad, b.grad) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize('offset', [0.0, -100.0, -150.0, 1000.0])
def test_what_all_logits_have_in_common_does_not_matter_in_bfloat16(offset):
    """softmax is the same whatever is added to all logits. Rounded to bfloat16, -100 + z would be a multiple of 1/2."""
    torch.manual_seed(0)
    x, W, y = torch.randn(512, 32).bfloat16().float(), torch.randn(300, 32).bfloat16().float(), torch.randint(300, (512,))
    x[:, 0], W[:, 0] = offset, 1.0
    exact = F.cross_entropy(F.linear(x.double(), W.double()), y)
    model = GPT(GPTConfig(300, 16, 1, 2, 32))
    model.wte.weight.data = W.bfloat16()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert abs(CrossEntropy.apply(x, W, y) - exact) < 5e-3
        logits = model.head(x)
    assert abs(F.cross_entropy(logits, y) - exact) < 1e-3


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


FIRST_CALL = """
import torch, model
x = torch.randn(512, 512)
for _ in range(20):
    x.mul(2), x @ x  # torch's threads and MKL's are up
y = -20 * torch.rand(256, 49152)
for _ in range(20):
    x.mul(2)
assert torch.equal(y.exp(), y.exp())
"""


def test_the_first_exponential_of_a_process_is_as_accurate_as_the_second():
    """Without the first calls in model.py one of two processes fails here on a processor with AVX-512."""
    for _ in range(4):
        env = {**os.environ, 'OMP_NUM_THREADS': '2', 'PYTHONPATH': str(Path(model_file.__file__).parent)}
        subprocess.run([sys.executable, '-c', FIRST_CALL], env=env, check=True)


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


# ---- what is no base: one line that says what it is, and what to do ---------------------------------------------------
def hub_base(folder) -> dict:
    """As hub_like, but it does load: linears are (in, out). Returns what it loads."""
    file = Path(hub_like(folder)) / 'm.safetensors'
    ours = load_file(file)
    save_file({n: t.t().contiguous() if n.endswith(model_file.TRANSPOSED) else t for n, t in ours.items()}, file)
    return ours


def is_base(source, tensors) -> bool:
    found = load_gpt(str(source)).state_dict()
    return found.keys() == tensors.keys() and all(t.dtype == torch.float32 and t.equal(tensors[n]) for n, t in found.items())


def refusal(source) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        load_gpt(str(source))
    assert '\n' not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


def test_which_file_of_a_folder(tmp_path):
    """What an index lists, else the Hub's name, else the only one; safetensors first, hidden files and folders never."""
    folder = tmp_path / 'base'
    sound, whole = hub_base(folder), load_file(folder / 'm.safetensors')
    other = {name: t + 1 for name, t in whole.items()}

    (folder / '._m.safetensors').write_bytes(b'\0\5\x16\7')
    (folder / 'old.safetensors').mkdir()
    assert is_base(folder, sound)
    torch.save(other, folder / 'pytorch_model.bin')
    assert is_base(folder, sound)
    save_file(other, folder / 'model_step100.safetensors')
    (folder / 'pytorch_model.bin').unlink()
    assert 'holds m.safetensors, model_step100.safetensors: expected model.safetensors' in refusal(folder)
    (folder / 'm.safetensors').rename(folder / 'model.safetensors')
    assert is_base(folder, sound)
    parts = [dict(list(whole.items())[i::2]) for i in range(2)]
    for part, name in zip(parts, 'ab'):
        save_file(part, folder / f'{name}.safetensors')
    index, weight_map = folder / 'model.safetensors.index.json', {n: f'{"ab"[i]}.safetensors' for i in (0, 1) for n in parts[i]}
    save_file(other, folder / 'model.safetensors')
    index.write_text(json.dumps({'weight_map': weight_map}))
    assert is_base(folder, sound)
    assert 'b.safetensors is one of 2 files' in refusal(folder / 'b.safetensors')
    assert not is_base(folder / 'model_step100.safetensors', sound)  # in no index
    for spoilt, message in (
        ('[]', 'cannot be read as a JSON object'),
        ('{}', 'lists nothing'),
        ('{"weight_map": {}}', 'lists nothing'),
        ('{"weight_map": ["a.safetensors"]}', 'lists nothing'),
        ('{"weight_map": {"x": 3}}', 'lists 3: expected files'),
        ('{"weight_map": {"x": "c.safetensors"}}', 'lists c.safetensors: expected files'),
        ('{"weight_map": {"x": "../base/a.safetensors"}}', 'lists ../base/a.safetensors'),
        (json.dumps({'weight_map': {'x': str(tmp_path / 'a.safetensors')}}), 'expected files beside it'),
        ('{"weight_map": {"x": ".."}}', 'lists ..: expected files'),
        ('{"weight_map": {"x": ""}}', 'expected files beside it'),
    ):
        index.write_text(spoilt)
        assert message in refusal(folder), spoilt
    index.write_text(json.dumps({'weight_map': weight_map}))
    save_file({**parts[1], 'wte.weight': whole['wte.weight'], 'ln_f.bias': whole['ln_f.bias']}, folder / 'b.safetensors')
    save_file({**parts[0], 'wte.weight': whole['wte.weight'], 'ln_f.bias': whole['ln_f.bias']}, folder / 'a.safetensors')
    assert 'twice' in refusal(folder)
    index.unlink()
    save_file({**whole, 'transformer.wpe.weight': other['wpe.weight']}, folder / 'model.safetensors')
    assert 'wpe.weight twice' in refusal(folder)


def test_a_head_of_its_own(tmp_path):
    source, sound = tmp_path / 'x', hub_base(tmp_path / 'x')
    whole = load_file(file := source / 'm.safetensors')
    table = whole['wte.weight']
    for head, fits in (
        (table.clone(), True),
        (table + 1e-6, False),
        (table[:-1], False),
        (torch.full_like(table, torch.nan), False),
    ):
        for name in ('lm_head.weight', 'transformer.lm_head.weight'):
            save_file({**whole, name: head.clone()}, file)
            if fits:
                assert is_base(source, sound)
            else:
                assert 'lm_head.weight of the base is not its wte.weight: expected tied embeddings' in refusal(source)


@pytest.mark.parametrize('field', ['vocab_size', 'n_positions', 'n_layer', 'n_head', 'n_embd', 'layer_norm_epsilon'])
def test_every_field_of_a_config_is_checked(field, tmp_path):
    """In the Hub's config.json and in our own metadata."""
    source, tensors = tmp_path / 'x', hub_base(tmp_path / 'x')
    file, config = source / 'config.json', json.loads((source / 'config.json').read_text())
    own = asdict(GPTConfig(50, 16, 1, 2, 8))
    values = [0, -1, None, True, False, '8', '', [8], {}, math.nan, math.inf, -math.inf, 10**9, 10**400]
    values += [] if field == 'layer_norm_epsilon' else [2.0, 2**63]
    values += [3] if field == 'n_head' else []
    for value in values:
        file.write_text(json.dumps({**config, field: value}))
        assert (
            'config.json: n_embd=8 is no multiple of n_head=3' in (said := refusal(source)) or f'config.json: {field}=' in said
        )
        save_file(tensors, tmp_path / 'own.safetensors', {'gpt_config': json.dumps({**own, field: value})})
        assert f'gpt_config in {tmp_path}' in refusal(tmp_path / 'own.safetensors')
    short = {name: value for name, value in own.items() if name != field}
    for text, message in {
        **dict.fromkeys((json.dumps(short), json.dumps({**own, 'new': 1}), '{}'), 'write the file again with save_gpt'),
        **dict.fromkeys(('', '{', '[]', 'null', '3', '"x"', '[' * 100000), 'own.safetensors cannot be read as a JSON object'),
    }.items():
        save_file(tensors, tmp_path / 'own.safetensors', {'gpt_config': text})
        assert message in refusal(tmp_path / 'own.safetensors')
    for text in ('', '{', '[]', 'null', '3', '\udcff', '[' * 100000, '{"n_layer": ' + '9' * 5000 + '}'):
        file.write_bytes(text.encode(errors='surrogateescape'))
        assert 'config.json cannot be read as a JSON object' in refusal(source)
    file.unlink()
    assert 'config.json cannot be read as a JSON object {...}: No such file or directory' in refusal(source)


LFS = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n'
NO_WEIGHTS = {  # a file's bytes: what is said of them
    LFS: 'it is a Git LFS pointer, and `git lfs pull` gets the file itself',
    b'<!DOCTYPE html>\n<title>404</title>': "text that begins with '<!DOCTYPE html>",
    b'\xef\xbb\xbf<html>': 'maybe of a failed download: get it again',
    b'Entry not found': "text that begins with 'Entry not found'",
    b'': 'it is empty, cut short, damaged',
    b'GGUF\3\0\0\0\0\0': 'or of another format',
    b'\x89HDF\r\n\x1a\n\0\0': 'or of another format',
    b'\xff' * 100: 'it is empty, cut short, damaged or of another format: copy or download it again',
    b'\x10\0\0\0\0\0\0\0' + b'{"a": [' + b' ' * 9: 'cut short, damaged',
}


def test_what_is_no_file_of_weights(tmp_path):
    """In the base's place and in an adapter's; as a file and as the folder around it."""
    (tmp_path / 'adapter_config.json').write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
    hub_like(tmp_path / 'x')
    whole = (tmp_path / 'x' / 'm.safetensors').read_bytes()
    for raw, message in {**NO_WEIGHTS, whole[:-1]: 'cut short', whole[:100]: 'cut short'}.items():
        for name in ('model.safetensors', 'adapter_model.safetensors'):
            (tmp_path / name).write_bytes(raw)
        assert message in refusal(tmp_path) and message in refusal(tmp_path / 'model.safetensors')
        with pytest.raises(ValueError, match='cannot be read as model weights') as error:
            read_peft(tmp_path, {}, 16)
        assert message in str(error.value)
        (tmp_path / 'adapter_config.json').write_bytes(raw)
        with pytest.raises(ValueError, match='adapter_config.json cannot be read as a JSON object'):
            read_peft(tmp_path, {}, 16)
        (tmp_path / 'adapter_config.json').write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
    torch.save({'model': {'wte.weight': torch.ones(2)}, 'iter_num': 3}, tmp_path / 'ckpt.pt')
    torch.save({'wte.weight': torch.ones(2)}, tmp_path / 'plain.pth')
    for name in ('model.onnx', 'model.gguf', 'tf_model.h5', 'old.ckpt'):
        (tmp_path / name).write_bytes(b'\x08\7\0\0' * 20)
    for name in ('ckpt.pt', 'plain.pth', 'model.onnx', 'model.gguf', 'tf_model.h5', 'old.ckpt'):
        assert 'not tensors alone in a format that is read: write it with save_pretrained' in refusal(tmp_path / name)
    (tmp_path / 'model.safetensors').unlink()
    (tmp_path / 'adapter_model.safetensors').unlink()
    meta, sparse = torch.ones(2, device='meta'), torch.ones(2, 2).to_sparse()
    (tmp_path / 'ckpt.pt').rename(tmp_path / 'pytorch_model.bin')
    assert 'not tensors alone' in refusal(tmp_path)
    for odd in ([torch.ones(2)], torch.ones(2), {3: torch.ones(2)}, {'wte.weight': meta}, {'wte.weight': sparse}, {'a': None}):
        torch.save(odd, tmp_path / 'pytorch_model.bin')
        assert 'not tensors alone' in refusal(tmp_path)
    (tmp_path / 'model.safetensors').mkdir()
    assert 'model.safetensors cannot be read as model weights: Is a directory' in refusal(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / 'model.safetensors').write_bytes(b'x')
    monkeypatch.setattr('builtins.open', raiser(PermissionError(13, 'Permission denied')))
    assert 'Permission denied, expected a file that can be read' in model_file.what_it_is(tmp_path / 'model.safetensors')


def test_an_adapter_in_the_bases_place_and_the_other_way_round(tmp_path):
    names = [
        'base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight',
        'h.0.mlp.generalists.0.c_fc.A',
        'h.0.attn.c_attn.lora.A',
    ]
    for name in (*names, 'adapter/h.0.mlp.specialists.1.c_fc.B'):
        save_file({name: torch.ones(2, 2)}, tmp_path / 'adapter_model.safetensors')
        for source in (tmp_path, tmp_path / 'adapter_model.safetensors'):
            assert 'adapter_model.safetensors is an adapter: expected its base' in refusal(source)
    for place in (tmp_path, tmp_path / 'adapter_model.safetensors', hub_like(tmp_path / 'x'), tmp_path / 'nowhere'):
        with pytest.raises(ValueError, match='is no PEFT adapter: expected a folder with adapter_config.json'):
            read_peft(Path(place), {}, 16)


def test_numbers_of_a_base(tmp_path):
    """Whatever float32 holds is taken, as before; nothing that is not finite or not floating."""
    sound, source, file = hub_base(tmp_path / 'x'), tmp_path / 'x', tmp_path / 'x' / 'm.safetensors'
    whole = load_file(file)
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        save_file({name: t.to(dtype) for name, t in whole.items()}, file)
        assert is_base(source, {name: t.to(dtype).float() for name, t in sound.items()})
    table = whole['wte.weight']
    one = torch.zeros_like(table, dtype=torch.float64)
    one[3, 4] = 1
    bad = [one.int(), one.long(), one.bool(), one.to(torch.uint8), one.to(torch.complex64)]
    bad += [table.where(one == 0, x) for x in (math.nan, math.inf, -math.inf)] + [one * 1e300]
    bad += [one.float().mul(math.nan).to(torch.float8_e4m3fn), one.mul(math.inf).half()]
    for t in bad:
        save_file({**whole, 'wte.weight': t}, file)
        assert f'wte.weight ({t.dtype}) must be of floating point, and all finite' in refusal(source)
    own = {'gpt_config': json.dumps(asdict(GPTConfig(50, 16, 1, 2, 8)))}
    save_file({**sound, 'h.0.ln_1.bias': torch.full((8,), math.nan)}, tmp_path / 'own.safetensors', own)
    assert 'h.0.ln_1.bias' in refusal(tmp_path / 'own.safetensors')
    save_file({**whole, 'h.0.attn.bias': torch.ones(1, 1, 16, 16).bool()}, file)  # the Hub's mask is no weight
    assert is_base(source, sound)


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
    for name, text in {'WORLD_SIZE': '2', 'RANK': '0', 'LOCAL_RANK': '0', 'MASTER_ADDR': 'x', 'MASTER_PORT': '1'}.items():
        monkeypatch.setenv(name, text)
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
