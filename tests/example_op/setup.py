"""Compiles the CPU kernel against LibTorch's stable ABI: one binary for every torch from 2.10 on."""

import os
import subprocess
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH = Path(torch.__file__).parent


class Build(build_ext):
    def run(self) -> None:
        out = Path("." if self.inplace else self.build_lib) / "softcap_ops" / "_kernels.so"
        out.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        torch_flags = ["-isystem", str(TORCH / "include"), f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
        compiler = os.environ.get("CXX", "g++")
        subprocess.run([compiler, *flags, "softcap_ops/softcap.cpp", *torch_flags, "-o", str(out)], check=True)


setup(ext_modules=[Extension("softcap_ops._kernels", sources=[])], cmdclass={"build_ext": Build})
