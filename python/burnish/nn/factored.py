"""What layers with a factored weight share: the parameters A, B and bias, how they come and how they are described."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from burnish.checks import FLOATING
from burnish.configs import LowRank
from burnish.factorize import Factorization
from burnish.nn import scripting
from burnish.registry import dtype_name


class Factored(torch.nn.Module):
    """The parent of :class:`burnish.nn.LowRankLinear` and :class:`burnish.nn.LowRankConv2d`."""

    __prepare_scriptable__ = scripting.refuse
    _version = 1
    rank: int
    config: LowRank
    A: Parameter
    B: Parameter
    bias: Parameter | None

    def _set_rank(self, rank: Any, limit: int, config: LowRank | None = None) -> None:
        check_rank(type(self).__name__, rank, limit)
        self.rank = rank
        self.config = LowRank(rank=rank) if config is None else config

    def _set_factors(self, factors: Sequence[Tensor], trainable: bool = True) -> None:
        """Register A, core where there are three, and B."""
        for name, factor in zip(("A", "B") if len(factors) == 2 else ("A", "core", "B"), factors, strict=True):
            self.register_parameter(name, Parameter(factor, requires_grad=trainable))

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors, and of the layer that ``to_float`` makes."""
        return self.A.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(parameter.nbytes for parameter in self.parameters())

    @property
    def summary(self) -> str:
        """What a report calls it."""
        return f"{type(self).__name__} r={self.rank}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        version = local_metadata.get("version", 1)
        if version > self._version:
            errors: list[str] = rest[-1]
            errors.append(
                f"{prefix}* is {type(self).__name__} state of version {version}, this burnish reads up to "
                f"{self._version}"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def check_rank(who: str, rank: Any, limit: int) -> None:
    """Raise TypeError or ValueError unless ``rank`` is an integer from 1 to ``limit``."""
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"{who}: rank is {rank!r}, expected an integer from 1 to {limit}")
    if not 1 <= rank <= limit:
        raise ValueError(f"{who}: rank is {rank}, expected an integer from 1 to {limit}")


def check_dtype(who: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless there are kernels for ``dtype``."""
    if dtype not in FLOATING:
        raise TypeError(f"{who}: dtype is {dtype_name(dtype)}, expected fp32, bf16 or fp16")


def check_config(who: str, config: Any, moment: Tensor | None) -> None:
    """Raise unless ``config`` is a LowRank that can be followed without measuring, and has the moment it asks for."""
    if not isinstance(config, LowRank):
        raise TypeError(f"{who}: config is {config!r}, expected a burnish.LowRank")
    if config.rank == "auto":
        raise ValueError(f"{who}: rank is 'auto', which needs measurements: use swap_(model, rules, measure=...)")
    if config.method == "activation" and moment is None:
        raise ValueError(
            f"{who}: method is 'activation', which needs the second moment of the layer's inputs: give swap_ a "
            "calibration of this model (burnish.calibrate) whose batches reach the layer"
        )


def chosen_rank(terms: Factorization, config: LowRank) -> int:
    """The rank that a configuration asks for."""
    if config.energy is not None:
        return terms.rank_for_energy(config.energy)
    if config.max_error is not None:
        return terms.rank_for_error(config.max_error)
    assert isinstance(config.rank, int)
    return config.rank
