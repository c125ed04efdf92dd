"""Build of burnish: the package map and the native libraries.

The native build is one ninja graph: every ``csrc/cpu/*.cpp`` once, every ``csrc/cpu/simd/*.cpp`` once per instruction
set, ``csrc/math_py.cpp`` with pybind11 and, where CUDA is wanted, every ``csrc/cuda/*.cu``. torch must be installed
before the build (``pip install --no-build-isolation .``); CUDA is built when nvcc is found and torch was built for
CUDA, or when ``BURNISH_BUILD_CUDA=1`` asks for it (``=0`` forbids it). ``BURNISH_SANITIZE=1`` adds ASan and UBSan;
``CXX`` and ``CXXFLAGS`` mean what they always mean.

``python setup.py build_native`` builds in place, without installing.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
INCLUDE = ["", ".math", ".cuda", ".cuda.host"]  # folders of csrc whose headers other packages include
FAMILIES = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py"))

TORCH_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-g1"]
WARNINGS = ["-Wall", "-Wextra", "-Wconversion"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
ISA_FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        # GCC 12 warns of its own avx512 headers
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        *("-mavx512vnni", "-mavx512bf16", "-mavx512vbmi", "-mavx512vbmi2"),
    ],
}
# no contraction: a product and a sum round twice, as on the CPU, and every fused multiply-add is spelled
CUDA_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-lineinfo", "-DUSE_CUDA", TORCH_ABI]
CUDA_TARGETS = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100": "compute_100"}


def need(module: str) -> object:
    """Import a build requirement or stop with what to do."""
    try:
        return __import__(module)
    except ImportError as error:
        raise SystemExit(
            f"burnish: the build needs '{module}', which is not installed. Install torch first, then the build tools "
            "(pip install torch && pip install setuptools wheel ninja pybind11), then: "
            "pip install --no-build-isolation ."
        ) from error


def wants_cuda(nvcc: str | None, torch_cuda: str | None) -> bool:
    """Whether to build csrc/cuda: nvcc and a CUDA torch, unless BURNISH_BUILD_CUDA says otherwise."""
    asked = os.environ.get("BURNISH_BUILD_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"burnish: BURNISH_BUILD_CUDA is {asked!r}, expected 0 or 1")
    if asked == "1" and nvcc is None:
        raise SystemExit("burnish: BURNISH_BUILD_CUDA=1, but nvcc was found neither on PATH nor under CUDA_HOME")
    return asked == "1" or (asked == "" and nvcc is not None and torch_cuda is not None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").is_file():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


class Ninja:
    """A build.ninja in the making."""

    def __init__(self) -> None:
        self.text = "ninja_required_version = 1.5\n"

    def rule(self, name: str, command: list[str], depfile: bool = True) -> None:
        self.text += f"rule {name}\n  command = {' '.join(command)}\n  description = {name} $out\n"
        if depfile:
            self.text += "  depfile = $out.d\n  deps = gcc\n"

    def build(self, out: Path, rule: str, sources: list[Path], flags: list[str] | None = None) -> Path:
        inputs = " ".join(escape(path) for path in sources)
        self.text += f"build {escape(out)}: {rule} {inputs}\n"
        if flags:
            self.text += f"  flags = {' '.join(flags)}\n"
        return out


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_graph(build: Path, package: Path) -> None:
    """Write build.ninja for every library; objects go under ``build``, libraries into ``package``."""
    torch = need("torch")
    pybind11 = need("pybind11")
    torch_dir = Path(torch.__file__).parent  # type: ignore[attr-defined]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which("ccache") and "ccache" not in compiler[0]:
        compiler = ["ccache", *compiler]
    sanitize = SANITIZE if os.environ.get("BURNISH_SANITIZE") == "1" else []
    # isystem: the warnings are for our code, not for torch's headers
    ours, torchs = [f"-I{ROOT / 'csrc'}"], ["-isystem", str(torch_dir / "include")]
    ninja = Ninja()
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    compile_common = [*compiler, "-MMD", "-MF", "$out.d", *CXX_FLAGS, *WARNINGS, *sanitize, *extra, *ours]
    ninja.rule("cxx", [*compile_common, TORCH_ABI, *torchs, "$flags", "-c", "$in", "-o", "$out"])
    # torch's folder holds a pybind11 of its own, which torch 2.11 forbids beside the stable ABI
    ninja.rule("cxx_python", [*compile_common, "$flags", "-c", "$in", "-o", "$out"])
    link = [*compiler, "-shared", *sanitize, "$in", "-o", "$out", "$flags"]
    ninja.rule("link", link, depfile=False)

    # what kernels of every device share
    common = [ninja.build(build / "step_arguments.o", "cxx", sources("csrc/step_arguments.cpp"))]
    objects = [ninja.build(build / "cpu" / f"{source.stem}.o", "cxx", [source]) for source in sources("csrc/cpu/*.cpp")]
    for isa, flags in ISA_FLAGS.items():
        for source in sources("csrc/cpu/simd/*.cpp"):
            out = build / "simd" / f"{source.stem}.{isa}.o"
            objects.append(ninja.build(out, "cxx", [source], [f"-DBURNISH_ISA={isa}", *flags]))
    torch_libs = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-Wl,--no-undefined"]
    ninja.build(package / "_native.so", "link", [*objects, *common], torch_libs if not sanitize else torch_libs[:2])

    # the CUDA kernels as plain C++, for tests: GCC does not know nvcc's pragmas
    as_cpp = ["-x", "c++", "-Wno-unknown-pragmas"]
    host = [ninja.build(build / "host" / f"{s.stem}.o", "cxx", [s]) for s in sources("csrc/cuda/host/*.cpp")]
    host += [ninja.build(build / "host" / f"{s.stem}.cu.o", "cxx", [s], as_cpp) for s in sources("csrc/cuda/*.cu")]
    # kernels of other packages run on the same machine: they link to it by this name
    named = ["-Wl,-soname,burnish_emulated.so", *(torch_libs if not sanitize else torch_libs[:2])]
    ninja.build(package / "_emulated.so", "link", [*host, *common], named)

    headers = Path(sysconfig.get_path("include"))
    if (headers / "Python.h").is_file():
        python_flags = ["-isystem", pybind11.get_include(), "-isystem", str(headers)]  # type: ignore[attr-defined]
        math = ninja.build(build / "math_py.o", "cxx_python", sources("csrc/math_py.cpp"), python_flags)
        ninja.build(package / f"_math{sysconfig.get_config_var('EXT_SUFFIX')}", "link", [math])
    else:
        print(f"burnish: no Python.h in {headers}: burnish._math, which only tests use, is not built", file=sys.stderr)

    nvcc = find_nvcc()
    if wants_cuda(nvcc, torch.version.cuda):  # type: ignore[attr-defined]
        gencode = [f"-gencode=arch={virtual},code={real}" for real, virtual in CUDA_TARGETS.items()]
        gencode.append("-gencode=arch=compute_100,code=compute_100")
        cuda_common = [str(nvcc), "-MD", "-MF", "$out.d", *CUDA_FLAGS, *gencode, *ours, *torchs]
        cuda_common += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
        ninja.rule("nvcc", [*cuda_common, "-c", "$in", "-o", "$out"])
        ninja.rule("nvlink", [str(nvcc), "-shared", "-cudart=shared", "$in", "-o", "$out", "$flags"], depfile=False)
        cuda = [ninja.build(build / "cuda" / f"{s.stem}.o", "nvcc", [s]) for s in sources("csrc/cuda/*.cu")]
        cuda_libs = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
        if torch.version.cuda is not None:  # type: ignore[attr-defined]
            cuda_libs.append("-ltorch_cuda")
        ninja.build(package / "_cuda.so", "nvlink", [*cuda, *common], cuda_libs)

    build.mkdir(parents=True, exist_ok=True)
    package.mkdir(parents=True, exist_ok=True)
    (build / "build.ninja").write_text(ninja.text)


def sources(pattern: str) -> list[Path]:
    return sorted(ROOT.glob(pattern))


def run_ninja(build: Path, package: Path) -> None:
    write_graph(build, package)
    try:
        from ninja import BIN_DIR

        binary = str(Path(BIN_DIR) / "ninja")
    except ImportError:
        binary = shutil.which("ninja") or ""
        if not binary:
            need("ninja")
    jobs = os.environ.get("MAX_JOBS")
    subprocess.run([binary, "-C", str(build), *(["-j", jobs] if jobs else [])], check=True, stdout=sys.stderr)


class BuildNative(Command):
    """Build the native libraries into python/burnish."""

    description = "build burnish's native libraries in place"
    user_options: ClassVar = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        run_ninja(ROOT / "build" / "native", ROOT / "python" / "burnish")


class BuildExt(build_ext):
    """setuptools' hook: the one declared extension stands for all native libraries."""

    def run(self) -> None:
        if self.inplace:
            run_ninja(ROOT / "build" / "native", ROOT / "python" / "burnish")
        else:
            run_ninja(Path(self.build_temp).resolve(), Path(self.build_lib).resolve() / "burnish")

    def get_outputs(self) -> list[str]:
        package = (ROOT / "python" if self.inplace else Path(self.build_lib)) / "burnish"
        return [str(path) for path in package.glob("_*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    packages=[
        "burnish",
        *(f"burnish.{path.parent.name}" for path in sorted((ROOT / "python/burnish").glob("*/__init__.py"))),
        *(f"burnish.kernels.{family}" for family in FAMILIES),
        *(f"burnish.include{folder}" for folder in INCLUDE),
    ],
    package_dir={
        "": "python",
        "burnish.include": "csrc",
        **{f"burnish.kernels.{family}": f"kernels/{family}" for family in FAMILIES},
    },
    ext_modules=[Extension("burnish._math", sources=["csrc/math_py.cpp"])],
    cmdclass={"build_ext": BuildExt, "build_native": BuildNative},
)
