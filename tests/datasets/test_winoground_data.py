"""Winoground's files and its rows on the Hub: pairs of examples; pairs set aside, data refused."""

import json

import pytest

import datasets
from helpers.datasets import winoground, write_winoground
from helpers.images import noise_image
from mechvlm.datasets import load_dataset, pairs_of
from mechvlm.errors import InputError
from mechvlm.inputs.images import open_image


def test_each_pair_gives_two_examples(tmp_path):
    write_winoground(tmp_path / "w", winoground(4))
    data = load_dataset(f"winoground:{tmp_path / 'w'}")
    assert {e.id for e in data.examples} == {f"{i}-{side}" for i in range(4) for side in (0, 1)}
    for e in data.examples:
        other = next(o for o in data.examples if o.meta["pair"] == e.meta["pair"] and o is not e)
        assert e.captions == (other.meta["other_caption"],)
        assert e.id == f"{e.meta['pair']}-{e.meta['side']}"
        assert (e.meta["tag"], e.meta["num_main_preds"]) == ("Object", 1)
        assert e.image.name == f"ex_{e.meta['pair']}_img_{e.meta['side']}.png"
    for pair in pairs_of(data.examples):
        assert pair.captions[0].endswith("on some grass")
        assert [image.name[-5] for image in pair.images] == ["0", "1"]


def test_pairs_are_drawn_whole_and_their_sides_never_stand_together(tmp_path):
    spec = f"winoground:{write_winoground(tmp_path / 'w', winoground(12))}"
    whole = load_dataset(spec, seed=3).examples
    drawn = load_dataset(spec, 8, seed=3).examples
    assert len(pairs_of(drawn)) == 4
    assert [p.id for p in pairs_of(drawn)] == [p.id for p in pairs_of(whole)][:4]
    around = zip(drawn, (*drawn[1:], drawn[0]), strict=True)
    assert all(a.meta["pair"] != b.meta["pair"] for a, b in around)
    assert len(load_dataset(spec, 7).examples) == 7
    assert len(pairs_of(load_dataset(spec, 7).examples)) == 3
    with pytest.raises(InputError, match="None of these examples is a pair"):
        pairs_of(load_dataset(spec, 1).examples)


def test_exchanging_both_images_and_both_captions_exchanges_the_sides(tmp_path):
    """Pairs stay true: caption i goes with image i either way."""
    entries = winoground(3)
    other = {"image_0": "image_1", "image_1": "image_0", "caption_0": "caption_1", "caption_1": "caption_0"}
    exchanged = [{other.get(key, key): value for key, value in entry.items()} for entry in entries]
    read = [
        pairs_of(load_dataset(f"winoground:{write_winoground(tmp_path / name, rows)}").examples)
        for name, rows in (("w", entries), ("v", exchanged))
    ]
    for pair, turned in zip(*read, strict=True):
        assert turned.id == pair.id
        assert turned.captions == pair.captions[::-1]
        assert [image.name for image in turned.images] == [image.name for image in pair.images][::-1]


def test_an_id_that_is_missing_is_the_pairs_number(tmp_path):
    entries = [{**entry, "id": id} for entry, id in zip(winoground(5), (7, None, "", 2.0, [3]), strict=True)]
    data = load_dataset(f"winoground:{write_winoground(tmp_path / 'w', entries)}")
    assert {e.meta["pair"] for e in data.examples} == {"7", "1", "2"}
    (repeated, refused) = data.set_aside
    assert (repeated.id, "entry 4 uses this id again" in repeated.reason) == ("2", True)
    assert refused == ("examples.jsonl line 5", 'the "id" is [3]; an id is a string or a whole number')


def test_an_array_and_upper_case_extensions(tmp_path):
    entries = winoground(2)
    folder = write_winoground(tmp_path / "w", entries)
    (folder / "examples.jsonl").write_text(json.dumps(entries, indent=1), encoding="utf-8-sig")
    (folder / "images" / "ex_0_img_1.png").rename(folder / "images" / "ex_0_img_1.JPG")
    data = load_dataset(f"winoground:{folder}")
    assert data.set_aside == ()
    assert {e.image.name for e in data.examples if e.meta["pair"] == "0"} == {"ex_0_img_0.png", "ex_0_img_1.JPG"}


