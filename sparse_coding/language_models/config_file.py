"""nanoGPT-style config files: bare assignments, read with `ast`, never executed.

A config file is a list of lines such as `n_layer = 6` with comments. Arithmetic is allowed (`5 * 8`), a key set above
(`lr_decay_iters = max_iters`), `import time`, and computed names such as `'run-' + str(time.time())`. Every key of
nanoGPT's train.py is a field of `TrainConfig` and does what it does there.
"""

from __future__ import annotations

import ast
import dataclasses
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from sparse_coding.errors import UserError, near

Value: TypeAlias = int | float | bool | str
DTYPES = ("auto", "bfloat16", "float32", "float16")
BACKENDS = ("auto", "nccl", "gloo")
POSITIVE = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "gradient_accumulation_steps", "max_iters")
POSITIVE += ("eval_interval", "eval_iters", "log_interval", "learning_rate")
INCIDENTAL = ("out_dir", "eval_only", "wandb_log", "wandb_project", "wandb_run_name", "backend")
"""Keys that do not change what is learnt: a run goes on where they differ."""


@dataclass(frozen=True)
class TrainConfig:
    """The honoured keys of nanoGPT's train.py; defaults are nanoGPT's too, unless a line says otherwise."""

    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads; must divide n_embd
    n_embd: int = 768  # width of the residual stream; the MLP is four times as wide
    block_size: int = 1024  # context length in tokens
    bias: bool = False  # False: every bias (LayerNorm's too) is zero and stays zero
    dropout: float = 0.0  # after the embeddings, on attention weights and after both output projections
    batch_size: int = 12  # windows per forward pass
    gradient_accumulation_steps: int = 40  # forward passes per update
    max_iters: int = 600_000  # updates (nanoGPT makes one more)
    learning_rate: float = 6e-4  # peak of the schedule
    min_lr: float = 6e-5  # end of the cosine
    warmup_iters: int = 2000  # updates of linear warmup
    lr_decay_iters: int = 0  # update at which the cosine ends; 0: max_iters (nanoGPT: 600000, its max_iters)
    decay_lr: bool = True  # False: constant learning_rate, no warmup
    weight_decay: float = 0.1  # AdamW's, on tensors of two or more dimensions
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # largest gradient norm; 0 switches clipping off
    eval_interval: int = 2000  # updates between two evaluations (and checkpoints)
    eval_iters: int = 200  # batches per evaluation, of the training text and of the held-out text
    log_interval: int = 1  # updates between two lines of the log
    always_save_checkpoint: bool = False  # False: keep the weights of the best evaluation (nanoGPT: True, the last)
    # scratch, resume (there must be a run to go on with), or a GPT-2 to start from, by its name, folder or nanoGPT
    # checkpoint: its shape then wins over the keys above
    init_from: str = "scratch"
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto takes the fastest that is there (nanoGPT: cuda)
    # of the matrix products: bfloat16, float32, float16 (with loss scaling); auto takes bfloat16 where it is the faster
    dtype: str = "auto"
    compile: bool = False  # torch.compile the model: a minute of waiting, then faster steps on a GPU (nanoGPT: True)
    seed: int = 1337  # of the weights, the batches and the dropout (a constant in nanoGPT)
    out_dir: str = ""  # folder of the model; --out wins
    dataset: str = ""  # the folder data/<dataset> with train.bin and val.bin; --text wins
    eval_only: bool = False  # evaluate, and stop
    wandb_log: bool = False  # mirror the log to Weights & Biases
    wandb_project: str = "owt"
    wandb_run_name: str = "gpt2"
    backend: str = (
        "auto"  # of torchrun's processes: nccl, gloo; auto: nccl on CUDA GPUs, gloo elsewhere (nanoGPT: nccl)
    )

    def __post_init__(self) -> None:
        """Refuse values that no run can have; raises `UserError` that starts with the key."""
        for key in POSITIVE:
            _require(getattr(self, key) > 0, key, getattr(self, key), "more than 0")
        for key in ("min_lr", "warmup_iters", "lr_decay_iters", "weight_decay", "grad_clip", "seed"):
            _require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        for key in ("dropout", "beta1", "beta2"):
            _require(0 <= getattr(self, key) < 1, key, getattr(self, key), "in [0, 1)")
        _require(self.n_embd % self.n_head == 0, "n_head", self.n_head, f"a divisor of n_embd, which is {self.n_embd}")
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        _require(self.backend in BACKENDS, "backend", self.backend, f"one of {', '.join(BACKENDS)}")
        places = ("auto", "cpu", "mps", "cuda")
        place, _, index = self.device.partition(":")
        known = self.device in places or (place == "cuda" and index.isdigit())
        _require(known, "device", self.device, f"one of {', '.join(places)} or cuda:0, cuda:1, ...")

    @property
    def decay_until(self) -> int:
        """The update at which the cosine ends."""
        return self.lr_decay_iters or self.max_iters

    @property
    def tokens_per_iteration(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps * self.block_size

    def decisive(self) -> dict[str, Value]:
        """The keys that decide what is learnt."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in INCIDENTAL}


def _require(fine: bool, key: str, given: Value, allowed: str) -> None:
    if not fine:
        raise UserError(f"{key} = {given!r} cannot be: it must be {allowed}")


ELSEWHERE = {
    "vocab_size": "the vocabulary is the tokenizer's, set by --vocab-size",
    "meta_vocab_size": "the vocabulary is the tokenizer's, set by --vocab-size",
    "start": "it belongs to sampling; samples are written into the model's README.md",
}
KINDS: Mapping[str, type] = {"int": int, "float": float, "bool": bool, "str": str}
FIELDS = {field.name: KINDS[str(field.type)] for field in dataclasses.fields(TrainConfig)}


def load_config(path: Path, overrides: Mapping[str, Value] | None = None) -> tuple[TrainConfig, list[str]]:
    """The settings in a config file with `overrides` on top, and cautions about values that are seldom meant.

    Raises `UserError` with file:line for anything that is not a plain assignment, an unknown key or a mistyped value.
    """
    placed = {key: (value, f"{path}:{line}: ") for key, (value, line) in parse(path).items()}
    placed.update({key: (value, "--set: ") for key, value in (overrides or {}).items()})
    settings: dict[str, Value] = {}
    for key, (value, place) in placed.items():
        if key not in FIELDS:
            reason = ELSEWHERE.get(key)
            hint = f": {reason}" if reason else near(key, FIELDS)
            raise UserError(f"{place}unknown key {key!r}{hint or '; known: ' + ', '.join(FIELDS)}")
        settings[key] = _typed(key, value, FIELDS[key], place)
    try:
        config = TrainConfig(**settings)  # type: ignore[arg-type]
    except UserError as error:
        key = str(error).split(" ", 1)[0]
        raise UserError(f"{placed[key][1] if key in placed else f'{path}: '}{error}") from None
    return config, _cautions(config)


def parse_overrides(pairs: Sequence[str]) -> dict[str, Value]:
    """`["max_iters=2000", "device=cpu"]` as a dict; a value that is no Python literal is taken as a bare string."""
    found: dict[str, Value] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--set {pair!r}: write key=value, for example --set max_iters=2000 batch_size=32")
        try:
            found[key] = evaluate(ast.parse(text, mode="eval").body)
        except (SyntaxError, ValueError):
            found[key] = text
    return found


def parse(path: Path) -> dict[str, tuple[Value, int]]:
    """The assignments of a config file: key -> (value, line number). Nothing in the file is executed."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read the config file {path}: {reason}") from None
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: not a Python assignment: {error.msg}") from None
    except (MemoryError, RecursionError):
        raise UserError(f"{path}: an expression in it is nested too deeply; write the value itself") from None
    except ValueError as error:  # a null byte, on older Pythons
        raise UserError(f"{path}: not a config file: {error}") from None
    found: dict[str, tuple[Value, int]] = {}
    for node in tree.body:
        if _is_harmless(node):
            continue
        place = f"{path}:{node.lineno}: "
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise UserError(f"{place}only `key = value` lines (and `import time`) are read; found `{_shown(node)}`")
        key = node.targets[0].id
        if key in found:
            raise UserError(f"{place}{key!r} is set a second time (first on line {found[key][1]}); keep one of the two")
        try:
            found[key] = (evaluate(node.value, {name: value for name, (value, _) in found.items()}), node.lineno)
        except ValueError as error:
            raise UserError(f"{place}{key!r}: {error}") from None
        except RecursionError:
            raise UserError(f"{place}{key!r}: nested too deeply; write the value itself") from None
    return found


