"""What the GPU tests share: the skip with its reason, lists of chosen lengths, a float64 truth."""

import pytest
import torch

import lightforcing as lf
from lightforcing import _core


def why_not():
    """The reason why nothing of this can run here, or None."""
    if not lf.info()["cuda_built"]:
        return "this build has no CUDA half"
    return None if torch.cuda.is_available() else "no GPU on this machine"


needs_gpu = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def is_hopper():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def use_kernel(name):
    """Make `name` the attention kernel; skips where this chip has not got it."""
    if name == "sm90" and not is_hopper():
        pytest.skip("the Hopper kernel needs compute capability 9.0")
    _core.force_kernel(name)


def draw(shape, dtype, seed, scale=1.0):
    g = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, generator=g, device="cuda") * scale).to(dtype)


def guarded(x, fill, guard=1 << 15):
    """A copy of `x` with `guard` elements of `fill` before and after it, and all that memory."""
    whole = torch.full((x.numel() + 2 * guard,), fill, dtype=x.dtype, device=x.device)
    inside = whole[guard : guard + x.numel()].view(x.shape)
    return inside.copy_(x), whole


def intact(inside, whole, fill):
    """Do both guards still hold `fill`?"""
    guard = (whole.numel() - inside.numel()) // 2
    return bool((whole[:guard] == fill).all() and (whole[guard + inside.numel() :] == fill).all())


def lists(lengths, batch, heads, q_len, k_len, tokens, block_q, block_k, seed=0):
    """Random ascending rows whose lengths cycle through `lengths`."""
    per_frame = -(-tokens // block_k)
    blocks, rows = k_len // tokens * per_frame, -(-q_len // block_q)
    g = torch.Generator().manual_seed(seed)
    width = max(1, min(blocks, max(lengths)))
    indices = torch.zeros(batch, heads, rows, width, dtype=torch.int32)
    counts = torch.zeros(batch, heads, rows, dtype=torch.int32)
    for i in range(batch * heads * rows):
        n = min(blocks, lengths[i % len(lengths)])
        row = torch.randperm(blocks, generator=g)[:n].sort().values
        indices.view(-1, width)[i, :n] = row.int()
        counts.view(-1)[i] = n
    return lf.BlockList(indices.cuda(), counts.cuda(), q_len, k_len, tokens, block_q, block_k)


def token_mask(blocks):
    """Bool [B, H, Lq, Lk]: which tokens may see each other."""
    kept = blocks.to_bool()
    per_frame = -(-blocks.frame_tokens // blocks.block_k)
    k = torch.arange(blocks.k_len, device=kept.device)
    own = k // blocks.frame_tokens * per_frame + k % blocks.frame_tokens // blocks.block_k
    q = torch.arange(blocks.q_len, device=kept.device) // blocks.block_q
    return kept[:, :, q][..., own]


def truth(q, k, v, mask=None, scale=None, dtype=torch.float64):
    """Plain attention in `dtype`; empty rows are zeros with LSE -inf."""
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    # In place: of 3120 x 3120 tokens and 40 heads each is 3.1 GB, of a GPU that others use, too.
    logits = (q @ k.transpose(-1, -2)).mul_(scale or q.shape[-1] ** -0.5)
    if mask is not None:
        logits.masked_fill_(~mask, float("-inf"))
    lse = logits.logsumexp(-1)
    p = logits.sub_(lse[..., None]).exp_().nan_to_num_(0.0)
    if dtype != torch.float64:
        p = p.to(dtype)
    return (p @ v).transpose(1, 2), lse


def assert_close(out, lse, q, k, v, mask=None, scale=None):
    """Error against float64 at most twice torch's own at the same dtype."""
    expected, expected_lse = truth(q, k, v, mask, scale)
    assert torch.isfinite(out).all()
    peer = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, scale=scale
    ).transpose(1, 2)
    live = torch.isfinite(expected_lse).transpose(1, 2)[..., None].expand_as(out)
    peer_error = (peer.double() - expected).masked_fill(~live, 0).nan_to_num(0.0)
    error = out.double() - expected
    # One rounding of the result is in both; the floor covers rows where torch happens to be exact.
    floor = torch.finfo(out.dtype).eps * expected.abs().max().item()
    assert error.abs().max() <= 2 * peer_error.abs().max() + floor, (
        error.abs().max(), peer_error.abs().max(), floor
    )  # fmt: skip
    allowed = 2 * peer_error.square().mean().sqrt() + floor / 4
    assert error.square().mean().sqrt() <= allowed, "the mean square of the errors"
    assert (out[~live] == 0).all()
    if lse is not None:
        dead = torch.isinf(expected_lse)
        assert torch.equal(lse == float("-inf"), dead)
        difference = (lse.double() - expected_lse).masked_fill(dead, 0).abs()
        allowed = 2e-6 * expected_lse.masked_fill(dead, 0).abs() + 2e-5
        assert (difference <= allowed).all(), difference.max()
