"""Every row of METHODS end to end, and what makes each rule its own, on a tiny base with three users of different sizes."""

import copy
import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import N_TRAIN, devices, same, snapshot, trained, trainer, user_streams
from safetensors.torch import load_file
from test_train import losses, steps

import eval as eval_file
import federate
import user as user_file
from config.default import METHODS
from data.stream import get_batch
from lora_moe import initial, shape_of
from model import evaluate, load_gpt
from user import User

ALONE = {'pretrained', 'centralized', 'local', 'comigs_2s', 'local_moe', 'local_moe_tr', 'consensus'}  # no tensor leaves
SHORT = ('--rounds=2', '--router_steps=1', '--consensus_start=1', '--judge_windows=4')


@pytest.fixture(scope='module')
def run_of(tiny, tmp_path_factory):
    """run_of(method) is its one tiny run, which the tests of this file look at and leave as it is."""
    train = trainer(tiny, tmp_path_factory.mktemp('methods'))
    return functools.cache(lambda method: train(f'--method={method}', *SHORT, out=method))


def adapters(run) -> list[dict]:
    """What every user had trained when the last round ended, before the last download."""
    return [load_file(run.out / f'adapters/user{i}.safetensors') for i in range(3)]


# ---- every method, end to end ----------------------------------------------------------------------------------------
@pytest.mark.parametrize('method', METHODS)
def test_every_method_runs_and_reports(run_of, method):
    run = run_of(method)
    s, shares = run.summary, method not in ALONE
    assert json.loads((run.out / 'summary.json').read_text()) == json.loads(json.dumps(s))
    assert len(s['test_ppl']) == 3 and s['pretrained_test_ppl'] == run_of('pretrained').summary['test_ppl']
    assert s['mean_test_ppl'] == pytest.approx(np.mean(s['test_ppl'])) and all(map(math.isfinite, s['test_ppl']))
    if method == 'pretrained':
        assert s['test_ppl'] == s['pretrained_test_ppl'] and s['rounds'] == 0 and s['bytes_up'] == 0
    else:
        assert all(a < b for a, b in zip(s['test_ppl'], s['pretrained_test_ppl']))  # four steps already help
    assert (s['aggregated_test_ppl'] is not None) == (s['shared_params'] > 0) == shares
    if method not in ('pcl', 'hetlora', 'consensus'):  # verdicts, pruned ranks and predictions are not that many bytes
        assert s['bytes_up'] == 4 * s['shared_params'] * 3 * s['rounds']
    # eval.py rebuilds every user's model from the files and measures the same
    eval_file.main([str(run.out)])
    assert [u['test_ppl'] for u in json.loads((run.out / 'eval.json').read_text())['users']] == s['test_ppl']


@pytest.mark.parametrize('method', sorted(METHODS.keys() - {'pretrained', 'centralized'}))
def test_a_run_is_nothing_but_algorithm_1(run_of, tiny, method):
    """Users in memory and federate.combine between them give the bits of the run: its files, journal and fleet add nothing."""
    run = run_of(method)
    alone = trained(copy.deepcopy(tiny.model), f'--method={method}', *SHORT, public=run.fleet.public)
    assert alone.lines == [line for line in run.lines if line['kind'] not in ('eval', 'fusion')]
    if method != 'fdlora':  # whose users then search for a mixture
        assert all(same(user.adapter, saved) for user, saved in zip(alone.users, adapters(run)))
    assert same(alone.server, run.server)


@pytest.mark.parametrize('method', sorted(m for m, (row, *_) in METHODS.items() if row[0] > 1 and m != 'centralized'))
def test_experts_per_user(tiny, method):
    """Each user has its own number of them, and what is shared is combined all the same."""
    n = (3, 2, 2) if METHODS[method][0][1] == 2 else (3, 1, 2)  # no fewer than there are generalists
    after = trained(tiny.model, f'--method={method}', f'--n_experts={",".join(map(str, n))}', '--rounds=1', '--local_steps=4')
    assert after.sent[0].keys() == after.sent[1].keys() == {*after.users[2].shared}
    for user, wanted in zip(after.users, n):
        mlp = user.model.h[0].mlp
        assert len(mlp.generalists) + len(mlp.specialists) == wanted
        ppl = [evaluate(model, user.data['test'], 16)['ppl'] for model in (user.model, tiny.model)]
        assert ppl[0] < ppl[1]


