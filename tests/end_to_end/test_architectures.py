"""run.py with every architecture, transcoders, crosscoders and losses through the model, on a local GPT-2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparse_coding.activations.capture import rows
from sparse_coding.config import parse
from sparse_coding.dictionaries import ARCHITECTURES
from sparse_coding.errors import UserError
from sparse_coding.formats.saelens import load_dictionary
from sparse_coding.pipeline import run
from sparse_coding.run_settings import RunSettings
from sparse_coding.training.run_folder import read_lines

SMALL = (
    "--tokens 8k --batch-size 128 --buffer-rows 2048 --eval-rows 1k --splice-tokens 500 --ratios 1 --latents 3 "
    "--dead-feature-window 1000 --layer 1 --context 32"
)


def go(model: Path, text: Path, out: Path, *more: str) -> list[dict]:
    words = [*SMALL.split(), "--model", str(model), "--text", str(text), "--out", str(out), *more]
    run(parse(RunSettings, words, "run.py", ""))
    return read_lines(out / "results.jsonl")


def held_out(model: Path, text: Path, out: Path, *more: str) -> dict[str, torch.Tensor]:
    """The raw activations that the run was evaluated on."""
    from sparse_coding.captured import capture

    words = [*SMALL.split(), "--model", str(model), "--text", str(text), "--out", str(out), *more]
    captured = capture(parse(RunSettings, words, "run.py", ""))
    sites = list(captured.places)
    found = rows(captured.model, captured.held_out, slice(40), sites)
    return {site: x[:1000] for site, x in found.items()}


def fvu(dictionary, x, target):
    with torch.no_grad():
        return ((dictionary(x) - target).square().sum() / (target - target.mean(0)).square().sum()).item()


@pytest.mark.parametrize("normalise", ["mean-norm", "whiten", "layer-norm", "unit-norm", "none"])
def test_every_architecture_in_one_sweep_is_saved_as_it_was_measured(normalise, small_gpt2, small_text, tmp_path):
    names = [name for name in ARCHITECTURES if normalise != "whiten" or name != "matching-pursuit"]
    how = ["--architecture", *names, "--normalise", normalise, "--k", "4", "--l1", "0.5", "--l0", "0.5"]
    records = go(small_gpt2, small_text, tmp_path / "run", *how)
    assert [record["architecture"] for record in records] == names
    (x,) = held_out(small_gpt2, small_text, tmp_path / "run", *how).values()
    for record in records:
        assert record["metrics"]["ce_recovered_zero"] is not None
        dictionary = load_dictionary(tmp_path / "run" / "dictionaries" / record["name"])
        assert fvu(dictionary, x, x) == pytest.approx(record["metrics"]["fvu"], rel=2e-3), record["name"]
    config = tmp_path / "run" / "dictionaries" / records[0]["name"] / "cfg.json"
    known = {"layer-norm": "layer_norm", "unit-norm": "constant_norm_rescale"}
    assert json.loads(config.read_text())["normalize_activations"] == known.get(normalise, "none")


@pytest.mark.parametrize("skip", [[], ["--skip"]])
def test_transcoders_predict_what_the_mlp_makes_of_its_input(skip, small_gpt2, small_text, tmp_path):
    how = ["--location", "mlp_in", "--target-location", "mlp_out", "--architecture", "topk", "relu", "--k", "4",
           "--l1", "0.01", "--lr", "5e-3", *skip]  # fmt: skip
    records = go(small_gpt2, small_text, tmp_path / "run", *how)
    found = held_out(small_gpt2, small_text, tmp_path / "run", *how)
    x, target = found["blocks.1.ln2.hook_out"], found["blocks.1.hook_mlp_out"]
    for record in records:
        assert (record["site"], record["target"]) == ("blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out")
        assert record["metrics"]["ce_recovered_zero"] is not None
        folder = tmp_path / "run" / "dictionaries" / record["name"]
        assert fvu(load_dictionary(folder), x, target) == pytest.approx(record["metrics"]["fvu"], rel=2e-3)
        config = json.loads((folder / "cfg.json").read_text())
        assert config["architecture"].endswith("skip_transcoder" if skip else "transcoder")
        assert config["metadata"]["hook_name_out"] == "blocks.1.hook_mlp_out"


def test_a_transcoders_prediction_takes_the_place_of_its_target(small_gpt2, small_text, tmp_path):
    """Loss recovered by hand: the MLP's output replaced by what the dictionary makes of the MLP's input."""
    from sparse_coding.activations.capture import capture, splice
    from sparse_coding.activations.models import load_model

    how = ["--location", "mlp_in", "--target-location", "mlp_out", "--l1", "0.01"]
    (record,) = go(small_gpt2, small_text, tmp_path / "run", *how)
    dictionary = load_dictionary(tmp_path / "run" / "dictionaries" / record["name"])
    model = load_model(str(small_gpt2), device="cpu")
    from sparse_coding.captured import capture as captured_stage
    from sparse_coding.measured import token_batches

    words = [*SMALL.split(), "--model", str(small_gpt2), "--text", str(small_text), *how]
    captured = captured_stage(parse(RunSettings, words, "run.py", ""))
    total, count = 0.0, 0
    for tokens, _ in token_batches(captured, 500):
        x = capture(model, tokens, ["blocks.1.ln2.hook_out"])["blocks.1.ln2.hook_out"]
        logits = splice(model, tokens, "blocks.1.hook_mlp_out", lambda old, x=x: dictionary(x))
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
        )
        total, count = total + losses.item(), count + tokens[:, 1:].numel()
    assert record["metrics"]["ce_spliced"] == pytest.approx(total / count, rel=1e-4)


def test_a_crosscoder_holds_several_layers(small_gpt2, small_text, tmp_path):
    how = [
        "--location",
        "resid_post",
        "--crosscoder",
        "--architecture",
        "relu-april",
        "batchtopk",
        "--l1",
        "0.5",
        "--k",
        "4",
    ]
    words = SMALL.replace("--layer 1", "--layer 0 2")
    out = tmp_path / "run"
    flags = [*words.split(), "--model", str(small_gpt2), "--text", str(small_text), "--out", str(out), *how]
    run(parse(RunSettings, flags, "run.py", ""))
    records = read_lines(out / "results.jsonl")
    sites = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
    for record in records:
        assert record["site"] == "+".join(sites)
        assert record["settings"]["parts"] == [16, 16]
        assert list(record["metrics"]["fvu_by_site"]) == sites
        by_site = record["metrics"]["by_site"]
        assert set(by_site) == set(sites)
        mean = sum(by_site[site]["ce_spliced"] for site in sites) / 2
        assert record["metrics"]["ce_spliced"] == pytest.approx(mean)


def test_a_crosscoder_holds_two_models_on_the_same_text(small_gpt2, small_text, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "other-gpt2"
    shutil.copytree(small_gpt2, other)
    tensors = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        tensors[name] = value + 0.02 * torch.randn(value.shape, generator=generator)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    how = [
        "--location",
        "resid_post",
        "--crosscoder",
        "--also-model",
        str(other),
        "--architecture",
        "relu-april",
        "--l1",
        "0.5",
    ]
    (record,) = go(small_gpt2, small_text, tmp_path / "run", *how)
    names = [f"{small_gpt2.name}/blocks.1.hook_resid_post", "other-gpt2/blocks.1.hook_resid_post"]
    assert record["site"] == "+".join(names)
    assert all(record["metrics"]["by_site"][name]["ce_clean"] for name in names)
    assert record["metrics"]["by_site"][names[0]]["ce_clean"] != record["metrics"]["by_site"][names[1]]["ce_clean"]


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_losses_through_the_model_train_for_behaviour(loss, small_gpt2, small_text, tmp_path):
    how = ["--location", "resid_post", "--architecture", "topk", "--k", "4", "--lr", "5e-3"]
    (plain,) = go(small_gpt2, small_text, tmp_path / "mse", *how, "--loss", "mse")
    (ends,) = go(small_gpt2, small_text, tmp_path / loss, *how, "--loss", loss)
    log = read_lines(tmp_path / loss / "log.jsonl")
    assert log[-1]["loss"][0] < log[0]["loss"][0]
    if loss == "kl":
        assert ends["metrics"]["kl_spliced"] < plain["metrics"]["kl_spliced"]
    else:
        assert ends["metrics"]["ce_spliced"] < plain["metrics"]["ce_spliced"]
    assert ends["metrics"]["fvu"] > plain["metrics"]["fvu"]


@pytest.mark.parametrize("method", ["auxk", "ghost", "resample"])
def test_every_way_with_dead_latents_runs(method, small_gpt2, small_text, tmp_path):
    more = "--optimizer adamw --schedule cosine --sparsity-warmup-steps 10 --clip-norm 1 --b-dec-init geometric-median"
    how = ["--l1", "4", "--dead-latents", method, *more.split()]
    records = go(small_gpt2, small_text, tmp_path / "run", *how)
    assert records[0]["metrics"]["fvu"] is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--target-location mlp_out --architecture matching-pursuit", "cannot be a transcoder"),
        ("--architecture matching-pursuit --crosscoder", "cannot be a crosscoder"),
        ("--location mlp --target-location mlp", "is an autoencoder"),
        ("--skip", "--skip is for transcoders"),
        ("--crosscoder", "needs several sites"),
        ("--crosscoder --target-location mlp_out", "exclude each other"),
        ("--crosscoder --loss ce", "--loss ce"),
        ("--also-model gpt2", "--crosscoder too"),
        ("--target-sites blocks.1.hook_mlp_out", "one target for each site"),
        ("--target-location mlp_out --normalise layer-norm", "mean-norm, whiten or none"),
        ("--loss ce --batch-size 100", "multiple of the context of 32 tokens"),
        ("--loss ce --exclude-special", "exclude_special"),
        ("--dead-latents auxk --dead-feature-window 1000000", "nothing to revive"),
        ("--dead-latents resample --resample-every 1000", "no resampling"),
        ("--resample-every 10", "--dead-latents resample"),
        ("--resample-times 2", "--dead-latents resample"),
        ("--dead-latents resample --resample-every 0", "--resample-every is 0"),
        ("--optimizer sgd --beta1 0.5", "--beta1 would not be read"),
        ("--restarts 3", "--schedule restarts"),
        ("--schedule constant --decay-fraction 0.5", "--decay-fraction would not be read"),
        ("--feature-sampling-window 5k", "--dead-feature-threshold"),
        ("--warmup-steps 1000", "would never reach its height"),
        ("--set dead_latents=auxk --dead-feature-window 1M", "nothing to revive"),
        ("--batch-size 1 --loss fvu --buffer-rows 64", "at least 2 rows"),
        ("--precision fp16 --optimizer schedule-free", "schedule-free"),
        (
            "--sites blocks.0.hook_resid_post blocks.0.hook_resid_post --target-sites blocks.1.hook_resid_post "
            "blocks.2.hook_resid_post",
            "given twice",
        ),
        ("--schedule constantwithwarmup --warmup-steps 0", "warmup"),
        ("--optimizer adan", "adan"),
        ("--architecture topk --k 65", "k is 65, but the dictionary has 64 latents"),
    ],
)
def test_a_mistake_is_one_clear_line(words, message, small_gpt2, small_text, tmp_path, capsys):
    from sparse_coding.errors import reported

    with pytest.raises(SystemExit) as stop, reported():
        go(small_gpt2, small_text, tmp_path / "run", *words.split())
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("tokenizing")]
    assert len(lines) == 1, lines
    assert message in lines[0]


def test_an_end_to_end_loss_needs_a_model_that_predicts(small_gpt2, small_text, tmp_path):
    import transformers

    folder = tmp_path / "headless"
    model = transformers.GPT2LMHeadModel.from_pretrained(small_gpt2)
    model.config.tie_word_embeddings = model.transformer.config.tie_word_embeddings = False
    model.transformer.save_pretrained(folder)
    for file in small_gpt2.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="no trained head"):
        go(folder, small_text, tmp_path / "run", "--loss", "ce")
