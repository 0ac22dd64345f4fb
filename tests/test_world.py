"""Procedural clips and the measures: against the rules they are made by, not against themselves."""

import math

import pytest
import torch
from small_wan import one_thread  # noqa: F401

from lightforcing import world
from lightforcing.world import metrics
from lightforcing.world.data import CHUNK, EXAM_SEED, _Scene, clips, glyph_boxes, patterns
from lightforcing.world.draws import Draws, noise

WIDE = 96  # columns of the world of a view of 64


@pytest.fixture(scope="module")
def quick():
    return clips(12)


@pytest.fixture(scope="module")
def slow():
    return clips(6, sweep="slow")


# ---- random numbers ------------------------------------------------------------------


def splitmix(z):
    """The finaliser of SplitMix64 on Python integers."""
    whole = (1 << 64) - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & whole
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & whole
    return z ^ (z >> 31)


def test_uniforms_are_those_of_the_published_hash():
    whole, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15
    for seed in (0, 7, EXAM_SEED + 3):
        draw = Draws(torch.tensor([seed]))
        for stream in (1, 2):
            key = splitmix((seed * golden + 1) & whole)
            key = splitmix((key + stream * 0x94D049BB133111EB) & whole)
            wanted = [splitmix((key + i * golden) & whole) for i in (1, 2, 3)]
            wanted = [((bits >> 41) + 0.5) / (1 << 23) for bits in wanted]
            assert draw.uniform(3)[0].tolist() == wanted


def test_numbers_are_spread_and_independent():
    draw = Draws(torch.arange(200))
    for x in (draw.uniform(100), noise(torch.arange(200), (100,), 1, 0)):
        normal = x.min() < 0
        mean, deviation = (0.0, 1.0) if normal else (0.5, 12**-0.5)
        assert abs(x.mean() - mean) < 4 * deviation / 20_000**0.5
        assert abs(x.std() - deviation) < 0.02
        y = (x - x.mean()) / x.std()
        # Neighbours among seeds and among indices: a correlation of 4 standard errors at most.
        for a, b in ((y[1:], y[:-1]), (y[:, 1:], y[:, :-1])):
            assert abs((a * b).mean()) < 4 / 20_000**0.5
    counts = Draws(torch.arange(100)).below(5, 100).flatten().bincount(minlength=5)
    assert len(counts) == 5 and counts.min() > 1800


def test_noise_depends_on_seed_and_place_only():
    seeds = torch.tensor([3, 9, 4])
    one = noise(seeds, (2, 5), 1, 0, 0)
    assert torch.equal(noise(seeds[1:2], (2, 5), 1, 0, 0)[0], one[1])
    others = [noise(seeds, (2, 5), *place) for place in ((0, 1, 0), (1, 1, 0), (1, 0, 1))]
    assert all((x != one).all() for x in others)


# ---- clips ---------------------------------------------------------------------------


def test_a_clip_depends_on_its_seed_alone(quick):
    alone = clips([EXAM_SEED + 5])
    for name in ("video", "camera", "flags", "glyphs", "corner"):
        assert torch.equal(getattr(alone, name), getattr(quick[5:6], name)), name
    assert torch.equal(alone.regions["back"], quick[5:6].regions["back"])
    assert not torch.equal(quick.video[4], quick.video[5])


def coordinates(clip):
    """World row and column of every pixel, from the camera: [B, F, V, V] each."""
    side = torch.arange(clip.view)
    row = (clip.camera[:, :, 0, None] + side) % clip.view
    column = clip.camera[:, :, 1, None] + side
    shape = clip.video.shape[:2] + (clip.view,) * 2
    return row[..., None].expand(shape), column[:, :, None].expand(shape)


@pytest.mark.parametrize("kind", ["quick", "slow"])
def test_the_given_frames_show_the_whole_world_and_bare_pixels_are_theirs(kind, request):
    clip = request.getfixturevalue(kind)
    row, column = coordinates(clip)
    assert clip.given == {"quick": 1, "slow": 2}[kind]
    assert column.min() == 0 and column.max() == WIDE - 1 and (clip.camera % 2 == 0).all()
    first = CHUNK * clip.given
    at = row * WIDE + column
    for b in range(len(clip)):
        assert len(at[b, :first].unique()) == clip.view * WIDE
        bare = clip.regions["bare"][b]
        colours = torch.full((clip.view * WIDE, 3), math.nan)
        shown = bare[:first]
        colours[at[b, :first][shown]] = clip.video[b, :first].permute(0, 2, 3, 1)[shown]
        later = bare[first:]
        truth = clip.video[b, first:].permute(0, 2, 3, 1)[later]
        assert len(truth) > 10_000 and torch.equal(colours[at[b, first:][later]], truth)


