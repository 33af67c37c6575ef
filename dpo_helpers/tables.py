"""Shows rows as a table in a notebook, and keeps libraries quiet; what the rows say is decided elsewhere."""

from html import escape

# Marks that turn the direction of what follows: shown as they are, they would change the text around them.
DIRECTION_MARKS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def quiet_libraries() -> None:
    """Leave only messages that a reader can act on: no bars of data preparation, no deprecation notes."""
    import logging
    import warnings

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\b")
    # torchao tells of kernels that this torch cannot load, and torch of how torchao registers its types.
    for name in ("trl", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def make_visible(text: str) -> str:
    """Return a text whose control characters (but line ends and tabs) are written out, as \\u202e."""
    return "".join(
        f"\\u{ord(letter):04x}"
        if letter in DIRECTION_MARKS or (ord(letter) < 32 and letter not in "\n\t")
        else letter
        for letter in text
    )


def show_table(rows: list[dict]):
    """Return rows as a table that a notebook shows in full, with wrapped text and no row numbers.

    Texts are data: HTML is escaped and formulas are left alone. A number keeps four digits, a count none.
    """
    import pandas

    # dtype=object keeps a count a whole number in a column that also holds fractions
    data = [{escape(make_visible(str(name))): value for name, value in row.items()} for row in rows]
    style = pandas.DataFrame(data, dtype=object).style.hide(axis="index")
    style = style.format(
        lambda value: escape(make_visible(value)) if isinstance(value, str) else _number(value)
    )
    left = {"text-align": "left", "vertical-align": "top", "white-space": "pre-wrap"}
    style = style.set_properties(**left).set_table_attributes('class="tex2jax_ignore mathjax_ignore"')
    return style.set_table_styles([{"selector": "th", "props": [("text-align", "left")]}])


def _number(value) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4f}"
    return str(value)
