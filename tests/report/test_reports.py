from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from sparse_coding.errors import UserError
from sparse_coding.report import write_run_report, write_toy_report
from tests.report.fake_runs import HOSTILE, language_run, toy_run, write_lines


class Links(HTMLParser):
    """Everything a browser would fetch, and every script."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.found += [value for name, value in attributes if name in ("src", "href", "xlink:href") and value]
        self.found += [tag] if tag in ("link", "iframe", "object", "embed", "base") else []


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy_report(toy_run(tmp_path_factory.mktemp("toy"), n_l1=9, n_ratios=5, seeds=2))


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return write_run_report(language_run(tmp_path_factory.mktemp("lm"), ratios=(1.0, 4.0)))


def test_both_reports_are_single_files_that_need_no_network(toy, language):
    for page in (toy, language):
        html = page.read_text(encoding="utf-8")
        links = Links(html)
        assert all(link.startswith("#") for link in links.found)
        assert not re.search(r"""(src|href)\s*=\s*["']?\s*https?:|@import|url\(\s*["']?\s*http""", html)
        assert links.tags.count("script") == 1


def test_hostile_words_from_settings_and_tokens_are_escaped(toy, language):
    for page in (toy, language):
        html = page.read_text(encoding="utf-8")
        assert HOSTILE not in html
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_the_tables_hold_every_member(toy, language):
    for page in (toy, language):
        html = page.read_text(encoding="utf-8")
        for line in (page.parent / "results.jsonl").read_text().splitlines():
            assert f'data-key="{json.loads(line)["name"]}"' in html


def test_redrawing_gives_the_same_page_and_pictures(toy, language):
    for page, write in ((toy, write_toy_report), (language, write_run_report)):
        pictures = {path: path.read_bytes() for path in (page.parent / "pictures").iterdir()}
        before = page.read_bytes()
        assert write(page.parent) == page
        assert page.read_bytes() == before
        assert {path: path.read_bytes() for path in (page.parent / "pictures").iterdir()} == pictures


def names(page):
    return {path.name for path in (page.parent / "pictures").iterdir()}


def test_a_toy_report_has_every_picture_and_its_controls(toy):
    assert names(toy) == {
        "mmcs.png", "fraction_found.png", "l0.png", "dead_fraction.png", "mse.png", "mmcs_next_larger.png",
        "mmcs_curves.png", "cosine_histograms.png",
    }  # fmt: skip
    html = toy.read_text(encoding="utf-8")
    for word in ("ceiling r=0.125", "ceiling r≥1", "oracle", "predicted collapse", "mean over 2 seeds", "4 × ratio"):
        assert word in html
    assert "About 33 true features" in html
    assert html.count("0.0178") > html.count("0.018")


def test_dead_counts_are_clipped_in_the_picture_alone_and_only_where_asked(tmp_path):
    folder = toy_run(tmp_path, n_l1=3, n_ratios=4, seeds=1)
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**settings, "clip_dead": 100}))
    before = (folder / "results.jsonl").read_bytes()
    page = write_toy_report(folder)
    assert "dead.png" in names(page)
    assert "Colours end at 100" in page.read_text()
    assert (folder / "results.jsonl").read_bytes() == before


def test_the_published_dead_count_is_drawn_with_its_own_expectation(tmp_path):
    folder = toy_run(tmp_path, n_l1=2, n_ratios=1, seeds=1)
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for record in records:
        record["metrics"]["dead_published"] = 77
    write_lines(folder / "results.jsonl", records)
    settings = json.loads((folder / "settings.json").read_text())
    settings["controls"]["expected_dead_published"] = 44
    (folder / "settings.json").write_text(json.dumps({**settings, "pictures": {"published_metrics": True}}))
    html = write_toy_report(folder).read_text()
    assert "About 44 true features" in html
    assert ">77<" in html


def test_a_toy_report_without_controls_or_most_metrics_is_still_drawn(tmp_path):
    record = {"name": "a", "l1_coefficient": 0.1, "ratio": 1.0, "metrics": {"mmcs": 0.5}}
    write_lines(tmp_path / "results.jsonl", [record])
    (tmp_path / "settings.json").write_text("{}")
    assert names(write_toy_report(tmp_path)) == {"mmcs.png"}


