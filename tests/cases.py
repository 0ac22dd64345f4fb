"""Named sizes, and generated cases with a count of how many ran."""

import functools
from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

GENERATED = set()  # names of the tests that generate cases
RAN = Counter()  # test name -> cases that ran to their end
ENOUGH = 2000  # cases that a full run has to reach


def generated(examples, **strategies):
    """`hypothesis.given`, with the cases counted; see the terminal summary."""

    def decorate(test):
        GENERATED.add(test.__name__)

        @functools.wraps(test)
        def counted(**arguments):
            test(**arguments)
            RAN[test.__name__] += 1

        return settings(max_examples=examples)(given(**strategies)(counted))

    return decorate


@dataclass(frozen=True)
class Video:
    """q is the last `q_frames` of the `k_frames` frames of k, each of `frame_tokens` tokens."""

    name: str
    frame_tokens: int
    q_frames: int
    k_frames: int
    batch: int = 1
    heads: int = 2
    dim: int = 32

    def __str__(self):
        return self.name

    @property
    def q_shape(self):
        return self.batch, self.q_frames * self.frame_tokens, self.heads, self.dim

    @property
    def k_shape(self):
        return self.batch, self.k_frames * self.frame_tokens, self.heads, self.dim


VIDEOS = [
    Video("smallest", 1, 1, 1, heads=1, dim=8),
    Video("one-token-frames", 1, 2, 9),
    Video("one-frame", 70, 1, 1),
    Video("nothing-divides", 37, 2, 7, batch=2, heads=3, dim=40),
    Video("whole-blocks", 64, 1, 8, dim=64),
    Video("short-tail", 65, 3, 9, heads=1),
    Video("batch-of-three", 50, 1, 5, batch=3),
    Video("widest-head", 48, 1, 6, heads=1, dim=256),
    Video("small-wan", 98, 3, 9, dim=128),
]

SCORES = ["mean", "mass", "lse"]
BLOCKS = [16, 32, 64, 128]

seeds = st.integers(0, 2**32 - 1)
dims = st.sampled_from([8, 16, 24, 40, 64, 72, 128])


@st.composite
def videos(draw, max_tokens=700):
    """A small video of any shape: T = 1, one frame, nothing divides."""
    frame_tokens = draw(st.integers(1, 90))
    k_frames = draw(st.integers(1, max(1, min(12, max_tokens // frame_tokens))))
    return Video(
        "generated",
        frame_tokens,
        draw(st.integers(1, min(3, k_frames))),
        k_frames,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(dims),
    )
