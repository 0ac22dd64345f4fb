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
    facts["cuda_kernels"] = facts["cuda_built"]
    facts["cuda_archs"] = facts["cuda_archs"].split()
    facts["numpy"] = np.__version__
    facts["torch"] = None if torch is None else str(torch.__version__)
    return facts


def warmup(*devices: int) -> None:
    """Make the first call as fast as the next, and safe to capture in a CUDA graph.

    Starts the worker threads of the CPU operators, and loads every kernel on the given CUDA
    devices. ``patch`` calls it; calling it again costs microseconds.

    Args:
        *devices: indices of CUDA devices; none is torch's current one, once torch uses CUDA.

    Raises:
        NotImplementedError: a device is named and this build has no CUDA half.
        RuntimeError: CUDA refuses, for example because the driver is too old.
    """
    x = np.zeros((1, max(1, _core.threads()), 1, 8), np.float32)
    _core.compress(x, None, lambda shape, dtype: np.empty(shape, dtype), 1, 4, None)
    torch = sys.modules.get("torch")
    if not devices and torch is not None and torch.cuda.is_initialized() and info()["cuda_kernels"]:
        devices = (torch.cuda.current_device(),)
    for device in devices:
        _core.cuda_warmup(device)
