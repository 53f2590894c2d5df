"""What does it cost to watch a network train? The plain CNN, with and without statistics at every iteration.

    python benchmarks/recorder.py                        # a table for 1 thread and for all cores
    python benchmarks/recorder.py --threads 2 --out recorder.json

Every variant trains its own copy of the network on the same batches, channels_last, images in memory. The
variants take turns, some steps each, so that whatever else the machine does falls on all of them. A variant's
cost is the median over the rounds of its time divided by that of the plain loop's turn in the same round,
less 1; the range given is the middle half of the rounds. `naive` takes four statistics (mean, std, |a| <
0.5, input of the activation <= 0) with `.item()`; `naive, every definition` takes all that the recorder can
take, the histogram definitions with `torch.histc`. `recorder` takes what Fig. 7 to 11 need.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wib_nbdev.data import channel_stats, load, standardise
from wib_nbdev.models import plain_cnn
from wib_nbdev.recorder import NEAR_ZERO, ActivationRecorder, activation_of

BATCH = 256
ACTIVATED = ('conv1', 'conv2', 'conv3', 'conv4')
SEVEN = (*ACTIVATED, 'pool', 'flatten', 'dense')


def naive(module: nn.Module, preact: Tensor, output: Tensor, rows: list) -> None:
    "Four statistics as one writes them first."
    a = output.detach()
    near_zero, inactive = (a.abs() < 0.5).float().mean().item(), (preact <= 0).float().mean().item()
    rows.append((a.mean().item(), a.std().item(), near_zero, inactive))


def naive_all(module: nn.Module, preact: Tensor, output: Tensor, rows: list) -> None:
    "Every definition, as the libraries that it comes from count it."
    naive(module, preact, output, rows)
    a = output.detach()
    low, course, shifted = a.abs().histc(40, 0, 10), a.histc(40, 0, 10), a.histc(40, -7, 7)
    shares = [(a <= 0.05).float().mean(), low[0] / low.sum(), course[:2].sum() / course.sum(),
              shifted[19:22].sum() / shifted.sum()]
    rows.append([share.item() for share in shares])


def attach_naive(model: nn.Module, take: Callable) -> None:
    "`take` at the layers that the recorder has by default: the four activations and the dense layer."
    rows: list = []
    for name in (*ACTIVATED, 'dense'):
        layer = model.get_submodule(name)
        hooked = activation_of(layer) or layer
        hooked.register_forward_hook(lambda module, args, output: take(module, args[0], output, rows))


VARIANTS: dict[str, Callable[[nn.Module], object]] = {
    'no statistics': lambda model: None,
    'naive': lambda model: attach_naive(model, naive),
    'naive, every definition': lambda model: attach_naive(model, naive_all),
    'recorder': lambda model: ActivationRecorder(model).start(),
    'recorder, seven layers': lambda model: ActivationRecorder(model, SEVEN).start(),
    'recorder, every definition': lambda model: ActivationRecorder(model, near_zero=tuple(NEAR_ZERO)).start(),
    'recorder, every=10': lambda model: ActivationRecorder(model, every=10).start(),
    'recorder, gradients': lambda model: ActivationRecorder(model, gradients=True).start(),
    'recorder, histograms': lambda model: ActivationRecorder(model, histogram=True).start(),
}


class Run:
    "One network in training, with the variant's hooks, that can go on for some steps."

    def __init__(self, variant: str, activation: str, images: Tensor, labels: Tensor) -> None:
        model = plain_cnn(1, activation=activation, generator=torch.Generator().manual_seed(0))
        self.model = model.to(memory_format=torch.channels_last)
        self.watcher = VARIANTS[variant](self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.004)
        self.images, self.labels, self.at = images, labels, 0

    def go(self, steps: int) -> float:
        "Milliseconds a step."
        begin = time.perf_counter()
        for _ in range(steps):
            here = slice(self.at, self.at + BATCH)
            self.at = (self.at + BATCH) % (len(self.images) - BATCH + 1)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.images[here]), self.labels[here]).backward()
            self.optimizer.step()
        return (time.perf_counter() - begin) / steps * 1e3


def get_images(root: str | None, n: int) -> tuple[Tensor, Tensor, str]:
    "n standardised images and labels: of the full data if it is there, else of the sample, repeated."
    try: data = load('fashion_mnist', root=root, download=False)
    except FileNotFoundError: data = load('fashion_mnist', sample=True)
    images = standardise(data.x_train, *channel_stats(data.x_train))
    take = torch.arange(n) % len(images)
    return images[take].contiguous(memory_format=torch.channels_last), data.y_train[take], data.source


def measure(
    threads: int, activation: str, images: Tensor, labels: Tensor, args: argparse.Namespace
) -> list[dict]:
    "A row for each variant."
    torch.set_num_threads(threads)
    runs = {variant: Run(variant, activation, images, labels) for variant in args.variants}
    for run in runs.values(): run.go(args.steps)
    times = {variant: [] for variant in runs}
    for _ in range(args.rounds):
        for variant, run in runs.items(): times[variant].append(run.go(args.steps))
    plain = np.array(times['no statistics'])
    rows = []
    for variant, ms in times.items():
        low, middle, high = np.percentile(np.array(ms) / plain - 1, [25, 50, 75])
        row = {'threads': threads, 'activation': activation, 'variant': variant,
               'ms_median': float(np.median(ms)), 'cost': middle, 'cost_low': low, 'cost_high': high}
        rows.append(row)
        line = f'{threads:7}  {activation:10}  {variant:26} {row["ms_median"]:7.2f}'
        if variant != 'no statistics': line += f' {middle:+8.1%}  ({low:+.1%} to {high:+.1%})'
        print(line, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = os.cpu_count() or 1
    add = parser.add_argument
    add('--threads', type=int, nargs='+', default=sorted({1, cores}), help='default: 1 and all cores')
    add('--activations', nargs='+', default=['relu', 'wib_relu'], help='default: relu wib_relu')
    add('--variants', nargs='+', choices=VARIANTS, default=list(VARIANTS), help='default: all')
    add('--rounds', type=int, default=15, help='turns of each variant (default: 15)')
    add('--steps', type=int, default=20, help='training steps in a turn (default: 20)')
    add('--root', help='folder with the full data (default: ./data; else the sample inside the package)')
    add('--out', type=Path, help='also write the numbers to this JSON file')
    args = parser.parse_args()
    if min(args.rounds, args.steps, *args.threads) < 1:
        parser.error('--rounds, --steps and --threads must be at least 1')
    if 'no statistics' not in args.variants: args.variants.insert(0, 'no statistics')

    images, labels, source = get_images(args.root, 40 * BATCH)
    print(f'{len(images):,} images ({source}), batch {BATCH}, torch {torch.__version__}, {cores} cores, '
          f'{args.rounds} rounds of {args.steps} steps')
    print('threads  activation  variant                    ms/step     cost  (middle half)')
    rows = []
    for threads in args.threads:
        for activation in args.activations: rows += measure(threads, activation, images, labels, args)
    if args.out:
        facts = {'torch': torch.__version__, 'numpy': np.__version__, 'python': platform.python_version(),
                 'processor': platform.machine(), 'cores': cores, 'batch': BATCH,
                 'rounds': args.rounds, 'steps': args.steps, 'images': source}
        args.out.write_text(json.dumps({'facts': facts, 'rows': rows}, indent=1) + '\n')


if __name__ == '__main__': main()
