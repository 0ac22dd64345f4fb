"""Block-sparse attention against float64, and torch's own attention as the bar."""

import numpy as np
import pytest
import torch
from cases import BLOCKS, VIDEOS, dims, generated, seeds
from hypothesis import strategies as st
from numerics import DTYPES, assert_no_worse_than_torch, draw

import lightforcing as lf
from lightforcing import reference


def torch_attention(q, k, v, mask, scale):
    """The peer: torch's own attention at the dtype, and its LSE in float32."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    logits = (q.float() @ k.float().mT) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return out.transpose(1, 2), torch.logsumexp(logits, -1)


def random_map(q, k, frame_tokens, block_q, block_k, density, seed):
    """A random boolean block map with at least one empty row where it is sparse."""
    rows, blocks = -(-q.shape[1] // block_q), k.shape[1] // frame_tokens
    blocks *= -(-frame_tokens // block_k)
    rng = np.random.default_rng(seed)
    keep = rng.random((q.shape[0], q.shape[2], rows, blocks)) < density
    if density < 0.5:
        keep[rng.integers(len(keep)), :, rng.integers(rows)] = False
    return keep


def block_list(keep, q, k, frame_tokens, block_q, block_k):
    return lf.BlockList.from_bool(
        keep,
        q_len=q.shape[1],
        k_len=k.shape[1],
        frame_tokens=frame_tokens,
        block_q=block_q,
        block_k=block_k,
    )


def check(q, k, v, keep=None, *, frame_tokens=1, block_q=128, block_k=64, scale=None):
    blocks = mask = None
    if keep is not None:
        blocks = block_list(keep, q, k, frame_tokens, block_q, block_k)
        mask = reference.token_mask(
            keep,
            q.shape[1],
            k.shape[1],
            frame_tokens=frame_tokens,
            block_q=block_q,
            block_k=block_k,
        )
    out, lse = lf.block_sparse_attention(q, k, v, blocks, scale=scale, return_lse=True)
    assert out.dtype == q.dtype and out.shape == q.shape and out.is_contiguous()
    assert lse.dtype == torch.float32 and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    truth, true_lse = reference.attention(q, k, v, mask, scale=scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    peer, peer_lse = torch_attention(
        q, k, v, None if mask is None else torch.from_numpy(mask), scale
    )
    # A float32 dot product is off by eps |q||k|, which the exponential makes relative.
    longest = [x.double().norm(dim=-1).nan_to_num().max().item() for x in (q, k)]
    logit = scale * longest[0] * longest[1]
    eps32, eps = (torch.finfo(t).eps for t in (torch.float32, q.dtype))
    size = v.double().nan_to_num().abs().max().item() * (1 + logit * eps32 / eps)
    assert_no_worse_than_torch(out, truth, peer, dtype=q.dtype, size=size)
    size = logit + np.log(k.shape[1]) + 1
    assert_no_worse_than_torch(lse, true_lse, peer_lse, dtype=torch.float32, size=size)
    return out, lse


@pytest.mark.parametrize("video", VIDEOS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense(isa, dtype, video):
    check(*draw(video.q_shape, video.k_shape, video.k_shape, dtype=dtype, shift=0.3))


@pytest.mark.parametrize("video", VIDEOS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.2, 0.7, 1.0])
def test_sparse(isa, dtype, video, density):
    q, k, v = draw(video.q_shape, video.k_shape, video.k_shape, dtype=dtype, shift=0.3)
    for block_q, block_k in (128, 64), (64, 64), (32, 16), (16, 128):
        keep = random_map(q, k, video.frame_tokens, block_q, block_k, density, seed=block_q)
        geometry = dict(frame_tokens=video.frame_tokens, block_q=block_q, block_k=block_k)
        check(q, k, v, keep, **geometry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", range(8, 257, 8))
def test_every_head_size(isa, dtype, dim):
    q, k, v = draw((1, 19, 2, dim), (1, 75, 2, dim), (1, 75, 2, dim), dtype=dtype, seed=dim)
    check(q, k, v)
    keep = random_map(q, k, 25, 16, 16, 0.5, dim)
    check(q, k, v, keep, frame_tokens=25, block_q=16, block_k=16)


def test_every_length(isa):
    for q_len in 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 129:
        for k_len in 1, 2, 3, 7, 8, 15, 16, 17, 63, 65, 100, 129:
            q, k, v = draw((1, q_len, 1, 16), (1, k_len, 1, 16), (1, k_len, 1, 16), seed=q_len)
            check(q, k, v)


@generated(
    500,
    q_len=st.integers(1, 150),
    frames=st.integers(1, 4),
    frame_tokens=st.integers(1, 90),
    outer=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dim=dims,
    block_q=st.sampled_from([16, 32, 64, 128]),
    block_k=st.sampled_from(BLOCKS),
    density=st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0]),
    dtype=st.sampled_from(DTYPES),
    scale=st.none() | st.sampled_from([1e-6, 0.02, 1.0]),
    size=st.sampled_from([0.0, 1e-3, 1.0, 1.0, 8.0, 100.0]),
    seed=seeds,
)
def test_any_list(
    q_len, frames, frame_tokens, outer, dim, block_q, block_k, density, dtype, scale, size, seed
):
    q_shape = (outer[0], q_len, outer[1], dim)
    k_shape = (outer[0], frames * frame_tokens, outer[1], dim)
    q, k, v = draw(q_shape, k_shape, k_shape, dtype=dtype, seed=seed, size=size)
    keep = random_map(q, k, frame_tokens, block_q, block_k, density, seed)
    geometry = dict(frame_tokens=frame_tokens, block_q=block_q, block_k=block_k)
    check(q, k, v, keep, **geometry, scale=scale)


@generated(
    200,
    q_len=st.integers(1, 200),
    k_len=st.integers(1, 400),
    outer=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dim=dims,
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([0.0, 1.0, 30.0]),
    seed=seeds,
)
def test_any_dense(q_len, k_len, outer, dim, dtype, size, seed):
    q_shape, k_shape = (outer[0], q_len, outer[1], dim), (outer[0], k_len, outer[1], dim)
    check(*draw(q_shape, k_shape, k_shape, dtype=dtype, seed=seed, size=size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_list_equals_dense(isa, dtype):
    q, k, v = draw((2, 100, 2, 64), (2, 210, 2, 64), (2, 210, 2, 64), dtype=dtype)
    keep = np.ones((2, 2, 1, 3 * 3), bool)
    sparse = check(q, k, v, keep, frame_tokens=70, block_k=32)
    dense = check(q, k, v)
    torch.testing.assert_close(sparse[0], dense[0])
    torch.testing.assert_close(sparse[1], dense[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys_are_zero(isa, dtype):
    q, k, v = draw((1, 70, 2, 16), (1, 64, 2, 16), (1, 64, 2, 16), dtype=dtype)
    keep = np.ones((1, 2, 3, 2), bool)
    keep[0, 1, 1] = False
    out, lse = check(q, k, v, keep, frame_tokens=64, block_q=32, block_k=32)
    assert (out[0, 32:64, 1] == 0).all() and (lse[0, 1, 32:64] == -torch.inf).all()
    assert (out[0, 32:64, 0] != 0).any() and torch.isfinite(lse[0, 0]).all()
    nothing = lf.BlockList.from_bool(
        np.zeros((1, 2, 3, 2), bool), q_len=70, k_len=64, frame_tokens=64, block_q=32, block_k=32
    )
    out, lse = lf.block_sparse_attention(q, k, v, nothing, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits_average_the_values(isa, dtype):
    q, k = torch.zeros(1, 5, 1, 16, dtype=dtype), torch.ones(1, 77, 1, 16, dtype=dtype)
    (v,) = draw((1, 77, 1, 16), dtype=dtype)
    _, lse = check(q, k, v)
    torch.testing.assert_close(lse, torch.full_like(lse, np.log(77)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_huge_logits(isa, dtype, size):
    q, k = draw((1, 40, 2, 32), (1, 150, 2, 32), dtype=dtype, size=size)
    (v,) = draw((1, 150, 2, 32), dtype=dtype, seed=1)
    out, lse = check(q, k, v, scale=1.0)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    keep = random_map(q, k, 50, 16, 32, 0.6, 0)
    check(q, k, v, keep, frame_tokens=50, block_q=16, block_k=32, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overflowing_logits_make_no_nan(isa, dtype):
    """They are clamped to the finite floats, also where +inf and -inf would have met."""
    big = torch.finfo(dtype).max
    (v,) = draw((1, 150, 2, 32), dtype=dtype, seed=1)
    for seed in range(4):
        q, k = draw((1, 40, 2, 32), (1, 150, 2, 32), dtype=dtype, seed=seed)
        q[:, ::3], k[:, ::2] = q[:, ::3].sign() * big, k[:, ::2].sign() * big
        keep = random_map(q, k, 50, 16, 32, 0.6, seed)
        for blocks in None, block_list(keep, q, k, 50, 16, 32):
            out, lse = lf.block_sparse_attention(q, k, v, blocks, return_lse=True)
            assert torch.isfinite(out).all() and not torch.isnan(lse).any()
            assert out.abs().max() <= v.abs().max() * (1 + 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_any_size(isa, dtype):
    q, k, v = draw((1, 9, 1, 16), (1, 50, 1, 16), (1, 50, 1, 16), dtype=dtype)
    for factor in 1e-4, 1e4:
        check(q, k, v * factor)
    # The sum before the division must fit float32: 50 keys times the value.
    big = torch.finfo(dtype).max / 64
    out = lf.block_sparse_attention(q, k, torch.full_like(v, big))
    torch.testing.assert_close(out, torch.full_like(out, big))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_key_reaches_only_the_rows_that_keep_it(isa, dtype):
    q, k, v = draw((1, 96, 2, 16), (1, 96, 2, 16), (1, 96, 2, 16), dtype=dtype)
    k[0, 40, 1, 3] = torch.nan
    keep = np.ones((1, 2, 3, 3), bool)
    keep[0, :, 1, 1] = False  # key block 1 holds the NaN; query block 1 does not keep it
    out, lse = check(q, k, v, keep, frame_tokens=96, block_q=32, block_k=32)
    assert torch.isfinite(out[:, :, 0]).all() and torch.isfinite(out[:, 32:64]).all()
    assert torch.isnan(lse[0, 1, :32]).all() and torch.isnan(lse[0, 1, 64:]).all()
    check(q, k, v)


def test_a_nan_value_reaches_only_its_channel(isa):
    q, k, v = draw((1, 40, 1, 16), (1, 96, 1, 16), (1, 96, 1, 16))
    v[0, 40, 0, 3] = torch.nan
    keep = np.ones((1, 1, 2, 3), bool)
    keep[0, 0, 1, 1] = False
    out, lse = check(q, k, v, keep, frame_tokens=96, block_q=32, block_k=32)
    assert torch.isfinite(lse).all() and torch.isnan(out[0, :32, 0, 3]).all()
    assert torch.isfinite(out[0, 32:]).all() and torch.isfinite(out[..., 4:]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_a_larger_cache(isa, dtype):
    # No two of them share a stride of any dimension.
    cache_k, cache_v = draw((3, 300, 4, 48), (3, 310, 5, 56), dtype=dtype, seed=1)
    (projected,) = draw((3, 50, 3, 4, 40), dtype=dtype)
    views = (
        projected[:, :, 1, 1:3],
        cache_k[:, 60:210, 1:3, 8:48],
        cache_v[:, 60:210, 2:4, :40],
    )
    compact = [x.contiguous() for x in views]
    keep = random_map(views[0], views[1], 50, 32, 16, 0.4, 0)
    blocks = block_list(keep, views[0], views[1], 50, 32, 16)
    for chosen in None, blocks:
        ours = lf.block_sparse_attention(*views, chosen, return_lse=True)
        expected = lf.block_sparse_attention(*compact, chosen, return_lse=True)
        assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    head_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views]
    assert torch.equal(lf.block_sparse_attention(*head_major, blocks), ours[0])
    expanded = [x[:1].expand(3, -1, -1, -1) for x in views]
    assert torch.equal(
        lf.block_sparse_attention(*expanded),
        lf.block_sparse_attention(*[x.clone() for x in expanded]),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_into_a_given_output(dtype):
    q, k, v = draw((2, 50, 2, 24), (2, 90, 2, 24), (2, 90, 2, 24), dtype=dtype)
    expected = lf.block_sparse_attention(q, k, v)
    out = torch.full_like(expected, 7.0)
    assert lf.block_sparse_attention(q, k, v, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_matter(isa, dtype, each_thread_count):
    q, k, v = draw((2, 200, 3, 64), (2, 450, 3, 64), (2, 450, 3, 64), dtype=dtype)
    keep = random_map(q, k, 150, 64, 64, 0.4, 0)
    blocks = block_list(keep, q, k, 150, 64, 64)
    for chosen in None, blocks:
        results = [
            lf.block_sparse_attention(q, k, v, chosen, return_lse=True) for _ in each_thread_count()
        ]
        for out, lse in results[1:]:
            assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@generated(
    100,
    dtype=st.sampled_from(DTYPES),
    frame_tokens=st.integers(1, 60),
    density=st.floats(0.1, 1),
    seed=seeds,
)
def test_recall_is_a_difference_of_two_lses(dtype, frame_tokens, density, seed):
    shape = (1, 3 * frame_tokens, 2, 16)
    q, k, v = draw(shape, shape, shape, dtype=dtype, seed=seed)
    keep = random_map(q, k, frame_tokens, 16, 16, density, seed)
    blocks = block_list(keep, q, k, frame_tokens, 16, 16)
    kept = lf.block_sparse_attention(q, k, v, blocks, return_lse=True)[1]
    dense = lf.block_sparse_attention(q, k, v, return_lse=True)[1]
    recall = (kept.double() - dense.double()).exp().numpy()
    mask = reference.token_mask(
        keep, shape[1], shape[1], frame_tokens=frame_tokens, block_q=16, block_k=16
    )
    logits = np.einsum("blhd,bmhd->bhlm", reference.as_float64(q), reference.as_float64(k)) / 4
    p = np.exp(logits - logits.max(-1, keepdims=True))
    truth = (p * mask).sum(-1) / p.sum(-1)
    np.testing.assert_allclose(recall, truth, atol=2e-5)


def test_numpy_in_numpy_out():
    q, k, v = draw((1, 20, 2, 16), (1, 40, 2, 16), (1, 40, 2, 16))
    out, lse = lf.block_sparse_attention(q.numpy(), k.numpy(), v.numpy(), return_lse=True)
    assert isinstance(out, np.ndarray) and isinstance(lse, np.ndarray)
    expected = lf.block_sparse_attention(q, k, v, return_lse=True)
    np.testing.assert_array_equal(out, expected[0].numpy())
    np.testing.assert_array_equal(lse, expected[1].numpy())


def test_select_and_attend_in_one_call():
    q, k, v = draw((2, 60, 2, 32), (2, 240, 2, 32), (2, 240, 2, 32))
    options = dict(
        frame_tokens=30, sparsity=0.6, keep_frames=3, block_q=32, block_k=16, score="mass"
    )
    out, lse, blocks = lf.attention(q, k, v, **options, return_lse=True, return_blocks=True)
    chosen = lf.select_blocks(q, k, **options)
    np.testing.assert_array_equal(np.asarray(blocks.indices), np.asarray(chosen.indices))
    expected = lf.block_sparse_attention(q, k, v, chosen, return_lse=True)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert torch.equal(lf.attention(q, k, v, **options), out)
    dense = lf.block_sparse_attention(q, k, v)
    assert torch.equal(lf.attention(q, k, v, frame_tokens=30, sparsity=0), dense)
    only_current = lf.attention(q, k[:, :60], v[:, :60], frame_tokens=30, sparsity=0.9)
    assert torch.equal(only_current, lf.block_sparse_attention(q, k[:, :60], v[:, :60]))


def test_inputs_are_not_written():
    tensors = draw((1, 40, 2, 16), (1, 80, 2, 16), (1, 80, 2, 16))
    before = [x.clone() for x in tensors]
    lf.block_sparse_attention(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
