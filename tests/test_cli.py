"""The ``burnish`` command: exit codes, one clear line for every bad argument, and what each verb prints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import burnish
import pytest
import torch
from burnish import cli, doctor, native, registry

ROOT = Path(__file__).resolve().parents[1]
HAS_LIBRARY = "_native.so" not in native.missing
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="the CPU kernels are not built")
SMALL = ["bench", "int8_quantize_rows", "--shape", "3,32", "--rounds", "2", "--min-time", "0.1"]


def run(capsys, *argv: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    try:
        code = cli.main(argv)
    except SystemExit as stop:  # argparse
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "burnish: the following arguments are required"),
        ("dance", "burnish: argument doctor | bench | swap | new-op: invalid choice: 'dance'"),
        ("doctor now", "burnish: unrecognized arguments: now"),
        ("bench softmaxx", "burnish bench: no op named 'softmaxx'; the ops are: adagrad_step, adam_step, "),
        ("bench int8_linear --device tpu", "burnish bench: argument --device: invalid choice: 'tpu'"),
        ("bench int8_linear --dtype int3", "burnish bench: argument --dtype: invalid choice: 'int3'"),
        ("bench int8_linear --case nothing", "burnish bench: no case matches 'nothing'; the cases are: M1-N4096"),
        ("bench int8_linear --shape 1,2", "burnish bench: int8_linear takes shapes of M,N,K"),
        ("bench --shape 1,2,3,4,5", "burnish bench: no op takes a shape of 5 sizes"),
        ("bench --shape 1,x,3", "burnish bench: argument --shape: '1,x,3' is not a list of sizes like 64,4096,4096"),
        ("bench --shape 1,-2,3", "burnish bench: argument --shape: '1,-2,3' is not a list of sizes"),
        ("bench --threads 0", "burnish bench: argument --threads: '0' is not a positive whole number"),
        ("bench --threads two", "burnish bench: argument --threads: 'two' is not a positive whole number"),
        ("bench --rounds -1", "burnish bench: argument --rounds: "),
        ("bench --min-time nan", "burnish bench: argument --min-time: 'nan' is not a positive number"),
        ("bench --min-time 0", "burnish bench: argument --min-time: '0' is not a positive number"),
        ("bench --json no/such/folder/x.json", "burnish bench: cannot write no/such/folder/x.json"),
        ("bench --plot .", "burnish bench: cannot write .: Is a directory"),
        ("bench --json /proc/x.json", "burnish bench: cannot write /proc/x.json: No such file or directory"),
        ("bench --plot rows.xyz", "burnish bench: cannot write rows.xyz: no image format of this name"),
        (
            "bench --counters --peers",
            "burnish bench: --counters counts on the CPU, without --peers, --plot or --device",
        ),
        ("bench --peers --peers-dir nowhere", "burnish bench: --peers-dir nowhere: no such folder"),
        ("swap", "burnish swap: the following arguments are required: MODULE:FUNCTION"),
        ("swap model", "burnish swap: 'model' is not MODULE:FUNCTION"),
        ("swap no_such_module:make", "burnish swap: no_such_module:make: No module named 'no_such_module'"),
        ("swap json:no_such_function", "burnish swap: json:no_such_function: module 'json' has no attribute"),
        ("swap json:__name__", "burnish swap: json:__name__ is a str, expected a function"),
        ("swap builtins:dict", "burnish swap: builtins:dict returned dict, expected a torch.nn.Module"),
        ("swap json:loads", "burnish swap: json:loads needs s, expected a function without arguments that returns"),
        ("swap torch.nn:Linear", "burnish swap: torch.nn:Linear needs in_features, out_features, expected a function"),
        (
            "swap builtins:iter",
            "burnish swap: builtins:iter raised TypeError: iter expected at least 1 argument, got 0\n",
        ),
        ("new-op", "burnish new-op: the following arguments are required: NAME"),
        ("new-op Bad-Name", "burnish new-op: op name 'Bad-Name': expected lower-case words joined by '_'"),
        ("new-op int8_linear", "burnish new-op: an op named 'int8_linear' exists"),
        ("new-op row_thing --dir nowhere", "burnish new-op: nowhere is not a checkout of burnish"),
    ],
)
def test_bad_argument_is_one_line_and_exit_2(capsys, monkeypatch, argv, message):
    code, out, err = run(capsys, *argv.split())
    assert code == 2
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert not out


def test_cuda_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run(capsys, "bench", "--device", "cuda")
    assert (code, err) == (2, "burnish bench: --device cuda: no GPU is visible to torch\n")


@pytest.mark.parametrize(("package", "argv"), [("rich", []), ("matplotlib", ["--plot", "x.png"])])
def test_missing_extra_says_what_to_install(capsys, monkeypatch, package, argv):
    for name in list(sys.modules):
        if name.partition(".")[0] == package or name in ("burnish.bench.table", "burnish.bench.plot"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = run(capsys, *SMALL, *argv)
    assert (code, err) == (2, f"burnish bench: {package} is not installed: pip install 'burnish[bench]'\n")


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"burnish {burnish.__version__}\n")


@needs_library
def test_bench_writes_table_json_and_plot(capsys, tmp_path):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    rows, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    code, out, _ = run(capsys, *SMALL, "--json", str(rows), "--plot", str(picture))
    assert code == 0
    assert "M3-K32-bf16" in out
    assert "peer:torch" in out
    document = json.loads(rows.read_text())
    assert [row["impl"] for row in document["rows"]] == ["cpu", "peer:torch"]
    assert str(tmp_path) not in rows.read_text()
    assert document["machine"]["command"].startswith("burnish bench int8_quantize_rows --shape 3,32")
    assert document["machine"]["ceilings"].keys() == {"read_gbps", "fp32_tops"}
    assert picture.stat().st_size > 1000


@needs_library
def test_bench_of_every_linear_op_at_a_small_shape(capsys):
    pytest.importorskip("rich")
    code, out, _ = run(capsys, "bench", "--shape", "2,16,32", "--rounds", "1", "--min-time", "0.01")
    assert code == 0, out
    assert "FAILED" not in out


def test_bench_counts_in_a_process_of_its_own(capfd, tmp_path):
    pytest.importorskip("rich")
    path = tmp_path / "counters.json"
    words = ["bench", "--counters", "int8_linear", "int8_linear_backward", "--shape", "1,16,32", "--json", str(path)]
    code = cli.main(words)
    out = capfd.readouterr().out
    assert code == 0, out
    assert "int8_linear_fwd" in out
    assert "skipped int8_linear_backward M1-N16-K32-bf16: the op has no CUDA C++ kernel" in out
    (row,) = json.loads(path.read_text())["counters"]
    assert row["case"] == "M1-N16-K32-bf16"
    assert row["launches"][0]["global_load_bytes"] == 32 * 2


def test_bench_of_a_wrong_kernel_fails(capsys, monkeypatch):
    pytest.importorskip("rich")
    from burnish.bench import gate, runner

    monkeypatch.setattr(runner, "implementation", lambda spec, backend, args: lambda: spec.reference(*args))
    monkeypatch.setattr(gate.Gate, "objection", lambda self, call, args: "N1: off")
    code, out, _ = run(capsys, *SMALL)
    assert code == 1
    assert "FAILED int8_quantize_rows M3-K32-bf16 cpu: N1: off" in out


class TestDoctor:
    def test_lists_each_backend_of_each_op(self, capsys):
        code, out, _ = run(capsys, "doctor")
        assert code == (0 if HAS_LIBRARY else 1)
        for name, spec in registry.all_ops().items():
            section = out.partition(f"\nop {name}\n")[2].partition("\n\n")[0].splitlines()
            backends = [line.split()[0] for line in section]
            assert backends == ["reference", "cpu", *(impl.backend for impl in spec.impls)]
            assert all(len(line.split()) > 1 for line in section)
        for word in ("isa", "threads", "torch", "triton", "cuda", "_native.so", "_cuda.so"):
            assert f"\n  {word} " in out

    def test_says_that_cuda_kernels_run_on_the_cpu(self, monkeypatch):
        assert "run on the CPU" not in doctor.report()
        monkeypatch.setattr(native, "emulating", lambda: True)
        assert "CUDA C++ kernels run on the CPU, for tests (BURNISH_EMULATE_CUDA)" in doctor.report()

    def test_without_the_library(self, capsys, monkeypatch):
        monkeypatch.setitem(native.missing, "_native.so", "the CPU kernels were not built: do it")
        code, out, _ = run(capsys, "doctor")
        assert code == 1
        assert "_native.so  the CPU kernels were not built: do it" in out

    def test_goes_on_after_a_plugin_that_cannot_be_imported(self, capsys, monkeypatch):
        points = [metadata.EntryPoint("third", name, "burnish.ops") for name in ("no_such_plugin", "json")]
        monkeypatch.setattr(metadata, "entry_points", lambda **_: points)
        registry.plugins.cache_clear()
        try:
            code, out, _ = run(capsys, "doctor")
            assert code == 1
            rows = out.partition("\nplug-ins\n")[2].splitlines()[:2]
            assert rows[0].startswith("  no_such_plugin  cannot be imported: ModuleNotFoundError: No module named")
            assert rows[1] == "  json            loaded (package ?)"
            assert "\nop int8_linear\n" in out
            code, out, err = run(capsys, "bench")
            assert (code, out, err.count("\n")) == (1, "", 1)
            assert err.startswith("burnish bench: the package ? announces ops in no_such_plugin, which cannot be")
        finally:
            registry.plugins.cache_clear()

    @pytest.mark.parametrize(
        ("name", "value", "problem"),
        [
            ("BURNISH_BACKEND", "gpu", "invalid, expected one of: reference, cpu, triton, native, auto"),
            ("BURNISH_CPU_ISA", "sse9", "invalid, expected one of: generic, avx2, avx512"),
            ("BURNISH_BUILD_CUDA", "yes", "invalid, expected one of: 0, 1"),
            ("BURNISH_CACHE_DIR", __file__, "invalid, expected a folder"),
            ("BURNISH_BAKEND", "cpu", "burnish reads no variable of this name"),
        ],
    )
    def test_nonsense_in_the_environment_is_named(self, monkeypatch, name, value, problem):
        monkeypatch.setenv(name, value)
        (line,) = [line for line in doctor.report().splitlines() if line.split()[:1] == [name]]
        assert line.endswith(f"{value!r}: {problem}")

    def test_sound_values_pass(self, monkeypatch, tmp_path):
        for name, value in (("BURNISH_BACKEND", "auto"), ("BURNISH_CPU_ISA", "avx2"), ("BURNISH_CACHE_DIR", tmp_path)):
            monkeypatch.setenv(name, str(value))
        assert "invalid" not in doctor.report()


@needs_library
def test_swap_prints_the_report_and_saves(capsys, tmp_path, monkeypatch):
    (tmp_path / "small_model.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, out, err = run(capsys, "swap", "small_model:make", "--save", str(tmp_path / "saved"))
    assert (code, err) == (0, "")
    assert "Int8Linear" in out
    assert (Path(tmp_path) / "saved" / "burnish.json").is_file()
    code, _, err = run(capsys, "swap", "small_model:make", "--layers", "nothing.*")
    assert code == 2
    assert "nothing.*" in err
    assert err.count("\n") == 1
    code, _, err = run(capsys, "swap", "small_model:make", "--save", "/proc/x")
    assert code == 2
    assert err.startswith("burnish swap: save: /proc/x cannot be written")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def make():\n    raise ValueError('no\\nweights')", "broken_model:make raised ValueError: no weights ("),
        ("1 / 0\n", "broken_model:make: importing broken_model raised ZeroDivisionError: division by zero ("),
        ("def make(:\n", "broken_model:make: importing broken_model raised SyntaxError: "),
    ],
)
def test_a_model_that_cannot_be_made_is_one_line(capsys, tmp_path, monkeypatch, source, message):
    (tmp_path / "broken_model.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_model", raising=False)
    code, out, err = run(capsys, "swap", "broken_model:make")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"burnish swap: {message}")
    assert "broken_model.py" in err


def test_bench_leaves_what_it_is_to_write_alone_until_it_has_run(capsys, tmp_path):
    kept = tmp_path / "kept.json"
    kept.write_text("{}")
    for path in (kept, tmp_path / "new.json"):
        code, _, _ = run(capsys, "bench", "softmaxx", "--json", str(path))
        assert code == 2
    assert [path.read_text() for path in tmp_path.iterdir()] == ["{}"]


def test_a_reader_that_goes_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "burnish", "doctor"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


class TestNewOp:
    @pytest.fixture
    def checkout(self, tmp_path):
        """A checkout as far as a scaffold needs one: the folders, and the headers that ours has."""
        (tmp_path / "python" / "burnish" / "ops").mkdir(parents=True)
        (tmp_path / "csrc" / "cpu").mkdir(parents=True)
        return tmp_path

    def test_writes_the_two_files_once(self, capsys, checkout):
        code, out, err = run(capsys, "new-op", "soft_thing", "--dir", str(checkout))
        record, kernel = checkout / "python/burnish/ops/soft_thing.py", checkout / "csrc/cpu/soft_thing.cpp"
        assert (code, err) == (0, "")
        assert out.splitlines()[:2] == [str(record), str(kernel)]
        assert "pytest tests -k soft_thing" in out
        assert "@NAME@" not in record.read_text() + kernel.read_text()
        record.write_text("mine")
        code, _, err = run(capsys, "new-op", "soft_thing", "--dir", str(checkout))
        assert (code, err) == (2, f"burnish new-op: {record} exists\n")
        assert record.read_text() == "mine"

    @needs_library
    @pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
    def test_builds_and_passes_the_kit(self, capsys, checkout):
        run(capsys, "new-op", "soft_thing", "--dir", str(checkout))
        include = Path(torch.__file__).parent / "include"
        command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
        command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}", "-isystem", str(include)]
        command += [f"-L{include.parent / 'lib'}", "-ltorch_cpu"]
        library = checkout / "soft_thing.so"
        sources = [str(checkout / "csrc/cpu/soft_thing.cpp"), str(ROOT / "csrc/cpu/parallel.cpp")]
        subprocess.run([*command[:-2], *sources, "-o", str(library), *command[-2:]], check=True)
        script = (
            "import importlib.util, sys, torch, burnish\n"
            "torch.ops.load_library(sys.argv[1])\n"
            "spec = importlib.util.spec_from_file_location('soft_thing', sys.argv[2])\n"
            "module = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(module)\n"
            "from burnish import bench, testing\n"
            "checks = testing.plan([module.SPEC], ['cpu']).checks\n"
            "for check in checks:\n"
            "    if check.rule != 'compile':\n"  # takes a compiler's minutes
            "        check.run()\n"
            "plan = bench.Plan(bench.select_cases(['soft_thing'], pattern='M1-*'), rounds=1, min_ms=0.01)\n"
            "rows = bench.run(plan).rows\n"
            "assert all(row.timed for row in rows), rows\n"
            "print('CHECKS', len(checks), flush=True)\n"
            "import os, signal\n"
            "torch.set_num_threads(2)\n"
            "many = torch.ones(2**17)\n"
            "module.soft_thing(many)\n"  # starts torch's threads, which a forked child has not
            "child = os.fork()\n"
            "if child == 0:\n"
            "    signal.alarm(30)\n"
            "    module.soft_thing(many)\n"
            "    os._exit(0)\n"
            "assert os.waitpid(child, 0)[1] == 0, 'a forked child hangs'\n"
        )
        record = checkout / "python/burnish/ops/soft_thing.py"
        done = subprocess.run([sys.executable, "-c", script, library, record], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.rpartition("CHECKS")[2]) > 50
