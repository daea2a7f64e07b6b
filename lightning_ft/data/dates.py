"""Chat templates that write the day on which they are rendered.

What they make of a row isn't what they make of it tomorrow: a model is asked with other prompts than it is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_ft.data.templates import ChatTemplate
from lightning_ft.errors import TokenizerError
from lightning_ft.types import Message

DATED = "row whose prompt has the day on which it is rendered"

_WORDS = ("date", "day", "time", "now")  # in the name of a variable that a template takes in place of today


def has_the_day(template: ChatTemplate, messages: Sequence[Message], kwargs: Mapping[str, Any]) -> bool:
    """Whether a conversation's prompt would be another one tomorrow.

    Args:
        template: The chat template.
        messages: The turns before the answer.
        kwargs: What the template is given besides.
    """
    if not template.reads_the_date or not messages:
        return False
    given = tuple(sorted((name, repr(value)) for name, value in kwargs.items() if name != "tools"))
    key = ("has_the_day", messages[0]["role"], bool(kwargs.get("tools")), given)
    if key not in template.cached:
        days = [{**kwargs, "strftime_now": lambda _, day=day: day} for day in ("Zq0aQz", "Zq1bQz")]
        try:
            first, second = (template.render(messages, other, prompt=True) for other in days)
            template.cached[key] = first != second
        except TokenizerError:  # it looks at the day: a mark is none
            template.cached[key] = True
    return bool(template.cached[key])


def date_remedy(template: ChatTemplate) -> str:
    """What to do about rows that have the day.

    Args:
        template: Their chat template.
    """
    turns, today = [Message(role="user", content="a")], template.today()
    names = [name for name in sorted(template.reads) if any(word in name for word in _WORDS) and name != "strftime_now"]
    fixed = [name for name in names if not has_the_day(template, turns, {name: today})]
    if fixed:
        how = f"Pass chat_template_kwargs={ {fixed[0]: today}!r}, here and wherever prompts are rendered later"
    else:
        how = "Pass a chat_template= that writes a fixed day in place of strftime_now"
    where = template.tokenizer.name_or_path
    of = f" of {where!r}" if where else ""
    return f"The chat template{of} writes today's date, so the model will be asked with others. {how}, to keep one."
