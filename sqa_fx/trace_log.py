"""Graphs for debugging: ``TORCH_LOGS=+sqa_fx`` prints them, and ``TORCH_TRACE`` keeps them as artifacts."""

from __future__ import annotations

import logging

from torch import fx
from torch._logging._internal import trace_structured

log = logging.getLogger(__name__)


def log_graph(name: str, module: fx.GraphModule) -> None:
    """Log the readable code of ``module`` at debug level, and as the structured artifact ``sqa_fx_<name>``."""

    def text() -> str:
        return str(module.print_readable(print_output=False, include_stride=False))

    if log.isEnabledFor(logging.DEBUG):
        log.debug("graph %s:\n%s", name, text())
    trace_structured("artifact", metadata_fn=lambda: {"name": f"sqa_fx_{name}", "encoding": "string"}, payload_fn=text)
