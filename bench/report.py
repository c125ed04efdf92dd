"""Make bench/results/<machine>.md from the JSON files of ``burnish bench``.

    python bench/report.py --name epyc-zen4-2core op.json [more.json ...]

Rows of several files go into one page; a case that is in two of them is an error, so no run can be picked for its
figures. Every time is in the table, those of lost cases too: ``vs best`` is the fastest of the others over ours.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from burnish.bench.rows import BASELINE, Results, Row, cases_of, fastest, summary

FOLDER = Path(__file__).parent / "results"
_FACTS = ("cpu", "gpu", "cores", "threads", "isa", "cache_mib", "torch", "triton", "cuda", "python", "burnish")


def render(results: list[Results]) -> str:
    """The page.

    Raises:
        ValueError: two files time the same case, or come from different machines.
    """
    machines = {tuple(result.machine.get(fact) for fact in _FACTS) for result in results}
    if len(machines) > 1:
        raise ValueError("the files come from different machines, versions or thread counts")
    rows: list[Row] = []
    seen: set[tuple[str, str]] = set()
    for result in results:
        cases = set(cases_of(result.rows))
        if seen & cases:
            raise ValueError(f"timed in two files: {', '.join(' '.join(case) for case in sorted(seen & cases))}")
        seen |= cases
        rows += result.rows
    first = results[0].machine
    lines = [f"# {first.get('gpu') or first['cpu']}", ""]
    facts = (f"{fact.replace('_', ' ')} {first[fact]}" for fact in _FACTS if first.get(fact) not in (None, ""))
    lines += [", ".join(facts) + ".", ""]
    peers = {name: version for result in results for name, version in result.machine["peers"].items()}
    if peers:
        lines += ["Peers: " + ", ".join(f"{name} {version}" for name, version in sorted(peers.items())) + ".", ""]
    absent = {name: why for result in results for name, why in result.machine["absent_peers"].items()}
    if absent:
        lines += ["Absent: " + ", ".join(f"{name} ({why})" for name, why in sorted(absent.items())) + ".", ""]
    lines += [
        "Times are medians in us, quartiles in brackets. `roofline` is the share of the limit measured between the"
    ]
    lines += ["rows; `vs torch` and `vs best` are the time of torch's path and of the fastest other over ours.", ""]
    for op in dict.fromkeys(row.op for row in rows):
        lines += _table(op, [row for row in rows if row.op == op])
    lines += [f"- {line}" for line in summary(rows)] + [""]
    lines += _untimed([row for row in rows if not row.timed])
    lines += ["| date | commit | ceilings | others' share of the cores | command |", "| --- | --- | --- | --- | --- |"]
    for about in (result.machine for result in results):
        ceilings = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in about["ceilings"].items())
        command = about["command"].replace("|", r"\|")
        taken = "-" if about["neighbours"] is None else f"{about['neighbours']:.1%}"
        lines.append(
            f"| {about['date']} | {about['commit'] or about['burnish']} | {ceilings} | {taken} | `{command}` |"
        )
    return "\n".join(lines) + "\n"


def _untimed(rows: list[Row]) -> list[str]:
    """What was not timed and why, a line for each op, implementation and reason."""
    cases: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        why = f"failed: {row.failed}" if row.failed else str(row.skipped)
        cases.setdefault((row.op, row.impl, why), []).append(row.case)
    lines = [
        f"- {op} {impl}: {why} ({', '.join(found) if len(found) < 3 else f'{len(found)} cases'})"
        for (op, impl, why), found in cases.items()
    ]
    return ["Not timed:", "", *lines, ""] if lines else []


def _table(op: str, rows: list[Row]) -> list[str]:
    ours = list(dict.fromkeys(row.impl for row in rows if not row.is_peer))
    others = [name for name in dict.fromkeys(row.impl for row in rows if row.is_peer and row.timed)]
    head = ["case", *(f"{name} (us)" for name in ours), "GB/s", "TOP/s", "roofline"]
    head += ["torch" if name == BASELINE else name.removeprefix("peer:") for name in others] + ["vs torch", "vs best"]
    lines = [f"## {op}", "", f"| {' | '.join(head)} |", f"| --- {'| ---: ' * (len(head) - 1)}|"]
    for (_, case), group in cases_of(rows).items():
        best, rival = fastest(group, peers=False), fastest(group, peers=True)
        by_name = {row.impl: row for row in group}
        cells = [case, *(_time(by_name.get(name)) for name in ours)]
        cells += [_number(best, "gbps", ".1f"), _number(best, "tflops", ".3f"), _number(best, "roofline", ".0%")]
        cells += [_number(by_name.get(name), "median_us", ".1f") for name in others]
        cells += [_number(best, "speedup", ".2f"), f"{rival.median_us / best.median_us:.2f}" if best and rival else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _time(row: Row | None) -> str:
    if row is None or not row.timed:
        return "FAILED" if row and row.failed else "-"
    return f"{row.median_us:.1f} [{row.q25_us:.1f}, {row.q75_us:.1f}]"


def _number(row: Row | None, field: str, form: str) -> str:
    value = getattr(row, field) if row else None
    return "-" if value is None else format(value, form)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", metavar="JSON")
    parser.add_argument("--name", required=True, help="the page's name, like epyc-zen4-2core")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: bench/results)")
    options = parser.parse_args()
    try:
        page = render([Results.from_json(path) for path in options.files])
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.name}.md"
    path.write_text(page)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
