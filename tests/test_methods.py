"""Every row of METHODS end to end, and what makes each rule its own, on a tiny base with three users of different sizes."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import user_streams, write_dataset
from safetensors.torch import load_file
from test_train import refused, same, snapshot

import eval as eval_file
import federate
import lora_moe
from data.stream import get_batch
from model import load_gpt

SHARING = (
    'fedavg',
    'ffa_lora',
    'pcl',
    'comigs_2g',
    'comigs_1g1s',
    'comigs_1gxs',
    'hetlora',
    'flexlora',
    'fedavg_moe',
    'pfedmoe',
    'fedavg_moe_tr',
    'comigs_1g1s_tr',
    'fedsa_lora',
    'fdlora',
    'flora',
)
ALONE = ('centralized', 'local', 'comigs_2s', 'local_moe', 'local_moe_tr', 'consensus')
SHORT = ('--rounds=2', '--consensus_start=1', '--judge_windows=4')


# ---- every method, end to end --------------------------------------------------------------------------------------
@pytest.mark.parametrize('method', ['pretrained', *SHARING, *ALONE])
def test_every_method_runs_and_reports(train, method, monkeypatch):
    run = train(f'--method={method}', *SHORT)
    s = run.summary
    assert json.loads((run.out / 'summary.json').read_text()) == json.loads(json.dumps(s))
    assert len(s['test_ppl']) == len(s['pretrained_test_ppl']) == 3
    assert s['mean_test_ppl'] == pytest.approx(np.mean(s['test_ppl'])) and all(map(math.isfinite, s['test_ppl']))
    if method == 'pretrained':
        assert s['test_ppl'] == s['pretrained_test_ppl'] and s['rounds'] == 0 and s['bytes_up'] == 0
    else:
        assert all(a < b for a, b in zip(s['test_ppl'], s['pretrained_test_ppl']))  # four steps already help
    assert (s['aggregated_test_ppl'] is not None) == (s['shared_params'] > 0) == (method in SHARING)
    # eval.py rebuilds every user's model from the files and measures the same
    monkeypatch.setattr(sys, 'argv', ['eval.py', str(run.out)])
    eval_file.main()
    report = json.loads((run.out / 'eval.json').read_text())
    assert [u['test_ppl'] for u in report['users']] == s['test_ppl']


def test_every_method_is_listed(train, capsys):
    with pytest.raises(SystemExit):
        train('--list_methods')
    listed = capsys.readouterr().out
    assert {line.split()[0] for line in listed.splitlines()[2:]} == {'pretrained', *SHARING, *ALONE}
    assert 'consensus' in listed and '2305.18497' in listed and 'Table 4' in listed


@pytest.mark.parametrize(
    'method, n',
    [
        ('local', '3,1,2'),
        ('comigs_2s', '3,1,2'),
        ('local_moe', '3,1,2'),
        ('local_moe_tr', '3,1,2'),
        ('consensus', '3,1,2'),
        ('comigs_1g1s', '3,1,2'),
        ('comigs_1gxs', '3,1,2'),
        ('pfedmoe', '3,1,2'),
        ('comigs_1g1s_tr', '3,1,2'),
        ('comigs_2g', '3,2,2'),
        ('fedavg_moe', '3,2,2'),
        ('fedavg', '3,2,2'),
        ('pcl', '3,2,2'),
    ],
)
def test_experts_per_user(train, method, n):
    run = train(f'--method={method}', f'--n_experts={n}', *SHORT)
    mlps = [u.model.h[0].mlp for u in run.users]
    assert [len(mlp.generalists) + len(mlp.specialists) for mlp in mlps] == [*map(int, n.split(','))]
    assert all(a < b for a, b in zip(run.summary['test_ppl'], run.summary['pretrained_test_ppl']))


@pytest.mark.parametrize(
    'args, message',
    [
        (['--method=hetlora', '--n_experts=4,2,2'], '--match=active or --match=full'),
        (['--method=flora', '--n_experts=2'], 'has one expert per user'),
        (['--method=fedavg', '--n_experts=1'], 'user 0 has n_experts=1, fewer than n_generalists=2'),
        (['--method=centralized', '--n_experts=4,2,2'], '--n_experts=4,2,2: expected one value'),
        (['--method=ffa_lora', '--lora_rank=4,8,8'], '--lora_rank must be the same'),
        (['--aggregate=mean'], 'expected one of none, fedavg, ffa'),
        (['--aggregate=consensus'], 'shares no tensors'),
        (['--method=local', '--aggregate=median'], 'has nothing to combine'),
        (['--fuse', '--aggregate=median'], '--fuse mixes'),
        (['--trust=guess'], 'expected one of weights, validation, predictions'),
        (['--trim=0.5'], '--trim=0.5 must be in [0, 0.5)'),
        (['--routing_unit=word'], 'expected one of token, prefix, sequence'),
        (['--ghost_noise=8', '--micro_batch_size=1'], '--micro_batch_size must be 2 or more'),
        (['--method=consensus', '--public_text=nowhere.txt'], 'nowhere.txt'),
    ],
)
def test_what_cannot_be_combined_is_refused(train, tmp_path, capsys, args, message):
    assert message in refused(capsys, train, *args)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'args',
    [
        ('--method=hetlora', '--lora_rank=4,6,8', '--prune_coef=10'),
        ('--method=flexlora', '--lora_rank=4,6,8'),
        ('--method=flora',),
        ('--method=pcl', '--trust=predictions'),
        ('--method=consensus',),
        ('--method=fdlora',),
        ('--leak_gradients', '--local_steps=3'),
        ('--ghost_noise=4',),
    ],
    ids=lambda a: a[0],
)
def test_resume_is_bit_identical(train, monkeypatch, args):
    """Killed in the middle of round 3 of 4, continued: everything a rule remembers between rounds is in the checkpoint."""
    whole = train(*args, *SHORT, '--rounds=4', out='whole')

    def dies(tokens, batch_size, block_size, key):
        if key[:3] == (42, 1, 0) and key[3] == 2 * run_steps + 1:
            raise KeyboardInterrupt
        return get_batch(tokens, batch_size, block_size, key)

    run_steps = whole.local_steps
    import data.stream

    monkeypatch.setattr(data.stream, 'get_batch', dies)
    with pytest.raises(KeyboardInterrupt):
        train(*args, *SHORT, '--rounds=4', out='cut')
    monkeypatch.setattr(data.stream, 'get_batch', get_batch)
    resumed = train(*args, *SHORT, '--rounds=4', '--resume', out='cut')
    assert resumed.start == 2
    assert (whole.out / 'metrics.jsonl').read_bytes() == (resumed.out / 'metrics.jsonl').read_bytes()
    for file in sorted((whole.out / 'adapters').iterdir()):
        assert same(load_file(file), load_file(resumed.out / 'adapters' / file.name))


# ---- one user ------------------------------------------------------------------------------------------------------
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
def test_a_single_user_trains_as_local(train, tmp_path, monkeypatch, args):
    """N = 1: nobody to average with, so every rule is Local (given the same start, whatever its tensors are called)."""
    real = lora_moe.initial
    monkeypatch.setattr(
        lora_moe, 'initial', lambda name, shape, *key: real(name.replace('generalists', 'specialists'), shape, 'x')
    )
    folder = write_dataset(tmp_path / 'one', [user_streams(0, 300)])
    n = '--n_experts=1' if 'hetlora' in args[0] else '--n_experts=2'
    a, b = (train(*given, *SHORT, f'--dataset={folder}', out=out) for given, out in ((args, 'a'), (('--method=local', n), 'b')))
    losses = [[line['loss'] for line in run.lines if line['kind'] == 'train'] for run in (a, b)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert a.summary['test_ppl'] == b.summary['test_ppl'] == a.summary['aggregated_test_ppl']


# ---- centralized ---------------------------------------------------------------------------------------------------
def test_centralized_is_one_model_on_pooled_text_tested_on_everybody(train):
    run = train('--method=centralized', *SHORT)
    (user,) = run.users
    sizes = (300, 500, 900)
    assert np.array_equal(user.data['train'], np.concatenate([user_streams(i, n)['train'] for i, n in enumerate(sizes)]))
    assert user.batch_size == 3 * 4 and user.expert_steps == 4
    tested = [(line['user'], line['ppl']) for line in run.lines if line['kind'] == 'eval' and line['when'] == 'local']
    assert tested == [*enumerate(run.summary['test_ppl'])] and len(set(run.summary['test_ppl'])) == 3
    # METHOD 1.6: pooled text is scored by exp of the mean loss, which is below the mean of the users' perplexities
    assert run.summary['pooled_test_ppl'] == pytest.approx(math.exp(np.mean(np.log(run.summary['test_ppl']))))
    assert run.summary['pooled_test_ppl'] < run.summary['mean_test_ppl']


# ---- FFA-LoRA, FedSA-LoRA ------------------------------------------------------------------------------------------
def test_ffa_freezes_every_A_and_sends_B(train):
    run = train('--method=ffa_lora', *SHORT)
    for user in run.users:
        for name, p in user.adapter.items():
            start = lora_moe.initial(name, p.shape, 42, 'server')
            assert torch.equal(p, start) == name.endswith('.A')
    assert all(name.endswith('.B') for name in run.shared)
    comm = [line for line in run.lines if line['kind'] == 'comm']
    assert {line['bytes_up'] for line in comm} == {4 * sum(run.users[0].adapter[name].numel() for name in run.shared)}
    assert run.users[0].trainable == sum(p.numel() for n, p in run.users[0].adapter.items() if n.endswith('.B'))
    assert set(load_file(run.out / 'adapters/server.safetensors')) == set(run.users[0].adapter)  # complete: A and B


def test_fedsa_averages_A_and_keeps_B(train):
    run = train('--method=fedsa_lora', *SHORT)
    for name, p in run.users[0].adapter.items():
        others = [torch.equal(p, user.adapter[name]) for user in run.users[1:]]
        assert all(others) if name.endswith('.A') else not any(others)
    assert not (run.out / 'adapters/server.safetensors').exists()  # B is nobody's but one's


# ---- trust ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('trust', ['weights', 'validation', 'predictions'])
def test_trust_matrices_are_logged_and_drawn(train, trust):
    run = train('--method=pcl', f'--trust={trust}', *SHORT, draw=True)
    matrices = [np.array(line['matrix']) for line in run.lines if line['kind'] == 'trust']
    assert len(matrices) == 2
    for W in matrices:
        assert W.shape == (3, 3) and np.allclose(W.sum(1), 1) and (W > 0).all() and not np.allclose(W, W[0])
    assert (run.out / 'trust.png').read_bytes()[:4] == b'\x89PNG'
    message = federate.n_bytes(run.upload(run.users[0]))
    comm = [line for line in run.lines if line['kind'] == 'comm']
    positions = 6 * 16 if trust == 'predictions' else 0  # 2 windows of 16 out of each user's validation text
    extra = {'weights': (0, 0), 'validation': (4 * 3, 2 * message), 'predictions': (positions * 100 * 6, 0)}[trust]
    assert {line['bytes_up'] - message for line in comm} == {extra[0]}
    assert {line['bytes_down'] - message for line in comm} == {extra[1]}


def test_validation_trust_is_the_softmax_of_perplexities(train):
    """S_ij = -ppl of user j's model on user i's first validation windows, from the saved adapters of the last round."""
    run = train('--method=pcl', *SHORT)
    W = np.array([line['matrix'] for line in run.lines if line['kind'] == 'trust'][-1])
    adapters = [load_file(run.out / f'adapters/user{i}.safetensors') for i in range(3)]
    model, user = run.users[0].model, run.users[0]
    for i in range(3):
        ppl = []
        for tensors in adapters:  # all LoRAs are shared, so model j is j's adapter
            run.load(user, tensors)
            ppl.append(eval_file.evaluate(model, run.users[i].data['valid'][: 4 * 16 + 1], 16)['ppl'])
        assert np.allclose(W[i], np.exp(-np.array(ppl)) / np.exp(-np.array(ppl)).sum(), rtol=1e-4)


def test_a_high_temperature_is_fedavg(train):
    a, b = train('--method=pcl', '--trust_temperature=1e12', *SHORT, out='a'), train('--method=fedavg', *SHORT, out='b')
    assert a.summary['test_ppl'] == pytest.approx(b.summary['test_ppl'], rel=1e-5)


# ---- ranks that differ ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize('match, ranks', [('active', [16, 8, 16]), ('full', [32, 8, 24])])
def test_matching_ranks(train, match, ranks):
    """full: as many LoRA parameters as all n_experts of rank 8 have; active: as many as a token meets."""
    run = train('--method=flexlora', f'--match={match}', '--n_experts=4,1,3', *SHORT)
    for user, rank in zip(run.users, ranks):
        expert = user.model.h[0].mlp.generalists[0]
        assert expert.c_fc.A.shape[0] == rank and expert.c_fc.scaling == 16 / math.sqrt(rank)
        assert user.model.h[0].attn.c_attn.lora.A.shape[0] == 8
    assert json.loads((run.out / 'config.json').read_text())['lora_rank'] == ranks


def test_hetlora_distributes_the_first_components_and_prunes_one_at_a_time(train):
    """A strong penalty shrinks the tail in every round after the first (there B starts at 0, so the tail cannot shrink)."""
    run = train('--method=hetlora', '--lora_rank=4,6,8', '--prune_coef=100', '--rounds=4')
    ranks, full = np.array([user.rank for user in run.users]), np.array((4, 6, 8))
    assert (ranks <= full).all() and (ranks < full).any() and (ranks >= full - 3).all()
    sent = np.array([line['bytes_up'] for line in run.lines if line['kind'] == 'comm']).reshape(4, 3)
    # 2 layers of (c_fc and c_proj, each with A and B): 2 (16 + 64) numbers a component; attention: 8 (64 + 32) a layer
    assert sent[0].tolist() == [4 * 2 * (160 * rank + 768) for rank in (4, 6, 8)]
    assert sent[-1].tolist() == [4 * 2 * (160 * rank + 768) for rank in ranks]
    for user in run.users:
        for name in (n for n in user.adapter if 'generalists' in n):
            saved = load_file(run.out / f'adapters/user{user.id}.safetensors')[name]
            tail = saved[user.rank :] if name.endswith('.A') else saved[:, user.rank :]
            assert not tail.any()
            head = user.adapter[name][: user.rank] if name.endswith('.A') else user.adapter[name][:, : user.rank]
            assert torch.equal(head, federate.truncate(run.server, user.rank)[name])


def test_a_pruned_component_stays_zero(train):
    run = train('--method=hetlora', '--lora_rank=4', '--rounds=2')
    user = run.users[0]
    run.prune(user)
    assert user.rank == 3
    for i in range(3):
        run.descend(user, user.expert_opt, user.data['train'], (1, 2, 3, i))
    A, B = (user.adapter[f'h.0.mlp.generalists.0.c_fc.{f}'] for f in 'AB')
    assert A[:3].all() and not A[3:].any() and not B[:, 3:].any()


def test_flexlora_starts_every_round_from_orthonormal_factors_and_fresh_moments(train):
    run = train('--method=flexlora', '--lora_rank=4,6,8', *SHORT)
    updates = [load_file(run.out / f'adapters/user{i}.safetensors') for i in range(3)]
    name, scale = 'h.1.mlp.generalists.0.c_proj', [16 / math.sqrt(r) for r in (4, 6, 8)]
    W = sum(n / 1700 * g * u[name + '.B'] @ u[name + '.A'] for n, g, u in zip((300, 500, 900), scale, updates))
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    for user, r, g in zip(run.users, (4, 6, 8), scale):
        A, B = user.adapter[name + '.A'], user.adapter[name + '.B']
        assert torch.allclose(A @ A.T, torch.eye(r), atol=1e-5)
        best = (U[:, :r] * S[:r]) @ Vt[:r]
        assert torch.allclose(g * B.double() @ A.double(), best, atol=1e-6 + 1e-4 * S[0].item())
        assert user.adapter[name + '.A'] not in user.expert_opt.state
        assert user.adapter['h.0.attn.c_attn.lora.A'] in user.expert_opt.state  # averaged, not refactored


def test_flora_merges_exactly_what_was_sent(train, tiny):
    """After the last round the base has gained Σ_k p_k γ_k B_k A_k of every round, and a user's LoRA adds nothing."""
    run = train('--method=flora', '--lora_rank=4,6,8', '--rounds=1')
    original, merged = load_gpt(str(tiny.base)).state_dict(), run.base.state_dict()
    updates = [load_file(run.out / f'adapters/user{i}.safetensors') for i in range(3)]
    p = [n / 1700 for n in (300, 500, 900)]
    for name, lora, gammas in (
        ('h.1.mlp.c_fc', 'h.1.mlp.generalists.0.c_fc', [16 / math.sqrt(r) for r in (4, 6, 8)]),
        ('h.0.attn.c_proj', 'h.0.attn.c_proj.lora', [16 / math.sqrt(8)] * 3),
    ):
        gained = sum(w * g * u[lora + '.B'] @ u[lora + '.A'] for w, g, u in zip(p, gammas, updates))
        assert gained.norm() > 0
        assert torch.allclose(merged[name + '.weight'], original[name + '.weight'] + gained, atol=1e-6)
    assert torch.equal(merged['wte.weight'], original['wte.weight'])
    assert all(not q.any() for user in run.users for n, q in user.adapter.items() if n.endswith('.B'))
    comm = [line for line in run.lines if line['kind'] == 'comm']
    assert len({line['bytes_up'] for line in comm}) == 3
    two = train('--method=flora', '--lora_rank=4,6,8', '--rounds=2', out='two')  # down: the whole stack
    down = [line['bytes_down'] for line in two.lines if line['kind'] == 'comm' and line['round'] == 2]
    up = [line['bytes_up'] for line in two.lines if line['kind'] == 'comm' and line['round'] == 1]
    assert down == [sum(up)] * 3


