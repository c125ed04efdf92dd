"""What burnish leaves alone: other packages, CUDA, the floating-point mode, forked children, other threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from burnish import ops, registry
from burnish.testing.calls import on_copies

OPTIONAL = ("numpy", "triton", "matplotlib", "rich", "transformers", "hypothesis", "pytest", "zentorch", "torchao")

BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
"""

USE = """
import torch, burnish
x = torch.randn(4, 64)
model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 32))
report = burnish.swap_(model, burnish.Int8())
y = model(x)
y.sum().backward()
str(report)
"""

MXCSR = """
import ctypes, mmap

def mxcsr():
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes([0x0F, 0xAE, 0x1F, 0xC3]))  # stmxcsr [rdi]; ret
    word = ctypes.c_uint32()
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(ctypes.addressof(word))
    return word.value & ~0x3F  # without the sticky exception flags
"""


def python(code: str, timeout: float = 120, **env: str) -> str:
    """stdout of code in a fresh interpreter, which must succeed in time."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_works_with_torch_alone() -> None:
    out = python(BLOCK + USE + f"print(sorted(name for name in sys.modules if name.partition('.')[0] in {OPTIONAL!r}))")
    assert out.strip() == "[]"


def test_importing_loads_no_optional_package() -> None:
    code = (
        "import json, sys, torch\nbefore = set(sys.modules)\nimport burnish\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    added = json.loads(python(code))
    tops = {name.partition(".")[0] for name in added}
    assert not tops & {*OPTIONAL, "setuptools", "ninja", "pybind11", "subprocess"}
    assert not [
        name for name in added if name.startswith(("torch._inductor", "torch._dynamo", "torch.utils.cpp_extension"))
    ]


def test_importing_writes_nothing_and_starts_no_process(tmp_path: Any) -> None:
    code = """
import sys, torch
seen = []
def hook(event, args):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.fork", "socket.connect"):
        seen.append(event)
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        seen.append(args[0])
sys.addaudithook(hook)
sys.dont_write_bytecode = True
import burnish
print(seen)
"""
    assert python(code).strip() == "[]"


def test_importing_and_running_do_not_start_cuda() -> None:
    code = (
        "import torch, burnish\nassert not torch.cuda.is_initialized()\n"
        + USE
        + "assert not torch.cuda.is_initialized()"
    )
    python(code)


def test_the_floating_point_mode_is_untouched() -> None:
    """Neither flush-to-zero nor another rounding, in this thread and in a worker of torch's pool."""
    code = (
        MXCSR
        + "before_torch = mxcsr()\nimport torch\nbefore = mxcsr()\nimport burnish\nafter_import = mxcsr()\n"
        + USE
        + "after = mxcsr()\nassert before_torch == before == after_import == after == 0x1F80, "
        "[hex(v) for v in (before_torch, before, after_import, after)]\n"
        "torch.set_num_threads(2)\n"
        "tiny = torch.full((1 << 20,), 2.0**-126) * 0.5\nassert (tiny > 0).all(), 'subnormals are flushed'"
    )
    python(code)


def test_threads_of_torch_keep_subnormals_after_an_op() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for spec in registry.all_ops().values():
            spec.entry(*spec.make(spec.cases.test[-1], "cpu", 0))
        assert (torch.full((1 << 20,), 2.0**-126) * 0.5 > 0).all()
    finally:
        torch.set_num_threads(before)


FORK = """
import os, signal, sys, torch, burnish
torch.set_num_threads(2)
w = burnish.ops.int8_linear_pack(torch.randint(-127, 128, (512, 512), dtype=torch.int8))
x, s = torch.randn(64, 512), torch.rand(512)
expected = burnish.ops.int8_linear(x, w, s)  # starts torch's pool
child = os.fork()
if child == 0:
    signal.alarm(30)
    {threads}
    os._exit(0 if torch.equal(burnish.ops.int8_linear(x, w, s), expected) else 3)
_, status = os.waitpid(child, 0)
print("signal", os.WTERMSIG(status)) if os.WIFSIGNALED(status) else print("exit", os.WEXITSTATUS(status))
assert torch.equal(burnish.ops.int8_linear(x, w, s), expected)
"""


@pytest.mark.parametrize("threads", ["torch.set_num_threads(1)", "pass"])
def test_a_child_forked_after_the_first_op_works(threads: str) -> None:
    """Set to one thread, as DataLoader does, and not: there torch's own operators hang, since OpenMP's pool is gone."""
    assert python(FORK.format(threads=threads), timeout=60).strip() == "exit 0"


def test_workers_of_a_data_loader_run_ops() -> None:
    code = """
import torch, burnish
from torch.utils.data import DataLoader

class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.w = burnish.ops.int8_linear_pack(torch.ones(64, 64, dtype=torch.int8))
    def __len__(self):
        return 16
    def __getitem__(self, i):
        return burnish.ops.int8_linear(torch.full((64,), float(i)), self.w, torch.ones(64))

torch.set_num_threads(2)
rows = Rows()
rows[1]
got = torch.cat(list(DataLoader(rows, batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=30)))
assert torch.equal(got, torch.stack([rows[i] for i in range(16)]))
"""
    python(code, timeout=90)


@pytest.mark.parametrize("name", registry.all_ops())
def test_eight_threads_on_one_set_of_arguments_agree(name: str) -> None:
    spec = registry.get(name)
    cases = [case for case in spec.cases.test if case.values == "normal"][-4:]
    call = on_copies(spec, spec.entry)
    work = [(args, call(*args)) for args in (spec.make(case, "cpu", 0) for case in cases)]
    wrong: list[str] = []
    together = threading.Barrier(8)

    def run() -> None:
        together.wait()
        for _ in range(50):
            for args, expected in work:
                if not all(torch.equal(y, wanted) for y, wanted in zip(call(*args), expected, strict=True)):
                    wrong.append(name)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_global_modes_of_torch_are_untouched() -> None:
    code = """
import torch
def state():
    return (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.initial_seed(),
            torch.backends.mkldnn.enabled, torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().sum().item())
torch.manual_seed(0)
before = state()
import burnish
x = torch.ones(4, 64)
before_ops = state()
for spec in burnish.registry.all_ops().values():
    spec.entry(*spec.make(spec.cases.test[0], "cpu", 0))
assert before == before_ops == state(), (before, before_ops, state())
"""
    python(code)


def test_ops_take_no_randomness() -> None:
    before = torch.get_rng_state()
    ops.int8_quantize_rows(torch.ones(3, 5))
    assert torch.equal(torch.get_rng_state(), before)
