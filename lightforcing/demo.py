"""The demo: a video whose true continuation is known, continued by one model under several rules.

The model and the clips are those of :mod:`lightforcing.world`; its small trained weights come with
the package. Every rule starts from the same frames and the same noise and keeps the same share of
the key blocks, so what differs between the pictures is which blocks were kept.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

import lightforcing as lf

from . import pictures

FPS = 6  # of the files
PROBE = 32  # query rows of a call whose recall is measured, outside the timed part
SCALE = 3  # pixels for a pixel
BLOCK = 16  # tokens of a key block and rows of a query block: 16 blocks a frame of 64 x 64 pixels
RULES = {
    "dense": "all keys",
    "fast": "ours: mass scores",
    "paper": "the paper's rule",
    "window": "nearest blocks",
    "random": "any blocks",
}


def config(rule: str, sparsity: float, view: int, frames: int = 21) -> lf.Config:
    """The settings of a rule; ``window`` and ``random`` follow the paper's schedule.

    Args:
        rule: a key of :data:`RULES`.
        sparsity: mean share of the key blocks left out, but for ``dense``.
        view: pixels of a side, which decides the size of the blocks.
        frames: of the video.
    """
    size = max(BLOCK, BLOCK * (view // 64) ** 2)
    measured = {"block_q": size, "block_k": size, "num_frames": frames, "timing": True}
    if rule == "dense":
        return lf.Config(sparsity=0, **measured)
    preset = "fast" if rule == "fast" else "paper"
    selector = {"window": "sta", "random": "random"}.get(rule)
    chosen = {} if selector is None else {"selector": selector}
    return lf.Config.preset(preset, sparsity=sparsity, probe=PROBE, **measured, **chosen)


def run(options, model=None) -> dict:
    """Continue one clip by every rule; writes the files.

    Args:
        options: view (64 or 128), frames, clip (its number), seed (of the noise), sparsity, out (a
            folder).
        model: a world model on the CPU; None takes the package's.

    Returns:
        What report.json holds.

    Raises:
        ValueError: the frames are not whole chunks.
        FileNotFoundError: the package has no weights.
    """
    from . import world

    seeds = range(world.EXAM_SEED + options.clip, world.EXAM_SEED + options.clip + 1)
    clip = world.clips(seeds, view=options.view, frames=options.frames)
    if model is None:
        model = world.load_world(device="cpu")
    tokens = (options.view // 4) ** 2
    print(
        f"{len(RULES)} rollouts of {options.frames} frames of {tokens} tokens, the first "
        f"{world.CHUNK * clip.given} given",
        file=sys.stderr,
    )
    videos, rules = {"truth": clip.video}, {}
    forwards = 5 * (options.frames // world.CHUNK) - 4 * clip.given
    for rule, about in RULES.items():
        settings = config(rule, options.sparsity, options.view, options.frames)
        with (
            tqdm(total=forwards, desc=f"{rule:<8}", unit="forward", disable=None) as bar,
            lf.patched(model, config=settings) as handle,
        ):
            videos[rule] = world.rollout(
                model, clip, seed=options.seed, progress=lambda chunk, count, bar=bar: bar.update()
            )
            stats = handle.stats()
        scores = world.metrics.score(videos[rule], clip)
        rules[rule] = {"about": about, **measures(stats, scores), "config": settings.to_dict()}
    result = {
        "clip": options.clip,
        "seed": options.seed,
        "view": options.view,
        "frames": options.frames,
        "given_frames": world.CHUNK * clip.given,
        "frame_tokens": tokens,
        "threads": lf.info()["threads"],
        "isa": lf.info()["isa"],
        "rules": rules,
    }
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    result["files"] = draw(folder, clip, videos, result)
    (folder / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def measures(stats: dict, scores: dict) -> dict:
    """What is shown of a rollout: kept share, recall, seconds, PSNR by region, glyphs.

    Args:
        stats: of the handle.
        scores: of :func:`lightforcing.world.metrics.score`, for one clip.
    """
    later = [c for c in stats["chunks"] if c["chunk"] and c["chunk"] > 1]
    resident = [c["chunk"] for c in later]  # in chunks: so much a chunk sees
    values = {name: float(value[0]) for name, value in scores.items()}
    return {
        "density": float(np.average([c["density"] for c in later], weights=resident)),
        "recall": stats["recall"],
        "attention_seconds": stats["ms"] / 1e3,
        "psnr": {n: None if np.isnan(values[n]) else values[n] for n in ("all", "bare", "back")},
        "glyphs": {n: bool(values[f"glyph_{n}"]) for n in ("easy", "hard")},
        "ssim": values["ssim"],
    }


def draw(folder: Path, clip, videos: dict, result: dict) -> list[str]:
    """Write the contact sheet, the GIF and the MP4; their paths."""
    from .world import CHUNK, render

    shown = {name: render.frames(video[0]) for name, video in videos.items()}
    notes = {"truth": ["what the", "world does"]} | {
        name: below(rule) for name, rule in result["rules"].items()
    }
    chunks = range(result["frames"] // CHUNK)
    asked = clip.flags[0].unflatten(0, (-1, CHUNK))[:, 0].tolist()
    columns = [(f"chunk {c + 1}", _heading(c, clip.given, *asked[c])) for c in chunks]
    sheet = pictures.contact_sheet(
        {"\n".join([name, *notes[name]]): video[1::CHUNK] for name, video in shown.items()},
        columns,
        "A video continued from its first frames: same weights, same noise, same share of key "
        "blocks",
        "Middle frame of every chunk. PSNR against the true continuation, whole frame; recall: "
        "share of the dense attention that the kept keys hold.\n"
        "The camera goes over the world once in the given frames, then pans; a glyph that flashed "
        "there is asked for again where it says so.",
        SCALE,
    )
    captions = []
    for f in range(result["frames"]):
        given = ", given" if f < result["given_frames"] else ""
        captions.append(f"frame {f + 1} of {result['frames']}{given}")
    pages = pictures.side_by_side(shown, captions, SCALE, notes)
    names = [folder / n for n in ("contact-sheet.png", "video.gif", "video.mp4")]
    sheet.save(names[0])
    pictures.save_gif(names[1], pages, FPS)
    pictures.save_mp4(names[2], pages, FPS)
    return [str(n) for n in names]


def below(rule: dict) -> list[str]:
    """The lines under a rule's pictures."""
    recall = "" if rule["recall"] is None else f", recall {rule['recall']:.0%}"
    return [
        rule["about"],
        f"{rule['psnr']['all']:.1f} dB{recall}",
        f"attention {rule['attention_seconds']:.1f} s",
    ]


