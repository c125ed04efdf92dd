"""The house rules: every file belongs to an op, every op is complete, every name is in the grammar."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields, replace
from importlib import import_module, metadata
from pathlib import Path

import pytest
import torch
from burnish import registry, testing
from burnish.arguments import places
from burnish.checks import FLOATING
from burnish.errors import BackendError, PluginError
from burnish.testing.calls import on_copies
from burnish.testing.magnitude import magnitudes

ROOT = Path(__file__).parent.parent
SPECS = registry.all_ops()
OURS = {name: spec for name, spec in SPECS.items() if spec.namespace == "burnish"}

#: sources that serve all ops; whatever is not listed here must be named after an op
INFRASTRUCTURE = {
    "csrc/cpu": {"isa", "parallel", "probes", "float_product", "held_steps", "kept_lists", "lamb", "lowrank", "sparse"},
    "csrc/cpu/simd": {"table", "peak", "product", "panel", "dot", "dropout", "expand"},
    "csrc/cuda": set(),
    "kernels": {"__init__"},
}
SHARED_FAMILIES = {"common"}
KERNEL_NAME = re.compile(r"(?P<op>\w+)_(fwd|bwd)(_dx|_dw)?_kernel(_\w+)?")

each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def orphans(files: list[Path], infrastructure: set[str]) -> list[str]:
    """The files that are neither an op's, ``<op>`` or ``<op>_<part>``, nor listed."""
    stems = {path: path.name.split(".")[0] for path in files}
    strange = {
        path for path, stem in stems.items() if not re.match("|".join(OURS), stem) and stem not in infrastructure
    }
    return sorted(str(path.relative_to(ROOT)) for path in strange)


@pytest.mark.parametrize(
    ("folder", "pattern"), [("csrc/cpu", "*.cpp"), ("csrc/cpu/simd", "*.cpp"), ("csrc/cuda", "*.cu")]
)
def test_no_native_source_without_a_record(folder: str, pattern: str) -> None:
    files = sorted((ROOT / folder).glob(pattern))
    assert files, f"no {pattern} in {folder}: the native kernels are missing"
    assert not orphans(files, INFRASTRUCTURE[folder])


def test_every_cuda_source_runs_on_the_cpu() -> None:
    """What no record calls native is compiled, but neither emulated nor counted."""
    native = {spec.name for spec in OURS.values() if any(impl.backend == "native" for impl in spec.impls)}
    stems = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert stems
    assert not {stem for stem in stems if not any(f"{stem}_".startswith(f"{name}_") for name in native)}


def test_no_triton_source_without_a_record() -> None:
    files = [path for path in (ROOT / "kernels").glob("*/*.py") if path.parent.name not in SHARED_FAMILIES]
    assert files
    assert not orphans(files, INFRASTRUCTURE["kernels"])
    assert not (ROOT / "kernels" / "__init__.py").exists(), "kernels/ must not shadow PyPI's package of that name"


def test_a_family_of_triton_kernels_is_a_package() -> None:
    """The wheel ships packages alone; a checkout finds new ones without another installation."""
    families = {path.parent for path in (ROOT / "kernels").glob("*/*.py")}
    assert not [folder.name for folder in families if not (folder / "__init__.py").is_file()]
    assert str(ROOT / "kernels") in import_module("burnish.kernels").__path__


def test_a_copy_within_another_project_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "setup.py").touch()
    searched: list[str] = []
    copy = {"__file__": str(tmp_path / "libs" / "burnish" / "kernels" / "__init__.py"), "__path__": searched}
    exec((ROOT / "python/burnish/kernels/__init__.py").read_text(), copy)
    assert searched == []


def test_an_orphan_is_found() -> None:
    assert orphans([ROOT / "csrc/cpu/forgotten_op.cpp"], INFRASTRUCTURE["csrc/cpu"]) == ["csrc/cpu/forgotten_op.cpp"]


@pytest.mark.parametrize("name", OURS)
def test_an_op_lives_in_a_module_of_its_name(name: str) -> None:
    module = inspect.getmodule(OURS[name].reference)
    assert module is not None
    stem = module.__name__.rpartition(".")[2]
    assert module.__name__ == f"burnish.ops.{stem}"
    # a backward or an inverse shares its forward's module: int8_linear_pack holds int8_linear_unpack
    assert name.rpartition("_")[0] == stem.rpartition("_")[0] or name.startswith(stem)
    assert module.__doc__


@pytest.mark.parametrize("name", OURS)
def test_an_op_has_a_cpu_kernel(name: str) -> None:
    spec = OURS[name]
    overloads = ["", ".inference"] if spec.autograd else [""]
    for overload in overloads:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(spec.qualname + overload, "CPU"), overload or "default"
    source = ROOT / "csrc" / "cpu"
    texts = {path.name: path.read_text() for path in source.glob("*.cpp")}
    assert any(f'm.impl("{name}"' in text for text in texts.values()), f"no csrc/cpu/*.cpp registers {name}"


@each_spec
def test_a_record_is_well_formed(spec: registry.OpSpec) -> None:
    assert len(fields(spec)) <= 10
    arguments = [argument.name for argument in spec.overload()._schema.arguments]
    for role, function in (("reference", spec.reference), ("fake", spec.fake)):
        assert list(inspect.signature(function).parameters) == arguments, role
    if spec.autograd:
        assert list(inspect.signature(spec.autograd.surrogate).parameters) == arguments
    for impl in spec.impls:
        for path in (impl.target, impl.supports):
            assert re.fullmatch(r"[\w.]+:[\w.]+", path), path
    ids = [case.id for case in spec.cases.test]
    assert len(set(ids)) == len(ids), "two test cases have the same id"
    assert len({bad.label for bad in spec.cases.invalid}) == len(spec.cases.invalid)
    assert spec.cases.bench, "no bench cases"
    cost = spec.cost(spec.cases.bench[0])
    assert cost.bytes > 0
    assert cost.ops >= 0


