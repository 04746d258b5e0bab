"""Speed of `critic.advantages.advantages` on one core, in ragged tokens per second, beside a copy and other trainers.

    .venv/bin/python benchmarks/advantages.py            ours and a plain copy, about 20 seconds
    .venv/bin/python benchmarks/advantages.py --peers    verl and TRL as well (an environment of their own in .cache/)

Sub-traces of 16 to 65,536 tokens, log-uniform (half of them are shorter than 1,024, the mean is 7,900), 1 to 8 an
episode, chained by compactions. `agent`: a context, then sampled blocks between blocks of tool output; `actions`:
every token except the first is sampled, the most work per token. The measurement covers the whole public call: checks,
masks, links, the recursion for both lambdas, three float32 arrays a sub-trace. The copy is np.copyto of the 13 bytes
per token that the call reads (it writes 12), alternating with the call, so their ratio is more reliable than either.

Seconds are CPU seconds of the one thread: on a quiet machine they equal the wall-clock seconds printed beside them, and
on a busy one they are the time of the work itself. Each number is the median of several runs.

Peers get one lambda and the same sub-traces padded to the longest one, [batch, length], which is their own format. The
table says what else they do differently.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import advantages_peers
import numpy as np
from advantages_peers import environment

from buffer.types import Float32, Status, SubTrace, SubTraceKind, Successor
from critic.advantages import advantages
from critic.config import AdvantageConfig, Credit

SHORTEST, LONGEST = 16, 65_536  # tokens of a sub-trace
MAX_SUB_TRACES = 8  # of an episode
SAMPLED_BLOCK, TOOL_BLOCK = 150, 450  # mean tokens of a block, geometric
BYTES_READ = 13  # a token: mask 1, log-probability 4, reward 4, value 4
GOAL = 20e6  # tokens a second
PEER_SUB_TRACES = 512  # padded to 65,536: 134 MB a tensor, about ten of them alive


@dataclass(frozen=True)
class Data:
    """Whole episodes with values."""

    sub_traces: list[SubTrace]
    values: list[Float32]

    @property
    def num_tokens(self) -> int:
        return sum(len(trace.tokens) for trace in self.sub_traces)

    @property
    def action_share(self) -> float:
        return sum(trace.num_actions for trace in self.sub_traces) / self.num_tokens


def make_data(num_tokens: int, all_actions: bool, seed: int = 0) -> Data:
    """Return whole episodes with at least `num_tokens` tokens in total."""
    rng = np.random.default_rng(seed)
    sub_traces: list[SubTrace] = []
    total = 0
    while total < num_tokens:
        episode_id, size = f"e{len(sub_traces)}", int(rng.integers(1, MAX_SUB_TRACES + 1))
        for position in range(size):
            length = int(np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST + 1))))
            mask = np.arange(length) > 0 if all_actions else agent_mask(rng, length)
            sub_traces.append(sub_trace(mask, episode_id, position, last=position == size - 1))
            total += length
    values = [rng.normal(0.5, 0.2, len(trace.tokens)).astype(np.float32) for trace in sub_traces]
    return Data(sub_traces, values)


def agent_mask(rng: np.random.Generator, length: int) -> np.ndarray:
    """Return a mask: a context, then blocks (sampled, tool, sampled, ...); the last token is sampled."""
    mask = np.zeros(length, bool)
    at = int(rng.integers(1, max(2, min(length // 2, 2 * TOOL_BLOCK))))
    while at < length:
        end = at + int(rng.geometric(1 / SAMPLED_BLOCK))
        mask[at:end] = True
        at = end + int(rng.geometric(1 / TOOL_BLOCK))
    mask[-1] = True
    return mask


def sub_trace(mask: np.ndarray, episode_id: str, position: int, last: bool) -> SubTrace:
    length = len(mask)
    rewards = np.zeros(length, np.float32)
    rewards[-1] = float(last)
    return SubTrace(
        tokens=np.zeros(length, np.int32),
        action_mask=mask,
        logprobs=np.where(mask, -0.5, 0).astype(np.float32),
        rewards=rewards,
        versions=np.where(mask, 0, -1).astype(np.int32),
        stale_mask=np.zeros(length, bool),
        summary_mask=np.zeros(length, bool),
        episode_id=episode_id,
        position=position,
        successor=None if last else Successor(position + 1, 0),
        kind=SubTraceKind.FINAL if last else SubTraceKind.COMPACTED,
        status=Status.FINISHED,
    )


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return the CPU seconds of this thread and the wall-clock seconds of `work`."""
    began, cpu_began = time.perf_counter(), time.thread_time()
    work()
    return time.thread_time() - cpu_began, time.perf_counter() - began


