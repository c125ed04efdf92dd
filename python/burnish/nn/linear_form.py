"""What sparse layers in the place of nn.Linear share: its attributes, and where they come from."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from burnish.nn import masked
from burnish.nn.int8_linear import is_conv1d
from burnish.nn.sparse_layer import SparseLayer, check_sizes


class LinearForm(SparseLayer):
    """The parent of :class:`burnish.nn.BlockSparseLinear`, ``Sparse24Linear`` and ``SparseLinear``."""

    in_features: int
    out_features: int

    @property
    def matrix(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _set_sizes(self, in_features: int, out_features: int) -> None:
        check_sizes(type(self).__name__, in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features

    def _take_form(self, module: torch.nn.Module) -> None:
        outputs, inputs = masked.weight_of(module).shape
        self._set_sizes(*((outputs, inputs) if is_conv1d(module) else (inputs, outputs)))

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x and the values, as autocast has them; x of another width raises."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise RuntimeError(
                f"{type(self).__name__}: x has shape {tuple(x.shape)}, expected [..., {self.in_features}]"
            )
        return self._cast(x)

    @classmethod
    def _check_module(cls, module: torch.nn.Module, who: str) -> None:
        if not isinstance(module, torch.nn.Linear) and not is_conv1d(module):
            raise TypeError(f"{who}: the module is {type(module).__name__}, expected nn.Linear or transformers' Conv1D")

    def to_dense(self) -> Tensor:
        """The weight ``[N, K]`` with its zeros, in :attr:`dtype`, a copy: bit for bit the one that was compressed; of
        int8 values, ``values * scale``."""
        return self._dense()

    def to_float(self) -> torch.nn.Linear:
        """nn.Linear with :meth:`to_dense` for a weight. Both hold the same bias."""
        linear = torch.nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.dtype)
        linear.weight = Parameter(self.to_dense(), requires_grad=self.values.requires_grad)
        linear.bias = self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._describe()}"
        )
