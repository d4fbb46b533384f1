from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_coding.__main__ import main
from sparse_coding.errors import UserError
from sparse_coding.stores import copying
from sparse_coding.stores import own as own_module
from sparse_coding.stores.manifest import LEASE
from sparse_coding.stores.objects import FolderObjects
from sparse_coding.stores.own import HALF_WRITTEN, own
from sparse_coding.stores.store import Damaged, Source, Store, StoreWriter
from tests.stores.fake_s3 import serving

SOURCE = Source("tiny", "main", {"sha256": "abc"}, "bpe", 8)
WIDTHS = {"blocks.0": 6, "blocks.1.mlp": 4}
ROOT = Path(__file__).parents[2]


def make(url, seed=0, n=40, **options):
    generator = torch.Generator().manual_seed(seed)
    rows = {name: torch.randn(n, width, generator=generator) + seed for name, width in WIDTHS.items()}
    options = {"codec": "bf16", "shard_rows": 16, "source": SOURCE, "tokens": {"token": "I32"}, **options}
    with StoreWriter(url, WIDTHS, **options) as writer:
        writer.append(rows, {"token": np.arange(n) + 1000 * seed} if options["tokens"] else None)
        writer.finish()
    return rows


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def all_rows(store, site):
    return torch.cat([store.decode(site, store.read_shard(site, i)) for i in range(len(store.shard_rows))])


def test_info_says_what_a_store_holds(tmp_path, capsys):
    rows = make(tmp_path / "s", modules={"blocks.1.mlp": "h.1.mlp.act"}, run="night")
    main(["store", "info", str(tmp_path / "s")])
    shown = capsys.readouterr().out
    for words in ("40 in 3 shards", "bf16", "tiny (main)", "8 tokens", "token (i32)", "night", "h.1.mlp.act"):
        assert words in shown
    rms = float(rows["blocks.0"].square().mean().sqrt())
    assert f"{rms:.4g}" in shown
    assert "not finished" not in shown


