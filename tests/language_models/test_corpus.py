from __future__ import annotations

import json

from sparse_coding.activations.text import TextSettings, documents
from sparse_coding.language_models.corpus import tokenizer_for


def test_the_characters_of_the_held_out_text_are_known_too(tmp_path):
    letters = [chr(ord("a") + index) for index in range(20)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": letter}) + "\n" for letter in letters))
    text = TextSettings(str(tmp_path / "text.jsonl"), held_out=0.3)
    assert 0 < len(list(documents(text, "held_out"))) < 20
    tokenizer, kept = tokenizer_for("char", None, text, tmp_path / "out")
    assert tokenizer("".join(letters))["input_ids"] == list(range(2, 22))
    before = (kept / "tokenizer.json").stat().st_mtime_ns
    assert tokenizer_for("char", None, text, tmp_path / "out")[1] == kept
    assert (kept / "tokenizer.json").stat().st_mtime_ns == before, "a second start takes what the first one made"
