"""How models with adapters, quantized, offloaded and compiled load; and which ones are refused."""

import copy
import json
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

import mechvlm as mv
from helpers.images import noise_image
from helpers.kinds import by_torchao, in_4_bits, in_8_bits, lora, model, two_loras
from mechvlm.decoder.weights import weight_and_bias
from mechvlm.study.running.settings import weights_identity


@pytest.fixture(params=["llava", "instructblip"])
def pair(request):
    return model(request.param)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(the base model's folder, the adapter's folder, the merged model, the processor)."""
    hf, processor = model("llava")
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    hf.save_pretrained(base)
    processor.save_pretrained(base)
    tuned = lora(type(hf).from_pretrained(base, dtype=torch.float32).eval())
    tuned.save_pretrained(folder)
    return base, folder, tuned.merge_and_unload(), processor


# -- adapters --------------------------------------------------------------------------------------


def test_the_weight_is_base_plus_scaled_b_a():
    """By hand, of an adapter by itself and of two at once."""
    hf, _ = model("llava")
    tuned = two_loras(hf)
    layer = tuned.get_base_model().model.language_model.layers[1].self_attn.o_proj
    one, two = (layer.scaling[n] * layer.lora_B[n].weight @ layer.lora_A[n].weight for n in ("default", "second"))
    torch.testing.assert_close(weight_and_bias(layer)[0], layer.base_layer.weight + one + two)
    tuned.base_model.set_adapter("second")
    torch.testing.assert_close(weight_and_bias(layer)[0], layer.base_layer.weight + two)
    tuned.merge_adapter()
    assert weight_and_bias(layer)[0] is layer.base_layer.weight


def test_an_adapter_that_is_switched_is_read_anew():
    hf, processor = model("llava")
    tuned = lora(hf)
    vlm = mv.load(tuned, processor)
    with_it = vlm.W_O[0]
    with tuned.disable_adapter():
        without = vlm.W_O[0]
    assert (with_it - without).abs().max() > 0.01
    assert torch.equal(with_it, vlm.W_O[0])


@pytest.mark.long
def test_an_adapters_folder_loads_its_base_and_merges(saved, tmp_path):
    base, folder, merged, processor = saved
    vlm, twin = mv.load(folder), mv.load(merged, processor)
    inputs = vlm.inputs(noise_image(0), "what is this")
    assert vlm.name == str(folder)
    assert torch.equal(vlm.W_O[2], twin.W_O[2])
    assert torch.equal(mv.logit_lens(vlm, inputs).ids, mv.logit_lens(twin, inputs).ids)
    identity = weights_identity(str(folder))
    assert identity["sha256"] == weights_identity(str(base))["sha256"]
    assert identity["adapter"] is not None


@pytest.mark.long
def test_an_adapters_folder_that_cannot_be_applied(saved, tmp_path):
    _, folder, _, _ = saved
    settings = json.loads((folder / "adapter_config.json").read_text())

    def written(**changes):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | changes))
        return tmp_path

    with pytest.raises(mv.ModelError, match=r"does not name its base model. Load the base, and give .*PeftModel"):
        mv.load(written(base_model_name_or_path=None))
    with pytest.raises(mv.ModelError, match=r"does not fit its base model"):
        mv.load(written())  # without its tensors
    (tmp_path / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    with pytest.raises(mv.ModelError, match=r"does not fit its base model, .*missing adapter keys"):
        mv.load(written(target_modules=["gate_proj", "o_proj"]))
    with pytest.raises(mv.ModelError, match=r"There is no model 'gone'"):
        mv.load(written(base_model_name_or_path="gone"))
    with pytest.raises(mv.ModelError, match="NDIF hosts none: load it here"):
        mv.load(folder, remote=True)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=64, num_layers=3),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=64, num_layers=3),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_adapters_that_change_no_weight_are_refused(config):
    hf, processor = model("llava")
    config.num_attention_heads, config.num_transformer_submodules = 4, 1
    tuned = get_peft_model(hf, config)
    with pytest.raises(
        mv.ModelError, match=rf"type {config.peft_type.value}, which adds learned tokens, keys or a router"
    ):
        mv.load(tuned, processor)


@pytest.mark.parametrize("settings", [{"peft_type": "ADAPTION_PROMPT"}, {"peft_type": "XLORA"}])
def test_a_folder_of_such_an_adapter_is_refused(tmp_path, settings):
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "tiny-llava"}))
    with pytest.raises(
        mv.ModelError, match=f"is of the type {settings['peft_type']}, .* mechvlm reads adapters that can be"
    ):
        mv.load(tmp_path)


def test_a_module_that_peft_wraps_as_a_whole_is_refused():
    hf, processor = model("llava")
    tuned = get_peft_model(hf, LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]))
    with pytest.raises(mv.ModelError, match=r"layers.0.mlp is wrapped as a whole by peft .*merge_and_unload"):
        mv.load(tuned, processor)


def test_an_adapter_without_a_weight_is_refused():
    hf, processor = model("llava")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[1, 2])
    with pytest.raises(mv.ModelError, match=r"q_proj: The adapter default .* aLoRA does not support merging"):
        mv.load(get_peft_model(hf, config), processor)


def test_a_module_that_computes_something_else_is_refused():
    hf, processor = model("llava")
    tuned = lora(hf)
    layer = tuned.get_base_model().model.language_model.layers[0].self_attn.o_proj
    layer.register_forward_hook(lambda module, args, out: 1.1 * out)
    for check in (True, False):
        with pytest.raises(mv.ModelError, match=r"o_proj \(Linear\) does not compute with the weight that it gives"):
            mv.load(tuned, processor, check=check)


# -- quantized -------------------------------------------------------------------------------------


def test_eight_bits_are_the_rows_scaled_integers():
    """By hand: row i of the weight is its integers times its largest entry over 127."""
    hf, _ = model("llava")
    wanted = hf.model.language_model.layers[0].mlp.down_proj.weight.data.clone()
    layer = in_8_bits(hf).model.language_model.layers[0].mlp.down_proj
    got = weight_and_bias(layer)[0]
    torch.testing.assert_close(got, layer.weight.data.float() * layer.weight.SCB[:, None] / 127)
    assert (got - wanted).abs().max() <= wanted.abs().max() / 127


@pytest.mark.parametrize("layer", [bnb.nn.Linear4bit, bnb.nn.Linear8bitLt])
def test_weights_that_are_not_quantized_yet_are_refused(layer):
    hf, processor = model("llava")
    attention = hf.model.language_model.layers[0].self_attn
    attention.q_proj = layer(attention.q_proj.in_features, attention.q_proj.out_features, bias=False)
    with pytest.raises(mv.ModelError, match=r"q_proj: .*not quantized yet: move the model to its device"):
        mv.load(hf, processor)


def test_an_adapter_of_another_kind_on_quantized_weights_is_refused():
    hf, processor = model("llava")
    with pytest.raises(mv.ModelError, match="on quantized weights has no weight that mechvlm could read"):
        mv.load(lora(in_4_bits(hf), use_dora=True), processor)


@pytest.mark.kinds
def test_a_quantized_module_that_passes_no_gradient():
    hf, processor = model("llava")
    vlm = mv.load(by_torchao(hf, "Int8DynamicActivationInt8WeightConfig"), processor)
    with pytest.raises(mv.ModelError, match=r"layers.0.*passes none on: its inputs are quantized too"):
        mv.multimodal_neurons(vlm, vlm.inputs(noise_image(0), "what is this"), "this")


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "fp8", "compressed-tensors"])
def test_other_quantizations_are_named(saved, tmp_path, method):
    base, _, _, processor = saved
    settings = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    message = rf"are quantized by {method}, and mechvlm reads those of bitsandbytes and torchao only. Load the checkpoint that"
    with pytest.raises(mv.ModelError, match=message):
        mv.load(tmp_path)
    hf, _ = model("llava")
    hf.config = copy.deepcopy(hf.config)
    hf.config.quantization_config = SimpleNamespace(quant_method=method)
    with pytest.raises(mv.ModelError, match=message):
        mv.load(hf, processor)


@pytest.mark.kinds
def test_a_quantized_models_identity_is_its_numbers():
    identities = set()
    for quantize in (in_4_bits, in_8_bits, lora, lambda hf: by_torchao(hf, "Int8WeightOnlyConfig")):
        hf, processor = model("llava")
        identities.add(weights_identity(mv.load(quantize(hf), processor))["parameters"])
    assert len(identities) == 4


# -- where the weights are, and how they run -------------------------------------------------------


def test_offloaded_weights_are_refused(pair):
    hf, processor = pair
    norm = hf.get_submodule(next(path for path, _ in hf.named_modules() if path.endswith("layers.1.mlp.up_proj")))
    norm.weight = torch.nn.Parameter(norm.weight.to("meta"), requires_grad=False)
    with pytest.raises(mv.ModelError, match=r"1 tensors .*up_proj.weight.* device_map offloaded them"):
        mv.load(hf, processor)


@pytest.mark.long
def test_a_device_map_of_one_device_loads(saved):
    base, _, _, _ = saved
    vlm, twin = mv.load(base, device_map={"": "cpu"}), mv.load(base)
    inputs = vlm.inputs(noise_image(0), "what is this")
    assert torch.equal(mv.norm_attention(vlm, inputs).norm, mv.norm_attention(twin, inputs).norm)


def test_a_model_compiled_in_place_is_refused(pair):
    hf, processor = pair
    hf.compile()
    with pytest.raises(mv.ModelError, match=r"was compiled in place, .* Load the model again without compile\(\)"):
        mv.load(hf, processor)


def test_a_layer_that_was_compiled_is_refused():
    hf, processor = model("llava")
    hf.model.language_model.layers[1].mlp = torch.compile(hf.model.language_model.layers[1].mlp)
    with pytest.raises(mv.ModelError, match=r"model.language_model.layers.1.mlp was compiled in place"):
        mv.load(hf, processor)


def test_flex_attention_is_read_and_not_knocked_out():
    """Its mask is a function of the positions; the rows are those of the model under SDPA."""
    hf, processor = model("llava")
    twin = mv.load(copy.deepcopy(hf), processor)
    hf.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        vlm = mv.load(hf, processor)
        inputs = vlm.inputs([noise_image(0), noise_image(1)], ["what is this", "a"])
        lens, norms = mv.read(vlm, inputs, mv.LogitLens(k=1), mv.NormAttention(dst="last"))
        with pytest.raises(ValueError, match="knock_out needs an attention that takes a mask"), vlm.trace(inputs):
            mv.knock_out(vlm, src=inputs.token_maps[0].image, dst=-1, layers=1)
    wanted_lens, wanted_norms = mv.read(twin, inputs, mv.LogitLens(k=1), mv.NormAttention(dst="last"))
    torch.testing.assert_close(lens.probs, wanted_lens.probs)
    torch.testing.assert_close(norms.weight, wanted_norms.weight)
    torch.testing.assert_close(norms.norm, wanted_norms.norm)


# -- what is no model of these families ------------------------------------------------------------


def test_the_original_llava_points_to_its_conversion(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlavaLlamaForCausalLM"]})
    )
    with pytest.raises(mv.ModelError, match=r"llava-hf/llava-1.5-7b-hf"):
        mv.load(tmp_path)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool", torch.int64])
def test_a_dtype_that_is_no_float(dtype):
    with pytest.raises(mv.ModelError, match=r"There is no dtype .* Choose float32, bfloat16 or float16"):
        mv.load("tiny-llava", dtype=dtype)


@pytest.mark.parametrize("device_map", [{"": 0}, "cuda"])
def test_a_device_map_without_its_device(device_map):
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(mv.ModelError, match=r"cannot be put where device_map=.*Leave it out to load on the CPU"):
        mv.load("tiny-llava", device_map=device_map)


def test_training_mode_is_refused(pair):
    """The Q-Former's dropout would give other numbers each time."""
    hf, processor = pair
    vlm = mv.load(hf.train(), processor)  # load puts it into evaluation mode
    inputs = vlm.inputs(noise_image(0), "what is this")
    before = mv.logit_lens(vlm, inputs)
    hf.get_submodule(next(path for path, _ in hf.named_modules() if path.endswith("layers.1.mlp"))).train()
    with pytest.raises(mv.ModelError, match=r"in training mode \(\d+ modules, .*layers\.1\.mlp.*vlm\.hf\.eval\(\)"):
        mv.logit_lens(vlm, inputs)
    with pytest.raises(mv.ModelError, match="in training mode"):
        vlm.generate(inputs)
    hf.eval()
    assert torch.equal(mv.logit_lens(vlm, inputs).probs, before.probs)


