"""The commands of the tutorials, taken from the pages themselves and run in order: a tiny model, two ranks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["docs/getting_started.md", "docs/instruction_tuning.md", "docs/pretraining.md"]
SENTENCES = [
    f"{name} has {a} {thing} and gets {b} more, so now there are {a + b} {thing}."
    for a, name in enumerate(["Anna", "Ben", "Clara", "David", "Emma", "Felix"], 2)
    for b, thing in enumerate(["apples", "books", "coins", "eggs", "pens", "stones"], 3)
]
TORCHRUN_FLAGS = {
    *("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "max_restarts"),
    *("signals_to_handle", "shutdown_timeout"),
}
SLURM_FLAGS = {
    *("account", "array", "chdir", "cpus_per_task", "exclusive", "gpus_per_node", "kill_on_bad_exit", "nodes"),
    *("ntasks_per_node", "partition", "requeue", "signal", "time"),
    *("container_image", "container_mounts", "container_workdir", "nv"),
}
FOREIGN_FLAGS = TORCHRUN_FLAGS | SLURM_FLAGS | {"logdir", "help", "flag"}
"""Flags of others that the pages name."""


def bash_blocks(page: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with what a reader brings along: `model/`, a Llama in Hugging Face form, and rows, chats and texts."""
    sentencepiece = pytest.importorskip("sentencepiece")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("inputs")
    model = folder / "model"
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(model / "tokenizer"),
        model_type="bpe",
        vocab_size=config.vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=True,
        minloglevel=2,
    )
    rows = [
        {"id": f"cot.{i}", "system_prompt": "" if i % 2 else "Be brief.", "question": text[:-1] + "?", "response": text}
        for i, text in enumerate(SENTENCES * 6)
    ]
    chat = {"user": SENTENCES[0], "assistant": SENTENCES[1]}
    messages = [{"role": role, "content": content} for role, content in chat.items()]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": messages * 2}), encoding="utf-8")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = [json.dumps({"text": " ".join(SENTENCES[i : i + 3])}) for i in range(len(SENTENCES))]
    (folder / "text.jsonl").write_text("\n".join(texts), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def walk(inputs, tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of all pages' commands, run in one shell with the sizes turned down."""
    work = tmp_path_factory.mktemp("work")
    preset = {
        "WORK": work,
        "DATA": inputs / "data.jsonl",
        "CHATS": inputs / "chats.jsonl",
        "TEXT": inputs / "text.jsonl",
        "HF_MODEL": inputs / "model",
        "TP": 2,
        "WORKERS": 2,
        "DISTRIBUTED_ARGS": "--standalone --nproc_per_node 2",
        "LOG_ARGS": "--log_interval 1 --save_interval 2 --eval_interval 2 --eval_iters 1",
        "TRAIN_ARGS": "--train_iters 3 --lr_decay_style cosine --lr_warmup_iters 1 --lr 1e-3 --min_lr 1e-4",
        "OMP_NUM_THREADS": 1,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": ROOT,
    }
    script = "\n".join(block for page in PAGES for block in bash_blocks(page))
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env=os.environ | {name: str(value) for name, value in preset.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return work, result.stdout


@pytest.mark.slow
def test_training_log(walk):
    _, output = walk
    iterations = re.findall(r"^ iteration +(\d+)/ +3 \| consumed samples: +(\d+) \|", output, flags=re.M)
    assert iterations == 2 * [("1", "64"), ("2", "128"), ("3", "192")]


@pytest.mark.slow
def test_files_of_each_stage(walk):
    work, _ = walk
    tracker = "latest_checkpointed_iteration.txt"
    written = {f"orca-{part}.{kind}" for part in ("text", "role") for kind in ("bin", "idx")}
    text = {f"my_text_document{end}" for end in (".bin", ".idx", "-tokenizer.json")}
    found = {path.name for path in (work / "tokenized").iterdir() if path.suffix != ".npy"}
    assert found == {*written, *text, "orca-tokenizer.json"}
    assert {path.name for path in (work / "chats").iterdir()} == {
        file.replace("orca", "tokenized") for file in (*written, "orca-tokenizer.json")
    }
    assert (work / "weights" / tracker).read_text().strip() == "release"
    assert (work / "sharded" / tracker).read_text().strip() == "release"
    assert (work / "finetuned" / tracker).read_text().strip() == "3"
    assert (work / "pretrained" / tracker).read_text().strip() == "3"
    assert any((work / "finetuned" / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_exported_model_answers(walk):
    transformers = pytest.importorskip("transformers")
    work, _ = walk
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(work / "hf")
    chat = [{"role": "user", "content": "Anna has 2 apples?"}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert rendered == "<|im_start|>question\nAnna has 2 apples?<|im_end|>\n<|im_start|>answer\n"
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_pages_have_the_commands():
    """The extraction finds what the pages show; a block under another name would go untested."""
    commands = "\n".join(block for page in PAGES for block in bash_blocks(page))
    for script in [
        "instruct/download_orca_cot.py",
        "instruct/preprocess_instruct_data.py",
        "tools/show_data.py",
        "tools/hf_to_megatron.py",
        "tools/checkpoint_util.py",
        "finetune.py",
        "tools/megatron_to_hf.py",
        "tools/preprocess_data.py",
    ]:
        assert script in commands


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_every_flag_named_exists(page):
    sources = [*ROOT.glob("megatron/config/*.py"), *ROOT.glob("instruct/*.py"), *ROOT.glob("tools/**/*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    fields = set(re.findall(r"^    (\w+): [^\n]+? = option\(", source, flags=re.M))
    known = fields | {f"no_{field}" for field in fields} | FOREIGN_FLAGS
    known |= set(re.findall(r"--(\w+)", (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")))
    named = re.findall(r"(?<![\w-])--([a-z][\w-]*)", (ROOT / page).read_text(encoding="utf-8"))
    assert {flag for flag in named if flag.replace("-", "_") not in known} == set()
