"""Answers: what the model wrote, the inputs that read it, and the positions of its words."""

import gc
import pickle

import nnsight
import pytest
import torch
from transformers import set_seed

import mechvlm as mv
from helpers.images import noise_image
from mechvlm.datasets.scenes import scenes
from mechvlm.inputs.occurrences import WORD, occurrences, spans


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-instructblip"])
def tiny(request):
    return mv.load(request.param)


@pytest.fixture(scope="module")
def described(tiny):
    """Three scenes, and the captions that the model wrote of them."""
    inputs = tiny.inputs([scene.image for scene in scenes(3)], ["Describe the scene."] * 3)
    return inputs, tiny.generate(inputs)


def test_an_answer_is_its_text_with_tokens(tiny, described):
    """Against whole forwards of Hugging Face's model, token by token."""
    inputs, answers = described
    assert [str(answer) for answer in answers] == list(answers)
    assert str(answers) == "\n".join(answers)
    for row, answer in enumerate(answers):
        encoding = tiny.encoding(inputs[row])
        assert isinstance(answer, str)
        assert answer.ended
        assert "".join(answer.strings).strip() == answer
        for id, logprob in zip(answer.ids, answer.logprobs, strict=True):
            with torch.no_grad():
                naive = tiny.hf(**encoding).logits[0, -1].log_softmax(-1)
            assert int(naive.argmax()) == int(id)
            assert abs(float(naive[id] - logprob)) < 1e-4
            encoding["input_ids"] = torch.cat([encoding["input_ids"], id[None, None]], 1)
            encoding["attention_mask"] = torch.nn.functional.pad(encoding["attention_mask"], (0, 1), value=1)
        with torch.no_grad():  # what came next ended it
            assert int(tiny.hf(**encoding).logits[0, -1].argmax()) == tiny.tokenizer.eos_token_id


def test_the_inputs_hold_prompt_and_answer(tiny, described):
    inputs, answers = described
    for row, answer in enumerate(answers):
        tokens, prompt = answer.inputs.tokens, inputs[row].tokens
        assert torch.equal(tokens.ids, torch.cat([prompt.ids, answer.ids]))
        assert torch.equal(tokens.answer, torch.arange(len(prompt), len(prompt) + len(answer.ids)))
        assert torch.equal(tokens.writing, tokens.answer - 1)
        assert int(tokens.writing[0]) == prompt.last
        assert torch.equal(tokens.prompt, prompt.all)
        assert tokens.select("last_prompt").tolist() == [prompt.last]
        every = torch.cat([tokens.image, tokens.question, tokens.answer])
        assert torch.equal(every.sort().values, tokens.all)
        assert len(every.unique()) == len(every)
        assert answer.inputs.images[0] == inputs.images[row]
        for key in answer.inputs.encoding.keys() - {"input_ids", "attention_mask"}:
            # the Q-Former's prompt, the pixels
            assert torch.equal(answer.inputs.encoding[key], inputs[row].encoding[key])
        given = inputs[row].answered(str(answer))
        assert torch.equal(given.encoding["input_ids"], answer.inputs.encoding["input_ids"])
        assert given.tokens.n_answer == len(answer.ids)


def test_a_batch_of_answers_ends_together(tiny, described):
    _, answers = described
    together = answers.inputs
    assert isinstance(together, mv.Inputs)
    assert len(together) == 3
    for row, answer in enumerate(answers):
        tokens = together.token_maps[row]
        assert tokens.last == len(tokens) - 1
        assert tokens.n_answer == len(answer.ids)
        assert torch.equal(tokens.ids[tokens.answer], answer.ids)
        assert torch.equal(together[row].encoding["input_ids"], answer.inputs.encoding["input_ids"])
    (read,) = mv.read(tiny, together, mv.Likelihood())
    for row, answer in enumerate(answers):
        assert torch.allclose(read.logprob[row, -len(answer.ids) :], answer.logprobs, atol=1e-4)


def test_several_batches_and_a_bar(tiny):
    images = [scene.image for scene in scenes(3)]
    batches = tiny.inputs(images, "Describe the scene.", batch_size=2)
    answers = tiny.generate(batches, max_new_tokens=4)
    assert list(answers) == list(tiny.generate(tiny.inputs(images, "Describe the scene."), 4))
    assert [len(part) for part in answers.inputs] == [2, 1]
    assert not answers[0].ended
    assert len(answers[0].ids) == 4
    (norms,) = mv.read(tiny, answers.inputs, mv.NormAttention(dst="last_prompt"))
    assert norms.norm.shape[1] == 3


