"""The nouns of burnish: rows become conversations, conversations samples, samples batches, batches a step.

This module imports nothing of ours and, at run time, no torch, so that data workers stay light.
Shape suffixes: T tokens and K trained tokens of a pack, N its documents, D hidden size, V vocabulary.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch


class UserError(Exception):
    """Something its reader can mend: the message says what, where, by which rule and how; no traceback is shown."""


class RowError(UserError):
    """A row that cannot be trained on; the message is the reason alone, whoever knows the file and line adds them."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call an assistant makes; `arguments` is the parsed object, as chat templates expect it."""

    name: str
    arguments: Any
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One normalised message.

    `role` is system, developer, user, assistant or tool.
    `weight` is None where the row is silent, so that `data.train_on` decides.
    `extra` keeps the row's other keys, which templates may read.
    """

    role: str
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    weight: float | None = None
    name: str | None = None
    tool_call_id: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat row: messages, the tool schemas offered to the model, and the row's own template arguments."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


class Origin(NamedTuple):
    """Who wrote a stretch of a rendered conversation: which message (None: none), and what of it.

    `template` is the template's own text, in the turn of `message` or between turns; `tools` the tools' schemas.
    """

    message: int | None
    part: Literal["content", "reasoning", "tool_calls", "tools", "template"]


Renderer = Callable[
    [Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None, Mapping[str, Any]], Iterable[tuple[str, Origin]]
]
"""(messages, tools, kwargs) to the conversation's text in stretches. The dicts are those that chat templates see;
kwargs hold `add_generation_prompt` and the recipe's. Raises RowError for what it refuses."""


@dataclass(frozen=True, slots=True)
class RawText:
    """A row that is no chat: one string, of which all (`prompt` empty) or only the completion is trained."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row that comes tokenised: ids and the weight with which each is predicted, both of one length."""

    tokens: np.ndarray
    loss_weights: np.ndarray


class Status(enum.StrEnum):
    """Where a sample's text ended, in RL's words; a cut SFT row is TRUNCATED."""

    PENDING = "pending"
    COMPLETE = "complete"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass(slots=True)
class Sample:
    """One training sequence.

    `tokens` is int32 [L]; `loss_weights` is float32 [L], the weight with which token i is predicted, so index 0 is 0.
    `index` counts the rows of the source `source` from 0; `turn` is the message trained where a row gives a sample for
    each turn. `notices` are the kinds of what was found in the row that its reader should know of. The fields from
    `advantages` on are RL's.
    """

    tokens: np.ndarray
    loss_weights: np.ndarray
    source: str = ""
    index: int = 0
    status: Status = Status.COMPLETE
    metadata: Mapping[str, Any] = field(default_factory=dict)
    label: Any = None
    turn: int | None = None
    notices: tuple[str, ...] = ()
    advantages: np.ndarray | None = None
    logprobs: np.ndarray | None = None
    weight_version: int | None = None
    reward: float | None = None
    prompt: str | None = None
    response: str | None = None
    group: int | None = None

    @property
    def id(self) -> str:
        return f"{self.source}:{self.index}" + ("" if self.turn is None else f":{self.turn}")

    @property
    def num_trained(self) -> int:
        return int(np.count_nonzero(self.loss_weights))

    @property
    def response_length(self) -> int:
        """Tokens from the first trained one to the end; 0 where nothing is trained."""
        trained = np.flatnonzero(self.loss_weights)
        return len(self.tokens) - int(trained[0]) if trained.size else 0


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the documents of a pack begin and end: document n is tokens [cu_seqlens[n], cu_seqlens[n+1]).

    It describes the whole pack, also where only the tokens `here_T` of it are at hand.
    """

    cu_seqlens: torch.Tensor  # int32 [N+1], on the model's device
    lengths: tuple[int, ...]  # the same on the host, so that no kernel launch waits for the device
    has_padding: bool = False  # the last document is there to fill the pack, and means nothing
    here_T: torch.Tensor | None = None  # int64, places in the pack of the tokens at hand; None: all of them

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    @property
    def num_real(self) -> int:
        """Documents that are not padding; they come first."""
        return len(self.lengths) - self.has_padding

    def of_tokens(self) -> torch.Tensor:
        """int64 [T]: the document of each token at hand. One from `num_real` on is padding."""
        lengths_N = self.cu_seqlens.diff()
        number_N = lengths_N.new_ones(len(self.lengths)).cumsum(0) - 1
        # Told the sum, the host does not wait for the device to add it up.
        document_T = number_N.repeat_interleave(lengths_N, output_size=sum(self.lengths))
        return document_T if self.here_T is None else document_T[self.here_T]


@dataclass(frozen=True, slots=True)
class Batch:
    """The packed tensors of one forward and backward on one data rank.

    Token i of the pack is predicted from the hidden state at i-1, so `trained_K` holds the positions whose *next*
    token is trained and `targets_K` those tokens. `weights_K` is already scaled by the step's normalisation: the step's
    loss is sum(weights_K * l_K) over all batches, divided by `StepInput.denominator`.
    """

    tokens_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64, restarts at every document
    documents: Documents
    trained_K: torch.Tensor  # int64, indices into T
    targets_K: torch.Tensor  # int64
    weights_K: torch.Tensor  # float64, so that no normalisation is rounded before the loss casts it
    raw_weights_K: torch.Tensor  # float64, before normalisation: what metrics are averaged by
    sources_K: torch.Tensor  # int64, index into `sources`
    sources: tuple[str, ...]
    samples: tuple[Sample, ...]  # in the order of the documents

    @property
    def num_tokens(self) -> int:
        return sum(self.documents.lengths)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`; host facts are shared."""
        names = ("tokens_T", "positions_T", "trained_K", "targets_K", "weights_K", "raw_weights_K", "sources_K")
        moved = {name: _moved(getattr(self, name), device) for name in names}
        here_T = self.documents.here_T
        documents = replace(
            self.documents,
            cu_seqlens=_moved(self.documents.cu_seqlens, device),
            here_T=None if here_T is None else _moved(here_T, device),
        )
        return Batch(**moved, documents=documents, sources=self.sources, samples=self.samples)


