"""Small plots as SVG text: lines over positions and bars, in the page's own colours, nothing to be loaded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 12, 36
ROW = 22  # of a bar


@dataclass(frozen=True)
class Line:
    """One curve; `low` and `high` shade what lies around it."""

    name: str
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Bar:
    name: str
    value: float
    text: str


def line_plot(lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """Curves over 0, 1, 2, ... from zero up; a value that is not finite leaves a gap."""
    top = nice(max((v for line in lines for v in (*line.y, *line.high) if math.isfinite(v)), default=1.0))
    count = max((len(line.y) for line in lines), default=1)
    body = [_axes(top, count, x_label, y_label)]
    for place, line in enumerate(lines):
        body += [_band(line, top, count, place)] if line.low else []
        body.append(f'<path class="line c{place % 6}" d="{_path(line.y, top, count)}"/>')
    return _svg(HEIGHT, f"{y_label} by {x_label}", body) + _legend(lines)


def bar_plot(bars: Sequence[Bar], label: str) -> str:
    """Horizontal bars from zero, one a row, with their text behind them; what is not finite has no bar."""
    top = max((bar.value for bar in bars if math.isfinite(bar.value)), default=0.0) or 1.0
    name_width, text_width = 250, 130
    body = []
    for place, bar in enumerate(bars):
        y = TOP + place * ROW
        share = max(0.0, bar.value / top) if math.isfinite(bar.value) else 0.0
        width = share * (WIDTH - name_width - text_width)
        body.append(f'<text class="name" x="{name_width - 8}" y="{y + 14}" text-anchor="end">{escape(bar.name)}</text>')
        body.append(f'<rect class="bar" x="{name_width}" y="{y + 3}" width="{width:.1f}" height="{ROW - 8}" rx="2"/>')
        body.append(f'<text class="value" x="{name_width + width + 6:.1f}" y="{y + 14}">{escape(bar.text)}</text>')
    return _svg(TOP + ROW * len(bars) + 4, label, body)


def nice(value: float) -> float:
    """The smallest of 1, 2, 2.5, 5 and 10 times a power of ten that is not below a value; 1 for none above 0."""
    if not value > 0:
        return 1.0
    power = 10 ** math.floor(math.log10(value))
    return next((step * power for step in (1, 2, 2.5, 5) if value <= step * power), 10 * power)


def _svg(height: float, label: str, body: Sequence[str]) -> str:
    box = f'viewBox="0 0 {WIDTH} {height:g}"'
    return f'<svg {box} role="img" aria-label="{escape(label, quote=True)}">{"".join(body)}</svg>'


def _axes(top: float, count: int, x_label: str, y_label: str) -> str:
    parts = []
    for tick in range(5):
        y = _y(top * tick / 4, top)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * tick / 4:.3g}</text>')
    for tick in sorted({0, (count - 1) // 4, (count - 1) // 2, 3 * (count - 1) // 4, count - 1}):
        x, y = _x(tick, count), HEIGHT - BOTTOM + 16
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y}" text-anchor="middle">{tick}</text>')
    parts.append(f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    parts.append(f'<text class="label" x="{LEFT}" y="{TOP - 1}">{escape(y_label)}</text>')
    return "".join(parts)


def _x(place: int, count: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * place / max(1, count - 1)


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM - 8) * value / top


def _path(values: Sequence[float], top: float, count: int) -> str:
    parts, pen = [], "M"
    for place, value in enumerate(values):
        if not math.isfinite(value):
            pen = "M"
            continue
        parts.append(f"{pen}{_x(place, count):.1f} {_y(value, top):.1f}")
        pen = "L"
    return "".join(parts)


def _band(line: Line, top: float, count: int, place: int) -> str:
    kept = [i for i, (a, b) in enumerate(zip(line.low, line.high, strict=True)) if math.isfinite(a + b)]
    upper = [f"{_x(i, count):.1f} {_y(line.high[i], top):.1f}" for i in kept]
    lower = [f"{_x(i, count):.1f} {_y(line.low[i], top):.1f}" for i in reversed(kept)]
    return f'<path class="band c{place % 6}" d="M{"L".join(upper + lower)}Z"/>' if kept else ""


def _legend(lines: Sequence[Line]) -> str:
    if len(lines) < 2:
        return ""
    return '<p class="legend">' + " ".join(
        f'<span class="key c{place % 6}">{escape(line.name)}</span>' for place, line in enumerate(lines)
    ) + "</p>"  # fmt: skip
