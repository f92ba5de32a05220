"""Ids that are null, empty, 0, or alike once they are text."""

import json
from dataclasses import replace

from helpers.datasets import coco, winoground, write_coco, write_folder, write_winoground
from mechvlm.datasets import fingerprint, load_dataset
from mechvlm.datasets.naming import naming
from mechvlm.datasets.scenes import sample_scene


def test_a_null_or_empty_id_is_the_images_name(tmp_path):
    ids = [None, "", 0, "x", 12]
    lines = [{"image": f"{i}.png", "caption": "a", "id": id} for i, id in enumerate(ids)]
    data = load_dataset(write_folder(tmp_path / "d", lines, [f"{i}.png" for i in range(5)]))
    assert {e.id: e.image.name for e in data.examples} == {
        "0.png": "0.png", "1.png": "1.png", "0": "2.png", "x": "3.png", "12": "4.png",
    }  # fmt: skip


def test_ids_of_a_column_with_a_gap_are_whole_numbers(tmp_path):
    lines = [{"image": f"{i}.png", "caption": "a", "id": id} for i, id in enumerate([1.0, None, 12.0])]
    data = load_dataset(write_folder(tmp_path / "d", lines, [f"{i}.png" for i in range(3)]))
    assert {e.id for e in data.examples} == {"1", "1.png", "12"}


def test_a_null_id_of_a_pair_is_its_number(tmp_path):
    entries = winoground(3)
    entries[0]["id"], entries[2]["id"] = 0, None
    data = load_dataset(f"winoground:{write_winoground(tmp_path / 'w', entries)}")
    assert {e.id for e in data.examples} == {"0-0", "0-1", "1-0", "1-1", "2-0", "2-1"}
    for example in data.examples:
        pair, side = example.id.split("-")
        assert example.captions == (entries[int(pair)][f"caption_{side}"],)
        assert example.meta["other_caption"] == entries[int(pair)][f"caption_{1 - int(side)}"]
        assert example.image.name == f"ex_{pair}_img_{side}.png"


def test_an_image_of_coco_without_an_id_is_set_aside(tmp_path):
    content = coco(3)
    content["images"][1]["id"] = None
    data = load_dataset(f"coco:{write_coco(tmp_path / 'c', json.loads(json.dumps(content)))}")
    assert {e.id for e in data.examples} == {"100", "102"}
    assert {aside.id for aside in data.set_aside} == {"images[1]", "101"}
    first = min(data.examples, key=lambda e: e.id)
    assert first.captions == tuple(f"A {first.captions[0].split()[1]} seen {k} times." for k in range(5)), (
        "by their ids"
    )


def test_every_caption_and_id_counts_for_the_fingerprint():
    examples = list(load_dataset("scenes", 2).examples)
    for change in (
        {"captions": (*examples[1].captions[:-1], "another.")}, {"captions": examples[1].captions[:-1]}, {"id": "x"},
        {"image": examples[0].image},
    ):  # fmt: skip
        assert fingerprint([examples[0], replace(examples[1], **change)]) != fingerprint(examples), change
    joined = replace(examples[0], captions=("ab", "c")), replace(examples[0], captions=("a", "bc"))
    assert fingerprint(joined[:1]) != fingerprint(joined[1:])


def test_a_question_has_one_answer(monkeypatch):
    """Scenes in which two objects share a shape are asked about the others, or about none."""
    drawn = []

    def sample(*args):
        drawn.append(sample_scene(*args))
        return drawn[-1]

    monkeypatch.setattr("mechvlm.datasets.naming.sample_scene", sample)
    asked_for = {question.image.tobytes(): question for question in naming(30, seed=1, counts=(3,))}
    n_shared = 0
    for scene in drawn:
        shapes = [o.shape for o in scene.objects]
        n_shared += len(set(shapes)) < 3
        if question := asked_for.get(scene.render().tobytes()):
            (target,) = [o for o in scene.objects if question.prompt == f"What color is the {o.shape}?"]
            assert (question.answer, question.box) == (target.color, target.box())
        else:
            assert len(set(shapes)) == 1
    assert n_shared > 5
