"""run.py killed again and again, and moved from machine to machine: it ends with the bits of a run left in peace."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_coding.config import parse
from sparse_coding.pipeline import run
from sparse_coding.run_settings import RunSettings
from tests.end_to_end.lives import assert_same_run

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--tokens 30k --batch-size 128 --buffer-rows 2048 --eval-rows 1k --splice-tokens 500 --ratios 0.5 1 --l1 0.5 4 "
    "--latents 3 --layer 1 --checkpoint-seconds 0.01 --checkpoint-share 1 --dead-latents resample --resample-rows 1k "
    "--resample-every 50 --resample-times 3 --dead-feature-window 2000"
)


def flags(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    return [*SMALL.split(), "--model", str(model), "--text", str(text), "--out", str(out), *more]


def main(*words: str) -> Path:
    return run(parse(RunSettings, words, "run.py", ""))


@pytest.fixture(scope="module")
def undisturbed(small_gpt2, small_text, tmp_path_factory):
    """The folder of a run that nothing happens to."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    main(*flags(small_gpt2, small_text, out))
    return out


def test_with_sync_a_machine_may_vanish(undisturbed, small_gpt2, small_text, tmp_path):
    """Killed without a word; the next machine has nothing but the command and the bucket."""
    bucket, out = tmp_path / "bucket", tmp_path / "first machine"
    code = (  # killed as soon as a checkpoint is in the bucket, however slow the machine
        "import os, runpy, signal, sys, time\n"
        "from pathlib import Path\n"
        "from sparse_coding.training.sync import Sync\n"
        "bucket, real = Path(sys.argv.pop(1)), Sync.push\n"
        "def push(self, folder):\n"
        "    real(self, folder)\n"
        "    if list(folder.glob('checkpoints/step-*/state.json')):\n"
        "        while not list(bucket.glob('checkpoints/step-*/state.json')):\n"
        "            time.sleep(0.001)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "Sync.push = push\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path('run.py', run_name='__main__')"
    )
    words = flags(small_gpt2, small_text, out, "--sync", str(bucket))
    killed = subprocess.run(
        [sys.executable, "-c", code, str(bucket), "run.py", *words],
        cwd=ROOT,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (bucket / "results.jsonl").exists()
    shutil.rmtree(out)
    second = tmp_path / "second machine"
    environment = {**os.environ, "SPARSE_CODING_CACHE": str(tmp_path / "empty cache")}
    done = subprocess.run(
        [sys.executable, "run.py", *flags(small_gpt2, small_text, second, "--sync", str(bucket))],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "brought step" in done.stderr
    assert "continuing at step" in done.stderr
    assert_same_run(undisturbed, second)
    there = {path.relative_to(bucket).as_posix() for path in bucket.rglob("*") if path.is_file()}
    for name in ("log.jsonl", "settings.json", "members.json", "results.jsonl", "report.html", "latents.json"):
        assert name in there
        assert (bucket / name).read_bytes() == (second / name).read_bytes()
    assert sum(name.endswith("sae_weights.safetensors") for name in there) == 4
    assert not any(name.startswith("checkpoints/") for name in there)


def test_no_key_reaches_a_file_or_a_line(small_gpt2, small_text, tmp_path):
    """A bucket that cannot be reached, with credentials in the environment: they are in no error and no file."""
    secret, key = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY", "AKIAIOSFODNN7EXAMPLE"
    environment = {
        **os.environ, "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_ENDPOINT_URL": "ftp://127.0.0.1:9",
        "AWS_REGION": "us-east-1",
    }  # fmt: skip
    out = tmp_path / "run"
    words = flags(small_gpt2, small_text, out, "--sync", "s3://bucket/run")
    code = (
        "import sparse_coding.pipeline as p, runpy, sys\n"
        "real = p.open_objects\n"
        "p.open_objects = lambda url: real(url, seconds=1.0)\n"
        "import sparse_coding.training.run_folder as f\n"
        "f.END_SECONDS = f.STOP_SECONDS = 1.0\n"
        "from sparse_coding.training.sync import Sync\n"
        "Sync.run_settings = lambda self: None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path('run.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run.py", *words],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "training goes on" in done.stderr
    for text in (done.stdout, done.stderr):
        assert secret not in text
        assert key not in text
    for path in out.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert secret.encode() not in data, path
            assert key.encode() not in data, path


def test_the_best_checkpoint_leaves_dictionaries_of_its_own(small_gpt2, small_text, tmp_path):
    main(*flags(small_gpt2, small_text, tmp_path / "run", "--keep-best", "--keep-checkpoints", "1"))
    names = [{path.name for path in (tmp_path / "run" / part / "dictionaries").iterdir()} for part in ("", "best")]
    assert names[0] == names[1]
    assert len(names[0]) == 4


def test_what_protects_a_run_is_no_part_of_what_it_is(small_gpt2, small_text, tmp_path):
    plain = parse(RunSettings, flags(small_gpt2, small_text, tmp_path), "run.py", "")
    line = "--nan skip --auto-batch --keep-best --keep-checkpoints 5 --sync s3://bucket/x --checkpoint-seconds 9"
    words = line.split()
    careful = parse(RunSettings, [*flags(small_gpt2, small_text, tmp_path), *words], "run.py", "")
    assert plain.identity() == careful.identity()
    assert "bucket" not in json.dumps(careful.identity())


def test_the_toy_study_is_synced_and_continued_too(tmp_path, command):
    line = "replicate_toy_models.py --preset quick --l1 0.1 1 --ratios 0.5 1 --eval-samples 3000 --steps 60 --sync"
    words = [*line.split(), str(tmp_path / "bucket")]
    first = command(*words, "--out", str(tmp_path / "first"))
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "bucket" / "report.html").exists()
    second = command(*words, "--out", str(tmp_path / "second"))
    assert second.returncode == 0, second.stderr
    assert "brought a finished run" in second.stderr
    assert (tmp_path / "second" / "results.jsonl").read_bytes() == (tmp_path / "first" / "results.jsonl").read_bytes()
