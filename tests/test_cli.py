"""The command line: exit codes, what goes to stdout and to stderr, and what is left behind."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_for

from wib_nbdev import cli
from wib_nbdev.cli import COMMANDS, main
from wib_nbdev.sweep import load_results

COMMAND = [sys.executable, '-m', 'wib_nbdev']
SWEEP = ('--vary seed=1,0 activation=wib_relu,relu --sample --epochs 2 --batch-size 250 --jobs 1 '
         '--no-progress').split()


@pytest.fixture
def run(capsys):
    "The exit code, stdout and stderr of a command."
    def call(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()
    return call


@pytest.fixture(scope='module')
def swept(tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp('swept') / 'gs:a%20b'  # a path is a path, not an address
    assert main(['sweep', *SWEEP, '--out', str(store)]) == 0
    return store


def examples(page: str) -> list[list[str]]:
    return [line.split('#')[0].split()[1:] for line in page.splitlines() if line.startswith('  wib-nbdev ')]


def test_help_teaches_by_examples_that_parse(run):
    code, page, err = run()
    assert (code, err) == (0, '') and page == run('--help')[1] and len(page.splitlines()) < 40
    assert all(name in page for name in COMMANDS) and len(examples(page)) >= 3
    for name in COMMANDS:
        code, page, err = run(name, '--help')
        assert (code, err) == (0, '') and '{None}' not in page and len(examples(page)) >= 2
        for words in examples(page): assert run(*words, '--help')[0] == 0, words


@pytest.mark.parametrize('words, message', [
    ('train --lr -1', 'lr=-1.0: must be a finite number above 0; see wib-nbdev train --help'),
    ('train --activation elu --shift 0.4', "shift=0.4 with activation='elu': must come with wib_relu"),
    ('trian', "did you mean 'train'?"),
    ('sweep --out x --vary actvation=relu', "did you mean 'activation'?"),
    ('sweep --out x --vary lr=0.1,-1', 'lr=-1: must be a finite number above 0'),
    ('sweep --out x --vary lr=1 --vary lr=2', 'lr is there twice'),
    ('sweep --out x --vary lr=.5,-.5', 'lr=-0.5: must be a finite number above 0'),
    ('reproduce --jobs 0', 'jobs=0: must be an integer of at least 1'),
    ('verify --runs 0', 'runs=0: must be'),
    ('report --out=', 'a value must not be empty'),
])
def test_what_is_typed_wrong_is_one_line(words, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words.split())
    assert (code, out, err.count('\n')) == (2, '', 1) and message in err and err.startswith('wib-nbdev: ')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('words, message', [
    ('train --acitvation elu', '--activation {'),
    ('train --activation wib_rel', "invalid choice 'wib_rel'"),
    ('train --epochs 2.5', '--epochs'),
    ('sweep --vary lr=1', '--out'),
])
def test_tyro_names_the_option_that_is_meant(words, message, run):
    code, out, err = run(*words.split())
    assert (code, out) == (2, '') and message in err and 'Traceback' not in err


def test_an_empty_path_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (['sweep', *SWEEP], ['report'], ['reproduce']): assert run(*words, '--out', '')[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_train_prints_epochs_as_a_table_or_as_json(run):
    words = 'train --sample --epochs 2 --dataset cifar10 --activation wib_relu --no-progress'.split()
    code, table, err = run(*words)
    assert (code, err, len(table.splitlines())) == (0, '', 5)
    result = json.loads(run(*words, '--json')[1])
    assert result['status'] == 'finished' and f"{result['epochs'][-1]['loss']:.4g}" in table


def test_a_run_that_diverges_is_valid_json(run):
    code, out, err = run(*'train --sample --epochs 3 --lr 1e30 --optimizer sgd --json'.split())
    result = json.loads(out, parse_constant=lambda word: pytest.fail(word))
    assert (code, result['status'], result['epochs'][-1]['loss']) == (1, 'diverged', None)
    assert 'smaller --lr' in err


def test_a_sweep_is_sorted_by_what_varies_and_goes_on(swept, run):
    before = {path: path.stat().st_mtime_ns for path in swept.glob('*.parquet')}
    code, out, err = run('sweep', *SWEEP, '--out', swept, '--json')
    rows = [(row['seed'], row['activation']) for row in json.loads(out)]
    assert code == 0 and rows == [(0, 'relu'), (0, 'wib_relu'), (1, 'relu'), (1, 'wib_relu')]
    assert '4 are there already' in err
    assert {path: path.stat().st_mtime_ns for path in swept.glob('*.parquet')} == before


def test_a_sweep_shows_the_last_epoch_of_a_run_that_diverged(run, tmp_path):
    words = '--vary lr=.1,.2,.3 --activation wib_relu --optimizer sgd --sample --epochs 4 --batch-size 50'
    out = run('sweep', *words.split(), '--jobs', 1, '--no-progress', '--json', '--out', tmp_path)[1]
    last = load_results(tmp_path).epochs.query("split == 'train'").groupby('key').tail(1).set_index('key')
    diverged = [row for row in json.loads(out) if row['status'] == 'diverged']
    assert diverged and max(last['epoch'][row['key']] for row in diverged) > 1
    for row in diverged:
        assert row['train_loss'] is None and not math.isfinite(last['loss'][row['key']])
        assert row['train_accuracy'] == pytest.approx(last['accuracy'][row['key']])


def test_a_sweep_with_a_failed_run_ends_with_1(run, tmp_path):
    words = '--vary compile=false,true --sample --epochs 1 --jobs 1 --no-progress --record'.split()
    code, out, err = run('sweep', *words, '--out', tmp_path)
    assert code == 1 and out.count('finished') == 1 and len(re.findall('^failed: ', err, re.M)) == 1


def test_a_warning_is_one_line_without_the_source_that_gave_it(swept, run, tmp_path):
    store = shutil.copytree(swept, tmp_path / 'store')
    next(store.glob('*.parquet')).write_bytes(b'cut short')
    code, _, err = run('sweep', *SWEEP, '--out', store)
    (said,) = [line for line in err.splitlines() if 'set aside' in line]
    assert code == 0 and said.startswith('wib-nbdev: ') and 'Warning' not in err


def test_verify_says_whether_and_where_bits_differ(swept, run, monkeypatch):
    code, out, _ = run('verify', swept, '--runs', 2, '--jobs', 1, '--whole')
    assert code == 0 and len(re.findall(r'True +True', out)) == 2
    results = load_results(swept)
    losses = results.steps['loss'].where(results.steps['iteration'] < 2, 0.5)
    spoilt = results._replace(runs=results.runs.assign(weights_first='0' * 64, machine='arm64'),
                              steps=results.steps.assign(loss=losses))
    monkeypatch.setattr('wib_nbdev.sweep.load_results', lambda path: spoilt)
    code, out, _ = run('verify', swept, '--runs', 1, '--jobs', 1)
    assert code == 1 and re.search(r'False +2 +machine arm64, here', out)
    assert json.loads(run('verify', swept, '--runs', 1, '--jobs', 1, '--json')[1])[0]['first'] is False
    unseen = spoilt._replace(steps=spoilt.steps[:0])  # as in the wheel
    monkeypatch.setattr('wib_nbdev.sweep.load_results', lambda path: unseen)
    assert 'unknown: no losses of its steps' in run('verify', swept, '--runs', 1, '--jobs', 1)[1]
    diverged = results._replace(runs=results.runs.assign(status='diverged'))  # whose weights are all NaN
    monkeypatch.setattr('wib_nbdev.sweep.load_results', lambda path: diverged)
    assert 'no finished run with digests' in run('verify', swept, '--runs', 1)[2]


def test_claims_of_a_store_and_of_the_committed_runs(swept, run):
    code, out, _ = run('claims', swept, '--json')
    verdicts = {row['id']: row['verdict'] for row in json.loads(out)}
    assert code == 0 and verdicts['fig3a'] == 'holds' and verdicts['loss'] == 'cannot be tested'
    code, page, _ = run('claims')
    assert code == 0
    for line in (r'^fig3a +holds +in \d+ of \d+ ', r'^\d+ claims: '): assert re.search(line, page, re.M)


def test_a_folder_without_runs_or_with_a_damaged_one_is_one_line(swept, run, tmp_path):
    for name in ('claims', 'report', 'verify'):
        code, out, err = run(name, tmp_path)
        assert (code, out, err.count('\n')) == (1, '', 1) and 'holds no runs' in err
    store = shutil.copytree(swept, tmp_path / 'store')
    next(store.glob('*.parquet')).write_bytes(b'cut short')
    code, out, err = run('claims', store)
    assert (code, out, err.count('\n')) == (1, '', 1) and 'is damaged' in err


def test_report_is_written_whole_or_not_at_all(swept, run, tmp_path):
    page = tmp_path / 'new' / 'page.html'
    assert run('report', swept, '--out', page)[:2] == (0, f'{page}\n')
    assert page.read_text().rstrip().endswith('</html>')
    assert [path.name for path in page.parent.iterdir()] == ['page.html']
    for path in (tmp_path, page / 'below.html'):
        code, out, err = run('report', swept, '--out', path)
        assert (code, out, err.count('\n')) == (1, '', 1) and err.startswith('wib-nbdev: ')


def test_data_that_are_missing_are_one_line_before_any_run(run, tmp_path, monkeypatch):
    monkeypatch.setenv('WIB_MIRROR', 'http://127.0.0.1:9')  # nobody answers there
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    for words in ('train --epochs 1', 'data --download', f'sweep --vary lr=0.1,0.2 --out {tmp_path}/store',
                  f'reproduce --preset paper --out {tmp_path}/store'):
        code, out, err = run(*words.split(), '--root', tmp_path / 'empty')
        assert (code, out) == (1, '') and '--root' in err
        assert 'train-images-idx3-ubyte' in err or 'data_batch_1.bin' in err
    assert not list(tmp_path.rglob('*.parquet'))


def test_data_tells_damaged_from_missing(run, tmp_path):
    folder = tmp_path / 'FashionMNIST' / 'raw'
    folder.mkdir(parents=True)
    (folder / 'train-labels-idx1-ubyte').write_bytes(b'\0' * 60_008)
    code, out, _ = run('data', '--root', tmp_path, '--json')
    status = {row['file']: row['status'] for row in json.loads(out)}
    assert code == 1 and status['FashionMNIST/raw/train-labels-idx1-ubyte'] == 'damaged'
    assert status['FashionMNIST/raw/train-images-idx3-ubyte'] == 'missing'


@pytest.mark.parametrize('model', ['plain_cnn', 'vgg11', 'my_network:make'])
def test_diagnose_centres_each_unit(model, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    (tmp_path / 'my_network.py').write_text(
        'from torch import nn\nmake = lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 99), nn.ReLU())\n')
    code, out, err = run('diagnose', '--model', model, '--images', 32, '--json')
    assert code == 0, err
    units = [row for row in json.loads(out) if row['type'] in ('ReLU', 'WIBReLU')]
    before, after = ([abs(row['mean']) for row in units if row['when'] == when]
                     for when in ('before', 'after'))
    assert len(before) == len(after) and min(before) > 100 * max(after)


def test_diagnose_says_what_is_wrong_with_a_network(run):
    for model, message in {'resnet17': "did you mean 'resnet1", 'no_module:f': "No module named 'no_module'",
                           'torch:no_function': "no attribute 'no_function'",
                           'os:getcwd': 'must return an nn.Module, not'}.items():
        code, out, err = run('diagnose', '--model', model)
        assert (code, out, err.count('\n')) == (1, '', 1) and message in err


def test_ctrl_c_in_the_middle_of_anything_is_one_line_and_130(run, monkeypatch):
    def interrupt(self): raise KeyboardInterrupt
    monkeypatch.setattr(cli.Data, 'run', interrupt)
    code, out, err = run('data')
    assert (code, out, err.count('\n')) == (130, '', 1) and err.startswith('wib-nbdev: interrupted')


@pytest.mark.slow
def test_reproduce_quick_ends_in_about_ten_lines_and_resumes(run, tmp_path):
    code, out, err = run('reproduce', '--out', tmp_path)
    page = tmp_path / 'quick' / 'report.html'
    assert code == 0 and len(out.splitlines()) <= 12 and f'{page}' in out and 'Next ' in out
    assert '\r' not in err and page.read_text().rstrip().endswith('</html>')
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*.parquet')}
    code, again, err = run('reproduce', '--out', tmp_path, '--no-progress', '--all')
    assert code == 0 and again.endswith(out) and re.search(r'^fig3a .* holds', again, re.M)
    assert f'{len(before)} are there already' in err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*.parquet')} == before


# Real processes, each for what only a process can show.

def test_the_entry_point_and_its_version():
    command = [Path(sys.executable).parent / 'wib-nbdev', '--version']
    end = subprocess.run(command, capture_output=True, text=True)
    assert (end.returncode, end.stderr) == (0, '') and re.fullmatch(r'wib-nbdev \d+\.\d+\S*\n', end.stdout)


def test_help_and_wrong_options_load_nothing_heavy():
    code = '''
import sys
from wib_nbdev.cli import COMMANDS, main
pages = [f'{name} --help' for name in COMMANDS]
for words in '', 'train --lr -1', 'sweep --out x --vary lr', *pages: main(words.split())
heavy = {'torch', 'pandas', 'numpy', 'matplotlib', 'joblib'} & set(sys.modules)
assert not heavy, heavy
'''
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0


def test_a_reader_that_has_enough_is_no_error():
    for words in ('--help', 'claims --json'):
        line = f'{sys.executable} -m wib_nbdev {words} | head -c 20; echo ${{PIPESTATUS[0]}}'
        end = subprocess.run(['bash', '-c', line], capture_output=True, text=True)
        assert end.stderr == '' and end.stdout[20:] == '0\n'


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
@pytest.mark.parametrize('words', ['--version', '--help', 'claims'])
def test_stdout_that_takes_nothing(words):
    "A reader that is gone, a stream that the shell closed, a full disk."
    ends = [('| true; exit ${PIPESTATUS[0]}', 0, ''), ('>&-', 0, ''),
            ('>/dev/full', 1, 'wib-nbdev: [Errno 28] No space left on device\n')]
    for end, code, said in ends[-1:] if words == 'claims' else ends:  # each loads torch
        line = ['bash', '-c', f'{sys.executable} -m wib_nbdev {words} {end}']
        run = subprocess.run(line, capture_output=True, text=True)
        assert (run.returncode, run.stderr, run.stdout) == (code, said, ''), line


def test_ctrl_c_in_a_sweep_is_130_and_says_how_to_go_on(tmp_path):
    words = 'sweep --vary seed=0,1,2,3,4,5,6,7 --sample --epochs 10 --batch-size 50 --jobs 1 --out'.split()
    process = subprocess.Popen([*COMMAND, *words, tmp_path / 'store'], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(tmp_path.glob('store/*.parquet')))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (130, '') and 'Traceback' not in err
    assert len(re.findall(r'interrupted', err)) == 1 and 'run the same sweep again to go on' in err


def test_no_colour_where_none_is_wanted():
    import pty
    for variables, coloured in (({}, True), ({'NO_COLOR': '1'}, False)):
        ours, theirs = pty.openpty()
        environment = os.environ | {'TERM': 'xterm', **variables}
        subprocess.run([*COMMAND, 'data', '--help'], stdout=theirs, check=True, env=environment)
        os.close(theirs)
        assert (b'\x1b[' in os.read(ours, 2000)) == coloured
        os.close(ours)
