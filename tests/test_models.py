"""The causal Wan: its sizes, rotary positions, cache and forward.

The cached forward is held against the one-pass forward with a mask, one chunk against the published
arithmetic written out, and the cache against a list of frames.
"""

import dataclasses
import itertools
import math
import re

import pytest
import torch
from small_wan import (
    BLIND,
    HEIGHT,
    SMALL,
    WIDTH,
    build,
    closeness,
    draw,
    one_thread,  # noqa: F401
    straight,
    text_for,
)  # noqa: F401

from lightforcing.models import CausalWan, WanConfig
from lightforcing.models.cache import write_chunk
from lightforcing.models.rope import apply_rope, axis_pairs, rope_table
from lightforcing.models.wan import visible_frames

# ---- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, tensors, weights",
    [("1.3B", 825, 1_418_996_800), ("14B", 1095, 14_288_491_584), ("5B", 825, 4_999_787_712)],
)
def test_named_sizes_have_the_published_weights(name, tensors, weights):
    with torch.device("meta"):
        state = CausalWan(WanConfig.named(name), seed=None).state_dict()
    assert len(state) == tensors
    assert sum(x.numel() for x in state.values()) == weights


def test_state_dict_keys_are_those_of_wan():
    names = """patch_embedding.weight patch_embedding.bias text_embedding.0.weight
    text_embedding.0.bias text_embedding.2.weight text_embedding.2.bias time_embedding.0.weight
    time_embedding.0.bias time_embedding.2.weight time_embedding.2.bias time_projection.1.weight
    time_projection.1.bias head.head.weight head.head.bias head.modulation""".split()
    for n in range(SMALL.num_layers):
        layer = ["modulation", "norm3.weight", "norm3.bias"]
        layer += [f"ffn.{i}.{w}" for i in (0, 2) for w in ("weight", "bias")]
        for attention in ("self_attn", "cross_attn"):
            layer += [f"{attention}.{p}.{w}" for p in "qkvo" for w in ("weight", "bias")]
            layer += [f"{attention}.norm_{p}.weight" for p in "qk"]
        names += [f"blocks.{n}.{name}" for name in layer]
    state = build().state_dict()
    assert set(state) == set(names)
    assert state["blocks.0.modulation"].shape == (1, 6, SMALL.dim)
    assert state["head.modulation"].shape == (1, 2, SMALL.dim)
    assert state["blocks.0.self_attn.norm_q.weight"].shape == (SMALL.dim,)
    without = {n for n in names if not re.search(r"cross_attn|norm3|text_embedding", n)}
    assert set(build(BLIND).state_dict()) == without


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dim=50, num_heads=3), "dim: expected a multiple of num_heads = 3, got 50"),
        (
            dict(dim=20, num_heads=4),
            "dim: expected an even head size dim / num_heads of at least 6, for rotary pairs of "
            "time, rows and columns, got 20 / 4 = 5",
        ),
        (
            dict(dim=16, num_heads=4),
            "dim: expected an even head size dim / num_heads of at least 6, for rotary pairs of "
            "time, rows and columns, got 16 / 4 = 4",
        ),
        (dict(num_layers=0), "num_layers: expected a positive integer, got 0"),
        (dict(ffn_dim=2.5), "ffn_dim: expected a positive integer, got 2.5"),
        (dict(freq_dim=33), "freq_dim: expected an even number, got 33"),
        (dict(sink_frames=-1), "sink_frames: expected at least 0, got -1"),
        (dict(sink_frames=1), "sink_frames: a sink needs window_frames, got None"),
        (
            dict(window_frames=4, sink_frames=2),
            "window_frames: expected at least sink_frames + frames_per_chunk = 5, got 4",
        ),
    ],
)
def test_config_rejects_in_words(changes, message):
    with pytest.raises(ValueError) as failure:
        dataclasses.replace(SMALL, **changes)
    assert str(failure.value) == message


def test_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError) as failure:
        WanConfig.named("2B")
    assert str(failure.value) == "name: expected one of 1.3B, 14B, 5B, tiny, got '2B'"


