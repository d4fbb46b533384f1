"""run.py --activations as its users meet it: trained from one store, from several, from S3, and given nonsense."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch

from sparse_coding.errors import Interrupted, UserError, reported
from sparse_coding.harvest import harvest
from sparse_coding.pipeline import run
from sparse_coding.stores.copying import merged
from sparse_coding.stores.store import Source, Store, StoreWriter
from sparse_coding.stores.stream import StoreStream
from sparse_coding.training.run_folder import read_lines
from tests.end_to_end.harvesting import (
    AFTER,
    BEFORE,
    HIDDEN,
    SMALL,
    files,
    flags,
    run_flags,
    settings,
)
from tests.stores.fake_s3 import serving


def test_a_run_from_a_store_leaves_everything_that_a_live_one_does(trained):
    records = read_lines(trained / "results.jsonl")
    assert {(r["ratio"], r["l1_coefficient"]) for r in records} == {(0.5, 0.5), (0.5, 4.0), (1.0, 0.5), (1.0, 4.0)}
    for record in records:
        for name in ("fvu", "l0", "mse", "dead", "ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl_spliced"):
            assert record["metrics"][name] is not None, name
        assert record["site"] == HIDDEN
    known = json.loads((trained / "settings.json").read_text())
    assert 0 <= known["training"]["share_waiting"] <= 1
    assert known["data"]["stores"]["measured_on"] == "held-out text"
    assert known["data"]["stores"]["of"][0]["rows"] > 28_000
    assert json.loads((trained / "latents.json").read_text())
    report = (trained / "report.html").read_text()
    assert "waiting for data" in report
    assert "of the training time" in report
    cfg = json.loads((trained / "dictionaries" / records[0]["name"] / "cfg.json").read_text())
    assert cfg["metadata"]["context_size"] == 32


def test_it_fits_as_well_as_a_live_one(trained, small_gpt2, small_text, tmp_path):
    words = ["--model", str(small_gpt2), "--text", str(small_text), *SMALL.split(), "--layer", "1"]
    run(settings(*words, "--out", str(tmp_path / "live")))
    live = {r["name"]: r["metrics"] for r in read_lines(tmp_path / "live" / "results.jsonl")}
    stored = {r["name"]: r["metrics"] for r in read_lines(trained / "results.jsonl")}
    assert live.keys() == stored.keys()
    for name, metrics in live.items():
        assert metrics["ce_clean"] == stored[name]["ce_clean"]  # the same held-out text
        assert metrics["fvu"] == pytest.approx(stored[name]["fvu"], rel=0.25)
    assert "waiting for data" in (tmp_path / "live" / "report.html").read_text()


def test_the_same_command_again_needs_no_store(trained, harvested, tmp_path):
    moved = shutil.copytree(trained, tmp_path / "moved")
    words = run_flags(harvested, moved, "--sites", HIDDEN)
    (moved / "report.html").unlink()
    shutil.move(harvested, tmp_path / "away")
    try:
        assert run(settings(*words)).exists()
    finally:
        shutil.move(tmp_path / "away", harvested)


def test_all_sites_one_pass_by_default(harvested, tmp_path):
    words = run_flags(harvested, tmp_path / "r", "--ratios", "1", "--l1", "1", "--batch-size", "512")
    words[words.index("--tokens") : words.index("--tokens") + 2] = []
    run(settings(*words))
    assert {r["site"] for r in read_lines(tmp_path / "r" / "results.jsonl")} == {HIDDEN, BEFORE, AFTER}
    log = read_lines(tmp_path / "r" / "log.jsonl")
    assert log[-1]["step"] == Store.open(harvested).rows // 512


def test_transcoders_and_crosscoders(harvested, tmp_path):
    usual = ("--ratios", "1", "--l1", "1")
    run(settings(*run_flags(harvested, tmp_path / "t", *usual, "--sites", BEFORE, "--target-sites", AFTER, "--skip")))
    (record,) = read_lines(tmp_path / "t" / "results.jsonl")
    assert (record["site"], record["target"]) == (BEFORE, AFTER)
    assert record["metrics"]["ce_spliced"] is not None
    for kind in ("mean-norm", "whiten", "layer-norm"):
        out = tmp_path / f"c-{kind}"
        run(
            settings(*run_flags(harvested, out, *usual, "--sites", HIDDEN, BEFORE, "--crosscoder", "--normalise", kind))
        )
        (record,) = read_lines(out / "results.jsonl")
        assert record["site"] == f"{HIDDEN}+{BEFORE}"
        assert set(record["metrics"]["fvu_by_site"]) == {HIDDEN, BEFORE}


def test_codecs_hardly_change_the_fit(trained, small_gpt2, small_text, tmp_path):
    fp32 = {r["name"]: r["metrics"]["fvu"] for r in read_lines(trained / "results.jsonl")}
    for codec, tolerance in (("bf16", 0.01), ("int8", 0.02)):
        harvest(flags(small_gpt2, small_text, tmp_path / codec, "--codec", codec))
        run(settings(*run_flags(tmp_path / codec, tmp_path / f"r-{codec}", "--sites", HIDDEN)))
        for record in read_lines(tmp_path / f"r-{codec}" / "results.jsonl"):
            assert record["metrics"]["fvu"] == pytest.approx(fp32[record["name"]], rel=tolerance)


def test_without_the_model_the_last_rows_are_kept_apart(small_gpt2, small_text, tmp_path, capsys, monkeypatch):
    model = shutil.copytree(small_gpt2, tmp_path / "model")
    harvest(flags(model, small_text, tmp_path / "s", "--codec", "fp32", "--sites", HIDDEN, BEFORE))
    model.rename(tmp_path / "gone")
    more = ("--sites", HIDDEN, BEFORE)
    run(settings(*run_flags(tmp_path / "s", tmp_path / "r", *more)))
    shown = capsys.readouterr().out
    assert "measured on the last 1,402 rows of the stores" in shown
    assert "no such folder" in shown
    records = read_lines(tmp_path / "r" / "results.jsonl")
    assert len(records) == 8
    assert all(record["metrics"]["rows"] == 1000 for record in records)
    assert "ce_spliced" not in records[0]["metrics"]
    assert not (tmp_path / "r" / "latents.json").exists()
    # The rows they are measured on are the last of the store, and nothing is trained on them.
    from sparse_coding.stored import RowsApart

    store = Store.open(tmp_path / "s")
    whole = torch.cat([store.read_shard(HIDDEN, shard) for shard in range(len(store.shard_rows))])
    apart = RowsApart([store], [HIDDEN], "cpu")
    assert torch.equal(apart(1402)[HIDDEN], whole[-1402:])
    assert torch.equal(apart(5)[HIDDEN], whole[-1402:-1397])
    stream = StoreStream([store], [HIDDEN], batch_size=len(whole) - 1402, buffer_rows=30_000)
    assert torch.equal(stream.batch(0)[HIDDEN].sort(0).values, whole[:-1402].sort(0).values)
    # Named, it must be there; begun without it, a run goes on without it when it is back.
    with pytest.raises(UserError, match="no such folder"):
        run(settings(*run_flags(tmp_path / "s", tmp_path / "r2", *more, "--model", str(model))))
    run(settings(*run_flags(tmp_path / "s", tmp_path / "r2", *more, "--model", str(tmp_path / "gone"))))
    assert "ce_spliced" in read_lines(tmp_path / "r2" / "results.jsonl")[0]["metrics"]
    stopped = run_flags(tmp_path / "s", tmp_path / "r3", *more)
    monkeypatch.setattr("sparse_coding.pipeline.evaluate", lambda *_: (_ for _ in ()).throw(Interrupted("here")))
    with pytest.raises(Interrupted):
        run(settings(*stopped))
    monkeypatch.undo()
    (tmp_path / "gone").rename(model)
    run(settings(*stopped))
    again = read_lines(tmp_path / "r3" / "results.jsonl")
    assert [record["metrics"] for record in again] == [record["metrics"] for record in records]


def test_a_run_is_not_continued_with_other_rows_or_another_model(small_gpt2, small_text, tmp_path, monkeypatch):
    harvest(flags(small_gpt2, small_text, tmp_path / "s", "--sites", HIDDEN))
    words = run_flags(tmp_path / "s", tmp_path / "r")
    monkeypatch.setattr("sparse_coding.pipeline.evaluate", lambda *_: (_ for _ in ()).throw(Interrupted("here")))
    with pytest.raises(Interrupted):
        run(settings(*words))
    shutil.rmtree(tmp_path / "s")
    harvest(flags(small_gpt2, small_text, tmp_path / "s", "--sites", HIDDEN, "--shard-rows", "2000"))
    with pytest.raises(UserError, match=r"has changed since this run began"):
        run(settings(*words))
    other = shutil.copytree(small_gpt2, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(UserError, match=r"is not the one that .* was harvested from"):
        run(settings(*run_flags(tmp_path / "s", tmp_path / "r2", "--model", str(other))))


def test_several_stores_with_weights(harvested, small_gpt2, small_text, tmp_path):
    harvest(flags(small_gpt2, small_text, tmp_path / "two", "--sites", HIDDEN, "--tokens", "10k"))
    words = run_flags(harvested, tmp_path / "r", "--sites", HIDDEN, "--activation-weights", "0.5", "2")
    words.insert(2, str(tmp_path / "two"))
    run(settings(*words))
    known = json.loads((tmp_path / "r" / "settings.json").read_text())
    assert [one["codec"] for one in known["data"]["stores"]["of"]] == ["fp32", "bf16"]
    assert known["data"]["stores"]["weights"] == [0.5, 2.0]


def test_damage_is_named_or_skipped(small_gpt2, small_text, tmp_path, capsys):
    harvest(flags(small_gpt2, small_text, tmp_path / "s", "--sites", HIDDEN))
    (tmp_path / "s" / "site-0" / "00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"00003\.safetensors.*--skip-damaged"):
        run(settings(*run_flags(tmp_path / "s", tmp_path / "r")))
    run(settings(*run_flags(tmp_path / "s", tmp_path / "r", "--skip-damaged")))
    assert "1 damaged shard is left out: " in capsys.readouterr().out
    skipped = json.loads((tmp_path / "r" / "settings.json").read_text())["data"]["stores"]["skipped"]
    assert len(skipped) == 1


def test_damage_in_the_rows_kept_apart_is_met_before_training(small_gpt2, small_text, tmp_path, capsys):
    model = shutil.copytree(small_gpt2, tmp_path / "model")
    harvest(flags(model, small_text, tmp_path / "s", "--sites", HIDDEN))
    shutil.rmtree(model)
    path = tmp_path / "s" / "site-0" / "00009.safetensors"
    data = bytearray(path.read_bytes())
    for gone in (False, True):
        path.unlink()
        if not gone:
            data[-1000 * 64 * 2] ^= 1  # in its row 34: among those that are measured on
            path.write_bytes(data)
        with pytest.raises(UserError, match=r"00009\.safetensors is (damaged|missing).*--skip-damaged"):
            run(settings(*run_flags(tmp_path / "s", tmp_path / "r")))
        assert not (tmp_path / "r").exists(), "nothing was trained"
        out = tmp_path / f"skipped-{gone}"
        run(settings(*run_flags(tmp_path / "s", out, "--skip-damaged")))
        assert "1 damaged shard is left out: " in capsys.readouterr().out
        assert all(record["metrics"]["rows"] == 1000 for record in read_lines(out / "results.jsonl"))
    from sparse_coding.stored import RowsApart

    store = Store.open(tmp_path / "s")
    apart = RowsApart([store], [HIDDEN], "cpu", skip_damaged=True)
    assert (apart.rows, store.shard_rows[8:]) == (1402, [3000 - 1402, 0]), "of the shard before"


def test_a_run_with_a_checkpoint_is_not_continued_without_other_shards(small_gpt2, small_text, tmp_path, monkeypatch):
    harvest(flags(small_gpt2, small_text, tmp_path / "s", "--sites", HIDDEN))
    shards = [tmp_path / "s" / "site-0" / f"0000{shard}.safetensors" for shard in (3, 5)]
    kept = [path.read_bytes() for path in shards]
    shards[0].unlink()
    words = run_flags(tmp_path / "s", tmp_path / "r", "--skip-damaged")
    with monkeypatch.context() as patch:
        patch.setattr("sparse_coding.pipeline.evaluate", lambda *_: (_ for _ in ()).throw(Interrupted("here")))
        with pytest.raises(Interrupted):
            run(settings(*words))
    shards[1].unlink()
    with pytest.raises(UserError, match=r"shard 5 of .* was sound when .* and is damaged now.*--fresh"):
        run(settings(*words))
    shards[0].write_bytes(kept[0])
    shards[1].write_bytes(kept[1])
    with pytest.raises(UserError, match=r"shard 3 of .* was left out as damaged when .* and is whole now.*--fresh"):
        run(settings(*words))
    shards[0].write_bytes(kept[0][:-1])  # another damage, the same rows
    run(settings(*words))
    run(settings(*run_flags(tmp_path / "s", tmp_path / "whole", "--skip-damaged")))
    results = [(tmp_path / name / "results.jsonl").read_bytes() for name in ("r", "whole")]
    assert results[0] == results[1]
    shutil.rmtree(tmp_path / "r")
    with monkeypatch.context() as patch:  # before there is a checkpoint the damage may be any
        patch.setattr("sparse_coding.pipeline.Trainer", lambda *_: (_ for _ in ()).throw(Interrupted("here")))
        with pytest.raises(Interrupted):
            run(settings(*words))
    assert (tmp_path / "r" / "settings.json").exists()
    shards[1].unlink()
    run(settings(*words))


def test_a_merged_store_of_several_texts(small_gpt2, small_text, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(small_text.read_text().splitlines()[:150]))
    harvest(flags(small_gpt2, small_text, tmp_path / "a", "--sites", HIDDEN))
    harvest(flags(small_gpt2, other, tmp_path / "b", "--sites", HIDDEN))
    merged([Store.open(tmp_path / "a"), Store.open(tmp_path / "b")], str(tmp_path / "m"))
    words = ("--ratios", "1", "--l1", "1")
    run(settings(*run_flags(tmp_path / "m", tmp_path / "r", *words)))
    assert "is of several texts: name one to measure on with --text" in capsys.readouterr().out
    run(settings(*run_flags(tmp_path / "m", tmp_path / "r2", *words, "--text", str(other))))
    known = json.loads((tmp_path / "r2" / "settings.json").read_text())["data"]
    assert known["stores"]["measured_on"] == "held-out text"
    with pytest.raises(UserError, match=r"--held-out is 0\.5: 0\.05 of the documents"):
        run(settings(*run_flags(tmp_path / "m", tmp_path / "r3", *words, "--text", str(other), "--held-out", "0.5")))
    other.write_text(other.read_text() + '\n{"text": "one more"}')
    with pytest.raises(UserError, match=r"other\.jsonl has changed since"):
        run(settings(*run_flags(tmp_path / "m", tmp_path / "r3", *words, "--text", str(other))))
    run(settings(*run_flags(tmp_path / "b", tmp_path / "r4", *words)))  # not asked for: measured otherwise
    assert "other.jsonl has changed since" in capsys.readouterr().out


def test_a_store_of_a_text_in_words_and_a_context(tmp_path):
    """As a writer of one's own may leave it: nothing is to be had but its rows."""
    with StoreWriter(tmp_path / "s", {"here": 8}, Source("mine", text="letters", context=16), shard_rows=500) as writer:
        writer.append({"here": torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))})
        writer.finish()
    run(settings(*run_flags(tmp_path / "s", tmp_path / "r", "--tokens", "2k", "--ratios", "1", "--l1", "1")))
    known = json.loads((tmp_path / "r" / "settings.json").read_text())["data"]
    assert known["stores"]["measured_on"] == "rows of the stores"


