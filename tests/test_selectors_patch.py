"""Selectors, shared lists, budgets and layouts under ``patch``: what reaches the kernels."""

import collections
import gc
import weakref

import pytest
import torch
from fake_ar import HEIGHT, WIDTH, T, make, new_cache, noise, rollout
from fake_ar import nothing_is_left_behind as nothing_is_left_behind
from small_wan import BLIND, build

import lightforcing as lf
from lightforcing import _core, adapters, ops, reasons, selectors
from lightforcing.models import Rollout
from lightforcing.selectors import (
    Budget,
    Geometry,
    Mass,
    SlidingTile,
    Sparge,
    choose,
    groups,
    names,
    rank,
    vmoba,
)
from lightforcing.step import Step

SCHEDULE = [0, 0.5, 0.6, 0.7, 0.8]
SETTINGS = {"schedule": SCHEDULE, "block_q": 32, "block_k": 16, "strict": True, "step_share": None}
EXACT = [n for n in names() if selectors.make(n).exact]


@pytest.fixture
def seen(monkeypatch):
    """Every sparse call: (q, k, list), in order."""
    calls, attend = [], ops.block_sparse_attention

    def recorded(q, k, v, blocks=None, **more):
        if blocks is not None:
            calls.append((q.clone(), k.clone(), blocks))
        return attend(q, k, v, blocks, **more)

    run = Step.run

    def in_one_step(step, q, k, v, *rest):
        result = run(step, q, k, v, *rest)
        calls.append((q.clone(), k.clone(), step.blocks(result[2])))
        return result

    monkeypatch.setattr(ops, "block_sparse_attention", recorded)
    monkeypatch.setattr(Step, "run", in_one_step)
    return calls


def run(model=None, cache=None, **settings):
    """A patched rollout of five chunks, three forwards each, two layers: output and handle."""
    model = make() if model is None else model
    with lf.patch(model, **{**SETTINGS, **settings}) as handle:
        return rollout(model, cache=cache), handle


@pytest.mark.parametrize("name", names())
def test_every_name_runs_and_reports(name, seen):
    out, handle = run(selector=name, probe=8, timing=True)
    stats = handle.stats()
    assert out.isfinite().all() and stats["sparse_calls"] == len(seen) == 24
    kept = {c: ops.plan_selection(3, 3 * c, T, sparsity=SCHEDULE[c - 1], block_k=16)[1]
            for c in range(2, 6)}  # fmt: skip
    for chunk in stats["chunks"][1:]:
        c = chunk["chunk"]
        share = 1 if name == "dense" else kept[c] / (6 * c)
        assert chunk["density"] == pytest.approx(share)
        assert 0 < chunk["recall"] <= 1 + 1e-6
    mine = [c for c in seen if c[1].shape[1] == 15 * T]
    assert len(mine) == 6
    if name in EXACT:
        assert all((blocks.counts == kept[5]).all() for _, _, blocks in mine)
    built_in = {"hsa": "frames 6/1/2 first", "mean": "mean scores, no frame stage",
                "mass": "mass scores", "lse": "lse scores"}  # fmt: skip
    assert built_in.get(name, f"selector {name}") in handle.report()


