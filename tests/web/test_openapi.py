"""The API matches its description: valid and invalid requests generated from it are answered as it says."""

from __future__ import annotations

import os
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
from cogvideo.web.keys import Keys
from cogvideo.web.served import ClipRequest, ServedModel
from cogvideo.web.server import application
from cogvideo.web.site import Order, ServerState
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
"""Acceptance of valid data is not checked: a blank prompt, or a sampler setting out of range, is rejected."""


EXAMPLES = int(os.environ.get("COGVIDEO_FUZZ", "3000")) // 40
"""Requests per operation in the long test, once with valid values and once with invalid ones."""


@pytest.mark.parametrize("examples", [2, pytest.param(EXAMPLES, marks=pytest.mark.soak)])
def test_answers_are_as_described(examples: int, text_model: bytes, tmp_path: Path) -> None:
    """Guards clients generated from the description, the server against unforeseen input, and videos against requests
    with other users' keys."""
    served = ServedModel(str(make_whole_bundle(tmp_path / "small", text_model)))
    keys = Keys(tmp_path / "keys")
    headers = {"Authorization": f"Bearer {keys.add('ann')}"}
    keys.add("bob")
    limits = Limits(waiting=50)
    site = ServerState(served, Jobs(f"sqlite:///{tmp_path / 'queue.db'}"), Store(str(tmp_path / "files")), keys, limits)
    own = site.order("ann", Order(ClipRequest(prompt="a cat", rounds=0))).id
    others = site.order("bob", Order(ClipRequest(prompt="a secret", rounds=0))).id
    stopping = Event()
    stopping.wait = lambda _: stopping.set()  # type: ignore[assignment, method-assign, return-value]
    Worker(site.jobs, site.store, served, 8, 1000.0, 0, stopping).run()
    untouched = site.jobs.find(others, bulky=True)
    app = application(site, ["*"])
    before = sorted(tmp_path.iterdir())
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    if examples < EXAMPLES:  # enumerating all of Unicode takes ten seconds
        schema.config.generation.update(codec="ascii")
    statuses: dict[int, int] = {}
    for operation in (each.ok() for each in schema.get_all_operations()):
        for mode in schemathesis.GenerationMode:
            cases = operation.as_strategy(generation_mode=mode)

            @hypothesis.settings(
                max_examples=examples, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
            )
            @hypothesis.given(case=cases, id=strategies.sampled_from([None, own, others]))
            def check(case: Any, id: str | None) -> None:
                is_others = id == others and _use(case, others)
                if id == own and case.method != "DELETE":
                    _use(case, own)
                case.headers.update(headers)
                response = case.call()
                case.validate_response(response, checks=CHECKS)
                assert not (is_others and response.status_code < 400), response.content
                assert b"a secret" not in response.content
                statuses[response.status_code] = statuses.get(response.status_code, 0) + 1

            with suppress(hypothesis.errors.Unsatisfiable):  # operations without parameters have no invalid requests
                check()
    print(f"{sum(statuses.values())} requests: {statuses}")
    assert {200, 404, 422} <= statuses.keys() <= {200, 400, 401, 403, 404, 405, 413, 415, 422, 429}, statuses
    assert site.jobs.find(others, bulky=True) == untouched
    assert sorted(tmp_path.iterdir()) == before
    ours = {"queue.db", "queue.db-shm", "queue.db-wal", "files", "small", "keys", ".lock"}
    assert {path.name for path in before} <= ours


def _use(case: Any, id: str) -> bool:
    """Put the ID of a video where a request takes one; False if it takes none."""
    if "id" in case.path_parameters:
        case.path_parameters["id"] = id
    elif case.path.endswith("/videos") and case.media_type == "application/json" and isinstance(case.body, dict):
        case.body["input_reference"] = {"video_id": id, "frame": 0}
    else:
        return False
    return True
