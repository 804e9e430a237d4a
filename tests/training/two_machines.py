"""Two machines in one: network namespaces, joined by a cable that can be cut."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

ADDRESSES = ("10.231.77.1", "10.231.77.2")
"""Of the cable's ends; nothing else is reachable from them."""


@dataclass(frozen=True)
class Machine:
    """A namespace, its end of the cable, and the address there."""

    namespace: str
    device: str
    address: str

    @property
    def prefix(self) -> list[str]:
        """What makes a command run there."""
        return ["ip", "netns", "exec", self.namespace]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Both, connected; the test is skipped where they cannot be made."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the ip command of iproute2")
    tag = f"llm{os.getpid() % 10**6}"
    first, second = (
        Machine(f"{tag}{end}", f"{tag}{end}", address) for end, address in zip("ab", ADDRESSES, strict=True)
    )
    try:
        try:
            for machine in (first, second):
                ip("netns", "add", machine.namespace)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        ends = ["netns", first.namespace, "type", "veth", "peer", "name", second.device, "netns", second.namespace]
        ip("link", "add", first.device, *ends)
        for machine in (first, second):
            ip("-n", machine.namespace, "address", "add", f"{machine.address}/30", "dev", machine.device)
            for device in ("lo", machine.device):
                ip("-n", machine.namespace, "link", "set", device, "up")
        yield first, second
    finally:
        for machine in (first, second):
            subprocess.run(["ip", "netns", "delete", machine.namespace], capture_output=True)
