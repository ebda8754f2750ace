"""Tests of lit_gpt.data.encodings."""

from pathlib import Path

import pytest

from lit_gpt.data.encodings import DetectedEncoding, detect_encoding
from lit_gpt.data.sources import Source


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
    assert found.is_sure


def test_utf8_with_a_few_invalid_bytes_is_detected_as_utf8(tmp_path: Path) -> None:
    found = detect(tmp_path, "第一行，文字\n".encode() * 100 + b"\xff\xfe\n")
    assert found.name == "utf-8"
    assert 0.99 < found.confidence < 1
