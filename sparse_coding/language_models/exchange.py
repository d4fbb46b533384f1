"""Models to nanoGPT and back: what `export-nanogpt` and `import-nanogpt` do."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_coding.activations.encoding import encoder_of
from sparse_coding.activations.models import LanguageModel, load_model, tokens_given
from sparse_coding.activations.tokenizers import DATA_SET, holds_tokenizer, load_tokenizer, save_tokenizer
from sparse_coding.errors import UserError
from sparse_coding.files import make_folder, sync_files
from sparse_coding.formats.nanogpt import read_checkpoint, write_checkpoint
from sparse_coding.formats.nanogpt_data import write_meta
from sparse_coding.formats.nanogpt_file import Facts, Gelu, checkpoint_file
from sparse_coding.formats.nanogpt_meta import META, read_meta
from sparse_coding.language_models.card import FACTS, save_model
from sparse_coding.language_models.tokenize_text import is_gpt2, texts_of_ids

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase


def export_nanogpt(model: str, checkpoint: Path) -> Facts:
    """Write a model (bundled, a folder, on the hub) as a checkpoint that nanoGPT samples from and goes on training.

    What is known of its training, from the checkpoint it was imported from or the training.json in its folder, is
    written too. Beside it go the model's tokenizer, if it has one, and the meta.pkl by which nanoGPT samples text.
    Raises `UserError` for a model nanoGPT has no words for, for a file that exists already, and for a folder with
    another tokenizer.
    """
    if checkpoint_file(checkpoint) is None:
        raise UserError(f"a checkpoint is a file such as out/ckpt.pt: {str(checkpoint)!r} is none")
    _refuse_existing(checkpoint)
    loaded = load_model(model, device="cpu", dtype="float32")
    training, words = _training(loaded), _own_tokenizer(loaded)
    texts = None if words is None or is_gpt2(words) else _padded(texts_of_ids(words), loaded.vocab_size)
    if texts is not None:
        training["config"]["dataset"] = _data_set(training["config"], loaded)
    _refuse_other_tokenizer(checkpoint.parent, words, texts)
    facts = write_checkpoint(checkpoint, loaded.hf, **training)  # type: ignore[arg-type]
    if words is not None and not holds_tokenizer(checkpoint.parent):
        save_tokenizer(words, checkpoint.parent)
    if texts is not None and not (checkpoint.parent / META).is_file():
        write_meta(checkpoint.parent, *texts)
    print(f"{checkpoint}: {_words(facts)}")
    if facts.gelu == "tanh":
        print(
            "note: the model has the tanh form of GELU; nanoGPT computes the exact one, and its logits differ by up to"
        )
        print("about 0.001. import-nanogpt and run.py --model read the tanh form back from the file")
    folder = checkpoint.parent.resolve()
    out_dir, meta = shlex.quote(str(folder)), shlex.quote(str(folder / META))
    if texts is not None:
        print("nanoGPT takes tokens for GPT-2's until it has this model's; in its folder, do once")
        data = shlex.quote(f"data/{facts.config['dataset']}")
        print(f"    mkdir -p {data} && cp {meta} {data}/")
    print(f"nanoGPT loads it with  python sample.py --out_dir={out_dir}  and goes on training with")
    flags = [f"--out_dir={folder}", f"--block_size={facts.model_args['block_size']}"]
    if "dataset" in facts.config:
        flags.append(f"--dataset={facts.config['dataset']}")
    print(f"    python train.py --init_from=resume {shlex.join(flags)}")
    print("(AdamW's moments start at zero; prepare-text makes the data set: its train.bin and val.bin)")
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
    make_folder(folder.parent, str(folder))
    writing = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _save(read.model, words, writing)
        os.replace(writing, folder)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    print(f"{folder}: {_words(read)}, {gelu or read.gelu} GELU")
    named = "" if words is not None else " --tokenizer NAME"
    print(f"it opens with  python run.py --model {folder}{named} --layer 0 --text TEXT")
    print(f"    and with  AutoModelForCausalLM.from_pretrained({str(folder)!r})")


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already: nothing is overwritten; name another, or remove it first")


def _words(facts: Facts) -> str:
    return f"update {facts.iter_num:,}, {', '.join(f'{name}={value}' for name, value in facts.model_args.items())}"


def _training(model: LanguageModel) -> dict[str, Any]:
    """What the training.json of train-lm, or else the model's config, says that a checkpoint has a place for."""
    folder = Path(model.path)
    if not (folder / FACTS).is_file():
        return {"config": dict((getattr(model.config, "nanogpt", None) or {}).get("config", {}))}
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


def _own_tokenizer(model: LanguageModel) -> PreTrainedTokenizerBase | None:
    try:
        words = load_tokenizer(model.path)
        tokens_given(model, words)
        return words
    except UserError as error:
        print(f"note: no tokenizer is written ({error})")
        return None


def _padded(texts: tuple[list[str], dict[str, int]], size: int) -> tuple[list[str], dict[str, int]]:
    """With no text for the ids that only the model has: it may sample them all the same."""
    itos, stoi = texts
    return itos + [""] * (size - len(itos)), stoi


def _data_set(config: dict[str, Any], model: LanguageModel) -> str:
    """The folder in data/ where nanoGPT is to find meta.pkl: the one that is named already, if it can be one."""
    names = (config.get("dataset"), Path(model.path).resolve().name)
    return next((name for name in names if isinstance(name, str) and DATA_SET.fullmatch(name)), "exported")


def _refuse_other_tokenizer(
    folder: Path, words: PreTrainedTokenizerBase | None, texts: tuple[list[str], dict[str, int]] | None
) -> None:
    """What lies beside a checkpoint is taken for its own, so it must be the model's, and is not overwritten."""
    if words is None:
        return
    other = None
    if holds_tokenizer(folder) and encoder_of(load_tokenizer(folder)).sha256 != encoder_of(words).sha256:
        other = "tokenizer"
    elif texts is not None and (folder / META).is_file() and read_meta(folder / META).tokens != texts[0]:
        other = META
    if other is not None:
        raise UserError(f"folder {str(folder)!r} holds another {other} than the model's: name another folder")


def _tokenizer(checkpoint: Path, name: str | None) -> PreTrainedTokenizerBase | None:
    if name is not None:
        return load_tokenizer(name)
    try:
        return load_tokenizer(checkpoint)
    except UserError as error:
        print(f"note: the folder gets no tokenizer ({error})")
        return None


def _save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    save_model(model, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    sync_files(folder)
    folder.chmod(0o755)
