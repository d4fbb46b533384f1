"""The house rules: imports flow one way, the package loads quickly, heavy libraries only where they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "sparse_coding"
MAY_NOT_IMPORT = {
    "synthetic": ("activations", "stores", "dictionaries", "training", "formats", "report", "language_models"),
    "kernels": (
        "synthetic",
        "activations",
        "stores",
        "dictionaries",
        "metrics",
        "training",
        "formats",
        "report",
        "language_models",
    ),
    "dictionaries": (
        "synthetic",
        "activations",
        "stores",
        "metrics",
        "training",
        "formats",
        "report",
        "language_models",
    ),
    "metrics": ("synthetic", "activations", "stores", "training", "formats", "report", "language_models"),
    "training": ("synthetic", "activations", "stores", "metrics", "formats", "report", "language_models"),
    "formats": ("synthetic", "activations", "stores", "metrics", "report", "language_models"),
    "stores": ("synthetic", "dictionaries", "metrics", "training", "formats", "report", "language_models"),
    "report": ("synthetic", "activations", "stores", "language_models"),
}
HEAVY = (
    "transformers",
    "transformer_lens",
    "datasets",
    "wandb",
    "matplotlib",
    "obstore",
    "vastai",
    "scipy",
    "tokenizers",
)


def imported_modules(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("package", list(MAY_NOT_IMPORT))
def test_imports_flow_one_way(package):
    for file in sorted((PACKAGE / package).rglob("*.py")):
        for module in imported_modules(file):
            parts = module.split(".")
            if parts[0] == "sparse_coding" and len(parts) > 1:
                assert parts[1] not in MAY_NOT_IMPORT[package], f"{file.relative_to(PACKAGE)} imports {module}"


def test_importing_the_parts_loads_no_heavy_library():
    code = (
        "import sys, sparse_coding.run_settings, sparse_coding.training.trainer, sparse_coding.synthetic\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"


def test_no_file_unpickles_or_evaluates():
    """But for torch's restricted unpickler, and one of our own in formats/ that finds no class."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler"), (
                    f"{file}: {name}"
                )
                if name == "torch.load":
                    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    assert given.get("weights_only") == "True", f"{file}: {name} without weights_only=True"
            if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "torch"):
                taken = {alias.name for alias in node.names} & {"load", "loads", "Unpickler"}
                assert not taken, f"{file}: {taken} under a name that this test does not see"
            if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases):
                assert file.parent.name == "formats", f"{file}: an unpickler outside formats/"
                methods = {member.name for member in node.body if isinstance(member, ast.FunctionDef)}
                assert {"find_class", "persistent_load"} <= methods, f"{file}: {node.name} finds classes"
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", file
