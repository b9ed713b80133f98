"""Chats as people have them: one cell each of the conformance table.

Each message has words of its own, so that a judge sees whose text a token is.
"""

import copy
from typing import Any, Literal, NamedTuple


class Cell(NamedTuple):
    """A record, and what is asked of it."""

    record: dict[str, Any]
    kind: Literal["chat", "pair", "prompt"] = "chat"
    loss_on: Literal["answers", "last"] = "answers"
    # a user writes the template's control tokens at "{forged}"
    forged: bool = False
    # the key of reasoning is not the template's own
    another_key: bool = False


def user(content, **more):
    return {"role": "user", "content": content, **more}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def call(name, number, **arguments):
    return {
        "type": "function",
        "id": f"callid{number:03}",
        "function": {"name": name, "arguments": arguments},
    }


def result(number, name, content):
    return {
        "role": "tool",
        "tool_call_id": f"callid{number:03}",
        "name": name,
        "content": content,
    }


def tool(name, description, **properties):
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {
                    key: {"type": kind, "description": f"Described{key}"}
                    for key, kind in properties.items()
                },
                "required": list(properties),
            },
        },
    }


TOOLS = [
    tool("lookup_weather", "Finds skyconditions anywhere.", town="string", days="integer"),
    tool("convert_money", "Changes currencies around.", amount="number", into="string"),
]
DOCUMENTS = [
    {"title": "Lighthousetitle", "text": "Lighthouses guide sailors.", "contents": "Lighthouses."},
    {"title": "Harbourtitle", "text": "Harbours shelter boats.", "contents": "Harbours."},
]
PLAIN = [user("Which colour has grass?"), answer("Green, usually.")]
MULTI = [
    *PLAIN,
    user("Does snow differ?"),
    answer("White instead, mostly."),
    user("Ravens then?"),
    answer("Black feathers everywhere."),
]
REASONED = [
    user("Double thirty please."),
    answer("Sixty exactly.", reasoning_content="Tables say so."),
]
REASONED_MULTI = [
    *REASONED,
    user("Halve this instead."),
    answer("Fifteen precisely.", reasoning_content="Division gives it."),
]
CALLED = [
    user("Forecast wanted please."),
    answer(None, tool_calls=[call("lookup_weather", 1, town="Reykjavik", days=3)]),
    result(1, "lookup_weather", "Drizzle expected."),
    answer("Bring umbrellas."),
]
PARALLEL = [
    user("Two things wanted."),
    answer(
        None,
        tool_calls=[
            call("lookup_weather", 1, town="Valparaiso", days=5),
            call("convert_money", 2, amount=12.5, into="Guilders"),
        ],
    ),
    result(1, "lookup_weather", "Sunshine expected."),
    result(2, "convert_money", "Ninetynine altogether."),
    answer("Sunny, affordable."),
]
AGENT = [
    system("Assist travellers politely."),
    user("Plan everything."),
    answer(
        "Checking clouds first.",
        reasoning_content="Weather decides much.",
        tool_calls=[call("lookup_weather", 1, town="Marrakesh", days=2)],
    ),
    result(1, "lookup_weather", "Sandstorm expected."),
    answer(
        "",
        reasoning_content="Budget comes next.",
        tool_calls=[call("convert_money", 2, amount=40, into="Dirhams")],
    ),
    result(2, "convert_money", "Fourhundred altogether."),
    answer("Postpone departure.", reasoning_content="Storms endanger camels."),
    user("Thanks, anything else?"),
    answer("Pack sunscreen.", reasoning_content="Deserts burn skin."),
]


def quiet(message):
    return {**message, "loss": False}


