"""The one tokenizer of a module: what it is trained, asked, measured and exported with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import ConfigError
from lightning_ft.models.tokenizer_state import differences, tokenizer_from_state, tokenizer_state


class ModuleTokenizer:
    """The tokenizer given, or else the model's own, until the rows that are trained on bring another.

    Args:
        given: A tokenizer, or the name of one; None for the model's own.
        load: Loads the one of that name, or the model's own.
        trust_remote_code: Run code that a checkpoint's tokenizer ships.
    """

    def __init__(
        self,
        given: str | PreTrainedTokenizerBase | None,
        load: Callable[[], PreTrainedTokenizerBase],
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self._given = given is not None
        self._load, self._trust_remote_code = load, trust_remote_code
        self._current = None if given is None or isinstance(given, str) else given
        self._as_loaded: tuple[int, Any] | None = None
        self._rows: bool | None = None
        self._kept: tuple[Any, dict[str, Any]] | None = None

    @property
    def current(self) -> PreTrainedTokenizerBase:
        """The tokenizer; loaded when it is first asked for."""
        if self._current is None:
            self._current = self._load()
            self._as_loaded = (len(self._current), dict(self._current.special_tokens_map))
        return self._current

    def adopt(self, tokenizer: PreTrainedTokenizerBase, *, given: bool, template_given: bool) -> None:
        """Take the tokenizer of the rows.

        Args:
            tokenizer: Theirs.
            given: Whether they were given it, or a chat template.
            template_given: Whether they were given a chat template, which then goes over that of any tokenizer.

        Raises:
            ConfigError: If another one was given here.
        """
        self._rows = given
        if tokenizer is self._current:
            return
        if self._given:
            found = differences(tokenizer_state(self.current, whole=False), tokenizer)
            if template_given and "chat template" in found:
                found.remove("chat template")
            if found:
                raise ConfigError(
                    f"The module's tokenizer= and the DataModule's differ in their {' and '.join(found)}: the model "
                    "would be trained on the tokens of one and asked with those of the other. Give the tokenizer to "
                    "the module only; a DataModule takes the module's."
                )
        self._current, self._as_loaded = tokenizer, None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: its files too, unless it can be loaded again by its name."""
        tokenizer = self.current
        roles = dict(tokenizer.special_tokens_map)
        key = (tokenizer, len(tokenizer), roles, tokenizer.chat_template)
        if self._kept is None or self._kept[0] != key:
            whole = self._as_loaded != (len(tokenizer), roles)
            self._kept = (key, tokenizer_state(tokenizer, whole=whole))
        return self._kept[1]

    def restore(self, state: dict[str, Any], *, rows_encoded: bool) -> None:
        """Go back to the tokenizer that a checkpoint was trained with.

        Args:
            state: From the checkpoint.
            rows_encoded: Whether rows of a DataModule are encoded with the current one, which then stays.
        """
        if self._rows or (rows_encoded and self._rows is not None):
            if found := differences(state, self.current):
                rank_zero_warn(
                    f"The checkpoint was trained with another {' and '.join(found)} of the tokenizer than the rows "
                    "are encoded with now, which is used from here on. Give the DataModule the tokenizer= and "
                    "chat_template= of the run that wrote the checkpoint."
                )
            return
        saved = tokenizer_from_state(state, trust_remote_code=self._trust_remote_code)
        found = differences(state, self.current) if self._given or saved is None else []
        if found and self._given:
            rank_zero_warn(
                f"tokenizer= isn't the one that the checkpoint was trained with: the {' and '.join(found)} differ. "
                + ("The checkpoint's is used." if saved is not None else "The checkpoint's chat template is used.")
            )
        elif "vocabulary" in found:
            rank_zero_warn(
                "The model's tokenizer has another vocabulary than when the checkpoint was written. Pass tokenizer= "
                "with the one of that time."
            )
        if saved is not None and (found or not self._given):
            self._current, self._as_loaded = saved, None
        elif found:
            self.current.chat_template = state["chat_template"]
