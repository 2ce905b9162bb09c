"""What FastAPI does not know of the API when it describes it."""

from typing import Any

from fastapi import FastAPI

from models.errors import ParameterError
from service import problems, schemas

FOLLOWING = ("status", "follow", "picture", "withdraw", "retry")
"""Operations on a decode, by the names of their routes."""


def install(app: FastAPI, keyed: bool) -> None:
    """Complete the description of `app`; keys are part of it where the service is `keyed`."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(made(), keyed)
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any], keyed: bool) -> None:
    components = document["components"]
    template = "#/components/schemas/{model}"
    problem = schemas.Problem.model_json_schema(ref_template=template)
    components["schemas"] |= problem.pop("$defs") | {"Problem": problem}
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    if not keyed:
        components.pop("securitySchemes", None)
    for path in document["paths"].values():
        for operation in path.values():
            if not keyed:
                operation.pop("security", None)
            _complete_answers(operation["responses"])


def _complete_answers(answers: dict[str, Any]) -> None:
    """FastAPI's own 422 becomes ours; a decode's document leads to what can be done with it."""
    if "application/json" in answers.get("422", {}).get("content", {}):
        answers["422"] = problems.responses(ParameterError)[422]
    for answer in answers.values():
        schema = answer.get("content", {}).get("application/json", {}).get("schema", {})
        if schema.get("$ref", "").endswith("/Decode"):
            answer["links"] = {
                name: {"operationId": name, "parameters": {"id": "$response.body#/id"}}
                for name in FOLLOWING
            }
