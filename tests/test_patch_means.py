"""patch: cached means of past keys are the means of the keys that are there, whatever happens.

The guard below stands in every test: the means that a step works with must equal, bit for
bit, a fresh pooling of that call's keys. `pooled` tells how many frames were read to make them,
so that a test also proves that the cache was used, or that it was not.
"""

import copy
import threading
from types import SimpleNamespace

import fake_ar as ar
import pytest
import torch

import lightforcing as lf
from lightforcing import _core, ops
from lightforcing.decide import Decision
from lightforcing.means import KeyMeans
from lightforcing.step import Step

SMALL = {"block_q": 16, "block_k": 16}
PRESETS = ["paper", "fast"]


class Guard:
    def __init__(self):
        self.pooled = []  # frames read by each pooling
        self.given = []  # means given to the selection?


@pytest.fixture
def guard(monkeypatch):
    seen = Guard()
    run, plan, made = Step.run, Step.__init__, {}

    def planning(step, q, k, v, **keywords):
        part = keywords["block_k"] // (1 if keywords["score"] == "mean" else 4)
        made[step] = keywords["frame_tokens"], part
        plan(step, q, k, v, **keywords)

    def running(step, q, k, v, means, held, want_lse, fresh):
        tokens, block = made[step]
        result = run(step, q, k, v, means, held, want_lse, fresh)
        seen.given.append(means is not None)
        if means is not None:
            seen.pooled.append(k.shape[1] // tokens - held)
            fresh = ops.compress(k, tokens, block=block)
            assert torch.equal(means[:, : fresh.shape[1]], fresh), "stale means"
        return result

    monkeypatch.setattr(Step, "__init__", planning)
    monkeypatch.setattr(Step, "run", running)
    return seen


def forward(model, cache, first, frames=3, seed=0):
    return model(ar.noise(frames, seed=seed), kv_cache=cache, current_start=first * ar.T)


@pytest.fixture
def one_layer():
    return ar.make(layers=1)


# ---- where means are kept ----------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("batch", [1, 3])
def test_only_new_frames_are_pooled(guard, one_layer, preset, batch):
    with lf.patched(one_layer, preset, **SMALL) as handle:
        ar.rollout(one_layer, 4, batch=batch)
        assert handle.means_bytes > 0
    assert all(guard.given) and len(guard.given) == 9
    # Chunk 2 pools the first chunk too; after that only the chunk's own frames, in every step.
    assert guard.pooled == [6, 3, 3, 3, 3, 3, 3, 3, 3]
    assert handle.means_bytes == 0  # given back with unpatch


@pytest.mark.parametrize("layer", [ar.Deferred, ar.Raw, ar.Rolling])
def test_families_with_fresh_keys_pool_anew(guard, layer):
    model = ar.make(layer, layers=1)
    with lf.patched(model, "fast", **SMALL) as handle:
        ar.rollout(model, 4)
        assert guard.given == [False] * 9 and handle.means_bytes == 0


def test_two_interleaved_caches(guard, one_layer):
    """Guidance, or two rollouts: each cache has its own means."""
    caches = ar.new_cache(one_layer), ar.new_cache(one_layer)
    with lf.patched(one_layer, "fast", **SMALL):
        for c in range(4):
            for step in range(3):
                for i, cache in enumerate(caches):
                    forward(one_layer, cache, 3 * c, seed=10 * step + i)
    assert all(guard.given)
    assert guard.pooled == [6, 6] + [3] * 16


def test_interleaved_rollouts_equal_those_alone(one_layer):
    def run(model, order):
        caches = [ar.new_cache(model) for _ in range(3)]
        position, out = [0, 0, 0], {}
        for i in order:
            key = i, position[i]
            for step in range(2):
                out[key] = forward(model, caches[i], 3 * position[i], seed=100 * i + step)
            position[i] += 1
        return out

    with lf.patched(one_layer, "fast", **SMALL):
        alone = run(one_layer, [0] * 5) | run(one_layer, [1] * 5) | run(one_layer, [2] * 5)
        mixed = run(one_layer, [0, 1, 0, 2, 2, 1, 0, 2, 1, 0, 1, 2, 0, 2, 1])
    assert alone.keys() == mixed.keys()
    assert all(torch.equal(alone[key], mixed[key]) for key in alone)


def test_more_caches_than_are_remembered(guard, one_layer):
    caches = [ar.new_cache(one_layer) for _ in range(6)]
    with lf.patched(one_layer, "fast", **SMALL) as handle:
        for c in range(3):
            for cache in caches:
                forward(one_layer, cache, 3 * c)
        assert len(handle._sparse.means[0].entries) == 4
    assert guard.pooled == [6] * 6 + [9] * 6


def test_threads_with_a_cache_each(guard, one_layer):
    with lf.patched(one_layer, "fast", **SMALL):
        errors = []

        def run(seed):
            try:
                ar.rollout(one_layer, 6, seed=seed)
            except AssertionError as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(s,)) for s in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors and len(guard.given) == 45


