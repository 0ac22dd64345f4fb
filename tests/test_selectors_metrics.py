"""The metrics against float64, the oracle's bound, and attention whose right blocks are known."""

import dataclasses

import numpy as np
import pytest
import torch
from selector_rules import key_blocks, lists, mass_table, ragged, tiles_8

import lightforcing as lf
from lightforcing import reference
from lightforcing.capturing import Captured, Facts
from lightforcing.selectors import (
    Budget,
    Geometry,
    calibrate,
    exact,
    make,
    metrics,
    names,
    token_places,
)

EXACT = [n for n in names() if make(n).exact]
CONTENT = ["mean", "sparge", "sparge-topp", "vsa", "hsa", "lse", "mass", "mass-fine", "oracle"]


def draw(g, seed=0, batch=1, heads=2, dim=16, scale=1.3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, n, heads, dim) for n in (g.q_len, g.k_len, g.k_len)]
    q, k, v = (torch.randn(s, generator=generator) for s in shapes)
    return (q * scale).to(dtype), k.to(dtype), v.to(dtype)


def truth(q, k, v, blocks):
    """Recall of every row, dense and sparse output: float64, by the reference."""
    kept = np.asarray(blocks.to_bool())
    place = {"frame_tokens": blocks.frame_tokens, "block_q": blocks.block_q,
             "block_k": blocks.block_k}  # fmt: skip
    mask = reference.token_mask(kept, q.shape[1], k.shape[1], **place)
    dense, lse = reference.attention(q, k, v)
    sparse, lse_kept = reference.attention(q, k, v, mask)
    return np.exp(lse_kept - lse), dense, sparse


