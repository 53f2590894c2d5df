"""The recorder on other modules, modes, precisions and layouts; what it leaves behind; and that it never changes a number."""
import copy
import gc
import pickle
import subprocess
import sys
import warnings
import weakref
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.nn import functional as F

from wib_nbdev.activations import ACTIVATIONS, WIBReLU, make_activation
from wib_nbdev.models import plain_cnn
from wib_nbdev.recorder import (
    NEAR_ZERO,
    ActivationRecorder,
    _add_array,
    _add_tensor,
    _Ends,
    _floor,
    activation_of,
    count_below,
    cuts,
    dead_units,
    find_layers,
    memory_order,
    plot_definitions,
    plot_histogram,
    plot_layer_stats,
    plot_near_zero,
    plot_updates,
    sums,
)

SEVEN = ['conv1', 'conv2', 'conv3', 'conv4', 'pool', 'flatten', 'dense']


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def small_model(activation=nn.ReLU): return nn.Sequential(nn.Linear(6, 8), activation(), nn.Linear(8, 3))


def expected_row(a, preact=None):
    "Every statistic, one by one in float64, as the definitions say them."
    a = a.detach().float()
    row = {'mean': a.double().mean().item(), 'std': a.double().std(correction=0).item()}
    row['inactive'] = np.nan if preact is None else (preact.detach() <= 0).double().mean().item()
    row['near_zero_0.5'] = (a.abs() < 0.5).double().mean().item()
    row['near_zero_0.05'] = (a <= 0.05).double().mean().item()
    row['near_zero_bin_0.25'] = (a.abs() < 0.25).sum().item() / (a.abs() <= 10).sum().item()
    row['near_zero_bins_0.5'] = ((a >= 0) & (a < 0.5)).sum().item() / max(1, ((a >= 0) & (a <= 10)).sum().item())
    row['near_zero_bins_-0.35_0.7'] = ((a >= -0.35) & (a < 0.7)).sum().item() / (a.abs() <= 7).sum().item()
    return row


def assert_row(row, expected):
    np.testing.assert_allclose([row['mean'], row['std']], [expected['mean'], expected['std']], rtol=2e-5, atol=1e-6)
    for name in ('inactive', *NEAR_ZERO): np.testing.assert_equal(row[name], expected[name], err_msg=name)


# Counting

EDGES = [np.float32(v) for i in [d.near for d in NEAR_ZERO.values()] + ['[-10, 10]', '[-7, 7]'] for v in cuts(i) if np.isfinite(v)]
BESIDE = [np.nextafter(e, np.float32(way)) for e in EDGES for way in (-np.inf, np.inf)]
floats = st.floats(-20, 20, width=32) | st.sampled_from([float(e) for e in EDGES + BESIDE]) | st.sampled_from([np.inf, -np.inf, np.nan])


@given(hnp.arrays(np.float32, st.integers(1, 60), elements=floats))
def test_both_ways_of_counting_agree_with_the_definitions_to_the_last_value(x):
    ends = _Ends(i for d in NEAR_ZERO.values() for i in (d.near, d.kept) if i)
    on_host, on_device = np.zeros(3 + ends.n), torch.zeros(3 + ends.n, dtype=torch.float64)
    with np.errstate(invalid='ignore'): _add_array(torch.from_numpy(x), on_host, ends, np.empty(len(x), bool))
    _add_tensor(torch.from_numpy(x), on_device, ends)
    np.testing.assert_array_equal(on_host[3:], on_device.numpy()[3:])
    for d in NEAR_ZERO.values():
        kept = ends.inside(on_host[3:], d.kept) if d.kept else len(x)
        if kept: assert ends.inside(on_host[3:], d.near) / kept == d.share(x)


@given(hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-3, 3, width=32)))
def test_count_below_with_a_floor_counts_the_same(x):
    edges = [np.float32(e) for e in (-2, -0.5, 0, 0.25, 1)]
    assert count_below(x, edges) == [(x < e).sum() for e in edges] == count_below(x, edges, floor=float(x.min()))


