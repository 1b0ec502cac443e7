"""Plugins that are wrong, each in one way: the exam must find it."""

from __future__ import annotations

import itertools
import os
import random
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from support import REPO

from ftx import Evaluation, RowError, Score, format_rows, hookimpl, option, plugin

sys.path.append(str(REPO / "examples" / "ftx-hello"))

from ftx_hello import HelloAdapter, adapted, attach, detach
from ftx_sft import SFT

# ---- any stage -----------------------------------------------------------------------------------------------------


class Undecorated(HelloAdapter):
    """A subclass without @plugin."""


@plugin
class Undescribed:
    n: int = option(1, "A number.")


@plugin
class BlankHelp:
    """An option has no help."""

    n: int = option(1, "")


@plugin
class WrongDefault:
    """None is no int."""

    n: int = option(None, "A number.")


@plugin
class WrongType:
    """Options cannot be sets."""

    n: set[int] = option({1}, "Numbers.")


@plugin
class Sloppy:
    """An int as the default of a float: YAML gives a float back."""

    n: float = option(3, "A number.")


@plugin
class Forgetful:
    """What it is given is not what it keeps."""

    n: int = option(3, "A number.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", self.n + 1)


@plugin
class WrongRowType:
    """Chat is no row type."""

    accepts = ("chat",)


@plugin
class WrongRequires:
    """A requirement without a stage."""

    requires = ("lora",)


@plugin
class WrongSuggests:
    """A suggestion without a stage."""

    suggests = {"learning_rate": 1e-3}


@plugin
class DefaultedArgument:
    """A hook with a default."""

    @hookimpl
    def run_finished(self, run, scores=()): ...


@plugin
class KeywordArgument:
    """A hook with a keyword-only argument."""

    @hookimpl
    def run_finished(self, *, run): ...


@plugin
class StarredArgument:
    """A hook with ** arguments."""

    @hookimpl
    def run_finished(self, **everything): ...


@plugin
class UnknownArgument:
    """A hook with an argument that it does not have."""

    @hookimpl
    def run_finished(self, run, model): ...


@plugin
class UnknownHook:
    """A hook that there is not."""

    @hookimpl
    def run_finnished(self, run): ...


@plugin
class Unmarked:
    """A hook without its mark."""

    def run_finished(self, run, scores): ...


@plugin
class NoHook:
    """Does nothing."""


# ---- adapters ------------------------------------------------------------------------------------------------------


@plugin
class Partial(HelloAdapter):
    """Right but for what it leaves out: merging."""

    merge_adapted = None


@plugin
class StartsElsewhere(HelloAdapter):
    """The factors start at 1.5."""

    @hookimpl
    def adapt_model(self, model, run):
        model = super().adapt_model(model, run)
        for layer in adapted(model).values():
            layer.factor.data.fill_(1.5)
        return model


@plugin
class TrainsTheBase(HelloAdapter):
    """Thaws the head too."""

    @hookimpl
    def adapt_model(self, model, run):
        model = super().adapt_model(model, run)
        model.lm_head.requires_grad_(True)
        return model


@plugin
class ChangesTheBase(HelloAdapter):
    """Every training step moves a frozen weight."""

    @hookimpl
    def adapt_model(self, model, run):
        def move(module, *_):
            if module.training:
                module.lm_head.weight.data.mul_(0.99)

        model = super().adapt_model(model, run)
        model.register_forward_hook(move)
        return model


@plugin
class TrainsNothing(HelloAdapter):
    """Freezes the factors too."""

    @hookimpl
    def adapt_model(self, model, run):
        return super().adapt_model(model, run).requires_grad_(False)


@plugin
class LeavesOneOut(HelloAdapter):
    """One factor has no part in the model."""

    @hookimpl
    def adapt_model(self, model, run):
        model = super().adapt_model(model, run)
        next(iter(adapted(model).values())).factor_hook.remove()
        return model


