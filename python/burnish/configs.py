"""What a layer is swapped for: frozen, comparable configurations that travel in reports and checkpoints.

    Int8()     int8 weights and activations: burnish.nn.Int8Linear
    Keep()     leave the layer as it is

``to_dict`` gives plain JSON values with the configuration's name and format version; :func:`from_dict` is the way back
and refuses what it does not know, so that an old burnish never misreads a newer file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar


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


@dataclass(frozen=True)
class Keep(Config):
    """Leave the layers that a rule matches as they are."""


_CONFIGS: dict[str, type[Config]] = {cls.__name__: cls for cls in (Int8, Keep)}


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
