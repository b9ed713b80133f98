"""report.html of a run folder: curves, answers before and after training, and settings.

It is made from the logs of the folder. The page is one file without scripts that loads nothing.
Colours follow the reader's light or dark setting; figures appear at the pointer.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from ta.files import is_ours, read_json_lines, write_atomic
from ta.generation.evaluation import compare
from ta.generation.metrics import METRICS
from ta.generation.text_metrics import UNSPACED, plain, words
from ta.printable import printable
from ta.training.run_folder import evaluations, read_metrics, read_settings

LONGEST = 4000  # characters of one text

Curve = list[tuple[float, float]]  # (step, value)
Charts = dict[str, dict[str, Curve]]  # by title and by name

# a chart and its margins, in SVG units
WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 26, 30
# greatest number of points of a curve, and of records of one group of samples
POINTS, ROWS = 300, 64
# records of a group that are open at once
SHOWN = 6
# words of an answer that are compared with the right one
WORDS = 300
# pixels of a picture's longer side
PICTURE = 160
# seconds between two looks at the page of a run that goes on
LIVE = 60
# what is logged of a step and is no figure, and the figures whose charts come last
SIZES = ("step", "tokens", "learned_tokens", "seconds", "update_seconds")
LAST = ("lr", "grad_norm", "tokens a second", "update_tokens_per_second", "memory_gb")
# what stands in a card's dialogue or heading, and not among its fields
APART = {
    *("step", "row", "id", "line", "chat", "prompt", "text", "answer", "predicted"),
    *("reference", "label"),
}

# what a figure says, in one sentence, where no metric of ta/generation/metrics.py has its name
MEANING = {
    "loss": "What training lowers: the mean over what is learned, for most methods nats a token.",
    "perplexity": "How many tokens the model hesitates between: exp of its mean surprise.",
    "reward": "Mean reward of the answers.",
    "reward_margin": "How much higher the reward of the better answer is, on average.",
    "reward_accuracy": "Share of records in which the better answer has the higher reward.",
    "reward_chosen": "Mean reward of the chosen answers.",
    "reward_rejected": "Mean reward of the rejected answers.",
    "reward_desirable": "Mean reward of the desirable answers.",
    "reward_undesirable": "Mean reward of the other answers.",
    "reward_gap": "How much higher the chosen answer scores, on average.",
    "reward_std": "Spread of the rewards; where it is 0 there is nothing to learn.",
    "reward_seconds": "Seconds that the rewards of a round took.",
    "update_tokens_per_second": "Tokens trained on in a second, without rollouts and evaluations.",
    "rollout_seconds": "Seconds that the answers of a round took.",
    "ranking_accuracy": "Share of pairs whose chosen answer scores higher.",
    "preference": "Share of pairs in which a desirable answer is rewarded above another.",
    "logp_chosen": "Mean log-probability of the chosen answers; where it falls, so do answers.",
    "logp_rejected": "Mean log-probability of the rejected answers.",
    "logp": "Mean log-probability of the answers.",
    "kl": "How far the model is from its reference, in nats.",
    "kl_to_reference": "How far the answers are from the reference model, nats a token.",
    "rollout_tokens_per_second": "Tokens of the answers of a round, in a second.",
    "flat_groups": "Share of prompts whose answers all have one reward and teach nothing.",
    "tool_calls": "Calls of tools an answer.",
    "failed_calls": "Share of the calls of tools that failed.",
    "truncated": "Share of answers that were cut at the longest length.",
    "entropy": "Surprise of the sampled tokens, nats each; near 0 all answers are alike.",
    "clipped": "Share of tokens whose probability moved further than the clip allows.",
    "mismatch": "Distance between the sampler's and the trainer's log-probabilities.",
    "best_weight": "Weight of the passage that counts most, on average; 1 means one decides.",
    "lr": "The learning rate of the step.",
    "grad_norm": "Length of the gradient before it is clipped; jumps are a warning.",
    "tokens a second": "Tokens trained on in a second, over all devices.",
    "memory_gb": "Greatest memory used so far.",
}


def meaning(title: str) -> str:
    """What a figure says, in one sentence; "" of one that a copied recipe adds."""
    name = title if title in MEANING else re.split("[@/ ]", title)[0]
    name = re.sub(r"_of_prompt$|_characters$", "", re.sub(r"^recall_at_\d+$", "recall_at_5", name))
    if name in MEANING or name not in METRICS:
        return MEANING.get(name, "")
    function = METRICS[name].function
    text = getattr(function, "func", function).__doc__ or ""
    return " ".join(text.partition("\n\n")[0].replace("`", "").split())


def write_report(folder: Path, live: bool = False) -> None:
    """Write folder/report.html from config.json and the logs metrics and samples (.jsonl).

    Files that do not exist are left out. `live` is of a run that goes on: a browser reads the page
    again now and then.
    """
    metrics = read_metrics(folder)
    samples = read_json_lines(folder / "samples.jsonl")
    text = page(folder.resolve().name, read_settings(folder), metrics, samples, live)
    write_atomic(folder / "report.html", text)


def page(
    name: str,
    settings: dict,
    metrics: Sequence[dict],
    samples: Sequence[dict],
    live: bool = False,
) -> str:
    """The whole page.

    `settings` is the object of config.json; the others are the lines of the logs.
    """
    figures = charts_of(metrics)
    whole = {title: curves for title, curves in figures.items() if "/" not in title}
    single = chart_grid({title: x for title, x in figures.items() if title not in whole})
    steps = sorted({sample.get("step", 0) for sample in samples})
    sides = {f"step {step:,}": answers_at(samples, step) for step in steps[:1] + steps[-1:]}
    sections = {
        "Held-out figures of each set": sets_table(figures),
        "Curves": chart_grid(whole) + folded("curves of single sets", single),
        "Held-out records, before and after": sample_cards(sides, settings.get("pictures", "")),
        "Records of training": records_table(settings.get("records")),
        "Settings": settings_tables(settings),
    }
    return whole_page(name, headline(settings, metrics, whole), sections, live)


def chart_grid(figures: Charts) -> str:
    """The charts of figures by their titles; "" without one."""
    return grid(chart(title, curves) for title, curves in figures.items())


def grid(parts: Iterable[str]) -> str:
    """Parts of a page beside each other; "" without one."""
    text = "".join(parts)
    return text and f'<div class="grid">{text}</div>'


def folded(summary: str, text: str) -> str:
    """What a reader may open; "" where there is nothing."""
    return text and f"<details><summary>{summary}</summary>{text}</details>"


def sets_table(figures: Charts) -> str:
    """The first and the last value of each figure, over all held-out records and of each set.

    "" where there are not several sets.
    """
    sets = dict.fromkeys(title.partition("/")[2] for title in figures)
    ends = {}
    for title, curves in figures.items():
        if points := curves.get("held out"):
            figure, _, of = title.partition("/")
            values = [number(y) for _, y in points[:1] + points[1:][-1:]]
            ends.setdefault(figure, {})[of] = " → ".join(values)
    rows = [(figure, *(found.get(of) for of in sets)) for figure, found in ends.items()]
    return wide_table(["", *(of or "all" for of in sets)], rows) if len(sets) > 1 else ""


def whole_page(name: str, head: str, sections: dict[str, str], live: bool = False) -> str:
    """A page of HTML without scripts that loads nothing; empty sections are left out."""
    body = "".join(
        f"<section><h2>{title}</h2>{text}</section>" for title, text in sections.items() if text
    )
    again = f'<meta http-equiv="refresh" content="{LIVE}">' * live
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1">{again}'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{safe(name)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{safe(name)}</h1>{head}</header>"
        f"<main>{body}</main></body></html>\n"
    )


def headline(settings: dict, metrics: Sequence[dict], figures: Charts) -> str:
    """The step that the run has reached, and the main figures at its beginning and now."""
    done = max((m.get("step", 0) for m in metrics), default=0)
    steps = settings.get("identity", {}).get("steps")
    of = f" of {steps:,}" if steps else ""
    trained = duration(sum(m.get("seconds", 0) for m in metrics))
    tiles = ""
    for title, curves in figures.items():
        if points := curves.get("held out"):
            was = f" <span>from {number(points[0][1])}</span>" if len(points) > 1 else ""
            tiles += f"<div><b>{number(points[-1][1])}</b>{was}<br>{safe(title)}, held out</div>"
    return f'<p>step {done:,}{of} · {trained} of training</p><div class="tiles">{tiles}</div>'


def before_and_after(folder: Path, figures: Mapping[str, float]) -> str:
    """A line for a person: the held-out figures before training, and `figures`, those after it.

    Without an evaluation before training it tells of the first and the last logged step. Figures of
    single sources are left to the report.
    """
    first = evaluations(folder).get(0, {})
    changes = [
        f"{name} {number(first[name])} -> {number(value)}"
        for name, value in figures.items()
        if name in first and "/" not in name
    ]
    if changes:
        said = f"held out, before -> after training: {', '.join(changes)}; answers"
    else:
        logged = [record for record in read_metrics(folder) if "loss" in record]
        ends = [f"{number(record['loss'])} at step {record['step']}" for record in logged]
        said = f"loss {' -> '.join(dict.fromkeys([*ends[:1], *ends[-1:]]))}; curves"
    return f"{said} in {folder / 'report.html'}"


def charts_of(metrics: Sequence[dict]) -> Charts:
    """{title: {name of a curve: its points}}, loss first.

    The training and held-out values of a metric share one chart.
    """
    charts = {}
    for record in metrics:
        values = {key: value for key, value in record.items() if key not in SIZES}
        if record.get("seconds"):
            values["tokens a second"] = record.get("tokens", 0) / record["seconds"]
        for key, value in values.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                title = key.removeprefix("val_")
                curves = charts.setdefault(title, {"training": [], "held out": []})
                points = curves["training" if key == title else "held out"]
                points.append((record.get("step", 0), value))
    places = {"loss": -1} | {title: place for place, title in enumerate(LAST, 1)}
    return {
        title: {name: points for name, points in charts[title].items() if points}
        for title in sorted(charts, key=lambda title: places.get(title, 0))
    }


def safe(text: str) -> str:
    """The text for HTML: nothing in it is markup, moves letters or is long."""
    return html.escape(printable(text, LONGEST))


def downsample(points: Curve, most: int = POINTS) -> Curve:
    """At most about `most` points: means over equal runs of neighbours, with both ends kept."""
    if len(points) <= most:
        return points
    inner = points[1:-1]
    size = math.ceil(len(inner) / (most - 2))
    middle = []
    for start in range(0, len(inner), size):
        xs, ys = zip(*inner[start : start + size], strict=True)
        middle.append((round(fmean(xs)), fmean(ys)))
    return [points[0], *middle, points[-1]]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that enclose [low, high].

    They are multiples of 1, 2 or 5 times a power of ten.
    """
    largest = max(abs(low), abs(high))
    if high - low <= max(1e-12 * largest, 1e-290):
        # all values are equal up to rounding
        around = largest / 2 if largest > 1e-6 else 0.5
        low, high = low - around, high + around
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
    return every[bisect_right(every, low) - 1 : bisect_left(every, high) + 1]


