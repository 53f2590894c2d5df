"""`make lab`, as one uses it: JupyterLab opens on the first notebook in a real browser, which restarts the
kernel and runs every cell. `make test` has run the front page's cells in `test_notebooks` already; that it is
run again is to see it opened as a reader opens it: the folder, the kernel and the browser."""
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import pytest
from waiting import wait_for

ROOT = Path(__file__).parents[1]
CONFIG = '''
c.ServerApp.open_browser = False
c.ServerApp.port = 0
c.ServerApp.allow_root = True
c.IdentityProvider.token = ''
c.LabServerApp.news_url = None
'''


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "The address of the JupyterLab that `make lab` started in a copy of the project, and the copy."
    plan = subprocess.run(['make', '-n', 'lab'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    if Path(sys.prefix) != ROOT / '.venv' or 'install' in plan: pytest.skip("needs make's .venv, up to date")
    copy = tmp_path_factory.mktemp('lab')
    shutil.copytree(ROOT / 'nbs', copy / 'nbs')
    for name in ('Makefile', 'settings.ini', 'setup.py', 'pyproject.toml'): shutil.copy(ROOT / name, copy)
    (copy / '.venv').symlink_to(ROOT / '.venv')
    (copy / 'config').mkdir()
    (copy / 'config' / 'jupyter_server_config.py').write_text(CONFIG)
    places = {f'JUPYTER_{kind}_DIR': str(copy / kind.lower()) for kind in ('CONFIG', 'RUNTIME', 'DATA')}
    places |= {'JUPYTERLAB_SETTINGS_DIR': str(copy / 'settings'),
               'JUPYTERLAB_WORKSPACES_DIR': str(copy / 'workspaces')}
    ours = {name: value for name, value in os.environ.items() if name != 'MPLBACKEND'}  # which tests set
    with open(copy / 'log', 'w') as log:
        server = subprocess.Popen(['make', 'lab'], cwd=copy, env=ours | places, stdout=log, stderr=log,
                                  start_new_session=True)
    try:
        found = wait_for(lambda: list(copy.glob('runtime/jpserver-*.json')) or server.poll() is not None)
        assert server.poll() is None and found, (copy / 'log').read_text()
        url = wait_for(lambda: json.loads(found[0].read_text() or '{}').get('url'))
        yield url, copy
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try: server.wait(300)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)


CHAPTERS = sorted(path.name for path in (ROOT / 'nbs').glob('[0-9]*.ipynb'))
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CHAPTERS]


@pytest.mark.parametrize('name', ['index.ipynb', *SLOW])
def test_a_notebook_restarts_and_runs_from_top_to_bottom(name, lab, browser):
    url, copy = lab
    page = browser.new_page(viewport={'width': 1280, 'height': 900})
    page.set_default_timeout(600_000)  # a busy machine is slow
    if name == 'index.ipynb':  # what JupyterLab opens in one's own browser
        redirect = wait_for(lambda: list(copy.glob('runtime/*file-to-run*')))
        page.goto(redirect[0].as_uri())
    else: page.goto(f'{url}lab/tree/{name}?reset')  # without the tabs of the last one
    page.locator('.jp-MarkdownOutput h1').first.wait_for()
    # urlopen keeps the proxies of its first call, which may be another test's.
    opener = build_opener(ProxyHandler({}))
    def ask(what): return json.load(opener.open(f'{url}api/{what}'))
    def idle():  # three times in a row: between two cells a kernel is idle for a moment
        seen = []
        for _ in range(3):
            page.wait_for_timeout(1000)
            seen += [each['kernel']['execution_state'] for each in ask('sessions') if each['path'] == name]
        return seen == 3 * ['idle']
    def choose(menu, item):
        page.get_by_role('menuitem', name=menu, exact=True).click()
        page.get_by_role('menuitem', name=item).first.click()
    def cells():
        page.keyboard.press('Control+s')
        page.wait_for_timeout(1000)
        return [cell for cell in ask(f'contents/{name}')['content']['cells'] if cell['cell_type'] == 'code']
    # Saved only once it is idle: the last cell of a chapter exports, which reads the file.
    def all_ran(): return idle() and all(cell['execution_count'] for cell in cells())
    def began(): return any(cell['execution_count'] for cell in cells()) or not idle()
    # Once more if nothing begins: the first request can get lost in a server that is still connecting to the
    # new kernel, even when it calls the kernel idle, and JupyterLab sends the second only after the reply.
    for seconds in (30, 60, 120, 240):
        choose('Kernel', 'Restart Kernel…')
        page.locator('.jp-Dialog button.jp-mod-accept').click()
        wait_for(idle, 600)
        choose('Run', 'Run All Cells')
        with suppress(AssertionError):
            wait_for(began, seconds)
            break
    else: pytest.fail('no cell begins to run')
    wait_for(all_ran, 3600)
    ran = cells()
    assert [cell['execution_count'] for cell in ran] == list(range(1, len(ran) + 1))
    assert [output for cell in ran for output in cell['outputs'] if output['output_type'] == 'error'] == []
    assert any('image/png' in output.get('data', {}) for cell in ran for output in cell['outputs'])
    if shots := os.environ.get('WIB_SHOTS'): page.screenshot(path=f'{shots}/{name}.png')
    page.close()
