import pytest
import torch
from gpu import assert_close, draw, lists, needs_gpu, token_mask, use_kernel

import lightforcing as lf
from lightforcing import _core

pytestmark = needs_gpu
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["portable", "sm90"])
def kernel(request):
    use_kernel(request.param)
    yield request.param
    _core.force_kernel("auto")


def run(q, k, v, blocks=None, **options):
    out = torch.full_like(q, float("nan"))  # poison: every element must be written
    got, lse = lf.block_sparse_attention(q, k, v, blocks, out=out, return_lse=True, **options)
    assert got is out
    again = lf.block_sparse_attention(q, k, v, blocks, **options)
    assert torch.equal(again, out), "not bit-stable from run to run"
    return out, lse


# the Hopper kernel's ring holds 3 to 8 K or V of two blocks each: lengths below, at and above
LENGTHS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 33, 64, 65]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, frames", [
    (1, 40), (60, 7), (64, 9), (78, 6), (128, 4), (880, 3), (1536, 3), (1560, 3),
])  # fmt: skip
def test_lists_of_every_length(kernel, dtype, tokens, frames):
    q_frames = 1 if tokens > 200 else max(1, frames // 2)
    heads = 3
    q = draw((2, q_frames * tokens, heads, 128), dtype, 1)
    k = draw((2, frames * tokens, heads, 128), dtype, 2)
    v = draw((2, frames * tokens, heads, 128), dtype, 3)
    blocks = lists(LENGTHS, 2, heads, q.shape[1], k.shape[1], tokens, 128, 64)
    out, lse = run(q, k, v, blocks)
    assert_close(out, lse, q, k, v, token_mask(blocks))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len, k_len", [
    (1, 1), (1, 500), (64, 64), (127, 129), (128, 128), (129, 127), (300, 1), (300, 1000),
    (1560, 3120), (257, 64),
])  # fmt: skip
def test_dense_of_any_length(kernel, dtype, q_len, k_len):
    q, k, v = (draw((2, n, 3, 128), dtype, i) for i, n in enumerate((q_len, k_len, k_len)))
    assert_close(*run(q, k, v), q, k, v)


@pytest.mark.parametrize("block_q, dim", [(64, 128), (128, 64), (64, 64)])
@pytest.mark.parametrize("tokens, frames, heads, dtype", [
    (60, 7, 3, torch.bfloat16), (390, 8, 5, torch.float16), (1560, 3, 2, torch.bfloat16),
])  # fmt: skip
def test_other_shapes(kernel, block_q, dim, tokens, frames, heads, dtype):
    """Lists of 64 rows, of which a CTA walks two at a time, and heads of 64 columns."""
    q = draw((2, 2 * tokens, heads, dim), dtype, 1)
    k, v = (draw((2, frames * tokens, heads, dim), dtype, i) for i in (2, 3))
    blocks = lists(LENGTHS, 2, heads, q.shape[1], k.shape[1], tokens, block_q, 64)
    out, lse = run(q, k, v, blocks)
    assert_close(out, lse, q, k, v, token_mask(blocks))
    if block_q == 128:
        assert_close(*run(q, k, v), q, k, v)


def test_a_rising_maximum(kernel):
    """Logits that grow along the list by less and by more than the kernel's slack of 2^8."""
    for dtype in DTYPES:
        for step in (0.5, 3.0, 9.0, 40.0):
            q, k, v = (draw((1, n, 1, 128), dtype, i) for i, n in enumerate((128, 1024, 1024)))
            q[..., 0] = 1
            level = torch.arange(16, device="cuda").repeat_interleave(64) * step  # of the logits
            k[0, :, 0, 0] = level * 128**0.5
            for order in (k, k.flip(1)):
                assert_close(*run(q, order, v), q, order, v)


@pytest.mark.parametrize("heads", [1, 5, 12, 40])
def test_whole_waves_and_halves(kernel, heads):
    """Tile counts below, at and above multiples of the number of multiprocessors."""
    tokens, frames = 390, 8
    for q_frames in (1, 3, 8):
        q = draw((1, q_frames * tokens, heads, 128), torch.bfloat16, 1)
        k = draw((1, frames * tokens, heads, 128), torch.bfloat16, 2)
        v = draw((1, frames * tokens, heads, 128), torch.bfloat16, 3)
        blocks = lists([5, 12, 1, 30, 0], 1, heads, q.shape[1], k.shape[1], tokens, 128, 64)
        out, lse = run(q, k, v, blocks)
        assert_close(out, lse, q, k, v, token_mask(blocks))