def chart(title: str, curves: dict[str, Curve]) -> str:
    """One SVG: axes with ticks, a line for each curve, and the figures of a step at the pointer.

    A loss that falls to less than a twentieth has a logarithmic axis, which keeps its end visible.
    """
    curves = {name: downsample(points) for name, points in curves.items()}
    by_step: dict[float, Curve] = {}
    for name, points in curves.items():
        for x, y in points:
            by_step.setdefault(x, []).append((name, y))
    places = sorted(by_step)
    values = [y for _, y in chain(*curves.values())]
    least, most = min(values), max(values)
    far = title == "loss" and 1e-9 < 20 * least < most
    scale = math.log10 if far else float
    y_ticks = log_ticks(least, most) if far else ticks(least, most, 4)
    bottom, height = scale(y_ticks[0]), scale(y_ticks[-1]) - scale(y_ticks[0])
    x_low, x_high = places[0], max(places[-1], places[0] + 1)
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (right - LEFT), 1)

    def up(y: float) -> float:
        return round(floor - (scale(y) - bottom) / height * (floor - TOP), 1)

    def dot(name: str, x: float, y: float, size: float) -> str:
        return f'<circle class="{css(name)}" cx="{across(x)}" cy="{up(y)}" r="{size}"/>'

    axes = [
        f'<path class="rule" d="M{LEFT} {up(y)}H{right}"/><text x="{LEFT - 6}" y="{up(y) + 4}" '
        f'class="y">{number(y)}</text>'
        for y in y_ticks
    ]
    axes += [
        f'<text x="{across(x)}" y="{floor + 16}" class="x">{number(x)}</text>'
        for x in ticks(x_low, x_high, 5)
        if x_low <= x <= x_high
    ]
    lines = []
    for name, points in curves.items():
        path = " ".join(f"{across(x)},{up(y)}" for x, y in points)
        # two evaluations are two points, and no curve
        if len(points) > 2 or name == "training":
            lines.append(f'<polyline class="line {css(name)}" points="{path}"/>')
        if len(points) < 30:
            lines += [dot(name, x, y, 2.5) for x, y in points]
    middles = [(across(a) + across(b)) / 2 for a, b in pairwise(places)]
    edges = [LEFT, *middles, right]
    for x, (start, end) in zip(places, pairwise(edges), strict=True):
        label = f"step {x:,}: " + ", ".join(f"{name} {number(y)}" for name, y in by_step[x])
        lines.append(
            f'<g class="at"><rect x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" '
            f'height="{floor - TOP}"/><g><title>{label}</title>'
            f'<path d="M{across(x)} {TOP}V{floor}"/>'
            f"{''.join(dot(name, x, y, 4) for name, y in by_step[x])}"
            f'<text x="{right}" y="14">{label}</text></g></g>'
        )
    keys = "".join(f'<span class="{css(name)}">{name}</span>' for name in curves)
    about = meaning(title)
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{safe(title)}">'
        f'<text class="title" x="{LEFT}" y="14">{safe(title)}{", logarithmic" * far}</text>'
        f"{''.join(axes)}"
        f'<text x="{right}" y="{HEIGHT - 2}" class="y">step</text>{"".join(lines)}</svg>'
        f"<figcaption>{keys}{about and f'<div>{safe(about)}</div>'}</figcaption></figure>"
    )