# ---- continued -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'args',
    [
        ('--method=comigs_1gxs', '--n_experts=3,1,2'),
        ('--method=hetlora', '--lora_rank=4,6,8', '--prune_coef=10'),
        ('--method=flexlora', '--lora_rank=4,6,8'),
        ('--method=flora',),
        ('--method=pcl', '--trust=predictions'),
        ('--method=consensus',),
        ('--method=fdlora',),
        ('--leak_gradients', '--local_steps=3', '--ghost_noise=4'),
    ],
    ids=' '.join,
)
def test_resume_is_bit_identical(train, tmp_path, monkeypatch, args):
    """The folder as it is in the middle of round 3 of 3, as if the process had been killed there, and continued: the same
    adapters and the same metrics file, byte for byte. Everything a rule remembers between rounds is in the checkpoint."""
    local_steps = 3 if '--local_steps=3' in args else 2

    def watched(tokens, batch_size, block_size, key):
        if key[:3] == (42, 1, 0) and key[3] == 2 * local_steps + 1 and not (tmp_path / 'cut').exists():
            shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
        return get_batch(tokens, batch_size, block_size, key)

    monkeypatch.setattr(user_file, 'get_batch', watched)
    whole = train(*args, *SHORT, '--rounds=3', out='whole')
    lines = (tmp_path / 'cut/metrics.jsonl').read_text().splitlines()
    assert json.loads(lines[-1])['round'] == 3 and not (tmp_path / 'cut/summary.json').exists()
    resumed = train(*args, *SHORT, '--rounds=3', '--resume', out='cut')
    assert resumed.journal.start == 2
    assert (whole.out / 'metrics.jsonl').read_bytes() == (resumed.out / 'metrics.jsonl').read_bytes()
    files = [sorted((run.out / 'adapters').iterdir()) for run in (whole, resumed)]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    assert all(same(load_file(a), load_file(b)) for a, b in zip(*files))
    assert all(same(u.adapter, v.adapter) for u, v in zip(whole.users, resumed.users))
    keys = ('test_ppl', 'aggregated_test_ppl', 'pretrained_test_ppl', 'bytes_up', 'bytes_down')
    assert all(whole.summary[k] == resumed.summary[k] for k in keys)


# ---- one user --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'args',
    [
        ('--method=fedavg',),
        ('--method=pcl',),
        ('--method=pcl', '--trust=weights'),
        ('--method=pcl', '--trust=predictions'),
        ('--method=fedavg', '--aggregate=median'),
        ('--method=fedavg', '--aggregate=trimmed_mean'),
        ('--method=fedavg', '--aggregate=fedsa'),
        ('--method=hetlora', '--lora_rank=8', '--prune_coef=0', '--prune_gamma=1'),
    ],
    ids=' '.join,
)
def test_a_single_user_trains_as_local(tiny, monkeypatch, args):
    """N = 1: nobody to average with, so every rule is Local (given the same start, whatever its tensors are called)."""
    as_local = {name: name.replace('generalists', 'specialists') for name in devices(tiny.model, *args, N=1)[0].adapter}
    monkeypatch.setattr(user_file, 'initial', lambda name, shape, *key: initial(as_local.get(name, name), shape, 'x'))
    n = '--n_experts=1' if 'hetlora' in args[0] else '--n_experts=2'
    public = torch.from_numpy(user_streams(0, 300)['valid'][:64]).view(4, 16)
    a, b = (trained(tiny.model, *given, *SHORT, N=1, public=public) for given in (args, ('--method=local', n)))
    assert losses(a.lines) == losses(b.lines) and len(losses(a.lines)) == 4
    (mine,), (local,) = a.users, b.users
    assert same({as_local[name]: p for name, p in mine.adapter.items()}, local.adapter)
    mine.receive(a.server, 2)  # what comes back is what was sent
    assert same({as_local[name]: p for name, p in mine.adapter.items()}, local.adapter)


# ---- centralized -----------------------------------------------------------------------------------------------------
def test_centralized_is_one_model_on_pooled_text_tested_on_everybody(run_of):
    run = run_of('centralized')
    (user,) = run.users
    assert np.array_equal(user.data['train'], np.concatenate([user_streams(i, n)['train'] for i, n in enumerate(N_TRAIN)]))
    assert user.batch_size == 3 * 4 and user.expert_steps == 4
    tested = [(line['user'], line['ppl']) for line in run.lines if line['kind'] == 'eval' and line['when'] == 'local']
    assert tested == [*enumerate(run.summary['test_ppl'])] and len(set(run.summary['test_ppl'])) == 3
    # METHOD 1.6: pooled text is scored by exp of the mean loss, which is below the mean of the users' perplexities
    assert run.summary['pooled_test_ppl'] == pytest.approx(math.exp(np.mean(np.log(run.summary['test_ppl']))))
    assert run.summary['pooled_test_ppl'] < run.summary['mean_test_ppl']


