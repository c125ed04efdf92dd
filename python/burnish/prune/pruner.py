"""The Pruner: which layers of a model get which masks, at which step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from burnish.calibration import Calibration, Inputs
from burnish.prune.criteria import Criterion, below
from burnish.prune.layers import absence, candidates, check_finite, matrix, owners, unmatrix
from burnish.prune.masking import attach, mask_of, parameter_of, refusal
from burnish.prune.patterns import Pattern, largest, pruned_of
from burnish.prune.schedules import OneShot, Schedule, check_sparsity
from burnish.rules import compile_pattern, near

FilterFn = Callable[[torch.nn.Module, str], bool]
_Decision = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class _Layer:
    module: torch.nn.Module
    sparsity: float


class Pruner:
    """Gives layers of a model masks, at once or, as it is trained, by and by.

        pruner = prune.Pruner(model, prune.Magnitude(), prune.Block(32), 0.9, schedule=prune.Gradual(0, 1000, 50))
        for batch in batches:
            ...
            optimizer.step()
            pruner.step()

    Nothing is done to the model before :meth:`step`. A weight that was zeroed stays zero at all later steps. Every rank
    of a DDP job calls it alike and gets the same masks; FSDP2's shards are refused: prune before sharding.

    Args:
        model: any nn.Module with linear or convolution layers; it may be one itself.
        criterion: ``Magnitude``, ``Wanda`` or ``SecondOrder``.
        pattern: ``Unstructured``, ``TwoFour`` or ``Block``.
        sparsity: the share of units to zero, in [0, 1); or a mapping from patterns over fqns (globs, or regular
            expressions after ``re:``, the first match decides) to shares, which leaves the other layers alone. For
            ``TwoFour``, which has one sparsity, it may be left out.
        scope: ``local``, each layer loses that share, or ``global``, all of them together, by one threshold over their
            units; that is for magnitudes.
        schedule: ``OneShot`` or ``Gradual``.
        calibration: what :func:`burnish.calibrate` found on this model, for criteria that look at inputs. A gradual
            schedule goes on with it as it is.
        filter_fn: asked ``(module, fqn)`` for each layer; false leaves it alone.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a sparsity outside its range, a combination that means nothing, a calibration that is missing or
            lacks a layer, no layers, or a layer that cannot be pruned: NaN or infinite weights, a mask that it has
            already, a shared, parametrized or sharded weight, one on meta, or with a single block.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        criterion: Criterion,
        pattern: Pattern,
        sparsity: float | Mapping[str, float] | None = None,
        *,
        scope: str = "local",
        schedule: Schedule | None = None,
        calibration: Calibration | None = None,
        filter_fn: FilterFn | None = None,
    ) -> None:
        schedule = OneShot() if schedule is None else schedule
        _check_types(model, criterion, pattern, schedule, calibration)
        _check_together(criterion, pattern, sparsity, scope, schedule)
        self.criterion, self.pattern, self.scope, self.schedule = criterion, pattern, scope, schedule
        self.steps = 0
        self._model, self._calibration = model, calibration
        self._layers = _selected(model, _shares(sparsity, pattern), filter_fn)
        owned = owners(model)
        for fqn, layer in self._layers.items():
            reason = refusal(layer.module, owned)
            if reason is not None:
                raise ValueError(f"Pruner: layer {fqn!r} cannot be pruned: {reason}")
            weight = matrix(layer.module, parameter_of(layer.module).detach())
            check_finite("Pruner", fqn, weight)
            nothing = pattern.nothing(*weight.shape)
            if nothing is not None:
                raise ValueError(f"Pruner: layer {fqn!r} cannot be pruned by {pattern}: {nothing}")
            self._inputs(fqn, weight)
            schedule.check(layer.sparsity)

    @property
    def layers(self) -> tuple[str, ...]:
        """The fqns of the layers that it prunes."""
        return tuple(self._layers)

    @property
    def finished(self) -> bool:
        """Whether the last masks are made."""
        return self.steps > self.schedule.last

    def step(self) -> bool:
        """Count one step, and make the masks that are due at it.

        Returns:
            Whether masks were made; :func:`burnish.prune.report` shows them.

        Raises:
            ValueError: a weight has become NaN or infinite, or was sharded, or its layer is not in the model any more,
                as after :func:`burnish.prune.finalize_`; the model and the count are as they were.
        """
        due = self.schedule.due(self.steps)
        if due:
            self._check_there()
            with torch.no_grad():
                self._apply(dict(self._decisions()))
        self.steps += 1
        return due

    def state_dict(self) -> dict[str, Any]:
        """What a job that is resumed needs beside the model's: the count of steps."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken. Make the Pruner first, and the optimizer if that was made before
        there were masks, which put a weight behind its bias in ``model.parameters()``; then load the model's masks and
        weights."""
        steps = state.get("steps") if isinstance(state, Mapping) else None
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0 or len(state) != 1:
            raise ValueError(f"Pruner.load_state_dict: state is {state!r}, expected {{'steps': a number}}")
        self.steps = steps

    def _inputs(self, fqn: str, weight: Tensor) -> Inputs | None:
        """What the calibration knows of a layer; None for criteria that do not ask."""
        if not self.criterion.looks_at_inputs:
            return None
        name = type(self.criterion).__name__
        if self._calibration is None:
            raise ValueError(
                f"Pruner: calibration is None and {name} looks at inputs, expected burnish.calibrate(model, batches)"
            )
        inputs = self._calibration.get(fqn)
        if inputs is None:
            raise ValueError(
                f"Pruner: calibration has nothing of layer {fqn!r}, which {name} needs: calibrate with batches that "
                "reach it, or leave it out with filter_fn"
            )
        K = weight.shape[1]
        groups = inputs.moment.numel() // max(1, K * K)
        if inputs.moment.shape[-2:] != (K, K) or weight.shape[0] % max(1, groups):
            raise ValueError(
                f"Pruner: calibration has a moment {tuple(inputs.moment.shape)} for layer {fqn!r}, expected {K} x {K} "
                "for its inputs: it is of another model"
            )
        if inputs.moment.device != weight.device:
            raise ValueError(
                f"Pruner: calibration is on {inputs.moment.device} and layer {fqn!r} on {weight.device}: call "
                f"calibration.to({str(weight.device)!r})"
            )
        return inputs

    def _check_there(self) -> None:
        """Raise ValueError if a layer is not in the model any more."""
        modules = dict(self._model.named_modules())
        for fqn, layer in self._layers.items():
            there = modules.get(fqn)
            if there is not layer.module:
                raise ValueError(
                    f"Pruner: layer {fqn!r} is a {type(there).__name__} now, not the layer that was there: after "
                    "finalize_, take the masks back with the report's revert(), or make a new Pruner for what is left"
                )

    def _decisions(self) -> Iterator[tuple[str, _Decision]]:
        """The new mask, and new values, of every layer as a matrix."""
        weights = {fqn: self._weight(fqn, layer.module) for fqn, layer in self._layers.items()}
        if self.scope == "global":
            yield from self._global(weights)
            return
        for fqn, layer in self._layers.items():
            weight, kept = weights[fqn]
            sparsity = self.schedule.sparsity(self.steps, layer.sparsity)
            mask, values = self.criterion.decide(weight, self._inputs(fqn, weight), self.pattern, sparsity, kept)
            yield fqn, (mask if kept is None else mask & kept, values)

    def _weight(self, fqn: str, module: torch.nn.Module) -> tuple[Tensor, Tensor | None]:
        """The layer's weight, zero where it is masked, and its mask so far."""
        if dict(self._model.named_modules()).get(fqn) is not module:
            raise ValueError(
                f"Pruner: layer {fqn!r} was exchanged or taken away since, expected the one that was there"
            )
        parameter, mask = parameter_of(module), mask_of(module)
        if type(parameter) is not torch.nn.Parameter:
            raise ValueError(
                f"Pruner: the weight of layer {fqn!r} is a {type(parameter).__name__} now, expected a plain parameter: "
                "prune before sharding"
            )
        weight = parameter if mask is None else torch.where(mask, parameter, 0)
        check_finite("Pruner", fqn, weight)
        return matrix(module, weight), None if mask is None else matrix(module, mask)

    def _global(self, weights: Mapping[str, tuple[Tensor, Tensor | None]]) -> Iterator[tuple[str, _Decision]]:
        """One threshold over the units of all layers."""
        units = {
            fqn: self.pattern.units(below(self.criterion.scores(weight, None), kept))
            for fqn, (weight, kept) in weights.items()
        }
        together = torch.cat([each.flatten() for each in units.values()])
        final = next(iter(self._layers.values())).sparsity
        pruned = pruned_of(len(together), self.schedule.sparsity(self.steps, final))
        parts = largest(together, pruned).split([each.numel() for each in units.values()])
        for (fqn, each), part in zip(units.items(), parts, strict=True):
            weight, kept = weights[fqn]
            mask = self.pattern.spread(part.view(each.shape), (weight.shape[0], weight.shape[1]))
            yield fqn, (mask if kept is None else mask & kept, None)

    def _apply(self, decisions: Mapping[str, _Decision]) -> None:
        """Put masks and values into the model."""
        new = {}
        for fqn, (mask, _) in decisions.items():
            module = self._layers[fqn].module
            shaped = unmatrix(module, mask, parameter_of(module).shape)
            if (has := mask_of(module)) is None:
                new[fqn] = (module, shaped.contiguous())
            else:
                has.copy_(shaped)
        attach(new)
        for fqn, (_, values) in decisions.items():
            if values is not None:
                module = self._layers[fqn].module
                parameter = parameter_of(module)
                parameter.copy_(unmatrix(module, values, parameter.shape))


