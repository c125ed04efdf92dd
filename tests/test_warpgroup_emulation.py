"""Planted bugs in kernels of sm_90a's copies, barriers and products: found within sixteen schedules, and named."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from burnish import testing

sys.path.insert(0, str(Path(__file__).parent / "emulation"))
import planted

RING, PAIR = (Path(planted.__file__).with_name(f"planted_{name}.cu") for name in ("warpgroup", "pair"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    return planted.shared_folder(tmp_path_factory, worker_id)


def library(folder: Path, source: Path, kernel: str) -> planted.Planted:
    built = planted.build_once(folder, f"{source.stem}.so", lambda library: planted.build(source, library))
    return planted.Planted(built, [kernel])


@pytest.mark.parametrize(("source", "kernel"), [(RING, "ring"), (PAIR, "pair")])
def test_a_right_kernel_is_right_under_every_schedule(folder: Path, source: Path, kernel: str) -> None:
    right = library(folder, source, kernel)
    for seed in range(400):
        assert right.call(kernel, seed=seed) == (None, True)


FILE = r"planted_(warpgroup|pair)\.cu"
THREAD = rf"block \(\d, 0, 0\), thread \(\d+, 0, 0\), warp \d lane \d+, {FILE}:\d+: "
RACE = rf", which (thread number \d+|another block) (reads|writes) at {FILE}:\d+, and nothing orders the two$"
RACES = rf"{THREAD}(reads|writes) byte \d+ of shared memory{RACE}"
UNWRITTEN = rf"{THREAD}reads byte \d+ of shared memory, which nothing has written$"
DEADLOCK = rf"deadlock; .*wait in tile_barrier_wait at {FILE}:\d+"
UNDER_WAY = rf"{THREAD}ends while stores of tiles or products are under way$"
#: what the report says, by bug; True where some schedules give a wrong result instead
FOUND = {
    "NoInit": (UNWRITTEN, False),
    "NotReady": (rf"{THREAD}reads beside the threads what .*, without copies_see_stores$", False),
    "NoBarrierAfterInit": (UNWRITTEN, False),
    "MisalignedTile": (rf"{THREAD}load_tile: the tile is not aligned to 1024 bytes$", False),
    "LineWithinUnit": (rf"{THREAD}load_tile: a line starts at byte 8, no multiple of 16$", False),
    "NoEmptyWait": (rf"{THREAD}arrives at a barrier of tiles for which all have arrived$", False),
    "NoFullWait": (rf"{UNWRITTEN}|{RACES}|{THREAD}reads byte \d+ of shared memory, where a copy started at", False),
    "WrongFullParity": (DEADLOCK, False),
    "WrongEmptyParity": (DEADLOCK, False),
    "FewBytes": (rf"{DEADLOCK}|{RACES}|{THREAD}reads byte \d+ of shared memory, where a copy started at", False),
    "ManyBytes": (DEADLOCK, False),
    "FewArrivals": (DEADLOCK, False),
    "ManyArrivals": (RACES, False),
    "EarlyRelease": (RACES, False),
    "NoReleaseOfLast": (DEADLOCK, False),
    "NoFence": (rf"{THREAD}warpgroup_mma_sparse without warpgroup_fence after its sums were waited for$", False),
    "NoCommit": (rf"{RACES}|{UNDER_WAY}", False),
    "EarlySums": (RACES, True),
    "ProductsUnderWay": (UNDER_WAY, False),
    "DifferentTiles": (rf"{THREAD}warpgroup_mma_sparse: the lanes of a warp name different tiles$", False),
    "NoCopiesSeeStores": (rf"{THREAD}reads beside the threads what .*, without copies_see_stores$", False),
    "NoBarrierBeforeStore": (RACES, False),
    "NoStoreWait": (None, True),
    "NoBarrierAfterStoreWait": (RACES, False),
    "NoStoreCommit": (UNDER_WAY, True),
    "StoresUnderWay": (UNDER_WAY, False),
}
#: the same for a pair of blocks
IN_ORDER = rf"{THREAD}(reads|writes) global memory{RACE}"
FOUND_PAIR = {
    "NotTogether": (rf"{THREAD}grid_arrive in a launch that is not cooperative$", False),
    "NoShow": (rf"{THREAD}reads beside the threads what .*, without copies_see_global_stores$", False),
    "NoSyncwarp": (IN_ORDER, False),
    "NoArrive": (rf"deadlock; .*wait in grid_wait at {FILE}:\d+|{THREAD}grid_wait before any grid_arrive$", False),
    "NoGridWait": (IN_ORDER, False),
    "NoBarrierAtEnd": (
        rf"{THREAD}(an access to the shared memory of|a tile arrives in) a block that has ended$",
        False,
    ),
    "OwnBlockOnly": (DEADLOCK, False),
    "HalfTheBytes": (
        rf"{DEADLOCK}|{UNWRITTEN}|{RACES}|{THREAD}reads byte \d+ of shared memory, where a copy started at",
        False,
    ),
    "GivenBackToOne": (DEADLOCK, False),
}


def check(kernel: planted.Planted, name: str, source: Path, bug: str, report: str | None, wrong: bool) -> None:
    number = planted.bugs_of(source).index(bug)
    results = [kernel.call(name, number, seed) for seed in range(testing.SCHEDULES)]
    assert any(message is None and not right for message, right in results) == wrong
    messages = [message for message, _ in results if message]
    assert bool(messages) == (report is not None)
    for message in messages:
        assert re.match(rf"CUDA on the CPU: {name}_kernel, launched at {FILE}:\d+, block ", message), message
        assert re.search(report or "", message), message


@pytest.mark.parametrize("bug", FOUND)
def test_a_planted_bug_is_found(folder: Path, bug: str) -> None:
    check(library(folder, RING, "ring"), "ring", RING, bug, *FOUND[bug])


@pytest.mark.parametrize("bug", FOUND_PAIR)
def test_a_planted_bug_of_a_pair_is_found(folder: Path, bug: str) -> None:
    check(library(folder, PAIR, "pair"), "pair", PAIR, bug, *FOUND_PAIR[bug])


def test_every_bug_is_planted() -> None:
    assert ["None", *FOUND] == planted.bugs_of(RING)
    assert ["None", *FOUND_PAIR] == planted.bugs_of(PAIR)


def test_sanitizers_see_the_kernel(folder: Path) -> None:
    library = planted.build(RING, folder / "sanitized-warpgroup.so", *planted.SANITIZE, "-O1")
    done = planted.run_sanitized(library, "ring", 0)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(None, True)\n", "")
