"""What the tests of the low-rank ops' CUDA C++ kernels of many rows share: calls that are exact, on the CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from burnish import dispatch, native, registry
from burnish.bench import counters, select_cases
from burnish.registry import Case

HALVES = [torch.bfloat16, torch.float16]
SPECIAL = [math.inf, -math.inf, math.nan]

only_emulated = pytest.mark.skipif(not native.emulating(), reason="needs BURNISH_EMULATE_CUDA=1")


class ManyRows:
    """An op, called with integers."""

    def __init__(self, op: str) -> None:
        self.spec = registry.get(op)
        self.native = next(impl for impl in self.spec.impls if impl.backend == "native")

    def made(
        self, m: int, n: int, k: int, r: int, dtype: torch.dtype = torch.bfloat16, **options: object
    ) -> tuple[Any, ...]:
        case = Case({"M": m, "N": n, "K": k, "R": r}, dtype, "integers", options=options)
        return self.spec.make(case, "native", 0)

    def result(self, args: tuple[Any, ...], seed: int = 0) -> torch.Tensor:
        torch.ops.burnish.emulation_seed(seed)
        return self.spec.overload("native")(*args)

    def exactly(self, args: tuple[Any, ...]) -> torch.Tensor:
        wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
        return self.spec.reference(*wide).to(args[0].dtype)

    def kernels(self, m: int, n: int, k: int, r: int) -> list[tuple[str, tuple[int, ...]]]:
        """The kernels that a call launches, and their grids."""
        (row,) = counters.count(select_cases([self.spec.name], dtype=torch.bfloat16, shapes=[(m, n, k, r)]))
        return [(launch.kernel.split("_")[-1], launch.grid) for launch in row.launches]

    def check_special(self, args: tuple[Any, ...], special: float) -> None:
        """Special values in the first row, the last and one between stay in their rows, and are the reference's."""
        clean = self.result(args)
        x = args[0].clone()
        rows = [0, 77, len(x) - 1]
        for row, column in zip(rows, (0, 64, x.shape[1] - 1), strict=True):
            x[row, column] = special
        y = self.result((x, *args[1:]))
        others = torch.ones(len(x), dtype=torch.bool)
        others[rows] = False
        assert torch.equal(y[others], clean[others])
        expected = self.exactly((x, *args[1:]))
        torch.testing.assert_close(y[rows], expected[rows], equal_nan=True, rtol=0.0, atol=0.0)

    def check_unaligned(self, args: tuple[Any, ...], place: int) -> None:
        """The same where argument ``place`` lies two bytes on, with its rows together and apart."""
        expected = self.exactly(args)
        plain = args[place]
        for apart in (plain.shape[1], plain.shape[1] + 1):
            memory = torch.zeros(plain.shape[0] * apart + 1, dtype=plain.dtype)
            moved = memory[1:].as_strided(plain.shape, (apart, 1)).copy_(plain)
            assert moved.data_ptr() % 16
            assert torch.equal(self.result((*args[:place], moved, *args[place + 1 :])), expected)

    def check_taken(self, args: tuple[Any, ...], reason: str | None) -> None:
        """The kernel takes a call, or the record says why not, and the kernel refuses it too."""
        said = dispatch.resolve(self.native.supports)(*args)
        assert said is None if reason is None else reason in said
        if reason is not None:
            with pytest.raises(RuntimeError, match=rf"{self.spec.name}\.native: more than 64 rows take"):
                self.result(args)
