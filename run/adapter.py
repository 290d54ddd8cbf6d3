"""A PEFT LoRA adapter as the start of a run (--init_adapter). tools/export.py writes such adapters, of a GPT-2 or a Llama."""

import hashlib
import math
import re
from pathlib import Path

import torch

from federate import Tensors, pairs
from llama import hub_name
from lora_moe import scaling
from model import read_json, read_tensors

# of an adapter's configuration: what does not change the meaning of its tensors, or is read below
UNDERSTOOD = """peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r lora_alpha
    target_modules exclude_modules layers_to_transform layers_pattern lora_dropout fan_in_fan_out use_rslora init_lora_weights
    rank_pattern alpha_pattern megatron_core qalora_group_size eva_config""".split()


def plain(name: str) -> tuple[str | None, str]:
    """Our name of a LoRA tensor -> (its expert, None for attention; the name in a model that has this expert alone):
    h.0.mlp.specialists.1.c_fc.A -> specialist-1, h.0.mlp.c_fc.A; h.0.attn.c_attn.lora.A -> None, h.0.attn.c_attn.A."""
    found = re.fullmatch(r'(h\.\d+\.mlp\.)(generalist|specialist)s\.(\d+)\.(.+)', name)
    return (f'{found[2]}-{found[3]}', found[1] + found[4]) if found else (None, name.replace('.lora.', '.'))


def hub_module(name: str) -> str:
    """A linear as transformers calls it: h.0.mlp.c_fc -> transformer.h.0.mlp.c_fc; of a Llama, h.0.attn.q_proj ->
    model.layers.0.self_attn.q_proj."""
    return f'transformer.{name}' if '.c_' in name else hub_name(name)


def in_peft(name: str) -> str:
    """h.0.mlp.c_fc.A -> base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight."""
    return f'base_model.model.{hub_module(name[:-2])}.lora_{name[-1]}.weight'


def read_peft(folder: Path, fresh: Tensors, alpha: float) -> tuple[Tensors, str]:
    """A PEFT LoRA adapter in our names, shapes and scaling, and the SHA-256 of its files.

    fresh: {name: first value} of the generalists and attention LoRAs to fill, A (R, in) and B (out, R). Each becomes the
    adapter's: its alpha / r, or alpha / sqrt(r) with use_rslora, goes into B, over our alpha / sqrt(R). For r < R the other
    components keep A as it starts and have B = 0, so they change nothing and can learn. All generalists get the same; what
    attention the adapter lacks is not returned. Raises ValueError, one line, for all that this would not give exactly."""
    config, stored = read_files(folder)
    places, given, filled = {in_peft(plain(name)[1]): plain(name)[1] for name in fresh}, {}, {}
    for name, t in stored.items():
        if name not in places or not t.is_floating_point():
            raise ValueError(
                f'{folder}: no place for {name} ({t.dtype}): expected LoRA on the linears of attention and MLP, such as '
                f'{next(iter(places))}'
            )
        given[places[name]] = t.double()
    kinds = {name[:-2].split('.', 2)[2] for name in places.values() if '.mlp.' in name or name in given}
    for name in pairs(fresh):
        short = plain(name + '.A')[1][:-2]  # h.0.mlp.c_fc
        if short.split('.', 2)[2] not in kinds:
            continue
        for factor in (short + '.A', short + '.B'):
            if factor not in given:
                raise ValueError(f'{folder} has no {factor}: expected LoRA on all linears of the MLP, and alike on all layers')
        A, B, start, r = given[short + '.A'], given[short + '.B'], fresh[name + '.A'], setting(folder, config, short, 'r')
        n_out, R = fresh[name + '.B'].shape
        if A.shape != (r, start.shape[1]) or B.shape != (n_out, r):
            raise ValueError(
                f'{folder}: {short} has A {tuple(A.shape)} and B {tuple(B.shape)}, expected {(r, start.shape[1])} and '
                f'{(n_out, r)}: is it an adapter of this base?'
            )
        if r > R:
            fix = 'raise --lora_rank (to 4096 at most)' if '.mlp.' in short else 'train it with a rank_pattern for attention'
            raise ValueError(f'{folder}: {short} has rank {r}, here it can have {R}: {fix}')
        theirs = setting(folder, config, short, 'lora_alpha') / (math.sqrt(r) if config.get('use_rslora') else r)
        A = torch.cat((A.float(), start[r:]))  # (R, in)
        B = torch.cat((B * (theirs / scaling(alpha, R)), B.new_zeros(n_out, R - r)), 1).float()  # (out, R)
        if not A.isfinite().all() or not B.isfinite().all():
            raise ValueError(f'{folder}: {short} has numbers that are not finite')
        filled |= {name + '.A': A, name + '.B': B}
    files = (folder / 'adapter_config.json', folder / 'adapter_model.safetensors')
    return filled, hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()


def read_files(folder: Path) -> tuple[dict, Tensors]:
    """adapter_config.json, and the tensors by their names in PEFT. Raises ValueError for all that is more than LoRA on linears,
    as far as it can be known without a base."""
    if not (folder / 'adapter_model.safetensors').exists() and (folder / 'adapter_model.bin').exists():
        raise ValueError(f'{folder}/adapter_model.bin is a pickle, which may run code: save it with PEFT as safetensors')
    if not (folder / 'adapter_config.json').exists():
        raise ValueError(f'{folder} is no PEFT adapter: expected a folder with adapter_config.json, as of tools/export.py')
    config = read_json(folder / 'adapter_config.json')
    if config.get('peft_type') != 'LORA':
        raise ValueError(f"{folder}/adapter_config.json: expected an adapter of peft_type 'LORA'")
    for key, value in config.items():
        if key not in UNDERSTOOD and value not in (None, False, 'none', '', [], {}):
            raise ValueError(f'{folder}: {key}={value!r} is more than LoRA on linears, which is all that can be read here')
    if config.get('init_lora_weights', True) not in (True, False, None, 'gaussian', 'eva', 'orthogonal'):
        raise ValueError(f'{folder}: init_lora_weights={config["init_lora_weights"]!r} changes the base: save it converted')
    return config, read_tensors(folder / 'adapter_model.safetensors')[0]


def setting(folder: Path, config: dict, module: str, key: str) -> float:
    """'r' or 'lora_alpha' of one module: of the first pattern that its name ends with, as in PEFT, or the adapter's own."""
    patterns = {'r': 'rank_pattern', 'lora_alpha': 'alpha_pattern'}[key]
    try:
        found = [v for k, v in (config.get(patterns) or {}).items() if re.match(rf'(.*\.)?({k})$', hub_module(module))]
    except (AttributeError, RuntimeError, OverflowError, re.error):
        raise ValueError(f'{folder}: {patterns} is not {{name: number}}') from None
    value = [*found, config.get(key)][0]
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ValueError(f'{folder}: {key} of {module} is {value!r}, expected a number above 0')
    return value
