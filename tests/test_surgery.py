"""Surgery on networks that are not ours: what is swapped, what is named, calibration, exact folding."""
import copy
import doctest
import io
import math
import pickle
import types
import warnings
from collections import UserDict
from functools import partial, wraps

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, measure
from torch import nn
from torch.nn.functional import relu as rectify
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from wib_nbdev import surgery
from wib_nbdev.activations import WIBReLU, ZeroMean
from wib_nbdev.models import plain_cnn
from wib_nbdev.recorder import ActivationRecorder
from wib_nbdev.surgery import FoldedWIBReLU, calibrate, diagnose, fold_shift, swap_activations


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uncentred(model):
    "The same model with all shifts 0: it must be the ReLU network."
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, WIBReLU): module.shift = torch.tensor(0.0)
    return model


def snapshot(model):
    "What an operation might leave behind: state, modes, classes, attributes, hooks."
    def facts(part): return type(part), part.training, {key: len(hooks) for key, hooks in vars(part).items()
                                                        if key.endswith('hooks')}, set(vars(part))
    return dict(state={key: value.clone() for key, value in model.state_dict().items()},
                modules={name: facts(part) for name, part in model.named_modules()},
                gradients=[(p.requires_grad, p.grad) for p in model.parameters()],
                random=torch.get_rng_state().tolist())


def assert_same(model, before, but='no such key'):
    after = snapshot(model)
    for key, value in before['state'].items():
        assert key.endswith(but) or torch.equal(value, after['state'][key])
    for name in ('modules', 'gradients', 'random'): assert before[name] == after[name]


class Net(nn.Module):
    "Layers for the forwards below."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(5, 5), nn.Linear(5, 5), nn.ReLU()
        self.acts, self.by_name = nn.ModuleList([nn.ReLU(), nn.ReLU()]), nn.ModuleDict(dict(one=nn.ReLU()))
        self.block = nn.Sequential(nn.Linear(5, 5), nn.ReLU(inplace=True))


# Swapping: a forward is Python, and Python it stays

class Spelled(Net):
    units = 5 + 10
    def forward(self, x):
        y = torch.relu(self.a(x)) + nnf.relu(input=x) + x.relu() + rectify(x)
        y = y + nn.functional.relu(x.clone(), True)
        y = y + torch.ops.aten.relu(x) + torch.ops.aten.relu_.default(x.clone())
        return y + torch.relu_(x.clone()) + nnf.relu_(x.clone()) + (  # over lines
            x.clone().relu_()
        )


class Shared(Net):
    "One module called at several places."
    units = 5 + 3
    def forward(self, x):
        x = self.act(self.b(self.act(self.a(x))))
        x = self.acts[0](x - 1) + self.acts[0](1 - x) - self.acts[1](x)
        x = self.by_name['one'](x) - self.by_name['one'](input=-x)
        return self.block[1](self.block(x).clone() - 0.2)


class InPlace(Net):
    "Whoever reads a name after a call in place reads what the call wrote."
    units = 5 + 4
    def forward(self, x):
        x = 2 * x
        nnf.relu_(x)
        y = self.a(x)
        z = nnf.relu(y, inplace=True) + y
        self.block[1](z)
        z = sum(nnf.relu_(part) for part in (z - 0.3, 0.3 - z)) - 0.1
        return z.relu_() * x + y


class Flow(Net):
    "Branches on data, loops, contexts, comprehensions, lambdas, functions inside, several ways out."
    units = 5 + 7
    def forward(self, x, scale=1, *more, shift=None):
        if shift is not None: x = nnf.relu(x + shift)
        while x.abs().max() > 4: x = x / 2
        with torch.no_grad(): frozen = nnf.relu(self.a(x))
        try: parts = [nnf.relu(part) for part in (x, frozen, *more)]
        finally: x = x * scale
        first = (lambda y: torch.relu(y - 1))(x)
        def inner(y): return self.b(y).relu()
        if x.sum() > 1e6: return inner(x)
        match len(parts):
            case 2: x = nnf.relu(x - 1)
            case _: x = nnf.relu(x + 1)
        return sum(parts) + inner(first) + (nnf.dropout(x, 0.5) if self.training else x)


class Methods(Net):
    "Code in other methods, private ones too, inherited, and around super()."
    units = 5 + 2
    def encode(self, x): return nnf.relu(self.a(x))
    def __decode(self, z): return self.b(z).relu()
    def forward(self, x): return self.finish(self.__decode(self.encode(x)))
    def finish(self, x): return x


class Unrolls(nn.Module):
    units = 2
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(5, 5, 2, nonlinearity='relu')
    def forward(self, x): return self.rnn(x)[0]


class Inherited(Methods):
    units = 5 + 3
    def finish(self, x): return super().finish(torch.relu(x - 0.1))


def twice(method):
    @wraps(method)
    def run(self, *args, **kwargs): return method(self, *args, **kwargs) * 2
    return run


class Decorated(Net):
    units = 5 + 2
    @twice
    def half(self, x): return nnf.relu(x)
    @torch.no_grad()
    @twice
    def forward(self, x, *, bias: float = 0.5) -> torch.Tensor: return self.half(self.a(x).relu() - bias)


def closing_over(function, layer):
    class Closure(Net):
        units = 5 + 2
        def forward(self, x): return function(self.a(x)) + layer(torch.relu(x))
    return Closure


