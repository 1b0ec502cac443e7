"""The page of a run: whole, well-formed, self-contained, with everything from outside escaped; what it says is what the files say."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from ftx.run import RunDir
from ftx.testing import ftx
from ftx.testing.own import ROWS
from ftx.testing.runs import catalogue, make_run, train
from ftx_report import Report
from ftx_report_charts import POINTS, Bar, Mark, bars, curves, lines, number, thin
from ftx_report_items import item_set, status, worth
from ftx_report_page import page, score_table
from ftx_report_read import tell, tell_all
from ftx_report_run import compare_page, run_page
from ftx_report_verdict import verdict

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_runs import HOSTILE, PLAN, exact_match_run, items, judged_run, preference_run, score, write_run


class Page(HTMLParser):
    """What a browser would find: the text, the figures, each script with its attributes, and all attributes that point somewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words, self.scripts, self.pointing, self.handlers = "", [], [], []
        self._script: dict | None = None
        self.feed(html)
        self.figures = dict(re.findall(r"<figcaption>(.*?)</figcaption>(<svg.*?</svg>)", html))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.pointing += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action", "data", "srcset")]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        if tag == "script":
            self._script = {**given, "text": ""}
            self.scripts.append(self._script)

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script is not None:
            self._script["text"] += data
        else:
            self.words += data

    @property
    def sets(self):
        (found,) = (json.loads(script["text"]) for script in self.scripts if script.get("id") == "items")
        return found


def page_of(run: RunDir, **options) -> Page:
    return Page(run_page(tell(run), **options))


# ---- the page of a run ---------------------------------------------------------------------------------------------


def test_a_run_writes_its_page(tmp_path):
    from ftx.recipe import Choice
    from ftx.testing.trainer import OWN

    pytest.importorskip("ftx_sft")
    train(
        tmp_path / "run",
        ROWS["prompt-completion"],
        catalogue(observer={"page": Report}),
        adapter=OWN,
        trainer=Choice("sft", {"max_steps": 3, "logging_steps": 1}),
        observers=(Choice("page", {}),),
    )
    found = Page((tmp_path / "run" / "report.html").read_text("utf-8"))
    assert found.pointing == [] and found.handlers == []
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second"} <= found.figures.keys()
    assert len(re.search(r'<polyline class="c0" points="([^"]*)"', found.figures["loss"]).group(1).split()) == 3
    assert "No evaluator has scored it: the loss, " in found.words and "6 rows" in found.words
    assert (tmp_path / "run" / "recipe.yaml").read_text() in found.words
    again = ftx("report", tmp_path / "run", "--output", tmp_path / "again.html")
    assert again.exit_code == 0 and (tmp_path / "again.html").read_text("utf-8") == (tmp_path / "run" / "report.html").read_text("utf-8")


def test_the_head_says_what_was_trained_on_what_and_what_came_of_it(tmp_path):
    words = page_of(exact_match_run(tmp_path / "run")).words
    assert "smollm2 (bfloat16), lora + sft, trained on train.jsonl (500 rows, 42,607 tokens, 26% supervised), evaluated on test.jsonl (100 rows)" in words
    assert "40 steps · 52,000 tokens trained · 4,884,480 parameters (3.50%) · bfloat16 cpu · seed 42" in words
    assert "Training raised exact_match from 0.100 to 0.940 on 100 items (85 fixed, 1 broken, p = 1e-20)." in words


def test_scores_and_charts(tmp_path):
    found = page_of(exact_match_run(tmp_path / "run"))
    assert "0.940 [0.920, 0.960]" in found.words
    loss = found.figures["loss"]
    assert loss.count("<circle") == 4, "the evaluations are dots on the chart of the loss"
    assert loss.count('class="mark"') == 6 and ">base<" in loss and ">tuned<" in loss
    assert "exact-match: exact_match" in found.figures and "eval_runtime" not in found.figures
    assert list(found.figures)[1:5] == ["loss", "learning_rate", "grad_norm", "tokens_per_second"]


