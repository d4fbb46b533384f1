"""Names of runs that people can say and remember: two words and a number."""

from __future__ import annotations

import hashlib
import json
from typing import Any

ADJECTIVES = """
amber brave bright brisk calm clear clever cosy crisp daring dusky eager early fair fleet fresh gentle glad
golden grand green happy hardy hazel hidden honest humble ivory jolly keen kind light lively lucid lucky mellow
merry mild misty modest noble novel olive patient placid plain polite proud quick quiet rapid rosy royal rustic
silent silver simple snowy solid steady sunny swift tidy vivid warm wise witty
""".split()  # noqa: SIM905 - a list of strings would be a page
NOUNS = """
acorn anchor aspen badger basin beacon birch bison breeze brook canyon cedar cliff clover comet coral crane
creek delta dune eagle ember falcon fern field finch fjord forest fox garden glade grove harbor heron hill
island juniper kite lake lantern lark lynx maple marsh meadow moon moss oak orchard otter owl pebble pine pond
prairie raven reef ridge river robin sparrow spruce summit thistle valley willow wren
""".split()  # noqa: SIM905 - a list of strings would be a page


def run_name(data: Any) -> str:
    """The name of these settings, such as amber-otter-417: the same settings give the same name."""
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).digest()
    number = int.from_bytes(digest[:8], "little")
    number, adjective = divmod(number, len(ADJECTIVES))
    number, noun = divmod(number, len(NOUNS))
    return f"{ADJECTIVES[adjective]}-{NOUNS[noun]}-{number % 1000}"