def test_outputs_without_names_are_refused(pair):
    hf, processor = pair
    hf.config.return_dict = False
    with pytest.raises(mv.ModelError, match=r"return_dict=False: set config\.return_dict = True"):
        mv.load(hf, processor)


def test_another_image_token_is_refused(pair):
    hf, processor = pair
    id = processor.tokenizer.convert_tokens_to_ids("<image>")
    hf.config.image_token_index = 31999
    with pytest.raises(mv.ModelError, match=rf"marks an image by '<image>', token {id}; the model by token 31999"):
        mv.load(hf, processor)
    if "Llava" in type(hf).__name__:
        return
    hf.config.image_token_index = None  # an InstructBLIP checkpoint from before image tokens
    with pytest.raises(mv.ModelError, match=r"image_token_id is not set.*convert_tokens_to_ids"):
        mv.load(hf, processor)


def test_an_image_that_is_more_than_patches_is_refused(pair):
    """With the CLS token before the patches, each patch would be read one position too early."""
    hf, processor = pair[0], copy.deepcopy(pair[1])
    if "Llava" not in type(hf).__name__:
        pytest.skip("queries stand for no patches")
    hf.config.vision_feature_select_strategy = "full"
    with pytest.raises(mv.ModelError, match=r"strategy is default, .* is full"):
        mv.load(hf, processor)
    processor.vision_feature_select_strategy = "full"
    with pytest.raises(mv.ModelError, match=r"17 image tokens where the grid has 16 patches.*CLS token, with 'full'"):
        mv.load(hf, processor)


def test_another_default_device_is_refused(pair):
    """ "meta" stands for cuda: new tensors would be there, and those of the processor here."""
    with torch.device("meta"):
        vlm = mv.load(*pair)
        with pytest.raises(mv.InputError, match=r"default device is 'meta'.*torch.set_default_device\('cpu'\)"):
            vlm.inputs(noise_image(0), "what is this")
    inputs = vlm.inputs(noise_image(0), "what is this")
    with torch.device("meta"), pytest.raises(mv.InputError, match="default device is 'meta'"):
        mv.logit_lens(vlm, inputs)
    assert mv.logit_lens(vlm, inputs).probs.device.type == "cpu"


def test_weights_that_bitsandbytes_packed_are_refused():
    """On CPUs with AVX512-BF16 a first forward packs 4-bit weights, in an order of its own."""
    hf, processor = model("llava")
    hf = in_4_bits(hf)
    linear = next(m for m in hf.modules() if hasattr(m, "support_avx512bf16_for_cpu"))
    linear.support_avx512bf16_for_cpu = True
    mv.load(hf, processor)
    assert linear.support_avx512bf16_for_cpu is False
    linear.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(mv.ModelError, match="packed the 4-bit weights"):
        weight_and_bias(linear)