def _check_types(model: Any, criterion: Any, pattern: Any, schedule: Any, calibration: Any) -> None:
    for name, value, kind, expected in (
        ("model", model, torch.nn.Module, "an nn.Module"),
        ("criterion", criterion, Criterion, "Magnitude(), Wanda() or SecondOrder()"),
        ("pattern", pattern, Pattern, "Unstructured(), TwoFour() or Block()"),
        ("schedule", schedule, Schedule, "OneShot() or Gradual()"),
        ("calibration", calibration, Calibration | None, "the result of burnish.calibrate"),
    ):
        if not isinstance(value, kind):
            got = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
            raise TypeError(f"Pruner: {name} is {got}, expected {expected}")


def _check_together(criterion: Criterion, pattern: Pattern, sparsity: Any, scope: Any, schedule: Schedule) -> None:
    """Raise ValueError for arguments that mean nothing together."""
    if scope not in ("local", "global"):
        raise ValueError(f"Pruner: scope is {scope!r}, expected 'local' or 'global'")
    if scope == "global" and not criterion.comparable:
        raise ValueError(
            f"Pruner: scope is 'global' and {type(criterion).__name__} says what a weight does to its own layer's "
            "output, which no threshold compares between layers: use 'local', or Magnitude"
        )
    if scope == "global" and pattern.fixed is not None:
        raise ValueError(
            f"Pruner: scope is 'global' and {pattern} takes {pattern.fixed} of every layer: nothing is left to compare"
        )
    if scope == "global" and isinstance(sparsity, Mapping):
        raise ValueError("Pruner: scope is 'global' and sparsity a mapping, expected one share for all layers")
    if pattern.fixed is not None and not isinstance(schedule, OneShot):
        raise ValueError(
            f"Pruner: {pattern} has one sparsity, {pattern.fixed}, which no schedule can raise: use OneShot()"
        )