# ---- what drops them ---------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("sink", [0, 1])
def test_rolled_cache(guard, preset, sink):
    """The window moves: all keys change place, at the same address and length."""
    model = ar.make(layers=1, local_attn_size=9, sink_size=sink)
    with lf.patched(model, preset, **SMALL):
        ar.rollout(model, 6, cache=ar.new_cache(model, frames=9))
    # The roll happens in the first step of chunks 4 to 6.
    assert guard.pooled == [6, 3, 3, 3, 3, 3, 9, 3, 3, 9, 3, 3, 9, 3, 3]


def test_new_video_in_the_same_cache(guard, one_layer):
    cache = ar.new_cache(one_layer)
    with lf.patched(one_layer, "fast", **SMALL):
        ar.rollout(one_layer, 3, cache=cache, seed=1)
        for layer in cache:
            layer["global_end"] = layer["local_end"] = 0
        ar.rollout(one_layer, 3, cache=cache, seed=2)
    assert guard.pooled == [6, 3, 3, 3, 3, 3] * 2


def test_going_back_in_the_video(guard, one_layer):
    """Chunk 2 once more, after chunk 3: what follows it in the cache is not past any more."""
    cache = ar.new_cache(one_layer)
    with lf.patched(one_layer, "fast", **SMALL):
        ar.rollout(one_layer, 3, cache=cache)
        cache[0]["global_end"] = cache[0]["local_end"] = 60
        forward(one_layer, cache, 3)
        forward(one_layer, cache, 6)
    assert guard.pooled[6:] == [6, 3]


def zero(cache):
    cache["k"].zero_()


def overwrite_the_past(cache):
    cache["k"][:, :20] = 1.0


def overwrite_through_a_view(cache):
    cache["k"].view(-1)[:320].mul_(2)


def overwrite_through_detach(cache):
    cache["k"].detach()[:, 3].add_(1)


def new_tensor(cache):
    cache["k"] = cache["k"] * 2


def new_tensor_at_the_same_address(cache):
    cache["k"] = torch.from_numpy(cache["k"].numpy())
    cache["k"].numpy()[:, :20] = 3.0  # a write that no version counter sees


@pytest.mark.parametrize(
    "change",
    [zero, overwrite_the_past, overwrite_through_a_view, overwrite_through_detach, new_tensor,
     new_tensor_at_the_same_address],
)  # fmt: skip
@pytest.mark.parametrize("step", [0, 1])
def test_a_pipeline_that_writes_into_its_cache(guard, one_layer, change, step):
    """Between two forwards: at a new chunk, or between two steps of one."""
    cache = ar.new_cache(one_layer)
    with lf.patched(one_layer, "fast", **SMALL):
        ar.rollout(one_layer, 3, cache=cache)
        for _ in range(step):
            forward(one_layer, cache, 9)
        change(cache[0])
        forward(one_layer, cache, 9)
    assert guard.pooled[6:] == [3] * step + [12]


class Sly(ar.InPlace):
    """Changes the past inside its forward, before or after its attention call."""

    before = after = staticmethod(lambda cache: None)

    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0,
                cache_start=None):  # fmt: skip
        type(self).before(kv_cache)
        out = super().forward(x, seq_lens, grid_sizes, freqs, block_mask, kv_cache, current_start)
        type(self).after(kv_cache)
        return out


@pytest.fixture
def sly():
    """A one-layer model, and ``set(moment, change)`` for what it does inside its forwards."""
    model = ar.make(Sly, layers=1)
    yield model, lambda moment, change: setattr(Sly, moment, staticmethod(change))
    Sly.before = Sly.after = staticmethod(lambda cache: None)


def test_a_write_before_the_attention_call(guard, sly):
    model, put = sly
    put("before", overwrite_the_past)
    with lf.patched(model, "fast", **SMALL):
        ar.rollout(model, 3)
    assert guard.pooled == [6, 6, 6, 9, 9, 9]


def test_a_write_after_the_attention_call_is_seen_by_the_next(guard, sly):
    model, put = sly
    put("after", overwrite_the_past)
    with lf.patched(model, "fast", **SMALL):
        ar.rollout(model, 3)
    assert guard.pooled == [6, 6, 6, 9, 9, 9]