def css(name: str) -> str:
    """The class that colours a curve."""
    return name.replace(" ", "-")


def answers_at(samples: Sequence[dict], step: int) -> dict[Any, dict]:
    """{name of a record and its answer: the sample} of one evaluation."""
    return {
        sample.get("row", sample.get("id", sample.get("line"))): sample
        for sample in samples
        if sample.get("step", 0) == step
    }


def sample_cards(
    sides: Mapping[str, dict[Any, dict]], pictures: str = "", common: bool = False
) -> str:
    """The same records at several steps or of several runs, {title of a side: its samples}.

    A card has the dialogue, the answers side by side with what is right in colour, and the right
    answer. Cards of answers that became wrong come first. `pictures` is the folder below which
    pictures lie. With `common` there are only the records that all sides have.
    """
    groups = {}
    *_, newest = [{}, *sides.values()]
    for name, sample in newest.items():
        found = [side.get(name, {}) for side in sides.values()]
        # another question of the same name is another record
        found = [x if x.get("prompt") == sample.get("prompt") else {} for x in found]
        if not common or all(found):
            groups.setdefault(tuple(map(is_right, found)), []).append((name, found))
    out = by_how_much(groups, list(sides))
    words_of = {True: "right", False: "wrong", None: "not compared"}

    def place(key: tuple) -> tuple[bool, bool]:
        # wrong now before right now, and what has changed first
        return key[-1] is not False, key[0] is key[-1]

    for key in sorted(groups, key=place):
        cards = [card(name, list(sides), found, pictures) for name, found in groups[key][:ROWS]]
        if any(x is not None for x in key):
            said = ", ".join(f"{title} {words_of[x]}" for x, title in zip(key, sides, strict=True))
            out += f"<h3>{said}: {len(groups[key]):,}</h3>"
        out += "".join(cards[:SHOWN])
        out += folded(f"{len(cards) - SHOWN} more", "".join(cards[SHOWN:]))
    return out


