"""What parity found, as text for a terminal, as JSON and as one HTML page: pure functions of it."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from .parity import Operation, Report, where

if TYPE_CHECKING:
    from .explain import Exactness, Explanation, Prediction

About = Mapping[str, Mapping[str, Any]]  # titles of sections -> what a figure depends on -> what it was


@dataclass(frozen=True)
class Findings:
    """A report, what it was made with, and what else was asked for. `source` names the file or files."""

    report: Report
    source: str
    about: About = field(default_factory=dict)
    explanation: "Explanation | None" = None
    exactness: "Exactness | None" = None
    predictions: "Sequence[Prediction] | None" = None
    stated_differences: Sequence[str] = ()  # of the two files' numerics, such as "gelu: tanh against exact"

    @property
    def passed(self) -> bool:
        return self.report.passed and (self.exactness is None or self.exactness.passed)

    @property
    def what(self) -> str:
        return "logits" if self.report.operations[-1].name == "head" else "features"


def verdict(found: Findings) -> str:
    """Yes or no, and why, in one sentence."""
    report, exactness = found.report, found.exactness
    pair = f"{report.a} and {report.b}"
    # The figure that uses more of its budget, so that the two figures of the sentence tell the same as its words.
    logits, budget = report.logits, report.logits_budget
    rms = logits.rms * budget.largest > logits.largest * budget.rms
    size = f"{logits.rms:.1e} in root mean square" if rms else f"{logits.largest:.1e} at most"
    differ = f"the {found.what} differ by {size} and use {_used(report.share)} their budget"
    differ += f" of {budget.rms if rms else budget.largest:.1e}"
    if found.passed:
        yes = f"yes: {pair} compute the same from {found.source}; {differ}, and every operation is within its own"
        unresolved = "; ".join(found.stated_differences)
        return (
            yes
            if not unresolved
            else f"{yes}; but the files state different numerics, {unresolved}, which this cannot tell apart"
        )
    no = f"no: {pair} do not compute the same from {found.source}"
    if report.first:
        return f"{no}; the first operation outside its budget is {report.first}"
    if report.share > 1:
        return f"{no}; {differ}, though no operation is outside its own"
    count = len(exactness.apart) if exactness else 0
    return f"{no}; in float32 {count:,} of the {found.what} differ by more than a rounding boundary between them explains"


def as_dict(found: Findings) -> dict[str, Any]:
    """All of it as JSON has it; null where a number is not finite."""
    report = found.report
    first, explanation, exactness = report.first, found.explanation, found.exactness
    entries: dict[str, Any] = {
        "passed": found.passed,
        "verdict": verdict(found),
        "source": found.source,
        "sides": [str(report.a), str(report.b)],
        "output": found.what,
        "agreement": asdict(report.logits),
        "budget": asdict(report.logits_budget),
        "share": report.share,
        "first": None if first is None else asdict(first) | {"side": str(first.side), "text": str(first)},
        "operations": [asdict(operation) for operation in report.operations],
        "about": found.about,
    }
    if explanation:
        causes = [asdict(cause) | {"differs": cause.differs} for cause in explanation.causes]
        entries["explanation"] = asdict(explanation) | {"causes": causes, "share": explanation.share}
    if exactness:
        entries["exactness"] = asdict(exactness) | {"passed": exactness.passed}
    if found.predictions is not None:
        entries["predictions"] = [asdict(prediction) for prediction in found.predictions]
    return _finite(entries)


def as_text(found: Findings) -> str:
    """For a terminal, the verdict first."""
    lines = [verdict(found), ""]
    for table in _tables(found):
        lines += [*_text_table(table), ""]
    for title, entries in found.about.items():
        lines.append(f"{title}: " + "; ".join(f"{name} {value}" for name, value in entries.items()))
    return "\n".join(lines)


@dataclass(frozen=True)
class _Table:
    """The first column is text, and so is the last where `text_last`; what lies between is numbers.

    `note` stands below; `off` has the first cells of the rows that are to stand out.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    text_last: bool = False
    off: Collection[str] = ()


