"""Surgery on networks that are not ours: what is swapped, one calibrating pass, exact folding, and a model left whole after an error."""
import copy
import inspect
import io
import math
import os
import pickle
import random
import re
import subprocess
import sys
import textwrap
import warnings
from collections import UserDict
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from wib_nbdev.activations import CENTRED_GAIN, WIBReLU
from wib_nbdev.models import plain_cnn
from wib_nbdev.recorder import ActivationRecorder
from wib_nbdev.surgery import (
    ClampMin,
    calibrate,
    deep_mlp,
    diagnose,
    fold_shift,
    measure_signal,
    plot_diagnosis,
    plot_signal,
    predict_signal,
    swap_activations,
    write_tensorboard,
)


def images(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def snapshot(model):
    "All that an operation might leave behind."
    return dict(state={name: value.clone() for name, value in model.state_dict().items()},
                modes=[module.training for module in model.modules()], kinds=[type(module) for module in model.modules()],
                names=[name for name, _ in model.named_modules()], forwards=[type(module).forward for module in model.modules()],
                hooks=[len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
                gradients=[None if p.grad is None else p.grad.clone() for p in model.parameters()])


def assert_same(model, before, but=()):
    after = snapshot(model)
    for name in before:
        if name == 'state':
            assert before['state'].keys() == after['state'].keys()
            kept = [key for key in before['state'] if not key.endswith(but or ('no such key',))]
            assert all(torch.equal(before['state'][key], after['state'][key]) for key in kept)
        elif name == 'gradients':
            assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
        else: assert before[name] == after[name], name


class Block(nn.Module):
    "A residual block that calls one ReLU twice and another as a function."
    def __init__(self, width=6):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        z = self.act(self.conv1(x))
        return F.relu(self.act(self.conv2(z)) + x, inplace=True)


def uncentred(model):
    "The same model with all shifts 0: it must be the ReLU network."
    for module in model.modules():
        if isinstance(module, WIBReLU): module.set_shift(0.0)
    return model


# Swapping

def test_each_call_gets_a_unit_of_its_own_and_the_function_is_the_same():
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3), Block(), Block()), images(4, 3, 9, 9)
    expected, weights = model(x), list(model.parameters())
    report = swap_activations(model)
    assert report['swapped'].all() and list(report['name']) == [
        '1.act', '2.act', '1.act_1', '1.relu_1', '2.act_1', '2.relu_1']
    assert isinstance(model[1], Block) and all(a is b for a, b in zip(weights, model.parameters(), strict=True))
    assert 'is no longer in place' in report['note'][0]
    torch.testing.assert_close(uncentred(model)(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), copy.copy],
                         ids=['deepcopy', 'pickle', 'copy'])
def test_a_rewired_model_can_be_duplicated(duplicate):
    model, x = nn.Sequential(Block()), images(2, 6, 5, 5)
    swap_activations(model)
    calibrate(model, x)
    twin = duplicate(model)
    assert torch.equal(twin(x), model(x)) and isinstance(twin[0], Block)
    if duplicate is not copy.copy:
        twin[0].act.set_shift(3.0)
        assert not torch.equal(twin(x), model(x))


class Calls(nn.Sequential):
    def forward(self, x): return F.relu(super().forward(x))


class OverChildren(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
    def forward(self, x):
        for child in self.children(): x = F.relu(child(x))
        return x


@pytest.mark.parametrize('model', [Calls(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), OverChildren()], ids=['Sequential', 'children'])
def test_a_forward_over_its_children_does_not_run_those_of_the_swap(model):
    first, second = (module for module in model.modules() if isinstance(module, nn.Linear))
    x, shift = images(5, 4), WIBReLU().shift.item()
    expected = F.relu(second(F.relu(first(x)) - shift)) - shift
    swap_activations(model)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))): torch.testing.assert_close(twin(x), expected)
    swap_activations(model, WIBReLU, nn.ReLU)
    swap_activations(model)
    for twin in (model, copy.deepcopy(copy.deepcopy(model))): torch.testing.assert_close(twin(x), expected)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.dense = nn.Conv2d(1, 3, 3), nn.Linear(3, 2)
    def forward(self, image): return self.dense(F.relu(self.conv(image)).mean((2, 3)))


def test_a_root_that_calls_functions_is_folded_and_exported():
    model, x = Functional(), images(4, 1, 8, 8)
    names = torch.export.export(model, (x,)).graph_signature.user_inputs
    swap_activations(model)
    calibrate(model, x)
    assert fold_shift(model.eval(), x)['folded'].all()
    program = torch.export.export(model, (x,))
    assert program.graph_signature.user_inputs == names == ('image',)
    torch.testing.assert_close(program.module()(x), model(x))


def test_a_forward_replaced_on_the_instance_is_named():
    model = nn.Sequential(Functional(), nn.ReLU())
    old = model[0].forward
    model[0].forward = lambda *args: old(*args)
    report = swap_activations(model).set_index('name')
    assert report.loc['1', 'swapped'] and not report.loc['0', 'swapped']
    assert 'was replaced on the instance (by accelerate, for one): swap before that' in report.loc['0', 'note']
    inside = Joined(nn.ReLU(), torch.add)
    inside.forward = lambda x: F.relu(inside.block(x))
    assert swap_activations(inside)['swapped'].tolist() == [True, False]
    swapped = nn.Sequential(Functional())
    swap_activations(swapped)
    swapped[0].forward = swapped[0].forward  # afterwards: as accelerate does
    assert any(isinstance(module, WIBReLU) for module in copy.deepcopy(swapped).modules())


class InPlaceFirst(nn.Module):
    "Overwrites what it was given."
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)
    def forward(self, x): return self.conv(self.act(x))


class Joined(nn.Module):
    def __init__(self, block, join):
        super().__init__()
        self.conv, self.block, self.join = nn.Conv2d(3, 3, 1), block, join
    def forward(self, x):
        x = self.conv(x)
        return self.join(self.block(x), x)


class ThroughAView(nn.Module):
    def forward(self, x):
        y = x * 2
        F.relu(y.view(-1), inplace=True)
        return y


class InPlaceUntraced(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)
    def forward(self, x, scale=1):
        y = scale * x
        return self.act(y) + y


def in_place_block(old):
    return nn.Sequential(nn.Identity(), old(inplace=True), nn.Conv2d(3, 3, 3, padding=1), old(inplace=True))


@pytest.mark.parametrize('make, old', [
    (lambda: Joined(in_place_block(nn.ReLU), lambda y, x: y.add_(x)), nn.ReLU),
    (lambda: Joined(in_place_block(nn.LeakyReLU), lambda y, x: torch.cat([x, y], 1)), nn.LeakyReLU),
    (lambda: Joined(InPlaceFirst(), torch.add), nn.ReLU), (ThroughAView, nn.ReLU), (InPlaceUntraced, nn.ReLU)],
    ids=['VQ-VAE', 'U-Net', 'pre-activation', 'view', 'untraced'])
def test_what_in_place_calls_did_out_of_sight_is_noted(make, old):
    model, x = make().eval(), images(2, 3, 6, 6)
    expected = model(x.clone())
    note = swap_activations(model, old, partial(old, inplace=False))['note']
    assert not torch.equal(model(x.clone()), expected)
    held = 'was in place on a tensor that others may hold: who reads it later no longer sees the activation'
    assert note[0].endswith(held) and not any(held in other for other in note[1:])


class AlsoAs(nn.Module):
    "Writes over a tensor that it also has under another name, and makes a number larger that it goes on using."
    def __init__(self, write):
        super().__init__()
        self.linear, self.write = nn.Linear(4, 4), write
    def forward(self, x):
        h = self.linear(x)
        t, n = self.write(h), h.size(0)
        m = n
        m += 1
        return F.relu(t) + h * n - m


