"""The rows of ``finetune_lora.py`` as one table and one chart.

    python examples/finetune_report.py examples/out/finetune_lora.json     # again, from the file

Both are made from the JSON alone. Losing rows are shown like winning ones. Each row of burnish's is compared with
peft's in the dtype of its activations.
"""

from __future__ import annotations

import json
import statistics
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = ["chart", "show"]

WIDE = 110  # columns of a table that goes to no terminal
SMOOTHED = 8  # steps that a point of a curve is the mean of
COLORS = {
    "peft-fp32": "#8a94a3",
    "burnish-fp32": "#e07b39",
    "burnish-int8": "#b5391f",
    "peft-bf16": "#4f5d75",
    "burnish-bf16": "#f0b429",
    "burnish-mixed": "#5f9e6e",
}

Row = dict[str, Any]


def rival_of(row: Row, rows: list[Row]) -> Row | None:
    """peft's row that one of burnish's is measured against."""
    wanted = "peft-bf16" if row["variant"].endswith(("bf16", "mixed")) else "peft-fp32"
    return next((other for other in rows if other["variant"] == wanted and other is not row), None)


def smoothed(losses: list[float]) -> list[float]:
    width = min(SMOOTHED, len(losses))
    return [statistics.fmean(losses[end - width : end]) for end in range(width, len(losses) + 1)]


def distance(one: list[float], other: list[float]) -> float:
    """The mean absolute difference of two smoothed curves."""
    return statistics.fmean(abs(a - b) for a, b in zip(smoothed(one), smoothed(other), strict=True))


def spread(values: list[float], digits: int) -> str:
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def final_losses(row: Row) -> list[float]:
    return [smoothed(losses)[-1] for losses in row["losses"]]


def title(result: dict[str, Any]) -> str:
    settings = result["settings"]
    on = "all linear layers" if not settings["targets"] else ", ".join(settings["targets"])
    return (
        f"LoRA (r {settings['rank']}, alpha {settings['alpha']}, dropout {settings['lora_dropout']:g}, on {on}) of "
        f"all-MiniLM-L6-v2, {settings['batch']} x {settings['tokens']} tokens a step"
    )


