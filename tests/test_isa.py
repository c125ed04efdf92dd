"""The CPU kernels at every instruction set this machine has: the same rules and, of ops that sum integers, the same
bits.

``BURNISH_CPU_ISA`` is read once a process, so each level runs the conformance kit, and the tests of what is not among
the kit's cases, in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from burnish import registry

LEVELS = ("generic", "avx2", "avx512")
#: of the values of results, and of what a process does to get them
RULES_OF_VALUES, RULES = ("forward", "unbiased", "special"), ("guard", "layout", "gradient")
#: rule C3 holds at every level; the level this process runs at is fuzzed by test_fuzz.py
EXAMPLES = 500
#: of ops on lists of tensors, which differ in little more than their sizes
EXAMPLES_OF_LISTS = 100
#: ops whose bits depend on whether the processor multiplies bf16 in pairs and how wide its vectors are
FLOAT_SUMS = {
    "int8_linear_backward": ["int8_linear_backward"],
    **{
        stem: [stem, f"{stem}_backward"]
        for stem in ("lowrank_linear", "lora_linear", "bsr_linear", "sparse24_linear", "sparse_linear")
    },
}
FLOATS = {op for ops in FLOAT_SUMS.values() for op in ops}
#: tests of edges that the kit's cases do not have, each quick
EDGES = (
    "test_sparse_formats.py",
    "test_sparse_patterns.py",
    "test_large_results.py",
    "test_subnormals.py",
    "test_int8_extremes.py",
)
OURS = {name: spec for name, spec in registry.all_ops().items() if spec.namespace == "burnish"}
LISTS = [name for name, spec in OURS.items() if "Tensor[]" in spec.schema]
EXACT = [name for name in OURS if name not in FLOATS]


def levels() -> tuple[str, ...]:
    """The levels up to the one that this machine chooses."""
    if os.environ.get("BURNISH_CPU_ISA"):
        pytest.skip("BURNISH_CPU_ISA is set: this process is one of those that this test starts")
    return LEVELS[: LEVELS.index(torch.ops.burnish.cpu_isa()) + 1]


@pytest.fixture(params=LEVELS[:-1])
def level(request: pytest.FixtureRequest) -> str:
    """A level that this machine has and is not the highest there is."""
    if request.param not in levels():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


def run(*command: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=500, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_the_level_is_the_one_asked_for() -> None:
    for level in levels():
        out = run("-c", "import torch, burnish; print(torch.ops.burnish.cpu_isa())", BURNISH_CPU_ISA=level)
        assert out.strip() == level


def digests(level: str, ops: Iterable[str] = (), *options: str) -> dict[str, str]:
    """A hash of the bits of each op's results."""
    out = run("-m", "burnish.testing", *ops, "--digest", "--backend=cpu", *options, BURNISH_CPU_ISA=level)
    return dict(re.findall(r"^(\w+) cpu ([0-9a-f]{64})$", out, re.MULTILINE))


def test_levels_and_thread_counts_agree_bit_for_bit() -> None:
    tables = {(level, threads): digests(level, (), "--threads", threads) for level in levels() for threads in "12"}
    assert OURS.keys() > FLOATS
    for (level, threads), table in tables.items():
        assert table.keys() == OURS.keys()
        for op, digest in table.items():
            assert digest == tables[level, "1"][op], f"{op} at {level} depends on the number of threads, {threads}"
            if op not in FLOATS:
                assert digest == tables["generic", "1"][op], f"{op} at {level} differs from generic"


@pytest.mark.parametrize("lists", [False, True], ids=["layers", "lists"])
def test_fuzzed_and_special_inputs_give_the_same_bits_at_every_level(lists: bool) -> None:
    """So the rules of values, which hold at the level of this process, hold at the others."""
    ops = [name for name in EXACT if (name in LISTS) == lists]
    fuzzed = f"--fuzz={EXAMPLES_OF_LISTS if lists else EXAMPLES}"
    tables = {level: digests(level, ops, fuzzed) for level in levels()}
    for level, table in tables.items():
        assert table.keys() == set(ops)
        assert table == tables["generic"], f"{level} differs from generic"


@pytest.mark.parametrize(
    ("ops", "rules", "examples"),
    [
        *(pytest.param(ops, RULES_OF_VALUES + RULES, EXAMPLES, id=name) for name, ops in FLOAT_SUMS.items()),
        pytest.param(EXACT, RULES, 0, id="exact"),
    ],
)
def test_the_rules_hold_at_a_lower_level(level: str, ops: list[str], rules: tuple[str, ...], examples: int) -> None:
    chosen = [f"--only={rule}" for rule in rules]
    out = run("-m", "burnish.testing", *ops, "--backend=cpu", *chosen, f"--fuzz={examples}", BURNISH_CPU_ISA=level)
    for op in ops:
        counts = dict(re.findall(rf"^{op} (cpu|cpu fuzzed): (\d+)$", out, re.MULTILINE))
        assert int(counts["cpu"]) >= len(rules) // 2 * len(registry.get(op).cases.test)
        assert int(counts.get("cpu fuzzed", 0)) >= examples


def test_edges_hold_at_a_lower_level(level: str) -> None:
    files = [str(Path(__file__).parent / name) for name in EDGES]
    out = run("-m", "pytest", "-p", "no:cacheprovider", *files, BURNISH_CPU_ISA=level)
    assert all(f"of tests/{name}" in out for name in EDGES)
