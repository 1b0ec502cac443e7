"""Which steps have the longest batch is known when training begins."""

from __future__ import annotations

import json

import pytest
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from datasets import Dataset
from support import write_rows
from torch.utils.data import DataLoader, RandomSampler

from ftx.longest import longest_of, sizes_of_steps

LENGTHS = [3, 9, 4, 4, 1, 7, 2, 8, 5, 6]


def loader_of(lengths, *, seedable=True, columns=("input_ids",)):
    tokens = [[1] * length for length in lengths]
    dataset = Dataset.from_dict({name: tokens for name in columns})
    plain = DataLoader(dataset, batch_size=2, sampler=RandomSampler(dataset), collate_fn=lambda rows: [len(row["input_ids"]) for row in rows])
    settings = DataLoaderConfiguration(use_seedable_sampler=seedable, data_seed=5)
    return Accelerator(cpu=True, dataloader_config=settings).prepare(plain)


def steps_as_they_come(loader, epochs, accumulation):
    """[[lengths of a batch, ...], ...] of each step."""
    steps = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        batches = list(loader)
        steps += [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]
    return steps


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("after", [0, 1, 7])
def test_they_are_those_that_come(accumulation, after):
    steps = steps_as_they_come(loader_of(LENGTHS), 4, accumulation)
    last = len(steps) - 1
    asked = range(after, last)
    tokens = max(asked, key=lambda number: max(map(sum, steps[number])))
    padded = max(asked, key=lambda number: max(max(batch) * len(batch) for batch in steps[number]))
    loader = loader_of(LENGTHS)
    sizes = sizes_of_steps(loader, accumulation=accumulation, after=after, last=last)
    assert list(sizes) == [number + 1 for number in asked] and longest_of(sizes) == {tokens + 1, padded + 1}
    assert steps_as_they_come(loader, 4, accumulation) == steps, "the order of the training is what it was"


def test_pairs_count_with_both_sides():
    dataset = Dataset.from_dict({"chosen_input_ids": [[1] * 2, [1] * 5, [1]], "rejected_input_ids": [[2], [1], [2] * 4]})
    loader = Accelerator(cpu=True).prepare(DataLoader(dataset, batch_size=1))
    assert sizes_of_steps(loader, accumulation=1, after=0, last=3) == {1: (3, 3, 4), 2: (6, 5, 10), 3: (5, 5, 8)}
    assert longest_of(sizes_of_steps(loader, accumulation=1, after=0, last=3)) == {2}
    assert longest_of(sizes_of_steps(loader, accumulation=1, after=2, last=3)) == {3}
    assert longest_of(sizes_of_steps(loader, accumulation=1, after=3, last=3)) == set()


def test_an_order_that_nobody_knows_is_not_guessed():
    for loader in (None, loader_of(LENGTHS, seedable=False), loader_of(LENGTHS, columns=("text", "pixels")), iter([])):
        assert sizes_of_steps(loader, accumulation=1, after=0, last=5) is None


def test_a_run_measures_its_longest_step_and_the_first_with_states(toy_run, tmp_path, cli, monkeypatch):
    from ftx.peak import Peak

    data = tmp_path / "rows.jsonl"
    write_rows(data, [{"q": f"say a {number} times", "a": "a " * number} for number in range(1, 41)])
    looked: list[int] = []
    begin = Peak._begin
    monkeypatch.setattr(Peak, "_begin", lambda self: (looked.append(len(self.steps) + 1), begin(self))[1])
    assert cli(*toy_run("--data", str(data), "-o", "trainer.max_steps=12")).exit_code == 0
    measured = json.loads((tmp_path / "run" / "plan.json").read_text())["measured"]
    assert len(looked) <= 4 and 2 in looked and measured["step"] in looked and measured["timed_steps"] >= 8
