"""Settings of rollout: engines, agent, compaction, sandbox."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from machine.settings import setting


class PauseMode(str, Enum):
    """What happens to running requests while weights are swapped."""

    retract = "retract"  # back to the queue, recomputed under the new weights: exact
    in_place = "in_place"  # go on with the old KV cache: fast, off-policy after the swap


@dataclass(frozen=True)
class EngineConfig:
    """SGLang servers."""

    num_engines: int = setting(1, "SGLang servers that sample.", bounds="[1, inf)", unit="engines")
    tensor_parallel: int = setting(
        1, "Processes, and GPUs, that share the tensors of one engine.", bounds="[1, inf)", unit="processes"
    )
    max_running_requests: int = setting(
        128, "Requests that one engine decodes at once.", bounds="[1, inf)", unit="requests"
    )
    max_total_tokens: int = setting(
        0, "Size of an engine's KV cache; 0: SGLang decides from memory.", bounds="[0, inf)", unit="tokens"
    )
    memory_fraction: float = setting(0.8, "Part of a GPU's memory for weights and KV cache.", bounds="(0, 1)")
    pause: PauseMode = setting(PauseMode.retract, "What happens to running requests while weights are swapped.")
    delta: bool = setting(False, "After the first publication, send only the elements that changed.")
    start_timeout_s: float = setting(600.0, "How long an engine may take to start.", bounds="(0, inf)", unit="s")
    request_timeout_s: float = setting(
        600.0,
        "How long one request to an engine may take; episodes and evaluations make many.",
        bounds="(0, inf)",
        unit="s",
    )
    options: dict[str, Any] = setting({}, "Any other argument of SGLang's server, e.g. {chunked_prefill_size: 512}.")


@dataclass(frozen=True)
class SandboxConfig:
    """Where tools run."""

    allow_unsafe: bool = setting(False, "Run tools in a plain subprocess where bubblewrap can't run.")
    run_timeout_s: float = setting(10.0, "Wall-clock limit of one tool run.", bounds="(0, inf)", unit="s")
    memory_mb: int = setting(256, "Address space of one tool run.", bounds="[16, inf)", unit="MiB")
    num_prestarted: int = setting(
        4, "Idle sandboxes that each rollout worker keeps ready.", bounds="[0, inf)", unit="sandboxes"
    )


@dataclass(frozen=True)
class CompactionConfig:
    """When and how the policy condenses its context."""

    context_tokens: int = setting(
        65536, "Window of the agent: the prompt and everything since.", bounds="[1, inf)", unit="tokens"
    )
    reserve_tokens: int = setting(
        10240, "Compaction starts when less of the window is left.", bounds="[1, inf)", unit="tokens"
    )
    summary_tokens: int = setting(2048, "Budget of a summary.", bounds="[1, inf)", unit="tokens")
    keep_steps: int = setting(
        2,
        "Last pairs of action and observation that are carried over, fewer if they do not fit.",
        bounds="[0, inf)",
        unit="pairs",
    )
    max_compactions: int = setting(
        3, "Compactions of one episode; 0: the episode ends with its window.", bounds="[0, inf)", unit="compactions"
    )

    @property
    def max_prompt_tokens(self) -> int:
        """Return the longest task, with its markup, that leaves room for a turn."""
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


@dataclass(frozen=True)
class RolloutConfig:
    """Episodes: who runs them and their budgets."""

    num_workers: int = setting(1, "Ray actors that run episodes.", bounds="[1, inf)", unit="workers")
    episodes_in_flight: int = setting(
        128, "Episodes that each worker runs at once.", bounds="[1, inf)", unit="episodes"
    )
    max_turns: int = setting(50, "Turns of one episode.", bounds="[1, inf)", unit="turns")
    max_turn_tokens: int = setting(8192, "Sampled tokens of one turn.", bounds="[1, inf)", unit="tokens")
    engine: EngineConfig = field(default_factory=EngineConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    compaction: CompactionConfig = field(default_factory=CompactionConfig)
