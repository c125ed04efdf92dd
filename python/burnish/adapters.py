"""LoRA adapters apart from the model they belong to: train them alone, write and read them in peft's format.

    burnish.swap_(model, burnish.LoRA(r=8))
    optimizer = torch.optim.AdamW(burnish.trainable_only(model))
    burnish.save_adapter(model, "dir/")          # peft.PeftModel.from_pretrained(base, "dir/") reads it
    burnish.load_adapter(model, "dir/")          # reads what peft's save_pretrained wrote

The folder holds peft's two files, :mod:`burnish.peft_format`. Both are written aside, flushed and renamed, the tensors
first. Their metadata carries the hash of the tensors and that of the configuration they belong to, so bytes that were
changed, and a folder that a dying process left between the two renames, are noticed when they are read; files that peft
wrote carry neither.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from burnish import durable, peft_format
from burnish.checks import FLOATING
from burnish.configs import LoRA
from burnish.errors import CheckpointError, SwapError
from burnish.kinds import peft
from burnish.kinds.lora import is_candidate, objection
from burnish.nn.base_layer import sizes
from burnish.nn.lora_linear import LoRALinear
from burnish.registry import dtype_name
from burnish.swap import swap_

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_CONFIG_HASH, _TENSORS_HASH = "burnish_config_sha256", "burnish_tensors_sha256"


def trainable_only(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Freeze everything but the adapters, peft's that were not swapped included, and return their parameters, each
    once, for an optimizer.

    Raises:
        ValueError: the model has no adapters.
    """
    adapters = {
        id(parameter): parameter
        for name, parameter in model.named_parameters()
        if any(part.startswith("lora_") for part in name.split("."))
    }
    if not adapters:
        raise ValueError("trainable_only: the model has no adapters, expected burnish.swap_(model, burnish.LoRA(...))")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in adapters)
    return list(adapters.values())


def adapter_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The part of ``model.state_dict()`` that is adapters: ``model.load_state_dict(..., strict=False)`` takes it."""
    return {
        f"{name}.{factor}" if name else factor: getattr(layer, factor).detach()
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, LoRALinear)
        for factor in ("lora_A", "lora_B")
    }


def _named_layers(model: torch.nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinear layers by the names that peft's files have for them."""
    return {
        _plain(name): module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LoRALinear)
    }


def _plain(name: str) -> str:
    """A module's name in the model that peft, or torch.compile, may have wrapped."""
    return name.removeprefix("_orig_mod.").removeprefix(peft_format.PREFIX)


