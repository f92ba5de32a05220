"""Data sets by name: the draw, entries that are set aside, and the fingerprint."""

import json
from pathlib import Path

import pytest

from helpers.datasets import write_folder
from helpers.images import noise_image
from mechvlm.datasets import fingerprint, load_dataset
from mechvlm.errors import InputError


@pytest.fixture
def good(tmp_path):
    images = [f"{i}.png" for i in range(6)]
    return write_folder(tmp_path / "good", [{"image": n, "captions": [f"picture {n}"]} for n in images], images)


def test_scenes_are_seeded():
    assert [e.id for e in load_dataset("scenes", 3).examples] == [e.id for e in load_dataset("scenes", 3).examples]
    assert load_dataset("scenes", 3).fingerprint == load_dataset("scenes", 3).fingerprint
    assert load_dataset("scenes", 3, seed=1).fingerprint != load_dataset("scenes", 3).fingerprint
    assert len(load_dataset("scenes")) == 200


def test_folder_draw_is_seeded(good):
    assert len(load_dataset(good)) == 6
    drawn = [e.id for e in load_dataset(good, 4, seed=3).examples]
    assert drawn == [e.id for e in load_dataset(good, 4, seed=3).examples]
    assert len(set(drawn)) == 4
    assert drawn != [e.id for e in load_dataset(good, 4, seed=4).examples]


@pytest.mark.parametrize("change", ["caption", "pixels", "order"])
def test_fingerprint_covers(good, tmp_path, change):
    before = load_dataset(good)
    examples = list(before.examples)
    assert fingerprint(examples) == before.fingerprint
    if change == "caption":
        listing = tmp_path / "good" / "captions.jsonl"
        listing.write_text(listing.read_text().replace("picture 3.png", "another"))
        assert load_dataset(good).fingerprint != before.fingerprint
    elif change == "pixels":
        noise_image(99).save(tmp_path / "good" / "3.png")
        assert load_dataset(good).fingerprint != before.fingerprint
    else:
        assert fingerprint(examples[::-1]) != before.fingerprint


def test_accepts_one_caption_ids_subfolders_blank_lines_and_byte_order_marks(tmp_path):
    (tmp_path / "d" / "more").mkdir(parents=True)
    lines = [
        '\ufeff{"image": "a.png", "caption": "one"}',
        "",
        {"image": "more/b.png", "captions": ["x", " "], "id": "b"},
    ]
    data = load_dataset(write_folder(tmp_path / "d", lines, ["a.png", "more/b.png"]))
    assert {(e.id, e.captions) for e in data.examples} == {("a.png", ("one",)), ("b", ("x",))}
    assert data.set_aside == ()


def test_an_id_of_zero_is_an_id(tmp_path):
    """Ids that are falsy are ids all the same; without one, or with none, it is the file's name."""
    images = [f"{i}.png" for i in range(6)]
    ids = [0, 0, "0", None, "", 7]
    lines = [{"image": name, "captions": ["x"], "id": id} for name, id in zip(images, ids, strict=True)]
    data = load_dataset(write_folder(tmp_path / "d", lines, images))
    assert sorted(e.id for e in data.examples) == ["0", "3.png", "4.png", "7"]
    assert [one.id for one in data.set_aside] == ["0", "0"], "0 twice, and the string that reads the same"
    lines = [{"image": "0.png", "captions": ["x"], "id": id} for id in (False, 1.5, ["a"], {})]
    data = load_dataset(write_folder(tmp_path / "e", [*lines, {"image": "1.png", "captions": ["x"]}], images))
    assert len(data.set_aside) == 4
    assert all("an id is a string or a whole number" in one.reason for one in data.set_aside)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_the_end_of_a_line_ends_a_line(tmp_path, end):
    """JSON strings may hold the line separators of Unicode unescaped."""
    (tmp_path / "d").mkdir()
    lines = [
        json.dumps({"image": "a.png", "caption": f"one{c}two", "id": c}, ensure_ascii=False)
        for c in "\u2028\u2029\u0085"
    ]
    folder = write_folder(tmp_path / "d", [], ["a.png"]).removeprefix("folder:")
    (Path(folder) / "captions.jsonl").write_bytes(end.join(lines).encode())
    data = load_dataset(f"folder:{folder}")
    assert {e.captions for e in data.examples} == {(f"one{c}two",) for c in "\u2028\u2029\u0085"}
    assert data.set_aside == ()


