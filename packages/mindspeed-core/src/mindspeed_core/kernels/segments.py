"""Which queries and keys belong together where several documents share a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """One document of one row: queries [first_query, last_query) and keys [first_key, last_key)."""

    row: int
    first_query: int
    last_query: int
    first_key: int
    last_key: int


@dataclass(frozen=True)
class Segments:
    """The documents of a batch as spans. Made once for a forward pass, since it reads the ids on the host.

    ids       0 0 0 1 1 2 2 2        a query sees keys of its own document only;
    spans     [0,3) [3,5) [5,8)      filling is a document of its own
    """

    spans: tuple[Span, ...]
    queries: int  # s, the length of a row
    keys: int  # t
    rows: int  # b

    @classmethod
    def of(cls, ids: Tensor) -> Segments:
        """Return the documents of ids [b, s]: a document is a run of one id, and each row is full of them."""
        runs = _runs(ids)
        spans = tuple(Span(row, a, b, a, b) for row, found in enumerate(runs) for _, a, b in found)
        return cls(spans, ids.shape[1], ids.shape[1], ids.shape[0])

    @classmethod
    def shared(cls, queries: Tensor, keys: Tensor) -> Segments:
        """Return the documents that lie in both queries [b, s] and keys [b, t], given the ids of each."""
        spans = []
        for row, (left, right) in enumerate(zip(_runs(queries), _runs(keys), strict=True)):
            at = {document: (first, last) for document, first, last in right}
            spans += [Span(row, a, b, *at[document]) for document, a, b in left if document in at]
        return cls(tuple(spans), queries.shape[1], keys.shape[1], queries.shape[0])

    def mask(self, device: torch.device, *, causal: bool) -> Tensor:
        """Return the same as a boolean mask [b, 1, s, t], True where a query sees a key."""
        mask = torch.zeros(self.rows, 1, self.queries, self.keys, dtype=torch.bool)
        for row, first_query, last_query, first_key, last_key in self.spans:
            mask[row, 0, first_query:last_query, first_key:last_key] = True
        return (mask.tril() if causal else mask).to(device)

    @property
    def lengths(self) -> list[list[int]]:
        """The lengths of the documents of each row."""
        found: list[list[int]] = [[] for _ in range(self.rows)]
        for span in self.spans:
            found[span.row].append(span.last_query - span.first_query)
        return found


def _runs(ids: Tensor) -> list[list[tuple[int, int, int]]]:
    """Return for each row of ids [b, s] the triples (id, first, last) of its runs."""
    runs = []
    for row in ids.cpu():  # the lengths of documents are arguments of the kernels, not tensors
        documents, counts = torch.unique_consecutive(row, return_counts=True)
        ends = counts.cumsum(0).tolist()
        runs.append(list(zip(documents.tolist(), [0, *ends[:-1]], ends, strict=True)))
    return runs
