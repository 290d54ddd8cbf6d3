"""The server: Flower's ServerApp around `federate.admit` and `federate.combine`. It holds the frozen base, which all know, what
is averaged, and what it made for single users; never text, a router, a specialist or an optimizer's state.

    run.json         the switches of the run; deadline, the seconds that a question may take; least, how many must answer
    checkpoint/      round-{t}.safetensors of the last finished round and the one before it: whoever dies, it goes on there.
                     server/NAME is everybody's, own{i}/NAME user i's alone, stack{t}/NAME what FLoRA made in round t
    metrics.jsonl    rounds, refusals, trust; at the end adapters/server.safetensors, and summary.json with perplexities

A user is a name with a key (`users.json`, NAME.pub), and its number is its place in that list. Flower says whose key signed
what comes; a message in another's name is refused."""

import copy
import json
import math
import os
import time
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.cli.supernode.register import try_load_public_key
from flwr.serverapp import Grid, ServerApp
from messages import LOCAL, packed, unpacked

import federate
from configurator import configure, fit, mean, read_json, table, to_json
from data.stream import tokenizer_for
from federate import LEAVES, Tensors, n_bytes, top_like, truncate
from llama import load_base
from model import fingerprint
from run import checkpoint
from run.checkpoint import part, under
from run.fleet import Fleet, public_sha256, public_windows
from run.report import save_common
from user import start_of

app = ServerApp()


def perplexity(facts: dict, key: str) -> float | None:
    """As a device says it; None if it says none, or what is none: only numbers can be averaged and written down."""
    value = facts.get(key)
    return value if type(value) is float and 0 < value < math.inf else None


