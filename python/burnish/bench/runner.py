"""Which contestants a case has, and the run over all cases."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch

from burnish import dispatch
from burnish.arguments import Args
from burnish.bench import machine, roofline
from burnish.bench.gate import Gate, one_line
from burnish.bench.peers import Peer
from burnish.bench.rows import BASELINE, Results, Row
from burnish.bench.timing import MAX_SETS, Call, Contestant, argument_sets, interleave, quartiles, sets_wanted
from burnish.errors import BackendError
from burnish.registry import Backend, Case, Cost, OpSpec, all_ops, get


@dataclass(frozen=True)
class Plan:
    """The cases to time and how. ``rounds`` samples of at least ``min_ms`` milliseconds each a contestant."""

    cases: tuple[tuple[OpSpec, Case], ...]
    device: str = "cpu"
    peers: tuple[Peer, ...] = ()
    rounds: int = 20
    min_ms: float = 2.0
    seed: int = 0


def select_cases(
    ops: Sequence[str] = (),
    *,
    pattern: str = "*",
    dtype: torch.dtype | None = None,
    shapes: Sequence[Sequence[int]] = (),
    device: str = "cpu",
) -> tuple[tuple[OpSpec, Case], ...]:
    """The bench cases of ``ops`` (of all ops if empty) whose id matches ``pattern``.

    Args:
        ops: op names.
        pattern: a glob over case ids, ``M1-*``.
        dtype: time the cases with a floating dtype in this one.
        shapes: instead of the record's own cases, its first one at these dims, in the record's order.
        device: ``cuda`` adds the cases that are too wide for a CPU.

    Raises:
        KeyError: no such op; the message lists the ops.
        ValueError: nothing matches, or a shape does not fit.
    """
    specs = [get(name) for name in dict.fromkeys(ops)] if ops else list(all_ops().values())
    found, ids = [], []
    for spec in specs:
        cases = spec.cases.bench + (spec.cases.wide if device == "cuda" else ())
        if shapes:
            fitting = [shape for shape in shapes if cases and len(shape) == len(cases[0].dims)]
            if ops and len(fitting) < len(shapes):
                names = ",".join(cases[0].dims) if cases else "no dims: it has no bench case"
                raise ValueError(f"{spec.name} takes shapes of {names}")
            cases = tuple(replace(cases[0], dims=dict(zip(cases[0].dims, shape, strict=True))) for shape in fitting)
        if dtype is not None:
            cases = tuple(replace(case, dtype=dtype) if case.dtype.is_floating_point else case for case in cases)
        by_id = {case.id: case for case in cases}
        ids += list(by_id)
        found += [(spec, case) for name, case in by_id.items() if fnmatchcase(name, pattern)]
    if shapes and not ids:
        raise ValueError(f"no op takes a shape of {', '.join(str(len(shape)) for shape in shapes)} sizes")
    if not found:
        raise ValueError(f"no case matches {pattern!r}; the cases are: {', '.join(dict.fromkeys(ids))}")
    return tuple(found)


def run(
    plan: Plan,
    *,
    threads: int | None = None,
    command: str = "",
    absent_peers: dict[str, str] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> Results:
    """Time every case of ``plan``: ours, the record's baseline and the peers, interleaved.

    Args:
        threads: CPU threads while timing; the former number is restored.
        command: what to record as the command that made the result.
        absent_peers: peers that could not be loaded, with the reasons, for the record.
        progress: called with (steps done, steps in all, what is being timed).
    """
    total = len(plan.cases) * (plan.rounds + 1)
    rows: list[Row] = []
    ceilings: dict[str, list[float]] = {}
    neighbours = machine.Neighbours()
    with limited_threads(threads):
        about = machine.describe(plan.device, command or " ".join(sys.argv))
        for index, (spec, case) in enumerate(plan.cases):
            done = index * (plan.rounds + 1)
            label = f"{spec.name} {case.id}"
            steps = iter(range(done + 1, total + 1))
            progress(done, total, label)
            tick = partial(_tick, progress, steps, total, label)
            rows += _time_case(plan, spec, case, ceilings, neighbours, tick)
        progress(total, total, "")
    units = {"read": ("read_gbps", 1e9)}
    about["ceilings"] = {
        units.get(kind, (f"{kind}_tops", 1e12))[0]: round(quartiles(values)[1] / units.get(kind, ("", 1e12))[1], 4)
        for kind, values in ceilings.items()
    }
    about["neighbours"] = neighbours.share
    about["rounds"], about["min_ms"] = plan.rounds, plan.min_ms
    about["peers"] = {peer.name: peer.version for peer in plan.peers}
    about["absent_peers"] = absent_peers or {}
    return Results(about, tuple(rows))


def _tick(progress: Callable[[int, int, str], None], steps: Iterator[int], total: int, label: str) -> None:
    progress(next(steps), total, label)


@contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """torch with ``count`` CPU threads, or as many as it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def implementations(spec: OpSpec, device: str) -> tuple[Backend, ...]:
    """The backends that run an op on a device, in order of preference."""
    return ("cpu",) if device == "cpu" else tuple(impl.backend for impl in spec.impls)


