"""Secrets and personal data in texts, by their form and their check digits. What is found leaves this module masked."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """`words`: one of them stands in every text that has one (the cheap look before the expression). `check`: of the match, the part
    that really is one, or None. The group `it`, where there is one, is the part that is masked."""

    name: str
    words: tuple[str, ...]
    form: re.Pattern[str]
    check: Callable[[str], str | None] = lambda found: found


def _mixed(found: str) -> str | None:
    """A key of random characters, not a word or a placeholder: letters and digits, and at least 3 bits a character."""
    if not (any(c.isdigit() for c in found) and any(c.isalpha() for c in found)):
        return None
    counts = Counter(found)
    bits = -sum(n / len(found) * math.log2(n / len(found)) for n in counts.values())
    return found if bits >= 3 else None


def _password(found: str) -> str | None:
    """What is no placeholder."""
    placeholder = found[0] in "<[{$%*" or re.fullmatch(r"(?i)(?:your|my|the)?[_-]?(?:pass|passwd|password|pw|pwd|secret|token|key)|x+", found)
    return None if placeholder else found


def _card(found: str) -> str | None:
    """A number of 13 to 19 digits that a card network gives out (it begins with 2 to 6), with Luhn's check digit."""
    from stdnum import luhn

    digits = re.sub(r"\D", "", found)
    return found if digits[0] in "23456" and len(set(digits)) > 1 and luhn.is_valid(digits) else None


def _iban(found: str) -> str | None:
    """The longest beginning that is an IBAN: length and form as its country says, with the check digits of ISO 7064."""
    from stdnum import iban

    groups = re.findall(r"[A-Z0-9]+ ?", found)
    for many in range(len(groups), 0, -1):
        part = "".join(groups[:many]).rstrip()
        if iban.is_valid(part, check_country=False):
            return part
    return None


def _phone(found: str) -> str | None:
    digits = re.sub(r"\D", "", found)
    return found if 8 <= len(digits) <= 15 and len(set(digits)) > 2 else None


def _kind(name: str, words: str, form: str, check: Callable[[str], str | None] = lambda found: found) -> Kind:
    return Kind(name, tuple(words.split()), re.compile(form), check)


#: 13 to 19 digits, in one piece, in fours, or as American Express writes them; not the inner part of an IBAN.
CARD = r"(?<![\w.+-])(?<![A-Z]{2}\d\d )(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{1,3})?|\d{4}([ -])\d{6}\2\d{5})(?![\w-]|\.\d| \d)"

SECRETS = (
    _kind("private key", "-----BEGIN", r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?P<it>(?s:.*?))(?=-----END|\Z)"),
    _kind("AWS key", "AKIA ASIA ABIA ACCA", r"\b(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}\b"),
    _kind("GitHub token", "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_", r"\b(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255})\b"),
    _kind("GitLab token", "glpat-", r"\bglpat-[\w-]{20,}"),
    _kind("Slack token", "xox", r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),
    _kind("Google API key", "AIza", r"\bAIza[\w-]{35}(?![\w-])"),
    _kind("API key", "sk-", r"(?<![\w-])sk-(?:[a-z]+-)*(?=[\w-]*\d)[\w-]{20,}", _mixed),
    _kind("Stripe key", "k_live_ k_test_", r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,}\b"),
    _kind("Hugging Face token", "hf_", r"\bhf_[A-Za-z0-9]{30,}\b", _mixed),
    _kind("npm token", "npm_", r"\bnpm_[A-Za-z0-9]{36}\b"),
    _kind("package index token", "pypi-", r"\bpypi-[\w-]{50,}"),
    _kind("SendGrid key", "SG.", r"\bSG\.[\w-]{22}\.[\w-]{43}(?![\w-])"),
    _kind("JSON web token", "eyJ", r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"),
    _kind("password in an address", "://", r"\b[a-z][a-z0-9+.-]*://[^\s/:@]+:(?P<it>[^\s/@]{3,})@[\w.-]+", _password),
    _kind(
        "assigned key",
        "key Key KEY token Token TOKEN secret Secret SECRET",
        r"(?i)(?:api|access|auth|secret|private|client)[_-]?(?:access[_-]?)?(?:key|token|secret)[\"']?\s*[:=]\s*[\"']?(?P<it>[\w+/=.-]{16,})",
        _mixed,
    ),
)
PERSONAL = (
    _kind("e-mail address", "@", r"(?<![\w.%+-])[A-Za-z0-9][\w.%+-]*@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,24}\b"),
    _kind("IBAN", "", r"\b[A-Z]{2}\d{2} ?[A-Z0-9]{4}(?: ?[A-Z0-9]{1,4}){2,7}\b", _iban),
    _kind("card number", "", CARD, _card),
    _kind("telephone number", "", r"(?<![\w+])\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,5}(?:[ .-]?\d{2,5}){1,4}(?![\w-]|[.,]\d)", _phone),
    _kind("telephone number", "", r"(?<![\w.+$-])(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[.-])\d{3}[.-]\d{4}(?![\w-]|[.,]\d)", _phone),
    _kind("telephone number", "", r"(?<![\w.,+$/-])(?:\(0\d{2,4}\) ?|0\d{2,4}[ /-])\d{6,9}(?![\w-]|[.,/]\d)", _phone),
)
SIGNS = tuple(dict.fromkeys(word for kind in SECRETS for word in kind.words))
#: Texts without it hold no number of 8 digits, however they are grouped.
DIGITS = re.compile(r"\d(?:[ ().+/A-Z-]{0,3}\d){7}")


def private(text: str) -> list[tuple[str, bool, str]]:
    """(kind, whether it is a secret, masked) of everything private in a text, in the order of the text."""
    return [(kind, secret, masked) for kind, secret, masked, _, _ in _found(text)]


def scrubbed(text: str) -> str:
    """A text in which all of it is masked: the only form in which a row's text may be shown or stored."""
    for _, _, masked, start, end in reversed(_found(text)):
        text = text[:start] + masked + text[end:]
    return text


def mask(found: str, shown: int) -> str:
    """The first `shown` characters and the punctuation; every other letter and digit is a star. At most 40 characters."""
    return found[:shown] + re.sub(r"\w", "*", found[shown:40]) + ("..." if len(found) > 40 else "")


def _found(text: str) -> list[tuple[str, bool, str, int, int]]:
    """(kind, secret, masked, start, end); what one kind has found is not found again by a later one."""
    numbers = DIGITS.search(text) is not None
    groups = [(PERSONAL, False)] if numbers or "@" in text else []
    for word in SIGNS:
        if word in text:
            groups = [(SECRETS, True), (PERSONAL, False)]
            break
    found: list[tuple[str, bool, str, int, int]] = []
    taken: list[tuple[int, int]] = []
    for kinds, secret in groups:
        for kind in kinds:
            if not (any(word in text for word in kind.words) if kind.words else numbers):
                continue
            name: int | str = "it" if "it" in kind.form.groupindex else 0
            for match in kind.form.finditer(text):
                part = kind.check(match[name])
                if part is None and secret:
                    taken.append(match.span(name))  # a placeholder: nothing else is in it
                if part is None:
                    continue
                start = match.start(name)
                end = start + len(part)
                if not any(start < until and since < end for since, until in taken):
                    taken.append((start, end))
                    found.append((kind.name, secret, mask(part, 0 if name else 2), start, end))
    return sorted(found, key=lambda one: one[3])
