"""Prompts about facts, where in them the subject and the relation stand, and which attributes compete.

Source: Chughtai, Cooney and Nanda (2024), arXiv 2402.07321; the facts are cenote's own list.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cenote.core import InputError
from cenote.explain.queried import one_hot
from cenote.models.live.spans import of_characters


class Fact(NamedTuple):
    """What is so: `template` holds `{subject}` once, and the words of the relation between bars."""

    subject: str
    relation: str
    attribute: str
    template: str


@dataclass(frozen=True, eq=False)
class Prompts:
    """A batch of prompts about facts.

    Attributes:
        inputs: of the model.
        spans: `"subject"`, `"relation"` and `"end"`, the last token, which is in no other; `[batch, tokens]`.
        candidates: the first token of every attribute, each once.
        answer: number of the right candidate, of each prompt.
        of_relation: candidates that are attributes of the prompt's relation (R), `[batch, candidates]`.
        of_subject: candidates that are attributes of its subject, under any relation (S).
    """

    inputs: Mapping[str, Tensor]
    spans: Mapping[str, Bool[Tensor, "batch tokens"]]
    candidates: Int[Tensor, "candidates"]
    answer: Int[Tensor, "batch"]
    of_relation: Bool[Tensor, "batch candidates"]
    of_subject: Bool[Tensor, "batch candidates"]

    @property
    def targets(self) -> Int[Tensor, "batch candidates"]:
        """The candidates for each prompt, as `logit_parts` takes them."""
        return self.candidates.expand(len(self.answer), -1)


def facts() -> list[Fact]:
    """The shipped list: capitals, languages, continents and currencies of countries.

    >>> facts()[0]
    Fact(subject='France', relation='capital', attribute='Paris', template='The |capital city| of {subject} is the city of')
    """
    data = tomllib.loads(resources.files(__package__).joinpath("facts.toml").read_text(encoding="utf-8"))
    templates = data["relations"]
    return [
        Fact(subject, relation, attribute, templates[relation])
        for relation in templates
        for subject, attributes in data["subjects"].items()
        if (attribute := attributes.get(relation)) is not None
    ]


def prompted(tokenizer: Any, chosen: Sequence[Fact], known: Sequence[Fact] | None = None) -> Prompts:
    """Facts as prompts.

    Args:
        tokenizer: a fast tokenizer of transformers.
        chosen: one prompt each.
        known: the facts from which the sets of competing attributes are made; the chosen ones by default.

    Raises:
        InputError: for a tokenizer without offsets, a template without subject or relation, and where the last token is in one
            of both.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer: {type(tokenizer).__name__} gives no offsets of characters; load it with use_fast=True"
        )
    if not chosen:
        raise InputError("chosen: give at least one fact")
    texts, subjects, relations = zip(*(_written(fact) for fact in chosen), strict=True)
    if tokenizer.pad_token_id is None:
        raise InputError("tokenizer: has no token to pad with; set tokenizer.pad_token = tokenizer.eos_token")
    made = tokenizer(list(texts), padding=True, return_offsets_mapping=True, return_tensors="pt")
    offsets = made.pop("offset_mapping")
    mask = made["attention_mask"].bool()
    # padding has characters of none
    spans = {
        name: of_characters(offsets, ranges) & mask for name, ranges in (("subject", subjects), ("relation", relations))
    }
    end = one_hot(mask, "last").bool()
    for name, span in spans.items():
        if bool((span & end).any()):
            raise InputError(f"template: the last token is part of the {name}; let words follow it")
    known = [*chosen] if known is None else [*known]
    ids = {fact.attribute: first_token(tokenizer, fact.attribute) for fact in (*known, *chosen)}
    candidates = list(dict.fromkeys(ids.values()))
    number = {token: i for i, token in enumerate(candidates)}
    of_relation, of_subject = torch.zeros(2, len(chosen), len(candidates), dtype=torch.bool).unbind()
    for item, fact in enumerate(chosen):
        for other in (*known, fact):
            of_relation[item, number[ids[other.attribute]]] |= other.relation == fact.relation
            of_subject[item, number[ids[other.attribute]]] |= other.subject == fact.subject
    return Prompts(
        dict(made),
        {**spans, "end": end},
        torch.tensor(candidates),
        torch.tensor([number[ids[fact.attribute]] for fact in chosen]),
        of_relation,
        of_subject,
    )


def first_token(tokenizer: Any, word: str) -> int:
    """Of a word behind a space."""
    return int(tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0])


def _written(fact: Fact) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
    pieces = fact.template.split("|")
    if fact.template.count("{subject}") != 1 or len(pieces) < 3 or len(pieces) % 2 == 0:
        raise InputError(
            f"template: expected {{subject}} once and the relation's words between bars, got {fact.template!r}"
        )
    text, subject, relation = "", [], []
    for number, piece in enumerate(pieces):
        start = len(text)
        before, found, behind = piece.partition("{subject}")
        if found:
            first = start + len(before)
            subject.append((first, first + len(fact.subject)))
        text += before + (fact.subject if found else "") + behind
        if number % 2:
            relation.append((start, len(text)))
    return text, subject, relation
