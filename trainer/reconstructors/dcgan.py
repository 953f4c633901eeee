"""dcgan: a generator learnt against a discriminator; the reconstruction is its picture nearest to the image.

Source: paper 000, sec. 2.3.1, 3.2.2, 4.3, fig. 12, algorithms 2 and 3; 001, sec. III; 003, sec. 3.3.3. Strided and
transposed 4x4 convolutions, batch normalisation but not at the generator's end and the discriminator's input,
LeakyReLU in the discriminator, ReLU and a final tanh in the generator; label smoothing 0.8; annealed noise on half of
the batch and, as instance noise, on everything that the discriminator sees; horizontal flips; the generator is rewarded
for log D(G(z)), not for -log(1 - D(G(z))).

Beyond the papers, options: Wasserstein loss with gradient penalty (Gulrajani et al. 2017, arXiv:1704.00028: no batch
normalisation in the critic, five of its steps to one of the generator's, penalty 10); nearest enlargement and a 3x3
convolution instead of transposed convolutions (Odena et al. 2016: no checkerboard). An encoder, trained afterwards with
the generator fixed, gives the start of the inversion (as f-AnoGAN's, Schlegl et al. 2019: pixels and features).

Readings chosen: filters that double up to 128, halved until the map has 8 px on its shorter side (at 256 px 8, 16, 32,
64, 128: "fewer filters", and every layer of a step of the inversion costs about the same); Adam 2e-4 with beta1 0.5
and first weights as in Radford et al. 2016; the noise falls from 0.1 to 0 over the first half of the epochs; a dense
layer from z to the first map; f is the last convolution after its LeakyReLU; an epoch has 8 batches at least
("randomly fetch batch size data"), so that a small set trains as long.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.inversion import Distance, Inversion, check_options
from trainer.learning import Material, Options, Progress
from trainer.reconstructors.gan_training import FEWEST_BATCHES, Adversaries, down
from trainer.training import Stage, batches, enough, gaussian, mean_loss, seeded, train

ENCODER_RATE = 1e-3
LATENT_WEIGHT = 0.1  # of the encoder's error on z of generated pictures, beside the pixels of real ones
SETTLED_BY = 32  # images that tell the usual slope
STARTS, START_SPREAD = 8, 0.3  # inversions of one image from several starts; deviation round the encoder's answer


class Dcgan(nn.Module):
    """image (N, C, h, w) in 0..1 -> reconstruction of the same shape, z (N, latent)."""

    def __init__(self, adversaries: Adversaries, encoder: nn.Sequential, size: torch.Size, options: Options) -> None:
        super().__init__()
        self.encoder = encoder
        self.inversion = Inversion(Distance(adversaries.generator, adversaries.features, size, options), options)
        fixed = torch.Generator().manual_seed(options.seed)
        self.register_buffer("around", START_SPREAD * torch.randn(STARTS, options.latent, generator=fixed))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (reconstruction, z)."""
        target = signed(image)
        picture, z = self.inversion(target, self.encoder(target))
        return 0.5 * (picture + 1.0), z

    def latents(self, image: Tensor) -> Tensor:
        """Return z found from several starts round the encoder's answer, (N, 8, latent).

        Each step adds half of what the encoder misses in the picture of z: no gradient, so no jump where one of its
        units turns, which would be another z in every engine.
        """
        wanted = self.encoder(signed(image))[:, None]
        z = wanted + self.around
        for _ in range(self.inversion.steps):
            seen = self.encoder(self.inversion.distance.generator(z.flatten(0, 1))[-1])
            z = z + 0.5 * (wanted - seen.unflatten(0, (-1, STARTS)))
        return z

    def features(self, image: Tensor) -> Tensor:
        """Return the discriminator's last convolution, (N, e), of an image in 0..1."""
        return self.inversion.distance.goal(signed(image))

    def pictures(self, z: Tensor) -> Tensor:
        """Return generated images (N, C, h, w) in 0..1."""
        picture: Tensor = self.inversion.distance.generator(z)[-1]
        return 0.5 * (picture + 1.0)


def signed(image: Tensor) -> Tensor:
    """Return an image of 0..1 in -1..1, as the tanh makes them."""
    return 2.0 * image - 1.0


def fit(material: Material, learn: Tensor, validate: Tensor, options: Options, progress: Progress) -> Dcgan:
    """Return generator, discriminator and encoder as one network.

    learn, validate: (n,) indices into material.batch. Leaves a checkpoint after every epoch and resumes from it when
    material.resume is set. Raises TrainingError if the training diverges.
    """
    check_options(options)
    torch.manual_seed(options.seed)
    size = material.batch.shape[1:]
    images, unseen = (signed(material.batch[chosen]).to(options.device) for chosen in (learn, validate))
    enough(images, "dcgan")
    adversaries = Adversaries(size, options).to(options.device)
    adversaries.learn(images, material, options, progress)
    torch.manual_seed(options.seed)  # a training that goes on here starts as the first one did
    encoder = down(size, options.latent, normalise=True).to(options.device)
    stage = _encoder_stage(adversaries.to(options.device), encoder, images, unseen, options)
    train(stage, material, options, progress)
    network = Dcgan(adversaries.cpu(), encoder, size, options).eval().requires_grad_(False)
    with torch.no_grad():
        few = images[:SETTLED_BY].cpu()
        network.inversion.settle(few, encoder(few))
    return network


def _encoder_stage(
    adversaries: Adversaries, encoder: nn.Sequential, images: Tensor, unseen: Tensor, options: Options
) -> Stage:
    adversaries.eval().requires_grad_(False)
    optimiser = torch.optim.Adam(encoder.parameters(), lr=ENCODER_RATE)

    def apart(image: Tensor) -> Tensor:
        picture = adversaries.generator(encoder(image))
        features = (adversaries.features(picture) - adversaries.features(image)).abs().sum(1)
        loss = (picture - image).abs().flatten(1).sum(1) + options.feature_weight * features
        return loss.mean() / image[0].numel()

    def train_epoch(epoch: int) -> None:
        generator = seeded(options, epoch)
        for image in batches(images, generator, FEWEST_BATCHES):
            z = gaussian(torch.empty(len(image), options.latent, device=image.device), generator)
            known = (encoder(adversaries.generator(z)) - z).square().mean()
            loss = apart(image) + LATENT_WEIGHT * known
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    return Stage(
        name="encoder",
        network=encoder,
        optimisers=(optimiser,),
        train_epoch=train_epoch,
        loss=lambda: mean_loss(apart, encoder, unseen),
        after=("generator",),
        reads=("latent", "feature_weight"),
    )
