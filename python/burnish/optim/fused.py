"""What burnish's optimizers share: a step is checked as a whole, then done by one call of an op a kind of parameter.

A step reads the gradients once for their norm, if ``max_grad_norm`` is set, and then parameters, gradients and state
once for everything else. It waits for no device. Parameters without a gradient are left alone; options, gradients,
masks and states are checked before anything is written, and what is refused leaves parameters and state as they were,
in every group. State follows a parameter whose memory format has changed, as torch.optim's does, but for int8 moments.

With torch.amp.GradScaler, ``scaler.step(optimizer)`` hands its scale and what it found to the step, which unscales, or
changes nothing at all. The norm is of the unscaled gradients. Gradients may have been unscaled before, by
``scaler.unscale_(optimizer)``.

DTensors (FSDP2, tensor parallelism) are stepped shard by shard; the norm is taken over all of their mesh. The state of
each parameter is made at its first step, as by torch.optim; :mod:`burnish.optim.state` says what it is and how state
dicts load. ``foreach`` and ``fused`` are accepted for torch.optim's sake and choose nothing: every step is fused. Under
torch.compile a step is a call that the compiler does not look into.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from operator import attrgetter, is_, itemgetter
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from burnish import native
from burnish.kept_lists import References
from burnish.optim import norm, options, tensors
from burnish.optim.batch import Batch, Columns, next_seed
from burnish.optim.masks import Masks
from burnish.optim.state import Entry, Moment, complete, entries, fits, loaded, local_scales, of_kind, refitted

_dtype, _grad = map(attrgetter, ("dtype", "grad"))
_F = TypeVar("_F", bound=Callable[..., Any])


def _not_compiled(function: _F) -> _F:
    """torch.optim's own way to stay out of compiled code: torch.compiler.disable would import the compiler here."""
    kept: _F = torch._disable_dynamo(function)  # type: ignore[attr-defined, assignment]
    return kept


