"""The Hugging Face hub, where it can be reached, and its caches where not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def offline_if_unreachable(seconds: float = 5.0) -> Iterator[None]:
    """Inside, the Hugging Face libraries use their caches only when the hub does not answer one request.

    Without it they try again for 20 to 50 seconds before they look into the cache or give up.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    switched: list[Any] = []
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=seconds)
        except Exception:  # whichever HTTP library is below: no answer is no answer
            loaded = [sys.modules[name] for name in ("datasets.config",) if name in sys.modules]
            switched = [(module, module.HF_HUB_OFFLINE) for module in (constants, *loaded)]
    try:
        for module, _ in switched:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, before in switched:
            module.HF_HUB_OFFLINE = before
