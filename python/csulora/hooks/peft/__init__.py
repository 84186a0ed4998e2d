"""PEFT and transformers: adapters are corrected where they are loaded."""

from csulora.hooks.peft.patches import correct_model, guard, load

__all__ = ["correct_model", "guard", "load"]