def test_the_share_of_waiting_is_what_a_slow_store_costs(small_gpt2, small_text, tmp_path, monkeypatch):
    """Every request to the store takes 100 ms: `batch` is timed from outside while the run trains."""
    inside = []

    class Timed(StoreStream):
        def batch(self, step):
            began = time.perf_counter()
            try:
                return super().batch(step)
            finally:
                inside.append(time.perf_counter() - began)

    monkeypatch.setattr("sparse_coding.stored.StoreStream", Timed)
    with serving(monkeypatch) as fake:
        harvest(flags(small_gpt2, small_text, "s3://bucket/s", "--sites", HIDDEN))
        more = ("--buffer-rows", "512", "--ratios", "0.5", "--l1", "1", "--sites", HIDDEN, "--latents", "0")
        words = run_flags("s3://bucket/s", tmp_path / "run", *more)
        words[words.index("--tokens") + 1] = "4k"
        monkeypatch.setattr("sparse_coding.pipeline.describe", lambda *_: inside.clear())  # from training on
        fake.delay = 0.1
        run(settings(*words))
    known = json.loads((tmp_path / "run" / "settings.json").read_text())["training"]
    assert fake.delay <= known["seconds_waiting"] <= sum(inside)
    assert known["share_waiting"] * known["seconds"] == pytest.approx(known["seconds_waiting"], rel=0.05)
    assert f"{known['share_waiting']:.1%}" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sites", "blocks.1.mlp.hook_pots"], "did you mean 'blocks.1.mlp.hook_post'"),
        (["--sites", "blocks.2.mlp.hook_post"], "is not in the store"),
        (["--sites", HIDDEN, "--target-sites", "blocks.2.hook_resid_post"], "is not in the store"),
        (["--loss", "ce"], "--loss ce runs the model on whole contexts"),
        (["--loss", "kl"], "--loss kl"),
        (["--also-model", "gpt2", "--crosscoder"], "--also-model"),
        (["--layer", "1"], "--layer with --activations: name the store's sites with --sites"),
        (["--target-location", "mlp_out"], "--target-sites"),
        (["--activation-weights", "1", "2"], "one positive number for each of 1 stores"),
        (["--activation-weights", "-1"], "one positive number"),
        (["--context", "16"], "--context with --activations"),
        (["--batch-size", "100000"], "less than one batch"),
        (["--sites", HIDDEN, "--crosscoder"], "--crosscoder needs several sites"),
        (["--text", "/nowhere/text.txt"], "/nowhere/text.txt"),
        (["--layr", "1"], "--layr"),
    ],
)
def test_a_mistake_of_a_run_from_a_store_is_one_clear_line(more, message, harvested, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop, reported():
        run(settings(*run_flags(harvested, tmp_path / "r", *more)))
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("tokenizing")]
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not (tmp_path / "r").exists()


