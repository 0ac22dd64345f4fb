"""The world model: options of the causal Wan, its sequences in training, its rollout."""

import dataclasses
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from small_wan import one_thread  # noqa: F401

import lightforcing as lf
from lightforcing import world
from lightforcing.models.places import morton_order, place_features
from lightforcing.models.rope import apply_rope, rope_table
from lightforcing.world import evaluate
from lightforcing.world.data import CHUNK, clips
from lightforcing.world.draws import noise
from lightforcing.world.folded import Folded
from lightforcing.world.layout import Layout
from lightforcing.world.model import (
    MODELS,
    SIGMAS,
    conditions,
    new_model,
    rollout,
    sampler,
    to_latents,
    to_pixels,
    weights_of,
)


@pytest.fixture(scope="module")
def lively():
    """A tiny model with every weight away from its silent beginning."""
    model = new_model("tiny", seed=1)
    draw = torch.Generator().manual_seed(2)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=draw)
    return model


# ---- options of the causal Wan -------------------------------------------------------


@pytest.mark.parametrize("height, width", [(4, 4), (8, 8), (8, 4), (6, 10)])
def test_morton_order_is_tile_by_tile(height, width):
    def code(place):
        row, column = place
        bits = [(row >> i & 1) << (2 * i + 1) | (column >> i & 1) << (2 * i) for i in range(8)]
        return sum(bits)

    places = list(itertools.product(range(height), range(width)))
    wanted = [r * width + c for r, c in sorted(places, key=code)]
    assert morton_order(height, width).tolist() == wanted
    if height == width:
        for size, side in ((4, 2), (16, 4)):
            for tile in morton_order(height, width).split(size):
                rows, columns = tile // width, tile % width
                assert rows.max() - rows.min() == columns.max() - columns.min() == side - 1


def test_places_name_the_same_spot_of_the_world_alike():
    camera = torch.tensor([[[0.0, 0.0], [4.0, 6.0], [32.0, 0.0]]])  # latent pixels: 2 to a token
    x = place_features(camera, 16, 16).view(3, 16, 16, 4, 32)
    for row, column in ((0, 0), (3, 7), (13, 12)):
        # The second view lies 2 rows and 3 columns further; the third one once around.
        there = x[1, row, column, :2]
        if column + 3 < 16:
            assert torch.allclose(x[0, (row + 2) % 16, column + 3, :2], there, atol=1e-5)
        assert torch.allclose(x[2, row, column, :2], x[0, row, column, :2], atol=1e-5)
        assert torch.equal(x[1, row, column, 2:], x[0, row, column, 2:])
    spots = x[0, :, :, :2].flatten(2).flatten(0, 1)
    apart = torch.cdist(spots, spots) + 9 * torch.eye(256)
    assert apart.min() > 0.5
    rows = place_features(torch.zeros(1, 1, 2), 32, 1)[0, 0, :, :32]
    assert rows.square().sum(1).allclose(torch.tensor(16.0))  # nothing left out at 32 rows


def test_real_rotation_is_the_complex_one():
    x = torch.randn(2, 12, 3, 64, generator=torch.Generator().manual_seed(0)).double()
    table = rope_table(torch.tensor([5, 9]), 2, 3, 64, 100.0)
    assert torch.allclose(
        apply_rope(x, torch.view_as_real(table)), apply_rope(x, table), atol=1e-12
    )
    slowest = rope_table(torch.tensor([1]), 1, 1, 64, 100.0)[0, 0, 11]
    assert slowest.angle().item() == pytest.approx(100 ** (-11 / 12))


def test_head_norm_makes_every_head_the_same_length(lively):
    attention = lively.blocks[0].self_attn
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    q = attention.queries(x) / attention.norm_q.weight
    assert attention.norm_q.weight.shape == (64,)
    assert q.square().mean(-1).flatten().tolist() == pytest.approx([1.0] * 5, rel=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(qk_norm="none"), "qk_norm: expected 'channels' or 'head', got 'none'"),
        (dict(token_order="hilbert"), "token_order: expected 'raster' or 'morton', got 'hilbert'"),
        (dict(rope_theta=1.0), "rope_theta: expected a number above 1, got 1.0"),
        (dict(flags=-1), "flags: expected at least 0, got -1"),
    ],
)
def test_config_rejects_in_words(changes, message):
    with pytest.raises(ValueError) as failure:
        dataclasses.replace(MODELS["tiny"], **changes)
    assert str(failure.value) == message