def test_a_recipe_that_is_made_to_hurt(tmp_path):
    run = write_run(tmp_path / "run")
    run.recipe.write_text("a: &a [*a]\n")
    with pytest.raises(yaml.YAMLError, match="a value refers to itself"):
        tell(run)


def test_predicted_and_measured(tmp_path):
    words = page_of(write_run(tmp_path / "run", plan=PLAN)).words
    assert "Memory and time: predicted and measured" in words
    rows = [
        line.split()
        for line in ("peak memory of tensors 2.24 GiB 1.77 GiB 0.79", "time 2:10 2:24 1.10", "tokens 52,000 52,000 1.00", "memory: weights 286.10 MiB")
    ]
    told = " ".join(words.replace("\n", " ").split())
    cells = re.sub(r"\s+", "", told)
    for row in rows:
        assert "".join(row) in cells, row
    assert "Memory and time" not in page_of(write_run(tmp_path / "without")).words


FINDING = {"by": "observer:audit", "what": "a phone number", "rows": 5, "refuses": False, "places": [f"t.jsonl:{i}" for i in range(5)]}
FINDING |= {"details": {"check": "private", "pairs": [[1, 2]], "shares": {"phone": 0.5}}}


def test_the_audit_and_the_ledger(tmp_path):
    audit = {
        "train": {"rows": 3, "tokens": 30, "findings": [FINDING]},
        "advice": {"size": "small"},
    }
    ledger = [{"file": "some/where/train.jsonl", "line": i, "reason": "an empty answer", "action": "dropped"} for i in (3, 5, 8, 9)]
    words = page_of(write_run(tmp_path / "run", audit=audit, ledger=ledger)).words
    for text in (
        "Audit of the data",
        "a phone number",
        "t.jsonl:0, t.jsonl:1, t.jsonl:2 and 2 more",
        "check private, shares phone 0.5",
        "advice size",
        "small",
        "an empty answer",
        "train.jsonl:3, train.jsonl:5, train.jsonl:8",
    ):
        assert text in words
    assert "train.jsonl:9" not in words


def test_rewards_and_rejected_answers_of_a_preference_run(tmp_path):
    html = run_page(tell(preference_run(tmp_path / "run")))
    found = Page(html)
    assert {"rewards", "rewards/margins", "rewards/accuracies", "kl", "logps_per_token"} <= found.figures.keys()
    assert html.index("<h2>Training</h2>") < html.index("<figcaption>loss<") < html.index("<h2>Rewards</h2>") < html.index("<figcaption>rewards<")
    assert found.sets[0]["items"][0][6][0] == ["rejected", "the rejected one"]
    assert "(change" not in found.words and "their 95 % intervals meet" in found.words


def test_categories_and_a_judges_reasons(tmp_path):
    found = page_of(judged_run(tmp_path / "run"))
    chart = found.figures["mt-bench: category"]
    assert all(f">{name}<" in chart for name in ("writing", "math", "coding", "stem")) and chart.count("<rect") == 8
    assert "category:writing" not in found.words, "they have a chart of their own, not rows among the scores"
    bench, judge = found.sets
    assert [item[5] for item in bench["items"][:3]] == ["writing", "writing", "math"]
    assert {item[4] for item in bench["items"]} == {"better"}
    assert bench["items"][0][6][:2] == [["gpt-4 on base: 3", "The answer is base. Rating: [[3]]"], ["gpt-4 on tuned: 5", "The answer is tuned. Rating: [[5]]"]]
    assert judge["items"][0][3] == ["helpfulness 2, accuracy 4"] * 2
    said = dict(judge["items"][0][6])
    assert said["qwen3 on base: helpfulness 2, accuracy 4"] == "Because it is base." and said["qwen3 on the pair: win"] == "A is better.\n\nB is better."
    assert "Training raised average from 3.000 to 5.000 on 8 items (change +2.000 [+1.500, +2.500])." in found.words


