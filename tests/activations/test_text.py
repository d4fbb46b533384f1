from __future__ import annotations

import gzip
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import datasets.exceptions
import httpx
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from sparse_coding.activations import text_files
from sparse_coding.activations.text import Part, TextSettings, documents, is_held_out, text_identity
from sparse_coding.errors import UserError

TEXTS = [f"document {i}: " + "word " * (i % 7) for i in range(300)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(source: Path | str, part: Part = "all", **settings: Any) -> list[str]:
    return list(documents(TextSettings(str(source), **settings), part))


# ---- parts


def test_train_and_held_out_are_disjoint_complete_and_in_order(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    train, held_out = read(path, "train", held_out=0.2), read(path, "held_out", held_out=0.2)
    assert set(train).isdisjoint(held_out)
    assert sorted(train + held_out) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in set(train)]
    assert read(path, "all", held_out=0.2) == TEXTS


def test_the_held_out_share_is_the_one_asked_for_and_only_grows() -> None:
    for share in (0.01, 0.05, 0.5):
        held_out = {index for index in range(20_000) if is_held_out(index, share)}
        deviation = (20_000 * share * (1 - share)) ** 0.5
        assert abs(len(held_out) - 20_000 * share) < 4 * deviation
        assert held_out <= {index for index in range(20_000) if is_held_out(index, share * 1.5)}
    assert not any(is_held_out(index, 0.0) for index in range(1000))


def test_which_documents_are_held_out_never_changes() -> None:
    assert [index for index in range(100) if is_held_out(index, 0.05)] == [19, 46, 61, 83, 90]


def test_an_empty_row_moves_no_document_to_the_other_part(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": text} for text in TEXTS]
    held_out = read(write_jsonl(tmp_path / "a.jsonl", rows), "held_out")
    rows[0], rows[1] = {"text": ""}, {"text": None}
    assert read(write_jsonl(tmp_path / "b.jsonl", rows), "held_out") == [x for x in held_out if x not in TEXTS[:2]]


def test_max_documents_counts_before_the_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    train, held_out = (read(path, part, max_documents=100) for part in ("train", "held_out"))
    assert sorted(train + held_out) == sorted(TEXTS[:100])


def test_documents_are_read_lazily(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "good"}, {"text": "good"}])
    with path.open("a") as file:
        file.write("not json\n")
    stream = documents(TextSettings(str(path)), "all")
    assert [next(stream), next(stream)] == ["good", "good"]
    with pytest.raises(UserError, match="line 3 is not JSON"):
        next(stream)


@pytest.mark.parametrize(
    ("settings", "part", "message"),
    [
        ({"held_out": 1.0}, "train", "0 <= held_out < 1; got 1.0"),
        ({"held_out": -0.1}, "train", "0 <= held_out < 1; got -0.1"),
        ({"held_out": 0.0}, "held_out", "held_out is 0"),
        ({"max_documents": 0}, "train", "max_documents must be at least 1"),
        ({}, "test", "part 'test' of a text"),
        ({"split": "test"}, "train", "no configurations and no splits but 'train'"),
        ({"config": "en"}, "train", "no configurations"),
        ({"column": "text"}, "train", "has no columns"),
        ({"source": ""}, "train", "names nothing"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(settings: dict[str, Any], part: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        documents(TextSettings(**settings), part)


def test_a_part_without_a_document_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "only one"}])
    assert read(path, "train") == ["only one"]
    with pytest.raises(UserError, match=r"1 documents is in the held_out part .*raise held_out \(--held-out\)"):
        read(path, "held_out")


# ---- text files


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path, newline: str) -> None:
    paragraphs = [f"paragraph {i} " + "word " * (i * 37 % 90) for i in range(200)]
    whole = newline + (newline + " " + newline + newline).join(paragraphs) + newline
    path = tmp_path / "a.txt"
    path.write_bytes(whole.encode())
    pieces = read(path)
    assert "".join(pieces) == whole
    assert len(pieces) > 10
    assert all(len(piece) >= text_files.DOCUMENT for piece in pieces[:-1])
    assert max(map(len, pieces)) < text_files.DOCUMENT + max(map(len, paragraphs)) + 10
    assert all(piece.startswith("paragraph") and piece.endswith(newline) for piece in pieces[1:])


def test_text_without_blank_lines_or_without_lines_is_cut_all_the_same(tmp_path: Path) -> None:
    for name, whole in (("lines", "a line of text\n" * 20_000), ("one", "word " * 60_000), ("cr", "word\r" * 60_000)):
        path = tmp_path / f"{name}.txt"
        path.write_bytes(whole.encode())
        pieces = read(path)
        assert "".join(pieces) == whole
        assert max(map(len, pieces)) < 2 * text_files.LONGEST
        assert len(pieces) > 5


