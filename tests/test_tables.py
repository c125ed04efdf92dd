"""Tables in the cache folder: many writers, damaged files, folders that cannot be written."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest
from burnish import tables
from burnish.tables import Table

PROCESSES, PUTS = 16, 40
ABOUT = {"device": "cpu", "threads": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BURNISH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _put(process: int) -> None:
    table = Table("choices", ABOUT)
    for index in range(PUTS):
        table.add({f"{process} {index}": index})
        assert table.read()[f"{process} {index}"] == index


def test_many_processes_add_and_nothing_is_lost(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_put, args=(number,)) for number in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    entries = Table("choices", ABOUT).read()
    assert entries == {f"{process} {index}": index for process in range(PROCESSES) for index in range(PUTS)}
    assert len(list(cache.iterdir())) == 1


def test_kinds_and_what_they_hold_for_are_apart(cache: Path) -> None:
    first, second, third = Table("choices", ABOUT), Table("choices", {**ABOUT, "threads": 1}), Table("times", ABOUT)
    first.add({"a": 1})
    assert second.read() == third.read() == {}
    second.add({"a": 2})
    assert (first.read(), second.read()) == ({"a": 1}, {"a": 2})
    assert tables.kept() == {first.path.name: "1 entries", second.path.name: "1 entries"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-20],
        lambda raw: raw.replace(b"12.5", b"12.6"),
        lambda raw: b"",
        lambda raw: b"\xff\xfe",
        lambda raw: json.dumps({"entries": {"a": 1}}).encode(),
    ],
    ids=["truncated", "changed", "empty", "no text", "no checksum"],
)
@pytest.mark.parametrize("first", ["read", "add"])
def test_a_damaged_file_is_moved_aside_and_counts_as_empty(damage, first: str, cache: Path) -> None:
    table = Table("choices", ABOUT)
    path = table.add({"a": 12.5})
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    assert tables.kept() == {path.name: "damaged"}
    with pytest.warns(RuntimeWarning, match=r"choices-.*\.json is damaged and counts as empty; it was moved to"):
        assert table.read() == {} if first == "read" else table.add({"b": 2})
    assert path.with_suffix(".damaged").read_bytes() == damaged
    table.add({"b": 2})
    assert table.read() == {"b": 2}
    assert table.add({"c": 3}) == path
    assert table.read() == {"b": 2, "c": 3}


def test_what_cannot_be_read_is_said() -> None:
    table = Table("choices", ABOUT)
    table.path.mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match=r"choices-.*\.json cannot be read and counts as empty: Is a directory"):
        assert table.read() == {}
    assert tables.kept() == {table.path.name: "cannot be read: Is a directory"}


def test_a_file_where_the_folder_should_be(cache: Path) -> None:
    cache.write_text("")
    table = Table("choices", ABOUT)
    assert table.read() == {}
    assert tables.kept() == {}
    with pytest.raises(OSError, match="cache"):
        table.add({"a": 1})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_keeps_what_it_has(cache: Path) -> None:
    table = Table("choices", ABOUT)
    table.add({"a": 1})
    cache.chmod(0o555)
    try:
        with pytest.raises(PermissionError):
            table.add({"b": 2})
        assert table.read() == {"a": 1}
    finally:
        cache.chmod(0o755)
