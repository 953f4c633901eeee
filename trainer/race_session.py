"""What `taktsight-trainer race` does, once its options are read: heats, table, page, and the winner's recipe."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from calibration.console import console, note, progress_bars, say
from calibration.recipe import check_product
from trainer import race, race_page, race_ray
from trainer.data import read_dataset
from trainer.errors import TrainingError
from trainer.session import check_place, learn, write_text


def run(request: race.RaceRequest, recipe: Path | None, ray: str | None) -> None:
    """Run the race, print its table and write race.csv and race.html; fit the winner where a recipe is wanted.

    ray: address of a cluster; None runs the heats here, one after another. Raises TrainingError if none keeps the takt
    or none could be fitted, InputError before anything is read where the recipe cannot be written.
    """
    if recipe is not None:
        check_place(recipe)
    told = {"part_pattern": request.part_pattern, "bit_depth": request.bit_depth}
    dataset = read_dataset(request.data, **told)
    if recipe is not None:
        check_product(dataset.product)
    asked = race.heats(request, dataset)
    runner = race.one_after_another if ray is None else partial(race_ray.on_ray, ray)
    with progress_bars() as progress:
        entries = race.carried_out(asked, request.out, runner, progress)
    order = race.ranked(entries, request.takt_ms)
    console.print(race_page.table_of(entries, order, request.takt_ms))
    for entry in entries:
        if entry.result.failed:
            note(f"{entry.name}: {entry.result.failed}")
    race_page.write_table(request.out / "race.csv", entries, order, request.takt_ms)
    page = request.out / "race.html"
    write_text(page, race_page.page(dataset.product, entries, order, request.takt_ms))
    say(f"page: {page}")
    if not order:
        raise TrainingError(race.reason_for_none(entries))
    if not race.ranked_by_labels(order):
        note("without labelled test images the order rests on synthetic defects: put known defects in test/ to be sure")
    if recipe is not None:
        learn(request.data, race.winning_request(order[0], recipe), **told, product=None)
