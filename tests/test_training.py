"""A run as a process, under every option, and when it goes wrong."""
import hashlib
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, fields, replace
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from wib_nbdev.activations import ACTIVATIONS
from wib_nbdev.config import Activation, Dataset, Scheme, TrainConfig
from wib_nbdev.data import DATASETS, channel_stats, holdout, load, standardise
from wib_nbdev.initializers import SCHEMES
from wib_nbdev.training import (
    Batches,
    build_model,
    calibration_batch,
    digest,
    evaluate,
    initial_network,
    load_images,
    resolve_device,
    train,
)

QUICK = TrainConfig(sample=True, epochs=2, device='cpu')


def numbers(result) -> pd.DataFrame: return result.epochs.drop(columns='seconds')


def test_the_config_names_what_there_is():
    assert set(get_args(Activation)) == set(ACTIVATIONS) and set(get_args(Scheme)) == set(SCHEMES)
    assert set(get_args(Dataset)) == set(DATASETS)


@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_every_activation_trains(activation):
    result = train(replace(QUICK, activation=activation), progress=False)
    assert result.status == 'finished' and result.epochs['loss'].iloc[-2] < 2.3
    assert list(result.epochs['split']) == ['train', 'valid'] * 2


@pytest.mark.parametrize('change', [
    dict(dataset='cifar10'), dict(optimizer='sgd', lr=0.05), dict(optimizer='sgd', momentum=0.0),
    dict(optimizer='adamw', weight_decay=0.1), dict(init='pytorch_default'), dict(compensate_bias=True),
    dict(activation='wib_relu', shift=0.3), dict(gain=1.5), dict(valid='holdout'), dict(amp=True),
    dict(batch_size=300), dict(n_train=300), dict(network='mlp', depth=2),
    dict(network='deep_cnn', depth=2, width=8, batch_norm=True), dict(network='rnn', depth=28),
    dict(network='mlp', depth=2, activation='wib_relu', calibrate=True),
    dict(network='mlp', depth=2, unit_moment=True),
], ids=str)
def test_every_option_runs_and_matters(change):
    result, plain = (train(replace(QUICK, **each), progress=False) for each in (change, {}))
    assert result.status == 'finished' and np.isfinite(result.epochs['loss']).all()
    assert not numbers(result).equals(numbers(plain)) and result.config.key != plain.config.key


def test_calibration_matters_and_leaves_the_weights_of_a_seed():
    config = replace(QUICK, network='mlp', depth=6, activation='wib_relu', epochs=1)
    plain, calibrated = (train(replace(config, calibrate=each), progress=False) for each in (False, True))
    shifts = [[unit.shift.item() for name, unit in result.model.named_modules() if name.endswith('.act')]
              for result in (plain, calibrated)]
    assert len(set(shifts[0])) == 1 and len(set(shifts[1])) == 6
    assert not numbers(plain).equals(numbers(calibrated))


@pytest.mark.parametrize('network', ['mlp', 'deep_cnn'])
@pytest.mark.parametrize('arm', [{}, dict(activation='wib_relu', calibrate=True)], ids=str)
def test_unit_moments_are_one_after_each_activation_and_scale_a_seed_s_weights(network, arm):
    config = replace(QUICK, network=network, depth=6, width=16, **arm)
    images = load_images(config)
    plain, scaled = (initial_network(replace(config, unit_moment=each), images) for each in (False, True))
    seen = []
    for name, part in scaled.named_modules():
        if name.endswith('.act'): part.register_forward_hook(lambda *call: seen.append(call[-1]))
    scaled(calibration_batch(images))
    assert [a.square().mean().item() for a in seen] == pytest.approx([1] * 6, abs=1e-3)
    means = [a.mean().item() for a in seen]
    assert means == pytest.approx([0] * 6, abs=1e-3) if arm else min(means) > 0.2
    pairs = zip(plain.named_parameters(), scaled.parameters(), strict=True)
    factors = [(b / a).flatten() for (name, a), b in pairs if name.endswith('layer.weight')]
    assert len(factors) == 6
    for each in factors: torch.testing.assert_close(each, each[:1].expand_as(each))


