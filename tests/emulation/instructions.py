"""What the tests of single instructions share: their kernels' library on the CPU or a GPU, and operands of products."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import planted
import pytest
import torch

TORCH = Path(torch.__file__).parent
SEEDS = range(50)


def build_for_gpu(source: Path, library: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    flags = ["-std=c++20", "-O2", "-fmad=false", "-shared", "-Xcompiler=-fPIC", f"-arch=sm_{major}{minor}"]
    includes = [f"-I{planted.ROOT / 'csrc'}", "-isystem", str(TORCH / "include")]
    links = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ltorch_cuda", "-cudart=shared"]
    defines = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    subprocess.run(["nvcc", *flags, *defines, *includes, str(source), *links, "-o", str(library)], check=True)


def library(source: Path, device: str, folder: Path) -> ctypes.CDLL:
    """The kernels of a source, built once in a folder of the test run."""
    if device == "cuda" and not (torch.cuda.is_available() and shutil.which("nvcc")):
        pytest.skip("needs a GPU and nvcc")
    build = build_for_gpu if device == "cuda" else planted.build
    return ctypes.CDLL(str(planted.build_once(folder, f"{source.stem}-{device}.so", lambda to: build(source, to))))


def call(function: ctypes._NamedFuncPointer, name: str, how: object, seed: int, device: str,
         inputs: tuple[np.ndarray, ...], y: np.ndarray) -> np.ndarray:  # fmt: skip
    """What an instruction makes of y."""
    arrays = [*inputs, *[np.zeros(32, np.uint32)] * (3 - len(inputs)), y]
    tensors = [torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).copy()).to(device) for array in arrays]
    function.restype = ctypes.c_char_p
    message = function(name.encode(), how, ctypes.c_uint64(seed), *(ctypes.c_void_p(t.data_ptr()) for t in tensors))
    assert message is None, message
    return tensors[3].cpu().numpy().view(y.dtype).reshape(y.shape)


def words(draw: np.random.Generator, *shape: int) -> np.ndarray:
    return draw.integers(0, 2**32, shape, dtype=np.uint32)


def signed(array: np.ndarray) -> np.ndarray:
    return array.view(np.int32)


# --- operands of products

ENCODE = {
    "bf16": (lambda x: torch.from_numpy(x.astype(np.float32)).bfloat16().view(torch.int16).numpy(), 2),
    "fp16": (lambda x: x.astype(np.float16).view(np.int16), 2),
    "int8": (lambda x: x.astype(np.int8), 4),
    "uint8": (lambda x: x.astype(np.uint8), 4),
}


def sparse_rows(draw: np.random.Generator, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two of every four values of each row kept, the others zero, none of the kept ones; and their places [.., 2]."""
    places = np.sort(draw.permuted(np.tile(np.arange(4), (*rows.shape[:1], rows.shape[1] // 4, 1)), axis=2)[..., :2], 2)
    fours = np.where(rows == 0, 1, rows).reshape(len(rows), -1, 4)
    kept = np.zeros_like(fours)
    np.put_along_axis(kept, places, np.take_along_axis(fours, places, 2), 2)
    return kept.reshape(rows.shape), places


def metadata(places: np.ndarray, kind: str, selector: int) -> np.ndarray:
    """The word of places that each lane brings; lanes that nothing is asked of bring noise."""
    lanes = words(np.random.default_rng(9), 32)
    digits = (places[..., 0] | places[..., 1] << 2).astype(np.uint64)  # [16, K / 4]
    bits: dict[int, list[int]] = {}
    for row, four in np.ndindex(digits.shape):
        if kind == "int8":  # eight groups of four make a word; a row's two words are lanes 0, 2 or 1, 3 of its four
            lane, bit = row % 8 * 4 + row // 8 + four // 8 * 2, four % 8 * 4
        else:  # four groups make half a word, the lower for the upper rows
            lane, bit = row % 8 * 4 + selector * 2 + four // 4, row // 8 * 16 + four % 4 * 4
        bits.setdefault(lane, []).append(int(digits[row, four]) << bit)
    for lane, parts in bits.items():
        lanes[lane] = sum(parts)
    return lanes


def compressed(rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    return np.take_along_axis(rows.reshape(len(rows), -1, 4), places, 2).reshape(len(rows), -1)


def operands(
    draw: np.random.Generator, a: str, b: str, k: int, exact: bool, rows: int = 16, columns: int = 8
) -> tuple[np.ndarray, ...]:
    """A [rows, k], B [k, columns] and C [rows, columns] whose elements their kinds hold; ``exact`` if every order sums
    to the same."""
    if a.endswith("int8"):
        low, high = {"int8": (-128, 128), "uint8": (0, 256)}[a], {"int8": (-128, 128), "uint8": (0, 256)}[b]
        c = draw.integers(-(2**31), 2**31, (rows, columns)).astype(np.int32)  # sums wrap around
        return draw.integers(*low, (rows, k)), draw.integers(*high, (k, columns)), c
    if exact:
        return (*(draw.integers(-8, 9, shape).astype(np.float64) for shape in ((rows, k), (k, columns))),
                draw.integers(-8, 9, (rows, columns)).astype(np.float32))  # fmt: skip
    half = torch.bfloat16 if a == "bf16" else torch.float16
    left, right = (
        torch.from_numpy(draw.normal(size=shape)).to(half).double().numpy() for shape in ((rows, k), (k, columns))
    )
    return left, right, draw.normal(size=(rows, columns)).astype(np.float32)


def check_product(
    got: np.ndarray, lay: Callable[[np.ndarray], np.ndarray], a: np.ndarray, b: np.ndarray, c: np.ndarray, exact: bool
) -> None:
    """That ``got`` is a @ b + c as ``lay`` spreads it over lanes."""
    if c.dtype == np.int32:
        assert np.array_equal(got, lay((a.astype(np.int64) @ b + c).astype(np.int32)))
    elif exact:
        assert np.array_equal(got, lay((a @ b + c).astype(np.float32)))
    else:
        size = lay(np.abs(a) @ np.abs(b) + np.abs(c))
        assert (np.abs(got - lay(a @ b + c)) <= 2**-21 * size).all()
