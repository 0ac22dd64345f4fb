"""Block means: values, layouts, and the sums that every score shares."""

import numpy as np
import pytest
import torch
from cases import VIDEOS, dims, generated, seeds
from hypothesis import strategies as st
from numerics import DTYPES, assert_no_worse_than_torch, draw, draw_integers

import lightforcing as lf
from lightforcing import reference

BLOCKS = [4, 8, 16, 32, 64, 128]


def torch_means(x, frame_tokens, block):
    """The same in plain torch, summed in float32: the peer."""
    frames = x.float().split(frame_tokens, dim=1)
    return torch.cat(
        [part.mean(1, keepdim=True) for frame in frames for part in frame.split(block, dim=1)], 1
    )


def check(x, frame_tokens, block):
    means = lf.compress(x, frame_tokens, block=block)
    assert means.dtype == torch.float32 and means.is_contiguous()
    assert_no_worse_than_torch(
        means,
        reference.compress(x, frame_tokens, block=block),
        torch_means(x, frame_tokens, block),
        dtype=torch.float32,
        size=x.double().abs().max().item(),
    )


@pytest.mark.parametrize("video", VIDEOS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(isa, dtype, video):
    (x,) = draw(video.k_shape, dtype=dtype, shift=0.5)
    for block in BLOCKS:
        check(x, video.frame_tokens, block)


@generated(
    300,
    frame_tokens=st.integers(1, 150),
    frames=st.integers(1, 3),
    outer=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dim=dims,
    block=st.sampled_from(BLOCKS),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
    size=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_any_shape(frame_tokens, frames, outer, dim, block, dtype, seed, size):
    (x,) = draw((outer[0], frames * frame_tokens, outer[1], dim), dtype=dtype, seed=seed, size=size)
    check(x, frame_tokens, block)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact(isa, dtype):
    for frame_tokens, block in (64, 64), (96, 64), (80, 64), (1, 4), (192, 128), (136, 128):
        (x,) = draw_integers((2, 3 * frame_tokens, 2, 40), dtype=dtype, bound=100)
        means = lf.compress(x, frame_tokens, block=block).numpy()
        np.testing.assert_array_equal(means, reference.compress(x, frame_tokens, block=block))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_is_the_sum_of_its_quarters(isa, dtype):
    """Bit for bit, so one cache of 16-token means serves every score."""
    (x,) = draw((2, 3 * 256, 2, 24), dtype=dtype)
    for block in 16, 64, 128:
        fine = lf.compress(x, 256, block=block // 4).numpy()
        parts = fine.reshape(2, -1, 4, 2, 24)
        tokens = np.float32(block // 4)
        sums = tokens * parts[:, :, 0]
        for i in 1, 2, 3:
            sums = sums + tokens * parts[:, :, i]
        np.testing.assert_array_equal(
            sums / np.float32(block), lf.compress(x, 256, block=block).numpy()
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_input(isa, dtype):
    (cache,) = draw((3, 400, 6, 80), dtype=dtype)
    views = [
        cache[:, 37:257, 1:5, 8:72],
        cache[1:2, ::2, ::3, :64][:, :165],
        cache.transpose(1, 2)[:, 2:, :110].transpose(1, 2)[..., :40],
        cache[:1].expand(4, -1, -1, -1)[:, :220],
    ]
    for view in views:
        expected = lf.compress(view.contiguous(), 55, block=16)
        assert torch.equal(lf.compress(view, 55, block=16), expected)


def test_into_a_cache_frame_by_frame():
    frame_tokens, per_frame = 70, 5
    (x,) = draw((3, 6 * frame_tokens, 2, 16))
    whole = lf.compress(x, frame_tokens, block=16)
    cache = torch.full((3, 40, 4, 16), -7.0)
    for frame in range(6):
        new = x[:, frame * frame_tokens : (frame + 1) * frame_tokens]
        out = cache[:, 3 + frame * per_frame : 3 + (frame + 1) * per_frame, 1:3]
        assert lf.compress(new, frame_tokens, block=16, out=out) is out
    assert torch.equal(cache[:, 3:33, 1:3], whole)
    cache[:, 3:33, 1:3] = -7.0
    assert (cache == -7.0).all(), "wrote outside of the slice"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neither_threads_nor_instruction_set_matter(dtype, each_isa, each_thread_count):
    (x,) = draw((2, 4 * 150, 3, 72), dtype=dtype)
    by_isa = [lf.compress(x, 150, block=64) for _ in each_isa()]
    by_threads = [lf.compress(x, 150, block=64) for _ in each_thread_count()]
    assert all(torch.equal(means, by_isa[0]) for means in by_isa + by_threads)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_special_value_stays_in_its_block(isa, value):
    (x,) = draw((1, 200, 2, 16))
    x[0, 130, 1, 5] = value
    means = lf.compress(x, 100, block=32).numpy()
    expected = reference.compress(x, 100, block=32)
    np.testing.assert_array_equal(np.isfinite(means), np.isfinite(expected))
    assert np.isfinite(means).sum() == means.size - 1


def test_results_are_of_the_inputs_kind():
    x = np.random.default_rng(0).standard_normal((1, 40, 2, 8))
    for dtype in np.float32, np.float16:
        array = x.astype(dtype)
        means = lf.compress(array, 20, block=16)
        assert isinstance(means, np.ndarray) and means.dtype == np.float32
        tensor = lf.compress(torch.from_numpy(array), 20, block=16)
        assert isinstance(tensor, torch.Tensor)
        np.testing.assert_array_equal(tensor.numpy(), means)


def test_the_input_is_not_written():
    (x,) = draw((1, 90, 2, 16))
    before = x.clone()
    lf.compress(x, 30, block=16)
    assert torch.equal(x, before)
