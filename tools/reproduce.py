"""The paper's tables and figures: runs what is missing, then writes results/TABLE-DATASET.md and .json, and draws the figures.

    python tools/reproduce.py table1 --dataset=demo                             # 11 rows: twenty minutes on two cores
    python tools/reproduce.py table1,table4 --dataset=agnews --seeds=42         # tables share the runs they have in common
    python tools/reproduce.py table2 --dataset=slimpajama                       # experts, or ranks, that differ between users
    python tools/reproduce.py table5 --dataset=multilingual --dry_run           # which runs it takes, which are finished
    python tools/reproduce.py fig3,fig4 --dataset=demo                          # perplexity and routing over training
    python tools/reproduce.py fig6,fig7,fig8 --dataset=multilingual             # 2, 4, 8 experts; fig10 to fig12: slimpajama
    python tools/reproduce.py fig9 --dataset=demo                               # router_every x router_steps
    python tools/reproduce.py related --dataset=demo --seeds=42                 # systems and choices beyond the paper's tables
    python tools/reproduce.py all --dataset=agnews-bytes --init_from=assets/base-tiny.safetensors --rounds=5 --batch_size=4

A table has mean and standard deviation over seeds beside the paper's value, every user, seconds, bytes and parameters. Its
title says in what it differs from the paper's setting. Tables take seeds 42, 45, 47, figures the first of them.
--dataset=agnews-bytes is config/agnews.py on data/agnews-bytes. Any other --name=value goes to train.py in every run; if curves
over training are asked for, that is --eval_every=2 unless given.

A run is the folder out/reproduce/DATASET/ROW-seedS-HASH, found by the hash of all that shapes its numbers. A finished one is
never repeated. An interrupted sweep continues: give the same command again. A run that fails is named with its last line, and
the others go on. HetLoRA tries the paper's three penalties on the first seed; validation perplexity chooses."""

import hashlib
import json
import os
import platform
import queue
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import configure, die, folder_of, mean, parser, read_config, read_json, table
from tools import plot

TRAIN = Path(__file__).resolve().parent.parent / 'train.py'
TITLES = {f'table{i}': f'Table {i}' for i in (1, 2, 4, 5)} | {'related': 'Related systems and ablations'}
TITLES |= {f'fig{i}': f'Figure {i}' for i in (2, 3, 4, 6, 7, 8, 9, 10, 11, 12)}
RESULT = 'mean_valid_ppl users rounds bytes_up bytes_down trainable_params'.split()  # of summary.json
CURVES = ('fig3', 'fig4', 'fig6', 'fig7', 'fig8', 'fig10', 'fig11', 'fig12')  # drawn over training: evaluated every 2 rounds
SEEDS = '42,45,47'  # the paper's
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
    'slimpajama': (('2,4,4,2', '22.10', '23.15'), ('4,2,2,4', '22.28', '23.17'))}  # and for any other data set
HETERO = {'agnews': 1}
ROWS['fig3'] = [row for row in ROWS['table1'] if row[1].split()[0] != 'pretrained' and ' ' not in row[1]]
ROWS['fig4'] = COMIGS[2:]
for figures, settings in (('fig6 fig10', '2,2,2,2 2,2,4,4 2,2,8,8'),           # more experts for users 2, 3, with more text
                          ('fig7 fig11', '2,2,2,2 4,4,2,2 8,8,2,2'),           # for users 0, 1, with less
                          ('fig8 fig12', '1,1,1,1 1,1,2,2 1,1,4,4 1,1,8,8')):  # users 0, 1 have the generalist alone
    for figure in figures.split():
        ROWS[figure] = [(f'CoMiGS-1GXS {n}', f'comigs_1gxs n_experts={n}', '-') for n in settings.split()]
# fmt: on


