"""A Jinja chat template as the strings that it puts around each turn, compared with what the template renders."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tokenizers import AddedToken, Tokenizer

from export.families.rendering import DATE, DATE_END, ChatTemplate, Message
from export.tokenizer_files import opened
from runtime.bundle import TODAY, PromptTemplate
from runtime.errors import CheckpointError

Role = Literal["system", "user", "assistant"]
SYSTEM, USER, ANSWER, NEXT = "\ue001", "\ue002", "\ue003", "\ue004"  # private-use marks that no template contains
REASONED = "</think>"  # ends the reasoning of an answer
BLANKS = "\t \t"  # around a text, to see whether the template takes them away
ROLES: dict[str, Role] = {SYSTEM: "system", USER: "user", ANSWER: "assistant"}


def template_strings(source: str, tokens: Mapping[str, str], tokenizer_json: str) -> PromptTemplate:
    """The PromptTemplate that gives the same prompts as the Jinja template `source`.

    `tokens` are bos_token and such, as the template may spell them. Several conversations are put together from the
    strings and compared with what the template renders; CheckpointError says where they differ. A template that takes
    no system turn, or treats one in a way that strings cannot, gives a PromptTemplate without.
    """
    chat, added = ChatTemplate(source, tokens), Added(tokenizer_json)
    try:
        strings = _checked(_cut_out(chat, added, tokens.get("bos_token", ""), True), chat, added, True)
    except CheckpointError:
        strings = _checked(_cut_out(chat, added, tokens.get("bos_token", ""), False), chat, added, False)
    return _dated(strings, source)


class Added:
    """The added tokens of a tokenizer.json: a string is cut between them and between characters, never inside one."""

    def __init__(self, tokenizer_json: str):
        self.tokenizer = opened(tokenizer_json)
        found = self.tokenizer.get_added_tokens_decoder()
        self.ids = {token.content: i for i, token in found.items()}
        # The runtime looks for them before a text is normalised; so does transformers, whose own files say so too.
        if normalised := [token for token in found.values() if token.normalized]:
            self.tokenizer = Tokenizer.from_str(tokenizer_json)
            self.tokenizer.add_special_tokens([_unnormalised(token) for token in normalised])
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._atoms = re.compile("|".join([*map(re.escape, longest_first), "."]), re.DOTALL)

    def atoms(self, string: str) -> list[str]:
        return self._atoms.findall(string)

    def named_in(self, string: str) -> list[int]:
        """Ids of the added tokens that a string spells out, in order."""
        return [self.ids[atom] for atom in self.atoms(string) if atom in self.ids]

    def found_in(self, prompt: str) -> list[int]:
        """As `named_in`, by the tokenizer itself, with its rules of what may stand beside a token."""
        known = set(self.ids.values())
        return [i for i in self.tokenizer.encode(prompt, add_special_tokens=False).ids if i in known]


def _unnormalised(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        special=True,
        normalized=False,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
    )


def _cut_out(chat: ChatTemplate, added: Added, bos: str, with_system: bool) -> PromptTemplate:
    """The strings around the marks of two rendered conversations; what they promise is not checked here."""
    opening, to_answer = _cut(chat.render([_user(USER)]), USER)
    _, rest = _cut(chat.render([_user(USER), _answer(ANSWER), _user(NEXT)]), USER)
    before_given, rest = _cut(rest, ANSWER)
    between, _ = _cut(rest, NEXT)
    opens = to_answer.removeprefix(before_given) if to_answer.startswith(before_given) else ""
    to_answer = to_answer.removesuffix(opens)
    if not before_given.startswith(to_answer):
        raise CheckpointError(
            f"the chat template lets an answer begin behind {to_answer!r}, and writes it into a history behind "
            f"{before_given!r}: a conversation cannot be continued, this template is not supported"
        )
    closing = _closing(chat, added, between)
    trimmed = tuple(_trimmed(chat, with_system))
    before_system, system_to_user = _around_system(chat) if with_system else ("", opening)
    before_user = _common_end(added, between.removeprefix(closing), opening, system_to_user)
    start, after_system = opening.removesuffix(before_user), system_to_user.removesuffix(before_user)
    strings = PromptTemplate(
        system=None,
        user=(before_user, ""),
        assistant=(to_answer, between.removesuffix(before_user)),
        begin=start,
        given_answer=before_given.removeprefix(to_answer),
        opens_answer=opens,
        forgets=REASONED if _forgets(chat) else None,
        trimmed=trimmed,
        blanks_behind_system=with_system and "user" in trimmed and _keeps_blanks(chat),
    )
    return _with_system(strings, added, bos, (before_system, after_system)) if with_system else strings


def _with_system(strings: PromptTemplate, added: Added, bos: str, around: tuple[str, str]) -> PromptTemplate:
    """`strings`, whose `begin` is all that comes before a first turn without a system turn, and the system turn."""
    start, (before, after) = strings.begin, around
    text = start[len(before) : len(start) - len(after)]
    if any(around) and start == before + text + after and not added.named_in(text):
        # Of some tokenizers the begin-of-text token is the one that begins every turn.
        begin = bos if bos and start.startswith(bos) and not strings.user[0].startswith(bos) else ""
        return replace(strings, begin=begin, system=(before.removeprefix(begin), after), default_system=text)
    begin = _common_start(added, start, before)
    return replace(
        strings, begin=begin, no_system=start.removeprefix(begin), system=(before.removeprefix(begin), after)
    )


def _around_system(chat: ChatTemplate) -> tuple[str, str]:
    before, rest = _cut(chat.render([_system(SYSTEM), _user(USER)]), SYSTEM)
    return before, _cut(rest, USER)[0]


def _closing(chat: ChatTemplate, added: Added, between: str) -> str:
    """What of the string between an answer and the next turn belongs to the answer."""
    try:
        whole = chat.render([_user(USER), _answer(ANSWER)], to_answer=False)
        if between.startswith(closing := _cut(whole, ANSWER)[1]):
            return closing
    except CheckpointError:
        pass
    atoms = added.atoms(between)
    first = next((index for index, atom in enumerate(atoms) if atom in added.ids), -1)
    return "".join(atoms[: first + 1])


def _trimmed(chat: ChatTemplate, with_system: bool) -> Iterator[Role]:
    """Whose texts the template takes the blanks around away from."""
    turns = [_user(BLANKS + USER + BLANKS), _answer(BLANKS + ANSWER + BLANKS), _user(NEXT)]
    prompts = {role: chat.render(turns) for role in ROLES.values()}
    if with_system:
        prompts["system"] = chat.render([_system(BLANKS + SYSTEM + BLANKS), *turns])
    for mark, role in ROLES.items():
        if mark in prompts[role] and BLANKS + mark not in prompts[role] and mark + BLANKS not in prompts[role]:
            yield role


def _forgets(chat: ChatTemplate) -> bool:
    """Whether the template leaves the reasoning of an earlier answer out."""
    turns = [[_user(USER), _answer(said), _user(NEXT)] for said in (f"{SYSTEM}{REASONED}{ANSWER}", ANSWER)]
    return chat.render(turns[0]) == chat.render(turns[1])


def _keeps_blanks(chat: ChatTemplate) -> bool:
    """Whether blanks ahead of a user's first text stay where a system turn is: both may be trimmed as one text."""
    return BLANKS + USER in chat.render([_system(SYSTEM), _user(BLANKS + USER)])