@pytest.mark.parametrize("g", [ragged(kept=5), tiles_8(frames=7, q_frames=2, kept=6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["random", "sparge-topp", "mass"])
def test_metrics_are_the_definitions(g, dtype, name):
    q, k, v = draw(g, batch=2, dtype=dtype)
    blocks = make(name).select(q, k, g)
    share, dense, sparse = truth(q, k, v, blocks)
    np.testing.assert_allclose(metrics.recall(q, k, blocks).numpy(), share, atol=2e-6)
    m = metrics.measure(q, k, v, blocks)
    assert m["recall"] == pytest.approx(share.mean(), abs=1e-6)
    assert m["recall_p5"] == pytest.approx(np.quantile(share, 0.05), abs=1e-2)
    off = sparse - dense
    assert m["rel_l1"] == pytest.approx(abs(off).sum() / abs(dense).sum(), rel=1e-5)
    assert m["rel_l2"] == pytest.approx(np.sqrt((off**2).sum() / (dense**2).sum()), rel=1e-5)
    assert m["density"] == blocks.density and m["oracle_ratio"] is None
    np.testing.assert_allclose(m["recall_heads"], share.mean((0, 2)), atol=1e-6)
    assert sum(m["error_heads"]) == pytest.approx(m["rel_l2"] ** 2, rel=1e-5)
    errors = np.sqrt((off**2).sum((0, 1, 3)) / (dense**2).sum((0, 1, 3)))
    np.testing.assert_allclose(m["rel_l2_heads"], errors, rtol=1e-5)


def test_metrics_agree_with_the_kernels():
    g = tiles_8(frames=7, q_frames=2, kept=6)
    q, k, v = draw(g)
    blocks = make("mass").select(q, k, g)
    _, dense = lf.block_sparse_attention(q, k, v, return_lse=True)
    _, kept = lf.block_sparse_attention(q, k, v, blocks, return_lse=True)
    torch.testing.assert_close(
        metrics.recall(q, k, blocks), (kept - dense).exp(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("slab", [1, 5000, 60000, 1 << 30])
def test_slabs_of_any_size_give_the_same(slab, monkeypatch):
    g = ragged(kept=5)
    q, k, v = draw(g, batch=3)
    named = {n: make(n).select(q, k, g) for n in ("random", "mass")}
    once = metrics.measure(q, k, v, named)
    monkeypatch.setattr(exact, "SLAB", slab)
    expected = np.stack(
        [
            [mass_table(q[b, :, h].numpy(), k[b, :, h].numpy(), g) for h in range(2)]
            for b in range(3)
        ]
    )
    mass = metrics.true_mass(q, k, frame_tokens=20, block_q=32, block_k=16)
    np.testing.assert_allclose(mass.numpy(), expected, rtol=2e-5, atol=1e-6)
    again = metrics.measure(q, k, v, named)
    assert again["mass"]["recall"] == pytest.approx(once["mass"]["recall"], abs=1e-6)


def test_a_slab_is_bounded(monkeypatch):
    g = tiles_8(frames=21, q_frames=3)
    q, k, _ = draw(g, heads=4)
    monkeypatch.setattr(exact, "SLAB", 1 << 20)
    sizes = [p.numel() * p.itemsize for _, _, p in exact.slabs(q, k, g.block_q)]
    assert max(sizes) <= 1 << 20 and sum(sizes) == 4 * g.q_len * g.k_len * 4


def test_numpy_goes_in_and_comes_out():
    g = ragged(kept=5)
    q, k, v = draw(g)
    blocks = make("mean").select(q.numpy(), k.numpy(), g)
    assert isinstance(metrics.recall(q.numpy(), k.numpy(), blocks), np.ndarray)
    assert metrics.measure(q.numpy(), k.numpy(), v.numpy(), blocks)["recall"] == pytest.approx(
        metrics.measure(q, k, v, make("mean").select(q, k, g))["recall"]
    )
    mass = metrics.true_mass(q.numpy(), k.numpy(), frame_tokens=20)
    assert isinstance(mass, np.ndarray) and mass.shape == (1, 2, 1, 9)


def test_lists_of_another_geometry_are_refused():
    g, other = ragged(kept=5), dataclasses.replace(ragged(), block_q=16)
    q, k, v = draw(g)
    named = {"a": make("random").select(q, k, g), "b": make("random").select(q, k, other)}
    with pytest.raises(ValueError, match="lists: expected lists of the geometry"):
        metrics.measure(q, k, v, named)
    with pytest.raises(ValueError, match="lists: expected lists of the geometry"):
        metrics.measure(q, k[:, 20:], v[:, 20:], named["a"])


# ---- ends of the scale ---------------------------------------------------------------------


def test_a_full_list_is_dense():
    g = ragged()
    q, k, v = draw(g)
    blocks = make("dense").select(q, k, g)
    full = lf.block_sparse_attention(q, k, v, blocks)
    torch.testing.assert_close(full, lf.block_sparse_attention(q, k, v), atol=1e-6, rtol=1e-5)
    m = metrics.measure(q, k, v, blocks)
    assert m["recall"] == pytest.approx(1, abs=1e-6) and m["rel_l2"] < 1e-6 and m["density"] == 1
    for name in EXACT:
        whole = make(name).select(q, k, dataclasses.replace(g, kept=g.blocks))
        assert whole.density == 1


def scene(seed=0, dim=32, heads=4, frames=9, side=16, noise=0.35):
    """Attention with a reason: tokens near in time and place, and those of one moving world.

    A frame shows a window on a wider world that pans by three columns a frame and drifts by one
    row. Half of the heads look for the same world token, half for the neighbourhood in the frame.
    Frames of 16 x 16 tokens in Morton order, the query is the last three.
    """
    generator = torch.Generator().manual_seed(seed)
    place = torch.from_numpy(token_places(side, side, "morton"))
    world = torch.randn(64, 96, dim, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(world.permute(2, 0, 1), 5, 1, 2).permute(1, 2, 0) * 5
    texture = (smooth + 0.5 * world) / 1.5
    view = []
    waves = torch.randn(3, dim // 2, generator=generator) * torch.tensor([[0.5], [0.3], [0.3]])
    for frame in range(frames):
        rows, columns = place[:, 0] + frame, place[:, 1] + 3 * frame
        same = texture[rows, columns]
        time = torch.full((len(place), 1), float(frame))
        phase = torch.cat([time, place.float()], 1) @ waves
        near = torch.cat([phase.cos(), phase.sin()], 1) * 2**0.5
        x = torch.stack([same if h % 2 else near for h in range(heads)], 1)
        view.append(x + noise * torch.randn(x.shape, generator=generator))
    k = torch.cat(view)[None]
    tokens = 3 * side * side
    q = k[:, -tokens:] * 2.5 + noise * torch.randn(1, tokens, heads, dim, generator=generator)
    return q, k, torch.randn(k.shape, generator=generator)


@pytest.mark.parametrize("size", [16, 64])
def test_the_oracle_is_never_beaten_and_chance_is_the_floor(size):
    q, k, v = scene()
    share = (9 * 256 // size // 8) / (9 * 256 // size)
    g = Geometry(256, 3, 9, 9 * 256 // size // 8, size, size, (16, 16), "morton", layer=1)
    named = {n: make(n).select(q, k, g) for n in EXACT}
    m = metrics.measure(q, k, v, named, oracle=named["oracle"])
    masses = metrics.true_mass(q, k, frame_tokens=256, block_q=size, block_k=size)
    best = masses.sort(descending=True).values[..., : g.kept].sum(-1)
    for name, blocks in named.items():
        held = masses.gather(-1, blocks.indices.long()).sum(-1)
        assert (held <= best * (1 + 1e-6)).all(), name
        assert m[name]["oracle_ratio"] <= 1 + 1e-6 and m[name]["density"] == pytest.approx(share)
        if name not in ("random", "sparge-sim"):
            assert m[name]["recall"] > m["random"]["recall"], name
    assert m["random"]["recall"] == pytest.approx(share, abs=0.03)
    assert m["oracle"]["oracle_ratio"] == 1
    ranked = ["random", "sta", "mean", "mass", "mass-fine", "oracle"]
    assert [m[n]["recall"] for n in ranked] == sorted(m[n]["recall"] for n in ranked)


# ---- planted: the right blocks are known ---------------------------------------------------


def planted(g, targets, dim=64, seed=0, loud=6.0):
    """Keys of block j along axis j of a random basis; queries of row r look at targets[r]."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    q = torch.zeros(1, g.q_len, 1, dim)
    k = 0.1 * torch.randn(1, g.k_len, 1, dim, generator=generator)
    for j, (_, _, begin, end) in enumerate(key_blocks(g)):
        k[0, begin:end, 0] += basis[j] * 2
    for r, blocks in enumerate(targets):
        q[0, r * g.block_q : (r + 1) * g.block_q, 0] = basis[blocks].sum(0) * loud
    return q, k


@pytest.mark.parametrize("name", CONTENT)
def test_planted_blocks_are_found(name):
    g = Geometry(64, 1, 12, 6, 16, 16, (8, 8), "morton")
    draw = np.random.default_rng(5)
    # HSA's frame stage sees six past frames: two in the middle besides sink and near ones.
    frames = [0, 4, 7, 9, 10, 11]
    targets = [sorted(4 * f + int(draw.integers(4)) for f in frames) for _ in range(4)]
    q, k = planted(g, targets)
    assert lists(make(name).select(q, k, g)) == [[targets]]


@pytest.mark.parametrize("layer", range(3))
def test_planted_macro_blocks_are_found(layer):
    # What the layer's partition can hold: its own macro-block and one more.
    own, other = [
        ([40, 41, 42, 43, 44, 45, 46, 47], [16, 17, 18, 19, 20, 21, 22, 23]),
        ([4 * f + 2 for f in range(12)], [4 * f for f in range(12)]),
        ([38, 42, 46], [13, 17, 21]),
    ][layer]
    g = Geometry(64, 1, 12, len(own + other), 16, 16, (8, 8), "morton", layer=layer)
    q, k = planted(g, [sorted(own + other)] * 4)
    row = lists(make("vmoba").select(q, k, g))[0][0][2]
    assert row == sorted(own + other)


@pytest.mark.parametrize("name", ["mass", "mass-fine", "lse", "oracle"])
def test_a_glyph_smaller_than_its_block_is_found_by_sub_blocks_only(name):
    g = Geometry(64, 1, 12, 3, 64, 64)
    generator = torch.Generator().manual_seed(2)
    k = 0.1 * torch.randn(1, g.k_len, 1, 32, generator=generator)
    q = torch.zeros(1, 64, 1, 32)
    q[..., 0] = 8
    for block in (2, 5, 8):  # 16 tokens say yes, the other 48 say no: on average, no
        k[0, 64 * block : 64 * block + 16, 0, 0] = 6
        k[0, 64 * block + 16 : 64 * block + 64, 0, 0] = -4
    assert lists(make(name).select(q, k, g)) == [[[[2, 5, 8]]]]
    assert not {2, 5, 8} & set(lists(make("mean").select(q, k, g))[0][0][0])


# ---- budgets --------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 3, 7, 16, 18])
def test_budgets_keep_the_total(kept):
    draw = np.random.default_rng(kept)
    for shares in (np.ones((3, 4)), draw.random((3, 4)), draw.random((3, 4)) ** 6, np.eye(3, 4)):
        counts = Budget(shares).counts(kept, 18)
        assert counts.sum() == kept * 12 and counts.min() >= 1 and counts.max() <= 18
        order = np.argsort(shares, axis=None, kind="stable")
        assert (np.diff(counts.ravel()[order]) >= -1).all(), "more share, fewer blocks"
    assert (Budget(np.full((3, 4), 5.0)).counts(kept, 18) == kept).all()


def test_budget_by_hand():
    assert Budget([[1, 3]]).counts(4, 20).tolist() == [[2, 6]]
    assert Budget([[1, 3]]).counts(4, 5).tolist() == [[3, 5]]
    assert Budget([[0, 1], [1, 0]]).counts(2, 20).tolist() == [[1, 3], [3, 1]]
    assert Budget([[1, 1, 1]]).counts(2, 20).tolist() == [[2, 2, 2]]


@pytest.mark.parametrize(
    "shares", [[], [[]], [[1, -1]], [[0, 0]], [[1], [1, 2]], "x", [1, 2], [[1, np.inf]]]
)
def test_a_budget_that_cannot_be(shares):
    with pytest.raises(ValueError, match=r"shares: expected \[layers\]\[heads\]"):
        Budget(shares)


@pytest.mark.parametrize("kept", [0, 11])
def test_a_budget_of_more_or_less_than_there_is(kept):
    with pytest.raises(ValueError, match="kept: expected 1 to 10 blocks, got"):
        Budget([[1, 1]]).counts(kept, 10)


def test_what_is_measured_fits_together():
    q, k = torch.zeros(1, 40, 2, 16), torch.zeros(1, 120, 2, 16)
    blocks = lf.selectors.select("mean", q, k, frame_tokens=20, sparsity=0.5)
    with pytest.raises(TypeError, match="lists: expected a BlockList, or some by name"):
        metrics.measure(q, k, k, {"mean": 3})
    with pytest.raises(ValueError, match="v: expected the shape .* of k, got"):
        metrics.measure(q, k, k[:, :60], blocks)


def test_a_budget_from_measured_errors():
    counts = [2, 4, 8, 16]
    flat, steep = [0.5, 0.5, 0.5, 0.49], [0.9, 0.6, 0.2, 0.0]
    budget = Budget.from_errors([[flat, steep]], counts, kept=8)
    assert budget.shares == ((2.0, 8.0),)  # 16 for the steep one would be 18 of 16 in all
    assert budget.counts(8, 32).tolist() == [[3, 13]]
    even = Budget.from_errors([[steep, steep]], counts, kept=8)
    assert even.shares[0][0] == even.shares[0][1]
    total = sum(Budget.from_errors([[flat, steep], [steep, flat]], counts, 5).shares, ())
    assert sum(total) <= 20
    for errors, steps, words in (
        ([[flat]], [2, 4], "errors"),
        ([[flat]], [4, 2, 8, 16], "counts"),
        ([[flat]], counts, "kept"),
    ):
        with pytest.raises(ValueError, match=words):
            Budget.from_errors(errors, steps, 1)


def captured(layer, chunk, seed=0):
    """A call of a layer whose second head looks everywhere and whose first looks at one place."""
    generator = torch.Generator().manual_seed(100 * layer + seed)
    past = 3 * (chunk - 1)
    q = torch.randn(1, 3 * 64, 2, 32, generator=generator)
    k, v = (torch.randn(1, (past + 3) * 64, 2, 32, generator=generator) for _ in range(2))
    k[:, :, 0] = k[:, :, 0].unflatten(1, (-1, 16))[:, :, :1].expand(-1, -1, 16, -1).flatten(1, 2)
    q[:, :, 0] = 3 * q[:, :1, 0]
    facts = Facts(layer, chunk, 0, 0, past, 64, (8, 8), 3, None, 32**-0.5, "Layer", "morton")
    return Captured(q, k, v, facts)


@pytest.mark.parametrize("selector", ["mass", "mean", "sta"])
def test_calibration_lowers_the_error_at_the_same_total(selector):
    calls = [captured(layer, chunk) for layer in range(2) for chunk in (1, 2, 3, 4)]
    config = lf.Config(sparsity=0.75, num_frames=12, block_q=32, block_k=16, selector=selector)
    budget = calibrate(calls, config)
    assert len(budget.shares) == 2 and len(budget.shares[0]) == 2

    def error(by_head):
        total = 0.0
        for call in calls:
            g = Geometry(64, 3, 3 * call.facts.chunk, 4, 32, 16, (8, 8), "morton")
            kept = g.blocks // 4
            counts = tuple(budget.counts(kept, g.blocks)[call.facts.layer].tolist())
            g = dataclasses.replace(g, kept=kept, kept_by_head=counts if by_head else None)
            if call.facts.chunk > 1:
                m = metrics.measure(
                    call.q, call.k, call.v, make(selector).select(call.q, call.k, g)
                )
                total += sum(m["error_heads"])
        return total

    assert error(True) < error(False)
    if selector != "sta":
        assert all(flat > peaked for peaked, flat in budget.shares)


def test_calibration_needs_every_layer():
    config = lf.Config(sparsity=0.75, num_frames=12, block_q=32, block_k=16)
    for calls in ([], [captured(0, 1)], [captured(1, 3)]):
        with pytest.raises(ValueError, match="calls: expected sparse calls of every layer"):
            calibrate(calls, config)


def test_calibration_is_of_the_layout_of_the_settings():
    """The calls are moved as a patched model moves them, before their blocks are chosen."""
    calls = [captured(layer, chunk) for layer in range(2) for chunk in (2, 3)]
    rank = token_places(8, 8, "morton") @ (8, 1)
    moved = []
    for call in calls:
        q, k, v = (x.unflatten(1, (-1, 64))[:, :, rank.argsort()].flatten(1, 2)
                   for x in (call.q, call.k, call.v))  # fmt: skip
        moved.append(Captured(q, k, v, dataclasses.replace(call.facts, order="raster")))
    config = lf.Config(sparsity=0.75, num_frames=12, block_q=32, block_k=16, selector="sta")
    expected = calibrate(moved, config)
    assert calibrate(calls, config.replace(layout="raster")) == expected
    assert calibrate(calls, config) != expected


def test_calibration_passes_over_calls_that_stay_dense_for_want_of_a_grid():
    config = lf.Config(sparsity=0.75, num_frames=12, block_q=32, block_k=16, layout="tiles")
    call = captured(0, 3)
    blind = Captured(call.q, call.k, call.v, dataclasses.replace(call.facts, grid=None))
    with pytest.raises(ValueError, match=r"got layers \[\]"):
        calibrate([blind], config)
    assert calibrate([blind, call], config) == calibrate([call], config)