class Negate(torch.autograd.Function):
    "Its gradient is not that of its forward."
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, gradient): return -gradient


class Autograd(Net):
    "What surrounds tensors: a backward of its own, a checkpoint, a dtype that follows the parameters."
    units = 5 + 3
    def forward(self, x):
        x = x.to(next(self.parameters()).dtype)
        x = nnf.relu(Negate.apply(self.a(x)))
        return checkpoint(lambda y: nnf.relu(self.b(y)), nnf.relu(x - 0.1), use_reentrant=False)


class Attributes(Net):
    "Functions kept as attributes, of the module or of its class."
    units = 5 + 3
    shared = staticmethod(torch.relu)
    def __init__(self):
        super().__init__()
        self.function = nnf.relu
    def forward(self, x): return self.shared(self.function(self.function(self.a(x)) - 0.3) - 0.2)


FORWARDS = [Spelled, Shared, InPlace, Flow, Methods, Inherited, Decorated, Autograd, Attributes,
            closing_over(nnf.relu, nn.Identity())]


@pytest.mark.parametrize('kind', FORWARDS, ids=lambda kind: kind.__name__)
def test_a_swapped_network_with_no_shift_is_the_network_that_it_was(kind):
    torch.manual_seed(0)
    model, x = nn.Sequential(kind()), randn(7, 5)
    expected = copy.deepcopy(model)
    report = swap_activations(model)
    assert report['swapped'].all() and len(report) == kind.units
    assert sum(isinstance(module, WIBReLU) for module in model.modules()) == kind.units
    assert isinstance(model[0], kind) and type(model[0]).__name__ == kind.__name__
    model = uncentred(model)
    for change in (nn.Module.train, nn.Module.eval, nn.Module.double):
        outputs = []
        for each in (change(model), change(expected)):
            each.zero_grad()
            torch.manual_seed(1)
            outputs.append(each(x.clone().to(each[0].a.weight)))
            if outputs[-1].requires_grad: outputs[-1].square().sum().backward()
        assert torch.equal(*outputs)
        for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            assert (ours.grad is None and theirs.grad is None) or torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize('kind', FORWARDS, ids=lambda kind: kind.__name__)
def test_nothing_is_left_and_each_unit_is_centred(kind):
    torch.manual_seed(0)
    model, x = nn.Sequential(kind()), randn(70, 5)
    swap_activations(model)
    report = calibrate(model, x)
    frame = diagnose(model, x).set_index('layer')
    assert report['shift'].notna().all() and not frame['type'].isin(['relu', 'ReLU']).any()
    called = frame[frame['type'] == 'WIBReLU']
    assert (called['mean'].abs() <= 2e-4 * called['std'] + 1e-7).all()
    assert (report.loc[report['calls'] == 0, 'note'] == 'was not called').all()


class Branches(nn.Module):
    "Calls of which one is run share a unit, be it in a branch for training or after a return."
    def __init__(self):
        super().__init__()
        self.a, self.act, self.fused = nn.Linear(5, 5), nn.ReLU(), False
    def forward(self, x):
        if self.fused: return self.act(self.a(x))
        x = nnf.relu(x - 1) if self.training else torch.relu(x)
        x = self.a(self.act(self.a(x)))
        if len(x) > 3: x = self.act(x - 1)
        else:
            x = self.act(x)
        return x


def test_calls_of_which_only_one_is_run_share_a_unit():
    model, x = Branches(), randn(7, 5)
    report = swap_activations(model)
    assert report['name'].tolist() == ['act', 'relu_1', 'act_2']
    assert (calibrate(model, x)['calls'] == 1).all()
    model.fused = True
    assert diagnose(model, x)['layer'].tolist() == ['act', '(output)']


def test_a_module_at_several_places_becomes_a_unit_at_each():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Sequential(nn.Linear(4, 4), act), act)
    assert swap_activations(model)['name'].tolist() == ['1', '3', '2.1']
    assert len({model[1], model[2][1], model[3]}) == 3 and isinstance(model[2][1], WIBReLU)


class Renames(nn.Module):
    def forward(self, x): return rectify(x)


def test_a_function_by_another_name_is_swapped_in_a_class_without_children():
    model = nn.Sequential(nn.Linear(5, 5), Renames())
    assert swap_activations(model)['name'].tolist() == ['1.relu_1']
    assert diagnose(model, randn(7, 5))['type'].tolist() == ['WIBReLU', 'Sequential']


def test_methods_agree_after_the_swap():
    model, x = Methods(), randn(7, 5)
    swap_activations(model)
    assert torch.equal(model(x), model._Methods__decode(model.encode(x)))


def pickled(model): return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize('duplicate', [copy.deepcopy, copy.copy, pickled])
@pytest.mark.parametrize('kind', [Shared, InPlace, Inherited, Decorated, Unrolls],
                         ids=lambda kind: kind.__name__)
def test_a_swapped_network_is_copied_and_saved(kind, duplicate):
    model, x = nn.Sequential(kind()), randn(7, 5)
    swap_activations(model)
    calibrate(model, x)
    twin = duplicate(duplicate(model))
    assert torch.equal(twin(x), model(x)) and isinstance(twin[0], kind)
    fresh, file = nn.Sequential(kind()), io.BytesIO()
    swap_activations(fresh)
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x), model(x))
    swap_activations(twin, WIBReLU, nn.ReLU)
    assert torch.equal(twin(x), uncentred(model)(x)) and torch.equal(copy.deepcopy(twin)(x), twin(x))
    assert len(swap_activations(twin)) == kind.units


