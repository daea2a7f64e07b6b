"""The tokenizer of a DataModule: its own, or that of the module that is trained on its rows."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_ft.data.cache import content_key
from lightning_ft.data.templates import set_chat_template
from lightning_ft.data.tokenizers import load_tokenizer
from lightning_ft.distributed import rank_zero_info, rank_zero_warn
from lightning_ft.errors import ConfigError, TokenizerError


class RowsTokenizer:
    """A tokenizer that was passed or set, or else follows the module, with the DataModule's chat template.

    Args:
        option: Tokenizer that was passed, or its name.
        chat_template: Chat template to set on it.
        trust_remote_code: Whether code of a tokenizer on the Hub may run.
        owner: Name of the DataModule's class, for messages.
    """

    def __init__(
        self,
        option: str | PreTrainedTokenizerBase | None,
        chat_template: str | None,
        *,
        trust_remote_code: bool,
        owner: str,
    ) -> None:
        self._option, self._chat_template, self._owner = option, chat_template, owner
        self._trust_remote_code = trust_remote_code
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._follows = option is None

    def set(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Use a tokenizer from now on, also if the module has another."""
        self._use(tokenizer)
        self._follows = False

    def current(self, module: Any) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Args:
            module: The Trainer's module, or None.

        Raises:
            ConfigError: If neither has one.
        """
        if self._tokenizer is None:
            self._use(self._find(module))
        assert self._tokenizer is not None
        return self._tokenizer

    def follow(self, module: Any) -> bool:
        """Take the tokenizer of a module, unless one was passed or set.

        Returns:
            Whether it differs from that of an earlier module.

        Raises:
            ConfigError: If neither has one.
        """
        if not self._follows:
            return False
        if self._tokenizer is None:
            self._use(self._find(module))
            return False
        if (new := _tokenizer_of(module)) is None:
            return False
        if self._chat_template is not None:
            set_chat_template(new, self._chat_template)
        if not _differ(new, self._tokenizer):
            return False
        self._use(new)
        return True

    def share(self, module: Any) -> PreTrainedTokenizerBase:
        """Let a module of lightning_ft adopt the tokenizer, and warn if that of another module differs.

        Raises:
            ConfigError: If another tokenizer was passed to the module.
        """
        tokenizer = self.current(module)
        if hasattr(module, "adopt_tokenizer"):
            templated = self._chat_template is not None
            explicit = templated or self._option is not None
            module.adopt_tokenizer(tokenizer, configured=explicit, template_configured=templated)
            return tokenizer
        other = _tokenizer_of(module)
        if other is not None and _differ(other, tokenizer):
            rank_zero_warn(
                "The DataModule's tokenizer (or its chat template) differs from the module's: the model would be "
                "trained on other tokens than it generates with. Pass tokenizer= to the module only."
            )
        return tokenizer

    def _find(self, module: Any) -> PreTrainedTokenizerBase:
        if isinstance(self._option, str):
            return load_tokenizer(self._option, trust_remote_code=self._trust_remote_code)
        tokenizer = self._option if self._option is not None else getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise ConfigError(f"{self._owner} has no tokenizer: pass tokenizer=, or use it with a module that has one.")
        return tokenizer

    def _use(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if self._chat_template is not None:
            set_chat_template(tokenizer, self._chat_template)
        elif not tokenizer.chat_template:
            rank_zero_info(
                "The tokenizer has no chat template, so conversations are written with 'User:' and 'Assistant:' on "
                "lines of their own (chat_template='plain'), and exports keep that. Pass chat_template= for another "
                "markup, or 'text' for none."
            )
        self._tokenizer = tokenizer


def _tokenizer_of(module: Any) -> PreTrainedTokenizerBase | None:
    try:
        return getattr(module, "tokenizer", None)
    except (ConfigError, TokenizerError):  # a model without a tokenizer of its own
        return None


def _differ(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    return one is not other and content_key([], one) != content_key([], other)
