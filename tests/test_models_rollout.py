"""The few-step rollout: against a loop without any cache, and under the patch."""

import dataclasses
import itertools

import pytest
import torch
from small_wan import BLIND, HEIGHT, WIDTH, build, closeness, draw, one_thread, text_for  # noqa: F401

import lightforcing as lf
from lightforcing.models import CausalWan, FlowSchedule, Rollout, WanConfig


def test_timesteps_and_noise_levels_of_self_forcing():
    rollout = Rollout(build(BLIND))
    assert rollout.timesteps == pytest.approx([1000, 937.5, 2500 / 3, 625], rel=1e-7)
    assert rollout.sigmas == pytest.approx([1, 0.9375, 5 / 6, 0.625], rel=1e-7)
    plain = Rollout(build(BLIND), steps=(1000, 757, 522), shift=8.0, warp=False)
    assert plain.timesteps == [1000, 757, 522]
    # The grid is finer than one timestep in sigma at these places, so the nearest point is near.
    assert plain.sigmas == pytest.approx([1, 0.757, 0.522], abs=2e-3)
    grid = FlowSchedule(5.0)
    assert grid.timesteps.dtype == torch.float32
    assert [grid.sigma(float(t)) for t in grid.timesteps[::97]] == grid.sigmas[::97].tolist()


@pytest.mark.parametrize(
    "changes, lone, frames",
    [({}, False, 9), ({}, True, 7), (dict(window_frames=4, sink_frames=1), False, 9)],
)
def test_rollout_equals_a_loop_without_a_cache(changes, lone, frames):
    model = build(**changes)
    text, noise = text_for(model), draw(1, frames, 16, HEIGHT, WIDTH, seed=4)
    rollout = Rollout(model, lone_first_frame=lone)
    video = rollout.generate(noise=noise, context=text, seed=11)
    generator = torch.Generator().manual_seed(11)
    ends = [1, 4, 7] if lone else [3, 6, 9]
    levels = [(1000.0, 1.0), (937.5, 0.9375), (2500 / 3, 5 / 6), (625.0, 0.625)]
    done = torch.zeros(1, 16, 0, HEIGHT, WIDTH, dtype=torch.float64)
    for i, end in enumerate(ends):
        start = done.shape[2]
        x0 = x = noise[:, start:end].transpose(1, 2)
        for step, (t, sigma) in enumerate(levels):
            if step:
                shape = (1, end - start, 16, HEIGHT, WIDTH)
                eps = torch.randn(shape, generator=generator, dtype=torch.float64).transpose(1, 2)
                x = (1 - sigma) * x0 + sigma * eps
            clean, noisy = (torch.cat([done, part], dim=2) for part in (torch.zeros_like(x), x))
            v = model.forward_full(noisy, t, text, chunk_ends=ends[: i + 1], clean=clean)
            x0 = x - sigma * v[:, :, start:]
        done = torch.cat([done, x0], dim=2)
    # Timesteps and noise levels are float32 values in the rollout.
    assert closeness(video.latents, done.transpose(1, 2)) < 1e-5


def test_stream_yields_chunks_in_order_and_counts_forwards():
    calls = []
    rollout = Rollout(build(BLIND), lone_first_frame=True)
    chunks = list(
        rollout.stream(7, size=(HEIGHT, WIDTH), batch=2, progress=lambda *c: calls.append(c))
    )
    assert [(c.index, c.start_frame, c.latents.shape[1]) for c in chunks] == [
        (0, 0, 1),
        (1, 1, 3),
        (2, 4, 3),
    ]
    assert calls == [(c, f) for c in range(3) for f in range(rollout.forwards_per_chunk)]
    assert all(c.latents.shape[0] == 2 and c.latents.isfinite().all() for c in chunks)
    assert all(c.seconds > 0 for c in chunks)
    video = rollout.generate(7, size=(HEIGHT, WIDTH), batch=2)
    assert torch.equal(video.latents, torch.cat([c.latents for c in chunks], dim=1))
    assert video.seconds == sum(c.seconds for c in video.chunks)


def test_a_longer_video_begins_with_the_shorter_one():
    rollout = Rollout(build(BLIND))
    short, long = (rollout.generate(n, size=(HEIGHT, WIDTH), seed=2).latents for n in (3, 6))
    assert torch.equal(long[:, :3], short)
    other = rollout.generate(3, size=(HEIGHT, WIDTH), seed=3).latents
    assert closeness(other, short) > 0.1


def test_a_window_streams_without_end_in_constant_memory():
    model = build(BLIND, window_frames=6, sink_frames=1)
    cache = model.new_cache(6, HEIGHT, WIDTH)
    size = cache.nbytes
    stream = Rollout(model).stream(size=(HEIGHT, WIDTH), cache=cache)
    chunks = list(itertools.islice(stream, 5))
    assert chunks[-1].start_frame == 12
    assert cache.nbytes == size and cache.frames == 6


def test_a_cache_is_used_again_without_a_trace():
    model = build()
    text, cache = text_for(model), model.new_cache(6, HEIGHT, WIDTH)
    fresh = Rollout(model).generate(6, size=(HEIGHT, WIDTH), context=-text).latents
    Rollout(model).generate(6, size=(HEIGHT, WIDTH), context=text, cache=cache, seed=8)
    again = Rollout(model).generate(6, size=(HEIGHT, WIDTH), context=-text, cache=cache).latents
    assert torch.equal(again, fresh)


def test_bfloat16_stays_bfloat16():
    model = CausalWan(BLIND, dtype=torch.bfloat16)
    half = Rollout(model).generate(6, size=(HEIGHT, WIDTH)).latents
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