BAD_LINES = [
    ('{"image": "a.png"', "not JSON"),
    ("[1]", 'a list, not an object with "image"'),
    ({"captions": ["x"]}, 'no "image"'),
    ({"image": "", "captions": ["x"]}, 'no "image"'),
    ({"image": "gone.png", "captions": ["x"]}, "there is no such file"),
    ({"image": "sub", "captions": ["x"]}, "it is a folder"),
    ({"image": "a.png", "captions": []}, "every caption"),
    ({"image": "a.png", "captions": ["  "]}, "every caption"),
    ({"image": "a.png"}, 'no "captions"'),
    ({"image": "a.png", "captions": [1]}, "the 'captions' of the image 'a.png' hold '1', which is neither a string"),
    ({"image": "../a.png", "captions": ["x"]}, "outside the folder"),
    ({"image": "/etc/passwd", "captions": ["x"]}, "outside the folder"),
    ({"image": "a.png", "captions": ["x"], "id": "ok"}, "uses this id again"),
    ({"image": "x" * 300 + ".png", "captions": ["long"]}, "no file can have the name"),
    ({"image": "nul\0.png", "captions": ["nul"]}, "there is no such file"),
    ("[" * 100_000, "not JSON"),
]


def test_a_bad_line_is_set_aside_with_its_reason(tmp_path):
    (tmp_path / "d" / "sub").mkdir(parents=True)
    lines = [{"image": "a.png", "captions": ["fine"], "id": "ok"}, *(line for line, _ in BAD_LINES)]
    data = load_dataset(write_folder(tmp_path / "d", lines, ["a.png"]))
    assert [e.captions for e in data.examples] == [("fine",)]
    assert len(data.set_aside) == len(BAD_LINES)
    for number, (aside, (_, reason)) in enumerate(zip(data.set_aside, BAD_LINES, strict=True), start=2):
        assert reason in aside.reason
        assert aside.id in (f"captions.jsonl line {number}", "ok")


def test_half_a_surrogate_pair_becomes_storable(tmp_path):
    data = load_dataset(write_folder(tmp_path / "d", ['{"image": "a.png", "caption": "x \\ud800 y"}'], ["a.png"]))
    assert data.examples[0].captions == ("x ? y",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: None, "is not there"),
        (lambda d: d.write_text("x"), "is a file"),
        (lambda d: d.mkdir(), "holds no captions.jsonl"),
        (lambda d: write_folder(d, []), "it is empty"),
        (lambda d: write_folder(d, ["{"]), "1 lines, none usable; captions.jsonl line 1: not JSON"),
        (lambda d: (d.mkdir(), (d / "captions.jsonl").write_bytes(b"\xff\xfe\x00")), "UTF-8"),
        (lambda d: (d.mkdir(), (d / "captions.jsonl").mkdir()), "cannot be read"),
    ],
)
def test_a_folder_without_anything_usable(tmp_path, make, message):
    make(tmp_path / "d")
    with pytest.raises(InputError, match=message):
        load_dataset(f"folder:{tmp_path / 'd'}")


@pytest.mark.parametrize("spec", ["coco", "folder", "folder:", "", "scenes:3"])
def test_an_unknown_name_lists_the_known_ones(spec):
    with pytest.raises(InputError, match=r"scenes .*folder:DIR"):
        load_dataset(spec)


def test_a_folder_without_its_kind_is_told_how_to_name_it(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path} is a folder.*: folder:{tmp_path} is for images with a captions"):
        load_dataset(str(tmp_path))


def test_too_few():
    with pytest.raises(InputError, match="at least 1"):
        load_dataset("scenes", 0)


# --- the draw ---


def test_a_larger_draw_begins_with_the_smaller_one(good):
    whole = [e.id for e in load_dataset(good, seed=5).examples]
    for n in range(1, 6):
        assert [e.id for e in load_dataset(good, n, seed=5).examples] == whole[:n]
    assert (load_dataset(good, 2, seed=5).seed, load_dataset(good, 2, seed=5).n_usable) == (5, 6)


def test_the_draw_depends_on_seed_and_ids_alone(good, tmp_path):
    whole = [e.id for e in load_dataset(good).examples]
    listing = tmp_path / "good" / "captions.jsonl"
    listing.write_text("\n".join(reversed(listing.read_text().splitlines())))
    assert [e.id for e in load_dataset(good).examples] == whole
    # Without one image the others keep their order.
    (tmp_path / "good" / whole[2]).unlink()
    assert [e.id for e in load_dataset(good).examples] == whole[:2] + whole[3:]


def test_every_example_is_as_likely_as_another(good):
    """Each example is in a third of 600 draws of 2 from 6: 200, standard deviation 11.5."""
    drawn = [e.id for seed in range(600) for e in load_dataset(good, 2, seed=seed).examples]
    assert all(abs(drawn.count(f"{i}.png") - 200) < 46 for i in range(6))
