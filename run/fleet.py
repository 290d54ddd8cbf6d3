"""The simulated users: who takes part in a round, who is in memory and who on disk, and the one place where they are asked.

A user that does not train is a file, so memory depends on how many take part in a round, not on how many there are. With
several processes each has a part of those present in memory, and `ask` brings together what they answer."""

import hashlib
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import federate
from data.stream import Encoding, Texts, load_text, tokenizer_of
from federate import LEAVES, ONE_MODEL, Tensors, is_generalist, n_bytes, top_like, truncate
from model import GPT
from run import checkpoint, processes
from run.adapter import read_peft
from run.journal import Journal
from user import User, start_of


def public_windows(c: SimpleNamespace, texts: Texts | None, enc: Encoding | None = None) -> torch.Tensor | None:
    """(W, T): the windows of text that all may read, for the rules that need it, else None. enc: what reads --public_text, by
    default the tokenizer of texts. Raises ValueError or OSError."""
    if c.aggregate != 'consensus' and (c.aggregate, c.trust) != ('trust', 'predictions'):
        return None

    def whole(tokens: np.ndarray, n: int) -> torch.Tensor:  # the first n whole windows, or as many as there are
        n = min(n, len(tokens) // c.block_size)
        return torch.from_numpy(tokens[: n * c.block_size].astype(np.int64)).view(n, c.block_size)

    if c.public_text:
        enc = enc or tokenizer_of(texts.folder, texts.meta)
        windows = whole(load_text(c.public_text, enc), c.judge_windows)
    else:
        N = len(texts.n_train)
        each, some = math.ceil(c.judge_windows / N), range(min(N, c.judge_windows))
        windows = torch.cat([whole(texts.of(i)['valid'], each) for i in some])
    if not len(windows):
        raise ValueError(f'--public_text={c.public_text} is shorter than one window of {c.block_size} tokens')
    return windows


def public_sha256(public: torch.Tensor | None) -> str | None:
    return None if public is None else hashlib.sha256(public.numpy().tobytes()).hexdigest()


class Fleet:
    def __init__(self, c: SimpleNamespace, base: GPT, texts: Texts, journal: Journal, public: torch.Tensor | None):
        """public: of `public_windows`. Raises ValueError or OSError for an adapter that cannot be used."""
        self.c, self.base, self.texts, self.journal, self.N = c, base, texts, journal, len(texts.n_train)
        self.n_present = max(1, round(c.participation * self.N))  # a round
        self.some = self.n_present < self.N or c.failures > 0  # users may miss a round
        self.tested = self.sample(c.test_users or self.N, 0, 0, 1)
        self.start, self.adapter_sha256 = start_of(c, base), None  # what all users have in common at the start
        shared = [name for name in self.start if name[-1] in LEAVES.get(c.aggregate, 'AB')]  # of that, what leaves every round
        if c.init_adapter:  # private attention LoRAs start from it, too
            fresh = start_of(c, base, roles_of=('generalist', 'attention'))
            try:
                found, self.adapter_sha256 = read_peft(Path(c.init_adapter), fresh, c.lora_alpha)
            except (OSError, ValueError) as error:
                raise ValueError(f'--init_adapter: {error}') from None
            self.start |= found
        self.asked = {name: self.start[name] for name in shared}
        self.public = None if public is None else public.to(base.wte.weight.device)
        self.here, self.last_round = [], {}  # users in memory; {user: the last round that it took part in}
        self.stacks = 0  # FLoRA: bytes of all that has been merged into the base
        self.warned = set()  # users about whose updates a warning has been printed
        copied = {i: share for i, share in enumerate(texts.overlap) if share > 0.05}
        if copied and processes.rank() == 0:
            print(
                f'train.py: warning: a part of the validation text, {max(copied.values()):.0%} of its windows of 64 tokens, is '
                f"also training text (user {max(copied, key=copied.get)}; over 5 % of {len(copied)} users'): the router will "
                'trust who has learned it by heart',
                file=sys.stderr,
            )

    # ---- who takes part, by (seed, round) alone ------------------------------------------------------------------------
    def sample(self, n: int, *key: int) -> list[int]:
        """n of the N users, in order, drawn by the seed and the key alone."""
        if n >= self.N:
            return list(range(self.N))
        return sorted(np.random.default_rng((self.c.seed, 0, *key)).choice(self.N, n, replace=False).tolist())

    def present(self, t: int) -> list[int]:
        return self.sample(self.n_present, t, 0, 2)

    def fails(self, i: int, t: int) -> bool:
        """Whether user i, if present, dies halfway through round t."""
        chances = np.random.default_rng((self.c.seed, 0, t, 0, 3)).random(self.N) if self.c.failures else np.ones(self.N)
        return bool(chances[i] < self.c.failures)

    def steps(self, user: User, t: int) -> int:
        return self.c.local_steps // 2 if self.fails(user.id, t) else self.c.local_steps

    def tests(self, user: User, t: int) -> bool:
        """Whether the user is tested after its local steps of round t."""
        last = t + 1 == self.c.rounds
        return ((t + 1) % self.c.eval_every == 0 or last) and user.id in self.tested and not self.fails(user.id, t)

    def arrived(self, present: list[int], t: int) -> list[int]:
        """Who of those present reaches the end of the round. The others have lost what they did: their files say what they
        are."""
        present = [i for i in present if not self.fails(i, t)]
        self.here = [user for user in self.here if user.id in present]
        return present

    # ---- in memory and on disk -------------------------------------------------------------------------------------------
    def wake(self, ids: list[int]) -> Iterator[User]:
        """This process's part of these users, one after the other, once all are in memory; the others are let go: what they are
        is in their files."""
        mine = ids[processes.rank() :: processes.world()]
        self.here = [user for user in self.here if user.id in mine]  # before others need memory
        already = {user.id: user for user in self.here}
        self.here = [already.get(i) or self.user(i) for i in mine]
        for user in self.here:
            self.journal.trains_since = time.time()
            yield user

    def user(self, i: int) -> User:
        """User i as its file has it or, if it never took part, as everybody starts."""
        data = self.texts.of(i) if self.public is None else {**self.texts.of(i), 'public': self.public}
        user = User(i, self.c, self.base, data, self.start)
        if i in self.last_round:
            user.restore(*checkpoint.read(self.file(i)))
        return user

    def file(self, i: int) -> Path:
        return checkpoint.user_file(self.journal.folder, i, self.last_round[i])

    def save(self, t: int, present: list[int], server: Tensors) -> None:
        """The files of those present, then the one of round t = 1, 2, ...: from now on the run continues after it. The round
        before it is kept too, what only older ones need is deleted."""
        self.journal.publish()
        tic, before = time.time(), dict(self.last_round)
        self.last_round |= dict.fromkeys(present, t)
        for user in self.here:
            checkpoint.save(self.file(user.id), *user.state())
        processes.all_gather()  # everybody's files are there
        if processes.rank() == 0:
            tensors = checkpoint.under('server/', self.model_for_all(server))
            if self.c.aggregate == 'flora' and t > 0:
                tensors |= checkpoint.under('base/', self.base.state_dict())
            facts = {'round': t, 'last_round': self.last_round, 'stacks': self.stacks, **self.journal.facts()}
            checkpoint.save(checkpoint.round_file(self.journal.folder, t), tensors, facts)
            checkpoint.remove_others(self.journal.folder, (t, self.last_round), (t - 1, before))
        processes.all_gather()
        self.journal.clock['checkpoints'] += time.time() - tic

    def resume(self, tensors: Tensors, facts: dict) -> Tensors:
        """The users and the base as a round's file has them. Returns the server's tensors."""
        self.last_round, self.stacks = facts['last_round'], facts['stacks']
        if self.c.aggregate == 'flora' and facts['round']:
            self.base.load_state_dict(checkpoint.part(tensors, 'base/'))
        server, device = checkpoint.part(tensors, 'server/'), self.base.wte.weight.device
        return {name: v.to(device) for name, v in server.items() if name in self.asked}

    # ---- the server's tensors ------------------------------------------------------------------------------------------
    def first(self) -> Tensors:
        """What everybody's first round starts from. FLoRA's LoRAs start anew every round; FlexLoRA's server has scale 1."""
        c, server = self.c, dict(self.asked) if self.c.aggregate != 'flora' else {}
        for name in server if c.aggregate == 'flexlora' else ():
            if is_generalist(name) and name.endswith('.B'):
                server[name] = server[name] * c.lora_alpha / math.sqrt(c.lora_rank[0])
        return server

    def model_for_all(self, server: Tensors) -> Tensors:
        """The server's tensors; complete with those that never travel (FFA's A) where they are a model for everybody."""
        return {**self.start, **server} if self.c.aggregate in ONE_MODEL else server

    def merge(self, server: Tensors) -> Tensors:
        """FLoRA: the base gains the last round's stack, in every process once a round, whoever of it is present. Returns what
        is left at the server: nothing."""
        federate.merge(self.base, server)
        self.stacks += n_bytes(server)
        return {}

    # ---- the one place where users are asked -------------------------------------------------------------------------------
    def ask(self, question: str, ids: list[int], **told: object) -> dict[int, Tensors]:
        """{user: its answer} of these users, in all processes the same. question: 'upload', 'judge' or 'predict', the methods
        of User that return what leaves a device. Answers that cannot be used are left out, with a line about each."""
        self.journal.publish()
        mine = {user.id: getattr(user, question)(**told) for user in self.here if user.id in ids}
        if question == 'judge':  # infinity is a legal perplexity
            return processes.gather(mine)
        sent = processes.gather({i: self.attacked(i, answer) for i, answer in mine.items()})
        V = self.c.vocab_size
        top = top_like(0 if self.public is None else self.public.numel(), V)
        expected = {i: truncate(self.asked, self.c.lora_rank[i]) if question == 'upload' else top for i in ids}
        messages, lower = [(i, self.journal.t, answer) for i, answer in sent.items()], self.c.aggregate == 'hetlora'
        answers, refused = federate.admit(messages, self.journal.t, expected, lower_rank=lower, vocab_size=V)
        self.tell(answers, refused)
        return answers

    def tell(self, answers: dict[int, Tensors], refused: list[tuple[int, str]]) -> None:
        """A line about each that is refused, and a warning, once a user, about what a mean does not bound."""
        if processes.rank() > 0:
            return
        t = self.journal.t + 1
        if refused:
            self.journal.log('refused', {'users': [i for i, _ in refused], 'why': [why for _, why in refused]})
        for i, why in refused:
            tqdm.write(f'round {t}: what user {i} sent is refused ({why}): the others go on without it', file=sys.stderr)
        bounded = self.c.clip_norm or self.c.aggregate in ('median', 'trimmed_mean')
        for i in sorted({*federate.outliers(answers)} - self.warned) if not bounded else ():
            self.warned.add(i)
            tqdm.write(
                f"round {t}: warning: what user {i} sent is over ten times as large as the median user's: "
                '--aggregate=median, trimmed_mean or --clip_norm=1 bound what one user can do',
                file=sys.stderr,
            )

    def attacked(self, i: int, sent: Tensors) -> Tensors:
        """What a user sends, or the rubbish that --attack puts in its place: to see what a rule makes of it."""
        if self.c.attack == 'none' or i < self.N - self.c.attackers:
            return sent
        kind, _, size = self.c.attack.partition(':')
        seed = np.random.SeedSequence((self.c.seed, i, 2, self.journal.t)).generate_state(1)[0]
        rng = torch.Generator().manual_seed(int(seed))
        rubbish = {
            'nan': lambda v: torch.full(v.shape, math.nan),
            'scale': lambda v: v.cpu() * float(size),
            'noise': lambda v: torch.randn(v.shape, generator=rng) * float(size),
        }[kind]
        return {name: rubbish(v).to(v.dtype).to(v.device) if v.is_floating_point() else v for name, v in sent.items()}
