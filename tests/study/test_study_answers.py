"""Studies that read the models' answers: against single reads, resumed, and without answers."""

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

import mechvlm as mv
from helpers.forwards import decoder_calls, decoder_of
from helpers.images import noise_image
from helpers.models import llava
from helpers.small_study import without_figures
from helpers.studies import made_study
from mechvlm.datasets import Dataset, Example, fingerprint
from mechvlm.errors import InputError
from mechvlm.inputs.answer import AnswerList
from mechvlm.study import run
from mechvlm.study.answer_curves import answer_curves, decided
from mechvlm.study.report import answer_figure
from mechvlm.study.running import answer_rows, settings

pytestmark = pytest.mark.long

PROMPT = "what is this"
TABLES = ("answer_tokens", "answer_attention", "answer_lens")
PROMPT_TABLES = ("contextualization", "baseline", "lens", "attention_share", "norm_attention", "answers", "words")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Short answers, and shards of one batch; no figures of whole studies, which are slow."""
    monkeypatch.setattr(answer_rows, "ANSWER_TOKENS", 9)
    monkeypatch.setattr(settings, "EXAMPLES_PER_SHARD", 2)
    with without_figures():
        yield


def data_of(n: int) -> Dataset:
    examples = tuple(Example(f"e{i}", noise_image(i), (f"a picture of a dog, number {i}",)) for i in range(n))
    return Dataset("made", examples, (), fingerprint(examples))


def study(vlm, n=5, **options):
    return run([vlm], data_of(n), **{"prompt": PROMPT, "batch_size": 2, "answers": True, **options})


def same(table: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(table, other, rtol=1e-4, atol=1e-6, check_dtype=False)


@pytest.fixture(scope="module", params=["llava", "instructblip"])
def studied(request, llava_vlm, blip_vlm):
    vlm = {"llava": llava_vlm, "instructblip": blip_vlm}[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer_rows, "ANSWER_TOKENS", 9)
        return vlm, study(vlm)


def test_the_prompts_tables_are_those_of_a_study_without_answers(studied):
    vlm, with_answers = studied
    without = study(vlm, answers=False)
    assert set(with_answers.tables) - set(without.tables) == set(TABLES)
    for name in PROMPT_TABLES:
        same(with_answers.tables[name], without.tables[name])


def test_every_number_is_that_of_the_example_alone(studied):
    """Shares by `NormAttention`, chances by Hugging Face's states through norm and unembedding."""
    vlm, result = studied
    tables = {name: result.tables[name].set_index("example") for name in TABLES}
    norm, head = decoder_of(vlm).norm, getattr(vlm.hf, "lm_head", None) or vlm.hf.language_model.lm_head
    for i in range(3):
        (answer,) = vlm.generate(vlm.inputs(noise_image(i), PROMPT), max_new_tokens=9)
        tokens, n = answer.inputs.tokens, len(answer.ids)
        own = {name: table.loc[f"e{i}"] for name, table in tables.items()}
        assert tuple(own["answer_tokens"]["piece"]) == answer.strings
        (norms,) = mv.read(vlm, answer.inputs, mv.NormAttention(dst="writing"))
        for column, values in (("norm", norms.norm[:, 0]), ("weight", norms.weight[:, 0].mean(1))):
            shares = own["answer_attention"].pivot(index="layer", columns="token", values=column)
            np.testing.assert_allclose(shares, values[..., tokens.image].sum(-1) / values.sum(-1), rtol=1e-4)
        with torch.no_grad():
            states = vlm.hf(**vlm.encoding(answer.inputs), output_hidden_states=True)
            states = getattr(states, "hidden_states", None) or states.language_model_outputs.hidden_states
            # Hugging Face's last state went through the final norm already.
            logits = [head(x[0] if last else norm(x[0])) for last, x in ((s is states[-1], s) for s in states)]
        by_state = dict(iter(own["answer_lens"].sort_values("token").groupby("state")))
        for state, by_position in enumerate(logits):
            chances = by_position[tokens.writing].softmax(-1)
            wanted = chances[range(n), answer.ids]
            np.testing.assert_allclose(by_state[state]["probability"], wanted, rtol=1e-3, atol=1e-7)
            ranks = 1 + (chances > wanted[:, None]).sum(-1)
            assert np.abs(by_state[state]["rank"].to_numpy() - ranks.numpy()).max() <= 1, "up to a tie"
        last = own["answer_lens"].query("state == @vlm.n_layers")
        assert (last["rank"] == 1).all(), "the answer was written greedily"


def test_a_batch_is_one_generation_and_one_forward(llava_vlm):
    with decoder_calls(llava_vlm) as calls:
        study(llava_vlm, n=2)
    whole = [length for length in calls if length > 1]
    n = len(llava_vlm.inputs(noise_image(0), PROMPT).tokens)
    # The prompt's check runs no forward; the gallery writes its own answers.
    assert sorted(set(whole)) == [n, n + 9]
    assert whole.count(n + 9) == 1, "one forward of prompt and answer, whatever is read"


def test_an_answer_may_be_empty(llava_vlm, monkeypatch):
    """Of two examples the first ends at once; then both."""
    generate, calls = type(llava_vlm).generate, []

    def ending(self, inputs, max_new_tokens=40, **options):
        calls.append(len(inputs))
        answers = generate(self, inputs, max_new_tokens, **options)
        if max_new_tokens != 9:
            return answers
        for row, answer in enumerate(answers):
            if not row or len(calls) > 1:
                answer.ids, answer.strings = answer.ids[:0], ()
        return AnswerList(answers, [inputs])

    monkeypatch.setattr(type(llava_vlm), "generate", ending)
    result = study(llava_vlm, n=4)
    assert set(result.tables["answer_tokens"]["example"]) == {"e1"}
    assert result.models[llava_vlm.name]["n_examples"] == 4
    monkeypatch.undo()
    same(result.tables["contextualization"], study(llava_vlm, n=4, answers=False).tables["contextualization"])


