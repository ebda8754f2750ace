"""The loss of n-gram models: how well a token can be predicted from the few before it, known in a second."""

import numpy as np

DISCOUNT = 0.75  # of each count; the usual value


def ngram_losses(train_ids: np.ndarray, val_ids: np.ndarray, vocab_size: int, max_order: int) -> list[float]:
    """Return the losses of n-gram models of the orders 1 to `max_order` on a validation text, in nats per token.

    A model of order n predicts a token from the n - 1 tokens before it, by counts from the training text. Of each count
    it takes a discount off, and gives what this leaves to the model of order n - 1: interpolated absolute discounting
    (Ney, Essen and Kneser 1994). The model of order 1 adds a half to each count (Krichevsky and Trofimov 1981).

    Args:
        train_ids: Token ids in which n-grams are counted, (n,) int64.
        val_ids: Token ids that are predicted, (m,) int64. The first ones are predicted from the end of `train_ids`.
        vocab_size: V, the number of different ids.
        max_order: The highest order.
    """
    ids, n = np.concatenate([train_ids, val_ids]), len(train_ids)
    counts = np.bincount(train_ids, minlength=vocab_size)  # (V,)
    probabilities = ((counts + 0.5) / (n + 0.5 * vocab_size))[val_ids]  # (m,)
    losses = [-float(np.log(probabilities).mean())]
    contexts = np.zeros(len(ids), dtype=np.int64)  # the number of the context before each token
    for _ in range(2, max_order + 1):
        longer = np.full(len(ids), -1)
        longer[1:] = contexts[:-1] * vocab_size + ids[:-1]
        contexts = np.unique(longer, return_inverse=True)[1]
        ngrams, places = np.unique(contexts * vocab_size + ids, return_inverse=True)
        context_counts = np.bincount(contexts[:n], minlength=contexts.max() + 1)
        ngram_counts = np.bincount(places[:n], minlength=len(ngrams))
        followers = np.bincount(ngrams[ngram_counts > 0] // vocab_size, minlength=len(context_counts))
        seen = np.maximum(context_counts[contexts[n:]], 1)  # (m,)
        known = np.maximum(ngram_counts[places[n:]] - DISCOUNT, 0) / seen
        left = np.where(context_counts[contexts[n:]] > 0, DISCOUNT * followers[contexts[n:]] / seen, 1.0)
        probabilities = known + left * probabilities
        losses.append(-float(np.log(probabilities).mean()))
    return losses