_ARITHMETIC: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def evaluate(node: ast.expr, names: Mapping[str, Value] = MappingProxyType({})) -> Value:
    """The value of a literal, of one of `names`, of arithmetic, or of strings joined with `str(...)` of such a value.

    `str(time.time())` is known too. Raises `ValueError` with the reason for anything else.
    """
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool, str):
        return node.value  # type: ignore[return-value]
    if ast.unparse(node) == "str(time.time())":
        return str(time.time())
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "str" and len(node.args) == 1 and not node.keywords:
        return str(evaluate(node.args[0], names))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        number = _number(evaluate(node.operand, names))
        return -number if isinstance(node.op, ast.USub) else number
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = evaluate(node.left, names), evaluate(node.right, names)
        if isinstance(left, str) and isinstance(right, str) and isinstance(node.op, ast.Add):
            return left + right
        left, right = _number(left), _number(right)
        if isinstance(node.op, ast.Pow) and (abs(right) > 64 or abs(left) > 1e6):
            raise ValueError("a power this large is no setting")
        try:
            result = _ARITHMETIC[type(node.op)](left, right)
        except (ZeroDivisionError, OverflowError) as error:
            raise ValueError(f"`{ast.unparse(node)}` has no value: {error}") from None
        return _number(result)
    raise ValueError(f"`{ast.unparse(node)}` is not a literal; write the value itself (a config file is read, not run)")


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"arithmetic is for numbers; {value!r} is none")
    return value