def test_words_are_named_by_where_they_stand_and_where_they_were_written(tiny):
    """Words of several tokens and repeated words; those of the prompt do not count."""
    inputs = tiny.inputs(noise_image(0), "Is the red circle red?")
    answered = inputs.answered("a red circle, and a redhead on a red unbelievable circle")
    tokens = answered.tokens
    strings = [tokens.strings[p].strip() for p in tokens.answer.tolist()]
    start = int(tokens.answer[0])
    red = [start + i for i, text in enumerate(strings) if text == "red"]
    # "redhead" may begin with a token that reads "red": it is another word.
    whole = [p for p in red if not tokens.strings[p + 1][:1].isalpha()]
    assert len(whole) == 2
    assert tokens.holds("red").tolist() == whole
    assert tokens.wrote("red").tolist() == [p - 1 for p in whole]
    assert tokens.holds("red", occurrence=1).tolist() == whole[1:] == tokens.holds("red", occurrence=-1).tolist()
    assert tokens.select("holds:red").tolist() == whole
    assert tokens.select("wrote:red").tolist() == [p - 1 for p in whole]
    assert len(tokens.pos_of("red")) == len(whole) + 2, "a plain word is that of prompt and answer"
    rare = tokens.holds("unbelievable")
    assert len(rare) > 1
    assert "".join(tokens.strings[p] for p in rare).strip() == "unbelievable"
    assert tokens.wrote("unbelievable").tolist() == (rare - 1).tolist()
    assert tokens.holds("red unbelievable circle").tolist() == list(range(whole[1], tokens.last + 1))
    words = [word for word, _ in tokens.answer_words]
    assert words == ["a", "red", "circle", "and", "a", "redhead", "on", "a", "red", "unbelievable", "circle"]
    assert [p for _, own in tokens.answer_words for p in own.tolist()] == [
        p for p in tokens.answer.tolist() if tokens.strings[p].strip() not in ("", ",")
    ]


def test_every_option_takes_a_word_of_the_answer(tiny):
    inputs = tiny.inputs([noise_image(0), noise_image(1)], ["what is this", "a"]).answered(["a red circle", "red"])
    at = [tokens.wrote("red") for tokens in inputs.token_maps]
    for where in ("wrote:red", at):
        (norms, lens) = mv.read(tiny, inputs, mv.NormAttention(dst=where), mv.LogitLens(positions=where, k=2))
        assert norms.dest.tolist() == [p.tolist() for p in at]
        assert [lens.position[lens.example == row].tolist() for row in (0, 1)] == [p.tolist() for p in at]
    flows = mv.information_flow(tiny, inputs, "a", window=1, flows=["image -> wrote:red", "holds:red -> last"])
    with torch.no_grad(), tiny.trace(inputs[0]):
        (src, dst) = inputs[0].tokens.image, inputs[0].tokens.wrote("red")
        mv.knock_out(tiny, src, dst, layers=1)
        logits = nnsight.save(tiny.logits[0, -1].float().softmax(-1))
    id = tiny.answer_tokens(inputs, "a")[0]
    assert abs(float(flows.p_knocked[0, 1, 0] - logits[id])) < 1e-5


def test_before_a_word_is_the_prompt_that_wrote_it(tiny, described):
    """Cut sequences are what the tokenizer and the model have of the shorter answers."""
    inputs, _ = described
    texts = ["a red circle and a blue red cat", "red", "a blue dog, red dog and red dog"]
    cut = inputs.answered(texts).before("red")
    for row, shorter in enumerate(["a", None, "a blue dog,"]):
        wanted = inputs[row] if shorter is None else inputs[row].answered(shorter)
        own = cut.token_maps[row]
        assert torch.equal(cut[row].encoding["input_ids"], wanted.encoding["input_ids"])
        assert own.n_answer == wanted.tokens.n_answer
        assert own.last == len(own) - 1
        assert cut[row].tokens.strings == wanted.tokens.strings
        assert torch.equal(cut[row].tokens.modality, wanted.tokens.modality)
        logits = tiny.hf(**tiny.encoding(cut)).logits[row, -1]
        assert torch.allclose(logits, tiny.hf(**tiny.encoding(wanted)).logits[0, -1], atol=1e-4)
    assert torch.equal(cut.take([0], trim=False).tokens.ids, cut.token_maps[0].ids)
    second = inputs.answered(texts)[[0, 2]].before(["red", "red"], occurrence=1)
    assert [tokens.strings[tokens.last].strip() for tokens in second.token_maps] == ["blue", "and"]
    (parts,) = mv.read(tiny, cut, mv.LogitAttribution("red"))
    whole = tiny.hf(**tiny.encoding(inputs[0].answered(texts[0]))).logits[0]
    at = int(inputs[0].answered(texts[0]).tokens.wrote("red")[0])
    assert abs(float(parts.logit[0] - whole[at, tiny.answer_tokens(inputs, "red")[0]])) < 1e-3


def test_sampling_and_beams_are_those_of_hugging_face(tiny, described):
    inputs, _ = described
    for options in (
        {"do_sample": True, "temperature": 2.0, "top_k": 50},
        {"num_beams": 3},
        {"num_beams": 3, "do_sample": True, "temperature": 3.0},
    ):
        set_seed(5)
        answers = tiny.generate(inputs, max_new_tokens=6, **options)
        set_seed(5)
        wanted = tiny.hf.generate(
            **tiny.encoding(inputs), max_new_tokens=6, repetition_penalty=1.0, pad_token_id=tiny.tokenizer.pad_token_id,
            **options,
        )[:, inputs.encoding["input_ids"].shape[1] :]  # fmt: skip
        for answer, ids in zip(answers, wanted, strict=True):
            n = len(answer.ids)
            assert torch.equal(answer.ids, ids[:n])
            assert n == len(ids) or int(ids[n]) == tiny.tokenizer.eos_token_id
        (read,) = mv.read(tiny, answers.inputs, mv.Likelihood())
        for row, answer in enumerate(answers):
            assert torch.allclose(read.logprob[row, -len(answer.ids) :], answer.logprobs, atol=1e-4)