# ---- rotary positions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head_dim, pairs", [(128, (22, 21, 21)), (64, (12, 10, 10)), (24, (4, 4, 4)), (6, (1, 1, 1))]
)
def test_rotation_of_each_pair(head_dim, pairs):
    assert axis_pairs(head_dim) == pairs
    frames, height, width = [700, 701, 3], 2, 3
    x = draw(1, 18, 2, head_dim)
    out = apply_rope(x, rope_table(torch.tensor(frames), height, width, head_dim))
    for token, (f, r, c) in enumerate(itertools.product(frames, range(height), range(width))):
        angles = [
            position * 10000 ** (-j / n)
            for position, n in zip((f, r, c), pairs, strict=True)
            for j in range(n)
        ]
        for i, angle in enumerate(angles):
            a, b = x[0, token, :, 2 * i], x[0, token, :, 2 * i + 1]
            want = (
                a * math.cos(angle) - b * math.sin(angle),
                a * math.sin(angle) + b * math.cos(angle),
            )
            got = (out[0, token, :, 2 * i], out[0, token, :, 2 * i + 1])
            for mine, exact in zip(got, want, strict=True):
                assert (mine - exact).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotation_is_rounded_once(dtype):
    x = draw(1, 40, 2, 64, dtype=dtype)
    table = rope_table(torch.arange(1000, 1010), 2, 2, 64)
    exact = apply_rope(x.double(), table)
    out = apply_rope(x, table)
    assert out.dtype == dtype
    # Half an ulp of the result, and the rounding of the pair's products in float32.
    ulp = torch.finfo(dtype).eps
    size = torch.view_as_complex(exact.unflatten(-1, (-1, 2))).abs().repeat_interleave(2, -1)
    assert ((out.double() - exact).abs() <= 0.5 * ulp * exact.abs() + 2.0**-21 * size).all()


def test_head_dim_without_pairs_for_all_axes_is_rejected():
    for head_dim in (4, 7):
        with pytest.raises(ValueError, match="head_dim: expected an even number of at least 6"):
            axis_pairs(head_dim)


# ---- cache -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window, sink", [(None, 0), (3, 0), (5, 2), (4, 1), (7, 3)])
@pytest.mark.parametrize("sizes", [(3,) * 6, (1,) * 9, (1, 3, 3, 3, 3), (2, 1, 2, 2, 1, 1, 2)])
def test_cache_holds_sink_then_newest_frames(window, sink, sizes):
    if window is not None:
        assert window - sink >= max(sizes)
    tokens, total = 2, sum(sizes)
    layer = {n: torch.full((1, (window or total) * tokens, 1, 1), -1.0) for n in "kv"}
    layer |= {"global_end_index": 0, "local_end_index": 0}
    start = 0
    for size in sizes:
        frames = list(range(start + size))
        if window is not None:
            frames = [f for f in frames if f < sink or f >= start + size - (window - sink)]
        for attempt in (0.25, 0.5):  # a chunk that is written again replaces itself
            rows = torch.arange(start, start + size).repeat_interleave(tokens).view(1, -1, 1, 1)
            end = write_chunk(
                layer,
                rows + attempt,
                -rows - attempt,
                start * tokens,
                sink * tokens,
                window is not None,
            )
            want = torch.tensor(frames).repeat_interleave(tokens) + 0.5
            want[len(want) - size * tokens :] += attempt - 0.5
            assert layer["k"][0, :end, 0, 0].tolist() == want.tolist()
            assert layer["v"][0, :end, 0, 0].tolist() == (-want).tolist()
        start += size
        assert layer["global_end_index"] == start * tokens


def test_cache_goes_back_to_an_earlier_chunk():
    model = build(BLIND)
    x = draw(1, 16, 9, HEIGHT, WIDTH)
    cache = model.new_cache(9, HEIGHT, WIDTH)
    for start in (0, 3, 6):
        last = model(x[:, :, start : start + 3], 0, cache=cache, start_frame=start)
    for start in (3, 6):
        again = model(x[:, :, start : start + 3], 0, cache=cache, start_frame=start)
    assert torch.equal(again, last)
    assert cache.frames == 9


@pytest.mark.parametrize(
    "changes, frames, start, message",
    [
        ({}, 3, 6, "start_frame: the chunk begins at token 72, but the cache holds tokens up to 36 "
         "and 36 of them are resident"),
        ({}, 7, 3, "cache: holds 108 tokens and the chunk ends at 120; make a longer cache or set "
         "window_frames"),
        (dict(window_frames=5, sink_frames=2), 4, 3, "window_frames: 60 tokens do not hold a sink "
         "of 24 and a chunk of 48"),
        ({}, 3, -1, "start_frame: expected at least 0, got -1"),
    ],
)  # fmt: skip
def test_cache_rejects_in_words(changes, frames, start, message):
    model = build(BLIND, **changes)
    cache = model.new_cache(9, HEIGHT, WIDTH)
    model(draw(1, 16, 3, HEIGHT, WIDTH), 0, cache=cache)
    with pytest.raises(ValueError) as failure:
        model(draw(1, 16, frames, HEIGHT, WIDTH), 0, cache=cache, start_frame=start)
    assert str(failure.value) == message


