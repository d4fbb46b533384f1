"""harvest and run.py --activations as their users meet them: whole, killed, shared by processes, and given nonsense."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sparse_coding.activations.capture import rows as captured_rows
from sparse_coding.config import parse
from sparse_coding.errors import Interrupted, UserError, reported
from sparse_coding.harvest import HarvestFlags, Passes, harvest
from sparse_coding.pipeline import run
from sparse_coding.run_settings import RunSettings
from sparse_coding.stores.store import Store
from sparse_coding.training.run_folder import read_lines

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, BEFORE, AFTER = "blocks.1.mlp.hook_post", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"
SMALL = (
    "--tokens 8k --batch-size 128 --buffer-rows 2048 --eval-rows 1k --splice-tokens 500 "
    "--ratios 0.5 1 --l1 0.5 4 --latents 5"
)


def words_of(model: Path, text: Path, store: Path | str, *more: str) -> list[str]:
    usual = ["--sites", HIDDEN, BEFORE, AFTER] if "--sites" not in more and "--layer" not in more else []
    shards = [] if "--shard-rows" in more else ["--shard-rows", "3000"]
    return ["--model", str(model), "--text", str(text), "--store", str(store), *usual, *shards, *more]


def flags(*given) -> HarvestFlags:
    return parse(HarvestFlags, words_of(*given), "harvest", "")


def settings(*words: str) -> RunSettings:
    return parse(RunSettings, words, "run.py", "")


def run_flags(store: Path, out: Path, *more: str) -> list[str]:
    return ["--activations", str(store), *SMALL.split(), "--out", str(out), *more]


def files(folder: Path, but: str = "") -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name != but}


def manifest(store: Path) -> dict:
    return json.loads((store / "manifest.json").read_text())


@pytest.fixture(scope="session")
def harvested(small_gpt2, small_text, tmp_path_factory) -> Path:
    """Three sites in fp32, with tokens, in ten shards."""
    os.environ["SPARSE_CODING_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    store = tmp_path_factory.mktemp("stores") / "one"
    harvest(flags(small_gpt2, small_text, store, "--codec", "fp32", "--keep-tokens"))
    return store


@pytest.fixture(scope="session")
def trained(harvested, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "stored"
    run(settings(*run_flags(harvested, out, "--sites", HIDDEN)))
    return out


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


@pytest.mark.stress
def test_a_harvest_killed_again_and_again_ends_with_the_same_files(small_gpt2, small_text, tmp_path):
    whole, killed = tmp_path / "whole" / "s", tmp_path / "killed" / "s"
    harvest(parse(HarvestFlags, many_shards(small_gpt2, small_text, whole), "", ""))
    command = [sys.executable, "-m", "sparse_coding", "harvest", *many_shards(small_gpt2, small_text, killed)]
    delays, kills = random.Random(0), 0
    for _ in range(12):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        known, deadline = len(list(killed.glob("site-0/*"))), time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and len(list(killed.glob("site-0/*"))) <= known:
            time.sleep(0.005)
        time.sleep(delays.uniform(0, 0.1))
        if kills < 4 and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait(120)
        if process.returncode == 0:
            break
    assert process.returncode == 0, process.stderr.read().decode()
    assert kills >= 2
    assert files(whole) == files(killed)


def test_sigterm_keeps_whole_shards_and_says_how_to_go_on(small_gpt2, small_text, tmp_path, monkeypatch):
    store = tmp_path / "s"
    words = [sys.executable, "-m", "sparse_coding", "harvest", *many_shards(small_gpt2, small_text, store)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(store.glob("site-0/*")) and process.poll() is None:
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


@pytest.mark.stress
def test_two_processes_killed_and_started_again_leave_the_files_that_one_does(small_gpt2, small_text, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    harvest(parse(HarvestFlags, many_shards(small_gpt2, small_text, alone), "", ""))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "sparse_coding"]
    words += ["harvest", *many_shards(small_gpt2, small_text, shared)]
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and len(list(shared.glob("site-0/*"))) < 20:
        time.sleep(0.005)
    if process.poll() is not None:
        pytest.skip("it ended before it could be killed")
    threads = Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [int(one) for thread in threads for one in thread.read_text().split()]
    assert len(children) >= 2
    for number in (process.pid, *children):
        os.kill(number, signal.SIGKILL)
    process.wait()
    while any(running(number) for number in children):
        time.sleep(0.01)
    time.sleep(1)  # their locks go with them
    assert not (shared / "manifest.json").exists()
    with pytest.raises(UserError, match=r"begun by 2 processes: continue it with torchrun --nproc_per_node=2"):
        harvest(parse(HarvestFlags, many_shards(small_gpt2, small_text, shared), "", ""))
    with pytest.raises(UserError, match=r"is not complete: 2 processes harvest it"):
        run(settings(*run_flags(shared, tmp_path / "r")))
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "continuing after" in done.stdout
    assert files(alone, "manifest.json") == files(shared, "manifest.json")


def running(number: int) -> bool:
    """Whether a process is there and not a zombie, which holds no lock."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- mistakes


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sites", "blocks.1.mlp.hook_pots"], "did you mean"),
        (["--layer", "99"], "layer 99: this model has layers 0 to 2"),
        (["--codec", "bf17"], "--codec"),
        (["--tokens", "0"], "--tokens is 0"),
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
    from sparse_coding.harvest import own

    with own(str(tmp_path / "s")), pytest.raises(UserError, match="being written by another harvest"):
        harvest(flags(small_gpt2, small_text, tmp_path / "s"))


