"""A command killed again and again until it ends, and what its end must have in common with one left in peace."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from sparse_coding.training.run_folder import read_lines

ROOT = Path(__file__).resolve().parents[2]
KILLS, KILLS_AT_END = 20, 5
END_EVENTS = 200
"""A few more than a life has that begins where training is over."""


@dataclass(frozen=True)
class Life:
    """How a process ended: its exit code (-9: killed), what it said, its file events if it was not killed, and the
    seconds from the signal to its end."""

    code: int
    out: str
    err: str
    events: int
    seconds: float


class Lives:
    """Starts the project's commands in processes that need no imports any more (see zygote.py)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.zygote = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def one(
        self,
        words: Sequence[str],
        folder: Path,
        event: int = 0,
        late: float | None = None,
        number: int = signal.SIGKILL,
    ) -> Life:
        """`words` as after `python`. `folder`: whose file events count. event: at which to kill, 0: never.

        late: seconds after that event, for another signal than SIGKILL too.
        """
        names = {name: str(self.folder / name) for name in ("stdout", "stderr", "events")}
        request = {"words": list(words), "folder": str(folder), "event": event, "late": late, "signal": number}
        assert self.zygote.stdin is not None
        assert self.zygote.stdout is not None
        self.zygote.stdin.write(json.dumps(request | names) + "\n")
        self.zygote.stdin.flush()
        told = json.loads(self.zygote.stdout.readline())
        return Life(
            told["code"],
            *(Path(names[name]).read_text() for name in ("stdout", "stderr")),
            told["events"],
            told["seconds"],
        )

    def killed(
        self,
        words: Sequence[str],
        folder: Path,
        events: int,
        check: Callable[[], None],
        last: Path | None = None,
    ) -> list[Life]:
        """Kill the command `KILLS` times, at moments drawn all over its work, then leave it in peace.

        events: of a life in peace; each kill comes within a quarter of that. last: what is there once training is over,
        from where on a life has few events and takes its time: `KILLS_AT_END` come there. Where the command ends before
        all kills have come, it begins once more from nothing, so as many come on any machine. `check` is called
        whenever it has ended. Returns all lives.
        """
        draw, lives, at_end = random.Random(0), [], 0
        while sum(life.code == -9 for life in lives) < KILLS or (last and at_end < KILLS_AT_END):
            over = last is not None and last.exists()
            event = draw.randint(1, END_EVENTS if over else max(2, events // 4))
            late = draw.uniform(0, 0.3 if over else 0.03) if draw.random() < 0.5 else None
            lives.append(self.one(words, folder, event, late))
            assert lives[-1].code in (-9, 0), lives[-1].err[-3000:]
            at_end += over and lives[-1].code == -9
            if lives[-1].code == 0:
                check()
                shutil.rmtree(folder)
        lives.append(self.one(words, folder))
        assert lives[-1].code == 0, lives[-1].err[-3000:]
        check()
        return lives

    def close(self) -> None:
        assert self.zygote.stdin is not None
        self.zygote.stdin.close()
        self.zygote.wait(60)


def assert_same_run(expected: Path, got: Path) -> None:
    for folder in sorted((expected / "dictionaries").iterdir()):
        a, b = (load_file(base / "dictionaries" / folder.name / "sae_weights.safetensors") for base in (expected, got))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), folder.name

    def timeless(base):
        return [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(base / "log.jsonl")]

    assert timeless(expected) == timeless(got)
    for name in {"results.jsonl", "latents.json", "members.json"} & {path.name for path in expected.iterdir()}:
        assert (expected / name).read_bytes() == (got / name).read_bytes(), name
