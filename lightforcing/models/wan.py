"""The causal Wan transformer: chunks of frames in, velocities out, keys and values cached.

The state-dict keys are those of Wan 2.1, which Self Forcing, LongLive, Rolling Forcing and others
keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .cache import WanCache
from .config import PATCH, WanConfig
from .layers import Block, Head, RMSNorm
from .places import PLACE_FEATURES, place_features, token_order
from .rope import rope_table


class CausalWan(nn.Module):
    """A causal Wan video transformer for inference.

    ``model(x, t, context, cache=cache, start_frame=f)`` runs one chunk; :meth:`forward_full` runs a
    whole video without a cache and is the definition that the cached forward must agree with.
    """

    def __init__(
        self,
        config: WanConfig | None = None,
        *,
        seed: int | None = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Builds the model.

        Args:
            config: sizes; None means those of 1.3B.
            seed: of :meth:`init_weights`; None leaves the weights uninitialised, for loading.
            device: of the weights; None takes torch's default.
            dtype: of the weights; None takes torch's default.
        """
        super().__init__()
        config = WanConfig() if config is None else config
        if not isinstance(config, WanConfig):
            raise TypeError(
                "config: expected a WanConfig, such as WanConfig.named('tiny'), or None, "
                f"got {config!r}"
            )
        self.config = config
        self.num_frame_per_block = config.frames_per_chunk  # the name AR code bases use
        device = torch.empty(0).device if device is None else device
        dim = config.dim
        # On meta first, so that no weight is drawn twice and none passes through float32.
        with torch.device("meta"):
            self.patch_embedding = nn.Conv3d(config.in_dim, dim, kernel_size=PATCH, stride=PATCH)
            if config.cross_attention:
                self.text_embedding = nn.Sequential(
                    nn.Linear(config.text_dim, dim),
                    nn.GELU(approximate="tanh"),
                    nn.Linear(dim, dim),
                )
            if config.camera:
                self.place_embedding = nn.Linear(PLACE_FEATURES, dim, bias=False)
            if config.flags:
                self.flag_embedding = nn.Linear(config.flags, dim, bias=False)
            self.time_embedding = nn.Sequential(
                nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
            )
            self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
            self.head = Head(config)
        self.to(dtype).to_empty(device=device)
        self.requires_grad_(False).eval()
        if seed is not None:
            self.init_weights(seed)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, and of the cache."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.patch_embedding.weight.device

    def init_weights(self, seed: int = 0) -> CausalWan:
        """Draws random weights for which attention has something to select; returns the model.

        Matrices keep the scale of their input. Gates are open (1) and the head is not zero, so that
        every layer moves the output. Queries and keys of a layer share one random bias, which makes
        a token look most at tokens near it in time and space, and their norms have a gain of 2,
        which makes it look at few: trained models are like that. With independent projections and
        unit gains attention is close to uniform, and no selection of blocks beats another.

        Args:
            seed: the same seed gives the same weights on the same kind of device.
        """
        draw = torch.Generator(device=self.device).manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                fan_in = module.weight[0].numel()
                module.weight.data.normal_(0.0, fan_in**-0.5, generator=draw)
                if module.bias is not None:
                    module.bias.data.zero_()
            elif isinstance(module, RMSNorm | nn.LayerNorm) and module.weight is not None:
                module.weight.data.fill_(1.0)
                if isinstance(module, nn.LayerNorm):
                    module.bias.data.zero_()
        for block in self.blocks:
            block.modulation.data.zero_()[:, [2, 5]] = 1.0
            layer = block.self_attn
            layer.q.bias.data.normal_(0.0, 2.0, generator=draw)
            layer.k.bias.data.copy_(layer.q.bias.data)
            layer.norm_q.weight.data.fill_(2.0)
            layer.norm_k.weight.data.fill_(2.0)
        self.head.modulation.data.zero_()
        return self

    def new_cache(self, num_frames: int, height: int, width: int, *, batch: int = 1) -> WanCache:
        """An empty cache for videos of one frame size.

        Args:
            num_frames: frames to hold; a window holds no more than ``window_frames``.
            height: rows of a latent frame.
            width: columns of a latent frame.
            batch: videos B side by side.

        Returns:
            A cache of ``2 * layers * B * frames * T * C`` elements of the model's type.

        Raises:
            ValueError: a size is not positive, or a side is odd.
        """
        config = self.config
        for name, value in (("num_frames", num_frames), ("batch", batch)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        tokens = config.frame_tokens(height, width)
        if config.window_frames is not None:
            num_frames = min(num_frames, config.window_frames)
        shape = (batch, num_frames * tokens, config.num_heads, config.head_dim)
        return WanCache.empty(config.num_layers, shape, tokens, self.patch_embedding.weight)

    def forward(
        self,
        x: torch.Tensor,
        t: float | torch.Tensor,
        context: torch.Tensor | None = None,
        *,
        cache: WanCache,
        start_frame: int = 0,
        camera: torch.Tensor | None = None,
        flags: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The velocity of one chunk, given the chunks in the cache.

        The chunk's keys and values are stored; the newest chunk may be run again (each denoising
        step does) and then replaces itself.

        Args:
            x: noisy latents, ``[B, in_dim, F, height, width]``, in the model's type.
            t: timestep in 0 .. 1000: a number, or a tensor ``[B]`` or ``[B, F]``.
            context: text embeddings, ``[B, up to text_len, text_dim]``; may be None once the cache
                has the text, and must be without cross-attention.
            cache: from :meth:`new_cache`.
            start_frame: frames of the video before this chunk.
            camera: row and column of the view's corner in the world, in latent pixels,
                ``[B, F, 2]``; for models with ``camera`` only, and needed there.
            flags: marks of the frames, ``[B, F, config.flags]``; needed where there are flags.

        Returns:
            ``[B, out_dim, F, height, width]``.

        Raises:
            ValueError: a shape does not fit the model or the cache, the chunk does not follow what
                the cache holds, or text is missing.
        """
        grid = self._grid(x)
        tokens = grid[1] * grid[2]
        rows = cache.layers[0]["k"]
        if tokens != cache.frame_tokens or x.shape[0] != rows.shape[0]:
            raise ValueError(
                f"cache: made for {rows.shape[0]} x {cache.frame_tokens} tokens a frame, but x has "
                f"{x.shape[0]} x {tokens}"
            )
        if start_frame < 0:
            raise ValueError(f"start_frame: expected at least 0, got {start_frame}")
        if not cache.text[0]:
            context = self._embed_text(context, x.shape[0])
        positions = torch.arange(start_frame, start_frame + grid[0], device=x.device)
        told = self._told(x, camera, flags)
        return self._run(
            x, self._times(t, x), context, positions, told, cache=cache, start=start_frame * tokens
        )

    def forward_full(
        self,
        x: torch.Tensor,
        t: float | torch.Tensor,
        context: torch.Tensor | None = None,
        *,
        chunk_ends: Sequence[int],
        clean: torch.Tensor | None = None,
        camera: torch.Tensor | None = None,
        flags: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The velocities of a whole video in one pass, chunks hidden from each other by a mask.

        Without ``clean``, chunk c sees itself and the chunks before it as they stand in ``x``. With
        ``clean`` (teacher forcing) it sees itself in ``x`` and the chunks before it in ``clean`` at
        timestep 0. Window and sink of the configuration hold in both.

        Args:
            x: latents, ``[B, in_dim, F, height, width]``.
            t: a number, or a tensor ``[B]`` or ``[B, F]``.
            context: text embeddings, ``[B, up to text_len, text_dim]``.
            chunk_ends: frame after each chunk, ascending, the last one F.
            clean: denoised latents, shape of ``x``.
            camera: ``[B, F, 2]`` as in :meth:`forward`.
            flags: ``[B, F, config.flags]`` as in :meth:`forward`.

        Returns:
            ``[B, out_dim, F, height, width]``. The mask takes ``(F T)^2`` bytes, four times that
            with ``clean``.

        Raises:
            ValueError: a shape does not fit the model, ``chunk_ends`` is not as said, or text is
                missing.
        """
        frames, height, width = self._grid(x)
        config = self.config
        sees = visible_frames(
            frames, chunk_ends, config.window_frames, config.sink_frames, clean is not None
        )
        e_times = self._times(t, x)
        positions = torch.arange(frames, device=x.device)
        told = self._told(x, camera, flags)
        if clean is not None:
            if clean.shape != x.shape:
                raise ValueError(
                    f"clean: expected the shape of x {list(x.shape)}, got {list(clean.shape)}"
                )
            e_times = e_times.expand(-1, frames)
            e_times = torch.cat([torch.zeros_like(e_times), e_times], dim=1)
            positions = positions.repeat(2)
            x = torch.cat([clean, x], dim=2)
            told = [y if y is None else torch.cat([y, y], dim=1) for y in told]
        tokens = height * width
        mask = sees.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1).to(x.device)
        context = self._embed_text(context, x.shape[0])
        return self._run(x, e_times, context, positions, told, mask=mask)[:, :, -frames:]

    def forward_frames(
        self,
        x: torch.Tensor,
        t: float | torch.Tensor,
        context: torch.Tensor | None = None,
        *,
        positions: torch.Tensor,
        attend: Callable,
        camera: torch.Tensor | None = None,
        flags: torch.Tensor | None = None,
        blocks: Sequence[Callable] | None = None,
    ) -> torch.Tensor:
        """The velocities of frames in any order, for training: ``attend`` decides who sees whom.

        Args:
            x: latents, ``[B, in_dim, F, height, width]``.
            t: a number, or a tensor ``[B]`` or ``[B, F]``.
            context: text embeddings, ``[B, up to text_len, text_dim]``.
            positions: place of each frame in its video, ``[F]``.
            attend: masked attention of (q, k, v), each ``[B, F T, H, D]``, to the same shape.
            camera: ``[B, F, 2]`` as in :meth:`forward`.
            flags: ``[B, F, config.flags]`` as in :meth:`forward`.
            blocks: stand-ins for ``self.blocks``, such as compiled ones.

        Returns:
            ``[B, out_dim, F, height, width]``; gradients pass.

        Raises:
            ValueError: a shape does not fit the model, or a condition is missing.
        """
        self._grid(x)
        told, times = self._told(x, camera, flags), self._times(t, x)
        context = self._embed_text(context, x.shape[0])
        return self._run(x, times, context, positions, told, mask=attend, blocks=blocks)

    def _run(
        self, x, times, context, positions, told, *, mask=None, cache=None, start=0, blocks=None
    ):
        batch, frames = x.shape[0], x.shape[2]
        x = self.patch_embedding(x)  # [B, C, F, h, w]
        height, width = x.shape[3:]
        x = x.flatten(3).permute(0, 2, 3, 1)  # [B, F, T, C]
        camera, flags = told
        if camera is not None:
            work = torch.promote_types(self.dtype, torch.float32)
            x = x + self.place_embedding(place_features(camera.to(work), height, width).to(x.dtype))
        if flags is not None:
            x = x + self.flag_embedding(flags.to(x.dtype)).unsqueeze(2)
        grid_sizes = torch.tensor([[frames, height, width]] * batch)
        freqs = rope_table(positions, height, width, self.config.head_dim, self.config.rope_theta)
        if x.dtype != torch.float64:
            freqs = freqs.to(torch.complex64)
        order = None
        if self.config.token_order == "morton":
            order, back = token_order(height, width, x.device)
            x = x[:, :, order]
            freqs = freqs.unflatten(0, (frames, -1))[:, order].flatten(0, 1)
        if callable(mask):  # a compiler fuses the turn only in real numbers
            freqs = torch.view_as_real(freqs)
        e = sinusoid(times.flatten(), self.config.freq_dim).to(x.dtype)
        e = self.time_embedding(e).unflatten(0, times.shape)  # [B or 1, F or 1, C]
        modulation = self.time_projection(e).unflatten(2, (6, -1))
        for i, block in enumerate(blocks or self.blocks):
            layer, text = (cache.layers[i], cache.text[i]) if cache else (None, None)
            x = block(x, modulation, grid_sizes, freqs, context, mask, layer, text, start)
        x = self.head(x, e)
        if order is not None:
            x = x[:, :, back]
        x = x.unflatten(2, (height, width)).unflatten(4, (*PATCH, -1))
        # [B, F, h, w, 1, 2, 2, c] to [B, c, F 1, h 2, w 2]
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _grid(self, x):
        """Frames, rows and columns of tokens of the latents ``x``."""
        if x.dim() != 5 or x.shape[1] != self.config.in_dim:
            raise ValueError(
                f"x: expected [B, {self.config.in_dim}, F, height, width], got {list(x.shape)}"
            )
        self.config.frame_tokens(x.shape[3], x.shape[4])
        return x.shape[2], x.shape[3] // PATCH[1], x.shape[4] // PATCH[2]

    def _times(self, t, x):
        """``t`` as a float64 tensor [B or 1, F or 1] on the device of ``x``."""
        if not isinstance(t, torch.Tensor):
            return torch.full((1, 1), float(t), dtype=torch.float64, device=x.device)
        if tuple(t.shape) not in ((x.shape[0],), (x.shape[0], x.shape[2])):
            raise ValueError(
                f"t: expected a number, [{x.shape[0]}] or [{x.shape[0]}, {x.shape[2]}], "
                f"got {list(t.shape)}"
            )
        return t.to(x.device, torch.float64).view(x.shape[0], -1)

    def _told(self, x, camera, flags):
        """Camera and flags, checked: each as the configuration wants it."""
        config, size = self.config, [x.shape[0], x.shape[2]]
        for name, value, wanted in (
            ("camera", camera, 2 * config.camera),
            ("flags", flags, config.flags),
        ):
            if not wanted and value is not None:
                raise ValueError(f"{name}: the model has no {name}, expected None")
            if wanted and (value is None or list(value.shape) != [*size, wanted]):
                got = None if value is None else list(value.shape)
                raise ValueError(f"{name}: expected {[*size, wanted]}, got {got}")
        return camera, flags

    def _embed_text(self, context, batch):
        """Embedded text [B, text_len, C], padded with zero rows before the embedding."""
        config = self.config
        if not config.cross_attention:
            if context is not None:
                raise ValueError("context: the model has no cross-attention, expected None")
            return None
        wanted = f"[{batch}, up to {config.text_len}, {config.text_dim}]"
        if context is None:
            raise ValueError(f"context: expected text embeddings {wanted}, got None")
        shape = context.shape
        fits = len(shape) == 3 and (shape[0], shape[2]) == (batch, config.text_dim)
        if not fits or shape[1] > config.text_len:
            raise ValueError(f"context: expected text embeddings {wanted}, got {list(shape)}")
        context = F.pad(context.to(self.dtype), (0, 0, 0, config.text_len - shape[1]))
        return self.text_embedding(context)


