"""The formatter that looks at the columns and the first rows, says which formatter fits, and leaves the work to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftx import hookimpl, plugin
from ftx.errors import DataError
from ftx_formats import Alpaca, Completion, Messages, ShareGPT, Text
from ftx_formats_fields import columns_of, guesses
from ftx_formats_preference import Preference

if TYPE_CHECKING:
    from datasets import Dataset

    from ftx import Run

FORMATTERS: dict[str, Any] = {"alpaca": Alpaca, "completion": Completion, "messages": Messages, "preference": Preference, "sharegpt": ShareGPT, "text": Text}


@plugin
class Auto:
    """Chooses among the formatters of ftx-formats by column names and first rows, and says which."""

    # It says nothing of what it produces: that is certain only once the file is read.
    exam = Alpaca.exam

    @hookimpl
    def format_dataset(self, dataset: Dataset, run: Run) -> Dataset:
        """What the one formatter that fits makes of the rows; DataError if none fits, or more than one."""
        found = guesses(dataset)
        if not found:
            raise DataError(
                f"formatter auto: no formatter fits the columns {', '.join(columns_of(dataset))}.",
                f"Name one and its columns: --formatter {', '.join(FORMATTERS)}; for instance\n"
                "--formatter completion -o formatter.prompt_column=NAME -o formatter.completion_column=NAME",
            )
        if len(found) > 1:
            raise DataError(f"formatter auto: {' and '.join(map(str, found))} fit alike.", "Name one:\n" + "\n".join(guess.command for guess in found))
        run.say(f"formatter auto: {found[0]}")
        chosen = FORMATTERS[found[0].formatter](**found[0].options)
        formatted: Dataset = chosen.format_dataset(dataset, run)
        return formatted
