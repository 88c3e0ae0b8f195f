"""HTML from templates, in which every value is escaped unless it is HTML already."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

_FOLDER = Path(__file__).parent


class Html(str):
    """Text that is HTML already, and goes into a page as it is."""

    __slots__ = ()


def escape(value: object) -> Html:
    """Any value as HTML; :class:`Html` stays what it is.

    What is not printable (control characters, those that turn the direction of writing, half of a pair that a folder's
    name may hold) is shown by its code.
    """
    if isinstance(value, Html):
        return value
    return Html(html.escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))))


def join(parts: Iterable[object]) -> Html:
    """Parts one after the other."""
    return Html("".join(map(escape, parts)))


def fill(template: str, **values: object) -> Html:
    """``template`` with each ``$name`` replaced. ``KeyError`` if one has no value."""
    return Html(Template(template).substitute({name: escape(value) for name, value in values.items()}))


def load(name: str) -> str:
    """The template in the file ``name`` beside this module."""
    return (_FOLDER / name).read_text("utf-8")


def table(
    caption: object, head: Sequence[object], rows: Iterable[Sequence[object]], texts: Sequence[int] = (0,)
) -> Html:
    """A table that scrolls by itself where the page is too narrow for it.

    Args:
        caption: what it shows.
        head: a heading for each column.
        rows: the cells; the first of each is the heading of its row.
        texts: the columns that hold words, and stand to the left; numbers stand to the right.
    """
    start = [Html(' class="text"') if column in texts else Html("") for column in range(len(head))]
    body = [
        join(
            fill("<td$start>$cell</td>" if i else '<th scope="row"$start>$cell</th>', start=start[i], cell=cell)
            for i, cell in enumerate(row)
        )
        for row in rows
    ]
    return fill(
        '<div class="scroll" tabindex="0" role="region" aria-label="$label">\n<table>\n'
        "<caption>$caption</caption>\n<thead><tr>$head</tr></thead>\n<tbody>\n$body</tbody>\n</table>\n</div>\n",
        label=f"Table: {caption}",
        caption=caption,
        head=join(
            fill('<th scope="col"$start>$cell</th>', start=side, cell=cell)
            for side, cell in zip(start, head, strict=True)
        ),
        body=join(fill("<tr>$row</tr>\n", row=row) for row in body),
    )


def figure(svg: str, alt: str, caption: object, numbers: Html, *, wide: bool = False) -> Html:
    """A picture with its description, and its numbers as a table to unfold.

    Args:
        svg: from :func:`wsn_fast.train.figures.svg`.
        alt: what there is to see, in a sentence.
        caption: what is shown.
        numbers: the table.
        wide: it takes the whole width of the page, being small print otherwise.
    """
    return fill(
        '<figure$wide>\n<div role="img" aria-label="$alt">$svg</div>\n'
        "<figcaption>$caption</figcaption>\n$numbers</figure>\n",
        wide=Html(' class="wide"' if wide else ""),
        alt=alt,
        svg=Html(svg),
        caption=caption,
        numbers=unfold("Numbers", numbers),
    )


def unfold(summary: object, content: Html) -> Html:
    """Content that opens at a click."""
    return fill("<details>\n<summary>$summary</summary>\n$content</details>\n", summary=summary, content=content)
