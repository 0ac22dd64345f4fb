"""Rules a compiler does not check, checked on the source text and on the built module.

A line may opt out with `rule-ok` and a reason.
"""

import ast
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import lightforcing as lf
from lightforcing import _core

ROOT = Path(__file__).resolve().parent.parent
CSRC, PACKAGE, TESTS = ROOT / "csrc", ROOT / "lightforcing", ROOT / "tests"
C_FILES = (".c", ".h", ".cu", ".cuh")
VENDORED = {"dlpack.h"}
OPERATORS = ["cag_schedule", "compress", "select_blocks", "block_sparse_attention"]
SANITIZED = os.environ.get("LIGHTFORCING_SANITIZE") == "1"


def sources(*suffixes, under=CSRC):
    return [p for p in sorted(under.rglob("*")) if p.suffix in suffixes and p.name not in VENDORED]


def code(path):
    """The file with comments and string literals blanked, line by line."""
    text = path.read_text()
    pattern = r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"'
    blank = re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.S)
    return zip(text.splitlines(), blank.splitlines(), strict=True)


def offenders(pattern, *suffixes, but=()):
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources(*suffixes)
        if path.name not in but
        for number, (line, bare) in enumerate(code(path), 1)
        if re.search(pattern, bare) and "rule-ok" not in line
    ]


def tracked_text():
    """Every text file that belongs to the project."""
    kinds = {
        *C_FILES,
        ".py",
        ".pyi",
        ".md",
        ".toml",
        ".ipynb",
        ".json",
        ".patch",
        ".txt",
        ".sh",
        "",
    }
    made = re.compile(
        r"(^|/)(\.(?!ci/|clang-format|gitignore)|build/|dist/|demo/|__pycache__/)|egg-info"
    )
    for path in sorted(ROOT.rglob("*")):
        if path.suffix in kinds and not made.search(path.relative_to(ROOT).as_posix()):
            if path.is_file():
                yield path


# ---- C -------------------------------------------------------------------------------


def test_the_rules_look_at_something():
    assert len(sources(".c")) >= 6 and len(sources(".h")) >= 2 and len(sources(".cu")) >= 1


def test_inline_assembly_lives_in_one_file():
    assert not offenders(r"\b(asm|__asm__)\b", *C_FILES, but=("ptx.cuh",))


def test_nothing_ends_the_process_or_prints():
    assert not offenders(r"\b(exit|_exit|abort|printf|fprintf|puts|perror)\s*\(", *C_FILES)


def test_every_goto_goes_to_done():
    assert not offenders(r"\bgoto\s+(?!done;)", *C_FILES)


def test_no_unbounded_string_functions():
    assert not offenders(r"\b(strcpy|strcat|sprintf|vsprintf|gets)\s*\(", *C_FILES)


def test_no_fast_math():
    text = (ROOT / "setup.py").read_text()
    for flag in "-ffast-math", "-Ofast", "--use_fast_math", "-march=native":
        assert flag not in text


def test_every_launch_names_its_stream_and_is_checked():
    launches = 0
    for path in sources(".cu", ".cuh"):
        text = "\n".join(bare for _, bare in code(path))
        chevrons = re.findall(r"<<<(.*?)>>>", text, flags=re.S)
        assert all("stream" in x for x in chevrons), path.name
        assert text.count("LF_CUDA_TRY(cudaGetLastError())") == len(chevrons), path.name
        assert text.count("cudaLaunchConfig_t") == text.count(".stream ="), path.name
        # A launch by configuration is checked there, or returned to callers who all check it.
        for before in re.findall(r"(\S+)\s*cudaLaunchKernel\w*\(", text):
            assert before in ("LF_CUDA_TRY(", "return"), path.name
        for name in re.findall(r"\bcudaError_t (\w+)\(", text):
            calls = re.findall(rf"(\S+?)\s*\b{name}\(", text)
            assert set(calls) <= {"LF_CUDA_TRY(", "cudaError_t", "return"}, f"{path.name}: {name}"
        launches += len(chevrons) + text.count("cudaLaunchKernel")
    assert launches >= 1


