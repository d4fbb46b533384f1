from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from sparse_coding.activations import python_docs as module
from sparse_coding.activations.python_docs import python_docs, python_docs_identity
from sparse_coding.errors import UserError


@pytest.fixture(scope="module")
def corpus() -> list[tuple[str, str]]:
    return python_docs()


def small_library(folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    """Let `folder` with these files stand for the standard library."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", newline="")
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(folder))


def test_the_corpus_holds_millions_of_characters_of_three_kinds(corpus: list[tuple[str, str]]) -> None:
    assert sum(len(text) for _, text in corpus) > 5_000_000
    assert {name.split("/")[0] for name, _ in corpus} == {"topics", "docstrings", "sources"}
    assert len({name for name, _ in corpus}) == len(corpus)
    assert all(text.strip() for _, text in corpus)


def test_the_corpus_and_its_identity_are_the_same_each_time(corpus: list[tuple[str, str]]) -> None:
    assert python_docs() == corpus
    assert python_docs_identity() == python_docs_identity()


def test_kinds_are_mixed(corpus: list[tuple[str, str]]) -> None:
    quarter = corpus[: len(corpus) // 4]
    for kind in ("topics", "docstrings", "sources"):
        share = sum(name.startswith(kind) for name, _ in quarter) / sum(name.startswith(kind) for name, _ in corpus)
        assert 0.1 < share < 0.4


def test_tests_and_parts_that_distributions_drop_are_left_out(corpus: list[tuple[str, str]]) -> None:
    modules = [name.split("/", 1)[1].split(".") for name, _ in corpus if not name.startswith("topics/")]
    for dropped in ("test", "tests", "site-packages", "idlelib", "tkinter", "pydoc_data"):
        assert not any(dropped in parts for parts in modules)
    assert ["json", "decoder"] in modules


def test_a_docstring_stands_under_its_qualified_name_and_no_longer_in_the_source(corpus: list[tuple[str, str]]) -> None:
    texts = dict(corpus)
    sentence = "Decode a JSON document from ``s``"
    assert "json.decoder.JSONDecoder.raw_decode(self, s, idx=0)\n\n" + sentence in texts["docstrings/json.decoder"]
    assert sentence not in texts["sources/json.decoder"]
    assert "def raw_decode(self, s, idx=0):\n" in texts["sources/json.decoder"]


SOURCE = '''"""Module é."""
import os
\f
class Thing:
    """Thing."""

    def method(self, x: int = 3) -> None:
        """Method
        on two lines.
        """
        return None

    def one_line(self): "Stays."

if os:
    async def inner(*, y):
        """Inner."""
        def nested():
            """Nested."""
else:
    def other():
        """Other."""
try:
    pass
except OSError:
    def rescue():
        """Rescue."""
'''


def test_docstrings_are_taken_out_line_by_line_wherever_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_library(tmp_path, monkeypatch, {"json/__init__.py": SOURCE})
    monkeypatch.setattr(module, "_topics", dict)
    texts = dict(python_docs())
    assert texts["docstrings/json"] == (
        "json\n\nModule é.\n\njson.Thing\n\nThing.\n\njson.Thing.method(self, x: int=3)\n\nMethod\non two lines.\n\n"
        "json.Thing.one_line(self)\n\nStays.\n\njson.inner(*, y)\n\nInner.\n\njson.inner.nested()\n\nNested.\n\n"
        "json.other()\n\nOther.\n\njson.rescue()\n\nRescue.\n"
    )
    kept = [line for line in SOURCE.split("\n") if '"""' not in line and line != "        on two lines."]
    assert texts["sources/json"] == "\n".join(kept)


def test_only_modules_of_the_standard_library_are_read_and_bad_syntax_stays_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"json/a.py": "x = 1\n", "sitecustomize.py": "x = 2\n", "site-packages/numpy.py": "x = 3\n"}
    small_library(tmp_path, monkeypatch, files | {"ast.py": "print 'old'\n", "json/tests/b.py": "x = 4\n"})
    monkeypatch.setattr(module, "_topics", dict)
    assert sorted(python_docs()) == [("sources/ast", "print 'old'\n"), ("sources/json.a", "x = 1\n")]


def test_the_identity_follows_the_files_and_not_their_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_library(tmp_path, monkeypatch, {"ast.py": "x = 1\ny = 2\n"})
    first = python_docs_identity()
    small_library(tmp_path, monkeypatch, {"ast.py": "x = 1\r\ny = 2\r\n"})
    assert python_docs_identity() == first
    small_library(tmp_path, monkeypatch, {"ast.py": "x = 1\ny = 3\n"})
    assert python_docs_identity() != first


def test_missing_topics_are_no_error_and_missing_everything_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    small_library(tmp_path, monkeypatch, {"ast.py": "x = 1\n"})
    assert python_docs() == [("sources/ast", "x = 1\n")]
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"neither its manual pages nor the sources.*--text path"):
        python_docs()


def test_missing_sources_leave_the_topics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("pydoc_data.topics")
    fake.topics = {"b": "second", "a": "first"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", fake)
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path / "missing"))
    assert sorted(python_docs()) == [("topics/a", "first"), ("topics/b", "second")]


def test_nothing_is_imported_to_be_read(corpus: list[tuple[str, str]]) -> None:
    assert any(name == "sources/antigravity" for name, _ in corpus)
    assert "antigravity" not in sys.modules  # importing it opens a browser
