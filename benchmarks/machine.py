"""Machine description, timing, and storage of results."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, threads, and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def alternate(calls: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, dict[str, float]]:
    """Time calls in turn, in milliseconds, so that drift of the machine affects all of them equally.

    `median` is for quoting; `best` is close to the time on an idle machine.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number >= warm_up:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: {"median": statistics.median(each), "best": min(each)} for name, each in times.items()}


def write(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write figures to a dated JSON file, keeping other sections from the same day and machine."""
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{name}-{datetime.now(UTC):%Y-%m-%d}.json"
    here = machine()
    before = json.loads(path.read_text()) if path.exists() else {"machine": here}
    kept = before if before["machine"] == here else {}
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(kept | {"machine": here} | figures, indent=2) + "\n")
    temporary.rename(path)
    return path
