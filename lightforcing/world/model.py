"""The world model: the causal Wan of :mod:`lightforcing.models` on pixels, and its rollout.

Pixels become latents by space-to-depth: 2 x 2 pixels of 3 colours are 12 channels, so that Wan's
patch of 2 x 2 latents makes a token of 4 x 4 pixels: 256 tokens a frame at 64 px, 1024 at 128 px.
The same weights serve both sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..models import CausalWan, Rollout, WanConfig
from .data import CHUNK, Clip
from .draws import noise

SIGMAS = (1.0, 0.9, 0.75, 0.5)
"""Noise levels of the sampler's steps."""
PIXELS = 2
"""Pixels of a latent's side."""
TOKEN = 4
"""Pixels of a token's side."""


def _sizes(dim, heads, layers, **changes):
    options = dict(
        dim=dim,
        ffn_dim=4 * dim,
        num_heads=heads,
        num_layers=layers,
        in_dim=3 * PIXELS**2,
        out_dim=3 * PIXELS**2,
        cross_attention=False,
        frames_per_chunk=CHUNK,
        qk_norm="head",
        token_order="morton",
        rope_theta=100.0,
        camera=True,
        flags=2,
    )
    return WanConfig(**(options | changes))


MODELS = {
    "narrow": _sizes(256, 4, 8),  # 6.9 million weights; what is shipped
    "full": _sizes(384, 6, 8),  # 15.3 million
    "tiny": _sizes(64, 1, 2, freq_dim=64),  # 0.15 million, for tests
}


def new_model(name: str = "narrow", *, seed: int = 0, device=None, dtype=None) -> CausalWan:
    """An untrained world model as training begins: every residual branch and the head add zero.

    Args:
        name: ``"narrow"``, ``"full"`` or ``"tiny"``.
        seed: of the weights, drawn on the CPU.
        device: of the model.
        dtype: of the weights.

    Raises:
        ValueError: no model has this name.
    """
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    model = CausalWan(MODELS[name], seed=None, device="cpu", dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.zero_()
            else:
                bound = (3 / weight[0].numel()) ** 0.5 / 3**0.5  # as nn.Linear draws
                weight.uniform_(-bound, bound, generator=draw)
        silent = [model.head.head, model.time_projection[1]]
        for block in model.blocks:
            silent += [block.self_attn.o, block.ffn[2]]
            block.self_attn.norm_q.weight.fill_(1.0)
            block.self_attn.norm_k.weight.fill_(1.0)
            block.modulation.zero_()[:, [2, 5]] = 1.0
        for layer in silent:
            layer.weight.zero_()
        model.head.modulation.zero_()
        # The head adds the embedded time to its shift and scale: that must begin near 0.
        model.time_embedding[2].weight.mul_(0.1)
        model.flag_embedding.weight.normal_(0.0, 0.02, generator=draw)
    return model.to(device, dtype)


def to_latents(video: torch.Tensor) -> torch.Tensor:
    """Pixels ``[B, F, 3, V, V]`` to latents ``[B, F, 12, V/2, V/2]``."""
    return F.pixel_unshuffle(video.flatten(0, 1), PIXELS).unflatten(0, video.shape[:2])


def to_pixels(latents: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`to_latents`."""
    return F.pixel_shuffle(latents.flatten(0, 1), PIXELS).unflatten(0, latents.shape[:2])


def conditions(clip: Clip) -> dict[str, torch.Tensor]:
    """Camera in latent pixels and flags, as the model takes them: ``[B, F, 2]`` float32 each."""
    return {"camera": clip.camera.float() / PIXELS, "flags": clip.flags.float()}


def rollout(
    model: CausalWan,
    clip: Clip,
    *,
    seed: int = 0,
    given: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """The clips continued from their first chunks, by the model as it is, patched or not.

    Args:
        model: from :func:`lightforcing.world.load_world`.
        clip: B clips, whose first ``given`` chunks, camera and flags are used.
        seed: of the noise, together with the clip's own: the same for every rule and device.
        given: chunks taken from the clip; None takes ``clip.given``.
        progress: called after each forward with the chunk and the forward within it.

    Returns:
        ``[B, F, 3, V, V]`` float32 on the model's device.

    Raises:
        TypeError: another kind of model or clip, or chunks that are not an integer.
        ValueError: the clip has not so many chunks.
    """
    if not hasattr(model, "config") or not hasattr(model, "device"):  # a compiled one has them
        raise TypeError(f"model: expected one of load_world(), got {type(model).__name__}")
    if not isinstance(clip, Clip):
        raise TypeError(f"clip: expected a Clip of clips(), got {type(clip).__name__}")
    if given is not None:
        if not isinstance(given, int) or isinstance(given, bool):
            raise TypeError(f"given: expected a number of chunks, got {given!r}")
        most = clip.video.shape[1] // CHUNK
        if not 1 <= given <= most:
            raise ValueError(f"given: expected 1 to {most} chunks, got {given}")
    chunks = sampler(model).stream(
        **arguments(model, clip, seed=seed, given=given), progress=progress
    )
    return to_pixels(torch.cat([chunk.latents for chunk in chunks], 1).float())


def sampler(model: CausalWan) -> Rollout:
    """The few-step sampler of the world model: a pass for each of SIGMAS and one for the cache."""
    steps = [1000 * sigma for sigma in SIGMAS]
    return Rollout(model, steps=steps, shift=1.0, warp=False, clamp=1.0)


def arguments(model: CausalWan, clip: Clip, *, seed: int = 0, given: int | None = None) -> dict:
    """What :meth:`Rollout.stream` takes for these clips."""
    clip = clip.to(model.device)
    given = clip.given if given is None else given
    shape = (clip.view // PIXELS,) * 2

    def draw(size, start, step):
        return noise(clip.seeds, size[1:], start // CHUNK, step, seed)

    return dict(
        num_frames=clip.video.shape[1],
        size=shape,
        batch=len(clip),
        seed=draw,
        given=to_latents(clip.video[:, : given * CHUNK]),
        **conditions(clip),
    )


def weights_of(model: nn.Module) -> int:
    """How many weights a model has."""
    return sum(math.prod(w.shape) for w in model.parameters())
