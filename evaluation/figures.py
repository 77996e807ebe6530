"""Pictures of what the system does, drawn from faces of our own generator: nobody's photograph.

    python -m evaluation.figures samples SEED [SEED ...]     samples/face-*.png, the demonstration's
    python -m evaluation.figures result                      docs/result.png, the README's

A sampled face comes from z through the mapping network, so it is nobody. Its seed is its name.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from channel_sim.channel import channel
from receiver.pipeline import Receiver
from shared.bundle import Bundle
from shared.images import encode_png, to_uint8
from shared.stylegan2 import Generator
from transmitter.pipeline import Transmitter

ROOT = Path(__file__).parents[1]
SENTENCES = (
    "-",
    "make the smile bigger",
    "add glasses",
    "give a fuller beard",
    "add bangs",
    "make the face much older",
)


def sampled_face(generator: Generator, seed: int) -> Tensor:
    """The face [1, 3, S, S] of seed `seed`."""
    draws = torch.Generator().manual_seed(seed)
    z = torch.randn(1, generator.config.z_dim, generator=draws)
    with torch.no_grad():
        image: Tensor = generator(z)
    return image.clamp(-1, 1)


def write_samples(bundle: Bundle, seeds: Sequence[int], folder: Path) -> list[Path]:
    """Draw one PNG per seed into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = Generator.from_bundle(bundle)
    paths = []
    for seed in seeds:
        path = folder / f"face-{seed}.png"
        path.write_bytes(encode_png(sampled_face(generator, seed)))
        paths.append(path)
    return paths


def result_sheet(bundle: Bundle, samples: Sequence[Path], snr_db: float) -> Image.Image:
    """A row per sample: the face, then what arrives for each of SENTENCES at snr_db, AWGN."""
    transmitter, receiver = Transmitter.from_bundle(bundle), Receiver.from_bundle(bundle)
    size, head = transmitter.image_size, 22
    width = size * (len(SENTENCES) + 1)
    sheet = Image.new("RGB", (width, head + size * len(samples)), "white")
    pen = ImageDraw.Draw(sheet)
    titles = ["photo", *(s if s != "-" else "received unedited" for s in SENTENCES)]
    for column, title in enumerate(titles):
        pen.text((column * size + 3, 5), title, fill="black")
    for row, path in enumerate(samples):
        for column in range(len(titles)):
            if column == 0:
                tile = Image.open(path).convert("RGB")
            else:
                symbols = transmitter.transmit(
                    path.read_bytes(), SENTENCES[column - 1], snr_db=snr_db, align=False
                ).symbols
                draws = torch.Generator().manual_seed(row)
                image = receiver(channel(symbols, snr_db=snr_db, generator=draws))
                tile = Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy())
            sheet.paste(tile, (column * size, head + row * size))
    return sheet


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.figures")
    parser.add_argument("figure", choices=["samples", "result"])
    parser.add_argument("seeds", nargs="*", type=int, help="seeds of the sampled faces")
    parser.add_argument("--snr-db", type=float, default=6.0)
    parser.add_argument("--bundle", type=Path, default=None)
    options = parser.parse_args(arguments)
    bundle = Bundle.open(options.bundle)
    if options.figure == "samples":
        for path in write_samples(bundle, options.seeds, ROOT / "samples"):
            print(path)
        return
    samples = sorted((ROOT / "samples").glob("*.png"))
    (ROOT / "docs").mkdir(exist_ok=True)
    result_sheet(bundle, samples, options.snr_db).save(ROOT / "docs" / "result.png", optimize=True)


if __name__ == "__main__":
    main()
