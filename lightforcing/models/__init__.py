"""A causal Wan video transformer and its few-step rollout, in plain PyTorch.

What the demo, the tests and the notebooks run: no checkout and no download needed. The weights of
Wan 2.1, Self Forcing and the models that keep their names load with :func:`load_wan`, and
:func:`lightforcing.patch` treats the model like any other autoregressive code base.

    model = CausalWan(WanConfig.named("tiny"))
    for chunk in Rollout(model).stream(9, size=(24, 40), seed=0):
        print(chunk.index, chunk.latents.shape, chunk.seconds)
"""

from .cache import WanCache
from .config import WanConfig
from .flow import FlowSchedule
from .loading import load_wan, save_wan
from .rollout import Chunk, Rollout, Video
from .wan import CausalWan

__all__ = [
    "CausalWan",
    "Chunk",
    "FlowSchedule",
    "Rollout",
    "Video",
    "WanCache",
    "WanConfig",
    "load_wan",
    "save_wan",
]