# ---- FDLoRA --------------------------------------------------------------------------------------------------------
def test_fusion_is_never_worse_than_its_two_parts_on_the_validation_windows(train):
    run = train('--method=fdlora', *SHORT)
    weights = [(line['own'], line['mean']) for line in run.lines if line['kind'] == 'fusion']
    assert len(weights) == 3
    for user, w in zip(run.users, weights):
        saved = load_file(run.out / f'adapters/user{user.id}.safetensors')
        run.load(user, {name: saved[name] for name in saved if 'attn' in name})
        own_and_mean = run.server
        fused = {name: saved[name] for name in saved if 'generalists' in name}
        tail = 0.05 * (abs(w[0]) + abs(w[1])) / 2
        average = {name: own_and_mean[name] for name in fused}
        zero = {name: torch.zeros_like(t) for name, t in fused.items()}
        assert run.judged(user, fused) + tail <= run.judged(user, average) + 0.025 + 1e-6
        assert run.judged(user, fused) < run.judged(user, zero)


# ---- consensus -----------------------------------------------------------------------------------------------------
def test_consensus_exchanges_predictions_only_and_takes_any_experts_and_ranks(train, tmp_path):
    text = tmp_path / 'public.txt'
    text.write_text('abc abd aca bca ' * 20)
    run = train(
        '--method=consensus',
        '--n_experts=1,2,3',
        '--lora_rank=4,8,2',
        '--rounds=4',
        '--consensus_start=2',
        f'--public_text={text}',
        '--judge_windows=5',
    )
    assert run.shared == [] and all(user.download == {} for user in run.users) and run.public.shape == (5, 16)
    matrices = [np.array(line['matrix']) for line in run.lines if line['kind'] == 'trust']
    assert len(matrices) == 3 and all(np.allclose(W.sum(1), 1) for W in matrices)  # ends of rounds 2, 3, 4
    per_message = 5 * 16 * 100 * (4 + 2)  # 0.6 kB a position
    up = [line['bytes_up'] for line in run.lines if line['kind'] == 'comm']
    assert up == [0] * 3 + [per_message] * 9
    alone = train('--method=local', '--n_experts=1,2,3', '--lora_rank=4,8,2', '--rounds=4', out='alone')
    losses = [[line['loss'] for line in r.lines if line['kind'] == 'train' and line['round'] <= 2] for r in (run, alone)]
    assert losses[0] == losses[1]  # until the first labels
    assert run.summary['test_ppl'] != alone.summary['test_ppl']


