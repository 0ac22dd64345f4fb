"""step_share: other numbers of kept blocks in the forwards of a chunk, the sum unchanged."""

import fake_ar as ar
import pytest
import torch

import lightforcing as lf
from lightforcing import _core
from lightforcing.step import Step

SMALL = {"block_q": 16, "block_k": 16, "sparsity": 0.6, "law": "constant"}
CHUNKS, FORWARDS, LAYERS = 4, 3, 2


@pytest.fixture
def kept(monkeypatch):
    """Kept blocks of every sparse call that the core took in one step."""
    seen, run = [], Step.run

    def running(step, *rest, **keywords):
        seen.append(step.lists[0][3])
        return run(step, *rest, **keywords)

    monkeypatch.setattr(Step, "run", running)
    return seen


def by_chunk(kept, forwards=FORWARDS):
    """``[chunks][forwards]``, after seeing that all layers of a forward keep the same."""
    rows = [kept[i : i + LAYERS] for i in range(0, len(kept), LAYERS)]
    assert all(len(set(row)) == 1 for row in rows)
    flat = [row[0] for row in rows]
    return [flat[i : i + forwards] for i in range(0, len(flat), forwards)]


def run(share, model=None, steps=2, **settings):
    model = ar.make(layers=LAYERS) if model is None else model
    with lf.patched(model, config=lf.Config(**SMALL | settings, step_share=share)) as handle:
        out = ar.rollout(model, CHUNKS, steps=steps)
        return out, handle, handle.stats(), handle.report()


def test_sums_stay_and_shares_hold_from_the_first_sparse_chunk(kept):
    run(None)
    even = by_chunk(kept)
    assert even == [[4] * 3, [7] * 3, [9] * 3]  # 12, 18 and 24 blocks, 40 %
    kept.clear()
    stats = run((1, 1, 2))[2]
    assert by_chunk(kept) == [[3, 3, 6], [5, 5, 11], [7, 7, 13]]  # of 12, 21 and 27
    density = {c["chunk"]: c["density"] for c in stats["chunks"]}
    assert [density[c] for c in (2, 3, 4)] == pytest.approx([4 / 12, 7 / 18, 9 / 24])
    sparsity = {c["chunk"]: c["sparsity"] for c in stats["chunks"]}
    assert sparsity[2] == pytest.approx(0.6)  # the schedule's


def test_equal_shares_are_none(kept):
    plain = run(None)[0]
    assert torch.equal(run((2, 2, 2))[0], plain)
    half = len(kept) // 2
    assert kept[:half] == kept[half:]


def test_a_forward_keeps_one_at_least_and_all_at_most(kept):
    stats = run((0, 1, 9))[2]
    assert kept[::LAYERS] == [1, 1, 10, 1, 2, 1, 3, 23]  # of 12, 21 and 27
    assert stats["dense"]["all blocks kept"] == LAYERS  # the third forward that had 18 of 18
    density = {c["chunk"]: c["density"] for c in stats["chunks"]}
    assert [density[c] for c in (2, 3, 4)] == pytest.approx([4 / 12, 7 / 18, 9 / 24])


@pytest.mark.parametrize("selector", ["random", "mass-fine", "hsa"])
def test_any_selector_keeps_the_sum(selector):
    settings = {"selector": selector, "grid": (4, 5)}
    found = run((0.5, 0.5, 2), **settings)[2]
    even = run(None, **settings)[2]
    assert found["density"] == pytest.approx(even["density"])
    assert found["sparse_calls"] == even["sparse_calls"]


def test_chunks_with_other_forwards_keep_the_same_and_the_report_says_so(kept):
    _, handle, _, report = run((0.1, 0.4, 0.7, 3.1, 0.7))
    assert by_chunk(kept) == [[4] * 3, [7] * 3, [9] * 3]
    assert "step_share is for 5 forwards a chunk, 3 had 3: the chunk after keeps the same" in report
    assert "blocks by step 0.1 0.4 0.7 3.1 0.7" in report
    handle.reset()
    assert "step_share is for" not in handle.report()


def test_calls_without_denoising_steps_keep_the_same(kept):
    """A window that slides at every forward: no second forward at any place."""
    run((0.1, 1, 1), steps=0)
    first, *rest = by_chunk(kept, 1)
    assert rest == [[7], [9]] and first == [1]  # one chunk may be the first of its forwards


def test_a_given_first_chunk_says_nothing(kept):
    model = ar.make(layers=LAYERS)
    cache = ar.new_cache(model)
    config = lf.Config(**SMALL, step_share=(1, 1, 2))
    with lf.patched(model, config=config):
        for chunk, forwards in enumerate((1, 3, 3)):
            for _ in range(forwards):
                model(ar.noise(3), kv_cache=cache, current_start=3 * chunk * ar.T)
    assert by_chunk(kept) == [[3, 3, 6], [5, 5, 11]]


