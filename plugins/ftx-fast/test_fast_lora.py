"""LoRA and DoRA as one function: peft's numbers and gradients, put on and taken off without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from ftx_fast_lora import DRAWS, Adapted, Frozen, dropped, install, norms, scaled, scaled_back

CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=60, attention_bias=True, pad_token_id=0
)
IDS = torch.randint(60, (3, 11), generator=torch.Generator().manual_seed(1))


def adapted(dtype=torch.float32, layers=2, size=0.3, near=False, **settings):
    """`near`: DoRA's magnitudes are near the norms that they are divided by, as in training; else several times as large."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **given))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float() * (1.05 if "magnitude" in name else size)
    for module in model.modules() if near else ():
        for name, vector in getattr(module, "lora_magnitude_vector", {}).items():
            wide = module.base_layer.weight.float() + module.scaling[name] * module.lora_B[name].weight @ module.lora_A[name].weight
            vector.weight.data = (1.05 * wide.norm(dim=1)).detach()
    return model


def gradients(model, ids=IDS):
    """Loss and the gradient of each trained parameter, by name."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def installed_as_peft(model, ids=IDS):
    """Install, and hold loss and gradients against peft's own, with the same random numbers: (loss, gradients, what is installed)."""
    torch.manual_seed(7)
    loss, wanted = gradients(model, ids)
    installed = install(model)
    assert installed.on and not installed.off
    torch.manual_seed(7)
    ours, got = gradients(model, ids)
    torch.testing.assert_close(ours, loss)
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        assert gradient.device == ids.device and (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name
    return loss, wanted, installed


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["k_proj", "v_proj", "down_proj"], ["up_proj"]])
def test_gradients_of_each_parameter(dora, targets):
    model = adapted(use_dora=dora, target_modules=targets)
    loss, wanted, installed = installed_as_peft(model)
    installed.undo()
    again, after = gradients(model)
    assert again == loss and all(torch.equal(after[name], wanted[name]) for name in wanted)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_dropout": 0.2}, {"use_dora": True, "lora_dropout": 0.2}], ids=str)
def test_in_bf16_no_further_from_fp32_than_peft(drawn_alike, settings):
    # deep, as where it matters: errors add up; with dropout and magnitudes far off, which training does not have, peft's sum in fp32 is nearer
    model = adapted(torch.bfloat16, layers=12, size=0.1, near={"use_dora", "lora_dropout"} <= {*settings}, **settings)
    wide, away = copy.deepcopy(model).float(), {"theirs": 0.0, "ours": 0.0}
    for seed in range(4):
        ids = torch.randint(60, (3, 11), generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        _, truth = gradients(wide, ids)
        for side in away:
            installed = install(model) if side == "ours" else None
            torch.manual_seed(seed)
            _, found = gradients(model, ids)
            away[side] += sum(float((found[name] - truth[name]).norm() / truth[name].norm()) for name in truth)
            if installed:
                installed.undo()
    assert away["ours"] <= 1.05 * away["theirs"]


@pytest.mark.parametrize("bias", [False, True])
def test_updates_of_the_first_steps_are_not_rounded_away(bias):
    """What is added to a number that is rounded to bf16 already, and is smaller than half its spacing, is lost, in each row the
    same way. peft does so; a run of some steps was behind one in fp32."""
    seeded = torch.Generator().manual_seed(0)
    base = torch.nn.Linear(128, 96, bias=bias)
    base.weight.data = torch.randn(96, 128, generator=seeded) / 128**0.5
    if bias:
        base.bias.data = 3 * torch.randn(96, generator=seeded)
    base = base.requires_grad_(False).bfloat16()
    model = get_peft_model(torch.nn.Sequential(base), LoraConfig(r=4, lora_alpha=8, target_modules=["0"]), autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a.data, b.data = torch.randn(4, 128, generator=seeded) / 128**0.5, 2e-4 * torch.randn(96, 4, generator=seeded)
    x, grad = (torch.randn(500, size, generator=seeded).bfloat16() for size in (128, 96))
    wide, wide_grad, weight = x.float(), grad.float(), base.weight.float()
    true = 2 * wide @ a.mT @ b.mT, 2 * wide_grad @ b @ a
    plain = wide @ weight.mT + (base.bias.float() if bias else 0), wide_grad @ weight

    def arrived(out, given):
        """What share of the update there is in the output and in the input's gradient."""
        (dx,) = torch.autograd.grad(out, given, grad)
        both = zip((out, dx), plain, true, strict=True)
        return [float(((found.detach().float() - zero) * update).sum() / update.square().sum()) for found, zero, update in both]

    given = x.clone().requires_grad_()
    (ours,) = Adapted.apply(given, [Frozen(base)], [2.0], 0.0, a, b, None)
    assert arrived(ours, given) == pytest.approx([1, 1], abs=0.1)
    assert max(arrived(model(given), given)) < 0.7, "peft loses nothing: what is this for?"


def test_with_dropout_the_first_updates_of_doras_magnitude_are_not_rounded_away():
    """There the magnitude does not multiply what is rounded already: 0.1 % of it is less than half of bf16's spacing."""
    seeded = torch.Generator().manual_seed(0)
    base = torch.nn.Linear(128, 96, bias=False).requires_grad_(False)
    base.weight.data = torch.randn(96, 128, generator=seeded) / 128**0.5
    base, x = base.bfloat16(), torch.randn(500, 128, generator=seeded).bfloat16()
    a, b = torch.randn(4, 128, generator=seeded), torch.zeros(96, 4)
    size = base.weight.float().norm(dim=1)
    torch.manual_seed(5)
    mask = dropped(x, round(0.2 * DRAWS) / DRAWS)
    true = 1e-3 * x.float().masked_fill(mask, 0) @ base.weight.float().mT / (1 - round(0.2 * DRAWS) / DRAWS)
    torch.manual_seed(5)
    (found,) = Adapted.apply(x, [Frozen(base)], [2.0], 0.2, a, b, size * 1.001)
    plain = x.float() @ base.weight.float().mT
    assert float(((found.float() - plain) * true).sum() / true.square().sum()) == pytest.approx(1, abs=0.1)


@pytest.fixture
def drawn_alike(monkeypatch):
    """peft drops what ours drops: its own dropout draws otherwise, in the same order."""

    def forward(self, x):
        rate = round(self.p * DRAWS) / DRAWS
        return x.masked_fill(dropped(x, rate), 0) / (1 - rate) if self.training else x

    monkeypatch.setattr(torch.nn.Dropout, "forward", forward)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["k_proj", "v_proj", "down_proj"]])
