"""Run a GGUF file in llama.cpp, by the package xllamacpp, and compare it with a model here."""

import http.client
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from lit_gpt.convert.parity import Parity, ParityError, compare_encodings, compare_greedy, prompts_of, sample_strings
from lit_gpt.library_tokenizer import LibraryTokenizer
from lit_gpt.model import GPT
from lit_gpt.tokenizer_base import Tokenizer

# llama.cpp ends its whole process when an assertion fails, so it gets one of its own. It ends when its input is closed.
# Keys and values are float32 as here, instead of float16.
PROGRAM = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx = sys.argv[1], int(sys.argv[2])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[3])
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.port, params.n_parallel, params.n_gpu_layers = 0, 1, 0
params.warmup = params.ui = params.fit_params = False
params.verbosity = 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""
TIMEOUT_S = 600  # of one request
TOP = 5  # tokens whose log-probabilities are compared at each step


class LlamaError(Exception):
    """llama.cpp does not load a file, or reports an error; the message is its own."""


class LlamaServer:
    """llama.cpp with one model, in a process of its own, as a context manager.

    Example:
        >>> with LlamaServer(Path("poems.gguf"), context_length=256) as server:
        ...     server.encode(["静夜思", "春晓"], separator=tokenizer.end_of_text)

    Args:
        path: The GGUF file.
        context_length: How many tokens it holds.
        threads: How many it computes with. Several wait for each other in a loop, which takes ten times as long where
            another process needs a core.

    Raises:
        LlamaError: llama.cpp does not load the file.
    """

    def __init__(self, path: Path, context_length: int, threads: int = 1) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (until `close`)
        command = [sys.executable, "-c", PROGRAM, str(path), str(context_length), str(threads)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True)
        assert self._process.stdout is not None
        lines = map(str.strip, self._process.stdout)  # until it ends, where a debugger may say something
        address = next((line for line in lines if line.startswith("http://")), "")
        self._connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=TIMEOUT_S)
        if not address:
            error = self._last_error()
            self.close()
            raise LlamaError(error)

    def __enter__(self) -> "LlamaServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        return next((line.strip() for line in lines if " E " in line or "error" in line.lower()), "no reason given")

    def post(self, address: str, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request to the server and return its answer.

        Raises:
            LlamaError: The server reports an error, or has ended.
        """
        headers = {"Content-Type": "application/json"}
        try:
            self._connection.request("POST", address, json.dumps(request), headers)
            response = self._connection.getresponse()
            answer: dict[str, Any] = json.loads(response.read())
        except (OSError, http.client.HTTPException) as error:
            raise LlamaError(f"its process does not answer: {error or type(error).__name__}") from None
        self._connection.close()  # the server ends it soon anyway; the next request opens a new one
        if response.status != http.client.OK:
            raise LlamaError(str(answer.get("error", answer))[:200])
        return answer

    def encode(self, texts: list[str], separator: int) -> list[list[int]]:
        """Return the ids of texts. One request holds all of them, with the id `separator` between them."""
        content = [part for text in texts for part in (text, separator)]
        answer = self.post("/tokenize", {"content": content, "add_special": False, "parse_special": False})
        rows: list[list[int]] = [[]]
        for token in answer["tokens"]:
            if token == separator:
                rows.append([])
            else:
                rows[-1].append(token)
        return rows[:-1]

    def generate(self, prompt: list[int], count: int, tokenizer: Tokenizer) -> "Continuation":
        """Return the likeliest continuation of a prompt; it goes on after the end of the text.

        Args:
            prompt: Token ids.
            count: How many tokens to generate.
            tokenizer: The tokenizer of the model.
        """
        tokens: list[int] = []
        logprobs: dict[int, dict[int, float]] = {}
        while len(tokens) < count:
            request = {"prompt": prompt + tokens, "n_predict": count - len(tokens), "temperature": 0, "n_probs": TOP}
            answer = self.post("/completion", {**request, "return_tokens": True, "cache_prompt": False})
            # The server leaves out the probabilities of tokens after which the text ends inside a character.
            text, steps = b"", []
            for step, token in enumerate(answer["tokens"], start=len(tokens)):
                text += tokenizer.token_bytes(token)
                if not _ends_inside_character(text):
                    steps.append(step)
            for step, entry in zip(steps, answer.get("completion_probabilities", []), strict=True):
                logprobs[step] = {top["id"]: top["logprob"] for top in entry["top_logprobs"]}
            tokens += answer["tokens"]
        return Continuation(tokens, logprobs)


def _ends_inside_character(text: bytes) -> bool:
    """Return whether llama.cpp's server waits for more bytes: a first byte of UTF-8 stands too close to the end."""
    first_bytes = ((range(0xC0, 0xE0), 2), (range(0xE0, 0xF0), 3), (range(0xF0, 0xF8), 4))
    last = text[: -4 - 1 : -1]
    return any(byte in firsts and i < length for i, byte in enumerate(last, 1) for firsts, length in first_bytes)


class Continuation(NamedTuple):
    """What llama.cpp has generated.

    Attributes:
        tokens: The ids.
        logprobs: The log-probability in nats of each of the likeliest tokens, by step. Some steps are missing.
    """

    tokens: list[int]
    logprobs: dict[int, dict[int, float]]


def compare_with_llama_cpp(
    path: Path, model: GPT, tokenizer: Tokenizer, mode: str, texts: list[str], tolerance: float
) -> Parity:
    """Run a GGUF file in llama.cpp and compare it with the model that it holds.

    Compared are the ids of strings, the likeliest continuations of the beginnings of texts, and at each step of these
    the log-probabilities of the likeliest tokens.

    Args:
        path: The file.
        model: The model, in evaluation mode, on the CPU.
        tokenizer: Its tokenizer.
        mode: The `data.mode` of its training.
        texts: Texts of the kind that the model was trained on.
        tolerance: The largest difference of two log-probabilities that is allowed.

    Raises:
        ParityError: llama.cpp does not load the file, or computes something else.
    """
    strings = [string for string in sample_strings(tokenizer, texts) if _is_normal(tokenizer, string)]
    prompts = [prompt[: max(1, model.config.context_length // 2)] for prompt in prompts_of(tokenizer, texts, mode)]
    differences, count = [0.0], 0

    def continuation(prompt: list[int], length: int) -> list[int]:
        nonlocal count
        tokens, logprobs = server.generate(prompt, length, tokenizer)
        differences.append(_compare_logprobs(model, prompt, tokens, logprobs, tolerance))
        count += len(logprobs)
        return tokens

    try:
        with LlamaServer(path, model.config.context_length) as server:
            encoded = iter(server.encode(strings, tokenizer.end_of_text))
            num_strings = compare_encodings(tokenizer.encode, lambda string: next(encoded), strings)
            greedy = compare_greedy(model, prompts, continuation, tolerance)
    except LlamaError as error:
        raise ParityError(f"llama.cpp cannot run the exported model ({error}): please report it") from None
    return Parity(max(differences), count, num_strings, greedy)


def _is_normal(tokenizer: Tokenizer, string: str) -> bool:
    """Return whether a tokenizer leaves a string as it is. Qwen's composes characters (NFC), and llama.cpp does not."""
    normalizer = tokenizer.library.normalizer if isinstance(tokenizer, LibraryTokenizer) else None
    return normalizer is None or normalizer.normalize_str(string) == string


@torch.inference_mode()
def _compare_logprobs(
    model: GPT, prompt: list[int], tokens: list[int], logprobs: dict[int, dict[int, float]], tolerance: float
) -> float:
    """Return the largest difference between the log-probabilities of llama.cpp and those of the model.

    Args:
        model: The model.
        prompt: T ids.
        tokens: Their continuation in llama.cpp.
        logprobs: As in `Continuation`.
        tolerance: The largest difference that is allowed.

    Raises:
        ParityError: Two differ by more, or one is not a number.
    """
    hidden = model.hidden(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]  # (number of tokens, D)
    expected = model.head(hidden).float().log_softmax(dim=-1)  # (number of tokens, V)
    largest = 0.0
    for step, entry in logprobs.items():
        for token, logprob in entry.items():
            difference = abs(logprob - expected[step, token].item())
            if not difference <= tolerance:
                raise ParityError(
                    f"in llama.cpp the log-probability of id {token} after {len(prompt) + step} tokens is "
                    f"{logprob:.4f}, here {expected[step, token]:.4f}: please report it with the checkpoint's settings"
                )
            largest = max(largest, difference)
    return largest
