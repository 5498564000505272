"""The chat templates that strop brings along, for bases that have none."""

from __future__ import annotations

from typing import Any

from strop.data.layout import added_tokens
from strop.errors import DataError

BUILT_IN = ("chatml", "plain")


def writes_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts a BOS in front of a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]


def built_in_template(tokenizer: Any, name: str) -> str:
    r"""The Jinja text of a built-in template, made for a tokenizer.

    ``chatml`` is `<|im_start|>role\ncontent<|im_end|>\n`; where the tokenizer does not hold `<|im_end|>` as one
    token, an answer is closed by the tokenizer's own end token instead, so that there is one token to stop at.
    ``plain`` is `Role: content\n\n`, an answer closed by the end token. Both begin with BOS if the tokenizer adds one
    to a text.

    Raises:
        DataError: If the tokenizer has no end token that could close an answer.
    """
    added = set(added_tokens(tokenizer))
    stop = "<|im_end|>" if name == "chatml" and "<|im_end|>" in added else tokenizer.eos_token
    if not stop:
        raise DataError(
            f"the tokenizer has no end token, which the built-in template {name!r} needs to close an answer; "
            "set eos_token in tokenizer_config.json"
        )
    bos = "{{ bos_token }}" if writes_bos(tokenizer) else ""
    if name == "chatml":
        header, space, other, gap, prompt = (
            "'<|im_start|>' + message.role + '\\n'",
            "",
            "<|im_end|>",
            "\\n",
            "<|im_start|>assistant\n",
        )
    else:
        header, space, other, gap, prompt = "message.role | capitalize + ':'", "' ' + ", "", "\\n\\n", "Assistant:"
    return (
        f"{bos}{{%- for message in messages -%}}"
        f"{{{{ ({header}) }}}}"
        "{%- if message.role == 'assistant' -%}"
        f"{{% generation %}}{{{{ {space}message.content + {stop!r} }}}}{{% endgeneration %}}"
        "{%- else -%}"
        f"{{{{ {space}message.content + {other!r} }}}}"
        "{%- endif -%}"
        f"{{{{ '{gap}' }}}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{ {prompt!r} }}}}{{%- endif -%}}"
    )