def test_dropout(drawn_alike, targets, dora):
    """Each layer's own inputs are dropped, in training alone."""
    model = adapted(lora_dropout=0.3, target_modules=targets, use_dora=dora).train()
    calm = gradients(model.eval())[0]
    loss, _, _ = installed_as_peft(model.train())
    assert not torch.isclose(gradients(model)[0], loss), "nothing is drawn anew"
    torch.testing.assert_close(gradients(model.eval())[0], calm)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_what_is_dropped(rate):
    x = torch.empty(1001, 173)
    torch.manual_seed(3)
    first, second = dropped(x, round(rate * DRAWS) / DRAWS), dropped(x, round(rate * DRAWS) / DRAWS)
    sure = 5 * (rate * (1 - rate) / x.numel()) ** 0.5
    for mask in (first, second, first.roll(1, 0) ^ first.roll(1, 1)):  # neighbours in both directions have nothing to do with each other
        expected = rate if mask is first or mask is second else 2 * rate * (1 - rate)
        assert float(mask.float().mean()) == pytest.approx(expected, abs=2 * sure)
    assert float((first & second).float().mean()) == pytest.approx(rate**2, abs=sure)
    torch.manual_seed(3)
    assert torch.equal(dropped(x, round(rate * DRAWS) / DRAWS), first)


def test_dropout_is_drawn_again_where_activations_are_recomputed():
    model = adapted(lora_dropout=0.3).train()
    install(model)
    torch.manual_seed(7)
    loss, wanted = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    torch.manual_seed(7)
    again, got = gradients(model)
    assert again == loss
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name])


def calls_of_peft(model):
    """A list that grows with each forward of an adapter's B that is called as a module: ours takes its weight."""
    calls = []
    for name, module in model.named_modules():
        if name.endswith("lora_B.default"):
            module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("dora", [False, True])
def test_under_autocast_of_the_bases_dtype_it_is_one_function_too(dora):
    """As a float16 model is trained on a GPU: half in, half out, and the adapters fp32."""
    model = adapted(torch.bfloat16, size=0.1, use_dora=dora)
    wide, calls = copy.deepcopy(model).float(), calls_of_peft(model)
    away = {"theirs": 0.0, "ours": 0.0}
    for seed in range(3):
        ids = torch.randint(60, (3, 11), generator=torch.Generator().manual_seed(seed))
        _, truth = gradients(wide, ids)
        for side in away:
            installed = install(model) if side == "ours" else None
            calls.clear()
            with torch.autocast("cpu", torch.bfloat16):
                _, found = gradients(model, ids)
            assert bool(calls) == (side == "theirs")
            if installed is not None:
                installed.undo()
            away[side] += sum(float((found[name] - truth[name]).norm() / truth[name].norm()) for name in truth)
    assert away["ours"] <= 1.1 * away["theirs"]