def test_stores_of_other_models_or_widths_and_none_at_all(harvested, small_gpt2, small_text, tmp_path):
    import transformers

    other = shutil.copytree(small_gpt2, tmp_path / "wide")
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=300, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(other)
    harvest(flags(other, small_text, tmp_path / "s", "--sites", HIDDEN))
    words = run_flags(harvested, tmp_path / "r", "--sites", HIDDEN)
    words.insert(2, str(tmp_path / "s"))
    with pytest.raises(UserError, match="are of different models"):
        run(settings(*words))
    with pytest.raises(UserError, match="is no store"):
        run(settings(*run_flags(tmp_path / "nowhere", tmp_path / "r")))
    with pytest.raises(UserError, match="twice"):
        settings(*run_flags(harvested, tmp_path / "r")[:2], str(harvested))
    with pytest.raises(UserError, match="--skip-damaged is for training from stores"):
        settings("--skip-damaged")


# ---- on S3


def test_harvest_and_train_on_s3(small_gpt2, small_text, harvested, trained, tmp_path, monkeypatch):
    with serving(monkeypatch) as fake:
        harvest(flags(small_gpt2, small_text, "s3://bucket/a/run", "--codec", "fp32", "--keep-tokens"))
        stored = {name.removeprefix("bucket/a/run/"): data for name, data in fake.objects.items()}
        local = files(harvested)
        assert stored.keys() == local.keys()
        assert all(stored[name] == local[name] for name in local if name != "manifest.json")
        run(settings(*run_flags("s3://bucket/a/run", tmp_path / "r", "--sites", HIDDEN)))
    for line, expected in zip(
        read_lines(tmp_path / "r" / "results.jsonl"), read_lines(trained / "results.jsonl"), strict=True
    ):
        assert line == expected
