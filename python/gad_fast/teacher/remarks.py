"""Flags of a response: what a user may want to leave out, told when it is stored."""

from __future__ import annotations

import math
import re

# English only: a server that says `refusal` or `content_filter` itself is believed in any language.
_REFUSAL = re.compile(
    r"\W*(i['\u2019]?m (very |so )?sorry|sorry|i apologi[sz]e|unfortunately|as an ai[^.,]*)?"
    r"[\s,.:;]*(but )?i(['\u2019]m| am)? "
    r"(cannot|can['\u2019]t|can not|won['\u2019]t|(un|not )able to) "
    r"(help|assist|comply|provide|fulfil|answer|do that|continue|create|generate|support)",
    re.IGNORECASE,
)
_CUT = frozenset({"length", "max_tokens"})


def flags_of(
    text: str, finish_reason: str | None, num_tokens: int | None, long_response_tokens: int | None
) -> tuple[str, ...]:
    """Flags of a response: `empty`, `refusal`, `truncated`, `long`.

    Args:
        text: the response.
        finish_reason: why it ended, in the server's words.
        num_tokens: its length as the server counted it, where it did.
        long_response_tokens: over so many, it is `long`.
    """
    most = math.inf if long_response_tokens is None else long_response_tokens
    found = {
        "empty": not text.strip(),
        "refusal": finish_reason == "content_filter" or bool(_REFUSAL.match(text)),
        "truncated": finish_reason in _CUT,
        "long": (num_tokens or 0) > most,
    }
    return tuple(flag for flag, is_set in found.items() if is_set)
