"""The format of numbers on a page."""

from __future__ import annotations

from .markup import Html, escape

NONE = Html("&ndash;")


def fixed(value: float | None, digits: int = 2, *, sign: bool = False) -> Html:
    """A number with ``digits`` digits after the point; a dash for None."""
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if not text.strip("+-0."):  # a zero has no minus
        text = text.replace("-", "+" if sign else "")
    return Html(text.replace("-", "&minus;"))


def rate(value: float | None) -> Html:
    """A whole number with separated thousands; a dash for None."""
    return NONE if value is None else escape(f"{value:,.0f}")


def duration(seconds: float) -> str:
    """Seconds in words; a dash for 0."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds else NONE
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
