"""Fails if nbdev_export or nbdev_clean would change a file: the library is the notebooks', and the notebooks carry no stray state."""
import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def digests() -> dict[str, str]:
    files = [*ROOT.glob('nbs/*.ipynb'), *ROOT.glob('wib_nbdev/*.py'), ROOT / 'pyproject.toml', ROOT / 'settings.ini']
    return {str(file.relative_to(ROOT)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


before = digests()
for command in ('nbdev_export', 'nbdev_clean'):
    subprocess.run([BIN / command], cwd=ROOT, check=True)
    after = digests()
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed: sys.exit(f"{command} changed {', '.join(changed)}: run it and commit what it writes")
print('nbdev_export and nbdev_clean are no-ops')
