"""llama.py is the Llama family: the oracle is transformers on small random configurations. And the method runs on it."""

import itertools
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import N_TRAIN, ROOT, devices, relative_error, same, trainer
from safetensors.torch import load_file, save_file
from test_methods import SHORT
from test_model import raiser

import eval as eval_file
import federate
import llama as llama_file
import user as user_file
from config.default import METHODS
from data.stream import get_batch
from llama import Attention, Llama, LlamaConfig, Normalise, RMSNorm, load_base, rotate, rotations, to_hub
from lora_moe import GhostNoise, add_lora, initial, roles
from model import GPT, GPTConfig, attend, fingerprint, load_gpt, on_hub, save_gpt, store_in_bf16

TINY = LlamaConfig(257, 16, 24, 2, 2, 1, 8, 32, 1e-5, 1e4)
LLAMA3 = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 64}
SMOLLM2 = ROOT / 'bases/smollm2'


def random_llama(config: LlamaConfig = TINY, std: float = 0.2) -> Llama:
    """Values that are far from zero, and from one in the norms."""
    torch.manual_seed(0)
    llama = Llama(config).eval()
    for p in llama.parameters():
        torch.nn.init.normal_(p, std=std)
    return llama


def tokens(B: int, T: int, V: int = 101) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))


def user_of(base: Llama, n_experts: int, **how) -> Llama:
    """A user's model whose own tensors are far from zero, too."""
    user = add_lora(base, **{'n_experts': n_experts, 'n_generalists': 1, 'rank': 4, **how})
    for name, p in user.named_parameters():
        if name in roles(user):
            torch.nn.init.normal_(p.data, std=2.0 if 'router' in name else 0.2)
    return user