def measure(name: str, data: Data, config: AdvantageConfig, repeats: int) -> float:
    """Print a row and return tokens per second."""
    source = np.ones(BYTES_READ * data.num_tokens, np.uint8)
    copy = np.empty_like(source)
    ours, copies = [], []
    _, first_s = seconds(lambda: advantages(data.sub_traces, data.values, config))
    for _ in range(repeats):
        ours.append(seconds(lambda: advantages(data.sub_traces, data.values, config)))
        copies.append(seconds(lambda: np.copyto(copy, source)))
    ours_s, wall_s = (statistics.median(column) for column in zip(*ours, strict=True))
    copy_s = statistics.median(cpu for cpu, _ in copies)
    print(
        f"| {name} | {data.num_tokens / 1e6:.1f}M in {len(data.sub_traces)} | {data.action_share:.0%} | "
        f"{data.num_tokens / ours_s / 1e6:.0f}M | {data.num_tokens / wall_s / 1e6:.0f}M | "
        f"{ours_s / copy_s:.1f} | {first_s:.2f} |",
        flush=True,
    )
    return data.num_tokens / ours_s


def padded(data: Data) -> dict[str, np.ndarray]:
    """Return [B, L] arrays of values, rewards and the mask of sampled tokens, zero after the end of a sub-trace."""
    shape = len(data.sub_traces), max(len(trace.tokens) for trace in data.sub_traces)
    columns = {"values": np.zeros(shape, np.float32), "rewards": np.zeros(shape, np.float32)}
    columns["mask"] = np.zeros(shape, np.float32)
    for row, (trace, value) in enumerate(zip(data.sub_traces, data.values, strict=True)):
        length = len(trace.tokens)
        columns["values"][row, :length] = value
        columns["rewards"][row, :length] = trace.rewards
        columns["mask"][row, :length] = trace.action_mask
    return columns


def compare(data: Data, lam: float) -> None:
    """Print the rows of the peers on the same sub-traces, padded, with the differences of their returns from ours."""
    pad_s, _ = seconds(lambda: padded(data))
    columns: dict[str, Any] = padded(data)
    for row, trace in enumerate(data.sub_traces):  # the terminal reward at every end, as `independent` has it
        columns["rewards"][row, len(trace.tokens) - 1] = 1.0
    slots = columns["mask"].size
    alone = AdvantageConfig(credit=Credit.independent, lambda_policy=lam, lambda_critic=lam)
    targets = advantages(data.sub_traces, data.values, alone)
    ours_s = statistics.median(seconds(lambda: advantages(data.sub_traces, data.values, alone))[0] for _ in range(5))
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/in.npz", **columns, lam=np.float64(lam))
        command = [str(environment()), advantages_peers.__file__, f"{folder}/in.npz", f"{folder}/out.npz"]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=3600).stdout)
        theirs = dict(np.load(f"{folder}/out.npz"))
    print(
        f"\n{data.num_tokens / 1e6:.1f}M tokens in {len(data.sub_traces)} sub-traces, {data.action_share:.0%} actions, "
        f"each an episode's end; padded to {columns['mask'].shape}: {slots / data.num_tokens:.1f} slots a token, "
        f"{slots * 12 / 1e6:.0f} MB of input, filled in {pad_s:.2f} s (not counted below).\n"
    )
    print("| function | tokens/s | slots/s | largest difference of a return from ours | what it does differently |")
    print("|---|---|---|---|---|")
    print(f"| ours, `credit: independent` | {data.num_tokens / ours_s / 1e6:.0f}M | | | |")
    for name, peer in found.items():
        gap = max(
            float(np.abs(theirs[name][row, : len(t.tokens)] - target.returns)[t.action_mask].max())
            for row, (t, target) in enumerate(zip(data.sub_traces, targets, strict=True))
        )
        spent = statistics.median(peer["seconds"])
        speeds = f"{data.num_tokens / spent / 1e6:.2f}M | {slots / spent / 1e6:.1f}M"
        print(f"| {peer['what']} | {speeds} | {gap:.1g} | {peer['differs']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8_000_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peers", action="store_true", help="measure verl and TRL, too")
    args = parser.parse_args()
    plain = AdvantageConfig(lambda_policy=0.95, lambda_critic=1.0)
    whitened = AdvantageConfig(lambda_policy=0.95, lambda_critic=1.0, whiten=True)
    print("| case | tokens, sub-traces | actions | tokens/s | tokens/s by the wall | time / copy | first call, s |")
    print("|---|---|---|---|---|---|---|")
    speeds = []
    for name, all_actions in (("agent", False), ("actions", True)):
        data = make_data(args.tokens, all_actions)
        speeds.append(measure(name, data, plain, args.repeats))
        speeds.append(measure(f"{name}, whitened", data, whitened, args.repeats))
    print(f"\nGoal {GOAL / 1e6:.0f}M tokens/s: {'met' if min(speeds) >= GOAL else 'MISSED'}.")
    if args.peers:
        data = make_data(args.tokens, all_actions=False)
        begins = [k for k, trace in enumerate(data.sub_traces) if trace.position == 0]
        count = max(k for k in begins if k <= PEER_SUB_TRACES)  # whole episodes
        compare(Data(data.sub_traces[:count], data.values[:count]), lam=0.95)


if __name__ == "__main__":
    main()
