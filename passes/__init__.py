"""The compiler: capture, head labels, find, rewrite, simplify, verify. Import as ``sqa_fx.passes``."""

if __name__ != "sqa_fx.passes":
    raise ImportError(
        f"this package was imported as {__name__!r}, a second copy of every class in it; import 'sqa_fx.passes' instead"
    )
