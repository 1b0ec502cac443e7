"""What the observer `audit` finds, fault by fault and in real data, and that no secret leaves it unmasked."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from ftx.audit import Finding, described, gate
from ftx.data import read_dataset, to_dataset
from ftx.errors import DataError
from ftx.testing import make_run
from ftx_audit import CHECKS, Audit
from ftx_audit_copies import bands_for, find_copies, jaccard, shared_lines
from ftx_audit_overlap import find_overlap
from ftx_audit_private import private, scrubbed
from ftx_audit_task import SIZES, Answers, form
from ftx_audit_text import said, shingles

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdgklmnrst"]

real = pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data beside the project")


def chat(question: str, answer: str, **more) -> dict:
    return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}], **more}


def rows_of(*rows: dict):
    """Formatted rows of data.jsonl, from line 1."""
    return to_dataset([{**row, "_file": "data.jsonl", "_line": line} for line, row in enumerate(rows, start=1)])


def sentences(count: int, length: int = 12, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=length)) for _ in range(count)]


def good(count: int = 40) -> list[dict]:
    """Rows in which there is nothing to find but that they are few."""
    texts = sentences(2 * count, seed=7)
    return [chat(f"Tell me of {one}", f"It is {other}.") for one, other in zip(texts[::2], texts[1::2], strict=True)]


def audit(rows, split: str = "train", train_rows=None, **options) -> dict[str, Finding]:
    """What is found and said, by check."""
    found = Audit(**options).audit_dataset(rows=rows, train_rows=train_rows, split=split, run=make_run())
    return {finding.details["check"]: finding for finding in found if not finding.quiet}


def quiet(rows, split: str = "train", train_rows=None, **options) -> dict[str, Finding]:
    found = Audit(**options).audit_dataset(rows=rows, train_rows=train_rows, split=split, run=make_run())
    return {finding.details["check"]: finding for finding in found if finding.quiet}


def formatted(name: str, **options):
    from ftx_formats_auto import Auto

    run = make_run()
    return Auto(**options).format_dataset(read_dataset(str(REAL / name), run.ledger), run)


def test_nothing_is_found_where_there_is_nothing():
    assert audit(rows_of(*good()), minimum_rows=10) == {}
    assert audit(rows_of(*good()), "eval", rows_of(*good(10))) == {}, "equal rows are the core's to refuse"


# ---- duplicates ----------------------------------------------------------------------------------------------------


@real
def test_the_duplicates_of_alpaca_en_demo():
    expected = json.loads((REAL / "expected.json").read_text())["alpaca_en_demo"]
    copies = find_copies(formatted("alpaca_en_demo/alpaca_en_demo.json"), 0.5)
    assert copies.near == {}, "all of them are equal to the word"
    pairs = [(a, b) for a, b, likeness in expected["near_dup_pairs_word3gram_jaccard_ge_0.5"] if likeness == 1.0]
    assert set(copies.exact) == {later for _, later in pairs} and len(copies.exact) == expected["rows"] - expected["unique_full"] == 14
    assert {(earlier, later) for later, earlier in copies.exact.items()} <= set(pairs)


@real
def test_the_same_fourteen_by_minhash_alone():
    """A word more in each row: no two are equal, and the pairs are found by their signatures and an exact comparison."""
    rows = formatted("alpaca_en_demo/alpaca_en_demo.json")
    marked = to_dataset([{**row, "completion": [{"role": "assistant", "content": f"{row['completion'][0]['content']} n{at}"}]} for at, row in enumerate(rows)])
    expected = json.loads((REAL / "expected.json").read_text())["alpaca_en_demo"]["near_dup_pairs_word3gram_jaccard_ge_0.5"]
    found = find_copies(marked, 0.5)
    assert found.exact == {} and set(found.near) == {later for _, later, _ in expected}
    assert all(0.5 <= likeness < 1 for _, likeness in found.near.values())


def test_near_duplicates_are_told_by_exact_jaccard():
    """Of rows around the threshold exactly those at or above it are found, as comparing all with all finds them."""
    rng = random.Random(3)
    rows = []
    for text in sentences(60, 40):
        words = text.split()
        rows.append(chat("Say.", text))
        for changes in (1, 2, 3, 4, 5):
            other = list(words)
            for at in rng.sample(range(len(words)), changes):
                other[at] = rng.choice(WORDS)
            rows.append(chat("Say.", " ".join(other)))
    sets = [shingles(said(row).whole) for row in rows]
    for threshold in (0.5, 0.7, 0.8):
        copies = find_copies(rows_of(*rows), threshold)
        assert copies.near and copies.left_out == 0
        for later, (earlier, likeness) in copies.near.items():
            assert earlier < later and round(jaccard(sets[earlier], sets[later]), 3) == likeness >= threshold
        alone = [at for at in range(len(rows)) if at not in copies.near]
        missed = [(a, b) for a in alone for b in alone if a < b and jaccard(sets[a], sets[b]) >= threshold]
        assert len(missed) <= 0.02 * len(copies.near), f"MinHash may miss a pair at the threshold once in a hundred times, not {len(missed)}"


def test_the_signatures_agree_with_datasketch():
    datasketch = pytest.importorskip("datasketch")
    texts = sentences(40, 30)
    texts += [text.replace(text.split()[3], "changed") for text in texts[::2]]
    lsh, kept = datasketch.MinHashLSH(threshold=0.6, num_perm=128), []
    for number, text in enumerate(texts):
        signature = datasketch.MinHash(num_perm=128)
        signature.update_batch([token.encode() for token in shingles(text)])
        if not any(jaccard(shingles(texts[other]), shingles(text)) >= 0.6 for other in lsh.query(signature)):
            kept.append(number)
        lsh.insert(number, signature)
    near = find_copies(to_dataset([{"text": text, "_file": "t", "_line": line} for line, text in enumerate(texts, start=1)]), 0.6).near
    assert sorted(near) == [number for number in range(len(texts)) if number not in kept] != []


def test_a_finding_names_the_later_row_and_what_it_repeats():
    text = sentences(1, 40)[0]
    finding = audit(rows_of(*good(), chat("Say.", text), chat("Say.", f"{text} again")))["near_duplicates"]
    assert (finding.what, finding.rows, finding.refuse) == ("near duplicates of other rows", [41], False)
    assert finding.details["pairs"] == [{"row": "data.jsonl:42", "repeats": "data.jsonl:41", "jaccard": pytest.approx(0.97, abs=0.02)}]


def test_exact_duplicates_are_the_cores_to_say():
    rows = rows_of(*good(), good()[3])
    assert "near_duplicates" not in audit(rows)
    details = quiet(rows)["near_duplicates"].details
    assert (details["exact"], details["near"], details["pairs"]) == (1, 0, [{"row": "data.jsonl:41", "repeats": "data.jsonl:4", "jaccard": 1.0}])


def test_rows_that_share_a_long_instruction_are_no_copies():
    instruction = " ".join(sentences(6, 10))
    rows = [chat(f"{instruction}\n{text}", "yes") for text in sentences(200, 8)]
    assert shared_lines(rows_of(*rows)) == {instruction}
    assert "near_duplicates" not in audit(rows_of(*rows), near_duplicate=0.5)
    assert len(shingles(instruction)) > 50, "with it, the rows would be alike"


def test_tools_tell_rows_apart():
    tools = [{"type": "function", "function": {"name": name}} for name in ("ab", "cd")]
    copies = find_copies(rows_of(*(chat("Go.", "Done it is.", tools=[tool]) for tool in tools)), 0.8)
    assert copies.exact == {} and copies.near == {1: (0, 1.0)}


def test_many_near_copies_of_one_row_are_compared_with_it_alone():
    text = sentences(1, 60)[0]
    rows = [chat("Say.", f"{text} {number}") for number in range(3000)]
    begun = time.process_time()
    copies = find_copies(rows_of(*rows), 0.8)
    assert len(copies.near) == 2999 and len({earlier for earlier, _ in copies.near.values()}) < 10
    assert time.process_time() - begun < 20


def test_bands_find_a_pair_at_the_threshold():
    for threshold in (0.5, 0.7, 0.8, 0.95):
        bands, width = bands_for(threshold)
        assert bands * width <= 128 and 1 - (1 - threshold**width) ** bands >= 0.99


# ---- overlap -------------------------------------------------------------------------------------------------------


@real
def test_gsm8k_test_questions_in_the_first_2000_training_rows():
    expected = json.loads((REAL / "expected.json").read_text())["contamination"]["gsm8k_test_questions_sharing_13gram_with_train2000"]
    train, test = formatted("gsm8k/train.first2000.jsonl"), formatted("gsm8k/test.jsonl")
    finding = audit(test, "eval", train)["overlap"]
    assert finding.rows == expected == [581, 602, 632] and not finding.refuse
    assert finding.what == "13 words in a row of a training question"
    assert [pair["row"].rpartition("/")[2] for pair in finding.details["pairs"]] == ["test.jsonl:582", "test.jsonl:603", "test.jsonl:633"]
    train_file = (REAL / "gsm8k/train.first2000.jsonl").read_text().splitlines()
    for pair, number in zip(finding.details["pairs"], finding.rows, strict=True):
        ours = json.loads(train_file[int(pair["train"].rpartition(":")[2]) - 1])["question"]
        assert shingles(ours, 13) & shingles(said(test[number]).question, 13)


def test_overlap_by_the_whole_row_by_its_question_and_by_words():
    long, short = sentences(2, 20)
    train = rows_of(*good(300), chat(f"{long} end", "a"), chat("What is Two, and two?", "four"))
    evaluation = rows_of(
        chat("what  is two, AND two?", "Four"),
        chat("What is two and two", "five"),
        chat(f"other {' '.join(long.split()[3:16])} words", "b"),
        chat(f"other {' '.join(long.split()[3:15])} words", "b"),
        chat(short, "c"),
    )
    found = find_overlap(train, evaluation, 13, 0.01)
    assert (found.exact, found.question, found.ngram) == ({0: 301}, {1: 301}, {2: 300})
    assert find_overlap(train, evaluation, 12, 0.01).ngram == {2: 300, 3: 300}
    both = Audit().audit_dataset(rows=evaluation, train_rows=train, split="eval", run=make_run())
    assert [(finding.what, finding.rows) for finding in both] == [
        ("questions of the training data", [1]),
        ("13 words in a row of a training question", [2]),
    ]


@pytest.mark.parametrize(("share", "found"), [(0.005, {}), (0.01, {}), (0.02, {0: 0})])
def test_words_of_many_training_rows_do_not_count(share, found):
    """An instruction in 15 of 1,000 rows: 1.5 %."""
    instruction = sentences(1, 16)[0]
    texts = sentences(1001, 8, seed=5)
    train = rows_of(*(chat(f"{instruction} {text}" if at < 15 else text, "x") for at, text in enumerate(texts[:1000])))
    assert find_overlap(train, rows_of(chat(f"{instruction} {texts[1000]}", "y")), 13, share).ngram == found


def test_words_of_one_row_of_a_small_data_set_count():
    text = sentences(1, 20)[0]
    assert find_overlap(rows_of(chat(text, "a")), rows_of(chat(f"so {text}", "b")), 13, 0.01).ngram == {0: 0}


def test_words_do_not_run_from_one_turn_into_the_next():
    first, second = "one two three four five six seven", "eight nine ten eleven twelve thirteen fourteen"
    turns = [{"role": "user", "content": first}, {"role": "assistant", "content": second}, {"role": "user", "content": "go"}]
    train = rows_of({"prompt": turns, "completion": [{"role": "assistant", "content": "a"}]})
    assert find_overlap(train, rows_of(chat(f"{first} {second}", "b")), 13, 0.01).ngram == {}


# ---- secrets and personal data -------------------------------------------------------------------------------------

KEY = "".join(random.Random(1).choices("ABCDEFabcdef0123456789", k=40))
FAKE_SECRETS = {
    "AWS key": "AKIA" + "Q3EGRTBCDEF5XYZ7",
    "GitHub token": "ghp_" + KEY[:36],
    "GitLab token": "glpat-" + KEY[:20],
    "Slack token": "xoxb-" + "123456789012-" + KEY[:24],
    "Google API key": "AIza" + KEY[:35],
    "API key": "sk-proj-" + KEY,
    "Stripe key": "sk_live_" + KEY[:24],
    "Hugging Face token": "hf_" + KEY[:34],
    "npm token": "npm_" + KEY[:36],
    "package index token": "pypi-" + KEY + KEY,
    "SendGrid key": "SG." + KEY[:22] + "." + (KEY + KEY)[:43],
    "JSON web token": "eyJ" + KEY[:20] + ".eyJ" + KEY[:30] + "." + KEY,
    "password in an address": "q7Vx!pL2",
    "assigned key": KEY[:32],
    "private key": "MIIEpAIBAAKCAQEA" + KEY,
}
AROUND = {
    "password in an address": "postgres://admin:{}@db.internal.net/main",
    "assigned key": "client_secret = '{}'",
    "private key": "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----",
}
FAKE_PERSONAL = {
    "e-mail address": ["mary.poppins@cherry-lane.co.uk", "a_b+c@d.org"],
    "telephone number": ["+1 415 555 2671", "+442071838750", "(415) 555-2671", "415-555-2671", "030 12345678", "+49 (0)30 901820"],
    "card number": ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005", "3782 822463 10005"],
    "IBAN": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "FR14 2004 1010 0505 0001 3M02 606"],
}


@pytest.mark.parametrize(("kind", "secret"), FAKE_SECRETS.items())
def test_a_secret_is_found_refuses_and_is_masked(kind, secret):
    text = AROUND.get(kind, "use {} for it").format(secret)
    assert [(name, is_secret) for name, is_secret, _ in private(text)] == [(kind, True)]
    rows = rows_of(*good(), chat("How?", text))
    finding = audit(rows, off=["size"])["secrets"]
    assert (finding.what, finding.rows, finding.refuse) == (f"secrets ({kind})", [40], True)
    run = make_run()
    with pytest.raises(DataError) as error:
        gate(rows, "train", [("observer:audit", finding)], run)
    assert error.value.problem == f"train data has secrets ({kind}) in 1 row: data.jsonl:41"
    for shown in (str(error.value), json.dumps(described("observer:audit", finding, rows)), scrubbed(text), str(run.notes)):
        assert secret not in shown and secret[6:14] not in shown


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FAKE_PERSONAL.items() for text in texts])
def test_personal_data_is_found_warns_and_is_masked(kind, text):
    rows = rows_of(*good(), chat(f"Write to {text}.", "Done."))
    finding = audit(rows, off=["size"])["personal_data"]
    assert (finding.what, finding.rows, finding.refuse) == (f"personal data ({kind})", [40], False)
    entry = json.dumps(described("observer:audit", finding, rows))
    assert text not in entry and text[5:12] not in entry and finding.details["found"][0]["row"] == "data.jsonl:41"


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",  # Luhn
        "1234567890123456",  # no network
        "DE89 3704 0044 0532 0130 01",  # check digits
        "12345678 + 87654321 = 99999999",
        "3.14159265358979323846",
        "from 2001-2002 to 2023-2024, at 10:30:00",
        "ISBN 978-3-16-148410-0",
        "123e4567-e89b-12d3-a456-426614174000",
        "192.168.100.200",
        "1,000,000,000,000",
        "a risk-assessment-and-management-plan-2024",
        "api_key=YOUR_API_KEY_GOES_HERE",
        "ftp://username:password@ftp.example.org/x",
        "@decorator def f(x): return x@y",
    ],
)
def test_what_only_looks_like_it_is_not_found(text):
    assert private(text) == []


def test_secrets_of_the_evaluation_data_are_found_too():
    assert audit(rows_of(chat("Say.", FAKE_SECRETS["AWS key"])), "eval", rows_of(*good()))["secrets"].rows == [0]


def test_a_label_is_masked_as_well():
    rows = rows_of(*(chat(text, "bob@home.net" if at % 20 else "no") for at, text in enumerate(sentences(100))))
    finding = audit(rows)["label_imbalance"]
    assert "bob@home.net" not in finding.what + json.dumps(finding.details) and finding.details["labels"] == {"bo*@****.***": 95, "no": 5}


# ---- labels, answers, formats, size --------------------------------------------------------------------------------


def test_label_imbalance():
    labels = ["often"] * 110 + ["seldom"] * 10 + ["Seldom"]
    rows = rows_of(*(chat(text, label) for text, label in zip(sentences(121), labels, strict=True)))
    finding = quiet(rows)["label_imbalance"]
    assert finding.details == {"check": "label_imbalance", "labels": {"often": 110, "seldom": 11}, "different": 2, "ratio": 10.0}
    finding = audit(rows, imbalance=9.9)["label_imbalance"]
    assert (finding.what, finding.rows, finding.refuse) == ("label imbalance: 110 rows are 'often', 11 'seldom'", [], False)


def test_label_imbalance_of_answers_called_good_or_bad():
    rows = rows_of(*(chat(f"q {text}", text, label=at % 20 > 0) for at, text in enumerate(sentences(100))))
    assert audit(rows)["label_imbalance"].what == "label imbalance: 95 rows are 'true', 5 'false'"


@real
def test_the_intents_of_banking77():
    rows = formatted_banking()
    answers = Answers()
    for row in rows:
        answers.see(said(row))
    assert answers.task() == "classification" and len(answers.balance("classification")) == 77
    found = Audit(off=["near_duplicates"]).audit_dataset(rows=rows, train_rows=None, split="train", run=make_run())
    details = {finding.details["check"]: finding.details for finding in found}
    assert details["size"]["reached"] == "excellent" and details["label_imbalance"]["different"] == 77
    assert details["label_imbalance"]["ratio"] == round(187 / 35, 2)


def formatted_banking():
    from ftx_formats import Completion

    run = make_run()
    return Completion(prompt_column="text", completion_column="category", style="chat").format_dataset(
        read_dataset(str(REAL / "banking77/train.csv"), run.ledger), run
    )


def test_one_answer_to_many_questions():
    refusal = "I am sorry, but I cannot help you with that, whatever it is."
    rows = rows_of(*(chat(text, refusal if at < 12 else f"It is {text} and {at}") for at, text in enumerate(sentences(100))))
    finding = audit(rows)["same_answer"]
    assert (finding.what, finding.rows, finding.details["share"]) == ("one answer to many questions", list(range(12)), 0.12)
    assert "same_answer" not in audit(rows, same_answer=0.12)


OBJECT, PROSE = '{"name": "pan", "price": 3}', "The pan costs three."


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        (OBJECT, "JSON"),
        ("[1, 2]", "JSON"),
        (f"```json\n{OBJECT}\n```", "JSON in a code fence"),
        ("<offer><name>pan</name></offer>", "XML"),
        (PROSE, "prose"),
        ("{not json}", "prose"),
        ("7", "prose"),
        ("```python\nprint(1)\n```", "prose"),
    ],
)
def test_the_form_of_an_answer(answer, name):
    from ftx_audit_task import FORMS

    assert FORMS[form(answer)] == name


def test_json_here_and_prose_there_under_one_instruction():
    asks = [chat(f"Give name and price.\n{text}", OBJECT) for text in sentences(6)]
    asks[4] = chat("Give name and price.\nthe pan", PROSE)
    other = [chat(f"Describe the offer.\n{text}", f"{PROSE} {text}") for text in sentences(5, seed=2)]
    finding = audit(rows_of(*asks, *other), off=["near_duplicates"])["mixed_formats"]
    assert (finding.rows, finding.refuse) == ([4], False)
    assert finding.details["groups"] == [{"JSON": 5, "prose": 1}]
    assert "mixed_formats" not in audit(rows_of(*(asks[:4] + asks[5:]), *other)), "each instruction has its own form"


def test_json_in_a_fence_beside_bare_json_and_alpacas_own_text():
    from ftx_formats import Alpaca

    raw = [{"instruction": "Name and price.", "input": text, "output": OBJECT, "_file": "d", "_line": line} for line, text in enumerate(sentences(5), start=1)]
    raw[2]["output"] = f"```json\n{OBJECT}\n```"
    raw += [{"instruction": f"Tell of {text}", "input": "", "output": text, "_file": "d", "_line": 6 + at} for at, text in enumerate(sentences(5, seed=3))]
    for style in ("chat", "instruction"):
        rows = Alpaca(style=style).format_dataset(to_dataset(raw), make_run())
        assert audit(rows)["mixed_formats"].rows == [2], style


def test_one_system_text_over_many_tasks_says_little():
    system = {"role": "system", "content": "You are a helpful assistant."}
    rows = [{**chat(text, OBJECT if at < 5 else f"{PROSE} {text}")} for at, text in enumerate(sentences(60))]
    for row in rows:
        row["prompt"] = [system, *row["prompt"]]
    assert "mixed_formats" not in audit(rows_of(*rows))
    for row in rows[5:57]:
        row["completion"] = [{"role": "assistant", "content": OBJECT}]
    assert audit(rows_of(*rows))["mixed_formats"].rows == [57, 58, 59]


KINDS = {
    "classification": lambda text, at: chat(text, "yes" if at % 2 else "no"),
    "extraction": lambda text, at: chat(text, json.dumps({"word": text.split()[0]})),
    "instruction": lambda text, at: chat(text, f"It is {text}."),
    "code": lambda text, at: chat(text, f"```python\nprint('{text}')\n```\nIt prints it."),
}


@pytest.mark.parametrize("task", SIZES)
def test_size_advice_by_kind_of_task(task):
    assert SIZES[task] == {"classification": (100, 1000, 10000), "extraction": (500, 5000, 50000)}.get(task, (1000, 10000, 100000))
    least = SIZES[task][0]
    rows = [KINDS[task](text, at) for at, text in enumerate(sentences(least, 6))]
    options = {"off": ["near_duplicates", "same_answer"]}
    finding = audit(rows_of(*rows[:-1]), **options)["size"]
    name = {"instruction": "instruction following"}.get(task, task)
    numbers = f"minimum {least:,}, good {10 * least:,}, excellent {100 * least:,}"
    assert (finding.what, finding.refuse) == (f"few rows for {name}: {least - 1} ({numbers})", False)
    assert finding.details["reached"] == "below the minimum"
    details = quiet(rows_of(*rows), **options)["size"].details
    assert details == {"check": "size", "task": task, "rows": least, "minimum": least, "good": 10 * least, "excellent": 100 * least, "reached": "minimum"}
    assert quiet(rows_of(*rows), good_rows=least, excellent_rows=least + 1, **options)["size"].details["reached"] == "good"


def test_plain_text_has_no_kind_of_task():
    rows = to_dataset([{"text": text, "_file": "t", "_line": line} for line, text in enumerate(sentences(20), start=1)])
    assert audit(rows) == {} and "size" not in quiet(rows)


# ---- options -------------------------------------------------------------------------------------------------------


def test_any_check_can_refuse_warn_or_be_off():
    text = sentences(1, 40)[0]
    rows = rows_of(*good(), chat("Say.", text), chat("Say.", f"{text} again bob@home.net {FAKE_SECRETS['AWS key']}"))
    assert {name: finding.refuse for name, finding in audit(rows).items()} == {
        "near_duplicates": False, "secrets": True, "personal_data": False, "size": False,
    }  # fmt: skip
    strict = audit(rows, refuse=list(CHECKS))
    assert all(finding.refuse for finding in strict.values()) and len(strict) == 4
    assert not any(finding.refuse for finding in audit(rows, refuse=[]).values())
    assert set(audit(rows, off=["secrets", "near_duplicates"])) == {"personal_data", "size"}
    kept = gate(rows, "train", [("observer:audit", strict["near_duplicates"])], run := make_run(skip_bad_rows=True))
    assert len(kept) == 41 and [(entry.line, entry.reason, entry.action) for entry in run.ledger.entries] == [(42, "near duplicates of other rows", "dropped")]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"near_duplicate": 1.1}, "near_duplicate must lie between 0.1 and 1.0"),
        ({"ngram": 0}, "ngram must be at least 1"),
        ({"refuse": ["secret"]}, "refuse: no check is called 'secret'; there are near_duplicates, overlap, "),
        ({"off": ["x"]}, "off: no check is called 'x'"),
    ],
)
def test_options_that_make_no_sense(options, text):
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        Audit(**options)


# ---- all row types, and speed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "{q} ", "completion": "{a}"},
        {"messages": [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{a}"}]},
        {"prompt": [{"role": "user", "content": "{q}"}], "chosen": [{"role": "assistant", "content": "{a}"}], "rejected": []},
        {"prompt": "{q}", "completion": "{a}", "label": True},
        {"text": "{q} {a}"},
    ],
    ids=["texts", "messages", "pair", "labelled", "text"],
)  # fmt: skip
def test_every_row_type(row):
    text = sentences(1, 40)[0]
    made = [json.loads(json.dumps(row).replace("{q}", q).replace("{a}", a)) for q, a in [("a b", "c d"), ("Say", text), ("Say", f"{text} bob@home.net")]]
    found = audit(rows_of(*made))
    assert found["near_duplicates"].rows == [2] and found["personal_data"].rows == [2]
    overlap = audit(rows_of(json.loads(json.dumps(row).replace("{q}", f"{text} so").replace("{a}", "z"))), "eval", rows_of(*made[:2]))
    assert ("overlap" in overlap) == ("text" in row), "answers do not count, and of plain text all does"


def audited_in(count: int) -> float:
    """Seconds of the processor for the training rows and a tenth of them as evaluation rows."""
    texts = sentences(count + count // 10, 25, seed=11)
    rows = to_dataset({**chat(text[:100], text[100:]), "_file": "d", "_line": line} for line, text in enumerate(texts, start=1))
    train, evaluation = rows.select(range(count)), rows.select(range(count, len(rows)))
    begun = time.process_time()
    assert "near_duplicates" not in audit(train)
    assert audit(evaluation, "eval", train) == {}
    return time.process_time() - begun


def test_it_is_fast():
    """5,000 rows in the quick suite; the bound is four times what was measured."""
    assert audited_in(5000) < 8


@pytest.mark.full
def test_100000_rows_in_well_under_a_minute():
    assert audited_in(100_000) < 50
