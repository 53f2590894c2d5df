"""The command as a shell meets it: exit codes, what goes to stdout and stderr, and what is left behind."""
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).parent / 'wib-nbdev'


def run(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([COMMAND, *map(str, words)], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize('words', [['--help'], ['train', '--help'], ['data', '--help'], ['reproduce', '--help']], ids=' '.join)
def test_help_teaches(words):
    page = run(*words)
    assert page.returncode == 0 and page.stderr == ''
    assert len(re.findall(r'^ +wib-nbdev \w+', page.stdout, re.M)) >= 2, 'two examples'


def test_the_examples_in_the_help_parse():
    "Each example, with `--help` appended, is understood to its end."
    examples = {line.strip() for words in (['train'], ['data'], ['reproduce']) for line in run(*words, '--help').stdout.splitlines()
                if line.startswith('  wib-nbdev ')}
    assert len(examples) >= 6
    for example in examples: assert run(*example.split()[1:], '--help').returncode == 0, example


@pytest.mark.parametrize('words', [['--help'], ['train', '--help'], ['train', '--lr', '-1'], ['nonsense']], ids=' '.join)
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
    (['train', '--lr', 'fast'], "could not convert string to float: 'fast'"),
    (['train', '--activation', 'wib_rel'], "invalid choice 'wib_rel'"),
    (['train', '--acitvation', 'elu'], '--acitvation'),
    (['train', '--compensate-bias', '--activation', 'elu'], 'the control is a network of plain'),
    (['trian'], 'trian'),
    ([], 'train, data, reproduce'),
])
def test_wrong_options_are_one_line_and_exit_code_2(words, message, tmp_path):
    end = run(*words, cwd=tmp_path)
    assert end.returncode == 2 and end.stdout == ''
    assert end.stderr.count('\n') == 1 and message in end.stderr and end.stderr.startswith('wib-nbdev: ')
    assert not list(tmp_path.iterdir())


def test_train_as_the_issue_has_it_on_the_sample(tmp_path):
    words = 'train --dataset cifar10 --activation wib_relu --epochs 2 --seed 0 --sample'.split()
    end = run(*words, cwd=tmp_path)
    assert end.returncode == 0 and len(end.stdout.splitlines()) == 5
    assert 'batch/s' in end.stderr or 's/batch' in end.stderr
    again = json.loads(run(*words, '--json', cwd=tmp_path).stdout)
    assert again['status'] == 'finished' and f"{again['epochs'][-1]['loss']:.4f}" in end.stdout
    assert not list(tmp_path.iterdir())


def test_missing_data_is_one_line_that_says_what_to_do(tmp_path):
    (tmp_path / 'empty').mkdir()
    end = run('train', '--root', tmp_path / 'empty', '--epochs', 1, '--dataset', 'cifar10')
    assert end.returncode == 1 and 'Traceback' not in end.stderr
    assert 'data_batch_1.bin' in end.stderr and 'put' in end.stderr


def test_data_tells_whole_from_damaged_and_missing(tmp_path):
    assert run('data', '--root', tmp_path).returncode == 0
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
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 'epochs that were finished' in err and 'Traceback' not in err
    assert ' valid ' in out


@pytest.mark.slow
def test_reproduce_quick_runs_and_resumes(tmp_path):
    first = run('reproduce', cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert all(arm in first.stdout for arm in ('relu', 'wib_relu_centred', 'relu_compensated', 'fashion_mnist', 'cifar10'))
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / 'runs').rglob('*.parquet'))
    second = run('reproduce', cwd=tmp_path)
    assert second.stdout == first.stdout
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / 'runs').rglob('*.parquet')) == before
