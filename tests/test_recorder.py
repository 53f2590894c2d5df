"""The recorder on other modules, modes and precisions; it leaves nothing behind and changes no number."""
import copy
import gc
import pickle
import runpy
import sys
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib import pyplot as plt
from torch import nn

from wib_nbdev.activations import ACTIVATIONS, WIBReLU, make_activation
from wib_nbdev.models import plain_cnn
from wib_nbdev.recorder import (
    NEAR_ZERO,
    ActivationRecorder,
    activation_of,
    find_layers,
    interval_bounds,
    plot_histogram,
    plot_layer_stats,
    plot_near_zero,
)
from wib_nbdev.surgery import FoldedWIBReLU

ALL = tuple(NEAR_ZERO)
SEVEN = ['conv1', 'conv2', 'conv3', 'conv4', 'pool', 'flatten', 'dense']


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def small_model(): return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def hooks_of(model): return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def record(model, *inputs, layers=None, **arguments):
    "The frame of a pass for each of `inputs`."
    with ActivationRecorder(model, layers, near_zero=ALL, **arguments) as recorder:
        for x in inputs: model(x)
    return recorder.to_frame()


def assert_row(row, a, preact=None):
    "The row says what the definitions say of the values `a`, one by one in float64."
    a = a.detach().double().flatten()
    expected = [a.mean(), a.std(correction=0)]
    np.testing.assert_allclose([row['mean'], row['std']], expected, rtol=2e-5, atol=1e-6)
    inactive = np.nan if preact is None else (preact <= 0).double().mean().item()
    np.testing.assert_equal(row['inactive'], inactive)
    for name, definition in NEAR_ZERO.items(): assert row[name] == definition.share(a), name


# Counting

INTERVALS = [interval for d in NEAR_ZERO.values() for interval in (d.near, d.kept) if interval]
EDGES = np.float32([interval_bounds(interval) for interval in INTERVALS])
BESIDE = [float(x) for way in (-np.inf, np.inf) for x in np.nextafter(EDGES, np.float32(way)).flat]
floats = st.floats(-20, 20, width=32) | st.sampled_from([*EDGES.flat, *BESIDE, np.inf, -np.inf, np.nan])


@given(hnp.arrays(np.float32, st.integers(1, 60), elements=floats))
def test_counts_are_right_to_the_last_value(x):
    row = record(nn.LeakyReLU(1.0), torch.from_numpy(x)).iloc[0] # an activation that changes nothing
    assert row['inactive'] == (x <= 0).mean()
    with np.errstate(invalid='ignore'), warnings.catch_warnings():
        for name, d in NEAR_ZERO.items():
            low, high = interval_bounds(d.kept or '[-inf, inf]')
            if d.kept is None or ((x >= low) & (x < high)).any(): assert row[name] == d.share(x)
            else: assert np.isnan(row[name])


def test_definitions_count_as_their_sources_do_at_the_ends_too():
    x = torch.tensor([-10, -7, -3, -0.5, -0.4, -0.3, -0.25, 0, 0.05, 0.25, 0.5, 0.65, 0.75, 7, 10, 11])
    course, shifted, miniai = x.histc(40, 0, 10), x.histc(40, -7, 7), x.abs().histc(40, 0, 10)
    expected = [(x.abs() < 0.5).sum() / len(x), (x <= 0.05).sum() / len(x), miniai[0] / miniai.sum(),
                course[:2].sum() / course.sum(), shifted[19:22].sum() / shifted.sum()]
    shares = [definition.share(x) for definition in NEAR_ZERO.values()]
    np.testing.assert_allclose(shares, torch.stack(expected), rtol=1e-6)


@given(st.floats(-1e3, 1e3), st.sampled_from([1e-22, 1e-3, 1.0, 1e3, 1e25]), st.sampled_from([1_000, 30_000]))
def test_the_std_is_right_with_a_large_mean_and_where_squares_under_or_overflow(mean, std, n):
    x = torch.randn(n, generator=seeded()) * std
    if 1e-4 < std < 1e4: x += mean
    row = record(nn.Identity(), x).iloc[0]
    assert row['std'] == pytest.approx(x.double().std(correction=0).item(), rel=1e-4, abs=0)
    assert row['mean'] == pytest.approx(x.double().mean().item(), rel=1e-4, abs=1e-5 * row['std'])


@pytest.mark.parametrize('x', [
    torch.randn(4, 6).t(), torch.randn(8, 8)[::2, 1::3], torch.randn(3, 1, 5).expand(3, 4, 5),
    torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(7).bfloat16(),
    torch.randn(7).double(), torch.randn(())])
