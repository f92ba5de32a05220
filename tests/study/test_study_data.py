"""The study runs on COCO, on Winoground and on the library datasets, up to its report."""

import pytest

import datasets
from helpers.datasets import coco, winoground, write_coco, write_winoground
from helpers.images import noise_image
from mechvlm.study import run


def hub(folder) -> str:
    rows = {"image": [noise_image(i) for i in range(4)], "captions": [["a cat", "a dog runs"]] * 4}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(folder)
    return f"hf:{folder}"


def broken_coco(folder) -> str:
    write_coco(folder, coco(5))
    (folder / "val2017" / "000000000101.jpg").write_bytes(b"no image")
    (folder / "val2017" / "000000000102.jpg").unlink()
    return f"coco:{folder}"


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "ids", "skipped"),
    [
        (broken_coco, {"100", "103", "104"}, {"101", "102"}),
        (lambda f: f"winoground:{write_winoground(f, winoground(2))}", {"0-0", "0-1", "1-0", "1-1"}, set()),
        (hub, {"0", "1", "2", "3"}, set()),
    ],
)
def test_the_study_runs_on(tmp_path, make, ids, skipped):
    study = run(["tiny-llava"], make(tmp_path / "data"), out=tmp_path / "out")
    assert set(study.tables["lens"]["example"]) == ids
    assert set(study.skipped["example"]) == skipped
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
