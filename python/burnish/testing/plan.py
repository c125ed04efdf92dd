"""The list of checks of an op on a backend, each with an id and a thunk: pytest and the command line read the same one.

Interpreted Triton kernels are a thousand times slower than the CPU's, so there a check keeps to smaller cases; which
cases a process leaves out, and why, is in the :class:`Plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from burnish import native
from burnish.registry import Backend, Case, OpSpec, dtype_name
from burnish.testing import contract, gradients, values
from burnish.testing.calls import (
    Violation,
    backends,
    kind,
    kinds,
    makes_integers,
    mutated,
    objection,
    stand_in,
    volume,
)
from burnish.testing.interpreter import interpreting
from burnish.testing.layouts import LAYOUTS
from burnish.testing.values import INTERPRETED_VOLUME, SPECIAL_POSITIONS


@dataclass(frozen=True)
class Check:
    """One check of one op on one backend. ``rule`` is the check's name, ``label`` tells the case."""

    spec: OpSpec
    backend: Backend
    rule: str
    label: str
    run: Callable[[], None]

    @property
    def id(self) -> str:
        return f"{self.spec.stem}-{self.backend}-{self.rule}-{self.label}"


@dataclass
class Plan:
    """``checks`` to run, and what is left out: id or backend, with the reason."""

    checks: list[Check] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def plan(specs: Iterable[OpSpec], only: Iterable[Backend] | None = None, positions: int = SPECIAL_POSITIONS) -> Plan:
    """Every check of ``specs`` that this process can run, on the backends in ``only`` or on all; special values are put
    in at most ``positions`` places of an input."""
    made = Plan()
    for spec in specs:
        run, skipped = backends(spec)
        made.skipped.update({f"{spec.stem}-{backend}": reason for backend, reason in skipped.items()})
        for backend in run:
            if only is None or backend in only:
                plan_backend(made, spec, backend, positions)
    return made


def plan_backend(made: Plan, spec: OpSpec, backend: Backend, positions: int = SPECIAL_POSITIONS) -> None:
    """Add the checks of one backend, without the cases that it declines or that are too large to interpret."""
    asked: dict[str, str | None] = {}  # of a case, the same for every rule
    before = len(made.checks)
    for rule, case, label, body in _on_cases(spec, backend, positions):
        check = Check(spec, backend, rule, label, body)
        reason = _spared(spec, rule, case)
        if reason is None:
            if case.id not in asked:
                ask = values.long_objection if rule == "long" else _objection
                asked[case.id] = ask(spec, backend, case)
            reason = asked[case.id]
        if reason is None:
            made.checks.append(check)
        else:
            made.skipped[check.id] = reason
    if len(made.checks) == before:
        made.checks.append(Check(spec, backend, "forward", "none", partial(_fail_untested, spec, backend, asked)))
    for rule, label, body in _on_op(spec, backend):
        made.checks.append(Check(spec, backend, rule, label, body))


def _fail_untested(spec: OpSpec, backend: Backend, reasons: dict[str, str | None]) -> None:
    said = ", ".join(sorted({str(reason) for reason in reasons.values()}))
    raise Violation(f"{spec.name} on {backend} declines every case, so nothing is tested: {said}")


def _objection(spec: OpSpec, backend: Backend, case: Case) -> str | None:
    if interpreting() and volume(case) > INTERPRETED_VOLUME:
        return f"the interpreter takes too long: {volume(case)} > {INTERPRETED_VOLUME}"
    return objection(spec, backend, spec.make(case, backend, 0))


def _spared(spec: OpSpec, rule: str, case: Case) -> str | None:
    """Why a case of an op that writes in place, which has many kinds of them, is not interpreted: of each kind the
    largest is, and of the first of each dtype special values and the mean of the errors."""
    if not interpreting() or not mutated(spec) or case.values != "normal":
        return None
    groups = kinds(spec)
    if rule in ("forward", "guard") and case != groups[kind(case)][-1]:
        return "the interpreter takes too long: of an op that writes in place, the largest case of each kind runs"
    if rule in ("special", "unbiased") and kind(case) != next(key for key in groups if key[0] == case.dtype):
        return (
            f"the interpreter takes too long: of an op that writes in place, {rule} of the first kind of a dtype runs"
        )
    return None


