"""The studio: the page at `/` and its files. Everything it shows and does goes through the API."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

from cogvideo import report

STATIC = Path(__file__).parent / "static"
NAMES = ("studio.css", "studio.js", "clip.js", "requests.js", "examples.js", "icon.svg")
FILES = {name: STATIC / name for name in NAMES}
FILES["page.css"] = Path(report.__file__).parent / "templates" / "style.css"

router = APIRouter(include_in_schema=False)


@router.get("/")
def page() -> FileResponse:
    """The page itself, which holds nothing that needs a key."""
    return FileResponse(STATIC / "studio.html")


@router.get("/static/{name}")
def file(name: str) -> FileResponse:
    """The page's style sheets and modules."""
    if name not in FILES:
        raise HTTPException(404)
    return FileResponse(FILES[name])