def test_slices_of_a_larger_cache(kernel):
    tokens, frames = 100, 6
    cache = draw((3, 2, 10 * tokens, 5, 128), torch.bfloat16, 7)
    k, v = (cache[:, i, tokens : (frames + 1) * tokens, 1:4] for i in (0, 1))
    q = draw((3, 2 * tokens, 6, 128), torch.bfloat16, 8)[:, :, 1::2]
    blocks = lists([3, 7, 0, 12], 3, 3, q.shape[1], k.shape[1], tokens, 128, 64)
    out, lse = run(q, k, v, blocks)
    assert_close(out, lse, q, k, v, token_mask(blocks))
    wide = torch.zeros(3, 2 * tokens, 8, 128, dtype=q.dtype, device="cuda")
    into = lf.block_sparse_attention(q, k, v, blocks, out=wide[:, :, 2:5])
    assert torch.equal(into, out) and (wide[:, :, 5:] == 0).all() and (wide[:, :, :2] == 0).all()


@pytest.mark.parametrize("scale", [8.0, 100.0])
def test_huge_logits(kernel, scale):
    q, k, v = (draw((1, 320, 2, 128), torch.bfloat16, i, scale) for i in range(3))
    blocks = lists([2, 5, 1], 1, 2, 320, 320, 80, 128, 64)
    out, lse = run(q, k, v, blocks)
    assert_close(out, lse, q, k, v, token_mask(blocks))


def test_logits_past_the_range_of_float32(kernel):
    q, k = (torch.full((1, 128, 1, 128), 3e38, dtype=torch.bfloat16, device="cuda") for _ in "qk")
    v = draw((1, 128, 1, 128), torch.bfloat16, 1)
    for sign in (1, -1):
        assert torch.isfinite(lf.block_sparse_attention(q, k * sign, v)).all()


def test_equal_logits_give_the_mean(kernel):
    q = torch.zeros(1, 200, 2, 128, dtype=torch.bfloat16, device="cuda")
    k, v = (draw((1, 600, 2, 128), torch.bfloat16, i) for i in (1, 2))
    out = lf.block_sparse_attention(q, k, v)
    assert (out.double() - v.double().mean(1, keepdim=True)).abs().max() < 2e-3


def test_a_nan_key_stays_where_it_is_attended(kernel):
    q, k, v = (draw((1, 256, 1, 128), torch.bfloat16, i) for i in range(3))
    k[0, 70] = float("nan")  # in block 1
    indices = torch.tensor([[[[0, 2], [1, 2]]]], dtype=torch.int32, device="cuda")
    counts = torch.full((1, 1, 2), 2, dtype=torch.int32, device="cuda")
    out = lf.block_sparse_attention(q, k, v, lf.BlockList(indices, counts, 256, 256, 256, 128, 64))
    assert torch.isfinite(out[:, :128]).all() and out[:, 128:].isnan().all()


def test_an_index_out_of_range_is_skipped(kernel):
    q, k, v = (draw((1, 128, 1, 128), torch.bfloat16, i) for i in range(3))
    good = torch.tensor([[[[0, 1]]]], dtype=torch.int32, device="cuda")
    bad = torch.tensor([[[[0, 1, 99, -5]]]], dtype=torch.int32, device="cuda")
    count = torch.ones(1, 1, 1, dtype=torch.int32, device="cuda")
    a = lf.block_sparse_attention(q, k, v, lf.BlockList(good, 2 * count, 128, 128, 128, 128, 64))
    b = lf.block_sparse_attention(q, k, v, lf.BlockList(bad, 4 * count, 128, 128, 128, 128, 64))
    assert torch.equal(a, b)


def test_recall_is_a_difference_of_two_lse(kernel):
    q, k, v = (draw((1, 512, 2, 128), torch.bfloat16, i) for i in range(3))
    blocks = lists([3], 1, 2, 512, 512, 128, 128, 64)
    _, kept = lf.block_sparse_attention(q, k, v, blocks, return_lse=True)
    _, dense = lf.block_sparse_attention(q, k, v, return_lse=True)
    p = (q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1) / 128**0.5).softmax(-1)
    expected = (p * token_mask(blocks)).sum(-1)
    assert ((kept - dense).exp().double() - expected).abs().max() < 1e-4
