"""What only a GPU can show of the CUDA implementations: streams, graphs, many runs, and that they agree.

The values themselves are the conformance kit's business (test_ops.py), which runs the same backends.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from burnish import registry, tuning
from burnish.arguments import map_tensors, places
from burnish.registry import Backend, Case, OpSpec
from burnish.testing import calls

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible"),
    pytest.mark.skipif(calls.interpreting(), reason="this process interprets Triton kernels"),
]

SPECS = [spec for spec in registry.all_ops().values() if spec.impls]
CONTESTANTS = [(spec, impl.backend) for spec in SPECS for impl in spec.impls]
IDS = [f"{spec.stem}-{backend}" for spec, backend in CONTESTANTS]
each_backend = pytest.mark.parametrize(("spec", "backend"), CONTESTANTS, ids=IDS)
REPLAYS, REPEATS = 100, 1000
LATE_CYCLES = 50_000_000  # 30 ms: far longer than the launches that follow take


def ordinary(spec: OpSpec, backend: Backend) -> Case:
    """The largest plain test case that the backend accepts."""
    accepted = [case for case in spec.cases.test if case.values == "normal" and min(case.dims.values()) > 1]
    accepted = [case for case in accepted if calls.objection(spec, backend, spec.make(case, backend, 0)) is None]
    if not accepted:
        pytest.skip(f"{spec.stem} on {backend}: " + str(calls.backends(spec)[1].get(backend, "no case is accepted")))
    return max(accepted, key=calls.volume)


def inputs(spec: OpSpec, backend: Backend, case: Case, seed: int) -> calls.Args:
    return calls.to_device(backend, spec.make(case, backend, seed))


def fill(kept: calls.Args, fresh: calls.Args) -> None:
    """The values of ``fresh`` into the tensors of ``kept``, those in lists too."""
    new = places(fresh)
    for place, old in places(kept).items():
        old.copy_(new[place])


def redrawn(spec: OpSpec, backend: Backend, case: Case, args: calls.Args, seed: int) -> calls.Args:
    """The case by another seed or, where that draws tensors of other shapes (a sparse weight's), ``args`` with other
    floats."""
    fresh, old = inputs(spec, backend, case, seed), places(args)
    if all(tensor.shape == old[place].shape for place, tensor in places(fresh).items()):
        return fresh
    return map_tensors(lambda tensor: tensor / (1 + seed) if tensor.is_floating_point() else tensor.clone(), args)


def assert_close(outputs: calls.Outputs, expected: calls.Outputs) -> None:
    """Within 2 ulp of fp32, and the one of the result that these can turn."""
    for one, two in zip(outputs, expected, strict=True):
        info = torch.finfo(one.dtype)
        rtol = max(4 * torch.finfo(torch.float32).eps, info.eps)
        torch.testing.assert_close(one, two, rtol=rtol, atol=info.smallest_normal * info.eps, equal_nan=True)


def assert_same(outputs: calls.Outputs, expected: calls.Outputs) -> None:
    for one, two in zip(outputs, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


@each_backend
def test_runs_on_the_current_stream(spec: OpSpec, backend: Backend) -> None:
    case = ordinary(spec, backend)
    args = inputs(spec, backend, case, 0)
    expected = calls.run(spec, backend, args)
    late = map_tensors(torch.zeros_like, args)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LATE_CYCLES)
        fill(late, args)
        outputs = calls.run(spec, backend, late)
    side.synchronize()
    assert_same(outputs, expected)


@each_backend
def test_graph_replays_equal_eager(spec: OpSpec, backend: Backend) -> None:
    case = ordinary(spec, backend)
    args = inputs(spec, backend, case, 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls.run(spec, backend, args)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = calls.run(spec, backend, args)
    first = map_tensors(torch.clone, args)
    for seed in range(REPLAYS):
        fill(args, redrawn(spec, backend, case, first, seed))
        graph.replay()
        assert_same(outputs, calls.run(spec, backend, args))


@each_backend
def test_repeated_runs_give_the_same_bits(spec: OpSpec, backend: Backend) -> None:
    args = inputs(spec, backend, ordinary(spec, backend), 0)
    expected = calls.run(spec, backend, args)
    unequal = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(REPEATS):
        for one, two in zip(calls.run(spec, backend, args), expected, strict=True):
            unequal += (one != two).sum()
    assert unequal.item() == 0


def shared_cases() -> Iterator[tuple[OpSpec, Case]]:
    """Cases in which every implementation sums integers, so that the order of the sums changes no bit."""
    for spec in SPECS:
        if len(spec.impls) > 1:
            quantized = spec.stem.startswith("int8_")
            yield from ((spec, case) for case in spec.cases.test if quantized or case.values == "integers")


@pytest.mark.parametrize(
    ("spec", "case"), list(shared_cases()), ids=lambda value: getattr(value, "stem", None) or value.id
)
def test_implementations_agree(spec: OpSpec, case: Case) -> None:
    results = {}
    for impl in spec.impls:
        args = spec.make(case, impl.backend, 0)
        if calls.objection(spec, impl.backend, args) is None:
            results[impl.backend] = calls.run(spec, impl.backend, args)
    if len(results) < 2:
        pytest.skip(f"{spec.stem} {case.id} is accepted by {', '.join(results) or 'none'} alone")
    first, *others = results.values()
    # Triton's division is within 2 ulp, CUDA C++'s is exact
    divides = case.options.get("activation", "none") not in ("none", "relu")
    for other in others:
        (assert_close if divides else assert_same)(other, first)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if tuning.has_choice(spec)], ids=lambda spec: spec.stem)
def test_the_first_call_that_is_tuned_is_like_the_second(
    spec: OpSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BURNISH_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("BURNISH_TUNE", "1")
    backends: list[Backend] = [impl.backend for impl in spec.impls]
    for case in sorted(spec.cases.test, key=calls.volume, reverse=True):
        args = spec.make(case, backends[0], 0)
        if not any(calls.objection(spec, name, args) for name in backends):
            break
    else:
        pytest.skip("no case is accepted by all")
    args = calls.to_device(backends[0], args)
    results = {name: calls.run(spec, name, args) for name in backends}
    tuning._known.cache_clear()
    first, second = (calls.as_outputs(spec.entry(*args)) for _ in range(2))
    assert tuning.times(spec, args).keys() == results.keys(), case.id
    chosen = tuning.fastest(spec, args, backends)
    assert_same(first, results[chosen])
    assert_same(second, results[chosen])
    tuning._known.cache_clear()


def check_native_again_and_again(spec: registry.OpSpec, case: Case) -> None:
    """Twenty calls, all as the reference says, where the kernel takes the case."""
    args = inputs(spec, "native", case, 0)
    if reason := calls.objection(spec, "native", args):
        pytest.skip(reason)
    expected = spec.reference(*args)
    for _ in range(20):
        assert_same(calls.run(spec, "native", args), (expected,))


@pytest.mark.parametrize("values", ["integers", "extreme", "normal"])
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16])
@pytest.mark.parametrize(("n", "k"), [(1, 131072), (64, 65536), (200, 20000), (4096, 4096), (8200, 4100)])
def test_native_int8_linear_streams_any_shape(rows: int, n: int, k: int, values: str) -> None:
    """Narrow and long weights are split over blocks; wide ones give each block several tiles."""
    spec = registry.get("int8_linear")
    case = Case({"M": rows, "N": n, "K": k}, torch.bfloat16, values)
    check_native_again_and_again(spec, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(4096, 4096, 4096), (100, 40000, 520), (2000, 1160, 11008), (1200, 4096, 1040)]
)
def test_native_bsr_linear_hands_out_tiles(m: int, n: int, k: int, density: float, dtype: torch.dtype) -> None:
    """Multiprocessors draw tiles of different length beside one another, call after call."""
    spec = registry.get("bsr_linear")
    case = Case({"M": m, "N": n, "K": k}, dtype, "integers", {"block": "128x128", "density": density})
    check_native_again_and_again(spec, case)
