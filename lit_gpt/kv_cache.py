"""The key/value cache: what attention needs of the tokens that were read before."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lit_gpt.model import GPTConfig


class KVCache:
    """The keys and values of the tokens read so far, in every block.

    `GPT.hidden` reads it, appends to it and advances `length`, so that each token is computed only once. Prompts of
    unequal length are aligned right: a shorter row begins with padding, which no token attends to.

    Args:
        config: of the model.
        batch_size: B.
        device: of the tensors.
        dtype: of the tensors, that of the residual stream.
        padding: (B,) int64, how many tokens at the start of each row are padding; None: no row has any.

    Attributes:
        length: how many tokens, padding included, have been read.
        keys, values: one tensor (B, K, context_length, E) for each block, of which the first `length` rows are filled.
        last_tokens: (B, up to n) the last n tokens, where the model looks at n `previous_tokens`.
    """

    def __init__(
        self,
        config: "GPTConfig",
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        padding: Tensor | None = None,
    ) -> None:
        shape = (batch_size, config.kv_heads, config.context_length, config.head_width)
        self.length, self.padding = 0, padding
        self.last_tokens = torch.empty(batch_size, 0, device=device, dtype=torch.long)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_blocks)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_blocks)]

    def append(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, K, T, E) of a block; return all of them so far, (B, K, S, E) each."""
        end = self.length + k.shape[-2]
        self.keys[block][:, :, self.length : end] = k
        self.values[block][:, :, self.length : end] = v
        return self.keys[block][:, :, :end], self.values[block][:, :, :end]

    def positions(self, T: int) -> slice | Tensor:
        """Return the positions of the next T tokens: a slice, or with padding (B, T), counted after it."""
        end = self.length + T
        if self.padding is None:
            return slice(self.length, end)
        columns = torch.arange(self.length, end, device=self.padding.device)  # (T,)
        return (columns - self.padding[:, None]).clamp(min=0)  # (B, T)

    def visible(self, T: int) -> Tensor | None:
        """Return which of the S tokens so far the next T ones attend to: (T, S), or with padding (B, 1, T, S).

        None if no mask is needed: the cache is empty and attention is causal, or T is 1 and the token attends to all S.
        """
        start, end = self.length, self.length + T
        if self.padding is None and (start == 0 or T == 1):
            return None
        device = self.last_tokens.device
        causal = torch.ones(T, end, dtype=torch.bool, device=device).tril(start)  # (T, S)
        if self.padding is None:
            return causal
        is_token = (torch.arange(end, device=device) >= self.padding[:, None])[:, None, None]  # (B, 1, 1, S)
        # Padding attends to itself: a softmax over no key would be NaN.
        return causal & is_token | torch.eye(end, dtype=torch.bool, device=device)[start:]  # (B, 1, T, S)

    def append_tokens(self, tokens: Tensor, keep: int) -> tuple[Tensor, Tensor | None]:
        """Return `tokens` (B, T) after up to `keep` earlier ones, (B, up to keep + T), and remember the last `keep`.

        The second value says which of them are no padding, with the same shape; None: all.
        """
        history = torch.cat((self.last_tokens, tokens), dim=1)
        self.last_tokens = history[:, -keep:]
        if self.padding is None:
            return history, None
        end = self.length + tokens.shape[1]
        columns = torch.arange(end - history.shape[1], end, device=tokens.device)
        return history, columns >= self.padding[:, None]
