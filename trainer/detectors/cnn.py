"""cnn: a small convolutional network that learns from labelled defects; the supervised baseline of paper 003.

Source: paper 003, sec. 3.4: five times convolution 3x3 with 16 filters, ReLU and 2x2 maximum pooling, flattened, one
hidden layer, one sigmoid; RMSprop, binary cross-entropy.

Readings chosen where the paper is silent: 16 filters in every layer, 128 hidden units, learning rate 1e-3, batches of
16, the epoch of the least validation loss. The map is the gradient of the logit times the last feature maps, before
their pooling; through ReLU and maximum it is a product that the graph computes forward. What good parts show there on
average is taken away, and the rest counts in their deviations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.classifier import Examples, evidence, labelled_split, train_classifier
from trainer.labels import LEARNT
from trainer.learning import Learned, Material, Options, Progress, at_map_size, held_out_judged, in_chunks, split

DEPTH, FILTERS, HIDDEN = 5, 16, 128
LEARNING_RATE = 1e-3


def fit(material: Material, options: Options, progress: Progress) -> Learned:
    """Return the detector of the epoch with the least validation loss; thresholds rest on good images it never saw."""
    defects = labelled_split(material, "cnn")
    learn, validate, held_out = split(material, "cnn")
    torch.manual_seed(options.seed)
    network = Cnn(material.batch.shape[1], material.keep)
    optimiser = torch.optim.RMSprop(network.parameters(), lr=LEARNING_RATE)
    examples = Examples(material.batch[learn], defects[0]), Examples(material.batch[validate], defects[1])
    train_classifier("cnn", network, examples, optimiser, (material, options, progress))
    network.learn_usual(material.batch[learn], progress)
    return held_out_judged(network, material.batch, held_out, progress, learnt_defects=LEARNT)


class Cnn(nn.Module):
    """image (N, C, h, w) -> anomaly_map (N, 1, h/16, w/16) in deviations of good parts, score (N,) as `evidence`."""

    def __init__(self, channels: int, keep: Tensor) -> None:
        super().__init__()
        height, width = (side // 2 ** (DEPTH - 1) for side in keep.shape)
        inputs = [channels] + [FILTERS] * (DEPTH - 1)
        self.layers = nn.ModuleList(nn.Conv2d(before, FILTERS, 3, padding=1) for before in inputs)
        self.hidden = nn.Linear(FILTERS * (height // 2) * (width // 2), HIDDEN)
        self.out = nn.Linear(HIDDEN, 1)
        self.register_buffer("keep", at_map_size(keep, height, width))
        self.register_buffer("usual", torch.zeros(1, 1, height, width))
        self.register_buffer("scale", torch.ones(1, 1, height, width))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        last, logit, gradient = self._passed(image)
        share = _shares(last, gradient)
        return ((share - self.usual) * self.scale).clamp(min=0.0) * self.keep, evidence(logit)

    def logit(self, cached: Tensor) -> Tensor:
        """(N, C, h, w) -> (N,), above 0 where a part is rather defective."""
        return self._passed(cached)[1]

    def learn_usual(self, good: Tensor, progress: Progress) -> None:
        """Note what each place adds to the logit on good images (n, C, h, w)."""
        parts = in_chunks(lambda part: [_shares(*self._passed(part)[::2])], good, progress, "map")[0]
        deviation = parts.std(0, keepdim=True, correction=0)
        self.usual.copy_(parts.mean(0, keepdim=True))
        self.scale.copy_(1.0 / (deviation + deviation.mean() + 1e-6))

    def _passed(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the last features before pooling, the logit, and its gradient for the pooled features."""
        x = image
        for layer in self.layers[:-1]:
            x = F.max_pool2d(F.relu(layer(x)), 2)
        last = F.relu(self.layers[-1](x))
        pooled = F.max_pool2d(last, 2)
        hidden = self.hidden(pooled.flatten(1))
        logit = self.out(F.relu(hidden))[:, 0]
        active = (hidden > 0).to(hidden.dtype) * self.out.weight  # (N, hidden)
        return last, logit, torch.matmul(active, self.hidden.weight).reshape(pooled.shape)


def _shares(last: Tensor, gradient: Tensor) -> Tensor:
    """Return what each place of the last features (N, f, h', w') adds to the logit: (N, 1, h', w')."""
    highest = F.interpolate(F.max_pool2d(last, 2), scale_factor=2.0, mode="nearest")
    passed = F.interpolate(gradient, scale_factor=2.0, mode="nearest") * (last >= highest).to(last.dtype)
    return (passed * last).sum(1, keepdim=True)
