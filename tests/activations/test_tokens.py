from __future__ import annotations

import copy
import hashlib
import json
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sparse_coding.activations import encoding
from sparse_coding.activations import tokens as module
from sparse_coding.activations.text import TextSettings, documents
from sparse_coding.activations.tokenizers import character_tokenizer, tokenizer_from_characters, train_byte_bpe
from sparse_coding.activations.tokens import Contexts, contexts, default_cache, flat
from sparse_coding.errors import UserError

WORDS = ["the", "cat", "sat", "on", "mat", "dog", "ate", "log"]
TEXTS = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 2 + i * i % 53)) for i in range(80)]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return train_byte_bpe(TEXTS, 270, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def bert() -> PreTrainedTokenizerFast:
    """WordPiece that puts [CLS] and [SEP] around every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS[:6], "a", "##t", "##e", "l", "##og"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.add_special_tokens(special)
    template = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.post_processor = template  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture
def text(tmp_path: Path) -> TextSettings:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return TextSettings(str(path), held_out=0.2)


def pack(text: TextSettings, tokenizer: Any, folder: Path, **settings: Any) -> Contexts:
    return contexts(text, tokenizer, **{"part": "all", "context": 16, "cache": folder, "progress": False, **settings})


def packed_by_hand(
    texts: list[str], tokenizer: Any, separator: list[int], prefix: list[int], suffix: list[int], pad: int, context: int
) -> tuple[list[list[int]], list[list[bool]], list[list[bool]]]:
    """Rows of tokens, of "this is not padding", and of "this is text", one token at a time."""
    stream = []
    for document in texts:
        stream += [(token, True) for token in tokenizer(document, add_special_tokens=False)["input_ids"]]
        stream += [(token, False) for token in separator]
    rows, real, is_text = [], [], []
    body = context - len(prefix) - len(suffix)
    while stream:
        now, stream = stream[:body], stream[body:]
        padding = body - len(now)
        rows.append(prefix + [token for token, _ in now] + suffix + [pad] * padding)
        real.append([True] * (context - padding) + [False] * padding)
        sides = [False] * len(prefix), [False] * (len(suffix) + padding)
        is_text.append(sides[0] + [kept for _, kept in now] + sides[1])
    return rows, real, is_text


# ---- packing


@pytest.mark.parametrize("context", [1, 7, 16, 100_000])
@pytest.mark.parametrize("batch", [1, 200, 1_000_000])
def test_packing_equals_packing_by_hand(
    text: TextSettings, bpe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: int, batch: int
) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", batch)
    rows, real, is_text = packed_by_hand(TEXTS, bpe, [0], [], [], 0, context)
    packed = pack(text, bpe, tmp_path, context=context)
    assert packed.tokens.tolist() == rows
    assert packed.tokens.dtype == np.uint16
    assert (np.ones_like(real) if packed.mask is None else packed.mask).tolist() == real
    assert packed.n_padding == sum(not kept for row in real for kept in row)
    excluded = pack(text, bpe, tmp_path, context=context, exclude_special=True)
    assert excluded.tokens.tolist() == rows
    assert excluded.mask is not None
    assert excluded.mask.tolist() == is_text


@pytest.mark.parametrize("context", [3, 8, 16, 1000])
def test_bert_packing_frames_every_context_as_its_model_expects(
    text: TextSettings, bert: Any, tmp_path: Path, context: int
) -> None:
    rows, real, is_text = packed_by_hand(TEXTS, bert, [3], [2], [3], 0, context)
    packed = pack(text, bert, tmp_path, context=context)
    assert packed.tokens.tolist() == rows
    assert (np.ones_like(real) if packed.mask is None else packed.mask).tolist() == real
    assert all(row[0] == 2 for row in rows)
    assert all(row[-1] == 3 for row in rows[:-1])
    assert pack(text, bert, tmp_path, context=context, exclude_special=True).mask.tolist() == is_text  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["bpe", "bert"])
def test_every_token_stands_in_the_contexts_exactly_once(
    text: TextSettings, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    tokenizer = request.getfixturevalue(kind)
    separator = {"bpe": [0], "bert": [3]}[kind]
    stream = [t for x in TEXTS for t in [*tokenizer(x, add_special_tokens=False)["input_ids"], *separator]]
    for context in (5, 16):
        packed = pack(text, tokenizer, tmp_path, context=context)
        assert flat(packed).tolist() == stream
        assert packed.n_tokens == len(stream)
        assert packed.tokens.size == packed.n_tokens + packed.n_frame + packed.n_padding
        assert packed.n_documents == len(TEXTS)
        assert packed.n_characters == sum(map(len, TEXTS))


def test_the_flat_stream_is_a_view_of_the_file_where_nothing_frames_it(
    text: TextSettings, bpe: Any, tmp_path: Path
) -> None:
    packed = pack(text, bpe, tmp_path)
    assert np.shares_memory(flat(packed), packed.tokens)
    assert not flat(packed).flags.writeable
    assert bpe.decode(flat(packed).tolist()) == "".join(text + "<|endoftext|>" for text in TEXTS)


def test_a_mask_exists_only_where_something_is_masked(text: TextSettings, bpe: Any, tmp_path: Path) -> None:
    packed = pack(text, bpe, tmp_path, context=1)
    assert packed.n_padding == 0
    assert packed.mask is None
    assert not (packed.folder / "mask.bin").exists()


def test_bos_leads_each_context_when_asked_or_when_the_tokenizer_does_so_itself(
    text: TextSettings, bpe: Any, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, processors

    rows, _, is_text = packed_by_hand(TEXTS, bpe, [0], [0], [], 0, 16)
    asked = pack(text, bpe, tmp_path, prepend_bos=True, exclude_special=True)
    assert asked.tokens.tolist() == rows
    assert asked.mask is not None
    assert asked.mask.tolist() == is_text

    backend = Tokenizer.from_str(bpe.backend_tokenizer.to_str())
    template = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    backend.post_processor = template  # type: ignore[assignment]
    like_llama = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    assert pack(text, like_llama, tmp_path).tokens.tolist() == rows
    plain = pack(text, like_llama, tmp_path, prepend_bos=False)
    assert plain.tokens.tolist() == packed_by_hand(TEXTS, bpe, [0], [], [], 0, 16)[0]


def test_without_special_tokens_text_follows_text(text: TextSettings, bert: Any, bpe: Any, tmp_path: Path) -> None:
    for tokenizer in (bert, bpe):
        packed = pack(text, tokenizer, tmp_path, special_tokens=False)
        assert packed.tokens.tolist() == packed_by_hand(TEXTS, tokenizer, [], [], [], 0, 16)[0]
        assert packed.n_frame == 0


def test_a_separator_written_out_in_a_document_is_text(bpe: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one <|endoftext|> two")
    packed = pack(TextSettings(str(tmp_path / "a.txt")), bpe, tmp_path)
    stream = flat(packed)
    assert (stream == 0).sum() == 1
    assert stream[-1] == 0
    assert bpe.decode(stream.tolist()) == "one <|endoftext|> two<|endoftext|>"
    assert bpe("<|endoftext|>")["input_ids"] == [0]  # the caller's own tokenizer is as it was


def test_truncation_and_padding_left_on_in_the_tokenizer_cut_nothing_and_stay(
    text: TextSettings, bpe: Any, tmp_path: Path
) -> None:
    short = copy.deepcopy(bpe)
    short.backend_tokenizer.enable_truncation(3)
    short.backend_tokenizer.enable_padding(length=5)
    packed, expected = pack(text, short, tmp_path / "a"), pack(text, bpe, tmp_path / "b")
    assert packed.tokens.tolist() == expected.tokens.tolist()
    assert packed.identity == expected.identity
    assert len(short.backend_tokenizer.encode(TEXTS[9]).ids) == 5


def test_characters_pack_one_to_one(text: TextSettings, tmp_path: Path) -> None:
    tokenizer = character_tokenizer(TEXTS, tmp_path / "tokenizer")
    packed = pack(text, tokenizer, tmp_path)
    assert packed.n_tokens == packed.n_characters + packed.n_documents


def test_large_vocabularies_take_four_bytes(text: TextSettings, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: 70_000 + index for index, word in enumerate(WORDS)} | {"[UNK]": 0}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # type: ignore[call-arg]
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    packed = pack(text, PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"), tmp_path)
    assert packed.tokens.dtype == np.uint32
    assert flat(packed).tolist() == [vocabulary[word] for x in TEXTS for word in x.split()]  # no separator to be had


def test_a_slow_tokenizer_packs_as_well(text: TextSettings, bpe: Any, tmp_path: Path) -> None:
    class Slow:
        """The interface of a tokenizer that has no Rust backend."""

        is_fast = False
        eos_token_id, bos_token_id, sep_token_id, cls_token_id, pad_token_id = 0, 0, None, None, None

        def __call__(self, texts: Any, **kwargs: Any) -> dict[str, Any]:
            kwargs.pop("verbose", None)
            return bpe(texts, **kwargs)

        def get_vocab(self) -> dict[str, int]:
            return bpe.get_vocab()

        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "vocab.json").write_text(json.dumps(self.get_vocab()))

    assert pack(text, Slow(), tmp_path).tokens.tolist() == pack(text, bpe, tmp_path).tokens.tolist()


# ---- parts and limits


def test_train_and_held_out_are_the_parts_of_the_text(text: TextSettings, bpe: Any, tmp_path: Path) -> None:
    for part in ("train", "held_out"):
        own = list(documents(text, part))
        packed = pack(text, bpe, tmp_path, part=part)
        assert packed.tokens.tolist() == packed_by_hand(own, bpe, [0], [], [], 0, 16)[0]
        assert packed.n_documents == len(own)


@pytest.mark.parametrize("batch", [1, 1_000_000])
def test_max_tokens_is_exact(
    text: TextSettings, bpe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", batch)
    stream = flat(pack(text, bpe, tmp_path)).tolist()
    ends = [index + 1 for index, token in enumerate(stream) if token == 0]
    for limit in (1, ends[3] - 1, ends[3], ends[3] + 1, 160, len(stream), len(stream) + 5):
        packed = pack(text, bpe, tmp_path, max_tokens=limit)
        assert flat(packed).tolist() == stream[:limit]
        assert packed.n_documents == sum(end < limit for end in ends[:-1]) + 1
        assert packed.n_padding == -min(limit, len(stream)) % 16


def test_reading_stops_at_max_tokens(
    text: TextSettings, bpe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def far_more(settings: TextSettings, part: str) -> Iterator[str]:
        for _ in range(2000):
            read.append(1)
            yield "the cat sat " * 10

    monkeypatch.setattr(module, "documents", far_more)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1000)
    assert pack(text, bpe, tmp_path, max_tokens=500).n_tokens == 500
    assert len(read) < 50


def test_memory_does_not_grow_with_the_text(
    text: TextSettings, bpe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of 6 million characters through batches of 20,000: at no time more than a few batches are held."""
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 20_000)
    monkeypatch.setattr(module, "documents", lambda settings, part: ("the cat " * 500 for _ in range(1500)))
    tracemalloc.start()
    try:
        packed = pack(text, bpe, tmp_path, context=128)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert packed.n_characters == 6_000_000
    assert packed.n_tokens > 1_000_000
    assert peak < 2_500_000


