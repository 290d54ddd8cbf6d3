"""Curves of a run at TensorBoard and Weights & Biases, drawn from the lines of metrics.jsonl as they are written, so that they
cannot say anything else. Both packages are extras (requirements-log.txt): neither is imported unless it is asked for."""

import hashlib
import json
import platform
from pathlib import Path
from types import SimpleNamespace


def begin(config: dict) -> SimpleNamespace:
    """The curves of a run, before anything is written. Raises ValueError, one line, if what is asked for cannot be had."""
    curves = SimpleNamespace(board=None, writer=None, run=None, line=0, sent_before=0, k=config['n_generalists'])
    try:
        if config['tensorboard']:
            from torch.utils.tensorboard import SummaryWriter

            curves.writer = SummaryWriter
        if config['wandb']:
            import wandb
    except ImportError as error:
        raise ValueError(
            f'{error}: --tensorboard and --wandb need their packages: pip install -r requirements-log.txt'
        ) from None
    curves.wandb = wandb if config['wandb'] else None
    return curves


def start(curves: SimpleNamespace, config: dict) -> None:
    """W&B's run, before the first file: the same folder on the same machine is the same run. Raises ValueError, one line."""
    if not curves.wandb:
        return
    out = Path(config['out_dir'])
    try:
        out.mkdir(parents=True, exist_ok=True)
        curves.run = curves.wandb.init(
            project='nanocomigs',
            name=config['out_dir'],
            id=hashlib.sha256(f'{platform.node()} {out.resolve()}'.encode()).hexdigest()[:16],
            resume='allow' if config['resume'] else None,
            dir=out,
            config=config,
            settings={'silent': config['quiet']},
        )
    except (OSError, curves.wandb.Error) as error:
        raise ValueError(f'--wandb: {error}; WANDB_MODE=offline needs neither network nor login') from None
    curves.run.define_metric('*', step_metric='user_step')
    curves.sent_before = curves.run.step


def catch_up(curves: SimpleNamespace, out: Path) -> None:
    """All lines that a resumed run kept, drawn anew: purge_step has TensorBoard's readers drop what earlier files say."""
    if curves.writer:
        curves.board = curves.writer(out / 'tensorboard', purge_step=0, flush_secs=10)
    if curves.board or curves.run:
        for line in (out / 'metrics.jsonl').read_text(encoding='utf-8').splitlines():
            draw(curves, json.loads(line))


def draw(curves: SimpleNamespace, line: dict) -> None:
    """What a line of metrics.jsonl says about a user as points of curves: train_ppl/user0, local_test_ppl/user0,
    comm_bytes_up/user0 and so on over that user's expert steps, router_loss/user0 over its router's, and of the router's scores
    in every layer the generalists' share, local_test_generalist_share/user0_layer3. W&B's own step is the number of the line:
    what it has of an earlier start is not sent again."""
    number, curves.line = curves.line, curves.line + 1
    if 'step' not in line or not (curves.board or curves.run):
        return
    what, who = f'{line["when"]}_{line["split"]}' if line['kind'] == 'eval' else line['kind'], f'user{line["user"]}'
    x = line.get('router_step', line['step'])  # a phase's router steps fall on one expert step
    keys = [key for key in line if type(line[key]) in (int, float) and key not in ('round', 'step', 'router_step', 'user')]
    points = {f'{what}_{key}/{who}': line[key] for key in keys}
    for layer, scores in enumerate(line.get('scores', ())):  # scores (E,)
        points[f'{what}_generalist_share/{who}_layer{layer}'] = sum(scores[: curves.k])
    for name, value in points.items() if curves.board else ():
        curves.board.add_scalar(name, value, x)
    if curves.run and number >= curves.sent_before:
        curves.run.log({'user_step': x, **points}, step=number)


def end(curves: SimpleNamespace, summary: dict) -> None:
    if curves.board:
        curves.board.close()
    if curves.run:
        curves.run.summary.update({name: value for name, value in summary.items() if type(value) in (int, float, str)})
        curves.run.finish()
