"""run.py on a model that gives NaN from some token on: it stops and says where, or leaves the batches out."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch

from sparse_coding.activations.text import TextSettings, documents
from sparse_coding.errors import UserError
from sparse_coding.pipeline import run
from sparse_coding.training.run_folder import read_lines
from tests.end_to_end.harvesting import settings

SMALL = (
    "--layer 1 --tokens 25k --batch-size 64 --buffer-rows 2048 --eval-rows 1k --splice-tokens 500 --ratios 1 "
    "--l1 0.5 4 --latents 3"
)


@pytest.fixture(scope="module")
def broken(small_gpt2, tmp_path_factory) -> Path:
    """The small model with NaN for the embedding of the bytes of a section sign; its head is whole."""
    import transformers

    folder = shutil.copytree(small_gpt2, tmp_path_factory.mktemp("broken") / "model")
    config = transformers.GPT2Config.from_pretrained(folder)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)("§")["input_ids"]
    with torch.no_grad():
        model.transformer.wte.weight[tokens] = math.nan
    model.save_pretrained(folder)
    return folder


def text_with_sign(small_text: Path, part: Literal["train", "held_out"], place: Path) -> Path:
    """The small text with a section sign at the end of one document of a part."""
    chosen = list(documents(TextSettings(str(small_text)), part))[3 if part == "train" else 0]
    lines = [json.loads(line)["text"] for line in small_text.read_text().splitlines()]
    assert chosen in lines
    place.write_text("\n".join(json.dumps({"text": f"{one} §" if one == chosen else one}) for one in lines))
    return place


def test_a_nan_in_live_capture_stops_with_its_place_or_is_left_out(broken, small_text, tmp_path):
    text = text_with_sign(small_text, "train", tmp_path / "text.jsonl")
    words = ["--model", str(broken), "--text", str(text), *SMALL.split(), "--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"hold NaN or infinity in \d+ of .* rows, first in context .*--nan skip"):
        run(settings(*words))
    run(settings(*words, "--nan", "skip"))  # goes on from there
    known = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert 1 <= known["skipped_batches"]["count"] <= 32  # one context of 32 tokens at most
    assert read_lines(tmp_path / "run" / "log.jsonl")[-1]["skipped_batches"] == known["skipped_batches"]["count"]
    for record in read_lines(tmp_path / "run" / "results.jsonl"):
        assert record["metrics"]["fvu"] < 1
        assert record["metrics"]["ce_spliced"] is not None


def test_a_nan_in_held_out_text_is_said_or_left_out(broken, small_text, tmp_path, capsys):
    text = text_with_sign(small_text, "held_out", tmp_path / "text.jsonl")
    words = ["--model", str(broken), "--text", str(text), *SMALL.split(), "--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"held-out activations are NaN or infinity.*what was trained is saved"):
        run(settings(*words))
    run(settings(*words, "--nan", "skip"))
    said = capsys.readouterr()
    assert "they are left out" in said.out
    assert "continuing at step 390 of 390" in said.err
    for record in read_lines(tmp_path / "run" / "results.jsonl"):
        assert record["metrics"]["fvu"] < 1
        assert record["metrics"]["rows"] < 1000


def test_a_model_that_gives_nothing_but_nan_is_one_line_with_skip_too(broken, small_text, tmp_path):
    text = tmp_path / "text.jsonl"
    lines = [json.loads(line)["text"] for line in small_text.read_text().splitlines()]
    text.write_text("\n".join(json.dumps({"text": "§" * 40 + one}) for one in lines))
    words = ["--model", str(broken), "--text", str(text), *SMALL.split(), "--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"hold NaN or infinity in batch after batch \(batches 1 to 20\)"):
        run(settings(*words, "--nan", "skip"))
    assert not (tmp_path / "run").exists()
