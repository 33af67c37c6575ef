"""Draws the curves of a training that runs, as an HTML with an SVG of a few kilobytes.

The saved plot is matplotlib's; for a picture every 2 s it is too slow: 0.1 to 0.3 s for each, where this
takes milliseconds. The letters are the browser's, which has a Japanese font where its reader reads Japanese.
"""

import math
from html import escape

from dpo_helpers.train.curves import GREY, Panel, make_panels, read_curve

POINTS = 300  # of one line; a screen does not show more
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 310, 66, 16, 64, 44  # of one panel and its margins


def draw_html(
    text: str, stage: str, log_history: list[dict], step: int, last_step: int, beta: float | None = None
) -> str:
    """Return a progress bar, the text, and the panels of a stage; it shrinks with the page."""
    panels = make_panels(stage, beta)
    width, height = min(2, len(panels)) * WIDTH, math.ceil(len(panels) / 2) * HEIGHT
    drawn = "".join(
        f'<g transform="translate({i % 2 * WIDTH},{i // 2 * HEIGHT})'
        f'">{draw_panel(panel, log_history, last_step, beta)}</g>'
        for i, panel in enumerate(panels)
    )
    return (
        f'<div><progress value="{step}" max="{max(1, last_step)}" '
        f'style="width:100%;max-width:{width}px"></progress>'
        f'<div>{escape(text)}</div><svg viewBox="0 0 {width} {height}" '
        f'style="width:100%;max-width:{width}px;background:white" '
        f'font-family="sans-serif" fill="black" role="img" aria-label="学習の曲線">{drawn}</svg></div>'
    )


def draw_panel(panel: Panel, log_history: list[dict], last_step: int, beta: float | None) -> str:
    """Return one panel as SVG elements, WIDTH × HEIGHT."""
    curves = [(curve, *thin_out(*read_curve(log_history, curve.key, beta))) for curve in panel.curves]
    known = [value for _, _, values in curves for value in values if not math.isnan(value)]
    known += [panel.level] if panel.level is not None else []
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    pad = 0.06 * (high - low) or 0.5
    low, high, last_step = low - pad, high + pad, max(1, last_step)

    def x(step):
        return round(LEFT + step / last_step * (WIDTH - LEFT - RIGHT), 1)

    def y(value):
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def write(text, at, **options):
        attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in options.items())
        return f'<text x="{at[0]}" y="{at[1]}"{attributes}>{escape(text)}</text>'

    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts = [
        write(panel.title, ((LEFT + WIDTH - RIGHT) / 2, 18), font_size=17, text_anchor="middle"),
        write("ステップ", ((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6), font_size=15, text_anchor="middle"),
        write(
            panel.axis, (14, middle), font_size=15, text_anchor="middle", transform=f"rotate(-90 14 {middle})"
        ),
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{HEIGHT - TOP - BOTTOM}" fill="none" stroke="#aaa"/>',
        *(
            write(tick, (LEFT - 5, y(float(tick)) + 5), font_size=14, text_anchor="end")
            for tick in find_ticks(low, high)
        ),
        *(
            write(tick, (x(float(tick)), HEIGHT - BOTTOM + 17), font_size=14, text_anchor="middle")
            for tick in find_ticks(0, last_step, smallest=1)
        ),
    ]
    legend = [
        (f"{'●■'['os'.index(curve.marker)] if curve.marker else '―'} {curve.label}", curve.color)
        for curve in panel.curves
    ]
    if panel.level is not None:
        parts.append(
            f'<path d="M{LEFT} {y(panel.level)}H{WIDTH - RIGHT}" stroke="{GREY}" stroke-dasharray="2 3"/>'
        )
        legend += [(f"··· {panel.level_label}", GREY)] if panel.level_label else []
    for i, (label, color) in enumerate(legend):
        parts.append(write(label, (LEFT + i % 2 * 162, 38 + i // 2 * 17), font_size=14, fill=color))
    for curve, steps, values in curves:
        points = [
            (x(step), None if math.isnan(value) else y(value))
            for step, value in zip(steps, values, strict=True)
        ]
        line = "".join(
            f"L{at} {height}" if i and points[i - 1][1] is not None else f"M{at} {height}h0"
            for i, (at, height) in enumerate(points)
            if height is not None
        )
        dashes = ' stroke-dasharray="7 4"' if curve.marker else ""
        parts.append(
            f'<path d="{line}" fill="none" stroke="{curve.color}" stroke-width="2"{dashes} '
            'stroke-linejoin="round"/>'
        )
        # a dot is a line of no length with a wide end; a lone training value would be invisible without one
        dots = "".join(f"M{at} {height}h0" for at, height in points if height is not None)
        width, cap = (8, "square" if curve.marker == "s" else "round") if curve.marker else (3, "round")
        parts.append(
            f'<path d="{dots}" stroke="{curve.color}" stroke-width="{width}" stroke-linecap="{cap}"/>'
        )
    return "".join(parts)


def thin_out(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Keep at most POINTS evenly spaced points, the newest among them."""
    every = math.ceil(len(steps) / POINTS) or 1
    return steps[::-every][::-1], values[::-every][::-1]


def find_ticks(low: float, high: float, smallest: float = 0.0) -> list[str]:
    """Return up to six round numbers between two values, as text; `smallest` is the least distance between
    two of them.
    """
    rough = max(smallest, (high - low) / 4)
    size = 10.0 ** math.floor(math.log10(rough))
    size *= next(factor for factor in (1, 2, 5, 10) if factor * size >= rough * 0.999)
    return [f"{number * size:.6g}" for number in range(math.ceil(low / size), math.floor(high / size) + 1)]
