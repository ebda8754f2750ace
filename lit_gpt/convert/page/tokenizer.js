// From a text to the ids of its tokens, and back.
//
// Bytes are kept in strings with one character for each byte ("binary strings", as `atob` returns them).
"use strict";

/** Return the bytes of a text in UTF-8. */
function textToBytes(text) {
  let bytes = "";
  for (const byte of new TextEncoder().encode(text)) bytes += String.fromCharCode(byte);
  return bytes;
}

/** Return the text of bytes in UTF-8. */
function bytesToText(bytes) {
  return new TextDecoder().decode(Uint8Array.from(bytes, (byte) => byte.charCodeAt(0)));
}

/** A character that the model does not know. */
class UnknownCharacter extends Error {}

/** One id for each byte of UTF-8, and 256 for the end of a text. */
class ByteTokenizer {
  tokens = Array.from({ length: 256 }, (_, byte) => String.fromCharCode(byte));
  endOfText = 256;

  encode(text) {
    return Array.from(new TextEncoder().encode(text));
  }
}

/** One id for each character of the training text. */
class CharTokenizer {
  constructor({ characters }) {
    const all = Array.from(characters);
    this.ids = new Map(all.map((character, id) => [character, id]));
    this.tokens = all.map(textToBytes);
    this.endOfText = all.length;
  }

  encode(text) {
    return Array.from(text, (character) => {
      if (!this.ids.has(character)) throw new UnknownCharacter(character);
      return this.ids.get(character);
    });
  }
}

/**
 * Byte-pair encoding (Sennrich et al. 2016), as tiktoken does it.
 *
 * A regular expression splits the text into pieces, roughly words. A piece begins as single bytes. Of all neighbours
 * that form a token together, those with the lowest id are merged, again and again.
 */
class BytePairTokenizer {
  constructor({ pieces, end_of_text }, pattern) {
    this.tokens = pieces.map(atob);
    this.endOfText = end_of_text;
    this.ids = new Map(this.tokens.map((token, id) => [token, id]));
    this.pattern = new RegExp(pattern, "gu");
  }

  encode(text) {
    const ids = [];
    for (const [piece] of text.matchAll(this.pattern)) {
      for (const token of this.mergePairs(textToBytes(piece))) ids.push(this.ids.get(token));
    }
    return ids;
  }

  /** Return the bytes of each token of a piece. */
  mergePairs(piece) {
    if (this.ids.has(piece)) return [piece];
    const tokens = Array.from(piece);
    const idOfPair = (i) => {
      const id = i + 1 < tokens.length ? this.ids.get(tokens[i] + tokens[i + 1]) : undefined;
      return id ?? Infinity;
    };
    const pairs = tokens.map((_, i) => idOfPair(i)); // of each token with the next one
    for (;;) {
      let best = 0;
      for (let i = 1; i < pairs.length; i++) if (pairs[i] < pairs[best]) best = i;
      if (!(pairs[best] < Infinity)) return tokens;
      tokens.splice(best, 2, tokens[best] + tokens[best + 1]);
      pairs.splice(best + 1, 1);
      pairs[best] = idOfPair(best);
      if (best > 0) pairs[best - 1] = idOfPair(best - 1);
    }
  }
}

/**
 * Return the tokenizer of a model: its `tokens` are the bytes of each id, "" for the ids that no text has.
 *
 * @param {Object} facts `tokenizer`, as lit_gpt's Tokenizer.state returns it, with all tokens; for byte-pair encoding
 *     `pattern`, the regular expression in the syntax of JavaScript; and the `config` of the model.
 */
function openTokenizer({ tokenizer: state, pattern, config }) {
  const kinds = { byte: ByteTokenizer, char: CharTokenizer };
  const tokenizer = new (kinds[state.name] ?? BytePairTokenizer)(state, pattern);
  while (tokenizer.tokens.length < config.vocab_size) tokenizer.tokens.push("");
  return tokenizer;
}

/**
 * Return the ids from which a text starts, as the texts in training started.
 *
 * In mode "rows" a text begins after the end of another one. In mode "raw" an empty prompt stands for a line end; a
 * model that knows no line ends starts after an arbitrary character.
 */
function encodePrompt(tokenizer, prompt, mode) {
  if (mode === "rows") return [tokenizer.endOfText, ...tokenizer.encode(prompt)];
  try {
    return tokenizer.encode(prompt || "\n");
  } catch (error) {
    if (prompt || !(error instanceof UnknownCharacter)) throw error;
    return [0];
  }
}
