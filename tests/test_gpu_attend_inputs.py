"""Attention on the GPU: structured and adversarial inputs, guarded memory, every list geometry."""

import pytest
import torch
from gpu import assert_close, draw, guarded, intact, lists, needs_gpu, token_mask, use_kernel

import lightforcing as lf
from lightforcing import _core
from lightforcing.arrays import stream_of

pytestmark = needs_gpu
DTYPES = [torch.bfloat16, torch.float16]
T, FRAMES, HEADS = 78, 6, 3
LENGTHS = [0, 1, 2, 3, 4, 5, 8, 12]


@pytest.fixture(params=["portable", "sm90"])
def kernel(request):
    use_kernel(request.param)
    yield request.param
    _core.force_kernel("auto")


def inputs(dtype=torch.bfloat16, batch=2, q_frames=3, seed=0, scale=1.0):
    q = draw((batch, q_frames * T, HEADS, 128), dtype, seed, scale)
    k, v = (draw((batch, FRAMES * T, HEADS, 128), dtype, seed + i, scale) for i in (1, 2))
    return q, k, v


def some_lists(q, k, seed=0):
    return lists(LENGTHS, q.shape[0], HEADS, q.shape[1], k.shape[1], T, 128, 64, seed)


def attend(q, k, v, blocks=None, **options):
    return lf.block_sparse_attention(q, k, v, blocks, return_lse=True, **options)


# ---- values ---------------------------------------------------------------------------


def rising(q, k, v):
    """Every block holds a new maximum, so every step rescales what came before."""
    along = torch.linspace(0, 1, k.shape[1], device="cuda")[None, :, None, None]
    direction = draw((1, 1, 1, 128), torch.float32, 9)
    return q * 0.1 + direction, k * 0.1 + direction * along, v


def falling(q, k, v):
    """The first block holds the maximum."""
    q, k, v = rising(q, k, v)
    return q, k.flip(1), v


def peaked(q, k, v):
    """Each query is one key, many times over: weights are 1 and 0."""
    g = torch.Generator("cuda").manual_seed(5)
    own = torch.randint(k.shape[1], (q.shape[1],), generator=g, device="cuda")
    return 3 * k[:, own], k, v


def alike(q, k, v):
    """All keys are the same: weights are equal, whatever the list."""
    return q, k[:, :1].expand_as(k).contiguous(), v


def local(q, k, v):
    """Smooth in the position, as tokens of a video after RoPE: weights fall with the distance."""
    periods = 10 ** torch.linspace(0.5, 3.5, 64, device="cuda")

    def waves(x, first):
        at = torch.arange(first, first + x.shape[1], device="cuda")[:, None] / periods
        return (torch.cat([at.sin(), at.cos()], 1)[None, :, None] * 2).expand(x.shape)

    return waves(q, k.shape[1] - q.shape[1]) + 0.2 * q, waves(k, 0) + 0.2 * k, v


def cancelling(q, k, v):
    """Values of both signs a hundred times their mean: the result is a small difference."""
    signs = 1 - 2 * (torch.arange(v.shape[1], device="cuda") % 2)[None, :, None, None]
    return q * 0.05, k * 0.05, v + 100.0 * signs


def tiny(q, k, v):
    """Logits near zero and values near the smallest normal numbers of float16."""
    return q * 1e-3, k * 1e-3, v * 1e-3


SHAPES_OF_INPUTS = [rising, falling, peaked, alike, local, cancelling, tiny]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES_OF_INPUTS, ids=lambda f: f.__name__)
def test_structured_inputs(kernel, shape, dtype):
    q, k, v = (x.to(dtype).contiguous() for x in shape(*inputs(torch.float32)))
    blocks = some_lists(q, k)
    assert_close(*attend(q, k, v, blocks), q, k, v, token_mask(blocks))
    assert_close(*attend(q, k, v), q, k, v)


@pytest.mark.parametrize("scale", [1e-4, 0.3, 4.0])
def test_other_scales(kernel, scale):
    q, k, v = inputs()
    blocks = some_lists(q, k)
    got = attend(q, k, v, blocks, scale=scale)
    assert_close(*got, q, k, v, token_mask(blocks), scale)


def test_sums_that_overflow_both_ways(kernel):
    """Finite q and k near 1e19 whose products pass float32's range with both signs in one sum.

    The documented answer: such a logit may be NaN; then its row of out and its LSE are NaN. No
    other row changes, nothing is infinite, and the bits are the same in every run.
    """
    q, k, v = inputs(seed=3)
    small = attend(q, k, v)
    big = q.clone()
    big[:, ::3] = (q[:, ::3].sign() + (q[:, ::3] == 0)) * 1e19
    k[:, 100] = (k[:, 100].sign() + (k[:, 100] == 0)) * 1e19
    for blocks in None, some_lists(q, k):
        out, lse = attend(big, k, v, blocks)
        again, lse_again = attend(big, k, v, blocks)
        assert torch.equal(out.view(torch.int16), again.view(torch.int16))
        assert torch.equal(lse.view(torch.int32), lse_again.view(torch.int32))
        overflowed = out.isnan().all(-1)  # [B, Lq, H]
        assert torch.equal(out.isnan().any(-1), overflowed), "a row is NaN as a whole"
        assert torch.equal(lse.isnan().transpose(1, 2), overflowed)
        others = torch.ones_like(overflowed)
        others[:, ::3] = False
        assert not overflowed[others].any(), "rows of ordinary q are finite"
        assert not out.isinf().any() and out[~overflowed].abs().max() <= v.abs().max() * 1.01
        # Without that key no row overflows, and 1e19 in q alone is harmless.
        if blocks is None:
            k[:, 100] = 0.0
            assert torch.isfinite(attend(big, k, v)[0]).all()
            k[:, 100] = 1e19
    assert torch.isfinite(small[0]).all()


