"""tools/reproduce.py: which runs a table is made of, what is run again and what is not, and the tables themselves."""

import fcntl
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, TINY, user_streams, write_dataset

import configurator
from configurator import configure, fit
from tools import reproduce

SEEDS = [1, 2, 3]


def own_project(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(configurator, 'DATA', folder / 'data')
    monkeypatch.setattr(reproduce, 'TRAIN', folder / 'train.py')


@pytest.fixture
def place(tiny, tmp_path, monkeypatch):
    """A project and working directory with train.py, config/tiny.py and data/tiny, and two small tables."""
    switches = dict(switch[2:].split('=') for switch in TINY if 'rounds' not in switch)
    (tmp_path / 'config').mkdir()
    (tmp_path / 'config' / 'tiny.py').write_text(
        f"dataset = 'tiny'\ninit_from = {str(tiny.base)!r}\nrounds = 1\n" + ''.join(f'{k} = {v}\n' for k, v in switches.items())
    )
    shutil.copytree(tiny.data, tmp_path / 'data' / 'tiny')
    (tmp_path / 'train.py').write_text(
        f'import sys; sys.path.insert(0, {str(ROOT)!r})\nimport pathlib, configurator, train as real\n'
        "configurator.DATA = pathlib.Path(__file__).with_name('data')\nreal.main(sys.argv[1:])\n"
    )
    own_project(tmp_path, monkeypatch)
    monkeypatch.setitem(reproduce.ROWS, 'table1', [reproduce.LOCAL, reproduce.COMIGS[2]])
    monkeypatch.setitem(reproduce.ROWS, 'table4', [reproduce.COMIGS[2]])
    return tmp_path


def pretend(folder: Path, ppl: list[float], valid: float = 9.0, **config) -> None:
    """A finished run as train.py leaves it, with these test perplexities of its users at its only evaluation."""
    folder.mkdir(parents=True)
    summary = {'mean_test_ppl': float(np.mean(ppl)), 'test_ppl': ppl, 'mean_valid_ppl': valid, 'users': ['a', 'b'], 'rounds': 5}
    summary |= {'bytes_up': 40_000, 'bytes_down': 20_000, 'seconds': 7.2, 'trainable_params': [1000, 3000]}
    (folder / 'summary.json').write_text(json.dumps(summary))
    c = {'rounds': 20, 'local_steps': 10, 'batch_size': 64, 'block_size': 128, 'init_from': 'gpt2', 'device': 'cpu'}
    c |= {'dtype': 'float32', 'git_commit': 'abc123', 'versions': {'torch': '2.6'}, 'dataset': 'agnews', 'target': 'own'}
    c |= {
        'users': ['a', 'b'],
        'n_experts': 2,
        'n_generalists': 1,
        'seed': 1,
        'router_every': 30,
        'router_steps': 10,
        'base_sha256': 'x',
    }
    (folder / 'config.json').write_text(
        json.dumps({**c, 'method': 'local', **{k: v == 'True' or v for k, v in config.items()}})
    )
    at = {'kind': 'eval', 'round': 5, 'step': 50, 'when': 'local', 'split': 'test', 'scores': [[0.7, 0.3], [0.4, 0.6]]}
    lines = [json.dumps({**at, 'user': i, 'ppl': p}) + '\n' for i, p in enumerate(ppl)]
    (folder / 'metrics.jsonl').write_text(''.join(lines))
    (folder / 'machine.txt').write_text('a machine')


@pytest.fixture
def agnews(tmp_path, monkeypatch):
    """agnews(tokenizer) prepares a working directory with nothing but AG News' config and meta.json, and returns the setup."""

    def make(tokenizer: str = 'gpt2', dataset: str = 'agnews') -> dict:
        own_project(tmp_path, monkeypatch)
        users = [{'name': n, 'tokens': {'train': 3000, 'valid': 200, 'test': 100}} for n in 'ab']
        for folder in ('config', f'data/{dataset}'):
            Path(folder).mkdir(parents=True, exist_ok=True)
        Path('data', dataset, 'meta.json').write_text(json.dumps({'tokenizer': tokenizer, 'users': users}))
        Path('config/agnews.py').write_text("dataset = 'agnews'\nrounds = 20\n")
        return reproduce.setup_of(dataset, SEEDS, {})

    monkeypatch.setattr(subprocess, 'Popen', lambda *args, **kwargs: pytest.fail('nothing should have been run'))
    return make


def pretend_table(table: str, setup: dict, **config) -> None:
    """Finished runs for all rows: row r, seed s has the perplexities 30 + r + s and 32 + r + s."""
    for r, row in enumerate(reproduce.rows_of(table, setup['name'], setup['seeds'])):
        switches = {k: json.loads(f'[{v}]') if ',' in v else int(v) if v.isdigit() else v for k, v in row['switches'].items()}
        for run in reproduce.runs_of(row, setup)[0]:
            if not run['folder'].exists():  # of another figure
                ppl = [30.0 + r + run['seed'], 32.0 + r + run['seed']]
                pretend(run['folder'], ppl, **{**switches, 'seed': run['seed'], **config})


# ---- tables ----------------------------------------------------------------------------------------------------------
def table_of(file: str) -> tuple[list[str], dict]:
    """Header and {row: {column: cell}} of a markdown table."""
    lines = [line[1:-1].split('|') for line in Path(file).read_text().splitlines() if line.startswith('|')]
    lines = [[cell.strip() for cell in line] for line in lines]
    return lines[0], {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}


def test_a_table_has_mean_deviation_paper_and_difference(agnews, capsys):
    pretend_table('table1', agnews())
    reproduce.main(['table1', '--dataset=agnews', '--seeds=1,2,3'])
    text, (_, rows) = Path('results/table1-agnews.md').read_text(), table_of('results/table1-agnews.md')
    assert text.startswith('# Table 1 on agnews\n') and len(rows) == 11  # the paper's own setting: nothing to say
    assert 'Command: `python tools/reproduce.py table1 --dataset=agnews --seeds=1,2,3`' in text
    assert all(fact in text for fact in ('Seeds: 1, 2, 3.', 'abc123', 'a machine', 'torch 2.6', 'a 3,000 / 200 / 100'))
    # row 2 is Local: users 33 and 35 with seed 1, so means 34, 35, 36; paper 41.50 (.05)
    assert rows['Local'] == {
        'row': 'Local',
        'test ppl': '35.000 ± 1.000',
        'paper': '41.50 ± 0.05',
        'difference': '-6.50',
        'a': '34.000',
        'b': '36.000',
        'seconds': '7',
        'kB up': '4.0',
        'kB down': '2.0',
        'trainable': '1,000 to 3,000',
    }
    assert rows['Pretrained']['test ppl'] == '32.000 ± -' and rows['Pretrained']['paper'] == '90.65'  # one seed
    assert rows['FFA-LoRA, rank 32']['paper'] == rows['FFA-LoRA, rank 32']['difference'] == '-'
    data = json.loads(Path('results/table1-agnews.json').read_text())
    local = data['rows'][2]
    assert [s['seed'] for s in local['seeds']] == SEEDS and local['seeds'][0]['test_ppl'] == [33, 35]
    assert all((Path(s['folder']) / 'summary.json').exists() and not Path(s['folder']).is_absolute() for s in local['seeds'])
    out = capsys.readouterr().out
    assert '35.000 ± 1.000' in out and 'results/table1-agnews.md' in out


def test_a_scaled_down_table_says_so_and_how(agnews):
    setup = agnews('bytes', 'agnews-bytes')
    setup['extra'] = {'rounds': '5', 'target': 'mixture'}
    pretend_table('table4', setup, rounds=5, batch_size=4, init_from='assets/base-tiny.safetensors')
    reproduce.main(['table4', '--dataset=agnews-bytes', '--seeds=1,2,3', '--rounds=5', '--target=mixture'])
    title = Path('results/table4-agnews-bytes.md').read_text().splitlines()[0]
    assert title == (
        '# Table 4 on agnews-bytes, scaled down: rounds 5 (paper: 20), '
        'batch 4 x 128 tokens (paper: 64 x 128 tokens), base assets/base-tiny.safetensors (paper: gpt2), '
        'tokenizer bytes (paper: gpt2), target mixture'
    )
    row = table_of('results/table4-agnews-bytes.md')[1]['CoMiGS-1G1S']
    assert row['paper'] == '33.53 ± 0.03' and row['difference'] == '-'  # per byte and per token: no difference to take


def test_figure_9_is_a_grid_of_one_seed(agnews):
    setup = agnews() | {'seeds': [42]}
    pretend_table('fig9', setup)
    reproduce.main(['fig9', '--dataset=agnews'])
    header, rows = table_of('results/fig9-agnews.md')
    assert header[1:] == ['1', '5', '10', '20'] and [*rows] == ['10', '30', '50', '100']
    assert rows['30']['10'] == '79.000'  # row 6: 30 + 6 + 42 and 2 more
    assert '79.000' in Path('results/fig9-agnews.svg').read_text()  # and a picture
    assert Path('results/fig9-agnews.png').read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize('figure', reproduce.CURVES)
def test_figures_are_drawn_and_their_last_values_tabulated(figure, agnews):
    """One seed, evaluated every 2 rounds, unless the command says otherwise."""
    agnews()
    cases = ([], [42], '2'), (['--seeds=1,2', '--eval_every=5'], [1, 2], '5')
    for args, seeds, every in cases[: 1 + (figure == 'fig3')]:
        setup = reproduce.setup_of('agnews', seeds, {'eval_every': every})
        pretend_table(figure, setup)
        reproduce.main([figure, '--dataset=agnews', *args])
        header, rows = table_of(f'results/{figure}-agnews.md')
        labels = [row['label'] for row in reproduce.rows_of(figure, 'agnews', seeds)]
        assert [*rows] == labels and rows[labels[0]]['test ppl'].startswith('73.000' if seeds == [42] else '32.500 ± 0.707')
        assert f']({figure}-agnews.png)' in Path(f'results/{figure}-agnews.md').read_text()
        assert Path(f'results/{figure}-agnews.svg').exists()
        assert json.loads(Path(f'results/{figure}-agnews.json').read_text())['table'] == figure


def test_figure_2_needs_no_run(agnews, capsys):
    agnews()
    reproduce.main(['fig2', '--dataset=agnews'])
    assert 'wrote results/fig2-agnews.png' in capsys.readouterr().out
    assert sorted(file.name for file in Path('results').iterdir()) == ['fig2-agnews.png', 'fig2-agnews.svg']


def test_only_curves_are_evaluated_every_2_rounds(agnews, capsys):
    agnews()
    every = {}
    for tables in ('table1', 'fig3', 'fig3,table1', 'fig9', 'fig4,fig9'):
        reproduce.main([tables, '--dataset=agnews', '--dry_run'])
        every[tables] = re.findall('comigs_1g1s-seed42-.*', capsys.readouterr().out)
    assert every['fig3'] == every['fig3,table1'] == every['fig4,fig9'] != every['table1'] == every['fig9']


@pytest.mark.parametrize('best', reproduce.PRUNE_COEFS)
def test_hetlora_takes_the_coefficient_that_validation_prefers(best, agnews):
    """Three coefficients on the first seed, only the best of them on the others; test perplexity would choose another."""
    setup = agnews()
    row = next(r for r in reproduce.rows_of('table2', 'agnews', SEEDS) if r['switches']['method'] == 'hetlora')
    first = reproduce.first_pass([row], setup)
    assert [run['seed'] for run in first] == [1, 1, 1] and not reproduce.second_pass([row], setup)
    for coef, run in zip(reproduce.PRUNE_COEFS, first):
        assert f'--prune_coef={coef}' in run['args']
        pretend(run['folder'], [40.0, 40.0] if coef == best else [20.0, 20.0], valid=5.0 if coef == best else 6.0)
    then = reproduce.second_pass([row], setup)
    assert [run['seed'] for run in then] == SEEDS and then[0] in first
    assert all(f'--prune_coef={best}' in run['args'] for run in then)
    for run in then[1:]:
        pretend(run['folder'], [40.0, 40.0])
    record = reproduce.record(row, setup)
    assert record['mean'] == 40 and f'prune_coef {best}' in record['label'] and len(record['valid_ppl_by_prune_coef']) == 3


# ---- rows and folders ------------------------------------------------------------------------------------------------
def folders(table: str, setup: dict) -> dict:
    rows = reproduce.rows_of(table, setup['name'], SEEDS)
    return {row['label']: [run['folder'] for run in reproduce.first_pass([row], setup)] for row in rows}


def test_equal_rows_of_different_tables_share_their_runs(agnews):
    setup = agnews()
    tables = ('table1', 'table2', 'table4', 'table5', 'fig9', 'related')
    t1, t2, t4, t5, grid, related = (folders(table, setup) for table in tables)
    assert t1['Local'] == t4['(i) Local'] and t1['FedAvg'] == t4['(i) FedAvg'] and t1['CoMiGS-2S'] == t4['CoMiGS-2S']
    assert t1['CoMiGS-1G1S'] == t4['CoMiGS-1G1S'] == t5['CoMiGS-1G1S, load balancing generalist'] == related['CoMiGS-1G1S']
    assert t1['CoMiGS-1G1S'] == grid['router_every 30, router_steps 10']
    assert t2['CoMiGS-1GXS 2,4,4,4'] == t5['CoMiGS-1GXS 2,4,4,4, load balancing generalist']
    assert folders('fig6', setup) == folders('fig10', setup) and folders('fig4', setup)['CoMiGS-1G1S'] == t1['CoMiGS-1G1S']
    assert folders('fig6', setup)['CoMiGS-1GXS 2,2,2,2'] == folders('fig7', setup)['CoMiGS-1GXS 2,2,2,2']
    fig3 = folders('fig3', setup)
    assert fig3 == {label: t1[label] for label in fig3} and {*t1} - {*fig3} == {
        'Pretrained', 'FFA-LoRA, rank 32', "CoMiGS-1G1S, released code's gradient leak"
    }  # fmt: skip
    assert all('lora_rank' not in str(t2[f'{method}, ranks 16']) for method in ('HetLoRA', 'FlexLoRA'))  # the rows' default
    for table in (t1, t2, t4, t5, grid, related):  # and within a table every row has its own
        assert len({tuple(f) for f in table.values()}) == len(table)


def test_a_folder_is_found_by_all_that_shapes_the_numbers(agnews):
    setup, switches = agnews(), {'method': 'local'}

    def folder(seed=1, switches=switches, extra=()):
        return reproduce.run_of(switches, seed, reproduce.setup_of('agnews', SEEDS, dict(extra)))['folder']

    same, others = folder(), [folder(2), folder(1, {**switches, 'top_k': '1'}), folder(extra=[('rounds', '5')])]
    assert folder(extra=[('rounds', '1'), ('top_k', '2')]) == folder(extra=[('top_k', '2'), ('rounds', '1')])
    Path('config/agnews.py').write_text('rounds = 21\n')
    others.append(folder())
    agnews()
    Path('data/agnews/meta.json').write_text(json.dumps({**setup['meta'], 'users': setup['meta']['users'][:1]}))
    others.append(folder())
    agnews()
    assert folder() == same and len({same, *others}) == 6


def rows_of_all_tables() -> list[dict]:
    """The switches of every row of every table on AG News, each once."""
    rows = [row['switches'] for table in reproduce.TITLES for row in reproduce.rows_of(table, 'agnews', SEEDS)]
    return [*{json.dumps(row): row for row in rows}.values()]


def test_every_row_is_legal():
    for switches in rows_of_all_tables():
        c = configure([f'--{k}={v}' for k, v in switches.items()])
        assert len(fit(c, N=1 if c.pooled else 4, n_positions=1024).lora_rank) in (1, 4)


@pytest.mark.slow
def test_every_row_runs(train, tmp_path):
    """One step of every row's own switches on four users."""
    data = write_dataset(tmp_path / 'four', [user_streams(i, 300) for i in range(4)])
    for i, switches in enumerate(rows_of_all_tables()):
        args = ['--rounds=1', '--local_steps=1', '--judge_windows=2', f'--dataset={data}']
        run = train(*args, *(f'--{k}={v}' for k, v in switches.items()), out=str(i))
        assert len(run.summary['test_ppl']) == 4, switches


def test_paper_values_are_read_by_data_set():
    rows = {
        (table, name, row['label']): row['paper']
        for table in reproduce.TITLES
        for name in (*reproduce.SETS, 'demo')
        for row in reproduce.rows_of(table, name, SEEDS)
    }
    assert rows['table1', 'multilingual', 'CoMiGS-1G1S'] == (47.19, 0.10)
    assert rows['table1', 'demo', 'CoMiGS-1G1S'] == (None, None)
    assert rows['table4', 'agnews', '(iii) Local-MoE-tr'] == (None, None)
    assert rows['table2', 'slimpajama', 'CoMiGS-1GXS 4,2,2,4'] == (22.28, None)
    assert rows['table2', 'multilingual', 'HetLoRA, ranks 16'] == (57.76, None)
    assert rows['table5', 'agnews', 'CoMiGS-1GXS 2,4,4,4, load balancing generalist'] == (34.22, None)
    assert rows['table5', 'agnews', 'CoMiGS-1G1S, load balancing none'] == (33.69, None)


# ---- sweeps ----------------------------------------------------------------------------------------------------------
def test_a_sweep_runs_what_is_missing_and_nothing_twice(place, capfd):
    command = ['table1,table4', '--dataset=tiny', '--seeds=2', '--jobs=2', '--device=cpu']
    reproduce.main(command)
    out = capfd.readouterr().out
    assert len(re.findall(r'^\[\d/2\] .* seed 2: test perplexity', out, re.M)) == 2  # 1G1S once for both tables
    written = [f'table{i}-tiny.{kind}' for i in (1, 4) for kind in ('json', 'md')]
    assert sorted(f.name for f in Path('results').iterdir()) == written
    title, rows = Path('results/table1-tiny.md').read_text().splitlines()[0], table_of('results/table1-tiny.md')[1]
    assert title.startswith('# Table 1 on tiny, not a data set of the paper, scaled down: rounds 1 (paper: 20), ')
    assert rows['Local']['kB up'] == '0.0' != rows['CoMiGS-1G1S']['kB up'] and rows['Local']['paper'] == '-'
    summaries = sorted(place.glob('out/reproduce/tiny/*/summary.json'))
    assert len(summaries) == 2
    for file in summaries:
        assert json.loads(file.read_text())['seed'] == int(re.search(r'seed(\d)', str(file))[1])
        assert 'OMP_NUM_THREADS=' in (file.parent / 'machine.txt').read_text()
    times, numbers = {f: f.stat().st_mtime_ns for f in place.glob('out/reproduce/tiny/*/*')}, rows['Local']['test ppl']

    reproduce.main(command)  # all is there
    assert {f: f.stat().st_mtime_ns for f in place.glob('out/reproduce/tiny/*/*')} == times
    assert '[1/' not in capfd.readouterr().out

    lost = next(file for file in summaries if 'local-seed2' in str(file))
    lost.unlink()
    reproduce.main(['table1', *command[1:], '--dry_run'])
    assert f'begun    {lost.parent.relative_to(place)}\n' in capfd.readouterr().out
    reproduce.main(command)  # its checkpoint is still there: one evaluation, no step
    assert capfd.readouterr().out.startswith('[1/1] local seed 2')
    changed = {f.parent for f, t in times.items() if f.stat().st_mtime_ns != t}
    assert changed == {lost.parent} and table_of('results/table1-tiny.md')[1]['Local']['test ppl'] == numbers


def test_ctrl_c_ends_the_runs_and_the_same_command_goes_on(place, capsys):
    args = ['table4', '--dataset=tiny', '--seeds=1', '--jobs=1', '--device=cpu', '--rounds=500']
    own = f'import signal, sys; sys.path.insert(0, {str(ROOT)!r})\nimport pathlib, configurator\nfrom tools import reproduce\n'
    own += "reproduce.TRAIN = pathlib.Path(__file__).with_name('train.py')\n"
    own += "configurator.DATA = reproduce.TRAIN.with_name('data')\n"
    own += 'signal.signal(signal.SIGTERM, signal.default_int_handler)\nreproduce.main(sys.argv[1:])\n'
    (place / 'reproduce.py').write_text(own)
    command = [sys.executable, str(place / 'reproduce.py'), *args]

    def stopped(sign: int, round: int) -> str:
        """The command, stopped in this round of its first run: what it says."""
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not any(f'"round": {round},' in f.read_text() for f in place.glob('out/reproduce/tiny/*/metrics.jsonl')):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(sign)
        assert process.wait(60) == 130
        return process.stderr.read()

    said = 'reproduce.py: interrupted; the same command continues where it stopped\n'
    assert stopped(signal.SIGINT, 5) == said
    (folder,) = place.glob('out/reproduce/tiny/*/')
    begun = (folder / 'config.json').stat().st_mtime_ns
    assert not (folder / 'summary.json').exists()
    with open(folder.parent / '.lock') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free: no run is left behind
        with pytest.raises(SystemExit) as end:
            reproduce.main(args)
        err = capsys.readouterr().err
        assert end.value.code == 2 and 'another sweep of tiny' in err and err.count('\n') == 1
    metrics = [*map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())]
    assert stopped(signal.SIGTERM, metrics[-1]['round'] + 5) == said  # as `timeout` does
    assert [*place.glob('out/reproduce/tiny/*/')] == [folder] and (folder / 'config.json').stat().st_mtime_ns == begun


