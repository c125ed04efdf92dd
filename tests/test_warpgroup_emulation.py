"""Planted bugs in a kernel of sm_90a's copies, barriers and products: found within sixteen schedules, and named."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from burnish import testing

sys.path.insert(0, str(Path(__file__).parent / "emulation"))
import planted

SOURCE = Path(planted.__file__).with_name("planted_warpgroup.cu")
BUGS = planted.bugs_of(SOURCE)
FILE = re.escape(SOURCE.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    return planted.shared_folder(tmp_path_factory, worker_id)


@pytest.fixture(scope="module")
def ring(folder: Path) -> planted.Planted:
    library = planted.build_once(folder, "planted-warpgroup.so", lambda library: planted.build(SOURCE, library))
    return planted.Planted(library, ["ring"])


def test_a_right_kernel_is_right_under_every_schedule(ring: planted.Planted) -> None:
    for seed in range(400):
        assert ring.call("ring", seed=seed) == (None, True)


THREAD = rf"block \(0, 0, 0\), thread \(\d+, 0, 0\), warp \d lane \d+, {FILE}:\d+: "
RACE = rf", which thread number \d+ (reads|writes) at {FILE}:\d+, and nothing orders the two$"
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


@pytest.mark.parametrize("bug", FOUND)
def test_a_planted_bug_is_found(ring: planted.Planted, bug: str) -> None:
    report, wrong = FOUND[bug]
    results = [ring.call("ring", BUGS.index(bug), seed) for seed in range(testing.SCHEDULES)]
    assert any(message is None and not right for message, right in results) == wrong
    messages = [message for message, _ in results if message]
    assert bool(messages) == (report is not None)
    for message in messages:
        assert re.match(rf"CUDA on the CPU: ring_kernel, launched at {FILE}:\d+, block ", message), message
        assert re.search(report or "", message), message


def test_every_bug_is_planted() -> None:
    assert ["None", *FOUND] == BUGS


def test_sanitizers_see_the_kernel(folder: Path) -> None:
    library = planted.build(SOURCE, folder / "sanitized-warpgroup.so", *planted.SANITIZE, "-O1")
    done = planted.run_sanitized(library, "ring", 0)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(None, True)\n", "")
