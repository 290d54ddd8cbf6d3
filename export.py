"""A run's models in Hugging Face's formats, and a PEFT adapter as the start of a run.

    python export.py out/demo --user=0 --to=peft out/peft                # LoRA adapters of one user, by number or name
    python export.py out/demo --user=generalist --to=merged out/gpt2     # all users' generalist in a plain GPT-2 folder
    python export.py out/demo --to=base out/base                         # the frozen base as such a folder
    python train.py config/demo.py --init_adapter=out/peft/generalist-0 --out_dir=out/again  # and back

A model with one expert is one LoRA: `peft` and `merged` are exact. A mixture of experts is none (gelu lies between an expert's
two products, and a router weighs the experts for every token): it becomes a folder for each expert, and the router's tensors.
DIR/README.md says what is what. Needs neither peft nor transformers, and executes nothing out of a file."""

import argparse
import hashlib
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from configurator import die
from eval import cell, fingerprint, read_run
from federate import pairs
from model import GPT, HUB, TRANSPOSED, load_gpt, read_tensors

WRITTEN = 'README.md config.json model.safetensors adapter_config.json adapter_model.safetensors router.safetensors'.split()
IN_PEFT = r'base_model\.model\.transformer\.(h\.\d+\.(?:attn|mlp)\.\w+)\.lora_([AB])\.weight'
# of an adapter's configuration: what does not change the meaning of its tensors, or is read below
UNDERSTOOD = """peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r lora_alpha
    target_modules exclude_modules layers_to_transform layers_pattern lora_dropout fan_in_fan_out use_rslora init_lora_weights
    rank_pattern alpha_pattern megatron_core qalora_group_size eva_config""".split()


def plain(name: str) -> tuple[str | None, str]:
    """Our name of a LoRA tensor -> (its expert, None for attention; the name in a model that has this expert alone):
    h.0.mlp.specialists.1.c_fc.A -> specialist-1, h.0.mlp.c_fc.A; h.0.attn.c_attn.lora.A -> None, h.0.attn.c_attn.A."""
    found = re.fullmatch(r'(h\.\d+\.mlp\.)(generalist|specialist)s\.(\d+)\.(.+)', name)
    return (f'{found[2]}-{found[3]}', found[1] + found[4]) if found else (None, name.replace('.lora.', '.'))


def by_expert(tensors: dict) -> dict[str, dict]:
    """{expert: the LoRA of the model with this expert alone}, generalists first: attention's is in all of them."""
    alone, attention = {}, {plain(name)[1]: t for name, t in tensors.items() if '.attn.' in name}
    for name, t in tensors.items():
        expert, short = plain(name)
        if expert:
            alone.setdefault(expert, {**attention})[short] = t
    return alone