def test_every_layout_and_precision(x): assert_row(record(nn.ReLU(), x).iloc[0], x.relu(), x)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('activation', ['relu', 'wib_relu', 'elu', 'wib_relu_batch'])
def test_the_seven_layers_of_the_plain_cnn(activation, layout):
    model = plain_cnn(1, activation=activation, generator=seeded()).to(memory_format=layout)
    x = torch.randn(16, 1, 28, 28, generator=seeded(1))
    frame = record(model, x, layers=SEVEN)
    assert list(frame['layer']) == SEVEN and list(frame.columns[:4]) == ['iteration', 'layer', 'mean', 'std']
    with torch.no_grad():
        for (_, row), (name, layer) in zip(frame.iterrows(), model.named_children(), strict=True):
            preact = layer.conv(x) if name.startswith('conv') else None
            x = layer(x) if preact is None else layer.act(preact)
            assert_row(row, x, preact)


def test_an_inplace_activation_is_counted_before_it_runs():
    x = torch.randn(200, generator=seeded())
    model = nn.Sequential(nn.Identity(), nn.Threshold(0.0, 5.0, inplace=True)) # its output hides the sign
    assert record(model, x.clone(), layers=['1'])['inactive'].item() == (x <= 0).double().mean()


@pytest.mark.parametrize('shift', [torch.tensor(0.7), torch.linspace(0, 0.7, 8)], ids=['one', 'channels'])
def test_folding_a_shift_changes_no_share_of_inactive_units(shift):
    folded, unit = FoldedWIBReLU(shift), WIBReLU(shift)
    z = torch.randn(50, 8, generator=seeded()) - torch.linspace(0, 3, 8)
    z[0] = 0 # exactly 0 is inactive
    assert record(folded, z - shift)['inactive'].item() == record(unit, z)['inactive'].item() > 0


def test_an_input_that_is_passed_by_name_is_an_input():
    class Names(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()
        def forward(self, x): return self.act(input=x)
    x = torch.tensor([[-1.0, 1, 2], [-1, -1, 2]])
    assert record(Names(), x)['inactive'].item() == 0.5


def test_an_activation_shared_by_two_layers_counts_for_each_alone():
    shared = WIBReLU()
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), shared), nn.Sequential(nn.Linear(4, 4), shared))
    nn.init.constant_(model[0][0].bias, 9.0)
    nn.init.constant_(model[1][0].bias, -30.0)
    assert list(record(model, torch.randn(32, 4) * 0.1, layers=['0', '1'])['inactive']) == [0.0, 1.0]


def test_under_autocast_statistics_are_taken_in_float32():
    model, outputs = plain_cnn(1, generator=seeded()), []
    x = torch.randn(64, 1, 28, 28, generator=seeded()) + 1
    model.conv1.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    with torch.autocast('cpu', torch.bfloat16): frame = record(model, x, layers=['conv1'])
    assert outputs[0].dtype == torch.bfloat16
    assert_row(frame.iloc[0], outputs[0], outputs[0]) # a ReLU's output is 0 where its input is not positive


def test_calls_are_taken_together_and_a_layer_that_was_not_called_has_no_row():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.other = nn.ReLU(), nn.Tanh()
        def forward(self, inputs): return [self.act(x) for x in inputs]
    x = torch.randn(40, generator=seeded())
    frame = record(Sometimes(), [x], [x, x + 1, x[:10] + 2], layers=['act', 'other'])
    assert list(frame['layer']) == ['act', 'act']
    calls = torch.cat([x, x + 1, x[:10] + 2])
    assert_row(frame.iloc[1], calls.relu(), calls)


def test_which_layers_are_found():
    class Residual(nn.Sequential):
        def forward(self, x): return x + super().forward(x)
    block = Residual(nn.Linear(6, 6), nn.ReLU())
    assert activation_of(block) is None and list(find_layers(nn.Sequential(block))) == ['0.1']
    nested = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1), nn.Tanh()))
    assert activation_of(nested) is nested[1][1]
    assert list(find_layers(nn.ReLU())) == ['']
    for name in ACTIVATIONS:
        assert list(find_layers(nn.Sequential(nn.Linear(2, 2), make_activation(name)))) == ['1']
    model, x = nn.Sequential(block), torch.randn(200, 6, generator=seeded())
    assert_row(record(model, x, layers=['0']).iloc[0], model(x))


class Wrapped(nn.Module):
    "A layer that returns what `wrap` makes of its output."
    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(3, 4), wrap
    def forward(self, x): return self.wrap(self.linear(x))


