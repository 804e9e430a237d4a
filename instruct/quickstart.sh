#!/usr/bin/env bash
# The whole tutorial on a laptop, without a GPU, in a few minutes: bash instruct/quickstart.sh
#
# Makes a small dataset (sums in words, with a chain of thought), a tokenizer and a Llama with fresh weights, then runs
# exactly the tutorial's commands: tokenize, bring the weights in, shard, train with tensor and sequence parallelism,
# merge, export to Hugging Face. In the end it counts how many unseen questions are answered right, before and after.
#
#   --model DIR       a Hugging Face Llama of your own (or its name on the hub) instead of the fresh one
#   --family NAME     what it is: llama, llama2 (default), codellama
#   --data FILE       your own rows (jsonl with system_prompt, question, response); the last ones are held out
#   --tokenizer FILE  a SentencePiece model; by default the model's, or one trained on the data
#   --tp N            tensor-parallel size (2)
#   --iters N         iterations (400)
#   --questions N     held-out questions to ask (100)
#   --out DIR         where everything goes (quickstart/)
set -euo pipefail

MODEL="" FAMILY=llama2 DATA="" TOKENIZER="" TP=2 ITERS=400 QUESTIONS=100 OUT=""
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) sed -n '2,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    esac
    [ $# -ge 2 ] || { echo "quickstart.sh: error: $1 needs a value, or is unknown; see --help" >&2; exit 2; }
    case "$1" in
        --model) MODEL=$2 ;;
        --family) FAMILY=$2 ;;
        --data) DATA=$2 ;;
        --tokenizer) TOKENIZER=$2 ;;
        --tp) TP=$2 ;;
        --iters) ITERS=$2 ;;
        --out) OUT=$2 ;;
        --questions) QUESTIONS=$2 ;;
        *) echo "quickstart.sh: error: unknown option $1; see --help" >&2; exit 2 ;;
    esac
    shift 2
done

# The commands run in the repository; what the user named is meant from where the user is.
from_here() { case "$1" in "" | /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
DATA=$(from_here "$DATA") TOKENIZER=$(from_here "$TOKENIZER") OUT=$(from_here "$OUT")
[ ! -d "$MODEL" ] || MODEL=$(from_here "$MODEL")
OUT=${OUT:-quickstart}
for file in "$DATA" "$TOKENIZER"; do
    [ -z "$file" ] || [ -f "$file" ] || { echo "quickstart.sh: error: no file $file" >&2; exit 2; }
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."

title() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
# Show a command as it can be pasted, one flag a line, and run it.
run() {
    local word shown=""
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./=:,+-]+$ ]] || word="'$word'"
        case "$word" in
            --* | finetune.py) shown+=$' \\\n    '"$word" ;;
            *) shown+="${shown:+ }$word" ;;
        esac
    done
    printf '\n$ %s\n' "$shown"
    "$@"
}

title "Environment"
if [ -z "${VIRTUAL_ENV:-}" ]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "quickstart.sh: error: $python is older than Python 3.11; name another: PYTHON=python3.12" >&2; exit 1; }
    [ -x .venv/bin/pip ] || "$python" -m venv .venv
    source .venv/bin/activate
fi
# Without a GPU the CPU build of PyTorch is enough; left to itself pip may choose one of several gigabytes.
if ! python -c "import torch" 2>/dev/null && ! command -v nvidia-smi >/dev/null; then
    python -m pip install --quiet torch==2.13.0
fi
if ! python -c "import importlib.metadata as m; m.version('megatron-llm'); import matplotlib" 2>/dev/null; then
    python -m pip install --quiet -e . matplotlib
fi
echo "$(python --version), PyTorch $(python -c 'import torch; print(torch.__version__)')"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ] && [ "$gpus" -lt "$TP" ]; then
    echo "$gpus GPU for $TP ranks: the run is on the CPU; --tp $gpus uses what is there"
    export CUDA_VISIBLE_DEVICES=
fi

rm -rf "$OUT/tokenized" "$OUT/weights" "$OUT/sharded" "$OUT/finetuned" "$OUT/merged" "$OUT/hf"
mkdir -p "$OUT/tokenized"

title "Data, tokenizer and model"
if [ -z "$DATA" ]; then
    run python instruct/quickstart/make_data.py --train "$OUT/train.jsonl" --held_out "$OUT/held_out.jsonl"
