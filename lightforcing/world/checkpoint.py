"""Checkpoints that survive a kill, and that fit through a narrow door.

A checkpoint is written beside itself and renamed. With a limit it is written in pieces
``name.00``, ``name.01`` and so on, each beginning with the digest of the whole, so that pieces of
two checkpoints are never joined.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import torch

DIGEST = 32


def save(state: dict, path: str | os.PathLike, piece: int | None = None) -> list[Path]:
    """Writes tensors, numbers, lists and dicts; the files written.

    Args:
        state: what to keep.
        path: where.
        piece: most bytes of a file; None writes one file.
    """
    path = Path(path)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    if piece is None:
        _write(path, data)
        for old in _pieces(path):
            old.unlink()
        return [path]
    digest, room = hashlib.sha256(data).digest(), piece - DIGEST
    names = []
    for number, start in enumerate(range(0, len(data), room)):
        names.append(path.with_name(f"{path.name}.{number:02d}"))
        _write(names[-1], digest, data[start : start + room])
    for old in _pieces(path)[len(names) :]:
        old.unlink()
    path.unlink(missing_ok=True)
    return names


def load(path: str | os.PathLike, device: torch.device | str = "cpu") -> dict | None:
    """What :func:`save` wrote, in one file or in pieces; None if there is nothing.

    Raises:
        ValueError: pieces are missing or belong to different checkpoints.
    """
    path = Path(path)
    if path.exists():
        return torch.load(path, map_location=device, weights_only=True)
    pieces = [p.read_bytes() for p in _pieces(path)]
    if not pieces:
        return None
    data = b"".join(p[DIGEST:] for p in pieces)
    wanted = hashlib.sha256(data).digest()
    if any(p[:DIGEST] != wanted for p in pieces):
        raise ValueError(
            f"path: the {len(pieces)} pieces of {path.name} are not those of one whole checkpoint"
        )
    return torch.load(io.BytesIO(data), map_location=device, weights_only=True)


def _pieces(path):
    return sorted(path.parent.glob(path.name + ".[0-9][0-9]"))


def _write(path, *parts):
    beside = path.with_name(path.name + ".new")
    with beside.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
