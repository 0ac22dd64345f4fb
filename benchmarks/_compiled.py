"""The world model with all of a block but its attention compiled: half the time of a row on a GPU.

The attention is not touched: it is the call that ``lightforcing.patch`` replaces, eager, with the
package's own kernels. What stands before it (norm, modulation, q, k, v, their norms and positions)
and after it (projection, residuals, MLP) is the arithmetic of :mod:`lightforcing.models.layers` in
fewer kernels, which round less in between: a dense rollout differs by 0.00 dB.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from lightforcing.models import layers
from lightforcing.models.rope import apply_rope


def _normed(x, gain, eps):
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) * gain


def _before(x, e, modulation, turn, weights, heads, eps):
    """Queries, keys and values ``[B, L, H, D]`` of a block's input ``[B, F, T, C]``."""
    (wq, bq), (wk, bk), (wv, bv), gain_q, gain_k = weights
    e = (modulation.unsqueeze(1) + e).chunk(6, dim=2)
    y = (F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + e[1]) + e[0]).flatten(1, 2)
    q, k, v = (F.linear(y, w, b).unflatten(2, (heads, -1)) for w, b in
               ((wq, bq), (wk, bk), (wv, bv)))  # fmt: skip
    q, k = _normed(q, gain_q, eps), _normed(k, gain_k, eps)
    return apply_rope(q, turn), apply_rope(k, turn), v


def _after(x, y, e, modulation, weights, eps):
    """The block's output, given its input and what its attention made, ``[B, L, H, D]``."""
    (wo, bo), (w1, b1), (w2, b2) = weights
    e = (modulation.unsqueeze(1) + e).chunk(6, dim=2)
    x = x + F.linear(y.flatten(2), wo, bo).view_as(x) * e[2]
    z = F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + e[4]) + e[3]
    z = F.linear(F.gelu(F.linear(z, w1, b1), approximate="tanh"), w2, b2)
    return x + z * e[5]


class _Attention(layers.CausalSelfAttention):
    """The cache and the attention call alone, on queries, keys and values made before."""

    def forward(self, x, grid_sizes, freqs, mask=None, kv_cache=None, current_start=0):
        q, k, v = self.made
        tokens = int(grid_sizes[0, 1] * grid_sizes[0, 2])
        sink, rolling = self.sink_size * tokens, self.local_attn_size != -1
        end = layers.write_chunk(kv_cache, k, v, current_start, sink, rolling)
        return layers.attention(q, kv_cache["k"][:, :end], kv_cache["v"][:, :end])


class _Block(layers.Block):
    def forward(self, x, e, grid_sizes, freqs, context, mask=None, kv_cache=None, text_cache=None,
                current_start=0):  # fmt: skip
        attn, ffn, eps = self.self_attn, self.ffn, self.norm1.eps
        turn = torch.view_as_real(freqs) if freqs.is_complex() else freqs
        three = [(p.weight, p.bias) for p in (attn.q, attn.k, attn.v)]
        gains = attn.norm_q.weight, attn.norm_k.weight
        attn.made = self.before(
            x, e, self.modulation, turn, (*three, *gains), attn.num_heads, attn.norm_q.eps
        )
        y = attn(x, grid_sizes, freqs, mask, kv_cache, current_start)
        attn.made = None
        three = [(p.weight, p.bias) for p in (attn.o, ffn[0], ffn[2])]
        return self.after(x, y, e, self.modulation, three, eps)


def compiled(model, backend="inductor"):
    """A copy of a world model for rollouts whose blocks are compiled apart from their attention.

    Every batch size is compiled anew, 10 to 20 s each.

    Args:
        model: of ``lightforcing.world``, not patched.
        backend: of ``torch.compile``.

    Raises:
        ValueError: the model has text, or norms over all channels.
    """
    if model.config.cross_attention or model.config.qk_norm != "head":
        raise ValueError("model: expected a world model, got one with text or other norms")
    made = copy.deepcopy(model)
    before = torch.compile(_before, dynamic=False, backend=backend)
    after = torch.compile(_after, dynamic=False, backend=backend)
    for block in made.blocks:
        block.__class__, block.self_attn.__class__ = _Block, _Attention
        block.before, block.after = before, after
    return made
