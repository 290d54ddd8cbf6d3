"""Pictures of runs, from their files alone: PNG and SVG side by side, 3.4 inches wide, one column of a paper.

    python tools/plot.py run out/a                # out/a/plot.png, and trust.png where users judged each other
    python tools/plot.py fig3 out/a out/b         # test perplexity of every user over training
    python tools/plot.py fig4 out/a               # scores of the experts in every layer over training
    python tools/plot.py fit out/a out/b          # train, valid and test perplexity side by side: --eval_valid=True in the runs
    python tools/plot.py fig9 out/a out/c         # router_every x router_steps
    python tools/plot.py fig2 demo                # how many tokens the users of data/demo have
    python tools/plot.py trust out/b --out=out/who.png

Runs that differ in the seed only are one line: their mean, shaded by their deviation. fig6, fig7, fig8, fig10, fig11, fig12
are fig3 of other runs: `python tools/reproduce.py fig6` makes those and draws them. Without --out, figures go to out/fig3.png
and so on. Read are config.json, metrics.jsonl and, for fig9, summary.json of a run, and data/NAME/meta.json."""

import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import die, folder_of, home, parser, read_config, read_json

# Okabe and Ito's colours, told apart by the colour-blind (grey for their yellow, which is none on paper); markers say it again
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#888888', '#000000')
MARKERS, LINES, DOTTED = 'osD^vP*X', ('-', '--', '-.', ':', (0, (5, 1, 1, 1, 1, 1))), (0, (1, 2))
STYLE = Path(__file__).with_name('nanocomigs.mplstyle')
WIDTH, MANY = 3.4, 8  # inches; users from which on only their mean is drawn
NAMES = {'centralized': 'Centralized', 'local': 'Local', 'fedavg': 'FedAvg', 'ffa_lora': 'FFA-LoRA', 'pcl': 'PCL'}
NAMES |= {f'comigs_{kind}': f'CoMiGS-{kind.upper()}' for kind in ('2s', '2g', '1g1s', '1gxs')}
APART = ('seed', 'out_dir', 'resume', 'overwrite', 'device', 'versions', 'git_commit')  # what never tells experiments apart


# ---- reading -------------------------------------------------------------------------------------------------------
def read(folder: str | Path) -> SimpleNamespace:
    """A run, finished or not: config; meta, of its data ({} if that is gone); base {user: perplexity before training}; trust,
    trained: its lines of that kind, and of expert steps; evals, valid: its evaluations after local steps on the test and the
    validation text: user, ppl, perhaps scores (L, E), and x, the expert steps. Where users are too many to draw (many), they
    all are user -1, and x is the round."""
    folder = Path(folder)
    run = SimpleNamespace(folder=folder, config=read_config(folder))
    meta = folder_of(run.config['dataset']) / 'meta.json'
    run.meta, run.many = read_json(meta) if meta.exists() else {}, len(run.config['users']) > MANY
    run.x, x = ('communication round', 'round') if run.many else ('expert steps', 'step')
    try:
        text = (folder / 'metrics.jsonl').read_text(encoding='utf-8')
        lines = [read_json(folder / 'metrics.jsonl', 'kind', text=line) for line in text.splitlines()]
        run.trust = [line for line in lines if line['kind'] == 'trust']
        run.base = {line['user']: line['ppl'] for line in lines if line.get('when') == 'pretrained'}
        run.trained = [line for line in lines if line['kind'] == 'train']
        local = [line for line in lines if line.get('when') == 'local']
        local = [{**line, 'user': -1 if run.many else line['user'], 'x': line[x]} for line in local]
        run.evals, run.valid = ([line for line in local if line['split'] == split] for split in ('test', 'valid'))
    except (KeyError, TypeError) as error:
        raise ValueError(f'{folder}/metrics.jsonl has what no run wrote ({error!r})') from None
    if run.many and run.base:
        run.base = {-1: np.mean([*run.base.values()])}
    run.users = sorted({e['user'] for e in run.evals})
    return run


def read_all(folders: list) -> list[SimpleNamespace]:
    """Several runs whose perplexities may stand side by side: the same test text in the same windows, the same base."""
    runs = [read(folder) for folder in folders]
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
    return NAMES.get(method, method), n


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


