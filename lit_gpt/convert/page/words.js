// What the page says, in English and Chinese.
"use strict";

const WORDS = {
  en: {
    other_language: "中文",
    subtitle: (parameters) =>
      `A language model with ${parameters} parameters. It runs inside this page: what you type stays on your device, ` +
      "and no network is needed.",
    prompt: "How the text begins",
    prompt_hint: "Type the beginning, or leave it empty",
    write: "Write",
    stop: "Stop",
    one_token: "One token",
    temperature: "Temperature",
    temperature_hint: "Low: safe and alike. High: bold and odd. 0: always the likeliest token.",
    more_settings: "More settings",
    all: "all",
    top_k: "Top-k",
    top_k_hint: "Draw from the k likeliest tokens only.",
    top_p: "Top-p",
    top_p_hint: "Draw from the likeliest tokens whose probabilities sum to p.",
    length: "Longest text",
    length_hint: "In tokens.",
    forget: "Forget early",
    forget_hint: (context) =>
      `The model sees ${context} tokens at a time. In a longer text it reads the last ${context} again for each new ` +
      "token, which is slow. With this box ticked it goes on from the latter half of them instead.",
    expected: "expected",
    surprising: "surprising",
    legend_hint: "Point at a token, or tap it.",
    loading: "Unpacking the model …",
    broken: (reason) => `This page cannot run here: ${reason}`,
    prompt_count: (tokens) => (tokens === "1" ? "1 token" : `${tokens} tokens`),
    prompt_cropped: (context) => `The model sees the last ${context} only.`,
    unknown: (character) => `The model does not know the character ${character}. It knows only those of its training.`,
    reading: (done, all) => `reading ${done} of ${all} tokens`,
    tokens: (count) => (count === 1 ? "1 token" : `${count} tokens`),
    speed: (speed) => `${speed} tokens/s`,
    ended: "the model ended it",
    too_long: "longest text reached",
    stopped: "stopped",
    copy: "Copy",
    copied: "Copied",
    go_on: "Go on",
    remove: "Remove",
    end_of_text: "end of text",
    of_parts: (part, parts) => `part ${part} of ${parts}`,
    begins: (first, last) => `begins one of ${first} … ${last}`,
    rank: (rank, all) => `rank ${rank} of ${all}`,
    chosen: "chosen by you",
    card_hint: "Choose another token to go on with it.",
    how_title: "How it works",
    how: (vocabulary) => [
      `The text is cut into tokens: words, parts of words, or characters. The model knows ${vocabulary}.`,
      "It reads the tokens so far, and gives each one that it knows a probability to come next.",
      "One of them is drawn and appended. Then the model predicts again, until the text ends.",
      "The colour of a token shows its probability when it was drawn. The stronger the colour, the more surprising.",
    ],
    about_title: "This model",
    about: {
      parameters: "Parameters",
      vocabulary: "Vocabulary",
      context: "Context",
      shape: "Blocks",
      heads: "Attention heads",
      positions: "Positions",
      norm: "Normalisation",
      mlp: "Feed-forward",
      weights: "Numbers in this file",
    },
    vocabulary: (count, name) => `${count} tokens (${name})`,
    shape: (blocks, width) => `${blocks}, ${width} wide`,
    heads: (queries, shared) => (queries === shared ? `${queries}` : `${queries}, ${shared} for keys and values`),
    code_title: "The program",
    code_hint: "This is all the code that runs here. Begin with model.js.",
  },
  zh: {
    other_language: "English",
    subtitle: (parameters) =>
      `一个有 ${parameters}个参数的语言模型，就在这个网页里运行：你输入的内容不会离开这台设备，也不需要网络。`,
    prompt: "文本的开头",
    prompt_hint: "输入开头，也可以留空",
    write: "续写",
    stop: "停止",
    one_token: "写一个词元",
    temperature: "温度",
    temperature_hint: "低：稳妥而相似；高：大胆而多变；0：总是取最可能的词元。",
    more_settings: "更多设置",
    all: "全部",
    top_k: "Top-k",
    top_k_hint: "只从最可能的 k 个词元中抽取。",
    top_p: "Top-p",
    top_p_hint: "只从概率之和达到 p 的最可能的词元中抽取。",
    length: "最大长度",
    length_hint: "以词元计。",
    forget: "提前遗忘",
    forget_hint: (context) =>
      `模型一次能看到 ${context} 个词元。文本更长时，每写一个新词元都要重读最后 ${context} 个，速度很慢。` +
      "勾选后改为只从其中的后一半继续。",
    expected: "意料之中",
    surprising: "出人意料",
    legend_hint: "指向或点按一个词元。",
    loading: "正在展开模型……",
    broken: (reason) => `这个网页在此无法运行：${reason}`,
    prompt_count: (tokens) => `${tokens} 个词元`,
    prompt_cropped: (context) => `模型只能看到最后 ${context} 个。`,
    unknown: (character) => `模型不认识字符 ${character}，它只认识训练文本中的字符。`,
    reading: (done, all) => `正在读 ${all} 个词元中的第 ${done} 个`,
    tokens: (count) => `${count} 个词元`,
    speed: (speed) => `每秒 ${speed} 个`,
    ended: "模型写完了",
    too_long: "达到最大长度",
    stopped: "已停止",
    copy: "复制",
    copied: "已复制",
    go_on: "继续",
    remove: "删除",
    end_of_text: "文本结束",
    of_parts: (part, parts) => `第 ${part} 部分，共 ${parts} 部分`,
    begins: (first, last) => `${first} … ${last} 之一的开头`,
    rank: (rank, all) => `在 ${all} 个词元中排第 ${rank}`,
    chosen: "由你选定",
    card_hint: "选另一个词元，就从它继续写。",
    how_title: "它是怎样工作的",
    how: (vocabulary) => [
      `文本被切成词元：词、词的一部分或单个字。这个模型认识 ${vocabulary} 个词元。`,
      "模型读入已有的词元，为它认识的每个词元给出“接下来是它”的概率。",
      "按概率抽取一个，接在后面；然后再预测，直到文本结束。",
      "词元的颜色表示它被抽中时的概率：颜色越深，越出人意料。",
    ],
    about_title: "这个模型",
    about: {
      parameters: "参数",
      vocabulary: "词表",
      context: "上下文",
      shape: "块数",
      heads: "注意力头",
      positions: "位置",
      norm: "归一化",
      mlp: "前馈",
      weights: "文件中的数值",
    },
    vocabulary: (count, name) => `${count} 个词元（${name}）`,
    shape: (blocks, width) => `${blocks} 块，宽 ${width}`,
    heads: (queries, shared) => (queries === shared ? `${queries}` : `${queries}，其中键和值 ${shared} 组`),
    code_title: "程序",
    code_hint: "这里运行的全部代码都在下面，可以从 model.js 读起。",
  },
};

let language = navigator.language.startsWith("zh") ? "zh" : "en";

/** Return what the page says under a name, in the language of the reader. */
function word(name, ...values) {
  const said = WORDS[language][name];
  return typeof said === "function" ? said(...values) : said;
}

/** Return a number as the reader writes it. */
function number(value, options = {}) {
  return new Intl.NumberFormat(language, options).format(value);
}

/** Return a probability in percent, with two digits at least. */
function percent(probability) {
  return number(probability, { style: "percent", maximumSignificantDigits: probability < 0.1 ? 2 : 3 });
}
