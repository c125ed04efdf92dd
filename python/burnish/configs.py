"""What a layer is swapped for: frozen, comparable configurations that travel in reports and checkpoints.

    Int8()     int8 weights and activations: burnish.nn.Int8Linear
    LoRA(r=8)  a frozen layer with a trainable low-rank adapter: burnish.nn.LoRALinear
    LowRank()  two thin factors: burnish.nn.LowRankLinear and LowRankConv2d
    BlockSparse(), Sparse24(), Sparse()
               a pruned weight without its zeros: burnish.nn.BlockSparseLinear and SparseConv2d, Sparse24Linear,
               SparseLinear
    Keep()     leave the layer as it is

``to_dict`` gives plain JSON values with the configuration's name and format version; :func:`from_dict` is the way back
and refuses what it does not know, so that an old burnish never misreads a newer file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import torch

from burnish.block_format import BLOCKS


@dataclass(frozen=True)
class Config:
    """What all configurations share; use one of the subclasses."""

    #: format of ``to_dict``; raised when an option changes its meaning
    version: ClassVar[int] = 1

    def to_dict(self) -> dict[str, Any]:
        """``{"name": ..., "version": ..., options}``, plain JSON values."""
        return {"name": type(self).__name__, "version": self.version, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """The configuration that ``to_dict`` described.

        Raises:
            ValueError: another configuration, a newer version or an unknown option.
        """
        config = from_dict(data)
        if not isinstance(config, cls):
            raise ValueError(f"{cls.__name__}.from_dict: the data describes {data['name']!r}")
        return config


@dataclass(frozen=True)
class Int8(Config):
    """int8 weights, one scale an output channel; activations quantised row by row as they come.

    Args:
        fuse_activation: let the layer compute the ReLU, GELU or SiLU that directly follows it.
    """

    fuse_activation: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.fuse_activation, bool):
            raise TypeError(f"Int8: fuse_activation is {self.fuse_activation!r}, expected True or False")


_ADAPTER_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LoRA(Config):
    """A frozen layer with a trainable low-rank adapter beside it, in peft's words.

    None stands for the default or, where the layer has an adapter of peft's already, for what that adapter has.

    Args:
        r: the rank; 8 by default. At most the smaller of a layer's two sizes.
        lora_alpha: the adapter counts ``lora_alpha / r`` times; 8 by default.
        lora_dropout: the probability of dropping an element of the adapter's input in training; 0 by default.
        use_rslora: divide lora_alpha by sqrt(r) instead; False by default.
        init_lora_weights: ``default`` (lora_A drawn, lora_B zero) or ``pissa`` (the weight's principal part).
        dtype: of the adapter, ``fp32``, ``bf16`` or ``fp16``; by default the layer's.
    """

    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    use_rslora: bool | None = None
    init_lora_weights: str = "default"
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.r is not None:
            if not isinstance(self.r, int) or isinstance(self.r, bool):
                raise TypeError(f"LoRA: r is {self.r!r}, expected an integer of at least 1, or None for 8")
            if self.r < 1:
                raise ValueError(f"LoRA: r is {self.r}, expected an integer of at least 1, or None for 8")
        _check_number("lora_alpha", self.lora_alpha, "a finite number above 0", lambda v: 0 < v < math.inf)
        _check_number("lora_dropout", self.lora_dropout, "a probability from 0 to 1", lambda v: 0 <= v <= 1)
        if self.use_rslora is not None and not isinstance(self.use_rslora, bool):
            raise TypeError(f"LoRA: use_rslora is {self.use_rslora!r}, expected True or False")
        if self.init_lora_weights not in ("default", "pissa"):
            raise ValueError(f"LoRA: init_lora_weights is {self.init_lora_weights!r}, expected 'default' or 'pissa'")
        if self.dtype is not None and self.dtype not in _ADAPTER_DTYPES:
            raise ValueError(f"LoRA: dtype is {self.dtype!r}, expected one of: {', '.join(_ADAPTER_DTYPES)}")

    def resolved(self) -> LoRA:
        """The same with each default in its place; the dtype stays None for the layer's."""
        return replace(
            self,
            r=8 if self.r is None else self.r,
            lora_alpha=8 if self.lora_alpha is None else self.lora_alpha,
            lora_dropout=0.0 if self.lora_dropout is None else self.lora_dropout,
            use_rslora=bool(self.use_rslora),
        )

    @property
    def scaling(self) -> float:
        """What the adapter's product is multiplied by."""
        known = self.resolved()
        assert known.r is not None
        assert known.lora_alpha is not None
        return known.lora_alpha / (math.sqrt(known.r) if known.use_rslora else known.r)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """``dtype`` as torch's."""
        return None if self.dtype is None else _ADAPTER_DTYPES[self.dtype]


def _check_number(name: str, value: Any, expected: str, allowed: Callable[[float], bool]) -> None:
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"LoRA: {name} is {value!r}, expected {expected}")
    if not allowed(value):
        raise ValueError(f"LoRA: {name} is {value!r}, expected {expected}")


