"""eval.py: exact perplexity, routing shares, the generalist alone, several runs (METHOD 0.3)."""

import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as eval_file
from eval import evaluate, table
from model import GPT, GPTConfig


@pytest.mark.parametrize('n', [2, 16, 17, 18, 40, 97])
def test_every_token_but_the_first_is_predicted_once(n, tiny):
    """Windows of 16 do not overlap, the last is shorter, and the mean is over tokens."""
    tokens = np.random.default_rng(0).integers(0, 257, n)
    result = evaluate(tiny.model, tokens, 16)
    total = 0.0
    with torch.no_grad():
        for start in range(0, n - 1, 16):
            window = torch.from_numpy(tokens[start : start + 17])
            logits = tiny.model(window[None, :-1])[0][0]
            total += F.cross_entropy(logits, window[1:], reduction='sum').item()
    assert result['tokens'] == n - 1 and result['loss'] == pytest.approx(total / (n - 1), rel=1e-5)
    assert result['ppl'] == pytest.approx(math.exp(result['loss']))


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    gpt = GPT(GPTConfig(50, 16, 1, 2, 8))
    for p in gpt.parameters():
        p.data.zero_()
    assert evaluate(gpt, np.arange(40), 16)['ppl'] == pytest.approx(50, rel=1e-5)


def test_evaluation_draws_nothing_and_changes_nothing(train):
    user = train().users[0]
    before = {name: p.clone() for name, p in user.model.named_parameters()}
    state = torch.get_rng_state()
    a, b = (evaluate(user.model, user.data['test'], 16) for _ in range(2))
    assert a == b and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in user.model.named_parameters())


def test_routing_shares(train):
    """Scores and top-1 shares sum to one in every layer, and are those of one forward over the same windows."""
    user = train('--method=comigs_1gxs', '--n_experts=3').users[0]
    tokens = user.data['test'][:33]
    result = evaluate(user.model, tokens, 16)
    assert np.allclose(np.sum(result['scores'], axis=1), 1) and np.allclose(np.sum(result['top1'], axis=1), 1)
    with torch.no_grad():
        routing = user.model(torch.from_numpy(tokens[:32].astype(np.int64)).view(2, 16))[1]
    assert np.allclose(result['scores'], torch.stack([r.probs.mean(0) for r in routing]), atol=1e-6)
    assert np.allclose(result['top1'][0], F.one_hot(routing[0].probs.argmax(-1), 3).float().mean(0))


def report(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['eval.py', *map(str, args)])
    eval_file.main()


def test_report_of_a_finished_run(train, monkeypatch, capsys):
    run = train('--method=comigs_1gxs', '--n_experts=3,1,2')
    report(monkeypatch, run.out)
    said = json.loads((run.out / 'eval.json').read_text())
    assert [u['test_ppl'] for u in said['users']] == pytest.approx(run.summary['test_ppl'], rel=1e-6)
    assert said['mean_test_ppl'] == pytest.approx(run.summary['mean_test_ppl'], rel=1e-6)
    assert said['users'][1]['scores'] is None and len(said['users'][0]['scores'][0]) == 3
    # the generalist alone is one model for all: the server's tensors, no specialist, no router
    one = run.users[1]  # has a generalist only, and holds the server's tensors now
    assert said['users'][1]['generalist_test_ppl'] == pytest.approx(run.summary['aggregated_test_ppl'][1], rel=1e-6)
    alone = evaluate(one.model, run.users[0].data['test'], 16)['ppl']
    assert said['users'][0]['generalist_test_ppl'] == pytest.approx(alone, rel=1e-6)
    assert 'generalist alone' in capsys.readouterr().out


def test_report_of_a_running_run_and_of_another_target(train, monkeypatch):
    """A run without summary.json is read from its checkpoint."""
    run = train()
    (run.out / 'summary.json').unlink()
    report(monkeypatch, run.out, '--target=mixture')
    said = json.loads((run.out / 'eval.json').read_text())
    assert said['target'] == 'mixture' and said['mean_test_ppl'] != pytest.approx(run.summary['mean_test_ppl'], rel=1e-6)


def test_nothing_shared_has_no_generalist(train, monkeypatch):
    run = train('--method=local')
    report(monkeypatch, run.out)
    said = json.loads((run.out / 'eval.json').read_text())
    assert said['mean_generalist_test_ppl'] is None and said['users'][0]['scores'] is None


def test_table_of_several_runs(train, monkeypatch, capsys):
    """A row per target and user; what a run measured itself is taken from it, the rest is evaluated."""
    a, b = train('--method=local', out='a'), train('--method=fedavg', '--target=mixture', out='b')
    capsys.readouterr()
    report(monkeypatch, a.out, b.out, '--target=own,mixture')
    lines = [line.split('  ') for line in capsys.readouterr().out.splitlines()]
    cells = {line[0]: [float(c) for c in line[1:] if c.strip()] for line in lines[2:]}
    assert lines[0][0] == 'test perplexity' and len(cells) == 2 * (3 + 1) and all(len(row) == 3 for row in cells.values())
    assert cells['own: mean'][:2] == [round(np.mean(a.summary[k]), 3) for k in ('pretrained_test_ppl', 'test_ppl')]
    assert cells['mixture: user 2'][2] == round(b.summary['test_ppl'][2], 3)
    for path in (a.out, b.out):  # without their summaries all is evaluated
        (path / 'summary.json').unlink()
    report(monkeypatch, a.out, b.out, '--target=own,mixture')
    again = [line.split('  ') for line in capsys.readouterr().out.splitlines()]
    again = {line[0]: [float(c) for c in line[1:] if c.strip()] for line in again[2:]}
    assert [row[1] for row in again.values()] == pytest.approx([row[1] for row in cells.values()], abs=2e-3)
    other = train('--block_size=8', out='c')
    with pytest.raises(SystemExit):
        report(monkeypatch, a.out, other.out)
    assert 'other windows' in capsys.readouterr().err


@pytest.mark.parametrize(
    'spoil, args, message',
    [
        (lambda out: (out / 'config.json').unlink(), [], 'no config.json'),
        (lambda out: (out / 'adapters/user1.safetensors').write_bytes(b'x'), [], 'user1.safetensors is damaged'),
        (
            lambda out: (out / 'summary.json').unlink() or [file.unlink() for file in (out / 'checkpoint').glob('round-*')],
            [],
            'no finished round',
        ),
        (lambda out: None, ['--target=theirs'], 'expected own or mixture'),
        (lambda out: None, ['--init_from=nowhere'], 'no base model'),
    ],
)
def test_bad_input(train, monkeypatch, capsys, spoil, args, message):
    run = train()
    spoil(run.out)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        report(monkeypatch, run.out, *args)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count('\n') == 1 and message in err


def test_another_base_is_refused(train, monkeypatch, capsys, tiny, tmp_path):
    from model import save_gpt

    run = train()
    torch.manual_seed(9)
    save_gpt(GPT(tiny.model.config), tmp_path / 'other.safetensors')
    with pytest.raises(SystemExit):
        report(monkeypatch, run.out, f'--init_from={tmp_path}/other.safetensors')
    assert 'not the base' in capsys.readouterr().err


def test_table_layout():
    text = table(['a', 'long name'], [['x', 1.23456], ['yy', None]])
    assert text.splitlines() == ['a   long name', '-------------', 'x       1.235', 'yy          -']
