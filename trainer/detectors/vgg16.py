"""vgg16: a pretrained VGG16 that learns from labelled defects, with a class activation map.

Source: paper 000, sec. 4.2, fig. 10: VGG16 without its last three convolutions, last pool and dense layers; blocks 1-3
fixed, block 4 trained; global average pooling, one sigmoid. The map is the weighted sum of the last feature maps with
the weights between pooled features and sigmoid (sec. 4.6); its mean is the logit. `--defect-share` is the share of
defective images that the study of sec. 4.2 varies from 0 to 0.5.

Readings chosen where the paper is silent: Adam at 1e-4, batches of 16, binary cross-entropy, the epoch of the least
validation loss. Needs the weights file of VGG16 (--weights).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.classifier import Examples, evidence, labelled_split, train_classifier
from trainer.labels import LEARNT
from trainer.learning import Learned, Material, Options, Progress, at_map_size, held_out_judged, in_chunks, split
from trainer.trunks import Channels, Trunk, trunk, usual_channels

LEARNING_RATE = 1e-4
HEAD_RATE = 3e-3  # of the last layer, which starts from nothing


def fit(material: Material, options: Options, progress: Progress) -> Learned:
    """Return the detector of the epoch with the least validation loss; thresholds rest on good images it never saw."""
    defects = labelled_split(material, "vgg16")
    learn, validate, held_out = split(material, "vgg16")
    body = trunk("vgg16", options)
    cached = [
        cached_features(body.frozen, images, progress)
        for images in (material.batch[learn], defects[0], material.batch[validate], defects[1])
    ]
    keep = at_map_size(material.keep, *(side // 16 for side in material.keep.shape))
    torch.manual_seed(options.seed)
    network = Activation(body, usual_channels(body, cached[0]), keep)
    optimiser = torch.optim.Adam(
        [
            {"params": body.last.parameters(), "lr": LEARNING_RATE},
            {"params": network.weigh.parameters(), "lr": HEAD_RATE},
        ]
    )
    examples = Examples(cached[0], cached[1]), Examples(cached[2], cached[3])
    train_classifier("vgg16", network, examples, optimiser, (material, options, progress), reads=("weights",))
    return held_out_judged(network, material.batch, held_out, progress, learnt_defects=LEARNT)


class Activation(nn.Module):
    """image (N, C, h, w) -> anomaly_map (N, 1, h/16, w/16) and score (N,), both as `evidence` of a logit."""

    def __init__(self, body: Trunk, usual: Channels, keep: Tensor) -> None:
        super().__init__()
        self.body = body
        self.usual = usual
        self.weigh = nn.Conv2d(body.channels, 1, 1)
        self.register_buffer("keep", keep)  # (1, 1, h', w')

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        local = self.local(self.body.frozen(image))
        return evidence(local) * self.keep, evidence(self.pooled(local))

    def logit(self, cached: Tensor) -> Tensor:
        """(N, ..) features of the frozen piece -> (N,), above 0 where a part is rather defective."""
        return self.pooled(self.local(cached))

    def embedded(self, image: Tensor) -> Tensor:
        """Return the pooled vectors (N, D) that the sigmoid weighs."""
        features = self.usual(self.body(image)) * self.keep
        return features.flatten(2).sum(2) / self.keep.sum()

    def local(self, cached: Tensor) -> Tensor:
        """Return the logit of each place, (N, 1, h', w')."""
        logits: Tensor = self.weigh(self.usual(self.body.last(cached)))
        return logits

    def pooled(self, local: Tensor) -> Tensor:
        """Return the mean over the kept places, (N,): global average pooling, then the weights, in another order."""
        return (local * self.keep).flatten(1).sum(1) / self.keep.sum()


def cached_features(frozen: nn.Module, images: Tensor, progress: Progress) -> Tensor:
    """Return what the frozen piece makes of images (n, C, h, w); they may be none."""
    if len(images) == 0:
        return torch.empty(0)
    return in_chunks(lambda part: [frozen(part)], images, progress, "features")[0].clone()
