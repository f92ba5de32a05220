"""What every conversion ends with: a language model, its tokenizer with a word for the image, and
a folder that transformers loads."""

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tensors import ConversionError, Source
from tokenizers import AddedToken, normalizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)


@dataclass
class LanguageModel:
    """A language model from a folder or the hub, as its published files say."""

    config: PreTrainedConfig
    tensors: dict[str, torch.Tensor]
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig | None
    dtype: torch.dtype

    @classmethod
    def load(cls, name: str, kind: str, dtype: str | torch.dtype = "auto") -> "LanguageModel":
        """Read it.

        Args:
            name: of the folder or on the hub.
            kind: the model type it must have, such as "llama".
            dtype: of the tensors; "auto" is the files' own.

        Raises:
            ConversionError: when it is of another type, or cannot be read.
        """
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ConversionError(f"--llm {name} cannot be read: {str(error).splitlines()[0]}") from error
        if model.config.model_type != kind:
            raise ConversionError(f"--llm {name} is a {model.config.model_type}; the checkpoint belongs to a {kind}.")
        return cls(model.config, model.state_dict(), tokenizer, model.generation_config, model.dtype)


def leave_tables(own: Source) -> None:
    """Leave out what a checkpoint holds besides weights: constant tables of frozen parts."""
    own.leave(r"llama_model\..*\.rotary_emb\.inv_freq", "a table that transformers makes from LLaMA's settings")
    own.leave(r"Qformer\.bert\.embeddings\.position_ids", "queries have no positions")


def with_llama_spaces(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """LLaMA's tokenizer as these systems used it: a space begins every piece, and <s> the first.

    The original systems cut the prompt at the image and tokenize the pieces one by one, so the text
    after the image begins with a space too: `▁</`, `Img`, `>`. Today's LLaMA tokenizer adds a space
    to the first piece only: `</`, `Img`, `>`. Those are other tokens.

    Raises:
        ConversionError: for a tokenizer that does not write spaces as LLaMA's does.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    start = tokenizer.bos_token
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
    )
    fixed = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=start, eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token, padding_side="left",
    )  # fmt: skip
    if fixed.convert_ids_to_tokens(fixed("is it").input_ids) != [start, "▁is", "▁it"]:
        raise ConversionError(f"The language model's {type(tokenizer).__name__} does not write spaces as LLaMA's does.")
    fixed.pad_token = fixed.unk_token
    return fixed


def add_word(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    """Give the tokenizer a word for the image, in place.

    Returns:
        its id.
    """
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=True)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(word)


def with_rows(table: torch.Tensor, rows: int, like: int) -> torch.Tensor:
    """A table of embeddings with more rows, each a copy of row `like`.

    The image's word needs a row: its embedding is overwritten by the image, and its logit is read
    like any other. As a copy of the row of `<unk>`, which no text holds, its logit never exceeds
    that of every word of the text; a row of zeros would lead wherever all others are negative.

    Returns:
        Float[rows, width]; the table itself where it has enough rows.
    """
    more = rows - len(table)
    return torch.cat([table, table[like].expand(more, -1)]) if more > 0 else table


def new_folder(out: str | Path) -> Path:
    """The folder to write, which must not hold anything.

    Raises:
        ConversionError: when it does.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConversionError(f"--out {folder} exists and is not an empty folder: name another, or empty it.")
    return folder


def write(
    out: Path,
    model_class: type,
    config: PreTrainedConfig,
    tensors: Mapping[str, torch.Tensor],
    processor: ProcessorMixin,
    llm: LanguageModel,
) -> None:
    """Write model, processor and generation settings: the whole folder, or nothing.

    All is written under another name beside `out`, which the next call deletes should this one be
    killed.

    Args:
        out: the folder; there is none yet, or an empty one.
        model_class: of transformers.
        config: of the whole model.
        tensors: every parameter and persistent buffer of the class, by name.
        processor: written beside the model.
        llm: its number format becomes the folder's, and its generation settings too.

    Raises:
        ConversionError: when the tensors are not exactly the class's, in name and shape.
    """
    with torch.device("meta"):  # no memory: the tensors are put in place, not copied
        model = model_class(config)
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ConversionError(f"The tensors are not those of {model_class.__name__}: {error}") from error
    if llm.generation is not None:
        model.generation_config = llm.generation
    unfinished = out.absolute().with_name(f".{out.absolute().name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    # The class writes the format of its first parameter, which may be kept in float32.
    model.config.dtype = llm.dtype
    model.config.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    if out.is_dir():
        out.rmdir()
    unfinished.rename(out)
    print(f"{out}: a {model_class.__name__} with its {type(processor).__name__}.")
