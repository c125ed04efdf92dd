"""What burnish costs where there is nothing to gain: the call of a tiny layer, and the import.

    python bench/overhead.py

Times ``nn.Linear`` and the ``Int8Linear`` made from it in turns, at 1 x 64 x 64 without gradients, where only the way
to the kernel counts; and ``import burnish`` after ``import torch``, each time in a new process.
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
IMPORT = "import time, torch; start = time.perf_counter(); import burnish; print(time.perf_counter() - start)"


def microseconds(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call(x)
    return (time.perf_counter() - start) / CALLS * 1e6


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
    imports = [import_milliseconds() for _ in track(range(IMPORTS), "imports", transient=True)]
    console = Console()
    console.print(table)
    low, middle, high = statistics.quantiles(imports, n=4)
    console.print(f"import burnish adds {middle:.0f} ms ({low:.0f} to {high:.0f}) to import torch")


if __name__ == "__main__":
    main()
