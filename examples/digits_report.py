"""The rows of ``digits.py`` as one table and one chart, both made from the JSON alone. Losing rows are shown like
winning ones.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = ["chart", "show"]

WIDE = 110  # columns of a table that goes to no terminal
COLORS = {"dense": "#4f5d75", "pruned": "#8a94a3", "finalized": "#e07b39", "int8": "#b5391f"}

Row = dict[str, Any]


def label(row: Row) -> str:
    return row["stage"] if row["stage"] == "dense" else f"{row['sparsity']:.0%} {row['stage']}"


def accuracy(row: Row) -> float:
    return 100 * statistics.fmean(row["accuracy"])


def spread(row: Row) -> float:
    values = [100 * value for value in row["accuracy"]]
    return statistics.stdev(values) if len(values) > 1 else 0.0


def by_model(result: dict[str, Any]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in result["rows"]:
        groups.setdefault(row["model"], []).append(row)
    return groups


def show(result: dict[str, Any], console: Console, *, reports: bool = False) -> None:
    about, settings = result["machine"], result["settings"]
    for model, rows in by_model(result).items():
        dense = rows[0]
        sizes = list(dense["median_us"])
        table = Table(
            title=f"{model}, pruned by {settings['pattern']}: {about['cpu']}, {about['threads']} threads, "
            f"torch {about['torch']}, burnish {about['burnish']}",
            caption=f"accuracy of {result['test_digits']} digits in %, mean ± over {settings['seeds']} seeds; us: "
            "medians of interleaved calls, and how many times faster than dense",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("stage", no_wrap=True)
        for name in ("accuracy", "to dense", "KB", "of dense"):
            table.add_column(name, justify="right", no_wrap=True)
        for size in sizes:
            table.add_column(f"us, {size} at once", justify="right", no_wrap=True)
            table.add_column("x", justify="right", no_wrap=True)
        for row in rows:
            cells = [label(row), f"{accuracy(row):.2f} ± {spread(row):.2f}", f"{accuracy(row) - accuracy(dense):+.2f}"]
            cells += [f"{row['bytes'] / 1e3:.0f}", f"{row['bytes'] / dense['bytes']:.0%}"]
            for size in sizes:
                gain = dense["median_us"][size] / row["median_us"][size]
                cells += [f"{row['median_us'][size]:.0f}", f"[{'bold green' if gain >= 1 else 'red'}]{gain:.2f}[/]"]
            table.add_row(*cells)
        console.print(table)
        if reports:
            for row in rows:
                if row["report"]:
                    console.print(f"{model}, {label(row)}:\n{row['report']}\n", highlight=False, markup=False)


def chart(result: dict[str, Any], path: Path) -> None:
    """Accuracy with the seeds' range, bytes, and the speed-up of each stage over the dense network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups, about = by_model(result), result["machine"]
    plt.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans"})
    figure, panels = plt.subplots(len(groups), 3, figsize=(14, 0.8 + 3.9 * len(groups)), squeeze=False)
    for line, (model, rows) in zip(panels, groups.items(), strict=True):
        dense, places = rows[0], range(len(rows))
        colors = [COLORS[row["stage"]] for row in rows]
        sizes = list(dense["median_us"])
        line[0].errorbar([accuracy(row) for row in rows], places, xerr=[spread(row) for row in rows], fmt="none",
                         ecolor="#33373d", elinewidth=1, capsize=2.5)  # fmt: skip
        line[0].scatter([accuracy(row) for row in rows], places, color=colors, zorder=3)
        line[0].axvspan(accuracy(dense) - 1, accuracy(dense), color="#eeeeee", zorder=0)
        line[0].set_title(f"{model}: accuracy, %; shaded: within a point of dense")
        line[1].barh(places, [row["bytes"] / 1e3 for row in rows], color=colors, height=0.68)
        for place, row in enumerate(rows):
            line[1].text(row["bytes"] / 1e3, place, f" {row['bytes'] / dense['bytes']:.0%}", va="center")
        line[1].set_title("KB of parameters and buffers")
        for index, size in enumerate(sizes):
            gains = [dense["median_us"][size] / row["median_us"][size] for row in rows]
            at = [place + 0.36 * (index - (len(sizes) - 1) / 2) for place in places]
            line[2].barh(at, gains, color=colors, height=0.32, alpha=1 if index else 0.6)
            for place, gain in zip(at, gains, strict=True):
                line[2].text(gain, place, f" {gain:.2f}x, {size} at once", va="center", fontsize=7)
        line[2].axvline(1, color="#33373d", lw=1)
        line[2].set_title("times the dense network's speed")
        for index, panel in enumerate(line):
            panel.set_yticks(places, [label(row) for row in rows] if index == 0 else [])
            panel.invert_yaxis()
            panel.spines[["top", "right"]].set_visible(False)
            if index:
                panel.set_xlim(0, 1.3 * panel.get_xlim()[1])
    figure.text(0.995, 0.005, f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, "
                f"{about['date'][:10]}", ha="right", fontsize=8, color="#777")  # fmt: skip
    figure.tight_layout(rect=(0, 0.015, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
