"""Text out of a run's models, printed as it is made: a user's, the server's generalist alone, the frozen base.

    python sample.py out/demo --user=0 --prompt="def main" --tokens=200 --temperature=0.8 --top_k=50 --seed=1
    python sample.py out/demo --user=prose --prompt=FILE:LICENSE --samples=2     # users have names, too; a whole file
    python sample.py out/demo --user=generalist                                  # what a newcomer gets; or --user=base
    python sample.py out/demo --compare --prompt="The " --prompt="class "        # all of them, side by side
    python sample.py out/demo --compare --user=python,3 --temperature=0          # base, generalist and these users
    python sample.py --init_from=assets/base-tiny.safetensors --prompt="In the year "    # no run, a base alone

Sample i = 0, 1, ... of a prompt is that of seed + i: the same again on the same machine. It ends early at an end-of-text token.
The context is the last n_positions tokens of prompt and text, as the base has positions."""

import argparse
import codecs
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterable, Iterator
from itertools import chain, takewhile, zip_longest
from pathlib import Path

import torch
from tqdm import tqdm

from configurator import die
from data.stream import encoding, load_text
from eval import fingerprint, models_of, names_of, read_run, tested
from model import GPT, load_gpt, store_in_bf16

NARROWEST, GAP, MOST = 24, 2, 8  # columns of --compare: characters, characters between two, users if --user names none
CONTROL = {c: '\ufffd' for c in [*range(32), *range(127, 160)] if chr(c) not in '\n\t'}  # could command the terminal


def open_models(args: argparse.Namespace) -> tuple[dict, dict[str, GPT], dict[str, str]]:
    """(the run's config, {'base' | 'generalist' | a user's number: model}, {user's number: name}).

    Without a run the base alone. Raises, or dies, in one line for what is missing or does not belong together."""
    config = read_run(args.run)[0] if args.run else {'device': 'cpu', 'dtype': 'float32'}
    source, device = args.init_from or config['init_from'], args.device or config['device']
    base = load_gpt(source).requires_grad_(False)
    try:
        base.to(device)
    except (RuntimeError, AssertionError) as error:
        die(f'cannot use the device {device} ({str(error).splitlines()[0]}): give --device=cpu')
    if args.run and fingerprint(base) != config['base_sha256']:
        die(f'{source} is not the base that {args.run} was trained on (SHA-256 differs)')
    if config['dtype'] == 'bfloat16':  # as in train.py
        store_in_bf16(base)
    if not args.run:
        return config, {'base': base}, {}
    _, users, generalist = models_of(args.run, base)
    numbers = [str(i) for i in tested(config)]
    names = {'0': 'everybody'} if config['pooled'] else dict(zip(numbers, names_of(config)))
    return config, {'base': base, **({'generalist': generalist} if generalist else {}), **dict(zip(numbers, users))}, names


def find(who: str, models: dict[str, GPT], names: dict[str, str]) -> str:
    """The key in models of --user=who: base, generalist or a user's number, else a name that one user has. Dies without one."""
    keys = [who] if who in models else [number for number, name in names.items() if name == who]
    if len(keys) != 1:
        known = [f'{key} ({names[key]})' if key in names else key for key in models]
        die(f'--user={who}: expected one of {", ".join(known[:12])}{", ..." if len(known) > 12 else ""}')
    return keys[0]


def tokenizer_of(base: GPT):
    V = base.config.vocab_size
    for name, n in (('bytes', 257), ('gpt2', 50257)):
        if 0 <= V - n < 128:  # bases pad their vocabulary, e.g. 50257 -> 50304
            return encoding(name)
    die(f'the base has a vocabulary of {V} tokens: expected 257 (bytes) or 50257 (gpt2), or up to 127 more')


def read_prompt(prompt: str, enc, n_positions: int) -> tuple[str, list[int]]:
    """(text, tokens) of a prompt, or of a file if it reads FILE:path: the last n_positions tokens. An empty one is the start
    of a document: what follows end-of-text for GPT-2; what follows a newline for bytes, where no such token separates them."""
    file = prompt[5:] if prompt.startswith('FILE:') else None
    ids = enc.encode_ordinary(prompt) if file is None else load_text(file, enc.name).tolist()
    if len(ids) > n_positions:
        print(f'sample.py: a prompt of {len(ids)} tokens: the model sees the last {n_positions}', file=sys.stderr)
    ids = ids[-n_positions:]
    return ''.join(decode(ids, enc)), ids or ([enc.eot_token] if enc.name == 'gpt2' else enc.encode_ordinary('\n'))


