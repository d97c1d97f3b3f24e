"""Questions and requests that lie outside the small checkpoint's world, drawn from patterns and everyday words.

They teach it to say that it does not know; talk among people, to keep silent. The figures for the card are measured on
sentences that were written by hand (`outside.txt`), none of which is drawn here.
"""

from random import Random

_THINGS = (
    "music song movie book game train bus ticket car phone computer house door window bread cheese rice pizza soup "
    "coffee tea milk water wine dinner lunch breakfast recipe cake chicken fish dog cat horse bird tree flower sun "
    "moon star earth ocean bank money price market shop school teacher student doctor hospital medicine pain headache "
    "sleep dream war peace history science physics chemistry biology math poem story letter email message "
    "meeting calendar birthday party wedding holiday flight airport passport map road bridge city country president "
    "king queen football tennis news radio television camera battery internet password file folder printer robot "
    "engine fire snow rain wind storm language word sentence number color size age reason meaning life death "
    "love god government law tax job boss office contract budget report project plan idea problem answer question"
).split()
_PLACES = (
    "new york,brazil,china,india,canada,mexico,australia,sweden,turkey,greece,africa,europe,amsterdam,vienna,chicago,"
    "california,texas,boston,dublin,prague,warsaw,athens,poland,ireland,austria,the moon,mars,the north pole,my town,"
    "this street,the world,hong kong,singapore,los angeles,budapest,denmark,finland,korea,peru,kenya"
).split(",")
_PEOPLE = (
    "my mother,my father,my brother,my sister,john,mary,peter,anna,the doctor,the police,my boss,my wife,my husband,"
    "einstein,mozart,shakespeare,the president,the king of spain,napoleon,my friend,my neighbor,tom,lucy,david,sarah"
).split(",")
_DEEDS = (
    "cook,bake,fix,build,buy,sell,find,learn,play,write,read,translate,open,close,clean,paint,draw,explain,describe,"
    "download,print,delete,copy,save,send,order,book,cancel,compare,measure,wash,cut,grow,feed,teach,remember,forget"
).split(",")
_QUALITIES = (
    "big,small,tall,heavy,fast,expensive,cheap,old,new,good,bad,healthy,dangerous,famous,important,difficult,easy,"
    "beautiful,strong,deep,far,long,popular,sweet,bitter,cold,hot,bright,dark,loud"
).split(",")
_PATTERNS = (
    "what is THING", "what is a THING", "what is the meaning of THING", "what is the best THING", "what time is it",
    "what is the price of THING", "what is the capital of PLACE", "how is the weather in PLACE", "who is PERSON",
    "what is the weather in PLACE", "what is the opposite of THING", "who invented the THING", "who wrote the THING",
    "who won the THING", "where is PLACE", "where can i DEED a THING", "where is my THING", "where is PERSON",
    "when is the next THING", "when was the THING", "when does the THING open", "why is the THING QUALITY",
    "why do people DEED THING", "why is the sky blue", "how do i DEED a THING", "how do you DEED THING",
    "how QUALITY is PLACE", "how QUALITY is the THING", "how many people live in PLACE", "how much does a THING cost",
    "how long does it take to DEED a THING", "can you DEED a THING", "can you DEED the THING for PERSON",
    "could you DEED my THING", "would you like some THING", "do you like THING", "do you know PERSON",
    "do you have a THING", "are you a THING", "are you QUALITY", "is the THING QUALITY", "is it QUALITY in PLACE",
    "is PERSON at home", "should i DEED the THING", "will it rain in PLACE", "tell me about THING",
    "tell me about PLACE", "tell me a THING", "tell me the news", "give me a THING", "show me the THING",
    "play some THING", "play the THING", "call PERSON", "send a THING to PERSON", "write a THING about THING",
    "write a THING for PERSON", "read me the THING", "translate THING into french", "spell THING", "define THING",
    "explain THING to me", "search for THING", "find a QUALITY THING", "open the THING", "close the THING",
    "remind me to DEED the THING", "add THING to my list", "order a THING", "buy THING", "book a THING to PLACE",
    "turn up the THING", "turn off the THING", "turn on the THING", "set the THING", "make a THING",
    "make me a QUALITY THING", "take a THING", "start the THING", "i want to DEED a THING", "i need a QUALITY THING",
    "i would like to DEED THING", "i am looking for a THING", "help me DEED the THING", "let us DEED a THING",
    "what do you think about THING", "what should i DEED", "which THING is the best", "which THING should i DEED",
    "how do i get to PLACE", "how old is PERSON", "what does THING mean", "what happened in PLACE",
    "calculate the THING", "repeat the THING", "please DEED the THING", "please DEED PERSON", "what is your THING",
)  # fmt: skip
# What people say to each other, which is not for the assistant.
_TALK = (
    "i saw PERSON at the THING", "PERSON is coming for dinner tonight", "we bought a QUALITY THING yesterday",
    "did PERSON like the THING", "where did you put the THING", "give it to PERSON please",
    "i told you about the THING", "she wants to DEED the THING", "he said the THING was too QUALITY",
    "they moved to PLACE last year", "we are going to PLACE in the summer", "my THING is broken again",
    "do not forget the THING", "are you coming or not", "you have to DEED it first",
    "that THING was not QUALITY at all", "let me see", "wait a minute", "i will be right back",
    "have you talked to PERSON", "what did PERSON say about the THING", "could you pass me the THING darling",
    "and then PERSON came in with a THING", "it is getting late", "i am so tired today",
    "no not that one the other THING", "the THING in PLACE is QUALITY", "who left the THING on the THING",
    "turn around so i can see you", "we never DEED anything together", "i have been to PLACE twice",
    "put the THING next to the THING",
)  # fmt: skip
_SLOTS = {"THING": _THINGS, "PLACE": _PLACES, "PERSON": _PEOPLE, "DEED": _DEEDS, "QUALITY": _QUALITIES}


def draw(rng: Random) -> str:
    """One question or request, in lower case without punctuation."""
    return _filled(rng, rng.choice(_PATTERNS))


def draw_talk(rng: Random) -> str:
    """One sentence of a conversation among people."""
    return _filled(rng, rng.choice(_TALK))


def _filled(rng: Random, pattern: str) -> str:
    return " ".join(rng.choice(_SLOTS[word]) if word in _SLOTS else word for word in pattern.split())