def test_what_judging_took(tmp_path):
    assert "What judging took" not in page_of(judged_run(tmp_path / "free")).words
    counts = {"calls": 1640, "cached": 12, "input_tokens": 1_200_000, "output_tokens": 90_000, "cost": 3.5}
    usage = {"llm-judge": {"gpt-4": counts, "local:qwen3": {"calls": 8, "cached": 0, "input_tokens": 950, "output_tokens": 80}}}
    section = run_page(tell(write_run(tmp_path / "run", manifest={"usage": usage}))).partition("What judging took")[2].partition("</section>")[0]
    assert re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", section) == [
        *("judge", "calls", "from the cache", "input tokens", "output tokens", "USD"),
        *("llm-judge: gpt-4", "1,640", "12", "1,200,000", "90,000", "3.5"),
        *("llm-judge: local:qwen3", "8", "0", "950", "80", ""),
    ]


def test_recipe_and_versions_can_be_copied(tmp_path):
    run = write_run(tmp_path / "run")
    html = run_page(tell(run))
    assert html.count("data-copy=") == 3
    assert f"ftx run {run.recipe}" in Page(html).words and "adapter:lora  ftx-lora 0.1.0" in html and "torch 2.13.0" in html


@pytest.mark.parametrize("missing", ["manifest.json", "audit.json", "ledger.jsonl", "metrics.jsonl", "scores.json"])
def test_a_file_that_is_missing_costs_only_its_part(tmp_path, missing):
    run = exact_match_run(tmp_path / "run")
    (run / missing).unlink()
    words = page_of(run).words
    assert "Recipe and versions" in words
    assert ("This run is not finished." in words) == (missing == "manifest.json")


def test_a_run_that_is_still_writing(tmp_path):
    run = write_run(tmp_path / "run", manifest={"finished": False})
    with open(run.metrics, "a") as stream:
        stream.write('{"step": 41, "lo')
    assert "This run is not finished." in page_of(run).words


# ---- text from outside ---------------------------------------------------------------------------------------------


def hostile_run(path: Path) -> RunDir:
    found = {"by": HOSTILE, "what": HOSTILE, "rows": 1, "refuses": False}
    recipe = {"model": HOSTILE, "data": HOSTILE, "adapter": {"name": HOSTILE}, "evaluators": []}
    scores = [score(HOSTILE.replace("/", ""), HOSTILE, phase, 0.5, 0.4, 0.6) for phase in ("base", "tuned", "change")]
    run = write_run(
        path,
        recipe=recipe,
        audit={"train": {"rows": 1, HOSTILE: HOSTILE, "findings": [found]}, HOSTILE: {HOSTILE: HOSTILE}},
        ledger=[{"file": HOSTILE, "line": 1, "reason": HOSTILE, "action": HOSTILE}],
        metrics=[{"step": 1, "loss": 1.0, HOSTILE: 1.0}, {"step": 2, "loss": float("nan"), HOSTILE: 2.0}],
        manifest={"dtype": HOSTILE, "device": HOSTILE, "libraries": {HOSTILE: HOSTILE}},
        scores=scores,
    )
    item = {
        "prompt": [{"role": HOSTILE, "content": HOSTILE}],
        "answer": HOSTILE,
        "reference": HOSTILE,
        "verdict": HOSTILE,
        "category": HOSTILE,
        HOSTILE: HOSTILE,
    }
    judges = [{"judge": HOSTILE, "verdict": HOSTILE, "reasoning": HOSTILE}]
    half = json.dumps({"prompt": None, "answer": {"\ud800": 1}, "verdict": float("nan")})  # as JSON may hold it: half of a surrogate pair
    for phase in ("base", "tuned"):
        run.write_items("exact-match", phase, [{**item, "judges": judges, "score": float("inf")}])
        with open(run.items("exact-match", phase), "a") as stream:
            stream.write(half + "\n")
    return run


