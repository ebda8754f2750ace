// A GPT, top to bottom: it reads one token at a time and predicts the next one.
//
// V  size of the vocabulary               H  query heads; K  key/value heads
// D  width of the residual stream         E  width of one head
// S  tokens read so far                   All vectors and matrices are Float32Arrays; a matrix is stored row after row.
"use strict";

class GPT {
  /**
   * @param {Object} config The shape of the model; the names are those of GPTConfig in lit_gpt/model.py.
   * @param {Object<string, Float32Array>} weights By the names that they have in PyTorch.
   */
  constructor(config, weights) {
    this.config = config;
    this.weights = weights;
    this.reset();
  }

  /** Forget all tokens. */
  reset() {
    const { num_blocks, context_length, kv_heads, head_width } = this.config;
    const cache = () => new Float32Array(context_length * kv_heads * head_width); // (context_length, K, E)
    this.tokens = [];
    this.keys = Array.from({ length: num_blocks }, cache);
    this.values = Array.from({ length: num_blocks }, cache);
  }

  /**
   * Read one more token. What attention needs of it later, its keys and values, is kept in the cache.
   *
   * @param {number} token Its id.
   * @returns {Float32Array} The normalised stream (D), from which `logits` predicts the token after it.
   */
  read(token) {
    const { head_width, rope_base, position: kind } = this.config;
    const position = this.tokens.length;
    this.tokens.push(token);
    this.angles = kind === "rope" ? cosSin(position, head_width, rope_base) : null;
    const x = this.embed(position); // (D), the residual stream
    for (let block = 0; block < this.config.num_blocks; block++) {
      const name = `blocks.${block}`;
      add(x, this.attention(block, position, this.norm(x, `${name}.attention_norm`)));
      add(x, this.feedForward(`${name}.mlp`, this.norm(x, `${name}.mlp_norm`)));
    }
    return this.norm(x, "norm");
  }

  /** Return a number for each token of the vocabulary (V), larger for likelier ones: the head. */
  logits(hidden) {
    return linear(hidden, this.weights[this.config.tie_embeddings ? "embedding.weight" : "head.weight"]);
  }

  /** Return the vector of the token at a position, to which its position and earlier tokens may be added: (D). */
  embed(position) {
    const { d_model, previous_tokens, position: kind } = this.config;
    const row = (name, index) => this.weights[name].subarray(index * d_model, (index + 1) * d_model);
    const x = row("embedding.weight", this.tokens[position]).slice();
    for (let distance = 1; distance <= previous_tokens && distance <= position; distance++) {
      add(x, row(`previous.${distance - 1}.weight`, this.tokens[position - distance]));
    }
    if (kind === "learned") add(x, row("position.table.weight", position));
    if (kind === "sinusoidal") add(x, sinusoid(position, d_model));
    return x;
  }

  /**
   * Let the token at a position gather what it needs from the tokens before it.
   *
   * Each head compares its query with the keys of all tokens so far. Their values are averaged, weighted by how well
   * the keys fit.
   */
  attention(block, position, x) {
    const { num_heads, kv_heads, head_width } = this.config;
    const name = `blocks.${block}.attention`;
    const keys = this.keys[block];
    const values = this.values[block];
    const kvWidth = kv_heads * head_width; // K * E

    const qkv = this.linear(x, `${name}.qkv`); // (H * E + 2 * K * E)
    const queries = qkv.subarray(0, num_heads * head_width); // (H * E)
    const newKeys = qkv.subarray(queries.length, queries.length + kvWidth); // (K * E)
    this.prepareHeads(queries, `${name}.q_norm`);
    this.prepareHeads(newKeys, `${name}.k_norm`);
    keys.set(newKeys, position * kvWidth);
    values.set(qkv.subarray(queries.length + kvWidth), position * kvWidth);

    const y = new Float32Array(num_heads * head_width); // (H * E)
    for (let head = 0; head < num_heads; head++) {
      const query = head * head_width; // where the query of this head begins
      const shared = Math.floor(head / (num_heads / kv_heads)) * head_width; // where its keys and values do, in a row
      const scores = new Float32Array(position + 1); // (S)
      for (let s = 0; s <= position; s++) {
        let dot = 0;
        for (let e = 0, key = s * kvWidth + shared; e < head_width; e++) dot += queries[query + e] * keys[key + e];
        scores[s] = dot / Math.sqrt(head_width);
      }
      const attention = softmax(scores); // (S)
      for (let s = 0; s <= position; s++) {
        for (let e = 0, value = s * kvWidth + shared; e < head_width; e++) {
          y[query + e] += attention[s] * values[value + e];
        }
      }
    }
    return this.linear(y, `${name}.project`); // (D)
  }

  /** Normalise and rotate the queries or keys of all heads, in place. */
  prepareHeads(heads, normName) {
    const { head_width, qk_norm } = this.config;
    for (let start = 0; start < heads.length; start += head_width) {
      const head = heads.subarray(start, start + head_width); // (E)
      if (qk_norm) head.set(this.norm(head, normName));
      if (this.angles) rotate(head, this.angles);
    }
  }

  /** Compute with each token alone: D -> hidden -> D with an activation between. */
  feedForward(name, x) {
    return this.linear(ACTIVATIONS[this.config.mlp](this.linear(x, `${name}.up`)), `${name}.project`); // (D)
  }

