"""Pictures of runs, from their files alone; PNG and SVG side by side, 3.4 inches wide: one column of a paper.

    python plot.py out/a                   # out/a/plot.png, as train.py leaves it, and trust.png where users judged each other
    python plot.py fig3 out/a out/b        # test perplexity of every user over training, mean over runs that differ in the seed
    python plot.py fig4 out/a              # scores of the experts in every layer over training
    python plot.py fig9 out/a out/c        # router_every x router_steps
    python plot.py fig2 demo               # how many tokens the users of data/demo have
    python plot.py trust out/b --out=out/who.png

fig6, fig7, fig8, fig10, fig11 and fig12 are fig3 of other runs: `reproduce.py fig6` makes those and draws them. Without --out,
figures go to out/fig3.png and so on. Read are config.json, metrics.jsonl and summary.json of a run and data/NAME/meta.json."""

import json
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from configurator import die

# Okabe and Ito's colours, told apart by the colour-blind (grey for their yellow, which is none on paper); markers say it again
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#888888', '#000000')
MARKERS, LINES = 'osD^vP*X', ('-', '--', '-.', ':', (0, (5, 1, 1, 1, 1, 1)))
STYLE = {'font.size': 8, 'axes.titlesize': 8, 'axes.labelsize': 8, 'figure.titlesize': 8, 'legend.fontsize': 8}
STYLE |= {'xtick.labelsize': 8, 'ytick.labelsize': 8, 'lines.linewidth': 1.1, 'lines.markersize': 3.5, 'axes.grid': True}
STYLE |= {'grid.color': '#dddddd', 'axes.axisbelow': True, 'axes.spines.top': False, 'axes.spines.right': False}
STYLE |= {'legend.frameon': False, 'legend.columnspacing': 0.8, 'legend.handlelength': 1.9, 'legend.handletextpad': 0.5}
STYLE |= {'savefig.dpi': 200, 'svg.hashsalt': 'nanoCoMiGS'}  # with that the same picture is the same bytes
WIDTH, MANY = 3.4, 8  # inches; users from which on only their mean is drawn
METHODS = {'centralized': 'Centralized', 'local': 'Local', 'fedavg': 'FedAvg', 'ffa_lora': 'FFA-LoRA', 'pcl': 'PCL'}
METHODS |= {'comigs_2s': 'CoMiGS-2S', 'comigs_2g': 'CoMiGS-2G', 'comigs_1g1s': 'CoMiGS-1G1S', 'comigs_1gxs': 'CoMiGS-1GXS'}
APART = ('seed', 'out_dir', 'resume', 'overwrite', 'device', 'versions', 'git_commit')  # what never tells experiments apart


# ---- reading -------------------------------------------------------------------------------------------------------
def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        die(f'{file} cannot be read ({error})')


def read(folder: str | Path) -> SimpleNamespace:
    """config; meta, of its data ({} if that is gone); base {user: perplexity before training}; evals, the test evaluations
    after local steps: user, ppl, perhaps scores (L, E), and x: expert steps, or the round where users are too many to draw."""
    folder = Path(folder)
    if not (folder / 'config.json').exists() or not (folder / 'metrics.jsonl').exists():
        die(f'{folder} is no run: it needs config.json and metrics.jsonl')
    run = SimpleNamespace(folder=folder, config=read_json(folder / 'config.json'), base={}, evals=[])
    meta = Path('data', run.config['dataset'], 'meta.json')
    run.meta, run.many = read_json(meta) if meta.exists() else {}, len(run.config['users']) > MANY
    try:
        lines = [json.loads(line) for line in open(folder / 'metrics.jsonl', encoding='utf-8') if '"kind": "eval"' in line]
        for line in lines:
            if line['when'] == 'pretrained':
                run.base[line['user']] = line['ppl']
            elif line['when'] == 'local' and line['split'] == 'test':
                run.evals.append({**line, 'x': line['round' if run.many else 'step']})
    except (ValueError, KeyError) as error:
        die(f'{folder}/metrics.jsonl cannot be read ({error!r})')
    return run


