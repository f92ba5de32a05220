"""hf:NAME with named columns, on data that the library datasets wrote.

A saved folder, Parquet, splits, bytes.
"""

import builtins
import pickle

import pytest

import datasets
from helpers.datasets import encoded
from helpers.images import noise_image
from mechvlm.datasets import load_dataset
from mechvlm.errors import InputError
from mechvlm.inputs.images import open_image


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(rows: int = 4, **columns) -> datasets.Dataset:
    base = {"photo": [noise_image(i) for i in range(rows)], "captions": [[f"one {i}", f"two {i}"] for i in range(rows)]}
    made = datasets.Dataset.from_dict({**base, **columns})
    return made.cast_column("photo", datasets.Image())


def pixels(data) -> dict[str, bytes]:
    return {e.id: open_image(e.image).tobytes() for e in data.examples}


@pytest.mark.parametrize("form", ["disk", "splits", "parquet", "folder of parquet"])
def test_forms(tmp_path, form):
    at = tmp_path / "data"
    if form == "disk":
        table().save_to_disk(at)
    elif form == "splits":
        datasets.DatasetDict({"train": table(2), "test": table()}).save_to_disk(at)
        with pytest.raises(InputError, match=r"several splits: there are train, test. Choose: .*\?split=train"):
            load_dataset(f"hf:{at}")
        with pytest.raises(InputError, match="no split 'val': there are train, test"):
            load_dataset(f"hf:{at}?split=val")
    else:
        at = at / "test.parquet" if form == "folder of parquet" else tmp_path / "some.parquet"
        at.parent.mkdir(exist_ok=True)
        table().to_parquet(at)
        at = at.parent if form == "folder of parquet" else at
    data = load_dataset(f"hf:{at}" + ("?split=test" if form == "splits" else ""))
    assert {e.id: e.captions for e in data.examples} == {str(i): (f"one {i}", f"two {i}") for i in range(4)}
    assert pixels(data) == {str(i): noise_image(i).tobytes() for i in range(4)}
    again = pickle.loads(pickle.dumps(data.examples[0]))  # as a worker in another process gets it
    assert open_image(again.image).tobytes() == pixels(data)[again.id]


def test_bytes_ids_and_several_caption_columns(tmp_path):
    columns = {
        "jpg": [encoded(i) for i in range(3)],
        "key": ["a", "b", "a"],
        "c1": ["x", "y", "z"],
        "c2": ["u", "", "w"],
    }
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "d")
    data = load_dataset(f"hf:{tmp_path / 'd'}?image=jpg&caption=c1&caption=c2&id=key")
    assert {e.id: e.captions for e in data.examples} == {"a": ("x", "u"), "b": ("y",)}
    assert pixels(data) == {"a": noise_image(0).tobytes(), "b": noise_image(1).tobytes()}
    assert [(aside.id, aside.reason) for aside in data.set_aside] == [
        ("a", "row 2 uses this id again: the first row with it is kept")
    ]


def test_the_hubs_struct_of_bytes_and_path(tmp_path):
    datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(5), "path": None}, {"bytes": None, "path": None}], "text": ["a", "b"]}
    ).save_to_disk(tmp_path / "d")
    data = load_dataset(f"hf:{tmp_path / 'd'}")
    whole, empty = sorted(data.examples, key=lambda e: e.id)
    assert open_image(whole.image).tobytes() == noise_image(5).tobytes()
    with pytest.raises(InputError, match="Row 1 holds no image in 'image'"):
        open_image(empty.image)


def test_captions_that_are_dicts_and_ids_that_are_null(tmp_path):
    """As copies of COCO and Flickr on the Hub write them; a row without an id has its number."""
    captions = [
        [{"raw": "a cat", "sentid": 1}, {"raw": "two", "sentid": 2}],
        [{"raw": "eine Straße", "sentid": 3}],
        [{"raw": " ", "sentid": 4}],
        [{"raw": "four", "sentid": None}],
    ]
    table(captions=captions, key=[5, None, 6, 5]).save_to_disk(tmp_path / "d")
    data = load_dataset(f"hf:{tmp_path / 'd'}?id=key")
    assert {e.id: e.captions for e in data.examples} == {"5": ("a cat", "two"), "1": ("eine Straße",)}
    assert [(aside.id, aside.reason) for aside in data.set_aside] == [
        ("6", "every caption of row 2 is empty"), ("5", "row 3 uses this id again: the first row with it is kept"),
    ]  # fmt: skip


