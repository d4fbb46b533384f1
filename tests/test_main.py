from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sparse_coding.__main__ import VERBS, SitesFlags, main
from sparse_coding.activations.models import bundled_models
from sparse_coding.errors import UserError
from sparse_coding.run_flags import DEFAULT_MODEL

ROOT = Path(__file__).parents[1]


def test_help_lists_every_verb(capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)


def test_an_unknown_verb_names_the_near_one():
    with pytest.raises(UserError, match="did you mean 'train-lm'"):
        main(["trainlm"])


def test_sites_of_the_bundled_model_are_listed(capsys):
    main(["sites"])
    lines = capsys.readouterr().out.splitlines()
    assert "blocks.2.mlp.hook_post" in lines
    assert "transformer.h.2.mlp.act" in lines


def test_report_refuses_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        main(["report", str(tmp_path)])


def test_a_reader_that_has_seen_enough_ends_the_listing_quietly():
    command = f"{sys.executable} -m sparse_coding sites | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout == "hook_embed\n"
    assert done.stderr == ""


def test_sites_and_run_have_the_same_default_model():
    assert SitesFlags().model == DEFAULT_MODEL
    assert DEFAULT_MODEL in bundled_models()
