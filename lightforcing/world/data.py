"""Procedural video whose true continuation is known.

A textured world, one and a half views wide, wraps around vertically. The given frames (three, or
six for a slow sweep) show all of it; then the camera pans back and forth while it drifts up or
down. Sprites fly straight, in whole pixels a frame, through the top into the bottom, and bounce at
the left and right walls; a pillar hides what passes behind it. Two glyphs flash among the first
three frames and are asked for once more later, by a flag: an easy one, as large as one tile of 16
(64 px) or 64 (128 px) tokens, always at the top left, and a hard one a quarter of that area, in a
corner that only the flash tells. Given these frames, the camera and the flags, every later pixel is
determined: what a rollout gets wrong, it forgot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from .draws import Draws

CHUNK = 3
"""Frames of a chunk."""
EXAM_SEED = 1 << 48
"""First seed of the clips to examine with; training stays below."""
REGIONS = ("all", "bare", "back", "moving")
GLYPHS = 16
SWEEPS = ("quick", "slow")


@dataclass
class Clip:
    """B clips of F frames of V x V pixels.

    Attributes:
        seeds: ``[B]`` int64.
        video: ``[B, F, 3, V, V]`` float32 in [-1, 1].
        camera: row and column of the view's corner in the world, ``[B, F, 2]`` int64, even.
        flags: frames that ask for the easy and the hard glyph, ``[B, F, 2]`` bool.
        glyphs: pattern of the easy and the hard glyph, ``[B, 2]`` int64 below 16.
        corner: of the hard glyph, ``[B]`` int64: 1 top right, 2 bottom left, 3 bottom right.
        regions: masks ``[B, F, V, V]`` bool, for exams: *all*; *bare*, background seen in the given
            frames and uncovered now; *back*, bare and out of view during the two chunks before;
            *moving*, sprites.
        given: chunks that show the whole world, 1 or 2.
    """

    seeds: torch.Tensor
    video: torch.Tensor
    camera: torch.Tensor
    flags: torch.Tensor
    glyphs: torch.Tensor
    corner: torch.Tensor
    regions: dict[str, torch.Tensor]
    given: int

    def __len__(self) -> int:
        """Clips."""
        return len(self.seeds)

    def __getitem__(self, part: slice) -> Clip:
        """Some of the clips, by a slice."""
        return self._each(lambda x: x[part])

    def to(self, device: torch.device | str) -> Clip:
        """The same clips on a device."""
        return self._each(lambda x: x.to(device))

    @property
    def view(self) -> int:
        """Rows and columns V of a frame."""
        return self.video.shape[-1]

    def _each(self, change):
        def of(value):
            if isinstance(value, dict):
                return {k: change(v) for k, v in value.items()}
            return change(value) if isinstance(value, torch.Tensor) else value

        return Clip(**{f.name: of(getattr(self, f.name)) for f in fields(self)})


def clips(
    seeds: int | Sequence[int] | torch.Tensor,
    *,
    view: int = 64,
    frames: int = 21,
    sweep: str = "quick",
    exam: bool = True,
    device: torch.device | str = "cpu",
) -> Clip:
    """Clips by seed; a clip depends on nothing else but the keywords.

    Args:
        seeds: one for each clip; a number B stands for the first B examination clips.
        view: pixels V of a side, a multiple of 32; textures keep their size, all else scales.
        frames: F, a multiple of 3; at least 9 with ``exam=True`` and 6 without, and 3 more with
            the slow sweep.
        sweep: ``"quick"``: three frames show the whole world; ``"slow"``: six do.
        exam: each glyph is asked for in one chunk only, after at least one generated chunk, and
            there are region masks. Otherwise in one or two chunks after the first.
        device: where the clips are made. Devices agree but for the last bits of sines and logs.

    Raises:
        ValueError: a size, the sweep or the number of seeds is not as said.
        TypeError: seeds that are not integers.
    """
    if view < 32 or view % 32:
        raise ValueError(f"view: expected a multiple of 32, got {view}")
    if sweep not in SWEEPS:
        raise ValueError(f"sweep: expected {' or '.join(map(repr, SWEEPS))}, got {sweep!r}")
    given = 1 + SWEEPS.index(sweep)
    chunks, rest = divmod(frames, CHUNK)
    if rest or chunks < given + 1 + exam:
        raise ValueError(
            f"frames: expected a multiple of {CHUNK} of at least {CHUNK * (given + 1 + exam)}, "
            f"got {frames}"
        )
    seeds = _seeds(seeds).to(device)
    draw = Draws(seeds)
    scene = _Scene(draw, view, frames, given)
    video = scene.background(draw)
    moving = torch.zeros_like(scene.column, dtype=torch.bool)
    for number in range(3):
        video, touched = scene.sprite(draw, video, number)
        moving |= touched
    video, post = scene.pillar(draw, video)
    moving &= ~post
    video, boxed, told = scene.glyphs(draw, video, exam)
    found = {}
    if exam:
        found = scene.regions(moving & ~boxed, post | boxed | moving)
    return Clip(seeds, video.clamp(-1, 1), scene.camera, *told, found, given)


def patterns(side: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The glyphs, ``[16, side, side]`` of -0.9 and 0.9: 4 x 4 cells, any two differ in 8 or more.

    Rows of a Hadamard matrix; the constant one, a blank box, gives way to a negated one.
    """
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    cells = two
    for _ in range(3):
        cells = torch.kron(cells, two)
    cells[0] = -cells[15]
    cells = 0.9 * cells.view(GLYPHS, 4, 4).to(device)
    return cells.repeat_interleave(side // 4, 1).repeat_interleave(side // 4, 2)


def glyph_boxes(view: int, corner: torch.Tensor) -> tuple[tuple[int, int], torch.Tensor]:
    """Sides of the easy and the hard glyph, and their top left pixels ``[B, 2, 2]``."""
    large, small = view // 4, view // 8
    far = view - small
    hard = torch.stack([(corner >= 2) * far, (corner % 2 == 1) * far], 1)
    return (large, small), torch.stack([torch.zeros_like(hard), hard], 1)


def _seeds(seeds):
    """What :func:`clips` was given, as int64 ``[B]``."""
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        if seeds < 1:
            raise ValueError(f"seeds: expected at least 1 clip, got {seeds}")
        seeds = range(EXAM_SEED, EXAM_SEED + seeds)
    wanted = "seeds: expected a number of clips or a list of integers"
    try:
        found = torch.as_tensor(seeds)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{wanted}, got {seeds!r}") from None
    if found.dim() != 1 or not len(found):
        raise ValueError(f"{wanted}, one or more, got the shape {list(found.shape)}")
    if found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        raise TypeError(f"{wanted}, got {seeds!r}")
    return found.long()


def _column(x: torch.Tensor, dims: int) -> torch.Tensor:
    """[B] as [B, 1, ...] with ``dims`` axes in all."""
    return x.view(-1, *[1] * (dims - 1))


class _Scene:
    """One batch of worlds and the paths of their cameras; steps of :func:`clips`, in order."""

    def __init__(self, draw: Draws, view: int, frames: int, given: int) -> None:
        self.view, self.frames, self.given = view, frames, given
        self.unit, self.width = view // 32 / 2, view * 3 // 2
        device = draw.seeds.device
        self.time = torch.arange(frames, device=device)
        self.camera = self._path(draw)
        side = torch.arange(view, device=device)
        # World coordinates of every pixel: row and column, [B, F, V, V].
        size = (len(draw.seeds), frames, view, view)
        self.row = ((self.camera[:, :, :1] + side) % view)[:, :, :, None].expand(size)
        self.column = (self.camera[:, :, 1:] + side)[:, :, None].expand(size)

    def _path(self, draw):
        """The sweep, then a pan out and back; a drift up or down; all in steps of two pixels."""
        view, unit, time = self.view, self.unit, self.time
        reach = view * (0.25 + 0.25 * draw.uniform(1))
        period = 14 + 6 * draw.uniform(1)
        last = CHUNK * self.given - 1  # frame that ends the sweep
        pan = reach * (1 - torch.cos(2 * math.pi * (time - last) / period)) / 2
        swapped, mirrored = draw.true(0.5), draw.true(0.5, 1)
        sweep = (view / 2) * time / last
        if self.given == 1:  # the two first frames come in either order
            sweep = sweep.expand(len(reach), -1).clone()
            sweep[:, 0] = torch.where(swapped, view / 4, 0.0)
            sweep[:, 1] = torch.where(swapped, 0.0, view / 4)
        x = torch.where(time <= last, sweep, view / 2 - pan)
        x = torch.where(mirrored, view / 2 - x, x)
        sign = 1.0 - 2.0 * draw.true(0.5, 1)
        drift = sign * unit * (0.5 + 2 * draw.uniform(1)) * time
        swing, turn = draw.uniform(2, 1).unbind(1)
        wave = 6 * unit * swing * torch.sin(2 * math.pi * (time / 16 + turn))
        y = view * draw.uniform(1) + drift + wave
        return torch.stack([(y / 2).round() * 2 % view, (x / 2).round() * 2], -1).long()

    def background(self, draw):
        """Three octaves of bilinear noise that wrap around vertically, seen by the camera."""
        view, width = self.view, self.width
        world = 0
        for cell, weight in ((16, 0.7), (8, 0.5), (4, 0.35)):
            grid = draw.normal(3, view // cell, width // cell)
            grid = torch.cat([grid[:, :, -1:], grid, grid[:, :, :1]], 2)
            size = (view + 2 * cell, width)
            world = (
                world
                + weight * F.interpolate(grid, size=size, mode="bilinear")[:, :, cell : cell + view]
            )
        at = (self.row * width + self.column).flatten(1)  # [B, F V V]
        seen = world.tanh().flatten(2).gather(2, at[:, None].expand(-1, 3, -1))
        return seen.unflatten(2, self.row.shape[1:]).transpose(1, 2)

    def sprite(self, draw, video, number):
        """Paints one sprite; returns the video and where the sprite is. The third may be absent."""
        view, unit, width, time = self.view, self.unit, self.width, self.time
        radius = unit * (5 + 3 * draw.uniform(1))
        # All views of the sweep share the columns V/2 .. V; there it is in the second frame.
        start = torch.stack(
            [view * draw.uniform(1), view / 2 + 4 * unit + (view / 2 - 8 * unit) * draw.uniform(1)]
        ).round()
        way = draw.below(24, 1)
        way = way + (way >= 12)  # of 5 x 5 velocities not the one that rests
        speed = unit * torch.stack([way // 5 - 2, way % 5 - 2])
        if unit < 1:
            speed = speed.round()
        y, x = start + speed * (time - 1)  # [B, F] each
        low = radius.ceil()
        span = width - 1 - 2 * low
        x = (x - low).remainder(2 * span)
        x = low + torch.where(x > span, 2 * span - x, x)
        dx = self.column - x[:, :, None, None]
        dy = (self.row - y[:, :, None, None] + view / 2).remainder(view) - view / 2
        shape, radius = draw.below(3, 1, 1, 1), _column(radius, 4)
        away = torch.where(
            shape == 0,
            (dx * dx + dy * dy).sqrt(),
            torch.where(shape == 1, torch.maximum(dx.abs(), dy.abs()), 0.8 * (dx.abs() + dy.abs())),
        )
        alpha = (radius - away + 0.5).clamp(0, 1)
        present = draw.true(0.5, 1, 1, 1)
        if number == 2:
            alpha = alpha * present
        tilt, wave = math.pi * draw.uniform(1, 1, 1), 0.6 / unit + 0.4 * draw.uniform(1, 1, 1)
        stripe = ((dx * tilt.cos() + dy * tilt.sin()) * wave).sin()
        stripe = (0.5 + 0.5 * (3 * stripe).tanh())[:, :, None]
        dark, light = (1.8 * draw.uniform(2, 1, 3, 1, 1) - 0.9).unbind(1)
        ink = dark * stripe + light * (1 - stripe)
        return torch.lerp(video, ink, alpha[:, :, None]), alpha > 0

    def pillar(self, draw, video):
        """Paints a striped bar left or right of where the sprites start; where it is."""
        view, unit = self.view, self.unit
        half = unit * (5 + 2 * draw.uniform(1, 1, 1))
        place = unit * (8 + 16 * draw.uniform(1, 1, 1))
        place = torch.where(draw.true(0.5, 1, 1, 1), place, self.width - place)
        post = (self.column - place).abs() < half
        ink = 1.8 * draw.uniform(1, 3, 1, 1) - 0.9
        stripe = 0.3 * (self.row * (2 * math.pi * 5 / view)).sin()[:, :, None]
        return torch.where(post[:, :, None], ink + stripe, video), post

    def glyphs(self, draw, video, exam):
        """Paints both glyphs; the video, where they are, and (flags, patterns, corner)."""
        device, chunks = video.device, self.frames // CHUNK
        first = self.given + exam
        pattern, corner = draw.below(GLYPHS, 2), 1 + draw.below(3)
        ask = first + draw.below(chunks - first, 2, 2)  # chunks: [B, glyph, first or second time]
        twice = draw.true(0.5, 2)
        again = torch.where(twice & (not exam), ask[:, :, 1], ask[:, :, 0])
        chunk = self.time // CHUNK
        flags = (chunk == ask[:, :, :1]) | (chunk == again[:, :, None])  # [B, 2, F]
        shown = flags | (self.time == draw.below(CHUNK, 2, 1))
        sides, boxes = glyph_boxes(self.view, corner)
        side = torch.arange(self.view, device=device)
        boxed = torch.zeros_like(self.row, dtype=torch.bool)
        for kind, size in enumerate(sides):
            y, x = (side - boxes[:, kind, axis, None] for axis in (0, 1))  # [B, V]
            inside = ((y >= 0) & (y < size))[:, :, None] & ((x >= 0) & (x < size))[:, None]
            picture = patterns(size, device)[pattern[:, kind]]
            rows = torch.arange(len(picture), device=device)[:, None, None]
            picture = picture[rows, y.clamp(0, size - 1)[:, :, None], x.clamp(0, size - 1)[:, None]]
            here = shown[:, kind, :, None, None] & inside[:, None]  # [B, F, V, V]
            video = torch.where(here[:, :, None], picture[:, None, None], video)
            boxed |= here
        return video, boxed, (flags.transpose(1, 2), pattern, corner)

    def regions(self, moving, covered):
        """The masks of :class:`Clip`."""
        batch, frames, view, _ = covered.shape
        at = self.row * self.width + self.column
        told = slice(0, CHUNK * self.given)
        # A scatter with "any": 1 wherever an uncovered pixel of a given frame looks.
        known = torch.zeros(batch, view * self.width, device=at.device)
        known.scatter_reduce_(
            1, at[:, told].flatten(1), (~covered[:, told]).flatten(1).float(), "amax"
        )
        known = known.gather(1, at.flatten(1)).view_as(at) > 0
        back = torch.zeros_like(covered)
        column = self.column[:, :, 0]  # [B, F, V]: rows wrap, so only columns leave the view
        for chunk in range(self.given + 2, frames // CHUNK):
            now = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            before = column[:, (chunk - 2) * CHUNK : chunk * CHUNK].flatten(1)
            seen = torch.zeros(batch, self.width, dtype=torch.bool, device=at.device)
            seen.scatter_(1, before, True)
            unseen = ~seen.gather(1, column[:, now].flatten(1)).view(batch, CHUNK, view)
            back[:, now] = unseen[:, :, None]
        bare = known & ~covered
        return {
            "all": torch.ones_like(covered),
            "bare": bare,
            "back": back & bare,
            "moving": moving,
        }
