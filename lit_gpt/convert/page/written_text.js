// A text of the model on the page: its tokens, their colours, and what is below it.
"use strict";

const MAX_SHOWN = 1500; // characters of a prompt, from its end

/** A text of the model: its prompt, the tokens after it, and the element that shows them. */
class WrittenText {
  /**
   * @param {string} prompt
   * @param {number[]} promptIds As `encodePrompt` returns them.
   */
  constructor(prompt, promptIds) {
    this.prompt = prompt;
    this.promptIds = promptIds;
    this.steps = []; // as `generate` yields them
    this.pieces = []; // { first, steps, node }: a piece is a token, or several that form a character together
    this.unfinished = []; // the steps of a character that is not complete yet
    this.status = ""; // the name of the word that says why it ended
    this.progress = null; // [done, all] while tokens are only read
    this.speed = 0; // in tokens per second

    this.node = element("article");
    this.tokensNode = element("p", "tokens");
    this.tokensNode.tabIndex = 0;
    const shown = prompt.length > MAX_SHOWN ? `…${prompt.slice(-MAX_SHOWN)}` : prompt;
    this.tokensNode.append(element("span", "prompt", shown));
    this.footer = element("footer", "soft");
    this.node.append(this.tokensNode, this.footer);
    this.node.writtenText = this;
  }

  get ids() {
    return [...this.promptIds, ...this.steps.map((step) => step.token)];
  }

  get isEnded() {
    return mode === "rows" && this.steps.at(-1)?.token === tokenizer.endOfText;
  }

  /** Append a token. A character is shown as soon as all its tokens are there. */
  append(step) {
    this.steps.push(step);
    this.unfinished.push(step);
    const bytes = this.unfinished.map(({ token }) => tokenizer.tokens[token]).join("");
    if (bytes && stateAfterToken(COMPLETE, bytes) !== COMPLETE) return;
    const steps = this.unfinished;
    this.unfinished = [];
    const text = bytesToText(bytes);
    const node = element("span", "token", text);
    if (text.includes("\n")) node.classList.add("line-end");
    if (bytes === "") node.classList.add("end");
    if (steps.some(({ isChosen }) => isChosen)) node.classList.add("chosen");
    // In bits: 1 for a probability of 1/2, 10 for 1/1024. The colour has its full strength from 10 bits on.
    const bits = -steps.reduce((sum, { probability }) => sum + Math.log2(probability), 0);
    node.style.setProperty("--surprise", Math.min(1, Math.max(0, bits / 10)));
    node.piece = { first: this.steps.length - steps.length, steps, node };
    this.pieces.push(node.piece);
    this.tokensNode.append(node);
  }

  /** Show what is below the text. */
  showFooter() {
    const isWriting = running?.text === this;
    const said = this.progress ? [word("reading", ...this.progress)] : [word("tokens", this.steps.length)];
    if (this.speed && !this.progress) said.push(word("speed", number(this.speed, { maximumSignificantDigits: 3 })));
    if (!isWriting) said.push(word(this.status));
    this.footer.replaceChildren(element("span", "", said.filter(Boolean).join(" · ")));
    if (isWriting) return;
    if (!this.isEnded) this.addButton("go_on", () => write(this));
    this.addButton("copy", (button) => this.copy(button));
    this.addButton("remove", () => this.node.remove());
  }

  addButton(name, action) {
    const button = element("button", "link", word(name));
    button.type = "button";
    button.addEventListener("click", () => action(button));
    this.footer.append(button);
  }

  async copy(button) {
    try {
      await navigator.clipboard.writeText(this.tokensNode.textContent);
    } catch {
      getSelection().selectAllChildren(this.tokensNode); // the browser forbids it: the reader can press Ctrl+C
      return;
    }
    button.textContent = word("copied");
  }
}