def test_a_layer_that_returns_no_tensor_does_not_end_a_training():
    x = torch.randn(5, 2, 3, generator=seeded())
    lstm = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.LSTM(3, 4))
    frame = record(lstm, x)
    assert list(frame['layer']) == ['1', '2']
    assert_row(frame.iloc[1], lstm(x)[0])
    assert_row(record(model := Wrapped(lambda y: [(y, 0)]), x, layers=['']).iloc[0], model.linear(x))
    for wrap in (lambda y: {'out': y}, lambda y: y > 0, lambda y: None, lambda y: ()):
        model = Wrapped(wrap)
        with pytest.warns(UserWarning, match="layer '' is not recorded"):
            frame = record(model, x, layers=['', 'linear'])
        assert list(frame['layer']) == ['linear']
    assert len(record(Wrapped(lambda y: y[:0]), x, layers=[''])) == 0 # no value at all: no row, no fault


# Passes

def test_evaluation_between_two_training_steps_leaves_no_trace():
    model, x = small_model(), torch.randn(5, 6, generator=seeded())
    with ActivationRecorder(model) as recorder:
        model(x)
        model.eval()(x * 100)
        model[1](x) # outside of the model's own forward
        model.train()(x)
    frame = recorder.to_frame().set_index(['iteration', 'layer'])
    pd.testing.assert_frame_equal(frame.loc[0], frame.loc[1])


def often_at_first(iteration): return iteration < 3 or iteration % 4 == 0


@pytest.mark.parametrize('every, expected', [(4, [0, 4, 8]), (often_at_first, [0, 1, 2, 4, 8])])
def test_which_iterations_are_recorded(every, expected):
    model = small_model()
    with ActivationRecorder(model, every=every) as recorder:
        for _ in range(9): model(torch.randn(2, 6))
    assert list(recorder.to_frame()['iteration'].unique()) == expected and recorder.iterations == 9


