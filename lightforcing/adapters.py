"""How a family of models calls attention: the seam between them and the handle.

The default, :class:`GlobalAttention`, is written for a contract, not for a list of
repositories. A layer keeps it when its ``forward``

* has a parameter ``kv_cache``, and the module has ``num_heads``;
* with a cache, makes its dense call through a global function ``attention(q, k, v)``, shapes
  ``[B, L, H, D]``, RoPE applied, no mask, the query being the last rows of the keys;
* is told its position: ``current_start`` in tokens, counted over the video, and
  ``grid_sizes`` (``[B, 3]`` on the CPU) or ``frame_seqlen``.

For a family with another contract subclass :class:`Adapter` and call :func:`register_adapter`.
"""

import dis
import functools
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import hook, reasons


@dataclass(slots=True)
class Call:
    """What an adapter says of one forward of one layer with a cache.

    Args:
        start: first query token, counted over the whole video.
        frame_tokens: tokens of a latent frame, T; None where the arguments do not tell.
        window: most resident frames, None without a window.
        cache: any integer that tells the caches of two videos apart while both live.
        keys: the tensor in which the layer keeps its keys as attention sees them (RoPE applied,
            never moved). Only read while the forward runs. None: every call is a fresh tensor.
    """

    start: int
    frame_tokens: int | None = None
    window: int | None = None
    cache: int = 0
    keys: torch.Tensor | None = None


class Adapter:
    """One family of models. Stateless and picklable; subclass and register an instance."""

    name = "adapter"

    def find(self, target) -> list[Any]:
        """The attention layers of ``target``, first layer first; an empty list if there is none.

        Their attribute ``forward`` gets wrapped, per instance.
        """
        raise NotImplementedError

    def missing(self, target) -> str:
        """Sentences that say what was looked for in ``target``, and what was missing."""
        return f"{self.name}: no layer found."

    def context(self, layer, arguments: dict[str, Any]) -> Call | str:
        """The facts of a call from the arguments of ``layer.forward`` by name.

        A string is the reason why the forward must stay dense.
        """
        raise NotImplementedError

    def install(self, layer, user) -> None:
        """Send the dense call inside ``layer.forward`` through :func:`lightforcing.hook.route`.

        Called once for each layer, again for copies; ``user`` is the handle.
        """
        raise NotImplementedError

    def remove(self, layer, user) -> None:
        """Undo :meth:`install`."""
        raise NotImplementedError


class GlobalAttention(Adapter):
    """Layers that call a global function ``attention``; see the head of this file."""

    name = "global attention"
    function = "attention"

    def find(self, target):
        """The innermost modules that keep the contract, also inside wrappers and pipelines."""
        found = [m for m in modules_of(target) if not self._failed(type(m), m)]
        chosen = set(map(id, found))
        inner = (any(id(x) in chosen for x in m.modules() if x is not m) for m in found)
        return [m for m, has_inner in zip(found, inner, strict=True) if not has_inner]

    def missing(self, target):
        """What was looked for, and the nearest classes with the conditions that they failed."""
        seen = {}
        total = 0
        for module in modules_of(target):
            total += 1
            seen.setdefault(type(module), []).append(module)
        near = [(c, self._failed(c, ms[0]), len(ms)) for c, ms in seen.items()]
        near = sorted((n for n in near if len(n[1]) < 3), key=lambda n: len(n[1]))[:3]
        text = (
            f"no causal self-attention found in {type(target).__name__} ({total} modules); looked "
            f"for modules that have num_heads, whose forward has a parameter kv_cache and calls a "
            f"global function {self.function}(q, k, v)"
        )
        if not near:
            return text + ", and no module has any of the three."
        return (
            f"{text}. Nearest: "
            + "; ".join(
                f"{c.__qualname__} ({n} of them) fails in that {' and '.join(failed)}"
                for c, failed, n in near
            )
            + "."
        )

    def _failed(self, cls, module):
        failed = []
        if not hasattr(module, "num_heads"):
            failed.append("it has no num_heads")
        if "kv_cache" not in parameters(class_forward(cls)):
            failed.append("its forward has no parameter kv_cache")
        if not callers(cls, self.function):
            failed.append(f"it calls no global function {self.function}")
        return failed

    def context(self, layer, arguments):
        """Facts by name; arguments that this contract does not know are ignored."""
        cache = arguments.get("kv_cache")
        if cache is None:
            return reasons.TRAINING
        start = arguments.get("current_start", 0)
        if isinstance(start, torch.Tensor) and start.device.type == "cpu" and start.numel() == 1:
            start = start.item()
        if not isinstance(start, int):
            return reasons.NO_POSITION
        keys = cache.get("k") if isinstance(cache, dict) else None
        return Call(
            start=start,
            frame_tokens=_frame_tokens(arguments),
            window=_window(getattr(layer, "local_attn_size", None)),
            cache=id(cache),
            keys=keys if isinstance(keys, torch.Tensor) else None,
        )

    def install(self, layer, user):
        """Replace the name in the namespaces that the class's methods look it up in."""
        for method in callers(type(layer), self.function):
            hook.intercept(method.__globals__, self.function, user)

    def remove(self, layer, user):
        """Restore the name when nobody else uses it."""
        for method in callers(type(layer), self.function):
            hook.release(method.__globals__, self.function, user)


