"""The exact softmax over all keys, a slab of query rows at a time, in plain torch.

Float32 whatever the input (float64 stays): 16-bit products are exact in it, so no accuracy is lost
where a GPU multiplies 16-bit inputs and adds in float32.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from ..blocks import frame_blocks

# Bytes of one slab of probabilities; its logits take as many. Smaller ones fit a GPU's cache, but
# there a slab costs a quarter of a millisecond of the host: 8 MB 8, 32 MB 34, 128 MB 93 billion
# logits a second on an H100.
SLAB = 128 << 20


def slabs(q: Any, k: Any, rows: int, scale: float | None = None) -> Iterator[tuple]:
    """Probabilities of some heads and some query rows at a time.

    Args:
        q: torch ``[B, Lq, H, D]``.
        k: torch ``[B, Lk, H, D]``.
        rows: a slab is whole blocks of so many rows, but for a short last one.
        scale: of the logits; None is ``D ** -0.5``.

    Yields:
        a slice of the B * H heads, a slice of the Lq rows, and ``[heads, rows, Lk]``.
    """
    import torch

    scale = q.shape[3] ** -0.5 if scale is None else scale
    q, k = (x.transpose(1, 2).flatten(0, 1) for x in (q, k))
    heads, q_len, k_len = q.shape[0], q.shape[1], k.shape[1]
    work = torch.promote_types(q.dtype, torch.float32)
    size = SLAB // work.itemsize // k_len
    step = max(1, size // rows) * rows
    many = max(1, size // min(step, q_len)) if step >= q_len else 1
    bounds = [
        (i, min(i + step, q_len // rows * rows)) for i in range(0, q_len // rows * rows, step)
    ]
    if q_len % rows:
        bounds.append((q_len - q_len % rows, q_len))
    for head in range(0, heads, many):
        some = slice(head, min(head + many, heads))
        keys = k[some].mT
        for begin, end in bounds:
            logits = _product(q[some, begin:end], keys, scale, work)
            yield some, slice(begin, end), logits.softmax(-1)


def _product(q, keys, scale, work):
    import torch

    if q.is_cuda and q.dtype != work:
        # A power of two (heads of 64: 1/8) only moves the exponent: a third less traffic.
        early = math.frexp(scale)[0] == 0.5
        with contextlib.suppress(TypeError):  # before torch 2.8
            if early:
                return torch.bmm(q * scale, keys, out_dtype=work)
            return torch.bmm(q, keys, out_dtype=work).mul_(scale)
    return (q.to(work) * scale) @ keys.to(work)


def over_blocks(p: Any, frame_tokens: int, block: int) -> Any:
    """Sums over the key blocks, which restart at every frame: ``[.., Lk] -> [.., J]``."""
    import torch

    per_frame, full = frame_blocks(frame_tokens, block), frame_tokens // block
    p = p.unflatten(-1, (-1, frame_tokens))
    parts = []
    if full:
        parts.append(p[..., : full * block].unflatten(-1, (full, block)).sum(-1))
    if full < per_frame:
        parts.append(p[..., full * block :].sum(-1, keepdim=True))
    return torch.cat(parts, -1).flatten(-2)


def over_tokens(flags: Any, frame_tokens: int, block: int) -> Any:
    """Each block's flag for its tokens: ``[.., J] -> [.., Lk]``."""
    per_frame = frame_blocks(frame_tokens, block)
    flags = flags.unflatten(-1, (-1, per_frame)).repeat_interleave(block, -1)
    return flags[..., :frame_tokens].flatten(-2)


def block_mass(
    q: Any,
    k: Any,
    *,
    frame_tokens: int,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
) -> Any:
    """Attention mass of each key block, summed over the query block's rows.

    Args:
        q: torch ``[B, Lq, H, D]``.
        k: torch ``[B, Lk, H, D]``, whole frames.
        frame_tokens: T.
        block_q: rows of a query block.
        block_k: tokens of a key block.
        scale: of the logits; None is ``D ** -0.5``.

    Returns:
        Float32 (float64 for such input) ``[B, H, R, J]``; a row of Lq sums to its rows.
    """
    import torch

    batch, heads = q.shape[0], q.shape[2]
    rows = math.ceil(q.shape[1] / block_q)
    blocks = k.shape[1] // frame_tokens * frame_blocks(frame_tokens, block_k)
    work = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(batch * heads, rows, blocks, dtype=work, device=q.device)
    for some, part, p in slabs(q, k, block_q, scale):
        size = min(block_q, part.stop - part.start)
        sums = p.unflatten(1, (-1, size)).sum(2)
        first = part.start // block_q
        out[some, first : first + sums.shape[1]] = over_blocks(sums, frame_tokens, block_k)
    return out.unflatten(0, (batch, heads))
