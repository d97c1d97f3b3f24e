"""The text decoder on real weights: SmolLM2 chats sensibly, and exactly as an independent implementation does."""

import numpy as np
import pytest

from runtime.conversation import Choices, Conversation
from runtime.engine import Engine
from runtime.events import ReplyDone
from runtime.prompt import Text
from tests.smollm2 import Reference, bundle, gguf_path

QUESTIONS = [
    "What is the capital of France?",
    "How many days does a week have?",
    "Name three colours.",
    "What do bees make?",
    "Translate 'good morning' into Spanish.",
    "Which planet do we live on?",
    "Is fire hot or cold?",
    "Write one sentence about the sea.",
    "What is two plus two?",
    "Who wrote Romeo and Juliet?",
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(bundle())


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(gguf_path())


def ask(conversation: Conversation, question: str, max_new: int = 16) -> ReplyDone:
    *_, done = conversation.reply([Text(question)], Choices(greedy=True, max_new=max_new))
    assert isinstance(done, ReplyDone)
    return done


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_tokens_are_those_of_an_independent_implementation(
    engine: Engine, reference: Reference, question: str
) -> None:
    conversation = Conversation.open(engine)
    prompt = len(engine.format.open_conversation().ids) + len(engine.format.user_turn([Text(question)], False).ids)
    ask(conversation, question)
    ids = np.array(conversation.context.ids)
    expected = reference.logits(ids[:-1]).argmax(-1)
    np.testing.assert_array_equal(ids[prompt:], expected[prompt - 1 :])


def test_logits_agree_to_a_thousandth(engine: Engine, reference: Reference) -> None:
    prompt = engine.format.user_turn([Text(QUESTIONS[0])], False)
    context = engine.context()
    context.append(prompt)
    ours = engine.session("lm_head").run(hidden=context.hidden())["logits"][0]
    assert np.abs(ours - reference.logits(prompt.ids)[-1]).max() < 1e-3


def test_a_second_question_is_understood_from_the_first(engine: Engine) -> None:
    conversation = Conversation.open(engine)
    assert "Paris" in ask(conversation, "What is the capital of France?").text
    assert "Rome" in ask(conversation, "And of Italy?").text


def test_a_conversation_reads_only_what_is_new(engine: Engine) -> None:
    conversation = Conversation.open(engine)
    first, second = ask(conversation, QUESTIONS[0]), ask(conversation, QUESTIONS[2])
    assert second.timings.prompt_positions < first.timings.prompt_positions
    whole = engine.context()
    whole.append(engine.format.open_conversation())
    for question, text in ((QUESTIONS[0], first.text), (QUESTIONS[2], None)):
        whole.append(engine.format.user_turn([Text(question)], False))
        if text is not None:
            whole.append(engine.format.close_assistant([Text(text)], spoken=False))
    assert conversation.context.ids[: len(whole.ids)] == whole.ids