def save_adapter(model: torch.nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapters of all LoRALinear layers into the folder ``path``, in peft's format. An adapter that is there
    is replaced.

    Raises:
        TypeError: not a module.
        CheckpointError: there are no such layers, they are sharded, on meta or differ in what peft has one value for,
            an adapter of peft's has more than them, or the disk does not take it; what was in the folder still is.
    """
    import safetensors

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"save_adapter: model is a {type(model).__name__}, expected an nn.Module")
    layers = _named_layers(model)
    if not layers:
        raise CheckpointError("save_adapter: the model has no LoRALinear layers, expected burnish.swap_ with LoRA")
    missed = peft.left_behind(model)
    if missed is not None:
        raise CheckpointError(
            f"save_adapter: {missed}: a file of the LoRALinear layers alone would lose it; call the report's revert() "
            "and save with peft's save_pretrained"
        )
    inside = tuple(f"{name}." for name in layers)
    names = [name for name in (_plain(name) for name, _ in model.named_modules()) if not name.startswith(inside)]
    try:
        config = peft_format.describe(layers, names)
    except ValueError as error:
        raise CheckpointError(f"save_adapter: {error}") from None
    origin = getattr(getattr(model, "config", None), "name_or_path", None) or None
    text = json.dumps({**config, "base_model_name_or_path": origin}, indent=2).encode()
    tensors = {
        peft_format.key_of(name, factor): _whole(name, factor, getattr(layer, f"lora_{factor}"))
        for name, layer in layers.items()
        for factor in "AB"
    }
    metadata = {"format": "pt", _CONFIG_HASH: hashlib.sha256(text).hexdigest(), _TENSORS_HASH: _digest(tensors)}
    specs = {
        key: safetensors.TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for key, tensor in tensors.items()
    }
    try:
        durable.replace(
            Path(path),
            {
                TENSORS: lambda file: safetensors.serialize_file(specs, str(file), metadata),
                CONFIG: lambda file: _write(file, text),
            },
        )
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"save_adapter: {path} cannot be written: {error}") from error


def _write(file: Path, text: bytes) -> None:
    file.write_bytes(text)


def _whole(name: str, factor: str, tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta:
        what = "on the meta device and has no data" if tensor.is_meta else f"a {type(tensor).__name__}"
        raise CheckpointError(
            f"save_adapter: lora_{factor} of {name!r} is {what}, expected a plain tensor: gather shards first, with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict, and load them into a model that is whole"
        )
    return tensor.detach().cpu().contiguous()


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


@dataclass(frozen=True)
class _Entry:
    """One layer of a file."""

    config: LoRA
    A: torch.Tensor
    B: torch.Tensor


def load_adapter(model: torch.nn.Module, path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Give ``model`` the adapters in the folder ``path``, which peft or :func:`save_adapter` wrote.

    A model without LoRALinear layers gets one for each layer of the file, in the file's dtype. A model that has some
    must have exactly the file's, of the same ranks, scalings and dtypes; their parameters stay the same objects.

    Returns:
        The names of the layers, as they are in the file.

    Raises:
        TypeError: not a module.
        CheckpointError: the files are missing or damaged, describe something else than plain LoRA, or do not belong to
            this model; the message names the key. The model is as it was.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"load_adapter: model is a {type(model).__name__}, expected an nn.Module")
    folder = Path(path)
    with durable.reading(folder, "load_adapter", "save_adapter or peft's save_pretrained"):
        text, tensors = _read(folder)
    try:
        plan = peft_format.parse(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"load_adapter: {folder / CONFIG}: {error}") from error
    entries = _entries(plan, tensors)
    layers = _named_layers(model)
    if layers:
        _check_layers(entries, layers)
    else:
        layers = _created(model, entries)
    with torch.no_grad():
        for name, entry in entries.items():
            layers[name].lora_A.copy_(entry.A)
            layers[name].lora_B.copy_(entry.B)
    return tuple(entries)


def _read(folder: Path) -> tuple[bytes, dict[str, torch.Tensor]]:
    """The configuration's bytes and the tensors, after comparing the hashes that burnish wrote."""
    import safetensors

    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise CheckpointError(f"load_adapter: {folder} holds no file {name}: it is no adapter in peft's format")
    try:
        text = (folder / CONFIG).read_bytes()
        with safetensors.safe_open(folder / TENSORS, framework="pt", backend="pread") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"load_adapter: {folder} cannot be read: {error}") from error
    if _TENSORS_HASH in metadata and metadata[_TENSORS_HASH] != _digest(tensors):
        raise CheckpointError(f"load_adapter: {folder / TENSORS} is damaged: its tensors do not match their SHA-256")
    if _CONFIG_HASH in metadata and metadata[_CONFIG_HASH] != hashlib.sha256(text).hexdigest():
        raise CheckpointError(
            f"load_adapter: {folder / CONFIG} does not belong to {TENSORS}: it was changed, or the last save did not "
            "come to its end"
        )
    return text, tensors


def _entries(plan: peft_format.Plan, tensors: Mapping[str, torch.Tensor]) -> dict[str, _Entry]:
    """The layers of a file, each checked by itself."""
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        parts = peft_format.layer_and_factor(key)
        if parts is None:
            raise CheckpointError(
                f"load_adapter: key {key!r}, expected {peft_format.key_of('<layer>', 'A')} or ...lora_B.weight"
            )
        if tensor.dtype not in FLOATING or tensor.dim() != 2:
            got = f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
            raise CheckpointError(f"load_adapter: {key!r} is {got}, expected a matrix of fp32, bf16 or fp16")
        factors.setdefault(parts[0], {})[parts[1]] = tensor
    if not factors:
        raise CheckpointError("load_adapter: the file has no tensors, expected lora_A and lora_B of each layer")
    return {name: _entry(name, plan.of(name), found) for name, found in factors.items()}