def test_a_rolled_cache_does_not_go_back_behind_the_gap():
    model = build(BLIND, window_frames=7, sink_frames=3)
    cache = model.new_cache(12, HEIGHT, WIDTH)
    x = draw(1, 16, 3, HEIGHT, WIDTH)
    for start in (0, 3, 6, 9):
        model(x, 0, cache=cache, start_frame=start)
    # Resident are 0, 1, 2 and 8 to 11: frames 6 to 8 would be written over the sink.
    with pytest.raises(ValueError, match="start_frame: the chunk begins at token 72"):
        model(x, 0, cache=cache, start_frame=6)
    model(x, 0, cache=cache, start_frame=9)


@pytest.mark.parametrize(
    "size, message",
    [
        (dict(num_frames=0), "num_frames: expected at least 1, got 0"),
        (dict(batch=0), "batch: expected at least 1, got 0"),
        (dict(height=5), "height: expected a positive multiple of 2, got 5"),
        (dict(width=0), "width: expected a positive multiple of 2, got 0"),
    ],
)
def test_new_cache_rejects_in_words(size, message):
    with pytest.raises(ValueError) as failure:
        build(BLIND).new_cache(**(dict(num_frames=3, height=6, width=8) | size))
    assert str(failure.value) == message


# ---- forward -----------------------------------------------------------------------------------

LOOKS_BACK = [
    (dict(), (3, 6, 9)),
    (dict(), (1, 4, 7)),
    (dict(frames_per_chunk=1), (1, 2, 3, 4)),
    (dict(window_frames=5), (3, 6, 9, 12)),
    (dict(window_frames=4, sink_frames=1), (3, 6, 9, 12)),
    (dict(window_frames=7, sink_frames=3), (1, 4, 7, 10, 13)),
]


@pytest.mark.parametrize("changes, ends", LOOKS_BACK)
@pytest.mark.parametrize("config", [SMALL, BLIND], ids=["text", "no text"])
def test_cached_chunks_equal_one_pass(config, changes, ends):
    model = build(config, **changes)
    batch, frames = 2, ends[-1]
    x, text = draw(batch, 16, frames, HEIGHT, WIDTH), text_for(model, batch)
    t = draw(batch, frames, seed=1).abs() * 400
    whole = model.forward_full(x, t, text, chunk_ends=ends)
    cache = model.new_cache(frames, HEIGHT, WIDTH, batch=batch)
    for start, end in zip((0, *ends), ends, strict=False):
        part = model(x[:, :, start:end], t[:, start:end], text, cache=cache, start_frame=start)
        assert closeness(part, whole[:, :, start:end]) < 1e-12


@pytest.mark.parametrize("changes, ends", LOOKS_BACK)
def test_noisy_chunks_after_clean_ones_equal_teacher_forcing(changes, ends):
    model = build(**changes)
    x, clean = (draw(1, 16, ends[-1], HEIGHT, WIDTH, seed=s) for s in (1, 2))
    text = text_for(model)
    whole = model.forward_full(x, 625.0, text, chunk_ends=ends, clean=clean)
    cache = model.new_cache(ends[-1], HEIGHT, WIDTH)
    for start, end in zip((0, *ends), ends, strict=False):
        part = model(x[:, :, start:end], 625.0, text, cache=cache, start_frame=start)
        assert closeness(part, whole[:, :, start:end]) < 1e-12
        model(clean[:, :, start:end], 0, text, cache=cache, start_frame=start)


def test_forward_is_the_published_arithmetic():
    model = build()
    state = {
        name: draw(*v.shape, seed=i) * 0.3 for i, (name, v) in enumerate(model.state_dict().items())
    }
    model.load_state_dict(state)
    x, text = draw(1, 16, 2, HEIGHT, WIDTH), text_for(model)
    out = model(x, 625.0, text, cache=model.new_cache(2, HEIGHT, WIDTH))
    assert closeness(out[0], straight(state, model.config, x[0], 625.0, text[0])) < 1e-11


def test_visible_frames_by_hand():
    def show(*args, **kwargs):
        return ["".join(".x"[v] for v in row) for row in visible_frames(*args, **kwargs).tolist()]

    assert show(5, [1, 3, 5]) == ["x....", "xxx..", "xxx..", "xxxxx", "xxxxx"]
    assert show(5, [1, 3, 5], 3, 1) == ["x....", "xxx..", "xxx..", "x..xx", "x..xx"]
    assert show(5, [1, 3, 5], 3) == ["x....", "xxx..", "xxx..", "..xxx", "..xxx"]
    teacher = show(3, [1, 3], None, 0, True)
    assert teacher == ["x.....", "xxx...", "xxx...", "...x..", "x...xx", "x...xx"]


