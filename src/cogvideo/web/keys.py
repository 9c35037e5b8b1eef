"""API keys: random tokens; a file holds only their names and hashes."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from pathlib import Path

from cogvideo.config import require
from cogvideo.files import wait_for_lock, write_text

LOCAL = "local"
"""Owner of everything on a server without keys."""
NAME = r"[\w.-]{1,60}"


class Keys:
    """The keys in a file, which is read again when it changes.

    Args:
        path: file with a name and a SHA-256 hash per line. The keys are random, so a slow hash would add nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._hashes: dict[str, str] = {}

    def owner(self, key: str) -> str | None:
        """Name of a key, found in a time independent of the key; None if there is none."""
        digest = _digest(key)
        found = None
        for name, known in self.read().items():
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def read(self) -> dict[str, str]:
        """Hashes by name; none if there is no file."""
        if not self.path.exists():
            return {}
        state = self.path.stat()
        if self._stamp != (state.st_mtime_ns, state.st_size):
            lines = [line.split() for line in self.path.read_text(encoding="utf-8").splitlines() if line.strip()]
            for number, line in enumerate(lines, 1):
                is_key = len(line) == 2 and re.fullmatch(NAME, line[0]) and re.fullmatch("[0-9a-f]{64}", line[1])
                require(
                    bool(is_key), f"{self.path}, key {number}: expected a name and a hash, as `cogvideo key` writes"
                )
            self._hashes = dict(lines)
            self._stamp = (state.st_mtime_ns, state.st_size)
        return self._hashes

    def add(self, name: str) -> str:
        """Make a key; only this return value has it."""
        is_name = re.fullmatch(NAME, name) is not None and name != LOCAL
        expected = f"expected up to 60 letters, digits, dots and dashes, other than {LOCAL}"
        require(is_name, f"the name is {name!r:.80}, {expected}")
        key = f"cv-{secrets.token_urlsafe(32)}"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with wait_for_lock(self.path.parent):
            there = self.read()
            require(
                name not in there, f"{self.path} has a key with the name {name}: choose another, or delete its line"
            )
            lines = [f"{each} {digest}\n" for each, digest in (there | {name: _digest(key)}).items()]
            write_text(self.path, "".join(lines))
        return key


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()
