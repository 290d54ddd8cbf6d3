"""Figures of a run, from its files.

python plot.py out/pcl          # out/pcl/trust.png: who trusted whom, round by round
"""

import json
import sys
from pathlib import Path

from configurator import die


def trust(run: Path) -> Path:
    """Trust matrices of up to six rounds, evenly spaced, the last one included: row i is how user i weighs the others."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    names = json.loads((run / 'config.json').read_text())['users']
    lines = [json.loads(line) for line in open(run / 'metrics.jsonl', encoding='utf-8')]
    rounds = {line['round']: (line['matrix'], [names[i] for i in line['users']]) for line in lines if line['kind'] == 'trust'}
    if not rounds:
        die(f'{run} has no trust matrices: only --aggregate=trust and --aggregate=consensus log them')
    known = sorted(rounds)
    shown = sorted({known[round(i * (len(known) - 1) / 5)] for i in range(6)})
    fig, axes = plt.subplots(1, len(shown), figsize=(1.2 + 2.1 * len(shown), 2.9), squeeze=False, layout='constrained')
    for ax, t in zip(axes[0], shown):
        matrix, present = rounds[t]
        image = ax.imshow(matrix, cmap='cividis', vmin=0, vmax=1)
        ax.set_title(f'round {t}', fontsize=9)
        ax.set_xticks(range(len(present)), present, rotation=90, fontsize=8)
        ax.set_yticks(range(len(present)), present if t == shown[0] or present != rounds[shown[0]][1] else [], fontsize=8)
        if len(present) <= 6:
            for i, row in enumerate(matrix):
                for j, w in enumerate(row):
                    ax.text(j, i, f'{w:.2f}', ha='center', va='center', fontsize=7, color='black' if w > 0.5 else 'white')
    axes[0][0].set_ylabel('user who trusts')
    fig.supxlabel('user who is trusted', fontsize=9)
    fig.colorbar(image, ax=axes, label='weight', shrink=0.8)
    fig.savefig(run / 'trust.png', dpi=150)
    plt.close(fig)
    return run / 'trust.png'


if __name__ == '__main__':
    if len(sys.argv) < 2 or sys.argv[1] in ('-h', '--help'):
        print(__doc__)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    for folder in sys.argv[1:]:
        if not (Path(folder) / 'metrics.jsonl').exists():
            die(f'{folder} is no run: it has no metrics.jsonl')
        print(trust(Path(folder)))
