"""The formatter that looks at the columns and the first rows, says which formatter fits, and leaves the work to it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from ftx import FtxError, hookimpl, plugin
from ftx.data import read_rows, row_type, to_dataset
from ftx.errors import DataError
from ftx.ledger import Ledger
from ftx_formats import Alpaca, Completion, Messages, ShareGPT, Text
from ftx_formats_fields import SAMPLE, Guess, columns_of, guesses
from ftx_formats_preference import Preference

if TYPE_CHECKING:
    from datasets import Dataset

    from ftx import Run

FORMATTERS: dict[str, Any] = {"alpaca": Alpaca, "completion": Completion, "messages": Messages, "preference": Preference, "sharegpt": ShareGPT, "text": Text}


#: The formatter that writes rows of a type as they are.
BY_TYPE = {"conversation": "messages", "prompt-completion": "completion", "text": "text", "preference": "preference", "unpaired-preference": "preference"}


@plugin
class Auto:
    """Chooses among the formatters of ftx-formats by column names and first rows, and says which."""

    # It says nothing of what it produces: that is certain only once the file is read.
    exam = Alpaca.exam

    @hookimpl
    def format_dataset(self, dataset: Dataset, run: Run) -> Dataset:
        """What the one formatter that fits makes of the rows; DataError if none fits, or more than one."""
        found = chosen(dataset)
        run.say(f"formatter auto: {found}")
        formatted: Dataset = FORMATTERS[found.formatter](**found.options).format_dataset(dataset, run)
        return formatted

    @hookimpl
    def unformat_row(self, row: dict[str, Any], run: Run) -> dict[str, Any]:
        """As the run's training data has it; where those cannot be read, in the form that has the name of the row type."""
        found = _of_training_data(run) or Guess(BY_TYPE.get(row_type(row) or "", "messages"), ())
        written: dict[str, Any] = FORMATTERS[found.formatter](**found.options).unformat_row(row, run)
        return written


def chosen(dataset: Dataset) -> Guess:
    """The one formatter that fits; DataError if none does, or more than one."""
    found = guesses(dataset)
    if not found:
        raise DataError(
            f"formatter auto: no formatter fits the columns {', '.join(columns_of(dataset))}.",
            f"Name one and its columns: --formatter {', '.join(FORMATTERS)}; for instance\n"
            "--formatter completion -o formatter.prompt_column=NAME -o formatter.completion_column=NAME",
        )
    if len(found) > 1:
        raise DataError(f"formatter auto: {' and '.join(map(str, found))} fit alike.", "Name one:\n" + "\n".join(guess.command for guess in found))
    return found[0]


def _of_training_data(run: Run) -> Guess | None:
    reference = getattr(run.recipe, "data", None)
    if reference is None:
        return None
    try:
        return chosen(to_dataset(list(itertools.islice(read_rows(reference, Ledger(skip_bad_rows=True)), SAMPLE))))
    except FtxError:
        return None
