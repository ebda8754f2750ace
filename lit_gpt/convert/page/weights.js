// From the texts in this page to the numbers of the model.
"use strict";

/** Decode base64 to bytes. */
function decodeBase64(text) {
  const characters = atob(text.trim());
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

/** A bfloat16 is the upper half of a float32: the same sign and exponent, and 7 of the 23 bits of the fraction. */
function bfloat16ToFloat32(bytes) {
  const halves = new Uint16Array(bytes.buffer);
  const words = new Uint32Array(halves.length);
  for (let i = 0; i < words.length; i++) words[i] = halves[i] << 16;
  return new Float32Array(words.buffer);
}

/** In int8, each row of a matrix has a scale (float32, all rows first), by which its whole numbers are multiplied. */
function int8ToFloat32(bytes, rows) {
  const scales = new Float32Array(bytes.buffer, 0, rows);
  const integers = new Int8Array(bytes.buffer, 4 * rows);
  const width = integers.length / rows;
  const values = new Float32Array(integers.length);
  for (let row = 0, i = 0; row < rows; row++) {
    for (const end = i + width; i < end; i++) values[i] = scales[row] * integers[i];
  }
  return values;
}

/**
 * Decode the weights.
 *
 * @param {Iterable} elements One for each tensor: its `id` is the name of the tensor, `dataset.dtype` the format of the
 *     numbers, `dataset.rows` the number of rows, and `textContent` the numbers in base64.
 * @returns {Object<string, Float32Array>} The numbers by name. A matrix (rows, columns) is stored row after row.
 */
function decodeWeights(elements) {
  const weights = {};
  for (const element of elements) {
    const bytes = decodeBase64(element.textContent);
    const { dtype, rows } = element.dataset;
    if (dtype === "float32") weights[element.id] = new Float32Array(bytes.buffer);
    else if (dtype === "bfloat16") weights[element.id] = bfloat16ToFloat32(bytes);
    else weights[element.id] = int8ToFloat32(bytes, Number(rows));
  }
  return weights;
}
