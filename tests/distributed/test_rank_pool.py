"""The harness itself: a rank that fails must fail the test, with its words, and not the tests after it."""

from __future__ import annotations

import engine_cases as cases
import pytest
from rank_pool import RankFailure


def test_results_come_back_in_rank_order(ranks) -> None:
    assert ranks(3).run(cases.answer, "x") == [(0, "x", 3.0), (1, "x", 3.0), (2, "x", 3.0)]


@pytest.mark.parametrize(
    ("case", "words"),
    [(cases.fail_on, "this is rank 1 speaking"), (cases.die_on, "exit code 9\nlast words")],
)
def test_a_failing_rank_is_quoted_and_replaced(ranks, case, words) -> None:
    with pytest.raises(RankFailure, match=words):
        ranks(2).run(case, 1)
    assert ranks(2).run(cases.answer, 5)[1] == (1, 5, 2.0)


def test_a_rank_that_hangs_is_not_waited_for(ranks) -> None:
    with pytest.raises(RankFailure, match="did not answer in time"):
        ranks(2).run(cases.hang_on, 0, timeout=2)
    assert ranks(2).run(cases.answer, 6)[0] == (0, 6, 2.0)


def test_engines_are_freed_between_cases(ranks) -> None:
    """Else the long-lived processes would end in a heap of old engines."""
    pool = ranks(2)
    strategies = "ddp", "fsdp", "zero3"
    for strategy in strategies:  # what libraries keep for ever, they keep after the first engine
        pool.run(cases.build_and_drop, cases.Spec(strategy), 1)
    before = max(pool.run(cases.resident_bytes))
    for strategy in strategies:
        pool.run(cases.build_and_drop, cases.Spec(strategy), 3)
    assert max(pool.run(cases.resident_bytes)) - before < 16 << 20
