"""Int8Linear: nn.Linear with int8 weights, activations quantised row by row as they come, and a fused activation.

    y = act(quantised(x) @ (weight * weight_scale)^T + bias)

=============  ===================  ================================================================================
state_dict     tensor               meaning
=============  ===================  ================================================================================
weight         int8 [N, K]          canonical: the same on every device and processor
weight_scale   fp32 [N]             one a output channel
bias           [N], optional        a parameter, fp32, bf16 or fp16
=============  ===================  ================================================================================

In memory the weight exists once, in the layout its device runs on (:func:`burnish.ops.int8_linear_pack`), as the buffer
``weight_packed``; ``state_dict`` unpacks, ``load_state_dict`` packs, both exactly. Moving the module to a device of
another layout unpacks and packs, because the layout is the device's; ``half()``, ``bfloat16()`` and ``to(dtype)``
change the bias and the dtype of :meth:`Int8Linear.to_float`, never the int8 weight or its scale.

The weight is frozen: gradients reach the input and the bias. The output has the input's dtype, or under autocast the
autocast dtype, as nn.Linear has; the input is not cast, the kernel reads it as it is.

DDP, FSDP2 and torch.distributed.checkpoint's full state dicts work; its ``broadcast_from_rank0=True`` does not, because
it then looks for the state dict's entries among the buffers: let every rank pass the full state dict.

A weight's scale is the largest magnitude of its row over 127, the rule of :func:`burnish.ops.int8_quantize_rows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from burnish.autocast import autocast_dtype
from burnish.configs import Int8
from burnish.nn import scripting
from burnish.nn.derived import derive
from burnish.ops.int8_linear import ACTIVATIONS, MAX_K, int8_linear
from burnish.ops.int8_linear_pack import int8_linear_pack, int8_linear_unpack
from burnish.ops.int8_quantize_rows import int8_quantize_rows
from burnish.registry import dtype_name

_FROZEN = ("weight_packed", "weight_scale")
_FLOATING = (torch.float32, torch.bfloat16, torch.float16)


class Int8Linear(torch.nn.Module):
    """A linear layer with int8 weights; the module's docstring has the formula and the state.

    Args:
        in_features: K, at most 131072.
        out_features: N, at least 1.
        bias: whether there is one.
        device: where the tensors live; ``meta`` allocates nothing.
        dtype: of the bias, and of the layer :meth:`to_float` makes: fp32, bf16 or fp16.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``, applied to the result.

    The initial values are nn.Linear's, quantised. Usually made by :meth:`from_float` or :func:`burnish.swap_`.
    """

    __prepare_scriptable__ = scripting.refuse
    _version = 1
    in_features: int
    out_features: int
    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "none",
    ) -> None:
        super().__init__()
        self._set_form(in_features, out_features, dtype or torch.get_default_dtype(), activation)
        empty = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self._set_weight(empty, torch.ones(out_features, device=empty.device, dtype=torch.float32))
        values = torch.empty(out_features, device=empty.device, dtype=self.dtype) if bias else None
        self.register_parameter("bias", None if values is None else torch.nn.Parameter(values))
        if not empty.is_meta:
            self.reset_parameters()

    def _set_form(self, in_features: int, out_features: int, dtype: torch.dtype, activation: str) -> None:
        """Check and set what is not a tensor."""
        for name, size, least in (("in_features", in_features, 0), ("out_features", out_features, 1)):
            if not isinstance(size, int) or size < least:
                raise ValueError(f"Int8Linear: {name} is {size!r}, expected an integer of at least {least}")
        if in_features > MAX_K:
            raise ValueError(f"Int8Linear: in_features is {in_features}, expected at most {MAX_K}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"Int8Linear: activation is {activation!r}, expected one of: {', '.join(ACTIVATIONS)}")
        if dtype not in _FLOATING:
            raise TypeError(f"Int8Linear: dtype is {dtype_name(dtype)}, expected fp32, bf16 or fp16")
        self.in_features, self.out_features = in_features, out_features
        self.activation = activation
        self.dtype = dtype
        self.config = Int8()

    def _set_weight(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        packed = derive(weight, "packed", lambda: int8_linear_pack(weight))
        self.register_buffer("weight_packed", packed, persistent=False)
        self.register_buffer("weight_scale", scale)

    def reset_parameters(self) -> None:
        """Draw the values nn.Linear draws and quantise the weight."""
        device = self.weight_scale.device
        with torch.no_grad():
            weight = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=device)
            torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            self._set_weight(*int8_quantize_rows(weight))
            if self.bias is not None:
                bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
                self.bias.uniform_(-bound, bound)

    @classmethod
    def from_float(cls, module: torch.nn.Module, config: Int8 | None = None, *, activation: str = "none") -> Int8Linear:
        """An Int8Linear with ``module``'s values and mode. The bias is not copied: both hold the same parameter.

        Args:
            module: nn.Linear or transformers' Conv1D (whose weight is ``[K, N]``).
            config: kept as ``config``; the default is ``Int8()``.
            activation: what to apply to the result.

        Raises:
            TypeError: another kind of module, or a dtype that int8 has no kernel for.
            ValueError: the weight has a NaN or an infinity, or a size is out of range.
        """
        weight = float_weight(module)
        if weight is None:
            raise TypeError(
                f"Int8Linear.from_float: the module is {type(module).__name__}, expected nn.Linear or "
                "transformers' Conv1D"
            )
        if type(weight) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError(f"Int8Linear.from_float: the weight is a {type(weight).__name__}, expected a plain tensor")
        self = cls.__new__(cls)
        torch.nn.Module.__init__(self)
        self._set_form(weight.shape[1], weight.shape[0], weight.dtype, activation)
        if config is not None:
            self.config = config
        with torch.no_grad():
            if weight.is_meta:
                q, scale = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(weight.shape[0]).float()
            else:
                q, scale = int8_quantize_rows(weight.detach())
                bad = (~scale.isfinite()).nonzero().flatten()
                if bad.numel():
                    raise ValueError(
                        f"Int8Linear.from_float: the weight has NaN or Inf in {bad.numel()} of {len(scale)} output "
                        f"channels, first in channel {int(bad[0])}; expected finite values"
                    )
            self._set_weight(q, scale)
        self.register_parameter("bias", getattr(module, "bias", None))
        self.train(module.training)
        return self

    def to_float(self) -> torch.nn.Module:
        """The float layer with the dequantised weight, in :attr:`dtype`: nn.Linear, or where an activation is fused
        nn.Sequential of it and the activation. The bias is not copied: both hold the same parameter."""
        linear = torch.nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.dtype)
        values = (self.weight * self.weight_scale.unsqueeze(1)).to(self.dtype)
        linear.weight = torch.nn.Parameter(values, requires_grad=False)
        linear.bias = self.bias  # type: ignore[assignment]
        curves: dict[str, torch.nn.Module] = {
            "relu": torch.nn.ReLU(),
            "gelu": torch.nn.GELU(),
            "gelu_tanh": torch.nn.GELU(approximate="tanh"),
            "silu": torch.nn.SiLU(),
        }
        if self.activation == "none":
            return linear.train(self.training)
        return torch.nn.Sequential(linear, curves[self.activation]).train(self.training)

    @property
    def weight(self) -> torch.Tensor:
        """The int8 weight ``[N, K]``, unpacked: a copy, made at every access; ``weight * weight_scale[:, None]`` is
        the float weight."""
        return int8_linear_unpack(self.weight_packed, self.out_features, self.in_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # the op sees the packed width alone, which is rounded up
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise RuntimeError(f"Int8Linear: x has shape {tuple(input.shape)}, expected [..., {self.in_features}]")
        buffers = self._buffers  # a tenth of the time that an attribute of nn.Module takes
        return int8_linear(
            input,
            buffers["weight_packed"],  # type: ignore[arg-type]
            buffers["weight_scale"],  # type: ignore[arg-type]
            self._parameters["bias"],
            self.activation,
            autocast_dtype(input) if torch._C._is_any_autocast_enabled() else None,
        )

    def extra_repr(self) -> str:
        activation = f", activation={self.activation}" if self.activation != "none" else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
            f"{activation}, weight=int8 per channel ({self.layout}), {self.nbytes} bytes"
        )

    @property
    def layout(self) -> str:
        """How the weight lies in memory: ``vnni`` or ``rows``."""
        return "rows" if self.weight_packed.dtype == torch.int8 else "vnni"

    @property
    def summary(self) -> str:
        """What a report calls it."""
        return "Int8Linear" if self.activation == "none" else f"Int8Linear + {self.activation}"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in memory, padding included."""
        tensors = (self.weight_packed, self.weight_scale, self.bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Int8Linear:
        with self._thawed() as (packed, scale):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scale.device)).dtype
            moved = keep_dtype(fn, scale)
            if moved is not scale:
                moved = derive(scale, ("moved", moved.device), lambda: moved)
            self._buffers["weight_scale"] = moved
            self._buffers["weight_packed"] = self._moved(fn, packed, moved.device)
        return self

    @contextmanager
    def _thawed(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The int8 weight and its scale, while nn.Module does not see them; what was not replaced comes back."""
        before = {name: self._buffers.pop(name) for name in _FROZEN}
        try:
            yield before["weight_packed"], before["weight_scale"]  # type: ignore[misc]
        finally:
            self._buffers.update({name: before[name] for name in _FROZEN if name not in self._buffers})

    def _moved(
        self, fn: Callable[[torch.Tensor], torch.Tensor], packed: torch.Tensor, device: torch.device
    ) -> torch.Tensor:
        """``packed`` after ``fn``, which brings tensors to ``device``, in that device's layout."""
        if fits(packed, device):
            moved = keep_dtype(fn, packed)
            return packed if moved is packed else derive(packed, ("moved", device), lambda: moved)

        def through_canonical() -> torch.Tensor:
            weight = int8_linear_unpack(packed, self.out_features, self.in_features)
            return int8_linear_pack(keep_dtype(fn, weight))

        return derive(packed, ("moved", device), through_canonical)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if not fits(self.weight_packed, self.weight_packed.device):  # unpickled on another kind of device
            self._buffers["weight_packed"] = self._moved(lambda t: t, self.weight_packed, self.weight_packed.device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        packed = self.weight_packed
        destination[prefix + "weight"] = derive(packed, "canonical", lambda: self.weight)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        wrong = self._objections(state_dict, prefix, local_metadata)
        if wrong:
            error_msgs.extend(wrong)
            return
        key = prefix + "weight"
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key in unexpected_keys:
            unexpected_keys.remove(key)
        if key not in state_dict:
            if strict:
                missing_keys.append(key)
            return
        weight = state_dict[key]
        if local_metadata.get("assign_to_params_buffers", False):
            self._buffers["weight_packed"] = derive(weight, "packed", lambda: int8_linear_pack(weight))
            if self.bias is not None:
                self.dtype = self.bias.dtype
        elif not self.weight_packed.is_meta:
            with torch.no_grad():
                self.weight_packed.copy_(int8_linear_pack(weight.to(self.weight_packed.device)))

    def _objections(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> list[str]:
        """What is wrong with the entries of this layer, in sentences."""
        version = local_metadata.get("version", 1)
        if version > self._version:
            return [f"{prefix}* is Int8Linear state of version {version}, this burnish reads up to {self._version}"]
        wrong = []
        expected = {
            "weight": (torch.int8, (self.out_features, self.in_features)),
            "weight_scale": (torch.float32, (self.out_features,)),
        }
        for name, (dtype, shape) in expected.items():
            value = state_dict.get(prefix + name)
            if value is None:
                continue
            if not isinstance(value, torch.Tensor) or value.dtype != dtype or tuple(value.shape) != shape:
                got = f"{dtype_name(value.dtype)} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else value
                hint = " (a float checkpoint is loaded before swapping)" if name == "weight" else ""
                wrong.append(f"{prefix}{name} is {got}, expected {dtype_name(dtype)} {shape}{hint}")
            elif name == "weight_scale" and not value.is_meta and not bool((value.isfinite() & (value > 0)).all()):
                wrong.append(f"{prefix}weight_scale has values that are NaN, Inf, zero or negative, expected positive")
        return wrong


def float_weight(module: torch.nn.Module) -> torch.Tensor | None:
    """The weight of a layer that from_float takes, as ``[N, K]``; None for any other module."""
    if isinstance(module, torch.nn.Linear):
        return module.weight
    if is_conv1d(module):
        return module.weight.t()  # type: ignore[operator]
    return None


def is_conv1d(module: torch.nn.Module) -> bool:
    """Whether it is transformers' Conv1D, known by name so that transformers need not be imported."""
    return any(
        (cls.__module__, cls.__qualname__) == ("transformers.pytorch_utils", "Conv1D") for cls in type(module).__mro__
    )


def fits(packed: torch.Tensor, device: torch.device) -> bool:
    """Whether the packed weight has the layout that the device runs on; on meta every layout does."""
    return device.type == "meta" or (packed.dtype == torch.int8) == (device.type == "cuda")


def keep_dtype(fn: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """``fn(tensor)``, which may move but must not convert it."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