@plugin
class Unlearns(HelloAdapter):
    """Its gradients point uphill."""

    @hookimpl
    def adapt_model(self, model, run):
        model = super().adapt_model(model, run)
        for layer in adapted(model).values():
            layer.factor.register_hook(lambda gradient: -gradient)
        return model


@plugin
class LoadsNothing(HelloAdapter):
    """Loading gives fresh factors."""

    @hookimpl
    def load_adapted(self, base, path, run):
        return self.adapt_model(base, run).eval()


@plugin
class LoadsForTraining(HelloAdapter):
    """Loading gives a model in training mode."""

    @hookimpl
    def load_adapted(self, base, path, run):
        return super().load_adapted(base, path, run).train()


@plugin
class Pickles(HelloAdapter):
    """Saves a pickle beside the weights."""

    @hookimpl
    def save_adapted(self, model, path, run):
        import torch

        super().save_adapted(model, path, run)
        torch.save({}, path / "more.bin")


@plugin
class SavesNothing(HelloAdapter):
    """Saves a text."""

    @hookimpl
    def save_adapted(self, model, path, run):
        (path / "note.txt").write_text("all is well")


@plugin
class MergesNothing(HelloAdapter):
    """Takes the factors off and forgets them."""

    @hookimpl
    def merge_adapted(self, model, run):
        for layer in adapted(model).values():
            detach(layer)
        return model


@plugin
class StaysAdapted(HelloAdapter):
    """The merged model has its factors still."""

    @hookimpl
    def merge_adapted(self, model, run):
        return model


@plugin
class MergesIntoAnother(HelloAdapter):
    """Gives something that is no transformers model."""

    @hookimpl
    def merge_adapted(self, model, run):
        return model.model.layers[0]


@plugin
class NeverOff(HelloAdapter):
    """Off changes nothing."""

    @hookimpl
    def adapter_off(self, model, run):
        @contextmanager
        def off():
            yield model

        return off()


@plugin
class NeverOnAgain(HelloAdapter):
    """Off stays off."""

    @hookimpl
    def adapter_off(self, model, run):
        @contextmanager
        def off():
            for layer in adapted(model).values():
                layer.factor_hook.remove()
            yield model

        return off()


@plugin
class Unseeded(HelloAdapter):
    """Starts from what the operating system draws."""

    @hookimpl
    def adapt_model(self, model, run):
        model.requires_grad_(False)
        for layer in self.targets(model).values():
            attach(layer)
            layer.factor.data += int.from_bytes(os.urandom(4), "big") / 2**40
        return model


# ---- formatters ----------------------------------------------------------------------------------------------------

PAIRS = {"rows": [{"q": "2 + 2?", "a": "4"}, {"q": "3 + 3?", "a": "6"}], "bad_rows": [{"q": "5 + 5?"}]}


@plugin
class Pairs:
    """Right: columns q and a."""

    produces = ("prompt-completion",)
    exam = PAIRS

    @hookimpl
    def format_dataset(self, dataset, run):
        return format_rows(dataset, self.convert, run)

    def convert(self, row):
        if not row.get("a"):
            raise RowError("no answer")
        return {"prompt": row["q"], "completion": row["a"]}


@plugin
class WritesOtherRows(Pairs):
    """What it writes back is read as another row."""

    @hookimpl
    def unformat_row(self, row, run):
        return {"q": row["prompt"], "a": row["completion"].upper() + "!"}


@plugin
class LosesARow(Pairs):
    """Drops the last row and says nothing."""

    @hookimpl
    def format_dataset(self, dataset, run):
        formatted = super().format_dataset(dataset, run)
        return formatted.select(range(len(formatted) - 1))


@plugin
class InventsARow(Pairs):
    """Adds a row that no line holds."""

    @hookimpl
    def format_dataset(self, dataset, run):
        formatted = super().format_dataset(dataset, run)
        return type(formatted).from_list([*formatted, {**formatted[0], "_line": 99}], features=formatted.features)


@plugin
class NoRowType(Pairs):
    """Its columns make no row type."""

    def convert(self, row):
        return {"question": row["q"], "answer": row["a"]}


