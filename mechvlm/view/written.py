"""The answer as the patch view shows it: its words, each with the positions that wrote it."""

from collections.abc import Collection
from dataclasses import dataclass

from mechvlm.inputs.tokens import TokenMap


@dataclass(frozen=True)
class Written:
    """A word of the answer, a sign between words, or what came after the answer.

    Attributes:
        text: as its tokens spell it; "" for what came after the answer.
        holds: positions of its tokens; none for what came after.
        wrote: positions at which the model wrote them: each is the one before.
    """

    text: str
    holds: tuple[int, ...]
    wrote: tuple[int, ...]


def written_words(tokens: TokenMap, dest: Collection[int]) -> list[Written]:
    """The answer in order: every token belongs to one entry.

    A word is shown token by token where some of the positions that wrote it are destinations and
    others are not: their mean is not known. What came after the answer is the last entry, where the
    answer's last position is a destination.

    >>> [(word.text, word.wrote) for word in written_words(answer.inputs.tokens, dest)]
    [(' a', (17,)), (' squirrel', (18, 19)), ('.', (20,))]

    Args:
        tokens: of a prompt and its answer; without an answer there is no entry.
        dest: the positions whose attention was read.
    """
    joined = {position for _, own in tokens.answer_words for position in own.tolist()[1:]}
    groups: list[list[int]] = []
    for position in tokens.answer.tolist():
        # A token without a text of its own shares its character with the one before.
        if groups and (position in joined or not tokens.spelled[position]):
            groups[-1].append(position)
        else:
            groups.append([position])
    words = []
    for group in groups:
        n_read = sum(position - 1 in dest for position in group)
        for holds in [group] if n_read in (0, len(group)) else [[position] for position in group]:
            texts = tokens.strings if len(holds) < len(group) else tokens.spelled
            words.append(Written("".join(texts[p] for p in holds), tuple(holds), tuple(p - 1 for p in holds)))
    if tokens.n_answer and tokens.last in dest:
        words.append(Written("", (), (tokens.last,)))
    return words
