"""Speed of preprocess_instruct_data.py against SentencePiece's own threaded `encode` on the same texts.

Both are timed as whole processes, start, imports and reading included, in turns, several rounds.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from megatron.config import option, parse_command, run_entry

ROOT = Path(__file__).resolve().parents[2]
KEYS = ("system_prompt", "question", "response")
BASELINE = f"""
import sys, time, orjson, sentencepiece
path, model, threads = sys.argv[1:]
rows = [orjson.loads(line) for line in open(path, "rb")]
texts = [row[key] for row in rows for key in {KEYS} if row[key] is not None]
processor = sentencepiece.SentencePieceProcessor(model_file=model)
began = time.perf_counter()
processor.encode(texts, num_threads=int(threads))
print(time.perf_counter() - began)
"""


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Benchmark"""

    input: str = option(help="A jsonl file with the keys system_prompt, question and response.")
    vocab_file: str = option(help="A SentencePiece model.")
    repeats: int = option(10, "How often the file is repeated.")
    workers: int = option(2, "Worker processes, and threads of SentencePiece.")
    chunk_size: int = option(32, "Lines that a worker takes at a time.")
    rounds: int = option(5, "Rounds; the ratio is of the medians.")


def timed(command: list[str]) -> tuple[float, str]:
    """Seconds and output of a process."""
    began = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return time.perf_counter() - began, done.stdout


def commands(options: BenchmarkOptions, jsonl: Path) -> tuple[list[str], list[str]]:
    """The two competitors."""
    system, question, answer = KEYS
    ours = [sys.executable, "instruct/preprocess_instruct_data.py", f"--input={jsonl}", f"--output_prefix={jsonl}.out"]
    ours += ["--tokenizer_type=SentencePieceTokenizer", f"--vocab_file={Path(options.vocab_file).resolve()}"]
    ours += ["--vocab_extra_ids_list=<|im_start|>,<|im_end|>", f"--workers={options.workers}"]
    ours += [f"--chunk_size={options.chunk_size}", f"--system_key={system}", f"--question_key={question}"]
    ours += [f"--answer_key={answer}", "--log_interval=1000000"]
    baseline = [sys.executable, "-c", BASELINE, str(jsonl), str(Path(options.vocab_file).resolve())]
    return ours, [*baseline, str(options.workers)]


def main(argv: list[str]) -> None:
    """Run the command."""
    (options,) = parse_command(argv, BenchmarkOptions, prog="benchmark/preprocess.py", description=__doc__)
    ours_seconds, whole_seconds, call_seconds = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        jsonl = Path(folder) / "rows.jsonl"
        jsonl.write_bytes(Path(options.input).read_bytes() * options.repeats)
        ours, baseline = commands(options, jsonl)
        for _ in range(options.rounds):
            whole, output = timed(baseline)
            whole_seconds.append(whole)
            call_seconds.append(float(output))
            ours_seconds.append(timed(ours)[0])
            print(f"sentencepiece {whole:.2f} s (of which encode {float(output):.2f} s), ours {ours_seconds[-1]:.2f} s")
    middle = statistics.median(ours_seconds)
    print(f"ratio of speeds, whole process: {statistics.median(whole_seconds) / middle:.3f}")
    print(f"against the encode call alone:  {statistics.median(call_seconds) / middle:.3f}")


if __name__ == "__main__":
    sys.exit(run_entry(main, sys.argv[1:]))