def test_a_chunk_that_was_broken_off_counts_for_nothing(kept):
    model = ar.make(layers=LAYERS)
    cache = ar.new_cache(model)
    with lf.patched(model, config=lf.Config(**SMALL, step_share=(1, 1, 2))):
        ar.rollout(model, 2, cache=cache)
        model(ar.noise(3), kv_cache=cache, current_start=6 * ar.T)  # the first forward of three
        kept.clear()
        ar.rollout(model, 3, cache=cache)
    assert by_chunk(kept) == [[3, 3, 6], [5, 5, 11]]


def test_a_graph_keeps_the_same_in_every_forward(kept, monkeypatch):
    """Captured in one forward, it may be replayed in all."""
    facts, graph = _core.facts, [0]  # a stand-in for the stream
    monkeypatch.setattr(_core, "facts", lambda *a: (*facts(*a)[:2], graph[0]))
    model = ar.make(layers=LAYERS)
    cache = ar.new_cache(model)
    with lf.patched(model, config=lf.Config(**SMALL, step_share=(1, 1, 2))):
        ar.rollout(model, 2, cache=cache)
        for graph[0] in 0, 7, 0, 8:
            model(ar.noise(3), kv_cache=cache, current_start=6 * ar.T)
    assert kept[::LAYERS] == [3, 3, 6, 5, 7, 11, 7]


def test_beside_refresh():
    with pytest.raises(ValueError, match="step_share: expected None beside refresh = 2"):
        lf.Config(refresh=2, step_share=(1, 2))
    shared = lf.Config(step_share=(1, 2))
    assert shared.replace(refresh=2).step_share is None
    assert shared.replace(sparsity=0.5, refresh=1).step_share == (1, 2)


@pytest.mark.parametrize(
    "share, error, message",
    [
        ((0, 0), ValueError, r"step_share: expected numbers that are not all 0, got \[0.0, 0.0\]"),
        ((), ValueError, r"step_share: expected numbers that are not all 0, got \[\]"),
        ((1, -1), ValueError, r"step_share: expected a number in \[0, 1e\+06\], got -1"),
        ((1, float("nan")), ValueError, "step_share: expected a number in"),
        (2.0, TypeError, "step_share: expected a list, got 2.0"),
        (("1",), TypeError, "step_share: expected a number, got '1'"),
    ],
)
def test_what_is_no_share(share, error, message):
    with pytest.raises(error, match=message):
        lf.Config(step_share=share)


def test_a_query_of_several_chunks_takes_the_even_number(kept):
    """It makes a cache anew, in mid-video too: no denoising step."""
    model = ar.make(layers=LAYERS)
    cache = ar.new_cache(model)
    with lf.patched(model, config=lf.Config(**SMALL, step_share=(0, 1, 2))) as handle:
        for chunk in range(2):
            for _ in range(FORWARDS):
                model(ar.noise(3), kv_cache=cache, current_start=3 * chunk * ar.T)
        kept.clear()
        model(ar.noise(6), kv_cache=cache, current_start=6 * ar.T)
        assert kept == [9] * LAYERS  # of 24, by the schedule of the fourth chunk
        for _ in range(FORWARDS):
            model(ar.noise(3), kv_cache=cache, current_start=12 * ar.T)
        assert not handle.misfits
    assert [sum(kept[LAYERS * i : LAYERS * (i + 1)]) for i in range(1, 4)] == [2, 24, 46]


def test_each_video_starts_anew(kept):
    """Numbers of forwards that one video taught do not change the next, nor another cache."""
    model = ar.make(layers=LAYERS)
    with lf.patched(model, config=lf.Config(**SMALL, step_share=(0.1, 0.6, 1, 2.6, 0.7))) as handle:
        seen = []
        for cache in (one := ar.new_cache(model), one, ar.new_cache(model)):
            kept.clear()
            for chunk, forwards in enumerate((1, 3, 3)):  # the first chunk is given
                for _ in range(forwards):
                    model(ar.noise(3), kv_cache=cache, current_start=3 * chunk * ar.T)
            seen += [by_chunk(kept)]
        assert seen[0] == seen[1] == seen[2] and len(set(seen[0][0])) == 3
        assert "forwards a chunk, 3 had 3: the chunk after keeps the same in all" in handle.report()


def test_dense_steps_take_no_part(kept):
    stats = run((1, 1, 2), dense_steps=(1,))[2]
    assert by_chunk(kept, 2) == [[3, 5], [5, 9], [6, 12]]
    assert stats["dense"]["dense step"] == CHUNKS * LAYERS
