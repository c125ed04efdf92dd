"""The benchmark runner: what is refused, what is timed, how rows are judged, stored and drawn."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from importlib import util
from pathlib import Path

import pytest
import torch
from burnish import bench, registry
from burnish.bench import machine, peers, roofline, timing
from burnish.bench.rows import BASELINE, summary
from burnish.bench.runner import select_cases
from burnish.registry import Case, Cases, Cost, OpSpec

ROOT = Path(__file__).resolve().parents[1]
KEYS = ["op", "case", "impl", "median_us", "q25_us", "q75_us", "gbps", "tflops", "roofline", "baseline", "speedup"]
KERNELS = {
    "toy::good": lambda x: x + x,
    "toy::wrong": lambda x: x + x + 0.01,
    "toy::narrow": lambda x: (x + x)[:, :-1].contiguous(),
    "toy::dtype": lambda x: (x + x).double(),
    "toy::raising": lambda x: x.no_such_method(),
    "toy::slow": lambda x: (time.sleep(0.002), x + x)[1],
}


def make(case: Case, backend: str, seed: int) -> tuple[torch.Tensor]:
    shape = (case.dims["M"], case.dims["K"])
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(case.dtype),)


def case_of(rows: int, dtype: torch.dtype = torch.float32) -> Case:
    return Case({"M": rows, "K": 8}, dtype)


@pytest.fixture(scope="module")
def toys():
    """Ops of an outside package, one a way to behave; gone from the registry afterwards."""
    specs = {}
    for name, kernel in KERNELS.items():
        spec = OpSpec(
            name=name,
            schema="(Tensor x) -> Tensor",
            reference=lambda x: x * 2,
            fake=lambda x: x.new_empty(x.shape),
            autograd=None,
            impls=(),
            cases=Cases(test=(case_of(1),), bench=(case_of(4), case_of(16))),
            make=make,
            cost=lambda case: Cost(ops=case.dims["M"] * 8.0, bytes=case.dims["M"] * 64.0, unit="fp32"),
            baseline=lambda x: lambda: torch.mul(x, 2),
        )
        specs[name] = registry.register(spec)
        registry._libraries[-1].impl(spec.stem, kernel, "CPU")
    yield specs
    for name in specs:
        del registry._specs[name]


@pytest.fixture
def small_cache(monkeypatch):
    """A cache that few argument sets overflow."""
    monkeypatch.setattr(machine, "last_level_cache", lambda device="cpu": 512)


@pytest.fixture
def ceilings(monkeypatch):
    """A machine that reads 1 GB/s and computes 2 Gop/s."""
    monkeypatch.setattr(roofline, "probes", lambda *_: {"read": lambda: 1e9, "fp32": lambda: 2e9})


def time_op(name: str, *, peers: tuple = (), pattern: str = "*", rounds: int = 3) -> bench.Results:
    plan = bench.Plan(bench.select_cases([name], pattern=pattern), peers=peers, rounds=rounds, min_ms=0.05)
    return bench.run(plan, command="test")


@pytest.mark.usefixtures("toys", "small_cache", "ceilings")
class TestRows:
    def test_schema_of_the_json(self, tmp_path):
        results = time_op("toy::good")
        document = json.loads(results.to_json())
        assert [(row["case"], row["impl"]) for row in document["rows"]] == [
            (case, impl) for case in ("M4-K8-fp32", "M16-K8-fp32") for impl in ("cpu", "peer:torch")
        ]
        for row in document["rows"]:
            assert list(row) == KEYS
            assert all(isinstance(row[key], float) for key in KEYS[3:9] + KEYS[10:])
            assert 0 < row["q25_us"] <= row["median_us"] <= row["q75_us"]
        assert 0 <= document["machine"]["neighbours"] <= 1
        for key in ("date", "command", "commit", "burnish", "torch", "cpu", "threads", "isa", "ceilings", "peers"):
            assert key in document["machine"]
        path = tmp_path / "rows.json"
        path.write_text(results.to_json())
        assert [row.to_dict() for row in bench.Results.from_json(path).rows] == document["rows"]

    def test_figures_follow_from_the_median(self):
        for row in time_op("toy::good", pattern="M16-*").rows:
            assert row.gbps == pytest.approx(16 * 64 / row.median_us / 1e3)
            assert row.tflops == pytest.approx(16 * 8 / row.median_us / 1e6)

    def test_speedup_is_against_the_declared_path(self):
        ours, torch_path = time_op("toy::slow", pattern="M4-*").rows
        assert torch_path.impl == ours.baseline == BASELINE
        assert torch_path.speedup == 1
        assert ours.speedup == pytest.approx(torch_path.median_us / ours.median_us)

    @pytest.mark.parametrize(
        ("name", "reason"),
        [("wrong", "N1: wrong is off by"), ("narrow", "expected torch.float32"), ("dtype", "is torch.float64"),
         ("raising", "AttributeError: .*no_such_method")],
    )  # fmt: skip
    def test_wrong_kernel_is_refused_and_not_timed(self, name, reason, monkeypatch):
        sampled = []
        monkeypatch.setattr(timing, "_sample_cpu", lambda calls: sampled.append(len(calls)) or 1e-5)
        results = time_op(f"toy::{name}", pattern="M4-*")
        ours, torch_path = results.rows
        assert results.failed == (ours,)
        assert not ours.timed
        assert re.search(reason, ours.failed)
        assert torch_path.timed
        assert len(sampled) == 2 + 3  # calibration and rounds of torch's path alone
        row = json.loads(results.to_json())["rows"][0]
        assert row["failed"] == ours.failed
        assert row["median_us"] is None

    def test_losing_row_is_kept_and_named(self):
        results = time_op("toy::slow", pattern="M4-*")
        assert results.rows[0].speedup < 0.5
        (line,) = summary(results.rows)
        assert "slower at M4-K8-fp32 (0." in line

    def test_missing_kernel_is_skipped_with_the_reason(self, monkeypatch):
        monkeypatch.setattr("burnish.dispatch.candidates", lambda spec: {"cpu": "no CPU kernel is registered"})
        ours, _ = time_op("toy::good", pattern="M4-*").rows
        assert ours.skipped == "no CPU kernel is registered"
        assert not ours.failed

    def test_threads_are_set_and_restored(self, monkeypatch):
        before = torch.get_num_threads()
        plan = bench.Plan(bench.select_cases(["toy::good"], pattern="M4-*"), rounds=1, min_ms=0.01)
        assert bench.run(plan, threads=1).machine["threads"] == 1
        assert torch.get_num_threads() == before

    def test_progress_reaches_the_end(self):
        seen = []
        plan = bench.Plan(bench.select_cases(["toy::good"]), rounds=2, min_ms=0.01)
        bench.run(plan, progress=lambda done, total, label: seen.append((done, total, label)))
        assert seen[0] == (0, 6, "toy::good M4-K8-fp32")
        assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
        assert seen[-1][0] == seen[-1][1] == 6


@pytest.mark.usefixtures("toys")
class TestCases:
    def test_unknown_op_lists_the_ops(self):
        with pytest.raises(KeyError, match=r"no op named 'softmaxx'; the ops are: .*bsr_linear, .*toy::good"):
            select_cases(["softmaxx"])

    def test_pattern_without_a_match_lists_the_cases(self):
        with pytest.raises(ValueError, match=r"no case matches 'M5-\*'; the cases are: M4-K8-fp32, M16-K8-fp32"):
            select_cases(["toy::good"], pattern="M5-*")

    def test_shape_replaces_the_recorded_cases(self):
        assert [case.id for _, case in select_cases(["toy::good"], shapes=[(3, 5), (1, 1)])] == [
            "M3-K5-fp32", "M1-K1-fp32",
        ]  # fmt: skip

    def test_shape_of_another_rank_names_the_dims(self):
        with pytest.raises(ValueError, match="toy::good takes shapes of M,K"):
            select_cases(["toy::good"], shapes=[(1, 2, 3)])

    def test_shape_without_ops_takes_those_that_fit(self):
        assert {spec.name for spec, _ in select_cases(shapes=[(3, 32, 64)])} == {
            f"{stem}{end}"
            for stem in ("bsr_linear", "int8_linear", "sparse24_linear", "sparse_linear")
            for end in ("", "_backward")
        }

    def test_dtype_recasts_floating_cases_only(self):
        assert {case.dtype for _, case in select_cases(["toy::good"], dtype=torch.bfloat16)} == {torch.bfloat16}
        assert {case.dtype for _, case in select_cases(["int8_linear_pack"], dtype=torch.bfloat16)} == {torch.int8}

    def test_every_op_has_cases_by_default(self):
        assert {spec.name for spec, _ in select_cases()} == set(registry.all_ops())


class TestTiming:
    @pytest.mark.usefixtures("small_cache")
    def test_rotated_sets_overflow_the_cache(self, toys):
        sets = timing.argument_sets(toys["toy::good"], case_of(4), "cpu", "cpu", 2)
        assert len(sets) * 4 * 8 * 4 > timing.CACHE_FACTOR * 512
        assert len({args[0].data_ptr() for args in sets}) == len(sets)
        assert not torch.equal(sets[0][0], sets[1][0])

    def test_sets_are_bounded_by_memory_and_count(self, toys, monkeypatch):
        monkeypatch.setattr(machine, "free_memory", lambda device="cpu": 10_000)
        assert len(timing.argument_sets(toys["toy::good"], case_of(4), "cpu", "cpu", 2)) == 4
        monkeypatch.setattr(machine, "free_memory", lambda device="cpu": 1 << 40)
        assert len(timing.argument_sets(toys["toy::good"], case_of(1), "cpu", "cpu", 2)) == timing.MAX_SETS

    def test_contestant_goes_through_its_sets_in_turn(self):
        one = timing.Contestant("x", [lambda i=i: i for i in range(3)])
        assert [call() for call in one.take(2) + one.take(2) + one.take(3)] == [0, 1, 2, 0, 1, 2, 0]

    def test_rounds_are_interleaved_in_changing_order(self, monkeypatch):
        log = []
        monkeypatch.setattr(timing, "_sample_cpu", lambda calls: log.append(calls[0]()) or 1e-3)
        entrants = [timing.Contestant(name, [lambda name=name: name]) for name in "abc"]
        peaks = timing.interleave(
            entrants, {"read": lambda: log.append("read") or 7.0}, device="cpu", rounds=12, min_ms=1.0
        )
        rounds = [tuple(log[6 + 4 * index :][:4]) for index in range(12)]
        assert all(sorted(names) == ["a", "b", "c", "read"] for names in rounds)
        assert len(set(rounds)) > 6
        assert peaks == {"read": [7.0] * 12}
        assert [len(one.seconds) for one in entrants] == [12, 12, 12]

    def test_batch_lasts_the_shortest_sample(self, monkeypatch):
        counts = []
        monkeypatch.setattr(timing, "_sample_cpu", lambda calls: counts.append(len(calls)) or 1e-4)
        timing.interleave([timing.Contestant("x", [lambda: None])], {}, device="cpu", rounds=1, min_ms=2.0)
        assert counts == [2, 2, 21]  # 20 calls of 0.1 ms, and one that is not timed

    def test_first_call_of_a_sample_is_not_timed(self):
        slow_first = iter([0.02] + [0.0] * 10)
        assert timing._sample_cpu([lambda: time.sleep(next(slow_first))] * 5) < 0.005

    def test_quartiles(self):
        assert timing.quartiles([4, 1, 3, 2, 5]) == (2, 3, 4)
        assert timing.quartiles([1, 2]) == (1.25, 1.5, 1.75)
        assert timing.quartiles([7]) == (7, 7, 7)


class TestRoofline:
    COST = Cost(ops=4e9, bytes=1e9, unit="int8")

    def test_floor_is_the_slower_limit(self):
        assert roofline.floor(self.COST, {"read": 1e9, "int8": 8e9}) == 1.0
        assert roofline.floor(self.COST, {"read": 1e10, "int8": 8e9}) == 0.5
        assert roofline.floor(Cost(0.0, 1e9, "int8"), {"read": 1e9}) == 1.0

    def test_share_judges_each_round_by_its_own_ceiling(self):
        peaks = {"read": [1e9, 2e9, 1e9], "int8": [8e9, 8e9, 8e9]}
        assert roofline.share(self.COST, peaks, [2.0, 1.0, 2.0]) == 0.5

    def test_no_share_without_the_ceiling(self):
        assert roofline.share(self.COST, {"read": [1e9]}, [2.0]) is None

    def test_without_the_library_nothing_is_measured(self, monkeypatch):
        monkeypatch.setitem(roofline.native.missing, "_native.so", "not built")
        assert roofline.probes("cpu", "int8", 1.0) == {}


PEER = """
import torch
from burnish.bench import Peer
def supports(op, case):
    return "only small ones" if case.dims["M"] > 4 else None