def rows_of(which: str, name: str, seeds: list[int]) -> list[dict]:
    """The rows of a table on the data set `name`: label, switches (method first), paper (mean, standard deviation), seeds."""
    settings, rows = N_EXPERTS.get(name, N_EXPERTS['slimpajama']), [*ROWS.get(which, [])]
    if which == 'table2':  # one LoRA as large as all of a user's experts, or as the two that a token runs: rank 16, the default
        for n, ours, hetlora in settings:
            ranks = ','.join(str(8 * int(n_user)) for n_user in n.split(','))
            rows.append((f'CoMiGS-1GXS {n}', f'comigs_1gxs n_experts={n}', ours))
            rows.append((f'HetLoRA, ranks 8 x {n}', f'hetlora lora_rank={ranks}', hetlora))
            rows.append((f'FlexLoRA, ranks 8 x {n}', f'flexlora lora_rank={ranks}', '-'))
        rows.append(('HetLoRA, ranks 16', 'hetlora', '31.58/57.76/23.33'))
        rows.append(('FlexLoRA, ranks 16', 'flexlora', '36.45/77.65/22.97'))
    if which == 'table5':
        n, ours, _ = settings[HETERO.get(name, 0)]
        each = [('CoMiGS-1G1S', 'comigs_1g1s', ('33.69/-/-', '33.53/-/-', COMIGS[2][2]))]
        each += [(f'CoMiGS-1GXS {n}', f'comigs_1gxs n_experts={n}', ('-', '-', ours))]
        for label, text, papers in each:
            rows.append((f'{label}, load balancing none', f'{text} load_balance=none', papers[0]))
            rows.append((f'{label}, load balancing uniform', f'{text} load_balance=uniform', papers[1]))
            rows.append((f'{label}, load balancing generalist', text, papers[2]))
    return [
        {
            'label': label,
            'switches': {'method': text.split()[0], **dict(sorted(switch.split('=') for switch in text.split()[1:]))},
            'paper': paper_value(paper, name),
            'seeds': seeds[:1] if text == 'pretrained' else seeds,  # no seed in the base
        }
        for label, text, paper in rows
    ]


def paper_value(text: str, name: str) -> tuple[float | None, float | None]:
    """'31.60(.14)/57.83(.13)/23.42(.07)': (mean, standard deviation) on data set `name`."""
    cells = text.split('/') if '/' in text else [text] * len(SETS)
    found = re.fullmatch(r'([\d.]+)(?:\(([\d.]+)\))?', dict(zip(SETS, cells)).get(name, '-'))
    return tuple(x and float(x) for x in found.groups()) if found else (None, None)


# ---- runs: folders, found by what shapes their numbers --------------------------------------------------------------
def run_of(switches: dict, seed: int, setup: dict) -> dict:
    """A run's name, folder, seed, arguments of train.py and rounds. Dies of switches that train.py would refuse."""
    shaping = {k: v for k, v in setup['extra'].items() if k != 'quiet'}
    identity = json.dumps([switches, seed, shaping, setup['identity']], sort_keys=True)
    words = [switches['method'], *(f'{k}={v}' for k, v in switches.items() if k != 'method')]
    slug = '-'.join(words).replace('=', '').replace(',', '_')
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    folder = Path('out', 'reproduce', setup['dataset'], f'{slug}-seed{seed}-{digest}')
    given = {'method': '', 'seed': seed, 'dataset': setup['dataset'], **switches, **setup['extra'], 'out_dir': folder}
    args = [setup['config'], *(f'--{k}={v}' for k, v in given.items())]
    rounds = 0 if switches['method'] == 'pretrained' else configure(args).rounds
    return {'name': f'{" ".join(words)} seed {seed}', 'folder': folder, 'seed': seed, 'args': args, 'rounds': rounds}


def finished(run: dict) -> bool:
    return (run['folder'] / 'summary.json').exists()


def rounds_done(run: dict) -> int | None:
    """The round that --resume continues from; None before there is one."""
    rounds = [int(file.stem.removeprefix('round-')) for file in run['folder'].glob('checkpoint/round-*.safetensors')]
    return max(rounds, default=None)


def summary(run: dict, *keys: str) -> dict:
    return read_json(run['folder'] / 'summary.json', 'mean_test_ppl', 'seconds', *keys)


