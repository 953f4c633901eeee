"""What the shift report tells an operator, read back from the page itself."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cv2
import numpy as np
import pytest
from pages import Page
from verdicts import sent

from agent.publishing.archive import PICTURES, Archive, ArchiveSettings
from agent.publishing.messages import Origin
from agent.publishing.verdict_files import VERDICTS
from agent.shift.chart import TIMES, strip_chart
from agent.shift.parts import CAUSES, part_of, read_verdicts
from agent.shift.report import percent, render_shift_report, write_shift_report
from agent.verdict import Outcome, Reason, Verdict
from calibration.errors import InputError
from calibration.frame import Frame

ORIGIN = Origin("cell7", "0123456789ab", "flange", "d" * 64, "openvino f32, 2 threads", False, "reject")
SIX = datetime(2025, 3, 4, 6, 0, 0, tzinfo=UTC)


def judged(number: int, score: float, **more) -> Verdict:
    """Return a pass or reject at threshold 2; a reject has a map."""
    outcome = Outcome.REJECT if score > 2.0 else Outcome.PASS
    fields = {
        "part_id": f"P{number:06d}",
        "detail": f"unlike good parts at x {number}, y 7 px" if score > 2.0 else "",
        "anomaly_map": np.full((4, 4), score, np.float32),
        "picture": np.full((16, 16), 0.5, np.float32) if score > 2.0 else None,
        "stage_ms": {"registration": 9.0, "engine": 11.0 + number},
        "latency_ms": 30.0 + number,
    }
    return Verdict(number, outcome, Reason.SCORE, score=score, threshold=2.0, **{**fields, **more})


def unjudged(number: int, reason: Reason, detail: str = "", **more) -> Verdict:
    return Verdict(number, Outcome.NO_VERDICT, reason, detail, **{"latency_ms": 90.0, **more})


def shift() -> list[Verdict]:
    """Return 8 passed, 3 rejected and 4 parts without verdict, the last of them late."""
    passed = [judged(number, 0.5 + 0.1 * number) for number in range(1, 9)]
    rejected = [judged(number, score) for number, score in ((9, 2.5), (10, 9.0), (11, 3.0))]
    lost = [unjudged(number, Reason.FRAME_LOST, "no frame within 90 ms") for number in (12, 13)]
    blank = unjudged(14, Reason.NOT_REGISTERED, "the field is blank", part_id="P000014")
    return [*passed, *rejected, *lost, blank, unjudged(15, Reason.LATE, "no answer within 90 ms", part_id="P000015")]


def messages_of(verdicts, origin=ORIGIN):
    moments = (SIX + timedelta(seconds=number) for number in range(len(verdicts)))
    return [
        sent(verdict, origin, number + 1, created_utc=moment)
        for number, (verdict, moment) in enumerate(zip(verdicts, moments, strict=True))
    ]


def archived(folder: Path, verdicts, pictures: str = "all", frame_size=(12, 12)) -> Path:
    """Return a folder with these verdicts; parts whose frame was not lost have a picture of it."""
    archive = Archive(ArchiveSettings(folder, pictures))
    for message, verdict in zip(messages_of(verdicts), verdicts, strict=True):
        pixels = np.full(frame_size, 120, np.uint8)
        frame = None if verdict.reason is Reason.FRAME_LOST else Frame(pixels, 1, verdict.trigger_id, 0, 0)
        archive.store(message, verdict, frame, 2.0)
    return folder


def page_of(verdicts, archive: Path = Path("nowhere"), **arguments) -> str:
    return render_shift_report(messages_of(verdicts), archive, **arguments)


def written(archive: Path, **arguments) -> str:
    write_shift_report(archive, archive / "shift.html", **arguments)
    return (archive / "shift.html").read_text("utf-8")


def section(page: str, title: str) -> str:
    """Return the HTML from the heading to the end of its section, empty where there is none."""
    found = re.search(rf"<section><h2>{re.escape(title)}.*?</section>", page, re.DOTALL)
    return found.group(0) if found else ""


def shown(page: str, title: str) -> list[str]:
    return re.findall(r'class="head"><b>(.*?)</b>', section(page, title))


# ---- words and numbers -----------------------------------------------------------------------------------------------


def test_the_first_sentence_counts_what_happened_in_plain_words():
    assert "15 parts: 8 passed, 3 rejected, 4 without verdict." in Page(page_of(shift())).text


def test_the_summary_counts_outcomes_and_the_reasons_for_no_verdict(tmp_path):
    summary = write_shift_report(archived(tmp_path, shift()), tmp_path / "shift.html")
    assert summary.parts == 15
    assert summary.outcomes == {"pass": 8, "reject": 3, "no_verdict": 4}
    assert list(summary.reasons.items()) == [("frame_lost", 2), ("late", 1), ("not_registered", 1)]


def test_the_latency_tile_holds_percentiles_of_judged_parts_and_the_deadline():
    text = Page(page_of(shift(), deadline_ms=90.0)).text
    judged_ms = [30.0 + number for number in range(1, 12)]
    p50, p99 = np.percentile(judged_ms, [50, 99])
    assert (
        f"Trigger to pass or reject, ms, deadline 90 ms {p50:.1f} half within {p99:.1f} 99 % within 41.0 longest"
        in text
    )
    assert "parts without verdict: given up after 90.0 at most" in text


def test_a_deadline_that_nobody_named_is_not_made_up():
    assert ", deadline" not in page_of(shift())


def test_every_stage_has_its_row_of_times_in_the_order_of_the_work():
    rows = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', section(page_of(shift()), "Where the time goes"))
    assert rows == [
        ("registration", "11"),
        ("engine", "11"),
        ("trigger to pass or reject", "11"),
        ("trigger to no verdict", "4"),
    ]


def test_causes_stand_with_their_count_and_what_to_check_the_most_frequent_first():
    causes = section(page_of(shift()), "Why there was no verdict")
    assert re.findall(r'class="soft word">(\w+)</span></th><td>(\d+)', causes) == [
        ("frame_lost", "2"),
        ("late", "1"),
        ("not_registered", "1"),
    ]
    assert "cable" in causes
    assert "the field is blank" in causes


def test_an_archive_from_before_overrun_had_its_name_is_read():
    before = {**messages_of([unjudged(1, Reason.OVERRUN)])[0], "reason": "queue_full"}
    assert part_of(before).reason is Reason.OVERRUN


def test_every_reason_for_no_verdict_has_its_words():
    assert set(CAUSES) == set(Reason) - {Reason.SCORE}


def test_parts_accepted_without_inspection_are_called_so():
    accepting = replace(ORIGIN, on_no_verdict="pass")
    text = Page(render_shift_report(messages_of(shift(), accepting), Path("nowhere"))).text
    assert "4 accepted without inspection" in text
    assert "told to accept 4 of these parts uninspected" in text
    assert "all diverted" in Page(page_of(shift())).text


def test_a_simulated_shift_says_so():
    simulated = replace(ORIGIN, simulated=True)
    assert "simulation" in Page(render_shift_report(messages_of(shift(), simulated), Path("nowhere"))).text
    assert "simulation" not in Page(page_of(shift())).text


def test_verdicts_missing_from_the_archive_are_counted_by_the_gaps_in_each_run():
    first, second = messages_of(shift()), messages_of(shift(), replace(ORIGIN, run="f" * 12))
    page = render_shift_report([*first[:3], *first[5:], *second[4:]], Path("nowhere"))
    assert "2 verdicts are missing" in Page(page).text
    assert "missing" not in page_of(shift())


def test_a_change_of_recipe_is_pointed_out():
    changed = replace(ORIGIN, recipe_digest="e" * 64, run="f" * 12)
    page = render_shift_report([*messages_of(shift()), *messages_of(shift(), changed)], Path("nowhere"))
    assert "recipe was changed" in page


@pytest.mark.parametrize(
    ("count", "n", "text"),
    [(0, 7, "0 %"), (7, 7, "100 %"), (1, 9999, "0.1 %"), (9998, 9999, "99.9 %"), (1, 8, "12.5 %")],
)
def test_a_share_is_never_rounded_to_nothing_or_to_all(count, n, text):
    assert percent(count, n) == text


def test_a_score_just_above_the_threshold_does_not_read_as_equal_to_it():
    assert "score 2.00001, threshold 2" in page_of([judged(1, 2.00001)])


# ---- the chart -------------------------------------------------------------------------------------------------------


def marks(verdicts) -> list[tuple[str, str, str]]:
    """Return class, path and tooltip of every mark."""
    chart = strip_chart([part_of(message) for message in messages_of(verdicts)])
    return re.findall(r'<path class="(\w+)" d="(.*?)"><title>(.*?)</title>', chart)


def height(path: str) -> float:
    return float(re.match(r"M\S+ ([\d.]+)", path).group(1))


def test_every_part_has_one_mark_with_its_numbers_in_the_tooltip():
    found = marks(shift())
    assert [kind for kind, _, _ in found].count("pass") == 8
    assert [kind for kind, _, _ in found].count("reject") == 3
    assert [kind for kind, _, _ in found].count("silent") == 4
    assert f"P000010, trigger 10: rejected, 4.50 {TIMES} threshold" in [text for _, _, text in found]
    assert "trigger 12: no verdict, no frame came" in [text for _, _, text in found]


def test_a_mark_stands_above_the_threshold_line_exactly_where_the_part_was_rejected():
    found = marks([judged(1, 1.9), judged(2, 2.0), judged(3, 2.1), judged(4, 6.0)])
    limit = 100 - 100 / 3  # the axis ends at 3 times the threshold
    assert [round(height(path) - limit, 1) for _, path, _ in found] == [1.7, 0.0, -1.7, -66.7]


def test_a_score_beyond_the_axis_is_drawn_on_its_edge_and_the_edge_says_so():
    parts = [part_of(message) for message in messages_of([judged(1, 100.0)])]
    assert f"≥ 3 {TIMES}" in strip_chart(parts)
    assert "≥" not in strip_chart([part_of(message) for message in messages_of([judged(1, 6.0)])])


def test_a_threshold_that_is_not_above_zero_is_said_and_not_divided_by():
    text = Page(page_of([zero_threshold()])).text
    assert "1 part cannot be drawn" in text


def zero_threshold() -> Verdict:
    return Verdict(1, Outcome.REJECT, Reason.SCORE, score=0.5, threshold=0.0)


def test_a_new_run_is_marked_in_the_chart():
    first, second = messages_of(shift()), messages_of(shift(), replace(ORIGIN, run="f" * 12))
    chart = strip_chart([part_of(message) for message in (*first, *second)])
    assert chart.count('class="run"') == 1
    assert "before part 16" in chart


def test_a_long_shift_stays_a_small_page_and_loses_no_outcome():
    message = messages_of([judged(1, 1.0)])[0]
    special = messages_of([judged(1, 5.0), unjudged(2, Reason.LATE)])
    messages = [{**message, "seq": number + 1} for number in range(6000)]
    messages[3000], messages[4000] = ({**special[0], "seq": 3001}, {**special[1], "seq": 4001})
    page = render_shift_report(messages, Path("nowhere"))
    assert len(page) < 300_000
    assert page.count('<path class="reject"') == 1
    assert page.count('<path class="silent"') == 1
    assert "parts 3,001 to 3,010: 1 rejected" in page
    assert "6,000 parts: 5,998 passed, 1 rejected, 1 without verdict." in page


# ---- the galleries ---------------------------------------------------------------------------------------------------


def test_each_gallery_holds_the_parts_that_its_title_promises(tmp_path):
    page = written(archived(tmp_path, shift()))
    assert shown(page, "Rejected parts") == ["P000010", "P000011", "P000009"]
    assert shown(page, "Parts without verdict") == ["trigger 13", "trigger 12", "P000015", "P000014"]
    assert shown(page, "Passed parts, for comparison") == [f"P{number:06d}" for number in range(8, 0, -1)]


def test_a_rejected_part_shows_frame_and_heatmap_with_score_threshold_and_place(tmp_path):
    card = Page(section(written(archived(tmp_path, [judged(4, 5.0)])), "Rejected parts"))
    sources = [attributes["src"] for tag, attributes in card.tags if tag == "img"]
    assert len(sources) == 2
    assert f"P000004 trigger 4 · 06:00:00 UTC rejected 2.50 {TIMES} threshold score 5, threshold 2" in card.text
    assert "unlike good parts at x 4, y 7 px" in card.text


def test_passed_parts_without_pictures_are_not_shown(tmp_path):
    page = written(archived(tmp_path, shift(), pictures="rejects"))
    assert shown(page, "Passed parts") == []
    assert len(shown(page, "Rejected parts")) == 3


def test_pictures_that_are_gone_or_cut_off_leave_a_card_that_says_so(tmp_path):
    archived(tmp_path, [judged(1, 5.0), judged(2, 6.0)])
    for path in (tmp_path / PICTURES).glob("*-00000001-*.jpg"):
        path.unlink()
    for path in (tmp_path / PICTURES).glob("*-00000002-*.jpg"):
        path.write_bytes(path.read_bytes()[:200])
    page = section(written(tmp_path), "Rejected parts")
    assert page.count("no picture kept") == 2
    assert "<img" not in page


def test_a_frame_that_never_came_is_told_from_a_picture_that_was_not_kept(tmp_path):
    page = written(archived(tmp_path, [judged(1, 5.0), unjudged(2, Reason.FRAME_LOST)], pictures="none"))
    assert "no picture kept" in section(page, "Rejected parts")
    assert '<div class="empty">no frame came' in section(page, "Parts without verdict")


def test_every_cause_is_shown_before_one_is_shown_often():
    lost = [unjudged(number, Reason.FRAME_LOST) for number in range(1, 41)]
    page = page_of([*lost, unjudged(41, Reason.FAULT), unjudged(42, Reason.LATE)])
    names = shown(page, "Parts without verdict")
    assert len(names) == 16
    assert names[0] == "trigger 40"
    assert names[-2:] == ["trigger 42", "trigger 41"]


def test_of_too_many_rejects_both_the_clear_and_the_doubtful_are_shown(tmp_path):
    page = written(archived(tmp_path, [judged(number, 2.0 + number, picture=None) for number in range(1, 51)]))
    names = shown(page, "Rejected parts")
    assert len(names) == 36
    assert names[0] == "P000050"
    assert names[-12:] == [f"P{number:06d}" for number in range(12, 0, -1)]
    assert "(36 of 50)" in Page(page).text


def test_a_shift_of_noisy_pictures_stays_below_eight_megabytes(tmp_path):
    verdicts = [judged(number, score) for number, score in enumerate([9.0] * 20 + [1.0] * 3)]
    archived(tmp_path, verdicts, frame_size=(4, 4))
    noise = (np.random.default_rng(0).random((512, 512, 3)) * 255).astype(np.uint8)
    data = cv2.imencode(".jpg", noise, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    for path in (tmp_path / PICTURES).iterdir():
        path.write_bytes(data)
    page = written(tmp_path)
    assert 3_000_000 < len(page) < 8_000_000


def test_no_more_than_sixty_parts_are_shown(tmp_path):
    rejected = [judged(number, 9.0, picture=None) for number in range(40)]
    passed = [judged(number, 1.0) for number in range(40, 60)]
    lost = [unjudged(number, Reason.FRAME_LOST) for number in range(60, 80)]
    page = written(archived(tmp_path, [*rejected, *passed, *lost]))
    assert page.count("<figcaption>") == 60


def test_a_line_that_points_out_of_the_archive_shows_nothing_from_there(tmp_path):
    archive = archived(tmp_path / "archive", [judged(1, 5.0)])
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(next((archive / PICTURES).glob("*.jpg")).read_bytes())
    message = json.loads((archive / VERDICTS).read_text())
    for name in ("../secret.jpg", str(secret), "\0", "pictures", "x" * 5000):
        page = render_shift_report([{**message, "pictures": {"frame": name}}], archive)
        assert "<img" not in section(page, "Rejected parts")


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_needs_nothing_from_outside(tmp_path):
    page = Page(written(archived(tmp_path, shift())))
    names = {name for _, attributes in page.tags for name in attributes}
    assert not names & {"href", "srcset", "onclick", "onload"}
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert sources
    assert all(source.startswith("data:image/") for source in sources)


def test_every_picture_and_chart_has_a_text_for_those_who_do_not_see_it(tmp_path):
    page = Page(written(archived(tmp_path, shift())))
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    assert all(attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg")


def test_the_same_archive_gives_the_same_page(tmp_path):
    archived(tmp_path, shift())
    assert written(tmp_path) == written(tmp_path)


def test_strings_of_the_plant_cannot_inject_markup(tmp_path):
    evil = '"><script>x</script>$title'
    verdicts = [
        judged(1, 5.0, part_id=evil, detail=evil, stage_ms={evil: 1.0}),
        unjudged(2, Reason.FAULT, evil, part_id=evil),
    ]
    hostile = replace(ORIGIN, station=evil, recipe=evil, engine=evil)
    archived(tmp_path, verdicts)
    lines = [json.loads(line) for line in (tmp_path / VERDICTS).read_text().splitlines()]
    pictures = [line["pictures"] for line in lines]
    messages = [
        {**message, "creationTime": evil, "pictures": names}
        for message, names in zip(messages_of(verdicts, hostile), pictures, strict=True)
    ]
    page = Page(render_shift_report(messages, tmp_path, title=evil, notes=[evil]))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) >= 8


def test_half_a_character_in_a_name_does_not_lose_the_report(tmp_path):
    assert "P?" in written(archived(tmp_path, [judged(1, 5.0, part_id="P\ud800")]))


@pytest.mark.parametrize(
    "verdicts", [[judged(1, 1.0)], [unjudged(1, Reason.STOPPING, latency_ms=None)], [judged(1, 5.0)]]
)
def test_a_page_can_be_made_of_one_part(verdicts):
    assert "1 part: " in Page(page_of(verdicts)).text


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_a_last_line_cut_by_a_power_cut_is_left_out_and_said(tmp_path):
    archived(tmp_path, shift())
    whole = (tmp_path / VERDICTS).read_bytes()
    (tmp_path / VERDICTS).write_bytes(whole[:-40])
    text = Page(written(tmp_path)).text
    assert "14 parts:" in text
    assert "last line of verdicts.jsonl is cut off" in text


def test_a_last_line_that_lacks_only_its_newline_counts(tmp_path):
    archived(tmp_path, shift())
    (tmp_path / VERDICTS).write_bytes((tmp_path / VERDICTS).read_bytes()[:-1])
    reading = read_verdicts(tmp_path)
    assert (len(reading.messages), reading.cut_off, reading.n_damaged) == (15, False, 0)


def test_damaged_lines_in_the_middle_are_counted_and_left_out(tmp_path):
    archived(tmp_path, shift())
    lines = (tmp_path / VERDICTS).read_bytes().splitlines()
    odd = (b"\xff\xfe", b"[]", b"{}", b"null", b'{"schema": "taktsight.verdict/1"}', b"[" * 100_000, b"", lines[4][:99])
    (tmp_path / VERDICTS).write_bytes(b"\n".join([*lines[:4], *odd, *lines[5:], b""]))
    reading = read_verdicts(tmp_path)
    assert (len(reading.messages), reading.n_damaged, reading.cut_off) == (14, 7, False)
    text = Page(written(tmp_path)).text
    assert "7 lines of the archive cannot be read" in text
    assert "1 verdict is missing" in text


def test_a_shift_longer_than_the_report_keeps_the_newest_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("agent.shift.parts.MOST_PARTS", 5)
    archived(tmp_path, shift())
    reading = read_verdicts(tmp_path)
    assert [message["trigger"] for message in reading.messages] == [11, 12, 13, 14, 15]
    assert "Only the newest 5 parts are shown; older verdicts stay" in Page(written(tmp_path)).text


def test_a_report_is_made_of_the_files_of_all_days(tmp_path):
    archived(tmp_path, shift())
    lines = (tmp_path / VERDICTS).read_bytes().splitlines(keepends=True)
    (tmp_path / "verdicts-2025-03-03.jsonl").write_bytes(b"".join(lines[:5]))
    (tmp_path / "verdicts-2025-03-03-2.jsonl").write_bytes(b"".join(lines[5:10]))
    (tmp_path / VERDICTS).write_bytes(b"".join(lines[10:]))
    assert [message["trigger"] for message in read_verdicts(tmp_path).messages] == list(range(1, 16))
    (tmp_path / VERDICTS).unlink()
    assert [message["trigger"] for message in read_verdicts(tmp_path).messages] == list(range(1, 11))


def test_a_report_reads_no_more_lines_than_it_shows(tmp_path, monkeypatch):
    monkeypatch.setattr("agent.shift.parts.MOST_PARTS", 5)
    archived(tmp_path, shift())
    whole = (tmp_path / VERDICTS).read_bytes()
    (tmp_path / VERDICTS).write_bytes(b"no verdict\n" * 1000 + whole)
    reading = read_verdicts(tmp_path)
    assert (len(reading.messages), reading.n_damaged, reading.has_older) == (5, 0, True)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        write_shift_report(tmp_path / "none", tmp_path / "shift.html")


def test_a_folder_without_verdicts_is_named(tmp_path):
    with pytest.raises(InputError, match=r"verdicts\.jsonl.*is .* the archive of a station"):
        write_shift_report(tmp_path, tmp_path / "shift.html")


@pytest.mark.parametrize("key", ["regionCount", "score", "trigger"])
def test_a_number_that_no_machine_can_hold_damages_its_line_only(tmp_path, key):
    archived(tmp_path, shift())
    message = messages_of(shift())[0]
    with (tmp_path / VERDICTS).open("a") as file:
        file.write(json.dumps({**message, key: 10**400 if key == "score" else float("inf")}) + "\n")
    assert read_verdicts(tmp_path).n_damaged == 1


@pytest.mark.parametrize("content", ["", "\n\n", "nonsense\n"])
def test_an_archive_without_one_whole_verdict_is_refused(tmp_path, content):
    (tmp_path / VERDICTS).write_text(content)
    with pytest.raises(InputError, match="no verdict among them"):
        write_shift_report(tmp_path, tmp_path / "shift.html")


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"not written.*make its folder"):
        write_shift_report(archived(tmp_path, shift()), tmp_path / "none" / "shift.html")


def test_a_full_disk_is_not_blamed_on_the_folder(tmp_path):
    with pytest.raises(InputError, match=r"not written \(No space left on device\)$"):
        write_shift_report(archived(tmp_path, shift()), Path("/dev/full"))


@pytest.mark.parametrize("messages", [[], [{"schema": "taktsight.verdict/9"}], [{"schema": "taktsight.verdict/1"}]])
def test_messages_that_are_no_verdicts_are_refused(messages):
    with pytest.raises(InputError, match="verdict"):
        render_shift_report(messages, Path("nowhere"))