def _tables(found: Findings) -> Iterator[_Table]:
    """What text and page both show, but for the plots and the table of all operations."""
    report = found.report
    logits, budget = report.logits, report.logits_budget
    yield _Table(
        f"{found.what} of {len(report.outputs[0])} images",
        ("", "largest", "rms"),
        (
            ("difference", _figure(logits.largest), _figure(logits.rms)),
            ("budget", _figure(budget.largest), _figure(budget.rms)),
            ("share", _times(logits.largest / budget.largest), _times(logits.rms / budget.rms)),
        ),
        f"the same first class on {logits.same_class:.1%} of the images, the same first five on {logits.same_five:.1%}; "
        f"Kullback-Leibler divergence {logits.divergence:.1e} nats; largest of the {found.what} {logits.scale:.3g}",
    )
    yield _Table(
        "over depth, of the largest magnitude",
        ("after", "come apart", "budget", "worst share", "of operation"),
        [_depth_row(name, group) for name, group in _depth(report)],
        "worst share: of its own budget, for the one operation between that uses most of it, given the same input",
        text_last=True,
        off=[name for name, group in _depth(report) if any(max(operation.share) > 1 for operation in group)],
    )
    if found.explanation:
        yield _explained(found.explanation)
    if found.exactness:
        yield _exact(found.exactness)
    if found.predictions is not None:
        yield _Table(
            "predicted here, not measured on any of these",
            ("devices", "largest", "rms", "same class", "setting"),
            [
                (p.devices, _figure(p.logits.largest), _figure(p.logits.rms), f"{p.same_class:.1%}", p.setting)
                for p in found.predictions
            ],
            f"differences of the {found.what} from the float64 referee",
            text_last=True,
        )


def _depth(report: Report) -> Iterator[tuple[str, list[Operation]]]:
    """The operations up to the stem, the end of each block, and the end."""
    group: list[Operation] = []
    for operation in report.operations:
        group.append(operation)
        name = operation.name
        if name.endswith("channel_mixing/sum"):
            yield where(name.split("/channel_mixing")[0]), group
            group = []
        elif not name.startswith("blocks/"):
            yield name, group
            group = []


def _depth_row(name: str, group: list[Operation]) -> tuple[str, ...]:
    end, worst = group[-1], max(group, key=lambda operation: max(operation.share))
    inside = "/".join(worst.name.split("/")[2:]) or worst.name
    return (name, _figure(end.growth), _figure(end.growth_budget), _times(max(worst.share)), where(inside))


def _explained(explanation: "Explanation") -> _Table:
    def row(name: str, sides: str, figures: Any, share: str) -> tuple[str, ...]:
        return (name, _figure(figures.largest), _figure(figures.rms), share, sides)

    rows = [row("the gap", "", explanation.gap, "")]
    for cause in explanation.causes:
        if cause.differs:
            share = "rounding" if cause.share is None else f"{cause.share:.1%}"
            rows.append(row(cause.name, f"{cause.a} against {cause.b}", cause.effect, share))
        else:
            rows.append(row(cause.name, f"{cause.a} on both sides", cause.effect, "-"))
    unexplained = row("unexplained", "", explanation.unexplained, f"{_used(explanation.share)} the budget")
    taken = "without what was chosen differently" if any(cause.differs for cause in explanation.causes) else "as it is"
    enough = "within what rounding may leave" if explanation.passed else "MORE THAN ROUNDING MAY LEAVE"
    return _Table(
        "why",
        ("choice", "largest", "rms", "of the gap", "chosen"),
        [*rows, unexplained],
        f"unexplained is the gap {taken}: {enough}; of a choice that is the same on both sides, what switching it would do",
        text_last=True,
    )


def _exact(exactness: "Exactness") -> _Table:
    equal = exactness.count - len(exactness.straddling) - len(exactness.apart)
    kinds = (("straddles", exactness.straddling), ("APART", exactness.apart))
    rows = [
        (f"{kind}: image {image}, class {k}", f"{a:.17g}", f"{b:.17g}")
        for kind, pairs in kinds
        for image, k, a, b in pairs[:20]
    ]
    hidden = sum(max(0, len(pairs) - 20) for _, pairs in kinds)
    return _Table(
        "float64 rounded to float32",
        ("", "first side", "second side"),
        rows,
        f"{equal:,} of {exactness.count:,} bit-equal, {len(exactness.straddling):,} straddle a rounding boundary, "
        f"{len(exactness.apart):,} are further apart" + (f"; {hidden:,} not listed" if hidden else ""),
    )


def _text_table(table: _Table) -> list[str]:
    columns = list(zip(table.head, *table.rows))
    widths = [max(map(len, column)) for column in columns]
    lines = [table.title] if table.title else []
    for row in (table.head, *table.rows):
        cells = [f"{cell:>{width}}" for cell, width in zip(row, widths)]
        cells[0] = f"{row[0]:<{widths[0]}}"
        if table.text_last:
            cells[-1] = row[-1]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines + ([f"  {table.note}"] if table.note else [])


