"""Optimizers that torch.optim lacks, in plain torch and in the dtype of their parameters, as their papers have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _Plain(torch.optim.Optimizer):
    def __init__(self, params: Any, foreach: bool | None = None, **options: Any) -> None:
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    grad = -parameter.grad if group["maximize"] else parameter.grad
                    self.walk(parameter, grad, self.state[parameter], group)

    def walk(self, x: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class Lion(_Plain):
    """Chen et al. 2023, algorithm 2; its weight decay is a factor, as the authors' own code and torch.optim.AdamW have
    it."""

    def __init__(
        self, params: Any, lr: Any = 1e-4, betas: Any = (0.9, 0.99), weight_decay: float = 0, maximize: bool = False,
        **rest: Any,
    ) -> None:  # fmt: skip
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize, **rest)

    def walk(self, x: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        m = state.setdefault("exp_avg", torch.zeros_like(x))
        c = beta1 * m + (1 - beta1) * g
        x *= 1 - group["lr"] * group["weight_decay"]
        x -= group["lr"] * c.sign()
        m.copy_(beta2 * m + (1 - beta2) * g)


class LAMB(_Plain):
    """You et al. 2020, algorithm 2, with phi the identity; the ratio is 1 where a norm is 0, which the paper leaves
    open."""

    def __init__(
        self, params: Any, lr: Any = 1e-3, betas: Any = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 1e-2,
        bias_correction: bool = True, always_adapt: bool = True, trust_clip: bool = False, maximize: bool = False,
        **rest: Any,
    ) -> None:  # fmt: skip
        own = {"bias_correction": bias_correction, "always_adapt": always_adapt, "trust_clip": trust_clip}
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, **own, **rest
        )

    def walk(self, x: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        t = state["step"] = state.get("step", 0) + 1
        m = state.setdefault("exp_avg", torch.zeros_like(x))
        v = state.setdefault("exp_avg_sq", torch.zeros_like(x))
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        corrections = (1 - beta1**t, 1 - beta2**t) if group["bias_correction"] else (1, 1)
        r = m / corrections[0] / ((v / corrections[1]).sqrt() + group["eps"]) + group["weight_decay"] * x
        ratio = 1.0
        if (group["always_adapt"] or group["weight_decay"]) and x.norm() > 0 and r.norm() > 0:
            ratio = float(x.norm() / r.norm())
        x -= group["lr"] * (min(ratio, 1.0) if group["trust_clip"] else ratio) * r
