// What the reader does: writing, the card of a token, the form, the language.
"use strict";

const byId = (id) => document.getElementById(id);
const facts = JSON.parse(byId("facts").textContent);
const { config, mode } = facts;
let tokenizer, model, constraint; // of `start`
let running = null; // { text, isStopped } while a text is being written
let newest = null; // the text to which "One token" appends

// ------------------------------------------------------------------------------------------------------------- writing

/** Return the settings of the form as `generate` takes them. */
function settings() {
  const value = (id, otherwise) => (byId(id).value > 0 ? Number(byId(id).value) : otherwise);
  return {
    temperature: Number(byId("temperature").value),
    topK: Math.ceil(value("top_k", Infinity)),
    topP: value("top_p", 1),
    maxNewTokens: Math.ceil(value("length", 200)),
    forgetHalf: byId("forget").checked,
  };
}

/** Show a new text above the others. */
function newText(prompt, promptIds) {
  const text = new WrittenText(prompt, promptIds);
  byId("texts").prepend(text.node);
  newest = text;
  return text;
}

/** Begin a text with the prompt that was typed; null if the model does not know one of its characters. */
function textFromPrompt() {
  const prompt = byId("prompt").value;
  const ids = showPromptCount();
  return ids && newText(prompt, ids);
}

/** Continue a text by up to `count` tokens. */
async function write(text, count = Infinity) {
  stopWriting();
  const run = { text, isStopped: false };
  running = run;
  showRunning();
  const started = performance.now();
  const before = text.steps.length;
  const unread = Math.min(text.ids.length, config.context_length);
  text.status = "too_long";
  text.progress = [0, unread];
  let paused = started;
  for (const step of generate(model, constraint, text.ids, settings())) {
    if (step) {
      text.append(step);
      text.progress = null;
      if (text.isEnded) {
        text.status = "ended";
        break;
      }
      if (text.steps.length - before >= count) {
        text.status = "";
        break;
      }
    } else if (text.progress) {
      text.progress[0] += 1;
    }
    if (performance.now() - paused > 12) {
      text.speed = (text.steps.length - before) / ((performance.now() - started) / 1000);
      text.showFooter();
      await nextTask(); // the browser draws, and hears the reader
      if (run.isStopped) {
        text.status = "stopped";
        break;
      }
      paused = performance.now();
    }
  }
  text.progress = null;
  text.speed = (text.steps.length - before) / ((performance.now() - started) / 1000);
  if (running === run) running = null;
  showRunning();
  text.showFooter();
}

function stopWriting() {
  if (running) running.isStopped = true;
  running = null;
}

/** Return a promise that is kept after the browser has done what waits for it. */
function nextTask() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = resolve;
    port2.postMessage(null);
  });
}

/** Write one token, and show what it was drawn from. */
async function writeOneToken() {
  const isOpen = newest?.node.isConnected && !newest.isEnded && newest.prompt === byId("prompt").value;
  const text = isOpen ? newest : textFromPrompt();
  if (!text) return;
  await write(text, 1);
  const piece = text.pieces.at(-1);
  if (piece && text.unfinished.length === 0) showCard(piece.node, true);
}

/** Begin a text that is the same up to a token, and goes on with another one. */
function writeBranch(text, index, { token, probability }) {
  const branch = newText(text.prompt, text.promptIds);
  for (const step of text.steps.slice(0, index)) branch.append(step);
  const { alternatives } = text.steps[index];
  const rank = 1 + alternatives.filter((other) => other.probability > probability).length;
  branch.append({ token, probability, rank, alternatives, isChosen: true });
  hideCard();
  branch.node.scrollIntoView({ block: "nearest" });
  if (branch.isEnded) {
    branch.status = "ended";
    branch.showFooter();
  } else {
    write(branch);
  }
}

// ------------------------------------------------------------------------------------------------- the card of a token

const card = byId("card");
let hideTimer = 0;

/** Show the card of a token. It is pinned if the reader chose it, and stays until another place is chosen. */
function showCard(node, isPinned) {
  clearTimeout(hideTimer);
  document.querySelector(".token.shown")?.classList.remove("shown");
  node.classList.add("shown");
  const text = node.closest("article").writtenText;
  const { first, steps } = node.piece;
  fillCard(card, steps, tokenizer.tokens, (index, other) => writeBranch(text, first + index, other));
  card.isPinned = isPinned;
  card.hidden = false;
  placeCard(card, node);
  if (isPinned) node.scrollIntoView({ block: "nearest" });
}

function hideCard() {
  clearTimeout(hideTimer);
  document.querySelector(".token.shown")?.classList.remove("shown");
  card.hidden = true;
}

/** Hide the card soon, unless it is pinned: on the way to it the pointer leaves the token. */
function hideCardSoon() {
  clearTimeout(hideTimer);
  if (!card.isPinned) hideTimer = setTimeout(hideCard, 250);
}

/** Show the card of the next token, or of the one before: with the arrow keys. */
function moveCard(event) {
  const direction = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const { pieces } = event.target.closest("article")?.writtenText ?? {};
  if (!direction || !pieces?.length) return;
  event.preventDefault();
  const shown = pieces.findIndex(({ node }) => node.classList.contains("shown"));
  const next = shown < 0 && direction < 0 ? pieces.length - 1 : shown + direction;
  showCard(pieces[Math.max(0, Math.min(next, pieces.length - 1))].node, true);
}

