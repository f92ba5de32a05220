"""Models whose modules do not compute with the weights that they show are refused by name."""

import copy
import json

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import instructblip, llava

LORA = {"target_modules": r".*language_model.*(q_proj|v_proj)", "init_lora_weights": False}


@pytest.fixture(params=["llava", "instructblip"])
def pair(request):
    hf, processor = {"llava": llava, "instructblip": instructblip}[request.param]()
    return copy.deepcopy(hf), processor


def test_an_adapter_is_refused_and_the_merged_model_is_right(pair):
    hf, processor = pair
    torch.manual_seed(0)
    tuned = get_peft_model(hf, LoraConfig(**LORA))
    with pytest.raises(mv.ModelError, match=r"This Peft\w* is an adapter around a model. Give .*merge_and_unload"):
        mv.load(tuned, processor)
    for check in (True, False):
        with pytest.raises(mv.ModelError, match=r"carries an adapter in \d+ modules .*merge_and_unload"):
            mv.load(tuned.get_base_model(), processor, check=check)
    before = tuned.get_base_model()
    inputs = mv.load(*{True: llava, False: instructblip}["Llava" in type(hf).__name__]()).inputs(
        noise_image(0), "what is this"
    )
    with torch.no_grad():
        wanted = before(**inputs.encoding).logits
    vlm = mv.load(tuned.merge_and_unload(), processor)
    lens = mv.logit_lens(vlm, inputs, k=3, positions="last")
    assert torch.equal(lens.ids[-1, 0], wanted[0, -1].topk(3).indices)


def test_an_adapters_folder_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(mv.ModelError, match=r"holds an adapter \(adapter_config.json\), not a model"):
        mv.load(tmp_path)


@pytest.mark.parametrize("layer", [bnb.nn.Linear4bit, bnb.nn.Linear8bitLt])
def test_quantized_weights_are_refused(pair, layer):
    hf, processor = pair
    q = next(path for path, m in hf.named_modules() if path.endswith("layers.0.self_attn.q_proj"))
    parent = hf.get_submodule(q.rpartition(".")[0])
    parent.q_proj = layer(parent.q_proj.in_features, parent.q_proj.out_features, bias=False)
    for check in (True, False):
        with pytest.raises(mv.ModelError, match=r"are quantized \(.*q_proj.*Load it without quantization_config"):
            mv.load(hf, processor, check=check)


def test_offloaded_weights_are_refused(pair):
    hf, processor = pair
    norm = hf.get_submodule(next(path for path, _ in hf.named_modules() if path.endswith("layers.1.mlp.up_proj")))
    norm.weight = torch.nn.Parameter(norm.weight.to("meta"), requires_grad=False)
    with pytest.raises(mv.ModelError, match=r"1 tensors .*up_proj.weight.* device_map offloaded them"):
        mv.load(hf, processor)


def test_a_compiled_model_is_named(pair):
    hf, processor = pair
    with pytest.raises(mv.ModelError, match=r"compiled by torch.compile.*_orig_mod"):
        mv.load(torch.compile(hf), processor)
    assert mv.load(torch.compile(hf)._orig_mod, processor).n_layers == 3


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
    with pytest.raises(mv.ModelError, match=r"image_token_index is not set.*convert_tokens_to_ids"):
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
