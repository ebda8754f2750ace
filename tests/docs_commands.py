r"""Run the commands of the documentation, and note in docs/commands.json which of them ran.

    python tests/docs_commands.py                    # all pages
    python tests/docs_commands.py docs/data.md       # some pages; the notes on the others stay
    python tests/docs_commands.py --full README.md   # with as many steps as written

Run it for a page whose commands have changed; `tests/test_docs.py` fails until then. The pages are README*.md and
docs/**/*.md. Each is one session in a new folder with links to the files of the project, in which the virtual
environment is active. The folder also has poems.csv (columns title, author, text) and tinyshakespeare.txt, both small
and made up.

Every line of a block ```bash is a command; one that ends in a backslash continues. Comments are left out. Variables,
`export` and `cd` hold for the rest of the page. A block with a here-document (<<) is one command. Blocks ```python with
no block ```bash between them are one program.

Commands of fit.py, generate.py and bench.py run with a few steps, because all pages would take hours otherwise. A
comment before a block, which the reader of the page does not see, says what is different:

    <!-- not run: needs two GPUs -->         the block is not run, for this reason
    <!-- before: cp poems.csv songs.csv -->  a command that prepares the block; it is not noted
    <!-- full -->                            the block runs as written

A block may have several comments, one a line. What reads from the terminal finds it closed. `tensorboard` is ended once
it has said where it listens. Blocks ```powershell are for Windows and are not run; their flags are checked.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTES = ROOT / "docs" / "commands.json"
TIMEOUT = 1800  # seconds, of one command

# What is added to the commands of a script. A run that is continued takes more steps than it had.
FEW_STEPS = {
    "fit.py": "--trainer.max_steps 4 --data.eval_windows 2 --generate.max_new_tokens 4",
    "fit.py resumed": "--trainer.max_steps 8 --data.eval_windows 2 --generate.max_new_tokens 4",
    "generate.py": "--max_new_tokens 8",
    "bench.py": "--turns 1 --steps 1 --warm_up 1",
}

BLOCK = re.compile(
    r"(?P<marks>(?:^ *<!--[^\n]*-->\n+)*)^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```", re.M | re.S
)


@dataclass
class Block:
    """A block of code of a page.

    Attributes:
        language: The word after the three backticks.
        text: What is between them.
        not_run: The reason why it is not run, or "".
        before: Commands that prepare it.
        full: Whether it runs as written.
    """

    language: str
    text: str
    not_run: str = ""
    before: list[str] = field(default_factory=list)
    full: bool = False

    def commands(self) -> list[str]:
        """Return the commands of a block of shell commands; of a Python program its digest."""
        if self.language == "python":
            return [f"python program {hashlib.sha256(self.text.encode()).hexdigest()[:12]}"]
        if "<<" in self.text:
            return [self.text.strip()]
        lines = re.sub(r" *[\\`]\n\s*", " ", self.text).splitlines()
        return list(filter(None, (re.sub(r"(^|\s+)#\s.*", "", line).strip() for line in lines)))


def pages() -> list[Path]:
    """Return the pages of the documentation."""
    return sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])


def read_blocks(page: Path) -> list[Block]:
    """Return the blocks of code of a page, in order.

    Raises:
        ValueError: A comment before a block is none of those above.
    """
    blocks = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        block = Block(match["language"], re.sub(rf"^{match['indent']}", "", match["text"], flags=re.M))
        for mark in re.findall(r"<!-- *(.*?) *-->", match["marks"]):
            kind, _, value = mark.partition(": ")
            if kind == "not run" and value:
                block.not_run = value
            elif kind == "before" and value:
                block.before.append(value)
            elif kind == "full":
                block.full = True
            elif kind in ("not run", "before"):
                raise ValueError(f"{page.name}: <!-- {mark} --> does not say what")
        blocks.append(block)
    return blocks


def noted_commands(page: Path) -> dict[str, str]:
    """Return all commands that docs/commands.json must have of a page, with the reason why one is not run, or ""."""
    found: dict[str, str] = {}
    for block in read_blocks(page):
        if block.language in ("bash", "python"):
            for command in block.commands():
                found[command] = found.get(command, "x") and block.not_run
    return found


def few_steps(command: str) -> str:
    """Return a command with the flags that make it short."""
    script = re.search(r"\bscripts/(\w+\.py)\b", command)
    if script is None:
        return command
    name = script[1]
    if name == "fit.py" and re.search(r"\bfit\.py (validate|test)\b|--help", command):
        return command
    if name == "fit.py" and "--ckpt_path" in command:
        name = "fit.py resumed"
    if "--plan" in command.split():  # trains nothing
        return command
    start, *rest = re.split(r" (?=[|>&;])", command, maxsplit=1)
    start = re.sub(r" --budget \S+", "", start)  # which does not go together with a number of steps
    return " ".join(filter(None, [start, FEW_STEPS.get(name, ""), *rest]))


def make_folder(folder: Path) -> None:
    """Fill the folder in which the commands of a page run."""
    for path in ROOT.iterdir():
        if path.name not in ("logs", "data", ".git", ".venv"):
            (folder / path.name).symlink_to(path)
    draw = random.Random(0)
    characters = "春江花月夜海上明潮生滟随波千万里何处无流宛转绕芳甸照林皆似霰空里霜不觉飞汀白沙看见天一色纤尘皎中孤轮"
    rows = ["title,author,text", '静夜思,李白,"床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"']
    for number in range(400):
        lines = ["".join(draw.choices(characters, k=5)) for _ in range(4)]
        rows.append(
            f'无题{number},{draw.choice(["李白", "杜甫", "王维"])},"{"，".join(lines[:2])}。\n{"，".join(lines[2:])}。"'
        )
    (folder / "poems.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    words = ["the", "king", "my", "lord", "and", "what", "shall", "I", "speak", "of", "thy", "good", "night", "to"]
    speeches = (f"{draw.choice(['ROMEO', 'JULIET'])}:\n{' '.join(draw.choices(words, k=12))}.\n" for _ in range(1000))
    (folder / "tinyshakespeare.txt").write_text("\n".join(speeches), encoding="utf-8")


class Session:
    """Runs the commands of a page, one after another.

    Args:
        folder: The working folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: list[str] = []  # lines that hold for the following commands
        binaries = str(Path(sys.executable).parent)
        self.environment = {
            **os.environ,
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }

    def run(self, command: str) -> str:
        """Run a command; return "ok", or "failed: " and the last line that it printed."""
        script = "\n".join(["set -e", *self.state, command])
        if re.match(r"(cd|export|[A-Z_]+=\S*$|[A-Z_]+=(\"[^\"]*\"|'[^']*')$)", command):
            self.state.append(command)
        if command.startswith("tensorboard "):
            return self.start_server(script)
        return self.finish(["bash", "-c", script])

    def run_program(self, program: str) -> str:
        """Run a Python program; return as `run` does."""
        return self.finish([sys.executable, "-c", program])

    def finish(self, arguments: list[str]) -> str:
        """Run a process to its end; return as `run` does."""
        try:
            ran = subprocess.run(
                arguments,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return f"failed: not finished after {TIMEOUT} seconds"
        lines = ran.stdout.strip().splitlines() or [f"status {ran.returncode}"]
        if ran.returncode:
            print(*lines[-15:], sep="\n", file=sys.stderr)
        return f"failed: {lines[-1]}" if ran.returncode else "ok"

    def start_server(self, script: str) -> str:
        """Run a server until it prints its address; return as `run` does."""
        with tempfile.TemporaryFile("w+") as output:
            server = subprocess.Popen(
                ["bash", "-c", script.replace("\ntensorboard", "\nexec tensorboard")],
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            outcome = "failed: no address after 120 seconds"
            for _ in range(120):
                time.sleep(1)
                output.seek(0)
                if "http://" in output.read():
                    outcome = "ok"
                    break
                if server.poll() is not None:
                    outcome = f"failed: status {server.returncode}"
                    break
            server.terminate()
            server.wait()
        return outcome


def run_page(page: Path, full: bool) -> Iterator[tuple[str, str]]:
    """Run the commands of a page; yield each with its outcome.

    Args:
        page: The page.
        full: Whether all blocks run as written.
    """
    blocks = [block for block in read_blocks(page) if block.language in ("bash", "python")]
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder))
        session = Session(Path(folder))
        for language, group in itertools.groupby(blocks, key=lambda block: block.language):
            if language == "bash":
                for block in group:
                    yield from run_block(session, block, full)
            else:
                yield from run_program(session, list(group))


