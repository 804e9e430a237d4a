"""Whole runs: what is trained, said, saved, resumed, skipped and refused."""

import re
from pathlib import Path

import pytest
from tiny_runs import finetune, losses, run, same, tensors, words
from worlds import World

from megatron.data.indexed import IndexedDataset, IndexedWriter

STAGES = "--pipeline_model_parallel_size 2 --hidden_dropout 0.1"
SPREAD = "--tensor_model_parallel_size 2 --sequence_parallel --hidden_dropout 0.1 --attention_dropout 0.1"


def test_learns(world: World, course: str) -> None:
    found = losses(run(world, 1, course, "--train_iters 30"))
    assert len(found) == 30
    assert found[-1] < 0.5 * found[0]


@pytest.mark.parametrize(
    ("size", "layout"), [(1, "--hidden_dropout 0.1"), (2, SPREAD), (2, "--full_sharding"), (4, SPREAD), (4, STAGES)]
)
def test_stopped_and_resumed_equals_straight(world: World, course: str, tmp_path: Path, size: int, layout: str) -> None:
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    flags = [course, layout, "--train_iters 20"]
    expected = losses(run(world, size, *flags, f"--save {straight}"))
    first = run(world, size, *flags, f"--save {halves} --exit_interval 10")
    assert "stopping: iteration 10" in first
    second = run(world, size, *flags, f"--save {halves} --load {halves}")
    assert losses(first) + losses(second) == expected
    assert same(tensors(straight, 20), tensors(halves, 20))


def test_resumed_on_another_layout_goes_on_alike(world: World, course: str, tmp_path: Path) -> None:
    flags = [course, "--train_iters 8"]
    expected = losses(run(world, 1, *flags))
    run(world, 4, *flags, f"--tensor_model_parallel_size 2 --save {tmp_path} --exit_interval 5")
    for size, layout in [(1, ""), (2, "--tensor_model_parallel_size 2 --sequence_parallel"), (2, "--full_sharding")]:
        found = losses(run(world, size, *flags, layout, f"--load {tmp_path}"))
        assert found == pytest.approx(expected[5:], rel=1e-5)


def test_finetune_takes_only_the_weights(world: World, course: str, tmp_path: Path) -> None:
    run(world, 1, course, f"--train_iters 3 --save {tmp_path}")
    output = run(world, 1, course, f"--train_iters 2 --load {tmp_path} --finetune")
    assert " iteration        1/       2 | consumed samples:            8 |" in output


def test_a_changed_schedule_is_found(world: World, course: str, tmp_path: Path) -> None:
    run(world, 1, course, f"--train_iters 2 --save {tmp_path}")
    flags = words(course, f"--train_iters 4 --load {tmp_path}")
    (code, output) = finetune(flags)
    assert code == 2
    assert "--lr_decay_iters" in output
    assert finetune([*flags, "--override_opt_param_scheduler"])[0] == 0
    assert finetune([*flags, "--use_checkpoint_opt_param_scheduler"])[0] == 0


def test_evaluates_without_training(world: World, course: str, tmp_path: Path) -> None:
    trained = run(world, 1, course, f"--train_iters 2 --save {tmp_path}")
    layouts = ["--tensor_model_parallel_size 2 --sequence_parallel", "--pipeline_model_parallel_size 2"]
    for size, layout in [(1, ""), (2, ""), *((2, layout) for layout in layouts), (4, " ".join(layouts))]:
        output = run(world, size, course, layout, f"--load {tmp_path} --eval_only")
        assert losses(output) == []
        found = [float(line.split("value: ")[1].split()[0]) for line in output.splitlines() if "loss value" in line]
        expected = [float(line.split("value: ")[1].split()[0]) for line in trained.splitlines() if "loss value" in line]
        assert found == pytest.approx(expected, rel=1e-5)
        assert len(found) == 2


@pytest.mark.parametrize("layout", ["", "--full_sharding"])
def test_an_evaluation_in_between_changes_nothing(world: World, course: str, layout: str) -> None:
    flags = [course.replace("--eval_interval 100", ""), layout, "--train_iters 5"]
    often, never = (run(world, 2, *flags, f"--eval_interval {n}") for n in (1, 100))
    assert often.count("validation loss at iteration") == 5
    assert losses(often) == losses(never)


