"""``python -m burnish.testing``: what it counts, and what is repaired before it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from burnish import registry

def command(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "burnish.testing", *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, env={**os.environ, **variables})


def test_it_counts_and_fails() -> None:
    done = command("int8_quantize_rows", "--only", "forward")
    expected = len(registry.get("int8_quantize_rows").cases.test)
    assert f"int8_quantize_rows cpu: {expected}\n" in done.stdout, done.stderr
    assert done.returncode == 0
    assert command("int8_quantize_rows", "--only", "no_such_rule").returncode == 1


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
