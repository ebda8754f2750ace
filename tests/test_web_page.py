"""The web page of a model: what it computes in Node.js beside our model and tokenizers, and what it promises."""

import dataclasses
import html.parser
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Fit

from lit_gpt.cli.export import main
from lit_gpt.convert import page_program, web_page
from lit_gpt.convert.page_program import PageProgram, find_node
from lit_gpt.convert.parity import ParityError
from lit_gpt.convert.parity import sample_strings as strings_of_all_kinds
from lit_gpt.convert.web_page import PARTS, SCRIPTS, check_web_page, rounded, write_web_page
from lit_gpt.errors import UserError
from lit_gpt.inference.generate import encode_prompt, generate, stream_text
from lit_gpt.inference.utf8 import token_transitions, utf8_constraint
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.tokenizer import (
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    open_tokenizer,
    prune,
    train_bpe,
)


def has_node() -> bool:
    try:
        find_node()
    except UserError:
        return False
    return True


NODE = pytest.mark.skipif(not has_node(), reason="Node.js is not installed: pip install 'lit-gpt[html]'")

O200K_PATTERN = "|".join(  # as tiktoken has it
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
TEXT = "静夜思\n床前明月光，疑是地上霜。 It's 12345 o'clock: they'LL don't.\n" * 4


def small_model(vocab_size: int = 257, **shape: Any) -> GPT:
    """A model whose weights are far from those that a new one has, so that every part changes the logits."""
    torch.manual_seed(1)
    defaults = {"context_length": 12, "d_model": 16, "num_blocks": 2, "num_heads": 2}
    model = GPT(GPTConfig(vocab_size, **{**defaults, **shape})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def pruned() -> Tokenizer:
    full = open_tokenizer("cl100k_base")
    assert isinstance(full, BytePairTokenizer)
    return prune(full, full.encode(TEXT))[0]


def odd_vocabulary() -> Tokenizer:
    """Two digits are one token, but never the only ones of a pre-token; no merges lead to the token `clock`."""
    tokens = [*(bytes([byte]) for byte in range(256)), *(b"%02d" % number for number in range(100)), b"clock"]
    return BytePairTokenizer.from_tokens("file", tokens, r"\p{N}{1,2}+\p{N}|\p{N}|\p{L}+|[^\p{N}\p{L}]+")


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "cl100k_base pruned": pruned,
    "gpt2": lambda: open_tokenizer("gpt2"),
    "bpe": lambda: train_bpe([TEXT], 300),
    "pattern of o200k_base": lambda: BytePairTokenizer.from_tokens(
        "file", train_bpe([TEXT], 300).tokens, O200K_PATTERN
    ),
    "odd vocabulary": odd_vocabulary,
    "byte": ByteTokenizer,
    "char": lambda: CharTokenizer("".join(sorted(set(TEXT + "<😀\u2028")))),
}


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Any]:
    """A function that writes a page and starts its program."""
    programs: list[PageProgram] = []

    def start(model: GPT, tokenizer: Tokenizer, mode: str = "rows", dtype: Any = "float32") -> PageProgram:
        path = tmp_path / "page.html"
        write_web_page(model, tokenizer, mode, path, dtype)
        programs.append(PageProgram(path))
        return programs[-1]

    yield start
    for program in programs:
        with program:
            pass


SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "grouped heads": {"num_heads": 4, "num_kv_heads": 2, "d_model": 32, "tie_embeddings": False},
    "learned layernorm gelu bias": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True},
    "gelu_tanh, no qk_norm": {"position": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qk_norm": False},
    "sinusoidal relu": {"position": "sinusoidal", "norm": "layernorm", "mlp": "relu", "qk_norm": False},
    "no norm, no position": {"position": "none", "norm": "none", "mlp": "relu2"},
    "previous tokens": {"previous_tokens": 2, "mlp": "relu2", "context_length": 4},
    "separate biases": {"qkv_bias": True, "mlp_bias": True, "qk_norm": False},
    "odd sizes": {
        "d_model": 18,
        "head_size": 6,
        "num_heads": 5,
        "hidden_size": 21,
        "rope_base": 500.0,
        "norm_eps": 1e-2,
    },
}