# ---- the oracle --------------------------------------------------------------------------------------------------------
CASES = {  # family, what differs from transformers' small configuration below, tokens
    'llama tied': ('Llama', {'tie_word_embeddings': True}, 160),
    'llama untied': ('Llama', {'num_key_value_heads': 4}, 160),
    'own head_dim': ('Llama', {'head_dim': 12, 'num_key_value_heads': 1}, 24),
    'llama 3': ('Llama', {'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 5e5, **LLAMA3}, 'head_dim': 32}, 160),
    'qwen2': ('Qwen2', {'tie_word_embeddings': True}, 160),
    'qwen2, a window that is off': ('Qwen2', {'use_sliding_window': False, 'sliding_window': 8}, 24),
    'mistral': ('Mistral', {'sliding_window': 20, 'head_dim': 10}, 20),
}


def saved_by_transformers(folder: Path, family: str, changes: dict, **how):
    """The oracle, whose folder in the Hub's format is written."""
    transformers = pytest.importorskip('transformers')
    shape = dict(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=False)
    torch.manual_seed(1)
    config = getattr(transformers, f'{family}Config')(**shape | changes)
    oracle = getattr(transformers, f'{family}ForCausalLM')(config).eval()
    for p in oracle.parameters():
        torch.nn.init.normal_(p, std=0.2)
    oracle.save_pretrained(folder, **how)
    return oracle


@pytest.mark.parametrize('case', CASES)
def test_logits_loss_and_gradients_equal_transformers(case, tmp_path):
    """With gradients, where attention is explicit up to 128 tokens, and without, where it is SDPA."""
    family, changes, T = CASES[case]
    oracle, idx = saved_by_transformers(tmp_path, family, changes), tokens(2, T)
    ours = load_base(str(tmp_path))
    assert isinstance(ours, Llama) and ours.tokenizer is None and all(p.dtype == torch.float32 for p in ours.parameters())
    expected = oracle(idx).logits
    for part in (idx, idx[:, : min(T, 128)]):
        assert (ours(part)[0] - expected[:, : part.shape[1]]).abs().max() < 1e-5
    with torch.no_grad():
        assert (ours(idx)[0] - expected).abs().max() < 1e-5
    theirs = F.cross_entropy(expected[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
    theirs.backward()
    loss = ours.loss(idx[:, :-1], idx[:, 1:])[0]
    loss.backward()
    gradients, wanted = to_hub(ours, {name: p.grad for name, p in ours.named_parameters()}), dict(oracle.named_parameters())
    assert gradients.keys() == wanted.keys() and abs(loss - theirs) < 1e-5
    assert all(relative_error(g, wanted[name].grad) < 1e-5 for name, g in gradients.items())
    assert abs(ours.requires_grad_(False).loss(idx[:, :-1], idx[:, 1:])[0] - theirs) < 1e-5  # a frozen head
    if family == 'Mistral':  # beyond its window a token would no longer see all before it
        with pytest.raises(ValueError, match='21 tokens.*20 positions'):
            ours(tokens(1, 21))


def test_the_layouts_that_a_base_comes_in(tmp_path):
    """In parts, as a pickle with an older configuration and buffers, in half precision, with a tied head twice."""
    oracle = saved_by_transformers(tmp_path / 'x', 'Llama', CASES['llama 3'][1], max_shard_size='10KB')
    idx, state = tokens(2, 40), {name: t.clone() for name, t in oracle.state_dict().items()}
    with torch.no_grad():
        expected = oracle(idx).logits
        assert len([*(tmp_path / 'x').glob('model-*.safetensors')]) > 2
        assert (load_base(str(tmp_path / 'x'))(idx)[0] - expected).abs().max() < 1e-5
        config = json.loads((tmp_path / 'x/config.json').read_text())
        del config['rope_parameters']
        config |= {'rope_theta': 5e5, 'rope_scaling': {'rope_type': 'llama3', **LLAMA3}}
        (tmp_path / 'config.json').write_text(json.dumps(config))
        torch.save({**state, 'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(16)}, tmp_path / 'pytorch_model.bin')
        assert (load_base(str(tmp_path))(idx)[0] - expected).abs().max() < 1e-5
        for dtype in (torch.bfloat16, torch.float16):
            save_file({name: t.to(dtype) for name, t in state.items()}, tmp_path / 'model.safetensors')
            rounded = {name: t.to(dtype).float() for name, t in state.items()}
            assert same(to_hub(load_base(str(tmp_path))), rounded)
        (tmp_path / 'config.json').write_text(json.dumps({**config, 'tie_word_embeddings': True}))
        save_file({**state, 'lm_head.weight': state['model.embed_tokens.weight'].clone()}, tmp_path / 'model.safetensors')
        assert to_hub(load_base(str(tmp_path))).keys() == state.keys() - {'lm_head.weight'}


@pytest.mark.slow
def test_a_real_base_equals_transformers():
    if not (SMOLLM2 / 'model.safetensors').exists():
        pytest.skip('no bases/smollm2')
    transformers = pytest.importorskip('transformers')
    ours, idx = load_base(str(SMOLLM2)), tokens(2, 160, 49152)
    assert ours.config == LlamaConfig(rms_norm_eps=ours.config.rms_norm_eps) and ours.tokenizer == SMOLLM2 / 'tokenizer.json'
    with torch.no_grad():
        expected = transformers.LlamaForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)(idx).logits
        logits = ours(idx)[0]
    assert (logits - expected).abs().max() < 1e-4 and torch.equal(logits.argmax(-1), expected.argmax(-1))


# ---- its parts against plain formulas ------------------------------------------------------------------------------------
def test_the_derivative_of_rms_norm():
    """Against finite differences in float64, and autograd of x / sqrt(mean(x²) + ε) * weight in float32."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True), torch.randn(8, dtype=torch.float64)
    assert torch.autograd.gradcheck(Normalise.apply, (x, weight.requires_grad_(), 0.1))
    x, weight, dy = torch.randn(4, 5, 64) * 3, torch.randn(64), torch.randn(4, 5, 64)
    grads = []
    for norm in (Normalise.apply, lambda x, w, eps: x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        y = norm(*leaves, 1e-5)
        grads.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(*grads))
    frozen = x.clone().requires_grad_()
    Normalise.apply(frozen, weight, 1e-5).backward(dy)
    assert torch.equal(frozen.grad, grads[0][1]) and weight.grad is None


def test_norms_residuals_and_logits_stay_float32_under_bfloat16():
    """And weights that are kept in bfloat16 give the products that autocast gives."""
    llama, idx, seen = random_llama(replace(TINY, qkv_bias=True)), tokens(2, 24), []
    for block in llama.h:
        block.ln_2.register_forward_hook(lambda norm, x, y: seen.extend((x[0].dtype, y.dtype)))
    with torch.no_grad():
        exact = llama(idx)[0]
        with torch.autocast('cpu', torch.bfloat16):
            logits = llama(idx)[0]
            store_in_bf16(llama)
            assert {n for n, p in llama.named_parameters() if p.dtype == torch.float32} == {
                n for n in llama.state_dict() if 'ln_' in n
            }
            stored = llama(idx)[0]
    assert {*seen} == {torch.float32} and logits.dtype == stored.dtype == torch.float32
    assert relative_error(logits, exact) < 0.05 and relative_error(stored, logits) < 0.02
    assert RMSNorm(TINY)(torch.ones(1, 1, 16).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize('S, T', [(0, 9), (5, 1), (7, 3)])
def test_rotary_positions_are_complex_multiplication(S, T):
    """Pair i of a head is x_i + j x_{i + D/2}; position p turns it by e^{j p theta^(-2i/D)}, so that products of queries and
    keys depend on the distance alone."""
    x, D = torch.randn(2, 3, T, 8, generator=torch.Generator().manual_seed(0)), 8
    pairs = torch.complex(x[..., : D // 2], x[..., D // 2 :]).to(torch.complex128)
    p = torch.arange(S, S + T, dtype=torch.float64)[:, None]
    angle = p * 1e4 ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D)  # (T, D/2)
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    turned = torch.cat((turned.real, turned.imag), -1).float()
    assert torch.allclose(rotate(x, *rotations(TINY, S, T, x.device)), turned, atol=1e-5)


def test_grouped_queries_share_keys_and_values():
    """As if every group's keys and values were repeated for each of its heads; T beyond 128 and without gradients is SDPA."""
    for T, grad in ((9, True), (9, False), (130, True)):
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, heads, T, 4) for heads in (6, 2, 2))
        with torch.set_grad_enabled(grad):
            y = attend(q, k, v)
        k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)  # (B, H, T, D) each
        scores = (q @ k.transpose(-2, -1) / 2).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        assert torch.allclose(y, (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), atol=1e-6)
    assert Attention(TINY).k_proj.weight.shape == (8, 16) and Attention(TINY).q_proj.weight.shape == (16, 16)


@torch.no_grad()
def test_causality():
    llama, idx = random_llama(), tokens(1, 16)
    a, b = llama(idx)[0][0], llama(torch.cat((idx[:, :9], (idx[:, 9:] + 1) % 257), 1))[0][0]
    assert torch.equal(a[:9], b[:9]) and (a[9:] != b[9:]).any(1).all()


@pytest.mark.parametrize('experts', [0, 2])
@torch.no_grad()
def test_the_cache_does_not_change_the_text(experts):
    """Keys are kept as they were turned. Beyond the 32 positions the window slides, and positions begin again."""
    llama = user_of(random_llama(), experts) if experts else random_llama()
    whole, cache = llama(idx := tokens(3, 32))[0], [[] for _ in llama.h]
    parts = [llama.head(llama.hidden(part, cache)[0]) for part in (idx[:, :5], *idx[:, 5:].split(1, 1))]
    assert relative_error(torch.cat(parts, 1), whole) < 1e-6 and cache[0][0].shape == (3, 1, 32, 8)
    for how in (dict(temperature=0), dict(temperature=0.8, top_k=20, seed=3)):
        assert torch.equal(*(llama.generate(idx[:, :4], 40, **how, cached=cached) for cached in (True, False)))
    greedy = llama.generate(idx[:, :4], 40, temperature=0)
    assert torch.equal(llama(greedy[:, -33:-1])[0][:, -1].argmax(-1), greedy[:, -1])


# ---- what is no base: one line that names the field ------------------------------------------------------------------------
def hub_folder(folder: Path, **changes) -> tuple[Path, dict, dict]:
    """A tiny Llama in the Hub's format: (folder, its config.json, its tensors)."""
    folder.mkdir(exist_ok=True)
    config = {'model_type': 'llama', **asdict(TINY), 'rope_scaling': None, **changes}
    tensors = to_hub(random_llama(replace(TINY, tie_word_embeddings=config['tie_word_embeddings'])))
    (folder / 'config.json').write_text(json.dumps(config))
    save_file(tensors, folder / 'model.safetensors')
    return folder, config, tensors


def refusal(source: Path | str) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        load_base(str(source))
    assert '\n' not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


FAULTS = [  # what config.json says, what is answered; where it is the field and its value, that alone
    ({'hidden_act': 'gelu'}, "hidden_act='gelu' is not a llama as released ('silu')"),
    {'attention_bias': True}, {'mlp_bias': True}, {'partial_rotary_factor': 0.5}, {'quantization_config': {'bits': 4}},
    ({'rope_parameters': {'rope_theta': 1e4, 'partial_rotary_factor': 0.5}}, 'partial_rotary_factor=0.5'),
    ({'rope_parameters': {'rope_theta': 1e4, 'rope_type': []}}, 'rope_type=[]'),
    ({'rope_parameters': {'rope_theta': '1e4'}}, "rope_theta='1e4'"),
    ({'rope_parameters': {'rope_theta': None}}, 'no rope_theta'),
    ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "rope_type='linear'"),
    ({'rope_scaling': 3}, 'an object for rope_scaling'),
    *(({key: {'rope_type': kind, 'factor': 2.0}}, f"rope_type='{kind}'")
      for key in ('rope_scaling', 'rope_parameters') for kind in ('yarn', 'dynamic', 'longrope')),
    *(({'rope_scaling': {'rope_type': 'llama3', **LLAMA3, key: value}}, 'rope_scaling=')
      for key in LLAMA3 for value in (None, '8', [], True, 0, -1.0, math.nan, math.inf, 10**400)),
    ({'rope_scaling': {'rope_type': 'llama3', **LLAMA3, 'low_freq_factor': 4.0}}, 'low_freq_factor the smaller one'),
    ({'num_key_value_heads': 3}, 'num_attention_heads=2, num_key_value_heads=3'),
    ({'head_dim': 7}, 'head_dim=7: expected a multiple of the second, and an even last one'),
    ({'hidden_size': '16', 'head_dim': None}, "hidden_size='16'"),
    ({'num_attention_heads': 0, 'head_dim': None}, 'num_attention_heads=0'),
    *(({'sliding_window': value}, 'sliding_window') for value in (0, -1, '8', 8.0, [], True)),
    *(({'model_type': kind}, f'model_type={kind!r}, expected one of gpt2, llama, mistral, qwen2')
      for kind in ('gemma', 'LLAMA', '', None, 3, [], ['llama'], {}, True)),
    ({'num_hidden_layers': 3}, 'tensors differ, first h.2.'),
    ({'intermediate_size': 25}, 'tensors differ, first h.0.mlp.down_proj.weight: expected (16, 25), found (16, 24)'),
    ({'model_type': 'qwen2'}, 'first h.0.attn.k_proj.bias: expected (8,), found nothing'),
    ({'tie_word_embeddings': False}, 'first lm_head.weight: expected (257, 16), found nothing'),
]  # fmt: skip
FAULTS = [fault if isinstance(fault, tuple) else (fault, '{}={!r}'.format(*[*fault.items()][0])) for fault in FAULTS]


@pytest.mark.parametrize('changes, message', FAULTS, ids=[f'{changes}'[:60] for changes, _ in FAULTS])
def test_what_is_not_as_released_is_refused(changes, message, tmp_path):
    folder, config, _ = hub_folder(tmp_path)
    (folder / 'config.json').write_text(json.dumps({**config, **changes}))
    said = refusal(folder)
    assert message in said and str(folder) in said


@pytest.mark.parametrize('field', [f for f in asdict(TINY) if f not in ('rope_scaling', 'qkv_bias')])
def test_every_field_of_a_config_is_checked(field, tmp_path):
    """In the Hub's config.json and in our own metadata."""
    folder, config, _ = hub_folder(tmp_path / 'x')
    own, file, tensors = asdict(TINY), tmp_path / 'own.safetensors', random_llama().state_dict()
    number = field != 'tie_word_embeddings'
    values = ['8', '', [], {}, [8], *([True, 0, -1, math.nan, math.inf, -math.inf, 10**13, 10**400] if number else [0, 1.0])]
    values += [2.5] if number and field != 'rope_theta' else []
    values += [1025] if field == 'num_hidden_layers' else []  # layers are built before they are compared
    for value in values:
        (folder / 'config.json').write_text(json.dumps({**config, field: value}))
        assert field in refusal(folder), value
        save_file(tensors, file, {'llama_config': json.dumps({**own, field: value})})
        assert f'llama_config in {file}: {field}=' in refusal(file), value
    for change in ({field: None}, {}):
        without = [{name: value for name, value in given.items() if name != field} | change for given in (config, own)]
        (folder / 'config.json').write_text(json.dumps(without[0]))
        if field in ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads'):
            assert f'config.json has no {field}: copy config.json of the base again' in refusal(folder)
        save_file(tensors, file, {'llama_config': json.dumps(without[1])})
        assert 'llama_config in' in refusal(file)
    for change in ({'qkv_bias': 0}, {'rope_scaling': 3}, {'rope_scaling': [1, 2]}, {'num_key_value_heads': 3}, {'new': 1}):
        save_file(tensors, file, {'llama_config': json.dumps({**own, **change})})
        assert ('write the file again' if 'new' in change else '{}={}'.format(*[*change.items()][0])) in refusal(file)
    if field == 'max_position_embeddings':
        (folder / 'config.json').write_text(json.dumps({**config, field: None}))
        assert field in refusal(folder)


def test_tensors_that_are_not_the_bases(tmp_path):
    folder, _, tensors = hub_folder(tmp_path)
    head, embedding = 'lm_head.weight', 'model.embed_tokens.weight'
    for change, message in (
        ({head: tensors[embedding] + 1}, 'lm_head.weight of the base is not its wte.weight: expected tied embeddings'),
        ({'model.layers.9.mlp.up_proj.weight': torch.ones(2)}, 'first h.9.mlp.up_proj.weight: expected nothing, found (2,)'),
        ({'model.norm.weight': None}, 'first ln_f.weight: expected (16,), found nothing'),
        ({'norm.weight': torch.ones(16)}, 'twice'),
        ({'model.norm.weight': torch.full((16,), math.nan)}, 'ln_f.weight (torch.float32) must be of floating point, and all'),
        ({'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight': torch.ones(2)}, 'is an adapter: expected its base'),
        ({'h.0.mlp.specialists.0.up_proj.A': torch.ones(2)}, 'is an adapter: expected its base'),
    ):
        save_file({n: t for n, t in {**tensors, **change}.items() if t is not None}, folder / 'model.safetensors')
        assert message in refusal(folder)
    with pytest.raises(ValueError, match="'llama' model, but the base must be a gpt2"):
        load_gpt(str(hub_folder(tmp_path)[0]))


def test_a_window_shorter_than_block_size_is_too_few_positions(tiny, tmp_path, capsys):
    folder, *_ = hub_folder(tmp_path / 'mistral', model_type='mistral', sliding_window=8)
    assert load_base(str(folder)).config.n_positions == 8
    with pytest.raises(SystemExit):
        trainer(SimpleNamespace(base=folder, data=tiny.data), tmp_path)()
    assert 'the base has no more positions' in capsys.readouterr().err and not (tmp_path / 'run').exists()


def test_own_format_round_trip(tmp_path):
    """Also in bfloat16, with Llama 3's scaling, a head of its own and the tokenizer beside it; GPT-2 stays GPT-2."""
    config = replace(TINY, rope_scaling=(8.0, 1.0, 4.0, 16), qkv_bias=True, tie_word_embeddings=False)
    a, folder = random_llama(config), tmp_path / 'llama_config'
    folder.mkdir()
    save_gpt(a, file := folder / 'a.safetensors')
    (folder / 'tokenizer.json').write_text('{}')
    for source in (file, folder):
        b = load_base(str(source))
        assert b.config == config and same(a.state_dict(), b.state_dict()) and fingerprint(a) == fingerprint(b)
        assert b.tokenizer == folder / 'tokenizer.json'
    save_gpt(a, file, torch.bfloat16)
    assert same(load_base(str(file)).state_dict(), {n: t.bfloat16().float() for n, t in a.state_dict().items()})
    save_gpt(gpt := GPT(GPTConfig(50, 16, 1, 2, 8)), file)
    assert type(load_base(str(file))) is GPT and fingerprint(load_base(str(file))) == fingerprint(gpt)


# ---- the Hub ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub.folder answers for a repository of the Hub, hub.cached names what its cache has, too; hub.asked is what was asked
    for. hub.down: from which file on no connection is made. hub.absent: what the cache knows not to exist."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    here = SimpleNamespace(folder=hub_folder(tmp_path / 'hub')[0], asked=[], cached=set(), absent=set(), down=None)

    no = SimpleNamespace(status_code=404, headers={}, request=None)

    def answer(repo, name, local_files_only):
        here.asked.append((name, 'cache' if local_files_only else repo))
        if local_files_only and name not in here.cached or not local_files_only and name == here.down:
            raise LocalEntryNotFoundError(f'{name} is not here')
        if not (here.folder / name).exists():
            raise RemoteEntryNotFoundError(f'404: no {name}', response=no)
        here.cached.add(name)
        return str(here.folder / name)

    monkeypatch.setattr(huggingface_hub, 'get_hf_file_metadata', lambda url: None)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', answer)
    monkeypatch.setattr(huggingface_hub, 'try_to_load_from_cache', lambda repo, name: name in here.absent or None)
    return here


def test_names_of_the_hub_are_downloaded(hub, monkeypatch):
    """Short names and owner/name; of a Llama the tokenizer.json, if there is one; what cannot be reached, from the cache."""
    import huggingface_hub

    assert load_base('someone/a-llama.1').tokenizer is None
    assert [name for name, _ in hub.asked] == ['config.json', 'model.safetensors', 'tokenizer.json']
    (hub.folder / 'tokenizer.json').write_text('{}')
    assert load_base('smollm2-135m').tokenizer == hub.folder / 'tokenizer.json'
    assert hub.asked[-1] == ('tokenizer.json', 'HuggingFaceTB/SmolLM2-135M')
    monkeypatch.setattr(huggingface_hub, 'get_hf_file_metadata', raiser(ConnectionError('no route')))
    hub.asked.clear()
    assert load_base('someone/x').tokenizer and {where for _, where in hub.asked} == {'cache'}
    assert {**llama_file.HUB}.keys() >= {'gpt2', 'smollm2-360m', 'qwen2.5-0.5b', 'llama-3.2-1b'}


def test_a_base_in_parts_is_downloaded_part_by_part(hub):
    whole = load_file(hub.folder / 'model.safetensors')
    (hub.folder / 'model.safetensors').unlink()
    parts = {f'model-0000{i + 1}-of-00002.safetensors': dict([*whole.items()][i::2]) for i in (0, 1)}
    for name, tensors in parts.items():
        save_file(tensors, hub.folder / name)
    index = hub.folder / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': {n: name for name, tensors in parts.items() for n in tensors}}))
    assert same(to_hub(load_base('someone/x')), whole)
    names = ['config.json', 'model.safetensors', index.name, *parts, 'tokenizer.json']
    assert [name for name, _ in hub.asked] == names
    for odd in ('../x.safetensors', '/etc/x.safetensors', 'a/b.safetensors', '..', '', 'a\\b.safetensors', 'model.bin', 3):
        hub.asked.clear()
        index.write_text(json.dumps({'weight_map': {'x': odd}}))
        assert f'lists {odd}: expected names of .safetensors files' in refusal('someone/x')
        assert {name for name, _ in hub.asked} <= {*names[:3]}  # nothing outside is asked for
    for text, message in (('{"weight_map": []}', 'lists nothing'), ('x', 'cannot be read as a JSON object')):
        index.write_text(text)
        assert message in refusal('someone/x')


def test_a_tokenizer_is_not_missed_because_the_connection_failed(hub):
    """Its absence is known or the base is refused: the same base must not read other text the next time."""
    hub.down = 'tokenizer.json'
    assert 'cannot get someone/x from the Hugging Face Hub (LocalEntryNotFoundError): connect once' in refusal('someone/x')
    hub.absent.add('tokenizer.json')
    assert load_base('someone/x').tokenizer is None


def test_a_repository_that_holds_no_base_is_told_so(hub):
    """Not to get a token, nor to connect."""
    (hub.folder / 'model.safetensors').rename(hub.folder / 'pytorch_model.bin')
    said = refusal('someone/pickled')
    assert '(404): choose one that has config.json and model.safetensors' in said and 'HF_TOKEN' not in said
    (hub.folder / 'config.json').write_text('<html>')
    assert 'config.json cannot be read as a JSON object' in refusal('someone/pickled')
    assert '(HFValidationError): write owner/name as the Hub does' in refusal('someone/a..b')


def test_what_is_a_path_is_not_asked_for(hub, tmp_path, monkeypatch):
    """owner/name is a path where owner is a folder, here or in the project's own."""
    monkeypatch.chdir(tmp_path)
    assert not on_hub('hub/x') and on_hub('hubs/x') and on_hub('hubs/x.1') and on_hub('gpt2') and not on_hub('a/b/c')
    for path in ('assets/nothing', 'hub/nothing', 'a/model.safetensors', 'a/pytorch_model.bin', './a', '/a/b', 'a', '../a', ''):
        assert not on_hub(path), path
    assert 'no base model at' in refusal('assets/nothing') and not hub.asked
    assert isinstance(load_base('hub'), Llama) and isinstance(load_base('assets/base-tiny.safetensors'), GPT) and not hub.asked


# ---- the method ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def runs(tiny, tmp_path_factory):
    """runs.train(*args) is train.main on a tiny Llama with a head of its own, runs.folder is where it writes."""
    folder = tmp_path_factory.mktemp('llama')
    save_gpt(random_llama(replace(TINY, tie_word_embeddings=False), std=0.1), folder / 'base.safetensors')
    train = trainer(SimpleNamespace(base=folder / 'base.safetensors', data=tiny.data), folder)
    return SimpleNamespace(folder=folder, train=train)


@pytest.mark.parametrize('method', [*METHODS, 'comigs_1g1s --dtype=bfloat16'])
def test_every_method_runs_on_a_llama(method, runs):
    """Better than the base on everybody's text, and eval.py rebuilds every user's model from the files."""
    run = runs.train(*f'--method={method}'.split(), *SHORT, out=method)
    s = run.summary
    assert isinstance(run.fleet.base, Llama) and len(s['test_ppl']) == 3 and all(map(math.isfinite, s['test_ppl']))
    assert method == 'pretrained' or all(a < b for a, b in zip(s['test_ppl'], s['pretrained_test_ppl']))
    eval_file.main([str(run.out)])
    assert [u['test_ppl'] for u in json.loads((run.out / 'eval.json').read_text())['users']] == s['test_ppl']


@pytest.mark.parametrize('method', ['comigs_1g1s', 'flora'])
def test_resume_is_bit_identical(method, runs, monkeypatch):
    """The folder as it is in the middle of round 3 of 3, continued. FLoRA's base has gained two stacks by then."""
    whole, cut = (f'{part} {method}' for part in ('whole', 'cut'))

    def watched(tokens, batch_size, block_size, key):
        if key == (42, 1, 0, 5) and not (runs.folder / cut).exists():
            shutil.copytree(runs.folder / whole, runs.folder / cut)
        return get_batch(tokens, batch_size, block_size, key)

    monkeypatch.setattr(user_file, 'get_batch', watched)
    a = runs.train(f'--method={method}', '--rounds=3', out=whole)
    assert not (runs.folder / cut / 'summary.json').exists()
    b = runs.train(f'--method={method}', '--rounds=3', '--resume', out=cut)
    assert b.journal.start == 2 and (a.out / 'metrics.jsonl').read_bytes() == (b.out / 'metrics.jsonl').read_bytes()
    assert all(same(u.adapter, v.adapter) for u, v in zip(a.users, b.users))
    assert same(a.fleet.base.state_dict(), b.fleet.base.state_dict()) and a.summary['test_ppl'] == b.summary['test_ppl']


def test_users_share_one_frozen_base_and_begin_as_it(tiny):
    """The same objects; B = 0, so a user's logits are the base's. Everything trained is named by its role."""
    base, idx = random_llama(), tokens(2, 16)
    users = devices(base, '--method=comigs_1gxs', '--n_experts=3')
    frozen = dict(base.named_parameters())
    for user in users:
        held = {name.replace('.frozen', ''): p for name, p in user.model.named_parameters() if name not in user.role}
        assert held.keys() == frozen.keys() and all(p is frozen[name] and not p.requires_grad for name, p in held.items())
        with torch.no_grad():
            assert torch.allclose(user.model(idx)[0], base(idx)[0], atol=1e-5)
    expected = {f'h.{i}.attn.{m}_proj.lora.{f}': 'attention' for i in (0, 1) for m in 'qkvo' for f in 'AB'}
    for i, m, f in itertools.product((0, 1), ('gate', 'up', 'down'), 'AB'):
        expected[f'h.{i}.mlp.generalists.0.{m}_proj.{f}'] = 'generalist'
        expected |= {f'h.{i}.mlp.specialists.{j}.{m}_proj.{f}': 'specialist' for j in (0, 1)}
    expected |= {f'h.{i}.mlp.router.weight': 'router' for i in (0, 1)}
    leaves = {name for name, role in expected.items() if role in ('attention', 'generalist')}
    assert users[0].role == expected and {*users[0].shared} == leaves
    assert users[0].adapter['h.1.mlp.specialists.0.down_proj.A'].shape == (8, 24)
    again = devices(random_llama(), '--method=comigs_1gxs', '--n_experts=3')
    assert all(same(u.adapter, v.adapter) for u, v in zip(users, again)) and fingerprint(base) == fingerprint(random_llama())
    name = 'h.0.mlp.specialists.1.gate_proj.A'
    assert torch.equal(users[2].adapter[name], initial(name, (8, 16), 42, 'user', 2))


def test_flora_adds_to_the_right_weights():
    """Σ_k p_k γ_k B_k A_k of two users, into each linear its own."""
    base = random_llama()
    before, users = {n: p.clone() for n, p in base.state_dict().items()}, devices(base, '--method=flora', N=2)
    updates = [{name: torch.randn_like(p) for name, p in user.adapter.items()} for user in users]
    weights = [n / sum(N_TRAIN[:2]) for n in N_TRAIN[:2]]
    federate.merge(base, federate.combine(users[0].c, 0, {}, dict(enumerate(updates)), None, None)[0])
    changed = {n for n, p in base.state_dict().items() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if '_proj.' in n}
    for name in changed:
        block, part, linear, _ = name.rsplit('.', 3)
        lora, r = (f'attn.{linear}.lora', 8) if part == 'attn' else (f'mlp.generalists.0.{linear}', 16)
        sent = [16 / math.sqrt(r) * u[f'{block}.{lora}.B'] @ u[f'{block}.{lora}.A'] for u in updates]
        gained = sum(p * BA for p, BA in zip(weights, sent))
        assert torch.allclose(base.state_dict()[name], before[name] + gained, atol=1e-4)


def test_ghost_noise_follows_rms_norm():
    """Training only; the norm itself is the base's."""
    base, idx = random_llama(), tokens(4, 16)
    user = user_of(base, 2, ghost_noise=4)
    assert user.h[1].ln_2[0] is base.h[1].ln_2 and isinstance(user.h[0].ln_1[1], GhostNoise) and user.ln_f is base.ln_f
    quiet = user_of(base, 2)
    quiet.load_state_dict({n.replace('ln_1.0', 'ln_1').replace('ln_2.0', 'ln_2'): p for n, p in user.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(user(idx)[0], quiet(idx)[0])
        assert not torch.equal(user.train()(idx)[0], quiet.train()(idx)[0])


def test_how_much_smollm2_trains():
    """Rank 8 on q and o (576 -> 576), k and v (576 -> 192), and for two experts gate, up (576 -> 1536) and down; a router."""
    with torch.device('meta'):
        user = add_lora(Llama(LlamaConfig()), n_experts=2, n_generalists=1, rank=8)
    assert sum(p.numel() for n, p in user.named_parameters() if n not in roles(user)) == 134_515_008
    attention, expert, router = 8 * (2 * (576 + 576) + 2 * (576 + 192)), 3 * 8 * (576 + 1536), 2 * 576
    assert sum(p.numel() for n, p in user.named_parameters() if n in roles(user)) == 30 * (attention + 2 * expert + router)