def test_a_changed_source_is_an_error_when_unpickled():
    model = Methods()
    swap_activations(model)
    kind, sites = type(model)._swapped_from
    blank = model.__reduce_ex__(2)[0]
    with pytest.raises(ValueError, match=r'the source of encode has changed since F\.relu\(y\) was swapped'):
        blank(kind, (sites[0]._replace(text='F.relu(y)'), *sites[1:]))


@pytest.mark.parametrize('kind', [Spelled, Shared, InPlace, Inherited], ids=lambda kind: kind.__name__)
def test_compile_and_export_give_the_same_and_a_script_is_refused(kind):
    model, x = nn.Sequential(kind()), randn(7, 5)
    swap_activations(model)
    calibrate(model, x)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    for twin in (compiled, torch.export.export(model, (x,)).module()):
        torch.testing.assert_close(twin(x.clone()), model(x.clone()))
    swap_activations(model, WIBReLU, nn.SiLU)
    with warnings.catch_warnings(), pytest.raises(OSError, match="Can't get source"):
        warnings.simplefilter('ignore')
        torch.jit.script(model)  # whose source would be that of before


def flat(result): return [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize('old', [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize('options', [
    {}, dict(num_layers=2, bidirectional=True), dict(num_layers=2, bias=False),
    dict(bidirectional=True, batch_first=True)], ids=str)
def test_an_unrolled_rnn_is_the_same_function(options, old):
    "Of a batch, one sequence, and packed sequences of several lengths; with and without a hidden state."
    torch.manual_seed(0)
    plain = nn.RNN(5, 4, nonlinearity=surgery._NAMES[old], **options)
    model = copy.deepcopy(plain)
    report = swap_activations(model, old, old)
    width = options.get('num_layers', 1) * (1 + options.get('bidirectional', False))
    assert len(report) == width
    n = 7 if 'batch_first' in options else 3
    packed = pack_sequence([randn(length, 5) for length in (3, 6, 2, 6)], enforce_sorted=False)
    for x, shape in ((randn(7, 3, 5), (width, n, 4)), (randn(7, 5), (width, 4)), (packed, (width, 4, 4))):
        for args in ([x], [x, randn(*shape)]):
            for got, expected in zip(flat(model(*args)), flat(plain(*args)), strict=True):
                torch.testing.assert_close(got, expected)
    with pytest.raises(RuntimeError, match='Expected hidden size'): model(randn(7, 3, 5), randn(9, 3, 4))
    assert not swap_activations(model, old, nn.SiLU)['name'].duplicated().any()  # its units, once each


def test_an_rnn_whose_weight_is_computed_is_unrolled_too():
    "Its parameters have other names."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the older way is deprecated
        model = nn.utils.weight_norm(nn.RNN(5, 4, nonlinearity='relu'), 'weight_ih_l0')
    x, report = randn(7, 3, 5), swap_activations(model, new=nn.ReLU)
    assert report['name'].tolist() == ['act_l0'] and 'weight_ih_l0_g' in dict(model.named_parameters())
    hidden, expected = torch.zeros(3, 4), []
    for step in x:
        own = nnf.linear(step, model.weight_ih_l0, model.bias_ih_l0)
        hidden = (own + nnf.linear(hidden, model.weight_hh_l0, model.bias_hh_l0)).relu()
        expected.append(hidden)
    torch.testing.assert_close(model(x)[0], torch.stack(expected))


def test_a_cell_is_unrolled_and_its_parameters_stay():
    plain = nn.RNNCell(5, 4, nonlinearity='relu')
    model = copy.deepcopy(plain)
    before = [*model.parameters()]
    swap_activations(model, new=nn.ReLU)
    assert all(one is other for one, other in zip(model.parameters(), before, strict=True))
    for args in ([randn(3, 5)], [randn(3, 5), randn(3, 4)], [randn(5)], [randn(5), randn(4)]):
        torch.testing.assert_close(model(*args), plain(*args))


# What cannot be swapped is a row: when it is swapped, or when a batch runs through

def helper(x): return nnf.relu(x) - 1


with_no_source = {}
exec('''
from torch import nn
from torch.nn import functional as F
class NoSource(nn.Module):
    def forward(self, x): return F.relu(x)
''', with_no_source)


class Left(nn.Module):
    "A forward, and an ordinary ReLU beside it."
    def __init__(self):
        super().__init__()
        self.a, self.hidden, self.act = nn.Linear(5, 5), [nn.ReLU()], nn.ReLU()
    def forward(self, x): return self.act(self.run(self.a(x)))


class Helps(Left):
    def run(self, x): return helper(x)


class Makes(Left):
    def run(self, x): return nn.ReLU()(x)


class Hides(Left):
    def run(self, x): return self.hidden[0](x)


class HandsOn(Left):
    def run(self, x): return torch.stack(list(map(nnf.relu, x)))


class Property(Left):
    @property
    def weight(self): return nnf.relu(self.a.weight)
    def run(self, x): return x @ self.weight


class Before(Left):
    def run(self, x): return torch.relu(x) + 1


class Parent(Before):
    def run(self, x): return super().run(x)


class Static(Left):
    @staticmethod
    def run(x): return x.relu()


class Knows(Left):
    "Whether a call is in place is known only when it runs."
    def run(self, x): return nnf.relu(x, inplace=x.sum() > 1e9)


class Mode(Left):
    "In place in one mode only."
    def run(self, x): return nnf.relu(x, inplace=self.training) + x


class Part(Left):
    "In place on a part of a tensor, whose result nobody takes."
    def run(self, x):
        nnf.relu_(x[:, :2])
        return x


class Kept(Left):
    def run(self, x):
        self.kept = x + 1
        nnf.relu(self.kept, inplace=True)
        return self.kept


class OverChildren(Left):
    def each(self, x):
        for child in list(self.children())[:1]: x = child(x)
        return x
    def run(self, x): return nnf.relu(self.each(x))


class Longer(nn.Sequential):
    def forward(self, x): return super().forward(nnf.relu(x))


class Recurrent(Left):
    def __init__(self):
        super().__init__()
        self.rnn = OwnRNN(5, 5, nonlinearity='relu')
    def run(self, x): return self.rnn(x)[0]


class OwnRNN(nn.RNN): pass


class Special(nn.ReLU): pass


tools = types.ModuleType('tools')
with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # TorchScript is deprecated
    @torch.jit.script
    def scripted_relu(x): return nnf.relu(x)
    @torch.jit.script
    def scripted_double(x): return 2 * x
tools.rectify = scripted_relu


class Scripted(Left):
    def run(self, x): return scripted_relu(x) + tools.rectify(scripted_double(x))


class Wraps(Left):
    def run(self, x): return self.inner(x)


def wrapped(module):
    "A module in a place where it is called."
    model = Wraps()
    model.inner = module
    return model


def replaced():
    model = Methods()
    old = model.forward
    model.forward = lambda x: old(x)
    model.encode = model.encode
    return wrapped(model)


def hooked():
    module = nn.ReLU()
    module.register_forward_hook(lambda *_: None)
    return wrapped(module)


LEFT = dict(
    helper=(Helps, 'is called outside of a module', 'return nnf.relu(x) - 1'),
    made=(Makes, 'is no child of the model: made in a forward, or kept in a list', 'return nn.ReLU()(x)'),
    hidden=(Hides, 'is no child of the model: made in a forward, or kept in a list', 'self.hidden[0](x)'),
    reference=(HandsOn, 'is not rewritten', 'torch.stack(list(map(nnf.relu, x)))'),
    property=(Property, 'is not rewritten', 'return nnf.relu(self.a.weight)'),
    parent=(Parent, 'is not rewritten', 'return torch.relu(x) + 1'),
    static=(Static, 'is called outside of a module', 'return x.relu()'),
    unknown=(Knows, 'shows if it is in place', 'Knows.run'),
    mode=(Mode, 'shows if it is in place', 'Mode.run'),
    part=(Part, 'changes a part in place: write x[:, :2] = ...', 'Part.run'),
    attribute=(Kept, 'changes a part in place: write self.kept = ...', 'Kept.run'),
    children=(OverChildren, 'runs over its children', 'nnf.relu(self.each(x))'),
    container=(lambda: wrapped(Longer(nn.Linear(5, 5))), 'runs over its children', 'nnf.relu(x)'),
    source=(lambda: wrapped(with_no_source['NoSource']()), 'forward has no source', 'by exec: NoSource'),
    fused=(Recurrent, 'is a fused kernel', ''),
    hooks=(hooked, 'carries hooks', ''),
    subclass=(lambda: wrapped(Special()), 'is a subclass of ReLU', ''),
    replaced=(replaced, 'its encode was replaced', 'nnf.relu(self.a(x))'))


@pytest.mark.parametrize('make, reason, source', LEFT.values(), ids=LEFT)
def test_what_is_left_is_a_row_with_a_reason_and_a_line(make, reason, source):
    torch.manual_seed(0)
    model, x = make(), randn(7, 5)
    swapped = swap_activations(model)
    rows = pd.concat([swapped[~swapped['swapped']], calibrate(model, x).query('shift.isna()')])
    assert any(reason in row.note and source in row.source for row in rows.itertuples())
    frame = diagnose(model, x)
    left = frame[frame['type'].isin(['relu', 'rnn_relu', 'ReLU', 'Special'])]
    assert len(left) and (left['advice'] != '').all() and (left['mean'] > 0).all()
    assert (left['inactive'].isna() == (left['type'] == 'rnn_relu')).all()  # a fused kernel hides them
    assert swapped['swapped'].any()


def test_a_relu_in_torchscript_is_a_row_of_the_swap():
    "Called by its own name, or as an attribute of a Python module."
    report = swap_activations(Scripted())
    left = report[~report['swapped']]
    assert sorted(left['old']) == ['scripted_relu', 'tools.rectify'] and len(report) == 3
    assert left['note'].str.contains('is TorchScript').all()
    assert left['source'].str.contains(r', line \d+: (?:scripted_relu|tools\.rectify)\(').all()


def test_where_nothing_can_be_swapped_the_error_says_why_and_the_model_stays():
    for model, reason in ((Longer(nn.Linear(5, 5)), 'the model: its class runs over its children'),
                          (nn.Sequential(Special()), '0: is a subclass of ReLU'), (nn.ReLU(), 'it has none')):
        before = snapshot(model)
        with pytest.raises(ValueError, match=f'no ReLU inside of it can be swapped; {reason}'):
            swap_activations(model)
        assert_same(model, before)
    with pytest.raises(ValueError, match="did you mean 'wib_relu'"): swap_activations(Net(), new='wibrelu')
    with pytest.raises(TypeError, match='new=ReLU'): swap_activations(Net(), new=nn.ReLU())
    made, model = iter([nn.SiLU()]), Net()
    before = snapshot(model)
    with pytest.raises(StopIteration): swap_activations(model, new=lambda: next(made))
    made, one = iter([nn.SiLU(), *range(9)]), nn.SiLU()
    for new in (lambda: 3, lambda: next(made), lambda: one):
        with pytest.raises(TypeError, match='or return a new module'): swap_activations(model, new=new)
    for old in ('relu', nn.ReLU(), int):
        with pytest.raises(TypeError, match=r'old=.*must be a class'): swap_activations(model, old)
    assert_same(model, before)


@pytest.mark.parametrize('function', [swap_activations, calibrate, diagnose, fold_shift])
def test_what_is_no_model_or_compiled_is_refused(function):
    more = () if function is swap_activations else (torch.ones(2, 5),)
    for wrong in (nn.Linear, torch.ones(2), None):
        with pytest.raises(TypeError, match=r'must be an nn\.Module'): function(wrong, *more)
    with pytest.raises(ValueError, match='is compiled or scripted'): function(torch.compile(Net()), *more)


def test_modes_devices_dtypes_and_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU()).double()
    model[1].eval()
    notes = swap_activations(model, new='prelu')['note']
    assert [model[1].training, model[3].training] == [False, True] and model[1].weight.dtype == torch.float64
    assert notes[0] == 'was in place; give its parameters to the optimiser'
    on_meta = nn.Sequential(nn.Linear(4, 4, device='meta'), nn.ReLU())
    swap_activations(on_meta)
    assert on_meta[1].shift.device.type == 'meta'


@pytest.mark.parametrize('old, call', [
    (nn.Sigmoid, torch.sigmoid), (nn.Softplus, nnf.softplus), (nn.GELU, nnf.gelu),
    (nn.Tanh, torch.Tensor.tanh), (nn.LeakyReLU, nnf.leaky_relu)])
def test_other_activations(old, call):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = old()
        def forward(self, x): return self.act(x) * call(x) * (x.tanh() if old is nn.Tanh else 1)
    model, x = Both(), randn(3, 4)
    units = swap_activations(model, old, lambda: ZeroMean(nnf.softplus))
    assert len(units) == 2 + (old is nn.Tanh)
    assert diagnose(model, x)['type'].tolist().count('ZeroMean') == units['swapped'].sum()


@pytest.mark.parametrize('form', ['function', 'module'])
def test_the_transformer_of_torch_does_not_fall_back_to_what_it_had(form):
    torch.manual_seed(0)
    activation = 'relu' if form == 'function' else nn.ReLU()
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation, batch_first=True), 2)
    x, mask = randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    mask[:, 4] = True
    assert len(swap_activations(model)) == 2
    for layer in model.layers: layer.activation.shift.fill_(5.0)
    for arguments in ({}, dict(src_key_padding_mask=mask)):
        expected = model.train()(x, **arguments)
        with torch.no_grad(): torch.testing.assert_close(model.eval()(x, **arguments)[:, :4], expected[:, :4])


