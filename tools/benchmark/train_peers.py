"""The peers' side of the training benchmark: each trains by its own loop, in a process of its own.

`python -m tools.benchmark.train_peers NAME JOB` prints the steps as JSON, on the last line. Every peer has its fastest
settings that leave the arithmetic alone: weights and Adam in fp32, fused where it can be, products as the job says.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from megatron.parallel.device import synchronize
from tools.benchmark.train_job import IGNORED, Job, Row, Step

T = TypeVar("T")


def write_initial_weights(job: Job) -> list[Step]:
    """Make the folder with the weights that all sides begin with."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = job.size
    config = LlamaConfig(
        vocab_size=job.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.ffn_hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_attention_heads,
        num_key_value_heads=size.num_attention_heads_kv,
        max_position_embeddings=size.seq_length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(job.model)
    return []


def products(job: Job) -> list[Step]:
    """The floor: only the products of tokens and weights, forward and backward, as many tokens at once as ours.

    Results go to memory that is there already: claiming it would take time that a product does not need.
    """
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    make = partial(torch.randn, device=job.device, dtype=dtype)
    longest = job.size.micro_batch_size * job.size.seq_length
    weights = [make(shape) for shape, count in job.size.products(job.vocab_size).items() for _ in range(count)]
    widths = {width for weight in weights for width in weight.shape}
    steps = []
    for rows in job.batches():
        tokens = sum(len(row.tokens) - 1 for row in rows)
        lengths = [min(longest, tokens - start) for start in range(0, tokens, longest)]
        parts = [{width: make((length, width)) for width in widths} for length in lengths]
        results = {shape: make(shape) for shape in [*product(lengths, widths), *(weight.shape for weight in weights)]}
        began = synchronized(job)
        for part in parts:
            for weight in weights:
                inputs, gradient = part[weight.shape[1]], part[weight.shape[0]]
                torch.mm(inputs, weight.T, out=results[gradient.shape])
                torch.mm(gradient, weight, out=results[inputs.shape])
                torch.mm(gradient.T, inputs, out=results[weight.shape])
        steps.append(Step(synchronized(job) - began, float("nan")))
    return steps


def transformers_loop(job: Job) -> list[Step]:
    """A plain loop around the model of `transformers`, with padded rows and mixed precision."""
    model = pretrained(job)
    optimizer = torch.optim.AdamW(model.parameters(), job.learning_rate, (0.9, job.beta2), weight_decay=0.0, fused=True)
    steps = []
    for rows in job.batches():
        began = synchronized(job)
        supervised, total = sum(label != IGNORED for row in rows for label in row.labels), 0.0
        for some in groups(rows, job.peer_rows):
            batch = {name: values.to(job.device) for name, values in padded(some).items()}
            with torch.autocast(job.device, torch.bfloat16, enabled=job.precision == "bf16"):
                loss = model(**batch, num_items_in_batch=supervised).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(Step(synchronized(job) - began, total))
    return steps


def trl_trainer(job: Job) -> list[Step]:
    """`trl`'s SFTTrainer without padding: samples one after the other, each attending to itself."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        """Notes when steps end."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            """The first step begins."""
            ends.append(synchronized(job))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            """And so does the next."""
            ends.append(synchronized(job))

    rows = [hf_row(row) for batch in job.batches() for row in batch]
    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    config = SFTConfig(
        output_dir=f"{job.model}/trl",
        use_cpu=job.device == "cpu",
        bf16=job.precision == "bf16",
        padding_free=True,
        max_length=None,
        gradient_checkpointing=False,
        per_device_train_batch_size=job.peer_rows,
        gradient_accumulation_steps=job.size.global_batch_size // job.peer_rows,
        max_steps=job.steps,
        train_sampling_strategy="sequential",
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta2=job.beta2,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=pretrained(job),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<unk>", eos_token="</s>"),
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [Step(after - before, loss) for (before, after), loss in zip(pairwise(ends), losses, strict=True)]


def litgpt_finetune(job: Job) -> list[Step]:
    """The loop of `litgpt finetune_full`, in mixed precision, with fused Adam."""
    import lightning
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.finetune.full import fit
    from litgpt.utils import instantiate_torch_optimizer

    figures = list[dict[str, float]]()
    fabric = lightning.Fabric(
        accelerator=job.device,
        devices=1,
        precision="bf16-mixed" if job.precision == "bf16" else "32-true",
        loggers=[litgpt_notes(figures)],
    )
    model = fabric.setup(litgpt_model(job))
    adam = {"lr": job.learning_rate, "betas": (0.9, job.beta2), "weight_decay": 0.0, "fused": True}
    optimizer = fabric.setup_optimizers(
        instantiate_torch_optimizer({"class_path": "torch.optim.AdamW", "init_args": adam}, model.parameters())
    )
    rows = [hf_row(row) for batch in job.batches() for row in batch]
    loader, checked = (
        fabric.setup_dataloaders(DataLoader(some, batch_size=job.peer_rows, collate_fn=litgpt_batch))  # type: ignore[arg-type]
        for some in (rows, rows[:1])
    )
    state = {"model": model, "optimizer": optimizer, "iter_num": 0, "step_count": 0}
    state["scheduler"] = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    folder = Path(job.model) / "litgpt"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(Path(job.vocab_file).read_bytes())
    fit(
        fabric=fabric,
        state=state,
        train_dataloader=loader,
        val_dataloader=checked,
        devices=1,
        resume=False,
        checkpoint_dir=folder,
        out_dir=folder,
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=job.size.global_batch_size,
            micro_batch_size=job.peer_rows,
            max_steps=job.steps,
            epochs=2,
        ),
        eval=EvalArgs(interval=10**9, max_iters=1),
        data=None,
    )
    passes = groups(figures, job.size.global_batch_size // job.peer_rows)
    return [Step(sum(one["iter_time"] for one in some), some[-1]["loss"]) for some in passes]


def litgpt_notes(figures: list[dict[str, float]]) -> Any:
    """A logger that adds to `figures` what the loop says of each pass."""
    from lightning.fabric.loggers import Logger

    class Notes(Logger):
        """See above."""

        name, version = "notes", 0

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            """One pass."""
            figures.append(metrics)

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            """Not kept."""

    return Notes()


def litgpt_model(job: Job) -> torch.nn.Module:
    """The initial weights in litgpt's model."""
    from litgpt.model import GPT, Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from safetensors.torch import load_file

    size = job.size
    config = Config(
        name="llama",
        block_size=size.seq_length + 1,
        vocab_size=job.vocab_size,
        padded_vocab_size=job.vocab_size,
        n_layer=size.num_layers,
        n_head=size.num_attention_heads,
        n_query_groups=size.num_attention_heads_kv,
        n_embd=size.hidden_size,
        intermediate_size=size.ffn_hidden_size,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-5,
        mlp_class_name="LLaMAMLP",
    )
    weights: dict[str, Tensor] = {}
    for file in sorted(Path(job.model).glob("*.safetensors")):
        copy_weights_hf_llama(config, {}, weights, load_file(file))
    model = GPT(config)
    model.load_state_dict(weights)
    return model


def litgpt_batch(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """A padded batch as litgpt's data has it."""
    counts = torch.tensor([[len(row["input_ids"])] for row in rows])
    batch = padded([Row(tokens=row["input_ids"], labels=row["labels"]) for row in rows])
    return batch | {"token_counts": {"raw": counts, "raw_plus_prompt_template": counts}}


def hf_row(row: Row) -> dict[str, list[int]]:
    """A row as data sets have it."""
    return {"input_ids": row.tokens, "labels": row.labels}


def groups(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """So many at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


def pretrained(job: Job) -> Any:
    """The initial weights in the model of `transformers`, in training mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, use_cache=False).to(job.device).train()


def padded(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows as one batch, as long as the longest."""
    longest = max(len(row.tokens) for row in rows)

    def filled(values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([value + [filler] * (longest - len(value)) for value in values])

    return {
        "input_ids": filled([row.tokens for row in rows], 0),
        "labels": filled([row.labels for row in rows], IGNORED),
        "attention_mask": filled([[1] * len(row.tokens) for row in rows], 0),
    }


def synchronized(job: Job) -> float:
    """The time when everything asked for so far is done."""
    synchronize(torch.device(job.device))
    return time.perf_counter()


SIDES: dict[str, Callable[[Job], list[Step]]] = {
    "weights": write_initial_weights,
    "floor": products,
    "transformers": transformers_loop,
    "trl": trl_trainer,
    "litgpt": litgpt_finetune,
}

if __name__ == "__main__":
    print("\n" + json.dumps([asdict(step) for step in SIDES[sys.argv[1]](Job.read(Path(sys.argv[2])))]))
