"""WIB-ReLU beside nn.ReLU: time and memory, by itself and inside the plain CNN, measured in turns in one run.

    python benchmarks/activations.py --rounds 40 --out activations.json

`by itself` is one activation, forward and backward, on the largest and the smallest tensor of the plain CNN
at batch 256, and on a larger one. `in the plain CNN` is a whole training step: forward, loss, backward,
Adam. In each round every rival runs once, in an order that changes, and is compared with nn.ReLU in the
same round, so that a slow moment of the machine meets both; the ratio is the median over rounds, `low` to
`high` its 95 % bootstrap interval. `nn.ReLU, again` is nn.ReLU a second time: how far its ratio is from 1
is noise. Compiled times are taken wherever torch.compile works.
"""
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from torch import nn
from torch.nn import functional as F

from wib_nbdev.activations import EQ7_SHIFT, WIBReLU
from wib_nbdev.models import plain_cnn


@dataclass
class Options:
    """Time and memory of WIB-ReLU beside ReLU."""
    rounds: int = 40
    "rounds; in each, every rival runs once"
    threads: int = 2
    "threads of torch"
    eager_only: bool = False
    "leave torch.compile out"
    out: Path | None = None
    "where to write the numbers as JSON"


class Difference(nn.Module):
    "Eq. 8 as one would first write it."
    def forward(self, x: torch.Tensor) -> torch.Tensor: return F.relu(x) - EQ7_SHIFT


class PerChannel(WIBReLU):
    "WIB-ReLU with a shift for each channel, made at the first call."
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.shift.dim(): self.shift = self.shift.repeat(x.shape[1])
        return super().forward(x)


RIVALS = {'nn.ReLU': nn.ReLU, 'nn.ReLU, again': nn.ReLU, 'WIBReLU': WIBReLU,
          'WIBReLU, per channel': PerChannel, 'F.relu(x) - shift': Difference}


def alone(kind: Callable[[], nn.Module], shape: tuple[int, ...], compiled: bool) -> Callable[[], None]:
    x, gradient = torch.randn(shape).requires_grad_(), torch.randn(shape)
    unit = torch.compile(kind()) if compiled else kind()
    def step() -> None:
        for _ in range(10): torch.autograd.grad(unit(x), x, gradient)
    return step


def in_network(kind: Callable[[], nn.Module], compiled: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    model = plain_cnn(1, activation=kind).to(memory_format=torch.channels_last)
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    x, y = torch.randn(256, 1, 28, 28).to(memory_format=torch.channels_last), torch.randint(0, 10, (256,))
    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(run(x), y).backward()
        optimizer.step()
    return step


def saved_bytes(kind: Callable[[], nn.Module]) -> int:
    "Bytes that the plain CNN keeps for its backward pass at batch 256."
    storages = {}
    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor
    model = plain_cnn(1, activation=kind)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(torch.randn(256, 1, 28, 28))
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def can_compile() -> bool:
    "Whether torch.compile works here: it needs a C++ compiler, and says so in many ways."
    try: torch.compile(lambda x: x.sin() + 1)(torch.ones(4))
    except Exception as error:
        print(f'torch.compile does not work here ({type(error).__name__}): eager only')
        return False
    return True


def race(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    "Seconds of each rival in each round, after two rounds to warm up."
    names, seconds = list(steps), {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            start = time.perf_counter()
            steps[name]()
            if turn >= 2: seconds[name].append(time.perf_counter() - start)
    return seconds


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    rows, draw = [], np.random.default_rng(0)
    for compiled in (False, True) if not options.eager_only and can_compile() else (False,):
        places = {f'by itself, {shape}': {name: alone(kind, shape, compiled) for name, kind in RIVALS.items()}
                  for shape in ((256, 8, 14, 14), (256, 64, 2, 2), (32, 64, 28, 28))}
        networks = {name: in_network(kind, compiled) for name, kind in RIVALS.items()}
        places['in the plain CNN, a step'] = networks
        for place, steps in places.items():
            seconds = race(steps, options.rounds)
            calls = 10 if place.startswith('by itself') else 1
            mode = 'compiled' if compiled else 'eager'
            for name, times in seconds.items():
                ratios = np.array(times) / seconds['nn.ReLU']
                medians = np.median(draw.choice(ratios, (2000, len(ratios))), axis=1)
                low, high = np.quantile(medians, [0.025, 0.975])
                rows.append(dict(mode=mode, place=place, rival=name,
                                 microseconds=np.median(times) / calls * 1e6,
                                 ratio=np.median(ratios), low=low, high=high))
    table = pd.DataFrame(rows)
    memory = {name: saved_bytes(kind) for name, kind in RIVALS.items()}
    print(table.to_string(index=False, float_format='{:.3f}'.format))
    print('\nkept for the backward pass of the plain CNN, batch 256 (MB):')
    for name, kept in memory.items(): print(f'  {name:20} {kept / 1e6:7.2f}  {kept / memory["nn.ReLU"]:.3f}')
    if options.out:
        facts = dict(torch=torch.__version__, threads=options.threads, rounds=options.rounds, times=rows,
                     saved_bytes=memory)
        options.out.write_text(json.dumps(facts, indent=2) + '\n')


if __name__ == '__main__': main(tyro.cli(Options, description=__doc__))
