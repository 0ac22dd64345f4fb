"""Selection: which blocks each query block keeps, held to the float64 definition."""

import numpy as np
import pytest
import torch
from cases import BLOCKS, SCORES, VIDEOS, generated, seeds, videos
from hypothesis import assume
from hypothesis import strategies as st
from numerics import DTYPES, assert_scores, assert_selection, draw, draw_integers

import lightforcing as lf
from lightforcing import reference

SMALL = dict(keep_frames=3, sink_frames=1, near_frames=1, block_q=32, block_k=16)


def select(q, k, **options):
    """Indices and scores of the operator."""
    blocks, scores = lf.select_blocks(q, k, **options, return_scores=True)
    assert isinstance(blocks, lf.BlockList)
    indices = np.asarray(blocks.indices)
    assert indices.dtype == np.int32
    assert (np.asarray(blocks.counts) == indices.shape[-1]).all()
    return indices, scores


def check(q, k, *, exact=False, **options):
    truth = reference.select_blocks(q, k, **options)
    indices, scores = select(q, k, **options)
    assert indices.shape[-1] == truth.plan.kept
    assert_scores(scores, truth)
    assert_selection(indices, truth, exact=exact)
    plan = lf.plan_selection(
        q.shape[1] // options["frame_tokens"],
        k.shape[1] // options["frame_tokens"],
        options["frame_tokens"],
        sparsity=options["sparsity"],
        **{n: options[n] for n in ("block_k", "keep_frames", "hierarchy") if n in options},
    )
    if truth.past > 0:
        assert plan == (truth.plan.blocks, truth.plan.kept, truth.plan.keep_frames)
    return indices


@pytest.mark.parametrize("video", VIDEOS, ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("hierarchy", [True, False], ids=["frames", "flat"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(isa, dtype, hierarchy, score, video):
    q, k = draw(video.q_shape, video.k_shape, dtype=dtype, shift=0.2)
    options = dict(frame_tokens=video.frame_tokens, score=score, hierarchy=hierarchy)
    check(q, k, **options, sparsity=0.8)
    check(q, k, **options, **SMALL, sparsity=0.7)


@generated(
    700,
    video=videos(),
    score=st.sampled_from(SCORES),
    hierarchy=st.booleans(),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]) | st.floats(0, 1),
    frames=st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 3)),
    block_q=st.sampled_from(BLOCKS),
    block_k=st.sampled_from(BLOCKS),
    scale=st.none() | st.sampled_from([1e-3, 1.0]),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([0.0, 0.1, 1.0, 1.0, 4.0]),
    shift=st.sampled_from([0.0, 0.5]),
    seed=seeds,
)
def test_any_video(
    video,
    score,
    hierarchy,
    sparsity,
    frames,
    block_q,
    block_k,
    scale,
    dtype,
    size,
    shift,
    seed,
):
    sink, near, more = frames
    q, k = draw(video.q_shape, video.k_shape, dtype=dtype, seed=seed, size=size, shift=shift)
    check(
        q,
        k,
        frame_tokens=video.frame_tokens,
        sparsity=sparsity,
        keep_frames=sink + near + more,
        sink_frames=sink,
        near_frames=near,
        score=score,
        hierarchy=hierarchy,
        block_q=block_q,
        block_k=block_k,
        scale=scale,
    )


