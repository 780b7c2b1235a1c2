"""The parity report as one HTML page that needs nothing else: no script, no other file."""

__all__ = ["as_html", "as_html_of_many"]

import math
from collections.abc import Iterator, Sequence
from html import escape

from .comparison import Comparison
from .report import ParityReport, Table, figure, multiple, tables, verdict

# The plots' units are pixels of a screen that is wide enough; on a phone they shrink to half, so their text is drawn larger.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 300, 104, 12, 12, 62
FLOOR = HEIGHT - BOTTOM
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --line: #d5dae0; --page: #fff; --card: #f5f7f9;
  --yes: #11734a; --no: #b3261e; --a: #1f5fbf; --b: #b25a00; --band: #11734a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b1; --line: #343b44; --page: #14171b;
  --card: #1d2228; --yes: #5fd39b; --no: #ff8a80; --a: #7fb2ff; --b: #ffb061; --band: #5fd39b; } }
body { margin: 0 auto; padding: 1rem; max-width: 46rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--page); overflow-wrap: anywhere; }
h1 { font-size: 1.15rem; line-height: 1.4; font-weight: 600; margin: 0 0 1rem; padding: .8rem 1rem; border-radius: .5rem;
  background: var(--card); border-left: .4rem solid var(--no); }
h1.yes { border-color: var(--yes); }
h2 { font-size: 1rem; margin: 1.6rem 0 .3rem; } p, figcaption { color: var(--soft); font-size: .9rem; margin: .3rem 0; }
figure { margin: 1.6rem 0 0; } svg { display: block; width: 100%; height: auto; }
summary { cursor: pointer; margin: 1.6rem 0 .4rem; font-weight: 600; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 500; overflow-wrap: normal; } tr.off td { color: var(--no); }
.number { text-align: right; overflow-wrap: normal; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .1rem 1rem; font-size: .9rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); } .axis { stroke: var(--line); } .end { text-anchor: end; }
.title { text-anchor: middle; } .band { fill: var(--band); fill-opacity: .18; }
.difference { fill: none; stroke: var(--a); stroke-width: 2; }
.limit { stroke: var(--band); stroke-width: 1.5; stroke-dasharray: 5 4; } .of-a { fill: var(--a); stroke: none; }
.of-b { fill: none; stroke: var(--b); stroke-width: 1.6; } circle.off { fill: var(--no); stroke: var(--no); }
.first { stroke: var(--no); stroke-width: 1.5; } svg text.first-label { fill: var(--no); stroke: none; }
@media (max-width: 32rem) { svg text { font-size: 22px; } svg .title, svg .first-label { font-size: 17px; }
  table { font-size: .75rem; } th, td { padding-right: .4rem; }
  details table { font-size: .65rem; } dl { display: block; } dd { margin-bottom: .4rem; } }
