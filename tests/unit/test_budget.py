"""What is left out to keep a deadline, and when a part is given up."""

import pytest

from agent.line.budget import CUTTABLE, DECIDE_NS, FEWEST, REMEMBERED, Budget, Costs

MS = 1_000_000
ORDER = ("picture", "regions")


def costs(**stages_ms):
    """Stages that took 1 ms less, this long and 1 ms more, again and again."""
    made = Costs()
    for stage, duration_ms in stages_ms.items():
        for number in range(FEWEST):
            made.note(stage, (duration_ms + number % 3 - 1) * MS)
    return made


def budget(left_ms, made):
    return Budget(round(left_ms * MS) + DECIDE_NS, made, cuttable=ORDER, monotonic_ns=lambda: 0)


def test_with_time_enough_nothing_is_cut():
    one = budget(20, costs(picture=4, regions=3))
    assert [one.allows(stage) for stage in ORDER] == [True, True]
    assert one.cut == []


def test_what_people_can_do_without_goes_in_the_declared_order():
    made = costs(picture=4, regions=3)
    assert [budget(left, made).allows("picture") for left in (9, 8.99)] == [True, False]  # with the regions after it
    made = costs(picture=4, regions=3)
    assert [budget(left, made).allows("regions") for left in (4, 3.99)] == [True, False]
    made = Costs()
    for stage in ORDER:
        for _ in range(REMEMBERED):
            made.note(stage, 3 * MS)
    one = budget(1, made)
    assert [one.allows(stage) for stage in ORDER] == [False, False]
    assert tuple(one.cut) == ORDER


def test_a_part_is_given_up_only_where_even_the_quickest_would_be_late():
    made = costs(engine=10)
    assert not budget(9, made).is_hopeless("engine")  # as quick as it ever was: 9 ms
    assert budget(8.99, made).is_hopeless("engine")


@pytest.mark.parametrize("deadline_ns", [None, DECIDE_NS])
def test_what_is_not_known_yet_is_tried(deadline_ns):
    made = Costs()
    for _ in range(FEWEST - 1):
        made.note("engine", 10 * MS)
        made.note("regions", 10 * MS)
    one = Budget(deadline_ns, made, cuttable=ORDER, monotonic_ns=lambda: 0)
    assert not one.is_hopeless("engine")
    assert one.allows("regions")


def test_without_a_deadline_there_is_no_hurry():
    one = Budget(None, costs(regions=3, engine=1000), monotonic_ns=lambda: 10**18)
    assert all(one.allows(stage) for stage in CUTTABLE)
    assert not one.is_hopeless("engine")


def test_a_slow_part_is_forgotten_in_time():
    made = costs(regions=50)
    for _ in range(REMEMBERED):
        made.note("regions", MS)
    assert made.most_ns(("regions",)) == MS


def test_what_was_given_up_under_a_load_is_tried_again_after_it():
    made = Costs()
    for _ in range(REMEMBERED):
        made.note("engine", 60 * MS)  # a load that passes
    parts = 0
    while budget(45, made).is_hopeless("engine"):
        parts += 1
        assert parts <= REMEMBERED // FEWEST
    for _ in range(FEWEST):
        made.note("engine", 10 * MS)
    assert not budget(45, made).is_hopeless("engine")


def test_what_was_cut_under_a_load_is_tried_again_after_it():
    made = costs(picture=50, regions=50)
    parts = 0
    while not budget(45, made).allows("picture"):
        parts += 1
        assert parts <= REMEMBERED // FEWEST
