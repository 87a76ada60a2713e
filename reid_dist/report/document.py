"""A page of headings, text, tables and pictures, as Markdown and as HTML; whatever text it is given stays text."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    """Of level 2 to 4; level 1 is the title."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """One paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows under a head.

    Attributes:
        head: names of the columns.
        rows: as many cells each.
        title: one line above it.
        note: one line below it.
        folded: in HTML, shown only after a click on the title.
        texts: the first so many columns are text; the others are numbers, which stand on the right.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    folded: bool = False
    texts: int = 1

    def __post_init__(self) -> None:
        """Every row must be as wide as the head."""
        if any(len(row) != len(self.head) for row in self.rows):
            raise ValueError(f"a row of the table {self.title!r} has not {len(self.head)} cells")


@dataclass(frozen=True)
class Picture:
    """A picture beside the page.

    Attributes:
        file: its path from the page's folder; letters, digits and `_ - . /` only.
        text: what it shows; the first sentence stands for it where it cannot be seen.
        size: pixels, (width, height).
    """

    file: str
    text: str
    size: tuple[int, int]


Block = Heading | Text | Table | Picture

_STYLE = """
:root { color-scheme: light; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem; margin: 0 auto;
  padding: 1rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid #ccc; }
h3 { margin-top: 2rem; } p, figcaption, caption { max-width: 48rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; overflow-wrap: normal; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid #ddd; vertical-align: top; }
.number { text-align: right; white-space: nowrap; } .text { text-align: left; max-width: 22rem; }
td.text { overflow-wrap: break-word; min-width: 5.5rem; }
thead th { border-bottom: 2px solid #888; } tbody tr:hover { background: #f3f6fa; }
.note, figcaption { color: #555; font-size: .9rem; } summary { cursor: pointer; font-weight: 600; }
figure { margin: 1rem 0; } figure a { display: block; overflow-x: auto; }
figure img { max-width: 100%; height: auto; border: 1px solid #e3e3e3; }
@media (max-width: 48rem) { figure img { max-width: 52rem; } }
nav a { margin-right: 1rem; }
""".strip()
# Nothing on the page runs, even where a name or a caption should find a way through the escapes.
_POLICY = "script-src 'none'; object-src 'none'; base-uri 'none'; form-action 'none'"


def as_markdown(title: str, blocks: Iterable[Block]) -> str:
    """The page as Markdown of GitHub's kind."""
    parts = [f"# {_plain(title)}", *(_markdown(block) for block in blocks)]
    return "\n\n".join(parts) + "\n"


def as_text(table: Table) -> str:
    """A Markdown table for terminals and logs, its text as it is; title above and note below."""
    return _markdown_table(table, str)


def as_html(title: str, blocks: Sequence[Block]) -> str:
    """The page as one HTML file without scripts and without anything from elsewhere but its pictures."""
    heads = [(f"s{place}", block) for place, block in enumerate(blocks) if isinstance(block, Heading)]
    links = "\n".join(f'<a href="#{name}">{_escape(head.text)}</a>' for name, head in heads if head.level == 2)
    body = "\n".join(_html(block, f"s{place}") for place, block in enumerate(blocks))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        f"<h1>{_escape(title)}</h1>\n<nav>\n{links}\n</nav>\n{body}\n</body>\n</html>\n"
    )


def _plain(text: str) -> str:
    """Text that Markdown neither formats nor takes for HTML, a link or the start of something, on one line."""
    line = html.escape(" ".join(text.split()), quote=False)
    line = re.sub(r"([\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", line)  # a _ inside a word is plain
    line = line.replace("://", "&#58;//").replace("@", "&#64;").replace("www.", "www&#46;")  # no link by itself
    return re.sub(r"^(\d*)([-+=#]|[.)](?= |$))", r"\1\\\2", line)  # no list, heading or rule


def _escape(text: str) -> str:
    return html.escape(" ".join(text.split()), quote=True)


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_plain(block.text)}"
    if isinstance(block, Text):
        return _plain(block.text)
    if isinstance(block, Picture):
        return f"![{_plain(_first_sentence(block.text))}]({block.file})\n\n{_plain(block.text)}"
    return _markdown_table(block, _plain)


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0]


def _markdown_table(table: Table, say: Callable[[str], str]) -> str:
    lines = [[say(cell) for cell in row] for row in (table.head, *table.rows)]
    width = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    is_text = [column < table.texts for column in range(len(width))]
    shown = []
    for line in lines:
        cells = [c.ljust(w) if text else c.rjust(w) for c, w, text in zip(line, width, is_text, strict=True)]
        shown.append("| " + " | ".join(cells) + " |")
    rule = "|" + "|".join("-" * (w + 1) + ("-" if text else ":") for w, text in zip(width, is_text, strict=True)) + "|"
    parts = say(table.title), "\n".join([shown[0], rule, *shown[1:]]), say(table.note)
    return "\n\n".join(part for part in parts if part)


def _html(block: Block, name: str) -> str:
    if isinstance(block, Heading):
        return f'<h{block.level} id="{name}">{_escape(block.text)}</h{block.level}>'
    if isinstance(block, Text):
        return f"<p>{_escape(block.text)}</p>"
    if isinstance(block, Picture):
        width, height = block.size
        text = _escape(block.text)
        short = _escape(_first_sentence(block.text))
        image = f'<img src="{_escape(block.file)}" alt="{short}" width="{width}" height="{height}" loading="lazy">'
        return f'<figure><a href="{_escape(block.file)}">{image}</a><figcaption>{text}</figcaption></figure>'
    return _html_table(block)


def _html_table(table: Table) -> str:
    head = _html_row("th", table, table.head)
    rows = "\n".join(_html_row("td", table, row) for row in table.rows)
    caption = f"<caption>{_escape(table.title)}</caption>" if table.title and not table.folded else ""
    note = f'<p class="note">{_escape(table.note)}</p>' if table.note else ""
    text = f'<div class="wide"><table>{caption}<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody></table></div>{note}'
    return f"<details><summary>{_escape(table.title)}</summary>{text}</details>" if table.folded else text


def _html_row(tag: str, table: Table, cells: Sequence[str]) -> str:
    names = ['class="text"' if column < table.texts else 'class="number"' for column in range(len(cells))]
    inside = (f"<{tag} {name}>{_escape(cell)}</{tag}>" for name, cell in zip(names, cells, strict=True))
    return f"<tr>{''.join(inside)}</tr>"
