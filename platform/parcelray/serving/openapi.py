"""The endpoint's description for tools, made from the models that validate requests."""

from typing import Any

from parcelray import __version__
from parcelray.serving.schemas import ChatRequest

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_REFUSALS = ("400", "401", "403", "404", "405", "408", "413", "415", "422", "429", "503")


def openapi(name: str) -> dict[str, Any]:
    """OpenAPI 3.1."""
    schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    components = schema.pop("$defs", {})
    refusals = {status: {"description": "Refused", "content": {"application/json": {"schema": _ERROR}}} for status in _REFUSALS}
    answered = {
        "description": "The answer",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}},
    }
    found = {"200": {"description": "Found", "content": {"application/json": {"schema": {"type": "object"}}}}, **refusals}
    chat = {
        "summary": "Answer a question about images",
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": answered, **refusals},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": f"parcelray: {name}", "version": __version__},
        "paths": {
            "/v1/chat/completions": {"post": chat},
            "/v1/models": {"get": {"summary": "List the models", "responses": found}},
            "/health": {"get": {"summary": "Whether the endpoint runs", "responses": found}},
            "/ready": {"get": {"summary": "Whether the model answers", "responses": found}},
            "/version": {"get": {"summary": "What is served", "responses": found}},
        },
        "components": {"schemas": components},
    }
