"""Imports once, then forks a process for every command that it is told to run, and kills it where it is told to.

Reads requests and writes answers as lines of JSON. A life is counted in file events (Python's audit events): what
is opened under a folder, and all that is made, renamed or removed. A kill is SIGKILL, at event number `event` exactly
(from inside: nothing runs after it) or, with `late`, by this process so many seconds after it, whatever is done then.
Another signal is sent in that second way.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.chmod", "os.truncate", "shutil.rmtree"}

COMMANDS = ("sparse_coding.pipeline", "sparse_coding.harvest", "sparse_coding.__main__", "replicate_toy_models")


def live(request: dict[str, Any], reached: int) -> None:
    """In the child: the command, as a shell would start it."""
    folder, event, late = request["folder"], request["event"], request["late"]
    known = Path(request["events"])
    count = 0

    def watch(name: str, arguments: tuple) -> None:
        nonlocal count
        if name in CHANGES or (name == "open" and folder in str(arguments[0])):
            count += 1
            if count == event:
                if late is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                os.write(reached, b".")

    for stream, path in ((1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    faulthandler.enable()
    sys.addaudithook(watch)
    sys.argv, code = list(request["words"]), 1
    try:
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        known.write_text(str(count))
        os._exit(code)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """One life, from its birth to its end."""
    Path(request["events"]).write_text("0")
    reached, told = os.pipe()
    child = os.fork()
    if not child:
        os.close(reached)
        live(request, told)
    os.close(told)
    if request["late"] is not None and os.read(reached, 1):  # nothing: it ended before
        time.sleep(request["late"])
        os.kill(child, request["signal"])  # one that has ended meanwhile is a zombie: no harm
    os.close(reached)
    sent = time.monotonic()
    _, status = os.waitpid(child, 0)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "events": int(Path(request["events"]).read_text() or 0),
        "seconds": time.monotonic() - sent,
    }


def import_all() -> None:
    """What the commands import sooner or later."""
    for name in ("matplotlib.pyplot", "transformers", *COMMANDS):
        importlib.import_module(name)
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast  # noqa: F401 - made when they are asked for


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    import_all()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