def test_conditions_are_asked_for_and_checked(lively):
    cache = lively.new_cache(3, 16, 16)
    x, camera = torch.zeros(1, 12, 3, 16, 16), torch.zeros(1, 3, 2)
    for told, message in (
        (dict(), "camera: expected [1, 3, 2], got None"),
        (dict(camera=camera), "flags: expected [1, 3, 2], got None"),
        (dict(camera=camera[:, :1], flags=camera), "camera: expected [1, 3, 2], got [1, 1, 2]"),
    ):
        with pytest.raises(ValueError) as failure:
            lively(x, 500, cache=cache, **told)
        assert str(failure.value) == message
    plain = new_model("tiny").config
    plain = lf.models.CausalWan(dataclasses.replace(plain, camera=False, flags=0))
    with pytest.raises(ValueError, match="flags: the model has no flags, expected None"):
        plain(x, 500, cache=plain.new_cache(3, 16, 16), flags=camera)


# ---- sequences -----------------------------------------------------------------------


@pytest.mark.parametrize("chunks, pack", [(4, 1), (3, 3)])
def test_who_sees_whom(chunks, pack):
    layout = Layout(chunks, pack)
    rows = list(
        zip(layout.clip.tolist(), layout.noisy.tolist(), layout.chunk.tolist(), strict=True)
    )
    assert len(layout) == pack * 2 * (chunks - 1) == len(set(rows))
    for i, (clip, noisy, chunk) in enumerate(rows):
        assert 0 <= chunk - noisy <= chunks - 2
        for j, (other, dirty, source) in enumerate(rows):
            if dirty:
                wanted = i == j
            else:
                wanted = source < chunk if noisy else source <= chunk
            assert layout.sees[i, j] == (wanted and clip == other)


