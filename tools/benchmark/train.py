"""Training speed beside transformers, trl and litgpt, and beside the matrix products alone, which are the floor.

All sides begin with the same weights and take the same rows in the same batches, with the loss of the answers' tokens.
Each runs as a process of its own, in turns; the first step of a process is not counted.
"""

import json
import re
import shlex
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron.config import DataConfig, TokenizerConfig, UsageError, option, parse_command
from megatron.data import Sample, build_splits
from megatron.tokenizer import build_tokenizer
from tools.benchmark.report import ReportOptions, Table, report
from tools.benchmark.timing import timed
from tools.benchmark.train_job import IGNORED, Job, Row, Size, Step

SMALL = Size(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_attention_heads_kv=2,
    ffn_hidden_size=128,
    seq_length=1024,
    micro_batch_size=1,
    global_batch_size=8,
)
SIZES = {
    "cpu": Size(
        num_layers=12,
        hidden_size=768,
        num_attention_heads=12,
        num_attention_heads_kv=4,
        ffn_hidden_size=2048,
        seq_length=1024,
        micro_batch_size=2,
        global_batch_size=32,
    ),
    "cuda": Size(
        num_layers=8,
        hidden_size=4096,
        num_attention_heads=32,
        num_attention_heads_kv=32,
        ffn_hidden_size=11008,
        seq_length=4096,
        micro_batch_size=1,
        global_batch_size=256,
    ),
}
"""Device -> a Llama of 125 million parameters, or layers of Llama 2 7B."""
PEERS = ("transformers", "trl", "litgpt")
MARKERS = ("<|im_start|>", "<|im_end|>")
KEYS = ("system", "question", "answer")
LINE = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+) .* lm loss: ([^ ]+) ")
FIRST_LOSSES_NEAR = 0.01
SEED = 1234


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Benchmark"""

    input: str = option(help="A jsonl file with the keys system_prompt, question and response.")
    vocab_file: str = option(help="A SentencePiece model.")
    device: str = option("cpu", "What to train on; it also says how large a model.", choices=tuple(SIZES))
    precisions: tuple[str, ...] = option(("bf16", "fp32"), "Of the products.", choices=("bf16", "fp32"), nargs="+")
    peers: tuple[str, ...] = option(PEERS, "Those to compare with.", choices=PEERS)
    rounds: int = option(3, "How often each side runs; the figures are of the median step.", within="[1, inf)")
    steps: int = option(3, "Steps of a run; the first is not counted.", within="[2, inf)")
    threads: int = option(2, "Of each process.", within="[1, inf)")
    peer_rows: int = option(8, "Rows that a peer computes at once.", within="[1, inf)")
    num_layers: int | None = option(None, "Another number of layers.", within="[1, inf)")
    finetune_flags: str = option("", "Further flags of finetune.py, in one word.")
    peak_tflops: float = option(989.0, "Of a GPU, for its utilization; an H100's by default.")
    quick: bool = option(False, "A tiny model, one round: whether everything runs.")


def prepare(options: TrainOptions, folder: Path) -> Job:
    """Token files, the rows of all steps, and the initial weights, in `folder`."""
    size = SMALL if options.quick else SIZES[options.device]
    if options.num_layers:
        size = Size(**asdict(size) | {"num_layers": options.num_layers})
    if size.global_batch_size % options.peer_rows:
        raise UsageError(f"--peer_rows {options.peer_rows} does not divide the {size.global_batch_size} rows of a step")
    vocab_file = str(Path(options.vocab_file).resolve())
    tokenizer = TokenizerConfig(
        tokenizer_type="SentencePieceTokenizer",
        vocab_file=vocab_file,
        vocab_extra_ids_list=",".join(MARKERS),
        new_tokens=False,
    )
    script = ["instruct/preprocess_instruct_data.py", f"--input={Path(options.input).resolve()}"]
    names = [f"--{key}_key={name}" for key, name in zip(KEYS, ("system_prompt", "question", "response"), strict=True)]
    timed([sys.executable, *script, f"--output_prefix={folder}/rows", *names, *tokenizer_flags(vocab_file)], threads=1)
    job = Job(
        model=f"{folder}/model",
        rows=f"{folder}/rows.jsonl",
        data=f"{folder}/rows",
        vocab_file=vocab_file,
        vocab_size=build_tokenizer(tokenizer).vocab_size,
        size=size,
        device=options.device,
        precision=options.precisions[0],
        steps=options.steps,
        peer_rows=options.peer_rows,
    )
    config = DataConfig(data_type="instruction", train_data_path=(job.data,), seq_length=size.seq_length)
    stream = build_splits(config, SEED).require("train").blended(SEED)
    samples = stream.read(stream.choose(0, size.global_batch_size * options.steps))
    rows = [peer_row(sample, size.seq_length) for sample in samples]
    Path(job.rows).write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    peer("weights", job, folder, options.threads)
    return job


def peer_row(sample: Sample, seq_length: int) -> Row:
    """What a peer is given of a sample: as many tokens as ours, with the same loss."""
    tokens = sample.tokens[: seq_length + 1].tolist()
    weights = sample.weights[:seq_length].tolist()
    labels = [token if weight else IGNORED for token, weight in zip(tokens[1:], weights, strict=True)]
    return Row(tokens=tokens, labels=[IGNORED, *labels])


def tokenizer_flags(vocab_file: str) -> list[str]:
    """Of all our scripts."""
    return [
        "--tokenizer_type=SentencePieceTokenizer",
        f"--vocab_file={vocab_file}",
        f"--vocab_extra_ids_list={','.join(MARKERS)}",
        "--no_new_tokens",
    ]


def peer(name: str, job: Job, folder: Path, threads: int) -> list[Step]:
    """Run another side."""
    path = folder / "job.json"
    job.write(path)
    command = [sys.executable, "-m", "tools.benchmark.train_peers", name, str(path)]
    output = timed(command, threads=threads).output
    return [Step(**step) for step in json.loads(output.splitlines()[-1])]


def ours(job: Job, flags: str, threads: int) -> list[Step]:
    """Run `finetune.py`, as a user does; its log tells how long each iteration took."""
    size = job.size
    command = [
        *(sys.executable, "finetune.py", "--model_name=llama2", f"--load={job.model}", "--use_checkpoint_args"),
        *("--data_type=instruction", "--variable_seq_lengths", f"--train_data_path={job.data}", f"--seed={SEED}"),
        *(f"--{name}={getattr(size, name)}" for name in ("seq_length", "micro_batch_size", "global_batch_size")),
        *(f"--lr={job.learning_rate}", "--lr_decay_style=constant", f"--adam_beta2={job.beta2}", "--weight_decay=0"),
        *(f"--train_iters={job.steps}", "--log_interval=1", "--eval_iters=0", *tokenizer_flags(job.vocab_file)),
        *(["--bf16"] if job.precision == "bf16" else []),
        *(["--use_flash_attn"] if job.device == "cuda" else []),
        *shlex.split(flags),
    ]
    output = timed(command, threads=threads).output
    return [Step(float(milliseconds) / 1000, float(loss)) for milliseconds, loss in LINE.findall(output)]


def compare(job: Job, options: TrainOptions, folder: Path) -> Table:
    """All sides in turns, at the job's precision."""
    names = ["ours", *options.peers, "floor"]
    runs: dict[str, list[list[Step]]] = {name: [] for name in names}
    for number in range(1 if options.quick else options.rounds):
        for name in names:
            is_ours = name == "ours"
            flags, threads = options.finetune_flags, options.threads
            steps = ours(job, flags, threads) if is_ours else peer(name, job, folder, threads)
            runs[name].append(steps)
            told = ", ".join(f"{step.seconds:.2f} s" for step in steps)
            print(f"{job.precision} round {number + 1} {name}: {told}", file=sys.stderr, flush=True)
    tokens = [sum(len(row.tokens) - 1 for row in rows) for rows in job.batches()]
    return table(job, {name: rates(tokens, found) for name, found in runs.items()}, runs, options)


