"""Dictionaries: one file per architecture. `ARCHITECTURES` is the one list of their names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from sparse_coding.dictionaries.base import (
    Dictionary,
    DictionarySettings,
    Losses,
    Moment,
    Sample,
    TrainableDictionary,
)
from sparse_coding.dictionaries.batch_topk import BatchTopK, BatchTopKSettings
from sparse_coding.dictionaries.gated import Gated, GatedSettings
from sparse_coding.dictionaries.jumprelu import JumpReLU, JumpReLUSettings
from sparse_coding.dictionaries.lp import Lp, LpSettings
from sparse_coding.dictionaries.matching_pursuit import MatchingPursuit, MatchingPursuitSettings
from sparse_coding.dictionaries.matryoshka import Matryoshka, MatryoshkaSettings
from sparse_coding.dictionaries.relu import ReLU, ReLUSettings, convert_l1
from sparse_coding.dictionaries.relu_april import ReLUApril, ReLUAprilSettings
from sparse_coding.dictionaries.topk import TopK, TopKSettings
from sparse_coding.errors import UserError, near

ARCHITECTURES: dict[str, type[TrainableDictionary]] = {
    "relu": ReLU,
    "relu-april": ReLUApril,
    "lp": Lp,
    "gated": Gated,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "matryoshka": Matryoshka,
    "jumprelu": JumpReLU,
    "matching-pursuit": MatchingPursuit,
}


def architecture(name: str) -> type[TrainableDictionary]:
    """The class of an architecture by its name."""
    if name not in ARCHITECTURES:
        raise UserError(f"unknown architecture {name!r}: have {', '.join(ARCHITECTURES)}{near(name, ARCHITECTURES)}")
    return ARCHITECTURES[name]


def settings_of(name: str) -> list[str]:
    """Names of the settings an architecture takes."""
    return [field.name for field in fields(architecture(name).Settings)]


def require_setting(setting: str, names: Iterable[str], flag: str = "") -> list[str]:
    """Which of the architectures `names` take a setting. UserError naming those that do where none of them does.

    `flag` is how it was asked for, where that is not its name.
    """
    names = list(names)
    taking = [name for name in names if setting in settings_of(name)]
    if not taking:
        everywhere = [name for name in ARCHITECTURES if setting in settings_of(name)]
        known = sorted({field for name in ARCHITECTURES for field in settings_of(name)})
        who = f"it belongs to {', '.join(everywhere)}" if everywhere else f"none has it{near(setting, known)}"
        asked = f"{flag}: " if flag else ""
        take = "takes" if len(names) == 1 else "take"
        raise UserError(f"{asked}{' and '.join(names)} {take} no setting {setting!r}: {who}")
    return taking


__all__ = [
    "ARCHITECTURES",
    "BatchTopK",
    "BatchTopKSettings",
    "Dictionary",
    "DictionarySettings",
    "Gated",
    "GatedSettings",
    "JumpReLU",
    "JumpReLUSettings",
    "Losses",
    "Lp",
    "LpSettings",
    "MatchingPursuit",
    "MatchingPursuitSettings",
    "Matryoshka",
    "MatryoshkaSettings",
    "Moment",
    "ReLU",
    "ReLUApril",
    "ReLUAprilSettings",
    "ReLUSettings",
    "Sample",
    "TopK",
    "TopKSettings",
    "TrainableDictionary",
    "architecture",
    "convert_l1",
    "require_setting",
    "settings_of",
]
