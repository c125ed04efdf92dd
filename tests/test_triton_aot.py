"""Every shipped Triton kernel, compiled ahead of time for sm_80, sm_90, sm_100 and gfx942: no GPU is needed.

Gates: no stack and no local-memory traffic, shared memory within the architecture's limit, the matrix instruction that
the architecture has, no global access narrower than 4 bytes where N and K are multiples of 16, unless the variant says
that it has some, and contraction off. Where operands come by descriptors, the tensor memory accelerator brings all of
them and takes the result; the large products' wgmma are not serialized. The kernels list their variants themselves
(``variants(arch)``), so a new kernel module is covered by existing.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, and TRITON_INTERPRET=1 leaves none to compile", allow_module_level=True)

from burnish.kernels.common.target import ARCHITECTURES  # noqa: E402
from burnish.kernels.common.variants import Variant  # noqa: E402
from burnish.kernels.lowrank import lora_linear, lora_linear_described  # noqa: E402
from burnish.kernels.quant import int8_linear, int8_quantize_rows  # noqa: E402
from burnish.kernels.sparse import bsr_linear, bsr_linear_described  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.gate

KIB = 1024
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: bytes a program may use; sm_80's variants also run on sm_86, sm_89 and sm_120, which have the least
SHARED_LIMIT = {"sm_80": 99 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
#: Triton 3.9 multiplies int8 by tcgen05, 3.6 by mma.sync; of those between, the test asks for either
TCGEN05_INT8 = "UTCIMMA" if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else "IMMA"
#: the instruction for tiles of 64 rows or more, then for fewer, which wgmma and tcgen05 do not take
MATRIX_UNITS = {
    ("sm_80", "int8"): ("IMMA.16832.S8.S8", "IMMA.16832.S8.S8"),
    ("sm_80", "bf16"): ("HMMA.16816.F32.BF16", "HMMA.16816.F32.BF16"),
    ("sm_80", "fp16"): ("HMMA.16816.F32 ", "HMMA.16816.F32 "),
    ("sm_90", "int8"): ("IGMMA.64x", "IMMA.16832.S8.S8"),
    ("sm_90", "bf16"): ("HGMMA.64x", "HMMA.16816.F32.BF16"),
    ("sm_90", "fp16"): ("HGMMA.64x", "HMMA.16816.F32 "),
    ("sm_100", "int8"): (TCGEN05_INT8, "IMMA.16832.S8.S8"),
    ("sm_100", "bf16"): ("UTCHMMA", "HMMA.16816.F32.BF16"),
    ("sm_100", "fp16"): ("UTCHMMA", "HMMA.16816.F32 "),
    ("gfx942", "int8"): ("v_mfma_i32", "v_mfma_i32"),
    ("gfx942", "bf16"): ("v_mfma_f32", "v_mfma_f32"),
    ("gfx942", "fp16"): ("v_mfma_f32", "v_mfma_f32"),
}


def modules() -> Iterator[Any]:
    """Every file of a family."""
    for path in sorted((Path(__file__).parents[1] / "kernels").glob("*/*.py")):
        if path.stem != "__init__":
            yield import_module(f"burnish.kernels.{path.parent.name}.{path.stem}")


def kernel_modules() -> Iterator[Any]:
    """The modules with kernels: all but what is ``common``."""
    return (module for module in modules() if ".common." not in module.__name__)


def all_variants() -> list[Any]:
    return [
        pytest.param(arch, variant, id=f"{arch}-{variant.id}")
        for arch in ARCHITECTURES
        for module in kernel_modules()
        for variant in module.variants(arch)
    ]


def build(arch: str, variant: Variant, even: bool = True) -> Any:
    """``even``: sizes and strides but M are multiples of 16, as Triton finds them at a call."""
    names = variant.kernel.arg_names
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name != "M" and variant.types.get(name, "").startswith("*" if not even else ("*", "i", "f"))
    }
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": False}
    if variant.registers is not None and arch != "gfx942":
        options["maxnreg"] = variant.registers
    return triton.compile(
        ASTSource(variant.kernel, signature, constants, aligned), target=TARGETS[arch], options=options
    )


def disassemble(cubin: bytes, folder: Path) -> tuple[str, str]:
    """The machine code, and the resources line, of a cubin."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    # no data-flow analysis: it takes a third of the time and changes no instruction
    commands = ([tools / "nvdisasm", "-c", "-ndf", file], [tools / "cuobjdump", "-res-usage", file])
    code, usage = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in commands)
    return code, usage


