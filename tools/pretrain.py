"""Trains a small GPT-2 from scratch, to be the frozen base of runs that cannot download one.

    python data/prepare.py base --source=wikipedia.jsonl.gz       # English prose, and code of installed packages
    python tools/pretrain.py --overwrite                          # makes assets/base-tiny.safetensors, in an hour on two cores
    python tools/pretrain.py --out=assets/mine.safetensors --n_layer=6 --n_embd=192 --n_head=3           # one's own
    python tools/pretrain.py --dataset=slimpajama --n_layer=2 --steps=0 --out=out/random.safetensors     # random weights

Plain next-token training on all users' train streams together; nothing of the method happens here. Beside the model a .json
tells how it was made, and what it is worth on the validation text of each source."""

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import checked, die, folder_of, home, literal, parser
from data.stream import Texts, get_batch
from model import GPT, GPTConfig, autocast, evaluate, save_gpt, usable

SWITCHES = {
    'dataset': ('base', 'folder under data/'),
    'out': ('assets/base-tiny.safetensors', 'the model; a .json with how it was made is written beside it'),
    'n_layer': (4, 'blocks'),
    'n_head': (2, 'attention heads'),
    'n_embd': (128, 'width'),
    'n_positions': (256, 'longest sequence, and length of the training windows, tokens'),
    'steps': (20_000, 'optimizer steps; 0 writes the random initialisation'),
    'batch_size': (16, 'windows a step'),
    'lr': (2e-3, 'peak learning rate, reached after warmup, then cosine to a tenth'),
    'warmup': (200, 'steps'),
    'weight_decay': (0.1, 'on matrices'),
    'grad_clip': (1.0, 'largest gradient norm'),
    'bf16': (True, 'bfloat16 autocast'),
    'device': ('cpu', 'cpu, cuda, mps'),
    'seed': (42, 'of the initial weights and the batches'),
    'overwrite': (False, 'replace an existing model'),
}


def read_options(argv: list[str]) -> SimpleNamespace:
    options = parser(__doc__)
    for name, (default, what) in SWITCHES.items():
        flag = {'nargs': '?', 'const': 'True'} if type(default) is bool else {'type': home}
        options.add_argument(f'--{name}', default=default, help=f'{what} (default: {default})', **flag)
    given = vars(options.parse_args(argv))
    values = {name: literal(value, SWITCHES[name][0]) if type(value) is str else value for name, value in given.items()}
    c = SimpleNamespace(**{name: checked(name, values[name], default, False) for name, (default, _) in SWITCHES.items()})
    if Path(c.out).exists() and not c.overwrite:
        die(f'{c.out} exists: give --overwrite or another --out')
    if min(c.n_layer, c.n_head, c.n_positions, c.batch_size) < 1 or c.n_embd % c.n_head or c.steps < 0:
        die(f'n_embd {c.n_embd} must be a multiple of n_head {c.n_head}, sizes at least 1, steps at least 0')
    return c


def learn(c: SimpleNamespace, model: GPT, train: np.ndarray) -> None:
    """c.steps steps of AdamW on the stream; every 1,000 of them the model is saved."""
    decay = [p for p in model.parameters() if p.dim() == 2]
    other = [p for p in model.parameters() if p.dim() < 2]
    groups = [{'params': decay, 'weight_decay': c.weight_decay}, {'params': other, 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(0.9, 0.95))
    started, bar = time.time(), tqdm(range(c.steps), disable=None, unit='step')
    for step in bar:
        rate = c.lr * min(1, (step + 1) / c.warmup) * (0.55 + 0.45 * math.cos(math.pi * step / c.steps))
        for group in optimizer.param_groups:
            group['lr'] = rate
        x, y = (t.to(c.device) for t in get_batch(train, c.batch_size, c.n_positions, (c.seed, step)))
        with autocast(c.device, 'bfloat16' if c.bf16 else 'float32'):
            loss, _ = model.loss(x, y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        optimizer.step()
        if not loss.isfinite():
            sys.exit(f'the loss is {loss.item()} at step {step}: lower --lr; {c.out} is the last that was saved')
        if step % 100 == 0:
            bar.set_postfix(loss=f'{loss.item():.3f}')
        if step % 1000 == 999:
            seconds = time.time() - started
            tqdm.write(f'step {step + 1}/{c.steps}: train loss {loss.item():.3f} nats per token, {seconds:.0f} s')
            sys.stdout.flush()  # a log file shows it at once
            save(c, model)


def save(c: SimpleNamespace, model: GPT) -> None:
    Path(c.out).parent.mkdir(parents=True, exist_ok=True)
    save_gpt(model, c.out, torch.float16)  # half the bytes; evaluated as it is stored


def worth(model: GPT, user: dict, valid: np.ndarray) -> dict:
    """Of the model on a source's validation text. user: its entry in meta.json."""
    nats = evaluate(model, valid, model.config.n_positions)['loss']
    bits = nats / math.log(2) * user['tokens']['valid'] / user['bytes']['valid']
    print(f'{user["name"]:12} valid {nats:.4f} nats per token, {bits:.4f} bits per byte')
    tokens = {f'{split}_tokens': user['tokens'][split] for split in ('train', 'valid')}
    return {**tokens, 'valid_nats_per_token': round(nats, 4), 'valid_bits_per_byte': round(bits, 4)}


def main(argv: list[str]) -> None:
    c = read_options(argv)
    folder = folder_of(c.dataset)
    try:
        usable(c.device)
        texts = Texts(folder, c.n_positions, None)
    except (OSError, ValueError) as error:
        die(error)
    users = [texts.of(i) for i in range(len(texts.names))]
    train = np.concatenate([user['train'] for user in users])
    torch.manual_seed(c.seed)
    model = GPT(GPTConfig(texts.meta['vocab_size'], c.n_positions, c.n_layer, c.n_head, c.n_embd)).to(c.device)
    n_parameters, seen = sum(p.numel() for p in model.parameters()), c.steps * c.batch_size * c.n_positions
    print(f'{n_parameters:,} parameters, {len(train):,} train tokens, {seen / len(train):.2f} passes')
    started = time.time()
    learn(c, model, train)
    seconds = time.time() - started
    model.to(torch.float16).float()  # what the file will hold
    report = {user['name']: worth(model, user, own['valid']) for user, own in zip(texts.meta['users'], users)}
    save(c, model)
    note = {
        'command': ' '.join(['python', 'tools/pretrain.py', *argv]),
        'config': vars(c),
        'parameters': n_parameters,
        'data': {'source': texts.meta['source'], 'tokenizer': texts.meta['tokenizer'], 'sources': report},
        'tokens_seen': seen,
        'seconds': round(seconds),
        'torch': torch.__version__,
    }
    Path(c.out).with_suffix('.json').write_text(json.dumps(note, indent=1) + '\n', encoding='utf-8')
    print(f'wrote {c.out} and {Path(c.out).with_suffix(".json")}')


if __name__ == '__main__':
    main(sys.argv[1:])
