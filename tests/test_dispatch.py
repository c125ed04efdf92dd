"""Which backend runs, who decides, and what a refusal says; the choice within one is in test_dispatch_choice.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import burnish
import pytest
import torch
from burnish import dispatch, native, ops, registry
from burnish.errors import BackendError
from burnish.registry import OpSpec

PACKAGE = Path(burnish.__file__).parent


def python(code: str, *, path: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, with ``path`` first on sys.path."""
    full = {**os.environ, **env}
    if path is not None:
        full["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, "-c", code], env=full, capture_output=True, text=True, timeout=120)


@pytest.fixture
def linear() -> tuple[Any, ...]:
    """x, weight, scale, bias of a small layer."""
    spec = registry.get("int8_linear")
    return spec.make(spec.cases.test[0], "cpu", 0)[:4]


# --- use_backend and BURNISH_BACKEND


def test_backends_nest_and_are_restored() -> None:
    assert dispatch.forced() is None
    with burnish.use_backend("reference"):
        assert dispatch.forced() == "reference"
        with burnish.use_backend("cpu"):
            assert dispatch.forced() == "cpu"
            with burnish.use_backend("auto"):
                assert dispatch.forced() is None
        assert dispatch.forced() == "reference"
        with pytest.raises(KeyError), burnish.use_backend("triton"):
            raise KeyError
        assert dispatch.forced() == "reference"
    assert dispatch.forced() is None
    assert dispatch.overrides == int(os.environ.get("BURNISH_BACKEND", "auto") not in ("", "auto"))


def test_a_backend_is_forced_in_its_own_thread_only() -> None:
    seen: list[Any] = []
    with burnish.use_backend("reference"):
        other = threading.Thread(target=lambda: seen.append(dispatch.forced()))
        other.start()
        other.join()
    assert seen == [None]


def test_many_threads_each_with_a_backend() -> None:
    words = ("reference", "cpu", "triton", "native") * 4
    wrong: list[str] = []
    together = threading.Barrier(len(words))

    def work(word: str) -> None:
        for _ in range(200):
            with burnish.use_backend(word):
                if dispatch.forced() != word:
                    wrong.append(word)
        together.wait()

    before = dispatch.overrides
    threads = [threading.Thread(target=work, args=(word,)) for word in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert dispatch.overrides == before


def test_the_reference_can_be_forced(linear: tuple[Any, ...]) -> None:
    expected = ops.int8_linear(*linear)
    with burnish.use_backend("reference"):
        assert torch.equal(ops.int8_linear(*linear), expected)


def test_a_forced_backend_differentiates(linear: tuple[Any, ...]) -> None:
    x, *rest = linear
    grads = []
    for word in ("cpu", "reference"):
        leaf = x.clone().requires_grad_()
        with burnish.use_backend(word):
            ops.int8_linear(leaf, *rest, activation="gelu").square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("forward", ["reference", "cpu", "auto"])
def test_a_gradient_is_the_forwards_backends_wherever_it_runs(forward: str, linear: tuple[Any, ...]) -> None:
    x = linear[0].requires_grad_()
    seen = []

    def spy(spec: OpSpec, args: tuple[Any, ...], needs_grad: bool) -> Any:
        seen.append((spec.stem, dispatch.forced()))
        return call(spec, args, needs_grad)

    call = dispatch.call
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dispatch, "call", spy)
        with burnish.use_backend(forward):
            y = ops.int8_linear(x, *linear[1:])
        other = threading.Thread(target=y.sum().backward)
        other.start()
        other.join()
    word = None if forward == "auto" else forward
    assert seen == [("int8_linear", word), ("int8_linear_backward", word)]
    assert x.grad is not None
    assert dispatch.overrides == int(os.environ.get("BURNISH_BACKEND", "auto") not in ("", "auto"))


@pytest.mark.parametrize("word", ["cuda", "CPU", "native ", "", "None"])
def test_use_backend_refuses_other_words(word: str) -> None:
    with (
        pytest.raises(
            ValueError, match=f"use_backend is {word!r}, expected one of: reference, cpu, triton, native, auto"
        ),
        burnish.use_backend(word),
    ):
        pass
    assert dispatch.forced() is None


CALL = "import torch, burnish; print(burnish.ops.int8_quantize_rows(torch.ones(2, 3))[0].tolist())"


@pytest.mark.parametrize("word", ["auto", "", "cpu", "reference"])
def test_the_environment_chooses(word: str) -> None:
    done = python(CALL, BURNISH_BACKEND=word)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[127, 127, 127], [127, 127, 127]]"


@pytest.mark.parametrize(
    ("word", "error", "message"),
    [
        ("gpu", "ValueError", "BURNISH_BACKEND is 'gpu', expected one of: reference, cpu, triton, native, auto"),
        ("Cpu", "ValueError", "BURNISH_BACKEND is 'Cpu', expected one of"),
        ("cpu,native", "ValueError", "BURNISH_BACKEND is 'cpu,native', expected one of"),
        ("triton", "BackendError", "triton: the tensors are on the CPU, Triton runs on a GPU"),
        ("native", "BackendError", "native: "),
    ],
)
def test_the_environment_asks_for_what_cannot_be(word: str, error: str, message: str) -> None:
    done = python(CALL, BURNISH_BACKEND=word)
    assert done.returncode == 1
    assert f"{error}: " in done.stderr
    assert message in done.stderr


