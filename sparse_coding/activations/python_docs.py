"""Text that is already on disk: Python's own manual pages, docstrings and sources; the default, needs no network.

Three kinds of documents, about eight million characters together with Python 3.11:
the language manual behind `help()` (English prose), the docstrings of every module of the standard library
(one document per module, each docstring under its qualified name), and the sources of those modules without
their docstrings, so that nothing stands twice and a held-out document has no copy among the training ones.

Nothing is imported to be read: sources go through `ast`. Only modules that every build of Python ships are read,
so the corpus depends on the Python version alone.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import random
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from sparse_coding.errors import UserError

FORMAT = 1  # raise when the text made from the same files changes: it is part of the identity
ORDER_SEED = 0
# left out: what distributions package apart, tables of code points, and `pydoc_data` (its topics are documents already)
OMITTED = {"distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "msilib"}
OMITTED |= {"pydoc_data", "tkinter", "turtle", "turtledemo"}
NOT_TEXT = {"test", "tests", "site-packages", "__pycache__"}


def python_docs() -> list[tuple[str, str]]:
    """(name, text) of every document, kinds mixed by a fixed shuffle; names start `topics/`, `docstrings/`, `sources/`.

    The same on every machine with the same Python version. Raises `UserError` where Python ships neither kind.
    """
    documents = [(f"topics/{name}", text) for name, text in sorted(_topics().items())]
    for name, path in _modules():
        source = _source(path)
        if source is None:
            continue
        docstrings, code = _split(name, source)
        documents += [(f"docstrings/{name}", docstrings), (f"sources/{name}", code)]
    documents = [(name, text) for name, text in documents if text.strip()]
    if not documents:
        raise UserError(
            "python-docs: this Python ships neither its manual pages nor the sources of its standard library; "
            "give a local file or folder of text instead (--text path)"
        )
    random.Random(ORDER_SEED).shuffle(documents)
    return documents


def python_docs_identity() -> dict[str, str | int]:
    """The Python version and a sha256 over every file that `python_docs` reads; much quicker than making the text."""
    digest = hashlib.sha256()
    for name, text in sorted(_topics().items()):
        digest.update(f"{name}\0{text}\0".encode())
    for name, path in _modules():
        digest.update(f"{name}\0".encode())
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return {"python": platform.python_version(), "sha256": digest.hexdigest(), "format": FORMAT}


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return {}
    return topics


def _modules() -> Iterator[tuple[str, Path]]:
    """(dotted module name, source file) of the standard library, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py") if root.is_dir() else ():
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or parts[0] in OMITTED or NOT_TEXT.intersection(parts):
            continue
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    yield from sorted(found)


def _source(path: Path) -> str | None:
    """The text of a module; None where it cannot be read (rights, a bad encoding)."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


def _split(module: str, source: str) -> tuple[str, str]:
    """The docstrings of a module as one text, each under its qualified name, and the source without them."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return "", source
    paragraphs: list[str] = []
    kept: list[str | None] = [*source.split("\n")]  # as ast counts lines: splitlines would also cut at form feeds
    for name, node in _documented(module, tree):
        docstring = ast.get_docstring(node)
        if docstring:
            paragraphs.append(f"{name}\n\n{docstring}\n")
            _blank(kept, node.body[0])
    return "\n".join(paragraphs), "\n".join(line for line in kept if line is not None)


def _documented(
    name: str, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
) -> Iterator[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All under `node` (itself included) that can hold a docstring, with qualified names, in source order."""
    yield name, node
    waiting = list(reversed(node.body))
    while waiting:
        child = waiting.pop()
        if isinstance(child, ast.ClassDef):
            yield from _documented(f"{name}.{child.name}", child)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = ast.unparse(child.args)
            for qualified, inner in _documented(f"{name}.{child.name}", child):
                yield (f"{qualified}({arguments})" if inner is child else qualified), inner
        elif isinstance(child, ast.If | ast.Try | ast.With):
            bodies = [*child.body, *getattr(child, "orelse", [])]
            for handler in getattr(child, "handlers", []):
                bodies += handler.body
            waiting += reversed([*bodies, *getattr(child, "finalbody", [])])


def _blank(lines: list[str | None], docstring: ast.stmt) -> None:
    """Take out (None) the lines that hold nothing but this docstring; one that shares a line with code stays."""
    first, last = docstring.lineno - 1, (docstring.end_lineno or docstring.lineno) - 1
    # ast counts columns in utf-8 bytes
    before = (lines[first] or "").encode()[: docstring.col_offset]
    after = (lines[last] or "").encode()[docstring.end_col_offset :]
    if not before.strip() and not after.strip(b" \t\r\n;"):
        lines[first : last + 1] = [None] * (last + 1 - first)
