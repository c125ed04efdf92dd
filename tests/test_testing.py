"""The conformance kit finds what it is there to find: each rule fails on a kernel that is wrong in that way alone.

The wrong kernels are Python functions that stand in for an op's Triton implementation.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from burnish import registry, testing
from burnish.registry import Autograd, Impl, Invalid, OpSpec
from burnish.testing import gradients, numerics, values
from burnish.testing.calls import as_outputs
from burnish.testing.plan import Plan, plan_backend
from torch.autograd.gradcheck import GradcheckError

LINEAR = registry.get("int8_linear")
BACKWARD = registry.get("int8_linear_backward")
ROWS = registry.get("int8_quantize_rows")
PACK = registry.get("int8_linear_pack")
DTYPES = ("fp32", "bf16", "fp16")

_kernel: Callable[..., Any] = lambda *args: None  # noqa: E731


def kernel(*args: Any) -> Any:
    return _kernel(*args)


def supports(*args: Any) -> str | None:
    return None


def never(*args: Any) -> str | None:
    return "not on a Sunday"


def only_half(x: torch.Tensor) -> str | None:
    return None if x.dtype == torch.float16 else "x is not fp16"


def only_eights(x: torch.Tensor) -> str | None:
    return "K is no multiple of 8" if x.shape[1] > 17 and x.shape[1] % 8 else None


def planned(spec: OpSpec, backend: registry.Backend) -> list[testing.Check]:
    made = Plan()
    plan_backend(made, spec, backend)
    return made.checks


def wrong(spec: OpSpec, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> OpSpec:
    """``spec`` with ``function`` for its only implementation."""
    monkeypatch.setattr(sys.modules[__name__], "_kernel", function)
    return replace(spec, impls=(Impl("triton", f"{__name__}:kernel", f"{__name__}:supports"),), **changes)


def case(spec: OpSpec, name: str) -> registry.Case:
    return next(case for case in spec.cases.test if case.id == name)


def broken(rule: str) -> Any:
    return pytest.raises(testing.Violation, match=rule)


RULES = {"forward", "special", "unbiased", "layout", "guard", "huge", "deterministic"}


@pytest.mark.parametrize(("spec", "least"), [(LINEAR, 300), (ROWS, 300), (PACK, 100)], ids=["linear", "rows", "pack"])
def test_a_perfect_kernel_passes(monkeypatch: pytest.MonkeyPatch, spec: OpSpec, least: int) -> None:
    """The float64 result, rounded once, is the best there is."""
    plain = wrong(spec, lambda *args: _rounded(spec, args), monkeypatch)
    made = Plan()
    plan_backend(made, plain, "triton")
    checks = [check for check in made.checks if check.rule in RULES]
    assert len(checks) > least
    for check in checks[::25]:
        check.run()


def _rounded(spec: OpSpec, args: tuple[Any, ...]) -> Any:
    announced = as_outputs(spec.fake(*args))
    exact = [out.to(fake.dtype).contiguous() for out, fake in zip(testing.oracle(spec, args), announced, strict=True)]
    return exact[0] if len(exact) == 1 else tuple(exact)


def test_truncation_passes_n1_and_fails_n3(monkeypatch: pytest.MonkeyPatch) -> None:
    def truncated(*args: Any) -> torch.Tensor:
        y = LINEAR.reference(*args[:5], torch.float32)
        return (y.view(torch.int32) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)

    spec = wrong(LINEAR, truncated, monkeypatch)
    with broken(r"N3: int8_linear leans -0\.\d+ ulp away from zero"):
        values.unbiased(spec, "triton", case(LINEAR, "M7-N65-K129-bf16"))
    args = LINEAR.make(case(LINEAR, "M7-N65-K129-bf16"), "cpu", 0)
    y, y64, yt = (
        truncated(*args).ravel(),
        testing.oracle(LINEAR, args)[0].ravel(),
        testing.eager(LINEAR, args)[0].ravel(),
    )
    numerics.check_eager("truncated", y, y64, yt)


def test_a_late_rounding_fails_n1_or_n2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products rounded to bf16 before the bias."""

    def rounded(x: Any, weight: Any, scale: Any, bias: Any, *rest: Any) -> torch.Tensor:
        return (LINEAR.reference(x, weight, scale, None, *rest).bfloat16() + bias).to(x.dtype)

    with broken("N[12]: "):
        values.forward(wrong(LINEAR, rounded, monkeypatch), "triton", case(LINEAR, "M7-N65-K129-fp32"))