def _shares(sparsity: Any, pattern: Pattern) -> dict[str, float]:
    """The shares by patterns over fqns."""
    if sparsity is None:
        if pattern.fixed is None:
            raise TypeError(f"Pruner: sparsity is missing, expected a share of zeros in [0, 1) for {pattern}")
        sparsity = pattern.fixed
    rules = sparsity if isinstance(sparsity, Mapping) else {"*": sparsity}
    if not rules:
        raise ValueError("Pruner: sparsity is an empty mapping, expected at least one pattern")
    for key, share in rules.items():
        if not isinstance(key, str):
            raise TypeError(f"Pruner: sparsity has the key {key!r}, expected a glob or 're:' and an expression")
        name = f"sparsity of {key!r}" if isinstance(sparsity, Mapping) else "sparsity"
        check_sparsity("Pruner", name, share)
        if pattern.fixed is not None and share != pattern.fixed:
            raise ValueError(f"Pruner: {name} is {share}, and {pattern} has {pattern.fixed} alone")
    return dict(rules)


def _selected(model: torch.nn.Module, shares: Mapping[str, float], filter_fn: FilterFn | None) -> dict[str, _Layer]:
    """The layers that a pattern matches and filter_fn accepts."""
    found = candidates(model)
    if not found:
        raise ValueError(f"Pruner: {absence(model)}")
    compiled = {}
    for pattern in shares:
        try:
            compiled[pattern] = compile_pattern(pattern)
        except re.error as error:
            raise ValueError(f"Pruner: sparsity of {pattern!r}: not a regular expression: {error}") from None
    decided = {fqn: next((key for key, regex in compiled.items() if regex.fullmatch(fqn)), None) for fqn in found}
    for pattern in shares:
        if pattern not in decided.values():
            matched = any(compiled[pattern].fullmatch(fqn) for fqn in found)
            hint = (
                "those it matches are decided by patterns before it"
                if matched
                else f"layers that come near: {', '.join(near(pattern, list(found)))}"
            )
            raise ValueError(f"Pruner: sparsity of {pattern!r} decides no layer; {hint}")
    layers = {
        fqn: _Layer(found[fqn], float(shares[key]))
        for fqn, key in decided.items()
        if key is not None and (filter_fn is None or filter_fn(found[fqn], fqn))
    }
    if not layers:
        raise ValueError(f"Pruner: filter_fn accepts none of {len(found)} layers")
    return layers
