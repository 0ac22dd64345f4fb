"""What is trained for how long: the stages of each model."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        view: pixels of a side.
        seconds: its share of the clock.
        batch: sequences a step.
        steps: an end by steps, for tests.
        short: share of the time on packed clips of 3 chunks.
        rate: learning rate of Muon; AdamW has a twentieth.
        ema: decay of the averaged weights.
        mixed: every so many steps one is of the first stage's size, so that it is not forgotten.
        slow: share of the steps on clips with a slow sweep.
    """

    view: int
    seconds: float
    batch: int
    steps: int = 10**9
    short: float = 0.0
    rate: float = 0.02
    ema: float = 0.996
    mixed: int = 0
    slow: float = 0.2


RECIPES = {
    "narrow": (
        Stage(64, 250, 16, short=0.15),
        Stage(128, 290, 4, rate=0.01, ema=0.99, mixed=3),
    ),
    "full": (
        Stage(64, 300, 16, short=0.15),
        Stage(128, 300, 4, rate=0.01, ema=0.99, mixed=3),
    ),
    "tiny": (
        Stage(32, 20, 4, steps=12, short=0.25, ema=0.9),
        Stage(64, 20, 1, steps=4, rate=0.01, ema=0.9, mixed=2),
    ),
}


def shortened(recipe: tuple[Stage, ...], seconds: list[float]) -> tuple[Stage, ...]:
    """The recipe with other times.

    Raises:
        ValueError: not one time for each stage.
    """
    if len(seconds) != len(recipe):
        raise ValueError(f"stages: expected {len(recipe)} times, got {len(seconds)}")
    return tuple(replace(s, seconds=t) for s, t in zip(recipe, seconds, strict=True))
