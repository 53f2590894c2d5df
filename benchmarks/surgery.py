"""What do calibration and folding cost? VGG-11, ResNet-18 and the plain CNN, beside lsuv if it is there.

    python benchmarks/surgery.py                     # a table
    python benchmarks/surgery.py --out surgery.json  # and the numbers as JSON

`calibrate` is one forward pass with measurements, with `gain` two or three; `a pass a layer` does it by hand,
one pass for each unit; lsuv sets variances alone, with one pass or more a layer. Inference: the network with
ReLU, with WIB-ReLU, and folded, taking turns. Medians over the rounds; `x pass` is in units of one forward
pass with ReLU.
"""
from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from wib_nbdev.activations import WIBReLU
from wib_nbdev.models import plain_cnn
from wib_nbdev.surgery import calibrate, fold_shift, swap_activations

NETWORKS = {'plain_cnn': (lambda: plain_cnn(3), (256, 3, 32, 32)),
            'vgg11': (lambda: models.vgg11(weights=None), (16, 3, 64, 64)),
            'resnet18': (lambda: models.resnet18(weights=None), (16, 3, 64, 64))}


def seconds(function: Callable[[], object]) -> float:
    "How long one call takes."
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.no_grad()
def pass_a_layer(model: nn.Module, x: torch.Tensor) -> None:
    "Eq. 7 by hand: for each unit a forward pass that measures what goes into it."
    def set_shift(unit: WIBReLU, args: tuple[torch.Tensor]) -> None:
        unit.shift.copy_(F.relu(args[0]).mean())
    for unit in [module for module in model.modules() if isinstance(module, WIBReLU)]:
        handle = unit.register_forward_pre_hook(set_shift)
        model(x)
        handle.remove()


def variants(make: Callable[[], nn.Module], x: torch.Tensor) -> dict[str, Callable[[], object]]:
    "What is timed, by name."
    relu = make().eval()
    wib = copy.deepcopy(relu)
    swap_activations(wib)
    calibrate(wib, x)
    folded = copy.deepcopy(wib)
    fold_shift(folded, x)
    timed: dict[str, Callable[[], object]] = {
        'inference, ReLU': lambda: relu(x), 'inference, WIB-ReLU': lambda: wib(x),
        'inference, folded': lambda: folded(x), 'calibrate': lambda: calibrate(wib, x),
        'calibrate, gain': lambda: calibrate(copy.deepcopy(wib), x, gain=True),
        'a pass a layer': lambda: pass_a_layer(wib, x)}
    if importlib.util.find_spec('lsuv') is None: return timed
    lsuv = importlib.import_module('lsuv').lsuv_with_singlebatch
    return {**timed, 'lsuv': lambda: lsuv(copy.deepcopy(relu), x, do_orthonorm=False, verbose=False)}


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--out', type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name, (make, shape) in NETWORKS.items():
        torch.manual_seed(0)
        x = torch.randn(shape)
        with torch.no_grad():
            timed = variants(make, x)
            for function in timed.values(): function()
            rounds = [{variant: seconds(function) for variant, function in timed.items()}
                      for _ in range(options.rounds)]
        base = statistics.median(each['inference, ReLU'] for each in rounds)
        for variant in timed:
            median = statistics.median(each[variant] for each in rounds)
            rows.append(dict(network=name, variant=variant, seconds=median, passes=median / base))
            print(f'{name:10} {variant:22} {1000 * median:9.1f} ms {median / base:8.2f} x pass')
    if options.out:
        facts = dict(torch=torch.__version__, machine=platform.machine(), threads=options.threads,
                     rounds=options.rounds)
        options.out.write_text(json.dumps(dict(environment=facts, rows=rows), indent=2))


if __name__ == '__main__': main()
