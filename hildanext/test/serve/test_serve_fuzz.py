"""A fuzzer that reads the OpenAPI document finds no fault of the server and no answer outside the document."""

import pytest

pytest.importorskip("schemathesis")
pytest.importorskip("fastapi")

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi import checks as openapi
from schemathesis.specs.openapi import schemas  # noqa: F401  # else imported, and parsed, while the server's threads run

from hildanext.data.chat_template import set_template
from hildanext.engine.local import LocalEngineConfig
from hildanext.serve.settings import ServeConfig
from hildanext.stages.submission import open_jobs
from serving import live

CHECKS = [
    schemathesis.checks.not_a_server_error,
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_headers_conformance,
    openapi.response_schema_conformance,
    openapi.negative_data_rejection,
]
"""That what the document allows is also accepted cannot be asked: it has no way to say "exactly one of these"."""


@pytest.mark.parametrize("cases", [320, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # of the fuzzer's own making
def test_cases_of_every_route_find_no_fault_and_no_answer_outside_the_document(tmp_path, cases):
    engine = LocalEngineConfig(threads=1).open("tiny", "tiny", "for a test")
    set_template(engine.tokenizer, "auto")
    with open_jobs(tmp_path) as service:
        service.start = lambda: None  # jobs are submitted and cancelled; nobody runs hundreds of them
        job = service.submit("generate", {"generate": {"model": "tiny", "prompts": ["Once"]}})
        bounds = ServeConfig(port=0, max_new_tokens=32, request_seconds=100, shutdown_seconds=2)
        with live(bounds, engine, service) as address:
            schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
            operations = [result.ok() for result in schema.get_all_operations()]
            fixed = [
                operation
                for operation in operations
                if not (operation.body or operation.query or operation.headers or operation.path_parameters)
            ]
            each = -(-cases // (len(operations) - len(fixed)))
            seen = {operation.label: fuzz(operation, each, job.id) for operation in operations}
    print(seen)
    assert sum(sum(counts.values()) for counts in seen.values()) >= cases
    unanswered = {label for label, counts in seen.items() if not (counts.get(200) or counts.get(202))}
    assert not unanswered


def fuzz(operation, count: int, known: str) -> dict[int, int]:
    """So many cases of one operation, good ones and bad ones, each checked against the document. Statuses, counted."""
    modes = schemathesis.GenerationMode
    counts: dict[int, int] = {}
    cases = st.one_of(
        operation.as_strategy(generation_mode=modes.POSITIVE),
        operation.as_strategy(generation_mode=modes.NEGATIVE),
    )

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases, real=st.booleans())
    def check(case, real):
        if real and case.meta.generation.mode is modes.POSITIVE:
            steer(case, known)
        if operation.path.endswith("/events"):
            case.query = {**(case.query if isinstance(case.query, dict) else {}), "follow": "false"}
        response = case.call(timeout=120)
        counts[response.status_code] = counts.get(response.status_code, 0) + 1
        if response.status_code == 503 and "Retry-After" in response.headers:
            return  # the queue was full: by design
        case.validate_response(response, checks=CHECKS)

    check()
    return counts


def steer(case, known: str) -> None:
    """Towards what is there: chance alone would not name a model, a job, or give exactly one prompt."""
    if "id" in (case.path_parameters or {}):
        case.path_parameters["id"] = known
    if case.path == "/v1/models/{name}":
        case.path_parameters["name"] = "tiny"
    if case.path.endswith("/artefacts/{name}"):
        case.path_parameters["name"] = "job.json"
    if isinstance(case.body, dict):
        body = {key: value for key, value in case.body.items() if key not in UNSETTLED}
        if "model" in body:
            body["model"] = "tiny"
        if "kind" in body:
            body = {"kind": "generate", "config": {"generate": {"model": "tiny", "prompts": ["Once"]}}}
        if case.path.startswith("/generate"):
            body = {key: value for key, value in body.items() if key not in ("messages", "tokens", "parent")}
        if case.path.startswith(("/generate", "/v1/completions")):
            body["prompt"] = "Once upon a time"
        if case.path == "/v1/chat/completions":
            body["messages"] = [{"role": "user", "content": "Once upon a time"}]
        case.body = body


UNSETTLED = (
    "mode effort decoder reveal reasoning_effort window stop block_size block_length steps max_denoising_steps "
    "num_inference_steps max_tokens max_new_tokens deadline_seconds n best_of logprobs top_logprobs echo diffusing "
    "stream_denoising stream_options threshold editing_threshold edit_threshold max_post_steps"
).split()
"""Fields that contradict one another, or ask for what this model does not have."""