def test_a_byte_order_mark_is_no_text_and_gzip_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffé text".encode())
    assert read(tmp_path / "a.txt") == ["é text"]
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("zipped é".encode()))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped row"}\n'))
    assert read(tmp_path / "b.txt.gz") == ["zipped é"]
    assert read(tmp_path / "c.jsonl.gz") == ["zipped row"]


def test_text_that_cannot_be_decoded_is_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt' is not UTF-8 \(byte 0xe9"):
        read(tmp_path / "a.txt")
    whole = gzip.compress(b"text " * 100_000)
    (tmp_path / "b.txt.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.txt.gz").write_bytes(b"plain")
    for name in ("b.txt.gz", "c.txt.gz"):
        with pytest.raises(UserError, match="is not a whole gzip file"):
            read(tmp_path / name)


@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match="is empty"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="is empty"):
        read(tmp_path / "a.txt")


def test_a_missing_file_is_an_error_that_names_the_near_one(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text("To be")
    with pytest.raises(UserError, match=r"no such file or folder; did you mean 'shakespeare\.txt'"):
        documents(TextSettings(str(tmp_path / "shakespear.txt")))
    with pytest.raises(UserError, match="no such file"):
        documents(TextSettings("nowhere.jsonl"))
    (tmp_path / "a.docx").write_text("To be")
    with pytest.raises(UserError, match=r"unknown kind of file; allowed are \.txt, \.jsonl, \.parquet"):
        documents(TextSettings(str(tmp_path / "a.docx")))


# ---- rows


def test_the_column_is_text_or_the_only_one_of_strings_or_the_one_asked_for(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "body": "b", "text": "t"}])
    assert read(path) == ["t"]
    assert read(path, column="body") == ["b"]
    assert read(write_jsonl(tmp_path / "b.jsonl", [{"id": 1, "body": "b"}])) == ["b"]
    with pytest.raises(UserError, match=r"which column holds the text\? It has body, title"):
        read(write_jsonl(tmp_path / "c.jsonl", [{"body": "b", "title": "t"}]))
    with pytest.raises(UserError, match="no column 'boddy'; it has id, body, text; did you mean 'body'"):
        read(path, column="boddy")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut off', "line 2 is not JSON"),
        ('["text"]', "line 2: a line must be an object"),
        ('{"texts": "b"}', "line 2: no column 'text'; it has texts; did you mean 'texts'"),
        ('{"text": 3}', "line 2: column 'text' holds int, not text"),
    ],
)
def test_a_bad_json_line_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.jsonl")


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "\ud83d\ude00 \ud83d \u00e9"}')
    assert read(tmp_path / "a.jsonl") == ["😀 \ufffd é"]


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=50)
    return path


def test_parquet_is_read_row_by_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"id": list(range(300)), "text": TEXTS, "title": TEXTS[::-1]})
    assert read(path) == TEXTS
    assert read(path, column="title") == TEXTS[::-1]
    with pytest.raises(UserError, match="no column 'txt'; it has id, text, title; did you mean 'text'"):
        read(path, column="txt")
    with pytest.raises(UserError, match="column 'id' holds int, not text"):
        read(path, column="id")
    (tmp_path / "b.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read(tmp_path / "b.parquet")


def test_a_folder_of_files_is_read_in_order_of_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", [{"text": "second"}])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.txt").write_text("third")
    write_parquet(tmp_path / "a.parquet", {"text": ["first"]})
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "e.txt").write_text("hidden")
    assert read(tmp_path) == ["first", "second", "third"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"a folder with no \.txt, \.jsonl, \.parquet file"):
        documents(TextSettings(str(tmp_path / "empty")))


def test_what_datasets_saved_is_read_one_data_set_or_one_split_of_several(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(300))})
    one.save_to_disk(str(tmp_path / "one"))
    assert read(tmp_path / "one") == TEXTS
    with pytest.raises(UserError, match="holds one split"):
        read(tmp_path / "one", split="test")
    both = datasets.DatasetDict({"train": one, "validation": datasets.Dataset.from_dict({"text": ["v"]})})
    both.save_to_disk(str(tmp_path / "both"))
    assert read(tmp_path / "both") == TEXTS
    assert read(tmp_path / "both", split="validation") == ["v"]
    with pytest.raises(UserError, match="no split 'valid'; it has train, validation; did you mean 'validation'"):
        read(tmp_path / "both", split="valid")
    with pytest.raises(UserError, match="no column 'txt'; it has text, id"):
        read(tmp_path / "one", column="txt")
    with pytest.raises(UserError, match="is for data sets by name"):
        read(tmp_path / "one", config="en")


# ---- identity