def rates(tokens: list[int], runs: list[list[Step]]) -> list[float]:
    """Useful tokens a second of each step that counts."""
    return [count / step.seconds for steps in runs for count, step in list(zip(tokens, steps, strict=True))[1:]]


def table(job: Job, speeds: dict[str, list[float]], runs: dict[str, list[list[Step]]], options: TrainOptions) -> Table:
    """The figures of a precision.

    Raises:
        ValueError: a side's first loss is not that of ours, so it did other work.
    """
    middle = {name: statistics.median(found) for name, found in speeds.items()}
    best = max((middle[name] for name in options.peers), default=None)
    flops, rows = job.size.token_flops(job.vocab_size), list[dict[str, Any]]()
    for name, speed in middle.items():
        losses = [step.loss for step in runs[name][0]]
        first = runs["ours"][0][0].loss
        if name != "floor" and abs(losses[0] - first) > FIRST_LOSSES_NEAR * first:
            raise ValueError(f"the first loss of {name} is {losses[0]}, of ours {first}: they do not train the same")
        row = {
            "side": name,
            "tokens/s": speed,
            "slowest": min(speeds[name]),
            "fastest": max(speeds[name]),
            "of the floor": speed / middle["floor"],
            "of the best peer": speed / best if best and name != "floor" else None,
            "TFLOP/s": speed * flops / 1e12,
        }
        if job.device == "cuda":
            row["MFU"] = speed * flops / 1e12 / options.peak_tflops
        rows.append(row | ({} if name == "floor" else {"first loss": losses[0], "last loss": losses[-1]}))
    layouts = {"side": "", "tokens/s": ".0f", "slowest": ".0f", "fastest": ".0f", "of the floor": ".2f"}
    layouts |= {"of the best peer": ".2f", "TFLOP/s": ".2f"} | ({"MFU": ".1%"} if job.device == "cuda" else {})
    return Table(f"training, {job.precision}", layouts | {"first loss": ".4f", "last loss": ".4f"}, rows)


def main(argv: list[str]) -> None:
    """Prepare, run all sides in turns, report."""
    description = (__doc__ or "").splitlines()[0]
    options, output = parse_command(argv, TrainOptions, ReportOptions, prog="train", description=description)
    for name in options.peers:
        if not find_spec(name):
            raise UsageError(f"{name} is not installed: pip install .[bench], or leave it out of --peers")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        job = prepare(options, folder)
        tables = [compare(Job(**vars(job) | {"precision": name}), options, folder) for name in options.precisions]
    report("train", options, tables, output)
