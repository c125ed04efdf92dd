"""The table and the progress bar of ``burnish bench``, in rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from burnish.bench.counters import Count, Launch
from burnish.bench.rows import Results, Row, cases_of, fastest, summary
from burnish.density_table import Entry

#: what the longest row needs: a narrower terminal wraps it, which is better than rich's cutting it
_WIDTH = 132

#: what others may take of the cores before a run's figures are doubted
QUIET = 0.05


def console(stderr: bool = False) -> Console:
    """A console that cuts no row, also where output goes to a file."""
    found = Console(stderr=stderr, highlight=False)
    return Console(stderr=stderr, highlight=False, width=max(found.width, _WIDTH))


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """The callback for :func:`burnish.bench.run`; it draws on the terminal's stderr, and nothing elsewhere."""
    screen = console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("preparing")

        def update(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=label)

        yield update


def show(results: Results, screen: Console) -> None:
    """Print machine, rows and summary; slower rows look like faster ones, failed ones say why."""
    about = results.machine
    where = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads, {about['isa'] or 'no native library'}"
    screen.print(f"{where}; torch {about['torch']}, burnish {about['burnish']} ({about['commit'] or 'installed'})")
    if about["ceilings"]:
        screen.print("measured between the rows: " + ", ".join(map(_ceiling, about["ceilings"].items())))
    groups = cases_of(results.rows)
    for op in dict.fromkeys(op for op, _ in groups):
        screen.print(_table(op, {case: rows for (name, case), rows in groups.items() if name == op}))
    for row in results.rows:
        if row.failed:
            screen.print(Text(f"FAILED {row.op} {row.case} {row.impl}: {row.failed}", style="red"), soft_wrap=True)
    for (op, impl, reason), where in _skipped(results.rows).items():
        all_cases = len(where) == sum(name == op for name, _ in groups) > 1
        which = where[0] if len(where) == 1 else "all cases" if all_cases else ", ".join(where)
        screen.print(Text(f"skipped {op} {impl}: {reason} ({which})", style="yellow"), soft_wrap=True)
    for name, reason in about.get("absent_peers", {}).items():
        screen.print(Text(f"absent peer {name}: {reason}", style="yellow"), soft_wrap=True)
    taken = about.get("neighbours")
    if taken is not None and taken > QUIET:
        text = f"the machine was not quiet: other processes had {taken:.0%} of the cores while timing"
        screen.print(Text(text, style="red"), soft_wrap=True)
    for line in summary(results.rows):
        screen.print(line, soft_wrap=True)


def _skipped(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[str]]:
    """The cases that an implementation of an op skipped, by the reason."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.skipped:
            found.setdefault((row.op, row.impl, row.skipped), []).append(row.case)
    return found


def _table(op: str, cases: dict[str, list[Row]]) -> Table:
    table = Table(title=op, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")
    for name in ("case", "impl"):
        table.add_column(name, no_wrap=True)
    for name in ("median us", "q25 - q75", "GB/s", "TOP/s", "roofline", "speedup"):
        table.add_column(name, justify="right", no_wrap=True)
    for case, rows in cases.items():
        best = min((row for row in (fastest(rows, True), fastest(rows, False)) if row), key=_median, default=None)
        for index, row in enumerate(row for row in rows if not row.skipped):
            table.add_row("" if index else case, row.impl, *_figures(row), style="bold" if row is best else None)
    return table


def show_counters(counts: Sequence[Count], screen: Console) -> None:
    """Print what each case's launches move and do, beside what the op has to move at least."""
    for op in dict.fromkeys(one.op for one in counts):
        table = Table(title=op, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")
        table.add_column("case, launches", no_wrap=True)
        for name in ("moved", "compulsory", "ratio", "via L2", "sect/load", "sect/store", "conflicts", "mma", "copies",
                     "barriers"):  # fmt: skip
            table.add_column(name, justify="right", no_wrap=True)
        for one in counts:
            if one.op != op or one.skipped:
                continue
            table.add_row(one.case, *map(_size, (one.moved, one.compulsory)), f"{one.moved / one.compulsory:.3f}x")
            for launch in one.launches:
                table.add_row(*_launch(launch))
        if table.row_count:
            screen.print(table)
    for one in counts:
        if one.skipped:
            screen.print(Text(f"skipped {one.op} {one.case}: {one.skipped}", style="yellow"), soft_wrap=True)


def show_break_even(entries: Sequence[Entry], screen: Console) -> None:
    """Print, for each op and form, the density up to which it is not slower than the dense layer, by rows M."""
    rows = sorted({entry.M for entry in entries})
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("faster than dense up to", no_wrap=True)
    for m in rows:
        table.add_column(f"M = {m}", justify="right", no_wrap=True)
    forms: dict[tuple[str, str], dict[int, Entry]] = {}
    for entry in entries:
        forms.setdefault((entry.op, entry.form), {})[entry.M] = entry
    for (op, form), by_rows in forms.items():
        table.add_row(f"{op} {form}".rstrip(), *(_break_even(by_rows.get(m)) for m in rows))
    screen.print(table)


def _break_even(entry: Entry | None) -> str | Text:
    if entry is None:
        return "-"
    if entry.density == 0:
        return Text("never", style="red")
    best = max(speedup for _, speedup in entry.curve)
    return f"{entry.density:.0%} ({best:.1f}x at best)"


def _launch(launch: Launch) -> tuple[str, ...]:
    ratios = (launch.sectors_per_request(kind) for kind in ("load", "store"))
    counts = ("bank_conflicts", "mma", "shared_copy_requests", "barriers")
    return (
        "  " + launch.kernel.partition("<")[0].removesuffix("_kernel"),
        *(_size(launch.moved), "", "", _size(launch.through_l2)),
        *("-" if ratio is None else f"{ratio:.1f}" for ratio in ratios),
        *(str(launch.count(name)) for name in counts),
    )


def _size(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} KB"


def _median(row: Row) -> float:
    return row.median_us or 0.0


def _ceiling(item: tuple[str, float]) -> str:
    name, value = item
    kind, _, unit = name.partition("_")
    return f"{kind} {value:.1f} GB/s" if unit == "gbps" else f"{kind} {value:.3f} TOP/s"


def _figures(row: Row) -> tuple[str | Text, ...]:
    if row.median_us is None:
        return (Text("FAILED", style="red"),)
    speedup = Text("-")
    if row.speedup is not None:
        speedup = Text(f"{row.speedup:.2f}x", style="green" if row.speedup > 1 else "red" if row.speedup < 1 else "")
    return (
        f"{row.median_us:.1f}",
        f"{row.q25_us:.1f} - {row.q75_us:.1f}",
        f"{row.gbps:.1f}",
        f"{row.tflops:.3f}",
        "-" if row.roofline is None else f"{row.roofline:.0%}",
        speedup,
    )