@each_spec
def test_a_record_has_edge_cases(spec: registry.OpSpec) -> None:
    cases = [case for case in spec.cases.test if case.values == "normal"]
    sizes = {name: {case.dims[name] for case in cases} for name in cases[0].dims}
    assert any(0 in options for options in sizes.values()), "no empty case"
    for name, options in sizes.items():
        assert 1 in options, f"{name} is never 1"
        assert any(size > 16 and size % 16 == 1 for size in options), f"{name} is never one more than a tile"
        assert any(size > 1 and size % 16 for size in options), f"{name} is never ragged"
        assert max(options) > 64, f"{name} never passes a tile of 64"
    if cases[0].dtype.is_floating_point:
        assert {case.dtype for case in cases} == set(FLOATING)
    assert spec.cases.invalid, "no bad calls"
    values = {case.values for case in spec.cases.test}
    if {"N", "K"} <= set(cases[0].dims) and cases[0].dtype.is_floating_point:
        assert "integers" in values, "a product needs exact cases (C4)"


@each_spec
def test_exact_cases_are_exact(spec: registry.OpSpec) -> None:
    for case in spec.cases.test:
        if case.values == "integers":
            _, terms = magnitudes(on_copies(spec, spec.reference), spec.make(case, "cpu", 0))
            assert all(case.dtype not in of.inexact for of in terms), f"{case.id} rounds on the way: C4 would not hold"


@each_spec
def test_inputs_are_reproducible_and_on_the_cpu(spec: registry.OpSpec) -> None:
    for case in spec.cases.test[:3]:
        first, again, other = (spec.make(case, "cpu", seed) for seed in (0, 0, 1))
        assert len(first) == len(spec.overload()._schema.arguments)
        tensors, repeated, others = (places(args) for args in (first, again, other))
        assert tensors.keys() == repeated.keys()
        for place, tensor in tensors.items():
            assert tensor.device.type == "cpu"
            assert torch.equal(tensor, repeated[place])
            assert tensor.numel() <= 4 or not torch.equal(tensor, others[place])
        listed = {index for index, *_ in tensors}
        assert all(one == two for i, (one, two) in enumerate(zip(first, again, strict=True)) if i not in listed)


def test_device_kernel_names_are_in_the_grammar() -> None:
    names = {}
    for path in (ROOT / "kernels").glob("*/*.py"):
        for node in ast.parse(path.read_text()).body:
            jitted = isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
            if jitted and "_kernel" in node.name:
                names[node.name] = path
    for path in (ROOT / "csrc" / "cuda").glob("*.cu"):
        for match in re.finditer(r"__global__[^;{]*?\b(\w+_kernel\w*)\(", path.read_text()):
            names[match[1]] = path
    assert names
    for name, path in names.items():
        match = KERNEL_NAME.fullmatch(name)
        assert match, f"{name} in {path}: expected <op>_<fwd|bwd>[_dx|_dw]_kernel[_<variant>]"
        assert match["op"] in OURS, f"{name} in {path} belongs to no op"


@pytest.mark.parametrize("name", ["Int8Linear", "int8-linear", "_int8", "int8__linear", "int8_linear_", "8bit", ""])
def test_a_name_outside_the_grammar_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected lower-case words joined by '_'"):
        registry.register(replace(OURS["int8_quantize_rows"], name=name))


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'int8_linear' is registered twice"):
        registry.register(OURS["int8_linear"])


def test_a_record_without_cases_is_refused() -> None:
    spec = OURS["int8_linear"]
    with pytest.raises(ValueError, match="'int8_blank' has no test cases"):
        registry.register(replace(spec, name="int8_blank", cases=replace(spec.cases, test=())))


def test_an_unknown_op_lists_the_ops() -> None:
    with pytest.raises(KeyError, match="no op named 'int9_linear'; the ops are: adagrad_step, adam_step, bsr_linear, "):
        registry.get("int9_linear")


def test_a_broken_plugin_is_named_and_leaves_other_ops_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint("third", "no_such_plugin", "burnish.ops")
    monkeypatch.setattr(metadata, "entry_points", lambda **_: [point])
    registry.plugins.cache_clear()
    try:
        with pytest.raises(
            PluginError, match="announces ops in no_such_plugin, which cannot be imported: ModuleNotFound"
        ):
            registry.all_ops()
        assert registry.get("int8_linear") is OURS["int8_linear"]
    finally:
        registry.plugins.cache_clear()


def test_records_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        OURS["int8_linear"].name = "other"  # type: ignore[misc]


def test_an_op_without_a_cpu_kernel_is_planned_and_fails() -> None:
    """A missing kernel is a failed check, not a skipped one."""
    spec = replace(OURS["int8_quantize_rows"], name="int8_missing_kernel")
    registry.register(spec)
    try:
        checks = testing.plan([spec], ["cpu"]).checks
        assert checks
        with pytest.raises((NotImplementedError, BackendError), match="int8_missing_kernel"):
            next(check for check in checks if check.rule == "forward" and "-M1-" in check.id).run()
    finally:
        del registry._specs[spec.name]
