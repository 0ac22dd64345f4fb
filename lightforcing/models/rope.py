"""Rotary positions in three axes, as Wan uses them.

The D/2 pairs (2i, 2i+1) of a head are split into D/2 - 2 (D/6) pairs for time and D/6 each for row
and column (integer division; 22, 21, 21 at D = 128). Pair j of an axis with n pairs turns by
position * 10000^(-j / n). Angles are float64: near frame 1000 float32 angles are 6e-5 apart.
"""

from __future__ import annotations

import torch

THETA = 10000.0


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Rotary pairs of a head given to time, row and column.

    Raises:
        ValueError: ``head_dim`` is odd or under 6 (no pair for rows and columns).
    """
    if head_dim % 2 or head_dim < 6:
        raise ValueError(f"head_dim: expected an even number of at least 6, got {head_dim}")
    space = head_dim // 6
    return head_dim // 2 - 2 * space, space, space


def rope_table(
    frames: torch.Tensor, height: int, width: int, head_dim: int, theta: float = THETA
) -> torch.Tensor:
    """The rotation of every token of the given frames, on their device and without a sync.

    ``table[t, i] = exp(1j * angle(t, i))``, tokens in raster order, frames as listed.

    Args:
        frames: absolute frame positions, ``[F]``, any order, repeats allowed.
        height: rows of tokens in a frame.
        width: columns of tokens in a frame.
        head_dim: channels D of a head, even, at least 6.
        theta: base of the wave lengths.

    Returns:
        ``[F * height * width, 1, D / 2]`` complex128; the 1 stands for the heads.
    """
    positions = (
        frames.double(),
        torch.arange(height, device=frames.device, dtype=torch.float64),
        torch.arange(width, device=frames.device, dtype=torch.float64),
    )
    axes = []
    for axis, (position, pairs) in enumerate(zip(positions, axis_pairs(head_dim), strict=True)):
        j = torch.arange(pairs, device=frames.device, dtype=torch.float64)
        angle = position[:, None] * theta ** (-j / pairs)
        shape = [1, 1, 1, pairs]
        shape[axis] = len(position)
        turn = torch.polar(torch.ones_like(angle), angle).view(shape)
        axes.append(turn.expand(len(frames), height, width, pairs))
    return torch.cat(axes, dim=-1).reshape(-1, 1, head_dim // 2)


def apply_rope(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turns the pairs of ``x``; float32 arithmetic (float64 for float64 input), one rounding.

    Args:
        x: ``[B, L, H, D]``, any floating type.
        table: ``[L, 1, D / 2]`` complex, from :func:`rope_table`; or its ``view_as_real``, with
            which a compiler can fuse the turn.

    Returns:
        ``[B, L, H, D]`` in the type of ``x``.
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not table.is_complex():
        a, b = x.to(work).unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = table.to(work).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)
    pairs = torch.view_as_complex(x.to(work).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table.to(pairs.dtype)).flatten(-2).to(x.dtype)