def test_bf16_accumulation_fails_n2(monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(dy: Any, x: Any, weight: Any, scale: Any, bias: Any, K: int, *rest: Any) -> Any:
        dx, dbias = BACKWARD.reference(dy, x, weight, scale, bias, K, *rest)
        return dx.bfloat16().float(), dbias

    with broken("N2: int8_linear_backward"):
        values.forward(wrong(BACKWARD, narrow, monkeypatch), "triton", case(BACKWARD, "M7-N65-K129-fp32"))


def test_one_wrong_integer_fails_n4(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_one(x: torch.Tensor) -> Any:
        q, scale = ROWS.reference(x)
        q.view(-1)[q.numel() // 2] += 1
        return q, scale

    with broken(r"N4: int8_quantize_rows\[0\] .* 1 of 51 elements"):
        values.forward(wrong(ROWS, off_by_one, monkeypatch), "triton", case(ROWS, "M3-K17-fp32"))


def test_half_up_instead_of_half_even_fails_n4(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_up(x: torch.Tensor) -> Any:
        _, scale = ROWS.reference(x)
        inverse = 127.0 / x.float().abs().amax(-1, keepdim=True)
        return torch.floor(x.float() * inverse + 0.5).to(torch.int8), scale

    with broken("N4: int8_quantize_rows"):
        values.forward(wrong(ROWS, half_up, monkeypatch), "triton", case(ROWS, "M17-K127-fp32-midpoints"))


def test_saturating_pair_sums_fail_n5(monkeypatch: pytest.MonkeyPatch) -> None:
    """``vpmaddubsw``: u8 * s8 products of a pair are added in int16."""

    def saturating(x: Any, weight: Any, scale: Any, bias: Any, activation: int, out_dtype: Any) -> torch.Tensor:
        q, row_scale = ROWS.reference(x)
        w = registry.get("int8_linear_unpack").reference(weight, scale.shape[0], x.shape[1]).int()
        pairs = (q.int() + 128)[:, None, :] * w[None]
        pairs = pairs.unflatten(-1, (-1, 2)).sum(-1).clamp(-32768, 32767)
        product = pairs.sum(-1) - 128 * w.sum(-1)
        return (product.float() * (row_scale[:, None] * scale)).to(x.dtype)

    with broken("N5: int8_linear"):
        values.forward(
            wrong(LINEAR, saturating, monkeypatch), "triton", case(LINEAR, "M4-N70-K260-fp32-no_bias-extreme")
        )


def test_an_inexact_integer_product_fails_c4(monkeypatch: pytest.MonkeyPatch) -> None:
    def nearly(*args: Any) -> torch.Tensor:
        return LINEAR.reference(*args) * (1 + 2**-23)

    with broken("C4: int8_linear"):
        values.forward(wrong(LINEAR, nearly, monkeypatch), "triton", case(LINEAR, "M7-N65-K129-fp32-integers"))


@pytest.mark.parametrize("swallow", ["relu", "nan_row", "inf"])
def test_a_swallowed_nan_or_infinity_fails_n7(monkeypatch: pytest.MonkeyPatch, swallow: str) -> None:
    def swallowing(*args: Any) -> torch.Tensor:
        y = LINEAR.reference(*args)
        if swallow == "inf":
            return y.clamp(-1e30, 1e30)
        return y.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)

    name = "M1-N72-K96-fp32-relu" if swallow == "relu" else "M3-N17-K33-fp32"
    with broken("N7: int8_linear with (nan|inf|-inf) at element 0 of argument 0"):
        values.special(wrong(LINEAR, swallowing, monkeypatch), "triton", case(LINEAR, name), 3)


def test_ignored_strides_fail_the_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    def unstrided(x: torch.Tensor) -> Any:
        dense = torch.empty(0).new_tensor([]).to(x.dtype).set_(x.untyped_storage())
        return ROWS.reference(dense[: x.numel()].view(x.shape))

    spec, chosen = wrong(ROWS, unstrided, monkeypatch), case(ROWS, "M33-K129-fp32")
    values.layout(spec, "triton", chosen, "contiguous")
    for name in set(values.LAYOUTS) - {"contiguous"}:
        with broken(f"layout: int8_quantize_rows.* of {name} inputs"):
            values.layout(spec, "triton", chosen, name)


def test_a_32_bit_row_offset_fails_c6(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrapping(x: torch.Tensor) -> Any:
        offsets = [(row * x.stride(0)) % 2**31 for row in range(x.shape[0])]
        rows = [x.as_strided((x.shape[1],), (x.stride(1),), offset) for offset in offsets]
        return ROWS.reference(torch.stack(rows))

    with broken("C6: int8_quantize_rows"):
        values.huge(wrong(ROWS, wrapping, monkeypatch), "triton", case(ROWS, "M33-K129-fp32"))


def test_dependence_on_threads_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def threaded(x: torch.Tensor) -> Any:
        q, scale = ROWS.reference(x)
        return q, scale * (1 + torch.get_num_threads() * 2**-20)

    with broken("determinism: "):
        values.deterministic(wrong(ROWS, threaded, monkeypatch), "triton", case(ROWS, "M33-K129-fp32"))


def test_a_loop_that_only_long_rows_enter_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_block(x: torch.Tensor) -> Any:
        q, scale = ROWS.reference(x)
        q[:, 1024:] = 0
        return q, scale

    broken_rows = wrong(ROWS, one_block, monkeypatch)
    checks = {check.label: check for check in planned(broken_rows, "triton") if check.rule == "long"}
    assert checks.keys() == {f"{size}-{dtype}" for size in ("M20011-K17", "M3-K20011") for dtype in DTYPES}
    for check in (checks[f"M3-K20011-{dtype}"] for dtype in DTYPES):
        with broken("N4: int8_quantize_rows"):
            check.run()


def test_a_size_that_an_op_or_a_kernel_does_not_take_is_left_out() -> None:
    def few_rows(x: torch.Tensor) -> Any:
        torch._check(x.shape[0] <= 256, lambda: "M is more than 256")
        return ROWS.fake(x)

    made = Plan()
    plan_backend(made, replace(ROWS, fake=few_rows), "cpu")
    assert made.skipped == {f"int8_quantize_rows-cpu-long-M20008-K17-{dtype}": "M is more than 256" for dtype in DTYPES}
    eights = replace(ROWS, impls=(Impl("triton", f"{__name__}:kernel", f"{__name__}:only_eights"),))
    rows = {case.id for case in values.long_cases(eights, "triton")}
    assert {f"M3-K20008-{dtype}" for dtype in DTYPES} <= rows


def test_interpreted_products_are_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    product = wrong(LINEAR, LINEAR.reference, monkeypatch)
    assert {max(case.dims.values()) for case in values.long_cases(product, "triton")} == {1031}
    assert {check.label for check in planned(product, "triton") if check.rule == "long"} == {
        f"{size}-{dtype}" for size in ("M1031-N17-K33", "M3-N1031-K33", "M3-N17-K1031") for dtype in DTYPES
    }


def test_rows_enough_for_every_thread_are_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share that begins at its first row is all that one thread, or a few rows, would show."""

    def second_share(x: torch.Tensor) -> Any:
        q, scale = ROWS.reference(x)
        if torch.get_num_threads() > 1 and x.numel() >= 2**16:
            q[x.shape[0] // 2 :] = 0
        return q, scale

    kernel = wrong(ROWS, second_share, monkeypatch)
    shared = {case.id: case for case in values.shared_cases(ROWS)}
    assert shared.keys() <= {check.label for check in planned(ROWS, "cpu") if check.rule == "deterministic"}
    assert len(shared) == 3
    for case in shared.values():
        with broken("determinism: "):
            values.deterministic(kernel, "triton", case)


def test_a_kernel_that_declines_every_case_fails() -> None:
    refusing = replace(ROWS, impls=(Impl("triton", f"{__name__}:kernel", f"{__name__}:never"),))
    (check,) = [check for check in planned(refusing, "triton") if check.rule != "invalid"]
    with broken("int8_quantize_rows on triton declines every case, so nothing is tested: not on a Sunday"):
        check.run()


def test_a_kernel_that_takes_one_dtype_is_planned() -> None:
    """A plan asks what torch.library is to check for every dtype of the record; a kernel need not take each."""
    half = replace(ROWS, impls=(Impl("triton", f"{__name__}:kernel", f"{__name__}:only_half"),))
    labels = {check.label for check in planned(half, "triton") if check.rule in ("opcheck", "compile")}
    assert {"fp16-odd", "aot_eager-fp16", "inductor-fp16"} <= labels
    assert not any("bf16" in label or "fp32" in label for label in labels)


def test_an_unwritten_result_fails_c5(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(*args: Any) -> torch.Tensor:
        y = LINEAR.reference(*args)
        out = torch.empty(y.shape, dtype=y.dtype)
        if not torch.are_deterministic_algorithms_enabled():
            out.zero_()  # memory that nobody poisons may hold anything, also the poison, which would hide the fault
        out.view(-1)[:-1] = y.view(-1)[:-1]
        return out

    with broken("C5: "):
        values.guard(wrong(LINEAR, forgetful, monkeypatch), "triton", case(LINEAR, "M7-N65-K129-fp32"))


def test_a_changed_input_fails_c5(monkeypatch: pytest.MonkeyPatch) -> None:
    def scribbling(x: torch.Tensor) -> Any:
        result = ROWS.reference(x)
        x.view(-1)[0] += 1
        return result

    with broken("C5: int8_quantize_rows changed one of its inputs"):
        values.forward(wrong(ROWS, scribbling, monkeypatch), "triton", case(ROWS, "M3-K17-fp32"))


@pytest.mark.parametrize("change", [torch.Tensor.double, lambda y: y[:-1], lambda y: y.T.contiguous().T])
def test_a_fake_that_lies_fails_c1(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    spec = wrong(LINEAR, lambda *args: change(LINEAR.reference(*args)), monkeypatch)
    with broken("C1: int8_linear has (dtype|shape|stride)"):
        values.forward(spec, "triton", case(LINEAR, "M3-N17-K33-fp32"))


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    formula = LINEAR.autograd
    assert formula is not None

    def half(ctx: Any, dy: torch.Tensor) -> Any:
        dx, *rest = formula.backward(ctx, dy)
        return (dx / 2, *rest)

    def absent(ctx: Any, dy: torch.Tensor) -> Any:
        dx, weight, scale, _, *rest = formula.backward(ctx, dy)
        return (dx, weight, scale, None, *rest)

    chosen = case(LINEAR, "M3-N17-K33-fp32")
    for backward, message in (
        (half, "N1: int8_linear's gradient of argument 0"),
        (absent, "argument 3 has gradient none"),
    ):
        glue = Autograd(formula.setup_context, backward, formula.surrogate)
        spec = replace(LINEAR, autograd=glue)
        with pytest.MonkeyPatch.context() as patch, broken(message):
            patch.setattr(gradients, "run", lambda s, backend, args, grad: (_glued(s)(*args),))
            gradients.gradient(spec, "cpu", chosen)
    with pytest.raises(GradcheckError):
        gradients.gradcheck(replace(LINEAR, autograd=Autograd(formula.setup_context, half, formula.surrogate)), chosen)


def _glued(spec: OpSpec) -> Callable[..., Any]:
    formula = spec.autograd
    assert formula is not None

    class Glue(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return spec.reference(*args)

        setup_context = staticmethod(formula.setup_context)
        backward = staticmethod(formula.backward)

    return Glue.apply


def test_a_bad_call_that_passes_or_says_something_else_is_found() -> None:
    from burnish.testing import contract

    passes = Invalid("nothing bad", lambda *args: args, "x")
    with broken("nothing bad raised nothing"):
        contract.invalid(LINEAR, "cpu", passes)
    vague = Invalid("fp64", lambda x, *rest: (x.double(), *rest), "weight")
    with broken("expected a message that begins like 'int8_linear: weight', got: int8_linear: x is fp64"):
        contract.invalid(LINEAR, "cpu", vague)


def test_special_values_are_put_in_as_many_places_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(values, "_check_special", lambda spec, backend, args, what, *_, **__: tried.append(what))
    counts = []
    for positions in (1, 2, 3):
        for check in testing.plan([ROWS], ["cpu"], positions).checks:
            if check.rule == "special":
                check.run()
        counts.append(len(tried))
        tried.clear()
    assert counts[0] > 0
    assert counts == [counts[0], 2 * counts[0], 3 * counts[0]]
