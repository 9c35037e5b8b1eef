"""Benchmark of the server: `python -m benchmarks.serve [--minutes 10]` writes to benchmarks/results/.

Clients ask for clips of the model in the box at 0 rounds, watch them and download them, each the next when it has the
last. Reported are the throughput as a share of the pipeline alone at the same batch size, times of all requests but the
generation, memory of the server, and mistakes: requests that failed, and clips that are not what was asked for.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
import torch

from benchmarks.machine import write
from cogvideo.bundle.model import POCKET
from cogvideo.pipeline import CogVideoPipeline

PROMPT = "a red heart beats, on a white background"
WAIT = "openai-poll-after-ms"
"""Header with the time until the next look, which the official client respects, too."""


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


def served(model: str, prompt: str, batch: int, clients: int, minutes: float) -> dict[str, Any]:
    """Figures of a server with one worker."""
    with TemporaryDirectory() as folder:
        options = ["--model", model, "--folder", folder, "--port", "0", "--batch", str(batch), "--waiting", "10000"]
        command = [sys.executable, "-m", "cogvideo", "serve", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                address = process.stdout.readline().strip()
                return _load(address, prompt, psutil.Process(process.pid), clients, 60 * minutes)
            finally:
                process.terminate()


def _load(address: str, prompt: str, server: psutil.Process, clients: int, seconds: float) -> dict[str, Any]:
    times: dict[str, list[float]] = defaultdict(list)
    mistakes: list[str] = []
    ends: list[float] = []
    numbers = count()
    _clip(address, prompt, next(numbers), times, mistakes)  # weights are loaded
    times.clear()
    begin = time.monotonic()

    def client(_: int) -> None:
        while time.monotonic() < begin + seconds:
            _clip(address, prompt, next(numbers), times, mistakes)
            ends.append(time.monotonic())

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client, number) for number in range(clients)]
        time.sleep(seconds / 4)
        early = server.memory_info().rss
        time.sleep(seconds / 2)
        late = server.memory_info().rss
    for each in running:
        each.result()
    whole = max(ends) - begin  # to the last clip, so that none is counted for which there was no time
    figures = {f"p99 of {name}, ms": 1e3 * _p99(each) for name, each in times.items()}
    memory = {"server, MiB": late / 2**20, "MiB more after half of the time": (late - early) / 2**20}
    return figures | memory | {"clips": len(ends), "clips a second": len(ends) / whole, "mistakes": mistakes}


def _p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98]


def _clip(address: str, prompt: str, number: int, times: dict[str, list[float]], mistakes: list[str]) -> None:
    """Ask for a clip with a seed of its own, and look whether it is this one that comes."""
    with httpx.Client(base_url=address, timeout=60) as web:

        def ask(name: str, method: str, path: str, **body: Any) -> httpx.Response:
            start = time.perf_counter()
            answer = web.request(method, path, **body)
            times[name].append(time.perf_counter() - start)
            if answer.status_code != 200:
                mistakes.append(f"{name}: {answer.status_code} {answer.text[:80]}")
            return answer

        asked = {"prompt": prompt, "rounds": 0, "seed": number}
        id = ask("create", "POST", "/v1/videos", json=asked).json()["id"]
        while (answer := ask("retrieve", "GET", f"/v1/videos/{id}")).headers.get(WAIT):
            time.sleep(int(answer.headers[WAIT]) / 1000)
        video = answer.json()
        content = ask("content", "GET", f"/v1/videos/{id}/content").content
        seed = re.search(rb'"seed": (\d+)', content)
        if video["status"] != "completed" or seed is None or int(seed[1]) != number:
            mistakes.append(f"{id} is {video['status']}, of another seed than {number}: {video['error']}")


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=POCKET)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    before = alone(given.model, given.prompt, given.batch)
    figures = served(given.model, given.prompt, given.batch, given.clients, given.minutes)
    after = alone(given.model, given.prompt, given.batch)
    figures["pipeline alone, clips a second, before and after"] = [before, after]
    figures["share of the pipeline alone"] = figures["clips a second"] / statistics.mean([before, after])
    figures |= {"clients": given.clients, "batch": given.batch, "minutes": given.minutes}
    print(json.dumps(figures, indent=2))
    print(write("serve", figures, *([given.out] if given.out else [])))


if __name__ == "__main__":
    main()
