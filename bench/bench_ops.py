"""Every registered op under pytest-benchmark: ``pytest bench/bench_ops.py --benchmark-only``.

Generated from the registry, with the arguments, the gate and the implementations of ``burnish bench``. Use that command
for comparisons, since it interleaves the contestants; use this one for pytest-benchmark's histories and ``-k``.
"""

from itertools import cycle

import pytest
import torch
from burnish.bench.gate import Gate
from burnish.bench.runner import implementation, implementations, select_cases
from burnish.bench.timing import argument_sets
from burnish.errors import BackendError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = select_cases()
IDS = [f"{spec.name}-{case.id}" for spec, case in CASES]


@pytest.mark.parametrize(("spec", "case"), CASES, ids=IDS)
@pytest.mark.parametrize("backend", ["baseline", "cpu", "native", "triton"])
def test_op(benchmark, spec, case, backend):
    backends = implementations(spec, DEVICE)
    if backend != "baseline" and backend not in backends:
        pytest.skip(f"{backend} is no implementation of {spec.name} on {DEVICE}")
    layout = backends[0] if backend == "baseline" else backend
    sets = argument_sets(spec, case, layout, DEVICE, contestants=1)
    try:
        if backend == "baseline":
            calls = [spec.baseline(*args) for args in sets]
        else:
            calls = [implementation(spec, backend, args) for args in sets]
            assert Gate(spec, sets[0]).objection(calls[0]) is None
    except BackendError as error:
        pytest.skip(str(error))
    turn = cycle(calls)
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None

    def call() -> None:
        next(turn)()
        wait()

    with torch.inference_mode():
        benchmark(call)
