"""The table that decides who speaks: whole, reachable, no row that can never be followed; and the rules before it."""

import pytest

from runtime.live.answering import Answering
from runtime.live.duplex import Duplex
from runtime.live.events import State
from runtime.live.gate import by_rule, words
from runtime.live.turn_taking import ALL, BACK, GUARDS, SAME, TABLE, Facts, row_for


def test_every_action_of_the_table_can_be_done_and_every_guard_is_known() -> None:
    missing = {action for row in TABLE for action in row.actions if not hasattr(Duplex, f"_do_{action}")}
    assert not missing
    assert {row.guard for row in TABLE} == set(GUARDS)


def test_no_action_is_written_that_the_table_does_not_order() -> None:
    ordered = {f"_do_{action}" for row in TABLE for action in row.actions}
    assert {name for name in dir(Duplex) if name.startswith("_do_")} == ordered


def test_every_state_is_reached_and_left() -> None:
    reached: set[State | str] = {"IDLE"}
    while more := {row.next for row in TABLE if set(row.states) & reached} - {SAME, BACK} - reached:
        reached |= more
    assert reached == {*ALL, "CLOSED"}
    assert all(any(state in row.states and row.next != SAME for row in TABLE) for state in ALL)


def test_no_row_stands_behind_one_that_always_holds() -> None:
    for index, row in enumerate(TABLE):
        before = [r for r in TABLE[:index] if r.event == row.event and not r.guard]
        hidden = {state for state in row.states if any(state in r.states for r in before)}
        assert hidden != set(row.states), row


@pytest.mark.parametrize("state", ["HEAR", "GATE", "R_HEAR", "R_GATE"])
def test_whoever_waits_for_a_person_can_be_reset_and_typed_to(state: State) -> None:
    assert row_for(state, "RST") is not None
    assert row_for(state, "TXT") is not None


def test_an_echo_is_ignored_and_a_voice_is_not() -> None:
    ignored, heard = row_for("SPEAK", "V_ON", Facts(echo=True)), row_for("SPEAK", "V_ON")
    assert ignored is not None and ignored.actions == ("ignore_speech",)
    assert heard is not None and heard.next == "R_HEAR"


@pytest.mark.parametrize(
    ("said", "played", "voiced", "speaking", "expected"),
    [
        ("mm-hm", "", 300, True, "BACKCHANNEL"),
        ("嗯", "", 300, True, "BACKCHANNEL"),
        ("yeah okay", "", 500, True, "BACKCHANNEL"),
        ("hello", "", 500, True, "BACKCHANNEL"),
        ("hello", "", 500, False, None),
        ("yeah okay", "", 900, True, None),
        ("mm-hm", "", 300, False, None),
        ("stop", "", 400, True, "STOP"),
        ("Wait!", "", 400, True, "STOP"),
        ("等一下", "", 500, True, "STOP"),
        ("stop the timer", "", 700, True, None),
        ("the kitchen light", "the kitchen light is on", 700, True, "ECHO"),
        ("the garden light", "it is five", 700, True, None),
        (None, "the kitchen light is on", 300, True, None),
        ("", "", 300, True, None),
    ],
)
def test_rules_come_before_the_model(said, played, voiced, speaking, expected) -> None:
    assert by_rule(said, played, voiced, 800, speaking) == expected


def test_a_chinese_character_is_a_word() -> None:
    assert words("好的 okay, it's fine") == ["好", "的", "okay", "it's", "fine"]


def test_answering_stands_on_listening_and_not_the_other_way_round() -> None:
    assert not any(
        name in vars(base) for base in Answering.__mro__[1:] for name in vars(Answering) if name[:4] == "_do_"
    )