def test_training_is_what_the_rollout_runs(lively):
    """One pass under a mask, by flex, by SDPA and by parts, and chunk by chunk with a cache."""
    clip, layout = clips(2, view=32, frames=12), Layout(4)
    x, t, told, target = layout.batch(clip, torch.Generator().manual_seed(3))
    tokens = 64
    mask, folded = layout.mask(tokens), Folded(lively, 2, tokens, block=64, compiler=lambda b: b)
    folded.use(layout, tokens, 2)

    def masked(q, k, v):
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without")  # said once a process
        results = [
            lively.forward_frames(x, t, positions=layout.positions, **how, **told)
            for how in (
                dict(attend=layout.split(tokens)),
                dict(attend=masked),
                dict(attend=folded.attend, blocks=folded.blocks),
            )
        ]
        noisy = layout.noisy_frames
        parts, cache, known = [], lively.new_cache(12, 16, 16, batch=2), conditions(clip)
        for chunk in range(4):
            frames = slice(CHUNK * chunk, CHUNK * (chunk + 1))
            given = {name: value[:, frames] for name, value in known.items()}
            for wanted, back in ((noisy, chunk - 1), (layout.clean_frames, chunk)):
                at = slice(CHUNK * back, CHUNK * (back + 1))
                if 0 <= back < 3:
                    some_x, some_t = x[:, :, wanted][:, :, at], t[:, wanted][:, at]
                    v = lively(some_x, some_t, cache=cache, start_frame=CHUNK * chunk, **given)
                    parts += [v] if wanted is noisy else []
    results = [r[:, :, noisy] for r in results] + [torch.cat(parts, 2)]
    assert results[0].shape == target.shape and results[0].abs().max() > 1
    for other in results[1:]:
        assert (other - results[0]).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_every_size_folds_into_one_shape(lively):
    shapes, forward = set(), lively.blocks[0].forward

    def seen(block):
        def run(x, *rest):
            shapes.add(tuple(x.shape))
            return block(x, *rest)

        return run

    folded = Folded(lively, 1, 64, block=64, compiler=seen)
    short, pair, large = Layout(2, 2), Layout(3), Layout(3)
    attends = set()
    for view, layout, count in ((32, short, 4), (32, pair, 4), (64, large, 1), (32, short, 4)):
        clip = clips(range(count * layout.pack), view=view, frames=3 * layout.chunks, exam=False)
        x, t, told, _ = layout.batch(clip, torch.Generator().manual_seed(1))
        folded.use(layout, (view // 4) ** 2, count)
        attends.add(folded.attend)
        with torch.no_grad():
            a, b = (
                lively.forward_frames(x, t, positions=layout.positions, **how, **told)
                for how in (
                    dict(attend=layout.split((view // 4) ** 2)),
                    dict(attend=folded.attend, blocks=folded.blocks),
                )
            )
        assert a.abs().max() > 1 and (a - b).abs().max() < 1e-5
    assert shapes == {(1, 48, 64, 64)} and len(attends) == 1
    assert lively.blocks[0].forward == forward
    with pytest.raises(ValueError, match="batch: 1 sequences with 100 tokens a frame do not fold"):
        folded.use(large, 100, 1)


def test_a_batch_mixes_what_it_says():
    layout, clip = Layout(3, 3), clips(6, view=32, frames=9)
    x, t, told, target = layout.batch(clip, torch.Generator().manual_seed(0))
    noisy, pure = layout.noisy_frames, layout.clean_frames
    clean = layout.frames(to_latents(clip.video)).transpose(1, 2)
    assert x.shape == (2, 12, 36, 16, 16) and told["camera"].shape == (2, 36, 2)
    assert (t[:, pure] == 0).all() and (t[:, noisy] > 0).all()
    sigma = (t[:, noisy] / 1000)[:, None, :, None, None]
    # x = clean + sigma (noise - clean)
    assert torch.allclose(x[:, :, noisy], clean[:, :, noisy] + sigma * target, atol=1e-5)
    away = (x - clean)[:, :, pure].square().mean((1, 3, 4)).sqrt()
    assert (away == 0).float().mean() > 0.4 and 0 < away.max() < 0.15
    assert len(t.view(2, 12, CHUNK).unique(dim=2)[0, 0]) == 1  # one level for a chunk
    own = torch.tensor(SIGMAS) * 1000
    assert 0.2 < torch.isin(t[:, noisy], own).float().mean() < 0.9


# ---- the rollout ---------------------------------------------------------------------


def test_sizes_and_sampler():
    assert {n: weights_of(new_model(n)) for n in ("narrow", "tiny")} == {
        "narrow": 6_908_208,
        "tiny": 148_464,
    }
    steps = sampler(new_model("tiny"))
    assert steps.sigmas == pytest.approx(SIGMAS) and steps.timesteps == [1000, 900, 750, 500]
    video = clips(2, view=32).video
    latents = to_latents(video)
    assert latents.shape == (2, 21, 12, 16, 16) and torch.equal(to_pixels(latents), video)
    with pytest.raises(ValueError, match="model: expected one of narrow, full, tiny, got 'big'"):
        new_model("big")


def test_rollout_is_the_written_out_loop(lively):
    clip = clips(2, view=32, frames=9)
    calls = []
    video = rollout(lively, clip, seed=5, progress=lambda *c: calls.append(c))
    assert calls == [(0, 4)] + [(c, s) for c in (1, 2) for s in range(5)]
    assert torch.equal(video[:, :CHUNK], clip.video[:, :CHUNK])
    done, known = to_latents(clip.video[:, :CHUNK]), conditions(clip)
    for chunk in (1, 2):
        start = CHUNK * chunk
        told = {name: value[:, : start + CHUNK] for name, value in known.items()}
        for step, sigma in enumerate(SIGMAS):
            eps = noise(clip.seeds, (CHUNK, 12, 16, 16), chunk, step, 5)
            x = eps if step == 0 else (1 - sigma) * clean + sigma * eps  # noqa: F821
            clean_past = torch.cat([done, torch.zeros_like(x)], 1).transpose(1, 2)
            noisy = torch.cat([done, x], 1).transpose(1, 2)
            ends = range(CHUNK, start + CHUNK + 1, CHUNK)
            v = lively.forward_full(
                noisy, 1000 * sigma, chunk_ends=list(ends), clean=clean_past, **told
            )
            clean = (x - sigma * v.transpose(1, 2)[:, start:]).clamp(-1, 1)
        done = torch.cat([done, clean], 1)
    assert (to_pixels(done) - video).abs().max() < 1e-4


def test_noise_is_common_to_batches_and_rules(lively):
    clip = clips(2, view=32, frames=9)
    video = rollout(lively, clip)
    assert torch.allclose(rollout(lively, clip[1:2])[0], video[1], atol=1e-5)
    later = rollout(lively, clip, given=2)
    assert torch.equal(later[:, : 2 * CHUNK], clip.video[:, : 2 * CHUNK])
    assert not torch.allclose(rollout(lively, clip, seed=1), video, atol=1e-2)
    with lf.patched(lively, "fast", block_q=16, block_k=16) as handle:
        sparse = rollout(lively, clip)
        stats = handle.stats()
    assert stats["sparse_calls"] == 2 * 2 * 5 and not torch.equal(sparse, video)
    with lf.patched(lively, sparsity=0.0):
        assert torch.equal(rollout(lively, clip), video)


def test_given_frames_are_checked(lively):
    clip = clips(1, view=32, frames=9)
    stream, told = sampler(lively).stream, conditions(clip)
    given = to_latents(clip.video)
    for wrong, message in (
        (given[:, :2], "num_frames: expected 3 plus a multiple of 3, got 2"),
        (given[:, :, :5], r"given: expected \[1, G, 12, 16, 16\], got \[1, 9, 5, 16, 16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            stream(9, size=(16, 16), given=wrong, **told)
    with pytest.raises(ValueError, match="given: expected at most 6 frames, got 9"):
        stream(6, size=(16, 16), given=given, **told)


def test_rollout_rejects_in_words(lively):
    clip = clips(1, view=32, frames=9)
    for given in (99, -1, 0):
        with pytest.raises(ValueError, match=f"given: expected 1 to 3 chunks, got {given}"):
            rollout(lively, clip, given=given)
    with pytest.raises(TypeError, match="given: expected a number of chunks, got 1.0"):
        rollout(lively, clip, given=1.0)
    with pytest.raises(TypeError, match=r"model: expected one of load_world\(\), got NoneType"):
        rollout(None, clip)
    with pytest.raises(TypeError, match=r"clip: expected a Clip of clips\(\), got Tensor"):
        rollout(lively, clip.video)


def test_a_window_changes_nothing_until_it_is_full(lively):
    clip = clips(2, view=32, frames=12)
    dense = rollout(lively, clip)
    near = rollout(evaluate.windowed(lively, 2 * CHUNK), clip)
    first = slice(0, 2 * CHUNK)
    assert torch.equal(near[:, first], dense[:, first])
    assert (near - dense)[:, 2 * CHUNK :].abs().max() > 1e-3


def test_far_mass_of_flat_attention_is_the_share_of_frames():
    model = new_model("tiny")
    for block in model.blocks:
        block.self_attn.norm_q.weight.data.zero_()
    mass = evaluate.far_mass(model, clips(2, view=32))
    assert mass.shape == (2, 1) and mass.flatten().tolist() == pytest.approx([12 / 21] * 2)


def test_gates_are_figures_with_bounds(lively):
    result = evaluate.gates(lively, view=32, count=3, batch=2)
    assert [g["ok"] for g in result["gates"]][:2] == [False, False] and not result["ok"]
    assert set(result["rows"]) == {"dense", "2 chunks", "last frame"}
    still = result["rows"]["last frame"]
    clip = clips(3, view=32)
    held = clip.video[:, 2:3].expand(-1, 21, -1, -1, -1)
    found = world.metrics.means(world.metrics.score(held, clip))
    assert still["all"] == pytest.approx(found["all"])
    text = evaluate.table(result)
    assert "FAILS" in text and "32 px, 3 clips" in text
