"""One epoch of Fashion-MNIST with statistics at every iteration, beside fastai, Lightning and a plain loop.

    python benchmarks/training.py --root data --rounds 3 --out training.json
    python benchmarks/training.py --device cuda

Every rival trains the same plain CNN (channels_last) with Adam in batches of 256 and validates, as its users
write it. The clock runs from the tensors or data sets in memory and all imports done to the end of
validation, for every rival alike. The floor is forward, backward and step on one fixed batch, as many times
as an epoch has batches. Rivals whose package is missing are named.

First whole epochs, 60,000 images and 10,000 for validation, each rival in a process of its own: seconds and
peak memory. Machines that are shared change their pace by the second, so then small epochs of 20 batches
(and 3) in turns in one process: the ratio to the floor of the same turn, its median and quartiles.
"""
import importlib.util
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset
from tqdm import trange

from wib_nbdev.config import TrainConfig
from wib_nbdev.data import ImageDataset, channel_stats, load, standardise
from wib_nbdev.models import plain_cnn
from wib_nbdev.recorder import ACTIVATION_TYPES
from wib_nbdev.training import train

LR, BATCH = 0.004, 256


@dataclass
class Options:
    """One epoch beside the rivals."""
    root: Path = Path('data')  # folder of Fashion-MNIST
    rounds: int = 3  # whole epochs of each rival; 0 for none
    turns: int = 30  # small epochs of each rival; 0 for none
    threads: int = 2  # threads of torch
    device: str = 'cpu'  # where all rivals train: 'cpu' or 'cuda'
    only: tuple[str, ...] = ()  # parts of names: just these rivals, and the floor (default: all)
    rival: str | None = None  # run this one alone, once, and print its seconds and peak memory as JSON
    out: Path | None = None  # where to write the numbers as JSON


@dataclass
class Data:
    "Fashion-MNIST, or the first images of it."
    root: Path
    n_train: int = 60_000
    n_valid: int = 10_000
    device: str = 'cpu'

    def images(self) -> ImageDataset:
        whole = load('fashion_mnist', self.root)
        return replace(whole, x_train=whole.x_train[:self.n_train], y_train=whole.y_train[:self.n_train],
                       x_test=whole.x_test[:self.n_valid], y_test=whole.y_test[:self.n_valid])


def tensors(data: Data) -> tuple[torch.Tensor, ...]:
    "Standardised float32 training and validation images and their labels, in memory."
    images = data.images()
    mean, std = channel_stats(images.x_train)
    x_train, x_test = (standardise(x, mean, std) for x in (images.x_train, images.x_test))
    return tuple(each.to(data.device) for each in (x_train, images.y_train, x_test, images.y_test))


def network(device: str) -> nn.Sequential:
    torch.manual_seed(0)
    return plain_cnn(1).to(device, memory_format=torch.channels_last)


