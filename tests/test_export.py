"""tools/export.py: transformers and PEFT load what it writes and compute the same; what PEFT wrote starts a run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, refused, trainer
from safetensors.torch import load_file, save_file

os.environ['HF_HUB_OFFLINE'] = '1'
from eval import open_run
from llama import Llama, LlamaConfig, load_base
from lora_moe import Routing
from model import GPT, fingerprint, load_gpt, save_gpt
from tools import export as export_file

peft, transformers = pytest.importorskip('peft'), pytest.importorskip('transformers')
transformers.utils.logging.disable_progress_bar()
IDX = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(0))
FAR = ('--expert_lr=0.05', '--rounds=2', '--eval_every=2')  # far enough from the base to see any wrong scaling
PRUNES = ('--prune_coef=10', '--prune_gamma=0.5', '--expert_lr=0.02', '--rounds=3')
LINEARS = ['attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj']


def export(folder: Path, to: Path, *args: str) -> Path:
    """The tool, from the folder of a run -> DIR."""
    export_file.main([str(folder), str(to), *args])
    return to


@pytest.fixture(scope='module')
def mixed(tiny, tmp_path_factory) -> SimpleNamespace:
    """A run whose users have 1, 2 and 3 experts."""
    return trainer(tiny, tmp_path_factory.mktemp('mixed'))('--method=comigs_1gxs', '--n_experts=1,2,3', *FAR)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of IDX, by our model or by theirs. (2, 32, 257)"""
    out = model.eval()(IDX)
    return out[0] if isinstance(out, tuple) else out.logits


def model_of(run: SimpleNamespace, i: int = 0) -> GPT:
    """User i's model as the run's files have it: after its last local steps."""
    return open_run(run.out).models[i]


def hub_model(folder: str | Path) -> torch.nn.Module:
    """A folder as transformers loads it: all of its tensors are in their place, and none is missing."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def peft_model(folder: Path) -> torch.nn.Module:
    """A folder as PEFT loads it on the base that it names: no key of ours is unknown to it, none of its is missing."""
    config = json.loads((folder / 'adapter_config.json').read_text())
    model = peft.PeftModel.from_pretrained(hub_model(config['base_model_name_or_path']), folder)
    state, ours = peft.get_peft_model_state_dict(model), load_file(folder / 'adapter_model.safetensors')
    assert state.keys() == ours.keys() and all(torch.equal(state[name], t) for name, t in ours.items())
    assert len(ours) == sum('lora_' in name for name, _ in model.named_parameters())
    return model


def peft_adapter(hub: Path, folder: Path, **settings: object) -> tuple[Path, torch.Tensor]:
    """(folder that PEFT has saved, its logits): LoRA with these settings on a base; B is random, as after training."""
    given = {'r': 4, 'lora_alpha': 10, 'task_type': 'CAUSAL_LM', **settings}
    torch.manual_seed(1)
    model = peft.get_peft_model(hub_model(hub), peft.LoraConfig(**given))
    for name, p in model.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    return folder, logits(model)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Within 1e-5, or 2e-6 of the largest logit: float32's own noise, which is the processor's (1.1e-5 of 9 was seen)."""
    return (a - b).abs().max() < max(1e-5, 2e-6 * b.abs().max().item())


# ---- one expert: one LoRA, exactly -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'user, args',
    [
        ('0', ['--method=ffa_lora']),
        ('1', ['--method=fedsa_lora', '--lora_alpha=5']),
        ('2', ['--method=fdlora']),
        ('0', ['--method=hetlora', '--lora_rank=12,6,4']),
        ('1', ['--method=hetlora', '--lora_rank=12,6,4', *PRUNES]),
        ('1', ['--method=flexlora', '--lora_rank=4,6,8']),
        ('user 1', ['--method=flora', '--lora_rank=4,6,8']),
        ('0', ['--method=comigs_1gxs', '--n_experts=1,2,3']),
        ('0', ['--method=centralized', '--n_experts=1']),
        ('generalist', ['--method=comigs_1g1s', '--lora_rank=3']),
        ('generalist', ['--method=comigs_1g1s', '--share_attention=False']),
        ('generalist', ['--method=ffa_lora']),
    ],
)
def test_one_expert_is_one_adapter_and_one_gpt2(train, tiny, tmp_path, user, args):
    opened = open_run(train(*FAR, *args).out)
    ours = logits(opened.generalist if user == 'generalist' else opened.models[int(user[-1])])
    assert (ours - logits(tiny.model)).abs().max() > 0.1  # training went somewhere
    adapter = export(opened.path, tmp_path / 'peft', f'--user={user}', '--to=peft')
    assert close(logits(peft_model(adapter)), ours)
    merged = export(opened.path, tmp_path / 'merged', f'--user={user}', '--to=merged')
    assert close(logits(hub_model(merged)), ours) and close(logits(load_gpt(str(merged))), ours)


