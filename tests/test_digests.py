"""The same bits as ever: short runs of every arm, where torch, numpy and x86-64 are the digests'."""
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from digests import CONFIGS, here

from wib_nbdev.config import Activation
from wib_nbdev.plan import arm_grid

SAID = json.loads(Path(__file__).with_name('digests.json').read_text())


def computed(*emulator: str) -> dict:
    "What tests/digests.py prints in a process of its own, perhaps on an emulated processor."
    for name, value in SAID['made_with'].items():
        if here()[name] != value:
            pytest.skip(f'the digests were made with {name} {value}, here is {here()[name]}')
    script = [*emulator, sys.executable, Path(__file__).with_name('digests.py')]
    return json.loads(subprocess.run(script, capture_output=True, text=True, check=True).stdout)


def test_there_is_a_digest_for_every_activation_and_arm():
    assert {config.activation for config in CONFIGS.values()} == set(get_args(Activation))
    assert {*arm_grid(seed=0, sample=True, epochs=1, device='cpu')} <= {*CONFIGS.values()}
    assert set(CONFIGS) == set(SAID['digests']), 'python tests/digests.py > tests/digests.json'


def changed(now: dict) -> list[str]:
    return [name for name, digest in SAID['digests'].items() if now['digests'][name] != digest]


def test_bits_of_short_runs():
    assert changed(computed()) == []


@pytest.mark.slow
def test_the_same_bits_on_an_emulated_haswell():
    "An Intel processor of 2013, the oldest kind that has AVX2: up to three quarters of an hour."
    if shutil.which('qemu-x86_64') is None: pytest.skip('needs qemu-user')
    assert changed(computed('qemu-x86_64', '-cpu', 'Haswell')) == []