def _figure(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "not finite"


def _times(share: float) -> str:
    """A share of a budget: percent, or how many times as much. 100 % is never said of more."""
    if not math.isfinite(share):
        return "no share"
    if share <= 1.005:
        return f"{math.floor(100 * share)}%" if share <= 1 else "over 100%"
    return f"{share:.3g} times" if share < 100 else f"{share:,.0f} times"


def _used(share: float) -> str:
    return _times(share) + (" of" if share <= 1.005 else "")


def _finite(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# The page. The plots' units are pixels of a screen that is wide enough; on a phone their text is drawn larger.

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 62, 12, 12, 34
_STYLE = """
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
.scroll { overflow-x: auto; } summary { cursor: pointer; margin: 1.6rem 0 .4rem; font-weight: 600; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } .number { text-align: right; } tr.off td { color: var(--no); }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .1rem 1rem; font-size: .9rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); } .axis { stroke: var(--line); } .end { text-anchor: end; }
.middle { text-anchor: middle; } .band { fill: var(--band); fill-opacity: .18; }
.growth { fill: none; stroke: var(--a); stroke-width: 2; }
.limit { stroke: var(--band); stroke-width: 1.5; stroke-dasharray: 5 4; } .side-a { fill: var(--a); stroke: none; }
.side-b { fill: none; stroke: var(--b); stroke-width: 1.6; } circle.off { fill: var(--no); stroke: var(--no); }
.first { stroke: var(--no); stroke-width: 1.5; } svg text.first-label { fill: var(--no); stroke: none; }
@media (max-width: 32rem) { svg text { font-size: 22px; } .minor { display: none; }
  table { font-size: .78rem; } th, td { padding-right: .5rem; } }
"""


def as_html(found: Findings) -> str:
    """One page that needs nothing else: no script, no other file."""
    return _page(f"parity: {'yes' if found.passed else 'no'}, {found.source}", _body(found))


def as_html_of_many(title: str, found: Sequence[Findings], notes: Sequence[str]) -> str:
    """Several findings on one page, each behind its verdict, and what stays unproved."""
    parts = [f"<h2>{escape(title)}</h2>"]
    for each in found:
        parts.append(f"<details><summary>{escape(verdict(each))}</summary>{_body(each)}</details>")
    if notes:
        parts.append("<h2>Unproved</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    return _page(title, "\n".join(parts))


def _page(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _body(found: Findings) -> str:
    report = found.report
    parts = [f'<h1 class="{"yes" if found.passed else "no"}">{escape(verdict(found))}</h1>']
    logits, *tables = _tables(found)
    parts += [_html_table(logits), _growth(report), _local(report), *map(_html_table, tables)]
    everything = _Table(
        "",
        ("operation", "come apart", "budget", "first side", "budget", "share", "second side", "budget", "share"),
        [
            (
                operation.name,
                _figure(operation.growth),
                _figure(operation.growth_budget),
                *(
                    text
                    for error, budget, share in zip(operation.local, operation.local_budget, operation.share)
                    for text in (_figure(error), _figure(budget), _times(share))
                ),
            )
            for operation in report.operations
        ],
        f"first side: {report.a}; second side: {report.b}; of the largest magnitude of what the referee computes",
        off=[operation.name for operation in report.operations if max(operation.share) > 1],
    )
    parts.append(f"<details><summary>All {len(report.operations)} operations</summary>{_html_table(everything)}</details>")
    for title, entries in found.about.items():
        items = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in entries.items())
        parts.append(f"<h2>{escape(title[:1].upper() + title[1:])}</h2><dl>{items}</dl>")
    return "\n".join(parts)


def _html_table(table: _Table) -> str:
    last = len(table.head) - 1

    def cells(tag: str, row: Sequence[str]) -> str:
        numbers = [i > 0 and not (i == last and table.text_last) for i in range(len(row))]
        kinds = [' class="number"' if number else "" for number in numbers]
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(row, kinds))

    kinds = [' class="off"' if row[0] in table.off else "" for row in table.rows]
    rows = "".join(f"<tr{kind}>{cells('td', row)}</tr>" for row, kind in zip(table.rows, kinds))
    heading = f"<h2>{escape(table.title[:1].upper() + table.title[1:])}</h2>" if table.title else ""
    grid = f'<div class="scroll"><table><tr>{cells("th", table.head)}</tr>{rows}</table></div>' if table.rows else ""
    return f"{heading}{grid}" + (f"<p>{escape(table.note)}</p>" if table.note else "")


class _Plot:
    """Operations from left to right, a logarithmic axis upwards."""

    def __init__(self, report: Report, low: float, high: float, height: int):
        self.operations, self.height = report.operations, height
        self.low, self.high = math.floor(math.log10(low)), max(math.ceil(math.log10(high)), math.floor(math.log10(low)) + 1)
        self.floor = height - _BOTTOM

    def x(self, i: float) -> float:
        return _LEFT + (i + 0.5) / len(self.operations) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """What is not on the axis is drawn at its end."""
        decade = self.high if not math.isfinite(value) else math.log10(value) if value > 0 else self.low
        share = (min(max(decade, self.low), self.high) - self.low) / (self.high - self.low)
        return self.floor - share * (self.floor - _TOP)

    def axes(self) -> Iterator[str]:
        every = max(1, -(-(self.high - self.low) // 5))
        for k, decade in enumerate(range(self.low, self.high + 1, every)):
            y, minor = self.y(10.0**decade), " minor" if k % 2 else ""
            yield f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text class="end{minor}" x="{_LEFT - 6}" y="{y + 4:.1f}">1e{decade}</text>'
        starts = [i for i, operation in enumerate(self.operations) if operation.name.endswith("token_norm")]
        step = -(-len(starts) // 12) or 1
        for block, i in enumerate(starts):
            x = self.x(i - 0.5)
            yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{self.floor}"/>'
            if block % step == 0:
                minor = " minor" if block // step % 2 else ""
                text = f"block {block}" if block == 0 else str(block)
                yield f'<text class="{minor.strip()}" x="{x + 3:.1f}" y="{self.height - 8}">{text}</text>'

    def points(self, values: Sequence[float]) -> str:
        return " ".join(f"{self.x(i):.1f},{self.y(value):.1f}" for i, value in enumerate(values))

    def drawn(self, title: str, parts: Sequence[str], caption: str) -> str:
        return (
            f'<figure><svg viewBox="0 0 {_WIDTH} {self.height}" role="img">'
            f"<title>{escape(title)}</title>{''.join([*self.axes(), *parts])}</svg>"
            f"<figcaption>{caption}</figcaption></figure>"
        )


def _growth(report: Report) -> str:
    """How far the sides have come apart after each operation, on the band that the budget allows."""
    growth, budget = [op.growth for op in report.operations], [op.growth_budget for op in report.operations]
    seen = [value for value in (*growth, *budget) if 0 < value < math.inf]
    low, high = min(seen, default=1e-16), max(seen, default=1.0)
    plot = _Plot(report, max(low, min((b for b in budget if b > 0), default=low) * 1e-3), high, 300)
    band = f"{plot.x(0):.1f},{plot.floor} {plot.points(budget)} {plot.x(len(budget) - 1):.1f},{plot.floor}"
    parts = [f'<polygon class="band" points="{band}"/>', f'<polyline class="growth" points="{plot.points(growth)}"/>']
    for i, (value, limit) in enumerate(zip(growth, budget)):
        if not value <= limit:
            parts.append(f'<circle class="off" cx="{plot.x(i):.1f}" cy="{plot.y(value):.1f}" r="3"/>')
    if report.first:
        i = next(i for i, op in enumerate(report.operations) if op.name == report.first.operation)
        x, left = plot.x(i), plot.x(i) < _WIDTH / 2
        kind, at = ("first-label", x + 6) if left else ("first-label end", x - 6)
        parts.append(f'<line class="first" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{plot.floor}"/>')
        parts.append(f'<text class="{kind}" x="{at:.1f}" y="{_TOP + 20}">{escape(where(report.first.operation))}</text>')
    return plot.drawn(
        "How far the sides have come apart, operation by operation",
        parts,
        "How far the sides have come apart after each operation (line), of the largest magnitude there, and what their "
        "budget allows (band).",
    )


def _local(report: Report) -> str:
    """What every operation of either side adds by itself, as a share of its budget."""
    shares = [share for operation in report.operations for share in operation.share if 0 < share < math.inf]
    plot = _Plot(report, min(0.1, max(min(shares, default=0.1), 1e-3)), max(10.0, *shares) if shares else 10.0, 190)
    limit = plot.y(1.0)
    parts = [f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{limit:.1f}" y2="{limit:.1f}"/>']
    for i, operation in enumerate(report.operations):
        for name, share, radius in zip("ab", operation.share, (2.4, 3.2)):
            kind = "off" if not share <= 1 else f"side-{name}"
            parts.append(f'<circle class="{kind}" cx="{plot.x(i):.1f}" cy="{plot.y(share):.1f}" r="{radius}"/>')
    return plot.drawn(
        "What every operation adds by itself, as a share of its budget",
        parts,
        f"What every operation adds by itself to the same input, as a share of its budget (dashed: all of it). Dots: "
        f"{escape(str(report.a))}; rings: {escape(str(report.b))}.",
    )