@dataclass(frozen=True)
class Turns:
    """A conversation that ends in a question."""

    system: str | None
    users: tuple[str, ...]
    answers: tuple[str, ...]

    def messages(self) -> list[Message]:
        system = [] if self.system is None else [_system(self.system)]
        given = [turn for u, a in zip(self.users, self.answers, strict=False) for turn in (_user(u), _answer(a))]
        return [*system, *given, _user(self.users[-1])]


SAID = ("Who are you?", "And how many days\nhas a week", "Add 1 and 2.")
SAMPLES = (
    ("it is put together from turns", Turns(None, SAID, ("A model.", "Seven:\n\n1. Monday"))),
    ("it has no answer yet", Turns(None, SAID[:1], ())),
    ("blanks are around its texts", Turns(None, ("  a b \n", "\n\nc\t"), (" d\n",))),
    ("its texts are single letters", Turns(None, ("a", "a", "a"), ("a", "a"))),
    ("an answer holds </think>", Turns(None, SAID, ("<think>\nHm.\n</think>\n\nA model.", "Hm.</think>Seven."))),
)
SYSTEMS = ("Be brief.", " Answer\nin one word. \n")


def _checked(strings: PromptTemplate, chat: ChatTemplate, added: Added, with_system: bool) -> PromptTemplate:
    """`strings`, once conversations put together from them were what the template renders, token by token."""
    for when, turns in SAMPLES:
        for system in SYSTEMS if with_system else (None,):
            _compare(strings, chat, added, replace(turns, system=system), when)
        _compare(strings, chat, added, turns, when)
    return strings


