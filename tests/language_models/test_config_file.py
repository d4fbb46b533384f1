"""Config files are read as data: what is honoured, what is explained, what is refused and where."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sparse_coding.errors import UserError
from sparse_coding.language_models import config_file
from sparse_coding.language_models.config_file import FIELDS, TrainConfig, load_config, parse_overrides

CONFIGS = Path(__file__).parents[2] / "nanogpt_configs"

# the globals of nanoGPT's train.py at 3adf61e1 that its configurator accepts
NANOGPT_KEYS = """
out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log wandb_project
wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout bias
learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr backend
device dtype compile
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.py"
        path.write_text(text)
        return path

    return write


def test_every_key_of_nanogpt_is_known():
    assert set(FIELDS) - {"seed"} == set(NANOGPT_KEYS.split())


def test_assignments_arithmetic_comments_and_import_time_are_read(write):
    path = write(
        '"""A docstring."""\nimport time\n# a comment\nn_layer = 6  # six\ngradient_accumulation_steps = 5 * 8\n'
        "learning_rate = 1e-1 / 2\nbatch_size = 2**3 - -1\nbias = True\ndevice = 'cp' + 'u'\nblock_size = 7 // 2 % 5\n"
    )
    config, notes = load_config(path, {"n_head": 4, "n_embd": 8, "max_iters": 9000})
    assert config == TrainConfig(
        n_layer=6,
        gradient_accumulation_steps=40,
        learning_rate=0.05,
        batch_size=9,
        bias=True,
        device="cpu",
        block_size=3,
        n_head=4,
        n_embd=8,
        max_iters=9000,
    )
    assert notes == []


def test_names_may_be_computed_from_the_clock_and_from_keys_above(write):
    config, notes = load_config(
        write(
            "import time\nmax_iters = 2 * 50\nlr_decay_iters = max_iters\nn_head = 2\nn_embd = 8 * n_head\n"
            "wandb_run_name = 'tiny-' + str(n_embd) + '-' + str(time.time())\nwarmup_iters = 1\n"
        )
    )
    assert (config.lr_decay_iters, config.n_embd) == (100, 16)
    assert config.wandb_run_name.startswith("tiny-16-1")
    assert notes == []
    with pytest.raises(UserError, match=r"config.py:1: 'n_layer': `n_head` is not a literal"):
        load_config(write("n_layer = n_head"))


def test_what_is_learnt_does_not_depend_on_names_and_places(write):
    settings = {"out_dir": "x", "wandb_log": True, "wandb_run_name": "y", "backend": "gloo"}
    plain, named = load_config(write(""))[0], load_config(write(""), settings)[0]
    assert plain != named
    assert plain.decisive() == named.decisive()
    assert plain.decisive() != load_config(write("compile = True"))[0].decisive()
    assert set(plain.decisive()) | set(config_file.INCIDENTAL) == set(FIELDS)


def test_an_int_passes_for_a_float_and_nothing_else_is_converted(write):
    config, _ = load_config(write("learning_rate = 1"))
    assert type(config.learning_rate) is float
    assert config.learning_rate == 1.0


