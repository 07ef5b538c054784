"""Progress, and its absence."""

from rlorch.pool.watchdog import Watchdog


def test_a_replica_with_work_and_no_progress_is_lost_after_the_bound():
    watchdog = Watchdog(10.0)
    assert not watchdog.check(0.0, in_flight=4, generated_tokens=5, answered=0)
    assert not watchdog.check(9.9, in_flight=4, generated_tokens=5, answered=0)
    assert watchdog.check(10.0, in_flight=4, generated_tokens=5, answered=0)


def test_progress_by_tokens_or_answers_starts_the_count_again():
    watchdog = Watchdog(10.0)
    watchdog.check(0.0, 4, 5, 0)
    assert not watchdog.check(9.0, 4, 6, 0)
    assert not watchdog.check(18.0, 4, None, 1)
    assert watchdog.check(28.0, 4, None, 1)


def test_much_in_flight_for_long_is_no_symptom():
    watchdog = Watchdog(10.0)
    assert not any(watchdog.check(float(t), 500, generated_tokens=t, answered=0) for t in range(1000))


def test_an_idle_replica_is_never_stuck_and_its_idle_time_does_not_count():
    watchdog = Watchdog(10.0)
    assert not any(watchdog.check(float(t), 0, 5, 0) for t in range(100))
    assert not watchdog.check(105.0, 1, 5, 0)
    assert watchdog.check(109.0, 1, 5, 0)


def test_a_weight_sync_is_an_excuse():
    watchdog = Watchdog(10.0)
    watchdog.check(0.0, 1, 5, 0)
    watchdog.excuse(9.0)
    assert not watchdog.check(18.9, 1, 5, 0)
    assert watchdog.check(19.0, 1, 5, 0)


def test_a_replica_that_stops_answering_polls_is_stuck_even_if_it_never_answered_one():
    watchdog = Watchdog(10.0)
    watchdog.check(0.0, 1, None, 0)
    assert watchdog.check(10.0, 1, None, 0)
