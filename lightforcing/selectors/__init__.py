"""Which key blocks a query block reads: every rival's rule on the same kernels.

    import lightforcing
    lightforcing.patch(pipeline, selector="sta")

A name, or an object with options: ``selector=SlidingTile(window=(6, 3, 3))``. How many blocks a
row keeps is the schedule's affair. :func:`register` adds a selector of yours under a name.
"""

from functools import partial
from numbers import Integral

from . import metrics
from .base import Geometry, Selector, make, names, register, to_dict, token_places
from .budget import Budget
from .builtin import Hsa, Lse, Mass, Mean
from .calibrate import calibrate
from .dense import Dense
from .fine import Fine
from .oracle import Oracle
from .radial import Radial
from .random import Random
from .sparge import Sparge
from .sta import SlidingTile
from .vmoba import Vmoba
from .vsa import Cubes

for _factory in (Dense, Random, SlidingTile, Radial, Mean):
    register(_factory)
register(Sparge, "sparge")
register(partial(Sparge, mode="topp"), "sparge-topp")
register(partial(Sparge, similarity=0.6), "sparge-sim")
register(Vmoba)
register(Cubes, "vsa")
register(partial(Cubes, frames=3), "vsa-cube")
for _factory in (Hsa, Lse, Mass, Fine, Oracle):
    register(_factory)


def select(
    selector,
    q,
    k,
    *,
    frame_tokens,
    sparsity=None,
    kept=None,
    grid=None,
    order="raster",
    block_q=128,
    block_k=64,
    first_frame=None,
    sink_frames=0,
    chunk=1,
    layer=0,
    step=0,
    scale=None,
    **options,
):
    """The list of a selector for given queries and keys.

    Args:
        selector: a name, with ``options``, or an object.
        q: ``[B, Lq, H, D]``, the last Lq tokens of the key sequence.
        k: ``[B, Lk, H, D]``, F whole frames, oldest first.
        frame_tokens: T, tokens of a frame.
        sparsity: share of the key blocks not kept; as in :func:`lightforcing.select_blocks`.
        kept: key blocks of a row, instead.
        grid: rows and columns of a frame's tokens, for selectors that need them.
        order: ``raster`` or ``morton``, how the tokens of a frame lie in it.
        block_q: query rows that share a list.
        block_k: tokens of a key block.
        first_frame: first query frame counted over the video; None: nothing was dropped before.
        sink_frames: first frames that a rolling window never drops.
        chunk: number of the chunk, from 1.
        layer: number of the layer, from 0.
        step: denoising step of the chunk, from 0.
        scale: of the logits; None is ``D ** -0.5``.
        **options: of the selector.

    Returns:
        A :class:`lightforcing.BlockList` of the kind and device of ``q``.

    Raises:
        ValueError: no such selector, sizes disagree, a grid is needed, or neither or both of
            sparsity and kept are given. TypeError: an option that the selector does not have, or
            a grid that is no pair of integers.
    """
    from ..ops import plan_selection

    if (sparsity is None) == (kept is None):
        raise ValueError("kept: expected either sparsity or kept, got neither or both")
    chosen = make(selector, **options)
    if frame_tokens < 1:
        raise ValueError(f"frame_tokens: expected 1 or more, got {frame_tokens}")
    shapes = [tuple(getattr(x, "shape", ())) for x in (q, k)]
    if any(len(s) != 4 for s in shapes) or any(shapes[0][i] != shapes[1][i] for i in (0, 2, 3)):
        raise ValueError(
            "q: expected tensors q and k of the shapes [B, Lq, H, D] and [B, Lk, H, D], "
            f"got {shapes[0]} and {shapes[1]}"
        )
    for name, x in (("q", q), ("k", k)):
        if x.shape[1] % frame_tokens:
            raise ValueError(
                f"{name}: expected whole frames of {frame_tokens} tokens (frame_tokens), "
                f"got {x.shape[1]}"
            )
    frames = q.shape[1] // frame_tokens, k.shape[1] // frame_tokens
    if kept is None:
        kept = plan_selection(
            *frames, frame_tokens, sparsity=sparsity, block_k=block_k, hierarchy=False
        )[1]
    if chosen.needs_grid and grid is None:
        raise ValueError(f"grid: expected rows and columns for selector {chosen.name}, got None")
    if grid is not None:
        listed = tuple(grid) if hasattr(grid, "__iter__") and not isinstance(grid, str) else ()
        if len(listed) != 2 or not all(isinstance(x, Integral) for x in listed):
            raise TypeError(f"grid: expected two integers, rows and columns, got {grid!r}")
        grid = listed
    geometry = Geometry(
        frame_tokens, *frames, kept, block_q, block_k, grid, order, first_frame, sink_frames,
        chunk, layer, step, scale,
    )  # fmt: skip
    return chosen.select(q, k, geometry)


__all__ = ["Budget", "Cubes", "Dense", "Fine", "Geometry", "Hsa", "Lse", "Mass", "Mean", "Oracle",
           "Radial", "Random", "Selector", "SlidingTile", "Sparge", "Vmoba", "calibrate", "make",
           "metrics", "names", "register", "select", "to_dict", "token_places"]  # fmt: skip
