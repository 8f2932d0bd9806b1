"""Blocks say the same in Markdown and in HTML, and nothing in a text is taken for markup."""

import re

import pytest
from helpers import Text

from robal_jax.reporting import page
from robal_jax.reporting.results import FLAGGED, OUTCOMES, PASSED

ODD = '<b>a</b> & "c" | `d` *e* _f_ g_h\nnext'


def blocks(text):
    return {
        "section": page.section(text),
        "paragraph": page.paragraph(text),
        "lead": page.lead(text),
        "folded": page.folded("title", page.paragraph(text)),
        "small_table": page.small_table({text: {"key": 1}, "other": text}),
        "points": page.points([(text, "after it")]),
        "table": page.table(["head", text], [[1, text], [2, "x"]]),
        "figure": page.figure("name.png", text, b"<svg/>"),
        "banner": page.banner(FLAGGED, text),
        "cards": page.cards([("Clean", "1 %", "[0, 2]", text)]),
        "checks": page.checks([(PASSED, "title", text, {"images": 3})]),
    }


@pytest.mark.parametrize("name", blocks(""))
def test_every_block_says_the_same_twice(name):
    block = blocks("plain words")[name]
    assert "plain words" in block.markdown
    assert "plain words" in Text(block.html).text


@pytest.mark.parametrize("name", blocks(""))
def test_nothing_in_a_text_is_markup(name):
    plain, odd = blocks("plain")[name], blocks(ODD)[name]
    assert [tag for tag, _ in Text(odd.html).tags] == [tag for tag, _ in Text(plain.html).tags]
    assert "<b>a</b>" in Text(odd.html).text
    assert len(odd.markdown.splitlines()) == len(plain.markdown.splitlines())
    assert "&lt;b>" in odd.markdown
    assert "<b>" not in odd.markdown
    for escaped in (r"\`d\`", r"\*e\*", r"\_f\_ g_h"):
        assert escaped in odd.markdown


def test_figures_in_tables_stand_to_the_right():
    block = page.table(["name", "figure", "mixed"], [["a", "1.5 [1.0, 2.0]", "1"], ["b|c", "-3", "x"]])
    assert block.markdown.splitlines()[1] == "| --- | ---: | --- |"
    assert block.markdown.splitlines()[3] == r"| b\|c | -3 | x |"
    numbers = [tag for tag, attributes in Text(block.html).tags if attributes.get("class") == "number"]
    assert numbers == ["th", "td", "td"]
    assert page.table(["name", "figure"], []).markdown.splitlines() == ["| name | figure |", "| --- | --- |"]


def test_code_stays_as_it_is():
    text = '{"a": "<b> & *c*"}'
    block = page.folded("All of it", page.code(text, "json"))
    assert block.markdown == f"```json\n{text}\n```"
    assert Text(block.html).text.split("\n") == ["All of it", text, ""]
    assert Text(block.html).tags[0][0] == "details"


def test_evidence_as_small_tables():
    evidence = {
        "accuracy": {"1": 0.4, "30": 0.61},
        "images": 500,
        "p_value": 2.118e-22,
        "right": [1, 2],
        "gap": {"value": 0.01, "of": {"low": 0.0}},
        "nothing": {},
    }
    block = page.small_table(evidence)
    assert block.markdown == (
        "accuracy (1 = 0.4, 30 = 0.61), images = 500, p value = 2.118e-22, right = 1, 2, "
        "gap (value = 0.01, of (low = 0)), nothing ()"
    )
    tags = [tag for tag, _ in Text(block.html).tags]
    assert [tags.count(tag) for tag in ("table", "caption", "th", "td")] == [3, 2, 7, 7]
    for text in ("accuracy", "0.61", "p value", "2.118e-22", "1, 2", "low 0"):
        assert text in Text(block.html).text
    assert Text(page.small_table({}).html).text == ""


def test_outcomes_of_checks():
    block = page.checks([(name, name, "s", {"images": 3} if name == FLAGGED else {}) for name in OUTCOMES])
    for badge in ("FLAGGED", "NOTE", "PASSED", "TOO FEW IMAGES", "NOT RUN"):
        assert block.markdown.count(badge) == Text(block.html).text.count(badge) == 1
    assert "FLAGGED: flagged." in block.markdown
    assert block.markdown.count("Evidence") == block.html.count('class="small"') == 1


def test_pages():
    parts = [page.banner(PASSED, "All well"), page.section("First & last"), page.paragraph("words")]
    source = page.to_html("A <title>", parts)
    found = Text(source)
    links = [attributes["href"] for tag, attributes in found.tags if tag == "a"]
    anchors = ["#" + attributes["id"] for tag, attributes in found.tags if "id" in attributes]
    assert links == anchors == ["#first-last"]
    assert (
        source.index("All well") < source.index("</header>") < source.index("<main>") < source.index("words")
    )
    assert re.search("default-src 'none'", source)
    markdown = page.to_markdown("A <title>", parts)
    assert markdown == "# A &lt;title>\n\n**All well**\n\n## First &amp; last\n\nwords\n"