class Server:
    def __init__(self, grid: Grid, folder: Path):
        """Raises ValueError or OSError, one line. The run in the folder, if it is this one, goes on after its last round."""
        self.grid, self.folder, self.t, self.users, self.rounds = grid, folder, 0, [], folder / 'checkpoint'
        plan = read_json(folder / 'run.json', 'argv', 'deadline', 'least', 'keys')
        self.keys, self.deadline, self.least = Path(plan['keys']), plan['deadline'], plan['least']
        self.rounds.mkdir(exist_ok=True)
        until = time.time() + 20  # a run that was stopped may be at its end
        while not (lock := checkpoint.lock(folder / '.lock')):
            if time.time() > until:
                raise ValueError(f'another run is at work in {folder}')
            time.sleep(0.5)
        self.lock, self.given = lock, configure(plan['argv'])
        self.base = load_base(self.given.init_from)
        self.settle()
        c, V = self.c, self.base.config.vocab_size
        public = public_windows(c, None, tokenizer_for(V, self.base.tokenizer)) if c.public_text else None
        self.top = top_like(0 if public is None else public.numel(), V)
        self.start = start_of(c, self.base)
        self.asked = {name: v for name, v in self.start.items() if name[-1] in LEAVES.get(c.aggregate, 'AB')}
        self.identity = {'base': fingerprint(self.base), 'public': public_sha256(public) or ''}
        self.identity['switches'] = json.dumps({key: value for key, value in vars(self.given).items() if key not in LOCAL})
        self.tensors, lines = under('server/', Fleet.first(self)), 0
        if done := checkpoint.rounds(self.rounds):
            self.tensors, facts = checkpoint.read(checkpoint.round_file(self.rounds, done[-1]))
            if facts['identity'] != self.identity:
                raise ValueError(f'{folder} holds a run with other switches or another base: give another folder')
            self.t, self.users, lines = facts['round'], facts['users'], facts['lines']
        with open(folder / 'metrics.jsonl', 'ab') as f:
            f.truncate(lines)

    def settle(self) -> None:
        """Who the users are by now, what is known of each, and the switches with an entry for each. last: the round after which
        the user goes on."""
        self.names = read_json(self.keys / 'users.json', 'users')['users']
        self.N = len(self.names)
        self.users += [{'last': 0, 'tokens': 1, 'ppl': None} for _ in self.names[len(self.users) :]]
        self.c = fit(copy.copy(self.given), self.N, self.base.config.n_positions)
        self.c.vocab_size = self.base.config.vocab_size

    # ---- the folder --------------------------------------------------------------------------------------------------
    def save(self) -> None:
        """Round self.t is over: from now on the run goes on after it. The one before it is kept, too."""
        lines = (self.folder / 'metrics.jsonl').stat().st_size
        facts = {'round': self.t, 'users': self.users, 'lines': lines, 'identity': self.identity}
        checkpoint.save(checkpoint.round_file(self.rounds, self.t), self.tensors, facts)
        checkpoint.remove_others(self.rounds, (self.t, {}), (self.t - 1, {}))

    def log(self, kind: str, values: dict) -> None:
        with open(self.folder / 'metrics.jsonl', 'a') as f:
            f.write(to_json({'kind': kind, 'round': self.t + 1, **values}) + '\n')

    def say(self, text: str) -> None:
        print(f'round {self.t + 1}: {text}', flush=True)

    # ---- who is there, and the one place where they are asked ----------------------------------------------------------
    def online(self) -> dict[int, int]:
        """{user: Flower's number for the node whose key is the user's} of those that can be reached now."""
        whose = {node.public_key: node.node_id for node in self.grid.get_nodes()}
        keys = [try_load_public_key(self.keys / f'{name}.pub') for name in self.names]
        return {i: whose[key] for i, key in enumerate(keys) if key in whose}

    def send(self, question: str, letters: dict[int, Tensors], **facts: object) -> list[tuple[int, Tensors, dict]]:
        """[(user, tensors, facts)] of who answers before the deadline in its own name, in the order in which they come."""
        nodes, messages, until, came = self.online(), {}, time.time() + self.deadline, []
        facts |= {'round': self.t, 'users': self.N, **self.identity}
        for i in (i for i in letters if i in nodes):
            told = packed(letters[i], {**facts, 'user': i, 'last': self.users[i]['last']})
            messages[i] = Message(told, nodes[i], f'query.{question}', ttl=self.deadline, group_id=str(self.t + 1))
            self.bytes[1] += n_bytes(letters[i])
        whose = dict(zip(self.grid.push_messages([*messages.values()]), messages)) if messages else {}
        waiting = set(whose)
        while waiting and time.time() < until:
            for reply in self.grid.pull_messages(waiting):
                i = whose[reply.metadata.reply_to_message_id]
                waiting.discard(reply.metadata.reply_to_message_id)
                if reply.has_error():
                    self.say(f'{self.names[i]} could not {question}: {reply.error.reason[:200]}')
                    continue
                tensors, told = unpacked(reply.content)
                self.bytes[0] += n_bytes(tensors)
                if told.get('user') == self.names[i]:
                    came.append((i, tensors, told))
                else:
                    self.refuse([(i, f'it says that it is {told.get("user")!r:.40}')])
            time.sleep(0.2)
        for i in sorted(whose[letter] for letter in waiting):
            self.say(f'{self.names[i]} is late: the others go on')
        return came

    def refuse(self, refused: list[tuple[int, str]]) -> None:
        for i, why in refused:
            self.say(f'what {self.names[i]} sent is refused ({why}): the others go on without it')
        if refused:
            self.log('refused', {'users': [i for i, _ in refused], 'why': [why for _, why in refused]})

    def ask(self, question: str, ids: list[int], updates: dict | None = None, **facts: object) -> dict[int, Tensors]:
        """{user: its answer}; what cannot be used is left out, with a line about each."""
        others = {f'{j}/{name}': v for j, theirs in (updates or {}).items() for name, v in theirs.items()}
        letters = {i: self.letter(i) if question == 'train' else others for i in ids}
        came = self.send(question, letters, **facts)
        messages = [(i, told.get('round'), tensors) for i, tensors, told in came]
        for i, _, told in came if question == 'train' else ():
            self.arrived.add(i)
            tokens, ppl = told.get('tokens'), perplexity(told, 'ppl')
            self.users[i]['tokens'] = tokens if type(tokens) is int and 0 < tokens < 2**40 else 1
            self.users[i] |= {'ppl': ppl} if ppl else {}
        if question == 'judge':
            return self.judged(ids, messages, len(updates))
        expected = {i: truncate(self.asked, self.c.lora_rank[i]) if question == 'train' else self.top for i in ids}
        how = {'lower_rank': self.c.aggregate == 'hetlora', 'vocab_size': self.c.vocab_size}
        answers, refused = federate.admit(messages, self.t, expected, **how)
        self.refuse(refused)
        return answers

    def judged(self, ids: list[int], messages: list[tuple], n: int) -> dict[int, Tensors]:
        """The perplexities, of which infinity is a legal one. Who did not judge in time, or sent something else, trusts all
        alike: it changes that user's own average and no other."""
        rows = {i: {'ppl': torch.ones(n)} for i in ids}
        for i, t, sent in messages:
            fits = t == self.t and [*sent] == ['ppl'] and (sent['ppl'].dtype, sent['ppl'].shape) == (torch.float32, (n,))
            if fits and (sent['ppl'] > 0).all():  # NaN is not above 0
                rows[i] = sent
        return rows

    def letter(self, i: int) -> Tensors:
        """What user i starts its round from: everybody's tensors, what was made for it alone, FLoRA's stacks that it lacks."""
        stacks = [f'stack{t}/' for t in range(max(0, self.users[i]['last'] - 1), self.t)]
        return {name: v for name, v in self.tensors.items() if name.startswith(('server/', f'own{i}/', *stacks))}

    # ---- the run -----------------------------------------------------------------------------------------------------
    def round(self) -> None:
        """Asks until enough have answered; a round that too few answered is asked again, from the same start."""
        c, chosen = self.c, Fleet.sample(self, max(1, round(self.c.participation * self.N)), self.t, 0, 2)
        least, test = min(self.least, len(chosen)), (self.t + 1) % c.eval_every == 0 or self.t + 1 == c.rounds
        while True:
            here = [i for i in self.online() if i in chosen]
            if len(here) < (len(chosen) if time.time() < self.waits_until else least):
                time.sleep(1)
                continue
            self.bytes, self.arrived = [0, 0], set()
            updates = self.ask('train', here, test=test)
            if len(updates) >= least:
                break
            self.say(f'{len(updates)} answered, {least} are needed: asked again')
            time.sleep(min(5, self.deadline))
        c.n_train = [user['tokens'] for user in self.users]
        made, own = federate.combine(c, self.t, part(self.tensors, 'server/'), updates, self.ask, self.log)
        present = sorted(self.arrived)
        old = ('server/', *(f'own{i}/' for i in present))
        self.tensors = {name: v for name, v in self.tensors.items() if not name.startswith(old)}
        self.tensors |= under(f'stack{self.t}/' if c.aggregate == 'flora' else 'server/', made)
        for i in present:
            self.tensors |= under(f'own{i}/', own.get(i, {}))
            self.users[i]['last'] = self.t + 1
        told = mean([self.users[i]['ppl'] for i in present])
        self.log('round', {'users': present, 'bytes_up': self.bytes[0], 'bytes_down': self.bytes[1], 'test_ppl': told})
        self.t, self.waits_until = self.t + 1, 0
        self.save()

    def run(self) -> None:
        self.waits_until = time.time() + self.deadline  # for everybody, before the first round of this process
        if not self.t:
            self.save()
        while self.t < self.c.rounds:
            self.settle()
            self.round()
            print(f'round {self.t}/{self.c.rounds} is over', flush=True)
        self.bytes = [0, 0]
        came = self.send('evaluate', {i: self.letter(i) for i, user in enumerate(self.users) if user['last']})
        columns = ('pretrained', 'trained', 'aggregated')
        told = sorted(((i, facts) for i, _, facts in came), key=lambda one: one[0])
        ppl = {self.names[i]: {key: perplexity(facts, key) for key in columns} for i, facts in told}
        ppl['mean'] = {key: mean([row[key] for row in ppl.values()]) for key in columns}
        (self.folder / 'adapters').mkdir(exist_ok=True)
        save_common(self.folder / 'adapters', self.c, Fleet.model_for_all(self, part(self.tensors, 'server/')), None, self.t)
        checkpoint.write_json(self.folder / 'summary.json', {'rounds': self.t, 'users': self.names, 'test_ppl': ppl})
        print(table(['test perplexity', *columns], [[name, *row.values()] for name, row in ppl.items()]), flush=True)


@app.main()
def main(grid: Grid, context: Context) -> None:
    Server(grid, Path(os.environ['FEDERATION'])).run()