class Reads(nn.Module):
    "Hands a tensor to a block that was in place, and reads it again."
    def __init__(self, view):
        super().__init__()
        self.a, self.view = nn.Linear(5, 5), view
        self.block = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 5))
    def forward(self, x):
        x = self.a(x)
        return self.block(self.view(x)) + x


def test_a_tensor_that_was_written_over_out_of_sight_is_noted():
    for view, noted in ((lambda x: x, True), (lambda x: x.view(-1, 5), True), (torch.clone, False)):
        model, x = Reads(view), randn(7, 5)
        swap_activations(model)
        for notes in (calibrate(model, x)['note'], diagnose(model, x)['advice']):
            assert notes.str.contains('its input is read again, now without').any() == noted


# Calibrating

@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_one_pass_gives_each_unit_a_mean_of_zero(per_channel, dtype):
    model, x = plain_cnn(3, activation='wib_relu').to(dtype), randn(32, 3, 32, 32).to(dtype)
    passes, outputs = [], []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    report = calibrate(model, x, per_channel=per_channel)
    handle.remove()
    assert len(passes) == 1 and report['calls'].tolist() == [1] * 4 and (report['note'] == '').all()
    for module in model.modules():
        if not isinstance(module, WIBReLU): continue
        module.register_forward_hook(lambda module, args, out: outputs.append(out.double()))
    model(x)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}[dtype]
    for out in outputs: assert (out.mean((0, 2, 3)) if per_channel else out.mean()).abs().max() < tolerance


