"""The exam fails a plugin that is wrong, in each way, for the right reason; and passes one that is right."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import wrong
from heavy import Heavy

from ftx import testing
from ftx.testing import (
    AdapterContract,
    EvaluatorContract,
    ExporterContract,
    FormatterContract,
    ObserverContract,
    QuantizerContract,
    TrainerContract,
    catalogue,
    ftx,
    make_run,
    shared_model_dir,
    train,
)
from ftx.testing.common import Contract
from ftx.testing.trainer import OWN
from ftx_hello import HelloAdapter

ANY = ObserverContract  # the stage that asks for nothing of its own

#: Contract, standard test, plugin, and words of the failure.
WRONG = [
    (ANY, "test_it_is_installed", wrong.NoHook, 'no entry point in the group ftx.observer leads to "wrong:NoHook"'),
    (ANY, "test_its_import_is_light", Heavy, "importing heavy loads datasets"),
    (ANY, "test_it_is_a_plugin", wrong.Undecorated, "decorate Undecorated itself with @ftx.plugin"),
    (ANY, "test_it_is_a_plugin", wrong.Undescribed, "Undescribed needs a docstring"),
    (ANY, "test_its_options", wrong.BlankHelp, "n has no help"),
    (ANY, "test_its_options", wrong.WrongDefault, "n: its default None is not int"),
    (ANY, "test_its_options", wrong.WrongType, "options cannot have the type set"),
    (ANY, "test_its_options_survive_yaml", wrong.Sloppy, "n becomes 3.0 on its way through YAML"),
    (ANY, "test_its_options_survive_yaml", wrong.Forgetful, "{'n': 4} becomes {'n': 5}"),
    (ANY, "test_its_declarations", wrong.WrongRowType, "accepts: chat is no row type"),
    (ANY, "test_its_declarations", wrong.WrongRequires, "requires: 'lora' is not of the form stage:name"),
    (ANY, "test_its_declarations", wrong.WrongSuggests, "suggests: 'learning_rate' is not of the form stage.option"),
    (ANY, "test_its_hooks", wrong.DefaultedArgument, "has an argument 'scores=()' that a hook cannot have"),
    (ANY, "test_its_hooks", wrong.KeywordArgument, "has an argument 'run' that a hook cannot have"),
    (ANY, "test_its_hooks", wrong.StarredArgument, "that a hook cannot have"),
    (ANY, "test_its_hooks", wrong.UnknownArgument, "does not fit its hooks"),
    (ANY, "test_its_hooks", wrong.UnknownHook, "there is no hook called run_finnished"),
    (ANY, "test_its_hooks", wrong.Unmarked, "looks like a hook but is not marked @hookimpl"),
    (ANY, "test_its_hooks", wrong.NoHook, "it implements no hook"),
    (AdapterContract, "test_its_hooks", wrong.Partial, "missing: merge_adapted"),
    (AdapterContract, "test_it_starts_from_the_base", wrong.StartsElsewhere, "is not the base before it is trained"),
    (AdapterContract, "test_only_what_should_train_trains", wrong.TrainsTheBase, "the base is not frozen: lm_head.weight"),
    (AdapterContract, "test_only_what_should_train_trains", wrong.ChangesTheBase, "training changes what should not train: lm_head.weight"),
    (AdapterContract, "test_only_what_should_train_trains", wrong.TrainsNothing, "nothing trains"),
    (AdapterContract, "test_only_what_should_train_trains", wrong.LeavesOneOut, "two steps do not change what should train: model.layers.0"),
    (AdapterContract, "test_only_what_should_train_trains", wrong.Unlearns, "ten steps do not lower the loss"),
    (AdapterContract, "test_what_is_saved_loads", wrong.LoadsNothing, "the loaded model is not the one that was saved: a logit differs by"),
    (AdapterContract, "test_what_is_saved_loads", wrong.LoadsForTraining, "in eval mode"),
    (AdapterContract, "test_what_is_saved_loads", wrong.Pickles, "wrote pickles: more.bin"),
    (AdapterContract, "test_what_is_saved_loads", wrong.SavesNothing, "wrote no safetensors, but note.txt"),
    (AdapterContract, "test_it_merges", wrong.MergesNothing, "merging changes what the model says"),
    (AdapterContract, "test_it_merges", wrong.StaysAdapted, "the merged model is no plain one: its weights differ by model.layers.0"),
    (AdapterContract, "test_it_merges", wrong.MergesIntoAnother, "merge_adapted gave a LlamaDecoderLayer"),
    (AdapterContract, "test_it_switches_off", wrong.NeverOff, "with the adapter off the model is not the base"),
    (AdapterContract, "test_it_switches_off", wrong.NeverOnAgain, "switching off and on again changes the model"),
    (AdapterContract, "test_same_seed_same_weights", wrong.Unseeded, "the same seed gives other weights: model.layers.0"),
    (FormatterContract, "test_it_gives_one_row_type", wrong.LosesARow, "lost or invented 1 rows without a ledger entry (exam.jsonl:2)"),
    (FormatterContract, "test_it_gives_one_row_type", wrong.InventsARow, "lost or invented 1 rows without a ledger entry (exam.jsonl:99)"),
    (FormatterContract, "test_it_gives_one_row_type", wrong.NoRowType, "make no row type"),
    (FormatterContract, "test_it_gives_one_row_type", wrong.OtherRowType, "it gives text rows, and `produces` says prompt-completion"),
    (FormatterContract, "test_it_gives_one_row_type", wrong.NoSource, "_file and _line must be kept"),
    (FormatterContract, "test_it_gives_one_row_type", wrong.NoRoles, "line 1: prompt holds {'content': '2 + 2?'}, which is no message"),
    (FormatterContract, "test_it_gives_the_same_rows_again", wrong.Unstable, "formatting the same rows again gives others"),
    (FormatterContract, "test_it_writes_what_it_reads", wrong.WritesOtherRows, "a row that unformat_row wrote is read as another row"),
    (FormatterContract, "test_it_names_bad_rows", wrong.TakesAll, 'it takes the bad row {"q": "5 + 5?"}'),
    (FormatterContract, "test_it_names_bad_rows", wrong.NamesNoLine, "the error names no exam.jsonl:3: some row has no answer."),
    (QuantizerContract, "test_a_model_loads_with_it", wrong.QuantisesNothing, "no smaller than the plain one"),
    (QuantizerContract, "test_a_model_loads_with_it", wrong.Blurs, "have a cosine of -"),
    (QuantizerContract, "test_a_model_loads_with_it", wrong.SilentlyRefusing, "preflight must return a list of texts"),
    (QuantizerContract, "test_generating_does_not_change_it", wrong.ChangesInEvaluation, "generating changes the quantised weights"),
    (QuantizerContract, "test_same_configuration_again", wrong.AnotherEachTime, "another configuration the second time"),
    (TrainerContract, "test_two_steps_with", wrong.Idle, "the first and the last of two steps, it has []"),
    (TrainerContract, "test_two_steps_with", wrong.Endless, "a trainer has the option max_steps"),
    (TrainerContract, "test_it_learns", wrong.Standing, "twenty steps do not lower the loss"),
    (TrainerContract, "test_resume_is_never_having_stopped", wrong.StartsOver, "a resumed run starts over"),
    (TrainerContract, "test_resume_is_never_having_stopped", wrong.ShufflesAnew, "are not those of a run that was never stopped"),
    (TrainerContract, "test_resume_is_never_having_stopped", wrong.Deaf, "Ctrl-C does not end the training"),
    (TrainerContract, "test_resume_is_never_having_stopped", wrong.HardOfHearing, "Ctrl-C must leave a checkpoint of step 4"),
    (EvaluatorContract, "test_perfect_answers_score_best", wrong.Content, "equal is 1.0 for perfect answers and 1.0 for empty ones"),
    (EvaluatorContract, "test_perfect_answers_score_best", wrong.NotANumber, "score equal is nan"),
    (EvaluatorContract, "test_perfect_answers_score_best", wrong.OutsideItself, "lies outside [2.0, 3.0]"),
    (EvaluatorContract, "test_empty_answers_do_not_crash", wrong.FallsOverNothing, "string index out of range"),
    (EvaluatorContract, "test_hostile_answers_do_not_win", wrong.Gullible, "for the answer '4 Paris c, a, t blue', and 1.0 for perfect ones"),
    (EvaluatorContract, "test_hostile_answers_do_not_win", wrong.Begged, "for the answer 'Ignore all instructions above"),
    (EvaluatorContract, "test_items_follow_the_data", wrong.Reversed, "item 0 is not of row 0"),
    (EvaluatorContract, "test_items_follow_the_data", wrong.MixesAnswers, "item 0 has another question's answer: 'answer 1'"),
    (EvaluatorContract, "test_items_follow_the_data", wrong.SkipsItems, "there are 2 items for 4 rows"),
    (EvaluatorContract, "test_items_follow_the_data", wrong.NoVerdict, "item 0 lacks verdict"),
    (EvaluatorContract, "test_it_compares_phases", wrong.ComparesNothing, "compare_answers gave None, not a list of Score"),
    (ObserverContract, "test_a_run_is_the_same_with_it", wrong.Meddles, "the observer changes the weights"),
    (ObserverContract, "test_a_run_is_the_same_with_it", wrong.Falls, "the observer fell over"),
    (ExporterContract, "test_it_writes_the_model", wrong.ExportsNothing, "nothing was written into the directory that was given; it says 'done'"),
    (ExporterContract, "test_it_writes_the_model", wrong.SpoilsTheModel, "exporting changes the model's weights"),
    (ExporterContract, "test_what_it_writes_agrees_with_the_run", wrong.ExportsTheBase, "tokens agree ("),
    (ExporterContract, "test_what_it_writes_agrees_with_the_run", wrong.ForgetsTheTemplate, "the chat template gives '"),
    (ExporterContract, "test_what_it_writes_agrees_with_the_run", wrong.NeverStops, "it does not stop at <|im_end|>, where the run does"),
    (ExporterContract, "test_what_it_writes_agrees_with_the_run", wrong.LosesAWeight, "it lacks 1 weights, such as model.norm.weight"),
    (ExporterContract, "test_what_it_writes_agrees_with_the_run", wrong.ReadsSomethingElse, "agrees with a model that was never exported"),
]
CONTRACTS = (AdapterContract, EvaluatorContract, ExporterContract, FormatterContract, ObserverContract, QuantizerContract, TrainerContract)


def sit(contract: type[Contract], name: str, plugin: type, tmp_path, **attributes) -> None:
    """One standard test of a contract, for one plugin, with its default options."""
    test = getattr(type("Sitting", (contract,), {"plugin": plugin, **attributes})(), name)
    offered = {"given": {}, "tmp_path": tmp_path, "adapter": OWN}
    test(**{argument: offered[argument] for argument in inspect.signature(test).parameters})


def standard_tests(contract: type[Contract]) -> list[str]:
    return [name for name in dir(contract) if name.startswith("test_")]


# ---- wrong plugins -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("contract", "name", "plugin", "words"), WRONG, ids=[f"{name}-{plugin.__name__}" for _, name, plugin, _ in WRONG])
def test_the_exam_finds_what_is_wrong(contract, name, plugin, words, tmp_path):
    with pytest.raises((Exception, pytest.fail.Exception)) as caught:
        sit(contract, name, plugin, tmp_path)
    assert not isinstance(caught.value, pytest.skip.Exception) and words in str(caught.value), str(caught.value)


def test_every_standard_test_can_fail():
    """Each has a wrong plugin above (test_nothing_was_removed has tests of its own below)."""
    tried = {(contract, name) for contract, name, _, _ in WRONG}
    for contract in CONTRACTS:
        for name in standard_tests(contract):
            shared = name in vars(Contract)
            assert name == "test_nothing_was_removed" or (ANY if shared else contract, name) in tried, f"{contract.__name__}.{name}"


def test_a_standard_test_cannot_be_taken_away(tmp_path):
    with pytest.raises(AssertionError, match="test_it_merges is a standard test"):
        sit(AdapterContract, "test_nothing_was_removed", HelloAdapter, tmp_path, test_it_merges=None)
    with pytest.raises(AssertionError, match="test_its_hooks is a standard test"):
        sit(AdapterContract, "test_nothing_was_removed", HelloAdapter, tmp_path, test_its_hooks=lambda self, given: None)

    @pytest.mark.xfail
    def test_it_merges(self, given, tmp_path): ...

    with pytest.raises(AssertionError, match="reason"):
        sit(AdapterContract, "test_nothing_was_removed", HelloAdapter, tmp_path, test_it_merges=test_it_merges)

    @pytest.mark.xfail(reason="it has no merged form")
    def excused(self, given, tmp_path): ...

    sit(AdapterContract, "test_nothing_was_removed", HelloAdapter, tmp_path, test_it_merges=excused)


# ---- right plugins -------------------------------------------------------------------------------------------------

RIGHT = [
    (AdapterContract, HelloAdapter),
    (EvaluatorContract, wrong.Judge),
    (FormatterContract, wrong.Pairs),
    (QuantizerContract, wrong.Four),
]


@pytest.mark.parametrize(("contract", "plugin"), RIGHT, ids=[plugin.__name__ for _, plugin in RIGHT])
def test_the_exam_passes_what_is_right(contract, plugin, tmp_path):
    """What the wrong plugins are derived from passes every test, so each fails for its one fault."""
    for name in standard_tests(contract):
        (tmp_path / name).mkdir()
        if name not in ("test_it_is_installed", "test_its_import_is_light"):
            sit(contract, name, plugin, tmp_path / name)


def test_a_class_that_is_not_packaged_is_skipped_with_a_reason(tmp_path):
    for name in ("test_it_is_installed", "test_its_import_is_light"):
        with pytest.raises(pytest.skip.Exception, match="not packaged"):
            sit(AdapterContract, name, HelloAdapter, tmp_path, packaged=False)


def test_a_refusal_with_a_reason_is_a_skip(tmp_path):
    @wrong.plugin
    class Elsewhere(wrong.Four):
        """Works on other machines only."""

        @wrong.hookimpl
        def preflight(self, run):
            return ["it needs a GPU of another kind"]

    with pytest.raises(pytest.skip.Exception, match="preflight refuses: it needs a GPU of another kind"):
        sit(QuantizerContract, "test_a_model_loads_with_it", Elsewhere, tmp_path)


def test_what_a_plugin_says_for_its_exam_holds_unless_the_test_says_otherwise():
    class Own(FormatterContract):
        plugin = wrong.Pairs
        bad_rows = []

    assert Own.rows == wrong.PAIRS["rows"] and Own.bad_rows == []


# ---- what authors use beside the contracts -------------------------------------------------------------------------


def test_every_public_name_is_there():
    assert set(testing.__all__) == set(testing._HOMES)
    assert all(getattr(testing, name) is not None for name in testing.__all__)
    with pytest.raises(AttributeError, match="no attribute 'contracts'"):
        _ = testing.contracts


def test_the_tiny_model_needs_no_pytest():
    code = "import sys, ftx.testing; ftx.testing.tiny_model_dir; ftx.testing.make_run; print('pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_catalogue_of_classes():
    ours = catalogue(installed=False, adapter={"mine": HelloAdapter})
    assert ours.names("adapter") == ["mine"] and ours.load("adapter", "mine") is HelloAdapter and not ours.names("trainer")
    assert "sft" in catalogue(adapter={"mine": HelloAdapter}).names("trainer")
    with pytest.raises(TypeError, match="no stage is called 'adaptor'"):
        catalogue(adaptor={"mine": HelloAdapter})


def test_a_run_for_one_hook(tmp_path):
    run = make_run(tmp_path / "run", adapter="lora", seed=7)
    assert run.recipe.adapter.name == "lora" and run.seed == 7 and run.directory.checkpoints.is_dir() and run.model_path == shared_model_dir()
    run.say("hello")
    assert run.notes["said"] == ["hello"]


def test_a_whole_run_of_a_class(tmp_path):
    rows = [{"prompt": f"{i}", "completion": f"{i}"} for i in range(4)]
    plugins = catalogue(adapter={"mine": HelloAdapter})
    outcome = train(tmp_path / "run", rows, plugins, adapter="mine", trainer=testing.runs.Choice("sft", {"max_steps": 1}))
    assert (outcome.directory.model / "factors.safetensors").is_file()


def test_the_command_line_in_this_process(toy_run, tmp_path):
    listed = ftx("plugins")
    assert listed.exit_code == 0 and "lora" in listed.output and listed.run_dir is None
    assert ftx("plugins", "show", "adapter", "lroa").exit_code == 2
    made = ftx(*toy_run("-o", "trainer.max_steps=1"))
    assert made.exit_code == 0 and made.run_dir.path == tmp_path / "run" and made.run_dir.metrics.exists()
    as_json = ftx(*toy_run("-o", "trainer.max_steps=1", "--json", output=tmp_path / "other"))
    assert as_json.run_dir.path == tmp_path / "other" and json.loads(as_json.stdout)["status"] == "done"


# ---- ftx plugins check ---------------------------------------------------------------------------------------------


def test_check_needs_a_distribution_with_plugins():
    missing = ftx("plugins", "check", "ftx-lroa")
    assert missing.exit_code == 2 and "no distribution is called 'ftx-lroa'. Did you mean 'ftx-lora'?" in missing.output
    assert "Installed, with plugins: " in missing.output
    empty = ftx("plugins", "check", "ftx-core")
    assert empty.exit_code == 2 and "ftx-core has no plugin" in empty.output


def test_check_needs_pytest(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", None)
    without = ftx("plugins", "check", "ftx-lora")
    assert without.exit_code == 2 and "pip install pytest" in without.output


def test_check_counts_what_failed(tmp_path, monkeypatch):
    """A distribution with a wrong formatter and one that does not even load: three tests fail, and the exit status is 1."""
    about = tmp_path / "acme_formats-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-formats\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[ftx.formatter]\nacme = acme_formats:Acme\nlost = acme_lost:Lost\n")
    module = '''"""Formatters."""
from ftx import hookimpl, option, plugin
@plugin
class Acme:
    """Keeps the rows."""
    n: int = option(1, "")
    exam = {"rows": [{"text": "a"}, {"text": "b"}]}
    @hookimpl
    def format_dataset(self, dataset, run):
        return dataset.select([0])
'''
    (tmp_path / "acme_formats.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = ftx("plugins", "check", "acme-formats", "--json")
    # no help; a lost row, three times; a module that is not there
    failed = {"status": "failed", "error": "acme-formats: 4 of 13 tests failed.", "remedy": "The report above says what each of them wants."}
    assert result.exit_code == 1 and json.loads(result.stdout) == failed
    for words in ("n has no help", "lost or invented 1 rows", "formatter 'lost' (acme-formats 1.0) could not be loaded: No module named 'acme_lost'"):
        assert words in result.output
    assert "no bad rows: set `bad_rows`" in result.output


# ---- ftx plugins new -----------------------------------------------------------------------------------------------

STAGES = ("adapter", "evaluator", "exporter", "formatter", "observer", "quantizer", "trainer")


@pytest.fixture(scope="module")
def scaffolded(tmp_path_factory):
    """One plugin of every stage as `ftx plugins new` writes it, and a folder into which pip has installed them all."""
    folder = tmp_path_factory.mktemp("new")
    for stage in STAGES:
        written = ftx("plugins", "new", stage, f"fresh-{stage}", "--output", folder / f"ftx-fresh-{stage}")
        assert written.exit_code == 0, written.output
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--target", folder / "site"]
    subprocess.run([*command, *(folder / f"ftx-fresh-{stage}" for stage in STAGES)], check=True)
    return folder


@pytest.fixture(scope="module")
def sat(scaffolded):
    """The lines of one pytest over the tests that came with them: `PASSED file::...` and the like."""
    environment = {**os.environ, "PYTHONPATH": str(scaffolded / "site"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=short", "--disable-warnings", "--show-capture=no", "-p", "no:cacheprovider", "."]
    return subprocess.run(command, cwd=scaffolded, env=environment, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("stage", STAGES)
def test_what_new_writes_passes_its_own_test(sat, stage):
    """Every test of the contract, unchanged; none is skipped but the trainer's with adapters that this machine refuses."""
    results = [line.split()[0] for line in sat.splitlines() if f"test_ftx_fresh_{stage}.py::" in line and line.split()[0] in ("PASSED", "FAILED", "ERROR")]
    assert len(results) >= 9 and set(results) == {"PASSED"}, sat
    skipped = [line for line in sat.splitlines() if line.startswith("SKIPPED")]
    assert all("refused: " in line for line in skipped), skipped