@pytest.fixture
def fake_runs(place, monkeypatch):
    """fake_runs(end): in place of a process of train.py, end(folder, env) is called, which returns the exit status."""

    def use(end) -> None:
        def popen(command, env, **kwargs):
            folder = Path(next(arg for arg in command if arg.startswith('--out_dir=')).partition('=')[2])
            return SimpleNamespace(wait=lambda: end(folder, env), terminate=lambda: None)

        monkeypatch.setattr(subprocess, 'Popen', popen)

    return use


def test_every_gpu_gets_runs_of_its_own(fake_runs, monkeypatch):
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    monkeypatch.setattr('os.sched_getaffinity', lambda pid: range(16), raising=False)
    monkeypatch.setattr(subprocess, 'run', lambda *args, **kwargs: SimpleNamespace(stdout=', some GPU'))
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,5')
    assert reproduce.machine_of(0, 'cpu')[:3] == (8, 2, [])
    machine = reproduce.machine_of(0, 'auto')
    assert machine[:3] == (2, 8, ['3', '5']) and 'some GPU' in machine[3]
    given, together = [], threading.Barrier(4)

    def end(folder, env):
        together.wait(30)  # four runs are there at once
        given.append(env)
        (folder / 'summary.json').write_text('{"mean_test_ppl": 5, "seconds": 1}')
        return 0

    fake_runs(end)
    setup = reproduce.setup_of('tiny', [1, 2, 3, 4], {'device': 'cuda'})
    reproduce.sweep([reproduce.run_of({'method': 'local'}, seed, setup) for seed in setup['seeds']], setup, 4, 'a sweep')
    assert sorted(env['CUDA_VISIBLE_DEVICES'] for env in given) == ['3', '3', '5', '5']
    assert {env['OMP_NUM_THREADS'] for env in given} == {'4'}


