"""The README's code runs, its output is what comes out, and its tables name what exists."""

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_all_python_blocks_run_top_to_bottom():
    python = [code for language, code in BLOCKS if language == "python"]
    assert len(python) >= 6
    names = {}
    for code in python:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), names)
        if "print(handle.report())" in code:
            (shown,) = (text for language, text in BLOCKS if language == "text")
            assert printed.getvalue() == shown


def test_every_block_says_its_language():
    assert {language for language, _ in BLOCKS} == {"python", "sh", "text"}


def test_make_targets_exist():
    made = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([\w-]+)`", README))
    assert named and named <= made


def test_commands_exist():
    from lightforcing import cli

    (commands,) = (a for a in cli.parser()._actions if a.dest == "command")
    assert set(re.findall(r"`python -m lightforcing (\w+)`", README)) == set(commands.choices)


def test_presets_are_as_the_table_says():
    import lightforcing as lf

    rows = re.findall(r"^\| `([\w-]+)`[^|]*\| ([\d.]+)", README, re.MULTILINE)
    shown = {name: float(value) for name, value in rows if name in lf.PRESETS}
    assert shown == {name: preset["sparsity"] for name, preset in lf.PRESETS.items()}


def test_the_variables_are_those_of_the_code():
    code = [
        ROOT / "setup.py",
        *(ROOT / "lightforcing").rglob("*.py"),
        *(ROOT / "csrc").rglob("*.c*"),
    ]
    used = {n for p in code for n in re.findall(r"LIGHTFORCING_[A-Z][A-Z_]+", p.read_text())}
    assert used == set(re.findall(r"^\| `(LIGHTFORCING_[A-Z_]+)", README, re.MULTILINE))


def test_links_inside_the_repository_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"`((?:csrc|lightforcing|notebooks|benchmarks)/[\w./-]*)`", README):
        assert (ROOT / path).exists(), path
