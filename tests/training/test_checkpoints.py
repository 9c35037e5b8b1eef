"""Checkpoints: complete or absent, however the run is killed; the last ones and the best are kept, and damaged or
mismatched ones are refused. Multiple ranks are tested in test_training_parallel.py.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideo.devices import is_out_of_memory
from cogvideo.training.checkpoints import Checkpoints, read_weights, restore, training_state
from cogvideo.training.parallel import ALONE
from killing import kill_at
from parallel_worker import SHARDED, Run, make_objective


def state_of(step: int, size: int = 3) -> dict[str, Any]:
    """A state with the step encoded in every value."""
    return {
        "weights": {"a.weight": torch.full((size, 2), float(step)), "b": torch.tensor([step + 0.5])},
        "optimizer": {"state": {"a.weight": {"exp_avg": torch.full((size, 2), step / 3)}}},
        "average": {"a.weight": torch.full((size, 2), -float(step)), "b": torch.tensor([-step - 0.5])},
        "seconds": step * 1.5,
    }


def saved_in(folder: Path, losses: dict[int, float | None], **options: Any) -> Checkpoints:
    """Save checkpoints at these steps, with these held-out losses."""
    checkpoints = Checkpoints(folder, **options)
    for step, loss in losses.items():
        checkpoints.save(step, state_of(step), loss)
    checkpoints.wait()
    return checkpoints


def same(one: Any, other: Any) -> bool:
    """True if nested tables are equal, with tensors compared bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def assert_whole(checkpoints: Checkpoints, step: int) -> None:
    """Check that a checkpoint loads exactly the state saved at that step."""
    assert same(checkpoints.load(step, state_of(0)), state_of(step))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_saved_is_loaded(tmp_path: Path, asynchronous: bool) -> None:
    """Every part of a state must round-trip, even if training changes the weights while they are being written."""
    checkpoints = Checkpoints(tmp_path / "not" / "there", asynchronous=asynchronous)
    state = state_of(7, 200_000)
    checkpoints.save(7, state, 0.5)
    state["weights"]["a.weight"].fill_(99)  # training continues
    state["average"]["b"].fill_(99)
    checkpoints.wait()
    assert checkpoints.steps() == [7]
    assert same(checkpoints.load(7, state_of(0, 200_000)), state_of(7, 200_000))
    assert same(read_weights(checkpoints.path(7), averaged=False), state_of(7, 200_000)["weights"])
    assert same(read_weights(checkpoints.path(7), averaged=True), state_of(7, 200_000)["average"])


def test_nothing_has_its_name_before_it_is_written(tmp_path: Path) -> None:
    """Prevents an unfinished asynchronous save from being listed; the next save waits for it."""
    checkpoints = Checkpoints(tmp_path, keep=9, asynchronous=True)
    for step in range(1, 5):
        checkpoints.save(step, state_of(step, 100_000))
        assert checkpoints.steps() == list(range(1, step))
    checkpoints.wait()
    for step in range(1, 5):
        assert same(checkpoints.load(step, state_of(0, 100_000)), state_of(step, 100_000))


@pytest.mark.parametrize("base", ["frozen", "trained"])
@pytest.mark.parametrize("stage", ["sequential", "superres"])
def test_a_stage_continues_from_its_checkpoint(tmp_path: Path, stage: str, base: str) -> None:
    """Weights and optimizer state must be restored bit for bit in every stage, even if some trained weights never get a
    gradient. Frozen weights are not saved."""
    run, other = (Run(make_objective(stage, base, seed), SHARDED, ALONE) for seed in (0, 9))
    trained = {name for name, each in run.objective.named_parameters() if each.requires_grad}
    for number in range(2):
        run.step(number)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, run.state())
    assert read_weights(checkpoints.path(2), averaged=False).keys() == trained
    restore(other.module, [other.optimizer], checkpoints.load(2, other.state()))
    for (name, mine), theirs in zip(run.objective.named_parameters(), other.objective.parameters(), strict=True):
        assert torch.equal(mine, theirs) or name not in trained
        if name not in trained:
            theirs.data.copy_(mine.data)
    assert [run.step(number) for number in (2, 3)] == [other.step(number) for number in (2, 3)]
    assert all(
        torch.equal(*pair) for pair in zip(run.objective.parameters(), other.objective.parameters(), strict=True)
    )


