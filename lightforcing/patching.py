"""One line in front of somebody's pipeline: ``lightforcing.patch(pipeline)``, and undone exactly.

Every causal self-attention layer of the target gets an instance attribute ``forward`` (see
:mod:`lightforcing.hook`), and the global function through which these layers make their dense
call is stood in for. No parameter, buffer, submodule, state-dict key or class is touched. The
:class:`Handle` decides call by call; a dense call goes to the original function, bit for bit.
"""

import contextlib

import torch

from . import adapters, hook, reasons
from .adapters import Adapter, Call, register_adapter
from .build import warmup
from .config import Config
from .handle import Handle
from .reasons import StrictError

__all__ = ["Adapter", "Call", "Config", "Handle", "StrictError", "dense", "handle_of", "patch",
           "patched", "register_adapter"]  # fmt: skip


def patch(target, preset="balanced", *, sparsity=None, config=None, strict=False, **overrides):
    """Make the causal self-attention of a model block-sparse, in place.

    Patching again replaces all settings and returns the same handle. Training forwards, and
    calls the kernels cannot take, stay dense. ``torch.compile`` works, before or after, with
    graph breaks around every attention call (so not with ``fullgraph=True``). While the
    environment says ``LIGHTFORCING_DISABLE=1`` every call stays dense.

    Args:
        target: a model, or a pipeline that holds one; wrappers are looked through.
        preset: ``balanced``, ``quality``, ``fast``, ``paper`` or ``paper-long``.
        sparsity: one number in place of the preset's: the mean share of query-key pairs that
            are not attended, in [0, 1). 0 leaves everything dense.
        config: a :class:`Config` (or its dict) in place of the preset.
        strict: raise :class:`StrictError` where a call would stay dense for a reason that nobody
            asked for (an unsupported dtype, say).
        **overrides: any fields of :class:`Config`.

    Returns:
        A :class:`Handle`: ``report()``, ``stats()``, ``explain()``, ``reset()``, ``unpatch()``.

    Raises:
        ValueError: nothing to patch was found, and what was missing; or a setting out of range.
        TypeError: a setting that does not exist, or of the wrong kind.
        RuntimeError: the model is on a GPU and this build has no CUDA kernels.
    """
    if isinstance(config, dict):
        config = Config.from_dict(config)
    if config is not None and not isinstance(config, Config):
        raise TypeError(f"config: expected a Config or a dict, got {config!r}")
    if config is not None and preset != "balanced":
        raise TypeError(f"preset: expected none beside config, got {preset!r}")
    if config is None:
        config = Config.preset(preset, sparsity=sparsity, **overrides)
    else:
        config = config.replace(sparsity=sparsity, **overrides)
    if not isinstance(strict, bool):
        raise TypeError(f"strict: expected True or False, got {strict!r}")
    if strict:
        config = config.replace(strict=True)
    adapter, layers, modules = adapters.find(target)
    devices = _cuda_devices(layers)
    warmup(*devices)
    hooks = [hook.hook_of(layer) for layer in layers]
    handle = next((h.handle for h in hooks if h is not None and h.handle is not None), None)
    if handle is not None and type(handle.adapter) is not type(adapter):
        handle.unpatch()  # patched before this adapter was registered
        handle = None
    fresh = handle is None
    if fresh:
        handle = Handle(config, adapter)
    handle.take(layers, modules)
    try:
        handle.update(config)
    except (TypeError, ValueError):  # settings that these layers contradict
        if fresh:
            handle.unpatch()
        raise
    return handle


@contextlib.contextmanager
def patched(target, preset="balanced", **settings):
    """Patch for the length of a ``with`` block, which gets the handle; arguments as :func:`patch`.

    A target that was patched before gets its settings and counts back instead.
    """
    before = handle_of(target)
    state = before and (before.config, before.record)
    handle = patch(target, preset, **settings)
    try:
        yield handle
    finally:
        if before is None:
            handle.unpatch()
        else:
            handle.update(state[0])
            handle.record = state[1]


@contextlib.contextmanager
def dense():
    """Calls of this thread inside the block stay dense, through the original function. Nests."""
    hook.local.dense += 1
    try:
        yield
    finally:
        hook.local.dense -= 1


def handle_of(target):
    """The handle of a patched target, also of a copy or an unpickled one; None if unpatched."""
    for modules in adapters.places(target):
        for module in modules:
            found = hook.hook_of(module)
            if found is not None and found.handle is not None:
                return found.handle
    return None


def _cuda_devices(layers):
    """Indices of the CUDA devices the layers lie on; raises if this build cannot serve them."""
    devices = set()
    for layer in layers:
        tensors = layer.parameters() if isinstance(layer, torch.nn.Module) else ()
        device = next((t.device for t in tensors if t.device.type == "cuda"), None)
        if device is None:
            continue
        if not reasons.cuda_kernels():
            raise RuntimeError(
                f"target: expected a model on the CPU, got one on {device}, and this build of "
                "lightforcing has no CUDA kernels; build it where nvcc is on the PATH with "
                "`pip install --no-cache-dir --force-reinstall --no-deps .` in its source tree"
            )
        devices.add(device.index or 0)
    return sorted(devices)
