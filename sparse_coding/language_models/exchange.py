"""Models to nanoGPT and back: what `export-nanogpt` and `import-nanogpt` do."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_coding.activations.models import LanguageModel, load_model, tokens_given
from sparse_coding.activations.tokenizers import load_tokenizer
from sparse_coding.errors import UserError
from sparse_coding.formats.nanogpt import read_checkpoint, write_checkpoint
from sparse_coding.formats.nanogpt_file import Facts, Gelu, checkpoint_file
from sparse_coding.language_models.card import FACTS

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase


def export_nanogpt(model: str, checkpoint: Path) -> Facts:
    """Write a model (bundled, a folder, on the hub) as a checkpoint that nanoGPT samples from and goes on training.

    What is known of its training, from the checkpoint it was imported from or the training.json in its folder, is
    written too. Raises `UserError` for a model nanoGPT has no words for and for a file that exists already.
    """
    if checkpoint_file(checkpoint) is None:
        raise UserError(f"a checkpoint is a file such as out/ckpt.pt: {str(checkpoint)!r} is none")
    _refuse_existing(checkpoint)
    loaded = load_model(model, device="cpu", dtype="float32")
    facts = write_checkpoint(checkpoint, loaded.hf, **_training(Path(loaded.path)))  # type: ignore[arg-type]
    print(f"{checkpoint}: {_words(facts)}")
    if facts.gelu == "tanh":
        print(
            "note: the model has the tanh form of GELU; nanoGPT computes the exact one, and its logits differ by up to"
        )
        print("about 0.001. import-nanogpt and run.py --model read the tanh form back from the file")
    print(f"nanoGPT loads it with  python sample.py --out_dir={checkpoint.parent}  and goes on training with")
    print(f"    python train.py --init_from=resume --out_dir={checkpoint.parent}    (AdamW's moments start at zero)")
    if checkpoint.name != "ckpt.pt":
        print(f"once it is named ckpt.pt: nanoGPT looks for no other name than {checkpoint.with_name('ckpt.pt')}")
    return facts


def import_nanogpt(checkpoint: Path, folder: Path, gelu: Gelu | None = None, tokenizer: str | None = None) -> None:
    """Write a checkpoint of nanoGPT as a model folder in Hugging Face layout, with its tokenizer where one is found.

    The folder appears whole or not at all. tokenizer: a name or folder; None looks where nanoGPT has it, and goes on
    without. Raises `UserError` for what is no checkpoint, a tokenizer with more tokens, and a folder that exists.
    """
    _refuse_existing(folder)
    read = read_checkpoint(checkpoint, gelu)
    words = _tokenizer(checkpoint, tokenizer)
    if words is not None:
        tokens_given(LanguageModel.of(read.model, str(checkpoint)), words)
        configs: list[Any] = [read.model.config, read.model.generation_config]
        for config in configs:
            config.bos_token_id, config.eos_token_id = words.bos_token_id, words.eos_token_id
    folder.parent.mkdir(parents=True, exist_ok=True)
    writing = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _save(read.model, words, writing)
        os.replace(writing, folder)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    print(f"{folder}: {_words(read)}, {gelu or read.gelu} GELU")
    named = "" if words is not None else " --tokenizer NAME"
    print(f"it opens with  python run.py --model {folder}{named}")
    print(f"    and with  AutoModelForCausalLM.from_pretrained({str(folder)!r})")


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already: nothing is overwritten; name another, or remove it first")


def _words(facts: Facts) -> str:
    return f"update {facts.iter_num:,}, {', '.join(f'{name}={value}' for name, value in facts.model_args.items())}"


def _training(folder: Path) -> dict[str, Any]:
    """What the training.json of train-lm says that a checkpoint has a place for."""
    if not (folder / FACTS).is_file():
        return {}
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        config = dict(facts["config"])
        config["dataset"] = config.get("dataset") or Path(facts["text"]["source"]).name
        known = {"iter_num": int(facts["kept_iteration"]), "best_val_loss": float(facts["validation_loss"])}
        return {**known, "bias": bool(config["bias"]), "config": config}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{folder / FACTS} is not what train-lm writes: remove it, and the model is written all the same"
        ) from None


def _tokenizer(checkpoint: Path, name: str | None) -> PreTrainedTokenizerBase | None:
    if name is not None:
        return load_tokenizer(name)
    try:
        return load_tokenizer(checkpoint)
    except UserError as error:
        print(f"note: the folder gets no tokenizer ({error})")
        return None


def _save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar for one file
    model.save_pretrained(folder)
    if bars:
        logging.enable_progress_bar()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        with path.open("rb+") as handle:
            os.fsync(handle.fileno())
        path.chmod(0o644)  # safetensors writes for the owner alone
    folder.chmod(0o755)