def added(h):
    t = h
    t += 1
    return t


def scaled(h):
    t = h
    t -= 3
    t *= 2
    t /= 5
    return t


def added_to_an_attribute(h):
    h.data += 1
    t = h.T
    t *= 2
    return h


@pytest.mark.parametrize('write', [added, scaled, added_to_an_attribute])
def test_operators_in_place_stay_in_place(write):
    model, x = AlsoAs(write), images(5, 4)
    expected = model(x)
    swap_activations(model)
    assert torch.equal(uncentred(model)(x), expected) and not any(isinstance(m, nn.ReLU) for m in model.modules())
    assert torch.equal(copy.deepcopy(model)(x), expected)


def test_calls_in_every_spelling():
    class Spelled(nn.Module):
        def forward(self, x):
            y = torch.relu(x) + F.relu(input=x) + x.relu()
            return y + torch.relu_(x.clone()) + F.relu_(x.clone()) + x.clone().relu_()
    model, x = Spelled(), images(3, 4)
    expected = model(x)
    assert len(swap_activations(model)) == 6
    torch.testing.assert_close(uncentred(model)(x), expected, rtol=0, atol=0)
    assert sum(isinstance(module, WIBReLU) for module in model.modules()) == 6


def test_who_read_an_input_after_an_in_place_call_still_reads_the_output():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU(inplace=True)
        def forward(self, x):
            x = x * 2
            self.act(x)
            y = x + 1
            F.relu(y, inplace=True)
            return x + y
    model, x = InPlace(), images(3, 4)
    expected = model(x)
    swap_activations(model)
    assert torch.equal(uncentred(model)(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)


def test_a_module_shared_between_places_becomes_a_unit_for_each():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), act, nn.ModuleDict(dict(inner=nn.Sequential(nn.Linear(4, 4), act)))['inner'], act)
    report = swap_activations(model)
    units = [model[1], model[2][1], model[3]]
    assert list(report['name']) == ['1', '3', '2.1'] or list(report['name']) == ['1', '2.1', '3']
    assert len({id(unit) for unit in units}) == 3 and all(isinstance(unit, WIBReLU) for unit in units)


def test_a_nested_container_called_twice():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.acts = nn.ModuleList([nn.ReLU(), nn.ModuleDict(dict(a=nn.ReLU()))])
        def forward(self, x): return self.acts[0](x) - self.acts[1]['a'](-x) + 2 * self.acts[0](x - 1)
    model, x = Bag(), images(5, 3)
    expected = model(x)
    report = swap_activations(model)
    assert sorted(report['name']) == ['acts.0', 'acts.1.a', 'acts_0_1']
    torch.testing.assert_close(uncentred(model)(x), expected, rtol=0, atol=0)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.ReLU()
    def forward(self, x):
        if x.sum() > 0: x = self.act(x)
        return torch.relu(self.act(self.linear(x)).relu())


def test_what_does_not_trace_is_named():
    model, x = nn.Sequential(Untraceable()), images(3, 4)
    report = swap_activations(model).set_index('name')
    assert report.loc['0.act', 'swapped'] and '2 calls share this unit' in report.loc['0.act', 'note']
    left = report[~report['swapped']]
    assert sorted(re.sub(r'.*\.', '', call) for call in left['old']) == ['relu', 'relu']
    assert left['note'].str.contains('Untraceable.forward does not trace').all()
    assert calibrate(model, x)['calls'].tolist() in ([1], [2])


class Kept(nn.Module):
    "A forward of some kind, to be filled in."
    def __init__(self, run):
        super().__init__()
        self.linear, self.seen, self.nested = nn.Linear(4, 4), [], {'a': [{}]}
        self.run = run
    def forward(self, x): return self.run(self, F.relu(x))


def within(context):
    def run(self, x):
        with context(): y = self.linear(x)
        return x * y
    return run


def kept_in(place):
    def run(self, x):
        place(self)(x)
        return x
    return run


def switched_off(self, x):
    torch.set_grad_enabled(False)
    return self.linear(x)


def skipping(draw):
    return lambda self, x: x if self.training and draw() < 0.5 else self.linear(x)


def drawn_from():
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002


UNTRACED = dict(
    no_grad=(within(torch.no_grad), 'it changes the gradient mode'), enable_grad=(within(torch.enable_grad), 'gradient mode'),
    decorated=(torch.no_grad()(lambda self, x: self.linear(x)), 'gradient mode'), switch=(switched_off, 'gradient mode'),
    inference=(within(torch.inference_mode), 'gradient mode'),
    autocast=(within(lambda: torch.autocast('cpu', enabled=False)), 'it changes the autocast mode'),
    python=(skipping(random.random), 'it draws random numbers'), numpy=(skipping(np.random.rand), 'random numbers'),
    torch=(skipping(lambda: torch.rand(1).item()), 'random numbers'),
    list=(kept_in(lambda self: self.seen.append), r'it keeps state \(seen\)'),
    nested=(kept_in(lambda self: lambda x: self.nested['a'][0].update(x=x)), r'it keeps state \(nested\)'))


@pytest.mark.parametrize('run, message', UNTRACED.values(), ids=UNTRACED)
def test_what_a_graph_would_lose_is_left_alone_and_named(run, message):
    model = nn.Sequential(Kept(run))
    before, states = snapshot(model), drawn_from()
    with pytest.raises(ValueError, match=f'no ReLU could be swapped; 0: Kept.forward does not trace: .*{message}'): swap_activations(model)
    assert_same(model, before)
    assert states == drawn_from()
    assert model[0].seen == [] and model[0].nested == {'a': [{}]} and torch.is_grad_enabled()
    with torch.no_grad(), torch.autocast('cpu', enabled=False): assert not torch.is_grad_enabled()


