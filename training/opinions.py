"""Recipe: two nets of the bundle that guide edits beside P (`transmitter.opinions`).

    training faces ----------------------------------------------.--> augmented --> as P is trained
    training faces --E--> w --A_CE, AWGN, A_CD--> G --> received -'

What they have to see degrees in are received pictures, which are softer than photographs: so that
is what two of five are trained on. Trunk, resolution, augmentation and seed are shared with neither
P nor the judge, for only nets that err apart are worth more than one. The judge is never trained
here nor asked by the transmitter: what it guides it could no longer judge.

Run it again whenever the generator, the inversion encoder or the adapters have changed, and the
fields afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from channel_sim.channel import Channel, ChannelConfig
from shared.adapters import Adapters
from shared.bundle import Bundle
from shared.errors import InvalidRequest
from shared.stylegan2 import Generator
from training import predictor
from training.augment import Augmentation
from training.data import FaceSet, load_faces
from training.predictor import PredictorRecipe
from training.run import RunOptions
from transmitter.inversion import InversionEncoder
from transmitter.opinions import OPINIONS

NEEDED: Final = ("generator", "inversion")


@dataclass(frozen=True)
class Member:
    """One of them; seed is added to the run's."""

    seed: int
    recipe: PredictorRecipe


MEMBERS: Final[Mapping[str, Member]] = MappingProxyType(
    dict(
        zip(
            OPINIONS,
            (
                Member(
                    4242,
                    PredictorRecipe(
                        length=1200,
                        learning_rate=1.5e-3,
                        resolution=112,
                        widths=(24, 56, 112, 176),
                        depths=(0, 1, 2, 1),
                        augmentation=Augmentation(
                            shift=0.05, turn_deg=7.0, zoom=0.10, colour=0.8, noise=0.06, erased=0.25
                        ),
                    ),
                ),
                Member(
                    9545,
                    PredictorRecipe(
                        length=1200,
                        learning_rate=1.5e-3,
                        resolution=80,
                        widths=(28, 64, 112, 192),
                        depths=(0, 1, 2, 0),
                        augmentation=Augmentation(
                            shift=0.06, turn_deg=8.0, zoom=0.09, colour=0.9, noise=0.07, erased=0.15
                        ),
                    ),
                ),
            ),
            strict=True,
        )
    )
)
"""About 12 and 7 minutes of one CPU core; in fp16 3.4 and 2.0 MB."""


@dataclass(frozen=True)
class Reception:
    """How many training faces are received, and at which SNRs, AWGN."""

    faces: int = 7000
    lowest_snr_db: float = 6.0
    highest_snr_db: float = 20.0


@torch.no_grad()
def received(
    bundle: Bundle, faces: FaceSet, how: Reception, device: torch.device, seed: int
) -> FaceSet:
    """Some faces as they arrive, unedited. Raises InvalidRequest for nets not trained yet."""
    for net in NEEDED:
        if not bundle.has(net):
            raise InvalidRequest(
                f"training opinions needs {net!r} in {bundle.folder}: train it first"
            )
    encoder = InversionEncoder.from_bundle(bundle).to(device)
    generator = Generator.from_bundle(bundle).to(device)
    adapters = Adapters.from_bundle(bundle).to(device)
    air = Channel(ChannelConfig("awgn"))
    draw = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(faces), generator=draw)[: how.faces]
    span = how.highest_snr_db - how.lowest_snr_db
    pictures: list[Tensor] = []
    for part in index.split(16):
        snr_db = how.lowest_snr_db + span * float(torch.rand(1, generator=draw))
        with torch.autocast(device.type, torch.bfloat16):
            w = encoder(faces.batch(part).to(device)).float()
        arrived = adapters.decoder(air(adapters.encoder(w, snr_db), snr_db, draw).y, snr_db)
        with torch.autocast(device.type, torch.bfloat16):
            image = generator.synthesis(arrived)
        pictures.append((image.float().clamp(-1, 1) * 127.5 + 127.5).round().byte().cpu())
    return faces.pick(index, torch.cat(pictures))


def train(
    options: RunOptions,
    *,
    members: Mapping[str, Member] = MEMBERS,
    reception: Reception | None = None,
) -> None:
    """Train every one of them and write it to the bundle; each resumes exactly."""
    also = received(
        Bundle.open(options.bundle),
        load_faces(options.data, "train"),
        Reception() if reception is None else reception,
        options.torch_device(),
        options.seed,
    )
    for net, member in members.items():
        own = replace(options, seed=options.seed + member.seed)
        predictor.train(own, net=net, recipe=member.recipe, also=also)