@NODE
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_page_computes_the_logits_and_the_text_of_the_model(shape: dict[str, Any], page: Any) -> None:
    model, tokenizer = small_model(**shape), ByteTokenizer()
    program = page(model, tokenizer)
    ids = random.Random(0).choices(range(257), k=model.config.context_length)
    torch.testing.assert_close(program.logits(ids), model(torch.tensor([ids]))[0][0], atol=2e-5, rtol=1e-5)
    # More tokens than the context has. Only bytes that form characters may be drawn.
    prompt = encode_prompt(tokenizer, "静", "rows")
    (expected,) = generate(model, [prompt], 20, temperature=0, constraint=utf8_constraint(model, tokenizer))
    assert program.continuation(prompt, 20) == expected
    (unconstrained,) = generate(model, [prompt], 20, temperature=0)
    assert program.continuation(prompt, 20, raw_bytes=True) == unconstrained
    assert shape or unconstrained != expected


@NODE
@pytest.mark.parametrize("name", TOKENIZERS)
def test_page_encodes_as_the_tokenizer(name: str, page: Any) -> None:
    tokenizer = TOKENIZERS[name]()
    program = page(small_model(tokenizer.vocab_size, d_model=8), tokenizer)
    for string in strings_of_all_kinds(tokenizer, [TEXT], 1000):
        assert program.encode(string) == tokenizer.encode(string), string
    if name == "char":
        with pytest.raises(ValueError, match="does not know a character"):
            program.encode("静A")


@NODE
def test_page_knows_which_bytes_may_follow_as_our_constraint() -> None:
    generator = random.Random(0)
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += ["\ufffd静\U0010ffffé"[i:j].encode()[k:] for i in range(4) for j in range(5) for k in range(4)]
    tokens += [generator.randbytes(generator.randint(1, 4)) for _ in range(1000)]
    program = """
      const tokens = JSON.parse(require("fs").readFileSync(0, "utf-8"));
      const { after, steps } = new Utf8Constraint(tokens);
      console.log(JSON.stringify([after.map((states) => Array.from(states)), steps]));
    """
    answer = subprocess.run(
        [find_node(), "-e", (PARTS / "utf8.js").read_text(encoding="utf-8") + program],
        input=json.dumps([token.decode("latin-1") for token in tokens]),
        capture_output=True,
        encoding="utf-8",
        check=True,
    ).stdout
    after, steps = json.loads(answer)
    next_state, is_valid = token_transitions(tokens)
    assert after == np.where(is_valid, next_state, 255).tolist()
    assert steps == [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]  # the random tokens have an end for every beginning


@NODE
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_page_has_the_rounded_weights(dtype: Any, page: Any) -> None:
    model = small_model(position="learned", norm="layernorm", bias=True)
    with torch.no_grad():
        model.blocks[0].mlp.up.weight[3] = 0.0  # a row without a scale
    ids = list(range(12))
    logits = page(model, ByteTokenizer(), dtype=dtype).logits(ids)
    exact = model(torch.tensor([ids]))[0][0]
    torch.testing.assert_close(logits, rounded(model, dtype)(torch.tensor([ids]))[0][0], atol=2e-5, rtol=1e-5)
    assert 1e-3 < (logits - exact).abs().max() < 0.2 * exact.std()


@NODE
def test_check_compares_the_page_with_the_model(tmp_path: Path) -> None:
    model, tokenizer, path = small_model(), ByteTokenizer(), tmp_path / "page.html"
    write_web_page(model, tokenizer, "raw", path, "int8")
    parity = check_web_page(model, tokenizer, "raw", path, ["静夜思\n", "a b"], "int8", num_strings=5)
    assert (parity.strings, parity.tokens) == (5, 10 + 3)
    assert parity.difference < 1e-4
    assert parity.greedy > 0
    with pytest.raises(ParityError, match="the logits of the exported model differ"):
        check_web_page(small_model(num_heads=4), tokenizer, "raw", path, ["静夜思\n"], "int8", num_strings=5)