def test_it_is_what_a_pass_for_each_layer_finds():
    def set_shift(unit, args): unit.shift.copy_(nnf.relu(args[0]).mean())
    torch.manual_seed(3)
    model, x = plain_cnn(1, activation='wib_relu'), randn(16, 1, 28, 28)
    by_hand = copy.deepcopy(model)
    for unit in [module for module in by_hand.modules() if isinstance(module, WIBReLU)]:
        handle = unit.register_forward_pre_hook(set_shift)
        with torch.no_grad(): by_hand(x)
        handle.remove()
    calibrate(model, x)
    for ours, theirs in zip(model.buffers(), by_hand.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


class Lively(nn.Module):
    "All that a look might disturb: norms, dropout, random numbers, state in a buffer and in attributes."
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norms = nn.Sequential(nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True))
        self.dropout, self.frozen = nn.Dropout(0.3), nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.register_buffer('seen', torch.zeros(()))
        self.count = 0
    def forward(self, x):
        self.seen, self.count = self.seen + len(x), self.count + 1
        self.last = x = nnf.relu(self.norms(self.conv(x)))
        return self.frozen(self.dropout(x)) + torch.rand(1)


@pytest.mark.parametrize('training', [True, False])
def test_a_look_disturbs_nothing(training):
    model, x = Lively().train(training), randn(6, 3, 8, 8)
    model.norms[0].eval()
    swap_activations(model)
    before = snapshot(model)
    calibrate(model, x, per_channel=True)
    shifts = calibrate(model, x)['shift'].tolist()
    torch.manual_seed(7)
    before['random'] = torch.get_rng_state().tolist()
    assert calibrate(model, x)['shift'].tolist() == shifts and model.count == 0
    diagnose(model, x)
    assert_same(model, before, but='shift')
    fold_shift(model, x)
    assert torch.get_rng_state().tolist() == before['random'] and model.seen == 0


