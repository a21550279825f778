"""A model that says nothing of its inputs is converted when it is first called, as torch.compile does."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from sqa_fx.errors import InputError

if TYPE_CHECKING:
    from sqa_fx.module import ConvertedModule
    from sqa_fx.partly import PartlyConvertedModule
    from sqa_fx.plan import Plan
    from sqa_fx.report import Report


class DeferredModule(nn.Module):
    """Converts ``model`` with the inputs of the first call; from then on it is the converted module."""

    def __init__(
        self,
        model: nn.Module,
        build: Callable[[tuple[Any, ...], dict[str, Any]], ConvertedModule | PartlyConvertedModule],
    ) -> None:
        super().__init__()
        self.__dict__["_original"] = model
        self.__dict__["_build"] = build
        self.converted: nn.Module | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Convert on the first call; then call the converted module."""
        if self.converted is None:
            self.converted = self.__dict__["_build"](args, kwargs)
            self.__dict__["_original"] = None
        return self.converted(*args, **kwargs)

    def _done(self) -> ConvertedModule | PartlyConvertedModule:
        if self.converted is None:
            raise InputError(
                "the model is converted on its first call: call it once, or pass args=/kwargs= to "
                "convert, before asking for this"
            )
        return self.converted  # type: ignore[return-value]

    @property
    def plan(self) -> Plan:
        """The plan. Raises InputError before the first call."""
        return self._done().plan

    @property
    def report(self) -> Report:
        """The report. Raises InputError before the first call."""
        return self._done().report

    def save(self, directory: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Save as :meth:`ConvertedModule.save` does. Raises InputError before the first call."""
        self._done().save(directory, overwrite)
