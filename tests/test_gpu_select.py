"""Selection on the GPU against the float64 definition, and against the CPU's lists."""

import numpy as np
import pytest
import torch
from gpu import draw, needs_gpu, use_kernel
from numerics import DTYPES, assert_scores, assert_selection

import lightforcing as lf
from lightforcing import _core, reference

pytestmark = needs_gpu
SCORES = ["mean", "mass", "lse"]
TOKENS = [1, 60, 64, 78, 880, 1536, 1560]


def pair(tokens, q_frames, k_frames, *, batch=1, heads=2, dim=128, dtype=torch.bfloat16, seed=0):
    q = draw((batch, q_frames * tokens, heads, dim), dtype, seed)
    k = draw((batch, k_frames * tokens, heads, dim), dtype, seed + 1)
    return q + 0.2, k + 0.2


def select(q, k, **options):
    """Indices and scores, as CPU arrays; the same bits in a second run."""
    blocks, scores = lf.select_blocks(q, k, **options, return_scores=True)
    again = lf.select_blocks(q, k, **options)
    assert blocks.indices.device == q.device and blocks.indices.dtype == torch.int32
    assert torch.equal(blocks.indices, again.indices), "not bit-stable from run to run"
    assert (blocks.counts == blocks.indices.shape[-1]).all()
    return blocks.indices.cpu().numpy(), scores.cpu()


def check(q, k, *, exact=False, **options):
    """Against float64 (section 2's tolerance) and against the CPU; mean equals the CPU's bits."""
    indices, scores = select(q, k, **options)
    means = options.pop("k_means", None)
    truth = reference.select_blocks(q.cpu(), k.cpu(), **options)
    assert indices.shape[-1] == truth.plan.kept
    assert_scores(scores, truth)
    assert_selection(indices, truth, exact=exact)
    if means is not None:
        means = means.cpu()
    cpu, cpu_scores = lf.select_blocks(
        q.cpu(), k.cpu(), **options, k_means=means, return_scores=True
    )
    if options.get("score", "mean") == "mean" or exact:
        np.testing.assert_array_equal(indices, cpu.indices.numpy())
    if options.get("score", "mean") == "mean":
        assert torch.equal(scores.nan_to_num(7.0), cpu_scores.nan_to_num(7.0))
    return indices


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("hierarchy", [True, False], ids=["frames", "flat"])
def test_frame_sizes(tokens, score, hierarchy):
    frames = {1: 200, 60: 14, 64: 12, 78: 12}.get(tokens, 9)
    q, k = pair(tokens, 1 if tokens > 100 else 3, frames, batch=2 if tokens < 100 else 1)
    options = dict(frame_tokens=tokens, score=score, hierarchy=hierarchy)
    check(q, k, **options, sparsity=0.8)
    check(q, k, **options, sparsity=0.9, keep_frames=3, sink_frames=1, near_frames=1)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_head_sizes(score, dtype):
    for dim in (8, 40, 64, 72, 128):
        q, k = pair(70, 2, 9, dim=dim, dtype=dtype, seed=dim)
        check(q, k, frame_tokens=70, score=score, sparsity=0.8)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("block_k", [16, 32, 64, 128])
@pytest.mark.parametrize("block_q", [16, 20, 64, 100, 128])
def test_block_sizes(score, block_q, block_k):
    q, k = pair(150, 2, 8, dim=64)
    for hierarchy in (True, False):
        check(q, k, frame_tokens=150, score=score, sparsity=0.7, block_q=block_q, block_k=block_k,
              hierarchy=hierarchy, keep_frames=3, near_frames=1)  # fmt: skip


@pytest.mark.parametrize("score", SCORES)
def test_chunk_seven_of_self_forcing(score):
    """All 12 heads against the CPU; the float64 definition takes minutes at this size."""
    q, k = pair(1560, 3, 21, heads=12)
    for hierarchy in (True, False):
        options = dict(frame_tokens=1560, score=score, hierarchy=hierarchy, sparsity=0.9)
        gpu = lf.select_blocks(q, k, **options).indices.cpu()
        cpu = lf.select_blocks(q.cpu(), k.cpu(), **options).indices
        differ = (gpu != cpu).any(-1)
        # Rows may differ between near ties only: one block changed for another, in few rows.
        assert differ.float().mean() <= (0 if score == "mean" else 0.01)
        for mine, theirs in zip(gpu[differ], cpu[differ], strict=True):
            assert len(set(mine.tolist()) - set(theirs.tolist())) <= 1


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.95, 1.0])
def test_budgets(score, sparsity):
    q, k = pair(78, 2, 12)
    for hierarchy in (True, False):
        check(q, k, frame_tokens=78, score=score, sparsity=sparsity, hierarchy=hierarchy)