@pytest.mark.parametrize("fused", [None, True])
def test_the_kernel_of_the_optimizer_is_that_of_the_device(tmp_path: Path, fused: bool | None) -> None:
    """Prevents restoring an optimizer's fused setting, so runs can resume on other devices or from old checkpoints."""
    made = []
    for each in (None if fused else True, fused):
        module = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(module.parameters(), fused=each)
        made.append((module, optimizer))
        module(torch.ones(3)).sum().backward()
        optimizer.step()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, training_state(made[0][0], [made[0][1]], None))
    module, optimizer = made[1]
    restore(module, [optimizer], checkpoints.load(1, training_state(module, [optimizer], None)))
    assert [group["fused"] for group in optimizer.param_groups] == [fused]
    assert torch.equal(module.weight, made[0][0].weight)
    optimizer.step()


@pytest.mark.parametrize("step", [4, 5])
def test_whenever_a_run_is_killed_what_has_a_name_is_whole(tmp_path: Path, step: int) -> None:
    """Checks the renames by kills between any two file system changes of a save that adds, replaces, or removes
    checkpoints. Listed ones are complete, the best and one of the newest two survive, and the next save cleans up."""
    saved_in(tmp_path / "before", {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0}, keep=3)
    for number in count(1):
        folder = tmp_path / f"killed-{number}"
        shutil.copytree(tmp_path / "before", folder)
        killed = kill_at(number, lambda: Checkpoints(folder, 1).save(step, state_of(step), 5.0))  # noqa: B023
        checkpoints = Checkpoints(folder, keep=1)
        assert checkpoints.steps()[-1] in ((3, 4) if step == 4 else (4, 5))
        assert checkpoints.best() == 2
        for each in checkpoints.steps():
            assert_whole(checkpoints, each)
        checkpoints.save(6, state_of(6), 6.0)
        assert sorted(each.name for each in folder.iterdir()) == ["step-00000002", "step-00000006"]
        if not killed:
            break
    assert number > 15, "the save was over before it was killed often"


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    """Keeps the last checkpoints and the best: the first of equals, none if nothing was measured, never NaN."""
    losses = [None, float("nan"), float("inf"), 3.0, 2.0, float("nan"), 2.0, None, 1.0, 5.0]
    for keep in (1, 2, 3):
        checkpoints, best = Checkpoints(tmp_path / str(keep), keep), None
        for step, loss in enumerate(losses, 1):
            checkpoints.save(step, state_of(step), loss)
            if loss in (3.0, 2.0, 1.0) and (best is None or loss < losses[best - 1]):  # type: ignore[operator]
                best = step
            expected = set(range(max(1, step - keep + 1), step + 1)) | ({best} if best else set())
            assert set(checkpoints.steps()) == expected
            assert checkpoints.best() == best
            assert checkpoints.steps()[-1] == step
        for step in checkpoints.steps():
            assert_whole(checkpoints, step)


