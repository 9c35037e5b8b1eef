"""Benchmark of the server: `python -m benchmarks.serve [--minutes 10]` writes to benchmarks/results/.

Clients ask for clips of the model in the box at 0 rounds, watch them and download them, each the next when it has the
last. Reported are the throughput as a share of the pipeline alone at the same batch size, on all cores; times of all
requests but the generation; memory and CPU of the server and its workers; and mistakes: requests that failed, clips
that were lost or made twice, and clips of another seed or, in a sample, other codes and pixels than those that the
pipeline alone makes of the seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import psutil
import torch

from benchmarks.machine import write
from cogvideo.bundle.model import POCKET
from cogvideo.pipeline import CogVideoPipeline
from cogvideo.web.clips import from_png

PROMPT = "a red heart beats, on a white background"
WAIT = "openai-poll-after-ms"
"""Header with the time until the next look, which the official client respects, too."""
LOST = 600.0
"""Seconds after which a clip counts as lost."""
CHECKED = 16
"""Number of clips that are made again, by the pipeline alone."""


def alone(model: str, prompt: str, batch: int, rounds: int = 3) -> float:
    """Clips a second of the pipeline, without files."""
    pipeline = CogVideoPipeline.from_pretrained(model)
    settings = replace(pipeline.settings, rounds=0)
    times = []
    for number in range(rounds + 1):
        start = time.perf_counter()
        generators = [torch.Generator().manual_seed(number * batch + each) for each in range(batch)]
        list(pipeline.stream([prompt] * batch, generators, settings))
        times.append(time.perf_counter() - start)
    return batch / statistics.median(times[1:])


@dataclass
class Seen:
    """What clients see."""

    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds of each kind of request."""
    mistakes: list[str] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    made: dict[int, tuple[str, bytes]] = field(default_factory=dict)
    """Hash of the codes, and the last frame, by seed."""