def test_a_disk_that_is_too_small_is_said_beforehand(small_gpt2, small_text, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"needs 5\.\d* MiB more and .* has 0\.977 KiB free"):
        harvest(flags(small_gpt2, small_text, tmp_path / "s"))


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


# ---- run.py from stores


def test_a_run_from_a_store_leaves_everything_that_a_live_one_does(trained):
    records = read_lines(trained / "results.jsonl")
    assert {(r["ratio"], r["l1_coefficient"]) for r in records} == {(0.5, 0.5), (0.5, 4.0), (1.0, 0.5), (1.0, 4.0)}
    for record in records:
        for name in ("fvu", "l0", "mse", "dead", "ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl_spliced"):
            assert record["metrics"][name] is not None, name
        assert record["site"] == HIDDEN
    known = json.loads((trained / "settings.json").read_text())
    assert 0 <= known["training"]["share_waiting"] <= 1
    assert known["data"]["stores"]["measured_on"] == "held-out text"
    assert known["data"]["stores"]["of"][0]["rows"] > 28_000
    assert json.loads((trained / "latents.json").read_text())
    report = (trained / "report.html").read_text()
    assert "waiting for data" in report
    assert "of the training time" in report
    cfg = json.loads((trained / "dictionaries" / records[0]["name"] / "cfg.json").read_text())
    assert cfg["metadata"]["context_size"] == 32


def test_it_fits_as_well_as_a_live_one(trained, small_gpt2, small_text, tmp_path):
    words = ["--model", str(small_gpt2), "--text", str(small_text), *SMALL.split(), "--layer", "1"]
    run(settings(*words, "--out", str(tmp_path / "live")))
    live = {r["name"]: r["metrics"] for r in read_lines(tmp_path / "live" / "results.jsonl")}
    stored = {r["name"]: r["metrics"] for r in read_lines(trained / "results.jsonl")}
    assert live.keys() == stored.keys()
    for name, metrics in live.items():
        assert metrics["ce_clean"] == stored[name]["ce_clean"]  # the same held-out text
        assert metrics["fvu"] == pytest.approx(stored[name]["fvu"], rel=0.25)
    assert "waiting for data" in (tmp_path / "live" / "report.html").read_text()


