"""The model card (README.md) that lies beside a corrected adapter, for whoever finds it."""

from __future__ import annotations

import json

from csulora.correction.report import Report
from csulora.errors import printable
from csulora.policy.toml import one_line


def _as_code(text: str) -> str:
    """Text of a stranger's in Markdown: one line, in which nothing is markup."""
    return f"`{printable(text, 200).replace('`', chr(39))}`"


def _sentence(warning: str) -> str:
    return f"**{warning.removesuffix('; ')}.**"


_CARD = """---
{base_model}library_name: peft
tags:
- lora
- csulora
---

# {adapter}, corrected by csulora {version}
{warning}
This LoRA adapter was corrected after training: its update was split by the subspace in which safety alignment
moved the base model, and the components were attenuated by the policy below. It is plain LoRA with scale 1.
Here {verdict}.

| | |
|---|---|
| policy | `{policy}` |
| modules corrected | {corrected} of {modules} |
| relative change of the update | {relative_change:.1%} |
| undo of all modules together, before and after | {undo:+.3f} -> {undo_after:+.3f} |
| largest undo of a module, before and after | {largest_undo:+.3f} -> {largest_undo_after:+.3f} |
| sha256 of the original adapter | `{adapter_sha256}` |
| sha256 of the subspace file | `{subspace_sha256}` |

`csulora_report.json` holds the figures of every module. A statement of having been corrected proves nothing by
itself: correct what you serve.
"""


def model_card(report: Report, base_model: str | None) -> str:
    """Return the card; ``base_model`` is the name of the model the adapter is for, if the adapter says one."""
    return _CARD.format(
        base_model=f"base_model: {json.dumps(base_model)}\n" if base_model else "",  # JSON's texts are YAML's too
        adapter=_as_code(report.adapter),
        warning=f"\n{_sentence(report.warning)}\n" if report.warning else "",
        verdict=report.verdict.text,
        version=report.csulora,
        policy=one_line(report.policy),
        corrected=len(report.measured),
        modules=len(report.modules),
        relative_change=report.totals.relative_change,
        undo=report.totals.undo,
        undo_after=report.totals.undo_after,
        largest_undo=report.totals.largest_undo,
        largest_undo_after=report.totals.largest_undo_after,
        adapter_sha256=report.adapter_sha256,
        subspace_sha256=report.subspace_sha256,
    )
