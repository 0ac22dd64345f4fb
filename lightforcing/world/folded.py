"""Blocks compiled once for every size of clip.

Compiling is a tenth of the training time, and each new shape would cost it again. But 16 sequences
of 64 px have as many tokens as 4 of 128 px, and in Morton order a frame of 1024 tokens is 4 runs of
256. So all batches are folded into one shape: long frames are cut into runs, short sequences are
chained. Who sees whom then stands in the tables of one block mask, which are overwritten.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..models import CausalWan
from .data import CHUNK
from .layout import Layout

TABLES = [
    side + part
    for side in ("kv_", "full_kv_", "q_", "full_q_")
    for part in ("num_blocks", "indices")
]


class Folded:
    """The blocks of a model in one shape, and attention under the mask of the current layout.

    ``blocks`` and ``attend`` are what :meth:`CausalWan.forward_frames` takes, after :meth:`use`.
    """

    def __init__(
        self,
        model: CausalWan,
        rows: int,
        tokens: int,
        *,
        block: int = 128,
        compiler: Callable | None = None,
    ) -> None:
        """Compiles nothing yet: that happens in the first forward and backward.

        Args:
            model: whose blocks are used.
            rows: sequences of the folded shape; every batch is a multiple of it.
            tokens: tokens T of a folded frame; every frame is a multiple of it.
            block: side of the mask's blocks in tokens; every chunk is a multiple of it.
            compiler: takes a block; None is :func:`torch.compile`.
        """
        if compiler is None:
            limit = "recompile_limit"
            limit = limit if hasattr(torch._dynamo.config, limit) else "cache_size_limit"
            setattr(torch._dynamo.config, limit, 64)
            compiler = _compile
        self.rows, self.tokens, self.block = rows, tokens, block
        self.split = self.chain = 1
        self.blocks = [self._fold(compiler(b)) for b in model.blocks]
        self.masks, self.current, self.used = {}, None, None

    def use(self, layout: Layout, frame_tokens: int, batch: int) -> None:
        """The next forward has ``batch`` sequences of this layout.

        Raises:
            ValueError: they do not fold into the shape.
        """
        chunk = CHUNK * frame_tokens
        if batch % self.rows or frame_tokens % self.tokens or chunk % self.block:
            raise ValueError(
                f"batch: {batch} sequences with {frame_tokens} tokens a frame do not fold into "
                f"{self.rows} with {self.tokens}"
            )
        self.split, self.chain = frame_tokens // self.tokens, batch // self.rows
        key = id(layout), self.chain
        if key not in self.masks:
            one = layout.sees.repeat_interleave(chunk // self.block, 0)
            one = one.repeat_interleave(chunk // self.block, 1)
            sees = torch.block_diag(*[one.float()] * self.chain).bool()
            self.masks[key] = sees, self._mask(sees)
        sees, mask = self.masks[key]
        if self.current is None or self.current[0].shape != sees.shape:
            # The rule reads this very table, also where somebody evaluates it without blocks.
            sees = sees.clone()
            self.current = sees, self._mask(sees)
            self._bind()
        elif self.used != key:
            self.current[0].copy_(sees)
            for name in TABLES:
                if getattr(mask, name) is not None:
                    getattr(self.current[1], name).copy_(getattr(mask, name))
        self.used = key

    def _mask(self, sees):
        from torch.nn.attention.flex_attention import create_block_mask

        block, length = self.block, len(sees) * self.block
        return create_block_mask(
            lambda b, h, q, k: sees[q // block, k // block],
            None,
            None,
            length,
            length,
            device=sees.device,
            BLOCK_SIZE=block,
        )

    def _bind(self):
        from torch.nn.attention.flex_attention import flex_attention

        mask = self.current[1]

        def attend(q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return flex_attention(q, k, v, block_mask=mask).transpose(1, 2)

        self.attend = attend

    def _fold(self, block):
        def forward(x, e, grid_sizes, freqs, context, attend, *rest):
            count, frames, tokens, _ = x.shape
            split, chain = self.split, self.chain
            # Under autocast the first block alone would get bfloat16, and be a second graph.
            y = x.float().unflatten(2, (split, -1)).flatten(1, 2)  # [B, F split, T, C]
            y = y.unflatten(0, (-1, chain)).flatten(1, 2)
            e = e.repeat_interleave(split, 1).unflatten(0, (-1, chain)).flatten(1, 2)
            y = block(y, e, None, freqs.repeat(chain, 1, 1, 1), context, attend)
            return y.reshape(count, frames, tokens, -1)

        return forward


def _compile(block):
    return torch.compile(block, dynamic=False)