def served(model: str, prompt: str, workers: int, batch: int, clients: int, minutes: float) -> dict[str, Any]:
    """Figures of a server with its workers."""
    with TemporaryDirectory() as folder:
        options = ["--model", model, "--folder", folder, "--port", "0", "--waiting", "10000"]
        options += ["--workers", str(workers), "--batch", str(batch)]
        command = [sys.executable, "-m", "cogvideo", "serve", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                address = process.stdout.readline().strip()
                most = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
                with httpx.Client(base_url=address, timeout=60, limits=most) as web:  # one: making it takes a while
                    return _load(web, model, prompt, psutil.Process(process.pid), clients, 60 * minutes)
            finally:
                process.terminate()


def _load(
    web: httpx.Client, model: str, prompt: str, server: psutil.Process, clients: int, seconds: float
) -> dict[str, Any]:
    seen = Seen()
    numbers = count()
    _clip(web, prompt, next(numbers), seen)  # weights are loaded
    seen.times.clear()
    parts = {"clients": [psutil.Process()], "server": [server], "workers": server.children()}
    worked = {name: _cpu(each) for name, each in parts.items()}
    begin = time.monotonic()

    def client(_: int) -> None:
        is_first = True
        while time.monotonic() < begin + seconds:
            number = next(numbers)
            try:
                _clip(web, prompt, number, seen, "create, all at once" if is_first else "create")
            except (httpx.HTTPError, LookupError) as error:
                seen.mistakes.append(f"{number}: {error!r}")
            is_first = False

    def memory() -> dict[str, float]:
        return {name: _resident(parts[name]) / 2**20 for name in ("server", "workers")}

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client, number) for number in range(clients)]
        time.sleep(seconds / 4)
        early = memory()
        time.sleep(seconds / 2)
        late = memory()
    for each in running:
        each.result()
    whole = max(seen.ends) - begin  # to the last clip, so that none is counted for which there was no time
    cores = {f"{name}, cores at work": (_cpu(each) - worked[name]) / whole for name, each in parts.items()}
    num_requests = sum(map(len, seen.times.values()))
    num_clips = len(seen.ends) - 1
    metrics = web.get("/metrics").text
    if f'cogvideo_videos{{status="completed"}} {num_clips + 1}.0' not in metrics:
        seen.mistakes.append(f"the server has other numbers of videos: {metrics[-600:]}")
    checked = [*seen.made][:: max(1, len(seen.made) // CHECKED)]
    seen.mistakes += [f"{seed} is another clip" for seed in checked if _is_other(model, prompt, seed, *seen.made[seed])]
    figures = {f"p99 of {name}, ms": 1e3 * _p99(each) for name, each in seen.times.items()}
    sizes = {f"{name}, MiB": late[name] for name in late}
    growth = {f"{name}, MiB more after half of the time": late[name] - early[name] for name in late}
    counts = {"clips": num_clips, "clips a second": num_clips / whole, "clips made again alone": len(checked)}
    counts["requests a second"] = num_requests / whole
    return figures | sizes | growth | cores | counts | {"mistakes": seen.mistakes}


def _resident(processes: Sequence[psutil.Process]) -> int:
    return sum(int(each.memory_info().rss) for each in processes)


def _cpu(processes: Sequence[psutil.Process]) -> float:
    """Seconds of CPU that processes have used."""
    used = [each.cpu_times() for each in processes]
    return sum(float(each.user + each.system) for each in used)


def _p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[98] if len(times) > 1 else times[0]


def _clip(web: httpx.Client, prompt: str, number: int, seen: Seen, create: str = "create") -> None:
    """Ask for a clip with a seed of its own, and look whether it is this one that comes."""

    def ask(name: str, method: str, path: str, **body: Any) -> httpx.Response:
        start = time.perf_counter()
        answer = web.request(method, path, **body)
        seen.times[name].append(time.perf_counter() - start)
        if answer.status_code != 200:
            seen.mistakes.append(f"{name}: {answer.status_code} {answer.text[:80]}")
        return answer

    asked = {"prompt": prompt, "rounds": 0, "seed": number}
    id = ask(create, "POST", "/v1/videos", json=asked).json()["id"]
    deadline = time.monotonic() + LOST
    while (answer := ask("retrieve", "GET", f"/v1/videos/{id}")).headers.get(WAIT):
        if time.monotonic() > deadline:
            seen.mistakes.append(f"{id} is lost: {answer.text}")
            return
        time.sleep(int(answer.headers[WAIT]) / 1000)
    video = answer.json()
    content = ask("content", "GET", f"/v1/videos/{id}/content").content
    last = ask("frame", "GET", f"/v1/videos/{id}/frames/{video['num_frames'] - 1}").content
    ask("list", "GET", "/v1/videos")
    record = re.search(rb'"seed": (\d+).*"codes": "([0-9a-f]{64})"', content)
    if video["status"] != "completed" or record is None or int(record[1]) != number or number in seen.made:
        seen.mistakes.append(f"{id} is {video['status']}, of another seed than {number}: {video['error']}")
        return
    seen.made[number] = record[2].decode(), last
    seen.ends.append(time.monotonic())


def _is_other(model: str, prompt: str, seed: int, digest: str, last: bytes) -> bool:
    """Whether a clip is not that which the pipeline makes alone from its seed."""
    pipeline = CogVideoPipeline.from_pretrained(model)
    generator = torch.Generator().manual_seed(seed)
    frames = sorted(
        pipeline.stream([prompt], [generator], replace(pipeline.settings, rounds=0)), key=attrgetter("place")
    )
    codes = torch.cat([frame.codes for frame in frames])
    distance = np.abs(frames[-1].pixels[0].astype(int) - from_png(last)).mean()
    return hashlib.sha256(codes.numpy().tobytes()).hexdigest() != digest or distance > 1


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=POCKET)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--workers", type=int, default=torch.get_num_threads(), help="one per core by default")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    before = alone(given.model, given.prompt, given.batch)
    figures = served(given.model, given.prompt, given.workers, given.batch, given.clients, given.minutes)
    after = alone(given.model, given.prompt, given.batch)
    figures["pipeline alone, clips a second, before and after"] = [before, after]
    figures["share of the pipeline alone"] = figures["clips a second"] / statistics.mean([before, after])
    figures |= {name: getattr(given, name) for name in ("workers", "batch", "clients", "minutes")}
    print(json.dumps(figures, indent=2))
    print(write("serve", {"load": figures}, *([given.out] if given.out else [])))


if __name__ == "__main__":
    main()
