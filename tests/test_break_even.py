"""The break-even of sparse ops: where times cross, what is kept of it, and how a layer is judged by it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import burnish
import pytest
import torch
from burnish import cli, density_table, registry
from burnish.bench import break_even, machine, timing
from burnish.density_table import Entry
from burnish.kinds import sparse
from burnish.registry import Case, Cases, Cost, OpSpec

DENSE = 0.004  # seconds
CLOCK = SimpleNamespace(now=0.0)  # which runs while a layer works, whatever else the machine does
ENTRY = Entry("toy_linear", "", "fp32", 1, 64, 64, 0.4, ((0.2, 2.0), (0.4, 1.0), (0.8, 0.5)))


def make(case: Case, backend: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    kept = case.options["density"]
    return torch.zeros(case.dims["M"], case.dims["K"]), torch.full((case.dims["N"],), kept)


def kernel(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Takes twice a dense layer's time where everything is kept, so that it breaks even at a half."""
    CLOCK.now += 2 * DENSE * float(kept[0])
    return x.new_zeros(x.shape[0], kept.shape[0])


def dense(x: torch.Tensor, kept: torch.Tensor) -> Any:
    def layer() -> torch.Tensor:
        CLOCK.now += DENSE
        return x.new_zeros(x.shape[0], kept.shape[0])

    return layer


def _case(**options: Any) -> Case:
    return Case({"M": 1, "N": 8, "K": 8}, torch.float32, "normal", options)


@pytest.fixture(scope="module")
def toy():
    """A sparse op of an outside package; gone from the registry afterwards."""
    spec = registry.register(
        OpSpec(
            name="toy::toy_linear",
            schema="(Tensor x, Tensor kept) -> Tensor",
            reference=lambda x, kept: x.new_zeros(x.shape[0], kept.shape[0]),
            fake=lambda x, kept: x.new_zeros(x.shape[0], kept.shape[0]),
            autograd=None,
            impls=(),
            cases=Cases(test=(_case(density=0.5),), bench=(_case(density=0.5), _case(density=0.1))),
            make=make,
            cost=lambda case: Cost(1.0, 1.0, "fp32"),
            baseline=dense,
        )
    )
    registry._libraries[-1].impl(spec.stem, kernel, "CPU")
    yield spec
    del registry._specs[spec.name]


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor's cache that few argument sets overflow."""
    monkeypatch.setattr(machine, "last_level_cache", lambda device="cpu": 512)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    read = SimpleNamespace(perf_counter=lambda: CLOCK.now, perf_counter_ns=lambda: round(CLOCK.now * 1e9))
    monkeypatch.setattr(timing, "time", read)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BURNISH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (((0.1, 4.0), (0.5, 1.0), (1.0, 0.5)), 0.5),
        (((0.2, 2.0), (0.4, 2 / 3)), 0.3),  # times 0.5 and 1.5 of dense: 1 lies half way
        (((0.1, 0.9), (0.2, 1.5)), 0.0),
        (((0.1, 3.0), (0.9, 1.2)), 0.9),
        (((0.5, 1.7),), 0.5),
    ],
)
def test_the_break_even_is_where_the_times_cross(curve: Any, expected: float) -> None:
    assert break_even.break_even(curve) == pytest.approx(expected)


def test_an_op_is_measured_at_every_density(toy: OpSpec) -> None:
    (subject,) = break_even.subjects([toy.name], torch.float32)
    assert (subject.form, subject.fixed) == ("", None)
    (entry,) = break_even.measure([subject], rows=(1,), size=(8, 8), rounds=3, min_ms=0.1)
    assert [density for density, _ in entry.curve] == list(break_even.DENSITIES)
    assert entry.density == pytest.approx(0.5, abs=0.001)
    assert dict(entry.curve)[0.1] == pytest.approx(5.0, rel=0.001)


