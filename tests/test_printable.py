"""Text of data, names of files, answers, templates: wherever it reaches a person it moves no cursor, hides and reorders no letters, and is not endless; secrets stay out of what is kept."""

import ast
import json
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import judged
import pytest
from PIL import Image
from test_structure import MODULES, RECIPES, ROOT

from ta.builtin import models, tasks
from ta.chat.render import Tokens, show, spans
from ta.command_line import guard
from ta.parallel import say, tell
from ta.printable import masked, one_line, printable
from ta.screen import COLOUR, progress, table
from ta.training.report import page

# clears the screen, names the window, rings, goes back, overwrites; reorders; hides; C1; tags
SIGNS = "\x1b[2J\x1b]0;t\x07\x08\r\x7f\x9b31m\u202e\u2066\u200f\u061c\u200b\u00ad\ufeff\U000e0041"
HOSTILE = f"<b>A{SIGNS}Z" + "long" * 5000
# what an operating system takes as a name
NAME = "n\x1b[31m\u202ee\x07\x9b" + "m" * 20


def harmless(text, longest=6000):
    """Nothing of SIGNS is left but what says what was there, and no line is endless."""
    text = COLOUR.sub("", text)  # our own colours
    bad = {c for c in text if c not in "\n\t" and not c.isprintable()}
    assert not bad, bad
    assert max(map(len, text.split("\n"))) <= longest
    return text


def test_printable_by_hand():
    assert (
        printable("a\tb\nc é 日本 عربي 👩\u200d👧 \u3000x")
        == "a\tb\nc é 日本 عربي 👩\u200d👧 \u3000x"
    )
    assert printable("\x1b[2J\u202e\x9b\r\ud800") == r"\x1b[2J\u202e\x9b\r\ud800"
    assert printable("abcdefgh", 4) == "ab…gh" and printable("abcd", 4) == "abcd"
    assert one_line("a\nb\x00\n") == r"a b\x00 "
    assert all(c in SIGNS[:0] or len(printable(c)) > 1 for c in SIGNS if not c.isprintable())


def test_every_way_to_the_screen(capsys, monkeypatch):
    say(HOSTILE), tell(HOSTILE)
    assert guard(lambda: (_ for _ in ()).throw(ValueError(HOSTILE + "\n" + HOSTILE))) == 2
    assert guard(lambda: open(f"/nowhere/{NAME}")) == 2
    progress(1, HOSTILE, "x").close()
    for tty in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda tty=tty: tty, raising=False)
        print(show(spans(Tokens([1, 2], [0.0, 1.0]), lambda ids: HOSTILE)))
    print(table([(HOSTILE, 1), ("x", HOSTILE)], (HOSTILE, NAME)))
    chat = judged.recipe("chat")
    printer = chat.Printer(None)
    for end in (3, 9, len(HOSTILE)):
        printer.end(HOSTILE[:end], "")
    captured = capsys.readouterr()
    harmless(captured.err, longest=41_000), harmless(captured.out, longest=41_000)
    assert captured.err.count("error: ") == 2
    lines = [line for line in captured.err.split("\n") if line.startswith("error: ")]
    assert all(len(line) < 2500 for line in lines) and r"A\x1b[2J" in lines[0]


def test_nothing_is_printed_on_another_way():
    """A call of print stands in few functions; each of them is tested above or prints our own text."""
    known = {
        "ta.parallel:tell",
        "ta.command_line:_say",
        "ta.command_line:cli",
        "ta.command_line:run",  # the same, in cli
        "recipes.chat:end",
        "recipes.chat:main",  # the names of its commands
        "recipes.chat:obey",
        "recipes.inspect_data:main",
        "recipes.evaluate:main",  # a table, which is printable
        "ta.data.prepare:preview",  # spans of text, which are printable
    }
    found = set()
    paths = {**MODULES, **{f"recipes.{path.stem}": path for path in RECIPES}}
    for name, path in paths.items():
        for function in ast.walk(ast.parse(path.read_text())):
            for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
                called = getattr(node, "func", None)
                if isinstance(called, ast.Name) and called.id == "print":
                    found.add(f"{name}:{function.name}")
    assert {name for name in found if not name.startswith("ta.__main__")} == known


