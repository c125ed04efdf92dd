"""What each CUDA C++ kernel moves and does on its benchmark cases: exactly what ``counters.json`` says.

``BURNISH_EMULATE_CUDA=1 pytest tests/test_counters.py`` compares. A change that means to move less, or must move more,
writes the file anew and shows the difference in its commit:

    burnish bench --counters --json tests/counters.json
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from burnish import native, registry
from burnish.bench import counters, select_cases

pytestmark = pytest.mark.skipif(not native.emulating(), reason="needs BURNISH_EMULATE_CUDA=1")

#: the most that a launch sequence may move beyond the compulsory bytes; workspaces are inside it, but for many rows of
#: x quantised, which one launch writes and the next reads
MOST = 1.02
#: bytes that a launch over a list of tensors moves for each beside its elements: what it must know of it, its step and
#: sums
TABLE = 256
RECORDED = json.loads(Path(__file__).with_name("counters.json").read_text())["counters"]
OPS = [spec for spec in registry.all_ops().values() if any(impl.backend == "native" for impl in spec.impls)]


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_counters_are_as_recorded(spec: registry.OpSpec) -> None:
    cases = {case.id: case for _, case in select_cases([spec.name])}
    counts = counters.count(select_cases([spec.name]))
    found = json.loads(counters.to_json(counts))["counters"]
    recorded = {row["case"]: row for row in RECORDED if row["op"] == spec.name}
    assert {row["case"] for row in found} == recorded.keys()
    assert found, f"{spec.name} has a CUDA C++ kernel and no benchmark case that it takes"
    for row in found:
        for launch, expected in zip(row["launches"], recorded[row["case"]]["launches"], strict=True):
            changed = {
                name: (expected.get(name), launch.get(name))
                for name in expected.keys() | launch.keys()
                if expected.get(name) != launch.get(name)
            }
            assert not changed, f"{spec.name} {row['case']} {launch['kernel']}: {{counter: (recorded, now)}} {changed}"
        first = row["launches"][0]
        quantised = first["written_bytes"] if first["kernel"].startswith("int8_quantize_rows") else 0
        first_argument = spec.make(cases[row["case"]], "native", 0)[0]
        listed = len(first_argument) if isinstance(first_argument, list) else 0
        compulsory = row["compulsory_bytes"] + TABLE * listed * len(row["launches"])
        assert row["moved_bytes"] <= max(MOST * compulsory, compulsory + 2 * quantised)


def test_counters_do_not_depend_on_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = select_cases(["int8_linear"], shapes=[(3, 80, 2000)])
    first = counters.to_json(counters.count(cases))
    seed = torch.ops.burnish.emulation_seed
    for shift in range(1, 4):
        monkeypatch.setattr(torch.ops.burnish, "emulation_seed", lambda number, shift=shift: seed(number + shift))
        assert counters.to_json(counters.count(cases)) == first


def test_a_kernel_that_moves_more_is_seen() -> None:
    """The bytes of x appear once for the quantised rows, and q's once for each block that needs them."""
    (narrow,) = counters.count(select_cases(["int8_linear"], shapes=[(16, 512, 1024)]))
    rows, linear = narrow.launches
    assert rows.count("global_load_bytes") == 16 * 1024 * 2
    assert rows.count("global_store_bytes") == 16 * 1024 + 16 * 4
    weights, blocks = 512 * 1024, linear.grid[0]
    assert linear.count("global_load_bytes") >= weights + blocks * 16 * 1024
    assert linear.through_l2 > linear.moved
    assert linear.count("mma") == 2 * 512 // 16 * 1024 // 32