def _frame_tokens(arguments):
    grid = arguments.get("grid_sizes")
    if isinstance(grid, torch.Tensor):
        grid = grid.tolist() if grid.device.type == "cpu" else None  # never a device sync
    if grid:
        _, height, width = grid[0]
        return int(height * width)
    tokens = arguments.get("frame_seqlen")
    return tokens if isinstance(tokens, int) and tokens > 0 else None


def _window(size):
    """A layer's window in frames; some code bases give a list, of which the largest holds."""
    if isinstance(size, int):
        return size if size > 0 else None
    if hasattr(size, "__iter__") and not isinstance(size, (str, torch.Tensor)):
        return max((int(s) for s in size if int(s) > 0), default=None)
    return None


# ---- classes and their forwards ------------------------------------------------------------


def class_forward(cls):
    """The class's own ``forward`` function, without decorators; None if it has none."""
    return inspect.unwrap(cls.forward) if callable(getattr(cls, "forward", None)) else None


@functools.cache
def parameters(function):
    """Names of a method's parameters after self, in order, with their defaults."""
    try:
        signature = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError):
        return {}
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name: p.default for p in signature if p.kind not in kinds}


def bind(module, args, kwargs):
    """The arguments of ``module.forward`` by name, defaults included; unknown ones are kept."""
    known = parameters(class_forward(type(module)))
    arguments = {n: d for n, d in known.items() if d is not inspect.Parameter.empty}
    arguments.update(zip(known, args, strict=False))
    arguments.update(kwargs)
    return arguments


@functools.cache
def callers(cls, name):
    """The methods of ``cls`` and its bases that call a global function ``name`` of their file."""
    methods = [m for c in cls.__mro__ for m in vars(c).values() if callable(m)]
    methods = [m for m in map(inspect.unwrap, methods) if isinstance(m, types.FunctionType)]
    return [m for m in methods if callable(m.__globals__.get(name)) and _loads(m.__code__, name)]


def _loads(code, name):
    if name in code.co_names and any(
        i.opname == "LOAD_GLOBAL" and i.argval == name for i in dis.get_instructions(code)
    ):
        return True
    return any(_loads(c, name) for c in code.co_consts if isinstance(c, types.CodeType))


# ---- where modules hide --------------------------------------------------------------------

_LEAVES = (str, bytes, int, float, complex, bool, type(None), type, torch.Tensor,
           types.ModuleType, types.FunctionType, types.BuiltinFunctionType)  # fmt: skip


def modules_of(target) -> Iterator[torch.nn.Module]:
    """Every ``nn.Module`` in a module, or in the attributes of a plain pipeline object, once.

    Plain objects, lists, tuples and dicts are followed four levels deep.
    """
    seen = set()
    queue = [(target, 0)]
    for value, depth in queue:
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        if isinstance(value, torch.nn.Module):
            for module in value.modules():
                if id(module) not in seen:
                    seen.add(id(module))
                    yield module
            continue
        seen.add(id(value))
        if depth < 4:
            queue += [(v, depth + 1) for v in _contents(value)]


def _contents(value):
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    return list(getattr(value, "__dict__", {}).values())


_adapters: list[Adapter] = []


def register_adapter(adapter):
    """Add a family of models; later ones are asked first, the default contract last.

    Raises:
        TypeError: ``adapter`` is not an instance of :class:`Adapter`.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter: expected an instance of Adapter, got {adapter!r}")
    _adapters.insert(0, adapter)
    return adapter


def find(target):
    """The first adapter that finds layers in ``target``, and these layers.

    Raises:
        ValueError: no adapter found any; the sentence says what was looked for.
    """
    adapters = [*_adapters, GlobalAttention()]
    for adapter in adapters:
        layers = adapter.find(target)
        if layers:
            return adapter, layers
    raise ValueError("patch: " + " ".join(a.missing(target) for a in adapters))
