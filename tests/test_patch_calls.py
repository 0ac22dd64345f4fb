"""patch: which calls run sparse, how sparse, which stay dense and why, and what they compute."""

import logging

import fake_ar as ar
import pytest
import torch

import lightforcing as lf
from lightforcing import hook
from lightforcing.config import SELECTION
from lightforcing.step import Step

SMALL = {"block_q": 16, "block_k": 16}
FAMILIES = [ar.InPlace, ar.Deferred, ar.Raw, ar.Rolling]
FIRST = {"first chunk": 6}


@pytest.fixture
def model():
    return ar.make()


@pytest.fixture
def calls(monkeypatch):
    """Every sparse call of the test: q, k, v, keywords of its step, list, out."""
    seen, made = [], {}
    run, plan = Step.run, Step.__init__

    def planning(step, q, k, v, **keywords):
        made[step] = keywords
        plan(step, q, k, v, **keywords)

    def running(step, q, k, v, *rest, **keywords):
        result = out, _, workspace = run(step, q, k, v, *rest, **keywords)
        tensors = {"q": q, "k": k, "v": v, "out": out}
        seen.append({name: x.clone() for name, x in tensors.items()} | made[step])
        seen[-1]["blocks"] = step.blocks(workspace)
        return result

    monkeypatch.setattr(Step, "__init__", planning)
    monkeypatch.setattr(Step, "run", running)
    return seen


def masked_attention(q, k, v, blocks):
    """Float64 attention over the tokens of the listed blocks."""
    rows = torch.arange(q.shape[1]) // blocks.block_q
    tokens = torch.arange(k.shape[1])
    per_frame = -(-blocks.frame_tokens // blocks.block_k)
    own = tokens // blocks.frame_tokens * per_frame + (
        tokens % blocks.frame_tokens // blocks.block_k
    )
    kept = blocks.to_bool()[:, :, rows][..., own]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    logits = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(~kept, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2)


# ---- what sparse calls compute -----------------------------------------------------------


@pytest.mark.parametrize("layer", FAMILIES)
@pytest.mark.parametrize("preset", ["paper", "fast", "quality"])
@pytest.mark.parametrize("batch", [1, 3])
def test_sparse_calls_attend_the_listed_blocks(calls, layer, preset, batch):
    model = ar.make(layer)
    with lf.patched(model, preset, **SMALL) as handle:
        ar.rollout(model, 7, batch=batch)
    assert len(calls) == handle.stats()["sparse_calls"] == 36
    for call in calls:
        truth = masked_attention(call["q"], call["k"], call["v"], call["blocks"])
        assert (call["out"] - truth).abs().max() < 1e-4 * truth.abs().max()
        fresh = {k: call[k] for k in ("frame_tokens", "sparsity", *SELECTION)}
        alone = lf.select_blocks(call["q"], call["k"], **fresh)
        assert torch.equal(alone.indices, call["blocks"].indices)


@pytest.mark.parametrize("layer", FAMILIES)
@pytest.mark.parametrize("preset", list(lf.PRESETS))
def test_every_chunk_gets_its_sparsity(calls, layer, preset):
    """Two layers, three forwards a chunk: the planned s, and exactly floor((1 - s) J) blocks."""
    model = ar.make(layer)
    with lf.patched(model, preset, **SMALL) as handle:
        ar.rollout(model, 7)
        plan = handle.explain()
    stats = handle.stats()
    assert stats["dense"] == FIRST and stats["calls"] == 42
    assert [c["chunk"] for c in stats["chunks"]] == [1, 2, 3, 4, 5, 6, 7]
    config = lf.Config.preset(preset)
    planned = lf.cag_schedule(
        63 if config.window else 21, 3, sparsity=config.sparsity, base=config.base,
        law=config.law, window=config.window,
    )  # fmt: skip
    for c, s in zip(range(7), planned, strict=False):
        of_chunk = calls[6 * (c - 1) : 6 * c] if c else []
        assert all(call["sparsity"] == s for call in of_chunk)
        assert stats["chunks"][c]["sparse_calls"] == len(of_chunk)
        assert plan.rows[c]["sparsity"] == s
        for call in of_chunk:
            blocks = call["k"].shape[1] // ar.T * 2
            kept = max(1, int((1 - s) * blocks + 1e-9))
            assert (call["blocks"].counts == kept).all()
            assert stats["chunks"][c]["density"] == pytest.approx(kept / blocks)


