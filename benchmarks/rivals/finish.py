"""What a rival's run says when its dictionary is saved: that it is, and then its FVU on held-out activations."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def finish(job: dict[str, Any], reconstruct: Callable[[Tensor], Tensor]) -> None:
    print("SAVED", flush=True)
    x = torch.from_numpy(np.fromfile(job["held_out"], np.float32).reshape(-1, job["d_in"]))
    with torch.no_grad():
        error = sum(float((reconstruct(part) - part).square().sum()) for part in x.split(2048))
    print(json.dumps({"fvu": error / float((x - x.mean(0)).square().sum())}), flush=True)
