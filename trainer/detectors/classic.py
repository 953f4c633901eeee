"""gmm, ocsvm, lof: the one-class methods that paper 001 compares with (table III), on the vectors of deep_knn."""

from __future__ import annotations

from trainer.detectors.embedding import fit_embedded
from trainer.judges import Mixture, OneClass, OutlierFactor
from trainer.learning import Learned, Material, Options, Progress


def fit_gmm(material: Material, options: Options, progress: Progress) -> Learned:
    """Return the detector of a Gaussian mixture."""
    return fit_embedded(material, options, progress, Mixture.of)


def fit_ocsvm(material: Material, options: Options, progress: Progress) -> Learned:
    """Return the detector of a one-class support vector machine."""
    return fit_embedded(material, options, progress, OneClass.of)


def fit_lof(material: Material, options: Options, progress: Progress) -> Learned:
    """Return the detector of local outlier factors. Raises TrainingError if there are fewer images than neighbours."""
    return fit_embedded(material, options, progress, OutlierFactor.of)
