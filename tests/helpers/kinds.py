"""The kinds of models that load: adapters, quantized, compiled; and their plain twins."""

import copy
import importlib
import warnings

import bitsandbytes as bnb
import torch
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoraConfig, OFTConfig, get_peft_model
from torch import nn

from helpers.models import instructblip, llava

PROJECTIONS = r".*language_model.*(q_proj|v_proj|o_proj|down_proj)"


def model(family: str) -> tuple[nn.Module, object]:
    hf, processor = llava(kv_heads=2, bias=True, width=64) if family == "llava" else instructblip()
    return copy.deepcopy(hf), processor


def adapted(hf: nn.Module, config) -> nn.Module:
    """A `PeftModel` whose adapter changes what it can: no parameter is at its start."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(hf, config).eval()
    with torch.no_grad():
        for p in (p for p in tuned.parameters() if p.requires_grad):
            p.add_(0.05 * torch.randn_like(p))
    return tuned


def lora(hf, **options):
    options = {"target_modules": PROJECTIONS, **options}
    return adapted(hf, LoraConfig(r=4, init_lora_weights=False, **options))


def two_loras(hf):
    tuned = lora(hf)
    tuned.add_adapter("second", LoraConfig(r=2, target_modules=PROJECTIONS, init_lora_weights=False))
    tuned.base_model.set_adapter(["default", "second"])
    return tuned


def merged_in_place(hf):
    tuned = lora(hf)
    tuned.merge_adapter()
    return tuned.get_base_model()


def disabled(hf):
    tuned = lora(hf)
    tuned.base_model.disable_adapter_layers()
    return tuned


def replaced(hf, make):
    """The model with every linear module of its decoder's layers made anew."""
    for path, module in list(hf.named_modules()):
        if type(module) is nn.Linear and "language_model" in path and path.endswith("_proj"):
            hf.set_submodule(path, make(module))
    return hf


def in_4_bits(hf):
    def make(linear):
        new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, torch.float32)
        new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=new)
        new.bias = linear.bias
        new.support_avx512bf16_for_cpu = False  # it would pack the weights
        return new.to("cpu")

    return replaced(hf, make)


def in_8_bits(hf):
    def make(linear):
        has_bias = linear.bias is not None
        new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_bias, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        new.bias = linear.bias
        return new.to("cpu")

    return replaced(hf, make)


def by_torchao(hf, config: str):
    quantization = importlib.import_module("torchao.quantization")

    def wanted(module, path):
        return isinstance(module, nn.Linear) and "language_model" in path and path.endswith("_proj")

    quantization.quantize_(hf, getattr(quantization, config)(), filter_fn=wanted)
    return hf


KINDS = {
    "lora": lora,
    "lora everywhere": lambda hf: lora(hf, target_modules=r".*language_model.*_proj|.*lm_head|.*embed_tokens"),
    "lora merged in place": merged_in_place,
    "two loras": two_loras,
    "lora disabled": disabled,
    "dora": lambda hf: lora(hf, use_dora=True),
    "whole modules": lambda hf: lora(hf, modules_to_save=["lm_head", "embed_tokens"]),
    "rows of the embedding": lambda hf: lora(hf, trainable_token_indices=[5, 6, 7]),
    "norms": lambda hf: adapted(hf, LNTuningConfig(target_modules=r".*language_model.*norm")),
    "ia3": lambda hf: adapted(
        hf,
        IA3Config(target_modules=r".*language_model.*(k_proj|v_proj|down_proj)", feedforward_modules=r".*down_proj"),
    ),
    "loha": lambda hf: adapted(hf, LoHaConfig(r=4, target_modules=PROJECTIONS, init_weights=False)),
    "oft": lambda hf: adapted(hf, OFTConfig(target_modules=PROJECTIONS, oft_block_size=8, init_weights=False)),
    "4 bits": in_4_bits,
    "8 bits": in_8_bits,
    "4 bits and lora": lambda hf: lora(in_4_bits(hf)),
    "8 bits and lora": lambda hf: lora(in_8_bits(hf)),
    "torchao, 8 bits": lambda hf: by_torchao(hf, "Int8WeightOnlyConfig"),
    "torchao, 8 bits, inputs too": lambda hf: by_torchao(hf, "Int8DynamicActivationInt8WeightConfig"),
    "compiled": torch.compile,
}

PRECISION = {"8 bits": 5e-2, "8 bits and lora": 5e-2, "torchao, 8 bits, inputs too": 8e-2}
"""Largest difference from the plain twin, relative to the largest entry; of the others 1e-4.

These kinds round the inputs of every module to 8 bits. After three layers 2.6e-2 was measured, and
5.1e-2 with torchao on a CPU without its own instructions for them.
"""


def plain(hf: nn.Module, name: str, family: str) -> nn.Module:
    """A model of plain modules, with the weights that the modules of another one compute with.

    peft merges its adapters. The outputs of a quantized module for the unit vectors are its weight.
    """
    if name == "compiled":
        return model(family)[0]
    if name == "lora disabled":
        return copy.deepcopy(hf).unload()
    if "bits" not in name:
        if hasattr(hf, "merge_and_unload"):
            return copy.deepcopy(hf).merge_and_unload()
        return replaced_by_outputs(model(family)[0], hf)
    return replaced_by_outputs(model(family)[0], hf.get_base_model() if hasattr(hf, "get_base_model") else hf)


@torch.no_grad()
def replaced_by_outputs(twin: nn.Module, hf: nn.Module) -> nn.Module:
    def make(path, linear):
        module = hf.get_submodule(path)
        zeros = module(torch.zeros(1, linear.in_features))[0]
        linear.weight.copy_((module(torch.eye(linear.in_features)) - zeros).T)
        if linear.bias is not None:
            linear.bias.copy_(zeros)

    for path, module in twin.named_modules():
        if type(module) is nn.Linear and "language_model" in path:
            make(path, module)
    return twin
