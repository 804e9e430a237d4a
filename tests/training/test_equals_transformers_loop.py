"""The loss curve is that of a `transformers` model in a plain PyTorch loop on the same rows."""

import itertools
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import ROOT, finetune, losses
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron.data import InstructionDataset
from megatron.data.order import SampleOrder, split_ranges

STEPS, BATCH, LENGTH, ROWS, LR = 20, 8, 256, 400, 2e-4


@pytest.fixture(scope="module")
def rows(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of the first rows of the real data, tokenized for the real tiny Llama."""
    folder = tmp_path_factory.mktemp("cot")
    with (shared_data / "data" / "cot_train.jsonl").open(encoding="utf-8") as source:
        (folder / "rows.jsonl").write_text("".join(itertools.islice(source, ROWS)), encoding="utf-8")
    command = [
        *("--input", str(folder / "rows.jsonl"), "--output_prefix", str(folder / "rows")),
        *("--tokenizer_type", "SentencePieceTokenizer", "--vocab_extra_ids_list", "<|im_start|>,<|im_end|>"),
        *("--vocab_file", str(shared_data / "models" / "stories260K" / "tokenizer.model"), "--workers", "1"),
        *("--question_key", "question", "--answer_key", "response", "--system_key", "system_prompt"),
    ]
    runpy.run_path(str(ROOT / "instruct" / "preprocess_instruct_data.py"))["main"](command)
    return folder / "rows"


def plain_loop(model_folder: Path, rows: Path, vocab_size: int) -> list[float]:
    """Losses of `torch.optim.AdamW` over the same global batches, one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    grow(model, vocab_size)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8)
    data = InstructionDataset(rows)
    start, stop = split_ranges("969,30,1", len(data))[0]
    order, found = SampleOrder(stop - start, 1234), []
    for step in range(STEPS):
        sums = [row_loss(model, *data[start + int(i)]) for i in order.indices(step * BATCH, BATCH)]
        loss = sum(s for s, _ in sums) / sum(n for _, n in sums)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


def grow(model: torch.nn.Module, vocab_size: int) -> None:
    """Give the tied embedding new rows, each the mean of the old."""
    old = model.get_input_embeddings().weight.detach()
    new = old.mean(0, keepdim=True).expand(vocab_size - len(old), -1)
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    model.get_input_embeddings().weight.data = torch.cat([old, new])
    model.tie_weights()


def row_loss(model: torch.nn.Module, tokens: object, roles: object) -> tuple[Tensor, Tensor]:
    """(sum of the losses of the assistant's tokens, how many) of one row."""
    ids = torch.as_tensor(tokens)[: LENGTH + 1]
    supervised = torch.as_tensor(roles)[1 : LENGTH + 1] == 2
    logits = model(ids[None, :-1]).logits[0]
    return (F.cross_entropy(logits, ids[1:], reduction="none") * supervised).sum(), supervised.sum()


def test_same_loss_curve_as_transformers(shared_data: Path, rows: Path) -> None:
    model = shared_data / "models" / "stories260K"
    code, output = finetune(
        [
            *("--load", str(model), "--use_checkpoint_args", "--model_name", "llama2", "--data_path", str(rows)),
            *("--tokenizer_type", "SentencePieceTokenizer", "--vocab_file", str(model / "tokenizer.model")),
            *("--vocab_extra_ids_list", "<|im_start|>,<|im_end|>", "--data_type", "instruction"),
            *("--variable_seq_lengths", "--seq_length", str(LENGTH), "--micro_batch_size", "4"),
            *("--global_batch_size", str(BATCH), "--train_iters", str(STEPS), "--lr", str(LR)),
            *("--lr_decay_style", "constant", "--log_interval", "1", "--eval_iters", "0"),
        ]
    )
    assert code == 0, output
    assert losses(output) == pytest.approx(plain_loop(model, rows, 519), rel=1e-4)