def test_hostile_text_stays_text(tmp_path):
    run = hostile_run(tmp_path / "run")
    for html in (run_page(tell(run), title=HOSTILE), compare_page(tell_all([run, run]), title=HOSTILE)):
        found = Page(html)
        assert [set(script) - {"text"} for script in found.scripts] == [{"type", "id"}, set()], "the data, and our own script"
        assert found.handlers == [] and found.pointing == [], "no element of theirs became one of the page's"
        assert "window.ran" not in found.scripts[1]["text"]
        assert found.sets[0]["items"][0][2] == [HOSTILE, HOSTILE] and found.sets[0]["items"][1][2] == ['{"?": 1}'] * 2
        assert "{{ 7 * 7 }}" in found.words and "49" not in found.words.partition("Audit")[0]
        html.encode("utf-8")


def test_the_only_script_that_may_run_is_ours(tmp_path):
    import base64
    import hashlib

    html = run_page(tell(write_run(tmp_path / "run")))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html).group(1).replace("&#39;", "'")
    script = Page(html).scripts[-1]["text"]
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy


def test_a_page_that_cannot_be_made_does_not_fail_the_run(tmp_path):
    run = make_run(tmp_path / "run")
    run.directory.recipe.write_text("- [broken")
    Report().run_finished(run=run)
    assert run.notes["said"][0].startswith("warning: report.html could not be written (") and f"ftx report {run.directory}" in run.notes["said"][0]
    assert not (run.directory / "report.html").exists()


# ---- items ---------------------------------------------------------------------------------------------------------


def one(verdict, **more):
    return {"prompt": "p", "answer": "a", "reference": "r", "verdict": verdict, **more}


@pytest.mark.parametrize(
    ("base", "tuned", "change", "expected"),
    [
        (one("wrong"), one("correct"), {}, "fixed"),
        (one("correct"), one("wrong"), {}, "broken"),
        (one("wrong"), one("wrong"), {}, "unchanged"),
        (one("unscored"), one("correct"), {}, "unscored"),
        (one(3.0), one(4.5), {}, "better"),
        (one({"a": 3, "b": 3}), one({"a": 1, "b": 4}), {}, "worse"),
        (one("loss"), one("win"), {}, "better"),
        (one(""), one(""), one("loss"), "worse"),
        (one(""), one(""), one("tie"), "unchanged"),
        (one(""), {}, {}, "unscored"),
    ],
)
def test_what_came_of_an_item(base, tuned, change, expected):
    assert status([base, tuned], change) == expected


def test_several_answers():
    assert status([one("wrong"), one("correct"), one("wrong")], {}) == "fixed"
    assert status([one(2), one(3), one(1)], {}) == "mixed"
    assert status([one("correct")], {}) == "scored"
    assert worth(one(True)) == 1.0 and worth(one({})) is None and worth(one("odd")) is None


def test_the_page_says_how_many_items_it_leaves_out(tmp_path):
    found = page_of(exact_match_run(tmp_path / "run", 30), limit=12).sets[0]
    assert len(found["items"]) == 12 and found["total"] == 30


def test_details_of_both_stand_together_where_they_differ():
    found = item_set("e", {"base": [one("wrong", f1=0.25, note="same")], "tuned": [one("correct", f1=1.0, note="same")]}, [], 5)
    assert found["items"][0][6] == [["f1", "base: 0.25\ntuned: 1"], ["note", "same"]]


# ---- one sentence --------------------------------------------------------------------------------------------------


def phases(base, tuned, *changes):
    return [score("e", "m", "base", *base), score("e", "m", "tuned", *tuned), *changes]


