"""HTML from templates. Every value is escaped, unless it is HTML already."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

CELLS = 100_000  # of a table
PAPER_COLUMNS = 22  # of a table that fits on paper


class Html(str):
    """Text that is HTML already. It goes into a page unchanged."""

    __slots__ = ()


def escape(value: object) -> Html:
    """Any value as HTML; :class:`Html` stays unchanged.

    A character that is not printable is shown by its code: control characters, characters that change the direction of
    writing, and single surrogates, which the name of a folder may hold.
    """
    if isinstance(value, Html):
        return value
    return Html(html.escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))))


def join(parts: Iterable[object]) -> Html:
    """Join the parts."""
    return Html("".join(map(escape, parts)))


def fill(template: str, **values: object) -> Html:
    """Replace each ``$name`` in ``template``. ``KeyError`` if one has no value."""
    return Html(Template(template).substitute({name: escape(value) for name, value in values.items()}))


def load(path: Path) -> str:
    """The template in a file."""
    return path.read_text("utf-8")


def style() -> Html:
    """The style of all pages, for a ``style`` element."""
    return Html(load(Path(__file__).with_name("style.css")))


def table(
    caption: object,
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    texts: Sequence[int] = (0,),
    *,
    cards: bool = False,
) -> Html:
    """A table. It scrolls by itself if the page is too narrow for it. If it has more than ``CELLS`` cells, a sentence
    stands in its place, and on paper also if it has more than ``PAPER_COLUMNS`` columns.

    Args:
        caption: what the table shows.
        head: a heading for each column.
        rows: the cells of each row. The first cell is the heading of its row.
        texts: the columns that hold words. They are aligned to the left, and numbers to the right.
        cards: whether on a phone each row becomes a card, with its numbers below their headings.
    """
    rows = list(rows)
    cells = sum(map(len, rows))
    if cells > CELLS:
        return fill("<p>$caption: $cells numbers are too many for a page.</p>\n", caption=caption, cells=cells)
    start = [Html(' class="text"') if column in texts else Html("") for column in range(len(head))]
    body = [
        join(
            fill(
                "<td$start$name>$cell</td>" if i else '<th scope="row"$start>$cell</th>',
                start=start[i],
                name=fill(' data-label="$name"', name=head[i]) if cards else "",
                cell=cell,
            )
            for i, cell in enumerate(row)
        )
        for row in rows
    ]
    large = len(head) > PAPER_COLUMNS
    text = '<p class="on-paper">$caption: $columns columns are too many for paper.</p>\n'
    return fill(
        (text if large else "")
        + '<div class="scroll$large" tabindex="0" role="region" aria-label="$label">\n<table$kind>\n'
        "<caption>$caption</caption>\n<thead><tr>$head</tr></thead>\n<tbody>\n$body</tbody>\n</table>\n</div>\n",
        columns=len(head),
        large=" on-screen" if large else "",
        kind=Html(' class="cards"') if cards else "",
        label=f"Table: {caption}",
        caption=caption,
        head=join(
            fill('<th scope="col"$start>$cell</th>', start=side, cell=cell)
            for side, cell in zip(start, head, strict=True)
        ),
        body=join(fill("<tr>$row</tr>\n", row=row) for row in body),
    )


def figure(svg: str, alt: str, caption: object, numbers: Html, *, wide: bool = False) -> Html:
    """A picture with its description, and its numbers as a table that unfolds.

    Args:
        svg: an SVG element, such as those of :func:`wsn_fast.train.figures.svg`.
        alt: describes the picture in a sentence, for screen readers.
        caption: what the picture shows.
        numbers: the table.
        wide: whether the picture takes the whole width of the page, because its text would be too small otherwise.
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
    """Content that unfolds at a click."""
    return fill("<details>\n<summary>$summary</summary>\n$content</details>\n", summary=summary, content=content)


def notes(title: str, lines: Iterable[str]) -> Html:
    """A notice with a list; empty if there are no lines."""
    items = join(fill("<li>$line</li>\n", line=line) for line in lines)
    if not items:
        return items
    return fill('<div class="note" role="note">\n<p>$title</p>\n<ul>\n$items</ul>\n</div>\n', title=title, items=items)
