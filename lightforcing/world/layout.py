"""One training sequence: clean chunks, noisy chunks, and who sees whom.

Teacher forcing puts the clean and the noisy version of a clip into one sequence. Noisy chunk c sees
itself and the clean chunks before it, clean chunk c sees clean ones up to itself. Nobody sees the
last clean chunk and the first noisy one is never generated, so 7 chunks make 12, not 14. Short
clips are packed, 3 of 3 chunks into the same length: learning begins there, and the longer clips
then run through the same compiled code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .data import CHUNK, Clip
from .model import SIGMAS, conditions, to_latents


class Layout:
    """Which chunk of which clip each chunk of the sequence is: ``pack`` clips of ``chunks``."""

    def __init__(self, chunks: int = 7, pack: int = 1, device: torch.device | str = "cpu") -> None:
        """The order: for each clip its clean chunks 0 .. last - 1, then its noisy 1 .. last."""
        rows = [
            (clip, noisy, chunk)
            for clip in range(pack)
            for noisy in (0, 1)
            for chunk in (range(1, chunks) if noisy else range(chunks - 1))
        ]
        self.chunks, self.pack = chunks, pack
        self.clip, self.noisy, self.chunk = torch.tensor(rows, device=device).unbind(1)
        self.positions = (
            self.chunk[:, None] * CHUNK + torch.arange(CHUNK, device=device)
        ).flatten()
        # Numbers, not a mask: indexing with a mask on a GPU waits for it.
        places = torch.arange(len(rows) * CHUNK, device=device)
        self.noisy_frames = places[self.noisy.bool().repeat_interleave(CHUNK)]
        self.clean_frames = places[~self.noisy.bool().repeat_interleave(CHUNK)]
        self.sigmas = torch.tensor(SIGMAS, device=device)
        same = self.clip[:, None] == self.clip
        earlier = self.chunk[None] <= self.chunk[:, None] - self.noisy[:, None]
        clean = (self.noisy[None] == 0) & earlier
        self.sees = same & (clean | torch.eye(len(rows), dtype=torch.bool, device=device))

    def __len__(self) -> int:
        """Chunks of the sequence."""
        return len(self.chunk)

    def frames(self, x: torch.Tensor) -> torch.Tensor:
        """Frames of ``n * pack`` clips ``[n pack, F, ...]`` in sequence order, ``[n, F', ...]``."""
        x = x.unflatten(1, (self.chunks, CHUNK)).unflatten(0, (-1, self.pack))
        return x[:, self.clip, self.chunk].flatten(1, 2)

    def split(self, frame_tokens: int):
        """Attention without a mask: a call for each query chunk over the chunks that it sees."""
        runs = [row.nonzero().flatten().tolist() for row in self.sees.cpu()]

        def attend(q, k, v):
            q, k, v = (x.transpose(1, 2).split(CHUNK * frame_tokens, 2) for x in (q, k, v))
            parts = [
                F.scaled_dot_product_attention(
                    q[i], torch.cat([k[j] for j in run], 2), torch.cat([v[j] for j in run], 2)
                )
                for i, run in enumerate(runs)
            ]
            return torch.cat(parts, 2).transpose(1, 2)

        return attend

    def mask(self, frame_tokens: int) -> torch.Tensor:
        """The same as a mask, ``[L, L]`` bool, for short sequences."""
        sees = self.sees.repeat_interleave(CHUNK * frame_tokens, 0)
        return sees.repeat_interleave(CHUNK * frame_tokens, 1)

    def batch(
        self, clip: Clip, draw: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, dict, torch.Tensor]:
        """Latents, timesteps, conditions and targets of ``n`` sequences.

        Args:
            clip: ``n * pack`` clips.
            draw: of the noise and its levels, on the clips' device.

        Returns:
            ``x [n, 12, F', h, w]``, ``t [n, F']``, the keyword arguments of the model, and the
            velocity noise - clean of the noisy frames, ``[n, 12, F'', h, w]``.
        """
        clean = self.frames(to_latents(clip.video))
        device, count, chunks = clean.device, len(clean), len(self)

        def uniform():
            return torch.rand(count, chunks, generator=draw, device=device)

        # Half of the chunks at the sampler's own levels, half in between.
        level = uniform()
        own = self.sigmas[
            torch.randint(len(SIGMAS), (count, chunks), generator=draw, device=device)
        ]
        sigma = torch.where(uniform() < 0.5, own, 3 * level / (1 + 2 * level))
        # What a rollout caches is not quite clean; the model is not told.
        stain = torch.where(uniform() < 0.3, 0.1 * uniform(), 0.0)
        noisy = self.noisy.bool()
        mixed = torch.where(noisy, sigma, stain).repeat_interleave(CHUNK, 1)[:, :, None, None, None]
        noise = torch.randn(clean.shape, generator=draw, device=device)
        x = torch.lerp(clean, noise, mixed)
        t = 1000 * torch.where(noisy, sigma, 0.0).repeat_interleave(CHUNK, 1)
        told = {name: self.frames(value) for name, value in conditions(clip).items()}
        target = (noise - clean)[:, self.noisy_frames]
        return x.transpose(1, 2), t, told, target.transpose(1, 2)
