import hashlib
import os

import pytest

from agent.errors import OutboxFull
from agent.outbox.spool import BLOCK_BYTES, RESERVES, Reserve, Room, Spool
from agent.publishing.messages import HeatmapPayload

EPOCH, OTHER = "0123456789ab", "ba9876543210"


def picture(number, size=BLOCK_BYTES):
    data = number.to_bytes(4, "big") * (size // 4)
    return HeatmapPayload(data, hashlib.sha256(data).hexdigest(), width=8, height=8, full_scale=1.0)


@pytest.fixture
def spool(tmp_path):
    """Returns a function that opens the spool of one epoch, as after a restart."""

    def start(epoch=EPOCH, last_seq=1000, most_pictures=10):
        made = Spool(tmp_path / "heatmaps", most_pictures * BLOCK_BYTES)
        made.begin(epoch, last_seq)
        return made

    return start


def files(tmp_path):
    return sorted((tmp_path / "heatmaps").iterdir())


def seqs(spool):
    found, after = [], 0
    while (one := spool.oldest(10**9, after)) is not None:
        found.append(one.seq)
        after = one.seq
    return found


def test_heatmaps_come_back_whole_and_oldest_first_up_to_the_seq_asked_for(spool):
    store = spool()
    assert all(store.put(seq, picture(seq)) for seq in (3, 5, 9))
    assert store.oldest(2) is None
    first = store.oldest(5)
    assert (first.seq, first.data, first.content_type) == (3, picture(3).data, "image/jpeg")
    assert store.oldest(9, after=3).seq == 5
    store.remove(3)
    assert seqs(store) == [5, 9]


def test_the_oldest_heatmaps_go_where_the_spool_is_full_and_are_counted(spool, tmp_path):
    store = spool(most_pictures=4)
    assert all(store.put(seq, picture(seq)) for seq in range(1, 11))
    assert seqs(store) == [7, 8, 9, 10]
    assert store.shed_count == 6
    assert len(files(tmp_path)) == 4


def test_a_heatmap_larger_than_the_whole_spool_is_refused_and_leaves_the_others(spool):
    store = spool(most_pictures=2)
    store.put(1, picture(1))
    assert not store.put(2, picture(2, 3 * BLOCK_BYTES))
    assert (seqs(store), store.shed_count) == ([1], 1)


@pytest.mark.parametrize("damage", ["truncated", "one bit", "gone", "empty"])
def test_a_damaged_heatmap_is_removed_and_never_returned(spool, tmp_path, damage):
    store = spool()
    store.put(1, picture(1))
    store.put(2, picture(2))
    path, data = files(tmp_path)[0], picture(1).data
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"truncated": data[:-1], "one bit": b"\x80" + data[1:], "empty": b""}[damage])
    assert store.oldest(10).seq == 2
    assert (len(store), store.shed_count, len(files(tmp_path))) == (1, 1, 1)


def test_after_a_restart_the_heatmaps_of_stored_verdicts_are_still_there(spool):
    store = spool()
    for seq in (1, 2, 3):
        store.put(seq, picture(seq))
    assert seqs(spool()) == [1, 2, 3]


def test_at_the_start_orphans_halves_and_other_epochs_are_removed_and_strange_files_left_alone(spool, tmp_path):
    store = spool()
    for seq in (1, 2, 3):
        store.put(seq, picture(seq))
    half = files(tmp_path)[0].with_name(f"{EPOCH}-{4:012d}-{'a' * 64}.jpg.partial")
    half.write_bytes(b"half")
    (tmp_path / "heatmaps" / f"{OTHER}-{1:012d}-{'a' * 64}.jpg").write_bytes(b"other epoch")
    note = tmp_path / "heatmaps" / "note.txt"
    note.write_bytes(b"a person's")
    assert seqs(spool(last_seq=2)) == [1, 2]
    assert len(files(tmp_path)) == 3
    assert note.exists()


def test_a_new_epoch_begins_with_an_empty_spool_and_counts_what_it_dropped(spool, tmp_path):
    store = spool()
    store.put(1, picture(1))
    store.begin(OTHER, 0)
    assert (seqs(store), store.shed_count, files(tmp_path)) == ([], 1, [])


def test_a_spool_whose_folder_was_deleted_to_make_room_goes_on(spool, tmp_path):
    store = spool()
    store.put(1, picture(1))
    files(tmp_path)[0].unlink()
    (tmp_path / "heatmaps").rmdir()
    assert store.put(2, picture(2))
    assert seqs(store) == [2]


def test_a_disk_that_takes_no_heatmap_is_counted_and_leaves_no_half_file(spool, tmp_path, caplog):
    store = spool()
    folder = tmp_path / "heatmaps"
    folder.rmdir()
    folder.write_bytes(b"a file where the folder was")
    assert not store.put(1, picture(1))
    assert not store.put(2, picture(2))
    assert store.shed_count == 2
    assert len([record for record in caplog.records if "without heatmaps" in record.message]) == 1
    folder.unlink()
    assert store.put(3, picture(3))


def test_the_reserve_takes_its_space_and_gives_it_back(tmp_path):
    reserve = Reserve(tmp_path, 2 * 65536)
    reserve.refill(margin=0)
    blocks = sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir())
    assert (reserve.missing, blocks) == (frozenset(), 2 * 65536)
    assert reserve.release("storing")
    assert not reserve.release("storing")
    assert reserve.missing == {"storing"}
    reserve.refill(margin=0)
    assert reserve.missing == frozenset()


def test_a_reserve_that_the_disk_has_no_room_for_is_missing_and_leaves_no_file(tmp_path):
    disk = os.statvfs(tmp_path)
    reserve = Reserve(tmp_path, 4 * disk.f_blocks * disk.f_frsize)
    reserve.refill(margin=0)
    assert reserve.missing == frozenset(RESERVES)
    assert list(tmp_path.iterdir()) == []


def test_heatmaps_give_way_before_the_reserve_and_storing_never_takes_what_acknowledging_needs(spool, tmp_path):
    store = spool()
    store.put(1, picture(1))
    reserve = Reserve(tmp_path, 2 * BLOCK_BYTES)
    reserve.refill(margin=0)
    seen = []

    def refused():
        seen.append((len(store), sorted(reserve.missing)))
        raise OutboxFull("database or disk is full")

    room = Room(tmp_path, store, reserve)
    with pytest.raises(OutboxFull, match="let the disk have room"):
        room.insist(refused, storing=True)
    assert seen == [(1, []), (0, []), (0, ["storing"])]
    with pytest.raises(OutboxFull):
        room.insist(refused, storing=False)
    assert seen[-1] == (0, ["acknowledging", "storing"])
