"""The one tokenizer of a module, for training, generation, measurement and export."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import ConfigError
from lightning_ft.models.tokenizer_state import TokenizerState, differences, tokenizer_from_state, tokenizer_state


class ModuleTokenizer:
    """The tokenizer that was passed to the module, or else the model's own, until the training rows bring another.

    Args:
        configured: Tokenizer, or its name, as passed to the module; None for the model's own.
        load: Loads the tokenizer of that name, or the model's own.
        trust_remote_code: Run code that a checkpoint's tokenizer ships.
    """

    def __init__(
        self,
        configured: str | PreTrainedTokenizerBase | None,
        load: Callable[[], PreTrainedTokenizerBase],
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self._configured = configured is not None
        self._load, self._trust_remote_code = load, trust_remote_code
        self._current = None if configured is None or isinstance(configured, str) else configured
        self._as_loaded: tuple[int, dict[str, str]] | None = None
        self._rows: bool | None = None
        self._kept: tuple[object, TokenizerState] | None = None

    @property
    def current(self) -> PreTrainedTokenizerBase:
        """The tokenizer; loaded on first use."""
        if self._current is None:
            self._current = self._load()
            self._as_loaded = (len(self._current), dict(self._current.special_tokens_map))
        return self._current

    def adopt(self, tokenizer: PreTrainedTokenizerBase, *, configured: bool, template_configured: bool) -> None:
        """Adopt the tokenizer of the rows.

        Args:
            tokenizer: Tokenizer of the rows.
            configured: Whether the user passed a tokenizer or a chat template to the DataModule.
            template_configured: Whether the user passed a chat template to the DataModule, which overrides that of any
                tokenizer.

        Raises:
            ConfigError: If another one was passed to the module.
        """
        self._rows = configured
        if tokenizer is self._current:
            return
        if self._configured:
            changed = differences(tokenizer_state(self.current, whole=False), tokenizer)
            if template_configured and "chat template" in changed:
                changed.remove("chat template")
            if changed:
                raise ConfigError(
                    f"The tokenizers of the module and of the DataModule differ in their {' and '.join(changed)}: the "
                    "model would train on the tokens of one and generate with those of the other. Pass `tokenizer` to "
                    "the module only; a DataModule uses the module's."
                )
        self._current, self._as_loaded = tokenizer, None

    def state(self) -> TokenizerState:
        """State for a checkpoint: with its files, unless it can be loaded again by its name."""
        tokenizer = self.current
        roles = dict(tokenizer.special_tokens_map)
        key = (tokenizer, len(tokenizer), roles, tokenizer.chat_template)
        if self._kept is None or self._kept[0] != key:
            whole = self._as_loaded != (len(tokenizer), roles)
            self._kept = (key, tokenizer_state(tokenizer, whole=whole))
        return self._kept[1]

    def restore(self, state: TokenizerState, *, rows_encoded: bool) -> None:
        """Restore the tokenizer that a checkpoint was trained with.

        Args:
            state: State from the checkpoint.
            rows_encoded: Whether rows of a DataModule are encoded with the current one, which then stays.
        """
        if self._rows or (rows_encoded and self._rows is not None):
            if changed := differences(state, self.current):
                rank_zero_warn(
                    f"The checkpoint was trained with another {' and '.join(changed)} of the tokenizer than the rows "
                    "are encoded with now, which is used from here on. Pass the `tokenizer` and `chat_template` of the "
                    "run that wrote the checkpoint to the DataModule."
                )
            return
        saved = tokenizer_from_state(state, trust_remote_code=self._trust_remote_code)
        changed = differences(state, self.current) if self._configured or saved is None else []
        if changed and self._configured:
            rank_zero_warn(
                f"`tokenizer` isn't the one that the checkpoint was trained with. Different: {' and '.join(changed)}. "
                + ("The checkpoint's is used." if saved is not None else "The checkpoint's chat template is used.")
            )
        elif "vocabulary" in changed:
            rank_zero_warn(
                "The model's tokenizer has another vocabulary than when the checkpoint was written. Pass the one of "
                "that time as `tokenizer`."
            )
        if saved is not None and (changed or not self._configured):
            self._current, self._as_loaded = saved, None
        elif changed:
            self.current.chat_template = state["chat_template"]