def test_histogram_definitions_agree_with_histc_where_it_matters():
    dead = torch.full((1000,), -0.4)
    a = torch.cat([dead, torch.randn(9_001, generator=seeded()) * 5])
    h = a.histc(40, -7, 7)
    assert h[18] >= 1000 # the dead units' bin, next to the counted ones
    assert abs((h[19:22].sum() / h.sum()).item() - NEAR_ZERO['near_zero_bins_-0.35_0.7'].share(a)) < 1e-6
    h = a.histc(40, 0, 10)
    assert abs((h[:2].sum() / h.sum()).item() - NEAR_ZERO['near_zero_bins_0.5'].share(a)) < 1e-6


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.sampled_from([1_000, 30_000]))
def test_the_std_is_right_also_when_the_mean_is_far_larger(mean, std, n):
    x = torch.randn(n, generator=seeded()) * std + mean
    total, square = sums(x)
    found = max(square / n - (total / n) ** 2, 0) ** 0.5
    assert found == pytest.approx(x.double().std(correction=0).item(), rel=1e-4)


@pytest.mark.parametrize('x', [
    torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(4, 6).t(),
    torch.randn(8, 8)[::2, 1::3], torch.randn(3, 1, 5).expand(3, 4, 5), torch.randn(2, 2, 3, 2, 2).permute(4, 1, 0, 3, 2),
    torch.randn(()), torch.empty(0, 3), torch.randn(7).bfloat16(), torch.randn(7).double()])
def test_memory_order_has_every_value_once(x):
    flat = memory_order(x)
    assert flat.dim() == 1 and flat.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert sorted(flat.tolist()) == sorted(x.float().flatten().tolist() if x.dtype != torch.float64 else x.flatten().tolist())


# Records

@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_the_seven_layers_of_the_plain_cnn(activation, layout):
    model = plain_cnn(1, activation=activation, generator=seeded()).to(memory_format=layout)
    x = torch.randn(16, 1, 28, 28, generator=seeded(1))
    with ActivationRecorder(model, SEVEN) as recorder: model(x)
    frame = recorder.to_frame()
    assert list(frame['layer']) == SEVEN and list(frame.columns[:4]) == ['iteration', 'layer', 'mean', 'std']
    with torch.no_grad():
        for (_, row), (name, layer) in zip(frame.iterrows(), model.named_children(), strict=True):
            preact = layer.conv(x) if name.startswith('conv') else None
            x = layer.act(preact) if preact is not None else layer(x)
            assert_row(row, expected_row(x, preact))


def test_inplace_activations_have_the_same_inactive_share():
    shares = []
    for activation, inplace in [(nn.ReLU, False), (nn.ReLU, True), (nn.Hardswish, False), (nn.Hardswish, True), (nn.SiLU, True)]:
        model = small_model(partial(activation, inplace=inplace))
        nn.init.kaiming_normal_(model[0].weight, generator=seeded())
        nn.init.constant_(model[0].bias, 0.3)
        with ActivationRecorder(model, ['1']) as recorder: model(torch.randn(64, 6, generator=seeded(1)))
        shares.append(recorder.to_frame()['inactive'].item())
    assert 0.2 < shares[0] < 0.5 and len(set(shares)) == 1


def test_an_inplace_activation_that_hides_the_sign_is_counted_before_it_runs():
    model, x = nn.Sequential(nn.Identity(), nn.Threshold(0.0, 5.0, inplace=True)), torch.randn(200, generator=seeded())
    with ActivationRecorder(model, ['1']) as recorder: output = model(x.clone())
    assert output.min() > 0 and recorder.to_frame()['inactive'].item() == (x <= 0).double().mean()


def test_an_activation_shared_by_two_layers_counts_for_each_alone():
    shared = WIBReLU()
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), shared), nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared))
    nn.init.constant_(model[0][0].bias, 9.0)
    nn.init.constant_(model[1][2].bias, -9.0)
    with ActivationRecorder(model, ['0', '1']) as recorder: model(torch.randn(32, 4, generator=seeded()) * 0.1)
    assert list(recorder.to_frame()['inactive']) == [0.0, 1.0]


def test_a_floor_is_known_for_a_single_shift():
    assert _floor(WIBReLU(0.5)) == -0.5 - 0.5 / 64 and _floor(WIBReLU(-0.5)) == 0.5 - 0.5 / 64
    assert _floor(WIBReLU(torch.tensor([0.1, 0.2]))) == -np.inf


