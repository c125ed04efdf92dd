"""The rows of ``sentence_encoder.py`` as one table and one chart.

    python examples/encoder_report.py examples/out/sentence_encoder.json     # again, from the file

Both are made from the JSON alone. Losing rows are shown like winning ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = ["chart", "show"]

LABELS = {
    "fp32": "torch fp32",
    "bf16": "torch bf16",
    "bf16-compiled": "torch bf16 compiled",
    "torch-int8": "torch dynamic int8",
    "burnish-int8-fp32": "burnish int8 fp32",
    "burnish-int8-bf16": "burnish int8 bf16",
    "burnish-int8-bf16-compiled": "burnish int8 bf16 compiled",
    "burnish-rank64-bf16": "burnish rank 64 bf16",
    "burnish-rank128-bf16": "burnish rank 128 bf16",
    "burnish-rank192-bf16": "burnish rank 192 bf16",
    "burnish-svd128-bf16": "burnish svd 128 bf16",
}
WIDE = 110  # columns from which the table shows quartiles

Row = dict[str, Any]
Shape = tuple[int, int]


def by_shape(result: dict[str, Any]) -> dict[Shape, dict[str, Row]]:
    shapes: dict[Shape, dict[str, Row]] = {}
    for row in result["rows"]:
        shapes.setdefault((row["batch"], row["length"]), {})[row["variant"]] = row
    return shapes


def is_ours(variant: str) -> bool:
    return variant.startswith("burnish")


def best_of_torch(rows: dict[str, Row]) -> Row:
    return min((row for name, row in rows.items() if not is_ours(name)), key=lambda row: row["median_ms"])


def show(result: dict[str, Any], console: Console) -> None:
    shapes, machine, wide = by_shape(result), result["machine"], console.width >= WIDE
    versions = f"torch {machine['torch']}, burnish {machine['burnish']}"
    table = Table(
        title=f"{result['rows'][0]['model']}: {machine['cpu']}, {machine['threads']} threads, {versions}",
        caption=f"ms: median{' and quartiles' if wide else ''} of interleaved calls. x: times the speed of fp32.\n"
        f"cosine, kept (of the 10 nearest neighbours): against fp32, {result['texts']} texts, up to 128 tokens; "
        f"standard error of kept: up to {max(row['top10_overlap_error'] for row in result['rows']):.3f}.",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("\nvariant", no_wrap=True)
    for batch, length in shapes:
        table.add_column(f"{batch} x {length}\nms", justify="right", no_wrap=True)
        if wide:
            table.add_column("\nquartiles", justify="right", no_wrap=True, style="dim")
        table.add_column("\nx", justify="right", no_wrap=True)
    for title in ("\ncosine", "\nkept", "weights\nMB"):
        table.add_column(title, justify="right", no_wrap=True)
    for variant, first in next(iter(shapes.values())).items():
        cells = [LABELS.get(variant, variant)]
        for rows in shapes.values():
            row, fastest = rows[variant], min(other["median_ms"] for other in rows.values())
            style = "bold green" if row["median_ms"] == fastest else "red" if row["speedup_vs_fp32"] < 1 else "none"
            cells.append(f"{row['median_ms']:.1f}")
            cells += [f"{row['q25_ms']:.1f}-{row['q75_ms']:.1f}"] if wide else []
            cells.append(f"[{style}]{row['speedup_vs_fp32']:.2f}[/]")
        cells += [f"{first['cosine_mean']:.4f}", f"{first['top10_overlap']:.3f}", f"{first['weight_bytes'] / 1e6:.1f}"]
        table.add_row(*cells)
    console.print(table)
    for left in result["left_out"]:
        console.print(f"left out: {LABELS[left['variant']]}: {left['reason']}", style="yellow", markup=False)
    for line in summary(shapes):
        console.print(line, highlight=False)


def summary(shapes: dict[Shape, dict[str, Row]]) -> list[str]:
    """For each shape, the fastest of torch's rows, and our fastest that keeps as many neighbours or more."""
    lines = []
    for (batch, length), rows in shapes.items():
        rival = best_of_torch(rows)
        kept = rival["top10_overlap"]
        ours = [row for name, row in rows.items() if is_ours(name) and row["top10_overlap"] >= kept]
        if not ours:
            continue
        best = min(ours, key=lambda row: row["median_ms"])
        lines.append(
            f"{batch} x {length} tokens: {LABELS[best['variant']]} is {best['speedup_vs_fp32']:.2f}x fp32 and "
            f"{rival['median_ms'] / best['median_ms']:.2f}x the fastest of torch's ({LABELS[rival['variant']]})"
        )
    return lines


