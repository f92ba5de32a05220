"""Model folders of somebody else: hostile settings are refused as ModelError, and no code runs."""

import json
import os
import shutil

import pytest

import mechvlm as mv
from mechvlm import bundled


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(bundled.path("tiny-llava"), tmp_path / "model")


def change(folder, file: str, path: str, value: object) -> None:
    content = json.loads((folder / file).read_text())
    place = content
    *parents, last = path.split(".")
    for parent in parents:
        place = place[parent]
    place[last] = value
    (folder / file).write_text(json.dumps(content))


HOSTILE = [
    ("attn_implementation", "somebody/kernel"),
    ("_attn_implementation", "somebody/kernel:function"),
    ("text_config._attn_implementation", "somebody/kernel"),
    ("attn_implementation", "none of these"),
    ("attn_implementation", 7),
    ("attn_implementation", {"a": "b"}),
    ("quantization_config", 7),
    ("quantization_config", {"quant_method": "none of these"}),
    ("quantization_config", {}),
    ("dtype", "float7"),
    ("dtype", 7),
    ("torch_dtype", ["float32"]),
    ("text_config.hidden_act", "none of these"),
    ("text_config.hidden_act", ["silu"]),
    ("text_config.hidden_size", -1),
    ("text_config.hidden_size", "many"),
    ("text_config.num_hidden_layers", "two"),
    ("text_config.num_attention_heads", 0),
    ("text_config.vocab_size", 1),
    ("text_config", 7),
    ("text_config", []),
    ("vision_config", None),
    ("vision_config.patch_size", 0),
    ("architectures", 7),
    ("architectures", [7]),
    ("architectures", ["__import__"]),
    ("architectures", ["AutoConfig"]),
    ("architectures", {"a": 1}),
    ("model_type", ["llava"]),
    ("model_type", 7),
    ("image_token_index", "x"),
    ("image_token_index", 2**70),
    ("return_dict", False),
]


@pytest.mark.parametrize(("path", "value"), HOSTILE)
def test_hostile_settings(folder, path, value):
    change(folder, "config.json", path, value)
    refused = False
    try:
        vlm = mv.load(folder)
    except mv.ModelError:
        refused = True
    if not refused:  # transformers leaves the setting out: the model is the one that it was
        assert vlm.hf.config._attn_implementation in ("sdpa", "eager")
        assert sum(p.numel() for p in vlm.hf.parameters()) == sum(
            p.numel() for p in mv.load("tiny-llava").hf.parameters()
        )


@pytest.mark.parametrize("text", ["", "[]", "7", "[" * 100_000, "{", "\0", "null"])
@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_files_that_are_no_settings(folder, file, text):
    (folder / file).write_text(text)
    with pytest.raises(mv.ModelError):
        mv.load(folder)


def test_a_kernel_of_the_hub_is_named(folder):
    for path in ("attn_implementation", "text_config._attn_implementation"):
        change(folder, "config.json", path, "somebody/kernel")
        with pytest.raises(mv.ModelError, match="attention kernel 'somebody/kernel' of the hub, which is code"):
            mv.load(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/../../b", "C:\\a", "\\\\host\\a", 7, None])
def test_an_index_leads_to_no_other_folder(folder, name):
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}})
    )
    with pytest.raises(mv.ModelError, match=r"not read: .*lies outside|not text"):
        mv.load(folder)


@pytest.mark.parametrize("content", ["7", "{}", '{"weight_map": 3}', "[" * 100_000, '{"weight_map": {"a": ["b"]}}'])
def test_an_index_that_is_none(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(mv.ModelError, match="index of weights"):
        mv.load(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja", "other"])
def test_pipes_are_not_waited_for(folder, file):
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    with pytest.raises(mv.ModelError):
        mv.load(folder)


def test_folders_of_links_are_read(folder, tmp_path):
    """The hub's client keeps a model's files elsewhere, behind links."""
    links = tmp_path / "links"
    links.mkdir()
    for path in folder.iterdir():
        (links / path.name).symlink_to(path)
    assert mv.load(links).n_layers == mv.load("tiny-llava").n_layers
