"""The measured choice among an op's CUDA implementations, with implementations that are CPU functions here."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import burnish
import pytest
import torch
from burnish import dispatch, native, registry, tuning
from burnish.errors import BackendError
from burnish.registry import Case, Cases, Cost, Impl, OpSpec

runs: Counter[str] = Counter()
seconds = {"native": 0.0, "triton": 0.0}


def _native(x: torch.Tensor, w: torch.Tensor, scale: float) -> torch.Tensor:
    runs["native"] += 1
    time.sleep(seconds["native"])
    return x @ w.T


def _triton(x: torch.Tensor, w: torch.Tensor, scale: float) -> torch.Tensor:
    runs["triton"] += 1
    time.sleep(seconds["triton"])
    return x @ w.T + 1


def _failing(x: torch.Tensor, w: torch.Tensor, scale: float) -> torch.Tensor:
    raise RuntimeError("out of shared memory")


def _supports(x: torch.Tensor, w: torch.Tensor, scale: float) -> str | None:
    return None if x.is_floating_point() else f"x is {x.dtype}, expected a float"


def _supports_few(x: torch.Tensor, w: torch.Tensor, scale: float) -> str | None:
    return None if x.shape[0] <= 64 else f"M is {x.shape[0]}, at most 64"


def _checked(x: torch.Tensor, w: torch.Tensor, scale: float) -> torch.Tensor:
    torch._check(x.shape[-1] == w.shape[-1], lambda: "toy: x and w differ in K")
    return x.new_empty((*x.shape[:-1], w.shape[0]))


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[OpSpec]:
    """A record that nobody registered, whose first implementation is the slower one; tuning is on."""
    monkeypatch.delitem(native.missing, "_cuda.so", raising=False)
    monkeypatch.setenv("BURNISH_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("BURNISH_TUNE", "1")
    monkeypatch.setitem(seconds, "native", 0.002)
    monkeypatch.setitem(seconds, "triton", 0.0)
    case = Case({"M": 2, "N": 3}, torch.float32)
    _forget()
    yield OpSpec(
        name="toy",
        schema="(Tensor x, Tensor w, float scale) -> Tensor",
        reference=_native,
        fake=_checked,
        autograd=None,
        impls=(
            Impl("native", f"{__name__}:_native", f"{__name__}:_supports_few"),
            Impl("triton", f"{__name__}:_triton", f"{__name__}:_supports"),
        ),
        cases=Cases(test=(case,), bench=(case,)),
        make=lambda case, backend, seed: call(),
        cost=lambda case: Cost(1.0, 1.0, "fp32"),
    )
    dispatch.resolve.cache_clear()
    _forget()


def _forget() -> None:
    """As in a new process."""
    tuning._known.cache_clear()
    tuning._table.cache_clear()
    runs.clear()


def call(M: int = 4, N: int = 3, K: int = 8, scale: float = 1.0) -> tuple[Any, ...]:
    return torch.ones(M, K), torch.ones(N, K), scale


def ran(spec: OpSpec, args: tuple[Any, ...]) -> str:
    """Which implementation's result such a call has."""
    return "triton" if dispatch._run(spec, *args)[0, 0] == args[0].shape[1] + 1 else "native"


