"""The record of every op: one frozen dataclass that tests, benchmarks, dispatch and documentation read.

An op is declared once, in ``burnish/ops/<op>.py``, by ``register(OpSpec(...))``. Registering defines the op's schema
with PyTorch, attaches the fake and autograd formulas and routes CUDA tensors through :mod:`burnish.dispatch`; the CPU
kernel comes from the native library, which registers itself with PyTorch under the same name. Packages outside burnish
add ops the same way and announce their module under the entry-point group ``burnish.ops``.

    burnish::<op>             the op, with autograd if the record has it
    burnish::<op>.inference   the same kernel without autograd: the public function calls it when no gradient is needed
    burnish::<op>.native      the CUDA C++ kernel, if the record lists one

An optimizer's op may have one more, ``.kept``: see :mod:`burnish.kept_lists`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any, Literal

import torch

from burnish.errors import PluginError

Backend = Literal["reference", "cpu", "triton", "native"]
BACKENDS: tuple[Backend, ...] = ("reference", "cpu", "triton", "native")

_OP_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_DTYPE_NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.int8: "int8", torch.uint8: "uint8", torch.int32: "int32",
}  # fmt: skip


@dataclass(frozen=True)
class Impl:
    """One CUDA implementation: ``target`` and ``supports`` are ``"module:function"``, imported on first use.

    ``target`` takes the op's positional arguments and returns its result; ``supports`` takes the same and returns
    None, or in words why the implementation cannot run them. ``checks`` says that ``target`` refuses what the record's
    ``fake`` does, in the same words and before it writes: then nothing else looks at the arguments first, and
    ``supports`` gets them unchecked, as ``yields`` always does. That one says whether another implementation that runs
    the arguments was measured to be faster, for this one to be asked last.
    """

    backend: Literal["triton", "native"]
    target: str
    supports: str
    checks: bool = False
    yields: str = ""


@dataclass(frozen=True)
class Case:
    """One set of inputs, by dimensions, dtype, the kind of values and further options.

    ``values`` is ``normal`` (Gaussian), ``integers`` (the result is exact, rule C4), ``extreme`` (every quantised value
    at its limit, rule N5) or a word of the op's own.
    """

    dims: Mapping[str, int]
    dtype: torch.dtype
    values: str = "normal"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """``M64-N4096-K4096-bf16``, then options and values where they are not the default."""
        parts = [f"{name}{size}" for name, size in self.dims.items()] + [dtype_name(self.dtype)]
        for name, value in self.options.items():
            if isinstance(value, bool):
                parts.append(name if value else f"no_{name}")
            elif isinstance(value, torch.dtype):
                parts.append(f"{name.removesuffix('_dtype')}_{dtype_name(value)}")
            elif isinstance(value, float):
                parts.append(f"{name}{value:g}")
            elif value not in (None, "none"):
                parts.append(str(value))
        return "-".join(parts + ([self.values] if self.values != "normal" else []))


@dataclass(frozen=True)
class Invalid:
    """A bad call: ``change`` turns the arguments of the first test case into bad ones; the message of its error begins
    with the op's name and a colon, then like the regular expression ``match``."""

    label: str
    change: Callable[..., tuple[Any, ...]]
    match: str


@dataclass(frozen=True)
class Cases:
    """``test`` is small and full of edges, ``bench`` is what people run, ``wide`` what they run on a GPU alone,
    ``invalid`` must raise."""

    test: tuple[Case, ...]
    bench: tuple[Case, ...]
    invalid: tuple[Invalid, ...] = ()
    wide: tuple[Case, ...] = ()


@dataclass(frozen=True)
class Cost:
    """What a case must do at least: arithmetic operations on ``unit`` and bytes of inputs read and outputs written."""

    ops: float
    bytes: float
    unit: Literal["int8", "bf16", "fp32"]


@dataclass(frozen=True)
class Autograd:
    """``setup_context`` and ``backward`` as ``torch.library.register_autograd`` takes them, and ``surrogate``: a
    differentiable plain-torch function of the same arguments whose gradient the op promises (for a quantised op the
    straight-through one; for a smooth op its reference)."""

    setup_context: Callable[..., None]
    backward: Callable[..., Any]
    surrogate: Callable[..., Any]