def test_consensus_without_weight_is_local(train):
    a, b = train('--method=consensus', '--consensus_coef=0', *SHORT, out='a'), train('--method=local', *SHORT, out='b')
    assert all(same(u.adapter, v.adapter) for u, v in zip(a.users, b.users))


def test_a_user_with_permuted_predictions_gets_the_least_trust(train, monkeypatch):
    real = federate.top_predictions
    calls = []

    def permuted(model, windows, k, logits=False):
        ids, values = real(model, windows, k, logits)
        calls.append(1)
        return ((ids + 128) % 257 if len(calls) % 3 == 0 else ids), values  # the last of the three users talks nonsense

    monkeypatch.setattr(federate, 'top_predictions', permuted)
    for args in (('--method=consensus',), ('--method=pcl', '--trust=predictions')):
        run = train(*args, *SHORT, '--rounds=3', out=args[-1])
        for W in (np.array(line['matrix']) for line in run.lines if line['kind'] == 'trust'):
            assert W.mean(0).argmin() == 2 and W[:2, 2].max() < W[:2, :2].min()


# ---- routing units, one decision for all layers, top-1, frozen -------------------------------------------------------
@pytest.mark.parametrize(
    'args',
    [
        ('--routing_unit=prefix',),
        ('--routing_unit=sequence',),
        ('--one_routing',),
        ('--top_k=1',),
        ('--router=frozen',),
        ('--n_generalists=2', '--n_experts=4'),
        ('--ghost_noise=4',),
        ('--aggregate=median',),
        ('--aggregate=trimmed_mean', '--trim=0.4'),
    ],
    ids=lambda a: a[0],
)
def test_design_choices_run_and_are_evaluated_as_they_were_trained(train, monkeypatch, args):
    run = train('--method=comigs_1gxs', '--n_experts=3', *SHORT, *args)
    assert all(a < b for a, b in zip(run.summary['test_ppl'], run.summary['pretrained_test_ppl']))
    monkeypatch.setattr(sys, 'argv', ['eval.py', str(run.out)])
    eval_file.main()
    assert [u['test_ppl'] for u in json.loads((run.out / 'eval.json').read_text())['users']] == run.summary['test_ppl']


