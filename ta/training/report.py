"""report.html of a run folder: curves, answers before and after training, and settings.

It is made from the logs of the folder. The page is one file without scripts that loads nothing.
Colours follow the reader's light or dark setting; figures appear at the pointer.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ta.files import read_json_lines, write_atomic
from ta.printable import printable

LONGEST = 4000  # characters of one text

Curve = list[tuple[float, float]]  # (step, value)

# a chart and its margins, in SVG units
WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 26, 30
# greatest number of points of a curve, and of records of the table
POINTS, ROWS = 300, 64
# records of the table that are open at once
SHOWN = 12


# what a figure says, in one sentence
MEANING = {
    "loss": "What training lowers: the mean over what is learned, for most methods nats a token.",
    "accuracy": "Share of answers that equal the right one.",
    "contains": "Share of answers in which the right one stands as whole words.",
    "perplexity": "How many tokens the model hesitates between: exp of its mean surprise.",
    "reward": "Mean reward of the answers.",
    "reward_margin": "How much higher the reward of the better answer is, on average.",
    "reward_accuracy": "Share of records in which the better answer has the higher reward.",
    "ranking_accuracy": "Share of pairs whose chosen answer scores higher.",
    "preference": "Share of pairs in which a desirable answer is rewarded above another.",
    "kl_to_reference": "How far the answers are from the reference model, nats a token.",
    "rouge_l": "Overlap of words in order with the right answer, 0 to 1.",
    "recall_at_1": "Share of questions whose gold passage is found first.",
    "lr": "The learning rate of the step.",
    "grad_norm": "Length of the gradient before it is clipped; jumps are a warning.",
    "tokens a second": "Tokens trained on in a second, over all devices.",
    "memory_gb": "Greatest memory used so far.",
}


def write_report(folder: Path) -> None:
    """Write folder/report.html from config.json and the logs metrics, samples and drops (.jsonl).

    Files that do not exist are left out.
    """
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    logs = [read_json_lines(folder / f"{name}.jsonl") for name in ("metrics", "samples", "drops")]
    write_atomic(folder / "report.html", page(folder.resolve().name, settings, *logs))


def page(
    name: str,
    settings: dict,
    metrics: Sequence[dict],
    samples: Sequence[dict],
    drops: Sequence[dict],
) -> str:
    """The whole page.

    `settings` is the object of config.json; the others are the lines of the logs.
    """
    charts = "".join(chart(title, curves) for title, curves in charts_of(metrics).items())
    reasons = Counter(drop.get("reason", "?") for drop in drops).most_common()
    sections = {
        "Curves": charts and f'<div class="grid">{charts}</div>',
        "Held-out records, before and after": sample_table(samples),
        "Records left out": html_table(("reason", "records"), reasons) if drops else "",
        "Settings": settings_tables(settings),
    }
    return whole_page(name, headline(settings, metrics), sections)


def whole_page(name: str, head: str, sections: dict[str, str]) -> str:
    """A page of HTML without scripts that loads nothing; empty sections are left out."""
    body = "".join(
        f"<section><h2>{title}</h2>{text}</section>" for title, text in sections.items() if text
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src '
        "'unsafe-inline'\">"
        f"<title>{safe(name)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{safe(name)}</h1>{head}</header>"
        f"<main>{body}</main></body></html>\n"
    )


def headline(settings: dict, metrics: Sequence[dict]) -> str:
    """The step that the run has reached, and the main figures at its beginning and now."""
    done = max((m.get("step", 0) for m in metrics), default=0)
    steps = settings.get("identity", {}).get("steps")
    seconds = sum(m.get("seconds", 0) for m in metrics)
    parts = [
        f"step {done:,} of {steps:,}" if steps else f"step {done:,}",
        f"{duration(seconds)} of training",
    ]
    tiles = ""
    for title, curves in charts_of(metrics).items():
        points = curves.get("held out")
        if points:
            was = f" <span>from {number(points[0][1])}</span>" if len(points) > 1 else ""
            tiles += f"<div><b>{number(points[-1][1])}</b>{was}<br>{safe(title)}, held out</div>"
    return f'<p>{" · ".join(parts)}</p><div class="tiles">{tiles}</div>'


def charts_of(metrics: Sequence[dict]) -> dict[str, dict[str, Curve]]:
    """{title: {name of a curve: its points}}, loss first.

    The training and held-out values of a metric share one chart.
    """
    charts: dict[str, dict[str, Curve]] = {}
    for record in metrics:
        sizes = ("step", "tokens", "learned_tokens", "seconds")
        values = {key: value for key, value in record.items() if key not in sizes}
        if record.get("seconds"):
            values["tokens a second"] = record.get("tokens", 0) / record["seconds"]
        for key, value in values.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves = charts.setdefault(key.removeprefix("val_"), {})
                name = "held out" if key.startswith("val_") else "training"
                curves.setdefault(name, []).append((record.get("step", 0), value))
    last = ("lr", "grad_norm", "tokens a second", "memory_gb")

    def place(title: str) -> tuple[bool, int]:
        return title != "loss", last.index(title) + 1 if title in last else 0

    out = {}
    for title in sorted(charts, key=place):
        curves = charts[title]
        out[title] = {name: curves[name] for name in ("training", "held out") if name in curves}
    return out


def safe(text: str) -> str:
    """The text for HTML: nothing in it is markup, moves letters or is long."""
    return html.escape(printable(text, LONGEST))


def thin(points: Curve, most: int = POINTS) -> Curve:
    """At most about `most` points: means over equal runs of neighbours, with both ends kept."""
    if len(points) <= most:
        return points
    size = math.ceil((len(points) - 2) / (most - 2))
    inner = [points[i : i + size] for i in range(1, len(points) - 1, size)]
    middle = []
    for part in inner:
        x = math.fsum(x for x, _ in part) / len(part)
        y = math.fsum(y for _, y in part) / len(part)
        middle.append((round(x), y))
    return [points[0], *middle, points[-1]]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers that enclose [low, high].

    They are multiples of 1, 2 or 5 times a power of ten.
    """
    largest = max(abs(low), abs(high))
    if high - low <= max(1e-12 * largest, 1e-290):
        # all values are equal up to rounding
        low, high = low - max(largest, 1e-6) / 2, high + max(largest, 1e-6) / 2
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that enclose [low, high], low > 0.

    Over more than three powers of ten they are the powers alone.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    multiples = (1, 2, 5) if len(powers) <= 4 else (1,)
    every = [n * 10.0**power for power in powers for n in multiples]
    first = max(y for y in every if y <= low)
    last = min(y for y in every if y >= high)
    return [y for y in every if first <= y <= last]


