"""Generation: requests in, token events out. A wave of requests is prefilled together, then decoded row by row.

One `step` is one model call: either the prefill of the next wave (prompts padded on the right; padding writes
nothing to the states) or one token for every row still running. Rows that finish leave the batch.
A prompt that several requests of a wave share (the answers of a rollout) is read once and its states copied: n answers cost
one prompt and n completions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zero2llm.core.seq import Seq, State
from zero2llm.engine.sampling import Sampling
from zero2llm.model.lm import LM
from zero2llm.ops.sample import draw, repetition_penalty, truncate
from zero2llm.tokenizers.tokenizer import Tokenizer


@dataclass
class Request:
    """A prompt on its way to a completion."""

    id: int
    prompt: list[int]
    sampling: Sampling
    generator: torch.Generator
    output: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)  # of the output, where asked for
    text: str = ""  # decoded so far, without a stop string
    held: str = ""  # decoded, but perhaps the beginning of a stop string
    stream: object = None
    finish: str | None = None  # "stop" (end token or stop string) | "length"


@dataclass(frozen=True)
class TokenEvent:
    """One new token of one request. ``text`` never ends inside a character; ``finish`` is set on the last event."""

    request: int
    token: int
    text: str
    finish: str | None


@dataclass(frozen=True)
class Completion:
    text: str
    tokens: list[int]
    finish: str
    n_prompt: int
    logps: list[float] = field(default_factory=list)  # one a token, with Sampling.logprobs


class Engine:
    """Batched generation with one model and its tokenizer.

    max_batch : rows decoded together.  max_len : prompt + completion, at most the model's own.
    """

    def __init__(self, model: LM, tokenizer: Tokenizer, *, max_batch: int = 32, max_len: int | None = None):
        if tokenizer.vocab_size > model.cfg.vocab_size:  # fewer: tables are often padded, and padding is never sampled
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.cfg.vocab_size}; use the checkpoint's own"
            )
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_batch, self.max_len = max_batch, min(max_len or model.cfg.max_len, model.cfg.max_len)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.states: list[State] = []
        self.seen: Tensor | None = None
        self.count = 0

    def submit(self, prompt: str | list[int], sampling: Sampling | None = None) -> int:
        """Queue a prompt (text, or token ids). Returns the request's number.

        Raises ValueError for an empty prompt or one that leaves no room for an answer.
        """
        sampling = sampling or Sampling()
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise ValueError("the prompt is empty")
        if len(ids) >= self.max_len:
            raise ValueError(f"the prompt has {len(ids)} tokens, the model reads {self.max_len}: shorten it")
        generator = torch.Generator().manual_seed(self.count if sampling.seed is None else sampling.seed)
        stream = self.tokenizer.stream(begins=ids[-1] in self.tokenizer.special_ids)
        self.waiting.append(Request(self.count, ids, sampling, generator, stream=stream))
        self.count += 1
        return self.count - 1

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """One model call. Returns one event per running request; an empty list when nothing is left to do."""
        if not self.running and not self.waiting:
            return []
        logits = self._decode() if self.running else self._prefill()
        tokens = self._sample(logits.float())
        events = [self._accept(request, token) for request, token in zip(self.running, tokens.tolist(), strict=True)]
        keep = [i for i, request in enumerate(self.running) if request.finish is None]
        if len(keep) < len(self.running):
            self.running = [self.running[i] for i in keep]
            rows = torch.tensor(keep, dtype=torch.long, device=logits.device)
            self.states = [state.gather(rows) for state in self.states] if keep else []
            self.seen = self.seen[rows]
        return events

    def _prefill(self) -> Tensor:
        wave = [self.waiting.popleft() for _ in range(min(self.max_batch, len(self.waiting)))]
        self.running, device = wave, self.model.embed.weight.device
        place: dict[tuple[int, ...], int] = {}  # of each different prompt
        rows = torch.tensor([place.setdefault(tuple(r.prompt), len(place)) for r in wave], device=device)
        longest = max(map(len, place))
        tokens = torch.full((len(place), longest), self.tokenizer.pad_id)
        for row, prompt in zip(tokens, place, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        lengths = torch.tensor([len(prompt) for prompt in place])
        room = min(max(len(r.prompt) + r.sampling.max_tokens for r in wave), self.max_len)
        self.states = self.model.init_states(len(place), room)
        self.seen = torch.zeros(len(place), self.model.cfg.vocab_size, dtype=torch.bool, device=device)
        self.seen.scatter_(1, tokens.to(device), True)
        seq = Seq.ragged(lengths, longest) if len(set(lengths.tolist())) > 1 else Seq.rows(len(place), longest)
        hidden, _ = self.model(tokens.to(device), seq.to(device), self.states)
        logits = self.model.logits(hidden[torch.arange(len(place)), lengths - 1])
        if len(place) < len(wave):
            self.states, self.seen, logits = [state.gather(rows) for state in self.states], self.seen[rows], logits[rows]
        return logits

    def _decode(self) -> Tensor:
        device = self.model.embed.weight.device
        tokens = torch.tensor([[r.output[-1]] for r in self.running], device=device)
        pos = torch.tensor([[len(r.prompt) + len(r.output) - 1] for r in self.running], device=device)
        hidden, _ = self.model(tokens, Seq(pos), self.states)
        return self.model.logits(hidden[:, -1])

    def _sample(self, logits: Tensor) -> Tensor:
        """One token per running request; the truncations differ by request, so rows are handled in groups."""
        asked = [r.sampling for r in self.running]
        logits[:, self.tokenizer.vocab_size :] = -float("inf")
        plain = logits
        if any(s.repetition_penalty != 1.0 for s in asked):
            penalty = torch.tensor([s.repetition_penalty for s in asked], device=logits.device)
            logits = repetition_penalty(logits, self.seen, penalty)
        warm = [i for i, s in enumerate(asked) if s.temperature > 0]
        tokens = logits.new_zeros(len(asked), dtype=torch.long) if len(warm) == len(asked) else logits.argmax(-1)
        for key in dict.fromkeys((asked[i].top_k, asked[i].top_p, asked[i].min_p) for i in warm):
            rows = [i for i in warm if (asked[i].top_k, asked[i].top_p, asked[i].min_p) == key]
            heat = torch.tensor([asked[i].temperature for i in rows], device=logits.device)[:, None]
            uniform = torch.cat([torch.rand(1, generator=self.running[i].generator) for i in rows])
            some = logits if len(rows) == len(asked) else logits[rows]
            tokens[rows] = draw(truncate(some / heat, *key), uniform.to(logits.device))
        self.seen.scatter_(1, tokens[:, None], True)
        self._note(plain, tokens)
        return tokens

    def _note(self, logits: Tensor, tokens: Tensor) -> None:
        """Keep log p of the sampled tokens for the requests that want it."""
        rows = [i for i, r in enumerate(self.running) if r.sampling.logprobs]
        if rows:
            heat = torch.tensor([self.running[i].sampling.temperature or 1.0 for i in rows], device=logits.device)[:, None]
            some, chosen = (logits, tokens) if len(rows) == len(self.running) else (logits[rows], tokens[rows])
            found = (some / heat).log_softmax(-1).gather(1, chosen[:, None]).squeeze(1)
            for i, value in zip(rows, found.tolist(), strict=True):
                self.running[i].logps.append(value)

    def _accept(self, request: Request, token: int) -> TokenEvent:
        request.output.append(token)
        sampling, text = request.sampling, ""
        if token in self.tokenizer.stop_ids and not sampling.ignore_eos:
            request.finish = "stop"
        else:
            text = request.stream.push(token)
            if len(request.output) >= sampling.max_tokens or len(request.prompt) + len(request.output) >= self.max_len:
                request.finish = "length"
        if request.finish:
            text += request.stream.flush()
        text, request.held, stopped = release(request.held + text, sampling.stop, final=request.finish is not None)
        if stopped:
            request.finish = "stop"
        request.text += text
        return TokenEvent(request.id, token, text, request.finish)

    def stream(self, prompt: str | list[int], sampling: Sampling | None = None) -> Iterator[str]:
        """Pieces of the answer as they come. Close the iterator to stop early."""
        number = self.submit(prompt, sampling)
        try:
            while events := self.step():
                yield from (event.text for event in events if event.request == number)
        finally:
            self.abort()

    def abort(self) -> None:
        """Forget every running and waiting request."""
        self.waiting.clear()
        self.running, self.states = [], []

    def generate(
        self, prompts: list[str | list[int]], sampling: Sampling | list[Sampling] | None = None
    ) -> list[Completion]:
        """Complete all prompts; ``sampling`` is one for all or one each."""
        each = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
        numbers = [self.submit(prompt, one) for prompt, one in zip(prompts, each, strict=True)]
        requests = {r.id: r for r in self.waiting}
        while self.step():
            pass
        return [Completion(r.text, r.output, r.finish, len(r.prompt), r.logps) for r in map(requests.get, numbers)]


def release(text: str, stops: Sequence[str], final: bool) -> tuple[str, str, bool]:
    """What of ``text`` may be shown now: (shown, held back, stopped).

    A stop string cuts the text; an end that may still grow into one is held back until more is known.
    """
    cuts = [text.index(stop) for stop in stops if stop in text]
    if cuts:
        return text[: min(cuts)], "", True
    held = 0 if final else max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held], text[len(text) - held :], False
