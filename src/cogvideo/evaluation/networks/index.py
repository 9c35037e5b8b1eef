"""Source distributions from the package index that pip is set up to use. They are downloaded, never built or run."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from cogvideo.config import InputError, require
from cogvideo.files import sha256_of

if TYPE_CHECKING:
    from pypi_simple import PyPISimple
    from requests import RequestException

PYPI = "https://pypi.org/simple/"
TIMEOUT = 60.0
"""Seconds that a server may be silent, unless pip's settings give another timeout."""
CHUNK = 1 << 16
"""Bytes per write."""


@dataclass(frozen=True)
class SourceDistribution:
    """One file of a package index, identified by its hash."""

    project: str
    version: str
    num_bytes: int
    sha256: str

    def verify(self, path: Path, where: object) -> None:
        """Refuse any other file; messages call it `where`."""
        size, prefix = path.stat().st_size, f"{where} is not the source distribution {self.project} {self.version}"
        require(size == self.num_bytes, f"{prefix}: it has {size:,} bytes, expected {self.num_bytes:,}")
        got = sha256_of(path)
        require(got == self.sha256, f"{prefix}: its sha256 is {got}, expected {self.sha256}")


def download(wanted: SourceDistribution, path: Path, index: str | None = None) -> None:
    """Download a source distribution to `path`, from the first of pip's indexes that has it, or from `index` alone."""
    settings = pip_settings()
    reasons = []
    for url in _indexes(settings) if index is None else [index]:
        try:
            _download_from(url, wanted, path, settings)
        except LookupError as error:
            reasons.append(f"{_public(url)} {error}")
            continue
        wanted.verify(path, f"what {_public(url)} has")
        return
    advice = "pass --index URL for another index, or --from FILE for the file itself"
    raise InputError(f"cannot download {wanted.project} {wanted.version}: {'; '.join(reasons)}; {advice}")


def pip_settings() -> dict[str, str]:
    """Settings of pip for all commands and for `pip download`, by option, from its files and environment."""
    sections: dict[str, dict[str, str]] = {"global": {}, "download": {}}
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in listed.stdout.splitlines() if listed.returncode == 0 else ():  # an environment may lack pip
        name, _, value = line.partition("=")
        section, _, option = name.partition(".")
        if section in sections:
            sections[section][option] = str(ast.literal_eval(value))
    environment = {
        name.removeprefix("PIP_").lower().replace("_", "-"): value
        for name, value in os.environ.items()
        if name.startswith("PIP_") and value
    }
    return sections["global"] | sections["download"] | environment


def _indexes(settings: Mapping[str, str]) -> list[str]:
    alone = settings.get("no-index", "0").lower() not in ("0", "false", "no", "off")
    require(not alone, "pip is set up with no-index, expected an index: pass --index URL, or --from FILE")
    return [settings.get("index-url", PYPI), *settings.get("extra-index-url", "").split()]


def _download_from(url: str, wanted: SourceDistribution, path: Path, settings: Mapping[str, str]) -> None:
    """Download from one index."""
    from pypi_simple import NoSuchProjectError, PyPISimple, UnsupportedContentTypeError, UnsupportedRepoVersionError
    from requests import RequestException

    timeout = float(settings.get("timeout") or settings.get("default-timeout") or TIMEOUT)
    try:
        with PyPISimple(url) as client:
            client.s.verify = settings.get("cert") or True
            if proxy := settings.get("proxy"):
                client.s.proxies = {"http": proxy, "https": proxy}
            file = _file(client, wanted, timeout)
            _save(client, file, _credentials(url, file), wanted, path, timeout)
    except NoSuchProjectError:
        raise LookupError("has no such project") from None
    except RequestException as error:
        raise LookupError(_reason(error)) from error
    except (UnsupportedContentTypeError, UnsupportedRepoVersionError) as error:
        raise LookupError("is not a readable package index") from error


def _file(client: PyPISimple, wanted: SourceDistribution, timeout: float) -> str:
    """URL of the file."""
    for each in client.get_project_page(wanted.project, timeout).packages:
        if each.package_type == "sdist" and each.version == wanted.version:
            return each.url
    raise LookupError(f"lists no source distribution of version {wanted.version}")


def _credentials(index: str, file: str) -> tuple[str, str] | None:
    """Name and password of an index, only for files on the same host."""
    parts = urlsplit(index)
    if not parts.username or parts.hostname != urlsplit(file).hostname:
        return None
    return unquote(parts.username), unquote(parts.password or "")


def _save(
    client: PyPISimple, url: str, login: tuple[str, str] | None, wanted: SourceDistribution, path: Path, timeout: float
) -> None:
    columns = (TextColumn(f"{wanted.project} {wanted.version}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with client.s.get(url, stream=True, timeout=timeout, auth=login) as answer, path.open("wb") as file, bar:
        answer.raise_for_status()
        task = bar.add_task("", total=wanted.num_bytes)
        for chunk in answer.iter_content(CHUNK):
            file.write(chunk)
            bar.advance(task, len(chunk))
            more = file.tell() > wanted.num_bytes
            require(not more, f"{_public(url)} sends more than the {wanted.num_bytes:,} bytes of {wanted.project}")


def _reason(error: RequestException) -> str:
    """Why a request failed, in a few words; the error's own message is a paragraph."""
    from requests import exceptions

    if error.response is not None:
        return f"answers {error.response.status_code} {error.response.reason}"
    reasons = {
        exceptions.SSLError: "has a certificate that is not trusted",
        exceptions.ProxyError: "cannot be reached through the proxy",
        exceptions.Timeout: "does not answer in time",
        exceptions.ConnectionError: "cannot be reached",
        exceptions.ChunkedEncodingError: "broke off the download",
    }
    return next((text for kind, text in reasons.items() if isinstance(error, kind)), "is not an http or https index")


def _public(url: str) -> str:
    """A URL without name and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
