"""A prompt made of columns begins as the training documents do."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.cli.training_text import parse_given, start_of_document
from lit_gpt.data.read_options import ReadOptions, make_formatter, unescape
from lit_gpt.errors import UserError

POEMS = ReadOptions(template=r"{title}\n{author}: {text}。{title}")


@pytest.mark.parametrize(
    ("options", "fields", "expected"),
    [
        (POEMS, {"title": "静夜思"}, "静夜思\n"),
        (POEMS, {"title": "静夜思", "author": "李白"}, "静夜思\n李白: "),
        (POEMS, {"author": "李白", "title": ""}, "\n李白: "),
        (ReadOptions(template="# {a}"), {}, "# "),
        (ReadOptions(template="{{{a}}} {b}"), {"a": "{b}"}, "{{b}} "),
        (ReadOptions(columns=("a", "b", "c")), {"a": "x", "b": "y"}, "x\ny\n"),
    ],
)
def test_start_of_document_ends_before_the_first_column_that_is_not_given(
    options: ReadOptions, fields: dict[str, str], expected: str
) -> None:
    assert start_of_document(options, fields) == expected


@given(st.lists(st.text(alphabet="ab{}\\n=静", max_size=4), min_size=2, max_size=4), st.data())
@settings(max_examples=100, deadline=None)
def test_start_of_document_is_the_start_of_the_whole_document(texts: list[str], data: st.DataObject) -> None:
    names = [f"c{number}" for number in range(len(texts))]
    template = "".join(f"{literal}{{{name}}}" for literal, name in zip(["", ":", r"\n", "{{"], names))
    options = data.draw(st.sampled_from([ReadOptions(template=template), ReadOptions(columns=tuple(names))]))
    fields = dict(zip(names, texts))
    count = data.draw(st.integers(1, len(names) - 1))
    start = start_of_document(options, {name: fields[name] for name in names[:count]})
    rest = make_formatter(options)([*[""] * count, *texts[count:]])
    assert make_formatter(options)(texts).startswith(start)
    assert len(start) + len("".join(texts[count:])) <= len("".join(texts[:count])) + len(rest)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "x"}, "title is not given: give title too, or leave out text"),
        ({"title": "x", "text": "y"}, "author is not given: give author too, or leave out text"),
        ({"title": "x", "author": "y", "text": "z"}, "nothing is left to write: leave out text"),
    ],
)
def test_start_of_document_refuses_columns_out_of_order(fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        start_of_document(POEMS, fields)


def test_parse_given_finds_the_column_before_the_text() -> None:
    assert parse_given(["title=x=y", "author="], ["title", "author"]) == {"title": "x=y", "author": ""}
    assert parse_given(["a=b=c"], ["a", "a=b"]) == {"a=b": "c"}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["静夜思"], "--given '静夜思' names no column: write COLUMN=TEXT, as title=TEXT"),
        (["titel=x"], r"'titel' is no column .* they have title, text \(did you mean 'title'\?\)"),
        (["title=x", "title=y"], "--given title is there twice"),
    ],
)
def test_parse_given_refuses_what_names_no_column(texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_given(texts, ["title", "text"])


@given(st.text(alphabet="\\\\nt\n静", max_size=8))
@settings(max_examples=200, deadline=None)
def test_every_text_can_be_typed(text: str) -> None:
    assert unescape(re.sub(r"\\(?=[nt])", r"\\\\", text)) == text


@given(st.lists(st.text(alphabet="ab=静", max_size=3), min_size=1, max_size=4, unique=True), st.text(alphabet="b=\n"))
@settings(max_examples=100, deadline=None)
def test_parse_given_takes_the_longest_column_that_fits(columns: list[str], text: str) -> None:
    ((column, value),) = parse_given([f"{columns[0]}={text}"], columns).items()
    assert f"{column}={value}" == f"{columns[0]}={text}"
    assert not any(f"{column}={value}".startswith(f"{other}=") for other in columns if len(other) > len(column))


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        (r"a\nb\tc", "a\nb\tc"),
        (r"a\\nb\\tc", r"a\nb\tc"),
        (r"\\\n", r"\\n"),
        (r"C:\dir\\", r"C:\dir\\"),
        ("a\nb", "a\nb"),
    ],
)
def test_unescape_keeps_a_backslash_that_is_typed_twice(typed: str, text: str) -> None:
    assert unescape(typed) == text