def test_looking_at_a_run_leaves_it_alone(tmp_path: Path) -> None:
    """Reading a live run, as exports do, must not remove the checkpoint that is being written."""
    saved_in(tmp_path, {1: 1.0, 2: 2.0})
    (tmp_path / ".step-00000003").mkdir()
    looking = Checkpoints(tmp_path, keep=0)
    assert (looking.steps(), looking.steps()[-1], looking.best()) == ([1, 2], 2, 1)
    assert (tmp_path / ".step-00000003").exists()
    Checkpoints(tmp_path)
    assert not (tmp_path / ".step-00000003").exists()


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    """Files that users put next to checkpoints, such as copies, must not be listed as checkpoints."""
    checkpoints = saved_in(tmp_path, {1: 1.0})
    shutil.copytree(checkpoints.path(1), tmp_path / "step-00000002.bak")
    (tmp_path / "step-notes").touch()
    assert checkpoints.steps() == [1]
    assert Checkpoints(tmp_path / "nowhere").steps() == []
    assert Checkpoints(tmp_path / "nowhere").best() is None


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes] | None]] = {
    "no index": (".metadata", None),
    "empty index": (".metadata", lambda _: b""),
    "short index": (".metadata", lambda content: content[: len(content) // 2]),
    "other index": (".metadata", lambda _: b"no index at all"),
    "no tensors": ("__0_0.distcp", None),
    "empty tensors": ("__0_0.distcp", lambda _: b""),
    "short tensors": ("__0_0.distcp", lambda content: content[:1000]),
    "other tensors": ("__0_0.distcp", lambda content: bytes(len(content))),
}
UNSEEN: dict[str, tuple[str, Callable[[bytes], bytes] | None]] = {
    "a bit of a tensor": ("__0_0.distcp", lambda content: content.replace(bytes(4), b"\0\0\0\x01", 1)),
    "no hashes": ("hashes-0.json", lambda _: b""),
    "other hashes": ("hashes-0.json", lambda _: b"[]"),
}
"""Damage that only hashes can detect."""


def old(path: Path) -> None:
    """Turn a checkpoint into one from before hashes were added."""
    (path / "hashes-0.json").unlink()


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("damage", DAMAGES | UNSEEN)
def test_a_damaged_one_is_named(tmp_path: Path, damage: str, hashed: bool) -> None:
    """A damaged checkpoint fails with one line that says which folder to remove; the earlier one then loads."""
    checkpoints = saved_in(tmp_path, {1: 1.0, 2: 2.0})
    if not hashed:
        if damage in UNSEEN:
            pytest.skip("nothing says what was written")
        old(checkpoints.path(2))
    name, change = (DAMAGES | UNSEEN)[damage]
    path = checkpoints.path(2) / name
    path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    for look in (lambda: checkpoints.load(2, state_of(0)), lambda: read_weights(checkpoints.path(2), averaged=True)):
        with pytest.raises(
            ValueError, match=r"step-00000002 is damaged \(.+\); remove it to use an earlier one"
        ) as info:
            look()
        assert "\n" not in str(info.value)
        assert len(str(info.value)) < 350
        assert re.search(
            r"damaged \((its content is cut short or was changed|No such file or directory)\);", str(info.value)
        )
    shutil.rmtree(checkpoints.path(2))
    assert checkpoints.steps()[-1] == 1
    assert_whole(checkpoints, 1)


def in_a_child(work: Callable[[], bool]) -> bool:
    """Run work in a child process, with its own resource limits; returns True if the work does."""
    if process := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    try:
        os._exit(0 if work() else 2)
    finally:
        os._exit(1)


@pytest.mark.parametrize("hashed", [True, False])
def test_what_cannot_be_opened_is_not_damaged(tmp_path: Path, hashed: bool) -> None:
    """Guards against a regression: with too many open files, an intact checkpoint was renamed as damaged, and the run
    resumed from an older one."""
    checkpoints = saved_in(tmp_path, {1: 1.0, 2: 2.0})
    if not hashed:
        old(checkpoints.path(2))

    def refused() -> bool:
        checkpoints.load(2, state_of(0))  # loads all modules
        free = os.open(os.devnull, os.O_RDONLY)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))
        looks = (lambda: checkpoints.load(2, state_of(0)), lambda: read_weights(checkpoints.path(2), averaged=True))
        errors = []
        for look in (*looks, checkpoints.best):
            try:
                look()
            except OSError as error:
                errors.append(error)
        named = [str(tmp_path) in str(each.filename) and "Too many open files" in each.strerror for each in errors]
        return named == [True] * 3 and {each.errno for each in errors} == {errno.EMFILE}

    assert in_a_child(refused)
    assert_whole(checkpoints, 2)
    assert checkpoints.steps() == [1, 2]


LARGE = 6 << 20
"""Number of rows for 48 MiB of weights."""


def load_with_little_memory(folder: str) -> None:
    """Print whether loading a checkpoint is refused for lack of memory."""
    state = state_of(0, LARGE)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + (24 << 20)  # enough for threads, not for the weights
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        Checkpoints(Path(folder)).load(1, state)
    except (MemoryError, RuntimeError) as error:
        print("refused" if is_out_of_memory(error) else repr(error))


