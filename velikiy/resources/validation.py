"""Sentences about invalid fields, for requests and for imported rows."""

from typing import Any

from pydantic import ValidationError

MAX_ERRORS = 1000
"""Invalid fields that one response names."""

SENTENCES = {
    "missing": "is required",
    "extra_forbidden": "is not a known field",
    "string_type": "must be a string",
    "string_unicode": "contains an unpaired surrogate",
    "model_type": "must be a JSON object",
    "model_attributes_type": "must be a JSON object",
    "list_type": "must be an array",
    "too_short": "must have at least {min_length} items; yours has {actual_length}",
    "too_long": "must have at most {max_length} items",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "decimal_type": "must be a number",
    "decimal_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "union_tag_not_found": "is required: create, update or delete",
    "union_tag_invalid": "must be create, update or delete",
}
"""The sentence for each of pydantic's kinds of errors. Pydantic's own sentences speak of its internals."""


def errors_of(error: ValidationError) -> list[dict[str, str]]:
    """Return `{"field": "email", "detail": "is required"}` for each invalid field."""
    errors = error.errors(include_url=False, include_input=False)[:MAX_ERRORS]
    return [_error_of_field(details) for details in errors]


def _error_of_field(details: Any) -> dict[str, str]:
    location = [str(part) for part in details["loc"]]
    if location[:1] == ["operations"]:
        del location[2:3]  # pydantic's name for the kind of operation, which is not in the body
    context = details.get("ctx", {})
    if details["type"].startswith("union_tag_"):
        location.append(context["discriminator"].strip("'"))
    field = ".".join(location) or "body"
    if details["type"] == "value_error":
        return {"field": field, "detail": str(context["error"])}
    sentence = SENTENCES.get(details["type"])
    return {"field": field, "detail": sentence.format_map(context) if sentence else details["msg"]}