def _is_harmless(node: ast.stmt) -> bool:
    """A docstring or `import time`, the two statements that are no assignment and change nothing."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return isinstance(node, ast.Import) and [(name.name, name.asname) for name in node.names] == [("time", None)]


def _shown(node: ast.stmt) -> str:
    line = ast.unparse(node).splitlines()[0]
    return line if len(line) <= 60 else line[:57] + "..."


def _typed(key: str, value: Value, kind: type, place: str) -> Value:
    """`value` if it has the type of its key; an int passes for a float."""
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{place}{key} is too large for a number with a fraction") from None
    if type(value) is not kind:
        tip = f"; write {int(value)}" if kind is int and type(value) is float and value == int(value) else ""
        tip = "; write True or False" if kind is bool else tip
        raise UserError(f"{place}{key} = {value!r} is of type {type(value).__name__}, must be {kind.__name__}{tip}")
    return value


def _cautions(config: TrainConfig) -> list[str]:
    """Settings that are allowed and seldom meant."""
    if not config.decay_lr:
        return []
    notes, ends = [], f"training ends at max_iters = {config.max_iters}"
    if config.warmup_iters >= config.max_iters:
        notes.append(f"warmup_iters = {config.warmup_iters}: {ends}, before the learning rate peaks")
    if config.decay_until > config.max_iters:
        notes.append(f"lr_decay_iters = {config.decay_until}: {ends}, before the learning rate is down at min_lr")
    if config.min_lr > config.learning_rate:
        notes.append(
            f"min_lr = {config.min_lr:g} is above learning_rate = {config.learning_rate:g}: the rate will grow"
        )
    return notes
