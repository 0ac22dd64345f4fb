"""Types of command-line arguments: what is wrong is said at once, in a sentence."""

import argparse
import math
import re
from pathlib import Path

from lightforcing import cli


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
device, new_file, new_folder = cli.device, cli.new_file, cli.new_folder


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


def folder(text):
    """A folder that is there."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got {text}")
    return text
