"""Types of command-line arguments: what is wrong is said at once, in a sentence."""

import argparse
import math
import re
from pathlib import Path

import torch


def number(kind, least, most):
    """The type of an argument from ``least`` to ``most``, these two included."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} from {least} to {most}, got {text}")
        return value

    return read


count = number(int, 1, 1_000_000)
seed = number(int, 0, 1_000_000)
duration = number(float, 1e-3, 1e9)


def device(text):
    """A device of this machine."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(
            f"expected cpu, or a GPU that torch sees, got {text}"
        ) from None
    return text


def pattern(text):
    """A regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"expected a regular expression, got {text} ({error})"
        ) from None
    return text


def old_file(text):
    """A file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"expected a file, got {text}")
    return Path(text)


def new_file(text):
    """A file to write, whose folder is there or can be made."""
    path = Path(text)
    nearest = next(p for p in path.absolute().parents if p.exists())
    if path.is_dir() or not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder, got {text}")
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    return path


def folder(text):
    """A folder that is there."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got {text}")
    return text