@pytest.mark.parametrize('kind', ['optional', 'keeps', 'constant', 'random', 'mode'])
def test_a_forward_that_a_trace_would_change_is_left_alone(kind):
    class Optional(nn.Module):
        def forward(self, x, mask=None): return F.relu(x if mask is None else x * mask)
    class Keeps(nn.Module):
        def forward(self, x):
            self.last = x
            return F.relu(x)
    class Constant(nn.Module):
        def forward(self, x): return F.relu(x + torch.tensor(1.0))
    class Random(nn.Module):
        def forward(self, x): return F.relu(x + torch.rand(1))
    class Mode(nn.Module):
        def forward(self, x): return F.relu(x) + F.relu(x - 1) if self.training else F.relu(x)
    model = nn.Sequential(dict(optional=Optional, keeps=Keeps, constant=Constant, random=Random, mode=Mode)[kind]())
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(ValueError, match=r'no ReLU could be swapped; 0: .*forward does not trace'): swap_activations(model)
    assert_same(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not hasattr(model[0], 'last')


def doubled(x): return 2 * x if isinstance(x, torch.Tensor) else x


class AsksForTheClass(nn.Module):
    def forward(self, x):
        if isinstance(x, torch.Tensor): x = 2 * x
        return F.relu(x)


class AsksIsTensor(nn.Module):
    def forward(self, x): return F.relu(2 * x if torch.is_tensor(x) else x)


class AsksInAHelper(nn.Module):
    def forward(self, x): return F.relu(doubled(x))


class AsksForGradients(nn.Module):
    def forward(self, x): return F.relu(2 * x if torch.is_grad_enabled() else x)


@pytest.mark.parametrize('kind, message', [
    (AsksForTheClass, 'it asks whether something is a tensor'), (AsksIsTensor, 'it asks whether something is a tensor'),
    (AsksInAHelper, 'it asks whether something is a tensor'), (AsksForGradients, 'it asks is_grad_enabled, which a trace answers once')])
def test_a_forward_that_asks_what_a_trace_cannot_tell_is_left_alone(kind, message):
    model = nn.Sequential(kind())
    before = snapshot(model)
    with pytest.raises(ValueError, match=f'no ReLU could be swapped; 0: {kind.__name__}.forward does not trace: {message}'):
        swap_activations(model)
    assert_same(model, before)
    with pytest.raises(ValueError, match=f'does not trace: {message}'): fold_shift(nn.Sequential(nn.Linear(4, 4), WIBReLU(), kind()))


def test_a_forward_may_ask_for_the_class_of_a_list():
    class Joins(nn.Module):
        def forward(self, x): return torch.cat(x, 1) if isinstance(x, list) else x
    class Gives(nn.Module):
        def __init__(self):
            super().__init__()
            self.joins = Joins()
        def forward(self, x): return F.relu(self.joins([x, x]))
    model, x = nn.Sequential(nn.Linear(4, 4), WIBReLU(), Gives()), images(5, 4)
    assert swap_activations(model)['swapped'].all()
    expected = model(x)
    assert fold_shift(model, x).set_index('name').loc['1', 'folded']
    torch.testing.assert_close(model(x), expected)


def test_dropout_as_a_function_still_follows_the_mode():
    class Dropped(nn.Module):
        def forward(self, x): return F.dropout(F.relu(x), 0.5, self.training)
    model, x = Dropped(), images(100, 4)
    swap_activations(model)
    uncentred(model)
    assert torch.equal(model.eval()(x), F.relu(x))
    assert not torch.equal(model.train()(x), F.relu(x))


def test_buffers_are_not_touched_by_tracing():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('n', torch.zeros(()))
        def forward(self, x):
            self.n.add_(1)
            return F.relu(x)
    model = Counting()
    swap_activations(model)
    assert model.n == 0
    model(images(2, 2))
    assert model.n == 1


def test_modes_devices_and_dtypes_are_kept():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()).double()
    model[1].eval()
    swap_activations(model, new='prelu')
    assert [model[1].training, model[3].training] == [False, True]
    assert model[1].weight.dtype == torch.float64
    on_meta = nn.Sequential(nn.Linear(4, 4, device='meta'), nn.ReLU())
    swap_activations(on_meta, new=nn.PReLU)
    assert on_meta[1].weight.device.type == 'meta'


def test_swapping_twice_and_back():
    model, x = nn.Sequential(Block()), images(2, 6, 5, 5)
    expected = model(x)
    swap_activations(model)
    swap_activations(model, WIBReLU, nn.ReLU)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert len(swap_activations(model)) == 3
    assert torch.equal(uncentred(copy.deepcopy(model))(x), expected)


def test_readings_b_and_c_are_not_looked_into():
    for name in ('wib_relu_batch', 'wib_relu_code'):
        model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        swap_activations(model, new=name)
        with pytest.raises(ValueError, match='has no ReLU inside, but 1 WIBReLU'): swap_activations(model)


def test_the_transformer_layer_of_torch_does_not_fall_back_to_relu():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    report = swap_activations(model)
    assert list(report['note']) == ['was a function kept as an attribute'] * 2
    x, mask = images(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    mask[:, 4] = True
    for layer in model.layers: layer.activation.set_shift(5.0)
    trained = model.train()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout): layer.p = 0.0
        if isinstance(layer, nn.MultiheadAttention): layer.dropout = 0.0
    for arguments in ({}, dict(src_key_padding_mask=mask)):
        expected = trained.train()(x, **arguments)
        with torch.no_grad(): torch.testing.assert_close(model.eval()(x, **arguments)[:, :4], expected[:, :4])


@pytest.mark.parametrize('form', ['function', 'module'])
@pytest.mark.parametrize('old, new', [('gelu', nn.ReLU), ('gelu', partial(nn.GELU, 'tanh')), ('relu', nn.GELU)])
def test_the_transformer_layer_of_torch_does_not_fall_back_to_what_it_had(form, old, new):
    torch.manual_seed(0)
    kind = dict(gelu=nn.GELU, relu=nn.ReLU)[old]
    model = nn.TransformerEncoderLayer(8, 2, 16, activation=old if form == 'function' else kind(), batch_first=True, dropout=0.0).eval()
    swap_activations(model, kind, new)
    x = images(3, 5, 8)
    expected = model(x)
    with torch.no_grad(): torch.testing.assert_close(model(x), expected)


def test_hooks_and_subclasses_are_named():
    class Special(nn.ReLU): pass
    model = nn.Sequential(nn.ReLU(), Special(), nn.ReLU())
    model[2].register_forward_hook(lambda *_: None)
    report = swap_activations(model)
    assert report['swapped'].tolist() == [True, False, False]
    assert 'subclass of ReLU' in report['note'][1] and 'carries hooks' in report['note'][2]
    for register in (nn.Module.register_full_backward_hook, nn.Module.register_full_backward_pre_hook):
        model = nn.Sequential(nn.ReLU(), nn.ReLU())
        register(model[0], lambda *_: None)
        assert swap_activations(model)['swapped'].tolist() == [False, True]


def test_parameters_that_no_optimiser_knows_are_noted():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    note, = swap_activations(model, new='prelu')['note']
    assert note == 'is no longer in place; has parameters of its own: give them to the optimiser'


def test_a_call_of_prelu_leaves_a_weight():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.full((1,), 0.25))
        def forward(self, x): return F.prelu(x, self.slope)
    model, x = Own(), images(3, 4)
    note, = swap_activations(model, nn.PReLU)['note']
    assert note == 'was a function, whose weight is no longer used' and torch.equal(uncentred(model)(x), F.relu(x))


@pytest.mark.parametrize('old, call', [
    (nn.Sigmoid, torch.sigmoid), (nn.Sigmoid, F.sigmoid), (nn.Sigmoid, lambda x: x.sigmoid()), (nn.Softplus, F.softplus),
    (nn.Hardtanh, F.hardtanh), (nn.Hardsigmoid, F.hardsigmoid), (nn.CELU, F.celu), (nn.LogSigmoid, F.logsigmoid),
    (nn.Softsign, F.softsign)])
def test_other_activations_in_both_forms(old, call):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = old()
        def forward(self, x): return self.act(x) * call(x)
    model, x = Both(), images(3, 4)
    assert swap_activations(model, old, nn.Identity)['swapped'].tolist() == [True, True]
    assert torch.equal(model(x), x * x)


@pytest.mark.parametrize('function', [
    swap_activations, lambda model: calibrate(model, images(2, 4)), lambda model: diagnose(model, images(2, 4)), fold_shift],
    ids=['swap_activations', 'calibrate', 'diagnose', 'fold_shift'])
def test_what_is_no_model(function):
    for wrong in (nn.Linear, images(2, 4), None):
        with pytest.raises(TypeError, match=r'must be an nn.Module instance; \w+\(model'): function(wrong)
    with pytest.raises(TypeError, match='model=Linear:'): function(nn.Linear)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with pytest.raises(ValueError, match='model: is scripted: give the Python module'): function(scripted)
    for lazy, name in ((nn.LazyLinear(3), '0'), (nn.LazyBatchNorm1d(affine=False), '0')):
        model = nn.Sequential(lazy, nn.ReLU(), WIBReLU())
        with pytest.raises(ValueError, match=f'model: {name} is lazy and has no parameters yet: run the model once'): function(model)
        assert model[0].has_uninitialized_params()


class Calling(nn.Module):
    def forward(self, x, scale=1): return F.relu(x)


def test_a_model_that_is_the_activation_itself():
    with pytest.raises(ValueError, match=r'model: is itself the ReLU: put it in an nn\.Sequential'): swap_activations(nn.ReLU())
    with pytest.raises(ValueError, match=r'swapped; \(the model itself\): Calling\.forward does not trace'): swap_activations(Calling())
    with pytest.raises(ValueError, match=r'batch: \(the model itself\) sees values'): calibrate(WIBReLU(), torch.full((2, 2), math.inf))