def chart(title: str, curves: dict[str, Curve]) -> str:
    """One SVG: axes with ticks, a line for each curve, and the figures of a step at the pointer.

    A loss that falls to less than a twentieth has a logarithmic axis, which keeps its end visible.
    """
    curves = {name: thin(points) for name, points in curves.items()}
    places = sorted({x for points in curves.values() for x, _ in points})
    values = [y for points in curves.values() for _, y in points]
    far = title == "loss" and 1e-9 < 20 * min(values) < max(values)
    scale = math.log10 if far else float
    y_ticks = (log_ticks if far else ticks)(min(values), max(values))
    bottom, height = scale(y_ticks[0]), scale(y_ticks[-1]) - scale(y_ticks[0])
    x_low, x_high = places[0], max(places[-1], places[0] + 1)
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (right - LEFT), 1)

    def up(y: float) -> float:
        return round(floor - (scale(y) - bottom) / height * (floor - TOP), 1)

    out = [f'<text class="title" x="{LEFT}" y="14">{safe(title)}{", logarithmic" * far}</text>']
    out += [
        f'<path class="rule" d="M{LEFT} {up(y)}H{right}"/><text x="{LEFT - 6}" y="{up(y) + 4}" '
        f'class="y">{number(y)}</text>'
        for y in y_ticks
    ]
    out += [
        f'<text x="{across(x)}" y="{floor + 16}" class="x">{number(x)}</text>'
        for x in ticks(x_low, x_high, 5)
        if x_low <= x <= x_high
    ]
    out.append(f'<text x="{right}" y="{HEIGHT - 2}" class="y">step</text>')
    for name, points in curves.items():
        kind = name.replace(" ", "-")
        path = " ".join(f"{across(x)},{up(y)}" for x, y in points)
        # two evaluations are two points, and no curve
        if len(points) > 2 or name == "training":
            out.append(f'<polyline class="line {kind}" points="{path}"/>')
        if len(points) < 30:
            out += [
                f'<circle class="{kind}" cx="{across(x)}" cy="{up(y)}" r="2.5"/>' for x, y in points
            ]
    by_step = {name: dict(points) for name, points in curves.items()}
    edges = [LEFT, *((across(a) + across(b)) / 2 for a, b in pairwise(places)), right]
    for x, start, end in zip(places, edges, edges[1:], strict=False):
        here = {name: by_step[name][x] for name in curves if x in by_step[name]}
        label = f"step {x:,}: " + ", ".join(f"{name} {number(y)}" for name, y in here.items())
        dots = "".join(
            f'<circle class="{name.replace(" ", "-")}" cx="{across(x)}" cy="{up(y)}" r="4"/>'
            for name, y in here.items()
        )
        out.append(
            f'<g class="at"><rect x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" '
            f'height="{floor - TOP}"/><g><title>{label}</title>'
            f'<path d="M{across(x)} {TOP}V{floor}"/>{dots}<text x="{right}" '
            f'y="14">{label}</text></g></g>'
        )
    keys = "".join(f'<span class="{name.replace(" ", "-")}">{name}</span>' for name in curves)
    frame = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{safe(title)}"'
    about = MEANING.get(re.split("[@/]", title)[0], "")
    keys += about and f"<div>{about}</div>"
    return f"<figure><svg {frame}>{''.join(out)}</svg><figcaption>{keys}</figcaption></figure>"


