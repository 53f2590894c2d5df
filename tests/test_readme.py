"""Every command of the README exists and is understood as written; its Python blocks run in
nbs/index.ipynb, from which it is made."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
COMMANDS = sorted(set(re.findall(r'\b(make [a-z]+)\b(?=`|\s+#)', README))
                  | set(re.findall(r'`(wib-nbdev[^`]*)`', README)))


def test_the_two_commands_are_there():
    assert {'make reproduce', 'make test', 'make lab'} <= set(COMMANDS)
    assert any(command.startswith('wib-nbdev') for command in COMMANDS)


@pytest.mark.parametrize('command', [command for command in COMMANDS if command.startswith('make')])
def test_make_knows_the_target(command):
    """A dry run: make says what it would do. What it does is CI's own work (make test), and a slow test's
    (make reproduce)."""
    end = subprocess.run([*command.split(), '--dry-run'], cwd=ROOT, capture_output=True, text=True)
    assert end.returncode == 0 and end.stdout, end.stderr


@pytest.mark.parametrize('command', [command for command in COMMANDS if command.startswith('wib-nbdev')])
def test_the_command_line_knows_the_command(command):
    words = command.split()
    program = Path(sys.executable).parent / words[0]
    end = subprocess.run([program, *words[1:], '--help'], capture_output=True, text=True)
    assert end.returncode == 0, end.stderr


def test_links_and_pictures_are_there():
    targets = {target.split('#')[0] for target in re.findall(r'\]\(([^)]+)\)', README) if '://' not in target}
    assert targets and [target for target in targets if not (ROOT / target).exists()] == []


def test_every_chapter_is_in_the_table():
    "Run nbs/index.ipynb again when a chapter comes or goes."
    chapters = [path.name for path in sorted((ROOT / 'nbs').glob('[0-9]*.ipynb'))]
    assert re.findall(r'^\| \[.*?\]\(nbs/(\w+\.ipynb)\) \|', README, re.M) == chapters


def test_the_first_screen_holds_the_verdict():
    top = '\n'.join(README.splitlines()[:34])
    assert re.search(r'^# \[(Re|¬Re|Re, in part|Re, undecided|Re, unfinished)\] ', top, re.M)
    for words in ('max(0, z) −', 'doi.org', '] means', 'pairs of runs', '| claim |',
                  'make reproduce', '!['):
        assert words in top, words
    assert '<table' not in README, 'no HTML of pandas'
