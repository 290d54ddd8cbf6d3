"""Curves of a run, finished or not, for TensorBoard or Weights & Biases, out of the lines of its metrics.jsonl.

    python tools/curves.py out/demo                    # out/demo/tensorboard; then: tensorboard --logdir=out/demo/tensorboard
    python tools/curves.py out/demo --follow           # and the new lines of a run that goes on, until it has finished
    python tools/curves.py out/demo --wandb            # a run of project nanocomigs; WANDB_MODE=offline without a network

Both packages are extras: pip install -r requirements-log.txt. What they show are losses, perplexities, bytes and the
generalists' share in every layer: train_ppl/user0, local_test_ppl/user0, comm_bytes_up/user0 and so on over that user's expert
steps, router_loss/user0 over its router's steps, local_test_generalist_share/user0_layer3. They are drawn anew, in place of
what was drawn before; the same folder on the same machine is the same run of W&B."""

import argparse
import hashlib
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import die, parser, read_config, read_json

PAUSE = 2.0  # seconds between two looks at a file that grows


def lines(run: Path, follow: bool) -> Iterator[dict | None]:
    """None, then every whole line of metrics.jsonl; with follow the new ones too, until summary.json is there. Where the file
    got shorter, None and all of its lines: those of an unfinished round are run again, or the run has been overwritten."""
    file, at = run / 'metrics.jsonl', sys.maxsize
    while True:
        finished = (run / 'summary.json').exists()  # asked first: it is the last that a run writes
        if file.stat().st_size < at:
            at = 0
            yield None
        with open(file, 'rb') as f:
            f.seek(at)
            for raw in f:
                if raw.endswith(b'\n'):  # else it is still being written
                    at += len(raw)
                    yield read_json(file, 'kind', text=raw)
        if finished or not follow:
            return
        time.sleep(PAUSE)


def points(line: dict, n_generalists: int) -> tuple[int, dict[str, float]]:
    """(x, {curve: y}) that a line says about a user; (0, {}) if it is not about one."""
    if 'step' not in line:
        return 0, {}
    what, who = f'{line["when"]}_{line["split"]}' if line['kind'] == 'eval' else line['kind'], f'user{line["user"]}'
    keys = [key for key in line if type(line[key]) in (int, float) and key not in ('round', 'step', 'router_step', 'user')]
    y = {f'{what}_{key}/{who}': line[key] for key in keys}
    for layer, scores in enumerate(line.get('scores', ())):  # scores (E,)
        y[f'{what}_generalist_share/{who}_layer{layer}'] = sum(scores[:n_generalists])
    return line.get('router_step', line['step']), y  # a phase's router steps fall on one expert step


def begin(args: argparse.Namespace, config: dict) -> tuple:
    """(TensorBoard's writer, W&B's run), None where not asked for. Raises ImportError or ValueError, one line."""
    board = ours = None
    if args.tensorboard or not args.wandb:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(args.run / 'tensorboard', purge_step=0, flush_secs=10)  # readers drop what is in earlier files
    if args.wandb:
        import wandb

        same = hashlib.sha256(f'{platform.node()} {args.run.resolve()}'.encode()).hexdigest()[:16]
        try:
            ours = wandb.init(project='nanocomigs', name=str(args.run), id=same, dir=args.run, config=config)
        except (OSError, wandb.Error) as error:
            raise ValueError(f'--wandb: {error}; WANDB_MODE=offline needs neither network nor login') from None
        ours.define_metric('*', step_metric='user_step')
    return board, ours


def end(args: argparse.Namespace, board, ours) -> None:
    file = args.run / 'summary.json'
    if board:
        board.close()
    if ours:
        summary = read_json(file) if file.exists() else {}
        ours.summary.update({name: value for name, value in summary.items() if type(value) in (int, float, str)})
        ours.finish()


def main(argv: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument('run', type=Path, metavar='RUN', help='folder of a run (its --out_dir)')
    options.add_argument('--tensorboard', action='store_true', help='draw RUN/tensorboard (the default)')
    options.add_argument('--wandb', action='store_true', help='draw a run of Weights & Biases')
    options.add_argument('--follow', action='store_true', help='wait for new lines until RUN has finished; Ctrl-C ends it, too')
    args = options.parse_args(argv)
    board = ours = None
    try:
        if not (args.run / 'config.json').exists():
            die(f'{args.run} is no run: it has no config.json')
        for line in lines(args.run, args.follow):
            if line is None:  # from the first line
                end(args, board, ours)
                config, number = read_config(args.run), 0
                board, ours = begin(args, config)
                continue
            x, y = points(line, config['n_generalists'])
            for name, value in y.items() if board else ():
                board.add_scalar(name, value, x)
            if ours and y:
                ours.log({'user_step': x, **y}, step=number)  # W&B's own step is the number of the line
            number += 1
    except KeyboardInterrupt:
        pass
    except ImportError as error:
        die(f'{error}: curves need their packages: pip install -r requirements-log.txt')
    except (KeyError, TypeError, AttributeError) as error:
        die(f'{args.run}/metrics.jsonl has what no run wrote ({error!r})')
    except (OSError, ValueError) as error:
        die(error)
    end(args, board, ours)


if __name__ == '__main__':
    main(sys.argv[1:])
