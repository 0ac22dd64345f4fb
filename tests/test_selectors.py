"""Selectors: the lists of each against hand-computed ones and against its source's rule."""

import dataclasses

import numpy as np
import pytest
import torch
from selector_rules import (
    MORTON_8,
    cube_rule,
    density,
    key_blocks,
    lists,
    mass_table,
    mean_rule,
    morton,
    oracle_rule,
    own_blocks,
    pooled,
    radial_rule,
    ragged,
    similar,
    sparge_rule,
    sta_rule,
    tiles_8,
    vmoba_rule,
)

import lightforcing as lf
from lightforcing import selectors
from lightforcing.selectors import (
    Cubes,
    Fine,
    Geometry,
    Mass,
    Radial,
    Random,
    SlidingTile,
    Sparge,
    Vmoba,
    make,
    names,
    register,
    to_dict,
    token_places,
)
from lightforcing.selectors.tiles import touched

PRODUCTION = Geometry(1536, 3, 21, 1, 64, 64, (32, 48), "morton")
EXACT = [n for n in names() if make(n).exact]


def whole(g, seed=0, batch=1, heads=2, dim=16, span=3):
    """Integer-valued q and k: sums and products have no rounding, so ranks are exact."""
    draw = np.random.default_rng(seed)
    shapes = (batch, g.q_len, heads, dim), (batch, g.k_len, heads, dim)
    return [torch.from_numpy(draw.integers(-span, span + 1, s).astype(np.float32)) for s in shapes]


def head(x, b=0, h=0):
    return x[b, :, h].numpy()


def chosen(selector, g, q=None, k=None):
    q, k = whole(g) if q is None else (q, k)
    return lists(selector.select(q, k, g))


# ---- places --------------------------------------------------------------------------------


def test_morton_order_of_an_8_by_8_frame_by_hand():
    place = token_places(8, 8, "morton")
    assert (place[:, 0] * 8 + place[:, 1]).tolist() == MORTON_8