def by_how_much(groups: Mapping[tuple, list], titles: Sequence[str]) -> str:
    """The share of right answers of two sides and their difference, with its interval over records.

    "" of other numbers of sides, and where nothing is compared.
    """
    records = {}
    for key, cards in groups.items() if len(titles) == 2 else ():
        for name, (*_, newest) in cards if None not in key else ():
            own = newest.get("source"), str(newest.get("id", name))
            records.setdefault(own, []).append(key)
    if len(records) < 2:
        return ""
    sides = zip(*(zip(*keys, strict=True) for keys in records.values()), strict=True)
    found = compare("reward", *([{"rewards": list(rights)} for rights in side] for side in sides))
    gap = found.difference
    return (
        f"<p>Right answers: {found.first:.1%} {safe(titles[0])}, {found.second:.1%} "
        f"{safe(titles[1])}; the difference is {100 * gap.value:+.1f} points, with 95 % between "
        f"{100 * gap.low:+.1f} and {100 * gap.high:+.1f} (bootstrap over {gap.records:,} "
        "records).</p>"
    )


def is_right(sample: dict) -> bool | None:
    """Whether an answer, a class or a ranking is the right one; None where nothing says what is."""
    if "scores" in sample:
        first, second = sample["scores"]
        return None not in (first, second) and first > second
    right = sample.get("reference", sample.get("label"))
    said = sample.get("answer", sample.get("predicted"))
    return None if right is None or said is None else plain(str(said)) == plain(str(right))