def _entry(name: str, config: LoRA, found: Mapping[str, torch.Tensor]) -> _Entry:
    for factor in "AB":
        if factor not in found:
            raise CheckpointError(f"load_adapter: {peft_format.key_of(name, factor)!r} is missing")
    A, B = found["A"], found["B"]
    for factor, rank in (("A", A.shape[0]), ("B", B.shape[1])):
        if rank != config.r:
            raise CheckpointError(
                f"load_adapter: {peft_format.key_of(name, factor)!r} has shape {tuple(found[factor].shape)}, of rank "
                f"{rank}, expected rank {config.r} as {CONFIG} says"
            )
    if A.dtype != B.dtype:
        raise CheckpointError(
            f"load_adapter: {peft_format.key_of(name, 'B')!r} is {dtype_name(B.dtype)}, expected {dtype_name(A.dtype)} "
            "as lora_A is"
        )
    return _Entry(replace(config, dtype=dtype_name(A.dtype)), A, B)


def _check_shapes(name: str, entry: _Entry, module: torch.nn.Module) -> None:
    inputs, outputs = sizes(module.base_layer if isinstance(module, LoRALinear) else module)
    for factor, has, expected in (
        ("A", entry.A.shape, (entry.config.r, inputs)),
        ("B", entry.B.shape, (outputs, entry.config.r)),
    ):
        if tuple(has) != expected:
            raise CheckpointError(
                f"load_adapter: {peft_format.key_of(name, factor)!r} has shape {tuple(has)}, expected {expected} for "
                f"this model's layer {inputs}->{outputs}"
            )


def _check_layers(entries: Mapping[str, _Entry], layers: Mapping[str, LoRALinear]) -> None:
    """Raise unless the model's LoRALinear layers are those of the file."""
    for name in entries:
        if name not in layers:
            raise CheckpointError(
                f"load_adapter: {peft_format.key_of(name, 'A')!r}: {name!r} is no LoRALinear layer here"
            )
    for name, layer in layers.items():
        entry = entries.get(name)
        if entry is None:
            raise CheckpointError(
                f"load_adapter: {peft_format.key_of(name, 'A')!r} is missing: the model has that layer"
            )
        _check_shapes(name, entry, layer)
        has = {"r": layer.r, "scaling": layer.scaling, "init_lora_weights": layer.config.init_lora_weights}
        has["dtype"] = dtype_name(layer.lora_A.dtype)
        for option, value in has.items():
            if value != getattr(entry.config, option):
                raise CheckpointError(
                    f"load_adapter: {name!r} has {option} {value!r} in the model, {getattr(entry.config, option)!r} in "
                    "the file"
                )
        if layer.merged:
            raise CheckpointError(f"load_adapter: {name!r} has its adapter merged: call unmerge() first")
        if type(layer.lora_A) is not torch.nn.Parameter or layer.lora_A.is_meta:
            raise CheckpointError(f"load_adapter: {name!r} is sharded or on meta, expected plain parameters")


def _created(model: torch.nn.Module, entries: Mapping[str, _Entry]) -> dict[str, LoRALinear]:
    """The model's layers of the file's names, swapped; all or none."""
    found = {_plain(fqn): (fqn, module) for fqn, module in model.named_modules(remove_duplicate=False)}
    for name, entry in entries.items():
        key = peft_format.key_of(name, "A")
        if name not in found:
            raise CheckpointError(f"load_adapter: {key!r}: the model has no layer {name!r}")
        module = found[name][1]
        reason = objection(module, []) if is_candidate(module) else "it is no linear layer"
        if peft.is_layer(module):
            reason = "it has an adapter of peft's: swap that with LoRA() first"
        if reason is not None:
            raise CheckpointError(f"load_adapter: {key!r}: {type(module).__name__} {name!r} is refused: {reason}")
        _check_shapes(name, entry, module)
        if next(module.parameters(), torch.empty(0)).is_meta:
            raise CheckpointError(f"load_adapter: {name!r} is on meta: load the model's own values first")
    first = {id(found[name][1]): name for name in reversed(list(entries))}  # a module with two names is swapped by one
    rules = {f"re:{re.escape(found[name][0])}": entries[name].config for name in first.values()}
    try:
        report = swap_(model, rules)
    except SwapError as error:
        raise CheckpointError(f"load_adapter: {error}") from error
    layers = _named_layers(model)
    for row in report.kept:
        if _plain(row.fqn) in entries and _plain(row.fqn) not in layers:
            report.revert()
            raise CheckpointError(f"load_adapter: {row.fqn!r} cannot have an adapter: {row.reason}")
    return layers