def decode(tokens: Iterable[int], enc) -> Iterator[str]:
    """The text of tokens, a piece for each and one for the end. A token may be a part of a character, which comes when it is
    complete; what is no UTF-8, no token of the tokenizer (a padded vocabulary), or a control character becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    for token in tokens:
        raw = enc.decode_single_token_bytes(token) if token < enc.n_vocab else b'\xff'
        yield decoder.decode(raw).translate(CONTROL)
    yield decoder.decode(b'', final=True)


def sample(model: GPT, ids: list[int], enc, args: argparse.Namespace, seed: int) -> Iterator[str]:
    """What the model writes after the prompt, in pieces."""
    idx = torch.tensor([ids], device=model.wte.weight.device)  # (1, T)
    new = (token.item() for token in model.stream(idx, args.tokens, args.temperature, args.top_k, seed))
    return decode(takewhile(lambda token: token != enc.eot_token, new), enc)


def show(pieces: Iterable[str]) -> None:
    for piece in pieces:
        print(piece, end='', flush=True)
    print()


def side_by_side(titles: list[str], texts: list[str], width: int) -> str:
    """Texts as columns of a terminal `width` characters wide, as many in a row as it holds."""
    fit = min(len(texts), max(1, (width + GAP) // (NARROWEST + GAP)))
    w, lines = (width + GAP) // fit - GAP, []
    for i in range(0, len(texts), fit):
        columns = [[title[:w], '-' * w] for title in titles[i : i + fit]]
        for column, text in zip(columns, texts[i : i + fit]):
            for line in text.expandtabs(4).split('\n'):
                column += textwrap.wrap(line, w, break_on_hyphens=False) or ['']  # keeps indents
        lines += [(' ' * GAP).join(c.ljust(w) for c in row).rstrip() for row in zip_longest(*columns, fillvalue='')] + ['']
    return '\n'.join(lines)


def compare(models: dict[str, GPT], ids: list[int], enc, args: argparse.Namespace, seed: int) -> None:
    """One prompt and seed under every model: in columns on a terminal that has room for two, else one below the other."""
    width, texts = shutil.get_terminal_size().columns, []
    columns = sys.stdout.isatty() and width >= 2 * NARROWEST + GAP
    for i, (title, model) in enumerate(models.items(), 1):
        pieces = sample(model, ids, enc, args, seed)
        if columns:
            of = f'{title} ({i} of {len(models)})'
            texts.append(''.join(tqdm(pieces, of, args.tokens, leave=False, disable=None, unit=' tokens')))
        else:
            print(f'{title}\n{"-" * NARROWEST}')
            show(chain(pieces, '\n'))
    if columns:
        print(side_by_side([*models], texts, width))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = die, parser.add_argument  # one line
    add('run', nargs='?', type=Path, metavar='RUN', help='folder of a run (its --out_dir)')
    add('--user', metavar='WHO', help='base, generalist, a number or a name (default: the first); of --compare several: 0,2')
    add('--prompt', action='append', help='text, or FILE:path; may be repeated (default: the start of a document)')
    add('--tokens', type=int, default=200, help='how many to make at most')
    add('--temperature', type=float, default=0.8, help='0 takes the likeliest token')
    add('--top_k', type=int, default=50, help='draw from the k likeliest')
    add('--samples', type=int, default=1, help='of each prompt')
    add('--seed', type=int, default=1)
    add('--compare', action='store_true', help=f'base, generalist and every user (the first {MOST} if --user names none)')
    add('--init_from', help="the base model: without RUN, or if it is no longer where the run's configuration says")
    add('--device', help='cpu, cuda, cuda:N, mps (default: as the run; cpu without)')
    args = parser.parse_args()
    if not args.run and not args.init_from:
        die('nothing to sample from: expected the folder of a run, or a base model as --init_from')
    for name, least in (('tokens', 1), ('temperature', 0), ('top_k', 1), ('samples', 1), ('seed', 0)):
        if not least <= getattr(args, name) < 2**62:  # NaN is neither
            die(f'--{name}={getattr(args, name)}: expected {least} or more')
    try:
        config, models, names = open_models(args)
        enc = tokenizer_of(models['base'])
        prompts = [read_prompt(prompt, enc, models['base'].config.n_positions) for prompt in args.prompt or ['']]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        die(error)
    whom = [args.user or [*names, 'base'][0]]
    if args.compare:
        whom = [*(key for key in models if key not in names), *(args.user.split(',') if args.user else [*names][:MOST])]
        if not args.user and len(names) > MOST:
            print(f'sample.py: the first {MOST} of {len(names)} users; --user=0,3 would name others', file=sys.stderr)
    keys = [find(who, models, names) for who in whom]
    chosen = {f'{key} {names[key]}' if key in names else key: models[key] for key in keys}
    jobs = [(*prompt, args.seed + i) for prompt in prompts for i in range(args.samples)]
    device = models['base'].wte.weight.device.type
    try:
        with torch.autocast(device, torch.bfloat16, enabled=config['dtype'] == 'bfloat16'):
            for n, (text, ids, seed) in enumerate(jobs):
                print('-' * NARROWEST + '\n' if n else '', end='')
                if args.compare:
                    print(f'prompt {text if len(text) <= 60 else "..." + text[-57:]!r}, seed {seed}\n')
                    compare(chosen, ids, enc, args, seed)
                else:
                    show(chain([text], sample(*chosen.values(), ids, enc, args, seed)))
    except RuntimeError as error:
        die(f'cannot draw from this model at temperature {args.temperature}: {error}')


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace')  # a terminal that does not speak UTF-8
    for name in ('SIGPIPE', 'SIGINT'):  # `| head` and Ctrl-C end it as they end other tools: at once, without a traceback
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    main()