def test_verify_passes_a_whole_store_and_notes_other_files(tmp_path, capsys):
    make(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    main(["store", "verify", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "9 files, 40 rows, all as they were written" in shown
    assert "no part of it: notes.txt" in shown


def test_verify_names_every_damaged_file_and_exits_2(tmp_path):
    make(tmp_path)
    for name in ("site-0/00001.safetensors", "tokens/00002.safetensors"):
        data = bytearray((tmp_path / name).read_bytes())
        data[-1] ^= 64
        (tmp_path / name).write_bytes(data)
    (tmp_path / "site-1/00000.safetensors").unlink()
    command = [sys.executable, "-m", "sparse_coding", "store", "verify", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    for name in ("site-0/00001", "tokens/00002", "site-1/00000"):
        assert name in done.stdout
    assert len(done.stdout.splitlines()) == 3
    assert "3 of 9 files" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_copy_to_s3_and_back_is_the_same_files(tmp_path, monkeypatch):
    make(tmp_path / "s")
    with serving(monkeypatch) as fake:
        fake.fault = lambda method, key, n: 503 if n % 6 == 3 else None
        main(["store", "copy", str(tmp_path / "s"), "s3://bucket/a"])
        main(["store", "verify", "s3://bucket/a"])
        main(["store", "copy", "s3://bucket/a", str(tmp_path / "back")])
    assert files(tmp_path / "back") == files(tmp_path / "s")


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_a_stopped_copy_goes_on(tmp_path, monkeypatch, codec):
    make(tmp_path / "s", n=100)
    source = Store.open(tmp_path / "s")
    copying.copied(source, str(tmp_path / "whole"), codec)
    reads = []
    real = Store.read_file

    def stopping(store, site, shard):
        reads.append((site, shard))
        if shard == 4 and stop:
            raise KeyboardInterrupt
        return real(store, site, shard)

    monkeypatch.setattr(Store, "read_file", stopping)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        copying.copied(source, str(tmp_path / "t"), codec)
    stop, first = False, len(reads)
    make(tmp_path / "other", 1, n=100)
    with pytest.raises(UserError, match=r"the beginning of another store|other settings"):
        copying.copied(Store.open(tmp_path / "other"), str(tmp_path / "t"))
    copying.copied(source, str(tmp_path / "t"), codec)
    assert len({shard for _, shard in reads[first:]}) < len(source.shard_rows)
    assert files(tmp_path / "t") == files(tmp_path / "whole")


def test_a_copy_in_another_codec(tmp_path):
    rows = make(tmp_path / "s", codec="fp32")
    for codec, tolerance in (("bf16", 0.02), ("int8", 0.1)):
        main(["store", "copy", str(tmp_path / "s"), str(tmp_path / codec), "--codec", codec])
        store = Store.open(tmp_path / codec)
        assert store.codec == codec
        assert (all_rows(store, "blocks.0") - rows["blocks.0"]).abs().max() < tolerance
        assert store.read_tokens(1, 0, 16)["token"].tolist() == list(range(16, 32))
    main(["store", "copy", str(tmp_path / "int8"), str(tmp_path / "again"), "--codec", "fp32"])
    assert torch.equal(
        all_rows(Store.open(tmp_path / "again"), "blocks.0"), all_rows(Store.open(tmp_path / "int8"), "blocks.0")
    )


def test_a_damaged_source_is_not_copied(tmp_path):
    make(tmp_path / "s")
    path = tmp_path / "s/site-0/00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    for options in ([], ["--codec", "fp32"]):
        with pytest.raises(Damaged, match=r"site-0/00002.safetensors"):
            main(["store", "copy", str(tmp_path / "s"), str(tmp_path / f"t{len(options)}"), *options])
    with pytest.raises(UserError, match="not finished"):
        Store.open(tmp_path / "t0")


def test_a_merged_store_has_the_rows_of_all(tmp_path):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", 1, source=replace(SOURCE, text={"sha256": "other"}))
    main(["store", "merge", str(tmp_path / "a"), str(tmp_path / "b"), "--to", str(tmp_path / "m")])
    store = Store.open(tmp_path / "m")
    assert store.shard_rows == [16, 16, 8, 16, 16, 8]
    assert store.manifest.source.text == {"merged": [{"sha256": "abc"}, {"sha256": "other"}]}
    main(["store", "verify", str(tmp_path / "m")])
    for name in WIDTHS:
        both = torch.cat([a[name], b[name]])
        assert torch.equal(all_rows(store, name), both.bfloat16().float())
        found = store.manifest.statistics[name]
        torch.testing.assert_close(torch.tensor(found.mean), both.mean(0))
        torch.testing.assert_close(torch.tensor(found.variance), both.var(0, correction=0))
    assert store.read_tokens(3, 0, 2)["token"].tolist() == [1000, 1001]


def leftovers(folder):
    return [name for name in files(folder) if HALF_WRITTEN.fullmatch(name)]


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_one_copy_at_a_time_and_what_a_killed_one_left_is_removed(tmp_path, codec):
    make(tmp_path / "s")
    source, target = Store.open(tmp_path / "s"), tmp_path / "t"
    with own(FolderObjects(target)), pytest.raises(UserError, match=r"t is being written by process \d+ on "):
        copying.copied(source, str(target), codec)
    assert not target.exists()
    (target / "site-0").mkdir(parents=True)
    for name in ("manifest.json.abcd123_", "site-0/00000.safetensors.abcdefgh"):
        (target / name).touch()
    copying.copied(source, str(target), codec)
    assert not leftovers(target)
    assert "writer.json" not in files(target)
    with own(FolderObjects(tmp_path / "m")), pytest.raises(UserError, match="m is being written by"):
        copying.merged([source, source], str(tmp_path / "m"))


def test_a_folder_is_locked_until_its_writer_ends_or_dies(tmp_path):
    script = (
        "import sys, time; from sparse_coding.stores.objects import FolderObjects as F; from pathlib import Path\n"
        "from sparse_coding.stores.own import own\n"
        "with own(F(Path(sys.argv[1]))): print('mine', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "t")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match=f"by process {other.pid} on"), own(FolderObjects(tmp_path / "t")):
            pass
        other.kill()
    make(tmp_path / "s")
    copying.copied(Store.open(tmp_path / "s"), str(tmp_path / "t"))
    assert files(tmp_path / "t") == files(tmp_path / "s")


def test_a_lock_that_its_owner_took_away_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    real, taken = own_module.fcntl.flock, []

    def late(file, how):
        if not taken:
            (tmp_path / LEASE).unlink()  # between our opening it and our lock on it
        taken.append(1)
        real(file, how)

    monkeypatch.setattr("sparse_coding.stores.own.fcntl.flock", late)
    with own(FolderObjects(tmp_path)):
        assert len(taken) == 2
        with pytest.raises(UserError, match="is being written by"), own(FolderObjects(tmp_path)):
            pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"codec": "fp16"}, "the same codec"),
        ({"tokens": {}}, "the same tokens"),
        ({"source": replace(SOURCE, model="other")}, "the same model"),
        ({"source": replace(SOURCE, exclude_special=True)}, "the same exclude_special"),
    ],
)
def test_stores_that_do_not_fit_are_not_merged(tmp_path, options, words):
    make(tmp_path / "a")
    make(tmp_path / "b", 1, **options)
    with pytest.raises(UserError, match=words):
        main(["store", "merge", str(tmp_path / "a"), str(tmp_path / "b"), "--to", str(tmp_path / "m")])
    assert not (tmp_path / "m").exists()


def test_int8_of_different_scales_is_not_merged(tmp_path):
    for seed in (0, 1):
        make(tmp_path / str(seed), seed, codec="int8")
    with pytest.raises(UserError, match="copy each with `store copy --codec bf16`"):
        main(["store", "merge", str(tmp_path / "0"), str(tmp_path / "1"), "--to", str(tmp_path / "m")])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inof"], "did you mean 'info'"),
        (["frob"], "have info, verify, copy, merge$"),
        (["info", "/nowhere/at/all"], "is no store"),
        (["merge", "a", "--to", "b"], "two or more"),
        (["copy", "a"], "Missing .* A new folder"),
        (["copy", "a", "b", "--codec", "int4"], "int4"),
    ],
)
def test_mistakes_are_one_line(arguments, words):
    with pytest.raises(UserError, match=words) as caught:
        main(["store", *arguments])
    assert "\n" not in str(caught.value)


def test_help_lists_the_verbs(capsys):
    main(["store"])
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("info", "verify", "copy", "merge"))