def curve(runs: list[SimpleNamespace], user: int) -> tuple[list, np.ndarray, np.ndarray]:
    """x, mean over seeds and sample standard deviation (0 of one) of a user's test perplexity."""
    each = [by_x([(e['x'], e['ppl']) for e in run.evals if e['user'] == user]) for run in runs]
    xs, values = by_x([(x, np.mean(v)) for of_run in each for x, v in zip(*of_run)])
    return xs, np.array([v.mean() for v in values]), np.array([v.std(ddof=1) if len(v) > 1 else 0.0 for v in values])


def layers_of(run: SimpleNamespace, at_most: int) -> list[int]:
    """Layers to draw, evenly spaced, first and last included. Dies of a run without routers."""
    scores = [e['scores'] for e in run.evals if 'scores' in e]
    if not scores:
        die(f'{run.folder} has no scores of experts: its method has no router')
    return sorted({round(i) for i in np.linspace(0, len(scores[0]) - 1, at_most)})


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
    rounds, base = max(run.config['rounds'] for run in runs), Path(c['init_from']).name.removesuffix('.safetensors')
    small = rounds * c['local_steps'] * c['batch_size'] * c['block_size'] < 200 * 64 * 128 or not base.startswith('gpt2')
    head = f'{what} on {Path(c["dataset"]).name} ({c["target"]} text)' + ', scaled down' * small
    unit = 'bytes' if runs[0].meta.get('tokenizer') == 'bytes' else 'tokens'
    how = f'{rounds}\xa0x\xa0{c["local_steps"]}\xa0steps of {c["batch_size"]}\xa0x\xa0{c["block_size"]}\xa0{unit}, {base}'
    text = textwrap.fill(f'{head}: {how}, seed{"s" * (len(seeds) > 1)}\xa0{", ".join(map(str, seeds))}', 58)
    return text.replace('\xa0', ' ')  # where no line ends


def title_of(run: SimpleNamespace, user: int) -> str:
    if user == -1:
        return f'mean of the users tested in a round ({len(run.config["users"])} in all)'
    n, name = run.meta['users'][user]['tokens']['train'] if run.meta else 0, run.config['users'][user]
    return name + (f' ({n / 1e3:g} kB)' if run.meta.get('tokenizer') == 'bytes' else f' ({count(n)})' if n else '')


