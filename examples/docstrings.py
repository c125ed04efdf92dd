"""Real text that every Python has: docstrings of the standard library, in a fixed order.

    names, texts = corpus(608)

A fixed list of modules is imported (none does anything on import), the docstrings of their public functions, classes
and methods are collected and cleaned as ``help()`` shows them, duplicates, one-liners and those of under 80 characters
are dropped, and ``count`` of the rest are taken at even distances, so that every module has its share. No network; the
same Python gives the same texts.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

__all__ = ["corpus"]

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

MIN_CHARACTERS = 80


def corpus(count: int) -> tuple[list[str], list[str]]:
    """``count`` texts (or all, if there are fewer) and the qualified names they belong to."""
    found: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for module in filter(None, map(_import, MODULES.split())):
            for name, member in _documented(module):
                text = inspect.cleandoc(member.__doc__)
                if len(text) >= MIN_CHARACTERS and "\n" in text:
                    found.setdefault(text, f"{module.__name__}.{name}")
    texts = list(found)
    count = min(count, len(texts))
    chosen = [texts[index * len(texts) // count] for index in range(count)]
    return [found[text] for text in chosen], chosen


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
