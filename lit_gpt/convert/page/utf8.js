// Which tokens keep a text valid UTF-8.
//
// A token may be a part of a character: "静" has three bytes, and may be two tokens.
"use strict";

const COMPLETE = 0; // the state of a text that ends with a whole character
const INVALID = 255;

// After some bytes of a character (a state), which bytes may come next, and the state after them: RFC 3629. The bytes
// EF BF BD are left out: they are the character that stands for broken ones.
const BYTE_RANGES = [
  [[0x00, 0x7f, COMPLETE], [0xc2, 0xdf, 1], [0xe0, 0xe0, 4], [0xe1, 0xec, 2], [0xed, 0xed, 5], [0xee, 0xee, 2],
    [0xef, 0xef, 8], [0xf0, 0xf0, 6], [0xf1, 0xf3, 3], [0xf4, 0xf4, 7]],
  [[0x80, 0xbf, COMPLETE]], // 1: one more byte
  [[0x80, 0xbf, 1]], // 2: two more
  [[0x80, 0xbf, 2]], // 3: three more
  [[0xa0, 0xbf, 1]], // 4: after E0, where lower bytes would be a longer form of another character
  [[0x80, 0x9f, 1]], // 5: after ED, where higher bytes would be surrogates
  [[0x90, 0xbf, 2]], // 6: after F0
  [[0x80, 0x8f, 2]], // 7: after F4, where higher bytes would be beyond the last character
  [[0x80, 0xbe, 1], [0xbf, 0xbf, 9]], // 8: after EF
  [[0x80, 0xbc, COMPLETE], [0xbe, 0xbf, COMPLETE]], // 9: after EF BF
];
const NUM_STATES = BYTE_RANGES.length;

/** Return the state after one more byte, or INVALID. */
function stateAfterByte(state, byte) {
  for (const [low, high, after] of BYTE_RANGES[state]) if (low <= byte && byte <= high) return after;
  return INVALID;
}

/** Return the state after the bytes of a token, or INVALID. A token without bytes stands between characters only. */
function stateAfterToken(state, bytes) {
  if (bytes.length === 0) return state === COMPLETE ? COMPLETE : INVALID;
  for (let i = 0; i < bytes.length && state !== INVALID; i++) state = stateAfterByte(state, bytes.charCodeAt(i));
  return state;
}

/** Keeps generated texts valid UTF-8, and lets them end with a whole character: lit_gpt/inference/utf8.py. */
class Utf8Constraint {
  /** @param {string[]} tokens The bytes of each token. */
  constructor(tokens) {
    this.after = BYTE_RANGES.map((_, state) => Uint8Array.from(tokens, (token) => stateAfterToken(state, token)));
    this.breaksCharacters = this.after[COMPLETE].some((state) => state !== COMPLETE);
    this.steps = this.stepsToComplete();
  }

  /** Return the fewest tokens from each state to the end of a character: found in rounds, one token further in each. */
  stepsToComplete() {
    const steps = new Array(NUM_STATES).fill(Infinity);
    steps[COMPLETE] = 0;
    const successors = this.after.map((after) => [...new Set(after)].filter((state) => state !== INVALID));
    for (let round = 0; round < NUM_STATES; round++) {
      for (let state = 1; state < NUM_STATES; state++) {
        for (const next of successors[state]) steps[state] = Math.min(steps[state], 1 + steps[next]);
      }
    }
    return steps;
  }

  /** Return the state after more tokens. */
  advance(state, tokens) {
    for (const token of tokens) {
      state = this.after[state][token];
      if (state === INVALID || this.steps[state] === Infinity) state = COMPLETE;
    }
    return state;
  }

  /**
   * Return the logits with -Infinity for each token that would break a character, or begin one that the tokens which
   * remain cannot complete.
   *
   * @param {number} remaining How many tokens will follow the one that is drawn now.
   */
  mask(logits, state, remaining) {
    if (!this.breaksCharacters) return logits;
    const limit = Math.max(this.steps[state] - 1, remaining);
    const after = this.after[state];
    const allowed = (token) => after[token] !== INVALID && this.steps[after[token]] <= limit;
    return logits.map((logit, token) => (allowed(token) ? logit : -Infinity));
  }
}
