"""`csulora tune`: gains fitted on a few prompts, for which the language model runs (needs csulora[peft])."""
