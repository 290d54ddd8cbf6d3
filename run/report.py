"""What came out: the last evaluations, adapters/, summary.json and the table that a run ends with."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from configurator import mean, table
from federate import ONE_MODEL, Tensors, truncate
from llama import load_base
from lora_moe import ATTENTION_RANK, scaling, shape_of
from model import GPT, autocast, evaluate, perplexity
from run import checkpoint, processes
from run.fleet import Fleet
from run.journal import Journal


def report(c: SimpleNamespace, fleet: Fleet, journal: Journal, server: Tensors) -> dict:
    """Evaluates the tested users, writes the files. Returns summary.json; ends all processes but the first."""
    ids = [0] if c.pooled else fleet.tested
    users = [*fleet.wake(ids)]
    for user in users if c.aggregate == 'fdlora' and c.rounds else ():
        w1, w2 = user.fuse(server)
        journal.log('fusion', {'step': user.expert_steps, 'user': user.id, 'own': w1, 'mean': w2})
        journal.test(user, 'fused')
    journal.publish()
    for user in users:  # what choices between runs may look at
        with autocast(user.device, c.dtype):
            result = evaluate(user.model, user.data['valid'], c.block_size, journal.hidden)
        at = {'step': user.expert_steps, 'user': user.id, 'split': 'valid', 'when': 'final'}
        journal.log('eval', {**at, 'loss': result['loss'], 'ppl': result['ppl']})
    journal.publish()
    save_adapters(c, fleet, journal, server)
    original = fleet.base  # and the base as it was before training
    if c.aggregate == 'flora':
        original = load_base(c.init_from).to(c.device)
        server = fleet.merge(server)
    for user in users if c.rounds and (fleet.asked or fleet.some) else ():  # once more, after the last aggregation
        user.receive(server, journal.t, fleet.stacks)
        journal.test(user, 'aggregated')
    journal.publish()
    for user in users:
        journal.test(user, 'pretrained', original, round=0, step=0)
    journal.publish()
    trainable = processes.gather({user.id: {'n': torch.tensor(user.trainable)} for user in users})
    processes.end()
    summary = summarise(c, fleet, journal, [own['n'].item() if c.rounds else 0 for own in trainable.values()])
    checkpoint.write_json(journal.out / 'summary.json', summary)
    show(c, journal, summary)
    return summary


def save_adapters(c: SimpleNamespace, fleet: Fleet, journal: Journal, server: Tensors) -> None:
    here, folder = {user.id: user.adapter for user in fleet.here}, journal.out / 'adapters'
    for i in sorted({*fleet.last_round, *([0] if c.pooled else fleet.tested)})[processes.rank() :: processes.world()]:
        own, sha256 = here[i] if i in here else checkpoint.read(fleet.file(i), 'adapter/')[0], journal.identity['base']
        save_user(folder, i, own, c, i, sha256, name=journal.name(i), round=fleet.last_round.get(i, 0))
    if processes.rank() == 0:
        save_common(folder, c, fleet.model_for_all(server), fleet.base, c.rounds)


def save_user(folder: Path, number: int, own: Tensors, c: SimpleNamespace, i: int, base_sha256: str, **facts: object) -> None:
    """user{number}.safetensors: a user's own tensors, with what a reader needs to rebuild the model around them. i: its place
    in the switches."""
    facts |= {'user': number, 'method': c.method, **shape_of(c, i), 'scaling': scaling(c.lora_alpha, c.lora_rank[i])}
    facts |= {'attention_rank': ATTENTION_RANK, 'base': c.init_from, 'base_sha256': base_sha256}
    checkpoint.save(folder / f'user{number}.safetensors', own, {}, **{key: str(value) for key, value in facts.items()})


def save_common(folder: Path, c: SimpleNamespace, model: Tensors, base: GPT | None, t: int) -> None:
    """server.safetensors, where there is one model for all after round t; base.safetensors, where FLoRA changes the base: as
    the last round began with it."""
    if c.aggregate in ONE_MODEL:
        checkpoint.save(folder / 'server.safetensors', model, {}, base=c.init_from, round=str(t))
    if c.aggregate == 'flora' and base:
        shape = json.dumps(dataclasses.asdict(base.config))
        checkpoint.save(folder / 'base.safetensors', base.state_dict(), {}, **{base.described_by: shape})


def summarise(c: SimpleNamespace, fleet: Fleet, journal: Journal, trainable: list[int]) -> dict:
    """summary.json: perplexities of the tested users, sizes, bytes of all rounds, seconds."""
    clock, users = journal.clock, fleet.texts.meta['users']
    when = 'aggregated' if fleet.some else 'fused' if c.aggregate == 'fdlora' else 'local'  # what all have at one moment
    when = when if c.rounds else 'pretrained'
    ppl, aggregated = journal.of_all(when), journal.of_all('aggregated')
    valid = [ppl for _, ppl in journal.results['final'].values()]
    n_tokens = [1 if c.target == 'mixture' else users[i]['tokens']['test'] - 1 for i in journal.tested]
    step_tokens = c.batch_size * (len(users) if c.pooled else 1) * c.block_size
    shared = sum(v.numel() for v in truncate(fleet.asked, c.lora_rank[0]).values())
    return {
        'method': c.method,
        'dataset': c.dataset,
        'target': c.target,
        'seed': c.seed,
        'rounds': c.rounds,
        'users': [users[i]['name'] for i in journal.tested],
        'user_ids': journal.tested,
        'mean_test_ppl': mean(ppl),
        'test_ppl': ppl,
        'test_when': when,
        'pretrained_test_ppl': journal.of_all('pretrained'),
        'aggregated_test_ppl': aggregated if None not in aggregated else None,
        'mean_aggregated_test_ppl': mean(aggregated),
        # exp of the mean loss over all test tokens: what a model of pooled text is scored by elsewhere, below the mean of users
        'pooled_test_ppl': None if None in ppl else perplexity(np.average(np.log(ppl), weights=n_tokens)),
        'mean_valid_ppl': mean(valid),
        'valid_ppl': valid,
        'trainable_params': trainable,
        'shared_params': shared if c.rounds else 0,
        'bytes_up': clock['bytes_up'],
        'bytes_down': clock['bytes_down'],
        'seconds': time.time() - journal.began,
        'startup_seconds': journal.began_rounds - journal.began_main,  # from here, after the imports
        'seconds_per_round': journal.seconds_per_round,
        'checkpoint_seconds': clock['checkpoints'] / max(1, c.rounds),  # of a round
        'tokens_per_second': clock['steps'] * step_tokens / clock['training'] if clock['steps'] else None,
        'peak_rss_bytes': peak_memory(),
    }


def peak_memory() -> int | None:
    """The most memory that this process has had, in bytes; None on a system that does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def show(c: SimpleNamespace, journal: Journal, summary: dict) -> None:
    """The final table, and where everything is."""
    columns = {'pretrained': summary['pretrained_test_ppl'], c.method: summary['test_ppl']}
    if summary['aggregated_test_ppl']:
        both = {c.method: summary['test_ppl']} if summary['test_when'] != 'aggregated' else {}
        columns = {'pretrained': columns['pretrained'], **both, 'after aggregation': summary['aggregated_test_ppl']}
    rows = [[name, *row] for name, row in zip(summary['users'], zip(*columns.values()))]
    last_row = [f'mean of {len(rows)}' if len(rows) > 20 else 'mean', *map(mean, columns.values())]
    print(table(['test perplexity', *columns], [*(rows if len(rows) <= 20 else ()), last_row]))
    out = journal.out
    journal.say(
        f'{summary["seconds"]:.0f} s; wrote {out}/summary.json, metrics.jsonl, config.json, checkpoint/, adapters/'
        + f'; curves: python tools/plot.py run {out}' * (c.rounds > 0)
    )