def test_a_run_that_fails_is_named_and_the_others_go_on(fake_runs, capsys):
    def end(folder, env):
        (folder / 'log.txt').write_text('beginning\n\nthe training loss is nan\n')
        if 'local' in folder.name:
            return status
        (folder / 'summary.json').write_text('{"mean_test_ppl": 5, "seconds": 1}')
        return 0

    fake_runs(end)
    for status, how in ((1, 'failed with exit status 1'), (-9, 'was killed by signal 9'), (0, 'failed with exit status 0')):
        with pytest.raises(SystemExit) as end_of_sweep:
            reproduce.main(['table1', '--dataset=tiny', '--seeds=1', '--device=cpu', '--jobs=1', f'--block_size={17 + status}'])
        out, err = capsys.readouterr()
        assert re.fullmatch(rf'\[1/2\] local seed 1 {how}: the training loss is nan \(.*/log.txt\)\n', err)
        assert out == '[2/2] comigs_1g1s seed 1: test perplexity 5.000, 1 s\n'
        assert '1 of 2 runs failed' in end_of_sweep.value.code and not Path('results').exists()


def test_a_run_that_is_refused_ends_the_sweep(fake_runs, capsys):
    """Bad input that only train.py can find, such as a block longer than the base allows, is the same for the other runs."""
    begun = []

    def end(folder, env):
        begun.append(folder)
        (folder / 'log.txt').write_text('train.py: --block_size=64, n_positions=32: the base has no more positions\n')
        return 2

    fake_runs(end)
    with pytest.raises(SystemExit) as end_of_sweep:
        reproduce.main(['table1', '--dataset=tiny', '--seeds=1,2,3', '--device=cpu', '--jobs=1', '--block_size=64'])
    err = capsys.readouterr().err
    assert end_of_sweep.value.code == 2 and err.count('\n') == 1 and ' seed 1' in err and 'no more positions' in err
    assert len(begun) < 6


