"""Blocks of a document that is written in Markdown and in HTML.

A function makes a block from plain text and escapes what either language would take for markup. The HTML is
one file that loads nothing: its style is inline and its figures are data.
"""

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from robal_jax.reporting.results import FLAGGED, NOT_RUN, NOTE, PASSED, TOO_FEW

_STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1100px; padding: 2rem 1.25rem 4rem; background: #fff; color: #1b2330;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { margin: 0 0 .75rem; font-size: 1.9rem; line-height: 1.2; overflow-wrap: anywhere }
h2 { margin: 3rem 0 .75rem; padding-bottom: .3rem; border-bottom: 2px solid #dfe4ec; font-size: 1.35rem }
p, ul { max-width: 52rem }
p { margin: .6rem 0 }
header p:not(.banner):not(.lead) { color: #55606f }
.lead { max-width: none; font-size: 1.18rem; line-height: 1.45 }
nav { margin: 1.5rem 0 0; padding: .6rem .9rem; background: #f4f6f9; border-radius: 6px; font-size: .92rem }
nav a { display: inline-block; margin: .1rem 1.1rem .1rem 0; color: #00527f }
.badge { display: inline-block; padding: .1rem .55rem; border-radius: 1rem; font-size: .78rem;
  font-weight: 600; letter-spacing: .02em; white-space: nowrap }
.flagged { background: #fbe3df; color: #8f1d10 }
.note { background: #fff1cc; color: #6b4a00 }
.passed { background: #dff1e7; color: #0a5733 }
.not-run { background: #e8ebf0; color: #4a5464 }
.banner { max-width: none; margin: 1rem 0; padding: .8rem 1rem; border-left: 6px solid; border-radius: 4px;
  font-weight: 600; font-size: 1.08rem }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0 }
.card { flex: 1 1 9rem; padding: .7rem .9rem; border: 1px solid #dfe4ec; border-radius: 6px }
.card b { display: block; font-size: 1.7rem; line-height: 1.25; font-variant-numeric: tabular-nums }
.card span { display: block; color: #55606f; font-size: .88rem; font-variant-numeric: tabular-nums }
.scroll { width: fit-content; max-width: 100%; overflow: auto; margin: .8rem 0 1.2rem;
  border: 1px solid #dfe4ec; border-radius: 6px }
.tall { max-height: 40rem }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .38rem .7rem; border-bottom: 1px solid #edf0f4; text-align: left; vertical-align: top }
th { position: sticky; top: 0; background: #f4f6f9; white-space: nowrap }
tbody tr:last-child td { border-bottom: 0 }
.number { text-align: right; white-space: pre }
.number i { color: #6a7482; font-style: normal; font-size: .86em }
td:not(.number) { overflow-wrap: anywhere; min-width: 7.5rem }
.small { display: flex; flex-wrap: wrap; gap: .4rem .6rem; margin: .4rem 0 }
.small .scroll { margin: 0 }
.small table { font-size: .8rem; color: #55606f }
.small caption { padding: .15rem .55rem 0; text-align: left; white-space: nowrap }
.small th, .small td { padding: .15rem .55rem; text-align: right }
figure { margin: 1rem 0 1.5rem; overflow-x: auto }
figure img { display: block; max-width: 100%; height: auto }
figcaption { margin-top: .35rem; color: #55606f; font-size: .9rem }
.checks { max-width: none; margin: .8rem 0; padding: 0; list-style: none }
.checks li { padding: .65rem 0; border-bottom: 1px solid #edf0f4 }
.checks p { margin: .2rem 0 0; max-width: none }
pre { margin: .6rem 0; padding: .8rem 1rem; overflow-x: auto; background: #f4f6f9; border-radius: 6px;
  font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
summary { cursor: pointer; color: #00527f }
@media (max-width: 600px) {
  body { padding: 1.25rem .9rem 3rem }
  h1 { font-size: 1.5rem }
  figure img { max-width: none; width: 40rem }
  figure.wide img { width: 75rem }
  figcaption { position: sticky; left: 0 }
  th:first-child, td:first-child { position: sticky; left: 0; z-index: 1; background: #fff }
  th:first-child { z-index: 2; background: #f4f6f9 }
  .small th:first-child, .small td:first-child { position: static }
  td:first-child:not(.number) { min-width: 7rem; overflow-wrap: break-word }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt }
  nav { display: none }
  .scroll { max-height: none; overflow: visible; border: 0 }
  th { position: static }
  table { font-size: 8.5pt }
  th, td { padding: .25rem .4rem }
  pre { white-space: pre-wrap; overflow-wrap: anywhere }
  h2 { break-after: avoid }
  figure, tr, .card, .banner, .checks li { break-inside: avoid }
  .badge, .banner, th { print-color-adjust: exact }
}
"""

BADGES = {
    PASSED: ("passed", "PASSED"),
    NOTE: ("note", "NOTE"),
    FLAGGED: ("flagged", "FLAGGED"),
    TOO_FEW: ("not-run", "TOO FEW IMAGES"),
    NOT_RUN: ("not-run", "NOT RUN"),
}
"""Style and text of a check's outcome."""


class Block(NamedTuple):
    """A part of a document in both languages; ``title`` is that of a section which begins here."""

    markdown: str
    html: str
    title: str = ""


def section(title: str) -> Block:
    """Returns the heading of a section, which the table of contents lists."""
    return Block(f"## {_marked(title)}", f'<h2 id="{_anchor(title)}">{html.escape(title)}</h2>', title)


def paragraph(text: str) -> Block:
    """Returns running text."""
    return Block(_marked(text), f"<p>{html.escape(text)}</p>")


def lead(text: str) -> Block:
    """Returns the sentence that says what the document found."""
    return Block(_marked(text), f'<p class="lead">{html.escape(text)}</p>')


def points(items: Iterable[tuple[str, str]]) -> Block:
    """Returns a list; each item is (words in bold, text after them)."""
    items = list(items)
    return Block(
        "\n".join(f"- **{_marked(lead)}** {_marked(text)}" for lead, text in items),
        "<ul>"
        + "".join(f"<li><b>{html.escape(lead)}</b> {html.escape(text)}</li>" for lead, text in items)
        + "</ul>",
    )


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> Block:
    """Returns a table; columns in which every cell begins with a digit are aligned to the right.

    Args:
      header: headings of the columns.
      rows: as many cells per row; anything that ``str`` prints.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    heads = [str(head) for head in header]
    right = [bool(cells) and all(re.match(r"[-+]?\d", row[i]) for row in cells) for i in range(len(heads))]

    def line(row: Iterable[str]) -> str:
        return "| " + " | ".join(_marked(cell).replace("|", "\\|") for cell in row) + " |"

    def tag(name: str, text: str, number: bool) -> str:
        # The interval after a number is printed smaller.
        text = re.sub(r"(\[.*\])$", r"<i>\1</i>", html.escape(text)) if number else html.escape(text)
        return f'<{name} class="number">{text}</{name}>' if number else f"<{name}>{text}</{name}>"

    def html_row(name: str, row: Sequence[str]) -> str:
        return "<tr>" + "".join(tag(name, *cell) for cell in zip(row, right, strict=True)) + "</tr>"

    place = "scroll tall" if len(cells) > 40 else "scroll"  # many classes scroll in place, settings do not
    rule = "|" + "".join(" ---: |" if number else " --- |" for number in right)
    return Block(
        "\n".join((line(heads), rule, *map(line, cells))),
        f'<div class="{place}"><table><thead>{html_row("th", heads)}</thead>\n<tbody>'
        + "\n".join(html_row("td", row) for row in cells)
        + "</tbody></table></div>",
    )


def figure(name: str, caption: str, svg: bytes, *, wide: bool = False) -> Block:
    """Returns a figure: Markdown links to the file ``name``, HTML holds the SVG itself.

    A small screen shows a ``wide`` figure larger, to be scrolled.
    """
    text, style = html.escape(caption), ' class="wide"' if wide else ""
    # As an image, not inline: the names inside one drawing cannot collide with those of another.
    source = "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    return Block(
        f"![{_marked(caption)}]({name})",
        f'<figure{style}><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>',
    )


def banner(outcome: str, text: str) -> Block:
    """Returns the verdict above everything else; ``outcome`` as in ``BADGES``."""
    return Block(f"**{_marked(text)}**", f'<p class="banner {BADGES[outcome][0]}">{html.escape(text)}</p>')


def cards(items: Iterable[tuple[str, ...]]) -> Block:
    """Returns numbers to see first, each as (name, number, remark, ...)."""
    lines, shown = [], []
    for name, value, *notes in items:
        lines.append(f"- {_marked(name)}: **{_marked(value)}** {_marked('; '.join(notes))}")
        spans = "".join(f"<span>{html.escape(note)}</span>" for note in notes)
        shown.append(
            f'<div class="card"><span>{html.escape(name)}</span><b>{html.escape(value)}</b>{spans}</div>'
        )
    return Block("\n".join(lines), f'<div class="cards">{"".join(shown)}</div>')


def small_table(figures: Mapping[str, Any]) -> Block:
    """Returns figures as small tables side by side; Markdown has them on one line, for use inside of a list.

    Args:
      figures: a value per name, or several by name: {'accuracy': {'1': 0.48, '30': 0.61}, 'images': 500}.
    """
    single = {name: value for name, value in figures.items() if not isinstance(value, Mapping)}
    several = {name: value for name, value in figures.items() if isinstance(value, Mapping) and value}
    groups = [("", single)] * bool(single) + list(several.items())

    def shown(title: str, group: Mapping[str, Any]) -> str:
        heads = "".join(f"<th>{html.escape(_words(name))}</th>" for name in group)
        cells = "".join(f'<td class="number">{html.escape(_figure(value))}</td>' for value in group.values())
        caption = f"<caption>{html.escape(_words(title))}</caption>" if title else ""
        return f'<div class="scroll"><table>{caption}<tr>{heads}</tr><tr>{cells}</tr></table></div>'

    def line(group: Mapping[str, Any]) -> str:
        return ", ".join(
            f"{_words(name)} ({line(value)})"
            if isinstance(value, Mapping)
            else f"{_words(name)} = {_figure(value)}"
            for name, value in group.items()
        )

    return Block(
        _marked(line(figures)), f'<div class="small">{"".join(shown(*group) for group in groups)}</div>'
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _figure(value: Any) -> str:
    """Returns a value in four digits; a list of values with commas, deeper figures on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(name)} {_figure(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_figure, value))
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)


def folded(title: str, block: Block) -> Block:
    """Returns a block that HTML shows on demand only, under the name ``title``."""
    return Block(
        block.markdown, f"<details><summary>{html.escape(title)}</summary>\n{block.html}\n</details>"
    )


def checks(items: Iterable[tuple[str, str, str, Mapping[str, Any]]]) -> Block:
    """Returns outcomes of checks, each as (outcome as in ``BADGES``, title, statement, evidence)."""
    lines, entries = [], []
    for outcome, title, statement, evidence in items:
        style, badge = BADGES[outcome]
        lines.append(f"- **{badge}: {_marked(title)}.** {_marked(statement)}")
        entry = f'<span class="badge {style}">{badge}</span> <b>{html.escape(title)}</b>'
        entry += f"<p>{html.escape(statement)}</p>"
        if evidence:
            figures = small_table(evidence)
            lines.append(f"  - Evidence: {figures.markdown}")
            entry += figures.html
        entries.append(f"<li>{entry}</li>")
    return Block("\n".join(lines), f'<ul class="checks">{"".join(entries)}</ul>')


def code(text: str, language: str = "") -> Block:
    """Returns text as it is."""
    return Block(f"```{language}\n{text}\n```", f"<pre>{html.escape(text)}</pre>")


def to_markdown(title: str, blocks: Iterable[Block]) -> str:
    """Returns the document in Markdown."""
    return "\n\n".join((f"# {_marked(title)}", *(block.markdown for block in blocks))) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """Returns the document as one HTML page; the blocks before the first section are its header."""
    sections = [block.title for block in blocks if block.title]
    first = next((index for index, block in enumerate(blocks) if block.title), len(blocks))
    links = " ".join(f'<a href="#{_anchor(name)}">{html.escape(name)}</a>' for name in sections)
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # Whatever the text contains, the page can neither run nor load anything.
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">",
            f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f"<header>\n<h1>{html.escape(title)}</h1>",
            *(block.html for block in blocks[:first]),
            f"</header>\n<nav>{links}</nav>\n<main>",
            *(block.html for block in blocks[first:]),
            "</main>\n</body>\n</html>\n",
        )
    )


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _marked(text: str) -> str:
    """Returns text for Markdown on one line: nothing in it is markup, and ``a_b`` keeps its underscore."""
    text = html.escape(" ".join(text.split()), quote=False).replace("&gt;", ">")
    return re.sub(r"[\\`*]|(?<![^\W_])_|_(?![^\W_])", lambda match: "\\" + match[0], text)