# ------------------------------------------------------------------------------------------------------ the file itself


class Tags(html.parser.HTMLParser):
    """The start tags of a page, with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_page_contains_all_it_needs_and_loads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "poems.html"
    write_web_page(small_model(), ByteTokenizer(), "rows", path)
    page = path.read_text(encoding="utf-8")
    tags = Tags(page).found
    policy = next(attributes["content"] for tag, attributes in tags if "http-equiv" in attributes) or ""
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == len(SCRIPTS) + 1  # and the style sheet
    linked = [attributes.get("src", attributes.get("href")) for tag, attributes in tags]
    assert [link for link in linked if link] == ["data:,"]
    assert "http:" not in page.replace("http-equiv", "")
    assert "https:" not in page
    assert [path.name for path in tmp_path.iterdir()] == ["poems.html"]


def test_characters_of_a_vocabulary_or_a_name_end_no_script(tmp_path: Path) -> None:
    tokenizer, path = CharTokenizer("<>/!-script "), tmp_path / "<b>&.html"
    write_web_page(small_model(tokenizer.vocab_size), tokenizer, "rows", path)
    page = path.read_text(encoding="utf-8")
    assert "<b>" not in page
    facts = re.search(r'<script type="application/json" id="facts">(.*?)</script>', page, re.DOTALL)
    assert facts is not None
    assert "<" not in facts[1]
    assert json.loads(facts[1])["tokenizer"]["characters"] == tokenizer.characters
    scripts = [attributes for tag, attributes in Tags(page).found if tag == "script"]
    assert len(scripts) == 1 + len(SCRIPTS) + sum(1 for _ in small_model(tokenizer.vocab_size).parameters())


def test_model_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(100_000, d_model=320))
    with pytest.raises(
        UserError, match=r"the model has 3\d.* parameters, and a web page takes up to 30 M: .* --to gguf x"
    ):
        write_web_page(model, ByteTokenizer(), "rows", tmp_path / "x.html")
    assert not list(tmp_path.iterdir())


def test_tokenizer_that_a_page_cannot_compute_is_refused(tmp_path: Path) -> None:
    tokens = [bytes([byte]) for byte in range(256)]
    odd = BytePairTokenizer.from_tokens("file", tokens, r"\w+|\W")
    with pytest.raises(UserError, match=r"a web page has no form of '\\\\w'"):
        write_web_page(small_model(odd.vocab_size), odd, "rows", tmp_path / "x.html")
    assert not list(tmp_path.iterdir())


def test_page_knows_every_choice_of_the_model() -> None:
    """A new norm, activation or position needs a line in model.js."""
    script = (PARTS / "model.js").read_text(encoding="utf-8")
    choices = {field.name: field.type for field in dataclasses.fields(GPTConfig)}
    for name in ("norm", "mlp", "position"):
        for choice in choices[name].__args__:  # type: ignore[union-attr]
            assert re.search(rf"\b{choice}\b", script) or choice == "none", choice


@NODE
def test_page_says_the_same_in_both_languages() -> None:
    program = """
      const names = (words) => Object.entries(words).map(([name, said]) =>
        [name, typeof said, said.length > 0 && typeof said === "function" ? said.length : 0]);
      const { en, zh } = WORDS;
      console.log(JSON.stringify([names(en), names(zh), Object.keys(en.about), Object.keys(zh.about)]));
    """
    words = (PARTS / "words.js").read_text(encoding="utf-8").replace("navigator.language", '"en"')
    printed = subprocess.run([find_node(), "-e", words + program], capture_output=True, check=True)
    english, chinese, about_en, about_zh = json.loads(printed.stdout)
    assert english == chinese
    assert about_en == about_zh
    used = set(re.findall(r'data-(?:word|placeholder)="(\w+)"', (PARTS / "page.html").read_text(encoding="utf-8")))
    for name in ("interface", "token_card", "written_text"):
        script = (PARTS / f"{name}.js").read_text(encoding="utf-8")
        used |= set(re.findall(r'(?:\bword|addButton)\("(\w+)"', script))
        used |= set(re.findall(r'status = "(\w+)"', script))
    assert used - {name for name, *_ in english} == set()
    assert {name for name, *_ in english} - used == set()


@NODE
def test_program_that_fails_says_why(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("<p>no page of ours</p>", encoding="utf-8")
    with (
        PageProgram(path) as program,
        pytest.raises(RuntimeError, match="the program of the page failed"),
    ):
        program.encode("a")


def test_old_node_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = tmp_path / "node"
    node.write_text("#!/bin/sh\necho v12.22.0\n")
    node.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(page_program, "_packaged_node", lambda: None)
    with pytest.raises(UserError, match=r"Node.js 18 or newer.*pip install 'lit-gpt\[html\]'"):
        find_node()


# --------------------------------------------------------------------------------------------------------- the command


@NODE
@pytest.mark.formats
def test_export_writes_a_page_that_was_compared_or_nothing(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit("--trainer.max_steps", 2).status == 0
    assert main(["--to", "html", "page.html", "--dtype", "int8"]) == 0
    printed = capsys.readouterr().out
    assert "10,000 strings encoded equally" in printed
    assert "int8: page.html" in printed
    assert "<title>page</title>" in Path("page.html").read_text(encoding="utf-8")

    before = sorted(Path().iterdir())
    monkeypatch.setattr(web_page, "rounded", lambda model, dtype: rounded(model, dtype).apply(add_to_norms))
    assert main(["--to", "html", "other.html"]) == 2
    assert "the logits of the exported model differ" in capsys.readouterr().err
    monkeypatch.setattr("lit_gpt.convert.page_program.find_node", no_node)
    assert main(["--to", "html", "other.html"]) == 2
    assert "pip install 'lit-gpt[html]'" in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before


def add_to_norms(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.RMSNorm):
        torch.nn.init.constant_(module.weight, 1.5)


def no_node() -> str:
    raise UserError("Node.js is not installed: pip install 'lit-gpt[html]'")


# ----------------------------------------------------------------------------------------------------------- a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.formats
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_page_opens_from_a_file_without_a_network(tmp_path: Path) -> None:
    """A reader opens the page, writes, changes the language, and goes on with another token."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    tokenizer, path = pruned(), tmp_path / "page.html"
    model = small_model(tokenizer.vocab_size, d_model=32, context_length=32)
    write_web_page(model, tokenizer, "rows", path, "int8")
    expected = "静夜" + "".join(
        stream_text(rounded(model, "int8"), tokenizer, "静夜", "rows", max_new_tokens=60, temperature=0)
    )
    problems: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_context(offline=True, locale="en-US").new_page()
        page.on("request", lambda request: problems.append(request.url) if request.url[:5] != "file:" else None)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector(".token", timeout=5000)  # the first text begins by itself
        write = page.locator("#write:not([hidden])")
        write.wait_for()
        page.evaluate("document.querySelector('form details').open = true")
        page.fill("#temperature", "0")
        page.fill("#length", "60")
        page.fill("#prompt", "静夜")
        write.click()
        write.wait_for()
        assert page.locator("article .tokens").first.text_content() == expected

        page.click("#language")
        assert page.locator("#write").text_content() == "续写"
        page.locator("article").first.locator(".token").nth(2).hover()
        page.locator(".alternative:enabled").first.click()
        write.wait_for()
        texts = page.locator("article .tokens").all_text_contents()
        assert len(texts) == 3
        assert texts[0] != texts[1] == expected
        browser.close()
    assert [problem for problem in problems if problem != "data:,"] == []