@plugin
class OtherRowType(Pairs):
    """Gives text and says prompt-completion."""

    def convert(self, row):
        return {"text": row["q"]}


@plugin
class NoSource(Pairs):
    """Forgets where the rows came from."""

    @hookimpl
    def format_dataset(self, dataset, run):
        return super().format_dataset(dataset, run).remove_columns(["_file", "_line"])


@plugin
class NoRoles(Pairs):
    """Its messages have no roles."""

    def convert(self, row):
        return {"prompt": [{"content": row["q"]}], "completion": row["a"]}


@plugin
class Unstable(Pairs):
    """Draws its prompts."""

    def convert(self, row):
        return {"prompt": f"{row['q']} {random.random()}", "completion": row["a"]}


@plugin
class TakesAll(Pairs):
    """Makes an answer up where there is none."""

    def convert(self, row):
        return {"prompt": row["q"], "completion": row.get("a") or "?"}


@plugin
class NamesNoLine(Pairs):
    """Raises without file and line, and outside the ledger."""

    @hookimpl
    def format_dataset(self, dataset, run):
        from ftx.errors import DataError

        if not all(dataset["a"]):
            raise DataError("some row has no answer.")
        return super().format_dataset(dataset, run)


# ---- quantizers ----------------------------------------------------------------------------------------------------


@plugin
class QuantisesNothing:
    """Its configuration is None."""

    @hookimpl
    def quantization_config(self, run):
        return None


@plugin
class Four:
    """Right: 4 bits."""

    @hookimpl
    def quantization_config(self, run):
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=run.dtype)

    @hookimpl
    def model_loaded(self, model, run):
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False


@plugin
class Blurs(Four):
    """The model says something else."""

    @hookimpl
    def model_loaded(self, model, run):
        model.lm_head.weight.data.neg_()


@plugin
class ChangesInEvaluation(Four):
    """A forward pass in evaluation mode moves a weight."""

    @hookimpl
    def model_loaded(self, model, run):
        def move(module, *_):
            if not module.training:
                module.lm_head.weight.data.mul_(1.01)

        super().model_loaded(model, run)
        model.register_forward_hook(move)


COUNT = itertools.count()


@plugin
class AnotherEachTime(Four):
    """Another configuration each time."""

    @hookimpl
    def quantization_config(self, run):
        config = super().quantization_config(run)
        config.bnb_4bit_use_double_quant = bool(next(COUNT) % 2)
        return config


@plugin
class SilentlyRefusing(Four):
    """Refuses without a reason."""

    @hookimpl
    def preflight(self, run):
        return [""]


# ---- trainers ------------------------------------------------------------------------------------------------------


@dataclass
class Around:
    """What make_trainer may return: something with train, save_model and model."""

    inner: Any
    resumes: bool = True

    @property
    def model(self):
        return self.inner.model

    def train(self, resume_from_checkpoint=None):
        return self.inner.train(resume_from_checkpoint=resume_from_checkpoint if self.resumes else None)

    def save_model(self, path):
        return self.inner.save_model(path)


@plugin
class Idle(SFT):
    """Makes no step."""

    @hookimpl
    def make_trainer(self, model, tokenizer, train_dataset, eval_dataset, callbacks, run):
        trainer = Around(super().make_trainer(model, tokenizer, train_dataset, eval_dataset, callbacks, run))
        trainer.train = lambda resume_from_checkpoint=None: None
        return trainer


@plugin
class Standing(SFT):
    """Its steps have the length 0."""

    @hookimpl
    def make_trainer(self, model, tokenizer, train_dataset, eval_dataset, callbacks, run):
        trainer = super().make_trainer(model, tokenizer, train_dataset, eval_dataset, callbacks, run)
        trainer.args.learning_rate = 0.0
        return trainer


@plugin
class StartsOver(SFT):
    """Resuming begins at the first step."""

    @hookimpl
    def make_trainer(self, model, tokenizer, train_dataset, eval_dataset, callbacks, run):
        return Around(super().make_trainer(model, tokenizer, train_dataset, eval_dataset, callbacks, run), resumes=False)


