"""The sizes of a causal Wan and how far back it looks."""

from __future__ import annotations

from dataclasses import dataclass, replace

PATCH = (1, 2, 2)
"""Latent frames, rows and columns of one token; every released Wan uses this."""

QK_NORMS = ("channels", "head")
TOKEN_ORDERS = ("raster", "morton")


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a :class:`CausalWan`; the defaults are those of Wan 2.1 1.3B.

    Attributes:
        dim: width C of a token, a multiple of ``num_heads``.
        ffn_dim: width of the hidden layer of each MLP.
        num_heads: attention heads H. ``head_dim`` = dim / num_heads must be even and at least 6, so
            that rotary pairs exist for time, rows and columns.
        num_layers: transformer blocks.
        in_dim: latent channels in; 16 for the VAE of Wan 2.1, 48 for that of Wan 2.2 5B.
        out_dim: latent channels out.
        freq_dim: length of the sinusoidal embedding of the timestep, even.
        cross_attention: whether the blocks attend to text. Without it the model takes no context
            and has no ``text_embedding``, ``norm3`` or ``cross_attn`` weights.
        text_dim: width of a text token, 4096 for UMT5-XXL.
        text_len: text tokens; shorter contexts are padded with zero rows, which are attended.
        frames_per_chunk: latent frames that are denoised together. No weight depends on it, but a
            model is trained for one value.
        window_frames: frames a query sees, its own chunk and the sink included; None sees them all.
        sink_frames: first frames of the video that a window never drops.
        eps: added to the variance in every norm.
        qk_norm: ``"channels"`` normalises queries and keys over all C channels, as Wan does;
            ``"head"`` over the D channels of each head, with one gain of D weights.
        token_order: ``"raster"``, or ``"morton"`` for tokens that come tile by tile
            (:mod:`lightforcing.models.places`).
        rope_theta: base of the rotary wave lengths.
        camera: whether the model is told the view's place in the world (``place_embedding``).
        flags: marks a frame may carry (``flag_embedding``); 0 for a model without.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    cross_attention: bool = True
    text_dim: int = 4096
    text_len: int = 512
    frames_per_chunk: int = 3
    window_frames: int | None = None
    sink_frames: int = 0
    eps: float = 1e-6
    qk_norm: str = "channels"
    token_order: str = "raster"
    rope_theta: float = 10000.0
    camera: bool = False
    flags: int = 0

    def __post_init__(self) -> None:
        """Checks every fact once, in words."""
        sizes = "dim ffn_dim num_heads num_layers in_dim out_dim freq_dim text_dim text_len"
        for name in (*sizes.split(), "frames_per_chunk"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if self.dim % self.num_heads:
            raise ValueError(
                f"dim: expected a multiple of num_heads = {self.num_heads}, got {self.dim}"
            )
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                "dim: expected an even head size dim / num_heads of at least 6, for rotary pairs "
                f"of time, rows and columns, got {self.dim} / {self.num_heads} = {self.head_dim}"
            )
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim: expected an even number, got {self.freq_dim}")
        for name, choices in (("qk_norm", QK_NORMS), ("token_order", TOKEN_ORDERS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: expected {' or '.join(map(repr, choices))}, "
                    f"got {getattr(self, name)!r}"
                )
        if not self.rope_theta > 1:
            raise ValueError(f"rope_theta: expected a number above 1, got {self.rope_theta}")
        if self.flags < 0:
            raise ValueError(f"flags: expected at least 0, got {self.flags}")
        if self.sink_frames < 0:
            raise ValueError(f"sink_frames: expected at least 0, got {self.sink_frames}")
        if self.window_frames is None:
            if self.sink_frames:
                raise ValueError("sink_frames: a sink needs window_frames, got None")
        elif self.window_frames < self.sink_frames + self.frames_per_chunk:
            raise ValueError(
                f"window_frames: expected at least sink_frames + frames_per_chunk = "
                f"{self.sink_frames + self.frames_per_chunk}, got {self.window_frames}"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one head, D."""
        return self.dim // self.num_heads

    @classmethod
    def named(cls, name: str, **changes) -> WanConfig:
        """The configuration called ``name``, with fields changed.

        Args:
            name: ``"1.3B"`` and ``"14B"`` (Wan 2.1 and what is tuned from it), ``"5B"`` (Wan 2.2
                TI2V: 48 channels, chunks of 8 frames), or ``"tiny"`` (1.7 million weights, no text,
                for a CPU).
            changes: fields to change, as in ``named("1.3B", window_frames=12, sink_frames=3)``.

        Raises:
            ValueError: no configuration has this name.
        """
        if name not in NAMED:
            raise ValueError(f"name: expected one of {', '.join(NAMED)}, got {name!r}")
        return replace(NAMED[name], **changes)

    def frame_tokens(self, height: int, width: int) -> int:
        """Tokens T of a latent frame of ``height`` x ``width``.

        Raises:
            ValueError: a side is not a positive multiple of the patch.
        """
        for side, size, patch in (("height", height, PATCH[1]), ("width", width, PATCH[2])):
            if size < 1 or size % patch:
                raise ValueError(f"{side}: expected a positive multiple of {patch}, got {size}")
        return (height // PATCH[1]) * (width // PATCH[2])


NAMED = {
    "1.3B": WanConfig(),
    "14B": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "5B": WanConfig(
        dim=3072, ffn_dim=14336, num_heads=24, in_dim=48, out_dim=48, frames_per_chunk=8
    ),
    "tiny": WanConfig(
        dim=192, ffn_dim=512, num_heads=3, num_layers=4, freq_dim=64, cross_attention=False
    ),
}
