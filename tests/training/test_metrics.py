"""Metrics of evaluations equal those of a `transformers` model on the same rows, on any layout."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import ARCHITECTURE, finetune, run, words
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from worlds import World

from megatron.config import TokenizerConfig
from megatron.config.log import METRICS as CHOICES
from megatron.data import IndexedDataset, IndexedWriter, MicroBatch
from megatron.tokenizer import build_tokenizer
from megatron.tokenizer.chat import Role, render_messages
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer
from megatron.training.metrics import LOSS, METRICS, Meter, build_meter, marker_lengths, own_words

LENGTH = 24
"""Some rows are longer and are cut off within the answer."""
TP2, PP2 = "--tensor_model_parallel_size 2", "--pipeline_model_parallel_size 2"
FREE, PADDED = "--packing padding_free", "--packing none"
LAYOUTS = [
    *((1, f"{FREE} --micro_batch_size 3"), (1, PADDED), (1, f"{FREE} --scalar_loss_mask 0.25"), (2, FREE), (2, PADDED)),
    *((2, f"{TP2} {FREE}"), (2, f"{TP2} --sequence_parallel {FREE}"), (2, f"{TP2} --sequence_parallel {PADDED}")),
    *((2, f"{PP2} {FREE}"), (2, f"{PP2} {PADDED}"), (4, f"{TP2} --sequence_parallel {PP2} {FREE}")),
    *((4, f"{TP2} {FREE} --scalar_loss_mask 0.25"), (2, f"--full_sharding {FREE}")),
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LABELS = [LOSS.label, *(metric.label for metric in METRICS.values())]


Rows = list[tuple[Tensor, Tensor]]
"""Tokens and roles of each."""


@pytest.fixture(scope="module")
def rows(course: str) -> Rows:
    """All of them."""
    prefix = course.split("--data_path ")[1].split()[0]
    text, role = IndexedDataset(f"{prefix}-text"), IndexedDataset(f"{prefix}-role")
    return [(torch.tensor(text[i].astype(np.int64)), torch.tensor(role[i].astype(np.int64))) for i in range(len(text))]


@pytest.fixture(scope="module")
def model(rows: Rows, small_tokenizer: SentencePieceTokenizer) -> LlamaForCausalLM:
    """A model of `transformers` that has learned something."""
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": small_tokenizer.vocab_size}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for ids, _ in rows[:60]:
        F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def trained(model: LlamaForCausalLM, course: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Flags of its evaluation: batches of 3, the last one smaller."""
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    course = course.replace("--micro_batch_size 2 --global_batch_size 8", "--micro_batch_size 1 --global_batch_size 3")
    flags = f"--eval_iters 3 --seq_length {LENGTH} --load {folder} --use_checkpoint_args --eval_only"
    return f"{course.removeprefix(ARCHITECTURE).replace('--eval_iters 2', '')} --model_name llama2 {flags}"


def figures(output: str, split: str) -> dict[str, float]:
    """What the log says of a split, by label."""
    (line,) = re.findall(rf"^ {split} loss at iteration 0 \|.*$", output, flags=re.M)
    return {label: float(value) for label, value in re.findall(r" ([a-z ]+) value: (\S+) \|", line)}


@pytest.fixture(scope="module")
def expected(
    model: LlamaForCausalLM, rows: Rows, small_tokenizer: SentencePieceTokenizer
) -> dict[float, dict[str, float]]:
    """Figures of the validation rows, for two weights of what is not the assistant's."""
    evaluated = rows[64:72]
    assert any(len(ids) > LENGTH + 1 for ids, _ in evaluated)
    return {weight: figures_of(model, evaluated, small_tokenizer, weight) for weight in (0.0, 0.25)}