@pytest.mark.parametrize("ends", [(), (3,), (3, 3, 6), (0, 6), (4, 2, 6), (3, 6, 9)])
def test_visible_frames_rejects_other_ends(ends):
    with pytest.raises(ValueError, match="chunk_ends: expected ascending frames up to 6"):
        visible_frames(6, ends)


def test_every_input_matters():
    model = build()
    x, text = draw(1, 16, 3, HEIGHT, WIDTH), text_for(model)

    def run(x=x, t=500.0, text=text, first=x):
        cache = model.new_cache(6, HEIGHT, WIDTH)
        model(first, 0, text, cache=cache)
        return model(x, t, text, cache=cache, start_frame=3)

    base = run()
    assert 0.1 < base.std() < 10
    for other in (run(x=x.flip(2)), run(t=400.0), run(text=text.flip(1) * 2), run(first=x.flip(3))):
        assert closeness(other, base) > 1e-3


def test_timestep_forms_agree():
    model = build(BLIND)
    x = draw(2, 16, 3, HEIGHT, WIDTH)
    forms = [625.0, torch.tensor([625.0, 625.0]), torch.full((2, 3), 625.0)]
    outs = [model(x, t, cache=model.new_cache(3, HEIGHT, WIDTH, batch=2)) for t in forms]
    assert all(closeness(out, outs[0]) < 1e-12 for out in outs)


def test_text_is_read_once_and_padded_with_zeros():
    model = build()
    x, text = draw(1, 16, 3, HEIGHT, WIDTH), text_for(model)
    cache = model.new_cache(3, HEIGHT, WIDTH)
    first = model(x, 0, text, cache=cache)
    assert torch.equal(model(x, 0, None, cache=cache), first)
    assert torch.equal(model(x, 0, -text, cache=cache), first)
    cache.forget_text()
    assert closeness(model(x, 0, -text, cache=cache), first) > 1e-3
    cache.reset()
    padded = torch.cat([text, torch.zeros(1, 4, SMALL.text_dim)], dim=1)
    assert torch.equal(model(x, 0, padded, cache=cache), first)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(x=(1, 8, 3, 6, 8)), "x: expected [B, 16, F, height, width], got [1, 8, 3, 6, 8]"),
        (dict(x=(16, 3, 6, 8)), "x: expected [B, 16, F, height, width], got [16, 3, 6, 8]"),
        (dict(x=(1, 16, 3, 6, 7)), "width: expected a positive multiple of 2, got 7"),
        (
            dict(x=(1, 16, 3, 8, 8)),
            "cache: made for 1 x 12 tokens a frame, but x has 1 x 16",
        ),
        (dict(x=(2, 16, 3, 6, 8)), "cache: made for 1 x 12 tokens a frame, but x has 2 x 12"),
        (dict(t=torch.zeros(2)), "t: expected a number, [1] or [1, 3], got [2]"),
        (
            dict(context=None),
            "context: expected text embeddings [1, up to 9, 20], got None",
        ),
        (
            dict(context=torch.zeros(1, 10, 20)),
            "context: expected text embeddings [1, up to 9, 20], got [1, 10, 20]",
        ),
        (
            dict(context=torch.zeros(1, 5, 21)),
            "context: expected text embeddings [1, up to 9, 20], got [1, 5, 21]",
        ),
    ],
)
def test_forward_rejects_in_words(arguments, message):
    model = build()
    arguments = dict(x=(1, 16, 3, 6, 8), t=0, context=text_for(model)) | arguments
    x = torch.zeros(arguments.pop("x"), dtype=torch.float64)
    with pytest.raises(ValueError) as failure:
        model(x, **arguments, cache=model.new_cache(3, HEIGHT, WIDTH))
    assert str(failure.value) == message


def test_text_for_a_model_without_cross_attention_is_rejected():
    model = build(BLIND)
    cache = model.new_cache(3, HEIGHT, WIDTH)
    with pytest.raises(ValueError) as failure:
        model(draw(1, 16, 3, HEIGHT, WIDTH), 0, torch.zeros(1, 5, 20), cache=cache)
    assert str(failure.value) == "context: the model has no cross-attention, expected None"


def test_seed_decides_the_weights():
    one, same, other = (CausalWan(BLIND, seed=s).state_dict() for s in (5, 5, 6))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.head.weight"], other["head.head.weight"])
