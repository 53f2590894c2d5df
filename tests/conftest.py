"""What the tests share: the option that runs slow tests, and the skips that say why."""
import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
os.environ.setdefault('MPLBACKEND', 'agg')


def pytest_addoption(parser):
    parser.addoption('--run-slow', action='store_true', help='run the tests that take minutes')


def pytest_collection_modifyitems(config, items):
    skip_slow = pytest.mark.skip(reason='takes minutes; run with --run-slow')
    for item in items:
        if 'slow' in item.keywords and not config.getoption('--run-slow'): item.add_marker(skip_slow)
        if 'cuda' in item.keywords:
            import torch
            if not torch.cuda.is_available(): item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))
        for marker in item.iter_markers('bench'):
            missing = [name for name in marker.args if importlib.util.find_spec(name) is None]
            if missing: item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(missing)} (the extra bench)"))


@pytest.fixture(autouse=True)
def fresh_compiler():
    "torch.compile counts recompilations by code object, and every model shares nn.Sequential's: each test starts from none."
    yield
    if 'torch._dynamo' in sys.modules: sys.modules['torch'].compiler.reset()


@pytest.fixture(scope='session')
def root() -> Path:
    "The checkout."
    return ROOT