def test_graph_modules():
    model, x = torch.fx.symbolic_trace(Block()), images(2, 6, 5, 5)
    expected = model(x)
    assert len(swap_activations(model)) == 3
    assert torch.equal(uncentred(model)(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)


def test_errors_of_swapping_leave_the_model():
    model = nn.Sequential(Block(), nn.GELU())
    before = snapshot(model)
    with pytest.raises(ValueError, match='has no SiLU inside, but 1 ReLU, 1 GELU'): swap_activations(model, old=nn.SiLU)
    with pytest.raises(ValueError, match="did you mean 'wib_relu'"): swap_activations(model, new='wibrelu')
    with pytest.raises(TypeError, match='must be a name or a callable'): swap_activations(model, new=nn.ReLU())
    unit = nn.SiLU()
    with pytest.raises(TypeError, match='a new module at each call'): swap_activations(model, new=lambda: unit)
    with pytest.raises(TypeError, match='must be a class of modules'): swap_activations(model, old='relu')
    with pytest.raises(ValueError, match='is compiled'): swap_activations(torch.compile(model))
    made = iter([nn.SiLU(), nn.SiLU(), nn.SiLU()])
    with pytest.raises(StopIteration): swap_activations(model, new=lambda: next(made))
    assert_same(model, before)


# Calibrating

@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_every_unit_has_zero_mean_given_its_calibrated_predecessors(per_channel, dtype):
    model, x = plain_cnn(3, activation='wib_relu', generator=torch.Generator().manual_seed(0)).to(dtype), images(32, 3, 32, 32).to(dtype)
    report = calibrate(model, x, per_channel=per_channel)
    outputs = []
    for module in model.modules():
        if isinstance(module, WIBReLU): module.register_forward_hook(lambda m, args, out: outputs.append(out.double()))
    model(x)
    assert len(outputs) == 4
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}[dtype]
    for out in outputs: assert (out.mean((0, 2, 3)) if per_channel else out.mean()).abs().max() < tolerance
    assert list(report['name']) == [f'conv{i}.act' for i in range(1, 5)] and (report['calls'] == 1).all()
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_it_is_one_pass_idempotent_and_deterministic():
    model, x = plain_cnn(3, activation='wib_relu', generator=torch.Generator().manual_seed(0)), images(16, 3, 32, 32)
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    twin = copy.deepcopy(model)
    first, second = calibrate(model, x), calibrate(model, x)
    assert len(passes) == 2
    handle.remove()
    assert torch.equal(torch.tensor(first['shift']), torch.tensor(second['shift']))
    assert calibrate(twin, x)['shift'].tolist() == first['shift'].tolist()


def layer_by_layer(model, x):
    "Eq. 7 as one would do it by hand: one pass for each layer."
    shifts = {}
    for name in [name for name, module in model.named_modules() if isinstance(module, WIBReLU)]:
        unit, seen = model.get_submodule(name), []
        handle = unit.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(F.relu(args[0]).mean().item()))
        with torch.no_grad(): model(x)
        handle.remove()
        unit.set_shift(seen[0])
        shifts[name] = seen[0]
    return shifts


def test_one_pass_finds_what_a_pass_for_each_layer_finds():
    model, x = plain_cnn(1, activation='wib_relu', generator=torch.Generator().manual_seed(3)), images(16, 1, 28, 28)
    by_hand = layer_by_layer(copy.deepcopy(model), x)
    report = calibrate(model, x).set_index('name')['shift']
    assert all(report[name] == pytest.approx(shift, abs=1e-7) for name, shift in by_hand.items())


@pytest.mark.parametrize('training', [True, False])
def test_nothing_but_the_shifts_changes(training):
    torchvision = pytest.importorskip('torchvision')
    model = torchvision.models.resnet18(weights=None, num_classes=7).train(training)
    model.layer1.eval()
    swap_activations(model)
    x = images(4, 3, 32, 32)
    model(x).sum().backward()
    before, state = snapshot(model), torch.get_rng_state()
    calibrate(model, x)
    diagnose(model, x)
    assert_same(model, before, but=('shift',))
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_and_its_random_numbers_stay_out():
    model, x = nn.Sequential(nn.Linear(6, 50), nn.ReLU(), nn.Dropout(0.5), nn.Linear(50, 5), nn.ReLU()), images(64, 6)
    swap_activations(model)
    state = torch.get_rng_state()
    shifts = calibrate(model, x)['shift'].tolist()
    torch.manual_seed(99)
    assert calibrate(model, x)['shift'].tolist() == shifts
    assert model[2].training
    torch.set_rng_state(state)


@pytest.mark.parametrize('make', [
    lambda: nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU()),
    lambda: nn.Sequential(nn.Linear(8, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 40, bias=False), nn.LayerNorm(40), nn.ReLU()),
])
def test_gain_leaves_zero_mean_and_unit_variance(make):
    torch.manual_seed(0)
    model, x = make(), images(200, 8)
    swap_activations(model)
    report = calibrate(model, x, gain=True)
    after = diagnose(model, x).query('type == "WIBReLU"')
    np.testing.assert_allclose(after['mean'], 0, atol=1e-5)
    np.testing.assert_allclose(after['std'], 1, atol=1e-4)
    assert (report['layer'] != '').all()
    before = snapshot(model)
    again = calibrate(model, x, gain=True)
    assert (again['scale'] == 1).all()
    assert_same(model, before, but=('shift',))


def test_gain_does_not_touch_what_others_use():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        def forward(self, x): return self.act2(self.b(self.act1(self.a(x))) + x)
    torch.manual_seed(0)
    model = Tied()
    swap_activations(model)
    weight = model.a.weight.clone()
    report = calibrate(model, images(50, 6), gain=True)
    assert torch.equal(model.a.weight, weight) and (report['scale'] == 1).all() and (report['layer'] == '').all()


def test_what_gain_does_not_scale_and_why():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.plain, self.tied = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 6), nn.Linear(6, 6)
            self.tied.weight, self.norm = nn.Linear(6, 6).weight, nn.LayerNorm(6, elementwise_affine=False)
            self.other = nn.Linear(6, 6)
            self.other.weight = self.tied.weight
            self.acts = nn.ModuleList(WIBReLU() for _ in range(7))
        def forward(self, x):
            z = self.plain(self.acts[0](self.frozen(x)))
            y = self.acts[3](self.tied(self.acts[1](z) + self.acts[2](z)))
            return self.acts[5](self.acts[4](self.norm(y)) + x)
    torch.manual_seed(0)
    model, x = Many(), images(50, 6)
    weights = [p.clone() for p in (*model.frozen.parameters(), *model.tied.parameters())]
    report = calibrate(model, x, gain=True)
    assert report['note'].tolist() == [
        'not scaled: frozen is frozen', '', 'not scaled: plain was scaled for another unit',
        'not scaled: tied shares its parameters, or has them computed', 'not scaled: norm has no parameters',
        'not scaled: its input comes from no layer of its own', 'was not called']
    assert report['layer'].tolist() == ['', 'plain', '', '', '', '', '']
    assert all(map(torch.equal, weights, (*model.frozen.parameters(), *model.tied.parameters())))
    assert calibrate(model, x)['note'].tolist() == [''] * 6 + ['was not called']


class SumInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.r1, self.b, self.r2 = nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU()
    def forward(self, x):
        x = self.r1(self.a(x))
        out = self.b(x)
        out += x
        return self.r2(out)


