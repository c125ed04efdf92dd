"""The rows of ``optimizers.py`` as tables, verdicts and one chart, all made from the JSON alone.

python examples/optimizers_report.py out/*.json     # again, or runs of several seeds together: out/joined.png
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = ["WIDE", "chart", "show"]

WIDE = 120  # columns of a table that goes to no terminal
LAST, SMOOTHED = 30, 20  # steps that the final loss, and a point of a curve, are the mean of
REFERENCE = "torch"
STYLES = {
    "torch": ("#8a94a3", "-"),
    "burnish": ("#33373d", ":"),
    "int8": ("#e07b39", "-"),
    "split": ("#2a7f9e", "-"),
    "split-int8": ("#b5391f", "--"),
    "random": ("#5f9e6e", "--"),
    "torch-bf16": ("#c9a0c9", "-."),
}

Row = dict[str, Any]


def last_loss(row: Row) -> float:
    return statistics.fmean(row["losses"][-LAST:])


METRICS: dict[str, Callable[[Row], float]] = {"last loss": last_loss, "test loss": lambda row: row["test_loss"]}


def grouped(result: dict[str, Any]) -> dict[str, dict[str, list[Row]]]:
    """Rows, one a seed, by task and variant."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(result["rows"], key=lambda row: (row["task"], list(STYLES).index(row["variant"]), row["seed"])):
        groups.setdefault(row["task"], {}).setdefault(row["variant"], []).append(row)
    return groups


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def mean(values: list[float], digits: int) -> str:
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {spread(values):.{digits}f}" if len(values) > 1 else text


def apart(rows: list[Row], reference: list[Row], metric: Callable[[Row], float]) -> tuple[float, float]:
    """How far the mean of a form is from the reference's, and the standard deviation of the reference's seeds."""
    ours, theirs = (list(map(metric, group)) for group in (rows, reference))
    return statistics.fmean(ours) - statistics.fmean(theirs), spread(theirs)


def verdicts(task: str, variants: dict[str, list[Row]]) -> list[str]:
    """A sentence a form: how many standard deviations of the reference's seeds its mean is off, and what that says."""
    reference, lines = variants.get(REFERENCE), []
    for variant, rows in variants.items():
        if reference is None or variant == REFERENCE or [r["seed"] for r in rows] != [r["seed"] for r in reference]:
            continue
        parts = []
        for name, metric in METRICS.items():
            difference, noise = apart(rows, reference, metric)
            if noise:
                word = "within noise" if abs(difference) <= noise else "[red]beyond noise[/]"
                parts.append(f"{name} {difference:+.4f}, {difference / noise:+.2f} of the seeds' deviation: {word}")
            else:
                parts.append(f"{name} {difference:+.4f}; one seed shows no noise")
        lines.append(f"{task}, {rows[0]['label']}, from {reference[0]['label']}: {'; '.join(parts)}")
    return lines


def show(result: dict[str, Any], console: Console) -> None:
    about, settings = result["machine"], result["settings"]
    for task, variants in grouped(result).items():
        seeds = max(map(len, variants.values()))
        count = next(iter(variants.values()))[0]["parameters"]
        table = Table(
            title=f"{task}: {count} parameters, {settings['steps']} steps of AdamW, products in "
            f"{settings['precision']}; torch {about['torch']}, burnish {about['burnish']}",
            caption=f"bytes: of a parameter and its state; last loss: mean of {min(LAST, settings['steps'])} steps; "
            f"± over {seeds} seeds",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("AdamW", no_wrap=True)
        for name in ("bytes", *METRICS, "accuracy, %"):
            table.add_column(name, justify="right", no_wrap=True)
        for rows in variants.values():
            cells = [mean(list(map(metric, rows)), 4) for metric in METRICS.values()]
            accuracy = mean([100 * row["accuracy"] for row in rows], 2)
            table.add_row(rows[0]["label"], f"{rows[0]['bytes_each']:.1f}", *cells, accuracy)
        console.print(table)
        for line in verdicts(task, variants):
            console.print(line, highlight=False, soft_wrap=True)


def smoothed(losses: list[float]) -> list[float]:
    width = min(SMOOTHED, len(losses))
    return [statistics.fmean(losses[end - width : end]) for end in range(width, len(losses) + 1)]


def chart(result: dict[str, Any], path: Path) -> None:
    """Loss curves by task, the mean of the seeds with the reference's range; below, what separates them at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups, about, settings = grouped(result), result["machine"], result["settings"]
    plt.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans"})
    figure, panels = plt.subplots(
        len(groups), 2, figsize=(13, 4.4 * len(groups)), squeeze=False, gridspec_kw={"width_ratios": [1.9, 1]}
    )
    for (curves, ends), (task, variants) in zip(panels, groups.items(), strict=True):
        first = min(SMOOTHED, settings["steps"])
        for variant, rows in variants.items():
            color, line = STYLES[variant]
            smooth = list(zip(*(smoothed(row["losses"]) for row in rows), strict=True))
            steps = range(first, first + len(smooth))
            if variant == REFERENCE:
                low, high = list(map(min, smooth)), list(map(max, smooth))
                curves.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)
            wide = 3.2 if variant == REFERENCE else 1.6
            means = list(map(statistics.fmean, smooth))
            curves.plot(steps, means, line, color=color, linewidth=wide, label=rows[0]["label"])
        curves.set_yscale("log")
        curves.set_xlabel("step")
        curves.set_title(f"{task}: training loss, mean of {first} steps; band: torch's seeds")
        curves.legend(frameon=False, fontsize=9)
        _ends(ends, variants)
        for axis in (curves, ends):
            axis.spines[["top", "right"]].set_visible(False)
    note = f"{about['cpu']}, torch {about['torch']}, burnish {about['burnish']}, {about['date'][:10]}"
    figure.text(0.995, 0.005, note, ha="right", fontsize=8, color="#777")
    figure.tight_layout(rect=(0, 0.015, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _ends(axis: Any, variants: dict[str, list[Row]]) -> None:
    """The test loss of each seed, its mean, and the band in which a mean is within noise."""
    labels = []
    for place, (variant, rows) in enumerate(variants.items()):
        values = [row["test_loss"] for row in rows]
        axis.scatter(values, [place] * len(values), color=STYLES[variant][0], s=22, alpha=0.7, zorder=3)
        axis.plot([statistics.fmean(values)] * 2, [place - 0.3, place + 0.3], color="#33373d", linewidth=2, zorder=4)
        labels.append(f"{rows[0]['label']}, {rows[0]['bytes_each']:.1f} B")
        if variant == REFERENCE:
            middle, noise = statistics.fmean(values), spread(values)
            axis.axvspan(middle - noise, middle + noise, color="#eeeeee", zorder=0)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.locator_params(axis="x", nbins=4)
    axis.set_title("test loss by seed; shaded: noise")
    axis.set_xlabel("bytes are of a parameter with its state")


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    results = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    if any(other["settings"] != results[0]["settings"] for other in results):
        print("these runs have different settings", file=sys.stderr)
        return 2
    joined = results[0] | {"rows": [row for result in results for row in result["rows"]]}
    show(joined, Console(width=None if sys.stdout.isatty() else WIDE))
    chart(joined, Path(sys.argv[1]).parent / "joined.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
