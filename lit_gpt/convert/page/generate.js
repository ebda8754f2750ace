// The loop that writes a text: predict, draw, append, again.
"use strict";

const NUM_ALTERNATIVES = 8;

/**
 * Continue a text token by token.
 *
 * @param {GPT} model
 * @param {Utf8Constraint} constraint
 * @param {number[]} ids The tokens so far, at least one.
 * @param {Object} options `maxNewTokens`; `temperature`, `topK`, `topP` of `drawToken`. `forgetHalf` says what happens
 *     when the context is full. The model cannot see further back, and its cache depends on the first token. By default
 *     the last `context_length` tokens are read again for every new one, as generate.py does. With `forgetHalf` the
 *     latter half of them is read once, which is much faster and changes the text.
 * @yields {?Object} null after each token that was only read; for each new token its id `token`, its `probability`, its
 *     `rank` among all tokens, from 1, and the likeliest `alternatives` that keep the text whole. The probabilities
 *     are those of the model, before temperature, top-k and top-p.
 */
function* generate(model, constraint, ids, options) {
  const { context_length } = model.config;
  const tokens = Array.from(ids);
  let state = constraint.advance(COMPLETE, tokens);
  let unread = tokens.slice(-context_length);
  model.reset();
  for (let remaining = options.maxNewTokens - 1; remaining >= 0; remaining--) {
    if (model.tokens.length + unread.length > context_length) {
      model.reset();
      unread = tokens.slice(-(options.forgetHalf ? Math.ceil(context_length / 2) : context_length));
    }
    let hidden;
    for (const token of unread) {
      hidden = model.read(token);
      yield null;
    }
    const logits = model.logits(hidden);
    const possible = constraint.mask(logits, state, remaining);
    const token = drawToken(possible, options);
    const likeliest = largest(possible, NUM_ALTERNATIVES).filter((other) => possible[other] > -Infinity);
    yield describeToken(token, softmax(logits), likeliest);
    state = constraint.advance(state, [token]);
    tokens.push(token);
    unread = [token];
  }
}

/** Return what the page shows about a token: see `generate`. */
function describeToken(token, probabilities, likeliest) {
  const probability = probabilities[token];
  let rank = 1;
  for (let i = 0; i < probabilities.length; i++) if (probabilities[i] > probability) rank++;
  const alternatives = likeliest.map((other) => ({ token: other, probability: probabilities[other] }));
  return { token, probability, rank, alternatives };
}