def chart(result: dict[str, Any], path: Path) -> None:
    """Speed-up over fp32 a shape, with quartiles, and the neighbours kept, as bars in the table's order."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = by_shape(result)
    variants = list(next(iter(shapes.values())))
    positions = range(len(variants))
    colors = ["#e07b39" if is_ours(variant) else "#8a94a3" for variant in variants]
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    plt.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(
        1, len(shapes) + 1, figsize=(4.2 * (len(shapes) + 1) + 1, 1.2 + 0.46 * len(variants)), sharey=True
    )
    for axis, ((batch, length), rows) in zip(axes, shapes.items(), strict=False):
        reference = rows["fp32"]["median_ms"]
        speed = [rows[variant]["speedup_vs_fp32"] for variant in variants]
        low = [max(0.0, s - reference / rows[v]["q75_ms"]) for s, v in zip(speed, variants, strict=True)]
        high = [max(0.0, reference / rows[v]["q25_ms"] - s) for s, v in zip(speed, variants, strict=True)]
        axis.barh(positions, speed, color=colors, height=0.68)
        axis.errorbar(speed, positions, xerr=[low, high], fmt="none", ecolor="#33373d", elinewidth=1, capsize=2.5)
        for position, variant in enumerate(variants):
            axis.text(0.06, position, f"{rows[variant]['median_ms']:.1f} ms", va="center", color="white", fontsize=9)
            end = speed[position] + high[position]
            axis.text(end + 0.06, position, f"{speed[position]:.2f}x", va="center", fontweight="bold", bbox=clear)
        axis.axvline(1, color="#33373d", linewidth=0.8, linestyle=":", zorder=0.5)
        axis.set_xlim(0, max(s + h for s, h in zip(speed, high, strict=True)) * 1.2)
        axis.set_title(f"speed, {batch} x {length} tokens")
        axis.set_xlabel("times fp32 (more is better)")
    rows = next(iter(shapes.values()))
    axis = axes[-1]
    axis.barh(positions, [rows[variant]["top10_overlap"] for variant in variants], color=colors, height=0.68)
    for position, variant in enumerate(variants):
        row = rows[variant]
        axis.text(0.02, position, f"cosine {row['cosine_mean']:.4f}", va="center", color="white", fontsize=9)
        overlap = f"{row['top10_overlap']:.3f}"
        axis.text(row["top10_overlap"] + 0.015, position, overlap, va="center", fontweight="bold")
    axis.set_xlim(0, 1.18)
    axis.set_title("quality against fp32")
    axis.set_xlabel("share of the 10 nearest neighbours kept")
    axes[0].set_yticks(list(positions), [LABELS.get(variant, variant) for variant in variants])
    axes[0].invert_yaxis()
    for axis in axes:
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False)
    machine = result["machine"]
    figure.suptitle(f"{result['rows'][0]['model']}: {machine['cpu']}, {machine['threads']} threads", y=0.985)
    figure.text(0.995, 0.01, f"torch {machine['torch']}, {machine['date'][:10]}", ha="right", fontsize=8, color="#777")
    figure.tight_layout(rect=(0, 0.015, 1, 0.99))
    figure.savefig(path, dpi=130)
    plt.close(figure)


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