def sample_table(samples: Sequence[dict]) -> str:
    """The records of the first and the last evaluation side by side.

    A field that did not change has one column, a field that changed has two.
    """
    steps = [s.get("step", 0) for s in samples]
    if not steps:
        return ""
    first, last = min(steps), max(steps)
    before, after = (
        {s.get("row", s.get("id", s.get("line"))): s for s in samples if s.get("step", 0) == step}
        for step in (first, last)
    )
    names = dict.fromkeys(key for sample in after.values() for key in sample)
    keys = [key for key in names if key not in ("step", "row", "id", "line", "chat")]
    pairs = [(before.get(name, sample), sample) for name, sample in after.items()]
    changed = [key for key in keys if any(old.get(key) != new.get(key) for old, new in pairs)]
    sides = ((first, before), (last, after))
    moving = [(key, step, side) for key in changed for step, side in sides]
    still = [key for key in keys if key not in changed]
    head = ("record", *still, *(f"{key}, step {step:,}" for key, step, _ in moving))
    rows = []
    for name, sample in list(after.items())[:ROWS]:
        right = sample.get("reference", sample.get("label"))
        cells = [cell(name), *(cell(sample.get(key)) for key in still)]
        cells += [
            cell(side.get(name, {}).get(key), right if key in ("answer", "predicted") else None)
            for key, _, side in moving
        ]
        rows.append("<tr>" + "".join(cells) + "</tr>")
    top = "<tr>" + "".join(f"<th>{safe(str(text))}</th>" for text in head) + "</tr>"
    shown, folded = (
        f"<div class='wide'><table>{top}{''.join(part)}</table></div>"
        for part in (rows[:SHOWN], rows[SHOWN:])
    )
    if len(rows) <= SHOWN:
        return shown
    return f"{shown}<details><summary>{len(rows) - SHOWN} more</summary>{folded}</details>"