def tried(row: dict, setup: dict) -> dict:
    """{prune_coef: run} of HetLoRA: every coefficient, on the first seed. {} of any other row."""
    coefs = PRUNE_COEFS if row['switches']['method'] == 'hetlora' else ()
    return {coef: run_of({**row['switches'], 'prune_coef': coef}, row['seeds'][0], setup) for coef in coefs}


def runs_of(row: dict, setup: dict) -> tuple[list[dict], dict]:
    """(a row's runs, one per seed; {prune_coef: validation perplexity} of those tried, of which the runs have the best)."""
    valid = {coef: summary(run, 'mean_valid_ppl')['mean_valid_ppl'] for coef, run in tried(row, setup).items()}
    best = {'prune_coef': min(valid, key=valid.get)} if valid else {}
    return [run_of({**row['switches'], **best}, seed, setup) for seed in row['seeds']], valid


def first_pass(rows: list[dict], setup: dict) -> list[dict]:
    """All runs that do not wait for a choice of HetLoRA's."""
    return [run for row in rows for run in [*tried(row, setup).values()] or runs_of(row, setup)[0]]


def second_pass(rows: list[dict], setup: dict) -> list[dict]:
    """All runs of the rows that wait for nothing any more."""
    return [run for row in rows if all(map(finished, tried(row, setup).values())) for run in runs_of(row, setup)[0]]


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
        ask = [sys.executable, '-c', 'import torch; print(",", torch.cuda.get_device_name(), end="")']
        gpu = subprocess.run(ask, capture_output=True, encoding='utf-8').stdout
    jobs = jobs or automatic
    threads = max(1, cores // jobs)
    words = f'{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs{gpu}, OMP_NUM_THREADS={threads}'
    return jobs, threads, gpus, words


def locked(dataset: str) -> BinaryIO:
    """The lock of a data set's runs, which they inherit: it is free when the last one has ended."""
    from run.checkpoint import lock  # and with it torch: not for --help

    file = Path('out', 'reproduce', dataset, '.lock')
    file.parent.mkdir(parents=True, exist_ok=True)
    if not (held := lock(file)):
        die(f'another sweep of {dataset}, or a run that it left behind, is at work in {file.parent}: wait for it')
    return held


def start(run: dict, gpu: str, threads: int, words: str, lock: int) -> subprocess.Popen:
    """train.py, from where the run stopped, on this GPU ('': whatever there is)."""
    run['folder'].mkdir(parents=True, exist_ok=True)
    (run['folder'] / 'machine.txt').write_text(words, encoding='utf-8')
    command = [sys.executable, str(TRAIN), *run['args'], '--overwrite' if rounds_done(run) is None else '--resume']
    env = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'PYTHONUNBUFFERED': '1'}
    if gpu:
        env['CUDA_VISIBLE_DEVICES'] = gpu
    with open(run['folder'] / 'log.txt', 'a', encoding='utf-8') as log:
        streams = {'stdin': subprocess.DEVNULL, 'stdout': log, 'stderr': subprocess.STDOUT}
        return subprocess.Popen(command, env=env, pass_fds=[lock] if os.name == 'posix' else (), **streams)


def ending(run: dict, status: int) -> str:
    """How a run has ended, in a line: its result, or what it said last."""
    if not status and finished(run):
        result = summary(run)
        return f'{run["name"]}: test perplexity {result["mean_test_ppl"]:.3f}, {result["seconds"]:.0f} s'
    log = run['folder'] / 'log.txt'
    last = (log.read_text(encoding='utf-8', errors='replace').strip() or 'it wrote nothing').splitlines()[-1]
    how = f'was killed by signal {-status}' if status < 0 else f'failed with exit status {status}'
    return f'{run["name"]} {how}: {last} ({log})'


def terminate(futures: list[Future], running: dict[str, subprocess.Popen]) -> None:
    """Ends the processes of these runs; one of them may be about to start."""
    while not all(future.done() for future in futures):
        for name in [*running]:
            running.pop(name).terminate()
        time.sleep(0.05)