def read_all(folders: list) -> list[SimpleNamespace]:
    """Several runs whose perplexities may stand side by side: the same test text in the same windows, the same base."""
    runs = [read(folder) for folder in folders] or die('which runs? Give their folders')
    for run in runs:
        if not run.evals:
            die(f'{run.folder} has no evaluations: no tested user has been evaluated after local steps')
        for key in ('dataset', 'target', 'users', 'block_size', 'base_sha256'):
            one, other = runs[0].config.get(key), run.config.get(key)
            if one != other:
                die(f'{runs[0].folder} and {run.folder} cannot be compared: {key} is {one} and {other}')
    return runs


def method_and_experts(config: dict) -> tuple[str, str]:
    method, n = config['method'], config['n_experts']
    if isinstance(n, list):
        n = ','.join(map(str, n)) if len(n) <= MANY else f'{min(n)} to {max(n)} experts'
    else:
        n = f'{n} expert{"s" * (n != 1)}'
    return METHODS.get(method, method), n


def labelled(runs: list[SimpleNamespace]) -> tuple[str, dict]:
    """(what all have in common, {label: its runs, one per seed}): method, experts and the switches that still differ."""
    names, groups = [method_and_experts(run.config) for run in runs], {}
    common = names[0][0] if len(runs) > 1 and len({method for method, _ in names}) == 1 else ''
    for run, name in zip(runs, names):
        alike = [other.config for other, its in zip(runs, names) if its == name]
        differ = [f'{k} {v}' for k, v in run.config.items() if k not in APART and any(c.get(k) != v for c in alike)]
        label = ', '.join([name[1] if common else f'{name[0]} ({name[1]})', *differ])
        if run.config['seed'] in [r.config['seed'] for r in groups.get(label, [])]:
            die(f'{run.folder} repeats another run: {" ".join(name)}, seed {run.config["seed"]}')
        groups.setdefault(label, []).append(run)
    return common, groups


def by_x(pairs: list[tuple]) -> tuple[list, list[np.ndarray]]:
    """(x, value) pairs as sorted x and the values at each."""
    xs = sorted({x for x, _ in pairs})
    return xs, [np.array([v for x, v in pairs if x == at]) for at in xs]


# ---- words ---------------------------------------------------------------------------------------------------------
def perplexity_label(run: SimpleNamespace) -> str:
    kind = run.meta.get('tokenizer')
    return 'test perplexity' + ('' if kind is None else ' (per byte)' if kind == 'bytes' else ' (per token)')


def count(n: int) -> str:
    """12500: 12.5k."""
    return f'{n / 1e6:.3g}M' if n >= 1e6 else f'{n / 1e3:.3g}k' if n >= 1e3 else str(n)


def heading(what: str, runs: list[SimpleNamespace]) -> str:
    """What, on which data, how long; 'scaled down' if that is less than the paper's 200 steps of 64 x 128 tokens, of GPT-2."""
    c, seeds = runs[0].config, sorted({run.config['seed'] for run in runs})
    rounds, base = max(run.config['rounds'] for run in runs), Path(c['init_from']).stem
    small = rounds * c['local_steps'] * c['batch_size'] * c['block_size'] < 200 * 64 * 128 or not base.startswith('gpt2')
    head = f'{what} on {Path(c["dataset"]).name} ({c["target"]} text)' + ', scaled down' * small
    unit = 'bytes' if runs[0].meta.get('tokenizer') == 'bytes' else 'tokens'
    how = f'{rounds}~x~{c["local_steps"]}~steps of {c["batch_size"]}~x~{c["block_size"]}~{unit}, {base}'
    text = textwrap.fill(f'{head}: {how}, seed{"s" * (len(seeds) > 1)}~{", ".join(map(str, seeds))}', 58)
    return text.replace('~', ' ')  # where no line ends


def user_title(run: SimpleNamespace, user: int) -> str:
    if run.many:
        return f'mean of the users tested ({len(run.config["users"])} in all)'
    n, name = run.meta['users'][user]['tokens']['train'] if run.meta else 0, run.config['users'][user]
    return name + (f' ({n / 1e3:g} kB)' if run.meta.get('tokenizer') == 'bytes' else f' ({count(n)})' if n else '')


