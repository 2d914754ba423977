"""Learning Unigram pieces, by hand: begin with far too many, and again and again estimate, then drop the least missed.

    seed     all characters, and the repeated substrings up to 16 characters with the highest count x length: unigram_seed.py
    E step   expected count of each piece over all cuts of all words (forward-backward, lattice.py)
    M step   score = digamma(count) - digamma(sum of counts); below half an occurrence a piece goes
    prune    what would be lost without piece i, if its f_i uses were cut into its second-best pieces j instead:
             loss_i = f_i (log(f_i / F) - sum_j log((f_j + f_i) / F')),   F = sum f,   F' = F + f_i (number of j - 1);
             the best 75 % stay, until 1.1 x the size; then the best scores make the vocabulary

Source: Kudo 1804.10959 section 3.2; SentencePiece's trainer for digamma, 0.5, 0.75, 1.1 and the form of the loss, which
cuts each piece anew but not the corpus.
Why digamma: exp(digamma(c)) is about c - 0.5, the mean-field estimate under a sparse Dirichlet prior. A piece that is used
once loses half its weight, one used a thousand times nothing, so rare pieces die early and their neighbours gain.
Costs 64 bytes per character of different words, and passes over them; some 10 MB of text. For more: the library's trainer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from zero2llm.tokenizers.lattice_batch import Words, best_cuts, expected_counts
from zero2llm.tokenizers.special import SPECIALS
from zero2llm.tokenizers.unigram import BYTES, UNKNOWN, words_of
from zero2llm.tokenizers.unigram_seed import State, alphabet_of, seed

MIN_COUNT = 0.5
SLACK = 1.1  # pruning stops here, so that the last choice is made by score
EM_STEPS = 2


def train_unigram(
    texts: Iterable[str],
    vocab_size: int,
    *,
    split: str = "qwen2",
    space: str = " ",
    prefix: bool = False,
    byte_fallback: bool = True,
    coverage: float = 0.9995,
    longest: int = 16,
    seed_size: int = 1_000_000,
    shrink: float = 0.75,
    names: Sequence[str] = SPECIALS,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[str, float]]:
    """``vocab_size`` pieces and their scores: <0x00> to <0xFF> or <unk>, then the learned ones, best first.

    The most frequent characters that make up ``coverage`` of the text are pieces whatever else is, the others become bytes or
    <unk>. So are the blank and the characters of control tokens' ``names``: text that spells such a name needs a spelling of
    its own (see `Unigram.to_library`). Fewer pieces only if the text has no more. ``progress`` hears how many are left and
    how many are wanted.
    Raises ValueError if the characters alone are too many, or a number is out of range.
    """
    if not 0 < coverage <= 1 or not 0 < shrink < 1 or longest < 1:
        raise ValueError(f"coverage = {coverage}, shrink = {shrink}, longest = {longest} must be in (0, 1], in (0, 1), from 1")
    words = Counter(word for text in texts for word in words_of(text, split, space, prefix))
    chars = alphabet_of(words, coverage)
    control = BYTES if byte_fallback else (UNKNOWN,)
    required = chars.union(space, *control, *names)
    room = vocab_size - len(control)
    if room < len(required):
        raise ValueError(
            f"{vocab_size} entries beside control tokens cannot hold {len(control)} control pieces and {len(required)} characters: "
            f"raise vocab_size by {len(required) - room}, or lower train_unigram's coverage ({coverage})"
        )
    state = seed(words, chars, longest, seed_size)
    if state is not None:
        learn(state, room, shrink, progress)
    return [*((name, 0.0) for name in control), *finish(state, required, room)]


def learn(state: State, room: int, shrink: float, progress: Callable[[int, int], None] | None = None) -> None:
    """Estimate and prune until there are hardly more pieces than ``room``."""
    while True:
        for _ in range(EM_STEPS):
            em_step(state)
        if progress:
            progress(len(state.score), room)
        if len(state.score) <= SLACK * room:
            return
        prune(state, max(int(SLACK * room), int(shrink * len(state.score))))


def em_step(state: State) -> float:
    """One round of expectation and maximisation. Returns the log-likelihood in nats under the scores before it."""
    counts, likelihood = expected_counts(state.words(), state.weight, state.scores)
    stay = counts >= MIN_COUNT
    stay[: state.n_chars] = True
    state.score = digamma(np.maximum(counts, MIN_COUNT)) - digamma(counts[stay].sum())
    state.keep(stay)
    return likelihood


def digamma(x: np.ndarray | float) -> np.ndarray:
    """Derivative of log Gamma, x > 0: digamma(x) = digamma(x + 1) - 1 / x up to 7, then the asymptotic series (error < 1e-9)."""
    x, out = np.array(x, float), np.zeros(np.shape(x))
    for _ in range(7):
        small = x < 7
        out, x = out - np.where(small, 1 / x, 0.0), x + small
    inverse = 1 / (x * x)
    return out + np.log(x) - 0.5 / x - inverse * (1 / 12 - inverse * (1 / 120 - inverse * (1 / 252 - inverse / 240)))


def losses(state: State) -> np.ndarray:
    """(n,) what the corpus loses in log-likelihood without each piece; inf for characters, -inf where it is not missed."""
    _, word, piece = best_cuts(state.words(), state.scores)
    freq = np.bincount(piece, state.weight[word], len(state.score))
    order = np.argsort(-state.length, kind="stable")
    pieces = Words.of(state.at[order], state.length[order], state.edge, whole=False)
    _, of, other = best_cuts(pieces, state.scores)
    of = order[of]
    total, n_other = freq.sum(), np.bincount(of, minlength=len(freq))
    with np.errstate(divide="ignore", invalid="ignore"):
        without = np.bincount(of, np.log(freq[other] + freq[of]), len(freq)) - n_other * np.log(total + freq * (n_other - 1))
        loss = freq * (np.log(freq) - np.log(total) - without)
    loss[freq == 0] = -np.inf
    loss[n_other == 0] = np.inf
    return loss


def prune(state: State, size: int) -> None:
    """Keep the ``size`` pieces that would be missed most (fewer if fewer are used at all)."""
    loss = losses(state)
    order = np.argsort(-loss, kind="stable")[:size]
    stay = np.zeros(len(loss), bool)
    stay[order[loss[order] > -np.inf]] = True
    stay[: state.n_chars] = True
    state.keep(stay)


def finish(state: State | None, required: set[str], room: int) -> list[tuple[str, float]]:
    """The characters, then the best scores until there is no room; a character that never occurred scores as the worst."""
    scores = {} if state is None else {state.piece(i): float(state.score[i]) for i in range(len(state.score))}
    worst = min(scores.values(), default=0.0)
    order = sorted(scores, key=lambda piece: (-scores[piece], piece))
    others = [piece for piece in order if piece not in required][: room - len(required)]
    pieces = {piece: scores.get(piece, worst) for piece in [*sorted(required), *others]}
    return sorted(pieces.items(), key=lambda pair: (-pair[1], pair[0]))