def test_the_same_command_again_needs_no_store(trained, harvested, tmp_path):
    moved = shutil.copytree(trained, tmp_path / "moved")
    words = run_flags(harvested, moved, "--sites", HIDDEN)
    (moved / "report.html").unlink()
    shutil.move(harvested, tmp_path / "away")
    try:
        assert run(settings(*words)).exists()
    finally:
        shutil.move(tmp_path / "away", harvested)


def test_all_sites_one_pass_by_default(harvested, tmp_path):
    words = run_flags(harvested, tmp_path / "r", "--ratios", "1", "--l1", "1", "--batch-size", "512")
    words[words.index("--tokens") : words.index("--tokens") + 2] = []
    run(settings(*words))
    assert {r["site"] for r in read_lines(tmp_path / "r" / "results.jsonl")} == {HIDDEN, BEFORE, AFTER}
    log = read_lines(tmp_path / "r" / "log.jsonl")
    assert log[-1]["step"] == Store.open(harvested).rows // 512


def test_transcoders_and_crosscoders(harvested, tmp_path):
    usual = ("--ratios", "1", "--l1", "1")
    run(settings(*run_flags(harvested, tmp_path / "t", *usual, "--sites", BEFORE, "--target-sites", AFTER, "--skip")))
    (record,) = read_lines(tmp_path / "t" / "results.jsonl")
    assert (record["site"], record["target"]) == (BEFORE, AFTER)
    assert record["metrics"]["ce_spliced"] is not None
    for kind in ("mean-norm", "whiten", "layer-norm"):
        out = tmp_path / f"c-{kind}"
        run(
            settings(*run_flags(harvested, out, *usual, "--sites", HIDDEN, BEFORE, "--crosscoder", "--normalise", kind))
        )
        (record,) = read_lines(out / "results.jsonl")
        assert record["site"] == f"{HIDDEN}+{BEFORE}"
        assert set(record["metrics"]["fvu_by_site"]) == {HIDDEN, BEFORE}


def test_codecs_hardly_change_the_fit(trained, small_gpt2, small_text, tmp_path):
    fp32 = {r["name"]: r["metrics"]["fvu"] for r in read_lines(trained / "results.jsonl")}
    for codec, tolerance in (("bf16", 0.01), ("int8", 0.02)):
        harvest(flags(small_gpt2, small_text, tmp_path / codec, "--codec", codec))
        run(settings(*run_flags(tmp_path / codec, tmp_path / f"r-{codec}", "--sites", HIDDEN)))
        for record in read_lines(tmp_path / f"r-{codec}" / "results.jsonl"):
            assert record["metrics"]["fvu"] == pytest.approx(fp32[record["name"]], rel=tolerance)


