"""Commands wait for their turn; what does not get one is counted."""

from __future__ import annotations

from agent.commands.commands import Commands, MemoryOperations
from agent.commands.log import CommandLog
from agent.commands.thread import MOST_WAITING, CommandThread
from agent.publishing.publisher import Incoming


def test_a_flood_is_dropped_refused_and_counted_and_changes_nothing(tmp_path):
    operations, log = MemoryOperations(), CommandLog(tmp_path, "cell7")
    thread = CommandThread(Commands(operations, log, station="cell7", run="0" * 12, allow=frozenset({"pause"})))
    for _ in range(MOST_WAITING + 5):
        thread.put(Incoming("pause", b"nonsense", retained=False, correlation=None))
    assert thread.counters()["commands_dropped"] == 5
    replies = []
    thread.reply = lambda name, message, correlation: replies.append(message["result"])
    thread.start()
    while thread.counters()["commands_refused"] < MOST_WAITING:
        pass
    thread.stop()
    log.close()
    assert set(replies) == {"refused"}
    assert operations.calls == []
