"""Tables of what was measured on this machine, kept in the cache folder from one process to the next.

A table is a JSON object with a checksum, in a file named after its kind and what it holds for. Processes that add to it
at the same time take turns by the folder's lock, and a reader sees the file as it was before or after, so nothing that
was added is lost. A damaged file is moved aside with a warning and counts as empty: what it held is measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import burnish
from burnish import durable


def folder() -> Path:
    """Where tables are kept, ``BURNISH_CACHE_DIR`` or ``~/.cache/burnish``; need not exist."""
    named = os.environ.get("BURNISH_CACHE_DIR")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "burnish"


def facts(device: torch.device | str) -> dict[str, Any]:
    """What a time holds for: another processor, instruction set, number of threads or version has its own tables."""
    from burnish.bench import machine

    device = torch.device(device)
    about: dict[str, Any] = {"burnish": burnish.__version__, "torch": torch.__version__, "device": device.type}
    if device.type == "cuda":
        return about | {"gpu": torch.cuda.get_device_name(device)}
    return about | {"cpu": machine.cpu_model(), "isa": machine.cpu_isa(), "threads": torch.get_num_threads()}


@dataclass(frozen=True)
class Table:
    """Entries, JSON values by name, of one ``kind`` that hold for ``about``."""

    kind: str
    about: Mapping[str, Any]

    @property
    def path(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()
        return folder() / f"{self.kind}-{digest[:12]}.json"

    def read(self) -> dict[str, Any]:
        """The entries; none where nothing was kept, nor, with a warning, where the file cannot be read."""
        path = self.path
        try:
            raw = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            warnings.warn(f"{path} cannot be read and counts as empty: {error.strerror}", RuntimeWarning, stacklevel=2)
            return {}
        found = _entries(raw)
        if found is None:
            moved = durable.set_aside(path, lambda raw: _entries(raw) is None)
            warnings.warn(
                f"{path} is damaged and counts as empty" + (f"; it was moved to {moved.name}" if moved else ""),
                RuntimeWarning,
                stacklevel=2,
            )
        return found or {}

    def add(self, entries: Mapping[str, Any]) -> Path:
        """Keep entries beside those of other names; returns the file.

        Raises:
            OSError: the folder cannot be written.
        """
        self.read()  # moves a damaged file aside

        def with_entries(raw: bytes | None) -> bytes:
            kept = (raw and _entries(raw)) or {}
            return durable.encode({"about": dict(self.about), "entries": {**kept, **entries}})

        durable.update(self.path, with_entries)
        return self.path


def _entries(raw: bytes) -> dict[str, Any] | None:
    """What the bytes of a file hold; None if they are damaged."""
    content = durable.decode(raw)
    return None if content is None else content.get("entries")


def kept() -> dict[str, str]:
    """The files in the folder, with how many entries each has."""
    found = {}
    for path in sorted(folder().glob("*-*.json")) if folder().is_dir() else ():
        try:
            entries = _entries(path.read_bytes())
        except OSError as error:
            found[path.name] = f"cannot be read: {error.strerror}"
        else:
            found[path.name] = "damaged" if entries is None else f"{len(entries)} entries"
    return found
