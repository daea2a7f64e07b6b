"""Finds chat templates that write the date on which they are rendered.

Their text for a row changes every day, so the model is prompted differently from how it was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_ft.data.templates import ChatTemplate
from lightning_ft.errors import TokenizerError
from lightning_ft.types import Message

DATED = "row whose prompt contains the date on which it is rendered"

_WORDS = ("date", "day", "time", "now")  # parts of names of variables that templates use in place of today


def renders_today(template: ChatTemplate, messages: Sequence[Message], kwargs: Mapping[str, object]) -> bool:
    """Whether the prompt of a conversation would be different tomorrow.

    Args:
        template: The chat template.
        messages: Turns before the answer.
        kwargs: Variables for the template in addition to the messages.
    """
    if not template.reads_the_date or not messages:
        return False
    variables = tuple(sorted((name, repr(value)) for name, value in kwargs.items() if name != "tools"))
    key = ("renders_today", messages[0]["role"], bool(kwargs.get("tools")), variables)
    if key not in template.cached:
        days = [{**kwargs, "strftime_now": lambda _, day=day: day} for day in ("Zq0aQz", "Zq1bQz")]
        try:
            first, second = (template.render(messages, other, prompt=True) for other in days)
            template.cached[key] = first != second
        except TokenizerError:  # the template parses the date, and the marks aren't dates
            template.cached[key] = True
    return bool(template.cached[key])


def today_remedy(template: ChatTemplate) -> str:
    """Advice for rows whose prompt contains the date.

    Args:
        template: Their chat template.
    """
    turns, today = [Message(role="user", content="a")], template.today()
    names = [name for name in sorted(template.reads) if any(word in name for word in _WORDS) and name != "strftime_now"]
    fixed = [name for name in names if not renders_today(template, turns, {name: today})]
    if fixed:
        how = f"Pass chat_template_kwargs={ {fixed[0]: today}!r}, here and wherever prompts are rendered later"
    else:
        how = "Pass a chat_template= that writes a fixed date in place of strftime_now"
    where = template.tokenizer.name_or_path
    of = f" of {where!r}" if where else ""
    return f"The chat template{of} writes today's date, so later prompts will differ from those in training. {how}."
