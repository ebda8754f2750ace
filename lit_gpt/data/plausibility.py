"""Find characters that are strange between their neighbours: a file that is decoded wrongly has many of them."""

import unicodedata
from functools import cache

EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HANGUL", "BOPOMOFO", "FULLWIDTH", "HALFWIDTH")
ALPHABETS = ("LATIN", "CYRILLIC", "GREEK", "HEBREW", "ARABIC", "THAI")

CONTRACTION = -0.4  # implausibility of the apostrophe in "don’t": a letter of a wrong encoding is seldom there
QUOTE = -0.1  # likewise of a quote beside a letter


def is_letter(character: str) -> bool:
    """Return whether a character is a letter of a word; not one that stands beside numbers, as µ and º."""
    return character.isalpha() and character not in "µªº"


def _script(character: str) -> str:
    """Return the writing system of a letter; "" for another character."""
    if not character.isalpha():
        return ""
    name = unicodedata.name(character, "").split(" ")[0]
    return "CJK" if name in EAST_ASIAN else name


@cache
def implausibility(before: str, character: str, after: str) -> float:
    """Return how strange a character is between its neighbours.

    It is from 0 (usual) to 1 (never seen); less than 0 where a character speaks for the encoding.

    Args:
        before: The character before it; "" at the start of the text.
        character: A character that is not ASCII.
        after: The character after it; "" at the end.
    """
    category = unicodedata.category(character)
    if category in ("Cc", "Cn", "Co", "Cs"):  # control, unassigned, private
        return 1.0
    left, right = _script(before), _script(after)
    inside_word = bool(left and right)
    if character in "ªº°":
        return 0.1 if before.isdigit() or before in " nN(" else 0.8
    if character in "²³¹½¼¾×÷±‰µ":
        usual = before.isdigit() or after.isdigit() or before == "m" or (before in " (" and not right)
        usual = usual or (character == "µ" and not left)
        return 0.1 if usual else 0.8
    if category[0] == "L":
        return _implausibility_of_letter(before, character, after)
    if category == "Mn":  # a mark over or under the letter before it
        return 0.1 if left else 0.9
    if character == "’" and left and after and after in "stlrvdm":
        return CONTRACTION  # as in "don’t"
    if character in "‘’“”„‚«»‹›":
        return 0.8 if inside_word and character != "’" else QUOTE if left or right else 0.0
    if character in "–—…":
        return 0.3 if inside_word and character != "—" else 0.0
    if character in "£€¥¢":
        usual = before.isdigit() or after.isdigit() or not (left or right)
        return 0.0 if usual else 0.6
    if character in "¿¡":
        return 0.0 if right and not left else 1.0
    if character in "™®©•·§":
        return 0.7 if inside_word else 0.1
    if category == "Zs" or category == "Nd":
        return 0.15
    if category[0] == "P":
        return 0.1 if _is_punctuation_of_a_script(character) else 0.4
    return 0.9  # symbols, such as those that draw boxes


def _implausibility_of_letter(before: str, letter: str, after: str) -> float:
    """Return `implausibility` of a letter. A word has one writing system; its capital letters stand first."""
    script = _script(letter)
    if script == "CJK":
        return 0.0
    neighbours = [_script(before), _script(after)]
    if any(neighbour not in ("", script, "CJK") for neighbour in neighbours):
        return 1.0
    if script not in ALPHABETS or (letter.isupper() and before.islower()) or (letter.islower() and after.isupper()):
        return 0.8
    return 0.0 if any(neighbours) else 0.2


def _is_punctuation_of_a_script(character: str) -> bool:
    return ord(character) >= 0x3000 or 0x590 <= ord(character) < 0x700  # East Asian; Hebrew and Arabic
