// Runs the program of a page in Node.js, without a browser: node check.js PAGE. It answers a line of JSON with another.
//
// {"text": …} -> its ids, or null if the model does not know a character
// {"ids": …} -> the logits after each of them, float32 in base64
// {"ids": …, "count": …, "raw_bytes": …} -> the ids of their greedy continuation; with raw_bytes they need not be UTF-8
"use strict";

const fs = require("fs");
const readline = require("readline");
const vm = require("vm");

const page = fs.readFileSync(process.argv[2], "utf-8");
const elements = Array.from(page.matchAll(/<script([^>]*)>([^]*?)<\/script>/g), ([, attributes, textContent]) => {
  const [id, dtype, rows] = ["id", "data-dtype", "data-rows"].map((name) =>
    new RegExp(`\\s${name}="([^"]*)"`).exec(attributes)?.[1]);
  return { id, textContent, dataset: { dtype, rows } };
});
const textOf = (id) => elements.find((element) => element.id === id).textContent;

// As in a browser, the names of one script are known to the next.
for (const name of ["weights", "model", "tokenizer", "utf8", "sampling", "generate"]) {
  vm.runInThisContext(textOf(`${name}.js`), `${name}.js`);
}
const answer = vm.runInThisContext(`(facts, elements, Buffer) => {
  const tokenizer = openTokenizer(facts);
  const model = new GPT(facts.config, decodeWeights(elements));
  const constraint = new Utf8Constraint(tokenizer.tokens);
  const free = { advance: () => COMPLETE, mask: (logits) => logits };

  const encode = (text) => {
    try {
      return tokenizer.encode(text);
    } catch (error) {
      if (error instanceof UnknownCharacter) return null;
      throw error;
    }
  };
  const logits = (ids) => {
    model.reset();
    return Buffer.concat(ids.map((id) => Buffer.from(model.logits(model.read(id)).buffer))).toString("base64");
  };
  const continuation = (ids, count, isFree) => {
    const options = { temperature: 0, topK: Infinity, topP: 1, maxNewTokens: count, forgetHalf: false };
    const steps = Array.from(generate(model, isFree ? free : constraint, ids, options));
    return steps.filter(Boolean).map((step) => step.token);
  };
  return ({ text, ids, count, raw_bytes }) =>
    text !== undefined ? encode(text) : count === undefined ? logits(ids) : continuation(ids, count, raw_bytes);
}`)(JSON.parse(textOf("facts")), elements.filter((element) => element.dataset.dtype), Buffer);

readline.createInterface({ input: process.stdin }).on("line", (line) => {
  process.stdout.write(`${JSON.stringify(answer(JSON.parse(line)))}\n`);
});
