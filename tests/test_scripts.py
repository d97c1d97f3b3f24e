"""Scripts of letters: another language is noticed where it is written otherwise, and only there."""

import pytest

from quant.comparison.scripts import foreign, scripts


@pytest.mark.parametrize(
    ("expected", "found", "wanted"),
    [
        ("今天天气很好。", "The weather is fine today.", "Latin for Han"),
        ("The weather is fine.", "今天天气很好。", "Han for Latin"),
        ("Hello there", "Привет мир", "Cyrillic for Latin"),
        ("これは日本語の文です", "这是一个句子", "Han for Kana"),
        ("Bonjour le monde", "Hello world", ""),  # one script: cannot be told
        ("Use numpy, 用它计算数组", "用它计算数组 numpy", ""),
        ("ＡＢＣＤ", "abcd", ""),  # full width is not another script
        ("ﾃｽﾄです", "テストです", ""),
        ("42", "Привет", ""),  # nothing was expected
        ("Hello there", "好", "Han for Latin"),
        ("Hello there", "π = 3", ""),  # one letter of an alphabet tells nothing
        ("Hello there", "", ""),
    ],
)
def test_an_answer_in_another_script_than_expected_is_foreign(expected: str, found: str, wanted: str) -> None:
    assert foreign(expected, found) == wanted


def test_only_letters_count_and_shares_add_up_to_one() -> None:
    assert scripts("a1b2，中 — 😀") == {"Latin": pytest.approx(2 / 3), "Han": pytest.approx(1 / 3)}
    assert scripts("123 !?") == {}