def implementation(spec: OpSpec, backend: Backend, args: tuple[Any, ...]) -> Call:
    """The call that runs ``args`` on a backend.

    Raises:
        BackendError: there is none, with the reason.
    """
    if backend == "cpu":
        reason = dispatch.candidates(spec)["cpu"]
        if reason != "yes":
            raise BackendError(reason)
        return partial(spec.entry, *args)
    impl = next(impl for impl in spec.impls if impl.backend == backend)
    objection = dispatch.objection(impl, args)
    if objection:
        raise BackendError(objection)
    return partial(dispatch.resolve(impl.target), *args)


def _time_case(
    plan: Plan,
    spec: OpSpec,
    case: Case,
    ceilings: dict[str, list[float]],
    neighbours: machine.Neighbours,
    tick: Callable[[], None],
) -> list[Row]:
    refused, contestants = _contestants(plan, spec, case)
    tick()
    cost = spec.cost(case)
    with neighbours.watch():
        peaks = interleave(
            contestants,
            roofline.probes(plan.device, cost.unit, cost.ops) if contestants else {},
            device=plan.device,
            rounds=plan.rounds if contestants else 0,
            min_ms=plan.min_ms,
            seed=plan.seed,
            tick=tick,
        )
    for kind, values in peaks.items():
        ceilings.setdefault(kind, []).extend(values)
    torch_path = next((one for one in contestants if one.name == BASELINE), None)
    timed = {one.name: _row(spec, case, one, cost, peaks, torch_path) for one in contestants}
    order = [*implementations(spec, plan.device), BASELINE, *(f"peer:{peer.name}" for peer in plan.peers)]
    return [row for name in order for row in (timed.get(name), refused.get(name)) if row]


def _contestants(plan: Plan, spec: OpSpec, case: Case) -> tuple[dict[str, Row], list[Contestant]]:
    """Everyone who takes the case and passes the gate; for the others, their row."""
    refused: dict[str, Row] = {}
    entered: list[Contestant] = []

    def enter(
        name: str, build: Callable[[Args], Call], judge: Callable[[Call, Args], str | None], most: int = MAX_SETS
    ) -> None:
        try:
            args = gate.copies()
            first = build(args)
            wrong = judge(first, args)
            if wrong is None:
                first = build(sets[0]) if gate.writes else first
                entered.append(Contestant(name, [first, *map(build, sets[1:most])]))
        except BackendError as error:
            refused[name] = Row(spec.name, case.id, name, skipped=str(error))
            return
        except Exception as error:
            wrong = one_line(error)
        if wrong:
            refused[name] = Row(spec.name, case.id, name, failed=wrong)

    backends = implementations(spec, plan.device)
    if not backends:
        reason = f"the op has no implementation for {plan.device}"
        return {"native": Row(spec.name, case.id, "native", skipped=reason)}, []
    for backend in reversed(backends):  # the sets of the preferred one stay for the baseline and the peers
        sets = argument_sets(spec, case, backend, plan.device, len(backends) + len(plan.peers) + 1)
        gate = Gate(spec, sets[0])
        enter(backend, partial(implementation, spec, backend), gate.objection)
    if spec.baseline is not None:
        enter(BASELINE, lambda args: spec.baseline(*args), lambda call, args: None)  # type: ignore[misc]
    for peer in plan.peers:
        objection = peer.supports(spec.name, case)
        if objection:
            refused[f"peer:{peer.name}"] = Row(spec.name, case.id, f"peer:{peer.name}", skipped=objection)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a peer deprecates is not the user's business
            enter(
                f"peer:{peer.name}",
                partial(peer.make, spec.name),
                partial(gate.peer_objection, tolerance=peer.tolerance, spared=peer.spared),
                sets_wanted(peer.reads(spec.name, case), plan.device) if peer.reads else MAX_SETS,
            )
    return refused, entered


def _row(
    spec: OpSpec,
    case: Case,
    contestant: Contestant,
    cost: Cost,
    peaks: dict[str, list[float]],
    torch_path: Contestant | None,
) -> Row:
    low, middle, high = quartiles(contestant.seconds)
    return Row(
        op=spec.name,
        case=case.id,
        impl=contestant.name,
        median_us=middle * 1e6,
        q25_us=low * 1e6,
        q75_us=high * 1e6,
        gbps=cost.bytes / middle / 1e9,
        tflops=cost.ops / middle / 1e12,
        roofline=roofline.share(cost, peaks, contestant.seconds) if peaks else None,
        baseline=BASELINE if torch_path else None,
        speedup=quartiles(torch_path.seconds)[1] / middle if torch_path else None,
    )
