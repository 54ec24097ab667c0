"""Head set files: this package's JSON, and the files of other projects."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from pydantic import JsonValue

from core_rerank_integrations.errors import HeadSetError, requires_extra

PUBLISHED_CORE_HEADS = 8
"""Number of heads that arXiv 2510.02219 takes from its rankings."""
HEAD = re.compile(r"\d{1,9}-\d{1,9}", re.ASCII)
"""A head as text, LAYER-HEAD."""


def read_fields(path: Path) -> dict[str, Any]:
    """Read the fields of a `HeadSet` from a file of any supported format.

    Raises:
        HeadSetError: The file is missing or has another format.
    """
    is_yaml = path.suffix in {".yaml", ".yml"}
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = _parse_yaml(text) if is_yaml else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise HeadSetError(f"cannot read the head set {path}: {error}") from error
    if not isinstance(content, dict):
        raise HeadSetError(f"{path} holds no head set: expected an object at its top level")
    try:
        fields = _from_foreign(content, path.stem)
    except ValueError as error:
        raise HeadSetError(f"{path} is not a usable head set: {error}") from error
    if fields is None and is_yaml:
        raise HeadSetError(f"{path} holds no head set: expected 'attn_head_set', as of QRHead")
    return fields or content


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
    """Convert another project's file; return ``None`` if it is not one.

    Raises:
        ValueError: A value has the wrong type; the message names its key.
    """
    params = content.get("params", content)
    if isinstance(params, Mapping) and "important_heads" in params:
        info = _checked("model_info", content.get("model_info", {}), Mapping)
        pairs = _checked("important_heads", params["important_heads"], list)
        return {
            "name": name,
            "model": _checked("model_id", info.get("model_id"), str | None),
            "heads": [_pair(pair) for pair in pairs],
            "provenance": {"details": {"format": "vLLM-Hook important_heads"}},
        }
    if "attn_head_set" in content:
        heads = _checked("attn_head_set", content["attn_head_set"], str)
        return {
            "name": name,
            "model": _checked("model_name_or_path", content.get("model_name_or_path"), str | None),
            "heads": [_parse_head(head) for head in heads.split(",")],
            "provenance": {"method": "qr", "details": {"format": "QRHead attn_head_set"}},
        }
    if content and all(isinstance(key, str) and HEAD.fullmatch(key) for key in content):
        scores = {key: _checked(key, value, int | float) for key, value in content.items()}
        ranking = sorted(scores.items(), key=lambda item: -item[1])
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


def _checked(key: str, value: Any, kind: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{key}: the wrong type, {type(value).__name__}: {shortened(value)}")
    return value


def _pair(value: Any) -> dict[str, Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"important_heads: a head is [layer, head], got {shortened(value)}")
    return {"layer": value[0], "head": value[1]}


def _parse_head(text: str) -> dict[str, Any]:
    if not HEAD.fullmatch(text.strip()):
        raise ValueError(f"a head is LAYER-HEAD, such as 14-22, got {shortened(text)}")
    layer, _, head = text.strip().partition("-")
    return {"layer": int(layer), "head": int(head)}


def _parse_yaml(text: str) -> Any:
    with requires_extra("cli"):
        import yaml
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from error