# ---- FFA-LoRA, FedSA-LoRA --------------------------------------------------------------------------------------------
def test_ffa_freezes_every_A_and_sends_B(run_of):
    run = run_of('ffa_lora')
    for user in run.users:
        for name, p in user.adapter.items():
            assert torch.equal(p, initial(name, p.shape, 42, 'server')) == name.endswith('.A')
    user = run.users[0]
    assert user.shared == [name for name in user.adapter if name.endswith('.B')]
    n = sum(user.adapter[name].numel() for name in user.shared)
    assert {line['bytes_up'] for line in run.lines if line['kind'] == 'comm'} == {4 * n} and user.trainable == n
    assert set(load_file(run.out / 'adapters/server.safetensors')) == set(user.adapter)  # complete: A and B


def test_fedsa_averages_A_and_keeps_B(run_of):
    run = run_of('fedsa_lora')
    for name, p in run.users[0].adapter.items():
        others = [torch.equal(p, user.adapter[name]) for user in run.users[1:]]
        assert all(others) if name.endswith('.A') else not any(others)
    assert not (run.out / 'adapters/server.safetensors').exists()  # B is nobody's but one's


# ---- trust -----------------------------------------------------------------------------------------------------------
def matrices(lines: list[dict]) -> list[np.ndarray]:
    return [np.array(line['matrix']) for line in lines if line['kind'] == 'trust']


@pytest.mark.parametrize('trust', ['weights', 'validation', 'predictions'])
def test_trust_matrices_and_what_they_cost(tiny, run_of, trust):
    public = run_of('consensus').fleet.public  # 2 windows of 16 out of each user's validation text
    run = trained(tiny.model, '--method=pcl', f'--trust={trust}', *SHORT, public=public)
    assert len(matrices(run.lines)) == 2 and public.shape == (6, 16)
    for W in matrices(run.lines):
        assert W.shape == (3, 3) and np.allclose(W.sum(1), 1) and (W > 0).all() and not np.allclose(W, W[0])
    message, comm = federate.n_bytes(run.sent[0]), [line for line in run.lines if line['kind'] == 'comm']
    up, down = {'weights': (0, 0), 'validation': (4 * 3, 2 * message), 'predictions': (6 * 16 * 100 * 6, 0)}[trust]
    assert {line['bytes_up'] - message for line in comm} == {up}
    assert {line['bytes_down'] - message for line in comm} == {down}


def test_validation_trust_is_the_softmax_of_perplexities(run_of):
    """S_ij = -ppl of user j's model on user i's first validation windows, from the saved adapters of the last round."""
    run = run_of('pcl')
    W, user = matrices(run.lines)[-1], devices(run.fleet.base, '--method=pcl')[0]
    ppl = np.empty((3, 3))
    for j, tensors in enumerate(adapters(run)):
        user.load(tensors)  # all LoRAs are shared, so model j is j's adapter
        for i in range(3):
            ppl[i, j] = evaluate(user.model, run.users[i].data['valid'][: 4 * 16 + 1], 16)['ppl']
    assert np.allclose(W, np.exp(-ppl) / np.exp(-ppl).sum(1, keepdims=True), rtol=1e-4)


def test_a_high_temperature_is_fedavg(tiny):
    a = trained(tiny.model, '--method=pcl', '--trust_temperature=1e12', *SHORT)
    b = trained(tiny.model, '--method=fedavg', *SHORT)
    for u, v in zip(a.users, b.users):
        ppl = [evaluate(user.model, user.data['test'], 16)['ppl'] for user in (u, v)]
        assert ppl[0] == pytest.approx(ppl[1], rel=1e-5)
        assert all(torch.allclose(a.own[u.id][name], b.server[name], atol=1e-6) for name in b.server)


# ---- ranks that differ -----------------------------------------------------------------------------------------------
RANKS = (4, 6, 8)


def test_a_rank_for_each_user(tiny):
    """The MLP LoRAs' scaling goes with the rank; those of attention have one rank for all."""
    for user, rank in zip(devices(tiny.model, '--method=flexlora', '--lora_rank=16,8,24'), (16, 8, 24)):
        expert, attention = user.model.h[0].mlp.generalists[0], user.model.h[0].attn.c_attn.lora
        assert expert.c_fc.A.shape[0] == rank and expert.c_fc.scaling == 16 / math.sqrt(rank)
        assert attention.A.shape[0] == 8 and attention.scaling == 16 / math.sqrt(8)


