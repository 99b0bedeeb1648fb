"""Several turns: templates as folders bring them, a cache that is kept, a context that fills up, and keys that are pressed."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.engine.tiny import save_tiny

from haversack.errors import DoesNotFitError, PlanError, UsageError
from haversack.jobs.chat import Chat

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
REWRITES = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] == 'user' else 'said' }}")
"""A template that rewrites what the assistant said, as those do that drop earlier reasoning."""

CONTEXT = 160


def save_chat_tokenizer(folder: Path, template: str | None = CHATML, *, file: str | None = None) -> None:
    """Characters, and the two control tokens of ChatML, in a vocabulary of 72."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz .,:;!?'-()\nABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    words = [*letters, "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    fast.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None and file == "chat_template.jinja":
        (folder / file).write_text(template)
    elif template is not None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))


@pytest.fixture(scope="module")
def _chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("saved") / "tiny-chat")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][[0, 1, 2, *range(67, 72)]] = 0  # only characters win, so that answers are words
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_chat_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def _packed_chat(_chat_model: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything at 16 bits, so that greedy answers are the unpacked model's."""
    from haversack.cli.app import run

    folder = tmp_path_factory.mktemp("packed") / "chat"
    lengths = ("--prompt-tokens", str(CONTEXT - 20), "--generate-tokens", "20")
    assert run(["pack", str(_chat_model), "-o", str(folder), "--tensor-budget", "1GiB", *lengths]) == 0
    return folder


@pytest.fixture
def chat_folder(_packed_chat: Path, tmp_path: Path) -> Path:
    import shutil

    return shutil.copytree(_packed_chat, tmp_path / "chat")


def begun(folder: Path, **options) -> Chat:
    return Chat(folder, **{"max_new_tokens": 12, **options})


def test_later_turns_read_only_what_is_new_and_say_the_same(chat_folder):
    """Answers over a kept cache are those of a fresh conversation that reads everything."""
    chat = begun(chat_folder, system="be kind")
    first = chat.say("hello")
    second = chat.say("and again")
    assert first["read_tokens"] == first["prompt_tokens"]
    held = first["prompt_tokens"] + first["new_tokens"] - 1
    assert second["read_tokens"] == second["prompt_tokens"] - held > 0
    other = begun(chat_folder, system="be kind")
    other.turns = chat.turns[:1]
    fresh = other.say("and again")
    assert fresh["read_tokens"] == fresh["prompt_tokens"] == second["prompt_tokens"]
    assert fresh["text"] == second["text"] and second["text"]


def test_the_template_is_rendered_as_the_tokenizer_does(chat_folder):
    from transformers import AutoTokenizer

    chat = begun(chat_folder, system="be kind")
    chat.turns = [("hello", "yes")]
    messages = [
        {"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and"},
    ]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat._ids("and") == list(expected)
    assert chat._ends.tokens >= {2, 68}  # </s> by the config, <|im_end|> by the template


def test_a_template_that_rewrites_history_is_read_again_from_there(chat_folder):
    save_chat_tokenizer(chat_folder, REWRITES, file="chat_template.jinja")
    chat = begun(chat_folder)
    first = chat.say("hello")
    second = chat.say("and again")
    # all up to the rewritten answer is kept: the first prompt, of which the last token may be the first that differs
    assert second["prompt_tokens"] - second["read_tokens"] >= first["prompt_tokens"]
    other = begun(chat_folder)
    other.turns = chat.turns[:1]
    assert other.say("and again")["text"] == second["text"]


def test_a_cache_that_cannot_go_back_begins_again(chat_folder):
    """Keys and values that were packed since can't be taken back: the conversation is read anew, and says the same."""
    from haversack.engine.sequence import PlannedSequence
    from haversack.parts.kv.base import KVOption
    from haversack.parts.kv.quantized import QuantizedKV

    save_chat_tokenizer(chat_folder, REWRITES)

    def packing() -> Chat:
        chat = begun(chat_folder, max_new_tokens=30)
        plan = chat.model.haversack.kv_plan
        packed = KVOption(represent=QuantizedKV(4, 4, group_size=32, recent_tokens=0))
        chat.sequence = PlannedSequence(chat.model, replace(plan, options=(packed,) * len(plan.sites)))
        return chat

    chat = packing()
    chat.say("hello " * 5)
    second = chat.say("and again")
    assert second["read_tokens"] == second["prompt_tokens"] and not second["forgotten_turns"]
    other = packing()
    other.turns = chat.turns[:1]
    assert other.say("and again")["text"] == second["text"]


def test_a_full_context_forgets_the_oldest_turns_and_says_so(chat_folder):
    chat = begun(chat_folder, system="be kind")
    told: list[int] = []
    results = [chat.say(f"message {'abcdef'[n]}", on_forget=told.append) for n in range(6)]
    forgotten = [result["forgotten_turns"] for result in results]
    assert told == [n for n in forgotten if n] and sum(forgotten) + len(chat.turns) == 6 and told
    assert all(result["prompt_tokens"] + result["new_tokens"] <= CONTEXT for result in results)
    assert chat.turns[-1][0] == "message f"
    at = forgotten.index(told[0])
    assert results[at]["prompt_tokens"] <= CONTEXT // 2 + len("message f") + 40  # half is free again
    with pytest.raises(DoesNotFitError, match="the message makes"):
        chat.say("x" * CONTEXT)
    assert chat.say("short")["new_tokens"] > 0


def test_an_answer_is_cut_where_the_context_ends(chat_folder):
    chat = begun(chat_folder, max_new_tokens=None, choice=None)
    chat._ends = type(chat._ends)()  # nothing but the context ends it
    result = chat.say("hello")
    assert result["finish"] == "context" and result["prompt_tokens"] + result["new_tokens"] == CONTEXT


def test_reset_forgets(chat_folder):
    chat = begun(chat_folder)
    first = chat.say("hello")
    chat.say("more")
    chat.reset()
    again = chat.say("hello")
    assert again["prompt_tokens"] == first["prompt_tokens"] and again["text"] == first["text"]


def test_ctrl_c_ends_the_answer_and_not_the_chat(chat_folder):
    chat = begun(chat_folder, max_new_tokens=None)
    chat._ends = type(chat._ends)()
    pieces: list[str] = []

    def press(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    result = chat.say("hello", press)
    assert result["finish"] == "interrupted" and result["text"] == "".join(pieces) == chat.turns[0][1]
    assert result["new_tokens"] < 20
    other = begun(chat_folder)
    other.turns = chat.turns[:]
    chat.max_new_tokens, chat._ends = other.max_new_tokens, other._ends
    assert chat.say("go on")["text"] == other.say("go on")["text"]


@pytest.mark.parametrize(
    ("template", "error", "words"),
    [
        ("{% for %}", PlanError, "template can't be used"),
        ("{{ messages[9]['content']['x']['y'] }}", PlanError, "template can't be used"),
        ("{{ raise_exception('only on sundays') }}", PlanError, "only on sundays"),
    ],
)
def test_a_template_that_cannot_be_used_is_told(chat_folder, template, error, words):
    save_chat_tokenizer(chat_folder, template)
    with pytest.raises(error, match=words):
        begun(chat_folder)


def test_a_system_message_that_the_template_refuses(chat_folder, cli):
    save_chat_tokenizer(chat_folder, NO_SYSTEM)
    with pytest.raises(UsageError, match=r"no system here.*leave --system out"):
        begun(chat_folder, system="be kind")
    assert begun(chat_folder).say("hello")["new_tokens"] > 0


def test_without_a_template_turns_are_plain_and_that_is_said(chat_folder):
    save_chat_tokenizer(chat_folder, None)
    chat = begun(chat_folder, system="be kind")
    assert "no chat template" in chat.notes[0]
    chat.turns = [("hello", " yes")]
    written = chat.tokenizer.decode(chat._ids("more"))
    assert written.replace(" ", "") == "bekind\n\nUser:hello\nAssistant:yes\nUser:more\nAssistant:".replace(" ", "")
    assert chat._ends.strings == ("\nUser:",)


def chat_through_pipe(cli, monkeypatch, text: str, *arguments: object):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return cli("run", *arguments, "--chat", "--max-new-tokens", "6")


def test_a_pipe_is_a_turn_per_line(cli, monkeypatch, chat_folder):
    fenced = '"""one\ntwo"""\n'
    ran = chat_through_pipe(cli, monkeypatch, f"hello\n\n/reset\n/sing\n{fenced}/exit\nnever", chat_folder, "--json")
    turns = [json.loads(line) for line in ran.out.splitlines()]
    assert ran.code == 0 and len(turns) == 2 and "/sing is no command" in ran.err
    assert set(turns[0]) == {
        "text", "finish", "prompt_tokens", "read_tokens", "new_tokens", "forgotten_turns", "context_tokens",
        "seconds_to_first_token", "tokens_per_second", "sampling", "peak_private_bytes", "cap_bytes",
    }  # fmt: skip
    assert turns[1]["prompt_tokens"] == turns[0]["prompt_tokens"] + len("one\ntwo") - len("hello")  # forgotten between
    plain = chat_through_pipe(cli, monkeypatch, "hello\n", chat_folder)
    assert plain.out == turns[0]["text"] + "\n" and plain.err == ""


def test_a_pipe_stops_at_a_message_that_does_not_fit(cli, monkeypatch, chat_folder):
    ran = chat_through_pipe(cli, monkeypatch, "x" * 500 + "\nhello\n", chat_folder)
    ran.refuses("the message makes", "--context", code=1)


def test_options_that_contradict(cli, chat_folder, tmp_path):
    cli("run", chat_folder, "--chat", "--prompt", "x").refuses("--chat", "--prompt")
    cli("run", chat_folder, "--system", "x", "--prompt", "x").refuses("--system", "--chat")
    cli("run", tmp_path / "nowhere", "--chat").refuses("no folder", code=1)
    for option, value in [("--temperature", "-1"), ("--top-p", "0"), ("--top-k", "0"), ("--seed", "-1")]:
        cli("run", chat_folder, "--prompt", "x", option, value).refuses(f"{option} is {value}")


def _begin_terminal_session() -> None:
    """What a login does: standard input is the session's terminal, and Ctrl-C is heard, which jobs in the background ignore."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_on_a_terminal(chat_folder):
    """A message, Ctrl-C in the answer, another message, Ctrl-C at the prompt, Ctrl-D."""
    config = json.loads((chat_folder / "generation_config.json").read_text())
    (chat_folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [71]}))
    (chat_folder / "tokenizer_config.json").write_text(
        (chat_folder / "tokenizer_config.json").read_text().replace("<|im_end|>\\n", "\\n")
    )
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "haversack", "run", str(chat_folder), "--chat"]
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=_begin_terminal_session,
        env={**os.environ, "NO_COLOR": "1", "TERM": "dumb", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    os.close(terminal)
    seen = ""

    def wait_for(words: str, key: bytes = b"") -> None:
        """Read until `words` came, or, for none, until anything did; `key` is pressed again each second until then.

        A signal between readline's prompt and its wait for a key is only heard with the next key: a hand is never
        that fast, a test is.
        """
        nonlocal seen
        deadline = time.monotonic() + 120
        while words not in seen or not seen.strip():
            assert time.monotonic() < deadline and process.poll() is None, seen
            if select.select([main], [], [], 1)[0]:
                seen += os.read(main, 4096).decode(errors="replace")
            else:
                os.write(main, key)
        seen = seen[seen.index(words) + len(words) :]

    try:
        wait_for(">>> ")
        os.write(main, b"hello\n")
        wait_for("hello")  # the terminal's echo
        wait_for("")  # the answer has begun
        os.write(main, b"\x03")
        wait_for("tokens read")
        wait_for(">>> ")
        os.write(main, b"\x03")
        wait_for("Ctrl-D leaves", key=b"\x03")
        wait_for(">>> ")
        os.write(main, b"/help\n")
        wait_for("/reset")
        wait_for(">>> ")
        os.write(main, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(main)
