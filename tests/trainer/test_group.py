"""What a role's ranks are sent: each data-parallel row gets its own columns, whatever the number of its processes."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from roles import batch_of, layout_of, random_targets, seven_sub_traces

import trainer.group
from buffer.types import Scores, TokenColumn
from trainer.config import PolicyConfig
from trainer.group import PolicyGroup, reduced
from trainer.worker import UpdateResult


def test_a_row_of_ranks_gets_the_columns_of_its_own_sub_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.group, "ray", SimpleNamespace(put=lambda value: value))
    calls: list[Any] = []

    def update(*arguments: Any) -> Future[Any]:
        calls.append(arguments)
        return Future()

    traces = seven_sub_traces()
    layout = layout_of({"num_processes": 4, "tensor_parallel": 2, "max_tokens_per_micro_batch": 64})
    config = PolicyConfig(*layout, num_minibatches=2, num_epochs=2)
    rank: Any = SimpleNamespace(update=SimpleNamespace(remote=update))
    group = PolicyGroup([rank] * 4, config, 10.0)
    old = TokenColumn((i, trace.logprobs) for i, trace in enumerate(traces))
    ones = [np.ones(len(trace.tokens), np.float32) for trace in traces]
    rng = np.random.default_rng(0)
    group.update(batch_of(traces), traces, random_targets(traces), Scores(old_logprobs=old), ones, rng)
    assert len(calls) == 4 * config.num_epochs
    for _, rows, grids in calls:
        assert len(rows) == config.data_parallel == 2
        for number, columns in enumerate(rows):
            wanted = {index for grid in grids for micro in grid[number] for index in micro}
            assert 0 < len(wanted) < len(traces)
            assert all(set(column) == wanted for column in columns.values())
        assert sorted(index for columns in rows for index in columns["advantages"]) == list(range(len(traces)))
        assert all(rows[n]["old_logprobs"][i] is traces[i].logprobs for n in range(2) for i in rows[n]["weights"])


def test_columns_are_joined_and_cut_by_sub_trace() -> None:
    one, two = (np.full(3, x, np.float32) for x in (1.0, 2.0))
    joined = TokenColumn.joined([TokenColumn({4: one}), TokenColumn(), TokenColumn({2: two})])
    assert list(joined) == [4, 2]
    assert list(joined.part([2]).items()) == [(2, two)]
    with pytest.raises(KeyError):
        joined.part([3])


def test_results_of_ranks_are_means_over_tokens_and_over_steps() -> None:
    silent = UpdateResult({}, {}, (3.0, 5.0), (0.5, 0.5))  # of a rank whose tokens another one reports
    results = [
        UpdateResult({"loss": 6.0, "tokens": 2.0, "gradient/final": 1.0}, {"ratio_max": 1.5}, (3.0, 5.0), (0.5, 0.5)),
        silent,
        UpdateResult({"loss": 2.0, "tokens": 2.0, "gradient/final": 3.0}, {"ratio_max": 2.5}, (3.0, 5.0), (0.5, 0.5)),
    ]
    found = reduced(results)
    assert found == {"loss": 2.0, "ratio_max": 2.5, "grad_norm": 4.0, "lr": 0.5, "gradient_share/final": 1.0}
