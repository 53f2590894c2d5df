"""Runs nbdev_test notebook by notebook, with progress, and ends in a count."""
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
NBDEV_TEST = Path(sys.executable).parent / 'nbdev_test'

notebooks = sorted((ROOT / 'nbs').glob('*.ipynb'))
failed = []
for notebook in notebooks:
    start = time.perf_counter()
    # One process a notebook and no worker pool: joblib inside a notebook can hang nbdev's own pool.
    run = subprocess.run([NBDEV_TEST, '--path', notebook, '--n_workers', '0'], cwd=ROOT, capture_output=True, text=True)
    print(f"{notebook.name:28} {'passed' if run.returncode == 0 else 'FAILED'} {time.perf_counter() - start:6.1f} s", flush=True)
    if run.returncode:
        failed.append(notebook.name)
        print(run.stdout, run.stderr, sep='\n', flush=True)
print(f'notebooks: {len(notebooks) - len(failed)} passed, {len(failed)} failed')
sys.exit(bool(failed))