"""


def as_html(report: ParityReport) -> str:
    return _page(f"parity: {'yes' if report.passed else 'no'}, {report.source}", _body(report))


def as_html_of_many(title: str, reports: Sequence[ParityReport], notes: Sequence[str]) -> str:
    """Several reports on one page, each behind its verdict, and `notes` of what stays unproved."""
    parts = [f"<h2>{escape(title)}</h2>"]
    parts += [f"<details><summary>{escape(verdict(r))}</summary>{_body(r)}</details>" for r in reports]
    if notes:
        parts.append("<h2>Unproved</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    return _page(title, "\n".join(parts))


def _page(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _body(report: ParityReport) -> str:
    comparison = report.comparison
    logits, *others = tables(report)
    parts = [
        f'<h1 class="{"yes" if report.passed else "no"}">{escape(verdict(report))}</h1>',
        _table(logits),
        _accumulated_plot(comparison),
        _per_operation_plot(comparison),
        *map(_table, others),
        f"<details><summary>All {len(comparison.operations)} operations</summary>{_table(_operations(comparison))}</details>",
    ]
    for title, entries in report.about.items():
        items = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in entries.items())
        parts.append(f"<h2>{escape(title[:1].upper() + title[1:])}</h2><dl>{items}</dl>")
    return "\n".join(parts)


def _operations(comparison: Comparison) -> Table:
    rows = []
    for o in comparison.operations:
        row = [o.name, f"{figure(o.accumulated)}, {figure(o.accumulated_tolerance)}"]
        for error, limit, fraction in zip(o.per_operation, o.per_operation_tolerance, o.fraction):
            row += [f"{figure(error)}, {figure(limit)}", multiple(fraction)]
        rows.append(row)
    note = f"a: {comparison.a}; b: {comparison.b}; relative to max abs of what the NumPy model computes"
    head = ("operation", "difference, tolerance", "error of a, tolerance", "fraction", "error of b, tolerance", "fraction")
    return Table("", head, rows, note, highlighted=[o.name for o in comparison.operations if max(o.fraction) > 1])


def _table(table: Table) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = [' class="number"' if 0 < i < len(row) - table.text_last else "" for i in range(len(row))]
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(row, kinds))

    kinds = [' class="off"' if row[0] in table.highlighted else "" for row in table.rows]
    rows = [f"<tr{kind}>{cells('td', row)}</tr>" for row, kind in zip(table.rows, kinds)]
    heading = f"<h2>{escape(table.title[:1].upper() + table.title[1:])}</h2>" if table.title else ""
    grid = f"<table><tr>{cells('th', table.head)}</tr>{''.join(rows)}</table>" if rows else ""
    return f"{heading}{grid}" + (f"<p>{escape(table.note)}</p>" if table.note else "")


class _Plot:
    """Operations from left to right, a logarithmic axis upwards."""

    def __init__(self, comparison: Comparison, low: float, high: float):
        self.operations = comparison.operations
        self.low = math.floor(math.log10(low))
        self.high = max(math.ceil(math.log10(high)), self.low + 1)

    def x(self, i: float) -> float:
        return LEFT + (i + 0.5) / len(self.operations) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Values outside the axis are drawn at its end."""
        decade = self.high if not math.isfinite(value) else math.log10(value) if value > 0 else self.low
        height = (min(max(decade, self.low), self.high) - self.low) / (self.high - self.low)
        return FLOOR - height * (FLOOR - TOP)

    def points(self, values: Sequence[float]) -> str:
        return " ".join(f"{self.x(i):.1f},{self.y(value):.1f}" for i, value in enumerate(values))

    def axes(self, y_title: str) -> Iterator[str]:
        for decade in range(self.low, self.high + 1, -(-(self.high - self.low) // 5)):
            y = self.y(10.0**decade)
            yield f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">1e{decade}</text>'
        starts = [i for i, operation in enumerate(self.operations) if operation.name.endswith("token_norm")]
        for block, i in enumerate(starts):
            x = self.x(i - 0.5)
            yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{FLOOR}"/>'
            if block % -(-len(starts) // 6) == 0:
                yield f'<text x="{x + 3:.1f}" y="{FLOOR + 24}">{"block " * (block == 0)}{block}</text>'
        x, y = (LEFT + WIDTH - RIGHT) / 2, (TOP + FLOOR) / 2
        yield f'<text class="title" x="{x}" y="{HEIGHT - 8}">operation, in the order of the forward pass</text>'
        yield f'<text class="title" transform="translate(20 {y}) rotate(-90)">{y_title}</text>'

    def figure(self, y_title: str, parts: Sequence[str], caption: str) -> str:
        return (
            f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(caption)}</title>'
            f"{''.join([*self.axes(y_title), *parts])}</svg><figcaption>{escape(caption)}</figcaption></figure>"
        )


def _accumulated_plot(comparison: Comparison) -> str:
    """How far the two are apart after each operation, on the band of the tolerance."""
    values = [operation.accumulated for operation in comparison.operations]
    limits = [operation.accumulated_tolerance for operation in comparison.operations]
    drawable = [value for value in (*values, *limits) if 0 < value < math.inf]
    plot = _Plot(comparison, max(min(drawable), 1e-3 * min(limit for limit in limits if limit > 0)), max(drawable))
    band = f"{plot.x(0):.1f},{FLOOR} {plot.points(limits)} {plot.x(len(limits) - 1):.1f},{FLOOR}"
    parts = [f'<polygon class="band" points="{band}"/>', f'<polyline class="difference" points="{plot.points(values)}"/>']
    for i, (value, limit) in enumerate(zip(values, limits)):
        if not value <= limit:
            parts.append(f'<circle class="off" cx="{plot.x(i):.1f}" cy="{plot.y(value):.1f}" r="3"/>')
    if comparison.first:
        x = plot.x(comparison.operations.index(comparison.first.operation))
        kind, label = ("first-label", x + 6) if x < WIDTH / 2 else ("first-label end", x - 6)
        parts.append(f'<line class="first" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{FLOOR}"/>')
        parts.append(f'<text class="{kind}" x="{label:.1f}" y="{TOP + 20}">{escape(comparison.first.operation.title)}</text>')
    caption = "The difference of the two after each operation (line), relative to max abs, and its tolerance (band)."
    return plot.figure("relative error", parts, caption)


def _per_operation_plot(comparison: Comparison) -> str:
    """The error of each operation alone, as a fraction of its tolerance."""
    fractions = [f for operation in comparison.operations for f in operation.fraction if 0 < f < math.inf]
    plot = _Plot(comparison, min(0.1, max(min(fractions, default=0.1), 1e-3)), max([10.0, *fractions]))
    parts = [f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{plot.y(1.0):.1f}" y2="{plot.y(1.0):.1f}"/>']
    for i, operation in enumerate(comparison.operations):
        for name, value, radius in zip("ab", operation.fraction, (2.4, 3.2)):
            kind = "off" if not value <= 1 else f"of-{name}"
            parts.append(f'<circle class="{kind}" cx="{plot.x(i):.1f}" cy="{plot.y(value):.1f}" r="{radius}"/>')
    caption = f"The error of each operation alone, given its own input. Dots: {comparison.a}; rings: {comparison.b}."
    return plot.figure("fraction of the tolerance", parts, caption)
