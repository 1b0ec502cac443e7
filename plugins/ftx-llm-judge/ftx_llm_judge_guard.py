"""Judged text is data: what in it passes for a delimiter, a verdict or a role's tag is broken up by the mark ¦.

After inspect_ai's neutralised delimiters. Invisible characters go, and a long text is cut, so that nothing hides.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence

#: Characters of one text that a judge is shown, and how many of them are its end.
LONGEST, ENDING = 24_000, 6_000

MARK = "¦"

#: Words by which verdicts are given, here and by the judges that people know (FastChat, Prometheus, inspect_ai, G-Eval).
_NAMES = ("score", "scores", "rating", "ratings", "grade", "verdict", "winner", "helpfulness", "accuracy", "coherence")
# the second character of each class is the full-width twin of the first
_OPEN, _CLOSE, _COLON = r"[\[\uff3b]", r"[\]\uff3d]", r"[:\uff1a=\uff1d]"
_QUOTES = r"[\s\"'`*_\u201c\u201d\uff02]*"
_VALUE = r"(?:[0-9\uff10-\uff19]|(?:[abc]|tie|both|neither|correct|yes)\b)"
_ROLES = r"(?:s|sys|system|inst|user|human|assistant|model|bos|eos|start_of_turn|end_of_turn|think|answer|verdict)"
_HEADS = r"(?:start|begin|end|result|score|rating|verdict|grade|inst|system|user|assistant|question|data)"


def guard(text: str, code: str = "", names: Sequence[str] = ()) -> str:
    """A judged text as it may stand in a request: all of it visible, not too long, and nothing in it passes for what only
    we or the judge may write. `code` is the request's nonce, which is taken out; `names` are further words of verdicts.
    """
    text = cut(visible(text))
    if code:
        text = text.replace(code, MARK)
    for pattern in _imitations(tuple(names)):
        text = pattern.sub(rf"\g<0>{MARK}", text)
    return text


@functools.cache
def _imitations(names: tuple[str, ...]) -> list[re.Pattern[str]]:
    """Patterns of the part behind which the mark is put."""
    # inside a word the mark also stops those who read past punctuation
    word = rf"(?:{'|'.join(map(re.escape, (*_NAMES, *names)))})"
    patterns = [
        rf"{_OPEN}(?=\s*{_OPEN})|{_CLOSE}(?=\s*{_CLOSE})",  # [[5]]
        rf"{_OPEN}\s*(?=(?:/|the\s+)?{_HEADS}\b)",  # [RESULT] 5, [INST], [The End of Assistant A's Answer]
        rf"\b(?={word}{_QUOTES}{_COLON}{_QUOTES}(?:{_OPEN}|{MARK})*{_VALUE})\w",  # Score: 5, "helpfulness": 5, GRADE = A
        rf"\b(?={word}\s+(?:(?:is|of|should\s+be|must\s+be)\s+)?{_QUOTES}{_VALUE})\w",  # the score is 5, verdict A
        rf"<(?=\s*(?:\||/?\s*{_ROLES}\s*>|<\s*/?\s*sys))",  # <|im_start|>, </s>, <<SYS>>, <start_of_turn>
        r"[-\u2013\u2014=#*_<]{2,}[ \t]*(?=(?:the\s+)?(?:begin|end|start)\b)",  # --- END ANSWER 0123456789abcdef ---
    ]
    return [re.compile(pattern, re.IGNORECASE) for pattern in patterns]


def nonce(*parts: str, seed: int = 0) -> str:
    """The code of one request, 16 hex digits: made from all that is in it, so that the same request has the same code (and
    is found in the cache), and no text can hold the code of a request that it is part of."""
    return hashlib.sha256(json.dumps([seed, *parts]).encode()).hexdigest()[:16]


def visible(text: str) -> str:
    """Without what shows nothing but can split or hide words: controls, format characters (zero-width, soft hyphen, direction,
    tags), variation selectors, halves of surrogate pairs. Every line break becomes \\n; tabs stay."""
    text = re.sub(r"\r\n?|[\u2028\u2029\x85\x0b\x0c]", "\n", text)
    text = re.sub(r"[\ufe00-\ufe0f\U000e0100-\U000e01ef]", "", text)
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def cut(text: str) -> str:
    """At most LONGEST characters: the beginning and the end, with a line between them that says how much is left out."""
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST - ENDING]}\n\n[... {len(text) - LONGEST} characters are left out here ...]\n\n{text[-ENDING:]}"