# ---- pictures: each returns a matplotlib Figure ----------------------------------------------------------------------
def new_figure(height: float, rows: int, columns: int, **kwargs):
    """(figure, flat axes) of one column's width; no pyplot, so nothing is global and nothing opens a window."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(WIDTH, height), layout='constrained')
    return fig, fig.subplots(rows, columns, squeeze=False, **kwargs).ravel()


def tidy(axes: np.ndarray, used: int, columns: int, run: SimpleNamespace) -> None:
    """Hides the axes that are left over; names x at the last axes of every column."""
    for ax in axes[used:]:
        ax.set_visible(False)
    for ax in axes[:used][-columns:]:
        ax.set_xlabel('communication round' if run.many else 'expert steps')
        ax.tick_params(labelbottom=True)


def look(i: int, n_points: int) -> dict:
    """Colour, line and marker of line i; at most about eight markers on it."""
    return {
        'color': COLOURS[i % len(COLOURS)],
        'linestyle': LINES[i % len(LINES)],
        'marker': MARKERS[i % len(MARKERS)],
        'markevery': max(1, n_points // 8),
    }


def users_of(run: SimpleNamespace) -> list[int]:
    return [-1] if run.many else sorted({e['user'] for e in run.evals})


def base_of(run: SimpleNamespace, user: int) -> float | None:
    return np.mean([*run.base.values()]) if run.many and run.base else run.base.get(user)


def curve(runs: list[SimpleNamespace], user: int) -> tuple[list, np.ndarray, np.ndarray]:
    """x, mean over seeds and sample standard deviation (0 of one) of a user's test perplexity; of many users, of their mean."""
    each = [by_x([(e['x'], e['ppl']) for e in run.evals if run.many or e['user'] == user]) for run in runs]
    xs, values = by_x([(x, np.mean(v)) for of_run in each for x, v in zip(*of_run)])
    return xs, np.array([v.mean() for v in values]), np.array([v.std(ddof=1) if len(v) > 1 else 0.0 for v in values])


