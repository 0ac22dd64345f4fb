"""Queries, keys and values of a running pipeline on disk, to judge block selectors by.

One safetensors file for each attention call that was asked for: ``q``, ``k`` and ``v`` as the layer
gave them to its dense call (QK-norm and RoPE applied), and what is known of the call as metadata.
The calls are seen where :func:`lightforcing.patch` sees them, so every model that can be patched
can be captured, patched or not.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path

import torch

from . import adapters, reasons
from .calls import logger
from .config import Config
from .handle import Handle
from .patching import handle_of

FORMAT = "lightforcing-capture-1"
SUFFIX = ".safetensors"
SCALES = ("softmax_scale", "scale")  # arguments of a dense call that leave it one we can describe


@dataclass(frozen=True)
class Facts:
    """What a file says of its call.

    Attributes:
        layer: of the captured ones, counted from 0.
        chunk: of the video, counted from 1.
        step: forwards of this chunk before this one; the clean pass counts as the last.
        number: calls with the same layer, chunk and step before: another video, or guidance.
        first_frame: first query frame, counted over the video.
        frame_tokens: tokens of a frame, T.
        grid: rows and columns of tokens, or None where the model did not tell.
        frames_per_chunk: f.
        window: most resident frames, or None.
        scale: factor of the logits.
        model: class of the attention layer.
        order: of the tokens of a frame, ``raster`` or ``morton``.
        sink_frames: first frames that the window never drops.
        patched: settings of the patch that was active, or None.
    """

    layer: int
    chunk: int
    step: int
    number: int
    first_frame: int
    frame_tokens: int
    grid: tuple[int, int] | None
    frames_per_chunk: int
    window: int | None
    scale: float
    model: str
    order: str = "raster"
    sink_frames: int = 0
    patched: dict | None = None

    @property
    def file(self) -> str:
        """The name of the file, without a folder."""
        name = f"layer{self.layer:02}-chunk{self.chunk:03}-step{self.step}"
        return f"{name}-{self.number}{SUFFIX}"


@dataclass(frozen=True)
class Captured:
    """One captured call: ``q`` ``[B, Lq, H, D]``, ``k`` and ``v`` ``[B, Lk, H, D]``, its facts."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    facts: Facts


