"""A harvest that is started again where files have gone since."""

from __future__ import annotations

import json
import shutil

import pytest

from sparse_coding.errors import UserError
from sparse_coding.harvest import harvest
from tests.end_to_end.harvesting import files, flags, manifest

OPTIONS = ("--codec", "fp32", "--keep-tokens")


@pytest.fixture
def damaged(harvested, tmp_path):
    store = tmp_path / "s"
    shutil.copytree(harvested, store)
    (store / "site-1" / "00007.safetensors").unlink()
    file = store / "tokens" / "00008.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    return store


def test_a_complete_store_that_lacks_files_is_not_said_to_be_done(damaged, small_gpt2, small_text, capsys):
    before = files(damaged)
    with pytest.raises(UserError, match=r"complete but damaged: .*site-1/00007.* is missing, and 1 more .*delete the"):
        harvest(flags(small_gpt2, small_text, damaged, *OPTIONS))
    assert "is complete:" not in capsys.readouterr().out
    assert files(damaged) == before


def test_an_unfinished_store_that_lacks_files_is_harvested_again_from_there(
    damaged, harvested, small_gpt2, small_text, capsys
):
    (damaged / "manifest.json").write_text(json.dumps({**manifest(damaged), "complete": False}))
    harvest(flags(small_gpt2, small_text, damaged, *OPTIONS))
    assert "continuing after 21,000 rows" in capsys.readouterr().out
    assert files(damaged, but="manifest.json") == files(harvested, but="manifest.json")
    assert manifest(damaged)["shards"] == manifest(harvested)["shards"]
