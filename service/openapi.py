"""Completes the OpenAPI document that FastAPI generates: problems, links, optional API keys."""

from typing import Any

from fastapi import FastAPI

from models.errors import ParameterError
from service import problems, schemas
from service.batches.request_schemas import BatchRequest

LINKED_OPERATIONS = ("status", "follow", "picture", "withdraw", "retry")
"""Ids of the operations on a decode, which responses with a decode link to."""


def install(app: FastAPI, keyed: bool) -> None:
    """Complete the OpenAPI document of `app`; it lists API keys only if the service is `keyed`."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(generate(), keyed)
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any], keyed: bool) -> None:
    components = document["components"]
    template = "#/components/schemas/{model}"
    problem = schemas.Problem.model_json_schema(ref_template=template)
    components["schemas"] |= problem.pop("$defs") | {"Problem": problem}
    batch = BatchRequest.model_json_schema(ref_template=template)
    components["schemas"] |= batch.pop("$defs") | {"BatchRequest": batch}
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    if not keyed:
        components.pop("securitySchemes", None)
    for path in document["paths"].values():
        for operation in path.values():
            if not keyed:
                operation.pop("security", None)
            _complete_responses(operation["responses"])


def _complete_responses(responses: dict[str, Any]) -> None:
    """Replace FastAPI's own 422 with a problem; link decodes to the operations on them."""
    if "application/json" in responses.get("422", {}).get("content", {}):
        responses["422"] = problems.responses(ParameterError)[422]
    for response in responses.values():
        schema = response.get("content", {}).get("application/json", {}).get("schema", {})
        if schema.get("$ref", "").endswith("/Decode"):
            response["links"] = {
                name: {"operationId": name, "parameters": {"id": "$response.body#/id"}}
                for name in LINKED_OPERATIONS
            }