def test_the_core_never_synchronises_or_allocates_on_the_device():
    assert not offenders(r"\bcuda(Malloc|Free|\w*Synchronize)\w*\s*\(", ".cu", ".cuh", ".c")


def test_c_files_open_with_what_they_compute():
    silent = [p.name for p in sources(*C_FILES) if not p.read_text().startswith("/* ")]
    assert not silent


def test_offsets_use_64_bits():
    # A [B, L, H, D] offset exceeds 2^31 at 14B sizes. A row's or block's number does not, and on
    # the GPU, where the launchers refuse 2^30 tokens, it may be an int (the copy engine wants one).
    assert not offenders(r"\bint\s+(\w*_)?(offset|stride|token|row|start)\b", ".c")
    assert not offenders(r"\bint\s+(\w*_)?(offset|stride)\b", ".cu", ".cuh")


# ---- every file ----------------------------------------------------------------------


def test_files_stay_readable():
    written = [*sources(*C_FILES), *sources(".py", ".pyi", under=PACKAGE)]
    written += [*sources(".py", under=TESTS), *sources(".py", under=ROOT / "benchmarks")]
    long = {p.name: n for p in written if (n := len(p.read_text().splitlines())) > 600}
    assert not long


def test_no_absolute_paths_of_a_workplace():
    pattern = re.compile(r"/(work|home|root|Users|tmp/lf)/\w")  # rule-ok: the rule itself
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:90]}"
        for path in tracked_text()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line) and "rule-ok" not in line
    ]
    assert not found


def test_nothing_left_to_do_in_comments():
    pattern = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")  # rule-ok: the rule itself
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_text()
        if path.suffix in {*C_FILES, ".py", ".pyi"} and path.name not in VENDORED
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line) and "rule-ok" not in line
    ]
    assert not found


def _tool(name):
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed; it is in the `dev` extra"
    return found


def _run(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_python_is_formatted_and_clean():
    _run(_tool("ruff"), "check", ".")
    _run(_tool("ruff"), "format", "--check", ".")


def test_c_is_formatted():
    _run(_tool("clang-format"), "--dry-run", "-Werror", *map(str, sources(*C_FILES)))


# ---- one operator, three places ------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_passes_through_three_places(operator):
    assert callable(getattr(lf, operator)) and callable(getattr(_core, operator))
    docstring = getattr(lf, operator).__doc__
    for part in "Args:", "Returns:", "Raises:", "Source:", "Reference:":
        assert part in docstring, f"{operator}: the docstring has no {part}"
    bindings = "".join(p.read_text() for p in sources(".c", under=CSRC / "python"))
    assert f"PyObject *py_{operator}(" in bindings
    word = {
        "cag_schedule": "cag",
        "select_blocks": "select",
        "block_sparse_attention": "attend",
    }.get(operator, operator)
    assert (CSRC / "cpu" / f"{word}.c").exists() and (TESTS / f"test_{word}.py").exists()
    header = (CSRC / "lightforcing.h").read_text()
    assert f"lf_{word}_params" in header and re.search(rf"\bint lf_{word}(_cpu)?\(", header)


def test_the_binding_knows_no_other_operator():
    """What _core holds besides operators: list conversions, plans, patched calls, test hooks."""
    others = {"select_plan", "lists_to_bool", "lists_to_csr", "bool_to_lists"}
    others |= {"threads", "set_threads", "isa", "force_isa", "build_info"}
    others |= {"cuda_warmup", "force_kernel", "why_portable"}
    others |= {"facts", "plan_step", "sparse_step", "is_disabled"}  # a patched call
    assert {n for n in dir(_core) if not n.startswith("_")} == {*OPERATORS, *others}


def test_the_stub_names_what_the_module_has():
    tree = ast.parse((PACKAGE / "_core.pyi").read_text())
    defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    defined |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign)}
    assert {n for n in defined if not n.startswith("_")} == {
        n for n in dir(_core) if not n.startswith("_")
    }
    assert (PACKAGE / "py.typed").exists()


