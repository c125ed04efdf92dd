"""An op from another package, ``example_op/``, is found, tested, explained and timed by the same code as ours.

It is installed into a folder of its own, with an entry point of the group ``burnish.ops``, a C++ kernel and a CUDA C++
kernel that runs on the CPU.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "example_op"
OPS = ("softcap_ops::softcap", "softcap_ops::softcap_backward")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Where the package is installed; the workers of a parallel run share it."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    folder = shared / "example_op"
    with (shared / "example_op.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "installed").exists():
            shutil.copytree(
                SOURCE, folder / "source", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
            )
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
            _run([*pip, "--target", str(folder / "site"), str(folder / "source")])
            (folder / "installed").touch()
    return folder / "site"


def _run(command: list[str], site: Path | None = None, cwd: Path | None = None, **variables: str) -> str:
    # one thread, as in the tests' own processes: the workers fill the cores
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1", **variables}
    if site is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_is_found_by_its_entry_point(site: Path) -> None:
    code = (
        "import sys, burnish, torch\n"
        "assert 'softcap_ops' not in sys.modules\n"
        "print(*burnish.registry.all_ops())\n"
        f"print(burnish.explain({OPS[0]!r}, torch.ones(2, 3), 30.0))"
    )
    names, *table = _run([sys.executable, "-c", code], site).splitlines()
    assert set(OPS) < set(names.split())
    assert table[0] == f"{OPS[0]}: cpu runs"


def test_it_passes_the_conformance_kit_from_the_command_line(site: Path) -> None:
    out = _run([sys.executable, "-m", "burnish.testing", *OPS, "--fuzz=50"], site)
    counts = dict(re.findall(r"^(softcap_ops::\w+ cpu(?: fuzzed)?): (\d+)$", out, re.MULTILINE))
    assert int(counts[f"{OPS[0]} cpu"]) >= 150
    assert int(counts[f"{OPS[1]} cpu"]) >= 100
    assert all(int(counts[f"{op} cpu fuzzed"]) >= 50 for op in OPS)


def test_its_cuda_kernel_runs_on_the_cpu(site: Path, tmp_path: Path) -> None:
    out = _run([sys.executable, "-m", "burnish.testing", OPS[0]], site, BURNISH_EMULATE_CUDA="1")
    counts = dict(re.findall(r"^(softcap_ops::\w+ native): (\d+)$", out, re.MULTILINE))
    assert int(counts[f"{OPS[0]} native"]) >= 100
    path = tmp_path / "counters.json"
    _run([sys.executable, "-m", "burnish.cli", "bench", "--counters", OPS[0], "--json", str(path)], site)
    (row,) = json.loads(path.read_text())["counters"]
    size = 64 * 4096 * 2
    assert (row["compulsory_bytes"], row["moved_bytes"]) == (2 * size, 2 * size)
    (launch,) = row["launches"]
    assert launch["kernel"].endswith("softcap_fwd_kernel<bf16>")
    assert launch["global_load_requests"] == launch["global_store_requests"] == size // 512
    assert launch["global_load_sectors"] == launch["global_store_sectors"] == size // 32


def test_the_authors_own_tests_pass(site: Path, tmp_path: Path) -> None:
    shutil.copy(SOURCE / "test_softcap.py", tmp_path)
    out = _run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=.", "."], site, tmp_path)
    passed = re.search(r"(\d+) passed", out)
    assert passed, out
    assert int(passed[1]) >= 250


def test_it_is_timed_beside_its_baseline(site: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    _run([sys.executable, "-m", "burnish.cli", "bench", OPS[0], "--rounds=2", "--json", str(out)], site)
    rows = {row["impl"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"cpu", "peer:torch"}
    for row in rows.values():
        assert row["case"] == "M64-N4096-bf16"
        assert row["median_us"] > 0
        assert row["gbps"] > 0


def test_the_doctor_lists_it(site: Path) -> None:
    out = _run([sys.executable, "-m", "burnish.cli", "doctor"], site)
    assert all(op in out for op in OPS)
