"""Tests of lit_gpt.data.encodings and lit_gpt.data.plausibility, with a small sample of tests/detection.py."""

import itertools
import random
import tracemalloc
from pathlib import Path

import pytest
from detection import LENGTHS, Case, is_right
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lit_gpt.data import encodings
from lit_gpt.data.encodings import DetectedEncoding, detect_encoding
from lit_gpt.data.sources import Source
from lit_gpt.errors import UserError


def detect(folder: Path, content: bytes, name: str = "t.csv") -> DetectedEncoding:
    (folder / name).write_bytes(content)
    return detect_encoding(Source(str(folder / name)))


SENTENCES = {
    "cp932": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "euc_jp": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "iso2022_jp": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "cp949": "한국어 문장은 이렇게 생겼습니다. 오늘은 날씨가 좋습니다.",
    "gb18030": "今天天气很好，我们一起去公园散步吧。",
    "big5": "今天天氣很好，我們一起去公園散步吧。",
    "cp1250": "Příliš žluťoučký kůň úpěl ďábelské ódy o tom, že řeka teče rychle.",
    "cp1251": "Сегодня хорошая погода, и мы пойдём гулять в парк.",
    "cp1252": "L'été dernier, à Besançon, les garçons mangeaient des pâtés près de la forêt.",
    "cp1253": "Σήμερα ο καιρός είναι πολύ καλός και θα πάμε μια βόλτα στο πάρκο.",
    "cp1254": "Bugün hava çok güzel, parkta yürüyüşe çıkıyoruz ve şarkı söylüyoruz, değil mi?",
    "cp1255": "היום מזג האוויר יפה מאוד ואנחנו הולכים לטייל בפארק.",
    "cp1256": "الطقس جميل جدا اليوم وسنذهب في نزهة إلى الحديقة.",
    "cp1257": "Šiandien oras labai gražus, todėl mes eisime pasivaikščioti į parką ąžuolų pavėsyje.",
    "cp874": "วันนี้อากาศดีมาก เราจะไปเดินเล่นในสวนสาธารณะกัน",
    "koi8_r": "Сегодня хорошая погода, и мы пойдём гулять в парк.",
    "iso8859_2": "Příliš žluťoučký kůň úpěl ďábelské ódy o tom, že řeka teče rychle.",
    "mac_roman": "L’été dernier, à Besançon, les garçons mangeaient des pâtés près de la forêt.",
    "cp866": "Сегодня хорошая погода, и мы пойдём гулять в парк.",
    "utf-16": "今天天气很好 🙂 שלום",
    "utf-16-le": "今天天气很好，我们一起去公园散步吧。",
    "utf-16-be": "วันนี้อากาศดีมาก เราจะไปเดินเล่นในสวนสาธารณะกัน",
    "utf-32": "今天天气很好 🙂 שלום",
    "utf-8": "今天天气很好 🙂 שלום",
    "utf-8-sig": "今天天气很好 🙂 שלום",
}


@pytest.mark.parametrize("encoding", SENTENCES)
def test_detected_encoding_decodes_to_the_text(tmp_path: Path, encoding: str) -> None:
    text = "id,text\n" + "".join(f"{number},{SENTENCES[encoding]}\n" for number in range(20))
    found = detect(tmp_path, text.encode(encoding))
    assert text.encode(encoding).decode(found.name).removeprefix("\ufeff") == text


@pytest.mark.parametrize(
    "encoding",
    ["cp1250", "cp1251", "cp1252", "cp1253", "cp1257", "koi8_r", "iso8859_2", "mac_roman", "cp866"],
)
def test_text_in_capitals_is_read_in_its_encoding(tmp_path: Path, encoding: str) -> None:
    content = "\n".join(SENTENCES[encoding].upper().split(" ")).encode(encoding, "ignore")
    found = detect(tmp_path, content)
    assert content.decode(found.name) == content.decode(encoding)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("ﾔﾏﾀﾞ ﾀﾛｳ\nｻﾄｳ ﾊﾅｺ\nｽｽﾞｷ ｲﾁﾛｳ\nﾀｶﾊｼ ﾐｻｷ\nﾀﾅｶ ｼﾞﾛｳ\nﾜﾀﾅﾍﾞ ｹﾝ\nｺﾊﾞﾔｼ ﾏｻｵ\nﾖｼﾀﾞ ｹｲｺ\n", "cp932"),
        ("Let x ≤ y, π ≈ 3.14, ∑ x = ∞, ∆t = 5 µs, √2.\nAngle 30°, ±2%, Ω ohm, ∂f/∂x ≠ 0\nf(x) ≥ 0 ∫ ƒ\n", "mac_roman"),
    ],
    ids=["half-width kana", "mathematics"],
)
def test_text_that_is_strange_in_its_likeliest_encoding_is_a_guess(tmp_path: Path, text: str, encoding: str) -> None:
    assert not detect(tmp_path, text.encode(encoding)).is_sure


