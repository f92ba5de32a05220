"""What the JSON files of a study's folder must hold: run.json, and the about.json of its parts.

Keys that are not named here may hold anything.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, le=10**12)]
Seconds = Annotated[float, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[a-z_]+\.parquet$")]
Layers = Annotated[int, Field(ge=1, le=10_000)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


# -- about.json ------------------------------------------------------------------------------------


class _About(_Part):
    part: str
    """The name of its folder."""
    settings: str
    """The digest of the study's settings."""
    examples: list[str]
    files: dict[FileName, Sha256]
    seconds: Seconds


class ShardAbout(_About):
    """about.json of a shard of examples or of pairs; `first` and `aside` are of one kind each."""

    read: Count
    first: list[str] = []
    aside: list[dict[str, str]] = []
    halved: list[dict[str, Any]]


class ControlsAbout(_Part):
    """What was read of a model's controls."""

    kinds: list[str]
    left_out: list[str]
    seconds: Seconds


class GalleryAbout(_About):
    """about.json of a model's gallery."""

    hf_class: str = Field(alias="class")
    revision: str | None
    dtype: str
    device: str
    n_layers: Layers
    threads: Count
    left_out: list[dict[str, str]]
    controls: ControlsAbout


# -- run.json --------------------------------------------------------------------------------------


class _ModelRecord(_Part):
    n_layers: Layers
    n_examples: Count
    dtype: str
    seconds: Seconds
    hf_class: str = Field("", alias="class")
    revision: str | None = None
    device: str = ""
    examples: Sha256 = "0" * 64
    """The digest of the ids of the examples that it read, in order."""
    pairs_set_aside: list[dict[str, str]] = []
    controls: ControlsAbout | None = None
    """None in studies of earlier versions."""


class _DatasetRecord(_Part):
    name: str
    n: Count
    fingerprint: str
    usable: Count | None = None
    pairs: Count | None = None
    half_pairs: Count | None = None


class _Settings(_Part):
    prompt: str
    seed: Annotated[int, Field(ge=0)]
    measures: dict[str, dict[str, Any]]
    answers: dict[str, Any] | None = None


class RunRecord(_Part):
    """run.json. Folders of earlier versions name no format, and carry no checksums."""

    format: Annotated[int, Field(ge=1)] = 1
    models: Annotated[dict[str, _ModelRecord], Field(min_length=1)]
    dataset: _DatasetRecord
    settings: _Settings
    seconds: Seconds
    files: dict[str, Sha256] = {}
    """The digest of each file, by its path in the folder."""
