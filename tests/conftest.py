"""What all tests share: the fuzzer's length, one thread a process, and the count at the end.

The last lines of a run say how many checks of the conformance kit ran on each op and backend, and what was left out and
why; a run that selected tests but ran none of them fails.
"""

from __future__ import annotations

import faulthandler
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest
import torch

collect_ignore = ["example_op"]  # an outside package with tests of its own: see test_example_op.py

_ran: Counter[str] = Counter()
_skipped: Counter[str] = Counter()
left_out = pytest.StashKey[dict[str, str]]()
began = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", choices=("default", "long"), default="default", help="500 or 20 000 examples an op")
    parser.addoption(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="skip what has not begun after so long; the order is random, so that each kind has its share, and another "
        "for another budget",
    )


def pytest_configure(config: pytest.Config) -> None:
    faulthandler.enable()
    config.stash[left_out] = {}
    config.stash[began] = time.monotonic()
    torch.set_num_threads(1)  # the workers fill the cores; what depends on threads sets its own number


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What was measured on this machine before decides no test."""
    os.environ["BURNISH_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def fuzz_examples(request: pytest.FixtureRequest) -> int:
    """How many examples a fuzz test is to run (rule C3)."""
    from burnish import testing

    return testing.LONG_EXAMPLES if request.config.getoption("--fuzz") == "long" else testing.EXAMPLES


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--budget") is not None:
        random.Random(config.getoption("--budget")).shuffle(items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    budget = item.config.getoption("--budget")
    if budget is not None and time.monotonic() - item.config.stash[began] > budget:
        pytest.skip(f"had not begun after {budget:g} s")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """A kernel that breaks its GPU's context breaks it for this process alone: a worker ends with it, so that the tests
    that follow, in a new one, are not blamed."""
    report = yield
    if report.failed and hasattr(item.config, "workerinput") and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{item.nodeid}: {report.longreprtext}\nthe GPU's context is broken: {error}", file=sys.__stderr__)
            os._exit(1)
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and not report.skipped:
        _ran[dict(report.user_properties).get("op", report.nodeid.partition("::")[0])] += 1
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped[reason.removeprefix("Skipped: ")] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    selected = session.testscollected and not session.config.option.collectonly
    if not hasattr(session.config, "workerinput") and selected and not _ran and not _skipped:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, count in sorted(_ran.items()):
        terminalreporter.write_line(f"ran {count:5} of {name}")
    for reason, count in _skipped.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")
