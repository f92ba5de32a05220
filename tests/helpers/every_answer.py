"""What a tiny model of a family writes, which heads look, pages and studies; see `every_method`.

It stands last: whoever imports it has all methods, in the order of the table.
"""

import tempfile
from pathlib import Path
from typing import Any

import nnsight
import pandas as pd
import torch

import mechvlm as mv
from helpers import every_experiment, families  # noqa: F401  (it registers its methods)
from helpers.every_method import Case, close, first, method
from helpers.small_study import gallery_of, without_figures


@method
def generation(case: Case) -> None:
    """Hugging Face's greedy tokens, and the first of them from one forward."""
    vlm = case.vlm
    first_tokens = vlm.next_tokens(case.inputs)
    assert torch.equal(first_tokens, case.seen["logits"][:, -1].argmax(-1))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        ids = case.twin.generate(**case.encoding, **options)
    n = case.inputs.encoding["input_ids"].shape[1]
    new = ids[:, n:] if ids.shape[1] > 4 else ids
    wanted = [text.strip() for text in vlm.tokenizer.batch_decode(new, skip_special_tokens=True)]
    assert vlm.generate(case.inputs, max_new_tokens=4) == wanted


@method
def heads_that_look(case: Case) -> None:
    """Shares of the last position's attention, and of one patch's box where patches have places."""
    (shares,) = mv.read(case.vlm, case.inputs, mv.AttentionShare("last"))
    for row, tokens in enumerate(case.inputs.token_maps):
        for layer, weights in enumerate(case.seen["attentions"]):
            last = weights[row, :, -1]
            naive = [
                last[:, [p for p in own.tolist() if p != tokens.last]].sum(-1) for own in (tokens.image, tokens.text)
            ]
            close(shares.image[layer, row, :, 0], naive[0], 1e-4)
            close(shares.group("text")[layer, row, :, 0], naive[1], 1e-4)
            close(shares.group("self")[layer, row, :, 0], last[:, tokens.last], 1e-4)


@method
def answers(case: Case) -> None:
    """One pass over prompt and answer has what each step of Hugging Face's generation computed."""
    vlm, ids = case.vlm, case.inputs.encoding["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    if families.parts.IMAGE in ids:  # a random model might write it
        options["suppress_tokens"] = [families.parts.IMAGE]
    with torch.no_grad():
        out = case.twin.generate(
            **case.encoding, **options, return_dict_in_generate=True, output_logits=True, output_attentions=True,
            output_hidden_states=True,
        )  # fmt: skip
    written, n_prompt = vlm.generate(case.inputs, **options), ids.shape[1]
    for row, answer in enumerate(written):
        assert torch.equal(answer.ids, out.sequences[row, n_prompt:][: len(answer.ids)])
        naive = [float(out.logits[i][row].log_softmax(-1)[id]) for i, id in enumerate(answer.ids)]
        assert torch.allclose(answer.logprobs, torch.tensor(naive), atol=1e-5)
    inputs = written.inputs
    (read,) = mv.read(vlm, inputs, mv.Likelihood())
    for row, answer in enumerate(written):
        close(read.logprob[row, -len(answer.ids) :], answer.logprobs, 1e-5)
    if vlm.memory_layers:
        return  # Hugging Face numbers their layers and weights otherwise
    weighed = [layer for layer in range(vlm.n_layers) if vlm.record.kind(layer).attention is not None]
    with torch.no_grad(), vlm.trace(inputs):
        states, rows = nnsight.save([]), nnsight.save({})
        for layer in range(vlm.n_layers):
            states.append(vlm.resid_pre[layer].clone())
            if layer in weighed:
                rows[layer] = vlm.pattern[layer].clone()
    for row, (answer, tokens) in enumerate(zip(written, inputs.token_maps, strict=True)):
        start = int(tokens.answer[0])
        for step in range(1, len(answer.ids)):  # which read the answer's token `step - 1`
            at = start + step - 1
            for layer in range(vlm.n_layers):
                close(states[layer][row, at], out.hidden_states[step][layer][row, -1], 1e-5)
            for layer in weighed:
                # A layer with a sliding window keeps no more than it looks back.
                theirs = out.attentions[step][layer][row, :, -1]
                mine = rows[layer][row, :, at, : at + 1]
                n = min(mine.shape[1], theirs.shape[1])
                close(mine[:, -n:], theirs[:, -n:], 1e-5)
                assert not mine[:, :-n].any()
                assert not theirs[:, :-n].any()


@method
def patch_page(case: Case) -> None:
    from mechvlm.explore import destinations, patch_view

    example = case.inputs[2]
    # A random model might write the image token.
    suppressed = {"suppress_tokens": [families.parts.IMAGE]} if families.parts.IMAGE in example.tokens.ids else {}
    (answer,) = case.vlm.generate(example, max_new_tokens=3, **suppressed)
    for inputs in (example, answer.inputs):
        page = patch_view(case.vlm, inputs, destinations(case.vlm, inputs.tokens)[-2:], k=2)
        assert "<script" in page.html()


@method
def attention_page(case: Case) -> None:
    example = case.inputs[2]
    pool = (1, 2) if example.tokens.patches else 3
    norms = mv.norm_attention(case.vlm, example, dst="all pairs")
    page = mv.view.attention(example, norms, layers=[1], pool=pool)
    assert "<script" in page.html()


@method
def bridge(case: Case) -> None:
    """TransformerLens' own forward gives the same logits."""
    encoding = case.vlm.encoding(case.inputs)
    with torch.no_grad():
        logits = case.vlm.bridge()(encoding.pop("input_ids"), **encoding)
    close(first(logits)[case.real], case.seen["logits"][case.real], 1e-3)


@method
def study(case: Case) -> None:
    """A study of three scenes: its cosines are those of the scenes read by themselves."""
    hf, processor = families.build(case.name)
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(f"{folder}/model")
        processor.save_pretrained(f"{folder}/model")
        prompt, data = "Describe the scene.", mv.datasets.load_dataset("scenes", 3)
        with without_figures(), gallery_of(1):
            result = mv.study.run([f"{folder}/model"], data, prompt=prompt, batch_size=2, out=f"{folder}/study")
        skipped = pd.read_csv(f"{folder}/study/skipped.csv")
        assert (Path(folder) / "study" / "report.html").stat().st_size > 10_000
    assert skipped.empty, skipped["reason"].tolist()
    frame = result.frame("cosine_inter").sort_values(["example", "layer"])
    alone = [mv.contextualization(case.vlm, case.vlm.inputs(example.image, prompt)).inter for example in data.examples]
    close(torch.tensor(frame["value"].to_numpy()).float(), torch.cat(alone, 1).T.flatten(), 1e-3)
