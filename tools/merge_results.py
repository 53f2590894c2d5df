"""The committed full reproduction: make its runs, merge what is finished, and publish the whole.

    python tools/merge_results.py run        # takes hours; after a stop, the same command continues
    python tools/merge_results.py merge      # what the store holds, into results_next/
    python tools/merge_results.py publish    # results_next/, once complete, into the package, with verdicts
    python tools/merge_results.py judge      # judge the results in the package again, as after a new claim
    python tools/merge_results.py depth      # the runs of the depth experiment (hours), into the package
"""
import argparse
import hashlib
import io
import json
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from first_round import compare, first_round

from wib_nbdev.claims import CLAIMS, judge, robustness
from wib_nbdev.depth import (
    DEPTH_TEXTS,
    EQUAL,
    SEEDS,
    THEORIES,
    initial_signals,
    load_runs,
    merge_runs,
    run_depth_plan,
    trial_plan,
)
from wib_nbdev.plan import ARMS, best_rate_plan, edge_plan, full_plan, run_plan, with_arms
from wib_nbdev.report import as_markdown
from wib_nbdev.sweep import Results, SweepError, load_results, restore_runs, write_results

ROOT = Path(__file__).parents[1]
NEXT, PACKAGE = ROOT / 'results_next', ROOT / 'wib_nbdev' / 'results'
CRITERIA = '507e505'  # the commit of the claims and their criteria, before the first run
DEPTH_CRITERIA = 'd22e768'  # and that of the statements about depth, also before any of their runs
FIELDS = ('place', 'theme', 'needs', 'quantity', 'quote', 'reading', 'criterion', 'threshold_from', 'varies')
MENDED = {  # judges whose code has changed in meaning since that commit; the last alone can decide more
    ('smooth', 'unit_smooth', 'default_unsmooth'):
        'a comparison of fewer than eight pairs of finished runs is undecided, as in the other claims',
    ('mitigates', 'fig7_cifar', 'fig9_improves', 'fig10', 'fig10_gradient', 'fig11_swings', 'fig11_range',
     'corrects'): 'a comparison of fewer than two common seeds is undecided; one had counted as exact',
    ('outperforms', 'optimal', 'several', 'equal_loss', 'fig12', 'fig13_train', 'fig13_valid', 'gain_fix'):
        'equal means count as equal in the exact p of a difference of accuracies (a201391)',
    ('speed',): 'a setting of the grid at which a run diverged sets no target, as it is no best rate',
}


