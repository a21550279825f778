"""Ways out: ONNX and other engines. Import as ``sqa_fx.exporters``."""

if __name__ != "sqa_fx.exporters":
    raise ImportError(
        f"this package was imported as {__name__!r}, a second copy of every class in it; import "
        "'sqa_fx.exporters' instead"
    )
