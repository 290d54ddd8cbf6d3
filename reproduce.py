"""The paper's tables and figures: runs what is missing, then writes results/TABLE-DATASET.md and .json with the paper's numbers
beside, for a figure also .png and .svg.

    python reproduce.py table1 --dataset=demo                           # seeds 42, 45, 47
    python reproduce.py table1,table4 --dataset=agnews --seeds=42       # tables share the runs they have in common
    python reproduce.py table2 --dataset=demo --rounds=2 --dry_run      # only lists the runs and which are finished
    python reproduce.py all --dataset=agnews-bytes --init_from=assets/base-tiny.safetensors --rounds=5 --batch_size=4
    python reproduce.py fig3,fig4 --dataset=demo --rounds=20 --block_size=128   # seed 42; of several, mean and deviation

Tables: table1, table2, table4, table5, related; figures: fig2, fig3, fig4, fig6 to fig12; several with commas, or all.
--dataset=agnews-bytes is config/agnews.py on data/agnews-bytes. Any other --name=value goes to train.py in every run; if curves
over training are asked for, that is --eval_every=2 unless given. A run is the folder out/reproduce/DATASET/ROW-seedS-HASH,
found by the hash of all that shapes its numbers: a finished one is never repeated, an interrupted one continues."""

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import plot
from configurator import die, parse, read_file
from plot import read_json

TRAIN = Path(__file__).with_name('train.py')
TITLES = {
    'table1': 'Table 1',
    'table2': 'Table 2',
    'table4': 'Table 4',
    'table5': 'Table 5',
    'related': 'Related systems and ablations',
    **{f'fig{i}': f'Figure {i}' for i in (2, 3, 4, 6, 7, 8, 9, 10, 11, 12)},
}
CURVES = ('fig3', 'fig4', 'fig6', 'fig7', 'fig8', 'fig10', 'fig11', 'fig12')  # drawn over training: evaluated every 2 rounds
PRUNE_COEFS = (5e-2, 5e-3, 5e-4)  # HetLoRA's sweep (the paper's appendix C.2); validation perplexity chooses

# fmt: off
# ---- the rows: what each is called, its method and switches beyond the config file (none at its default: tables share runs),
# and the paper's mean(standard deviation) on SETS, from arXiv 2409.13931v1, Tables 1, 2, 4, 5; - where it has none
SETS = ('agnews', 'multilingual', 'slimpajama')
LOCAL = ('Local', 'local', '41.50(.05)/55.49(.64)/27.31(.17)')
FEDAVG = ('FedAvg', 'fedavg', '32.24(.05)/56.90(.16)/23.30(.17)')
COMIGS = [('CoMiGS-2S', 'comigs_2s', '35.81(.13)/46.36(.16)/22.51(.08)'),
          ('CoMiGS-2G', 'comigs_2g', '31.18(.05)/58.31(.17)/21.36(.01)'),
          ('CoMiGS-1G1S', 'comigs_1g1s', '33.53(.03)/47.19(.10)/21.79(.04)')]
