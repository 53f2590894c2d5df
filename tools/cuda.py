"""What only a machine with a CUDA device can show, in one table: `make cuda`.

It should take eight minutes. Only the tests have been run on a GPU so far.

    python tools/cuda.py --root data --out cuda.md

Runs the tests marked cuda, each notebook that has CUDA cells, and one epoch beside its rivals on the device;
ends with exit code 1 if anything failed.
"""
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import torch
import tyro

PROJECT = Path(__file__).parents[1]
BENCHMARK = PROJECT / 'benchmarks' / 'training.py'


@dataclass
class Options:
    """What only a machine with a CUDA device can show, in one table."""
    root: Path = Path('data')  # folder of Fashion-MNIST
    out: Path | None = None  # where to write the table, as Markdown


def python(*arguments: str | Path) -> bool:
    return not subprocess.run([sys.executable, *map(str, arguments)], cwd=PROJECT).returncode


def tests(folder: Path) -> list[dict[str, str]]:
    "A row for each test that is marked cuda."
    python('-m', 'pytest', '-m', 'cuda', f'--junitxml={folder / "tests.xml"}')
    cases = ElementTree.parse(folder / 'tests.xml').iter('testcase')
    return [dict(what=case.attrib['name'], result=case[0].tag if len(case) else 'passed',
                 seconds=f"{float(case.attrib['time']):.1f}") for case in cases]


def notebooks() -> list[dict[str, str]]:
    "A row for each notebook that has a CUDA cell, all of it."
    rows = []
    for path in sorted(PROJECT.glob('nbs/**/*.ipynb')):
        if '"#| cuda' not in path.read_text(): continue
        clock = time.perf_counter()
        test = f"nbdev_test(path={str(path)!r}, flags='cuda', n_workers=0)"
        passed = python('-c', f'from nbdev.test import nbdev_test; {test}')  # which reads no options after -c
        rows.append(dict(what=f'{path.name} with its CUDA cells', result='passed' if passed else 'failed',
                         seconds=f'{time.perf_counter() - clock:.0f}'))
    return rows


def benchmark(root: Path, folder: Path) -> list[dict[str, str]]:
    "A row for each rival: an epoch of Fashion-MNIST, and small ones in turns with the floor."
    numbers = folder / 'training.json'
    options = ['--device', 'cuda', '--rounds', '1', '--turns', '10']
    if not python(BENCHMARK, '--root', root.absolute(), *options, '--out', numbers):
        return [dict(what='benchmarks/training.py', result='failed')]
    report = json.loads(numbers.read_text())
    whole, turns = pd.DataFrame(report['whole_epochs']), pd.DataFrame(report['small_epochs'])
    ratios = turns.div(turns.iloc[:, 0], axis=0).median()
    seconds = whole.groupby('rival', sort=False)['seconds'].min()
    return [dict(what=f'an epoch, {rival}', result=f'{ratios[rival]:.2f} times the floor',
                 seconds=f'{each:.2f}') for rival, each in seconds.items()]


def main(options: Options) -> int:
    if not torch.cuda.is_available(): sys.exit(f'torch {torch.__version__} finds no CUDA device here')
    lines = [f'{torch.cuda.get_device_name()}, torch {torch.__version__}', '',
             '| what | result | seconds |', '|---|---|---|']
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in (lambda: tests(folder), notebooks, lambda: benchmark(options.root, folder)):
            lines += [f"| {row['what']} | {row['result']} | {row.get('seconds', '')} |" for row in part()]
            # After each part: what a machine that is taken away has found stays.
            if options.out: options.out.write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))
    return int(any(f'| {bad} |' in line for line in lines for bad in ('failed', 'failure', 'error')))


if __name__ == '__main__': sys.exit(main(tyro.cli(Options, description=__doc__)))
