"""Which implementation runs, and why.

PyTorch's dispatcher picks the device: CPU tensors go to the native CPU kernel without passing through Python. CUDA
tensors come here, inside the op, where the first implementation of the op's record whose ``supports`` has no objection
runs; one that was measured to be the fastest on this GPU is asked first (:mod:`burnish.tuning`). An override wins: the
context manager :func:`use_backend`, then the environment variable ``BURNISH_BACKEND`` (``reference``, ``cpu``,
``triton``, ``native`` or ``auto``). A forced backend that cannot run raises :class:`~burnish.errors.BackendError`:
nothing falls back silently.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.autograd import forward_ad

from burnish import native, tuning
from burnish.arguments import places
from burnish.errors import BackendError
from burnish.registry import BACKENDS, Backend, Impl

if TYPE_CHECKING:
    from burnish.registry import Autograd, OpSpec

_override: ContextVar[Backend | Literal["auto"] | None] = ContextVar("burnish_backend", default=None)
#: whether a gradient is being computed, and the override was asked for with its forward in mind
_inherited: ContextVar[bool] = ContextVar("burnish_backend_inherited", default=False)

#: how many overrides are in force in the whole process; zero lets public functions skip the look-up
overrides = int(os.environ.get("BURNISH_BACKEND", "auto") not in ("", "auto"))


def forced() -> Backend | None:
    """The backend asked for by :func:`use_backend` or ``BURNISH_BACKEND``; None for the automatic choice.

    Raises:
        ValueError: the environment variable holds none of the words.
    """
    chosen = _override.get()
    if chosen is not None:
        return None if chosen == "auto" else chosen
    word = os.environ.get("BURNISH_BACKEND", "auto") or "auto"
    if word == "auto":
        return None
    return _checked(word, "BURNISH_BACKEND")


def _checked(name: str, source: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}, expected one of: {', '.join(BACKENDS)}, auto")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend inside the ``with`` block, in this thread: ``reference``, ``cpu``, ``triton`` or ``native``;
    ``auto`` restores the automatic choice, also where ``BURNISH_BACKEND`` is set. The override in force when a forward
    runs also holds for its gradient, unless the gradient's op has no implementation of that backend.

    Raises:
        ValueError: unknown name.
        BackendError: later, from an op which that backend cannot run.
    """
    global overrides
    token = _override.set("auto" if name == "auto" else _checked(name, "use_backend"))
    overrides += 1
    try:
        yield
    finally:
        overrides -= 1
        _override.reset(token)


@cache
def resolve(path: str) -> Callable[..., Any]:
    """The function behind ``"module:function"``; ``torch.ops`` paths are written ``"torch.ops:ns.op.overload"``."""
    module, _, attributes = path.partition(":")
    found: Any = torch.ops if module == "torch.ops" else import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found


def objection(impl: Impl, args: tuple[Any, ...]) -> str | None:
    """Why ``impl`` cannot run these arguments; None if it can.

    Raises:
        ImportError: the package of ``impl`` is there, but its module is not, or cannot be imported.
    """
    if impl.backend == "native" and native.CUDA_LIBRARY in native.missing:
        return native.missing[native.CUDA_LIBRARY]
    try:
        supports = resolve(impl.supports)
    except ImportError as error:
        missing, package = error.name or impl.supports, impl.supports.partition(":")[0].partition(".")[0]
        if missing != package and missing.partition(".")[0] == package:  # a mistake in it, not a package that lacks
            raise ImportError(f"{impl.supports} cannot be imported: {error}", name=error.name) from error
        return f"{missing} is not installed"
    reason: str | None = supports(*args)
    return reason


def _asked(spec: OpSpec) -> Backend | None:
    """What :func:`forced` says; the automatic choice for a gradient whose op has no such implementation."""
    backend = forced()
    if _inherited.get() and backend in ("triton", "native") and all(impl.backend != backend for impl in spec.impls):
        return None
    return backend


