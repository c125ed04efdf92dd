"""``python -m burnish.testing [OP ...]``: the conformance kit without pytest; exit status 1 if a check fails.

Prints one line an op and backend with the number of checks that ran, then what was left out and why. A kernel that
stops the process leaves Python's stack on stderr, in which a file called ``check`` and the check's id stands.
``--digest`` prints instead one hash an op over the bits of the results, to compare instruction sets and thread counts
by.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from burnish import registry
from burnish.errors import PluginError
from burnish.testing import calls, digest, fuzz
from burnish.testing.calls import backends
from burnish.testing.plan import plan
from burnish.testing.values import SPECIAL_POSITIONS


def main(argv: list[str] | None = None) -> int:
    """Run the checks that the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m burnish.testing", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to test; default: all")
    parser.add_argument("--backend", action="append", choices=registry.BACKENDS, help="default: all that can run")
    parser.add_argument("--only", action="append", metavar="RULE", help="forward, guard, ...; default: all")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="and N fuzzed examples an op and backend")
    most = SPECIAL_POSITIONS
    parser.add_argument("--positions", type=int, default=most, help=f"of a special value in an input; default: {most}")
    parser.add_argument("--threads", type=int, default=1, help="torch.set_num_threads; default: 1")
    parser.add_argument("--schedules", type=int, help=f"of an emulated CUDA kernel; default: {calls.SCHEDULES}")
    parser.add_argument("--digest", action="store_true", help="print a hash of the results of each op and backend")
    asked = parser.parse_args(argv)
    faulthandler.enable()
    torch.set_num_threads(asked.threads)
    calls.SCHEDULES = asked.schedules or calls.SCHEDULES
    try:
        specs = [registry.get(name) for name in asked.ops] or list(registry.all_ops().values())
    except (KeyError, PluginError) as error:
        parser.error(error.args[0])
    if asked.digest:
        for spec in specs:
            for backend in backends(spec)[0]:
                if asked.backend is None or backend in asked.backend:
                    print(spec.name, backend, digest(spec, backend, asked.fuzz))
        return 0
    return _run(specs, asked)


def _run(specs: list[registry.OpSpec], asked: argparse.Namespace) -> int:
    start = time.monotonic()
    made = plan(specs, asked.backend, asked.positions)
    ran: Counter[str] = Counter()
    failed = 0
    for check in made.checks:
        if asked.only and check.rule not in asked.only:
            continue
        ran[f"{check.spec.name} {check.backend}"] += 1
        try:
            _run_named(check.id, check.run)
        except Exception:
            failed += 1
            print(f"FAILED {check.id}", file=sys.stderr)
            traceback.print_exc()
    for spec in specs if asked.fuzz else ():
        for backend in backends(spec)[0]:
            if asked.backend is None or backend in asked.backend:
                fuzzed = partial(fuzz, spec, backend, asked.fuzz)
                ran[f"{spec.name} {backend} fuzzed"] += _run_named(f"{spec.stem}-{backend}-fuzz", fuzzed)
    for name, count in ran.items():
        print(f"{name}: {count}")
    for name, reason in made.skipped.items():
        print(f"left out: {name}: {reason}")
    print(f"{sum(ran.values())} ran, {failed} failed, {time.monotonic() - start:.0f} s")
    return 1 if failed or not ran else 0


def _run_named(name: str, run: Callable[[], Any]) -> Any:
    """``run()`` under a frame that bears the check's name: all that faulthandler tells of a crash is frames."""
    return eval(compile("run()", f"check {name}", "eval"), {"run": run})


if __name__ == "__main__":
    sys.exit(main())