def run_block(session: Session, block: Block, full: bool) -> Iterator[tuple[str, str]]:
    """Run a block of shell commands, like `run_page`."""
    if block.not_run:
        yield from ((command, f"not run: {block.not_run}") for command in block.commands())
        return
    yield from prepare(session, block)
    for command in block.commands():
        short = command if full or block.full else few_steps(command)
        outcome = session.run(short)
        yield command, "ok with few steps" if outcome == "ok" and short != command else outcome


def run_program(session: Session, blocks: list[Block]) -> Iterator[tuple[str, str]]:
    """Run the blocks of a Python program, like `run_page`."""
    parts = [block for block in blocks if not block.not_run]
    for block in parts:
        yield from prepare(session, block)
    outcome = session.run_program("".join(block.text for block in parts))
    for block in blocks:
        yield block.commands()[0], f"not run: {block.not_run}" if block.not_run else outcome


def prepare(session: Session, block: Block) -> Iterator[tuple[str, str]]:
    """Run the commands that prepare a block; yield those that fail."""
    for command in block.before:
        if (outcome := session.run(command)) != "ok":
            yield f"before: {command}", outcome


def main() -> int:
    """Run the command line; return 1 if a command failed, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="pages, by default all")
    parser.add_argument("--full", action="store_true", help="run the commands with as many steps as written")
    options = parser.parse_args()
    names = {page.relative_to(ROOT).as_posix() for page in pages()}
    chosen = [page.resolve() for page in options.pages] or pages()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "tensorboard"))
    failed = 0
    for page in chosen:
        name = page.relative_to(ROOT).as_posix()
        assert name in names, f"{name} is not a page: give README.md or a file of docs/"
        outcomes: dict[str, str] = {}
        for command, outcome in run_page(page, options.full):
            print(f"{name}: {command}\n    {outcome}", flush=True)
            failed += outcome.startswith("failed")
            before = outcomes.get(command, "not run")
            if before.startswith("not run") or outcome.startswith("failed"):
                outcomes[command] = outcome
        notes = json.loads(NOTES.read_text(encoding="utf-8")) if NOTES.exists() else {}
        python = ".".join(map(str, sys.version_info[:3]))
        notes[name] = {"date": str(date.today()), "versions": f"Python {python}, {versions}", "commands": outcomes}
        notes = {name: notes[name] for name in sorted(notes) if name in names and notes[name]["commands"]}
        NOTES.write_text(json.dumps(notes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{failed} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
