"""generate.py: what it prints and writes for each of its flags, with one small trained model."""

import csv
import io
import json
import os
import pty
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Result, forked
from user_errors import Case, Harmful, assert_user_error

from lit_gpt.cli.generate import main as generate_main
from lit_gpt.cli.text_writer import JsonLines, describe_logprobs
from lit_gpt.errors import UserError
from lit_gpt.inference.texts import GeneratedText
from lit_gpt.lines import display_width
from lit_gpt.tokenizer import ByteTokenizer

ROWS = [(f"题{number}", f"第{number}行\n" + "床前" * (number % 4)) for number in range(40)]
FLAGS = [
    *("--data.tokenizer", "char", "--data.eval_windows", "2", "--trainer.max_steps", "30", "--trainer.accelerator"),
    *("cpu", "--generate.prompts", "[]", "--trainer.val_check_interval", "30", "--model.learning_rate", "1e-2"),
    *("--model.config.d_model", "16", "--model.config.context_length", "16", "--trainer.precision", "32-true"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a working folder with the runs `poems`, of a table with a template, and `text`, in raw mode."""
    folder = tmp_path_factory.mktemp("trained")
    with open(folder / "t.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("title", "text"), *ROWS])
    (folder / "text.txt").write_text("\n".join(text for _, text in ROWS * 3), encoding="utf-8")
    (folder / "default.yaml").write_text("{}")
    configs = ["--config", "default.yaml", *FLAGS]
    table = ["--data.files", "t.csv", "--data.template", r"{title}\n{text}"]
    for flags in (["--name", "text", "--data.files", "text.txt", "--data.mode", "raw"], ["--name", "poems", *table]):
        result = forked(folder, *configs, *flags)
        assert result.status == 0, result.err
    return folder


Generate = Callable[..., Result]


@pytest.fixture
def generate(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Generate:
    """Return a function that runs generate.py with `poems` in this process, with weights in float32."""
    monkeypatch.chdir(trained)
    monkeypatch.setattr("lit_gpt.cli.text_writer.prepare_for_inference", lambda model: model)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def run(*words: object, name: str = "poems", tokens: int = 12) -> Result:
        status = generate_main(["--name", name, "--max_new_tokens", str(tokens), *map(str, words)])
        printed = capsys.readouterr()
        return Result(status, printed.out, printed.err)

    return run


def objects(lines: str) -> list[dict]:
    return [json.loads(line) for line in lines.splitlines()]


CHECKPOINT = "[logs/poems/version_0/best.ckpt]\n"


def test_one_text_stands_alone_and_several_are_numbered(generate: Generate) -> None:
    one = generate("题7")
    assert one.err == CHECKPOINT
    assert one.out.startswith("题7")
    assert "---" not in one.out
    three = generate("--prompt", "题7", "--num_samples", "3")
    parts = re.split(r"--- sample (\d) of 3 ---\n", three.out)
    assert parts[:3] == ["", "1", one.out]
    assert parts[3::2] == ["2", "3"]
    alone = generate("题7", "--seed", 1339)
    assert alone.out == parts[6]


@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "pipe"])
def test_terminal_and_pipe_get_the_same_texts(
    generate: Generate, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    expected = generate("题7", "题", "--num_samples", "4")
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    assert generate("题7", "--num_samples", "4", "题", "--batch_size", "3") == expected


def test_prompts_are_read_as_templates_are_and_from_files(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf" + "题5\r\n第".encode())
    printed = generate(r"题5\n第", "FILE:~/p.txt", tokens=1).out
    parts = re.split(r"--- sample \d of 2 ---\n", printed)
    assert parts[1] == parts[2]
    assert parts[1].startswith("题5\n第")
    assert_user_error(generate(r"题5\\n"), "character '\\\\' (U+005C) is not among")


def test_prompt_after_two_dashes_may_look_like_a_flag(generate: Generate) -> None:
    assert_user_error(generate("--", "--name"), "character '-' (U+002D) is not among")
    assert generate("题", "--", "第") == generate("题", "第")


def test_prompt_longer_than_the_context_is_said_to_be_cropped(generate: Generate) -> None:
    result = generate("题" * 16)
    assert result.err == f"{CHECKPOINT}the prompt has 17 tokens: the model reads the last 16 of them, its context\n"
    assert generate("题" * 15).err == CHECKPOINT


def test_given_begins_as_a_training_row(generate: Generate) -> None:
    assert generate("--given", "title=题7") == generate(r"题7\n")
    assert generate("--given", r"title=题\n7") == generate(r"题\n7\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--given", "text=床"], "a document is title, text in this order, and title is not given: give title too"),
        (["--given", "titel=床"], "'titel' is no column of the training documents; they have title, text (did you"),
        (["--given", "title=龘"], "character '龘'"),
        (["--name", "text", "--given", "title=床"], "was trained on neither: give the beginning of a text as a prompt"),
        (["--name", "text", "--novel"], "was trained with --data.mode raw: leave it out"),
        (["--jsonl", "t.csv"], "--jsonl t.csv exists: give the name of a new file"),
        (["--jsonl", "."], "--jsonl . is a folder: give the name of a new file"),
        (["--jsonl", "no/x.jsonl"], "--jsonl no/x.jsonl cannot be written (there is no folder no): give another path"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistake_with_a_model_is_one_line(generate: Generate, words: list[str], message: str) -> None:
    result = generate(*words)
    assert_user_error(Result(result.status, result.out, result.err.replace(CHECKPOINT, "")), message)


def test_novel_leaves_out_training_rows(generate: Generate) -> None:
    words = ["题1", "--jsonl", "-", "--temperature", "3"]
    rows = [f"{title}\n{text}" for title, text in ROWS[:36]]  # the last tenth validates

    def is_row(text: dict) -> bool:
        known = rows if text["finish_reason"] == "stop" else [row[: len(text["text"])] for row in rows]
        return text["text"] in known

    drawn = objects(generate(*words, "--num_samples", 100, tokens=1).out)
    novel = [text for text in drawn if not is_row(text)][:10]
    left_out = sum(is_row(text) for text in drawn[: drawn.index(novel[-1])])
    assert left_out > 3
    result = generate(*words, "--num_samples", 10, "--novel", tokens=1)
    assert objects(result.out) == [{**text, "number": number} for number, text in enumerate(novel, start=1)]
    assert result.err == f"{CHECKPOINT}left out    training rows: {left_out} of {left_out + 10} texts\n"
    result = generate("题", "--temperature", 0, "--num_samples", 2, "--novel", tokens=1)
    assert result.out == ""
    assert "left out    training rows: 20 of 20 texts" in result.err
    assert "warning     2 missing: 10 tries for each" in result.err


def test_novel_says_nothing_of_a_file_without_texts(generate: Generate) -> None:
    result = generate("题", "--temperature", 0, "--novel", "--jsonl", "none.jsonl", tokens=1)
    assert "wrote" not in result.err
    assert not Path("none.jsonl").exists()


def test_novel_needs_the_training_text(generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Path("t.csv").read_bytes()
    (tmp_path / "logs").symlink_to(Path("logs").absolute())
    monkeypatch.chdir(tmp_path)
    remedy = "run in the folder of the training, or leave out --novel"
    assert_user_error(generate("--novel"), f"--novel: t.csv: no such file: {remedy}")
    Path("t.csv").write_bytes(table.replace("第1行".encode(), "第0行".encode()))
    assert_user_error(generate("--novel"), "--novel: t.csv is not the text on which logs/poems/version_0/best.ckpt was")
    assert not Path("data").exists()


def test_jsonl_has_an_object_for_each_text(generate: Generate) -> None:
    result = generate("题7", "题", "--num_samples", 3, "--logprobs", "--jsonl", "new.jsonl")
    assert (result.out, result.err) == ("", f"{CHECKPOINT}wrote       new.jsonl, 6 texts\n")
    lines = objects(Path("new.jsonl").read_text(encoding="utf-8"))
    assert lines == objects(generate("题7", "题", "--num_samples", 3, "--logprobs", "--jsonl", "-").out)
    printed = re.split(r"--- sample \d of 6 ---\n", generate("题7", "题", "--num_samples", 3).out)[1:]
    for number, (text, shown) in enumerate(zip(lines, printed, strict=True)):
        assert text["number"] == number + 1
        assert text["prompt"] == ("题7" if number < 3 else "题")
        assert text["seed"] == 1337 + number % 3
        assert f"{text['text']}\n" == shown
        assert text["checkpoint"] == "logs/poems/version_0/best.ckpt"
        assert len(text["tokens"]) == len(text["logprobs"])
        assert (text["finish_reason"] == "length") == (len(text["text"]) == len(text["prompt"]) + 12)


def test_closed_stdout_is_no_error(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    assert generate("题7").status == 0
    result = generate("题7", "--jsonl", "closed.jsonl")
    assert result.err == f"{CHECKPOINT}wrote       closed.jsonl, 1 text\n"


def test_encoding_of_stdout_that_lacks_characters_is_said(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, lacks in [("ascii", True), ("gbk", False)]:
        stdout = io.TextIOWrapper(io.BytesIO(), encoding, errors="replace")
        monkeypatch.setattr("sys.stdout", stdout)
        result = generate("题7", "--num_samples", 2)
        assert (f"warning     stdout is {encoding}, which lacks" in result.err) == lacks
        assert (b"?7" in stdout.buffer.getvalue()) == lacks  # type: ignore[attr-defined]


def test_jsonl_keeps_whole_lines_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    with pytest.raises(KeyboardInterrupt), JsonLines(path):
        raise KeyboardInterrupt
    assert not path.exists()
    with JsonLines(path) as file:
        file.write({"a": "静\u2028"})
        real = file._file
        # a disk that takes three more bytes
        file._file = SimpleNamespace(  # type: ignore[assignment]
            write=lambda data: real.write(data[:3]), truncate=real.truncate, close=real.close
        )
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): free disk space"):
            file.write({"a": 2})
    assert path.read_bytes() == b'{"a": "\xe9\x9d\x99\\u2028"}\n'


def test_logprobs_are_shown_beside_each_token_in_80_columns(generate: Generate) -> None:
    (text,) = objects(generate("题7", "--logprobs", "--jsonl", "-", tokens=60).out)
    shown = generate("题7", "--logprobs", tokens=60).out.removeprefix(f"{text['text']}\n")
    assert shown.startswith("logprobs    '")
    values = [float(value) for value in re.findall(r"(?:'|>) (-\d+\.\d\d|0\.00|-0\.00)", shown)]
    assert values == pytest.approx(text["logprobs"], abs=0.0051)
    assert float(re.findall(r"sum (-[\d.]+)", shown)[0]) == pytest.approx(sum(text["logprobs"]), abs=0.02)
    assert max(map(display_width, shown.splitlines())) <= 79


def test_logprobs_show_parts_of_characters_as_bytes() -> None:
    text = GeneratedText("", "静a\n", 0, [0xE9, 0x9D, 0x99, 97, 10, 256], True, [-1.0, -2.0, -0.5, -1.5, -3.0, -4.0])
    assert list(describe_logprobs(text, ByteTokenizer())) == [
        r"logprobs    <e9> -1.00  <9d> -2.00  <99>'静' -0.50  'a' -1.50  '\n' -3.00",
        "            <end of text> -4.00",
        "            sum -12.00, mean -2.00 nats of 6 tokens; perplexity 7.39",
    ]


def test_interactive_reads_prompts_from_a_pipe(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeff题7\n龘\n" + r"题\n" + "\n/quit\n题\n"))
    result = generate("--interactive")
    assert result.status == 0
    first, third = generate("题7").out, generate(r"题\n", "--seed", 1339).out
    assert result.out == f"--- sample 1 ---\n{first}--- sample 2 ---\n{third}"
    assert result.err.startswith(f"{CHECKPOINT}error: character '龘' (U+9F98) is not among")
    assert len(result.err.splitlines()) == 2


def test_interactive_stops_a_text_at_ctrl_c_and_ends_at_ctrl_d(generate: Generate) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        status = 70
        try:
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
            status = generate_main(["--name", "text", "--max_new_tokens", "1000000", "--interactive"])
        finally:
            os._exit(status)
    screen = ""

    def wait_for(pattern: str) -> None:
        nonlocal screen
        screen = ""
        while not re.search(pattern, screen):
            screen += os.read(terminal, 4096).decode(errors="replace")

    wait_for("> ")
    for prompt in ("第7\n", "\n"):
        os.write(terminal, prompt.encode())
        wait_for(r"(?s)\n.{30}")  # the text is being written
        os.write(terminal, b"\x03")
        wait_for("> $")
    os.write(terminal, b"\x04")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        time.sleep(0.02)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    os.close(terminal)


# ------------------------------------------------------------------------------------------------ mistakes in the flags

MISTAKES: dict[str, Case] = {
    "no checkpoint": Case([], "no checkpoint under logs: train one"),
    "no checkpoint of the name": Case(["--name", "poems"], "no checkpoint of 'poems' under logs: train one"),
    "not a checkpoint": Case(["--ckpt_path", "rows.txt"], "rows.txt cannot be opened"),
    "missing checkpoint": Case(["--ckpt_path", "no.ckpt"], "no.ckpt does not exist"),
    "pickled code": Case(
        ["--ckpt_path", "a.ckpt"], "it holds code", lambda: torch.save({"state_dict": Harmful()}, "a.ckpt")
    ),
    "unknown flag": Case(["--temp", "1"], "unrecognized arguments: --temp"),
    "two kinds of prompts": Case(["静", "--given", "a=b"], "a prompt that stands alone and --given both say how"),
    "interactive and a prompt": Case(["--interactive", "--prompt", "a"], "--prompt and --interactive both say how"),
    "interactive and a file": Case(["--interactive", "--jsonl", "-"], "leave out --jsonl"),
    "interactive and novel": Case(["--interactive", "--novel"], "leave out --novel"),
    "prompt in a missing file": Case(["FILE:no.txt"], "FILE:no.txt cannot be read (No such file or directory): give"),
    "prompt in a folder": Case(["FILE:."], "FILE:. cannot be read (Is a directory): give the path of a text file"),
    "prompt in another encoding": Case(
        ["FILE:a.txt"], "FILE:a.txt is not UTF-8 (at byte 0)", lambda: Path("a.txt").write_bytes("静".encode("gbk"))
    ),
    "prompt of bytes": Case(["--prompt", "a\udcff"], "is not text in this terminal's encoding"),
    "prompt of half a pair": Case(["a\ud800"], "is not text in this terminal's encoding"),
    "given bytes": Case(["--given", "a=\udcff"], "is not text in this terminal's encoding"),
    "empty name": Case(["--name", ""], "--name is empty: give the name of a run"),
    "prompt in the file of nobody": Case(["FILE:~nobody-here/x"], "FILE:~nobody-here/x cannot be read (No such file"),
    "checkpoint as a prompt": Case(
        ["a.ckpt"], "a.ckpt is a checkpoint and stands where a prompt does: give", lambda: Path("a.ckpt").touch()
    ),
    "top_k without effect": Case(["--temperature", "0", "--top_k", "5"], "leave out it or --top_k"),
    "name without effect": Case(["--ckpt_path", "a.ckpt", "--name", "small"], "leave out --name small"),
    "batch_size 0": Case(["--batch_size", "0"], "--batch_size is 0: give 1 or more"),
    "num_samples 0": Case(["--num_samples", "0"], "--num_samples is 0: give 1 or more"),
    "max_new_tokens 0": Case(["--max_new_tokens", "0"], "--max_new_tokens is 0: give 1 or more"),
    "negative temperature": Case(["--temperature", "-1"], "temperature is -1.0: give 0"),
    "top_p above 1": Case(["--top_p", "2"], "top_p is 2.0: give a probability"),
    "negative seed": Case(["--seed", "-1"], "--seed is -1: give a number from 0"),
}


@pytest.mark.parametrize("case", MISTAKES.values(), ids=MISTAKES)
def test_wrong_argument_of_generate_gives_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], case: Case
) -> None:
    case.prepare()
    status = generate_main(case.flags)
    printed = capsys.readouterr()
    assert_user_error(Result(status, printed.out, printed.err), case.message)
    assert not Path("harmed").exists()
