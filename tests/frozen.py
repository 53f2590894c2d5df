"""Digests of short runs, one for each activation: the weights after an epoch of the sample. Prints JSON.

    python tests/frozen.py        # in a process of its own: the instruction set is chosen before torch loads
"""
import hashlib
import json
import os
import sys
from typing import get_args

os.environ |= {'ATEN_CPU_CAPABILITY': 'avx2', 'ONEDNN_MAX_CPU_ISA': 'AVX2', 'MKL_CBWR': 'COMPATIBLE'}

import torch

from wib_nbdev.config import Activation, TrainConfig
from wib_nbdev.training import train


def digest(model: torch.nn.Module) -> str:
    "SHA-256 of all parameters, in the order of their names."
    parameters = sorted(model.named_parameters(), key=lambda each: each[0])
    return hashlib.sha256(b''.join(each.detach().contiguous().numpy().tobytes() for _, each in parameters)).hexdigest()


if __name__ == '__main__':
    torch.set_num_threads(1)
    configs = [TrainConfig(activation=name, sample=True, epochs=1, device='cpu') for name in get_args(Activation)]
    configs.append(TrainConfig(dataset='cifar10', optimizer='sgd', lr=0.04, compensate_bias=True, sample=True, epochs=1, device='cpu'))
    json.dump({config.key: digest(train(config, progress=False).model) for config in configs}, sys.stdout, indent=1)
