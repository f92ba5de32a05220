"""`VLM`: a vision-language model whose inputs, activations and weights have uniform names."""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, overload

import nnsight
import torch
from jaxtyping import Int
from nnsight import TransformersModel
from PIL import Image
from torch import Tensor

from mechvlm.decoder.decoder import Decoder
from mechvlm.decoder.norms import Norm
from mechvlm.decoder.projections import Projection
from mechvlm.decoder.unembedding import Unembedding, n_logits
from mechvlm.errors import ModelError
from mechvlm.families.known import known_record
from mechvlm.families.record import Architecture, part
from mechvlm.inputs.answer import AnswerList
from mechvlm.inputs.batch import Inputs, WeakLink, check_lengths
from mechvlm.inputs.batches import Answers, Batches, build_batches
from mechvlm.inputs.build import build_inputs, example_names, image_token_of, longest_sequences
from mechvlm.inputs.images import ImageLike
from mechvlm.inputs.pairs import pair_examples
from mechvlm.inputs.pieces import token_texts
from mechvlm.inputs.prompts import Prompt
from mechvlm.ndif.jobs import Job
from mechvlm.ndif.requests import backend_for
from mechvlm.vlm.answers import first_tokens, write_answers
from mechvlm.vlm.circuits import factored_ov, factored_qk
from mechvlm.vlm.encoding import model_arguments, require_cpu_default
from mechvlm.vlm.generating import write
from mechvlm.vlm.habits import missing_in_vlm
from mechvlm.vlm.hook_cache import Cache, run_with_cache
from mechvlm.vlm.records import require_fitting


