"""The one exception for mistakes a user can mend, and the one place that prints it."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """A mistake the user can mend: one line that says what is wrong, what is allowed and what to do."""


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM); its state is saved and the message says how to go on."""


OUT_OF_MEMORY = (
    "error: out of memory; lower --batch-size, --buffer-rows or --ratios, or train fewer dictionaries at once; "
    "what was saved stays"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU (torch.OutOfMemoryError) or the machine had no memory left; without importing torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def near(word: str, known: Iterable[str], count: int = 3, cutoff: float = 0.5) -> str:
    """A ready-made clause such as `; did you mean 'layer'?`, empty when nothing is close."""
    matches = difflib.get_close_matches(word, list(known), n=count, cutoff=cutoff)
    return f"; did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


@contextmanager
def reported() -> Iterator[None]:
    """Print a `UserError` as one line and exit 2; an interruption says how to go on and exits 130.

    Of the processes that torchrun started, which all make the same mistake, only the first prints it.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"\nstopped: {' '.join(str(stop).split())}", file=sys.stderr)
        raise SystemExit(130) from None
    except KeyboardInterrupt:
        print("\nstopped: what was saved stays; the same command continues from there", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # whoever read our lines has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(OUT_OF_MEMORY, file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        print(
            f"error: the disk is full{where}; free some space and start the same command again: "
            "it continues from the last checkpoint",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
