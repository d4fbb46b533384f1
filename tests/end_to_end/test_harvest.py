"""`harvest` as its users meet it: whole, shared by processes, stopped, and given nonsense."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_coding.activations.capture import rows as captured_rows
from sparse_coding.activations.passes import Passes
from sparse_coding.config import parse
from sparse_coding.errors import Interrupted, UserError, reported
from sparse_coding.harvest import harvest
from sparse_coding.harvest_flags import HarvestFlags
from sparse_coding.pipeline import run
from sparse_coding.stores.objects import open_objects
from sparse_coding.stores.own import own
from sparse_coding.stores.store import Store
from tests.end_to_end.harvesting import (
    AFTER,
    BEFORE,
    HIDDEN,
    files,
    flags,
    manifest,
    run_flags,
    settings,
    words_of,
)

ROOT = Path(__file__).resolve().parents[2]


# ---- what a harvest leaves


def test_a_store_holds_the_rows_of_the_model_in_the_order_of_the_text(harvested, small_gpt2, small_text):
    from sparse_coding.captured import capture

    live = capture(settings("--model", str(small_gpt2), "--text", str(small_text), "--tokens", "100k", "--layer", "1"))
    store = Store.open(harvested)
    assert store.rows == live.n_tokens
    text = live.source.contexts
    for site in (HIDDEN, BEFORE, AFTER):
        rows = torch.cat([store.decode(site, store.read_shard(site, shard)) for shard in range(10)])
        expected = captured_rows(live.model, text, slice(None), [site])[site]
        torch.testing.assert_close(rows, expected, rtol=0, atol=0)
    columns = [store.read_tokens(shard, 0, store.shard_rows[shard]) for shard in range(10)]
    token, context, position = (np.concatenate([one[name] for one in columns]) for name in columns[0])
    assert (text.tokens[context, position] == token).all()
    assert (np.diff(context * 32 + position) == 1).all()


def test_a_store_says_what_it_is_of(harvested, small_gpt2, small_text):
    said = manifest(harvested)
    assert said["complete"] is True
    assert said["model"] == str(small_gpt2)
    assert said["revision"].startswith("sha256 ")
    assert said["text"]["text"]["source"] == str(small_text)
    assert said["text"]["sha256"]
    assert said["text"]["part"] == "train"
    assert said["context"] == 32
    assert {name: site["width"] for name, site in said["sites"].items()} == {HIDDEN: 64, BEFORE: 16, AFTER: 16}
    assert said["versions"]["torch"]
    assert len(said["shards"]) == 10


def test_layers_and_tokens_like_those_of_run(small_gpt2, small_text, tmp_path, capsys):
    more = ["--layer", "0", "2", "--location", "resid_post", "--tokens", "5k"]
    harvest(flags(small_gpt2, small_text, tmp_path / "s", *more))
    said = manifest(tmp_path / "s")
    assert list(said["sites"]) == ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
    assert said["rows"] == 5000
    shown = capsys.readouterr().out
    assert "plan: 5,000 rows as bf16 in 2 shards of 3,000" in shown
    assert "complete: 5,000 rows" in shown


def test_special_tokens_are_left_out_and_rows_still_meet_their_tokens(small_gpt2, small_text, tmp_path):
    harvest(flags(small_gpt2, small_text, tmp_path / "s", "--exclude-special", "--keep-tokens", "--tokens", "5k"))
    store = Store.open(tmp_path / "s")
    tokens = np.concatenate([store.read_tokens(shard, 0, n)["token"] for shard, n in enumerate(store.shard_rows)])
    assert len(tokens) == store.rows < 5000
    assert (tokens != 0).all()


def test_without_a_store_the_same_settings_give_the_same_name(small_gpt2, small_text):
    def place(*more: str) -> str:
        return parse(HarvestFlags, ["--model", str(small_gpt2), "--text", str(small_text), *more], "", "").store()

    adjective, noun, number = Path(place()).name.split("-")
    assert adjective.isalpha()
    assert noun.isalpha()
    assert number.isdigit()
    assert place() == place() != place("--codec", "int8")
    assert place("--store", "s3://bucket") == "s3://bucket/" + Path(place()).name
    assert place("--store", "s3://bucket/mine") == "s3://bucket/mine"


def test_the_same_command_again_says_that_it_is_done(harvested, small_gpt2, small_text, capsys):
    before = files(harvested)
    harvest(flags(small_gpt2, small_text, harvested, "--codec", "fp32", "--keep-tokens"))
    assert "is complete: 28," in capsys.readouterr().out
    assert files(harvested) == before


def test_passes_cover_any_stretch_of_rows_once(harvested, small_gpt2, small_text):
    from sparse_coding.captured import capture

    words = ["--model", str(small_gpt2), "--text", str(small_text), "--layer", "1", "--exclude-special"]
    text = capture(settings(*words, "--tokens", "5k")).source.contexts
    passes = Passes(text, 3)
    for first, last in ((0, passes.rows), (0, 1), (95, 96), (94, 1000), (passes.rows - 1, passes.rows)):
        found = [np.arange(passes.starts[n], passes.starts[n + 1])[chosen] for n, chosen in passes.within(first, last)]
        assert (np.concatenate(found) == np.arange(first, last)).all()
    assert not list(passes.within(passes.rows, passes.rows))


# ---- stopped, killed, shared


def many_shards(model: Path, text: Path, store: Path) -> list[str]:
    return words_of(model, text, store, "--shard-rows", "50", "--codec", "int8", "--keep-tokens")


def test_sigterm_keeps_whole_shards_and_says_how_to_go_on(small_gpt2, small_text, tmp_path, monkeypatch):
    store = tmp_path / "s"
    words = [sys.executable, "-m", "sparse_coding", "harvest", *many_shards(small_gpt2, small_text, store)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (store / "site-0" / "00002.safetensors").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped: by SIGTERM at row" in errors
    assert "same command continues" in errors
    assert "Traceback" not in errors
    said = manifest(store)
    assert said["complete"] is False
    assert 0 < said["rows"] < 28_034
    with pytest.raises(UserError, match=r"is not complete .*--allow-incomplete"):
        run(settings(*run_flags(store, tmp_path / "r")))
    # A run from what is there goes on with the same rows when there are more.
    more = ("--allow-incomplete", "--batch-size", "32", "--tokens", "1k", "--buffer-rows", "512", "--sites", BEFORE)
    run(settings(*run_flags(store, tmp_path / "whole", *more)))
    with monkeypatch.context() as patch:
        patch.setattr("sparse_coding.pipeline.evaluate", lambda *_: (_ for _ in ()).throw(Interrupted("here")))
        with pytest.raises(Interrupted):
            run(settings(*run_flags(store, tmp_path / "stopped", *more)))
    harvest(parse(HarvestFlags, many_shards(small_gpt2, small_text, store), "", ""))
    shutil.rmtree(tmp_path / "stopped" / "checkpoints")  # from the first step on
    run(settings(*run_flags(store, tmp_path / "stopped", *more)))
    results = [(tmp_path / name / "results.jsonl").read_bytes() for name in ("whole", "stopped")]
    assert results[0] == results[1]


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_two_processes_leave_the_files_that_one_does(small_gpt2, small_text, tmp_path, codec):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    more = ("--codec", codec, "--keep-tokens", "--sites", HIDDEN, BEFORE)
    harvest(flags(small_gpt2, small_text, alone, *more))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "sparse_coding"]
    words += ["harvest", *words_of(small_gpt2, small_text, shared, *more)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is complete: 28,") == 1
    assert files(alone, "manifest.json") == files(shared, "manifest.json")
    one, two = manifest(alone), manifest(shared)
    for site, statistics in one["statistics"].items():
        assert two["statistics"][site]["mean"] == pytest.approx(statistics["mean"], rel=1e-9)
        assert two["statistics"][site]["variance"] == pytest.approx(statistics["variance"], rel=1e-9)
    for key in set(one) - {"statistics", "run"}:
        assert one[key] == two[key], key
    assert not list(shared.glob("part-*"))


# ---- mistakes


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sites", "blocks.1.mlp.hook_pots"], "did you mean"),
        (["--layer", "99"], "layer 99: this model has layers 0 to 2"),
        (["--codec", "bf17"], "--codec"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--tokens", "-5"], "--tokens is -5: it must be at least 1"),
        (["--shard-rows", "0"], "--shard-rows is 0"),
        (["--context", "1000"], "takes at most 32"),
        (["--held-out", "2"], "--held-out is 2"),
        (["--text", "/nowhere/text.txt"], "/nowhere/text.txt"),
        (["--store", "gs://bucket/x"], "s3://"),
        (["--store", "/proc/none"], "/proc/none"),
        (["--device", "cuda:99"], "CUDA devices"),
    ],
)
def test_a_mistake_of_a_harvest_is_one_clear_line(more, message, small_gpt2, small_text, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop, reported():
        harvest(flags(small_gpt2, small_text, tmp_path / "s", *more))
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("tokenizing")]
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not (tmp_path / "s").exists()


def test_a_store_of_other_settings_or_in_use_is_not_continued(harvested, small_gpt2, small_text, tmp_path):
    with pytest.raises(UserError, match=r'codec: was "fp32", is "bf16"'):
        harvest(flags(small_gpt2, small_text, harvested, "--keep-tokens"))
    other = tmp_path / "other.jsonl"
    other.write_text(small_text.read_text() + '\n{"text": "one more"}')
    with pytest.raises(UserError, match=r"begun with other settings \(text\.text\.source"):
        harvest(flags(small_gpt2, other, harvested, "--codec", "fp32", "--keep-tokens"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files"):
        harvest(flags(small_gpt2, small_text, tmp_path))
    with own(open_objects(tmp_path / "s")):
        with pytest.raises(UserError, match=f"is being written by process {os.getpid()} on "):
            harvest(flags(small_gpt2, small_text, tmp_path / "s"))
        assert (tmp_path / "s").exists()


def test_only_what_a_killed_harvest_left_is_removed(small_gpt2, small_text, tmp_path):
    """Not a file with a date, not what lies in another store below, and nothing where it turns out to be no store."""
    parent, store = tmp_path / "p", tmp_path / "p" / "child"
    for place in (store, store / "site-0", store / "tokens", store / "more"):
        place.mkdir(parents=True, exist_ok=True)
    (store / "manifest.json.abcd123_").touch()
    (store / "writer.json").touch()
    with pytest.raises(UserError, match=r"holds other files \(child/manifest\.json\.abcd123_\)"):
        harvest(flags(small_gpt2, small_text, parent))
    assert (store / "manifest.json.abcd123_").exists()
    harvest(flags(small_gpt2, small_text, store, "--sites", HIDDEN))  # a lone leftover does not stand in the way
    left = ["manifest.json.abcd123_", "site-0/00003.safetensors.abcdefgh", "tokens/00000.safetensors.a1b2c3d4"]
    mine = ["manifest.json.20261126", "more/manifest.json.abcdefgh", "site-0/00003.safetensors.tar.gz"]
    for name in (*left, *mine):
        (store / name).touch()
    with pytest.raises(UserError, match="other settings"):
        harvest(flags(small_gpt2, small_text, store, "--sites", BEFORE))
    assert all((store / name).exists() for name in left)
    harvest(flags(small_gpt2, small_text, store, "--sites", HIDDEN))
    assert {name for name in (*left, *mine) if (store / name).exists()} == set(mine)
    assert not (store / "writer.json").exists()


def test_a_file_system_without_locks_is_told_apart_from_another_writer(tmp_path, monkeypatch, capsys):
    def none(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("sparse_coding.stores.own.fcntl.flock", none)
    with own(open_objects(tmp_path / "s")):
        assert "this file system has no locks (Bad file descriptor)" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_said_beforehand(small_gpt2, small_text, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"needs 5\.\d* MiB more and .* has 0\.977 KiB free"):
        harvest(flags(small_gpt2, small_text, tmp_path / "s"))


def test_a_disk_that_fills_up_names_the_shard_and_keeps_those_before(
    small_gpt2, small_text, tmp_path, monkeypatch, capsys
):
    harvest(flags(small_gpt2, small_text, tmp_path / "whole" / "s"))
    real, store = os.fsync, tmp_path / "full" / "s"

    def full(handle: int) -> None:
        if (store / "site-0" / "00003.safetensors").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr("sparse_coding.files.os.fsync", full)
    with pytest.raises(SystemExit) as stop, reported():
        harvest(flags(small_gpt2, small_text, store))
    monkeypatch.undo()
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: the disk is full while writing {store}/")
    assert "start the same command again" in line
    assert not [name for name in files(store) if not name.endswith((".safetensors", ".json"))]
    harvest(flags(small_gpt2, small_text, store))
    assert files(store) == files(tmp_path / "whole" / "s")


def test_nan_names_the_site_and_keeps_the_shards_before(small_gpt2, small_text, tmp_path, monkeypatch):
    from sparse_coding import harvest as module

    true, calls = module.captured_rows, []

    def broken(*given, **named):
        found = true(*given, **named)
        calls.append(1)
        if len(calls) == 5:
            found[HIDDEN][7, 7] = float("nan")
        return found

    monkeypatch.setattr(module, "captured_rows", broken)
    with pytest.raises(UserError, match=rf"{HIDDEN} hold NaN or infinity"):
        harvest(flags(small_gpt2, small_text, tmp_path / "s"))
    assert manifest(tmp_path / "s")["rows"] > 0
