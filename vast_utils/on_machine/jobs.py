"""Jobs on a machine: start, status, stop, tail. One request, a line of JSON on stdin, is answered on stdout.

A job is a folder `~/.sparse_coding/jobs/NAME`: job.json (what runs), log, heartbeat.json, exit.json. Times are of the
monotonic clock, so that setting the machine's clock changes nothing. Standard library and Python 3.8 only.
"""

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time

BASE = os.path.expanduser("~/.sparse_coding")
JOBS = os.path.join(BASE, "jobs")
VENV = os.path.join(BASE, "venv")
BEAT_SECONDS = 5.0
BEAT_STALE_SECONDS = 60.0
MARK = "SPARSE_CODING_JOB"


def read(folder, name):
    """A small JSON file; empty where there is none."""
    try:
        with open(os.path.join(folder, name)) as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def write(path, value):
    """A small file, whole or not at all; others may write it at the same time."""
    partial = f"{path}.{os.getpid()}.partial"
    with open(partial, "w") as file:
        file.write(value)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def is_locked(path):
    """Whether the job's supervisor lives: it holds this lock as long as it does."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(file)


def start_ticks(pid):
    """When a process started, which tells it from a later one of the same number; None if there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            words = file.read().rpartition(")")[2].split()
        return None if words[0] in "ZX" else int(words[19])
    except (OSError, ValueError, IndexError):
        return None


def status(folder, quiet_seconds):
    """What is known of a job; its state is absent, running, wedged, done (with rc) or dead (ended unseen)."""
    job = read(folder, "job.json")
    if not job:
        return {"name": os.path.basename(folder), "state": "absent"}
    supervised = is_locked(os.path.join(folder, "alive"))
    beat, over, now = read(folder, "heartbeat.json"), read(folder, "exit.json"), time.monotonic()
    beat = beat if beat.get("attempt") == job["attempt"] else {}
    over = over if over.get("attempt") == job["attempt"] else {}
    lives = bool(beat) and beat["ticks"] is not None and start_ticks(beat["pid"]) == beat["ticks"]
    try:
        size = os.path.getsize(os.path.join(folder, "log"))
    except OSError:
        size = 0
    still = now - beat["log_grew"] if beat and size == beat["log_bytes"] else 0.0
    silent = now - beat["now"] if beat and supervised else 0.0
    if over:
        state = "done"
    elif not lives and not supervised:
        state = "dead"
    elif still > quiet_seconds or silent > BEAT_STALE_SECONDS:
        state = "wedged"
    else:
        state = "running"
    return {
        "name": job["name"],
        "state": state,
        "rc": over.get("rc"),
        "argv": job["given"],
        "attempt": job["attempt"],
        "pid": beat.get("pid"),
        "seconds": over.get("seconds", (now if lives else beat["now"]) - beat["began"] if beat else 0.0),
        "still_seconds": max(still, silent) if not over else 0.0,
        "log_bytes": size,
    }


def start(request):
    """Start a job, or find it: one that lives or is over is only told about, unless `again` is asked for an old one."""
    folder = os.path.join(JOBS, request["name"])
    os.makedirs(folder, mode=0o700, exist_ok=True)
    lock = os.open(os.path.join(folder, "starting"), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)  # goes with this process
    before = read(folder, "job.json")
    if before and [before["given"], before["project"]] != [request["argv"], request["project"]]:
        return {"error": "other", "argv": before["given"]}
    now = status(folder, float("inf"))
    if now["state"] in ("running", "wedged") or (before and not request["again"]):
        return {"job": now, "started": False}
    if not os.path.isdir(os.path.expanduser(request["project"])):
        return {"error": "project"}
    for pid in marked(folder):  # what an earlier start left would write to the same files and hold the GPU's memory
        send_signal(pid, signal.SIGKILL)
    places = [os.path.join(VENV, "bin"), os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)]
    environment = {"PATH": os.pathsep.join(places), "PYTHONUNBUFFERED": "1"}
    if os.path.isdir(VENV):
        environment["VIRTUAL_ENV"] = VENV
    job = {"name": request["name"], "given": request["argv"], "project": request["project"]}
    lacks_python = request["argv"][0] == "python" and not shutil.which("python", path=environment["PATH"])
    argv = [sys.executable, *request["argv"][1:]] if lacks_python else request["argv"]
    job.update(argv=argv, attempt=before.get("attempt", 0) + 1, environment=environment)
    write(os.path.join(folder, "supervisor.py"), request["source"])
    write(os.path.join(folder, "job.json"), json.dumps(job))
    with open(os.path.join(folder, "supervisor.log"), "ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-I", os.path.join(folder, "supervisor.py"), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            cwd="/",
            start_new_session=True,
        )
    assert process.stdin
    process.stdin.write(json.dumps(request["secrets"]).encode() + b"\n")
    process.stdin.close()
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if any(read(folder, name).get("attempt") == job["attempt"] for name in ("heartbeat.json", "exit.json")):
            return {"job": status(folder, float("inf")), "started": True}
        if process.poll() is not None:
            break
        time.sleep(0.02)
    with open(os.path.join(folder, "supervisor.log"), "rb") as errors:
        return {"error": "supervisor", "said": errors.read()[-500:].decode("utf-8", "replace")}


