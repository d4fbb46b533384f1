"""Files between two machines; the same code runs on both ends (here as a module, there as `python3 -c`).

A file travels as a frame: a line of JSON (name, size, mtime_ns, mode, offset), its bytes from the offset on, a line of
JSON with the SHA-256 of the whole file. It is received beside its place, checked, synced and renamed. What a broken
connection leaves in `.incoming` is the beginning of that very file, and is continued.

Standard library and Python 3.8 only. The other end may be hostile: names are checked, links never followed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import time

INCOMING = ".incoming"
LOST = "the connection was lost"
BLOCK = 1 << 18
HELD = 100
"""Files held open at once."""
UNFINISHED = re.compile(r".+\.[A-Za-z0-9]+\.[a-z0-9_]{8}")


class Broken(Exception):
    """The other end sent what it should not, or stopped in the middle."""


def is_safe(name):
    """Whether a name stays below the folder it is for, and can be printed."""
    parts = name.split("/")
    return (
        len(name) < 1024
        and name.isprintable()
        and "\\" not in name
        and not any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
        and parts[0] != INCOMING
    )


def is_version(size, mtime_ns):
    """Whether these can be a file's size and date."""
    return type(size) is int and type(mtime_ns) is int and size >= 0 and -(2**63) < mtime_ns < 2**63


def key(name, size, mtime_ns):
    """Names what was begun of one version of one file."""
    return hashlib.sha256(f"{name}\n{size}\n{mtime_ns}".encode()).hexdigest()[:32]


def facts(path):
    """[size, mtime_ns, executable] of a regular file; None for all else."""
    try:
        about = os.lstat(path)
    except OSError:
        return None
    return [about.st_size, about.st_mtime_ns, bool(about.st_mode & 0o100)] if stat.S_ISREG(about.st_mode) else None


def is_unfinished(path, name):
    """Whether a file is one that is being written beside its place, to be renamed."""
    if name.startswith(".") or name.endswith(".partial"):
        return True
    return bool(UNFINISHED.fullmatch(name)) and stat.S_IMODE(os.lstat(path).st_mode) == 0o600


def walk(root, below):
    """The finished files of a folder, or below the paths named, {name: facts}, and names that are not sent."""
    found, odd = {}, []
    for start in below or [""]:
        top = os.path.join(root, start)
        if start and facts(top):
            found[start] = facts(top)
        for folder, folders, files in os.walk(top):
            folders[:] = sorted(one for one in folders if not one.startswith("."))
            for file in sorted(files):
                path = os.path.join(folder, file)
                known, name = facts(path), os.path.relpath(path, root)
                if known and not is_unfinished(path, file):
                    if is_safe(name):
                        found[name] = known
                    else:
                        odd.append(name)
    return {"files": found, "odd": odd}


def begun(root):
    """{key: bytes} of what lies in `.incoming`."""
    folder = os.path.join(root, INCOMING)
    try:
        there = {one: facts(os.path.join(folder, one)) for one in os.listdir(folder)}
    except OSError:
        return {}
    return {one: known[0] for one, known in there.items() if known}


def send(root, wanted, out):
    """Write a frame for each [name, size, mtime_ns, offset] wanted; from the start if that version is no more.

    Files are opened before the first is sent: a checkpoint that a run drops meanwhile is sent all the same.
    """
    held = {name: _opened(os.path.join(root, name)) for name, *_ in wanted[:HELD]}
    for name, size, mtime_ns, offset in wanted:
        file = held.pop(name, None) or _opened(os.path.join(root, name))
        if file is None:
            _line(out, {"name": name, "missing": True})
            continue
        with file:
            about = os.fstat(file.fileno())
            whole = _whole_lines(file, about.st_size) if name.endswith(".jsonl") else about.st_size
            if (whole, about.st_mtime_ns) != (size, mtime_ns):
                offset = 0
            head = {
                "name": name,
                "size": whole,
                "mtime_ns": about.st_mtime_ns,
                "executable": bool(about.st_mode & 0o100),
            }
            _line(out, {**head, "offset": offset})
            digest, left = hashlib.sha256(), whole
            file.seek(0)
            while left:
                block = file.read(min(BLOCK, left))
                if not block:
                    block = b"\0" * min(BLOCK, left)  # it shrank meanwhile: the digest below says so
                    digest.update(b"shrunk")
                digest.update(block)
                skip = max(0, min(len(block), offset - (whole - left)))
                out.write(block[skip:])
                left -= len(block)
            _line(out, {"sha256": digest.hexdigest()})
    _line(out, {"end": True})
    out.flush()


def _opened(path):
    """A regular file to be read; None where there is none."""
    try:
        return open(path, "rb") if facts(path) else None
    except OSError:
        return None


def _whole_lines(file, size):
    """The size of a growing file of records up to its last whole one; the very last may lack a line end."""
    end, at = size, -1
    while end > 0 and at < 0:
        start = max(0, end - BLOCK)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        end = start + at + 1 if at >= 0 else start
    file.seek(end)
    try:
        return size if isinstance(json.loads(file.read(size - end)), dict) else end
    except ValueError:
        return end


