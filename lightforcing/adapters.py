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
import os
import types
from collections.abc import Iterator, Mapping
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
        grid: rows and columns of a frame's tokens; None where the arguments do not tell.
        order: how the tokens of a frame lie in it: ``raster`` or ``morton``.
        sink: first frames that a rolling window never drops.
    """

    start: int
    frame_tokens: int | None = None
    window: int | None = None
    cache: int = 0
    keys: torch.Tensor | None = None
    grid: tuple[int, int] | None = None
    order: str = "raster"
    sink: int = 0


class Adapter:
    """One family of models. Stateless and picklable; subclass and register an instance."""

    name = "adapter"

    def find(self, modules: list[torch.nn.Module]) -> list[Any]:
        """The attention layers among ``modules``, first layer first; an empty list if none.

        ``modules`` are all that the patched target holds, pipelines and wrappers looked through.
        The attribute ``forward`` of what is returned gets wrapped, per instance.
        """
        raise NotImplementedError

    def missing(self, modules: list[torch.nn.Module]) -> str:
        """A sentence that says what was looked for, and what was missing."""
        return f"{self.name}: no layer found."

    def context(self, layer, arguments: dict[str, Any]) -> Call | str:
        """The facts of a call from the arguments of ``layer.forward`` by name.

        A string is the reason why the forward must stay dense.
        """
        raise NotImplementedError

    def heads(self, layer) -> int | None:
        """Attention heads of a layer; None where it does not tell."""
        return None

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

    def find(self, modules):
        """The innermost modules that keep the contract."""
        found = [m for m in modules if not self._failed(type(m), m)]
        chosen = set(map(id, found))
        return [m for m in found if not any(id(x) in chosen for x in m.modules() if x is not m)]

    def missing(self, modules):
        """What was looked for, and the nearest classes with the conditions that they failed."""
        classes = {}
        for module in modules:
            classes.setdefault(type(module), []).append(module)
        near = [(c, len(ms), self._failed(c, ms[0])) for c, ms in classes.items()]
        near = sorted((n for n in near if len(n[2]) < 3), key=lambda n: len(n[2]))[:3]
        text = (
            "Looked for modules that have num_heads, and whose forward has a parameter kv_cache "
            f"and calls a global function {self.function}(q, k, v)"
        )
        if not near:
            return f"{text}; no module has any of the three."
        nearest = (
            f"{c.__qualname__} ({count} of them) fails in that {' and '.join(failed)}"
            for c, count, failed in near
        )
        return f"{text}. Nearest: {'; '.join(nearest)}."

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
        if type(start) is not int:
            start = _integer(start)
            if start is None:
                return reasons.NO_POSITION
        keys = cache.get("k") if isinstance(cache, dict) else None
        grid, sink = _grid(arguments), _attribute(layer, "sink_size")
        return Call(  # by place, which takes a third of the time
            start,
            grid[0] * grid[1] if grid else _frame_tokens(arguments),
            _window(_attribute(layer, "local_attn_size")),
            id(cache),
            keys if isinstance(keys, torch.Tensor) else None,
            grid,
            _attribute(layer, "token_order") or "raster",
            sink if isinstance(sink, int) and sink > 0 else 0,
        )

    def heads(self, layer):
        """``num_heads``, which the contract asks for."""
        return _integer(layer.num_heads)

    def install(self, layer, user):
        """Replace the name in the namespaces that the class's methods look it up in."""
        for method in callers(type(layer), self.function):
            hook.intercept(method.__globals__, self.function, user)

    def remove(self, layer, user):
        """Restore the name when nobody else uses it."""
        for method in callers(type(layer), self.function):
            hook.release(method.__globals__, self.function, user)


def _attribute(layer, name):
    """The attribute, or None; asking a module for one that it lacks takes microseconds."""
    own = layer.__dict__
    return own[name] if name in own else getattr(type(layer), name, None)


def _integer(value):
    """A Python integer from an integer of another kind, never from a tensor on a device."""
    if isinstance(value, torch.Tensor) and value.is_cpu and value.numel() == 1:
        value = value.item()
    return value if isinstance(value, int) else None


def _grid(arguments):
    grid = arguments.get("grid_sizes")
    if isinstance(grid, torch.Tensor):
        grid = grid.tolist() if grid.is_cpu else None  # never a device sync
    row = grid[0] if isinstance(grid, (list, tuple)) and grid else None
    if isinstance(row, (list, tuple)) and len(row) == 3 and row[1] * row[2]:
        return int(row[1]), int(row[2])
    return None


def _frame_tokens(arguments):
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
def _known(forward):
    """Names of the parameters of a class's ``forward``, and its defaults."""
    known = parameters(inspect.unwrap(forward))
    empty = inspect.Parameter.empty
    return tuple(known), {n: default for n, default in known.items() if default is not empty}


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
    names, defaults = _known(type(module).forward)
    arguments = dict(zip(names, args))  # noqa: B905 - zip(strict=) takes twice as long
    if kwargs:
        arguments |= kwargs
    return arguments if len(arguments) == len(names) else {**defaults, **arguments}


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


def places(target):
    """The modules of the target; then, for a module, with those in its plain attributes."""
    yield list(modules_of(target))
    if isinstance(target, torch.nn.Module):
        yield list(modules_of([target, vars(target)]))


def _is_state(target):
    """Is it a state dict: weights without their model?"""
    values = list(target.values()) if isinstance(target, Mapping) else []
    return bool(values) and all(isinstance(x, torch.Tensor) for x in values)


def find(target):
    """The first adapter that finds layers in ``target``, these layers, and all its modules.

    Raises:
        ValueError: no adapter found any; the sentence says what was looked for.
    """
    if isinstance(target, (type, str, os.PathLike)) or _is_state(target):
        kind = f"the class {target.__name__}" if isinstance(target, type) else type(target).__name__
        raise ValueError(f"target: expected a model instance, or what holds one, got {kind}")
    adapters = [*_adapters, GlobalAttention()]
    for modules in places(target):
        for adapter in adapters:
            layers = adapter.find(modules)
            if layers:
                return adapter, layers, modules
    what = f"{type(target).__name__} ({len(modules)} modules)"
    raise ValueError(
        " ".join(
            [
                f"target: expected a model with causal self-attention, got {what}.",
                *(a.missing(modules) for a in adapters),
            ]
        )
    )
