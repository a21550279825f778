"""A vision transformer with fewer heads: convert, prove, export to ONNX, validate and measure.

    python examples/convert_vit.py [--variant SQA | --hq 6 --hkv 3] [--model vit_base_patch16_224] [--pretrained]

timm's model, or where timm is missing the ViT of transformers or torchvision, with random weights unless --pretrained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from example_steps import arguments, convert, device_and_dtype, ending, export_and_compare, library
from torch import Tensor, nn

from sqa_fx.errors import MissingError
from sqa_fx.inputs import Inputs

TIMM = "pip install --no-deps timm torchvision"


def timm_vit(options: argparse.Namespace, layers: int | None) -> nn.Module:
    """timm's model of that name."""
    size = {"depth": layers} if layers and not options.pretrained else {}
    found: nn.Module = library("timm", TIMM).create_model(options.model, pretrained=options.pretrained, **size)
    return found


class Logits(nn.Module):
    """A ViT of transformers, from its config, as timm's: an image [batch, 3, 224, 224] to logits [batch, classes]."""

    def __init__(self, layers: int | None) -> None:
        super().__init__()
        transformers = library("transformers", "pip install transformers")
        config = transformers.ViTConfig(num_hidden_layers=layers or 12, num_labels=1000)
        self.model = transformers.ViTForImageClassification(config)

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.model(pixel_values=image).logits
        return logits


def torchvision_vit(layers: int | None) -> nn.Module:
    """A ViT-B of torchvision."""
    vision = library("torchvision", TIMM).models.vision_transformer
    found: nn.Module = vision.VisionTransformer(224, 16, layers or 12, 12, 768, 3072)
    return found


def vit(options: argparse.Namespace, layers: int | None) -> nn.Module:
    """The model from the first library that is here."""
    makers: list[Callable[[], nn.Module]] = [
        lambda: timm_vit(options, layers),
        lambda: Logits(layers),
        lambda: torchvision_vit(layers),
    ]
    missing = []
    for make in makers:
        try:
            return make()
        except MissingError as error:
            if options.pretrained:
                raise
            missing.append(str(error))
            print(f"skipped {missing[-1]}")
    raise MissingError(f"no library with a ViT: {'; '.join(missing)}")


def run(options: argparse.Namespace) -> bool:
    """The whole example; whether both ONNX files are right."""
    device, dtype = device_and_dtype()
    torch.manual_seed(0)
    model = vit(options, options.layers or (2 if device == "cpu" else None)).to(device, dtype).eval()
    batches = options.batch or ([1, 2] if device == "cpu" else [1, 32])
    side = getattr(getattr(model, "patch_embed", None), "img_size", None) or (224, 224)
    images = {f"batch {n}": torch.randn(n, 3, *side, device=device, dtype=dtype) for n in batches}
    example = torch.randn(2, 3, *side, device=device, dtype=dtype)
    converted = convert(model, options, args=(example,))
    if options.pretrained:
        with torch.no_grad():
            same = torch.cosine_similarity(model(example), converted(example)).mean()
        print(f"logits, original against converted: cosine {same:.3f} on noise; heads are gone, so fine-tune")
    sets: dict[str, Inputs] = {label: ((image,), {}) for label, image in images.items()}
    tokens = [n * (side[0] // 16) * (side[1] // 16) for n in batches]
    return export_and_compare(model, converted, sets, options, tokens)


def main() -> int:
    """Read the command line and run."""
    parser = arguments(__doc__, "vit-out")
    parser.add_argument("--model", default="vit_base_patch16_224", help="a model of timm")
    parser.add_argument("--pretrained", action="store_true", help="timm's trained weights (downloads them)")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes to measure")
    return ending(run, parser)


if __name__ == "__main__":
    sys.exit(main())
