"""OpenVINO, imported without its telemetry. Nothing else imports it."""

from __future__ import annotations

import sys

# OpenVINO reports its import to an analytics server, unless this package is not installed.
# If the program imported OpenVINO before, it has decided about telemetry itself.
_hidden = "openvino_telemetry"
_hides = "openvino" not in sys.modules and _hidden not in sys.modules
if _hides:
    sys.modules[_hidden] = None  # type: ignore[assignment]
try:
    import openvino
    from openvino import (
        Model,
        Node,
        PartialShape,
        Shape,
        Tensor,
        Type,
        opset15 as ops,
    )
    from openvino.op import Constant
finally:
    if _hides:
        del sys.modules[_hidden]

__all__ = [
    "Constant",
    "Model",
    "Node",
    "PartialShape",
    "Shape",
    "Tensor",
    "Type",
    "openvino",
    "ops",
]
