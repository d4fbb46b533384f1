"""`python -m vast_utils VERB`: runs on machines that one rents, or already has."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from sparse_coding.errors import UserError, near, reported

Verb = Callable[[Sequence[str]], None]
VERBS = {
    "offers": ("offers", "main", "show what is to let and what the whole job would cost"),
    "launch": ("launch", "main", "run a command on a rented machine, fetch its results, destroy the machine"),
    "sweep": ("sweep", "main", "run many commands on several rented machines"),
    "status": ("run_verbs", "status", "show all runs, or the jobs of the machine at --ssh"),
    "logs": ("run_verbs", "logs", "print the log of a run, or of a job at --ssh"),
    "fetch": ("run_verbs", "fetch", "bring results here from a run's machines, or from --ssh"),
    "stop": ("run_verbs", "stop", "stop a run: save, fetch, destroy; or a job at --ssh"),
    "reap": ("reap", "main", "destroy every machine that was rented here, and check that it is gone"),
    "push": ("machine_verbs", "push", "send the project, or a folder of models, to the machine at --ssh"),
    "setup": ("machine_verbs", "setup", "check that machine and install what the project needs"),
    "start": ("machine_verbs", "start", "start a command there, detached"),
    "resume": ("machine_verbs", "resume", "start a command there again that is over"),
}
"""Each with its module, function, and what it does."""


def main(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m vast_utils VERB ... (each verb explains itself with --help)\n")
        for name, (_, _, what) in VERBS.items():
            print(f"  {name:<8} {what}")
        return
    if arguments[0] not in VERBS:
        raise UserError(f"unknown verb {arguments[0]!r}: have {', '.join(VERBS)}{near(arguments[0], VERBS)}")
    module, function, _ = VERBS[arguments[0]]
    getattr(import_module(f"vast_utils.{module}"), function)(arguments[1:])


if __name__ == "__main__":
    with reported():
        main(sys.argv[1:])