def test_a_sum_in_place_is_not_the_output_of_its_first_term():
    torch.manual_seed(0)
    model, x = SumInPlace(), images(300, 20)
    swap_activations(model)
    weight = model.b.weight.clone()
    note = calibrate(model, x, gain=True).set_index('name')['note']
    assert note.tolist() == ['', 'not scaled: what b put out was changed in place'] and torch.equal(model.b.weight, weight)
    assert diagnose(model, x).query('type == "WIBReLU"')['mean'].abs().max() < 1e-5
    single = nn.Sequential(nn.Conv1d(3, 4, 1), SumInPlaceOf(nn.Conv1d(4, 4, 1)), WIBReLU())
    assert calibrate(single, images(5, 3, 7), per_channel=True)['calls'].tolist() == [1]  # a channel of the convolution all the same


def test_a_layer_with_a_forward_of_its_own_is_not_scaled():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, 10 * weight / weight.std((1, 2, 3), keepdim=True), self.bias)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), WIBReLU(), Standardised(4, 4, 3), WIBReLU()), images(8, 3, 9, 9)
    before = model[2].weight.clone()
    assert calibrate(model, x, gain=True)['note'].tolist() == ['', 'not scaled: 2 has a forward of its own']
    assert torch.equal(model[2].weight, before)
    assert diagnose(model, x).query('type == "WIBReLU"')['mean'].abs().max() < 1e-5


def test_a_layer_scaled_after_its_output_was_read_leaves_no_mean_behind():
    class ReadBefore(nn.Module):
        def __init__(self):
            super().__init__()
            self.l, self.k, self.r1, self.r2 = nn.Linear(20, 30), nn.Linear(30, 30), WIBReLU(), WIBReLU()
        def forward(self, x):
            z = self.l(x)
            y = self.r1(self.k(z))
            return y + self.r2(z)
    torch.manual_seed(0)
    model, x = ReadBefore(), images(200, 20)
    notes = calibrate(model, x, gain=True).set_index('name')['note']
    after = diagnose(model, x).set_index('layer')
    assert after.loc[['r1', 'r2'], 'mean'].abs().max() < 1e-5 and abs(after.loc['r2', 'std'] - 1) < 1e-4
    assert notes['r1'] == f"scaled before a layer that it depends on was: its std is {after.loc['r1', 'std']:.3g} now" and not notes['r2']
    assert calibrate(model, x, gain=True)['note'].tolist() == ['', '']


class SumInPlaceOf(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
    def forward(self, x):
        out = self.layer(x)
        out += x
        return out


def test_what_is_calibrated_or_folded_in_inference_mode_can_be_trained():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()), images(2, 3, 9, 9)
    swap_activations(model)
    with torch.inference_mode(): calibrate(model, x, per_channel=True, gain=True)
    model(x).sum().backward()
    with torch.inference_mode(): fold_shift(model, x)
    model(x).sum().backward()
    assert all(p.grad is not None and not p.is_inference() for p in model.parameters())


def test_a_mask_may_hold_infinities():
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), images(3, 5, 8)
    swap_activations(model)
    batch = dict(src=x, src_mask=nn.Transformer.generate_square_subsequent_mask(5))
    assert calibrate(model, batch)['shift'].tolist() == calibrate(model, UserDict(batch))['shift'].tolist()
    assert diagnose(model, batch).query('type == "WIBReLU"')['mean'].abs().max() < 1e-6


@pytest.mark.bench('lsuv')
def test_gain_beside_lsuv():
    import lsuv
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 5)), images(500, 20)
    peer = lsuv.lsuv_with_singlebatch(copy.deepcopy(model), x, do_orthonorm=False, std_tol=0.001, verbose=False)
    swap_activations(model)
    calibrate(model, x, gain=True)
    ours, theirs = diagnose(model, x), diagnose(peer, x)
    assert theirs['mean'][:2].min() > 0.3  # unit variance before the ReLU, and the mean that the ReLU leaves
    assert ours['mean'][:2].abs().max() < 1e-5 and (ours['std'][:2] - 1).abs().max() < 1e-4


def test_a_unit_called_several_times_gets_the_pooled_mean():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = WIBReLU()
        def forward(self, x, y): return self.act(x), self.act(y)
    model, x, y = Twice(), images(10, 3), 1 + images(30, 3, seed=1)
    report = calibrate(model, (x, y))
    assert report['calls'].tolist() == [2]
    assert model.act.shift == pytest.approx(torch.cat([F.relu(x), F.relu(y)]).mean().item(), abs=1e-6)
    assert calibrate(model, dict(x=x, y=y))['shift'].tolist() == pytest.approx(report['shift'].tolist())


def wib_mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    swap_activations(model)
    return model


@pytest.mark.parametrize('batch, message', [
    (torch.full((4, 4), float('nan')), 'must be numbers, but has NaN'),
    (torch.tensor([[1.0, 2.0, float('inf'), 0.0]] * 4), '2 sees values that are not finite'),
    (torch.zeros(4, 5), r'batch of shape \(4, 5\): the model does not take it'),
    (torch.zeros(0, 4), 'must not be empty'),
    (torch.zeros(4, 4, device='meta'), 'is on meta, the model on cpu'),
    (torch.zeros(4, 4, dtype=torch.float64), 'the model does not take it'),
    ([torch.zeros(4, 4), torch.zeros(4)], r'does not take it: .*; if the batch holds labels, .*; a list .* goes in a tuple, \(list,\)$'),
    ('images', 'must be a tensor'),
    (torch.zeros(4, 4), 'puts out a constant'),
])
@pytest.mark.parametrize('function', [calibrate, diagnose])
def test_a_wrong_batch_is_a_clear_error_and_leaves_the_model(function, batch, message):
    model = wib_mlp()
    before, state = snapshot(model), torch.get_rng_state()
    if message.endswith('not finite') and function is diagnose: assert not np.isfinite(diagnose(model, batch)['mean']).any()
    elif message == 'puts out a constant':
        if function is diagnose: return
        nn.init.constant_(model[1].bias, -1.0)
        before = snapshot(model)
        with pytest.raises(ValueError, match=message): calibrate(model, batch, gain=True)
    else:
        with pytest.raises(ValueError, match=message): function(model, batch)
    assert_same(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_halfway_leaves_shifts_and_weights():
    class Breaks(nn.Module):
        def forward(self, x): raise RuntimeError('halfway')
    model = nn.Sequential(*wib_mlp(), Breaks())
    before = snapshot(model)
    for options in (dict(), dict(gain=True), dict(per_channel=True, gain=True)):
        with pytest.raises(ValueError, match='halfway'): calibrate(model, images(9, 4), **options)
        assert_same(model, before)
    with torch.no_grad(): model[3].weight[0] = float('nan')
    before = snapshot(model)
    with pytest.raises(ValueError, match='4 sees values that are not finite'): calibrate(model, images(9, 4), gain=True)
    assert_same(model, {**before, 'state': {k: v for k, v in before['state'].items()}}, but=('3.weight',))


def test_some_tensors_of_a_batch_may_be_elsewhere():
    model = nn.Sequential(nn.Linear(4, 4, device='meta'), nn.ReLU())
    with pytest.raises(ValueError, match='batch: is on cpu, the model on meta'): diagnose(model, (torch.ones(3), torch.ones(3, 4)))
    with pytest.raises(RuntimeError) as caught: diagnose(model, (torch.ones(3), torch.ones(3, 4, device='meta')))  # which has no numbers
    assert 'is on' not in str(caught.value)


def test_per_channel_needs_channels_in_dimension_1():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    swap_activations(model)
    with pytest.raises(ValueError, match=r'sees \(2, 5, 8\), and dimension 1 must be its channels'):
        calibrate(model, images(2, 5, 4), per_channel=True)
    with pytest.raises(ValueError, match='no WIBReLU to calibrate'): calibrate(nn.Linear(2, 2), images(2, 2))


# Folding

@settings(max_examples=12)
@given(st.integers(0, 2**20), st.booleans(), st.booleans(), st.integers(0, 2))
def test_folding_is_exact_at_borders_too(seed, per_channel, norm, padding):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 5, 3, padding=padding, bias=not norm), *([nn.BatchNorm2d(5)] if norm else []), nn.ReLU(),
              nn.ConvTranspose2d(5, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3), nn.ReLU()]
    model, x = nn.Sequential(*layers).double(), images(6, 2, 9, 9, seed=seed, dtype=torch.float64)
    model(x)
    swap_activations(model)
    calibrate(model, x, per_channel=per_channel)
    for mode in (True, False):
        twin = copy.deepcopy(model).train(mode)
        expected = copy.deepcopy(twin)(x)
        assert fold_shift(twin, x)['folded'].all()
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=1e-12)
        assert not any(isinstance(module, WIBReLU) for module in twin.modules())


