"""Digests of short runs (each activation and arm, each data set): weights after an epoch of the sample. JSON.

    python tests/digests.py        # in a process of its own: the instruction set is chosen before torch loads
"""
import hashlib
import json
import os
import platform
import sys
from dataclasses import replace
from importlib import metadata
from typing import get_args

if __name__ == '__main__':  # not for what imports it
    os.environ |= {'ATEN_CPU_CAPABILITY': 'avx2', 'ONEDNN_MAX_CPU_ISA': 'AVX2', 'MKL_CBWR': 'COMPATIBLE'}

import torch

from wib_nbdev.config import Activation, TrainConfig
from wib_nbdev.plan import ARMS
from wib_nbdev.training import train

_SHARED = dict(sample=True, epochs=1, device='cpu')
CONFIGS = {name: TrainConfig(activation=name, **_SHARED) for name in get_args(Activation)}
CONFIGS |= {f'arm {name}': TrainConfig(**fields, **_SHARED) for name, fields in ARMS.items()
            if fields != {'activation': name}}
CONFIGS |= {f'{name}, CIFAR-10': replace(config, dataset='cifar10') for name, config in CONFIGS.items()}
CONFIGS['compensated, SGD, CIFAR-10'] = TrainConfig(dataset='cifar10', optimizer='sgd', lr=0.04,
                                                    compensate_bias=True, **_SHARED)


def digest(model: torch.nn.Module) -> str:
    "SHA-256 of all parameters, in the order of their names."
    parameters = sorted(model.named_parameters(), key=lambda each: each[0])
    values = (each.detach().contiguous().numpy().tobytes() for _, each in parameters)
    return hashlib.sha256(b''.join(values)).hexdigest()


def here() -> dict[str, str]:
    "What the bits depend on."
    return {'machine': platform.machine(), **{name: metadata.version(name) for name in ('torch', 'numpy')}}


if __name__ == '__main__':
    torch.set_num_threads(1)
    digests = {name: digest(train(config, progress=False).model) for name, config in CONFIGS.items()}
    json.dump({'made_with': here(), 'digests': digests}, sys.stdout, indent=1)
    print()
