"""Attention rows of the GPU benchmark: geometries, lists, baselines, and the check of results."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timing import L2Flush, Work
from torch.nn.attention import SDPBackend, sdpa_kernel

import lightforcing as lf
from lightforcing import _core

DEVICE = "cuda"
DENSITIES = (0.20, 0.12, 0.10)
SAMPLED_ROWS = 8  # query rows of every head that are compared with float64

# Packages that a user could have instead: module, distribution.
PEERS = {
    "flash-attn": ("flash_attn", "flash-attn"),
    "flash-attn-4": ("flash_attn.cute", "flash-attn-4"),
    "cuDNN front end": ("cudnn", "nvidia-cudnn-frontend"),
    "FlashInfer": ("flashinfer", "flashinfer-python"),
    "SageAttention": ("sageattention", "sageattention"),
    "SpargeAttn": ("spas_sage_attn", "spas-sage-attn"),
}


@dataclass(frozen=True)
class Geometry:
    """One attention call of a released model."""

    name: str
    heads: int
    frame_tokens: int
    q_frames: int
    k_frames: int
    dim: int = 128

    @property
    def q_len(self):
        return self.q_frames * self.frame_tokens

    @property
    def k_len(self):
        return self.k_frames * self.frame_tokens


def self_forcing(chunk):
    return Geometry(f"sf chunk {chunk}", 12, 1560, 3, 3 * chunk)


CHUNKS = [self_forcing(c) for c in (1, 2, 4, 7, 14)]
OTHERS = [
    Geometry("longlive window 12", 12, 1560, 3, 12),
    Geometry("longlive2 window 32", 24, 880, 8, 32),
    Geometry("14B chunk 7", 40, 1560, 3, 21),
]


# ---- inputs -----------------------------------------------------------------------------------


def draw(length, heads, dim=128, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(1, length, heads, dim, generator=generator, device=DEVICE)
    return x.to(torch.bfloat16)


def qkv(g):
    return (draw(n, g.heads, g.dim, i) for i, n in enumerate((g.q_len, g.k_len, g.k_len)))


def random_lists(g, density, block_q=128, block_k=64, seed=5):
    """Every row keeps the same number of blocks, others for each row and head."""
    rows, per_frame = -(-g.q_len // block_q), -(-g.frame_tokens // block_k)
    blocks = g.k_frames * per_frame
    kept = max(1, int(density * blocks + 1e-9))
    generator = torch.Generator(DEVICE).manual_seed(seed)
    noise = torch.rand(1, g.heads, rows, blocks, generator=generator, device=DEVICE)
    indices = noise.topk(kept, dim=-1).indices.sort(dim=-1).values.int()
    return lf.BlockList.full_rows(indices, g.q_len, g.k_len, g.frame_tokens, block_q, block_k)


def key_blocks(blocks):
    """The key block of every key, [Lk]."""
    per_frame = -(-blocks.frame_tokens // blocks.block_k)
    k = torch.arange(blocks.k_len, device=DEVICE)
    return k // blocks.frame_tokens * per_frame + k % blocks.frame_tokens // blocks.block_k


def kept_pairs(blocks):
    """(query, key) pairs of whole lists, summed over heads: only kept tokens count."""
    widths = torch.bincount(key_blocks(blocks), minlength=blocks.blocks)
    rows = torch.arange(blocks.q_len, device=DEVICE)
    sizes = torch.bincount(rows // blocks.block_q)
    keys = widths[blocks.indices.long()].sum(-1)  # [B, H, R]
    return int((keys * sizes).sum())


# ---- the check ----------------------------------------------------------------------------------


class Truth:
    """Float64 attention of sampled rows, and the error of torch's own result on them."""

    def __init__(self, q, k, v, blocks=None, mask=None):
        """`mask` is [1 or B, H or 1, rows, Lk] for the sampled rows, instead of `blocks`."""
        generator = torch.Generator().manual_seed(3)
        rows = torch.randperm(q.shape[1], generator=generator)[:SAMPLED_ROWS].to(DEVICE)
        self.rows = rows
        if callable(mask):
            mask = mask(rows)
        elif blocks is not None:
            flags = torch.zeros(
                *blocks.counts.shape, blocks.blocks, dtype=torch.bool, device=DEVICE
            )
            flags.scatter_(3, blocks.indices.long(), True)
            mask = flags[:, :, rows // blocks.block_q][..., key_blocks(blocks)]
        picked = q[:, rows].transpose(1, 2)
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        logits = picked.double() @ keys.double().transpose(-1, -2) * q.shape[-1] ** -0.5
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        self.out = logits.softmax(-1) @ values.double()
        with sdpa_kernel(SDPBackend.MATH):
            peer = F.scaled_dot_product_attention(picked, keys, values, attn_mask=mask)
        self.bound = 2 * self._error(peer) + 1e-3

    def _error(self, got):
        return ((got.double() - self.out).norm() / self.out.norm()).item()

    def check(self, run):
        """The relative error of run()'s [B, L, H, D]; raises where it is above the bound."""

        def checked():
            got = run()
            error = self._error(got[:, self.rows].transpose(1, 2))
            if not error <= self.bound:
                raise AssertionError(f"wrong result: error {error:.1e}, allowed {self.bound:.1e}")
            return error

        return checked


# ---- baselines ----------------------------------------------------------------------------------


def sdpa(q, k, v, backend):
    def run():
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2)

    return run


