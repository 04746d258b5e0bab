"""Settings of rollout: engines, agent, compaction, sandbox."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class PauseMode(str, Enum):
    """What happens to running requests while weights are swapped."""

    retract = "retract"  # back to the queue, recomputed under the new weights: exact
    in_place = "in_place"  # go on with the old KV cache: fast, off-policy after the swap


@dataclass
class EngineConfig:
    """SGLang servers."""

    num_engines: int = 1
    tensor_parallel: int = 1
    max_running_requests: int = 128
    max_total_tokens: int = 0  # KV cache size in tokens; 0: SGLang decides from memory
    memory_fraction: float = 0.8  # of a GPU, for weights and KV cache
    attention: str = ""  # SGLang's attention backend on a GPU, e.g. "triton"; "": its own choice
    pause: PauseMode = PauseMode.retract
    delta: bool = False  # True: after the first publication only elements that changed are sent
    start_timeout_s: float = 600.0
    request_timeout_s: float = 600.0  # one request; episodes and evaluations make many


@dataclass
class SandboxConfig:
    """Where tools run."""

    allow_unsafe: bool = False  # True: a plain subprocess where bubblewrap can't run
    run_timeout_s: float = 10.0  # wall-clock limit of one tool run
    memory_mb: int = 256  # address space of a tool run
    num_prestarted: int = 4  # idle sandboxes kept ready per rollout worker


@dataclass
class CompactionConfig:
    """When and how the policy condenses its context."""

    context_tokens: int = 65536  # window of the agent: prompt + everything since
    reserve_tokens: int = 10240  # compaction starts when less than this is left
    summary_tokens: int = 2048  # budget of a summary
    keep_steps: int = 2  # last (action, observation) pairs carried over, fewer if they do not fit
    max_compactions: int = 3

    @property
    def max_prompt_tokens(self) -> int:
        """The longest task, with its markup, that leaves room for a turn."""
        return self.context_tokens - self.reserve_tokens

    def __post_init__(self) -> None:
        if self.context_tokens <= self.reserve_tokens:
            raise ValueError(
                f"rollout.compaction.context_tokens={self.context_tokens} is not above "
                f"reserve_tokens={self.reserve_tokens}: no room for a turn; "
                f"use at least {self.reserve_tokens + 1} or a smaller reserve"
            )
        if self.summary_tokens >= self.reserve_tokens:
            raise ValueError(
                f"rollout.compaction.summary_tokens={self.summary_tokens} does not fit in "
                f"reserve_tokens={self.reserve_tokens}: use at most {self.reserve_tokens - 1}"
            )


@dataclass
class RolloutConfig:
    """Episodes: who runs them and their budgets."""

    num_workers: int = 1  # Ray actors that run episodes
    episodes_in_flight: int = 128  # per worker
    max_turns: int = 50
    max_turn_tokens: int = 8192  # sampled tokens of one turn
    engine: EngineConfig = field(default_factory=EngineConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    compaction: CompactionConfig = field(default_factory=CompactionConfig)