def test_japanese_names_that_fit_chinese_too_are_a_guess(tmp_path: Path) -> None:
    names = [
        "山田太郎",
        "佐藤花子",
        "鈴木一郎",
        "高橋美咲",
        "田中健一",
        "渡辺直美",
        "伊藤博文",
        "中村俊輔",
        "小林麻央",
        "加藤清正",
    ]
    assert not detect(tmp_path, "\n".join(names).encode("euc_jp")).is_sure


def test_utf16_may_contain_replacement_characters(tmp_path: Path) -> None:
    text = "it\ufffds a \ufffdday\ufffd\r\n" * 50
    assert detect(tmp_path, text.encode("utf-16")).name == "utf-16"
    assert detect(tmp_path, text.encode("utf-16-le")).name == "utf-16-le"


def test_utf8_with_a_few_invalid_bytes_is_detected_as_utf8(tmp_path: Path) -> None:
    found = detect(tmp_path, "第一行，文字\n".encode() * 100 + b"\xff\xfe\n")
    assert found.name == "utf-8"
    assert 0.99 < found.confidence < 1


def test_sample_of_the_evaluation_is_right_or_printed_as_a_guess(tmp_path: Path) -> None:
    right = wrong_and_sure = files = 0
    for encoding, sentence in SENTENCES.items():
        words = sentence.split(" ")
        for length in LENGTHS[:2]:
            rng = random.Random(f"{encoding} {length}")
            text = "id,name,note\n"
            while len(text) < length:
                text += f"{rng.randint(1, 9999)},{rng.choice(words)},{rng.choice(('open', 'closed'))}\n"
            case = Case(encoding, "", length, "table", text, text.encode(encoding))
            found = detect(tmp_path, case.content)
            files += 1
            right += is_right(case, found.name)
            wrong_and_sure += found.is_sure and not is_right(case, found.name)
    assert files > 40
    assert right >= 0.9 * files
    assert wrong_and_sure == 0


ASCII = "id,text\n" + "".join(f"{number},plain English row\n" for number in range(2000))
FRENCH = "L'été dernier, à Besançon, les garçons mangeaient des pâtés près de la forêt.\n"
CHINESE = "今天天气很好，我们一起去公园散步吧。\n"
ENGLISH = [
    "don’t",
    "£4.50",
    "€20",
    "30 °C",
    "“yes”",
    "café",
    "well…",
    "1990–2000",
    "Müller",
    "Foo™",
    "×",
    "§ 5",
    "m²",
    "© 2020",
]


@pytest.mark.parametrize("sign", ENGLISH)
def test_ascii_with_one_sign_is_guessed_to_be_cp1252_and_the_line_is_shown(tmp_path: Path, sign: str) -> None:
    found = detect(tmp_path, (ASCII + f"1,so {sign} it is\n").encode("cp1252"))
    assert found.name == "cp1252"
    assert not found.is_sure
    assert found.runner_up
    assert found.examples == (f"1,so {sign} it is",)


@pytest.mark.parametrize(
    "text", ["£{}.50", "{} €", "{} °C", "{}½ cups", "{} µm", "§ {}", "two{}\u00a0words", "• {}", "© {} Foo"]
)
def test_ascii_with_one_kind_of_sign_in_each_row_is_guessed_to_be_cp1252(tmp_path: Path, text: str) -> None:
    rows = "".join(f"{number},{text.format(number, number)}\n" for number in range(500))
    found = detect(tmp_path, f"id,text\n{rows}".encode("cp1252"))
    assert found.name == "cp1252"
    assert not found.is_sure


@pytest.mark.parametrize(
    ("words", "encoding"),
    [
        (["ΑΘΗΝΑ", "ΠΑΤΡΑ", "ΛΑΡΙΣΑ"], "cp1253"),
        (["МОСКВА", "ИВАНОВ", "КАЗАНЬ"], "cp1251"),
        (["МОСКВА", "ИВАНОВ", "КАЗАНЬ"], "koi8-r"),
        (["佐藤太郎", "鈴木花子", "田中健一"], "euc_jp"),
        (["José", "Zoë", "François"], "cp1252"),
    ],
)
def test_choice_that_rests_on_few_words_is_a_guess_however_often_they_are_repeated(
    tmp_path: Path, words: list[str], encoding: str
) -> None:
    rows = "".join(f"{number},{words[number % 3]}\n" for number in range(900))
    assert not detect(tmp_path, f"id,text\n{rows}".encode(encoding)).is_sure


