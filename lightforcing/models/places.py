"""Where tokens are: their order in a frame, and what a moving camera tells of the world.

Two options of :class:`WanConfig` that released Wans do not have. With ``token_order="morton"`` any
4, 16 or 64 consecutive tokens of a frame whose sides are powers of two are a 2 x 2, 4 x 4 or 8 x 8
tile, so that a key block is a patch of the picture instead of a strip. With ``camera=True`` every
token is told where it looks: additively, while rotary positions stay those of the view.
"""

from __future__ import annotations

import functools
import math

import torch

from .config import PATCH

WAVES = 16
PLACE_FEATURES = 4 * 2 * WAVES
"""Cosines and sines of world row, world column, view row and view column."""


def morton_order(height: int, width: int) -> torch.Tensor:
    """Raster index of every token in Morton (Z) order, ``[height * width]`` int64 on the CPU."""
    row = torch.arange(height)[:, None].expand(height, width)
    column = torch.arange(width)[None].expand(height, width)
    code = torch.zeros(height, width, dtype=torch.int64)
    for bit in range(max(height, width, 2).bit_length()):
        code |= ((column >> bit) & 1) << (2 * bit) | ((row >> bit) & 1) << (2 * bit + 1)
    return code.flatten().argsort()


@functools.lru_cache(maxsize=16)
def token_order(height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`morton_order` and its inverse on ``device``, copied there once."""
    order = morton_order(height, width)
    return order.to(device), order.argsort().to(device)


def place_features(camera: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """What a token knows of its place, ``[B, F, height * width, 128]`` in raster order.

    World rows wrap around after ``height`` tokens: their waves have 16 k / 32 turns a token, those
    that do not close after ``height`` tokens left out (0). The other three coordinates have
    16 wave lengths from 2 to 128 tokens.

    Args:
        camera: row and column of the view's corner in the world, in latent pixels, ``[B, F, 2]``
            float32 or float64.
        height: rows of tokens in a frame, at most 32 for rows that wrap exactly.
        width: columns of tokens in a frame.
    """
    batch, frames = camera.shape[:2]
    like = dict(device=camera.device, dtype=camera.dtype)
    row = torch.arange(height, **like)
    column = torch.arange(width, **like)
    turn = torch.arange(1, WAVES + 1, **like) / (2 * WAVES)  # turns a token: the last is Nyquist
    closes = (turn * height).frac() == 0
    falling = 0.5 * (1 / 64) ** (torch.arange(WAVES, **like) / (WAVES - 1))

    def waves(place, turns):
        angle = 2 * math.pi * place[..., None] * turns
        return torch.cat([angle.cos(), angle.sin()], -1)

    world_row = (row + camera[:, :, :1] / PATCH[1]).remainder(height)  # [B, F, h]
    world_column = column + camera[:, :, 1:] / PATCH[2]
    world_row = waves(world_row, turn) * closes.to(camera.dtype).repeat(2)
    size = (batch, frames, height, width, 2 * WAVES)
    parts = [
        world_row[:, :, :, None],
        waves(world_column, falling)[:, :, None],
        waves(row, falling)[:, None],
        waves(column, falling),
    ]
    return torch.cat([x.expand(size) for x in parts], -1).flatten(2, 3)