def cell(value: Any, right: Any = None) -> str:
    """A table cell; a value that equals the right answer is marked."""
    if value is None:
        shown = "–"
    elif isinstance(value, float):
        shown = number(value)
    else:
        shown = value if isinstance(value, str) else json.dumps(value)
    correct = right is not None and str(value).strip() == str(right).strip()
    return f"<td{' class=ok' if correct else ''}>{safe(shown)}</td>"


def settings_tables(settings: dict) -> str:
    """The command, the settings that differ from the defaults, machine and versions.

    Those that a resume must not change and every setting by group follow, folded.
    """

    def grid(groups: dict[str, dict | None]) -> str:
        tables = [
            f"<div><h3>{safe(name)}</h3>{html_table((), group.items())}</div>"
            for name, group in groups.items()
            if group
        ]
        return f"<div class='grid'>{''.join(tables)}</div>" if tables else ""

    config = settings.get("config", {})
    groups = {name: group for name, group in config.items() if isinstance(group, dict)}
    groups["this recipe"] = {
        name: value for name, value in config.items() if not isinstance(value, dict)
    }
    command = f"<pre>{safe(settings['command'])}</pre>" if settings.get("command") else ""
    flat = settings_of_run(settings)
    changed = {name: flat[name] for name in settings.get("changed", ()) if name in flat}
    main = grid(
        {
            "other than the defaults": changed,
            "machine": settings.get("machine"),
            "versions": settings.get("versions"),
        }
    )
    every = grid({"fixed for this run": settings.get("identity")} | groups)
    return command + main + (every and f"<details><summary>all settings</summary>{every}</details>")


def settings_of_run(settings: dict) -> dict[str, Any]:
    """Every setting of a config.json by its name, without its group."""
    config = settings.get("config", {})
    groups = [group for group in config.values() if isinstance(group, dict)]
    own = {name: value for name, value in config.items() if not isinstance(value, dict)}
    return {name: value for group in (*groups, own) for name, value in group.items()}


def comparison(folders: Sequence[Path]) -> str:
    """The page of several runs: each figure's curves over each other, the settings that differ.

    A figure is that of held-out records where the runs have it. ValueError for a folder without
    logs, and for more runs than there are colours.
    """
    if not 2 <= len(folders) <= 4:
        raise ValueError(f"{len(folders)} runs: give 2 to 4 run folders")
    runs, settings = {}, []
    for place, folder in enumerate(folders, 1):
        paths = [folder / "config.json", folder / "metrics.jsonl"]
        if not all(path.exists() for path in paths):
            raise ValueError(f"{folder} holds no config.json and metrics.jsonl: give a run folder")
        runs[f"run {place}"] = charts_of(read_json_lines(paths[1]))
        settings.append(settings_of_run(json.loads(paths[0].read_text(encoding="utf-8"))))
    titles = dict.fromkeys(title for charts in runs.values() for title in charts)
    charts, last = "", []
    for title in titles:
        both = {name: found.get(title, {}) for name, found in runs.items()}
        kind = "held out" if all("held out" in curves for curves in both.values()) else "training"
        curves = {name: found[kind] for name, found in both.items() if found.get(kind)}
        if curves:
            charts += chart(title, curves)
            ends = [number(curves[name][-1][1]) if name in curves else "" for name in runs]
            last.append((f"{title}, {kind}", *ends))
    names = dict.fromkeys(name for values in settings for name in values)
    rows = [(name, *(values.get(name, "") for values in settings)) for name in names]
    head = ("", *(f"run {i}: {folder.name}" for i, folder in enumerate(folders, 1)))
    sections = {
        "Last figures": html_table(head, last),
        "Settings that differ": html_table(head, [r for r in rows if len({*map(str, r[1:])}) > 1]),
        "Curves": f'<div class="grid">{charts}</div>',
    }
    return whole_page(" and ".join(folder.name for folder in folders), "", sections)