ROWS = {
    'table1': [('Pretrained', 'pretrained', '90.65/156.12/37.19'),
               ('Centralized', 'centralized', '28.19(.52)/55.41(.12)/19.53(.14)'), LOCAL, FEDAVG,
               ('FFA-LoRA, rank 16', 'ffa_lora', '31.60(.14)/57.83(.13)/23.42(.07)'),
               ('FFA-LoRA, rank 32', 'ffa_lora lora_rank=32', '-/-/-'),
               ('PCL', 'pcl', '32.11(.04)/54.02(.19)/27.12(.33)'), *COMIGS,     # the paper's 1G1S was measured with the leak:
               ("CoMiGS-1G1S, released code's gradient leak", 'comigs_1g1s leak_gradients=True', COMIGS[2][2])],
    'table4': [('(i) Local', *LOCAL[1:]), ('(i) FedAvg', *FEDAVG[1:]),
               ('(ii) Local-MoE', 'local_moe', '41.38(.08)/55.78(.27)/27.35(.22)'),
               ('(ii) FedAvg-MoE', 'fedavg_moe', '31.63(.07)/58.15(.10)/23.37(.12)'), ('(ii) pFedMoE', 'pfedmoe', '-/-/-'),
               ('(iii) Local-MoE-tr', 'local_moe_tr', '-/53.78(.33)/27.78(.06)'),
               ('(iii) FedAvg-MoE-tr', 'fedavg_moe_tr', '-/59.39(.13)/23.00(.01)'),
               ('(iii) CoMiGS-1G1S-tr', 'comigs_1g1s_tr', '-/50.86(.14)/25.45(.01)'), *COMIGS],
    'fig9': [(f'router_every {tau}, router_steps {s}', 'comigs_1g1s' + f' router_every={tau}' * (tau != 30)
              + f' router_steps={s}' * (s != 10), '-/-/-') for tau in (10, 30, 50, 100) for s in (1, 5, 10, 20)],
    'related': [COMIGS[2], *((f'CoMiGS-1G1S, {switch}', f'comigs_1g1s {switch}', '-/-/-') for switch in (
                    'aggregate=median', 'aggregate=trimmed_mean', 'router=frozen', 'routing_unit=prefix',
                    'routing_unit=sequence', 'top_k=1', 'one_routing=True', 'ghost_noise=8')),
                ('CoMiGS, 2 generalists, 2 specialists', 'comigs_1gxs n_experts=4 n_generalists=2', '-/-/-'),
                ('PCL, trust by weights', 'pcl trust=weights', '-/-/-'),
                ('PCL, trust by predictions', 'pcl trust=predictions', '-/-/-'), ('FedSA-LoRA', 'fedsa_lora', '-/-/-'),
                ('FDLoRA', 'fdlora', '-/-/-'), ('FLoRA', 'flora', '-/-/-'), ('Consensus', 'consensus', '-/-/-')]}
N_EXPERTS = {  # Table 2: numbers of experts, with the paper's CoMiGS-1GXS and HetLoRA at full matching; Table 5 has HETERO
    'agnews': (('4,2,2,2', '33.66', '31.95'), ('2,4,4,4', '34.22', '32.52')),
    'multilingual': (('2,2,4,4', '46.48', '58.60'), ('4,4,2,2', '47.24', '59.14')),
    'slimpajama': (('2,4,4,2', '22.10', '23.15'), ('4,2,2,4', '22.28', '23.17')),
    'other': (('2,4,4,2', '-', '-'), ('4,2,2,4', '-', '-'))}
HETERO = {'agnews': 1}
ROWS['fig3'] = [row for row in ROWS['table1'] if row[1].split()[0] != 'pretrained' and ' ' not in row[1]]
ROWS['fig4'] = COMIGS[2:]
for figures, settings in (('fig6 fig10', '2,2,2,2 2,2,4,4 2,2,8,8'),           # more experts for users 2, 3, with more text
                          ('fig7 fig11', '2,2,2,2 4,4,2,2 8,8,2,2'),           # for users 0, 1, with less
                          ('fig8 fig12', '1,1,1,1 1,1,2,2 1,1,4,4 1,1,8,8')):  # users 0, 1 have the generalist alone
    for figure in figures.split():
        ROWS[figure] = [(f'CoMiGS-1GXS {n}', f'comigs_1gxs n_experts={n}', '-') for n in settings.split()]
# fmt: on


