"""deep_knn: how far is the picture as a whole from the k most similar good ones, as a pretrained network sees it?

Source: paper 002, sec. 4.4, "deep feature" (Perera and Patel 2019): pretrained features of the image, global max
pooling, mean removed and variance scaled, mean Euclidean distance to the k = 15 nearest good images (eq. 4).
"""

from __future__ import annotations

from trainer.detectors.embedding import fit_embedded
from trainer.judges import Neighbours
from trainer.learning import Learned, Material, Options, Progress


def fit(material: Material, options: Options, progress: Progress) -> Learned:
    """Return the detector. Raises TrainingError if there are fewer good images than neighbours."""
    return fit_embedded(material, options, progress, Neighbours.of)