def expected_unit(arch: str, variant: Variant) -> str | None:
    if variant.unit is None:
        return None
    large, small = MATRIX_UNITS[arch, variant.unit]
    return large if variant.constants["BLOCK_M"] >= 64 else small


@pytest.mark.parametrize(("arch", "variant"), all_variants())
def test_gates(arch: str, variant: Variant, tmp_path: Path) -> None:
    compiled = build(arch, variant)
    assert compiled.metadata.enable_fp_fusion is False
    assert compiled.metadata.shared <= SHARED_LIMIT[arch]
    unit = expected_unit(arch, variant)
    if arch == "gfx942":
        code = compiled.asm["amdgcn"]
        assert re.findall(r"\.private_segment_fixed_size:\s+(\d+)", code) == ["0"], "scratch memory is used"
        assert set(re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", code)) == {"0"}
    else:
        code, usage = disassemble(compiled.asm["cubin"], tmp_path)
        assert re.findall(r"STACK:(\d+)", usage) == ["0"], usage
        assert not re.findall(r"\b(?:LDL|STL)\b[.\w]*", code), "registers are spilled to local memory"
        narrow = re.findall(r"\b(?:LDG|STG|LDGSTS)\S*\.[US](?:8|16)\b", code)
        assert variant.narrow or not narrow, "narrow global accesses"
        if variant.described:
            assert {"UTMALDG", "UTMASTG"} <= set(re.findall(r"\bUTMA[A-Z]+", code)), "not by descriptors"
            assert "LDGSTS" not in code, "threads copy operands themselves"
        if variant.unit is None:
            # NVIDIA's own fp64 functions spell theirs
            contracted = re.findall(r"\bfma\S*(?<!\.f64)\s", compiled.asm["ptx"])
            assert not contracted, "a multiplication and an addition were contracted"
    if unit is not None:
        assert unit in code, f"no {unit}; matrix instructions: {set(re.findall(r'[A-Z]*MMA[.A-Z0-9x]*', code))}"


UNDER_WAY = [
    pytest.param(variant, id=variant.id)
    for module in (lora_linear, lora_linear_described, bsr_linear, bsr_linear_described)
    for variant in module.variants("sm_90")
    if variant.constants["BLOCK_M"] >= 64
]


@pytest.mark.parametrize("variant", UNDER_WAY)
def test_wgmma_is_not_serialized(variant: Variant, tmp_path: Path) -> None:
    """ptxas waits for each wgmma before the next one where something else writes sums in between, and says so."""
    source = tmp_path / "kernel.ptx"
    source.write_text(build("sm_90", variant).asm["ptx"])
    command = [get_ptxas(90).path, "-arch=sm_90a", source, "-o", tmp_path / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "serialized" not in said.stdout + said.stderr


def test_every_kernel_has_variants() -> None:
    """A kernel launched by a module but compiled for no architecture would escape the gates; some have theirs."""
    for module in kernel_modules():
        kernels = {name for name in vars(module) if re.search(r"_kernel($|_)", name)}
        for arch in getattr(module, "ARCHITECTURES", ARCHITECTURES):
            assert {variant.kernel.__name__ for variant in module.variants(arch)} >= kernels, (module.__name__, arch)


def test_every_launch_turns_contraction_off() -> None:
    """Triton's default differs between versions, and bit-exact rounding needs it off."""
    total = 0
    for module in modules():
        source = inspect.getsource(module)
        launches = len(re.findall(r"_kernel\w*\[", source))
        off = len(re.findall(r"(?<!`)enable_fp_fusion=False", source)) + source.count("**tile.options")
        assert launches == off, module.__name__
        total += launches
    assert total


QUANTIZING = [
    pytest.param(variant, even, id=f"{variant.id}-{'even' if even else 'odd'}")
    for module in (int8_linear, int8_quantize_rows)
    for variant in module.variants("sm_90")
    if "bwd" not in variant.id
    for even in (True, False)
]


@pytest.mark.parametrize(("variant", "even"), QUANTIZING)
def test_codes_are_stored_as_they_are(variant: Variant, even: bool, tmp_path: Path) -> None:
    """ptxas 12.8, which is Triton 3.6's, converts a float to a byte where a kernel stores the float's low byte."""
    code, _ = disassemble(build("sm_90", variant, even).asm["cubin"], tmp_path)
    assert not re.findall(r"\bF2IP?\.[SU]8\S*", code)
