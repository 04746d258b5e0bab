"""The checks in their order: the quick ones before every run, all of them for `slime doctor`."""

from __future__ import annotations

from collections.abc import Sequence

from launch.doctor import machine, nodes, software
from launch.doctor.collective import all_reduce
from launch.doctor.finding import Finding, Needs
from launch.nodes import Node

TOUCH_BYTES = 4096  # enough to see whether a folder can be written to


def quick(needs: Needs) -> list[Finding]:
    """Return findings of what takes less than two seconds together; nothing is started on GPUs."""
    return [*_of_software(needs), *_of_machine(needs, TOUCH_BYTES)]


def full(needs: Needs) -> list[Finding]:
    """Return findings of all checks of this machine and of the nodes of a Ray cluster; takes tens of seconds."""
    here = [*_of_software(needs), *_of_machine(needs, machine.WRITE_BYTES)]
    if needs.cluster.ray_address:
        return [*here, *nodes.joined(needs)]
    return [*here, *all_reduce(needs.cluster.gpus_per_node)]


def of_nodes(needs: Needs, found: Sequence[Node]) -> list[Finding]:
    """Return findings of the quick checks of nodes of the Ray cluster that this process has joined."""
    return nodes.check(needs, found, TOUCH_BYTES, all_reduce=False)


def _of_software(needs: Needs) -> list[Finding]:
    gpus = needs.cluster.gpus_per_node > 0 and not needs.cluster.ray_address
    return [*software.python(), *software.packages(), *software.cuda(gpus), *software.shadows()]


def _of_machine(needs: Needs, size: int) -> list[Finding]:
    return [
        *machine.resources(needs.cluster),
        *machine.checkpoints(needs),
        *machine.runs_folder(needs.runs_dir, size),
        *machine.open_files(),
        *machine.ports(),
        *machine.proxies(),
        *(machine.namespaces(needs.sandbox) if not needs.cluster.ray_address else ()),
    ]
