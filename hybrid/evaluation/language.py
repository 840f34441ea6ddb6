"""Which language a text is in: by its script, and among Latin ones by its most common little words.

Coarse on purpose: it tells an English answer from one in another language without a trained model.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping

#: the word that begins a letter's Unicode name → the language that is written so (the most spoken where several are)
_SCRIPTS: Mapping[str, str] = {
    "ARABIC": "ar", "BENGALI": "bn", "CYRILLIC": "ru", "DEVANAGARI": "hi", "GREEK": "el", "GUJARATI": "gu",
    "GURMUKHI": "pa", "HANGUL": "ko", "HEBREW": "he", "HIRAGANA": "ja", "KATAKANA": "ja", "CJK": "zh",
    "KANNADA": "kn", "MALAYALAM": "ml", "TAMIL": "ta", "TELUGU": "te", "THAI": "th",
}  # fmt: skip

#: letters that one language of a shared script has and the most spoken one has not
_LETTERS: Mapping[str, Mapping[str, str]] = {
    "ru": {"uk": "іїєґ", "bg": ""},
    "ar": {"fa": "پچژگ", "ur": "ٹڈڑںے"},
    "hi": {"mr": "ळ", "ne": ""},
    "zh": {"ja": ""},
}

_WORDS: Mapping[str, frozenset[str]] = {
    code: frozenset(words.split())
    for code, words in {
        "en": "the and of to in is that it for you with on as are this be was have not by at from your or an we i "
              "my if but they will can so what all when there has their me do would about no our",
        "de": "der die das und ist nicht ein eine zu den mit von für auf sich im dem auch es an als wie bei ich wir",
        "es": "de la que el en y los se del las un por con no una su para es al lo como más pero sus le ya o este sí",
        "fr": "de la le et les des en un du une que est pour qui dans par plus pas au sur ne se ce il sont avec je",
        "it": "di che e la il un a per in una sono mi ho non ma lo ha le si con da del è come più gli nel della",
        "pt": "de que e o a do da em um para é com não uma os no se na por mais as dos como mas foi ao ele das à",
        "nl": "de van een het en in is dat op te zijn met voor niet aan er om ook als dan maar bij of uit naar",
        "pl": "i w nie na z się do to że jest o jak a po co tak za ale od czy przez dla tym są był",
        "fi": "ja on ei se että hän oli mutta niin kuin tai myös joka ovat sen kun olen minä",
        "sw": "ya na wa kwa ni katika la za cha kuwa hii yake kama watu hiyo pia lakini",
        "vi": "và của là có trong cho không một được các với người những này để đã khi",
        "tr": "ve bir bu da için ile çok olarak daha gibi ne var ben o değil",
    }.items()
}  # fmt: skip


def language_of(text: str) -> str | None:
    """The ISO 639-1 code of a text's language; None for a text without letters."""
    letters = [c for c in text if c.isalpha()]
    if not letters:
        return None
    scripts = Counter(unicodedata.name(c, "UNKNOWN").split()[0].split("-")[0] for c in letters)
    script = scripts.most_common(1)[0][0]
    if {"HIRAGANA", "KATAKANA"} & set(scripts) and script == "CJK":
        return "ja"
    if script != "LATIN":
        code = _SCRIPTS.get(script)
        return next((n for n, own in _LETTERS.get(code or "", {}).items() if set(own) & set(text)), code)
    return _latin(text)


def _latin(text: str) -> str:
    """The language whose little words occur most; English where none stands out, as in lists of names."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    counts = {code: sum(word in known for word in words) for code, known in _WORDS.items()}
    best = max(counts.values())
    return "en" if counts["en"] == best else next(code for code, count in counts.items() if count == best)