def _compare(strings: PromptTemplate, chat: ChatTemplate, added: Added, turns: Turns, when: str) -> None:
    whole, pieces = chat.render(turns.messages()), list(_pieces(strings, turns))
    joined = "".join(text for text, _ in pieces)
    if joined != whole:
        raise CheckpointError(
            f"the chat template writes a conversation otherwise where {when}: {_difference(joined, whole)}; "
            "a template that changes texts or earlier turns is not supported"
        )
    named = [i for text, ours in pieces if ours for i in added.named_in(text)]
    spelled = [i for text, ours in pieces if not ours for i in added.named_in(text)]
    if not spelled and named != added.found_in(whole):
        raise CheckpointError(
            f"the tokenizer finds other special tokens in a prompt, {added.found_in(whole)}, than the pieces of the "
            f"chat template name, {named}: an added token has rules that are not supported"
        )


def _pieces(strings: PromptTemplate, turns: Turns) -> Iterator[tuple[str, bool]]:
    """A conversation as the runtime puts it together: texts, and whether each is the template's own."""
    yield strings.begin, True
    yield from _system_pieces(strings, strings.default_system if turns.system is None else turns.system)
    kept = strings.blanks_behind_system and turns.system is not None
    for index, user in enumerate(turns.users):
        yield strings.user[0], True
        yield user.rstrip() if kept and index == 0 else _as_read(strings, "user", user), False
        opens = "" if index < len(turns.answers) else strings.opens_answer
        yield strings.user[1] + strings.assistant[0] + opens, True
        if index < len(turns.answers):
            yield strings.given_answer, True
            yield _as_read(strings, "assistant", turns.answers[index]), False
            yield strings.assistant[1], True


def _system_pieces(strings: PromptTemplate, text: str | None) -> Iterator[tuple[str, bool]]:
    if text is None or strings.system is None:
        yield strings.no_system, True
    else:
        yield strings.system[0], True
        yield _as_read(strings, "system", text), False
        yield strings.system[1], True


def _as_read(strings: PromptTemplate, role: Role, text: str) -> str:
    if role == "assistant" and strings.forgets is not None:
        text = text.split(strings.forgets)[-1]
    return text.strip() if role in strings.trimmed else text


def _difference(ours: str, whole: str) -> str:
    """Both texts from where they differ."""
    same = _same(ours, whole)
    return f"{ours[same : same + 40]!r} instead of {whole[same : same + 40]!r}"


def _dated(strings: PromptTemplate, source: str) -> PromptTemplate:
    """`strings` with TODAY for a date; only what comes before the first turn may name one, in one way of writing."""
    opening = [strings.begin, strings.no_system, *(strings.system or ())]
    forms = {form for string in opening for form in re.findall(f"{DATE}(.*?){DATE_END}", string, re.DOTALL)}
    later = "".join([*strings.user, *strings.assistant, strings.given_answer, strings.opens_answer])
    if not forms and DATE not in later:
        return strings
    if DATE in later or len(forms) > 1 or TODAY in source:
        raise CheckpointError("the chat template writes the date into later turns or in several ways; not supported")
    dated: Callable[[str], str] = lambda string: re.sub(f"{DATE}.*?{DATE_END}", TODAY, string, flags=re.DOTALL)  # noqa: E731
    system = strings.system and (dated(strings.system[0]), dated(strings.system[1]))
    return replace(
        strings, begin=dated(strings.begin), no_system=dated(strings.no_system), system=system, today=forms.pop()
    )


def default_template(stated: object) -> str | None:
    """The Jinja source of what a tokenizer_config.json states as chat_template: one, or several of which one is named
    "default". CheckpointError for anything else; None where nothing is stated.
    """
    if isinstance(stated, Sequence) and not isinstance(stated, str):
        stated = {entry.get("name"): entry.get("template") for entry in stated if isinstance(entry, Mapping)}
    if isinstance(stated, Mapping):
        named, stated = stated, stated.get("default")
        if stated is None:
            raise CheckpointError(
                f"the chat templates are named {', '.join(map(repr, named))}, expected one named 'default'; "
                "put the one to use into chat_template.jinja"
            )
    if stated is not None and not isinstance(stated, str):
        raise CheckpointError(f"chat_template is {repr(stated)[:60]}, expected a Jinja template or a list of them")
    return stated or None


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _answer(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _system(content: str) -> Message:
    return {"role": "system", "content": content}


def _cut(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found or mark in after:
        raise CheckpointError(
            "the chat template does not put each turn's text into the prompt once; it is not supported"
        )
    return before, after


def _common_end(added: Added, *strings: str) -> str:
    turned = [added.atoms(string)[::-1] for string in strings]
    length = min(_same(turned[0], other) for other in turned)
    return "".join(turned[0][:length][::-1])


def _common_start(added: Added, one: str, other: str) -> str:
    atoms = added.atoms(one)
    return "".join(atoms[: _same(atoms, added.atoms(other))])


def _same(one: Sequence[str], other: Sequence[str]) -> int:
    """How many items two sequences have in common at their beginning."""
    pairs: Iterable[tuple[str, str]] = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
