"""The bits of an op's results as one hash, which tells whether two processes compute the same."""

from __future__ import annotations

import ctypes
from hashlib import sha256

import torch

from burnish.arguments import Args
from burnish.registry import Backend, OpSpec
from burnish.testing.calls import Outputs, run
from burnish.testing.fuzz import fuzz
from burnish.testing.values import special_cases, special_inputs


def digest(spec: OpSpec, backend: Backend, examples: int = 0) -> str:
    """SHA-256 over the bits of every test case's result: equal between instruction sets and thread counts.

    With ``examples`` also over the results of so many fuzzed inputs and of every input with a special value. Of a NaN
    it counts that it is one, not which.
    """
    sha = sha256()

    def add(outputs: Outputs) -> None:
        for y in outputs:
            y = torch.where(y.isnan(), torch.nan, y) if y.is_floating_point() else y
            y = y.cpu().contiguous()
            sha.update(ctypes.string_at(y.data_ptr(), y.numel() * y.itemsize))

    def add_drawn(spec: OpSpec, args: Args, outputs: Outputs, values: str) -> None:
        add(outputs)

    for case in spec.cases.test:
        add(run(spec, backend, spec.make(case, backend, 0)))
    if examples:
        for case, positions in special_cases(spec):
            for _, _, args in special_inputs(spec.make(case, backend, 0), positions):
                add(run(spec, backend, args))
        ran = fuzz(spec, backend, examples, add_drawn)
        sha.update(f"{ran} fuzzed".encode())
    return sha.hexdigest()