def on_kernel(name, run):
    """The same with our attention kernel chosen."""

    def forced():
        _core.force_kernel(name)
        try:
            return run()
        finally:
            _core.force_kernel("auto")

    return forced


def flex(g, q, k, v, density):
    """flex_attention, compiled, over random 128 x 128 blocks of the same share (whole blocks)."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    size = 128
    rows, blocks = -(-g.q_len // size), g.k_len // size  # a short last key block is left out
    kept = max(1, int(density * blocks + 1e-9))
    noise = torch.rand(1, g.heads, rows, blocks, device=DEVICE)
    chosen = noise.topk(kept, dim=-1).indices.sort(dim=-1).values.int()
    indices = torch.zeros(1, g.heads, rows, -(-g.k_len // size), dtype=torch.int32, device=DEVICE)
    indices[..., :kept] = chosen
    counts = torch.full(indices.shape[:3], kept, dtype=torch.int32, device=DEVICE)
    flags = torch.zeros(1, g.heads, rows, blocks + 1, dtype=torch.bool, device=DEVICE)
    flags.scatter_(3, chosen.long(), True)

    def mask_mod(b, h, i, j):  # says the same as the lists, which alone decide: no block is partial
        return flags[b, h, i // size, j // size]

    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts), torch.zeros_like(indices), counts, indices,
        BLOCK_SIZE=(size, size), mask_mod=mask_mod, seq_lengths=(g.q_len, g.k_len),
    )  # fmt: skip
    compiled = torch.compile(flex_attention, dynamic=False)

    def run():
        q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q_, k_, v_, block_mask=mask).transpose(1, 2)

    def rows_mask(sampled):
        keys = torch.arange(g.k_len, device=DEVICE) // size
        return flags[:, :, sampled // size][..., keys]

    truth = Truth(q, k, v, mask=rows_mask)
    flops = 4 * g.dim * g.heads * g.q_len * kept * size
    return Work(g.name, f"{density:.0%} flex 128x128", run, flops, check=truth.check(run))


def peers():
    """What is installed of the packages a user could have: name -> version or None."""
    found = {}
    for name, (module, distribution) in PEERS.items():
        try:
            there = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            there = False
        if not there:
            found[name] = None
            continue
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "installed"
    return found


def peer_calls(q, k, v):
    """Dense calls of installed peers; those whose interface varies are only listed."""
    installed, calls = peers(), {}
    if installed["flash-attn"] and importlib.util.find_spec("flash_attn.flash_attn_interface"):
        from flash_attn import flash_attn_func

        calls["flash-attn"] = lambda: flash_attn_func(q, k, v)
    if installed["flash-attn-4"]:
        from flash_attn.cute import flash_attn_func as fa4

        def run():
            out = fa4(q, k, v)
            return out[0] if isinstance(out, tuple) else out

        calls["flash-attn-4"] = run
    if installed["SageAttention"]:
        from sageattention import sageattn

        calls["SageAttention"] = lambda: sageattn(q, k, v, tensor_layout="NHD", is_causal=False)
    return calls


# ---- groups of works ----------------------------------------------------------------------


def attention_group(g, *, quick=False, cold=False):
    """Dense and sparse attention of one geometry, baselines first."""
    q, k, v = qkv(g)
    prelude = L2Flush() if cold else None
    pairs = g.heads * g.q_len * g.k_len
    dense = Truth(q, k, v)
    runs = {
        "dense cuDNN": sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION),
        "dense FA2": sdpa(q, k, v, SDPBackend.FLASH_ATTENTION),
        **{f"dense {name}": run for name, run in peer_calls(q, k, v).items()},
        "dense ours": lambda: lf.block_sparse_attention(q, k, v),
    }
    if g.k_frames == 21 and g.heads == 12:
        runs["dense portable"] = on_kernel("portable", runs["dense ours"])
    if quick:
        del runs["dense FA2"]
    works = [
        Work(g.name, name, run, 4 * g.dim * pairs, check=dense.check(run), host=name[6:] == "ours")
        for name, run in runs.items()
    ]
    if g.k_frames > g.q_frames:
        for density in DENSITIES:
            works += _sparse(g, q, k, v, density)
        if g.name == "sf chunk 7" and not quick:
            works += [flex(g, q, k, v, density) for density in (0.20, 0.10)]
    for work in works:
        work.prelude = prelude
    return works


def _sparse(g, q, k, v, density):
    import triton_block_sparse

    blocks = random_lists(g, density)
    truth, flops = Truth(q, k, v, blocks), 4 * g.dim * kept_pairs(blocks)

    def ours():
        return lf.block_sparse_attention(q, k, v, blocks)

    runs = {
        "Triton": lambda: triton_block_sparse.attend(q, k, v, blocks),
        "portable": on_kernel("portable", ours),
        "ours": ours,
    }
    return [
        Work(
            g.name, f"{density:.0%} {name}", run, flops, check=truth.check(run), host=name == "ours"
        )
        for name, run in runs.items()
    ]