def curves(what: str, folders: list):
    """Figures 3, 6, 7, 8, 10, 11, 12: a panel for each user, a line for each experiment (mean and deviation over seeds)."""
    runs = read_all(folders)
    (common, groups), first, users = labelled(runs), runs[0], users_of(runs[0])
    columns = min(2, len(users))
    rows = -(-len(users) // columns)
    across = min(4, max(1, int(WIDTH / (0.42 + 0.055 * max(map(len, groups))))))  # labels of the legend side by side
    height = 0.75 + 1.6 * rows + 0.16 * (-(-len(groups) // across) + bool(common))
    fig, axes = new_figure(height, rows, columns, sharex=True)
    tidy(axes, len(users), columns, first)
    for ax, user in zip(axes, users):
        for i, (label, group) in enumerate(groups.items()):
            xs, mean, std = curve(group, user)
            ax.plot(xs, mean, label=label, **look(i, len(xs)))
            if std.any():
                ax.fill_between(xs, mean - std, mean + std, color=COLOURS[i % len(COLOURS)], alpha=0.2, linewidth=0)
        base, second = base_of(first, user), []
        if base is not None:
            second.append(f'base {base:.3g}')
            low, high = ax.get_ylim()
            if low < base < high:
                ax.axhline(base, color='#555555', linewidth=0.8, linestyle=(0, (1, 2)))
        own = [r.config['n_experts'][user] for r in runs if isinstance(r.config['n_experts'], list) and not first.many]
        if len({*own}) > 1:
            second.append('n = ' + ','.join(map(str, sorted({*own}))))
        ax.set_title('\n'.join([user_title(first, user), ', '.join(second)]).strip())
    fig.suptitle(heading(what, runs))
    fig.supylabel(perplexity_label(first), fontsize=8)
    title = f'{common}, experts per user' if common else None
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc='outside lower center', ncol=across, title=title, title_fontsize=8)
    return fig


def layers_of(run: SimpleNamespace, at_most: int) -> list[int]:
    """Layers to draw, evenly spaced, first and last included. Dies of a run without routers."""
    scores = [e['scores'] for e in run.evals if 'scores' in e]
    if not scores:
        die(f'{run.folder} has no scores of experts: its method has no router, or it was run by an older train.py')
    return sorted({round(i) for i in np.linspace(0, len(scores[0]) - 1, at_most)})


def scores(what: str, folders: list):
    """Figure 4: a panel for each layer, a line for each expert: mean over users and seeds, shaded from least to largest."""
    runs = read_all(folders)
    (_, groups), layers = labelled(runs), layers_of(runs[0], 12)
    if len(groups) > 1:
        die(f'{what} draws one experiment (several seeds are averaged), but these are {len(groups)}: {"; ".join(groups)}')
    evals = [e for run in runs for e in run.evals if 'scores' in e]
    n, columns = max(len(e['scores'][0]) for e in evals), 2 if len(layers) <= 4 else 3
    rows = -(-len(layers) // columns)
    fig, axes = new_figure(0.9 + 1.4 * rows, rows, columns, sharex=True, sharey=True)
    tidy(axes, len(layers), columns, runs[0])
    for ax, layer in zip(axes, layers):
        for j in range(n):
            xs, values = by_x([(e['x'], e['scores'][layer][j]) for e in evals if j < len(e['scores'][layer])])
            kind = 'generalist' if j < runs[0].config['n_generalists'] else 'specialist'
            ax.plot(xs, [v.mean() for v in values], label=f'expert {j} ({kind})', **look(j, len(xs)))
            low, high = [v.min() for v in values], [v.max() for v in values]
            ax.fill_between(xs, low, high, color=COLOURS[j % 8], alpha=0.2, linewidth=0)
        ax.set(ylim=(0, 1), title=f'layer {layer}')
    fig.suptitle(heading(f'{what}: {next(iter(groups))}', runs))
    fig.supylabel('mean score (shaded: all users)', fontsize=8)
    fig.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncol=2)
    return fig


def grid(what: str, folders: list):
    """Figure 9: the mean test perplexity of finished runs by router_every and router_steps (mean over seeds)."""
    runs, cells = read_all(folders), {}
    labelled(runs)  # refuses what is given twice
    for run in runs:
        result = read_json(run.folder / 'summary.json')['mean_test_ppl']
        cells.setdefault((run.config['router_every'], run.config['router_steps']), []).append(result)
    every, steps = (sorted({key[i] for key in cells}) for i in (0, 1))
    values = np.array([[np.mean(cells.get((tau, s), [np.nan])) for s in steps] for tau in every])  # (every, steps)
    fig, (ax,) = new_figure(1 + 0.42 * max(3, len(every)), 1, 1)
    image = ax.imshow(values, cmap='cividis', aspect='auto')
    ax.grid(False)
    low, high = np.nanmin(values), np.nanmax(values)
    for i, j in np.argwhere(~np.isnan(values)):
        shade = 'black' if values[i, j] > (low + high) / 2 else 'white'
        ax.text(j, i, f'{values[i, j]:.3f}', ha='center', va='center', color=shade)
    ax.set_xticks(range(len(steps)), steps)
    ax.set_yticks(range(len(every)), every)
    ax.set(xlabel='router steps in a phase (router_steps)', ylabel='expert steps between\nphases (router_every)')
    fig.colorbar(image, ax=ax, label=perplexity_label(runs[0]).replace(' (', '\n('))
    fig.suptitle(heading(what, runs) + f'\nlargest over smallest: +{100 * (high / low - 1):.2g} %')
    return fig


def sizes(what: str, names: list):
    """Figure 2: tokens of every user and split, as bubbles of that area; a panel for each data set."""
    files = [Path('data', name, 'meta.json') for name in names] or die('which data sets? Give their folders under data/')
    for file in files:
        if not file.exists():
            die(f'there is no {file}; data sets are made by data/prepare.py')
    metas = [read_json(file) for file in files]
    for name, meta in zip(names, metas):
        if len(meta['users']) > MANY:
            die(f'{name} has {len(meta["users"])} users: at most {MANY} can be drawn')
    fig, axes = new_figure(0.35 + 1.75 * len(metas), len(metas), 1)
    for ax, name, meta in zip(axes, names, metas):
        tokens = np.array([[user['tokens'][split] for split in ('test', 'valid', 'train')] for user in meta['users']])  # (N, 3)
        scale = 1100 / tokens.max()  # area in points^2 of the largest
        for i, of_user in enumerate(tokens):
            ax.scatter([i] * 3, range(3), s=of_user * scale, color=COLOURS[i], alpha=0.6, linewidth=0)
            for y, n in enumerate(of_user):
                ax.text(i, y, count(n), ha='center', va='center')
        ax.set_xticks(range(len(tokens)), [user['name'] for user in meta['users']], rotation=20 if len(tokens) > 4 else 0)
        ax.set_yticks(range(3), ['test', 'valid', 'train'])
        ax.set(xlim=(-0.6, len(tokens) - 0.4), ylim=(-0.6, 2.6))
        small = ', scaled down' * bool(tokens[:, 2].max() < 400_000)  # the paper's least user has 407,498
        ax.set_title(textwrap.fill(f'{what}: tokens ({meta["tokenizer"]}) of {name}{small}', 50))
    return fig


def matrices(what: str, folders: list):
    """Trust matrices of up to six rounds, evenly spaced, the last one included: row i is how user i weighs the others."""
    if len(folders) != 1:
        die(f'{what} draws one run')
    run = read(folders[0])
    lines = [json.loads(line) for line in open(run.folder / 'metrics.jsonl', encoding='utf-8') if '"kind": "trust"' in line]
    rounds = {line['round']: (line['matrix'], [run.config['users'][i] for i in line['users']]) for line in lines}
    if not rounds:
        die(f'{run.folder} has no trust matrices: only --aggregate=trust and --aggregate=consensus log them')
    known = sorted(rounds)
    shown = sorted({known[round(i * (len(known) - 1) / 5)] for i in range(6)})
    columns = min(2, len(shown))
    fig, axes = new_figure(1.2 + 1.15 * -(-len(shown) // columns), -(-len(shown) // columns), columns)
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    for k, (ax, t) in enumerate(zip(axes, shown)):
        matrix, present = rounds[t]
        nobody = [''] * len(present)
        names = present if len(present) <= MANY else nobody
        image = ax.imshow(matrix, cmap='cividis', vmin=0, vmax=1)
        ax.grid(False)
        ax.set_title(f'round {t}')
        alike = all(rounds[other][1] == present for other in shown)  # then the outer matrices name the users for all
        ax.set_xticks(range(len(present)), nobody if alike and k + columns < len(shown) else names, rotation=90)
        ax.set_yticks(range(len(present)), nobody if alike and k % columns else names)
        for i, row in enumerate(matrix if len(present) <= 4 else ()):
            for j, w in enumerate(row):
                shade = 'black' if w > 0.5 else 'white'
                ax.text(j, i, f'{w:.2f}'.lstrip('0'), ha='center', va='center', color=shade)
    fig.suptitle(heading(f'{method_and_experts(run.config)[0]}: {what}', [run]))
    fig.supylabel('user who trusts', fontsize=8)
    fig.supxlabel('user who is trusted', fontsize=8)
    fig.colorbar(image, ax=list(axes), label='weight', shrink=0.6, aspect=25)
    return fig


def overview(what: str, folders: list):
    """A run at a glance: test perplexity of every user, dotted the base's; below, the generalists' score in every layer."""
    first, *more = read_all(folders)
    routed = any('scores' in e for e in first.evals)
    fig, axes = new_figure(3.2 + 2.3 * routed, 1 + routed, 1)
    for i, user in enumerate(users_of(first)):
        xs, mean, _ = curve([first, *more], user)
        axes[0].plot(xs, mean, label=user_title(first, user), **{**look(i, len(xs)), 'linestyle': '-'})  # dotted is the base
        if (base := base_of(first, user)) is not None:
            axes[0].axhline(base, color=COLOURS[i % 8], linewidth=0.8, linestyle=(0, (1, 2)))
    axes[0].set(ylabel=perplexity_label(first), title='dotted: the base, before training')
    if routed:
        layers, n = layers_of(first, 48), first.config['n_generalists']
        import matplotlib

        colours, named = matplotlib.colormaps['viridis'](np.linspace(0, 0.85, len(layers))), layers_of(first, 6)
        evals = [e for e in first.evals if 'scores' in e]
        for i, layer in enumerate(layers):
            xs, values = by_x([(e['x'], sum(e['scores'][layer][:n])) for e in evals])
            label = f'layer {layer}' if layer in named else None
            axes[1].plot(xs, [v.mean() for v in values], label=label, **{**look(i, len(xs)), 'color': colours[i]})
        axes[1].set(ylim=(0, 1), ylabel='mean score', title=f'generalist{"s" * (n > 1)}: router score, mean over users')
    for ax in axes:
        ax.set(xlabel='communication round' if first.many else 'expert steps', xlim=(0, None))
        ax.legend(loc='upper center', bbox_to_anchor=(0.5, -0.27), ncol=2)
    fig.suptitle(heading('{} ({})'.format(*method_and_experts(first.config)), [first, *more]))
    return fig


PICTURES = {'fig2': sizes, 'fig4': scores, 'fig9': grid, 'trust': matrices, 'plot': overview}
PICTURES |= dict.fromkeys(('fig3', 'fig6', 'fig7', 'fig8', 'fig10', 'fig11', 'fig12'), curves)


def draw(kind: str, given: list, out: Path) -> list[Path]:
    """Writes `out` as .png and .svg: the same input, the same bytes. Dies with one line before it writes anything."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        fig = PICTURES[kind](kind.replace('fig', 'Figure '), given)
        out.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(out.with_suffix('.svg'), metadata={'Date': None})
        fig.savefig(out.with_suffix('.png'))
    return [out.with_suffix('.png'), out.with_suffix('.svg')]


def pictures_of(folder: Path) -> list[Path]:
    """Draws what there is: plot, of a run with evaluations, and trust, where users judged each other."""
    metrics = (folder / 'metrics.jsonl').read_text(encoding='utf-8')
    kinds = ['plot'] * ('"when": "local"' in metrics) + ['trust'] * ('"kind": "trust"' in metrics)
    return [file for kind in kinds for file in draw(kind, [folder], folder / f'{kind}.png')]


def run(folder: Path) -> None:
    """The end of train.py: a finished run does not fail because it cannot be drawn."""
    try:
        pictures_of(folder)
    except SystemExit:
        pass  # die has said why
    except Exception as error:
        print(f'{folder} could not be drawn ({error!r}); python plot.py {folder} tries again')


def main(argv: list[str]) -> None:
    if not argv or {'-h', '--help'} & {*argv}:
        print(__doc__)
        sys.exit(0 if argv else 2)
    unknown = [arg for arg in argv if arg.startswith('-') and not arg.startswith('--out=')]
    if unknown:
        die(f'unknown switch {unknown[0]}; known: --out=FILE.png')
    out, given = [arg[6:] for arg in argv if arg.startswith('--out=')], [arg for arg in argv if not arg.startswith('-')]
    kind = given.pop(0) if given and given[0] in PICTURES else ''
    if kind:
        default = Path(given[0] if given else '', 'trust.png') if kind == 'trust' else Path('out', f'{kind}.png')
        files = draw(kind, given, Path(out[-1]) if out else default)
    elif out:
        files = draw('plot', given, Path(out[-1]))
    else:
        for folder in given:
            read_all([folder])  # before the first is drawn
        files = [file for folder in given for file in pictures_of(Path(folder))]
    print(*files, sep='\n')


if __name__ == '__main__':
    main(sys.argv[1:])