def test_the_identity_follows_settings_and_contents(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    settings = TextSettings(str(path))
    first = text_identity(settings)
    assert json.loads(json.dumps(first)) == first
    assert text_identity(replace(settings, streaming=True)) == first
    for other in (replace(settings, column="text"), replace(settings, max_documents=3), replace(settings, split="x")):
        assert text_identity(other) != first
    write_jsonl(path, [{"text": "b"}])  # as long as before
    assert text_identity(settings)["files"][0]["bytes"] == first["files"][0]["bytes"]
    assert text_identity(settings) != first


def test_the_identity_of_a_folder_follows_its_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    first = text_identity(TextSettings(str(tmp_path)))
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    assert text_identity(TextSettings(str(tmp_path))) != first
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "one"))
    saved = text_identity(TextSettings(str(tmp_path / "one")))
    assert any(file["name"].endswith(".arrow") for file in saved["files"])


def test_the_identity_of_the_default_and_of_a_data_set_by_name() -> None:
    python = text_identity(TextSettings())
    assert python["source"] == "python-docs"
    assert len(python["sha256"]) == 64
    hub = text_identity(TextSettings("some/data", config="en", split="test"))
    assert (hub["source"], hub["config"], hub["split"]) == ("some/data", "en", "test")


# ---- the hub


@pytest.fixture
def unplugged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with no network and nothing said about it: every request fails, offline mode is not set."""

    class Session:
        def head(self, url: str, timeout: float) -> None:
            assert timeout <= 5
            raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.utils, "get_session", Session)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


def assert_hub_is_said_to_be_unreachable(source: str) -> None:
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        documents(TextSettings(source))
    message = str(caught.value)
    assert "hub cannot be reached" in message
    assert "--text path" in message
    assert "--text python-docs" in message
    assert "\n" not in message
    assert time.perf_counter() - start < 5  # the libraries alone try for 23 seconds


def test_offline_mode_and_no_network_give_one_line_that_names_the_ways_out(unplugged: None) -> None:
    assert_hub_is_said_to_be_unreachable("NeelNanda/pile-10k")
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False  # as it was found
    assert datasets.config.HF_HUB_OFFLINE is False


def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: pytest.fail("asked the hub"))
    assert_hub_is_said_to_be_unreachable("NeelNanda/pile-10k")


def test_a_misspelt_name_of_the_default_is_recognised(unplugged: None) -> None:
    with pytest.raises(UserError, match="did you mean 'python-docs'"):
        documents(TextSettings("pythondocs"))


def test_a_data_set_in_the_cache_loads_without_a_network(
    unplugged: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    made = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(tmp_path / "made"))
    assert isinstance(made, datasets.Dataset)
    made_at = Path(made.cache_files[0]["filename"])
    cached = tmp_path / "cache" / "NeelNanda___pile-10k" / "default" / "0.0.0" / "abc"
    cached.mkdir(parents=True)
    shutil.copy(made_at, cached / "pile-10k-train.arrow")
    info = json.loads((made_at.parent / "dataset_info.json").read_text())
    info |= {"config_name": "default", "dataset_name": "pile-10k", "builder_name": "parquet"}
    info["splits"]["train"]["dataset_name"] = "pile-10k"
    (cached / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert read("NeelNanda/pile-10k") == TEXTS
    with pytest.raises(UserError, match=r"split='tst' cannot be loaded: Unknown split .* \['train'\]"):
        read("NeelNanda/pile-10k", split="tst")
    with pytest.raises(UserError, match=r"config='en'.*Available configs in the cache: \['default'\]"):
        read("NeelNanda/pile-10k", config="en")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """A hub that has one data set, `some/data`; records how it was asked."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        if args[0] != "some/data":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{args[0]}' doesn't exist on the Hub")
        table = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(300))})
        if not kwargs["streaming"]:
            return table
        return datasets.IterableDataset.from_generator(lambda: iter(table))  # features unknown, as of many streams

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_by_name_is_read_whole_or_as_a_stream(hub: list[Any], streaming: bool) -> None:
    assert read("some/data", config="en", split="test", streaming=streaming) == TEXTS
    assert hub == [(("some/data", "en"), {"split": "test", "streaming": streaming})]  # and never trust_remote_code
    with pytest.raises(UserError, match="no column 'body'; it has text, id"):
        read("some/data", streaming=streaming, column="body")


def test_a_name_that_the_hub_does_not_have_is_an_error(hub: list[Any]) -> None:
    with pytest.raises(UserError, match=r"neither a local file nor a data set .*doesn't exist.*--text path"):
        read("other/data")


def test_the_default_needs_nothing() -> None:
    held_out = read("python-docs", "held_out", max_documents=200)
    assert len(held_out) == sum(is_held_out(index, 0.05) for index in range(200)) > 0
    assert all(text.strip() for text in held_out)
