"""`cogvideo ablate`: from options to the runs of an ablation, its page and its file."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from itertools import count
from pathlib import Path

from cogvideo.config import require
from cogvideo.data.engines import Machines
from cogvideo.evaluation.networks.cache import network_path
from cogvideo.files import write_json
from cogvideo.runs import provenance
from cogvideo.training.ablation import DATA, LOG, Ablation, Experiment
from cogvideo.training.optim import StageOptimization

PAGE, FILE = "ablation.html", "ablation.json"


def ablate(
    recipe: Path,
    /,
    *,
    out: Path,
    only: str | None = None,
    list_: bool = False,
    ablation: Ablation = Ablation(),  # noqa: B008  # frozen
    optimization: StageOptimization = StageOptimization(),  # noqa: B008
    machines: Machines = Machines(),  # noqa: B008
) -> None:
    """Train variants of the video stages and compare them. Run an interrupted command again to continue.

    Variants are: full; random (weights of the image model are not inherited); trained (a base that is not frozen);
    one-stage (one rate in place of the hierarchy, with one and two overlapping frames); no-rate (no frame rate in the
    text); no-window (full attention). FVD needs `cogvideo fetch i3d`.

    The page ablation.html and the figures in ablation.json, both in OUT, cover the finished runs.

    Args:
        recipe: TOML file whose table [ablate] has values for the following options. The command line takes precedence.
        out: Folder for data, runs, page and figures.
        only: Name of a single run to execute, or data to make only what all runs need. Jobs on several machines share
            OUT.
        list_: Print the names of all runs, and do nothing else.
        ablation: Settings of the comparison.
        optimization: Optimization of each stage.
        machines: Devices and processes.
    """
    experiment = Experiment(out, ablation, optimization, machines.kind)
    known = (DATA, *experiment.runs)
    require(only is None or only in known, f"only is {only!r}, expected one of {', '.join(known)}")
    if list_:
        print("\n".join(experiment.runs))
        return
    for package in ("jinja2", "matplotlib", "pyarrow"):
        import_module(package)  # if one is missing, fail before any work
    if not network_path("i3d").is_file():
        print("FVD is left out: run `cogvideo fetch i3d` to download its network.")
    experiment.prepare(machines)
    names = [name for name in experiment.runs if only in (None, name) and experiment.report(name) is None]
    if names:
        print(f"{len(names)} runs to do; each logs to its own folder, such as {out / names[0] / LOG}", flush=True)
        done = count(1)
        machines.settled.run(names, experiment, lambda: print(f"{next(done)} of {len(names)} runs done", flush=True))
    _write(experiment)


def _write(experiment: Experiment) -> None:
    """Write page and figures, if any run is finished."""
    from cogvideo.report.ablation import as_json, facts  # matplotlib takes a second to import
    from cogvideo.report.page import write_page

    over = sum(experiment.report(name) is not None for name in experiment.runs)
    if over == 0:
        return
    if over == len(experiment.runs) and experiment.paces is None:
        print("All runs are finished; now the steps of all variants are timed in turn.", flush=True)
        experiment.measure_paces()
    page, figures = facts(experiment)
    settings = {"ablation": asdict(experiment.ablation), "optimization": asdict(experiment.optimization)}
    content = provenance() | {"settings": settings, "runs": over} | figures
    write_json(experiment.out / FILE, content, as_json)
    ablation, optimization = experiment.ablation, experiment.optimization
    training = f"{optimization.steps:,} steps of {optimization.batch:,} clips for each stage"
    lead = f"{over} of {len(experiment.runs)} runs are finished: {training}, {ablation.clips:,} clips for the figures."
    write_page(experiment.out / PAGE, "ablate", "Ablation of the video stages", lead, "ablation.html", page)
    print(f"written: {experiment.out / PAGE}, {experiment.out / FILE}, with {over} runs")
