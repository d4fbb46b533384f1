"""SAELens's reader of cached activations, fed with the rows of one of our stores; runs with a Python that has sae_lens.

    python rival_activation_cache.py STORE FOLDER SITE SHARDS

Writes the rows as SAELens's CacheActivationsRunner writes them (a data set of float32 arrays [context d]), opens them
with its ActivationsStore at its defaults (but for a buffer of 64 contexts: its 20 hold less than a batch), says so in a
line of JSON, and then answers each line `N` on its standard input with the seconds that N batches took.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Array2D, Dataset, Features
from sae_lens import __version__
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file

CONTEXT, BATCH, HOOK = 128, 4096, "site"


def main() -> None:
    store, folder, site, shards = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    files = sorted((store / site).glob("*.safetensors"))[:shards]
    rows = torch.cat([load_file(file)["rows"] for file in files]).float()
    rows = rows[: len(rows) // CONTEXT * CONTEXT]
    features = Features({HOOK: Array2D(shape=(CONTEXT, rows.shape[1]), dtype="float32")})
    data = Dataset.from_dict({HOOK: rows.view(-1, CONTEXT, rows.shape[1]).numpy()}, features=features)
    data.save_to_disk(folder)
    reader = ActivationsStore(
        model=None, dataset=None, streaming=False, hook_name=HOOK, hook_head_index=None, context_size=CONTEXT,
        d_in=rows.shape[1], n_batches_in_buffer=64, total_training_tokens=10**9, store_batch_size_prompts=32,
        train_batch_size_tokens=BATCH, prepend_bos=False, normalize_activations="none", device=torch.device("cpu"),
        dtype="float32", cached_activations_path=folder,
    )  # fmt: skip
    print(json.dumps({"sae_lens": __version__, "rows": len(rows), "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            assert reader.next_batch().shape == (BATCH, rows.shape[1])
        print(json.dumps(time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
