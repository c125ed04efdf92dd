"""Triton kernels, one family a package: ``burnish.kernels.quant`` and so on.

Their sources lie in the repository's top-level ``kernels/`` folder and are mapped here by the build. A family is
imported when an op first picks its Triton implementation; importing this package needs nothing.
"""

from pathlib import Path

# an editable install lists the families that were there when it was made: in a checkout new ones are found too
_ROOT = Path(__file__).parents[3]
if (_ROOT / "setup.py").is_file() and Path(__file__).parent == _ROOT / "python" / "burnish" / "kernels":
    __path__.append(str(_ROOT / "kernels"))
