"""A small world that shows what attention forgets: procedural video, a model, its measures.

Nobody can see from seeded random weights what sparse attention does to a video, and real weights
are gigabytes. So here is a video generator whose true continuation is known, and a causal Wan of
:mod:`lightforcing.models` that was trained on it in minutes and ships with the package.

    from lightforcing import world
    model, clip = world.load_world(), world.clips(4)
    dense = world.rollout(model, clip)
    with lightforcing.patched(model, "fast", block_q=16, block_k=16):
        sparse = world.rollout(model, clip)
    print(world.metrics.score(sparse, clip)["bare"] - world.metrics.score(dense, clip)["bare"])

``python -m lightforcing.world train|evaluate|export|render`` trains, examines, packs and draws
another; how the shipped weights came about stands in ``weights/weights.md``.
"""

from . import metrics
from .data import CHUNK, EXAM_SEED, Clip, clips
from .evaluate import gates
from .model import rollout
from .weights import card, load_world

__all__ = [
    "CHUNK",
    "EXAM_SEED",
    "Clip",
    "card",
    "clips",
    "gates",
    "load_world",
    "metrics",
    "rollout",
]