@pytest.mark.parametrize("name", names())
def test_the_lists_are_the_pure_functions(name, seen):
    run(selector=name)
    for at, (q, k, blocks) in enumerate(seen):
        chunk, layer = 2 + at // 6, at % 2
        own = selectors.select(name, q, k, frame_tokens=T, sparsity=SCHEDULE[chunk - 1],
                               grid=(HEIGHT, WIDTH), block_q=32, block_k=16, layer=layer,
                               chunk=chunk, step=at % 6 // 2)  # fmt: skip
        assert torch.equal(own.to_bool(), blocks.to_bool())


def test_a_full_list_is_the_dense_model():
    model = make()
    expected = rollout(model)
    out, handle = run(model, selector="dense")
    torch.testing.assert_close(out, expected, atol=3e-4, rtol=1e-4)
    assert handle.stats()["density"] == 1


@pytest.mark.parametrize("law", ["constant", "linear", "exponential", "count"])
@pytest.mark.parametrize("name", ["sta", "mean", "oracle"])
def test_schedule_and_selector_are_separate(law, name, seen):
    settings = {"schedule": None, "law": law, "sparsity": 0.6, "num_frames": 15}
    _, handle = run(selector=name, **settings)
    plain, _ = {}, seen.clear()
    for c, row in enumerate(handle.explain().rows[1:], 2):
        plain[c] = row["kept"]
    run(selector=name, **settings)
    for at, (_, _, blocks) in enumerate(seen):
        assert (blocks.counts == plain[2 + at // 6]).all()


@pytest.mark.parametrize("name", ["hsa", "mean", "mass", "lse"])
def test_built_in_names_are_score_and_hierarchy(name):
    score, hierarchy = {"hsa": ("mean", True)}.get(name, (name, False))
    config = lf.Config(selector=name)
    assert (config.selector, config.score, config.hierarchy) == (None, score, hierarchy)
    assert config.plain and config == lf.Config(score=score, hierarchy=hierarchy)
    other = lf.Config.preset("paper").replace(selector=name)
    assert (other.score, other.hierarchy, other.keep_frames) == (score, hierarchy, 6)


def test_no_selector_leaves_everything_as_it_was():
    assert lf.Config().plain and lf.Config().selector is None
    out, _ = run()
    named, _ = run(selector="mass")
    assert torch.equal(out, named)
    whole, _ = run(selector=Mass())
    torch.testing.assert_close(whole, out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "selector", [*names(), SlidingTile((2, 5, 1), 1), Sparge("topp", 0.5, 0.9)]
)
def test_settings_survive_json(selector):
    config = lf.Config(selector=selector, refresh=2, layout="tiles", grid=(4, 5),
                       token_order="morton")  # fmt: skip
    assert lf.Config.from_json(config.to_json()) == config
    with_budget = lf.Config(selector="mean", budget=[[1, 2], [3, 4]])
    assert lf.Config.from_json(with_budget.to_json()) == with_budget
    assert not config.plain and not with_budget.plain


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"selector": "nearest"}, ValueError, "selector: expected one of dense, .*, got 'nearest'"),
        ({"selector": 3}, TypeError, "selector: expected a name or an object"),
        ({"refresh": 0}, ValueError, "refresh: expected an integer of at least 1"),
        ({"layout": "hilbert"}, ValueError, "layout: expected one of raster, tiles"),
        ({"token_order": "z"}, ValueError, "token_order: expected one of raster, morton"),
        ({"grid": (4,)}, ValueError, "grid: expected rows and columns"),
        ({"budget": [[1, -1]]}, ValueError, "budget: shares: expected"),
        ({"budget": [[1]], "hierarchy": True}, ValueError, "budget: expected hierarchy=False"),
        ({"budget": [[1, 2]]}, ValueError, "budget: expected shares for 2 layers, .* got 1"),
        ({"budget": [[1] * 3] * 2}, ValueError, "for 2 heads, as layer 0 has, got 3"),
        ({"dense_layers": [2]}, ValueError, "dense_layers: expected layers of the 2 patched ones"),
    ],
)
def test_settings_that_cannot_be(settings, error, words):
    model = make()
    with pytest.raises(error, match=words):
        lf.patch(model, **SETTINGS, **settings)
    assert lf.handle_of(model) is None
    handle = lf.patch(model, **SETTINGS)
    before = handle.config
    with pytest.raises(error, match=words):
        lf.patch(model, **SETTINGS, **settings)
    assert handle.active and handle.config == before


def test_a_selector_without_the_grid_it_needs_is_a_reason(monkeypatch):
    monkeypatch.setattr(adapters, "_grid", lambda arguments: None)
    model = make()
    expected = rollout(model)
    out, handle = run(model, selector="sta", frame_tokens=T, strict=False)
    assert torch.equal(out, expected)
    assert handle.stats()["dense"][reasons.NO_TILES] == 24
    with pytest.raises(lf.StrictError, match="rows and columns"):
        run(model, selector="sta", frame_tokens=T)
    for settings in ({"selector": "mean", "frame_tokens": T}, {"grid": (4, 5), "selector": "sta"}):
        assert run(model, **settings)[1].stats()["sparse_calls"] == 24