def rows_of(table: str, name: str, seeds: list[int]) -> list[dict]:
    """The rows of a table on the data set `name`: label, switches (method first), paper (mean, standard deviation), seeds."""
    settings, rows = N_EXPERTS.get(name, N_EXPERTS['other']), ROWS.get(table, [])
    if table == 'table2':  # with two experts or more for everybody, active matching is rank 16 in either setting
        rows = [
            row
            for n, ours, hetlora in settings
            for row in (
                (f'CoMiGS-1GXS {n}', f'comigs_1gxs n_experts={n}', ours),
                (f'HetLoRA, ranks 8 x {n}', f'hetlora match=full n_experts={n}', hetlora),
                (f'FlexLoRA, ranks 8 x {n}', f'flexlora match=full n_experts={n}', '-'),
            )
        ]
        rows += [
            ('HetLoRA, ranks 16', 'hetlora match=active n_experts=2', '31.58/57.76/23.33'),
            ('FlexLoRA, ranks 16', 'flexlora match=active n_experts=2', '36.45/77.65/22.97'),
        ]
    if table == 'table5':
        n, ours, _ = settings[HETERO.get(name, 0)]
        rows = [
            (f'{label}, load balancing {lb}', method + f' load_balance={lb}' * (lb != 'generalist'), paper)
            for label, method, papers in (
                ('CoMiGS-1G1S', 'comigs_1g1s', ('33.69/-/-', '33.53/-/-', COMIGS[2][2])),
                (f'CoMiGS-1GXS {n}', f'comigs_1gxs n_experts={n}', ('-', '-', ours)),
            )
            for lb, paper in zip(('none', 'uniform', 'generalist'), papers)
        ]
    return [
        {
            'label': label,
            'switches': {'method': text.split()[0], **dict(sorted(s.split('=') for s in text.split()[1:]))},
            'paper': paper_value(paper, name),
            'seeds': seeds[:1] if text == 'pretrained' else seeds,
        }  # no seed in the base
        for label, text, paper in rows
    ]


def paper_value(text: str, name: str) -> tuple[float | None, float | None]:
    cells = text.split('/') if '/' in text else [text] * len(SETS)
    found = re.fullmatch(r'([\d.]+)(?:\(([\d.]+)\))?', dict(zip(SETS, cells)).get(name, '-'))
    return tuple(x and float(x) for x in found.groups()) if found else (None, None)


# ---- runs: folders, found by what shapes their numbers --------------------------------------------------------------
def run_of(switches: dict, seed: int, setup: dict) -> dict:
    shaping = {k: v for k, v in setup['extra'].items() if k not in ('quiet', 'tensorboard', 'wandb')}
    identity = json.dumps([switches, seed, shaping, setup['identity']], sort_keys=True)
    words = [switches['method'], *(f'{k}={v}' for k, v in switches.items() if k != 'method')]
    slug = '-'.join(words).replace('=', '').replace(',', '_')
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    folder = Path('out', 'reproduce', setup['dataset'], f'{slug}-seed{seed}-{digest}')
    given = {'method': '', 'seed': seed, 'dataset': setup['dataset'], **switches, **setup['extra'], 'out_dir': folder}
    return {
        'name': f'{" ".join(words)} seed {seed}',
        'folder': folder,
        'seed': seed,
        'rounds': 0 if switches['method'] == 'pretrained' else setup['rounds'],
        'args': [setup['config'], *(f'--{k}={v}' for k, v in given.items())],
    }


def finished(run: dict) -> bool:
    return (run['folder'] / 'summary.json').exists()


def plan(row: dict, setup: dict) -> dict:
    """'runs': the row's runs, one per seed; 'all': what it takes; 'unknown': runs that wait for a choice; 'valid': the choice.

    HetLoRA tries every coefficient on the first seed; the best on validation text is the row's, on all seeds."""
    switches, seeds, tried, valid = row['switches'], row['seeds'], [], {}
    if switches['method'] == 'hetlora':
        coefs = {c: run_of({**switches, 'prune_coef': c}, seeds[0], setup) for c in PRUNE_COEFS}
        tried = [*coefs.values()]
        if not all(map(finished, tried)):
            return {'runs': [], 'all': tried, 'unknown': len(seeds) - 1, 'valid': {}}
        valid = {c: read_json(run['folder'] / 'summary.json')['mean_valid_ppl'] for c, run in coefs.items()}
        switches = {**switches, 'prune_coef': min(valid, key=valid.get)}
    runs = [run_of(switches, seed, setup) for seed in seeds]
    return {'runs': runs, 'all': tried + runs, 'unknown': 0, 'valid': valid}


