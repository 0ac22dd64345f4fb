"""Imported first: lightforcing of this checkout where it is built, else an installed one.

Without either, and without torch, the program ends with a sentence and status 2.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if any((ROOT / "lightforcing").glob("_core*.so")):
    sys.path.insert(0, str(ROOT))
for name in ("torch", "lightforcing"):
    if importlib.util.find_spec(name) is None:
        print(
            f"{Path(sys.argv[0]).name}: expected the package {name}, which {sys.executable} does "
            f"not find: run `make build` in {ROOT}, then .venv/bin/python in place of python",
            file=sys.stderr,
        )
        raise SystemExit(2)
