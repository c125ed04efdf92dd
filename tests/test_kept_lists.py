"""Lists of tensors that C++ keeps from step to step: which they are, what of their tensors may change, when they go."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import burnish
import pytest
import torch
from burnish import native, registry
from burnish.kept_lists import Kept, References
from optimizers import OPTIMIZERS, Calls
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SHAPES = ((7, 5), (300,), (), (0, 3), (4, 3, 2))


def parameters(shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]


def made(name: str, params: list[nn.Parameter], groups: int = 1, **more: Any) -> Any:
    cuts = [params] if groups == 1 else [params[:1], params[1:]]
    return OPTIMIZERS[name].ours([{"params": list(cut)} for cut in cuts], lr=0.1, **OPTIMIZERS[name].options, **more)


def push(params: list[nn.Parameter], step: int) -> None:
    draw = torch.Generator().manual_seed(100 + step)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)


def run(optimizer: Any, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        push(params, step)
        optimizer.step()


def lists(optimizer: Any) -> list[list[Tensor]]:
    """Those of the next step that C++ may keep."""
    return [one for batch, state in optimizer._known() for one in (batch.params, *state.values())]


def numbers(optimizer: Any) -> list[int]:
    return [kept.number for kept in optimizer._references._held.values()]


def is_there(number: int) -> bool:
    """Whether C++ keeps a list: what refuses the call is then not its number."""
    spec = registry.get("sgd_step")
    empty = [[] for argument in spec.overload()._schema.arguments if str(argument.type) == "List[Tensor]"]
    rest = (torch.ones(()), 0.0, 0.0, 0.0, False, False, 0.0, 0.0, None, None, None, None)
    with pytest.raises(RuntimeError) as error:
        spec.overload("kept")(*empty, *rest, [0, number] + [0] * (len(empty) - 2))
    assert ("expected the number of a list that is kept" in str(error.value)) != ("grads has" in str(error.value))
    return "grads has" in str(error.value)


class Functions(TorchFunctionMode):
    """The same as Calls, of functions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "") == "burnish":
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_small_lists_are_kept_and_stay(name: str, groups: int) -> None:
    """From the second step on, the same ones; a step by their numbers is the step."""
    both = []
    for known in (True, False):
        params = parameters()
        optimizer = made(name, params, groups)
        if not known:
            optimizer._known = list
        run(optimizer, params, range(2))
        first = numbers(optimizer)
        assert bool(first) == known
        run(optimizer, params, range(2, 5))
        assert numbers(optimizer) == first
        if known:
            assert all(type(one) is Kept and one.whole for one in lists(optimizer))
        both.append([params, [list(optimizer.state[parameter].values()) for parameter in params]])
    torch.testing.assert_close(*both, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_list_with_a_large_tensor_is_handed_over(name: str) -> None:
    params = parameters(((3,), (5000,), (4,)))
    optimizer = made(name, params)
    run(optimizer, params, range(3))
    (batch, state), *_ = optimizer._known()
    assert type(batch.params) is list
    assert {key for key, column in state.items() if type(column) is Kept} == {"step"}


def set_to(tensor: Tensor, value: Tensor) -> None:
    tensor.data = value


def reordered(optimizer: Any, parameter: nn.Parameter, _: str) -> None:
    """All that belongs to a parameter in other memory, with elements in another order."""
    moments = [moment for name, moment in optimizer.state[parameter].items() if name != "step"]
    for tensor in (parameter, *moments):
        tensor.data = tensor.data.t().contiguous().t()
    parameter.grad = parameter.grad.t().contiguous().t()


#: of the first parameter, in the middle of what its list is; some of these a step refuses
CHANGES: dict[str, Callable[[Any, nn.Parameter, str], object]] = {
    "memory of a parameter": lambda o, p, key: set_to(p, torch.ones(7, 5)),
    "memory of a moment": lambda o, p, key: set_to(o.state[p][key], torch.ones(7, 5)),
    "memory of a count": lambda o, p, key: set_to(o.state[p]["step"], torch.tensor(9.0)),
    "storage": lambda o, p, key: p.data.set_(torch.ones(7, 5)),
    "dtype of a parameter": lambda o, p, key: [set_to(p, p.data.bfloat16()), setattr(p, "grad", p.grad.bfloat16())],
    "dtype of a moment": lambda o, p, key: set_to(o.state[p][key], torch.ones(7, 5, dtype=torch.float64)),
    "shape of a moment": lambda o, p, key: set_to(o.state[p][key], torch.ones(5, 7)),
    "order of memory": reordered,
    "another moment": lambda o, p, key: o.state[p].update({key: torch.ones(7, 5)}),
    "a moment of another dtype": lambda o, p, key: o.state[p].update({key: torch.ones(7, 5).bfloat16()}),
    "a moment of no memory": lambda o, p, key: o.state[p].update({key: torch.ones(7, 5, device="meta")}),
    "a moment that a view negates": lambda o, p, key: o.state[p].update({key: torch._neg_view(torch.ones(7, 5))}),
    "a moment that is none": lambda o, p, key: o.state[p].update({key: None}),
    "another count": lambda o, p, key: o.state[p].update(step=torch.tensor(7.0)),
    "lost state": lambda o, p, key: o.state.pop(p),
    "loaded": lambda o, p, key: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "frozen": lambda o, p, key: p.requires_grad_(False),
    "no gradient": lambda o, p, key: setattr(p, "grad", None),
    "gradient of another dtype": lambda o, p, key: [setattr(p, "grad_dtype", None), setattr(p, "grad", p.grad.half())],
    "sparse gradient": lambda o, p, key: setattr(p, "grad", p.grad.to_sparse()),
    "gradient in another order": lambda o, p, key: setattr(p, "grad", p.grad.t().contiguous().t()),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["AdamW", "SGD", "LAMB"])
def test_what_is_kept_is_stepped_as_it_is(name: str, change: Any, groups: int) -> None:
    """As by an optimizer that keeps nothing: the same bits, and the same error where the step is refused."""
    both = []
    for keeps in (True, False):
        params = parameters()
        params.insert(0, params.pop(1))  # the one that changes has one on either side
        optimizer = made(name, params, groups)
        if not keeps:
            optimizer._known = list
        key = list(OPTIMIZERS[name].moments)[-1]
        refused = []
        for step in range(5):
            push(params, step)
            if step == 3:
                change(optimizer, params[1], key)
            try:
                optimizer.step()
            except (RuntimeError, ValueError, AttributeError) as error:
                refused.append((step, str(error)))
        values = [tensor for state in optimizer.state.values() for tensor in state.values()]
        real = [value for value in values if isinstance(value, Tensor) and not value.is_meta]
        both.append([[parameter.detach() for parameter in params], real, refused])
    torch.testing.assert_close(both[0][:2], both[1][:2], rtol=0, atol=0)
    assert both[0][2] == both[1][2]


@pytest.mark.parametrize("shapes", [SHAPES, ((3,), (5000,), (4,))], ids=["small", "mixed"])
def test_lists_go_with_their_optimizer(shapes: tuple[tuple[int, ...], ...]) -> None:
    params = parameters(shapes)
    optimizer = made("AdamW", params)
    run(optimizer, params, range(3))
    kept = numbers(optimizer)
    assert len(kept) == 4
    assert all(map(is_there, kept))
    gone = [weakref.ref(tensor) for tensor in (*params, *(optimizer.state[params[0]].values()))]
    del optimizer, params
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
    assert not any(map(is_there, kept))


def test_lists_go_unseen() -> None:
    """Whatever runs when they do."""
    params = parameters()
    optimizer = made("AdamW", params)
    run(optimizer, params, range(3))
    kept = numbers(optimizer)
    with Calls() as calls, Functions() as functions:
        del optimizer
        gc.collect()
    assert calls.seen == functions.seen == []
    assert not any(map(is_there, kept))


def test_a_replaced_list_is_dropped() -> None:
    params = parameters()
    optimizer = made("AdamW", params)
    run(optimizer, params, range(3))
    before = dict(zip(optimizer._references._held, numbers(optimizer), strict=True))
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(300)
    run(optimizer, params, range(3, 4))
    after = dict(zip(optimizer._references._held, numbers(optimizer), strict=True))
    assert {name for name in before if before[name] != after[name]} == {(0, "exp_avg")}
    assert not is_there(before[0, "exp_avg"])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not any(map(is_there, after.values()))


def pickled(given: Any) -> Any:
    return pickle.loads(pickle.dumps(given))


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_a_copy_keeps_its_own(how: Callable[[Any], Any]) -> None:
    params = parameters()
    optimizer = made("AdamW", params)
    run(optimizer, params, range(3))
    other, theirs = how((optimizer, params))
    assert other._references._held == {}
    run(optimizer, params, range(3, 6))
    run(other, theirs, range(3, 6))
    assert not set(numbers(optimizer)) & set(numbers(other))
    torch.testing.assert_close(params, theirs, rtol=0, atol=0)
    del optimizer
    run(other, theirs, range(6, 7))
    assert not torch.equal(params[0], theirs[0])


def test_two_optimizers_of_the_same_parameters_keep_their_own() -> None:
    both = []
    for keeps in (True, False):
        params = parameters()
        pair = made("AdamW", params), made("SGD", params)
        for optimizer in pair:
            if not keeps:
                optimizer._known = list
        for step in range(6):
            push(params, step)
            pair[step % 2].step()
        both.append(params)
    torch.testing.assert_close(*both, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [Calls, Functions])
def test_a_mode_of_torch_sees_the_tensors(mode: Any) -> None:
    params, others = parameters(), parameters()
    optimizer, other = made("AdamW", params), made("AdamW", others)
    for step in range(5):
        with mode() as calls:
            run(optimizer, params, range(step, step + 1))
        assert calls.seen == ["burnish.adam_step.default"]
    run(other, others, range(5))
    torch.testing.assert_close(params, others, rtol=0, atol=0)


def test_a_backend_that_is_asked_for_gets_the_tensors() -> None:
    params, others = parameters(), parameters()
    optimizer, other = made("AdamW", params), made("AdamW", others)
    other._known = list
    for one, theirs in ((optimizer, params), (other, others)):
        run(one, theirs, range(3))
        with burnish.use_backend("reference"):
            run(one, theirs, range(3, 6))
    assert numbers(optimizer)
    torch.testing.assert_close(params, others, rtol=0, atol=0)


def test_autograd_is_told_of_parameters_that_are_kept() -> None:
    params = parameters()
    optimizer = made("AdamW", params)
    run(optimizer, params, range(3))
    saved = (params[1] * params[1]).sum()
    versions = [parameter._version for parameter in params]
    run(optimizer, params, range(3, 4))
    assert [parameter._version for parameter in params] == [version + 1 for version in versions]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_a_kept_tensor_is_not_swapped() -> None:
    """So that what C++ keeps of it stays what Python has."""
    params = parameters()
    optimizer = made("AdamW", params)
    run(optimizer, params, range(3))
    for tensor in (params[1], optimizer.state[params[1]]["exp_avg"]):
        with pytest.raises(RuntimeError):
            torch.utils.swap_tensors(tensor, type(tensor)(torch.ones(300)))


class Wrapped(Tensor):
    """A tensor of another type."""


def test_tensors_of_other_types_are_handed_over() -> None:
    params = parameters()
    optimizer = made("AdamW", params)
    run(optimizer, params, range(2))
    state = optimizer.state[params[1]]
    state["exp_avg"] = state["exp_avg"].as_subclass(Wrapped)
    push(params, 2)
    (_, columns), *_ = optimizer._known()
    assert type(columns["exp_avg"]) is list
    assert type(columns["exp_avg_sq"]) is Kept


def test_nothing_is_kept_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"one": [torch.ones(2)]}
    assert type(References().hold(columns)["one"]) is Kept
    monkeypatch.setitem(native.missing, "_native.so", "it is not there")
    assert type(References().hold(columns)["one"]) is list


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_op_takes_a_number_for_each_of_its_lists(name: str) -> None:
    overload = registry.get(OPTIMIZERS[name].op).overload("kept")
    arguments = overload._schema.arguments
    given = {"Tensor": torch.ones(()), "float": 0.0, "bool": False, "List[int]": [0, 0]}
    with pytest.raises(RuntimeError, match=r"kept has 2 numbers, expected \d+, one for each list"):
        overload(*([] if str(each.type) == "List[Tensor]" else given.get(str(each.type)) for each in arguments))
