"""What a notebook cannot show of the activations: autograd, compilers, transforms, copies, precision."""
import copy
import io
import pickle
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from wib_nbdev.activations import (
    ACTIVATIONS,
    EQ7_SHIFT,
    WIBReLU,
    WIBReLUBatch,
    WIBReLUCode,
    ZeroMean,
    make_activation,
    predict_depth,
    simulate_depth,
    wib_relu,
)
from wib_nbdev.config import Activation
from wib_nbdev.mean_shift import gaussian_moments
from wib_nbdev.style import ARM_STYLE

numbers = st.floats(-1e3, 1e3, width=32)
tensors = st.lists(numbers, min_size=1, max_size=50).map(torch.tensor)
CHANNELS = torch.tensor([0.1, 0.2, 0.3])
FORMS = {'number': lambda: WIBReLU(0.3), 'per channel': lambda: WIBReLU(CHANNELS)}
UNITS = {
    **FORMS,
    'batch': WIBReLUBatch,
    'code': WIBReLUCode,
    'zero mean': lambda: ZeroMean(F.silu, unit_variance=True),
}
forms = pytest.mark.parametrize('unit', FORMS.values(), ids=FORMS)
units = pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)


def images(*shape: int, seed: int = 0, **kw) -> torch.Tensor:
    return torch.randn(shape or (4, 3, 8, 8), generator=torch.Generator().manual_seed(seed), **kw)


def small(unit: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 3), unit, nn.Flatten(), nn.Linear(3 * 36, 5))


@given(tensors, numbers)
@settings(max_examples=50)
def test_is_relu_minus_shift_and_a_clamp(x, shift):
    "Exactly, in floating point: rounding is monotone, so the clamp meets -shift from either side."
    expected = F.relu(x) - torch.tensor(shift)
    assert torch.equal(wib_relu(x, shift), expected) and torch.equal(WIBReLU(shift)(x), expected)
    assert torch.equal((x - shift).clamp_min(-torch.tensor(shift)), expected)


@forms
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients_are_relus(unit, dtype):
    "In each precision; an inactive unit gets no gradient though its output is rounded."
    x, module = images().to(dtype), unit()
    x.view(-1)[:3] = torch.tensor([0.0, -1e-3, -1.0])
    x[x.abs() < 0.01] = 0  # a positive pre-activation that the shift rounds away gets no gradient
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = module(ours)
    assert out.dtype == dtype
    assert_close(out, F.relu(x) - module.shift.to(dtype).view(-1, 1, 1))
    out.sum().backward()
    F.relu(theirs).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


@forms
def test_gradcheck_twice_and_for_a_shift_that_learns(unit):
    x = images(2, 3, 2, 2, dtype=torch.float64).requires_grad_()
    shift = unit().shift.double().requires_grad_()
    assert torch.autograd.gradcheck(wib_relu, (x, shift))
    assert torch.autograd.gradgradcheck(wib_relu, (x, shift))
    gradient, = torch.autograd.grad(wib_relu(x, shift).sum(), shift)
    assert_close(gradient, torch.full_like(shift, -x.numel() / shift.numel()))


@forms
def test_keeps_no_more_for_the_backward_pass_than_relu(unit):
    def saved(activation: nn.Module) -> int:
        storages = {}
        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor
        model = nn.Sequential(nn.Conv2d(3, 3, 3), activation, nn.Conv2d(3, 3, 3))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(images(8, 3, 32, 32))
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    few_bytes = 2 * CHANNELS.nbytes  # the shifts
    assert saved(unit()) <= saved(nn.ReLU()) + few_bytes


@units
def test_compile_without_a_graph_break_and_export(unit):
    eager, x = small(unit()), images()
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend='aot_eager')
    for model in (eager, compiled): model(x).square().sum().backward()
    for ours, theirs in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(eager.eval(), (x,)), buffer)
    buffer.seek(0)
    assert_close(torch.export.load(buffer).module()(x), eager(x))
    assert torch.equal(torch.fx.symbolic_trace(eager)(x), eager(x))


@units
def test_autocast_and_half_precision(unit):
    model = nn.Sequential(nn.Conv2d(3, 3, 3), unit(), nn.Conv2d(3, 2, 3))
    with torch.autocast('cpu', torch.bfloat16): out = model(images())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.dtype == torch.float32
    assert model.bfloat16()(images().bfloat16()).dtype == torch.bfloat16