def test_same_numbers_in_another_process_after_other_work():
    code = ("from wib_nbdev.training import *; "
            "r = train(TrainConfig(sample=True, epochs=2, device='cpu'), progress=False); "
            "print(r.weights, r.epochs['loss'].map(float.hex).tolist())")
    before = 'import torch; torch.manual_seed(3); torch.randn(999, 999) @ torch.randn(999, 999); '
    def run(code):
        words = [sys.executable, '-c', code]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert run(code) == run(before + code)


def labels_met(activation, seed) -> torch.Tensor:
    "Those of the training images, in order; then those of the validation."
    met, cross_entropy = [], F.cross_entropy
    def note(logits, labels, **options):
        met.append(labels)
        return cross_entropy(logits, labels, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, 'cross_entropy', note)
        train(replace(QUICK, activation=activation, seed=seed, epochs=1), progress=False)
    return torch.cat(met)


def test_arms_are_paired():
    "The same seed draws the same weights for another activation, and meets the images in the same order."
    first, second = (build_model(replace(QUICK, activation=name, seed=5), (1, 28, 28))
                     for name in ('relu', 'wib_relu'))
    for a, b in zip(first.parameters(), second.parameters(), strict=True): assert torch.equal(a, b)
    met = labels_met('relu', 5)
    assert torch.equal(labels_met('prelu', 5), met) and not torch.equal(labels_met('relu', 6), met)