@pytest.mark.parametrize(
    "make, message",
    [
        (dict(steps=()), "steps: expected falling numbers, got []"),
        (dict(steps=(500, 750)), "steps: expected falling numbers, got [500, 750]"),
        (dict(steps=(1000, 0.5)), "steps: expected integers in 1 .. 1000 to warp, got 0.5"),
        (dict(shift=0), "shift: expected a positive number, got 0"),
        (dict(frames_per_chunk=5), "frames_per_chunk: expected 1 .. 4, got 5"),
    ],
)
def test_rollout_rejects_in_words(make, message):
    with pytest.raises(ValueError) as failure:
        Rollout(build(BLIND, window_frames=5, sink_frames=1), **make)
    assert str(failure.value) == message


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_frames=7), "num_frames: expected 3 plus a multiple of 3, got 7"),
        (dict(), "num_frames: a video without end needs window_frames, got None"),
        (
            dict(noise=torch.zeros(1, 3, 4, 6, 8)),
            "noise: expected [B, F, 16, height, width], got [1, 3, 4, 6, 8]",
        ),
        (dict(num_frames=3, size=(6, 9)), "width: expected a positive multiple of 2, got 9"),
    ],
)
def test_stream_rejects_in_words_and_at_once(arguments, message):
    with pytest.raises(ValueError) as failure:
        Rollout(build(BLIND)).stream(**arguments)
    assert str(failure.value) == message


def test_generate_wants_an_end():
    with pytest.raises(ValueError, match="num_frames: expected a number of frames, got None"):
        Rollout(build(BLIND, window_frames=6)).generate(size=(HEIGHT, WIDTH))


# ---- patch -------------------------------------------------------------------------------------

TINY = WanConfig.named("tiny", num_layers=2)
PICTURE = (16, 24)  # 96 tokens a frame: blocks of 64 and 32


@pytest.fixture(scope="module")
def dense_video():
    return Rollout(CausalWan(TINY)).generate(12, size=PICTURE).latents


def test_patched_with_sparsity_zero_is_bit_identical(dense_video):
    model = CausalWan(TINY)
    before = [vars(block.self_attn).get("forward") for block in model.blocks]
    handle = lf.patch(model, sparsity=0)
    assert torch.equal(Rollout(model).generate(12, size=PICTURE).latents, dense_video)
    handle.unpatch()
    assert [vars(block.self_attn).get("forward") for block in model.blocks] == before
    assert torch.equal(Rollout(model).generate(12, size=PICTURE).latents, dense_video)


@pytest.mark.parametrize(
    "changes, lone, frames",
    [({}, False, 12), ({}, True, 10), (dict(window_frames=6, sink_frames=1), False, 12)],
)
def test_patched_runs_every_later_chunk_sparse(changes, lone, frames):
    model = CausalWan(dataclasses.replace(TINY, **changes))
    rollout = Rollout(model, lone_first_frame=lone)
    dense = rollout.generate(frames, size=PICTURE).latents
    with lf.patch(model, preset="fast") as handle:
        sparse = rollout.generate(frames, size=PICTURE).latents
        chunks = handle.stats()["chunks"]
    # The first chunk is dense; after a lone frame the second is too, with 1 of 3 frames before it.
    still = 2 if lone else 1
    calls = rollout.forwards_per_chunk * TINY.num_layers
    assert [(c["calls"], c["sparse_calls"]) for c in chunks] == [
        (calls, 0 if i < still else calls) for i in range(4)
    ]
    same = 4 if lone else 3
    assert torch.equal(sparse[:, :same], dense[:, :same])
    assert closeness(sparse, dense) > 1e-3
    assert torch.equal(rollout.generate(frames, size=PICTURE).latents, dense)


def test_a_patch_counts_chunks_as_the_rollout_does():
    model = CausalWan(TINY)
    rollout = Rollout(model, frames_per_chunk=1)
    with lf.patch(model, preset="fast") as handle:
        rollout.generate(4, size=PICTURE)
        chunks = handle.stats()["chunks"]
    assert [c["sparse_calls"] > 0 for c in chunks] == [False, True, True, True]


def test_random_weights_leave_attention_something_to_select():
    model = CausalWan(TINY)
    with lf.patch(model, preset="fast", probe=32) as handle:
        Rollout(model).generate(12, size=PICTURE)
        last = handle.stats()["chunks"][-1]
    assert last["density"] == 0.125
    assert last["recall"] > 3 * last["density"]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda r: CausalWan("tiny"), TypeError, "config: expected a WanConfig, such as "
         "WanConfig.named('tiny'), or None, got 'tiny'"),
        (lambda r: Rollout(None), TypeError, "model: expected a CausalWan, got NoneType"),
        (lambda r: Rollout(r.model, frames_per_chunk=0), ValueError,
         "frames_per_chunk: expected 1 or more, got 0"),
        (lambda r: r.generate("9"), TypeError, "num_frames: expected an integer, got '9'"),
        (lambda r: r.generate(3, size=32), TypeError,
         "size: expected rows and columns of a latent frame, got 32"),
        (lambda r: r.generate(3, size=(4, 4), seed="a"), TypeError,
         "seed: expected an integer, a generator or a function, got 'a'"),
    ],
)  # fmt: skip
def test_values_of_the_wrong_kind_are_told(call, error, message):
    rollout = Rollout(CausalWan(WanConfig.named("tiny", num_layers=1)))
    with pytest.raises(error) as failure:
        call(rollout)
    assert str(failure.value) == message
