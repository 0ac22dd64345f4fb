"""The keys and values that a rollout keeps: roped, oldest first, sink first.

One dict a layer, as AR code bases have it: ``k`` and ``v`` are ``[B, N, H, D]`` buffers whose first
``local_end_index`` rows are in use; ``global_end_index`` is the end of the newest chunk counted
over the whole video. Both are tokens and plain Python integers, so nothing waits for a device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


def write_chunk(
    layer: dict, k: torch.Tensor, v: torch.Tensor, start: int, sink: int, rolling: bool
) -> int:
    """Stores the keys and values of a chunk; the newest chunk may be written again in place.

    When the buffer is full and ``rolling`` is set, the oldest rows after the sink are dropped and
    the rest moves left, so that rows [0, end) are always the sink, the past and this chunk.

    Args:
        layer: cache dict of one layer, changed in place.
        k: roped keys of the chunk, ``[B, L, H, D]``.
        v: values, ``[B, L, H, D]``.
        start: first token of the chunk, counted over the whole video.
        sink: rows at the front that stay.
        rolling: whether old rows may be dropped.

    Returns:
        The row after the chunk: the caller attends to rows [0, end).

    Raises:
        ValueError: the chunk does not follow what is stored, or does not fit.
    """
    rows, size = layer["k"].shape[1], k.shape[1]
    grow = start + size - layer["global_end_index"]
    end = layer["local_end_index"] + grow
    # Once rows were dropped, those before the sink's end are not the ones just before the rest.
    first = sink if layer["local_end_index"] < layer["global_end_index"] else 0
    if grow > size or end - size < first:
        raise ValueError(
            f"start_frame: the chunk begins at token {start}, but the cache holds tokens up to "
            f"{layer['global_end_index']} and {layer['local_end_index']} of them are resident"
        )
    drop = end - rows
    if drop > 0:
        if not rolling:
            raise ValueError(
                f"cache: holds {rows} tokens and the chunk ends at {end}; make a longer cache or "
                "set window_frames"
            )
        kept = layer["local_end_index"] - drop - sink
        if kept < 0 or rows - sink < size:
            raise ValueError(
                f"window_frames: {rows} tokens do not hold a sink of {sink} and a chunk of {size}"
            )
        for buffer in (layer["k"], layer["v"]):
            # The clone is there because the two ranges overlap.
            buffer[:, sink : sink + kept] = buffer[:, sink + drop : sink + drop + kept].clone()
        end = rows
    layer["k"][:, end - size : end] = k
    layer["v"][:, end - size : end] = v
    layer["global_end_index"] = start + size
    layer["local_end_index"] = end
    return end


@dataclass
class WanCache:
    """What one rollout remembers; made by :meth:`CausalWan.new_cache`.

    Attributes:
        layers: one dict a layer, as the module's docstring says.
        text: one dict a layer, with ``k`` and ``v`` of the text, ``[B, text_len, H, D]``, once a
            forward has run; later forwards with this cache do not look at their ``context``.
        frame_tokens: tokens T of a frame, fixed by the frame size the cache was made for.
    """

    layers: list[dict]
    frame_tokens: int
    text: list[dict] = field(default_factory=list)

    @classmethod
    def empty(
        cls,
        num_layers: int,
        shape: tuple[int, int, int, int],
        frame_tokens: int,
        like: torch.Tensor,
    ) -> WanCache:
        """A cache with ``shape`` = [B, N, H, D] buffers of the dtype and device of ``like``."""
        layers = [
            {
                # Rows are written before they are read, so they need no zeros.
                "k": like.new_empty(shape),
                "v": like.new_empty(shape),
                "global_end_index": 0,
                "local_end_index": 0,
            }
            for _ in range(num_layers)
        ]
        return cls(layers, frame_tokens, [{} for _ in range(num_layers)])

    @property
    def frames(self) -> int:
        """Resident frames."""
        return self.layers[0]["local_end_index"] // self.frame_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all key and value buffers, text not counted."""
        return sum(layer[name].nbytes for layer in self.layers for name in "kv")

    def reset(self) -> None:
        """Forgets the video and the text; the buffers stay and are written over."""
        for layer in self.layers:
            layer["global_end_index"] = layer["local_end_index"] = 0
        self.forget_text()

    def forget_text(self) -> None:
        """Forgets the text only: the next forward reads its ``context`` (a prompt switch)."""
        for layer in self.text:
            layer.clear()
