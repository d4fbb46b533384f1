"""What a rival's run says when its dictionary is saved: that it is, its memory until then, its FVU on held-out rows."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def finish(job: dict[str, Any], reconstruct: Callable[[Tensor], Tensor]) -> None:
    print("SAVED", flush=True)
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"mib": mib, "fvu": fvu(reconstruct, job)}), flush=True)


def fvu(reconstruct: Callable[[Tensor], Tensor], job: dict[str, Any]) -> float:
    """Of the held-out activations of the job: squared error over that of their mean."""
    x = torch.from_numpy(np.fromfile(job["held_out"], np.float32).reshape(-1, job["d_in"]))
    with torch.no_grad():
        error = sum(float((reconstruct(part) - part).square().sum()) for part in x.split(2048))
    return error / float((x - x.mean(0)).square().sum())