def planned(rows: list[dict], setup: dict) -> tuple[list[dict], int]:
    """All runs that are known, each once, the first seed's first; and how many more there will be."""
    plans = [plan(row, setup) for row in rows]
    runs = {run['folder']: run for p in plans for run in p['all']}
    return sorted(runs.values(), key=lambda run: setup['seeds'].index(run['seed'])), sum(p['unknown'] for p in plans)


def rounds_done(run: dict) -> int:
    """Finished rounds of an unfinished run: all before the one that the last line of its metrics names."""
    try:
        with open(run['folder'] / 'metrics.jsonl', 'rb') as f:
            f.seek(-min(1 << 16, f.seek(0, os.SEEK_END)), os.SEEK_END)
            return max(0, int(re.findall(rb'"round": (\d+)', f.read())[-1]) - 1)
    except (OSError, IndexError):
        return 0


# ---- the sweep -----------------------------------------------------------------------------------------------------
def machine_of(jobs: int, device: str) -> tuple[int, int, list[str], str]:
    """Runs side by side, threads of each, the GPUs to deal out, and all this in words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    automatic, gpus, gpu = min(cores, 8), [], ''
    if device != 'cpu':
        import torch

        n = torch.cuda.device_count() if device in ('auto', 'cuda') else 0
        gpus = (os.environ.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(n)))).split(',')[:n]
        automatic = len(gpus) or (1 if device != 'auto' or torch.backends.mps.is_available() else automatic)
    if gpus:  # asked elsewhere: this process should hold no memory of a GPU
        gpu = subprocess.run(
            [sys.executable, '-c', 'import torch; print(",", torch.cuda.get_device_name(), end="")'],
            capture_output=True,
            text=True,
        ).stdout
    jobs = jobs or automatic
    threads = max(1, cores // jobs)
    words = f'{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs{gpu}, OMP_NUM_THREADS={threads}'
    return jobs, threads, gpus, words


def start(run: dict, slot: int, machine: tuple, lock: int) -> dict:
    folder, (_, threads, gpus, words) = run['folder'], machine
    folder.mkdir(parents=True, exist_ok=True)
    begun, rounds = folder / 'config.json', [*folder.glob('checkpoint/round-*.safetensors')]
    again = '--resume' if rounds else '--overwrite' if begun.exists() else None
    env = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'PYTHONUNBUFFERED': '1'}
    if gpus:
        env['CUDA_VISIBLE_DEVICES'] = gpus[slot % len(gpus)]
    (folder / 'machine.txt').write_text(words)
    with open(folder / 'log.txt', 'a') as log:
        begin = log.tell()
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), *run['args'], *filter(None, [again])],
            env=env,
            stdout=log,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
        )
    return {**run, 'process': process, 'begin': begin}


def fail(run: dict) -> None:
    """One line, and the end."""
    status, log = run['process'].returncode, run['folder'] / 'log.txt'
    lines = [line.strip() for line in log.read_bytes()[run['begin'] :].decode(errors='replace').splitlines() if line.strip()]
    last = lines[-1] if lines else 'it wrote nothing'
    if status == 2:  # refused by train.py, which has said why
        die(f'{run["name"]}: {last}')
    how = f'was killed by signal {-status}' if status < 0 else f'failed with exit status {status}'
    sys.exit(f'{Path(sys.argv[0]).name}: {run["name"]} {how}: {last} ({log})')


def sweep(rows: list[dict], setup: dict, jobs: int, title: str) -> None:
    """Runs whatever is missing, several at a time."""
    runs, unknown = planned(rows, setup)
    todo = [run for run in runs if not finished(run)]
    if not todo:
        return
    home = Path('out', 'reproduce', setup['dataset'])
    home.mkdir(parents=True, exist_ok=True)
    lock = open(home / '.lock', 'w')  # the runs inherit it: it is free when the last one has ended
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        die(f'another sweep of {setup["dataset"]}, or a run that it left behind, is at work in {home}: wait for it')
    machine = machine_of(jobs, setup['extra'].get('device', 'auto'))
    terminated = signal.signal(signal.SIGTERM, signal.default_int_handler)  # to be told is to be interrupted
    running, done, ended = {}, 0, 0
    bar = tqdm(total=1, initial=sum(map(rounds_done, todo)), desc=title, unit='round', disable=None, smoothing=0.05)
    try:
        while todo or running:
            for slot in sorted(set(range(machine[0])) - set(running))[: len(todo)]:
                running[slot] = start(todo.pop(0), slot, machine, lock.fileno())
            time.sleep(0.5)
            for slot, run in [*running.items()]:
                if run['process'].poll() is None:
                    continue
                if run['process'].returncode or not finished(run):
                    bar.close()
                    fail(run)
                del running[slot]
                done, ended = done + run['rounds'], ended + 1
                runs, unknown = planned(rows, setup)  # HetLoRA's choice may be known now
                busy = [other['folder'] for other in running.values()]
                todo = [r for r in runs if not finished(r) and r['folder'] not in busy]
                if bar.disable:
                    result, total = read_json(run['folder'] / 'summary.json'), ended + len(busy) + len(todo) + unknown
                    print(
                        f'[{ended}/{total}] {run["name"]}: test perplexity {result["mean_test_ppl"]:.3f}, '
                        f'{result["seconds"]:.0f} s',
                        flush=True,
                    )
            left = [*running.values(), *todo]
            bar.total = done + sum(run['rounds'] for run in left) + unknown * setup['rounds']
            bar.n = done + sum(map(rounds_done, left))
            bar.set_postfix_str(f'{len(left) + unknown} runs left: ' + ', '.join(run['name'] for run in running.values()))
    finally:
        bar.close()
        for run in running.values():
            run['process'].terminate()
        for run in running.values():  # what wrote nothing but its refusal leaves no folder
            if run['process'].wait() in (2, -signal.SIGTERM, -signal.SIGINT) and not (run['folder'] / 'config.json').exists():
                shutil.rmtree(run['folder'])
        lock.close()
        signal.signal(signal.SIGTERM, terminated)


# ---- the tables ----------------------------------------------------------------------------------------------------
def record(row: dict, setup: dict) -> dict:
    """Everything that is known of a row whose runs are finished."""
    p = plan(row, setup)
    seeds = [
        {'seed': run['seed'], 'folder': str(run['folder']), **read_json(run['folder'] / 'summary.json')} for run in p['runs']
    ]
    ppl, paper = [s['mean_test_ppl'] for s in seeds], row['paper'][0]
    kB = {
        key: float(np.mean([s[key] / max(1, s['rounds'] * len(s['users'])) / 1000 for s in seeds]))
        for key in ('bytes_up', 'bytes_down')
    }
    comparable = paper is not None and setup['meta']['tokenizer'] == 'gpt2'  # other tokens have other perplexities
    return {
        'label': row['label'] + (f', prune_coef {min(p["valid"], key=p["valid"].get)}' if p['valid'] else ''),
        'switches': row['switches'],
        'mean': float(np.mean(ppl)),
        'std': float(np.std(ppl, ddof=1)) if ppl[1:] else None,
        'paper_mean': paper,
        'paper_std': row['paper'][1],
        'difference': np.mean(ppl) - paper if comparable else None,
        'users': dict(zip(seeds[0]['users'], np.mean([s['test_ppl'] for s in seeds], 0).tolist())),
        'seconds': float(np.mean([s['seconds'] for s in seeds])),
        'kB_up': kB['bytes_up'],
        'kB_down': kB['bytes_down'],
        'trainable_params': seeds[0]['trainable_params'],
        'valid_ppl_by_prune_coef': p['valid'],
        'seeds': seeds,
    }


def plus_minus(mean: float | None, std: float | None, digits: int, alone: str = '') -> str:
    return '-' if mean is None else f'{mean:.{digits}f}' + (alone if std is None else f' ± {std:.{digits}f}')


def cells(table: str, records: list[dict]) -> tuple[list, list[list]]:
    """Header and lines, all text; Figure 9 is a grid."""
    if table == 'fig9':
        found = iter(plus_minus(r['mean'], r['std'], 3) for r in records)
        return ['router_every, router_steps:', '1', '5', '10', '20'], [
            [tau, *(next(found) for _ in range(4))] for tau in ('10', '30', '50', '100')
        ]
    header = ['row', 'test ppl', 'paper', 'difference', *records[0]['users'], 'seconds', 'kB up', 'kB down', 'trainable']
    return header, [
        [
            r['label'],
            plus_minus(r['mean'], r['std'], 3, ' ± -'),
            plus_minus(r['paper_mean'], r['paper_std'], 2)
            + (' †' if r['paper_mean'] and r['switches']['method'] == 'flexlora' else ''),
            '-' if r['difference'] is None else f'{r["difference"]:+.2f}',
            *(f'{u:.3f}' for u in r['users'].values()),
            f'{r["seconds"]:.0f}',
            f'{r["kB_up"]:,.1f}',
            f'{r["kB_down"]:,.1f}',
            ' to '.join(f'{n:,}' for n in sorted({min(r['trainable_params']), max(r['trainable_params'])})),
        ]
        for r in records
    ]


def departures(table: str, config: dict, setup: dict) -> str:
    """The end of a title: in what the runs differ from the paper's."""
    base, rounds = Path(config['init_from']), 50 if setup['name'] == 'slimpajama' else 20
    base, b, T = base.name if base.is_absolute() else str(base), config['batch_size'], config['block_size']
    ours = {
        'rounds': config['rounds'],
        'local steps': config['local_steps'],
        'batch': f'{b} x {T} tokens',
        'base': base,
        'tokenizer': setup['meta']['tokenizer'],
        'seeds': len(setup['seeds']),
    }
    paper = {'rounds': rounds, 'local steps': 10, 'batch': '64 x 128 tokens', 'base': 'gpt2', 'tokenizer': 'gpt2', 'seeds': 3}
    if not table.startswith('table'):
        del ours['seeds']  # how many the paper took is known of its tables only
    parts = [f'{k} {v} (paper: {paper[k]})' for k, v in ours.items() if v != paper[k]]
    parts += [
        f'{k} {v}'
        for k, v in setup['extra'].items()
        if k
        not in (
            'rounds',
            'local_steps',
            'batch_size',
            'block_size',
            'init_from',
            'device',
            'dtype',
            'micro_batch_size',
            'eval_every',
        )
    ]
    smaller = config['rounds'] * config['local_steps'] * b * T < rounds * 10 * 64 * 128 or not base.startswith('gpt2')
    return ', not a data set of the paper' * (setup['name'] not in SETS) + (
        f', {"scaled down" if smaller else "changed"}: {", ".join(parts)}' if parts else ''
    )