def test_hetlora_distributes_the_first_components_and_prunes_one_at_a_time(tiny):
    """A strong penalty shrinks the tail in every round after the first (there B starts at 0, so the tail cannot shrink)."""
    run = trained(tiny.model, '--method=hetlora', '--lora_rank=4,6,8', '--prune_coef=100', '--rounds=4')
    ranks, full = np.array([user.rank for user in run.users]), np.array(RANKS)
    assert (ranks <= full).all() and (ranks < full).any() and (ranks >= full - 3).all()
    sent = np.array([line['bytes_up'] for line in run.lines if line['kind'] == 'comm']).reshape(4, 3)
    # 2 layers of (c_fc and c_proj, each with A and B): 2 (16 + 64) numbers a component; attention: 8 (64 + 32) a layer
    assert sent[0].tolist() == [4 * 2 * (160 * rank + 768) for rank in RANKS]
    assert sent[-1].tolist() == [4 * 2 * (160 * rank + 768) for rank in ranks]
    for user in run.users:
        after = snapshot(user)
        user.receive(run.server, 4)
        for name in (n for n in user.adapter if 'generalists' in n):
            ends = [v[user.rank :] if name.endswith('.A') else v[:, user.rank :] for v in (after[name], user.adapter[name])]
            assert not ends[0].any() and not ends[1].any()
            head = user.adapter[name][: user.rank] if name.endswith('.A') else user.adapter[name][:, : user.rank]
            assert torch.equal(head, federate.truncate(run.server, user.rank)[name])


def test_a_pruned_component_stays_zero(tiny):
    user = devices(tiny.model, '--method=hetlora', '--lora_rank=4')[0]
    for step in range(6):
        user.expert_step(step)
        if step == 2:
            user.tail = math.inf  # any is smaller
            user.prune()
    A, B = (user.adapter[f'h.0.mlp.generalists.0.c_fc.{f}'] for f in 'AB')
    assert user.rank == 3 and A[:3].all() and not A[3:].any() and not B[:, 3:].any()
    user.tail = 0.0
    user.prune()  # no tail has become smaller than that
    assert user.rank == 3


def test_flexlora_starts_every_round_from_orthonormal_factors_and_fresh_moments(tiny):
    run = trained(tiny.model, '--method=flexlora', '--lora_rank=4,6,8', *SHORT)
    name, scale = 'h.1.mlp.generalists.0.c_proj', [16 / math.sqrt(r) for r in RANKS]
    W = sum(n / 1700 * g * u[name + '.B'] @ u[name + '.A'] for n, g, u in zip(N_TRAIN, scale, run.sent.values()))
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    for user, r, g in zip(run.users, RANKS, scale):
        user.receive(run.server, 2)
        A, B = user.adapter[name + '.A'], user.adapter[name + '.B']
        assert torch.allclose(A @ A.T, torch.eye(r), atol=1e-5)
        best = (U[:, :r] * S[:r]) @ Vt[:r]
        assert torch.allclose(g * B.double() @ A.double(), best, atol=1e-6 + 1e-4 * S[0].item())
        assert A not in user.expert_opt.state
        assert user.adapter['h.0.attn.c_attn.lora.A'] in user.expert_opt.state  # averaged, not refactored


def test_flora_merges_exactly_what_was_sent(run_of):
    """After the last round the base has gained Σ_k p_k γ_k B_k A_k of that round too, and a user's LoRA adds nothing."""
    run = run_of('flora')
    before, merged = load_gpt(str(run.out / 'adapters/base.safetensors')).state_dict(), run.fleet.base.state_dict()
    for name, lora, rank in (
        ('h.1.mlp.c_fc', 'h.1.mlp.generalists.0.c_fc', 16),
        ('h.0.attn.c_proj', 'h.0.attn.c_proj.lora', 8),
    ):
        p_gamma = [n / 1700 * 16 / math.sqrt(rank) for n in N_TRAIN]
        gained = sum(w * u[lora + '.B'] @ u[lora + '.A'] for w, u in zip(p_gamma, adapters(run)))
        assert gained.norm() > 0
        assert torch.allclose(merged[name + '.weight'], before[name + '.weight'] + gained, atol=1e-6)
    assert all(not q.any() for user in run.users for n, q in user.adapter.items() if n.endswith('.B'))