def _moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    # From pageable memory a copy to CUDA waits for the stream; from pinned memory it does not.
    on_cuda = str(device).startswith("cuda")
    return tensor.pin_memory().to(device, non_blocking=True) if on_cuda else tensor.to(device)


@dataclass(frozen=True, slots=True)
class StepInput:
    """One optimizer step: `batches[data_rank][micro]`, and what must be known of all of it before any of it runs.

    A batch is built when it is asked for, by the rank that runs it.
    """

    batches: Sequence[Sequence[Batch]]
    samples: tuple[Sample, ...]  # of all ranks, in no particular order
    denominator: float  # of the loss: sum of weights (token) or samples with a positive sum (sample)
    num_samples: int
    num_tokens: int
    num_trained_tokens: int
    capacity: int  # tokens the micro-batches could have held; num_tokens / capacity is the packing fill
    num_padding: int  # token slots computed for nothing


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What one sweep of the lm head says of each trained token. Gradients flow through the first three."""

    logprobs_K: torch.Tensor  # float32: log p(target)
    logsumexp_K: torch.Tensor  # float32: log of the softmax denominator (z-loss)
    mean_logprobs_K: torch.Tensor  # float32: mean over the vocabulary of log p (label smoothing)
    entropy_K: torch.Tensor  # float32, nats
    is_top1_K: torch.Tensor  # bool


@dataclass(frozen=True, slots=True)
class Weighted:
    """A statistic as a sum and the weight it must be averaged by; both may be tensors still on the device."""

    sum: Any
    weight: Any

    def __add__(self, other: Weighted) -> Weighted:
        return Weighted(self.sum + other.sum, self.weight + other.weight)

    @property
    def mean(self) -> float:
        return float(self.sum) / float(self.weight)


Stats = dict[str, Weighted]


def merge(left: Stats, right: Stats) -> Stats:
    """The statistics of both, weighted values added."""
    return {
        name: left[name] + right[name] if name in left and name in right else (left | right)[name]
        for name in left | right
    }


class Source(Protocol):
    """Where samples come from: rows of a file (SFT), rollouts of an engine (RL), a user's own function."""

    def next(self) -> list[Sample]:
        """The samples of the next optimizer step; it never runs out, the run decides how many steps there are."""
        ...

    def update(self, trainer: Trainer) -> None:
        """Called after each step. SFT: nothing. RL: publish the new weights to the engine."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON: the cursor after the last batch that `next` returned."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StepSource(Protocol):
    """What the loop draws on: a `Source` whose samples come packed, and perhaps ahead of training."""

    def next(self) -> StepInput:
        """The next optimizer step, or what the source or the packer raised in its place."""
        ...

    def update(self, trainer: Trainer) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """JSON: the cursor after the last step that `next` returned."""
        ...


class Loss(Protocol):
    """A pure function of the scores of a pack: the sum of weighted losses, and statistics to report."""

    def __call__(self, scores: TokenScores, batch: Batch) -> tuple[torch.Tensor, Stats]: ...


class Evaluator(Protocol):
    """What held-out loss needs of a trainer, or of a model that is not trained."""

    def evaluate(self, inputs: StepInput) -> Stats: ...


class Trainer(Evaluator, Protocol):
    """What trains, here or on many ranks: `step`, `evaluate`, `save` with `finish_saves`, `load` and `publish`."""

    def step(self, inputs: StepInput) -> Stats: ...

    def save(
        self, folder: str, state: dict[str, Any], keep: int | None = None, protect: Set[int] = frozenset()
    ) -> None:
        """Copy what a resume needs, and write it below `folder` while training goes on; then delete older steps but
        the `keep` newest and those of `protect`. Raises what the save before came to."""
        ...

    def finish_saves(self) -> None:
        """Return when the last save is on the disk, or raise why it is not."""
        ...

    def load(self, folder: str) -> dict[str, Any]: ...

    def publish(
        self, take: Callable[[Iterator[tuple[str, torch.Tensor]]], Any], dtype: torch.dtype | None = None
    ) -> Any:
        """What `take` makes of the weights (name, tensor), whole, by a checkpoint's names, on the CPU and one after the
        other: in the type of the masters, or in `dtype`. A tensor may share a parameter's memory. Where there are
        several ranks, `take` travels to the first and is called there."""
        ...
