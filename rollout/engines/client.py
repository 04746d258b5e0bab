"""The HTTP client of one SGLang server: token ids in, token ids with log-probabilities and weight versions out.

Generation is token in, token out: the server never sees text. Log-probabilities are natural logarithms of the sampling
distribution. At temperature 1 this is the plain softmax, which the trainer recomputes, so only such samples may be
trained. A greedy answer (temperature 0) also has the log-probabilities of the plain softmax.

Loading new weights while requests run (the trainer broadcasts into the group between begin and end):

    pause(mode) -> begin_update() -> update_bucket(...) per bucket -> end_update() -> resume()

When weights are swapped "in_place", running requests continue with the keys and values of the old weights. Each request
then passes a cache version: the newest version whose samples this client has seen. The engine shares cached keys and
values only between requests with the same cache version. A token sampled by any other version is therefore stale.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import aiohttp
import numpy as np

from buffer.types import Bool, Float32, Int32
from rollout.config import PauseMode

MAX_CONNECTIONS = 1024  # requests in flight to one server
IDLE_CONNECTION_S = 2.0  # less than the 5 s after which the server closes an idle connection
RETRY_INTERVAL_S = 0.2


class EngineUnreachable(RuntimeError):
    """The client could not connect to the server within the time limit, or the connection broke."""


@dataclass(frozen=True)
class Generation:
    """The engine's sample for one prompt, N tokens."""

    output_ids: Int32  # [N] including the stop id, if sampling stopped at one
    logprobs: Float32  # [N] log-probability of each output id under the weights that sampled it
    versions: Int32  # [N] weight version that sampled each output id
    stale_mask: Bool  # [N] True: sampled with keys and values that another weight version computed
    finish_reason: str  # "stop" | "length" | "abort"
    cached_tokens: int  # number of prompt tokens found in the prefix cache


def parse_generation(answer: dict[str, Any], cache_version: int | None = None) -> Generation:
    """Return a Generation from the server's JSON. RuntimeError: an id without log-probability or version.

    `cache_version`: the version of the cached keys and values; None: always that of the sampling weights.
    """
    meta = answer["meta_info"]
    output_ids = np.asarray(answer["output_ids"], dtype=np.int32)
    # An aborted request that never ran has no log-probabilities at all.
    logprobs = [entry[0] for entry in meta.get("output_token_logprobs") or ()]
    versions = np.full(len(output_ids), -1, dtype=np.int32)
    for span in meta.get("weight_versions") or ():
        versions[span["start"] : span["end"]] = int(span["version"])
    if len(logprobs) != len(output_ids) or (versions < 0).any():
        raise RuntimeError(
            f"request {meta.get('id')}: {len(output_ids)} output ids came with {len(logprobs)} log-probabilities and "
            f"versions {meta.get('weight_versions')}"
        )
    return Generation(
        output_ids=output_ids,
        logprobs=np.asarray(logprobs, dtype=np.float32),
        versions=versions,
        stale_mask=np.full(len(versions), False) if cache_version is None else versions != cache_version,
        finish_reason=meta["finish_reason"]["type"],
        cached_tokens=int(meta.get("cached_tokens") or 0),
    )


