"""LowRankLinear: nn.Linear whose weight is a product of two thin matrices, computed in one call.

    y = (x A^T) B^T + bias                 the weight that it stands for is B A

==========  ==================  ==================================================
state_dict  tensor              meaning
==========  ==================  ==================================================
A           [R, K]              the down-projection
B           [N, R]              the up-projection, in A's dtype
bias        [N], optional       fp32, bf16 or fp16
==========  ==================  ==================================================

All three are trainable parameters. R (N + K) weights take the place of N K: fewer below R = N K / (N + K). The op,
:func:`burnish.ops.lowrank_linear`, keeps the R values between the factors on the chip and reads dy once in backward.

Under autocast the layer is as two nn.Linear are: x, A and B are cast, the result has the autocast dtype; the bias is
added in fp32, before the one rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Parameter

from burnish import autocast, factorize
from burnish.configs import LowRank
from burnish.nn.factored import Factored, check_config, check_dtype, check_rank, chosen_rank
from burnish.nn.int8_linear import float_weight
from burnish.ops.lowrank_linear import lowrank_linear


class LowRankLinear(Factored):
    """A linear layer of a given rank; the module's docstring has the formula and the state.

    Args:
        in_features: K, at least 1.
        out_features: N, at least 1.
        bias: whether there is one.
        device: where the tensors live; ``meta`` allocates nothing.
        dtype: fp32, bf16 or fp16.
        rank: R, from 1 to min(N, K).

    Usually made by :meth:`from_float` or :func:`burnish.swap_`.

    Raises:
        ValueError: a size or the rank is out of range.
        TypeError: the rank is no integer, or there are no kernels for the dtype.
    """

    in_features: int
    out_features: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"LowRankLinear: {name} is {size!r}, expected an integer of at least 1")
        check_dtype("LowRankLinear", dtype)
        self.in_features, self.out_features = in_features, out_features
        self._set_rank(rank, min(in_features, out_features))
        shapes = ((rank, in_features), (out_features, rank))
        self._set_factors([torch.empty(shape, device=device, dtype=dtype) for shape in shapes])
        values = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if values is None else Parameter(values))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A and the bias as nn.Linear does, and B so that B A has the variance of nn.Linear's weight."""
        bound = 1 / math.sqrt(self.in_features)
        torch.nn.init.uniform_(self.A, -bound, bound)
        torch.nn.init.uniform_(self.B, -math.sqrt(3 / self.rank), math.sqrt(3 / self.rank))
        if self.bias is not None:
            torch.nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_float(cls, module: torch.nn.Module, config: LowRank, *, moment: Tensor | None = None) -> LowRankLinear:
        """A LowRankLinear that comes closest to ``module``, in its dtype and mode. The factors are trainable where the
        weight is. The bias is not copied: both hold the same parameter.

        Args:
            module: nn.Linear or transformers' Conv1D (whose weight is ``[K, N]``).
            config: the rank or what it has to keep; kept as ``config``.
            moment: E[x x^T] of the layer's inputs, ``[K, K]``, for ``method="activation"``.

        Raises:
            TypeError: another kind of module or configuration, or a dtype without kernels.
            ValueError: the weight has a NaN or an infinity, the rank is above min(N, K), the moment is missing or does
                not fit, the rank is ``"auto"``, or depends on the values of a weight on meta.
        """
        who = "LowRankLinear.from_float"
        check_config(who, config, moment)
        weight = float_weight(module)
        if weight is None:
            raise TypeError(f"{who}: the module is {type(module).__name__}, expected nn.Linear or transformers' Conv1D")
        if type(weight) not in (Tensor, Parameter):
            raise TypeError(f"{who}: the weight is a {type(weight).__name__}, expected a plain tensor")
        check_dtype(who, weight.dtype)
        if isinstance(config.rank, int):
            check_rank(who, config.rank, min(weight.shape))
        if weight.is_meta and isinstance(config.rank, int):
            self = cls(weight.shape[1], weight.shape[0], False, "meta", weight.dtype, rank=config.rank)
            self.requires_grad_(weight.requires_grad)
        else:
            terms = factorize.matrix(weight, moment if config.method == "activation" else None, who=who)
            rank = chosen_rank(terms, config)
            self = cls(weight.shape[1], weight.shape[0], False, "meta", weight.dtype, rank=rank)
            self._set_factors(
                [factor.to(weight.dtype).contiguous() for factor in terms.factors(rank)], weight.requires_grad
            )
        self.config = config
        self.bias = getattr(module, "bias", None)
        return self.train(module.training)

    def to_float(self) -> torch.nn.Linear:
        """nn.Linear with the weight B A, multiplied in float64. Both hold the same bias."""
        linear = torch.nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.dtype)
        with torch.no_grad():
            weight = (self.B.double() @ self.A.double()).to(self.dtype)
        linear.weight = Parameter(weight, requires_grad=self.A.requires_grad)
        linear.bias = self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        parameters = self._parameters  # a tenth of the time that an attribute of nn.Module takes
        x, A, B = autocast.operands(input, parameters["A"], parameters["B"])  # type: ignore[arg-type]
        return lowrank_linear(x, A, B, parameters["bias"])

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"rank={self.rank}, {self.nbytes} bytes"
        )
