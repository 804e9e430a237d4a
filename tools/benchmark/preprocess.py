"""Speed of preprocess_instruct_data.py and preprocess_data.py against SentencePiece's own threaded `encode`.

Each script and SentencePiece, on the same texts, are timed as whole processes, start, imports and reading included, in
turns, several rounds. Beside the seconds on the clock stand those of the processor, children included: where others use
the machine too, those say more.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.config import option, parse_command
from tools.benchmark.report import ReportOptions, Table, report
from tools.benchmark.timing import Timing, timed

SYSTEM, QUESTION, ANSWER = KEYS = ("system_prompt", "question", "response")
BASELINE = """
import sys, time, orjson, sentencepiece
path, model, threads, *keys = sys.argv[1:]
rows = [orjson.loads(line) for line in open(path, "rb")]
texts = [row[key] for row in rows for key in keys if row[key] is not None]
processor = sentencepiece.SentencePieceProcessor(model_file=model)
began = time.perf_counter()
processor.encode(texts, num_threads=int(threads))
print(time.perf_counter() - began)
"""
INSTRUCTION_FLAGS = [
    *(f"--system_key={SYSTEM}", f"--question_key={QUESTION}", f"--answer_key={ANSWER}"),
    "--vocab_extra_ids_list=<|im_start|>,<|im_end|>",
]


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Benchmark"""

    input: str = option(help="A jsonl file with the keys system_prompt, question and response.")
    vocab_file: str = option(help="A SentencePiece model.")
    repeats: int = option(10, "How often the instruction rows are repeated; texts, the responses, five times as often.")
    workers: int = option(2, "Worker processes, and threads of SentencePiece.")
    chunk_size: int = option(32, "Lines that a worker takes at a time.")
    rounds: int = option(5, "Rounds; in every other one ours comes first.")


@dataclass(frozen=True)
class Case:
    """One of our scripts, and what it reads."""

    script: str
    path: Path
    keys: Sequence[str]
    flags: Sequence[str]

    def ours(self, options: BenchmarkOptions) -> list[str]:
        """The script's command."""
        files = [f"--input={self.path}", f"--output_prefix={self.path}.out"]
        tokenizer = ["--tokenizer_type=SentencePieceTokenizer", f"--vocab_file={Path(options.vocab_file).resolve()}"]
        pace = [f"--workers={options.workers}", f"--chunk_size={options.chunk_size}", "--log_interval=10000000"]
        return [sys.executable, self.script, *files, *tokenizer, *pace, *self.flags]

    def baseline(self, options: BenchmarkOptions) -> list[str]:
        """SentencePiece's command."""
        arguments = [str(self.path), str(Path(options.vocab_file).resolve()), str(options.workers)]
        return [sys.executable, "-c", BASELINE, *arguments, *self.keys]


def cases(options: BenchmarkOptions, folder: Path) -> list[Case]:
    """Both scripts, with their input in `folder`."""
    rows, texts = folder / "rows.jsonl", folder / "texts.jsonl"
    content = Path(options.input).read_bytes()
    rows.write_bytes(content * options.repeats)
    responses = (json.dumps({"text": json.loads(line)[ANSWER]}) + "\n" for line in content.splitlines())
    texts.write_bytes("".join(responses).encode() * options.repeats * 5)
    return [
        Case("instruct/preprocess_instruct_data.py", rows, KEYS, INSTRUCTION_FLAGS),
        Case("tools/preprocess_data.py", texts, ("text",), ["--append_eod"]),
    ]


def compare(case: Case, options: BenchmarkOptions) -> Table:
    """Time both sides in turns; the ratios of their speeds."""
    ratios: dict[str, list[float]] = {"whole process": [], "processor time": [], "encode call alone": []}
    for number in range(options.rounds):
        commands = [case.baseline(options), case.ours(options)]
        order = 1 if number % 2 else -1
        theirs, ours = [timed(command) for command in commands[::order]][::order]
        ratios["whole process"].append(theirs.clock / ours.clock)
        ratios["processor time"].append(theirs.processor / ours.processor)
        ratios["encode call alone"].append(float(theirs.output) / ours.clock)
        told = f"sentencepiece {told_of(theirs)}, encode call {float(theirs.output):.2f} s; ours {told_of(ours)}"
        print(f"{case.script} round {number + 1}: {told}", file=sys.stderr, flush=True)
    rows = [
        {"ratio of speeds": name, "median": statistics.median(values), "least": min(values)}
        for name, values in ratios.items()
    ]
    title = f"{case.script}, {case.path.stat().st_size / 1e6:.1f} MB"
    return Table(title, {"ratio of speeds": "", "median": ".2f", "least": ".2f"}, rows)


def told_of(timing: Timing) -> str:
    """A timing for a reader."""
    return f"{timing.clock:.2f} s ({timing.processor:.2f} s of processors)"


def main(argv: list[str]) -> None:
    """Run the command."""
    description = (__doc__ or "").splitlines()[0]
    options, output = parse_command(argv, BenchmarkOptions, ReportOptions, prog="preprocess", description=description)
    with tempfile.TemporaryDirectory() as folder:
        tables = [compare(case, options) for case in cases(options, Path(folder))]
    report("preprocess", options, tables, output)
