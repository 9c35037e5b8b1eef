"""`cogvideo finetune`: from your own clips to a model that knows them, and a page of results."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from cogvideo.bundle.model import POCKET
from cogvideo.config import require
from cogvideo.report.page import count, write_page
from cogvideo.training.finetune import Finetuning, FinetuningRun

PAGE = "finetune.html"


def finetune(
    clips: str,
    /,
    *,
    out: Path,
    base: str = POCKET,
    settings: Finetuning = Finetuning(),  # noqa: B008  # frozen
) -> None:
    """Fine-tune a model on your own clips. Run an interrupted command again to continue.

    The command checks the clips, cuts them where the scene changes, encodes them, and trains the stages in the given
    time. The page finetune.html in the new model's folder shows clips before and after, losses and times.

    Args:
        clips: Folder of videos, or table with the columns file and caption. Captions are in x.txt next to x.mp4, in a
            table, or in prompts.txt; for clips without one, file names are used.
        out: Folder for the new model.
        base: Model to start from: pocket, the folder of a bundle, or its ID on the Hugging Face Hub.
        settings: Settings of the fine-tuning.
    """
    for package in ("jinja2", "matplotlib", "pyarrow"):
        import_module(package)  # if one is missing, fail before any work
    require(not out.exists() or out.is_dir(), f"{out} is a file, expected a folder for the model")
    chain = FinetuningRun(clips, out, base, settings)
    chain.run()
    page = out / PAGE
    if page.exists():
        print(f"This fine-tuning is finished: {page}")
        return
    from cogvideo.report.finetune import facts

    print(f"[{chain.num_steps}/{chain.num_steps}] The page: clips before and after", file=sys.stderr, flush=True)
    found = facts(out, base, settings)
    lead = f"Made from {count(found['clips'], 'clip')} and the model {base}."
    write_page(page, "finetune", f"{out.resolve().name}: fine-tuned", lead, "finetune.html", found)
    print(f"{found['advice']}\n{page}: before and after, losses, times")
    best = min(found["clips"], key=lambda each: ("no caption" in each["notes"], len(each["caption"])))
    example = best["caption"].replace('"', "'")
    options = "".join(f" --adapter {name}" for name in settings.adapters)
    print(f'cogvideo generate "{example}" --model {out}{options}')
