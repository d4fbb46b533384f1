"""Every command killed twenty times at random moments until it ends: it ends with the bits of one left in peace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_coding.errors import UserError
from sparse_coding.harvest import harvest
from sparse_coding.pipeline import run
from sparse_coding.stores.objects import open_objects
from sparse_coding.stores.own import own
from sparse_coding.training.run_folder import read_lines
from tests.end_to_end.harvesting import HIDDEN, files, flags, run_flags, settings, words_of
from tests.end_to_end.lives import ROOT, Lives, assert_same_run

OFTEN = ("--checkpoint-seconds", "0", "--checkpoint-share", "1")
"""A checkpoint after every update: as much as can be to go wrong, and progress in every life that gets there."""
LIVE = (
    "--tokens 20k --batch-size 128 --buffer-rows 2048 --eval-rows 1k --splice-tokens 500 --ratios 0.5 1 --l1 0.5 8 "
    "--lr 0.01 --latents 3 --layer 1 --dead-latents resample --resample-rows 1k --resample-every 40 --resample-times 3 "
    "--dead-feature-window 1500 --dead-feature-threshold 0.001 --feature-sampling-window 1500 "
    "--sparsity-warmup-steps 30 --schedule cosine"
)
TOY = "replicate_toy_models.py --preset quick --l1 0.1 1 --ratios 0.5 1 --eval-samples 3000 --steps 60"


def check_run(lives: Lives, words: list[str], folder: Path) -> None:
    """Kill `words --out` until it ends; its dictionaries, log and results are those of one left in peace."""
    whole, killed = folder / "whole", folder / "killed"
    undisturbed = lives.one([*words, "--out", str(whole)], whole)
    assert undisturbed.code == 0, undisturbed.err
    steps = read_lines(whole / "log.jsonl")[-1]["step"]
    found = lives.killed(
        [*words, "--out", str(killed)],
        killed,
        undisturbed.events,
        lambda: assert_same_run(whole, killed),
        killed / "checkpoints" / f"step-{steps:09d}",
    )
    assert sum("continuing at step" in life.err for life in found) >= 8


def test_live_capture_with_resampling_dead_counters_and_schedules(lives, small_gpt2, small_text, tmp_path):
    words = ["run.py", *LIVE.split(), "--model", str(small_gpt2), "--text", str(small_text), *OFTEN]
    check_run(lives, words, tmp_path)
    dead = [max(line["dead"]) for line in read_lines(tmp_path / "whole" / "log.jsonl")]
    assert max(dead) > 5
    assert min(dead[130:]) > 0  # at the last resampling and after it


def test_training_from_a_store(lives, harvested, tmp_path):
    words = ["run.py", *run_flags(harvested, tmp_path, "--sites", HIDDEN, *OFTEN)]
    words[words.index("--out") : words.index("--out") + 2] = []
    check_run(lives, words, tmp_path)


def test_the_toy_study(lives, tmp_path):
    check_run(lives, [*TOY.split(), *OFTEN], tmp_path)


FEWER = ("--shard-rows", "50", "--codec", "int8", "--keep-tokens", "--tokens", "5k")
MANY = ("--shard-rows", "50", "--codec", "int8", "--keep-tokens")


def test_a_harvest(lives, small_gpt2, small_text, tmp_path):
    """Byte for byte, the manifest too, with the mean and variance in it."""
    whole, killed = tmp_path / "whole" / "s", tmp_path / "killed" / "s"
    command = ["-m", "sparse_coding", "harvest"]
    undisturbed = lives.one([*command, *words_of(small_gpt2, small_text, whole, *FEWER)], whole)
    assert undisturbed.code == 0, undisturbed.err

    def check() -> None:
        assert files(whole) == files(killed)

    found = lives.killed(
        [*command, *words_of(small_gpt2, small_text, killed, *FEWER)], killed, undisturbed.events, check
    )
    assert sum("continuing after" in life.out for life in found) >= 5


# ---- SIGTERM


@pytest.mark.parametrize("kind", ["live", "store", "toy", "harvest"])
def test_sigterm_saves_within_seconds(lives, kind, harvested, small_gpt2, small_text, tmp_path):
    """As the watch over a spot machine sends it: early in training or harvesting, and again later."""
    out = tmp_path / "s"
    words = {
        "live": ["run.py", *LIVE.split(), "--model", str(small_gpt2), "--text", str(small_text), "--out", str(out)],
        "store": ["run.py", *run_flags(harvested, out, "--sites", HIDDEN)],
        "toy": [*TOY.split(), "--out", str(out)],
        "harvest": ["-m", "sparse_coding", "harvest", *words_of(small_gpt2, small_text, out, *FEWER)],
    }[kind]
    words += OFTEN if kind != "harvest" else ()
    for _ in range(2):
        life = lives.one(words, out, event=300, late=0.0, number=signal.SIGTERM)
        assert life.code == 130, life.err
        assert life.seconds < 10
        assert "stopped: by SIGTERM at" in life.err
        assert "same command continues" in life.err
        assert "Traceback" not in life.err
    assert lives.one(words, out).code == 0


# ---- by hand, without a fork


def test_the_real_command_killed_and_started_by_hand(small_gpt2, small_text, tmp_path):
    """Processes of their own: killed in training, then SIGTERM, then left in peace."""
    out = tmp_path / "killed"
    usual = [*LIVE.split(), "--model", str(small_gpt2), "--text", str(small_text)]
    run(settings(*usual, "--out", str(tmp_path / "whole")))
    words = [sys.executable, "run.py", *usual, *OFTEN, "--out", str(out)]
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 130)):
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        before = {path.name for path in out.glob("checkpoints/step-*")}
        while process.poll() is None and not {path.name for path in out.glob("checkpoints/step-*")} - before:
            time.sleep(0.005)
        process.send_signal(number)
        began = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - began < 10
        assert process.returncode == code, errors
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "continuing at step" in done.stderr
    assert_same_run(tmp_path / "whole", out)


# ---- several processes


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_two_processes_killed_and_started_again_leave_the_files_that_one_does(
    place, small_gpt2, small_text, tmp_path, monkeypatch
):
    from tests.stores.fake_s3 import serving

    alone, shared = tmp_path / "alone", tmp_path / "shared"
    harvest(flags(small_gpt2, small_text, alone, *MANY))
    with serving(monkeypatch) as fake:
        store = str(shared) if place == "folder" else "s3://bucket/shared"

        def found() -> dict[str, bytes]:
            if place == "folder":
                return files(shared)
            return {name.removeprefix("bucket/shared/"): data for name, data in fake.objects.items()}

        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        words += ["-m", "sparse_coding", "harvest", *words_of(small_gpt2, small_text, store, *MANY)]
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

        def shards() -> int:
            if place == "folder":
                return len(list(shared.glob("site-0/*.safetensors")))  # reading them would take too long
            return sum("/site-0/" in name for name in list(fake.objects))

        while process.poll() is None and shards() < 20:
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it could be killed"
        kill_all(process)
        while place == "folder" and locked(shared):  # a process whose first thread is gone may have others
            time.sleep(0.01)
        assert "manifest.json" not in found()
        with pytest.raises(UserError, match=r"begun by 2 processes: continue it with torchrun --nproc_per_node=2"):
            harvest(flags(small_gpt2, small_text, store, *MANY))
        with pytest.raises(UserError, match=r"is not complete: 2 processes harvest it"):
            run(settings(*run_flags(store, tmp_path / "r")))
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert "continuing after" in done.stdout
        expected, got = files(alone, "manifest.json"), found()
        del got["manifest.json"]
        assert expected.keys() == got.keys()
        assert expected == got


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to torchrun and its processes, until all are gone."""
    threads = Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [int(one) for thread in threads for one in thread.read_text().split()]
    assert len(children) >= 2
    for number in (process.pid, *children):
        os.kill(number, signal.SIGKILL)
    process.wait()
    while any(running(number) for number in children):
        time.sleep(0.01)


def running(number: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def locked(store: Path) -> bool:
    try:
        with own(open_objects(str(store))):
            return False
    except UserError:
        return True
