"""What a run keeps on disk so that it goes on to the same bits: weights, AdamW's moments, its place, its log.

And whose the folder is: one run's, of one process at a time.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparse_coding.errors import UserError
from sparse_coding.files import make_folder, write_tensors, write_text
from sparse_coding.language_models.card import FACTS
from sparse_coding.language_models.card import read as read_facts
from sparse_coding.language_models.config_file import TrainConfig
from sparse_coding.language_models.trainer import Trainer

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

LOG = "train_log.jsonl"  # in the folder of the run
STATE = "training_state"  # its folder for what an unfinished run needs
STATE_FILE = "state.safetensors"


@dataclass
class Progress:
    """Where a run stands; together with the weights and AdamW's moments it is the whole state."""

    iteration: int = 0  # updates made
    seconds: float = 0.0  # of training, over all starts
    best_loss: float = math.inf
    best_iteration: int = 0
    evaluated: int = -1  # the update of the last evaluation


def save_weights(path: Path, model: GPT2LMHeadModel) -> None:
    write_tensors(path, dict(model.named_parameters()))


def load_weights(path: Path, model: GPT2LMHeadModel) -> None:
    from safetensors.torch import load_file

    weights = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def save_state(path: Path, trainer: Trainer, progress: Progress, identity: Mapping[str, Any]) -> None:
    """One safetensors file: weights and moments by parameter name, everything else as JSON in its header.

    One file, so that the tensors and the JSON can never be of different updates.
    """
    tensors = {}
    for name, parameter in trainer.model.named_parameters():
        tensors[f"weight/{name}"] = parameter
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value
    facts = {"progress": dataclasses.asdict(progress), "identity": identity, "scaler": trainer.scaler.state_dict()}
    write_tensors(path, tensors, {key: json.dumps(value) for key, value in facts.items()})


def header_of(path: Path) -> dict[str, Any]:
    """What a state says beside its tensors: progress, identity, scaler. Raises `UserError` for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: json.loads(value) for key, value in file.metadata().items()}
    except (SafetensorError, ValueError, AttributeError):
        raise UserError(
            f"{path} is damaged: delete {path.parent.parent} to start over, or name another --out"
        ) from None


def load_state(path: Path, trainer: Trainer, identity: Mapping[str, Any]) -> Progress:
    """Put a saved state into `trainer`; raises `UserError` if it belongs to other settings or another text."""
    from safetensors import safe_open

    header, saved = header_of(path), {}
    refuse_other_run(path.parent.parent, header["identity"], identity)
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            kind, _, name = key.partition("/")
            saved.setdefault(name, {})[kind] = file.get_tensor(key)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            parameter.copy_(saved[name].pop("weight"))
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    order = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    moments = {i: saved[names[parameter]] for i, parameter in enumerate(order) if saved[names[parameter]]}
    trainer.optimizer.load_state_dict({**trainer.optimizer.state_dict(), "state": moments})
    if trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(header["scaler"])
    return Progress(**header["progress"])


def refuse_other_run(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """`UserError` naming what differs when `folder` holds a run with other settings or another text."""
    differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    changed = [f"{key} was {there.get(key)!r}, now {here.get(key)!r}" for key in differing]
    if changed:
        raise UserError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}): "
            "start it with those, choose another --out, or delete the folder"
        )


def begun_from(config: TrainConfig, out: Path) -> str:
    """`init_from`, and for `resume` that of the run in `out`; raises `UserError` where there is none."""
    if config.init_from != "resume":
        return config.init_from
    if (out / FACTS).exists():
        return read_facts(out).config["init_from"]
    if (out / STATE / STATE_FILE).exists():
        return header_of(out / STATE / STATE_FILE)["identity"]["init_from"]
    raise UserError(f"init_from = 'resume', but {out} holds no run to go on with: leave init_from out")


@contextmanager
def own_folder(out: Path) -> Iterator[None]:
    """Inside, `out` is there and no other run trains into it; raises `UserError` for a foreign folder and for two."""
    refuse_foreign_folder(out)
    make_folder(out, "--out")
    if (out / FACTS).exists():  # trained already: nothing will be written
        yield
        return
    make_folder(out / STATE, "--out")
    with (out / STATE / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{out} is being trained by another process: wait for it, or name another --out") from None
        yield


def refuse_foreign_folder(out: Path) -> None:
    """`UserError` if `out` holds files of something else, which the model's files could overwrite."""
    if out.is_file():
        raise UserError(f"--out {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in (STATE, FACTS)):
        raise UserError(f"--out {out} holds files that are no training run; name a new folder")


def keep_log_until(path: Path, progress: Progress) -> None:
    """Drop the lines past `progress`: a killed run wrote them, the resumed run will write them again."""

    def stays(line: str) -> bool:
        known = json.loads(line)
        last = progress.evaluated if "val_loss" in known else progress.iteration
        return known["iteration"] <= last

    lines = path.read_text().splitlines() if path.exists() else []
    write_text(path, "".join(f"{line}\n" for line in lines if line.endswith("}") and stays(line)))
