"""CUDA C++ kernels for few rows, on the CPU, one after another: what blocks count in is as the next launch needs it.

``BURNISH_EMULATE_CUDA=1 pytest tests/test_few_rows.py``; what a launch does by itself is the conformance kit's business
(test_ops.py), whose weights are too small to be split over blocks.
"""

from __future__ import annotations

import threading

import pytest
import torch
from burnish import native, registry
from burnish.registry import Case

pytestmark = pytest.mark.skipif(not native.emulating(), reason="needs BURNISH_EMULATE_CUDA=1")

#: long rows of few outputs, which are split over blocks
SPLIT = [(1, 1, 65536), (3, 70, 33000)]


def run(op: str, dims: dict[str, int], seed: int, **options: object) -> None:
    spec = registry.get(op)
    case = Case(dims, torch.bfloat16, "integers", options=options)
    args = spec.make(case, "native", seed)
    torch.ops.burnish.emulation_seed(seed)
    assert torch.equal(spec.overload("native")(*args), spec.reference(*args))


@pytest.mark.parametrize(("m", "n", "k"), SPLIT)
def test_splits_meet_again_and_again(m: int, n: int, k: int) -> None:
    for seed in range(3):
        run("int8_linear", {"M": m, "N": n, "K": k}, seed)


def test_a_grid_s_barrier_and_tickets_do_not_meet() -> None:
    for seed in range(4):
        run("lowrank_linear", {"M": 2, "N": 300, "K": 1304, "R": 12}, seed)
        run("int8_linear", {"M": 1, "N": 20, "K": 33000}, seed)


def test_each_stream_has_its_own() -> None:
    """Streams of a CPU are threads."""
    failed: list[BaseException] = []

    def several() -> None:
        try:
            for seed in range(3):
                run("int8_linear", {"M": 1, "N": 20, "K": 33000}, seed)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=several) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
