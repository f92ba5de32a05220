"""A study's folder, written by hand: what is read back, and what is refused."""

import json

import pandas as pd
import pytest

import mechvlm as mv
from helpers.seals import seal_study
from helpers.studies import made_study
from mechvlm.errors import InputError
from mechvlm.study.load import COLUMNS
from mechvlm.study.record import StudyRecord
from mechvlm.study.save import run_record

SEED = 7


@pytest.fixture(scope="module")
def study() -> StudyRecord:
    return made_study({"m": 12}, n=5, seed=SEED)


@pytest.fixture
def folder(study, tmp_path):
    """The folder of a study without a gallery."""
    for name in ("data", "views"):
        (tmp_path / name).mkdir()
    tables = {name: study.tables.get(name, pd.DataFrame(columns=columns)) for name, columns in COLUMNS.items()}
    for name, table in tables.items():
        table.to_parquet(tmp_path / ("views" if name == "gallery" else "data") / f"{name}.parquet", index=False)
    study.skipped.to_csv(tmp_path / "skipped.csv", index=False)
    (tmp_path / "run.json").write_text(json.dumps(run_record(study)))
    seal_study(tmp_path)
    return tmp_path


def test_an_opened_study_has_the_phases_of_its_own_seed(study, folder):
    opened = mv.Study.open(folder)
    got, want = opened.phases["m"], study.phases["m"]
    assert got.evidence == want.evidence
    assert got.changes == want.changes
    assert got.support == want.support
    pd.testing.assert_frame_equal(opened.curves(), study.curves())
    other = mv.fit_phases(
        *[study.frame("cosine_inter").pivot(index="example", columns="layer", values="value").to_numpy()]
    )
    assert got.evidence != other.evidence, "seed 0"


@pytest.mark.parametrize("name", ["contextualization", "lens"])
def test_a_table_that_lacks_an_example_or_has_another_is_refused(study, folder, name):
    path = folder / "data" / f"{name}.parquet"
    table = pd.read_parquet(path)
    for wrong, n in ((table[table["example"] != "e004"], 4), (pd.concat([table, table.assign(example="x")]), 6)):
        wrong.to_parquet(path, index=False)
        seal_study(folder)
        with pytest.raises(InputError, match=f"holds {n} examples of m, but run.json counts 5"):
            mv.Study.open(folder)


def test_every_study_is_held_to_the_first(study):
    second, third = made_study({"k": 4}, n=3), made_study({"j": 4}, n=3, settings={"prompt": "another"})
    with pytest.raises(InputError, match=r"1 \(not written\) and 3 \(not written\) cannot be compared: the prompt"):
        mv.compare([study, second, third])
    with pytest.raises(InputError, match=r"Study 3 .* was given twice"):
        mv.compare([study, second, second])
