"""The chart of ``burnish bench --plot``: speed-up and share of the roofline, a group of bars a case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from burnish.bench.rows import BASELINE, Results, Row, cases_of
from burnish.density_table import Entry

#: ours in strong colours, peers in quiet ones, readable with any colour vision
_OURS = ("#d1495b", "#8f2d56", "#ee964b", "#5f0f40")
_PEERS = ("#9aa5b1", "#6c8ead", "#a9bcd0", "#58707f", "#c3b299", "#7d8c6c")
_MAX_LABEL = 14


def formats() -> set[str]:
    """The suffixes that :func:`draw` can write."""
    return set(Figure().canvas.get_supported_filetypes())


def draw(results: Results, path: str | Path) -> None:
    """Write a PNG (or what the suffix says) with one pair of panels an op.

    Raises:
        ValueError: nothing was timed, or the suffix is no image format.
    """
    ops: dict[str, dict[str, list[Row]]] = {}
    for (op, case), rows in cases_of(row for row in results.rows if row.timed).items():
        ops.setdefault(op, {})[case] = rows
    if not ops:
        raise ValueError("nothing was timed: there is nothing to plot")
    widest = max(len(cases) for cases in ops.values())
    bars = len({row.impl for cases in ops.values() for rows in cases.values() for row in rows})
    width = min(24.0, max(9.0, 1.6 + widest * (0.5 + 0.24 * bars)))
    figure = Figure(figsize=(width, 0.9 + 4.9 * len(ops)), layout="constrained")
    panels = figure.subplots(2 * len(ops), 1, squeeze=False)[:, 0]
    for index, (op, cases) in enumerate(ops.items()):
        _panels(panels[2 * index], panels[2 * index + 1], op, cases, widest)
    about = results.machine
    where = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads"
    figure.suptitle(f"{where} · torch {about['torch']} · {about['date'][:10]}", fontsize=10, color="#555555")
    figure.savefig(path, dpi=150)


def _panels(top: Any, bottom: Any, op: str, cases: dict[str, list[Row]], widest: int) -> None:
    names = list(dict.fromkeys(row.impl for rows in cases.values() for row in rows))
    names = [name for name in names if name != BASELINE]
    colors = _colors(names)
    slot = min(0.28, 0.84 / max(1, len(names)))
    for index, name in enumerate(names):
        places, speedups, shares = [], [], []
        for position, rows in enumerate(cases.values()):
            row = next((row for row in rows if row.impl == name), None)
            if row is not None:
                places.append(position + (index - (len(names) - 1) / 2) * slot)
                speedups.append(row.speedup or 0.0)
                shares.append(row.roofline or 0.0)
        drawn = top.bar(places, speedups, slot * 0.92, color=colors[name], label=name.removeprefix("peer:"))
        top.bar_label(drawn, fmt="%.2f", fontsize=6.5 if len(names) > 2 else 8, padding=1)
        bottom.bar(places, shares, slot * 0.92, color=colors[name])
    baseline_shares = [next((row.roofline for row in rows if row.impl == BASELINE), None) for rows in cases.values()]
    for position, share in enumerate(baseline_shares):
        if share is not None:
            bottom.hlines(share, position - 0.45, position + 0.45, color="#333333", linestyle="--", linewidth=1.2)
    top.axhline(1.0, color="#333333", linestyle="--", linewidth=1.2, label="torch, the baseline")
    bottom.axhline(1.0, color="#333333", linewidth=0.8)
    top.set_ylabel("speed-up over torch")
    bottom.set_ylabel("share of the roofline")
    bottom.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    top.set_title(op, loc="left", fontweight="bold", pad=24)
    top.legend(fontsize=8, frameon=False, ncols=len(names) + 1, loc="lower left", bbox_to_anchor=(-0.01, 1.0))
    for panel in (top, bottom):
        panel.set_xticks(range(len(cases)), [_wrap(case) for case in cases], fontsize=8)
        panel.set_xlim(-0.55, widest - 0.45)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.margins(y=0.12)


def _colors(names: Sequence[str]) -> dict[str, str]:
    ours = [name for name in names if not name.startswith("peer:")]
    peers = [name for name in names if name.startswith("peer:")]
    return {name: _OURS[index % len(_OURS)] for index, name in enumerate(ours)} | {
        name: _PEERS[index % len(_PEERS)] for index, name in enumerate(peers)
    }


def _wrap(case: str) -> str:
    """A case id over lines of at most a few words, broken at its dashes."""
    lines = [""]
    for part in case.split("-"):
        if lines[-1] and len(lines[-1]) + len(part) >= _MAX_LABEL:
            lines.append("")
        lines[-1] += f"-{part}" if lines[-1] else part
    return "\n".join(lines)


def draw_break_even(entries: Sequence[Entry], where: str, path: str | Path) -> None:
    """Write a chart of speed-up over density, a panel a form of an op and a line a number of rows."""
    forms: dict[str, list[Entry]] = {}
    for entry in entries:
        forms.setdefault(f"{entry.op} {entry.form}".rstrip(), []).append(entry)
    columns = min(3, len(forms))
    lines = -(-len(forms) // columns)
    figure = Figure(figsize=(4.6 * columns, 0.6 + 3.4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(forms) :]:
        panel.set_visible(False)
    for panel, (name, members) in zip(panels, forms.items(), strict=False):
        for index, entry in enumerate(members):
            panel.plot(*zip(*entry.curve, strict=True), "o-", ms=3.5, label=f"M = {entry.M}", color=f"C{index}")
        panel.axhline(1, color="#555555", lw=1)
        panel.set_yscale("log")
        panel.set_yticks([0.5, 1, 2, 4, 8, 16], ["0.5x", "1x", "2x", "4x", "8x", "16x"])
        panel.minorticks_off()
        panel.xaxis.set_major_formatter(PercentFormatter(1.0))
        panel.set_title(name, fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", lw=0.6)
    panels[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("weights kept", fontsize=9)
    figure.supylabel("times the dense layer's speed", fontsize=9)
    figure.suptitle(where, fontsize=10, color="#555555")
    figure.savefig(path, dpi=150)
