"""Train a sweep of sparse dictionaries on the activations of a language model: capture, sweep, evaluate, report.

    python run.py                               the bundled tiny GPT on the text of the Python install: no network
    python run.py --model gpt2 --layer 2        GPT-2 small on Pile10k, the MLP of layer 2
    python run.py --model FOLDER --text FILE    a model and a text of your own
    python run.py --l1 1 3 10 --ratios 2 8      another grid; `logspace:-1:1:9` gives nine values from 0.1 to 10
    python run.py --architecture topk jumprelu --k 16 32      other dictionaries, side by side on the same stream
    python run.py --location mlp_in --target-location mlp_out --architecture topk           transcoders

Activations are scaled to mean norm sqrt(width), so that L1 values mean the same on every model. The same command
continues a run that was stopped, or redraws the report of one that is finished.
"""

import sys

from sparse_coding.config import parse
from sparse_coding.errors import reported

if __name__ == "__main__":
    with reported():
        from sparse_coding.run_settings import RunSettings

        settings = parse(RunSettings, sys.argv[1:], "python run.py", __doc__ or "")

        from sparse_coding.pipeline import run

        print(f"report: {run(settings)}")
