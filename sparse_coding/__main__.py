"""`python -m sparse_coding VERB`: the parts of the product, one verb each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from sparse_coding.config import parse
from sparse_coding.errors import UserError, near, reported


def train_lm(arguments: Sequence[str]) -> None:
    """train a small GPT from a nanoGPT-style config file"""
    from sparse_coding.language_models.train import main

    main(list(arguments))


@dataclass(frozen=True)
class SitesFlags:
    """List the sites of a model that activations can be taken from."""

    model: str = "python-gpt"
    """A Hugging Face name, a local folder, or a bundled model."""


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


VERBS: dict[str, Callable[[Sequence[str]], None]] = {"train-lm": train_lm, "sites": sites, "report": report}


def main(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m sparse_coding VERB ... (each verb explains itself with --help)\n")
        for name, verb in VERBS.items():
            print(f"  {name:<12} {verb.__doc__}")
        return
    if arguments[0] not in VERBS:
        raise UserError(f"unknown verb {arguments[0]!r}: have {', '.join(VERBS)}{near(arguments[0], VERBS)}")
    VERBS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    with reported():
        main(sys.argv[1:])
