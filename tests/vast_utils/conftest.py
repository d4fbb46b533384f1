"""Machines of the tests, and a state folder of their own."""

from __future__ import annotations

import getpass
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vast_utils.fake_vast import FakeVast, serving
from tests.vast_utils.loopback_machine import LoopbackMachine, make_key, missing
from tests.vast_utils.rented import Rented, make_rented
from tests.vast_utils.test_setup import make_image
from vast_utils.ssh import Machine


@pytest.fixture
def new_host(tmp_path: Path) -> Iterator[Callable[[str], LoopbackMachine]]:
    """Makes loopback machines by name; all are gone after the test."""
    if why := missing():
        pytest.skip(why)
    made: list[LoopbackMachine] = []

    def make(name: str = "machine") -> LoopbackMachine:
        made.append(LoopbackMachine(tmp_path / name))
        return made[-1]

    yield make
    for host in made:
        host.stop()


@pytest.fixture
def identity(tmp_path: Path) -> tuple[Path, str]:
    """The user's key: the private file and the public line."""
    if why := missing():
        pytest.skip(why)
    return tmp_path / "id_test", make_key(tmp_path / "id_test")


@pytest.fixture
def host(new_host: Callable[[str], LoopbackMachine], identity: tuple[Path, str]) -> LoopbackMachine:
    """A running machine."""
    host = new_host("machine")
    host.start([identity[1]])
    return host


@pytest.fixture
def machine(host: LoopbackMachine, identity: tuple[Path, str], tmp_path: Path) -> Iterator[Machine]:
    """That machine as the project sees it."""
    machine = Machine("127.0.0.1", host.port, getpass.getuser(), tmp_path / "known hosts" / "one", identity[0])
    yield machine
    machine.close()


@pytest.fixture(scope="session")
def image_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an image, with a stub for torch."""
    return make_image(tmp_path_factory.mktemp("image") / "image")


@pytest.fixture
def rented(tmp_path: Path, image_python: str) -> Iterator[Rented]:
    """A market on a port, whose machines have a real sshd each."""
    if why := missing():
        pytest.skip(why)
    made = make_rented(FakeVast, tmp_path, image_python)
    with serving(made.fake):
        yield made
        made.stop()
