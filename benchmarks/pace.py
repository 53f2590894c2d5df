"""Seconds of an epoch of each of the paper's networks, in turns: what the report multiplies epochs with.

    python benchmarks/pace.py --root data

In each turn every network trains on the same 6,400 images in batches of 256, one thread, in an order that
changes; the seconds are scaled to an epoch. A slow moment of the machine meets all networks of a turn, so
only ratios within a turn are used. Writes `wib_nbdev/results/pace.csv`.
"""
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
import tyro
from tqdm import tqdm

from wib_nbdev.config import TrainConfig
from wib_nbdev.data import load
from wib_nbdev.plan import PAPER_ARMS
from wib_nbdev.style import PAPER_LABELS
from wib_nbdev.training import train

OUT = Path(__file__).parents[1] / 'wib_nbdev' / 'results' / 'pace.csv'
N_IMAGES = 6400


@dataclass
class Options:
    """An epoch of each network, in turns."""
    root: Path | None = None  # folder of the full data (default: WIB_DATA, else data)
    turns: int = 40  # of each data set
    out: Path = OUT  # where to write the seconds


def main(options: Options) -> None:
    torch.set_num_threads(1)
    draw, rows = random.Random(0), []
    for dataset in PAPER_LABELS:
        whole = load(dataset, options.root)
        scale = len(whole.y_train) / N_IMAGES
        data = replace(whole, x_train=whole.x_train[:N_IMAGES], y_train=whole.y_train[:N_IMAGES],
                       x_test=whole.x_test[:500], y_test=whole.y_test[:500])
        for turn in tqdm(range(-1, options.turns), dataset):  # turn -1 warms up
            for arm in draw.sample(PAPER_ARMS, len(PAPER_ARMS)):
                config = TrainConfig(dataset=dataset, activation=arm, epochs=1, device='cpu')
                result = train(config, data, progress=False)
                seconds = result.epochs.set_index('split')['seconds']['train'] * scale
                where = {name: result.environment[name] for name in ('processor', 'torch')}
                rows.append(dict(dataset=dataset, turn=turn, arm=arm, seconds=round(seconds, 4), **where))
    pace = pd.DataFrame(rows).query('turn >= 0')
    pace.to_csv(options.out, index=False)
    seconds = pace.groupby(['dataset', 'arm'], sort=False)['seconds']
    print(seconds.quantile([0.25, 0.5, 0.75]).unstack().to_string())


if __name__ == '__main__': main(tyro.cli(Options))
