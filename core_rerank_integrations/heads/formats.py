"""Head set files: this package's JSON, and the files of other projects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from core_rerank_integrations.errors import HeadSetError, requires_extra

PUBLISHED_CORE_HEADS = 8
"""Number of heads that arXiv 2510.02219 takes from its rankings."""


def read_fields(path: Path) -> dict[str, Any]:
    """Read the fields of a `HeadSet` from a file of any supported format.

    Raises:
        HeadSetError: The file is missing or has another format.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = _parse_yaml(text) if path.suffix in {".yaml", ".yml"} else json.loads(text)
    except (OSError, ValueError) as error:
        raise HeadSetError(f"cannot read the head set {path}: {error}") from error
    if not isinstance(content, dict):
        raise HeadSetError(f"{path} holds no head set: expected an object at its top level")
    try:
        return _from_foreign(content, path.stem) or content
    except (AttributeError, TypeError, ValueError) as error:
        raise HeadSetError(f"{path} is not a usable head set: {error}") from error


def to_json(value: JsonValue, indent: str = "") -> str:
    """Format JSON with one line per entry and per head, so that changes are easy to review."""
    inner = f"{indent}  "
    if isinstance(value, dict):
        brackets = "{}"
        items = [f"{json.dumps(key)}: {to_json(item, inner)}" for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        brackets = "[]"
        items = [json.dumps(item, ensure_ascii=False) for item in value]
    else:
        return json.dumps(value, ensure_ascii=False)
    lines = f",\n{inner}".join(items)
    return f"{brackets[0]}\n{inner}{lines}\n{indent}{brackets[1]}"


def _from_foreign(content: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Convert another project's file; return ``None`` if it is not one."""
    params = content.get("params", content)
    if isinstance(params, Mapping) and "important_heads" in params:
        return {
            "name": name,
            "model": content.get("model_info", {}).get("model_id"),
            "heads": [{"layer": layer, "head": head} for layer, head in params["important_heads"]],
            "provenance": {"details": {"format": "vLLM-Hook important_heads"}},
        }
    if "attn_head_set" in content:
        return {
            "name": name,
            "model": content.get("model_name_or_path"),
            "heads": [_parse_head(item) for item in content["attn_head_set"].split(",")],
            "provenance": {"method": "qr", "details": {"format": "QRHead attn_head_set"}},
        }
    if content and all(_is_head(key) for key in content):
        ranking = sorted(content.items(), key=lambda item: -item[1])
        heads = [{**_parse_head(key), "score": score} for key, score in ranking]
        return {
            "name": name,
            "heads": heads[:PUBLISHED_CORE_HEADS],
            "provenance": {
                "method": "core",
                "details": {"format": "CoRe release layer-head scores"},
                "ranked_heads": [(head["layer"], head["head"], head["score"]) for head in heads],
            },
        }
    return None


def _is_head(key: str) -> bool:
    layer, _, head = key.partition("-")
    return layer.isdigit() and head.isdigit()


def _parse_head(text: str) -> dict[str, Any]:
    layer, _, head = text.strip().partition("-")
    return {"layer": int(layer), "head": int(head)}


def _parse_yaml(text: str) -> Any:
    with requires_extra("cli"):
        import yaml
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from error