@pytest.mark.parametrize(
    ("size", "layout"), [(1, "--hidden_dropout 0.1 --attention_dropout 0.1"), (2, SPREAD), (2, STAGES)]
)
def test_recomputation_draws_the_same_masks(world: World, course: str, size: int, layout: str) -> None:
    modes = ["", "--recompute_granularity selective", "--recompute_granularity full --recompute_method uniform"]
    expected, *found = (losses(run(world, size, course, layout, mode, "--train_iters 4")) for mode in modes)
    for mode in found:
        assert mode == pytest.approx(expected, rel=1e-5)


def test_what_is_asked_to_be_logged_is(world: World, course: str, tmp_path: Path) -> None:
    flags = "--optimizer sgd --log_params_norm --log_num_zeros_in_grad --timing_log_level 2 --timing_log_option max"
    outputs = [
        run(world, size, course, flags, layout, f"--train_iters 3 --tensorboard_dir {tmp_path / str(size)}")
        for size, layout in [(1, ""), (4, "--tensor_model_parallel_size 2 --pipeline_model_parallel_size 2")]
    ]
    fields = [re.findall(r"\| (lm loss|grad norm|num zeros|params norm): ([^ ]+) ", output) for output in outputs]
    assert len(fields[0]) == 12
    assert [name for name, _ in fields[0]] == [name for name, _ in fields[1]]
    for (name, one), (_, four) in zip(*fields, strict=True):
        assert float(one) == pytest.approx(float(four), rel=1e-3), name
    assert "max time across ranks (ms):" in outputs[1]
    assert list((tmp_path / "4").glob("events.out.tfevents.*"))


def validation_losses(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"validation loss .* value: ([^ ]+) ", output)]


def test_evaluation_is_over_tokens_whatever_training_averages(world: World, course: str) -> None:
    """On two ranks one has no sample in the only batch; its empty share must not count."""
    flags = [course, "--train_iters 1 --micro_batch_size 8 --global_batch_size 16"]
    expected = validation_losses(run(world, 1, *flags, "--skip_iters 1"))
    found = validation_losses(run(world, 2, *flags, "--skip_iters 1 --no_calculate_per_token_loss"))
    assert found == pytest.approx(expected, rel=1e-5)


def test_samples_that_remain_are_trained_on_after_a_change_of_batch(world: World, course: str, tmp_path: Path) -> None:
    flags = [course.replace("--global_batch_size 8", ""), "--train_samples 160 --lr_decay_style constant"]
    first = run(world, 1, *flags, f"--global_batch_size 8 --save {tmp_path} --exit_interval 10")
    second = run(world, 1, *flags, f"--global_batch_size 16 --load {tmp_path}")
    assert (len(losses(first)), len(losses(second))) == (10, 5)
    assert "consumed samples:          160 |" in second


def test_the_loss_scale_goes_on_without_optimizer_state(world: World, course: str, tmp_path: Path) -> None:
    flags = [course, "--train_iters 6 --fp16 --hysteresis 1 --save", str(tmp_path)]
    first = run(world, 1, *flags, "--exit_interval 3")
    second = run(world, 1, *flags, "--load", str(tmp_path))
    scales = [float(s) for s in re.findall(r"loss scale: ([^ ]+) ", first + second)]
    assert scales == [2.0 ** (32 - n) for n in range(6)]


def test_a_finished_run_started_again_leaves_its_checkpoint(world: World, course: str, tmp_path: Path) -> None:
    flags = [course, f"--train_iters 2 --save {tmp_path}"]
    run(world, 1, *flags)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    output = run(world, 1, *flags, f"--load {tmp_path} --no_load_optim")
    assert "saved checkpoint" not in output
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_stopped_run_does_not_evaluate(world: World, course: str) -> None:
    assert validation_losses(run(world, 1, course, "--train_iters 4 --exit_interval 2")) == []


def test_state_of_another_optimizer_is_refused(world: World, course: str, tmp_path: Path) -> None:
    run(world, 1, course, f"--train_iters 2 --lr_decay_style constant --optimizer sgd --save {tmp_path}")
    flags = words(course, f"--train_iters 3 --lr_decay_style constant --load {tmp_path}")
    code, output = finetune(flags)
    assert code == 2
    assert "--optimizer adam is not the one of" in output
    assert finetune([*flags, "--no_load_optim"])[0] == 0


def test_passes_over_iterations(world: World, course: str) -> None:
    output = run(world, 1, course, "--train_iters 4 --skip_iters 2 3")
    assert len(losses(output)) == 2
    assert output.count("number of skipped iterations:   1 |") == 2


