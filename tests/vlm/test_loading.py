"""Loading from a folder and from memory, its errors, and the real models' geometry."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import instructblip, llava
from mechvlm.families.known import ARCHITECTURES
from mechvlm.families.record import LayerKind, part
from mechvlm.vlm import records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    hf, processor = llava()
    hf.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_a_folder_loads_as_the_model_that_was_saved(folder):
    vlm = mv.load(folder)
    inputs = vlm.inputs(noise_image(0), "what is this")
    with torch.no_grad():
        assert torch.equal(vlm.hf(**inputs.encoding).logits, llava()[0](**inputs.encoding).logits)
    assert (vlm.n_layers, vlm.n_heads, vlm.d_model, vlm.d_head, vlm.d_vocab) == (3, 4, 32, 8, 32064)
    assert "LlavaForConditionalGeneration" in repr(vlm)


def test_dtype_and_device_map(folder):
    vlm = mv.load(folder, dtype="bfloat16", device_map="cpu")
    assert vlm.dtype == torch.bfloat16
    with pytest.raises(mv.ModelError, match="no dtype 'float5'"):
        mv.load(folder, dtype="float5")
    with pytest.raises(mv.ModelError, match="not both"):
        mv.load(folder, device="cpu", device_map="auto")


def test_an_unknown_model_lists_the_places_looked_in():
    with pytest.raises(mv.ModelError, match=r"no model 'no/such-model'.*bundled \(tiny-llava, tiny-instructblip.*\)"):
        mv.load("no/such-model")


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such", "models/of/mine", "no-such/", "", "a b/c"])
def test_what_is_no_hub_id_is_not_looked_up_there(name, monkeypatch):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(mv.ModelError, match=f"There is no model '{name}': .* nor a folder here, and a hub id reads"):
        mv.load(name)


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect to the hub\nCheck your connection")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unreachable)
    with pytest.raises(
        mv.ModelError, match=r"We couldn't connect to the hub\. Look up the id.*the folder of a copy\.$"
    ):
        mv.load("no/such-model")


def test_a_file_is_no_model(folder):
    with pytest.raises(mv.ModelError, match=r"config\.json is a file\. A model is a folder"):
        mv.load(folder / "config.json")


def test_a_misspelled_name_is_corrected():
    with pytest.raises(mv.ModelError, match=r"owner/name\. Did you mean tiny-llava\?"):
        mv.load("tinyllava")


def test_a_folder_without_a_processor(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path)
    with pytest.raises(mv.ModelError, match="without a usable processor"):
        mv.load(tmp_path)


def test_an_unknown_class_lists_the_known_ones(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["Qwen9VLForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(mv.ModelError, match=r"Qwen9VL.*not among the vision-language classes.*InstructBlip.*, Llava"):
        mv.load(tmp_path)
    with pytest.raises(mv.ModelError, match="Linear"):
        mv.load(torch.nn.Linear(2, 2), processor=object())


def test_folders_that_hold_no_model(tmp_path, folder):
    with pytest.raises(mv.ModelError, match=r"holds no config\.json"):
        mv.load(tmp_path)
    for name in folder.iterdir():
        if name.suffix != ".safetensors":
            shutil.copy(name, tmp_path)
    torch.save(llava()[0].state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(mv.ModelError, match="safetensors only"):
        mv.load(tmp_path)


def test_code_in_a_repository_does_not_run(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "custom.Config", "AutoModel": "custom.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('')")
    with pytest.raises(mv.ModelError, match="trust_remote_code"):
        mv.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_incomplete_and_damaged_checkpoints(folder, tmp_path):
    """transformers fills missing tensors with random numbers and logs it: here it is an error."""
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        shutil.copy(file, tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    lacking = {k: v for k, v in whole.items() if "multi_modal_projector" not in k}
    save_file(lacking, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(mv.ModelError, match=r"lacks 4 tensors \(.*multi_modal_projector.*would be random"):
        mv.load(tmp_path)
    (head,) = (k for k in whole if k.endswith("lm_head.weight"))
    other = {**whole, head: torch.zeros(7, 32)}
    save_file(other, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(mv.ModelError, match=r"damaged, or are not those of its config\.json"):
        mv.load(tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(mv.ModelError, match="damaged"):
        mv.load(tmp_path)


def test_options_that_a_loaded_model_cannot_take():
    hf, processor = llava()
    with pytest.raises(mv.ModelError, match=r"loaded already: give dtype, revision to its"):
        mv.load(hf, processor, dtype="bfloat16", revision="main")
    with pytest.raises(mv.ModelError, match="no image_processor"):
        mv.load(hf, processor.tokenizer)
    if not torch.cuda.is_available():
        with pytest.raises(mv.ModelError, match="cannot be put on the device 'cuda'"):
            mv.load(hf, processor, device="cuda")


@pytest.mark.parametrize(
    ("family", "setting", "value", "needed"),
    [
        (llava, "patch_size", None, 14),
        (llava, "patch_size", 16, 14),
        (instructblip, "num_query_tokens", None, 5),
        (instructblip, "num_query_tokens", 3, 5),
    ],
)
def test_a_processor_that_does_not_fit(family, setting, value, needed):
    hf, processor = family.__wrapped__()
    setattr(processor, setting, value)
    with pytest.raises(
        mv.ModelError, match=rf"{setting} is {value}, .* is {needed}: .*Set processor.{setting} = {needed}"
    ):
        mv.load(hf, processor)
    setattr(processor, setting, needed)
    mv.load(hf, processor)


def test_inputs_of_another_family(llava_vlm, blip_vlm):
    for own, other in ((llava_vlm, blip_vlm), (blip_vlm, llava_vlm)):
        inputs = other.inputs(noise_image(0), "what is this")
        with pytest.raises(mv.InputError, match=r"made for another family of models .* vlm.inputs\(image, prompt\)"):
            mv.logit_lens(own, inputs)
        with pytest.raises(mv.InputError, match="made for another family of models"):
            own.generate(inputs)


def test_damaged_weights_are_not_blamed_on_the_record():
    hf, processor = llava.__wrapped__()
    with torch.no_grad():
        part(hf, "model.language_model.layers")[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(mv.ModelError, match=r"computes NaN or infinity.*in float32: its weights are damaged"):
        mv.load(hf, processor)


def test_a_loaded_model_needs_its_processor():
    with pytest.raises(mv.ModelError, match="needs its processor"):
        mv.load(llava()[0])


def test_encoder_decoders_are_refused():
    hf, processor = instructblip.__wrapped__()
    hf.config.use_decoder_only_language_model = False
    with pytest.raises(mv.ModelError, match="encoder-decoder"):
        mv.load(hf, processor)


def test_the_self_check_names_what_is_off(monkeypatch):
    """The record's middle norm is the one before the attention, which has run when it is read."""
    wrong = replace(ARCHITECTURES["LlavaForConditionalGeneration"], kinds=(LayerKind(mid_norm="input_layernorm"),))
    monkeypatch.setattr(records, "known_record", lambda hf: wrong)
    with pytest.raises(mv.ModelError, match=r"cannot be traced by .* record .*input_layernorm"):
        mv.load(*llava())


