"""A model reference -> files on disk -> tokenizer and model. Weights are safetensors or GGUF, never pickles."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata as metadata
import io
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftx import startup
from ftx.errors import FtxError, ModelError, did_you_mean, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GROUP = "ftx.model"
HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
#: Raise it when the conversion changes, so that no older one is taken from the cache.
CONVERSION = 1

log = logging.getLogger("ftx")


# ---- Reference -> directory


def resolve(reference: str, say: Callable[[str], None] | None = None, *, code: bool = False) -> Path:
    """The directory with config, safetensors and tokenizer that `reference` means; plain transformers loads it.

    `reference` is an installed name (group `ftx.model`), a directory, a .gguf file (converted once into the cache) or a
    hub id `owner/name`, `owner/name@revision`. An installed name wins over a directory called so, or its meaning would
    depend on where it is typed: write ./smollm2 for the directory. `say` gets a line before something slow. `code`:
    fetch the Python files of a hub id too, because the model is trusted by name. Raises ModelError.
    """
    path, names = Path(reference).expanduser(), installed()
    hub, is_gguf = HUB_ID.fullmatch(reference), path.suffix.lower() == ".gguf"
    if reference in names:
        return resolve(str(_installed_path(reference, names[reference])), say)
    if path.is_dir():
        return _checked(path.absolute())
    if path.is_file():
        if is_gguf:
            return _converted(path.absolute(), say)
        raise ModelError(f"'{reference}' is a file, not a model.", "Give the directory that the model lies in, or a .gguf file.")
    if hub and not is_gguf:
        return _checked(_from_hub(hub["name"], hub["revision"], say, code))
    if is_gguf or "/" in reference or os.sep in reference:
        raise ModelError(f"'{reference}': no such file or directory.", "Check the path. A hub id has the form owner/name.")
    raise ModelError(
        f"no model is called '{reference}'.{did_you_mean(reference, names)}",
        "Give a hub id (owner/name), a directory, a .gguf file" + (f", or an installed name: {', '.join(sorted(names))}." if names else "."),
    )


def installed() -> dict[str, list[metadata.EntryPoint]]:
    """Names that installed distributions provide, from their metadata alone."""
    found: dict[str, list[metadata.EntryPoint]] = {}
    for point in metadata.entry_points(group=GROUP):
        others = found.setdefault(point.name, [])
        if point.value not in [other.value for other in others]:  # an editable install may be listed twice
            others.append(point)
    return found


def stated(reference: str, what: str) -> str | None:
    """What the function behind an installed name says of its model in an attribute of its own: `license` (an SPDX name) or
    `hub` (the id of the model that it comes from). None for other references."""
    points = installed().get(reference, [])
    try:
        return getattr(points[0].load(), what, None) if len(points) == 1 else None
    except (Exception, SystemExit):  # `resolve` says what is wrong with it
        return None


def hub_id(reference: str) -> str | None:
    """The hub's id of the model that a reference means or comes from, without a revision; None if it has none."""
    if reference in installed():
        return stated(reference, "hub")
    found = HUB_ID.fullmatch(reference)
    return found["name"] if found and not Path(reference).expanduser().exists() else None


def _installed_path(name: str, points: list[metadata.EntryPoint]) -> Path:
    if len(points) > 1:
        origins = " and ".join(f"{point.dist.name if point.dist else 'unknown'} ({point.value})" for point in points)
        raise ModelError(f"two models are called '{name}': {origins}.", "Uninstall one.")
    try:
        path = Path(points[0].load()())
    except FtxError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"model '{name}' ({points[0].value}) could not be found: {first_line(error)}", "See it all with --traceback.") from error
    if not path.is_absolute() or not path.exists():
        raise ModelError(f"model '{name}' ({points[0].value}) says that it lies in '{path}', where there is nothing.", "Install it again.")
    return path


def _checked(path: Path) -> Path:
    """`path` if it looks like a model that can be loaded without running code from it."""
    if not (path / "config.json").is_file():
        if (path / "recipe.yaml").is_file():
            raise ModelError(f"{path} is a run, not a model.", f"To start from its model: --from {path}")
        if (path / "adapter_config.json").is_file():
            raise ModelError(f"{path} holds an adapter, not a model.", "Give the base model; to start from a run's model: --from RUN")
        ggufs = sorted(path.glob("*.gguf"))
        remedy = f"Give the file: {ggufs[0]}" if ggufs else "Give a directory that transformers' save_pretrained wrote."
        raise ModelError(f"{path} has no config.json, so it is not a model directory.", remedy)
    if any(path.glob("*.safetensors")):
        _check_shards(path)
        return path
    pickles = pickles_in(path)
    if pickles:
        raise ModelError(
            f"{path} holds its weights as a pickle ({pickles[0]}), which can run code when it is read.",
            "ftx reads safetensors only. Where you trust the file, load it with transformers and save it again with save_pretrained.",
        )
    raise ModelError(f"{path} holds no *.safetensors weights.", "Was it downloaded or saved completely?")


