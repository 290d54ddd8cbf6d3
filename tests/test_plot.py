"""tools/plot.py: what is drawn, with which labels, from files of runs that are made up here; and what is refused."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import configurator
from tools import plot


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with data/tiny: users a, b of bytes, the second with 4 times the text."""
    (tmp_path / 'data' / 'tiny').mkdir(parents=True)
    users = [{'name': name, 'tokens': {'train': n, 'valid': 2000, 'test': 1000}} for name, n in (('a', 12_500), ('b', 50_000))]
    (tmp_path / 'data' / 'tiny' / 'meta.json').write_text(json.dumps({'tokenizer': 'bytes', 'users': users}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(configurator, 'DATA', tmp_path / 'data')
    return tmp_path


def pretend(folder: str, ppl: list[list[float]], scores: list | None = None, trust: list | None = None, **config) -> str:
    """A run: ppl[t][user] after round t + 1 of 10 steps, the base at 9; scores (L, E), the same at every evaluation."""
    config = {
        **{'method': 'comigs_1g1s', 'dataset': 'tiny', 'target': 'own', 'init_from': 'assets/base-tiny.safetensors'},
        **{'users': ['a', 'b'], 'n_experts': 2, 'n_generalists': 1, 'seed': 42, 'rounds': len(ppl), 'local_steps': 10},
        **{'batch_size': 4, 'block_size': 128, 'base_sha256': 'x', 'router_every': 30, 'router_steps': 10, 'out_dir': folder},
        **config,
    }
    lines = [{'kind': 'train', 'round': 1, 'step': 1, 'user': 0, 'loss': 2.0}]
    for t, of_users in enumerate(ppl):
        for user, value in enumerate(of_users):
            at = {'kind': 'eval', 'round': t + 1, 'step': 10 * t + 10, 'user': user, 'when': 'local', 'split': 'test'}
            lines.append({**at, 'loss': np.log(value), 'ppl': value} | ({'scores': scores} if scores else {}))
        if trust:
            lines.append({'kind': 'trust', 'round': t + 1, 'step': 0, 'users': [0, 1], 'matrix': trust})
    for user in range(len(config['users'])):
        lines.append({'kind': 'eval', 'round': 0, 'user': user, 'when': 'pretrained', 'split': 'test', 'ppl': 9.0})
        lines.append({'kind': 'eval', 'round': 1, 'step': 1, 'user': user, 'when': 'final', 'split': 'valid', 'ppl': 1.0})
    Path(folder).mkdir(parents=True)
    Path(folder, 'config.json').write_text(json.dumps(config))
    Path(folder, 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    Path(folder, 'summary.json').write_text(json.dumps({'mean_test_ppl': float(np.mean(ppl[-1] or 0))}))
    return folder


def panels(fig) -> list:
    return [ax for ax in fig.axes if ax.get_visible()]


def texts(fig) -> list[str]:
    return [text.get_text() for text in fig.findobj(matplotlib.text.Text) if text.get_text()]


def lines_of(ax) -> dict:
    """{label: (x, y)} of the lines with a label of their own."""
    return {line.get_label(): line.get_data() for line in ax.lines if not line.get_label().startswith('_')}


def test_a_panel_for_each_user_and_a_line_for_each_method(place):
    one, two = pretend('out/a', [[8, 7], [6, 5]]), pretend('out/b', [[8, 9.5], [7, 4]], method='fedavg')
    fig = plot.curves('Figure 3', [one, two])
    first, second = panels(fig)
    assert first.get_title() == 'a (12.5 kB)\nbase 9' and second.get_title() == 'b (50 kB)\nbase 9'
    assert [*lines_of(first)] == ['CoMiGS-1G1S (2 experts)', 'FedAvg (2 experts)']
    assert [*map(list, lines_of(second)['FedAvg (2 experts)'])] == [[10, 20], [9.5, 4]]
    assert first.get_xlabel() == 'expert steps' and fig.get_supylabel() == 'test perplexity (per byte)'
    assert len(first.lines) == 2 and len(second.lines) == 3  # the base's level, 9, lies within the second panel only
    a, b = first.lines
    assert a.get_color() != b.get_color() and a.get_marker() != b.get_marker() and a.get_linestyle() != b.get_linestyle()
    heading = 'Figure 3 on tiny (own text), scaled down: 2 x 10 steps of 4 x 128 bytes, base-tiny, seed 42'
    assert fig.get_suptitle().replace('\n', ' ') == heading
    big = [pretend('out/c', [[8, 7]], init_from='gpt2', rounds=20, batch_size=64, base_sha256='y')]
    assert 'scaled down' not in plot.curves('Figure 3', big).get_suptitle()


def test_runs_that_differ_in_the_seed_are_one_line(place):
    runs = [pretend(f'out/{seed}', [[6 + d, 5], [4, 3 + d]], seed=seed) for seed, d in ((42, 0), (45, 1), (47, 2))]
    fig = plot.curves('Figure 3', runs)
    for ax, mean in zip(panels(fig), ([7, 4], [5, 4])):
        ((_, y),) = lines_of(ax).values()
        assert np.allclose(y, mean) and len(ax.collections) == 1  # and the deviation around it
    band = panels(fig)[0].collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose(band.max(), 8) and np.isclose(band.min(), 4)  # 7 +- 1 after the first round
    assert fig.get_suptitle().endswith('seeds 42, 45, 47')


def test_numbers_of_experts_are_the_legend_where_the_method_is_the_same(place):
    runs = [pretend(f'out/{n}', [[6, 5], [4, 3]], method='comigs_1gxs', n_experts=[2, n]) for n in (2, 4, 8)]
    fig = plot.curves('Figure 6', runs)
    assert [*lines_of(panels(fig)[0])] == ['2,2', '2,4', '2,8']
    assert fig.legends[0].get_title().get_text() == 'CoMiGS-1GXS, experts per user'
    assert [ax.get_title() for ax in panels(fig)] == ['a (12.5 kB)\nbase 9', 'b (50 kB)\nbase 9, n = 2,4,8']


def test_other_switches_are_named_where_they_tell_runs_apart(place):
    runs = [pretend(f'out/{k}', [[6, 5]], top_k=k) for k in (1, 2)]
    assert [*lines_of(panels(plot.curves('Figure 3', runs))[0])] == ['2 experts, top_k 1', '2 experts, top_k 2']


def test_over_fitting_is_a_panel_for_each_user_and_run_with_train_valid_and_test(place):
    """Training text: exp of the mean loss of a round's steps, at the round's last step."""
    runs = [pretend(f'out/{method}', [[8, 7], [6, 5]], method=method) for method in ('local', 'comigs_1g1s')]
    for run in runs:
        with open(Path(run, 'metrics.jsonl'), 'a') as f:
            for t, step, ppl in ((1, 9, 8.0), (1, 10, 2.0), (2, 20, 3.0)):
                for user in (0, 1):
                    f.write(
                        json.dumps({'kind': 'train', 'round': t, 'step': step, 'user': user, 'loss': float(np.log(ppl))}) + '\n'
                    )
            for user in (0, 1):
                at = {'kind': 'eval', 'round': 2, 'step': 20, 'user': user, 'when': 'local', 'split': 'valid'}
                f.write(json.dumps({**at, 'loss': 2.0, 'ppl': 5.5}) + '\n')
    fig = plot.fit('Over-fitting', runs)
    assert [ax.get_title().strip() for ax in panels(fig)] == ['Local', 'CoMiGS-1G1S', '', '']
    assert [ax.get_title(loc='left') for ax in panels(fig)] == ['a (12.5 kB)', '', 'b (50 kB)', '']
    lines = lines_of(panels(fig)[3])
    assert [*lines] == ['train', 'valid', 'test'] and [*map(list, lines['test'])] == [[10, 20], [7, 5]]
    assert np.allclose(lines['train'], [[10, 20], [4, 3]]) and [*map(list, lines['valid'])] == [[20], [5.5]]
    lines = lines_of(panels(fig)[0])  # the first user has one more training step, of perplexity e ** 2
    assert np.isclose(lines['train'][1][0], (8 * 2 * np.exp(2)) ** (1 / 3))


def test_scores_have_a_panel_for_each_layer_and_a_line_for_each_expert(place):
    run = pretend('out/a', [[6, 5], [4, 3]], scores=[[0.7, 0.3], [0.4, 0.6], [0.5, 0.5]])
    fig = plot.scores('Figure 4', [run])
    assert [ax.get_title() for ax in panels(fig)] == ['layer 0', 'layer 1', 'layer 2']
    lines = lines_of(panels(fig)[1])
    assert [*lines] == ['expert 0 (generalist)', 'expert 1 (specialist)']
    assert [*map(list, lines['expert 1 (specialist)'])] == [[10, 20], [0.6, 0.6]]
    assert all(ax.get_ylim() == (0, 1) for ax in panels(fig)) and panels(fig)[2].get_xlabel() == 'expert steps'


def test_layers_of_a_deep_model_are_evenly_spaced(place):
    run = pretend('out/a', [[6, 5]], scores=[[0.5, 0.5]] * 23)
    titles = [ax.get_title() for ax in panels(plot.scores('Figure 4', [run]))]
    assert titles == [f'layer {i}' for i in range(0, 23, 2)]


def test_the_grid_has_the_mean_perplexity_of_every_pair(place):
    pairs = [(tau, s) for tau in (100, 10) for s in (1, 5)]
    runs = [pretend(f'out/{tau}-{s}', [[tau / 10 + s, tau / 10 + s + 2]], router_every=tau, router_steps=s) for tau, s in pairs]
    fig = plot.grid('Figure 9', runs[:-1])
    ax = panels(fig)[0]
    values = ax.images[0].get_array()
    assert np.array_equal(values[1], [12, 16]) and values[0, 1] is np.ma.masked or np.isnan(values[0, 1])
    assert {'12.000', '16.000', '3.000'} <= {*texts(fig)} and '7.000' not in texts(fig)  # the run that was left out
    assert 'router_every' in ax.get_ylabel() and 'router_steps' in ax.get_xlabel()
    assert 'largest over smallest: +4.3e+02 %' in fig.get_suptitle()


def test_bubbles_have_the_area_of_the_tokens(place):
    (ax,) = panels(plot.sizes('Figure 2', ['tiny']))
    a, b = (points.get_sizes() for points in ax.collections)  # test, valid, train
    assert np.isclose(b[2] / a[2], 4) and np.isclose(a[2] / a[0], 12.5) and np.allclose(a[:2], b[:2])
    assert {'12.5k', '50k', '2k', '1k'} <= {text.get_text() for text in ax.texts}
    assert ax.get_title() == 'Figure 2: tokens (bytes) of tiny, scaled down'
    assert [label.get_text() for label in ax.get_xticklabels()] == ['a', 'b']


def test_a_run_draws_itself(place):
    """Perplexity of every user with the base's level, and the generalist's score in every layer; trust where it was logged."""
    run = Path(pretend('out/a', [[6, 5], [4, 3]], scores=[[0.7, 0.3], [0.4, 0.6]], trust=[[0.9, 0.1], [0.2, 0.8]]))
    fig = plot.overview('plot', [run])
    top, bottom = panels(fig)
    assert [*lines_of(top)] == ['a (12.5 kB)', 'b (50 kB)'] and top.get_ylabel() == 'test perplexity (per byte)'
    assert [list(line.get_ydata()) for line in top.lines if line.get_label().startswith('_')] == [[9, 9], [9, 9]]
    assert {label: list(y) for label, (_, y) in lines_of(bottom).items()} == {'layer 0': [0.7, 0.7], 'layer 1': [0.4, 0.4]}
    assert len(plot.run(run)) == 4
    assert sorted(file.name for file in run.iterdir() if file.suffix in ('.png', '.svg')) == [
        *('plot.png', 'plot.svg', 'trust.png', 'trust.svg')
    ]
    assert {'.90', '.10', '.20', '.80', 'round 1', 'round 2'} <= {*texts(plot.matrices('trust', [run]))}


NAMES = ['_under', '$x$', '\u5f20\u4e09', '\\$a_b^{c}', '<b>&amp;', '%s {0} ~ #1', '__', '\u0645\u0631']


@pytest.mark.parametrize('pair', [*zip(NAMES[::2], NAMES[1::2])])
def test_names_are_drawn_as_they_are_written(place, pair, capfd, recwarn):
    """In titles, legends and at axes, of users, data sets and bases; a font that lacks a character says nothing."""
    meta = json.loads((place / 'data/tiny/meta.json').read_text())
    for user, name in zip(meta['users'], pair):
        user['name'] = name
    odd = pair[0].replace('/', '')
    for data in ('tiny', odd):
        (place / 'data' / data).mkdir(exist_ok=True)
        (place / 'data' / data / 'meta.json').write_text(json.dumps(meta))
    trust = [[0.9, 0.1], [0.2, 0.8]]
    run = pretend('out/a', [[6, 5], [4, 3]], [[0.7, 0.3]], trust, users=pair, dataset=odd, init_from=f'x/{odd}.v2.safetensors')
    titles = [f'{pair[0]} (12.5 kB)', f'{pair[1]} (50 kB)']
    for kind, given, expected in (
        ('run', run, titles),
        ('fig3', run, [f'{title}\nbase 9' for title in titles]),
        ('fig2', odd, [*pair, f'Figure 2: tokens (bytes) of {odd}, scaled down']),
        ('trust', run, pair),
    ):
        with matplotlib.style.context(plot.STYLE):
            fig = plot.PICTURES[kind](kind.replace('fig', 'Figure '), [given])
            found = fig.findobj(matplotlib.text.Text) + [text for ax in panels(fig) for text in ax.get_xticklabels()]
        said = [text.get_text() for text in found]
        assert {*expected} <= {*said} and not any(text.get_parse_math() for text in found if text.get_text()), kind
        if kind != 'fig2':
            assert any(
                f'on {odd} (' in text.replace('\n', ' ') and f', {odd}.v2, seed' in text.replace('\n', ' ') for text in said
            )
        if kind == 'run':
            assert [text.get_text() for text in panels(fig)[0].get_legend().get_texts()] == titles
    for kind, given in (('run', run), ('fig2', odd)):
        assert len(plot.draw(kind, [given], Path(f'{kind}.png'))) == 2
    assert capfd.readouterr() == ('', '') and not [w for w in recwarn if issubclass(w.category, UserWarning)]


def test_many_users_are_drawn_as_their_mean(place):
    names = [f'user {i}' for i in range(30)]
    run = pretend('out/a', [[*range(10, 40)], [*range(5, 35)]], users=names, dataset='elsewhere')
    fig = plot.overview('plot', [run])
    (ax,) = panels(fig)
    assert {k: [*map(list, v)] for k, v in lines_of(ax).items()} == {
        'mean of the users tested in a round (30 in all)': [[1, 2], [24.5, 19.5]]
    }
    assert ax.get_xlabel() == 'communication round' and ax.get_ylabel() == 'test perplexity'  # its data is gone: no unit


def test_a_run_that_cannot_be_written(place, capsys, monkeypatch):
    def read_only(*_, **__):
        raise OSError(30, 'Read-only file system')

    run = pretend('out/a', [[6, 5], [5, 4]])
    monkeypatch.setattr(plot.Figure, 'savefig', read_only)
    with pytest.raises(SystemExit):
        plot.main(['run', run])
    assert 'Read-only file system' in capsys.readouterr().err


def test_a_run_that_is_overwritten_loses_its_pictures(train):
    out = train('--rounds=1').out
    assert not [*out.glob('plot.*')]  # a run draws nothing itself
    assert all(file.exists() for file in plot.run(out)) and len([*out.glob('plot.*')]) == 2
    train('--rounds=0', '--overwrite')
    assert not [*out.glob('plot.*')] and (out / 'summary.json').exists()


def test_nothing_is_clipped_and_nothing_is_small(place):
    """Every text lies within the picture and has at least 8 points on 3.4 inches."""
    scores = [[0.7, 0.3], [0.4, 0.6]]
    names = ('local', 'fedavg', 'ffa_lora', 'pcl', 'centralized', 'comigs_2s', 'comigs_2g', 'comigs_1g1s')
    runs = [pretend(f'out/{m}', [[6, 5], [4, 3]], scores, [[0.9, 0.1], [0.2, 0.8]], method=m) for m in names]
    for kind, given in (
        ('fig3', runs),
        ('fig6', [pretend(f'out/{n}', [[6, 5]], method='comigs_1gxs', n_experts=[n, n]) for n in (1, 2, 4, 8)]),
        ('fig4', runs[:1]),
        ('fig9', runs[:1]),
        ('fig2', ['tiny']),
        ('trust', runs[:1]),
        ('run', runs[:1]),
    ):
        with matplotlib.style.context(plot.STYLE):
            fig = plot.PICTURES[kind](kind, given)
            fig.draw_without_rendering()
            box = fig.get_tightbbox()  # inches: of all that is drawn
        assert min(box.x0, box.y0) >= 0 and box.x1 <= fig.get_figwidth() == 3.4 and box.y1 <= fig.get_figheight(), kind
        assert min(text.get_fontsize() for text in fig.findobj(matplotlib.text.Text)) >= 8, kind


def test_the_same_input_is_the_same_bytes(place):
    run = pretend('out/a', [[6, 5], [4, 3]], scores=[[0.7, 0.3], [0.4, 0.6]])
    names = {kind: ('tiny' if kind == 'fig2' else run) for kind in ('fig2', 'fig4', 'fig9', 'run')}
    first, second = ([plot.draw(kind, [of], Path(f'{n}/{kind}.png')) for kind, of in names.items()] for n in 'xy')
    for one, other in zip(sum(first, []), sum(second, [])):
        assert one.read_bytes() == other.read_bytes() and one.stat().st_size < 200_000, one
    svg = Path('x/fig4.svg').read_text()
    assert '<svg' in svg and 'dc:date' not in svg


def test_the_command_line(place, capsys):
    run, other = pretend('out/a', [[6, 5]]), pretend('out/b', [[6, 5]], method='local')
    plot.main(['fig3', run, other, '--out=here/x.png'])
    assert capsys.readouterr().out == 'here/x.png\nhere/x.svg\n' and Path('here/x.png').read_bytes()[:4] == b'\x89PNG'
    plot.main(['run', run, other])
    assert all(Path(folder, file).exists() for folder in (run, other) for file in ('plot.png', 'plot.svg'))


@pytest.mark.parametrize(
    'argv, says',
    [
        (['fig3', 'out/none'], 'out/none/config.json cannot be read'),
        (['run', 'out/a', 'out/none'], 'out/none/config.json cannot be read'),
        (['fig3'], 'required: RUN'),
        (['fig2', 'nowhere'], 'data/nowhere/meta.json cannot be read'),
        (['fig4', 'out/a'], 'out/a has no scores of experts'),
        (['fig4', 'out/scores', 'out/scores-2g'], 'draws one experiment'),
        (['fig3', 'out/a', 'out/mixture'], 'out/a and out/mixture cannot be compared: target is own and mixture'),
        (['fig3', 'out/a', 'out/a'], 'out/a repeats another run: CoMiGS-1G1S 2 experts, seed 42'),
        (['fig3', 'out/begun'], 'out/begun has no evaluations: no tested user'),
        (['fit', 'out/a'], 'out/a: no validation text was evaluated: train it with --eval_valid=True'),
        (['fig9', 'out/unfinished'], 'out/unfinished/summary.json cannot be read'),
        (['fig3', 'out/broken'], 'out/broken/metrics.jsonl cannot be read'),
        *((['run', f'out/{name}'], f'out/{name}/metrics.jsonl cannot be read') for name in ('list', 'cut', 'number')),
        (['fig3', 'out/no config'], 'out/no config/config.json cannot be read'),
        (['fig9', 'out/no summary'], 'out/no summary/summary.json cannot be read'),
        (['trust', 'out/a'], 'out/a has no trust matrices'),
        (['trust', 'out/a', 'out/scores'], 'draws one run'),
        (['fig5', 'out/a'], "invalid choice: 'fig5'"),
        (['fig3', 'out/a', '--dpi=3'], 'unrecognized arguments: --dpi=3'),
    ],
)
def test_bad_input_is_one_line(argv, says, place, capsys):
    pretend('out/a', [[6, 5]])
    pretend('out/scores', [[6, 5]], scores=[[0.7, 0.3]])
    pretend('out/scores-2g', [[6, 5]], scores=[[0.7, 0.3]], method='comigs_2g')
    pretend('out/mixture', [[6, 5]], target='mixture')
    pretend('out/begun', [[]])
    Path(pretend('out/unfinished', [[6, 5]]), 'summary.json').unlink()
    Path(pretend('out/broken', [[6, 5]]), 'metrics.jsonl').write_text('{"kind": "eval", "when": "loc')
    for name, text in (('list', '[]\n'), ('cut', '{"kind": "tra'), ('number', '5\n')):
        Path(pretend(f'out/{name}', [[6, 5]]), 'metrics.jsonl').open('a').write(text)
    Path(pretend('out/no config', [[6, 5]]), 'config.json').write_text('[]')
    Path(pretend('out/no summary', [[6, 5]]), 'summary.json').write_text('[]')
    before = sorted(place.rglob('*'))
    with pytest.raises(SystemExit) as end:
        plot.main(argv)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count('\n') == 1 and says in err
    assert sorted(place.rglob('*')) == before
