"""CUDA on the CPU: planted bugs are found within sixteen schedules and named; right kernels are left in peace."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from burnish import testing
from burnish.testing import numerics

sys.path.insert(0, str(Path(__file__).parent / "emulation"))
import planted

SOURCE = Path(planted.__file__).with_suffix(".cu")
BUGS = planted.bugs_of(SOURCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    return planted.shared_folder(tmp_path_factory, worker_id)


@pytest.fixture(scope="module")
def kernels(folder: Path) -> planted.Planted:
    return planted.Planted(planted.build_once(folder, "planted.so", lambda library: planted.build(SOURCE, library)))


@pytest.mark.parametrize("kernel", planted.KERNELS)
def test_a_right_kernel_is_right_under_every_schedule(kernels: planted.Planted, kernel: str) -> None:
    for seed in range(16 if kernel == "gemm" else 1000):
        assert kernels.call(kernel, seed=seed) == (None, True)


def test_a_gemm_takes_a_fraction_of_a_second(kernels: planted.Planted) -> None:
    """256 x 256 x 512 in bf16, on one core: as measured 0.1 s, in time of the processor."""
    before = time.process_time()
    for seed in range(4):
        kernels.call("gemm", seed=seed)
    assert (time.process_time() - before) / 4 < 0.5


THREAD = r"block \(\d, \d, 0\), thread \(\d+, 0, 0\), warp \d lane \d+, planted.cu:\d+: "
ANY = r"(thread number \d+|another block)"
RACE = rf", which {ANY} (reads|writes) at planted.cu:\d+, and nothing orders the two$"
#: what the report says, by bug and kernel; None where only the result gives it away
FOUND = {
    (
        "NoBarrierBeforeRead",
        "reverse",
    ): rf"{THREAD}reads byte \d+ of shared memory(, which nothing has written$|{RACE})",
    ("NoBarrierAfterRead", "reverse"): rf"{THREAD}(reads|writes) byte \d+ of shared memory{RACE}",
    ("NoCopyWait", "copy"): rf"{THREAD}reads byte \d+ of shared memory, where a copy started at planted.cu:\d+ may",
    ("NoWarpSync", "largest"): rf"{THREAD}reads byte \d+ of shared memory(, which nothing has written$|{RACE})",
    ("UninitialisedShared", "reverse"): rf"{THREAD}reads byte 20 of shared memory, which nothing has written$",
    ("SharedOverrun", "reverse"): rf"{THREAD}writes 4 bytes at byte 256 of 256 bytes of shared memory$",
    ("Unaligned", "largest"): rf"{THREAD}an access of 16 bytes is not aligned$",
    ("RawOverrun", "reverse"): r"wrote past the end of its 256 bytes of shared memory$",
    ("DivergentBarrier", "reverse"): rf"{THREAD}__syncthreads is divergent: other threads .* came to planted.cu:\d+$",
    (
        "SkippedBarrier",
        "reverse",
    ): rf"__syncthreads is divergent|{THREAD}(reads|writes) byte \d+ of shared memory{RACE}",
    ("UnequalBarriers", "reverse"): rf"{THREAD}barrier_sync of \d\d threads, where others came to one of \d\d$|{RACE}",
    (
        "EarlyReturn",
        "reverse",
    ): r"deadlock; warp 0 lane 7: returned; warp 1, warp 0 lanes 0-6, 8-31: wait in __syncthreads at planted.cu:\d+$",
    (
        "MissingLane",
        "largest",
    ): r"deadlock; .*warp 1 lanes 0-7, 9-31: wait in shuffle_xor at planted.cu:\d+, mask 0xffffffff$",
    ("MaskWithoutSource", "largest"): rf"{THREAD}shuffle_xor: lane \d+ is not in the mask$",
    ("LostUpdate", "count"): rf"{THREAD}(reads|writes) global memory{RACE}",
    ("NoTicket", "sum"): rf"{THREAD}reads global memory{RACE}",
    ("NoBarrierBeforeTicket", "sum"): rf"{THREAD}reads global memory{RACE}",
    (
        "NoDependencyWait",
        "overlap",
    ): rf"{THREAD}reads global memory, which the launch before writes at .*dependency_wait",
    ("EndlessWait", "count"): rf"{THREAD}waits in a loop for what no thread does$",
    ("EndlessLoad", "count"): rf"{THREAD}waits in a loop for what no thread does$",
    ("NotModelled", "largest"): r"__shfl_xor_sync is not modelled",
    ("StreamFromShared", "largest"): rf"{THREAD}an access to global memory only names an address in shared memory$",
    ("CopyFromShared", "largest"): rf"{THREAD}an asynchronous copy goes from global to shared memory only$",
    ("RemoteGlobal", "largest"): rf"{THREAD}an access to another block's shared memory names an address outside of its",
    ("GridBarrierAlone", "largest"): rf"{THREAD}grid_barrier",
    ("NoBarrierBeforeRead", "gemm"): rf"{THREAD}reads byte \d+ of shared memory(, which nothing has written$|{RACE})",
    ("NoBarrierAfterRead", "gemm"): rf"{THREAD}(reads|writes) byte \d+ of shared memory{RACE}",
    ("NoCopyWait", "gemm"): rf"{THREAD}reads byte \d+ of shared memory, where a copy started at planted.cu:\d+ may",
    ("WrongFragmentLane", "gemm"): None,
    (
        "SplitProduct",
        "gemm",
    ): r"deadlock; .*: wait in mma at planted.cu:\d+, mask 0xffffffff; .*: wait in mma at planted",
    ("MatrixFromGlobal", "gemm"): rf"{THREAD}an access to shared memory only names an address outside of it$",
}


@pytest.mark.parametrize(("bug", "kernel"), FOUND)
def test_a_planted_bug_is_found(kernels: planted.Planted, bug: str, kernel: str) -> None:
    report = FOUND[bug, kernel]
    slow = kernel == "gemm" or bug.startswith("Endless")
    results = [kernels.run(kernel, BUGS.index(bug), seed) for seed in range(2 if slow else testing.SCHEDULES)]
    if report is None:
        for message, y, expected in results:
            assert message is None
            with pytest.raises(testing.Violation, match=rf"^{kernel}: y is .*, expected exactly .*: .*"):
                numerics.check_equal(kernel, "y", torch.from_numpy(y), torch.from_numpy(expected))
        return
    messages = [message for message, *_ in results if message]
    assert messages
    for message in messages:
        name = "second" if kernel == "overlap" else kernel
        assert re.match(rf"CUDA on the CPU: {name}_kernel, launched at planted.cu:\d+, block ", message), message
        assert re.search(report, message), message


def test_every_bug_is_planted() -> None:
    tried = {bug for bug, _ in FOUND} | {"None", "GlobalOverrun", "RawUnaligned"}
    assert tried == set(BUGS)


def test_sanitizers_see_the_kernels(folder: Path) -> None:
    """Global memory has no bounds of its own on a CPU; AddressSanitizer knows those of every allocation."""
    library = planted.build(SOURCE, folder / "sanitized.so", *planted.SANITIZE, "-O1")
    for kernel in planted.KERNELS:
        done = planted.run_sanitized(library, kernel, 0)
        assert (done.returncode, done.stdout, done.stderr) == (0, "(None, True)\n", "")
    found = {
        "GlobalOverrun": (r"heap-buffer-overflow[\s\S]*READ of size 4[\s\S]*reverse_kernel.*planted.cu:\d+"
                          r"[\s\S]*0 bytes (to the right of|after) 1024-byte region"),
        "RawOverrun": r"use-after-poison[\s\S]*WRITE of size 4[\s\S]*reverse_kernel.*planted.cu:\d+",
        "RawUnaligned": r"planted.cu:\d+:\d+: runtime error: .* misaligned address",
    }  # fmt: skip
    for bug, report in found.items():
        done = planted.run_sanitized(library, "reverse", BUGS.index(bug))
        assert done.returncode != 0
        assert re.search(report, done.stderr), done.stderr


def test_counters_are_exact_and_the_same_under_every_schedule(kernels: planted.Planted) -> None:
    (gemm,) = json.loads(kernels.count("gemm"))
    steps, blocks = 512 // 32, 4
    assert gemm == {
        "kernel": "gemm_kernel",
        "grid": [2, 2, 1],
        "block": [256, 1, 1],
        "shared_bytes": 2 * 2 * 128 * 64,
        "mma": 256 * 256 * 512 // (16 * 8 * 16),
        "barriers": blocks * 2 * steps,
        "bank_conflicts": 0,
        "shared_copy_requests": blocks * 2 * 128 * 512 * 2 // 512,
        "global_load_bytes": blocks * 2 * 128 * 512 * 2,
        "global_load_requests": blocks * 2 * 128 * 512 * 2 // 512,
        "global_load_sectors": blocks * 2 * 128 * 512 * 2 // 32,
        "global_store_bytes": 256 * 256 * 4,
        "global_store_requests": 256 * 256 // 32,
        "global_store_sectors": 256 * 256 // 4,
        "shared_load_requests": blocks * 8 * steps * 2 * 6,
        "read_bytes": 2 * 256 * 512 * 2,
        "written_bytes": 256 * 256 * 4,
    }
    for kernel in planted.KERNELS:
        first = kernels.count(kernel)
        assert all(kernels.count(kernel, seed) == first for seed in range(1, 3 if kernel == "gemm" else 16))