class VLM(Decoder):
    """A loaded model. `mechvlm.load` makes one.

        vlm = mv.load("tiny-llava")
        inputs = vlm.inputs(image, "What is it?")
        with vlm.trace(inputs):
            resid = nnsight.save(vlm.resid_post[3])    # [batch pos d_model]
            logits = nnsight.save(vlm.logits)          # [batch pos d_vocab]

    **Activations** are read and assigned inside `with vlm.trace(inputs):`, indexed by layer. Their
    names are TransformerLens':

    - `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`: [batch pos d_model].
      `resid_mid` is replaced in place (see `mechvlm.decoder.accessors`).
    - `q`, `z`: [batch pos head d_head]; `k`, `v`: [batch pos kv_head d_head]. `q` and `k` are
      before the rotary embedding, as TransformerLens' hook_q and hook_k are.
    - `pattern`: [batch head dest src].
    - `attention`: what the attention weights are computed from, after the rotary embedding.
    - `memory_pattern`, `memory_attention`: of `memory_layers`, [batch head dest memory]; they have
      `gates`, and `k`, `v` [batch memory kv_head d_head].
    - `logits`, without a layer: [batch pos d_vocab].

    **Weights** are read anywhere, or for a model on NDIF inside a trace only:

    - `W_Q`, `W_K`, `W_V`, indexed by layer: [head d_model d_head], with key and value heads
      repeated to the query heads.
    - `W_O`, indexed by layer: [head d_head d_model].
    - `W_E`: [d_vocab d_model]; `W_U`: [d_model d_vocab].

    Attributes:
        model, hf: the nnsight model, for anything that has no name here; the Hugging Face model.
        processor, tokenizer: its own.
        record: where the family keeps its parts.
        name, revision: what was loaded.
        remote: True where every trace runs on NDIF, "local" where it is packed as for NDIF and runs
            here, else False.
        n_layers, n_heads, n_kv_heads, d_model, d_head, d_vocab: of the decoder.
    """

    def __init__(
        self, hf: Any, processor: Any, *, name: str, record: Architecture | None = None,
        revision: str | None = None, remote: bool | str = False,
    ):  # fmt: skip
        self.processor, self.revision, self.remote = processor, revision, remote
        self.tokenizer = processor.tokenizer
        self._dtype: torch.dtype | None = None
        with warnings.catch_warnings():
            # nnsight renames the Q-Former's modules `output`, and warns. Nothing here reads them.
            warnings.filterwarnings("ignore", message=".*nnsight already serves.*")
            model = TransformersModel(hf, task="image-text-to-text", processor=processor, revision=revision)
        hf = model._module
        record = record or known_record(hf)
        if record is None:
            raise ModelError(
                f"{name} is a {type(hf).__name__} with {hf.config.get_text_config(decoder=True).model_type} layers, for which "
                "mechvlm/families/known.py has no record. One is derived from a model's weights: load it where they fit, without "
                "remote=True, and give that record: mechvlm.load(name, remote=True, record=vlm.record)."
            )
        require_fitting(record, hf, name)
        super().__init__(model, record, name, hf.config, n_logits(part(hf, record.unembed)))
        self.prepare()

    def __repr__(self) -> str:
        devices = " and ".join(sorted({str(p.device) for p in self.hf.parameters()}))
        where = f"{str(self.dtype).removeprefix('torch.')}, {devices}" if self.has_weights else "on NDIF"
        memory = f"memory_layers={self.memory_layers}, " if self.memory_layers else ""
        return (
            f"VLM({self.name!r}, {self.record.hf_class}, n_layers={self.n_layers}, n_heads={self.n_heads}, "
            f"d_model={self.d_model}, {memory}{where})"
        )

    def __getattr__(self, name: str):
        if hasattr(type(self), name):  # a property, whose own error this is
            return object.__getattribute__(self, name)
        raise AttributeError(missing_in_vlm(name))

    def __reduce_ex__(self, protocol):
        # nnsight's parts of the modules would stay those of this model: traces of both would break.
        raise TypeError(
            f"A loaded VLM cannot be copied or pickled. For a second one load it again, mv.load({self.name!r}), or give another "
            "process the name or folder; its weights are vlm.hf.state_dict(), and a cache's activations dict(cache)."
        )

    @property
    def device(self) -> torch.device:
        """The device of the token embedding, where inputs go; "meta" for weights on NDIF."""
        return part(self.hf, self.record.embed).weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model runs. On NDIF the server decides: the first read asks it."""
        if self.has_weights:
            return part(self.hf, self.record.embed).weight.dtype
        if self._dtype is None:
            with self.trace(self.inputs(Image.new("RGB", (32, 32)), "a")) as tracer:
                name = nnsight.save(str(part(self.model, self.record.embed).output.dtype))
                tracer.stop()
            self._dtype = getattr(torch, name.removeprefix("torch."))
        return self._dtype

    @property
    def W_E(self) -> Tensor:
        self.require_weights("W_E")
        return super().W_E

    def readout(self) -> tuple[Norm, Unembedding]:
        self.require_weights("W_U")
        return super().readout()

    def projection(self, name: str, layer: int) -> Projection:
        self.require_weights(name)
        return super().projection(name, layer)

    def require_weights(self, what: str) -> None:
        """Raises ModelError where the weights are on NDIF; `what` needs them."""
        if not self.has_weights:
            raise ModelError(
                f"{what} was asked for, and {self.name} runs on NDIF: no weights are here. Read them inside a trace, `with "
                "vlm.trace(inputs): w = nnsight.save(vlm.W_U[:, 7])`, or load the model without remote=True."
            )

    @overload
    def inputs(
        self,
        images: ImageLike | Sequence[ImageLike | Sequence[ImageLike]] | None = None,
        prompts: Prompt | Sequence[Prompt] | None = None,
        batch_size: None = None,
        ids: Sequence[str | int] | None = None,
    ) -> Inputs: ...

    @overload
    def inputs(
        self,
        images: ImageLike | Sequence[ImageLike | Sequence[ImageLike]] | None = None,
        prompts: Prompt | Sequence[Prompt] | None = None,
        *,
        batch_size: int,
        ids: Sequence[str | int] | None = None,
    ) -> Batches: ...

    def inputs(self, images=None, prompts=None, batch_size=None, ids=None):
        """Images and prompts as a batch, padded on the left, with a `TokenMap` per example.

        >>> inputs = vlm.inputs(["cat.jpg", "dog.jpg"], "What is it?")
        >>> batches = vlm.inputs(paths, "What is it?", batch_size=8, ids=names)    # any number
        >>> question = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
        >>> inputs = vlm.inputs(image, [{"role": "user", "content": question}])

        Args:
            images: one image, a list with one per example, or a list of lists for several in one
                prompt. An image is a PIL image, a path, a file or its bytes, an array [height width
                3], or a tensor [3 height width]; of uint8, or floats in 0..1. Left out where
                conversations hold their images.
            prompts: one for all, or one per example. A string gets the family's template, unless it
                already holds the image token. A conversation is a list of messages as Hugging Face
                takes it, written by the processor's chat template; a last message of the assistant
                is left open. `inputs.texts` shows what was tokenized.
            batch_size: prepare so many examples at a time, each batch when it is reached.
            ids: names of the examples, which results carry in a column `id`.

        Returns:
            `Inputs`, one batch; with a batch_size `Batches`, also where one batch holds all.

        Raises:
            InputError: for an unreadable image (with a batch_size, when its batch is reached),
                numbers of images, prompts and ids that do not match, a prompt that holds the
                template without the image token, one with no room for the image, or a chat template
                that cannot write it. Of several examples it names the one.
        """
        require_cpu_default()
        pairs = pair_examples(images, prompts)
        names = example_names(ids, len(pairs))
        build = partial(
            build_inputs, record=self.record, config=self.config, processor=self.processor, model=self.name,
            # Weakly: inputs that are kept must not keep a model's memory.
            write=WeakLink(self._write_answers),
        )  # fmt: skip
        return (
            build(images, prompts, ids=names) if batch_size is None else build_batches(pairs, batch_size, names, build)
        )

    def trace(self, inputs: Inputs, **kwargs):
        """An ordinary nnsight trace over one forward of `inputs`.

        `kwargs` go to the model's forward: `logits_to_keep=1` computes the logits of the last
        position alone.

        What the block saves, by `value = nnsight.save(...)`, is there after it; a name that was not
        saved keeps what it held before.

        Raises:
            InputError: for anything but inputs of this family of models.
            ValueError: within the trace, for an accessor of another model, which is not traced.
            nnsight's OutOfOrderError: for an activation that the forward has passed already.

        On NDIF, `with vlm.trace(inputs, blocking=False) as tracer:` leaves the job there, and
        `vlm.job(tracer.backend.job_id)` finds it again.
        """
        backend = backend_for(self, kwargs.pop("remote", None), kwargs.pop("blocking", True))
        return self.model.trace(**self.encoding(inputs), backend=backend, **kwargs)

    def job(self, job_id: str) -> Job:
        """The job that a trace left on NDIF; its `result()` is a dict of what the block saved.

        Raises:
            ModelError: for a model that runs here.
        """
        return Job(backend_for(self, blocking=False, job_id=job_id), finish=dict)

    @torch.no_grad()
    def next_tokens(self, inputs: Inputs) -> Int[Tensor, " example"]:
        """Ids of the tokens that the model would write after each example, from one forward."""
        with self.trace(inputs, logits_to_keep=1):
            ids = nnsight.save(self.logits[:, -1].argmax(-1))
        return ids.cpu()

    def to_str_tokens(self, ids: Int[Tensor, " n"]) -> tuple[str, ...]:
        """The text of each token, with the space that it begins with (`mechvlm.inputs.pieces`).

        A part of a character reads "\\ufffd"; an id past the tokenizer's last reads `<id>`.
        """
        return token_texts(ids.tolist(), self.tokenizer)

    def answer_tokens(self, inputs: Inputs, answers: Answers = None) -> Int[Tensor, " example"]:
        """Token ids of the answers' FIRST tokens, as the tokenizer writes them after the prompts.

        A space separates prompt and answer, except after one that ends in a space or a line break.

        >>> red, blue = vlm.answer_tokens(inputs, ["red", "blue"])    # for two examples

        Args:
            inputs: the examples.
            answers: a word or a token id for all examples, or one per example; of an answer of
                several tokens the first one counts. None: the token that the model itself would
                write first (one forward).

        Raises:
            InputError: for another number of answers than examples, an empty answer, an unknown id,
                or a word whose first token the tokenizer joins with the prompt.
        """
        if answers is None:
            return self.next_tokens(inputs)
        return first_tokens(inputs, answers, self.tokenizer, self.d_vocab)

    def answered(self, inputs: Inputs, answers: Sequence[str]) -> tuple[Inputs, tuple[int, ...]]:
        """`inputs.answered(answers)`, and how many tokens each answer has."""
        written = inputs.answered(answers)
        return written, tuple(tokens.n_answer for tokens in written.token_maps)

    def _write_answers(self, inputs: Inputs, answers: Sequence[str | Sequence[int]]) -> Inputs:
        max_length = longest_sequences(self.record, self.config).get("input_ids")
        image_token = image_token_of(self.record, self.config)
        written = write_answers(inputs, answers, self.tokenizer, self.hf, image_token, max_length)
        check_lengths([len(tokens.all) for tokens in written.token_maps], self.record.equal_lengths)
        return written

    def encoding(self, inputs: Inputs) -> dict[str, Tensor]:
        """The arguments of the Hugging Face model's forward, on its device.

        Raises:
            InputError: for inputs of another family, or where torch's default device is no CPU.
            ModelError: for a model in training mode.
        """
        return model_arguments(self, inputs)

    def bridge(self):
        """A new TransformerLens `TransformerBridge` on these weights: the same memory, no copy.

        Modules with an adapter are the exception: the bridge has a merged copy of their weights.
        It runs on what `encoding` holds:

            encoding = vlm.encoding(inputs)
            logits, cache = bridge.run_with_cache(encoding.pop("input_ids"), **encoding)

        Nothing done with its hooks reaches this VLM. `bridge.enable_compatibility_mode()` and
        `bridge.to(...)` give it new weights; a change of its weights in place changes these too.
        When `hf` was moved or cast, make a new bridge.

        Raises:
            ModelError: for a model on several devices, one with quantized weights, one for which
                TransformerLens has no adapter, or one whose adapter's parts do not add up.
        """
        return self._bridge()

    def _bridge(self, fold_final_norm: bool = False):
        from mechvlm.vlm.bridge import checked_bridge

        self.require_weights("A TransformerLens bridge")
        return checked_bridge(self, self.norm_eps if fold_final_norm else None)

    def run_with_cache(self, inputs: Inputs, names_filter=None):
        """The logits and the activations under TransformerLens' hook names, from one forward.

            logits, cache = vlm.run_with_cache(inputs)
            cache["blocks.3.hook_resid_post"]    # [batch pos d_model]; cache["resid_post", 3] too

        Runs without gradients. The names are TransformerLens' names for the activations that this
        class has accessors for, and `mlp.hook_post`, the norms' `hook_scale`, and `hook_embed`,
        which is here the decoder's whole input, image included.

        Args:
            inputs: what `inputs` gives.
            names_filter: a name (`"blocks.3.hook_resid_post"`), several, or a function that says of
                each name whether to keep it; None keeps all. Nothing else is read.

        Returns:
            (logits, cache): [batch pos d_vocab], and a `mechvlm.vlm.hook_cache.Cache`, a mapping
            from name to tensor in the order of the forward; `cache.to_transformer_lens()` makes it
            TransformerLens' `ActivationCache`.

        Raises:
            ValueError: for a name that is not there, or none at all; the message lists the names.
        """
        logits, activations = run_with_cache(self, inputs, names_filter)
        return logits, Cache(activations, self.n_layers, partial(self._bridge, fold_final_norm=True))

    def OV(self, layer: int):
        """W_V W_O of a layer's heads, a TransformerLens `FactoredMatrix` [head d_model d_model].

        `state @ OV` is what a head writes for a normed state, without biases.
        """
        return factored_ov(self, layer)

    def QK(self, layer: int):
        """W_Q W_K^T of a layer's heads, a TransformerLens `FactoredMatrix` [head d_model d_model].

        Before the rotary embedding: the score of two normed states at the same position, without
        scale and biases.

        Raises:
            ModelError: for an attention that norms its queries and keys: its scores are no product
                of the two states with a matrix.
        """
        return factored_qk(self, layer)

    def generate(self, inputs: Inputs | Batches | Sequence[Inputs], max_new_tokens: int = 40, **options) -> AnswerList:
        """The model's own answers, greedy unless options say otherwise.

        >>> answers = vlm.generate(inputs)              # prints as its texts; answers[0].logprobs
        >>> mv.norm_attention(vlm, answers.inputs[0], dst="writing")    # what each was written from

        Greedy: each token is the one of the largest logit, whatever the model's `generation_config`
        says of penalties and limits. Of it only the tokens that end an answer are used, and, when
        sampling, temperature, top_k and top_p.

        Args:
            inputs: one batch or several.
            max_new_tokens: the most tokens of an answer, with the one that ends it.
            options: of sampling and search, as Hugging Face's `generate` names them: `do_sample`,
                `temperature`, `top_k`, `top_p`, `num_beams`, ... `torch.manual_seed` seeds draws.

        Returns:
            A list of one `Answer` an example: a str with `strings`, `ids`, `logprobs`, `ended`, and
            `inputs`, prompt and answer as they were run.

        Raises:
            InputError: for an option about the generation's outputs, or several answers an example.
            ValueError: for an option that Hugging Face does not know.
        """
        return write(self, inputs, max_new_tokens, options)