def test_the_fastest_is_measured_kept_and_asked_first(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ran(spec, call()) == "triton"
    assert runs["native"] > 1
    runs.clear()
    assert ran(spec, call()) == "triton"
    assert runs == {"triton": 1}
    _forget()
    monkeypatch.delenv("BURNISH_TUNE")  # another process, not told to measure
    assert ran(spec, call()) == "triton"
    assert ran(spec, call(N=4)) == "native"
    assert runs == {"triton": 1, "native": 1}
    monkeypatch.setenv("BURNISH_TUNE", "0")
    assert ran(spec, call()) == "native"


def test_the_first_call_is_like_the_second(spec: OpSpec) -> None:
    args = call(M=5)
    before = [args[0].clone(), args[1].clone()]
    first, second = dispatch._run(spec, *args), dispatch._run(spec, *args)
    assert torch.equal(first, second)
    assert torch.equal(args[0], before[0])
    assert torch.equal(args[1], before[1])


def test_the_first_gives_way_only_to_one_that_is_clearly_faster(spec: OpSpec) -> None:
    name = tuning._call(spec, call())
    order = ["native", "triton"]
    for times, expected in (({"native": 1.0, "triton": 0.98}, "native"), ({"native": 1.0, "triton": 0.9}, "triton")):
        tuning._known(torch.device("cpu"))[name] = times
        assert tuning.fastest(spec, call(), order) == expected
    assert tuning.fastest(spec, call(), ["native"]) == "native"
    assert tuning.fastest(spec, call(), []) is None


def test_what_was_measured_first_still_has_to_support_the_call(spec: OpSpec) -> None:
    seconds.update(native=0.0, triton=0.002)
    assert ran(spec, call(M=33)) == "native"
    assert tuning.times(spec, call(M=64)) == tuning.times(spec, call(M=33)) != {}
    tuning._known(torch.device("cpu"))[tuning._call(spec, call(M=65))] = {"native": 1.0, "triton": 9.0}
    assert ran(spec, call(M=65)) == "triton"


def test_rows_count_up_to_a_power_of_two_and_numbers_by_being_zero(spec: OpSpec) -> None:
    def name(*args: Any) -> str:
        return tuning._call(spec, args)

    x, w, _ = call(M=33)
    assert name(x, w, 1.0) == name(torch.ones(64, 8), w, 0.5) == name(torch.ones(2, 20, 8), w, 7)
    others = [
        name(torch.ones(65, 8), w, 1.0), name(torch.ones(32, 8), w, 1.0), name(x, torch.ones(4, 8), 1.0),
        name(x, w, 0.0), name(x.bfloat16(), w, 1.0), name(x, torch.ones(8, 3).T, 1.0), name(x, w, None),
        name(x, torch.ones(3, 16)[:, ::2], 1.0), name(x, torch.ones(3, 1).expand(3, 8), 1.0), name(x, w, [w]),
    ]  # fmt: skip
    assert len({name(x, w, 1.0), *others}) == len(others)  # two of them are strided


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "(Tensor(a!) x, Tensor w, float scale) -> Tensor"},
        {"schema": "(Tensor[] x, Tensor w, float scale) -> Tensor"},
        {"impls": ()},
    ],
    ids=["writes", "takes a list", "has one implementation"],
)
def test_some_ops_are_never_measured(change: dict[str, Any], spec: OpSpec) -> None:
    spec = replace(spec, **({"impls": spec.impls[:1]} if "impls" in change else change))
    assert ran(spec, call()) == "native"
    assert runs == {"native": 1}


def test_some_calls_are_never_measured(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    with burnish.use_backend("native"):
        assert ran(spec, call()) == "native"
    assert dispatch._run(spec, *call(M=0)).shape == (0, 3)
    assert ran(spec, call(M=65)) == "triton"  # one implementation can run it
    assert runs == {"native": 2, "triton": 1}
    monkeypatch.setattr(tuning, "_is_recorded", lambda device: True)
    assert ran(spec, call()) == "native"
    assert runs == {"native": 3, "triton": 1}


def test_bad_arguments_are_refused_before_anything_is_measured(spec: OpSpec) -> None:
    with pytest.raises(RuntimeError, match="toy: x and w differ in K"):
        dispatch._run(spec, torch.ones(4, 8), torch.ones(3, 9), 1.0)
    assert not runs


def test_one_that_fails_is_named(spec: OpSpec) -> None:
    spec = replace(spec, impls=(spec.impls[0], replace(spec.impls[1], target=f"{__name__}:_failing")))
    with pytest.raises(BackendError, match="toy: BURNISH_TUNE measures native, triton, and one fails: out of shared"):
        dispatch._run(spec, *call())


def test_another_word_is_refused(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_TUNE", "yes")
    with pytest.raises(ValueError, match="BURNISH_TUNE is 'yes', expected 1, 0 or nothing"):
        dispatch._run(spec, *call())


def test_a_folder_that_cannot_be_written_leaves_the_choice_to_this_process(spec: OpSpec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("BURNISH_CACHE_DIR", str(tmp_path / "file"))
        with pytest.warns(UserWarning, match="what was measured of toy is for this process alone"):
            assert ran(spec, call()) == "triton"
        runs.clear()
        assert ran(spec, call()) == "triton"
    assert runs == {"triton": 1}


def test_threads_measure_once(spec: OpSpec) -> None:
    together = threading.Barrier(8)
    seen: list[str] = []

    def work() -> None:
        together.wait()
        seen.append(ran(spec, call()))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["triton"] * 8
    alone = runs["native"]
    _forget()
    tuning._table(torch.device("cpu")).path.unlink()
    ran(spec, call())
    assert alone == runs["native"]


def test_explain_says_what_was_measured(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = registry.get("int8_linear")
    args = linear.make(linear.cases.test[0], "cpu", 0)
    captured = dispatch._capture(burnish.ops.int8_linear, args[:4], {})
    tuning._known(torch.device("cpu"))[tuning._call(linear, captured)] = {"native": 31.25, "triton": 12.0}
    lines = burnish.explain("int8_linear", *args[:4]).splitlines()
    assert next(line for line in lines if "native" in line).endswith("measured at 31.2 us")
    assert next(line for line in lines if "triton" in line).endswith("measured at 12.0 us")