def test_a_struct_of_captions(tmp_path):
    """One caption a row, or a list of them under one key."""
    table(2, captions=[{"raw": "a cat", "tokens": ["a", "cat"]}, {"raw": "two", "tokens": ["two"]}]).save_to_disk(
        tmp_path / "d"
    )
    assert {e.captions for e in load_dataset(f"hf:{tmp_path / 'd'}").examples} == {("a cat",), ("two",)}
    table(2, captions=[{"raw": ["a cat", "x"]}, {"raw": ["two"]}]).save_to_disk(tmp_path / "e")
    assert {e.captions for e in load_dataset(f"hf:{tmp_path / 'e'}").examples} == {("a cat", "x"), ("two",)}
    table(1, captions=[{"tokens": ["a"]}]).save_to_disk(tmp_path / "f")
    with pytest.raises(InputError, match="the captions of row 0 in 'captions' hold a dict with 'tokens'"):
        load_dataset(f"hf:{tmp_path / 'f'}")


def test_rows_without_captions_are_set_aside(tmp_path):
    table(3, captions=[["fine"], [" "], []]).save_to_disk(tmp_path / "d")
    data = load_dataset(f"hf:{tmp_path / 'd'}")
    assert [e.id for e in data.examples] == ["0"]
    assert [(a.id, a.reason) for a in data.set_aside] == [
        ("1", "every caption of row 1 is empty"), ("2", "every caption of row 2 is empty")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "query", "message"),
    [
        ({}, "?image=picture", r"has no column 'picture'. It has photo \(.*\), captions"),
        ({}, "?caption=words", "has no column 'words'"),
        ({}, "?id=words", "has no column 'words'"),
        ({}, "?image=captions", "'captions' of .* holds no images. It has photo"),
        ({"n": [1, 2, 3, 4]}, "?caption=n", "4 rows, none usable; 0: the captions of row 0 in 'n' hold '1'"),
        ({"more": [encoded(i) for i in range(4)]}, "", r"Which column is the image\? Here the columns photo, more"),
        (
            {},
            "?columns=x",
            r"asks for columns=x. The options after the \? are image, caption, id, split, config",
        ),
    ],
)
def test_columns_that_do_not_fit_list_what_there_is(tmp_path, columns, query, message):
    table(**columns).save_to_disk(tmp_path / "d")
    with pytest.raises(InputError, match=message):
        load_dataset(f"hf:{tmp_path / 'd'}{query}")


def test_two_columns_that_may_be_captions(tmp_path):
    table(2, text=["a file", "another"]).save_to_disk(tmp_path / "d")
    with pytest.raises(InputError, match=r"Which column is the caption\? Here the columns captions, text could be"):
        load_dataset(f"hf:{tmp_path / 'd'}")
    assert len(load_dataset(f"hf:{tmp_path / 'd'}?caption=captions")) == 2


def test_no_column_of_captions(tmp_path):
    table().rename_column("captions", "said").save_to_disk(tmp_path / "d")
    with pytest.raises(InputError, match=r"Which column is the caption\? Here no column is known.*\?caption=COLUMN"):
        load_dataset(f"hf:{tmp_path / 'd'}")
    assert len(load_dataset(f"hf:{tmp_path / 'd'}?caption=said")) == 4


def test_what_cannot_be_had(tmp_path, monkeypatch):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    for name in (tmp_path / "gone", tmp_path / "broken.parquet", "nobody/nothing"):
        with pytest.raises(
            InputError, match=r"There is no file or folder|is no Parquet file|cannot load .* Give a name on the Hub"
        ):
            load_dataset(f"hf:{name}")
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"needs the library datasets .*pip install datasets"):
        load_dataset("hf:nobody/nothing")