@pytest.mark.stress
def test_a_run_from_a_store_killed_again_and_again_ends_with_the_same_bits(trained, harvested, tmp_path):
    out = tmp_path / "killed"
    words = [sys.executable, "run.py", *run_flags(harvested, out, "--sites", HIDDEN, "--checkpoint-seconds", "0.02")]
    delays, kills = random.Random(0), 0
    for _ in range(12):
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while process.poll() is None and not list(out.glob("checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(delays.uniform(0, 0.2))
        if kills < 3 and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait(120)
        if process.returncode == 0:
            break
    assert process.returncode == 0, process.stderr.read().decode()
    assert kills >= 1
    for folder in sorted((trained / "dictionaries").iterdir()):
        expected, got = (
            load_file(base / "dictionaries" / folder.name / "sae_weights.safetensors") for base in (trained, out)
        )
        assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert (trained / "results.jsonl").read_bytes() == (out / "results.jsonl").read_bytes()


def test_without_the_model_the_last_rows_are_kept_apart(small_gpt2, small_text, tmp_path, capsys, monkeypatch):
    model = shutil.copytree(small_gpt2, tmp_path / "model")
    harvest(flags(model, small_text, tmp_path / "s", "--codec", "fp32", "--sites", HIDDEN, BEFORE))
    model.rename(tmp_path / "gone")
    more = ("--sites", HIDDEN, BEFORE)
    run(settings(*run_flags(tmp_path / "s", tmp_path / "r", *more)))
    shown = capsys.readouterr().out
    assert "measured on the last 1,402 rows of the stores" in shown
    assert "no such folder" in shown
    records = read_lines(tmp_path / "r" / "results.jsonl")
    assert len(records) == 8
    assert all(record["metrics"]["rows"] == 1000 for record in records)
    assert "ce_spliced" not in records[0]["metrics"]
    assert not (tmp_path / "r" / "latents.json").exists()
    # The rows they are measured on are the last of the store, and nothing is trained on them.
    from sparse_coding.stored import RowsApart
    from sparse_coding.stores.stream import StoreStream

    store = Store.open(tmp_path / "s")
    whole = torch.cat([store.read_shard(HIDDEN, shard) for shard in range(len(store.shard_rows))])
    apart = RowsApart([store], [HIDDEN], "cpu")
    assert torch.equal(apart(1402)[HIDDEN], whole[-1402:])
    assert torch.equal(apart(5)[HIDDEN], whole[-1402:-1397])
    stream = StoreStream([store], [HIDDEN], batch_size=len(whole) - 1402, buffer_rows=30_000)
    assert torch.equal(stream.batch(0)[HIDDEN].sort(0).values, whole[:-1402].sort(0).values)
    # Named, it must be there; begun without it, a run goes on without it when it is back.
    with pytest.raises(UserError, match="no such folder"):
        run(settings(*run_flags(tmp_path / "s", tmp_path / "r2", *more, "--model", str(model))))
    run(settings(*run_flags(tmp_path / "s", tmp_path / "r2", *more, "--model", str(tmp_path / "gone"))))
    assert "ce_spliced" in read_lines(tmp_path / "r2" / "results.jsonl")[0]["metrics"]
    stopped = run_flags(tmp_path / "s", tmp_path / "r3", *more)
    monkeypatch.setattr("sparse_coding.pipeline.evaluate", lambda *_: (_ for _ in ()).throw(Interrupted("here")))
    with pytest.raises(Interrupted):
        run(settings(*stopped))
    monkeypatch.undo()
    (tmp_path / "gone").rename(model)
    run(settings(*stopped))
    again = read_lines(tmp_path / "r3" / "results.jsonl")
    assert [record["metrics"] for record in again] == [record["metrics"] for record in records]


def test_a_run_is_not_continued_with_other_rows_or_another_model(small_gpt2, small_text, tmp_path, monkeypatch):
    harvest(flags(small_gpt2, small_text, tmp_path / "s", "--sites", HIDDEN))
    words = run_flags(tmp_path / "s", tmp_path / "r")
    monkeypatch.setattr("sparse_coding.pipeline.evaluate", lambda *_: (_ for _ in ()).throw(Interrupted("here")))
    with pytest.raises(Interrupted):
        run(settings(*words))
    shutil.rmtree(tmp_path / "s")
    harvest(flags(small_gpt2, small_text, tmp_path / "s", "--sites", HIDDEN, "--shard-rows", "2000"))
    with pytest.raises(UserError, match=r"has changed since this run began"):
        run(settings(*words))
    other = shutil.copytree(small_gpt2, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(UserError, match=r"is not the one that .* was harvested from"):
        run(settings(*run_flags(tmp_path / "s", tmp_path / "r2", "--model", str(other))))


def test_several_stores_with_weights(harvested, small_gpt2, small_text, tmp_path):
    harvest(flags(small_gpt2, small_text, tmp_path / "two", "--sites", HIDDEN, "--tokens", "10k"))
    words = run_flags(harvested, tmp_path / "r", "--sites", HIDDEN, "--activation-weights", "0.5", "2")
    words.insert(2, str(tmp_path / "two"))
    run(settings(*words))
    known = json.loads((tmp_path / "r" / "settings.json").read_text())
    assert [one["codec"] for one in known["data"]["stores"]["of"]] == ["fp32", "bf16"]
    assert known["data"]["stores"]["weights"] == [0.5, 2.0]


def test_damage_is_named_or_skipped(small_gpt2, small_text, tmp_path, capsys):
    harvest(flags(small_gpt2, small_text, tmp_path / "s", "--sites", HIDDEN))
    (tmp_path / "s" / "site-0" / "00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"00003\.safetensors.*--skip-damaged"):
        run(settings(*run_flags(tmp_path / "s", tmp_path / "r")))
    run(settings(*run_flags(tmp_path / "s", tmp_path / "r", "--skip-damaged")))
    assert "1 damaged shards are left out, such as" in capsys.readouterr().out
    skipped = json.loads((tmp_path / "r" / "settings.json").read_text())["data"]["stores"]["skipped"]
    assert len(skipped) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sites", "blocks.1.mlp.hook_pots"], "did you mean 'blocks.1.mlp.hook_post'"),
        (["--sites", "blocks.2.mlp.hook_post"], "is not in the store"),
        (["--sites", HIDDEN, "--target-sites", "blocks.2.hook_resid_post"], "is not in the store"),
        (["--loss", "ce"], "--loss ce runs the model on whole contexts"),
        (["--loss", "kl"], "--loss kl"),
        (["--also-model", "gpt2", "--crosscoder"], "--also-model"),
        (["--layer", "1"], "--layer with --activations: name the store's sites with --sites"),
        (["--target-location", "mlp_out"], "--target-sites"),
        (["--activation-weights", "1", "2"], "one positive number for each of 1 stores"),
        (["--activation-weights", "-1"], "one positive number"),
        (["--context", "16"], "--context with --activations"),
        (["--batch-size", "100000"], "less than one batch"),
        (["--sites", HIDDEN, "--crosscoder"], "--crosscoder needs several sites"),
        (["--text", "/nowhere/text.txt"], "/nowhere/text.txt"),
        (["--layr", "1"], "--layr"),
    ],
)
def test_a_mistake_of_a_run_from_a_store_is_one_clear_line(more, message, harvested, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop, reported():
        run(settings(*run_flags(harvested, tmp_path / "r", *more)))
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("tokenizing")]
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not (tmp_path / "r").exists()


def test_stores_of_other_models_or_widths_and_none_at_all(harvested, small_gpt2, small_text, tmp_path):
    import transformers

    other = shutil.copytree(small_gpt2, tmp_path / "wide")
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=300, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(other)
    harvest(flags(other, small_text, tmp_path / "s", "--sites", HIDDEN))
    words = run_flags(harvested, tmp_path / "r", "--sites", HIDDEN)
    words.insert(2, str(tmp_path / "s"))
    with pytest.raises(UserError, match="are of different models"):
        run(settings(*words))
    with pytest.raises(UserError, match="is no store"):
        run(settings(*run_flags(tmp_path / "nowhere", tmp_path / "r")))
    with pytest.raises(UserError, match="twice"):
        settings(*run_flags(harvested, tmp_path / "r")[:2], str(harvested))
    with pytest.raises(UserError, match="--skip-damaged is for training from stores"):
        settings("--skip-damaged")


# ---- on S3


def test_harvest_and_train_on_s3(small_gpt2, small_text, harvested, trained, tmp_path, monkeypatch):
    from tests.stores.fake_s3 import serving

    with serving(monkeypatch) as fake:
        harvest(flags(small_gpt2, small_text, "s3://bucket/a/run", "--codec", "fp32", "--keep-tokens"))
        stored = {name.removeprefix("bucket/a/run/"): data for name, data in fake.objects.items()}
        local = files(harvested)
        assert stored.keys() == local.keys()
        assert all(stored[name] == local[name] for name in local if name != "manifest.json")
        run(settings(*run_flags("s3://bucket/a/run", tmp_path / "r", "--sites", HIDDEN)))
    for line, expected in zip(
        read_lines(tmp_path / "r" / "results.jsonl"), read_lines(trained / "results.jsonl"), strict=True
    ):
        assert line == expected
