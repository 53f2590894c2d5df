"""What a sweep adds to its runs: two worker processes against one, and the overhead per run.

    python benchmarks/sweep.py                  # a few minutes
    python benchmarks/sweep.py --json out.json
"""
import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from wib_nbdev.sweep import grid, run_sweep


def measure(n_runs: int, epochs: int, n_jobs: int) -> dict[str, float]:
    "Wall time of a sweep whose workers are warm, and the time that its runs took themselves."
    with tempfile.TemporaryDirectory() as store:
        warm = grid(sample=True, epochs=1, dataset='fashion_mnist', seed=range(100, 100 + n_jobs))
        run_sweep(warm, Path(store) / 'warm', n_jobs=n_jobs, progress=False)
        configs = grid(sample=True, epochs=epochs, dataset='fashion_mnist', seed=range(n_runs))
        clock = time.perf_counter()
        results = run_sweep(configs, Path(store) / 'runs', n_jobs=n_jobs, progress=False)
        wall = time.perf_counter() - clock
    return dict(n_jobs=n_jobs, runs=n_runs, wall=wall, runs_themselves=results.runs['seconds'].sum() / n_jobs,
                overhead_per_run=(wall - results.runs['seconds'].sum() / n_jobs) / n_runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=int, default=12)
    parser.add_argument('--epochs', type=int, default=60, help='of the sample: sixty take as long as one of the full data')
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--json', type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for repeat in range(options.repeats):
        one, two = (measure(options.runs, options.epochs, n_jobs) for n_jobs in (1, 2))
        rows.append(dict(repeat=repeat, one=one, two=two, efficiency=one['wall'] / (2 * two['wall'])))
        print(f"{options.runs} runs: one process {one['wall']:.1f} s, two {two['wall']:.1f} s, efficiency {rows[-1]['efficiency']:.2f}; "
              f"overhead per run {one['overhead_per_run']:.2f} and {two['overhead_per_run']:.2f} s", flush=True)
    if options.json: options.json.write_text(json.dumps(rows, indent=2))


if __name__ == '__main__': main()