@pytest.mark.parametrize("hashed", [True, False])
def test_what_does_not_fit_in_memory_is_not_damaged(tmp_path: Path, hashed: bool) -> None:
    """Running out of memory must not count as damage to the checkpoint. A new process is needed, since an old one may
    have free memory that the limit does not count."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(1, LARGE))
    if not hashed:
        old(checkpoints.path(1))
    here = Path(__file__).parent
    load = f"import test_checkpoints; test_checkpoints.load_with_little_memory({str(tmp_path)!r})"
    code = f"import sys; sys.path.append({str(here.parent)!r}); {load}"
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize("content", ["", "[]", "{}", None])
def test_a_damaged_loss_is_passed_over(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """An old checkpoint with an unreadable loss must not end the run: it is reported once, never the best, and kept."""
    checkpoints = saved_in(tmp_path, {1: 1.0, 2: 3.0, 3: 2.0}, keep=3)
    path = checkpoints.path(1) / "state.json"
    path.unlink() if content is None else path.write_text(content)
    checkpoints = saved_in(tmp_path, {4: 4.0, 5: 5.0}, keep=1)
    assert checkpoints.best() == 3
    assert checkpoints.steps() == [1, 3, 5]
    (told,) = capsys.readouterr().err.splitlines()
    assert re.search(r"step-00000001 is damaged \(state.json: [^:]+\): it is skipped.$", told)


def test_a_damaged_one_makes_room(tmp_path: Path) -> None:
    """A checkpoint set aside as damaged must not count as the newest or toward `keep`; its step can be saved again."""
    checkpoints = saved_in(tmp_path, {1: 1.0, 2: None, 3: None}, keep=3)
    for _ in range(2):
        checkpoints.set_aside(3)
        assert (checkpoints.steps(), checkpoints.steps()[-1]) == ([1, 2], 2)
        assert (tmp_path / "damaged-step-00000003" / "state.json").exists()
        checkpoints.save(3, state_of(3))
    assert_whole(checkpoints, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.weight": torch.zeros(4, 2)}, r"weights a.weight is \(3, 2\) there and \(4, 2\) here"),
        ({"c": torch.zeros(1)}, r"weights c is absent there and \(1,\) here"),
        ({"b": None}, r"weights b is \(1,\) there and absent here"),
    ],
)
def test_another_configuration_is_refused(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    """Prevents loading only part of other weights: the error names the differing weight and both shapes."""
    checkpoints = saved_in(tmp_path, {1: 1.0})
    state = state_of(0)
    state["weights"] = {name: each for name, each in (state["weights"] | change).items() if each is not None}
    with pytest.raises(ValueError, match=f"step-00000001 is of another configuration: {message}"):
        checkpoints.load(1, state)
    state = state_of(0)
    del state["average"]
    with pytest.raises(ValueError, match=r"average .* there and absent here"):
        checkpoints.load(1, state)


def test_an_average_that_is_not_there_is_asked_for(tmp_path: Path) -> None:
    """Prevents exporting an average from a checkpoint that has none."""
    state = state_of(1)
    del state["average"]
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    with pytest.raises(ValueError, match="has no average"):
        read_weights(checkpoints.path(1), averaged=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path, asynchronous: bool) -> None:
    """A full disk must raise an OSError that names the folder, as the command line expects, and leave earlier
    checkpoints intact."""
    saved_in(tmp_path, {1: 1.0})
    found = os.fork()
    if not found:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            checkpoints = Checkpoints(tmp_path, asynchronous=asynchronous)
            checkpoints.save(2, state_of(2, 100_000))
            checkpoints.wait()
        except OSError as error:
            named = str(tmp_path) in str(error.filename) and "cannot be written (File too large)" in str(error.strerror)
            status = 0 if named and error.errno == errno.EFBIG else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(found, 0)[1]) == 0
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1]
    assert_whole(checkpoints, 1)
    assert [each.name for each in tmp_path.iterdir()] == ["step-00000001"]


BOTH = """
import sys
from pathlib import Path
from test_checkpoints import assert_whole, read_weights, saved_in

for folder, asynchronous in zip(sys.argv[1:], (False, True)):
    checkpoints = saved_in(Path(folder), {1: 1.0}, asynchronous=asynchronous)
    assert_whole(checkpoints, 1)
    read_weights(checkpoints.path(1), averaged=False)
"""


def test_nothing_is_warned_of(tmp_path: Path) -> None:
    """Prevents PyTorch's warnings about a single process, which is the usual case, from reaching the screen."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", BOTH, str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, check=True)
    assert "Warning" not in done.stderr
