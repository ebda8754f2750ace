// The card beside a token: how likely it was, and what else could have come.
"use strict";

/** Return an element with a class and a text. */
function element(tag, className = "", text = "") {
  const created = document.createElement(tag);
  created.className = className;
  created.textContent = text;
  return created;
}

/** Return a text in which blanks and line ends can be seen. */
function visibleText(text) {
  const signs = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍" };
  return text.replace(/[\p{White_Space}\p{Cc}\p{Cf}]/gu, (character) =>
    signs[character] ?? `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`);
}

/**
 * Return a token as a person can read it.
 *
 * @param {string} bytes Of the token.
 * @param {string} before The bytes of the character that tokens before it have begun.
 */
function tokenLabel(bytes, before) {
  if (bytes === "") return word("end_of_text");
  let state = COMPLETE;
  let whole = 0; // the number of bytes up to the end of the last whole character
  const all = before + bytes;
  for (let i = 0; i < all.length; i++) {
    state = stateAfterByte(state, all.charCodeAt(i));
    if (state === COMPLETE) whole = i + 1;
  }
  const text = visibleText(bytesToText(all.slice(0, whole)));
  if (state === COMPLETE) return text;
  const first = bytesToText(completeCharacter(all.slice(whole), state, (ranges) => ranges[0][0]));
  const last = bytesToText(completeCharacter(all.slice(whole), state, (ranges) => ranges.at(-1)[1]));
  return [text, word("begins", first, last)].filter(Boolean).join(" ");
}

/** Append bytes, each chosen from the ranges that may follow, until the character is whole. */
function completeCharacter(bytes, state, choose) {
  while (state !== COMPLETE) {
    const byte = choose(BYTE_RANGES[state]);
    bytes += String.fromCharCode(byte);
    state = stateAfterByte(state, byte);
  }
  return bytes;
}

/**
 * Fill the card with what is known about the tokens of one piece of a text, usually a single one.
 *
 * @param {HTMLElement} card
 * @param {Object[]} steps As `generate` yields them.
 * @param {string[]} tokens The bytes of each token of the vocabulary.
 * @param {function(number, Object)} choose Is called with the index of a step and the alternative that was chosen.
 */
function fillCard(card, steps, tokens, choose) {
  const whole = tokenLabel(steps.map((step) => tokens[step.token]).join(""), "");
  const count = steps.length === 1 ? steps[0].alternatives.length : 4; // that fit on the screen
  let before = "";
  const sections = steps.map((step, index) => {
    const section = element("section");
    const title = element("h3", "", whole);
    if (steps.length > 1) title.append(" ", element("small", "", word("of_parts", index + 1, steps.length)));
    section.append(title, element("p", "soft", describe(step, tokens.length)));
    const chosen = { token: step.token, probability: step.probability };
    const likeliest = step.alternatives.slice(0, count);
    const shown = likeliest.some(({ token }) => token === step.token) ? likeliest : [...likeliest, chosen];
    const row = (other) => alternative(other, step.token, tokens, before, () => choose(index, other));
    section.append(...shown.map(row));
    before += tokens[step.token];
    return section;
  });
  card.replaceChildren(...sections, element("p", "soft", word("card_hint")));
}

function describe(step, vocabulary) {
  const rank = word("rank", number(step.rank), number(vocabulary));
  return [percent(step.probability), rank, step.isChosen ? word("chosen") : ""].filter(Boolean).join(" · ");
}

/** Return the row of a token that could have come, or that came: a bar as long as its probability. */
function alternative({ token, probability }, drawn, tokens, before, choose) {
  const row = element("button", token === drawn ? "alternative drawn" : "alternative");
  row.type = "button";
  row.style.setProperty("--probability", probability);
  row.append(element("span", "", tokenLabel(tokens[token], before)), element("span", "soft", percent(probability)));
  row.disabled = token === drawn;
  row.addEventListener("click", choose);
  return row;
}

/** Place the card below a token, or above it if there is room only there. On a narrow screen it is at the bottom. */
function placeCard(card, token) {
  const margin = 8;
  const box = token.getClientRects()[0];
  const { offsetWidth: width, offsetHeight: height } = card;
  const fitsBelow = box.bottom + height + margin <= innerHeight || box.top < height + margin;
  const left = Math.max(margin, Math.min(box.left, document.documentElement.clientWidth - width - margin));
  card.style.setProperty("--left", `${left + scrollX}px`);
  card.style.setProperty("--top", `${(fitsBelow ? box.bottom + 4 : box.top - height - 4) + scrollY}px`);
}