def test_names_with_their_ending_and_the_hubs_own_folder(tmp_path):
    entries = winoground(2)
    write_winoground(tmp_path / "w" / "data", entries)
    for name in ("ex_0_img_0", "ex_0_img_1"):
        (tmp_path / "w" / "data" / "images" / f"{name}.png").rename(tmp_path / "w" / "data" / "images" / f"{name}.jpg")
    assert len(load_dataset(f"winoground:{tmp_path / 'w'}")) == 4
    write_winoground(tmp_path / "v", [{**entries[0], "image_0": "a.png", "image_1": "b"}])
    (tmp_path / "v" / "images" / "a.png.png").rename(tmp_path / "v" / "images" / "a.png")
    assert len(load_dataset(f"winoground:{tmp_path / 'v'}")) == 2


def test_a_bad_pair_is_set_aside_whole(tmp_path):
    good, *bad = winoground(6)
    bad[0]["caption_1"] = ""
    bad[1]["image_1"] = "../../etc/passwd"
    bad[2]["id"] = 0
    bad[3]["image_0"] = 3
    folder = write_winoground(tmp_path / "w", [good, bad[4], "{broken", "[]"])
    lines = (folder / "examples.jsonl").read_text()
    (folder / "examples.jsonl").write_text(lines + "\n".join(json.dumps(entry) for entry in bad[:4]))
    for name in (f"ex_{i}_img_{side}" for i in range(1, 5) for side in (0, 1)):
        noise_image(0).save(folder / "images" / f"{name}.png")
    (folder / "images" / "ex_5_img_1.png").unlink()
    data = load_dataset(f"winoground:{folder}")
    assert {e.id for e in data.examples} == {"0-0", "0-1"}
    reasons = {aside.id: aside.reason for aside in data.set_aside}
    for name, reason in [
        ("examples.jsonl line 2", "no image at"), ("examples.jsonl line 3", "not JSON"),
        ("examples.jsonl line 4", "a list, not an object"), ("examples.jsonl line 5", 'no "caption_0" or no "caption_1"'),
        ("examples.jsonl line 6", "lies outside the folder"), ("0", "entry 7 uses this id again"),
        ("examples.jsonl line 8", 'no "image_0"'),
    ]:  # fmt: skip
        assert reason in reasons[name], (name, reasons)
    assert len(reasons) == 7


def test_what_is_no_winoground(tmp_path):
    with pytest.raises(InputError, match="is not there; winoground:DIR needs"):
        load_dataset(f"winoground:{tmp_path / 'gone'}")
    with pytest.raises(InputError, match=r"holds no examples\.jsonl"):
        load_dataset(f"winoground:{tmp_path}")
    (tmp_path / "examples.jsonl").write_text("")
    (tmp_path / "images.zip").write_bytes(b"")
    with pytest.raises(InputError, match=r"Unpack images\.zip"):
        load_dataset(f"winoground:{tmp_path}")
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match="it is empty"):
        load_dataset(f"winoground:{tmp_path}")
    (tmp_path / "examples.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        load_dataset(f"winoground:{tmp_path}")


def rows(n: int) -> dict:
    entries = winoground(n)
    columns = {key: [entry[key] for entry in entries] for key in entries[0]}
    for side in (0, 1):
        columns[f"image_{side}"] = [noise_image(10 * i + side) for i in range(n)]
    return columns


def test_the_hubs_rows_are_the_same_pairs(monkeypatch):
    table = datasets.Dataset.from_dict(rows(3))
    table = table.cast_column("image_0", datasets.Image()).cast_column("image_1", datasets.Image())
    loaded = []
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config=None: ["test"])
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config=None, split=None: (loaded.append((name, split)), table)[1]
    )
    data = load_dataset("winoground")
    assert loaded == [("facebook/winoground", "test")]
    assert {e.id for e in data.examples} == {f"{i}-{side}" for i in range(3) for side in (0, 1)}
    for e in data.examples:
        expected = noise_image(10 * int(e.meta["pair"]) + e.meta["side"])
        assert open_image(e.image).tobytes() == expected.tobytes()
        assert e.meta["collapsed_tag"] == "Object"
    table = table.remove_columns("caption_1")
    with pytest.raises(InputError, match="has no columns caption_1; it has id, image_0"):
        load_dataset("winoground")


def test_without_access_the_error_says_how_to_get_it(monkeypatch):
    def gated(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError(
            "Dataset 'facebook/winoground' is a gated dataset on the Hub. You must be authenticated to access it."
        )

    monkeypatch.setattr(datasets, "get_dataset_split_names", gated)
    with pytest.raises(InputError) as caught:
        load_dataset("winoground")
    for part in (
        "must be authenticated", "Accept its conditions on https://huggingface.co/datasets/facebook/winoground",
        "hf auth login", "winoground:DIR",
    ):  # fmt: skip
        assert part in str(caught.value)
    monkeypatch.undo()
    with pytest.raises(InputError, match="hf auth login"):  # without network, as in all tests
        load_dataset("winoground")