def test_a_pruned_rank_keeps_its_scaling(train, tmp_path):
    """HetLoRA's pruned components are exported as zeros: r, and with it PEFT's alpha / sqrt(r), is the first rank's."""
    run = train('--method=hetlora', '--lora_rank=12,6,4', *PRUNES)
    user = run.users[1]
    assert user.rank < 6
    folder = export(run.out, tmp_path / 'peft', '--user=1')
    config = json.loads((folder / 'adapter_config.json').read_text())
    assert (config['r'], config['lora_alpha'], config['use_rslora']) == (6, 16.0, True)
    assert config['rank_pattern'] == {'attn.c_attn': 8, 'attn.c_proj': 8}
    A = load_file(folder / 'adapter_model.safetensors')['base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight']
    assert len(A) == 6 and not A[user.rank :].any() and A[: user.rank].any()


# ---- a mixture: an adapter for each expert ---------------------------------------------------------------------------
def send_all_to(model: GPT, j: int) -> None:
    """From now on the weights of all experts but the j-th are 0."""
    for block in model.h:
        n_experts = len(block.mlp.generalists) + len(block.mlp.specialists)
        always = torch.nn.functional.one_hot(torch.tensor([j] * IDX.numel()), n_experts).float()
        chosen = always.argsort(1, descending=True)[:, : block.mlp.top_k]
        routing = Routing(always, chosen, always.gather(1, chosen))
        block.mlp.router = block.mlp.router or torch.nn.Identity()
        block.mlp.route = lambda x, routing=routing: routing


@pytest.mark.parametrize(
    'args, folders',
    [
        (['--method=comigs_1gxs', '--n_experts=3'], ['generalist-0', 'specialist-0', 'specialist-1']),
        (['--method=comigs_2s', '--top_k=1', '--routing_unit=prefix'], ['specialist-0', 'specialist-1']),
        (['--method=fedavg'], ['generalist-0', 'generalist-1']),
    ],
)
def test_a_mixture_is_an_adapter_for_each_expert(train, tmp_path, capsys, args, folders):
    """Each folder is our model with every token sent to that expert; together they hold every tensor of the user."""
    run = train(*args, *FAR)
    folder = export(run.out, tmp_path / 'peft', '--user=1')
    assert sorted(f.name for f in folder.iterdir() if '-' in f.name) == folders
    model, seen = model_of(run, 1), []
    for j, name in enumerate(folders):
        send_all_to(model, j)
        theirs = peft_model(folder / name)
        assert close(logits(theirs), logits(model))
        seen.append(logits(theirs))
    assert (seen[0] - seen[1]).abs().max() > 0.1
    exported = {f.name: load_file(f / 'adapter_model.safetensors') for f in folder.glob('*-*')}
    held = [t for tensors in exported.values() for t in tensors.values()]
    held += load_file(folder / 'router.safetensors').values() if (folder / 'router.safetensors').exists() else []
    own = load_file(run.out / 'adapters' / 'user1.safetensors')
    assert all(any(torch.equal(t, h) for h in held) for t in own.values())
    assert len(held) == len(own) + 8 * (len(folders) - 1)  # attention's, 4 in each of 2 layers, is in all of them
    assert refused(capsys, export, run.out, tmp_path / 'm', '--user=1', '--to=merged').endswith('use --to=peft\n')