def test_a_preact_that_is_read_elsewhere_is_refused():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act1, self.act2 = nn.Linear(4, 4), nn.Linear(4, 4), WIBReLU(), WIBReLU()
        def forward(self, x):
            z = self.a(x)
            return self.act2(self.b(self.act1(z)) + z)
    model, x = Residual(), images(5, 4)
    expected = model(x)
    report = fold_shift(model, x).set_index('name')
    assert not report.loc['act1', 'folded'] and "read elsewhere too, by" in report.loc['act1', 'note']
    assert report.loc['act2', 'layer'] == 'b'  # the sum's other term
    torch.testing.assert_close(model(x), expected)


class SumOver(nn.Module):
    "Writes a sum over what it may read again."
    def __init__(self, over):
        super().__init__()
        self.a, self.b, self.act, self.over = nn.Linear(4, 4), nn.Linear(4, 4), WIBReLU(), over
    def forward(self, x):
        h, t = self.over(self.a(x))
        t += self.b(x)
        return self.act(t) + h


@pytest.mark.parametrize('over', [lambda z: [(h := torch.tanh(z)), h], lambda z: [(h := torch.tanh(z)), h.view(-1, 4)]], ids=['it', 'view'])
def test_a_sum_written_over_what_is_read_again_is_refused(over):
    model, x = SumOver(over), images(5, 4)
    before = snapshot(model)
    for batch in (None, x):
        with pytest.raises(ValueError, match=r'its input is a sum written over .*, which others may read'): fold_shift(model, batch)
        assert_same(model, before)
    alone = SumOver(lambda z: (0, z))
    expected = alone(x)
    assert fold_shift(alone, x)['layer'].tolist() == ['a']
    torch.testing.assert_close(alone(x), expected)


class Reads(nn.Module):
    "A forward to be filled in, over two layers and a unit."
    def __init__(self, run):
        super().__init__()
        self.a, self.act, self.b, self.aux, self.run = nn.Linear(4, 4), WIBReLU(), nn.Linear(4, 4), nn.Linear(4, 4), run
        self.register_buffer('n', torch.zeros(()))
    def forward(self, x): return self.run(self, x, self.a(x))


def test_a_bias_that_is_read_elsewhere_is_refused():
    model = Reads(lambda self, x, z: self.act(z) + self.a.bias)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r'act: a\.bias is read elsewhere too, by add'): fold_shift(model)
    assert_same(model, before)
    assert fold_shift(Reads(lambda self, x, z: self.act(z) if self.a.bias is not None else z))['folded'].all()


@pytest.mark.parametrize('run', [
    lambda self, x, z: (self.b(self.act(z)), self.aux(z)) if self.training else self.b(self.act(z)),
    lambda self, x, z: self.aux(z) if self.training else self.b(self.act(z)),
    lambda self, x, z: self.act(self.b(x) if self.training else z)], ids=['read', 'without', 'other'])
def test_training_is_asked_too_before_a_shift_is_folded(run):
    model = Reads(run)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r'no shift can be folded exactly; act: .*(read elsewhere|called without it|comes from a or b)'):
        fold_shift(model, images(5, 4))
    assert_same(model, before)


def test_a_model_that_traces_in_evaluation_alone_is_folded_with_a_note():
    def run(self, x, z):
        self.n.add_(1)
        if self.training and random.random() < 0.5: return z
        return self.b(self.act(z))
    model, x = Reads(run).eval(), images(5, 4)
    expected, states = model(x), drawn_from()
    report = fold_shift(model)
    assert report['folded'].all() and model.n == 1 and states == drawn_from()
    assert report['note'][0] == 'in evaluation; whether in training too is not known: model: Reads does not trace: it draws random numbers'
    torch.testing.assert_close(model(x), expected)


def test_an_output_that_cannot_be_compared_is_an_error():
    @dataclass
    class Answer:
        value: torch.Tensor
    model = Reads(lambda self, x, z: Answer(self.act(z) + self.peek))
    model.peek = model.a.bias.detach()  # behind the trace's back, so that the fold is wrong
    before = snapshot(model)
    with pytest.raises(ValueError, match='batch: the model puts out no floating tensor to compare'): fold_shift(model, images(5, 4))
    assert_same(model, before)


def test_a_batch_norm_without_bias_gets_one():
    if 'bias' not in inspect.signature(nn.BatchNorm2d).parameters: pytest.skip('its batch norms always have one')
    x = images(4, 2, 5, 5)
    for batch in (None, x):
        model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3, bias=False), WIBReLU()).eval()
        expected = model(x)
        assert fold_shift(model, batch)['layer'].tolist() == ['1']
        torch.testing.assert_close(model(x), expected)


def test_a_shift_of_four_channels_does_not_go_into_one():
    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act1, self.one, self.act2 = nn.Conv2d(4, 4, 1), WIBReLU(), nn.Conv2d(4, 1, 1), WIBReLU(torch.full((4,), 0.5))
        def forward(self, x):
            x = self.act1(self.first(x))
            return self.act2(self.one(x) + x)
    model, x = Spread().eval(), images(2, 4, 6, 6)
    expected = model(x)
    report = fold_shift(model, x).set_index('name')
    assert report.loc['act1', 'folded'] and report.loc['act2', 'note'] == 'one has 1 channel, the shift 4'
    torch.testing.assert_close(model(x), expected)


def test_an_error_halfway_takes_the_folding_back():
    model = nn.Sequential(nn.Linear(4, 4), WIBReLU(), nn.Linear(4, 4), WIBReLU())
    model[2].bias = nn.Parameter(torch.zeros(1).expand(4))  # one number in four places, which cannot be changed in place
    before = snapshot(model)
    with pytest.raises(RuntimeError, match='single memory location'): fold_shift(model, images(6, 4))
    assert_same(model, before)


@pytest.mark.parametrize('case', ['shared', 'twice', 'itself', 'input', 'affine', 'tied'])
def test_refusals(case):
    layer = nn.Linear(4, 4)
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.act = layer, WIBReLU()
        def forward(self, x):
            if case == 'twice': return self.act(self.layer(self.act(x)))
            if case == 'itself':
                z = self.layer(x)
                return self.act(z + z)
            return self.act(self.layer(self.layer(x)))
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), WIBReLU()
            self.b.bias = self.a.bias
        def forward(self, x): return self.b(self.act(self.a(x)))
    model = {'input': lambda: nn.Sequential(WIBReLU()), 'affine': lambda: nn.Sequential(nn.BatchNorm1d(4, affine=False), WIBReLU()),
             'tied': Tied}.get(case, Twice)()
    before = snapshot(model)
    with pytest.raises(ValueError, match='no shift can be folded exactly'): fold_shift(model, images(6, 4))
    assert_same(model, before)


