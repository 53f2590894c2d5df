"""What a sweep adds to its runs: two worker processes against one, and the overhead per run.

Beside it the floor, the same runs by bare processes without a sweep, with the same settings: what two of them
lose there, the machine takes (memory, cache, pace).

    python benchmarks/sweep.py                  # a few minutes
    python benchmarks/sweep.py --json out.json
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from wib_nbdev.config import TrainConfig
from wib_nbdev.data import load
from wib_nbdev.sweep import SETTINGS, grid, run_sweep
from wib_nbdev.training import train


def configs_of(n_runs: int, epochs: int) -> list[TrainConfig]:
    return grid(sample=True, epochs=epochs, dataset='fashion_mnist', seed=range(n_runs))


def measure(n_runs: int, epochs: int, n_jobs: int) -> dict[str, float]:
    "Wall time of a sweep whose workers are warm, and the time that its runs took themselves."
    with tempfile.TemporaryDirectory() as store:
        warm = grid(sample=True, epochs=1, dataset='fashion_mnist', seed=range(100, 100 + n_jobs))
        run_sweep(warm, Path(store) / 'warm', n_jobs=n_jobs, progress=False)
        configs = configs_of(n_runs, epochs)
        clock = time.perf_counter()
        results = run_sweep(configs, Path(store) / 'runs', n_jobs=n_jobs, progress=False)
        wall = time.perf_counter() - clock
    return dict(n_jobs=n_jobs, runs=n_runs, wall=wall, runs_themselves=results.runs['seconds'].sum() / n_jobs,
                overhead_per_run=(wall - results.runs['seconds'].sum() / n_jobs) / n_runs)


def be_bare(n_runs: int, epochs: int) -> None:
    "A bare process: warms up, says so, and runs when it is told to."
    images = load('fashion_mnist', sample=True)
    train(configs_of(1, 1)[0], images, progress=False)
    print('ready', flush=True)
    sys.stdin.readline()
    for config in configs_of(n_runs, epochs): train(config, images, progress=False)
    print('done', flush=True)


def bare(n_runs: int, epochs: int, n_jobs: int) -> float:
    "Wall time of the runs, shared out among bare processes."
    words = [sys.executable, __file__, '--bare', '--runs', str(n_runs // n_jobs), '--epochs', str(epochs)]
    options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **SETTINGS})
    processes = [subprocess.Popen(words, **options) for _ in range(n_jobs)]
    for process in processes: assert process.stdout.readline() == 'ready\n'
    clock = time.perf_counter()
    for process in processes: print(file=process.stdin, flush=True)
    for process in processes: assert process.stdout.readline() == 'done\n'
    return time.perf_counter() - clock


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument('--runs', type=int, default=12, help='an even number')
    parser.add_argument('--epochs', type=int, default=60, help='of the sample; 60 are one of the full data')
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--json', type=Path)
    parser.add_argument('--bare', action='store_true', help='be one of the bare processes')
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.bare: return be_bare(options.runs, options.epochs)
    rows = []
    for repeat in range(options.repeats):
        one, two = (measure(options.runs, options.epochs, n_jobs) for n_jobs in (1, 2))
        floor = [bare(options.runs, options.epochs, n_jobs) for n_jobs in (1, 2)]
        efficiency, of_bare = one['wall'] / (2 * two['wall']), floor[0] / (2 * floor[1])
        rows.append(dict(repeat=repeat, one=one, two=two, efficiency=efficiency, bare=floor,
                         bare_efficiency=of_bare))
        print(f"{options.runs} runs: one process {one['wall']:.1f} s, two {two['wall']:.1f} s, "
              f"efficiency {efficiency:.2f}; "
              f"overhead per run {one['overhead_per_run']:.2f} and {two['overhead_per_run']:.2f} s; "
              f"bare processes {floor[0]:.1f} and {floor[1]:.1f} s, efficiency {of_bare:.2f}", flush=True)
    if options.json: options.json.write_text(json.dumps(rows, indent=2))


if __name__ == '__main__': main()
