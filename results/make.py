"""The committed full reproduction: runs what is lacking of it, merges it into this folder, and writes this folder's README.

    python results/make.py            # hours; stopped at any time, the same command goes on
    python results/make.py --merge    # only merge what the store holds
"""
import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

import pandas as pd

from wib_nbdev import sweep
from wib_nbdev.claims import judge
from wib_nbdev.comparison import run_full_plan, with_arms

HERE = Path(__file__).parent
ROOT = HERE.parent
SHIPPED = ROOT / 'wib_nbdev' / 'results'  # what goes into the wheel: all but the layers
FILES = ('runs.csv', 'epochs.parquet', 'layers.parquet', 'verdicts.csv')


def git(*words: str) -> str:
    return subprocess.run(['git', '-C', str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()


def markdown(frame: pd.DataFrame) -> str:
    "A Markdown table of a frame, index and all."
    flat = frame.reset_index()
    rows = [list(flat.columns), ['---'] * flat.shape[1], *flat.to_numpy().tolist()]
    return '\n'.join(f"| {' | '.join(map(str, row))} |" for row in rows)


def criteria_commit(commits: set[str]) -> str:
    """When the criteria were first committed, 'ID of DATE'; every run must have been made after, from a commit that is known here.
    `ValueError` for one that was not, since the text of README.md says so."""
    criteria = git('log', '--diff-filter=A', '--format=%h of %ci', '--', 'nbs/11_claims.ipynb').splitlines()[-1]
    for commit in commits:
        try: git('merge-base', '--is-ancestor', criteria.split()[0], commit or 'none')
        except subprocess.CalledProcessError as error:
            raise ValueError(f'runs were made by commit={commit!r}, no descendant of {criteria} (a + is an edited checkout, nothing an '
                             'installed library): make them again from a commit, then merge') from error
    return criteria


def digest(path: Path) -> str: return hashlib.sha256(path.read_bytes()).hexdigest()


def readme(results: sweep.Results) -> str:
    "What these files are, where they come from, and how to get them again."
    runs = with_arms(results).runs
    planned = sweep.full_plan()
    whole = runs['key'].isin([config.key for config in planned]).sum()
    per_arm = runs.groupby(['dataset', 'valid', 'optimizer', 'lr', 'arm'])['seed'].nunique().unstack('arm', fill_value=0)
    per_arm = per_arm[[arm for arm in sweep.ARMS if arm in per_arm]]
    made_on = runs.groupby(['processor', 'ran_on', 'threads', 'system', 'python', 'torch', 'numpy', 'commit']).size().to_frame('runs')
    hours = runs['seconds'].sum() / 3600
    criteria = criteria_commit(set(runs['commit']))
    files = '\n'.join(f'| `{name}` | {(HERE / name).stat().st_size / 1e6:.2f} MB | `{digest(HERE / name)}` |' for name in FILES)
    return f'''<!-- Written by results/make.py (make results): do not edit. -->
# The full reproduction

Full Fashion-MNIST and CIFAR-10, 20 epochs, batches of 256. {len(runs)} runs, together {hours:.1f} hours of one thread.
{whole} of the {len(planned)} planned runs are here, and {len(runs) - whole} more at the best rates that follow from them: ten for each
arm and data set, save where the best rate is the main one, whose runs serve for both. This makes them, and goes on where some are lacking:

```bash
make results      # or, on a cluster, wib-nbdev reproduce --preset paper --cluster tcp://HOST:8786, then python results/make.py --merge
```

The criteria that judge these runs (`nbs/11_claims.ipynb`) were first committed as {criteria}, before any of them; each run's
`commit` descends from that one. They were not written blind. Pilot runs had been seen (ReLU, ELU and a shift of 0.4 with Adam 0.004: one
run each, then four seeds over twenty epochs on both data sets), and the one-epoch runs of notebook 08; the learning rate was chosen by
such runs. Written after the first of the runs here: the rule for the mark of the first page, the claims whose reading says so, and what a
verdict's last column reports beside its criterion. Judged more strictly since: `fig9_start` and `zero_one`, which ask one reading to
meet them whole, and `fig11_means`, which asks each data set by itself.

## Seeds of each arm

{markdown(per_arm)}

## Where they were made

`seconds` is a run's wall time with other runs, and sometimes other work, beside it on the same machine: not a benchmark.

{markdown(made_on)}

## Files

| file | size | SHA-256 |
|---|---|---|
{files}

- `runs.csv`: a line a run: key, configuration, status, seconds, versions.
- `epochs.parquet`: key, epoch, split, loss (nats), accuracy (share), seconds.
- `layers.parquet`: key, iteration (every second), layer, mean, std (population), inactive and near-zero shares
  (`wib_nbdev.recorder.NEAR_ZERO`), in float32.

- `verdicts.csv`: a line a claim, as `wib_nbdev.claims.judge` gives it for these files.

`wib_nbdev/results` holds copies of all but the layers, which the wheel ships. `wib_nbdev.sweep.load_results('results')` reads this folder.
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--store', type=Path, default=ROOT / 'runs' / 'paper', help='folder of the runs, a file each')
    parser.add_argument('--root', type=Path, default=None, help='folder of the full data (default: WIB_DATA, else data)')
    parser.add_argument('--jobs', type=int, default=-1, help='worker processes (default: one a core)')
    parser.add_argument('--merge', action='store_true', help='run nothing')
    options = parser.parse_args()
    try:
        if (HERE / 'runs.csv').exists(): print(f'{sweep.restore_runs(HERE, options.store)} committed runs put into {options.store}')
    except sweep.SweepError as error: sys.exit(f'{error} (delete {HERE}/runs.csv and name another --store)')
    if not options.merge and sweep._commit().endswith('+'): sys.exit('wib_nbdev/ was edited: commit first, for runs name what made them')
    results = sweep.load_results(options.store) if options.merge else run_full_plan(options.store, n_jobs=options.jobs, root=options.root)
    try: criteria_commit(set(results.runs['commit']))  # before anything is overwritten
    except ValueError as error: sys.exit(str(error))
    except (OSError, subprocess.CalledProcessError, IndexError): sys.exit('needs git and a clone with its history: the criteria are there')
    sweep.write_results(results, HERE)
    sweep.write_results(results._replace(layers=pd.DataFrame()), SHIPPED)
    verdicts = judge(sweep.load_results(HERE))
    for folder in (HERE, SHIPPED): verdicts.to_csv(folder / 'verdicts.csv', index=False)
    (HERE / 'README.md').write_text(readme(results))
    print(f'{len(results.runs)} runs are in {HERE}')


if __name__ == '__main__': main()
