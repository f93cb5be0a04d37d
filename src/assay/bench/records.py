"""Records: one JSON line per finished run, flushed at once; a killed comparison loses nothing that was finished."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from assay import __version__, catalogue

PROTOCOL = 1
"""Version of the rules by which runs are made; lines of another version are never mixed in."""

_NO_PART_OF_A_RUN = {
    *("cli", "catalogue", "comparison", "evidence", "plots", "report", "statistics", "svg"),
    *("terminal", "wording"),
}
"""Modules that show or judge what was run, and change nothing in it."""

_KEY = ("protocol", "code", "task", "base", "arm", "phase", "trial", "seed", "options", "budget", "device")


class RecordError(OSError):
    """A record could not be written; the message says what is safe."""


def key(record: dict[str, Any]) -> str:
    """What makes two runs the same run: equal keys give equal results."""
    return json.dumps([record[name] for name in _KEY], sort_keys=True)


class Records:
    """The lines of a file, read once and added to at its end."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = Path(path) if path is not None else None
        self.lines: list[dict[str, Any]] = []
        self.damaged = 0
        self._ends_clean = True
        if self.path is not None and self.path.exists():
            self.lines = list(self._read())

    def _read(self) -> Iterator[dict[str, Any]]:
        assert self.path is not None
        text = self.path.read_bytes().decode("utf-8", errors="replace")
        self._ends_clean = not text or text.endswith("\n")
        for line in text.splitlines():
            try:
                record = json.loads(line)
                key(record)
            except (ValueError, KeyError, TypeError):
                self.damaged += bool(line.strip())
            else:
                if record["protocol"] == PROTOCOL:
                    yield record

    def known(self) -> dict[str, dict[str, Any]]:
        """Finished runs by key."""
        return {key(record): record for record in self.lines}

    def add(self, record: dict[str, Any]) -> None:
        """Append a line and see it to the disk; raises :class:`RecordError` and leaves no half line behind."""
        self.lines.append(record)
        if self.path is None:
            return
        # A line that a crash cut in half is closed first, so that it spoils itself and nothing else.
        line = ("" if self._ends_clean else "\n") + json.dumps(record, sort_keys=True, allow_nan=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                self._append(file, line.encode())
        except OSError as error:
            raise RecordError(
                f"cannot write to {self.path}: {error.strerror or error}. The {len(self.lines) - 1} runs recorded "
                "before are safe; make room and start the same command again to go on."
            ) from error
        self._ends_clean = True

    @staticmethod
    def _append(file: Any, line: bytes) -> None:
        # In append mode the position stays at 0 until the first write; the cut below needs the true end.
        start = file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += file.write(line[written:])
            os.fsync(file.fileno())
        except OSError:
            if file.seekable() and written:
                file.truncate(start)
            raise


@functools.cache
def code_version() -> str:
    """The release and a digest of what makes a run: a run of other code is not taken for a run of this one."""
    digest = hashlib.sha256()
    for path in sorted(catalogue.SOURCE.rglob("*.py")):
        if path.stem not in _NO_PART_OF_A_RUN and not path.name.startswith(("test_", "claim")):
            digest.update(path.relative_to(catalogue.SOURCE).as_posix().encode() + path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:10]}"


@functools.cache
def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    from importlib.metadata import version

    names = ("torch", "numpy", "scipy", "scikit-learn")
    return {
        "versions": {"assay": __version__, "python": platform.python_version(), **{n: version(n) for n in names}},
        "machine": {"system": platform.system(), "processor": _processor(), "cores": os.cpu_count()},
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def each(call: Callable[[Any], Any], value: Any) -> Any:
    """The same with ``call`` of what a dictionary or a list holds; anything else as it is."""
    if isinstance(value, dict):
        return {name: call(item) for name, item in value.items()}
    return [call(item) for item in value] if isinstance(value, list | tuple) else value


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file whole or not at all."""
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, target)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise RecordError(f"cannot write {target}: {error.strerror or error}") from error
