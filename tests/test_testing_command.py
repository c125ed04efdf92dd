"""``python -m burnish.testing``: what it counts and says of a crash, and what is repaired before it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from burnish import registry

CRASHING = """
import ctypes
import torch
from dataclasses import replace
import pytest
from burnish import registry

ROWS = registry.get("int8_quantize_rows")
SPEC = registry.register(replace(ROWS, name="crashing::quantize_rows", impls=()))

def kernel(x):
    if x.shape == (3, 17) and x.dtype == torch.bfloat16:
        ctypes.string_at(0)
    return ROWS.reference(x)

registry._libraries[-1].impl("quantize_rows", kernel, "CPU")
"""


def command(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "burnish.testing", *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, env={**os.environ, **variables})


def test_it_counts_and_fails() -> None:
    done = command("int8_quantize_rows", "--only", "forward")
    expected = len(registry.get("int8_quantize_rows").cases.test)
    assert f"int8_quantize_rows cpu: {expected}\n" in done.stdout, done.stderr
    assert done.returncode == 0
    assert command("int8_quantize_rows", "--only", "no_such_rule").returncode == 1


def test_an_unknown_op_gives_one_line() -> None:
    done = command("no_such_op")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "python -m burnish.testing: error: no op named 'no_such_op'; the ops"
    )


def test_a_crash_names_its_check(tmp_path: Path) -> None:
    (tmp_path / "crashing.py").write_text(CRASHING)
    (tmp_path / "crashing-1.dist-info").mkdir()
    (tmp_path / "crashing-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: crashing\nVersion: 1\n")
    (tmp_path / "crashing-1.dist-info" / "entry_points.txt").write_text("[burnish.ops]\nquantize_rows = crashing\n")
    done = command("crashing::quantize_rows", "--only", "forward", PYTHONPATH=str(tmp_path))
    assert done.returncode == -11, done.stderr
    assert 'File "check quantize_rows-cpu-forward-M3-K17-bf16"' in done.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_products_are_right_under_the_interpreter() -> None:
    code = (
        "from burnish import registry, testing\n"
        "checks = {check.id: check for check in testing.plan([registry.get('lowrank_linear')]).checks}\n"
        "checks['lowrank_linear-triton-forward-M3-N17-K33-R5-bf16'].run()"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