class EngineClient:
    """Calls one server. Use it within one event loop; `close` (or `async with`) ends its connections.

    Every call raises RuntimeError with endpoint, status and body if the server refuses, EngineUnreachable with the
    endpoint if the server can't be reached or breaks the connection, and TimeoutError after `request_timeout_s`.
    """

    def __init__(
        self,
        url: str,
        vocab_size: int,
        context_tokens: int,
        request_timeout_s: float = 600.0,
        connect_timeout_s: float = 30.0,
        pause_mode: PauseMode = PauseMode.retract,
        key: str = "",
    ) -> None:
        self.url = url.rstrip("/")
        self.vocab_size = vocab_size
        self.context_tokens = context_tokens
        self.request_timeout_s = request_timeout_s  # for one call, from sending to the last byte of the answer
        self.connect_timeout_s = connect_timeout_s  # for all connection attempts of a call together
        self.answered = 0  # number of answered calls
        self.pause_mode = pause_mode  # that the publisher uses for this server
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._seen_version = -1  # newest version that has sampled a token for this client
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def __aenter__(self) -> EngineClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connections. A call that waits for an answer raises EngineUnreachable, and so does a later call."""
        self._closed = True
        if self._session is not None:
            await self._session.close()
            self._session = None

    # --- sampling and scoring

    async def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        temperature: float = 1.0,
        rid: str | None = None,
        *,
        seed: int | None = None,
    ) -> Generation:
        """Sample until a stop id, the model's own end-of-text id, or `max_new_tokens`.

        `max_new_tokens` is clamped to the rest of the context. `temperature` 0 is greedy. `seed`, in [0, 2^63), and the
        position of a token determine its draw if the engine draws by seeds (docs/concepts.md); None: any draw.
        ValueError: an id outside the vocabulary (it would crash the server), or a prompt that leaves no room for a
        token.
        """
        room = self.context_tokens - len(prompt_ids)
        if room < 1:
            raise ValueError(
                f"a prompt of {len(prompt_ids)} tokens leaves no room to generate in a context of "
                f"{self.context_tokens}: use at most {self.context_tokens - 1} tokens"
            )
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: use at least 1, or `score` to score a prompt")
        sampling = {
            "max_new_tokens": min(max_new_tokens, room),
            "stop_token_ids": self._checked_ids(stop_ids, "stop id"),
            "temperature": temperature,
            "top_k": -1,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            **({} if seed is None else {"sampling_seed": seed}),
        }
        request = {"input_ids": self._checked_ids(prompt_ids, "prompt"), "sampling_params": sampling, "rid": rid}
        cache_version = await self._cache_version()
        if cache_version is not None:
            request["extra_key"] = str(cache_version)  # SGLang's prefix cache has a separate tree for each key
        found = parse_generation(await self._post("/generate", {**request, "return_logprob": True}), cache_version)
        self._seen_version = max(self._seen_version, int(found.versions.max(initial=-1)))
        return found

    async def _cache_version(self) -> int | None:
        """Return the cache version of a request; None if a swap leaves no old keys and values.

        It is never newer than the engine's weights: keys and values of older weights would be cached as newer ones.
        """
        if self.pause_mode is PauseMode.retract:
            return None
        if self._seen_version < 0:
            self._seen_version = await self.version()
        return self._seen_version

    async def score(self, ids: Sequence[int]) -> Float32:
        """Return float32[len(ids) - 1]: the log-probability of each id after the first, under the loaded weights.

        ValueError: fewer than 2 ids, more than the context holds, or an id outside the vocabulary.
        """
        if not 2 <= len(ids) <= self.context_tokens:
            raise ValueError(f"can't score {len(ids)} tokens: use 2 to {self.context_tokens} (the context)")
        request = {
            "input_ids": self._checked_ids(ids, "sequence"),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0, "top_k": -1, "top_p": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        meta = (await self._post("/generate", request))["meta_info"]
        if meta["finish_reason"]["type"] == "abort":
            raise RuntimeError(f"/generate of {self.url}: scoring was aborted: {meta['finish_reason']}")
        return np.asarray([entry[0] for entry in meta["input_token_logprobs"][1:]], dtype=np.float32)

    def _checked_ids(self, ids: Sequence[int], what: str) -> list[int]:
        checked = [int(i) for i in ids]
        if checked and not (min(checked) >= 0 and max(checked) < self.vocab_size):
            position, wrong = next((p, i) for p, i in enumerate(checked) if not 0 <= i < self.vocab_size)
            raise ValueError(
                f"{what}: id {wrong} at position {position} is outside the vocabulary of {self.vocab_size} ids"
            )
        return checked

    # --- requests in flight

    async def pause(self, mode: str) -> None:
        """Stop sampling. "retract" recomputes requests on resume, "in_place" keeps their cache, "abort" ends them."""
        await self._post("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        await self._post("/continue_generation", {"torch_empty_cache": False})

    async def flush(self) -> None:
        """Empty the prefix cache. RuntimeError: requests are running (retracted requests do not count)."""
        await self._post("/flush_cache", {})

    async def abort_all(self) -> None:
        """End all requests; each returns the tokens sampled so far, with finish reason "abort"."""
        await self._post("/abort_request", {"abort_all": True})

    # --- weights

    async def init_group(
        self, host: str, port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        """Join the trainer's broadcast group. The call returns when all `world_size` members have joined."""
        request = {
            "master_address": host,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        await self._post("/init_weights_update_group", request)

    async def destroy_group(self, group_name: str) -> None:
        await self._post("/destroy_weights_update_group", {"group_name": group_name})

    async def begin_update(self) -> None:
        await self._post("/begin_weight_update", {})

    async def update_bucket(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        version: int,
        flush: bool = True,
        load_format: str | None = None,
    ) -> None:
        """Receive weights from the group's rank 0, one broadcast per weight in this order, and load them.

        `names` are those of the Hugging Face checkpoint, `dtypes` "float32", "bfloat16", ... `flush` empties the prefix
        cache afterwards, because it holds keys and values of the old weights; the engine refuses this while requests
        are paused "in_place". `load_format`: None, or the format of rollout/sglang/delta.py, which broadcasts changed
        elements only.
        """
        if not len(names) == len(dtypes) == len(shapes):
            raise ValueError(
                f"{len(names)} names, {len(dtypes)} dtypes, {len(shapes)} shapes: give one of each per weight"
            )
        request = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group_name,
            "weight_version": str(version),
            "flush_cache": flush,
            "load_format": load_format,
        }
        await self._post("/update_weights_from_distributed", request)

    async def end_update(self) -> None:
        await self._post("/end_weight_update", {})

    async def release_memory(self) -> None:
        """Free the GPU memory of weights and KV cache. Requires `ServerSettings.yields_memory` and an idle engine.

        The contents are lost: after `resume_memory` every weight must be published again.
        """
        await self._post("/release_memory_occupation", {"tags": ["kv_cache", "weights"]})

    async def resume_memory(self) -> None:
        """Allocate the released GPU memory again."""
        await self._post("/resume_memory_occupation", {"tags": ["weights", "kv_cache"]})

    async def set_version(self, version: int) -> None:
        """Set the version of the loaded weights without changing them or ending requests."""
        await self._post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    async def version(self) -> int:
        """Return the version of the loaded weights."""
        return int((await self._request("GET", "/model_info", None))["weight_version"])

    async def checksums(self) -> list[dict[str, str]]:
        """Return {engine's tensor name: hash} for each tensor-parallel rank; equal weights have equal hashes."""
        answer = await self._post("/weights_checker", {"action": "checksum"})
        return [rank["checksums"] for rank in answer["ranks"]]

    async def scramble(self) -> None:
        """Overwrite every tensor that `checksums` covers with random numbers; the next update restores them."""
        await self._post("/weights_checker", {"action": "reset_tensors"})

    # --- transport

    async def _post(self, endpoint: str, body: dict[str, Any]) -> Any:
        return await self._request("POST", endpoint, body)

    async def _request(self, method: str, endpoint: str, body: dict[str, Any] | None) -> Any:
        """Return the answer's JSON, or its text. Only a failed connection is retried: nothing was sent over it."""
        deadline = time.monotonic() + self.connect_timeout_s
        while True:
            if self._closed:
                raise EngineUnreachable(f"{endpoint}: {self.url} is no longer used")
            try:
                answer = await self._attempt(method, endpoint, body)
                self.answered += 1
                return answer
            except aiohttp.ClientConnectorError as error:
                if time.monotonic() + RETRY_INTERVAL_S > deadline:
                    raise EngineUnreachable(
                        f"{endpoint}: no connection to {self.url} within {self.connect_timeout_s} s: {error}"
                    ) from error
            except aiohttp.ClientError as error:
                raise EngineUnreachable(f"{endpoint}: {self.url} broke the connection: {error!r}") from error
            await asyncio.sleep(RETRY_INTERVAL_S)

    async def _attempt(self, method: str, endpoint: str, body: dict[str, Any] | None) -> Any:
        try:
            async with self._open_session().request(method, self.url + endpoint, json=body) as response:
                if response.status != 200:
                    text = await response.text()
                    raise RuntimeError(f"{endpoint}: {self.url} answered {response.status}: {text[:2000]}")
                if response.content_type == "application/json":
                    return await response.json()
                return await response.text()
        except TimeoutError as error:
            raise TimeoutError(f"{endpoint}: no answer from {self.url} within {self.request_timeout_s} s") from error

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS, keepalive_timeout=IDLE_CONNECTION_S),
                timeout=aiohttp.ClientTimeout(total=self.request_timeout_s, sock_connect=self.connect_timeout_s),
            )
        return self._session