class Watch:
    """Calls a function with every attention call that was asked for; also a context manager.

    Attributes:
        calls: how often it did.
        skipped: calls that were asked for and not given to it, counted by reason.
    """

    def __init__(self, handle, owned, see, wanted, grid):
        """Made by :func:`watch` and :func:`capture`."""
        self.calls, self.skipped = 0, Counter()
        self._handle, self._owned, self._config = handle, owned, handle.config
        self._give, self._wanted, self._grid = see, wanted, grid
        self._numbers, self._lock = Counter(), threading.Lock()
        self._here = threading.local()  # grid of the forward that runs in this thread

        # On the instance, so that a copy of the model captures nothing. The attribute on the
        # functions is what torch.compiler.disable sets, without loading it.
        def attend(visit, original, args, kwargs):
            out = Handle.attend(handle, visit, original, args, kwargs)
            self._see(visit, original, args, kwargs)
            return out

        def enter(hooked, args, kwargs):
            visit = Handle.enter(handle, hooked, args, kwargs)
            self._here.grid = adapters._grid(adapters.bind(hooked.module, args, kwargs))
            return visit

        for name, function in (("attend", attend), ("enter", enter)):
            function._torchdynamo_disable = True
            setattr(handle, name, function)
        handle.watch = self

    @property
    def active(self) -> bool:
        """Has it not been closed?"""
        return vars(self._handle).get("watch") is self

    def close(self) -> None:
        """See no further calls, and put back what was there. Harmless the second time."""
        if not self.active:
            return
        for name in ("attend", "enter", "watch"):
            del vars(self._handle)[name]
        if not self.calls:
            logger.warning(
                "capture: no call was captured; skipped: %s", dict(self.skipped) or "none"
            )
        # Somebody may have patched the model meanwhile: then it stays patched.
        if self._owned and self._handle.config is self._config:
            self._handle.unpatch()

    def __enter__(self):
        """Itself."""
        return self

    def __exit__(self, *error) -> None:
        """Close."""
        self.close()

    def _see(self, visit, original, args, kwargs):
        handle, layer = self._handle, visit.hook.layer
        if layer not in self._wanted["layers"] or visit.call is None:
            return
        steps, chunks = self._wanted["steps"], self._wanted["chunks"]
        if steps is not None and visit.step not in steps:
            return
        q, k, v, scale, reason = _described(original, args, kwargs)
        tokens, first = visit.frame_tokens, visit.first_frame
        if reason is None and (first is None or q.shape[1] % tokens or k.shape[1] % tokens):
            reason = "query and keys that are not whole frames"
        size = handle.chunk_frames
        if self._grid is not None and tokens and self._grid[0] * self._grid[1] != tokens:
            raise ValueError(
                f"grid: expected rows and columns of a frame's {tokens} tokens, got {self._grid}"
            )
        if reason is None:
            chunk = -(-first // size) + 1
            if k.shape[1] == q.shape[1] if chunks is None else chunk not in chunks:
                return
        with self._lock:
            if reason is not None:
                self.skipped[reason] += 1
                return
            same = (layer, chunk, visit.step)
            module = visit.hook.module
            facts = Facts(
                *same,
                number=self._numbers[same],
                first_frame=first,
                frame_tokens=tokens,
                grid=self._grid or self._here.grid,
                frames_per_chunk=size,
                window=handle.config.window or visit.call.window,
                scale=scale,
                model=type(module).__name__,
                order=getattr(module, "token_order", "raster"),
                sink_frames=int(getattr(module, "sink_size", 0)),
                patched=None if self._owned else handle.config.to_dict(),
            )
            self._numbers[same] += 1
            self.calls += 1
            self._give(Captured(q, k, v, facts))


class Capture(Watch):
    """A running capture, as :func:`capture` returns it; also a context manager.

    Attributes:
        folder: where the files are.
        files: their paths, in the order of the calls.
        nbytes: bytes of tensors written.
        skipped: calls that were asked for and not written, counted by reason.
    """

    def __init__(self, handle, owned, folder, wanted, limit, grid):
        """Made by :func:`capture`."""
        super().__init__(handle, owned, self._write, wanted, grid)
        self.folder, self.files, self.nbytes, self._limit = folder, [], 0, limit

    def _write(self, captured):
        nbytes = sum(x.numel() * x.element_size() for x in (captured.q, captured.k, captured.v))
        if self.nbytes + nbytes > self._limit:
            self.skipped[f"limit of {self._limit / 2**30:g} GiB reached"] += 1
            return
        self.files.append(save(self.folder, captured))
        self.nbytes += nbytes

    def __repr__(self) -> str:
        """How much was captured, and how much was not."""
        skipped = "".join(f"; {n} skipped: {reason}" for reason, n in self.skipped.items())
        size = f"{len(self.files)} calls, {self.nbytes / 2**20:.1f} MiB"
        return f"<lightforcing.Capture in {self.folder}: {size}{skipped}>"


def capture(
    target,
    folder,
    *,
    layers: Iterable[int] | None = None,
    chunks: Iterable[int] | None = None,
    steps: Iterable[int] | None = (0,),
    grid: tuple[int, int] | None = None,
    limit: float = 8.0,
) -> Capture:
    """Write q, k and v of chosen attention calls to ``folder`` while the pipeline runs.

    ``with lightforcing.capture(pipeline, "calls"): pipeline.inference(...)``. Results do not
    change, bit for bit: a patched model goes on as patched, an unpatched one calls its own
    attention. A file holds all resident keys: at chunk 7 of Wan 1.3B, 216 MB.

    Args:
        target: a model, or a pipeline that holds one, as for :func:`lightforcing.patch`.
        folder: made if missing; must not hold captures yet.
        layers: counted from 0, negative from the end; None is the first, the middle and the last.
        chunks: counted from 1; None is every chunk with past frames.
        steps: forwards of a chunk, counted from 0; None is all, the clean pass included.
        grid: rows and columns of tokens in a frame, for models whose layers are not told.
        limit: GiB of tensors after which nothing more is written.

    Returns:
        A :class:`Capture`, whose ``close()``, or the end of the ``with`` block, ends it.

    Raises:
        ValueError: nothing to capture in the target, an empty list, a layer, chunk or step that
            it has not, a limit that is no number, or a target that is being captured; later, in
            the forward, a grid that is not that of the frames. TypeError: no list of numbers, or
            no path. FileExistsError: the folder holds captures, or is none.
        ImportError: safetensors is not installed.
    """
    import safetensors.torch  # noqa: F401  (now, and not after the first long forward)

    if not isinstance(limit, (int, float)) or isinstance(limit, bool) or not 0 < limit < 2**30:
        raise ValueError(f"limit: expected GiB, a number above 0, got {limit!r}")
    if not isinstance(folder, (str, os.PathLike)) or not str(folder):
        raise TypeError(f"folder: expected the path of a folder, got {folder!r}")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"folder: expected a folder, got {folder}, which is a file")
    if any(folder.glob("*" + SUFFIX)):
        raise FileExistsError(f"folder: expected one without {SUFFIX} files, got {folder}")
    handle, owned, wanted = _find(target, layers, chunks, steps)
    folder.mkdir(parents=True, exist_ok=True)
    return Capture(handle, owned, folder, wanted, int(limit * 2**30), grid and tuple(grid))


