"""Tokens as text: tokenizers of each kind, trained here, against their own decoders."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import llava
from mechvlm.inputs.pieces import spell, token_texts
from mechvlm.measures.words import precision_recall, word_of

TRAINED_ON = [
    "a red café stands beside the naïve façade", "the dog’s “red” ball", "zwei Straßen in Köln",
    "一只狗在红色的街道上", "a dog and a cat", "the cat’s façade is red",
] * 4  # fmt: skip
SENTENCES = [*TRAINED_ON[:6], "pizza 🍕 and 👩‍👩‍👧 in Zürich", "mañana, señor!\n\tyes  two spaces", "Ġgant ▁ 喵"]
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>"]


def byte_level() -> Tokenizer:
    """As of GPT-2, Llama 3, Qwen and SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TRAINED_ON, trainer)
    return tokenizer


def byte_fallback(strip: bool) -> Tokenizer:
    """As of Llama 1 and 2, whose decoder strips a space, and of Gemma, whose decoder does not."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    unigram.train_from_iterator(TRAINED_ON, trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL))
    pieces += sorted(piece for piece in unigram.get_vocab() if piece not in pieces)
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0 - len(SPECIAL)) for piece in pieces], 2, byte_fallback=True))
    tokenizer.normalizer = unigram.normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def metaspace() -> Tokenizer:
    """As of T5: unknown characters have no bytes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(TRAINED_ON, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    """As of BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.train_from_iterator(TRAINED_ON, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL))
    return tokenizer


KINDS = {
    "byte-level BPE": byte_level, "Llama's byte fallback": lambda: byte_fallback(True),
    "Gemma's byte fallback": lambda: byte_fallback(False), "metaspace": metaspace, "WordPiece": word_piece,
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    names = dict(zip(("bos_token", "eos_token", "unk_token", "pad_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=KINDS[request.param](), **names)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_joined_texts_are_what_the_decoder_gives(tokenizer, sentence):
    ids = tokenizer(sentence, add_special_tokens=False).input_ids
    texts = token_texts(ids, tokenizer)
    spelled = spell(ids, texts, tokenizer)
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "".join(spelled).removeprefix(" ") == whole.removeprefix(" "), "a sequence loses its first space"
    assert all(texts), "no token is dropped without a sign"
    for text, part, token in zip(texts, spelled, ids, strict=True):
        assert text == part or "\ufffd" in text, (text, part, tokenizer.convert_ids_to_tokens(token))


def test_every_kind_reads_the_same_words(tokenizer):
    """Whole words of every alphabet, quotes apart from their letters, whatever marks stand for."""
    sentence = "a red café stands beside the façade"
    texts = token_texts(tokenizer(sentence, add_special_tokens=False).input_ids, tokenizer)
    assert "".join(texts).strip() == sentence
    words = {word for text in texts if (word := word_of(text))}
    assert words
    assert all(word in sentence for word in words)
    assert word_of(token_texts([tokenizer.eos_token_id], tokenizer)[0]) is None


def test_a_byte_level_vocabulary_holds_words():
    """Its raw pieces of these words are `ĠcafÃ©` and `âĢĻ`; half of a character is no word."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>")
    vocab = tokenizer.get_vocab()
    cafe, quote = token_texts([vocab["ĠcafÃ©"], vocab["âĢĻ"]], tokenizer)
    assert (cafe, quote) == (" café", "’")
    assert (word_of(cafe), word_of(quote)) == ("café", None)
    assert precision_recall([[cafe], [quote]], "un café", stop_words={"un"})[:2] == (1, 1)
    broken = token_texts([vocab["â"], vocab["Ã"], vocab["Ģ"]], tokenizer)
    assert broken == ("\ufffd",) * 3
    assert token_texts([len(tokenizer) + 7], tokenizer) == (f"<{len(tokenizer) + 7}>",)
    n_words = sum(word_of(text) is not None for text in token_texts(range(len(tokenizer)), tokenizer))
    assert n_words == sum(word_of(tokenizer.decode([i])) is not None for i in range(len(tokenizer)))


def test_bytes_of_an_emoji_are_shown_and_spelled():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_fallback(True), eos_token="</s>", unk_token="<unk>")
    ids = tokenizer("a 🍕", add_special_tokens=False).input_ids
    texts = token_texts(ids, tokenizer)
    assert texts[-4:] == ("\ufffd",) * 4
    assert spell(ids, texts, tokenizer)[-4:] == ("🍕", "", "", "")
    cut = ids[:-1]
    assert spell(cut, texts[:-1], tokenizer)[-3:] == ("\ufffd",) * 3, "a character that is not whole stays broken"
    newline = tokenizer.convert_tokens_to_ids("<0x0A>")
    assert token_texts([newline], tokenizer) == ("\n",)


def test_a_word_of_split_characters_is_found_in_the_prompt():
    """LLaMA's tokenizer writes this emoji as four bytes."""
    vlm = mv.load(*llava())
    tokens = vlm.inputs(noise_image(0), "what 🍕 is this café").tokens
    (first, *_), n = tokens.pos_of("🍕").tolist(), len(tokens.pos_of("🍕"))
    assert tokens.pos_of("🍕").tolist() == list(range(first, first + n))
    assert [tokens.strings[p] for p in tokens.pos_of("🍕").tolist()[-4:]] == ["\ufffd"] * 4
    assert tokens.select("café").tolist() == tokens.pos_of("café").tolist()
    assert "".join(tokens.spelled[p] for p in tokens.pos_of("🍕").tolist()).strip() == "🍕"
    assert vlm.to_str_tokens(tokens.ids[tokens.pos_of("this")]) == (" this",)
