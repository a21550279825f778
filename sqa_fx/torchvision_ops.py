"""Let torchvision be imported where its compiled operators do not load, as beside a torch of another build.

transformers and timm import torchvision when it is installed, so a torchvision that does not fit torch makes both
of them useless, although no transformer needs its operators. Its import fails on the operators that it registers fake
kernels for; declaring these (without kernels: calling one still fails) is enough.
"""

from __future__ import annotations

import sys

import torch

_DECLARED: list[torch.library.Library] = []  # an operator lives as long as the library object that declared it
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def make_torchvision_importable() -> None:
    """Import torchvision if it is installed, declaring the operators that the import misses.

    Does nothing where torchvision is absent or loads as it should.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        # The failed import leaves half of its modules behind; they must go before the next import.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        if not _DECLARED:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                if not hasattr(torch.ops.torchvision, operator):
                    library.define(operator + _SCHEMA)
            _DECLARED.append(library)
