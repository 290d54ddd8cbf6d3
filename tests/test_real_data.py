"""The paper's three data sets, from local stand-ins in the Hub's columns, through train.py with GPT-2's vocabulary."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, SHARED

pytestmark = pytest.mark.skipif(not (SHARED / 'data').is_dir(), reason='needs ../shared/data, local copies of the data sets')
ENV = {**os.environ, 'TIKTOKEN_CACHE_DIR': str(SHARED / 'tiktoken_cache')}


def python(*args):
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, cwd=ROOT, env=ENV)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    'config, args', [('agnews', ['--method=fedavg']), ('multilingual', []), ('slimpajama_1gxs', ['--n_experts=4,2,2,2'])]
)
def test_from_rows_to_perplexities(config, args, tmp_path):
    """Small splits, a random base of GPT-2's vocabulary, two short rounds: better than the base for every user."""
    name = config.partition('_')[0]
    table = python(
        'data/prepare.py',
        name,
        f'--source={SHARED}/data/{name}',
        f'--out_root={tmp_path}',
        '--train_tokens=20000',
        '--valid_tokens=3000',
        '--test_tokens=3000',
    )
    assert 'Table 3' in table
    python(
        'pretrain.py',
        f'--dataset={tmp_path}/{name}',
        '--steps=0',
        '--n_layer=2',
        '--n_head=2',
        '--n_embd=32',
        f'--out={tmp_path}/random.safetensors',
    )
    said = python(
        'train.py',
        f'config/{config}.py',
        *args,
        f'--init_from={tmp_path}/random.safetensors',
        f'--dataset={tmp_path}/{name}',
        f'--out_dir={tmp_path}/run',
        '--rounds=2',
        '--router_every=10',
        '--router_steps=2',
        '--batch_size=4',
        '--block_size=64',
    )
    assert 'mean' in said
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert len(summary['test_ppl']) == 4
    assert all(ours < base for ours, base in zip(summary['test_ppl'], summary['pretrained_test_ppl']))
    report = python('eval.py', tmp_path / 'run')
    assert 'generalist alone' in report
