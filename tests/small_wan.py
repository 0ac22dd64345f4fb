"""Small causal Wans in float64, and the arithmetic of one written out without any module."""

import dataclasses
import itertools
import math

import pytest
import torch

from lightforcing.models import CausalWan, WanConfig

HEIGHT, WIDTH = 6, 8  # latent; 12 tokens a frame
SMALL = WanConfig(
    dim=48, ffn_dim=64, num_heads=2, num_layers=3, freq_dim=32, text_dim=20, text_len=9
)
BLIND = dataclasses.replace(SMALL, cross_attention=False)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def build(config=SMALL, **changes):
    return CausalWan(dataclasses.replace(config, **changes), seed=3, dtype=torch.float64)


def text_for(model, batch=1):
    config = model.config
    return draw(batch, 5, config.text_dim, seed=9) if config.cross_attention else None


def closeness(a, b):
    """Largest difference, relative to the largest value."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def straight(state, config, x, t, text):
    """One chunk from first frame 0 without any module: the published arithmetic, row by row."""

    def linear(name, y):
        return y @ state[name + ".weight"].T + state[name + ".bias"]

    def layer_norm(y):
        return (y - y.mean(-1, keepdim=True)) / (
            y.var(-1, keepdim=True, correction=0) + 1e-6
        ).sqrt()

    def rms_norm(name, y):
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[name + ".weight"]

    def gelu(y):
        return 0.5 * y * (1 + torch.tanh((2 / math.pi) ** 0.5 * (y + 0.044715 * y**3)))

    def silu(y):
        return y / (1 + torch.exp(-y))

    def attend(name, y, source, turn):
        q, k = rms_norm(name + ".norm_q", linear(name + ".q", y)), linear(name + ".k", source)
        k, v = rms_norm(name + ".norm_k", k), linear(name + ".v", source)
        out = []
        for columns in torch.arange(config.dim).view(config.num_heads, -1):
            weights = turn(q[:, columns]) @ turn(k[:, columns]).T / config.head_dim**0.5
            out.append(weights.softmax(-1) @ v[:, columns])
        return linear(name + ".o", torch.cat(out, -1))

    frames, height, width = x.shape[1], x.shape[2] // 2, x.shape[3] // 2
    places = list(itertools.product(range(frames), range(height), range(width)))
    counts = (config.head_dim // 2 - 2 * (config.head_dim // 6),) + (config.head_dim // 6,) * 2
    rates = [(axis, 10000 ** (-j / n)) for axis, n in enumerate(counts) for j in range(n)]
    angle = torch.tensor([[place[a] * r for a, r in rates] for place in places]).double()

    def rotate(y):
        a, b, cos, sin = y[:, 0::2], y[:, 1::2], angle.cos(), angle.sin()
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(1)

    patches = [x[:, f, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten() for f, r, c in places]
    y = torch.stack(patches) @ state["patch_embedding.weight"].flatten(1).T
    y = y + state["patch_embedding.bias"]
    half = config.freq_dim // 2
    wave = t * 10000 ** (-torch.arange(half).double() / half)
    wave = torch.cat([wave.cos(), wave.sin()])
    e = linear("time_embedding.2", silu(linear("time_embedding.0", wave)))
    e6 = linear("time_projection.1", silu(e)).view(6, -1)
    padded = torch.zeros(config.text_len, config.text_dim, dtype=torch.float64)
    padded[: len(text)] = text
    source = linear("text_embedding.2", gelu(linear("text_embedding.0", padded)))
    for n in range(config.num_layers):
        block = f"blocks.{n}."
        shift, scale, gate, shift2, scale2, gate2 = state[block + "modulation"][0] + e6
        z = layer_norm(y) * (1 + scale) + shift
        y = y + gate * attend(block + "self_attn", z, z, rotate)
        z = layer_norm(y) * state[block + "norm3.weight"] + state[block + "norm3.bias"]
        y = y + attend(block + "cross_attn", z, source, lambda a: a)
        z = layer_norm(y) * (1 + scale2) + shift2
        y = y + gate2 * linear(block + "ffn.2", gelu(linear(block + "ffn.0", z)))
    shift, scale = state["head.modulation"][0] + e
    rows = linear("head.head", layer_norm(y) * (1 + scale) + shift)
    out = torch.zeros(config.out_dim, *x.shape[1:], dtype=torch.float64)
    for row, (f, r, c) in zip(rows, places, strict=True):
        for i, j in itertools.product(range(2), range(2)):
            begin = (2 * i + j) * config.out_dim
            out[:, f, 2 * r + i, 2 * c + j] = row[begin : begin + config.out_dim]
    return out