# ---- memory that must not be touched --------------------------------------------------------
# Bulk copies escape compute-sanitizer's bounds checks in part: these tests see them.


@pytest.mark.parametrize("dense", [False, True], ids=["lists", "dense"])
def test_memory_around_the_inputs_is_not_used(kernel, dense):
    """NaN before and after q, k and v, and in the rest of a cache around their slices."""
    q, k, v = inputs()
    blocks = None if dense else some_lists(q, k)
    expected = attend(q, k, v, blocks)
    apart = [guarded(x, float("nan"))[0] for x in (q, k, v)]
    inside = []
    for x in (q, k, v):
        cache = torch.full(
            (4, x.shape[1] + 2 * T, HEADS + 2, 128), float("nan"), dtype=x.dtype, device="cuda"
        )
        view = cache[1:3, T:-T, 1:-1]
        inside.append(view.copy_(x))
    for tensors in apart, inside:
        got = attend(*tensors, blocks)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_memory_around_the_results_is_not_written(kernel):
    """Guards around out, the LSE and the workspace, whose content does not matter."""
    for q_frames, seed in ((1, 0), (2, 1), (3, 2)):
        q, k, v = inputs(q_frames=q_frames, seed=seed)
        for blocks in None, some_lists(q, k, seed):
            expected = attend(q, k, v, blocks)
            for fill in (0, -1, 0x5A5A5A5A):
                made = []

                def empty(shape, dtype, fill=fill, made=made):
                    x = torch.empty(shape, dtype=getattr(torch, dtype), device="cuda")
                    x.view(torch.int8).fill_(fill & 0x7F)
                    made.append(guarded(x, 7))
                    return made[-1][0]

                row = None if blocks is None else blocks._row()
                got = _core.block_sparse_attention(
                    q, k, v, row, None, empty, None, True, stream_of(q)
                )
                assert len(made) >= 2
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
                assert all(intact(*x, 7) for x in made)


def test_memory_around_the_lists_is_not_used(kernel):
    """What follows a row's count, and what lies around the lists, changes nothing."""
    q, k, v = inputs()
    blocks = some_lists(q, k)
    expected = attend(q, k, v, blocks)
    width = blocks.indices.shape[-1]
    beyond = torch.arange(width, device="cuda") >= blocks.counts[..., None]
    for garbage in (0, 5, -1, 2**31 - 1):
        indices = guarded(blocks.indices.masked_fill(beyond, garbage), garbage)[0]
        counts = guarded(blocks.counts, 3)[0]
        other = lf.BlockList(indices, counts, q.shape[1], k.shape[1], T, 128, 64)
        got = attend(q, k, v, other)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_counts_out_of_range_are_clamped(kernel):
    """Above the length of the list a count is that length, below 0 it is 0."""
    q, k, v = inputs()
    blocks = lists([12], q.shape[0], HEADS, q.shape[1], k.shape[1], T, 128, 64)
    wild = torch.tensor([2**31 - 1, -1, 13, 5, -(2**31), 12, 44, 0], dtype=torch.int32)
    counts = wild.repeat(blocks.counts.numel())[: blocks.counts.numel()].view_as(blocks.counts)
    geometry = q.shape[1], k.shape[1], T, 128, 64
    indices = guarded(blocks.indices, 0)[0]  # what a count too large would read: block 0
    got = attend(q, k, v, lf.BlockList(indices, counts.cuda(), *geometry))
    tame = lf.BlockList(indices, counts.clamp(0, 12).cuda(), *geometry)
    expected = attend(q, k, v, tame)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert_close(*got, q, k, v, token_mask(tame))


# ---- geometry -------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("block_k", [16, 32, 64, 128])
@pytest.mark.parametrize("block_q", [16, 20, 64, 100, 128])
def test_every_block_size(block_q, block_k, dim):
    """Whatever kernel takes it; sizes that only the portable one has are its only test."""
    for tokens, frames, dtype in ((60, 5, torch.bfloat16), (150, 4, torch.float16)):
        q, k, v = (
            draw((2, n * tokens, 2, dim), dtype, i) for i, n in enumerate((2, frames, frames))
        )
        blocks = lists(LENGTHS, 2, 2, q.shape[1], k.shape[1], tokens, block_q, block_k)
        results = []
        for name in ("portable", "auto"):
            _core.force_kernel(name)
            results.append(attend(q, k, v, blocks))
        _core.force_kernel("auto")
        for result in results:
            assert_close(*result, q, k, v, token_mask(blocks))


@pytest.mark.parametrize("q_len, k_len", [(1, 1), (1, 500), (65, 64), (300, 1000), (257, 63)])
def test_dense_with_heads_of_64(q_len, k_len):
    for dtype in DTYPES:
        q, k, v = (draw((2, n, 3, 64), dtype, i) for i, n in enumerate((q_len, k_len, k_len)))
        assert_close(*attend(q, k, v), q, k, v)
