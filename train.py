"""CoMiGS (arXiv 2409.13931), Algorithm 1: N users fine-tune one frozen GPT-2 or Llama together.

python data/prepare.py demo                                         # text that every machine has
python train.py config/demo.py                                      # 4 users, a minute on a laptop
python train.py config/slimpajama_1gxs.py --n_experts=4,2,2,2       # GPT-2 124M, experts per user
python train.py config/agnews.py --method=fedavg --out_dir=out/x    # a baseline is another row of switches
python train.py --list_methods                                      # all the rows; --help: all the switches
python train.py config/many_users.py                                # 1,000 users, 20 of them a round
torchrun --nproc_per_node=4 train.py config/agnews.py               # users dealt out to processes, one a GPU
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

import federate
from configurator import configure, die, fit, folder_of
from data.stream import Texts, read_meta
from federate import Tensors
from llama import load_base
from model import GPT, HUB, GPTConfig, autocast, fast_fp32, fingerprint, store_in_bf16, usable
from run import processes
from run.adapter import read_files
from run.fleet import Fleet, public_sha256, public_windows
from run.journal import FREE, Journal, stop_on_signals
from run.report import report
from user import User


# ---- Algorithm 1 ---------------------------------------------------------------------------------------------------
def local_round(user: User, t: int, steps: int, log: Callable) -> None:
    """What a user does between download and upload: simulated here, or on a device of its own."""
    for h in range(steps):
        # eq. (2), lower level: θ_i = (θ_i^G, θ_i^S) descends on the training text, φ_i fixed
        log('train', user.expert_step(t * user.c.local_steps + h))
        if user.router_opt and user.expert_steps % user.c.router_every == 0:  # every τ steps of the user
            for _ in range(user.c.router_steps):
                # eq. (3), upper level: φ_i descends on the validation text, θ_i fixed
                log('router', user.router_step())
    if user.c.aggregate == 'hetlora':
        user.prune()


def algorithm_1(c: SimpleNamespace, fleet: Fleet, journal: Journal, server: Tensors) -> Tensors:
    """server: θ^G that all start from. Returns it after the last round; θ_i^S and φ_i stay with the users."""
    for t in journal.rounds(fleet):
        if c.aggregate == 'flora':
            server = fleet.merge(server)

        present = fleet.present(t)
        for user in fleet.wake(present):  # in parallel in the paper; here in turn, or in several processes
            user.receive(server, t, fleet.stacks)  # download: θ_i^G ← θ^G
            local_round(user, t, fleet.steps(user, t), journal.log)
            if fleet.tests(user, t):
                journal.test(user, 'local')  # after local steps, before aggregation

        present = fleet.arrived(present, t)
        updates = fleet.ask('upload', present)  # {i: θ_i^G}; θ_i^S and φ_i never leave
        server, own = federate.combine(c, t, server, updates, fleet.ask, journal.log)  # θ^G ← 1/N Σ_i θ_i^G
        for user in fleet.here:
            user.take(own.get(user.id))
            journal.log('comm', user.traffic())
        fleet.save(t + 1, present, server)
    return server


# ---- before: everything is read and checked before anything is written -------------------------------------------------
def prepare(c: SimpleNamespace, journal: Journal) -> tuple[Fleet, Tensors]:
    """The users, and the server's tensors to begin with, or of the round that is continued. What is at hand is checked before
    a base is fetched."""
    given, folder = dict(vars(c)), folder_of(c.dataset)
    switches = {key: value for key, value in given.items() if key not in FREE}
    known = GPTConfig() if c.init_from in HUB else GPTConfig(None, 2**62)  # what all bases of the Hub have
    try:
        c.device = pick_device(c.device)
        texts = Texts(folder, c.block_size, known.vocab_size, c.target, c.pooled)
        fit(c, N=len(texts.n_train), n_positions=known.n_positions)
        public = public_windows(c, texts)
        if c.init_adapter:
            read_files(Path(c.init_adapter))
        if c.resume:
            journal.resume(switches)
        base = load_base(c.init_from).to(c.device)
        read_meta(folder, base.config.vocab_size, base.tokenizer)
        fit(c, N=len(texts.n_train), n_positions=base.config.n_positions)
        c.n_train, c.vocab_size = texts.n_train, base.config.vocab_size
        fleet = Fleet(c, base, texts, journal, public)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        die(error)
    # what must be the same for a run to be continued: the base before it is stored otherwise, the text, the switches that count
    identity = {**switches, 'base': fingerprint(base), 'adapter': fleet.adapter_sha256}
    identity['public'] = public_sha256(public)
    identity['data'] = hashlib.sha256(json.dumps([user['sha256'] for user in texts.meta['users']]).encode()).hexdigest()
    c.dtype = settle_precision(c, base)
    try_out(c)
    processes.start()
    journal.claim()
    server = fleet.resume(*journal.resume(identity)) if c.resume else fleet.first()
    sums = {'base_sha256': identity['base'], 'adapter_sha256': identity['adapter']}
    effective = {**given, 'device': c.device, 'dtype': c.dtype, **sums, 'users': texts.names, 'tested': fleet.tested}
    journal.open(effective, identity, texts.names, [*range(len(texts.names))] if c.pooled else fleet.tested)
    if not c.resume:
        fleet.save(0, [], server)  # round 0: from here on there is always something to continue from
    return fleet, server


def pick_device(device: str) -> str:
    """auto: what there is; several processes share out the GPUs. Raises ValueError or RuntimeError if it cannot be used."""
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if usable(device) == 'cuda' and processes.world() > 1:
        device = f'cuda:{int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()}'
    torch.zeros(1, device=device)
    return device


def try_out(c: SimpleNamespace) -> None:
    """A product and its gradient as training computes them. Dies of what the device, the dtype or a compiler cannot do."""
    x = torch.ones(16, 16, device=c.device, requires_grad=True)
    try:
        with autocast(c.device, c.dtype):
            loss = lambda x: (x @ x).sin().sum()  # noqa: E731
            (torch.compile(loss) if c.compile else loss)(x).backward()
    except Exception as error:  # compilers and devices raise many kinds
        why = ' '.join(str(error).split())[:200]
        die(f'--device={c.device} --dtype={c.dtype}' + ' --compile (leave it out)' * c.compile + f': {why}')


def settle_precision(c: SimpleNamespace, base: GPT) -> str:
    """What products are computed in; under bfloat16 the base's weights are stored in it, but FLoRA adds to them."""
    on_cuda = torch.device(c.device).type == 'cuda'
    best = 'bfloat16' if on_cuda and torch.cuda.is_bf16_supported() else 'float32'
    dtype = best if c.dtype == 'auto' else c.dtype
    fast_fp32(torch.device(c.device).type)
    if dtype == 'bfloat16' and c.aggregate != 'flora':
        store_in_bf16(base)
    return dtype


def main(argv: list[str]) -> SimpleNamespace:
    """A whole run. Returns its parts: c, users, fleet, journal, server, summary."""
    processes.check()
    c = configure(argv, __doc__)
    stop_on_signals(c.out_dir)
    if c.method == 'pretrained':
        c.rounds = 0  # the base as it is, whatever a config file says
    with contextlib.closing(Journal(c)) as journal:
        fleet, server = prepare(c, journal)
        server = algorithm_1(c, fleet, journal, server)
        summary = report(c, fleet, journal, server)
    return SimpleNamespace(c=c, users=fleet.here, fleet=fleet, journal=journal, server=server, summary=summary)


if __name__ == '__main__':
    main(sys.argv[1:])