def write(table: str, rows: list[dict], setup: dict, command: str) -> str:
    """results/TABLE-DATASET.md and .json, of a figure .png and .svg too; returns the text for the terminal."""
    from eval import table as text_table

    file = Path('results', f'{table}-{setup["dataset"]}.md')
    if table == 'fig2':  # drawn from meta.json alone
        return 'wrote ' + ' and '.join(map(str, plot.draw(table, [setup['dataset']], file)))
    records = [record(row, setup) for row in rows]
    folders = [Path(s['folder']) for r in records for s in r['seeds']]
    configs = [read_json(folder / 'config.json') for folder in folders]
    title = f'{TITLES[table]} on {setup["dataset"]}' + departures(table, max(configs, key=lambda c: c['rounds']), setup)
    machines = sorted(
        {
            f'{file.read_text() if file.exists() else "unknown"}, torch {c["versions"]["torch"]}, {c["dtype"]} on {c["device"]}'
            for file, c in zip((folder / 'machine.txt' for folder in folders), configs)
        }
    )
    dates = sorted(time.strftime('%Y-%m-%d', time.localtime((f / 'summary.json').stat().st_mtime)) for f in folders)
    seeds, commits = rows[-1]['seeds'], sorted({c['git_commit'] or 'unknown' for c in configs})
    notes = [
        f'Command: `{command}`',
        f'Seeds: {", ".join(map(str, seeds))}. Commit: {", ".join(commits)}. '
        f'Machine: {"; ".join(machines)}. Finished: {" to ".join(sorted({dates[0], dates[-1]}))}.',
        f'Tokens ({setup["meta"]["tokenizer"]}) to train / validate / test: '
        + '; '.join(
            f'{u["name"]} ' + ' / '.join(f'{u["tokens"][s]:,}' for s in ('train', 'valid', 'test'))
            for u in setup['meta']['users']
        )
        + '.',
        'Test perplexity of the last round, after local steps and before aggregation: mean over users, then mean ± sample '
        'standard deviation over seeds; kB up and down per user and round; trainable parameters per user.',
    ]
    notes += [
        f'{r["label"]}: validation perplexity on seed {seeds[0]} with prune_coef '
        + ', '.join(f'{c}: {ppl:.3f}' for c, ppl in r['valid_ppl_by_prune_coef'].items())
        + '.'
        for r in records
        if r['valid_ppl_by_prune_coef']
    ]
    if table == 'table1' and setup['name'] in SETS:
        notes.append("Centralized: the paper's is exp of the mean loss on pooled text, lower than this mean of perplexities.")
    if table == 'table2' and setup['name'] in SETS:
        notes.append("† Not a target: a bug in the released code's FlexLoRA keeps the update of the last user only.")
    header, lines = cells(table, records)
    file.parent.mkdir(exist_ok=True)
    if table in plot.PICTURES:
        notes.append(f'![{title}]({plot.draw(table, folders, file)[0].name})')
    grid = [f'| {" | ".join(line)} |' for line in (header, ['---'] + ['---:'] * (len(header) - 1), *lines)]
    file.write_text('\n\n'.join([f'# {title}', *notes, '\n'.join(grid)]) + '\n', encoding='utf-8')
    facts = {'title': title, 'table': table, 'dataset': setup['dataset'], 'command': command, 'notes': notes, 'rows': records}
    file.with_suffix('.json').write_text(json.dumps(facts, indent=1), encoding='utf-8')
    return f'\n{title}\n\n{text_table(header, lines)}\n\nwrote {file} and .json' + ', .png, .svg' * (table in plot.PICTURES)