def test_a_pattern_has_one_density(toy: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = replace(toy, cases=Cases(test=toy.cases.test, bench=(_case(density=0.25, weight="int8"),)))
    monkeypatch.setitem(registry._specs, toy.name, fixed)
    (subject,) = break_even.subjects([toy.name], torch.float32)
    assert (subject.form, subject.fixed) == ("int8", 0.25)
    (entry,) = break_even.measure([subject], rows=(1,), size=(8, 8), rounds=3, min_ms=0.1)
    assert entry.density == 0.25
    assert len(entry.curve) == 1


def test_ops_without_densities_are_refused() -> None:
    with pytest.raises(ValueError, match="int8_linear has no density"):
        break_even.subjects(["int8_linear"], torch.bfloat16)
    with pytest.raises(KeyError, match="no op named 'nothing'"):
        break_even.subjects(["nothing"], torch.bfloat16)


def test_tables_are_kept_and_grow(cache: Path) -> None:
    assert density_table.load("cpu") == []
    path = density_table.save([ENTRY], "cpu")
    assert path.parent == cache
    other = replace(ENTRY, M=16)
    density_table.save([replace(ENTRY, density=0.5), other], "cpu")
    assert density_table.load("cpu") == [replace(ENTRY, density=0.5), other]
    assert [found.name for found in cache.iterdir()] == [path.name]


def test_another_number_of_threads_has_its_own_table() -> None:
    density_table.save([ENTRY], "cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert density_table.load("cpu") == []
    finally:
        torch.set_num_threads(threads)


def test_a_damaged_table_says_so_and_counts_as_none() -> None:
    path = density_table.save([ENTRY], "cpu")
    path.write_text(path.read_text()[:-40])
    with pytest.warns(RuntimeWarning, match=r"break-even-.*\.json is damaged and counts as empty"):
        assert density_table.load("cpu") == []
    density_table.save([ENTRY], "cpu")
    assert density_table.load("cpu") == [ENTRY]


def test_a_layer_is_judged_by_the_best_rows_of_the_nearest_size() -> None:
    weight = torch.zeros(80, 64)
    assert density_table.objection("toy_linear", "", weight, 0.9) is None  # nothing measured
    large = replace(ENTRY, N=4096, K=4096, density=0.9)
    density_table.save([ENTRY, replace(ENTRY, M=16, density=0.3), large], "cpu")
    assert density_table.objection("toy_linear", "", weight, 0.4) is None
    reason = density_table.objection("toy_linear", "", weight, 0.45)
    assert reason == (
        "dense is faster here: it keeps 45% of its weights, and toy_linear wins up to a density of 0.40, at M = 1"
    )
    assert density_table.objection("toy_linear", "", torch.zeros(2048, 4096), 0.45) is None
    assert density_table.objection("toy_linear", "int8", weight, 0.45) is None
    assert density_table.objection("toy_linear", "", weight.bfloat16(), 0.45) is None
    density_table.save([replace(ENTRY, density=0.0), replace(ENTRY, M=16, density=0.0)], "cpu")
    assert "wins at no density" in str(density_table.objection("toy_linear", "", weight, 0.01))


def test_the_command_prints_keeps_and_draws(
    toy: OpSpec, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    out, chart = tmp_path / "table.json", tmp_path / "chart.png"
    code = cli.main([*_command(toy), "--json", str(out), "--plot", str(chart)])
    assert code == 0
    printed = capsys.readouterr().out
    assert "toy_linear" in printed
    assert "x at best)" in printed
    document = json.loads(out.read_text())
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert [Entry(**{**entry, "curve": tuple(map(tuple, entry["curve"]))}) for entry in document["entries"]] == (
        density_table.load("cpu")
    )
    assert chart.stat().st_size > 10_000


def _command(toy: OpSpec) -> list[str]:
    options = ["--dtype", "fp32", "--shape", "1,8,8", "--rounds", "2", "--min-time", "0.1"]
    return ["bench", toy.name, "--break-even", *options]


def test_a_cache_that_cannot_be_written_is_refused_before_the_measurement(
    toy: OpSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BURNISH_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(break_even, "measure", lambda *args, **options: pytest.fail("measures"))
    assert cli.main(_command(toy)) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"burnish bench: the table for swap_ cannot be kept in {tmp_path / 'file'}: ")
    assert err.endswith("set BURNISH_CACHE_DIR to a folder that can be written\n")


def test_a_cache_that_is_lost_meanwhile_costs_no_results(
    toy: OpSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")

    def measure(*args: Any, **options: Any) -> Any:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("BURNISH_CACHE_DIR", str(tmp_path / "file"))
        yield ENTRY

    monkeypatch.setattr(break_even, "measure", measure)
    assert cli.main([*_command(toy), "--json", str(tmp_path / "table.json")]) == 2
    out, err = capsys.readouterr()
    assert "toy_linear" in out
    assert "set BURNISH_CACHE_DIR" in err
    assert len(json.loads((tmp_path / "table.json").read_text())["entries"]) == 1


@pytest.mark.parametrize("before", [[], [ENTRY]], ids=["no table", "a table"])
def test_an_interrupted_run_leaves_the_table(
    before: list[Entry], toy: OpSpec, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    if before:
        density_table.save(before, "cpu")

    def measure(*args: Any, **options: Any) -> Any:
        assert density_table.load("cpu") == before
        yield replace(ENTRY, M=16)
        raise KeyboardInterrupt

    monkeypatch.setattr(break_even, "measure", measure)
    files = {path: path.read_bytes() for path in cache.glob("*")}
    assert cli.main(_command(toy)) == 130
    assert {path: path.read_bytes() for path in cache.glob("*")} == files


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--peers"], "without --peers"),
        (["--case", "M1-*"], "without --peers, --counters or --case"),
        (["--shape", "1,8"], "takes shapes M,N,K"),
        (["--shape", "1,8,8", "--shape", "1,8,16"], "with one N,K"),
        (["int8_linear"], "int8_linear has no density"),
    ],
)
def test_bad_arguments_are_refused(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--break-even", *more]) == 2
    assert message in capsys.readouterr().err


def _kept(fraction: float) -> torch.nn.Linear:
    linear = torch.nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        linear.weight[:, int(64 * fraction) :] = 0
    return linear


@pytest.mark.parametrize(
    ("config", "op", "form"),
    [
        (burnish.Sparse(), "sparse_linear", ""),
        (burnish.BlockSparse(16), "bsr_linear", "16x16"),
        (burnish.BlockSparse((4, 16), values="int8"), "bsr_linear", "4x16-int8"),
    ],
)
def test_a_swap_reads_the_table(config: burnish.Config, op: str, form: str) -> None:
    density_table.save([Entry(op, form, "fp32", 1, 64, 64, 0.4, ((0.4, 1.0),))], "cpu")
    model = torch.nn.Sequential(_kept(0.25), _kept(0.5))
    report = burnish.swap_(model, config)
    kept = {row.fqn: row.reason for row in report.rows}
    assert kept["0"] is None
    assert kept["1"] is not None
    assert kept["1"].startswith("dense is faster here: it keeps 50% of its weights")
    measured = burnish.swap_(torch.nn.Sequential(_kept(0.5)), config, measure=1)
    assert "dense is faster here" not in str(measured)


def test_a_swap_to_2_4_reads_the_table() -> None:
    weight = torch.nn.Linear(64, 64)
    with torch.no_grad():
        weight.weight.view(-1, 4)[:, 2:] = 0
    density_table.save([Entry("sparse24_linear", "", "fp32", 1, 64, 64, 0.0, ((0.5, 0.8),))], "cpu")
    report = burnish.swap_(torch.nn.Sequential(weight), burnish.Sparse24())
    assert "sparse24_linear wins at no density" in str(report)


def test_swaps_ask_for_the_forms_that_are_measured() -> None:
    measured = {(subject.spec.name, subject.form) for subject in break_even.subjects([], torch.bfloat16)}
    made = (
        burnish.nn.BlockSparseLinear(64, 64, density=0.5, block=32),
        burnish.nn.BlockSparseLinear(64, 64, density=0.5, block=32, values="int8"),
        burnish.nn.BlockSparseLinear(64, 64, density=0.5, block=(4, 16)),
        burnish.nn.Sparse24Linear(64, 64),
        burnish.nn.Sparse24Linear(64, 64, values="int8"),
        burnish.nn.SparseLinear(64, 64, density=0.5),
    )
    assert {sparse._row_of(layer) for layer in made} <= measured
