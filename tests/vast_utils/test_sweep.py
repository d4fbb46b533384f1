"""Sweeps: what their file means, and two commands on two machines at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from sparse_coding.errors import UserError
from tests.vast_utils.rented import ROOT, expected, until
from vast_utils.merge import merge
from vast_utils.sweep_file import MOST, SweepFile, read, tasks
from vast_utils.tasks import Task


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(text)
    return path


def test_a_grid_is_every_combination_and_each_has_a_folder_of_its_own(tmp_path):
    sweep = read(
        write(tmp_path, "command: run.py --model gpt2\ngrid: {layer: [2, 5], l1: [[0.3, 1], 3], text: [a b.txt]}\n")
    )
    made = tasks(sweep, "toy")
    assert [task.argv[1:-2] for task in made] == [
        ("--model", "gpt2", "--layer", layer, "--l1", *l1, "--text", "a b.txt")
        for layer in ("2", "5")
        for l1 in (("0.3", "1"), ("3",))
    ]
    assert len({task.name for task in made}) == 4
    for task in made:
        assert task.argv[-2:] == ("--out", f"outputs/{task.out}")
        assert task.out == f"toy/{task.name}"
    assert made[0].about == "--layer 2 --l1 0.3 1 --text a b.txt"
    assert made[0].name.startswith("layer-2-l1-0.3-1-text-a-b.txt-")


def test_runs_add_to_the_command_or_are_whole_ones(tmp_path):
    sweep = SweepFile("run.py --layer 1", ("--l1 1 3", "--fresh"), {"wandb": [True, False]})
    own = [task.argv[3:-2] for task in tasks(sweep, "toy")]
    assert own == [
        ("--l1", "1", "3", "--wandb"),
        ("--l1", "1", "3", "--no-wandb"),
        ("--fresh", "--wandb"),
        ("--fresh", "--no-wandb"),
    ]
    whole = tasks(SweepFile(runs=("run.py --layer 1", "python other.py 'a b'")), "toy")
    assert whole[1].argv == ("python", "other.py", "a b")
    assert whole[1].out == ""  # only of run.py is it known where its results go


def test_the_same_command_has_the_same_name_again():
    one, two = (tasks(SweepFile("run.py", grid={"l1": values}), "toy") for values in ([1, 3], [10, 3]))
    assert one[1] == two[1]
    assert one[0].name != two[0].name


def test_the_example_of_the_guide():
    guide = (ROOT / "docs" / "rented_gpus.md").read_text()
    block = guide[guide.index("    command: run.py") :].split("\n\n")[0]
    made = tasks(SweepFile(**yaml.safe_load(block)), "toy")
    assert [task.about for task in made] == [
        f"{run} --l1 0.3 1 3 --seeds {seed}" for run in ("--layer 2", "--layer 5 --location mlp_in") for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("comand: run.py", "unknown setting 'comand'.*did you mean 'command'"),
        ("command: run.py\ngrid: {l1: 3}", "l1 is 3: it must be a list"),
        ("command: run.py\ngrid: {--l1: [3]}", "'--l1' is no flag; write it without dashes"),
        ("command: run.py\ngrid: {l1: [{a: 1}]}", "l1 has the value"),
        ("grid: {}", "the sweep has no command"),
        ("command: run.py --out outputs/mine", "leave --out away"),
        ("runs: [run.py 'a]", "cannot be read as a command line"),
        ("runs: [run.py, run.py]", "the same command twice"),
        ("- run.py", "it must hold keys"),
        ("command: [", "is not YAML"),
        ("command: 3", "command is 3: it must be text"),
        (f"command: run.py\ngrid: {{seeds: {list(range(MOST + 1))}}}", "1,001 commands"),
    ],
)
def test_mistakes_in_the_file(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        tasks(read(write(tmp_path, text)), "toy")


def test_the_results_of_all_say_whose_they_are(tmp_path):
    here = [
        Task("one", ("run.py",), "toy/one", "--l1 1", "done", seconds=90),
        Task("two", ("python", "x.py"), "", "x | y", "done", runs=("x-run",)),
        Task("three", ("run.py",), "toy/three", "--l1 3", "failed", why="exit code 2: no such model"),
    ]
    for folder, records in (
        ("toy/one", [{"name": "a", "metrics": {"fvu": 0.5, "l0": 3.0}}, {"name": "b", "metrics": {"fvu": 0.25}}]),
        ("x-run", [{"fvu": None, "loss": 1}]),
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    (tmp_path / "toy" / "one" / "report.html").touch()
    folder = merge(tmp_path, "toy", here, 1.234)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [line["run"] for line in lines] == ["one", "one", "two"]
    assert lines[0]["metrics"] == {"fvu": 0.5, "l0": 3.0}
    report = (folder / "report.md").read_text()
    assert "2 of 3 commands done, at most $1.23" in report
    assert "| [--l1 1](one/report.html) | done | 1.5 | 2 | 0.25 to 0.5 | 3 |" in report
    assert "| x / y | done | 0.0 | 1 |  |  |" in report
    assert "| --l1 3 | failed: exit code 2: no such model |" in report
    (tmp_path / "x-run" / "results.jsonl").write_text('{"fvu": 1}\n{"fvu"')
    with pytest.raises(UserError, match=r"x-run.results\.jsonl, line 2: '{\"fvu\"' is no JSON object"):
        merge(tmp_path, "toy", here, 1.234)


LOG = ".sparse_coding/jobs/*/log"
SWEEP = "command: run.py 900 0.1\nruns: ['--seed 1', '--seed 2', '--break 2']\n"


def test_commands_on_two_machines_their_results_in_one_file_and_a_stop_in_between(rented):
    path = write(rented.folder, SWEEP)
    words = [str(path), *rented.launch_words("--machines", "2")]
    process = rented.start("sweep", *words)
    until(lambda: sum("step 1\n" in log.read_text() for one in rented.machines for log in one.home.glob(LOG)) == 2)
    rc, shown = rented.run("status")
    assert rc == 0, shown
    assert "run toy: a dispatcher is at work" in shown
    rc, shown = rented.run("stop", "toy")
    assert rc == 0, shown
    assert "asking the dispatcher of toy" in shown
    assert "run toy has no machine left; it cost at most $" in shown
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 130, out
    assert not rented.market.leases
    rented.hurry()
    rc, out = rented.run("sweep", *words, timeout=240)
    assert rc == 1, out  # one command is wrong
    assert not rented.market.leases
    assert len(rented.market.ended) in (3, 4)  # a machine takes the next command when it is done with one
    folder = rented.project / "outputs" / "toy"
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [line["run"][:6] for line in lines] == ["seed-1", "seed-2"]
    assert {line["sum"] for line in lines} == {expected(900)}
    assert "2 of 3 commands done" in (folder / "report.md").read_text()
    assert "failed: exit code 2" in out
    begun = (rented.folder / "state" / "toy").glob("seed-*.log")
    assert all("begins at 0" in log.read_text() and log.read_text().count("begins at") == 2 for log in begun)