def show(result: dict[str, Any], console: Console) -> None:
    rows, machine, settings = result["rows"], result["machine"], result["settings"]
    versions = f"torch {machine['torch']}, peft {machine['peft']}, burnish {machine['burnish']}"
    table = Table(
        title=f"{title(result)}\n{machine['cpu']}, {machine['threads']} threads, {versions}",
        caption="ms: median and quartiles of interleaved steps. x: times the speed of peft in the same dtype. MB: peak "
        f"of a step over the memory before it.\nloss: mean of the last {min(SMOOTHED, settings['steps'])} of "
        f"{settings['steps']} steps; accuracy: {result['texts']['test']} texts; ± is over {settings['seeds']} seeds.",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("variant", no_wrap=True)
    for name in ("ms a step", "quartiles", "x", "step MB", "of peft's", "last loss", "accuracy"):
        table.add_column(name, justify="right", no_wrap=True, style="dim" if name == "quartiles" else "none")
    for row in rows:
        rival, faster, memory = rival_of(row, rows), "", ""
        if rival is not None:
            gain = rival["median_ms"] / row["median_ms"]
            faster = f"[{'bold green' if gain >= 1 else 'red'}]{gain:.2f}[/]"
            memory = f"{row['step_memory_mb'] / rival['step_memory_mb']:.2f}"
        quartiles = f"{row['q25_ms']:.0f}-{row['q75_ms']:.0f}"
        cells = (row["label"], f"{row['median_ms']:.0f}", quartiles, faster, f"{row['step_memory_mb']:.0f}", memory)
        table.add_row(*cells, spread(final_losses(row), 3), spread(row["accuracy"], 3))
    console.print(table)
    for line in summary(rows):
        console.print(line, highlight=False)


def summary(rows: list[Row]) -> list[str]:
    """How far burnish's curves are from peft's, and two seeds of peft's from each other."""
    lines = []
    for row in rows:
        rival = rival_of(row, rows)
        if rival is None:
            continue
        apart = statistics.fmean(distance(*pair) for pair in zip(row["losses"], rival["losses"], strict=True))
        line = f"{row['label']}: its smoothed loss is on average {apart:.3f} from {rival['label']}'s of the same seed"
        seeds = [distance(*pair) for pair in combinations(rival["losses"], 2)]
        lines.append(f"{line}; two seeds of {rival['label']}: {statistics.fmean(seeds):.3f}" if seeds else line)
    return lines


def chart(result: dict[str, Any], path: Path) -> None:
    """Loss curves, smoothed, the mean of the seeds with their range; time and memory a step as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, settings, machine = result["rows"], result["settings"], result["machine"]
    plt.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans"})
    figure, (curves, times, memory) = plt.subplots(1, 3, figsize=(14.5, 4.8), gridspec_kw={"width_ratios": [1.5, 1, 1]})
    first = min(SMOOTHED, settings["steps"])
    for row in rows:
        smooth = list(zip(*map(smoothed, row["losses"]), strict=True))
        steps, color = range(first, first + len(smooth)), COLORS[row["variant"]]
        dashed = "--" if row["variant"].startswith("peft") else "-"
        curves.fill_between(steps, list(map(min, smooth)), list(map(max, smooth)), color=color, alpha=0.10, linewidth=0)
        means = list(map(statistics.fmean, smooth))
        curves.plot(steps, means, dashed, color=color, linewidth=2, label=row["label"])
    band = f"; band: {settings['seeds']} seeds" if settings["seeds"] > 1 else ""
    curves.set_title(f"loss, mean of {first} steps{band}")
    curves.set_xlabel("step")
    curves.set_ylim(bottom=0)
    curves.legend(frameon=False)
    _bars(times, rows, "median_ms", "ms")
    values = [row["median_ms"] for row in rows]
    ranges = [[value - row["q25_ms"] for value, row in zip(values, rows, strict=True)]]
    ranges.append([row["q75_ms"] - value for value, row in zip(values, rows, strict=True)])
    times.errorbar(values, range(len(rows)), xerr=ranges, fmt="none", ecolor="#33373d", elinewidth=1, capsize=2.5)
    times.set_title("time of a step; x: of peft's speed")
    times.set_xlabel("ms, median and quartiles")
    _bars(memory, rows, "step_memory_mb", "MB")
    memory.set_title("memory of a step; x: peft's over it")
    memory.set_xlabel("MB at the peak, over those before it")
    memory.set_yticklabels([])
    for axis in (curves, times, memory):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title(result), y=0.985)
    about = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, peft {machine['peft']}"
    figure.text(0.995, 0.01, f"{about}, {machine['date'][:10]}", ha="right", fontsize=8, color="#777")
    figure.tight_layout(rect=(0, 0.015, 1, 0.99))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axis: Any, rows: list[Row], field: str, unit: str) -> None:
    values = [row[field] for row in rows]
    axis.barh(range(len(rows)), values, color=[COLORS[row["variant"]] for row in rows], height=0.68)
    for position, row in enumerate(rows):
        rival = rival_of(row, rows)
        gain = "" if rival is None else f"   {rival[field] / row[field]:.2f}x"
        end = row["q75_ms"] if field == "median_ms" else row[field]
        axis.text(end + 0.02 * max(values), position, f"{row[field]:.0f} {unit}{gain}", va="center", fontweight="bold")
    axis.set_xlim(0, 1.45 * max(values))
    axis.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axis.invert_yaxis()
    axis.spines["left"].set_visible(False)
    axis.tick_params(left=False)


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    source = Path(sys.argv[1])
    result = json.loads(source.read_text())
    show(result, Console())
    chart(result, source.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
