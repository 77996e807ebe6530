"""What the command line lets one choose from, as names; nothing heavy is imported for them."""

from enum import StrEnum


class Suite(StrEnum):
    """What `edsc evaluate` can measure."""

    LINK = "link"
    BUNDLE = "bundle"
    SHEETS = "sheets"
    BENCH = "bench"
    PAPER = "paper"


class RecipeName(StrEnum):
    """What `edsc train` can train, in the order in which `all` does it (without `deepsc`)."""

    PREDICTOR = "predictor"
    OPINIONS = "opinions"
    FACES = "faces"
    TEXT = "text"
    GENERATOR = "generator"
    MAPPING = "mapping"
    ADAPTERS = "adapters"
    FIELDS = "fields"
    REGRESSOR = "regressor"
    JUDGE = "judge"
    DEEPSC = "deepsc"
    ALL = "all"