@forms
def test_function_transforms_reach_the_shift(unit):
    "functional_call, grad, vmap over images and over an ensemble with shifts of its own, a Hessian."
    model, x = small(unit()), images()
    state = {name: value.detach() for name, value in model.state_dict().items()}
    loss = lambda state, x: torch.func.functional_call(model, state, (x,)).square().sum()
    gradients = torch.func.grad(loss)(state, x)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters(): assert_close(gradients[name], parameter.grad)
    assert gradients['1.shift'].shape == state['1.shift'].shape and gradients['1.shift'].abs().min() > 0
    per_image = torch.vmap(torch.func.grad(lambda state, one: loss(state, one[None])), (None, 0))(state, x)
    for name in state: assert_close(per_image[name].sum(0), gradients[name], rtol=1e-4, atol=1e-4)
    ensemble = {name: torch.stack([value, 2 * value]) for name, value in state.items()}
    alone = torch.stack([loss({name: value[i] for name, value in ensemble.items()}, x) for i in range(2)])
    assert_close(torch.vmap(loss, (0, None))(ensemble, x), alone)
    hessian = torch.func.hessian(lambda z: unit()(z).square().sum())(images(1, 3)).view(3, 3)
    assert torch.equal(hessian, 2 * torch.diag((images(1, 3) > 0).float().view(3)))


@pytest.mark.cuda
@forms
def test_on_a_gpu_without_a_synchronisation(unit):
    module, x = unit().cuda(), images().cuda().requires_grad_()
    torch.cuda.set_sync_debug_mode('error')
    try: (module(x) + wib_relu(x)).sum().backward()
    finally: torch.cuda.set_sync_debug_mode('default')
    assert_close(module(x).cpu(), unit()(x.cpu()))
    assert torch.equal(x.grad, 2 * (x > 0).float())


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_copies_and_checkpoints(name):
    unit, x = make_activation(name), images()
    unit(x)  # a running mean moves
    unit.eval()
    loaded = make_activation(name).eval()
    loaded.load_state_dict(unit.state_dict())
    for twin in (pickle.loads(pickle.dumps(unit)), copy.deepcopy(unit), loaded):
        assert twin is not unit and torch.equal(twin(x), unit(x)) and repr(twin) == repr(unit)


@forms
def test_what_writes_into_buffers_reaches_the_forward_pass(unit):
    "The kind of fault: a shift that others see and the forward pass does not. Here it is one buffer."
    x, fill = images(), torch.full_like(unit().shift, 0.7)
    def out(module: nn.Module) -> torch.Tensor: return module(x)
    def after(change) -> nn.Module:
        module = unit()
        with torch.no_grad(): change(module)
        return module
    changed = {
        'fill_': after(lambda m: m.shift.fill_(0.7)),
        'state_dict()': after(lambda m: m.state_dict()['shift'].copy_(fill)),
        'assigned': after(lambda m: setattr(m, 'shift', fill)),
        'a broadcast of buffers, as in DDP': after(lambda m: [each.copy_(fill) for each in m.buffers()]),
        'load_state_dict': after(lambda m: m.load_state_dict({'shift': fill})),
        'assign=True': after(lambda m: m.to('meta').load_state_dict({'shift': fill}, assign=True)),
        'to_empty': after(lambda m: m.to('meta').to_empty(device='cpu').load_state_dict({'shift': fill})),
    }
    for how, module in changed.items(): assert torch.equal(out(module), F.relu(x) - 0.7), how
    averaged = torch.optim.swa_utils.AveragedModel(unit(), use_buffers=True)
    averaged.update_parameters(changed['fill_'])
    assert torch.equal(out(averaged), F.relu(x) - 0.7)
    assert list(dict(unit().named_buffers())) == list(unit().state_dict()) == ['shift']
    assert not list(unit().parameters())
    assert unit().half().shift.dtype == torch.float16 and unit().to('meta')(x.to('meta')).shape == x.shape


@pytest.mark.parametrize('make', [WIBReLU, lambda: ZeroMean(F.silu)], ids=['WIBReLU', 'ZeroMean'])
def test_a_state_of_either_form_loads(make, tmp_path):
    "Through a file, without unpickling code. Another number of channels is refused by PyTorch's own message."
    number, channels = make(), make()
    channels.shift = CHANNELS
    torch.save({'number': number.state_dict(), 'channels': channels.state_dict()}, tmp_path / 'states.pt')
    states = torch.load(tmp_path / 'states.pt', weights_only=True)
    for source, target in [(channels, make()), (number, copy.deepcopy(channels))]:
        target.load_state_dict(states['channels' if source is channels else 'number'])
        assert torch.equal(target(images()), source(images()))
    with pytest.raises(RuntimeError, match='size mismatch for shift'):
        channels.load_state_dict({'shift': torch.zeros(4)})