def test_a_grid_of_another_size_says_so():
    with pytest.raises(ValueError, match="grid: expected rows x columns = 20 tokens"):
        run(selector="sta", grid=(4, 6))
    # Turned, it has the right number of tokens and would misplace every tile.
    with pytest.raises(ValueError, match=r"tells, 4 x 5, got \(5, 4\)$"):
        run(selector="sta", grid=(5, 4))


class Counting:
    """The mean selector, which counts its calls by layer and chunk."""

    name, notes, needs_grid, exact = "counting", "", False, True

    def __init__(self):
        self.calls = collections.Counter()

    def select(self, q, k, geometry):
        self.calls[geometry.layer, geometry.chunk, geometry.step] += 1
        return selectors.make("mean").select(q, k, geometry)


@pytest.mark.parametrize(("refresh", "steps"), [(1, {0, 1, 2, 3, 4}), (2, {0, 2, 4}), (9, {0})])
def test_lists_are_shared_over_steps(refresh, steps, seen):
    model, selector = make(), Counting()
    handle = lf.patch(model, **SETTINGS, selector=selector, refresh=refresh)
    rollout(model, steps=4)
    expected = {(layer, c, s): 1 for layer in range(2) for c in range(2, 6) for s in steps}
    assert dict(selector.calls) == expected
    assert handle.stats()["sparse_calls"] == len(seen) == 40
    for at in range(0, len(seen), 10):
        first = seen[at][2]
        for step in range(min(refresh, 5)):
            assert seen[at + 2 * step][2] is first


def test_shared_lists_of_the_built_in_selector(seen):
    out, handle = run(refresh=3)
    kept = [seen[at][2] for at in range(24)]
    assert all(kept[at] is kept[at - at % 6 + at % 2] for at in range(24))
    assert handle.stats()["sparse_calls"] == 24
    fresh, _ = run()
    assert not torch.equal(out, fresh)
    # Cached means survive calls that pooled nothing: the next chunk's list is right.
    for q, k, blocks in seen[6:24:6]:
        sparsity = 1 - (blocks.indices.shape[3] + 0.1) / blocks.blocks
        own = lf.select_blocks(q, k, frame_tokens=T, sparsity=sparsity, score="mass",
                               hierarchy=False, block_q=32, block_k=16)  # fmt: skip
        assert torch.equal(own.indices, blocks.indices)


def test_two_caches_do_not_share_their_lists(seen):
    model, selector = make(), Counting()
    lf.patch(model, **SETTINGS, selector=selector, refresh=9)
    caches = [new_cache(model) for _ in range(2)]
    for begin in range(0, 9, 3):
        for step in range(3):
            for cache in caches:
                model(noise(3, seed=begin + step), kv_cache=cache, current_start=begin * T)
    assert set(selector.calls.values()) == {2}  # once a cache


@pytest.mark.parametrize(("reset", "steps"), [(False, [0, 2, 4]), (True, [0, 2, 0, 2])])
def test_a_chunk_made_once_more_counts_on_unless_reset(reset, steps):
    """What the settings say of refresh: nothing tells another attempt from another step."""
    assert "handle.reset()" in lf.Config.__doc__
    model, made = make(layers=1), []
    selector, cache = Counting(), new_cache(model)
    handle = lf.patch(model, **SETTINGS, selector=selector, refresh=2)
    rollout(model, chunks=1, cache=cache)
    for attempt in range(2):
        if attempt and reset:
            handle.reset()
        for _ in range(3):
            before = selector.calls.copy()
            model(noise(3), kv_cache=cache, current_start=3 * T)
            made += [step for _, _, step in selector.calls - before]
    assert made == steps


@pytest.mark.parametrize("selector", ["mean", None])
def test_lists_do_not_cross_into_a_graph_or_out_of_it(selector, seen, monkeypatch):
    facts, graph = _core.facts, [0]  # a stand-in for the stream
    monkeypatch.setattr(_core, "facts", lambda *a: (*facts(*a)[:2], graph[0]))
    model = make(layers=1)
    cache = new_cache(model)
    lf.patch(model, **SETTINGS, selector=selector, refresh=9)
    rollout(model, chunks=1, cache=cache)
    for graph[0] in (0, 0, 7, 7, 8, 0, 0):
        model(noise(3), kv_cache=cache, current_start=3 * T)
    lists = [id(blocks) for _, _, blocks in seen]
    assert [lists.index(x) for x in lists] == [0, 0, 2, 2, 4, 5, 5]


