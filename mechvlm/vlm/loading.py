"""load(): a bundled name, a hub id, a folder or a loaded model, as a `VLM`."""

import difflib
import os
import re
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from mechvlm import bundled
from mechvlm.errors import ModelError
from mechvlm.families.known import architecture_of
from mechvlm.families.record import Architecture, part
from mechvlm.inputs.build import image_token_of
from mechvlm.ndif.requests import register_folder
from mechvlm.vlm.adapters import apply_adapter, base_of, has_processor, is_adapter
from mechvlm.vlm.devices import device_of, dtype_of, warn_of_idle_gpu
from mechvlm.vlm.foreign import refuse_kernels, require_sound_folder, settings_of
from mechvlm.vlm.kinds import quantization_of, refuse_quantization, require_readable, unwrapped
from mechvlm.vlm.processors import load_processor
from mechvlm.vlm.records import record_of, require_fitting, require_readable_class
from mechvlm.vlm.verify import check_model
from mechvlm.vlm.vlm import VLM
from mechvlm.vlm.weights_line import weights_line

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
"""owner/name, as the hub allows it: no path such as ./model, models/mine/ or /models/mine."""


def load(
    model: str | PathLike | nn.Module,
    processor=None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    record: Architecture | None = None,
    check: bool = True,
    remote: bool | str = False,
) -> VLM:
    """A vision-language model, ready to be read, in evaluation mode.

    >>> vlm = mv.load("llava-hf/llava-1.5-7b-hf", dtype="bfloat16", device="cuda")

    Args:
        model: a bundled name (`mechvlm.bundled`), a hub id, a folder, or a loaded Hugging
            Face model, plain, with adapters (`PeftModel` or in place), quantized by bitsandbytes or
            torchao, or compiled by `torch.compile(model)`. A folder may hold an adapter: its base
            model is loaded and the adapter merged into it.
        processor: the processor of a loaded model, required there; otherwise it is loaded from the
            same place as the model.
        dtype: "float32", "bfloat16", ... Default: the checkpoint's own; float32 for the bundled
            models, which are stored in float16 to be small.
        device: where to put the model: "cuda", "cuda:1", "mps", "cpu", or "auto", the best that is
            there. Default the CPU, or what `device_map` says; with a warning where a GPU is there.
        device_map: as in transformers, to spread a model over devices ("auto").
        revision: of a hub id.
        trust_remote_code: run code that comes with a repository. Off by default.
        record: says where the model keeps its parts (`mechvlm check` prints one); on NDIF needed
            for a class without a known one. Default the known record, or a derived one.
        check: compare the model with its record by one tiny forward
            (`mechvlm.vlm.verify.check_model`); not done for a model on NDIF.
        remote: True runs every trace on NDIF (host and API key are those of nnsight's
            configuration) and loads no weights; the server decides on dtype and device. "local"
            loads the model here and packs every trace as for NDIF.

    Raises:
        ModelError: for an unknown model, a bundled one whose language model is not installed, a
            class of which no record can be derived, a processor of another family, weights that are
            not safetensors, a model that is not what its record says, or one whose weights cannot
            be read: offloaded, compiled in place, of another quantization, or with an adapter that
            is no change of weights.
    """
    if isinstance(model, VLM):
        raise ModelError(f"{model.name} is loaded already, as a VLM.")
    if device is not None and device_map is not None:
        raise ModelError(f"Give device ({device}) or device_map ({device_map}), not both.")
    if remote not in (False, True, "local"):
        raise ModelError(f"remote={remote!r} was asked for; it is True (NDIF), 'local' (rehearse here) or False.")
    if remote is True:
        local_options = {
            "dtype": dtype,
            "device": device,
            "device_map": device_map,
            "trust_remote_code": trust_remote_code or None,
        }
        if isinstance(model, nn.Module):
            raise ModelError("The model is loaded already, here: give its hub id or its folder to run it on NDIF.")
        if used := _used(local_options):
            raise ModelError(f"The weights stay on NDIF, which decides about {used}: leave it out with remote=True.")
    place = None if device is None else device_of(device)
    if isinstance(model, nn.Module):
        if processor is None:
            raise ModelError(
                f"A loaded model needs its processor: mechvlm.load(model, processor). Got {type(model).__name__}."
            )
        model = unwrapped(model)
        if used := _used({"dtype": dtype, "device_map": device_map, "revision": revision}):
            raise ModelError(f"The model is loaded already: give {used} to its `from_pretrained`, not to mechvlm.load.")
        name = getattr(model, "name_or_path", "") or type(model).__name__
        vlm = VLM(model.eval(), processor, record=_checked(model, processor, name, record), name=name, remote=remote)
    else:
        name = os.path.expanduser(str(model))
        adapter = name if is_adapter(name) else None
        base = name if adapter is None else base_of(name)
        is_bundled = base in bundled.ALL
        source = str(bundled.path(base)) if is_bundled else base
        dtype = dtype_of(dtype, "float32" if is_bundled else "auto")
        source_options = {"revision": revision, "trust_remote_code": trust_remote_code}
        with settings_of(name):
            hf_class = class_of(name, revision, trust_remote_code)
            try:
                beside = adapter if adapter is not None and has_processor(adapter) else source
                processor = processor or load_processor(beside, **source_options)
            except ModelError:  # it says already what is missing
                raise
            except (OSError, ValueError) as error:
                raise ModelError(
                    f"{name} comes without a usable processor ({str(error).splitlines()[0]}). Save one beside the weights with "
                    "`processor.save_pretrained`, or pass it: mechvlm.load(model, processor)."
                ) from error
            _require_parts(processor)
            if remote is True:
                if adapter is not None:
                    raise ModelError(
                        f"{name} holds an adapter, and NDIF hosts none: load it here, without remote=True."
                    )
                if Path(source).is_dir():
                    source = str(Path(source).resolve())
                    register_folder(source)
                return VLM(source, processor, name=name, record=record, revision=revision, remote=True)
            _require_settings(
                processor, _load_config(source, base, revision, trust_remote_code), architecture_of(hf_class)
            )
            hf = _load_weights(source, name, hf_class, dtype=dtype, device_map=device_map, **source_options)
            if adapter is not None:
                hf = apply_adapter(hf, adapter)
            record = _checked(hf.eval(), processor, name, record)
            commit = getattr(hf.config, "_commit_hash", None) or revision
            vlm = VLM(hf, processor, record=record, name=name, revision=commit, remote=remote)
    if place is not None:
        try:
            vlm.hf.to(place)
        except (RuntimeError, ValueError) as error:  # ValueError: of 8-bit models
            reason = str(error).splitlines()[0]
            raise ModelError(f"{vlm.name} cannot be put on the device {str(device)!r}: {reason}") from error
    elif device_map is None and remote is not True and not isinstance(model, nn.Module):
        warn_of_idle_gpu(vlm.name)
    if check:
        guard = nullcontext() if isinstance(model, nn.Module) else settings_of(vlm.name)
        with guard, torch.device("cpu"):  # the default device may be another one
            check_model(vlm)
    return vlm


