"""Random numbers by counter: the same for a seed on every device, in every batch.

A number is a hash (the finaliser of SplitMix64, Steele, Lea and Flood 2014) of its seed, its stream
and its index. So clip 17 is clip 17 whether it is made alone on a CPU or among 256 on a GPU, and
two rollouts that differ in one rule meet the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)
FIRST, SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right: torch's own copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def mix(z: torch.Tensor) -> torch.Tensor:
    """A bijection of int64 under which neighbours have nothing in common."""
    z = (z ^ _shift(z, 30)) * FIRST
    z = (z ^ _shift(z, 27)) * SECOND
    return z ^ _shift(z, 31)


class Draws:
    """A row of numbers for each seed; every call draws from the next stream."""

    def __init__(self, seeds: torch.Tensor, stream: int = 0) -> None:
        """``seeds`` is ``[B]`` int64; ``stream`` is where the calls begin to count."""
        self.seeds = mix(seeds * GOLDEN + 1)
        self.stream = stream

    def uniform(self, *shape: int) -> torch.Tensor:
        """``[B, *shape]`` float32, evenly spread over the open interval (0, 1)."""
        self.stream += 1
        count = math.prod(shape)
        index = torch.arange(1, count + 1, device=self.seeds.device)
        key = mix(self.seeds + _signed(self.stream * SECOND % (1 << 64)))
        bits = _shift(mix(key[:, None] + index * GOLDEN), 41)
        return ((bits.float() + 0.5) / (1 << 23)).view(-1, *shape)

    def normal(self, *shape: int) -> torch.Tensor:
        """``[B, *shape]`` float32 with mean 0 and variance 1 (Box and Muller 1958)."""
        count = math.prod(shape)
        radius, angle = self.uniform(2, (count + 1) // 2).unbind(1)
        radius, angle = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
        both = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
        return both[:, :count].view(-1, *shape)

    def below(self, count: int, *shape: int) -> torch.Tensor:
        """``[B, *shape]`` int64 in 0 .. count - 1."""
        return (self.uniform(*shape) * count).long().clamp(max=count - 1)

    def true(self, chance: float, *shape: int) -> torch.Tensor:
        """``[B, *shape]`` bool."""
        return self.uniform(*shape) < chance


def noise(seeds: torch.Tensor, shape: Sequence[int], *place: int) -> torch.Tensor:
    """Normal noise ``[B, *shape]`` for the seeds ``[B]`` at a place: chunk, step, run."""
    stream = 0
    for number in place:
        stream = (stream * 1_000_003 + number + 1) % (1 << 40)
    return Draws(seeds, stream=(1 << 41) + 2 * stream).normal(*shape)
