"""Tools in rollouts: answers that call functions go on behind the results, whose ids are appended and not learned."""

import json
import shutil
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from test_rollouts import die_at, rollouts, story

import ta
from ta.builtin.model_folders import tiny_folder
from ta.builtin.tasks import practice, write_jsonl
from ta.chat.encode import encode_prompt
from ta.chat.render import render_chat
from ta.data.batch import lay_out
from ta.generation.settings import Answer, GenerateConfig
from ta.rl.batches import figures_of, lay_out_answers, sampled, token_values
from ta.rl.settings import RewardConfig, ToolConfig
from ta.rl.tools import Call, Talk, Tools, ids_behind, messages_of

TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

FUNCTIONS = '''
import time

def weather(city: str, days: int = 1) -> str:
    """The weather of a city."""
    return {"Rome": "sunny"}[city] if days == 1 else ["sunny"] * days

def sleep():
    time.sleep(1000)

def _hidden():
    pass
'''


# as Qwen3.5 and Nemotron 3 write calls
TAGGED = (
    TEMPLATE[: TEMPLATE.index("{{- '<tool_call>")]
    + """
{{- '<tool_call>\n<function=' + call.function.name + '>\n' }}
{%- for key, value in call.function.arguments.items() %}
{{- '<parameter=' + key + '>\n' + (value if value is string else value | tojson) }}
{{- '\n</parameter>\n' }}
{%- endfor %}
{{- '</function>\n</tool_call>' }}
"""
    + TEMPLATE[TEMPLATE.index("{%- endfor %}") :]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The random tiny model with a template that writes tools, and a file of tools."""
    folder = tmp_path_factory.mktemp("tools")
    shutil.copytree(tiny_folder(), folder / "model")
    for path in (folder / "model").glob("*.jinja"):
        path.unlink()
    write_template(folder, TEMPLATE)
    (folder / "tools.py").write_text(FUNCTIONS)
    return folder


def write_template(folder, template):
    about = json.loads((folder / "model/tokenizer_config.json").read_text())
    about["chat_template"] = template
    (folder / "model/tokenizer_config.json").write_text(json.dumps(about))


def open_tools(folder):
    config = ta.ModelConfig(str(folder / "model"))
    tokenizer = ta.load_chat_tokenizer(config, ta.TokenizerConfig(), ta.ChatConfig())
    return Tools(ToolConfig(str(folder / "tools.py"), 3), tokenizer, RewardConfig((), 1.0, 1))


@pytest.fixture(scope="module")
def tools(folder):
    made = open_tools(folder)
    yield made
    made.functions.close()


def test_schemas_and_the_form_of_calls(tools):
    weather, sleep = (schema["function"] for schema in tools.schemas)
    assert weather["description"] == "The weather of a city." and sleep["name"] == "sleep"
    parameters = {"city": {"type": "string"}, "days": {"type": "integer"}}
    assert weather["parameters"]["properties"] == parameters
    assert weather["parameters"]["required"] == ["city"]
    assert tools.form.opening.pattern == r"<tool_call>\s*"
    one, two = call("f", x=1), call("f", x=2)
    calls = [Call("f", {"x": 1}), Call("f", {"x": 2})]
    assert tools.calls_in("So: " + one + "\n" + two) == ("So: ", calls)
    for text in ("no call", one[:-20], "<tool_call>\n{}", "<tool_call> 5", one.replace("1}", "[}")):
        assert tools.calls_in(text) == (text, [])


def test_calls_between_tags(tools, folder):
    """What the template writes is read; texts become numbers where the tool takes numbers."""
    write_template(folder, TAGGED)
    try:
        tagged = open_tools(folder)
    finally:
        write_template(folder, TEMPLATE)
    tagged.functions.close()
    calls = [
        Call("weather", {"city": "Rome,\n<Lazio>", "days": 2}),
        Call("sleep", {}),
        Call("other", {"days": "2"}),
    ]
    chat = [{"role": "user", "content": "?"}, *messages_of("So: ", calls, ["x"] * 3)]
    rendered = render_chat(chat, tagged.tokenizer.template, [0.0] * 5)
    text = "".join(piece.text for piece in rendered[1])
    _, found = tagged.calls_in(text)
    assert found == calls and text.count("<function=") == 3
    broken = text.replace("\n2\n", "\ntwo\n")
    assert tagged.calls_in(broken) == (broken, []) and tagged.calls_in("none") == ("none", [])


def test_calls_that_are_bare_json(tools, folder):
    """As Llama 3.1 writes them: the answer is a call, or none where anything follows."""
    write_template(folder, TEMPLATE.replace("<tool_call>\n", "").replace("\n</tool_call>", ""))
    try:
        bare = open_tools(folder)
    finally:
        write_template(folder, TEMPLATE)
    bare.functions.close()
    text = json.dumps({"name": "weather", "arguments": {"city": "Rome"}})
    wanted = [Call("weather", {"city": "Rome"})]
    assert bare.calls_in(f" {text}\n") == ("", wanted)
    assert bare.calls_in(f"[{text}]") == ("", wanted)
    for other in ("Rome", f"{text} and more", f"So: {text}", text[:-1]):
        assert bare.calls_in(other) == (other, [])


def test_what_is_appended_are_the_ids_that_the_template_writes(tools):
    """Prompt, answer and what stands behind it are the ids of the whole chat, with one result or two."""
    tokenizer, arguments = tools.tokenizer, {"tools": tools.schemas}
    asked = [{"role": "user", "content": "Rome?"}]
    for n in (1, 2):
        turns = messages_of("So:", [Call("weather", {"city": "Rome"})] * n, ["sunny"] * n)
        whole = encode_prompt([*asked, *turns], tokenizer, ta.ChatConfig(), arguments)
        behind = ids_behind(tokenizer, [*asked, *turns], n, arguments)
        assert whole[-len(behind) :] == behind
        assert whole[-len(behind) - 1] in tokenizer.stop_ids
        told = "\n" + "<|im_start|>tool\nsunny<|im_end|>\n" * n + "<|im_start|>assistant\n"
        assert tokenizer.fast.decode(behind) == told


def script(tools, *texts, finish="stop"):
    """Answers of those texts, each letter a token of its own, as no tokenizer encodes them."""
    made = []
    for text in texts:
        ids = [i for letter in text for i in tools.tokenizer.fast.encode(letter)]
        ids += sorted(tools.tokenizer.stop_ids)[:1] * (finish == "stop")
        made.append(Answer(ids, text, finish, [-0.5] * len(ids)))
    return made


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def talk(tools, first, *later, longest=4000):
    """The first answer and what it is gone on with."""
    record = {"messages": [{"role": "user", "content": "?"}], "tools": tools.schemas}
    asked, coming = [], iter(later)

    def ask(prompts, config, keys):
        asked.extend(zip(prompts, keys, strict=True))
        return [script(tools, next(coming)) for _ in prompts]

    (begun,) = script(tools, first)
    found = Talk(record, [7, 8], (3, 0), begun)
    tools.converse([found], ask, GenerateConfig(longest))
    return found, asked


def test_an_answer_goes_on_behind_its_results(tools):
    """Its ids are kept as they were sampled, and those of the results have no log-probability."""
    first = "I look: " + call("weather", city="Rome")
    found, asked = talk(tools, first, "Sunny.")
    (one,), (two,) = script(tools, first), script(tools, "Sunny.")
    behind = found.ids[len(one.ids) : -len(two.ids)]
    assert found.ids == one.ids + behind + two.ids and found.last == two
    told = "\n<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n"
    assert tools.tokenizer.fast.decode(behind) == told
    assert found.logprobs == one.logprobs + [None] * len(behind) + two.logprobs
    assert asked[0][0] == [7, 8, *one.ids, *behind] and asked[0][1] != 3
    answer, result = found.turns
    assert answer["content"] == "I look:" and result["content"] == "sunny" and not found.failed


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (call("weather", city="Oslo"), "error: raised KeyError: 'Oslo'"),
        (call("weather", town="Rome"), "error: raised TypeError: weather() got an unexpected"),
        (call("_hidden"), "error: raised ValueError: there is no tool _hidden"),
        (call("sleep"), "error: took longer than --reward-seconds 1"),
        (call("weather", city="Rome", days=2), '["sunny", "sunny"]'),
    ],
)
def test_the_model_is_told_what_went_wrong(tools, text, told):
    found, _ = talk(tools, text, "Well.")
    assert found.turns[1]["content"].startswith(told)
    assert found.failed == told.startswith("error") and found.last.text == "Well."


def test_turns_and_tokens_have_a_limit(tools):
    """Three turns at most; a result that does not fit ends the answer, and the last turn is cut."""
    again = call("weather", city="Rome")
    found, asked = talk(tools, again, again, again, "never")
    assert len(asked) == 2 and found.last.text == again and len(found.turns) == 4
    size = len(script(tools, again)[0].ids)
    found, asked = talk(tools, again, longest=size + 5)
    assert not asked and len(found.ids) == size and found.last.finish == "length"
    behind = len(talk(tools, again, "x")[0].ids) - size - 2
    found, _ = talk(tools, again, "abcdef", longest=size + behind + 3)
    assert len(found.ids) == size + behind + 3 and found.last[1:3] == ("abc", "length")
    assert talk(tools, "plain")[0].turns == []


def test_what_a_tool_wrote_is_seen_and_not_learned(tools):
    found, _ = talk(tools, call("weather", city="Rome"), "Sunny.")
    last = Answer([5, 6], "x", "stop", [-1.0, -2.0])
    plain = Talk({}, [7, 8], (3, 1), last)
    answers = [
        {"id": str(k), "tokens": t.ids, "logprobs": t.logprobs, "finish": "stop", "turns": t.turns}
        | {"failed_calls": 0, "parts": {"exact": 1.0}}
        for k, t in enumerate((found, plain))
    ]
    row = {"prompt_tokens": [7, 8], "answers": answers, "rewards": {"0": 1.0, "1": 0.0}, "drawn": 1}
    batch = lay_out_answers(sampled([row]), True)
    own = [token for token, x in zip(found.ids, found.logprobs, strict=True) if x is not None]
    assert batch.targets.tolist() == [*own, 5, 6] and set(found.ids) < set(batch.tokens[0].tolist())
    assert len(token_values(sampled([row]), "logprobs")) == len(own) + 2
    spent = Counter(tokens=9, rollout_seconds=3)
    figures = figures_of([row], spent)
    assert figures["length"] == [((len(own) + 2) / 2, 1)] and figures["tool_calls"] == [(0.5, 1)]
    assert figures["rollout_tokens_per_second"] == [(9, 3)]


def test_a_template_without_calls_in_json_is_refused(door, tmp_path):
    (tmp_path / "tools.py").write_text(FUNCTIONS)
    write_jsonl(tmp_path / "chats.jsonl", practice("train", 8))
    flags = ("--model-path", tiny_folder(), "--data", tmp_path / "chats.jsonl")
    flags += ("--out", tmp_path / "run")
    for more, message in (
        (
            ("--tools", tmp_path / "tools.py"),
            "tools.py: the tokenizer's chat template refuses this chat",
        ),
        (("--tools", tmp_path / "none.py"), "there is no such file"),
        (("--max-turns", 3), "has no effect without --tools"),
    ):
        code, said = door("grpo", *flags, *more)
        assert code == 2 and message in said


@pytest.mark.slow
def test_a_run_with_tools_is_exact_after_a_kill(forked, folder):
    """Half of the answers call; sampler and trainer agree on all that was sampled, before and behind the results."""
    write_jsonl(folder / "train.jsonl", practice("train", 8))
    (folder / "mine.py").write_text(
        "def f(messages, answer, record):\n"
        "    return len(answer) + 9 * (messages[-1]['role'] == 'tool')\n"
    )
    flags = ("--model-path", folder / "model", "--data", folder / "train.jsonl", "--steps", 2)
    flags += ("--tools", folder / "tools.py", "--rewards", f"{folder}/mine.py:f", "--lr", 1e-3)
    flags += ("--batch-size", 2, "--num-answers", 2, "--max-new-tokens", 110, "--save-every", 1)

    def before(then=lambda rank: None):
        def patch(rank):
            import ta.rl.rollouts as module

            real = module.generate

            def calling(model, fast, prompts, config, **more):
                """The same, but that every other first answer is a call with the log-probabilities that the model gives it."""
                answers = real(model, fast, prompts, config, **more)
                ids = [*fast.encode(call("weather", city="Rome")), fast.eos_token_id]
                for prompt, group in zip(prompts, answers, strict=True):
                    mask = np.array([0] * len(prompt) + [1] * len(ids), np.float32)
                    with torch.no_grad():
                        logps = model.logprobs(lay_out([np.array([*prompt, *ids])], [mask]))
                    if len(group) > 1:
                        group[::2] = [Answer(ids, "", "stop", logps.tolist())] * len(group[::2])
                return answers

            module.generate = calling
            then(rank)

        return patch

    def start(name, *more, then=lambda rank: None, **how):
        forked("grpo", *flags, "--out", folder / name, *more, before=before(then), **how)
        return folder / name

    from ta.rl.function_pool import FunctionPool

    whole = start("whole")
    # the schemas, results and rewards of the first step, results of the second
    start("killed", then=die_at((FunctionPool, "run"), 4), code=-signal.SIGKILL)
    killed = start("killed", "--resume")
    assert story(killed) == story(whole) and rollouts(killed) == rollouts(whole)
    for made in rollouts(whole):
        for row in made:
            called = [bool(answer["turns"]) for answer in row["answers"]]
            assert called == [True, False]
            assert row["answers"][0]["logprobs"].count(None) > 9
    steps = [json.loads(line) for line in open(whole / "metrics.jsonl")]
    for row in (row for row in steps if "loss" in row):
        assert row["mismatch"] < 1e-5 and row["tool_calls"] == 0.5 and row["failed_calls"] == 0