def test_it_goes_on_where_it_stopped_and_opens_again(llava_vlm, tmp_path):
    class Stop(Exception):
        pass

    def progress(stage, done, total):
        if "reading" in stage and done > 2:
            raise Stop

    whole = study(llava_vlm, out=tmp_path / "whole")
    with pytest.raises(Stop):
        study(llava_vlm, out=tmp_path / "out", progress=progress)
    with pytest.raises(InputError, match="answers max_new_tokens was 60, is not given"):
        study(llava_vlm, out=tmp_path / "out", answers=False)
    study(llava_vlm, out=tmp_path / "out")
    for name in (*PROMPT_TABLES, *TABLES):
        first, second = (tmp_path / folder / "data" / f"{name}.parquet" for folder in ("whole", "out"))
        assert first.read_bytes() == second.read_bytes(), name
    opened = mv.Study.open(tmp_path / "out")
    same(opened.answer_curves(), whole.answer_curves())
    assert isinstance(opened.plot("answers").figure, Figure)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The models’ own answers" in page
    (tmp_path / "out" / "data" / "answer_lens.parquet").unlink()
    with pytest.raises(InputError, match=r"answer_lens.parquet is missing"):
        mv.Study.open(tmp_path / "out")


def test_on_ndif_the_tables_are_the_same(studied, llava_vlm):
    vlm, result = studied
    if vlm is not llava_vlm:
        pytest.skip("one family is enough")
    there = study(mv.load(vlm.hf, vlm.processor, remote="local"), n=2)
    for name in TABLES:
        some = result.tables[name]
        some = some[some["example"].isin(["e0", "e1"])].reset_index(drop=True)
        same(there.tables[name].astype({"model": str, "example": str}), some.astype({"model": str, "example": str}))


@pytest.mark.ray
def test_workers_of_a_cluster_read_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(answer_rows, "ANSWER_TOKENS", 60)  # as in the workers' own processes
    model, processor = llava(layers=2)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "a-llava")
    options = {"prompt": PROMPT, "batch_size": 2, "answers": True}
    here = run([str(tmp_path / "a-llava")], data_of(4), out=tmp_path / "here", **options)
    there = run([str(tmp_path / "a-llava")], data_of(4), out=tmp_path / "there", ray="auto", workers=1, **options)
    for name in TABLES:
        pd.testing.assert_frame_equal(there.tables[name], here.tables[name])


# -- curves by hand --


@pytest.fixture
def by_hand() -> dict[str, pd.DataFrame]:
    """Two answers of a model of two layers: "red dog" and "a"."""
    keys = [("m", "x", 0), ("m", "x", 1), ("m", "y", 0)]
    tokens = pd.DataFrame(keys, columns=["model", "example", "token"]).assign(
        piece=["red", " dog", "a"], word=["red", "dog", "a"], group=["color", "object", "function"]
    )
    norm = {("x", 0): (0.2, 0.4), ("x", 1): (0.6, 1.0), ("y", 0): (0.0, 0.2)}
    rank = {("x", 0): (1, 3, 1), ("x", 1): (5, 1, 1), ("y", 0): (2, 2, 2)}
    attention = [(*key, layer, share, share / 2) for key in keys for layer, share in enumerate(norm[key[1:]])]
    lens = [(*key, state, 1 / place, place) for key in keys for state, place in enumerate(rank[key[1:]])]
    columns = ["model", "example", "token"]
    return {
        "answer_tokens": tokens,
        "answer_attention": pd.DataFrame(attention, columns=[*columns, "layer", "norm", "weight"]),
        "answer_lens": pd.DataFrame(lens, columns=[*columns, "state", "probability", "rank"]),
    }


def test_curves_by_hand(by_hand):
    curves = answer_curves(by_hand, seed=0).set_index(["measure", "group", "at"])
    assert curves.loc[("norm_share_by_token", "", 0), "mean"] == pytest.approx((0.3 + 0.1) / 2)
    assert curves.loc[("norm_share_by_token", "", 1), ["n", "mean"]].tolist() == [1, pytest.approx(0.8)]
    assert np.isnan(curves.loc[("norm_share_by_token", "", 1), "low"])
    assert curves.loc[("weight_share_by_token", "", 0), "mean"] == pytest.approx(0.1)
    assert curves.loc[("norm_share_by_layer", "object", 1), "mean"] == pytest.approx(1.0)
    assert curves.loc[("norm_share", "color", 0), "mean"] == pytest.approx(0.3)
    assert curves.loc[("probability_by_state", "color", 1), "mean"] == pytest.approx(1 / 3)
    # The first token is the likeliest at states 0 and 2, the second from 1 on, the third never.
    assert decided(by_hand["answer_lens"])["decided"].tolist()[:2] == [2, 1]
    assert np.isnan(decided(by_hand["answer_lens"])["decided"].iloc[2])
    assert curves.loc[("decided_by_token", "", 0), ["n", "mean"]].tolist() == [1, 2]


def test_the_sentence_and_studies_without_answers(by_hand):
    plain = made_study({"m": 2}, n=2)
    assert answer_figure.answer_sentence(plain) == ""
    with pytest.raises(InputError, match="This study read no answers"):
        plain.answer_curves()
    plain.tables.update(by_hand)
    assert answer_figure.answer_sentence(plain) == (
        "While m wrote its answers, the image tokens' share of norm-based attention was 0.80 for object words, 0.30 for "
        "colors, 0.10 for function words (mean over layers)."
    )
