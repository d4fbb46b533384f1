from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from sparse_coding.errors import UserError
from vast_utils.push import folder_files, project_files, push_models, push_project
from vast_utils.ssh import TimedOut, Unreachable
from vast_utils.transfer import push_files


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = write(
        tmp_path / "project",
        {
            "run.py": "print('hello')",
            "package/keys.py": "KEY = 'value'  # a module about keys",
            "package/tokens.py": "",
            "notes here.md": "ä",
            ".gitignore": "outputs/\n*.bin\n.env\n",
            "outputs/run/results.jsonl": "{}",
            "weights.bin": "ignored",
            "new.txt": "untracked",
        },
    )
    (folder / "run.py").chmod(0o755)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", "run.py", "package"], cwd=folder, check=True)
    return folder


EXPECTED = {".gitignore", "new.txt", "notes here.md", "package/keys.py", "package/tokens.py", "run.py"}


def remote(host) -> Path:
    return host.home / "sparse_coding"


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {".pushed.json"}


def test_push_sends_what_git_would_keep(machine, host, project):
    moved = push_project(machine, project)
    assert set(moved.placed) == names(remote(host)) == EXPECTED
    assert (remote(host) / "run.py").read_text() == "print('hello')"
    assert os.access(remote(host) / "run.py", os.X_OK)
    assert not os.access(remote(host) / "new.txt", os.X_OK)


def test_only_what_differs_travels_again_and_results_stay(machine, host, project):
    push_project(machine, project)
    write(remote(host), {"outputs/run/results.jsonl": "theirs", "outputs/new.txt": "theirs", "own.txt": "theirs"})
    assert push_project(machine, project).placed == []
    (project / "new.txt").write_text("changed")
    (project / "package" / "tokens.py").unlink()
    moved = push_project(machine, project)
    assert moved.placed == ["new.txt"]
    assert moved.gone == ["package/tokens.py"]
    assert names(remote(host)) == EXPECTED - {"package/tokens.py"} | {
        "outputs/run/results.jsonl",
        "outputs/new.txt",
        "own.txt",
    }
    assert (remote(host) / "outputs" / "run" / "results.jsonl").read_text() == "theirs"


def test_a_manifest_that_the_machine_made_up_deletes_nothing_outside(machine, host, project):
    push_project(machine, project)
    (host.home / "precious").write_text("x")
    (remote(host) / ".pushed.json").write_text(json.dumps(["../precious", "/etc/passwd"]))
    assert push_project(machine, project).gone == []
    assert (host.home / "precious").exists()


SECRETS = {
    ".env": "A=1",
    "prod.env": "A=1",
    "id_rsa_work": "x",
    "kaggle.json": "{}",
    "conf/.env.local": "A=1",
    "id_ed25519": "x",
    "id_rsa.pub": "x",
    "server.pem": "x",
    "hf_token": "x",
    "wandb_key.txt": "x",
    "credentials.json": "{}",
    ".aws/config": "x",
    "notes.txt": "the key is " + "hf_" + "a1B2" * 9,
    "script.py": "KEY = '" + "AKIA" + "ABCDEFGH12345678" + "'",
    "cell.ipynb": "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
    "start.sh": "export WANDB_API_KEY" + "=" + "0123456789abcdef" * 2 + "01234567",
}
HARMLESS = {
    "monkey.py": "",
    "environment.yml": "",
    "keyboard.txt": "",
    "tokenizer.json": "",
    "special_tokens_map.json": "",
    "token_counts.json": "",
    "docs/keys.md": "how WANDB_API_KEY=... is passed",
    ".github/workflows/ci.yml": "env: {HF_TOKEN: ${{ secrets.HF_TOKEN }}}",
}


def test_no_secret_is_sent_and_each_is_named(machine, host, project):
    write(project, SECRETS | HARMLESS)
    chosen = project_files(project)
    assert set(chosen.left_out) == set(SECRETS) - {".env"}  # that one is ignored by git
    assert set(HARMLESS) <= set(chosen.names)
    push_project(machine, project)
    assert not set(SECRETS) & names(remote(host))


