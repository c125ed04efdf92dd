"""Every csrc/cuda/*.cu, compiled for sm_80, sm_90a and sm_100 with the build's own flags: no GPU is needed.

Gates: no warning; no stack frame, no spill and no local-memory access in the machine code ("0 spills" alone can hide a
stack); registers for a full block of the kernel's launch bounds; and for each wrapper of ptx.cuh that the file calls,
the instruction that it promises. The files are found by themselves, so a new kernel is covered by existing.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gate

ROOT = Path(__file__).parents[1]
INSTRUCTIONS = ROOT / "tests" / "emulation" / "instructions.cu"  # calls every wrapper
SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), INSTRUCTIONS]
REGISTERS = 65536  # of a multiprocessor, on every architecture built for
#: instructions by the wrapper that stands for them
PROMISED = {
    "load_global": r"LDG\.E\.128 ",
    "store_global": r"STG\.E\.128 ",
    "load_streaming": r"LDG\.E\S*\.128\S*\.CONSTANT",
    "copy_async16": r"LDGSTS\.E\.BYPASS\.128",
    "copy_async<8>": r"LDGSTS\.E\.64",
    "copy_async<4>": r"LDGSTS\.E \[",
    "copy_async_wait": r"LDGDEPBAR[\s\S]*DEPBAR\.LE",
    "draw_ticket": r"ATOMG?\S*\.ADD\S*STRONG\.GPU",
    # without a use for the old value, with one, and in shared memory, where some kinds are loops
    "atomic_add": r"\b(REDG?\.E|ATOMG\.E|ATOMS)\.(ADD|POPC\.INC|CAST\.SPIN)",
    "atomic_max": r"\b(REDG?\.E|ATOMG\.E|ATOMS)\.(MAX|CAST\.SPIN)",
    "atomic_min": r"\b(REDG?\.E|ATOMG\.E|ATOMS)\.(MIN|CAST\.SPIN)",
    "atomic_exchange": r"\b(ATOMG\.E|ATOMS)\.EXCH",
    "atomic_compare_exchange": r"\b(ATOMG\.E|ATOMS)\.CAS\b",
    "shuffle": r"SHFL\.IDX",
    "shuffle_xor": r"SHFL\.BFLY",
    "shuffle_up": r"SHFL\.UP",
    "shuffle_down": r"SHFL\.DOWN",
    "vote_any": r"VOTE\.ANY",
    "vote_all": r"VOTE\.ALL",
    "ballot": r"VOTE\.ANY R",
    "reduce_add": r"REDUX\.SUM",
    "reduce_min": r"REDUX\.MIN",
    "reduce_max": r"REDUX\.MAX",
    "reduce_and": r"REDUX UR",
    "reduce_or": r"REDUX\.OR",
    "reduce_xor": r"REDUX\.XOR",
    "barrier_sync": r"BAR\.SYNC\S* (?!0x0 )",  # that one is __syncthreads
    "barrier_arrive": r"BAR\.ARV",
    "grid_barrier": r"LD\S*\.STRONG\.GPU",
    "cluster_barrier": r"UCGABAR_ARV[\s\S]*UCGABAR_WAIT",
    "load_remote": r"\bLD\.E ",
    "store_remote": r"\bST\.E ",
    "dependency_wait": r"ACQBULK",
    "dependents_start": r"PREEXIT",
    "lop3": r"LOP3\.LUT",
    "prmt": r"PRMT",
    "popcount": r"\bPOPC\b",
    "highest_bit": r"\bFLO\.U32\b",
    "dp4a": r"IDP\.4A\.[SU]8\.[SU]8",
    "pack_fp16": r"F2FP\.(F16\.F32\.)?PACK_AB",
    "pack_bf16": r"F2FP\.BF16\.(F32\.)?PACK_AB",
    "float_from_fp16": r"HADD2\.F32",
    "load_matrix": r"LDSM\.16\.M88",
    "load_matrix_transposed": r"LDSM\.16\.MT88",
    "mma": r"[HI]MMA\.168",  # the types may be a template's
    "mma<bf16>": r"HMMA\.16816\.F32\.BF16 ",
    "mma<fp16>": r"HMMA\.16816\.F32 ",
    "mma<int8_t>": r"IMMA\.16832\.S8\.S8",
    "mma<int8_t, uint8_t>": r"IMMA\.16832\.S8\.U8",
    "mma<uint8_t, int8_t>": r"IMMA\.16832\.U8\.S8",
    "mma<uint8_t>": r"IMMA\.16832\.U8\.U8",
    "mma_sparse": r"[HI]MMA\.SP\.168",
    "mma_sparse<int8_t>": r"IMMA\.SP\.16864\.S8\.S8",
}
#: what each kernel of INSTRUCTIONS must hold itself: nvcc makes reductions for atomics, for one, of its own accord
EXACT = {
    "Lop3": [rf"LOP3\.LUT.*, 0x{table:x}, " for table in (0x80, 0xEA, 0x96, 0xE8, 0xCA)],
    "Prmt": [r"PRMT R\d+, R\d+, R\d+, R\d+"],
    "Bits": [PROMISED["popcount"], PROMISED["highest_bit"]],
    "Dp4a": [r"IDP\.4A\.S8\.S8", r"IDP\.4A\.U8\.U8"],
    "Pack": [PROMISED["pack_fp16"], PROMISED["pack_bf16"]],
    "FromFp16": [PROMISED["float_from_fp16"]],
    "Shuffle": [rf"SHFL\.{way} " for way in ("IDX", "BFLY", "UP", "DOWN")],
    "Partial": [r"SHFL\.IDX", r"VOTE\.ANY P", r"VOTE\.ALL P", r"VOTE\.ANY R", r"REDUX U"]
    + [rf"REDUX\.{which} U" for which in ("SUM", "OR", "XOR", "MIN", r"MIN\.S32", "MAX", r"MAX\.S32")],
    "Atomics": [rf"REDG?\.E\.ADD{kind}\.STRONG\.GPU" for kind in ("", r"\.64", r"\.F32\.FTZ\.RN")]
    + [rf"REDG?\.E\.{which}{kind}\.STRONG\.GPU" for which in ("MAX", "MIN") for kind in ("", r"\.S32")]
    + [r"ATOMG\.E\.EXCH", r"ATOMG\.E\.CAS", *(rf"ATOMS\.{which}\b" for which in ("ADD", "MAX", "MIN", "EXCH", "CAS"))],
    "Global": [rf"{which}\.E{width} " for which in ("LDG", "STG") for width in ("", r"\.64", r"\.128")],
    "Copies": [PROMISED["copy_async16"], PROMISED["copy_async<8>"], PROMISED["copy_async<4>"]],
    "Barriers": [r"BAR\.SYNC\S* 0x1, 0x40", r"BAR\.SYNC\S* 0x2, 0x40", r"BAR\.ARV 0x1, 0x40", r"BAR\.ARV 0x2, 0x40"],
    "GridBarrier": [r"ATOMG\.E\.ADD\.STRONG\.GPU[\s\S]*LDG\.E\.STRONG\.GPU"],
    "Cluster": [PROMISED["cluster_barrier"], PROMISED["load_remote"], PROMISED["store_remote"]],
}
#: instructions by the template arguments of mma and mma_sparse, all of which INSTRUCTIONS uses
MATRICES = (
    {
        f"HMMA.{shape}.F32{kind} ": name
        for name, shape in (("mma", "16816"), ("mma_sparse", "SP.16832"))
        for kind in (".BF16", "")
    }
    | {f"IMMA.16832.{a}.{b} ": "mma" for a in ("S8", "U8") for b in ("S8", "U8")}
    | {"IMMA.SP.16864.S8.S8 ": "mma_sparse"}
)
TILES = {f"LDSM.16.{kind}{count} ": "load_matrix" for kind in ("M88", "MT88") for count in ("", ".2", ".4")}
SM_90_ONLY = {"cluster_barrier", "load_remote", "store_remote", "dependency_wait", "dependents_start"}


def build_settings() -> dict[str, Any]:
    """setup.py's constants for the CUDA build, without running it."""
    wanted: dict[str, Any] = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Name) and target.id in ("TORCH_ABI", "CUDA_FLAGS", "CUDA_TARGETS"):
            wanted[target.id] = eval(compile(ast.Expression(node.value), "setup.py", "eval"), {}, wanted)
    return wanted


