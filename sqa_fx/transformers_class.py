"""A class of transformers by the name that a config.json has for it."""

from __future__ import annotations

from typing import Any

from sqa_fx.errors import InputError, MissingError
from sqa_fx.torchvision_ops import make_torchvision_importable


def transformers_class(name: Any, where: object) -> Any:
    """The class called ``name`` in the config at ``where``; code that lies beside the config is never run.

    Raises MissingError without transformers, and InputError when it has no such class.
    """
    make_torchvision_importable()
    try:
        import transformers
    except ImportError as error:
        raise MissingError(f"{where} needs transformers: pip install transformers") from error
    cls = getattr(transformers, str(name), None)
    if cls is None:
        raise InputError(f"transformers {transformers.__version__} has no {name}, and code in the folder is not run")
    return cls
