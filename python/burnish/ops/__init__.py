"""The ops. One module an op; its public functions are gathered here, so ``burnish.ops.int8_linear(...)`` is the call.

Every module in this folder is imported and what its ``__all__`` names is exported: adding an op edits no list.
"""

from importlib import import_module
from pkgutil import iter_modules

__all__: list[str] = []

for _module in sorted(info.name for info in iter_modules(__path__)):
    _loaded = import_module(f"{__name__}.{_module}")
    for _name in _loaded.__all__:
        globals()[_name] = getattr(_loaded, _name)
        __all__.append(_name)