def html_table(head: Iterable[str], rows: Iterable[tuple]) -> str:
    """An HTML table with an optional header."""
    top = "".join(f"<th>{safe(text)}</th>" for text in head)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table>{top and f'<tr>{top}</tr>'}{body}</table>"


def number(value: float) -> str:
    """A number with four significant digits, or as a whole number from 10,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1e4 and value < 1e15 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds, the two greatest."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


STYLE = """
:root {
  color-scheme: light dark;
  --back: #fcfcfb; --card: #fff; --ink: #1d2126; --soft: #626973; --edge: #e2e4e8;
  --a: #2563c9; --b: #c2570c; --c: #1a8a4a; --d: #8b3fc7; --ok: #e3f3e6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14161a; --card: #1b1e24; --ink: #e6e8eb; --soft: #9aa1ab; --edge: #30343c;
    --a: #7ab0ff; --b: #ffa05c; --c: #63d491; --d: #c792ff; --ok: #1c3a26;
  }
}
body {
  margin: 0 auto; max-width: 1180px; padding: 24px 20px 60px;
  background: var(--back); color: var(--ink); font: 15px/1.45 system-ui, sans-serif;
}
h1 { font-size: 26px; margin: 0 }
h2 { font-size: 18px; margin: 36px 0 12px }
h3 { font-size: 14px; margin: 0 0 6px; color: var(--soft) }
header p { margin: 4px 0 16px; color: var(--soft) }
summary { cursor: pointer; color: var(--soft); padding: 8px 0 }
figure, pre, .tiles div {
  background: var(--card); border: 1px solid var(--edge); border-radius: 8px;
  margin: 0; padding: 10px 14px 6px;
}
.tiles { display: flex; flex-wrap: wrap; gap: 12px }
.tiles b { font-size: 22px; font-weight: 600 }
.tiles span { color: var(--soft) }
.tiles div, figcaption, td, th, pre { font-size: 13px }
.grid {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr));
  gap: 14px; align-items: start; margin-top: 14px;
}
svg { display: block; width: 100% }
svg text { font-size: 11px; fill: var(--soft) }
svg .y { text-anchor: end }
svg .x { text-anchor: middle }
svg .title { font-size: 13px; font-weight: 600; fill: var(--ink) }
.rule { stroke: var(--edge) }
circle { fill: var(--a) }
circle.held-out, circle.run-2 { fill: var(--b) }
circle.run-3 { fill: var(--c) }
circle.run-4 { fill: var(--d) }
.line { fill: none; stroke: var(--a); stroke-width: 1.7; stroke-linejoin: round }
.line.held-out, .line.run-2 { stroke: var(--b) }
.line.run-3 { stroke: var(--c) }
.line.run-4 { stroke: var(--d) }
figcaption { color: var(--soft); padding-left: 44px }
figcaption span { margin-right: 16px }
figcaption span::before {
  content: ""; display: inline-block; width: 14px; height: 3px; margin-right: 6px;
  background: var(--a); vertical-align: 3px;
}
figcaption .held-out::before, figcaption .run-2::before { background: var(--b) }
figcaption .run-3::before { background: var(--c) }
figcaption .run-4::before { background: var(--d) }
.at rect { fill: transparent }
.at > g { visibility: hidden }
.at:hover > g { visibility: visible }
.at path { stroke: var(--soft); stroke-dasharray: 3 3 }
.at text { text-anchor: end; fill: var(--ink) }
table { border-collapse: collapse; width: 100% }
th { color: var(--soft); font-weight: 600 }
.ok { background: var(--ok) }
.wide { overflow-x: auto }
td, th {
  border-bottom: 1px solid var(--edge); padding: 5px 6px;
  text-align: left; vertical-align: top; min-width: 84px;
}
td, pre { white-space: pre-wrap; overflow-wrap: anywhere }
"""
