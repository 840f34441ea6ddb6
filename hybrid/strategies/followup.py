"""What a conversation asks a corpus for: by rules, off the engine, before anything is searched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from hybrid.types.request import Message

#: a longer message says itself what it is about
_SHORT = 8
_WORD = re.compile(r"\w+(?:['’]\w+)?")
#: what points back, and what asks for more, in the languages whose small words are known below
_BACK = frozenset(
    "it its he him his she her hers they them their theirs this that these those there one ones same "  # noqa: SIM905
    "er sie es ihn ihm ihr ihre sein seine davon darüber dazu dort das dieser diese dieses "
    "il elle ils elles lui leur cela ça celui celle y en él ella ellos ellas eso esto esse essa isso".split()
)
_MORE = frozenset(
    "why how what who when where which whose whom more else also again please tell explain elaborate continue go on "  # noqa: SIM905
    "mean example examples detail details yes no ok okay and then thanks really sure "
    "warum wie was wer wann wo mehr noch auch bitte beispiel genauer weiter ja nein "
    "pourquoi comment quoi qui quand où plus encore exemple por qué cómo quién cuándo dónde más ejemplo".split()
)


@cache
def _small() -> frozenset[str]:
    """Words without content of their own."""
    from bm25s import stopwords as known

    lists = (known.STOPWORDS_EN_PLUS, known.STOPWORDS_GERMAN, known.STOPWORDS_FRENCH, known.STOPWORDS_SPANISH)
    return _BACK | _MORE | frozenset(word for words in lists for word in words)


def search_query(messages: Sequence[Message]) -> str:
    """What to search for: the question of the last user message, with the one before it where it leans on that.

    A message leans on the one before when it has no content word of its own, or is short and points back ("when was
    it built?"). The question is what follows the last blank line: before it stands a task's instruction.
    """
    asked = [bare(message.text) for message in messages if message.role == "user"]
    if not asked:
        return ""
    parts = [asked[-1]]
    for before in reversed(asked[:-1]):
        if not leans(parts[0]):
            break
        parts.insert(0, before)
    return "\n".join(part for part in parts if part)


def bare(text: str) -> str:
    """The last paragraph of a message."""
    return text.strip().rsplit("\n\n", 1)[-1].strip()


def leans(text: str) -> bool:
    """Whether a message cannot be understood without the one before it."""
    words = [word.casefold() for word in _WORD.findall(text)]
    if all(word in _small() for word in words):
        return True
    return len(words) <= _SHORT and any(word in _BACK for word in words)
