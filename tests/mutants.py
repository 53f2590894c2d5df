"""Seeds faults, one at a time, and shows that a test catches each: python tests/mutants.py [NAME ...]

A fault is a behaviour, and a patch brings it about: texts that stand once in a module, and what takes their
place. A text that is not there, or there twice, is an error, as is a test that fails without the fault. The
patch goes into the generated module of a copy of the working tree. There runs first the test that is
expected to fail, then the tests of the module, then its notebook, whose own cells get the patch as well,
since they define the functions anew.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import nbformat

ROOT = Path(__file__).parents[1]


class Patch(NamedTuple):
    module: str
    edits: dict[str, str]  # what stands in the module, and what takes its place
    test: str  # where it is expected to be caught: a file of tests, or file::test


class Fault(NamedTuple):
    name: str
    behaviour: str
    patch: Patch


class NoPatch(Exception):
    "A patch that no longer applies."


def copy_tree(tree: Path) -> None:
    "The files of the working tree that git would commit."
    listing = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in names.split('\0'):
        if not name or not (ROOT / name).is_file(): continue
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())


def edit(text: str, edits: dict[str, str], where: Path) -> str:
    for before, after in edits.items():
        if text.count(before) != 1: raise NoPatch(f'{where.name} has {text.count(before)} times {before!r}')
        text = text.replace(before, after)
    return text


def notebook_of(tree: Path, module: str) -> Path:
    "The one that exports to the module: a chapter may have the name of another's."
    line = f'"#| default_exp {module}"'
    return next(path for path in (tree / 'nbs').rglob('*.ipynb') if line in path.read_text('utf-8'))


def edit_notebook(path: Path, edits: dict[str, str]) -> str:
    notebook, left = nbformat.read(path, 4), dict(edits)
    for cell in notebook.cells:
        if not re.search(r'^#\| *export', cell.source, re.M): continue
        for before in [each for each in left if each in cell.source]:
            cell.source = edit(cell.source, {before: left.pop(before)}, path)
    if left: raise NoPatch(f'{path.name} exports no {next(iter(left))!r}')
    return nbformat.writes(notebook)


def first_failure(tree: Path, test: str) -> str:
    "The id of the first test that fails, of a file of tests or of one test; '' if none does."
    cache = tree / '.pytest_cache' / 'v' / 'cache' / 'lastfailed'
    cache.unlink(missing_ok=True)
    # Without bytecode: a file that is patched twice within a second would not be read again.
    env = dict(os.environ, PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE='1', OMP_NUM_THREADS='1')
    command = [sys.executable, '-m', 'pytest', '-x', '-q', '--tb=short', test]
    run = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if run.returncode == 0: return ''
    if run.returncode != 1: raise NoPatch(f'pytest ends with {run.returncode}: {run.stdout[-500:]}')
    return next(iter(json.loads(cache.read_text())))


def try_fault(tree: Path, patch: Patch) -> str:
    "What happens with a fault: 'caught by ...', 'SURVIVED', or why that cannot be said."
    module = tree / 'wib_nbdev' / f'{patch.module}.py'
    notebook = notebook_of(tree, patch.module)
    tests = [patch.test, f'tests/test_{patch.module}.py',
             f"tests/test_notebooks.py::test_notebook[{notebook.relative_to(tree / 'nbs')}]"]
    tests = [test for test in dict.fromkeys(tests) if (tree / test.split('::')[0]).exists()]
    clean = {path: path.read_text('utf-8') for path in (module, notebook)}
    try:
        module.write_text(edit(clean[module], patch.edits, module), 'utf-8')
        notebook.write_text(edit_notebook(notebook, patch.edits), 'utf-8')
        failed = next(filter(None, (first_failure(tree, test) for test in tests)), '')
    except NoPatch as error: return f'NOT TRIED: {error}'
    finally:
        for path, text in clean.items(): path.write_text(text, 'utf-8')
    if not failed: return 'SURVIVED'
    if first_failure(tree, failed): return f'NOT TRIED: {failed} fails without the fault'
    return f"caught by {failed.removeprefix('tests/')}"


def main() -> int:
    parser = argparse.ArgumentParser(description='Seeds faults and shows that a test catches each.')
    parser.add_argument('names', nargs='*', metavar='NAME', help='faults; all if none is named')
    options = parser.parse_args()
    known = {fault.name: fault for fault in FAULTS}
    if unknown := set(options.names) - set(known): parser.error(f"no fault {', '.join(sorted(unknown))}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        for name in options.names or known:
            clock = time.perf_counter()
            said = try_fault(Path(folder), known[name].patch)
            rows.append((name, said, f'{time.perf_counter() - clock:.0f} s'))
            print(f'{name}: {known[name].behaviour}\n    {said}, {rows[-1][-1]}', flush=True)
    print(*('', *(f'{name:26} {seconds:>6}  {said}' for name, said, seconds in rows)), sep='\n')
    caught = sum(said.startswith('caught') for _, said, _ in rows)
    print(f'\n{caught} of {len(rows)} faults are caught')
    return int(caught < len(rows))


FAULTS = [
    Fault('last-field-out-of-key', 'Two configurations that differ in their last field alone have one key.',
          Patch('config', {'for each in fields(self)\n': 'for each in fields(self)[:-1]\n'},
                'tests/test_training.py::test_every_field_is_in_the_key_and_survives_a_round_trip')),
    Fault('given-axes-ignored', 'A plot draws on axes of its own and leaves those that it is given empty.',
          Patch('style', {'if ax is None: ax = plt.subplots(': 'ax = plt.subplots('},
                'tests/test_comparison.py::test_no_label_over_another_and_scales_are_shared')),
    Fault('a-layer-too-few', 'Eq. 4 counts one layer too few.',
          Patch('variance', {'**depth * input_var': '**(depth - 1) * input_var'}, 'tests/test_variance.py')),
    Fault('generator-ignored', 'Biases come from the global generator, not from the one that is given.',
          Patch('initializers', {'uniform_(layer.bias, -bound, bound, generator)':
                                 'uniform_(layer.bias, -bound, bound)'},
                'tests/test_initializers.py::test_everything_else_is_left_alone')),
    Fault('sign', 'The second moment is the variance minus the squared mean.',
          Patch('mean_shift', {'(var + mean**2).item()': '(var - mean**2).item()'},
                'tests/test_mean_shift.py')),
    Fault('stale-buffer', 'Reading B never updates its running mean.',
          Patch('activations', {'self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), 0.1)':
                                'pass'},
                'tests/test_activations.py::test_readings_b_and_c')),
    Fault('wrong-padding', 'The 5 x 5 convolution is padded as the 3 x 3 ones are.',
          Patch('models', {'padding=kernel // 2': 'padding=1'},
                'tests/test_models.py::test_it_is_the_network_that_the_paper_describes')),
    Fault('overlapping-holdout', 'The images that are held out stay among the training images.',
          Patch('data', {'index_fill_(0, out, False)': 'index_fill_(0, out, True)'},
                'tests/test_data.py::test_holdout_is_a_partition')),
    Fault('digest-unchecked', 'A file of the right length is taken for the published one.',
          Patch('data', {'elif hashlib.sha256(content).hexdigest() != layout.digests[file]:':
                         'elif not content:'},
                'tests/test_data.py::test_a_damaged_file_is_named')),
    Fault('n-minus-1', "A layer's standard deviation is that of a sample, not of a population.",
          Patch('recorder', {"(table['square'] / table['n'] - mean**2).clip(lower=0)":
                             "((table['square'] - table['n'] * mean**2) / (table['n'] - 1)).clip(lower=0)"},
                'tests/test_recorder.py')),
    Fault('near-zero-edge', 'An activation of exactly 0.05 is not near zero by the definition a <= 0.05.',
          Patch('recorder', {"NearZero('[-inf, 0.05]'": "NearZero('[-inf, 0.05)'"},
                'tests/test_recorder.py::test_definitions_count_as_their_sources_do_at_the_ends_too')),
    Fault('seed-ignored', 'The order of the images is the same for each seed.',
          Patch('training', {'manual_seed(2 * config.seed + 1)': 'manual_seed(1)'},
                'tests/test_training.py::test_arms_are_paired')),
    Fault('dropped-rename', 'A file is written under its own name, so that half of one may stand there.',
          Patch('sweep', {"path.with_name(f'.{path.name}.{os.getpid()}{_TEMPORARY}')": 'path',
                          'finally: temporary.unlink(missing_ok=True)': 'finally: pass'},
                'tests/test_sweep.py::test_a_full_disk')),
    Fault('rates-by-test-images', 'The best learning rates are chosen by the test images.',
          Patch('plan', {"""query("valid == 'holdout'")""": """query("valid == 'test'")"""},
                'tests/test_plan.py')),
    Fault('unpaired', 'Where a seed is missing, runs are paired by their place and not by their seed.',
          Patch('statistics', {'compare_pairs(a[paired], b[paired], metric': (
                    'compare_pairs(a[~np.isnan(a)][:paired.sum()], b[~np.isnan(b)][:paired.sum()], metric')},
                'tests/test_statistics.py::test_lost_and_diverged_runs_are_counted')),
    Fault('half-of-holm', 'A p value that is corrected may be lower than one that was smaller before.',
          Patch('statistics', {'np.maximum.accumulate(x[rising] * np.arange(n, 0, -1))':
                               '(x[rising] * np.arange(n, 0, -1))'},
                'tests/test_statistics.py::test_holm_is_that_of_statsmodels')),
    Fault('better-is-higher', 'A higher loss is called better.',
          Patch('statistics', {'sorted((_sign(metric) * low, _sign(metric) * high))': 'sorted((low, high))'},
                'tests/test_statistics.py::test_verdict')),
    Fault('figure-of-other-data', 'Fig. 13 shows Fashion-MNIST.',
          Patch('comparison', {"'cifar10', arms, {}": "'fashion_mnist', arms, {}"},
                'tests/test_comparison.py::test_errors_name_what_is_missing')),
    Fault('verdict-by-other-data', 'What is said of CIFAR-10 is taken from the runs on Fashion-MNIST.',
          Patch('claims', {
                    'rows = [row for row in self._compared(arm, rivals, self.at)\n'
                    '                    if row.dataset == dataset and':
                    'rows = [row._replace(dataset=dataset) for row in self._compared(arm, rivals, self.at)\n'
                    '                    if row.dataset == DATASETS[0] and'},
                'tests/test_claims.py::test_each_judge_gives_each_verdict_that_it_can')),
    Fault('calibrated-too-late', 'Each shift is found while the units before it have their old ones.',
          Patch('surgery', {
                    'if self.first: _set_shift(unit, self.pooled[unit][1])': '',
                    'self.run(each)\n            self.passes += 1':
                    'self.run(each)\n            self.passes += 1\n'
                    '            for unit, (_, mean) in self.pooled.items(): _set_shift(unit, mean)'},
                'tests/test_surgery.py::test_it_is_what_a_pass_for_each_layer_finds')),
    Fault('mask-inverted', 'The clamp of a folded unit keeps what lies below the shift and drops the rest.',
          Patch('surgery', {'return torch.maximum(x, floor)': 'return torch.minimum(x, floor)'},
                'tests/test_surgery.py::test_folding_is_exact_at_borders_too')),
    Fault('not-escaped', 'Text that comes from outside is markup in the report.',
          Patch('report', {'autoescape=True': 'autoescape=False'},
                'tests/test_report.py::test_whatever_comes_from_outside_is_text')),
    Fault('exit-code', '`wib-nbdev data` ends with 0 whatever is missing or damaged.',
          Patch('cli', {"return int((table['status'] != 'whole').any())": 'return 0'},
                'tests/test_cli.py::test_data_tells_damaged_from_missing')),
    Fault('swapped-arm', 'The arms with the kept and the shrunk second moment have changed places.',
          Patch('depth', {"'calibrated': ('relu', 'relu_shrunk',": "'calibrated': ('relu_shrunk', 'relu',"},
                'tests/test_depth.py::test_the_arms_of_a_factorial_stand_in_their_places')),
]

if __name__ == '__main__': sys.exit(main())