def test_batches_without_supervised_tokens_are_counted(world: World, course: str, tmp_path: Path) -> None:
    prefix = course.split("--data_path ")[1].split()[0]
    text, role = IndexedDataset(f"{prefix}-text"), IndexedDataset(f"{prefix}-role")
    for name, rows in {"text": text, "role": [row * 0 for row in role]}.items():
        with IndexedWriter(f"{tmp_path / 'masked'}-{name}", text[0].dtype) as writer:
            for row in rows:
                writer.append(row)
    flags = course.replace(f"--data_path {prefix}", f"--data_path {tmp_path / 'masked'}")
    output = run(world, 2, flags, "--train_iters 2")
    assert output.count("number of all-masked iterations:   1 |") == 2
    assert losses(output) == []


@pytest.mark.parametrize(("size", "layout"), [(1, ""), (2, "--tensor_model_parallel_size 2")])
def test_fp16_lowers_its_scale_until_gradients_are_finite(world: World, course: str, size: int, layout: str) -> None:
    output = run(world, size, course, layout, "--train_iters 25 --fp16 --hysteresis 1 --initial_loss_scale 1e9")
    scales = [float(line.split("loss scale: ")[1].split()[0]) for line in output.splitlines() if "loss scale" in line]
    assert scales[0] == 1e9
    assert scales[-1] < scales[0]
    assert output.count("number of skipped iterations:   1 |") > 0
    assert losses(output)[-1] < losses(output)[0]


def test_a_larger_tokenizer_grows_the_vocabulary(world: World, course: str, tmp_path: Path) -> None:
    run(world, 1, course, f"--train_iters 1 --save {tmp_path}")
    grown = course.replace("<|im_end|>", "<|im_end|>,<|new|>")
    output = run(world, 2, grown, f"--train_iters 1 --load {tmp_path} --finetune --tensor_model_parallel_size 2")
    assert "1 new rows, each the mean of the old ones" in output
    resumed = run(world, 2, grown, f"--train_iters 3 --load {tmp_path} --override_opt_param_scheduler")
    assert len(losses(resumed)) == 2


def test_a_flipped_byte_of_a_weight_stops_every_rank(world: World, course: str, tmp_path: Path) -> None:
    run(world, 1, course, f"--train_iters 1 --save {tmp_path}")
    path = next(tmp_path.glob("iter_0000001/model/*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    results = world(2, finetune, words(course, f"--train_iters 2 --load {tmp_path} --finetune"))
    assert [code for code, _ in results] == [1, 1]
    assert path.name in results[0][1]


@pytest.mark.parametrize(
    "precision", ["--bf16", "--fp16 --initial_loss_scale 1024", "--bf16 --fp32_residual_connection"]
)
def test_half_precision_in_a_pipeline(world: World, course: str, precision: str) -> None:
    flags = [course, precision, "--train_iters 4 --num_layers 4"]
    expected = losses(run(world, 1, *flags))
    interleaved = f"{STAGES} --hidden_dropout 0.0 --num_layers_per_virtual_pipeline_stage 1"
    for size, layout in [(2, interleaved), (4, f"{interleaved} --tensor_model_parallel_size 2 --sequence_parallel")]:
        assert losses(run(world, size, *flags, layout)) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--global_batch_size 7 --micro_batch_size 7 --tensor_model_parallel_size 3", "--tensor_model_parallel_size 3"),
        ("--tensor_model_parallel_size 2", "start a multiple of 2"),
        ("--data_path nowhere", "--data_path nowhere: no such file"),
        ("--load nowhere", "--load nowhere: no such folder"),
        ("--vocab_file nowhere", "--vocab_file nowhere: no such file"),
        ("--split 0,1,1", "there is no train data"),
    ],
)
def test_mistakes_are_said_before_anything_starts(course: str, flags: str, message: str) -> None:
    code, output = finetune(words(course, "--train_iters 1", flags))
    assert code in (1, 2)
    assert message in output


def test_another_tokenizer_than_that_of_data_or_checkpoint_is_told(course: str, tmp_path: Path) -> None:
    code, output = finetune(words(course, f"--train_iters 1 --save {tmp_path}"))
    assert (code, "the tokenizer is not that of" in output) == (0, False)
    grown = course.replace("<|im_end|>", "<|im_end|>,<|new|>")
    code, output = finetune(words(grown, f"--train_iters 1 --load {tmp_path} --finetune"))
    assert code == 0
    for what in ("the data ", f"the checkpoint {tmp_path}"):
        line = next(line for line in output.splitlines() if f"the tokenizer is not that of {what}" in line)
        assert line.endswith("was missing and is '<|new|>' (id 407)"), line
