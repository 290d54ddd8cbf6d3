"""A device: one `User` and `local_round` behind Flower's ClientApp. Nothing leaves but what `answer` returns.

Every message starts a new process. What the user is comes from the device's folder and goes back there before it answers:

    checkpoint/user{i}-{t}.safetensors   the user after round t, sealed: of the last round that the server has counted, of the
                                         one before it, and of the one at work; the server says after which one it goes on
    metrics.jsonl                        every step's loss, as a run writes them: it stays here
    config.json, adapters/, summary.json the result, once the last round is over: a run's folder with one user"""

import functools
import json
import os
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.supercore.differential_privacy import add_gaussian_noise_inplace, compute_clip_model_update
from messages import LOCAL, packed, unpacked

import federate
from configurator import configure, fit, folder_of, to_json
from data.stream import Texts
from federate import ONE_MODEL, Tensors, n_bytes, pairs, top_like, truncate
from llama import load_base
from model import GPT, fingerprint
from run import checkpoint
from run.checkpoint import part
from run.fleet import public_sha256, public_windows
from run.journal import measured
from run.report import save_common, save_user
from train import local_round, pick_device, settle_precision
from user import User, start_of

app = ClientApp()


def switches(told: dict, here: dict) -> list[str]:
    """A command line: the server's switches, but for LOCAL ones, which are of this device."""
    asked = {key: value for key, value in json.loads(told['switches']).items() if key not in LOCAL}
    own = {key: here[key] for key in LOCAL if key in here and (key != 'public_text' or told['public'])}
    return [f'--{key}={value}' for key, value in {**asked, **own}.items()]


def any_rank(tensors: Tensors, expected: Tensors) -> Tensors:
    """expected, with the ranks that the tensors have, where a rule's result has no rank of its own."""
    like = {}
    for name in pairs(expected):
        A, B = expected[name + '.A'], expected[name + '.B']  # (r, in), (out, r)
        rank = max((1, *tensors.get(name + '.A', A).shape[:1]))
        like |= {name + '.A': A[:1].expand(rank, -1), name + '.B': B[:, :1].expand(-1, rank)}
    return like


def private(sent: Tensors, began: Tensors, clip: float, noise: float) -> Tensors:
    """What leaves instead of `sent`: the norm of all that changed since `began` is at most clip, and every number has Gaussian
    noise of the deviation noise * clip on it. The arithmetic is that of Flower's LocalDpMod."""
    arrays = [v.cpu().numpy().copy() for v in sent.values()]
    old = [began[name][tuple(map(slice, v.shape))].cpu().numpy() for name, v in sent.items()]
    if any((new != was).any() for new, was in zip(arrays, old)):
        compute_clip_model_update(arrays, old, clip)
    np.random.seed()  # of the system: a fork has its parent's generator, and the noise of every round would be the same
    add_gaussian_noise_inplace(arrays, noise * clip)
    return dict(zip(sent, map(torch.from_numpy, arrays)))


