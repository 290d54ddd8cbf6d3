"""Trains a small GPT-2 from scratch, to be the frozen base of runs that cannot download one.

    python data/prepare.py base --source=wikipedia_en.jsonl.gz    # English prose, and code of installed packages
    python pretrain.py                                            # makes assets/base-tiny.safetensors
    python pretrain.py --dataset=slimpajama --n_layer=2 --steps=0 --out=out/random.safetensors   # random weights

Plain next-token training on all users' train streams together; nothing of the method happens here."""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configurator import configure, die
from data.stream import get_batch, load_dataset
from eval import evaluate
from model import GPT, GPTConfig, save_gpt

# ---- switches ----------------------------------------------------------------------------------------------------
dataset = 'base'  # folder under data/
out = 'assets/base-tiny.safetensors'  # the model; a .json with how it was made is written beside it
n_layer = 4  # blocks
n_head = 2  # attention heads
n_embd = 128  # width
n_positions = 256  # longest sequence, and length of the training windows, tokens
steps = 20_000  # optimizer steps; 0 writes the random initialisation
batch_size = 16  # windows a step
lr = 2e-3  # peak learning rate, reached after warmup, then cosine to a tenth
warmup = 200  # steps
weight_decay = 0.1  # on matrices
grad_clip = 1.0  # largest gradient norm
bf16 = True  # bfloat16 autocast
device = 'cpu'  # cpu, cuda, mps
seed = 42  # of the initial weights and the batches
overwrite = False  # replace an existing model
config = configure(globals(), sys.argv[1:])

if Path(out).exists() and not overwrite:
    die(f'{out} exists: give --overwrite or another --out')
if n_embd % n_head or min(n_layer, n_head, n_positions, batch_size) < 1 or steps < 0:
    die(f'n_embd {n_embd} must be a multiple of n_head {n_head}, sizes at least 1, steps at least 0')
try:
    vocab_size = json.loads(Path('data', dataset, 'meta.json').read_text())['vocab_size']
    meta, streams = load_dataset(Path('data', dataset), n_positions, vocab_size)
except (OSError, ValueError, KeyError) as error:
    die(error)
train = np.concatenate([user['train'] for user in streams])

torch.manual_seed(seed)
model = GPT(GPTConfig(vocab_size, n_positions, n_layer, n_head, n_embd)).to(device)
decay = [p for p in model.parameters() if p.dim() == 2]
other = [p for p in model.parameters() if p.dim() < 2]
optimizer = torch.optim.AdamW(
    [{'params': decay, 'weight_decay': weight_decay}, {'params': other, 'weight_decay': 0.0}], lr=lr, betas=(0.9, 0.95)
)
print(
    f'{sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} train tokens, '
    f'{steps * batch_size * n_positions / len(train):.2f} passes'
)


def save() -> None:
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    save_gpt(model, out, torch.float16)  # half the bytes; evaluated below as it is stored


started, bar = time.time(), tqdm(range(steps), disable=None, unit='step')
for step in bar:
    rate = lr * min(1, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group['lr'] = rate
    x, y = (t.to(device) for t in get_batch(train, batch_size, n_positions, (seed, step)))
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        loss, _ = model.loss(x, y)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    if step % 100 == 0:
        bar.set_postfix(loss=f'{loss.item():.3f}')
    if step % 1000 == 999:
        tqdm.write(f'step {step + 1}/{steps}: train loss {loss.item():.3f} nats per token, {time.time() - started:.0f} s')
        sys.stdout.flush()  # a log file shows it at once
        save()

seconds = time.time() - started
model.to(torch.float16).float()  # what the file will hold
report = {}
for user, stream in zip(meta['users'], streams):
    nats = evaluate(model, stream['valid'], n_positions)['loss']
    bits = nats / math.log(2) * user['tokens']['valid'] / user['bytes']['valid']
    report[user['name']] = {
        'train_tokens': user['tokens']['train'],
        'valid_tokens': user['tokens']['valid'],
        'valid_nats_per_token': round(nats, 4),
        'valid_bits_per_byte': round(bits, 4),
    }
    print(f'{user["name"]:12} valid {nats:.4f} nats per token, {bits:.4f} bits per byte')
save()
note = {
    'command': ' '.join(['python', *sys.argv]),
    'config': config,
    'parameters': sum(p.numel() for p in model.parameters()),
    'data': {'source': meta['source'], 'tokenizer': meta['tokenizer'], 'sources': report},
    'tokens_seen': steps * batch_size * n_positions,
    'seconds': round(seconds),
    'torch': torch.__version__,
}
Path(out).with_suffix('.json').write_text(json.dumps(note, indent=1) + '\n')
print(f'wrote {out} and {Path(out).with_suffix(".json")}')