def sweep(runs: list[dict], setup: dict, jobs: int, title: str) -> None:
    """Trains what is missing, several runs side by side, the first seed's first. If one fails, the command ends after the
    others; if train.py refuses one, at once."""
    missing = {run['folder']: run for run in runs if not finished(run)}
    todo = sorted(missing.values(), key=lambda run: setup['seeds'].index(run['seed']))
    if not todo:
        return
    jobs, threads, gpus, words = machine_of(jobs, setup['extra'].get('device', 'auto'))
    free, running, ended, failed, refused = queue.SimpleQueue(), {}, 0, 0, []
    for slot in range(jobs):
        free.put(gpus[slot % len(gpus)] if gpus else '')

    def train(run: dict) -> tuple[dict, int]:
        gpu, status = free.get(), 2
        try:
            if not refused:  # else no other one begins
                running[run['name']] = process = start(run, gpu, threads, words, lock.fileno())
                status = process.wait()
                if status == 2:  # by train.py, which has said why
                    refused.append(run)
            return run, status
        finally:
            running.pop(run['name'], None)
            free.put(gpu)

    total, begun = sum(run['rounds'] for run in todo), sum(rounds_done(run) or 0 for run in todo)
    shown = {'total': total, 'initial': begun, 'desc': title, 'unit': 'round', 'disable': None, 'smoothing': 0.05}
    with locked(setup['dataset']) as lock, tqdm(**shown) as bar:
        pool = ThreadPoolExecutor(jobs)
        futures = left = [pool.submit(train, run) for run in todo]
        try:
            while left:
                done, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.n = sum(rounds_done(run) or 0 for run in todo)
                bar.set_postfix_str(f'{len(left)} runs left: {", ".join([*running])}')
                for run, status in [future.result() for future in futures if future in done]:  # in the order of their beginning
                    ended += 1
                    if status == 2:
                        die(ending(refused[0], status))
                    fine = not status and finished(run)
                    failed += not fine
                    if not fine or bar.disable:
                        bar.clear()
                        text = f'[{ended}/{len(todo)}] {ending(run, status)}'
                        print(text, file=sys.stdout if fine else sys.stderr, flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            terminate(futures, running)
    if failed:
        sys.exit(f'reproduce.py: {failed} of {len(todo)} runs failed; the same command tries them again')


# ---- the tables ----------------------------------------------------------------------------------------------------
def record(row: dict, setup: dict) -> dict:
    """Everything that is known of a row whose runs are finished."""
    runs, valid = runs_of(row, setup)
    seeds = [{'seed': run['seed'], 'folder': str(run['folder']), **summary(run, *RESULT)} for run in runs]
    ppl, (paper, paper_std) = [s['mean_test_ppl'] for s in seeds], row['paper']
    comparable = paper is not None and setup['meta']['tokenizer'] == 'gpt2'  # other tokens have other perplexities
    user_rounds = [max(1, s['rounds'] * len(s['users'])) for s in seeds]
    return {
        'label': row['label'] + (f', prune_coef {min(valid, key=valid.get)}' if valid else ''),
        'switches': row['switches'],
        'mean': mean(ppl),
        'std': float(np.std(ppl, ddof=1)) if ppl[1:] else None,
        'paper_mean': paper,
        'paper_std': paper_std,
        'difference': mean(ppl) - paper if comparable else None,
        'users': dict(zip(seeds[0]['users'], np.mean([s['test_ppl'] for s in seeds], 0).tolist())),
        'seconds': mean([s['seconds'] for s in seeds]),
        'kB_up': mean([s['bytes_up'] / n / 1000 for s, n in zip(seeds, user_rounds)]),
        'kB_down': mean([s['bytes_down'] / n / 1000 for s, n in zip(seeds, user_rounds)]),
        'trainable_params': seeds[0]['trainable_params'],
        'valid_ppl_by_prune_coef': valid,
        'seeds': seeds,
    }


def plus_minus(mean: float | None, std: float | None, digits: int, alone: str = '') -> str:
    return '-' if mean is None else f'{mean:.{digits}f}' + (alone if std is None else f' ± {std:.{digits}f}')


def line_of(r: dict) -> list[str]:
    """A record as a line of a table."""
    paper = plus_minus(r['paper_mean'], r['paper_std'], 2)
    params = sorted({min(r['trainable_params']), max(r['trainable_params'])})
    return [
        r['label'],
        plus_minus(r['mean'], r['std'], 3, ' ± -'),
        paper + ' †' * (paper != '-' and r['switches']['method'] == 'flexlora'),
        '-' if r['difference'] is None else f'{r["difference"]:+.2f}',
        *(f'{ppl:.3f}' for ppl in r['users'].values()),
        f'{r["seconds"]:.0f}',
        f'{r["kB_up"]:,.1f}',
        f'{r["kB_down"]:,.1f}',
        ' to '.join(f'{n:,}' for n in params),
    ]


def cells(which: str, records: list[dict]) -> tuple[list, list[list]]:
    """Header and lines, all text; Figure 9 is a grid."""
    if which == 'fig9':
        found = [plus_minus(r['mean'], r['std'], 3) for r in records]
        lines = [[tau, *found[4 * i : 4 * i + 4]] for i, tau in enumerate(('10', '30', '50', '100'))]
        return ['router_every, router_steps:', '1', '5', '10', '20'], lines
    header = ['row', 'test ppl', 'paper', 'difference', *records[0]['users'], 'seconds', 'kB up', 'kB down', 'trainable']
    return header, [*map(line_of, records)]


def departures(which: str, c: dict, setup: dict) -> str:
    """The end of a title: in what the runs differ from the paper's. c: the configuration of one."""
    rounds, base = 50 if setup['name'] == 'slimpajama' else 20, c['init_from']
    base = Path(base).name if Path(base).is_absolute() else base
    compared = (
        ('rounds', c['rounds'], rounds),
        ('local steps', c['local_steps'], 10),
        ('batch', f'{c["batch_size"]} x {c["block_size"]} tokens', '64 x 128 tokens'),
        ('base', base, 'gpt2'),
        ('tokenizer', setup['meta']['tokenizer'], 'gpt2'),
        ('seeds', len(setup['seeds']), 3 if which.startswith('table') else len(setup['seeds'])),  # of figures, it is not known
    )
    parts = [f'{name} {ours} (paper: {paper})' for name, ours, paper in compared if ours != paper]
    said = 'rounds local_steps batch_size block_size init_from device dtype micro_batch_size eval_every'.split()  # or harmless
    parts += [f'{name} {value}' for name, value in setup['extra'].items() if name not in said]
    tokens = c['rounds'] * c['local_steps'] * c['batch_size'] * c['block_size']
    how = 'scaled down' if tokens < rounds * 10 * 64 * 128 or not base.startswith('gpt2') else 'changed'
    return ', not a data set of the paper' * (setup['name'] not in SETS) + (f', {how}: {", ".join(parts)}' if parts else '')


def notes_of(which: str, records: list[dict], configs: dict, setup: dict, command: str) -> list[str]:
    """What stands between the title and the lines. configs: {folder of a run: its configuration}."""
    meta, seeds, machines = setup['meta'], [s['seed'] for s in records[-1]['seeds']], set()
    for folder, c in configs.items():
        words = (folder / 'machine.txt').read_text(encoding='utf-8') if (folder / 'machine.txt').exists() else 'unknown'
        machines.add(f'{words}, torch {c["versions"]["torch"]}, {c["dtype"]} on {c["device"]}')
    commits = sorted({c['git_commit'] or 'unknown' for c in configs.values()})
    ends = [(folder / 'summary.json').stat().st_mtime for folder in configs]
    dates = dict.fromkeys(time.strftime('%Y-%m-%d', time.localtime(end)) for end in (min(ends), max(ends)))
    tokens = [(user['name'], *(f'{user["tokens"][split]:,}' for split in ('train', 'valid', 'test'))) for user in meta['users']]
    notes = [
        f'Command: `{command}`',
        f'Seeds: {", ".join(map(str, seeds))}. Commit: {", ".join(commits)}. Machine: {"; ".join(sorted(machines))}. '
        f'Finished: {" to ".join(dates)}.',
        f'Tokens ({meta["tokenizer"]}) to train / validate / test: '
        + '; '.join(f'{name} {train} / {valid} / {test}' for name, train, valid, test in tokens)
        + '.',
        'Test perplexity of the last round, after local steps and before aggregation: mean over users, then mean ± sample '
        'standard deviation over seeds; kB up and down per user and round; trainable parameters per user.',
    ]
    for r in records:
        if r['valid_ppl_by_prune_coef']:
            each = ', '.join(f'{coef}: {ppl:.3f}' for coef, ppl in r['valid_ppl_by_prune_coef'].items())
            notes.append(f'{r["label"]}: validation perplexity on seed {seeds[0]} with prune_coef {each}.')
    if which == 'table1' and setup['name'] in SETS:
        notes.append("Centralized: the paper's is exp of the mean loss on pooled text, lower than this mean of perplexities.")
    if which == 'table2' and setup['name'] in SETS:
        notes.append("† Not a target: a bug in the released code's FlexLoRA keeps the update of the last user only.")
    return notes


def write(which: str, rows: list[dict], setup: dict, command: str) -> str:
    """results/TABLE-DATASET.md and .json, of a figure .png and .svg too; returns the text for the terminal."""
    file = Path('results', f'{which}-{setup["dataset"]}.md')
    if which == 'fig2':  # drawn from meta.json alone
        return 'wrote ' + ' and '.join(map(str, plot.draw(which, [setup['dataset']], file)))
    records = [record(row, setup) for row in rows]
    folders = [Path(s['folder']) for r in records for s in r['seeds']]
    configs = {folder: read_config(folder) for folder in folders}
    title = f'{TITLES[which]} on {setup["dataset"]}'
    title += departures(which, max(configs.values(), key=lambda c: c['rounds']), setup)
    notes, drawn = notes_of(which, records, configs, setup, command), which in plot.PICTURES
    file.parent.mkdir(exist_ok=True)
    if drawn:
        notes.append(f'![{title}]({plot.draw(which, folders, file)[0].name})')
    header, lines = cells(which, records)
    grid = [f'| {" | ".join(line)} |' for line in (header, ['---'] + ['---:'] * (len(header) - 1), *lines)]
    file.write_text('\n\n'.join([f'# {title}', *notes, '\n'.join(grid)]) + '\n', encoding='utf-8')
    facts = {'title': title, 'table': which, 'dataset': setup['dataset'], 'command': command, 'notes': notes, 'rows': records}
    file.with_suffix('.json').write_text(json.dumps(facts, indent=1), encoding='utf-8')
    return f'\n{title}\n\n{table(header, lines)}\n\nwrote {file} and .json' + ', .png, .svg' * drawn


# ---- the command line ------------------------------------------------------------------------------------------------
def passed_through(args: list[str], rows: list[dict]) -> dict:
    """--name=value for train.py. What tells the rows apart cannot be set for all of them."""
    extra, taken = {}, {'prune_coef', *(k for row in rows for k in row['switches'])}
    for arg in args:
        name, equals, value = arg.removeprefix('--').partition('=')
        if not arg.startswith('--'):
            die(f'{arg!r} is no switch: give --name=value')
        if name in ('seed', 'out_dir', 'resume', 'overwrite', 'list_methods') or name in taken:
            die(f'--{name} cannot be passed on: rows or runs of the sweep differ in it (for seeds, give --seeds=42,45)')
        extra[name] = value if equals else 'True'
    return extra


def setup_of(dataset: str, seeds: list[int], extra: dict) -> dict:
    """What all runs of a sweep have in common; 'identity': what the files say that shape their numbers."""
    name, _, variant = dataset.partition('-')
    config, meta = TRAIN.parent / 'config' / f'{name}.py', folder_of(dataset) / 'meta.json'
    tokenizer = ' --tokenizer=bytes' * (variant == 'bytes')
    prepare = f'python data/prepare.py {name}{tokenizer}' + f' --name={dataset}' * bool(variant)
    if '/' in dataset or not config.exists() or not meta.exists():
        die(f'--dataset={dataset}: it needs config/{name}.py and data/{dataset}/meta.json, which comes from {prepare}')
    base = configure([str(config), *(f'--{k}={v}' for k, v in extra.items())]).init_from
    places = (Path(base), TRAIN.parent / base)
    files = [file for path in places for file in (path, path / 'model.safetensors') if file.is_file()]
    base_is = hashlib.sha256(files[0].read_bytes()).hexdigest() if files else base
    setup = {'name': name, 'dataset': dataset, 'config': str(config), 'meta': read_json(meta), 'extra': extra, 'seeds': seeds}
    return {**setup, 'identity': [config.read_text(encoding='utf-8'), setup['meta']['users'], base_is]}


def list_runs(rows: list[dict], setup: dict) -> None:
    runs = {run['folder']: run for run in first_pass(rows, setup) + second_pass(rows, setup)}
    for folder, run in runs.items():
        print('finished' if finished(run) else 'to do   ' if rounds_done(run) is None else 'begun   ', folder)
    done = sum(map(finished, runs.values()))
    waiting = sum(len(row['seeds']) - 1 for row in rows if not all(map(finished, tried(row, setup).values())))
    more = f', then {waiting} of HetLoRA with the prune_coef that validation text chooses' if waiting else ''
    print(f'{done} finished, {len(runs) - done} to do{more}')


def main(argv: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument('tables', help=f'{", ".join(TITLES)}, several with commas, or all')
    options.add_argument('--dataset', default='demo', help='NAME or NAME-VARIANT: config/NAME.py on data/NAME-VARIANT')
    options.add_argument('--seeds', default='', help=f'default: {SEEDS}, of which figures take the first')
    options.add_argument('--jobs', default=0, type=int, help='runs side by side; 0: one per GPU, else one per core, at most 8')
    options.add_argument('--dry_run', action='store_true', help='only list the runs')
    args, rest = options.parse_known_args(argv)
    tables = [*TITLES] if args.tables == 'all' else [*dict.fromkeys(args.tables.split(','))]
    for which in tables:
        if which not in TITLES:
            die(f'unknown table {which!r}; known: {", ".join(TITLES)}, all')
    numbers = (args.seeds or SEEDS).split(',')
    if not all(number.isdecimal() for number in numbers) or len({*map(int, numbers)}) < len(numbers) or args.jobs < 0:
        die(f'--seeds={args.seeds} --jobs={args.jobs}: expected different whole numbers, such as 42,45,47, and a whole number')
    seeds, name = [*map(int, numbers)], args.dataset.partition('-')[0]
    of_figures = seeds if args.seeds else seeds[:1]
    rows = {which: rows_of(which, name, of_figures if which.startswith('fig') else seeds) for which in tables}
    every = sum(rows.values(), [])
    extra = passed_through(rest, every)
    if {*tables} & {*CURVES}:
        extra.setdefault('eval_every', '2')
    setup = setup_of(args.dataset, seeds, extra)
    if args.dry_run:
        return list_runs(every, setup)
    title = f'{args.tables} on {args.dataset}'
    try:
        sweep(first_pass(every, setup), setup, args.jobs, title)
        sweep(second_pass(every, setup), setup, args.jobs, title)
        for which in tables:
            print(write(which, rows[which], setup, shlex.join(['python', 'tools/reproduce.py', *argv])))
    except KeyboardInterrupt:
        print('reproduce.py: interrupted; the same command continues where it stopped', file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError) as error:
        die(error)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to be told is to be interrupted
    main(sys.argv[1:])