def test_flora_of_ranks_that_differ(tiny):
    base, original = copy.deepcopy(tiny.model), tiny.model.state_dict()
    run = trained(base, '--method=flora', '--lora_rank=4,6,8', '--rounds=2')
    comm = [(line['bytes_up'], line['bytes_down']) for line in run.lines if line['kind'] == 'comm']
    assert len({up for up, _ in comm[:3]}) == 3 and [up for up, _ in comm[:3]] == [up for up, _ in comm[3:]]
    assert [down for _, down in comm] == [0] * 3 + [sum(up for up, _ in comm[:3])] * 3  # down: the whole stack
    first, lora, name = copy.deepcopy(base.state_dict()), 'h.1.mlp.generalists.0.c_proj', 'h.1.mlp.c_proj.weight'
    assert not torch.equal(first[name], original[name]) and torch.equal(first['wte.weight'], original['wte.weight'])
    federate.merge(base, run.server)
    p_gamma = [n / 1700 * 16 / math.sqrt(r) for n, r in zip(N_TRAIN, RANKS)]
    gained = sum(w * u[lora + '.B'] @ u[lora + '.A'] for w, u in zip(p_gamma, run.sent.values()))
    assert gained.norm() > 0 and torch.allclose(base.state_dict()[name], first[name] + gained, atol=1e-6)


# ---- FDLoRA ----------------------------------------------------------------------------------------------------------
def test_fusion_is_never_worse_than_its_parts_on_the_validation_windows(tiny, run_of):
    run = run_of('fdlora')
    mixed = [(line['own'], line['mean']) for line in run.lines if line['kind'] == 'fusion']
    own = trained(tiny.model, '--method=fdlora', *SHORT)  # the same users before they searched
    assert len(mixed) == 3
    for user, w, saved in zip(own.users, mixed, adapters(run)):
        mine = {name: p.clone() for name, p in user.adapter.items() if 'generalists' in name}
        found = federate.fuse(mine, run.server, *w)
        assert all(torch.equal(saved[name], found[name]) for name in mine)
        assert all(torch.equal(saved[name], p) for name, p in user.adapter.items() if 'attn' in name)
        tail = 0.05 * (abs(w[0]) + abs(w[1])) / 2
        for part in ((1.0, 0.0), (0.0, 1.0)):  # its own, the mean
            assert user.judged(found) + tail <= user.judged(federate.fuse(mine, run.server, *part)) + 0.025 + 1e-6
        assert user.judged(found) < user.judged(federate.fuse(mine, run.server, 0.0, 0.0))


# ---- consensus -------------------------------------------------------------------------------------------------------
def test_consensus_exchanges_predictions_only_and_takes_any_experts_and_ranks(train, tiny, tmp_path):
    (tmp_path / 'public.txt').write_text('abc abd aca bca ' * 20)
    shape = ('--n_experts=1,2,3', '--lora_rank=4,8,2', '--rounds=3')
    public = (f'--public_text={tmp_path}/public.txt', '--judge_windows=5')
    run = train('--method=consensus', *shape, '--consensus_start=2', *public)
    assert all(user.shared == [] and user.own == {} for user in run.users) and run.fleet.public.shape == (5, 16)
    assert len(matrices(run.lines)) == 2 and all(np.allclose(W.sum(1), 1) for W in matrices(run.lines))  # ends of rounds 2, 3
    per_message = 5 * 16 * 100 * (4 + 2)  # 0.6 kB a position
    assert [line['bytes_up'] for line in run.lines if line['kind'] == 'comm'] == [0] * 3 + [per_message] * 6
    alone = trained(tiny.model, '--method=local', *shape)
    assert losses(run.lines)[:12] == losses(alone.lines)[:12]  # until the first labels
    assert all(not same(u.adapter, v.adapter) for u, v in zip(run.users, alone.users))


def test_consensus_without_weight_is_local(tiny, run_of):
    public = run_of('consensus').fleet.public
    a = trained(tiny.model, '--method=consensus', '--consensus_coef=0', *SHORT, public=public)
    b = trained(tiny.model, '--method=local', *SHORT)
    assert all(same(u.adapter, v.adapter) for u, v in zip(a.users, b.users)) and matrices(a.lines)


