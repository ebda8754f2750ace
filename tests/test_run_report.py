"""report.html: one page that shows a run, and lets no text from a file become more than text."""

import html.parser
import re
import struct
from pathlib import Path

import pytest
from conftest import Fit, points
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto

from lit_gpt.runs import curves as curves_module
from lit_gpt.runs.curves import Events, read_curves, read_events
from lit_gpt.runs.report import Run, render
from lit_gpt.runs.summary import RunSummary
from lit_gpt.runs.svg import HEIGHT, MAX_POINTS, WIDTH, Line, line_chart, thin_out, ticks

RUN = Path("logs/small/version_0")


class Parser(html.parser.HTMLParser):
    """Collects the tags, attributes and texts of a page, and checks that its tags are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.stack: list[str] = []
        self.feed(page)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_page_shows_figures_curves_samples_data_and_settings(fit: Fit) -> None:
    result = fit("--model.learning_rate", 0.001)
    assert f"report      {RUN}/report.html\n" in result.out
    page = (RUN / "report.html").read_text(encoding="utf-8")
    assert "http://" not in page
    assert "https://" not in page
    parser = Parser(page)
    text = " ".join(parser.texts)
    last_loss = points(RUN)["loss/val"][-1][1]
    for shown in (
        "finished",
        f"{last_loss:.4f}",
        "6 of 6",
        "rows.txt",
        "108 documents",
        "model.learning_rate",
        "loss/train",
    ):
        assert shown in text, shown
    assert page.count("<svg") == 4
    assert page.count('class="sample"') == 3  # at the steps 0, 3 and 6


def test_equal_runs_have_equal_reports_but_for_times(fit: Fit) -> None:
    pages = []
    for number in range(2):
        assert fit().status == 0
        page = (Path(f"logs/small/version_{number}") / "report.html").read_text(encoding="utf-8")
        page = page.replace(f"version_{number}", "version")
        pages.append(re.sub(r'<(span|figure) class="measured">.*?</\1>', "", page, flags=re.DOTALL))
    assert pages[0] == pages[1]


def test_texts_from_files_and_models_stay_texts() -> None:
    evil = "<script>alert('x')</script>\u202e&\x1b"
    summary = RunSummary(evil, evil, status="failed", command=evil, settings={evil: evil}, defaults={evil: evil})
    summary.data = {
        "files": [{"name": evil, "bytes": 3, "encoding": evil, "sure": False}],
        "num_files": 2,
        "tokenizer": evil,
        **dict.fromkeys(("documents", "characters", "bytes", "tokens", "tokens_per_character", "vocab_size"), 1),
        **dict.fromkeys(("vocabulary_in_use", "empty_rows", "rejected", "duplicates", "duplicates_left_out"), 1),
        "duplicates_across": 0,
        "parts": {evil: {"documents": 1, "tokens": 1}},
    }
    summary.machine, summary.versions, summary.git = {evil: evil}, {evil: evil}, {"commit": evil, "changed": True}
    texts = {"samples/prompt_0": {3: f"```\n{evil}\n</pre>\n```\n\n```\nsecond\n```"}, "samples/prompt_1": {3: evil}}
    page = render(Run(summary, Events({"loss/val": [(3, 1.0)]}, texts)))
    parser = Parser(page)
    assert "script" not in parser.tags
    assert not any(name.startswith("on") for name in parser.attributes)
    assert page.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;\\u202e&amp;\\x1b") >= 15
    assert "second" in parser.texts


def test_long_run_has_a_small_page() -> None:
    curve = [(step, 5.0 / step) for step in range(1, 300_001)]
    names = ("loss/train", "loss/val", "optim/lr", "optim/grad_norm", "speed/tokens_per_second")
    texts = {"samples/prompt_0": dict.fromkeys(range(0, 10000, 10), "```\n" + "静" * 100000 + "\n```")}
    page = render(Run(RunSummary("long", "logs/long/version_0"), Events(dict.fromkeys(names, curve), texts)))
    assert len(page.encode()) < 500_000
    assert "step 9,990" in page


def test_thinned_curve_keeps_its_ends_and_extremes() -> None:
    curve = [(step, float(step % 7)) for step in range(0, 100_000, 10)]
    curve[4321] = (43210, 99.0)
    curve[777] = (7770, -99.0)
    thin = thin_out(curve)
    assert len(thin) <= MAX_POINTS
    assert (thin[0], thin[-1]) == (curve[0], curve[-1])
    assert {(43210, 99.0), (7770, -99.0)} <= set(thin) <= set(curve)
    assert thin == sorted(thin)


def test_chart_stays_inside_its_box() -> None:
    assert line_chart([Line("loss", "val", [(1, float("nan"))])], "loss") == ""
    for curve in (
        [(0, 1e-30)],
        [(5, 2.0), (6, 2.0)],
        [(0, -1e9), (10**9, 1e9)],
        [(1, 1.0), (2, float("inf")), (3, 4.0)],
    ):
        chart = line_chart([Line("loss", "val", curve)], "loss", mark=curve[0])
        pairs = re.findall(r"(-?[\d.]+),(-?[\d.]+)", " ".join(re.findall(r'points="([^"]*)"', chart)))
        assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT for x, y in pairs)
        assert "nan" not in chart
        assert "inf" not in chart
    narrow = line_chart([Line("loss", "val", [(0, 7.0117), (1, 7.0120)])], "loss")
    labels = re.findall(r">([\d.]+)</text>", narrow)
    assert len(set(labels)) == len(labels) >= 5
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.83, 1.21) == pytest.approx([0.9, 1.0, 1.1, 1.2])


# --------------------------------------------------------------------------------------------------------- event files


def write_events(path: Path, *events: Event) -> None:
    """Write an event file without checksums."""
    records = [event.SerializeToString() for event in events]
    path.write_bytes(b"".join(struct.pack("<Q", len(record)) + bytes(4) + record + bytes(4) for record in records))


def scalar_event(step: int, value: float, tag: str = "loss/train") -> Event:
    return Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))


def test_curves_equal_those_of_the_tensorboard_package(fit: Fit) -> None:
    assert fit("--trainer.max_steps", 3).status == 0
    assert fit("--ckpt_path", "last").status == 0  # two event files
    assert read_curves(RUN) == points(RUN)


def test_damaged_event_file_is_read_up_to_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.1.x.1.0"
    write_events(path, scalar_event(1, 3.0), scalar_event(2, 2.0))
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-20], whole + b"\xff" * 40, whole[:-12] + b"\xff" * 12):
        path.write_bytes(damaged)
        assert read_curves(tmp_path)["loss/train"][0] == (1, 3.0)
    path.write_bytes(b"\xff" * 100)
    (tmp_path / "events.out.tfevents.2.x.1.0").symlink_to(path)
    (tmp_path / "events.folder").mkdir()
    assert read_curves(tmp_path) == {}


def test_rare_events_of_a_large_file_are_all_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Summary.Value(
        tag="samples/prompt_0/text_summary", tensor=TensorProto(dtype=7, string_val=["```\n静\n```".encode()])
    )
    text.metadata.plugin_data.plugin_name = "text"
    events = [scalar_event(step, 1.0) for step in range(1, 1001)]
    events[501:501] = [scalar_event(501, 2.0, "loss/val"), Event(step=501, summary=Summary(value=[text]))]
    write_events(tmp_path / "events.1", *events)
    monkeypatch.setattr(curves_module, "MAX_PARSED_BYTES", (tmp_path / "events.1").stat().st_size // 10)
    found = read_events(tmp_path)
    assert 90 <= len(found.curves["loss/train"]) <= 110
    assert found.curves["loss/val"] == [(501, 2.0)]
    assert found.texts == {"samples/prompt_0": {501: "```\n静\n```"}}