# ---- the command line ------------------------------------------------------------------------------------------------
def passed_through(args: list[str], rows: list[dict]) -> dict:
    """--name=value for train.py. What tells the rows apart cannot be set for all of them."""
    extra, taken = {}, {'prune_coef', *(k for row in rows for k in row['switches'])}
    for arg in args:
        found = re.fullmatch(r'--([a-z]\w*)(?:=(.*))?', arg, re.S) or die(f'{arg!r} is no switch: give --name=value')
        if found[1] in ('seed', 'out_dir', 'resume', 'overwrite', 'list_methods'):
            die(f'--{found[1]} cannot be passed on: the sweep sets it for every run (and --seeds=42,45 the seeds)')
        if found[1] in taken:
            die(f'--{found[1]} cannot be passed on: rows of these tables differ in it')
        extra[found[1]] = 'True' if found[2] is None else found[2]
    return extra


def setup_of(dataset: str, seeds: list[int], extra: dict) -> dict:
    """What all runs of a sweep have in common; 'identity': what the files say that shape their numbers."""
    name, _, variant = dataset.partition('-')
    config, meta = Path('config', f'{name}.py'), Path('data', dataset, 'meta.json')
    prepare = (
        f'python data/prepare.py {name}'
        + ' --tokenizer=bytes' * (variant == 'bytes')
        + (f' --name={dataset}' if variant else '')
    )
    if '/' in dataset or not config.exists():
        die(f'--dataset={dataset}: there is no {config}; data comes from {prepare}')
    if not meta.exists():
        die(f'--dataset={dataset}: there is no {meta}; run {prepare}')
    defaults, meta = read_file(str(config)), read_json(meta)
    base = Path(extra.get('init_from', defaults.get('init_from', 'gpt2')))
    rounds = parse('rounds', str(extra.get('rounds', defaults.get('rounds'))))
    return {
        'name': name,
        'dataset': dataset,
        'config': str(config),
        'meta': meta,
        'extra': extra,
        'seeds': seeds,
        'rounds': rounds if isinstance(rounds, int) else 0,  # train.py refuses what is no number
        'identity': [
            config.read_text(),
            meta['users'],
            hashlib.sha256(base.read_bytes()).hexdigest() if base.is_file() else str(base),
        ],
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = die
    parser.add_argument('tables', help=f'{", ".join(TITLES)}, several with commas, or all')
    parser.add_argument('--dataset', default='demo', help='NAME or NAME-VARIANT: config/NAME.py on data/NAME-VARIANT')
    parser.add_argument('--seeds', help='default: 42,45,47, of which figures take the first')
    parser.add_argument('--jobs', default='0', help='runs side by side; 0: one per GPU, else one per core, at most 8')
    parser.add_argument('--dry_run', action='store_true', help='only list the runs')
    args, rest = parser.parse_known_args(argv)
    tables = [*TITLES] if args.tables == 'all' else [*dict.fromkeys(args.tables.split(','))]
    for table in tables:
        if table not in TITLES:
            die(f'unknown table {table!r}; known: {", ".join(TITLES)}, all')
    seeds = (args.seeds or '42,45,47').split(',')
    if not all(re.fullmatch(r'[0-9]+', s) for s in seeds) or len({*map(int, seeds)}) < len(seeds):
        die(f'--seeds={args.seeds}: expected different whole numbers, such as 42,45,47')
    if not re.fullmatch(r'[0-9]+', args.jobs):
        die(f'--jobs={args.jobs}: expected a whole number; 0 is automatic')
    seeds, name = [*map(int, seeds)], args.dataset.partition('-')[0]
    first = seeds if args.seeds else seeds[:1]
    rows = {table: rows_of(table, name, first if table.startswith('fig') else seeds) for table in tables}
    every = sum(rows.values(), [])
    extra = passed_through(rest, every)
    if {*tables} & {*CURVES}:
        extra.setdefault('eval_every', '2')
    setup = setup_of(args.dataset, seeds, extra)
    if args.dry_run:
        runs, unknown = planned(every, setup)
        for run in runs:
            print(
                'finished' if finished(run) else 'begun   ' if (run['folder'] / 'checkpoint').exists() else 'to do   ',
                run['folder'],
            )
        left = sum(not finished(run) for run in runs)
        more = f', then {unknown} of HetLoRA with the prune_coef that validation text chooses' if unknown else ''
        return print(f'{len(runs) - left} finished, {left} to do{more}')
    try:
        sweep(every, setup, int(args.jobs), f'{args.tables} on {args.dataset}')
    except KeyboardInterrupt:
        print('reproduce.py: interrupted; the same command continues where it stopped', file=sys.stderr)
        sys.exit(130)
    for table in tables:
        print(write(table, rows[table], setup, shlex.join(['python', 'reproduce.py', *argv])))


if __name__ == '__main__':
    main(sys.argv[1:])