@dataclass(frozen=True)
class LowRank(Config):
    """A weight as a product of thin factors: linear layers and 2-d convolutions. Give exactly one of the first three.

    Args:
        rank: the rank, or ``"auto"``: the largest at which the layer is faster than the dense one on this machine, at
            the rows that ``swap_(measure=...)`` tells. Of a convolution, the rank of each group.
        energy: the smallest rank that keeps this share of the squared singular values, 0 < energy <= 1.
        max_error: the smallest rank with at most this relative error, 0 < max_error < 1.
        method: ``svd`` comes closest to the weight; ``activation`` to the outputs, for the inputs of a calibration
            (:func:`burnish.calibrate`), and measures energy and error on them.
        conv: how convolutions are taken apart: ``channel`` (the kernel to R channels, then 1 x 1), ``spatial`` (k x 1,
            then 1 x k) or ``tucker2`` (1 x 1, the kernel between R channels, 1 x 1). ``activation`` needs ``channel``.
    """

    rank: int | str | None = None
    energy: float | None = None
    max_error: float | None = None
    method: str = "svd"
    conv: str = "channel"

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "energy", "max_error") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"LowRank: {' and '.join(given) or 'nothing'} given, expected exactly one of rank, energy and max_error"
            )
        if self.rank is not None and self.rank != "auto":
            if not isinstance(self.rank, int) or isinstance(self.rank, bool):
                raise TypeError(f"LowRank: rank is {self.rank!r}, expected an integer of at least 1 or 'auto'")
            if self.rank < 1:
                raise ValueError(f"LowRank: rank is {self.rank}, expected an integer of at least 1 or 'auto'")
        for name, allowed in (("energy", "0 < energy <= 1"), ("max_error", "0 < max_error < 1")):
            share = getattr(self, name)
            if share is not None and (not isinstance(share, int | float) or isinstance(share, bool)):
                raise TypeError(f"LowRank: {name} is {share!r}, expected a number with {allowed}")
            if share is not None and not (0 < share < 1 or (name == "energy" and share == 1)):
                raise ValueError(f"LowRank: {name} is {share!r}, expected {allowed}")
        for name, choices in (("method", ("svd", "activation")), ("conv", ("channel", "spatial", "tucker2"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"LowRank: {name} is {getattr(self, name)!r}, expected one of: {', '.join(choices)}")
        if self.method == "activation" and self.conv != "channel":
            raise ValueError(
                f"LowRank: method is 'activation' and conv is {self.conv!r}: only conv='channel' sees whole patches, "
                "whose moments a calibration knows"
            )


@dataclass(frozen=True)
class BlockSparse(Config):
    """The blocks of a pruned weight that are not all zero: linear layers and 2-d convolutions with one group, whose
    weight counts as a matrix of output channels x (input channels x kernel). Every weight of such a block is kept.

    Args:
        block: its side, 16, 32, 64 or 128, or both: also (1, 16) and (4, 16). Sides that do not divide the weight are
            padded.
        density: the largest share of the blocks that may be kept, 0 < density <= 1; None for any.
        values: ``float``, or ``int8`` with one scale an output channel: frozen, activations quantised row by row.
    """

    block: int | tuple[int, int] = 32
    density: float | None = None
    values: str = "float"

    def __post_init__(self) -> None:
        sides = (self.block, self.block) if isinstance(self.block, int) else self.block
        if isinstance(sides, list):  # as JSON gives them back
            sides = tuple(sides)
        if sides not in BLOCKS:
            raise ValueError(f"BlockSparse: block is {self.block!r}, expected 16, 32, 64, 128, (1, 16) or (4, 16)")
        object.__setattr__(self, "block", sides[0] if sides[0] == sides[1] else sides)
        _check_density("BlockSparse", self.density)
        _check_values("BlockSparse", self.values)

    @property
    def sides(self) -> tuple[int, int]:
        """Output channels and inputs of a block."""
        return (self.block, self.block) if isinstance(self.block, int) else self.block


@dataclass(frozen=True)
class Sparse24(Config):
    """The two kept weights of each four along the inputs of a pruned linear layer, and where they are.

    Args:
        values: ``float``, or ``int8`` with one scale an output channel: frozen, activations quantised row by row.
    """

    values: str = "float"

    def __post_init__(self) -> None:
        _check_values("Sparse24", self.values)


@dataclass(frozen=True)
class Sparse(Config):
    """The weights of a pruned linear layer that are not zero, wherever they are, and a bit for each place.

    Args:
        density: the largest share of the weights that may be kept, 0 < density <= 1; None for any.
    """

    density: float | None = None

    def __post_init__(self) -> None:
        _check_density("Sparse", self.density)


def _check_density(who: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{who}: density is {value!r}, expected a number with 0 < density <= 1, or None")
    if not 0 < value <= 1:
        raise ValueError(f"{who}: density is {value!r}, expected 0 < density <= 1, the share that is kept")


def _check_values(who: str, value: Any) -> None:
    if value not in ("float", "int8"):
        raise ValueError(f"{who}: values is {value!r}, expected one of: float, int8")


@dataclass(frozen=True)
class Keep(Config):
    """Leave the layers that a rule matches as they are."""


_CONFIGS: dict[str, type[Config]] = {
    cls.__name__: cls for cls in (Int8, LoRA, LowRank, BlockSparse, Sparse24, Sparse, Keep)
}


def from_dict(data: Mapping[str, Any]) -> Config:
    """The configuration that some ``to_dict`` described.

    Raises:
        ValueError: not such a description, a newer version or an unknown option; the message says which.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
        raise ValueError(f"a configuration is a mapping with a 'name', got {data!r}")
    cls = _CONFIGS.get(data["name"])
    if cls is None:
        raise ValueError(f"unknown configuration {data['name']!r}, expected one of: {', '.join(_CONFIGS)}")
    version = data.get("version")
    if not isinstance(version, int) or version > cls.version:
        raise ValueError(
            f"{cls.__name__} configuration has version {version!r}, this burnish reads up to {cls.version}"
        )
    options = {key: value for key, value in data.items() if key not in ("name", "version")}
    unknown = options.keys() - {field.name for field in fields(cls)}
    if unknown:
        raise ValueError(f"{cls.__name__} configuration has unknown options: {', '.join(sorted(unknown))}")
    return cls(**options)
