"""Tokens as a person reads them, and the likeliest next ones."""

import torch
from test_model import gpt
from torch import nn

from lit_gpt.inference.next_tokens import likeliest_next_tokens
from lit_gpt.inference.token_texts import token_text, token_texts, visible_text
from lit_gpt.tokenizer import ByteTokenizer, open_tokenizer

BYTES = ByteTokenizer()


def test_blanks_and_controls_are_visible() -> None:
    assert visible_text("a b\n\t\u3000é中\x1b") == "a␣b\\n\\t\\u3000é中\\x1b"
    assert token_text(BYTES, BYTES.end_of_text) == "<end>"
    assert token_text(BYTES, 0xE9) == "\\xe9"
    tokenizer = open_tokenizer("cl100k_base")
    assert [token_text(tokenizer, token) for token in tokenizer.encode(" the\n")] == ["␣the", "\\n"]


def test_tokens_that_form_a_character_show_it_with_their_number() -> None:
    tokens = [*"a静".encode(), *"é".encode()[:1], BYTES.end_of_text, *b" b\xff", *"静".encode()[:2]]
    expected = ["a", "静1/3", "静2/3", "静3/3", "\\xc3", "<end>", "␣", "b", "\\xff", "\\xe9", "\\x9d"]
    assert token_texts(BYTES, tokens) == expected
    tokenizer = open_tokenizer("cl100k_base")
    tokens = tokenizer.encode("静夜思 and Tang")
    texts = token_texts(tokenizer, tokens)
    assert len(texts) == len(tokens)
    assert "".join(text for text in texts if "/" not in text).replace("␣", " ").endswith(" and Tang")


class NextByte(nn.Module):
    """A model whose likeliest next token follows from the last one by a table; the second likeliest is token 65."""

    def __init__(self, table: dict[int, int]) -> None:
        super().__init__()
        self.table, self.config = table, gpt(vocab_size=257).config
        self.embedding, self.head = nn.Embedding(1, 1), nn.Identity()

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, 257)
        logits[..., 65] = 2.0
        for row, column in torch.cartesian_prod(*map(torch.arange, tokens.shape)).tolist():
            logits[row, column, self.table.get(int(tokens[row, column]), 66)] = 4.0
        return logits


def test_beginning_of_a_character_shows_the_likeliest_one() -> None:
    first, second, third = "静".encode()
    model = NextByte({97: first, first: second, second: third})
    likeliest = likeliest_next_tokens(model, BYTES, [97], 2, also=0xC3)  # type: ignore[arg-type]
    assert [(one.token, one.text) for one in likeliest] == [(first, "\\xe9 → 静"), (65, "A"), (0xC3, "\\xc3")]
    assert likeliest[0].probability > likeliest[1].probability > likeliest[2].probability > 0


def test_probabilities_are_those_of_the_model() -> None:
    model, ids = gpt(vocab_size=257), list(b"abc" * 20)
    probs = model(torch.tensor([ids[-24:]]))[0][0, -1].softmax(-1)
    likeliest = likeliest_next_tokens(model, BYTES, ids, 5)
    assert [one.token for one in likeliest] == probs.argsort(descending=True)[:5].tolist()
    torch.testing.assert_close(torch.tensor([one.probability for one in likeliest]), probs.topk(5).values)


def test_only_the_logits_of_the_last_position_are_computed() -> None:
    model, shapes = gpt(vocab_size=257), []
    model.head.register_forward_hook(lambda module, inputs, logits: shapes.append(tuple(logits.shape)))
    likeliest_next_tokens(model, BYTES, list(b"abc"), 257)
    assert shapes[0] == (1, 257)
    assert {len(shape) for shape in shapes} == {2}