@pytest.mark.parametrize(
    'argv, says',
    [
        (['table3'], "unknown table 'table3'; known: table1"),
        (['table1,'], "unknown table ''"),
        ([], 'tables'),
        (['table1', '--dataset=nowhere'], 'it needs config/nowhere.py'),
        (['table1', '--dataset=../tiny'], 'it needs config/../tiny.py'),
        (['table1', '--dataset=tiny-bytes'], 'python data/prepare.py tiny --tokenizer=bytes --name=tiny-bytes'),
        (['table1', '--dataset=tiny-small'], 'python data/prepare.py tiny --name=tiny-small'),
        (['table1', '--seeds=1,x'], '--seeds=1,x'),
        (['table1', '--seeds=1,1'], '--seeds=1,1'),
        (['table1', '--seeds=-1'], '--seeds=-1'),
        (['table1', '--jobs=-2'], '--jobs=-2'),
        (['table1', '--jobs=two'], "--jobs: invalid int value: 'two'"),
        (['table1', '--rounds', '5'], "'5' is no switch"),
        (['table1', '--method=local'], '--method cannot be passed on'),
        (['table1', '--seed=3'], '--seeds=42,45'),
        (['fig9', '--router_every=3'], '--router_every cannot be passed on: rows'),
        (['table1', '--roundz=3'], 'did you mean --rounds?'),
        (['table1', '--match=full'], '--match is no switch any more'),
        (['table1', '--clip_norm=1'], 'it bounds the moves'),
    ],
)
def test_bad_input_is_one_line(argv, says, place, capsys):
    with pytest.raises(SystemExit) as end:
        reproduce.main(['--dataset=tiny', *argv])  # a later --dataset wins
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count('\n') == 1 and says in err
    assert not Path('out').exists()
