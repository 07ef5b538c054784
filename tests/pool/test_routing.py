"""Where requests go."""

from rlorch.pool.routing import MAX_PREFIXES, ReplicaLoad, Request, Router, has_room


def replica(name: str, tokens: float = 0, *, window: int = 8, open_: bool = True) -> ReplicaLoad:
    return ReplicaLoad(name, window, 0, tokens, open_)


def test_a_new_request_goes_to_the_least_loaded_open_replica_and_ties_go_by_name():
    router, request = Router(), Request(1, 10)
    assert router.choose(request, [replica("b", 5), replica("a", 9), replica("c", 2, open_=False)]) == "b"
    assert router.choose(request, [replica("b", 5), replica("a", 5)]) == "a"
    assert router.choose(request, [replica("a", open_=False)]) is None
    assert router.choose(request, []) is None


def test_load_is_relative_to_the_window():
    assert Router().choose(Request(1, 10), [replica("small", 100, window=4), replica("big", 300, window=32)]) == "big"


def test_a_session_waits_for_its_replica_while_that_is_routable_and_moves_when_it_is_not():
    router, request = Router(), Request(1, 10, session="s")
    router.sent(request, "a")
    assert router.choose(request, [replica("a", 900), replica("b")]) == "a"
    assert router.choose(request, [replica("a", open_=False), replica("b")]) is None
    assert router.choose(request, [replica("b"), replica("c")]) == "b"


def test_a_prompt_goes_where_it_went_before_only_within_the_load_bound():
    router, request = Router(), Request(1, 10, prefix=7)
    router.sent(request, "b")
    assert router.choose(request, [replica("a", 80), replica("b", 120)]) == "b"
    assert router.choose(request, [replica("a", 70), replica("b", 130)]) == "a"
    assert router.choose(request, [replica("a", 90), replica("b", 80, open_=False)]) == "a"


def test_a_lost_replica_is_forgotten():
    router, request = Router(), Request(1, 10, session="s", prefix=7)
    router.sent(request, "b")
    router.forget("b")
    assert router.choose(request, [replica("a"), replica("b")]) == "a"


def test_memory_of_placements_is_bounded():
    router = Router()
    for prefix in range(MAX_PREFIXES + 1):
        router.sent(Request(1, 1, prefix=prefix), "b")
    pool = [replica("a", 1), replica("b", 1)]
    assert router.choose(Request(1, 1, prefix=0), pool) == "a"
    assert router.choose(Request(1, 1, prefix=1), pool) == "b"


def test_a_request_larger_than_the_window_enters_alone():
    assert has_room(window=4, in_flight=0, sequences=8)
    assert not has_room(window=4, in_flight=1, sequences=8)
    assert has_room(window=4, in_flight=3, sequences=1)
    assert not has_room(window=4, in_flight=3, sequences=2)