def card(name: Any, titles: Sequence[str], found: Sequence[dict], pictures: str) -> str:
    """One record: its dialogue and fields, and what each side says."""
    newest = found[-1]
    chat = newest.get("chat") or [{"content": newest.get("prompt", newest.get("text", ""))}]
    keys = [key for key in newest if key not in APART]
    moving = [key for key in keys if any(side.get(key) != newest[key] for side in found)]
    right = newest.get("reference", newest.get("label"))
    still = {key: newest[key] for key in keys if key not in moving}
    sides = ""
    for title, side in zip(titles, found, strict=True):
        said = side.get("answer", side.get("predicted", ""))
        fields = fields_html({key: side.get(key) for key in moving})
        ok = is_right(side) is True
        text = safe(str(said)) if ok else marked(str(said), right)
        sides += f"<div{' class=ok' * ok}><h4>{safe(title)}</h4><p>{text}</p>{fields}</div>"
    about = fields_html({"record": newest.get("id", newest.get("line", name))} | still)
    wanted = "" if right is None else f"<p><b>right answer</b> {safe(str(right))}</p>"
    messages = "".join(message_html(message, pictures) for message in chat)
    return (
        f'<article><div><div class="chat">{messages}</div>{wanted}{about}</div>'
        f'<div class="sides">{sides}</div></article>'
    )


def message_html(message: dict, pictures: str) -> str:
    """A message with its role; pictures are shown, other media named."""
    thought = ("reasoning_content", "tool_calls")
    lines = [safe(f"{key}: {message[key]}") for key in thought if key in message]
    content = message.get("content")
    for part in content if isinstance(content, list) else [message]:
        text, kind = str(part.get("content") or ""), part.get("type", "text")
        url = picture(str(Path(pictures) / text)) if pictures and kind == "image" else ""
        named = safe(text if kind == "text" else f"[{kind} {text}]")
        lines.append(f'<img alt="{named}" src="{url}">' if url else named)
    role = message.get("role", "")
    return "<p>" + (role and f"<b>{safe(role)}</b> ") + "\n".join(lines) + "</p>"