def test_a_frozen_router_has_no_optimizer_and_keeps_its_start(train):
    run = train('--router=frozen', *SHORT)
    for user in run.users:
        assert user.router_opt is None
        for name, p in user.adapter.items():
            if user.role[name] == 'router':
                assert torch.equal(p, lora_moe.initial(name, p.shape, 42, 'user', user.id))


# ---- the leak of the authors' code -----------------------------------------------------------------------------------
def test_leaked_gradients_are_those_of_the_other_level(train):
    """First router step: the sum of the expert steps' training gradients + its own; first expert step after it: likewise."""
    run = train('--method=comigs_1gxs', '--n_experts=3', '--leak_gradients', *SHORT, '--router_every=99')
    user, name, expert = run.users[0], 'h.0.mlp.router.weight', 'h.0.mlp.specialists.0.c_fc.A'
    for opt in (user.expert_opt, user.router_opt):
        opt.step = lambda: None  # gradients of one fixed point, so that they add up exactly
    seen = {}

    def step(opt, split, key):
        opt.step = lambda: seen.update({n: user.adapter[n].grad.clone() for n in (name, expert)})
        run.descend(user, opt, user.data[split], key)
        return dict(seen)

    for p in user.adapter.values():
        p.grad = None
    first = step(user.expert_opt, 'train', (1, 1))
    second = step(user.expert_opt, 'train', (1, 2))
    router = step(user.router_opt, 'valid', (1, 3))
    own = {}
    for key, split in (((1, 2), 'train'), ((1, 3), 'valid')):
        for p in user.adapter.values():
            p.grad = None
        own[key] = step(user.router_opt if split == 'valid' else user.expert_opt, split, key)
    assert torch.allclose(second[name], first[name] + own[1, 2][name], atol=1e-6)
    assert torch.equal(second[expert], own[1, 2][expert])  # its own optimizer cleared it
    assert torch.allclose(router[name], second[name] + own[1, 3][name], atol=1e-6)


def test_the_leak_changes_the_run_only_from_the_first_router_phase_on(train):
    args = ('--rounds=2', '--local_steps=2', '--router_every=3')
    a, b = train(*args, out='a'), train(*args, '--leak_gradients', out='b')
    loss = [[line['loss'] for line in run.lines if line['kind'] == 'train' and line['user'] == 0] for run in (a, b)]
    assert loss[0][:3] == loss[1][:3] and loss[0][3] != loss[1][3]
    assert snapshot(a.users[0]).keys() == snapshot(b.users[0]).keys()