def sinusoid(times: torch.Tensor, dim: int) -> torch.Tensor:
    """Cosines, then sines, of ``t * 10000^(-2 i / dim)``: [N] to [N, dim] float64."""
    half = dim // 2
    rates = 10000.0 ** (-torch.arange(half, device=times.device, dtype=torch.float64) / half)
    angle = times.double()[:, None] * rates
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def visible_frames(
    frames: int,
    chunk_ends: Sequence[int],
    window: int | None = None,
    sink: int = 0,
    teacher_forcing: bool = False,
) -> torch.Tensor:
    """Which frames each frame sees, ``[F, F]`` bool on the CPU.

    A frame of a chunk that ends at frame E sees the frames before E; with a window only those of
    the first ``sink`` and the last ``window - sink`` before E.

    Args:
        frames: F.
        chunk_ends: frame after each chunk, ascending, the last one F.
        window: frames seen, own chunk and sink included; None for all.
        sink: first frames that stay visible.
        teacher_forcing: the sequence is F clean frames, then F noisy ones (the result is
            ``[2 F, 2 F]``): clean frames see clean ones as above, noisy frames see the noisy ones
            of their chunk and the clean ones of earlier chunks.

    Raises:
        ValueError: ``chunk_ends`` is not as said.
    """
    ends = list(chunk_ends)
    if (
        not ends
        or ends[-1] != frames
        or any(b <= a for a, b in zip([0, *ends], ends, strict=False))
    ):
        raise ValueError(f"chunk_ends: expected ascending frames up to {frames}, got {ends}")
    begin = torch.zeros(frames, 1, dtype=torch.long)  # of the chunk of each frame
    end = torch.zeros(frames, 1, dtype=torch.long)
    for a, b in zip([0, *ends], ends, strict=False):
        begin[a:b], end[a:b] = a, b
    key = torch.arange(frames)
    sees = key < end
    if window is not None:
        sees &= (key < sink) | (key >= end - (window - sink))
    if not teacher_forcing:
        return sees
    own = (key >= begin) & (key < end)
    never = torch.zeros_like(sees)
    return torch.cat([torch.cat([sees, never], 1), torch.cat([sees & ~own, own], 1)])
