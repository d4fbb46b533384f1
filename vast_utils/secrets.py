"""Secrets: which values go along with a job, what is never sent, and how they are kept out of every line we print.

Values travel over ssh's stdin into the environment of the job's process and nowhere else: no file, log, command line.
The machine's owner (root on the host) can read the environment of any process there: use keys that are short-lived and
limited to the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from sparse_coding.errors import UserError

GO_ALONG = (
    "WANDB_API_KEY",
    "HF_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_SKIP_SIGNATURE",
)
"""Sent where they are set; other variables by name."""
STAY_HERE = ("VAST_API_KEY",)
"""The key that rents: whoever holds it can spend, so no machine ever sees it."""
PLAIN = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_SKIP_SIGNATURE")
SHORTEST = 8

_NAMES = re.compile(
    r"\.env(\..*)?|.*\.env|\.envrc|\.netrc|_netrc|\.pypirc|\.npmrc|\.git-credentials|\.?vast_api_key|kubeconfig|"
    r"\.s3cfg|\.boto|rclone\.conf|\.pgpass|\.htpasswd|kaggle\.json|client_secret.*\.json|service[-_]account.*\.json|"
    r"id_(rsa|dsa|ecdsa|ed25519)([_.-].*)?|.*\.(pem|key|p12|pfx|kdbx|keystore|jks|ppk|gpg)",
    re.IGNORECASE,
)
_FOLDERS = {".aws", ".ssh", ".gnupg", ".kube", ".docker"}
_STEM = re.compile(r"(.*[^a-z])?(api_?keys?|keys?|secrets?|credentials?|passwords?|passwd|token)", re.IGNORECASE)
_PROSE = {".py", ".pyi", ".md", ".rst", ".ipynb", ".html"}
"""Files about keys rather than of keys: judged by their content alone."""
_CONTENT = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"
    rb"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    rb"|\bhf_[A-Za-z0-9]{30,}\b|\bwandb_v\d_[A-Za-z0-9_]{30,}\b"
    rb"|\bglpat-[A-Za-z0-9_-]{20,}|\bxox[abeoprs]-[A-Za-z0-9-]{20,}|\bAIza[A-Za-z0-9_-]{35}\b"
    rb"|\bgh[pousr]_[A-Za-z0-9]{30,}\b|\bgithub_pat_[A-Za-z0-9_]{40,}\b"
    rb"|\bsk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,}\b"
    rb"|(?i:wandb_api_key|vast_api_key|aws_secret_access_key)[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9/+_-]{32,}"
)
READ_BYTES = 4_000_000


def collect(environ: Mapping[str, str], names: Sequence[str] = ()) -> dict[str, str]:
    """The values that go along: those of `GO_ALONG` that are set, and those named. `UserError` if one is not set."""
    for name in names:
        if "=" in name:
            raise UserError(
                f"--env {name.split('=')[0]}=...: give the name alone and export the value: command lines are public"
            )
        if name in STAY_HERE:
            raise UserError(f"--env {name}: the key that rents machines never goes to one; leave it out")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name not in environ:
            raise UserError(f"--env {name}: there is no such variable here; export it first, or leave it out")
    return {name: environ[name] for name in (*GO_ALONG, *names) if environ.get(name)}


def known(environ: Mapping[str, str]) -> dict[str, str]:
    """Every secret that is set here, those that never leave too: what must not be printed or pushed."""
    return {name: environ[name] for name in (*GO_ALONG, *STAY_HERE) if environ.get(name)}


def refuse_in(argv: Iterable[str], secrets: Mapping[str, str]) -> None:
    """`UserError` where a secret's value stands in a command: everybody on the machine can read that."""
    for name, value in _hidden(secrets):
        if any(value in word for word in argv):
            raise UserError(f"the command holds the value of {name}: leave it out; the job finds it in its environment")


class Redactor:
    """Puts `[NAME]` where a secret's value would be printed."""

    def __init__(self, secrets: Mapping[str, str]):
        self._hidden = sorted(_hidden(secrets), key=lambda item: -len(item[1]))

    def __call__(self, text: str) -> str:
        for name, value in self._hidden:
            text = text.replace(value, f"[{name}]")
        return text


def why_secret(folder: Path, name: str, secrets: Mapping[str, str]) -> str | None:
    """Why a file is never sent: its name or content is that of a key; None if it may go."""
    pure = PurePosixPath(name)
    if _NAMES.fullmatch(pure.name) or _FOLDERS & set(pure.parts[:-1]):
        return "its name is that of a file of keys"
    if pure.suffix.lower() not in _PROSE and _STEM.fullmatch(pure.name.lstrip(".").split(".")[0]):
        return "its name says that it holds a key"
    with (folder / name).open("rb") as file:
        head = file.read(READ_BYTES)
    if _CONTENT.search(head):
        return "it holds what looks like a key"
    for variable, value in _hidden(secrets):
        if value.encode() in head:
            return f"it holds the value of {variable}"
    return None


def _hidden(secrets: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in secrets.items() if name not in PLAIN and len(value) >= SHORTEST]