def test_layers_that_autocast_computes_in_another_dtype_are_pefts_and_the_log_says_so(caplog):
    model = adapted()
    calls = calls_of_peft(model)
    install(model)
    with caplog.at_level("INFO", "ftx"), torch.autocast("cpu", torch.bfloat16):
        gradients(model)
        gradients(model)
    assert calls and caplog.messages == ["not fast: lora: layers of float32 stay peft's where bfloat16 is computed"]
    calls.clear()
    with model.disable_adapter(), caplog.at_level("INFO", "ftx"), torch.no_grad():
        model(input_ids=IDS)
    gradients(model)
    assert not calls and len(caplog.messages) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_product_by_column_is_that_of_mul_and_so_are_its_gradients(dtype):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(33, 20, generator=generator).to(dtype) for _ in range(2))
    by = torch.rand(20, generator=generator) + 0.5
    for given in (grad, grad[:1].expand(33, 20)):  # as the gradient of a sum comes
        found, along = scaled_back(given, x, by)
        assert torch.equal(scaled(x, by), (x * by).to(dtype)) and torch.equal(found, (given * by).to(dtype))
        torch.testing.assert_close(along.double(), (given.double() * x.double()).sum(0), rtol=1e-5, atol=1e-5)
    assert scaled(x, by).dtype == found.dtype == dtype


def test_dora_norms_follow_an_update():
    model = adapted(use_dora=True)
    install(model)
    gradients(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(3)
    ours, _ = gradients(model)
    for module in model.modules():
        vars(module).pop("forward", None)
    torch.testing.assert_close(ours, gradients(model)[0])


@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_dora_norms_follow_the_optimizer(settings):
    """A fused step writes the parameters and leaves their versions as they were."""
    models = [adapted(use_dora=True)]
    models.append(copy.deepcopy(models[0]))
    installed = install(models[0])
    steppers = [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, **settings) for model in models]
    for _ in range(3):
        losses = [float(gradients(model)[0].detach()) for model in models]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        for stepper in steppers:
            stepper.step()
    installed.undo()


def test_dora_norms_are_found_once_a_step(monkeypatch):
    """Two micro-batches share them; behind an optimizer step they are found anew."""
    model, found = adapted(use_dora=True), []
    usual = Frozen.square_norms
    monkeypatch.setattr(Frozen, "square_norms", lambda self: found.append(self) or usual(self))
    installed = install(model)
    stepper = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    gradients(model)
    once = len(found)
    gradients(model)
    assert len(found) == once >= 14
    stepper.step()
    gradients(model)
    assert len(found) == 2 * once
    installed.undo()


def test_dora_norms_where_an_update_undoes_its_weight():
    """The sum |W|^2 + 2 s W . BA + s^2 |BA|^2 would be what is left of large numbers."""
    seeded = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 16, generator=seeded), torch.randn(12, 4, generator=seeded)
    base = torch.nn.Linear(16, 12, bias=False).requires_grad_(False)
    base.weight.data = torch.randn(12, 16, generator=seeded)
    base.weight.data[:3] = -2 * (b @ a)[:3] + 1e-5 * torch.randn(3, 16, generator=seeded)
    wanted = (base.weight.double() + 2 * b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(norms(Frozen(base), a, b, 2.0).double(), wanted, rtol=2e-2, atol=0)
    plain = (base.weight.square().sum(1) + 4 * ((base.weight @ a.mT) * b).sum(1) + 4 * ((b @ (a @ a.mT)) * b).sum(1)).clamp(min=0).sqrt()
    assert (plain.double() / wanted - 1).abs().max() > 0.1, "nothing cancels: what is this for?"


def test_what_stays_pefts_in_a_forward_pass_is_said(caplog):
    model = adapted()
    install(model)
    with caplog.at_level("INFO", "ftx"):
        with model.disable_adapter():
            model(input_ids=IDS)
        model.merge_adapter()
        model(input_ids=IDS)
        model.unmerge_adapter()
        assert caplog.messages == ["not fast: lora: layers whose adapter is merged, switched off or another one stay peft's for that time"]
        model.eval()(input_ids=IDS, adapter_names=["default"] * 3)
    assert caplog.messages[1:] == ["not fast: lora: layers that are given more than their input stay peft's"]


def test_the_adapter_can_be_switched_off():
    model = adapted()
    with model.disable_adapter():
        wanted = model(input_ids=IDS).logits
    install(model)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, wanted)
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=IDS).logits, wanted)
    assert not torch.equal(model(input_ids=IDS).logits, wanted)