def pickles_in(path: Path) -> list[str]:
    """The names of the files in a model directory that run code when they are read."""
    patterns = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
    return sorted(file.name for pattern in patterns for file in path.glob(pattern) if file.name != "training_args.bin")


def refuse_pickles(path: Path) -> None:
    """ModelError if a run's model/ holds a pickle: ftx writes none, so it is not ftx's."""
    if found := pickles_in(path):
        raise ModelError(f"{path} holds a pickle ({found[0]}), which can run code when it is read.", "ftx wrote none there: where is it from? Delete it.")


def _check_shards(path: Path) -> None:
    """The index names files of the directory itself, and all of them are there."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        names = {str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} cannot be read ({first_line(error)}).", "Was it downloaded or saved completely?") from error
    for name in sorted(names):
        if Path(name).name != name:
            raise ModelError(f"{index} names a file outside of the model ('{name}').", "No tool writes that: do not use this model.")
        if not (path / name).is_file():
            raise ModelError(f"{path} lacks {name}, which its index names.", "Was it downloaded or saved completely?")


def _from_hub(name: str, revision: str | None, say: Callable[[str], None] | None, code: bool = False) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub import errors as hub_errors

    if say and not constants.HF_HUB_OFFLINE:
        say(f"Fetching {name} from the hub, unless it is in the local cache.")
    try:
        # "*/*" leaves out the copies in other formats that some repositories keep in folders
        allowed = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", *(["*.py"] if code else [])]
        if code and say and not (revision and re.fullmatch(r"[0-9a-f]{40}", revision)):
            say(f"warning: the code of {name} may change any day: pin the commit that you have read, as {name}@COMMIT")
        return Path(snapshot_download(name, revision=revision, allow_patterns=allowed, ignore_patterns=["*/*", "consolidated*"]))
    except hub_errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise ModelError(
            f"model '{name}' is neither a directory here nor in the local cache, and {why}.",
            "Connect to the network once, or give a directory, a .gguf file or an installed name.",
        ) from error
    except hub_errors.RepositoryNotFoundError as error:  # gated and private ones too
        raise ModelError(f"'{name}' is neither a directory here nor a model that the hub shows.", "Check the spelling. A gated one: hf auth login") from error
    except Exception as error:  # the network has many ways to fail
        raise ModelError(f"model '{name}' could not be fetched: {first_line(error)}", "Check the revision, the network and the disk.") from error


# ---- GGUF -> safetensors, once


def cache_directory() -> Path:
    """$FTX_CACHE, else ftx/ in $XDG_CACHE_HOME, else ~/.cache/ftx."""
    if os.environ.get("FTX_CACHE"):
        return Path(os.environ["FTX_CACHE"]).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftx"


def _converted(file: Path, say: Callable[[str], None] | None) -> Path:
    """The converted copy of a GGUF file. Found by content, so that it outlives a reinstall of the package around it."""
    digest = hashlib.sha256(f"{CONVERSION}\n".encode())
    _sample(file, digest)
    target = cache_directory() / "models" / f"{file.stem}-{digest.hexdigest()[:12]}"
    if target.is_dir():
        return target
    if say:
        say(f"Converting {file.name} to safetensors: once, about 20 seconds for 100 MB.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
            made = Path(scratch) / target.name
            _convert(file, made)
            for written in made.iterdir():
                with open(written, "rb") as stream:
                    os.fsync(stream.fileno())
            with contextlib.suppress(OSError):  # another process was faster: its copy is as good as ours
                made.rename(target)
    except OSError as error:
        raise ModelError(f"{file.name} could not be converted into {target.parent}: {first_line(error)}", "Set FTX_CACHE to a directory with room.") from error
    if not target.is_dir():
        raise ModelError(f"{file.name} could not be converted into {target}: something else lies there.", "Set FTX_CACHE to another directory.")
    return target


def _convert(file: Path, directory: Path) -> None:
    """Dequantise `file` to float32. Q4_1 is scale * q + offset of two float16 numbers, which neither float16 nor
    bfloat16 holds exactly; smollm2 takes 538 MB and loads in half a second all the same."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _read_once(), _quiet(), contextlib.redirect_stderr(io.StringIO()):  # the bar of the GGUF reader cannot be switched off
            tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
            model: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
            mend_tokenizer(tokenizer, file, model.config)
            # transformers refuses to save a model that still says it is quantised
            model.hf_quantizer = None
            model.config.__dict__.pop("quantization_config", None)
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    except ImportError as error:
        raise ModelError(f"{file.name} cannot be read: {first_line(error)}", "pip install gguf accelerate") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk, not the file
            raise
        remedy = "Is it complete, and of an architecture that transformers reads from GGUF?"
        raise ModelError(f"{file} could not be read as GGUF: {first_line(error)}", remedy) from error


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """transformers reads the header of a GGUF file three times, and gguf's table of names once for every module of the model: with
    each kept, half of the time is left."""
    import gguf

    own = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = map(functools.cache, own)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = own


