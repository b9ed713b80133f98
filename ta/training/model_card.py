"""The model card: README.md of an exported model, which says what it is and how it came to be."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ta.chat.tokenizer import ChatTokenizer
from ta.data.prepare import Prepared
from ta.flags import changed_settings, command_of
from ta.model.export import export
from ta.model.language_model import LanguageModel
from ta.printable import masked, one_line
from ta.training.run_folder import Run, evaluations, versions


def export_run(
    run: Run,
    model: LanguageModel,
    tokenizer: ChatTokenizer,
    prepared: Prepared | None,
    figures: dict[str, float],
    records: Sequence[dict] = (),
) -> tuple[Path, dict[str, float]]:
    """Export the trained model with its card into OUT/final; returns that folder and the figures.

    `records` are those of `export`.
    """
    folder = run.folder / "final"
    export(model, tokenizer, folder, records, model_card(run, prepared, figures))
    return folder, figures


def model_card(run: Run, prepared: Prepared | None, figures: dict[str, float]) -> str:
    """The card of a run as Markdown; "" where --no-model-card was given.

    It holds the base, the counts of the data, the first and the last figures of held-out records,
    the settings that differ from their defaults, the command and the versions.
    """
    if not run.loop.model_card:
        return ""
    info, config = prepared.info if prepared else {}, run.config
    base = config.model.adapter_path or config.model.model_path
    lines = ["---", "library_name: transformers", f"base_model: {json.dumps(base)}", "---", ""]
    lines += [f"# {_cell(run.folder.name)}", "", f"Trained from {_cell(base)} with ta.", ""]
    if "tokens" in info:
        share = 100 * info["learned_tokens"] / max(info["tokens"], 1)
        lines += ["## Data", "", "| source | records used |", "|---|---|"]
        sources = info["sources"]
        counts = (f"{s['used']:,} of {s['records']:,}" for s in sources)
        names = (_cell(s["source"]) for s in sources)
        lines += [f"| {name} | {n} |" for name, n in zip(names, counts, strict=True)]
        lines += ["", f"{info['tokens']:,} tokens, {share:.0f} % of them learned.", ""]
    if figures:
        first = evaluations(run.folder).get(0, {})
        lines += ["## Figures of held-out records", ""]
        lines += ["| figure | before | after |", "|---|---|---|"]
        lines += [
            f"| {name} | {_shown(first.get(name))} | {_shown(value)} |"
            for name, value in figures.items()
        ]
        lines += [""]
    lines += ["## Settings that differ from the defaults", "", "| setting | value |", "|---|---|"]
    changed = masked(changed_settings(config))
    lines += [f"| {name} | {_cell(value)} |" for name, value in changed.items()]
    lines += ["", "## Again", "", "```sh", command_of(config), "```", ""]
    lines += [", ".join(f"{name} {number}" for name, number in versions().items()), ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """A value as text that is no markup, on one line."""
    return html.escape(one_line(str(value), 400), quote=False).replace("|", "\\|")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""
