"""Text out of a run's models, printed as it is made: a user's, the server's generalist alone, the frozen base.

    python tools/sample.py out/demo --user=0 --prompt="def main" --tokens=200 --temperature=0.8 --top_k=50 --seed=1
    python tools/sample.py out/demo --user=prose --prompt=FILE:LICENSE --samples=2     # by name; #1 is number 1; a whole file
    python tools/sample.py out/demo --user=generalist                                  # what a newcomer gets; or --user=base
    python tools/sample.py out/demo --compare --prompt="The " --prompt="class "        # all of them, one below the other
    python tools/sample.py out/demo --compare --user=python,3 --temperature=0          # base, generalist and these users
    python tools/sample.py --init_from=assets/base-tiny.safetensors --prompt="In the year "    # no run, a base alone

Sample i = 0, 1, ... of a prompt is that of seed + i: the same again on the same machine. It ends early at an end-of-text token.
The context is the last n_positions tokens of prompt and text, as the base has positions. Keys and values of earlier tokens are
kept, with the same text as without; routing by `prefix` or `sequence`, and text beyond the base's positions, is computed anew
for every token."""

import argparse
import codecs
import signal
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, takewhile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import die, folder_of, home, parser
from data.stream import TOKENIZER, Encoding, Tokenizer, load_text, read_meta, tokenizer_for, tokenizer_of
from eval import open_base, open_run, read_run, who_is
from model import GPT, autocast

RULE, MOST = '-' * 24, 8  # between texts; users that --compare shows if --user names none
CONTROL = {c: '\ufffd' for c in [*range(32), *range(127, 160)] if chr(c) not in '\n\t'}  # could command the terminal


def read_options(argv: list[str]) -> argparse.Namespace:
    options = parser(__doc__)
    add = options.add_argument
    add('run', nargs='?', type=Path, metavar='RUN', help='folder of a run (its --out_dir)')
    add('--user', metavar='WHO', help='base, generalist, a name or a number (default: the first); of --compare several: 0,2')
    add('--prompt', action='append', help='text, or FILE:path; may be repeated (default: the start of a document)')
    add('--tokens', type=int, default=200, help='how many to make at most')
    add('--temperature', type=float, default=0.8, help='0 takes the likeliest token')
    add('--top_k', type=int, default=50, help='draw from the k likeliest')
    add('--samples', type=int, default=1, help='of each prompt')
    add('--seed', type=int, default=1)
    add('--compare', action='store_true', help=f'base, generalist and every user (the first {MOST} if --user names none)')
    add('--init_from', type=home, help="the base model: without RUN, or if it is no longer where the run's configuration says")
    add('--device', help='cpu, cuda, cuda:N, mps (default: as the run; cpu without)')
    args = options.parse_args(argv)
    if not args.run and not args.init_from:
        die('nothing to sample from: expected the folder of a run, or a base model as --init_from')
    for name, least in (('tokens', 1), ('temperature', 0), ('top_k', 1), ('samples', 1), ('seed', 0)):
        if not least <= getattr(args, name) < 2**62:  # NaN is neither
            die(f'--{name}={getattr(args, name)}: expected {least} or more')
    return args


def open_models(args: argparse.Namespace) -> tuple[dict[str, GPT], dict[str, str], str]:
    """({'base' | 'generalist' | a user's number: model}, {user's number: name}, dtype of products). Without a run the base
    alone. Raises ValueError or OSError for what is missing or does not belong together."""
    if not args.run:
        return {'base': open_base(args.init_from, args.device or 'cpu', 'float32')}, {}, 'float32'
    run = open_run(args.run, args.init_from, args.device)
    names = {'0': 'everybody'} if run.c.pooled else {str(i): name for i, name in zip(run.ids, run.names)}
    models = {'base': run.base, **({'generalist': run.generalist} if run.generalist else {}), **dict(zip(names, run.models))}
    return models, names, run.c.dtype


