"""What the sparse layers share: how they come from a weight with zeros, and how their tensors live.

=============  ===========================================  =====================================================
state_dict     tensor                                       meaning
=============  ===========================================  =====================================================
values         a parameter; int8: a buffer                  the kept weights
*the index*    buffers, integers                            where they belong: each layer's docstring has its own
scale          fp32 [N], with int8 values alone             weight = values * scale[n]
bias           [N], optional                                a parameter, fp32, bf16 or fp16
=============  ===========================================  =====================================================

The layout is the same on every device. Float values are trained at their places: nothing else has a gradient. int8
values are frozen; gradients reach the input, through the rounding as if it were not there, and the bias.
``half()`` and ``to(dtype)`` convert float values and the bias, never the index, int8 values or their scale.

An index that is loaded is checked: a state dict with another number of kept values, or one whose index points nowhere,
is refused. FSDP2 shards the values along their first dimension, rows, blocks or single weights, whatever their number,
and leaves the index whole on each rank. A layer that keeps nothing has nothing to train: its values are frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from burnish import autocast
from burnish.checks import FLOATING
from burnish.configs import BlockSparse, Sparse, Sparse24
from burnish.errors import PatternError
from burnish.nn import masked, scripting
from burnish.nn.derived import derive
from burnish.nn.int8_linear import keep_dtype
from burnish.ops.int8_quantize_rows import int8_quantize_rows
from burnish.registry import dtype_name

Layer = TypeVar("Layer", bound="SparseLayer")


class SparseLayer(torch.nn.Module):
    """The parent of :class:`burnish.nn.BlockSparseLinear`, ``SparseConv2d``, ``Sparse24Linear`` and ``SparseLinear``.

    A subclass says what its index is (``INDEX``, name -> dtype), which shapes its tensors have (``_shapes``), how a
    matrix becomes tensors and back (``_compress``, ``_expand``) and what may be wrong with an index (``_fault``).
    """

    __prepare_scriptable__ = scripting.refuse
    _version = 1
    INDEX: ClassVar[dict[str, torch.dtype]]
    CONFIG: ClassVar[type[BlockSparse] | type[Sparse24] | type[Sparse]]
    config: Any
    dtype: torch.dtype
    values: Tensor
    scale: Tensor | None
    bias: Parameter | None
    #: kept values, or kept blocks
    nnz: int

    @property
    def matrix(self) -> tuple[int, int]:
        """N and K of the weight as a matrix."""
        raise NotImplementedError

    @property
    def density(self) -> float:
        """The share of the weight that is kept, 0 to 1."""
        raise NotImplementedError

    @property
    def pattern(self) -> str:
        """What is kept, in a word or two."""
        raise NotImplementedError

    def _take_form(self, module: torch.nn.Module) -> None:
        """Set sizes and all else that is not a tensor as ``module`` has it."""
        raise NotImplementedError

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError

    def _compress(self, weight: Tensor, kept: Tensor) -> Sequence[Tensor]:
        raise NotImplementedError

    def _expand(self) -> Tensor:
        raise NotImplementedError

    def _fault(self, index: Mapping[str, Tensor], values: Tensor | None) -> str | None:
        raise NotImplementedError

    def _drawn(self, device: torch.device) -> Tensor:
        """A random mask with :attr:`nnz` kept."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Make what is made of the index."""

    @property
    def is_int8(self) -> bool:
        return getattr(self.config, "values", "float") == "int8"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in memory, padding and index included."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    @property
    def summary(self) -> str:
        """What a report calls it."""
        int8 = " int8" if self.is_int8 else ""
        return f"{type(self).__name__} {self.pattern}{int8}, {100 * self.density:.3g} % kept"

    def _describe(self) -> str:
        values = "int8" if self.is_int8 else dtype_name(self.dtype)
        return f"pattern={self.pattern}, density={self.density:.4g}, values={values}, {self.nbytes} bytes"

    def _set_tensors(self, tensors: Sequence[Tensor], scale: Tensor | None, trainable: bool) -> None:
        """Register the values, the index and the scale."""
        values, *index = tensors
        if self.is_int8:
            self.register_buffer("values", values)
        else:
            # FSDP2 cannot reduce the gradient of a parameter without elements, and there is nothing to train
            self.register_parameter("values", Parameter(values, requires_grad=trainable and values.numel() > 0))
        for name, tensor in zip(self.INDEX, index, strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("scale", scale)
        self._finish()

    def _set_meta(self, trainable: bool = True) -> None:
        """Register tensors without values."""
        dtypes = {"values": torch.int8 if self.is_int8 else self.dtype, **self.INDEX}
        tensors = [torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in self._shapes().items()]
        scale = torch.empty(self.matrix[0], device="meta", dtype=torch.float32) if self.is_int8 else None
        self._set_tensors(tensors, scale, trainable)

    def _set_new(self, bias: bool, device: torch.device | str | int | None) -> None:
        """The tensors of a layer that is made from nothing."""
        empty = torch.empty(self.matrix[0] if bias else 0, device=device, dtype=self.dtype)
        if empty.is_meta:
            self._set_meta()
        else:
            self._set_tensors(*self._draw(empty.device), True)
        self.register_parameter("bias", Parameter(empty) if bias else None)
        self._reset_bias()

    def _compressed(self, weight: Tensor, kept: Tensor) -> tuple[Sequence[Tensor], Tensor | None]:
        """Values and index of a matrix, and the scale of int8 ones."""
        if not self.is_int8:
            return self._compress(weight, kept), None
        q, scale = int8_quantize_rows(weight)
        return self._compress(q, kept), scale

    @property
    def _bound(self) -> float:
        """What nn.Linear would draw values up to, for as many inputs as an output has here."""
        return 1 / math.sqrt(max(1.0, self.matrix[1] * self.density))

    @torch.no_grad()
    def _draw(self, device: torch.device) -> tuple[Sequence[Tensor], Tensor | None]:
        """Random values at random places."""
        weight = torch.empty(self.matrix, dtype=self.dtype, device=device).uniform_(-self._bound, self._bound)
        kept = self._drawn(device)
        return self._compressed(weight * kept, kept)

    def _reset_bias(self) -> None:
        if self.bias is not None:
            torch.nn.init.uniform_(self.bias, -self._bound, self._bound)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new places, as many as there are, and values and bias as nn.Linear does for that many inputs."""
        tensors, scale = self._draw(self.values.device)
        for name, tensor in zip(("values", *self.INDEX), tensors, strict=True):
            getattr(self, name).copy_(tensor)
        if self.scale is not None and scale is not None:
            self.scale.copy_(scale)
        self._finish()
        self._reset_bias()

    @classmethod
    def like(cls: type[Layer], module: torch.nn.Module, config: Any, nnz: int) -> Layer:
        """A layer in the place of the float layer ``module``, on meta, with room for so many kept values or blocks and
        ``module``'s bias."""
        weight = masked.weight_of(module)
        self = cls._begun(module, config, weight.dtype)
        self.nnz = nnz
        self._set_meta(weight.requires_grad)
        return self._ended(module)

    @classmethod
    def from_float(cls: type[Layer], module: torch.nn.Module, config: Any = None) -> Layer:
        """The layer that computes what ``module`` does without its zeros, in its dtype and mode. Float values are
        trainable where the weight is. The bias is not copied: both hold the same parameter.

        Args:
            module: a float layer, also with a mask of ``torch.nn.utils.prune`` or of :mod:`burnish.prune`: then what
                is kept is what the mask keeps, zeros too; without one, what is not zero.
            config: kept as ``config``.

        Raises:
            TypeError: another kind of module or configuration, a weight or bias that something else than one mask
                computes, or a dtype without kernels.
            PatternError: a ValueError: the weight has non-zeros where the pattern has none, or more than ``density``.
            ValueError: the weight has a NaN or an infinity, or is on meta.
        """
        who = f"{cls.__name__}.from_float"
        config = cls.CONFIG() if config is None else config
        if not isinstance(config, cls.CONFIG):
            raise TypeError(f"{who}: config is {config!r}, expected a burnish.{cls.CONFIG.__name__}")
        cls._check_module(module, who)
        refusal = masked.refusal(module)
        if refusal is not None:
            raise TypeError(f"{who}: {refusal}")
        source = masked.weight_of(module)
        if type(source) not in (Tensor, Parameter):
            raise TypeError(f"{who}: the weight is a {type(source).__name__}, expected a plain tensor")
        if source.dtype not in FLOATING:
            raise TypeError(f"{who}: dtype is {dtype_name(source.dtype)}, expected fp32, bf16 or fp16")
        if source.is_meta:
            raise ValueError(f"{who}: the weight is on the meta device and has no values to see zeros in")
        with torch.no_grad():
            weight, mask = masked.values_of(module)
            _check_finite(weight, who)
            self = cls._begun(module, config, source.dtype)
            kept = weight != 0 if mask is None else mask
            try:
                self._check_pattern(weight, kept, mask is not None)
                tensors, scale = self._compressed(weight, kept)
            except PatternError as error:
                raise PatternError(f"{who}: {error}") from None
            self._set_tensors(tensors, scale, source.requires_grad)
        return self._ended(module)

    @classmethod
    def _check_module(cls, module: torch.nn.Module, who: str) -> None:
        raise NotImplementedError

    @classmethod
    def _begun(cls: type[Layer], module: torch.nn.Module, config: Any, dtype: torch.dtype) -> Layer:
        self = cls.__new__(cls)
        torch.nn.Module.__init__(self)
        self.config, self.dtype = config, dtype
        self._take_form(module)
        return self

    def _ended(self: Layer, module: torch.nn.Module) -> Layer:
        self.register_parameter("bias", getattr(module, "bias", None))
        return self.train(module.training)

    def _check_pattern(self, weight: Tensor, kept: Tensor, has_mask: bool) -> None:
        """Count what is kept (:attr:`nnz`) and raise PatternError unless that is the pattern's."""
        raise NotImplementedError

    def _check_density(self, what: str) -> None:
        """Raise PatternError where more is kept than the configuration allows."""
        if self.config.density is not None and self.density > self.config.density:
            raise PatternError(
                f"{100 * self.density:.4g} % of its {what} have non-zeros, more than the density of "
                f"{100 * self.config.density:.4g} %; prune it further with burnish.prune"
            )

    def _dense(self) -> Tensor:
        """The weight as a matrix, in :attr:`dtype`; that of float values bit for bit."""
        with torch.no_grad():
            weight = self._expand()
            return weight if self.scale is None else (weight * self.scale.unsqueeze(1)).to(self.dtype)

    def _cast(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x and the values, as autocast has them."""
        values = self._parameters.get("values")
        if values is None:
            return autocast.operands(x)[0], self._buffers["values"]  # type: ignore[return-value]
        return autocast.operands(x, values)  # type: ignore[return-value]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLayer:
        frozen = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        device = self.values.device
        moved = dict(frozen)
        self._buffers.update(dict.fromkeys(frozen))  # nn.Module must not convert them
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
            for name, tensor in frozen.items():
                moved[name] = _moved(fn, tensor)
        finally:
            self._buffers.update(moved)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        wrong = self._objection(state_dict, prefix, local_metadata)
        if wrong is not None:
            errors: list[str] = rest[-1]
            errors.append(wrong)
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if prefix + "values" not in state_dict:
            return
        if local_metadata.get("assign_to_params_buffers", False):
            held = self.bias if self.is_int8 else self.values
            self.dtype = self.dtype if held is None else held.dtype
        self._finish()

    def _objection(self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any]) -> str | None:
        """What is wrong with the entries of this layer, in a sentence."""
        name, version = type(self).__name__, local_metadata.get("version", 1)
        if version > self._version:
            return f"{prefix}* is {name} state of version {version}, this burnish reads up to {self._version}"
        shapes = self._shapes()
        given = {key: state_dict[prefix + key] for key in shapes if prefix + key in state_dict}
        for key, tensor in given.items():
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shapes[key]:
                got = tuple(tensor.shape) if isinstance(tensor, Tensor) else tensor
                return (
                    f"{prefix}{key} has shape {got}, expected {shapes[key]}: a layer takes the state of one that keeps "
                    "as much (burnish.load makes the layer that a checkpoint needs)"
                )
            wanted = self.INDEX.get(key, torch.int8 if self.is_int8 else None)
            fits = tensor.is_floating_point() if wanted is None else tensor.dtype == wanted
            if not fits:
                expected = "floating-point values" if wanted is None else dtype_name(wanted)
                return f"{prefix}{key} is {dtype_name(tensor.dtype)}, expected {expected}"
        index = {key: given[key] for key in self.INDEX if key in given and not given[key].is_meta}
        if len(index) < len(self.INDEX):
            return None  # strict loading says what is missing
        values = given.get("values")
        seen = values is not None and type(values) in (Tensor, Parameter) and not values.is_meta
        fault = self._fault(index, values if seen else None)
        return None if fault is None else f"{prefix}{fault}"


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """``fn(tensor)`` in its own dtype; for layers that share it, once."""
    moved = keep_dtype(fn, tensor)
    return tensor if moved is tensor else derive(tensor, ("moved", moved.device), lambda: moved)


def check_sizes(who: str, **sizes: Any) -> None:
    """Raise ValueError unless each is an integer of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{who}: {name} is {size!r}, expected an integer of at least 1")


def check_dtype(who: str, dtype: torch.dtype) -> torch.dtype:
    """``dtype``, if there are kernels for it."""
    if dtype not in FLOATING:
        raise TypeError(f"{who}: dtype is {dtype_name(dtype)}, expected fp32, bf16 or fp16")
    return dtype


def kept_of(who: str, density: Any, total: int) -> int:
    """How many of ``total`` a density keeps."""
    if not isinstance(density, int | float) or isinstance(density, bool):
        raise TypeError(f"{who}: density is {density!r}, expected a number with 0 < density <= 1")
    if not 0 < density <= 1:
        raise ValueError(f"{who}: density is {density!r}, expected 0 < density <= 1, the share that is kept")
    return max(1, round(density * total))


def drawn(rows: int, columns: int, kept: int, device: torch.device) -> Tensor:
    """A random mask ``[rows, columns]`` with so many kept."""
    mask = torch.zeros(rows * columns, dtype=torch.bool, device=device)
    mask[torch.randperm(rows * columns, device=device)[:kept]] = True
    return mask.view(rows, columns)


def _check_finite(weight: Tensor, who: str) -> None:
    finite = weight.isfinite()
    if not bool(finite.all()):
        bad = int((~finite).sum())
        row, column = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{who}: the weight has NaN or Inf in {bad} of {weight.numel()} places, first in row {row}, column "
            f"{column}: whether to keep it cannot be told; load or train finite weights first"
        )
