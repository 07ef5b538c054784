"""The operation log against random arrivals, and the pure decisions beside it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlorch.errors import InvariantError, UserError
from rlorch.service import job_states, references, retention
from rlorch.service.operations import OperationLog
from rlorch.service.types import Checkpoint, Job, JobConfig


def run_all(log: OperationLog, begun: list[int], now_s: float = 0.0) -> None:
    """Begin and end whatever can be."""
    while (entry := log.begin()) is not None:
        begun.append(entry.seq_id)
        log.end(now_s)


@given(st.permutations(range(1, 12)), st.lists(st.integers(1, 11), max_size=20), st.randoms())
def test_operations_run_once_and_in_order_however_they_arrive(order: list[int], again: list[int], random) -> None:
    arrivals = [*order, *again]
    random.shuffle(arrivals)
    log, begun, ids = OperationLog(), [], {}
    for position, seq_id in enumerate(arrivals):
        accepted = log.accept(seq_id, f"r{position}", 0.0)
        assert accepted.request_id == ids.setdefault(seq_id, accepted.request_id)
        assert not accepted.stale
        if random.random() < 0.5:
            run_all(log, begun)
    run_all(log, begun)
    assert begun == list(range(1, 12))
    assert log.is_idle


Step = tuple[str, int]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("accept"), st.integers(1, 15)),
        st.tuples(st.just("begin"), st.just(0)),
        st.tuples(st.just("end"), st.just(0)),
        st.tuples(st.just("time"), st.integers(1, 20)),
        st.tuples(st.just("give up"), st.just(0)),
        st.tuples(st.just("drain"), st.just(0)),
    ),
    max_size=60,
)


@given(STEPS)
def test_no_program_begins_a_number_twice_or_out_of_order_or_loses_one(program: list[Step]) -> None:
    log, now_s = OperationLog(), 0.0
    accepted: dict[int, str] = {}
    begun: list[int] = []
    out: set[int] = set()  # began, was given up, or came too late
    running = False
    blocked_since: float | None = None
    for what, value in program:
        if what == "accept":
            answer = log.accept(value, f"r{len(accepted)}", now_s)
            assert answer.new == (value not in accepted)
            assert answer.request_id == accepted.setdefault(value, answer.request_id)
            if answer.new and answer.stale:
                out.add(value)
        elif what == "begin":
            entry = log.begin()
            assert entry is None or not running
            if entry is not None:
                assert not begun or entry.seq_id > begun[-1]
                assert entry.request_id == accepted[entry.seq_id]
                begun.append(entry.seq_id)
                out.add(entry.seq_id)
                running = True
        elif what == "end" and running:
            log.end(now_s)
            running = False
        elif what == "time":
            now_s += value
        elif what == "give up":
            overdue = log.overdue(now_s, 10.0)
            open_for = None if blocked_since is None else now_s - blocked_since
            assert (overdue is not None) == (open_for is not None and open_for >= 10.0)
            if overdue is not None:
                missing, waited = overdue
                assert missing not in accepted
                out |= {entry.seq_id for entry in waited}
        elif what == "drain":
            out |= {entry.seq_id for entry in log.drain()}
        waiting = accepted.keys() - out
        assert log.num_waiting == len(waiting)
        blocked = not running and bool(waiting) and log.next_seq_id not in waiting
        blocked_since = (now_s if blocked_since is None else blocked_since) if blocked else None
        for seq_id in waiting:
            missing = log.missing(seq_id)
            assert missing == next((n for n in range(log.next_seq_id, seq_id) if n not in waiting), None)
            assert log.position(seq_id) >= sum(other < seq_id for other in waiting)


def test_the_number_that_everybody_waits_for_is_named() -> None:
    log = OperationLog()
    for seq_id in (2, 3, 5):
        log.accept(seq_id, f"r{seq_id}", 0.0)
    assert log.missing(5) == 1
    log.accept(1, "r1", 1.0)
    assert log.begin() is not None
    assert log.missing(3) is None
    assert log.missing(5) == 4
    assert log.position(5) == 4
    assert log.unused_seq_id == 6


def test_a_number_that_comes_after_its_gap_was_given_up_never_runs() -> None:
    log = OperationLog()
    log.accept(2, "r2", 0.0)
    assert log.overdue(9.0, 10.0) is None
    overdue = log.overdue(10.0, 10.0)
    assert overdue is not None
    assert overdue[0] == 1
    late = log.accept(1, "r1", 11.0)
    assert late.stale
    assert log.begin() is None
    assert log.next_seq_id == 3


def test_ending_what_was_not_begun_is_a_bug() -> None:
    with pytest.raises(InvariantError):
        OperationLog().end(0.0)


# --- states, names, retention ------------------------------------------------------------------------------


def test_no_state_leads_out_of_deleted_and_every_other_leads_there() -> None:
    for state in job_states.NEXT:
        assert job_states.can_move(state, "DELETED") == (state != "DELETED")
        assert job_states.can_resume(state) == (state in ("FAILED", "PAUSED", "CANCELLED", "COMPLETED"))
        assert not job_states.can_move(state, state)


def test_a_move_is_an_event_and_a_move_there_is_none_of_is_a_bug() -> None:
    job = Job("one", JobConfig("tiny"), "PENDING", "", 1.0, 1.0, "/m", 16)
    job = job_states.moved(job, "CREATING", "begins", 2.0)
    assert (job.state, job.updated_s, job.events[-1].message) == ("CREATING", 2.0, "begins")
    with pytest.raises(InvariantError, match="from CREATING to PAUSED"):
        job_states.moved(job, "PAUSED", "no", 3.0)


def test_references_are_taken_apart() -> None:
    assert references.job_id("accounts/me/rlorTrainerJobs/j-1") == references.job_id("j-1") == "j-1"
    assert references.saved("step-4", "here") == ("here", "step-4")
    assert references.saved("cross_job://there/step_4", "here") == ("there", "step_4")
    name = "accounts/x/rlorTrainerJobs/j/checkpoints/step_0-ab12"
    assert references.checkpoint(name) == references.saved(name, "here") == ("j", "step_0-ab12")
    assert references.model_id("accounts/x/models/m-1") == references.model_id("m-1") == "m-1"
    assert references.model_id("/some/where") is None


@pytest.mark.parametrize(
    "ref",
    ["../x", "a/b", "/etc/passwd", "cross_job://../x", "cross_job://j/..", "cross_job://j/a/b", "file://x", "a\\b", "",
     ".x", "accounts/a/rlorTrainerJobs/../checkpoints/x"],
)  # fmt: skip
def test_a_reference_that_could_leave_the_directory_is_refused(ref: str) -> None:
    with pytest.raises(UserError):
        references.saved(ref, "here")


def snapshot(number: int, parent: int | None, expires_s: float | None) -> Checkpoint:
    kind = "base" if parent is None else "delta"
    return Checkpoint(
        "one", f"s{number}", kind, "one:policy-1", number, "d", float(number), "tiny", "p",
        number=number, parent=None if parent is None else f"s{parent}", expires_s=expires_s,
    )  # fmt: skip


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([None, 5.0, 15.0])), min_size=1, max_size=12), st.booleans())
def test_collecting_leaves_every_chain_whole_and_takes_all_that_it_may(
    makes: list[tuple[bool, float | None]], keep_newest: bool
) -> None:
    chain: list[Checkpoint] = []
    for number, (is_base, expires_s) in enumerate(makes):
        chain.append(snapshot(number, None if is_base or number == 0 else number - 1, expires_s))
    gone = {one.name for one in retention.to_collect(chain, now_s=10.0, protected=(), keep_newest=keep_newest)}
    left = [one for one in chain if one.name not in gone]
    for one in left:
        assert one.parent not in gone
    for one in chain:
        expired = one.expires_s == 5.0
        needed = any(other.parent == one.name for other in left) or (keep_newest and one is chain[-1])
        assert (one.name in gone) == (expired and not needed)


def test_what_is_in_use_keeps_its_whole_chain() -> None:
    chain = [snapshot(0, None, 1.0), snapshot(1, 0, 1.0), snapshot(2, 1, 1.0)]
    gone = retention.to_collect(chain, now_s=10.0, protected={"s1"}, keep_newest=False)
    assert [one.name for one in gone] == ["s2"]
    assert "s2" in retention.why_needed(chain[1], chain, protected=(), keep_newest=True)
    assert "delta is made against it" in retention.why_needed(chain[2], chain, protected=(), keep_newest=True)
    assert retention.why_needed(chain[2], chain, protected=(), keep_newest=False) == ""