def test_the_version_is_written_once():
    version = lf.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|(a|b|rc)\d+)?", version)
    written = [
        path.relative_to(ROOT).as_posix()
        for path in tracked_text()
        if path.suffix in {*C_FILES, ".py", ".toml"}
        and re.search(rf"version\w*\s*[:=].*['\"]{re.escape(version)}['\"]", path.read_text())
    ]
    assert written == ["lightforcing/_version.py"]
    assert lf.info()["version"] == version


# ---- the built module ----------------------------------------------------------------


def undefined_symbols(path):
    """Names of the undefined dynamic symbols and needed libraries of an ELF-64 file."""
    data = Path(path).read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", "not a little-endian ELF-64 file"
    offset, size, count = (
        struct.unpack_from("<Q", data, 40)[0],
        *struct.unpack_from("<HH", data, 58),
    )
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + i * size) for i in range(count)]
    dynsym = next(s for s in sections if s[1] == 11)
    strings = sections[dynsym[6]]

    def name(index):
        start = strings[4] + index
        return data[start : data.index(b"\0", start)].decode()

    symbols = set()
    for at in range(dynsym[4], dynsym[4] + dynsym[5], 24):
        index, _, _, section = struct.unpack_from("<IBBH", data, at)
        if section == 0 and index:
            symbols.add(name(index))
    dynamic = next(s for s in sections if s[1] == 6)
    entries = struct.iter_unpack("<qQ", data[dynamic[4] : dynamic[4] + dynamic[5]])
    return symbols, {name(value) for tag, value in entries if tag == 1}


def test_the_module_knows_no_torch():
    symbols, libraries = undefined_symbols(_core.__file__)
    assert "PyErr_Format" in symbols and any("libc" in x for x in libraries)
    strange = re.compile(r"torch|c10|aten|caffe|_ZN2at|numpy", re.I)
    assert not [s for s in symbols if strange.search(s)]
    assert not [x for x in libraries if strange.search(x) or "python" in x or "cudart" in x]
    assert _core.__file__.endswith(".abi3.so")


def test_the_module_exports_only_its_entry():
    data = Path(_core.__file__).read_bytes()
    assert b"PyInit__core" in data
    if shutil.which("nm"):
        listing = subprocess.run(
            ["nm", "-D", "--defined-only", _core.__file__], capture_output=True, text=True
        ).stdout
        names = {line.split()[-1] for line in listing.splitlines()}
        names = {n for n in names if not re.match(r"_*(asan|ubsan|odr_asan|sancov|init|fini)", n)}
        assert names == {"PyInit__core"}


def _import_milliseconds():
    """Processor time of `import lightforcing` after NumPy, in a fresh interpreter."""
    program = (
        "import time, numpy; start = time.process_time(); import lightforcing\n"
        "print((time.process_time() - start) * 1e3)"
    )
    command = [sys.executable, "-c", program]
    return float(subprocess.run(command, capture_output=True, check=True, cwd=ROOT).stdout)


def test_import_costs_little_beyond_numpy():
    _import_milliseconds()  # writes the byte code
    costs = [_import_milliseconds() for _ in range(9)]
    # The least is what it costs; the rest is what else the machine did.
    assert min(costs) <= 20 * (10 if SANITIZED else 1), costs


def test_import_brings_no_slow_module():
    """Of torch, and of what takes longer to load than all of the package, nothing."""
    program = (
        "import sys, numpy; before = set(sys.modules); import lightforcing; "
        "print(*set(sys.modules) - before)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    brought = set(done.stdout.split())
    assert "lightforcing.blocks" in brought
    assert not brought & {"torch", "dataclasses", "inspect", "dis", "tokenize", "ast"}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git to read a patch")
def test_seeded_faults_apply_to_the_tree():
    patches = sorted((TESTS / "mutants").rglob("*.patch"))
    assert len(patches) >= 25
    for patch in patches:
        check = ["git", "apply", "--check", patch]
        done = subprocess.run(check, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
