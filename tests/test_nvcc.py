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
INSTRUCTIONS = ROOT / "tests" / "emulation" / "instructions.cu"  # calls every wrapper of ptx.cuh
WARPGROUP = INSTRUCTIONS.with_name("warpgroup.cu")  # and of warpgroup.cuh
SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), INSTRUCTIONS, WARPGROUP]
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
    "grid_arrive": r"ATOMG\.E\.ADD\.STRONG\.GPU",
    "grid_wait": r"LD\S*\.STRONG\.GPU",
    "grid_barrier": r"LD\S*\.STRONG\.GPU",
    "cluster_barrier": r"UCGABAR_ARV[\s\S]*UCGABAR_WAIT",
    "load_remote": r"\bLD\.E(\.128)? ",
    "store_remote": r"\bST\.E(\.64|\.128)? ",
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
    "load_tile": r"UTMALDG\.2D",
    "load_tile_to": r"UTMALDG\.2D\.MULTICAST",
    "load_tile_to_all": r"UTMALDG\.2D\.MULTICAST",
    "store_tile": r"UTMASTG\.2D",
    "store_tile_commit": r"UTMACMDFLUSH",
    "store_tile_wait": r"DEPBAR\.LE SB0",
    "copies_see_stores": r"FENCE\.VIEW\.ASYNC",
    "copies_see_remote_stores": r"FENCE\.VIEW\.ASYNC",
    "copies_see_global_stores": r"FENCE\.VIEW\.ASYNC",
    "tile_barrier_init": r"SYNCS\.EXCH\.64",
    "tile_barriers_ready": r"SYNCS\.EXCH\.64[\s\S]*FENCE\.VIEW\.ASYNC",
    "tile_barrier_expect": r"SYNCS\.ARRIVE\.TRANS64 RZ, \[[^]]*\], (R|UR)\d",  # with a number of bytes
    "tile_barrier_arrive": r"SYNCS\.ARRIVE\.TRANS64\.A1T0",
    # they wait for the thread's stores, and forget what L1 holds
    "tile_barrier_arrive_remote": r"MEMBAR\.ALL\.GPU[^/]*(/[^/]*){1,12}SYNCS\.ARRIVE\.TRANS64\.RED\.A1T0",
    "tile_barrier_wait_remote": r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT [^/]*(/[^/]*){1,4}CCTL\.IVALL",
    "tile_barrier_wait": r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT",
    "warpgroup_registers": r"USETMAXREG\.",
    "warpgroup_fence": r"WARPGROUP\.ARRIVE",
    "warpgroup_commit": r"[HI]GMMA\.[^;]*, gsb0",  # the last product of a group
    "warpgroup_wait": r"WARPGROUP\.DEPBAR\.LE gsb0",
    "warpgroup_mma": r"HGMMA\.64x(32|64|128|256)x16",
    "warpgroup_mma_sparse": r"[HI]GMMA\.SP\.64x(128|176)x(32|64)",
    "store_matrix_transposed": r"STSM\.16\.MT88\.4",
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
    "Cluster": [PROMISED["cluster_barrier"]]
    + [rf"\b{which}\.E{width} " for which, width in (("LD", ""), ("LD", r"\.128"), ("ST", ""), ("ST", r"\.64"))],
}
#: the same for WARPGROUP, on sm_90a
EXACT_WARPGROUP = {
    "TileBarriers": [PROMISED[f"tile_barrier{which}"] for which in ("_init", "s_ready", "_arrive", "_wait")],
    "StoreRemote": [r"\bST\.E [\s\S]*FENCE\.VIEW\.ASYNC[\s\S]*UCGABAR_ARV[\s\S]*UTMASTG\.2D"],
    "LoadToSome": [PROMISED["load_tile_to"]],
    "LoadToAll": [PROMISED["load_tile_to_all"], r"SYNCS\.ARRIVE\.TRANS64\.RED\.A1T0"],
    "LoadStored": [r"FENCE\.VIEW\.ASYNC[\s\S]*ATOMG\.E\.ADD\.STRONG\.GPU", r"LDG\S*\.STRONG\.GPU"],
    "TileBytes": [PROMISED[name] for name in ("load_tile", "tile_barrier_expect", "tile_barrier_arrive")],
    "Registers": [r"USETMAXREG\.DEALLOC\S* 0x28\b[\s\S]*USETMAXREG\.TRY_ALLOC\S* \S+, 0x80\b"],
    "StoreMatrix": [PROMISED["store_matrix_transposed"], r"LDSM\.16\.MT88\.4"],
    **{f"LoadTile<LNS_7SwizzleE{line}E>": [PROMISED["load_tile"]] for line in (16, 32, 64, 128)},
    **{
        f"StoreTile<LNS_7SwizzleE{line}E>": [
            r"FENCE\.VIEW\.ASYNC[\s\S]*BAR\.SYNC[\s\S]*UTMASTG\.2D[\s\S]*UTMACMDFLUSH[\s\S]*DEPBAR\.LE SB0, 0x0"
        ]
        for line in (16, 32, 64, 128)
    },
}
#: products of WARPGROUP: the type, the bytes of a's lines, N and selector; their instructions by the type
PRODUCTS = [
    *(("NS_4bf16E", *rest) for rest in ((64, 128, 0), (64, 128, 1), (64, 176, 0), (128, 176, 1))),
    *(("NS_4fp16E", *rest) for rest in ((64, 128, 0), (128, 128, 1), (64, 176, 0), (64, 176, 1))),
    *(("a", *rest) for rest in ((64, 128, 0), (128, 128, 0), (64, 176, 0))),
]
PRODUCT = {
    "NS_4bf16E": r"HGMMA\.SP\.64x{}x32\.F32\.BF16 [^;]*, 0x{}, gsb0",
    "NS_4fp16E": r"HGMMA\.SP\.64x{}x32\.F32 [^;]*, 0x{}, gsb0",
    "a": r"IGMMA\.SP\.64x{}x64\.S8\.S8 [^;]*, gsb0",
}
EXACT_WARPGROUP |= {
    f"DenseProduct<{kind}Li{columns // 2}E>": [
        rf"WARPGROUP\.ARRIVE[\s\S]*HGMMA\.64x{columns}x16\.F32{type} [^;]*, gsb0[\s\S]*WARPGROUP\.DEPBAR\.LE gsb0, 0x0"
    ]
    for kind, type in (("NS_4bf16E", r"\.BF16"), ("NS_4fp16E", ""))
    for columns in (32, 64, 128, 256)
}
EXACT_WARPGROUP |= {
    f"Product<{kind}Li{selector}ELi{columns // 2}ELNS_7SwizzleE{line}E>": [
        rf"WARPGROUP\.ARRIVE[\s\S]*{PRODUCT[kind].format(columns, selector)}[\s\S]*WARPGROUP\.DEPBAR\.LE gsb0, 0x0"
    ]
    for kind, line, columns, selector in PRODUCTS
}
#: what ptxas says where it makes products wait for one another, or for the threads, without being asked to
SERIALISED = r".*\(C75\d\d\).*"
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


