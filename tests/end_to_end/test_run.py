"""run.py as its users meet it: on a local GPT-2 folder, stopped and continued, and given nonsense."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparse_coding.config import parse
from sparse_coding.errors import UserError
from sparse_coding.formats.saelens import load_dictionary
from sparse_coding.pipeline import run
from sparse_coding.run_settings import RunSettings
from sparse_coding.training.run_folder import read_lines

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--tokens 8k --batch-size 128 --buffer-rows 2048 --eval-rows 1k --splice-tokens 500 "
    "--ratios 0.5 1 --l1 0.5 4 --latents 5"
)


def flags(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    return [*SMALL.split(), "--model", str(model), "--text", str(text), "--out", str(out), "--layer", "1", *more]


def settings(*words: str) -> RunSettings:
    return parse(RunSettings, words, "run.py", "")


@pytest.fixture(scope="session")
def finished(small_gpt2, small_text, tmp_path_factory):
    """One small run to its end."""
    out = tmp_path_factory.mktemp("runs") / "small"
    report = run(settings(*flags(small_gpt2, small_text, out)))
    return out, report


def test_a_run_on_a_local_gpt2_leaves_everything_that_is_promised(finished):
    out, report = finished
    assert report == out / "report.html"
    assert report.stat().st_size > 10_000
    records = read_lines(out / "results.jsonl")
    assert len(records) == 4
    assert {(r["ratio"], r["l1_coefficient"]) for r in records} == {(0.5, 0.5), (0.5, 4.0), (1.0, 0.5), (1.0, 4.0)}
    for record in records:
        metrics = record["metrics"]
        for name in ("fvu", "l0", "mse", "dead", "ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl_spliced"):
            assert metrics[name] is not None, name
        assert metrics["rows"] == 1000
        assert (metrics["mmcs_next_larger"] is None) == (record["ratio"] == 1.0)
        assert sum(record["density"]["counts"]) + record["density"]["never_fired"] == record["d_sae"]
        assert record["site"] == "blocks.1.mlp.hook_post"
        assert record["d_in"] == 64
    log = read_lines(out / "log.jsonl")
    assert log[-1]["step"] == 62
    assert len(log[-1]["fvu"]) == 4
    known = json.loads((out / "settings.json").read_text())
    assert known["data"]["text"]["sha256"]
    assert known["provenance"]["versions"]["torch"]
    assert known["run"]["sweep"]["l1"] == ["0.5", "4"]
    latents = json.loads((out / "latents.json").read_text())
    assert latents[0]["latents"][0]["contexts"][0]["tokens"]
    assert list((out / "pictures").glob("*.png"))


def test_more_l1_gives_fewer_active_latents_and_a_worse_fit(finished):
    metrics = {(r["ratio"], r["l1_coefficient"]): r["metrics"] for r in read_lines(finished[0] / "results.jsonl")}
    for ratio in (0.5, 1.0):
        assert metrics[ratio, 4.0]["l0"] < metrics[ratio, 0.5]["l0"]
        assert metrics[ratio, 4.0]["fvu"] > metrics[ratio, 0.5]["fvu"]


def test_saved_dictionaries_take_raw_activations(finished, small_gpt2, small_text):
    """The scale of training is folded in: FVU recomputed from the saved files is the FVU of the table."""
    from sparse_coding.activations.capture import rows
    from sparse_coding.pipeline import capture as capture_stage

    out, _ = finished
    captured = capture_stage(settings(*flags(small_gpt2, small_text, out)))
    x = rows(captured.model, captured.held_out, slice(40), captured.trained_sites)["blocks.1.mlp.hook_post"][:1000]
    for record in read_lines(out / "results.jsonl"):
        dictionary = load_dictionary(out / "dictionaries" / record["name"])
        with torch.no_grad():
            fvu = (dictionary(x) - x).square().sum() / (x - x.mean(0)).square().sum()
        assert fvu.item() == pytest.approx(record["metrics"]["fvu"], rel=1e-3)


def test_the_same_command_again_redraws_the_report_and_trains_nothing(finished, small_gpt2, small_text, monkeypatch):
    out, report = finished
    before = (out / "results.jsonl").read_bytes()
    report.unlink()
    monkeypatch.setattr("sparse_coding.pipeline.capture", lambda *_: pytest.fail("captured again"))
    assert run(settings(*flags(small_gpt2, small_text, out))) == report
    assert report.exists()
    assert (out / "results.jsonl").read_bytes() == before


def test_a_resume_with_other_settings_names_them(finished, small_gpt2, small_text):
    with pytest.raises(UserError, match=r"sweep\.lr: was \[0\.002\], is \[0\.01\].*--fresh"):
        run(settings(*flags(small_gpt2, small_text, finished[0], "--lr", "0.01")))


def test_several_layers_share_one_run(small_gpt2, small_text, tmp_path):
    words = flags(small_gpt2, small_text, tmp_path / "two", "--location", "resid_post", "--seeds", "0", "1")
    words[words.index("--layer") + 1 : words.index("--layer") + 2] = ["0", "2"]
    run(settings(*words))
    records = read_lines(tmp_path / "two" / "results.jsonl")
    assert {r["site"] for r in records} == {"blocks.0.hook_resid_post", "blocks.2.hook_resid_post"}
    assert len(records) == 2 * 2 * 2 * 2
    assert len(json.loads((tmp_path / "two" / "latents.json").read_text())) == 2


def test_options_reach_the_dictionaries(small_gpt2, small_text, tmp_path):
    more = ["--tied", "--no-decoder-bias", "--normalise", "none", "--l1-scaling", "mean", "--precision", "fp32"]
    words = flags(small_gpt2, small_text, tmp_path / "run", *more)
    run(settings(*words))
    record = read_lines(tmp_path / "run" / "results.jsonl")[0]
    assert record["settings"]["tied"] is True
    assert record["settings"]["decoder_bias"] is False
    assert record["settings"]["l1_scaling"] == "mean"
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["data"]["scales"] == {record["site"]: 1.0}
    config = json.loads((tmp_path / "run" / "dictionaries" / record["name"] / "cfg.json").read_text())
    assert config["apply_b_dec_to_input"] is False


def test_a_run_killed_again_and_again_ends_with_the_same_bits(finished, small_gpt2, small_text, tmp_path):
    out = tmp_path / "killed"
    words = [sys.executable, "run.py", *flags(small_gpt2, small_text, out, "--checkpoint-seconds", "0.02")]
    delays, kills = random.Random(0), 0
    for _ in range(12):
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while process.poll() is None and not list(out.glob("checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(delays.uniform(0, 0.3))
        if kills < 3 and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait(120)
        if process.returncode == 0:
            break
    assert process.returncode == 0, process.stderr.read().decode()
    assert kills >= 1
    reference = finished[0]
    for folder in sorted((reference / "dictionaries").iterdir()):
        expected, got = (
            load_file(base / "dictionaries" / folder.name / "sae_weights.safetensors") for base in (reference, out)
        )
        assert all(torch.equal(expected[name], got[name]) for name in expected)

    def timeless(base):
        return [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(base / "log.jsonl")]

    assert timeless(reference) == timeless(out)
    assert (reference / "results.jsonl").read_bytes() == (out / "results.jsonl").read_bytes()


def test_sigterm_saves_and_says_how_to_go_on(small_gpt2, small_text, tmp_path):
    out = tmp_path / "stopped"
    words = flags(small_gpt2, small_text, out, "--checkpoint-seconds", "0.02")
    words[words.index("--tokens") + 1] = "10M"
    process = subprocess.Popen(
        [sys.executable, "run.py", *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped: by SIGTERM at step" in errors
    assert "same command" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layer", "999"], "layer 999: this model has layers 0 to 2"),
        (["--l1", "-1"], "-1"),
        (["--l1", "x"], "--l1 is 'x'"),
        (["--ratios", "0.0001"], "d_sae"),
        (["--tokens", "100"], "less than one batch of 128"),
        (["--tokens", "many"], "--tokens is 'many'"),
        (["--architecture", "relo"], "did you mean 'relu'"),
        (["--location", "nowhere"], "--location"),
        (["--sites", "blocks.1.mlp.hook_pots"], "did you mean"),
        (["--context", "1000"], "takes at most 32"),
        (["--context", "0"], "--context is 0"),
        (["--latents", "-1"], "--latents is -1"),
        (["--out", "/proc/none"], "/proc/none cannot be made"),
        (["--seeds", "0", "0"], "seeds holds 0 twice"),
        (["--lr", "0"], "learning rate"),
        (["--text", "/nowhere/text.txt"], "/nowhere/text.txt"),
        (["--model", "/nowhere/model"], "/nowhere/model"),
        (["--model", "gpt2"], "hub"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--layr", "1"], "--layr"),
    ],
)
def test_a_mistake_is_one_clear_line(words, message, small_gpt2, small_text, tmp_path, capsys):
    from sparse_coding.errors import reported

    with pytest.raises(SystemExit) as stop, reported():
        run(settings(*flags(small_gpt2, small_text, tmp_path / "run", *words)))
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("tokenizing")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_a_mistake_on_the_real_command_exits_with_2_and_no_traceback(command):
    done = command("run.py", "--layer", "999")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: layer 999: this model has layers 0 to 5")
    assert "Traceback" not in done.stderr


def test_an_empty_text_is_refused(small_gpt2, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="empty"):
        run(settings(*flags(small_gpt2, tmp_path / "empty.txt", tmp_path / "run")))


def test_a_text_shorter_than_a_batch_is_refused(small_gpt2, tmp_path):
    (tmp_path / "short.txt").write_text("Only a few words here.\n\nAnd a few more.")
    with pytest.raises(UserError, match=r"fewer than one batch|held"):
        run(settings(*flags(small_gpt2, tmp_path / "short.txt", tmp_path / "run", "--held-out", "0.5")))


def test_a_model_that_gives_nan_says_where(small_gpt2, small_text, tmp_path):
    import shutil

    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    shutil.copytree(small_gpt2, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.bias"][7] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.hook_post hold NaN.*context 0 at position 0"):
        run(settings(*flags(broken, small_text, tmp_path / "run")))


def test_a_disk_that_fills_up_is_one_line_and_loses_nothing(small_gpt2, small_text, tmp_path):
    """The largest file allowed is smaller than a checkpoint: the kernel refuses the write as a full disk would."""
    out = tmp_path / "full"
    words = flags(small_gpt2, small_text, out, "--checkpoint-seconds", "0.02")
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
        "sys.argv = sys.argv[1:]; runpy.run_path('run.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, "run.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert "the disk is full" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    after = subprocess.run(
        [sys.executable, "run.py", *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert after.returncode == 0, after.stderr


def test_wandb_offline_mirrors_the_run_and_its_failure_stops_nothing(small_gpt2, small_text, tmp_path, monkeypatch):
    out = tmp_path / "mirrored"
    run(settings(*flags(small_gpt2, small_text, out, "--wandb", "offline")))
    assert list(out.glob("wandb/offline-run-*/*.wandb"))
    monkeypatch.setattr("wandb.init", lambda **_: (_ for _ in ()).throw(RuntimeError("no account")))
    broken = tmp_path / "broken"
    run(settings(*flags(small_gpt2, small_text, broken, "--wandb", "online")))
    assert (broken / "results.jsonl").read_bytes() == (out / "results.jsonl").read_bytes()
