from __future__ import annotations

import fcntl
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pip
import pytest

from vast_utils import job as jobs
from vast_utils.logs import lines
from vast_utils.setup import Needs, Unfit, check, measure, setup

OFFLINE = ("--no-index", "--find-links", ".", "--no-deps")
"""What pip needs no network for: wheels beside requirements.txt."""
TORCH = """
__version__ = "2.13.0+cu126"
class Matrix:
    def __matmul__(self, other): return self
    def sum(self): return 64.0**3
def ones(*_, device): return Matrix()
class cuda:
    is_available = staticmethod(lambda: {cuda})
    get_device_name = staticmethod(lambda: "Stub GPU")
"""


def make_image(folder: Path, cuda: bool = False, torch: bool = True) -> str:
    """A Python as images have it: an environment of its own, with a torch (here a stub) and pip; its path."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next((folder / "lib").glob("python3*")) / "site-packages"
    (packages / "pip.pth").write_text(str(Path(pip.__file__).parents[1]))
    if torch:
        (packages / "torch.py").write_text(TORCH.format(cuda=cuda))
        (packages / "torch-2.13.0+cu126.dist-info").mkdir()
        metadata = "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0+cu126\n"
        (packages / "torch-2.13.0+cu126.dist-info" / "METADATA").write_text(metadata)
    else:
        (packages / "torch.py").write_text("raise ImportError('no torch in this image')")
    return str(folder / "bin" / "python")


@pytest.fixture
def pushed(host) -> Path:
    """A project that needs nothing."""
    folder = host.home / "sparse_coding"
    folder.mkdir()
    (folder / "requirements.txt").touch()
    return folder


def needs(python: str, **other) -> Needs:
    return Needs(**{"gpu": False, "disk_gb": 0.1, "download_mbps": 0, "python": python, **other})


@pytest.fixture
def image(tmp_path: Path) -> str:
    return make_image(tmp_path / "image")


def make_wheel(folder: Path, name: str, source: str) -> str:
    """A wheel of one module, made by hand; its name."""
    files = {
        f"{name}.py": source,
        f"{name}-2.13.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.13.0\n",
        f"{name}-2.13.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    wheel = folder / f"{name}-2.13.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{name}-2.13.0.dist-info/RECORD", "".join(f"{path},,\n" for path in files))
    return wheel.name


@pytest.fixture
def project(host) -> Path:
    """A pushed project whose requirements name the image's torch, what only the laptop needs, and one thing more."""
    folder = host.home / "sparse_coding"
    folder.mkdir()
    wheel = make_wheel(folder, "tiny_thing", "VALUE = 'installed there'\n")
    make_wheel(folder, "torch", TORCH.format(cuda=False))
    (folder / "requirements.txt").write_text(f"torch==2.13.0\nvastai>=1.0\npytest>=8.0\n./{wheel}\n")
    (folder / "run.py").write_text("import tiny_thing, torch\nprint(tiny_thing.VALUE, torch.__version__)\n")
    return folder


def test_setup_builds_on_the_images_torch_and_a_job_runs_in_it(machine, project, image):
    said: list[str] = []
    ready = setup(machine, needs(image), say=said.append, pip_flags=OFFLINE)
    assert (ready.installed, ready.image_torch, ready.torch, ready.python) == (True, True, "2.13.0+cu126", image)
    assert said[-1].endswith("torch 2.13.0+cu126 of the image works")
    job, _ = jobs.start(machine, ["run.py"])
    assert list(lines(machine, job.name, follow=True)) == ["installed there 2.13.0+cu126"]
    assert not setup(machine, needs(image), say=said.append, pip_flags=OFFLINE).installed
    (project / "requirements.txt").write_text("no-such-thing-at-all==1\n")
    with pytest.raises(Unfit, match=r"pip install failed.*no-such-thing-at-all"):
        setup(machine, needs(image), say=said.append, pip_flags=OFFLINE)


