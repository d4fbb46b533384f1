from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_coding.kernels import compiled, sparse_native

SOURCE = 'extern "C" int answer() { return 42; }\n'

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler here"
)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSE_CODING_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSE_CODING_NATIVE", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def answer(source: Path) -> int:
    library = compiled.compiled("answer.cpp", [source])
    assert isinstance(library, ctypes.CDLL)
    return library.answer()


@needs_compiler
def test_a_source_is_compiled_once_and_again_when_it_changes(source, monkeypatch):
    calls = []
    compile_ = compiled.compile_
    monkeypatch.setattr(compiled, "compile_", lambda *arguments: calls.append(compile_(*arguments)))
    assert answer(source) == 42
    assert answer(source) == 42
    assert len(calls) == 1
    source.write_text(SOURCE.replace("42", "43"))
    assert answer(source) == 43
    assert len(calls) == 2
    monkeypatch.setattr(compiled, "cpu", lambda: "another CPU")
    assert answer(source) == 43
    assert len(calls) == 3
    assert all(name.name.startswith("answer-") for name in compiled.private_folder().iterdir())  # nothing half done


def test_it_can_be_switched_off(source, monkeypatch, capsys):
    monkeypatch.setenv("SPARSE_CODING_NATIVE", "0")
    assert compiled.compiled("answer.cpp", [source]) is None
    assert capsys.readouterr().err == ""


@needs_compiler
def test_a_source_that_does_not_compile_is_told_in_one_line(source, capsys):
    source.write_text("this is no C++\n")
    assert compiled.compiled("answer.cpp", [source]) is None
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "fails" in told
    assert not list(compiled.private_folder().iterdir())


def test_no_compiler_is_told_in_one_line(source, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert compiled.compiled("answer.cpp", [source]) is None
    assert "no C++ compiler is installed" in capsys.readouterr().err


@needs_compiler
def test_nothing_is_loaded_that_others_could_have_written(source, capsys):
    path = compiled.built_file("answer.cpp", [source])
    path.chmod(0o777)
    assert compiled.compiled("answer.cpp", [source]) is None
    path.chmod(0o700)
    assert compiled.compiled("answer.cpp", [source]) is not None
    path.parent.chmod(0o777)
    assert compiled.compiled("answer.cpp", [source]) is None
    assert capsys.readouterr().err.count("may be written by others") == 2


@needs_compiler
def test_a_cache_that_cannot_be_written_falls_back(source, monkeypatch, capsys):
    monkeypatch.setenv("SPARSE_CODING_CACHE", str(source))  # a file
    assert compiled.compiled("answer.cpp", [source]) is None
    assert "no compiled training step" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="where libraries lie is read from /proc")
def test_the_openmp_library_is_the_one_that_torch_uses():
    pool, threads = compiled.openmp(), torch.get_num_threads()
    assert pool is not None
    try:
        for wanted in (3, 2):
            torch.set_num_threads(wanted)
            assert pool.omp_get_max_threads() == wanted
    finally:
        torch.set_num_threads(threads)


@needs_compiler
def test_processes_that_compile_at_once_all_get_the_library(source):
    program = (
        "import sys; from pathlib import Path; from sparse_coding.kernels.compiled import compiled;"
        "sys.exit(compiled('answer.cpp', [Path(sys.argv[1])]).answer() != 42)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    started = [subprocess.Popen([sys.executable, "-c", program, str(source)], env=environment) for _ in range(3)]
    assert [one.wait() for one in started] == [0, 0, 0]


def test_every_header_that_is_compiled_is_part_of_the_fingerprint():
    included, waiting = set(), ["sparse_step.cpp"]
    while waiting:
        text = (sparse_native.FOLDER / waiting[0]).read_text()
        included.add(waiting.pop(0))
        waiting += [name for name in re.findall(r'#include "(.*)"', text) if name not in included]
    assert {path.name for path in sparse_native.SOURCES} == included


def test_the_structure_has_the_fields_that_the_header_has():
    header = next(path for path in sparse_native.SOURCES if path.name == "sparse_problem.h").read_text()
    body = header[header.index("struct Problem {") : header.index("};", header.index("struct Problem {"))]
    lines = [line.split("//")[0] for line in body.splitlines()[1:]]
    named = [name.strip(" *;") for line in lines for name in line.replace("const", "").split(",") if name.strip()]
    fields = [name.split()[-1].strip("*;") for name in named]
    assert tuple(fields) == (*sparse_native.INTEGERS, *sparse_native.NUMBERS, *sparse_native.POINTERS)
