"""The command as a shell meets it: exit codes, what goes to stdout and stderr, and what is left behind."""
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wib_nbdev import cli
from wib_nbdev.claims import judge
from wib_nbdev.comparison import MAIN
from wib_nbdev.sweep import load_results

COMMAND = Path(sys.executable).parent / 'wib-nbdev'


def run(*words: object, cwd: Path | None = None, **variables: object) -> subprocess.CompletedProcess:
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    return subprocess.run([COMMAND, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True)


def shell(line: str) -> subprocess.CompletedProcess:
    "A line of bash in which `wib-nbdev` is the command under test."
    return subprocess.run(['bash', '-o', 'pipefail', '-c', line.replace('wib-nbdev', str(COMMAND))], capture_output=True, text=True)


COMMANDS = ('reproduce', 'train', 'sweep', 'claims', 'report', 'diagnose', 'data')


@pytest.mark.parametrize('words', [['--help'], *([name, '--help'] for name in COMMANDS)], ids=' '.join)
def test_help_teaches(words):
    page = run(*words)
    assert page.returncode == 0 and page.stderr == ''
    assert len(re.findall(r'^ +wib-nbdev \w+', page.stdout, re.M)) >= 2, 'two examples'


@pytest.mark.parametrize('name', COMMANDS)
def test_the_help_speaks_of_no_none_and_gives_each_default_once(name):
    page = run(name, '--help', COLUMNS=1000).stdout
    assert '{None}' not in page and 'STR' not in page.replace('--cluster STR', '')
    assert all(line.count('(default') <= 1 for line in page.splitlines())


def test_each_shell_that_the_help_names_is_completed():
    shells = re.search(r'tab completion, for (.*)', run('--help').stdout)[1].replace(',', '').replace('or ', '').split()
    assert len(shells) == 3
    for name in shells: assert 'reproduce' in run('--tyro-print-completion', name).stdout, name


def test_the_examples_in_the_help_parse():
    "Each example, with `--help` appended, is understood to its end."
    examples = {line.strip() for name in COMMANDS for line in run(name, '--help').stdout.splitlines() if line.startswith('  wib-nbdev ')}
    assert len(examples) >= 2 * len(COMMANDS)
    for example in examples: assert run(*example.split()[1:], '--help').returncode == 0, example


HELP = [['--help'], *([name, '--help'] for name in COMMANDS)]


@pytest.mark.parametrize('words', [*HELP, ['train', '--lr', '-1'], ['sweep', '--out', 'x', '--vary', 'lr'], ['nonsense']], ids=' '.join)
def test_help_and_errors_load_nothing_heavy(words):
    code = f'''
import sys
from wib_nbdev.cli import main
try: main({words})
except SystemExit: pass
heavy = {{'torch', 'pandas', 'numpy', 'matplotlib', 'joblib'}} & set(sys.modules)
assert not heavy, heavy
'''
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0


@pytest.mark.parametrize('words, message', [
    (['train', '--lr', '-1'], 'lr=-1.0: must be a finite number above 0'),
    (['train', '--lr', 'fast'], '--lr=fast: must be a number'),
    (['train', '--activation', 'elu', '--shift', '0.4'], "shift=0.4 with activation='elu': must come with wib_relu"),
    (['train', '--lr', "it's"], "--lr=it's: must be a number"),
    (['train', '--epochs', '2.5'], '--epochs=2.5: must be an integer'),
    (['train', '--gain', 'foo'], '--gain=foo: must be a number'),
    (['train', '--lr'], "Missing value for argument '--lr'; see"),
    (['train', '--activation', 'wib_rel'], "invalid choice 'wib_rel'"),
    (['train', '--acitvation', 'elu'], '--acitvation, elu; did you mean --activation?'),
    (['train', '--actvation', 'elu', '--otimizer', 'sgd'], 'did you mean --activation, --optimizer?'),
    (['train', '--jbos', '2'], 'Unrecognized options: --jbos, 2; see'),
    (['sweep'], 'Missing from wib-nbdev sweep: --out; see'),
    (['sweep', '--out', 'x'], 'vary: must name an option and its values'),
    (['train', '--compensate-bias', '--activation', 'elu'], 'the control is a network of plain'),
    (['trian'], 'trian'),
    (['sweep', '--out', 'x', '--vary', 'actvation=relu'], "did you mean 'activation'?"),
    (['sweep', '--out', 'x', '--vary', 'lr'], 'must be NAME=VALUE,VALUE'),
    (['sweep', '--out', 'x', '--vary', 'lr=0.1,-1'], 'lr=-1: must be a finite number above 0'),
    (['diagnose', '--batch-size', '0'], 'batch_size=0: must be an integer of at least 1'),
    (['diagnose', '--model', 'resnet'], "invalid choice 'resnet'"),
    (['diagnose', '--model', 'resnet18', '--init', 'orthogonal'], "init='orthogonal': must be left out with model='resnet18'"),
    (['reproduce', '--jobs', '-2'], 'jobs=-2: must be an integer of at least 1, or -1'),
    ([], 'reproduce, train, sweep'),
])
def test_wrong_options_are_one_line_and_exit_code_2(words, message, tmp_path):
    end = run(*words, cwd=tmp_path)
    assert end.returncode == 2 and end.stdout == ''
    assert end.stderr.count('\n') == 1 and message in end.stderr and end.stderr.startswith('wib-nbdev: ')
    assert not list(tmp_path.iterdir())


def test_an_error_is_one_plain_line_on_a_terminal_too():
    "There tyro paints what it says, and wraps it at the edge."
    ours, theirs = pty.openpty()
    words = ['train', '--' + 'a-long-option-' * 5]
    narrow = os.environ | {'TERM': 'xterm', 'COLUMNS': '40'}
    end = subprocess.run([COMMAND, *words], stdout=theirs, stderr=subprocess.PIPE, text=True, env=narrow)
    for side in (ours, theirs): os.close(side)
    assert end.stderr == f'wib-nbdev: Unrecognized options: {words[1]}; see wib-nbdev train --help\n'


def test_help_without_colour_where_none_is_wanted():
    for variables, coloured in (({}, True), ({'NO_COLOR': '1'}, False)):
        ours, theirs = pty.openpty()
        subprocess.run([COMMAND, 'data', '--help'], stdout=theirs, check=True, env=os.environ | {'TERM': 'xterm', **variables})
        os.close(theirs)
        assert (b'\x1b[' in os.read(ours, 2000)) == coloured
        os.close(ours)


def test_vary_may_be_said_twice():
    sweep = cli._parse('sweep --out x --vary lr=1 --vary seed=1,2'.split())
    assert [(config.lr, config.seed) for config in sweep._configs] == [(1, 1), (1, 2)]
    assert sweep._configs == cli._parse('sweep --out x --vary lr=1 seed=1,2'.split())._configs


def test_a_run_that_diverges_is_valid_json():
    end = run(*'train --sample --epochs 3 --lr 1e30 --optimizer sgd --json'.split())
    result = json.loads(end.stdout, parse_constant=lambda word: pytest.fail(word))
    assert end.returncode == 1 and result['status'] == 'diverged' and result['epochs'][-1]['loss'] is None


def test_train_as_the_issue_has_it_on_the_sample(tmp_path):
    words = 'train --dataset cifar10 --activation wib_relu --epochs 2 --seed 0 --sample'.split()
    end = run(*words, cwd=tmp_path)
    assert end.returncode == 0 and len(end.stdout.splitlines()) == 5
    assert 'batch/s' in end.stderr or 's/batch' in end.stderr
    again = json.loads(run(*words, '--json', cwd=tmp_path).stdout)
    assert again['status'] == 'finished' and f"{again['epochs'][-1]['loss']:.4f}" in end.stdout
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setenv('no_proxy', '')
    for variable in ('http_proxy', 'https_proxy'): monkeypatch.setenv(variable, 'http://127.0.0.1:9')  # nobody listens there


@pytest.mark.parametrize('words, file', [
    (['train', '--epochs', '1'], 'train-images-idx3-ubyte'),
    (['train', '--epochs', '1', '--dataset', 'cifar10'], 'data_batch_1.bin'),
    (['data', '--download'], 'train-images-idx3-ubyte'),
    (['sweep', '--vary', 'lr=0.1,0.2', '--out', 'store'], 'train-images-idx3-ubyte'),
], ids=' '.join)
def test_missing_data_is_one_line_that_says_what_to_do(words, file, tmp_path, no_network):
    (tmp_path / 'empty').mkdir()
    end = run(*words, '--root', 'empty', cwd=tmp_path)
    assert end.returncode == 1 and end.stderr.count('\n') == 1
    assert file in end.stderr and 'run wib-nbdev data --download' in end.stderr and 'put' in end.stderr
    assert not list(tmp_path.glob('store/*')), 'no run was tried'


def test_data_tells_whole_from_damaged_and_missing(tmp_path):
    assert run('data', '--root', tmp_path).returncode == 1
    folder = tmp_path / 'FashionMNIST' / 'raw'
    folder.mkdir(parents=True)
    (folder / 'train-labels-idx1-ubyte').write_bytes(b'\0' * 60_008)
    end = run('data', '--root', tmp_path, '--json')
    rows = {row['file']: row['status'] for row in json.loads(end.stdout) if row['dataset'] == 'fashion_mnist'}
    assert end.returncode == 1 and rows['train-labels-idx1-ubyte'] == 'damaged' and rows['train-images-idx3-ubyte'] == 'missing'


def test_ctrl_c_is_130_and_keeps_what_was_finished():
    words = [COMMAND, 'train', '--sample', '--epochs', '100000']
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen, deadline = '', time.time() + 60
    while 'valid loss' not in seen and time.time() < deadline: seen += process.stderr.read(100)
    assert 'valid loss' in seen
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 'epochs that were finished' in err and 'Traceback' not in err
    assert 'the same command goes on' not in err
    assert ' valid ' in out


SWEEP = 'sweep --vary activation=relu,wib_relu seed=0,1 --sample --epochs 1 --batch-size 250 --jobs 1 --record --out'.split()


@pytest.fixture(scope='module')
def swept(tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp('swept') / 'store'
    end = run(*SWEEP, store)
    assert end.returncode == 0, end.stderr
    assert len(end.stdout.splitlines()) == 5 and re.search('run/s|s/run', end.stderr)
    return store


def test_a_sweep_goes_on_where_it_was(swept):
    before = {path: path.stat().st_mtime_ns for path in swept.glob('*.parquet')}
    again = json.loads(run(*SWEEP, swept, '--json').stdout)
    assert len(again) == len(before) == 4 and {row['activation'] for row in again} == {'relu', 'wib_relu'}
    assert {path: path.stat().st_mtime_ns for path in swept.glob('*.parquet')} == before


def test_a_warning_is_one_line_without_the_source_that_gave_it(swept, tmp_path):
    store = shutil.copytree(swept, tmp_path / 'store')
    next(store.glob('*.parquet')).write_bytes(b'cut short')
    end = run(*SWEEP, store, '--no-progress')
    said = [line for line in end.stderr.splitlines() if 'set aside' in line]
    assert end.returncode == 0 and len(said) == 1 and said[0].startswith('wib-nbdev: ')
    assert 'Warning' not in end.stderr and 'run_sweep(' not in end.stderr


def test_claims_of_a_store_and_of_the_committed_runs(swept):
    end = run('claims', swept, '--json')
    verdicts = {row['id']: row['verdict'] for row in json.loads(end.stdout)}
    assert 'judged by the most frequent set-up: sample=True, epochs=1, batch_size=250' in end.stderr
    assert verdicts['fig3a'] == 'holds' and verdicts['loss'] == 'cannot be tested'
    page = run('claims').stdout
    assert re.search(r'^fig3a +holds', page, re.M) and re.search(r'Of \d+ claims: ', page)


def test_claims_judges_a_store_of_the_sample_as_reproduce_does(tmp_path):
    store = tmp_path / 'store'
    words = 'sweep --vary activation=relu,wib_relu dataset=fashion_mnist,cifar10 seed=0,1,2,3,4,5,6,7 --sample --epochs 3 --batch-size 500'
    assert run(*words.split(), '--jobs', 1, '--no-progress', '--out', store).returncode == 0
    setting = MAIN | dict(sample=True, epochs=3, batch_size=500)
    expected = judge(load_results(store), setting)
    shown = {row['id']: row['n_runs'] for row in json.loads(run('claims', store, '--json').stdout)}
    assert shown == dict(zip(expected['id'], expected['n_runs'], strict=True)) and shown['smooth'] > 0


def test_claims_of_nothing_is_one_line(tmp_path):
    end = run('claims', tmp_path)
    assert end.returncode == 1 and end.stderr.count('\n') == 1 and 'holds no runs' in end.stderr


def test_report_is_written_whole(swept, tmp_path):
    end = run('report', swept, '--out', tmp_path / 'page.html')
    assert end.returncode == 0 and end.stdout.strip() == str(tmp_path / 'page.html')
    assert (tmp_path / 'page.html').read_text().rstrip().endswith('</html>')
    assert [path.name for path in tmp_path.iterdir()] == ['page.html']


def test_report_writes_through_a_link_and_refuses_what_is_no_file(swept, tmp_path):
    (tmp_path / 'old.html').write_text('old')
    (tmp_path / 'link.html').symlink_to('old.html')
    assert run('report', swept, '--out', tmp_path / 'link.html').returncode == 0
    assert (tmp_path / 'link.html').is_symlink() and (tmp_path / 'old.html').read_text().rstrip().endswith('</html>')
    os.mkfifo(tmp_path / 'pipe')
    for path in (tmp_path / 'pipe', tmp_path, ''):
        end = run('report', swept, '--out', path, cwd=tmp_path)
        assert end.returncode == 1 and end.stderr == f'wib-nbdev: {Path(path)}: not a regular file; name a file to write\n'
    assert (tmp_path / 'pipe').is_fifo()


def test_report_that_cannot_be_written_is_one_line(swept, tmp_path):
    (tmp_path / 'file').write_text('in the way')
    end = run('report', swept, '--out', tmp_path / 'file' / 'page.html')
    assert end.returncode == 1 and end.stderr.startswith('wib-nbdev: ') and 'Traceback' not in end.stderr


@pytest.mark.parametrize('model', ['plain_cnn', 'resnet18'])
def test_diagnose_centres_each_layer(model):
    rows = json.loads(run('diagnose', '--model', model, '--batch-size', 32, '--json').stdout)
    units = [row for row in rows if row['type'] in ('ReLU', 'WIBReLU')]
    assert all(abs(row['mean']) < 1e-2 for row in units if row['when'] == 'after')
    assert all(row['mean'] > 0.1 for row in units if row['when'] == 'before') and len(units) >= 8


@pytest.mark.slow
def test_reproduce_quick_runs_and_resumes(tmp_path):
    first = run('reproduce', cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert all(arm in first.stdout for arm in ('relu', 'wib_relu_centred', 'relu_compensated', 'fashion_mnist', 'cifar10'))
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / 'runs').rglob('*.parquet'))
    page = tmp_path / 'runs' / 'quick' / 'report.html'
    assert 'runs/quick/report.html' in first.stdout and page.read_text().rstrip().endswith('</html>')
    assert re.search(r'^fig3a .* holds', first.stdout, re.M) and '0 are there already' in first.stderr
    second = run('reproduce', cwd=tmp_path)
    assert second.stdout == first.stdout and '78 are there already' in second.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / 'runs').rglob('*.parquet')) == before


