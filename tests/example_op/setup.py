"""Compiles the kernels against LibTorch's stable ABI, one binary for every torch from 2.10 on: softcap.cpp for the CPU,
softcap.cu for GPUs where nvcc and a CUDA build of torch are there, and softcap.cu as plain C++, to be run on the CPU in
tests, on the machine that burnish's own library brings."""

import os
import shutil
import subprocess
from pathlib import Path

import burnish
import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH = Path(torch.__file__).parent
COMMON = ["-std=c++20", "-O2", "-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{burnish.get_include()}"]
COMMON += ["-isystem", str(TORCH / "include")]
LINK = [f"-L{TORCH / 'lib'}", "-ltorch_cpu"]


class Build(build_ext):
    def run(self) -> None:
        out = Path("." if self.inplace else self.build_lib) / "softcap_ops"
        out.mkdir(parents=True, exist_ok=True)
        compiler = [os.environ.get("CXX", "g++"), *COMMON, "-fPIC", "-ffp-contract=off", "-g1"]
        self._compile([*compiler, "softcap_ops/softcap.cpp", *LINK], out / "_kernels.so")
        machine = Path(burnish.__file__).parent / "_emulated.so"
        self._compile([*compiler, "-x", "c++", "softcap_ops/softcap.cu", "-x", "none", str(machine), *LINK],
                      out / "_emulated.so")  # fmt: skip
        if shutil.which("nvcc") and torch.version.cuda:
            nvcc = ["nvcc", *COMMON, "-fmad=false", "-DUSE_CUDA", "-Xcompiler=-fPIC", "-arch=all-major"]
            self._compile([*nvcc, "softcap_ops/softcap.cu", *LINK, "-ltorch_cuda", "-cudart=shared"], out / "_cuda.so")

    @staticmethod
    def _compile(command: list[str], out: Path) -> None:
        subprocess.run([*command, "-o", str(out)], check=True)


setup(ext_modules=[Extension("softcap_ops._kernels", sources=[])], cmdclass={"build_ext": Build})
