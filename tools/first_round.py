"""The first 513 runs (seeds 0 to 9), read from the history of this repository.

    python tools/first_round.py rate       # the rate nearest the printed numbers, that of the main setting
    python tools/first_round.py compare    # its effects beside those of the committed results
"""
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from wib_nbdev.plan import SETTINGS, with_arms
from wib_nbdev.statistics import PUBLISHED, effect_in_words, paired_differences, run_values, select
from wib_nbdev.sweep import Results, load_results

ROOT = Path(__file__).parents[1]
COMMIT = '788d0e1'  # the last one that holds them


def first_round() -> Results:
    "The merged results of the first round, without layers."
    with tempfile.TemporaryDirectory() as folder:
        for name in ('runs.csv', 'epochs.parquet'):
            show = ['git', '-C', str(ROOT), 'show', f'{COMMIT}:results/{name}']
            (Path(folder) / name).write_bytes(subprocess.run(show, check=True, capture_output=True).stdout)
        return load_results(folder)


def rate_table(results: Results) -> pd.DataFrame:
    """WIB-ReLU on Fashion-MNIST, last epoch, test images: means over seeds, and distances from the printed
    numbers in units of 10 % of a loss and one point of accuracy."""
    runs = with_arms(results).runs.query("arm == 'wib_relu' and dataset == 'fashion_mnist'")
    values = run_values(results._replace(runs=runs)).merge(runs[['key', 'valid']], on='key')
    means = values.pivot_table(index=['valid', 'optimizer', 'lr'], columns='metric', values='value')
    means = means[list(PUBLISHED)]
    room = pd.Series({metric: 0.01 if 'accuracy' in metric else 0.1 * value
                      for metric, value in PUBLISHED.items()})
    distances = (means - pd.Series(PUBLISHED)).abs() / room
    return means.assign(largest_distance=distances.max(axis=1), sum_of_distances=distances.sum(axis=1))


def compare(old: Results, new: Results) -> pd.DataFrame:
    "WIB-ReLU minus each rival with Adam 0.004, last epoch: effect and 95 % interval of both rounds."
    frames = []
    for results in (old, new):
        rows = paired_differences(select(results, valid='test', sample=False, **SETTINGS['Adam 0.004']))
        words = [effect_in_words(row) for row in rows.itertuples()]
        frames.append(rows.assign(words=words).set_index(['dataset', 'metric', 'rival'])['words'])
    return pd.concat(frames, axis=1, keys=['first round, seeds 0 to 9', 'second round, seeds 10 to 19'])


if __name__ == '__main__':
    match sys.argv[1:]:
        case ['rate']: print(rate_table(first_round()).round(3).to_string())
        case ['compare']: print(compare(first_round(), load_results()).reset_index().to_string(index=False))
        case _: sys.exit(__doc__)