def test_an_answer_that_ends_at_once_is_empty(llava_vlm):
    inputs = llava_vlm.inputs(noise_image(0), "a")
    first = int(llava_vlm.next_tokens(inputs)[0])
    (answer,) = llava_vlm.generate(inputs, eos_token_id=first)
    assert answer == ""
    assert answer.strings == ()
    assert answer.ended
    assert len(answer.logprobs) == 0
    assert torch.equal(answer.inputs.encoding["input_ids"], inputs.encoding["input_ids"])
    with pytest.raises(ValueError, match=r"No answer was written into these inputs: take vlm.generate"):
        answer.inputs.tokens.select("answer")


def test_on_ndif_the_answers_are_the_same(llava_vlm):
    here = llava_vlm.generate(llava_vlm.inputs(noise_image(0), "a"), max_new_tokens=4)
    there = mv.load(llava_vlm.hf, llava_vlm.processor, remote="local")
    far = there.generate(there.inputs(noise_image(0), "a"), max_new_tokens=4)
    assert list(far) == list(here)
    assert torch.allclose(far[0].logprobs, here[0].logprobs, atol=1e-5)
    assert torch.equal(far[0].inputs.encoding["input_ids"], here[0].inputs.encoding["input_ids"])


def test_bad_answers_and_words_are_refused(llava_vlm, described, tiny):
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    answered = inputs.answered("a red circle on a red cat")
    for bad, message in (
        ("", "An answer is a word or a token id, not ''"),
        ("  ", "not '  '"),
        ("</s>", "holds control tokens alone"),
        ("red <image>", "holds the image token"),
        ("red " * 4000, "leaves no room: with its prompt it has"),
        (["a", "b"], "2 answers were given for 1 examples: give one for all, or one each"),
    ):
        with pytest.raises(mv.InputError, match=message):
            inputs.answered(bad)
    with pytest.raises(mv.InputError, match="hold an answer already"):
        answered.answered("a")
    with pytest.raises(ValueError, match=r"The answer holds no 'blue'. It holds: a, red, circle, on, cat."):
        answered.tokens.holds("blue")
    with pytest.raises(ValueError, match="dst, example 0: The answer holds no 'what'"):
        mv.norm_attention(llava_vlm, answered, dst="wrote:what")
    with pytest.raises(IndexError, match="Occurrence 2 of 'red' was asked for; the answer has 0 to 1"):
        answered.tokens.wrote("red", occurrence=2)
    with pytest.raises(ValueError, match="No answer was written into these inputs"):
        inputs.tokens.holds("what")
    with pytest.raises(mv.InputError, match="2 words were given for 1 examples"):
        answered.before(["red", "cat"])
    with pytest.raises(mv.InputError, match="no option output_attentions"):
        llava_vlm.generate(inputs, output_attentions=True)
    with pytest.raises(mv.InputError, match="an example has one answer: repeat the example"):
        llava_vlm.generate(inputs, num_return_sequences=2, do_sample=True)
    with pytest.raises(ValueError, match="temprature"):
        llava_vlm.generate(inputs, temprature=2.0)


def test_copies_know_no_model_and_inputs_keep_none(llava_vlm):
    inputs = llava_vlm.inputs(noise_image(0), "a")
    with pytest.raises(mv.InputError, match="These inputs are a copy, or their model"):
        pickle.loads(pickle.dumps(inputs)).answered("a")
    vlm = mv.load("tiny-llava")
    inputs = vlm.inputs(noise_image(0), "a")
    answer = vlm.generate(inputs, max_new_tokens=3)[0]
    assert len(answer.inputs.tokens.answer) == 3
    copied = pickle.loads(pickle.dumps(answer))
    assert copied == answer
    assert torch.equal(copied.ids, answer.ids)
    assert copied.inputs.tokens.n_answer == 3
    del vlm
    gc.collect()
    with pytest.raises(mv.InputError, match=r"their model \(tiny-llava\) is gone"):
        inputs.answered("a")


def test_occurrences_and_words_over_tokens():
    assert occurrences("red", [" a", " red", " cat", " in", " r", "ed"]) == [[1], [4, 5]]
    assert occurrences("red", ["red", "head", " covered"]) == []
    assert occurrences(" ", ["a"]) == []
    assert occurrences("a b", [" a", " b", " a", "\0", " b"]) == [[0, 1]]
    assert spans(WORD, [" it", "'s", " well", "-known", ",", " so"]) == [
        ("it's", [0, 1]),
        ("well-known", [2, 3]),
        ("so", [5]),
    ]
    assert spans(WORD, [" 貓", "", " a"]) == [("貓", [0, 1]), ("a", [2])], "a character of two tokens"