def test_no_past_is_dense():
    q, k = pair(96, 3, 3)
    indices, _ = select(q, k, frame_tokens=96, sparsity=0.9)
    np.testing.assert_array_equal(indices, np.broadcast_to(np.arange(6), indices.shape))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("block_k", [16, 64])
def test_given_means_give_the_same_bits(score, block_k):
    tokens, batch = 150, 2
    q, k = pair(tokens, 2, 7, batch=batch, dim=40)
    options = dict(
        frame_tokens=tokens, score=score, sparsity=0.7, keep_frames=4, block_q=64, block_k=block_k
    )
    expected = select(q, k, **options)
    block = block_k if score == "mean" else block_k // 4
    per_frame = -(-tokens // block)
    whole = lf.compress(k, tokens, block=block)
    cache = torch.full((batch, 9 * per_frame, 4, 64), torch.nan, device="cuda")
    past = cache[:, per_frame : 6 * per_frame, 1:3, :40]
    past.copy_(whole[:, : 5 * per_frame])
    for means in whole, whole[:, : 5 * per_frame], past:
        indices, scores = select(q, k, **options, k_means=means)
        np.testing.assert_array_equal(indices, expected[0])
        assert torch.equal(scores, expected[1])
    check(q, k, **options, k_means=whole)


@pytest.mark.parametrize("score", SCORES)
def test_given_means_are_really_used(score):
    q, k = pair(64, 1, 6)
    options = dict(frame_tokens=64, score=score, sparsity=0.5, hierarchy=False)
    other = k.roll(128, 1)
    means = lf.compress(other[:, : 5 * 64], 64, block=64 if score == "mean" else 16)
    swapped = torch.cat([other[:, : 5 * 64], k[:, 5 * 64 :]], 1)
    mine, theirs = select(q, k, **options, k_means=means), select(q, swapped, **options)
    np.testing.assert_array_equal(mine[0], theirs[0])
    assert torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_a_larger_cache(dtype):
    cache, projected = draw((3, 900, 4, 64), dtype, 1), draw((3, 160, 3, 4, 64), dtype, 2)
    k, q = cache[:, 70:630, 1:3, 8:48], projected[:, :, 0, 2:4, :40]
    odd = cache[:, 70:630, 1:3, 4:44]  # an address that 16 bytes do not divide
    for score in SCORES:
        options = dict(frame_tokens=80, score=score, sparsity=0.6, block_q=32, block_k=16)
        for view in k, odd:
            strided = select(q, view, **options)
            compact = select(q.contiguous(), view.contiguous(), **options)
            np.testing.assert_array_equal(strided[0], compact[0])
            assert torch.equal(strided[1], compact[1])
        check(q, k, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integer_ties_go_to_the_lower_index(dtype):
    """On integers and whole blocks the scores are exact: the lists are the definition's."""
    g = torch.Generator("cuda").manual_seed(0)
    for bound in (0, 1, 2):
        q, k = (
            torch.randint(-bound, bound + 1, (1, n, 2, 64), generator=g, device="cuda").to(dtype)
            for n in (2 * 128, 12 * 128)
        )
        for hierarchy in (True, False):
            check(q, k, exact=True, frame_tokens=128, sparsity=0.8, hierarchy=hierarchy)


@pytest.mark.parametrize("score", SCORES)
def test_equal_frames_tie(score):
    q, k = pair(192, 1, 1, dim=64)
    k = k.repeat(1, 6, 1, 1)
    indices, scores = select(
        q, k, frame_tokens=192, score=score, sparsity=0.7, hierarchy=False, block_q=64
    )
    by_frame = scores.view(1, 2, 3, 6, 3)
    assert (by_frame == by_frame[..., :1, :]).all()
    order = np.argsort(-scores.numpy(), axis=-1, kind="stable")[..., : indices.shape[-1]]
    np.testing.assert_array_equal(indices, np.sort(order, axis=-1))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("hierarchy", [True, False], ids=["frames", "flat"])
def test_a_nan_key_ranks_last(score, hierarchy):
    q, k = pair(128, 1, 8)
    k[0, 3 * 128 + 70, 0, 3] = torch.nan  # head 0, frame 3, block 7
    options = dict(frame_tokens=128, score=score, hierarchy=hierarchy, keep_frames=3, near_frames=1)
    assert 7 not in check(q, k, **options, sparsity=0.7)[0, 0]
    assert 7 in check(q, k, **options, sparsity=0.0)[0, 0]  # nothing else is left


@pytest.mark.parametrize("score", SCORES)
def test_nan_frames_tie_and_a_nan_query_keeps_the_first(score):
    q, k = pair(64, 2, 9)
    k[0, 2 * 64 + 5], k[0, 4 * 64 : 5 * 64] = torch.nan, torch.nan
    check(q, k, frame_tokens=64, score=score, sparsity=0.15, block_k=32)
    q, k = pair(64, 2, 9)
    q[0, 70] = torch.nan
    kept = check(q, k, frame_tokens=64, score=score, sparsity=0.7, block_q=64)
    np.testing.assert_array_equal(kept[0, :, 1], [[0, 1], [0, 1]])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("size", [30.0, 1e3, 1e4])
def test_huge_logits(score, size):
    q, k = pair(64, 1, 8)
    check(q * size, k * size, frame_tokens=64, score=score, sparsity=0.7, block_k=16, block_q=32)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("value", [1e30, float("inf"), -float("inf")])
def test_overflowing_logits_still_give_a_list(score, value):
    q, k = pair(64, 1, 8)
    q[:, 3], k[:, 100] = value, value
    for hierarchy in (True, False):
        indices, _ = select(q, k, frame_tokens=64, score=score, sparsity=0.5, hierarchy=hierarchy)
        assert (np.diff(indices, axis=-1) > 0).all()
        assert indices.min() >= 0 and indices.max() < 8


def test_a_long_video():
    """More blocks than one pass of the chooser holds in registers."""
    q, k = pair(64, 1, 2000, heads=1, dim=64)
    for score in SCORES:
        gpu = lf.select_blocks(q, k, frame_tokens=64, score=score, sparsity=0.9).indices.cpu()
        cpu = lf.select_blocks(q.cpu(), k.cpu(), frame_tokens=64, score=score, sparsity=0.9).indices
        changed = len(set(gpu.flatten().tolist()) ^ set(cpu.flatten().tolist()))
        assert changed <= (0 if score == "mean" else 4)


@pytest.fixture
def portable():
    """The kernels of other chips, which a Hopper GPU would not run by itself."""
    use_kernel("portable")
    yield
    _core.force_kernel("auto")


@pytest.mark.parametrize("score", ["mass", "lse"])
@pytest.mark.parametrize("dim", [40, 128])
def test_portable_kernels(portable, score, dim):
    for tokens, block_q, block_k in (150, 128, 64), (78, 100, 16), (130, 64, 128):
        q, k = pair(tokens, 2, 9, dim=dim)
        k[0, 3 * tokens + 5, 0, 3] = torch.nan
        options = dict(frame_tokens=tokens, score=score, block_q=block_q, block_k=block_k)
        check(q, k, **options, sparsity=0.7, keep_frames=3, near_frames=1)
    q, k = pair(64, 1, 8, dim=dim)
    check(q * 1e3, k * 1e3, frame_tokens=64, score=score, sparsity=0.7, block_k=16)


@pytest.mark.parametrize("score", SCORES)
def test_parts_of_any_number_of_rows(score):
    """Frames and query blocks that end in a part of 1, 2, 3 ... rows."""
    for tokens in range(32, 65, 3):
        q, k = pair(tokens, 1, 5, dim=40, seed=tokens)
        for block_k in 16, 64, 128:
            options = dict(frame_tokens=tokens, score=score, block_k=block_k, hierarchy=False)
            check(q, k, **options, sparsity=0.5)


def test_what_it_does_not_take():
    q, k = pair(16, 1, 2, dim=256)
    for score in ("mass", "lse"):
        with pytest.raises(NotImplementedError, match="head size of at most 128"):
            lf.select_blocks(q, k, frame_tokens=16, sparsity=0.5, score=score)