@torch.no_grad()
def figures_of(
    model: LlamaForCausalLM, rows: Rows, tokenizer: SentencePieceTokenizer, other_weight: float
) -> dict[str, float]:
    """The definitions, a token at a time."""
    losses, weights, right, spoken = [], [], [], []
    for ids, roles in rows:
        logits = model(ids[None, :LENGTH]).logits[0, : len(ids) - 1]
        labels, is_spoken = ids[1 : LENGTH + 1], said(ids.tolist(), tokenizer)[1 : LENGTH + 1]
        losses += F.cross_entropy(logits, labels, reduction="none").tolist()
        weights += [1.0 if role == 2 else other_weight for role in roles[1 : LENGTH + 1].tolist()]
        right += (logits.argmax(-1) == labels).tolist()
        spoken += is_spoken
    supervised = [weight > 0 for weight in weights]
    instructed = [a and b for a, b in zip(supervised, spoken, strict=True)]
    loss = sum(a * b for a, b in zip(losses, weights, strict=True)) / sum(weights)
    return {
        "lm loss": loss,
        "ppl": math.exp(loss),
        "lm accuracy": sum(a and b for a, b in zip(right, supervised, strict=True)) / sum(supervised),
        "instruct accuracy": sum(a and b for a, b in zip(right, instructed, strict=True)) / sum(instructed),
        "count loss mask": sum(supervised) / len(rows),
        "count instruct mask": sum(instructed) / len(rows),
    }


def said(ids: list[int], tokenizer: SentencePieceTokenizer) -> list[bool]:
    """Which tokens of a row are what somebody says, found in the decoded text."""
    start, end = (tokenizer.special_tokens[marker] for marker in ("<|im_start|>", "<|im_end|>"))
    found, begin = [False] * len(ids), 0
    for place, token in enumerate(ids):
        if token == start:
            ends = range(place + 1, len(ids))
            begin = next(i for i in ends if tokenizer.decode(ids[place + 1 : i]) in ("question", "answer"))
        if token == end:
            found[begin:place] = [True] * (place - begin)
    return found


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_on_any_layout_equal_to_transformers(
    world: World, trained: str, expected: dict[float, dict[str, float]], size: int, layout: str
) -> None:
    found = figures(run(world, size, trained, layout, "--metrics all"), "validation")
    assert list(found) == LABELS
    assert found == pytest.approx(expected[0.25 if "scalar_loss_mask" in layout else 0.0], rel=1e-5)
    assert 0.1 < found["instruct accuracy"] < found["lm accuracy"] < 1


def test_only_what_is_asked_for_in_log_and_curves(trained: str, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    asked = "--metrics count_loss_mask accuracy count_loss_mask"
    code, output = finetune(words(trained, asked, f"--tensorboard_dir {tmp_path}"))
    assert code == 0, output
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    tags = set()
    for split in ("validation", "test"):
        found = figures(output, split)
        assert list(found) == ["lm loss", "count loss mask", "lm accuracy"]
        for label, value in found.items():
            tags |= {f"{label} {split}", f"{label} {split} vs samples"}
            assert events.Scalars(f"{label} {split}")[0].value == pytest.approx(value, rel=1e-6)
    assert set(events.Tags()["scalars"]) == tags


def test_an_evaluation_without_supervised_tokens_has_no_figures(trained: str, tmp_path: Path) -> None:
    flags = words(trained)
    prefix = flags[flags.index("--data_path") + 1]
    for kind, factor in (("text", 1), ("role", 0)):
        rows = IndexedDataset(f"{prefix}-{kind}")
        with IndexedWriter(f"{tmp_path / 'masked'}-{kind}", rows[0].dtype) as writer:
            for row in rows:
                writer.append(row * factor)
    flags[flags.index("--data_path") + 1] = str(tmp_path / "masked")
    code, output = finetune([*flags, "--metrics", "all"])
    assert code == 0, output
    assert output.count("no token has loss weight, so there is no loss to report") == 2
    assert "value:" not in output


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("bleu", f"--metrics: invalid choice: 'bleu' (choose from {', '.join(map(repr, CHOICES))})"),
        ("all", "--metrics all: instruct_accuracy and count_instruct_mask cannot be told, since the tokenizer has no "),
        ("accuracy instruct_accuracy", "<|im_end|>; add them by --vocab_extra_ids_list, or name other metrics"),
    ],
)
def test_what_cannot_be_told_is_refused(course: str, metrics: str, message: str) -> None:
    without_markers = course.replace("--vocab_extra_ids_list <|im_start|>,<|im_end|>", "")
    code, output = finetune(words(without_markers, "--train_iters 1 --metrics", metrics))
    assert code == 2
    assert message in output


def test_every_choice_has_a_row() -> None:
    assert [*METRICS, "all"] == list(CHOICES)


