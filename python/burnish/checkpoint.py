"""Save a model with swapped layers, and load it into a freshly built one.

    burnish.save(model, "dir/")
    model = burnish.load(build_model, "dir/")      # or load(model, "dir/"), into a model that exists

The folder holds ``burnish.json`` and one safetensors file that it names. The file has the model's ``state_dict``, plain
tensors in canonical form, each shared one once, so any safetensors reader can open it and a checkpoint made on one kind
of machine loads on every other. Buffers that a model makes for itself and does not keep in its ``state_dict`` are not
in the file. The JSON has the recipe:

=========  ===========================================================================================
format     1; a newer one is refused
burnish    the version that wrote it
layers     fqn -> kind, configuration, sizes and fused activation of each swapped layer
fused      fqn -> activation, and the layer that computes it
tied       key -> the key that holds the same tensor
payload    file, SHA-256 and size of the safetensors file
checksum   SHA-256 of the above
=========  ===========================================================================================

Loading builds the swapped layers where the recipe has them; the model it is given may be the float one, on any device
or on meta. What torch.compile wrapped has the names of the model itself. Dtypes are those that were saved. Nothing is
pickled. Files are written as :mod:`burnish.durable` says.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from burnish import configs, durable, fuse, kinds
from burnish.errors import CheckpointError
from burnish.nn import Fused
from burnish.prune.masking import mask_keys
from burnish.report import Slot
from burnish.swap import adopt

FORMAT = 1
RECIPE = "burnish.json"


def save(model: torch.nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model into the folder ``path``, which is made if needed. A checkpoint that is there is replaced in one
    step: whenever the process dies, the folder loads as the old one or as the new one.

    Raises:
        TypeError: not a module.
        CheckpointError: something in the model's state is no plain tensor with data, or the disk does not take it; what
            was in the folder still is.
    """
    import safetensors

    from burnish import __version__

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"save: model is a {type(model).__name__}, expected an nn.Module")
    folder, model = Path(path), _uncompiled(model)
    tensors, tied = _distinct(model.state_dict())
    recipe = {"format": FORMAT, "burnish": __version__, **_recipe(model), "tied": tied}
    specs = {}
    for key, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        try:
            specs[key] = safetensors.TensorSpec(
                dtype=dtype, shape=list(tensor.shape), data_ptr=tensor.data_ptr(), data_len=tensor.nbytes
            )
        except safetensors.SafetensorError:
            raise CheckpointError(f"save: {key!r} is {dtype}, which safetensors has no format for") from None
    try:
        durable.commit(folder, RECIPE, recipe, lambda file: safetensors.serialize_file(specs, str(file), None))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"save: {folder} cannot be written: {error}") from error