def test_the_numbers_of_a_run_do_not_depend_on_being_watched():
    def weights(watch):
        torch.manual_seed(0)
        model = nn.Sequential(plain_cnn(1, activation='wib_relu_batch', generator=seeded()), nn.Dropout(0.1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        recorder = ActivationRecorder(model, every=2, gradients=True, histogram=True, updates=True)
        if watch: recorder.start()
        for i in range(6):
            optimizer.zero_grad()
            model(torch.randn(32, 1, 28, 28, generator=seeded(i))).square().mean().backward()
            optimizer.step()
            recorder.record_updates()
        return [*model.parameters(), *model.buffers()]
    for watched, alone in zip(weights(True), weights(False), strict=True): assert torch.equal(watched, alone)


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.fail = nn.GELU(), False
    def forward(self, x):
        x = self.act(x)
        if self.fail: raise RuntimeError('on purpose')
        return x


def test_a_pass_that_raises_leaves_no_record():
    model, x = Fails(), torch.randn(9, generator=seeded())
    with ActivationRecorder(model) as recorder:
        for _ in range(2):
            model.fail = True
            with pytest.raises(RuntimeError, match='on purpose'): model(x * 50)
            model.fail = False
            model.eval()(x * 70) # belongs to no training pass
            model.train()(x)
    frame = recorder.to_frame()
    assert list(frame['iteration']) == [0, 1] and frame['mean'].nunique() == 1
    assert frame['inactive'][0] == (x <= 0).double().mean()


def test_hooks_go_with_an_exception_and_a_new_start_goes_on():
    model, x = Fails(), torch.randn(9, generator=seeded())
    recorder = ActivationRecorder(model)
    assert recorder.to_frame().empty and list(recorder.to_frame())[:3] == ['iteration', 'layer', 'mean']
    model.fail = True
    with pytest.raises(RuntimeError, match='on purpose'), recorder: model(x)
    assert not hooks_of(model)
    model.fail = False
    for _ in range(2):
        recorder.start().start() # twice does no harm
        model(x)
        recorder.stop()
        model(x)
    assert list(recorder.to_frame()['iteration']) == [0, 1] and not hooks_of(model)


def test_no_activation_is_kept():
    model, outputs = small_model(), []
    model[1].register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    with ActivationRecorder(model, histogram=True, gradients=True):
        model(torch.randn(3, 6)).sum().backward()
        gc.collect()
        assert outputs[0]() is None


def test_a_deep_copy_is_not_recorded_and_a_model_pickles_afterwards():
    model = small_model()
    with ActivationRecorder(model, gradients=True, updates=True) as recorder:
        model(torch.randn(3, 6)).sum().backward()
        average = torch.optim.swa_utils.AveragedModel(model)
        average(torch.randn(3, 6))
        copy.deepcopy(model)(torch.randn(3, 6))
    assert recorder.iterations == 1 and len(recorder.to_frame()) == 2
    pickle.loads(pickle.dumps(model))(torch.randn(3, 6))


# On request

def test_gradients_are_those_of_autograd():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    x = torch.randn(5, 6, generator=seeded())
    with ActivationRecorder(model, ['0', '1', '2'], gradients=True) as recorder:
        model(x).square().sum().backward()
        model(x)
        with torch.no_grad(): model(x)
    outputs = [model[0](x)]
    outputs += [outputs[0].relu()]
    outputs += [model[2](outputs[1])]
    gradients = torch.autograd.grad(outputs[2].square().sum(), outputs)
    found = recorder.to_frame()['gradient_rms']
    np.testing.assert_allclose(found[:3], [g.square().mean().sqrt() for g in gradients], rtol=1e-6)
    assert found[3:].isna().all() and recorder.to_frame()['mean'].notna().all()


def test_gradients_over_several_calls_and_of_vanishing_size():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.Tanh()
        def forward(self, x): return self.act(x).sum() * 3e-30 + self.act(x).sum() * 4e-30
    with ActivationRecorder(model := Twice(), ['act'], gradients=True) as recorder:
        model(torch.randn(7, requires_grad=True)).backward()
    assert recorder.to_frame()['gradient_rms'].item() == pytest.approx(12.5e-60**0.5, rel=1e-5, abs=0)


def test_histograms_are_those_of_histc():
    model, outputs = plain_cnn(1, activation='elu', generator=seeded()), []
    model.conv2.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    with ActivationRecorder(model, SEVEN, histogram=True, value_range=(-1, 3)) as recorder:
        for i in range(2): model(torch.randn(8, 1, 28, 28, generator=seeded(i)))
    frame = recorder.histogram_frame('conv2')
    expected = np.stack([(a.histc(40, -1, 3) / a.numel()).numpy() for a in outputs])
    np.testing.assert_allclose(frame, expected, atol=2 / outputs[0].numel()) # histc rounds at its edges
    np.testing.assert_allclose(frame.columns, np.arange(-0.95, 3, 0.1))
    with ActivationRecorder(model := nn.Identity(), histogram=True, value_range=(0, 40)) as recorder:
        model(torch.tensor([0.0, 0.5, 1.0, 40.0])) # the last bin has its upper end
    assert recorder.histogram_frame('').to_numpy()[0, [0, 1, -1]].tolist() == [0.5, 0.25, 0.25]


def test_a_layer_that_was_not_recorded_has_an_empty_histogram():
    with ActivationRecorder(small_model(), histogram=True) as recorder: pass
    assert recorder.histogram_frame('1').shape == (0, 40)
    with pytest.raises(ValueError, match="layer='one'"): recorder.histogram_frame('one')


def test_updates_are_measured_from_the_weights():
    model = plain_cnn(1, activation='prelu', generator=seeded())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with ActivationRecorder(model, updates=True, every=2) as recorder:
        for i in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 1, 28, 28, generator=seeded(i))).square().mean().backward()
            before, gradient = model.dense.weight.detach().clone(), model.dense.weight.grad.clone()
            optimizer.step()
            recorder.record_updates()
            if i == 2: parts = (gradient, before, model.dense.weight.detach() - before)
    frame = recorder.updates_frame()
    layers = [*(f'conv{i}.conv' for i in (1, 2, 3, 4)), 'dense'] # no slope of a PReLU
    assert list(frame['layer'].unique()) == layers
    assert list(frame['iteration'].unique()) == [0, 2]
    found = frame.query('iteration == 2 and layer == "dense"').squeeze()
    expected = [part.std(correction=0) for part in parts]
    expected.append(expected[2] / expected[1])
    np.testing.assert_allclose(found.iloc[2:].astype(float), expected, rtol=1e-5)


def test_a_step_that_is_not_reported_has_no_row():
    model = small_model()
    with ActivationRecorder(model, updates=True) as recorder:
        for i in range(3):
            model(torch.randn(3, 6)).sum().backward()
            if i == 1: recorder.record_updates()
    assert list(recorder.updates_frame()['iteration'].unique()) == [1]
    assert (recorder.updates_frame()['update_std'] == 0).all()


# Errors, plots, elsewhere

