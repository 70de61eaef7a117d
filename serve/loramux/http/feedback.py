"""`POST /v1/uncertainty/feedback`: whether an answer was right."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from loramux.errors import InvalidRequest
from loramux.http.cards import visible

router = APIRouter(tags=["uncertainty"])

PATH = "/v1/uncertainty/feedback"
_LONGEST = 256
_TEXT: dict[str, Any] = {"type": "string", "maxLength": _LONGEST}
_HINT = 'Send {"id": ID, "correct": true}.'


class Feedback(BaseModel):
    """Of one choice of one answer: was it right, or which label was."""

    model_config = ConfigDict(extra="forbid")

    # Checked below: where text is no text, FastAPI would repeat it in its error, and fail.
    id: Annotated[Any, Field(json_schema_extra=_TEXT, description="The `id` of an answer, or its X-Request-Id.")]
    correct: StrictBool | None = None
    label: Annotated[Any, Field(json_schema_extra=_TEXT, description="The right one, of a decision.")] = None
    choice: Annotated[StrictInt, Field(ge=0, le=10_000)] = 0


@router.post(PATH)
async def give_feedback(body: Feedback, request: Request) -> dict[str, Any]:
    """Counted once: the same again changes nothing, something else is 409. 404 for an answer that is not known."""
    services = request.app.state.loramux
    for name, value in (("id", body.id), ("label", body.label)):
        if not (isinstance(value, str) and len(value) <= _LONGEST) and (name, value) != ("label", None):
            raise InvalidRequest(f"`{name}` must be a text of at most {_LONGEST} characters.", hint=_HINT, param=name)
    if (body.correct is None) == (body.label is None):
        raise InvalidRequest("There must be either `correct` or a `label`.", hint=_HINT, param="correct")
    names = [services.base, *(name for name in services.registry.adapters() if visible(request, name))]
    one, new = services.recent.feedback(body.id, body.choice, names, correct=body.correct, label=body.label)
    return {"object": "feedback", "id": body.id, "model": one.name, "correct": one.right, "counted": new}