def _checked(hf: nn.Module, processor, name: str, record: Architecture | None) -> Architecture:
    """The record of a model that is here, once the model and its processor can be used at all."""
    base = record or architecture_of(type(hf).__name__)
    if not isinstance(hf, PreTrainedModel) or type(hf).__module__.startswith("transformers."):
        require_readable_class(type(hf).__name__)
    _require_decoder_only(hf.config)
    _require_parts(processor)
    if record is not None:
        require_fitting(record, hf, name)
    _require_settings(processor, hf.config, base)
    if base.derived:
        require_readable(hf, None)
    record = record or record_of(hf, processor, name)
    require_readable(hf, record)
    return record


def _used(options: dict[str, Any]) -> str:
    """The names of the options that are not None, for a message."""
    return ", ".join(option for option, value in options.items() if value is not None)


def _load_weights(source: str, name: str, hf_class: str, **options) -> nn.Module:
    """The model with all its weights: none missing, none of another shape, none unpickled."""
    try:
        with weights_line(name):
            hf, info = getattr(transformers, hf_class).from_pretrained(
                source, use_safetensors=True, output_loading_info=True, **options
            )
    except torch.OutOfMemoryError:
        raise
    except OSError as error:
        raise ModelError(
            f"The weights of {name} cannot be loaded: {error}\nmechvlm loads safetensors only; convert other formats with "
            "`save_pretrained` on a machine that trusts them."
        ) from error
    except (AssertionError, RuntimeError, ValueError, NotImplementedError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        words = ("CUDA", "cuda", "NVIDIA", "device", "MPS", "backend")
        if isinstance(error, AssertionError) or any(word in reason for word in words):
            reason = reason if len(reason) <= 160 else "no such device"
            raise ModelError(
                f"{name} cannot be put where device_map={options.get('device_map')!r} says ({reason}). Leave it out to load on "
                "the CPU, or name devices that this machine has."
            ) from error
        raise ModelError(
            f"The weights of {name} are damaged, or are not those of its config.json: {reason}. Fetch both again."
        ) from error
    if missing := sorted(info["missing_keys"]):
        # transformers fills them with random numbers, and says so only in a log.
        raise ModelError(
            f"The checkpoint of {name} lacks {len(missing)} tensors ({', '.join(missing[:3])}, ...): they would be random. "
            "Fetch it again, or correct its config.json."
        )
    return hf


def _require_parts(processor) -> None:
    lacking = [name for name in ("tokenizer", "image_processor") if getattr(processor, name, None) is None]
    if lacking:
        raise ModelError(
            f"A {type(processor).__name__} was given as the processor; it has no {' and no '.join(lacking)}. Give what "
            "AutoProcessor.from_pretrained returns for the model."
        )


def _require_settings(processor, config, record: Architecture) -> None:
    """Old checkpoints lack settings of the processor, and a processor may be another model's."""
    if record.image_token_id and not hasattr(config, record.image_token_id.split(".")[0]):
        raise ModelError(
            f"A {type(config).__name__} names no image token ({record.image_token_id}): mechvlm reads vision-language models "
            "whose visual tokens stand in the sequence of the text's, where the config says which token holds their place."
        )
    image_token = image_token_of(record, config)
    if record.image_token_id and image_token is None:
        raise ModelError(
            f"The model's {record.image_token_id} is not set: its checkpoint is older than image tokens in prompts. Set "
            f"config.{record.image_token_id} = processor.tokenizer.convert_tokens_to_ids('<image>'), and resize its embeddings "
            "where they have no such row (model.resize_token_embeddings)."
        )
    token = str(getattr(processor, "image_token", "<image>"))
    is_token = image_token is not None and record.image_word in (
        "image_token",
        "",
    )  # else a word that stands for many tokens
    if is_token and (id := processor.tokenizer.convert_tokens_to_ids(token)) != image_token:
        raise ModelError(
            f"The processor marks an image by {token!r}, token {id}; the model by token {image_token} ({record.image_token_id}). "
            "Give the processor of this model."
        )
    if getattr(config, "return_dict", True) is False:
        raise ModelError(
            "The model's config says return_dict=False: set config.return_dict = True, its outputs have names then."
        )
    for name, path in record.processor_settings:
        given, needed = getattr(processor, name, None), part(config, path)
        if hasattr(processor, name) and given != needed:
            raise ModelError(
                f"The processor's {name} is {given}, the model's {path} is {needed}: it would make another number of image "
                f"tokens. Set processor.{name} = {needed}, or give the processor of this model."
            )


def class_of(name: str, revision: str | None = None, trust_remote_code: bool = False) -> str:
    """The Hugging Face class of a bundled name, a hub id or a folder; loads no weights.

    Raises:
        ModelError: when there is no such model, or mechvlm cannot read its class.
    """
    if is_adapter(name):
        return class_of(base_of(name), revision, trust_remote_code)
    source = str(bundled.path(name)) if name in bundled.ALL else name
    config = _load_config(source, name, revision, trust_remote_code)
    refuse_quantization(quantization_of(config), name)
    hf_class = (getattr(config, "architectures", None) or ["(no class named in config.json)"])[0]
    if not hasattr(transformers, hf_class) and getattr(config, "auto_map", None):
        raise ModelError(
            f"{name} is a {hf_class}, a class of its own code, which mechvlm does not look for. Load it by that code, and give "
            f"the model and its processor: model = AutoModelForImageTextToText.from_pretrained({name!r}, trust_remote_code=True"
            "); mechvlm.load(model, processor)."
        )
    require_readable_class(hf_class)
    _require_decoder_only(config)
    return hf_class


def _load_config(source: str, name: str, revision: str | None, trust_remote_code: bool):
    if Path(source).is_file():
        raise ModelError(f"{name} is a file. A model is a folder, the one that holds its config.json, or a name.")
    if name and Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ModelError(f"The folder {name} holds no config.json: it is no Hugging Face model folder.")
    if not name or (not Path(source).exists() and not HUB_ID.fullmatch(name)):
        # Do not ask the hub for what is no id: an unreachable hub takes long.
        near = difflib.get_close_matches(name, bundled.ALL, n=1)
        raise ModelError(
            f"There is no model {name!r}: it is neither bundled ({', '.join(bundled.ALL)}) nor a folder here, and a "
            "hub id reads owner/name." + (f" Did you mean {near[0]}?" if near else "")
        )
    if Path(source).is_dir():
        require_sound_folder(Path(source))
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # a hostile config.json leads transformers to errors of many types
        reason = f"{error or type(error).__name__}".splitlines()[0].rstrip(".")
        if "custom code" in reason:
            raise ModelError(
                f"{name} comes with code of its own, which is not run by default. Read it, and pass "
                f"trust_remote_code=True if you trust it. ({reason})"
            ) from error
        if Path(source).is_dir():
            raise ModelError(f"The config.json of {name} cannot be used: {reason}") from error
        raise ModelError(
            f"There is no model {name!r}: it is neither bundled ({', '.join(bundled.ALL)}), nor a folder here, nor a hub id "
            f"that can be reached. The hub's client says: {reason}. Look up the id there; "
            "log in (`hf auth login`) for a model that needs access; without a network, give the folder of a copy."
        ) from error
    refuse_kernels(config, name, trust_remote_code)
    return config


def _require_decoder_only(config) -> None:
    text = config.get_text_config(decoder=True)
    if getattr(config, "use_decoder_only_language_model", True) is False or getattr(text, "is_encoder_decoder", False):
        model_type = text.model_type
        raise ModelError(
            f"This {type(config).__name__} has an encoder-decoder language model ({model_type}). mechvlm reads decoders that "
            "hold image and text in one sequence: InstructBLIP with Vicuna, for instance."
        )
