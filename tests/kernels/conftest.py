"""Both implementations of the sparse step."""

from __future__ import annotations

import pytest

from sparse_coding.dictionaries import relu
from sparse_coding.kernels import sparse, sparse_native


@pytest.fixture(params=["native", "operators"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of the two, taken at any density."""
    monkeypatch.setattr(sparse, "DENSEST", {"native": 1.0, "operators": 1.0})
    monkeypatch.setattr(relu, "DENSEST", 1.0)
    if request.param == "operators":
        monkeypatch.setattr(sparse_native, "loaded", lambda: None)
    elif sparse_native.loaded() is None:
        pytest.skip("no C++ compiler here")
    return request.param
