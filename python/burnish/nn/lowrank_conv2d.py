"""LowRankConv2d: nn.Conv2d whose weight is a product of smaller ones, run stage by stage.

==========  ==========================  ============================  ========================
state_dict  channel                     spatial                       tucker2
==========  ==========================  ============================  ========================
A           [G R, C / G, kh, kw]        [G R, C / G, kh, 1]           [G R, C / G, 1, 1]
core                                                                  [G R, R, kh, kw]
B           [N, R, 1, 1]                [N, R, 1, kw]                 [N, R, 1, 1]
bias        [N]                         [N]                           [N]
==========  ==========================  ============================  ========================

The rank R is that of each group; in tucker2 a side with fewer channels than R keeps those it has.
:mod:`burnish.schemes` says what the schemes are, how they run and which of them is one fused call: pointwise
convolutions of channels_last images. All other stages are torch's convolutions; between them the result has x's dtype.

Strides, dilations, groups, every padding mode, ``"same"`` and ``"valid"``, and both memory formats are nn.Conv2d's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from burnish import schemes
from burnish.configs import LowRank
from burnish.nn.factored import Factored, check_config, check_dtype, check_rank, chosen_rank

SHARED = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed", "output_padding",
    "groups", "padding_mode",
)  # fmt: skip


class LowRankConv2d(Factored):
    """A 2-d convolution of a given rank; the module's docstring has the state.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as nn.Conv2d's, fp32, bf16 or fp16.
        rank: R, from 1 to what :func:`burnish.schemes.limit` says.
        scheme: ``channel``, ``spatial`` or ``tucker2``.

    Usually made by :meth:`from_float` or :func:`burnish.swap_`.

    Raises:
        ValueError: an argument is out of range, or is not one that nn.Conv2d takes.
        TypeError: the rank is no integer, or the dtype is another.
    """

    core: Parameter | None
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    groups: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int,
        scheme: str = "channel",
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        check_dtype("LowRankConv2d", dtype)
        walk: tuple[Any, ...] = (stride, padding, dilation, groups, False, padding_mode, "meta")
        conv = torch.nn.Conv2d(in_channels, out_channels, kernel_size, *walk)  # which checks its arguments
        self._set_form(conv, rank, scheme)
        self._set_factors([torch.empty(shape, device=device, dtype=dtype) for shape in self._shapes()])
        values = torch.empty(out_channels, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if values is None else Parameter(values))
        self.reset_parameters()

    def _set_form(self, conv: torch.nn.Conv2d, rank: Any, scheme: str) -> None:
        """Check and set what is not a tensor."""
        if scheme not in schemes.SCHEMES:
            raise ValueError(f"LowRankConv2d: scheme is {scheme!r}, expected one of: {', '.join(schemes.SCHEMES)}")
        if not conv.weight.numel():
            raise ValueError(
                f"LowRankConv2d: the weight has shape {tuple(conv.weight.shape)}, expected one with values"
            )
        for name in SHARED:
            setattr(self, name, getattr(conv, name))
        self.scheme = scheme
        self.geometry = schemes.Geometry.of(conv)
        self._set_rank(rank, schemes.limit(scheme, conv.weight.shape, conv.groups))
        self.register_parameter("core", None)

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        weight = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return schemes.shapes(self.scheme, weight, self.groups, self.rank)

    def reset_parameters(self) -> None:
        """Draw values whose product has the variance of nn.Conv2d's weight, and its bias."""
        fan_in = self.in_channels // self.groups * math.prod(self.kernel_size)
        bound = 1 / math.sqrt(fan_in)
        factors = [self.A, self.B] if self.core is None else [self.core, self.A, self.B]
        widths = [self.B.shape[1]] if self.core is None else [self.core.shape[1], self.B.shape[1]]
        torch.nn.init.uniform_(factors[0], -bound, bound)
        for factor, width in zip(factors[1:], widths, strict=True):
            torch.nn.init.uniform_(factor, -math.sqrt(3 / width), math.sqrt(3 / width))
        if self.bias is not None:
            torch.nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_float(cls, module: torch.nn.Module, config: LowRank, *, moment: Tensor | None = None) -> LowRankConv2d:
        """A LowRankConv2d that comes close to ``module``, in its dtype, memory format and mode. The factors are
        trainable where the weight is. The bias is not copied: both hold the same parameter.

        Args:
            module: nn.Conv2d.
            config: the scheme (``conv``), the rank or what it has to keep; kept as ``config``.
            moment: E[x x^T] of the layer's unfolded patches, ``[G, C / G kh kw, C / G kh kw]``, for
                ``method="activation"``.

        Raises:
            TypeError: another kind of module or configuration, or another dtype.
            ValueError: the weight has a NaN or an infinity, the rank is too large, the moment is missing or does not
                fit, the rank is ``"auto"``, or depends on the values of a weight on meta.
        """
        who = "LowRankConv2d.from_float"
        check_config(who, config, moment)
        if not isinstance(module, torch.nn.Conv2d):
            raise TypeError(f"{who}: the module is {type(module).__name__}, expected nn.Conv2d")
        weight = module.weight
        if type(weight) is not Parameter:
            raise TypeError(f"{who}: the weight is a {type(weight).__name__}, expected a plain parameter")
        check_dtype(who, weight.dtype)
        if isinstance(config.rank, int):
            check_rank(who, config.rank, schemes.limit(config.conv, weight.shape, module.groups))
        self = cls.__new__(cls)
        torch.nn.Module.__init__(self)
        if weight.is_meta and isinstance(config.rank, int):
            self._set_form(module, config.rank, config.conv)
            factors = tuple(weight.new_empty(shape) for shape in self._shapes())
        else:
            used = moment if config.method == "activation" else None
            terms = schemes.decompose(config.conv, weight, module.groups, used, who=who)
            self._set_form(module, chosen_rank(terms, config), config.conv)
            factors = terms.factors(self.rank)
        wanted = _memory_format(weight)
        self._set_factors([_laid_out(factor.to(weight.dtype), wanted) for factor in factors], weight.requires_grad)
        self.config = config
        self.register_parameter("bias", module.bias)  # type: ignore[arg-type]
        return self.train(module.training)

    def to_float(self) -> torch.nn.Conv2d:
        """nn.Conv2d with the weight that the factors stand for, multiplied in float64. The bias is not copied: both
        hold the same parameter."""
        walk: list[Any] = [getattr(self, name) for name in ("stride", "padding", "dilation", "groups")]
        walk += [False, self.padding_mode, "meta", self.dtype]
        conv = torch.nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, *walk)
        with torch.no_grad():
            factors = [None if each is None else each.double() for each in (self.A, self.core, self.B)]
            dense = schemes.compose(self.scheme, self.groups, *factors)  # type: ignore[arg-type]
        weight = _laid_out(dense.to(self.dtype), _memory_format(self.A, self.core, self.B))
        conv.weight = Parameter(weight, requires_grad=self.A.requires_grad)
        conv.bias = self.bias
        return conv.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        return schemes.lowrank_conv2d(input, self.A, self.core, self.B, self.bias, self.scheme, self.geometry)

    def extra_repr(self) -> str:
        described = torch.nn.Conv2d.extra_repr(self)  # type: ignore[arg-type]
        return f"{described}, rank={self.rank}, scheme={self.scheme}, {self.nbytes} bytes"


def _laid_out(weight: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A copy with the very strides of a memory format, where ``contiguous`` leaves those that mean the same."""
    return torch.empty_like(weight, memory_format=memory_format).copy_(weight)


def _memory_format(*weights: Tensor | None) -> torch.memory_format:
    """What torch's convolutions take them for, as far as one tells: where a weight lies in memory as both formats, as a
    1 x 1 kernel does, by its strides."""
    for weight in filter(torch.is_tensor, weights):
        contiguous, lasting = (
            torch.empty(weight.shape, device="meta", memory_format=each).stride()
            for each in (torch.contiguous_format, torch.channels_last)
        )
        if weight.stride() == lasting != contiguous:
            return torch.channels_last
    return torch.contiguous_format
