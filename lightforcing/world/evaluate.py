"""The gates a world model must pass before anything is compared on it, and the table behind them.

A comparison of attention rules means something only if the dense model continues its clips well,
and if it must look far back to do so: restricted to the current and the previous chunk it has to
lose the glyphs and the regions that come back into view.
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch

from ..models import CausalWan
from ..models.rope import apply_rope
from .data import CHUNK, EXAM_SEED, GLYPHS, REGIONS, Clip, clips
from .metrics import means, psnr, score, squared_errors
from .model import rollout

NEAR_CHUNKS = 2
FAR = 0.15  # share of a head's attention beyond the near chunks that makes it look far back
ROWS = ("dense", "2 chunks", "last frame")
COLUMNS = (*REGIONS, "moving_first", "glyph_easy", "glyph_hard", "ssim", "drift")


def windowed(model: CausalWan, frames: int) -> CausalWan:
    """The same weights, looking back over ``frames`` frames only, its own chunk included."""
    config = dataclasses.replace(model.config, window_frames=frames, sink_frames=0)
    with torch.device("meta"):
        other = CausalWan(config, seed=None)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.requires_grad_(False).eval()


def measured(video: torch.Tensor, clip: Clip) -> dict[str, torch.Tensor]:
    """:func:`score`, and the PSNR of sprites in the first generated chunk as ``moving_first``."""
    first = CHUNK * clip.given
    errors = squared_errors(video, clip.to(video.device))["moving"]
    near = psnr(errors, slice(first, first + CHUNK))
    return score(video, clip) | {"moving_first": near.double().cpu()}


def examine(
    models: dict[str, CausalWan],
    *,
    view: int = 64,
    count: int = 256,
    batch: int = 64,
    sweep: str = "quick",
    seed: int = 0,
    progress=None,
) -> dict[str, dict[str, torch.Tensor]]:
    """Scores of several models on the same examination clips and noise.

    Args:
        models: name -> model, all on one device.
        view: pixels of a side.
        count: clips.
        batch: clips at a time.
        sweep: of the clips.
        seed: of the noise.
        progress: called with the clips done after each batch.

    Returns:
        name -> measure -> ``[count]`` float64; ``last frame`` repeats the last given frame.
    """
    device = next(iter(models.values())).device
    parts = {name: [] for name in (*models, "last frame")}
    for start in range(EXAM_SEED, EXAM_SEED + count, batch):
        seeds = range(start, min(start + batch, EXAM_SEED + count))
        clip = clips(seeds, view=view, sweep=sweep, device=device)
        for name, model in models.items():
            parts[name].append(measured(rollout(model, clip, seed=seed), clip))
        still = clip.video.clone()
        first = CHUNK * clip.given
        still[:, first:] = still[:, first - 1 : first]
        parts["last frame"].append(measured(still, clip))
        if progress is not None:
            progress(seeds.stop - EXAM_SEED)
    return {
        name: {key: torch.cat([p[key] for p in some]) for key in some[0]}
        for name, some in parts.items()
    }


def far_mass(model: CausalWan, clip: Clip, *, seed: int = 0, stride: int = 16) -> torch.Tensor:
    """Share of attention on frames older than two past chunks, in the last chunk.

    Args:
        model: dense, not patched.
        clip: some clips.
        seed: of the noise.
        stride: every so many query rows are measured.

    Returns:
        ``[layers, heads]`` float32 on the CPU, mean over clips, rows and the chunk's passes.
    """
    frames = clip.video.shape[1]
    found = [[] for _ in model.blocks]

    def watch(layer):
        def after(module, inputs, output):
            x, grid, freqs, _, cache, start = inputs
            tokens = int(grid[0, 1] * grid[0, 2])
            if start != (frames - CHUNK) * tokens:
                return
            q = apply_rope(module.queries(x), freqs)[:, ::stride]
            k = cache["k"][:, : cache["local_end_index"]]
            far = k.shape[1] - (1 + NEAR_CHUNKS) * CHUNK * tokens
            total = 0
            for one_q, one_k in zip(q, k, strict=True):  # a clip at a time: logits are large
                logits = torch.einsum("qhd,khd->hqk", one_q.float(), one_k.float())
                weight = (logits * module_scale(module)).softmax(-1)
                total = total + weight[:, :, :far].sum(-1).mean(-1)
            found[layer].append(total / len(q))

        return after

    with contextlib.ExitStack() as stack:
        for number, block in enumerate(model.blocks):
            handle = block.self_attn.register_forward_hook(watch(number))
            stack.callback(handle.remove)
        rollout(model, clip, seed=seed)
    return torch.stack([torch.stack(some).mean(0) for some in found]).cpu()


def module_scale(module) -> float:
    """The scale of a layer's logits, D^-0.5."""
    return (module.q.out_features // module.num_heads) ** -0.5


def gates(
    model: CausalWan,
    *,
    view: int = 64,
    count: int = 256,
    batch: int = 64,
    seed: int = 0,
    progress=None,
) -> dict:
    """Dense, restricted and repeated rollouts, and what must hold of them.

    Args:
        model: the weights to examine.
        view: pixels of a side.
        count: clips.
        batch: clips at a time.
        seed: of the noise.
        progress: called with the clips done.

    Returns:
        A dict for JSON: ``view``, ``clips``, ``rows`` (name -> measure -> mean), ``far_mass`` (by
        layer and head), ``gates`` (name, value, bound, whether it holds) and ``ok``.
    """
    models = {"dense": model, "2 chunks": windowed(model, NEAR_CHUNKS * CHUNK)}
    scores = examine(models, view=view, count=count, batch=batch, seed=seed, progress=progress)
    rows = {name: means(value) for name, value in scores.items()}
    few = clips(min(count, 4), view=view, device=model.device)
    mass = far_mass(model, few, seed=seed)
    dense, near, still = (rows[name] for name in ROWS)
    found = [
        _gate("PSNR of the first generated chunk, dB", dense["c1"], 24.0),
        _gate(
            "sprites in it, above repeating the last given frame, dB",
            dense["moving_first"] - still["moving_first"],
            6.0,
        ),
        _gate("easy glyph shown, %", 100 * dense["glyph_easy"], 80.0),
        _gate("hard glyph shown, %", 100 * dense["glyph_hard"], 80.0),
        _gate("easy glyph with 2 chunks in view, %", 100 * near["glyph_easy"], 20.0, least=False),
        _gate("hard glyph with 2 chunks in view, %", 100 * near["glyph_hard"], 20.0, least=False),
        _gate(
            "re-appearing regions, lost with 2 chunks in view, dB",
            dense["back"] - near["back"],
            6.0,
        ),
        _gate(
            f"heads with more than {FAR:.0%} of attention beyond two past chunks, %",
            100 * (mass >= FAR).float().mean().item(),
            30.0,
        ),
    ]
    return {
        "view": view,
        "clips": count,
        "seed": seed,
        "rows": rows,
        "far_mass": [[round(x, 4) for x in row] for row in mass.tolist()],
        "gates": found,
        "ok": all(gate["ok"] for gate in found),
    }


def _gate(name, value, bound, least=True):
    holds = value >= bound if least else value <= bound
    return {"name": name, "value": value, "bound": bound, "least": least, "ok": bool(holds)}


def table(result: dict) -> str:
    """What :func:`gates` found, as text."""
    chunks = [k for k in result["rows"]["dense"] if k[0] == "c" and k[1:].isdigit()]
    columns = [*chunks, *COLUMNS]
    lines = [f"{result['view']} px, {result['clips']} clips"]
    lines.append(f"{'':<12}" + "".join(f"{name[:7]:>8}" for name in columns))
    for name, row in result["rows"].items():
        lines.append(f"{name:<12}" + "".join(f"{row[key]:8.2f}" for key in columns))
    lines.append(f"a glyph is one of {GLYPHS}: chance is {1 / GLYPHS:.2f}, in % {100 / GLYPHS:.2f}")
    for gate in result["gates"]:
        sign = ">=" if gate["least"] else "<="
        holds = "holds" if gate["ok"] else "FAILS"
        lines.append(f"{holds}  {gate['value']:7.2f} {sign} {gate['bound']:g}  {gate['name']}")
    return "\n".join(lines)