def git(*words: str) -> str:
    command = ['git', '-C', str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def missing_keys(results: Results) -> set[str]:
    "The keys of the plan that the results lack; the best rates follow from the rest."
    planned = {config.key for config in full_plan()}
    held = set(results.runs['key'])
    if planned <= held:
        planned |= {config.key for follow in (edge_plan, best_rate_plan) for config in follow(results)}
    return planned - held


def check_provenance(commits: set[str], criteria: str = CRITERIA) -> None:
    "`SystemExit` unless each run was made by a commit that descends from that of the criteria."
    for commit in commits:
        try: git('merge-base', '--is-ancestor', criteria, commit or 'none')
        except subprocess.CalledProcessError:
            sys.exit(f'runs were made by commit {commit!r}, no descendant of the criteria ({criteria}): '
                     "make these runs again, or leave them out; do not change the criteria's commit")


def print_then(code: str) -> str:
    "What Python code prints with the package of the criteria's commit."
    with tempfile.TemporaryDirectory() as folder:
        archive = ['git', '-C', str(ROOT), 'archive', CRITERIA, 'wib_nbdev']
        files = subprocess.run(archive, capture_output=True, check=True).stdout
        subprocess.run(['tar', '-x', '-C', folder], input=files, check=True)
        ask = [sys.executable, '-c', code]
        return subprocess.run(ask, cwd=folder, capture_output=True, text=True, check=True).stdout


@cache
def texts_then() -> dict[str, dict[str, Any]]:
    "The texts of the claims at the criteria's commit, by id, as the code of that commit reads them."
    return json.loads(print_then(
        'import json; from wib_nbdev.claims import CLAIMS\n'
        f'texts = {{each.id: {{name: getattr(each, name) for name in {FIELDS}}} for each in CLAIMS}}\n'
        'print(json.dumps(texts))'))


def texts_now() -> dict[str, dict[str, Any]]:
    "The texts of the claims, by id, in the form of `texts_then`."
    texts = {each.id: {name: getattr(each, name) for name in FIELDS} for each in CLAIMS}
    return json.loads(json.dumps(texts))  # tuples as lists


def changed_claims() -> list[str]:
    "The claims whose text, in any field, is not that of the criteria's commit."
    then, now = texts_then(), texts_now()
    return sorted(name for name in then if then[name] != now.get(name))


def added_claims() -> list[str]:
    "The claims that were added after the criteria's commit: runs that existed then could be known."
    return sorted(set(texts_now()) - set(texts_then()))


def changed_depth_claims() -> list[str]:
    "The statements about depth whose text is not that of their criteria's commit."
    then = ConfigParser(delimiters=('=',), interpolation=None)
    then.read_string(git('show', f'{DEPTH_CRITERIA}:wib_nbdev/depth.ini'))
    sections = [{name: dict(texts[name]) for name in texts.sections()} for texts in (then, DEPTH_TEXTS)]
    return sorted(name for name in {*sections[0], *sections[1]}
                  if sections[0].get(name) != sections[1].get(name))


def judged_otherwise(verdicts: pd.DataFrame, folder: Path) -> list[str]:
    "The claims of which the judges of the criteria's commit say something else, by the results in a folder."
    judged = print_then('from wib_nbdev.claims import judge; from wib_nbdev.sweep import load_results\n'
                        f'print(judge(load_results({str(folder)!r})).to_csv())')
    then, now = pd.read_csv(io.StringIO(judged)).set_index('id'), verdicts.set_index('id')
    then = then.reindex(now.index)
    words, numbers = ['verdict', 'worlds'], ['value', 'low', 'high']
    same = ((then[words].fillna('') == now[words].fillna('')).all(axis=1)
            & np.isclose(then[numbers], now[numbers], rtol=1e-6, equal_nan=True).all(axis=1))
    return list(now.index[~same])


def readme(results: Results, otherwise: list[str]) -> str:
    "What these files are, where they come from, and how to get them again; `judged_otherwise`."
    runs = with_arms(results).runs
    # In full: pandas reads seven digits, or digits and an e, as a number.
    runs['commit'] = runs['commit'].map({short: git('rev-parse', short) for short in set(runs['commit'])})
    settings = ['dataset', 'valid', 'optimizer', 'momentum', 'lr', 'arm']
    seeds = runs.groupby(settings)['seed'].nunique().unstack('arm', fill_value=0)
    where = ['processor', 'machine', 'cpu_capability', 'ran_on', 'threads', 'system', 'python', 'torch',
             'numpy', 'commit']
    made = runs.groupby(where).agg(runs=('key', 'size'), first=('made_at', 'min'), last=('made_at', 'max'))
    files = sorted(path for path in PACKAGE.iterdir() if path.suffix in ('.csv', '.parquet'))
    table = pd.DataFrame([{'file': f'`{path.name}`', 'MB': f'{path.stat().st_size / 1e6:.2f}',
                           'SHA-256': f'`{hashlib.sha256(path.read_bytes()).hexdigest()}`'}
                          for path in files])
    mended = '\n'.join(f"- {', '.join(judges)}: {what}" for judges, what in MENDED.items())
    return f'''<!-- Written by tools/merge_results.py: do not edit. -->
# The full reproduction

Full Fashion-MNIST and CIFAR-10, 20 epochs, batches of 256: {len(runs)} runs, together
{runs['seconds'].sum() / 3600:.1f} hours of one thread. The plan is in `nbs/lib/plan.ipynb`.
`make results` makes the runs that are missing.

The criteria that judge these runs (`wib_nbdev/claims.ini`) were committed as
{git('log', '-1', '--format=%H of %ci', CRITERIA)}; every run was made by a later commit. Claims whose text
was changed since: {', '.join(changed_claims()) or 'none'}; claims added since, so after some of the runs:
{', '.join(added_claims()) or 'none'}. Settings and claims were chosen after 513 earlier
runs with other seeds had been seen; none of those is used here.

Judges mended since, some after the first runs that they concern:

{mended}

Claims of which the judges as they were at that commit say something else by these runs (another verdict,
value, interval or number of worlds): {', '.join(otherwise) or 'none'}.

## Seeds of each arm

{as_markdown(seeds[[arm for arm in ARMS if arm in seeds]].reset_index())}

## Beside the first round

WIB-ReLU minus each rival with Adam 0.004, a setting of both rounds: last epoch, 95 % intervals over seeds.
The first round is in the history of the repository (`tools/first_round.py`).

{as_markdown(compare(first_round(), results).reset_index())}

## Where they were made

Every run was made in a worker process on one thread, with instructions limited to AVX2, so that the
bits are the same on any x86-64 machine with these versions (`wib-nbdev verify` checks). `seconds` is a run's
wall time while others ran on the machine: not a benchmark.

{as_markdown(made.reset_index())}

## Files

{as_markdown(table)}

- `runs.csv`: a line per run: key, configuration, status, seconds, versions, SHA-256 of the weights after the
  first and the last epoch.
- `epochs.parquet`: key, epoch, split, loss (nats), accuracy (share), seconds.
- `correct.parquet`: key, bits: which test images were right after the last epoch (`numpy.packbits`, in file
  order).
- `steps.parquet`: key, iteration, loss (nats) of the first epoch. Not in the wheel.
- `layers.parquet`: key, iteration, layer, mean, std (population), inactive and near-zero shares,
  gradient_rms. Not in the wheel.
- `curves.csv`: the learning curves in one table, for other programs: a row per run and epoch, with its arm,
  its setting, `step` (updates so far), losses (nats) and accuracies (shares). Not in the wheel.
- `verdicts.csv`, `robustness.csv`: what `wib_nbdev.claims` says of these files.
- `depth*.parquet`: see below.

{depth_readme()}'''


def depth_readme() -> str:
    "The section about the depth experiment."
    names = {'depth.parquet': 'chapter 9', 'depth_trial.parquet': "the trial of chapter 9's chart"}
    runs = pd.concat(load_runs(PACKAGE / name).drop_duplicates('key').assign(runs_of=what)
                     for name, what in names.items())
    runs['commit'] = runs['commit'].map({short: git('rev-parse', short) for short in set(runs['commit'])})
    made = runs.groupby(['runs_of', 'processor', 'torch', 'commit']).agg(
        runs=('key', 'size'), hours=('seconds', lambda seconds: f'{seconds.sum() / 3600:.1f}'),
        first=('made_at', 'min'), last=('made_at', 'max'))
    return f'''## The depth experiment

Where does a zero mean pay (chapter 9)? The plan and its statements are in `nbs/lib/depth.ipynb` and
`wib_nbdev/depth.ini`. The statements were committed as
{git('log', '-1', '--format=%H of %ci', DEPTH_CRITERIA)};
every run was made by a later commit. Statements whose text was changed or added since:
{', '.join(changed_depth_claims()) or 'none'}. Hours are those of one thread while others
ran on the machine.

{as_markdown(made.reset_index())}

- `depth.parquet`, `depth_trial.parquet`: key, family, depth, arm, seed, optimizer, lr, chosen (at the best
  rate), split (`holdout` chose the rates), loss (nats) and accuracy (share) of the last epoch, empty if the
  run diverged; seconds, versions.
- `depth_signals.parquet`: what `initial_signals` measured of the networks before training.
- `depth_epochs.parquet`: key, epoch, split, loss (nats), accuracy (share), seconds. Not in the wheel.
'''


def curves(results: Results) -> pd.DataFrame:
    "The learning curves for other programs: one row per run and epoch; `step`: updates until then."
    named = with_arms(results).runs[['key', 'dataset', 'arm', 'valid', 'optimizer', 'momentum', 'lr', 'seed']]
    epochs = results.epochs.drop(columns='seconds')
    wide = epochs.pivot(index=['key', 'epoch'], columns='split', values=['loss', 'accuracy'])
    wide.columns = [f'{split}_{metric}' for metric, split in wide.columns]
    steps = results.steps.groupby('key')['iteration'].size().rename('steps')
    table = named.merge(wide.reset_index(), on='key').merge(steps, on='key')
    table.insert(9, 'step', table['epoch'] * table.pop('steps'))
    return table.rename(columns={'valid': 'validated_on'})


def publish() -> None:
    "Makes results_next/ the results of the package."
    results = load_results(NEXT)
    if missing := missing_keys(results):
        sys.exit(f'{len(missing)} of the planned runs are missing: run and merge first')
    check_provenance(set(results.runs['commit']))
    write_results(results, PACKAGE)
    curves(results).to_csv(PACKAGE / 'curves.csv', index=False, float_format='%.6g')
    write_verdicts(results)
    print(f'{len(results.runs)} runs are in {PACKAGE.relative_to(ROOT)}; results_next/ can be deleted')


def write_verdicts(results: Results) -> None:
    "What the claims say of the results in the package, and its README."
    verdicts = judge(results)
    verdicts.to_csv(PACKAGE / 'verdicts.csv', index=False)
    robustness(results).to_csv(PACKAGE / 'robustness.csv', index=False)
    (PACKAGE / 'README.md').write_text(readme(results, judged_otherwise(verdicts, PACKAGE)))


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument('step', choices=('run', 'merge', 'publish', 'judge', 'depth'))
    parser.add_argument('--store', type=Path, default=ROOT / 'runs' / 'paper',
                        help='folder with one file per run')
    parser.add_argument('--root', type=Path, default=None,
                        help='folder of the full data (default: WIB_DATA, else data)')
    parser.add_argument('--jobs', type=int, default=-1, help='worker processes (default: one per core)')
    options = parser.parse_args()
    if options.step == 'publish': return publish()
    if options.step == 'judge': return write_verdicts(load_results(PACKAGE))
    edited = git('status', '--porcelain', '--', 'wib_nbdev', ':!wib_nbdev/results')
    if options.step in ('run', 'depth') and edited:
        sys.exit('wib_nbdev/ was edited: commit first, because runs record the commit that made them')
    if options.step == 'depth':
        store, how = options.store.parent, dict(n_jobs=options.jobs, root=options.root)
        try:
            results = run_depth_plan(store / 'depth', **how)
            tried = run_depth_plan(store / 'depth_trial', trial_plan(), **how)
        except SweepError as error: sys.exit(str(error))
        check_provenance({*results.runs['commit'], *tried.runs['commit']}, DEPTH_CRITERIA)
        merge_runs(results).to_parquet(PACKAGE / 'depth.parquet', index=False)
        merge_runs(tried).to_parquet(PACKAGE / 'depth_trial.parquet', index=False)
        results.epochs.to_parquet(PACKAGE / 'depth_epochs.parquet', index=False)
        before = initial_signals(arms=[*THEORIES, *EQUAL['mlp']['same second moment']], seeds=SEEDS)
        return before.to_parquet(PACKAGE / 'depth_signals.parquet', index=False)
    if options.step == 'run':
        if (NEXT / 'runs.csv').exists():
            print(f'{restore_runs(NEXT, options.store)} merged runs put into {options.store}')
        try: run_plan(options.store, n_jobs=options.jobs, root=options.root)
        except SweepError as error: sys.exit(str(error))
    results = load_results(options.store)
    check_provenance(set(results.runs['commit']))
    if (NEXT / 'runs.csv').exists():
        lost = set(load_results(NEXT).runs['key']) - set(results.runs['key'])
        if lost: sys.exit(f'{options.store} lacks {len(lost)} runs of {NEXT.name}/; `run` restores them')
    write_results(results, NEXT)
    print(f'{len(results.runs)} runs are in {NEXT.relative_to(ROOT)}, '
          f'{len(missing_keys(results))} of the plan are missing')


if __name__ == '__main__': main()