def make(op, args):
    return lambda: args[0] * 2 + {error}
PEER = Peer("{name}", "1.2", supports, make)
"""


@pytest.mark.usefixtures("toys", "small_cache", "ceilings")
class TestPeers:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "right.py").write_text(PEER.format(name="right", error=0))
        (tmp_path / "wrong.py").write_text(PEER.format(name="wrong", error=1))
        (tmp_path / "not_there.py").write_text("import no_such_library\n")
        (tmp_path / "broken.py").write_text("raise OSError('cannot open libfoo.so')\n")
        (tmp_path / "no_record.py").write_text("PEER = 'me'\n")
        return tmp_path

    def test_absent_ones_are_listed_with_the_reason(self, folder):
        found, absent = peers.load(folder)
        assert [peer.name for peer in found] == ["right", "wrong"]
        assert absent == {
            "not-there": "no_such_library is not installed",
            "broken": "OSError: cannot open libfoo.so",
            "no-record": "no_record.py: PEER is not a burnish.bench.Peer with a name of its own",
        }

    def test_peers_are_gated_timed_and_skipped_like_ours(self, folder):
        results = time_op("toy::good", peers=tuple(peers.load(folder)[0]))
        rows = {(row.case, row.impl): row for row in results.rows}
        assert rows["M4-K8-fp32", "peer:right"].timed
        assert rows["M4-K8-fp32", "peer:wrong"].failed.startswith("relative error")
        assert rows["M16-K8-fp32", "peer:right"].skipped == "only small ones"
        assert results.machine["peers"] == {"right": "1.2", "wrong": "1.2"}

    def test_folder_that_is_not_there(self, tmp_path, monkeypatch):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            peers.find_folder(tmp_path / "nowhere")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(peers, "__file__", str(tmp_path / "a/b/c/d.py"))
        with pytest.raises(FileNotFoundError, match="--peers-dir"):
            peers.find_folder()

    def test_adapters_of_the_checkout_load_or_say_what_is_missing(self):
        folder = ROOT / "bench" / "peers"
        script = (
            "import json, sys; from pathlib import Path; from burnish.bench import peers\n"
            "found, absent = peers.load(Path(sys.argv[1]))\n"
            "print('RESULT' + json.dumps([[peer.name for peer in found], absent]))"
        )  # a process of its own: some libraries change torch's state when they are imported
        done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
        found, absent = json.loads(done.stdout.partition("RESULT")[2])
        assert set(found) | set(absent) == {path.stem.replace("_", "-") for path in folder.glob("*.py")}
        assert all(reason.endswith("is not installed") for reason in absent.values()), absent


class TestMachine:
    def test_sizes(self):
        assert machine.parse_size("32768K\n") == 32 << 20
        assert machine.parse_size("1M") == 1 << 20
        assert machine.parse_size("512") == 512
        assert machine.last_level_cache() >= 1 << 20
        assert machine.free_memory() > 1 << 20

    def test_neighbours_are_noticed(self, monkeypatch):
        used = iter([100.0, 100.0 + machine.os.cpu_count()])
        monkeypatch.setattr(machine, "_busy_seconds", lambda: next(used))
        neighbours = machine.Neighbours()
        assert neighbours.share is None
        with neighbours.watch():
            time.sleep(0.01)
        assert neighbours.share == 1.0
        monkeypatch.setattr(machine, "_busy_seconds", lambda: 5.0)
        quiet = machine.Neighbours()
        with quiet.watch():
            time.sleep(0.01)
        assert quiet.share == 0.0

    def test_own_work_is_no_neighbour(self):
        before, own = machine._busy_seconds(), time.process_time()
        while time.process_time() - own < 0.2:
            pass
        assert machine._busy_seconds() - before >= 0.15

    def test_commit_only_of_the_checkout_it_runs_from(self, tmp_path, monkeypatch):
        (tmp_path / "machine.py").touch()
        monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
        assert machine.commit() is None


@pytest.mark.usefixtures("toys", "small_cache", "ceilings")
class TestOutputs:
    def test_plot_is_a_picture(self, tmp_path):
        plot = pytest.importorskip("burnish.bench.plot")
        plot.draw(time_op("toy::slow"), tmp_path / "rows.png")
        assert (tmp_path / "rows.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        with pytest.raises(ValueError, match="nothing was timed"):
            plot.draw(bench.Results({}, ()), tmp_path / "empty.png")

    def test_report_has_every_row_and_its_origin(self, tmp_path):
        report = _load_report()
        results = time_op("toy::slow")
        page = report.render([results])
        for row in results.rows:
            assert f"{row.median_us:.1f}" in page
        assert "slower at M4-K8-fp32" in page
        assert results.machine["date"] in page
        assert "`test`" in page

    def test_report_refuses_to_choose_between_runs(self):
        report = _load_report()
        results = time_op("toy::good")
        with pytest.raises(ValueError, match="timed in two files: toy::good M16-K8-fp32"):
            report.render([results, results])
        other = bench.Results(results.machine | {"threads": 99}, ())
        with pytest.raises(ValueError, match="different machines"):
            report.render([results, other])

    def test_file_that_is_no_result(self, tmp_path):
        (tmp_path / "x.json").write_text("[]")
        with pytest.raises(ValueError, match="is not a result of burnish bench"):
            bench.Results.from_json(tmp_path / "x.json")


def _load_report():
    spec = util.spec_from_file_location("bench_report", ROOT / "bench" / "report.py")
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