# ---- the cache


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of texts at each call of an encoder."""
    calls: list[int] = []
    encoder = module.encoder_of

    def counting(tokenizer: Any) -> Any:
        own = encoder(tokenizer)
        return replace(own, encode=lambda texts: (calls.append(len(texts)), own.encode(texts))[1])

    monkeypatch.setattr(module, "encoder_of", counting)
    return calls


def test_what_was_tokenized_once_is_opened_not_tokenized(
    text: TextSettings, bpe: Any, tmp_path: Path, encoded: list[int]
) -> None:
    first = pack(text, bpe, tmp_path)
    assert sum(encoded) == len(TEXTS)
    again = pack(text, bpe, tmp_path)
    assert sum(encoded) == len(TEXTS)
    assert again.folder == first.folder
    assert again.tokens.tolist() == first.tokens.tolist()
    assert replace(again, tokens=first.tokens, mask=first.mask) == first


def test_anything_that_changes_the_tokens_changes_the_key(
    text: TextSettings, bpe: Any, bert: Any, tmp_path: Path
) -> None:
    other_text = tmp_path / "other.jsonl"
    other_text.write_text(Path(text.source).read_text().replace("cat", "dog"))
    smaller = train_byte_bpe(TEXTS, 265, tmp_path / "smaller")
    variants: list[tuple[TextSettings, Any, dict[str, Any]]] = [
        (text, bpe, {}),
        (text, bpe, {"part": "train"}),
        (text, bpe, {"part": "held_out"}),
        (replace(text, held_out=0.3), bpe, {"part": "train"}),
        (replace(text, max_documents=70), bpe, {}),
        (replace(text, source=str(other_text)), bpe, {}),
        (text, smaller, {}),
        (text, bert, {}),
        (text, bpe, {"context": 17}),
        (text, bpe, {"max_tokens": 100}),
        (text, bpe, {"exclude_special": True}),
        (text, bpe, {"prepend_bos": True}),
        (text, bpe, {"special_tokens": False}),
    ]
    folders = [pack(settings, tokenizer, tmp_path, **more).folder for settings, tokenizer, more in variants]
    assert len(set(folders)) == len(variants)
    assert pack(replace(text, held_out=0.3), bpe, tmp_path).folder == folders[0]  # "all" has no split


def test_a_file_that_changed_is_tokenized_anew(text: TextSettings, bpe: Any, tmp_path: Path) -> None:
    first = pack(text, bpe, tmp_path)
    Path(text.source).write_text('{"text": "the dog"}\n')
    assert bpe.decode(flat(pack(text, bpe, tmp_path)).tolist()) == "the dog<|endoftext|>"
    assert first.n_documents == len(TEXTS)


def test_the_identity_names_the_tokens_by_their_hash(text: TextSettings, bpe: Any, tmp_path: Path) -> None:
    packed = pack(text, bpe, tmp_path)
    assert packed.identity["sha256"] == hashlib.sha256(packed.tokens.astype("<u2").tobytes()).hexdigest()
    assert packed.identity["text"]["source"] == text.source
    assert json.loads(json.dumps(packed.identity)) == packed.identity


def test_an_interrupted_run_leaves_nothing(
    text: TextSettings, bpe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = module.encoder_of

    def failing(tokenizer: Any) -> Any:
        own = encoder(tokenizer)

        def stop(texts: list[str]) -> list[list[int]]:
            if "mat" in texts[0]:
                raise KeyboardInterrupt
            return own.encode(texts)

        return replace(own, encode=stop)

    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1)
    monkeypatch.setattr(module, "encoder_of", failing)
    with pytest.raises(KeyboardInterrupt):
        pack(text, bpe, tmp_path / "cache")
    assert list((tmp_path / "cache" / "contexts").iterdir()) == []


def test_two_writers_at_once_end_with_one_whole_folder(text: TextSettings, bpe: Any, tmp_path: Path) -> None:
    expected = pack(text, bpe, tmp_path / "alone").tokens.tolist()
    found: list[Contexts] = []
    started = threading.Barrier(4)

    def work() -> None:
        started.wait()
        found.append(pack(text, bpe, tmp_path / "together"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [packed.tokens.tolist() for packed in found] == [expected] * 4
    assert len(list((tmp_path / "together" / "contexts").iterdir())) == 1


def test_the_second_writer_takes_what_the_first_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "contexts" / "key"
    with module._written_whole(folder) as second:
        with module._written_whole(folder) as first:
            (first / "contexts.json").write_text("first")
        (second / "contexts.json").write_text("second")
    assert (folder / "contexts.json").read_text() == "first"
    assert [path.name for path in folder.parent.iterdir()] == ["key"]


def test_what_a_killed_process_left_is_cleared_after_a_day(text: TextSettings, bpe: Any, tmp_path: Path) -> None:
    old, new = (tmp_path / "contexts" / f".writing-{name}" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "tokens.bin").write_bytes(b"half")
    yesterday = time.time() - 25 * 3600
    for path in (old / "tokens.bin", old):
        os.utime(path, (yesterday, yesterday))
    os.utime(new, (yesterday, yesterday))  # made long ago and still written to
    pack(text, bpe, tmp_path)
    assert not old.exists()
    assert new.exists()


@pytest.mark.parametrize("name", ["tokens.bin", "mask.bin"])
def test_a_damaged_cache_is_an_error_not_wrong_tokens(text: TextSettings, bpe: Any, tmp_path: Path, name: str) -> None:
    packed = pack(text, bpe, tmp_path)
    os.truncate(packed.folder / name, 10)
    with pytest.raises(UserError, match=rf"damaged \({name}\): delete that folder"):
        pack(text, bpe, tmp_path)


def test_a_folder_without_its_facts_is_written_anew(text: TextSettings, bpe: Any, tmp_path: Path) -> None:
    packed = pack(text, bpe, tmp_path)
    expected = packed.tokens.tolist()
    (packed.folder / "contexts.json").unlink()
    assert pack(text, bpe, tmp_path).tokens.tolist() == expected


def test_the_default_cache_is_where_the_environment_says(
    text: TextSettings, bpe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSE_CODING_CACHE", str(tmp_path / "here"))
    assert pack(text, bpe, tmp_path, cache=None).folder.parent == tmp_path / "here" / "contexts"
    monkeypatch.delenv("SPARSE_CODING_CACHE")
    assert default_cache() == Path.home() / ".cache" / "sparse_coding"


def test_a_cache_that_is_a_file_or_may_not_be_written_is_an_error(text: TextSettings, bpe: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*set SPARSE_CODING_CACHE"):
        pack(text, bpe, tmp_path / "file")


# ---- mistakes and reports


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("bpe", {"context": 0}, "context=0 leaves no room for text: this tokenizer needs at least 1"),
        ("bert", {"context": 2}, "context=2 leaves no room for text: this tokenizer needs at least 3"),
        ("bpe", {"max_tokens": 0}, "max_tokens must be at least 1"),
        ("bert", {"prepend_bos": True, "special_tokens": False}, "leave one out"),
        ("bpe", {"part": "test"}, "part 'test'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    text: TextSettings,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    kind: str,
    settings: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        pack(text, request.getfixturevalue(kind), tmp_path, **settings)


def test_a_tokenizer_without_bos_cannot_prepend_it(text: TextSettings, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(UserError, match="no BOS token"):
        pack(text, bare, tmp_path, prepend_bos=True)


def test_characters_that_a_vocabulary_lacks_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abba" * 50 + "é\u202e" + "".join(map(chr, range(0x4E00, 0x4E06))))
    text = TextSettings(str(tmp_path / "text.txt"))
    with pytest.raises(UserError, match=r"the text holds 9 characters .* such as 'b', 'é', '\\u202e', '一'") as error:
        pack(text, tokenizer_from_characters(["a"]), tmp_path / "cache")
    assert "\n" not in str(error.value)
    (tmp_path / "text.txt").write_text("abba" * 50)
    packed = pack(text, tokenizer_from_characters(["a", "b"]), tmp_path / "cache")
    assert flat(packed)[:8].tolist() == [0, 1, 1, 0] * 2
    assert packed.n_tokens == packed.n_characters


def test_text_of_which_nothing_is_left_is_an_error(bert: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\t")
    with pytest.raises(UserError, match="no token of this text"):
        pack(TextSettings(str(tmp_path / "a.txt")), bert, tmp_path / "cache", special_tokens=False)
    assert list((tmp_path / "cache" / "contexts").iterdir()) == []


def test_progress_says_what_was_counted_and_only_when_asked(
    text: TextSettings, bpe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(encoding, "REPORT_SECONDS", 0.0)
    packed = pack(text, bpe, tmp_path, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 3
    assert all("tokens/s" in line for line in lines)
    assert f": {packed.n_tokens:,} tokens, " in lines[-1]
    assert f"; {packed.n_documents:,} documents, {packed.n_characters:,} characters, " in lines[-1]
    assert f"{len(packed.tokens):,} contexts, {packed.n_padding} positions of padding" in lines[-1]
    pack(text, bpe, tmp_path / "quiet", progress=False)
    assert capsys.readouterr() == ("", "")


def test_the_environment_is_left_as_it_was(
    text: TextSettings, bpe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    pack(text, bpe, tmp_path)
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    pack(text, bpe, tmp_path, context=17)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
