"""The layers of a causal Wan.

With a cache each block makes one dense call ``attention(q, k, v)``, looked up in this module:
[B, L, H, D], q and k already roped, the query being the last rows of the keys. That call is what
:func:`lightforcing.patch` replaces.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .cache import write_chunk
from .config import PATCH, WanConfig
from .rope import apply_rope


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Dense attention of [B, L, H, D] tensors; ``mask`` is True where a query sees a key."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


class RMSNorm(nn.Module):
    """RMS norm over the last axis: computed in float32, rounded, then scaled.

    The axis is all C = H * D channels in Wan, the D channels of a head with ``qk_norm="head"``.
    """

    def __init__(self, dim: int, eps: float) -> None:
        """``dim`` channels, ``eps`` added to the mean square."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last axis."""
        work = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(work), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class _Attention(nn.Module):
    """Projections shared by self- and cross-attention."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_by_head = config.qk_norm == "head"
        normed = config.head_dim if self.norm_by_head else config.dim
        self.norm_q = RMSNorm(normed, config.eps)
        self.norm_k = RMSNorm(normed, config.eps)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, C] to [B, L, H, D]."""
        return x.unflatten(2, (self.num_heads, -1))

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised queries of [B, L, C] tokens, [B, L, H, D], not roped."""
        if self.norm_by_head:
            return self.norm_q(self.split(self.q(x)))
        return self.split(self.norm_q(self.q(x)))

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised keys of [B, L, C] tokens, [B, L, H, D], not roped."""
        if self.norm_by_head:
            return self.norm_k(self.split(self.k(x)))
        return self.split(self.norm_k(self.k(x)))


class CausalSelfAttention(_Attention):
    """Attention of a chunk to itself and to the cached past."""

    def __init__(self, config: WanConfig) -> None:
        """Takes sizes, window and sink from ``config``."""
        super().__init__(config)
        # Named and counted as in the AR code bases: frames, -1 for no window.
        self.local_attn_size = -1 if config.window_frames is None else config.window_frames
        self.sink_size = config.sink_frames
        self.token_order = config.token_order  # which tokens a patch takes for a tile

    def forward(
        self,
        x: torch.Tensor,
        grid_sizes: torch.Tensor,
        freqs: torch.Tensor,
        mask: torch.Tensor | Callable | None = None,
        kv_cache: dict | None = None,
        current_start: int = 0,
    ) -> torch.Tensor:
        """Attends, and writes the chunk's keys and values to ``kv_cache`` if there is one.

        Args:
            x: normalised and modulated tokens, ``[B, L, C]``.
            grid_sizes: frames, rows and columns of tokens, ``[B, 3]`` int64 on the CPU.
            freqs: rotation of each token, ``[L, 1, D / 2]`` complex, or as real pairs.
            mask: without a cache only: ``[L, L]`` bool, or a function that attends under a mask of
                its own, (q, k, v) [B, L, H, D] to the same.
            kv_cache: cache dict of this layer (:mod:`lightforcing.models.cache`).
            current_start: first token of the chunk, counted over the whole video.

        Returns:
            ``[B, L, C]``.
        """
        v = self.split(self.v(x))
        # Under autocast the norms' gains make q and k float32 again.
        q = apply_rope(self.queries(x), freqs).to(v.dtype)
        k = apply_rope(self.keys(x), freqs).to(v.dtype)
        if kv_cache is None:
            y = mask(q, k, v) if callable(mask) else attention(q, k, v, mask)
        else:
            frame_tokens = int(grid_sizes[0, 1] * grid_sizes[0, 2])
            sink, rolling = self.sink_size * frame_tokens, self.local_attn_size != -1
            end = write_chunk(kv_cache, k, v, current_start, sink, rolling)
            y = attention(q, kv_cache["k"][:, :end], kv_cache["v"][:, :end])
        return self.o(y.flatten(2))


class CrossAttention(_Attention):
    """Attention to the text, whose keys and values are computed once a rollout."""

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | None, cache: dict | None
    ) -> torch.Tensor:
        """Attends from ``x`` [B, L, C] to ``context`` [B, text_len, C] or to the filled cache."""
        q = self.queries(x)
        if cache:
            k, v = cache["k"], cache["v"]
        else:
            k = self.keys(context)
            v = self.split(self.v(context))
            if cache is not None:
                cache.update(k=k, v=v)
        return self.o(attention(q, k, v).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention and MLP, modulated by the timestep of each frame."""

    def __init__(self, config: WanConfig) -> None:
        """Takes all sizes from ``config``."""
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = CausalSelfAttention(config)
        self.norm3 = nn.LayerNorm(dim, eps) if config.cross_attention else None
        self.cross_attn = CrossAttention(config) if config.cross_attention else None
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, dim),
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self,
        x: torch.Tensor,
        e: torch.Tensor,
        grid_sizes: torch.Tensor,
        freqs: torch.Tensor,
        context: torch.Tensor | None,
        mask: torch.Tensor | Callable | None = None,
        kv_cache: dict | None = None,
        text_cache: dict | None = None,
        current_start: int = 0,
    ) -> torch.Tensor:
        """Runs the block.

        Args:
            x: tokens by frame, ``[B, F, T, C]``.
            e: modulation of each frame, ``[B or 1, F or 1, 6, C]``.
            grid_sizes: ``[B, 3]`` int64 on the CPU.
            freqs: ``[F T, 1, D / 2]`` complex, or as real pairs.
            context: embedded text, ``[B, text_len, C]``; None if cached or not used.
            mask: ``[F T, F T]`` bool or a function, without a cache only.
            kv_cache: cache dict of this layer.
            text_cache: text dict of this layer.
            current_start: first token of the chunk, counted over the whole video.

        Returns:
            ``[B, F, T, C]``.
        """
        e = (self.modulation.unsqueeze(1) + e).chunk(6, dim=2)  # each [B, F, 1, C]
        y = (self.norm1(x) * (1 + e[1]) + e[0]).flatten(1, 2)
        y = self.self_attn(y, grid_sizes, freqs, mask, kv_cache, current_start)
        x = x + y.view_as(x) * e[2]
        if self.cross_attn is not None:
            y = self.cross_attn(self.norm3(x).flatten(1, 2), context, text_cache)
            x = x + y.view_as(x)
        return x + self.ffn(self.norm2(x) * (1 + e[4]) + e[3]) * e[5]


class Head(nn.Module):
    """Tokens back to patches of the velocity."""

    def __init__(self, config: WanConfig) -> None:
        """Takes all sizes from ``config``."""
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, math.prod(PATCH) * config.out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """``x`` is [B, F, T, C], ``e`` is [B or 1, F or 1, C]; returns [B, F, T, 4 out_dim]."""
        shift, scale = (self.modulation.unsqueeze(1) + e.unsqueeze(2)).chunk(2, dim=2)
        return self.head(self.norm(x) * (1 + scale) + shift)