SETTINGS = build_settings()


@cache
def tool(name: str) -> str:
    """Path of a CUDA tool: on PATH, beside nvcc, or in Triton's package."""
    places = [Path(found)] if (found := shutil.which(name)) else []
    if nvcc := shutil.which("nvcc"):
        places.append(Path(nvcc).resolve().parent / name)
    try:
        import triton

        places.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    except ImportError:
        pass
    for place in places:
        if place.is_file():
            return str(place)
    pytest.skip(f"{name} is not installed")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def compile_cubin(source: Path, arch: str, cubin: Path) -> str:
    """Compiles for one architecture; returns what ptxas says of the kernels."""
    includes = [f"-I{ROOT / 'csrc'}", "-isystem", str(Path(torch.__file__).parent / "include")]
    virtual = SETTINGS["CUDA_TARGETS"][arch]
    return run(
        *(tool("nvcc"), *SETTINGS["CUDA_FLAGS"], *includes, f"-gencode=arch={virtual},code={arch}", "-cubin"),
        *("-Xptxas=-v,-warn-spills", "-Xcompiler=-Wall,-Wextra", "-Werror=all-warnings", str(source), "-o", str(cubin)),
    )


def text_of(source: Path) -> str:
    """A source and what it includes from csrc/cuda, without the wrappers themselves."""
    text = source.read_text()
    for name in re.findall(r'#include "(cuda/\w+\.cuh)"', text):
        if name not in ("cuda/ptx.cuh", "cuda/launch.cuh"):
            text += text_of(ROOT / "csrc" / name)
    return text