def test_a_model_that_does_not_trace_cannot_be_folded():
    model = Untraceable()
    swap_activations(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match='Untraceable does not trace'): fold_shift(model)
    assert_same(model, before)
    with pytest.raises(ValueError, match='no WIBReLU to fold'): fold_shift(nn.Linear(2, 2))


def test_a_difference_on_the_batch_takes_the_folding_back():
    class Peeks(nn.Module):  # reads a bias behind the trace's back
        def __init__(self):
            super().__init__()
            self.layer, self.act = nn.Linear(4, 4), WIBReLU()
            self.peek = self.layer.bias.detach()
        def forward(self, x): return self.act(self.layer(x)) + self.peek
    model = Peeks()
    before = snapshot(model)
    with pytest.raises(ValueError, match='puts out something else, so it was left unfolded'): fold_shift(model, images(6, 4))
    assert_same(model, before)


def test_linear_layers_with_a_shift_for_each_channel_need_a_batch():
    model, x = nn.Sequential(nn.Linear(4, 4), WIBReLU(torch.rand(4))), images(6, 4)
    with pytest.raises(ValueError, match='give a batch'): fold_shift(model)
    assert fold_shift(model, x)['folded'].all() and isinstance(model[1], ClampMin)


# Exports, compilers, processes

def calibrated_cnn(x, per_channel=False):
    model = plain_cnn(3, activation='wib_relu', generator=torch.Generator().manual_seed(0)).eval()
    calibrate(model, x, per_channel=per_channel)
    return model


@pytest.mark.parametrize('folded', [False, True])
@pytest.mark.parametrize('per_channel', [False, True])
def test_export_and_onnx_give_the_same_output(folded, per_channel, tmp_path):
    onnxruntime, _ = pytest.importorskip('onnxruntime'), pytest.importorskip('onnxscript')
    x = images(4, 3, 32, 32)
    model = calibrated_cnn(x, per_channel)
    if folded: fold_shift(model, x)
    expected = model(x).detach()
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.onnx.export(model, (x,), tmp_path / 'model.onnx', dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    output = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-5)


def test_compile_autocast_and_functional_call():
    model, x = nn.Sequential(Block(), nn.Flatten(), nn.LazyLinear(3)), images(4, 6, 8, 8)
    model(x)
    swap_activations(model)
    calibrate(model, x)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend='aot_eager', fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.func.functional_call(model, dict(model.named_parameters()), x), expected)
    with torch.autocast('cpu', torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        report = calibrate(model, x)
    assert calibrate(model, x)['shift'].tolist() == pytest.approx(report['shift'].tolist(), abs=0.02)
    calibrate(model, x, per_channel=True)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    torch.testing.assert_close(torch.func.functional_call(model, state, x), model(x))


def test_state_dicts_between_the_forms_of_a_shift():
    x = images(8, 3, 32, 32)
    single, channels = calibrated_cnn(x), calibrated_cnn(x, per_channel=True)
    for giver, taker in ((single, channels), (channels, single), (single, plain_cnn(3, activation='wib_relu'))):
        buffer = io.BytesIO()
        torch.save(giver.state_dict(), buffer)
        buffer.seek(0)
        taker.eval().load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(giver(x), taker(x))
        single, channels = calibrated_cnn(x), calibrated_cnn(x, per_channel=True)


def test_ddp_with_two_processes(tmp_path):
    script = tmp_path / 'train.py'
    script.write_text(textwrap.dedent('''
        import sys, torch
        import torch.distributed as dist
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel
        from wib_nbdev.surgery import calibrate, swap_activations

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv1, self.conv2, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
            def forward(self, x): return self.act(self.conv2(self.act(self.conv1(x))) + x)

        rank, folder = int(sys.argv[1]), sys.argv[2]
        x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        model = nn.Sequential(Block(), Block())
        swap_activations(model)
        calibrate(model, x)
        alone = nn.Sequential(*model)
        alone(x).square().mean().backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
        parallel = DistributedDataParallel(model)
        parallel(x[rank::2]).square().mean().backward()
        for p, gradient in zip(model.parameters(), expected): torch.testing.assert_close(p.grad, gradient)
        optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
        optimizer.step()
        state = torch.cat([value.flatten() for value in model.state_dict().values()])
        states = [torch.empty_like(state) for _ in range(2)]
        dist.all_gather(states, state)
        assert torch.equal(*states)
        report = calibrate(parallel, x)
        assert report['name'][0].startswith('module.0.act')
        dist.destroy_process_group()
        print('done', rank)
    '''))
    run_in_two_processes(script, tmp_path)


def run_in_two_processes(script, folder):
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    processes = [subprocess.Popen([sys.executable, script, str(rank), str(folder)], **pipes) for rank in range(2)]
    for rank, process in enumerate(processes):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and f'done {rank}' in out, err


def test_ddp_after_calibrating_in_one_process(tmp_path):
    "The recipe of notebook 12, and why it is needed: DDP makes the weights agree, not the single shifts."
    script = tmp_path / 'agree.py'
    script.write_text(textwrap.dedent('''
        import sys, torch
        import torch.distributed as dist
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel
        from wib_nbdev.surgery import calibrate, swap_activations

        def gathered(value):
            values = [torch.empty_like(value) for _ in range(2)]
            dist.all_gather(values, value)
            return values

        def network(seed):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.ReLU(), nn.Flatten())
            swap_activations(model)
            return model

        def shifts(model): return torch.stack([value for name, value in model.state_dict().items() if name.endswith('shift')])

        rank, folder = int(sys.argv[1]), sys.argv[2]
        dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
        x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(rank))

        alone = network(rank)
        calibrate(alone, x)
        wrapped = DistributedDataParallel(alone)
        assert torch.equal(*gathered(alone[0].weight.detach())) and not torch.equal(*gathered(shifts(alone)))

        model = network(rank)
        if rank == 0: calibrate(model, x)
        state = [{name: value.cpu() for name, value in model.state_dict().items()}]
        dist.broadcast_object_list(state, src=0)
        model.load_state_dict(state[0])
        wrapped = DistributedDataParallel(model)
        assert torch.equal(*gathered(shifts(model))) and shifts(model).min() > 0
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            wrapped(x).square().mean().backward()
            optimizer.step()
        same = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(9))
        assert torch.equal(*gathered(wrapped(same).detach()))
        dist.destroy_process_group()
        print('done', rank)
    '''))
    run_in_two_processes(script, tmp_path)


@pytest.mark.parametrize('per_channel', [False, True])
def test_functional_call_with_the_state_dict_of_a_calibrated_model(per_channel):
    x = images(8, 3, 32, 32)
    model, other = calibrated_cnn(x, per_channel), plain_cnn(3, activation='wib_relu').eval()
    assert torch.equal(torch.func.functional_call(other, model.state_dict(), x), model(x))
    assert not torch.equal(other(x), model(x))


# Pictures, predictions, TensorBoard

def test_predictions_of_a_linear_network_are_exact():
    frame = predict_signal(lambda z: 0.5 * z, 2.0, 4, [0.25, 0.75])
    np.testing.assert_allclose(frame[['std', 'similarity', 'gradient']], [[1, 0.5, 1]] * 4, atol=1e-8)
    assert frame['layer'].tolist() == [1, 2, 3, 4]


def test_predictions_meet_wide_networks():
    x = images(20, 784)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0)
    theory = predict_signal(WIBReLU(0.6834).double(), CENTRED_GAIN, 3, 0.0)
    model = deep_mlp(3, 'wib_relu_centred', CENTRED_GAIN, width=1500, generator=torch.Generator().manual_seed(5))
    measured = measure_signal(model, x, torch.Generator().manual_seed(1))
    for stat in ('mean', 'std', 'similarity'): np.testing.assert_allclose(measured[stat], theory[stat], atol=0.06)
    np.testing.assert_allclose(measured['gradient'], theory['gradient'], rtol=0.1)


