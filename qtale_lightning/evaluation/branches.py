"""Questions as trees in one sequence each: what prompts share, the prompts, and their choices, each computed once."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from qtale_lightning.data.tokenization import EncodedPrompt
from qtale_lightning.models.modeling import RoutedForCausalLM
from qtale_lightning.models.routing import Routing

TREE_TOKENS = 2048  # of a tree with several questions: all of them are keys in the attention of each


@dataclass(frozen=True)
class Tree:
    """Prompts that are computed together.

    Attributes:
        prompts: Distinct prompts, and the (question, choice) pairs that continue each.
        shared: Tokens with which all prompts begin, at least one less than each has.
        size: Computed tokens: a choice's last one predicts nothing.
    """

    prompts: dict[tuple[int, ...], list[tuple[int, int]]]
    shared: int
    size: int

    @classmethod
    def of(cls, questions: Sequence[EncodedPrompt], numbers: Sequence[int]) -> "Tree":
        """The tree of some of the questions."""
        prompts: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        choices = 0
        for q in numbers:
            choices += sum(len(continuation) - 1 for continuation in questions[q].continuations)
            for c, context in enumerate(questions[q].contexts):
                prompts.setdefault(context, []).append((q, c))
        lengths = [len(prompt) for prompt in prompts]
        # What the first and the last in order share, all do.
        pairs = enumerate(zip(min(prompts), max(prompts), strict=False))
        shared = next((place for place, (one, other) in pairs if one != other), min(lengths))
        shared = min(shared, min(lengths) - 1)
        return cls(prompts, shared, choices + sum(lengths) - shared * (len(lengths) - 1))


def computed_tokens(questions: Sequence[EncodedPrompt], reserved: int) -> tuple[int, int]:
    """Tokens that scoring computes, and how many of them are reserved: among the first of what they see."""
    tokens = first = 0
    for tree in trees(questions):
        tokens += tree.size
        first += min(tree.shared, reserved)
        for prompt, pairs in tree.prompts.items():
            first += max(0, min(len(prompt), reserved) - tree.shared)
            for q, c in pairs:
                end = len(prompt) + len(questions[q].continuations[c]) - 1
                first += max(0, min(end, reserved) - len(prompt))
    return tokens, first


def trees(questions: Sequence[EncodedPrompt]) -> list[Tree]:
    """Of one question each, or of several where these share at least half of the longest of their prompts."""
    found: list[Tree] = []
    group: list[int] = []
    for q in sorted(range(len(questions)), key=lambda q: questions[q].contexts):
        joined = Tree.of(questions, [*group, q])
        if group and joined.size <= TREE_TOKENS and 2 * joined.shared >= max(map(len, joined.prompts)):
            group.append(q)
            found[-1] = joined
        else:
            group = [q]
            found.append(Tree.of(questions, group))
    return found


@dataclass
class _Row:
    """A tree's tokens, their branches and their positions."""

    ids: list[int] = field(default_factory=list)
    branch: list[tuple[int, int]] = field(default_factory=list)
    position: list[int] = field(default_factory=list)

    def append(self, tokens: Sequence[int], branch: tuple[int, int], first: int) -> range:
        """Their places in the row; `first` is the position of the first of them."""
        start = len(self.ids)
        self.ids += tokens
        self.branch += [branch] * len(tokens)
        self.position += range(first, first + len(tokens))
        return range(start, len(self.ids))


class Branches:
    """A batch of trees as the model's arguments.

    Attributes:
        pairs: The (question, choice) pairs, in the order of their log-likelihoods.
    """

    def __init__(
        self, questions: Sequence[EncodedPrompt], batch: Sequence[Tree], device: torch.device
    ) -> None:
        self.pairs: list[tuple[int, int]] = []
        rows = [_Row() for _ in batch]
        where: list[tuple[int, int]] = []  # (row, place) of the state that predicts a choice's token,
        target: list[int] = []  # that token,
        owner: list[int] = []  # and the pair it belongs to
        for index, (tree, row) in enumerate(zip(batch, rows, strict=True)):
            row.append(next(iter(tree.prompts))[: tree.shared], (0, 0), 0)
            for number, (prompt, pairs) in enumerate(tree.prompts.items(), start=1):
                last = row.append(prompt[tree.shared :], (number, 0), tree.shared)[-1]
                for choice, (q, c) in enumerate(pairs, start=1):
                    continuation = questions[q].continuations[c]
                    inner = row.append(continuation[:-1], (number, choice), len(prompt))
                    where += [(index, place) for place in (last, *inner)]
                    target += continuation
                    owner += [len(self.pairs)] * len(continuation)
                    self.pairs.append((q, c))

        lengths = torch.tensor([len(row.ids) for row in rows])
        self._ids, self._branch, self._position = (
            nn.utils.rnn.pad_sequence([torch.tensor(one) for one in numbers], batch_first=True).to(device)
            for numbers in (
                [row.ids for row in rows],
                [row.branch for row in rows],
                [row.position for row in rows],
            )
        )
        self._mask = (torch.arange(self._ids.shape[1]) < lengths[:, None]).long().to(device)
        self._where = tuple(torch.tensor(where, device=device).T)
        self._target = torch.tensor(target, device=device)
        self._owner = torch.tensor(owner, device=device)

    def routing(self, keep: Collection[int] = ()) -> Routing:
        """Of passes over this batch; `keep` as in :class:`~qtale_lightning.models.routing.Routing`."""
        asked = torch.zeros_like(self._mask, dtype=torch.bool)
        asked[self._where] = True
        return Routing(branch=self._branch, asked=asked, keep=keep)

    def loglikelihoods(self, model: RoutedForCausalLM, routing: Routing) -> list[float]:
        """Log-likelihood of each pair's choice after its prompt, in one pass."""
        hidden = model.model(
            self._ids,
            attention_mask=self._mask,
            position_ids=self._position,
            use_cache=False,
            routing=routing,
        ).last_hidden_state
        # The head where a choice's token is predicted, and nowhere else.
        loglikelihoods = -torch.cat(
            [
                nn.functional.cross_entropy(model.lm_head(states).float(), target, reduction="none")
                for states, target in zip(
                    hidden[self._where].split(1024), self._target.split(1024), strict=True
                )
            ]
        )
        totals = torch.zeros(len(self.pairs), dtype=torch.float64, device=model.device)
        return totals.index_add_(0, self._owner, loglikelihoods.double()).tolist()
