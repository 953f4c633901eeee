"""gmm, ocsvm, lof: how unusual is the code among those of good images, as a one-class method sees it?

Source: paper 001, table III compares its distance of codes with these methods and does not say what they are given;
here it is the same codes (the detectors of these names judge ImageNet features instead). They and their readings stand
in trainer/judges.py. Map: the residual, in which a code has no part.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from trainer.judges import Judging, Mixture, OneClass, OutlierFactor
from trainer.learning import Material, Options, Progress, in_chunks
from trainer.scorers.residual import Residual


class OneClassCode(nn.Module):
    """image, reconstruction (N, C, h, w), code (N, d) -> anomaly_map (N, 1, h, w), score (N,) of the judge."""

    def __init__(self, judge: nn.Module, keep: Tensor) -> None:
        super().__init__()
        self.judge = judge
        self.residual = Residual(keep)

    def forward(self, image: Tensor, reconstruction: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        anomaly_map, _ = self.residual(image, reconstruction, latent)
        return anomaly_map, self.judge(latent)


def judged_by(learn_usual: Judging) -> Callable[[nn.Module, Material, Tensor, Options, Progress], nn.Module]:
    """Return the training of a scorer (trainer/catalogue.py) whose judge learns from the codes of good images."""

    def fit(network: nn.Module, material: Material, learn: Tensor, options: Options, progress: Progress) -> nn.Module:
        codes = in_chunks(network, material.batch[learn], progress, "codes")[1]
        return OneClassCode(learn_usual(codes, options), material.keep).eval()

    return fit


fit_gmm = judged_by(Mixture.of)
fit_ocsvm = judged_by(OneClass.of)
fit_lof = judged_by(OutlierFactor.of)
