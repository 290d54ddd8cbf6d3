"""A run's models in Hugging Face's formats.

    python tools/export.py out/demo --user=0 --to=peft out/peft                # LoRA adapters of one user, by number or name
    python tools/export.py out/demo --user=generalist --to=merged out/gpt2     # all users' generalist in a plain model's folder
    python tools/export.py out/demo --to=base out/base                         # the frozen base as such a folder
    python train.py config/demo.py --init_adapter=out/peft/generalist-0 --out_dir=out/again        # and back

A model with one expert is one LoRA: `peft` and `merged` are exact. A mixture of experts is none (an activation lies between
an expert's products, and a router weighs the experts for every token): it becomes a folder for each expert, exact for that
expert alone, and the router's tensors. A base that is not in the Hub's format is written beside the adapter. docs/exports.md
says what is what, and how to load it. Needs neither peft nor transformers, and executes nothing out of a file."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

from safetensors import SafetensorError
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import cell, die, home, parser, read_json
from eval import open_base, read_run, who_is
from federate import Tensors, pairs
from llama import HUB, Llama, to_hub
from lora_moe import scaling
from model import GPT, TRANSPOSED, on_hub
from run.adapter import in_peft, plain

WRITTEN = """README.md config.json model.safetensors tokenizer.json tokenizer_config.json adapter_config.json
    adapter_model.safetensors router.safetensors""".split()
README = """# {who}