def pick(args: argparse.Namespace, models: dict[str, GPT], names: dict[str, str]) -> dict[str, GPT]:
    """{title: model} of those that are to write. Raises ValueError for one that is not there."""
    words, numbers = [key for key in models if key not in names], [f'#{number}' for number in names]
    whom = [args.user or [*numbers, 'base'][0]]
    if args.compare:
        several = [args.user] if args.user in names.values() else args.user.split(',') if args.user else numbers[:MOST]
        whom = [*words, *several]
        if not args.user and len(names) > MOST:
            print(f'sample.py: the first {MOST} of {len(names)} users; --user=0,3 would name others', file=sys.stderr)
    keys = [who_is(who, names, *words) for who in whom]
    return {f'{key} {names[key]}' if key in names else key: models[key] for key in keys}


def vocabulary_of(base: GPT, dataset: Path | None) -> Encoding:
    """The base's own tokenizer.json, else that of its run's data set, if there is one, else what has as many tokens."""
    if not base.tokenizer and dataset and (dataset / TOKENIZER).is_file():
        return tokenizer_of(dataset, read_meta(dataset, base.config.vocab_size))
    return tokenizer_for(base.config.vocab_size, base.tokenizer)


def read_prompt(prompt: str, enc: Encoding, n_positions: int) -> tuple[str, list[int]]:
    """(text, tokens) of a prompt, or of a file if it reads FILE:path: the last n_positions tokens. An empty one is the start
    of a document: what follows the token that begins one, GPT-2's end-of-text; a newline for bytes, which has none."""
    file = home(prompt[5:]) if prompt.startswith('FILE:') else None
    ids = enc.encode_ordinary(prompt) if file is None else load_text(file, enc).tolist()
    if len(ids) > n_positions:
        print(f'sample.py: a prompt of {len(ids)} tokens: the model sees the last {n_positions}', file=sys.stderr)
    ids = ids[-n_positions:]
    start = enc.start_token if isinstance(enc, Tokenizer) else enc.eot_token if enc.name == 'gpt2' else None
    return ''.join(decode(ids, enc)), ids or (enc.encode_ordinary('\n') if start is None else [start])


def decode(tokens: Iterable[int], enc: Encoding) -> Iterator[str]:
    """The text of tokens, a piece for each and one for the end. A token may be a part of a character, which comes when it is
    complete; what is no UTF-8, no token of the tokenizer (a padded vocabulary), or a control character becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    for token in tokens:
        raw = enc.decode_single_token_bytes(token) if token < enc.n_vocab else b'\xff'
        yield decoder.decode(raw).translate(CONTROL)
    yield decoder.decode(b'', final=True)


def sample(model: GPT, ids: list[int], enc: Encoding, args: argparse.Namespace, seed: int) -> Iterator[str]:
    """What the model writes after the prompt, in pieces."""
    idx = torch.tensor([ids], device=model.wte.weight.device)  # (1, T)
    new = (token.item() for token in model.stream(idx, args.tokens, args.temperature, args.top_k, seed))
    return decode(takewhile(lambda token: token != enc.eot_token, new), enc)


def show(pieces: Iterable[str]) -> None:
    for piece in pieces:
        print(piece, end='', flush=True)
    print()


def main(argv: list[str]) -> None:
    args = read_options(argv)
    try:
        models, names, dtype = open_models(args)
        enc = vocabulary_of(models['base'], folder_of(read_run(args.run, [])[0].dataset) if args.run else None)
        chosen = pick(args, models, names)
        prompts = [read_prompt(prompt, enc, models['base'].config.n_positions) for prompt in args.prompt or ['']]
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        die(error)
    jobs = [(*prompt, args.seed + i) for prompt in prompts for i in range(args.samples)]
    try:
        with autocast(models['base'].wte.weight.device, dtype):
            for n, (text, ids, seed) in enumerate(jobs):
                print(f'{RULE}\n' if n else '', end='')
                if args.compare:
                    print(f'prompt {text if len(text) <= 60 else "..." + text[-57:]!r}, seed {seed}\n')
                for title, model in chosen.items():
                    before, after = (f'{title}\n{RULE}\n', '\n') if args.compare else (text, '')
                    show(chain([before], sample(model, ids, enc, args, seed), [after]))
    except RuntimeError as error:
        die(f'cannot draw from this model at temperature {args.temperature}: {error}')


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it as it ends other tools: at once, without a traceback
    main(sys.argv[1:])
