"""The demo: one causal video model, dense and sparse from the same noise, side by side.

No trained weights ship, so the model is :class:`lightforcing.models.CausalWan` in its tiny size
with seeded random weights (:func:`weights`). The pictures are abstract; they show what sparse
attention changes, and nothing about the quality of real videos.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import lightforcing as lf

from . import pictures
from .models import CausalWan, Rollout, WanConfig

FPS = 5  # of the files: a latent frame is shown for a fifth of a second
PROBE = 32  # query rows of a call whose recall is measured, in a third rollout that is not timed
SCALE = 4  # pixels for a latent pixel
HONEST = (
    "The weights are random: the pictures are abstract and say nothing about the quality of real "
    "videos."
)


def weights(model: CausalWan, seed: int) -> None:
    """Seeded random weights whose rollout is a picture instead of the noise it started from.

    The first ``4 * in_dim`` channels carry the noisy patch unchanged to the head, which subtracts
    it; the layers read and write the other channels only. What remains is what attention made of
    the noise: averages over the neighbourhood that its random positional bias prefers, in this
    chunk and in the cached ones.
    """
    model.init_weights(seed)
    config, draw = model.config, torch.Generator().manual_seed(seed)
    carried = 4 * config.in_dim
    identity = torch.eye(carried)
    patch = torch.zeros(config.dim, carried)
    patch[:carried] = identity
    model.patch_embedding.weight.data.copy_(patch.view_as(model.patch_embedding.weight))
    for i, block in enumerate(model.blocks):
        attention, ffn = block.self_attn, block.ffn
        attention.q.bias.data.normal_(0.0, 1.0, generator=draw)
        attention.k.bias.data.copy_(attention.q.bias.data)
        for norm in (attention.norm_q, attention.norm_k):
            norm.weight.data.fill_(3.0)  # the sharper the attention, the finer the picture
        for reads in (attention.q, attention.k, ffn[0]):
            reads.weight.data[:, :carried] = 0
        # The first layer averages white noise, which leaves little of it; the others refine.
        for writes, gain in ((attention.o, 6.0), (ffn[2], 1.0)):
            writes.weight.data[:carried] = 0
            writes.weight.data.mul_(gain if i == 0 else 0.1 * gain)
    # Rows of the head are (2, 2, out_dim); all four pixels of a patch show the same colour. The
    # factor 3.6 makes x0 = x - 0.625 v lose the noise at the last step (0.625 is its level): the
    # head's layer norm divides by about 2.25 first.
    head = torch.zeros(4, config.out_dim, config.dim)
    head[:, :, :carried] = 3.6 * identity.view(config.in_dim, 4, carried).transpose(0, 1)
    colours = torch.randn(config.out_dim, config.dim - carried, generator=draw)
    head[:, :, carried:] = colours * (config.dim - carried) ** -0.5
    model.head.head.weight.data.copy_(head.flatten(0, 1))
    model.time_embedding[2].weight.data.zero_()  # no modulation, which would spoil the difference


def rollout(model: CausalWan, options, label: str) -> tuple[np.ndarray, list[float]]:
    """One rollout with a progress bar: latents ``[F, C, h, w]`` and seconds of each chunk."""
    sampler = Rollout(model)
    total = sampler.forwards_per_chunk * len(sampler.chunk_ends(options.num_frames))
    with tqdm(total=total, desc=f"{label:<16}", unit="forward", disable=None) as bar:
        video = sampler.generate(
            options.num_frames,
            size=options.size,
            seed=options.seed,
            progress=lambda chunk, count: bar.update(),
        )
    return video.latents[0].float().numpy(), [chunk.seconds for chunk in video.chunks]


def run(options, config) -> dict:
    """Dense, sparse, and sparse once more with recall measured; writes the files.

    Args:
        options: num_frames, size (rows and columns of a latent frame), seed, out (a folder).
        config: the :class:`lightforcing.Config` of the sparse run.

    Returns:
        What report.json holds.

    Raises:
        ValueError: the frames are not whole chunks, or a side of the frame is odd.
    """
    window = {} if config.window is None else {"window_frames": config.window}
    model = CausalWan(WanConfig.named("tiny", **window), seed=None)
    weights(model, options.seed)
    print(
        f"3 rollouts of {options.num_frames} frames of "
        f"{model.config.frame_tokens(*options.size)} tokens: dense, sparse, and sparse with its "
        "recall measured",
        file=sys.stderr,
    )
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    dense, dense_seconds = rollout(model, options, "dense")
    with lf.patched(model, config=config) as handle:
        sparse, sparse_seconds = rollout(model, options, "sparse")
        text = handle.report()
    with lf.patched(model, config=config, probe=PROBE) as handle:
        probed, _ = rollout(model, options, "sparse, measured")
        stats = handle.stats()
    same = bool(np.array_equal(sparse, probed))
    chunks = []
    size = model.config.frames_per_chunk
    for i, (a, b) in enumerate(zip(dense_seconds, sparse_seconds, strict=True)):
        frames, measured = slice(i * size, (i + 1) * size), stats["chunks"][i]
        error = np.sqrt(np.mean((dense[frames] - sparse[frames]) ** 2)) / dense[frames].std()
        chunks.append(
            {
                "chunk": i + 1,
                "dense_seconds": a,
                "sparse_seconds": b,
                "density": measured["density"],
                "recall": measured["recall"],
                "difference": float(error),
            }
        )
    result = {
        "note": HONEST,
        "model": "CausalWan tiny, random weights",
        "frame": {"rows": options.size[0], "columns": options.size[1]},
        "frame_tokens": model.config.frame_tokens(*options.size),
        "num_frames": options.num_frames,
        "seed": options.seed,
        "threads": lf.info()["threads"],
        "isa": lf.info()["isa"],
        "torch": torch.__version__,
        "config": config.to_dict(),
        "dense_seconds": sum(dense_seconds),
        "sparse_seconds": sum(sparse_seconds),
        "chunks": chunks,
        "measuring_changes_nothing": same,
        "report": text,
    }
    result["files"] = draw(folder, dense, sparse, result)
    (folder / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def draw(folder: Path, dense: np.ndarray, sparse: np.ndarray, result: dict) -> list[str]:
    """Write the contact sheet, the GIF and the MP4; their paths."""
    palette, chunks = pictures.Palette(dense), result["chunks"]
    videos = {
        "dense": palette.frames(dense),
        "sparse": palette.frames(sparse),
        "difference": palette.difference(dense, sparse),
    }
    per_chunk = len(dense) // len(chunks)
    labels = {
        "dense": "all keys",
        "sparse": f"sparsity {result['config']['sparsity']:g}",
        "difference": "black: one std",
    }
    columns = [
        (f"chunk {c['chunk']}", "all kept" if c["recall"] is None else f"{c['density']:.0%} kept")
        for c in chunks
    ]
    middles = range(per_chunk // 2, len(dense), per_chunk)
    note = (
        f"Middle frame of every chunk; {result['frame_tokens']} tokens a frame, "
        f"{len(dense)} frames. {HONEST}\n"
        "Colours: a fixed projection of the 16 latent channels, centred frame by frame on the "
        "dense video.\n"
        "Difference: root mean square over the channels against the dense video's spread in a "
        "frame."
    )
    sheet = pictures.contact_sheet(
        {f"{k}\n{labels[k]}": v[list(middles)] for k, v in videos.items()},
        columns,
        f"Same noise, same random weights: dense and sparse attention ({summary_line(result)})",
        note,
        SCALE,
    )
    captions = []
    for f in range(len(dense)):
        c = chunks[f // per_chunk]
        kept = "dense" if c["recall"] is None else f"{c['density']:.0%} of the keys kept"
        recall = "" if c["recall"] is None else f", holding {c['recall']:.0%} of the attention"
        captions.append(f"frame {f + 1} of {len(dense)}, chunk {c['chunk']}: {kept}{recall}")
    frames = pictures.side_by_side(videos, captions, SCALE)
    names = [folder / n for n in ("contact-sheet.png", "video.gif", "video.mp4")]
    sheet.save(names[0])
    pictures.save_gif(names[1], frames, FPS)
    pictures.save_mp4(names[2], frames, FPS)
    return [str(n) for n in names]


def summary_line(result: dict) -> str:
    """Preset in words, such as ``sparsity 0.8, mass scores, law count``."""
    config = result["config"]
    return f"sparsity {config['sparsity']:g}, {config['score']} scores, law {config['law']}"


def summary(result: dict) -> str:
    """What the command prints when it is done."""
    lines = ["", "chunk  dense s  sparse s  kept   recall  difference"]
    for c in result["chunks"]:
        recall = "     -" if c["recall"] is None else f"{c['recall']:6.1%}"
        lines.append(
            f"{c['chunk']:>5}  {c['dense_seconds']:7.2f}  {c['sparse_seconds']:8.2f}  "
            f"{c['density']:4.0%}   {recall}  {c['difference']:10.3f}"
        )
    a, b = result["dense_seconds"], result["sparse_seconds"]
    lines += [
        f"total  {a:7.2f}  {b:8.2f}  ({a / b:.2f}x, everything else in the model included)",
        "recall: share of the dense attention mass that the kept keys hold; difference: root mean",
        "square against the dense latents, in units of their spread, through all chunks so far",
        "",
        result["report"],
        "",
        HONEST,
        "wrote "
        + ", ".join(result["files"])
        + f" and {Path(result['files'][0]).parent}/report.json",
    ]
    return "\n".join(lines)