def test_the_router_is_in_the_rows_that_the_docs_say(mixed, tmp_path):
    """Φ and the experts' folders, put together by the formula of docs/exports.md in one layer, are our layer."""
    folder, docs = export(mixed.out, tmp_path / 'peft', '--user=2'), (ROOT / 'docs/exports.md').read_text()
    for formula in ('z = Φ x,', 'S = the top_k largest of z,    w = softmax of z over S', 'y = Σ_(j in S) w_j MLP_j(x)'):
        assert formula in docs
    phi = load_file(folder / 'router.safetensors')['h.1.mlp.router.weight']
    names = sorted(f.name for f in folder.glob('*-*'))  # generalists first, then specialists
    x = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(1))
    mlps = [peft_model(folder / name).base_model.model.transformer.h[1].mlp for name in names]
    z = x @ phi.t()  # (1, 7, 3)
    best, S = z.topk(2)
    with torch.no_grad():
        y = torch.stack([mlp(x) for mlp in mlps], -1)  # (1, 7, C, 3)
        y = (y.gather(3, S[:, :, None].expand(1, 7, 16, 2)) * best.softmax(-1)[:, :, None]).sum(-1)
        ours = model_of(mixed, 2).h[1].mlp(x)[0]
    assert names == ['generalist-0', 'specialist-0', 'specialist-1'] and torch.allclose(y, ours, atol=1e-5)


@pytest.mark.parametrize('to, user', [('peft', 0), ('peft', 1), ('merged', 0), ('base', None)])
def test_the_readme_tells_what_is_there_and_its_code_runs(mixed, tiny, tmp_path, to, user):
    folder = export(mixed.out, tmp_path / 'x', f'--to={to}', *([f'--user={user}'] if to != 'base' else []))
    text, scope = (folder / 'README.md').read_text(), {}
    exec(re.search('```python\n(.*)```', text, re.S)[1], scope)
    gpt = load_gpt(str(tiny.base))
    if to != 'base':  # its first expert alone
        own = load_file(mixed.out / 'adapters' / f'user{user}.safetensors')
        export_file.merge(gpt, export_file.by_expert(own)['generalist-0'], 16)
        assert f'{mixed.summary["test_ppl"][user]:.3f}' in text
    assert close(logits(scope['model']), logits(gpt))
    assert str(mixed.out) in text and str(tiny.base if to != 'peft' else folder / 'base') in text and 'docs/exports.md' in text


# ---- the base --------------------------------------------------------------------------------------------------------
def test_the_base_is_the_same_to_the_bit(mixed, tmp_path, capsys):
    folder = export(mixed.out, tmp_path / 'base', '--to=base')
    base = load_gpt(str(folder))
    assert fingerprint(base) == mixed.journal.identity['base'] and close(logits(hub_model(folder)), logits(base))
    named = export(mixed.out, tmp_path / 'peft', '--user=0', f'--base={folder}')  # named, and not written once more
    assert json.loads((named / 'adapter_config.json').read_text())['base_model_name_or_path'] == str(folder)
    assert not (named / 'base').exists() and close(logits(peft_model(named)), logits(model_of(mixed)))
    merged = export(mixed.out, tmp_path / 'merged', '--user=0', '--to=merged', f'--base={folder}')
    err = refused(capsys, export, mixed.out, tmp_path / 'x', '--user=0', f'--base={merged}')
    assert 'is not the base that' in err and not (tmp_path / 'x').exists()
    assert 'is the base itself' in refused(capsys, export, mixed.out, folder, '--to=base', f'--base={folder}', '--overwrite')


@pytest.mark.parametrize(
    'base, place',
    [
        ('gpt2-medium', 'openai-community/gpt2-medium'),
        ('smollm2-135m', 'HuggingFaceTB/SmolLM2-135M'),
        ('owner/name', 'owner/name'),
    ],
)
def test_a_base_of_the_hub_is_named_by_its_place_there_and_not_loaded(mixed, tmp_path, base, place):
    run = shutil.copytree(mixed.out, tmp_path / 'run')
    config = json.loads((run / 'config.json').read_text())
    (run / 'config.json').write_text(json.dumps({**config, 'init_from': base}))
    folder = export(run, tmp_path / 'peft', '--user=0')
    assert json.loads((folder / 'adapter_config.json').read_text())['base_model_name_or_path'] == place
    assert sorted(f.name for f in folder.iterdir()) == ['README.md', 'adapter_config.json', 'adapter_model.safetensors']


