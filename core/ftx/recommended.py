"""The recommended models of 2025, and what they need on one machine under each installed adapter."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import yaml

from ftx.catalogue import Catalogue
from ftx.errors import FtxError, first_line
from ftx.foresight import CONFIGS, machine_of
from ftx.ledger import Ledger
from ftx.machine import said
from ftx.planning import AGAIN, MICRO, Planner, with_options
from ftx.recipe import merge, resolve
from ftx.run import Run
from ftx.shape import read_shape

if TYPE_CHECKING:
    from ftx.console import Console

log = logging.getLogger("ftx")

#: Tokens of the one row that a forward pass holds in this table.
LENGTH = 512


def recommended() -> dict[str, dict[str, Any]]:
    """name -> hub id, published need, its publisher's words, notes; in the order of configs/models.yaml."""
    content: dict[str, dict[str, Any]] = yaml.safe_load((CONFIGS / "models.yaml").read_text("utf-8"))
    return content


def says_memory(catalogue: Catalogue, adapter: str) -> bool:
    """Whether an adapter can be loaded and has something to say of its memory."""
    try:
        return hasattr(catalogue.load("adapter", adapter), "memory_use")
    except FtxError:
        return False


def list_models(catalogue: Catalogue, console: Console, device_memory: str | None = None) -> dict[str, Any]:
    """Print the table; the same as `--json` has it."""
    machine = machine_of(merge({}, {}), device_memory)
    adapters = [name for name in catalogue.names("adapter") if says_memory(catalogue, name)]
    found: dict[str, dict[str, Any]] = {}
    for name, about in recommended().items():
        needs: dict[str, dict[str, Any]] = {}
        for adapter in list(adapters):
            wanted = with_options(merge({}, {"model": name, "adapter": adapter, "device": machine.device}), **{MICRO: 1, AGAIN: True})
            try:
                recipe, hooks = resolve(wanted, catalogue)
                run = Run(recipe=recipe, ledger=Ledger(), device=machine.device, hooks=hooks)
                planner = Planner(catalogue, run, machine, CONFIGS / name)
                case = planner.case(wanted, length=LENGTH)
            except FtxError:  # an adapter that is not whole, or that needs an option
                continue
            except Exception as error:  # nobody named it, so the table does without
                log.warning("adapter %s is left out: %s: %s", adapter, type(error).__name__, first_line(error))
                adapters.remove(adapter)
                continue
            needs[adapter] = {"memory": case.prediction.peak_memory, "fits": planner.fits(case)}
        found[name] = {"parameters": read_shape(CONFIGS / name).parameters, **about, "adapters": needs}
    shown = [adapter for adapter in adapters if any(adapter in one["adapters"] for one in found.values())]
    rows = []
    for name, one in found.items():
        cells = [one["adapters"].get(adapter) for adapter in shown]
        marked = [("-" if cell is None else said(cell["memory"]) if cell["fits"] else f"({said(cell['memory'])})") for cell in cells]
        rows.append([name, f"{one['parameters'] / 1e9:.1f} B", *marked])
    where = machine.name or machine.device
    console.say(f"Memory for one row of {LENGTH} tokens at a time, activations recomputed; (in brackets): more than {where} has")
    console.table(["model", "size", *shown], rows)
    for name, one in found.items():
        quoted = f'"{one["said"]}" ({one["source"]})'
        console.say(f"{name}: {one['hub']}; published for QLoRA: {one['qlora']} GB; {one['notes']}; {quoted}")
    return {"device": machine.device, "device_memory": machine.memory, "models": found}