def test_dropout_stays_out():
    model, x = nn.Sequential(nn.Dropout(), nn.Linear(5, 50), nn.ReLU()), randn(200, 5)
    swap_activations(model)
    assert calibrate(model.train(), x)['shift'][0] == calibrate(model.eval(), x)['shift'][0]


class Cell(nn.Module):
    "A recurrent network of a cell that calls its activation at each step."
    def __init__(self, activation):
        super().__init__()
        self.cell, self.act = nn.Linear(8 + 16, 16), activation
    def forward(self, x):
        state = x.new_zeros(len(x), 16)
        for step in x.unbind(1): state = self.act(self.cell(torch.cat([step, state], 1)))
        return state


@pytest.mark.parametrize('make', [WIBReLU, partial(ZeroMean, nnf.silu),
                                  lambda: ZeroMean(nn.ELU(), unit_variance=True)])
def test_a_unit_called_at_each_step_gets_one_shift_that_centres_all(make):
    torch.manual_seed(0)
    model, x = Cell(nn.ReLU()), randn(100, 28, 8)
    assert len(swap_activations(model, new=make)) == 1
    report, outputs = calibrate(model, x), []
    assert report['calls'].tolist() == [28] and report['note'].tolist() == ['called 28 times, one shift']
    model.act.register_forward_hook(lambda m, args, out: outputs.append(out))
    model(x)
    assert abs(torch.stack(outputs).mean()) < 1e-3 * torch.stack(outputs).std()
    assert 'called 28 times, one shift' in diagnose(model, x)['advice'][0]


def test_batches_come_as_a_loader_an_iterator_a_tuple_or_a_mapping():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU()), randn(64, 5)
    swap_activations(model)
    whole = calibrate(model, x)['shift']
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(64)), 16)
    for batches in (loader, torch.utils.data.DataLoader(x, 16)):
        np.testing.assert_allclose(calibrate(model, batches)['shift'], whole, rtol=1e-3)
    np.testing.assert_allclose(calibrate(model, iter(loader))['shift'], whole, rtol=0.1)  # can be read once
    for batch in ((x,), [x], dict(input=x), UserDict(input=x)):
        assert (calibrate(model, batch)['shift'] == whole).all()
    diagnose(model, loader)
    fold_shift(model, loader)


@pytest.mark.parametrize('function', [calibrate, diagnose, fold_shift])
def test_no_batch_is_an_error(function):
    with pytest.raises(ValueError, match='batch: yields no batch'): function(swapped_mlp(), iter([]))


def swapped_mlp(*norms):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 40), *norms, nn.ReLU(), nn.Linear(40, 40), nn.ReLU())
    swap_activations(model)
    return model


@pytest.mark.parametrize('norms', [(), (nn.BatchNorm1d(40),), (nn.LayerNorm(40),)],
                         ids=['plain', 'batch', 'layer'])
def test_gain_brings_mean_zero_and_variance_one(norms):
    model, x = swapped_mlp(*norms), randn(200, 5)
    report = calibrate(model, x, gain=True)
    units = diagnose(model, x).query('type == "WIBReLU"')
    np.testing.assert_allclose(units[['mean', 'std']], [[0, 1]] * 2, atol=2e-4)
    assert (report['layer'] != '').all() and (calibrate(model, x, gain=True)['scale'] == 1).all()


class Tied(nn.Module):
    "Layers that a gain must leave: shared, frozen, read twice, none."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.frozen, self.free = (nn.Linear(5, 5) for _ in range(4))
        self.b.weight = self.a.weight
        self.frozen.requires_grad_(False)
        self.acts = nn.ModuleList(WIBReLU() for _ in range(4))
    def forward(self, x):
        z = self.acts[0](self.a(x)) + self.acts[1](self.frozen(x))
        return self.acts[2](z) + self.acts[3](self.free(x) + self.b(x))


def test_gain_leaves_what_others_use_and_says_so():
    torch.manual_seed(0)
    model = Tied()
    weights = [p.clone() for p in model.parameters()]
    notes = calibrate(model, randn(50, 5), gain=True)['note'].tolist()
    none = 'not scaled: its input is not made by a layer that only it uses'
    frozen = 'not scaled: frozen is frozen, the unit is no ReLU, or its output is constant'
    assert notes == [none, frozen, none, none]
    assert all(map(torch.equal, weights, model.parameters()))