def mend_tokenizer(tokenizer: Any, file: Path, config: Any) -> None:
    """What transformers 5 does not take from a GGUF file: the longest input, and that smollm's digits stand alone (without
    this, two spaces before a digit become other tokens than the model was trained on)."""
    import gguf
    from tokenizers import pre_tokenizers

    field = gguf.GGUFReader(str(file)).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)


# ---- Directory -> tokenizer, model, fingerprint


def load_tokenizer(path: Path, *, code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory. It has a pad token; labels never depend on which. ModelError if there is none.
    `code`: the model's own code may run (it is trusted by name)."""
    from transformers import AutoTokenizer

    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")):
        raise ModelError(f"{path} has no tokenizer.", "Save it beside the model: tokenizer.save_pretrained(DIRECTORY)")
    try:
        with _quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(str(path), trust_remote_code=code)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise _needs_code(path) from error
        raise ModelError(f"the tokenizer in {path} could not be loaded: {first_line(error)}", "Is tokenizer.json complete?") from error
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer in {path} has no fast version, which the masks need.", "Convert it to tokenizer.json.")
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        unused = [token for token in ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>") if token in vocabulary]
        tokenizer.pad_token = unused[0] if unused else tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_model(path: Path, *, dtype: torch.dtype, device: str, quantization_config: Any = None, code: bool = False) -> PreTrainedModel:
    """The causal language model of a directory, in eval mode on `device`, with SDPA attention where it has it.

    `code`: the model's own code may run (it is trusted by name). Raises ModelError, also where a weight is missing from the
    files: transformers would fill it with random numbers.
    """
    from transformers import AutoModelForCausalLM

    placed = {"device_map": {"": device}} if quantization_config is not None or device != "cpu" else {}
    if quantization_config is not None:
        placed["quantization_config"] = quantization_config
    try:
        with _quiet():
            model, found = AutoModelForCausalLM.from_pretrained(
                str(path), dtype=dtype, use_safetensors=True, trust_remote_code=code, output_loading_info=True, **placed
            )
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise _needs_code(path) from error
        if type(error).__name__ == "OutOfMemoryError":
            raise ModelError(f"the model in {path} does not fit into the memory of {device}.", "Try --adapter qlora, or a smaller model.") from error
        raise ModelError(f"the model in {path} could not be loaded: {first_line(error)}", "Is it complete? See it all with --traceback.") from error
    if found["missing_keys"]:
        raise ModelError(f"the model in {path} lacks {_some(found['missing_keys'])}.", "It would start with random numbers there: get the files again.")
    if found["unexpected_keys"]:
        log.warning("%s holds weights that %s does not use: %s", path, type(model).__name__, _some(found["unexpected_keys"]))
    model.eval()
    startup.over()
    return model


def _needs_code(path: Path) -> ModelError:
    return ModelError(
        f"the model in {path} needs its author's own code, which ftx does not run unasked.",
        "Use a model that transformers knows. If you have read its code and trust it: --trust-remote-code MODEL, by the name that --model has.",
    )


def revision(path: Path) -> str | None:
    """The commit of the hub that a model directory was fetched at, or None: it lies in the hub's cache as snapshots/COMMIT."""
    return path.name if path.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", path.name) else None


def fingerprint(path: Path) -> str:
    """sha256 over what makes a model: config, tokenizer, and names, sizes and sampled bytes of the weights. Fast, so it
    tells models apart but proves nothing about every byte. Where the directory lies and who wrote it do not count."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.name in ("config.json", "adapter_config.json"):
            content = json.loads(file.read_text("utf-8"))
            kept = {key: value for key, value in content.items() if key not in ("transformers_version", "_name_or_path")}
            digest.update(f"{file.name}\n{json.dumps(kept, sort_keys=True)}\n".encode())
        elif file.name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja") or file.suffix in (".safetensors", ".py"):
            digest.update(f"{file.name}\n".encode())
            _sample(file, digest)
    return digest.hexdigest()


def _sample(file: Path, digest: Any, pieces: int = 64, length: int = 65536) -> None:
    """Feed the size of `file` and `pieces` stretches of it, its beginning and its end among them, into `digest`."""
    size = file.stat().st_size
    digest.update(f"{size}\n".encode())
    with open(file, "rb") as stream:
        if size <= pieces * length:
            digest.update(stream.read())
            return
        for piece in range(pieces):
            stream.seek(piece * (size - length) // (pieces - 1))
            digest.update(stream.read(length))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its progress bars and load reports; what matters in them is checked by the caller."""
    from transformers.utils import logging as library

    bars, level = library.is_progress_bar_enabled(), library.get_verbosity()
    library.disable_progress_bar()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()


def _some(keys: set[str]) -> str:
    first = sorted(keys)
    return f"{', '.join(first[:3])}" + (f" and {len(first) - 3} more" if len(first) > 3 else "")
