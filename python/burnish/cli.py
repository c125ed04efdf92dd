"""The ``burnish`` command.

    burnish doctor                          what this machine can run, and why not the rest
    burnish bench [OP ...] [--peers]        time ops against torch and other libraries
    burnish bench [OP ...] --counters       count what their CUDA C++ kernels move and do, on the CPU
    burnish bench [OP ...] --break-even     find the density below which sparse ops beat the dense layer, for swap_
    burnish swap MODULE:FUNCTION            swap a model's layers and print the report
    burnish new-op NAME                     scaffold an op that builds, passes the tests and is timed

Exit codes: 0 done, 1 something is wrong with what was asked about (a failed row, no CPU library, a broken plug-in), 2 a
bad argument, 141 nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import inspect
import os
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch

import burnish
from burnish.errors import PluginError
from burnish.registry import Case, OpSpec, dtype_name

_DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


class UsageError(Exception):
    """A bad argument; the message is the one line the user sees."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = parser.parse_args(arguments)
    # what results record: as typed, less the folders of this machine
    options.arguments = arguments
    options.command = shlex.join(["burnish", *(Path(a).name if Path(a).is_absolute() else a for a in arguments)])
    try:
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"burnish {options.verb}: {error}", file=sys.stderr)
        return 2
    except PluginError as error:
        print(f"burnish {options.verb}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever reads the output, like head, has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> _Parser:
    parser = _Parser(prog="burnish", description="Smaller, faster PyTorch models by swapping layers for fused ones.")
    parser.add_argument("--version", action="version", version=f"burnish {burnish.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="doctor | bench | swap | new-op")

    doctor = verbs.add_parser("doctor", help="what this machine can run, and why not the rest")
    doctor.set_defaults(run=_doctor)

    bench = verbs.add_parser("bench", help="time ops against torch and other libraries")
    bench.set_defaults(run=_bench)
    bench.add_argument("ops", nargs="*", metavar="OP", help="op names; all ops if none is given")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    bench.add_argument("--dtype", choices=tuple(_DTYPES), help="time the cases with a floating dtype in this one")
    bench.add_argument("--case", default="*", metavar="GLOB", help="only cases whose id matches, like 'M1-*'")
    bench.add_argument(
        "--shape", action="append", default=[], type=_shape, metavar="M,N,K",
        help="time this shape instead of the recorded ones; may be repeated",
    )  # fmt: skip
    bench.add_argument("--peers", action="store_true", help="time the other libraries that are installed, too")
    bench.add_argument("--peers-dir", metavar="DIR", help="where their adapters are (default: bench/peers)")
    bench.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's)")
    bench.add_argument("--rounds", type=_positive, default=20, metavar="N", help="samples a row (default: 20)")
    bench.add_argument(
        "--min-time", type=_positive_float, default=2.0, metavar="MS", help="shortest sample in ms (default: 2)"
    )
    bench.add_argument(
        "--counters", action="store_true",
        help="instead of timing, count what the CUDA C++ kernels move and do, on the CPU",
    )  # fmt: skip
    bench.add_argument(
        "--break-even", action="store_true",
        help="instead, find the density below which each sparse op beats the dense layer; swap_ reads the table",
    )  # fmt: skip
    bench.add_argument("--json", metavar="FILE", help="write the rows and the machine to FILE")
    bench.add_argument("--plot", metavar="FILE", help="write a chart to FILE, a PNG")

    swap = verbs.add_parser("swap", help="swap a model's layers for int8 ones and print the report")
    swap.set_defaults(run=_swap)
    swap.add_argument("model", metavar="MODULE:FUNCTION", help="a function without arguments that returns the model")
    swap.add_argument("--layers", default="*", metavar="GLOB", help="which layers, by name; 're:' for an expression")
    swap.add_argument("--save", metavar="DIR", help="save the swapped model")

    new_op = verbs.add_parser("new-op", help="scaffold an op that builds, passes the tests and is timed")
    new_op.set_defaults(run=_new_op)
    new_op.add_argument("name", metavar="NAME", help="lower-case words joined by '_', like row_softmax")
    new_op.add_argument("--dir", default=".", metavar="DIR", help="the root of the checkout (default: here)")
    return parser


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if not all(size.strip().isascii() and size.strip().isdigit() for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes like 64,4096,4096")
    return tuple(map(int, sizes))


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _doctor(options: argparse.Namespace) -> int:
    from burnish import doctor

    print(doctor.report())
    return doctor.exit_code()


def _bench(options: argparse.Namespace) -> int:
    from burnish import bench, native
    from burnish.bench import machine, peers

    try:
        machine.cpu_isa()
    except RuntimeError as error:
        raise UsageError(str(error).partition("\n")[0]) from error
    table = _extra("burnish.bench.table", "bench")
    for path in filter(None, (options.json, options.plot)):
        _check_writable(Path(path))
    if options.counters and (options.peers or options.plot or options.device == "cuda"):
        raise UsageError("--counters counts on the CPU, without --peers, --plot or --device cuda")
    if options.break_even and (options.peers or options.counters or options.case != "*"):
        raise UsageError("--break-even measures against the dense layer, without --peers, --counters or --case")
    if options.counters and not native.emulating():
        command = [sys.executable, "-m", "burnish", *options.arguments]
        return subprocess.run(command, env=os.environ | {"BURNISH_EMULATE_CUDA": "1"}).returncode
    plot = _extra("burnish.bench.plot", "bench") if options.plot else None
    if plot and Path(options.plot).suffix[1:] not in plot.formats():
        raise UsageError(f"cannot write {options.plot}: no image format of this name")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no GPU is visible to torch")
    if options.break_even:
        return _break_even(options, table, plot)
    try:
        cases = bench.select_cases(
            options.ops,
            pattern=options.case,
            dtype=_DTYPES[options.dtype] if options.dtype else None,
            shapes=options.shape,
            device=options.device,
        )
        found, absent = peers.load(peers.find_folder(options.peers_dir)) if options.peers else ([], {})
    except (KeyError, ValueError, FileNotFoundError) as error:
        raise UsageError(error.args[0] if error.args else str(error)) from error
    if options.counters:
        return _count(cases, options.json, table)
    plan = bench.Plan(cases, device=options.device, peers=tuple(found), rounds=options.rounds, min_ms=options.min_time)
    with table.progress_bar() as progress:
        results = bench.run(
            plan, threads=options.threads, command=options.command, absent_peers=absent, progress=progress
        )
    table.show(results, table.console())
    if options.json:
        Path(options.json).write_text(results.to_json())
    if plot and any(row.timed for row in results.rows):
        plot.draw(results, options.plot)
    ours = [row for row in results.rows if not row.is_peer]
    return 1 if results.failed or not any(row.timed for row in ours) else 0


def _check_writable(path: Path) -> None:
    """Raise UsageError, before anything is timed, where a file cannot be written; leaves it as it was."""
    found = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    if not found:
        path.unlink()


def _break_even(options: argparse.Namespace, table: Any, plot: Any) -> int:
    from burnish import density_table
    from burnish.bench import break_even, machine
    from burnish.bench.runner import limited_threads

    sizes = {shape[1:] for shape in options.shape}
    if len(sizes) > 1 or any(len(shape) != 3 for shape in options.shape):
        raise UsageError("--break-even takes shapes M,N,K with one N,K")
    rows = tuple(sorted({shape[0] for shape in options.shape})) or break_even.ROWS
    try:
        found = break_even.subjects(options.ops, _DTYPES[options.dtype or "bf16"])
    except (KeyError, ValueError) as error:
        raise UsageError(error.args[0]) from error
    with limited_threads(options.threads):
        with _writable_cache():
            density_table.check_writable(options.device)
        with table.progress_bar() as progress:
            about = machine.describe(options.device, options.command)
            measured = break_even.measure(
                found, device=options.device, rows=rows, size=next(iter(sizes), break_even.SIZE),
                rounds=options.rounds, min_ms=options.min_time, progress=progress,
            )  # fmt: skip
            entries = list(measured)
        table.show_break_even(entries, table.console())
        if options.json:
            Path(options.json).write_text(density_table.to_json(about, entries))
        with _writable_cache():
            print(f"kept for swap_ in {density_table.save(entries, options.device)}")
    if plot:
        where = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads"
        plot.draw_break_even(entries, f"{where} · torch {about['torch']} · {about['date'][:10]}", options.plot)
    return 0


@contextmanager
def _writable_cache() -> Iterator[None]:
    """Turns an OSError of a table in the cache folder into a UsageError."""
    from burnish import tables

    try:
        yield
    except OSError as error:
        raise UsageError(
            f"the table for swap_ cannot be kept in {tables.folder()}: {error.strerror}; set BURNISH_CACHE_DIR to a "
            "folder that can be written"
        ) from error


def _count(cases: Sequence[tuple[OpSpec, Case]], path: str | None, table: Any) -> int:
    from burnish.bench import counters

    try:
        with table.progress_bar() as progress:
            counts = counters.count(cases, progress)
    except burnish.BackendError as error:
        print(f"burnish bench: {error}", file=sys.stderr)
        return 1
    table.show_counters(counts, table.console())
    if path:
        Path(path).write_text(counters.to_json(counts))
    return 0 if any(not one.skipped for one in counts) else 1


def _extra(module: str, extra: str) -> Any:
    """A module that needs an optional dependency."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise UsageError(f"{package} is not installed: pip install 'burnish[{extra}]'") from error


def _swap(options: argparse.Namespace) -> int:
    module_name, colon, function = options.model.partition(":")
    if not colon or not module_name or not function:
        raise UsageError(f"{options.model!r} is not MODULE:FUNCTION")
    sys.path.insert(0, "")
    try:
        make = getattr(import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{options.model}: {error}") from error
    except Exception as error:
        raise UsageError(f"{options.model}: importing {module_name} raised {_in_a_line(error)}") from error
    model = _made(options.model, make)
    try:
        print(burnish.swap_(model, {options.layers: burnish.Int8()}))
        if options.save:
            burnish.save(model, options.save)
            print(f"saved to {options.save}")
    except (burnish.SwapError, burnish.CheckpointError) as error:
        raise UsageError(str(error)) from error
    return 0


def _made(name: str, make: Any) -> torch.nn.Module:
    """The model that the user's function makes."""
    if not callable(make):
        raise UsageError(f"{name} is a {type(make).__name__}, expected a function")
    needed = _needed(make)
    if needed:
        raise UsageError(
            f"{name} needs {', '.join(needed)}, expected a function without arguments that returns the model"
        )
    try:
        model = make()
    except Exception as error:
        raise UsageError(f"{name} raised {_in_a_line(error)}") from error
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"{name} returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def _needed(function: Any) -> list[str]:
    """The arguments that a function cannot be called without; none where it does not tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    catching_all = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in parameters if each.default is each.empty and each.kind not in catching_all]


def _in_a_line(error: Exception) -> str:
    """An error of the user's code: type, message, and the line of a file that raised it."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    at = traceback.extract_tb(error.__traceback__)[-1]
    return said if at.filename == __file__ or at.filename.startswith("<") else f"{said} ({at.filename}:{at.lineno})"


def _new_op(options: argparse.Namespace) -> int:
    from burnish import scaffold

    try:
        for path in scaffold.write(options.name, Path(options.dir)):
            print(path)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    print(f"next: python setup.py build_native && pytest tests -k {options.name} && burnish bench {options.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
