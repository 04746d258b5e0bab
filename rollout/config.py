"""Settings of rollout: engines, episodes, compaction, sandbox."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from machine.settings import setting


class PauseMode(str, Enum):
    """The treatment of running requests while weights are swapped."""

    retract = "retract"  # requests return to the queue and are recomputed under the new weights: exact
    in_place = "in_place"  # requests continue with the old KV cache: fast, off-policy after the swap


@dataclass(frozen=True)
class EngineConfig:
    """SGLang servers."""

    num_engines: int = setting(1, "Number of SGLang servers.", bounds="[1, inf)", unit="engines")
    tensor_parallel: int = setting(
        1, "Tensor-parallel size of one engine: one process and one GPU each.", bounds="[1, inf)", unit="processes"
    )
    max_running_requests: int = setting(
        128, "Maximum number of requests that one engine decodes at once.", bounds="[1, inf)", unit="requests"
    )
    max_total_tokens: int = setting(
        0, "Size of an engine's KV cache; 0: SGLang sets it from the memory.", bounds="[0, inf)", unit="tokens"
    )
    memory_fraction: float = setting(0.8, "Fraction of a GPU's memory for weights and KV cache.", bounds="(0, 1)")
    pause: PauseMode = setting(PauseMode.retract, "Treatment of running requests while weights are swapped.")
    delta: bool = setting(False, "Send only the changed elements after the first publication.")
    start_timeout_s: float = setting(600.0, "Time limit for the start of an engine.", bounds="(0, inf)", unit="s")
    request_timeout_s: float = setting(
        600.0,
        "Time limit of one request to an engine; an episode makes many requests.",
        bounds="(0, inf)",
        unit="s",
    )
    options: dict[str, Any] = setting({}, "Other arguments of SGLang's server, e.g. {chunked_prefill_size: 512}.")


@dataclass(frozen=True)
class SandboxConfig:
    """The sandboxes in which tools run."""

    allow_unsafe: bool = setting(False, "Run tools in a plain subprocess if bubblewrap does not work.")
    run_timeout_s: float = setting(10.0, "Wall-clock limit of one tool run.", bounds="(0, inf)", unit="s")
    memory_mb: int = setting(256, "Maximum address space of one tool run.", bounds="[16, inf)", unit="MiB")
    num_prestarted: int = setting(
        4, "Idle sandboxes that each rollout worker keeps ready.", bounds="[0, inf)", unit="sandboxes"
    )


@dataclass(frozen=True)
class CompactionConfig:
    """Compaction of a context that fills the window."""

    context_tokens: int = setting(
        65536, "Context window of the agent, including the prompt.", bounds="[1, inf)", unit="tokens"
    )
    reserve_tokens: int = setting(
        10240, "Compaction starts when less than this is left of the window.", bounds="[1, inf)", unit="tokens"
    )
    summary_tokens: int = setting(2048, "Maximum length of a summary.", bounds="[1, inf)", unit="tokens")
    keep_steps: int = setting(
        2,
        "Number of last action-observation pairs to carry over; fewer if they do not fit.",
        bounds="[0, inf)",
        unit="pairs",
    )
    max_compactions: int = setting(
        3,
        "Maximum number of compactions in one episode; 0: a full window ends the episode.",
        bounds="[0, inf)",
        unit="compactions",
    )

    @property
    def max_prompt_tokens(self) -> int:
        """Return the maximum length of a prompt, including markup, that leaves room for a turn."""
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
    """Rollout workers and the budgets of an episode."""

    num_workers: int = setting(1, "Number of Ray actors that run episodes.", bounds="[1, inf)", unit="workers")
    episodes_in_flight: int = setting(
        128, "Number of episodes that each worker runs concurrently.", bounds="[1, inf)", unit="episodes"
    )
    max_turns: int = setting(50, "Maximum number of turns in one episode.", bounds="[1, inf)", unit="turns")
    max_turn_tokens: int = setting(
        8192, "Maximum number of sampled tokens in one turn.", bounds="[1, inf)", unit="tokens"
    )
    engine: EngineConfig = field(default_factory=EngineConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    compaction: CompactionConfig = field(default_factory=CompactionConfig)