@pytest.mark.parametrize('x', [
    images().to(memory_format=torch.channels_last), images(4, 3, 16, 8)[:, :, ::2], images(0, 3, 8, 8),
    images(5, 3), images(2, 3, 4, 4, 4),
], ids=['channels_last', 'strided', 'empty', 'dense', '3d'])
def test_layouts(x):
    out = WIBReLU(CHANNELS)(x)
    assert torch.equal(out, F.relu(x) - CHANNELS.view(-1, *[1] * (x.dim() - 2)))
    layout = dict(memory_format=torch.channels_last)
    assert x.dim() != 4 or out.is_contiguous(**layout) == x.is_contiguous(**layout)


@pytest.mark.parametrize('call, kind, message', [
    (lambda: make_activation('wib_rel'), ValueError, "did you mean 'wib_relu'"),
    (lambda: WIBReLU('0.4'), TypeError, 'str'),
    (lambda: wib_relu(torch.ones(2, dtype=torch.int32)), RuntimeError, 'Float'),
    (lambda: WIBReLU(CHANNELS)(images(2, 4, 5, 5)), RuntimeError, r'\(4\)|\[2, 4, 5, 5\]'),
    (lambda: ZeroMean(lambda z: z.softmax(0)), ValueError, 'elementwise'),
    (lambda: ZeroMean(lambda z: 0 * z, unit_variance=True), ValueError, 'is constant at preact_std=1.0'),
    (lambda: ZeroMean(lambda z: z.clamp(9, 10) / 3, unit_variance=True), ValueError, 'is constant'),
])
def test_what_is_wrong_is_an_error(call, kind, message):
    with pytest.raises(kind, match=message): call()


def test_readings_b_and_c():
    batch, code, x = WIBReLUBatch(), WIBReLUCode().eval(), images() + 1
    assert abs(batch(x).mean()) < 1e-6
    assert_close(batch.running_mean, torch.tensor(0.9 * EQ7_SHIFT) + 0.1 * F.relu(x).mean())
    assert torch.equal(batch.eval()(x), F.relu(x) - batch.running_mean)
    assert torch.equal(batch(x)[:1], batch(x[:1]))
    assert torch.equal(code(x), F.relu(x) - x.mean()) and not torch.allclose(code(x)[:1], code(x[:1]))


@given(st.sampled_from([F.relu, F.elu, F.gelu, torch.tanh, F.silu]), st.floats(0.2, 4))
@settings(max_examples=10, deadline=None)
def test_zero_mean_has_mean_0_and_variance_1(fn, preact_std):
    moments = gaussian_moments(ZeroMean(fn, preact_std, unit_variance=True).double(), preact_std)
    assert moments.mean == pytest.approx(0, abs=1e-6) and moments.var == pytest.approx(1, abs=1e-6)


def test_the_registry_is_config_s():
    assert tuple(ACTIVATIONS) == get_args(Activation)
    assert set(ACTIVATIONS) <= set(ARM_STYLE), 'nbs/lib/style.ipynb: a label, a colour and a marker for each'
    assert make_activation('prelu') is not make_activation('prelu')


def test_theory_of_two_inputs_against_its_closed_form_and_networks():
    "ReLU's is the arc-cosine kernel (Cho and Saul 2009); under Kaiming gradient and second moment stay 1."
    theory, cosine = predict_depth(F.relu, 2**0.5, 4, similarity=0.3), torch.tensor(0.3, dtype=torch.float64)
    for row in theory.itertuples():
        angle = cosine.acos()
        cosine = (angle.sin() + (torch.pi - angle) * cosine) / torch.pi
        assert row.similarity == pytest.approx(cosine.item(), abs=1e-5)
        assert row.gradient == pytest.approx(1, abs=1e-5)
        assert row.mean**2 + row.std**2 == pytest.approx(1, abs=1e-6)
    for name, gain in {'wib_relu': 2**0.5, 'tanh': 1.5, 'prelu': 1.2}.items():
        unit = make_activation(name)
        theory = predict_depth(unit, gain, 4, similarity=0.3).set_index('layer')
        seen = simulate_depth(unit, gain, 4, width=256, n_inputs=128, n_trials=10, similarity=0.3,
                              generator=torch.Generator().manual_seed(0))
        seen = seen.groupby('layer')[list(theory)].mean()
        assert (seen - theory).abs().max().max() < 0.05, name
