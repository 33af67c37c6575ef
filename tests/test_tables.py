"""Tables of a notebook: texts of rows and answers are data, whatever stands in them."""

import re
from html import unescape

import pytest

from dpo_helpers.errors import UserError
from dpo_helpers.tables import make_visible, show_table


def read_cells(html: str) -> list[str]:
    """Return what a reader sees in the table's cells; a tag that a text smuggled in would break the cells."""
    return [unescape(cell) for cell in re.findall(r"<td[^>]*>([^<]*)</td>", html)]


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        '<img src=x onerror="alert(1)">',
        "a < b && b > c",
        "</td></table><h1>大きく</h1>",
        "# 見出し **太字** `code` | 列 [リンク](x)",
        "価格は $5 から $10、$x^{$ は数式ではない",
        "\\(x\\) と \\[y\\] と $$z$$",
        "一行目\n二行目\tタブ",
    ],
)
def test_a_text_shows_as_it_is(text):
    assert read_cells(show_table([{"回答": text}]).to_html()) == [text]


def test_a_formula_is_left_alone():
    html = show_table([{"回答": "$x^{$"}]).to_html()
    (table,) = re.findall(r"<table[^>]*>", html)
    assert {"tex2jax_ignore", "mathjax_ignore"} <= set(re.search('class="([^"]*)"', table).group(1).split())


def test_marks_that_cannot_be_seen_are_written_out():
    assert make_visible("\x1b[31m赤\x1b[0m") == "\\u001b[31m赤\\u001b[0m"
    assert make_visible("\u202eabc\u2066\u200f") == "\\u202eabc\\u2066\\u200f"
    assert make_visible("一\n二\tx\r\0") == "一\n二\tx\\u000d\\u0000"
    assert read_cells(show_table([{"回答": "\u202eabc"}]).to_html()) == ["\\u202eabc"]


def test_a_heading_is_data_too():
    html = show_table([{"<b>\u202e列</b>": 1}]).to_html()
    assert "<b>" not in html and "&lt;b&gt;\\u202e列&lt;/b&gt;" in html


def test_counts_stay_whole_numbers_beside_fractions_and_a_missing_value_is_empty():
    html = show_table([{"値": 1000}, {"値": 0.5}, {"値": float("nan")}, {"別": "x"}]).to_html()
    assert read_cells(html) == ["1000", "", "0.5000", "", "", "", "", "x"]


def test_a_users_problem_shows_as_its_message_alone():
    assert UserError("直してください。")._render_traceback_() == ["", "⚠️ 直してください。"]