class Breaks(nn.Module):
    def forward(self, x): raise RuntimeError('halfway')


@pytest.mark.parametrize('options', [{}, dict(gain=True), dict(per_channel=True, gain=True)])
def test_an_error_halfway_leaves_the_model(options):
    for model, batch, message in ((nn.Sequential(swapped_mlp(), Breaks()), randn(9, 5), 'halfway'),
                                  (swapped_mlp(), randn(9, 5) / 0, '1 gets no values, or values')):
        before = snapshot(model)
        with pytest.raises((ValueError, RuntimeError), match=message): calibrate(model, batch, **options)
        assert_same(model, before)
    with pytest.raises(ValueError, match=r'gets \(2, 7, 40\), must get \(batch, channels'):
        calibrate(swapped_mlp(), randn(2, 7, 5), per_channel=True)
    with pytest.raises(ValueError, match='has no WIBReLU or ZeroMean'): calibrate(nn.ReLU(), randn(2, 5))


def test_what_is_done_in_inference_mode_can_be_trained():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    x = randn(2, 3, 9, 9)
    swap_activations(model)
    for look in (partial(calibrate, per_channel=True, gain=True), fold_shift):
        with torch.inference_mode(): look(model, x)
        model(x).sum().backward()
    assert all(p.grad is not None and not p.is_inference() for p in model.parameters())


# Folding

NORMS = [nn.Identity, nn.BatchNorm2d, partial(nn.GroupNorm, 2), partial(nn.InstanceNorm2d, affine=True)]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**20), st.booleans(), st.sampled_from(NORMS), st.integers(0, 2), st.booleans())
def test_folding_is_exact_at_borders_too(seed, per_channel, norm, padding, transposed):
    torch.manual_seed(seed)
    conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(3, 4, 3, padding=padding, bias=seed % 2 > 0)
    model = nn.Sequential(conv, norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).eval()
    x = torch.randn(2, 3, 7, 7)
    swap_activations(model)
    calibrate(model, x, per_channel=per_channel)
    with torch.no_grad():
        expected = model(x)
        assert fold_shift(model, x)['folded'].all()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


class Added(nn.Module):
    "What is added before a unit, and who else reads."
    def __init__(self, run):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(5, 5), nn.Linear(5, 5), nn.LayerNorm(5)
        self.act, self.pause, self.run = WIBReLU(0.4), nn.Identity(), run
    def forward(self, x): return self.run(self, x)


def added_in_place(self, x):
    z = self.b(x)
    z += x
    return self.act(z)


def keeps(self, x):
    z = self.a(x)
    return self.act(z) + z.T.mean()


def twice_in_a_sum(self, x):
    z = self.a(x)
    return self.act(z + z)


FOLDS = dict(
    sum=(lambda self, x: self.act(x + self.a(x)), 'a'), in_place=(added_in_place, 'b'),
    identity=(lambda self, x: self.act(self.pause(nnf.dropout(self.a(x), training=False))), 'a'),
    layer_norm=(lambda self, x: self.act(self.norm(x)), 'norm'),
    by_hand=(lambda self, x: self.act(nnf.linear(x, self.a.weight, self.a.bias)), 'a'),
    not_again=(lambda self, x: self.act(self.a(x) if x.sum() < 1e9 else x), 'a'),
    view=(keeps, 'its input is read elsewhere too, by __get__'),
    itself=(twice_in_a_sum, 'a term of its input is read elsewhere too'),
    alpha=(lambda self, x: self.act(torch.add(x, self.a(x), alpha=2)), 'comes from add with alpha'),
    scaled=(lambda self, x: self.act(2 * self.a(x)), 'its input comes from'),
    input=(lambda self, x: self.act(x), 'its input comes from no operation'),
    layer_twice=(lambda self, x: self.act(self.a(self.a(x))), 'is read elsewhere too'),
    bias_unused=(lambda self, x: self.act(nnf.linear(x, self.a.weight)), 'a has no free place for a bias'),
    bias_read=(lambda self, x: self.act(self.a(x)) + self.a.bias, 'a parameter of a is read elsewhere too'),
    unit_twice=(lambda self, x: self.act(self.a(self.act(x))), 'is called 2 times'),
    returned=(lambda self, x: (lambda z: (self.act(z), z))(self.a(x)), 'by the output of the model'))


@pytest.mark.parametrize('unit', [WIBReLU(torch.ones(8)), nn.BatchNorm1d(8), nn.BatchNorm1d(8).eval()])
def test_a_look_does_not_disturb_a_backward_pass_to_come(unit):
    model, x = nn.Sequential(nn.Linear(5, 8), unit, WIBReLU(), nn.Linear(8, 2)), randn(9, 5)
    def gradients(look):
        model.zero_grad()
        loss = model(x).square().sum()
        if look: diagnose(model, x)
        loss.backward()
        return [each.grad for each in model.parameters()]
    for one, other in zip(gradients(False), gradients(True), strict=True): assert torch.equal(one, other)


@pytest.mark.parametrize('run, expected', FOLDS.values(), ids=FOLDS)
def test_what_is_folded_and_what_is_not(run, expected):
    torch.manual_seed(0)
    model, x = Added(run), randn(9, 5)
    before, state = model(x), snapshot(model)
    row = fold_shift(model, x).iloc[0]
    assert row['layer'] == expected if row['folded'] else expected in row['note']
    if not row['folded']: assert_same(model, state)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize('place', ['pause', 'a', 'act'])