class Page(HTMLParser):
    """What a page could run or load, its text, and what would be markup of data."""

    def __init__(self, text):
        super().__init__()
        self.bad, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.bad += [tag] * (
            tag in ("script", "link", "img", "iframe", "object", "base", "b2", "a")
        )
        for name, value in attributes:
            external = name in ("src", "href", "srcset", "action", "data", "style", "http-equiv")
            policy = tag == "meta" and value == "Content-Security-Policy"
            self.bad += [name] * (name.startswith("on") or (external and not policy))

    def handle_data(self, data):
        self.text.append(data)


ATTACKS = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)><a href='javascript:alert(1)'>",
    "'><svg/onload=alert(1)>",
    "</title><script>alert(1)</script>",
    "</style><iframe src=//evil></iframe>",
    "&lt;script&gt;",
    "]]><!--",
    HOSTILE,
    "\ud800",
]


def hostile_page():
    """A report whose every part is hostile."""
    metrics, samples = [], []
    for i, attack in enumerate(ATTACKS):
        metrics += [{"step": i, f"val_{attack}": 1.0, attack: 2.0, "loss": 1.0, "seconds": 1}]
        part = {"type": "image", "content": attack}
        chat = [{"role": attack, "content": [part, part | {"type": attack}], "tool_calls": attack}]
        sample = {"id": attack, "prompt": attack, attack: attack, "reference": [attack]}
        answers = (attack, f"{attack} {attack}")
        samples += [
            sample | {"step": step, "answer": answer} | ({"chat": chat} if i % 2 else {})
            for step, answer in zip((0, 9), answers, strict=True)
        ]
    inner = {attack: attack for attack in ATTACKS} | {"list": ATTACKS, "deep": {"a": ATTACKS}}
    settings = {
        "command": " ".join(ATTACKS),
        "config": dict.fromkeys(ATTACKS, inner) | inner,
        "identity": {**inner, "steps": 9},
        "machine": inner,
        "versions": inner,
        "pictures": ATTACKS[0],
        "records": {
            **dict.fromkeys(("records", "tokens", "learned_tokens"), 1),
            "sources": [{"source": " ".join(ATTACKS), "used": 1, "records": 1}],
            "lengths": {"50 %": 1},
            "drops": {attack: {"count": 1, "first": ATTACKS} for attack in ATTACKS},
        },
    }
    return page(" ".join(ATTACKS), settings, metrics, samples)


def test_a_report_of_hostile_text_runs_loads_and_moves_nothing():
    text = hostile_page()
    parsed = Page(text)
    assert not parsed.bad and "default-src 'none'" in text
    harmless("".join(parsed.text), longest=400_000)
    assert "<script>alert(1)</script>" in "".join(parsed.text)  # it is shown as it is
    text.encode()


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


@pytest.mark.browser
@pytest.mark.skipif(not BROWSER, reason="no chromium here")
def test_a_report_of_hostile_text_runs_nothing_in_a_browser(tmp_path, monkeypatch):
    playwright = pytest.importorskip("playwright.sync_api")
    run = "document.body.setAttribute(`data-ran`, 1)"
    attacks = [attack.replace("alert(1)", run) for attack in ATTACKS[:-1]]
    (tmp_path / "plain.html").write_text(f"<body><p>here</p><img src=x onerror='{run}'></body>")
    monkeypatch.setattr(sys.modules[__name__], "ATTACKS", attacks)
    (tmp_path / "report.html").write_text(hostile_page())
    found, asked = {}, []
    flags = ["--no-sandbox", "--no-zygote", "--single-process"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=flags)
        for name in ("plain", "report"):
            page = browser.new_page()
            page.on("request", lambda request: asked.append(request.url))
            page.goto((tmp_path / f"{name}.html").as_uri())
            page.wait_for_timeout(300)
            found[name] = page.evaluate(
                "[document.body.hasAttribute('data-ran'), document.scripts.length,"
                " document.querySelectorAll('img, iframe, a, object').length,"
                " document.querySelectorAll('section').length]"
            )
        browser.close()
    assert found["plain"][0]  # what runs is seen
    assert found["report"][:3] == [False, 0, 0] and found["report"][3] > 2
    assert [url.rpartition("/")[2] for url in asked] == ["plain.html", "x", "report.html"]