def _on_cases(spec: OpSpec, backend: Backend, positions: int) -> Iterator[tuple[str, Case, str, Callable[[], None]]]:
    """Checks of values: (rule, the case that it runs, label, body)."""
    for case in spec.cases.test:
        yield "forward", case, case.id, partial(values.forward, spec, backend, case)
        yield "guard", case, case.id, partial(values.guard, spec, backend, case)
    for case, most in values.special_cases(spec):
        yield "special", case, case.id, partial(values.special, spec, backend, case, min(most, positions))
    for cases in kinds(spec).values():
        solid = [case for case in cases if min(case.dims.values()) > 1]
        if not solid:
            continue
        small, middle = solid[0], solid[len(solid) // 2]
        if not makes_integers(spec, backend, small) and values.grows(spec, backend, middle):
            yield "unbiased", middle, middle.id, partial(values.unbiased, spec, backend, middle)
        last = next((case for case in reversed(solid) if _objection(spec, backend, case) is None), solid[-1])
        if backend != "cpu":
            yield "deterministic", last, last.id, partial(values.deterministic, spec, backend, last)
        if spec.autograd and not native.emulating():
            for case in [small, middle] if interpreting() else cases:
                yield "gradient", case, case.id, partial(gradients.gradient, spec, backend, case)
            yield "double_backward", small, small.id, partial(gradients.double_backward, spec, backend, small)
    for case in values.long_cases(spec, backend):
        yield "long", case, case.id, partial(values.long, spec, backend, case)
    laid_out = values.layout_cases(spec, backend)
    if backend == "cpu":  # which cuts sums up by shapes that a few cases do not have
        for case in spec.cases.test:
            yield "deterministic", case, case.id, partial(values.deterministic, spec, backend, case)
            if case not in laid_out:
                yield "layout", case, f"transposed-{case.id}", partial(values.layout, spec, backend, case, "transposed")
        for case in values.shared_cases(spec):
            yield "deterministic", case, case.id, partial(values.deterministic, spec, backend, case)
    for case in laid_out:
        for name in LAYOUTS:
            yield "layout", case, f"{name}-{case.id}", partial(values.layout, spec, backend, case, name)
        yield "layout", case, f"batched-{case.id}", partial(values.batched, spec, backend, case)
        yield "huge", values.tall(spec, backend, case), case.id, partial(values.huge, spec, backend, case)


def _on_op(spec: OpSpec, backend: Backend) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Checks of the op's dealings with PyTorch: (rule, label, body). What goes through PyTorch's dispatcher needs a
    backend that is registered with it, which an interpreted kernel is not."""
    for bad in spec.cases.invalid:
        yield "invalid", bad.label.replace(" ", "_"), partial(contract.invalid, spec, backend, bad)
    if spec.autograd and backend == "cpu":  # it runs the record's formulas, which are the same for all
        for case in gradients.gradcheck_cases(spec):
            yield "gradcheck", case.id, partial(gradients.gradcheck, spec, case)
    if stand_in():
        return
    taken = [dtype for dtype in contract.dtypes(spec) if contract.input_sets(spec, backend, dtype)]
    for dtype in taken:
        for name in contract.input_sets(spec, backend, dtype):
            body = partial(contract.opcheck, spec, backend, dtype, name)
            yield "opcheck", f"{dtype_name(dtype)}-{name}", body
        for grad in (False, True) if spec.autograd else (False,):
            yield _compile(spec, backend, dtype, "aot_eager", grad)
    if taken:
        yield _compile(spec, backend, taken[0], "inductor", spec.autograd is not None)


def _compile(
    spec: OpSpec, backend: Backend, dtype: torch.dtype, compiler: str, grad: bool
) -> tuple[str, str, Callable[[], None]]:
    case = contract.compile_case(spec, backend, dtype)
    body = partial(contract.compiled, spec, backend, case, compiler, grad)
    return "compile", f"{compiler}-{dtype_name(dtype)}{'-grad' if grad else ''}", body
