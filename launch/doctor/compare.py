"""Judgments of what was seen on several nodes, as plain functions. A finding names the nodes that it is about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from launch.doctor import shared, software
from launch.doctor.finding import Finding, Level, named, ok, problem, warning
from launch.doctor.machine import SLOW_MB_S, WRITE_BYTES

MAX_SKEW_S = 1.0


@dataclass(frozen=True)
class NodeClock:
    """A node's clock against this machine's, seconds."""

    ahead_s: float
    within_s: float  # half of the round trip: how far off `ahead_s` may be


def on(addresses: Iterable[str], found: Iterable[Finding]) -> list[Finding]:
    """Return findings as those of these nodes; [] without nodes."""
    nodes = list(addresses)
    return [replace(one, node=named(nodes)) for one in found] if nodes else []


def together(texts: Mapping[str, str], check: str, level: Callable[[str, str], list[Finding]]) -> list[Finding]:
    """Return one finding for each text, given by node; "" is none."""
    return [
        finding
        for text in dict.fromkeys(text for text in texts.values() if text)
        for finding in on([node for node, said in texts.items() if said == text], level(check, text))
    ]


def alike(found: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """Return the nodes' own findings: equal ones as one, and those of a check that are all well as one."""
    many: dict[tuple[str, Level, str], dict[str, Finding]] = {}
    for node, findings in found.items():
        for one in findings:
            many.setdefault((one.check, one.level, "" if one.level is Level.ok else one.text), {})[node] = one
    shown = []
    for by_node in many.values():
        first = next(iter(by_node.values()))
        same = all(one.text == first.text for one in by_node.values())
        text = first.text if same else f"{first.text} (the first node; the others have no problem, either)"
        shown += on(by_node, [replace(first, text=text)])
    return shown


def differing(versions: Mapping[str, Mapping[str, str]], here: Mapping[str, str]) -> list[Finding]:
    """Return which versions are not those of this machine, by node."""
    found = []
    for name, known in here.items():
        driver = name == software.DRIVER
        cure = "install the same driver everywhere" if driver else "start all nodes from the same environment"
        texts = {
            node: f"{name} is {other}, and {known} where the run starts: {cure}"
            for node, there in versions.items()
            if (other := there.get(name, "unknown")) != known
        }
        found += together(texts, "versions", warning if driver else problem)
    shown = ", ".join(f"{name} {known}" for name, known in here.items())
    return found or on(versions, ok("versions", f"the same: {shown}"))


def judged_replies(offered: shared.Offer, replies: Mapping[str, shared.Reply]) -> list[Finding]:
    """Return the findings of a folder that was offered to the nodes, with its speed when the file was a large one."""
    found = together(
        {node: shared.received(offered, answer) for node, answer in replies.items()}, "shared folders", problem
    )
    if found or not replies:
        return found
    if offered.num_bytes < WRITE_BYTES:
        return on(replies, ok("shared folders", f"{offered.shown} is the same disk"))
    read = min(one.read_mb_s for one in replies.values())
    written = min(one.written_mb_s for one in replies.values())
    speed = (
        f"{offered.shown} is read at {read:.0f} MB/s and written at {written:.0f} MB/s by each node at the same time"
    )
    if min(read, written) < SLOW_MB_S:
        slowest = min(replies, key=lambda node: min(replies[node].read_mb_s, replies[node].written_mb_s))
        text = f"{speed}, checkpoints need {SLOW_MB_S:.0f}: put it on a faster disk"
        return on([slowest], warning("shared folders", text))
    return on(replies, ok("shared folders", speed))


def clocks(known: Mapping[str, NodeClock | None]) -> list[Finding]:
    """Return the findings of the nodes' clocks, None: not told. A skew counts beyond what the round trip explains."""
    texts = {}
    for node, clock in known.items():
        if clock is None:
            texts[node] = "the clock was not told: see whether the machine and its Ray are alive"
        elif (off := abs(clock.ahead_s) - clock.within_s) > MAX_SKEW_S:
            which = "ahead of" if clock.ahead_s > 0 else "behind"
            texts[node] = f"the clock is {off:.1f} s or more {which} that where the run starts: start chrony or ntpd"
    worst = max((abs(clock.ahead_s) + clock.within_s for clock in known.values() if clock is not None), default=0.0)
    shown = ok("clock", f"at most {1000 * worst:.0f} ms from the clock where the run starts")
    return together(texts, "clock", warning) or on(known, shown)


def unreached(lacking: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Return which nodes do not reach which, and why, given {from: {to: why}}."""
    cure = "let all ports pass between the nodes, and start Ray with --node-ip-address of the network that they share"
    found = []
    for node, others in lacking.items():
        for why in dict.fromkeys(others.values()):
            there = named([other for other, said in others.items() if said == why])
            found += on([node], problem("network", f"no connection to {there} ({why}): {cure}"))
    return found or on(lacking, ok("network", "every node reaches every other"))
