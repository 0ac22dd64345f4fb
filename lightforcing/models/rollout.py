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

import torch

from .cache import WanCache
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

        Raises:
            ValueError: ``steps`` is empty or does not fall, or a chunk does not fit the window.
        """
        if not steps or any(b >= a for a, b in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"steps: expected falling numbers, got {list(steps)}")
        schedule = FlowSchedule(shift)
        size = model.config.frames_per_chunk if frames_per_chunk is None else frames_per_chunk
        window = model.config.window_frames
        most = size if window is None else window - model.config.sink_frames
        if not 1 <= size <= most:
            raise ValueError(f"frames_per_chunk: expected 1 .. {most}, got {size}")
        self.model = model
        model.num_frame_per_block = size  # as other pipelines do: a patch counts chunks by it
        self.timesteps = [schedule.warp(s) if warp else float(s) for s in steps]
        self.sigmas = [schedule.sigma(t) for t in self.timesteps]
        self.frames_per_chunk = size
        self.lone_first_frame = lone_first_frame
        self.clean_timestep = clean_timestep

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
        seed: int | torch.Generator = 0,
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
            seed: of all noise; or a generator on the model's device, which is used up.
            cache: from :meth:`CausalWan.new_cache`, to be used again (it is reset); None makes one.
            progress: called after each forward with the chunk and the forward within it.

        Returns:
            An iterator of :class:`Chunk`.

        Raises:
            ValueError: a size does not fit the model or the chunks.
        """
        model = self.model
        if noise is not None:
            if noise.dim() != 5 or noise.shape[2] != model.config.in_dim:
                raise ValueError(
                    f"noise: expected [B, F, {model.config.in_dim}, height, width], "
                    f"got {list(noise.shape)}"
                )
            batch, num_frames, size = noise.shape[0], noise.shape[1], tuple(noise.shape[3:])
        ends = self._ends(num_frames)
        if cache is None:
            cache = model.new_cache(num_frames or model.config.window_frames, *size, batch=batch)
        cache.reset()
        draw = seed
        if not isinstance(seed, torch.Generator):
            draw = torch.Generator(device=model.device).manual_seed(seed)

        def begin(start, end):
            if noise is not None:
                return noise[:, start:end]
            return _normal((batch, end - start, model.config.in_dim, *size), model, draw)

        return self._chunks(ends, begin, context, cache, draw, progress)

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

    @torch.no_grad()
    def _chunks(self, ends, begin, context, cache, draw, progress):
        start = 0
        for index, end in enumerate(ends):
            clock = _Clock(self.model.device)
            x = begin(start, end)
            clean = self._denoise(x, start, index, context, cache, draw, progress)
            clock.stop()
            yield Chunk(index, start, clean, clock)
            start = end

    def _denoise(self, x, start, index, context, cache, draw, progress):
        """x0 of one chunk, whose clean keys and values are in the cache afterwards."""

        def forward(x, t, count):
            v = self.model(x.transpose(1, 2), t, context, cache=cache, start_frame=start)
            if progress is not None:
                progress(index, count)
            return v.transpose(1, 2)

        clean = x
        for count, (t, sigma) in enumerate(zip(self.timesteps, self.sigmas, strict=True)):
            if count:
                x = add_noise(clean, _normal(x.shape, self.model, draw), sigma)
            clean = predict_clean(x, forward(x, t, count), sigma)
        forward(clean, self.clean_timestep, len(self.timesteps))
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


def _normal(shape, model, draw) -> torch.Tensor:
    return torch.randn(shape, generator=draw, dtype=model.dtype, device=model.device)
