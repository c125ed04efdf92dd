"""The place of an activation that a layer has taken into its epilogue."""

from __future__ import annotations

import torch


class Fused(torch.nn.Identity):
    """An identity that remembers which activation it stands for; :func:`burnish.swap_` puts it there.

    Args:
        activation: the name the layer knows the activation by, ``gelu``.
        into: the child or fqn of the layer that computes it now.
    """

    def __init__(self, activation: str, into: str) -> None:
        super().__init__()
        self.activation = activation
        self.into = into

    def extra_repr(self) -> str:
        return f"{self.activation}, computed by {self.into}"
