"""Labels as tokens: what comes back as it went in, and what cannot be told apart."""

from __future__ import annotations

import pytest

from loramux.errors import InvalidRequest
from loramux.uncertainty.labels import MAX_TOKENS, tokenise


class Tokenizer:
    """Two letters a token, as pairs go; it does not know upper case (all of it is token 0), nor spaces at the front."""

    unk_token_id = 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        text = text.lstrip()
        pairs = [text[i : i + 2] for i in range(0, len(text), 2)]
        return [0 if pair != pair.lower() else int.from_bytes(pair.encode(), "little") for pair in pairs]

    def decode(self, ids: list[int]) -> str:
        return "".join("?" if i == 0 else i.to_bytes(-(-i.bit_length() // 8), "little").decode() for i in ids)


def test_labels_of_one_token_and_of_several() -> None:
    found = tokenise(["yes", "no", " maybe"], Tokenizer())
    assert [len(ids) for ids in found] == [2, 1, 3]


@pytest.mark.parametrize(
    ("labels", "place"),
    [
        (["yes", "NO"], 1),  # unknown
        (["yes", "  "], 1),  # nothing is left of it
        (["ye", "yes"], 1),  # the first begins the second
        (["yes!", "ye"], 1),  # and the other way round
        (["yes", "no", " yes"], 2),  # the same tokens
        (["x" * (2 * MAX_TOKENS + 1), "no"], 0),
    ],
)
def test_what_cannot_be_chosen_between(labels: list[str], place: int) -> None:
    with pytest.raises(InvalidRequest) as error:
        tokenise(labels, Tokenizer())
    assert error.value.param == f"uncertainty.labels[{place}]" and error.value.hint
