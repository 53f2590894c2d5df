"""Fails if nbdev would change a file: the library is the notebooks', the notebooks carry no stray state,
the site knows the settings."""
import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def digests() -> dict[str, str]:
    patterns = ('nbs/**/*.ipynb', 'nbs/*.yml', 'wib_nbdev/*.py', 'pyproject.toml', 'settings.ini')
    files = [file for pattern in patterns for file in ROOT.glob(pattern)]
    return {str(file.relative_to(ROOT)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


before = digests()
commands = {command: [BIN / command] for command in ('nbdev_export', 'nbdev_clean')}
refresh = 'from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()'
commands['refresh_quarto_yml'] = [sys.executable, '-c', refresh]
for name, command in commands.items():
    subprocess.run(command, cwd=ROOT, check=True)
    after = digests()
    changed = sorted(file for file in before.keys() | after.keys() if before.get(file) != after.get(file))
    if changed: sys.exit(f"{name} changed {', '.join(changed)}: run it and commit what it writes")
print('nbdev_export, nbdev_clean and refresh_quarto_yml are no-ops')
