"""Pruned layers without their zeros: what BlockSparse, Sparse24 and Sparse make of them.

=============  ================================================  ==========================================
configuration  of                                                becomes
=============  ================================================  ==========================================
BlockSparse    linear layers; 2-d convolutions with one group    BlockSparseLinear; SparseConv2d
Sparse24       linear layers                                     Sparse24Linear
Sparse         linear layers                                     SparseLinear
=============  ================================================  ==========================================

Masks of burnish.prune and of torch.nn.utils.prune are read and gone with the old layer. A weight whose zeros do not
make the pattern keeps its layer, and so does one that would take more bytes without them; a NaN calls the swap off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from burnish.configs import BlockSparse, Config, Sparse, Sparse24
from burnish.errors import PatternError
from burnish.kinds import linear
from burnish.kinds.kind import Kept, Kind, Misfit, Request
from burnish.nn import masked
from burnish.nn.block_sparse_linear import BlockSparseLinear
from burnish.nn.sparse24_linear import Sparse24Linear
from burnish.nn.sparse_conv2d import SparseConv2d
from burnish.nn.sparse_layer import SparseLayer
from burnish.nn.sparse_linear import SparseLinear

_CLASSES: dict[type[Config], tuple[type[SparseLayer], ...]] = {
    BlockSparse: (BlockSparseLinear, SparseConv2d),
    Sparse24: (Sparse24Linear,),
    Sparse: (SparseLinear,),
}


def _class_for(module: torch.nn.Module, config: Config) -> type[SparseLayer]:
    return _CLASSES[type(config)][1 if isinstance(module, torch.nn.Conv2d) else 0]


def convert(request: Request) -> SparseLayer:
    module, config = request.module, request.config
    cls = _class_for(module, config)
    try:
        made = cls.from_float(module, config)
    except PatternError as error:
        raise Kept(str(error).removeprefix(f"{cls.__name__}.from_float: ")) from None
    dense = sum(parameter.nbytes for parameter in masked.plain(module).parameters())
    if made.nbytes >= dense:
        raise Kept(
            f"{made.summary}, it would take {made.nbytes} bytes and takes {dense} now: it has too few zeros or is too "
            "small; prune it further with burnish.prune"
        )
    return made


def form(module: torch.nn.Module) -> dict[str, Any]:
    assert isinstance(module, SparseLayer)
    if isinstance(module, SparseConv2d):
        return {**linear.walk_of(module), "bias": module.bias is not None, "nnz": module.nnz}
    return {
        "in_features": module.in_features,
        "out_features": module.out_features,
        "bias": module.bias is not None,
        "nnz": module.nnz,
    }


def rebuild(found: torch.nn.Module, config: Config, form: Mapping[str, Any]) -> SparseLayer:
    cls = _class_for(found, config)
    if (cls is SparseConv2d) != ("kernel_size" in form):
        was = "SparseConv2d" if "kernel_size" in form else "BlockSparseLinear"
        raise Misfit(f"kind {type(found).__name__} in the model, {was} in the checkpoint")
    if isinstance(found, torch.nn.Conv2d):
        linear.check_walk(found, form)
    else:
        linear.check_form(found, form)
    return cls.like(found, config, form["nnz"])


def _is_block_candidate(module: torch.nn.Module) -> bool:
    return linear.is_candidate(module) or isinstance(module, torch.nn.Conv2d)


def _kind(config: type[Config], noun: str) -> Kind:
    def objection(module: torch.nn.Module, parents: list[torch.nn.Module]) -> str | None:
        reason = linear.objection(module, parents, noun, masks=True)
        if reason is None and not masked.weight_of(module).numel():
            return "it has no inputs"
        if reason is None and isinstance(module, torch.nn.Conv2d) and module.groups != 1:
            return f"it has {module.groups} groups; {noun} has kernels for one"
        return reason

    classes = _CLASSES[config]
    index = tuple({name: None for cls in classes for name in cls.INDEX})
    return Kind(
        config=config,
        noun=noun,
        made=classes,
        candidate=_is_block_candidate if config is BlockSparse else linear.is_candidate,
        objection=objection,
        convert=convert,
        weights=("values", *index, "transposed_index", "scale"),
        races=lambda module: True,
        form=form,
        rebuild=rebuild,
    )


BLOCK_SPARSE, SPARSE24, SPARSE = _kind(BlockSparse, "block-sparse"), _kind(Sparse24, "2:4"), _kind(Sparse, "sparse")
