"""The paper's three data sets, from local stand-ins in the Hub's columns, through train.py with GPT-2's vocabulary."""

import pytest
import torch
from conftest import ROOT, SHARED

import eval as evaluation
from data import prepare
from model import GPT, GPTConfig, save_gpt

pytestmark = pytest.mark.skipif(not (SHARED / 'data').is_dir(), reason='needs ../shared/data, local copies of the data sets')
SIZES = ('--train_tokens=20000', '--valid_tokens=600', '--test_tokens=600')
SHORT = ('--rounds=2', '--local_steps=5', '--router_every=5', '--router_steps=2', '--batch_size=4', '--block_size=32')


@pytest.mark.parametrize(
    'config, args', [('agnews', ['--method=fedavg']), ('multilingual', []), ('slimpajama_1gxs', ['--n_experts=4,2,2,2'])]
)
def test_from_rows_to_perplexities(config, args, train, tmp_path, monkeypatch, capsys):
    """Small splits, a random base of GPT-2's vocabulary, two short rounds: better than the base for every user."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken_cache'))
    name, base = config.partition('_')[0], tmp_path / 'random.safetensors'
    prepare.main([name, f'--source={SHARED}/data/{name}', f'--out_root={tmp_path}', *SIZES])
    assert 'Table 3' in capsys.readouterr().out
    torch.manual_seed(42)
    save_gpt(GPT(GPTConfig(vocab_size=50257, n_positions=256, n_layer=2, n_head=2, n_embd=32)), base)
    data = [f'--init_from={base}', f'--dataset={tmp_path / name}', f'--out_dir={tmp_path / "run"}']
    run = train(str(ROOT / 'config' / f'{config}.py'), *args, *data, *SHORT, short=False)
    assert 'mean' in capsys.readouterr().out
    assert len(run.summary['test_ppl']) == 4
    assert all(ours < base for ours, base in zip(run.summary['test_ppl'], run.summary['pretrained_test_ppl']))
    evaluation.main([str(run.out)])
    assert 'generalist alone' in capsys.readouterr().out
