"""Small plugins for the core's own tests, named as `toys:Class`: no adapter library, no network, a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

from ftx import Evaluation, RowError, Score, format_rows, hookimpl, option, plugin


@plugin
class Pairs:
    """Columns q and a as one question and one answer."""

    produces = ("prompt-completion",)

    @hookimpl
    def format_dataset(self, dataset, run):
        def convert(row):
            return {"prompt": [{"role": "user", "content": row["q"]}], "completion": [{"role": "assistant", "content": row["a"]}]}

        return format_rows(dataset, convert, run)


@plugin
class Careful(Pairs):
    """A row without q and a is one that does not fit, and the error quotes it."""

    @hookimpl
    def format_dataset(self, dataset, run):
        def convert(row):
            if not row.get("q") or not row.get("a"):
                raise RowError(f"not a pair: {row}")
            return {"prompt": [{"role": "user", "content": row["q"]}], "completion": [{"role": "assistant", "content": row["a"]}]}

        return format_rows(dataset, convert, run)


@plugin
class Losing(Pairs):
    """Loses every second row and says nothing."""

    @hookimpl
    def format_dataset(self, dataset, run):
        formatted = Pairs.format_dataset(self, dataset, run)
        return formatted.select(range(0, len(formatted), 2))


@plugin
class Head:
    """Trains the head alone."""

    suggests = {"trainer.learning_rate": 5e-3}

    @hookimpl
    def adapt_model(self, model, run):
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
        return model

    @hookimpl
    def save_adapted(self, model, path, run):
        from safetensors.torch import save_file

        save_file({"weight": model.lm_head.weight.detach().clone()}, Path(path) / "head.safetensors")

    @hookimpl
    def load_adapted(self, base, path, run):
        from safetensors.torch import load_file

        base.lm_head.weight.data.copy_(load_file(Path(path) / "head.safetensors")["weight"])
        return base

    @hookimpl
    def merge_adapted(self, model, run):
        return model

    @hookimpl
    def adapter_off(self, model, run):
        return None


@plugin
class Frozen(Head):
    """Trains nothing."""

    @hookimpl
    def adapt_model(self, model, run):
        return model.requires_grad_(False)


@plugin
class Loud(Head):
    """Warns, and logs, with what a terminal would obey."""

    @hookimpl
    def adapt_model(self, model, run):
        import logging
        import warnings

        warnings.warn("\x1b]0;owned\x07 by a warning", stacklevel=1)
        logging.getLogger("some.library").warning("\x1b[2Jowned\x9b by a log")
        return Head.adapt_model(self, model, run)


@plugin
class Detached(Head):
    """The head's gradient is always zero."""

    @hookimpl
    def adapt_model(self, model, run):
        model = Head.adapt_model(self, model, run)
        model.lm_head.weight.register_hook(lambda gradient: gradient * 0)
        return model


@plugin
class Nothing(Head):
    """Forgets to return the model."""

    @hookimpl
    def adapt_model(self, model, run):
        model.requires_grad_(True)


@plugin
class Equal:
    """The share of answers equal to the reference; `draws` random numbers are drawn on the way."""

    max_new_tokens: int = option(8, "Tokens of an answer.")
    draws: int = option(0, "Random numbers to draw.")

    @hookimpl
    def evaluate_model(self, generate, dataset, run):
        import torch

        from ftx.encode import question_and_reference

        torch.rand(self.draws)
        pairs = [question_and_reference(row) for row in dataset]
        answers = generate([question for question, _ in pairs], max_new_tokens=self.max_new_tokens)
        items = [
            {"prompt": question, "answer": answer, "reference": reference, "verdict": "correct" if answer == reference else "wrong"}
            for (question, reference), answer in zip(pairs, answers, strict=True)
        ]
        share = sum(item["verdict"] == "correct" for item in items) / len(items)
        return Evaluation([Score(metric="equal", value=share, n=len(items))], items)

    @hookimpl
    def compare_answers(self, base_items, tuned_items, run):
        changed = sum(a["verdict"] != b["verdict"] for a, b in zip(base_items, tuned_items, strict=True))
        return [Score(metric="changed", value=changed, n=len(base_items))]


@plugin
class Raising:
    """An evaluator that raises."""

    @hookimpl
    def evaluate_model(self, generate, dataset, run):
        raise RuntimeError("the judge is on holiday")


@plugin
class Diary:
    """Writes the name of every gathering hook that it is asked, one a line, into `file`; raises in `raises`."""

    file: str = option("", "Where to write.")
    raises: str = option("", "The hook that raises.")

    def _note(self, hook, **about):
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"hook": hook, **about}) + "\n")
        if hook == self.raises:
            raise RuntimeError(f"{hook} raised")

    @hookimpl
    def preflight(self, run):
        self._note("preflight", directory=run.directory is not None)

    @hookimpl
    def audit_dataset(self, dataset, split, run):
        self._note("audit_dataset", split=split)

    @hookimpl
    def run_started(self, run):
        self._note("run_started", recipe=run.directory.recipe.exists())

    @hookimpl
    def dataset_encoded(self, dataset, split, run):
        self._note("dataset_encoded", split=split)

    @hookimpl
    def model_loaded(self, model, run):
        self._note("model_loaded")

    @hookimpl
    def trainer_callbacks(self, run):
        self._note("trainer_callbacks")

    @hookimpl
    def evaluate_model(self, generate, dataset, run):
        self._note("evaluate_model")
        return Evaluation([], [])

    @hookimpl
    def run_finished(self, run, scores):
        self._note("run_finished", scores=len(scores))

    @hookimpl
    def run_failed(self, run, error):
        self._note("run_failed", error=str(error))


@plugin
class Dying:
    """An observer whose callback kills the process, as the kernel would, behind step `at`."""

    at: int = option(3, "The step.")

    @hookimpl
    def trainer_callbacks(self, run):
        import os
        import signal

        from transformers import TrainerCallback

        at = self.at

        class Kill(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == at and not os.environ.get("FTX_TEST_SURVIVE"):
                    os.kill(os.getpid(), signal.SIGKILL)

        return [Kill()]


@plugin
class Narrow:
    """An observer whose callback lets no file grow beyond `size` bytes from step `at` on: a full disk, for which nobody needs rights."""

    at: int = option(2, "The step.")
    size: int = option(8192, "Bytes.")

    @hookimpl
    def trainer_callbacks(self, run):
        import os
        import resource

        from transformers import TrainerCallback

        at, size = self.at, self.size

        class Limit(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == at and not os.environ.get("FTX_TEST_SURVIVE"):
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        return [Limit()]


@plugin
class Falling:
    """An observer that falls over in the third step."""

    @hookimpl
    def trainer_callbacks(self, run):
        from transformers import TrainerCallback

        class Fall(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 2:
                    raise RuntimeError("the step fell over")

        return [Fall()]


@plugin
class Hungry(Head):
    """From the fifth forward pass on it needs 1.5 GiB of addresses for each row of the batch, for a moment."""

    @hookimpl
    def adapt_model(self, model, run):
        import torch

        passes = []

        def eat(module, args, kwargs):
            passes.extend([1] * module.training)
            if len(passes) > 4 and module.training:
                torch.empty(len(kwargs["input_ids"]) * 3 << 29, dtype=torch.uint8)  # not touched, so it takes no room

        model.register_forward_pre_hook(eat, with_kwargs=True)
        return Head.adapt_model(self, model, run)