def _distinct(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors to write, on the CPU and contiguous, each once, and key -> key for those that share."""
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for key, value in state.items():
        _check_plain(key, value)
        if value.numel():
            place = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
            holder = first.setdefault(place, key)
            if holder != key:
                tied[key] = holder
                continue
        tensors[key] = value.detach().cpu().contiguous()
    return tensors, tied


def _check_plain(key: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"save: state {key!r} is a {type(value).__name__}, expected tensors only")
    if type(value) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise CheckpointError(
            f"save: {key!r} is a {type(value).__name__}, expected a plain tensor: gather shards or unwrap it first"
        )
    if value.is_meta:
        raise CheckpointError(f"save: {key!r} is on the meta device and has no data")
    if value.layout != torch.strided or value.is_quantized:
        raise CheckpointError(f"save: {key!r} is not a dense tensor")


def _recipe(model: torch.nn.Module) -> dict[str, Any]:
    layers: dict[str, Any] = {}
    fused: dict[str, Any] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        kind = kinds.made_by(module)
        if kind is not None:
            layers[fqn] = {"kind": type(module).__name__, "config": module.config.to_dict(), **kind.form(module)}
        elif isinstance(module, Fused):
            fused[fqn] = {"activation": module.activation, "into": module.into}
    return {"layers": layers, "fused": fused}


def load(
    model: torch.nn.Module | Callable[[], torch.nn.Module],
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
) -> torch.nn.Module:
    """Load the checkpoint in the folder ``path`` and return the model.

    Args:
        model: a model built as the saved one was before its swap (or one swapped in the same way), or a function that
            builds it. A model is changed in place; its parameters stay the same objects unless they were on meta.
        path: the folder that :func:`save` wrote.
        device: where the tensors go; None for where the model has them now, and the CPU for those on meta.

    Raises:
        TypeError: not a module, nor a function that returns one.
        CheckpointError: the files are missing, damaged or newer, or do not belong to this model. Nothing was loaded:
            the model is as it was.
    """
    folder = Path(path)
    with durable.reading(folder), ExitStack() as undo:
        recipe = durable.read(folder, RECIPE)
        version = recipe.get("format")
        if not isinstance(version, int) or version < 1 or version > FORMAT:
            raise CheckpointError(
                f"load: {folder / RECIPE} has format {version!r}, written by burnish {recipe.get('burnish')}; this "
                f"burnish reads up to format {FORMAT}"
            )
        given = _model(model)
        model = _uncompiled(given)
        undo.callback(_unfreeze, [parameter for parameter in model.parameters() if parameter.requires_grad])
        try:
            tensors = _plain(_read_tensors(durable.checked_payload(folder, recipe["payload"]), recipe["tied"]))
            slots = _slots(model, _plain(recipe["layers"]), _plain(recipe["fused"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"load: {folder / RECIPE} is malformed: {error!r}") from error
        _fill(model, slots, tensors, device, undo)
        undo.pop_all()
    return given


def _uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """The model that torch.compile wrapped: a checkpoint has its names."""
    wrapped = model._modules.get("_orig_mod")
    return model if wrapped is None else wrapped


def _plain(named: Mapping[str, Any]) -> dict[str, Any]:
    """By the names of the model that torch.compile wrapped, whose wrapper's the first checkpoints had."""
    return {name.removeprefix("_orig_mod."): value for name, value in named.items()}


def _model(given: Any) -> torch.nn.Module:
    made = given() if callable(given) and not isinstance(given, torch.nn.Module) else given
    if not isinstance(made, torch.nn.Module):
        raise TypeError(f"load: model is a {type(made).__name__}, expected an nn.Module or a function that makes one")
    return made


def _read_tensors(payload: Path, tied: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The tensors by key; tied keys give the same object."""
    import safetensors

    try:
        # read, not mapped: a mapped tensor would change or crash when the file does
        with safetensors.safe_open(payload, framework="pt", backend="pread") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"load: {payload} cannot be read: {error}") from error
    return {**tensors, **{key: tensors[holder] for key, holder in tied.items()}}


def _slots(model: torch.nn.Module, layers: Mapping[str, Any], fused: Mapping[str, Any]) -> list[Slot]:
    """What has to be exchanged to make the model as it was saved; empty for a model that is so already."""
    slots: list[Slot] = []
    built: dict[tuple[int, str], torch.nn.Module] = {}
    new: dict[str, torch.nn.Module] = {}
    for fqn, entry in layers.items():
        slot = _place(model, fqn, new)
        new[fqn] = built.setdefault((id(slot.before), entry["kind"]), _built(slot.before, fqn, entry))
        slots.append(_exchanged(slot, new[fqn]))
    for fqn, entry in fused.items():
        slot = _place(model, fqn, new)
        found = slot.before
        name = found.activation if isinstance(found, Fused) else fuse.activation_name(found)
        if name != entry["activation"]:
            raise CheckpointError(
                f"load: the checkpoint has fused a {entry['activation']} at {fqn!r}, the model has "
                f"{type(found).__name__} there"
            )
        stand_in = (
            found if isinstance(found, Fused) else Fused(entry["activation"], entry["into"]).train(found.training)
        )
        slots.append(_exchanged(slot, stand_in))
    for fqn, module in model.named_modules(remove_duplicate=False):
        if (isinstance(module, Fused) or kinds.made_by(module)) and fqn not in layers and fqn not in fused:
            raise CheckpointError(
                f"load: the model has {type(module).__name__} at {fqn!r}, the checkpoint has a layer there that was "
                "not swapped"
            )
    return [slot for slot in slots if slot.before is not slot.after]


def _place(model: torch.nn.Module, fqn: str, new: Mapping[str, torch.nn.Module]) -> Slot:
    """Where a layer goes; ``new`` are the layers that will be there by then, and may hold this one."""
    parent_fqn, _, child = fqn.rpartition(".")
    try:
        parent, at = model, ""
        for name in parent_fqn.split(".") if parent_fqn else ():
            at = f"{at}.{name}" if at else name
            parent = new.get(at) or parent.get_submodule(name)
        found = parent.get_submodule(child)
    except AttributeError:
        raise CheckpointError(f"load: the checkpoint has a layer at {fqn!r}, the model has none there") from None
    return Slot(parent, child, fqn, found, found)


def _exchanged(slot: Slot, after: torch.nn.Module) -> Slot:
    return Slot(slot.parent, slot.child, slot.fqn, slot.before, after)


def _built(found: torch.nn.Module, fqn: str, entry: Mapping[str, Any]) -> torch.nn.Module:
    """The layer that the recipe has at ``fqn``, without values: what the model has there, if that is it."""
    name = entry["kind"]
    kind = kinds.named(name)
    if kind is None:
        raise CheckpointError(f"load: {fqn!r} is a {name}, which this burnish does not know")
    config = configs.from_dict(entry["config"])
    form = {key: value for key, value in entry.items() if key not in ("kind", "config")}
    if type(found) in kind.made:
        has = {"kind": type(found).__name__, **kind.form(found)}
        for key, value in {"kind": name, **form}.items():
            if has[key] != value:
                raise CheckpointError(f"load: {fqn!r} has {key} {has[key]} in the model, {value} in the checkpoint")
        return found
    if not kind.candidate(found):
        raise CheckpointError(f"load: the checkpoint has {name} at {fqn!r}, the model a {type(found).__name__}")
    reason = kind.objection(found, [])
    if reason or not fqn:
        raise CheckpointError(f"load: {fqn!r} cannot be exchanged: {reason or 'it is the model itself'}")
    try:
        made = kind.rebuild(found, config, form)
    except kinds.Misfit as error:
        raise CheckpointError(f"load: {fqn!r} has {error}") from error
    adopt(made, found)
    return made.train(found.training)


def _fill(
    model: torch.nn.Module,
    slots: list[Slot],
    tensors: dict[str, torch.Tensor],
    device: torch.device | str | None,
    undo: ExitStack,
) -> None:
    """Exchange the layers and give the model its tensors; ``undo`` learns how to take each step back."""
    homes = {
        name: tensor.device
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
    }
    for slot in slots:
        tensor = next(iter((*slot.before.parameters(), *slot.before.buffers())), None)
        homes.update({} if tensor is None else {slot.fqn: tensor.device})
        undo.callback(slot.put, slot.before)
        slot.put(slot.after)
    before: dict[tuple[torch.nn.Module, str], torch.nn.Parameter] = {}
    for module in model.modules():
        undo.callback(_restore, module, dict(module._parameters), dict(module._buffers), getattr(module, "dtype", None))
        before.update({(module, name): tensor for name, tensor in module._parameters.items() if tensor is not None})
    _check_masks(mask_keys(tensors), mask_keys(model.state_dict()))
    placed = _placed(model, tensors, homes, device)
    try:
        model.load_state_dict(placed, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"load: the checkpoint is of another model. {error}") from error
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CheckpointError(
                f"load: {name!r} is not in the checkpoint and has no value: build the model on a real device"
            )
    _keep_identity(before, undo)


def _check_masks(saved: Mapping[str, str], has: Mapping[str, str]) -> None:
    """Raise where the checkpoint has a mask and the model none, or the other way round; both are fqn -> key."""
    lacking = [fqn for fqn, key in saved.items() if has.get(fqn) != key]
    if lacking:
        theirs = saved[lacking[0]].endswith("weight_mask")
        how = "torch.nn.utils.prune.identity" if theirs else "burnish.prune.mask_"
        raise CheckpointError(
            f"load: the checkpoint was saved with masks on the weights of {_some(lacking)}, the model has none there: "
            f"put masks of any values on them first ({how}), or save again after burnish.prune.finalize_"
        )
    over = [fqn for fqn in has if fqn not in saved]
    if over:
        raise CheckpointError(
            f"load: the model has masks on the weights of {_some(over)}, the checkpoint none: take them off first "
            "(burnish.prune.remove_)"
        )


def _some(fqns: list[str]) -> str:
    more = f" and {len(fqns) - 3} more" if len(fqns) > 3 else ""
    return ", ".join(map(repr, fqns[:3])) + more


def _unfreeze(parameters: list[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)


def _restore(
    module: torch.nn.Module, parameters: dict[str, Any], buffers: dict[str, Any], dtype: torch.dtype | None
) -> None:
    module._parameters.clear()
    module._parameters.update(parameters)
    module._buffers.clear()
    module._buffers.update(buffers)
    if "dtype" in vars(module):
        vars(module)["dtype"] = dtype


def _placed(
    model: torch.nn.Module,
    tensors: dict[str, torch.Tensor],
    homes: Mapping[str, torch.device],
    device: torch.device | str | None,
) -> dict[str, torch.Tensor]:
    """The tensors on their devices, as parameters where the model has parameters; one object for what is shared."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owner: dict[int, str] = {}
    for name, parameter in parameters.items():
        first = owner.setdefault(id(parameter), name)
        if first != name and name in tensors and first in tensors and tensors[first] is not tensors[name]:
            if not torch.equal(tensors[first], tensors[name]):
                raise CheckpointError(
                    f"load: the model ties {first!r} and {name!r}, the checkpoint has two values: untie them in the "
                    "model first"
                )
            tensors[name] = tensors[first]
    placed: dict[str, torch.Tensor] = {}
    made: dict[Any, torch.Tensor] = {}
    for key, tensor in tensors.items():
        home = torch.device(device) if device is not None else _home(key, homes)
        known = (id(tensor), home, key in parameters)
        if known not in made:
            moved = tensor.to(home)
            made[known] = torch.nn.Parameter(moved, requires_grad=False) if key in parameters else moved
        placed[key] = made[known]
    return placed


def _home(key: str, homes: Mapping[str, torch.device]) -> torch.device:
    """Where the model has the tensor, or the layer whose place it is in; the CPU for what is on meta or nowhere."""
    home = homes.get(key, homes.get(key + "_scale"))
    while home is None and key:
        key = key.rpartition(".")[0]
        home = homes.get(key)
    return home if home is not None and home.type != "meta" else torch.device("cpu")


def _keep_identity(before: Mapping[tuple[torch.nn.Module, str], torch.nn.Parameter], undo: ExitStack) -> None:
    """Give the old parameter objects the new data, so that optimizers and ties that hold them go on."""
    stands_for: dict[int, torch.nn.Parameter] = {}
    for (module, name), old in before.items():
        new = module._parameters[name]
        assert new is not None
        if new is old or old.device.type != new.device.type:
            continue
        old = stands_for.setdefault(id(new), old)
        undo.callback(setattr, old, "data", old.data)
        old.data = new.data
        module._parameters[name] = old
