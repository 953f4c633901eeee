"""Whose recipes a station runs: `recipes.keys` and `recipes.unsigned` of station.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calibration.errors import RecipeError
from calibration.recipe import Recipe, read_recipe
from calibration.recipe_file import read_members
from calibration.signing import PublicKey, read_verified, signature_of


@dataclass(frozen=True, slots=True)
class Trust:
    """Keys that may stand for a recipe. Without `unsigned`, nothing else is run."""

    keys: tuple[PublicKey, ...] = ()
    unsigned: bool = False  # also run recipes that nobody signed, or that somebody unknown did

    def read(self, path: Path) -> Recipe:
        """Return a recipe that may run here, with its signature where a trusted key made it.

        Raises RecipeError if it is not whole, or nobody who is trusted stands for it. A signature that names a trusted
        key and is not its own is refused even where unsigned recipes run.
        """
        if not self.unsigned:
            return read_verified(path, self.keys)
        signature = signature_of(path, read_members(path)[0])
        if signature is None or signature.key not in {key.key_id for key in self.keys}:
            return read_recipe(path)
        return read_verified(path, self.keys)


def outdated(recipe: Recipe, revision: int, digest: str) -> RecipeError | None:
    """Return why a recipe may not follow this revision of its product; None: it may. An unsigned one has no age."""
    signature = recipe.signature
    if signature is None or signature.revision > revision or (signature.revision, recipe.digest) == (revision, digest):
        return None
    return RecipeError(
        f"revision {signature.revision} of {recipe.product} found, {revision} was active here: go back to the recipe "
        "before with taktsight-agent recipes rollback, or have this one signed again with a newer revision"
    )
