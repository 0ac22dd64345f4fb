"""``python -m lightforcing``: the command line of :mod:`lightforcing.cli`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