def watch(
    target,
    see: Callable[[Captured], None],
    *,
    layers: Iterable[int] | None = None,
    chunks: Iterable[int] | None = None,
    steps: Iterable[int] | None = (0,),
    grid: tuple[int, int] | None = None,
) -> Watch:
    """Call ``see`` with q, k, v and facts of chosen attention calls while the pipeline runs.

    :func:`capture` without files: arguments, results and errors are the same. The tensors are the
    layer's own and hold until ``see`` returns.
    """
    handle, owned, wanted = _find(target, layers, chunks, steps)
    return Watch(handle, owned, see, wanted, grid and tuple(grid))


def _find(target, layers, chunks, steps):
    """The handle of a target, whether it was made for this, and what is wanted of its calls."""
    handle = handle_of(target)
    owned = handle is None
    if owned:
        # As patch() does with sparsity 0, but without the need for kernels on the device.
        adapter, attentions, modules = adapters.find(target)
        depth = len(attentions)
    elif "watch" in vars(handle):
        raise ValueError(
            "target: expected one that is not being captured, got one that is; end that capture "
            "first, with its close(), or use `with`"
        )
    else:
        depth = handle.depth
    wanted = {
        "layers": _layers(layers, depth),
        "chunks": None if chunks is None else _numbers("chunks", chunks, 1),
        "steps": None if steps is None else _numbers("steps", steps, 0),
    }
    if owned:
        handle = Handle(Config(sparsity=0), adapter)
        handle.take(attentions, modules)
    return handle, owned, wanted


def save(folder, captured: Captured) -> Path:
    """Write one call; the file appears when it is complete.

    Returns:
        Its path: ``folder`` and the name that the facts give it.
    """
    from safetensors.torch import save_file

    path = Path(folder) / captured.facts.file
    tensors = {n: getattr(captured, n).detach().cpu().contiguous().clone() for n in "qkv"}
    metadata = {"format": FORMAT, "facts": json.dumps(asdict(captured.facts))}
    unfinished = path.with_suffix(".part")
    save_file(tensors, unfinished, metadata)
    unfinished.replace(path)
    return path


def load(path, device: torch.device | str = "cpu") -> Captured:
    """Read one file that a capture wrote.

    Raises:
        ValueError: the file is not such a one.
    """
    from safetensors import safe_open

    with safe_open(path, "pt", device=str(device)) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"path: expected a file of lightforcing.capture, got {path}")
        facts = json.loads(metadata["facts"])
        facts["grid"] = facts["grid"] and tuple(facts["grid"])
        return Captured(*(file.get_tensor(n) for n in "qkv"), Facts(**facts))


def load_folder(folder, device: torch.device | str = "cpu") -> Iterator[Captured]:
    """The calls in a folder, one at a time, by layer, chunk and step.

    Raises:
        FileNotFoundError: there are none.
    """
    paths = sorted(Path(folder).glob("*" + SUFFIX))
    if not paths:
        raise FileNotFoundError(f"folder: expected {SUFFIX} files of a capture, got {folder}")
    return (load(path, device) for path in paths)


def _layers(layers, depth):
    if layers is None:
        layers = (0, depth // 2, depth - 1)
    wanted = _numbers("layers", layers)
    wrong = sorted(i for i in wanted if not -depth <= i < depth)
    if wrong:
        raise ValueError(f"layers: expected layers of the {depth} found, got {wrong}")
    return frozenset(i % depth for i in wanted)


def _numbers(name, given, low=None):
    """A set of what a caller listed, at least one number, each ``low`` or more."""
    numbers = [None] if isinstance(given, str) or not hasattr(given, "__iter__") else list(given)
    if not all(isinstance(i, Integral) and not isinstance(i, bool) for i in numbers):
        raise TypeError(f"{name}: expected a list of integers, such as [3], got {given!r}")
    if not numbers:
        raise ValueError(f"{name}: expected at least one number in the list, got none")
    if low is not None and min(numbers) < low:
        raise ValueError(f"{name}: expected numbers counted from {low}, got {numbers}")
    return frozenset(numbers)


def _described(original, args, kwargs):
    """q, k, v and scale of a dense call, and why these four do not describe it, or None."""
    q, k, v, reason = reasons.split(original, args, kwargs)
    if reason is not None:
        names = list(reasons._defaults(original))
        given = dict(zip(names, args, strict=False)) | kwargs
        scales = [given.pop(n) for n in SCALES if isinstance(given.get(n), (int, float))]
        if scales:
            q, k, v, reason = reasons.split(original, (), given)
            return q, k, v, float(scales[0]), reason
    if reason is None and not all(isinstance(x, torch.Tensor) and x.dim() == 4 for x in (q, k, v)):
        reason = "q, k and v that are not tensors with 4 dimensions"
    return q, k, v, None if reason else q.shape[3] ** -0.5, reason