# ---- what pictures are made of --------------------------------------------------------------------------------------
def panels(n: int, columns: int, row: float, rest: float, x: str = '', **kwargs) -> tuple[Figure, np.ndarray]:
    """(figure, n axes) of one column's width; rows of `row` inches and `rest` for what is around them. x is written below every
    column. No pyplot, so nothing is global and nothing opens a window."""
    rows = -(-n // columns)
    fig = Figure(figsize=(WIDTH, rest + row * rows), layout='constrained')
    axes = fig.subplots(rows, columns, squeeze=False, **kwargs).ravel()
    for ax in axes[n:]:
        ax.set_visible(False)
    for ax in axes[:n][-columns:] if x else ():
        ax.set_xlabel(x)
        ax.tick_params(labelbottom=True)
    return fig, axes[:n]


def draw_line(ax, i: int, label: str | None, xs: list, y: list, low: list = (), high: list = (), **look) -> None:
    """Line i in its own colour, dash and marker (at most about eight of them), shaded from low to high if they are given."""
    style, marker = LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]
    look = {'color': COLOURS[i % len(COLOURS)], 'linestyle': style, 'marker': marker, 'markevery': max(1, len(xs) // 8)} | look
    ax.plot(xs, y, label=label, **look)
    if len(low):
        ax.fill_between(xs, low, high, color=look['color'], alpha=0.2, linewidth=0)


def draw_matrix(ax, values: np.ndarray, text: str, middle: float, **limits):
    """An image with its values written into it, black on what is light; text: their format, '' writes none."""
    image = ax.imshow(values, cmap='cividis', **limits)
    ax.grid(False)
    for i, j in np.argwhere(~np.isnan(values)) if text else ():
        shade = 'black' if values[i, j] > middle else 'white'
        ax.text(j, i, f'{values[i, j]:{text}}'.lstrip('0'), ha='center', va='center', color=shade)
    return image


# ---- pictures: each returns a Figure -------------------------------------------------------------------------------
def curves(what: str, folders: list) -> Figure:
    """Figures 3, 6, 7, 8, 10, 11, 12: a panel for each user, a line for each experiment (mean and deviation over seeds)."""
    runs = read_all(folders)
    (common, groups), first, users = labelled(runs), runs[0], runs[0].users
    across = min(4, max(1, int(WIDTH / (0.42 + 0.055 * max(map(len, groups))))))  # labels of the legend side by side
    legend = 0.16 * (-(-len(groups) // across) + bool(common))
    fig, axes = panels(len(users), min(2, len(users)), 1.6, 0.75 + legend, first.x, sharex=True)
    for ax, user in zip(axes, users):
        for i, (label, group) in enumerate(groups.items()):
            xs, mean, std = curve(group, user)
            draw_line(ax, i, label, xs, mean, *((mean - std, mean + std) if std.any() else ()))
        base, second = first.base.get(user), []
        if base is not None:
            second.append(f'base {base:.3g}')
            low, high = ax.get_ylim()
            if low < base < high:
                ax.axhline(base, color='#555555', linewidth=0.8, linestyle=DOTTED)
        own = [r.config['n_experts'][user] for r in runs if isinstance(r.config['n_experts'], list) and not first.many]
        if len({*own}) > 1:
            second.append('n = ' + ','.join(map(str, sorted({*own}))))
        ax.set_title('\n'.join([title_of(first, user), ', '.join(second)]).strip())
    fig.suptitle(heading(what, runs))
    fig.supylabel(perplexity_label(first))
    title = f'{common}, experts per user' if common else None
    fig.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncol=across, title=title)
    return fig


def fit(what: str, folders: list) -> Figure:
    """A row for each user, a column for each run: perplexity of the training text (exp of the mean loss of a round's steps,
    before they have learned from it), of the validation and of the test text. Where they part, text is over-fitted."""
    runs = read_all(folders)
    users = runs[0].users
    for run in runs:
        if not run.valid or run.many:
            why = 'too many users to draw' if run.many else 'no validation text was evaluated: train it with --eval_valid=True'
            die(f'{run.folder}: {why}')
    fig, axes = panels(len(users) * len(runs), len(runs), 1.25, 0.9, runs[0].x, sharex=True, sharey='row')
    for k, ax in enumerate(axes):
        user, run = users[k // len(runs)], runs[k % len(runs)]
        steps = [line for line in run.trained if line['user'] == user]
        rounds, losses = by_x([(line['round'], line['loss']) for line in steps])
        ends = [max(line['step'] for line in steps if line['round'] == t) for t in rounds]
        draw_line(ax, 0, 'train', ends, [float(np.exp(loss.mean())) for loss in losses])
        for i, (label, evals) in enumerate((('valid', run.valid), ('test', run.evals)), 1):
            xs, values = by_x([(e['x'], e['ppl']) for e in evals if e['user'] == user])
            draw_line(ax, i, label, xs, [v.mean() for v in values])
        ax.set_title(title_of(run, user) if run is runs[0] else '', loc='left')  # above the row
        ax.set_title(f'{method_and_experts(run.config)[0]}\n' if k < len(runs) else '')
    fig.suptitle(heading(what, runs))
    fig.supylabel(perplexity_label(runs[0]).removeprefix('test '))
    fig.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncol=3)
    return fig


def scores(what: str, folders: list) -> Figure:
    """Figure 4: a panel for each layer, a line for each expert: mean over users and seeds, shaded from least to largest."""
    runs = read_all(folders)
    (_, groups), layers = labelled(runs), layers_of(runs[0], 12)
    if len(groups) > 1:
        die(f'{what} draws one experiment (several seeds are averaged), but these are {len(groups)}: {"; ".join(groups)}')
    evals = [e for run in runs for e in run.evals if 'scores' in e]
    fig, axes = panels(len(layers), 2 if len(layers) <= 4 else 3, 1.4, 0.9, runs[0].x, sharex=True, sharey=True)
    for ax, layer in zip(axes, layers):
        for j in range(max(len(e['scores'][0]) for e in evals)):
            xs, values = by_x([(e['x'], e['scores'][layer][j]) for e in evals if j < len(e['scores'][layer])])
            kind = 'generalist' if j < runs[0].config['n_generalists'] else 'specialist'
            low, mean, high = ([of(v) for v in values] for of in (np.min, np.mean, np.max))
            draw_line(ax, j, f'expert {j} ({kind})', xs, mean, low, high)
        ax.set(ylim=(0, 1), title=f'layer {layer}')
    fig.suptitle(heading(f'{what}: {next(iter(groups))}', runs))
    fig.supylabel('mean score (shaded: all users)')
    fig.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncol=2)
    return fig


def grid(what: str, folders: list) -> Figure:
    """Figure 9: the mean test perplexity of finished runs by router_every and router_steps (mean over seeds)."""
    runs, cells = read_all(folders), {}
    labelled(runs)  # refuses what is given twice
    for run in runs:
        result = read_json(run.folder / 'summary.json', 'mean_test_ppl')['mean_test_ppl']
        cells.setdefault((run.config['router_every'], run.config['router_steps']), []).append(result)
    every, steps = (sorted({key[i] for key in cells}) for i in (0, 1))
    values = np.array([[np.mean(cells.get((tau, s), [np.nan])) for s in steps] for tau in every])  # (every, steps)
    low, high = np.nanmin(values), np.nanmax(values)
    fig, (ax,) = panels(1, 1, 0.42 * max(3, len(every)), 1)
    image = draw_matrix(ax, values, '.3f', (low + high) / 2, aspect='auto')
    ax.set_xticks(range(len(steps)), steps)
    ax.set_yticks(range(len(every)), every)
    ax.set(xlabel='router steps in a phase (router_steps)', ylabel='expert steps between\nphases (router_every)')
    fig.colorbar(image, ax=ax, label=perplexity_label(runs[0]).replace(' (', '\n('))
    fig.suptitle(heading(what, runs) + f'\nlargest over smallest: +{100 * (high / low - 1):.2g} %')
    return fig


def sizes(what: str, names: list) -> Figure:
    """Figure 2: tokens of every user and split, as bubbles of that area; a panel for each data set."""
    metas = [read_json(folder_of(name) / 'meta.json') for name in names]
    for name, meta in zip(names, metas):
        if len(meta['users']) > MANY:
            die(f'{name} has {len(meta["users"])} users: at most {MANY} can be drawn')
    fig, axes = panels(len(metas), 1, 1.75, 0.35)
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


def matrices(what: str, folders: list) -> Figure:
    """Trust matrices of up to six rounds, evenly spaced, the last one included: row i is how user i weighs the others."""
    if len(folders) != 1:
        die(f'{what} draws one run')
    run = read(folders[0])
    rounds = {line['round']: (line['matrix'], [run.config['users'][i] for i in line['users']]) for line in run.trust}
    if not rounds:
        die(f'{run.folder} has no trust matrices: only --aggregate=trust and --aggregate=consensus log them')
    known = sorted(rounds)
    shown = sorted({known[round(i * (len(known) - 1) / 5)] for i in range(6)})
    columns = min(2, len(shown))
    fig, axes = panels(len(shown), columns, 1.15, 1.2)
    alike = all(rounds[t][1] == rounds[shown[0]][1] for t in shown)  # then the outer matrices name the users for all
    for k, (ax, t) in enumerate(zip(axes, shown)):
        matrix, present = rounds[t]
        nobody = [''] * len(present)
        names = present if len(present) <= MANY else nobody
        image = draw_matrix(ax, np.array(matrix), '.2f' if len(present) <= 4 else '', 0.5, vmin=0, vmax=1)
        ax.set_title(f'round {t}')
        ax.set_xticks(range(len(present)), nobody if alike and k + columns < len(shown) else names, rotation=90)
        ax.set_yticks(range(len(present)), nobody if alike and k % columns else names)
    fig.suptitle(heading(f'{method_and_experts(run.config)[0]}: {what}', [run]))
    fig.supylabel('user who trusts')
    fig.supxlabel('user who is trusted')
    fig.colorbar(image, ax=list(axes), label='weight', shrink=0.6, aspect=25)
    return fig


def overview(what: str, folders: list) -> Figure:
    """A run at a glance: test perplexity of every user, dotted the base's; below, the generalists' score in every layer."""
    runs = read_all(folders)
    first, evals, named = runs[0], [e for e in runs[0].evals if 'scores' in e], ([], [])
    fig, axes = panels(1 + bool(evals), 1, 2.3, 0.9)
    for i, user in enumerate(first.users):
        xs, mean, _ = curve(runs, user)
        draw_line(axes[0], i, title_of(first, user), xs, mean, linestyle='-')  # dotted is the base
        named[0].append(axes[0].lines[-1])
        if (base := first.base.get(user)) is not None:
            axes[0].axhline(base, color=COLOURS[i % len(COLOURS)], linewidth=0.8, linestyle=DOTTED)
    axes[0].set(ylabel=perplexity_label(first), title='dotted: the base, before training')
    if evals:
        layers, some, n = layers_of(first, 48), layers_of(first, 6), first.config['n_generalists']
        colours = matplotlib.colormaps['viridis'](np.linspace(0, 0.85, len(layers)))
        for i, layer in enumerate(layers):
            xs, values = by_x([(e['x'], sum(e['scores'][layer][:n])) for e in evals])
            draw_line(axes[1], i, f'layer {layer}', xs, [v.mean() for v in values], color=colours[i])
            named[1].extend(axes[1].lines[-1:] * (layer in some))
        axes[1].set(ylim=(0, 1), ylabel='mean score', title=f'generalist{"s" * (n > 1)}: router score, mean over users')
    for ax, lines in zip(axes, named):
        ax.set(xlabel=first.x, xlim=(0, None))
        ax.legend(handles=lines, loc='upper center', bbox_to_anchor=(0.5, -0.27), ncol=2)  # by itself it hides _names
    fig.suptitle(heading('{} ({})'.format(*method_and_experts(first.config)), runs))
    return fig


PICTURES = {'run': overview, 'trust': matrices, 'fit': fit, 'fig2': sizes, 'fig4': scores, 'fig9': grid}
PICTURES |= dict.fromkeys(('fig3', 'fig6', 'fig7', 'fig8', 'fig10', 'fig11', 'fig12'), curves)


def draw(kind: str, given: list, out: Path) -> list[Path]:
    """Writes `out` as .png and .svg: the same input, the same bytes. Dies with one line before it writes anything."""
    try:
        with matplotlib.style.context(STYLE), warnings.catch_warnings(category=UserWarning, action='ignore'):  # no font has all
            fig = PICTURES[kind]('Over-fitting' if kind == 'fit' else kind.replace('fig', 'Figure '), given)
            out.parent.mkdir(parents=True, exist_ok=True)
            fig.savefig(out.with_suffix('.svg'), metadata={'Date': None})
            fig.savefig(out.with_suffix('.png'))
    except (OSError, ValueError) as error:
        die(error)
    return [out.with_suffix('.png'), out.with_suffix('.svg')]


def run(folder: str | Path) -> list[Path]:
    """A run's own pictures, in its folder: plot, and trust where users judged each other."""
    (read_run,) = read_all([folder])
    names = {'run': 'plot.png'} | ({'trust': 'trust.png'} if read_run.trust else {})
    return [file for kind, name in names.items() for file in draw(kind, [folder], Path(folder, name))]


def main(argv: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument('kind', choices=PICTURES, help='run: the run itself')
    options.add_argument('given', nargs='+', type=home, metavar='RUN', help='folders of runs; of fig2, data sets under data/')
    options.add_argument('--out', type=home, metavar='FILE.png', help='where the picture goes')
    args = options.parse_args(argv)
    if args.kind == 'run' and not args.out:
        try:
            for folder in args.given:
                read_all([folder])  # before the first is drawn
        except (OSError, ValueError) as error:
            die(error)
        files = [file for folder in args.given for file in run(folder)]
    else:
        folder = args.given[0] if args.kind == 'trust' else 'out'
        files = draw(args.kind, args.given, Path(args.out or f'{folder}/{args.kind}.png'))
    print(*files, sep='\n')


if __name__ == '__main__':
    main(sys.argv[1:])