CELLS = {
    "plain": Cell({"messages": PLAIN}),
    "multi-turn": Cell({"messages": MULTI}),
    "system": Cell({"messages": [system("Speak tersely always."), *MULTI[:4]]}),
    "reasoning in content": Cell(
        {
            "messages": [
                PLAIN[0],
                answer("<think>\nChlorophyll matters.\n</think>\n\nGreen, usually."),
            ]
        }
    ),
    "reasoning": Cell({"messages": REASONED}),
    "reasoning, multi-turn": Cell({"messages": REASONED_MULTI}),
    "reasoning, another key": Cell({"messages": REASONED}, another_key=True),
    "null content": Cell({"messages": CALLED, "tools": TOOLS}),
    "call and content": Cell(
        {
            "messages": [CALLED[0], {**CALLED[1], "content": "Asking stations."}, *CALLED[2:]],
            "tools": TOOLS,
        }
    ),
    "ends in a call": Cell({"messages": CALLED[:2], "tools": TOOLS}),
    "parallel calls": Cell({"messages": PARALLEL, "tools": TOOLS}),
    "calls, no tools given": Cell({"messages": CALLED}),
    "agent": Cell({"messages": AGENT, "tools": TOOLS}),
    "tools given": Cell({"messages": MULTI[:4], "tools": TOOLS}),
    "tools, system": Cell({"messages": [system("Speak tersely always."), *PLAIN], "tools": TOOLS}),
    "documents": Cell({"messages": PLAIN, "documents": DOCUMENTS}),
    "kwargs": Cell({"messages": MULTI[:4], "chat_template_kwargs": {"enable_thinking": False}}),
    "last answer": Cell({"messages": MULTI}, loss_on="last"),
    "last, called": Cell({"messages": CALLED, "tools": TOOLS}, loss_on="last"),
    "loss false": Cell({"messages": [MULTI[0], quiet(MULTI[1]), *MULTI[2:]]}),
    "pair": Cell(
        {"context": MULTI[:3], "answer_w": MULTI[3], "answer_l": answer("Purple, supposedly.")},
        "pair",
    ),
    "pair, reasoning": Cell(
        {
            "context": REASONED[:1],
            "answer_w": REASONED[1],
            "answer_l": answer("Seventy roughly.", reasoning_content="Guessing wildly."),
        },
        "pair",
    ),
    "pair, called": Cell(
        {
            "context": CALLED[:1],
            "answer_w": CALLED[1],
            "answer_l": answer("Nobody knows."),
            "tools": TOOLS,
        },
        "pair",
    ),
    "prompt": Cell({"messages": MULTI[:3]}, "prompt"),
    "prompt, tools": Cell({"messages": CALLED[:3], "tools": TOOLS}, "prompt"),
    "prompt, kwargs": Cell(
        {"messages": MULTI[:3], "chat_template_kwargs": {"enable_thinking": False}}, "prompt"
    ),
    "ends in a question": Cell({"messages": MULTI[:5]}),
    "empty answer": Cell({"messages": [*MULTI[:3], answer("")]}),
    "empty question": Cell({"messages": [user(""), *MULTI[1:4]]}),
    "white space": Cell(
        {"messages": [user("  Which colour?\n\n"), answer("\n Green, usually. \n"), *MULTI[2:4]]}
    ),
    "parts": Cell(
        {
            "messages": [
                {**m, "content": [{"type": "text", "text": m["content"]}]} for m in MULTI[:4]
            ]
        }
    ),
    "odd letters": Cell(
        {
            "messages": [
                user("Färbt Gras \u2014 日本語 🌱?"),
                answer('Grün\u00a0✓ \u200d🌿 \\n {x} "q"'),
            ]
        }
    ),
    "same words": Cell(
        {"messages": [user("Hello"), answer("Hello"), user("Hello"), answer("Hello")]}
    ),
    "forged": Cell({"messages": [user("Repeat {forged} now."), *MULTI[1:4]]}, forged=True),
    "forged tool output": Cell(
        {
            "messages": [*CALLED[:2], result(1, "lookup_weather", "Rain {forged} now."), CALLED[3]],
            "tools": TOOLS,
        },
        forged=True,
    ),
}


def with_text(cell: Cell, forged: str) -> dict:
    """The cell's record with `forged` at "{forged}"."""
    record = copy.deepcopy(cell.record)
    for message in record.get("messages", ()):
        if cell.forged and isinstance(message["content"], str):
            message["content"] = message["content"].replace("{forged}", forged)
    return record
