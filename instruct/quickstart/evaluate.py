"""Ask a model unseen questions, before and after training, and count the final answers that are exactly right."""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron.config import option, parse_command, run_entry


@dataclass(frozen=True, kw_only=True)
class Options:
    """Exact match."""

    before: str = option(help="Hugging Face folder of the model as it was.")
    after: str = option(help="Hugging Face folder of the trained model; its tokenizer and chat template serve both.")
    questions: str = option(help="Rows that were held out (.jsonl).")
    count: int = option(100, "How many of them to ask.")
    max_new_tokens: int = option(64, "Longest answer.")


def main(argv: list[str]) -> None:
    """Evaluate both models and show an answer."""
    (options,) = parse_command(argv, Options, prog="evaluate.py", description=__doc__ or "")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.after)
    with Path(options.questions).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, options.count)]
    for name, folder in {"before": options.before, "after": options.after}.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        answers = ask(model, tokenizer, rows, options.max_new_tokens)
        right = sum(final(answer) == final(row["response"]) for answer, row in zip(answers, rows, strict=True))
        print(f"exact match {name} training: {right} of {len(rows)} held-out questions ({right / len(rows):.0%})")
        del model
    print(f"\nquestion: {rows[0]['question']}\nanswer:   {answers[0]}")


def final(answer: str) -> str:
    """What a chain of thought concludes: the text after its last "answer is", or all of it where that is missing."""
    return answer.rpartition("answer is")[2].strip()


def ask(model: Any, tokenizer: Any, rows: list[dict[str, str]], max_new_tokens: int) -> list[str]:
    """Greedy answers; questions of one length go together, so that nothing needs padding."""
    import torch

    groups: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for number, row in enumerate(rows):
        messages = [{"role": "user", "content": row["question"]}]
        if row.get("system_prompt") is not None:
            messages.insert(0, {"role": "system", "content": row["system_prompt"]})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        groups[len(ids)].append((number, ids))
    answers = [""] * len(rows)
    for length, group in groups.items():
        prompts = torch.tensor([ids for _, ids in group], device=model.device)
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        for (number, _), ids in zip(group, out[:, length:], strict=True):
            answers[number] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return answers


if __name__ == "__main__":
    sys.exit(run_entry(main, sys.argv[1:]))