def test_english_with_many_signs_is_surely_cp1252(tmp_path: Path) -> None:
    rng = random.Random(1)
    lines = [f"{n},the {rng.choice(ENGLISH)} and the {rng.choice(ENGLISH)} were there" for n in range(500)]
    found = detect(tmp_path, "\n".join(lines).encode("cp1252"))
    assert found.name == "cp1252"
    assert found.is_sure


@pytest.mark.parametrize(("text", "encoding"), [(FRENCH, "cp1252"), (CHINESE, "gb18030")], ids=["French", "Chinese"])
def test_what_is_not_ascii_may_come_late_in_one_line_or_with_a_wrong_byte(
    tmp_path: Path, text: str, encoding: str
) -> None:
    content = (text * 200).encode(encoding)
    middle = len(content) // 2 + content[len(content) // 2 :].index(b"\n")
    for changed in (
        (ASCII * 50).encode() + content,
        content.replace(b"\n", b" "),
        content.replace(b"\n", b""),
        content.replace(b"\n", b"\r"),
        content[:middle] + b"\xff" + content[middle:],
        content[:middle] + b"\0" + content[middle:],
        content[:-2],
    ):
        assert detect(tmp_path, changed).name == encoding


def test_zero_bytes_do_not_make_a_text_utf16(tmp_path: Path) -> None:
    rng = random.Random(1)
    lines = [CHINESE[: rng.randint(3, 16)] for _ in range(300)]
    assert detect(tmp_path, "\0\n".join(lines).encode("gb18030")).name == "gb18030"
    assert detect(tmp_path, "\0\n".join(lines).encode()).name == "utf-8"
    assert detect(tmp_path, b"a\0b\n" + ASCII.encode()).name == "utf-8"


def test_utf8_and_marks_must_fit_the_whole_file(tmp_path: Path) -> None:
    ascii_first = (ASCII * 30).encode()
    assert detect(tmp_path, ascii_first + (FRENCH * 50).encode()).confidence == 1
    assert detect(tmp_path, ascii_first + (FRENCH * 50).encode("cp1252")).name == "cp1252"
    assert detect(tmp_path, b"\xef\xbb\xbf" + (FRENCH * 50).encode("cp1252")).name == "cp1252"
    mixture = detect(tmp_path, (FRENCH * 50).encode() + (FRENCH * 20).encode("cp1252"))
    assert not mixture.is_sure


def test_utf8_character_may_lie_across_the_chunks_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in range(2, 12, 2):
        monkeypatch.setattr(encodings, "CHUNK_BYTES", size)
        assert detect(tmp_path, f"a{CHINESE}🙂".encode()) == DetectedEncoding("utf-8")
        assert detect(tmp_path, f"a{CHINESE * 3}".encode("utf-16-le")).name == "utf-16-le"


def test_random_bytes_are_refused_as_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no text: 9% of it are control characters: give another file"):
        detect(tmp_path, random.Random(1).randbytes(10_000))
    with pytest.raises(UserError, match=r"is no text: 100% of it are zero bytes"):
        detect(tmp_path, bytes(1000))


def test_sample_of_lines_is_even_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "SAMPLE_BYTES", 2000)
    monkeypatch.setattr(encodings, "CHUNK_BYTES", 1024)
    lines = [f"{number:05},é" if number % 3 == 0 else f"{number:05},e" for number in range(9000)]
    (tmp_path / "t.csv").write_bytes("\n".join(lines).encode("cp1252"))
    numbers = [int(line[:5]) for line in encodings.sample_lines(Source(str(tmp_path / "t.csv")))]
    assert 1000 < 7 * len(numbers) <= 2000
    distances = {after - before for before, after in itertools.pairwise(numbers)}
    assert len(distances) == 1
    assert numbers[-1] + 2 * distances.pop() > 9000


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "CHUNK_BYTES", 2**14)
    monkeypatch.setattr(encodings, "SAMPLE_BYTES", 2**14)
    peaks = []
    for repeats in (1_000, 10_000):
        (tmp_path / "t.csv").write_bytes(FRENCH.encode("cp1252") * repeats)
        tracemalloc.start()
        assert detect_encoding(Source(str(tmp_path / "t.csv"))).name == "cp1252"
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


FAST = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FAST
@given(content=st.binary(min_size=1, max_size=300))
def test_any_bytes_have_an_encoding_or_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    try:
        found = detect(tmp_path, content)
    except UserError as error:
        found, message = None, str(error)
    if found is None:
        assert "\n" not in message
    else:
        content.decode(found.name, "replace")
        assert 0 <= found.confidence <= 1


@FAST
@given(text=st.text(min_size=1), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_any_text_in_unicode_is_read_back(tmp_path: Path, text: str, encoding: str) -> None:
    assume("\0" not in text and "\x1b" not in text and not text.startswith("\ufeff"))
    assert text.encode(encoding).decode(detect(tmp_path, text.encode(encoding)).name).removeprefix("\ufeff") == text
