"""WIB-ReLU where engineers put it: dtypes, layouts, compilers, exporters, checkpoints; and the identities for all inputs."""
import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from wib_nbdev.activations import ACTIVATIONS, EQ7_SHIFT, WIBReLU, WIBReLUBatch, WIBReLUCode, ZeroMean, make_activation, wib_relu
from wib_nbdev.mean_shift import gaussian_moments

numbers = st.floats(-1e3, 1e3, width=32)
tensors = st.lists(numbers, min_size=1, max_size=50).map(torch.tensor)
some = settings(max_examples=50)
UNITS = {'number': lambda: WIBReLU(0.3), 'per channel': lambda: WIBReLU(torch.tensor([0.1, 0.2, 0.3]))}


def images(*shape: int, seed: int = 0, **kw) -> torch.Tensor:
    return torch.randn(shape or (4, 3, 8, 8), generator=torch.Generator().manual_seed(seed), **kw)


@given(tensors, numbers)
@some
def test_is_relu_minus_shift_and_a_clamp(x, shift):
    "Exactly, in floating point: rounding is monotone, so the clamp meets -shift from either side."
    expected = F.relu(x) - torch.tensor(shift)
    assert torch.equal(wib_relu(x, shift), expected)
    assert torch.equal((x - shift).clamp_min(-torch.tensor(shift)), expected)


@given(tensors, st.floats(-3, 3))
@some
def test_gradient_is_relus(x, shift):
    big = x[(x.abs() > 1e-3) | (x == 0)]
    ours, theirs = big.clone().requires_grad_(), big.clone().requires_grad_()
    wib_relu(ours, shift).sum().backward()
    F.relu(theirs).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
def test_gradcheck_of_the_module(unit):
    x = images(2, 3, 2, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(unit().double(), x) and torch.autograd.gradgradcheck(unit().double(), x)


@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('grad', [False, True])
def test_dtype_is_kept(unit, dtype, grad):
    x = images().to(dtype).requires_grad_(grad)
    out = unit()(x)
    shift = unit().shift.view(-1, 1, 1).to(dtype)
    assert out.dtype == dtype
    assert_close(out, F.relu(x) - shift)


@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
@pytest.mark.parametrize('x', [
    images().to(memory_format=torch.channels_last), images().transpose(2, 3), images(4, 3, 16, 8)[:, :, ::2], images(0, 3, 8, 8),
    images(5, 3), images(4, 3, 8), images(2, 3, 4, 4, 4), images(1, 3, 1, 1).expand(4, 3, 8, 8),
], ids=['channels_last', 'transposed', 'strided', 'empty', 'dense', '1d', '3d', 'expanded'])
def test_layouts(unit, x):
    x = x.detach().requires_grad_()
    module = unit()
    shift = module.shift.view(-1, *[1] * (x.dim() - 2)).to(x.dtype)
    out = module(x)
    assert torch.equal(out, F.relu(x) - shift)
    out.sum().backward()
    assert torch.equal(x.grad, (x > 0).float())
    if x.is_contiguous(memory_format=torch.channels_last) and x.dim() == 4 and x.numel():
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_input_is_not_changed():
    x = images()
    before = x.clone()
    WIBReLU()(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
def test_saved_for_backward_is_no_more_than_relus(unit):
    def saved(activation: nn.Module) -> int:
        storages = {}
        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor
        model = nn.Sequential(nn.Conv2d(3, 3, 3), activation, nn.Conv2d(3, 3, 3))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor): model(images(8, 3, 32, 32))
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    few_bytes = 3 * 4  # the shift of each channel
    assert saved(unit()) <= saved(nn.ReLU()) + few_bytes


@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
def test_autocast(unit):
    model = nn.Sequential(nn.Conv2d(3, 3, 3), unit(), nn.Conv2d(3, 2, 3))
    with torch.autocast('cpu', torch.bfloat16): out = model(images())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def small(unit: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 3), unit, nn.Flatten(), nn.Linear(3 * 36, 5))


COMPILED = {**UNITS, 'batch': WIBReLUBatch, 'code': WIBReLUCode, 'zero mean': lambda: ZeroMean(F.silu, unit_variance=True)}


@pytest.mark.parametrize('unit', COMPILED.values(), ids=COMPILED)
def test_compile_without_a_graph_break(unit):
    eager, x = small(unit()), images()
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend='aot_eager')
    for _ in range(2):
        for model in (eager, compiled): model(x).square().sum().backward()
        for ours, theirs in zip(eager.parameters(), compiled.parameters(), strict=True): assert_close(ours.grad, theirs.grad)
    assert_close(eager.eval()(x), compiled.eval()(x))


