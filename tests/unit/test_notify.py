"""What the service manager hears, over real sockets."""

import os
import socket

import pytest

from agent.notify import Supervisor, supervisor

MS = 1_000_000
WATCHDOG_S = 2.0


class Listener:
    """The service manager's end."""

    def __init__(self, address):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.setblocking(False)

    def heard(self):
        """Return what came since the last call."""
        messages = []
        while True:
            try:
                messages.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return messages

    def close(self):
        self._socket.close()


@pytest.fixture
def listener(tmp_path):
    one = Listener(str(tmp_path / "notify"))
    yield one
    one.close()


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self):
        self.now_ns = 5_000 * MS

    def __call__(self):
        return self.now_ns


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def service(tmp_path, listener, clock):
    return Supervisor(str(tmp_path / "notify"), WATCHDOG_S, monotonic_ns=clock)


def test_the_first_heartbeat_says_ready(service, listener, clock):
    service.heartbeat(0)
    assert listener.heard() == []
    service.heartbeat(clock.now_ns)
    assert listener.heard() == ["READY=1"]


def test_the_watchdog_is_fed_a_few_times_per_interval_by_a_line_that_moves(service, listener, clock):
    heard = []
    for _ in range(400):
        service.heartbeat(clock.now_ns)
        clock.now_ns += 20 * MS
        heard += listener.heard()
    fed = [message for message in heard if message == "WATCHDOG=1"]
    assert 8 / WATCHDOG_S * 2 <= len(fed) <= 8 / WATCHDOG_S * 4


def test_a_heartbeat_that_stands_still_feeds_nobody_however_often_it_is_told(service, listener, clock):
    stood_ns = clock.now_ns
    for _ in range(400):
        service.heartbeat(stood_ns)
        clock.now_ns += 20 * MS
    assert listener.heard() == ["READY=1"]


def test_without_a_watchdog_it_only_says_ready(tmp_path, listener, clock):
    service = Supervisor(str(tmp_path / "notify"), monotonic_ns=clock)
    for _ in range(100):
        service.heartbeat(clock.now_ns)
        clock.now_ns += 100 * MS
    assert listener.heard() == ["READY=1"]


def test_status_is_one_line_and_the_end_asks_for_time(service, listener):
    service.status("paused:\n shift\tchange")
    service.stopping()
    service.extend(1.5)
    assert listener.heard() == ["STATUS=paused: shift change", "STOPPING=1", "EXTEND_TIMEOUT_USEC=1500000"]


def test_an_abstract_socket_is_reached_too():
    name = f"taktsight-{os.getpid()}"
    listener = Listener(f"\0{name}")
    supervisor({"NOTIFY_SOCKET": f"@{name}"}).stopping()
    assert listener.heard() == ["STOPPING=1"]
    listener.close()


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1234"}])
def test_without_a_socket_it_is_silent(environment):
    service = supervisor(environment)
    assert not service.is_there
    service.heartbeat(1)
    service.stopping()


@pytest.mark.parametrize(
    ("pid", "interval", "wanted"),
    [(os.getpid(), "2000000", 2.0), (None, "2000000", 2.0), (1, "2000000", None), (None, "0", None), (None, "x", None)],
)
def test_the_watchdog_is_ours_if_it_names_us(tmp_path, pid, interval, wanted):
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": interval}
    assert supervisor(environment | ({} if pid is None else {"WATCHDOG_PID": str(pid)})).watchdog_s == wanted


def test_ready_is_said_again_until_somebody_heard_it(tmp_path, clock):
    service = Supervisor(str(tmp_path / "later"), WATCHDOG_S, monotonic_ns=clock)
    service.heartbeat(clock.now_ns)
    listener = Listener(str(tmp_path / "later"))
    for _ in range(3):
        clock.now_ns += 20 * MS
        service.heartbeat(clock.now_ns)
    assert listener.heard() == ["READY=1"]
    listener.close()


def test_a_service_manager_that_is_gone_is_said_once_and_stops_nothing(tmp_path, caplog):
    service = Supervisor(str(tmp_path / "nobody"))
    service.status("one")
    service.status("two")
    assert len(caplog.records) == 1