def test_bfloat16_and_float16(calls):
    for dtype in (torch.bfloat16, torch.float16):
        model = ar.make(dtype=dtype)
        with lf.patched(model, "fast", **SMALL) as handle:
            assert ar.rollout(model, dtype=dtype).dtype == dtype
        assert handle.stats()["sparse_calls"] == 24
    for call in calls:
        truth = masked_attention(call["q"], call["k"], call["v"], call["blocks"])
        assert (call["out"] - truth).abs().max() < 0.01 * truth.abs().max()


# ---- chunks, windows, positions ----------------------------------------------------------


def sparsities(calls, layers=2):
    """The s of every first-layer call in order, without the repeats of denoising steps."""
    s = [call["sparsity"] for call in calls[::layers]]
    return s[::3]


def test_framewise_model(calls, model):
    """Chunks of one frame: n = 1, 2, 3 ..., from the shortest query seen."""
    with lf.patched(model, **SMALL) as handle:
        ar.rollout(model, 8, frames=1)
    assert handle.chunk_frames == 1
    expected = lf.cag_schedule(21, 1, sparsity=0.8, law="count")
    assert expected[1] == 0  # the kept number fills two frames: dense, inside the budget
    assert sparsities(calls) == [s for s in expected[:8] if s]
    assert handle.stats()["dense"]["sparsity 0"] == 6 * sum(expected[1:8] == 0)


def test_lone_first_frame(calls, model):
    """1, 3, 3, ...: the chunk size is the model's, n = first frame + 3."""
    model.num_frame_per_block = 3
    settings = {"chunk_ends": (1, 4, 7, 10, 13), "law": "linear", "base": 0.9, **SMALL}
    with lf.patched(model, **settings) as handle:
        ar.rollout(model, ends=[1, 4, 7, 10, 13])
    # With one frame before it, fewer than dense_frames = 3, the second chunk is dense too.
    expected = lf.cag_schedule(frames_per_chunk=3, sparsity=0.8, base=0.9,
                               chunk_ends=(1, 4, 7, 10, 13))  # fmt: skip
    assert expected[0] == expected[1] == 0
    assert sparsities(calls) == list(expected[2:])
    assert [c["chunk"] for c in handle.stats()["chunks"]] == [1, 2, 3, 4, 5]
    assert handle.stats()["dense"] == {"first chunk": 12}


def test_lone_first_frame_with_one_dense_frame(calls, model):
    model.num_frame_per_block = 3
    with lf.patched(model, dense_frames=1, chunk_ends=(1, 4, 7), **SMALL) as handle:
        ar.rollout(model, ends=[1, 4, 7])
    expected = lf.cag_schedule(frames_per_chunk=3, sparsity=0.8, law="count", dense_frames=1,
                               chunk_ends=(1, 4, 7))  # fmt: skip
    assert sparsities(calls) == list(expected[1:]) and handle.stats()["sparse_calls"] == 12


def test_the_model_says_the_chunk_size_late(model):
    handle = lf.patch(model, **SMALL)
    assert handle.chunk_frames == 3  # nothing known
    model.num_frame_per_block = 7
    assert handle.chunk_frames == 7
    assert lf.patch(model, frames_per_chunk=4).chunk_frames == 4
    handle.unpatch()