From the nanoCoMiGS run `{run}`: {method} on {dataset}, {rounds} rounds{unfinished}, seed {seed}. Base: `{base}`.
{perplexity}
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({gpt!r}){adapter}
```

A folder generalist-0, specialist-0, ... is one expert alone, *not* the mixture that was trained and measured.
What PEFT cannot say about that, and which tokens the model reads: docs/exports.md of nanoCoMiGS.
"""


def by_expert(tensors: Tensors) -> dict[str, Tensors]:
    """{expert: the LoRA of the model with this expert alone}, generalists first: attention's is in all of them."""
    alone, attention = {}, {plain(name)[1]: t for name, t in tensors.items() if '.attn.' in name}
    for name, t in tensors.items():
        expert, short = plain(name)
        if expert:
            alone.setdefault(expert, {**attention})[short] = t
    return alone


# ---- what is written -------------------------------------------------------------------------------------------------
def write(folder: Path, prefix: str, config: dict, tensors: Tensors) -> None:
    """PREFIXconfig.json and PREFIXmodel.safetensors, as transformers and PEFT look for them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / f'{prefix}model.safetensors', {'format': 'pt'})
    (folder / f'{prefix}config.json').write_text(json.dumps(config, indent=1, allow_nan=False), encoding='utf-8')


def write_adapter(folder: Path, lora: Tensors, alpha: float, base: str) -> None:
    """One LoRA as PEFT has it: A (r, in) and B (out, r) as here, and with use_rslora the same scaling alpha / sqrt(r).

    Ranks are those of the tensors: a component that HetLoRA has pruned is still there, as zeros, and so is its scaling."""
    names = pairs(lora)
    gpt2 = '.c_' in names[0]
    # {'mlp.c_fc': 8}, of a Llama {'up_proj': 8}: equal in all layers
    ranks = {name.split('.', 2 if gpt2 else 3)[-1]: len(lora[name + '.A']) for name in names}
    r = next(len(lora[name + '.A']) for name in names if '.mlp.' in name)
    others = {module: n for module, n in ranks.items() if n != r}  # attention's is 8
    config = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base, 'inference_mode': True}
    config |= {'r': r, 'rank_pattern': others, 'lora_alpha': alpha, 'alpha_pattern': {}, 'use_rslora': True}
    config |= {'target_modules': [*ranks], 'fan_in_fan_out': gpt2}  # whose linears are Conv1D there: (in, out)
    config |= {'lora_dropout': 0.0, 'bias': 'none', 'modules_to_save': None}
    write(folder, 'adapter_', config, {in_peft(name): t for name, t in lora.items()})


def write_base(folder: Path, base: GPT, beside: tuple[dict, dict]) -> None:
    """A folder in the Hub's layout. beside: of `what_is_beside`."""
    if isinstance(base, Llama):
        write_llama(folder, base, *beside)
    else:
        write_gpt(folder, base)


def write_gpt(folder: Path, gpt: GPT) -> None:
    """A GPT-2 folder in the Hub's layout: linears (in, out), the tied head not repeated."""
    end = gpt.config.vocab_size - 1  # <|endoftext|>, in either vocabulary the last
    config = {'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'activation_function': 'gelu_new'}
    config |= {**asdict(gpt.config), 'tie_word_embeddings': True, 'bos_token_id': end, 'eos_token_id': end, 'dtype': 'float32'}
    tensors = {f'transformer.{n}': t.t() if n.endswith(TRANSPOSED) else t for n, t in gpt.state_dict().items()}
    write(folder, '', config, tensors)


def write_llama(folder: Path, llama: Llama, ids: dict, files: dict[str, bytes]) -> None:
    """The same of a Llama, or of a Qwen2 where q, k and v have biases: how fast positions turn is said where transformers 4
    and where 5 looks for it. ids, files: of `what_is_beside`; an id not known is null, or transformers would invent one."""
    given = asdict(llama.config)
    kind, scaling = 'Qwen2' if given.pop('qkv_bias') else 'Llama', given.pop('rope_scaling')
    names = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
    rope = {'rope_type': 'llama3', **dict(zip(names, scaling))} if scaling else {'rope_type': 'default'}
    config = {'architectures': [f'{kind}ForCausalLM'], 'model_type': kind.lower(), 'hidden_act': 'silu', **given}
    config |= {'rope_parameters': {**rope, 'rope_theta': llama.config.rope_theta}, 'rope_scaling': rope if scaling else None}
    write(folder, '', {**config, **ids, 'dtype': 'float32'}, to_hub(llama))
    for name, raw in files.items():
        (folder / name).write_bytes(raw)


def write_readme(args: argparse.Namespace, c: SimpleNamespace, who: str, i: int | None, experts: list, base: str) -> None:
    """DIR/README.md: what this is of, the perplexity of user i where it was measured, how to load it."""
    file, perplexity = args.run / 'summary.json', ''
    summary = read_json(file, 'user_ids', 'test_ppl', 'pretrained_test_ppl') if file.exists() else {}
    measured = i in summary.get('user_ids', ()) and summary.get('test_when') != 'aggregated'  # which is later than the adapters
    if measured and not c.pooled:
        ppl, before = (cell(summary[key][summary['user_ids'].index(i)]) for key in ('test_ppl', 'pretrained_test_ppl'))
        perplexity = f"\nTest perplexity ({c.target} text) of this user's model in the run: {ppl}; of the base: {before}.\n"
    gpt, adapter = base if args.to == 'peft' else str(args.dir), ''
    if args.to == 'peft':
        folder = str(args.dir / experts[0] if len(experts) > 1 else args.dir)
        adapter = f'\n\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, {folder!r})'
    facts = {'who': who, 'run': args.run, 'base': base, 'unfinished': '' if summary else ' (unfinished)'}
    text = README.format(**vars(c), **facts, perplexity=perplexity, gpt=gpt, adapter=adapter)
    (args.dir / 'README.md').write_text(text, encoding='utf-8')


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


# ---- what is read ----------------------------------------------------------------------------------------------------
def tensors_of(run: Path, c: SimpleNamespace, server: Tensors, user: str | None) -> tuple[str, int | None, Tensors]:
    """(whose they are, number of the user, tensors) for --user of eval.who_is, or 'generalist': the server's alone."""
    names = ['all'] if c.pooled else c.users
    i = who_is(user, dict(enumerate(names)), 'generalist')
    if i == 'generalist':
        if not by_expert(server):
            raise ValueError(f'{run} ({c.method}) has no generalist for everybody at its server: export a user')
        return 'the generalist alone, which a newcomer gets', None, server
    here = not (run / 'summary.json').exists() or (run / 'adapters' / f'user{i}.safetensors').exists()
    tensors = read_run(run, [i])[1][0] if here else {}
    if not tensors:
        raise ValueError(f'user {i} ({names[i]}) has not taken part in {run}: it has no tensors of its own')
    return f'user {i} ({names[i]}) after its last local steps', i, tensors


def source_of(args: argparse.Namespace, c: SimpleNamespace) -> str:
    """Where the base is. FLoRA has one of its own, as its last round began with it. Raises ValueError if that is not there."""
    source = args.base or c.init_from
    if c.aggregate == 'flora':
        source = str(args.run / 'adapters' / 'base.safetensors')
        if args.base or not Path(source).exists():
            fix = 'leave --base out' if args.base else 'let it finish, or continue it with --resume'
            raise ValueError(
                f'{args.run} merges into a base of its own, which it saves as {source} when it has finished: {fix}'
            )
    if source not in HUB and args.dir.resolve() == Path(source).resolve():
        raise ValueError(f'{args.dir} is the base itself: give another folder')
    return source


def what_is_beside(base: GPT, source: str) -> tuple[dict, dict[str, bytes]]:
    """({'bos_token_id': 1, 'eos_token_id': 2}, None where it is not known; {name: bytes} of a tokenizer's files), from what
    lies beside a Llama's weights: tokenizer.json, and what lets AutoTokenizer take it as it is. Raises ValueError."""
    ids, place = {'bos_token_id': None, 'eos_token_id': None}, Path(source)
    if not isinstance(base, Llama) or not (base.tokenizer or place.exists()):
        return ids, {}
    folder = base.tokenizer.parent if base.tokenizer else place if place.is_dir() else place.parent
    config, words = folder / 'config.json', folder / 'tokenizer.json'
    given = read_json(config) if config.exists() else {}
    ids = {key: given.get(key) for key in ids}
    if not words.exists():
        return ids, {}
    named = {token['id']: token['content'] for token in read_json(words, 'added_tokens')['added_tokens']}
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast'}
    for key, found in ids.items():  # {'eos_token': '<|end_of_text|>'}; of several, as Llama 3 has them, the first
        settings[key[:-3]] = next((named[i] for i in (found if isinstance(found, list) else [found]) if i in named), None)
    return ids, {words.name: words.read_bytes(), 'tokenizer_config.json': json.dumps(settings, indent=1).encode()}


def merge(base: GPT, lora: Tensors, alpha: float) -> None:
    """W += γ B A in place; in float64, rounded once."""
    weights = base.state_dict()
    for name in pairs(lora):
        A, B = lora[name + '.A'].double(), lora[name + '.B'].double()  # (r, in), (out, r)
        weights[name + '.weight'].copy_(weights[name + '.weight'] + scaling(alpha, len(A)) * B @ A)


def export(args: argparse.Namespace) -> None:
    """Reads and checks everything, then writes DIR. Raises ValueError or OSError, one line."""
    c, _, server = read_run(args.run, [])
    who, i, tensors = ('the frozen base', None, {}) if args.to == 'base' else tensors_of(args.run, c, server, args.user)
    loras = by_expert(tensors)
    if args.to == 'merged' and len(loras) > 1:
        raise ValueError(f'{who} is a mixture of {len(loras)} experts, which no plain model equals: use --to=peft')
    source, gpt = source_of(args, c), None
    # adapters name a base of the Hub, or a folder in the Hub's format; any other base is written beside them
    hub, beside = on_hub(source, HUB), ({}, {})
    named = HUB.get(source, source) if hub or Path(source, 'config.json').exists() else None
    if args.base or args.to != 'peft' or not hub:
        gpt = open_base(source, 'cpu', 'float32', None if c.aggregate == 'flora' else c.base_sha256)
        beside = what_is_beside(gpt, c.init_from if c.aggregate == 'flora' else source)
    clear(args.dir, args.overwrite)
    base = source
    if args.to == 'peft':
        base = named or str(args.dir / 'base')
        if not named:
            write_base(args.dir / 'base', gpt, beside)
        for expert, lora in loras.items():
            write_adapter(args.dir / expert if len(loras) > 1 else args.dir, lora, c.lora_alpha, base)
        if router := {name: t for name, t in tensors.items() if name.endswith('.mlp.router.weight')}:
            save_file(router, args.dir / 'router.safetensors')
    else:
        for lora in loras.values():
            merge(gpt, lora, c.lora_alpha)
        write_base(args.dir, gpt, beside)
    write_readme(args, c, who, i, [*loras], base)
    print(f'{who}: wrote {args.dir}/ ({args.to}' + f', {len(loras)} adapters of one expert each' * (len(loras) > 1) + ')')


def main(argv: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument('run', type=Path, metavar='RUN', help='folder of a run (its --out_dir)')
    options.add_argument('dir', type=Path, metavar='DIR', help='folder to write')
    options.add_argument('--user', help="a user's name, number or #number, or generalist: the server's tensors alone")
    options.add_argument('--to', choices=('peft', 'merged', 'base'), default='peft', help='what to write (default: peft)')
    options.add_argument('--base', type=home, help="where the base is now (default: the run's init_from)")
    options.add_argument('--overwrite', action='store_true', help='replace an earlier export in DIR')
    args = options.parse_args(argv)
    try:
        export(args)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        die(f'{args.run}: config.json or summary.json is not that of a run ({error!r})')
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        die(error)


if __name__ == '__main__':
    main(sys.argv[1:])