@plugin
class ShufflesAnew(SFT):
    """Whoever resumes sees the rows in another order."""

    @hookimpl
    def make_trainer(self, model, tokenizer, train_dataset, eval_dataset, callbacks, run):
        resuming = any(run.directory.checkpoints.glob("checkpoint-*"))
        order = list(reversed(range(len(train_dataset)))) if resuming else list(range(len(train_dataset)))
        return super().make_trainer(model, tokenizer, train_dataset.select(order), eval_dataset, callbacks, run)


@plugin
class Deaf(SFT):
    """Calls none of the callbacks that it is given."""

    @hookimpl
    def make_trainer(self, model, tokenizer, train_dataset, eval_dataset, callbacks, run):
        return super().make_trainer(model, tokenizer, train_dataset, eval_dataset, [], run)


@plugin
class HardOfHearing(SFT):
    """Does not call the callback that Ctrl-C sets."""

    @hookimpl
    def make_trainer(self, model, tokenizer, train_dataset, eval_dataset, callbacks, run):
        heard = [one for one in callbacks if type(one).__name__ != "Interrupt"]
        return super().make_trainer(model, tokenizer, train_dataset, eval_dataset, heard, run)


@plugin
class Endless:
    """Has no max_steps."""

    encode_dataset = SFT.encode_dataset
    make_trainer = SFT.make_trainer


# ---- evaluators ----------------------------------------------------------------------------------------------------


@plugin
class Judge:
    """Right: the share of answers equal to the reference."""

    way: Literal["asked", "at once"] = option("asked", "How the questions are asked.")

    @hookimpl
    def evaluate_model(self, generate, dataset, run):
        from ftx.encode import question_and_reference

        pairs = [question_and_reference(row) for row in dataset]
        answers = generate([question for question, _ in pairs], max_new_tokens=8)
        items = [{"prompt": q, "answer": a, "reference": r, "verdict": self.verdict(a, r)} for (q, r), a in zip(pairs, answers, strict=True)]
        return Evaluation([Score(metric="equal", value=sum(item["verdict"] == "correct" for item in items) / len(items), n=len(items))], items)

    def verdict(self, answer, reference):
        return "correct" if answer == reference else "wrong"

    @hookimpl
    def compare_answers(self, base_items, tuned_items, run):
        return [Score(metric="changed", value=sum(a["verdict"] != b["verdict"] for a, b in zip(base_items, tuned_items, strict=True)), n=len(base_items))]


@plugin
class Content(Judge):
    """Every answer is right."""

    def verdict(self, answer, reference):
        return "correct"


@plugin
class FallsOverNothing(Judge):
    """Looks at the first letter."""

    def verdict(self, answer, reference):
        return "correct" if answer.strip()[0] == reference[0] else "wrong"


@plugin
class Gullible(Judge):
    """Finds the reference anywhere in the answer."""

    def verdict(self, answer, reference):
        return "correct" if reference in answer else "wrong"


@plugin
class Begged(Judge):
    """Believes an answer that says so."""

    def verdict(self, answer, reference):
        return "correct" if answer == reference or "is correct" in answer else "wrong"


@plugin
class Reversed(Judge):
    """Its items stand in another order than the data."""

    @hookimpl
    def evaluate_model(self, generate, dataset, run):
        found = super().evaluate_model(generate, dataset, run)
        return Evaluation(found.scores, found.items[::-1])


@plugin
class MixesAnswers(Judge):
    """Gives each item its neighbour's answer."""

    @hookimpl
    def evaluate_model(self, generate, dataset, run):
        found = super().evaluate_model(generate, dataset, run)
        moved = [item["answer"] for item in found.items[1:] + found.items[:1]]
        return Evaluation(found.scores, [{**item, "answer": answer} for item, answer in zip(found.items, moved, strict=True)])