def test_the_self_check_sees_another_final_norm(monkeypatch):
    other = replace(
        ARCHITECTURES["LlavaForConditionalGeneration"], norm="model.language_model.layers.0.input_layernorm"
    )
    hf, processor = llava()
    monkeypatch.setattr(records, "known_record", lambda hf: other)
    with pytest.raises(mv.ModelError, match="logits = final norm"):
        mv.load(hf, processor)


# -- the real models' geometry, at small widths ----------------------------------------------------


@pytest.fixture(scope="module")
def llava_576():
    return mv.load(*llava(image=336, layers=2))


@pytest.fixture(scope="module")
def blip_32():
    return mv.load(*instructblip(queries=32, layers=2, image=224))


def test_llava_7b_geometry(llava_576):
    tokens = llava_576.inputs(noise_image(0, (640, 480)), "What is this?").tokens
    grid = tokens.grids[0]
    assert (len(tokens.image), grid.rows, grid.cols, llava_576.d_vocab) == (576, 24, 24, 32064)
    assert set(tokens.ids[tokens.image].tolist()) == {32000}
    assert (grid.resized, grid.crop) == ((448, 336), (56, 0))
    assert tokens.cell(tokens.position(20, 20)) == (0, 20, 20)
    hello = llava_576.tokenizer("Hello world", add_special_tokens=False).input_ids
    assert hello == [15043, 3186]  # LLaMA's real tokenizer