@lru_cache(512)
def picture(path: str) -> str:
    """A small copy of a picture as a data URL; "" where it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.thumbnail((PICTURE, PICTURE))
            kept = io.BytesIO()
            image.convert("RGB").save(kept, "JPEG", quality=85)
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(kept.getvalue()).decode()


def marked(answer: str, right: Any = None) -> str:
    """The answer as HTML; its words that stand in the right one, in that order, are in colour."""
    pieces = rf"\s+|{UNSPACED.pattern}|(?:(?!{UNSPACED.pattern})\S)+"
    said, wanted = (
        re.findall(pieces, printable(str(text), LONGEST)) for text in (answer, right or "")
    )
    keys = [[" ".join(words(piece)) for piece in side] for side in (said, wanted)]
    places = [[i for i, key in enumerate(side) if key][:WORDS] for side in keys]
    own, other = ([side[i] for i in at] for side, at in zip(keys, places, strict=True))
    blocks = SequenceMatcher(None, own, other, autojunk=False).get_matching_blocks()
    out = list(map(html.escape, said))
    for start, _, size in blocks:
        for place in places[0][start : start + size]:
            out[place] = f"<mark>{out[place]}</mark>"
    return "".join(out)


def fields_html(fields: Mapping[str, Any]) -> str:
    """Names and values on a line."""
    shown = " · ".join(f"{safe(key)} {value_html(value)}" for key, value in fields.items())
    return f"<small>{shown}</small>"


def value_html(value: Any) -> str:
    """A value as HTML."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return number(value)
    return safe(value if isinstance(value, str) else json.dumps(value))


def records_table(records: Mapping[str, Any] | None) -> str:
    """Sources, percentiles of lengths and what was left out, of config.json's "records"."""
    if not records:
        return ""
    sources = [(s["source"], f"{s['used']:,}", f"{s['records']:,}") for s in records["sources"]]
    lengths = records["lengths"]
    drops = records["drops"].items()
    left = [(why, x["count"], ", ".join(x["first"])) for why, x in drops]
    share = records["learned_tokens"] / max(records["tokens"], 1)
    return (
        f"<p>{records['records']:,} records, {records['tokens']:,} tokens, {share:.0%} learned; "
        f"half of the records have at most {lengths['50 %']:,} tokens.</p>"
        + wide_table(("source", "used", "records"), sources)
        + wide_table(("percentile", *lengths), [("tokens a record", *lengths.values())])
        + wide_table(("left out", "records", "the first"), left)
    )


def settings_tables(settings: dict) -> str:
    """The command, the settings that differ from the defaults, machine and versions.

    Those that a resume must not change and every setting by group follow, folded.
    """

    def tables(groups: Mapping[str, dict | None]) -> str:
        return grid(
            f"<div><h3>{safe(name)}</h3>{html_table((), group.items())}</div>"
            for name, group in groups.items()
            if group
        )

    flat, command = settings_of_run(settings), settings.get("command")
    changed = {name: flat[name] for name in settings.get("changed", ()) if name in flat}
    about = {name: settings.get(name) for name in ("machine", "versions")}
    every = tables({"fixed for this run": settings.get("identity")} | settings_groups(settings))
    return (
        (f"<pre>{safe(command)}</pre>" if command else "")
        + tables({"other than the defaults": changed} | about)
        + folded("all settings", every)
    )


def settings_groups(settings: dict) -> dict[str, dict[str, Any]]:
    """The settings of a config.json by their group; those of the recipe itself come last."""
    config = settings.get("config", {})
    groups = {name: group for name, group in config.items() if isinstance(group, dict)}
    own = {name: value for name, value in config.items() if name not in groups}
    return groups | {"this recipe": own}


def settings_of_run(settings: dict) -> dict[str, Any]:
    """Every setting of a config.json by its name, without its group."""
    groups = settings_groups(settings).values()
    return {name: value for group in groups for name, value in group.items()}


