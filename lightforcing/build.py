"""What this build is, and getting it ready before the first call."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from . import _core
from ._version import __version__


def info() -> dict[str, Any]:
    """Facts of this build and machine, as plain values.

    Keys: ``version``; ``binary``, the extension's path; ``isa`` that the CPU operators run on,
    ``isas`` to be had here, ``threads``; ``cuda_built`` (a CUDA half is
    in the binary), ``cuda_kernels`` (it holds attention kernels), ``cuda_archs``, ``cuda_status``
    (CUDA's error number when asked for devices, 0 if none), ``cuda_driver``, ``cuda_runtime`` (as
    CUDA counts: 13000 is 13.0), ``cuda_devices``; ``numpy`` and ``torch`` versions, ``torch`` None
    while it is not imported.
    """
    torch = sys.modules.get("torch")
    facts = {"version": __version__, "binary": _core.__file__, **_core.build_info()}
    facts["cuda_kernels"] = False
    facts["cuda_archs"] = facts["cuda_archs"].split()
    facts["numpy"] = np.__version__
    facts["torch"] = None if torch is None else str(torch.__version__)
    return facts


def warmup() -> None:
    """Make the first call as fast as the next: starts the worker threads.

    ``patch`` calls it; calling it again costs microseconds.
    """
    x = np.zeros((1, max(1, _core.threads()), 1, 8), np.float32)
    _core.compress(x, None, lambda shape, dtype: np.empty(shape, dtype), 1, 4)