else
    rows=$(wc -l < "$DATA")
    held_out=$((rows / 10 < QUESTIONS ? rows / 10 + 1 : QUESTIONS))
    head -n $((rows - held_out)) "$DATA" > "$OUT/train.jsonl"
    tail -n "$held_out" "$DATA" > "$OUT/held_out.jsonl"
    echo "$DATA: the last $held_out rows are held out"
fi
# A fresh model learns at a rate that would ruin a trained one; a trained one gets the tutorial's.
MICRO_BATCH=8 LR=2e-5 MIN_LR=2e-6 LONGEST_ANSWER=256
if [ -z "$MODEL" ]; then
    MODEL=$OUT/fresh MICRO_BATCH=64 LR=4e-3 MIN_LR=2e-4 LONGEST_ANSWER=64
    run python instruct/quickstart/make_model.py --data "$OUT/train.jsonl" --out "$MODEL" \
        ${TOKENIZER:+--tokenizer "$TOKENIZER"}
fi

title "Bring the weights in"
run python tools/hf_to_megatron.py "$FAMILY" --model-path "$MODEL" --out "$OUT/weights"
TOKENIZER=${TOKENIZER:-$OUT/weights/tokenizer.model}

title "Tokenize the instructions"
run python instruct/preprocess_instruct_data.py \
    --input="$OUT/train.jsonl" \
    --output_prefix="$OUT/tokenized/train" \
    --tokenizer_type=SentencePieceTokenizer \
    --vocab_file="$TOKENIZER" \
    --chunk_size=32 \
    --workers=2 \
    --vocab_extra_ids_list "<|im_start|>,<|im_end|>" \
    --question_key=question \
    --answer_key=response \
    --system_key=system_prompt

title "Cut the weights for $TP tensor-parallel ranks"
run python tools/checkpoint_util.py \
    --target_tensor_parallel_size "$TP" \
    --target_pipeline_parallel_size 1 \
    --load_dir "$OUT/weights" \
    --save_dir "$OUT/sharded" \
    --model_type "$FAMILY" \
    --bf16

title "Train"
run torchrun --standalone --nproc_per_node "$TP" finetune.py \
    --tensor_model_parallel_size "$TP" \
    --pipeline_model_parallel_size 1 \
    --load "$OUT/sharded" \
    --save "$OUT/finetuned" \
    --tensorboard_dir "$OUT/finetuned/tensorboard" \
    --data_path "$OUT/tokenized/train" \
    --model_name "$FAMILY" \
    --tokenizer_type SentencePieceTokenizer \
    --vocab_file="$TOKENIZER" \
    --bf16 \
    --use_flash_attn \
    --micro_batch_size "$MICRO_BATCH" \
    --global_batch_size 64 \
    --sequence_parallel \
    --recompute_granularity selective \
    --use_checkpoint_args \
    --data_type instruction \
    --variable_seq_lengths \
    --vocab_extra_ids_list "<|im_start|>,<|im_end|>" \
    --log_interval $((ITERS > 100 ? 10 : 1)) --save_interval 1000 --eval_interval 250 --eval_iters 5 \
    --train_iters "$ITERS" --lr_decay_style cosine --lr_warmup_fraction 0.1 --lr "$LR" --min_lr "$MIN_LR" --adam_beta2 0.98 |
    tee "$OUT/training.log"

title "Merge, and export to Hugging Face"
run python tools/checkpoint_util.py \
    --target_tensor_parallel_size 1 \
    --target_pipeline_parallel_size 1 \
    --load_dir "$OUT/finetuned" \
    --save_dir "$OUT/merged" \
    --model_type "$FAMILY" \
    --no_optim
run python tools/megatron_to_hf.py --input_dir "$OUT/merged" --output_dir "$OUT/hf"

title "What it has learned"
run python instruct/quickstart/plot_loss.py --log "$OUT/training.log" --out "$OUT/loss.png"
run python instruct/quickstart/evaluate.py --before "$MODEL" --after "$OUT/hf" --questions "$OUT/held_out.jsonl" \
    --count "$QUESTIONS" --max_new_tokens "$LONGEST_ANSWER"
printf '\nDone in %d minutes and %d seconds. The model is in %s, the loss curve in %s.\n' \
    $((SECONDS / 60)) $((SECONDS % 60)) "$OUT/hf" "$OUT/loss.png"