@pytest.mark.parametrize(
    ("scores", "sentence", "tone"),
    [
        ([], "No evaluator has scored it: nothing was trained yet.", "open"),
        (phases((0.5, 0.4, 0.6), (0.9, 0.8, 1.0)), "Training raised m from 0.500 to 0.900 on 100 items (their 95 % intervals are apart).", "better"),
        (phases((0.9, 0.8, 1.0), (0.5, 0.4, 0.6)), "Training lowered m from 0.900 to 0.500 on 100 items (their 95 % intervals are apart).", "worse"),
        (
            phases((0.5, 0.4, 0.6), (0.55, 0.45, 0.65)),
            "No change that 100 items can show: m is 0.500 before training and 0.550 after (their 95 % intervals meet).",
            "same",
        ),
        (
            phases((0.5, 0.4, 0.6), (0.55, 0.45, 0.65), score("e", "m_change", "change", 0.05, 0.01, 0.09)),
            "Training raised m from 0.500 to 0.550 on 100 items (change +0.050 [+0.010, +0.090]).",
            "better",
        ),
        (
            phases((0.5,), (0.52,), score("e", "fixed", "change", 3), score("e", "broken", "change", 1), score("e", "p_value", "change", 0.625)),
            "No change that 100 items can show: m is 0.500 before training and 0.520 after (3 fixed, 1 broken, p = 0.62).",
            "same",
        ),
        ([score("e", "m", "tuned", 0.5)], "m is 0.500 of 100 items; the base was not evaluated, so nothing says what training changed.", "open"),
        ([score("e", "m", "base", 0.5)], "m of the base is 0.500 of 100 items; the tuned model has not been scored.", "open"),
        (phases((None,), (None,)), "No evaluator has scored it: nothing was trained yet.", "open"),
    ],
)
def test_the_verdict(scores, sentence, tone):
    found = verdict(scores, [])
    assert (found.sentence, found.tone) == (sentence, tone)


# ---- several runs --------------------------------------------------------------------------------------------------


def test_runs_are_compared(tmp_path):
    one_run = exact_match_run(tmp_path / "one")
    other = exact_match_run(tmp_path / "other", recipe={"adapter": {"name": "dora", "r": 8}, "evaluators": [{"name": "exact-match"}]})
    other.write_items("exact-match", "tuned", items(100, lambda i: True))
    found = Page(compare_page(tell_all([one_run, other])))
    cells = re.sub(r"\s+", "", found.words)
    assert "adapternameloradora" in cells and "adapterr168" in cells and "trainermaxsteps" not in cells
    assert found.figures["loss"].count("<polyline") == 2
    (exact,) = found.sets
    assert exact["who"] == ["one", "other"] and {item[4] for item in exact["items"]} == {"fixed", "unchanged"}
    assert "metricbaseoneother" in cells


