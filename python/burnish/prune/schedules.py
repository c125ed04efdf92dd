"""When masks are made and how sparse they are then, counted in calls of :meth:`burnish.prune.Pruner.step`.

    OneShot()                                at the first call, at the final sparsity
    Gradual(start=0, end=1000, frequency=50) at calls 0, 50, ... 1000, along a cubic that is steep first

Source of the cubic: Zhu and Gupta 2017 (arXiv 1710.01878): ``s_f + (s_i - s_f) (1 - (t - start) / (end - start))^3``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """What all schedules share; use one of the subclasses."""

    def due(self, step: int) -> bool:
        """Whether masks are made at this step, the first being 0."""
        raise NotImplementedError

    def sparsity(self, step: int, final: float) -> float:
        """The sparsity at a step that is due, on the way to ``final``."""
        raise NotImplementedError

    @property
    def last(self) -> int:
        """The last step that is due."""
        raise NotImplementedError

    def check(self, final: float) -> None:
        """Raise ValueError if it does not lead up to this sparsity."""


@dataclass(frozen=True)
class OneShot(Schedule):
    """All at once."""

    def due(self, step: int) -> bool:
        return step == 0

    def sparsity(self, step: int, final: float) -> float:
        return final

    @property
    def last(self) -> int:
        return 0


@dataclass(frozen=True)
class Gradual(Schedule):
    """From ``initial`` to the final sparsity, while the model is trained.

    Args:
        start, end: the first and last step at which masks are made.
        frequency: steps from one mask to the next; ``end - start`` is a multiple of it.
        initial: the sparsity at ``start``, in [0, 1).
    """

    start: int
    end: int
    frequency: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        for name in ("start", "end", "frequency"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"Gradual: {name} is {value!r}, expected a number of steps")
        check_sparsity("Gradual", "initial", self.initial)
        if self.start < 0 or self.end <= self.start:
            raise ValueError(f"Gradual: start is {self.start} and end {self.end}, expected 0 <= start < end")
        if self.frequency < 1 or (self.end - self.start) % self.frequency:
            raise ValueError(
                f"Gradual: frequency is {self.frequency}, expected a number of steps that divides end - start, which "
                f"is {self.end - self.start}"
            )

    def due(self, step: int) -> bool:
        return self.start <= step <= self.end and (step - self.start) % self.frequency == 0

    def sparsity(self, step: int, final: float) -> float:
        left = (self.end - step) / (self.end - self.start)
        return final + (self.initial - final) * left**3

    @property
    def last(self) -> int:
        return self.end

    def check(self, final: float) -> None:
        if self.initial > final:
            raise ValueError(f"Gradual: initial is {self.initial}, expected at most the final sparsity, {final}")


def check_sparsity(who: str, name: str, value: object) -> float:
    """The sparsity, if it is one.

    Raises:
        TypeError, ValueError: it is no number in [0, 1).
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{who}: {name} is {value!r}, expected a number in [0, 1)")
    if not 0 <= value < 1:
        raise ValueError(f"{who}: {name} is {value!r}, expected a share of zeros in [0, 1)")
    return float(value)
