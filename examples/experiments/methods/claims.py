"""The claims of the comparison: which way to tune is compared with which."""

from __future__ import annotations

from itertools import combinations

from examples.experiments.grid.results import KeyOf, Results
from examples.experiments.methods.plan import (
    COLORA_DEFAULT,
    COLORA_PLAIN,
    FULL_CHECKERBOARD,
    PEFT_LORA,
    PEFT_LORA_CHECKERBOARD,
)
from examples.experiments.methods.results import values_in


def claims_of(results: Results, pairs: int) -> dict[str, tuple[KeyOf, KeyOf]]:
    """The paper's claims: each compares one way to tune with another."""
    networks, keys = values_in(results, "network"), {key[2:] for key in results}
    claims = {
        f"{one} minus {two}, both tuned in full": ((one, "full", None), (two, "full", None))
        for one, two in combinations(networks, 2)
    }
    # The one that is tuned in all ways.
    first = max(networks, key=lambda network: len({key for key in keys if key[0] == network}))
    for budget in sorted(values_in(results, "parameter_budget"), reverse=True):
        colora = (first, "colora", budget)
        claims[f"CoLoRA minus one rank for all, both with a budget of {budget:g}"] = colora, (first, "lora", budget)
        claims[f"CoLoRA minus PEFT's LoRA, both with a budget of {budget:g}"] = colora, (first, PEFT_LORA, budget)
        claims[f"CoLoRA {budget:g} minus full tuning"] = colora, (first, "full", None)
        default, plain = ((first, method, budget) for method in (COLORA_DEFAULT, COLORA_PLAIN))
        claims[f"CoLoRA {budget:g} as finetune.py has it minus PEFT's LoRA"] = default, (first, PEFT_LORA, budget)
        claims[f"CoLoRA {budget:g} as finetune.py has it minus full tuning"] = default, (first, "full", None)
        claims[f"CoLoRA {budget:g} as finetune.py has it minus PEFT's LoRA with the same loss"] = (
            default,
            (first, PEFT_LORA_CHECKERBOARD, budget),
        )
        claims[f"CoLoRA {budget:g} as finetune.py has it minus full tuning with the same loss"] = (
            default,
            (first, FULL_CHECKERBOARD, None),
        )
        for name, method in (("the decoder", "decoder"), ("the biases", "bias")):
            claims[f"CoLoRA {budget:g} as finetune.py has it minus tuning {name} alone"] = (
                default,
                (first, method, None),
            )
        claims[f"CoLoRA {budget:g} as finetune.py has it minus the same on mean absolute error alone"] = default, plain
        for other, key in (("PEFT's LoRA", PEFT_LORA), ("one rank for all", "lora")):
            claims[f"CoLoRA {budget:g} on mean absolute error alone minus {other}"] = plain, (first, key, budget)
    largest, *others = sorted(values_in(results, "parameter_budget"), reverse=True) or [None]
    for budget in others:
        one, other = ((first, COLORA_DEFAULT, share) for share in (budget, largest))
        claims[f"CoLoRA as finetune.py has it, {budget:g} minus {largest:g}"] = one, other

    def key_of(way: tuple) -> KeyOf:
        return lambda task: (task, pairs, *way)

    return {name: (key_of(one), key_of(other)) for name, (one, other) in claims.items()}