@generated(
    300,
    blocks_per_frame=st.integers(1, 3),
    tail=st.sampled_from([0, 4, 8]),
    frames=st.tuples(st.integers(1, 3), st.integers(1, 8)),
    hierarchy=st.booleans(),
    sparsity=st.floats(0, 1),
    block_q=st.sampled_from([16, 32]),
    block_k=st.sampled_from([16, 32]),
    bound=st.sampled_from([0, 1, 2]),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_integers_are_exact_with_all_their_ties(
    blocks_per_frame, tail, frames, hierarchy, sparsity, block_q, block_k, bound, dtype, seed
):
    frame_tokens = blocks_per_frame * block_k + tail
    tail_rows = frames[0] * frame_tokens % block_q
    assume(tail_rows & (tail_rows - 1) == 0)  # another mean of rows is not exact in float32
    shapes = [(2, n * frame_tokens, 1, 8) for n in (frames[0], sum(frames))]
    q, k = draw_integers(*shapes, dtype=dtype, seed=seed, bound=bound)
    check(
        q,
        k,
        exact=True,
        frame_tokens=frame_tokens,
        sparsity=sparsity,
        hierarchy=hierarchy,
        **{**SMALL, "block_q": block_q, "block_k": block_k},
    )


def keep_all_equal(score, hierarchy, sparsity=0.8, frame_tokens=32):
    q, k = torch.ones(1, frame_tokens, 1, 8), torch.ones(1, 8 * frame_tokens, 1, 8)
    options = dict(**SMALL, frame_tokens=frame_tokens, score=score, hierarchy=hierarchy)
    return check(q, k, exact=True, sparsity=sparsity, **options)[0, 0, 0].tolist()


@pytest.mark.parametrize("score", SCORES)
def test_ties_go_to_the_lower_index(isa, score):
    # 16 blocks in 8 frames, 3 of them kept.
    assert keep_all_equal(score, hierarchy=False) == [0, 1, 2]
    # Candidate frames: 0 (sink), 6 (near), 1 (lowest of the equal ones), 7 (current).
    assert keep_all_equal(score, hierarchy=True, sparsity=0.5) == [0, 1, 2, 3, 12, 13, 14, 15]
    assert keep_all_equal(score, hierarchy=True, sparsity=0.7) == [0, 1, 2, 3]


def test_minus_zero_ties_with_plus_zero(isa):
    # Products of 1e-60 round to a zero that keeps its sign: -0 in the first half, +0 after it.
    q, k = torch.full((1, 16, 1, 8), 1e-30), torch.full((1, 8 * 16, 1, 8), 1e-30)
    k[0, :64] = -1e-30
    options = dict(frame_tokens=16, sparsity=0.7, block_q=16, block_k=16)
    kept, scores = select(q, k, **options, hierarchy=False)
    assert (scores == 0).all() and kept[0, 0, 0].tolist() == [0, 1]
    assert select(q, k.flip(1), **options, hierarchy=False)[0][0, 0, 0].tolist() == [0, 1]
    # Frames 0 (sink), 1 (lowest tie), 6 (near) and 7: three past frames may be kept.
    kept, _ = select(q, k, **{**options, "sparsity": 0.5}, keep_frames=3, near_frames=1)
    assert kept[0, 0, 0].tolist() == [0, 1, 6, 7]


@pytest.mark.parametrize("score", SCORES)
def test_repeated_keys_tie(isa, score):
    """Equal keys have bit-equal scores, wherever they lie; the first of them are kept."""
    q, one = draw((1, 40, 1, 24), (1, 40, 1, 24), shift=0.5)
    k = one.repeat(1, 6, 1, 1)
    options = dict(**SMALL, frame_tokens=40, score=score, hierarchy=False)
    indices, scores = select(q, k, sparsity=0.7, **options)
    by_frame = np.asarray(scores).reshape(2, 6, 3)
    assert (by_frame == by_frame[:, :1]).all()
    order = np.argsort(-by_frame.reshape(2, 18), axis=-1, kind="stable")
    np.testing.assert_array_equal(indices[0, 0], np.sort(order[:, :5], axis=-1))


@pytest.mark.parametrize("score", SCORES)
def test_hierarchy_narrows_the_choice(score):
    q, k = draw((1, 64, 2, 16), (1, 12 * 64, 2, 16))
    options = dict(frame_tokens=64, score=score, sparsity=0.8, block_q=64, block_k=16)
    indices, _ = select(q, k, **options, keep_frames=4, sink_frames=2, near_frames=1)
    frames = indices // 4
    allowed = np.isin(frames, [0, 1, 10, 11])
    for row in np.ndindex(indices.shape[:-1]):
        assert len(set(frames[row][~allowed[row]])) <= 1
    flat, _ = select(q, k, **options, hierarchy=False)
    assert (flat != indices).any()


def test_forced_frames_are_candidates_not_guaranteed():
    q, k = draw((1, 16, 1, 16), (1, 8 * 16, 1, 16))
    q += 2
    k[:, :16] -= 9  # the sink frame scores worst
    kept = check(q, k, frame_tokens=16, sparsity=0.7, keep_frames=3, near_frames=1, block_k=16)
    assert 0 not in kept


def test_no_past_is_dense():
    q, k = draw((1, 96, 2, 16), (1, 96, 2, 16))
    indices, _ = select(q, k, frame_tokens=32, sparsity=0.9, block_q=32, block_k=16)
    np.testing.assert_array_equal(indices, np.broadcast_to(np.arange(6), (1, 2, 3, 6)))


def test_a_past_that_fits_has_no_frame_stage():
    q, k = draw((1, 64, 2, 16), (1, 5 * 64, 2, 16))
    options = dict(frame_tokens=64, sparsity=0.7, block_q=32, block_k=16)
    with_frames, _ = select(q, k, **options, keep_frames=4, hierarchy=True)
    flat, _ = select(q, k, **options, hierarchy=False)
    np.testing.assert_array_equal(with_frames, flat)


def test_keep_frames_rises_with_the_budget():
    q, k = draw((1, 32, 1, 16), (1, 10 * 32, 1, 16))
    options = dict(**SMALL, frame_tokens=32)
    assert lf.plan_selection(1, 10, 32, sparsity=0.4, block_k=16, keep_frames=3) == (20, 12, 5)
    blocks = lf.select_blocks(q, k, sparsity=0.4, **options)
    assert blocks.keep_frames == 5
    check(q, k, sparsity=0.4, **options)
    assert lf.select_blocks(q, k, sparsity=0.7, **options).keep_frames == 3
    assert lf.plan_selection(1, 10, 32, sparsity=0.4, block_k=16, hierarchy=False)[1] == 12


def test_full_budget_keeps_everything():
    q, k = draw((1, 32, 1, 16), (1, 4 * 32, 1, 16))
    blocks = lf.select_blocks(q, k, sparsity=0.0, frame_tokens=32, block_q=32, block_k=16)
    assert blocks.density == 1.0
    np.testing.assert_array_equal(np.asarray(blocks.indices)[0, 0, 0], np.arange(8))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("block_k", [16, 64])
def test_cached_means_give_the_same_bits(isa, score, block_k):
    frame_tokens = 150
    q, k = draw((3, 2 * frame_tokens, 2, 40), (3, 7 * frame_tokens, 2, 40), dtype=torch.bfloat16)
    options = dict(frame_tokens=frame_tokens, score=score, sparsity=0.7, keep_frames=4)
    options.update(block_q=64, block_k=block_k)
    expected = select(q, k, **options)
    block = block_k if score == "mean" else block_k // 4
    per_frame = -(-frame_tokens // block)
    whole = lf.compress(k, frame_tokens, block=block)
    cache = torch.full((3, 9 * per_frame, 4, 64), torch.nan)
    past = cache[:, per_frame : 6 * per_frame, 1:3, :40]
    past.copy_(whole[:, : 5 * per_frame])
    for means in whole, whole[:, : 5 * per_frame], past:
        indices, scores = select(q, k, **options, k_means=means)
        np.testing.assert_array_equal(indices, expected[0])
        assert torch.equal(scores, expected[1])


@pytest.mark.parametrize("score", SCORES)
def test_cached_means_are_really_used(score):
    q, k = draw((1, 32, 1, 16), (1, 6 * 32, 1, 16))
    options = dict(
        frame_tokens=32, score=score, sparsity=0.5, hierarchy=False, block_q=32, block_k=16
    )
    means = lf.compress(k, 32, block=16 if score == "mean" else 4)
    other = lf.compress(k.roll(64, 1), 32, block=16 if score == "mean" else 4)
    per_frame = means.shape[1] // 6
    past = 5 * per_frame
    indices, scores = select(q, k, **options, k_means=other[:, :past])
    swapped = torch.cat([k.roll(64, 1)[:, :160], k[:, 160:]], 1)
    expected = select(q, swapped, **options)
    np.testing.assert_array_equal(indices, expected[0])
    assert torch.equal(scores, expected[1])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neither_threads_nor_instruction_set_matter(score, dtype, each_isa, each_thread_count):
    q, k = draw((2, 300, 3, 72), (2, 900, 3, 72), dtype=dtype)
    options = dict(frame_tokens=150, score=score, sparsity=0.8, keep_frames=4, block_k=32)
    by_isa = [select(q, k, **options) for _ in each_isa()]
    by_threads = [select(q, k, **options) for _ in each_thread_count()]
    for indices, _ in by_isa:
        np.testing.assert_array_equal(indices, by_isa[0][0])
    for indices, scores in by_threads:
        np.testing.assert_array_equal(indices, by_isa[0][0])
        assert torch.equal(scores, by_threads[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_a_larger_cache(isa, dtype):
    cache, projected = draw((3, 500, 4, 64), (3, 80, 3, 4, 64), dtype=dtype)
    k, q = cache[:, 70:350, 1:3, 8:48], projected[:, :, 0, 2:4, :40]
    for score in SCORES:
        options = dict(**SMALL, frame_tokens=40, score=score, sparsity=0.6)
        strided = select(q, k, **options)
        compact = select(q.contiguous(), k.contiguous(), **options)
        np.testing.assert_array_equal(strided[0], compact[0])
        assert torch.equal(strided[1], compact[1])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("hierarchy", [True, False], ids=["frames", "flat"])
def test_a_nan_key_ranks_last(isa, score, hierarchy):
    q, k = draw((1, 32, 2, 16), (1, 8 * 32, 2, 16))
    k[0, 70, 0, 3] = torch.nan  # head 0, frame 2, block 4
    options = dict(**SMALL, frame_tokens=32, score=score, hierarchy=hierarchy)
    kept = check(q, k, **options, sparsity=0.7)
    assert 4 not in kept[0, 0]
    # A NaN is kept when there is nothing else to keep.
    assert 4 in check(q, k, **options, sparsity=0.0)[0, 0]


@pytest.mark.parametrize("score", SCORES)
def test_nan_frames_tie(isa, score):
    """A frame with one NaN block and one with nothing else rank alike: last, lower first."""
    q, k = draw((1, 32, 1, 16), (1, 8 * 32, 1, 16))
    k[0, 70], k[0, 4 * 32 : 5 * 32] = torch.nan, torch.nan
    options = dict(**{**SMALL, "keep_frames": 6}, frame_tokens=32, score=score)
    kept = check(q, k, **options, sparsity=0.15)  # 13 of 16: all frames but one
    assert kept[0, 0, 0].tolist() == [0, 1, 2, 3, 5, 6, 7, *range(10, 16)]  # 4 is the NaN


@pytest.mark.parametrize("score", SCORES)
def test_nan_query_keeps_the_first_blocks(isa, score):
    q, k = draw((1, 32, 1, 16), (1, 8 * 32, 1, 16))
    q[0, 20] = torch.nan
    kept = check(q, k, **{**SMALL, "block_q": 16}, frame_tokens=32, score=score, sparsity=0.8)
    assert kept[0, 0, 1].tolist() == [0, 1, 2]
    assert kept.shape == (1, 1, 2, 3)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("size", [30.0, 1e3, 1e4])
def test_huge_logits(isa, score, size):
    q, k = draw((1, 32, 2, 16), (1, 8 * 32, 2, 16), size=size)
    check(q, k, **SMALL, frame_tokens=32, score=score, sparsity=0.7)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("value", [1e30, float("inf"), -float("inf")])
def test_overflowing_logits_still_give_a_list(isa, score, value):
    q, k = draw((1, 32, 2, 16), (1, 8 * 32, 2, 16))
    q[:, 3], k[:, 100] = value, value
    options = dict(**SMALL, frame_tokens=32, score=score, sparsity=0.7)
    for hierarchy in True, False:
        blocks = lf.select_blocks(q, k, **options, hierarchy=hierarchy)
        indices = np.asarray(blocks.indices)
        assert (np.diff(indices, axis=-1) > 0).all()
        assert indices.min() >= 0 and indices.max() < 16


def test_frames_of_one_token():
    q, k = draw((2, 3, 2, 16), (2, 40, 2, 16))
    for score in SCORES:
        check(q, k, frame_tokens=1, sparsity=0.8, score=score)
        check(q, k, frame_tokens=1, sparsity=0.8, score=score, hierarchy=False)


def test_numpy_in_numpy_out():
    q, k = draw((1, 32, 1, 16), (1, 6 * 32, 1, 16))
    options = dict(**SMALL, frame_tokens=32, sparsity=0.5)
    blocks, scores = lf.select_blocks(q.numpy(), k.numpy(), **options, return_scores=True)
    expected, torch_scores = lf.select_blocks(q, k, **options, return_scores=True)
    assert isinstance(blocks.indices, np.ndarray) and isinstance(scores, np.ndarray)
    assert isinstance(expected.indices, torch.Tensor)
    np.testing.assert_array_equal(blocks.indices, expected.indices.numpy())
    np.testing.assert_array_equal(scores, torch_scores.numpy())


def test_defaults_are_the_documented_ones():
    q, k = draw((1, 128, 1, 16), (1, 10 * 128, 1, 16))
    given = dict(keep_frames=6, sink_frames=1, near_frames=2, score="mean", hierarchy=True)
    given.update(block_q=128, block_k=64, scale=None, k_means=None)
    by_default = lf.select_blocks(q, k, frame_tokens=128, sparsity=0.7)
    spelled_out = lf.select_blocks(q, k, frame_tokens=128, sparsity=0.7, **given)
    assert torch.equal(by_default.indices, spelled_out.indices)
    assert (by_default.block_q, by_default.block_k, by_default.frame_tokens) == (128, 64, 128)
