"""A run as a process, under every option, and when it goes wrong."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from wib_nbdev.activations import ACTIVATIONS
from wib_nbdev.config import Activation, Dataset, Scheme, TrainConfig
from wib_nbdev.data import DATASETS, channel_stats, load, standardise
from wib_nbdev.initializers import SCHEMES
from wib_nbdev.training import Batches, _same_numbers, build_model, evaluate, load_images, resolve_device, train

QUICK = TrainConfig(sample=True, epochs=2, device='cpu')


def numbers(result) -> pd.DataFrame: return result.epochs.drop(columns='seconds')


def test_the_config_names_what_there_is():
    assert get_args(Activation) == ACTIVATIONS and get_args(Scheme) == SCHEMES and get_args(Dataset) == DATASETS


@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_every_activation_trains(activation):
    result = train(replace(QUICK, activation=activation), progress=False)
    assert result.status == 'finished' and result.epochs['loss'].iloc[-2] < 2.3 and list(result.epochs['split']) == ['train', 'valid'] * 2


@pytest.mark.parametrize('change', [
    dict(dataset='cifar10'), dict(optimizer='sgd', lr=0.05), dict(optimizer='adamw', weight_decay=0.1), dict(init='pytorch_default'),
    dict(compensate_bias=True), dict(activation='wib_relu', shift=0.3), dict(gain=1.5), dict(valid='holdout'), dict(amp=True),
    dict(batch_size=300),
], ids=str)
def test_every_option_runs_and_matters(change):
    result, plain = (train(replace(QUICK, **c), progress=False) for c in (change, {}))
    assert result.status == 'finished' and np.isfinite(result.epochs['loss']).all()
    assert not numbers(result).equals(numbers(plain)) and result.config.key != plain.config.key


def test_same_numbers_in_another_process_after_other_work():
    code = ("from wib_nbdev.training import *; r = train(TrainConfig(sample=True, epochs=2, device='cpu'), progress=False); "
            "print(r.losses['loss'].map(float.hex).tolist(), r.epochs['accuracy'].tolist())")
    before = 'import torch; torch.manual_seed(3); torch.randn(999, 999) @ torch.randn(999, 999); '
    run = lambda code: subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout
    assert run(code) == run(before + code)


def test_nothing_outside_is_touched():
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train(QUICK, record=True, progress=False)
    assert torch.get_rng_state().equal(state) and torch.get_num_threads() == threads


def test_arms_are_paired():
    "One seed: the same weights where the shapes allow, and the same batches."
    models = {name: build_model(replace(QUICK, activation=name), 1).state_dict() for name in ('relu', 'prelu', 'wib_relu_batch')}
    for state in models.values(): assert torch.equal(state['conv4.conv.weight'], models['relu']['conv4.conv.weight'])
    assert not torch.equal(build_model(replace(QUICK, seed=1), 1).dense.weight, models['relu']['dense.weight'])
    # At a learning rate too small to move anything, the losses of a batch are those of the initial weights on it.
    frozen = [train(replace(QUICK, lr=1e-30, epochs=1), progress=False).losses['loss'] for _ in range(2)]
    assert frozen[0].equals(frozen[1]) and frozen[0].nunique() == len(frozen[0])


def images_met(config: TrainConfig) -> torch.Tensor:
    "Every image that the first convolution is given in training, in order."
    met: list[torch.Tensor] = []
    def note(layer, given):
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (5, 5) and layer.training: met.append(given[0].clone())
    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try: train(config, progress=False)
    finally: handle.remove()
    return torch.cat(met)


def test_arms_meet_the_same_images_in_the_same_order():
    first = images_met(replace(QUICK, activation='relu'))
    assert len(first) == 2 * 1000 and not torch.equal(first[:1000], first[1000:])
    for name in ('prelu', 'wib_relu_batch'): assert torch.equal(images_met(replace(QUICK, activation=name)), first)
    assert not torch.equal(images_met(replace(QUICK, seed=1)), first)


def test_losses_and_accuracy_are_what_they_say():
    "Recomputed by hand from the trained network, in one batch."
    result, images = train(QUICK, progress=False), load('fashion_mnist', sample=True)
    mean, std = channel_stats(images.x_train)
    with torch.no_grad(): logits = result.model.eval()(standardise(images.x_test, mean, std))
    last = result.epochs.iloc[-1]
    assert last['loss'] == pytest.approx(F.cross_entropy(logits, images.y_test).item(), rel=1e-5)
    assert last['accuracy'] == pytest.approx((logits.argmax(1) == images.y_test).float().mean().item())
    train_row, sizes = result.epochs.query("epoch == 1 and split == 'train'").iloc[0], [256, 256, 256, 232]
    assert train_row['loss'] == pytest.approx(np.average(result.losses['loss'][:4], weights=sizes))


def test_evaluation_leaves_the_mode_and_gradients_alone():
    images = load('fashion_mnist', sample=True)
    batches = Batches(images.x_test, images.y_test, *channel_stats(images.x_train), batch_size=64)
    model = build_model(replace(QUICK, activation='wib_relu_batch'), 1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert evaluate(model, batches) == evaluate(model, batches)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Conversions(TorchDispatchMode):
    "Notes the dtype of every tensor that is converted or copied to another device."
    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default: self.dtypes.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


def test_a_batch_converts_its_images_and_nothing_else():
    "On a GPU, to move the statistics again in every step would be to wait for it in every step."
    images = load('cifar10', sample=True)
    statistics = channel_stats(images.x_train)
    run = Batches(images.x_train, images.y_train, *statistics, batch_size=64)(torch.arange(1000))
    with Conversions() as seen: x, y = next(run)
    assert seen.dtypes == [torch.uint8]
    expected = standardise(images.x_train[:64], *statistics)
    assert torch.equal(x, expected) and torch.equal(y, images.y_train[:64])
    assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('dataset', ['fashion_mnist', 'cifar10'])
@pytest.mark.parametrize('batch_size', [64, 300])
def test_batches_are_the_standardised_images_to_the_last_bit(dataset, batch_size):
    images = load(dataset, sample=True)
    statistics = channel_stats(images.x_train)
    batches = Batches(images.x_train, images.y_train, *statistics, batch_size)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    expected = standardise(images.x_train, *statistics)
    for chosen, index in ((order, order), (None, torch.arange(1000))):
        x, y = (torch.cat(parts) for parts in zip(*batches(chosen), strict=True))
        assert torch.equal(x, expected[index]) and torch.equal(y, images.y_train[index])
    with pytest.raises(TypeError, match='x'): Batches(images.x_train.float(), images.y_train, *statistics, batch_size)


def test_what_is_asked_of_the_recorder_is_there():
    plain = train(QUICK, progress=False)
    watched = train(QUICK, record=dict(histogram=True, updates=True), progress=False)
    assert watched.losses.equals(plain.losses)  # watching changes nothing
    updates = watched.recorder.updates_frame()
    assert updates['layer'].nunique() == 5 and updates['iteration'].nunique() == len(watched.losses) and (updates['update_std'] > 0).all()
    assert len(watched.recorder.histogram_frame('conv1')) == len(watched.losses)
    assert train(QUICK, record={}, progress=False).activations is not None and plain.recorder is None


def test_the_bar_shows_loss_and_accuracy_from_the_first_batch_on(capsys):
    train(replace(QUICK, epochs=1, batch_size=8), progress=True)
    shown = capsys.readouterr().err
    assert re.search(r'train loss \d\.\d+, accuracy 0\.\d+', shown.split('valid loss')[0]) and re.search(r'<\d\d:\d\d', shown)


def test_statistics_that_do_not_fit_are_refused_before_the_first_batch():
    images = load('cifar10', sample=True)
    mean, std = channel_stats(images.x_train)
    with pytest.raises(ValueError, match='must be above 0 in every channel'):
        Batches(images.x_train, images.y_train, mean, 0 * std, batch_size=64)


def test_holdout_keeps_the_test_images_out_of_sight():
    held, whole = load_images(replace(QUICK, valid='holdout')), load_images(QUICK)
    rows = lambda x: {image.numpy().tobytes() for image in x}
    assert rows(held.x_test) <= rows(whole.x_train) and not rows(held.x_test) & rows(held.x_train)
    assert len(held.x_train) + len(held.x_test) == len(whole.x_train)


def test_divergence_is_a_result():
    result = train(replace(QUICK, optimizer='sgd', lr=1e8, epochs=5), progress=False)
    assert result.status == 'diverged' and len(result.epochs) < 10 and not np.isfinite(result.epochs['loss'].iloc[-1])


def test_interruption_is_a_result_and_a_message():
    "A real Ctrl-C in a real process, in mid-run."
    code = '''
import sys
from wib_nbdev.training import *
if __name__ == '__main__':
    result = train(TrainConfig(sample=True, epochs=100000, device='cpu'), progress=True)
    print(result.status, len(result.epochs), result.epochs['epoch'].max())
'''
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
    seen = ''
    deadline = time.time() + 60
    while 'valid loss' not in seen and time.time() < deadline: seen += process.stderr.read(200)
    assert 'valid loss' in seen
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    status, rows, epochs = out.split()
    assert process.returncode == 0 and status == 'interrupted' and int(rows) >= 2 * int(epochs) - 1
    assert 'epochs that were finished of 100000' in err and 'Traceback' not in err
    assert 'accuracy' in seen and '%' in seen  # the bar: how far, how well, how long


def test_compile_gives_the_same_training():
    if not (shutil.which('c++') or shutil.which('g++')): pytest.skip('needs a C++ compiler')
    eager, compiled = (train(replace(QUICK, epochs=1, compile=c), progress=False) for c in (False, True))
    np.testing.assert_allclose(compiled.losses['loss'], eager.losses['loss'], rtol=1e-3)
    train(replace(QUICK, epochs=1, compile=True, batch_size=100), progress=False)  # another size: shapes would be dynamic from here on
    again = train(replace(QUICK, epochs=1, compile=True), progress=False)
    assert again.losses.equals(compiled.losses)


@pytest.mark.parametrize('device', ['cuda', 'mps'])
def test_a_device_that_is_not_there(device):
    there = torch.cuda.is_available() if device == 'cuda' else torch.backends.mps.is_available()
    if there: pytest.skip(f'this machine has {device}')
    with pytest.raises(ValueError, match=f"device='{device}': torch .* finds none on this machine; try device='auto'"):
        resolve_device(device)


@pytest.mark.cuda
def test_on_a_gpu():
    cuda = replace(QUICK, device='cuda')
    first, second = train(cuda, progress=False), train(cuda, progress=False)
    assert first.losses.equals(second.losses)
    np.testing.assert_allclose(first.losses['loss'], train(QUICK, progress=False).losses['loss'], atol=0.05)
    assert train(replace(cuda, amp=True, compile=True), progress=False).status == 'finished'


@pytest.mark.cuda
def test_a_second_batch_is_made_without_a_sync():
    images = load('cifar10', sample=True).to('cuda')
    run = Batches(images.x_train, images.y_train, *channel_stats(images.x_train), batch_size=64)(torch.arange(1000, device='cuda'))
    next(run)
    torch.cuda.set_sync_debug_mode('error')
    try: x, _ = next(run)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert x.is_cuda and len(x) == 64


@pytest.mark.parametrize('tf32', [False, True])
def test_the_flags_of_a_gpu_run_leave_tf32_as_it_is_set(tf32):
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=tf32):
        with pytest.raises(KeyboardInterrupt), _same_numbers(torch.device('cuda')):
            assert (cudnn.allow_tf32, cudnn.enabled, cudnn.benchmark, cudnn.deterministic) == (tf32, True, False, True)
            raise KeyboardInterrupt
        assert (cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic) == (tf32, True, False)


def test_config_survives_a_round_trip_through_its_fields():
    config = TrainConfig(dataset='cifar10', activation='wib_relu', lr=1, gain=1, shift=0, seed=7, valid='holdout')
    assert TrainConfig(**asdict(config)) == config and TrainConfig(**asdict(config)).key == config.key
    assert {each.name for each in fields(config)} == set(asdict(config))


def test_numbers_of_numpy_are_numbers():
    given, plain = TrainConfig(seed=np.int64(3), epochs=np.int32(2), lr=np.float32(0.5)), TrainConfig(seed=3, epochs=2, lr=0.5)
    assert given == plain and given.key == plain.key


def test_every_field_is_in_the_key():
    other = dict(
        dataset='cifar10', activation='elu', init='alexnet', gain=1.1, epochs=3, batch_size=3, lr=0.1, optimizer='sgd',
        momentum=0.1, weight_decay=0.1, seed=3, valid='holdout', sample=True, device='cpu', amp=True, compile=True, compensate_bias=True,
    )
    assert other.keys() | {'shift'} == {each.name for each in fields(TrainConfig)}
    assert len({TrainConfig(**{name: value}).key for name, value in other.items()} | {TrainConfig().key}) == len(other) + 1
    assert len({TrainConfig(activation='wib_relu', shift=shift).key for shift in (None, 0.1, 0.2)}) == 3  # only such a unit has one


def test_environment_names_no_person_or_place():
    environment = train(QUICK, progress=False).environment
    assert set(environment) == {'wib_nbdev', 'torch', 'numpy', 'python', 'system', 'device', 'processor', 'threads'}
    assert os.path.expanduser('~') not in str(environment)