@pytest.mark.parametrize('arguments, error, message', [
    ({'layers': ['cnov1']}, ValueError, "did you mean 'conv1'"),
    ({'layers': 'conv1'}, TypeError, "such as \\['conv1'\\]"),
    ({'every': 0}, ValueError, 'every=0'),
    ({'near_zero': ['near_zero_0.6']}, ValueError, 'near_zero_0.5'),
])
def test_wrong_arguments(arguments, error, message):
    model = plain_cnn(1, generator=seeded())
    with pytest.raises(error, match=message): ActivationRecorder(model, **arguments)


def test_a_compiled_model_or_part_is_refused():
    model = small_model()
    with pytest.raises(ValueError, match='is compiled'): ActivationRecorder(torch.compile(model)).start()
    recorder = ActivationRecorder(model)
    model[2].compile()
    with pytest.raises(ValueError, match='2 is compiled'), recorder: pass
    assert not hooks_of(model)


def test_plots_draw_what_they_are_given():
    model = plain_cnn(1, generator=seeded())
    with ActivationRecorder(model, SEVEN, gradients=True, histogram=True, updates=True) as recorder:
        for _ in range(3):
            model(torch.randn(8, 1, 28, 28)).sum().backward()
            recorder.record_updates()
    frame = recorder.to_frame()
    ax = plot_layer_stats(frame, 'std')
    np.testing.assert_allclose(ax.lines[0].get_ydata(), frame.query('layer == "conv1"')['std'])
    assert len({line.get_color() for line in ax.lines}) == 7 # nobody has to guess which line is which
    assert sorted(text.get_text() for text in ax.texts) == sorted(SEVEN)
    heights = sorted(text.get_position()[1] for text in ax.texts)
    assert min(np.diff(heights)) > 0.08 and heights[0] >= 0 and heights[-1] <= 1
    by_height = sorted(ax.texts, key=lambda text: text.get_position()[1])
    assert np.all(np.diff([text.xy[1] for text in by_height]) >= 0) # labels in the order of their lines
    near = plot_near_zero(frame, layers=['conv4', 'conv2'])
    assert [line.get_label() for line in near.lines] == ['conv4', 'conv2'] and near.get_ylim() == (0, 100)
    shares = frame.query('layer == "conv4"')['near_zero_0.5']
    np.testing.assert_allclose(near.lines[0].get_ydata(), 100 * shares)
    assert plot_layer_stats(frame.assign(gradient_rms=np.nan), 'gradient_rms').get_yscale() == 'log'
    assert plot_histogram(recorder.histogram_frame('conv1')).get_ylabel()
    assert len(plot_layer_stats(recorder.updates_frame(), 'ratio').texts) == 5
    with pytest.raises(ValueError, match="did you mean 'mean'"): plot_layer_stats(frame, 'meen')
    with pytest.raises(ValueError, match='definition'): plot_near_zero(frame, 'near_zero_0.05') # not recorded
    plt.close('all')


def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    arguments = '--threads 1 --rounds 1 --steps 1 --activations relu --variants recorder'.split()
    arguments += ['--root', tmp_path, '--out', tmp_path / 'recorder.json']
    monkeypatch.setattr(sys, 'argv', ['recorder.py', *map(str, arguments)])
    threads = torch.get_num_threads()
    try: runpy.run_path(str(Path(__file__).parents[1] / 'benchmarks/recorder.py'), run_name='__main__')
    finally: torch.set_num_threads(threads)
    rows = pd.read_json(tmp_path / 'recorder.json', typ='series')['rows']
    assert [row['variant'] for row in rows] == ['no statistics', 'recorder']
    assert 'embedded sample' in capsys.readouterr().out


@pytest.mark.cuda
def test_on_a_gpu_the_numbers_are_those_of_the_cpu_and_nothing_waits():
    frames = []
    for device in ('cpu', 'cuda'):
        model = plain_cnn(1, generator=seeded()).to(device)
        batch = torch.randn(32, 1, 28, 28, generator=seeded(1)).to(device)
        with ActivationRecorder(model, SEVEN, near_zero=ALL, gradients=True, updates=True) as recorder:
            torch.cuda.set_sync_debug_mode('error' if device == 'cuda' else 'default')
            for _ in range(2):
                model(batch).square().mean().backward()
                recorder.record_updates()
            torch.cuda.set_sync_debug_mode('default')
        frames.append(SimpleNamespace(layers=recorder.to_frame(), updates=recorder.updates_frame()))
    for name in ('layers', 'updates'):
        pd.testing.assert_frame_equal(*(getattr(frame, name) for frame in frames), rtol=1e-3, atol=1e-3)