def test_runs_on_other_data_are_not_compared_item_by_item(tmp_path):
    files = [{"eval_data": {"files": {"test.jsonl": {"sha256": name}}}} for name in ("a", "b")]
    one_run, other = (exact_match_run(tmp_path / name, manifest={"data": data}) for name, data in zip(("one", "other"), files, strict=True))
    other.write_items("exact-match", "tuned", [item | {"prompt": "something else"} for item in items(100, lambda i: True)])
    found = Page(compare_page(tell_all([one_run, other])))
    assert "not all evaluated on the same data" in found.words and found.sets[0]["left_out"] == ["other"]


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = tell_all([write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")])
    assert [told.name for told in runs] == ["a/run (1)", "b/run (2)"]


# ---- ftx report ----------------------------------------------------------------------------------------------------


def test_ftx_report(tmp_path):
    runs = [exact_match_run(tmp_path / name) for name in ("one", "two")]
    assert json.loads(ftx("report", runs[0], "--json").stdout) == {"status": "done", "report": str(runs[0] / "report.html")}
    assert ftx("report", *runs, "-o", "report.title=Both of them").output == f"report: {runs[0] / 'compare.html'}\n"
    assert "<h1>Both of them</h1>" in (runs[0] / "compare.html").read_text("utf-8")
    assert ftx("report", runs[0], "--quiet").output == ""


def test_a_runs_own_title_holds_for_its_page(tmp_path):
    run = write_run(tmp_path / "run", recipe={"observers": [{"name": "report", "title": "Offers as JSON"}]})
    assert ftx("report", run).exit_code == 0
    assert "<h1>Offers as JSON</h1>" in (run / "report.html").read_text("utf-8")


def test_what_is_no_run_is_refused(tmp_path):
    found = ftx("report", tmp_path)
    assert found.exit_code == 2 and "not a run (it has no recipe.yaml)" in found.output
    found = ftx("report", write_run(tmp_path / "run"), "--observer", "ftx.testing.own:CtrlC")
    assert found.exit_code == 2 and "observer 'ftx.testing.own:CtrlC' makes no page of runs." in found.output


# ---- charts --------------------------------------------------------------------------------------------------------


def test_both_sides_of_a_preference_share_a_chart():
    metrics = [{"step": step, "rewards/chosen": 0.1 * step, "rewards/rejected": -0.1 * step, "rewards/margins": 0.2 * step, "kl": 0.0} for step in (1, 2)]
    drawn = dict(curves(metrics))
    assert list(drawn) == ["rewards", "rewards/margins", "kl"]
    assert drawn["rewards"].count("<polyline") == 2 and drawn["kl"].count("<polyline") == 1


def test_what_is_no_number_is_not_drawn():
    assert curves([{"step": 1, "loss": float("nan"), "note": "text", "flag": True}]) == []
    assert dict(curves([{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("inf")}])).keys() == {"loss"}


def test_a_line_goes_from_corner_to_corner():
    root = ElementTree.fromstring(lines({"y": [(0, 0), (10, 1)]}))
    first, last = (tuple(map(float, point.split(","))) for point in root.find("polyline").get("points").split())
    assert first[0] < last[0] and first[1] > last[1]


def test_a_long_line_keeps_its_spikes_and_its_ends():
    line = [(step, 0.0) for step in range(20_000)]
    line[7777] = (7777, 9.0)
    thinned = thin(line)
    assert len(thinned) <= POINTS and (7777, 9.0) in thinned and thinned[0] == line[0] and thinned[-1] == line[-1]


def test_marks_stand_where_they_happened():
    root = ElementTree.fromstring(lines({"y": [(0, 0), (10, 1)]}, marks=[Mark(5, "here"), Mark(99)]))
    inside, clamped = (path.get("d") for path in root.findall("path") if path.get("class") == "mark")
    assert inside.startswith("M235.0 ") and clamped.startswith("M414.0 ")


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.000195, "1.95e-4"), (-2e-5, "-2e-5"), (0.12345, "0.123"), (1234.5, "1234"), (1e9, "1e9")])
def test_numbers_fit_their_margin(value, text):
    assert number(value) == text


def test_bars_are_as_long_as_their_values():
    root = ElementTree.fromstring(bars([Bar(group="math", name="base", value=2, low=1, high=3), Bar(group="math", name="tuned", value=4)], (0, 10)))
    widths = [float(rect.get("width")) for rect in root.findall("rect")]
    assert widths[1] == pytest.approx(2 * widths[0])
    assert len(root.findall("path")) == 1


def test_everything_from_outside_is_escaped():
    hostile = "<script>alert(1)</script>"
    scores = [{"evaluator": hostile, "metric": hostile, "phase": "tuned", "value": 1.0, "ci_low": None, "n": 1, "unscored": 0}]
    charts = [(hostile, bars([Bar(group=hostile, name=hostile, value=1)], (0, 1))), (hostile, lines({hostile: [(0, 0)], "b": [(1, 1)]}))]
    assert "<script" not in page(hostile, {hostile: hostile}, score_table(scores), charts)


def test_one_row_a_metric():
    common = {"evaluator": "e", "metric": "m", "n": 5, "unscored": 1}
    scores = [{**common, "phase": "base", "value": 0.5, "ci_low": 0.25, "ci_high": 0.75}, {**common, "phase": "tuned", "value": None}]
    assert score_table(scores) == [{"metric": "e m", "base": "0.500 [0.250, 0.750]", "tuned": "none scored", "change": "", "n": "5", "unscored": "1"}]
