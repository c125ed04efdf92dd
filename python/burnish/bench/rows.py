"""One timed (or refused) row, and a run's rows with their JSON form."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: the row that every record's torch path gets; ``speedup`` is against it
BASELINE = "peer:torch"


@dataclass(frozen=True)
class Row:
    """``impl`` is a backend word or ``peer:<name>``; ``roofline`` a share (1.0 is the limit of this machine);
    ``speedup`` the median time of ``baseline`` over this row's. A row that was not timed has ``failed`` (it raised, or
    its result is wrong) or ``skipped`` (it does not take this case) and no figures.
    """

    op: str
    case: str
    impl: str
    median_us: float | None = None
    q25_us: float | None = None
    q75_us: float | None = None
    gbps: float | None = None
    tflops: float | None = None
    roofline: float | None = None
    baseline: str | None = None
    speedup: float | None = None
    failed: str | None = None
    skipped: str | None = None

    @property
    def timed(self) -> bool:
        return self.median_us is not None

    @property
    def is_peer(self) -> bool:
        return self.impl.startswith("peer:")

    def to_dict(self) -> dict[str, Any]:
        """The row of the JSON file; ``failed`` and ``skipped`` only where they say something."""
        values = {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}
        return {name: value for name, value in values.items() if value is not None or name not in ("failed", "skipped")}


@dataclass(frozen=True)
class Results:
    """What :func:`burnish.bench.run` returns; ``machine`` has date, commit, versions, ceilings and the command."""

    machine: dict[str, Any]
    rows: tuple[Row, ...] = field(default_factory=tuple)

    @property
    def failed(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.failed)

    def to_json(self) -> str:
        return json.dumps({"machine": self.machine, "rows": [row.to_dict() for row in self.rows]}, indent=1) + "\n"

    @classmethod
    def from_json(cls, path: str | Path) -> Results:
        """Read what ``burnish bench --json`` wrote.

        Raises:
            ValueError: the file is something else.
        """
        try:
            document = json.loads(Path(path).read_text())
            return cls(document["machine"], tuple(Row(**row) for row in document["rows"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result of burnish bench: {error}") from error


def cases_of(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by (op, case), in their order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.case), []).append(row)
    return groups


def fastest(rows: Iterable[Row], peers: bool) -> Row | None:
    """The fastest timed row, among the peers or among ours."""
    timed = [row for row in rows if row.timed and row.is_peer == peers]
    return min(timed, key=lambda row: row.median_us or math.inf, default=None)


def geomean(values: Sequence[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def summary(rows: Iterable[Row]) -> list[str]:
    """One line an op: the geometric mean of our fastest rows against the baseline and against the fastest peer."""
    ratios: dict[str, tuple[list[float], list[float], list[str]]] = {}
    for (op, case), group in cases_of(rows).items():
        ours, rival = fastest(group, peers=False), fastest(group, peers=True)
        if ours is None or rival is None or ours.median_us is None or rival.median_us is None:
            continue
        speedups, margins, lost = ratios.setdefault(op, ([], [], []))
        if ours.speedup is not None:
            speedups.append(ours.speedup)
        margins.append(rival.median_us / ours.median_us)
        if margins[-1] < 1:
            lost.append(f"{case} ({margins[-1]:.2f}x {rival.impl})")
    lines = []
    for op, (speedups, margins, lost) in ratios.items():
        against = f"{geomean(speedups):.2f}x torch, " if speedups else ""
        text = (
            f"{op}: geometric mean of {len(margins)} cases {against}{geomean(margins):.2f}x the fastest of the others"
        )
        lines.append(text + (f"; slower at {', '.join(lost)}" if lost else ""))
    return lines