def micro_batch(*documents: list[int]) -> MicroBatch:
    """Documents of which every token is supervised."""
    ids = [np.array(document, np.int64) for document in documents]
    tokens, labels = (np.concatenate([one[cut] for one in ids]) for cut in (slice(None, -1), slice(1, None)))
    starts = np.cumsum([0, *(len(one) - 1 for one in ids)], dtype=np.int32)
    positions = np.concatenate([np.arange(len(one) - 1, dtype=np.int64) for one in ids])
    return MicroBatch(tokens, labels, np.ones(len(tokens), np.float32), positions, starts, 9, len(tokens))


@pytest.mark.parametrize(
    ("document", "own"),
    [
        ([1, 7, 8, 5, 5, 2, 9, 1, 7, 8, 5], [0, 0, 1, 1, 0, 0, 0, 0, 0, 1]),  # it begins with a marker
        ([5, 5, 2], [1, 0]),  # it ends with one
        ([5, 1, 7], [0, 0]),
        ([5, 1], [0]),
        ([1, 5], [0]),
    ],
)
def test_a_marker_reaches_to_the_end_of_its_header_or_document(document: list[int], own: list[int]) -> None:
    """1 opens a message, with two more tokens, 2 closes one, with one more."""
    lengths = {1: 3, 2: 2}
    words_of_it = own_words(micro_batch([5, 5], document, [5, 5, 5]), lengths)
    assert words_of_it.tolist() == [bool(x) for x in [1, *own, 1, 1]]


SENTENCEPIECE = {"tokenizer_type": "SentencePieceTokenizer", "vocab_file": "mistral-v1.model"}
FALCON = {"tokenizer_type": "HFTokenizer", "vocab_file": "falcon/tokenizer.json"}
GPT2 = {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "gpt2/encoder.json", "merge_file": "gpt2/vocab.bpe"}


@pytest.mark.parametrize("kind", [SENTENCEPIECE, FALCON, GPT2], ids=lambda kind: kind["tokenizer_type"])
def test_own_words_are_the_texts_of_the_messages(shared_data: Path, kind: dict[str, str]) -> None:
    folder = shared_data / "tokenizers"
    files = {name: value if name == "tokenizer_type" else str(folder / value) for name, value in kind.items()}
    tokenizer = build_tokenizer(TokenizerConfig(**files, vocab_extra_ids_list="<|im_start|>,<|im_end|>"))
    lengths = marker_lengths(tokenizer)
    with (shared_data / "data" / "cot_valid.jsonl").open(encoding="utf-8") as source:
        samples = [json.loads(line) for line in itertools.islice(source, 50)]
    for sample in samples:
        texts = [sample["question"], sample["response"]]
        rows = micro_batch(tokenizer.encode(render_messages(zip(list(Role)[1:], texts, strict=True))))
        changes = np.flatnonzero(np.diff(own_words(rows, lengths), prepend=False, append=False))
        found = [tokenizer.decode(rows.labels[start:stop].tolist()) for start, stop in changes.reshape(-1, 2)]
        assert [text.strip() for text in found] == [text.strip() for text in texts]


def test_the_likeliest_ids_are_computed_only_for_metrics_that_need_them(
    small_tokenizer: SentencePieceTokenizer,
) -> None:
    asked: list[str] = []

    def predict() -> Tensor:
        asked.append("predictions")
        return torch.tensor([5, 5])

    rows, losses = micro_batch([5, 5, 6]), torch.tensor([0.5, 1.5])
    meter = build_meter(["perplexity", "count_loss_mask", "count_instruct_mask"], small_tokenizer)
    assert meter.figures(meter.sums(rows, losses, predict).tolist(), samples=1) == {
        "lm loss": 1.0,
        "ppl": math.e,
        "count loss mask": 2.0,
        "count instruct mask": 2.0,
    }
    assert asked == []
    meter = build_meter(["accuracy", "instruct_accuracy"], small_tokenizer)
    assert meter.figures(meter.sums(rows, losses, predict).tolist(), samples=1)["lm accuracy"] == 0.5
    assert asked == ["predictions"]


def test_a_metric_without_tokens_is_not_a_number() -> None:
    """Answers without words, for example."""
    meter = Meter(metrics=(METRICS["instruct_accuracy"],), marker_lengths={5: 2})
    found = meter.figures(meter.sums(micro_batch([5, 5]), torch.ones(1), lambda: torch.ones(1)).tolist(), samples=1)
    assert found["lm loss"] == 1.0
    assert math.isnan(found["instruct accuracy"])