def in_turn(spec: OpSpec, backend: Backend | None, args: tuple[Any, ...]) -> list[Impl]:
    """The implementations to ask: the forced one, or all, what was measured to be the fastest first and those that
    yield to others last."""
    if backend is not None:
        return [impl for impl in spec.impls if impl.backend == backend]
    order = sorted(spec.impls, key=lambda impl: bool(impl.yields) and resolve(impl.yields)(*args))
    fastest = tuning.fastest(spec, args, [impl.backend for impl in order])
    return sorted(order, key=lambda impl: impl.backend != fastest) if fastest else order


def select(spec: OpSpec, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The function that runs ``args`` on a GPU: forced, or the first :func:`in_turn` without an objection.

    Raises:
        BackendError: none can; the message has a line for each candidate.
    """
    backend = _asked(spec)
    if backend == "reference":
        return spec.reference
    reasons = []
    for impl in in_turn(spec, backend, args):
        reason = objection(impl, args)
        if reason is None:
            return resolve(impl.target)
        reasons.append(f"{impl.backend}: {reason}")
    if not reasons:
        reasons.append(f"{backend}: the op has no such implementation for these tensors")
    asked = f" with backend {backend!r} asked for" if backend else ""
    raise BackendError(f"{spec.name}: no implementation can run this call{asked}.\n  " + "\n  ".join(reasons))


def unchecked(spec: OpSpec, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """The function that runs ``args`` on a GPU, if it is the first to be asked and makes the checks itself."""
    backend = _asked(spec)
    impl = next(iter(in_turn(spec, backend, args)), None)
    if impl is None or not impl.checks or objection(impl, args) is not None:
        return None
    return resolve(impl.target)


def _run(spec: OpSpec, *args: Any) -> Any:
    """Check the arguments, then run what :func:`select` picks."""
    target = unchecked(spec, args)
    if target is None:
        spec.fake(*args)
        if _asked(spec) is None:
            tuning.learn(spec, args, partial(_able, spec, args))
        target = select(spec, args)
    return target(*args)


def _able(spec: OpSpec, args: tuple[Any, ...]) -> dict[str, Callable[..., Any]]:
    """The implementations that can run these arguments, by backend."""
    return {impl.backend: resolve(impl.target) for impl in spec.impls if objection(impl, args) is None}


def cuda_kernel(spec: OpSpec) -> Callable[..., Any]:
    """The kernel PyTorch calls for CUDA tensors."""
    return partial(_run, spec)


def missing_cpu_kernel(spec: OpSpec) -> Callable[..., Any]:
    """What PyTorch calls for CPU tensors where the native library is not there."""

    def run(*args: Any) -> Any:
        raise BackendError(f"{spec.name}: {native.missing['_native.so']}")

    return run


def differentiates(op: str, *tensors: torch.Tensor | None) -> bool:
    """Whether a call of these tensors needs the gradient formula of ``op``; raises as :func:`refuse_tangents` does."""
    if forward_ad._current_level >= 0:
        refuse_tangents(op, *tensors)
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def refuse_tangents(op: str, *tensors: torch.Tensor | None) -> None:
    """Refuse forward-mode differentiation through ``op``: it has no formula, and a kernel alone would drop the tangent.

    Raises:
        RuntimeError: ``torch.func.jvp``, or what is built on it, differentiates by one of the tensors.
    """
    if any(tensor is not None and _has_tangent(tensor) for tensor in tensors):
        raise RuntimeError(f"{op} has no forward-mode derivative: differentiate it in reverse mode, by backward()")


def _has_tangent(tensor: torch.Tensor) -> bool:
    """Whether forward-mode differentiation may go through it: torch.func's wrappers do not say."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped or forward_ad.unpack_dual(tensor).tangent is not None


def call(spec: OpSpec, args: tuple[Any, ...], needs_grad: bool) -> Any:
    """Run the op with an override in force. GPU tensors need nothing special: their kernel asks :func:`forced`."""
    if _capturing.get():
        raise _Captured(args)
    backend = _asked(spec)
    device = next(tensor.device.type for tensor in places(args).values())
    if backend in (None, "cpu") or device != "cpu":
        if backend == "cpu" and device != "cpu":
            raise BackendError(f"{spec.name}: backend 'cpu' was asked for, but the tensors are on {device}")
        return (spec.overload() if needs_grad else spec.entry)(*args)
    return _emulated(spec)(*args) if needs_grad else _run(spec, *args)


def formula(autograd: Autograd) -> tuple[Callable[..., None], Callable[..., Any]]:
    """``setup_context`` and ``backward`` of a record, with the override of the forward in force in the backward, which
    autograd runs later and, for GPU tensors, in a thread of its own."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.burnish_backend = _override.get()
        autograd.setup_context(ctx, inputs, output)

    def backward(ctx: Any, *grads: Any) -> Any:
        token = _inherited.set(True)
        try:
            with use_backend(ctx.burnish_backend) if ctx.burnish_backend else nullcontext():
                return autograd.backward(ctx, *grads)
        finally:
            _inherited.reset(token)

    return setup_context, backward


@cache
def _emulated(spec: OpSpec) -> Callable[..., Any]:
    """``spec`` with its autograd formula around whatever backend is forced on CPU tensors."""
    if spec.autograd is None:
        return lambda *args: _run(spec, *args)
    remember, pull = formula(spec.autograd)

    class Forced(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return _run(spec, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            remember(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return pull(ctx, *grads)

    return Forced.apply


def candidates(spec: OpSpec, args: tuple[Any, ...] | None = None) -> dict[str, str]:
    """Every backend of an op with ``yes`` or the reason it cannot run; without arguments, whether it could at all."""
    table = {"reference": "yes: the definition, for checking"}
    device = "cpu" if args is None else next(tensor.device.type for tensor in places(args).values())
    if native.lacks(spec.namespace):
        table["cpu"] = native.missing["_native.so"]
    elif not torch._C._dispatch_has_kernel_for_dispatch_key(spec.qualname, "CPU"):
        table["cpu"] = "no CPU kernel is registered"
    else:
        table["cpu"] = "yes" if device == "cpu" else f"the tensors are on {device}"
    for impl in spec.impls:
        reason = _unavailable(impl) or (objection(impl, args) if args is not None else None)
        table[impl.backend] = reason or "yes"
    return table


def _unavailable(impl: Impl) -> str | None:
    """Why the implementation cannot run on this machine, whatever the arguments."""
    if impl.backend == "native" and native.CUDA_LIBRARY in native.missing:
        return native.missing[native.CUDA_LIBRARY]
    if impl.backend == "native" and native.emulating():
        return None
    if impl.backend == "triton":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no GPU is visible"
    return None


class _Captured(BaseException):
    """Carries a call's record and arguments out of the public function that :func:`explain` called."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.call_args = args


_capturing: ContextVar[bool] = ContextVar("burnish_capturing", default=False)


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """A table of the op's backends: the one that runs these arguments, and why the others do not.

    Args:
        op: the op's name, ``int8_linear``.
        args, kwargs: what its public function takes; with none, the table says what this machine could run.
    """
    from burnish import ops
    from burnish.registry import get

    spec = get(op)
    captured = _capture(getattr(ops, spec.stem, spec.entry), args, kwargs) if args or kwargs else None
    table = candidates(spec, captured)
    for name, time in (tuning.times(spec, captured) if captured is not None else {}).items():
        table[name] += f"; measured at {time:.1f} us"
    wanted = forced()
    impls = spec.impls if captured is None else in_turn(spec, None, captured)
    order = (wanted,) if wanted else ("cpu", *(impl.backend for impl in impls))
    chosen = next((name for name in order if table.get(name, "").startswith("yes")), None)
    lines = [f"{op}: {chosen + ' runs' if chosen else 'nothing can run this'}"]
    lines += [f"  {'->' if name == chosen else '  '} {name:<10} {reason}" for name, reason in table.items()]
    if wanted:
        lines.append(f"  {wanted!r} was asked for by use_backend or BURNISH_BACKEND")
    return "\n".join(lines)


def _capture(public: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The op's positional arguments that a call of its public function comes to."""
    global overrides
    token = _capturing.set(True)
    overrides += 1
    try:
        public(*args, **kwargs)
    except _Captured as captured:
        return captured.call_args
    finally:
        overrides -= 1
        _capturing.reset(token)
    return args