def test_check_examines_what_new_wrote(scaffolded, process):
    result = process("plugins", "check", "ftx-fresh-formatter", "--json", PYTHONPATH=str(scaffolded / "site"))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"status": "done", "distribution": "ftx-fresh-formatter", "passed": 12, "failed": 0, "skipped": 0}


def test_new_says_what_it_wrote(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = ftx("plugins", "new", "adapter", "my-own", "--json")
    files = ["pyproject.toml", "ftx_my_own.py", "test_ftx_my_own.py", "README.md"]
    assert json.loads(result.stdout) == {"status": "done", "directory": "ftx-my-own", "files": files}
    assert "class MyOwnAdapter:" in (tmp_path / "ftx-my-own" / "ftx_my_own.py").read_text()
    for file in files:
        text = (tmp_path / "ftx-my-own" / file).read_text()
        assert text.endswith("\n") and "$" not in text


@pytest.mark.parametrize("name", ["Mine", "my_own", "1st", "my--own", "own-", "-own", "../own", "a b", "ümlaut"])
def test_new_refuses_a_name_that_cannot_be(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = ftx("plugins", "new", "adapter", "--", name)
    assert result.exit_code == 2 and f"'{name}' cannot be a plugin's name." in result.output and not list(tmp_path.iterdir())


def test_new_refuses_what_is_taken(tmp_path):
    taken = ftx("plugins", "new", "adapter", "lora", "--output", tmp_path / "x")
    assert taken.exit_code == 2 and f"the adapter 'lora' is installed already (ftx-lora {version('ftx-lora')})." in taken.output
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for place in ("full", "full/file"):
        result = ftx("plugins", "new", "adapter", "mine", "--output", tmp_path / place)
        assert result.exit_code == 2 and "exists and is not an empty directory." in result.output
    (tmp_path / "empty").mkdir()
    assert ftx("plugins", "new", "adapter", "mine", "--output", tmp_path / "empty").exit_code == 0
