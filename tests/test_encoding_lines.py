"""What fit.py and prepare.py print about encodings; a run that is resumed with its text packed."""

import gzip
from pathlib import Path

from conftest import Fit, Result

from lit_gpt.cli.describe_data import encoding_lines

FLAGS = ["--trainer.max_steps", 1, "--data.columns", "text", "--data.batch_size", 2]


def file_report(encoding: str, sure: bool = True, **others: object) -> dict[str, object]:
    return {"name": f"{encoding}.csv", "encoding": encoding, "sure": sure, "runner_up": "", "examples": [], **others}


def test_encoding_is_printed_unless_it_is_surely_utf8() -> None:
    files = [file_report(name) for name in ("utf-8", "UTF8", "utf_8", "utf-8-sig", "utf-16", "cp1252")]
    assert encoding_lines(files) == ["encoding    utf-16: utf-16.csv", "encoding    cp1252: cp1252.csv"]
    assert encoding_lines([file_report("utf-8", sure=False)])[0] == "encoding    utf-8, a guess: utf-8.csv"


def test_guess_is_printed_with_two_lines_and_the_flag_that_changes_it() -> None:
    guess = file_report("cp1252", sure=False, runner_up="mac-roman", examples=["1,so don’t", "2,£4.50"])
    assert encoding_lines([guess]) == [
        "encoding    cp1252, a guess: cp1252.csv",
        "            1,so don’t",
        "            2,£4.50",
        "            if this is misread, give --data.encoding mac-roman, or the right one",
    ]


def test_of_many_files_the_guesses_come_first_and_the_rest_is_counted() -> None:
    files = [file_report("gb18030") for _ in range(40)] + [file_report("cp1250", sure=False) for _ in range(5)]
    lines = encoding_lines(files)
    assert [line for line in lines if line.startswith("encoding")] == ["encoding    cp1250, a guess: cp1250.csv"] * 3
    assert lines[-1] == "            and 42 more: 2 cp1250, 40 gb18030; 2 of them are guesses"


def write_table(path: Path, sign: str) -> None:
    rows = "".join(f"a plain row of text with the number {number}\n" for number in range(60))
    path.write_bytes(f"text\n{rows}it {sign} so\n".encode("cp1252"))


def test_fit_prints_a_guessed_encoding(fit: Fit, folder: Path) -> None:
    write_table(folder / "t.csv", "isn’t")
    ended = fit(*FLAGS, "--data.files", "t.csv")
    assert ended.status == 0, ended.err
    assert "encoding    cp1252, a guess: t.csv it isn’t so if this is misread" in ended.out
    ended = fit(*FLAGS, "--data.files", "t.csv", "--data.encoding", "mac-roman")
    assert "encoding    mac-roman: t.csv\n" in ended.out
    (folder / "u.csv").write_text("text\n" + "a row with é\n" * 60, encoding="utf-8")
    assert "encoding" not in fit(*FLAGS, "--data.files", "u.csv").out


def test_run_resumes_with_its_text_packed_and_not_with_another_text(fit: Fit, folder: Path) -> None:
    def train(file: str, max_steps: int, *flags: object) -> Result:
        return fit(*FLAGS, "--data.files", file, "--trainer.max_steps", max_steps, "--name", "run", *flags)

    write_table(folder / "t.csv", "isn’t")
    (folder / "t.csv.gz").write_bytes(gzip.compress((folder / "t.csv").read_bytes()))
    write_table(folder / "other.csv", "is")
    assert train("t.csv", 1).status == 0
    resumed = train("t.csv.gz", 2, "--ckpt_path", "last")
    assert resumed.status == 0, resumed.err
    assert "step 1" in resumed.out
    refused = train("other.csv", 3, "--ckpt_path", "last")
    assert refused.status == 2
    assert "was trained on other data" in refused.err