def test_overrides_win_over_the_file_and_bare_words_are_strings(write):
    overrides = parse_overrides(["max_iters=5 * 8", "device=cpu", "dtype='float32'", "bias=True", "warmup_iters=0"])
    assert overrides == {"max_iters": 40, "device": "cpu", "dtype": "float32", "bias": True, "warmup_iters": 0}
    config, _ = load_config(write("max_iters = 7\nn_layer = 2"), overrides)
    assert (config.max_iters, config.n_layer, config.device, config.bias) == (40, 2, "cpu", True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_layer = 6\nn_lyer = 2", r"config\.py:2: unknown key 'n_lyer'; did you mean 'n_layer'"),
        ("qqqq = 2", r"config\.py:1: unknown key 'qqqq'; known: n_layer, "),
        ("vocab_size = 50304", r"config\.py:1: unknown key 'vocab_size': .*--vocab-size"),
        ("n_layer = 6.0", r"config\.py:1: n_layer = 6.0 is of type float, must be int; write 6"),
        ("max_iters = 1e3", r"must be int; write 1000"),
        ("n_layer = True", r"n_layer = True is of type bool, must be int"),
        ("bias = 0", r"bias = 0 is of type int, must be bool; write True or False"),
        ("device = 3", r"device = 3 is of type int, must be str"),
        ("compile = 'yes'", r"compile = 'yes' is of type str, must be bool"),
        ("n_layer = 6\nn_layer = 7", r"config\.py:2: 'n_layer' is set a second time \(first on line 1\)"),
        ("import os", r"config\.py:1: only `key = value` lines .*found `import os`"),
        ("import time as t", r"only `key = value` lines"),
        ("from time import time", r"only `key = value` lines"),
        ("\nprint('hello')", r"config\.py:2: only `key = value` lines .*found `print\('hello'\)`"),
        ("n_layer = n_head = 2", r"only `key = value` lines"),
        ("n_layer: int = 2", r"only `key = value` lines"),
        ("n_layer += 2", r"only `key = value` lines"),
        ("n_layer, n_head = 2, 2", r"only `key = value` lines"),
        ("if True:\n    n_layer = 2", r"only `key = value` lines"),
        ("n_layer = n_head", r"config\.py:1: 'n_layer': `n_head` is not a literal"),
        ("n_layer = [2]", r"`\[2\]` is not a literal"),
        ("device = __import__('os').name", r"is not a literal"),
        ("wandb_run_name = 'a' + str(time.time(1))", r"is not a literal"),
        ("wandb_run_name = f'a{1}'", r"is not a literal"),
        ("device = 'cpu' * 3", r"arithmetic is for numbers; 'cpu' is none"),
        ("n_layer = True + 1", r"arithmetic is for numbers; True is none"),
        ("n_layer = 1 // 0", r"`1 // 0` has no value"),
        ("n_layer = 9**9**9", r"a power this large is no setting"),
        ("n_layer = 0", r"config\.py:1: n_layer = 0 cannot be: it must be more than 0"),
        ("dropout = 1.0", r"dropout = 1.0 cannot be: it must be in \[0, 1\)"),
        ("min_lr = -1.0", r"min_lr = -1.0 cannot be: it must be 0 or more"),
        ("n_head = 5", r"config\.py:1: n_head = 5 cannot be: it must be a divisor of n_embd, which is 768"),
        ("dtype = 'float64'", r"dtype = 'float64' cannot be: it must be one of auto, bfloat16, float32, float16"),
        ("backend = 'mpi'", r"backend = 'mpi' cannot be: it must be one of auto, nccl, gloo"),
        ("device = 'tpu'", r"device = 'tpu' cannot be: it must be one of"),
        ("device = 'cpu:1'", r"device = 'cpu:1' cannot be"),
        ("n_layer = (", r"config\.py:1: not a Python assignment"),
        ("learning_rate = 1000000**64", r"learning_rate is too large"),
        ("n_layer = " + "-" * 6000 + "1", r"nested too deeply"),
        ("n_layer = " + "-" * 900 + "1", r"nested too deeply"),
    ],
)
def test_anything_else_is_refused_with_its_place_and_the_reason(write, text, message):
    with pytest.raises(UserError, match=message):
        load_config(write(text))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("max_iters", r"--set 'max_iters': write key=value"),
        ("=3", r"--set '=3': write key=value"),
        ("max_itres=3", r"--set: unknown key 'max_itres'; did you mean 'max_iters'"),
        ("max_iters=many", r"--set: max_iters = 'many' is of type str, must be int"),
        ("n_head=7", r"--set: n_head = 7 cannot be: it must be a divisor of n_embd"),
    ],
)
def test_a_wrong_override_is_refused(write, pair, message):
    with pytest.raises(UserError, match=message):
        load_config(write("n_layer = 2"), parse_overrides([pair]))


def test_a_missing_file_and_a_binary_file_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the config file .*none\.py: No such file"):
        load_config(tmp_path / "none.py")
    (tmp_path / "model.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="it is not UTF-8 text"):
        load_config(tmp_path / "model.py")


def test_a_config_file_is_never_executed(write, tmp_path):
    victim = tmp_path / "victim"
    with pytest.raises(UserError):
        load_config(write(f"open({str(victim)!r}, 'w').close()\nn_layer = 2"))
    with pytest.raises(UserError):
        load_config(write(f"n_layer = open({str(victim)!r}, 'w').close()"))
    assert not victim.exists()


def test_schedules_that_are_seldom_meant_are_pointed_out(write):
    _, notes = load_config(write("max_iters = 1000\nlr_decay_iters = 5000"))
    assert [note.split(" = ")[0] for note in notes] == ["warmup_iters", "lr_decay_iters"]
    _, notes = load_config(write("max_iters = 1000\nlr_decay_iters = 5000\ndecay_lr = False"))
    assert notes == []
    _, notes = load_config(write("min_lr = 1.0"))
    assert notes[0].startswith("min_lr = 1 is above learning_rate")


def test_the_cosine_ends_with_the_training_unless_told_otherwise():
    assert TrainConfig(max_iters=300).decay_until == 300
    assert TrainConfig(max_iters=300, lr_decay_iters=200).decay_until == 200


def test_supertiny_is_the_published_recipe():
    config, _ = load_config(CONFIGS / "supertiny.py")
    shape = (config.n_layer, config.n_embd, config.n_head, config.dropout, config.block_size, config.batch_size)
    assert shape == (6, 16, 8, 0.2, 256, 64)
    published = {"n_layer", "n_embd", "n_head", "dropout", "block_size", "batch_size"}
    ours = {"gradient_accumulation_steps", "eval_interval", "eval_iters", "log_interval", "dataset"}
    ours |= {"out_dir", "wandb_project", "wandb_run_name"}
    for key, value in dataclasses.asdict(TrainConfig()).items():  # the rest is nanoGPT's
        assert key in published | ours or getattr(config, key) == value, key


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_in_the_repository_loads(path):
    config, notes = load_config(path)
    assert config.max_iters > 0
    assert notes == []
