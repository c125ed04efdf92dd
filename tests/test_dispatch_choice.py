"""Which of an op's CUDA implementations runs, with implementations that are CPU functions here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import burnish
import pytest
import torch
from burnish import dispatch, native, registry
from burnish.errors import BackendError
from burnish.registry import Autograd, Case, Cases, Cost, Impl, OpSpec


def _fast(x: torch.Tensor) -> str:
    return "fast"


def _general(x: torch.Tensor) -> str:
    return "general"


def _supports_small(x: torch.Tensor) -> str | None:
    return None if x.shape[0] <= 4 else f"M is {x.shape[0]}, at most 4"


def _supports_floats(x: torch.Tensor) -> str | None:
    return None if x.is_floating_point() else f"x is {x.dtype}, expected a float"


def _checked(x: torch.Tensor) -> torch.Tensor:
    torch._check(x.dim() == 2, lambda: "fake_op: x is not a matrix")
    return x


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpSpec]:
    """A record that nobody registered, with a fast implementation for few rows and a general one."""
    monkeypatch.delitem(native.missing, "_cuda.so", raising=False)
    case = Case({"M": 2, "N": 3}, torch.float32)
    yield OpSpec(
        name="fake_op",
        schema="(Tensor x) -> Tensor",
        reference=lambda x: "reference",
        fake=_checked,
        autograd=None,
        impls=(
            Impl("native", f"{__name__}:_fast", f"{__name__}:_supports_small"),
            Impl("triton", f"{__name__}:_general", f"{__name__}:_supports_floats"),
        ),
        cases=Cases(test=(case,), bench=(case,)),
        make=lambda case, backend, seed: (torch.ones(2, 3),),
        cost=lambda case: Cost(1.0, 1.0, "fp32"),
    )
    dispatch.resolve.cache_clear()


def test_the_first_willing_implementation_runs(spec: OpSpec) -> None:
    few, many = torch.ones(4, 3), torch.ones(5, 3)
    assert dispatch.select(spec, (few,))(few) == "fast"
    assert dispatch.select(spec, (many,))(many) == "general"


def _is_odd(x: torch.Tensor) -> bool:
    return x.shape[0] % 2 == 1


def test_one_that_yields_runs_where_it_is_forced_or_alone(spec: OpSpec) -> None:
    first, second = spec.impls
    spec = replace(spec, impls=(replace(first, yields=f"{__name__}:_is_odd"), second))
    even, odd = torch.ones(4, 3), torch.ones(3, 3)
    assert dispatch.select(spec, (even,))(even) == "fast"
    assert dispatch.select(spec, (odd,))(odd) == "general"
    assert dispatch.select(spec, (odd.long(),))(odd) == "fast"
    with burnish.use_backend("native"):
        assert dispatch.select(spec, (odd,))(odd) == "fast"


@pytest.mark.parametrize(
    ("op", "options", "first"),
    [
        ("adam_step", {}, "native"),
        ("adam_step", {"stochastic": True}, "triton"),
        ("lamb_step", {"amp": True}, "native"),
        ("lamb_step", {"stochastic": True}, "triton"),
        ("lamb_squares", {"stochastic": True}, "native"),
        ("grad_norm", {"scaled": True}, "native"),
    ],
)
def test_only_a_step_that_rounds_at_random_turns_to_triton(op: str, options: dict[str, bool], first: str) -> None:
    spec = registry.get(op)
    args = spec.make(Case({"N": 7}, torch.bfloat16, options=options), "cpu", 0)
    assert args[-1] is not None or not {"stochastic", "scaled"} & set(options)
    assert next(impl.backend for impl in dispatch.in_turn(spec, None, args)) == first


def test_a_forced_implementation_runs_or_says_why(spec: OpSpec) -> None:
    few, many = torch.ones(4, 3), torch.ones(5, 3)
    with burnish.use_backend("triton"):
        assert dispatch.select(spec, (few,))(few) == "general"
    with burnish.use_backend("reference"):
        assert dispatch.select(spec, (few,))(few) == "reference"
    with burnish.use_backend("native"), pytest.raises(BackendError) as raised:
        dispatch.select(spec, (many,))
    assert "native: M is 5, at most 4" in str(raised.value)
    assert "triton" not in str(raised.value)
    with burnish.use_backend("cpu"), pytest.raises(BackendError, match="cpu: the op has no such implementation"):
        dispatch.select(spec, (few,))


def test_a_gradient_without_the_forced_implementation_takes_what_it_has(spec: OpSpec) -> None:
    few = torch.ones(4, 3)
    general_only = replace(spec, impls=spec.impls[1:])

    def gradient(of: OpSpec) -> str:
        formula = Autograd(lambda *_: None, lambda ctx, dy: dispatch.select(of, (dy,))(dy), lambda x: x)
        setup_context, backward = dispatch.formula(formula)
        ctx = SimpleNamespace()
        with burnish.use_backend("native"):
            setup_context(ctx, (few,), few)
        return backward(ctx, few)

    assert gradient(spec) == "fast"
    assert gradient(general_only) == "general"
    with burnish.use_backend("native"), pytest.raises(BackendError, match="no such implementation"):
        dispatch.select(general_only, (few,))


def test_when_nothing_can_run_each_candidate_has_its_reason(spec: OpSpec) -> None:
    with pytest.raises(BackendError) as raised:
        dispatch.select(spec, (torch.ones(9, 3, dtype=torch.int32),))
    assert str(raised.value).splitlines() == [
        "fake_op: no implementation can run this call.",
        "  native: M is 9, at most 4",
        "  triton: x is torch.int32, expected a float",
    ]


def test_a_missing_library_is_a_reason(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(native.missing, "_cuda.so", "the CUDA kernels were not built")
    few = torch.ones(4, 3)
    assert dispatch.select(spec, (few,))(few) == "general"
    with burnish.use_backend("native"), pytest.raises(BackendError, match="native: the CUDA kernels were not built"):
        dispatch.select(spec, (few,))


def test_a_missing_module_is_a_reason(spec: OpSpec) -> None:
    broken = Impl("triton", "no_such_module:run", "no_such_module:supports")
    assert dispatch.objection(broken, (torch.ones(1),)) == "no_such_module is not installed"


@pytest.mark.parametrize("module", ["burnish.kernels.no_such_family.op", "burnish.ops.int8_linear_gone"])
def test_a_module_missing_from_a_package_that_is_there_is_a_mistake(module: str) -> None:
    """It would be passed over in silence, for the next implementation, as if the package were not installed."""
    broken = Impl("triton", f"{module}:run", f"{module}:supports")
    with pytest.raises(ImportError, match=f"{module}:supports cannot be imported: No module named 'burnish"):
        dispatch.objection(broken, (torch.ones(1),))


def test_arguments_are_checked_before_the_choice(spec: OpSpec) -> None:
    kernel = dispatch.cuda_kernel(spec)
    assert kernel(torch.ones(2, 3)) == "fast"
    with pytest.raises(RuntimeError, match="fake_op: x is not a matrix"):
        kernel(torch.ones(2))
