"""The conformance table: real templates against chats as people have them.

    TA_REAL_TOKENIZERS=DIR python tests/conformance/table.py [--peer FILE] [--wrong FILE] [NAME ...]

`--peer` reads the outcomes that trl_peer.py wrote and judges them alike; `--wrong` writes the table
and, of each refused or wrong cell, why and how to see it again.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from cells import CELLS  # noqa: E402
from judge import Outcome, Verdict, judge  # noqa: E402
from ours import outcome  # noqa: E402
from templates import TEMPLATES, real_tokenizer, training_source, why_absent  # noqa: E402

from ta.chat.template import ChatConfig  # noqa: E402
from ta.chat.tokenizer import chat_tokenizer  # noqa: E402

SIGNS = {"right": ".", "refused": "r", "needless": "R", "wrong": "W"}


def verdicts(name: str, folder: Path, cells=CELLS) -> dict[str, Verdict]:
    """The verdict of every cell of one template."""
    fast, training = real_tokenizer(name), training_source(name)
    try:
        tokenizer = chat_tokenizer(fast, ChatConfig())
    except ValueError as error:
        refusal = Outcome(error=f"at loading: {error}")
        return {title: judge(fast, name, cell, refusal) for title, cell in cells.items()}
    return {
        title: judge(fast, name, cell, outcome(fast, name, cell, tokenizer, folder), training)
        for title, cell in cells.items()
    }


def peer_verdicts(name: str, outcomes: dict[str, dict]) -> dict[str, Verdict]:
    """The same for outcomes that another data step has written."""
    fast, training = real_tokenizer(name), training_source(name)
    return {
        title: judge(fast, name, CELLS[title], Outcome(**given, marks=True), training)
        for title, given in outcomes.items()
    }


def counts(table: dict[str, dict[str, Verdict]]) -> str:
    """Cells right, refused rightly, refused needlessly and wrong."""
    counted = Counter(v.status for row in table.values() for v in row.values())
    return ", ".join(f"{counted[status]} {status}" for status in SIGNS)


def lines(table: dict[str, dict[str, Verdict]]) -> list[str]:
    """The table: a row a template, a column a cell."""
    titles = list(CELLS)
    shown = [f"{i + 1:>2} {title}" for i, title in enumerate(titles)]
    shown.append(" " * 24 + " ".join(f"{i + 1:>2}" for i in range(len(titles))))
    for name, row in table.items():
        signs = " ".join(f" {SIGNS[row[t].status]}" if t in row else "  " for t in titles)
        shown.append(f"{name:<24}{signs}")
    return [*shown, counts(table)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--wrong", type=Path)
    parser.add_argument("--cell")
    given = parser.parse_args()
    peer = json.loads(given.peer.read_text()) if given.peer else {}
    cells = {given.cell: CELLS[given.cell]} if given.cell else CELLS
    table, theirs = {}, {}
    for name in given.names or TEMPLATES:
        if why := why_absent(name):
            print(f"{name}: {why}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            table[name] = verdicts(name, Path(folder), cells)
        print(f"{name:<24}{counts({name: table[name]})}", file=sys.stderr, flush=True)
        if name in peer:
            theirs[name] = peer_verdicts(name, peer[name])
    text = lines(table) + (["", "the peer", *lines(theirs)] if theirs else [])
    print("\n".join(text))
    faults = [
        f"{verdict.status:<8} python tests/conformance/table.py --cell '{title}' '{name}'\n         {verdict.why}"
        for name, row in table.items()
        for title, verdict in row.items()
        if verdict.status in ("needless", "wrong") or (given.wrong and verdict.status == "refused")
    ]
    if given.wrong:
        signs = ", ".join(f"{sign} {status}" for status, sign in SIGNS.items())
        given.wrong.write_text("\n".join(["```", signs, *text, "", *faults, "```"]) + "\n")
    elif given.names:
        print("\n".join(faults))


if __name__ == "__main__":
    main()
