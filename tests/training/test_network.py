"""The cable between two machines is cut in mid-step: both sides end, and the run goes on when it is whole again."""

from pathlib import Path

import pytest
from tiny_runs import run, same, tensors, words
from torchruns import Run, finish, start
from two_machines import Machine, ip, two_machines
from worlds import World


def start_on(machines: tuple[Machine, ...], fault: str, argv: list[str]) -> list[Run]:
    """One rank on each; that of the first machine meets the fault in iteration 4."""
    options = ["--nnodes", str(len(machines)), "--nproc_per_node", "1"]
    options += ["--master_addr", machines[0].address, "--master_port", "29400", "--node_rank"]
    return [
        start(
            fault,
            4,
            argv,
            rank=0,
            options=[*options, str(number)],
            before=machine.prefix,
            environment={"GLOO_SOCKET_IFNAME": machine.device, "CABLE": machine.device},
        )
        for number, machine in enumerate(machines)
    ]


@pytest.mark.slow
def test_a_cut_cable_ends_both_sides_and_loses_nothing(world: World, course: str, tmp_path: Path) -> None:
    flags = [course, "--train_iters 6 --save_interval 2"]
    run(world, 2, *flags, f"--save {tmp_path / 'straight'}")
    argv = words(*flags, f"--save {tmp_path / 'cut'} --auto_resume --distributed_timeout_minutes 0.3")
    with two_machines() as machines:
        for rank, (code, output) in enumerate(map(finish, start_on(machines, "cut", argv))):
            assert code == 1
            assert f"(rank {rank} of 2, in iteration 4, forward-backward)" in output, output
            assert "failed: lost the other ranks: Timed out waiting 18000ms" in output
        ip("-n", machines[0].namespace, "link", "set", machines[0].device, "up")
        results = [finish(one) for one in start_on(machines, "told", argv)]
    assert [code for code, _ in results] == [0, 0], results
    assert "going on from iteration 2, 16 consumed samples" in results[0][1]
    assert same(tensors(tmp_path / "straight"), tensors(tmp_path / "cut"))