def code_of(assembly: str, body: str) -> str:
    """The machine code of one kernel of INSTRUCTIONS."""
    sections = re.findall(rf"\.section\s+\.text\.\S*[^A-Za-z]{len(body)}{body}E[\s\S]*?(?=\.section\s|\Z)", assembly)
    assert len(sections) == 1, f"{len(sections)} kernels are {body}"
    return sections[0]


def max_threads(assembly: str) -> dict[str, int]:
    """The launch bounds of each kernel, from the attributes that the loader reads."""
    bounds = {}
    for section in re.split(r"\n\s*\.section\s+\.nv\.info\.", assembly)[1:]:
        words = re.search(r"EIATTR_MAX_THREADS.*?\.word\s+(0x\w+).*?\.word\s+(0x\w+).*?\.word\s+(0x\w+)", section, re.S)
        kernel = re.match(r'"?([\w$.]+)', section)
        assert kernel is not None, section[:80]
        assert words is not None, f"{kernel[1]} has no launch bounds"
        bounds[kernel[1]] = int(words[1], 16) * int(words[2], 16) * int(words[3], 16)
    return bounds


@pytest.mark.parametrize("arch", SETTINGS["CUDA_TARGETS"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_machine_code(source: Path, arch: str, tmp_path: Path) -> None:
    cubin = tmp_path / "kernel.cubin"
    report = compile_cubin(source, arch, cubin)
    kernels = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r"\s+ptxas info\s+: Used (\d+) registers",
        report,
    )
    assert kernels, report
    for kernel, *memory, _ in kernels:
        assert memory == ["0", "0", "0"], f"{kernel}: stack frame, spill stores, spill loads are {memory}"

    assembly = run(tool("nvdisasm"), str(cubin))
    local = re.findall(r"\b(?:LDL|STL)\b\S*", assembly)
    assert not local, f"{len(local)} local-memory accesses"
    bounds = max_threads(assembly)
    assert sorted(bounds) == sorted(kernel for kernel, *_ in kernels)
    for kernel, *_, registers in kernels:
        assert int(registers) * bounds[kernel] <= REGISTERS, (
            f"{kernel}: {registers} registers x {bounds[kernel]} threads"
        )

    text = text_of(source)
    called = {name for name in PROMISED if re.search(rf"\b{re.escape(name)}[(<]", text)}
    assert called, f"{source.name} calls none of {sorted(PROMISED)}"
    for name in called - (SM_90_ONLY if arch == "sm_80" else set()):
        assert re.search(PROMISED[name], assembly), f"{name}: {PROMISED[name]} is not in the machine code"
    if source == INSTRUCTIONS:
        for body, instructions in EXACT.items():
            for instruction in instructions if (arch, body) != ("sm_80", "Cluster") else ():
                assert re.search(instruction, code_of(assembly, body)), f"{body}: {instruction} is not in its code"
        for instruction, name in (MATRICES | TILES).items():
            assert instruction in assembly, f"{name}: {instruction} is not in the machine code"


def test_flags_forbid_contraction() -> None:
    flags = SETTINGS["CUDA_FLAGS"]
    assert "-fmad=false" in flags
    assert not {"--use_fast_math", "-use_fast_math"} & set(flags)
