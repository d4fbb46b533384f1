"""Task files for SkyPilot: what they say, and that SkyPilot's own schema accepts them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
import yaml

from sparse_coding.errors import UserError
from vast_utils.skypilot import SkyTask, accelerator, run_line, task, to_yaml

PLAIN = SkyTask("toy", ("run.py", "--model", "gpt2"))
FULL = SkyTask(
    "toy-2",
    ("run.py", "--text", "a file.txt"),
    gpu="RTX 4090",
    num_gpus=2,
    disk=80,
    cloud="aws",
    region="us-east-1",
    spot=True,
    max_hours=1.5,
    bucket="s3://bucket/runs/",
    env={"OMP_NUM_THREADS": "4"},
    secrets=("WANDB_API_KEY", "HF_TOKEN"),
)

SKY_CHECK = """
import json, sys
try:
    from sky import Task
    from sky.utils import common_utils, schemas
except ImportError:
    print("no sky")
    sys.exit()
for config in json.load(sys.stdin):
    common_utils.validate_schema(config, schemas.get_task_schema())
    common_utils.validate_schema(config["resources"], schemas.get_resources_schema())
    config["resources"].pop("accelerators", None)  # the names of GPUs stand in a catalogue that has to be downloaded
    given = [(name, "x") for name in config.get("secrets", {})]
    print(Task.from_yaml_config(config, secrets_overrides=given).run)
"""


def sky_says(tmp_path, configs) -> subprocess.CompletedProcess[str]:
    python = os.environ.get("SKYPILOT_PYTHON", sys.executable)
    done = subprocess.run(
        [python, "-c", SKY_CHECK],
        input=json.dumps(configs),
        text=True,
        capture_output=True,
        env={**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        timeout=120,
    )
    if done.stdout.strip() == "no sky":
        pytest.skip("skypilot is not installed: set SKYPILOT_PYTHON to a Python that has it")
    return done


def test_skypilot_accepts_the_tasks(tmp_path):
    configs = [yaml.safe_load(to_yaml(job)) for job in (PLAIN, FULL)]
    done = sky_says(tmp_path, configs)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [run_line(PLAIN), run_line(FULL)]


def test_skypilot_refuses_what_its_schema_does_not_know(tmp_path):
    """So the check above does check."""
    done = sky_says(tmp_path, [{**task(PLAIN), "resource": {}}])
    assert done.returncode != 0
    assert "resource" in done.stderr


def test_what_the_task_says():
    read = yaml.safe_load(to_yaml(FULL))
    assert read["resources"] == {
        "disk_size": 80,
        "use_spot": True,
        "infra": "aws/us-east-1",
        "accelerators": "RTX4090:2",
        "autostop": {"idle_minutes": 10, "down": True},
    }
    assert read["envs"] == {"OMP_NUM_THREADS": "4"}
    assert read["secrets"] == {"WANDB_API_KEY": None, "HF_TOKEN": None}
    words = shlex.split(read["run"])
    assert words[:4] == ["timeout", "--signal=TERM", "--kill-after=300", "5400"]
    assert words[4:] == ["python", "run.py", "--text", "a file.txt", "--sync", "s3://bucket/runs/toy-2"]
    assert "infra" not in task(PLAIN)["resources"]
    assert "accelerators" not in task(PLAIN)["resources"]


def test_secrets_stand_in_it_by_name_only(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "the-wandb-key")
    assert "the-wandb-key" not in to_yaml(FULL)
    assert "--secret WANDB_API_KEY --secret HF_TOKEN" in to_yaml(FULL)


def test_a_bucket_given_in_the_command_stays():
    job = SkyTask("toy", ("run.py", "--sync", "s3://other/place"), bucket="s3://bucket")
    assert run_line(job) == "python run.py --sync s3://other/place"


@pytest.mark.parametrize(
    ("gpu", "name"),
    [("RTX 4090", "RTX4090"), ("RTX_4090", "RTX4090"), ("H100 SXM", "H100"), ("A100 SXM4", "A100"), ("A100-80GB",) * 2],
)
def test_names_of_gpus(gpu, name):
    assert accelerator(gpu) == name


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (SkyTask("Toy!", ("run.py",)), "named 'Toy!'"),
        (SkyTask("toy", ()), "no command"),
        (SkyTask("toy", ("run.py",), region="us-east-1"), "belongs to no cloud"),
        (SkyTask("toy", ("run.py",), bucket="gs://b"), "must start with s3://"),
        (SkyTask("toy", ("replicate_toy_models.py",), bucket="s3://b"), "only run.py"),
    ],
)
def test_what_cannot_be_said_is_refused(job, words):
    with pytest.raises(UserError, match=words):
        task(job)
