"""LoRALinear: a frozen linear layer with a trainable low-rank adapter, run as one call, dropout included.

    y = base_layer(x) + scaling * (dropout(x) @ lora_A^T) @ lora_B^T        scaling = lora_alpha / r, or / sqrt(r)

=================  =======================  ==================================================================
state_dict         tensor                   meaning
=================  =======================  ==================================================================
base_layer.*       of the layer it holds    nn.Linear, transformers' Conv1D or Int8Linear; frozen, bias too
lora_A             [R, K]                   a parameter, fp32, bf16 or fp16
lora_B             [N, R]                   a parameter, likewise
=================  =======================  ==================================================================

``base_layer`` is the very module that was given; its own hooks do not run, the layer reads its tensors. Adapters of
another dtype than x's are cast to it as they are used, so fp32 adapters can be trained on a bf16 base. Under autocast
x, a float base and the adapters are cast to the autocast dtype. Gradients reach x, lora_A and lora_B.

Dropout acts in training alone. Its mask is a function of a seed that is drawn at each call from torch's generator of
x's device, without waiting for the device: ``torch.manual_seed`` repeats it, and activation checkpointing, which keeps
the generator's state, computes with the same mask again. The mask itself is never stored.

Sharding. Adapted first and sharded afterwards (``fully_shard`` on the layer or on a module around it, never on its
``base_layer``), the adapters are sharded like all else. Sharded first and adapted afterwards by
:func:`burnish.swap_`, FSDP2 goes on managing the base weight, by hooks that the layer takes over; the adapters are then
whole in every process, equal at first, and each backward pass averages their gradients over the mesh.

Method: Hu et al. 2021 (LoRA, arXiv 2106.09685); scaling by sqrt(r), Kalajdzievski 2023 (rsLoRA, arXiv 2312.03732);
start from the principal singular vectors, Meng et al. 2024 (PiSSA, arXiv 2404.02948).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from burnish.autocast import autocast_dtype
from burnish.checks import FLOATING
from burnish.configs import LoRA
from burnish.nn import scripting
from burnish.nn.averaged import averaged, spread
from burnish.nn.base_layer import dtype_of, is_sharded, operands, refusal, sizes, with_weight
from burnish.nn.int8_linear import Int8Linear
from burnish.ops.lora_linear import lora_linear
from burnish.registry import dtype_name

#: seeds are drawn below this: torch.compile's generator takes ranges of 63 bits
_SEEDS = 2**63 - 1


class LoRALinear(torch.nn.Module):
    """A frozen layer and its adapter; the module's docstring has the formula and the state.

    Args:
        base_layer: nn.Linear, transformers' Conv1D or an Int8Linear without activation. It is kept, not copied, and its
            weight and bias are frozen.
        r: the rank, from 1 to min(in_features, out_features).
        lora_alpha: the adapter counts ``lora_alpha / r`` times.
        lora_dropout: the probability of dropping an element of the adapter's input in training, 0 to 1.
        use_rslora: divide lora_alpha by sqrt(r) instead.
        init_lora_weights: ``default``, lora_A as nn.Linear's weight and lora_B zero; or ``pissa``, the adapter is the
            principal part of the base weight and the base keeps the rest, so that training starts from what the layer
            computes now. It takes a float base that is not sharded; ``base_layer`` is then a copy with the rest.
        dtype: of the adapter, fp32, bf16 or fp16; by default the base's.

    Raises:
        TypeError: a base that an adapter cannot sit on, or an option of the wrong type.
        ValueError: an option out of range.
    """

    __prepare_scriptable__ = scripting.refuse
    _version = 1
    in_features: int
    out_features: int
    base_layer: torch.nn.Module
    lora_A: torch.nn.Parameter
    lora_B: torch.nn.Parameter
    _mesh: Any
    _unmerged: torch.nn.Module | None

    def __init__(
        self,
        base_layer: torch.nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        *,
        use_rslora: bool = False,
        init_lora_weights: str = "default",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = LoRA(
            r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, None if dtype is None else dtype_name(dtype)
        )
        self._set_form(base_layer, config)
        self._set_adapter(config)
        self._freeze()

    def _set_form(self, base: torch.nn.Module, config: LoRA, mesh: Any = None) -> None:
        """Check and set what is not the adapter's tensors; freezes the base."""
        reason = refusal(base)
        if reason is not None:
            raise TypeError(f"LoRALinear: base_layer is {reason}")
        config = config.resolved()
        assert config.r is not None
        assert config.lora_alpha is not None
        assert config.lora_dropout is not None
        self.config = config
        self.in_features, self.out_features = sizes(base)
        self.r, self.lora_alpha, self.lora_dropout = config.r, config.lora_alpha, config.lora_dropout
        self.scaling = config.scaling
        self.base_layer = base
        self._mesh = operands(base)[0].device_mesh if is_sharded(base) else mesh  # type: ignore[attr-defined]
        self._set_aside(None)

    def _set_aside(self, base: torch.nn.Module | None) -> None:
        """Keep a base that is not to be one of this module's children."""
        vars(self)["_unmerged"] = base

    def _set_adapter(self, config: LoRA) -> None:
        """Give the adapter its tensors and first values."""
        base, least = self.base_layer, min(self.in_features, self.out_features)
        if self.r > least:
            raise ValueError(
                f"LoRALinear: r is {self.r}, expected at most min(in_features, out_features) = {least} for this layer"
            )
        dtype = dtype_of(base) if config.dtype is None else config.torch_dtype
        device = operands(base)[0].device
        self.lora_A = torch.nn.Parameter(torch.empty(self.r, self.in_features, device=device, dtype=dtype))
        self.lora_B = torch.nn.Parameter(torch.empty(self.out_features, self.r, device=device, dtype=dtype))
        if config.init_lora_weights == "pissa":
            self._init_principal()
        elif not self.lora_A.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw lora_A as nn.Linear draws its weight, and set lora_B to zero: the layer computes what its base does."""
        with torch.no_grad():
            torch.nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            self.lora_B.zero_()
            if self._mesh is not None:
                spread(self._mesh, self.lora_A)

    def _init_principal(self) -> None:
        base = self.base_layer
        weight = operands(base)[0]
        if isinstance(base, Int8Linear) or self._mesh is not None or weight.is_meta:
            what = "sharded" if self._mesh is not None else "on meta" if weight.is_meta else "an Int8Linear"
            raise ValueError(
                f"LoRALinear: init_lora_weights is 'pissa' and base_layer is {what}, expected a whole float weight to "
                "take the principal part of: adapt before quantising or sharding"
            )
        with torch.no_grad():
            left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
            roots = (values[: self.r] / self.scaling).sqrt()
            self.lora_A.copy_(roots.unsqueeze(1) * right[: self.r])
            self.lora_B.copy_(left[:, : self.r] * roots)
            self.base_layer = with_weight(base, self._summed(-1.0))

    @classmethod
    def from_float(cls, module: torch.nn.Module, config: LoRA | None = None, mesh: Any = None) -> LoRALinear:
        """A LoRALinear around ``module``, which may also be an Int8Linear, in its mode.

        Args:
            module: as for the constructor.
            config: the default is ``LoRA()``.
            mesh: the device mesh that the model around it is sharded over, if it is.

        Raises:
            TypeError, ValueError: as the constructor does.
        """
        config = config or LoRA()
        self = cls.__new__(cls)
        torch.nn.Module.__init__(self)
        self._set_form(module, config, mesh)
        self._set_adapter(config)
        self._freeze()
        return self.train(module.training)

    @classmethod
    def around(
        cls,
        base: torch.nn.Module,
        config: LoRA,
        lora_A: torch.nn.Parameter,
        lora_B: torch.nn.Parameter,
        scaling: float | None = None,
        mesh: Any = None,
    ) -> LoRALinear:
        """A LoRALinear of an adapter that exists: it goes on with the very parameters.

        Args:
            base: as for the constructor.
            config: what the adapter is.
            lora_A, lora_B: its factors, [R, K] and [N, R].
            scaling: another one than the configuration's.
            mesh: as for :meth:`from_float`.
        """
        self = cls.__new__(cls)
        torch.nn.Module.__init__(self)
        self._set_form(base, config, mesh)
        self.lora_A, self.lora_B = lora_A, lora_B
        self.scaling = self.scaling if scaling is None else scaling
        if self._mesh is not None:
            spread(self._mesh, lora_A.detach(), lora_B.detach())
        self._freeze()
        return self.train(base.training)

    def _freeze(self) -> None:
        for tensor in self.base_layer.parameters(recurse=False):
            tensor.requires_grad_(False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self._unmerged is not None:
            return self.base_layer.forward(input)
        weight, scale, bias = operands(self.base_layer)
        A: Any = self._parameters["lora_A"]
        B: Any = self._parameters["lora_B"]
        if type(weight).__name__ == "DTensor":
            raise RuntimeError(
                "LoRALinear: the weight of base_layer is still sharded, expected it whole at forward: apply "
                "fully_shard to the LoRALinear or to a module around it, not to its base_layer"
            )
        if self._mesh is not None:
            A, B = averaged(self._mesh, A, B)
            weight, bias = weight.detach(), None if bias is None else bias.detach()  # FSDP2 made them before the freeze
        if torch._C._is_any_autocast_enabled():
            dtype = autocast_dtype(input)
            if dtype is not None and input.dtype in FLOATING:
                input = input.to(dtype)
                weight = weight.to(dtype) if scale is None else weight
        p = self.lora_dropout if self.training else 0.0
        seed = torch.randint(_SEEDS, (1,), device=input.device) if p else None
        A, B = A.to(input.dtype), B.to(input.dtype)
        return lora_linear(input, weight, A, B, bias, scale, self.scaling, p, seed)

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, without the adapter unless that is merged."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def merged(self) -> bool:
        """Whether the adapter is in the base weight at present."""
        return self._unmerged is not None

    def merge(self) -> None:
        """Add the adapter to the base weight, in fp32 and rounded once; the layer then costs what its base costs.

        A copy of the base that holds the sum takes its place and the base is kept aside, so :meth:`unmerge` brings the
        same bits and the same module back, and a layer that the weight is tied to does not change.

        Raises:
            RuntimeError: merged already, or a base that is int8 or sharded.
        """
        if self.merged:
            raise RuntimeError("LoRALinear.merge: the adapter is merged already, expected unmerge() first")
        self._check_whole("merge")
        if isinstance(self.base_layer, Int8Linear):
            raise RuntimeError(
                "LoRALinear.merge: base_layer is an Int8Linear, whose weight would be rounded to int8 once more: merge "
                "before the base is swapped to Int8, or take the float layer that to_float() gives"
            )
        base = self.base_layer
        self.base_layer = with_weight(base, self._summed(1.0))
        self._set_aside(base)

    def unmerge(self) -> None:
        """Bring back the base that there was before :meth:`merge`, bit for bit; it follows the layer's device, dtype
        and mode.

        Raises:
            RuntimeError: not merged.
        """
        if self._unmerged is None:
            raise RuntimeError("LoRALinear.unmerge: the adapter is not merged, expected merge() first")
        weight = operands(self.base_layer)[0]
        self.base_layer = self._unmerged.to(weight.device, weight.dtype).train(self.training)
        self._set_aside(None)

    def _check_whole(self, call: str) -> None:
        if is_sharded(self.base_layer) or type(self.lora_A).__name__ == "DTensor":
            raise RuntimeError(
                f"LoRALinear.{call}: the weights are sharded, expected whole ones: gather the state dict and load it "
                "into a model that is not sharded"
            )

    def _delta(self) -> torch.Tensor:
        return self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())

    def _summed(self, sign: float) -> torch.Tensor:
        """The float base's weight with the adapter added or taken away, as the base holds it."""
        weight = self.base_layer._parameters["weight"]
        assert weight is not None
        delta = self._delta() if isinstance(self.base_layer, torch.nn.Linear) else self._delta().t()
        return (weight.detach().float() + sign * delta).to(weight.dtype)

    def to_float(self) -> torch.nn.Module:
        """The plain nn.Linear with the adapter in its weight, rounded to the base's dtype. An int8 base is
        dequantised first. The bias is not copied: both hold the same parameter.

        Raises:
            RuntimeError: the weights are sharded.
        """
        self._check_whole("to_float")
        base = self.base_layer.to_float() if isinstance(self.base_layer, Int8Linear) else self.base_layer
        weight = operands(base)[0].detach()
        if not self.merged:
            weight = (weight.float() + self._delta()).to(weight.dtype)
        linear = torch.nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=weight.dtype)
        linear.weight = torch.nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
        linear.bias = self.base_layer.bias  # type: ignore[assignment]
        return linear.train(self.training)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the base computes in."""
        return dtype_of(self.base_layer)

    @property
    def summary(self) -> str:
        """What a report calls it."""
        on = " on Int8Linear" if isinstance(self.base_layer, Int8Linear) else ""
        return f"LoRALinear r={self.r}{on}"

    def extra_repr(self) -> str:
        merged = ", merged" if self.merged else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"lora_alpha={self.lora_alpha:g}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}, "
            f"adapter={dtype_name(self.lora_A.dtype)}{merged}, {self.nbytes} bytes"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter and of its base's tensors."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.merged:
            raise RuntimeError(
                f"LoRALinear.state_dict: {prefix}base_layer has the adapter merged, which a layer that loads it would "
                "add again: call unmerge() first, or save the layer that to_float() gives"
            )
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
        version = local_metadata.get("version", 1)
        if version > self._version:
            error_msgs.append(
                f"{prefix}* is LoRALinear state of version {version}, this burnish reads up to {self._version}"
            )
        elif self.merged:
            error_msgs.append(f"{prefix}* has its adapter merged: call unmerge() before loading")
        else:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