# ---- the Llama family ------------------------------------------------------------------------------------------------
LLAMA = dict(vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
LLAMA |= dict(num_key_value_heads=2, head_dim=4, max_position_embeddings=32)
FAMILY = {
    'llama': {},
    'llama3': {'tie_word_embeddings': False, 'rope_theta': 5e5, 'rope_scaling': (8.0, 1.0, 4.0, 16)},
    'mistral': {'tie_word_embeddings': False, 'head_dim': 6, 'rms_norm_eps': 1e-6, 'rope_theta': 1e4},
    'qwen2': {'qkv_bias': True, 'rope_theta': 1e6},
    'qwen2-untied': {'qkv_bias': True, 'tie_word_embeddings': False, 'num_key_value_heads': 4},
}
PROJECTIONS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
LESS_FAR = (*FAR, '--expert_lr=0.02')  # RMSNorm makes rounding large where the residual is next to nothing


def random_llama(**changes) -> Llama:
    """Weights, norms and biases that all matter."""
    torch.manual_seed(0)
    llama = Llama(LlamaConfig(**{**LLAMA, **changes}))
    for name, p in llama.named_parameters():
        torch.nn.init.normal_(p, mean=float('ln_' in name), std=0.5 if name == 'wte.weight' else 0.15)
    return llama.requires_grad_(False)


@pytest.fixture(params=FAMILY)
def family(request, tiny, tmp_path) -> SimpleNamespace:
    """.base, .model and .data as of `tiny`, and .train: with one of the Llama family."""
    model = random_llama(**FAMILY[request.param])
    save_gpt(model, tmp_path / 'base.safetensors')
    own = SimpleNamespace(base=tmp_path / 'base.safetensors', data=tiny.data, model=model)
    return SimpleNamespace(**vars(own), train=trainer(own, tmp_path))


def test_a_llama_as_one_adapter_and_one_model(family, tmp_path):
    opened = open_run(family.train('--method=fedavg', '--n_generalists=1', '--n_experts=1', '--lora_rank=4', *LESS_FAR).out)
    ours = logits(opened.models[1])
    assert (ours - logits(family.model)).abs().max() > 0.1
    adapter = export(opened.path, tmp_path / 'peft', '--user=1')
    assert close(logits(peft_model(adapter)), ours)
    config = json.loads((adapter / 'adapter_config.json').read_text())
    assert sorted(config['target_modules']) == sorted(PROJECTIONS) and not config['fan_in_fan_out'] and config['use_rslora']
    assert config['r'] == 4 and config['rank_pattern'] == dict.fromkeys(PROJECTIONS[:4], 8)
    names = load_file(adapter / 'adapter_model.safetensors')
    assert 'base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight' in names and len(names) == 2 * 7 * 2
    merged = export(opened.path, tmp_path / 'merged', '--user=1', '--to=merged')
    assert close(logits(hub_model(merged)), ours) and close(logits(load_base(str(merged))), ours)
    base = load_base(str(export(opened.path, tmp_path / 'plain', '--to=base')))
    assert base.config == family.model.config and fingerprint(base) == fingerprint(family.model)


@pytest.mark.parametrize('family', ['llama', 'qwen2-untied'], indirect=True)
def test_a_mixture_on_a_llama_is_an_adapter_for_each_expert(family, tmp_path, capsys):
    run = family.train('--method=comigs_1gxs', '--n_experts=1,2,3', *LESS_FAR)
    folder, model = export(run.out, tmp_path / 'peft', '--user=2'), model_of(run, 2)
    names = sorted(f.name for f in folder.glob('*-*'))
    assert names == ['generalist-0', 'specialist-0', 'specialist-1']
    for j, name in enumerate(names):
        send_all_to(model, j)
        assert close(logits(peft_model(folder / name)), logits(model))
    assert refused(capsys, export, run.out, tmp_path / 'm', '--user=2', '--to=merged').endswith('use --to=peft\n')


@pytest.mark.parametrize('family', ['llama'], indirect=True)
def test_flora_merges_into_a_llama_of_its_own(family, tmp_path):
    opened = open_run(family.train('--method=flora', '--lora_rank=4,6,8', *LESS_FAR).out)
    ours = logits(opened.models[2])
    assert close(logits(peft_model(export(opened.path, tmp_path / 'peft', '--user=2'))), ours)
    assert close(logits(hub_model(export(opened.path, tmp_path / 'merged', '--user=2', '--to=merged'))), ours)


@pytest.mark.parametrize('family', ['llama', 'qwen2'], indirect=True)
def test_a_run_on_a_llama_starts_from_an_adapter(family, tmp_path):
    """Of PEFT's making, or exported; and exported again it is the same to the bit."""
    hub = tmp_path / 'hub'
    export_file.write_base(hub, family.model, ({}, {}))
    ranks = {'up_proj': 7, r'layers\.1\.mlp\.gate_proj': 2}
    for name, targets in ('all', 'all-linear'), ('some', ['q_proj', *PROJECTIONS[4:]]):
        folder, theirs = peft_adapter(hub, tmp_path / name, target_modules=targets, rank_pattern=ranks)
        run = family.train('--method=fedsa_lora', '--rounds=0', f'--init_adapter={folder}', out=f'run-{name}')
        assert close(logits(run.users[0].model), theirs)
        assert (theirs - logits(family.model)).abs().max() > 0.1
    run = family.train('--method=comigs_1g1s', '--n_experts=2', *LESS_FAR, out='first')
    folder = export(run.out, tmp_path / 'peft', '--user=generalist')
    again = family.train('--method=comigs_1g1s', '--n_experts=2', '--rounds=0', f'--init_adapter={folder}', out='again')
    old, new = (load_file(one.out / 'adapters' / 'server.safetensors') for one in (run, again))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize('family', ['llama'], indirect=True)
def test_an_adapter_of_the_other_family_is_refused(family, train, adapter, tmp_path, capsys):
    """And one of another Llama."""

    def of_llama(name: str, model: Llama) -> Path:
        export_file.write_base(tmp_path / f'{name}-base', model, ({}, {}))
        return peft_adapter(tmp_path / f'{name}-base', tmp_path / name, target_modules=PROJECTIONS)[0]

    same, wide = of_llama('same', family.model), of_llama('wide', random_llama(intermediate_size=28))
    said = refused(capsys, family.train, '--rounds=0', f'--init_adapter={adapter()[0]}')
    assert 'no place for base_model.model.transformer.h.0.' in said and 'such as base_model.model.model.layers.0.' in said
    said = refused(capsys, train, '--rounds=0', f'--init_adapter={same}')
    assert 'no place for base_model.model.model.layers.0.' in said and 'such as base_model.model.transformer.h.0.' in said
    assert 'is it an adapter of this base?' in refused(capsys, family.train, '--rounds=0', f'--init_adapter={wide}')


@pytest.mark.parametrize('family', ['llama', 'qwen2'], indirect=True)
def test_a_llama_keeps_its_tokenizer_and_the_ends_of_its_documents(family, tmp_path, monkeypatch):
    """A folder in the Hub's format is named by an adapter; what is written out of it reads text as it does, by the lines of
    docs/exports.md."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.add_special_tokens(['<|end|>'])
    base = tmp_path / 'hub'
    export_file.write_base(base, family.model, ({'bos_token_id': None, 'eos_token_id': [256, 7]}, {}))
    run = family.train('--method=fedavg', '--n_generalists=1', '--n_experts=1', *LESS_FAR, f'--init_from={base}')
    words.save(str(base / 'tokenizer.json'))  # now: the run's text is bytes
    named = export(run.out, tmp_path / 'peft', '--user=0')
    assert json.loads((named / 'adapter_config.json').read_text())['base_model_name_or_path'] == str(base)
    assert not (named / 'base').exists() and close(logits(peft_model(named)), logits(model_of(run)))
    merged = export(run.out, tmp_path / 'out' / 'merged', '--user=0', '--to=merged')
    monkeypatch.chdir(tmp_path)
    snippet = re.findall('```python\n(.*?)```', (ROOT / 'docs/exports.md').read_text(), re.S)[1]
    exec(snippet, scope := {})
    tokenizer, model, text = scope['tokenizer'], scope['model'], 'Two  words, é.<|end|>'
    assert close(logits(model), logits(model_of(run))) and close(logits(hub_model(merged)), logits(model))
    assert tokenizer(text)['input_ids'] == words.encode(text).ids and tokenizer.decode(words.encode(text).ids) == text
    assert (tokenizer.eos_token, tokenizer.bos_token) == ('<|end|>', None)
    assert (model.config.eos_token_id, model.config.bos_token_id) == ([256, 7], None)
    export(run.out, merged, '--to=base', '--overwrite')
    assert close(logits(hub_model(merged)), logits(family.model)) and (merged / 'tokenizer.json').exists()


# ---- runs and folders as they come -----------------------------------------------------------------------------------
def test_an_unfinished_run_and_a_user_that_was_not_tested(train, tmp_path, capsys):
    run = train('--n_experts=1', '--participation=0.6', '--test_users=1', *FAR)
    other = min({*run.fleet.last_round} - {*run.fleet.tested})
    folder = export(run.out, tmp_path / 'a', f'--user={other}')
    (run.out / 'summary.json').unlink()
    again = export(run.out, tmp_path / 'b', f'--user={other}')
    same = [load_file(f / 'adapter_model.safetensors') for f in (folder, again)]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    assert '(unfinished)' in (again / 'README.md').read_text() and '(unfinished)' not in (folder / 'README.md').read_text()
    run = train('--n_experts=1', '--participation=0.3', '--rounds=1', '--test_users=1', out='one')
    absent = min({0, 1, 2} - {*run.fleet.last_round, *run.fleet.tested})
    assert 'has not taken part' in refused(capsys, export, run.out, tmp_path / 'c', f'--user={absent}')


def test_overwriting_deletes_an_earlier_export_and_nothing_else(mixed, tmp_path, capsys):
    folder = export(mixed.out, tmp_path / 'x', '--user=1')
    (folder / 'specialist-0' / 'mine.txt').write_text('mine')
    assert 'is not empty: give --overwrite' in refused(capsys, export, mixed.out, folder, '--user=generalist')
    export(mixed.out, folder, '--user=generalist', '--to=merged', '--overwrite')
    names = sorted(str(f.relative_to(folder)) for f in folder.rglob('*') if f.is_file())
    assert names == ['README.md', 'config.json', 'model.safetensors', 'specialist-0/mine.txt']


def test_bad_input_is_one_line_and_writes_nothing(train, tmp_path, capsys):
    run, x = train('--method=local', '--rounds=1'), tmp_path / 'x'
    for given, message in (
        ((run.out, x), '--user=None: expected one of generalist, 0 (user 0), 1 (user 1), 2 (user 2)'),
        ((run.out, x, '--user=3'), '--user=3: expected'),
        ((run.out, x, '--user=generalist'), '(local) has no generalist for everybody'),
        ((tmp_path / 'none', x, '--user=0'), 'is no run: it has no config.json'),
        ((run.out, run.out, '--user=0', '--overwrite'), 'is the folder of a run'),
        ((run.out, run.out / 'config.json', '--user=0'), 'is a file'),
        ((run.out, x, '--user=0', '--base=nowhere'), 'no base model at'),
    ):
        assert message in refused(capsys, export, *given)
    (run.out / 'adapters' / 'user0.safetensors').write_bytes(b'\xff' * 100)
    assert 'user0.safetensors is damaged' in refused(capsys, export, run.out, x, '--user=0')
    for broken in ('{', '{}', '[]', '{"pooled": false}'):
        (run.out / 'config.json').write_text(broken)
        assert 'config.json cannot be read: ' in refused(capsys, export, run.out, x, '--user=0')
    assert not x.exists()


def test_a_base_of_the_runs_own_is_told_apart_from_one_that_is_not_there_yet(train, tmp_path, capsys):
    run = train('--method=flora', '--rounds=1')
    given = (run.out, tmp_path / 'x', '--to=base')
    assert refused(capsys, export, *given, '--base=elsewhere').endswith('finished: leave --base out\n')
    (run.out / 'adapters' / 'base.safetensors').unlink()
    assert refused(capsys, export, *given).endswith('finished: let it finish, or continue it with --resume\n')
    with pytest.raises(ValueError, match='wait, or continue it with --resume'):
        open_run(run.out)


def test_it_needs_neither_peft_nor_transformers():
    code = 'import sys, tools.export; assert not {"peft", "transformers"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


# ---- a PEFT adapter as the start of a run ----------------------------------------------------------------------------
@pytest.fixture
def adapter(tiny, tmp_path):
    """adapter(**settings of LoraConfig) -> what `peft_adapter` returns, on the tiny GPT-2."""

    def make(name='adapter', **settings):
        if not (tmp_path / 'gpt2').exists():
            export_file.write_gpt(tmp_path / 'gpt2', load_gpt(str(tiny.base)))
        given = {'target_modules': LINEARS, 'fan_in_fan_out': True, **settings}
        return peft_adapter(tmp_path / 'gpt2', tmp_path / name, **given)

    return make


@pytest.mark.parametrize(
    'settings',
    [
        {},
        {'use_rslora': True, 'r': 8},
        {'rank_pattern': {'c_fc': 7, r'h\.1\.mlp\.c_proj': 2}, 'alpha_pattern': {'attn.c_proj': 3, 'c_proj': 5.5}},
        {'target_modules': ['c_fc', 'mlp.c_proj']},
    ],
)
def test_a_run_starts_as_the_base_with_the_adapter(train, adapter, tmp_path, tiny, settings):
    """Of one expert, in every user; and of the generalist alone where there are specialists."""
    folder, theirs = adapter(**settings)
    assert (theirs - logits(tiny.model)).abs().max() > 0.1
    for method in ('ffa_lora', 'fedsa_lora', 'hetlora', 'flexlora'):
        run = train(f'--method={method}', '--rounds=0', f'--init_adapter={folder}', out=method)
        assert all(close(logits(user.model), theirs) for user in run.users)
        run.users[0].receive(run.server, 0)  # and so does the server's copy
        assert close(logits(run.users[0].model), theirs)
    for n, k in ((2, 1), (3, 2), (2, 2)):
        args = (f'--n_experts={n}', f'--n_generalists={k}', '--share_attention=False', '--rounds=0')
        run = train(*args, f'--init_adapter={folder}', out=f'run{n}{k}')
        assert close(logits(run.users[0].model), theirs) == (n == k)  # equal experts, however mixed; or a fresh specialist
    run = train('--rounds=0', f'--init_adapter={folder}', out='both')
    assert close(logits(open_run(run.out).generalist), theirs)


def test_components_beyond_the_adapters_rank_can_learn(train, adapter):
    """Rank 4 in rank 16: the other twelve add nothing at first (B = 0), and have B != 0 after the first steps (A != 0)."""
    folder, _ = adapter()
    start = train('--method=fdlora', '--rounds=0', f'--init_adapter={folder}', out='a').users[0].adapter
    after = train('--method=fdlora', '--rounds=1', f'--init_adapter={folder}', out='b').users[0].adapter
    name = 'h.1.mlp.generalists.0.c_fc'
    assert not start[name + '.B'][:, 4:].any() and start[name + '.A'][4:].all() and start[name + '.B'][:, :4].all()
    assert (after[name + '.B'][:, 4:] != 0).any(0).all()


def test_there_and_back_are_the_same_tensors(mixed, train, tmp_path):
    """A generalist exported and imported again is the same to the bit, and so is the run that starts from it."""
    folder = export(mixed.out, tmp_path / 'peft', '--user=generalist')
    again = train('--rounds=0', f'--init_adapter={folder}', out='again')
    old, new = (load_file(run.out / 'adapters' / 'server.safetensors') for run in (mixed, again))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_resuming_wants_the_same_adapter(train, adapter, capsys, tmp_path):
    folder, _ = adapter()
    args = (f'--init_adapter={folder}', '--n_experts=1', '--rounds=1')
    whole = train(*args, out='whole')
    run = train(*args, '--participation=0.5', out='run')
    assert json.loads((run.out / 'config.json').read_text())['adapter_sha256'] == whole.fleet.adapter_sha256
    moved = folder.rename(tmp_path / 'moved')
    given = ('--n_experts=1', '--rounds=1', '--participation=0.5', '--resume')
    train(*given, f'--init_adapter={moved}')  # the same file elsewhere
    assert 'was made with another adapter' in refused(capsys, train, *given)
    other, _ = adapter('other', lora_alpha=11)
    assert 'was made with another adapter' in refused(capsys, train, *given, f'--init_adapter={other}')


@pytest.mark.parametrize(
    'args, message',
    [
        (['--method=local'], 'give --n_generalists=1 or more'),
        (['--method=flora'], 'not flora, whose LoRAs start anew'),
        (['--method=hetlora', '--lora_rank=4,6,8'], '--lora_rank=4,6,8: its scaling depends on the rank: one for all users'),
        (['--lora_rank=2'], 'h.0.mlp.c_fc has rank 4, here it can have 2: raise --lora_rank'),
    ],
)
def test_what_cannot_start_from_an_adapter(train, adapter, capsys, tmp_path, args, message):
    assert message in refused(capsys, train, *args, f'--init_adapter={adapter()[0]}') and not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'settings, message',
    [
        ({'use_dora': True}, 'use_dora=True'),
        ({'bias': 'all'}, "bias='all'"),
        ({'modules_to_save': ['ln_f']}, "modules_to_save=['ln_f']"),
        ({'target_modules': [*LINEARS, 'wte']}, 'no place for'),
        ({'target_modules': ['c_attn']}, 'has no h.0.mlp.c_fc.A'),
        ({'layers_to_transform': [0]}, 'has no h.1.attn.c_attn.A'),
        ({'r': 9}, 'attn.c_attn has rank 9, here it can have 8: train it with a rank_pattern'),
        ({'trainable_token_indices': [1]}, 'trainable_token_indices'),
        ({'init_lora_weights': 'pissa'}, "init_lora_weights='pissa'"),
    ],
)
def test_more_than_plain_lora_is_refused(train, adapter, capsys, settings, message):
    assert message in refused(capsys, train, '--rounds=0', f'--init_adapter={adapter(**settings)[0]}')


def test_broken_adapters_are_one_line_each(train, adapter, capsys, tmp_path):
    folder, _ = adapter()
    settings, tensors = folder / 'adapter_config.json', folder / 'adapter_model.safetensors'
    raw, good = settings.read_text(), load_file(tensors)
    fc, other = (f'base_model.model.transformer.h.0.mlp.c_fc.lora_{f}.weight' for f in 'AB')

    def said() -> str:
        return refused(capsys, train, f'--init_adapter={folder}')

    for text in ('{', '[' * 100000, '[]', 'null', '{}', '\udcff'):
        settings.write_bytes(text.encode(errors='surrogateescape'))
        assert 'adapter_config.json' in said()
    for change in ({'lora_alpha': 'x'}, {'lora_alpha': -1}, {'r': None}, {'alpha_pattern': {'(': 1}}, {'rank_pattern': [1]}):
        settings.write_text(json.dumps({**json.loads(raw), **change}))
        assert str(folder) in said() and not (tmp_path / 'run').exists()
    settings.write_text(json.dumps({**json.loads(raw), 'some_new_option': 3}))
    assert 'some_new_option=3 is more than LoRA' in said()
    settings.write_text(raw)
    for change, message in (
        ({'base_model.model.lm_head.lora_A.weight': torch.ones(4, 16)}, 'no place for base_model.model.lm_head'),
        (
            {'base_model.model.transformer.h.2.mlp.c_fc.lora_A.weight': torch.ones(4, 16)},
            'no place for base_model.model.transformer.h.2',
        ),
        ({'../../x': torch.ones(1)}, 'no place for ../../x'),
        ({fc: torch.ones(4, 17)}, 'A (4, 17) and B (64, 4), expected (4, 16) and (64, 4)'),
        ({fc: torch.ones(5, 16), other: torch.ones(64, 5)}, 'A (5, 16) and B (64, 5), expected (4, 16)'),
        ({fc: torch.ones(0, 16), other: torch.ones(64, 0)}, 'A (0, 16) and B (64, 0), expected (4, 16)'),
        ({fc: torch.tensor(1.0)}, 'has A () and B'),
        ({fc: torch.full((4, 16), torch.nan)}, 'not finite'),
        ({fc: None}, 'has no h.0.mlp.c_fc.A'),
    ):
        save_file({name: t for name, t in {**good, **change}.items() if t is not None}, tensors)
        assert message in said()
    tensors.write_bytes(tensors.read_bytes()[:200])
    assert 'cannot be read as model weights' in said()
    tensors.unlink()
    assert 'cannot be read as model weights' in said()
    save_file({**good, fc: good[fc].int()}, tensors)
    assert 'no place for base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight (torch.int32)' in said()
    tensors.unlink()
    assert 'expected a folder with adapter_config.json' in refused(capsys, train, f'--init_adapter={settings}')
    (folder / 'adapter_model.bin').write_bytes(b'')
    assert 'is a pickle' in said()
    assert 'no PEFT adapter' in refused(capsys, train, f'--init_adapter={tmp_path / "nowhere"}')


def test_an_unfinished_run_cannot_say_what_those_who_wait_start_from(train, adapter):
    """Its files hold the users that took part; without an adapter the others are the base, with one they would be wrong."""
    folder, _ = adapter()
    run = train('--method=fedsa_lora', '--participation=0.3', '--rounds=1', f'--init_adapter={folder}')
    assert len(open_run(run.out).models) == 3
    (run.out / 'summary.json').unlink()
    with pytest.raises(ValueError, match='let it finish'):
        open_run(run.out)