def receive(source, root, expected=None, progress=None):
    """Place the files of a stream of frames; ([names placed], {name: why not}).

    expected: {name: size at most} that may come, by default any safe name. A `.json` beside a file that failed is not
    placed: it vouches for it. Raises `Broken` where the stream ends early; what came is kept.
    """
    incoming = os.path.join(root, INCOMING)
    lock = _alone(incoming)
    try:
        placed, failed = _receive(source, root, incoming, expected, progress)
        shutil.rmtree(incoming)  # what is still there was begun of versions that are no more
        return placed, failed
    finally:
        os.close(lock)


def _alone(folder, seconds=30.0):
    """A lock on a folder; the one before us may be the end of a connection that has just been lost."""
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            os.makedirs(folder, exist_ok=True)
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock), os.stat(folder)):  # the one before us may have removed it
                    return os.dup(lock)
            finally:
                os.close(lock)
        if time.monotonic() > until:
            raise Broken(f"another transfer into {os.path.dirname(folder)} is at work")
        time.sleep(0.2)


def _receive(source, root, incoming, expected, progress):
    placed, failed, hurt, expected = [], {}, set(), None if expected is None else dict(expected)
    while True:
        head = _read_line(source)
        if head.get("end"):
            break
        name = head.get("name")
        if not isinstance(name, str) or not is_safe(name) or (expected is not None and name not in expected):
            raise Broken(f"the other end sent a file that was not asked for: {str(name)[:80]!r}")
        folder = os.path.dirname(name)
        most = None if expected is None else expected.pop(name)  # nothing comes twice
        why = "it is gone" if head.get("missing") else _take(source, incoming, head, most, progress)
        if why is None and name.endswith(".json") and folder in hurt:
            why = "a file beside it is missing"
        why = why or _place(root, incoming, head)
        if why:
            failed[name] = why
            hurt.add(folder)
        else:
            placed.append(name)
    return placed, failed


def _take(source, incoming, head, most, progress):
    """Read one file's bytes into `.incoming`; what is wrong with them, or None."""
    name, size, offset = head["name"], head.get("size"), head.get("offset")
    if not (is_version(size, head.get("mtime_ns")) and type(offset) is int and 0 <= offset <= size):
        raise Broken(f"the other end described {name} wrongly")
    if most is not None and size > most:
        raise Broken(f"the other end sent more of {name} than it said there was")
    path = os.path.join(incoming, key(name, size, head["mtime_ns"]))
    digest = hashlib.sha256()
    with open(path, "r+b" if os.path.exists(path) else "w+b") as file:
        while file.tell() < offset:
            block = file.read(min(BLOCK, offset - file.tell()))
            if not block:
                raise Broken(f"the other end began {name} in the middle")
            digest.update(block)
        file.truncate()
        left = size - offset
        while left:
            block = source.read(min(BLOCK, left))
            if not block:
                raise Broken(LOST)
            file.write(block)
            digest.update(block)
            left -= len(block)
            if progress:
                progress(len(block))
        file.flush()
        os.fsync(file.fileno())
    if _read_line(source).get("sha256") != digest.hexdigest():
        os.unlink(path)
        return "its bytes changed on the way"
    return None


def _place(root, incoming, head):
    """Rename a received file to its name; why that cannot be, or None."""
    name = head["name"]
    path, at = os.path.join(incoming, key(name, head["size"], head["mtime_ns"])), root
    for part in name.split("/")[:-1]:
        at = os.path.join(at, part)
        if os.path.islink(at):
            return f"{at} is a link"
        try:
            os.mkdir(at)
        except FileExistsError:
            if not os.path.isdir(at):
                return f"{at} is a file"
    final = os.path.join(root, name)
    if os.path.isdir(final):
        return "it is a folder at the receiver"
    os.chmod(path, 0o755 if head.get("executable") else 0o644)
    os.utime(path, ns=(head["mtime_ns"], head["mtime_ns"]))
    os.replace(path, final)
    return None


def forget(root, manifest, names):
    """Delete what an earlier push brought and this one does not, and record what there is; the names deleted."""
    path = os.path.join(root, manifest)
    try:
        with open(path) as file:
            before = json.load(file)
    except (OSError, ValueError):
        before = []
    gone = [one for one in before if one not in set(names) and is_safe(one) and facts(os.path.join(root, one))]
    for one in gone:
        os.unlink(os.path.join(root, one))
    with open(path + ".partial", "w") as file:
        json.dump(sorted(names), file)
    os.replace(path + ".partial", path)
    return gone


def _line(out, value):
    out.write(json.dumps(value).encode() + b"\n")


def _read_line(source):
    line = source.readline(1 << 16)
    if not line.endswith(b"\n"):
        raise Broken(LOST)
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Broken("the other end does not speak our language")
    return value


def main():
    """One request, a line of JSON on stdin, is answered on stdout."""
    source, out = sys.stdin.buffer, sys.stdout.buffer
    request = json.loads(source.readline())
    root = os.path.expanduser(request["root"])
    if request["verb"] == "walk":
        _line(out, walk(root, request["below"]))
    elif request["verb"] == "look":
        os.makedirs(root, exist_ok=True)
        known = {name: facts(os.path.join(root, name)) for name in request["names"]}
        _line(out, {"files": known, "begun": begun(root), "free": shutil.disk_usage(root).free})
    elif request["verb"] == "send":
        send(root, request["wanted"], out)
    elif request["verb"] == "receive":
        placed, failed = receive(source, root)
        gone = forget(root, request["manifest"], request["names"]) if request["manifest"] and not failed else []
        _line(out, {"placed": placed, "failed": failed, "gone": gone})


if __name__ == "__main__":
    main()
