"""The GPU benchmark, rehearsed on the CPU, so that it does not fail in its first minute on a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks import cuda


def figures(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("cuda-*.json")
    return json.loads(path.read_text())


def test_all_sections_run_on_the_cpu(tmp_path: Path) -> None:
    """Checks that every section runs without CUDA, and writes its figures."""
    assert cuda.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    found = figures(tmp_path)
    assert set(cuda.SECTIONS) <= set(found)
    assert found["parity"]["dsr"]["passed"]
    assert {f"{stage}, batch 2" for stage in cuda.STAGES} <= set(found["training"])
    assert {"sequential stage", "interpolation round 1", "super-resolution", "pixels"} <= set(found["clip"])
    assert max(values["worst error"] for values in list(found["attention"].values())[:-1]) < 0.02


def test_a_section_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a failing section from losing what it measured before, or from stopping later sections."""
    written = []

    def breaks(bench: cuda.Bench) -> Iterator[cuda.Result]:
        yield "before", {"ms": 1.0}
        written.append(figures(tmp_path)["breaks"])
        raise RuntimeError("out of memory")

    def works(bench: cuda.Bench) -> Iterator[cuda.Result]:
        yield "after", {"ms": 2.0}

    breaks.__doc__ = works.__doc__ = "Nothing."
    monkeypatch.setattr(cuda, "SECTIONS", {"breaks": breaks, "works": works})
    assert cuda.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    found = figures(tmp_path)
    assert written == [{"before": {"ms": 1.0}}]
    assert "RuntimeError: out of memory" in found["breaks"]["failed"]["traceback"]
    assert found["works"]["after"] == {"ms": 2.0}


def test_the_time_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the time limit on a machine rented for minutes: no section starts after it."""
    monkeypatch.setattr(cuda, "MAX_SECONDS", -1)
    assert cuda.main(["machine", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert list(figures(tmp_path)["machine"]) == ["did not run: the time was over"]
