// Which token comes next: drawn at random from the probabilities, or always the likeliest.
"use strict";

/** Return the index of the largest number. */
function argmax(x) {
  let best = 0;
  for (let i = 1; i < x.length; i++) if (x[i] > x[best]) best = i;
  return best;
}

/** Return the indices of the k largest numbers, the largest first. */
function largest(x, k) {
  const best = [];
  for (let i = 0; i < x.length; i++) {
    if (best.length === k && x[i] <= x[best[k - 1]]) continue;
    let place = best.length;
    while (place > 0 && x[i] > x[best[place - 1]]) place--;
    best.splice(place, 0, i);
    if (best.length > k) best.pop();
  }
  return best;
}

/** Set the logits of all but the k likeliest tokens to -Infinity (Fan et al. 2018). */
function keepTopK(logits, k) {
  if (k >= logits.length) return logits;
  const smallest = logits.slice().sort()[logits.length - k];
  return logits.map((logit) => (logit < smallest ? -Infinity : logit));
}

/** Keep the smallest set of likeliest tokens whose probabilities sum to at least p (Holtzman et al. 2020). */
function keepTopP(logits, p) {
  if (p >= 1) return logits;
  const probabilities = softmax(logits);
  const order = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a]);
  const kept = new Float32Array(logits.length).fill(-Infinity);
  for (let i = 0, sum = 0; i === 0 || (i < order.length && sum < p); i++) {
    kept[order[i]] = logits[order[i]];
    sum += probabilities[order[i]];
  }
  return kept;
}

/**
 * Draw a token.
 *
 * @param {Float32Array} logits (V).
 * @param {Object} options `temperature` divides the logits: below 1 texts are safer, above 1 more varied, and 0 always
 *     takes the likeliest token. `topK` and `topP` limit the draw to the likeliest tokens.
 */
function drawToken(logits, { temperature, topK, topP }) {
  if (temperature < 1e-5) return argmax(logits);
  const scaled = logits.map((logit) => logit / temperature);
  const probabilities = softmax(keepTopP(keepTopK(scaled, topK), topP));
  let rest = Math.random();
  for (let token = 0; token < probabilities.length; token++) {
    rest -= probabilities[token];
    if (rest < 0) return token;
  }
  return argmax(probabilities); // rounding left the sum a little below 1
}
