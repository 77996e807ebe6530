"""Recipe: the text encoder, trained on the grammar's and on written sentences (one core, CPU).

::

    grammar ---------------.
    written, varied -------+-> sentence + labels -> words and pieces -> TextEncoder
                                                             six cross-entropies --'

The refusal threshold, and the scores in the bundle, come from sentences that are not trained on:
every tenth written one, and `sentences_dev.jsonl`, which was written apart from all of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.attributes import MAX_DEGREE, Edit
from shared.bundle import Bundle, write_net
from shared.errors import InstructionRefused, InvalidRequest
from training.patterns import vocabulary
from training.run import Run, RunOptions
from training.sentences import DEV_SET, Sentence, make_sentence, read_sentences
from training.written import draw_written, split_written, written_words
from transmitter.text import (
    NET,
    Heads,
    Sentences,
    TextConfig,
    TextEncoder,
    certainty,
    decide,
    tokenise,
)

NAME = "text"
DEMANDED = {"direction": 0.98, "refused": 0.98}  # shares of right answers, see `score`


@dataclass(frozen=True)
class Recipe:
    """What the run does; the defaults are the shipped net's."""

    steps: int = 98300
    batch: int = 64
    written: float = 0.6  # share of written sentences; the others are the grammar's
    chunk: int = 32  # batches drawn at once and sorted by length, so that padding is short
    turns: int = 2  # times that a chunk is gone through: to draw one costs as much as a turn
    rate: float = 3e-3
    warm_up: int = 100
    weight_decay: float = 0.01
    hidden_words: float = 0.1  # share of words that pass for unknown
    smoothing: float = 0.03
    averaged: float = 0.998  # decay of the running mean of the weights, which is what is kept
    warm: bool = False  # begin from the bundle's net, when the grammar has grown since