@pytest.mark.parametrize("grid", [(4, 5), (32, 48), (30, 52), (1, 7)])
def test_morton_order_skips_places_outside_the_grid(grid):
    place = token_places(*grid, "morton")
    assert (place[:, 0] * grid[1] + place[:, 1]).tolist() == morton(grid)
    assert token_places(*grid).tolist() == [[i // grid[1], i % grid[1]] for i in range(len(place))]


def test_blocks_of_a_query_block():
    for g in (ragged(), tiles_8(), PRODUCTION):
        first = g.past * g.per_frame
        for row in range(0, g.rows, 7):
            assert (np.flatnonzero(touched(g)[row]) + first).tolist() == sorted(own_blocks(g, row))


def test_ages_of_frames_in_a_rolling_window():
    g = Geometry(64, 3, 9, 4, first_frame=18, sink_frames=2)
    assert g.ages.tolist() == [20, 19, 6, 5, 4, 3, 2, 1, 0]
    assert Geometry(64, 3, 9, 4).ages.tolist() == list(range(9))[::-1]


# ---- static rules ---------------------------------------------------------------------------


def test_dense_is_every_block():
    for g in (tiles_8(), ragged()):
        assert chosen(make("dense"), g)[0][1] == [list(range(g.blocks))] * g.rows


def test_random_is_the_draw_it_says():
    g = ragged(layer=4, chunk=3)
    draw = np.random.default_rng([7, 4, 3]).random((2, g.rows, g.blocks))
    expected = [[sorted(np.argsort(row)[: g.kept].tolist()) for row in h] for h in draw]
    assert chosen(Random(seed=7), g) == [expected]
    others = [dataclasses.replace(g, **{n: 9}) for n in ("layer", "chunk")]
    assert all(chosen(Random(seed=7), o) != [expected] for o in others)
    assert chosen(Random(seed=7), dataclasses.replace(g, step=3)) == [expected]
    assert expected[0] != expected[1] and chosen(Random(seed=8), g) != [expected]


def test_random_head_does_not_depend_on_how_many_there_are():
    g = tiles_8(layer=2)
    few, many = whole(g, heads=1), whole(g, heads=5)
    assert chosen(Random(), g, *few)[0][0] == chosen(Random(), g, *many)[0][0]


def test_sta_by_hand():
    g = tiles_8(frames=4, kept=4)  # tiles 0 1 / 2 3 in each frame, 4 query blocks
    tube = [[p, 4 + p, 8 + p, 12 + p] for p in range(4)]
    assert chosen(SlidingTile((4, 1, 1)), g)[0][0] == tube
    assert chosen(SlidingTile((1, 3, 3)), g)[0][0] == [[12, 13, 14, 15]] * 4
    g = tiles_8(frames=4, kept=6)  # the whole own frame, then the same place one frame back ...
    row = chosen(SlidingTile((1, 3, 3)), g)[0][0][2]
    assert row == [8, 10, 12, 13, 14, 15]  # ... and of the two neighbours the lower index


@pytest.mark.parametrize("window", [(1, 1, 1), (2, 3, 1), (3, 3, 3), (9, 4, 4)])
@pytest.mark.parametrize("sink", [0, 1])
def test_sta_as_given_is_the_published_window(window, sink):
    for g in (
        Geometry(256, 2, 5, 8, 16, 16, (16, 16), "morton"),
        Geometry(128, 1, 7, 8, 32, 16, (8, 16), "morton"),
    ):
        assert chosen(SlidingTile(window, sink, fit=False), g)[0][1] == sta_rule(g, window, sink)


def test_sta_densities_at_a_released_size():
    expected = {6: 0.375, 9: 0.25, 12: 0.1875, 15: 0.15, 18: 0.125, 21: 0.107}
    for frames, share in expected.items():
        g = dataclasses.replace(PRODUCTION, k_frames=frames)
        kept = SlidingTile((6, 3, 3), fit=False).own(g)
        assert kept.mean() == pytest.approx(share, abs=5e-4)


def test_sta_fitted_to_the_size_of_its_window_is_the_window():
    g = dataclasses.replace(PRODUCTION, kept=54)
    assert chosen(SlidingTile((6, 3, 3)), g, *whole(g, heads=1, dim=8)) == chosen(
        SlidingTile((6, 3, 3), fit=False), g, *whole(g, heads=1, dim=8)
    )


def test_radial_by_hand():
    # A frame is one block; L = 32, 16, 8, 8, 4 for d = 0 .. 4; frame 0 always, frame 4 is own.
    g = Geometry(16, 1, 5, 2, 16, 16)
    assert chosen(Radial(fit=False, split=8), g)[0][0] == [[0, 1, 2, 3, 4]]
    assert chosen(Radial(fit=False, split=16), g)[0][0] == [[0, 2, 3, 4]]  # d = 3 is odd
    assert chosen(Radial(fit=False), g)[0][0] == [[0, 4]]  # split 32: multiples of 2, 4, 4
    assert chosen(Radial(), g)[0][0] == [[0, 4]]
    assert chosen(Radial(), dataclasses.replace(g, kept=4))[0][0] == [[0, 2, 3, 4]]


@pytest.mark.parametrize("decay", [0.2, 1.0])
@pytest.mark.parametrize(
    "g",
    [
        Geometry(256, 2, 9, 8, 32, 32),
        Geometry(128, 1, 19, 8, 64, 16, (8, 16), "morton"),
        Geometry(128, 3, 12, 8, 16, 16, (8, 16)),
    ],
    ids=["256", "morton", "raster"],
)
def test_radial_as_given_is_the_published_mask(g, decay):
    own = Radial(decay, fit=False)
    assert chosen(own, g, *whole(g, heads=1))[0][0] == radial_rule(g, decay, 2 * g.block_k)


def test_radial_cannot_reach_a_high_sparsity_as_published():
    g = dataclasses.replace(PRODUCTION, order="raster")
    shares = [
        Radial(0.2, fit=False).own(dataclasses.replace(g, k_frames=n)).mean() for n in (6, 12, 21)
    ]
    assert shares == sorted(shares, reverse=True) and shares[-1] > 0.2


def test_radial_keeps_its_near_frames_whole_where_they_fit():
    g = dataclasses.replace(PRODUCTION, kept=150, order="raster")
    rows = chosen(Radial(), g, *whole(g, heads=1, dim=8))[0][0]
    for row in (0, 30, 71):
        own = 18 + row // 24
        assert set(range(own * 24, own * 24 + 24)) <= set(rows[row])
        assert set(range(24)) <= set(rows[row])


# ---- rules that look at q and k -------------------------------------------------------------


@pytest.mark.parametrize("name", ["mean", "sparge", "vsa"])
def test_mean_top_k_by_hand(name):
    g = Geometry(16, 1, 4, 2, 16, 16)
    q, k = torch.zeros(1, 16, 1, 8), torch.zeros(1, 64, 1, 8)
    q[..., 0] = 2
    k[0, :, 0, 0] = torch.tensor([1.0, 3, 0, 2]).repeat_interleave(16)
    assert chosen(make(name), g, q, k) == [[[[1, 3]]]]
    k[0, 16:32, 0, 0] = torch.tensor([40.0, -40]).repeat(8)  # mean 0: the mean does not see it
    assert chosen(make(name), g, q, k) == [[[[0, 3]]]]


@pytest.mark.parametrize("name", ["mean", "sparge", "vsa"])
@pytest.mark.parametrize("g", [tiles_8(frames=7), tiles_8(frames=6, q_frames=3, kept=9)], ids=str)
def test_mean_top_k_is_the_rule(name, g):
    q, k = whole(g, seed=3)
    expected = [[mean_rule(head(q, h=h), head(k, h=h), g) for h in range(2)]]
    # Equal scores are common in whole numbers: ties go to the lower index.
    if name == "sparge":  # centring rounds, so no ties there: break them in the data
        q, k = (
            x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in (q, k)
        )
        expected = [[mean_rule(head(q, h=h), head(k, h=h), g) for h in range(2)]]
    assert chosen(make(name), g, q, k) == expected


def test_centring_the_keys_changes_no_list():
    g = ragged()
    q, k = whole(g)
    assert chosen(make("sparge"), g, q, k) == chosen(make("sparge"), g, q, k + 32.0)
    assert chosen(make("mean"), g, q, k) == chosen(make("mean"), g, q, k + 32.0)


def noisy(g, seed=0, scale=1.0, alike=None, **shape):
    """Random q and k; with `alike`, every other so many keys, and query blocks, are alike."""
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(x.shape, generator=draw) * scale for x in whole(g, **shape))
    for x, size in ((q, g.block_q), (k, alike)) if alike is not None else ():
        for begin in range(0, x.shape[1], 2 * size):
            part = x[:, begin : begin + size]
            part[:] = part[:, :1] * 2 + 0.1 * part
    return q, k


def test_sparge_by_hand():
    # logits 2, 0, 1, 0: softmax .61 .08 .22 .08
    g = Geometry(16, 1, 4, 2, 16, 16)
    q, k = torch.zeros(1, 16, 1, 16), torch.zeros(1, 64, 1, 16)
    q[..., 0] = 4
    k[0, :, 0, 0] = torch.tensor([2.0, 0, 1, 0]).repeat_interleave(16)
    for mass, row in ((0.5, [0]), (0.7, [0, 2]), (0.9, [0, 1, 2]), (0.99, [0, 1, 2, 3])):
        assert chosen(Sparge("topp", mass=mass), g, q, k) == [[[row]]]
    assert chosen(Sparge(sink=True), g, q, -k) == [[[[0, 1]]]]


@pytest.mark.parametrize("g", [tiles_8(frames=7, kept=5), ragged(kept=5)], ids=["tiles", "ragged"])
@pytest.mark.parametrize("mass", [None, 0.3, 0.8])
def test_sparge_as_published(g, mass):
    q, k = noisy(g, alike=16, scale=1.5)
    own = Sparge("topk" if mass is None else "topp", similarity=0.5, mass=mass, fit=False)
    expected = [
        [sparge_rule(head(q, h=h), head(k, h=h), g, similarity=0.5, mass=mass) for h in range(2)]
    ]
    assert chosen(own, g, q, k) == expected
    assert not own.exact and own.name == ("sparge-sim" if mass is None else "sparge-topp")
    forced = set.intersection(*(set(r) for h in expected[0] for r in h))
    assert forced and any(len(r) < g.blocks for h in expected[0] for r in h)


def test_sparge_top_p_at_the_schedules_density():
    g = tiles_8(frames=9, kept=5)
    q, k = noisy(g, batch=2, heads=3, scale=4)
    rows = chosen(make("sparge-topp"), g, q, k)
    for video in rows:
        sizes = [len(r) for h in video for r in h]
        assert sum(sizes) == g.kept * 3 * g.rows and min(sizes) >= 1
        assert len(set(sizes)) > 1
    alone = chosen(make("sparge-topp"), g, q[1:], k[1:])
    assert alone[0] == rows[1], "a video's list must not depend on the others of its batch"


def test_sparge_gives_half_of_the_budget_to_blocks_that_are_not_alike():
    g = tiles_8(frames=6, kept=5)
    q, k = noisy(g, alike=32)
    rows = chosen(Sparge(similarity=0.5), g, q, k)
    for h in range(2):
        centred = head(k, h=h) - head(k, h=h).mean(0)
        alike = similar(centred, [(a, b) for _, _, a, b in key_blocks(g)])
        odd = sorted((j for j in range(24) if alike[j] <= 0.5), key=lambda j: alike[j])
        assert len(odd) > 2
        for row, by_mean in zip(rows[0][h], mean_order(q, k, g, h), strict=True):
            assert row == sorted(odd[:2] + [j for j in by_mean if j not in odd[:2]][:3])


def mean_order(q, k, g, h):
    qm, km = pooled(head(q, h=h), head(k, h=h), g)
    return [np.argsort(-(row @ km.T), kind="stable").tolist() for row in qm]


@pytest.mark.parametrize("layer", [0, 1, 2, 5])
@pytest.mark.parametrize("threshold", [None, 0.25])
def test_vmoba_is_the_rule(layer, threshold):
    for g in (ragged(kept=7, layer=layer), tiles_8(frames=7, q_frames=2, kept=9, layer=layer)):
        q, k = noisy(g, seed=layer)
        own = Vmoba() if threshold is None else Vmoba("threshold", threshold)
        expected = [
            [vmoba_rule(head(q, h=h), head(k, h=h), g, threshold=threshold) for h in range(2)]
        ]
        assert chosen(own, g, q, k) == expected


def test_vmoba_by_hand():
    g = tiles_8(frames=6, kept=5)  # kernel blocks 4f + p
    q, k = torch.zeros(1, 64, 1, 8), torch.zeros(1, 6 * 64, 1, 8)
    q[..., 0] = 1
    k[0, 4 * 16 : 5 * 16, 0, 0] = 8  # frame 1, tile 0
    k[0, 9 * 16 : 10 * 16, 0, 0] = 4  # frame 2, tile 1
    rows = [chosen(Vmoba(), dataclasses.replace(g, layer=n), q, k)[0][0] for n in range(3)]
    # Two frames: own pair 16..23 first, of which five by score (all 0: the lower ones).
    assert rows[0][3] == [16, 17, 18, 19, 20]
    # A place through six frames: own place first; for tile 1 that is 1, 5, 9 ..., 9 the best.
    assert rows[1][1] == [1, 5, 9, 13, 17]
    # Cubes of three frames: own (15, 19, 23), then tile 0 of frames 0-2, block 4 first.
    assert rows[2][3] == [0, 4, 15, 19, 23]


@pytest.mark.parametrize("frames", [2, 3])
def test_cubes_are_the_rule(frames):
    for g in (ragged(kept=7), tiles_8(frames=6, q_frames=3, kept=8)):
        q, k = noisy(g, seed=frames)
        expected = [[cube_rule(head(q, h=h), head(k, h=h), g, frames) for h in range(2)]]
        assert chosen(Cubes(frames), g, q, k) == expected


@pytest.mark.parametrize("g", [ragged(), tiles_8(frames=7)], ids=["ragged", "tiles"])
def test_oracle_is_the_rule(g):
    q, k = noisy(g, scale=1.4, batch=2)
    expected = [[oracle_rule(head(q, b, h), head(k, b, h), g) for h in range(2)] for b in range(2)]
    assert chosen(make("oracle"), g, q, k) == expected


@pytest.mark.parametrize(
    ("name", "score", "hierarchy"),
    [
        ("hsa", "mean", True),
        ("mean", "mean", False),
        ("mass", "mass", False),
        ("lse", "lse", False),
    ],
)
def test_the_built_in_ones_are_select_blocks(name, score, hierarchy):
    g = ragged(kept=7)
    q, k = noisy(g)
    own = lf.select_blocks(q, k, frame_tokens=20, sparsity=1 - 7.2 / 18, score=score,
                           hierarchy=hierarchy, block_q=32, block_k=16)  # fmt: skip
    assert own.indices.shape[3] == 7
    assert chosen(make(name), g, q, k) == lists(own)


def test_every_kept_of_a_built_in_selector_is_met():
    for blocks in range(1, 19):
        g = ragged(kept=blocks)
        q, k = noisy(g, heads=1)
        assert all(len(r) == blocks for r in chosen(make("mean"), g, q, k)[0][0])


@pytest.mark.parametrize("g", [ragged(), tiles_8(frames=7, q_frames=2), ragged(kept=5, block_k=64),
                               Geometry(200, 2, 5, 3, 64, 64)], ids=str)  # fmt: skip
@pytest.mark.parametrize("slab", [1, 1 << 20])
def test_fine_mass_with_quarter_blocks_is_mass(g, slab, monkeypatch):
    monkeypatch.setattr("lightforcing.selectors.fine.SLAB", slab)
    q, k = noisy(g, batch=2, scale=1.5)
    own = lf.select_blocks(q, k, frame_tokens=g.frame_tokens, sparsity=0.5, score="mass",
                           hierarchy=False, block_q=g.block_q, block_k=g.block_k,
                           return_scores=True)[1]  # fmt: skip
    torch.testing.assert_close(Fine(g.block_k // 4).scores(q, k, g), own, atol=1e-5, rtol=1e-4)
    # Through the operator (cells of 4, 8 ...) and through torch it is one rule.
    by_op = Fine(4).scores(q, k, g)
    monkeypatch.setattr("lightforcing.selectors.fine._by_select_blocks", None)
    monkeypatch.setattr("lightforcing.selectors.fine.LEAST", 1 << 20)
    torch.testing.assert_close(Fine(4).scores(q, k, g), by_op, atol=1e-5, rtol=1e-4)


def test_fine_mass_of_single_tokens_is_the_truth():
    g = ragged()
    q, k = noisy(g, scale=1.5)
    expected = [mass_table(head(q, h=h), head(k, h=h), g) for h in range(2)]
    np.testing.assert_allclose(Fine(1).scores(q, k, g)[0].numpy(), expected, rtol=1e-4)
    with pytest.raises(ValueError, match="divisor of block_q = 32 and block_k = 16, got 32"):
        Fine(32).scores(q, k, g)
    with pytest.raises(ValueError, match="power of two"):
        Fine(3)


def test_guaranteed_slots():
    g = tiles_8(frames=8, kept=6)  # blocks 0-3 sink, 20-27 near, 28-31 current
    q, k = noisy(g)
    free = chosen(Mass(), g, q, k)
    scores = lf.select_blocks(q, k, frame_tokens=64, sparsity=0.5, score="mass", hierarchy=False,
                              block_q=16, block_k=16, return_scores=True)[1]  # fmt: skip
    forced = [0, 1, 2, 3, *range(20, 28)]
    rows = chosen(Mass(guarantee=0.5), g, q, k)
    for h in range(2):
        for r in range(g.rows):
            s = scores[0, h, r].tolist()
            best = sorted(forced, key=lambda j: (-s[j], j))[:3]
            rest = sorted((j for j in range(32) if j not in best), key=lambda j: (-s[j], j))[:3]
            assert rows[0][h][r] == sorted(best + rest)
    assert rows != free and chosen(Mass(guarantee=0.0), g, q, k) == free
    everything = chosen(Mass(guarantee=1, sink_frames=0, near_frames=0, current=True), g, q, k)
    assert all({28, 29, 30, 31} <= set(r) for h in everything[0] for r in h)


# ---- what all of them must do ---------------------------------------------------------------


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("g", [ragged(kept=5), tiles_8(frames=7, q_frames=2, kept=9)], ids=str)
def test_rows_are_exact_ascending_and_reproducible(name, g):
    q, k = noisy(g, batch=2, heads=3)
    selector = make(name)
    for layer in range(3):
        g = dataclasses.replace(g, layer=layer)
        blocks = selector.select(q, k, g)
        assert blocks.indices.dtype == blocks.counts.dtype == torch.int32
        assert tuple(blocks.indices.shape[:3]) == (2, 3, g.rows)
        lf.block_sparse_attention(q, k, k, blocks)  # the operator checks order and range
        if selector.exact:
            assert (blocks.counts == g.kept).all() and blocks.indices.shape[3] == g.kept
        again = make(name).select(q.clone(), k.clone(), g)
        assert torch.equal(again.indices, blocks.indices)


@pytest.mark.parametrize("name", names())
def test_numpy_gives_numpy_and_the_same(name):
    g = ragged(kept=5)
    q, k = noisy(g)
    blocks = make(name).select(q.numpy(), k.numpy(), g)
    assert isinstance(blocks.indices, np.ndarray) and isinstance(blocks.counts, np.ndarray)
    assert lists(blocks) == chosen(make(name), g, q, k)


@pytest.mark.parametrize("name", EXACT)
def test_budgets_by_head(name):
    g = dataclasses.replace(ragged(kept=5), kept_by_head=(2, 9, 4))
    q, k = noisy(g, heads=3)
    if name == "hsa":
        with pytest.raises(ValueError, match="frame stage"):
            make(name).select(q, k, g)
        return
    rows = chosen(make(name), g, q, k)[0]
    for h, count in enumerate(g.kept_by_head):
        alone = dataclasses.replace(g, kept=count, kept_by_head=None)
        assert rows[h] == chosen(make(name), alone, q, k)[0][h]
    with pytest.raises(ValueError, match="2 heads, got 3"):
        make(name).select(q[:, :, :2], k[:, :, :2], g)


@pytest.mark.parametrize("name", ["sparge-topp", "vmoba"])
def test_budgets_by_head_of_variable_rows(name):
    g = dataclasses.replace(ragged(kept=5), kept_by_head=(2, 9, 4))
    q, k = noisy(g, heads=3)
    total = sum(len(r) for h in chosen(make(name), g, q, k)[0] for r in h)
    assert total == 15 * g.rows


def test_static_lists_are_made_once():
    g = ragged()
    q, k = whole(g)
    first = SlidingTile().select(q, k, g)
    assert SlidingTile().select(q, k, dataclasses.replace(g, layer=7, step=2)) is first
    assert SlidingTile((3, 1, 1)).select(q, k, g) is not first
    assert SlidingTile().select(q, k, dataclasses.replace(g, kept=4)) is not first
    assert SlidingTile().select(q[:, :, :1], k[:, :, :1], g).indices.shape[1] == 1


@pytest.mark.parametrize("name", names())
def test_names_and_options_survive_json(name):
    assert make(to_dict(make(name))) == make(name)
    assert isinstance(make(name).notes, str) and make(name).name == name


def test_select_is_the_whole_thing_in_one_call():
    g = tiles_8(frames=6, q_frames=3, kept=8)
    q, k = noisy(g)
    place = {"grid": (8, 8), "order": "morton", "block_q": 16, "block_k": 16}
    for name in names():
        one = selectors.select(name, q, k, frame_tokens=64, kept=8, **place)
        two = selectors.select(name, q, k, frame_tokens=64, sparsity=1 - 8 / 24, **place)
        assert lists(one) == lists(two) == chosen(make(name), g, q, k)
    with pytest.raises(ValueError, match="either sparsity or kept"):
        selectors.select("mean", q, k, frame_tokens=64)
    with pytest.raises(ValueError, match="selector sta"):
        selectors.select("sta", q, k, frame_tokens=64, kept=8)
    with pytest.raises(ValueError, match="whole frames"):
        selectors.select("mean", q, k, frame_tokens=50, kept=8)


def test_a_selector_of_ones_own():
    class Last:
        name, notes, needs_grid, exact = "last", "", False, True

        def select(self, q, k, geometry):
            shape = q.shape[0], q.shape[2], geometry.rows, geometry.kept
            first = geometry.blocks - geometry.kept
            row = torch.arange(first, geometry.blocks, dtype=torch.int32)
            return geometry.list(row.expand(shape).contiguous())

    register(Last)
    try:
        assert "last" in names()
        assert chosen(make("last"), tiles_8(kept=2))[0][0][0] == [14, 15]
    finally:
        selectors.base._factories.pop("last")
    with pytest.raises(ValueError, match="selector: expected one of dense, .*, got 'last'"):
        make("last")
    for wrong in (3, Last, object()):
        with pytest.raises(TypeError, match="selector: expected a name or an object"):
            make(wrong)
    with pytest.raises(TypeError, match="to call and a name"):
        register(Last())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kept": 0}, "kept: expected 1 to J = 18, got 0"),
        ({"kept": 19}, "kept: expected 1 to J = 18, got 19"),
        ({"order": "hilbert"}, "order: expected one of raster, morton"),
        ({"grid": (4, 4)}, "grid: expected rows x columns = 20 tokens"),
        ({"q_frames": 10}, "q_frames: expected 1 to k_frames = 9"),
    ],
)
def test_a_geometry_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(ragged(), **changes)


def test_not_a_number_ranks_last():
    g = Geometry(16, 1, 4, 2, 16, 16)
    scores = torch.tensor([[[[float("nan"), -float("inf"), -0.0, 0.0]]]])
    assert selectors.rank.ranking(scores)[0, 0, 0].tolist() == [2, 3, 1, 0]
    assert lists(selectors.rank.top(scores, g)) == [[[[2, 3]]]]


def test_options_that_cannot_be():
    for make_one, words in (
        (lambda: SlidingTile((1, 0, 1)), "window"),
        (lambda: Sparge("best"), "mode"),
        (lambda: Sparge(mass=2), "mass"),
        (lambda: Vmoba("best"), "mode"),
        (lambda: Mass(guarantee=2), "guarantee"),
    ):
        with pytest.raises(ValueError, match=words):
            make_one()
    assert density([[1, 2]], tiles_8()) == 2 / 16


@pytest.mark.parametrize("seed", range(12))
def test_any_geometry(seed):
    draw = np.random.default_rng(seed)
    pick = lambda *of: of[draw.integers(len(of))]  # noqa: E731
    for _ in range(4):
        grid = int(draw.integers(1, 12)), int(draw.integers(1, 14))
        q_frames, block_k, heads = int(draw.integers(1, 4)), pick(16, 32, 64, 128), 2
        k_frames = q_frames + int(draw.integers(1, 9))
        blocks = k_frames * -(-grid[0] * grid[1] // block_k)
        g = Geometry(
            grid[0] * grid[1], q_frames, k_frames, int(draw.integers(1, blocks + 1)),
            pick(16, 48, 64, 128), block_k, grid, pick("raster", "morton"),
            pick(None, k_frames + 3), pick(0, 1), layer=int(draw.integers(6)),
        )  # fmt: skip
        q, k = noisy(g, seed, scale=pick(0.0, 1.0, 4.0), heads=heads)
        for name in names():
            blocks = make(name).select(q, k, g)
            lf.block_sparse_attention(q, k, k, blocks)  # checks order and range
            total = g.blocks if name == "dense" else g.kept
            assert blocks.counts.sum() == total * heads * g.rows, (name, g)