class OneCopy(ar.InPlace):
    """Moves the window and inserts the chunk in one write of the whole cache."""

    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0,
                cache_start=None):  # fmt: skip
        q, k, v = self.qkv(x)
        end = current_start + x.shape[1]
        past = kv_cache["local_end"] - (0 if end > kv_cache["global_end"] else x.shape[1])
        for name, new in (("k", k), ("v", v)):
            old = kv_cache[name]
            row = torch.cat([old[:, :past], new], 1)[:, -old.shape[1] :]
            old.copy_(torch.cat([row, old[:, row.shape[1] :]], 1))
        kv_cache["global_end"], kv_cache["local_end"] = end, row.shape[1]
        keys, values = (kv_cache[name][:, : row.shape[1]] for name in "kv")
        return self.o(attention(q, keys, values).flatten(2))


attention = ar.attention  # where OneCopy.forward looks it up


def test_one_write_that_moves_everything(guard):
    """The version counts one write; the frame at the start of the keys gives the move away."""
    model = ar.make(OneCopy, layers=1)
    with lf.patched(model, "fast", **SMALL):
        ar.rollout(model, 5, cache=ar.new_cache(model, frames=9))
    assert guard.pooled == [6, 3, 3, 3, 3, 3, 9, 3, 3, 9, 3, 3]


def test_dense_steps_in_between_keep_the_past(guard, one_layer):
    """A dense call rewrites the chunk's own keys: these are pooled anew, the past is not."""
    with lf.patched(one_layer, "fast", dense_steps=(1,), **SMALL) as handle:
        ar.rollout(one_layer, 4, steps=3)
        assert handle.stats()["sparse_calls"] == 9
    assert guard.pooled == [6] + [3] * 8


def test_a_dense_last_step(guard, one_layer):
    """The clean pass is dense: its keys are first pooled by the next chunk."""
    with lf.patched(one_layer, "fast", dense_steps=(2,), **SMALL):
        ar.rollout(one_layer, 4)
    assert guard.pooled == [6, 3, 6, 3, 6, 3]


def test_a_dense_context_in_between(guard, one_layer):
    cache = ar.new_cache(one_layer)
    with lf.patched(one_layer, "fast", **SMALL):
        ar.rollout(one_layer, 3, cache=cache)
        with lf.dense():
            forward(one_layer, cache, 9)
        forward(one_layer, cache, 12)
    assert guard.pooled[6:] == [6]


def test_unpatched_calls_in_between(guard, one_layer):
    """The cache went on without us: its version tells."""
    cache = ar.new_cache(one_layer)
    handle = lf.patch(one_layer, "fast", **SMALL)
    ar.rollout(one_layer, 3, cache=cache)
    means = copy.copy(handle._sparse.means)
    handle.unpatch()
    forward(one_layer, cache, 9)
    handle = lf.patch(one_layer, "fast", **SMALL)
    handle._sparse.means = means  # as if unpatch had kept them
    forward(one_layer, cache, 12)
    assert guard.pooled[6:] == [15]
    handle.unpatch()


def test_an_error_after_the_attention_call(guard, sly):
    model, put = sly
    cache = ar.new_cache(model)

    def fail(cache):
        raise KeyError

    with lf.patched(model, "fast", **SMALL):
        ar.rollout(model, 3, cache=cache)
        put("after", fail)
        with pytest.raises(KeyError):
            forward(model, cache, 9)
        put("after", lambda cache: None)
        forward(model, cache, 9)
    assert guard.pooled[6:] == [3, 12]


def test_inference_mode_pools_every_call(guard, one_layer):
    """Tensors without version counters."""
    with lf.patched(one_layer, "fast", **SMALL) as handle, torch.inference_mode():
        ar.rollout(one_layer, 3)
        assert guard.given == [False] * 6 and handle.means_bytes == 0
    assert guard.pooled == []


def test_a_cache_from_outside_under_inference_mode(guard, one_layer):
    cache = ar.new_cache(one_layer)
    with lf.patched(one_layer, "fast", **SMALL), torch.inference_mode():
        ar.rollout(one_layer, 3, cache=cache)
        overwrite_the_past(cache[0])
        forward(one_layer, cache, 9)
    assert guard.pooled == [6, 3, 3, 3, 3, 3, 12]


def test_kept_means_change_nothing(guard, one_layer, monkeypatch):
    """Pooling the past again in every call gives the same video as the kept means."""
    with lf.patched(one_layer, "fast", **SMALL):
        kept = ar.rollout(one_layer, 4)
    assert guard.given == [True] * 9 and guard.pooled[-1] == 3
    monkeypatch.setattr(KeyMeans, "enter", lambda *arguments, **settings: None)
    with lf.patched(one_layer, "fast", **SMALL) as handle:
        assert torch.equal(ar.rollout(one_layer, 4), kept)
        assert handle.stats()["means_bytes"] == 0 and guard.given[9:] == [False] * 9


