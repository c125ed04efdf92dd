"""LowRank: linear layers become :class:`burnish.nn.LowRankLinear`, 2-d convolutions :class:`burnish.nn.LowRankConv2d`.

A rank with as many weights as the dense layer, or more, keeps the layer. ``rank="auto"`` looks among the ranks with
fewer, at most 64 of them evenly spaced, for the largest that is faster than the dense layer on the input that
``measure`` tells, by bisection; it must win by a tenth, so that the noise of another run does not undo it. Layers that
are alike get the same rank, found once a process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from burnish import measure, schemes
from burnish.configs import Config, LowRank
from burnish.kinds import linear
from burnish.kinds.kind import Kept, Kind, Misfit, Request, check_rank
from burnish.nn.int8_linear import float_weight
from burnish.nn.lowrank_conv2d import LowRankConv2d
from burnish.nn.lowrank_linear import LowRankLinear

NOUN = "low-rank"
#: what an automatic rank's time may be of the dense layer's
_MARGIN = 0.9
#: ranks that are multiples of this suit the kernels' tiles; so many of them are candidates at most
_STEP, _CANDIDATES = 8, 64

_found: dict[Any, int | None] = {}


def candidate(module: torch.nn.Module) -> bool:
    """Whether a rule speaks of this module: a float linear layer or 2-d convolution."""
    return linear.is_candidate(module) or isinstance(module, torch.nn.Conv2d)


def objection(module: torch.nn.Module, parents: list[torch.nn.Module]) -> str | None:
    """Why a layer cannot become a low-rank one; None if it can."""
    reason = linear.objection(module, parents, NOUN)
    if reason is None and not _weight(module).numel():
        return "it has no inputs"
    return reason


def convert(request: Request) -> torch.nn.Module:
    module, config = request.module, request.config
    assert isinstance(config, LowRank)
    rank = _automatic(request, config) if config.rank == "auto" else config.rank
    if isinstance(rank, int):
        check_rank("rank", rank, _limit(module, config))
        _check_smaller(module, config, rank)
    fixed = config if rank is None else replace(config, rank=rank)
    cls = LowRankConv2d if isinstance(module, torch.nn.Conv2d) else LowRankLinear
    made = cls.from_float(module, fixed, moment=request.moment)
    _check_smaller(module, config, made.rank)
    made.config = config
    return made


def _weight(module: torch.nn.Module) -> torch.Tensor:
    weight = module.weight if isinstance(module, torch.nn.Conv2d) else float_weight(module)
    assert weight is not None
    return weight


def _limit(module: torch.nn.Module, config: LowRank) -> int:
    """The largest rank there is."""
    weight = _weight(module)
    return (
        schemes.limit(config.conv, weight.shape, module.groups)
        if isinstance(module, torch.nn.Conv2d)
        else min(weight.shape)
    )


def _size(module: torch.nn.Module, config: LowRank, rank: int) -> int:
    """The weights of the factors at a rank."""
    weight = _weight(module)
    if isinstance(module, torch.nn.Conv2d):
        factors: Sequence[Sequence[int]] = schemes.shapes(config.conv, weight.shape, module.groups, rank)
        return sum(torch.Size(shape).numel() for shape in factors)
    return rank * sum(weight.shape)


def _check_smaller(module: torch.nn.Module, config: LowRank, rank: int) -> None:
    factors, dense = _size(module, config, rank), _weight(module).numel()
    if factors >= dense:
        more = "as many weights as" if factors == dense else "more weights than"
        raise Kept(f"rank {rank} has {more} the dense layer: {factors} and {dense}")


def _automatic(request: Request, config: LowRank) -> int:
    """The largest candidate that is faster than the layer."""
    module, shape = request.module, request.shape
    weight = _weight(module)
    if shape is None:
        raise ValueError(
            "LowRankLinear.from_float: rank is 'auto', which needs measurements: give swap_ measure=, with an example "
            "that reaches this layer"
        )
    if weight.is_meta:
        raise ValueError("LowRankLinear.from_float: rank is 'auto' and the layer is on the meta device")
    key = (repr(module), shape, weight.dtype, weight.device, config.conv, torch.get_num_threads())
    if key not in _found:
        _found[key] = _largest(request, config, shape)
    rank = _found[key]
    if rank is None:
        unit = "images" if isinstance(module, torch.nn.Conv2d) else "rows"
        raise Kept(f"no rank with fewer weights is faster than the dense layer at {shape[0]} {unit}")
    return rank


def _largest(request: Request, config: LowRank, shape: tuple[int, ...]) -> int | None:
    candidates = _candidates(request.module, config)
    low, high = 0, len(candidates)  # those below low are faster, those from high on are not
    while low < high:
        middle = (low + high) // 2
        if _faster(request.module, config, candidates[middle], shape):
            low = middle + 1
        else:
            high = middle
    return candidates[low - 1] if low else None


def _candidates(module: torch.nn.Module, config: LowRank) -> Sequence[int]:
    dense = _weight(module).numel()
    top = next((r for r in range(_limit(module, config), 0, -1) if _size(module, config, r) < dense), 0)
    if top < _STEP:
        return range(1, top + 1)
    step = _STEP * -(-top // (_STEP * _CANDIDATES))
    return range(step, top + 1, step)


def _faster(module: torch.nn.Module, config: LowRank, rank: int, shape: tuple[int, ...]) -> bool:
    weight = _weight(module)
    made = _blank(module, rank, config.conv, weight.device)
    contest = measure.Contest(module.forward, made.forward, (rank,), shape, weight.dtype, weight.device)
    times = measure.times([contest])[0]
    return times.after_us <= _MARGIN * times.before_us


def _blank(
    module: torch.nn.Module, rank: int, scheme: str, device: torch.device | str
) -> LowRankLinear | LowRankConv2d:
    """A layer in the place of ``module``, of that rank, with values of its own."""
    weight, bias = _weight(module), module.bias is not None
    made: LowRankLinear | LowRankConv2d
    if isinstance(module, torch.nn.Conv2d):
        walk: dict[str, Any] = {name: getattr(module, name) for name in linear.WALK}
        made = LowRankConv2d(**walk, bias=bias, device=device, dtype=weight.dtype, rank=rank, scheme=scheme)
    else:
        made = LowRankLinear(weight.shape[1], weight.shape[0], bias, device, weight.dtype, rank=rank)
    return made.requires_grad_(weight.requires_grad)


def form(module: torch.nn.Module) -> dict[str, Any]:
    assert isinstance(module, LowRankLinear | LowRankConv2d)
    common = {"bias": module.bias is not None, "rank": module.rank}
    if isinstance(module, LowRankLinear):
        return {"in_features": module.in_features, "out_features": module.out_features, **common}
    return {**linear.walk_of(module), **common, "scheme": module.scheme}


def rebuild(found: torch.nn.Module, config: Config, form: Mapping[str, Any]) -> LowRankLinear | LowRankConv2d:
    assert isinstance(config, LowRank)
    if isinstance(found, torch.nn.Conv2d) != ("scheme" in form):
        was = "LowRankConv2d" if "scheme" in form else "LowRankLinear"
        raise Misfit(f"kind {type(found).__name__} in the model, {was} in the checkpoint")
    if isinstance(found, torch.nn.Conv2d):
        linear.check_walk(found, form)
    else:
        linear.check_form(found, form)
    made = _blank(found, form["rank"], form.get("scheme", config.conv), "meta")
    made.bias = found.bias  # type: ignore[assignment]
    made.config = config
    return made


LOWRANK = Kind(
    config=LowRank,
    noun=NOUN,
    made=(LowRankLinear, LowRankConv2d),
    candidate=candidate,
    objection=objection,
    convert=convert,
    weights=("A", "core", "B"),
    races=lambda module: True,
    form=form,
    rebuild=rebuild,
)