@dataclass(frozen=True, eq=False)
class OpSpec:
    """The contract of one op. ``make(case, backend, seed)`` gives its positional arguments, on the CPU, with weights in
    the layout that backend runs on; ``baseline(*args)`` gives a thunk that runs the torch path a bench row compares to.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    autograd: Autograd | None
    impls: tuple[Impl, ...]
    cases: Cases
    make: Callable[[Case, Backend, int], tuple[Any, ...]]
    cost: Callable[[Case], Cost]
    baseline: Callable[..., Callable[[], Any]] | None = None

    @property
    def namespace(self) -> str:
        """``burnish``, or the namespace in an outside op's name (``mine::op``)."""
        return self.name.split("::")[0] if "::" in self.name else "burnish"

    @property
    def stem(self) -> str:
        return self.name.split("::")[-1]

    @property
    def qualname(self) -> str:
        return f"{self.namespace}::{self.stem}"

    def overload(self, name: str = "default") -> Any:
        """The OpOverload: ``default``, ``inference``, ``native`` or ``kept``."""
        return getattr(getattr(getattr(torch.ops, self.namespace), self.stem), name)

    @property
    def entry(self) -> Any:
        """The overload that a call without gradients runs."""
        return self.overload("inference" if self.autograd else "default")


def dtype_name(dtype: torch.dtype) -> str:
    """``bf16`` for torch.bfloat16, and so on."""
    return _DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


_specs: dict[str, OpSpec] = {}
_libraries: list[torch.library.Library] = []


def register(spec: OpSpec) -> OpSpec:
    """Define ``spec`` with PyTorch and list it; returns it.

    Raises:
        ValueError: the name is taken or outside the grammar, or a case list is empty.
    """
    from burnish import dispatch, native

    if not _OP_NAME.fullmatch(spec.stem):
        raise ValueError(f"op name {spec.name!r}: expected lower-case words joined by '_', like int8_linear")
    if spec.name in _specs:
        raise ValueError(f"op {spec.name!r} is registered twice")
    if not spec.cases.test:
        raise ValueError(f"op {spec.name!r} has no test cases")
    library = torch.library.Library(spec.namespace, "FRAGMENT")
    _libraries.append(library)
    backends = {impl.backend for impl in spec.impls}
    overloads = ["", *([".inference"] if spec.autograd else []), *([".native"] if "native" in backends else [])]
    for overload in overloads:
        library.define(f"{spec.stem}{overload}{spec.schema}", tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(spec.qualname + overload, spec.fake, lib=library)
        if overload != ".native":
            library.impl(spec.stem + overload, dispatch.cuda_kernel(spec), "CUDA")
            if native.lacks(spec.namespace):
                library.impl(spec.stem + overload, dispatch.missing_cpu_kernel(spec), "CPU")
    if spec.autograd:
        setup_context, backward = dispatch.formula(spec.autograd)
        torch.library.register_autograd(spec.qualname, backward, setup_context=setup_context, lib=library)
    _specs[spec.name] = spec
    return spec


def get(name: str) -> OpSpec:
    """The record of an op.

    Raises:
        KeyError: no such op; the message lists those there are.
    """
    if name in _specs:
        return _specs[name]
    specs = all_ops()
    if name not in specs:
        raise KeyError(f"no op named {name!r}; the ops are: {', '.join(specs)}")
    return specs[name]


def all_ops() -> dict[str, OpSpec]:
    """Every registered op by name, those of installed plug-ins included.

    Raises:
        PluginError: a plug-in cannot be imported.
    """
    for plugin in plugins():
        if plugin.error:
            raise PluginError(
                f"the package {plugin.package} announces ops in {plugin.module}, which {plugin.state()}. Repair it or "
                "uninstall it"
            ) from plugin.error
    return importable_ops()


def importable_ops() -> dict[str, OpSpec]:
    """What :func:`all_ops` gives, without the ops of plug-ins that cannot be imported."""
    plugins()
    return dict(sorted(_specs.items()))


@dataclass(frozen=True)
class Plugin:
    """An installed package that announces ops, the module that registers them, and what importing it raised."""

    package: str
    module: str
    error: Exception | None

    def state(self) -> str:
        """``loaded``, or why not."""
        return f"cannot be imported: {type(self.error).__name__}: {self.error}" if self.error else "loaded"


@cache
def plugins() -> tuple[Plugin, ...]:
    """Import the modules that installed packages announce in the entry-point group ``burnish.ops``."""
    found = []
    for point in metadata.entry_points(group="burnish.ops"):
        error = None
        try:
            point.load()
        except Exception as raised:
            error = raised
        found.append(Plugin(point.dist.name if point.dist else "?", point.value, error))
    return tuple(found)
