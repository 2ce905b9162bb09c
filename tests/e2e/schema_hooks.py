"""What the run of the schema needs to know: real bodies, ids of real decodes, one more check.

Bodies lie in the folder that `AFTERIMAGE_BODIES` names, by media type; `AFTERIMAGE_IDS` names
decodes with spaces between.
"""

import os
import re
import zlib
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import strategies as st

BODIES = Path(os.environ["AFTERIMAGE_BODIES"])
IDS = os.environ["AFTERIMAGE_IDS"].split()
JOB_ID = re.compile("[0-9a-f]{32}")
WORKER = re.compile(r".+-[0-9]+")
STEPS = 3
"""Of a job: what is tried here is the API, not the sampler."""


@st.composite
def damaged(draw: st.DrawFn, whole: list[bytes]) -> bytes:
    data = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(1, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))])


def bodies(folder: Path) -> st.SearchStrategy[bytes]:
    whole = [path.read_bytes() for path in sorted(folder.iterdir())]
    return st.one_of(st.sampled_from(whole), st.sampled_from(whole), damaged(whole), st.binary())


for kind in ("image/png", "image/jpeg", "image/webp", "image/avif"):
    schemathesis.openapi.media_type(kind, bodies(BODIES / kind))
schemathesis.openapi.media_type(
    "application/octet-stream", bodies(BODIES / "application/octet-stream")
)

schemathesis.openapi.format("uint64", st.integers(0, 2**64 - 1).map(str))


@schemathesis.hook
def map_query(context: Any, query: dict[str, Any] | None) -> dict[str, Any] | None:
    """Jobs stay short."""
    if query and "seed" in (names := {p.name for p in context.operation.query}) and "tier" in names:
        steps = query.get("steps", STEPS)
        if isinstance(steps, int) and query.get("tier", "instant") != "instant":
            query["steps"] = min(steps, STEPS)
    return query


@schemathesis.hook
def map_path_parameters(
    context: Any, path_parameters: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Most decodes that are asked for are there."""
    if not path_parameters:
        return path_parameters
    name = path_parameters.get("id")
    if isinstance(name, str) and JOB_ID.fullmatch(name) and (at := zlib.crc32(name.encode())) % 4:
        return {**path_parameters, "id": IDS[at % len(IDS)]}
    return path_parameters


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: Any) -> None:
    """The only worker is not drained: its name may be known from the view of the queue."""
    name = (case.path_parameters or {}).get("name")
    if case.path.endswith("/drain") and isinstance(name, str) and WORKER.fullmatch(name):
        case.path_parameters["name"] = "nobody-1"


@schemathesis.check
def problems_are_documented(ctx: Any, response: Any, case: Any) -> None:
    """Each kind of problem is one that the operation's description shows an example of."""
    kinds = response.headers.get("content-type", [""])
    if case.method == "HEAD" or not kinds[0].startswith("application/problem+json"):
        return
    kind = response.json()["type"].rpartition(":")[2]
    if kind in {"method-not-allowed", "not-found"}:  # no operation was reached
        return
    answer = case.operation.definition.raw["responses"][str(response.status_code)]
    known = answer["content"]["application/problem+json"]["examples"]
    assert kind in known, f"{kind} is none of {', '.join(known)}"