def test_resnet18_with_its_activations_called_twice_in_place():
    resnet18 = pytest.importorskip('torchvision.models').resnet18
    model = resnet18(num_classes=10)
    seen = []
    model.layer1[0].bn1.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    model.layer1[0].register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    with ActivationRecorder(model) as recorder: model(torch.randn(2, 3, 32, 32, generator=seeded()))
    frame = recorder.to_frame().set_index('layer')
    assert list(frame.index) == ['relu', *(f'layer{i}.{j}.relu' for i in (1, 2, 3, 4) for j in (0, 1)), 'fc']
    assert frame['inactive'].drop('fc').between(0, 1).all() and frame.drop(columns='inactive').notna().all(axis=None)
    both = torch.cat([seen[0].relu().flatten(), seen[1].flatten()])
    assert frame.loc['layer1.0.relu', 'mean'] == pytest.approx(both.mean().item(), rel=1e-5)
    assert frame.loc['layer1.0.relu', 'std'] == pytest.approx(both.std(correction=0).item(), rel=1e-5)


def test_a_functional_relu_is_seen_only_in_the_output_around_it():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        def forward(self, x): return self.second(F.relu(self.first(x)))
    assert list(find_layers(Functional())) == ['second']


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_under_autocast_statistics_are_taken_in_float32(dtype):
    model = plain_cnn(1, generator=seeded())
    outputs = []
    model.conv1.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    x = torch.randn(64, 1, 28, 28, generator=seeded()) + 1
    with ActivationRecorder(model, ['conv1']) as recorder, torch.autocast('cpu', dtype): model(x)
    assert outputs[0].dtype == dtype
    assert_row(recorder.to_frame().squeeze(), {**expected_row(outputs[0]), 'inactive': (outputs[0] == 0).double().mean().item()})


def test_a_double_model_and_a_model_of_one_module():
    model = nn.ReLU()
    x = torch.randn(50, dtype=torch.float64, generator=seeded())
    with ActivationRecorder(model) as recorder: model(x)
    row = recorder.to_frame().squeeze()
    assert row['mean'] == x.relu().mean().item() and row['inactive'] == (x <= 0).double().mean().item() and row['layer'] == ''


def test_calls_are_combined_and_a_layer_that_was_not_called_is_nan():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.other = nn.ReLU(), nn.Tanh()
        def forward(self, x, n): return sum(self.act(x + i) for i in range(n))
    model, x = Sometimes(), torch.randn(40, generator=seeded())
    with ActivationRecorder(model, ['act', 'other']) as recorder:
        for n in (1, 3): model(x, n)
    act, other = recorder.to_frame().query('layer == "act"'), recorder.to_frame().query('layer == "other"')
    calls = torch.cat([x, x + 1, x + 2])
    assert_row(act.iloc[1], expected_row(calls.relu(), calls))
    assert other.drop(columns=['iteration', 'layer']).isna().all(axis=None)


@pytest.mark.parametrize('when, n', [('train', 2), ('eval', 1), ('always', 3)])
def test_only_the_asked_modes_count(when, n):
    model = small_model()
    with ActivationRecorder(model, when=when) as recorder:
        for training in (True, False, True): model.train(training)(torch.randn(5, 6))
    assert recorder.iterations == n and list(recorder.to_frame()['iteration'].unique()) == list(range(n))


def test_evaluation_between_two_training_steps_leaves_no_trace():
    model, x = small_model(), torch.randn(5, 6, generator=seeded())
    with ActivationRecorder(model) as recorder:
        model(x)
        model.eval()(x * 100)
        model[1](x) # outside of the model's own forward
        model.train()(x)
    first, second = (part.drop(columns='iteration').reset_index(drop=True) for _, part in recorder.to_frame().groupby('iteration'))
    pd.testing.assert_frame_equal(first, second)


def test_numbers_of_a_run_do_not_depend_on_being_watched():
    def weights(watch):
        torch.manual_seed(0)
        model = nn.Sequential(plain_cnn(1, activation='wib_relu_batch', generator=seeded()), nn.Dropout(0.1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        recorder = ActivationRecorder(model, histogram=True, updates=True, every=2)
        if watch: recorder.start()
        for i in range(6):
            optimizer.zero_grad()
            model(torch.randn(32, 1, 28, 28, generator=seeded(i))).square().mean().backward()
            optimizer.step()
            if watch: recorder.record_updates()
        return [*model.parameters(), *model.buffers()]
    for watched, alone in zip(weights(True), weights(False), strict=True): assert torch.equal(watched, alone)


# Bounds

def test_a_full_recorder_thins_itself_and_says_so():
    model = small_model()
    with ActivationRecorder(model, capacity=5, every=3) as recorder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for i in range(100): model(torch.full((2, 6), float(i)))
        buffer = recorder._ledger.buffers['layers', torch.device('cpu')]
    frame = recorder.to_frame()
    assert list(frame['iteration'].unique()) == list(range(0, 100, recorder.every)) and recorder.every == 24
    assert len(caught) == 3 and 'every=6' in str(caught[0].message) and len(buffer) == 5
    with torch.no_grad():
        for i, part in frame.groupby('iteration'):
            assert part['mean'].iloc[-1] == pytest.approx(model(torch.full((2, 6), float(i))).mean().item(), rel=1e-4, abs=1e-5)


@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 120))
def test_records_are_evenly_spread_whatever_the_capacity(capacity, every, n):
    model = nn.Identity()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with ActivationRecorder(model, capacity=capacity, every=every) as recorder:
            for _ in range(n): model(torch.zeros(1))
    kept = recorder.to_frame()['iteration'].to_numpy()
    np.testing.assert_array_equal(kept, np.arange(0, n, recorder.every)[:len(kept)])
    assert len(kept) <= capacity and len(kept) * recorder.every >= n - recorder.every + 1 - (n == 0)