class Device:
    def __init__(self, tensors: dict, told: dict, here: dict):
        """Raises ValueError or OSError, one line, for a message or a folder that does not fit: the server is told so."""
        self.tensors, self.told, self.here, self.folder = tensors, told, here, Path(here['folder'])
        self.t, self.i, self.last = told['round'], told['user'], told['last']
        if not 0 <= self.last <= self.t or not 0 <= self.i < told['users']:
            raise ValueError(f'round {self.t} after round {self.last}, user {self.i} of {told["users"]}: no such round or user')
        (self.folder / 'checkpoint').mkdir(parents=True, exist_ok=True)
        self.lock = checkpoint.lock(self.folder / '.lock')
        if not self.lock:
            raise ValueError(f'{self.folder} is at work for another process')
        try:
            self.c = c = configure(switches(told, here))
            c.device = pick_device(c.device)
            self.base = load_base(c.init_from).to(c.device)
            fit(c, told['users'], self.base.config.n_positions)
        except SystemExit:
            raise ValueError('the switches are not accepted here: its own log says which one') from None
        self.base_sha256 = fingerprint(self.base)
        if self.base_sha256 != told['base']:
            raise ValueError(f'{c.init_from} is not the base of this federation (SHA-256 differs)')
        vocab_size = c.vocab_size = self.base.config.vocab_size
        texts = Texts(folder_of(c.dataset), c.block_size, vocab_size, tokenizer=self.base.tokenizer)
        if len(texts.n_train) > 1:
            raise ValueError(f'{c.dataset} holds the text of several users: a device has that of one')
        self.n_train, public, data = texts.n_train[0], public_windows(c, texts), texts.of(0)
        if public is not None:
            if told['public'] != public_sha256(public):
                raise ValueError(f'--public_text={c.public_text} is not that of this federation')
            data['public'] = public.to(c.device)
        c.dtype = settle_precision(c, self.base)
        self.start = start_of(c, self.base)
        self.user = User(self.i, c, self.base, data, self.start)
        self.shared = {name: self.start[name] for name in self.user.shared}

    # ---- the folder --------------------------------------------------------------------------------------------------
    def file(self, t: int) -> Path:
        return checkpoint.user_file(self.folder / 'checkpoint', self.i, t)

    def restore(self, t: int) -> None:
        """The user after round t, 0: as it begins; what was written after that is forgotten."""
        lines, self.taken, self.metrics = 0, True, self.folder / 'metrics.jsonl'
        if t:
            tensors, facts = checkpoint.read(self.file(t))
            self.user.restore(tensors, facts)
            self.user.bytes_up, self.user.bytes_down, lines, self.taken = facts['here']
            if merged := part(tensors, 'base/'):
                self.base.load_state_dict(merged)
        with open(self.metrics, 'ab') as f:
            f.truncate(lines)

    def save(self, t: int) -> None:
        tensors, facts = self.user.state()
        if self.c.aggregate == 'flora':
            tensors |= checkpoint.under('base/', self.base.state_dict())
        here = [self.user.bytes_up, self.user.bytes_down, self.metrics.stat().st_size, self.taken]
        checkpoint.save(self.file(t), tensors, {**facts, 'here': here})

    def log(self, kind: str, values: dict) -> None:
        t = min(self.t + 1, self.c.rounds)  # what is said after the last round is of it
        with open(self.metrics, 'a') as f:
            f.write(to_json({'kind': kind, 'round': t, **values}) + '\n')

    def test(self, when: str, model: GPT | None = None, **at: int) -> float:
        seen = measured(self.c, self.user, self.user.data['test'], model)
        self.log('eval', {'step': self.user.expert_steps, 'user': self.i, 'split': 'test', 'when': when, **seen, **at})
        return seen['ppl']

    # ---- what comes: checked as strictly as what the server accepts ------------------------------------------------------
    def group(self, prefix: str, expected: Tensors, ranks: bool = False) -> Tensors:
        """The message's tensors whose names begin with the prefix. Raises ValueError unless they are such as expected."""
        found = part(self.tensors, prefix)
        if why := federate.refusal(found, any_rank(found, expected) if ranks else expected, vocab_size=self.c.vocab_size):
            raise ValueError(f'what the server sent is refused ({prefix}{why})')
        return found

    def server(self) -> Tensors:
        """What everybody's round starts from; nothing, where a rule makes something for each user alone."""
        if not part(self.tensors, 'server/') and self.c.aggregate not in ONE_MODEL:
            return {}
        return self.group('server/', self.shared, ranks=self.c.aggregate in ('hetlora', 'flexlora'))

    def take(self) -> None:
        """What the server made for this user alone in the last round that it counted, once; and that round's bytes."""
        if self.taken:
            return
        own, expected = part(self.tensors, f'own{self.i}/'), truncate(self.shared, self.c.lora_rank[self.i])
        if self.c.aggregate == 'consensus':
            expected = top_like(self.user.data['public'].numel(), self.c.vocab_size)
        self.user.take(self.group(f'own{self.i}/', expected) if own else None)
        self.log('comm', {**self.user.traffic(), 'round': self.last})
        self.taken = True

    def merge(self) -> int:
        """FLoRA: the stacks of the rounds since this user was last asked go into its base. Returns all bytes so far."""
        seen = self.user.stacks_seen
        for t in range(max(0, self.last - 1), self.t) if self.c.aggregate == 'flora' else ():
            stack = self.group(f'stack{t}/', self.shared, ranks=True)
            federate.merge(self.base, stack)
            seen += n_bytes(stack)
        return seen

    # ---- what leaves -------------------------------------------------------------------------------------------------
    def train(self) -> tuple[Tensors, dict]:
        self.take()
        self.user.receive(self.server(), self.t, self.merge())
        began = {name: self.user.adapter[name].detach().clone() for name in self.shared}
        local_round(self.user, self.t, self.c.local_steps, self.log)
        facts = {'tokens': self.n_train} | ({'ppl': self.test('local')} if self.told['test'] else {})
        sent, self.taken = self.user.upload(), False
        if 'clip' in self.here:
            sent = private(sent, began, self.here['clip'], self.here.get('noise', 0.0))
        self.save(self.t + 1)
        before = max((t for t in range(self.last) if self.file(t).exists()), default=0)
        kept = [(0, {self.i: t}) for t in (before, self.last, self.t + 1)]
        checkpoint.remove_others(self.folder / 'checkpoint', *kept)
        return sent, facts

    def judge(self) -> tuple[Tensors, dict]:
        users = sorted({int(key.split('/')[0]) for key in self.tensors})
        return self.user.judge({j: self.group(f'{j}/', truncate(self.shared, self.c.lora_rank[j])) for j in users}), {}

    def predict(self) -> tuple[Tensors, dict]:
        return self.user.predict(self.told['logits']), {}

    def evaluate(self) -> tuple[Tensors, dict]:
        """After the last round: perplexities leave, the result stays in the folder."""
        self.take()
        self.save(self.last)
        server, c, user = self.server(), self.c, self.user
        if c.aggregate == 'fdlora':
            w1, w2 = user.fuse(server)
            self.log('fusion', {'step': user.expert_steps, 'user': self.i, 'own': w1, 'mean': w2})
        original = load_base(c.init_from).to(c.device) if c.aggregate == 'flora' else self.base
        ppl = {'trained': self.test('fused' if c.aggregate == 'fdlora' else 'final')}
        ppl['pretrained'] = self.test('pretrained', original, round=0, step=0)
        self.keep(ppl)
        if self.shared:
            user.receive(server, self.t - 1, self.merge())
            ppl['aggregated'] = self.test('aggregated')
        return {}, ppl

    def keep(self, ppl: dict) -> None:
        """The folder as that of a run with one user, for tools/ and eval.py."""
        c, name, adapters = self.c, self.here['name'], self.folder / 'adapters'
        adapters.mkdir(exist_ok=True)
        save_user(adapters, 0, self.user.adapter, c, self.i, self.base_sha256, name=name, round=self.last)
        save_common(adapters, c, {**self.start, **self.server()}, self.base, self.last)
        summary = {'rounds': self.last, 'users': [name], 'user_ids': [0], 'target': c.target}
        summary |= {'test_ppl': [ppl['trained']], 'pretrained_test_ppl': [ppl['pretrained']]}
        own = {switch: [getattr(c, switch)[self.i]] for switch in ('n_experts', 'lora_rank')}
        config = {**vars(c), **own, 'users': [name], 'tested': [0], 'base_sha256': self.base_sha256}
        checkpoint.write_json(self.folder / 'config.json', config)
        checkpoint.write_json(self.folder / 'summary.json', summary)


def answer(question: str, message: Message, context: Context) -> Message:
    tensors, told = unpacked(message.content)
    device, again = Device(tensors, told, json.loads(os.environ['DEVICE'])), question in ('judge', 'predict')
    device.restore(device.t + 1 if again else device.last)
    sent, facts = getattr(device, question)()
    if again:  # once more about the round that this user has just trained in: the bytes count
        device.save(device.t + 1)
    return Message(packed(sent, {'user': device.here['name'], 'round': device.t, **facts}), reply_to=message)


for question in ('train', 'judge', 'predict', 'evaluate'):
    app.query(question)(functools.partial(answer, question))
