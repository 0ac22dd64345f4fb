"""Small causal models that keep the attention contract in the ways that code bases do.

Every class below is a model of one family in a few lines: where its keys live, whether they move,
what its forward returns. T = 20 tokens a frame (4 x 5), 2 heads of 16, so that with blocks of 16
a frame is one full and one short block.
"""

import gc
import inspect

import pytest
import torch
from torch import nn

from lightforcing import hook

HEIGHT, WIDTH = 4, 5
T = HEIGHT * WIDTH


def attention(q, k, v, q_lens=None, causal=False, softmax_scale=None, dtype=torch.bfloat16):
    """The dense call of all families, [B, L, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).contiguous()


def cross_attention(q, k, v):
    """Not intercepted by its name, though it ends in the same function."""
    return attention(q, k, v)


def rope(x, first_frame):
    """Rotates pairs by the frame number, [B, F*T, H, D]."""
    frame = first_frame + torch.arange(x.shape[1]) // T
    angle = frame[:, None] * 0.7 ** torch.arange(x.shape[3] // 2)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class Projections(nn.Module):
    """What all attention layers share."""

    def __init__(self, dim=32, num_heads=2, local_attn_size=-1, sink_size=0):
        super().__init__()
        self.num_heads, self.local_attn_size, self.sink_size = num_heads, local_attn_size, sink_size
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def qkv(self, x):
        return (m(x).view(*x.shape[:2], self.num_heads, -1) for m in (self.q, self.k, self.v))


class InPlace(Projections):
    """Keys stored roped, written in place, attended as a view; the window moves by two writes."""

    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0,
                cache_start=None):  # fmt: skip
        q, k, v = self.qkv(x)
        if kv_cache is None:
            return self.o((q * k * v).flatten(2))
        first = current_start // (int(grid_sizes[0, 1]) * int(grid_sizes[0, 2]))
        q, k = rope(q, first), rope(k, first)
        size, new, end = kv_cache["k"].shape[1], x.shape[1], current_start + x.shape[1]
        local_end = kv_cache["local_end"] + end - kv_cache["global_end"]
        evicted = local_end - size
        if self.local_attn_size > 0 and end > kv_cache["global_end"] and evicted > 0:
            sink = self.sink_size * T
            kept = kv_cache["local_end"] - evicted - sink
            for name in "kv":
                old = kv_cache[name][:, sink + evicted : sink + evicted + kept].clone()
                kv_cache[name][:, sink : sink + kept] = old
            local_end = size
        kv_cache["k"][:, local_end - new : local_end] = k
        kv_cache["v"][:, local_end - new : local_end] = v
        out = attention(q, kv_cache["k"][:, :local_end], kv_cache["v"][:, :local_end])
        kv_cache["global_end"], kv_cache["local_end"] = end, local_end
        return self.o(out.flatten(2))


class Deferred(Projections):
    """Attends a clone and returns what to write: ``(out, update)``; the model writes at its end."""

    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0,
                cache_start=None, sink_recache_after_switch=False):  # fmt: skip
        q, k, v = self.qkv(x)
        first = current_start // T
        q, k = rope(q, first), rope(k, first)
        end = current_start + x.shape[1]
        keys, values = kv_cache["k"].clone(), kv_cache["v"].clone()
        keys[:, current_start:end], values[:, current_start:end] = k, v
        start = max(0, end - self.local_attn_size * T) if self.local_attn_size > 0 else 0
        out = attention(q, keys[:, start:end], values[:, start:end])
        return self.o(out.flatten(2)), (current_start, end, k, v)


class Raw(Projections):
    """Keys stored without RoPE; a call ropes sink and window anew, from position 0."""

    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0,
                cache_start=None):  # fmt: skip
        q, k, v = self.qkv(x)
        end = current_start + x.shape[1]
        kv_cache["k"][:, current_start:end], kv_cache["v"][:, current_start:end] = k, v
        sink = self.sink_size * T
        start = max(sink, end - self.local_attn_size * T + sink) if self.local_attn_size > 0 else 0
        keys, values = kv_cache["k"][:, start:end], kv_cache["v"][:, start:end]
        if start:
            keys = torch.cat([kv_cache["k"][:, :sink], keys], 1)
            values = torch.cat([kv_cache["v"][:, :sink], values], 1)
        keys, q = rope(keys, 0), rope(q, (keys.shape[1] - x.shape[1]) // T)
        return self.o(attention(q, keys, values).flatten(2))


class Rolling(Projections):
    """The query is a window of several chunks, of which only the first is cached."""

    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0,
                cache_start=None, updating_cache=False):  # fmt: skip
        q, k, v = self.qkv(x)
        first = current_start // T
        q, k = rope(q, first), rope(k, first)
        cached = slice(current_start, current_start + 3 * T)
        kv_cache["k"][:, cached], kv_cache["v"][:, cached] = k[:, : 3 * T], v[:, : 3 * T]
        if current_start == 0:
            return self.o(attention(q, k, v).flatten(2))
        past = slice(max(0, current_start - 6 * T), current_start)
        keys = torch.cat([kv_cache["k"][:, past], k], 1)
        values = torch.cat([kv_cache["v"][:, past], v], 1)
        return self.o(attention(q, keys, values).flatten(2))


class Unsplit(Projections):
    """A class of the same file that never calls ``attention``: not a layer to patch."""

    def forward(self, x, kv_cache=None):
        return self.o(x)


class Block(nn.Module):
    """Has num_heads and kv_cache as its layer has, but leaves the call to it."""

    def __init__(self, layer, **sizes):
        super().__init__()
        self.self_attn = layer(**sizes)
        self.num_heads = self.self_attn.num_heads
        self.norm = nn.LayerNorm(32)

    def forward(self, x, grid_sizes, kv_cache=None, current_start=0, **extra):
        result = self.self_attn(self.norm(x), None, grid_sizes, None, None, kv_cache, current_start,
                                None, **extra)  # fmt: skip
        out, update = result if isinstance(result, tuple) else (result, None)
        x = x + out
        side = x[:, :7].unflatten(2, (self.num_heads, -1))
        return x + cross_attention(x.unflatten(2, (self.num_heads, -1)), side, side).flatten(
            2
        ), update


class Model(nn.Module):
    """Blocks, and the attribute that pipelines set when a chunk is more than a frame."""

    def __init__(self, layer=InPlace, layers=2, **sizes):
        super().__init__()
        self.blocks = nn.ModuleList(Block(layer, **sizes) for _ in range(layers))
        self.num_frame_per_block = 1
        self.local_attn_size = sizes.get("local_attn_size", -1)

    def forward(self, x, kv_cache=None, current_start=0, **extra):
        grid = torch.tensor([[x.shape[1] // T, HEIGHT, WIDTH]] * x.shape[0])
        updates = []
        for i, block in enumerate(self.blocks):
            cache = kv_cache[i] if kv_cache is not None else None
            x, update = block(x, grid, kv_cache=cache, current_start=current_start, **extra)
            updates.append(update)
        for i, update in enumerate(updates):
            if update is not None:
                start, end, k, v = update
                kv_cache[i]["k"][:, start:end], kv_cache[i]["v"][:, start:end] = k, v
        return x


class Pipeline:
    """A plain object that holds the model, as inference scripts have it."""

    def __init__(self, model):
        self.parts = {"generator": [model]}
        self.name = "pipeline"


def make(layer=InPlace, *, seed=0, dtype=torch.float32, **sizes):
    """A model with fixed random weights, in eval mode."""
    torch.manual_seed(seed)
    return Model(layer, **sizes).to(dtype).eval().requires_grad_(False)


def new_cache(model, frames=21, batch=1, dtype=torch.float32):
    """One cache a layer, zeros."""
    shape = (batch, frames * T, 2, 16)
    return [
        {"k": torch.zeros(shape, dtype=dtype), "v": torch.zeros(shape, dtype=dtype),
         "global_end": 0, "local_end": 0}
        for _ in model.blocks
    ]  # fmt: skip


def noise(frames, batch=1, seed=1, dtype=torch.float32):
    """Input of some frames, [B, F*T, 32]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames * T, 32, generator=generator).to(dtype)


def rollout(model, chunks=5, *, frames=3, steps=2, cache=None, batch=1, seed=1, first=0,
            dtype=torch.float32, ends=None, **extra):  # fmt: skip
    """The chunk loop: ``steps`` forwards and a clean pass a chunk; all outputs, concatenated."""
    cache = new_cache(model, batch=batch, dtype=dtype) if cache is None else cache
    ends = ends or [first + frames * (c + 1) for c in range(chunks)]
    out = []
    for begin, end in zip([first, *ends], ends, strict=False):
        x = noise(end - begin, batch, seed * 1000 + begin, dtype)
        for _ in range(steps + 1):
            x = model(x, kv_cache=cache, current_start=begin * T, **extra)
        out.append(x)
    return torch.cat(out, 1)


def attentions(model):
    """The layers that patch should find, first layer first."""
    return [block.self_attn for block in model.blocks]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(young_garbage):
    """Every test unpatches what it patched; copies that died count as unpatched."""
    yield
    gc.collect()
    hook._sweep()
    assert not hook._shims
    assert hook.local.visit is None and hook.local.dense == 0
    assert inspect.isfunction(attention)
