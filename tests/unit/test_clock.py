from datetime import UTC, datetime, timedelta

import pytest

from agent.clock import ASK_KERNEL_EVERY_NS, StationClock, kernel_says_synchronized

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
MS = 1_000_000


class Hands:
    """Two clocks that a test moves: `pass_ms` moves both, `turn_ms` the wall clock alone."""

    def __init__(self):
        self.monotonic_ns = 7_000_000 * MS  # the machine has been up for a while
        self.wall_ns = int(NOON.timestamp()) * 1000 * MS
        self.synchronized = True
        self.asked = 0

    def pass_ms(self, duration_ms):
        self.monotonic_ns += round(duration_ms * MS)
        self.wall_ns += round(duration_ms * MS)

    def turn_ms(self, step_ms):
        self.wall_ns += round(step_ms * MS)

    def is_synchronized(self):
        self.asked += 1
        return self.synchronized


@pytest.fixture
def hands():
    return Hands()


@pytest.fixture
def clock(hands):
    return StationClock(
        wall_ns=lambda: hands.wall_ns,
        monotonic_ns=lambda: hands.monotonic_ns,
        is_synchronized=hands.is_synchronized,
    )


def test_a_stamp_says_utc_and_the_time_since_the_run_began(hands, clock):
    hands.pass_ms(1500.25)
    stamp = clock.stamp()
    assert stamp.created_utc == NOON + timedelta(milliseconds=1500.25)
    assert stamp.created_utc.tzinfo is UTC
    assert (stamp.monotonic_ms, stamp.clock_step_ms, stamp.synchronized) == (1500.25, 0.0, True)


def test_a_moment_that_has_passed_is_stamped_with_its_own_time(hands, clock):
    hands.pass_ms(1000)
    moment_ns = hands.monotonic_ns
    hands.pass_ms(400)
    stamp = clock.stamp(moment_ns)
    assert stamp.created_utc == NOON + timedelta(seconds=1)
    assert stamp.monotonic_ms == 1000.0


def test_a_clock_that_is_started_again_in_the_same_run_counts_on(hands):
    began_ns = hands.monotonic_ns
    hands.pass_ms(500)
    waiting_ns = hands.monotonic_ns
    hands.pass_ms(250)
    again = StationClock(
        wall_ns=lambda: hands.wall_ns,
        monotonic_ns=lambda: hands.monotonic_ns,
        is_synchronized=hands.is_synchronized,
        began_ns=began_ns,
    )
    hands.pass_ms(50)
    assert (again.stamp(waiting_ns).monotonic_ms, again.stamp().monotonic_ms) == (500.0, 800.0)


@pytest.mark.parametrize("step_ms", [100.5, -100.5, 3_600_000, -3_600_000, 365 * 86_400_000])
def test_a_step_of_the_wall_clock_is_said_once_and_the_order_stays(hands, clock, step_ms):
    hands.pass_ms(50)
    before = clock.stamp()
    hands.pass_ms(50)
    hands.turn_ms(step_ms)
    stepped = clock.stamp()
    hands.pass_ms(50)
    after = clock.stamp()
    assert (before.clock_step_ms, stepped.clock_step_ms, after.clock_step_ms) == (0.0, step_ms, 0.0)
    assert (before.monotonic_ms, stepped.monotonic_ms, after.monotonic_ms) == (50.0, 100.0, 150.0)
    assert stepped.created_utc == NOON + timedelta(milliseconds=100 + step_ms)
    assert clock.last_step_ms == step_ms


def test_a_step_between_a_moment_and_its_stamp_is_said_and_the_new_wall_clock_is_taken(hands, clock):
    moment_ns = hands.monotonic_ns
    hands.pass_ms(10)
    hands.turn_ms(60_000)
    stamp = clock.stamp(moment_ns)
    assert (stamp.clock_step_ms, stamp.created_utc) == (60_000.0, NOON + timedelta(minutes=1))


@pytest.mark.parametrize("turn_ms", [99.0, -99.0])
def test_less_than_100_ms_is_no_step_but_is_followed(hands, clock, turn_ms):
    hands.turn_ms(turn_ms)
    stamp = clock.stamp()
    assert stamp.clock_step_ms == clock.last_step_ms == 0.0
    assert stamp.created_utc == NOON + timedelta(milliseconds=turn_ms)


def test_the_gentle_turning_of_ntp_is_no_step_however_long_no_part_comes(hands, clock):
    an_hour_ms = 3_600_000
    hands.pass_ms(an_hour_ms)
    hands.turn_ms(an_hour_ms * 500e-6)  # the most that the kernel turns: 1.8 s in an hour
    assert clock.stamp().clock_step_ms == 0.0
    hands.pass_ms(1000)
    hands.turn_ms(150)
    assert clock.stamp().clock_step_ms == 150.0


def test_the_kernel_is_asked_about_synchronisation_now_and_then_only(hands, clock):
    hands.synchronized = False
    stamps = []
    for _ in range(20):
        hands.pass_ms(ASK_KERNEL_EVERY_NS / MS / 10)
        stamps.append(clock.stamp().synchronized)
    assert stamps == [True] * 9 + [False] * 11
    assert hands.asked == 3


def test_without_an_answer_of_the_kernel_the_stamp_does_not_guess(hands):
    assert StationClock(is_synchronized=lambda: None).stamp().synchronized is None


def test_the_kernel_of_this_machine_answers_or_says_that_it_does_not():
    assert kernel_says_synchronized() in (True, False, None)


def test_the_real_clocks_give_stamps_in_order_close_to_now():
    clock = StationClock()
    stamps = [clock.stamp() for _ in range(100)]
    assert [stamp.monotonic_ms for stamp in stamps] == sorted(stamp.monotonic_ms for stamp in stamps)
    assert abs(stamps[0].created_utc - datetime.now(UTC)) < timedelta(minutes=1)


def test_a_thread_put_aside_between_two_clocks_sees_no_step(hands):
    stalls = iter([0, 0, 0, 0, 300, 0, 0, 0, 0, 0, 0, 0])

    def slow_wall():
        hands.pass_ms(next(stalls, 0))
        return hands.wall_ns

    clock = StationClock(
        wall_ns=slow_wall, monotonic_ns=lambda: hands.monotonic_ns, is_synchronized=hands.is_synchronized
    )
    for _ in range(8):
        hands.pass_ms(50)
        assert clock.stamp().clock_step_ms == 0.0
    assert clock.last_step_ms == 0.0