def supervise(folder):
    """Beside the job as long as it lives: starts it, notes that it lives, and how it ended.

    Secrets come on stdin and go into the job's environment, nowhere else.
    """
    secrets = json.loads(sys.stdin.buffer.readline() or b"{}")
    alive = os.open(os.path.join(folder, "alive"), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(alive, fcntl.LOCK_EX)  # goes with this process
    job, log = read(folder, "job.json"), open(os.path.join(folder, "log"), "ab")  # noqa: SIM115
    began = grew = time.monotonic()
    size = log.tell()
    end = os.path.join(folder, "exit.json")
    try:
        child = subprocess.Popen(
            job["argv"],
            cwd=os.path.expanduser(job["project"]),
            env={**os.environ, **job["environment"], **secrets, MARK: folder},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    except OSError as error:
        log.write(f"cannot start {job['given'][0]}: {error.strerror}\n".encode())
        log.close()
        return write(end, json.dumps({"rc": 127, "attempt": job["attempt"], "seconds": 0.0}))
    secrets.clear()
    beat = {"pid": child.pid, "ticks": start_ticks(child.pid), "attempt": job["attempt"], "began": began}
    while True:
        now, before, size = time.monotonic(), size, os.fstat(log.fileno()).st_size
        grew = now if size != before else grew
        beat.update(now=now, log_bytes=size, log_grew=grew)
        write(os.path.join(folder, "heartbeat.json"), json.dumps(beat))
        try:
            rc = child.wait(BEAT_SECONDS)
            break
        except subprocess.TimeoutExpired:
            pass
    rc = 128 - rc if rc < 0 else rc  # as a shell says it: 137 is a SIGKILL
    write(end, json.dumps({"rc": rc, "attempt": job["attempt"], "seconds": time.monotonic() - began}))


def marked(folder):
    """The processes of a job, wherever they have moved: its mark stands in their environment."""
    found, mark = [], f"{MARK}={folder}".encode()
    for one in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{one}/environ", "rb") as file:
                if mark in file.read().split(b"\0"):
                    found.append(int(one))
        except OSError:
            pass
    return found


def send_signal(pid, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def stop(folder, grace_seconds):
    """SIGTERM to the job's first process, as long as `grace_seconds` to save its state, then SIGKILL to all it left."""
    now = status(folder, float("inf"))
    if now["state"] in ("running", "wedged") and now["pid"]:
        send_signal(now["pid"], signal.SIGTERM)
        until = time.monotonic() + grace_seconds
        while time.monotonic() < until and status(folder, float("inf"))["state"] not in ("done", "dead"):
            time.sleep(0.1)
    until = time.monotonic() + 10
    while (left := marked(folder)) and time.monotonic() < until:
        for pid in left:
            send_signal(pid, signal.SIGKILL)
        time.sleep(0.05)
    while time.monotonic() < until and status(folder, float("inf"))["state"] in ("running", "wedged"):
        time.sleep(0.05)
    return status(folder, float("inf"))


def tail(folder, offset, follow, out, source):
    """Write the log from a byte on; when following, until the job is over or the other end hangs up."""
    with open(os.path.join(folder, "log"), "ab+") as log:  # made where the job never began
        log.seek(offset)
        while True:
            lives = follow and status(folder, float("inf"))["state"] in ("running", "wedged")
            while block := log.read(1 << 16):
                out.write(block)
            out.flush()
            if not lives or (select.select([source], [], [], 0.3)[0] and not os.read(source.fileno(), 1)):
                return


def main():
    request = json.loads(sys.stdin.buffer.readline())
    os.makedirs(BASE, mode=0o700, exist_ok=True)
    write(os.path.join(BASE, "contact"), f"{time.monotonic()}\n")  # the watchdog looks whether this changes
    folder = os.path.join(JOBS, request.get("name") or "")
    verb = request["verb"]
    if verb == "tail":
        if read(folder, "job.json"):
            return tail(folder, request["offset"], request["follow"], sys.stdout.buffer, sys.stdin.buffer)
        sys.exit(3)
    if verb == "start":
        answer = start(request)
    elif verb == "stop":
        answer = {"job": stop(folder, request["grace_seconds"])}
    elif verb == "release":
        write(os.path.join(BASE, "released"), "everything of this machine is fetched\n")
        answer = {}
    else:
        names = [request["name"]] if request.get("name") else sorted(os.listdir(JOBS)) if os.path.isdir(JOBS) else []
        answer = {"jobs": [status(os.path.join(JOBS, name), request["quiet_seconds"]) for name in names]}
    print(json.dumps(answer))


if __name__ == "__main__":
    supervise(sys.argv[1]) if len(sys.argv) > 1 else main()
