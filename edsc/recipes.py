"""`edsc train` and `edsc weights`: the recipes by name, and what they have made."""

import signal
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from shared.bundle import Bundle
from shared.errors import InvalidRequest
from training.run import RunOptions

# What `all` trains, in order: the mapping network, the fields and the adapters want the generator
# and its inversion encoder, the fields also the predictors and the adapters, and the regressor all
# of these. The judge only evaluates. The baselines' codec, `deepsc`, is no part of the link.
ORDER: Final = (
    "predictor",
    "opinions",
    "faces",
    "text",
    "generator",
    "mapping",
    "adapters",
    "fields",
    "regressor",
    "judge",
)


def recipe(name: str) -> Callable[[RunOptions], None]:
    """The `train` of training/`name`.py. Raises InvalidRequest for an unknown name."""
    match name:
        case "predictor":
            from training import predictor

            return predictor.train
        case "faces":
            from training import faces

            return faces.train
        case "text":
            from training import text

            return text.train
        case "generator":
            from training import generator

            return generator.train
        case "mapping":
            from training import mapping

            return mapping.train
        case "fields":
            from training import fields

            return fields.train
        case "regressor":
            from training import regressor

            return regressor.train
        case "opinions":
            from training import opinions

            return opinions.train
        case "adapters":
            from training import adapters

            return adapters.train
        case "judge":
            from training import predictor

            return predictor.train_judge

        case "deepsc":
            from training import deepsc

            return deepsc.train
        case _:
            expected = ", ".join((*ORDER, "deepsc"))
            raise InvalidRequest(f"recipe is {name!r}; expected one of {expected}, all")


def train_one(name: str, **options: Any) -> None:
    """Train `name`, or everything in order for "all"; options as RunOptions has them.

    A stop by SIGTERM inside `all` ends the recipe under way and goes no further.
    """
    chosen = RunOptions.default(**options)
    if name != "all":
        recipe(name)(chosen)
        return
    stopped: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    try:
        for each in ORDER:
            if not stopped:
                print(f"-- {each}", flush=True)
                recipe(each)(chosen)
    finally:
        signal.signal(signal.SIGTERM, before)


def describe_bundle(folder: Path | None) -> str:
    """A bundle in lines: nets with sizes, hashes (checked) and provenance, then the scores.

    Raises BundleError where a file is missing or is not what its hash says.
    """
    bundle = Bundle.open(folder, verify=True)
    lines = [
        f"{bundle.name}  {bundle.folder}",
        f"digest {bundle.digest}",
        "",
        f"{'net':<14} {'MB':>7}  {'parameters':>11}  {'sha256':<16}  trained",
    ]
    total = 0
    for net in bundle.nets:
        entry = bundle.index["nets"][net]
        count = sum(tensor.numel() for tensor in bundle.tensors(net).values())
        total += int(entry["bytes"])
        lines.append(
            f"{net:<14} {entry['bytes'] / 1e6:>7.2f}  {count:>11,}  {entry['sha256'][:16]}  "
            f"{_trained(bundle.provenance(net))}"
        )
    lines.append(f"{'all':<14} {total / 1e6:>7.2f}  every hash is right")
    if bundle.scores:
        lines += ["", "scores (intervals and the rest: README.md beside the nets)"]
        lines += [f"  {name:<13} {_score(value)}" for name, value in bundle.scores.items()]
    return "\n".join(lines)


def _trained(provenance: dict[str, Any]) -> str:
    images = provenance.get("images")
    parts = (
        f"{images:,} images" if isinstance(images, int) and images else "",
        f"{provenance['hours']:g} h" if "hours" in provenance else "",
        f"commit {provenance['commit']}" if "commit" in provenance else "",
    )
    return ", ".join(part for part in parts if part)


def _score(value: Any) -> str:
    """One line of a suite's report: how many bars it reached, or the means that it has."""
    if not isinstance(value, Mapping):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    if "bars" in value:
        verdicts = Counter(bar["verdict"] for bar in value["bars"])
        missed = [bar["what"] for bar in value["bars"] if bar["verdict"] == "missed"]
        return "; ".join([f"{verdicts['reached']} bars reached, {len(missed)} missed", *missed])
    means = {name: one["mean"] for name, one in value.items() if _is_figure(one)}
    return ", ".join(f"{name} {mean:.4g}" for name, mean in means.items())


def _is_figure(value: object) -> bool:
    return isinstance(value, Mapping) and "mean" in value
