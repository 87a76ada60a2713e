"""A page shows the text that it was given, whatever that text would mean to HTML or Markdown."""

import re
from html.parser import HTMLParser

import pytest

from reid_dist.report.document import Heading, Picture, Table, Text, as_html, as_markdown

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "[press](javascript:alert(1)) ![x](https://evil.example/p.png)",
    "a | b | c",
    "line one\n# heading\n\n- item",
    "`code` *bold* _em_ ~~gone~~ $x_1$ <b>b</b> &lt; &amp;",
    "1. first",
    "- item",
    "www.evil.example https://evil.example me@evil.example",
    "</table></details></body>",
    "back\\slash \\| \\`",
]
PLAIN_TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "nav",
    "a",
    "h2",
    "h3",
    "p",
    "div",
    "figure",
    "img",
}
PLAIN_TAGS |= {"figcaption", "table", "caption", "thead", "tbody", "tr", "th", "td", "details", "summary"}


class Reader(HTMLParser):
    """What a browser sees: elements with attributes, and the text of each."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page(text: str) -> tuple[Reader, str]:
    blocks = [
        Heading(2, text),
        Text(text),
        Picture("pictures/a-1.png", text, (10, 20)),
        Table((text, "R1"), [[text, "1.5"], ["plain", "12.0"]], title=text, note=text),
        Table(("a", "b"), [], title=text, folded=True),
    ]
    reader = Reader()
    reader.feed(as_html(text, blocks))
    return reader, as_markdown(text, blocks)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_stays_text_in_html(text: str) -> None:
    reader, _ = page(text)
    harmless, _ = page("harmless")
    assert [tag for tag, _ in reader.tags] == [tag for tag, _ in harmless.tags]
    assert [set(attributes) for _, attributes in reader.tags] == [set(attributes) for _, attributes in harmless.tags]
    assert {tag for tag, _ in reader.tags} <= PLAIN_TAGS
    line = " ".join(text.split())
    # Title twice, navigation, heading, paragraph, caption of the picture, table: title, head, cell, note, summary.
    assert sum(part == line for part in reader.texts) == 11
    (image,) = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert image["src"] == "pictures/a-1.png" and image["alt"] == line.partition(". ")[0]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_stays_text_in_markdown(text: str) -> None:
    _, markdown = page(text)
    assert "<" not in markdown and "://" not in markdown and "www." not in markdown and "@" not in markdown
    assert len(markdown.splitlines()) == len(page("harmless")[1].splitlines())
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in markdown.splitlines() if line[:1] == "|"} == {3}


@pytest.mark.parametrize("text", HOSTILE)
def test_a_reader_of_markdown_gets_the_text_back(text: str) -> None:
    markdown_it = pytest.importorskip("markdown_it", reason="no reader of Markdown here; gradio brings one")
    parser = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    reader, harmless = Reader(), Reader()
    reader.feed(parser.render(page(text)[1]))
    harmless.feed(parser.render(page("harmless")[1]))
    assert [tag for tag, _ in reader.tags] == [tag for tag, _ in harmless.tags]
    line = " ".join(text.split())
    # Title, heading, paragraph and caption; of the table head, cell, title and note; the title of the empty one.
    assert sum(part.strip() == line for part in reader.texts) == 9


def test_names_and_numbers_stay_readable_in_markdown() -> None:
    table = Table(("benchmark", "k_reciprocal(k1=20)", "mAP"), [["cuhk_pedes (test)", "45.2", "1,600"]], texts=2)
    lines = as_markdown("A page", [table]).splitlines()
    assert lines[2:] == [
        "| benchmark         | k_reciprocal(k1=20) |   mAP |",
        "|-------------------|---------------------|------:|",
        "| cuhk_pedes (test) | 45.2                | 1,600 |",
    ]


def test_html_aligns_numbers_folds_tables_and_runs_nothing() -> None:
    text = as_html("t", [Table(("a", "b"), [["x", "1"]]), Table(("a", "b"), [["x", "1"]], title="more", folded=True)])
    assert text.count('<td class="text">x</td><td class="number">1</td>') == 2
    assert text.count("<details><summary>more</summary>") == 1 and "<caption>" not in text
    assert "script-src 'none'" in text and "http://" not in text and "https://" not in text


def test_a_row_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="has not 2 cells"):
        Table(("a", "b"), [["x"]], title="t")
