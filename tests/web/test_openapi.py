"""The description of the API is true: requests made from it, good and bad, are answered as it says."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies
from schemathesis import checks

from cogvideo.web.jobs import Jobs, Limits
from cogvideo.web.served import Served, Wanted
from cogvideo.web.server import application
from cogvideo.web.site import Order, Site
from cogvideo.web.storage import Store
from cogvideo.web.worker import Worker
from serving import make_whole_bundle

CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
"""That good data is accepted is not among them: a prompt of spaces, or a sampler's value out of range, is refused."""


@pytest.mark.parametrize("examples", [2, pytest.param(800, marks=pytest.mark.soak)])
def test_answers_are_as_described(examples: int, text_model: bytes, tmp_path: Path) -> None:
    """Guards clients that are made from the description, and the server against what nobody thought of."""
    served = Served(str(make_whole_bundle(tmp_path / "small", text_model)))
    limits = Limits(waiting=50)
    site = Site(served, Jobs(f"sqlite:///{tmp_path / 'queue.db'}"), Store(str(tmp_path / "files")), None, limits)
    done = site.order("local", Order(Wanted(prompt="a cat", rounds=0)))
    stopping = Event()
    stopping.wait = lambda _: stopping.set()  # type: ignore[assignment, method-assign, return-value]
    Worker(site.jobs, site.store, served, 8, 1000.0, 0, stopping).run()
    app = application(site, ["*"])
    before = sorted(tmp_path.iterdir())
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    statuses: dict[int, int] = {}
    for operation in (each.ok() for each in schema.get_all_operations()):
        for mode in schemathesis.GenerationMode:
            cases = operation.as_strategy(generation_mode=mode)

            @hypothesis.settings(max_examples=examples, suppress_health_check=list(hypothesis.HealthCheck))
            @hypothesis.given(case=cases, is_known=strategies.booleans())
            def check(case: Any, is_known: bool) -> None:
                if is_known and "id" in case.path_parameters and case.method != "DELETE":
                    case.path_parameters["id"] = done.id
                response = case.call()
                case.validate_response(response, checks=CHECKS)
                statuses[response.status_code] = statuses.get(response.status_code, 0) + 1

            with suppress(hypothesis.errors.Unsatisfiable):  # nothing is wrong for operations without values
                check()
    assert {200, 404, 422} <= statuses.keys() <= {200, 400, 403, 404, 405, 413, 415, 422, 429}, statuses
    assert sorted(tmp_path.iterdir()) == before
    ours = {"queue.db", "queue.db-shm", "queue.db-wal", "files", "small"}
    assert {path.name for path in before} <= ours