def test_off_iterations_cost_no_row_and_leave_no_count():
    model = small_model()
    with ActivationRecorder(model, every=4) as recorder:
        for i in range(9): model(torch.full((1, 6), float(i)))
    assert list(recorder.to_frame()['iteration'].unique()) == [0, 4, 8] and recorder.iterations == 9


# What is left behind

class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.fail = nn.GELU(), False
    def forward(self, x):
        x = self.act(x)
        if self.fail: raise RuntimeError('on purpose')
        return x


def hooks_of(model): return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]


def test_after_an_exception_the_hooks_are_gone_and_no_half_record_stays():
    model, x = Fails(), torch.randn(9, generator=seeded())
    with pytest.raises(RuntimeError, match='on purpose'), ActivationRecorder(model) as recorder:
        model(x)
        model.fail = True
        model(x * 50)
    assert not hooks_of(model) and list(recorder.to_frame()['iteration']) == [0]


def test_a_failed_pass_that_was_caught_does_not_count():
    model, x = Fails(), torch.randn(9, generator=seeded())
    with ActivationRecorder(model) as recorder:
        for model.fail in (True, False, True, False):
            try: model(x if not model.fail else x * 50)
            except RuntimeError: pass
    frame = recorder.to_frame()
    assert list(frame['iteration']) == [0, 1] and frame['mean'].nunique() == 1 and frame['inactive'][0] == (x <= 0).double().mean()


def test_start_and_stop_continue_the_same_records():
    model = small_model()
    recorder = ActivationRecorder(model)
    for _ in range(2):
        recorder.start()
        model(torch.randn(3, 6))
        recorder.stop()
        model(torch.randn(3, 6))
    recorder.stop() # twice does no harm
    assert recorder.iterations == 2 and not hooks_of(model)


def test_the_models_memory_is_freed_while_the_recorder_lives():
    model = small_model()
    with ActivationRecorder(model, updates=True) as recorder:
        loss = model(torch.randn(3, 6)).sum()
        loss.backward()
        recorder.record_updates()
    watched = [weakref.ref(model), weakref.ref(model[0].weight), weakref.ref(model[1])]
    del model, loss
    gc.collect()
    assert all(ref() is None for ref in watched) and len(recorder.to_frame()) == 2 and len(recorder.updates_frame()) == 2
    with pytest.raises(RuntimeError, match='gone'): recorder.start()


def test_no_activation_is_kept_while_recording():
    model = small_model()
    outputs = []
    model[1].register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    with ActivationRecorder(model, histogram=True):
        with torch.no_grad(): model(torch.randn(3, 6))
        gc.collect()
        assert outputs[0]() is None


def test_a_deep_copy_is_not_recorded_and_a_stopped_model_pickles():
    model = small_model()
    with ActivationRecorder(model) as recorder:
        average = copy.deepcopy(model)
        model(torch.randn(3, 6))
        average(torch.randn(3, 6))
    assert recorder.iterations == 1 and len(recorder.to_frame()) == 2
    pickle.loads(pickle.dumps(model))(torch.randn(3, 6))


# On request