def _heading(chunk, given, easy, hard):
    if chunk < given:
        return "given"
    return " and ".join(n for n, there in (("easy", easy), ("hard", hard)) if there) + (
        " glyph" if easy or hard else ""
    )


def summary(result: dict) -> str:
    """What the command prints when it is done."""
    lines = [
        "",
        "rule     kept   recall  PSNR all    bare    back  glyphs easy hard  attention s",
    ]
    for name, rule in result["rules"].items():
        recall = "     -" if rule["recall"] is None else f"{rule['recall']:6.1%}"
        psnr = [
            "      -" if rule["psnr"][n] is None else f"{rule['psnr'][n]:7.2f}"
            for n in ("all", "bare", "back")
        ]
        right = ["right" if rule["glyphs"][n] else "wrong" for n in ("easy", "hard")]
        lines.append(
            f"{name:<8} {rule['density']:4.0%}   {recall}  {psnr[0]:>8} {psnr[1]} {psnr[2]}  "
            f"{right[0]:>11} {right[1]}  {rule['attention_seconds']:11.2f}"
        )
    lines += [
        "kept: share of the key blocks after the first chunk; PSNR in dB against the true",
        "continuation: whole frame, background seen before, regions that come back into view;",
        "recall: mean over the sparse forwards, of which fast gives the first few blocks;",
        "glyphs: right if the nearest of 16 patterns is the true one; a faint trace counts, and",
        "guessing is right 1 time in 16; attention: of the whole rollout, choosing blocks included",
        "wrote " + ", ".join([*result["files"], f"{Path(result['files'][0]).parent}/report.json"]),
    ]
    return "\n".join(lines)