class FusedOptimizer(torch.optim.Optimizer):
    """The base of burnish's optimizers.

    A subclass has ``required``, the options without which a state dict is of another optimizer, ``fixed``, those that
    must be its own, ``moments(group)``, ``check_group(group)`` and ``update(...)``, which calls the op; ``optional``,
    moments that come after the others and with an option; and where its state is not what torch.optim's is,
    ``adopted(values)``.
    """

    required: ClassVar[tuple[str, ...]]
    fixed: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[Moment, ...]] = ()
    _step_supports_amp_scaling = True

    def __init__(self, params: Any, defaults: dict[str, Any], extras: options.Extras) -> None:
        defaults = defaults | options.with_defaults(self._who, extras)
        self.check_group(defaults)
        options.check_alike(defaults)
        self._built = False
        super().__init__(params, defaults)
        self._check_memory()
        self._built, self._swapped, self._references = True, False, References()
        self._masks = Masks(self._who, self.param_groups, extras.get("masks"))

    @property
    def _who(self) -> str:
        return type(self).__name__

    def moments(self, group: Mapping[str, Any]) -> tuple[Moment, ...]:
        """The moments that the state of a parameter in ``group`` has."""
        raise NotImplementedError

    def held_moments(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[Moment, ...]:
        """The moments that ``state`` has or should: also those of options that are off since."""
        own = self.moments(group)
        return own + tuple(moment for moment in self.optional if moment not in own and moment.name in state)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError where an option of a group is not allowed."""
        options.check_rate(group)
        options.check_extras(self._who, group)

    def update(self, batch: Batch, state: Columns, common: dict[str, Any]) -> None:
        """Step the parameters of ``batch``; ``common`` are the arguments that every step op has by keyword."""
        raise NotImplementedError

    def adopted(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """What torch.optim keeps of a parameter, as it is kept here."""
        return values

    @property
    def masks(self) -> Mapping[Tensor, Tensor]:
        """The mask of each parameter that has one; assign a mapping as the constructor takes it to put others there."""
        return self._masks.of

    @masks.setter
    def masks(self, masks: Mapping[Any, Tensor] | None) -> None:
        self._masks = Masks(self._who, self.param_groups, masks)

    @_not_compiled
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own where it names them.

        Raises:
            TypeError, ValueError: as torch.optim; and where an option is not allowed, a parameter comes twice, shares
                memory with another, or is of a kind that cannot be stepped. The optimizer is as it was.
        """
        if isinstance(param_group, dict) and self.param_groups:
            param_group.setdefault("max_grad_norm", self.param_groups[0]["max_grad_norm"])
        super().add_param_group(param_group)
        try:
            self._check_added(param_group, len(self.param_groups) - 1)
        except BaseException:
            self.param_groups.pop()
            raise

    def _check_added(self, group: Mapping[str, Any], number: int) -> None:
        self.check_group(group)
        if "masks" in group:
            raise ValueError(
                f"{self._who}: group {number} has masks, which are of all groups together: pass them to the "
                "constructor, or assign optimizer.masks"
            )
        if len(set(group["params"])) != len(group["params"]):
            raise ValueError(f"{self._who}: a parameter comes twice in group {number}")
        if group["max_grad_norm"] != self.param_groups[0]["max_grad_norm"]:
            raise ValueError(f"{self._who}: max_grad_norm is of all groups together, but group {number} has its own")
        for place, parameter in enumerate(group["params"]):
            reason = tensors.objection(parameter) if parameter.requires_grad else None
            if reason:
                raise ValueError(f"{self._who}: {tensors.name_of(group, number, place)} {reason}")
        if self._built:
            self._check_memory()

    def _check_memory(self) -> None:
        name = tensors.overlapping(tensors.named(self.param_groups))
        if name is not None:
            raise ValueError(f"{self._who}: {name} shares memory with another parameter")

    @_not_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step; returns what ``closure``, which computes the gradients anew, returns.

        Raises:
            ValueError: an option that is not allowed.
            RuntimeError: a gradient or a state that does not go with its parameter, or parameters that averages stand
                in for.
        """
        self._check_stand("step")
        try:
            return self._step(closure)
        except BaseException:
            for name in ("grad_scale", "found_inf"):  # GradScaler takes them back after a step alone
                self.__dict__.pop(name, None)
            raise

    def _check_stand(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(f"{self._who}: {what} inside swap_ema(), where averages stand in the parameters' place")

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
            self._check_stand("step")
        for group in self.param_groups:
            self.check_group(group)
        known = self._known()
        work = known or self._all()
        try:
            self._run(work)
        except RuntimeError:
            if not known:
                raise
            work = self._all()  # raises, naming the parameter, where a gradient is what an op refused
            self._run(work)
        for group in self.param_groups if work else ():
            if group["stochastic_rounding"]:
                group["seed"] = next_seed(group["seed"])
        return result

    def _run(self, work: Sequence[tuple[Batch, Columns]]) -> None:
        """Step batches. On a CPU all of them are checked before one is written; of others the first is."""
        if not work:
            return
        scaling = norm.Scaling.of(self, [batch for batch, _ in work])
        waits = len(work) > 1 and any(batch.device.type == "cpu" for batch, _ in work) and not native.lacks("burnish")
        with _held() if waits else contextlib.nullcontext():
            for batch, state in work:
                self.update(batch, state, batch.arguments(state, scaling))

    def _known(self) -> list[tuple[Batch, Columns]]:
        """The groups, each as one batch, where they have all of their state; nothing where there is more to be seen.

        Their tensors are not looked at one by one: the ops do so, and nobody has written before.
        """
        groups = [(number, group) for number, group in enumerate(self.param_groups) if group["params"]]
        whole = (
            not self._masks.of
            and len(self.state) == sum(len(group["params"]) for _, group in groups)
            and len({group["max_grad_norm"] for _, group in groups}) == 1
            and (len(groups) == 1 or all(group["params"][0].device.type == "cpu" for _, group in groups))
        )
        owners, states = iter(self.state), iter(self.state.values())
        found = []
        try:
            for number, group in groups if whole else ():
                params = group["params"]
                grads = list(map(_grad, params))
                if not all(map(is_, params, owners)) or not _alike(group, grads):
                    return []
                found.append((number, group, grads, self._known_columns(group, list(islice(states, len(params))))))
            return self._kept(found)
        except (KeyError, AttributeError, RuntimeError):
            return []

    def _known_columns(self, group: Mapping[str, Any], states: list[dict[str, Tensor]]) -> Columns:
        """The state of all parameters of a group by entry; KeyError where one is not there, or is left over."""
        names = entries(group["params"][0], group, self.moments(group))
        if set(map(len, states)) != {len(names)} or not of_kind(states[0], names):
            raise KeyError
        return {name: list(map(itemgetter(name), states)) for name in names}

    def _kept(self, found: Sequence[tuple[int, dict[str, Any], list[Tensor], Columns]]) -> list[tuple[Batch, Columns]]:
        """Batches of groups, their numbers, gradients and states, with the lists that C++ keeps from step to step."""
        columns = {(number, name): column for number, _, _, state in found for name, column in state.items()}
        if not torch.__future__.get_swap_module_params_on_conversion():  # of no parameter that C++ refers to
            columns |= {(number, "params"): group["params"] for number, group, _, _ in found}
        kept = self._references.hold(columns)
        work = []
        for number, group, grads, state in found:
            params = group["params"]
            batch = Batch(group, params, kept.get((number, "params"), params), grads, [], number)
            work.append((batch, {name: kept[number, name] for name in state}))
        return work

    def _all(self) -> list[tuple[Batch, Columns]]:
        """What is to be stepped, with its state."""
        return [(batch, self._columns(batch)) for batch in self._batches()]

    def _batches(self) -> list[Batch]:
        """What is to be stepped, all of it checked."""
        if len({group["max_grad_norm"] for group in self.param_groups}) > 1:
            raise RuntimeError(f"{self._who}: max_grad_norm is of all groups together, but they differ in it")
        batches: list[Batch] = []
        for number, group in enumerate(self.param_groups):
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            grads = [parameter.grad for parameter in params]
            if group.get("capturable") and any(parameter.device.type == "cpu" for parameter in params):
                raise RuntimeError("If capturable=True, params and state_steps must be on supported devices: ['cuda'].")
            if not self._masks.of and tensors.plain(params, grads):
                batches.append(Batch(group, params, params, grads, [], number))
            else:
                batches += self._split(number, group, params, grads)
        return batches

    def _split(self, number: int, group: Mapping[str, Any], params: list[Any], grads: list[Any]) -> Iterator[Batch]:
        """The batches of a group whose parameters are not all of one kind, or have to be looked at one by one."""
        kinds: dict[Any, list[int]] = {}
        for i, (parameter, grad) in enumerate(zip(params, grads, strict=True)):
            reason = (
                tensors.objection(parameter)
                or tensors.refusal(parameter, grad, self._who)
                or self._masks.objection(parameter)
            )
            if reason:
                place = next(place for place, other in enumerate(group["params"]) if other is parameter)
                raise RuntimeError(f"{self._who}: {tensors.name_of(group, number, place)} {reason}")
            mesh = (parameter.device_mesh, parameter.placements) if tensors.is_sharded(parameter) else None
            kinds.setdefault((parameter.dtype, parameter.device, parameter in self._masks.of, mesh), []).append(i)
        for kind, ((_, _, masked, _), members) in enumerate(kinds.items()):
            origin = [params[i] for i in members]
            yield Batch(
                group,
                origin,
                [tensors.local(parameter) for parameter in origin],
                [tensors.in_order_of(tensors.local(params[i]), tensors.local(grads[i])) for i in members],
                [self._masks.local(parameter) for parameter in origin] if masked else [],
                number + len(self.param_groups) * kind,
            )

    def _columns(self, batch: Batch) -> Columns:
        """The state of a batch by entry, made where it is not there yet."""
        moments = self.moments(batch.group)
        wanted: dict[str, Entry] = entries(batch.origin[0], batch.group, moments)
        states = [self.state[parameter] for parameter in batch.origin]
        for parameter, state in zip(batch.origin, states, strict=True):
            if "master" not in wanted:
                state.pop("master", None)  # the step leaves it behind
            if not wanted.keys() <= state.keys():
                complete(state, parameter, entries(parameter, batch.group, moments))
        if not fits(states, wanted, batch.origin):
            self._refit(batch, states)
        columns = {name: [state[name] for state in states] for name in wanted}
        for name, column in columns.items():
            if name == "scales":
                held = [len(self.held_moments(batch.group, state)) for state in states]
                rows = zip(batch.origin, column, held, strict=True)
                columns[name] = [local_scales(one, scales, len(moments), kept) for one, scales, kept in rows]
            elif tensors.is_sharded(batch.origin[0]):
                columns[name] = list(map(tensors.local, column))
        return columns

    def _refit(self, batch: Batch, states: Sequence[dict[str, Tensor]]) -> None:
        """Lay states out as their parameters are since; raise, naming the parameter, where one does not fit."""
        names = {id(parameter): name for name, parameter in tensors.named(self.param_groups)}
        fitting = []
        for parameter, state in zip(batch.origin, states, strict=True):
            who = f"{self._who}: state of {names[id(parameter)]}"
            fitting.append(refitted(who, parameter, state, entries(parameter, batch.group, self.moments(batch.group))))
        for state, values in zip(states, fitting, strict=True):
            state.update(values)

    @contextlib.contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Inside, every parameter that has an average is that average, rounded to its dtype; after, what it was before.

        A model that is swapped or finalized inside shares parameters with the original, biases for one, which go back:
        swap a ``copy.deepcopy`` that was made inside.

        Raises:
            RuntimeError: no group has an ``ema_decay``, or the averages stand there already; after, a parameter has
                changed its shape, and is not what it was.
        """
        if all(group["ema_decay"] is None for group in self.param_groups):
            raise RuntimeError(f"{self._who}: swap_ema() without averages, expected a group with ema_decay")
        if self._swapped:
            raise RuntimeError(f"{self._who}: swap_ema() inside swap_ema()")
        averages = {parameter: state["ema"] for parameter, state in self.state.items() if "ema" in state}
        self._swapped = True
        try:
            with tensors.stand_in(self._who, averages):
                yield
        finally:
            self._swapped = False

    @_not_compiled
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state and the options of a state dict, of this optimizer or of its twin in torch.optim.

        Raises:
            ValueError: of another optimizer, of a newer version, or with entries that are missing, unknown or do not go
                with the parameters. The optimizer is as it was.
            RuntimeError: inside ``swap_ema()``.
        """
        self._check_stand("load_state_dict")
        state_dict = state_dict.copy() if isinstance(state_dict, dict) else state_dict
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        groups, state = loaded(self._who, self.param_groups, state_dict, self)
        self.__setstate__({"state": state, "param_groups": groups, "_references": References()})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        self._check_stand("a copy")
        made = {"_built": True, "_swapped": False, "_references": References()}
        return super().__getstate__() | {"_masks": self._masks} | made


def _alike(group: Mapping[str, Any], grads: Sequence[Any]) -> bool:
    """Whether the parameters of a group can be one batch, by their types and dtypes; ``grads`` are their gradients."""
    params = group["params"]
    return (
        {*map(type, params), *map(type, grads)} == {torch.nn.Parameter, Tensor}
        and (not (group["stochastic_rounding"] or group["master_weights"]) or len(set(map(_dtype, params))) == 1)
        and not (group.get("capturable") and params[0].device.type == "cpu")
    )


@contextlib.contextmanager
def _held() -> Iterator[None]:
    """Steps of a CPU that are asked for inside are checked at once, and done afterwards; none, where one is refused."""
    torch.ops.burnish.hold_steps()
    try:
        yield
    except BaseException:
        torch.ops.burnish.release_steps(False)
        raise
    torch.ops.burnish.release_steps(True)