@pytest.mark.parametrize('args', [('--method=consensus',), ('--method=pcl', '--trust=predictions')], ids=' '.join)
def test_a_user_with_permuted_predictions_gets_the_least_trust(tiny, run_of, monkeypatch, args):
    real = User.predict

    def permuted(user, logits):
        top = real(user, logits)
        return {**top, 'ids': (top['ids'] + 128) % 257} if user.id == 2 else top  # the last of the three talks nonsense

    monkeypatch.setattr(User, 'predict', permuted)
    run = trained(tiny.model, *args, *SHORT, '--rounds=3', public=run_of('consensus').fleet.public)
    assert len(matrices(run.lines)) == 3
    for W in matrices(run.lines):
        assert W.mean(0).argmin() == 2 and W[:2, 2].max() < W[:2, :2].min()


# ---- routing units, one decision for all layers, top-1, frozen -------------------------------------------------------
CHOICES = [
    ('--routing_unit=prefix',),
    ('--routing_unit=sequence',),
    ('--one_routing',),
    ('--top_k=1',),
    ('--router=frozen',),
    ('--n_generalists=2', '--n_experts=4'),
    ('--ghost_noise=4',),
    ('--aggregate=median',),
    ('--aggregate=trimmed_mean', '--trim=0.4'),
]


@pytest.mark.parametrize('args', CHOICES, ids=' '.join)
def test_design_choices_run_and_are_evaluated_as_they_were_trained(tiny, args):
    """eval.py's model, from the configuration as a file has it and the saved tensors, measures the same."""
    run = trained(tiny.model, '--method=comigs_1gxs', '--n_experts=3', '--rounds=1', *args)
    shape = shape_of(type(run.c)(**json.loads(json.dumps(vars(run.c)))), 0)
    for user in run.users:
        ppl = evaluate(user.model, user.data['test'], 16)['ppl']
        assert ppl < evaluate(tiny.model, user.data['test'], 16)['ppl']
        assert evaluate(eval_file.rebuild(tiny.model, shape, user.adapter), user.data['test'], 16)['ppl'] == ppl


def test_design_choices_together_end_to_end(train):
    run = train('--method=comigs_1gxs', *SHORT, *(switch for choice in CHOICES for switch in choice))
    assert all(a < b for a, b in zip(run.summary['test_ppl'], run.summary['pretrained_test_ppl']))
    eval_file.main([str(run.out)])
    assert [u['test_ppl'] for u in json.loads((run.out / 'eval.json').read_text())['users']] == run.summary['test_ppl']


def test_a_frozen_router_has_no_optimizer_and_keeps_its_start(tiny):
    for user in trained(tiny.model, '--router=frozen', *SHORT).users:
        routers = [name for name, role in user.role.items() if role == 'router']
        assert user.router_opt is None and len(routers) == 2
        for name in routers:
            assert torch.equal(user.adapter[name], initial(name, (2, 16), 42, 'user', user.id))


# ---- the leak of the authors' code -----------------------------------------------------------------------------------
def test_leaked_gradients_are_those_of_the_other_level(tiny):
    """First router step: the sum of the expert steps' training gradients + its own; first expert step after it: likewise."""
    user = devices(tiny.model, '--method=comigs_1gxs', '--n_experts=3', '--leak_gradients')[0]
    steps(user)
    name, expert, seen = 'h.0.mlp.router.weight', 'h.0.mlp.specialists.0.c_fc.A', {}
    for opt in (user.expert_opt, user.router_opt):  # gradients of one fixed point, so that they add up exactly
        opt.step = lambda: seen.update({n: user.adapter[n].grad.clone() for n in (name, expert)})

    def step(split, key, clean=False):
        for p in user.adapter.values() if clean else ():
            p.grad = None
        user.descend(user.expert_opt if split == 'train' else user.router_opt, user.data[split], key)
        return dict(seen)

    first, second, router = step('train', (1, 1), clean=True), step('train', (1, 2)), step('valid', (1, 3))
    own = {key: step(split, key, clean=True) for key, split in (((1, 2), 'train'), ((1, 3), 'valid'))}
    assert torch.allclose(second[name], first[name] + own[1, 2][name], atol=1e-6)
    assert torch.equal(second[expert], own[1, 2][expert])  # its own optimizer cleared it
    assert torch.allclose(router[name], second[name] + own[1, 3][name], atol=1e-6)


def test_the_leak_changes_the_numbers_only_from_the_first_router_phase_on(tiny):
    a, b = (devices(tiny.model, '--router_every=3', *leak)[0] for leak in ((), ('--leak_gradients',)))
    lines = [losses(steps(user, 2)) for user in (a, b)]
    assert lines[0][:3] == lines[1][:3] and lines[0][3] != lines[1][3]
