"""Whether a JSON value follows a schema: the part of JSON Schema that says what an answer is.

Keywords are type, enum, const, properties, required, additionalProperties, items, minItems,
maxItems, minimum, maximum, minLength, maxLength, pattern, anyOf, title and description.
"""

from __future__ import annotations

import re
from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
KEYWORDS = (
    "type enum const properties required additionalProperties items minItems maxItems minimum "
    "maximum minLength maxLength pattern anyOf title description $schema"
)


def check_schema(schema: Any, name: str) -> None:
    """ValueError where a schema, or one inside it, has keywords that are not read here."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise ValueError(f"{name}: a schema is an object, not {schema!r:.60}")
    if unknown := sorted(schema.keys() - set(KEYWORDS.split())):
        raise ValueError(f"{name}: the keyword {unknown[0]!r} is not read; leave it out")
    for kind in _types(schema):
        if kind not in TYPES:
            raise ValueError(f"{name}: there is no type {kind!r}")
    if "pattern" in schema:
        re.compile(schema["pattern"])
    inner = [*schema.get("properties", {}).values(), *schema.get("anyOf", ())]
    inner += [schema[key] for key in ("items", "additionalProperties") if key in schema]
    for part in inner:
        check_schema(part, name)


def follows(value: Any, schema: Any) -> bool:
    """Whether a JSON value follows a schema that `check_schema` has passed."""
    if isinstance(schema, bool):
        return schema
    kinds = _types(schema)
    if kinds and not any(_is(value, kind) for kind in kinds):
        return False
    if "enum" in schema and not any(_same(value, known) for known in schema["enum"]):
        return False
    if "const" in schema and not _same(value, schema["const"]):
        return False
    if "anyOf" in schema and not any(follows(value, part) for part in schema["anyOf"]):
        return False
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        return set(schema.get("required", ())) <= value.keys() and all(
            follows(part, known.get(key, rest)) for key, part in value.items()
        )
    if isinstance(value, list):
        return _within(len(value), schema, "minItems", "maxItems") and all(
            follows(part, schema.get("items", True)) for part in value
        )
    if isinstance(value, str):
        found = re.search(schema.get("pattern", ""), value)
        return found is not None and _within(len(value), schema, "minLength", "maxLength")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _within(value, schema, "minimum", "maximum")
    return True


def _types(schema: dict) -> list[str]:
    kinds = schema.get("type", [])
    return [kinds] if isinstance(kinds, str) else kinds


def _is(value: Any, kind: str) -> bool:
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON: true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _within(size: float, schema: dict, low: str, high: str) -> bool:
    return schema.get(low, size) <= size <= schema.get(high, size)