  linear(x, name) {
    return linear(x, this.weights[`${name}.weight`], this.weights[`${name}.bias`]);
  }

  norm(x, name) {
    const { norm, norm_eps } = this.config;
    return NORMS[norm](x, this.weights[`${name}.weight`], this.weights[`${name}.bias`], norm_eps);
  }
}

// ------------------------------------------------------------------------------------------------------ linear algebra

/** Add the vector y to x, in place. */
function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
}

/** Return the matrix-vector product `weight` x, plus the bias if there is one. Nearly all time is spent here. */
function linear(x, weight, bias) {
  const width = x.length;
  const inputs = new Float64Array(x); // JavaScript computes in float64: converted once here, not once in each row
  const y = new Float32Array(weight.length / width);
  let row = 0;
  for (; row + 4 <= y.length; row += 4) {
    // Four rows at once: an addition need not wait for the one before it.
    let a = 0, b = 0, c = 0, d = 0;
    const rowA = row * width, rowB = rowA + width, rowC = rowB + width, rowD = rowC + width;
    for (let i = 0; i < width; i++) {
      const input = inputs[i];
      a += weight[rowA + i] * input;
      b += weight[rowB + i] * input;
      c += weight[rowC + i] * input;
      d += weight[rowD + i] * input;
    }
    y[row] = a;
    y[row + 1] = b;
    y[row + 2] = c;
    y[row + 3] = d;
  }
  for (; row < y.length; row++) {
    for (let i = 0; i < width; i++) y[row] += weight[row * width + i] * inputs[i];
  }
  if (bias) add(y, bias);
  return y;
}

/** Return positive numbers that sum to 1, in the proportions of e^x. */
function softmax(x) {
  let largest = -Infinity;
  for (let i = 0; i < x.length; i++) if (x[i] > largest) largest = x[i];
  const y = new Float32Array(x.length);
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += y[i] = Math.exp(x[i] - largest);
  for (let i = 0; i < x.length; i++) y[i] /= sum;
  return y;
}

// --------------------------------------------------------------------------------------------------------------- norms

const NORMS = {
  /** Divide by the root of the mean square (Zhang and Sennrich 2019). */
  rmsnorm(x, weight, bias, eps) {
    let squares = 0;
    for (let i = 0; i < x.length; i++) squares += x[i] * x[i];
    const scale = 1 / Math.sqrt(squares / x.length + eps);
    return x.map((value, i) => value * scale * weight[i]);
  },

  /** Subtract the mean and divide by the standard deviation (Ba et al. 2016). */
  layernorm(x, weight, bias, eps) {
    let mean = 0, variance = 0;
    for (let i = 0; i < x.length; i++) mean += x[i] / x.length;
    for (let i = 0; i < x.length; i++) variance += (x[i] - mean) ** 2 / x.length;
    const scale = 1 / Math.sqrt(variance + eps);
    return x.map((value, i) => (value - mean) * scale * weight[i] + (bias ? bias[i] : 0));
  },

  none: (x) => x.slice(),
};

// --------------------------------------------------------------------------------------------------------- activations

const ACTIVATIONS = {
  /** The first half of x, through SiLU, opens or closes the second half (Shazeer 2020): 2 * hidden -> hidden. */
  swiglu(x) {
    const hidden = x.length / 2;
    return x.subarray(0, hidden).map((gate, i) => (gate / (1 + Math.exp(-gate))) * x[hidden + i]);
  },
  gelu: (x) => x.map((value) => (value * (1 + erf(value / Math.SQRT2))) / 2),
  gelu_tanh: (x) =>
    x.map((value) => (value * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (value + 0.044715 * value ** 3)))) / 2),
  relu: (x) => x.map((value) => Math.max(0, value)),
  relu2: (x) => x.map((value) => Math.max(0, value) ** 2),
};

/** The error function, up to 1.5e-7 (Abramowitz and Stegun 1964, formula 7.1.26). */
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const polynomial = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - polynomial * Math.exp(-x * x));
}

// ----------------------------------------------------------------------------------------------------------- positions

/** Return the cosine and sine of the angles by which heads are rotated at a position: E / 2 each. */
function cosSin(position, width, base) {
  const half = width / 2;
  // Rounded to float32 as in PyTorch: far from the start of a text the rounding changes the angle.
  const angles = Float32Array.from({ length: half }, (_, i) => position * Math.fround(base ** (-i / half)));
  return { cos: angles.map(Math.cos), sin: angles.map(Math.sin) };
}

/**
 * Rotate the pairs of channels (i, i + E/2) of a head by angles that grow with its position, in place (Su et al.
 * 2021). The product of a query and a key then depends on the distance of their tokens.
 */
function rotate(head, { cos, sin }) {
  const half = cos.length;
  for (let i = 0; i < half; i++) {
    const first = head[i], second = head[i + half];
    head[i] = first * cos[i] - second * sin[i];
    head[i + half] = second * cos[i] + first * sin[i];
  }
}

/** Return waves of growing length at a position, sine on even channels and cosine on odd ones (Vaswani et al. 2017). */
function sinusoid(position, width) {
  const waves = new Float32Array(width);
  for (let i = 0; i < width; i += 2) {
    const angle = Math.fround(position * Math.fround(Math.exp((i * -Math.log(10000)) / width)));
    waves[i] = Math.sin(angle);
    waves[i + 1] = Math.cos(angle);
  }
  return waves;
}