def test_window_of_the_layer_and_streaming_past_the_plan(calls):
    """A rolled cache with a sink: resident frames saturate, n goes on; the last value holds."""
    model = ar.make(local_attn_size=6, sink_size=1)
    cache = ar.new_cache(model, frames=6)
    with lf.patched(model, law="linear", num_frames=12, **SMALL) as handle:
        ar.rollout(model, 8, cache=cache)
        assert handle.facts["window"] == 6
    planned = lf.cag_schedule(12, 3, sparsity=0.8, window=6)
    assert sparsities(calls) == [*planned[1:], *[planned[3]] * 4]
    assert all(call["k"].shape[1] == 6 * ar.T for call in calls)
    assert handle.stats()["dense"] == FIRST


@pytest.mark.parametrize("local, frames", [(-1, 21), (6, 63), ([-1, 6], 63), (None, 21)])
def test_num_frames_default_is_63_with_a_window(local, frames):
    model = odd(lambda q, k, v: ((q, k, v), {}))
    model.blocks[0].self_attn.local_attn_size = local
    with lf.patched(model, law="linear", **SMALL) as handle:
        model(ar.noise(3), kv_cache=[{}], current_start=60)
        assert handle.explain().rows[-1]["last_frame"] == frames - 1


def test_rolling_windows(calls):
    """Five chunks in the query, the first frame moves by one: counted from the first chunk."""
    model = ar.make(ar.Rolling)
    cache = ar.new_cache(model, frames=40)
    with lf.patched(model, "paper", **SMALL) as handle:
        for ends in (3, 6, 9, 12, 15):  # the window grows from block 0
            model(ar.noise(ends), kv_cache=cache, current_start=0)
        for first in (3, 6, 9, 12):
            model(ar.noise(15, seed=first), kv_cache=cache, current_start=first * ar.T)
    assert handle.stats()["dense"] == {
        "first chunk": 2, "several chunks without past frames (recache)": 8,
    }  # fmt: skip
    planned = lf.cag_schedule(21, 3, sparsity=0.88, base=0.98)
    assert [call["sparsity"] for call in calls[::2]] == list(planned[1:5])
    assert [call["q"].shape[1] // ar.T for call in calls[::2]] == [15] * 4
    assert [call["k"].shape[1] // ar.T for call in calls[::2]] == [18, 21, 21, 21]
    for call in calls:
        truth = masked_attention(call["q"], call["k"], call["v"], call["blocks"])
        assert (call["out"] - truth).abs().max() < 1e-4 * truth.abs().max()


def test_recache_after_a_prompt_switch(model):
    """One forward of many frames that sees nothing else: dense, and the video goes on."""
    model = ar.make(ar.Deferred, local_attn_size=12)
    cache = ar.new_cache(model, frames=30)
    with lf.patched(model, "fast", **SMALL) as handle:
        ar.rollout(model, 5, cache=cache)
        assert handle.stats()["dense"] == FIRST
        model(ar.noise(12), kv_cache=cache, current_start=3 * ar.T, sink_recache_after_switch=True)
        assert handle.stats()["dense"] == {
            "first chunk": 6, "several chunks without past frames (recache)": 2,
        }  # fmt: skip
        ar.rollout(model, 2, cache=cache, first=15)
        assert handle.stats()["sparse_calls"] == 24 + 12


def test_given_schedule_is_taken_as_given(calls, model):
    values = [0.0, 0.5, 0.25, 0.75]
    with lf.patched(model, schedule=values, **SMALL) as handle:
        ar.rollout(model, 6)
        assert [r["sparsity"] for r in handle.explain().rows] == values
    assert sparsities(calls) == [0.5, 0.25, 0.75, 0.75, 0.75]


def test_frame_tokens_from_argument_or_setting():
    class Told(ar.InPlace):
        def forward(self, x, frame_seqlen, kv_cache=None, current_start=0):
            grid = torch.tensor([[1, ar.HEIGHT, ar.WIDTH]])
            return super().forward(x, None, grid, None, None, kv_cache, current_start)

    layer = Told().eval().requires_grad_(False)
    cache = {"k": torch.zeros(1, 240, 2, 16), "v": torch.zeros(1, 240, 2, 16),
             "global_end": 0, "local_end": 0}  # fmt: skip
    with lf.patched(layer, "fast", **SMALL) as handle:
        for c in range(3):
            layer(ar.noise(3), ar.T, kv_cache=cache, current_start=c * 60)
        assert handle.stats()["sparse_calls"] == 2
        layer(ar.noise(3), None, kv_cache=cache, current_start=180)
        (reason,) = set(handle.stats()["dense"]) - {"first chunk"}
        assert reason.startswith("unknown frame size")
        lf.patch(layer, "fast", frame_tokens=20, **SMALL)
        layer(ar.noise(3), None, kv_cache=cache, current_start=180)
        assert handle.stats()["sparse_calls"] == 1


def test_frame_tokens_that_the_model_contradicts(model, caplog):
    """Another number than the grid's is no frame size to go by: dense, said, strict raises."""
    reason = "frame_tokens that the model contradicts (set 21, told 20)"
    dense = ar.rollout(model, 3)
    with lf.patched(model, "fast", frame_tokens=21, **SMALL) as handle:
        with caplog.at_level(logging.WARNING):
            assert torch.equal(ar.rollout(model, 3), dense)
        assert handle.stats()["dense"] == {reason: 18}
        assert [reason in r.getMessage() for r in caplog.records] == [True]
        lf.patch(model, "fast", frame_tokens=21, strict=True, **SMALL)
        with pytest.raises(lf.StrictError, match="set 21, told 20"):
            ar.rollout(model, 1)
        lf.patch(model, "fast", frame_tokens=20, strict=True, **SMALL)
        ar.rollout(model, 3)
        assert handle.stats()["sparse_calls"] == 12


@pytest.mark.parametrize(
    "arguments, tokens",
    [
        ({"grid_sizes": torch.tensor([[3, 4, 5], [3, 4, 5]])}, 20),
        ({"grid_sizes": [(3, 4, 5)], "frame_seqlen": 7}, 20),
        ({"grid_sizes": torch.tensor([3, 4, 5]), "frame_seqlen": 20}, 20),
        ({"grid_sizes": (3, 4, 5)}, None),
        ({"grid_sizes": None, "frame_seqlen": torch.tensor(20)}, None),
        ({}, None),
    ],
)
def test_the_default_adapter_reads_what_is_told(arguments, tokens):
    from lightforcing.adapters import GlobalAttention

    layer = ar.InPlace(local_attn_size=6)
    call = GlobalAttention().context(layer, {"kv_cache": {}, "current_start": 60, **arguments})
    assert (call.start, call.frame_tokens, call.window, call.keys) == (60, tokens, 6, None)
    assert GlobalAttention().context(layer, {"kv_cache": None}) == "training forward"


# ---- reasons to stay dense ---------------------------------------------------------------


def test_dense_layers_and_steps(model):
    model = ar.make(layers=4)
    dense = ar.rollout(model)
    with lf.patched(model, "fast", dense_layers=(0, -1), dense_steps=(0, 2), **SMALL) as handle:
        ar.rollout(model)
        stats = handle.stats()
        assert stats["dense"] == {"dense layer": 30, "dense step": 20, "first chunk": 2}
        assert stats["sparse_calls"] == 8
        by_layer = {
            x["layer"]: sum(c["sparse_calls"] for c in x["chunks"]) for x in stats["layers"]
        }
        assert by_layer == {0: 0, 1: 4, 2: 4, 3: 0}
        lf.patch(model, "fast", dense_steps=(0, 1, 2), **SMALL)
        assert torch.equal(ar.rollout(model), dense)


def test_steps_are_counted_by_cache(model):
    """Guidance: two caches, the same positions, taken in turn."""
    caches = ar.new_cache(model), ar.new_cache(model)
    with lf.patched(model, "fast", dense_steps=(0,), **SMALL) as handle:
        for c in range(3):
            for _ in range(3):
                for cache in caches:
                    model(ar.noise(3), kv_cache=cache, current_start=c * 60)
        assert handle.stats()["dense"] == {"dense step": 12, "first chunk": 8}
        assert handle.stats()["sparse_calls"] == 16


def test_reset_starts_steps_and_counts_anew(model):
    cache = ar.new_cache(model)
    with lf.patched(model, "fast", dense_steps=(0,), **SMALL) as handle:
        ar.rollout(model, 2, cache=cache)
        handle.reset()
        assert handle.stats()["calls"] == 0 and handle.means_bytes == 0
        model(ar.noise(3), kv_cache=cache, current_start=60)
        assert handle.stats()["dense"] == {"dense step": 2}


def test_disable_variable_is_read_at_call_time(model, monkeypatch):
    dense = ar.rollout(model)
    with lf.patched(model, "fast", **SMALL) as handle:
        monkeypatch.setenv("LIGHTFORCING_DISABLE", "1")
        assert torch.equal(ar.rollout(model), dense)
        assert handle.stats()["dense"] == {"LIGHTFORCING_DISABLE=1": 30}
        monkeypatch.setenv("LIGHTFORCING_DISABLE", "0")
        ar.rollout(model)
        assert handle.stats()["sparse_calls"] == 24


@pytest.mark.parametrize("cached", [False, True])
def test_training_forwards_are_untouched(cached):
    model, reference = ar.make().requires_grad_(True), ar.make().requires_grad_(True)

    def loss(m):
        if not cached:
            return m(ar.noise(3)).square().mean()
        cache = ar.new_cache(m)
        with torch.no_grad():
            ar.rollout(reference, 2, cache=cache)
        return m(ar.noise(3), kv_cache=cache, current_start=120).square().mean()

    with lf.patched(model, "fast", strict=True, **SMALL) as handle:
        ours, theirs = loss(model), loss(reference)
        assert torch.equal(ours, theirs)
        ours.backward(), theirs.backward()
        for p, r in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(p.grad, r.grad)
        assert handle.stats()["dense"] == {"training forward": 2}
        assert handle.stats()["calls"] == (2 if cached else 0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
def test_forward_mode_derivatives_are_those_of_dense_calls(model):
    """A tangent passes a patched layer, as in training; an open level alone changes nothing."""
    reference, ahead = ar.make(), torch.autograd.forward_ad
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # has tangents

    def tangent(m):
        cache = ar.new_cache(m)
        with torch.no_grad():
            ar.rollout(reference, 2, cache=cache)
            x = ar.noise(3)
            x = ahead.make_dual(x, torch.ones_like(x))
            return ahead.unpack_dual(m(x, kv_cache=cache, current_start=120)).tangent

    with lf.patched(model, "fast", strict=True, **SMALL) as handle, ahead.dual_level(), math:
        ours, theirs = tangent(model), tangent(reference)
        assert ours is not None and torch.equal(ours, theirs)
        assert handle.stats()["dense"] == {"training forward": 2}
        before = handle.stats()["sparse_calls"]
        ar.rollout(model)
        assert handle.stats()["sparse_calls"] == before + 24


def test_frozen_model_with_grad_enabled_runs_sparse(model):
    assert torch.is_grad_enabled()
    with lf.patched(model, "fast", **SMALL) as handle:
        ar.rollout(model)
        assert handle.stats()["sparse_calls"] == 24


def test_low_sparsity_keeps_whole_chunks_dense(model):
    with lf.patched(model, "paper", sparsity=0.30, base=0.95, **SMALL) as handle:
        ar.rollout(model, 5)
        # chunk 2 of this schedule is clipped to 0 by the solver
        assert handle.stats()["dense"] == {"first chunk": 6, "sparsity 0": 6}
        lf.patch(model, sparsity=0.01, law="constant", **SMALL)
        ar.rollout(model, 5)
        # one percent of 12 to 30 blocks is less than one block
        assert handle.stats()["dense"] == {"first chunk": 6}
        lf.patch(model, schedule=[0, 1e-12], **SMALL)
        ar.rollout(model, 3)
        assert handle.stats()["dense"] == {"all blocks kept": 12, "first chunk": 6}


class Odd(ar.InPlace):
    """Makes its attention call with whatever ``change`` makes of (q, k, v)."""

    change = staticmethod(lambda q, k, v: ((q, k, v), {}))

    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0,
                cache_start=None):  # fmt: skip
        q, k, v = self.qkv(x)
        past = torch.zeros(1, 60, 2, k.shape[3], dtype=k.dtype)
        args, kwargs = type(self).change(q, torch.cat([past, k], 1), torch.cat([past, v], 1))
        return self.o(attention(*args, **kwargs).flatten(2).to(x.dtype))


# `Odd.forward` looks the name up here: this file is a second "causal model file".
attention = ar.attention


def odd(change, dtype=torch.float32, sizes=None):
    Odd.change = staticmethod(change)
    return ar.make(Odd, dtype=dtype, layers=1, **(sizes or {}))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda q, k, v: ((q, k, v), {"causal": True}), "extra argument causal=True"),
        (lambda q, k, v: ((q, k, v, None, True), {}), "extra argument causal=True"),
        (lambda q, k, v: ((q, k, v), {"softmax_scale": 0.1}), "extra argument softmax_scale=0.1"),
        (lambda q, k, v: ((q, k, v), {"q_lens": torch.ones(1)}), "extra argument q_lens"),
        (lambda q, k, v: ((q.double(), k.double(), v.double()), {}), "dtype torch.float64"),
        (lambda q, k, v: ((q, k, v.double().float()[..., :8]), {}),
         "shapes q [1, 60, 2, 16], k [1, 120, 2, 16], v [1, 120, 2, 8]"),
        (lambda q, k, v: ((q[..., :12], k[..., :12], v[..., :12]), {}), "head size 12"),
        (lambda q, k, v: ((q[:, :59], k, v), {}),
         "59 query and 120 key tokens that are not whole frames of 20"),
        (lambda q, k, v: ((q, k[:, :50], v[:, :50]), {}),
         "60 query and 50 key tokens that are not whole frames of 20"),
        (lambda q, k, v: ((q, k[:, :40], v[:, :40]), {}), "fewer keys (40) than queries (60)"),
        (lambda q, k, v: ((q, k.transpose(2, 3).contiguous().transpose(2, 3), v), {}),
         "a last stride other than 1"),
        (lambda q, k, v: ((torch.nn.Parameter(q, False), k, v), {}), "q of type Parameter"),
    ],
)  # fmt: skip
def test_unplanned_reasons(change, reason, caplog):
    """Dense through the original, said once in the log; an error in strict mode."""
    model = odd(change)
    model.blocks[0].self_attn.o = torch.nn.Identity()
    layer = model.blocks[0].self_attn
    grid = torch.tensor([[3, 4, 5]])
    call = lambda: layer(ar.noise(3), None, grid, None, None, {}, 60)  # noqa: E731
    dense = call()
    with lf.patched(model, "fast", **SMALL) as handle, caplog.at_level(logging.WARNING):
        assert torch.equal(call(), dense) and torch.equal(call(), dense)
        assert handle.stats()["dense"] == {reason: 2}
        lines = [r.getMessage() for r in caplog.records if r.name == "lightforcing"]
        assert len(lines) == 1 and f"dense because of {reason}" in lines[0]
        lf.patch(model, "fast", strict=True, **SMALL)
        with pytest.raises(lf.StrictError) as failure:
            call()
        assert reason in str(failure.value) and str(failure.value).startswith("layer 0")
        assert hook.local.visit is None


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: ((q, k, v), {"causal": False}),
        lambda q, k, v: ((q, k, v, None), {"softmax_scale": None, "dtype": torch.bfloat16}),
        lambda q, k, v: ((), {"q": q, "k": k, "v": v}),
        lambda q, k, v: ((q,), {"v": v, "k": k}),
    ],
)
def test_defaults_and_keywords_run_sparse(change):
    model = odd(change)
    with lf.patched(model, "fast", strict=True, **SMALL) as handle:
        model(ar.noise(3), kv_cache=[{}], current_start=60)
        assert handle.stats()["sparse_calls"] == 1


