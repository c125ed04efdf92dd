"""Which configuration a layer gets: ordered patterns over fqns, the first match decides.

    Int8()                                           every layer
    {"*.attention.*": Int8(), "lm_head": Keep()}     globs; a plain fqn is a glob that matches itself
    {"re:encoder\\.(0|1)\\..*": Int8()}                a regular expression, matched against the whole fqn

A layer that no pattern matches is kept. A rule that decides nothing is an error, because it is a typo or stands behind
a rule that already took all it matches.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from typing import Any

from burnish.configs import Config, Keep
from burnish.errors import SwapError


@dataclass(frozen=True)
class Rule:
    """One compiled rule; ``pattern`` is as it was written."""

    pattern: str
    config: Config
    regex: re.Pattern[str]


@dataclass(frozen=True)
class Target:
    """A module that rules may name: its fqns, its class's name, and the configurations that can be for it."""

    fqns: tuple[str, ...]
    cls: str
    takers: frozenset[type[Config]]


def parse(rules: Any) -> tuple[Rule, ...]:
    """The rules of a configuration or of a mapping from patterns to configurations.

    Raises:
        TypeError: something else, or a key or value of another type.
        SwapError: an empty mapping or a regular expression that does not compile.
    """
    if isinstance(rules, Config):
        rules = {"*": rules}
    if not isinstance(rules, Mapping):
        raise TypeError(
            f"swap_: rules is {_described(rules)}, expected a configuration such as burnish.Int8() or a mapping "
            "from patterns to configurations"
        )
    if not rules:
        raise SwapError("swap_: rules is empty, expected at least one pattern")
    return tuple(_compiled(pattern, config) for pattern, config in rules.items())


def _compiled(pattern: Any, config: Any) -> Rule:
    if not isinstance(pattern, str):
        raise TypeError(f"swap_: a rule's key is {_described(pattern)}, expected a glob or 're:' and an expression")
    if not isinstance(config, Config):
        raise TypeError(
            f"swap_: rule {pattern!r} gives {_described(config)}, expected a configuration such as burnish.Int8()"
        )
    try:
        return Rule(pattern, config, compile_pattern(pattern))
    except re.error as error:
        raise SwapError(f"swap_: rule {pattern!r} is not a regular expression: {error}") from None


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The expression, to match whole fqns, of a glob or of what follows ``re:``.

    Raises:
        re.error: it is not a regular expression.
    """
    return re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else translate(pattern))


def _described(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"{value!r} of type {type(value).__name__}"


def decide(rules: Sequence[Rule], targets: Sequence[Target]) -> list[Rule | None]:
    """The rule of each target, None where none matches.

    Raises:
        SwapError: a rule decides nothing; the message says why and names fqns that come near.
    """
    decided: list[Rule | None] = []
    used = set()
    for target in targets:
        rule = next((rule for rule in rules if any(rule.regex.fullmatch(fqn) for fqn in target.fqns)), None)
        decided.append(rule)
        if rule is not None and (type(rule.config) in target.takers or isinstance(rule.config, Keep)):
            used.add(rule.pattern)
    for rule in rules:
        if rule.pattern not in used:
            raise SwapError(_unused(rule, rules, targets))
    return decided


def _unused(rule: Rule, rules: Sequence[Rule], targets: Sequence[Target]) -> str:
    """Why a rule decides nothing."""
    layers = [fqn for target in targets if _takes(rule, target) for fqn in target.fqns]
    if not layers:
        return f"swap_: the model has no layer that can be swapped by {type(rule.config).__name__}"
    matched = [target for target in targets if any(rule.regex.fullmatch(fqn) for fqn in target.fqns)]
    taken = [target for target in matched if _takes(rule, target)]
    if taken:
        fqn = taken[0].fqns[0]
        earlier = next(other.pattern for other in rules if other.regex.fullmatch(fqn))
        return (
            f"swap_: rule {rule.pattern!r} decides nothing: rule {earlier!r} comes first and matches {fqn!r} too; "
            "put the narrower rule before the wider one"
        )
    hints = near(rule.pattern, layers)
    hint = f"; layers that come near: {', '.join(hints)}"
    if matched:
        only = f"{matched[0].cls} {matched[0].fqns[0]!r}"
        inside = f"{matched[0].fqns[0]}." if matched[0].fqns[0] else ""
        if any(fqn.startswith(inside) for fqn in layers):
            hint = f"; for the layers inside it write {inside + '*'!r}"
        return f"swap_: rule {rule.pattern!r} matches no layer that can be swapped, only e.g. {only}{hint}"
    return f"swap_: rule {rule.pattern!r} matches nothing{hint}"


def _takes(rule: Rule, target: Target) -> bool:
    return type(rule.config) in target.takers or (isinstance(rule.config, Keep) and bool(target.takers))


def near(pattern: str, fqns: Sequence[str], count: int = 3) -> list[str]:
    """The fqns that come near a pattern, quoted, for the message that it matches none."""
    plain = pattern.removeprefix("re:").replace(".*", "*").replace("\\", "").strip("*.^$")
    found = difflib.get_close_matches(plain, fqns, count, cutoff=0.5)
    # a pattern often names a part of the path
    parts = difflib.get_close_matches(plain.split(".")[-1], {part for fqn in fqns for part in fqn.split(".")}, 1)
    found += [fqn for fqn in fqns if parts and parts[0] in fqn.split(".") and fqn not in found]
    return [repr(fqn) for fqn in (found or fqns)[:count]]
