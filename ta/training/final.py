"""final/: the exported model of a run, and its card, README.md, which says how it came to be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ta.chat.tokenizer import ChatTokenizer
from ta.data.prepare import Prepared
from ta.flags import changed_settings, command_of
from ta.model.export import export
from ta.model.language_model import LanguageModel
from ta.printable import markdown_table, masked, plain_markdown
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
    data = held_out = ""
    if "tokens" in info:
        share = 100 * info["learned_tokens"] / max(info["tokens"], 1)
        counts = [(s["source"], f"{s['used']:,} of {s['records']:,}") for s in info["sources"]]
        table = markdown_table(("source", "records used"), counts)
        tokens = f"{info['tokens']:,} tokens, {share:.0f} % of them learned."
        data = f"## Data\n\n{table}\n{tokens}\n\n"
    if figures:
        first = evaluations(run.folder).get(0, {})
        rows = [(name, _shown(first.get(name)), _shown(value)) for name, value in figures.items()]
        table = markdown_table(("figure", "before", "after"), rows)
        held_out = f"## Figures of held-out records\n\n{table}\n"
    changed = masked(changed_settings(config))
    return f"""---
library_name: transformers
base_model: {json.dumps(base)}
---

# {plain_markdown(run.folder.name)}

Trained from {plain_markdown(base)} with ta.

{data}{held_out}## Settings that differ from the defaults

{markdown_table(("setting", "value"), changed.items())}
## Again

```sh
{command_of(config)}
```

{", ".join(f"{name} {number}" for name, number in versions().items())}
"""


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""
