"""The parts together: asked for by name, put on, taken off; and a batch joined or not, the same loss."""

from __future__ import annotations

import pytest
import torch

from ftx.testing.tiny import tiny_model
from ftx_fast import PARTS, install, parts_of
from ftx_fast_prefixes import tree_of


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        ("auto", list(PARTS)),
        (True, list(PARTS)),
        ("off", []),
        (False, []),
        ("head", ["head"]),
        (["rows"], ["rows"]),
        ("head, rows", ["head", "rows"]),
        (["auto", "graphs"], [*PARTS, "graphs"]),
        ("graphs,auto", ["graphs", *PARTS]),
    ],
)
def test_what_is_asked_for(asked, parts):
    assert parts_of(asked) == parts


def test_a_part_that_there_is_not():
    with pytest.raises(ValueError, match="Did you mean head"):
        parts_of(["haed"])


def test_on_and_off_again():
    model = tiny_model()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    attention, precision = model.config._attn_implementation, torch.backends.mkldnn.matmul.fp32_precision
    fast = install(model, list(PARTS))
    assert fast.head is not None and fast.joins and fast.on
    fast.undo()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert (model.config._attn_implementation, torch.backends.mkldnn.matmul.fp32_precision) == (attention, precision)


def test_nothing_asked_for_changes_nothing():
    fast = install(tiny_model(), [])
    assert fast.head is None and not fast.joins and not fast.on and not fast.off


#: Parts that want others.
WITH = {"rows": ["attention", "rows"], "prefixes": ["attention", "rows", "prefixes"]}


@pytest.mark.parametrize("part", [*PARTS, "all"])
def test_gradients_of_each_part_alone_and_of_all(part):
    """A whole step of LoRA: loss over supervised tokens, the gradient of every trained parameter as without the part."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    lengths = [3, 9, 5]
    ids = torch.randint(1, 60, (3, 9))
    ids[:, :3] = ids[0, :3]
    labels = torch.where(torch.arange(9) < torch.tensor(lengths)[:, None], ids, -100)

    def step(parts):
        fast = install(model, parts)
        model.zero_grad()
        try:
            if parts and not fast.on:
                pytest.skip("; ".join(fast.off) or f"{part} has nothing to do on this processor")
            given, wanted = fast.joined({"input_ids": ids, "use_cache": False}, labels, lengths, 0)
            keep = torch.zeros_like(wanted, dtype=torch.bool)
            keep[:, :-1] = wanted[:, 1:] != -100
            targets = wanted[:, 1:][keep[:, :-1]]
            tree = tree_of(ids, labels, lengths)
            shared = fast.shared({"input_ids": ids}, tree, 0)
            assert (shared is not None) == (part in ("prefixes", "all") and bool(parts))
            places = (0, tree.kept) if shared else keep
            if fast.head is None:
                loss = torch.nn.functional.cross_entropy(model(**(shared or given)).logits[places], targets)
            else:
                with fast.head.left_out():
                    hidden = model(**(shared or given)).logits[places]
                loss = -fast.head.logps(hidden, targets).mean()
            loss.backward()
        finally:
            fast.undo()
        return loss.detach(), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}

    wanted_loss, wanted = step([])
    loss, got = step(list(PARTS) if part == "all" else WITH.get(part, [part]))
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)
    assert got.keys() == wanted.keys() and len(got) > 8
    for name, gradient in got.items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


@pytest.mark.parametrize("part", ["products", "memory"])
def test_settings_of_the_process_leave_numbers_as_they_are(part):
    torch.manual_seed(0)
    x, y = torch.randn(300, 576), torch.randn(576, 576)
    wanted = x.double() @ y.double()
    usual = float((x @ y - wanted).norm())
    fast = install(torch.nn.Linear(8, 8), [part])
    if not fast.on:
        pytest.skip("; ".join(fast.off) or f"{part} has nothing to do on this processor")
    try:
        assert float((x @ y - wanted).norm()) <= 2 * usual
    finally:
        fast.undo()


def test_joined_rows_have_the_loss_of_padded_ones():
    model = tiny_model()
    fast = install(model, ["attention", "rows"])
    lengths = [3, 9, 5]
    ids = torch.randint(1, 60, (3, 9))
    labels = torch.where(torch.arange(9) < torch.tensor(lengths)[:, None], ids, -100)
    given, joined = fast.joined({"input_ids": ids, "use_cache": False}, labels, lengths, 0)
    assert joined.shape[0] == 1
    sums = []
    for arguments, wanted in ((given, joined), ({"input_ids": ids, "use_cache": False}, labels)):
        logits = model(**arguments).logits[:, :-1].flatten(0, 1)
        sums.append(torch.nn.functional.cross_entropy(logits.float(), wanted[:, 1:].flatten(), reduction="sum"))
    fast.undo()
    torch.testing.assert_close(*sums)


class Deaf(torch.nn.Module):
    """A wrapper that takes no position ids."""

    def __init__(self):
        super().__init__()
        self.inside = tiny_model()

    def forward(self, input_ids, use_cache=None):
        return self.inside(input_ids=input_ids, use_cache=use_cache)


def with_virtual_tokens():
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


@pytest.mark.parametrize("make", [Deaf, with_virtual_tokens])
def test_rows_stay_apart_where_the_model_would_not_know_them_apart(make):
    """peft drops position ids beside virtual tokens: joined rows would see each other."""
    fast = install(make().train(), ["attention", "rows"])
    assert not fast.joins and fast.on == ["attention without a mask, segment by segment"]
    assert fast.off == ["rows: the model is not told where a joined row begins"]
    fast.undo()


def test_a_generation_says_the_same_and_leaves_no_trace():
    """Around generation with an adapter: the same answers in fp32, the same bits of weights, no forward of ours left."""
    from peft import LoraConfig, get_peft_model

    from ftx.generate import Generate
    from ftx.testing.tiny import tiny_tokenizer
    from ftx_fast import generating

    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    asked = ["Say this and no other thing: " + text for text in ("a", "bcd", "efghij" * 4, "k")]
    plain = Generate(model, tiny_tokenizer())(asked, max_new_tokens=12)
    inside = []

    def around():
        manager = generating(model)
        inside.append(manager)
        return manager

    assert Generate(model, tiny_tokenizer(), around=around)(asked, max_new_tokens=12) == plain and len(inside) == 1
    with model.disable_adapter():
        base = Generate(model, tiny_tokenizer())(asked, max_new_tokens=12)
        assert Generate(model, tiny_tokenizer(), around=around)(asked, max_new_tokens=12) == base != plain
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