def test_a_torch_that_does_not_see_the_gpu_is_not_kept(machine, host, project, image):
    """The project's own is installed; this one does not see it either, so that the machine is unfit."""
    fake_nvidia_smi(host, "echo 'NVIDIA GeForce RTX 4090, 24564 MiB, 550.54'")
    with pytest.raises(Unfit, match=r"torch 2\.13\.0.cu126 cannot use the GPU: it sees none"):
        setup(machine, needs(image, gpu=True), pip_flags=OFFLINE)
    own = next((host.home / ".sparse_coding" / "venv" / "lib").glob("python3*")) / "site-packages"
    assert (own / "torch.py").exists()
    assert (own / "image.pth").read_text() == ""


def test_gpu_setup_ends_with_a_product_on_the_gpu(machine, host, project, tmp_path):
    fake_nvidia_smi(host, "echo 'NVIDIA GeForce RTX 4090, 24564 MiB, 550.54'")
    said: list[str] = []
    ready = setup(machine, needs(make_image(tmp_path / "gpu", cuda=True), gpu=True), say=said.append, pip_flags=OFFLINE)
    assert ready.gpus == ("NVIDIA GeForce RTX 4090, 24564 MiB, 550.54",)
    assert said[-1].endswith("torch 2.13.0+cu126 of the image works on Stub GPU")


def test_without_a_torch_the_machine_is_unfit(machine, project, tmp_path):
    (project / "requirements.txt").write_text("")
    with pytest.raises(Unfit, match=r"torch cannot be imported after the installation: .*No module named 'torch'"):
        setup(machine, needs(make_image(tmp_path / "bare", torch=False)), pip_flags=OFFLINE)


def test_what_a_machine_lacks_is_said(machine, image):
    with pytest.raises(Unfit, match=r"GB of disk are free, 1e\+09 are needed"):
        check(machine, needs(image, disk_gb=1e9))
    with pytest.raises(Unfit, match=r"no Python 3\.10 or newer at /no/such/python"):
        check(machine, needs("/no/such/python"))


def fake_nvidia_smi(host, script: str) -> None:
    """Put a nvidia-smi before all others on the machine's PATH."""
    place = host.home / "bin"
    place.mkdir(exist_ok=True)
    (place / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (place / "nvidia-smi").chmod(0o755)
    wrapper = host.folder / "command.sh"
    wrapper.write_text(wrapper.read_text().replace("PATH='", f"PATH='{place}:"))


def test_gpus_are_those_that_nvidia_smi_names(machine, host, image, pushed):
    fake_nvidia_smi(host, "echo 'NVIDIA GeForce RTX 4090, 24564 MiB, 550.54'")
    assert check(machine, needs(image, gpu=True))["gpus"] == ["NVIDIA GeForce RTX 4090, 24564 MiB, 550.54"]
    fake_nvidia_smi(host, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    with pytest.raises(Unfit, match=r"nvidia-smi finds no GPU \(Failed to initialize NVML.*--no-gpu"):
        check(machine, needs(image, gpu=True))


def test_the_download_is_measured_and_must_be_fast_enough(machine, tmp_path):
    (tmp_path / "data").write_bytes(bytes(5_000_000))
    url = (tmp_path / "data").as_uri()
    assert (measure(machine, Needs(download_url=url, download_mbps=1.0)) or 0) > 1.0
    assert measure(machine, Needs(download_mbps=0)) is None
    with pytest.raises(Unfit, match=r"downloads at \d+ Mbit/s, 1e\+12 are needed"):
        measure(machine, Needs(download_url=url, download_mbps=1e12))
    with pytest.raises(Unfit, match=r"cannot download .*No such file"):
        measure(machine, Needs(download_url=url + "-not"))
    with pytest.raises(Unfit, match=r"cannot download gpt2: unknown url type"):
        measure(machine, Needs(download_url="gpt2"))


def test_setup_needs_a_pushed_project(machine, image):
    with pytest.raises(Unfit, match=r"no requirements\.txt in ~/sparse_coding: push the project first"):
        setup(machine, needs(image), pip_flags=OFFLINE)


def test_a_second_setup_waits_for_one_that_is_still_at_work(machine, host, pushed, image):
    """As when the connection of the first broke: two pips in one environment would spoil it."""
    base = host.home / ".sparse_coding"
    base.mkdir()
    with (base / "installing").open("w") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = pool.submit(setup, machine, needs(image), say=lambda _: None, pip_flags=OFFLINE)
        time.sleep(2.0)
        assert not second.done()
        assert not (base / "venv").exists()
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert second.result().installed
