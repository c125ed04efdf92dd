"""Files that survive: a folder with one JSON text and one payload, replaced as a whole or not at all.

Both are written in a staging folder inside and flushed to the disk. The payload is renamed to a name made of its
SHA-256; then the JSON, which names the payload, is exchanged by a rename. That rename is the commit: killed at any
moment, the folder holds what was committed last. Writers and readers take turns by a lock on the folder, so a reader
never sees a payload disappear. The JSON carries a checksum of itself and is accepted only in the exact bytes it was
written in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from burnish.errors import CheckpointError

try:
    import fcntl
except ImportError:  # not POSIX: no turns
    fcntl = None  # type: ignore[assignment]

_PAYLOAD = re.compile(r"model-[0-9a-f]{16}\.safetensors")
_STAGE = re.compile(r"\.burnish-\d+")


@contextlib.contextmanager
def _locked(descriptor: int, *, write: bool) -> Iterator[bool]:
    """Hold the lock of an open folder and close it; false where the file system has no locks."""
    held = False
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX if write else fcntl.LOCK_SH)
                held = True
        yield held
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[tuple[Path, bool]]:
    """A folder inside ``folder`` to prepare files in, and whether nobody else writes meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(os.open(folder, os.O_RDONLY), write=True) as alone:
        if alone:
            _sweep(folder, _STAGE.fullmatch)
        stage = folder / f".burnish-{os.getpid()}"
        try:
            stage.mkdir(exist_ok=True)
            yield stage, alone
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def commit(folder: Path, name: str, recipe: dict[str, Any], write_payload: Callable[[Path], None]) -> None:
    """Make ``recipe`` (as ``name``) and the payload that ``write_payload`` writes the content of the folder.

    Raises:
        OSError: the disk is full, or the folder cannot be written; what was there still is.
    """
    with _staging(folder) as (stage, alone):
        staged = stage / "payload"
        write_payload(staged)
        _flush(staged)
        digest = sha256(staged)
        payload = folder / f"model-{digest[:16]}.safetensors"
        recipe = {**recipe, "payload": {"file": payload.name, "sha256": digest, "bytes": staged.stat().st_size}}
        text = stage / name
        text.write_bytes(encode(recipe))
        _flush(text)
        os.replace(staged, payload)
        _flush(folder)
        os.replace(text, folder / name)
        _flush(folder)
        if alone:
            _sweep(folder, lambda found: _PAYLOAD.fullmatch(found) if found != payload.name else None)


def replace(folder: Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Put files of fixed names into the folder: all are written and flushed before the first is renamed, and renamed
    in the order given. Only one rename can happen at a time: files that belong together must be able to tell.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    with _staging(folder) as (stage, _):
        for name, write in writers.items():
            write(stage / name)
            _flush(stage / name)
        for name in writers:
            os.replace(stage / name, folder / name)
            _flush(folder)


def update(path: Path, change: Callable[[bytes | None], bytes]) -> None:
    """Replace a file by what ``change`` makes of its content (None where there is no file), one process at a time.

    Raises:
        OSError: the disk is full, or the folder cannot be written; what was there still is.
    """
    with _staging(path.parent) as (stage, _):
        staged = stage / path.name
        staged.write_bytes(change(path.read_bytes() if path.exists() else None))
        _flush(staged)
        os.replace(staged, path)
        _flush(path.parent)


def check_writable(path: Path) -> None:
    """Raise OSError where :func:`update` could not replace a file, which stays as it was; its folder is made."""
    with _staging(path.parent) as (stage, _):
        (stage / path.name).write_bytes(path.read_bytes() if path.exists() else b"")


def set_aside(path: Path, damaged: Callable[[bytes], bool]) -> Path | None:
    """Rename a file to ``.damaged`` if, once nobody writes, it is; returns its new place, None if it stays."""
    moved = path.with_suffix(".damaged")
    with contextlib.suppress(OSError), _locked(os.open(path.parent, os.O_RDONLY), write=True):
        if damaged(path.read_bytes()):
            os.replace(path, moved)
            return moved
    return None


def _sweep(folder: Path, wanted: Callable[[str], object]) -> None:
    """Delete what no commit names any more; what cannot be deleted stays."""
    for found in os.listdir(folder):
        if wanted(found):
            shutil.rmtree(folder / found, ignore_errors=True)
            with contextlib.suppress(OSError):
                (folder / found).unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def encode(recipe: dict[str, Any]) -> bytes:
    """The recipe as JSON, with a checksum of itself."""
    return _dump({**recipe, "checksum": hashlib.sha256(_dump(recipe)).hexdigest()})


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def decode(raw: bytes) -> dict[str, Any] | None:
    """The recipe that :func:`encode` made these bytes of, without its checksum; None if it did not."""
    try:
        recipe = json.loads(raw)
        checksum = recipe.pop("checksum")
        intact = raw == _dump({**recipe, "checksum": checksum})
        intact = intact and checksum == hashlib.sha256(_dump(recipe)).hexdigest()
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        intact = False
    return recipe if intact else None


@contextlib.contextmanager
def reading(folder: Path, call: str = "load", writer: str = "burnish.save") -> Iterator[None]:
    """Hold the folder's shared lock; ``call`` and ``writer`` are for messages.

    Raises:
        CheckpointError: there is no such folder, or it cannot be read.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{call}: {folder} is a file, expected the folder that {writer} wrote")
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        raise CheckpointError(f"{call}: {folder} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{call}: {folder} cannot be read: {error.strerror}") from error
    with _locked(descriptor, write=False):
        yield


def read(folder: Path, name: str) -> dict[str, Any]:
    """The recipe, without its checksum.

    Raises:
        CheckpointError: there is none, or its bytes are not those that were written.
    """
    path = folder / name
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"load: {folder} holds no {name}: it is no checkpoint of burnish.save") from None
    except OSError as error:
        raise CheckpointError(f"load: {path} cannot be read: {error.strerror}") from error
    recipe = decode(raw)
    if recipe is None:
        raise CheckpointError(f"load: {path} is damaged: its content does not match its checksum")
    return recipe


def checked_payload(folder: Path, entry: dict[str, Any]) -> Path:
    """The payload that a recipe's ``payload`` entry names, after comparing its size and hash.

    Raises:
        CheckpointError: it is missing, unreadable, truncated or changed.
    """
    name = str(entry["file"])
    if not _PAYLOAD.fullmatch(name):
        raise CheckpointError(f"load: the payload is called {name!r}, expected model-<16 hex digits>.safetensors")
    path = folder / name
    try:
        size = path.stat().st_size
        if path.is_file() and size != entry["bytes"]:
            raise CheckpointError(
                f"load: {path} has {size} bytes, expected {entry['bytes']}: it is truncated or changed"
            )
        digest = sha256(path)
    except FileNotFoundError:
        raise CheckpointError(f"load: {path}, which the checkpoint names, is missing") from None
    except OSError as error:
        raise CheckpointError(f"load: {path} cannot be read: {error.strerror}") from error
    if digest != entry["sha256"]:
        raise CheckpointError(
            f"load: {path} is damaged: its SHA-256 is {digest[:16]}..., expected {entry['sha256'][:16]}..."
        )
    return path