def train(
    options: RunOptions, recipe: Recipe | None = None, config: TextConfig | None = None
) -> None:
    """Train, and write the net `text` to `options.bundle`; goes on from the last checkpoint."""
    recipe = recipe or Recipe()
    with Run(NAME, options) as run:
        saved = run.restore()
        with torch.random.fork_rng(devices=[]):  # building a net must not move the restored state
            torch.manual_seed(options.seed)
            encoder = TextEncoder(config or TextConfig(known_words())).to(run.device)
        optimiser = torch.optim.AdamW(
            encoder.parameters(),
            recipe.rate,
            (0.9, 0.98),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        started: dict[str, Any] = {}
        if saved is None and recipe.warm:
            started = {"earlier_runs": warm_start(encoder, Bundle.open(options.bundle))}
        if saved is not None:
            started = saved["started"]
            encoder.load_state_dict(saved["encoder"])
            optimiser.load_state_dict(saved["optimiser"])
        average = deepcopy(encoder).eval().requires_grad_(False)
        if saved is not None:
            average.load_state_dict(saved["average"])
        unseen = {"held_out": split_written()[1], "dev": tuple(read_sentences(DEV_SET))}

        def checkpoint() -> None:
            run.save(
                {
                    "encoder": encoder.state_dict(),
                    "average": average.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "started": started,
                }
            )
            calibrated, scores = calibrate(average, unseen)
            run.record(
                **{f"{name} {key}": v for name, row in scores.items() for key, v in row.items()}
            )
            write_net(
                options.bundle,
                NET,
                config=calibrated.to_json(),
                tensors=average.state_dict(),
                provenance=run.provenance(
                    data="sentences of the project's own grammar (training/*.toml), and sentences "
                    "written by an AI model (training/sentences_written.tsv)",
                    unseen=scores,
                    **started,
                ),
            )

        encoder.train()
        chunk: list[list[Sentence]] = []
        while run.step < recipe.steps and not run.stopping:
            number, place = divmod(run.step, recipe.chunk * recipe.turns)
            if place == 0 or not chunk:
                chunk = draw_chunk(options.seed, number, recipe)
            batch = chunk[place % recipe.chunk]
            hide = hider(options.seed, run.step, recipe.hidden_words)
            sentences, labels = to_tensors(encoder, batch, run.device, hide)
            for group in optimiser.param_groups:
                group["lr"] = rate_at(run.step, recipe)
            # Of a training step the LSTM is the most: bfloat16 makes it three times as fast where
            # the processor has it.
            with torch.autocast(run.device.type, torch.bfloat16):
                opinions = encoder.each(sentences)
            losses = [loss_of(heads, labels, recipe.smoothing) for heads in opinions]
            loss = torch.stack(losses).mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            optimiser.step()
            run.step += 1
            follow(average, encoder, min(recipe.averaged, (run.step + 1) / (run.step + 10)))
            run.images += len(batch)  # sentences here
            if run.due("report", 0.5):
                run.record(loss=loss.item())
            if run.due("checkpoint", 10):
                checkpoint()
        checkpoint()


def warm_start(encoder: TextEncoder, bundle: Bundle) -> list[dict[str, Any]]:
    """Copy the bundle's text encoder into this one, word by word; returns the runs that made it.

    Words that the old vocabulary lacks keep their random embedding. Raises BundleError where the
    bundle has no such net, InvalidRequest where its shape differs.
    """
    old = TextConfig.from_json(bundle.config(NET))
    if replace(old, vocabulary=(), threshold=0.5) != replace(encoder.config, vocabulary=()):
        raise InvalidRequest(
            f"cannot begin from the text encoder of {bundle.folder}: its shape differs"
        )
    tensors = bundle.tensors(NET)
    ours_now = encoder.state_dict()
    tables = [name for name in tensors if name.endswith(".words.weight")]
    encoder.load_state_dict({**tensors, **{name: ours_now[name] for name in tables}}, strict=True)
    rows = {word: row for row, word in enumerate(old.vocabulary, start=1)}
    pairs = [(0, 0)]  # the unknown word
    for row, word in enumerate(encoder.config.vocabulary, start=1):
        if word in rows:
            pairs.append((row, rows[word]))
    ours, theirs = torch.tensor(pairs).T
    with torch.no_grad():
        for name in tables:
            table = encoder.get_parameter(name)
            table[ours] = tensors[name][theirs].to(table.device)
    made = bundle.provenance(NET)
    earlier: list[dict[str, Any]] = made.get("earlier_runs", [])
    return [
        *earlier,
        {key: made.get(key) for key in ("commit", "seed", "steps", "images", "hours")},
    ]


def known_words() -> tuple[str, ...]:
    """The words of the grammar and of the written sentences, in alphabetical order."""
    return tuple(sorted({*vocabulary(), *written_words()}))


@torch.no_grad()
def follow(average: TextEncoder, encoder: TextEncoder, decay: float) -> None:
    """Move the running mean of the weights: average = decay average + (1 - decay) encoder."""
    for mean, weight in zip(average.parameters(), encoder.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)


def rate_at(step: int, recipe: Recipe) -> float:
    """Learning rate: linear warm-up, then a cosine to zero over the recipe's steps."""
    if step < recipe.warm_up:
        return recipe.rate * (step + 1) / recipe.warm_up
    done = (step - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up)
    return recipe.rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def draw_chunk(seed: int, number: int, recipe: Recipe) -> list[list[Sentence]]:
    """The `number`-th batches, drawn from the seed and the number alone: a run resumes exactly."""
    rng = Random(f"{seed}/{number}")
    drawn: list[tuple[int, Sentence]] = []
    while len(drawn) < recipe.batch * recipe.chunk:
        sentence = draw_written(rng) if rng.random() < recipe.written else make_sentence(rng)
        if length := len(tokenise(sentence.text)):
            drawn.append((length, sentence))
    drawn.sort(key=lambda pair: pair[0])
    batches = [
        [sentence for _, sentence in drawn[i : i + recipe.batch]]
        for i in range(0, len(drawn), recipe.batch)
    ]
    rng.shuffle(batches)
    return batches


def hider(seed: int, step: int, share: float) -> Callable[[], bool]:
    """Says of `share` of the words of a step that they are to be hidden."""
    rng = Random(f"hidden {seed}/{step}")
    return lambda: rng.random() < share


def to_tensors(
    encoder: TextEncoder,
    batch: Sequence[Sentence],
    device: torch.device,
    hide: Callable[[], bool] | None = None,
) -> tuple[Sentences, Tensor]:
    """The numbered sentences and their labels [B, 6], UNSET where a sentence has none."""
    sentences = encoder.number([tokenise(sentence.text) for sentence in batch], hide)
    labels = torch.tensor([sentence.labels for sentence in batch])  # [B, 6]
    return sentences.to(device), labels.to(device)


def loss_of(heads: Heads, labels: Tensor, smoothing: float) -> Tensor:
    """Sum of the heads' cross-entropies, each over the sentences that have its label."""
    total = torch.zeros((), device=labels.device)
    for logits, wanted in zip(heads, labels.T, strict=True):
        # Divided by the whole batch: sentences without the label count as none.
        losses = F.cross_entropy(
            logits.float(), wanted, ignore_index=-1, label_smoothing=smoothing, reduction="sum"
        )
        total = total + losses / len(labels)
    return total


@torch.no_grad()
def predict(encoder: TextEncoder, sentences: Sequence[Sentence], batch: int = 128) -> list[Heads]:
    """Head probabilities of every sentence, each head [classes]."""
    encoder.eval()
    device = next(encoder.parameters()).device
    # In order of length, so that little is padded.
    order = sorted(range(len(sentences)), key=lambda i: len(tokenise(sentences[i].text)))
    found: dict[int, Heads] = {}
    for begin in range(0, len(order), batch):
        places = order[begin : begin + batch]
        numbers, _ = to_tensors(encoder, [sentences[i] for i in places], device)
        heads = [head.cpu().double().softmax(1) for head in encoder(numbers)]
        found |= {i: Heads(*(head[row] for head in heads)) for row, i in enumerate(places)}
    return [found[i] for i in range(len(sentences))]


def read_all(probabilities: Sequence[Heads], threshold: float) -> list[Edit | None]:
    """The edit of every sentence, None where it is refused."""
    edits: list[Edit | None] = []
    for heads in probabilities:
        try:
            edits.append(decide(heads, threshold).edit)
        except InstructionRefused:
            edits.append(None)
    return edits


def same_way(one: Edit, other: Edit) -> bool:
    """Whether two edits move the same attribute the same way.

    For two targets the face decides the way, so only 0 and 5 differ; a target between them is
    neither more nor less, and differs from every change.
    """
    if one.attribute is not other.attribute:
        return False
    if one.mode == other.mode == "target":
        return {one.target, other.target} != {0, MAX_DEGREE}
    return one.direction == other.direction


def score(edits: Sequence[Edit | None], sentences: Sequence[Sentence]) -> dict[str, float]:
    """Shares of right answers.

    direction: attribute and direction right (`same_way`), of the sentences in scope; size: the very
    edit; refused: of those out of scope.
    """
    inside = right = exact = outside = refused = 0
    for edit, sentence in zip(edits, sentences, strict=True):
        if sentence.edit is None:
            outside += 1
            refused += edit is None
            continue
        inside += 1
        exact += edit == sentence.edit
        right += edit is not None and same_way(edit, sentence.edit)
    return {
        "direction": right / max(1, inside),
        "size": exact / max(1, inside),
        "refused": refused / max(1, outside),
    }


def calibrate(
    encoder: TextEncoder, unseen: Mapping[str, Sequence[Sentence]]
) -> tuple[TextConfig, dict[str, dict[str, float]]]:
    """The configuration with the best threshold on the unseen sets together; the scores on each.

    Best: the middle of those whose worse share, measured by what is demanded of it, is best.
    """
    together = [sentence for sentences in unseen.values() for sentence in sentences]
    probabilities = predict(encoder, together)
    read = read_all(probabilities, 0.0)
    certain = [certainty(heads) for heads in probabilities]

    def at(threshold: float) -> list[Edit | None]:
        """What `read_all` gives at this threshold."""
        return [e if c >= threshold else None for e, c in zip(read, certain, strict=True)]

    thresholds = [0.02 * i for i in range(5, 46)]
    worse = []
    for threshold in thresholds:
        scores = score(at(threshold), together)
        worse.append(round(min(scores[name] / share for name, share in DEMANDED.items()), 6))
    best = [t for t, value in zip(thresholds, worse, strict=True) if value == max(worse)]
    threshold = round(best[len(best) // 2], 2)
    edits = at(threshold)
    found: dict[str, dict[str, float]] = {}
    begin = 0
    for name, sentences in unseen.items():
        own = edits[begin : begin + len(sentences)]
        begin += len(sentences)
        found[name] = {key: round(share, 4) for key, share in score(own, sentences).items()}
    return replace(encoder.config, threshold=threshold), found
