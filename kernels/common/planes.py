"""Tiles made of planes and taken apart again: plane p of P holds the elements p, P + p, 2 P + p, ... of each row.

A format that decides a group of neighbours at once (a byte of a bitmap, a pair of positions) is expanded plane by
plane, one element of the group after the other, without a thread asking another.
"""

import triton
import triton.language as tl


@triton.jit
def weave(a, b, c, d):
    """[ROWS, 4 COLUMNS] of its four planes."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def disguised(plane):
    """The same bits as another type, back from which a woven tile is cast: Triton 3.9 refuses a transposed operand of a
    matrix unit where nothing stands between it and the weaving."""
    if plane.dtype == tl.int8:
        return plane.to(tl.float8e5, bitcast=True)
    elif plane.dtype == tl.float32:
        return plane.to(tl.int32, bitcast=True)
    else:
        return plane.to(tl.int16, bitcast=True)


@triton.jit
def unweave_pair(tile):
    """The two planes of a tile."""
    return tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 2, 2)))


@triton.jit
def unweave(tile):
    """The four planes of a tile."""
    even, odd = unweave_pair(tile)
    a, c = unweave_pair(even)
    b, d = unweave_pair(odd)
    return a, b, c, d
