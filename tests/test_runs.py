"""Run folders: the identity of a run, what a killed run leaves, and reports."""

import errno
import json
import os
import resource
from dataclasses import asdict

import pytest
import torch

from cogvideo.config import CogVideoConfig, upgraded
from cogvideo.runs import TYPED, RunFolder


def test_a_run_is_claimed_once(tmp_path):
    """Prevents mixing two recipes in one folder; the message names the difference."""
    RunFolder(tmp_path).claim({"steps": 10, "settings": {"rate": 0.1, "widths": (1, 2)}})
    RunFolder(tmp_path).claim({"steps": 10, "settings": {"rate": 0.1, "widths": (1, 2)}})
    with pytest.raises(ValueError, match=r"another run began in .*: settings.rate was 0.1 and is 0.2; pass the same"):
        RunFolder(tmp_path).claim({"steps": 10, "settings": {"rate": 0.2, "widths": (1, 2)}})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="cannot use"):
        RunFolder(tmp_path).claim({"steps": 10})


def test_a_folder_makes_room(tmp_path):
    """Guards an earlier run's measurements, which are kept under the next free number."""
    folder = RunFolder(tmp_path / ".run")
    assert folder.summary is None
    assert not folder.path.exists(), "where a run was looked for"
    for steps in (1, 2, 3):
        assert folder.changes({"steps": steps}) == ""
        folder.claim({"steps": steps})
        assert folder.changes({"steps": 0}) == f"steps was {steps} and is 0"
        assert folder.set_aside() == tmp_path / f".run-{steps}"
        assert list(folder.path.iterdir()) == []
    assert json.loads((tmp_path / ".run-2" / "run.json").read_text()) == {"steps": 2}


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """Checks that a run whose configuration has old names for the samplers counts as the same run."""
    config = json.loads(json.dumps(asdict(CogVideoConfig())))
    old = {name: value for name, value in config.items() if name != "text_bonus" and "_sampling" not in name}
    old["drawing"] = {"first_temperature": 1.0, "first_clusters": 16, "temperature": 1.05, "clusters": 12}
    old["drawing"] |= {"first_guidance": 1.0, "guidance": 3.0, "text_bonus": 1.4}
    RunFolder(tmp_path).claim({"config": old})
    RunFolder(tmp_path).claim({"config": config})
    old["drawing"]["guidance"] = 2.0
    with pytest.raises(ValueError, match=r"config\.later_sampling\.guidance was 3\.0 and is 2\.0"):
        RunFolder(tmp_path).claim({"config": upgraded(old)})


def test_facts_may_change(tmp_path):
    """Checks that a run that was moved counts as the same run, and records where its inputs are now."""
    RunFolder(tmp_path).claim({"steps": 10}, {"from": "/there"})
    RunFolder(tmp_path).claim({"steps": 10}, {"from": "/here"})
    assert json.loads((tmp_path / "run.json").read_text()) == {"steps": 10, "from": "/here"}
    with pytest.raises(ValueError, match=r"another run began in .*: steps was 10 and is 11; pass"):
        RunFolder(tmp_path).claim({"steps": 11}, {"from": "/there"})


def test_what_the_user_typed_is_shown(tmp_path):
    """Guards users who typed the name of a bundle: a truncated hash alone would mean nothing to them."""
    one, other = "ab5f8b705cd3" * 5 + "abcd", "1" * 64
    RunFolder(tmp_path).claim({"init": one}, {TYPED: "pocket"})
    for identity, typed, told in (
        (None, None, "init was pocket \\(sha256 ab5f8b705cd3\\) and is None"),
        (other, "mine", r"init was pocket \(sha256 ab5f8b705cd3\) and is mine \(sha256 111111111111\)"),
    ):
        with pytest.raises(ValueError, match=rf"another run began in .*: {told}; pass the same"):
            RunFolder(tmp_path).claim({"init": identity}, {TYPED: typed})
    (tmp_path / "run.json").write_text(json.dumps({"init": one}))  # from before the name was stored
    assert RunFolder(tmp_path).changes({"init": None}) == "init was sha256 ab5f8b705cd3 and is None"


def in_a_child(work):
    """Run work in a child process, which may limit itself; return the errno and file name of its OSError."""
    found, tells = os.pipe()
    if not os.fork():
        try:
            work()
        except OSError as error:
            os.write(tells, f"{error.errno} {error.filename}".encode())
        finally:
            os._exit(0)
    os.close(tells)
    with os.fdopen(found) as file:
        number, _, name = file.read().partition(" ")
    os.wait()
    return int(number), name


def test_a_checkpoint_that_cannot_be_opened_is_not_called_foreign(tmp_path):
    """Prevents blaming a file when the process has too many open files."""
    folder = RunFolder(tmp_path)
    torch.save((1, {"a": torch.ones(2)}), tmp_path / "checkpoint.pt")

    def refused():
        folder.old_checkpoint()  # so that all modules are imported
        free = os.open(os.devnull, os.O_RDONLY)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))
        folder.old_checkpoint()

    assert in_a_child(refused) == (errno.EMFILE, str(tmp_path / "checkpoint.pt"))


def test_a_foreign_checkpoint_is_refused(tmp_path):
    """Guards against a traceback for a file that is not a checkpoint."""
    (tmp_path / "checkpoint.pt").write_bytes(b"text")
    with pytest.raises(ValueError, match="it is not a checkpoint"):
        RunFolder(tmp_path).old_checkpoint()


def test_lines_behind_the_checkpoint_are_made_again(tmp_path):
    """Prevents steps from appearing twice in the metrics, and a truncated line from breaking every reader."""
    folder = RunFolder(tmp_path)
    for step in (5, 10, 15):
        folder.report({"step": step, "loss": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    folder.forget_after(10)
    folder.report({"step": 15, "loss": 0.4})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 5, "loss": 0.5}, {"step": 10, "loss": 0.5}, {"step": 15, "loss": 0.4}]


def test_a_run_is_over_when_it_says_so(tmp_path):
    """Prevents a run from counting as finished before it has written its report."""
    folder = RunFolder(tmp_path)
    assert folder.summary is None
    folder.finish({"psnr": 20.5})
    assert RunFolder(tmp_path).summary == {"psnr": 20.5}


@pytest.mark.parametrize("content", [b"\xff\xfe{\n", b"{half\n"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "report.json"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    """Checks that the message names the damaged file, even if its bytes are not text."""
    (tmp_path / name).write_bytes(content)
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match=rf"cannot use .*{name}: "):
        assert folder.rows() or folder.summary
