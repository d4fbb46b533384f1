"""replicate_toy_models.py as its users meet it, and what the toy study must show."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import replicate_toy_models
from sparse_coding import toy_study
from sparse_coding.config import parse
from sparse_coding.errors import UserError
from sparse_coding.synthetic import World, WorldStream, chance_mmcs, mmcs_ceiling, preset
from sparse_coding.training.run_folder import read_lines
from sparse_coding.training.sweep import grid
from sparse_coding.training.trainer import Trainer, TrainingSettings

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = vars(replicate_toy_models)


def study(*words: str) -> Path:
    return SCRIPT["main"](parse(SCRIPT["Study"], words, "replicate_toy_models.py", ""))


@pytest.fixture(scope="module")
def recovered():
    """The small world, cells in the band, above it and below it; enough steps for the pattern to be plain."""
    world = World(preset("quick"))
    members = grid(
        "relu", {"synthetic": 64}, ratios=[0.5, 2, 4], varied={"l1_coefficient": [0.01, 0.3, 1.0, 30.0]},
        l1_scaling="toy-2023", init="toy-2023", decoder_bias=False, remove_parallel_gradient=False,
    )  # fmt: skip
    trainer = Trainer(members, WorldStream(world, 256), TrainingSettings(2500))
    trainer.fit()
    batches = toy_study.held_out(world, 20_000, 256)
    found = {}
    for index, member in enumerate(members):
        reconstruction, metrics = toy_study.measure(trainer.dictionary(index), world, batches)
        found[member.settings.d_sae, member.settings.l1_coefficient] = {**reconstruction.result(), **metrics}
    return found


def test_features_are_recovered_inside_the_band(recovered):
    best = recovered[256, 1.0]
    assert best["mmcs"] > 0.95
    assert best["fraction_above_0.9"] > 0.9
    assert best["mcc"] > 0.95
    assert 2.0 < best["l0"] < 4.5  # three features are active on average


def test_above_the_collapse_edge_codes_vanish_and_cosines_are_chance(recovered):
    for d_sae in (32, 128, 256):
        dead = recovered[d_sae, 30.0]
        assert dead["l0"] < 0.02  # biases hover just below zero, so a latent still fires on one row in thousands
        assert dead["fvu"] > 0.99
        assert dead["fraction_above_0.9"] == 0
        assert abs(dead["mmcs"] - chance_mmcs(d_sae, 64)) < 0.05


def test_a_weak_penalty_gives_dense_codes_and_mixed_directions(recovered):
    weak = recovered[256, 0.01]
    assert weak["l0"] > 15
    assert weak["fraction_above_0.9"] < 0.2
    assert weak["fvu"] < 0.05 < recovered[256, 1.0]["fvu"] + 0.05


def test_fewer_latents_than_features_stay_below_one(recovered):
    """At ratio 1/4 at most a quarter of the features can be found, and the mean stays near the ceiling (a latent that
    points between features scores a little more than the ceiling's one feature each)."""
    ceiling = mmcs_ceiling(0.25, chance_mmcs(32, 64))
    for alpha in (0.01, 0.3, 1.0):
        assert recovered[32, alpha]["fraction_above_0.9"] <= 0.25
        assert recovered[32, alpha]["mmcs"] <= ceiling + 0.1


def test_the_published_dead_count_is_the_larger_one(recovered):
    for metrics in recovered.values():
        assert metrics["dead_published"] >= metrics["dead"]


def test_the_study_leaves_data_pictures_and_controls(tmp_path):
    out = tmp_path / "toy"
    report = study(
        "--preset", "quick", "--l1", "0.1", "1", "--ratios", "0.5", "1", "--steps", "40", "--seeds", "0", "1",
        "--eval-samples", "3000", "--out", str(out),
    )  # fmt: skip
    assert report.stat().st_size > 50_000
    records = read_lines(out / "results.jsonl")
    assert len(records) == 8
    for record in records:
        assert len(record["metrics"]["max_cosines"]) == 128
        assert (record["metrics"]["mmcs_next_larger"] is None) == (record["ratio"] == 1.0)
    known = json.loads((out / "settings.json").read_text())
    assert set(known["controls"]["baselines"]) == {"random", "identity-relu", "pca", "ica", "nmf", "oracle"}
    assert known["controls"]["collapse_l1"]["1"] == pytest.approx(4.0)
    assert known["controls"]["baselines"]["oracle"]["mmcs"] == pytest.approx(1.0)
    assert abs(known["controls"]["l0_true"] - 3.0) < 0.3
    names = {path.name for path in (out / "pictures").glob("*.png")}
    assert len(names) >= 7
    assert "http://" not in report.read_text().replace("http://www.w3.org", "")


def test_the_published_preset_is_the_published_grid():
    chosen = SCRIPT["GRIDS"]["full"]
    from sparse_coding.config import numbers

    assert numbers(chosen.l1, "--l1") == pytest.approx([10 ** (e / 4) for e in range(-8, 9)])
    assert chosen.ratios == tuple(2.0**e for e in range(-3, 6))
    assert chosen.steps == 20_000


def test_the_fast_preset_is_the_published_grid_in_fewer_updates():
    full, fast = SCRIPT["GRIDS"]["full"], SCRIPT["GRIDS"]["fast"]
    assert (fast.l1, fast.ratios, fast.world) == (full.l1, full.ratios, full.world)
    assert fast.steps < full.steps
    assert fast.settling.every > 0 == full.settling.every


def test_dictionaries_that_died_stop_early_and_the_report_tells(tmp_path, monkeypatch):
    fast = SCRIPT["GRIDS"]["fast"]
    soon, short = replace(fast.settling, every=20), replace(fast.optimizer, warmup_steps=20)
    monkeypatch.setitem(SCRIPT["GRIDS"], "fast", replace(fast, settling=soon, optimizer=short))
    out = tmp_path / "toy"
    words = ("--world", "quick", "--l1", "0.1", "3", "--ratios", "0.25", "--lr", "0.01", "--steps", "240")
    report = study("--preset", "fast", *words, "--eval-samples", "3000", "--out", str(out))
    living, dead = read_lines(out / "results.jsonl")
    assert living["updates"] == 240 > dead["updates"]
    assert f"1 dictionary settled and stopped early, after {dead['updates']} of 240 updates" in report.read_text()
    known = json.loads((out / "settings.json").read_text())["run"]
    assert (known["lr"], known["training"]["settling"]["every"]) == (0.01, 20)
    assert known["training"]["optimizer"]["warmup_steps"] == 20


def test_what_a_preset_trains_with_can_be_said_otherwise():
    def trained(*words):
        return SCRIPT["training_of"](*SCRIPT["complete"](parse(SCRIPT["Study"], words, "replicate_toy_models.py", "")))

    fast = trained("--preset", "fast")
    assert fast.optimizer.warmup_steps > 0
    assert trained("--preset", "fast", "--stop-settled", "False").settling.every == 0
    assert trained("--preset", "full").settling.every == 0
    assert trained("--preset", "full", "--stop-settled", "True").settling == fast.settling
    assert trained("--preset", "full", "--stop-settled", "True").optimizer.warmup_steps == 0


def test_the_full_grid_fits_in_memory():
    from sparse_coding.config import numbers

    chosen = SCRIPT["GRIDS"]["full"]
    members = grid(
        "relu", {"synthetic": 256}, [2 * ratio for ratio in chosen.ratios],
        varied={"l1_coefficient": numbers(chosen.l1, "--l1")}, l1_scaling="toy-2023",
    )  # fmt: skip
    assert len(members) == 153
    weights = sum(2 * m.settings.d_in * m.settings.d_sae for m in members)
    assert weights * 4 * 3 < 6 * 2**30  # parameters and two moments in fp32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--world", "hoagy"], "did you mean 'hoagy-2023"),
        (["--preset", "fastest"], "--preset"),
        (["--l1", "-1"], "L1 coefficient is -1"),
        (["--ratios", "0"], "a ratio is 0.0: it must be a positive number"),
        (["--steps", "0"], "steps is 0"),
        (["--eval-samples", "0"], "--eval-samples"),
        (["--batch-size", "0"], "--batch-size"),
    ],
)
def test_a_mistake_is_one_clear_line(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        study("--preset", "quick", "--out", str(tmp_path / "x"), *words)


def test_the_help_teaches(command):
    done = command("replicate_toy_models.py", "--help")
    assert done.returncode == 0
    for word in ("--preset", "--world", "--published-metrics", "hoagy-2023-06", "geometry"):
        assert word in done.stdout


def test_the_module_leaves_global_randomness_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    study(
        "--preset",
        "quick",
        "--l1",
        "1",
        "--ratios",
        "0.5",
        "--steps",
        "3",
        "--eval-samples",
        "2560",
        "--out",
        str(tmp_path),
    )
    assert torch.equal(torch.rand(3), expected)
    assert "torch" in sys.modules