def test_strict_accepts_what_was_asked_for(model, monkeypatch):
    settings = {"strict": True, "dense_layers": [0], "dense_steps": [1], **SMALL}
    with lf.patched(model, "fast", **settings) as handle:
        ar.rollout(model)
        with lf.dense():
            ar.rollout(model)
        monkeypatch.setenv("LIGHTFORCING_DISABLE", "1")
        ar.rollout(model)
        assert handle.stats()["calls"] == 90


def test_strict_for_an_unknown_position():
    model = odd(lambda q, k, v: ((q, k, v), {}))
    with lf.patched(model, "fast", strict=True, **SMALL):
        with pytest.raises(lf.StrictError, match="current_start that is not an integer"):
            model(ar.noise(3), kv_cache=[{}], current_start=0.0)


def test_a_forward_that_makes_no_call_is_noted(caplog):
    """Recomputation through another kernel, with the cache."""

    class Recompute(ar.InPlace):
        def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None,
                    current_start=0, cache_start=None):  # fmt: skip
            if x.shape[1] > 3 * ar.T:
                return self.o(x)
            return super().forward(x, seq_lens, grid_sizes, freqs, block_mask, kv_cache,
                                   current_start)  # fmt: skip

    model = ar.make(Recompute)
    cache = ar.new_cache(model)
    with lf.patched(model, "fast", dense_steps=(0,), **SMALL) as handle:
        ar.rollout(model, 3, cache=cache)
        with caplog.at_level(logging.WARNING):
            model(ar.noise(9), kv_cache=cache, current_start=0)
        stats = handle.stats()
        assert stats["dense"]["forward with a cache but no attention call"] == 2
        assert stats["calls"] == 18 and len(caplog.records) == 1
        ar.rollout(model, 1, cache=cache, first=6)  # steps count from 0 again
        assert handle.stats()["dense"]["dense step"] == 8  # of the first chunk too
        lf.patch(model, "fast", strict=True, **SMALL)
        with lf.dense():
            model(ar.noise(9), kv_cache=cache, current_start=0)
        with pytest.raises(lf.StrictError, match="layer 0: forward with a cache but no attention"):
            model(ar.noise(9), kv_cache=cache, current_start=0)
        assert hook.local.visit is None


def test_layers_that_ask_for_other_heads(calls):
    """Head groups in two calls of one forward: fewer heads than num_heads, other lengths."""

    class Groups(ar.InPlace):
        def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None,
                    current_start=0, cache_start=None):  # fmt: skip
            q, k, v = self.qkv(x)
            past = torch.zeros_like(k)
            a = attention(q[:, :, :1], torch.cat([past, past, k], 1)[:, :, :1],
                          torch.cat([past, past, v], 1)[:, :, :1])  # fmt: skip
            b = attention(q[:, :, 1:], torch.cat([past, k], 1)[:, :, 1:],
                          torch.cat([past, v], 1)[:, :, 1:])  # fmt: skip
            return self.o(torch.cat([a, b], 2).flatten(2))

    model = ar.make(Groups, layers=1)
    with lf.patched(model, "fast", **SMALL) as handle:
        model(ar.noise(3), kv_cache=[{}], current_start=120)
    assert handle.stats()["sparse_calls"] == 2
    for call in calls:
        truth = masked_attention(call["q"], call["k"], call["v"], call["blocks"])
        assert (call["out"] - truth).abs().max() < 1e-4 * truth.abs().max()