@pytest.mark.parametrize("kind", ["quick", "slow"])
def test_back_was_out_of_view_for_two_chunks(kind, request):
    clip = request.getfixturevalue(kind)
    _, column = coordinates(clip)
    found = 0
    for b in range(len(clip)):
        for f in range(21):
            start = f // CHUNK * CHUNK
            seen = column[b, max(0, start - 2 * CHUNK) : start].unique()
            back = clip.regions["back"][b, f]
            assert not torch.isin(column[b, f][back], seen).any()
            assert not (back & ~clip.regions["bare"][b, f]).any()
            if start >= (clip.given + 2) * CHUNK:
                bare_unseen = clip.regions["bare"][b, f] & ~torch.isin(column[b, f], seen)
                assert torch.equal(back, bare_unseen)
                found += back.sum()
    assert found > 0.01 * clip.regions["all"].sum()


def test_the_camera_moves_both_ways(quick):
    step = quick.camera[:, CHUNK:].diff(dim=1)
    rows = (step[..., 0] + 32) % 64 - 32
    assert (rows.abs().sum(1) >= 6).float().mean() > 0.8
    assert (step[..., 1].abs().sum(1) >= 24).all() and step[..., 1].abs().max() <= 10


@pytest.mark.parametrize("view", [64, 128])
def test_sprites_move_whole_pixels_and_are_seen_three_times(view):
    seeds = torch.arange(6)
    draw = Draws(seeds)
    scene = _Scene(draw, view, 21, 1)
    blank = torch.zeros(6, 21, 3, view, view)
    for number in (0, 1):
        video, mask = scene.sprite(draw, blank, number)
        assert (mask[:, :CHUNK].sum((2, 3)) > 25 * (view / 64) ** 2).all()
        # In world coordinates the second and third frame are the first one, moved.
        canvas = torch.zeros(6, 2, 3, view, view * 3 // 2)
        for f in (1, 2):
            at = (scene.row[:, f] * canvas.shape[-1] + scene.column[:, f]).flatten(1)
            flat = canvas[:, f - 1].flatten(2)
            flat.scatter_(2, at[:, None].expand(-1, 3, -1), video[:, f].flatten(2))
            canvas[:, f - 1] = flat.view_as(canvas[:, f - 1])
        unit = view // 64
        middle = slice(view // 2, view)  # columns that every view of the sweep shows
        for b in range(6):
            speeds = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if (y, x) != (0, 0)]
            moved = [
                canvas[b, 0].roll((y * unit, x * unit), (1, 2))[..., middle] for y, x in speeds
            ]
            inner = slice(2 * unit, -2 * unit)
            wanted = canvas[b, 1][..., middle][..., inner]
            # Sines of the stripes: equal but for the last bits of the coordinates' products.
            assert min((m[..., inner] - wanted).abs().max() for m in moved) < 1e-5


def test_glyphs_differ_and_flash_once_before_they_are_asked_for(quick):
    cells = patterns(4).sign().flatten(1)
    apart = (cells[:, None] != cells[None]).sum(-1)
    assert apart[~torch.eye(16, dtype=torch.bool)].min() >= 8
    assert (cells.abs().sum(1) == 16).all() and (cells.sum(1).abs() < 16).all()
    assert torch.equal(metrics.read_glyphs(quick.video, quick), quick.glyphs)
    sides, boxes = glyph_boxes(64, quick.corner)
    assert sides == (16, 8) and len(quick.corner.unique()) == 3
    for b in range(len(quick)):
        for kind, side in enumerate(sides):
            y, x = boxes[b, kind].tolist()
            box = quick.video[b, :, :, y : y + side, x : x + side]
            wanted = patterns(side)[quick.glyphs[b, kind]].expand(3, -1, -1)
            shown = [bool((f == wanted).all()) for f in box]
            asked = quick.flags[b, :, kind].tolist()
            assert sum(shown[:CHUNK]) == 1 and shown[CHUNK:] == asked[CHUNK:]
            assert sum(asked) == CHUNK and not any(asked[: 2 * CHUNK])
            chunk = asked.index(True)
            assert chunk % CHUNK == 0 and all(asked[chunk : chunk + CHUNK])


def test_training_clips_ask_from_the_first_generated_chunk_on():
    clip = clips(range(40), view=32, frames=9, exam=False)
    asked = clip.flags.view(40, 3, CHUNK, 2)[:, :, 0]
    assert not clip.regions and set(asked.sum(1).unique().tolist()) == {1, 2}
    assert not asked[:, 0].any() and asked[:, 1].any() and asked[:, 2].any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(view=48), "view: expected a multiple of 32, got 48"),
        (dict(sweep="fast"), "sweep: expected 'quick' or 'slow', got 'fast'"),
        (dict(frames=20), "frames: expected a multiple of 3 of at least 9, got 20"),
        (dict(frames=9, sweep="slow"), "frames: expected a multiple of 3 of at least 12, got 9"),
    ],
)
def test_clips_reject_in_words(arguments, message):
    with pytest.raises(ValueError) as failure:
        clips(1, **arguments)
    assert str(failure.value) == message


