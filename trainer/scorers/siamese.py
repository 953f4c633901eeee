"""siamese: do image and reconstruction show the same, as a network sees it that was taught to tell?

Source: paper 000, sec. 3.3, 4.6, eq. 13, fig. 6, 7, 18: two trunks with shared weights on the image and on its
reconstruction, global average pooling, both vectors concatenated, one sigmoid. Taught with pairs of good images
("same") and of defective ones ("different") with their reconstructions. The map is the salience map of sec. 4.6, the
last feature maps weighted as the sigmoid weighs them; its mean is the logit. Score and map are shown as in
`trainer/classifier.py`: 20 is the paper's threshold of 0.5.

The trunk is VGG16 in the paper; here `--backbone` says (`vgg16` cut as in sec. 4.2, `lite0` up to stride 16), its last
block trained. Defects are those of the folders train/DEFECT; where there are none, defects made from good images
(`trainer/synthetic.py`), and the recipe says so. Readings chosen: the sigmoid gives the probability of "different",
Adam at 1e-4 for the trunk, batches of 16, the epoch of the least validation loss.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from trainer.classifier import Examples, evidence, labelled_split, train_classifier
from trainer.labels import LEARNT, SYNTHETIC
from trainer.learning import Material, Options, Progress, at_map_size, in_chunks, split
from trainer.synthetic import synthetic_defects
from trainer.trunks import Channels, Trunk, trunk, usual_channels

LEARNING_RATE, HEAD_RATE = 1e-4, 3e-3  # of the trunk's last block, of the last layer
MOST_PAIRS = 400  # of either kind: what the frozen piece of the trunk makes of them is kept in memory


def fit(network: nn.Module, material: Material, learn: Tensor, options: Options, progress: Progress) -> nn.Module:
    """Return the scorer. Raises TrainingError if there are too few defects of a type, or none can be made."""
    _, validate, _ = split(material, "siamese")
    labels = material.defects is not None and len(material.defects) > 0
    if labels:
        defects = labelled_split(material, "siamese")
    else:
        defects = (
            made(material, learn, options.seed),
            made(material, validate, options.seed + 1),
        )
    body = trunk(options.backbone, options)
    cached = [
        pair_features(network, body, images[:MOST_PAIRS], progress)
        for images in (material.batch[learn], defects[0], material.batch[validate], defects[1])
    ]
    keep = at_map_size(material.keep, *(side // 16 for side in material.keep.shape))
    torch.manual_seed(options.seed)
    siamese = Siamese(body, usual_channels(body, cached[0][:, 0]), keep, LEARNT if labels else SYNTHETIC)
    optimiser = torch.optim.Adam(
        [
            {"params": body.last.parameters(), "lr": LEARNING_RATE},
            {"params": siamese.weigh.parameters(), "lr": HEAD_RATE},
        ]
    )
    apart = replace(material, checkpoint=material.checkpoint.with_name(f"{material.checkpoint.name}.siamese"))
    examples = Examples(cached[0], cached[1]), Examples(cached[2], cached[3])
    rest = apart, options, progress
    train_classifier("siamese", siamese, examples, optimiser, rest, reads=("backbone", "weights"))
    apart.checkpoint.unlink(missing_ok=True)
    return siamese


class Siamese(nn.Module):
    """image, reconstruction (N, C, h, w), latent -> anomaly_map (N, 1, h/16, w/16) and score (N,), as `evidence`."""

    def __init__(self, body: Trunk, usual: Channels, keep: Tensor, learnt_defects: str) -> None:
        super().__init__()
        self.body = body
        self.usual = usual
        self.weigh = nn.Conv2d(2 * body.channels, 1, 1)
        self.register_buffer("keep", keep)  # (1, 1, h', w')
        self.learnt_defects = learnt_defects

    def forward(self, image: Tensor, reconstruction: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        del latent
        local = self._local(self.body(image), self.body(reconstruction))
        return evidence(local) * self.keep, evidence(self._pooled(local))

    def logit(self, cached: Tensor) -> Tensor:
        """(N, 2, ..) features of the frozen piece, of image and reconstruction -> (N,), above 0 where they differ."""
        return self._pooled(self._local(self.body.last(cached[:, 0]), self.body.last(cached[:, 1])))

    def embedded(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        """Return the concatenated vectors (N, 2 D) that the sigmoid weighs."""
        pairs = torch.cat([self.usual(self.body(image)), self.usual(self.body(reconstruction))], dim=1)
        return (pairs * self.keep).flatten(2).sum(2) / self.keep.sum()

    def _local(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        """Return the logit of each place, (N, 1, h', w')."""
        logits: Tensor = self.weigh(torch.cat([self.usual(image), self.usual(reconstruction)], dim=1))
        return logits

    def _pooled(self, local: Tensor) -> Tensor:
        return (local * self.keep).flatten(1).sum(1) / self.keep.sum()


def made(material: Material, chosen: Tensor, seed: int) -> Tensor:
    """Return as many synthetic defects as there are good images chosen, at most MOST_PAIRS."""
    return synthetic_defects(material.batch[chosen], material.keep, min(len(chosen), MOST_PAIRS), seed)[0]


def pair_features(network: nn.Module, body: Trunk, images: Tensor, progress: Progress) -> Tensor:
    """Return (n, 2, ..): what the trunk's frozen piece makes of images (n, C, h, w) and of their reconstructions."""
    if len(images) == 0:
        return torch.empty(0)

    def both(image: Tensor) -> list[Tensor]:
        return [torch.stack([body.frozen(image), body.frozen(network(image)[0])], dim=1)]

    return in_chunks(both, images, progress, "pairs", size=1)[0].clone()
