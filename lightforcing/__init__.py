"""Block-sparse attention for autoregressive video diffusion, patched in with one line.

    import lightforcing
    lightforcing.patch(model)

Importing needs NumPy only; ``patch`` and its companions need torch and load it when first used.
"""

from ._version import __version__
from .blocks import BlockList
from .build import info, warmup
from .config import PRESETS, Config
from .ops import (
    attention,
    block_sparse_attention,
    compress,
    plan_selection,
    select_blocks,
    set_num_threads,
)
from .schedule import Schedule, cag_schedule

_NEED_TORCH = {"patch", "patched", "dense", "Handle", "handle_of", "register_adapter"}
_NEED_TORCH |= {"Adapter", "Call", "StrictError"}

__all__ = [
    "PRESETS",
    "Adapter",
    "BlockList",
    "Call",
    "Config",
    "Handle",
    "Schedule",
    "StrictError",
    "__version__",
    "attention",
    "block_sparse_attention",
    "cag_schedule",
    "compress",
    "dense",
    "handle_of",
    "info",
    "patch",
    "patched",
    "plan_selection",
    "register_adapter",
    "select_blocks",
    "set_num_threads",
    "warmup",
]


def __getattr__(name: str):
    """The names that need torch, from ``lightforcing.patching`` when first asked for."""
    if name in _NEED_TORCH:
        import importlib

        module = importlib.import_module(".patching", __name__)
        globals().update({known: getattr(module, known) for known in _NEED_TORCH})
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