@pytest.mark.parametrize(
    "seeds, error, message",
    [
        (0, ValueError, "seeds: expected at least 1 clip, got 0"),
        ([], ValueError, "integers, one or more, got the shape [0]"),
        ([1.5], TypeError, "seeds: expected a number of clips or a list of integers, got [1.5]"),
        (True, ValueError, "got the shape []"),
        ("ab", TypeError, "got 'ab'"),
        (None, TypeError, "got None"),
    ],
)
def test_seeds_reject_in_words(seeds, error, message):
    with pytest.raises(error) as failure:
        clips(seeds, view=32, frames=9)
    assert message in str(failure.value) and str(failure.value).startswith("seeds: expected")


# ---- measures ------------------------------------------------------------------------


def test_psnr_of_a_known_error(quick):
    video = quick.video.clone()
    video[:, 3:] += 0.2 * quick.regions["moving"][:, 3:, None]  # 0.1 of the range
    errors = metrics.squared_errors(video, quick)
    assert metrics.psnr(errors["moving"], slice(3, None)).tolist() == pytest.approx([20.0] * 12)
    assert (metrics.psnr(errors["bare"]) > 79).all()
    share = quick.regions["moving"][:, 3:].double().mean((1, 2, 3))
    wanted = (20 - 10 * share.log10()).tolist()
    assert metrics.psnr(errors["all"], slice(3, None)).tolist() == pytest.approx(wanted)
    assert metrics.psnr(errors["back"], slice(0, 3)).isnan().all()
    scores = world.metrics.score(video, quick)
    assert scores["moving"].tolist() == pytest.approx([20.0] * 12)
    assert (scores["glyph_easy"] == 1).all() and (scores["glyph_hard"] == 1).all()
    assert metrics.means({"x": torch.tensor([1.0, math.nan, 3.0])}) == {"x": 2.0}


def test_ssim_is_the_published_formula(quick):
    draw = torch.Generator().manual_seed(0)
    a, b = quick.video[:2, 5:7, :, :16, :18], None
    b = (a + 0.3 * torch.randn(a.shape, generator=draw)).clamp(-1, 1)
    assert metrics.ssim(a, a).flatten().tolist() == pytest.approx([1.0] * 4)
    x = torch.arange(11).double() - 5
    window = torch.exp(-(x[:, None] ** 2 + x[None] ** 2) / (2 * 1.5**2))
    window = window / window.sum()
    for i, f in ((0, 0), (1, 1)):
        values = []
        for c in range(3):
            p, q = ((v[i, f, c].double() + 1) / 2 for v in (a, b))
            for y in range(6):
                for z in range(8):
                    u, w = p[y : y + 11, z : z + 11], q[y : y + 11, z : z + 11]
                    mu, mw = (window * u).sum(), (window * w).sum()
                    vu, vw = (window * (u - mu) ** 2).sum(), (window * (w - mw) ** 2).sum()
                    both = (window * (u - mu) * (w - mw)).sum()
                    top = (2 * mu * mw + 1e-4) * (2 * both + 9e-4)
                    values.append(top / ((mu**2 + mw**2 + 1e-4) * (vu + vw + 9e-4)))
        wanted = float(sum(values) / len(values))
        assert metrics.ssim(a, b)[i, f].item() == pytest.approx(wanted, abs=2e-5)


def test_drift_is_the_slope_of_the_psnr():
    decibels = torch.tensor([[99.0, 30, 28, 26, 24], [99.0, 20, 20, 20, 20]]).double()
    errors = (10 ** (-decibels / 10)).repeat_interleave(CHUNK, 1)
    errors = torch.stack([errors * 7, torch.full_like(errors, 7.0)], -1)
    assert metrics.drift_slope(errors).tolist() == pytest.approx([-2.0, 0.0])
    assert metrics.drift_slope(errors, first=2).tolist() == pytest.approx([-2.0, 0.0])


def test_glyphs_are_read_where_they_were_asked_for(quick):
    video = torch.zeros_like(quick.video)
    assert (metrics.read_glyphs(video, quick) == quick.glyphs).float().mean() < 0.5
    sides, boxes = glyph_boxes(64, quick.corner)
    wrong = (quick.glyphs + 3) % 16
    for b in range(len(quick)):
        for kind, side in enumerate(sides):
            y, x = boxes[b, kind].tolist()
            picture = 0.4 * patterns(side)[wrong[b, kind]]  # pale, as a blurred one
            asked = quick.flags[b, :, kind]
            video[b, asked, :, y : y + side, x : x + side] = picture
    assert torch.equal(metrics.read_glyphs(video, quick), wrong)
