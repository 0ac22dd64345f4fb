"""The few-step rollout: chunk after chunk, each denoised in a few steps, then cached clean.

For each chunk: start from noise at t = 1000; at every step predict x0 from the velocity and mix in
fresh noise at the next level; after the last step run the model once more on x0 at t = 0, only to
leave clean keys and values in the cache (Self Forcing, arXiv 2506.08009, algorithm 2).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral

import torch

from .cache import WanCache
from .config import WanConfig
from .flow import FlowSchedule, add_noise, predict_clean
from .wan import CausalWan


@dataclass(frozen=True)
class Chunk:
    """What :meth:`Rollout.stream` yields.

    Attributes:
        index: chunks before this one.
        start_frame: frames before this chunk.
        latents: denoised frames, ``[B, f, C, height, width]``, in the model's type.
    """

    index: int
    start_frame: int
    latents: torch.Tensor
    _clock: _Clock = field(repr=False)

    @property
    def seconds(self) -> float:
        """Time of all forwards of the chunk; on a GPU, reading it waits for them."""
        return self._clock.seconds()


@dataclass(frozen=True)
class Video:
    """What :meth:`Rollout.generate` returns.

    Attributes:
        latents: ``[B, F, C, height, width]``.
        chunks: the chunks, in order.
    """

    latents: torch.Tensor
    chunks: list[Chunk]

    @property
    def seconds(self) -> float:
        """Time of all chunks."""
        return sum(chunk.seconds for chunk in self.chunks)


class Rollout:
    """A sampler: a model, its denoising steps and the size of its chunks."""

    def __init__(
        self,
        model: CausalWan,
        *,
        steps: Sequence[float] = (1000, 750, 500, 250),
        shift: float = 5.0,
        warp: bool = True,
        frames_per_chunk: int | None = None,
        lone_first_frame: bool = False,
        clean_timestep: float = 0.0,
        clamp: float | None = None,
    ) -> None:
        """Fixes the noise levels.

        Args:
            model: the model to run.
            steps: denoising steps, falling. With the defaults the timesteps are 1000, 937.5, 833.3
                and 625.
            shift: of the :class:`FlowSchedule`.
            warp: ``steps`` count on the unshifted grid; False takes them as timesteps.
            frames_per_chunk: frames denoised together; None takes the model's.
            lone_first_frame: the first chunk is a single frame.
            clean_timestep: timestep of the pass that fills the cache.
            clamp: largest absolute value of a denoised latent, for pixels; None for no bound.

        Raises:
            ValueError: ``steps`` is empty or does not fall, or a chunk does not fit the window.
            TypeError: ``model`` is none.
        """
        if not isinstance(getattr(model, "config", None), WanConfig):
            raise TypeError(f"model: expected a CausalWan, got {type(model).__name__}")
        if not steps or any(b >= a for a, b in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"steps: expected falling numbers, got {list(steps)}")
        schedule = FlowSchedule(shift)
        size = model.config.frames_per_chunk if frames_per_chunk is None else frames_per_chunk
        window = model.config.window_frames
        most = None if window is None else window - model.config.sink_frames
        if not isinstance(size, Integral) or size < 1 or (most is not None and size > most):
            limits = "1 or more" if most is None else f"1 .. {most}"
            raise ValueError(f"frames_per_chunk: expected {limits}, got {size!r}")
        self.model = model
        model.num_frame_per_block = size  # as other pipelines do: a patch counts chunks by it
        self.timesteps = [schedule.warp(s) if warp else float(s) for s in steps]
        self.sigmas = [schedule.sigma(t) for t in self.timesteps]
        self.frames_per_chunk = size
        self.lone_first_frame = lone_first_frame
        self.clean_timestep = clean_timestep
        self.clamp = clamp

    @property
    def forwards_per_chunk(self) -> int:
        """Denoising steps and the clean pass."""
        return len(self.timesteps) + 1

    def chunk_ends(self, num_frames: int) -> list[int]:
        """The frame after each chunk of a video.

        Raises:
            ValueError: ``num_frames`` is not a whole number of chunks.
        """
        first = 1 if self.lone_first_frame else self.frames_per_chunk
        if not isinstance(num_frames, Integral):
            raise TypeError(f"num_frames: expected an integer, got {num_frames!r}")
        if num_frames < first or (num_frames - first) % self.frames_per_chunk:
            raise ValueError(
                f"num_frames: expected {first} plus a multiple of {self.frames_per_chunk}, "
                f"got {num_frames}"
            )
        return list(range(first, num_frames + 1, self.frames_per_chunk))

    def stream(
        self,
        num_frames: int | None = None,
        *,
        size: tuple[int, int] = (60, 104),
        batch: int = 1,
        context: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        seed: int | torch.Generator | Callable = 0,
        given: torch.Tensor | None = None,
        camera: torch.Tensor | None = None,
        flags: torch.Tensor | None = None,
        cache: WanCache | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Chunk]:
        """The chunks of a video, each as soon as it is denoised and cached.

        Arguments are checked at once, the model runs when the iterator is asked.

        Args:
            num_frames: latent frames F. None goes on without end and needs a window. With ``noise``
                its length is taken.
            size: rows and columns of a latent frame, both even.
            batch: videos B side by side.
            context: text embeddings, ``[B, up to text_len, text_dim]``.
            noise: starting noise, ``[B, F, in_dim, height, width]``, instead of ``size``, ``batch``
                and ``num_frames``. Without it each chunk draws its own, so a longer video begins
                with the shorter one.
            seed: of all noise; or a generator on the model's device, which is used up; or a
                function of (shape, first frame, step) that returns the noise.
            given: denoised frames that the video begins with, whole chunks, ``[B, G, in_dim,
                height, width]``: they are cached, and yielded as they are.
            camera: row and column of the view in the world, in latent pixels, ``[B, F, 2]``, for
                models with ``camera``.
            flags: marks of the frames, ``[B, F, config.flags]``, for models with flags.
            cache: from :meth:`CausalWan.new_cache`, to be used again (it is reset); None makes one.
            progress: called after each forward with the chunk and the forward within it.

        Returns:
            An iterator of :class:`Chunk`.

        Raises:
            ValueError: a size does not fit the model or the chunks. TypeError: a number of frames,
                size or seed of the wrong kind.
        """
        model = self.model
        if noise is not None:
            if noise.dim() != 5 or noise.shape[2] != model.config.in_dim:
                raise ValueError(
                    f"noise: expected [B, F, {model.config.in_dim}, height, width], "
                    f"got {list(noise.shape)}"
                )
            batch, num_frames, size = noise.shape[0], noise.shape[1], tuple(noise.shape[3:])
        if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2:
            raise TypeError(f"size: expected rows and columns of a latent frame, got {size!r}")
        ends = self._ends(num_frames)
        if cache is None:
            cache = model.new_cache(num_frames or model.config.window_frames, *size, batch=batch)
        cache.reset()
        draw = _drawing(seed, model)
        self._check_given(given, (batch, model.config.in_dim, *size), num_frames)
        fixed = 0 if given is None else given.shape[1]

        def begin(start, end):
            if start < fixed:
                return given[:, start:end].to(model.dtype)
            if noise is not None:
                return noise[:, start:end]
            return draw((batch, end - start, model.config.in_dim, *size), start, 0)

        def run(x, t, start, index, count):
            frames = slice(start, start + x.shape[1])
            v = model(
                x.transpose(1, 2),
                t,
                context,
                cache=cache,
                start_frame=start,
                camera=None if camera is None else camera[:, frames],
                flags=None if flags is None else flags[:, frames],
            )
            if progress is not None:
                progress(index, count)
            return v.transpose(1, 2)

        return self._chunks(ends, begin, run, draw, fixed)

    def generate(self, num_frames: int | None = None, **arguments) -> Video:
        """The whole video; takes what :meth:`stream` takes, and must have an end."""
        if num_frames is None and arguments.get("noise") is None:
            raise ValueError("num_frames: expected a number of frames, got None")
        chunks = list(self.stream(num_frames, **arguments))
        return Video(torch.cat([chunk.latents for chunk in chunks], dim=1), chunks)

    def _ends(self, num_frames):
        if num_frames is not None:
            return self.chunk_ends(num_frames)
        if self.model.config.window_frames is None:
            raise ValueError("num_frames: a video without end needs window_frames, got None")
        first = 1 if self.lone_first_frame else self.frames_per_chunk
        return itertools.count(first, self.frames_per_chunk)

    def _check_given(self, given, wanted, num_frames):
        if given is None:
            return
        shape = list(given.shape)
        if len(shape) != 5 or (shape[0], *shape[2:]) != wanted:
            batch, *rest = wanted
            rest = ", ".join(map(str, rest))
            raise ValueError(f"given: expected [{batch}, G, {rest}], got {shape}")
        if num_frames is not None and shape[1] > num_frames:
            raise ValueError(f"given: expected at most {num_frames} frames, got {shape[1]}")
        self.chunk_ends(shape[1])

    @torch.no_grad()
    def _chunks(self, ends, begin, run, draw, fixed):
        start = 0
        for index, end in enumerate(ends):
            clock = _Clock(self.model.device)
            x = begin(start, end)
            # x0 of the chunk, whose clean keys and values are in the cache afterwards.
            clean = x if start < fixed else self._denoise(x, start, index, run, draw)
            run(clean, self.clean_timestep, start, index, len(self.timesteps))
            clock.stop()
            yield Chunk(index, start, clean, clock)
            start = end

    def _denoise(self, x, start, index, run, draw):
        clean = x
        for count, (t, sigma) in enumerate(zip(self.timesteps, self.sigmas, strict=True)):
            if count:
                x = add_noise(clean, draw(x.shape, start, count), sigma)
            clean = predict_clean(x, run(x, t, start, index, count), sigma)
            if self.clamp is not None:
                clean = clean.clamp(-self.clamp, self.clamp)
        return clean


class _Clock:
    """Seconds between its making and :meth:`stop`, by events on a GPU: no wait until it is read."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        self.marks = []
        self.stop()

    def stop(self) -> None:
        if not self.cuda:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self.marks.append(event)

    def seconds(self) -> float:
        begin, end = self.marks
        if not self.cuda:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1000


def _drawing(seed, model) -> Callable:
    """A function of (shape, first frame, step) that returns noise of the model's type."""
    if callable(seed):
        return lambda *place: seed(*place).to(model.device, model.dtype)
    if not isinstance(seed, (Integral, torch.Generator)):
        raise TypeError(f"seed: expected an integer, a generator or a function, got {seed!r}")
    if not isinstance(seed, torch.Generator):
        seed = torch.Generator(device=model.device).manual_seed(seed)
    return lambda shape, start, step: torch.randn(
        shape, generator=seed, dtype=model.dtype, device=model.device
    )