def test_losses_accuracy_digests_and_correct_images_are_what_they_say():
    result, data = train(QUICK, progress=False), load_images(QUICK)
    x = standardise(data.x_test, *channel_stats(data.x_train))
    with torch.no_grad(): logits = result.model.eval()(x)
    last = result.epochs.iloc[-1]
    assert last['loss'] == pytest.approx(F.cross_entropy(logits, data.y_test).item(), rel=1e-5)
    assert last['accuracy'] == result.correct.mean()
    np.testing.assert_array_equal(result.correct, (logits.argmax(1) == data.y_test).numpy())
    assert result.weights['last'] == digest(result.model) != result.weights['first']
    state = b''.join(each.numpy().tobytes() for _, each in sorted(result.model.state_dict().items()))
    assert result.weights['last'] == hashlib.sha256(state).hexdigest()
    assert train(replace(QUICK, epochs=1), progress=False).weights['last'] == result.weights['first']
    assert len(result.steps) == 2 * -(-len(data.y_train) // QUICK.batch_size)


def test_evaluation_leaves_the_mode_and_gradients_alone():
    data = load('fashion_mnist', sample=True)
    model = build_model(replace(QUICK, activation='wib_relu_batch'), (1, 28, 28)).train()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    frozen = model.conv1.eval()
    evaluate(model, Batches(data.x_test, data.y_test, *channel_stats(data.x_train), 64))
    assert model.training and model.conv2.training and not frozen.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


@pytest.mark.parametrize('dataset', DATASETS)
@pytest.mark.parametrize('batch_size', [64, 300])
def test_batches_are_the_standardised_images_to_the_last_bit(dataset, batch_size):
    data = load(dataset, sample=True)
    mean, std = channel_stats(data.x_train)
    order = torch.randperm(len(data.y_train), generator=torch.Generator().manual_seed(0))
    found = list(Batches(data.x_train, data.y_train, mean, std, batch_size)(order))
    assert torch.equal(torch.cat([x for x, _ in found]), standardise(data.x_train[order], mean, std))
    assert torch.equal(torch.cat([y for _, y in found]), data.y_train[order])


@pytest.mark.parametrize('activation', ['relu', 'wib_relu', 'wib_relu_batch'])
def test_recording_changes_no_number(activation):
    config = replace(QUICK, activation=activation)
    plain, recorded = (train(config, record=record, progress=False)
                       for record in (False, dict(gradients=True, histogram=True, updates=True, every=3)))
    assert plain.weights == recorded.weights and plain.steps.equals(recorded.steps)
    assert set(recorded.layers['iteration']) == {i for i in range(len(plain.steps)) if i % 3 == 0}
    assert recorded.layers['gradient_rms'].gt(0).all() and len(recorded.recorder.updates_frame())


def test_holdout_keeps_the_test_images_out_of_sight():
    data = load('fashion_mnist', sample=True)
    blank = replace(data, x_test=torch.zeros_like(data.x_test))
    seen, blind = (train(replace(QUICK, valid='holdout'), each, progress=False) for each in (data, blank))
    assert numbers(seen).equals(numbers(blind)) and seen.correct is None
    assert len(load_images(replace(QUICK, valid='holdout')).y_train) == len(holdout(data).y_train)


def test_divergence_is_a_result():
    result = train(replace(QUICK, optimizer='sgd', lr=1e6), progress=False)
    assert result.status == 'diverged' and result.correct is None and len(result.epochs) < 4


def test_interruption_is_a_result_and_a_message(capsys):
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    result = train(replace(QUICK, epochs=100_000), progress=False)
    assert result.status == 'interrupted' and len(result.epochs) % 2 in (0, 1)
    assert f'{len(result.epochs) // 2} of 100000 epochs' in capsys.readouterr().err


@pytest.mark.slow
def test_compile_gives_the_same_training():
    plain, compiled = (train(replace(QUICK, compile=each), progress=False) for each in (False, True))
    np.testing.assert_allclose(plain.epochs['loss'], compiled.epochs['loss'], rtol=1e-3)
    with pytest.raises(ValueError, match='record=True with compile=True'):
        train(replace(QUICK, compile=True), record=True)


@pytest.mark.parametrize('device', ['cuda', 'mps'])
def test_a_device_that_is_not_there(device):
    if getattr(torch, 'cuda' if device == 'cuda' else 'mps').is_available(): pytest.skip('it is there')
    with pytest.raises(ValueError, match=f"device='{device}': torch .* finds none"): resolve_device(device)


@pytest.mark.cuda
def test_on_a_gpu():
    config = replace(QUICK, device='cuda')
    first, second, cpu = (train(each, progress=False) for each in (config, config, QUICK))
    assert first.weights == second.weights and first.environment['ran_on'] == 'cuda'
    np.testing.assert_allclose(first.epochs['loss'], cpu.epochs['loss'], rtol=0.05)


@pytest.mark.cuda
@pytest.mark.parametrize('record', [False, True])
def test_a_step_on_a_gpu_waits_for_nothing(record):
    result = train(replace(QUICK, device='cuda', epochs=1), record=record, progress=False)
    data = load('fashion_mnist', sample=True)
    batches = Batches(data.x_train.to('cuda'), data.y_train.to('cuda'), *channel_stats(data.x_train), 256)
    try:
        torch.cuda.set_sync_debug_mode('error')
        for x, y in batches(): F.cross_entropy(result.model(x), y).backward()
    finally: torch.cuda.set_sync_debug_mode('default')


@pytest.mark.cuda
def test_the_flags_of_a_gpu_run_leave_tf32_as_it_is_set():
    before = torch.backends.cudnn.allow_tf32
    train(replace(QUICK, device='cuda', epochs=1), progress=False)
    assert torch.backends.cudnn.allow_tf32 == before


def test_every_field_is_in_the_key_and_survives_a_round_trip():
    other = dict(dataset='cifar10', activation='elu', init='orthogonal', gain=1.5, shift=0.2,
                 compensate_bias=True, epochs=3, batch_size=7, lr=0.1, optimizer='sgd', momentum=0.1,
                 weight_decay=0.1, seed=1, valid='holdout', sample=True, device='cpu', amp=True, compile=True,
                 network='mlp', depth=3, width=5, n_train=10, calibrate=True, batch_norm=True,
                 unit_moment=True)
    needs = dict(shift=dict(activation='wib_relu'), calibrate=dict(activation='wib_relu'),
                 depth=dict(network='mlp'), network=dict(depth=2), width=dict(network='mlp', depth=2),
                 batch_norm=dict(network='mlp', depth=2), unit_moment=dict(network='mlp', depth=2))
    assert set(other) == {each.name for each in fields(TrainConfig)}
    for name, value in other.items():
        without = needs.get(name, {}) if name != 'network' else {}
        if name == 'depth': without = dict(network='mlp', depth=2)
        config = TrainConfig(**{**needs.get(name, {}), name: value})
        assert config.key != TrainConfig(**without).key, name
        assert TrainConfig(**asdict(config)) == config


def test_environment_names_no_person_or_place():
    told = train(replace(QUICK, epochs=1), progress=False).environment
    assert {'torch', 'numpy', 'cpu_capability', 'machine', 'processor', 'threads', 'ran_on'} <= set(told)
    text = ' '.join(map(str, told.values()))
    assert os.uname().nodename not in text and os.path.expanduser('~') not in text
