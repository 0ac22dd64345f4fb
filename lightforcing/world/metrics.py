"""How well a rollout continued its clips: errors by region, similarity, glyphs, drift.

Everything is per clip, so that rules can be compared in pairs. Pixels are taken to [0, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .data import CHUNK, Clip, glyph_boxes, patterns

FLOOR = 1e-8  # least mean squared error: 80 dB
PIECE = 16  # clips at a time: SSIM holds a dozen copies of a video


def squared_errors(video: torch.Tensor, clip: Clip) -> dict[str, torch.Tensor]:
    """By region: sum of squared errors (mean over colours) and pixels, ``[B, F, 2]`` float64.

    Args:
        video: ``[B, F, 3, V, V]`` in [-1, 1].
        clip: examination clips, whose video is the truth.
    """
    error = ((video - clip.video) / 2).square().mean(2, dtype=torch.float64)
    return {
        name: torch.stack([(error * mask).sum((2, 3)), mask.double().sum((2, 3))], -1)
        for name, mask in clip.regions.items()
    }


def psnr(errors: torch.Tensor, frames: slice | None = None) -> torch.Tensor:
    """PSNR in dB of ``[B, F, 2]`` errors pooled over some frames, ``[B]``; NaN for no pixels."""
    total = errors[:, frames or slice(None)].sum(1)
    mean = (total[:, 0] / total[:, 1]).clamp(min=FLOOR)  # 0 / 0 stays NaN
    return -10 * mean.log10()


def ssim(video: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Structural similarity of frames ``[B, F, 3, V, V]`` in [-1, 1], ``[B, F]``.

    Source: Wang, Bovik, Sheikh and Simoncelli 2004: Gaussian window of 11 pixels and 1.5 standard
    deviation, constants 0.01 and 0.03, only windows that lie inside the frame;
    mean over the colours.
    """
    size = 11
    bell = torch.exp(-0.5 * ((torch.arange(size, device=video.device) - size // 2) / 1.5) ** 2)
    bell = bell / bell.sum()

    def blur(x):
        x = F.conv2d(x, bell.view(1, 1, 1, -1))
        return F.conv2d(x, bell.view(1, 1, -1, 1))

    out = []
    for a, b in zip(video.split(PIECE), truth.to(video.device).split(PIECE), strict=True):
        a, b = (((x.float() + 1) / 2).flatten(0, 2)[:, None] for x in (a, b))
        mean_a, mean_b = blur(a), blur(b)
        var_a = blur(a * a) - mean_a**2
        var_b = blur(b * b) - mean_b**2
        both = blur(a * b) - mean_a * mean_b
        one, two = 0.01**2, 0.03**2
        value = (2 * mean_a * mean_b + one) * (2 * both + two)
        value = value / ((mean_a**2 + mean_b**2 + one) * (var_a + var_b + two))
        out.append(value.mean((1, 2, 3)).view(-1, *video.shape[1:3]).mean(2))
    return torch.cat(out)


def read_glyphs(video: torch.Tensor, clip: Clip) -> torch.Tensor:
    """The pattern nearest to what each asked corner shows, ``[B, 2]`` int64: easy and hard."""
    batch, frames = video.shape[:2]
    device = video.device
    generated = torch.arange(frames, device=device) >= CHUNK * clip.given
    sides, boxes = glyph_boxes(clip.view, clip.corner.to(device))
    found = []
    for kind, side in enumerate(sides):
        weight = (clip.flags[:, :, kind].to(device) & generated).float()
        grey = torch.einsum("bfcyx,bf->byx", video.float(), weight) / 3
        grey = grey / weight.sum(1)[:, None, None]
        pixel = torch.arange(side, device=device)
        y, x = (boxes[:, kind, axis, None] + pixel for axis in (0, 1))
        box = grey[torch.arange(batch, device=device)[:, None, None], y[:, :, None], x[:, None]]
        away = (box[:, None] - patterns(side, device)).square().mean((2, 3))
        found.append(away.argmin(1))
    return torch.stack(found, 1)


def drift_slope(errors: torch.Tensor, first: int = 1) -> torch.Tensor:
    """Slope of the PSNR over the chunks from ``first`` on, dB a chunk, least squares, ``[B]``."""
    chunks = range(first, errors.shape[1] // CHUNK)
    y = torch.stack([psnr(errors, slice(c * CHUNK, (c + 1) * CHUNK)) for c in chunks], 1)
    x = torch.arange(len(chunks), dtype=y.dtype, device=y.device)
    x = x - x.mean()
    return (y * x).sum(1) / x.square().sum().clamp(min=1e-12)


def score(video: torch.Tensor, clip: Clip) -> dict[str, torch.Tensor]:
    """Every measure of a rollout, one number for each clip, ``[B]`` float64 on the CPU.

    Returns:
        ``all``, ``bare``, ``back``, ``moving``: PSNR of the region over the generated frames, dB,
        NaN where a clip has none; ``c1`` .. ``c6``: PSNR of each generated chunk; ``glyph_easy``,
        ``glyph_hard``: 1 if the right one is shown; ``ssim``: mean over the generated frames;
        ``drift``: dB a chunk.
    """
    clip = clip.to(video.device)
    first = CHUNK * clip.given
    errors = squared_errors(video, clip)
    out = {name: psnr(e, slice(first, None)) for name, e in errors.items()}
    for chunk in range(clip.given, video.shape[1] // CHUNK):
        out[f"c{chunk}"] = psnr(errors["all"], slice(chunk * CHUNK, (chunk + 1) * CHUNK))
    right = read_glyphs(video, clip) == clip.glyphs
    out["glyph_easy"], out["glyph_hard"] = right.unbind(1)
    out["ssim"] = ssim(video[:, first:], clip.video[:, first:]).mean(1)
    out["drift"] = drift_slope(errors["all"], clip.given)
    return {name: value.double().cpu() for name, value in out.items()}


def means(scores: dict[str, torch.Tensor]) -> dict[str, float]:
    """The mean of each measure over the clips that have it."""
    return {name: float(value.nanmean()) for name, value in scores.items()}
