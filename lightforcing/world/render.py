"""Moving pictures of rollouts beside the truth: contact sheet, GIF and MP4."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import numpy as np
import torch

import lightforcing as lf

from ..models import CausalWan
from .data import CHUNK, Clip
from .metrics import score
from .model import rollout

FPS = 6


def frames(video: torch.Tensor) -> np.ndarray:
    """One video ``[F, 3, V, V]`` in [-1, 1] as ``[F, V, V, 3]`` uint8 for the pictures."""
    pixels = ((video.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).numpy()


def blocks_for(view: int) -> dict[str, int]:
    """Block sizes for a frame of this size: 16 tokens at 64 px, 64 at 128 px, 16 blocks a frame."""
    size = 16 if view <= 64 else 64
    return {"block_q": size, "block_k": size}


def compared(
    model: CausalWan, clip: Clip, rules: dict[str, dict | None], *, seed: int = 0
) -> dict[str, dict]:
    """Rollouts of the same clips and noise under several rules.

    Args:
        model: the world model.
        clip: examination clips.
        rules: label -> settings of :func:`lightforcing.patched`, or None for dense.
        seed: of the noise.

    Returns:
        label -> ``video`` ``[B, F, 3, V, V]``, ``scores`` (:func:`score`), ``seconds``, and
        ``stats`` of the handle (None for dense).
    """
    found = {}
    for label, settings in rules.items():
        with contextlib.ExitStack() as stack:
            handle = None
            if settings is not None:
                handle = stack.enter_context(
                    lf.patched(model, **(blocks_for(clip.view) | settings))
                )
            begin = time.perf_counter()
            video = rollout(model, clip, seed=seed)
            if video.is_cuda:
                torch.cuda.synchronize(video.device)
            seconds = time.perf_counter() - begin
            stats = None if handle is None else handle.stats()
        scores = score(video, clip)
        found[label] = dict(video=video, scores=scores, seconds=seconds, stats=stats)
    return found


def draw(
    clip: Clip, found: dict[str, dict], folder: str | Path, *, number: int = 0, scale: int = 3
) -> list[Path]:
    """Writes contact sheet, GIF and MP4 of one of the clips; their paths.

    Args:
        clip: the truth.
        found: from :func:`compared`.
        folder: where the files go.
        number: which clip.
        scale: pixels for a pixel.
    """
    from .. import pictures

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    videos = {"truth": frames(clip.video[number])}
    notes = {"truth": ""}
    for label, one in found.items():
        videos[label] = frames(one["video"][number])
        notes[label] = f"{one['scores']['all'][number]:.1f} dB"
    count = len(videos["truth"])
    chunks = range(count // CHUNK)
    asked = clip.flags[number].view(len(chunks), CHUNK, 2)[:, 0].tolist()
    kinds = [", ".join(n for n, a in zip(("easy", "hard"), pair) if a) for pair in asked]  # noqa: B905
    columns = [
        (f"chunk {c + 1}", "given" if c < clip.given else kinds[c] and f"{kinds[c]} glyph")
        for c in chunks
    ]
    sheet = pictures.contact_sheet(
        {f"{label}\n{notes[label]}": v[1::CHUNK] for label, v in videos.items()},
        columns,
        "A video whose true continuation is known, continued from its first frames",
        "Middle frame of every chunk; same weights and same noise in every row. PSNR against the "
        "truth over the generated frames of this clip.",
        scale,
    )
    captions = [
        f"frame {f + 1} of {count}" + (", given" if f < CHUNK * clip.given else "")
        for f in range(count)
    ]
    pages = pictures.side_by_side(videos, captions, scale)
    paths = [folder / name for name in ("contact-sheet.png", "video.gif", "video.mp4")]
    sheet.save(paths[0])
    pictures.save_gif(paths[1], pages, FPS)
    pictures.save_mp4(paths[2], pages, FPS)
    return paths