def naive_hooks(model: nn.Module, rows: list[tuple[float, ...]]) -> None:
    "Statistics as one first writes them: several passes, and a number read for each."
    def hook(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
        if module.training:
            rows.append((out.mean().item(), out.std().item(),
                         (out.abs() < 0.5).float().mean().item(), (out <= 0.05).float().mean().item()))
    for module in model.modules():
        if isinstance(module, ACTIVATION_TYPES): module.register_forward_hook(hook)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


# What the clock runs over; each rival below imports and loads what it needs, then returns one.
Epoch = Callable[[], object]


def floor(data: Data) -> Epoch:
    x, y, *_ = tensors(data)
    x, y, model = x[:BATCH].to(memory_format=torch.channels_last), y[:BATCH], network(data.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    def epoch() -> None:
        for _ in range(-(-data.n_train // BATCH)): step(model, optimizer, x, y)
        with torch.no_grad():
            for _ in range(-(-data.n_valid // BATCH)): model(x)
    return epoch


# What ActivationStats counts, where it is hung.
AS_FASTAI = dict(layers=['conv1', 'conv2', 'conv3', 'conv4'], near_zero=['near_zero_0.05'])


def ours(record: bool | dict[str, Any]) -> Callable[[Data], Epoch]:
    def prepare(data: Data) -> Epoch:
        images = data.images()
        return lambda: train(TrainConfig(epochs=1, device=data.device), images, record=record, progress=False)
    return prepare


def loop(batches: DataLoader, valid: DataLoader, device: str) -> Epoch:
    def epoch() -> None:
        model, rows = network(device), []
        naive_hooks(model, rows)
        optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
        for x, y in batches:
            step(model, optimizer, x.to(device, memory_format=torch.channels_last), y.to(device))
        model.eval()
        with torch.no_grad():
            sum((model(x.to(device)).argmax(1) == y.to(device)).sum().item() for x, y in valid)
    return epoch


def torchvision_loaders(data: Data) -> tuple[DataLoader, DataLoader]:
    from torchvision import datasets, transforms
    change = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.286,), (0.353,))])
    sets = {part: datasets.FashionMNIST(data.root, train=part, transform=change) for part in (True, False)}
    few = {part: Subset(images, range(data.n_train if part else data.n_valid))
           for part, images in sets.items()}
    return tuple(DataLoader(images, BATCH, shuffle=part) for part, images in few.items())


def loop_torchvision(data: Data) -> Epoch: return loop(*torchvision_loaders(data), data.device)


def loop_in_memory(data: Data) -> Epoch:
    x, y, x_valid, y_valid = tensors(data)
    class Batches:
        def __init__(self, x: torch.Tensor, y: torch.Tensor): self.x, self.y = x, y
        def __iter__(self):
            order = torch.randperm(len(self.x), device=self.x.device)
            return ((self.x[part], self.y[part]) for part in order.split(BATCH))
    return loop(Batches(x, y), Batches(x_valid, y_valid), data.device)


def fastai_learner(batches: DataLoader, valid: DataLoader, device: str) -> Epoch:
    import fastai.callback.progress  # noqa: F401  gives a Learner its no_bar
    from fastai.callback.hook import ActivationStats
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.metrics import accuracy
    from fastcore.foundation import L
    model = network(device)
    stats = ActivationStats(modules=L(module for module in model.modules()
                                      if isinstance(module, ACTIVATION_TYPES)))
    loaders = DataLoaders(batches, valid, device=device)
    learner = Learner(loaders, model, loss_func=F.cross_entropy, metrics=accuracy, cbs=stats)
    def epoch() -> None:
        with learner.no_bar(), learner.no_logging(): learner.fit(1, LR)
    return epoch


def fastai_tensors(data: Data) -> Epoch:
    from fastai.data.load import DataLoader as FastaiLoader
    x, y, x_valid, y_valid = tensors(data)
    sets = TensorDataset(x, y), TensorDataset(x_valid, y_valid)
    return fastai_learner(FastaiLoader(sets[0], bs=BATCH, shuffle=True, num_workers=0),
                          FastaiLoader(sets[1], bs=BATCH, num_workers=0), data.device)


def fastai_hand_made(data: Data) -> Epoch:
    "The best that a fastai user can do: a loader that slices tensors."
    x, y, x_valid, y_valid = tensors(data)
    class Slices:
        def __init__(self, x: torch.Tensor, y: torch.Tensor, shuffle: bool):
            self.x, self.y, self.shuffle = x, y, shuffle
            self.device, self.after_batch = x.device, None
        def __len__(self) -> int: return -(-len(self.x) // BATCH)
        def __iter__(self):
            draw = torch.randperm if self.shuffle else torch.arange
            order = draw(len(self.x), device=self.device)
            return ((self.x[part], self.y[part]) for part in order.split(BATCH))
        def to(self, device): return self
    return fastai_learner(Slices(x, y, True), Slices(x_valid, y_valid, False), data.device)


def lightning_torchvision(data: Data) -> Epoch:
    import lightning
    logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.rows = network('cpu'), []
            naive_hooks(self.model, self.rows)
        def training_step(self, batch, i): return F.cross_entropy(self.model(batch[0]), batch[1])
        def validation_step(self, batch, i):
            self.log('accuracy', (self.model(batch[0]).argmax(1) == batch[1]).float().mean())
        def configure_optimizers(self): return torch.optim.Adam(self.parameters(), lr=LR, fused=True)
    settings = dict(max_epochs=1, accelerator='gpu' if data.device == 'cuda' else 'cpu',
                    num_sanity_val_steps=0, logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False)
    loaders, module = torchvision_loaders(data), Module()
    return lambda: lightning.Trainer(**settings).fit(module, *loaders)


RIVALS: dict[str, tuple[str, Callable[[Data], Epoch]]] = {
    'floor: one fixed batch': ('torch', floor),
    'wib_nbdev, no statistics': ('torch', ours(False)),
    'wib_nbdev, statistics': ('torch', ours(True)),
    'wib_nbdev, the statistics of fastai': ('torch', ours(AS_FASTAI)),
    'plain loop in memory, naive hooks': ('torch', loop_in_memory),
    'plain loop, torchvision DataLoader, naive hooks': ('torch', loop_torchvision),
    'fastai + ActivationStats, hand-made loader': ('fastai', fastai_hand_made),
    'fastai + ActivationStats, TensorDataset': ('fastai', fastai_tensors),
    'Lightning, torchvision DataLoader, naive hooks': ('lightning', lightning_torchvision),
}


def get_ready(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.optim.Adam(nn.Linear(1, 1).parameters())  # a process's first optimiser imports 1.5 s of torch


def seconds_of(epoch: Epoch) -> float:
    clock = time.perf_counter()
    epoch()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter() - clock


def alone(name: str, options: Options) -> None:
    "Runs one rival in this process and prints what it took; loading the data and importing are not counted."
    get_ready(options.threads)
    epoch = RIVALS[name][1](Data(options.root, device=options.device))
    if options.device == 'cuda':
        small = Data(options.root, BATCH, BATCH, options.device)
        RIVALS[name][1](small)()  # a process's first batch on a GPU loads its kernels
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(epoch)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if options.device == 'cuda': peak_mb = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps(dict(seconds=seconds, peak_mb=peak_mb)))


def whole_epochs(names: list[str], options: Options) -> pd.DataFrame:
    "Each rival in a process of its own, `rounds` times: rival, round, seconds, peak_mb."
    rows = []
    with tempfile.TemporaryDirectory() as elsewhere:
        for turn in range(options.rounds):
            for name in names:
                words = [sys.executable, __file__, '--root', options.root.absolute(),
                         '--threads', options.threads, '--device', options.device, '--rival', name]
                run = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=elsewhere)
                if run.returncode:
                    error = run.stderr.strip().splitlines()[-1]
                    print(f'{name} failed and is left out: {error}', file=sys.stderr, flush=True)
                    continue
                rows.append(dict(rival=name, round=turn, **json.loads(run.stdout.strip().splitlines()[-1])))
                print(f"round {turn + 1} of {options.rounds}: {name}: {rows[-1]['seconds']:.2f} s",
                      file=sys.stderr, flush=True)
    return pd.DataFrame(rows)


def small_epochs(names: list[str], options: Options) -> pd.DataFrame:
    "All rivals in this process, in turns: seconds, a row a turn and a column a rival."
    get_ready(options.threads)
    small = Data(options.root, 20 * BATCH, 3 * BATCH, options.device)
    epochs = {name: RIVALS[name][1](small) for name in names}
    for epoch in epochs.values(): epoch()
    return pd.DataFrame([{name: seconds_of(epoch) for name, epoch in epochs.items()}
                         for _ in trange(options.turns, unit='turn')])


def main(options: Options) -> None:
    if options.rival: return alone(options.rival, options)
    names = [name for name, (package, _) in RIVALS.items() if importlib.util.find_spec(package)]
    names = [name for name in names
             if not options.only or name == names[0] or any(part in name for part in options.only)]
    report: dict[str, Any] = dict(torch=torch.__version__, threads=options.threads, device=options.device)
    where = f'{options.threads} threads' if options.device == 'cpu' else torch.cuda.get_device_name()
    if options.rounds:
        runs = whole_epochs(names, options)
        columns = dict(seconds=('seconds', 'min'), median=('seconds', 'median'), peak_mb=('peak_mb', 'max'))
        table = runs.groupby('rival', sort=False).agg(**columns)
        print(f'\nWhole epochs, {options.rounds} rounds, {where}\n'
              f'{table.round(2).to_string()}')
        report['whole_epochs'] = runs.to_dict('records')
    if options.turns:
        turns = small_epochs(names, options)
        ratios = turns.div(turns[names[0]], axis=0)
        table = ratios.quantile([0.5, 0.25, 0.75]).T
        table = table.set_axis(['times the floor', 'quartile', 'quartile '], axis=1)
        us = 'wib_nbdev, statistics'
        if us in names: table['ours faster by'] = turns.div(turns[us], axis=0).median()
        print(f'\n20 batches in turns, {options.turns} times, {where}\n'
              f'{table.round(2).to_string()}')
        report['small_epochs'] = turns.to_dict('records')
    for name, (package, _) in RIVALS.items():
        if not importlib.util.find_spec(package):
            print(f'left out: {name}: {package} is not installed (the extra bench)')
    if options.out: options.out.write_text(json.dumps(report, indent=2) + '\n')


if __name__ == '__main__': main(tyro.cli(Options, description=__doc__))
