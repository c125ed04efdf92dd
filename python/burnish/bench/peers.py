"""Peers: what other libraries offer for the same work, timed beside ours.

A peer is one small file that defines ``PEER = Peer(...)``. burnish does not depend on any: a file whose imports fail is
listed with the reason, and so is a case that a peer cannot run.

    # mylib.py
    from burnish.bench import Peer
    import mylib

    def supports(op: str, case: Case) -> str | None: ...          # None, or the reason in words
    def make(op: str, args: tuple) -> Callable[[], Any]: ...      # packs weights, returns what is timed

    PEER = Peer("mylib", mylib.__version__, supports, make)
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.registry import Case

#: where the adapters lie in a checkout, from its root
FOLDER = Path("bench/peers")


@dataclass(frozen=True)
class Peer:
    """One library's way to run our ops.

    ``make`` takes the op's arguments in the layout of the reference (CPU) backend and returns the call that a user of
    the same dtypes would make, casts included. ``tolerance`` bounds the relative error (Frobenius norm) against the
    op's reference: peers round differently, they must not compute something else. ``spared`` is the share of all
    elements, those furthest off, that this leaves out: a peer whose state is of a coarser format cannot hold them.

    Of an op that writes into its arguments the call writes into the first of these, as an optimizer steps the
    parameters; what else it keeps, in whatever format, may be its own. It is judged by its first call, and called
    again on what that left.
    """

    name: str
    version: str
    supports: Callable[[str, Case], str | None]
    make: Callable[[str, tuple[Any, ...]], Callable[[], Any]]
    tolerance: float = 0.05
    spared: float = 0.0
    reads: Callable[[str, Case], int] | None = None


def find_folder(given: str | Path | None = None) -> Path:
    """The folder of adapters: the one given, ``./bench/peers``, or the one of the checkout this module runs from.

    Raises:
        FileNotFoundError: none of them exists; the message says what to pass.
    """
    if given is not None:
        if not Path(given).is_dir():
            raise FileNotFoundError(f"--peers-dir {given}: no such folder")
        return Path(given)
    checkout = Path(__file__).resolve().parents[3] / FOLDER
    for folder in (FOLDER, checkout):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"no peer adapters: ./{FOLDER} does not exist here; run from a checkout of burnish or pass --peers-dir FOLDER"
    )


def load(folder: Path) -> tuple[list[Peer], dict[str, str]]:
    """The peers in ``folder`` that import, by name, and for each other file the reason why it does not."""
    found: dict[str, Peer] = {}
    absent = {}
    for path in sorted(folder.glob("[a-z]*.py")):
        name = path.stem.replace("_", "-")
        try:
            peer = _load_file(path).PEER
        except Exception as error:
            absent[name] = _reason(error)
            continue
        if not isinstance(peer, Peer) or peer.name in found:
            absent[name] = f"{path.name}: PEER is not a burnish.bench.Peer with a name of its own"
            continue
        found[peer.name] = peer
    return list(found.values()), absent


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"burnish_peer_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:200]
