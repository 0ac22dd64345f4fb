"""Finished rows on disk, and what they say: means and paired differences with 95 % intervals."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import numpy as np

DRAWS = 4000


def interval(values, draws=DRAWS, seed=0):
    """Mean and bootstrap 95 % interval of a sample; NaN are left out, three None if all are.

    The draws depend on ``seed`` and the sample's size only, so two rows of a table are resampled
    alike.
    """
    x = np.asarray(values, np.float64)
    x = x[np.isfinite(x)]
    if x.size == 0:
        return None, None, None
    low, high = np.quantile(_shares(x.size, draws, seed) @ x, (0.025, 0.975))
    return float(x.mean()), float(low), float(high)


@lru_cache(maxsize=16)
def _shares(size, draws, seed):
    """``[draws, size]``: how often each of the draws with replacement takes each value, over size.

    A product with it is the mean of every draw, ten times as fast as picking.
    """
    picks = np.random.default_rng(seed).integers(0, size, (draws, size))
    picks += size * np.arange(draws)[:, None]
    return np.bincount(picks.ravel(), minlength=draws * size).reshape(draws, size) / size


def difference(a, b):
    """Paired: :func:`interval` of a - b over the clips that both have, the first ones."""
    n = min(len(a), len(b))
    return interval(np.asarray(a[:n], np.float64) - np.asarray(b[:n], np.float64))


def show(triple, digits=2):
    """``+0.12 [-0.03 +0.20]``, or a dash."""
    if triple[0] is None:
        return "-"
    mean, low, high = (f"{x:+.{digits}f}" for x in triple)
    return f"{mean} [{low} {high}]"


def digest(model):
    """The first 12 hexadecimal digits of the SHA-256 over a model's weights in float16."""
    found = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        found.update(name.encode() + weight.half().cpu().numpy().tobytes())
    return found.hexdigest()[:12]


def load_rows(path):
    """All finished rows of a file, whatever their key; torn lines are passed over."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the last line of a run that was killed
            continue
    return rows


class Store:
    """Finished rows, a JSON line each. A row counts only under the key that it was made with.

    Args:
        path: of the file; made when the first row is put.
        key: everything that a row's figures depend on beside its name: commit, weights, clips.
    """

    def __init__(self, path, key):
        self.path, self.key, self._rows = Path(path), json.loads(json.dumps(key)), {}
        if self.path.exists():
            rows = load_rows(self.path)
            self._rows = {r["name"]: r for r in rows if r.get("key") == self.key}

    def __contains__(self, name):
        return name in self._rows

    def __getitem__(self, name):
        return self._rows[name]

    def get(self, name):
        """The row, or None."""
        return self._rows.get(name)

    @property
    def names(self):
        """Of the rows that are there, in the order of their making."""
        return list(self._rows)

    def put(self, name, **values):
        """Keep a row, and write its line at once."""
        row = {"name": name, "key": self.key, **values}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(row) + "\n"
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a") as file:
            file.write("\n" + text if torn and self.path.stat().st_size else text)
        self._rows[name] = json.loads(text)
        return self._rows[name]
