"""Builds the one extension, ``lightforcing._core``: C for the CPU and, where there is nvcc, CUDA.

No torch is imported. Environment:
    LIGHTFORCING_NO_CUDA=1       build the CPU half only, even when nvcc is found
    LIGHTFORCING_CUDA_ARCHS      chips to embed, such as "80 90a" (default: ARCHS below)
    LIGHTFORCING_SANITIZE=1      AddressSanitizer and UndefinedBehaviorSanitizer in the C half
    LIGHTFORCING_LINEINFO=1      line numbers in the CUDA code, for profilers; twice the size
    LIGHTFORCING_FUZZ=1          random pauses where attention's warps hand over, for tests only
    LIGHTFORCING_WERROR=1        compiler warnings are errors
    MAX_JOBS                     compilers at once (default: the processors of this machine)
"""

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# 90a code runs on Hopper only; compute_80 PTX lets any later chip run the portable kernels.
ARCHS = "80 86 89 90a 100 120"
COMMON = sorted(str(p) for p in Path("csrc/common").glob("*.c"))
SOURCES = sorted(str(p) for d in ("csrc/cpu", "csrc/python") for p in Path(d).glob("*.c"))
CUDA = sorted(str(p) for p in Path("csrc/cuda").glob("*.cu"))
SLOWEST = ("select", "compress")  # of CUDA, many instances each
HEADERS = sorted(str(p) for p in Path("csrc").rglob("*.h")) + sorted(
    str(p) for p in Path("csrc").rglob("*.cuh")
)


def asked(name):
    """True when the environment variable is set to anything but nothing, 0 or false."""
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no")


def find_nvcc():
    """The nvcc of CUDA_HOME, CUDA_PATH or PATH; None when there is none or it is not wanted."""
    if asked("LIGHTFORCING_NO_CUDA"):
        return None
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if root and (nvcc := Path(root) / "bin" / "nvcc").is_file():
            return str(nvcc)
    return shutil.which("nvcc")


def cudart_folder(nvcc):
    """Folder of libcudart_static.a, which nvcc itself names (its own symlink may lie elsewhere)."""
    said = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True
    )
    for line in said.stderr.splitlines():
        if line.startswith("#$ TOP="):
            top = Path(os.path.normpath(line.removeprefix("#$ TOP=")))
            for folder in (top / "lib64", top / "lib", top / "targets/x86_64-linux/lib"):
                if (folder / "libcudart_static.a").is_file():
                    return str(folder)
    raise SystemExit(f"{nvcc} names no folder with libcudart_static.a; set LIGHTFORCING_NO_CUDA=1")


class BuildCore(build_ext):
    """Compiles csrc/cuda with nvcc, several files at once, and links the objects in."""

    def build_extension(self, ext):
        """Build one extension, with the CUDA half when nvcc is there."""
        nvcc = find_nvcc()
        if nvcc and not CUDA:
            raise SystemExit(
                "csrc/cuda holds no .cu file; set LIGHTFORCING_NO_CUDA=1 to do without"
            )
        if nvcc:
            ext.extra_objects = self.compile_cuda(nvcc)
            ext.depends = [*ext.depends, *ext.extra_objects]  # relinked when one changes
            ext.library_dirs.append(cudart_folder(nvcc))
            ext.libraries += ["cudart_static", "dl", "rt", "pthread", "stdc++"]
            ext.sources = [s for s in ext.sources if not s.endswith("no_cuda.c")]
        super().build_extension(ext)

    def compile_cuda(self, nvcc):
        """Every .cu to an object, in parallel; one whose command and sources are as before stays.

        Told by content, not by time: copies of a tree, and builds for other chips, may mix both.
        """
        out = Path(self.build_temp) / "cuda"
        out.mkdir(parents=True, exist_ok=True)
        archs = os.environ.get("LIGHTFORCING_CUDA_ARCHS", ARCHS).split()
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = int(re.search(r"release (\d+)", said)[1])

        def compile_one(source):
            target, stamp, made = (
                out / (Path(source).stem + end) for end in (".o", ".stamp", ".d")
            )
            flags = nvcc_flags(source, archs, release)
            if target.exists() and stamp.exists() and stamp.read_text() == digest(flags, made):
                return str(target)
            stamp.unlink(missing_ok=True)
            command = [nvcc, *flags, "--threads", str(jobs), "-MD", "-MF", str(made)]
            done = subprocess.run(
                [*command, "-c", source, "-o", str(target)], capture_output=True, text=True
            )
            (out / (Path(source).stem + ".ptxas.log")).write_text(done.stderr)
            if done.returncode:
                raise SystemExit(f"nvcc failed on {source}:\n{done.stderr}")
            stamp.write_text(digest(flags, made))
            return str(target)

        # The slowest first: its end is the end of the build.
        order = sorted(CUDA, key=lambda source: Path(source).stem not in SLOWEST)
        with ThreadPoolExecutor(jobs) as pool:
            return sorted(pool.map(compile_one, order))