def test_histograms_are_those_of_histc():
    model = plain_cnn(1, activation='elu', generator=seeded())
    outputs = []
    model.conv2.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    with ActivationRecorder(model, SEVEN, histogram=True, value_range=(-1, 3), bins=16) as recorder:
        for i in range(2): model(torch.randn(8, 1, 28, 28, generator=seeded(i)))
    frame = recorder.histogram_frame('conv2')
    expected = np.stack([(a.histc(16, -1, 3) / a.numel()).numpy() for a in outputs])
    np.testing.assert_allclose(frame, expected, atol=2 / outputs[0].numel()) # histc rounds at its edges
    np.testing.assert_allclose(frame.columns, np.arange(-0.875, 3, 0.25))
    with pytest.raises(ValueError, match="did you mean 'conv2'"): recorder.histogram_frame('conv22')


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
            if i == 2: row = [part.std(correction=0).item() for part in (gradient, before, model.dense.weight.detach() - before)]
    frame = recorder.updates_frame()
    assert list(frame['layer'].unique()) == [*(f'conv{i}.conv' for i in (1, 2, 3, 4)), 'dense'] # a PReLU's slope has no spread
    assert list(frame['iteration'].unique()) == [0, 2]
    found = frame.query('iteration == 2 and layer == "dense"').squeeze()
    np.testing.assert_allclose(found[['gradient_std', 'weight_std', 'update_std']].astype(float), row, rtol=1e-5)
    assert found['ratio'] == found['update_std'] / found['weight_std']


def test_iterations_without_record_updates_have_no_row():
    model = small_model()
    with ActivationRecorder(model, updates=True) as recorder:
        for i in range(3):
            model(torch.randn(3, 6)).sum().backward()
            if i == 1: recorder.record_updates()
    assert list(recorder.updates_frame()['iteration'].unique()) == [1] and (recorder.updates_frame()['update_std'] == 0).all()


def test_dead_units_over_batches_and_modes_left_alone():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 5), WIBReLU())
    model[3].eval()
    nn.init.constant_(model[1].weight, 0.0)
    with torch.no_grad(): model[1].bias.copy_(torch.tensor([-1., -1, 1, 1, 1, 1, 1, 0])) # a preact of exactly 0 is inactive too
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(50, 4, generator=seeded())
    frame = dead_units(model, x, batch_size=7)
    assert list(frame['layer']) == ['2', '5'] and list(frame['n_units']) == [8, 5] and frame['dead'][0] == 3 / 8
    pd.testing.assert_frame_equal(frame, dead_units(model, x.split(13)))
    assert model[1].training and not model[3].training and not hooks_of(model)
    for name, value in model.state_dict().items(): assert torch.equal(value, state[name])


def test_a_unit_that_one_image_wakes_is_not_dead():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    with torch.no_grad(): model[0].weight.copy_(torch.tensor([1., -1]).view(2, 1, 1, 1)); model[0].bias.fill_(-1)
    x = torch.zeros(10, 1, 3, 3)
    assert dead_units(model, x)['dead'].item() == 1
    x[9, 0, 2, 2] = 2
    assert dead_units(model, x, batch_size=3)['dead'].item() == 0.5
    with pytest.raises(ValueError, match='at least one input'): dead_units(model, [])


def test_units_of_a_token_layer_lie_along_its_last_dimension():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU())
    assert dead_units(model, torch.randn(2, 5, 4), unit_dim=-1)['n_units'].item() == 8


# Errors

@pytest.mark.parametrize('arguments, error, message', [
    ({'layers': ['cnov1']}, ValueError, "'cnov1' is not a module of the model; did you mean 'conv1'"),
    ({'layers': []}, ValueError, 'at least one name'),
    ({'layers': ['conv1', 'conv1']}, ValueError, 'none twice'),
    ({'layers': 'conv1'}, TypeError, "such as \\['conv1'\\]"),
    ({'every': 0}, ValueError, 'every=0'),
    ({'every': 1.5}, TypeError, 'every=1.5'),
    ({'capacity': 1}, ValueError, 'capacity=1'),
    ({'when': 'training'}, ValueError, "did you mean 'train'"),
    ({'near_zero': ['near_zero_0.6']}, ValueError, 'near_zero_0.5'),
    ({'value_range': (1, float('nan'))}, ValueError, 'value_range'),
    ({'bins': 0}, ValueError, 'bins=0'),
])
def test_wrong_arguments(arguments, error, message):
    model = plain_cnn(1, generator=seeded())
    with pytest.raises(error, match=message): ActivationRecorder(model, **arguments)
    assert not hooks_of(model)


def test_a_compiled_model_or_part_is_refused_with_what_to_do():
    model = small_model()
    with pytest.raises(ValueError, match='_orig_mod'): ActivationRecorder(torch.compile(model))
    with pytest.raises(ValueError, match='_orig_mod'): ActivationRecorder(nn.Sequential(torch.compile(model)))
    ActivationRecorder(torch.compile(model)._orig_mod)
    recorder = ActivationRecorder(model)
    model[2].compile()
    with pytest.raises(ValueError, match=r"its module '2' .*model\.compile"): recorder.start()
    assert not hooks_of(model)


