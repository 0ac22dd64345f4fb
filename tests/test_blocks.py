"""Block lists: the same selection as a boolean map, as CSR, and for flex_attention."""

import copy
import pickle

import numpy as np
import pytest
import torch
from cases import BLOCKS, generated, seeds
from hypothesis import strategies as st
from numerics import draw

import lightforcing as lf
from lightforcing import reference


def make(keep, q_len, k_len, frame_tokens, block_q=32, block_k=16):
    return lf.BlockList.from_bool(
        keep,
        q_len=q_len,
        k_len=k_len,
        frame_tokens=frame_tokens,
        block_q=block_q,
        block_k=block_k,
    )


def random_map(seed, batch, heads, rows, blocks, density):
    return np.random.default_rng(seed).random((batch, heads, rows, blocks)) < density


@generated(
    200,
    outer=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    q_len=st.integers(1, 200),
    frames=st.integers(1, 5),
    frame_tokens=st.integers(1, 100),
    block_q=st.sampled_from(BLOCKS),
    block_k=st.sampled_from(BLOCKS),
    density=st.sampled_from([0.0, 0.2, 0.8, 1.0]),
    seed=seeds,
)
def test_round_trip(outer, q_len, frames, frame_tokens, block_q, block_k, density, seed):
    rows, blocks = -(-q_len // block_q), frames * -(-frame_tokens // block_k)
    keep = random_map(seed, *outer, rows, blocks, density)
    made = make(keep, q_len, frames * frame_tokens, frame_tokens, block_q, block_k)
    indices, counts = np.asarray(made.indices), np.asarray(made.counts)
    assert indices.dtype == counts.dtype == np.int32
    np.testing.assert_array_equal(counts, keep.sum(-1))
    for row in np.ndindex(counts.shape):
        np.testing.assert_array_equal(indices[row][: counts[row]], np.flatnonzero(keep[row]))
    np.testing.assert_array_equal(np.asarray(made.to_bool()), keep)
    again = lf.BlockList(
        made.indices, made.counts, q_len, frames * frame_tokens, frame_tokens, block_q, block_k
    )
    np.testing.assert_array_equal(np.asarray(again.to_bool()), keep)

    offsets, columns = (np.asarray(x) for x in made.to_csr())
    assert len(offsets) == keep[..., 0].size + 1 and offsets[0] == 0
    flat = keep.reshape(-1, blocks)
    for row in range(len(flat)):
        np.testing.assert_array_equal(
            columns[offsets[row] : offsets[row + 1]], np.flatnonzero(flat[row])
        )

    mask = reference.token_mask(
        keep,
        q_len,
        frames * frame_tokens,
        frame_tokens=frame_tokens,
        block_q=block_q,
        block_k=block_k,
    )
    assert made.density == pytest.approx(mask.mean(), abs=1e-12)


def test_lists_of_a_selection_convert():
    q, k = draw((2, 60, 2, 16), (2, 300, 2, 16))
    blocks = lf.select_blocks(q, k, frame_tokens=30, sparsity=0.6, block_q=32, block_k=16)
    assert blocks.keep_frames == 6
    keep = blocks.to_bool()
    assert isinstance(keep, torch.Tensor) and keep.dtype == torch.bool
    assert keep.shape == (2, 2, 2, 20) and (keep.sum(-1) == 8).all()
    again = make(keep, 60, 300, 30)
    assert torch.equal(torch.as_tensor(again.indices), blocks.indices)


def test_density_weighs_short_blocks_and_rows():
    keep = np.zeros((1, 1, 2, 4), bool)
    keep[0, 0, 0, [0, 3]] = True  # 32 rows: 16 and 4 tokens of 40
    keep[0, 0, 1, 1] = True  # 8 rows: 4 tokens
    made = make(keep, q_len=40, k_len=40, frame_tokens=20)
    assert made.density == pytest.approx((32 * 20 + 8 * 4) / (40 * 40))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_agrees():
    from torch.nn.attention.flex_attention import flex_attention

    frame_tokens, q_len, k_len = 40, 80, 160
    q, k, v = draw((2, q_len, 2, 16), (2, k_len, 2, 16), (2, k_len, 2, 16))
    for seed, density in (0, 0.3), (1, 0.7), (2, 1.0):
        keep = random_map(seed, 2, 2, 3, 12, density)
        keep[..., 0] = True  # flex_attention is NaN on rows without keys in some versions
        made = make(keep, q_len, k_len, frame_tokens)
        mask = made.to_flex()
        with torch.no_grad():
            peer = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask)
        ours = lf.block_sparse_attention(q, k, v, made)
        torch.testing.assert_close(ours, peer.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_a_hand_made_list_with_padding_runs():
    """Entries past a row's count are padding: whatever they hold, they are not read."""
    q, k, v = draw((1, 40, 1, 16), (1, 64, 1, 16), (1, 64, 1, 16))
    indices = np.array([[[[1, 3, -5], [0, 99, 99]]]], np.int32)
    counts = np.array([[[2, 1]]], np.int32)
    made = lf.BlockList(indices, counts, 40, 64, 64, 32, 16)
    keep = np.zeros((1, 1, 2, 4), bool)
    keep[0, 0, 0, [1, 3]] = keep[0, 0, 1, 0] = True
    np.testing.assert_array_equal(np.asarray(made.to_bool()), keep)
    ours = lf.block_sparse_attention(q, k, v, made)
    expected = lf.block_sparse_attention(q, k, v, make(keep, 40, 64, 64))
    assert torch.equal(ours, expected)


def test_torch_lists_and_numpy_lists_are_equal():
    q, k, v = draw((1, 40, 1, 16), (1, 64, 1, 16), (1, 64, 1, 16))
    keep = random_map(0, 1, 1, 2, 4, 0.5)
    from_numpy = make(keep, 40, 64, 64)
    from_torch = make(torch.from_numpy(keep), 40, 64, 64)
    np.testing.assert_array_equal(np.asarray(from_numpy.indices), np.asarray(from_torch.indices))
    assert torch.equal(
        lf.block_sparse_attention(q, k, v, from_numpy),
        lf.block_sparse_attention(q, k, v, from_torch),
    )


def test_a_list_cannot_be_changed_and_copies_are_equal():
    made = make(random_map(0, 1, 1, 2, 4, 0.5), 40, 64, 64)
    for change in (lambda: setattr(made, "q_len", 3), lambda: setattr(made, "other", 3)):
        with pytest.raises(AttributeError, match="BlockList"):
            change()
    with pytest.raises(AttributeError, match="counts: .*BlockList"):
        del made.counts
    assert made.q_len == 40 and not hasattr(made, "other")
    for again in copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made)):
        np.testing.assert_array_equal(again.to_bool(), made.to_bool())
        assert again._row()[2:] == made._row()[2:] and again.keep_frames is None
        assert type(again) is lf.BlockList and again != made and repr(again) == repr(made)
    assert made == made and len({made, made}) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("score", ["mean", "mass"])
def test_made_in_a_compiled_function(score):
    """torch.compile traces the making of a list; what it cannot follow breaks the graph."""
    k = torch.randn(1, 256, 2, 64)
    options = dict(frame_tokens=64, sparsity=0.5, score=score)

    def call(q, k):
        return lf.attention(q * 1.0, k, k, **options) + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(k[:, :64], k), call(k[:, :64], k))