def test_plots_take_axes_and_return_them():
    frame = diagnose(plain_cnn(1), images(4, 1, 28, 28))
    ax = plot_diagnosis({'relu': frame, 'mine': frame}, 'second_moment')
    assert [len(line.get_xdata()) for line in ax.lines] == [4, 4] and frame['type'].iloc[-1] == 'Linear'  # activations only
    assert plot_diagnosis({'relu': frame}, 'near_zero', ax) is ax and ax.get_ylabel() == 'near zero (share)' and ax.get_ylim() == (0, 1)
    with pytest.raises(ValueError, match="did you mean 'mean'"): plot_diagnosis({'relu': frame}, 'means')
    signal = predict_signal(torch.relu, math.sqrt(2), 2, [0.5])
    assert [plot_signal({'relu': signal}, {'relu': signal}, stat).get_yscale() for stat in ('mean', 'std', 'gradient')] == [
        'linear', 'log', 'log']


def test_diagnosis_follows_the_order_of_calls():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.ReLU(), nn.Tanh()
            self.never = nn.GELU()
        def forward(self, x): return self.last(self.first(x) + 3)
    frame = diagnose(Backwards(), images(10, 2))
    assert frame['layer'].tolist() == ['first', 'last'] and frame['type'].tolist() == ['Tanh', 'ReLU']
    assert frame['inactive'].tolist()[1] == 0 and frame['mean'][1] > 2
    np.testing.assert_allclose(frame['second_moment'], frame['mean']**2 + frame['std']**2)


def test_a_last_layer_that_puts_out_no_tensor_is_left_out():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.GRU(4, 4)), images(5, 4)
    frame = diagnose(model, x)
    assert frame['layer'].tolist() == ['1'] and frame['mean'][0] == pytest.approx(F.relu(model[0](x)).mean().item())


def test_a_diagnosis_that_sees_no_activation_says_so():
    model, x = Functional(), images(4, 1, 8, 8)
    with pytest.warns(UserWarning, match='no activation module; calls of F.relu show once they are swapped'): diagnose(model, x)
    swap_activations(model)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert 'relu_1' in diagnose(model, x)['layer'].tolist()


@pytest.mark.bench('tensorboard')
def test_tensorboard_gets_scalars_and_histograms(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    model = plain_cnn(1, activation='wib_relu')
    with ActivationRecorder(model, histogram=True) as recorder:
        for seed in range(3): model(images(4, 1, 28, 28, seed=seed))
    write_tensorboard(recorder, tmp_path)
    events = EventAccumulator(str(tmp_path), size_guidance=dict(histograms=0))
    events.Reload()
    means = [event.value for event in events.Scalars('mean/conv1.act')]
    np.testing.assert_allclose(means, recorder.to_frame().query('layer == "conv1.act"')['mean'], rtol=1e-5)
    assert len(events.Histograms('values/conv1.act')) == 3


# Peers

@pytest.mark.parametrize('name, old, size', [
    ('resnet18', nn.ReLU, 64), ('vgg11', nn.ReLU, 32), ('mobilenet_v3_small', nn.ReLU, 64), ('convnext_tiny', nn.GELU, 32),
    ('googlenet', nn.ReLU, 64)])
def test_torchvision(name, old, size):
    import torchvision
    torch.manual_seed(0)
    more = dict(init_weights=False) if name == 'googlenet' else {}
    model, x = getattr(torchvision.models, name)(weights=None, **more).eval(), images(2, 3, size, size)
    with torch.no_grad():
        expected = model(x)
        report = swap_activations(model, old)
        assert report['swapped'].all()
        if old is nn.ReLU: assert torch.equal(uncentred(model)(x), expected)
        calibrated = calibrate(model, x)
        again = calibrate(model, x)
        assert (calibrated['shift'] == again['shift']).all() and (calibrated['calls'] == (~calibrated['name'].str.startswith('aux'))).all()
        units = diagnose(model, x).query('type == "WIBReLU"')
        assert units['mean'].abs().max() < 1e-4 * max(1, units['std'].max())
        expected = model(x)
        folded = fold_shift(model, x)
        assert folded.loc[~folded['note'].str.contains('called 0 times'), 'folded'].all()
        assert (model(x) - expected).abs().max() <= 1e-4 * expected.abs().max().clamp_min(1e-6)


@pytest.mark.bench('timm')
@pytest.mark.parametrize('name, old', [
    ('resnet18', nn.ReLU), ('regnety_002', nn.ReLU), ('convnext_atto', nn.GELU), ('vit_tiny_patch16_224', nn.GELU)])
def test_timm(name, old):
    import timm
    model, x = timm.create_model(name, pretrained=False).eval(), images(2, 3, *(2 * [224 if 'vit' in name else 64]))
    with torch.no_grad():
        expected = model(x)
        report = swap_activations(model, old)
        assert report['swapped'].any()
        if old is nn.ReLU and report['swapped'].all(): assert torch.equal(uncentred(model)(x), expected)
        calibrate(model, x)
        units = diagnose(model, x).query('type == "WIBReLU"')
        assert len(units) and units['mean'].abs().max() < 1e-4 * max(1, units['std'].max())


@pytest.mark.bench('transformers')
def test_hugging_face():
    from transformers import BertConfig, BertModel
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, hidden_act='relu')
    torch.manual_seed(0)
    model, tokens = BertModel(config), dict(input_ids=torch.arange(20).view(2, 10), attention_mask=torch.ones(2, 10, dtype=torch.long))
    report = swap_activations(model)
    assert report['swapped'].sum() == 3
    assert (calibrate(model, tokens)['calls'] == 1).all()
    assert diagnose(model, tokens).query('type == "WIBReLU"')['mean'].abs().max() < 1e-6
    with pytest.raises(ValueError, match='must be its channels'): calibrate(model, tokens, per_channel=True)


# Recipes

def recipe_data():
    from wib_nbdev.data import channel_stats, load, standardise
    data = load('fashion_mnist', sample=True)
    return standardise(data.x_train, *channel_stats(data.x_train)), data.y_train


def recipe_model(x):
    model = plain_cnn(1, generator=torch.Generator().manual_seed(0))
    swap_activations(model)
    calibrate(model, x[:256])
    return model


def accuracy(model, x, y):
    with torch.no_grad(): return (model.cpu().eval()(x).argmax(1) == y).float().mean().item()


def test_recipe_for_a_plain_loop():
    x, y = recipe_data()
    model = recipe_model(x)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    for _ in range(3):
        for part, labels in zip(x.split(50), y.split(50), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(part), labels).backward()
            optimizer.step()
    assert accuracy(model, x, y) > 0.5


@pytest.mark.bench('lightning')
def test_recipe_for_lightning(tmp_path):
    import lightning
    x, y = recipe_data()

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = recipe_model(x)
        def training_step(self, batch, index): return F.cross_entropy(self.model(batch[0]), batch[1])
        def configure_optimizers(self): return torch.optim.Adam(self.parameters(), 4e-3)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 50)
    module = Classifier()
    lightning.Trainer(max_epochs=3, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      default_root_dir=tmp_path).fit(module, loader)
    assert accuracy(module.model, x, y) > 0.5


@pytest.mark.bench('fastai')
def test_recipe_for_fastai():
    from fastai.vision.all import DataLoader, DataLoaders, Learner
    x, y = recipe_data()
    loader = DataLoader(list(zip(x, y, strict=True)), bs=50)
    learner = Learner(DataLoaders(loader, loader), recipe_model(x), loss_func=F.cross_entropy)
    with learner.no_bar(), learner.no_logging(): learner.fit(3, 4e-3)
    assert accuracy(learner.model, x, y) > 0.5
