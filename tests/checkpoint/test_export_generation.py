"""What is exported answers and stops: generation with `transformers` ends at the end of the turn, for every family."""

from pathlib import Path

import pytest
import torch
from tiny_families import save_family
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

from megatron.checkpoint import Slice, begin_checkpoint, open_checkpoint, with_vocabulary
from megatron.checkpoint.export import export
from megatron.tokenizer.chat import MESSAGE_END, MESSAGE_START
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

VARIANTS = ["llama 3.1", "mistral", "qwen2", "qwen3", "falcon 7b", "falcon 40b", "gpt2"]


class Says(LogitsProcessor):
    """Makes a model say two tokens and then end its turn."""

    def __init__(self, prompt: int, end: int) -> None:
        self.script = {prompt: 65, prompt + 1: 66, prompt + 2: end}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        said = torch.full_like(scores, -torch.inf)
        said[:, self.script.get(input_ids.shape[1], 67)] = 0.0
        return said


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_stops_at_the_end_of_the_turn(tmp_path: Path, shared_data: Path, variant: str) -> None:
    file = shared_data / "models" / "stories260K" / "tokenizer.model"
    own = SentencePieceTokenizer.from_file(file, extra_tokens=[MESSAGE_START, MESSAGE_END])
    save_family(tmp_path / "hf", variant)
    source = open_checkpoint(tmp_path / "hf")
    weights = with_vocabulary(source.weights, own.vocab_size)
    slices = [Slice.of(n, weights.shape(n), (0,) * len(weights.shape(n)), weights.read(n)) for n in weights.names()]
    folder = begin_checkpoint(tmp_path / "ours", None, source.run, {"model/x.safetensors": slices}, own).complete()
    exported = export(open_checkpoint(folder), tmp_path / "out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    messages = [{"role": "user", "content": "the sum of 1 and 2"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    end, length = own.special_tokens[MESSAGE_END], prompt["input_ids"].shape[1]
    said = model.generate(**prompt, max_new_tokens=9, logits_processor=LogitsProcessorList([Says(length, end)]))
    assert said[0, length:].tolist() == [65, 66, end]