function listenToTokens() {
  const texts = byId("texts");
  texts.addEventListener("pointerover", (event) => {
    const token = event.target.closest(".token");
    if (token && event.pointerType === "mouse" && !(card.isPinned && !card.hidden)) showCard(token, false);
  });
  texts.addEventListener("pointerout", (event) => event.target.closest(".token") && hideCardSoon());
  texts.addEventListener("keydown", moveCard);
  card.addEventListener("pointerenter", () => clearTimeout(hideTimer));
  card.addEventListener("pointerleave", hideCardSoon);
  document.addEventListener("click", (event) => {
    const token = event.target.closest(".token");
    if (token) showCard(token, true);
    else if (!card.contains(event.target) && event.target !== byId("one")) hideCard();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideCard());
}

// ------------------------------------------------------------------------------------------------------ form and words

/** Show how many tokens the prompt has. Return its ids, or null if the model does not know one of its characters. */
function showPromptCount() {
  const prompt = byId("prompt").value;
  const count = byId("count");
  count.classList.remove("error");
  try {
    const ids = encodePrompt(tokenizer, prompt, mode);
    const isCropped = ids.length > config.context_length;
    const said = [prompt && word("prompt_count", number(mode === "rows" ? ids.length - 1 : ids.length))];
    if (isCropped) said.push(word("prompt_cropped", number(config.context_length)));
    count.textContent = said.filter(Boolean).join(" · ");
    return ids;
  } catch (error) {
    if (!(error instanceof UnknownCharacter)) throw error;
    count.textContent = word("unknown", visibleText(error.message));
    count.classList.add("error");
    return null;
  }
}

function showRunning() {
  byId("write").hidden = running !== null;
  byId("stop").hidden = running === null;
}

function showTemperature() {
  const value = Number(byId("temperature").value);
  byId("temperature_value").textContent = number(value, { minimumFractionDigits: 2 });
}

/** Say everything in the language of the reader. */
function translatePage() {
  document.documentElement.lang = language;
  for (const node of document.querySelectorAll("[data-word]")) node.textContent = word(node.dataset.word);
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = word(node.dataset.placeholder);
  const compact = { notation: "compact", compactDisplay: "long", maximumSignificantDigits: 3 };
  const parameters = number(facts.parameters, compact);
  byId("subtitle").textContent = word("subtitle", parameters);
  byId("forget_hint").textContent = word("forget_hint", number(config.context_length));
  byId("how").replaceChildren(...word("how", number(config.vocab_size)).map((line) => element("li", "", line)));
  showAbout();
  showTemperature();
  hideCard();
  if (tokenizer) showPromptCount();
  for (const node of byId("texts").children) node.writtenText.showFooter();
}

function showAbout() {
  const values = {
    parameters: number(facts.parameters),
    vocabulary: word("vocabulary", number(config.vocab_size), facts.tokenizer.name),
    context: word("tokens", number(config.context_length)),
    shape: word("shape", config.num_blocks, config.d_model),
    heads: word("heads", config.num_heads, config.kv_heads),
    positions: config.position,
    norm: config.norm,
    mlp: config.mlp,
    weights: facts.dtype,
  };
  const rows = Object.entries(values).flatMap(([name, value]) => [
    element("dt", "", word("about")[name]),
    element("dd", "", value),
  ]);
  byId("about").replaceChildren(...rows);
}

/** Show the scripts of this page, each when it is opened. */
function showCode() {
  for (const script of document.querySelectorAll("script[id$='.js']")) {
    const details = element("details");
    const code = script.textContent.trim();
    const summary = element("summary", "", script.id);
    summary.append(element("span", "soft", code.split("\n")[0].replace("//", "")));
    details.append(summary);
    details.addEventListener("toggle", () => details.append(element("pre", "", code)), { once: true });
    byId("code").append(details);
  }
}

function listenToForm() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = tokenizer && textFromPrompt();
    if (text) write(text);
  });
  byId("prompt").addEventListener("input", showPromptCount);
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // an input method ends with Enter too
    event.preventDefault();
    byId("form").requestSubmit();
  });
  byId("stop").addEventListener("click", stopWriting);
  byId("one").addEventListener("click", writeOneToken);
  byId("temperature").addEventListener("input", showTemperature);
  byId("language").addEventListener("click", () => {
    language = language === "zh" ? "en" : "zh";
    translatePage();
  });
}

// --------------------------------------------------------------------------------------------------------------- start

/** Unpack the model, and write a first text. */
function start() {
  tokenizer = openTokenizer(facts);
  const elements = document.querySelectorAll("script[data-dtype]");
  model = new GPT(config, decodeWeights(elements));
  for (const node of elements) node.remove(); // the text of the weights is not needed any more
  constraint = new Utf8Constraint(tokenizer.tokens);
  // To read a whole context takes about a second for each 10^9 products.
  byId("forget").checked = facts.parameters * config.context_length > 1e9;
  byId("status").hidden = true;
  byId("write").disabled = byId("one").disabled = false;
  listenToForm();
  listenToTokens();
  const text = textFromPrompt();
  if (text) write(text);
}

translatePage();
showCode();
setTimeout(() => {
  try {
    start();
  } catch (error) {
    byId("status").textContent = word("broken", error.message);
    throw error;
  }
}, 30); // after the page was drawn once
