"""What a machine has, and making it ready: one request, a line of JSON on stdin, is answered by one on stdout.

Standard library and Python 3.8 only.
"""

import fcntl
import hashlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request

BASE = os.path.expanduser("~/.sparse_coding")
VENV = os.path.join(BASE, "venv")
PYTHONS = (
    "python3",
    "/venv/main/bin/python3",
    "/opt/conda/bin/python3",
    "/usr/local/bin/python3",
    "python3.12",
    "python3.11",
)
ABOUT = """
import json, os, sys, sysconfig
own = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
own |= {os.path.join(one, "lib-dynload") for one in own}
packages = [one for one in sys.path if one not in own and os.path.isdir(one) and os.path.isabs(one)]
about = {"version": list(sys.version_info[:2]), "packages": packages}
try:
    import pip
    about["pip"] = [int(one) for one in pip.__version__.split(".")[:2]] >= [22, 3]  # knows --python
except (ImportError, ValueError):
    about["pip"] = False
try:
    import torch
    about.update(torch=torch.__version__, cuda=torch.cuda.is_available())
    if about["cuda"]:
        ones = torch.ones(64, 64, device="cuda")
        about["gpu"] = torch.cuda.get_device_name()
        assert float((ones @ ones).sum()) == 64.0**3
except Exception as error:
    about.update(cuda=False, why=f"{type(error).__name__}: {error}"[:300])
    if isinstance(error, ImportError):
        about["torch"] = None
print(json.dumps(about))
"""


def about(python):
    """What a Python is and has; None where it does not run."""
    try:
        done = subprocess.run([python, "-c", ABOUT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=180)
        return {"python": python, **json.loads(done.stdout.splitlines()[-1])}
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None


def look(request):
    """The disk, the GPUs by nvidia-smi, Pythons that are recent enough, best first, and whether a project is here."""
    named = [os.path.expanduser(request["python"])] if request["python"] else PYTHONS
    found = {}
    for one in named:
        path = shutil.which(one)
        if path and os.path.realpath(os.path.dirname(path)) + os.path.basename(path) not in found:
            found[os.path.realpath(os.path.dirname(path)) + os.path.basename(path)] = about(path)
    usable = [one for one in found.values() if one and one["version"] >= [3, 10]]
    usable.sort(key=lambda one: (one["cuda"], bool(one.get("torch"))), reverse=True)
    try:
        smi = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
        )
        gpus, said = (
            (smi.stdout.decode().strip().splitlines() if smi.returncode == 0 else []),
            smi.stdout.decode()[-200:],
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        gpus, said = [], str(error)
    os.makedirs(BASE, mode=0o700, exist_ok=True)
    there = os.path.isfile(os.path.join(os.path.expanduser(request["project"]), "requirements.txt"))
    free = shutil.disk_usage(BASE).free
    return {"free": free, "gpus": gpus, "nvidia_smi": said, "pythons": usable, "project": there}


def speed(request):
    """Bytes per second from a URL, by as much as arrives in some seconds; an error says what."""
    began, got = time.monotonic(), 0
    try:
        with urllib.request.urlopen(request["url"], timeout=20) as answer:
            while time.monotonic() - began < request["seconds"]:
                block = answer.read(1 << 18)
                if not block:
                    break
                got += len(block)
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: no such kind of URL
        return {"error": str(error)}
    return {"bytes_per_second": got / max(time.monotonic() - began, 1e-6)}


def install(request):
    """A virtual environment on top of the image's packages, with what the requirements lack; nothing if it is there."""
    lock = os.open(os.path.join(BASE, "installing"), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)  # one whose connection has broken may still be at work; goes with this process
    image, packages = request["python"], request["packages"]
    project = os.path.expanduser(request["project"])
    with open(os.path.join(project, "requirements.txt")) as file:
        asked = [line.strip() for line in file]
    wanted = [line for line in asked if line and line_name(line) not in request["skip"]]
    state = hashlib.sha256(json.dumps([wanted, image, packages, request["torch"]]).encode()).hexdigest()
    mark = os.path.join(VENV, "installed")
    if os.path.exists(mark) and read(mark) == state:
        return {"installed": False, "about": about(os.path.join(VENV, "bin", "python"))}
    if os.path.exists(mark):
        os.unlink(mark)  # before the rest: half an environment has none
    shutil.rmtree(VENV, ignore_errors=True)
    python = os.path.join(VENV, "bin", "python")
    run([image, "-m", "venv", *(["--without-pip"] if request["pip"] else []), VENV])
    pip = [image, "-m", "pip", "--python", python] if request["pip"] else [python, "-m", "pip"]
    own = (
        subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"])
        .decode()
        .strip()
    )
    with open(os.path.join(own, "image.pth"), "w") as file:  # works for an image whose Python is itself an environment
        file.write("".join(one + "\n" for one in dict.fromkeys(packages)))
    fixed = os.path.join(BASE, "constraints.txt")
    with open(fixed, "w") as file:
        file.write(f"torch=={request['torch']}\n" if request["torch"] else "")
    with open(os.path.join(BASE, "requirements.txt"), "w") as file:
        file.write("\n".join(wanted) + "\n")
    flags = ["--disable-pip-version-check", "--no-input", "-q", "-c", fixed, "-r", file.name, *request["pip_flags"]]
    if wanted:
        run([*pip, "install", *flags], cwd=project)
    with open(mark, "w") as file:
        file.write(state)
    return {"installed": True, "about": about(python)}


def read(path):
    with open(path) as file:
        return file.read()


def line_name(line):
    """The project that a line of requirements.txt names."""
    for at, sign in enumerate(line):
        if not (sign.isalnum() or sign in "._-"):
            return line[:at].lower()
    return line.lower()


def run(argv, cwd=None):
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd)
    if done.returncode:
        said = done.stdout.decode("utf-8", "replace").strip().splitlines()
        errors = [line for line in said if "error" in line.lower()] or said
        what = "pip install" if "pip" in argv else " ".join(argv)
        sys.exit(f"{what} failed: {' / '.join(errors[-2:])}")


def main():
    request = json.loads(sys.stdin.buffer.readline())
    print(json.dumps({"look": look, "speed": speed, "install": install}[request["verb"]](request)))


if __name__ == "__main__":
    main()