def text_of(source: Path, arch: str) -> str:
    """A source and what it includes from csrc/cuda, without the wrappers themselves, and without the kernels of
    warpgroup.cuh, in files of their own, where the architecture has none."""
    text = source.read_text()
    included = re.findall(r'#include "(cuda/\w+\.cuh)"', text)
    if "cuda/warpgroup.cuh" in included and arch != "sm_90a":
        return ""
    for name in included:
        if name not in ("cuda/ptx.cuh", "cuda/warpgroup.cuh", "cuda/launch.cuh"):
            text += text_of(ROOT / "csrc" / name, arch)
    return text


def code_of(assembly: str, body: str) -> str:
    """The machine code of one kernel of INSTRUCTIONS or WARPGROUP; template arguments are mangled."""
    name, _, arguments = body.partition("<")
    mangled = f"{len(name)}{name}" + (f"I{arguments.removesuffix('>')}E" if arguments else "") + "E"
    sections = re.findall(rf"\.section\s+\.text\.\S*[^A-Za-z]{mangled}[\s\S]*?(?=\.section\s|\Z)", assembly)
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

    assert not (serialised := re.findall(SERIALISED, report)), serialised
    assembly = run(tool("nvdisasm"), str(cubin))
    local = re.findall(r"\b(?:LDL|STL)\b\S*", assembly)
    assert not local, f"{len(local)} local-memory accesses"
    bounds = max_threads(assembly)
    assert sorted(bounds) == sorted(kernel for kernel, *_ in kernels)
    for kernel, *_, registers in kernels:
        assert int(registers) * bounds[kernel] <= REGISTERS, (
            f"{kernel}: {registers} registers x {bounds[kernel]} threads"
        )

    text = text_of(source, arch)
    called = {name for name in PROMISED if re.search(rf"\b{re.escape(name)}[(<]", text)}
    assert called or not text, f"{source.name} calls none of {sorted(PROMISED)}"
    for name in called - (SM_90_ONLY if arch == "sm_80" else set()):
        assert re.search(PROMISED[name], assembly), f"{name}: {PROMISED[name]} is not in the machine code"
    exact = {INSTRUCTIONS: EXACT, WARPGROUP: EXACT_WARPGROUP if arch == "sm_90a" else {}}.get(source, {})
    for body, instructions in exact.items():
        for instruction in instructions if (arch, body) != ("sm_80", "Cluster") else ():
            assert re.search(instruction, code_of(assembly, body)), f"{body}: {instruction} is not in its code"
    if source == INSTRUCTIONS:
        for instruction, name in (MATRICES | TILES).items():
            assert instruction in assembly, f"{name}: {instruction} is not in the machine code"


EARLY_SUMS = """#include "cuda/warpgroup.cuh"

namespace burnish {
__global__ void __launch_bounds__(kWarpgroup, 1) early_kernel(float* y, uint32_t kept) {
  if constexpr (kHasWarpgroups) {
    const auto* shared = aligned_shared_memory<unsigned char>();
    float sum[64];
    warpgroup_fence();
    warpgroup_mma_sparse<bf16>(sum, shared_tile<Swizzle::k64>(shared), shared_tile<Swizzle::k128>(shared + 8192), kept,
                               false);
    warpgroup_commit();
    WAIT
    for (int i = 0; i < 64; ++i) store(y + i, sum[i]);
    warpgroup_wait<0>();
  }
}
}  // namespace burnish
"""


@pytest.mark.parametrize("wait", ["", "warpgroup_wait<0>();"], ids=["early", "waits"])
def test_products_that_ptxas_serialises_are_seen(wait: str, tmp_path: Path) -> None:
    """Sums that are read while a product is under way: no error, not even a warning."""
    source = tmp_path / "early.cu"
    source.write_text(EARLY_SUMS.replace("WAIT", wait))
    report = compile_cubin(source, "sm_90a", tmp_path / "early.cubin")
    assert bool(re.search(SERIALISED, report)) == (wait == "")


def test_flags_forbid_contraction() -> None:
    flags = SETTINGS["CUDA_FLAGS"]
    assert "-fmad=false" in flags
    assert not {"--use_fast_math", "-use_fast_math"} & set(flags)