def test_a_layer_that_puts_out_no_tensor_is_named():
    model = nn.Sequential(nn.LSTM(3, 3))
    with pytest.raises(TypeError, match="'0' puts out tuple"), ActivationRecorder(model, ['0']): model(torch.randn(4, 2, 3))
    assert not hooks_of(model)


def test_activation_of_a_nested_sequential_but_not_of_a_block():
    act = nn.Tanh()
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()
    assert activation_of(nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1), act))) is act
    assert activation_of(Block()) is None and activation_of(nn.Sequential()) is None


def test_a_sequential_with_its_own_forward_is_not_taken_for_its_last_module():
    class Residual(nn.Sequential):
        def forward(self, x): return x + super().forward(x)
    block = Residual(nn.Linear(6, 6), nn.ReLU())
    for layer in (block, nn.Sequential(block)):
        model, x = nn.Sequential(layer), torch.randn(200, 6, generator=seeded())
        with ActivationRecorder(model, ['0']) as recorder: a = model(x)
        assert_row(recorder.to_frame().iloc[0], expected_row(a))
        for name, definition in NEAR_ZERO.items(): assert recorder.to_frame()[name].item() == definition.share(a.detach())
    assert activation_of(block) is None and list(find_layers(nn.Sequential(block))) == ['0.1']


# Elsewhere

@pytest.mark.parametrize('name', ACTIVATIONS)
def test_every_registered_activation_is_seen(name): assert list(find_layers(nn.Sequential(nn.Linear(2, 2), make_activation(name)))) == ['1']


def test_plots_draw_what_they_are_given():
    model = plain_cnn(1, generator=seeded())
    with ActivationRecorder(model, SEVEN, histogram=True, updates=True) as recorder:
        for _ in range(3):
            model(torch.randn(8, 1, 28, 28)).sum().backward()
            recorder.record_updates()
    frame = recorder.to_frame()
    ax = plot_layer_stats(frame, 'std')
    assert [line.get_label() for line in ax.lines] == SEVEN and ax.get_xlabel() == 'iteration'
    np.testing.assert_allclose(ax.lines[0].get_ydata(), frame.query('layer == "conv1"')['std'])
    near = plot_near_zero(frame)
    assert len(near.lines) == 4 and near.get_ylim() == (0, 100)
    np.testing.assert_allclose(near.lines[3].get_ydata(), 100 * frame.query('layer == "conv4"')['near_zero_0.5'])
    assert plot_histogram(recorder.histogram_frame('conv1')).get_ylabel() and len(plot_updates(recorder.updates_frame()).lines) == 6
    assert plot_definitions(pd.DataFrame({'relu': [0.1, 0.2]}, index=['a', 'b'])).get_legend()
    with pytest.raises(ValueError, match="did you mean 'mean'"): plot_layer_stats(frame, 'meen')
    with pytest.raises(ValueError, match='definition'): plot_near_zero(frame, 'near_zero_1')
    import matplotlib.pyplot as plt
    plt.close('all')


def test_the_benchmark_runs_and_writes_what_it_printed(root, tmp_path):
    out = tmp_path / 'recorder.json'
    arguments = ['--threads', '1', '--rounds', '1', '--steps', '1', '--activations', 'relu', '--variants', 'recorder']
    arguments += ['--root', str(tmp_path)]
    done = subprocess.run([sys.executable, root / 'benchmarks/recorder.py', *arguments, '--out', str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = pd.read_json(out, typ='series')['rows']
    assert [row['variant'] for row in rows] == ['no statistics', 'recorder'] and 'embedded sample' in done.stdout


@pytest.mark.cuda
def test_on_a_gpu_the_numbers_are_those_of_the_cpu_and_nothing_waits():
    model = plain_cnn(1, generator=seeded())
    x = torch.randn(32, 1, 28, 28, generator=seeded(1))
    frames = []
    for device in ('cpu', 'cuda'):
        model, batch = model.to(device), x.to(device)
        with ActivationRecorder(model, SEVEN) as recorder:
            model(batch) # the buffers are made here
            torch.cuda.set_sync_debug_mode('error' if device == 'cuda' else 'default')
            model(batch)
            torch.cuda.set_sync_debug_mode('default')
        frames.append(recorder.to_frame())
    pd.testing.assert_frame_equal(*frames, rtol=1e-3, atol=1e-3)