def test_changed_block_size_pools_anew(guard, one_layer):
    cache = ar.new_cache(one_layer)
    with lf.patched(one_layer, "paper", **SMALL):
        ar.rollout(one_layer, 3, cache=cache)
        lf.patch(one_layer, "fast", **SMALL)
        forward(one_layer, cache, 9)
    assert guard.pooled[6:] == [12]


def test_more_frames_than_the_buffer_has_room_for():
    """Keys kept flat do not say how many frames may come: a longer call gets a larger buffer."""
    keys, means = torch.zeros(1, 9 * ar.T * 2 * 16), KeyMeans()
    whole = keys.view(1, 9 * ar.T, 2, 16)

    def enter(first_frame, frames):
        k = whole[:, : frames * ar.T]
        decision = Decision(ar.T, 3, frames - 3, 3, first_frame, None, 0)
        decision.keys, decision.rows = (whole.stride(), ar.T, 16), frames * 2
        visit = SimpleNamespace(keys=keys, address=k.data_ptr(), capture=0, version=keys._version,
                                first_frame=first_frame, entry=None, seen=None)  # fmt: skip
        entry = means.enter(visit, k, decision)
        held, entry.frames = entry.frames, frames
        means.leave(visit)
        return entry, held

    six, held = enter(3, 6)
    assert held == 0 and six.means.shape == (1, 12, 2, 16)
    assert enter(3, 6) == (six, 3)  # kept: the past holds
    nine, held = enter(6, 9)
    assert nine is not six and held == 0 and nine.means.shape == (1, 18, 2, 16)
    assert enter(6, 9) == (nine, 6) and enter(6, 9)[0].rows == 18


def test_the_cache_dict_is_not_kept_alive(one_layer):
    import gc
    import weakref

    with lf.patched(one_layer, "fast", **SMALL):
        cache = ar.new_cache(one_layer)
        ar.rollout(one_layer, 3, cache=cache)
        ghost = weakref.ref(cache[0]["k"])
        del cache
        gc.collect()
        assert ghost() is None


# ---- CUDA graphs, told by a stand-in for the stream ----------------------------------------


def test_a_graph_pools_what_it_reads(guard, one_layer, monkeypatch):
    """A graph may be replayed at any time: it trusts no means but its own."""
    facts, graph = _core.facts, [0]
    monkeypatch.setattr(_core, "facts", lambda *a: (*facts(*a)[:2], graph[0]))
    cache = ar.new_cache(one_layer)
    with lf.patched(one_layer, "fast", **SMALL) as handle:
        ar.rollout(one_layer, 3, cache=cache)
        assert handle._sparse.spare
        spare = dict(handle._sparse.spare)
        graph[0] = 7
        for _ in range(2):  # two steps of chunk 4 in one graph
            forward(one_layer, cache, 9)
        assert guard.pooled[6:] == [12, 3]
        graph[0] = 8
        forward(one_layer, cache, 9)
        assert guard.pooled[8:] == [12]
        now = handle._sparse.spare
        assert all(now[key] is x for key, x in spare.items())  # graphs take their own
        graph[0] = 0  # replays write keys that no version tells of
        forward(one_layer, cache, 9)
        forward(one_layer, cache, 12)
        assert guard.pooled[9:] == [] and guard.given[-2:] == [False, False]
        other = ar.new_cache(one_layer)
        ar.rollout(one_layer, 3, cache=other)
        assert guard.pooled[9:] == [6, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("forget", ["reset", "update", "patch"])
def test_captured_keys_stay_known(guard, one_layer, monkeypatch, forget):
    """The graph lives on: its replays write keys after a reset too, and no version tells."""
    facts, graph = _core.facts, [0]
    monkeypatch.setattr(_core, "facts", lambda *a: (*facts(*a)[:2], graph[0]))
    cache = ar.new_cache(one_layer)
    handle = lf.patch(one_layer, "fast", **SMALL)
    ar.rollout(one_layer, 3, cache=cache)
    graph[0] = 7
    forward(one_layer, cache, 9)
    graph[0] = 0
    if forget == "reset":
        handle.reset()
    elif forget == "update":
        handle.update(handle.config.replace(probe=4))
    else:
        handle.unpatch()
        handle = lf.patch(one_layer, "fast", **SMALL)
    forward(one_layer, cache, 9)
    cache[0]["k"].numpy()[:, : ar.T] += 1  # as a replay does: no version counts it
    forward(one_layer, cache, 12)
    assert guard.given[-2:] == [False, False]
    handle.unpatch()