@pytest.fixture
def hostile_files(tmp_path):
    """Chats, passages, pictures in files of hostile names, with hostile content."""
    folder = tmp_path / NAME
    folder.mkdir()
    chats = [
        {
            "id": HOSTILE if i else i,
            "messages": [
                {"role": "user", "content": f"{i} {HOSTILE[:300]}"},
                {"role": "assistant", "content": HOSTILE[:200]},
            ],
        }
        for i in range(6)
    ]
    tasks.write_jsonl(folder / "chats.jsonl", chats)
    bad = [{"messages": [{"role": HOSTILE, "content": "x"}]}, {"messages": HOSTILE}, {HOSTILE: 1}]
    tasks.write_jsonl(folder / "bad.jsonl", [*chats, *bad])
    tasks.write_jsonl(folder / "passages.jsonl", [{"id": HOSTILE, "text": "a"}] * 2)
    (folder / "root").mkdir()
    (folder / "root" / f"{NAME}.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(folder / "root" / "good.png")
    return folder


def test_commands_over_hostile_files(door, hostile_files, capsys):
    """Previews, samples, drops and errors of whole commands."""
    chats, bad = hostile_files / "chats.jsonl", hostile_files / "bad.jsonl"
    tiny = ("--steps", 1, "--batch-size", 2, "--sample-max-new-tokens", 3)
    skip = ("--on-bad-record", "skip", "--max-bad-share", 1)
    for code, recipe, *flags in (
        (0, "sft", "--data", chats, "--val-data", chats, *tiny, "--out", hostile_files / "run"),
        (2, "sft", "--data", chats, *tiny, "--out", hostile_files / "run"),
        (0, "sft", "--data", bad, *skip, *tiny, "--out", hostile_files / "run2"),
        (2, "sft", "--data", bad, *tiny, "--out", hostile_files / "run3"),
        (2, "sft", "--data", hostile_files / NAME, "--out", hostile_files / "run3"),
        (2, "sft", "--data", chats, "--role-tags", f"user={SIGNS}", "--system-prompt", HOSTILE),
        (2, "sft", "--model-path", hostile_files, "--data", chats),
        (0, "inspect_data", "--data", bad, *skip),
        (0, "inspect_data", "--data", bad, *skip, "--json"),
        (2, "inspect_data", "--data", bad),
        (2, "build_index", "--passages", hostile_files / "passages.jsonl", "--out", hostile_files / "i"),
        (2, "generate", "--data", bad, "--out", hostile_files / "a"),
        (2, "generate", "--data", chats, "--out", hostile_files / "b", "--settings", NAME),
        (2, "score", "--data", chats, "--model-path", hostile_files / NAME),
        (2, "merge", "--model-path", hostile_files, "--out", hostile_files / "m"),
        (2, "preprocess_images", "--root", hostile_files / "root", "--workers", 0, "--out", hostile_files / "c"),
        (0, "preprocess_images", "--root", hostile_files / "root", "--workers", 0, "--out", hostile_files / "c", "--on-bad-file", "skip"),
    ):  # fmt: skip
        got, said = door(recipe, *flags)
        # bars of other libraries go back to the beginning of their line
        harmless(
            said.replace("\rLoading weights", "\nLoading weights").replace("\r", "\n")
            if got == 0
            else said.split("\n")[-2]
        )
        assert got == code, (recipe, flags, said[-2000:])
        harmless(capsys.readouterr().out)
    parsed = Page((hostile_files / "run" / "report.html").read_text())
    assert not parsed.bad
    harmless("".join(parsed.text), longest=400_000)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{%- macro f() -%}{{ f() }}{%- endmacro -%}{{ f() }}",
        "{{ messages.nothing.at.all }}",
        "{{ 'x' + 1 }}",
        "{{ raise_exception('" + r"\x1b[2J\u202e" + "' * 900) }}",
        "{% for x in %}",
        "{{ range(999999999) | list }}",
        "{{ messages[99]['content'] }}",
        "{% include 'other' %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages | map('nothing') | list }}",
        "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
        "{{ 2 ** 99999 ** 9 }}" if False else "{{ 'a' | int(1, 99) / 0 }}",
    ],
)
def test_a_template_that_fails_is_one_line(door, tmp_path, template):
    models.write_tiny(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    path = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != "chat_template"}))
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tasks.write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat}])
    for recipe in ("inspect_data", "generate"):
        more = ("--out", tmp_path / "a.jsonl") if recipe == "generate" else ()
        code, said = door(
            recipe, "--model-path", tmp_path / "model", "--data", tmp_path / "chats.jsonl", *more
        )
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
        harmless(said, longest=2500)