def test_a_file_with_the_value_of_a_key_that_is_set_here_stays(project):
    write(project, {"config.yaml": "value: my-very-own-key-0001"})
    assert "config.yaml" in project_files(project, {}).names
    for name in ("WANDB_API_KEY", "VAST_API_KEY"):
        left_out = project_files(project, {name: "my-very-own-key-0001"}).left_out
        assert left_out == {"config.yaml": f"it holds the value of {name}"}


def test_links_are_left_out(project, tmp_path):
    (tmp_path / "elsewhere").write_text("private")
    (project / "link.txt").symlink_to(tmp_path / "elsewhere")
    (project / "linked").symlink_to(tmp_path)
    assert {"link.txt", "linked"} <= set(project_files(project, {}).left_out)


def test_a_folder_without_git_says_so(tmp_path):
    with pytest.raises(UserError, match=r"not a git repository.*git init"):
        project_files(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        project_files(tmp_path / "nowhere")


def test_folders_may_be_given_by_a_link(machine, host, project, tmp_path):
    models = write(tmp_path / "large disk" / "gpt", {"config.json": "{}"})
    (tmp_path / "here").symlink_to(models)
    (tmp_path / "there").symlink_to(project)
    assert set(project_files(tmp_path / "there").names) == EXPECTED
    moved, place = push_models(machine, tmp_path / "here", project)
    assert (place, moved.placed) == ("models/gpt", ["config.json"])


def test_models_go_to_their_place_below_the_project_or_to_models(machine, host, project, tmp_path):
    inside = write(project / "models" / "mine", {"config.json": "{}", "model.safetensors": "x" * 5000, ".cache/x": "y"})
    outside = write(tmp_path / "gpt", {"config.json": "{}"})
    moved, place = push_models(machine, inside, project)
    assert (place, moved.placed) == ("models/mine", ["config.json", "model.safetensors"])
    assert push_models(machine, outside, project)[1] == "models/gpt"
    assert (remote(host) / "models" / "mine" / "model.safetensors").stat().st_size == 5000
    assert (remote(host) / "models" / "gpt" / "config.json").exists()
    with pytest.raises(UserError, match="no such folder"):
        folder_files(tmp_path / "nowhere")


def test_a_push_over_a_connection_that_breaks_is_continued(machine, host, tmp_path, monkeypatch):
    monkeypatch.setattr("vast_utils.transfer.PAUSE_SECONDS", 0.1)
    data = os.urandom(8_000_000)
    models = tmp_path / "models"
    models.mkdir()
    (models / "large.bin").write_bytes(data)
    chosen = folder_files(models, {})
    broken = []

    def progress(_: int) -> None:
        staged = list((remote(host) / "models" / "models" / ".incoming").glob("*"))
        if not broken and staged and staged[0].stat().st_size > 2_000_000:
            broken.append(staged[0].stat().st_size)
            host.drop_connections()

    moved = push_files(machine, models, "~/sparse_coding/models/models", chosen.names, progress=progress)
    assert (remote(host) / "models" / "models" / "large.bin").read_bytes() == data
    assert broken
    assert moved.placed == ["large.bin"]
    assert moved.sent_bytes < 2 * len(data) - broken[0]  # what had arrived was not sent again
    assert not (remote(host) / "models" / "models" / ".incoming").exists()


def test_a_machine_that_is_gone_is_given_up(machine, host, project, monkeypatch):
    monkeypatch.setattr("vast_utils.transfer.ATTEMPTS", 2)
    monkeypatch.setattr("vast_utils.transfer.PAUSE_SECONDS", 0.1)
    push_project(machine, project)
    host.pause()
    monkeypatch.setattr("vast_utils.transfer.ASK_SECONDS", 1.0)
    monkeypatch.setattr("vast_utils.transfer.STALLED_SECONDS", 1.0)
    (project / "new.txt").write_text("changed")
    with pytest.raises((Unreachable, TimedOut)):
        push_project(machine, project)
    host.resume()
