"""Attention maps: the weights that the model's own attention applies."""

from typing import Any

import pytest
import torch
from test_model import SHAPES, gpt, random_tokens
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.inference.attention_maps import attention_maps, check_heads, shown_heads


@pytest.mark.parametrize("with_documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_maps_times_values_are_the_output_of_attention(shape: dict[str, Any], with_documents: bool) -> None:
    model, tokens = gpt(**shape), random_tokens(24)
    documents = (torch.arange(24) >= 9).long() if with_documents else None
    calls: list[tuple[Tensor, Tensor]] = []
    for block in model.blocks:
        block.attention.register_forward_hook(lambda module, args, output: calls.append((args[0][0], output[0])))
    model(tokens[None], documents=None if documents is None else documents[None])
    outputs = list(calls)
    maps = attention_maps(model, tokens, documents)
    H, K, E = model.config.num_heads, model.config.kv_heads, model.config.head_width
    assert maps.shape == (2, H, 24, 24)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, H, 24))
    for block, (x, output) in enumerate(outputs):
        attention = model.blocks[block].attention
        values = attention.qkv(x)[:, -K * E :].view(24, K, E).repeat_interleave(H // K, dim=1)  # (T, H, E)
        heads = torch.einsum("hts,she->the", maps[block], values)  # (T, H, E)
        torch.testing.assert_close(attention.project(heads.flatten(1)), output, rtol=1e-4, atol=1e-5)


def test_first_four_heads_of_first_and_last_block_are_shown() -> None:
    config = gpt(num_blocks=3, d_model=48, num_heads=6).config
    assert shown_heads(None, config) == [(block, head) for block in (0, 2) for head in range(4)]
    assert shown_heads([[1, 5]], config) == [(1, 5)]
    assert shown_heads([], config) == []
    assert len(shown_heads(None, gpt(num_blocks=1, num_heads=1).config)) == 1


@pytest.mark.parametrize("head", [[2, 0], [0, 4], [-1, 0], [0], [0, 0, 0]], ids=str)
def test_head_that_the_model_lacks_is_refused(head: list[int]) -> None:
    with pytest.raises(UserError, match=r"a block from 0 to 1 and a head from 0 to 3, as \[\[0, 0\], \[1, 0\]\]"):
        check_heads([[0, 0], head], gpt().config)
