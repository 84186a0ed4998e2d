"""`csulora tune`: gains fitted on a few prompts, for which the host model runs (needs csulora[peft])."""
