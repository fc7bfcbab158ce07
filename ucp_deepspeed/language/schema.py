"""JSON Schema of spec files, for completion in editors. It is made from the models, so that it can't differ from them."""

from __future__ import annotations

import inspect
from typing import Any

from ucp_deepspeed.language.dimensions import NUMBERS
from ucp_deepspeed.language.spec import PATTERN, Rule, Spec
from ucp_deepspeed.layout.pattern import Partial, Replicate, Scale, Shard, ShardGrid, Unique

_DEFINITIONS = {kind.__name__: kind for kind in (Unique, Replicate, Partial, Shard, ShardGrid, Scale)}


def spec_schema() -> dict[str, Any]:
    """Make the schema of a file. A pattern's fields stand beside ``match``; an expression may stand for a number."""
    schema = Spec.model_json_schema(by_alias=True)
    definitions = schema["$defs"]
    patterns = PATTERN.json_schema()["$defs"]
    match = definitions["Rule"]["properties"]["match"]
    common = {
        "match": {
            "description": "Globs of logical names: '*' is one part of a dotted name, or a piece of one; '**' any number.",
            "anyOf": [{"type": "string"}, {**match, "title": "Globs"}],
        },
        "shape": _with_expressions(definitions["Rule"]["properties"]["shape"], "shape"),
    }
    rules = []
    for name, kind in _DEFINITIONS.items():
        definitions[name] = _described(patterns[name], kind)
        if kind is not Scale:
            _make_rule(definitions[name], common)
            rules.append({"$ref": f"#/$defs/{name}"})
    definitions["Rule"] = {"title": "Rule", "description": _first_line(Rule), "oneOf": rules}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _make_rule(pattern: dict[str, Any], common: dict[str, Any]) -> None:
    """Turn the schema of a pattern into that of a rule that uses it."""
    properties = {key: _with_expressions(value, key) for key, value in pattern["properties"].items()}
    properties["pattern"] = {"const": properties["pattern"]["const"], "type": "string"}
    pattern["properties"] = common | properties
    pattern["required"] = ["match", "pattern", *(key for key in pattern.get("required", ()) if key != "pattern")]
    pattern["additionalProperties"] = False


def _with_expressions(field: Any, key: str) -> Any:
    """Return fields' schemas, with a string allowed wherever an expression may stand for a number."""
    if key not in NUMBERS:
        return field
    if isinstance(field, list):
        return [_with_expressions(item, key) for item in field]
    if not isinstance(field, dict):
        return field
    if field.get("type") == "integer":
        number = {name: value for name, value in field.items() if name in ("type", "minimum", "exclusiveMinimum")}
        rest = {name: value for name, value in field.items() if name not in number}
        return {**rest, "anyOf": [number, {"type": "string", "description": "Expression over dimensions."}]}
    return {name: _with_expressions(value, key) for name, value in field.items()}


def _described(schema: dict[str, Any], kind: type) -> dict[str, Any]:
    """Return a dataclass's schema; the lines under *Attributes* of its docstring describe the fields."""
    texts = _attributes(kind)
    properties = {
        key: {**value, "description": texts[key]} if key in texts else value
        for key, value in schema.get("properties", {}).items()
    }
    return {**schema, "description": _first_line(kind), "properties": properties}


def _attributes(kind: type) -> dict[str, str]:
    found: dict[str, str] = {}
    name = ""
    _, _, block = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    for line in block.split("\n\n")[0].splitlines():
        if not line.startswith("     "):
            name, _, line = line.strip().partition(":")
        found[name] = f"{found.get(name, '')} {line.strip()}".strip()
    return {key: text.replace("``", "'") for key, text in found.items()}


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ").replace("``", "'")
