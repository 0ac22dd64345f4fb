"""Block-sparse attention for autoregressive video diffusion, patched in with one line.

    import lightforcing
    lightforcing.patch(model)

Importing needs NumPy only; ``patch`` and its companions are loaded when first used, and torch with
them.
"""

from ._version import __version__
from .blocks import BlockList
from .build import info, warmup
from .ops import (
    attention,
    block_sparse_attention,
    compress,
    plan_selection,
    select_blocks,
    set_num_threads,
)
from .schedule import Schedule, cag_schedule

# Loaded when first asked for: from .config (no torch), from .patching and .capturing (torch).
_LATER = dict.fromkeys(("Config", "PRESETS"), ".config") | dict.fromkeys(
    (
        "Adapter",
        "Call",
        "Handle",
        "StrictError",
        "dense",
        "handle_of",
        "patch",
        "patched",
        "register_adapter",
    ),
    ".patching",
)
_LATER |= {"capture": ".capturing"}

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
    "capture",
    "compress",
    "dense",
    "handle_of",
    "info",
    "patch",
    "patched",
    "plan_selection",
    "register_adapter",
    "select_blocks",
    "selectors",
    "set_num_threads",
    "warmup",
]


def __getattr__(name: str):
    """The names that are loaded late."""
    import importlib

    if name == "selectors":
        return importlib.import_module(".selectors", __name__)
    if name in _LATER:
        globals()[name] = getattr(importlib.import_module(_LATER[name], __name__), name)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, also those not loaded yet."""
    return sorted({*globals(), *__all__})