def test_instructblip_vicuna_geometry(blip_32):
    tokens = blip_32.inputs(noise_image(0, (640, 480)), "what is this").tokens
    assert tokens.image.tolist() == list(range(32))
    assert tokens.ids[32] == 1  # BOS after the queries
    assert (tokens.grids[0].rows, tokens.grids[0].cols) == (16, 16)
    assert tokens.grids[0].crop_box == pytest.approx((0, 0, 640, 480))  # squeezed, not cropped


def test_parity_at_the_real_geometry(llava_576, blip_32):
    for vlm in (llava_576, blip_32):
        inputs = vlm.inputs(noise_image(0, (640, 480)), "what is this")
        lens, context, norms = mv.read(vlm, inputs, mv.LogitLens(k=1), mv.Contextualization(), mv.NormAttention())
        with torch.no_grad():
            out = vlm.hf(**vlm.encoding(inputs), output_hidden_states=True)
        hidden = (getattr(out, "language_model_outputs", None) or out).hidden_states
        image, text = inputs.tokens.image, inputs.tokens.text
        torch.testing.assert_close(lens.probs[2, :, 0], out.logits[0, image].softmax(-1).amax(-1), rtol=0, atol=1e-6)
        v, w = (torch.nn.functional.normalize(hidden[1][0, x], dim=-1) for x in (image, text))
        torch.testing.assert_close(context.inter[1, 0], (v @ w.T).mean(), rtol=0, atol=1e-5)
        assert norms.weight.sum(-1).allclose(torch.tensor(1.0), atol=1e-4)


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation makes; views own none."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_nothing_larger_than_one_layer_needs_exists(llava_576):
    """The lens needs no tensor of layers x vocabulary, norm attention none of pairs x width."""
    inputs = llava_576.inputs(noise_image(0, (640, 480)), "what is this")
    n = len(inputs.tokens)
    with Largest() as lens:
        mv.logit_lens(llava_576, inputs, k=1)
    assert lens.entries == 576 * 32064  # one layer's logits of the visual tokens
    with Largest() as norms:
        mv.norm_attention(llava_576, inputs, dst="all pairs")
    weights = max(p.numel() for p in llava_576.hf.parameters())
    # The result holds all pairs of two layers.
    assert norms.entries <= max(2 * llava_576.n_heads * n * n, weights)
    assert norms.entries < n * n * llava_576.d_model
    with Largest() as context:
        mv.contextualization(llava_576, inputs)
    assert context.entries <= max(n * llava_576.d_model * 4, weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
@pytest.mark.parametrize("family", [llava, instructblip])
def test_half_precision(family, dtype):
    """Half precision runs, and gives float32's results up to its rounding."""
    hf, processor = family.__wrapped__()
    full = mv.load(family()[0], processor)
    half = mv.load(hf.to(dtype), processor)
    probes = mv.LogitLens(k=1), mv.Contextualization(), mv.NormAttention()
    (lens, context, norms), (_, c, n) = (
        mv.read(x, x.inputs(noise_image(0), "what is this"), *probes) for x in (half, full)
    )
    assert lens.probs.dtype == torch.float32
    torch.testing.assert_close(context.inter, c.inter, rtol=0, atol=2e-2)
    torch.testing.assert_close(norms.norm, n.norm, rtol=0.1, atol=0.05 * float(n.norm.max()))
    inputs = half.inputs(noise_image(0), "what is this")
    with torch.no_grad():
        logits = half.hf(**half.encoding(inputs)).logits[0]
    last = mv.logit_lens(half, inputs, k=1, positions="all", states=[3])
    assert torch.equal(last.ids[0, :, 0], logits.argmax(-1))


def test_layers_of_the_real_models_are_read_from_the_config():
    hf, processor = llava(layers=5)
    assert mv.load(hf, processor).n_layers == len(part(hf, "model.language_model.layers")) == 5