def starts_at_its_base(model, device="cpu"):
    """DPO's first rewards are 0: the reference is the layer that is switched off, and its sums are taken in the same order."""
    install(model)
    with torch.no_grad():
        on = model(input_ids=IDS.to(device)).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS.to(device)).logits, on)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_at_its_base_to_the_bit(dtype):
    starts_at_its_base(adapted(dtype, init_lora_weights=True))


@pytest.mark.parametrize(("settings", "reason"), [({"lora_dropout": 1.0}, "a dropout of another kind"), ({"lora_bias": True}, "bias")])
def test_what_it_is_not_for_stays_pefts(settings, reason):
    installed = install(adapted(**settings))
    assert not installed.on and reason in installed.off[0]


def four_bits(dora, dtype=torch.float32, device="cpu", dropout=0.0):
    """QLoRA whose weights are the same in each dtype that they are unpacked to."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG).bfloat16().to(dtype)
    for parent in list(model.model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear:
                quantised = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, dtype, quant_type="nf4")
                quantised.load_state_dict(layer.state_dict())
                setattr(parent, name, quantised.to(dtype).to(device))
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=dora, lora_dropout=dropout, task_type="CAUSAL_LM")
    return get_peft_model(model.to(device), config)


@pytest.mark.parametrize(("dora", "dropout"), [(False, 0.0), (True, 0.0), (False, 0.3), (True, 0.3)])
def test_four_bits(drawn_alike, dora, dropout):
    installed_as_peft(four_bits(dora, dropout=dropout))


@pytest.mark.parametrize("dora", [False, True])
def test_four_bits_unpacked_to_bf16_no_further_from_fp32_than_peft(dora):
    no_further(four_bits(dora), four_bits(dora, torch.bfloat16))


def no_further(exact, model, device="cpu"):
    """In sum over many batches; each gradient on its own is a matter of luck."""
    away = {"theirs": 0.0, "ours": 0.0}
    for seed in range(24):
        ids = torch.randint(60, (3, 11), generator=torch.Generator().manual_seed(seed)).to(device)
        _, truth = gradients(exact, ids)
        for side in away:
            installed = install(model) if side == "ours" else None
            _, found = gradients(model, ids)
            if installed is not None:
                assert installed.on and not installed.off
                installed.undo()
            away[side] += sum(float((found[name].float() - truth[name]).norm() / truth[name].norm()) for name in truth)
    assert away["ours"] <= 1.1 * away["theirs"]


@pytest.mark.gpu
@pytest.mark.parametrize("dora", [False, True])
def test_on_cuda(dora):
    installed_as_peft(adapted(use_dora=dora).cuda(), IDS.cuda())
    starts_at_its_base(adapted(torch.bfloat16, init_lora_weights=True).cuda(), "cuda")
    half = adapted(torch.bfloat16, size=0.1, use_dora=dora).cuda()
    no_further(copy.deepcopy(half).float(), half, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dora", [False, True])
def test_dropout_on_cuda(drawn_alike, dora):
    installed_as_peft(adapted(lora_dropout=0.3, use_dora=dora).cuda().train(), IDS.cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("dora", [False, True])
def test_four_bits_on_cuda(dora):
    no_further(four_bits(dora, device="cuda"), four_bits(dora, torch.bfloat16, "cuda"), "cuda")


@pytest.mark.gpu
def test_few_rows_on_cuda_stay_with_bitsandbytes_kernel_for_them():
    model = four_bits(False, torch.bfloat16, "cuda")
    calls = calls_of_peft(model)
    install(model)
    with torch.no_grad():
        model(input_ids=IDS.cuda())
        assert not calls
        model(input_ids=IDS[:1, :3].cuda())
    assert calls


@pytest.mark.gpu
def test_4_bit_weights_are_unpacked_into_one_buffer_on_cuda():
    """One after the other, also a smaller one after a larger; and one that does not fit makes room."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    buffers, wide = {}, []
    for rows in (64, 32, 256):
        layer = bitsandbytes.nn.Linear4bit(64, rows, False, torch.bfloat16, quant_type="nf4").to(torch.bfloat16).cuda()
        frozen = Frozen(layer, buffers)
        found = frozen.weight(torch.bfloat16)
        assert torch.equal(found, bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
        assert len(buffers) == 1 and found.data_ptr() == next(iter(buffers.values())).data_ptr()
        wide.append(next(iter(buffers.values())).numel())
    assert wide == [64 * 64, 64 * 64, 64 * 256]