def test_a_context_manager_beats_the_environment() -> None:
    code = CALL.replace("import torch, burnish;", "import torch, burnish\nwith burnish.use_backend('auto'):")
    done = python(code, BURNISH_BACKEND="triton")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("word", ["avx1024", "AVX2", "avx512_vnni", "0"])
def test_an_unknown_instruction_set_is_refused(word: str) -> None:
    done = python(CALL, BURNISH_CPU_ISA=word)
    assert done.returncode == 1, done.stdout
    assert "RuntimeError" in done.stderr
    assert f"BURNISH_CPU_ISA is '{word}', expected" in done.stderr
    for level in ("generic", "avx2", "avx512"):
        assert level in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("op", registry.all_ops())
@pytest.mark.parametrize("backend", ["triton", "native"])
def test_a_forced_backend_that_cannot_run_lists_reasons(op: str, backend: str) -> None:
    spec = registry.get(op)
    args = spec.make(spec.cases.test[0], "cpu", 0)
    with burnish.use_backend(backend), pytest.raises(BackendError) as raised:
        dispatch.call(spec, args, needs_grad=False)
    message = str(raised.value)
    assert message.startswith(f"{op}: no implementation can run this call with backend {backend!r} asked for.")
    assert message.splitlines()[1].strip().startswith(f"{backend}: ")
    assert len(message.splitlines()[1]) > len(f"  {backend}: ") + 10


def test_the_cpu_backend_refuses_other_devices() -> None:
    with (
        burnish.use_backend("cpu"),
        pytest.raises(
            BackendError, match="int8_quantize_rows: backend 'cpu' was asked for, but the tensors are on meta"
        ),
    ):
        ops.int8_quantize_rows(torch.empty(2, 3, device="meta"))


# --- explain


def test_explain_names_what_runs(linear: tuple[Any, ...]) -> None:
    text = burnish.explain("int8_linear", *linear, activation="relu")
    lines = text.splitlines()
    assert lines[0] == "int8_linear: cpu runs"
    assert [line.split()[0] if "->" not in line else line.split()[1] for line in lines[1:5]] == [
        "reference", "cpu", "native", "triton",
    ]  # fmt: skip
    assert "-> cpu" in lines[2]
    assert all(len(line.split(maxsplit=1)[1]) > 2 for line in lines[1:])


def test_explain_obeys_an_override(linear: tuple[Any, ...]) -> None:
    with burnish.use_backend("reference"):
        text = burnish.explain("int8_linear", *linear)
    assert text.startswith("int8_linear: reference runs")
    assert "'reference' was asked for by use_backend or BURNISH_BACKEND" in text
    with burnish.use_backend("triton"):
        assert burnish.explain("int8_linear", *linear).startswith("int8_linear: nothing can run this")


def test_explain_without_arguments_and_of_an_unknown_op() -> None:
    assert burnish.explain("int8_quantize_rows").startswith("int8_quantize_rows: cpu runs")
    with pytest.raises(KeyError, match="no op named 'int4_linear'; the ops are: "):
        burnish.explain("int4_linear")


def test_explain_leaves_no_trace(linear: tuple[Any, ...]) -> None:
    before = dispatch.overrides
    burnish.explain("int8_linear", *linear)
    with pytest.raises(ValueError, match="activation is 'swish'"):
        burnish.explain("int8_linear", *linear, activation="swish")
    assert dispatch.overrides == before
    assert torch.equal(ops.int8_linear(*linear), ops.int8_linear(*linear))


# --- the native library


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A copy of the package without its libraries."""
    shutil.copytree(PACKAGE, tmp_path / "burnish", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_without_the_native_library_importing_works_and_calling_says_what_to_do(bare: Path) -> None:
    code = (
        "import torch, burnish\n"
        "assert burnish.__file__.startswith(" + repr(str(bare)) + "), burnish.__file__\n"
        "print(burnish.explain('int8_quantize_rows'))\n"
        "with burnish.use_backend('reference'): print(burnish.ops.int8_quantize_rows(torch.ones(1, 2)))\n"
        "burnish.ops.int8_quantize_rows(torch.ones(1, 2))"
    )
    done = python(code, path=bare)
    assert "cpu        the CPU kernels were not built: run pip install --no-build-isolation ." in done.stdout
    assert "tensor([[127, 127]]" in done.stdout
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.endswith("int8_quantize_rows: the CPU kernels were not built: run pip install --no-build-isolation .")


def test_a_damaged_native_library_is_named(bare: Path) -> None:
    (bare / "burnish" / "_native.so").write_bytes(b"\x7fELF not a library")
    done = python("import torch, burnish; burnish.ops.int8_quantize_rows(torch.ones(1, 2))", path=bare)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert "int8_quantize_rows: " in last
    assert "_native.so does not load: " in last


def test_this_process_has_the_native_library() -> None:
    assert "_native.so" not in native.missing, native.missing["_native.so"]
