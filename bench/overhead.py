"""What burnish costs where there is next to nothing to compute: the call of a tiny layer, the step of an optimizer of
tiny tensors, and the import.

    python bench/overhead.py

Times ``nn.Linear`` and the ``Int8Linear`` made from it in turns, at 1 x 64 x 64 without gradients, where only the way
to the kernel counts; steps of AdamW over 1000 fp32 parameters of 64 elements in 1, 2 and 4 groups, on one thread,
burnish's and torch's in turns; and ``import burnish`` after ``import torch``, each time in a new process.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import burnish
import torch
from burnish.registry import dtype_name
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROUNDS, CALLS, IMPORTS = 31, 2000, 9
TENSORS, ELEMENTS, STEPS = 1000, 64, 20
IMPORT = "import time, torch; start = time.perf_counter(); import burnish; print(time.perf_counter() - start)"


def microseconds(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call(x)
    return (time.perf_counter() - start) / CALLS * 1e6


def optimizer(groups: int, kind: Callable[..., torch.optim.Optimizer], **options: bool) -> torch.optim.Optimizer:
    """AdamW over small parameters that have gradients, in groups of their own weight decay."""
    params = [torch.nn.Parameter(torch.randn(ELEMENTS)) for _ in range(TENSORS)]
    for param in params:
        param.grad = torch.randn(ELEMENTS)
    parts = [{"params": params[group::groups], "weight_decay": 0.01 * group} for group in range(groups)]
    return kind(parts, lr=1e-3, **options)


def step_milliseconds(optimizer: torch.optim.Optimizer) -> float:
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def steps() -> Table:
    """Medians and quartiles of steps, of burnish's AdamW and torch's."""
    table = Table("groups", "torch fused ms", "torch foreach ms", "burnish ms", "quartiles")
    table.title = f"a step of AdamW, {TENSORS} x {ELEMENTS}, one thread"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for groups in (1, 2, 4):
            rivals = [
                optimizer(groups, torch.optim.AdamW, fused=True),
                optimizer(groups, torch.optim.AdamW, foreach=True),
                optimizer(groups, burnish.optim.AdamW),
            ]
            for rival in rivals:
                rival.step()
            rounds = [
                [step_milliseconds(rival) for rival in rivals]
                for _ in track(range(ROUNDS), f"steps, {groups} groups", transient=True)
            ]
            fused, foreach, ours = zip(*rounds, strict=True)
            low, middle, high = statistics.quantiles(ours, n=4)
            torchs = (f"{statistics.median(column):.2f}" for column in (fused, foreach))
            table.add_row(str(groups), *torchs, f"{middle:.2f}", f"{low:.2f} to {high:.2f}")
    finally:
        torch.set_num_threads(threads)
    return table


def import_milliseconds() -> float:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    return float(done.stdout) * 1e3


def main() -> None:
    torch.manual_seed(0)
    table = Table("dtype", "nn.Linear us", "Int8Linear us", "difference", "quartiles", title="a call at 1 x 64 x 64")
    for dtype in (torch.float32, torch.bfloat16):
        linear = torch.nn.Linear(64, 64, dtype=dtype)
        layer = burnish.nn.Int8Linear.from_float(linear)
        x = torch.randn(1, 64, dtype=dtype)
        with torch.no_grad():
            pairs = [
                (microseconds(linear, x), microseconds(layer, x))
                for _ in track(range(ROUNDS), f"calls, {dtype_name(dtype)}", transient=True)
            ]
        theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        low, middle, high = statistics.quantiles([mine - other for other, mine in pairs], n=4)
        table.add_row(dtype_name(dtype), f"{theirs:.2f}", f"{ours:.2f}", f"{middle:+.2f}", f"{low:+.2f} to {high:+.2f}")
    of_optimizers = steps()
    imports = [import_milliseconds() for _ in track(range(IMPORTS), "imports", transient=True)]
    console = Console()
    console.print(table)
    console.print(of_optimizers)
    low, middle, high = statistics.quantiles(imports, n=4)
    console.print(f"import burnish adds {middle:.0f} ms ({low:.0f} to {high:.0f}) to import torch")


if __name__ == "__main__":
    main()