def test_two_architectures_get_their_own_maps(tmp_path):
    folder = toy_run(tmp_path, n_l1=2, n_ratios=1, seeds=1)
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    others = [{**record, "architecture": "other", "name": f"other-{i}"} for i, record in enumerate(records)]
    write_lines(folder / "results.jsonl", records + others)
    found = names(write_toy_report(folder))
    assert {"relu-mmcs.png", "other-mmcs.png", "frontier.png"} <= found


def test_the_run_report_says_what_was_run_and_what_came_out(language):
    html = language.read_text(encoding="utf-8")
    assert names(language) == {"frontier.png", "maps.png", "densities.png", "training.png"}
    for words in ("gpt2", "python-docs", "0123456789ab with uncommitted changes", "torch 2.13.0", "81,920,000"):
        assert words in html
    assert "12 dictionaries: 6 sparsity settings, 2 sizes." in html
    assert re.search(r"2 of 12 members are mostly dead", html)
    assert html.count('<tr class="best">') == 1


def test_the_highest_loss_recovered_of_the_summary_is_that_of_a_sparse_living_member(language):
    records = [json.loads(line) for line in (language.parent / "results.jsonl").read_text().splitlines()]
    usable = [r["metrics"] for r in records if r["metrics"]["l0"] <= 76.8 and r["metrics"]["dead_fraction"] < 0.5]
    best = max(metrics["ce_recovered_zero"] for metrics in usable)
    assert f"the highest loss recovered is {best:.1%}" in language.read_text(encoding="utf-8")


def test_top_contexts_are_spans_coloured_by_activation(language):
    html = language.read_text(encoding="utf-8")
    assert '<span class="on" style="--a:1.0" title="4">def</span>' in html
    assert '<span class="on" style="--a:0.675" title="2.7">↵</span>' in html


def test_each_site_and_learning_rate_has_its_pictures_and_blanks_are_noted(tmp_path):
    folder = language_run(tmp_path, sites=("a/b", "a b"), ratios=(1.0,), l1s=(0.01, 0.1), lrs=(1e-3, 3e-4), seeds=2)
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for record in records:
        if record["l1_coefficient"] == 0.1 and record["site"] == "a/b":
            record["metrics"] |= {"fvu": float("nan"), "l0": None, "ce_recovered_zero": None}
    write_lines(folder / "results.jsonl", records)
    page = write_run_report(folder)
    html = page.read_text(encoding="utf-8")
    assert names(page) == {
        f"{site}-{picture}.png" for site in ("0-a_b", "1-a_b")
        for picture in ("frontier", "densities", "maps-lr_0.001", "maps-lr_0.0003", "training-lr_0.001",
                        "training-lr_0.0003")
    }  # fmt: skip
    assert "1 of 2 cells are blank" in html
    assert "4 members have no finite value at a positive L0" in html
    assert "lr 3e-4" in html or "lr 0.0003" in html


def test_a_run_without_log_loss_or_latents_is_still_drawn(tmp_path):
    metrics = {"fvu": 0.3, "l0": 5.0, "mmcs_next_larger": None}
    record = {"name": "a", "site": "s", "d_in": 64, "d_sae": 64, "l1_coefficient": 0.1, "metrics": metrics}
    write_lines(tmp_path / "results.jsonl", [record])
    (tmp_path / "settings.json").write_text("{}")
    page = write_run_report(tmp_path)
    assert names(page) == {"frontier.png", "maps.png"}
    assert "Loss recovered was not measured" in page.read_text()


def test_a_sweep_in_which_everything_diverged_is_reported_as_such(tmp_path):
    record = {
        "name": "a",
        "site": "s",
        "ratio": 1.0,
        "l1_coefficient": 0.1,
        "metrics": {"fvu": float("nan"), "l0": None},
    }
    write_lines(tmp_path / "results.jsonl", [record])
    (tmp_path / "settings.json").write_text("{}")
    assert "1 of 1 members have no finite reconstruction error" in write_run_report(tmp_path).read_text()


def test_an_empty_results_file_is_refused_by_both(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "results.jsonl").write_text("")
    for write in (write_run_report, write_toy_report):
        with pytest.raises(UserError, match="is empty"):
            write(tmp_path)


def test_importing_the_reports_does_not_import_matplotlib_or_jinja2():
    import subprocess
    import sys

    code = "import sys, sparse_coding.report; print([m for m in ('matplotlib', 'jinja2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