def test_reset_forgets_shared_lists():
    model, selector = make(), Counting()
    handle = lf.patch(model, **SETTINGS, selector=selector, refresh=9)
    rollout(model, chunks=2)
    handle.reset()
    assert not handle._sparse.chooser._lists
    rollout(model, chunks=2)
    assert set(selector.calls.values()) == {2}


@pytest.mark.parametrize("selector", [None, *[n for n in EXACT if n != "hsa"]])
def test_a_budget_gives_heads_other_counts_and_keeps_the_total(selector, seen):
    shares = [[1, 2], [3, 2]]
    _, handle = run(selector=selector, budget=shares)
    for at, (_, _, blocks) in enumerate(seen):
        kept = ops.plan_selection(3, blocks.frames, T, sparsity=SCHEDULE[1 + at // 6], block_k=16,
                                  hierarchy=False)[1]  # fmt: skip
        counts = Budget(shares).counts(kept, blocks.blocks)
        assert counts.sum() == 4 * kept
        assert blocks.counts[0, :, 0].tolist() == counts[at % 2].tolist()
    plain = run(selector=selector)[1].stats()["density"]
    assert handle.stats()["density"] == pytest.approx(plain)


def test_equal_shares_change_nothing():
    out, _ = run()
    same, _ = run(budget=[[5, 5], [5, 5]])
    torch.testing.assert_close(out, same, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", ["raster", "morton"])
@pytest.mark.parametrize("layout", ["tiles", "raster"])
def test_a_layout_moves_tokens_and_brings_them_back(order, layout, seen):
    model = make()
    for block in model.blocks:
        block.self_attn.token_order = order
    expected = rollout(model)
    out, _ = run(model, selector="dense", layout=layout)
    torch.testing.assert_close(out, expected, atol=3e-4, rtol=1e-4)
    seen.clear()
    run(model, selector="mean")
    plain = [(q, k) for q, k, _ in seen]
    seen.clear()
    run(model, selector="mean", layout=layout)
    moved = seen[0][1].unflatten(1, (-1, T))[:, :3]
    if {"tiles": "morton"}.get(layout, layout) == order:
        assert torch.equal(seen[0][0], plain[0][0])
        return
    rank = selectors.token_places(HEIGHT, WIDTH, "morton") @ (WIDTH, 1)
    rank = torch.from_numpy(rank if layout == "tiles" else rank.argsort())
    assert torch.equal(moved, plain[0][1].unflatten(1, (-1, T))[:, :3][:, :, rank])


@pytest.mark.parametrize("order", ["raster", "morton"])
@pytest.mark.parametrize("layout", ["tiles", "raster"])
def test_a_full_list_recalls_everything_in_any_layout(order, layout):
    _, handle = run(selector="dense", layout=layout, token_order=order, probe=8)
    stats = handle.stats()
    assert stats["recall"] == pytest.approx(1, abs=1e-5)
    assert stats["recall_p5"] == pytest.approx(1, abs=1e-5)


class Told(Counting):
    """Remembers what it was told."""

    def select(self, q, k, geometry):
        self.geometry = geometry
        return super().select(q, k, geometry)


def test_what_a_selector_is_told():
    model, selector = make(local_attn_size=9, sink_size=2), Told()
    run(model, new_cache(model, 9), selector=selector)
    g = selector.geometry
    assert (g.grid, g.order, g.layer, g.chunk, g.step) == ((HEIGHT, WIDTH), "raster", 1, 5, 2)
    assert (g.q_frames, g.k_frames, g.first_frame, g.sink_frames) == (3, 9, 12, 2)
    assert g.ages.tolist() == [14, 13, 6, 5, 4, 3, 2, 1, 0]
    assert g.frame_tokens == T and (g.block_q, g.block_k) == (32, 16)
    for block in model.blocks:
        block.self_attn.token_order = "morton"
    run(model, selector=selector)
    assert selector.geometry.order == "morton"
    run(model, selector=selector, token_order="raster")
    assert selector.geometry.order == "raster"
    run(model, selector=selector, layout="raster")
    assert selector.geometry.order == "raster"


@pytest.mark.parametrize("selector", ["sta", "vmoba", "mass", "random"])
def test_a_small_wan(selector):
    model = build(BLIND).float()
    handle = lf.patch(model, **SETTINGS, selector=selector, probe=4)
    Rollout(model, steps=(1000, 500)).generate(15, size=(6, 8), seed=1)
    stats = handle.stats()
    assert stats["sparse_calls"] == 3 * 4 * 3 and 0 < stats["recall"] <= 1
    handle.unpatch()


def test_a_copy_has_its_own_lists():
    import copy

    model, selector = make(), Counting()
    handle = lf.patch(model, **SETTINGS, selector=selector, refresh=9)
    rollout(model, chunks=2)
    twin = copy.deepcopy(model)
    assert lf.handle_of(twin) is not handle and not lf.handle_of(twin)._sparse.chooser._lists
    rollout(twin, chunks=2)
    assert lf.handle_of(twin).stats()["sparse_calls"] == 6


def test_copies_to_a_device_need_a_warm_up_before_a_capture(monkeypatch):
    """Made once for each device; `meta` stands in for one, and the answer for its stream."""
    device, captured = torch.device("meta"), [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured[0])
    geometry = Geometry(T, 3, 6, 4, 32, 16, (HEIGHT, WIDTH), kept_by_head=(3, 5))
    makers = [
        lambda: rank.head_counts(geometry, 2, device),
        lambda: groups.grouping(geometry, "cube", 3, device)[1],
        lambda: choose._permutation((HEIGHT, WIDTH), "raster", "morton", device)[0],
        lambda: vmoba._own(geometry, "cube", 3, device),
        lambda: selectors.make("sta").select(*like_q, geometry).indices,
    ]
    like_q = (torch.empty(1, 3 * T, 2, 16, device=device),) * 2
    for cache in (rank.counts_on, groups.grouping, choose._permutation, vmoba._own):
        cache.cache_clear()
    rank.forget()
    for make_tensor in makers:
        captured[0] = True
        with pytest.raises(RuntimeError, match="once before the capture of a CUDA graph"):
            make_tensor()
        captured[0] = False
        made = make_tensor()
        captured[0] = True
        assert make_tensor() is made and made.device == device


def test_what_a_graph_reads_outlives_its_cache(monkeypatch):
    """A graph holds addresses and no references, so caches must not be the only holders."""
    device, captured = torch.device("meta"), [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured[0])
    like_q = (torch.empty(1, 3 * T, 2, 16, device=device),) * 2

    def geometry(kept):
        return Geometry(T, 3, 6, kept, 32, 16, (HEIGHT, WIDTH), kept_by_head=(kept, kept))

    makers = [
        lambda n: rank.head_counts(geometry(n), 2, device),
        lambda n: groups.grouping(geometry(n), "cube", 3, device)[1],
        lambda n: choose._permutation((n, WIDTH), "raster", "morton", device)[0],
        lambda n: vmoba._own(geometry(n), "cube", 3, device),
        lambda n: selectors.make("sta").select(*like_q, geometry(n)).indices,
    ]
    caches = (rank.counts_on, groups.grouping, choose._permutation, vmoba._own)

    def empty_all():
        for cache in caches:
            cache.cache_clear()
        rank.forget()

    empty_all()
    for make_tensor in makers:
        make_tensor(3), make_tensor(5)
        captured[0] = True
        read = weakref.ref(make_tensor(3))
        captured[0] = False
        unread = weakref.ref(make_tensor(5))
        empty_all()
        gc.collect()
        assert read() is not None and unread() is None
    # What pushes a list out is the number of others.
    selectors.make("sta").select(*like_q, geometry(4))
    captured[0] = True
    read = weakref.ref(selectors.make("sta").select(*like_q, geometry(4)))
    captured[0] = False
    monkeypatch.setattr(rank, "CACHED", 2)
    for kept in (5, 6, 7):
        selectors.make("sta").select(*like_q, geometry(kept))
    gc.collect()
    assert read() is not None