def nvcc_flags(source, archs, release):
    """What nvcc is told about a file: code for each chip, and one PTX that any later one takes."""
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    flags += [f'-DLF_CUDA_ARCHS="{" ".join(archs)}"']
    # A tenth of the size. Drivers before 2024 cannot unpack it; CUDA 13 needs newer ones anyway.
    flags += ["--compress-mode=size"] if release >= 13 else ["-Xfatbin", "-compress-all"]
    if asked("LIGHTFORCING_LINEINFO"):
        flags.append("-lineinfo")
    if asked("LIGHTFORCING_FUZZ") and "attend" in source:
        flags.append("-DLF_FUZZ=1")
    if source.endswith("_sm90.cu"):
        chips = [a for a in archs if a == "90a"] or ["90a"]
    else:
        chips = archs
        flags.append("-gencode=arch=compute_80,code=compute_80")
    return flags + [f"-gencode=arch=compute_{a},code=sm_{a}" for a in chips]


def digest(flags, made):
    """Of flags and of this project's files that it read, as nvcc's list `made` names them."""
    found = hashlib.sha256(repr(flags).encode())
    if made.exists():
        for name in sorted(set(made.read_text().replace("\\\n", " ").split())):
            if name.startswith("csrc/") and Path(name).is_file():
                found.update(name.encode() + Path(name).read_bytes())
    return found.hexdigest()


def numpy_include():
    """NumPy's headers; the build asks for NumPy 2, whose ABI also serves 1.23 and later."""
    import numpy

    return numpy.get_include()


def core():
    """The extension: limited API 3.10, NumPy target 1.23, OpenMP, no -march flag."""
    # No contraction: an FMA stands only where the source says so, so every build selects alike.
    flags = ["-std=gnu11", "-O3", "-g1", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden"]
    flags += ["-Wall", "-Wextra", "-fno-math-errno", "-fno-trapping-math"]
    link = ["-fopenmp"]
    if asked("LIGHTFORCING_WERROR"):
        flags.append("-Werror")
    if asked("LIGHTFORCING_SANITIZE"):
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        flags += [*sanitize, "-O1", "-fno-omit-frame-pointer"]
        link += sanitize
    return Extension(
        "lightforcing._core",
        sources=COMMON + SOURCES,
        depends=[*HEADERS, *CUDA],
        include_dirs=["csrc", numpy_include()],
        define_macros=[
            ("Py_LIMITED_API", "0x030A0000"),
            ("NPY_TARGET_VERSION", "NPY_1_23_API_VERSION"),
            ("NPY_NO_DEPRECATED_API", "NPY_1_23_API_VERSION"),
        ],
        extra_compile_args=flags,
        extra_link_args=link,
        py_limited_api=True,
    )


setup(
    ext_modules=[core()],
    cmdclass={"build_ext": BuildCore},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