def test_secrets_are_masked_by_name():
    assert masked(["token=abc", "hf_token=a", "API_KEY=b", "password=", "revision=main"]) == [
        "token=***", "hf_token=***", "API_KEY=***", "password=", "revision=main"
    ]  # fmt: skip
    assert masked({"my_secret": "x", "pad_token": "<pad>", "max_tokens": 7, "a": {"key": "k"}}) == {
        "my_secret": "***", "pad_token": "<pad>", "max_tokens": 7, "a": {"key": "***"}
    }  # fmt: skip
    assert masked(["ta", "--access-token", "abc", "--pad-token", "<p>", "--api-key=z", "x"]) == [
        "ta", "--access-token", "***", "--pad-token", "<p>", "--api-key=***", "x"
    ]  # fmt: skip
    assert masked("https://me:pw@host/x?y=1") == "https://me:***@host/x?y=1"
    assert masked([("--init-tokens", "<key>=a"), None, 1.5]) == [
        ["--init-tokens", "<key>=a"],
        None,
        1.5,
    ]


def test_a_secret_of_a_flag_is_in_no_file_of_a_run(door, tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tasks.write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat}] * 4)
    flags = ("--data", tmp_path / "chats.jsonl", "--steps", 1, "--out", tmp_path / "run")
    code, said = door("sft", *flags, "--model-args", "token=hf_VERYSECRET", "revision=main")
    assert code == 0, said
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(b"VERYSECRET" in path.read_bytes() for path in files)
    assert (
        "VERYSECRET" not in said and "token=***" in (tmp_path / "run" / "config.json").read_text()
    )
    code, said = door("sft", *flags, "--resume", "--model-args", "token=other", "revision=main")
    assert code == 0, said  # a new secret is no other setting


def test_code_that_came_with_a_model_needs_the_users_word(tmp_path):
    chat = judged.recipe("chat")
    (tmp_path / "final").mkdir()
    for trained, word in (
        ({"config": {"model": {"trust_remote_code": True}}}, "add --trust-remote-code"),
        ({"config": [1]}, "does not hold the settings of a run"),
        ([], "does not hold the settings of a run"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(trained))
        with pytest.raises(ValueError, match=word):
            chat.of_run(chat.Config(run=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"config": {"model": {"trust_remote_code": false}}}')
    assert not chat.of_run(chat.Config(run=str(tmp_path))).model.trust_remote_code


def test_every_loader_reads_tensors_alone():
    """torch.load only with weights_only, numpy without pickles, transformers' weights only from safetensors."""
    for path in [*MODULES.values(), *RECIPES]:
        tree = ast.parse(path.read_text())
        small = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and function.name.endswith("_config")
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            if (
                id(node) in small
                or not isinstance(node, ast.Call)
                or not isinstance(node.func, ast.Attribute)
            ):
                continue
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            where = f"{Path(path).relative_to(ROOT)}:{node.lineno}"
            name, owner = node.func.attr, ast.unparse(node.func.value)
            if name == "load" and owner == "torch":
                assert given.get("weights_only") == "True", where
            if name == "load" and owner in ("np", "numpy"):
                assert given.get("allow_pickle", "False") == "False", where
            reads = name in ("load", "loads", "Unpickler", "open")
            assert not reads or owner not in ("pickle", "dill", "joblib", "marshal", "shelve"), (
                where
            )
            # ours is looked at where it stands
            others = ("Config", "Tokenizer", "Extractor", "config_class", "ta.model.load")
            if name == "from_pretrained" and not any(word in owner for word in others):
                assert given.get("use_safetensors") == "True", where
