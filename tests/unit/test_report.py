"""What the report tells a reader, read back from the page itself."""

from __future__ import annotations

import base64
import re

import cv2
import numpy as np
import pytest
from pages import Page

from calibration.chart import number
from calibration.errors import InputError
from trainer.figures import photo_panels, ranking_curves, score_chart
from trainer.metrics import ScoredImage, evaluate
from trainer.report import ReportFacts, figure, percent, render_report, verdict, write_report

THRESHOLD = 1.0
FACTS = ReportFacts("bottle", "patch_memory", {"Image": "64 x 64"}, ("Only 40 good parts.",))


def part(label: str, number: int, score: float | None, *, size: int = 64, bare: bool = False, reason: str = ""):
    """Return a textured part with a blob as bright in the map as its score."""
    name = f"test/{label}/{number:03d}.png"
    if bare:
        return ScoredImage(name, label, score, reason)
    generator = np.random.default_rng(number)
    view = (0.5 + 0.1 * generator.normal(size=(size, size, 3))).clip(0, 1).astype(np.float32)
    mask = np.zeros((size, size), np.uint8)
    if label != "good":
        cv2.circle(mask, (size // 2, size // 2), size // 8, 1, -1)
    anomaly_map = cv2.resize(mask.astype(np.float32), (8, 8), interpolation=cv2.INTER_AREA) * (score or 0.0)
    return ScoredImage(name, label, score, reason, anomaly_map, mask.astype(bool), view)


def inspected_line() -> list[ScoredImage]:
    good = [part("good", n, 0.4 + 0.05 * n) for n in range(10)] + [part("good", 10, 1.2)]
    cracks = [part("crack", n, 0.9 + 0.2 * n) for n in range(5)]
    return [*good, *cracks, part("stain", 0, 3.0), part("stain", 1, None, reason="out_of_view")]


def page_of(images, *, evaluated: bool = True, good_scores=(0.3, 0.5, 0.6), threshold: float = THRESHOLD, facts=FACTS):
    evaluation = evaluate(images, threshold) if evaluated else None
    scores = np.array(good_scores, dtype=np.float64)
    return render_report(facts, evaluation, images, threshold=threshold, map_threshold=0.8, good_scores=scores)


def section(page: str, title: str) -> str:
    """Return the HTML from the heading to the end of its section, empty where there is none."""
    found = re.search(rf"<h2>{re.escape(title)}.*?</section>", page, re.DOTALL)
    return found.group(0) if found else ""


def test_the_first_sentence_says_what_happens_to_the_parts():
    page = page_of(inspected_line())
    assert "1 of 7 defective parts would have been passed, 1 of 11 good parts rejected." in Page(page).text


def test_a_perfect_result_is_said_in_plain_words():
    images = [part("good", 0, 0.1, bare=True), *[part("crack", n, 2.0, bare=True) for n in range(2)]]
    assert verdict(evaluate(images, THRESHOLD)) == "All 2 defective parts were caught, none of 1 good part rejected."


def test_the_big_numbers_stand_with_what_they_rest_on():
    text = Page(page_of(inspected_line())).text
    assert "Escape 14.3 % 1 of 7 defective parts passed" in text
    assert "Overkill 9.1 % 1 of 11 good parts rejected" in text
    assert re.search(r"AUROC 0\.\d{4} 18 tested parts", text)


def test_the_bound_on_the_true_share_is_that_of_clopper_and_pearson():
    images = [part("good", n, 0.1, bare=True) for n in range(20)]
    bound = 1 - 0.05 ** (1 / 20)  # closed form for none of n
    assert f"may be up to {100 * bound:.1f} %" in page_of(images)


def test_parts_without_a_verdict_are_listed_with_their_reason_and_said_to_count_as_rejected():
    text = Page(page_of(inspected_line())).text
    assert "1 part without a verdict: counted as rejected" in text
    assert "test/stain/001.png stain out_of_view" in text
    assert "ranks above every score" in text


def test_each_gallery_holds_the_parts_that_its_title_promises():
    page = page_of(inspected_line())
    files = {
        title: re.findall(r'class="file">(.*?)<', section(page, title))
        for title in (
            "Defective parts that were passed",
            "Good parts that were rejected",
            "Typical detections",
            "Good parts nearest",
            "Parts without a verdict",
        )
    }
    assert files["Defective parts that were passed"] == ["test/crack/000.png"]
    assert files["Good parts that were rejected"] == ["test/good/010.png"]
    assert files["Typical detections"] == [f"test/crack/00{n}.png" for n in (1, 2, 3)] + ["test/stain/000.png"]
    assert files["Good parts nearest"] == [f"test/good/00{n}.png" for n in (9, 8, 7, 6, 5, 4)]
    assert files["Parts without a verdict"] == ["test/stain/001.png"]


def test_good_parts_only_give_a_page_that_asks_to_look_at_the_highest_scores():
    images = [part("good", n, 0.1 * n) for n in range(30)]
    page = page_of(images, evaluated=False, good_scores=[0.1 * n for n in range(30)], threshold=2.75)
    files = re.findall(r'class="file">(.*?)<', section(page, "Look at these first"))
    assert files == [f"test/good/{n:03d}.png" for n in range(29, 5, -1)]
    assert "not yet tested on a defective one. 2 of 30 good images would have been rejected." in Page(page).text
    assert "ROC curve" not in page


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_page_is_whole_and_needs_nothing_from_outside(evaluated):
    page = Page(page_of(inspected_line(), evaluated=evaluated))
    names = {name for _, attributes in page.tags for name in attributes}
    assert not names & {"href", "srcset", "onclick", "onload"}
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert sources
    assert all(source.startswith("data:image/") for source in sources)


def test_every_picture_has_a_text_for_those_who_do_not_see_it():
    page = Page(page_of(inspected_line()))
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    assert all(attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg")


def test_the_same_inputs_give_the_same_page():
    assert page_of(inspected_line()) == page_of(inspected_line())


def test_names_from_folders_cannot_inject_markup():
    images = [part("good", 0, 0.1), ScoredImage("<script>x</script>", "<i>", None, "<u>")]
    page = page_of(images, facts=ReportFacts("<b>", "&", {"<u>": "</dl>"}, ("<img src=http://x>",)))
    assert not {tag for tag, _ in Page(page).tags} & {"script", "i", "u"}


def test_what_the_training_decided_stands_apart_from_the_warnings():
    decided = ("the layout counts 0.6", "learnt from <8> turned copies")
    facts = ReportFacts("bottle", "patch_layout", {}, ("Only 40 good parts.",), decided)
    page = page_of(inspected_line(), facts=facts)
    notes, rest = re.search(r'<ul class="notes">(.*?)</ul>(.*)', page, re.DOTALL).groups()
    assert "Only 40 good parts." in notes and "layout" not in notes and "copies" not in notes
    assert "<li>the layout counts 0.6</li><li>learnt from &lt;8&gt; turned copies</li>" in rest
    assert "Decided in the training" in rest and "Decided in the training" not in page_of(inspected_line())


def test_a_large_line_of_noisy_pictures_stays_below_five_megabytes():
    images = [part("crack", n, 0.5, size=320) for n in range(20)]
    images += [part("good", n, 2.0, size=320) for n in range(20)]
    images += [part(f"type{n % 9}", n, 3.0, size=320) for n in range(40)]
    page = page_of(images)
    assert len(page.encode()) < 5_000_000
    assert page.count("<figcaption>") <= 60


@pytest.mark.parametrize(
    "images",
    [
        [],
        [part("good", 0, None, bare=True)],
        [part("good", 0, 0.2, bare=True), part("good", 1, 0.2, bare=True)],
        [part("crack", 0, 2.0, bare=True)],
        [part("good", 0, None, bare=True), part("crack", 0, None, bare=True)],
    ],
)
@pytest.mark.parametrize("good_scores", [(), (1.0,)])
def test_a_page_can_be_made_of_very_little(images, good_scores):
    Page(page_of(images, evaluated=bool(images), good_scores=good_scores))
    Page(page_of(images, evaluated=False, good_scores=good_scores))


@pytest.mark.parametrize(("threshold", "map_threshold"), [(np.nan, 1.0), (1.0, 0.0), (1.0, np.inf)])
def test_thresholds_that_cannot_be_drawn_are_refused(threshold, map_threshold):
    with pytest.raises(InputError, match="threshold is"):
        render_report(FACTS, None, [], threshold=threshold, map_threshold=map_threshold, good_scores=np.zeros(3))


def test_a_report_is_written_as_utf_8(tmp_path):
    images, scores = inspected_line(), np.array([0.3, 0.4])
    path = tmp_path / "report.html"
    arguments = {"threshold": THRESHOLD, "map_threshold": 0.8, "good_scores": scores}
    write_report(path, FACTS, evaluate(images, THRESHOLD), images, **arguments)
    assert path.read_text("utf-8") == render_report(FACTS, evaluate(images, THRESHOLD), images, **arguments)


def test_a_folder_that_does_not_exist_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="not written"):
        write_report(
            tmp_path / "none" / "report.html", FACTS, None, [], threshold=1.0, map_threshold=1.0, good_scores=np.ones(2)
        )


# ---- charts and pictures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e6])
def test_no_bar_stands_on_both_sides_of_the_threshold(scale):
    generator = np.random.default_rng(1)
    scores = np.concatenate([generator.lognormal(0, 0.5, 300), [1.0, np.nextafter(1.0, 2)]])
    chart = score_chart({"good": scores * scale}, 1.0 * scale)
    for bar in chart.rows[0].bars:
        right = bar.left + bar.width
        assert right <= chart.threshold + 0.03 or bar.left >= chart.threshold - 0.03
        assert bar.left >= -0.01
        assert right <= 100 + bar.width


def test_a_score_equal_to_the_threshold_is_drawn_on_the_passing_side():
    chart = score_chart({"good": np.array([1.0, 0.0, 3.0])}, 1.0)
    assert chart.rows[0].n_above == 1
    assert sum(bar.left >= chart.threshold - 0.03 for bar in chart.rows[0].bars) == 1


def test_a_single_part_stays_visible_beside_a_thousand():
    scores = np.concatenate([np.full(1000, 0.5), [0.9]])
    assert min(bar.height for bar in score_chart({"good": scores}, 1.0).rows[0].bars) >= 5


def test_scores_over_decades_are_drawn_on_a_logarithmic_axis():
    chart = score_chart({"good": np.array([0.1, 0.2, 0.2]), "crack": np.array([900.0])}, 1.0)
    assert chart.logarithmic
    assert [tick.text for tick in chart.ticks] == ["0.1", "1", "10", "100", "1000"]
    assert not score_chart({"good": np.array([-0.1, 0.2, 900.0])}, 1.0).logarithmic


@pytest.mark.parametrize("span", [1e-6, 0.013, 0.7, 31.0, 8e5])
def test_an_axis_has_a_handful_of_round_numbers_inside_the_plot(span):
    ticks = score_chart({"good": np.linspace(-span / 3, span, 50)}, 0.0).ticks
    assert 3 <= len(ticks) <= 8
    assert all(0 <= tick.place <= 100 for tick in ticks)


def test_the_curves_pass_through_the_point_of_the_threshold():
    images = inspected_line()
    evaluation = evaluate(images, THRESHOLD)
    for curve in ranking_curves(images, evaluation):
        points = np.array([pair.split() for pair in curve.path[1:].split("L")], float)
        place = np.array([curve.point[0], 100 - curve.point[1]])
        ahead = np.diff(points, axis=0)
        share = np.clip(
            np.sum((place - points[:-1]) * ahead, axis=1) / np.maximum(np.sum(ahead**2, axis=1), 1e-12), 0, 1
        )
        nearest = points[:-1] + share[:, None] * ahead
        assert np.linalg.norm(nearest - place, axis=1).min() < 0.1


def decoded(uri: str) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(uri.split(",")[1]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[:, :, ::-1]


def test_pictures_are_fitted_into_the_side_and_keep_their_shape():
    wide = ScoredImage("w", "good", 0.1, picture=np.zeros((100, 400), np.float32))
    photo, overlay = photo_panels(wide, 1.0, 200)
    assert (decoded(photo).shape, overlay) == ((50, 200, 3), "")


def test_a_tiny_picture_is_enlarged_by_a_whole_factor():
    tiny = ScoredImage("t", "good", 0.1, picture=np.zeros((30, 20), np.float32))
    assert decoded(photo_panels(tiny, 1.0, 200)[0]).shape == (180, 120, 3)


def test_the_outline_runs_round_the_defect_and_not_over_it():
    mask = np.zeros((200, 200), bool)
    mask[80:120, 80:120] = True
    calm = np.zeros((20, 20), np.float32)
    image = ScoredImage("d", "crack", 2.0, anomaly_map=calm, mask=mask, picture=np.full((200, 200), 0.5, np.float32))
    shown = decoded(photo_panels(image, 1.0, 200)[1]).astype(int)
    cyan = (shown[:, :, 2] - shown[:, :, 0]) > 90
    assert not cyan[82:118, 82:118].any()
    assert cyan[100, 74:80].any()
    assert cyan[100, 120:126].any()


def test_a_defect_thinner_than_a_pixel_of_the_panel_still_gets_its_outline():
    mask = np.zeros((1000, 1000), bool)
    mask[500, 300:700] = True
    calm = np.zeros((20, 20), np.float32)
    image = ScoredImage("d", "crack", 2.0, anomaly_map=calm, mask=mask, picture=np.full((1000, 1000), 0.5, np.float32))
    shown = decoded(photo_panels(image, 1.0, 200)[1]).astype(int)
    assert ((shown[:, :, 2] - shown[:, :, 0]) > 90).sum() > 100


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, "—"), (0.0, "0 %"), (1.0, "100 %"), (0.05, "5.0 %"), (0.00042, "0.04 %"), (0.99999, "> 99.9 %")],
)
def test_a_share_is_never_rounded_to_nothing_or_to_all(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(("value", "text"), [(None, "—"), (1.0, "1.0000"), (0.99999, "> 0.9999"), (0.9713, "0.9713")])
def test_a_figure_of_merit_is_never_rounded_to_one(value, text):
    assert figure(value) == text


def test_a_score_is_written_with_as_many_digits_as_tell_it_from_the_threshold():
    assert (number(0.71234), number(0.712340001, 0.71234)) == ("0.7123", "0.712340001")
    assert number(0.5, 0.5) == "0.5"


@pytest.mark.parametrize("evaluated", [True, False])
def test_good_images_that_were_left_out_come_before_all_others(evaluated):
    images = inspected_line() if evaluated else [part("good", n, 0.4) for n in range(6)]
    left_out = part("good", 77, 5.0, reason="left out of the training")
    evaluation = evaluate(images, THRESHOLD) if evaluated else None
    page = render_report(
        FACTS,
        evaluation,
        images,
        threshold=THRESHOLD,
        map_threshold=0.8,
        good_scores=np.array([0.3, 0.5]),
        suspects=[left_out],
    )
    shown = section(page, "Good images that were left out: are they defective?")
    assert "test/good/077.png" in shown
    assert "left out of the training" in shown
    assert "rejected, though good" not in shown
    first = min(page.index(f"<h2>{title}") for title in ("Good images that", "Look at these", "Defective parts that")
                if f"<h2>{title}" in page)  # fmt: skip
    assert page[first:].startswith("<h2>Good images that")