def test_hooks_are_readers(place):
    for hook in (lambda *_: None, lambda module, args, output: output - 0.3):
        model, x = Added(lambda self, x: self.act(self.pause(self.a(x)))), randn(9, 5)
        getattr(model, place).register_forward_hook(hook)
        before = model(x)
        note = fold_shift(model, x)['note'][0]
        assert 'hook' in note and torch.equal(model(x), before)


def test_what_differs_on_the_batch_is_put_back_alone():
    class Behind(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
            self.acts, self.secret = nn.ModuleList([WIBReLU(), WIBReLU()]), [self.a.bias.detach()]
        def forward(self, x): return self.acts[1](self.b(self.acts[0](self.a(x)))) + self.secret[0]
    model, x = Behind(), randn(9, 5)
    before = model(x)
    report = fold_shift(model, x)
    assert report['folded'].tolist() == [False, True]
    assert report['note'][0] == 'was undone: it changes the output on the batch'
    assert isinstance(model.acts[0], WIBReLU) and not isinstance(model.acts[0], FoldedWIBReLU)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize('end', [
    lambda y: y.masked_fill(y < 0, -math.inf), lambda y: y * math.nan, lambda y: y[:0],
    lambda y: y.argmax(1), lambda y: (y, y.argmax())],
    ids=['infinite', 'nan', 'empty', 'integers', 'one integer'])
def test_outputs_that_are_no_numbers_are_compared(end):
    class Ends(nn.Module):
        def forward(self, y): return end(y)
    model = nn.Sequential(swapped_mlp(), Ends())
    assert fold_shift(model, randn(9, 5))['folded'].all()


def test_autocast_does_not_matter():
    model, x = swapped_mlp().eval(), randn(50, 5)
    calibrate(model, x)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast('cpu', torch.bfloat16):
            cast = model(x)  # its weights are cached
            assert fold_shift(model, x)['folded'].all()
            torch.testing.assert_close(model(x), cast, rtol=0.1, atol=0.05)
        torch.testing.assert_close(model(x), expected)
    other = swapped_mlp().eval()
    with torch.autocast('cpu', torch.bfloat16):
        other(x)
        calibrate(other, x, gain=True)
        assert abs(other(x).float().std() - 1) < 0.05


@pytest.mark.parametrize('per_channel', [False, True])
def test_a_folded_unit_is_an_activation_like_any_other(per_channel):
    from torchvision.models.feature_extraction import create_feature_extractor
    x = randn(8, 3, 32, 32)
    model = plain_cnn(3, activation='wib_relu').eval()
    calibrate(model, x, per_channel=per_channel)
    with torch.no_grad():
        before, expected = diagnose(model, x), model(x)
        assert fold_shift(model, x)['folded'].all()
        after = diagnose(model, x)
        np.testing.assert_allclose(after['mean'], before['mean'], atol=1e-5)
        np.testing.assert_allclose(after['inactive'], before['inactive'], atol=1e-4)
        assert (fold_shift(model, x)['note'] == 'is folded already').all()
        exported = torch.export.export(model, (x,)).module()
        for twin in (torch.fx.symbolic_trace(model), copy.deepcopy(model), exported):
            torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-5)
        layers = create_feature_extractor(model, ['conv1.act'])(x)
        assert abs(layers['conv1.act'].mean() - before['mean'][0]) < 1e-5
    with ActivationRecorder(model.train()) as recorder: model(x)
    assert {'conv1.act', 'conv4.act'} <= set(recorder.to_frame()['layer'])
    with pytest.raises(ValueError, match='has no WIBReLU or ZeroMean'): calibrate(model, x)


def test_onnx_gives_the_same(tmp_path):
    onnxruntime, _ = pytest.importorskip('onnxruntime'), pytest.importorskip('onnxscript')
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()).eval()
    x = randn(2, 3, 9, 9)
    swap_activations(model)
    calibrate(model, x, per_channel=True)
    expected = model(x).detach()
    fold_shift(model, x)
    torch.onnx.export(model, (x,), tmp_path / 'model.onnx', dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    output = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-5)


# Diagnosis

def test_a_diagnosis_names_what_is_there_and_what_to_do():
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Hardswish()
    model, x = nn.Sequential(*layers), randn(4, 3, 9, 9)
    frame = diagnose(model, x)
    assert frame['type'].tolist() == ['ReLU', 'Hardswish', 'Sequential']
    assert frame['layer'].tolist() == ['1', '4', '(output)'] and 0.3 < frame['inactive'][0] < 0.7
    assert frame['advice'][0] == 'swap_activations(model, ReLU) puts a WIBReLU there'
    np.testing.assert_allclose(frame['second_moment'], frame['mean']**2 + frame['std']**2)
    swap_activations(model)
    model[1].shift.zero_()
    advice = diagnose(model, x)['advice'][0]
    assert advice.startswith('calibrate(model, batch) centres it; a batch norm follows the next layer')


def test_the_examples_of_the_docstrings():
    assert doctest.testmod(surgery) == (0, 8)


# Networks of others

@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_networks(name):
    pytest.importorskip(NETWORKS[name].package)
    row = measure(name)
    assert row['not swapped'] == '' and row['same function'] in (True, None)
    assert row['largest mean'] < 1e-3 and row['error'] < 1e-4 and not row['folded'].startswith('0 ')
