"""Pictures of videos: labelled contact sheets, GIF and MP4, drawn with Pillow and imageio."""

from __future__ import annotations

from pathlib import Path

import imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, MUTED, PAPER = (28, 28, 30), (110, 110, 115), (255, 255, 255)
GAP = 12


def font(size: int):
    """Pillow's own scalable font: nothing is looked for on this machine."""
    return ImageFont.load_default(size)


def enlarge(frame: np.ndarray, scale: int) -> Image.Image:
    """A frame ``scale`` times as large, with a thin border: a white one stays visible."""
    picture = Image.fromarray(frame)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.BICUBIC)
    size = (0, 0, picture.width - 1, picture.height - 1)
    ImageDraw.Draw(picture).rectangle(size, outline=(200, 200, 205))
    return picture


def write(draw, xy, text: str, *, size: int = 16, colour=INK, anchor: str = "lt") -> None:
    """Text at a point; ``anchor`` as Pillow names it."""
    draw.text(xy, text, font=font(size), fill=colour, anchor=anchor)


def contact_sheet(
    rows: dict[str, np.ndarray], columns: list[tuple[str, str]], title: str, note: str, scale: int
) -> Image.Image:
    """One picture of several videos: a row each, a column for each chosen frame.

    Args:
        rows: label, with optional further lines, -> ``[n, h, w, 3]`` uint8, one frame a column.
        columns: heading and second line of each column.
        title: first line.
        note: small print below, lines split by newlines.
        scale: pixels for a pixel.
    """
    height, width = (scale * n for n in next(iter(rows.values())).shape[1:3])
    left, top = 190, 104
    lines = note.split("\n")
    size = (
        left + len(columns) * (width + GAP) + GAP,
        top + len(rows) * (height + GAP) + GAP + 22 * len(lines),
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    write(draw, (2 * GAP, 18), title, size=24)
    for c, (heading, below) in enumerate(columns):
        middle = left + c * (width + GAP) + width // 2
        write(draw, (middle, 56), heading, size=17, anchor="mt")
        write(draw, (middle, 78), below, size=15, colour=MUTED, anchor="mt")
    for r, (label, frames) in enumerate(rows.items()):
        y = top + r * (height + GAP)
        name, *details = label.split("\n")
        middle = y + height // 2 - 10 * len(details)
        write(draw, (2 * GAP, middle), name, size=18, anchor="lm")
        for i, detail in enumerate(details, 1):
            write(draw, (2 * GAP, middle + 20 * i + 2), detail, size=15, colour=MUTED, anchor="lm")
        for c, frame in enumerate(frames):
            sheet.paste(enlarge(frame, scale), (left + c * (width + GAP), y))
    for i, text in enumerate(lines):
        y = top + len(rows) * (height + GAP) + 4 + 22 * i
        write(draw, (2 * GAP, y), text, size=15, colour=MUTED)
    return sheet


def side_by_side(
    videos: dict[str, np.ndarray],
    captions: list[str],
    scale: int,
    notes: dict[str, list[str]] | None = None,
) -> list[np.ndarray]:
    """Frames of several videos beside each other, a title above each and a caption below.

    Args:
        videos: title -> ``[F, h, w, 3]`` uint8.
        captions: one for each frame.
        scale: pixels for a pixel.
        notes: title -> lines under each of its frames.
    """
    notes = notes or {}
    count, height, width = next(iter(videos.values())).shape[:3]
    height, width = height * scale, width * scale
    below = 20 * max(map(len, notes.values()), default=0)
    # Video codecs want even sides; multiples of 16 spare a second scaling.
    size = (GAP + len(videos) * (width + GAP), 44 + height + below + 40)
    size = tuple(-(-n // 16) * 16 for n in size)
    frames = []
    for f in range(count):
        page = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(page)
        for i, (label, video) in enumerate(videos.items()):
            x = GAP + i * (width + GAP)
            write(draw, (x + width // 2, 14), label, size=18, anchor="mt")
            page.paste(enlarge(video[f], scale), (x, 44))
            for n, line in enumerate(notes.get(label, ())):
                place = (x + width // 2, 44 + height + 8 + 20 * n)
                write(draw, place, line, size=15, colour=MUTED, anchor="mt")
        write(draw, (GAP, 44 + height + below + 14), captions[f], size=16, colour=MUTED)
        frames.append(np.asarray(page))
    return frames


def save_gif(path: Path, frames: list[np.ndarray], fps: float) -> None:
    """An endless GIF with one palette for all frames, so that colours do not flicker."""
    pages = [Image.fromarray(f) for f in frames]
    shared = Image.fromarray(np.concatenate(frames[:: max(1, len(frames) // 6)])).quantize(256)
    pages = [p.quantize(palette=shared, dither=Image.Dither.NONE) for p in pages]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=1000 / fps, loop=0)


def save_mp4(path: Path, frames: list[np.ndarray], fps: float) -> None:
    """An H.264 video that browsers play."""
    with imageio.get_writer(path, fps=fps, codec="libx264", quality=8) as writer:
        for frame in frames:
            writer.append_data(frame)