# ---- what is written -------------------------------------------------------------------------------------------------
def write(folder: Path, prefix: str, config: dict, tensors: dict) -> None:
    """PREFIXconfig.json and PREFIXmodel.safetensors, as transformers and PEFT look for them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / f'{prefix}model.safetensors', {'format': 'pt'})
    (folder / f'{prefix}config.json').write_text(json.dumps(config, indent=1))


def write_adapter(folder: Path, lora: dict, alpha: float, base: str) -> None:
    """One LoRA as PEFT has it: A (r, in) and B (out, r) as here, and with use_rslora the same scaling alpha / sqrt(r).

    Ranks are those of the tensors: a component that HetLoRA has pruned is still there, as zeros, and so is its scaling."""
    rank = {name.split('.', 2)[2]: len(lora[name + '.A']) for name in pairs(lora)}  # {'mlp.c_fc': 8}: equal in all layers
    others = {module: r for module, r in rank.items() if r != rank['mlp.c_fc']}  # attention's is 8
    config = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base, 'inference_mode': True}
    config |= {'r': rank['mlp.c_fc'], 'rank_pattern': others, 'lora_alpha': alpha, 'alpha_pattern': {}, 'use_rslora': True}
    config |= {'target_modules': [*rank], 'fan_in_fan_out': True}  # GPT-2's linears are Conv1D there: (in, out)
    config |= {'lora_dropout': 0.0, 'bias': 'none', 'modules_to_save': None}
    tensors = {f'base_model.model.transformer.{n[:-2]}.lora_{n[-1]}.weight': t for n, t in lora.items()}
    write(folder, 'adapter_', config, tensors)


def write_gpt(folder: Path, gpt: GPT) -> None:
    """A GPT-2 folder in the Hub's layout: linears (in, out), the tied head not repeated."""
    end = gpt.config.vocab_size - 1  # <|endoftext|>, in either vocabulary the last
    config = {'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'activation_function': 'gelu_new'}
    config |= {**asdict(gpt.config), 'tie_word_embeddings': True, 'bos_token_id': end, 'eos_token_id': end, 'dtype': 'float32'}
    tensors = {f'transformer.{n}': t.t() if n.endswith(TRANSPOSED) else t for n, t in gpt.state_dict().items()}
    write(folder, '', config, tensors)


def merge(base: GPT, lora: dict, alpha: float) -> None:
    """W += γ B A in place, γ = alpha / sqrt(rank); in float64, rounded once."""
    weights = base.state_dict()
    for name in pairs(lora):
        A, B = lora[name + '.A'].double(), lora[name + '.B'].double()  # (r, in), (out, r)
        weights[name + '.weight'].copy_(weights[name + '.weight'] + alpha / math.sqrt(len(A)) * B @ A)


def tensors_of(run: Path, config: dict, server: dict, user: str | None) -> tuple[str, int | None, dict]:
    """(whose they are, number of the user, tensors) for a user's number or name, or 'generalist': the server's alone."""
    names = ['all'] if config['pooled'] else config['users']
    if user == 'generalist':
        if not by_expert(server):
            raise ValueError(f'{run} ({config["method"]}) has no generalist for everybody at its server: export a user')
        return 'the generalist alone, which a newcomer gets', None, server
    numbers = [i for i, name in enumerate(names) if user in (name, str(i))]
    if len(numbers) != 1:
        known = ', '.join(f'{i} ({name})' for i, name in [*enumerate(names)][:8]) + ', ...' * (len(names) > 8)
        raise ValueError(f'--user={user}: expected generalist, or one user of {known}')
    i = numbers[0]
    here = not (run / 'summary.json').exists() or (run / 'adapters' / f'user{i}.safetensors').exists()
    tensors = read_run(run, [i])[1][0] if here else {}
    if not tensors:
        raise ValueError(f'user {i} ({names[i]}) has not taken part in {run}: it has no tensors of its own')
    return f'user {i} ({names[i]}) after its last local steps', i, tensors


MIXTURE = """
## What PEFT cannot say

This model is not one LoRA. In every layer each token x (C,), the input of the MLP, goes through some of E = {E} experts,
and their outputs are added with weights of that token in that layer:

    {gate}
    y = Σ_(j in S) w_j MLP_j(x),    MLP_j(x) = P_j gelu(F_j x + b_F) + b_P,    F_j = F + γ B A, P_j alike

gelu lies between the two matrices of an expert, so no single LoRA gives the same y, not even for a fixed w; and PEFT has no
such router. So each folder holds **one expert alone** with the attention LoRA: the model in which this expert runs for every
token with weight 1, *not* the model that was trained and measured. That one runs in nanoCoMiGS: `python eval.py {run}`.

| folder | j, its row of Φ | what it is |
|---|---|---|
"""


def readme(args: argparse.Namespace, config: dict, who: str, i: int | None, experts: list, base: str, tokens: str) -> str:
    """DIR/README.md: where these files come from, what they are and cannot say, how to load them."""
    run, n, mixture = args.run, len(experts), args.to == 'peft' and len(experts) > 1
    summary = json.loads((run / 'summary.json').read_text()) if (run / 'summary.json').exists() else {}
    text = f'# {config["method"]}: {who}\n\nFrom the nanoCoMiGS run `{run}`: {config["method"]} on {config["dataset"]}, '
    text += f'{config["rounds"]} rounds{"" if summary else " (unfinished)"}, seed {config["seed"]}. Base: `{base}`. {tokens}\n'
    if i in summary.get('user_ids', ()) and not config['pooled']:
        ppl, before = (cell(summary[k][summary['user_ids'].index(i)]) for k in ('test_ppl', 'pretrained_test_ppl'))
        what = 'the mixture of all the experts below' if mixture else 'this model'
        text += f'\nTest perplexity ({config["target"]} text) of {what}: {ppl}; of the base before training: {before}.\n'
    if mixture:
        x = {'token': 'x', 'prefix': 'mean of x up to this token', 'sequence': 'mean of x over the sequence'}
        gate = f'z = Φ {x[config["routing_unit"]]},  Φ (E, C): `h.LAYER.mlp.router.weight` in router.safetensors'
        gate += ' (of the first layer; S and w hold in all)' * config['one_routing']
        k = min(config['top_k'], n)
        gate += f'\n    S = the {k} largest of z,  w = softmax of z over {"S" if k > 1 else "all E"}'
        if config['router'] == 'mean' or i is None:
            gate = 'S = all experts,  w = 1 / E: this model has no router'
        what = {'g': 'generalist: averaged over the users every round', 's': "specialist: the user's own"}
        text += MIXTURE.format(E=n, gate=gate, run=run)
        text += ''.join(f'| `{expert}` | {j} | {what[expert[0]]} |\n' for j, expert in enumerate(experts))
    text += '\nOne expert, so this is the whole model, exactly.\n' * (n == 1)
    load = 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained'
    load += f'({(base if args.to == "peft" else str(args.dir))!r})\n'
    if args.to == 'peft':
        load = f'from peft import PeftModel\n{load}model = PeftModel.from_pretrained'
        load += f'(model, {str(args.dir / experts[0] if mixture else args.dir)!r})\n'
    return f'{text}\n## To load it\n\n```python\n{load}```\n'


def clear(folder: Path, overwrite: bool) -> None:
    """The folder without an earlier export: only what this file writes is ever deleted. Raises ValueError."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f'{folder} is a file: give a folder')
    if (folder / 'metrics.jsonl').exists():
        raise ValueError(f'{folder} is the folder of a run: give another one')
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f'{folder} is not empty: give --overwrite to replace an export in it, or another folder')
    for sub in (*folder.glob('generalist-*'), *folder.glob('specialist-*'), folder / 'base', folder):
        for name in WRITTEN:
            (sub / name).unlink(missing_ok=True)
        if sub != folder and sub.is_dir() and not any(sub.iterdir()):
            sub.rmdir()
    folder.mkdir(parents=True, exist_ok=True)


def export(args: argparse.Namespace) -> None:
    """Reads and checks everything, then writes DIR. Raises ValueError or OSError, one line."""
    config, _, server = read_run(args.run, [])
    who, i, tensors = ('the frozen base', None, {}) if args.to == 'base' else tensors_of(args.run, config, server, args.user)
    loras, source, gpt = by_expert(tensors), args.base or config['init_from'], None
    if args.to == 'merged' and len(loras) > 1:
        raise ValueError(f'{who} is a mixture of {len(loras)} experts, which no plain GPT-2 equals: use --to=peft')
    flora = config['aggregate'] == 'flora'
    if flora:  # its own base, as the last round began with it
        source = str(args.run / 'adapters' / 'base.safetensors')
        if args.base or not Path(source).exists():
            raise ValueError(
                f'{args.run} merges into a base of its own and saves it as {source} when it has finished: '
                'wait for that, and leave --base out'
            )
    if source not in HUB and args.dir.resolve() == Path(source).resolve():
        raise ValueError(f'{args.dir} is the base itself: give another folder')
    # adapters name a base of the Hub, or a folder in the Hub's format; any other base is written beside them
    named = HUB.get(source) or (source if Path(source, 'config.json').exists() else None)
    if args.base or args.to != 'peft' or source not in HUB:
        gpt = load_gpt(source)
        if not flora and fingerprint(gpt) != config['base_sha256']:
            raise ValueError(f'{source} is not the base that {args.run} was trained on (SHA-256 differs): give that as --base')
    clear(args.dir, args.overwrite)
    if args.to == 'peft':
        base = named or str(args.dir / 'base')
        if not named:
            write_gpt(args.dir / 'base', gpt)
        for expert, lora in loras.items():
            write_adapter(args.dir / expert if len(loras) > 1 else args.dir, lora, config['lora_alpha'], base)
        if router := {name: t for name, t in tensors.items() if name.endswith('.mlp.router.weight')}:
            save_file(router, args.dir / 'router.safetensors')
    else:
        base = source
        for lora in loras.values():
            merge(gpt, lora, config['lora_alpha'])
        write_gpt(args.dir, gpt)
    bytewise = gpt and gpt.config.vocab_size < 50257
    tokens = 'No Hugging Face tokenizer: a token is a byte (`list(text.encode())`), 256 ends a document.' if bytewise else ''
    (args.dir / 'README.md').write_text(readme(args, config, who, i, [*loras], base, tokens), encoding='utf-8')
    print(f'{who}: wrote {args.dir}/ ({args.to}' + f', {len(loras)} adapters of one expert each' * (len(loras) > 1) + ')')


# ---- and what is read ------------------------------------------------------------------------------------------------
def read_peft(folder: Path, fresh: dict, alpha: float) -> tuple[dict, str]:
    """A PEFT LoRA adapter of GPT-2 in our names, shapes and scaling, and the SHA-256 of its files.

    fresh: {name: first value} of the generalists and attention LoRAs to fill, A (R, in) and B (out, R). Each becomes the
    adapter's: its alpha / r, or alpha / sqrt(r) with use_rslora, goes into B, over our alpha / sqrt(R). For r < R the other
    components keep A as it starts and have B = 0, so they change nothing and can learn. All generalists get the same; what
    attention the adapter lacks is not returned. Raises ValueError, one line, for all that this would not give exactly."""
    weights = folder / 'adapter_model.safetensors'
    if not weights.exists() and (folder / 'adapter_model.bin').exists():
        raise ValueError(f'{folder}/adapter_model.bin is a pickle, which may run code: save it with PEFT as safetensors')
    try:
        raw = (folder / 'adapter_config.json').read_bytes()
        config = json.loads(raw)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f'{folder} is no PEFT adapter: adapter_config.json cannot be read ({error})') from None
    if not isinstance(config, dict) or config.get('peft_type') != 'LORA':
        raise ValueError(f"{folder}/adapter_config.json: expected an adapter of peft_type 'LORA'")
    for key, value in config.items():
        if key not in UNDERSTOOD and value not in (None, False, 'none', '', [], {}):
            raise ValueError(f'{folder}: {key}={value!r} is more than LoRA on linears, which is all that can be read here')
    if config.get('init_lora_weights', True) not in (True, False, None, 'gaussian', 'eva', 'orthogonal'):
        raise ValueError(f'{folder}: init_lora_weights={config["init_lora_weights"]!r} changes the base: save it converted')

    def setting(patterns: str, module: str, default: str) -> float:
        """A number of one module: of the first pattern that its name ends with, as in PEFT, or the default."""
        try:
            found = [v for k, v in (config.get(patterns) or {}).items() if re.match(rf'(.*\.)?({k})$', f'transformer.{module}')]
        except (AttributeError, RuntimeError, OverflowError, re.error):
            raise ValueError(f'{folder}: {patterns} is not {{name: number}}') from None
        value = [*found, config.get(default)][0]
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise ValueError(f'{folder}: {default} of {module} is {value!r}, expected a number above 0')
        return value

    given, filled, places = {}, {}, {plain(name)[1] for name in fresh}
    for name, t in read_tensors(weights)[0].items():
        found = re.fullmatch(IN_PEFT, name)
        short = f'{found[1]}.{found[2]}' if found else None
        if short not in places:
            raise ValueError(f'{folder}: there is no place for {name}: expected LoRA on the linears of attention and MLP')
        given[short] = t.double()
    kinds = {'mlp.c_fc', 'mlp.c_proj', *(name[:-2].split('.', 2)[2] for name in given)}
    for name in pairs(fresh):
        short = plain(name + '.A')[1][:-2]  # h.0.mlp.c_fc
        if short.split('.', 2)[2] not in kinds:
            continue
        for factor in (short + '.A', short + '.B'):
            if factor not in given:
                raise ValueError(f'{folder} has no {factor}: expected LoRA on mlp.c_fc and mlp.c_proj, and alike on all layers')
        A, B, start, r = given[short + '.A'], given[short + '.B'], fresh[name + '.A'], setting('rank_pattern', short, 'r')
        n_out, R = fresh[name + '.B'].shape
        if A.shape != (r, start.shape[1]) or B.shape != (n_out, r):
            raise ValueError(
                f'{folder}: {short} has A {tuple(A.shape)} and B {tuple(B.shape)}, expected {(r, start.shape[1])} and '
                f'{(n_out, r)}: is it an adapter of this base?'
            )
        if r > R:
            fix = 'raise --lora_rank' if '.mlp.' in short else 'train it with a rank_pattern for attention'
            raise ValueError(f'{folder}: {short} has rank {r}, here it can have {R}: {fix}')
        theirs = setting('alpha_pattern', short, 'lora_alpha') / (math.sqrt(r) if config.get('use_rslora') else r)
        A = torch.cat((A.float(), start[r:]))  # (R, in)
        B = torch.cat((B * (theirs / (alpha / math.sqrt(R))), B.new_zeros(n_out, R - r)), 1).float()  # (out, R)
        if not A.isfinite().all() or not B.isfinite().all():
            raise ValueError(f'{folder}: {short} has numbers that are not finite')
        filled |= {name + '.A': A, name + '.B': B}
    return filled, hashlib.sha256(raw + weights.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=Path, metavar='RUN', help='folder of a run (its --out_dir)')
    parser.add_argument('dir', type=Path, metavar='DIR', help='folder to write')
    parser.add_argument('--user', help="a user's number or name, or generalist: the server's tensors alone")
    parser.add_argument('--to', choices=('peft', 'merged', 'base'), default='peft', help='what to write (default: peft)')
    parser.add_argument('--base', help="where the base is now (default: the run's init_from)")
    parser.add_argument('--overwrite', action='store_true', help='replace an earlier export in DIR')
    args = parser.parse_args()
    try:
        export(args)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        die(f'{args.run}: config.json or summary.json is not that of a run ({error!r})')
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        die(error)


if __name__ == '__main__':
    main()
