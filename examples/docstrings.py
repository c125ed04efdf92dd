"""Real text that every Python has: docstrings of the standard library, in a fixed order.

    names, texts = corpus(608)
    others = held_out(608)           # none of which is in texts
    train, test = labelled(20)       # which module is a docstring from?

A fixed list of modules is imported (none does anything on import), and the docstrings of their public functions,
classes and methods are collected and cleaned as ``help()`` shows them. No network; the same Python gives the same
texts.

For :func:`corpus`, duplicates, one-liners and those of under 80 characters are dropped, and ``count`` of the rest are
taken at even distances, so that every module has its share; :func:`held_out` has those that were not.

For :func:`labelled`, the text must not name its own label. In every text, each word that is the name of one of the
modules or of a package they are in becomes ``it``, whatever its case, and so does each word with such a name of five
letters or more inside (``TarFile``, ``logging.Handler``). What is left may still be telling (``IMAP4``), as it is for a
person who reads. Texts that several modules have are dropped, and of equal ones in a module all but one, compared after
that; so are those of under 40 characters. A fifth of each module's texts, chosen by their SHA-256, is the test.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

__all__ = ["Labelled", "corpus", "held_out", "labelled"]

MODULES = """
argparse ast asyncio.events asyncio.locks asyncio.queues asyncio.streams asyncio.tasks base64 bisect calendar cmd
codecs collections concurrent.futures._base concurrent.futures.thread configparser contextlib copy csv dataclasses
datetime decimal difflib dis doctest email.header email.message email.utils enum filecmp fileinput fractions ftplib
functools getpass gettext glob gzip hashlib heapq hmac html html.parser http.client http.cookiejar http.cookies
http.server imaplib inspect io ipaddress itertools json json.decoder json.encoder linecache locale logging
logging.config logging.handlers lzma mailbox math mimetypes multiprocessing.pool netrc numbers operator optparse os
pathlib pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint queue random re reprlib sched
secrets selectors shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl statistics string struct
subprocess symtable sysconfig tarfile tempfile textwrap threading timeit tokenize trace traceback tracemalloc types
typing unittest.case unittest.loader unittest.mock urllib.error urllib.parse urllib.request urllib.robotparser uuid
warnings wave weakref webbrowser xml.dom.minidom xml.etree.ElementTree xmlrpc.client zipapp zipfile zoneinfo
"""

MIN_CHARACTERS, MIN_LABELLED = 80, 40
PART_OF_A_WORD = 5  # letters from which a module's name is masked inside a longer word
TEST_SHARE = 0.2


def corpus(count: int) -> tuple[list[str], list[str]]:
    """``count`` texts (or all, if there are fewer) and the qualified names they belong to."""
    found = _distinct()
    texts = list(found)
    count = min(count, len(texts))
    chosen = [texts[index * len(texts) // count] for index in range(count)]
    return [found[text] for text in chosen], chosen


def held_out(count: int) -> list[str]:
    """The texts that ``corpus(count)`` leaves."""
    taken = set(corpus(count)[1])
    return [text for text in _distinct() if text not in taken]


def _distinct() -> dict[str, str]:
    """The texts that are long enough, and what the first with each is the docstring of."""
    found: dict[str, str] = {}
    for module, name, text in _docstrings():
        if len(text) >= MIN_CHARACTERS and "\n" in text:
            found.setdefault(text, f"{module}.{name}")
    return found


@dataclass(frozen=True)
class Labelled:
    """Texts, and for each the number of its module in ``modules``."""

    modules: tuple[str, ...]
    texts: list[str]
    labels: list[int]


def labelled(classes: int) -> tuple[Labelled, Labelled]:
    """Texts to train with and to test with, of the ``classes`` modules that have the most; names masked."""
    found = [(module, text) for module, _, text in _docstrings() if len(text) >= MIN_LABELLED]
    modules = tuple(module for module, _ in Counter(module for module, _ in dict.fromkeys(found)).most_common(classes))
    masked = list(dict.fromkeys((_masked(text, modules), module) for module, text in found if module in modules))
    owners = Counter(text for text, _ in masked)
    train, test = Labelled(modules, [], []), Labelled(modules, [], [])
    for label, module in enumerate(modules):
        own = [text for text, owner in masked if owner == module and owners[text] == 1]
        own.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
        held_out = round(TEST_SHARE * len(own))
        for part, texts in ((test, own[:held_out]), (train, own[held_out:])):
            part.texts.extend(texts)
            part.labels.extend([label] * len(texts))
    return train, test


def _masked(text: str, modules: tuple[str, ...]) -> str:
    parts = sorted({part for module in modules for part in module.split(".")})
    inside = "|".join(part for part in parts if len(part) >= PART_OF_A_WORD)
    return re.sub(rf"\b(?:[\w.]*(?:{inside})[\w.]*|(?:{'|'.join(parts)}))\b", "it", text, flags=re.IGNORECASE)


def _docstrings() -> Iterator[tuple[str, str, str]]:
    """Module, name and text of each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for module in filter(None, map(_import, MODULES.split())):
            for name, member in _documented(module):
                yield module.__name__, name, inspect.cleandoc(member.__doc__)


def _import(name: str) -> ModuleType | None:
    """None where this Python was built without the module, or no longer has it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _documented(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for name, member in _public(vars(module)):
        if getattr(member, "__module__", None) != module.__name__:
            continue
        yield name, member
        if inspect.isclass(member):
            for method, function in _public(vars(member)):
                yield f"{name}.{method}", getattr(function, "__func__", function)


def _public(namespace: Any) -> Iterator[tuple[str, Any]]:
    for name in sorted(namespace):
        member = namespace[name]
        inner = getattr(member, "__func__", member)
        callable_ = inspect.isclass(inner) or inspect.isroutine(inner)
        if callable_ and not name.startswith("_") and isinstance(getattr(inner, "__doc__", None), str):
            yield name, member
