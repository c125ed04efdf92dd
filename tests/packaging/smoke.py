"""Run by tests/packaging/run.sh in a clean environment: the installed package works with torch alone.

Triton, numpy and the bench extra are absent there; nothing may import them, build anything or start CUDA.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import burnish
import torch

absent = ("triton", "numpy", "rich", "matplotlib")
assert not [name for name in absent if find_spec(name)], "the environment is not clean"
assert not [name for name in absent if name in sys.modules]
assert "site-packages" in burnish.__file__, burnish.__file__
assert not torch.cuda.is_initialized()

# the kernel families ship inside burnish; PyPI's own `kernels` package keeps its name
assert find_spec("kernels") is None
package = Path(burnish.__file__).parent
for shipped in ("kernels/quant/int8_linear.py", "kernels/common/__init__.py", "py.typed", "_native.so"):
    assert (package / shipped).is_file(), f"{shipped} is missing from the package"

# what kernels of other packages are built with, and run on the CPU with
for header in ("check.h", "math/half.h", "cuda/ptx.cuh", "cuda/host/ptx.cuh", "cuda/host/machine.h"):
    assert (package / "include" / header).is_file(), f"{header} is missing from the package"
assert burnish.get_include() == str(package / "include")
assert (package / "_emulated.so").is_file()

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)).eval()
x = torch.randn(8, 64)
with torch.no_grad():
    expected = model(x)
    report = burnish.swap_(model, burnish.Int8())
    actual = model(x)
assert isinstance(model[0], burnish.nn.Int8Linear), report
assert torch.nn.functional.cosine_similarity(actual, expected, dim=-1).min() > 0.99
burnish.save(model, "saved")
fresh = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)).eval()
burnish.load(fresh, "saved")
with torch.no_grad():
    assert torch.equal(fresh(x), actual)
report.revert()
with torch.no_grad():
    assert torch.equal(model(x), expected)
print(f"burnish {burnish.__version__} from {package.name}: swap, save, load and revert work")