def comparison(folders: Sequence[Path]) -> str:
    """The page of several runs: each figure's curves over each other, the settings that differ.

    A figure is that of held-out records where the runs have it. ValueError for a folder without
    logs, and for more runs than there are colours.
    """
    if not 2 <= len(folders) <= 4:
        raise ValueError(f"{len(folders)} runs: give 2 to 4 run folders")
    runs, settings, sides = {}, [], {}
    for place, folder in enumerate(folders, 1):
        logs = folder / "metrics.jsonl"
        if not is_ours(folder, "config.json", ["config"]) or not logs.exists():
            raise ValueError(f"{folder} holds no config.json and metrics.jsonl: give a run folder")
        run, samples = f"run {place}", read_json_lines(folder / "samples.jsonl")
        runs[run] = charts_of(read_metrics(folder))
        settings.append(settings_of_run(own := read_settings(folder)))
        last_step = max((sample.get("step", 0) for sample in samples), default=0)
        sides[run] = answers_at(samples, last_step)
    charts, last = {}, []
    for title in dict.fromkeys(chain(*runs.values())):
        found = {run: figures.get(title, {}) for run, figures in runs.items()}
        kind = "held out" if all("held out" in curves for curves in found.values()) else "training"
        if curves := {run: found[run][kind] for run in runs if kind in found[run]}:
            charts[title] = curves
            ends = [curves[run][-1][1] if run in curves else None for run in runs]
            gap = [ends[1] - ends[0]] if len(ends) == 2 and None not in ends else []
            last.append((f"{title}, {kind}", *ends, *gap))
    names = dict.fromkeys(chain(*settings))
    rows = [(name, *(values.get(name, "") for values in settings)) for name in names]
    differ = [row for row in rows if len({*map(str, row[1:])}) > 1]
    head = ("", *(f"{run}: {folder.name}" for run, folder in zip(runs, folders, strict=True)))
    cards = sample_cards(sides, own.get("pictures", ""), common=True)
    sections = {
        "Last figures": wide_table([*head, *["run 2 - run 1"] * (len(runs) == 2)], last),
        "Settings that differ": wide_table(head, differ),
        "Curves": chart_grid(charts),
        "Held-out records, side by side": cards,
    }
    return whole_page(" and ".join(folder.name for folder in folders), "", sections)


def html_table(head: Iterable[str], rows: Iterable[tuple]) -> str:
    """An HTML table with an optional header."""
    top = "".join(f"<th>{safe(text)}</th>" for text in head)
    body = "".join(f"<tr>{''.join(f'<td>{value_html(x)}</td>' for x in row)}</tr>" for row in rows)
    return f"<table>{top and f'<tr>{top}</tr>'}{body}</table>"


def wide_table(head: Iterable[str], rows: Sequence[tuple]) -> str:
    """An HTML table that moves sideways where there is no room; "" without rows."""
    return f"<div class='wide'>{html_table(head, rows)}</div>" if rows else ""


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
  overflow-wrap: anywhere;
}
h1 { font-size: 26px; margin: 0 }
h2 { font-size: 18px; margin: 36px 0 12px }
h3 { font-size: 14px; margin: 18px 0 8px; color: var(--soft) }
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
td, th {
  border-bottom: 1px solid var(--edge); padding: 5px 6px;
  text-align: left; vertical-align: top;
}
td:first-child { color: var(--soft); min-width: 110px }
td, pre, article p { white-space: pre-wrap }
.wide { overflow-x: auto; margin-top: 12px }
th, .wide td + td { overflow-wrap: break-word }
article {
  display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 14px;
  background: var(--card); border: 1px solid var(--edge); border-radius: 8px;
  padding: 12px 14px; margin: 0 0 12px; font-size: 13px;
}
article p { margin: 0 0 6px }
article p b { color: var(--soft); font-weight: 600 }
article h4 { margin: 0 0 4px; color: var(--soft); font-weight: 600 }
small { color: var(--soft); font-size: 12px }
.chat { max-height: 340px; overflow-y: auto }
.chat img { display: block; margin: 4px 0; border-radius: 4px; max-width: 100% }
.sides {
  display: grid; gap: 10px; align-items: start;
  grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr);
}
.sides > div { border: 1px solid var(--edge); border-radius: 6px; padding: 8px 10px }
.sides .ok { background: var(--ok); border-color: transparent }
mark { background: var(--ok); color: inherit; border-radius: 3px; padding: 0 2px }
@media (max-width: 640px) {
  body { padding: 16px 12px 40px }
  article { grid-template-columns: minmax(0, 1fr) }
  svg text { font-size: 14px }
  svg .title { font-size: 16px }
  figcaption { padding-left: 0 }
}
"""
