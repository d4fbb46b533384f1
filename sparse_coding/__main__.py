"""`python -m sparse_coding VERB`: the parts of the product, one verb each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import getdoc
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from sparse_coding.config import parse
from sparse_coding.errors import UserError, near, reported


def train_lm(arguments: Sequence[str]) -> None:
    """train a small GPT from a nanoGPT-style config file"""
    from sparse_coding.language_models.train import main

    main(list(arguments))


def prepare_text(arguments: Sequence[str]) -> None:
    """turn text into token files in nanoGPT's layout, or back"""
    from sparse_coding.language_models.prepare_text import PrepareText, run

    run(parse(PrepareText, arguments, "python -m sparse_coding prepare-text", getdoc(PrepareText) or ""))


@dataclass(frozen=True)
class ExportFlags:
    """Write a model as a checkpoint that nanoGPT's sample.py loads and its train.py goes on with."""

    model: Positional[str]
    """A model folder (of train-lm, or any GPT-2 in Hugging Face layout), a Hugging Face name, or a bundled model."""
    checkpoint: Positional[Path]
    """The file to write, such as out/ckpt.pt."""


def export_nanogpt(arguments: Sequence[str]) -> None:
    """write a model as a checkpoint of nanoGPT"""
    flags = parse(ExportFlags, arguments, "python -m sparse_coding export-nanogpt", ExportFlags.__doc__ or "")
    from sparse_coding.language_models.exchange import export_nanogpt

    export_nanogpt(flags.model, flags.checkpoint)


@dataclass(frozen=True)
class ImportFlags:
    """Write a checkpoint of nanoGPT as a model folder in Hugging Face layout."""

    checkpoint: Positional[Path]
    """The checkpoint, such as out/ckpt.pt."""
    folder: Positional[Path]
    """The folder to make."""
    gelu: Literal["exact", "tanh"] | None = None
    """Form of GELU, which nanoGPT does not record: tanh until June 2023 and for GPT-2's weights, exact since. By
    default what our exports say, else exact."""
    tokenizer: str | None = None
    """A tokenizer's Hugging Face name or folder; by default the one beside the checkpoint or in its data/DATASET."""


def import_nanogpt(arguments: Sequence[str]) -> None:
    """write a checkpoint of nanoGPT as a model folder"""
    flags = parse(ImportFlags, arguments, "python -m sparse_coding import-nanogpt", ImportFlags.__doc__ or "")
    from sparse_coding.language_models.exchange import import_nanogpt

    import_nanogpt(flags.checkpoint, flags.folder, flags.gelu, flags.tokenizer)


@dataclass(frozen=True)
class SitesFlags:
    """List the sites of a model that activations can be taken from."""

    model: str = "python-gpt-large"
    """A Hugging Face name, a local folder, a checkpoint of nanoGPT, or a bundled model."""


def sites(arguments: Sequence[str]) -> None:
    """list the sites of a model"""
    flags = parse(SitesFlags, arguments, "python -m sparse_coding sites", SitesFlags.__doc__ or "")
    from sparse_coding.activations.models import load_model
    from sparse_coding.activations.sites import list_sites

    for name in list_sites(load_model(flags.model, device="cpu")):
        print(name)


@dataclass(frozen=True)
class ReportFlags:
    """Draw the pictures and the report of a finished run again, from its data files."""

    folder: Positional[Path]
    """The run folder, such as outputs/toy-quick-1a2b3c4d."""


def report(arguments: Sequence[str]) -> None:
    """draw the report of a finished run again"""
    flags = parse(ReportFlags, arguments, "python -m sparse_coding report", ReportFlags.__doc__ or "")
    from sparse_coding.report.redraw import redraw

    print(f"report: {redraw(flags.folder)}")


def harvest(arguments: Sequence[str]) -> None:
    """keep a model's activations in a store, to train from again and again"""
    from sparse_coding.harvest_flags import HarvestFlags

    flags = parse(HarvestFlags, arguments, "python -m sparse_coding harvest", HarvestFlags.__doc__ or "")
    from sparse_coding.harvest import harvest as run

    run(flags)


def store(arguments: Sequence[str]) -> None:
    """describe, verify, copy or merge stores of activations"""
    from sparse_coding.stores.verbs import main

    main(arguments)


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "prepare-text": prepare_text,
    "train-lm": train_lm,
    "export-nanogpt": export_nanogpt,
    "import-nanogpt": import_nanogpt,
    "sites": sites,
    "harvest": harvest,
    "report": report,
    "store": store,
}


def main(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m sparse_coding VERB ... (each verb explains itself with --help)\n")
        for name, verb in VERBS.items():
            print(f"  {name:<14} {verb.__doc__}")
        return
    if arguments[0] not in VERBS:
        raise UserError(f"unknown verb {arguments[0]!r}: have {', '.join(VERBS)}{near(arguments[0], VERBS)}")
    VERBS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    with reported():
        main(sys.argv[1:])