def test_a_wrong_word_is_answered_where_it_was_said():
    for words, said in ((['trian'], "did you mean 'train'"), (['sweep', '--out', 'x', '--vary', 'lr=1', 'lr=2'], 'lr stands twice'),
                        (['reproduce', '--jobs', 0], 'jobs=0'), (['diagnose', '--seed', 10**20], 'seed=')):
        end = run(*words)
        assert end.returncode == 2 and said in end.stderr and end.stderr.count('\n') == 1, end.stderr
    assert 'see wib-nbdev reproduce --help' in run('reproduce', '--jobs', 0).stderr
    assert run('--version').stdout.startswith('wib-nbdev ')


def test_a_reader_that_has_enough_is_no_error():
    end = shell('wib-nbdev claims --json | head -c 20')
    assert end.returncode == 0 and len(end.stdout) == 20 and end.stderr == ''


@pytest.mark.parametrize('words', ['--help', 'train --help', '--version', 'claims'])
def test_stdout_that_takes_nothing(words):
    "A reader that is gone, a stream that the shell closed, a full disk."
    for line, code, said in ((f'wib-nbdev {words} | true', 0, ''), (f'wib-nbdev {words} >&-', 0, ''),
                             (f'wib-nbdev {words} >/dev/full', 1, 'wib-nbdev: [Errno 28] No space left on device\n')):
        end = shell(line)
        assert (end.returncode, end.stderr, end.stdout) == (code, said, ''), line


@pytest.mark.parametrize('words', ['--help', 'claims'])
def test_a_stream_without_the_letters_of_the_page(words):
    end = run(words, PYTHONIOENCODING='ascii')
    assert end.returncode == 0 and end.stderr == '' and len(end.stdout) > 1000


def test_the_paper_preset_without_data_fails_once(tmp_path, no_network):
    end = run('reproduce', '--preset', 'paper', '--root', tmp_path, '--out', tmp_path / 'runs')
    assert end.returncode == 1 and 'Traceback' not in end.stderr and not list((tmp_path / 'runs').glob('**/*.error.txt'))
