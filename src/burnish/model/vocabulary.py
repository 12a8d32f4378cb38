"""Whether a tokenizer and a model speak of the same ids: checked before training, from plain facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TokenizerFacts:
    """What the checks need of a tokenizer: its largest id and its special ids, None where it has none."""

    largest_id: int
    bos: int | None
    eos: int | None
    pad: int | None
    name: str = "the tokenizer"

    @classmethod
    def of(cls, tokenizer: Any, place: str | None = None) -> TokenizerFacts:
        """Those of a tokenizer of `transformers`; `place` is where the recipe says that it is."""
        return cls(
            largest_id=max(tokenizer.get_vocab().values()),
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
            pad=tokenizer.pad_token_id,
            name=f"the tokenizer {place or tokenizer.name_or_path}",
        )


@dataclass(frozen=True)
class Findings:
    """`errors`: training would be wrong. `warnings`: only generation would."""

    errors: tuple[str, ...]
    warnings: tuple[str, ...]


def as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """A config's `eos_token_id`, which may be one id, several or none, as ids."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def check_vocabulary(
    tokenizer: TokenizerFacts, config: Mapping[str, Any], generation: Mapping[str, Any] | None, num_embeddings: int
) -> Findings:
    """Compare ids of the tokenizer with the embedding's rows and with bos, eos and pad of both configurations."""
    errors: list[str] = []
    warnings: list[str] = []
    if tokenizer.largest_id >= num_embeddings:
        errors.append(
            f"{tokenizer.name} has ids up to {tokenizer.largest_id}, but the model's embedding has {num_embeddings} "
            f"rows (ids 0 to {num_embeddings - 1}); set model.tokenizer to the tokenizer the model was made with"
        )
    for place, settings in (("config.json", config), ("generation_config.json", generation)):
        if settings is None:
            continue
        for kind, own in (("bos", tokenizer.bos), ("eos", tokenizer.eos), ("pad", tokenizer.pad)):
            stated = as_ids(settings.get(f"{kind}_token_id"))
            beyond = [i for i in stated if i >= num_embeddings]
            if beyond:
                warnings.append(
                    f"{place}: {kind}_token_id={beyond[0]} is outside the embedding's {num_embeddings} rows"
                )
            elif stated and own is not None and own not in stated:
                shown = stated[0] if len(stated) == 1 else list(stated)
                effect = "; the export's generation_config stops at both" if kind == "eos" else ""
                warnings.append(f"{place}: {kind}_token_id={shown}, but {tokenizer.name} has {kind} id {own}{effect}")
    if tokenizer.eos is None:
        warnings.append(f"{tokenizer.name} has no eos token: generation stops only where the configuration names one")
    elif tokenizer.pad == tokenizer.eos:
        warnings.append(
            f"{tokenizer.name}: pad and eos are one token ({tokenizer.eos}); burnish masks by length and trains it "
            "where a turn ends, but other tools may mask it by id"
        )
    return Findings(tuple(errors), tuple(dict.fromkeys(warnings)))


def stop_ids(
    tokenizer: TokenizerFacts, config: Mapping[str, Any], generation: Mapping[str, Any] | None
) -> tuple[int, ...]:
    """Every id at which generation stops: the configurations' eos ids first, then the tokenizer's."""
    stated = as_ids((generation or {}).get("eos_token_id")) or as_ids(config.get("eos_token_id"))
    own = () if tokenizer.eos is None else (tokenizer.eos,)
    return tuple(dict.fromkeys((*stated, *own)))