@plugin
class SkipsItems(Judge):
    """Writes the right ones only."""

    @hookimpl
    def evaluate_model(self, generate, dataset, run):
        found = super().evaluate_model(generate, dataset, run)
        items = found.items[:2]
        return Evaluation([replace(found.scores[0], n=len(items))], items)


@plugin
class NoVerdict(Judge):
    """Its items have no verdict."""

    @hookimpl
    def evaluate_model(self, generate, dataset, run):
        found = super().evaluate_model(generate, dataset, run)
        return Evaluation(found.scores, [{key: value for key, value in item.items() if key != "verdict"} for item in found.items])


@plugin
class NotANumber(Judge):
    """Its score is not a number."""

    @hookimpl
    def evaluate_model(self, generate, dataset, run):
        found = super().evaluate_model(generate, dataset, run)
        return Evaluation([replace(found.scores[0], value=float("nan"))], found.items)


@plugin
class OutsideItself(Judge):
    """Its score lies outside its own interval."""

    @hookimpl
    def evaluate_model(self, generate, dataset, run):
        found = super().evaluate_model(generate, dataset, run)
        return Evaluation([replace(found.scores[0], ci_low=2.0, ci_high=3.0)], found.items)


@plugin
class ComparesNothing(Judge):
    """compare_answers gives None."""

    @hookimpl
    def compare_answers(self, base_items, tuned_items, run):
        return None


# ---- observers and exporters ---------------------------------------------------------------------------------------


@plugin
class Meddles:
    """Moves a weight of the base."""

    @hookimpl
    def model_loaded(self, model, run):
        model.model.norm.weight.data.mul_(1.001)


@plugin
class Falls:
    """Raises in the run."""

    @hookimpl
    def run_started(self, run):
        raise RuntimeError("the observer fell over")


@plugin
class ExportsNothing:
    """Writes nothing."""

    @hookimpl
    def export_model(self, model, path, run):
        return "done"


@plugin
class SpoilsTheModel:
    """Rounds the model's own weights on the way out."""

    @hookimpl
    def export_model(self, model, path, run):
        for parameter in model.parameters():
            parameter.data = parameter.data.round()
        model.save_pretrained(path)
        return "done"


@plugin
class ExportsTheBase:
    """Forgets what was trained."""

    @hookimpl
    def export_model(self, model, tokenizer, path, run):
        from ftx import models

        models.load_model(run.model_path, dtype=run.dtype, device=run.device).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return "done"


@plugin
class ForgetsTheTemplate:
    """Hands on a tokenizer with another chat template."""

    @hookimpl
    def export_model(self, model, tokenizer, path, run):
        import copy

        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "")
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return "done"


@plugin
class NeverStops:
    """Hands on a model that knows no end of an answer."""

    @hookimpl
    def export_model(self, model, tokenizer, path, run):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        for name in ("config.json", "generation_config.json"):
            text = (path / name).read_text()
            (path / name).write_text(text.replace('"eos_token_id": 2', '"eos_token_id": null'))
        return "done"


@plugin
class LosesAWeight:
    """Leaves a weight out."""

    @hookimpl
    def export_model(self, model, tokenizer, path, run):
        state = {name: tensor for name, tensor in model.state_dict().items() if name != "model.norm.weight"}
        model.save_pretrained(path, state_dict=state)
        tokenizer.save_pretrained(path)
        return "done"


@plugin
class ReadsSomethingElse:
    """Reads the run back, and not what it wrote."""

    @hookimpl
    def export_model(self, model, tokenizer, path, run):
        (path / "note.txt").write_text("the model lies elsewhere")
        return "done"

    @hookimpl
    def read_exported(self, path, run):
        from ftx import models, pipeline
        from ftx.catalogue import Catalogue
        from ftx.parity import TransformersReader

        newest = max(run.directory.path.parent.glob("*/model"), key=lambda place: place.stat().st_mtime)
        model = run.hooks.call("load_adapted", base=pipeline.load_base(run.hooks, Catalogue(), run), path=newest, run=run)
        return TransformersReader(model, models.load_tokenizer(newest), name="itself")