@pytest.mark.parametrize('unit', COMPILED.values(), ids=COMPILED)
def test_torch_export(unit):
    model, x = small(unit()).eval(), images()
    program = torch.export.export(model, (x,))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    assert_close(torch.export.load(buffer).module()(x), model(x))


@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
def test_onnx(unit, tmp_path):
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    model, x = small(unit()).eval(), images()
    torch.onnx.export(model, (x,), tmp_path / 'model.onnx', dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    out, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(out), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_pickle_and_deepcopy(name):
    unit, x = make_activation(name).eval(), images()
    for twin in (pickle.loads(pickle.dumps(unit)), copy.deepcopy(unit)):
        assert twin is not unit and torch.equal(twin(x), unit(x)) and repr(twin) == repr(unit)


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_state_dict_round_trip(name):
    unit, other = make_activation(name), make_activation(name)
    unit(images())  # a running mean moves
    other.load_state_dict(unit.state_dict())
    assert torch.equal(other.eval()(images(seed=1)), unit.eval()(images(seed=1)))


@pytest.mark.parametrize('saved', UNITS.values(), ids=UNITS)
@pytest.mark.parametrize('loaded', UNITS.values(), ids=UNITS)
def test_checkpoint_across_forms(saved, loaded, tmp_path):
    "Through a file, without unpickling code; a checkpoint's form wins over the module's."
    source, target = nn.Sequential(nn.Linear(3, 3), saved()), nn.Sequential(nn.Linear(3, 3), loaded())
    torch.save(source.state_dict(), tmp_path / 'model.pt')
    target.load_state_dict(torch.load(tmp_path / 'model.pt', weights_only=True))
    assert torch.equal(target(images(5, 3)), source(images(5, 3)))
    assert list(target.state_dict()) == ['0.weight', '0.bias', '1.shift']


def test_checkpoint_with_a_bad_shift_is_refused():
    with pytest.raises(ValueError, match='shift=nan'): WIBReLU().load_state_dict({'shift': torch.tensor(math.nan)})


def test_moves_with_the_module():
    unit = WIBReLU(torch.tensor([0.1, 0.2, 0.3])).to(torch.float64)
    assert unit.shift.dtype == torch.float64
    assert unit.to('meta').shift.device.type == 'meta'
    number = WIBReLU(torch.tensor(0.25)).half().shift
    assert number.dtype == torch.float64 and number.shape == () and number == 0.25


def saved_state() -> dict[str, torch.Tensor]: return nn.Sequential(nn.Linear(3, 3), UNITS['per channel']()).state_dict()


@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
def test_a_loaded_shift_goes_where_its_module_is(unit):
    model = nn.Sequential(nn.Linear(3, 3), unit())
    model.double().load_state_dict(saved_state())
    assert model[1].shift.dtype == torch.float64 and torch.equal(model[1].shift, saved_state()['1.shift'].double())
    model = nn.Sequential(nn.Linear(3, 3), unit()).double().to('meta').float()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # PyTorch's: copying onto the meta device does nothing
        model.load_state_dict(saved_state())
    assert (model[1].shift.device, model[1].shift.dtype) == (model[0].weight.device, torch.float32) == (torch.device('meta'), torch.float32)


@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
def test_an_assigned_state_leaves_the_meta_device(unit):
    "As models that are built without memory get their weights; then they move, and load another state."
    model = nn.Sequential(nn.Linear(3, 3), unit()).to('meta')
    model.load_state_dict(saved_state(), assign=True)
    assert torch.equal(model[1].shift, saved_state()['1.shift'])
    model[1].set_shift(0.3)
    model.load_state_dict(saved_state())
    assert torch.equal(model.double().cpu()[1].shift, saved_state()['1.shift'].double())


def test_a_number_leaves_the_meta_device():
    unit = WIBReLU(0.3).to('meta').cpu()
    unit.load_state_dict({'shift': LENT['per channel']})
    assert torch.equal(unit.shift, LENT['per channel'])


@pytest.mark.cuda
@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
def test_a_shift_from_a_file_goes_to_the_gpu(unit):
    model = nn.Sequential(nn.Linear(3, 3), unit()).cuda()
    model.load_state_dict(saved_state())
    assert model[1].shift.is_cuda and {buffer.device.type for buffer in model.buffers()} == {'cuda'}


@pytest.mark.cuda
@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
def test_on_a_gpu_without_a_sync(unit):
    module, x = unit().cuda(), images().cuda().requires_grad_()
    torch.cuda.set_sync_debug_mode('error')
    try: module(x).sum().backward()
    finally: torch.cuda.set_sync_debug_mode('default')
    assert_close(module(x).cpu(), unit()(x.cpu()))


@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
def test_function_transforms(unit):
    model, x = small(unit()), images()
    parameters = dict(model.named_parameters())
    loss = lambda parameters: torch.func.functional_call(model, parameters, (x,)).square().sum()
    gradients = torch.func.grad(loss)(parameters)
    model(x).square().sum().backward()
    for name, parameter in parameters.items(): assert_close(gradients[name], parameter.grad)


def test_vmap():
    x = images(6, 3, 8, 8)
    assert torch.equal(torch.vmap(lambda one: wib_relu(one, 0.3))(x), wib_relu(x, 0.3))
    per_image = torch.vmap(torch.func.grad(lambda one: wib_relu(one, 0.3).sum()))(x)
    assert torch.equal(per_image, (x > 0).float())


@pytest.mark.parametrize('name', ['wib_relu', 'wib_relu_04', 'wib_relu_centred', 'wib_relu_batch'])
def test_zero_mean_where_it_should_be(name):
    preact_std = {'wib_relu': math.sqrt(2), 'wib_relu_04': 0.4 * math.sqrt(2 * math.pi), 'wib_relu_batch': 3.0}.get(name, 1.712859)
    z = preact_std * images(1_000_000)
    out = make_activation(name)(z)
    assert abs(out.mean()) < 5 * out.std() / 1000


def test_batch_reading_runs_its_mean():
    unit, x = WIBReLUBatch(momentum=0.25), images() + 1
    unit(x)
    assert_close(unit.running_mean, torch.tensor(0.75 * EQ7_SHIFT) + 0.25 * F.relu(x).mean())
    before = unit.eval().running_mean.clone()
    assert_close(unit(x), F.relu(x) - before)
    assert torch.equal(unit.running_mean, before)
    with pytest.raises(ValueError, match=r'momentum=1\.5'): WIBReLUBatch(momentum=1.5)


def test_code_reading_depends_on_the_batch_even_in_evaluation():
    unit, x = WIBReLUCode().eval(), images() + 1
    assert not torch.allclose(unit(x)[:1], unit(x[:1]))
    assert_close(unit(x), F.relu(x) - x.mean())


@given(st.sampled_from([F.relu, F.elu, F.gelu, torch.tanh, F.silu]), st.floats(0.2, 4))
@settings(max_examples=15)
def test_zero_mean_is_zero_mean(fn, preact_std):
    moments = gaussian_moments(ZeroMean(fn, preact_std, unit_variance=True), preact_std)
    assert moments.mean == pytest.approx(0, abs=1e-7) and moments.var == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize('call, kind, message', [
    (lambda: WIBReLU(math.nan), ValueError, 'shift=nan'),
    (lambda: WIBReLU(math.inf), ValueError, 'shift=inf'),
    (lambda: WIBReLU('0.4'), TypeError, "shift='0.4'"),
    (lambda: WIBReLU(torch.tensor([1, 2])), ValueError, r'shift of shape \(2,\)'),
    (lambda: wib_relu(torch.ones(2), math.nan), ValueError, 'shift=nan'),
    (lambda: wib_relu(torch.ones(2, dtype=torch.int32)), TypeError, r'torch\.int32'),
    (lambda: wib_relu([1.0]), TypeError, 'list'),
    (lambda: WIBReLU()(torch.ones(2, dtype=torch.bool)), TypeError, r'torch\.bool'),
    (lambda: make_activation('wib_rel'), ValueError, "did you mean 'wib_relu'"),
    (lambda: ZeroMean(lambda z: z.softmax(0)), ValueError, 'must be elementwise'),
    (lambda: ZeroMean(torch.ones_like, unit_variance=True), ValueError, 'constant'),
])
def test_errors_name_what_is_wrong(call, kind, message):
    with pytest.raises(kind, match=message): call()


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('shift', [0.3, 0.4, EQ7_SHIFT, 0.6833, 0.7])
@pytest.mark.parametrize('form', [None, torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('shape', [(), (1,), (4,)], ids=str)
def test_silent_units_get_no_gradient_in_any_precision(dtype, shift, form, shape):
    "For a number and for a tensor, which may be more precise than the output is."
    z = torch.tensor([-1.0, -0.5, 0.0, 1.0], dtype=dtype, requires_grad=True)
    wib_relu(z, shift if form is None else torch.full(shape, shift, dtype=form)).sum().backward()
    assert z.grad.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize('unit', COMPILED.values(), ids=COMPILED)
def test_fx_traces_a_model_with_it(unit):
    model, x = small(unit()).eval(), images()
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
def test_second_derivatives_forward_over_reverse(unit):
    "The Hessian of a sum of squares is 2 where the unit is active; relu(x) alone can do this, so must WIB-ReLU."
    x, module = images(1, 3), unit()
    hessian = torch.func.hessian(lambda z: module(z).square().sum())(x).view(3, 3)
    assert torch.equal(hessian, 2 * torch.diag((x > 0).float().view(3)))


def test_a_shift_that_learns_gets_its_gradient():
    x, shift = images().requires_grad_(), torch.tensor(0.4, requires_grad=True)
    wib_relu(x, shift).sum().backward()
    assert shift.grad.item() == -x.numel() and torch.equal(x.grad, (x > 0).float())


@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
def test_functional_call_with_parameters_and_buffers(unit):
    model, x = small(unit()), images()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert torch.equal(torch.func.functional_call(model, state, (x,)), model(x))


@pytest.mark.parametrize('unit', [WIBReLU, WIBReLUBatch, WIBReLUCode, lambda: ZeroMean(F.relu)])
def test_integers_are_refused_by_every_reading(unit):
    with pytest.raises(TypeError, match=r'x: must be a floating tensor, not torch\.int64'): unit()(torch.tensor([[1, 2]]))


@pytest.mark.parametrize('shape', [(2, 4, 5, 5), (3,), (3, 5, 5)])
@pytest.mark.parametrize('grad', [False, True])
def test_channels_that_do_not_fit_are_named(shape, grad):
    with pytest.raises(ValueError, match=r'shift has 3 channels'): UNITS['per channel']()(images(*shape).requires_grad_(grad))


@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
def test_per_image_gradients_under_compile(unit):
    model, x = small(unit()), images()
    loss = lambda parameters, one: torch.func.functional_call(model, parameters, (one[None],)).square().sum()
    per_image = torch.vmap(torch.func.grad(loss), (None, 0))
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    ours, eager = torch.compile(per_image, backend='aot_eager')(parameters, x), per_image(parameters, x)
    for name in parameters: assert_close(ours[name], eager[name], rtol=1e-4, atol=1e-4)


LENT = {'number': torch.tensor(0.25), 'per channel': torch.tensor([0.2, 0.4, 0.6])}


@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
def test_functional_call_with_a_state_dict(unit):
    "As `torch.func` documents it: what the dictionary says is used, the module and the dictionary stay as they were."
    model, x = small(unit()), images()
    state, before = model.state_dict(), model(x).detach()
    handed = dict(state)
    assert torch.equal(torch.func.functional_call(model, handed, x), before)
    assert all(handed[name] is state[name] for name in state)
    doubled = {name: 2 * value for name, value in state.items()}
    other = small(unit())
    other.load_state_dict(doubled)
    assert torch.equal(torch.func.functional_call(model, doubled, x), other(x))
    assert torch.equal(model(x), before) and isinstance(model[1]._shift, float) == (not unit().shift.dim())


@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
@pytest.mark.parametrize('lent', LENT.values(), ids=LENT)
@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_functional_call_with_either_form_of_a_shift(unit, lent, grad, dtype):
    module, x = unit(), images().to(dtype).requires_grad_(grad)
    before = copy.deepcopy(module)
    out = torch.func.functional_call(module, {'shift': lent}, x)
    assert torch.equal(out, WIBReLU(lent)(x))
    if grad:
        gradients = [torch.autograd.grad(each.float().sum(), x)[0] for each in (out, WIBReLU(lent)(x))]
        assert torch.equal(*gradients)
    assert torch.equal(module.shift, before.shift) and repr(module) == repr(before) and module._buffers.keys() == before._buffers.keys()
    assert module.state_dict().keys() == {'shift'} and torch.equal(module.double().state_dict()['shift'], before.double().shift)


@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
def test_transforms_of_a_whole_state_dict(unit):
    "Gradients reach the shift, an ensemble has shifts of its own, and both under the compiler."
    model, x = small(unit()), images()
    state = {name: value.detach() for name, value in model.state_dict().items()}
    loss = lambda state: torch.func.functional_call(model, state, x).square().mean()
    gradients = torch.func.grad(loss)(state)
    step = torch.zeros_like(state['1.shift']) + 1e-3
    moved = [loss({**state, '1.shift': state['1.shift'] + sign * step}) for sign in (-1, 1)]
    assert_close((moved[1] - moved[0]) / 2e-3, gradients['1.shift'].sum().to(x.dtype), rtol=1e-2, atol=1e-4)
    ensemble = {name: torch.stack([value, 2 * value]) for name, value in state.items()}
    alone = torch.stack([loss({name: value[i] for name, value in ensemble.items()}) for i in range(2)])
    assert_close(torch.vmap(loss)(ensemble), alone)
    compiled = torch.compile(torch.func.grad(loss), backend='aot_eager')(state)
    for name in state: assert_close(compiled[name], gradients[name])
    assert isinstance(model[1]._shift, float) == (not unit().shift.dim())
    assert torch.equal(model.state_dict()['1.shift'], state['1.shift'])


@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
@pytest.mark.parametrize('mode', ['real', 'fake'])
def test_a_functional_call_can_be_traced(unit, mode):
    from torch.fx.experimental.proxy_tensor import make_fx
    model, x = small(unit()), images()
    call = lambda state, x: torch.func.functional_call(model, state, x)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    graph = make_fx(call, tracing_mode=mode)(state, x)
    other = {name: 2 * value for name, value in state.items()}
    assert_close(graph(other, x), call(other, x))


@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
def test_compiled_functional_call_without_a_graph_break(unit):
    model, x = small(unit()), images()
    call = lambda state, x: torch.func.functional_call(model, state, x)
    compiled = torch.compile(call, fullgraph=True, backend='aot_eager')
    for factor in (1, 2):
        state = {name: factor * value for name, value in model.state_dict().items()}
        assert_close(compiled(state, x), call(state, x))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_number_survives_its_file(dtype):
    buffer, saved = io.BytesIO(), small(WIBReLU(EQ7_SHIFT)).to(dtype)
    torch.save(saved.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    loaded = small(WIBReLU(0.0)).to(dtype)
    loaded.load_state_dict(state)
    assert state['0.weight'].dtype == dtype
    kept = torch.float64 if dtype == torch.float64 else torch.float32  # the GPUs of Apple have no float64
    assert state['1.shift'].dtype == kept
    assert torch.equal(loaded(images().to(dtype)), saved(images().to(dtype)))
    if dtype == torch.float64: assert loaded[1].shift.item() == EQ7_SHIFT
    assert saved.float().state_dict()['1.shift'].dtype == torch.float32


def test_a_file_with_a_number_in_float32_loads():
    unit = WIBReLU(0.0)
    unit.load_state_dict({'shift': torch.tensor(0.4, dtype=torch.float32)})
    assert unit.shift.dtype == torch.float64 and unit.shift.item() == torch.tensor(0.4).item()
    assert torch.equal(unit(images()), WIBReLU(0.4)(images()))


def test_assigning_a_shift():
    unit, x = WIBReLU(), images()
    unit.shift = 0.25
    assert unit.shift.item() == 0.25 and torch.equal(unit(x), wib_relu(x, 0.25))
    with pytest.raises(ValueError, match='shift=nan'): unit.shift = math.nan
    assert unit.shift.item() == 0.25
    unit.shift = LENT['per channel']
    assert unit.shift is LENT['per channel'] and unit.double().shift.dtype == torch.float64
    assert torch.equal(unit(x.double())[0, :, 0, 0], WIBReLU(LENT['per channel'].double())(x.double())[0, :, 0, 0])
    unit.shift = 1
    assert unit.shift.item() == 1 and not list(unit.buffers())
    unit.shift *= 0.5  # in place, then assigned
    assert unit.shift.item() == 0.5 and torch.equal(unit(x), wib_relu(x, 0.5)) and unit.state_dict()['shift'] == 0.5


@pytest.mark.parametrize('unit', UNITS.values(), ids=UNITS)
def test_a_saved_state_does_not_follow_the_module(unit):
    module = unit()
    saved = {name: value.clone() for name, value in module.state_dict().items()}
    module.state_dict()['shift'].add_(0 if module.shift.dim() else 1)  # as running averages of a state do
    assert torch.equal(module.state_dict()['shift'], saved['shift']) and torch.equal(module(images()), unit()(images()))


def test_an_empty_batch_leaves_the_running_mean_alone():
    unit = WIBReLUBatch()
    unit(images())
    before = unit.running_mean.clone()
    empty = torch.empty(0, 3, 8, 8, requires_grad=True)
    unit(empty).sum().backward()
    assert torch.equal(unit.running_mean, before) and empty.grad.shape == empty.shape
    assert torch.isfinite(unit.eval()(images())).all()


@pytest.mark.parametrize('name', ['wib_relu', 'wib_relu_batch', 'wib_relu_code'])
def test_fx_traces_every_reading_in_training(name):
    model, x = small(make_activation(name)), images()
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    for _ in range(2): assert torch.equal(traced(x), model(x))
    for ours, theirs in zip(traced.buffers(), model.buffers(), strict=True): assert torch.equal(ours, theirs)
