"""C++ sources of this package, compiled by the system's compiler when first needed and kept in the user's cache.

What is kept is named by a hash of the sources, the flags, the compiler and the CPU, so that a change of any makes a new
one. Nothing is loaded from a folder that another user could write to. `SPARSE_CODING_NATIVE=0` switches it off; then,
and where there is no compiler, torch's operators do the work more slowly.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

FLAGS = (
    "-O3", "-march=native", "-std=c++20", "-fPIC", "-shared", "-pthread", "-ffp-contract=fast",
    "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno",
)  # fmt: skip
SECONDS = 300


class CannotCompile(Exception):
    """Why there is no compiled step: one line."""


def compiled(main: str, sources: Sequence[Path]) -> ctypes.CDLL | None:
    """The library made of `main`, one of `sources`; None, with a line on stderr, where it cannot be had."""
    if os.environ.get("SPARSE_CODING_NATIVE", "1") == "0":
        return None
    try:
        library = ctypes.CDLL(str(built_file(main, sources)))
    except (CannotCompile, OSError) as reason:
        print(f"no compiled training step ({reason}): torch's operators take its place, more slowly", file=sys.stderr)
        return None
    share_threads(library)
    return library


def share_threads(library: ctypes.CDLL) -> None:
    """Let a library that can (cpp/team.h) work on the threads of torch's OpenMP; else it starts its own."""
    pool = openmp()
    if pool is not None and hasattr(library, "use_pool"):
        library.use_pool(*(ctypes.cast(one, ctypes.c_void_p) for one in (pool.GOMP_parallel, pool.omp_get_num_threads)))


def openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch has loaded; None where it is not found."""
    import torch

    try:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    except OSError:
        return None
    own = Path(torch.__file__).parent
    for path in sorted(map(Path, mapped), key=lambda path: own not in path.parents):  # torch's own before others
        if path.name.startswith(("libgomp", "libiomp5", "libomp")):
            try:
                found = ctypes.CDLL(str(path))
            except OSError:
                continue
            if hasattr(found, "GOMP_parallel") and hasattr(found, "omp_get_num_threads"):
                return found
    return None


def built_file(main: str, sources: Sequence[Path]) -> Path:
    """The library's file, compiled now where it is not there yet."""
    if not hasattr(os, "getuid"):
        raise CannotCompile("this system does not say whose a file is")
    compiler = find_compiler()
    folder = private_folder()
    path = folder / f"{Path(main).stem}-{fingerprint(compiler, sources)}.so"
    if not path.exists():
        compile_(compiler, next(source for source in sources if source.name == main), path)
    if path.stat().st_uid != os.getuid() or path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CannotCompile(f"{path} may be written by others")
    return path


def find_compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = name and shutil.which(name)
        if found:
            return found
    raise CannotCompile("no C++ compiler is installed")


def private_folder() -> Path:
    """Where libraries are kept: the user's own, and written by nobody else."""
    cache = Path(os.environ.get("SPARSE_CODING_CACHE") or "~/.cache/sparse_coding").expanduser()
    folder = cache / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    known = folder.stat()
    if known.st_uid != os.getuid() or known.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CannotCompile(f"{folder} may be written by others")
    return folder


def fingerprint(compiler: str, sources: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False, timeout=SECONDS).stdout
    for part in (version, " ".join(FLAGS).encode(), cpu().encode(), *(source.read_bytes() for source in sources)):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:24]


def cpu() -> str:
    """What the CPU can do: a cache on a shared disk serves machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("flags", "model name", "cpu family", "Features", "CPU implementer", "CPU part")
    return "\n".join(line for line in lines if line.startswith(wanted))


def compile_(compiler: str, source: Path, path: Path) -> None:
    """Under another name first: another process may be doing the same."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    try:
        command = [compiler, *FLAGS, str(source), "-o", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        if done.returncode:
            raise CannotCompile(f"{compiler} fails: {(done.stderr.strip() or 'no message').splitlines()[0]}")
        os.chmod(name, 0o700)
        os.replace(name, path)
    except subprocess.TimeoutExpired:
        raise CannotCompile(f"{compiler} takes more than {SECONDS} s") from None
    finally:
        Path(name).unlink(missing_ok=True)
